"""Reading: how much likelier a text becomes after the writer's own.

A language model expects. After texts by one person it expects more of that person's words, turns
and rhythm, and a text that has them becomes likelier:

    log p[t | e]   of token t of the candidate c, after the exemplars e and c_<t
    gain[t]        = log p[t | e] - mean over k of log p[t | k]          nats; 0 for the first token
    reading(c | e) = mean over t of gain[t]                              nats a token

k goes over the NEAREST of a *cohort*: short texts by other people, read in the place of the
exemplars. They say how likely the candidate is after somebody else's text of its kind; nearest are
those after which it is likeliest. In speaker verification a score is normalised like this with an
adaptive cohort (T-norm, Auckenthaler et al., Digital Signal Processing 10, 2000; Sturim and
Reynolds, ICASSP 2005); dividing by the cohort's deviation, as they do, made it worse here.
Worked number: a text has -3.1 nats a token after its writer, and -3.30, -3.24, -3.36, -3.26 and
-3.9 after a cohort of five. The last is not near, the others have -3.29 in the mean: the reading is
0.19. The first token counts for nothing: it says how many texts came before it, hardly whose.

Tokens with a great gain are the words that sound like the writer; `phrases.py` gathers them.

The exemplars are computed once and their keys and values kept for the next call, as are those of
the cohort; under each of these beginnings lie the candidates, side by side. The last token of a
beginning is computed again with every candidate, because it predicts the first token:

    level 0   exemplars without their last token
    level 1   that token and a candidate without its last; the same of the next candidate; …

An adapter on the base, trained by contrast (`train/contrast.py`), makes gains tell writers apart.
Source of the idea: Teahan and Harper 2003; measured with large models in arXiv 2510.13302.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, TypeAdapter
from torch import Tensor

from kernels.linear import Adapter
from kernels.logprob import logprob
from nanopersrm import InputError
from nanopersrm.files import write_json
from nanopersrm.model.base import read_json
from nanopersrm.model.cache import KVCache
from nanopersrm.model.lora import Lora, adapter_off, load_lora, save_lora
from nanopersrm.model.sampler import PrefixCache
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.pairs import Text, validate
from nanopersrm.style.fusion import SCHEMA, Fusion
from nanopersrm.style.phrases import Word, only_exemplars, with_topics, words_of

ROWS_AT_ONCE = 8192  # of candidates in one forward: bounds memory
NEAREST = 4  # texts of the cohort that are the baseline of a candidate
REMEMBERED = 256  # candidates whose baselines are kept
BLANK = "\n\n"  # between texts
FILE = "reading.json"


@dataclass(frozen=True)
class ReadingConfig:
    """How much of a text is read, and how sharp the contrast of training is."""

    exemplar_tokens: int = 768  # of all exemplars together
    candidate_tokens: int = 512
    temperature: float = 0.05  # nats a token: a lead of so much is a factor e

    def __post_init__(self) -> None:
        least = min(self.exemplar_tokens, self.candidate_tokens)
        if least < 16 or not self.temperature > 0:
            raise InputError(
                "reading: expected exemplar_tokens and candidate_tokens from 16 and a temperature "
                f"above 0, got {self.exemplar_tokens}, {self.candidate_tokens} and "
                f"{self.temperature}"
            )


class ReadingFile(BaseModel):
    """What reading.json holds beside PEFT's files."""

    exemplar_tokens: int = Field(strict=True, ge=16)
    candidate_tokens: int = Field(strict=True, ge=16)
    temperature: float = Field(strict=True, gt=0, allow_inf_nan=False)
    cohort: list[Text] = Field(min_length=2)
    fusion: Fusion | None = None


@dataclass(frozen=True)
class TextReading:
    """What reading says of one candidate after the exemplars of one writer."""

    gain: float  # nats a token
    gains: list[float]  # of each token, nats
    spans: list[tuple[int, int]]  # characters of each token in the candidate


def context_ids(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[int]:
    """What a candidate is read after: the texts, a blank line after each.

    Each text gives up its end where all together have more than `most` tokens: short ones stay
    whole, long ones share what is left.
    """
    blank = tokenizer.encode(BLANK)
    ids = [tokenizer.encode(text.strip()) for text in texts]
    room = most - len(blank) * len(ids)
    for rank, i in enumerate(sorted(range(len(ids)), key=lambda i: len(ids[i]))):
        ids[i] = ids[i][: max(1, room // (len(ids) - rank))]
        room -= len(ids[i])
    return [token for text in ids for token in (*text, *blank)]


class Reading:
    """A model that reads, with its adapter and its cohort; not for several threads at once."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        config: ReadingConfig,
        cohort: Sequence[str],
        lora: Lora | None = None,
    ):
        """lora: None reads with the base alone."""
        assert len(cohort) >= 2, f"expected a cohort of 2 texts or more, got {len(cohort)}"
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.cohort, self.lora = tuple(cohort), lora
        self.fusion: Fusion | None = None  # this and all other features as one
        self._forget()

    def _forget(self) -> None:
        self._prefixes = PrefixCache(self.model)
        self._cohort: tuple[KVCache, list[int]] | None = None  # and the last token of each text
        self._baselines: dict[tuple[int, ...], Tensor] = {}  # of candidates by their ids
        self._copy = self._first_copy()

    def _first_copy(self) -> Adapter | None:
        """Another object after every change: the adapter makes its copies anew (`Lora.refresh`)."""
        return next(iter(self.lora.copies.values())) if self.lora else None

    def read(self, exemplars: Sequence[str], candidates: Sequence[str]) -> list[TextReading]:
        """Each candidate after the exemplars, beside the cohort."""
        pieces = [self.candidate(text) for text in candidates]
        ids = [piece[0] for piece in pieces]
        after = self.log_probs(exemplars, ids)
        results = []
        for log_p, base, (_, spans) in zip(after, self.baselines(ids), pieces, strict=True):
            gains = (log_p - base).index_fill_(0, self._ints([0]), 0)  # (T,)
            results.append(TextReading(float(gains.mean()), gains.tolist(), spans))
        return results

    def scores(self, exemplars: Sequence[str], candidates: Sequence[str]) -> list[float]:
        """`TextReading.gain` of each candidate."""
        return [reading.gain for reading in self.read(exemplars, candidates)]

    def words(
        self, exemplars: Sequence[str], candidates: Sequence[str], readings: Sequence[TextReading]
    ) -> list[list[Word]]:
        """The words of each candidate, those of topic marked; readings: what `read` gave."""

        def words_with(i: int, gains: Sequence[float]) -> list[Word]:
            return words_of(candidates[i], readings[i].spans, gains)

        words = [words_with(i, reading.gains) for i, reading in enumerate(readings)]
        pairs = zip(candidates, words, strict=True)
        only = [only_exemplars(text, some, exemplars) for text, some in pairs]
        for left_out in range(len(exemplars)) if len(exemplars) > 1 else ():
            sharing = [i for i, sources in enumerate(only) if left_out in sources.values()]
            if not sharing:
                continue
            texts = [candidates[i] for i in sharing]
            without = self.gains_without(exemplars, left_out, texts)
            for i, gains in zip(sharing, without, strict=True):
                words[i] = with_topics(words[i], words_with(i, gains), only[i], left_out)
        return words

    def gains_without(
        self, exemplars: Sequence[str], left_out: int, candidates: Sequence[str]
    ) -> list[list[float]]:
        """The gains of each token of each candidate without one of the exemplars."""
        ids = [self.candidate(text)[0] for text in candidates]
        rest = [text for i, text in enumerate(exemplars) if i != left_out]
        pairs = zip(self.log_probs(rest, ids, keep=False), self.baselines(ids), strict=True)
        return [[0.0, *(log_p - base).tolist()[1:]] for log_p, base in pairs]

    def candidate(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of what is read of a candidate, and their places in it.

        White space around it is not read, as training and judging do not.
        """
        ids, spans = self.tokenizer.encode_with_spans(text.strip())
        if not ids:
            raise InputError("expected a candidate with a letter or a mark, got a blank one")
        most, first = self.config.candidate_tokens, len(text) - len(text.lstrip())
        return ids[:most], [(first + start, first + end) for start, end in spans[:most]]

    @torch.inference_mode()
    def log_probs(
        self, exemplars: Sequence[str], candidates: Sequence[list[int]], keep: bool = True
    ) -> list[Tensor]:
        """log p of each token of each candidate after the exemplars: (T,) fp32 each, in nats.

        keep: the keys and values of the exemplars, for the next call.
        """
        ids = context_ids(self.tokenizer, exemplars, self.config.exemplar_tokens)
        with self._reading():
            prefix = self._prefixes.prefix_of(ids[:-1]) if keep else None
            tree = prefix.cache if prefix is not None else self._roots([ids[:-1]])
            return self._under(tree, [ids[-1]], candidates)[0]

    def baselines(self, candidates: Sequence[list[int]]) -> list[Tensor]:
        """log p (T,) of each candidate after the nearest of the cohort; the last are kept."""
        with self._reading():  # which drops what an older adapter said
            pass
        keys = [tuple(ids) for ids in candidates]
        new = [key for key in dict.fromkeys(keys) if key not in self._baselines]
        known = {key: self._baselines[key] for key in keys if key in self._baselines}
        if new:
            after = self.cohort_log_probs([list(key) for key in new])
            for key, texts in zip(new, zip(*after, strict=True), strict=True):
                table = torch.stack(texts)  # (cohort, T)
                nearest = table[:, 1:].sum(1).topk(min(NEAREST, len(table))).indices
                known[key] = table[nearest].mean(0)  # (T,)
        self._baselines |= known
        for key in list(self._baselines)[: max(0, len(self._baselines) - REMEMBERED)]:
            del self._baselines[key]
        return [known[key] for key in keys]

    @torch.inference_mode()
    def cohort_log_probs(self, candidates: Sequence[list[int]]) -> list[list[Tensor]]:
        """As `log_probs`, after each text of the cohort: [text][candidate]."""
        with self._reading():
            if self._cohort is None:
                most = self.config.exemplar_tokens
                ids = [context_ids(self.tokenizer, [text], most) for text in self.cohort]
                self._cohort = self._roots([i[:-1] for i in ids]), [i[-1] for i in ids]
            return self._under(*self._cohort, candidates)

    def _reading(self):  # type: ignore[no-untyped-def]
        """The model with this adapter alone; what was kept of an older one is dropped."""
        if self._copy is not self._first_copy():
            self._forget()
        return self.lora.using(self.model) if self.lora else adapter_off(self.model)

    def _roots(self, texts: Sequence[list[int]]) -> KVCache:
        """A tree with a root for each text."""
        cache = self.model.new_cache()
        cache.grow([0] * len(texts), max(map(len, texts)))
        flat = [i for text in texts for i in text]
        if flat:  # of a blank line nothing is left before its last token
            self.model(self._ints(flat), cache.step([len(text) for text in texts]))
        return cache

    def _under(
        self, roots: KVCache, lasts: Sequence[int], candidates: Sequence[list[int]]
    ) -> list[list[Tensor]]:
        """log p of the candidates under each root; `lasts`: the token after each root."""
        n, results = len(lasts), list[list[Tensor]]([] for _ in lasts)
        most = max(1, ROWS_AT_ONCE // (n * max(map(len, candidates))))  # candidates in a forward
        for first in range(0, len(candidates), most):
            some = candidates[first : first + most]
            tree = roots.branch()
            tree.grow([root for root in range(n) for _ in some], max(map(len, some)))
            flat = [i for last in lasts for ids in some for i in (last, *ids[:-1])]
            lengths = [len(ids) for ids in some] * n
            hidden = self.model(self._ints(flat), tree.step(lengths))  # (N, D)
            targets = self._ints([i for _ in lasts for ids in some for i in ids])
            log_p, _ = logprob(hidden, self.model.head(), targets)  # (N,)
            for i, part in enumerate(log_p.split(lengths)):
                results[i // len(some)].append(part)
        return results

    def _ints(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self.model.device)

    def facts(self) -> dict[str, Any]:
        """What was measured, as plain numbers."""
        fusion = None if self.fusion is None else self.fusion.to_json()
        return {"fusion": fusion}

    def measured(self, facts: Mapping[str, Any]) -> "Reading":
        """Put back what `facts` gave."""
        record = facts.get("fusion")
        self.fusion = None if record is None else validate(SCHEMA, record, FILE)
        return self

    def save(self, folder: Path, base_name: str) -> None:
        """PEFT's two files, and reading.json with the sizes, the cohort and what was measured."""
        assert self.lora is not None, "there is no adapter to save"
        save_lora(folder, self.lora, base_name)
        record = {**asdict(self.config), "cohort": list(self.cohort), **self.facts()}
        write_json(folder / FILE, record)

    @staticmethod
    def load(folder: Path, model: Model, tokenizer: Tokenizer) -> "Reading":
        """The inverse of `save`, for the same base."""
        record = read_json(folder / FILE)
        file = validate(TypeAdapter(ReadingFile), record, str(folder / FILE))
        config = ReadingConfig(file.exemplar_tokens, file.candidate_tokens, file.temperature)
        lora = load_lora(folder, model).freeze()
        return Reading(model, tokenizer, config, file.cohort, lora).measured(record)


# (exemplars, texts) -> how probable all features make each text, in percent
StyleEvidenceFn = Callable[[Sequence[str], Sequence[str]], list[float]]


def style_evidence_fn(
    reading: Reading, writers: Mapping[tuple[str, ...], str] | None = None
) -> StyleEvidenceFn | None:
    """The fusion's probability of texts that are read for it; None where features are not fused.

    writers: of exemplars that are trained on, whose they are: the fusion is then the one that was
    fitted without this writer.
    """
    if (fusion := reading.fusion) is None:
        return None

    def style_evidence(exemplars: Sequence[str], texts: Sequence[str]) -> list[float]:
        writer = (writers or {}).get(tuple(text.strip() for text in exemplars))
        fold = fusion if writer is None else fusion.without(writer)
        return fold.probabilities(exemplars, texts, reading.scores(exemplars, texts))

    return style_evidence
