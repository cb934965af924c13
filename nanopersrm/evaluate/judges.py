"""The judges that `evaluate.py` can compare, by name.

    model        the base with its adapter, as judge.py would judge; the default
    no_evidence  the same without what factors.py measured
    untrained    the base without the adapter, in the same weights: 4-bit ones stay 4-bit
    style        the style similarity of the adapter alone, see `style.py`
    fusion       all instruments of the adapter in one number, without its judgement
    ngrams factors                    text only, see `baselines.py`
    together     n-grams and factors in one number, fitted on training pairs, see `fusion.py`
    likelihood   what the exemplars add to the base's log p of a candidate, see `likelihood.py`

and others of a name that the caller gives: further adapters of the same base, among them scalar
rewards (`scalar.py`), each a folder.

`make` gives a judge as a function from texts to an opinion, with the settings that its opinions
depend on. Settings are the key under which opinions are remembered, so everything that could change
one is in them: flags, sizes and times of the files of weights and adapters, a digest of the
training pairs.

With training pairs, the cheap baselines get probabilities: a slope is fitted that turns their gaps
of scores into log-odds. `likelihood` and `style` would need minutes for that and give none. The model is loaded once for all judges; those that must not see the adapter are asked while
it is off. torch is only imported for judges that need it.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopersrm import InputError, __version__
from nanopersrm.evaluate.predictions import Opine, Opinion, Score, opine
from nanopersrm.judge.judgement import JudgeConfig, Judgement
from nanopersrm.judge.verdict import LABELS, parse
from nanopersrm.pairs import Pair, dump
from nanopersrm.style import baselines, fusion

if TYPE_CHECKING:
    from nanopersrm.judge.judge import Judge

NAMES = (
    "model",
    "no_evidence",
    "untrained",
    "style",
    "fusion",
    "ngrams",
    "factors",
    "together",
    "likelihood",
)
SAMPLED = "model x"  # and a number of samples: the model again
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
    load: Callable[[str | None], "Judge"]  # the base with the adapter, or without: see `loader`
    beside: Mapping[str, str] = field(default_factory=dict)  # name -> folder of a further adapter
    sampled: Sequence[JudgeConfig] = ()  # the model again, with other numbers of samples
    say: Callable[[str], None] = print  # gets a line before anything is fetched


def make(name: str, kit: Kit) -> Named | str:
    """The judge of this name, or a line that says why it is left out."""
    if name in kit.beside:
        return _beside(name, kit)
    if name in ("model", "no_evidence", "untrained") or name.startswith(SAMPLED):
        return _model(name, kit)
    settings: dict[str, Any] = {"judge": name, "version": __version__}
    if name == "likelihood":
        from nanopersrm.evaluate.likelihood import likelihood

        judge = kit.load(None)
        settings |= _weights_of(kit, None)
        asked = _alone(judge, opine(likelihood(judge.model, judge.tokenizer)))
        return Named(name, asked, settings, kit.base)
    if name in ("style", "fusion"):
        return _instrument(name, kit)
    if name == "together" and not kit.train:
        return "needs pairs to fit on: --train"
    score, said = _text_only(name, kit)
    slope = None
    if kit.train:
        settings["train"] = _digest(dump(pair) for pair in kit.train)
        slope = baselines.slope_of(score, kit.train)
    return Named(name, opine(score, slope), settings, said)


def _text_only(name: str, kit: Kit) -> tuple[Score, str]:
    """A judge of baselines.py, and what it was fitted on."""
    if name == "factors":
        fitted = f"fitted on {len(kit.train)} pairs" if kit.train else "not fitted"
        return baselines.factors(kit.train), fitted
    if name == "together":
        fitted = f"n-grams and factors, fitted on {len(kit.train)} pairs"
        return baselines.fused(fusion.fit(kit.train)), fitted
    return baselines.ngrams(), ""


def _model(name: str, kit: Kit) -> Named | str:
    """A model that judges, in one of three ways."""
    config, adapter = kit.config, kit.adapter
    if name == "untrained":
        if adapter is None:
            return "the same as model: there is no --adapter"
        adapter = None
    for again in kit.sampled:
        config = again if name == f"{SAMPLED}{again.samples}" else config
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

    asked = say if adapter is not None else _alone(judge, say)
    how = "evidence" if config.evidence else "no evidence"
    thinks = f"{config.think_tokens} tokens of reasoning" if config.think else "no reasoning"
    thinks += f", {config.samples} samples" if config.samples > 1 else ""
    return Named(name, asked, settings, f"{adapter or kit.base}, {how}, {thinks}")


def _alone(judge: "Judge", asked: Opine) -> Opine:
    """The same opinions from the base alone: the adapter is off while it is asked."""
    from nanopersrm.model.lora import adapter_off

    def without(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> Opinion:
        with adapter_off(judge.model):
            return asked(exemplars, question, candidates)

    return without


def _instrument(name: str, kit: Kit) -> Named | str:
    """The style similarity alone, or all instruments of the adapter in one number."""
    if kit.adapter is None:
        return "there is no --adapter"
    judge = kit.load(kit.adapter)
    if judge.style is None:
        return f"{kit.adapter} has no folder style"
    cosines, fused = judge.style_similarities, judge.style.fusion
    if name == "fusion" and fused is None:
        return f"the instruments of {kit.adapter} were not weighed (train_sft.py --fused 0)"

    def style(
        exemplars: Sequence[str], question: str, candidates: Sequence[str]
    ) -> list[float] | None:
        return cosines(exemplars, candidates)

    settings = {"judge": name, "version": __version__, **_weights_of(kit, kit.adapter)}
    if name == "style" or fused is None:
        return Named(name, opine(style), settings, f"{kit.adapter}, cosine of pooled states")
    score = baselines.fused(fused, cosines)
    return Named(name, opine(score, 1.0), settings, f"{kit.adapter}, instruments alone")


def _beside(name: str, kit: Kit) -> Named | str:
    """A further adapter of the same base, on while it is asked: a judge, or a scalar reward."""
    from nanopersrm.judge import adapter_settings
    from nanopersrm.judge.judge import Judge
    from nanopersrm.model.base import resolve
    from nanopersrm.model.lora import load_lora
    from nanopersrm.rivals import scalar
    from nanopersrm.style.similarity import Style

    folder = Path(kit.beside[name]).expanduser()
    made_for = adapter_settings.read(folder)
    model, tokenizer = (loaded := kit.load(kit.adapter)).model, loaded.tokenizer
    note = None if made_for is None else made_for.same_base(folder, resolve(kit.base))
    beside = loaded.settings is not None and loaded.settings.nf4
    if made_for is not None and made_for.nf4 != beside:
        return f"{folder} was trained {'beside' if made_for.nf4 else 'without'} 4-bit weights"
    said = f"; {note}" if note else ""
    style = Style.load(folder / "style", model) if (folder / "style").is_dir() else None
    settings = {"judge": name, "version": __version__, **_weights_of(kit, str(folder))}
    evidence = kit.config.evidence if made_for is None else made_for.evidence
    judge = Judge(model, tokenizer, True, style, made_for)
    if (folder / scalar.FILE).is_file():
        near = judge.style_evidence if made_for is not None and made_for.style else None
        learned = scalar.load(folder, model)
        score = scalar.scorer(model, tokenizer, learned, evidence, near)
        settings |= {"scalar": _stamps(folder, (scalar.FILE,)), "evidence": evidence}
        return Named(name, opine(score, 1.0), settings, f"{folder}, a scalar reward{said}")
    config = replace(kit.config, evidence=evidence)
    settings |= asdict(config)
    lora = load_lora(folder, model).freeze()

    def say(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> Opinion:
        with lora.using(model):
            found = judge.judge(exemplars, candidates, question or None, config=config)
        return read_judgement(found, config.mode)

    how = "evidence" if evidence else "no evidence"
    return Named(name, say, settings, f"{folder}, {how}{said}")


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
    base: str,
    adapter: str | None,
    device: str,
    dtype: str,
    say: Callable[[str], None] | None = None,
) -> Callable[[str | None], "Judge"]:
    """load(adapter) gives the judge, load(None) one without the adapter.

    There is one model for both, loaded when it is first asked for. What load(None) gives must be
    asked while the adapter is off, as `_alone` does.
    """
    loaded: dict[str | None, Judge] = {}

    def load(which: str | None) -> "Judge":
        from nanopersrm.judge.judge import Judge  # torch takes seconds

        assert which in (adapter, None), f"expected {adapter} or no adapter, got {which}"
        if adapter not in loaded:
            loaded[adapter] = Judge.load(base, adapter, device, dtype, say=say)
        if which not in loaded:
            loaded[None] = Judge(loaded[adapter].model, loaded[adapter].tokenizer)
        return loaded[which]

    return load


def _weights_of(kit: Kit, adapter: str | None) -> dict[str, Any]:
    """Which weights are loaded, and how."""
    from nanopersrm.judge.adapter_settings import PARTS, read
    from nanopersrm.model.base import resolve

    stamps = _stamps(Path(resolve(kit.base).path), WEIGHTS)
    if adapter is not None:
        stamps += _stamps(Path(adapter).expanduser(), PARTS)
    found: dict[str, Any] = {"files": stamps, "device": kit.device, "dtype": kit.dtype}
    made_for = None if kit.adapter is None else read(Path(kit.adapter).expanduser())
    return found | ({"nf4": True} if made_for is not None and made_for.nf4 else {})


def _stamps(path: Path, wanted: Sequence[str]) -> list[list[Any]]:
    """Name, size and time of a file, or of the wanted files of a folder."""
    files = [path] if path.is_file() else sorted({f for p in wanted for f in path.glob(p)})
    if not files:
        raise InputError(f"{path}: expected {', '.join(wanted)}, found none")
    folder = path.parent if path.is_file() else path
    stats = [(f.relative_to(folder).as_posix(), f.stat()) for f in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _digest(lines: Iterable[str]) -> str:
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line.encode() + b"\0")
    return sha.hexdigest()
