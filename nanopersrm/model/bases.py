"""Where a base model's files live. A base is a folder or a GGUF file, wherever it came from.

`resolve` takes what a user wrote after `--base` and answers with a `Base`: a path on this machine
and a checked configuration in Hugging Face's names, the same for both kinds of file. Four things
can be written:

    smollm2-135m-instruct     the embedded default: no account, no hub (`embedded.py`)
    path/to/folder            config.json, *.safetensors, tokenizer.json
    path/to/model.gguf        everything in one file
    org/name                  a hub name, fetched by huggingface_hub and kept in its cache

**One configuration.** transformers 5 writes `rope_parameters` where older files have `rope_theta`
and `rope_scaling`; GGUF has its own names. All become `rope_theta` and `rope_scaling` (None, or a
dict with `rope_type`), and every field the model needs is present and of the right type, or an
`InputError` names file and field. Fields we do not know are kept. One thing GGUF does not say in
its metadata: Llama 3.1 and later stretch their slow rotary frequencies, and llama.cpp stores the
finished factors as a tensor `rope_freqs.weight`. We read the one unknown number, the largest
factor, from that tensor, rebuild the rest from Llama's published constants, and accept the file
only if both agree.

Left out: pickled `.bin` weights, quantised safetensors, GGUF files in parts, other families. Read
next: `gguf_file.py` for that format, `tokenizer.py` for the text side, `weights.py` for the
numbers.
"""

import functools
import json
import math
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanopersrm import InputError
from nanopersrm.files import reason
from nanopersrm.model.embedded import DEFAULT_BASE, embedded
from nanopersrm.model.gguf_file import GgufFile, read_gguf

FAMILIES = ("llama", "qwen2", "qwen3")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
HUB_FILES = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json"]
HUB_FILES += ["chat_template.*", "*.safetensors", "*.safetensors.index.json"]

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
DEFAULTS = {  # of fields an older config.json may leave out, as transformers has them
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
GGUF_FIELDS = {  # Hugging Face name -> GGUF key after the architecture
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
LLAMA3_ROPE: dict[
    str, Any
] = {  # the same in Llama 3.1, 3.2 and 3.3; only the factor differs (8 or 32)
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Base:
    """A base on this machine: its files and its configuration in Hugging Face's names."""

    name: str  # as the user wrote it
    path: Path  # the folder, or the GGUF file
    kind: Literal["safetensors", "gguf"]
    config: dict[str, Any]

    def reader(self) -> GgufFile:
        """The GGUF file (`.metadata`, `.tensors`), opened once for weights and tokenizer."""
        if self.kind != "gguf":
            raise InputError(f"{self.path}: expected a GGUF file, found a folder of safetensors")
        return _open(self.path)


def resolve(base: str, say: Callable[[str], None] | None = None) -> Base:
    """Find (or fetch) the base a user named. `say` gets one line before a download.

    >>> resolve("smollm2-135m-instruct").config["hidden_size"]
    576
    """
    if base == DEFAULT_BASE:
        return _from_gguf(embedded(say or _silent), base)
    path = Path(os.path.expanduser(base))  # Path.expanduser raises for a ~user there is not
    mode = _mode(path, base) if base.strip() else 0
    if stat.S_ISDIR(mode):
        return _from_folder(path, base)
    if stat.S_ISREG(mode):
        return _from_gguf(path, base)
    if HUB_NAME.fullmatch(base):
        return _from_folder(_snapshot(base, say or _silent), base)
    raise InputError(
        f"base {base!r}: expected {DEFAULT_BASE!r}, a folder with config.json, a .gguf file or a "
        "hub name like org/name; there is no such file or folder"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; what is broken is named with its line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: expected JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text: {error.reason}") from error
    except RecursionError as error:
        raise InputError(f"{path}: expected JSON, found it nested too deeply") from error
    except OSError as error:
        raise InputError(f"{path}: expected a readable file: {error.strerror}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _mode(path: Path, name: str) -> int:
    """What lies there, as `os.stat` says it; 0: nothing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte
        return 0
    except OSError as error:
        raise InputError(f"base {name!r}: cannot be read ({reason(error)})") from error


def _silent(line: str) -> None:
    """No one listens."""


@functools.lru_cache(maxsize=4)
def _opened(path: Path, size: int, mtime_ns: int) -> GgufFile:
    return read_gguf(path)


def _open(path: Path) -> GgufFile:
    """`read_gguf`, once for as long as the file stays as it is."""
    try:
        about = path.stat()
    except OSError as error:
        raise InputError(f"{path}: expected a readable GGUF file: {error.strerror}") from error
    return _opened(path, about.st_size, about.st_mtime_ns)


def _snapshot(name: str, say: Callable[[str], None]) -> Path:
    """The folder of a hub model, fetched unless it is in the hub library's own cache."""
    from huggingface_hub import errors, snapshot_download  # 0.4 s, and most runs never need it

    say(f"fetching {name} from the hub, unless it is here already")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except errors.GatedRepoError as error:
        raise InputError(
            f"base {name!r}: gated: accept its licence on the hub and log in first"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"base {name!r}: no such folder here and no such model on the hub"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"base {name!r}: expected a hub name like org/name") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise InputError(
            f"base {name!r}: no such folder here, not in the hub's cache, and no network"
        ) from error
    except errors.HfHubHTTPError as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"base {name!r}: the hub did not answer as expected: {line}") from error


def _from_folder(path: Path, name: str) -> Base:
    """A Hugging Face folder: read and check its config.json, and see that the weights are there."""
    file = path / "config.json"
    try:
        inside = os.listdir(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error
    if file.name not in inside:
        raise InputError(f"{path}: expected a folder with config.json, found none")
    config = read_json(file)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{file}: expected model_type {' or '.join(FAMILIES)}, found {family!r}")
    if config.get("quantization_config"):
        raise InputError(f"{file}: expected unquantised weights, found a quantization_config")
    weights = {one for one in inside if one.endswith(".safetensors")}
    present = {one for one in weights if not one.startswith("adapter")}
    if not present:
        raise InputError(f"{path}: expected *.safetensors files, found none")
    index = path / "model.safetensors.index.json"
    if index.name in inside:
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: expected a weight_map, found none")
        if missing := sorted({str(shard) for shard in shards.values()} - present):
            raise InputError(f"{index}: expected the file {missing[0]!r} beside it, found none")
    return Base(name, path, "safetensors", _normalised(config, file))


def _from_gguf(path: Path, name: str) -> Base:
    """A GGUF file: its metadata under Hugging Face's names."""
    file = _open(path)
    meta, family = file.metadata, file.metadata.get("general.architecture")
    if family not in FAMILIES:
        raise InputError(
            f"{path}: expected general.architecture {' or '.join(FAMILIES)}, found {family!r}"
        )
    if meta.get("split.count", 1) not in (0, 1):
        raise InputError(
            f"{path}: expected a model in one GGUF file, found 1 of {meta['split.count']}"
        )
    config: dict[str, Any] = {"model_type": family}
    for field, key in GGUF_FIELDS.items():
        if f"{family}.{key}" in meta:
            config[field] = meta[f"{family}.{key}"]
    config.setdefault("vocab_size", len(meta.get("tokenizer.ggml.tokens", ())))
    tensors = {tensor.name: tensor for tensor in file.tensors}
    config["tie_word_embeddings"] = "output.weight" not in tensors
    scaling = meta.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling}
        for ours, theirs in (
            ("factor", "factor"),
            ("original_max_position_embeddings", "original_context_length"),
        ):
            if f"{family}.rope.scaling.{theirs}" in meta:
                config["rope_scaling"][ours] = meta[f"{family}.rope.scaling.{theirs}"]
    for ours, words in (("bos_token_id", ["bos"]), ("eos_token_id", ["eos", "eot", "eom"])):
        every = [meta.get(f"tokenizer.ggml.{word}_token_id") for word in words]
        ids = list(dict.fromkeys(token for token in every if token is not None))
        config[ours] = ids if len(ids) > 1 else (ids[0] if ids else None)
    config = _normalised(config, path)
    rotary = meta.get(f"{family}.rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"]:
        raise InputError(
            f"{path}: expected rotary positions on all of a head, found {rotary} numbers"
        )
    if "rope_freqs.weight" in tensors:
        config["rope_scaling"] = _llama3_scaling(tensors["rope_freqs.weight"].data, config, path)
    return Base(name, path, "gguf", config)


def _llama3_scaling(found: np.ndarray, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The `rope_scaling` that gives exactly the frequency divisors `found`, shape (E / 2,).

    A frequency that turns less than once in the original context is divided by `factor`, one that
    turns more than four times is left alone, and those between are blended.
    """
    factor = float(found.max(initial=1.0))
    width = config["head_dim"]
    turns = config["rope_theta"] ** (-np.arange(0, width, 2) / width) / (2 * math.pi)
    turns *= LLAMA3_ROPE["original_max_position_embeddings"]
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)  # 1: left alone
    divisors = 1 / ((1 - share) / factor + share)
    if found.shape != divisors.shape or not np.allclose(found, divisors, rtol=1e-3):
        raise InputError(f"{path}: expected rope_freqs.weight as in Llama 3, found other factors")
    return {**LLAMA3_ROPE, "factor": factor}


def _normalised(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """One way to write rotary positions, defaults filled in, every needed field checked."""
    config = dict(config)
    rope = dict(_table(config.pop("rope_parameters", None), file, "rope_parameters"))
    rope = rope or dict(_table(config.get("rope_scaling"), file, "rope_scaling"))
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or ("default" if not rope else None))
    if not isinstance(rope["rope_type"], str):
        raise InputError(f"{file}: rope_scaling: expected a rope_type, found {rope}")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    for field, value in DEFAULTS.items():
        config.setdefault(field, value)
    for field in SIZES:
        _number(config, field, int, file)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if config.get("head_dim") is None:
        if width % heads:
            raise InputError(
                f"{file}: expected hidden_size {width} to be a multiple of {heads} heads"
            )
        config["head_dim"] = width // heads
    for field in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        _number(config, field, int, file)
    for field in ("rms_norm_eps", "rope_theta"):
        _number(config, field, float, file)
    if heads % config["num_key_value_heads"] or config["head_dim"] % 2:
        raise InputError(
            f"{file}: expected num_attention_heads {heads} to be a multiple of num_key_value_heads "
            f"{config['num_key_value_heads']}, and head_dim {config['head_dim']} to be even"
        )
    tied = config["tie_word_embeddings"]
    if not isinstance(tied, bool):
        raise InputError(f"{file}: tie_word_embeddings: expected true or false, found {tied!r}")
    for field in ("bos_token_id", "eos_token_id"):
        _ids(config.setdefault(field, None), field, file)
    return config


def _table(value: Any, file: Path, field: str) -> dict[str, Any]:
    """A dict that may be absent or null."""
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{file}: {field}: expected an object, found {value!r}")
    return value or {}


def _number(config: dict[str, Any], field: str, kind: type, file: Path) -> None:
    """A positive, finite number: an int, or for kind float also an int."""
    if field not in config:
        raise InputError(f"{file}: expected the field {field}, found none")
    value = config[field]
    right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not right or not 0 < value < math.inf:
        raise InputError(f"{file}: {field}: expected a positive {kind.__name__}, found {value!r}")


def _ids(value: Any, field: str, file: Path) -> None:
    """None, a token id, or a list of them."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in listed):
        raise InputError(f"{file}: {field}: expected a token id or a list of them, found {value!r}")
