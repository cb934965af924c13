"""Validation: who is right, twins together, what it costs in nats, nothing of the model changed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import WEIGHED, fresh
from training_runs import short_pairs

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.reply import Prompt, Reply
from nanopersrm.style.ledger import LETTERS, Measurer
from nanopersrm.style.reading import TextReading
from nanopersrm.train import validation
from nanopersrm.train.presets import PRESETS
from nanopersrm.train.validation import Metrics, ValidationSet, reading_shares

PRESET = PRESETS["tiny"]
CONFIG = JudgeConfig(think_lines=2)
PAIRS = sorted(short_pairs()[:4], key=lambda pair: pair.id)  # two couples of twins


@pytest.fixture(scope="module")
def judge(base) -> Judge:
    return fresh(base)


def set_of(judge: Judge, pairs: Any = PAIRS, longest: int = 10_000) -> ValidationSet:
    return ValidationSet(pairs, judge.tokenizer, Measurer(WEIGHED), CONFIG, longest)


@pytest.mark.parametrize(
    ("leads", "accuracy", "twins"),
    [
        ((1, 1, 1, 1), 1.0, 1.0),
        ((1, -1, 1, -1), 0.5, 0.0),  # who does not read the exemplars
        ((1, 1, -1, -1), 0.5, 0.5),
        ((1, 0, 1, 1), 0.75, 0.5),  # equal scores are wrong
    ],
)
def test_twins_count_together(judge, monkeypatch, leads, accuracy, twins):
    """A rejected text gets a 5, a chosen one another digit by half: it wins by 3/4, 1/2 or 1/4."""
    half = {1: 6, 0: 5, -1: 4}
    chances = [
        [(digit == 5) / 2 + (digit == high) / 2 for digit in range(1, 10)]
        for lead in leads
        for high in (half[lead], 5)  # the chosen text, the rejected one
    ]
    asked: list[Prompt] = []

    def drawn(model: Any, tokenizer: Any, prompts: Sequence[Prompt], config: Any) -> Any:
        assert config == CONFIG
        asked.extend(prompts)
        digits = chances[len(asked) - 1]
        return [[Reply(digits=digits, features=["x"] * (len(asked) % 2))]]

    monkeypatch.setattr(validation, "draw", drawn)
    monkeypatch.setattr(validation, "AT_ONCE", 1)
    metrics, _ = set_of(judge, PAIRS).evaluate(judge.model, PRESET)
    nats = math.fsum(-math.log(0.5 + lead / 4) for lead in leads) / 4
    assert metrics == Metrics(accuracy, twins, metrics.loss, 0.5, 4)
    assert metrics.loss == pytest.approx(nats)
    for pair, chosen, rejected in zip(PAIRS, asked[::2], asked[1::2], strict=True):
        assert pair.chosen[:10] in judge.tokenizer.decode(chosen.ids)
        assert pair.rejected[:10] in judge.tokenizer.decode(rejected.ids)
    asked.clear()
    assert set_of(judge, PAIRS[:1]).evaluate(judge.model, PRESET)[0].twins is None


@pytest.mark.parametrize("cache_mb", [1024, 0])
def test_it_judges_as_the_judge_does(judge, cache_mb):
    """Greedily, with lines that the model chooses, of texts without white space around them."""
    giant = replace(PAIRS[0], id="giant", chosen=PAIRS[0].chosen + " and on" * 5000)
    padded = [giant, replace(PAIRS[0], chosen=f"\n{PAIRS[0].chosen} "), *PAIRS[1:3]]
    metrics, page = set_of(judge, padded).evaluate(judge.model, replace(PRESET, cache_mb=cache_mb))
    right, nats, lines = 0, 0.0, 0
    pages = page.split(validation.RULE)
    for k, pair in enumerate(PAIRS[:3]):
        texts = [pair.chosen, pair.rejected]
        judgement = judge.judge(pair.exemplars, texts, pair.question, config=CONFIG)
        first, second = judgement.scores
        assert first is not None
        assert second is not None
        right += first > second
        nats -= math.log(judgement.preference[0][1])
        for reply in judgement.replies:
            lines += len(reply.features)
            (i,) = reply.candidates
            prompt, _, written = pages[2 * k + i].rpartition("<think>\n")
            assert texts[i] in prompt
            drawn = [line[0] for line in written.split(". sum")[0].splitlines()]
            assert drawn == [LETTERS[feature] for feature in reply.features]
    assert metrics == Metrics(right / 3, metrics.twins, metrics.loss, lines / 6, 3)
    assert metrics.loss == pytest.approx(nats / 3)
    assert lines > 0


def test_the_same_again_and_nothing_left_behind(judge):
    judge.model.train()
    before, examined = torch.get_rng_state(), set_of(judge, PAIRS[:2])
    assert examined.evaluate(judge.model, PRESET) == examined.evaluate(judge.model, PRESET)
    assert torch.equal(torch.get_rng_state(), before)
    assert judge.model.training
    judge.model.eval()
    nothing = set_of(judge, longest=50).evaluate(judge.model, PRESET)
    assert nothing == (Metrics(0.0, None, 0.0, 0.0, 0), "\n")


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
    metrics = Metrics(0.625, 0.25, 0.54321, 2.25, 40)
    assert metrics.summary() == (
        "62.5% of 40 validation pairs, 25% of the twins, 0.543 nats a pair, 2.2 lines a reply"
    )
    numbers = {"accuracy": 0.625, "twins": 0.25, "loss": 0.54321, "lines": 2.25}
    assert metrics.numbers() == {f"validation_{name}": x for name, x in numbers.items()}
    alone = replace(metrics, twins=None)
    assert "twins" not in alone.summary()
    assert "validation_twins" not in alone.numbers()
    nothing = Metrics(0.0, None, 0.0, 0.0, 0)
    assert (nothing.numbers(), nothing.summary()) == ({}, "no validation pairs to judge")
