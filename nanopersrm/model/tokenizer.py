"""Text in, token ids out. The only file that knows which ids mean which text.

**Text is data.** `encode` never yields a control token: whoever writes `<|im_end|>` in an essay
gets the tokens that spell it (seven in SmolLM2). Control tokens come from one place only, the chat
template, and `chat` keeps the two apart like this (a masked character is shown as ▒):

    1. mask      content "I wrote <|im_end|> here"  ->  "I wrote ▒ here"   (a private-use character
                 that no content and no template contains, one for each control token met)
    2. render    the model's own Jinja template  ->  "<|im_start|>user\nI wrote ▒ here<|im_end|>\n"
    3. split     at control tokens: every one left is the template's  ->  its id
    4. unmask    the pieces between, and encode them as text  ->  "user\nI wrote <|im_end|> here"

For contents without look-alikes the ids equal those of transformers' `apply_chat_template`; the
tests compare them. `encode` adds no BOS; a template writes it where the model wants it.

SmolLM2's vocabulary has no token for a few control characters (U+0004, U+0006, U+0013, U+0014,
U+0016, U+001D) nor for the first byte of Unicode's planes 4 to 11, which are unassigned, and no
unknown token either: these bytes vanish, in the original as here. All else comes back:
`decode(encode(text)) == text`, after Qwen's own NFC normalisation where that is part of the
vocabulary. Lone surrogates, which are no text at all, become U+FFFD.

Left out: tools and documents in templates; a special token half in a template and half in a
content (no supported template writes half a token).
Read next: `vocabulary.py` for where the tokens come from, `prompts.py` for what we say in a chat.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanopersrm import InputError
from nanopersrm.model.bases import Base
from nanopersrm.model.vocabulary import BLANK, Vocabulary, bytes_of, read_vocabulary

ENDINGS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")  # end a reply wherever they are control
PLAIN_TEMPLATE = """\
{{ bos_token if adds_bos else '' }}{% for message in messages %}\
{{ message['role'] | capitalize }}:\n{{ message['content'] }}\
{{ eos_token if message['role'] == 'assistant' else '' }}\n\n{% endfor %}\
{% if add_generation_prompt %}Assistant:\n{% endif %}"""


class Tokenizer:
    """Owns the vocabulary, the control tokens and the compiled chat template of one base."""

    def __init__(self, vocabulary: Vocabulary, name: str):
        self.name, self._backend = name, vocabulary.backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # specials in a text are spelt, not matched
        added = self._backend.get_added_tokens_decoder()
        self._control = {token.content: (i, token) for i, token in added.items() if token.special}
        self.special_ids = frozenset(i for i, _ in self._control.values())
        longest_first = sorted(self._control, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) matches nothing
        self._control_pattern = re.compile(f"({pattern})")
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        self.bos_id = self._backend.token_to_id(vocabulary.bos) if vocabulary.bos else None
        endings = {self._control[word][0] for word in ENDINGS if word in self._control}
        eos = self._backend.token_to_id(vocabulary.eos) if vocabulary.eos else None
        self.eos_ids = frozenset(vocabulary.ends | endings | ({eos} if eos is not None else set()))
        self._source = vocabulary.template or PLAIN_TEMPLATE
        self._template = _compile(self._source, name)
        named = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos}
        self._variables: dict[str, Any] = {key: word for key, word in named.items() if word}
        if vocabulary.template is None:
            self._variables["adds_bos"] = vocabulary.adds_bos
        self.digit_ids = self._digits()
        self._check_pieces()

    @classmethod
    def load(cls, base: Base) -> "Tokenizer":
        """The tokenizer of a base, from its folder or from its GGUF file."""
        return cls(read_vocabulary(base), base.name)

    def encode(self, text: str) -> list[int]:
        """Ids of a text as data: no BOS, no control token whatever the text says.

        >>> tokenizer.encode("A=7")                                   # with SmolLM2
        [49, 45, 39]
        """
        found = self._backend.encode(_valid(text), add_special_tokens=False).ids
        if self.special_ids.isdisjoint(found):
            return found
        # In some vocabularies the unknown token is a control token; a text still never makes one.
        return [token for token in found if token not in self.special_ids]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of some ids; control tokens are dropped, or with `special` written out."""
        return self._backend.decode(list(ids), skip_special_tokens=not special)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id adds to a text, b"" for control tokens; made once, 0.1 s for 49,152."""
        byte_level = self._backend.token_to_id(BLANK) is None
        words = [self._backend.id_to_token(i) for i in range(self.vocab_size)]
        silent = self.special_ids | self.eos_ids  # they are no part of a reply
        return [
            b"" if word is None or i in silent else bytes_of(word, byte_level)
            for i, word in enumerate(words)
        ]

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        generation: bool = True,
        continuation: str = "",
    ) -> list[int]:
        """Ids of a conversation in the model's own template.

        messages: {"role": …, "content": …} each. generation: end with the header of a reply.
        continuation: the start of the reply, encoded together with the text it follows.
        """
        if not messages:
            raise InputError("messages: expected at least one message, found none")
        for n, message in enumerate(messages):
            for field in ("role", "content"):
                if not isinstance(message.get(field), str):
                    raise InputError(f"message {n}: expected a text as {field!r}")
        clean = [
            {key: _valid(text) if isinstance(text, str) else text for key, text in m.items()}
            for m in messages
        ]
        masks, masked = self._mask(clean)
        try:
            text = self._template.render(
                messages=masked,
                tools=None,
                documents=None,
                add_generation_prompt=generation,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            line = " ".join(str(error).split())
            raise InputError(f"{self.name}: its chat template refused these: {line}") from error
        unmask = {ord(character): token for token, character in masks.items()}
        return self._join(text, continuation, unmask)

    def _join(self, text: str, continuation: str, unmask: dict[int, str]) -> list[int]:
        """Ids of a rendered template: its control tokens, and the text between them unmasked."""
        ids: list[int] = []
        for piece, control in self._pieces(text):
            piece = piece.translate(unmask)
            ids += self.encode(piece if control is not None else piece + continuation)
            if control is not None:
                ids.append(control)
        return ids

    def _mask(self, messages: list[dict[str, Any]]) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """A private-use character for each control token met, and the masked messages."""
        strings = [text for m in messages for text in m.values() if isinstance(text, str)]
        met = sorted({word for text in strings for word in self._control_pattern.findall(text)})
        if not met:
            return {}, messages
        taken = set(self._source).union(*strings, *self._control)
        private = itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
        free = (chr(point) for point in private if chr(point) not in taken)
        masks = dict(zip(met, free, strict=False))
        if len(masks) < len(met):
            raise InputError(
                "messages: expected some private-use characters unused, found all used"
            )

        def hidden(value: Any) -> Any:
            if not isinstance(value, str):
                return value
            return self._control_pattern.sub(lambda found: masks[found[0]], value)

        return masks, [{key: hidden(value) for key, value in m.items()} for m in messages]

    def _pieces(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Cut a rendered template into (text, control id after it); the last one has None."""
        parts = self._control_pattern.split(text)  # text, control, text, control, …, text
        strip_left = False
        for piece, word in itertools.zip_longest(parts[::2], parts[1::2]):
            control, token = self._control[word] if word is not None else (None, None)
            if strip_left:  # the token before takes the white space after it
                piece = piece.lstrip()
            yield (piece.rstrip() if token and token.lstrip else piece), control
            strip_left = bool(token and token.rstrip)

    def _check_pieces(self) -> None:
        """Encoding piece by piece must give what encoding the whole gives, else `chat` is wrong.

        It holds for every byte-level BPE. It fails where only the first piece of a text gets a
        leading space (some SentencePiece models): better an error here than other ids than trained.
        """
        word = next(iter(sorted(self._control)), "")
        probe = f"a 1\n{word} b{word}\n\nc {word}d"
        self._backend.encode_special_tokens = False
        whole = self._backend.encode(probe, add_special_tokens=False).ids
        self._backend.encode_special_tokens = True
        if self._join(probe, "", {}) != whole:
            raise InputError(
                f"{self.name}: expected a tokenizer that treats text after {word!r} like any other "
                "text; this one adds a space to the first text only, and is not supported"
            )

    def _digits(self) -> tuple[int, ...]:
        """The ids of 1 to 9 after "=", which must be one token each: a score is one token."""
        before, found = self.encode("A="), []
        for digit in "123456789":
            after = self.encode(f"A={digit}")
            if len(after) != len(before) + 1 or after[:-1] != before:
                raise InputError(
                    f"{self.name}: expected a tokenizer that writes {digit!r} after 'A=' as one "
                    f"token, found {before} then {after}"
                )
            found.append(after[-1])
        return tuple(found)


def _valid(text: str) -> str:
    """The text with halves of surrogate pairs joined, and lone ones as U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _compile(source: str, name: str) -> jinja2.Template:
    """Compile a chat template in the same sandbox, with the same extras, as transformers."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # {% generation %} marks what a trainer of transformers counts; it prints what is inside.
    source = re.sub(r"{%([-+]?)\s*generation\s*([-+]?)%}", r"{%\1 if true \2%}", source)
    source = re.sub(r"{%([-+]?)\s*endgeneration\s*([-+]?)%}", r"{%\1 endif \2%}", source)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{name}: chat template, line {error.lineno}: {error.message}") from error
