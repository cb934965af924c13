"""The judges that `evaluate.py` can compare, by name.

    model         the base with its adapter, as judge.py would judge; the default
    no_evidence   the same without what was measured of the texts
    untrained     the base without the adapter, in the same weights: 4-bit ones stay 4-bit
    style         the style similarity of the adapter alone
    fusion        all style evidence of the adapter in one number, without the model's judgement
    ngrams        character n-grams
    factors       distance over all measured habits
    together      n-grams and factors in one number, fitted on training pairs
    likelihood    what the exemplars add to the base's log p of a candidate
    NAME=FOLDER   another adapter of the same base: a judge, or a scalar reward (`rivals/scalar.py`)

`make` gives a function from texts to a prediction, with the settings that its predictions depend
on: flags, sizes and times of the files of weights, a digest of the training pairs. torch is only
imported for judges that need it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopersrm import InputError, __version__
from nanopersrm.evaluate.predictions import Predict, Prediction, predict_by
from nanopersrm.judge.judgement import JudgeConfig, Judgement
from nanopersrm.pairs import Pair, digest
from nanopersrm.style import baselines, fusion

if TYPE_CHECKING:
    from nanopersrm.judge.judge import Judge

TEXT = ("ngrams", "factors", "together")  # need no model
NAMES = ("model", "no_evidence", "untrained", "style", "fusion", *TEXT, "likelihood")
WEIGHTS = ("config.json", "tokenizer.json", "*.safetensors", "*.gguf")  # files of a base


@dataclass(frozen=True)
class NamedJudge:
    """A judge that is ready."""

    predict: Predict
    settings: dict[str, Any]  # what its predictions depend on, but for the texts
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
    say: Callable[[str], None] | None = None  # gets a line before anything is fetched


@lru_cache(maxsize=1)  # one model in memory at a time
def load(
    base: str, adapter: str | None, device: str, dtype: str, say: Callable[[str], None] | None
) -> "Judge":
    """The base with an adapter."""
    from nanopersrm.judge.judge import Judge  # torch takes seconds

    return Judge.load(base, adapter, device, dtype, say=say)


def make(name: str, setup: Setup) -> NamedJudge | str:
    """The judge of this name, or a line that says why it is left out."""
    if name in TEXT:
        return _text_judge(name, setup.train)
    adapter = setup.beside.get(name, setup.adapter)
    if adapter is None and name in ("untrained", "style", "fusion"):
        return "there is no --adapter"
    judge = load(setup.base, adapter, setup.device, setup.dtype, setup.say)
    settings = _settings(name, adapter, setup, judge)
    if name in ("style", "fusion"):
        if judge.style is None:
            return f"{adapter} has no folder style"
        if name == "style":
            cosines = judge.style_similarities
            predict = predict_by(lambda exemplars, _, candidates: cosines(exemplars, candidates))
            return NamedJudge(predict, settings, f"{adapter}, cosine of pooled states")
        if judge.style.fusion is None:
            return f"the style evidence of {adapter} was not weighed (train_sft.py --fused 0)"
        score = baselines.fused(judge.style.fusion, judge.style_similarities)
        return NamedJudge(predict_by(score, 1.0), settings, f"{adapter}, style evidence alone")
    if name == "likelihood":
        from nanopersrm.evaluate.likelihood import likelihood

        predict = predict_by(likelihood(judge.model, judge.tokenizer))
        return NamedJudge(_adapter_off(judge, predict), settings, setup.base)
    return _model_judge(name, adapter, setup, judge, settings)


def _text_judge(name: str, train: Sequence[Pair]) -> NamedJudge | str:
    """A judge that needs no model."""
    settings: dict[str, Any] = {"judge": name, "version": __version__, "train": digest(train)}
    if name == "together" and not train:
        return "needs pairs to fit on: --train"
    if name == "ngrams":
        score = baselines.ngrams()
    elif name == "factors":
        score = baselines.factors(train)
    else:
        score = baselines.fused(fusion.fit(train))
    slope = baselines.slope_of(score, train) if train else None  # gaps of scores to log-odds
    return NamedJudge(predict_by(score, slope), settings, f"fitted on {len(train)} pairs")


def _model_judge(
    name: str, adapter: str | None, setup: Setup, judge: "Judge", settings: dict[str, Any]
) -> NamedJudge | str:
    """An adapter that judges, or the base without it."""
    config = setup.config
    if name == "no_evidence":
        if not config.evidence:
            return "the same as model: there is no evidence"
        config = replace(config, evidence=False)
    if name in setup.beside and judge.settings is not None:
        config = replace(config, evidence=judge.settings.evidence)
    settings |= asdict(config)
    if name in setup.beside:
        from nanopersrm.rivals import scalar

        if (Path(setup.beside[name]).expanduser() / scalar.FILE).is_file():
            score = scalar.scorer(judge, scalar.load_head(setup.beside[name], judge), config)
            return NamedJudge(predict_by(score, 1.0), settings, f"{adapter}, a scalar reward")
    if name == "untrained":
        judge = type(judge)(judge.model, judge.tokenizer)  # without style evidence

    def predict(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> Prediction:
        return read_judgement(judge.judge(exemplars, candidates, question or None, config=config))

    description = f"{adapter or setup.base}, {'evidence' if config.evidence else 'no evidence'}"
    description += f", {config.think_tokens if config.think else 'no'} tokens of reasoning"
    if name == "untrained":
        return NamedJudge(_adapter_off(judge, predict), settings, f"{description}, adapter off")
    notes = [note for note in judge.notes if name in setup.beside]
    return NamedJudge(predict, settings, "; ".join([description, *notes]))


def _adapter_off(judge: "Judge", predict: Predict) -> Predict:
    """The same predictions from the base alone."""
    from nanopersrm.model.lora import adapter_off

    def without(exemplars: Sequence[str], question: str, candidates: Sequence[str]) -> Prediction:
        with adapter_off(judge.model):
            return predict(exemplars, question, candidates)

    return without


def read_judgement(judgement: Judgement) -> Prediction:
    """The prediction in a judgement of two candidates."""
    first, second = judgement.scores
    problems = [reply.problem for reply in judgement.replies if reply.problem]
    if judgement.verdict == "invalid" or problems or first is None or second is None:
        return Prediction("invalid", problem=problems[0] if problems else "no finite scores")
    return Prediction(judgement.verdict, (first, second), judgement.preference[0][1])


def _settings(name: str, adapter: str | None, setup: Setup, judge: "Judge") -> dict[str, Any]:
    """What the predictions of a judge of these weights depend on."""
    from nanopersrm.judge.adapter_settings import PARTS
    from nanopersrm.model.base import resolve

    files = _stamps(Path(resolve(setup.base).path), WEIGHTS)
    if adapter is not None and name not in ("untrained", "likelihood"):
        files += _stamps(Path(adapter).expanduser(), (*PARTS, "*.safetensors"))
    return {
        "judge": name if name in NAMES else "beside",
        "version": __version__,
        "files": files,
        "device": setup.device,
        "dtype": setup.dtype,
        "nf4": judge.settings is not None and judge.settings.nf4,
    }


def _stamps(path: Path, patterns: Sequence[str]) -> list[list[Any]]:
    """Name, size and time of a file, or of the matching files of a folder."""
    files = [path] if path.is_file() else sorted({f for p in patterns for f in path.glob(p)})
    if not files:
        raise InputError(f"{path}: expected {', '.join(patterns)}, found none")
    folder = path.parent if path.is_file() else path
    stats = [(f.relative_to(folder).as_posix(), f.stat()) for f in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
