"""The style similarity: how near two texts lie in what the model makes of them.

    state(text)   = the mean of the hidden states of its tokens after the first blocks       (D,)
    vector(text)  = (state - mean) / deviation, number by number, made a unit vector         (D,)
    writer        = the mean of the vectors of the exemplars, made a unit vector             (D,)
    similarity    = vector(candidate) · writer, a cosine between -1 and 1

Mean and deviation are those of many texts: without them a few numbers that are large in every text
decide the cosine. Only the first quarter of the blocks runs: early blocks know how a thing is said,
late ones what comes next.

An adapter on those blocks is trained by contrast: B writers of one domain a step, one text of each
as exemplar e and one as candidate c, each of which must find the other (arXiv 1807.03748):

    loss = mean over writers i of   ½ (-log softmax_j(e_i · c_j / τ))[i]
                                  + ½ (-log softmax_k(e_k · c_i / τ))[i]

Worked number: two writers, e·c = [[0.9, 0.5], [0.6, 0.8]], τ = 0.1. The rows lead by 4 and 2, the
columns by 3 and 3 (in units of τ), so the loss is 0.061. A guess would be log 2 = 0.69.

The similarities of many pairs of strangers are kept with the adapter, as 101 quantiles: a prompt
reads "closer than 91 % of strangers". With the fusion of all instruments (`fusion.py`) that is the
*style evidence* of a candidate. A text counts with its first 256 tokens. Texts of one judgement run
each in a forward of its own, so that a number never depends on what happens to be beside it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, TypeAdapter, model_validator
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.files import write_json
from nanopersrm.model.base import read_json
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, LoraConfig, load_lora, matrices, save_lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.pairs import validate
from nanopersrm.style.fusion import SCHEMA, Cosines, Fusion, Number
from nanopersrm.style.profile import StyleEvidence, percentile

QUARTER = 0.26  # share of the blocks that run
LEAST_DEVIATION = 1e-4  # of a number that is the same in all texts
QUANTILES = 101  # a step of one percent
TOKENS_AT_ONCE = 8192  # in one forward without gradients: bounds memory
REMEMBERED = 256  # vectors kept between calls, at most
FILE = "style.json"


@dataclass(frozen=True)
class StyleConfig:
    """How a text becomes a vector, and how sharp the contrast is."""

    layers: int = 0  # blocks that run; 0: the first quarter or so
    tokens: int = 256  # a text is cut after so many
    temperature: float = 0.05  # of the contrast: a lead of so much is a factor e

    def depth(self, model: Model) -> int:
        """Blocks of this model that run: 8 of 30, 7 of 28."""
        return self.layers or max(1, round(QUARTER * model.config.layers))

    def __post_init__(self) -> None:
        if self.layers < 0 or self.tokens < 1 or not self.temperature > 0:
            raise InputError(
                "style: expected layers from 0, tokens from 1 and a temperature above 0, got "
                f"{self.layers}, {self.tokens} and {self.temperature}"
            )


class StyleFile(BaseModel):
    """What style.json holds beside PEFT's files."""

    layers: int = Field(strict=True, ge=0)
    tokens: int = Field(strict=True, ge=1)
    temperature: float = Field(strict=True, gt=0, allow_inf_nan=False)
    quantiles: list[Number] = Field(min_length=QUANTILES, max_length=QUANTILES)
    mean: list[Number]
    deviation: list[Annotated[Number, Field(gt=0)]]
    fusion: Fusion | None = None

    @model_validator(mode="after")
    def _fits(self) -> "StyleFile":
        if self.quantiles != sorted(self.quantiles):
            raise ValueError("quantiles: expected the least first")
        if len(self.mean) != len(self.deviation):
            raise ValueError("deviation: expected as many numbers as mean has")
        return self


def pool(hidden: Tensor, starts: Sequence[int]) -> Tensor:
    """hidden (N, D), segment s on rows starts[s]:starts[s + 1] -> their means (S, D) in fp32.

    A product with a matrix (S, N): adding by index has no fixed order on a GPU.
    """
    assert len(hidden) == starts[-1], f"{len(hidden)} rows for segments that end at {starts[-1]}"
    assert all(a < b for a, b in pairwise(starts)), f"expected segments of 1 row or more: {starts}"
    rows = hidden if hidden.dtype == torch.float64 else hidden.float()  # (N, D)
    edges = torch.tensor(starts, device=hidden.device)[:, None]  # (S + 1, 1)
    first, end = edges[:-1], edges[1:]  # (S, 1)
    row = torch.arange(len(hidden), device=hidden.device)  # (N,)
    share = ((first <= row) & (row < end)).to(rows.dtype) / (end - first)  # (S, N)
    return share @ rows  # (S, D)


def writer_of(vectors: Tensor) -> Tensor:
    """Unit vectors (n, D) of one writer's exemplars -> the unit vector of the writer (D,)."""
    return F.normalize(vectors.mean(0), dim=-1)


def in_batch_loss(
    exemplars: Tensor, candidates: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The contrast of the docstring, and the share of writers that find their own candidate.

    exemplars (B, D), candidates (C, D): unit rows, the first B candidates by the same writers.
    """
    B = len(exemplars)
    assert 2 <= B <= len(candidates), f"{B} writers and {len(candidates)} candidates"
    writers = torch.arange(B, device=exemplars.device)
    cosines = exemplars @ candidates.T / temperature  # (B, C)
    back = cosines[:, :B].T  # (B, B) of each writer's candidate to all exemplars
    loss = (F.cross_entropy(cosines, writers) + F.cross_entropy(back, writers)) / 2
    return loss, (cosines.argmax(-1) == writers).float().mean()


class Standard(NamedTuple):
    """Mean and deviation of each number of the states of many texts."""

    mean: Tensor  # (D,) fp32
    deviation: Tensor  # (D,)


def states(
    model: Model,
    texts: Sequence[Sequence[int]],
    layers: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """The ids of n texts -> their states (n, D) in fp32, by one packed forward.

    Differentiable, with whatever adapter is on. `layers`, `recompute`: see `transformer.py`.
    """
    assert all(texts), "expected texts of 1 token or more"
    plan = Layout.of([len(text) for text in texts])
    layout = Layout(plan.starts, plan.parents, plan.positions.to(model.device))
    ids = torch.tensor([token for text in texts for token in text], device=model.device)
    return pool(model(ids, layout, layers, recompute), layout.starts)  # (n, D)


def vectors_of(states: Tensor, standard: Standard | None) -> Tensor:
    """States (n, D) -> vectors (n, D), unit rows; without a standard the states themselves."""
    if standard is not None:
        states = (states - standard.mean) / standard.deviation
    return F.normalize(states, dim=-1)


def batch_loss(
    model: Model,
    exemplars: Sequence[Sequence[Sequence[int]]],
    candidates: Sequence[Sequence[int]],
    negatives: Sequence[Sequence[int]],
    config: StyleConfig,
    standard: Standard | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """`in_batch_loss` of one step, by one packed forward, with whatever adapter is on.

    exemplars[i]: the ids of some texts by writer i; candidates[i]: of another one by the same;
    negatives: of texts by none of the writers.
    """
    assert len(candidates) == len(exemplars), f"{len(exemplars)} writers, {len(candidates)} texts"
    texts = [text for writer in exemplars for text in writer]
    packed = [*texts, *candidates, *negatives]
    vectors = vectors_of(states(model, packed, config.depth(model), recompute), standard)
    starts = list(accumulate(map(len, exemplars), initial=0))
    writers = F.normalize(pool(vectors[: len(texts)], starts), dim=-1)  # (B, D)
    return in_batch_loss(writers, vectors[len(texts) :], config.temperature)


def adapter(model: Model, config: LoraConfig, style: StyleConfig, seed: int) -> Lora:
    """A fresh adapter on the blocks that run."""
    depth = style.depth(model)
    names = {name for name in matrices(model, config.targets) if int(name.split(".")[1]) < depth}
    return Lora(model, config, seed, names)


def strangers_quantiles(similarities: Sequence[float]) -> tuple[float, ...]:
    """Similarities of texts by different writers -> their 101 quantiles, least to greatest."""
    assert len(similarities) >= 2, f"expected 2 similarities or more, got {len(similarities)}"
    every = torch.tensor(similarities, dtype=torch.float64)
    steps = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    return tuple(torch.quantile(every, steps).sort().values.tolist())


class Style:
    """A trained style adapter of a model: vectors, similarities, percentiles."""

    def __init__(
        self,
        model: Model,
        lora: Lora,
        config: StyleConfig,
        quantiles: Sequence[float] = (),
        standard: Standard | None = None,
    ):
        self.model, self.lora, self.config = model, lora, config
        self.quantiles = tuple(quantiles)  # of the similarities of strangers; may come later
        self.standard = standard
        self.fusion: Fusion | None = None  # this and all other instruments as one
        self._vectors: dict[tuple[int, ...], Tensor] = {}  # of texts by their ids
        self._version = -1  # of the adapter that made these vectors

    def standardise(self, texts: Sequence[Sequence[int]]) -> None:
        """Measure mean and deviation on the ids of many texts, with the adapter as it is now."""
        assert len(texts) >= 2, f"expected 2 texts or more, got {len(texts)}"
        states = self._states(texts)  # (n, D)
        self.standard = Standard(states.mean(0), states.std(0).clamp_min(LEAST_DEVIATION))
        self._vectors.clear()

    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The ids of n texts -> their vectors (n, D), in forwards of bounded size."""
        return vectors_of(self._states(texts), self.standard)

    @torch.no_grad()
    def _states(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """With the style adapter on and dropout off; then all is as it was."""
        batches: list[list[Sequence[int]]] = []
        room = 0
        for text in (text[: self.config.tokens] for text in texts):
            if len(text) > room:
                batches.append([])
                room = TOKENS_AT_ONCE
            batches[-1].append(text)
            room -= len(text)
        training = self.model.training
        self.model.eval()
        try:
            with self.lora.using(self.model):
                depth = self.config.depth(self.model)
                rows = [states(self.model, batch, depth) for batch in batches]
        finally:
            self.model.train(training)
        return torch.cat(rows)

    def similarities(
        self, exemplars: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> list[float]:
        """The cosine of each candidate with the writer of the exemplars (all as ids)."""
        writer = writer_of(torch.stack([self._vector(text) for text in exemplars]))  # (D,)
        others = torch.stack([self._vector(text) for text in candidates])  # (n, D)
        return (others * writer).sum(-1).tolist()  # row by row: no neighbour matters

    def _vector(self, text: Sequence[int]) -> Tensor:
        """(D,) of a text in a forward of its own, remembered while the adapter stays as it is."""
        version = sum(part._version for part in self.lora.parameters())
        if version != self._version or len(self._vectors) >= REMEMBERED:
            self._vectors.clear()
            self._version = version
        key = tuple(text[: self.config.tokens])
        if key not in self._vectors:
            self._vectors[key] = self.embed([key])[0]
        return self._vectors[key]

    def facts(self) -> dict[str, Any]:
        """What was measured, as plain numbers."""
        mean, deviation = self.standard or (torch.zeros(0), torch.zeros(0))
        return {
            "quantiles": list(self.quantiles),
            "mean": mean.tolist(),
            "deviation": deviation.tolist(),
            "fusion": None if self.fusion is None else self.fusion.to_json(),
        }

    def measured(self, facts: Mapping[str, Any]) -> "Style":
        """Put back what `facts` gave."""
        self.quantiles = tuple(facts["quantiles"])
        device = self.model.device
        mean, deviation = (torch.tensor(facts[k], device=device) for k in ("mean", "deviation"))
        self.standard = Standard(mean, deviation) if len(mean) else None
        record = facts.get("fusion")
        self.fusion = None if record is None else validate(SCHEMA, record, FILE)
        self._vectors.clear()
        return self

    def save(self, folder: Path, base_name: str) -> None:
        """PEFT's two files, and style.json with the sizes and what was measured."""
        save_lora(folder, self.lora, base_name)
        write_json(folder / FILE, {**asdict(self.config), **self.facts()})

    @staticmethod
    def load(folder: Path, model: Model) -> "Style":
        """The inverse of `save`, for the same base."""
        place, record = str(folder / FILE), read_json(folder / FILE)
        file = validate(TypeAdapter(StyleFile), record, place)
        layers, D = model.config.layers, model.config.D
        if file.layers > layers or len(file.mean) not in (0, D):  # 0: saved without a standard
            sizes = f"{file.layers} layers, mean of {len(file.mean)}"
            raise InputError(f"{place}: expected layers up to {layers}, mean of {D}, got {sizes}")
        config = StyleConfig(file.layers, file.tokens, file.temperature)
        return Style(model, load_lora(folder, model).freeze(), config).measured(record)


# (exemplars, texts) -> the style evidence of each text
StyleEvidenceFn = Callable[[Sequence[str], Sequence[str]], list[StyleEvidence]]


def cosines(tokenizer: Tokenizer, style: Style) -> Cosines:
    """The style similarity as a function of texts: the cosine of each with the writer."""

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode(text.strip()) for text in texts]

    return lambda exemplars, texts: style.similarities(ids(exemplars), ids(texts))


def style_evidence_fn(
    tokenizer: Tokenizer, style: Style, writers: Mapping[tuple[str, ...], str] | None = None
) -> StyleEvidenceFn:
    """The percentile of the style similarity and, where instruments are fused, the probability.

    writers: of exemplars that are trained on, whose they are: the fusion is then the one that was
    fitted without this writer.
    """
    similar = cosines(tokenizer, style)

    def style_evidence(exemplars: Sequence[str], texts: Sequence[str]) -> list[StyleEvidence]:
        assert style.quantiles, "the similarities of strangers are not measured yet"
        alike = similar(exemplars, texts)
        percents = [percentile(style.quantiles, cosine) for cosine in alike]
        if (fusion := style.fusion) is None:
            return [StyleEvidence(percent) for percent in percents]
        writer = (writers or {}).get(tuple(text.strip() for text in exemplars))
        if writer is not None:
            fusion = fusion.without(writer)
        probabilities = fusion.probabilities(exemplars, texts, alike)
        return [StyleEvidence(*both) for both in zip(percents, probabilities, strict=True)]

    return style_evidence


def probabilities(evidence: Iterable[StyleEvidence]) -> list[float] | None:
    """By all instruments together, of each text; None where they were not fused."""
    values = [shown.probability for shown in evidence]
    known = [value for value in values if value is not None]
    return known if known and len(known) == len(values) else None
