"""Reading: how much likelier a text becomes after the writer's own, and the other way round.

A language model expects. After texts by one person it expects more of that person's words, turns
and rhythm, and a text that has them becomes likelier. With a candidate c and exemplars e:

    gain[t]        = log p[c_t | e, c_<t] - log p[c_t | c_<t]        nats; 0 for the first token
    forward        = mean over t of gain[t]                         nats a token of the candidate
    back           = mean over t of log p[e_t | c, e_<t] - log p[e_t | e_<t]       of the exemplars
    reading(c, e)  = ½ (forward + back)

A text with nothing before it stands after a blank line. Summed instead of averaged, either is the
pointwise mutual information log p(c, e) / p(c) p(e), and for a perfect model they are the same
number. Ours is not perfect: two estimates are better than one (`docs/results.md` has both alone,
and what cohorts of other writers give as baselines). Worked number: a candidate has -3.1 nats a
token after the exemplars and -3.4 alone; they have -3.25 after it and -3.35 alone. The reading is
½ (0.3 + 0.1) = 0.2. The first token says how many texts came before it, so it counts for nothing.
Tokens with a great gain are the words that sound like the writer; `phrases.py` gathers them.

The exemplars are computed once and their keys and values kept for the next call; under them lie the
candidates, side by side. For the other direction each candidate is a root, with the exemplars under
it. The last token of a root is computed again with every text, because it predicts the first token:

    level 0   exemplars without their last token
    level 1   that token and a candidate without its last; the same of the next candidate; …

An adapter on the base, trained by contrast (`train/contrast.py`), makes gains tell writers apart.
Source of the idea: Teahan and Harper 2003; measured with large models in arXiv 2510.13302.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
from nanopersrm.pairs import validate
from nanopersrm.style.phrases import Word, only_exemplars, with_topics, words_of

ROWS_AT_ONCE = 8192  # in one forward: bounds memory
REMEMBERED = 256  # texts whose log p alone is kept
BLANK = "\n\n"  # between texts
FILE = "reading.json"


@dataclass(frozen=True)
class ReadingConfig:
    """How much of a text is read, and how sharp the contrast of training is."""

    exemplar_tokens: int = 768  # of all exemplars together
    back_tokens: int = 384  # of all exemplars, after a candidate
    candidate_tokens: int = 512
    temperature: float = 0.05  # nats a token: a lead of so much is a factor e

    def __post_init__(self) -> None:
        sizes = (self.exemplar_tokens, self.back_tokens, self.candidate_tokens)
        if min(sizes) < 16 or not self.temperature > 0:
            raise InputError(
                "reading: expected exemplar_tokens, back_tokens and candidate_tokens from 16 and a "
                f"temperature above 0, got {', '.join(map(str, sizes))} and {self.temperature}"
            )


class ReadingFile(BaseModel):
    """What reading.json holds beside PEFT's files; what else it has is passed over."""

    exemplar_tokens: int = Field(strict=True, ge=16)
    back_tokens: int = Field(strict=True, ge=16)
    candidate_tokens: int = Field(strict=True, ge=16)
    temperature: float = Field(strict=True, gt=0, allow_inf_nan=False)


@dataclass(frozen=True)
class TextReading:
    """What reading says of one candidate and the exemplars of one writer."""

    forward: float  # gain of the candidate after the exemplars, nats a token
    back: float  # gain of the exemplars after the candidate, nats a token
    gains: list[float]  # of each token of the candidate, nats
    spans: list[tuple[int, int]]  # characters of each token in the candidate

    @property
    def score(self) -> float:
        """Both directions, nats a token."""
        return (self.forward + self.back) / 2


@dataclass(frozen=True)
class Roots:
    """Beginnings of texts, computed: what `Reading.under` continues."""

    cache: KVCache  # of each text without its last token
    lasts: list[int]  # its last token


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
    """A model that reads, with its adapter; not for several threads at once."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, config: ReadingConfig, lora: Lora | None = None
    ):
        """lora: None reads with the base alone."""
        self.model, self.tokenizer, self.config, self.lora = model, tokenizer, config, lora
        self.blank = tokenizer.encode(BLANK)
        self._forget()

    def _forget(self) -> None:
        self._prefixes = PrefixCache(self.model)
        self._alone: dict[tuple[int, ...], Tensor] = {}  # log p of texts by their ids
        self._copy = self._first_copy()

    def _first_copy(self) -> Adapter | None:
        """Another object after every change: the adapter makes its copies anew (`Lora.refresh`)."""
        return next(iter(self.lora.copies.values())) if self.lora else None

    def read(self, exemplars: Sequence[str], candidates: Sequence[str]) -> list[TextReading]:
        """Each candidate beside the exemplars."""
        pieces = [self.candidate(text) for text in candidates]
        ids = [piece[0] for piece in pieces]
        gains = self.gains(exemplars, ids)
        return [
            TextReading(float(gain.mean()), back, gain.tolist(), spans)
            for gain, back, (_, spans) in zip(gains, self.back(exemplars, ids), pieces, strict=True)
        ]

    def scores(self, exemplars: Sequence[str], candidates: Sequence[str]) -> list[float]:
        """`TextReading.score` of each candidate."""
        return [reading.score for reading in self.read(exemplars, candidates)]

    def words(
        self,
        exemplars: Sequence[str],
        candidates: Sequence[str],
        readings: Sequence[TextReading],
        topics: bool = True,
    ) -> list[list[Word]]:
        """The words of each candidate; readings: what `read` gave. topics: mark those of topic,
        which takes a forward for each exemplar."""

        def words_with(i: int, gains: Sequence[float]) -> list[Word]:
            return words_of(candidates[i], readings[i].spans, gains)

        words = [words_with(i, reading.gains) for i, reading in enumerate(readings)]
        if not topics:
            return words
        pairs = zip(candidates, words, strict=True)
        only = [only_exemplars(text, some, exemplars) for text, some in pairs]
        for left_out in range(len(exemplars)) if len(exemplars) > 1 else ():
            sharing = [i for i, sources in enumerate(only) if left_out in sources.values()]
            if not sharing:
                continue
            ids = [self.candidate(candidates[i])[0] for i in sharing]
            rest = [text for i, text in enumerate(exemplars) if i != left_out]
            for i, gains in zip(sharing, self.gains(rest, ids, keep=False), strict=True):
                words[i] = with_topics(words[i], words_with(i, gains.tolist()), only[i], left_out)
        return words

    def candidate(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of what is read of a candidate, and their places in it.

        White space around it is not read, as training and judging do not.
        """
        ids, spans = self.tokenizer.encode_with_spans(text.strip())
        if not ids:
            raise InputError("expected a candidate with a letter or a mark, got a blank one")
        most, first = self.config.candidate_tokens, len(text) - len(text.lstrip())
        return ids[:most], [(first + start, first + end) for start, end in spans[:most]]

    def exemplar_ids(self, texts: Sequence[str]) -> list[int]:
        """The ids of what is read of them after a candidate."""
        ids = context_ids(self.tokenizer, texts, self.config.back_tokens)
        return ids[: len(ids) - len(self.blank)]

    def gains(
        self, exemplars: Sequence[str], candidates: Sequence[list[int]], keep: bool = True
    ) -> list[Tensor]:
        """Of each token of each candidate (T,) fp32, in nats; keep: as in `log_probs`."""
        after = self.log_probs(exemplars, candidates, keep)
        return [
            _without_first(log_p - alone)
            for log_p, alone in zip(after, self.alone(candidates), strict=True)
        ]

    def back(self, exemplars: Sequence[str], candidates: Sequence[list[int]]) -> list[float]:
        """The gain of the exemplars after each candidate, nats a token."""
        ids = self.exemplar_ids(exemplars)
        if not ids:  # of a blank exemplar nothing is left
            return [0.0 for _ in candidates]
        (alone,), results = self.alone([ids]), list[float]()
        longest = max(map(len, candidates)) + len(self.blank) + len(ids)
        most = max(1, ROWS_AT_ONCE // longest)  # candidates in a forward
        for first in range(0, len(candidates), most):
            contexts = [[*some, *self.blank] for some in candidates[first : first + most]]
            for (log_p,) in self.under(self.roots(contexts), [ids]):
                results.append(float(_without_first(log_p - alone).mean()))
        return results

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
        roots = self.roots([ids]) if prefix is None else Roots(prefix.cache, ids[-1:])
        return self.under(roots, candidates)[0]

    def alone(self, texts: Sequence[list[int]]) -> list[Tensor]:
        """log p (T,) of each text after a blank line; the last computed are kept."""
        self._reading()  # which drops what an older adapter said
        keys = [tuple(ids) for ids in texts]
        if new := [key for key in dict.fromkeys(keys) if key not in self._alone]:
            (after,) = self.under(self.roots([self.blank]), [list(key) for key in new])
            self._alone |= zip(new, after, strict=True)
        results = [self._alone[key] for key in keys]
        for key in list(self._alone)[:-REMEMBERED]:
            del self._alone[key]
        return results

    @torch.inference_mode()
    def roots(self, contexts: Sequence[list[int]]) -> Roots:
        """Compute texts that others are to continue: a tree with a root for each.

        All have one token, or all have more.
        """
        starts, lengths = [ids[:-1] for ids in contexts], [len(ids) - 1 for ids in contexts]
        cache = self.model.new_cache()
        cache.grow([0] * len(contexts), max(lengths))
        flat = [i for ids in starts for i in ids]
        if flat:  # of a blank line nothing is left before its last token
            with self._reading():
                self.model(self._ints(flat), cache.step(lengths))
        return Roots(cache, [ids[-1] for ids in contexts])

    @torch.inference_mode()
    def under(self, roots: Roots, texts: Sequence[list[int]]) -> list[list[Tensor]]:
        """log p of each text under each root, as `log_probs`: [root][text]."""
        n, results = len(roots.lasts), list[list[Tensor]]([] for _ in roots.lasts)
        most = max(1, ROWS_AT_ONCE // (n * max(map(len, texts))))  # texts in a forward
        for first in range(0, len(texts), most):
            some = texts[first : first + most]
            tree = roots.cache.branch()
            tree.grow([root for root in range(n) for _ in some], max(map(len, some)))
            flat = [i for last in roots.lasts for ids in some for i in (last, *ids[:-1])]
            lengths = [len(ids) for ids in some] * n
            with self._reading():
                hidden = self.model(self._ints(flat), tree.step(lengths))  # (N, D)
            targets = self._ints([i for _ in roots.lasts for ids in some for i in ids])
            log_p, _ = logprob(hidden, self.model.head(), targets)  # (N,)
            for i, part in enumerate(log_p.split(lengths)):
                results[i // len(some)].append(part)
        return results

    def _reading(self):  # type: ignore[no-untyped-def]
        """The model with this adapter alone; what was kept of an older one is dropped."""
        if self._copy is not self._first_copy():
            self._forget()
        return self.lora.using(self.model) if self.lora else adapter_off(self.model)

    def _ints(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self.model.device)

    def save(self, folder: Path, base_name: str) -> None:
        """PEFT's two files, and reading.json with the sizes."""
        assert self.lora is not None, "there is no adapter to save"
        save_lora(folder, self.lora, base_name)
        write_json(folder / FILE, asdict(self.config))

    @staticmethod
    def load(folder: Path, model: Model, tokenizer: Tokenizer) -> "Reading":
        """The inverse of `save`, for the same base."""
        file = validate(TypeAdapter(ReadingFile), read_json(folder / FILE), str(folder / FILE))
        lora = load_lora(folder, model).freeze()
        return Reading(model, tokenizer, ReadingConfig(**file.model_dump()), lora)


def _without_first(gains: Tensor) -> Tensor:
    """gains (T,) of tokens -> the same; the first counts for nothing."""
    gains[0] = 0
    return gains
