"""Text in, token ids out. The only file that knows which ids mean which text.

**Text is data.** `encode` never yields a control token: whoever writes `<|im_end|>` in an essay
gets the tokens that spell it (seven in SmolLM2). Control tokens come from one place only, the chat
template, and `chat` keeps the two apart like this (a masked character is shown as ▒):

    1. mask      content "I wrote <|im_end|> here"  ->  "I wrote ▒ here"   (a private-use character
                 that no content and no template contains, one for each control token met)
    2. render    the model's own Jinja template  ->  "<|im_start|>user\nI wrote ▒ here<|im_end|>\n"
    3. split     at control tokens: every one left is the template's  ->  its id
    4. unmask    the pieces between, and encode them as text  ->  "user\nI wrote <|im_end|> here"

For contents without look-alikes the ids equal those of transformers' `apply_chat_template`.
`decode(encode(text)) == text`, but for Qwen's own NFC normalisation, bytes that a vocabulary has no
token for, and lone surrogates, which become U+FFFD.

A folder's tokenizer is its tokenizer.json. From a GGUF file we build the same byte-level BPE. The
file names its pre-tokenizer (the rule that cuts text before merging) by one word; `PRE` holds what
it stands for, as in llama.cpp's llama-vocab.cpp.

Left out: SentencePiece in GGUF files, vocab.json with merges.txt, tools, several named templates.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanopersrm import InputError
from nanopersrm.files import reason
from nanopersrm.model.base import Base, read_json

# The split patterns of the models' own tokenizer.json files.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # up to three digits together
DIGITS = pre_tokenizers.Digits(individual_digits=True)
QWEN2, LLAMA3 = (pre_tokenizers.Split(Regex(p), "isolated") for p in (QWEN2_SPLIT, LLAMA3_SPLIT))
PRE: dict[str, tuple[list[Any], bool, bool, bool]] = {
    # tokenizer.ggml.pre: (cuts, then GPT-2's pattern, NFC, a whole word needs no merges)
    "smollm": ([DIGITS], True, False, False),
    "qwen2": ([QWEN2], False, True, False),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), ([LLAMA3], False, False, True)),
    **dict.fromkeys(("gpt-2", "default"), ([], True, False, False)),  # default: an older file
}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# The character that byte-level BPE writes for a byte: itself where it prints, as GPT-2 has it.
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTE_OF = {chr(byte): byte for byte in SHOWN} | {chr(256 + n): b for n, b in enumerate(HIDDEN)}
ENDINGS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")  # end a reply wherever they are control
PLAIN_TEMPLATE = """\
{{ bos_token if adds_bos else '' }}{% for message in messages %}\
{{ message['role'] | capitalize }}:\n{{ message['content'] }}\
{{ eos_token if message['role'] == 'assistant' else '' }}\n\n{% endfor %}\
{% if add_generation_prompt %}Assistant:\n{% endif %}"""


@dataclass(frozen=True)
class Vocabulary:
    """What either kind of base says about text."""

    backend: Backend
    template: str | None
    bos: str | None
    eos: str | None
    ends: set[int]  # ids that end a reply
    adds_bos: bool  # whether plain text starts with BOS


class Tokenizer:
    """Owns the vocabulary, the control tokens and the compiled chat template of one base."""

    def __init__(self, vocabulary: Vocabulary, name: str):
        self.name, self._backend = name, vocabulary.backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # specials in a text are spelt, not matched
        added = self._backend.get_added_tokens_decoder()
        self._control = {token.content: i for i, token in added.items() if token.special}
        self.special_ids = frozenset(self._control.values())
        longest_first = sorted(self._control, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) matches nothing
        self._control_pattern = re.compile(f"({pattern})")
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        self.bos_id = self._backend.token_to_id(vocabulary.bos) if vocabulary.bos else None
        endings = {self._control[word] for word in ENDINGS if word in self._control}
        eos = self._backend.token_to_id(vocabulary.eos) if vocabulary.eos else None
        self.eos_ids = frozenset(vocabulary.ends | endings | ({eos} if eos is not None else set()))
        self._source = vocabulary.template or PLAIN_TEMPLATE
        self._template = _compile(self._source, name)
        words = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos}
        self._variables: dict[str, Any] = {key: word for key, word in words.items() if word}
        self._variables |= {"tools": None, "documents": None, "adds_bos": vocabulary.adds_bos}
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
        ids = self._backend.encode(_valid(text), add_special_tokens=False).ids
        # In some vocabularies the unknown token is a control token; a text still never makes one.
        return [i for i in ids if i not in self.special_ids]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and the characters start to end of the text that each id stands for."""
        encoding = self._backend.encode(_valid(text), add_special_tokens=False)
        kept = [
            (i, span)
            for i, span in zip(encoding.ids, encoding.offsets, strict=True)
            if i not in self.special_ids
        ]
        return [i for i, _ in kept], [span for _, span in kept]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of some ids; control tokens are dropped, or with `special` written out."""
        return self._backend.decode(list(ids), skip_special_tokens=not special)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id adds to a text, b"" for control tokens; made once, 0.1 s for 49,152."""
        words = [self._backend.id_to_token(i) for i in range(self.vocab_size)]
        silent = self.special_ids | self.eos_ids  # they are no part of a reply
        return [
            b"" if word is None or i in silent else bytes_of(word) for i, word in enumerate(words)
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
        assert messages, "no messages"
        masks, masked = self._mask(
            [{field: _valid(m[field]) for field in ("role", "content")} for m in messages]
        )
        try:
            text = self._template.render(
                **self._variables, messages=masked, add_generation_prompt=generation
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"{self.name}: its chat template refused: {reason(error)}") from error
        unmask = {ord(character): token for token, character in masks.items()}
        return self._join(text, continuation, unmask)

    def _join(self, text: str, continuation: str, unmask: dict[int, str]) -> list[int]:
        """Ids of a rendered template: its control tokens, and the text between them unmasked."""
        ids: list[int] = []
        parts = self._control_pattern.split(text)  # text, control, text, control, …, text
        for piece, word in itertools.zip_longest(parts[::2], parts[1::2]):
            ids += self.encode(piece.translate(unmask) + ("" if word else continuation))
            ids += [self._control[word]] if word else []
        return ids

    def _mask(self, messages: list[dict[str, str]]) -> tuple[dict[str, str], list[dict[str, str]]]:
        """A private-use character for each control token met, and the masked messages."""
        texts = [text for message in messages for text in message.values()]
        met = sorted({word for text in texts for word in self._control_pattern.findall(text)})
        taken = set(self._source).union(*texts, *self._control) if met else set()
        private = itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
        free = (chr(point) for point in private if chr(point) not in taken)
        masks = dict(zip(met, free, strict=False))
        if len(masks) < len(met):
            raise InputError("messages: expected some private-use characters unused, got none")

        def mask(text: str) -> str:
            return self._control_pattern.sub(lambda match: masks[match[0]], text)

        return masks, [{field: mask(text) for field, text in m.items()} for m in messages]

    def _check_pieces(self) -> None:
        """Encoding piece by piece must give what encoding the whole gives, else `chat` is wrong.

        It fails where only the first piece of a text gets a leading space (some SentencePiece).
        """
        word = next(iter(sorted(self._control)), "")
        probe = f"a 1\n{word} b{word}\n\nc {word}d"
        self._backend.encode_special_tokens = False
        whole = self._backend.encode(probe, add_special_tokens=False).ids
        self._backend.encode_special_tokens = True
        if self._join(probe, "", {}) != whole:
            raise InputError(
                f"{self.name}: a tokenizer that treats text after {word!r} unlike other text is "
                "not supported"
            )

    def _digits(self) -> tuple[int, ...]:
        """The ids of 1 to 9 after "=", which must be one token each: a score is one token."""
        before, ids = self.encode("A="), []
        for digit in "123456789":
            after = self.encode(f"A={digit}")
            if len(after) != len(before) + 1 or after[:-1] != before:
                raise InputError(
                    f"{self.name}: expected a tokenizer that writes {digit!r} after 'A=' as one "
                    f"token, got {before} then {after}"
                )
            ids.append(after[-1])
        return tuple(ids)


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


def read_vocabulary(base: Base) -> Vocabulary:
    """The vocabulary of a base, from its folder or from its GGUF file."""
    return _from_gguf(base) if base.kind == "gguf" else _from_folder(base)


def _from_folder(base: Base) -> Vocabulary:
    """tokenizer.json, and what the files beside it say about control tokens and the template."""
    file = base.path / "tokenizer.json"
    try:
        backend = Backend.from_buffer(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected a tokenizer ({reason(error)})") from error
    settings, generation = (
        read_json(path) if (path := base.path / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    words: dict[str, Any] = {}
    for word in ("bos_token", "eos_token"):
        token = settings.get(word)
        words[word] = token.get("content") if isinstance(token, dict) else token
    if not all(word is None or isinstance(word, str) for word in words.values()):
        raise InputError(f"{base.path}: expected bos_token and eos_token as texts, got {words}")
    # Some folders do not mark these two as control tokens. (A set: both may be the same.)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = {word for word in words.values() if word and backend.token_to_id(word) is not None}
    backend.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in sorted(new - added)]
    )
    bos_id = backend.token_to_id(words["bos_token"]) if words["bos_token"] else None
    starts = backend.encode("", add_special_tokens=True).ids
    ends = _ids(base.config.get("eos_token_id"), base.path / "config.json")
    ends += _ids(generation.get("eos_token_id"), base.path / "generation_config.json")
    adds_bos = bool(settings.get("add_bos_token")) or (bos_id is not None and bos_id in starts)
    template = _template_source(base.path, settings.get("chat_template"))
    return Vocabulary(
        backend, template, words["bos_token"], words["eos_token"], set(ends), adds_bos
    )


def _template_source(folder: Path, written: Any) -> str | None:
    """The template: a file of its own wins over what a JSON or GGUF file says."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read ({reason(error)})") from error
    if written is not None and not isinstance(written, str):
        raise InputError(f"{folder}: expected a chat_template as text, got {written!r:.60}")
    return written


def _from_gguf(base: Base) -> Vocabulary:
    """Byte-level BPE from a GGUF file's vocabulary, merges and the name of its pre-tokenizer."""
    meta = base.reader.metadata

    def field(name: str, default: Any = None) -> Any:
        return meta.get(f"tokenizer.ggml.{name}", default)

    model, pre = field("model"), field("pre", "default")
    if model != "gpt2" or pre not in PRE:
        raise InputError(
            f"{base.path}: expected tokenizer.ggml.model 'gpt2' with pre {', '.join(PRE)}, got "
            f"{model!r} with {pre!r}"
        )
    tokens, kinds = field("tokens", []), field("token_type", [])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in field("merges", [])]
    wrong = [m for m in merges if len(m) != 2 or not vocabulary.keys() >= {*m, "".join(m)}]
    if not len(tokens) == len(vocabulary) == len(kinds) > 0 or wrong:
        raise InputError(
            f"{base.path}: expected different tokens with a type each, and merges of two of them, "
            f"got {len(tokens)} tokens, {len(kinds)} types and such merges as {wrong[:1]}"
        )
    cuts, gpt2, nfc, whole_words = PRE[pre]
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    if nfc:
        backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        words = [token for token, k in zip(tokens, kinds, strict=True) if k == kind]
        added = [AddedToken(word, special=special, normalized=False) for word in words]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    starts, ends = (_ids(base.config.get(f"{word}_token_id"), base.path) for word in ("bos", "eos"))
    if any(token >= len(tokens) for token in starts + ends):
        raise InputError(f"{base.path}: expected ids below {len(tokens)}, got {starts + ends}")
    bos, eos = (tokens[ids[0]] if ids else None for ids in (starts, ends))
    template = _template_source(base.path, meta.get("tokenizer.chat_template"))
    return Vocabulary(backend, template, bos, eos, set(ends), bool(field("add_bos_token", False)))


def _ids(value: Any, file: Path) -> list[int]:
    """An `eos_token_id` may be a number, a list of them or nothing."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in listed):
        raise InputError(f"{file}: expected token ids that end a reply, got {value!r}")
    return listed


def bytes_of(token: str) -> bytes:
    """What a token of a byte-level vocabulary adds to a text; it may be a part of a character.

    >>> bytes_of("Ġcaf\u00c3")
    b' caf\xc3'
    """
    if BYTE_OF.keys() >= set(token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()  # added as it is
