"""judge.json: what a folder with a trained adapter says of itself.

    adapter_config.json  adapter_model.safetensors    the judge adapter, in PEFT's format
    judge.json                                        what it was trained on, and for
    evidence.json                                     what each feature is worth, see `evidence.py`
    reading/                                          the adapter that reads, see `reading.py`

An adapter is a correction to one base, and judges nonsense on another of the same shape. So the
base is named here, with the SHA-256 of its weights, and whether it was in 4 bits (`nf4`), whose
rounding the adapter corrects. A folder of PEFT's own making has no judge.json; then nothing is
checked but the shapes. The folder SHIPPED comes with this package, for the default base.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Strict, TypeAdapter

from nanopersrm import InputError, __version__
from nanopersrm.files import reason, sha256_of, write_json
from nanopersrm.model.base import DEFAULT_BASE, Base, read_json
from nanopersrm.pairs import validate
from nanopersrm.style import evidence

FILE, CONFIG = "judge.json", "adapter_config.json"
PARTS = (CONFIG, "adapter_model.safetensors", FILE, evidence.FILE, "reading/*")  # of the folder
SHIPPED = Path(__file__).parent / "adapter"  # trained with this project, for the default base
DEFAULT, NONE = "default", "none"  # instead of a folder

Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]


@dataclass(frozen=True)
class AdapterSettings:
    """On what base an adapter was trained, and for what prompts."""

    base: Text  # as it was named to `resolve`
    base_sha256: Text | None  # of its weights, see `weights_sha256`
    nf4: Flag  # the matrices of the base were held in 4 bits
    dtype: Text  # that it was computed in: bf16, fp16 or fp32
    form: Literal["pointwise", "pairwise", "both"]
    free: Flag = False  # it reasons in free prose

    def save(self, folder: Path) -> None:
        """Write judge.json."""
        write_json(folder / FILE, {"nanopersrm": __version__, **asdict(self)})

    def same_base(self, folder: Path, base: Base) -> str | None:
        """A note if `base` may be another than it was trained on, an error if it surely is.

        Equal names are believed. Of others all weights are read and hashed, which takes a while.
        """
        first, second = os.path.expanduser(self.base), os.path.expanduser(base.name)
        here = os.path.exists(first) and os.path.exists(second)
        if self.base == base.name or (here and os.path.samefile(first, second)):
            return None
        made_on = f"this adapter was trained on {self.base}"
        if base.name == DEFAULT_BASE:  # nobody chose it
            raise InputError(f"{folder}: {made_on}, so say --base {self.base}")
        if self.base_sha256 is not None and weights_sha256(base) == self.base_sha256:
            return None
        return f"{made_on}, and {base.name} has other weights: the scores may mean nothing"

    def differences(self, mode: str, free: bool) -> list[str]:
        """Notes about prompts of another form than it was trained on."""
        notes = []
        if free != self.free:
            trained, now = ("prose", "lines") if self.free else ("lines", "prose")
            notes.append(f"this adapter was trained to reason in {trained} and is asked for {now}")
        if self.form not in (mode, "both"):
            notes.append(f"this adapter was trained on {self.form} prompts and is asked {mode}")
        return notes


SCHEMA = TypeAdapter(AdapterSettings)


def resolve_adapter(adapter: str | Path | None, base: str | Path) -> Path | None:
    """The folder that is meant: DEFAULT is the shipped adapter, where there is one for the base."""
    if adapter is None or str(adapter) == NONE:
        return None
    if str(adapter) != DEFAULT:
        if not str(adapter):  # as a path it would be the current folder
            raise InputError("--adapter: expected a folder, got an empty name")
        return Path(os.path.expanduser(adapter))  # Path.expanduser raises for a ~user there is not
    return SHIPPED if str(base) == DEFAULT_BASE and (SHIPPED / CONFIG).is_file() else None


def read(folder: Path) -> AdapterSettings | None:
    """judge.json of a folder with an adapter; None if it has none."""
    try:
        complete = CONFIG in os.listdir(folder)  # raises where a folder cannot be read
    except OSError as error:
        raise InputError(f"--adapter {folder}: cannot be read ({reason(error)})") from error
    if not complete:
        raise InputError(f"--adapter {folder}: expected a folder with {CONFIG}, found none")
    file = folder / FILE
    return validate(SCHEMA, read_json(file), str(file)) if file.exists() else None


def fingerprint(folder: Path) -> str:
    """A hash of all files of the adapter, wherever it lies."""
    try:
        return sha256_of(*sorted({path for part in PARTS for path in folder.glob(part)}))
    except OSError as error:
        raise InputError(f"--adapter {folder}: cannot be read ({reason(error)})") from error


def weights_sha256(base: Base) -> str:
    """Of the weight file of a base, or of all its shards one after another, by name."""
    paths = [base.path] if base.path.is_file() else sorted(base.path.glob("*.safetensors"))
    try:
        return sha256_of(*(path for path in paths if not path.name.startswith("adapter")))
    except OSError as error:
        raise InputError(f"{base.path}: cannot be read ({reason(error)})") from error
