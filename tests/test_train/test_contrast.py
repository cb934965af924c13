"""The reading stage: its loss, its gradient in parts, and the writers of a step."""

from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import CPU, TRAIN, moved
from torch import Tensor
from torch.autograd import gradcheck

from nanopersrm import InputError
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.pairs import Pair
from nanopersrm.style.reading import BLANK, Reading, ReadingConfig, context_ids
from nanopersrm.train import contrast
from nanopersrm.train.contrast import Writers, WriterSource, read_matrix, reading_loss
from nanopersrm.train.presets import PRESETS

PRESET = replace(PRESETS["tiny"], budget=100_000)
CONFIG = ReadingConfig(exemplar_tokens=48, candidate_tokens=16)
T = 0.05
WRITERS = [(pair.exemplars[0][: 30 + 30 * i], pair.chosen) for i, pair in enumerate(TRAIN[:12:3])]


@pytest.fixture(scope="module")
def model(base) -> Model:
    return load(base, torch.float32, CPU).train()


@pytest.fixture(scope="module")
def tokenizer(base) -> Tokenizer:
    return Tokenizer.load(base)


@pytest.fixture(scope="module")
def writers(tokenizer) -> Writers:
    """Four, whose contexts and candidates have different lengths."""
    contexts = [context_ids(tokenizer, [exemplar], 48) for exemplar, _ in WRITERS]
    candidates = [tokenizer.encode(text)[: 16 - 3 * i] for i, (_, text) in enumerate(WRITERS)]
    return Writers(list("abcd"), contexts, candidates, tokenizer.encode(BLANK))


def pair_of(name: str, domain: str, n: int, kind: str = "cross_author", words: str = "") -> Pair:
    """Its texts begin with whose they are."""
    exemplars, text = (f"{name}{n} exemplar", f"{name}{n} another"), f" {name}{n} chosen {words}\n"
    names: dict[str, Any] = {"id": f"{name}{domain}{n}{kind}", "twin": "", "author": name}
    return replace(TRAIN[0], **names, domain=domain, kind=kind, exemplars=exemplars, chosen=text)


def source_of(pairs: list[Pair], tokenizer: Tokenizer, seed: int = 0) -> WriterSource:
    return WriterSource(pairs, tokenizer, CONFIG, 12, seed)


# The loss


def test_the_worked_number():
    base = [-3.2, -3.5]
    loss, right = reading_loss(torch.tensor([[-3.0, -3.5], [-3.2, -3.4], base]), 0.1)
    assert float(loss) == pytest.approx(0.220, abs=5e-4)
    assert float(right) == 1
    _, right = reading_loss(torch.tensor([[-3.0, -3.2], [-3.2, -3.1], base]), 0.1)
    assert float(right) == 0.75  # after the first writer's texts the second candidate gains more
    assert float(reading_loss(torch.zeros(4, 3), 0.1)[0]) == pytest.approx(np.log(3))


def test_the_loss_is_the_formula():
    """By a loop over writers, and its slope by finite differences."""
    table = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) / 9
    total, wins, M = 0.0, 0, table.tolist()
    for i in range(5):
        row = np.array([(M[i][j] - M[5][j]) / T for j in range(5)])
        column = np.array([M[k][i] / T for k in range(5)])
        total += np.log(np.exp(row).sum()) - row[i] + np.log(np.exp(column).sum()) - column[i]
        wins += int(row.argmax() == i) + int(column.argmax() == i)
    loss, right = reading_loss(table, T)
    assert float(loss) == pytest.approx(total / 10)
    assert float(right) == pytest.approx(wins / 10)
    assert gradcheck(lambda table: reading_loss(table, T)[0], table.requires_grad_())


# The gradient


def plain_matrix(model: Model, writers: Writers) -> Tensor:
    """M (B, B) and base (1, B), a forward of the whole text for each entry."""
    entries = []
    for context, ids in product([*writers.contexts, writers.blank], writers.candidates):
        hidden = model(torch.tensor([*context, *ids]), Layout.of([len(context) + len(ids)]))
        log_p = model.logits(hidden).log_softmax(-1)[-len(ids) - 1 : -1]
        entries.append(log_p.gather(1, torch.tensor(ids)[:, None])[1:].sum() / len(ids))
    return torch.stack(entries).view(5, 4)


def slopes_of(lora: Lora) -> list[Tensor]:
    """Of every master, which has none afterwards."""
    slopes = [part.grad for part in lora.parameters() if part.grad is not None]
    for part in lora.parameters():
        part.grad = None
    return slopes


def test_the_gradient_of_a_step_is_that_of_whole_texts(model, writers):
    """In one micro-batch, in two and in four; blocks kept or computed again."""
    lora = moved(model, 3)
    lora.on(model)
    loss, right = reading_loss(plain_matrix(model, writers), T)
    loss.backward()
    expected, names = slopes_of(lora), list[list[str]]()

    def backward(loss: Tensor, examples: list[str]) -> None:
        names.append(examples)
        loss.backward()

    learner: Any = SimpleNamespace(model=model, backward=backward)
    sizes = [tree.tokens for tree in writers.trees()]
    for budget, count in ((sum(sizes), 1), (2 * max(sizes), 3), (1, 8)):
        for recompute in (False, True):
            names.clear()
            preset = replace(PRESET, budget=budget, recompute=recompute)
            found, share, tokens = contrast.gradient(learner, writers, preset, T)
            assert found == pytest.approx(float(loss.detach()), rel=1e-4)
            assert (share, tokens) == (float(right), sum(sizes) * (1 if count == 1 else 2))
            assert len(names) == count
            listed = sorted(name for part in names for name in part)
            assert listed == list("abcd" if count == 1 else "aabbccdd")
            for slope, other in zip(slopes_of(lora), expected, strict=True):
                rounding = 2e-5 * float(other.abs().max())
                torch.testing.assert_close(slope, other, rtol=0, atol=rounding)
    lora.off(model)


def test_a_step_reads_as_judging_does(model, writers, tokenizer):
    """M and base are what `Reading` says of the same texts with the same adapter."""
    reading = Reading(model, tokenizer, CONFIG, lora := moved(model, 3))
    with torch.no_grad(), lora.using(model):
        found = read_matrix(model, writers.trees(), PRESET)
    rows = [reading.log_probs([exemplar], writers.candidates) for exemplar, _ in WRITERS]
    rows.append(reading.alone(writers.candidates))
    expected = torch.tensor([float(log_p[1:].sum()) / len(log_p) for row in rows for log_p in row])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# The writers of a step


def test_writers_of_one_domain_each_with_a_pair_of_theirs(tokenizer):
    """By seed and number of the step, domains by weight; without rewrites or who is alone."""
    pairs = [pair_of(name, "letters", n) for name in "abcdefgh" for n in range(3)]
    pairs += [replace(pair_of(name, "verse", n), weight=0.5) for name in "stvw" for n in range(9)]
    pairs += [pair_of("x", "plays", 0), pair_of("a", "letters", 7, kind="restyle")]
    data = source_of(pairs, tokenizer)
    steps = [data.writers(step, 4) for step in range(100)]
    again, other = source_of(pairs, tokenizer), source_of(pairs, tokenizer, seed=1)
    assert [again.writers(step, 4) for step in (99, 5)] == [steps[99], steps[5]]
    assert [other.writers(step, 4) for step in range(3)] != steps[:3]
    domains, seen = Counter[bool](), set[str]()
    for step in steps:
        assert len({*step.authors}) == 4
        assert {*step.authors} <= {*"abcdefgh"} or {*step.authors} == {*"stvw"}
        domains["s" in step.authors] += 1
        texts = zip(step.authors, step.contexts, step.candidates, strict=True)
        for name, context, candidate in texts:
            exemplars, number = tokenizer.decode(context), tokenizer.decode(context)[1]
            assert exemplars == f"{name}{number} exemplar\n\n{name}{number} another\n\n"
            assert f"{name}{number} chosen".startswith(tokenizer.decode(candidate)[:9])
            assert len(candidate) <= 12
            seen.add(name + number)
    assert 66 <= domains[False] <= 94  # a weight of 8 in 10: 80 expected, sd 4
    assert seen >= {f"{name}{n}" for name in "abcdefgh" for n in range(3)}


def test_odd_steps_take_the_nearest(tokenizer):
    """Five writers of each of two kinds in one domain: the four nearest are of one's own kind."""
    words = {"a": "perhaps somewhat rather " * 9, "b": "zyx qqq jjj " * 9}
    pairs = [pair_of(f"{kind}{i}", "d", 0, words=words[kind]) for kind in "ab" for i in range(5)]
    data = source_of(pairs, tokenizer)
    near, steps = data.near("d"), [data.writers(step, 3).authors for step in range(20)]
    assert all({name[0] for name in near[author][:4]} == {author[0]} for author in near)
    assert all({author, *near[author]} == near.keys() for author in near)
    assert all(len({name[0] for name in authors}) == 1 for authors in steps[1::2])
    assert any(len({name[0] for name in authors}) == 2 for authors in steps[::2])
    assert len({tuple(authors[1:]) for authors in steps[1::2]}) > 3


def test_two_authors_are_needed(tokenizer):
    rewrites = [pair_of(name, "d", 0, kind="restyle") for name in "ab"]
    assert len(source_of(rewrites, tokenizer).writers(0, 9).authors) == 2  # there is nothing else
    with pytest.raises(InputError, match="two authors of one domain"):
        source_of([pair_of("a", "d", 0), pair_of("b", "e", 0), *rewrites[:1]], tokenizer)
