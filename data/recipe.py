"""Recipe: the flags of a build, checked, and how the kinds share a set."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nanopersrm import InputError
from nanopersrm.model.embedded import DEFAULT_BASE
from nanopersrm.pairs import KINDS, SPLITS

MODULES = {kind: f"data.kinds.{kind}" for kind in KINDS}
MODEL_KINDS = ("style_randomization", "style_mimicking")  # seconds a text, so there is a limit
MOST_EXEMPLARS = 16
WORD_LIMITS = (20, 400)


@dataclass(frozen=True)
class Config:
    """Turn writings into preference pairs with twins."""

    corpora: Path  # a folder per writer, .jsonl or .jsonl.gz files, or a .json file
    out: Path  # the folder to write
    pairs: int = 12_000  # in the train split, twins counted
    eval_pairs: int | None = None  # in each other split; default: a twentieth, at least 200
    kinds: str = ",".join(KINDS)  # by name, with commas between
    exemplars: str = "1-4"  # how many a pair has, from and to
    words: str = "80-120"  # of a candidate
    exemplar_words: str = "120-180"  # of an exemplar
    model_pairs: int = 600  # at most, in train, of each kind that a language model writes
    seed: int = 0  # same seed, same bytes
    hold_out: tuple[str, ...] | None = None  # domains kept out of all other splits
    reuse: int = 1  # how often a passage may be a candidate
    base: str = DEFAULT_BASE  # of the kinds that a language model writes
    overwrite: bool = False  # throw away what another build left in the folder


@dataclass(frozen=True)
class Recipe:
    """What to build, checked."""

    kinds: tuple[str, ...]
    drafts: dict[str, int]  # split -> how many
    model_drafts: dict[str, int]  # split -> at most so many of each of MODEL_KINDS
    exemplars: tuple[int, int]
    seed: int
    reuse: int


def span(text: str, flag: str, least: int, most: int) -> tuple[int, int]:
    """Two numbers of "80-120", or twice the one of "100"."""
    first, _, last = text.partition("-")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        low, high = 0, 0
    if not least <= low <= high <= most:
        raise InputError(f"{flag}: expected A-B with {least} <= A <= B <= {most}, got {text!r}")
    return low, high


def recipe(config: Config) -> Recipe:
    """Check the flags that say what is built."""
    named = [name.strip() for name in config.kinds.split(",") if name.strip()]
    if unknown := [name for name in named if name not in KINDS]:
        raise InputError(f"--kinds: expected names out of {', '.join(KINDS)}, got {unknown[0]!r}")
    if not named:
        raise InputError(f"--kinds: expected names out of {', '.join(KINDS)}, got none")
    for name in named:
        if find_spec(MODULES[name]) is None:
            raise InputError(f"--kinds: {name} cannot be made, {MODULES[name]} is missing")
    others = max(200, config.pairs // 40 * 2) if config.eval_pairs is None else config.eval_pairs
    flags = (
        ("--pairs", config.pairs, 2),
        ("--eval-pairs", others, 0),
        ("--model-pairs", config.model_pairs, 0),
    )
    for flag, number, least in flags:
        if number < least or number % 2:
            raise InputError(f"{flag}: expected an even number from {least}, got {number}")
    if config.reuse < 1:
        raise InputError(f"--reuse: expected a number from 1, got {config.reuse}")
    return Recipe(
        kinds=tuple(kind for kind in KINDS if kind in named),
        drafts={s: (config.pairs if s == "train" else others) // 2 for s in SPLITS},
        model_drafts={s: config.model_pairs // (2 if s == "train" else 10) for s in SPLITS},
        exemplars=span(config.exemplars, "--exemplars", 1, MOST_EXEMPLARS),
        seed=config.seed,
        reuse=config.reuse,
    )


def shares(drafts: int, kinds: Sequence[str], most_of_model: int) -> dict[str, int]:
    """How many drafts of each kind: half cross_author, the others the rest, evenly, but what a
    model writes `most_of_model` at most, where there is something else.

    >>> shares(8, ("cross_author", "minor_replacement", "restyle"), 1)
    {'cross_author': 4, 'minor_replacement': 2, 'restyle': 2}
    >>> shares(8, ("cross_author", "style_mimicking", "restyle"), 1)
    {'cross_author': 4, 'style_mimicking': 1, 'restyle': 3}
    """
    found = dict.fromkeys(kinds, 0)
    if "cross_author" in found:
        found["cross_author"] = (drafts + 1) // 2 if len(kinds) > 1 else drafts
    open_ = [kind for kind in kinds if kind != "cross_author"]
    left = drafts - sum(found.values())
    free = [kind for kind in open_ if kind not in MODEL_KINDS]
    for kind in open_ if free else ():
        if kind in MODEL_KINDS:
            found[kind] = min(left // len(open_), most_of_model)
    rest, sharing = left - sum(found[kind] for kind in open_), free or open_
    for i, kind in enumerate(sharing):
        found[kind] = rest // len(sharing) + (i < rest % len(sharing))
    return found
