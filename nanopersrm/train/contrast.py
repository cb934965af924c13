"""The reading stage: writers of one domain, each of whom must find their own text.

A step has B writers. Of each there are some exemplars e and another text c, and every candidate is
read after every writer's exemplars, in one tree a writer (`packing.py`), and once alone:

    M[i, j] = mean over tokens t of  log p(c_j[t] | e_i, c_j[<t])     nats a token; 0 for the first
    base[j] = the same after a blank line
    loss    = ½ mean over j of  CE over i of  M[i, j] / τ                    whose exemplars are it?
            + ½ mean over i of  CE over j of  (M[i, j] - base[j]) / τ        whose text is it?

A column needs no baseline, because one text stands in all of it. A row does, and so does a judge
with one candidate. Both take the same (`style/reading.py`), and the adapter learns M and base. The
best (M - base) / τ there can be is log p(c | e) / p(c), up to a constant of each e (InfoNCE, arXiv
1807.03748).
Worked number: two writers, M = [[-3.0, -3.5], [-3.2, -3.4]], base = [-3.2, -3.5], τ = 0.1. The
columns lead by 2 and 1; the rows are [[0.2, 0.0], [0.0, 0.1]] and lead by 2 and 1 as well. The loss
is ½ (0.127 + 0.313) = 0.220, where a guess has log 2 = 0.693.

Half of the steps take writers who are hard to tell apart: a random one and some of those nearest to
them in n-grams of letters. There topic and habit of spelling help least.

A step that does not fit one micro-batch is computed twice. M comes first, without gradients; then
dloss/dM is known, and each micro-batch adds Σ dloss/dM[i, j] · dM[i, j] by itself. That is the
gradient of the whole step exactly (GradCache, arXiv 2101.06983), at the price of one more forward.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.logprob import logprob
from nanopersrm import InputError
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.pairs import Pair
from nanopersrm.style.profile import grams
from nanopersrm.style.reading import BLANK, ReadingConfig, context_ids
from nanopersrm.train import packing
from nanopersrm.train.packing import PrefixTree, build_tree, written
from nanopersrm.train.presets import Preset
from nanopersrm.train.run import Learner

HUMAN = "cross_author"  # the kind of pairs whose texts are by people
BUCKETS = 1 << 13  # that n-grams are hashed to
TEXTS = 8  # of a writer, for their n-grams
CROWD = 2  # hard writers are drawn from so many times as many nearest ones


@dataclass(frozen=True)
class Writers:
    """Of one step: candidate i is by the writer of context i."""

    authors: list[str]
    contexts: list[list[int]]  # ids of the exemplars, see `context_ids`
    candidates: list[list[int]]
    blank: list[int]  # ids of a blank line

    def trees(self) -> list[PrefixTree]:
        """A tree a writer: the exemplars, and under them every candidate. Then every candidate
        alone after a blank line."""
        trees, B = [], len(self.authors)
        for i, (author, ids) in enumerate(zip(self.authors, self.contexts, strict=True)):
            texts = [
                written((*ids, *candidate), len(ids), i * B + j)
                for j, candidate in enumerate(self.candidates)
            ]
            trees.append(build_tree(author, texts))
        for j, (author, candidate) in enumerate(zip(self.authors, self.candidates, strict=True)):
            text = written((*self.blank, *candidate), len(self.blank), B * B + j)
            trees.append(build_tree(author, [text]))
        return trees


class WriterSource:
    """The writers of the training pairs, by domain, and who is near whom."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: Tokenizer,
        config: ReadingConfig,
        candidate_tokens: int,
        seed: int,
    ):
        human = [pair for pair in pairs if pair.kind == HUMAN]
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.candidate_tokens = candidate_tokens
        self.domains: dict[str, dict[str, list[Pair]]] = {}
        for pair in human or pairs:
            self.domains.setdefault(pair.domain, {}).setdefault(pair.author, []).append(pair)
        self.domains = {name: writers for name, writers in self.domains.items() if len(writers) > 1}
        if not self.domains:
            raise InputError("pairs: expected two authors of one domain to read, found none")
        self._near = dict[str, dict[str, list[str]]]()  # domain -> author -> the nearest first

    def writers(self, step: int, count: int) -> Writers:
        """Up to `count` writers of one domain, with exemplars and a candidate each.

        A domain is drawn in proportion to its writers, each as heavy as their pairs in the mean. Of
        an odd step they are hard to tell apart.
        """
        rng = random.Random(f"{self.seed}/reading/{step}")
        names = list(self.domains)
        domain = rng.choices(names, [self._weight(name) for name in names])[0]
        pairs = self.domains[domain]
        authors = rng.sample(list(pairs), min(count, len(pairs)))
        if step % 2:
            nearest = self.near(domain)[authors[0]][: CROWD * (count - 1)]
            authors[1:] = rng.sample(nearest, len(authors) - 1)
        drawn = [rng.choice(pairs[author]) for author in authors]
        most, length = self.config.exemplar_tokens, self.candidate_tokens
        return Writers(
            authors,
            [context_ids(self.tokenizer, pair.exemplars, most) for pair in drawn],
            [self.tokenizer.encode(pair.chosen.strip())[:length] for pair in drawn],
            self.tokenizer.encode(BLANK),
        )

    def _weight(self, domain: str) -> float:
        writers = self.domains[domain].values()
        return sum(fmean(pair.weight for pair in pairs) for pairs in writers)

    def near(self, domain: str) -> dict[str, list[str]]:
        """Of each writer of a domain all others, the nearest in n-grams first."""
        if domain not in self._near:
            authors = list(self.domains[domain])
            table = np.zeros((len(authors), BUCKETS), np.float32)
            for row, author in zip(table, authors, strict=True):
                texts = dict.fromkeys(pair.chosen for pair in self.domains[domain][author])
                for gram, times in grams(" ".join(list(texts)[:TEXTS])).items():
                    row[zlib.crc32(gram.encode()) % BUCKETS] += times
            table = np.log1p(table)
            table -= table.mean(0)  # what everybody in the domain does says nothing
            table /= np.linalg.norm(table, axis=1, keepdims=True) + 1e-9
            order = np.argsort(-(table @ table.T), axis=1, kind="stable")
            self._near[domain] = {
                author: [authors[j] for j in order[i] if j != i] for i, author in enumerate(authors)
            }
        return self._near[domain]


def read_matrix(model: Model, trees: Sequence[PrefixTree], preset: Preset) -> Tensor:
    """The entries of M and base of some of a step's trees, in the order of their texts (n,)."""
    batch = packing.batch(trees, (), model.device)
    hidden = model(batch.ids, batch.layout, recompute=preset.recompute)  # (N, D)
    chunk = preset.chunk_mb << 20
    log_p, _ = logprob(hidden[batch.rows], model.head(), batch.drawn, chunk_bytes=chunk)
    lengths = [len(text.targets) for tree in trees for text in tree.texts]
    return torch.stack([part[1:].sum() / len(part) for part in log_p.split(lengths)])


def reading_loss(table: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """M (B, B) and under it base (1, B) -> the loss (), and the share of columns of M and rows of
    M - base that find their own ()."""
    matrix, base = table[:-1], table[-1]
    B = len(base)
    assert matrix.shape == (B, B) != (1, 1), f"expected (B + 1, B), got {tuple(table.shape)}"
    rows, columns = (matrix - base) / temperature, matrix.T / temperature
    writers = torch.arange(B, device=table.device)
    loss = (F.cross_entropy(rows, writers) + F.cross_entropy(columns, writers)) / 2
    right = [(side.argmax(1) == writers).float().mean() for side in (rows, columns)]
    return loss, (right[0] + right[1]) / 2


def gradient(
    learner: Learner, writers: Writers, preset: Preset, temperature: float
) -> tuple[float, float, int]:
    """Add the gradient of one step; its loss, the share found, and the tokens computed."""
    trees, B = writers.trees(), len(writers.authors)
    parts = packing.pack(trees, preset.budget)
    numbers = [text.number for part in parts for tree in part for text in tree.texts]
    order = torch.tensor(numbers, device=learner.model.device).argsort()
    tokens = sum(tree.tokens for tree in trees)
    if len(parts) == 1:
        table = read_matrix(learner.model, parts[0], preset)[order].view(B + 1, B)
        loss, right = reading_loss(table, temperature)
        learner.backward(loss, writers.authors)
        return float(loss.detach()), float(right), tokens
    with torch.no_grad():
        flat = torch.cat([read_matrix(learner.model, part, preset) for part in parts])
    flat.requires_grad_()
    loss, right = reading_loss(flat[order].view(B + 1, B), temperature)
    (slopes,) = torch.autograd.grad(loss, flat)
    first = 0
    for part in parts:
        entries = read_matrix(learner.model, part, preset)
        weighted = (entries * slopes[first : first + len(entries)]).sum()
        learner.backward(weighted, [tree.name for tree in part])
        first += len(entries)
    return float(loss.detach()), float(right), 2 * tokens
