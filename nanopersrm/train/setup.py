"""What training starts from: the base, the adapter to go on from, and what the result says of it.

`--preset tiny` puts a small random model of the base's vocabulary in its place: two blocks of width
64, which learn nothing worth keeping and show in seconds that everything runs.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanopersrm import InputError
from nanopersrm.judge import adapter_settings as settings_file
from nanopersrm.judge.adapter_settings import AdapterSettings, weights_sha256
from nanopersrm.model import weights
from nanopersrm.model.base import DEFAULT_BASE, Base
from nanopersrm.model.linear import Linear
from nanopersrm.model.lora import Lora, LoraConfig, load_lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import dtype_of
from nanopersrm.style import evidence
from nanopersrm.style.evidence import Evidence
from nanopersrm.style.ledger import Measurer
from nanopersrm.style.reading import Reading
from nanopersrm.train.presets import Preset, preset_for, resolve_preset

TINY = {  # sizes of the random model
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
RANDOM = "a random model"
SHOW = "--exemplar data/demo/zoe/1.txt --candidates data/demo/zoe/4.txt data/demo/beatrice/4.txt"


def is_random(preset: str | None, base: str) -> bool:
    """True where nobody has named a base for the preset tiny."""
    return preset == "tiny" and base == DEFAULT_BASE


def preset_of(name: str | None, device: torch.device, flags: Mapping[str, Any]) -> Preset:
    """The preset of this name, or of the device's memory, changed by flags."""
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_properties(device).total_memory if cuda else None
    return resolve_preset(name or preset_for(card), flags)


def load_model(base: Base, preset: Preset, device: torch.device, seed: int, tiny: bool) -> Model:
    """The base as it is trained on, frozen; `tiny`: a random model of its vocabulary."""
    dtype = dtype_of(preset.dtype, device)
    if tiny:
        return weights.random(base.config | TINY, dtype, device, preset.nf4, seed).train()
    return weights.load(base, dtype, device, preset.nf4, preset.host_embedding).train()


def adapter_settings(
    base_name: str, base: Base, model: Model, tiny: bool, free: bool
) -> AdapterSettings:
    """The judge.json of an adapter; base_name: as the base was named on the command line."""
    kinds = {kind: name for name, kind in weights.DTYPES.items()}
    if Path(base_name).exists():
        base_name = str(base.path)  # to be found from any folder
    return AdapterSettings(
        base=RANDOM if tiny else base_name,
        base_sha256=weights_sha256(base),
        nf4=any(matrix.nf4 is not None for matrix in model.modules() if isinstance(matrix, Linear)),
        dtype=kinds[model.norm.weight.dtype],
        form="pointwise",
        free=free,
    )


def find_adapter(
    adapter: str | Path | None, base: str
) -> tuple[Path | None, AdapterSettings | None]:
    """The folder of the adapter to go on from, "default" being the one that comes with the base,
    and its judge.json where it has one; None: a new adapter."""
    folder = settings_file.resolve_adapter(adapter, base)
    if folder is None and str(adapter) == settings_file.DEFAULT:
        raise InputError(f"--adapter {adapter}: no adapter comes with the base {base}")
    return folder, None if folder is None else settings_file.read(folder)


def require_adapter(
    adapter: str | Path | None, default: Path, base: str
) -> tuple[Path, AdapterSettings | None]:
    """`find_adapter` for a run that cannot do without one.

    None: the `default`, what train_sft.py leaves, or else the one that comes with the base.
    """
    if adapter is None:
        adapter = default if default.is_dir() else settings_file.DEFAULT
        if settings_file.resolve_adapter(adapter, base) is None:
            raise InputError(
                f"expected a trained adapter in {default}, found none: run `python train_sft.py` "
                "first, or name another one with --adapter"
            )
    folder, settings = find_adapter(adapter, base)
    if folder is None:
        raise InputError(f"--adapter {adapter}: expected an adapter to go on from, got none")
    return folder, settings


def defaults_from(
    settings: AdapterSettings | None, base: str, nf4: bool | None, dtype: str | None
) -> dict[str, Any]:
    """Flags that were left out, from what the adapter was trained on."""
    if settings is None:
        return {}
    return {
        "base": settings.base if base == DEFAULT_BASE and settings.base != RANDOM else base,
        "nf4": settings.nf4 if nf4 is None else nf4,
        "dtype": dtype or (settings.dtype if settings.nf4 else None),
    }


def check_base(
    settings: AdapterSettings | None, folder: Path | None, base: Base, tiny: bool
) -> str | None:
    """A note if the adapter may have been trained on another base, an error if it surely was."""
    if settings is None or folder is None:
        return None
    if (settings.base == RANDOM) != tiny:
        now = f"{RANDOM} (--preset tiny)" if tiny else base.name
        raise InputError(f"{folder}: this adapter was trained on {settings.base}, not on {now}")
    return None if tiny else settings.same_base(folder, base)


def load_adapter(folder: Path, model: Model, config: LoraConfig) -> Lora:
    """The adapter of a folder, to train on. Where `config` is no default, it must be the same."""
    lora = load_lora(folder, model)
    for name, value in vars(config).items():
        loaded = getattr(lora.config, name)
        if value not in (getattr(LoraConfig(), name), loaded):
            raise InputError(f"--lora.{name}: {folder} has {loaded!r}, got {value!r}; leave it out")
    return lora


def reading_folder(reading_from: Path | None, folder: Path | None) -> Path | None:
    """Of the reading to begin with: the one that is named, or that beside the adapter."""
    if reading_from is None and folder is not None and (folder / "reading").is_dir():
        return folder / "reading"
    return reading_from


def has_evidence(folder: Path) -> bool:
    """Whether what each feature is worth lies in a folder."""
    return (folder / evidence.FILE).is_file()


def load_measurer(folder: Path | None, model: Model, tokenizer: Tokenizer) -> Measurer:
    """What lies beside an adapter; where it has no evidence, that of the shipped one."""
    reading, evidence_of = None, settings_file.SHIPPED
    if folder is not None and (folder / "reading").is_dir():
        reading = Reading.load(folder / "reading", model, tokenizer)
    if folder is not None and has_evidence(folder):
        evidence_of = folder
    return Measurer(Evidence.load(evidence_of), reading)


def judge_command(folder: Path, base: str, tiny: bool) -> str:
    """The last words of a run: the command that judges with what it has made."""
    if tiny:
        return "All of it runs. (A random model has nothing to judge with.)"
    other = ("--base", base) if base != DEFAULT_BASE else ()
    words = ["python", "judge.py", "--adapter", str(folder), *other, *SHOW.split()]
    return f"To judge with it:\n{shlex.join(words)}"
