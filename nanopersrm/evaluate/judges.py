"""The judges that `evaluate.py` can compare, by name.

    model         the base with its adapter, as judge.py would judge; the default
    no_evidence   the same without what was measured of the texts
    untrained     the base without the adapter, in the same weights
    reading       how much likelier a text becomes after the writer's own, see `style/reading.py`;
                  without --adapter by the base alone
    evidence      all features of the adapter in one number, without the model's judgement
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
from typing import TYPE_CHECKING, Any, Literal

from nanopersrm import __version__
from nanopersrm.evaluate import baselines
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.pairs import Pair, digest
from nanopersrm.style import evidence

if TYPE_CHECKING:
    from nanopersrm.judge.judge import Judge
    from nanopersrm.style.reading import Reading

TEXT = ("ngrams", "factors", "together")  # need no model
NAMES = ("model", "no_evidence", "untrained", "reading", "evidence", *TEXT)
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

    return Judge.load(*base_and_adapter)


def make(name: str, setup: Setup) -> NamedJudge | str:
    """The judge of this name, or a line that says why it is left out."""
    if name in TEXT:
        return _text_judge(name, setup.train)
    from nanopersrm.style.reading import Reading, ReadingConfig  # imports torch

    adapter = setup.beside.get(name, setup.adapter)
    if adapter is None and name in ("untrained", "evidence"):
        return "there is no --adapter"
    judge = load(setup.base, adapter, setup.device, setup.dtype, setup.say)
    files = _stamps(setup.base, adapter)
    weights = {"files": files, "device": setup.device, "dtype": setup.dtype}
    settings = {"judge": name if name in NAMES else "beside", "version": __version__} | weights
    if name == "reading":
        reading, source = judge.reading, f"{adapter}, reading alone"
        if reading is None:
            reading = Reading(judge.model, judge.tokenizer, ReadingConfig())
            source = f"{setup.base}, reading untrained"
        scores = readings_of(reading)
        predict = predict_by(lambda exemplars, _, candidates: scores(exemplars, candidates))
        return NamedJudge(predict, settings, source)
    if name == "evidence":
        if judge.reading is None:
            return f"{adapter} has no folder reading"
        if judge.reading.evidence is None:
            return f"the features of {adapter} were not weighed (train_sft.py --evidence-pairs 0)"
        score = baselines.together(judge.reading.evidence, readings_of(judge.reading))
        return NamedJudge(
            predict_by(score, evidence.DECIBAN), settings, f"{adapter}, all features alone"
        )
    return _model_judge(name, setup, judge, settings)


@lru_cache(maxsize=1)
def readings_of(reading: "Reading") -> evidence.Readings:
    """Its scores, computed once: two judges may ask for them."""
    scores = lru_cache(maxsize=None)(reading.scores)
    return lambda exemplars, texts: scores(tuple(exemplars), tuple(texts))


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
    config, folder = setup.config, setup.beside.get(name)
    if name == "no_evidence":
        config = replace(config, evidence=False)
    if folder and judge.settings is not None:
        config = replace(config, evidence=judge.settings.evidence)
    settings |= asdict(config)
    if folder:
        from nanopersrm.rivals import scalar

        if (Path(folder).expanduser() / scalar.FILE).is_file():
            rival = predict_by(scalar.scorer(folder, judge, config.evidence), 1.0)
            return NamedJudge(rival, settings, f"{folder}, a scalar reward")
    from nanopersrm.model.lora import adapter_off

    if name == "untrained":
        judge = type(judge)(judge.model, judge.tokenizer)  # without style evidence

    def predict(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> Prediction:
        with adapter_off(judge.model) if name == "untrained" else nullcontext():
            judgement = judge.judge(exemplars, candidates, question or None, config=config)
        problems = [reply.problem for reply in judgement.replies if reply.problem]
        first, second = judgement.scores
        if judgement.verdict == "invalid" or problems or first is None or second is None:
            return Prediction("invalid", problem=problems[0] if problems else "no finite scores")
        return Prediction(judgement.verdict, (first, second), judgement.preference[0][1])

    if name == "untrained":
        return NamedJudge(predict, settings, f"{setup.base}, adapter off")
    evidence = "evidence" if config.evidence else "no evidence"
    tokens = f"{config.think_tokens if config.think else 'no'} tokens of reasoning"
    source = f"{folder or setup.adapter or setup.base}, {evidence}, {tokens}"
    return NamedJudge(predict, settings, "; ".join([source, *judge.notes]))


def _stamps(base: str, adapter: str | None) -> list[list[Any]]:
    """Name, size and time of each file of weights."""
    from nanopersrm.judge.adapter_settings import PARTS
    from nanopersrm.model.base import resolve

    path = Path(resolve(base).path)
    files = {path} if path.is_file() else {f for part in WEIGHTS for f in path.glob(part)}
    if adapter is not None:
        folder = Path(adapter).expanduser()
        files |= {f for part in (*PARTS, "*.safetensors") for f in folder.glob(part)}
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]
