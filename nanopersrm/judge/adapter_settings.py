"""What a folder with a trained adapter says of itself: judge.json.

    runs/sft/adapter/
      adapter_config.json  adapter_model.safetensors    the judge adapter, in PEFT's format
      judge.json                                        what it was trained on, and for
      style/                                            the style adapter, see `style.py`

An adapter is a correction to one base. On another of the same shape it loads and judges nonsense,
so the base is named here, with the SHA-256 of its weights for when it lies elsewhere under another
name. An adapter that was trained beside weights in 4 bits (`nf4`) has learned to correct their
rounding too: it is judged with beside the same weights. A folder of PEFT's own making has no
judge.json; then nothing is checked but the shapes.

`sharpness` makes the preferences of a judge true to its record: `python -m nanopersrm.evaluate.calibrate`
measures it, 1 changes nothing.

One such folder comes with this package (`SHIPPED`, with a README.md of its own). The default base
judges with it unless another adapter is named, or "none".
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nanopersrm import InputError, __version__
from nanopersrm.files import blocks_of, reason
from nanopersrm.model.base import DEFAULT_BASE, Base, read_json

FILE = "judge.json"
FORMS = ("pointwise", "pairwise", "both")
PARTS = ("adapter_config.json", "adapter_model.safetensors", FILE, "style/*")  # of the folder
SHIPPED = Path(__file__).parent / "adapter"  # trained with this project, for the default base
DEFAULT, NONE = "default", "none"  # instead of a folder


@dataclass(frozen=True)
class AdapterSettings:
    """On what base, and for what prompts."""

    base: str  # as it was named to `bases.resolve`
    base_sha256: str | None  # of its weights, see `weights_sha256`
    nf4: bool  # the matrices of the base were held in 4 bits
    dtype: str  # that it was computed in: bf16, fp16 or fp32
    evidence: bool  # the prompts had a measured block
    form: str  # one of FORMS
    style: bool  # the measured block had what trained instruments say (`similarity.py`)
    # What log-odds of pointwise preferences are multiplied by, see `calibrate.py`:
    sharpness: float = 1.0  # of a judge that scores at once
    sharpness_reasoned: float = 1.0  # of one that reasons before

    def save(self, folder: Path) -> None:
        """Write judge.json to a temporary name, then rename."""
        part = folder / f"{FILE}.part"
        try:
            text = json.dumps({"nanopersrm": __version__, **asdict(self)}, indent=1)
            part.write_text(text + "\n", encoding="utf-8")
            os.replace(part, folder / FILE)
        except OSError as error:
            raise InputError(f"{folder / FILE}: cannot be written ({error.strerror})") from error
        finally:
            part.unlink(missing_ok=True)

    def same_base(self, folder: Path, base: Base) -> str | None:
        """A note if `base` may be another than it was trained on, an error if it surely is.

        Equal names are believed. Of others all weights are read and hashed, which takes a while.
        """
        if self.base == base.name or _same_path(self.base, base.name):
            return None
        if base.name == DEFAULT_BASE:  # nobody asked for it
            raise InputError(
                f"{folder}: this adapter was trained on {self.base}, so say --base {self.base}"
            )
        if self.base_sha256 is not None and weights_sha256(base) == self.base_sha256:
            return None
        return (
            f"this adapter was trained on {self.base}, and {base.name} has other weights: "
            "the scores may mean nothing"
        )

    def sharpness_when(self, think: bool) -> float:
        """The sharpness of a judge that reasons or does not."""
        return self.sharpness_reasoned if think else self.sharpness

    def asked_otherwise(self, evidence: bool, mode: str) -> list[str]:
        """Notes about prompts of another form than it was trained on."""
        notes = []
        if evidence != self.evidence:
            way, now = ("with", "without") if self.evidence else ("without", "with")
            notes.append(f"this adapter was trained {way} measured evidence and is asked {now}")
        if self.form not in (mode, "both"):
            notes.append(f"this adapter was trained on {self.form} prompts and is asked {mode}")
        return notes


def resolve_adapter(adapter: str | Path | None, base: str | Path) -> Path | None:
    """The folder that is meant: DEFAULT is the shipped adapter, where there is one for the base."""
    if adapter is None or str(adapter) == NONE:
        return None
    if str(adapter) != DEFAULT:
        if not str(adapter):  # as a path it would be the current folder
            raise InputError("--adapter: expected a folder, got an empty name")
        return Path(os.path.expanduser(adapter))  # Path.expanduser raises for a ~user there is not
    there = str(base) == DEFAULT_BASE and (SHIPPED / "adapter_config.json").is_file()
    return SHIPPED if there else None


def read(folder: Path) -> AdapterSettings | None:
    """judge.json of a folder with an adapter; None if it has none."""
    config = "adapter_config.json"
    try:
        inside = sorted(folder.iterdir())  # raises where an adapter that is there cannot be read
        there, found = (folder / config).is_file(), "found none"
    except (FileNotFoundError, NotADirectoryError):
        inside, there, found = [], False, "no such folder"
    except OSError as error:
        raise InputError(f"--adapter {folder}: cannot be read ({reason(error)})") from error
    if not there:
        if near := [one for one in inside if os.path.isfile(one / config)]:
            found += f"; did you mean {near[0]}?"
        raise InputError(f"--adapter {folder}: expected a folder with {config}, {found}")
    file = folder / FILE
    if not file.exists():
        return None
    raw = read_json(file)
    known: dict[str, Any] = {field.name: raw.get(field.name) for field in fields(AdapterSettings)}
    for field in fields(AdapterSettings):
        value = known[field.name]
        if field.type is float:  # came later than the others: 1 where it is missing
            value = known[field.name] = 1.0 if value is None else value
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise InputError(f"{file}, field {field.name}: expected above 0, found {value!r}")
            continue
        if field.name == "base_sha256" and value is None:
            continue
        kind = bool if field.type is bool else str
        if not isinstance(value, kind):
            raise InputError(
                f"{file}, field {field.name}: expected a {kind.__name__}, found {value!r}"
            )
    if raw["form"] not in FORMS:
        raise InputError(f"{file}, field form: expected {', '.join(FORMS)}, found {raw['form']!r}")
    return AdapterSettings(**known)


def fingerprint(folder: Path) -> str:
    """A hash of all that the folder says and holds, wherever it lies: names and contents."""
    sha = hashlib.sha256()
    try:
        paths = sorted({path for part in PARTS for path in folder.glob(part) if path.is_file()})
        sizes = [path.stat().st_size for path in paths]
    except OSError as error:
        raise InputError(f"--adapter {folder}: cannot be read ({reason(error)})") from error
    for path, size in zip(paths, sizes, strict=True):
        sha.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        _take(sha, path)
    return sha.hexdigest()


def weights_sha256(base: Base) -> str:
    """Of the weight file of a base, or of all its shards one after another, by name."""
    one = [base.path] if base.path.is_file() else sorted(base.path.glob("*.safetensors"))
    sha = hashlib.sha256()
    for path in one:
        if path.name.startswith("adapter"):
            continue
        _take(sha, path)
    return sha.hexdigest()


def _take(sha: "hashlib._Hash", path: Path) -> None:
    """The contents of a file, a part at a time."""
    try:
        for block in blocks_of([path]):
            sha.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error


def _same_path(one: str, two: str) -> bool:
    """Both are files or folders here, and the same."""
    first, second = os.path.expanduser(one), os.path.expanduser(two)
    return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)
