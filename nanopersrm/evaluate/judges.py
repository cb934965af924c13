"""The judges that `evaluate.py` can compare, by name.

    model         the base with its adapter, as judge.py would judge; the default
    all_evidence  the same with every line of evidence filled in, none chosen
    no_think      the same without a line of evidence
    menu          the same with the first lines of the menu, instead of lines that the model chooses
    salience      the same with the writer's most salient habits, without reading and n-grams
    random        the same with lines drawn at random from the menu
    largest       the same with the lines of the largest evidence
    untrained     the base without the adapter, in the same weights, with all evidence
    reading       how much likelier a text becomes after the writer's own, see `style/reading.py`;
                  without --adapter by the base alone
    evidence      all features of the adapter in one sum, without the model's judgement
    ngrams        character n-grams
    factors       distance over all measured habits
    together      n-grams and factors in one number, fitted on training pairs
    NAME=FOLDER   another adapter of the same base: a judge, or a scalar reward (`rivals/scalar.py`)

A prediction is a verdict, the index of the text that fits better, "tie" (equal scores) or
"invalid", and where the judge has a probability a preference; a reading is none. torch is only
imported for judges that need it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from nanopersrm import __version__
from nanopersrm.evaluate import baselines
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.pairs import Pair, digest
from nanopersrm.style import evidence

if TYPE_CHECKING:
    from nanopersrm.judge.judge import Judge

TEXT = ("ngrams", "factors", "together")  # need no model
RULES = ("menu", "salience", "random", "largest")  # who chooses the lines
CHANGES: dict[str, dict[str, Any]] = {  # of how the default judges
    "all_evidence": {"all_evidence": True},
    "no_think": {"think": False},
    "untrained": {"all_evidence": True},
    **{rule: {"choose": rule} for rule in RULES},
}
NAMES = ("model", *CHANGES, "reading", "evidence", *TEXT)
WEIGHTS = ("config.json", "tokenizer.json", "*.safetensors", "*.gguf")  # files of a base


@dataclass(frozen=True)
class Prediction:
    """What a judge says of two candidates."""

    verdict: int | Literal["tie", "invalid"]  # 0 or 1: the index of the text that fits better
    scores: tuple[float, float] | None = None  # None: invalid
    preference: float | None = None  # P(the first fits better); None: no probability
    problem: str = ""  # why it is invalid


# (exemplars, question, the two candidates) -> prediction
Predict = Callable[[Sequence[str], str, Sequence[str]], Prediction]


@dataclass(frozen=True)
class NamedJudge:
    """A judge that is ready."""

    predict: Predict
    settings: dict[str, Any]  # what its predictions depend on, beside the texts
    description: str


@dataclass(frozen=True)
class Setup:
    """What judges are made of."""

    base: str
    adapter: str | None
    device: str
    dtype: str
    config: JudgeConfig  # how a model judges
    train: Sequence[Pair]  # to fit text judges on; may be empty
    beside: Mapping[str, str]  # name -> folder of another adapter
    say: Callable[[str], None]  # gets a line before anything is fetched


def from_scores(scores: Sequence[float] | None, slope: float | None = None) -> Prediction:
    """Two scores -> a prediction. `slope` turns a gap of scores into log-odds."""
    if scores is None or not all(map(math.isfinite, scores)):
        return Prediction("invalid", problem="no finite scores")
    first, second = scores
    verdict: int | Literal["tie"] = "tie" if first == second else int(second > first)
    if slope is None:
        return Prediction(verdict, (first, second))
    odds = max(-700.0, slope * (first - second))
    return Prediction(verdict, (first, second), 1 / (1 + math.exp(-odds)))


def predict_by(score: baselines.Score, slope: float | None = None) -> Predict:
    """A function that scores -> one that predicts."""
    return lambda *texts: from_scores(score(*texts), slope)


@lru_cache(maxsize=1)  # one model in memory at a time
def load(*base_and_adapter: Any) -> "Judge":
    """As Judge.load."""
    from nanopersrm.judge.judge import Judge  # torch takes seconds

    judge = Judge.load(*base_and_adapter)
    judge.measurer = remembering(judge.measurer)
    return judge


def make(name: str, setup: Setup) -> NamedJudge | str:
    """The judge of this name, or a line that says why it is left out."""
    if name in TEXT:
        return _text_judge(name, setup.train)
    adapter = setup.beside.get(name, setup.adapter)
    if adapter is None and name in ("untrained", "evidence"):
        return "there is no --adapter"
    judge = load(setup.base, adapter, setup.device, setup.dtype, setup.say)
    files = _stamps(setup.base, adapter)
    weights = {"files": files, "device": setup.device, "dtype": setup.dtype}
    settings = {"judge": name if name in NAMES else "beside", "version": __version__} | weights
    if name in ("reading", "evidence"):
        return _measured_judge(name, setup, judge, settings)
    return _model_judge(name, setup, judge, settings)


def _measured_judge(
    name: str, setup: Setup, judge: "Judge", settings: dict[str, Any]
) -> NamedJudge:
    """What is measured, without the model's judgement."""
    measurer = judge.measurer
    if name == "reading" and measurer.reading is None:
        from nanopersrm.style.reading import Reading, ReadingConfig  # imports torch

        reading = Reading(judge.model, judge.tokenizer, ReadingConfig())
        predict = predict_by(lambda exemplars, _, texts: reading.scores(exemplars, texts))
        return NamedJudge(predict, settings, f"{setup.base}, reading untrained")

    def score(exemplars: Sequence[str], _: str, texts: Sequence[str]) -> list[float]:
        ledgers = measurer.ledgers([text.strip() for text in exemplars], texts, topics=False)
        if name == "evidence":
            return [ledger.total() for ledger in ledgers]
        read = [ledger.reading for ledger in ledgers]
        return [math.nan if x is None else (x.forward + x.back) / 2 for x in read]

    slope = evidence.DECIBAN if name == "evidence" else None
    source = "all evidence in one sum" if slope else "reading alone"
    return NamedJudge(predict_by(score, slope), settings, f"{setup.adapter}, {source}")


def remembering(measurer: Any) -> Any:
    """The same measurer; what it has measured once it measures no more: several judges ask."""
    ledgers = lru_cache(maxsize=None)(measurer.ledgers)

    def by_text(
        exemplars: Sequence[str], texts: Sequence[str], writer: Any = None, topics: bool = True
    ) -> list[Any]:
        order = sorted({text.strip() for text in texts})
        measured = ledgers(tuple(exemplars), tuple(order), writer, topics)
        known = dict(zip(order, measured, strict=True))
        return [known[text.strip()] for text in texts]

    return SimpleNamespace(
        evidence=measurer.evidence, reading=measurer.reading, menu=measurer.menu, ledgers=by_text
    )


def _text_judge(name: str, train: Sequence[Pair]) -> NamedJudge | str:
    """A judge that needs no model."""
    settings: dict[str, Any] = {"judge": name, "version": __version__, "train": digest(train)}
    if name == "together" and not train:
        return "needs pairs to fit on: --train"
    if name == "together":
        score = baselines.together(evidence.fit(train))
    else:
        score = baselines.ngrams if name == "ngrams" else baselines.factors
    slope = baselines.slope_of(score, train) if train else None  # gaps of scores to log-odds
    return NamedJudge(predict_by(score, slope), settings, f"fitted on {len(train)} pairs")


def _model_judge(name: str, setup: Setup, judge: "Judge", settings: dict[str, Any]) -> NamedJudge:
    """An adapter that judges, or the base without it."""
    folder = setup.beside.get(name)
    config = replace(setup.config, **CHANGES.get(name, {}))
    settings |= asdict(config)
    if folder:
        from nanopersrm.rivals import scalar

        if (Path(folder).expanduser() / scalar.FILE).is_file():
            rival = predict_by(scalar.scorer(folder, judge), 1.0)
            return NamedJudge(rival, settings, f"{folder}, a scalar reward")
    from nanopersrm.model.lora import adapter_off

    if name == "untrained":
        measurer, judge = judge.measurer, type(judge)(judge.model, judge.tokenizer)
        judge.measurer = measurer

    def predict(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> Prediction:
        with adapter_off(judge.model) if name == "untrained" else nullcontext():
            judgement = judge.judge(exemplars, candidates, question or None, config=config)
        first, second = judgement.scores
        if judgement.verdict == "invalid" or first is None or second is None:
            return Prediction("invalid", problem="no finite scores")
        return Prediction(judgement.verdict, (first, second), judgement.preference[0][1])

    if name == "untrained":
        return NamedJudge(predict, settings, f"{setup.base}, adapter off")
    lines = f"{config.think_lines} lines chosen by {config.choose}"
    if config.all_evidence or not config.think:
        lines = "every line of evidence" if config.think else "no line of evidence"
    source = f"{folder or setup.adapter or setup.base}, {lines}"
    return NamedJudge(predict, settings, "; ".join([source, *judge.notes]))


def _stamps(base: str, adapter: str | None) -> list[list[Any]]:
    """Name, size and time of each file of weights."""
    from nanopersrm.judge.adapter_settings import PARTS, SHIPPED
    from nanopersrm.model.base import resolve

    path = Path(resolve(base).path)
    files = {path} if path.is_file() else {f for part in WEIGHTS for f in path.glob(part)}
    if adapter is not None:
        folder = Path(adapter).expanduser()
        files |= {f for part in (*PARTS, "*.safetensors") for f in folder.glob(part)}
    if evidence.FILE not in {f.name for f in files}:
        files.add(SHIPPED / evidence.FILE)
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]
