"""Validation: who is right, twins together, what is well formed, nothing of the model changed."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import CPU
from training_runs import short_pairs

from nanopersrm.judge import verdict
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.reply import answer
from nanopersrm.model.sampler import Reply
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.style.reading import TextReading
from nanopersrm.train import validation
from nanopersrm.train.objective import SftWeights, loss_sums
from nanopersrm.train.packing import batch, total_weights
from nanopersrm.train.presets import PRESETS
from nanopersrm.train.sft_data import ExamplesConfig, prompts_of
from nanopersrm.train.validation import Metrics, ValidationSet, both_right, reading_shares

PRESET = PRESETS["tiny"]
CONFIG = ExamplesConfig(longest=10_000, evidence=False)
PAIRS = short_pairs()[:4]  # two couples of twins


@pytest.fixture(scope="module")
def known(base) -> tuple[Model, Tokenizer]:
    return load(base, torch.float32, CPU), Tokenizer.load(base)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "REPLY_TOKENS", 6)
    monkeypatch.setattr(validation, "REASONING", 6)


@pytest.mark.parametrize(
    ("leads", "accuracy", "twins"),
    [
        ((1, 1, 1, 1), 1.0, 1.0),
        ((1, -1, 1, -1), 0.5, 0.0),  # who does not read the exemplars
        ((1, 1, -1, -1), 0.5, 0.5),
        ((1, 0, 1, 1), 0.75, 0.5),  # equal scores are wrong
    ],
)
def test_twins_count_together(known, monkeypatch, leads, accuracy, twins):
    ordered = sorted(pair.id for pair in PAIRS)  # a twin has the same id up to its last letter
    lead_of = dict(zip(ordered, leads, strict=True))

    def by_hand(model: Any, packed: Any, *more: Any) -> Any:
        sums = loss_sums(model, packed, *more)
        scores = torch.full_like(sums.scores, 5.0)
        for name, (first, _, chosen) in zip(packed.names, packed.lists, strict=True):
            scores[first + chosen] += lead_of[name]
        return replace(sums, scores=scores)

    monkeypatch.setattr(validation, "loss_sums", by_hand)
    model, tokenizer = known
    monkeypatch.setattr(validation, "WRITTEN", 0)
    metrics, page = ValidationSet(PAIRS, tokenizer, CONFIG, 0, None).evaluate(model, PRESET)
    assert (metrics.accuracy, metrics.twins, metrics.pairs) == (accuracy, twins, 4)
    assert (metrics.replies, page) == (0, "\n")
    alone = ValidationSet(PAIRS[:1], tokenizer, CONFIG, 0, None)
    assert alone.evaluate(model, PRESET)[0].twins is None


@pytest.mark.parametrize("budget", [100, 100_000])
def test_scores_and_loss_are_of_the_objective(known, budget, monkeypatch):
    """However the trees are packed: the mean loss of a token, and pairs by their soft scores."""
    model, tokenizer = known
    monkeypatch.setattr(validation, "WRITTEN", 0)
    examined = ValidationSet(PAIRS, tokenizer, CONFIG, 0, None)
    metrics, _ = examined.evaluate(model, replace(PRESET, budget=budget))
    total, right = 0.0, 0
    for tree in examined.trees:
        packed = batch([tree], CPU)
        with torch.no_grad():
            sums = loss_sums(model, packed, tokenizer.digit_ids, SftWeights(), PRESET)
        total += float(sums.imitation)
        ((_, count, chosen),) = packed.lists
        assert count == 2
        right += float(sums.scores[chosen]) > float(sums.scores[1 - chosen])
    assert metrics.loss == pytest.approx(total / total_weights(examined.trees)[0], rel=1e-5)
    assert metrics.accuracy == right / len(examined.trees)


def test_free_replies_are_parsed_and_checked(known, monkeypatch):
    """Of the first pair the chosen text is asked about, of the second the rejected one."""
    model, tokenizer = known
    stop = next(iter(tokenizer.eos_ids))
    words = [" ".join(text.split()[:3]) for text in (PAIRS[0].chosen, PAIRS[1].rejected)]
    assert not any('"' in quote for quote in words)
    texts = [
        f'A says "{words[0]}", never "{words[0]} at all". A has no emoji and smileys.\n'
        "</think>\n<scores>A=7</scores>",
        f'A says "{words[1]}". A has many emoji and smileys.\n</think>\n<scores>A=7 B=3</scores>',
    ]

    def sampled(model: Any, prompts: Any, config: Any, stop_ids: Any) -> list[list[Reply]]:
        assert stop in stop_ids
        ids = [[*tokenizer.encode(text), stop] for text in texts]
        return [[Reply(tokens, [0.0] * len(tokens), "stop")] for tokens in ids]

    monkeypatch.setattr(validation, "sample", sampled)
    examined = ValidationSet(PAIRS[:2], tokenizer, CONFIG, 0, None)
    metrics, page = examined.evaluate(model, PRESET)
    assert (metrics.well_formed, metrics.replies) == (0.5, 2)
    assert (metrics.quotes, metrics.claims) == (2 / 3, 1 / 2)
    assert page.count(validation.RULE) == 1
    assert all(verdict.OPEN + text in page for text in texts)


def test_the_same_again_and_nothing_left_behind(known):
    model, tokenizer = known
    model.train()
    before = torch.get_rng_state()
    results = [
        ValidationSet(PAIRS[:2], tokenizer, CONFIG, seed, None).evaluate(model, PRESET)
        for seed in (1, 1, 2)
    ]
    assert results[0] == results[1]
    assert results[0][1] != results[2][1]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    model.eval()


def test_reasoning_is_the_judges(known):
    """The scores are those of greedy answers to the same prompts; long pairs are left out."""
    model, tokenizer = known
    giant = replace(PAIRS[0], id="giant", chosen=PAIRS[0].chosen + " and on" * 9000)
    examined = ValidationSet([giant, *PAIRS[:2]], tokenizer, CONFIG, 0, None, reasoned=3)
    assert list(examined.reasoned) == [pair.id for pair in PAIRS[:2]]
    metrics, _ = examined.evaluate(model, PRESET)
    right = {}
    for pair in PAIRS[:2]:
        prompts = prompts_of(pair, tokenizer, CONFIG, None)
        scores = []
        for prompt in prompts:
            ((reply,),) = answer(model, tokenizer, [prompt], 1, JudgeConfig(think_tokens=6))
            scores.append(verdict.soft_score(reply.digits))
        right[pair.id] = scores[0] > scores[1]
    assert metrics.reasoned == sum(right.values()) / 2
    assert metrics.reasoned_twins == both_right(right, examined.twins)
    assert metrics.reasoned_pairs == 2


def test_how_often_reading_is_right():
    """Of the first couple one is wrong, by more than its twin is right; of the second one is
    equal, which is wrong, and the twin decides."""
    a, b, c, d = sorted(PAIRS, key=lambda pair: pair.id)
    table = {  # the gain of the chosen text and of the rejected one
        a.exemplars: (0.3, 0.1),
        b.exemplars: (0.1, 0.4),
        c.exemplars: (0.1, 0.1),
        d.exemplars: (0.2, 0.1),
    }

    def read(exemplars: Any, texts: Any) -> list[TextReading]:
        return [TextReading(gain, 0.0, [], []) for gain in table[exemplars]]

    reading: Any = SimpleNamespace(read=read)
    shares = {"pairs": 0.5, "twins": 0.0, "couples": 0.5}
    assert reading_shares(reading, PAIRS) == shares
    assert reading_shares(reading, [replace(a, twin="")]) == {"pairs": 1.0}
    assert reading_shares(reading, []) == {}


def test_what_is_reported():
    metrics = Metrics(0.625, 0.25, 1.2345, 40, 0.875, 8, 0.75, 0.5, 12, quotes=0.5)
    for part in ("40 validation pairs: 62.5%", "25% of the twins", "reasoning 75.0% of 12"):
        assert part in metrics.summary()
    assert "claims" not in metrics.summary()
    numbers = metrics.numbers()
    assert numbers["validation_reasoned"] == 0.75
    assert not {"validation_claims", "validation_pairs"} & numbers.keys()
    assert Metrics(0.0, None, 0.0, 0, 0.0, 0).numbers() == {}
