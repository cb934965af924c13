"""A base's vocabulary: its tokens, merges, control tokens and chat template, from its own files.

**From a folder** the tokenizer is its `tokenizer.json`, read by the `tokenizers` library, with the
template from `chat_template.jinja`, `tokenizer_config.json` or `chat_template.json`.

**From a GGUF file** we build the same byte-level BPE from the file's own vocabulary and merges. A
GGUF names its pre-tokenizer (the rule that cuts text before merging) by one word, and `PRE` holds
what that word stands for, as in llama.cpp's `llama-vocab.cpp` and the models' original
`tokenizer.json` files. For `smollm` that is: each digit alone, then GPT-2's pattern. transformers
5.23 has no entry for it when it reads a GGUF and falls back to GPT-2's pattern alone, so it turns
"  7" into other ids than the model was trained on; that is why its reader is not our oracle here.
Building SmolLM2's 48,900 merges takes less than 0.2 s, so nothing is cached.

Left out: SentencePiece vocabularies in GGUF files, vocab.json with merges.txt, tool templates.
Read next: `tokenizer.py`, which turns text into ids with what is read here.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanopersrm import InputError
from nanopersrm.model.bases import Base, read_json

# The split patterns of the models' own tokenizer.json files.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # up to three digits together
PRE = {  # tokenizer.ggml.pre -> (pre-tokenizer, normalise to NFC, a whole word needs no merges)
    "smollm": ("digits", False, False),
    "qwen2": (QWEN2_SPLIT, True, False),
    "llama-bpe": (LLAMA3_SPLIT, False, True),
    "llama3": (LLAMA3_SPLIT, False, True),
    "llama-v3": (LLAMA3_SPLIT, False, True),
    "gpt-2": ("gpt2", False, False),
    "default": ("gpt2", False, False),  # what files from before the word existed were made for
}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# The character that byte-level BPE writes for a byte: itself where it prints, as GPT-2 has it.
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTE_OF = {chr(byte): byte for byte in SHOWN} | {chr(256 + n): b for n, b in enumerate(HIDDEN)}
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a single byte
BLANK = "\u2581"  # how SentencePiece writes a blank


@dataclass(frozen=True)
class Vocabulary:
    """What either kind of base says about text."""

    backend: Backend
    template: str | None
    bos: str | None
    eos: str | None
    ends: set[int]  # ids that end a reply
    adds_bos: bool  # whether plain text starts with BOS


def read_vocabulary(base: Base) -> Vocabulary:
    """The vocabulary of a base, from its folder or from its GGUF file."""
    return _from_gguf(base) if base.kind == "gguf" else _from_folder(base)


def _from_folder(base: Base) -> Vocabulary:
    """tokenizer.json, and what the files beside it say about control tokens and the template."""
    file = base.path / "tokenizer.json"
    try:
        backend = Backend.from_buffer(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: expected a readable file: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file}: expected a tokenizer: {' '.join(str(error).split())}") from error
    settings, names, generation, old = (
        read_json(path) if (path := base.path / name).is_file() else {}
        for name in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "chat_template.json",
        )
    )
    words = {}
    for word in ("bos_token", "eos_token"):
        found = settings.get(word, names.get(word))
        if not settings and not names:  # then only config.json knows
            first = _ids(base.config.get(f"{word}_id"), base.path / "config.json")
            found = backend.id_to_token(first[0]) if first else None
        words[word] = found.get("content") if isinstance(found, dict) else found
    if not all(word is None or isinstance(word, str) for word in words.values()):
        raise InputError(f"{base.path}: expected bos_token and eos_token as texts, found {words}")
    # Older folders mark some control tokens only here. (A set: one may be named several times.)
    listed = {word for word in words.values() if word}
    for entry in dict(settings.get("added_tokens_decoder") or {}).values():
        if isinstance(entry, dict) and entry.get("special"):
            listed.add(entry.get("content"))
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = sorted(word for word in listed - added if backend.token_to_id(word) is not None)
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in new])
    bos_id = backend.token_to_id(words["bos_token"]) if words["bos_token"] else None
    starts = backend.encode("", add_special_tokens=True).ids
    ends = _ids(base.config.get("eos_token_id"), base.path / "config.json")
    ends += _ids(generation.get("eos_token_id"), base.path / "generation_config.json")
    adds_bos = bool(settings.get("add_bos_token")) or (bos_id is not None and bos_id in starts)
    template = _template_source(base.path, settings.get("chat_template", old.get("chat_template")))
    return Vocabulary(
        backend, template, words["bos_token"], words["eos_token"], set(ends), adds_bos
    )


def _template_source(folder: Path, written: Any) -> str | None:
    """The template: a file of its own wins over what a JSON file says (a text, or a named list)."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{own}: expected readable UTF-8 text: {error}") from error
    if isinstance(written, list):
        named = {e.get("name"): e.get("template") for e in written if isinstance(e, dict)}
        written = named.get("default")
    if written is not None and not isinstance(written, str):
        raise InputError(f"{folder}: expected a chat_template as text, found {written!r:.60}")
    return written


def _from_gguf(base: Base) -> Vocabulary:
    """Byte-level BPE from a GGUF file's vocabulary, merges and the name of its pre-tokenizer."""
    meta = base.reader().metadata

    def field(name: str, default: Any = None) -> Any:
        return meta.get(f"tokenizer.ggml.{name}", default)

    if field("model") != "gpt2":
        raise InputError(
            f"{base.path}: expected tokenizer.ggml.model 'gpt2', found {field('model')!r}"
        )
    pre = field("pre", "default")
    if pre not in PRE:
        raise InputError(
            f"{base.path}: expected tokenizer.ggml.pre {', '.join(PRE)}, found {pre!r}"
        )
    tokens, kinds = field("tokens", []), field("token_type", [])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in field("merges", [])]
    if not tokens or len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise InputError(
            f"{base.path}: expected a vocabulary of different tokens with a type each, found "
            f"{len(tokens)} tokens, {len(vocabulary)} different, {len(kinds)} types"
        )
    for merge in merges:
        if len(merge) != 2 or not vocabulary.keys() >= {*merge, "".join(merge)}:
            raise InputError(f"{base.path}: expected merges of two known tokens, found {merge}")
    split, nfc, whole_words = PRE[pre]
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    if nfc:
        backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=split in ("digits", "gpt2")
    )
    first: list[Any] = []
    if split == "digits":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif split != "gpt2":
        first = [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        words = [token for token, found in zip(tokens, kinds, strict=True) if found == kind]
        added = [AddedToken(word, special=special, normalized=False) for word in words]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    starts, ends = (_ids(base.config.get(f"{word}_token_id"), base.path) for word in ("bos", "eos"))
    if any(token >= len(tokens) for token in starts + ends):
        raise InputError(f"{base.path}: expected ids below {len(tokens)}, found {starts + ends}")
    bos, eos = (tokens[ids[0]] if ids else None for ids in (starts, ends))
    template = _template_source(base.path, meta.get("tokenizer.chat_template"))
    return Vocabulary(backend, template, bos, eos, set(ends), bool(field("add_bos_token", False)))


def _ids(value: Any, file: Path) -> list[int]:
    """An `eos_token_id` may be a number, a list of them or nothing."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in listed):
        raise InputError(f"{file}: expected token ids that end a reply, found {value!r}")
    return listed


def bytes_of(token: str, byte_level: bool) -> bytes:
    """What a token of a vocabulary adds to a text; it may be a part of a character.

    >>> bytes_of("Ġcaf\u00c3", True), bytes_of("\u2581caf", False), bytes_of("<0xC3>", False)
    (b' caf\\xc3', b' caf', b'\\xc3')
    """
    if byte_level and BYTE_OF.keys() >= set(token):
        return bytes(BYTE_OF[character] for character in token)
    if not byte_level and (found := BYTE_TOKEN.fullmatch(token)):
        return bytes.fromhex(found[1])
    return (token if byte_level else token.replace(BLANK, " ")).encode()
