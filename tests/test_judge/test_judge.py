"""A judgement is exact arithmetic over the model's answers: mirrored calls, ties and notes."""

import math
from itertools import permutations

import pytest
import torch
from fixtures import (
    CANDIDATES,
    EXEMPLARS,
    digits_after,
    fond_of_quotes,
    fresh,
    make_base,
    mirrored,
    plain,
    sane,
)

from nanopersrm.judge import claims, verdict
from nanopersrm.judge import judge as judge_module
from nanopersrm.judge.answer import AnswerConfig, answer
from nanopersrm.judge.judge import PREFIXES, Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.prompts import messages
from nanopersrm.model.base import Base
from nanopersrm.model.sampler import Prefix, prefill
from nanopersrm.model.transformer import Model

QUICK = JudgeConfig(think_tokens=8, evidence=False)
PAIRS = JudgeConfig(mode="pairwise", think_tokens=4, evidence=False)


WRITERS = [EXEMPLARS] + [[f"Writer {k} wrote this. " * 6, "And so on."] for k in range(PREFIXES)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("judge") / "smollm", "smollm")


@pytest.fixture(scope="module")
def judge(base) -> Judge:
    return fresh(base)


# Scores


def test_pointwise_score_equals_a_plain_forward(judge):
    config = JudgeConfig(think=False, evidence=False)
    judgement = judge.judge(EXEMPLARS, CANDIDATES[:3], "Was there supper?", ["Be brief."], config)
    sane(judgement, 3)
    given = judge.tokenizer.encode("</think>\n<scores>A=")
    every = []
    for candidate in CANDIDATES[:3]:
        chat = messages(EXEMPLARS, [candidate], "Was there supper?", ["Be brief."])
        ids = judge.tokenizer.chat(chat, continuation="<think>\n")
        every.append(digits_after(judge.model, judge.tokenizer, ids + given).tolist())
    expected = [math.fsum((d + 1) * p for d, p in enumerate(digits)) for digits in every]
    assert judgement.scores == pytest.approx(expected, abs=1e-4)
    for i in range(3):
        for j in range(3):
            wins = [
                p * q * (1 if a > b else 0.5 if a == b else 0)
                for a, p in enumerate(every[i])
                for b, q in enumerate(every[j])
            ]
            if i != j:
                assert judgement.preference[i][j] == pytest.approx(math.fsum(wins), abs=1e-4)
    assert judgement.verdict == max(range(3), key=lambda i: math.fsum(judgement.preference[i]))
    assert judgement.tokens == 3
    assert judgement.reasoning == [""] * 3


def test_pairwise_averages_both_orders(judge):
    """Two candidates: the table is the mean of both orders by plain forwards."""
    config = JudgeConfig(mode="pairwise", think=False, evidence=False)
    judgement = judge.judge(EXEMPLARS, CANDIDATES[:2], config=config)
    sane(judgement, 2)
    tokenizer, between = judge.tokenizer, judge.tokenizer.encode(" B=")
    wins, scores = [], [0.0, 0.0]
    for order in ((0, 1), (1, 0)):
        chat = messages(EXEMPLARS, [CANDIDATES[i] for i in order])
        ids = tokenizer.chat(chat, continuation="<think>\n")
        ids += tokenizer.encode("</think>\n<scores>A=")
        first = digits_after(judge.model, tokenizer, ids)
        p = 0.0
        for a, digit in enumerate(tokenizer.digit_ids):
            second = digits_after(judge.model, tokenizer, [*ids, digit, *between])
            joint = first[a] * second
            p += float(joint[:a].sum() + joint[a] / 2)
            scores[order[0]] += (a + 1) * float(joint.sum()) / 2
            scores[order[1]] += float((joint * torch.arange(1, 10)).sum()) / 2
        wins.append(p if order[0] == 0 else 1 - p)
    assert judgement.preference[0][1] == pytest.approx(sum(wins) / 2, abs=1e-4)
    assert judgement.scores == pytest.approx(scores, abs=1e-4)


def test_samples_are_averaged(judge):
    config = JudgeConfig(samples=3, think_tokens=8, evidence=False, seed=4)
    judgement = judge.judge(EXEMPLARS, CANDIDATES[:1], config=config)
    assert len(judgement.replies) == 3
    assert len({reply.text for reply in judgement.replies}) == 3  # at temperature 1
    prompt = judge.tokenizer.chat(messages(EXEMPLARS, CANDIDATES[:1]), continuation=verdict.OPEN)
    drawing = AnswerConfig(think_tokens=8, samples=3, temperature=1.0, seed=4)
    [drawn] = answer(judge.model, judge.tokenizer, [prompt], 1, drawing)
    assert [one.text for one in drawn] == [reply.text for reply in judgement.replies]
    scores = [verdict.soft_score(one.digits) for one in drawn]
    assert max(scores) - min(scores) > 0.001
    assert judgement.scores == pytest.approx([sum(scores) / 3], abs=1e-4)


def test_more_replies_than_a_batch_holds(judge):
    """13 samples of 9 candidates take several batches, and each is judged as alone."""
    config = JudgeConfig(samples=13, think_tokens=3, evidence=False)
    every = judge.judge(EXEMPLARS, CANDIDATES, config=config)
    sane(every, 9)
    assert len(every.replies) == 117
    alone = judge.judge(EXEMPLARS, CANDIDATES[4:5], config=config)
    assert alone.scores == pytest.approx([every.scores[4]], abs=1e-3)


@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_quotes_are_copied_from_the_texts(judge, mode, monkeypatch):
    """Of all samples, in either order; a judge that may quote freely quotes what is nowhere."""
    fond_of_quotes(judge.model, judge.tokenizer, monkeypatch)
    copied, swapped, free = (
        judge.judge(
            EXEMPLARS,
            CANDIDATES[1::-1] if order == "swapped" else CANDIDATES[:2],
            config=JudgeConfig(mode, think_tokens=30, samples=8, copy_quotes=order != "free"),
        )
        for order in ("as given", "swapped", "free")
    )
    mirrored(copied, swapped, (1, 0))
    quotes = {"copied": [0, 0], "free": [0, 0]}
    for how, judgement in (("copied", copied), ("free", free)):
        sane(judgement, 2)
        for reply in judgement.replies:
            shown = dict(zip("AB", (CANDIDATES[i] for i in reply.candidates), strict=False))
            report = claims.check(reply.text, EXEMPLARS, shown)
            quotes[how][0] += report.quotes_true
            quotes[how][1] += report.quotes
    assert quotes["copied"][0] == quotes["copied"][1] >= 5
    assert quotes["free"][0] < quotes["free"][1]


# Order and ties


@pytest.mark.parametrize("config", [QUICK, PAIRS], ids=["pointwise", "pairwise"])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_mirrored_call_has_the_mirrored_answer(judge, config, samples):
    config = JudgeConfig(config.mode, think_tokens=4, samples=samples, evidence=samples == 1)
    two = judge.judge(EXEMPLARS, CANDIDATES[:2], config=config)
    mirrored(two, judge.judge(EXEMPLARS, CANDIDATES[1::-1], config=config), (1, 0))
    assert two.scores[0] != two.scores[1]
    three = judge.judge(EXEMPLARS, CANDIDATES[:3], config=config)
    for order in list(permutations(range(3)))[1 :: 1 if samples == 1 else 2]:
        other = judge.judge(EXEMPLARS, [CANDIDATES[i] for i in order], config=config)
        mirrored(three, other, order)


def test_nine_candidates_in_pairs(judge):
    nine = judge.judge(EXEMPLARS, CANDIDATES, config=PAIRS)
    sane(nine, 9)
    order = (8, 3, 0, 5, 7, 1, 2, 6, 4)
    other = judge.judge(EXEMPLARS, [CANDIDATES[i] for i in order], config=PAIRS)
    mirrored(nine, other, order)
    assert {tuple(sorted(reply.candidates)) for reply in nine.replies} < {
        (i, j) for i in range(9) for j in range(i + 1, 9)
    }  # a schedule, not all pairs


@pytest.mark.parametrize("config", [QUICK, PAIRS], ids=["pointwise", "pairwise"])
def test_identical_candidates_tie_and_are_said(judge, config):
    a, b = CANDIDATES[:2]
    both = judge.judge(EXEMPLARS, [a, f" {a}\n"], config=config)
    assert both.verdict == "tie"
    assert both.scores[0] == both.scores[1]
    assert both.preference == [[0.5, 0.5], [0.5, 0.5]]
    assert any("candidates 1 and 2 are identical" in note for note in both.notes)
    three = judge.judge(EXEMPLARS, [a, b, a], config=config)
    sane(three, 3)
    assert any("candidates 1 and 3 are identical" in note for note in three.notes)
    assert three.scores[0] == three.scores[2]
    assert three.preference[0][2] == three.preference[2][0] == 0.5
    assert three.preference[0][1] == three.preference[2][1]
    expected = 1 if three.preference[1][0] > 0.5 else "tie"  # the best is there twice, or not
    assert three.verdict == expected
    two = judge.judge(EXEMPLARS, [a, b], config=config)
    assert [three.scores[0], three.scores[1]] == two.scores
    assert not any("identical" in note for note in two.notes)


@pytest.mark.parametrize("samples", [1, 2])
def test_reasons_follow_the_order_of_the_call(judge, samples):
    """One for each candidate, duplicates too, as they stand in the call; replies are sorted."""
    texts = [CANDIDATES[i] for i in (1, 0, 2, 0)]
    config = JudgeConfig(think_tokens=8, evidence=False, samples=samples)
    judgement = judge.judge(EXEMPLARS, texts, config=config)
    whom = [reply.candidates for reply in judgement.replies]
    assert whom == [(i,) for i in range(3) for _ in range(samples)]
    first = [reply.reasoning for reply in judgement.replies[::samples]]
    assert len(set(first)) == 3
    assert judgement.reasoning == [*first, first[1]]
    other = judge.judge(EXEMPLARS, texts[::-1], config=config)
    assert other.reasoning == judgement.reasoning[::-1]


# What is kept between calls


@pytest.mark.parametrize("config", [QUICK, PAIRS], ids=["pointwise", "pairwise"])
def test_a_kept_prefix_changes_nothing(judge, base, config):
    expected = plain(fresh(base).judge(EXEMPLARS, CANDIDATES[:2], config=config))
    for before in (EXEMPLARS, EXEMPLARS[:1], ["Another writer. Another day."], EXEMPLARS[::-1]):
        judge.judge(before, CANDIDATES[2:4], "A question?", config=config)
        judge.judge(before, CANDIDATES[5:6], config=QUICK)
        assert plain(judge.judge(EXEMPLARS, CANDIDATES[:2], config=config)) == expected


def test_the_exemplars_are_computed_once(judge, monkeypatch):
    counted = 0
    forward = type(judge.model).forward

    def counting(self, ids, place):
        nonlocal counted
        counted += len(ids)
        return forward(self, ids, place)

    monkeypatch.setattr(type(judge.model), "forward", counting)
    config = JudgeConfig(think=False, evidence=False)
    judge.judge(["Quite new. " * 30], CANDIDATES[:1], config=config)
    first, counted = counted, 0
    judge.judge(["Quite new. " * 30], CANDIDATES[1:2], config=config)
    exemplar = len(judge.tokenizer.encode(("Quite new. " * 30).strip()))
    assert exemplar > 100
    assert counted < first - exemplar


@pytest.mark.parametrize("config", [QUICK, PAIRS], ids=["pointwise", "pairwise"])
def test_on_text_names_the_candidates_of_the_call(judge, config):
    """Streams belong to the indices of the call, whatever order runs inside."""
    texts = [CANDIDATES[i] for i in (2, 0, 1, 0)]
    told: dict[tuple[int, ...], str] = {}
    ended: list[tuple[int, ...]] = []

    def on_text(which: tuple[int, ...], text: str, over: bool) -> None:
        told[which] = text
        if over:
            ended.append(which)

    judgement = judge.judge(EXEMPLARS, texts, config=config, on_text=on_text)
    whom = [(i,) for i in range(3)] if config is QUICK else list(permutations(range(3), 2))
    assert sorted(ended) == whom  # the fourth is the second again
    assert told == {reply.candidates: reply.reasoning for reply in judgement.replies}


@pytest.fixture
def made(monkeypatch) -> list[list[int]]:
    """The ids of every beginning that was computed."""
    made: list[list[int]] = []

    def counting(model: Model, ids: list[int]) -> Prefix:
        made.append(ids)
        return prefill(model, ids)

    monkeypatch.setattr(judge_module, "prefill", counting)
    return made


def test_one_writer_too_many_pushes_out_the_oldest(base, made):
    judge = fresh(base)

    def asked(k: int) -> int:
        """Judge for writer k -> how many beginnings that took."""
        before = len(made)
        found = judge.judge(WRITERS[k], CANDIDATES[:2], config=QUICK)
        taken = len(made) - before
        assert plain(found) == plain(fresh(base).judge(WRITERS[k], CANDIDATES[:2], config=QUICK))
        return taken

    assert len(WRITERS) == PREFIXES + 1
    assert [asked(k) for k in range(PREFIXES)] == [1] * PREFIXES
    assert asked(0) == 0  # so that writer 1 is the oldest now
    assert asked(PREFIXES) == 1
    assert [asked(k) for k in (0, *range(2, PREFIXES + 1))] == [0] * PREFIXES
    assert asked(1) == 1
    assert len(judge._prefixes.kept) == PREFIXES
