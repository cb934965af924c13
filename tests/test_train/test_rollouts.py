"""Rollouts: drawn ids are what is kept, and the digits' probabilities are a plain forward's."""

import pytest
import torch
from fixtures import digits_after, make_base, moved, prompts_of
from tiny_bases import logits as plain
from tiny_bases import random_ids

from nanopersrm import InputError
from nanopersrm.judge import verdict
from nanopersrm.judge.answer import AnswerConfig, answer
from nanopersrm.model import sampler
from nanopersrm.model.sampler import Decoder
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.train import rollouts
from nanopersrm.train.rollouts import (
    Drawn,
    RolloutConfig,
    draw_groups,
    side_by_side,
    slots,
    slots_of,
)

CPU = torch.device("cpu")
GOOD = "It fits.\n</think>\n<scores>A=7</scores>"
BOTH = "A is curt; B is not.\n</think>\n<scores>A=8 B=2</scores>"


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> tuple[Model, Tokenizer]:
    """A random model, its adapter on and not zero, and its tokenizer."""
    base = make_base(tmp_path_factory.mktemp("rollouts") / "smollm", "smollm")
    model = load(base, torch.float32, CPU)
    moved(model, 3).on(model)
    return model, Tokenizer.load(base)


def script(monkeypatch, written: list[list[int]]) -> None:
    """Row r draws written[r], in the order of the rows; probabilities stay the model's."""
    rows: dict[int, int] = {}

    def key(seed: int, name: int, place: int) -> tuple[int, int]:
        return rows.setdefault(name, len(rows)), place

    def draw(logits, counters, temperature):
        ids = torch.tensor([written[row][place] for row, place in counters.tolist()])
        log_probs = (logits / temperature).log_softmax(-1)
        return ids, log_probs.gather(-1, ids[:, None])[:, 0]

    monkeypatch.setattr(sampler, "draw_key", key)
    monkeypatch.setattr(sampler, "draw", draw)


def spelt(tokenizer: Tokenizer, text: str, stop: bool = True) -> list[int]:
    return tokenizer.encode(text) + [min(tokenizer.eos_ids)] * stop


def place_of(tokenizer: Tokenizer, ids: list[int], before: str) -> int:
    """Where the last digit after this text stands."""
    places = [
        i
        for i, one in enumerate(ids)
        if one in tokenizer.digit_ids and tokenizer.decode(ids[:i]).endswith(before)
    ]
    return places[-1]


# Digits


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_digits_are_a_plain_forwards(known, monkeypatch, temperature):
    """At temperature 1 whatever the drawing has: they are the judge's probabilities."""
    model, tokenizer = known
    prompts = prompts_of(tokenizer, 1)
    texts = [
        GOOD,
        "A 5 of 9, =7, B=8 and a = 3.",  # no label just before
        "A=3 is what I first\n</think>\n<scores>A=6</scores>A 4",  # the last A= counts
        "Cut before the digit\n</think>\n<scores>A=",
    ] * 2
    written = [spelt(tokenizer, text) for text in texts]
    script(monkeypatch, written)
    config = RolloutConfig(group=4, rows=8, reply=60, temperature=temperature)
    groups = draw_groups(model, tokenizer, prompts, "A", config, 0)
    assert [len(group) for group in groups] == [4, 4]
    for prompt, group in zip(prompts, groups, strict=True):
        for drawn, ids in zip(group, written, strict=False):
            assert drawn.ids == tuple(ids)
        for row in (0, 2):
            digits = group[row].rollout.digits
            assert digits is not None
            (found,) = digits
            place = place_of(tokenizer, written[row], "A=")
            expected = digits_after(model, tokenizer, prompt + written[row][:place])
            assert torch.tensor(found, dtype=torch.float64) == pytest.approx(expected, abs=1e-6)
            assert sum(found) == pytest.approx(1)
            assert group[row].digit_at == place
            assert group[row].ids[place] in tokenizer.digit_ids
            drawn_from = expected ** (1 / temperature) / (expected ** (1 / temperature)).sum()
            chances = torch.tensor(group[row].rollout.chances, dtype=torch.float64)
            assert chances == pytest.approx(drawn_from, abs=1e-6 / temperature**2)
        assert [group[row].digit_at for row in (1, 3)] == [-1, -1]
        assert [group[row].rollout.chances for row in (1, 3)] == [None, None]
        assert group[1].rollout.digits is None
        assert group[3].rollout.digits is None
    assert groups[0][0].rollout.digits != groups[1][0].rollout.digits  # each by its own prompt


def test_two_labels_or_none(known, monkeypatch):
    """Pairwise both digits must be there; a soft score of half a verdict is none."""
    model, tokenizer = known
    texts = [BOTH, GOOD, "B=3 first.\n</think>\n<scores>B=3</scores>"]
    written = [spelt(tokenizer, text) for text in texts]
    script(monkeypatch, written)
    (prompt, _) = prompts_of(tokenizer, 2)
    (group,) = draw_groups(model, tokenizer, [prompt], "AB", RolloutConfig(3, 3, 60), 0)
    digits = group[0].rollout.digits
    assert digits is not None
    for label, found in zip("AB", digits, strict=True):
        place = place_of(tokenizer, written[0], f"{label}=")
        expected = digits_after(model, tokenizer, prompt + written[0][:place])
        assert torch.tensor(found, dtype=torch.float64) == pytest.approx(expected, abs=1e-6)
    assert [drawn.rollout.digits for drawn in group[1:]] == [None, None]
    assert {(drawn.digit_at, drawn.rollout.chances) for drawn in group} == {(-1, None)}


@pytest.mark.parametrize("labels", [1, 2])
def test_at_once_digits_are_those_of_a_judge_that_does_not_think(known, monkeypatch, labels):
    """The score line is given: a reply begins with its digit, and its text has the whole form."""
    model, tokenizer = known
    prompts, names = prompts_of(tokenizer, labels), "AB"[:labels]
    _, forced = verdict.closing("")
    asked = [prompt + tokenizer.encode(forced) for prompt in prompts]
    end = "7</scores>" if labels == 1 else "7 B=2</scores>"
    script(monkeypatch, [spelt(tokenizer, end)] * 4)
    config = RolloutConfig(group=2, rows=4, reply=16)
    groups = draw_groups(model, tokenizer, asked, names, config, 0, verdict.OPEN + forced)
    judged = answer(model, tokenizer, prompts, labels, AnswerConfig(think=False))
    for group, [known_answer] in zip(groups, judged, strict=True):
        for drawn in group:
            read = verdict.parse(drawn.rollout.reply, names)
            assert read.scores == ({"A": 7, "B": 2} if labels == 2 else {"A": 7})
            assert read.reasoning == ""
            assert drawn.ids == tuple(spelt(tokenizer, end))
            assert drawn.rollout.digits is not None
            assert len(drawn.rollout.digits) == labels
            assert drawn.rollout.digits[0] == pytest.approx(known_answer.digits, abs=1e-5)
            if labels == 1:
                assert drawn.digit_at == 0
                assert drawn.rollout.chances == pytest.approx(known_answer.digits, abs=1e-5)


# Text and ids


def test_ids_are_kept_as_drawn(known, monkeypatch):
    """Not as the text would be encoded; the stop token is one of them, and no part of the text."""
    model, tokenizer = known
    odd = [i for letter in "scores" for i in tokenizer.encode(letter)]
    assert tokenizer.encode("scores") != odd
    written = [odd + spelt(tokenizer, GOOD), spelt(tokenizer, GOOD), spelt(tokenizer, GOOD + " 7")]
    script(monkeypatch, written)
    prompt = prompts_of(tokenizer, 1)[:1]
    (group,) = draw_groups(model, tokenizer, prompt, "A", RolloutConfig(3, 3, 60), 0)
    assert [drawn.ids for drawn in group] == [tuple(ids) for ids in written]
    assert all(len(drawn.log_probs) == len(drawn.ids) == drawn.rollout.tokens for drawn in group)
    texts = [drawn.rollout.reply for drawn in group]
    assert texts == [verdict.OPEN + text for text in (f"scores{GOOD}", GOOD, f"{GOOD} 7")]
    problems = [verdict.parse(text, "A").problem for text in texts]
    assert problems == [None, None, "text after </scores>"]


def test_a_reply_that_the_budget_ends(known, monkeypatch):
    """It has no stop token, and nothing of its text is cut off."""
    model, tokenizer = known
    written = [spelt(tokenizer, GOOD), spelt(tokenizer, f"{GOOD}, so.")]
    script(monkeypatch, written)
    budget = len(written[0]) - 1
    prompt = prompts_of(tokenizer, 1)[:1]
    (group,) = draw_groups(model, tokenizer, prompt, "A", RolloutConfig(2, 2, budget), 0)
    assert [drawn.ids for drawn in group] == [tuple(ids[:budget]) for ids in written]
    assert [drawn.rollout.reply for drawn in group] == [verdict.OPEN + GOOD] * 2


# Room

TEXTS = {
    "alone": [random_ids(90)],
    "strangers": [random_ids(40, 1), random_ids(70, 2)],
    "all share": [random_ids(50) + random_ids(n, n) for n in (10, 30, 20)],
    "families": [random_ids(50, k) + random_ids(10 + k, 9 + k) for k in (1, 1, 2, 2, 2)],
    "both": [random_ids(40) + random_ids(30, k // 2) + random_ids(9 + k, 9 + k) for k in range(4)],
}


def room_of(decoder: Decoder) -> int:
    """Tokens whose keys and values its levels have room for."""
    return sum(level.keys.shape[1] * level.keys.shape[3] for level in decoder.cache.levels)


@pytest.mark.parametrize("replies", [1, 3])
@pytest.mark.parametrize("kind", list(TEXTS))
def test_slots_are_those_of_the_tree(known, kind, replies):
    model, prompts = known[0], TEXTS[kind]
    decoder = Decoder(model, prompts, room=12 if replies == 1 else 0)
    decoder.fork([replies] * len(prompts), 12)
    assert slots(prompts, replies, 12) == room_of(decoder)
    whole = len(prompts) * max(map(len, prompts)) + len(prompts) * replies * 12
    if kind in ("all share", "both"):
        assert room_of(decoder) < whole
    held = sum(level.keys.nbytes + level.values.nbytes for level in decoder.cache.levels)
    assert held == room_of(decoder) * model.new_cache().token_bytes
    assert slots_of(model, 3) == 3 * 2**20 // model.new_cache().token_bytes


@pytest.mark.parametrize("most", [0, 120, 200, 300, 10_000])
@pytest.mark.parametrize("rows", [1, 4, 6, 100])
@pytest.mark.parametrize("kind", list(TEXTS))
def test_as_many_neighbours_as_there_is_room_for(kind, rows, most):
    prompts = TEXTS[kind]
    parts = side_by_side(prompts, 2, 12, rows, most)
    assert [i for part in parts for i in part] == list(range(len(prompts)))

    def fits(part: range) -> bool:
        return 2 * len(part) <= rows and slots(prompts[part.start : part.stop], 2, 12) <= most

    for part in parts:
        assert len(part) == 1 or fits(part)
        assert part.stop == len(prompts) or not fits(range(part.start, part.stop + 1))
    assert side_by_side([], 2, 12, rows, most) == []


# Drawing


@pytest.fixture(scope="module")
def free(known) -> list[list[Drawn]]:
    """Replies that nothing forced: to three prompts, all side by side."""
    model, tokenizer = known
    prompts = [*prompts_of(tokenizer, 1), prompts_of(tokenizer, 2)[0]]
    return draw_groups(model, tokenizer, prompts, "A", RolloutConfig(4, 12, 20), 9)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_log_probs_are_those_of_the_temperature(known, temperature):
    model, tokenizer = known
    prompts = prompts_of(tokenizer, 1)
    config = RolloutConfig(3, 6, 20, temperature)
    for prompt, group in zip(
        prompts, draw_groups(model, tokenizer, prompts, "A", config, 1), strict=True
    ):
        for drawn in group:
            logits = plain(model, prompt + list(drawn.ids))[len(prompt) - 1 : -1]
            ids = torch.tensor(drawn.ids)
            expected = (logits / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            assert torch.tensor(drawn.log_probs) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 100])
@pytest.mark.parametrize("most", [10, 250, 360, 500, 800, 100_000])
def test_memory_does_not_move_a_reply(known, free, rows, most, monkeypatch):
    """However many run side by side, and if it is one; and no more is held than there is room."""
    model, tokenizer = known
    prompts = [*prompts_of(tokenizer, 1), prompts_of(tokenizer, 2)[0]]
    held: list[tuple[int, int]] = []
    fork = Decoder.fork

    def watched(self: Decoder, counts: list[int], room: int, first: int = 0) -> None:
        fork(self, counts, room, first)
        held.append((room_of(self), sum(counts)))

    monkeypatch.setattr(Decoder, "fork", watched)
    monkeypatch.setattr(rollouts, "slots_of", lambda *_: most)
    found = draw_groups(model, tokenizer, prompts, "A", RolloutConfig(4, rows, 20), 9)
    longest = max(map(len, prompts))
    assert max(tokens for tokens, _ in held) <= max(most, longest + 20)  # one reply at least
    assert max(count for _, count in held) <= rows
    assert sum(count for _, count in held) == 12
    if most == 100_000:
        assert len(held) == {1: 12, 3: 6, 4: 3, 7: 3, 8: 2, 100: 1}[rows]
    for group, expected in zip(found, free, strict=True):
        assert [drawn.ids for drawn in group] == [drawn.ids for drawn in expected]
        for one, other in zip(group, expected, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_all_replies_differ_and_follow_the_seed(known, free):
    model, tokenizer = known
    prompts = [*prompts_of(tokenizer, 1), prompts_of(tokenizer, 2)[0]]
    assert len({drawn.ids for group in free for drawn in group}) == 12
    other = draw_groups(model, tokenizer, prompts, "A", RolloutConfig(4, 12, 20), 10)
    same = {d.ids for g in free for d in g} & {d.ids for g in other for d in g}
    assert not same


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"group": 1}, "group: expected a number from 2, got 1"),
        ({"rows": 0}, "rows: expected a number from 1, got 0"),
        ({"cache_mb": 0}, "cache_mb: expected a number from 1, got 0"),
        ({"reply": 0}, "reply: expected a number from 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": float("inf")}, "temperature: expected a number above 0, got inf"),
        ({"temperature": float("nan")}, "temperature: expected a number above 0, got nan"),
    ],
)
def test_numbers_that_make_no_sense(given, said):
    with pytest.raises(InputError, match=said):
        RolloutConfig(**given)
