"""What a step sees follows from the seed and its number, and a tree is all lessons of its pair."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from fixtures import make_base

from data.build import demo_pairs
from nanopersrm import InputError
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import load
from nanopersrm.pairs import Pair
from nanopersrm.style.similarity import Style, StyleConfig, style_evidence_fn
from nanopersrm.train import course, lessons, packing
from nanopersrm.train.course import Course, fused, prompt, strangers, tree
from nanopersrm.train.lessons import LessonConfig
from nanopersrm.train.packing import Bundle

CPU = torch.device("cpu")
LONG = LessonConfig(longest=10_000, rivals=2)  # the tiny vocabulary needs three times the tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("course") / "smollm", "smollm", 16_384)


@pytest.fixture(scope="module")
def tokenizer(base) -> Tokenizer:
    return Tokenizer.load(base)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    found = demo_pairs(seed=2, pairs=10, kinds=("cross_author", "restyle"))
    return [pair for pair in found if pair.split == "train"]


def course_of(pairs, tokenizer, config: LessonConfig = LONG, seed: int = 0) -> Course:
    return Course(pairs, tokenizer, config, seed)


def names(bundles: list[Bundle]) -> list[str]:
    return [bundle.name for bundle in bundles]


def test_a_step_follows_from_seed_and_number(pairs, tokenizer):
    """In order, out of order, and by a course that never saw the steps before."""
    one = course_of(pairs, tokenizer)
    in_order = [one.step(step, 2, None) for step in range(6)]
    for step in (5, 0, 3):
        assert course_of(pairs, tokenizer).step(step, 2, None) == in_order[step]
        assert one.step(step, 2, None) == in_order[step]
    other = course_of(pairs, tokenizer, seed=1)
    assert [other.step(step, 2, None) for step in range(6)] != in_order
    assert one.style_step(3, 4, 50) == course_of(pairs, tokenizer).style_step(3, 4, 50)
    assert one.style_step(3, 4, 50) != one.style_step(4, 4, 50)
    assert one.style_step(3, 4, 50) != other.style_step(3, 4, 50)


def test_every_pair_once_an_epoch_and_twins_side_by_side(pairs, tokenizer):
    one, count = course_of(pairs, tokenizer), len(pairs)
    assert count % 2 == 0
    twins = {pair.id: pair.twin for pair in pairs}
    orders = []
    for epoch in range(2):
        seen: list[str] = []
        for step in range(epoch * count // 2, (epoch + 1) * count // 2):
            couple = names(one.step(step, 2, None))
            assert twins[couple[0]] == couple[1]
            seen += couple
        assert sorted(seen) == sorted(twins)
        orders.append(seen)
    assert orders[0] != orders[1]


def test_steps_across_the_end_of_an_epoch(pairs, tokenizer):
    """5 of 4 pairs a step: the fifth is the first of the next epoch."""
    some = pairs[:4]
    twinless = [replace(pair, twin="") for pair in some]
    found = names(course_of(twinless, tokenizer).step(0, 5, None))
    plans = [lessons.plan(twinless, 0, epoch) for epoch in (0, 1)]
    assert found == [some[i].id for i in (*plans[0], plans[1][0])]


def replies(bundle: Bundle) -> list[tuple[int, ...]]:
    found = batch_of(bundle)
    assert found.lists
    return [
        branch.ids[branch.reply_from :]
        for branch in bundle.branches
        if branch.reply_from < len(branch.ids)
    ]


def batch_of(bundle: Bundle) -> packing.Batch:
    return packing.batch([bundle], CPU)


def test_epochs_reword(pairs, tokenizer):
    one = course_of(pairs[:1], tokenizer)
    told = [replies(one.step(epoch, 1, None)[0]) for epoch in range(4)]
    assert len({tuple(some) for some in told}) >= 3
    assert all(len(some) == 2 for some in told)


@pytest.mark.parametrize("form", ["pointwise", "pairwise", "both"])
@pytest.mark.parametrize("evidence", [True, False])
def test_a_tree_is_imitation_and_contrast(pairs, tokenizer, form, evidence):
    """The same rows, targets and digits as the lessons apart, and fewer tokens."""
    config = replace(LONG, form=form, evidence=evidence, rivals=3)
    pair = replace(pairs[0], weight=2.5)
    roster = lessons.roster(pairs)
    grown = tree(pair, roster, tokenizer, config, "0/7", None)
    assert grown is not None
    rng = random.Random(f"0/7/{pair.id}/rivals")
    lines = lessons.contrast_list(pair, roster, tokenizer, config, rng)
    assert lines is not None
    apart = [*lessons.imitation(pair, tokenizer, config, "0/7"), lines]
    assert len(apart) == 2 + (form == "both")

    def told(bundles: list[Bundle]) -> Counter[tuple[int, int, float]]:
        found = packing.batch(bundles, CPU)
        places = found.layout.positions[found.rows].tolist()
        return Counter(zip(places, found.targets.tolist(), found.weights.tolist(), strict=True))

    def lists(bundles: list[Bundle]) -> tuple[list[int], int, float]:
        found = packing.batch(bundles, CPU)
        ((first, count, chosen),) = found.lists
        places = found.layout.positions[found.digit_rows].tolist()
        assert (first, count) == (0, 4)
        return sorted(places), places[chosen], float(found.list_weights)

    assert told([grown]) == told(apart)
    assert lists([grown]) == lists(apart)
    assert packing.weights_of([grown]) == packing.weights_of(apart)
    assert grown.tokens < sum(bundle.tokens for bundle in apart)
    assert grown.name == pair.id


def test_the_chosen_one_is_the_writers(pairs, tokenizer):
    """Its row ends the prompt about the chosen text, wherever the tree put it."""
    for pair in pairs[:4]:
        grown = tree(pair, lessons.roster(pairs), tokenizer, LONG, "0/0", None)
        assert grown is not None
        whole, own = [grown.prefix], []
        for branch in grown.branches:
            whole.append(whole[branch.under + 1] + branch.ids)
            own += [whole[-1]] if branch.digit_at >= 0 else []
        asked = prompt(pair, "chosen", tokenizer, LONG, None)
        assert list(own[grown.chosen][: len(asked)]) == asked


def test_pairs_too_long_are_left_out(pairs, tokenizer):
    lengths = {}
    for pair in pairs:
        lengths[pair.id] = max(
            len(bundle.prefix) + max(len(branch.ids) for branch in bundle.branches)
            for bundle in lessons.imitation(pair, tokenizer, LONG, "0/0")
        )
    middle = sorted(lengths.values())[len(pairs) // 2]
    short = course_of(pairs, tokenizer, replace(LONG, longest=middle))
    kept = set(names(short.step(0, len(pairs), None)))
    assert 0 < len(kept) < len(pairs)
    assert {name for name, length in lengths.items() if length < middle - 100} <= kept


# The longest


def test_longest_is_longest(pairs, tokenizer):
    one = course_of(pairs, tokenizer)
    sizes = [bundle.tokens for epoch in range(2) for bundle in one.step(epoch, len(pairs), None)]
    found = [bundle.tokens for bundle in one.longest(2, None)]
    assert len(found) == 2
    assert max(found) >= 0.95 * max(sizes)  # other rivals, other words
    assert len(one.longest(100, None)) == len(pairs)


def test_longest_passes_over_what_is_too_long(pairs, tokenizer):
    """The pairs with the most text are left out of every step, so they are not measured."""
    giant = replace(pairs[0], id="giant", twin="", chosen="Well. " * 20_000)
    found = course_of([*pairs, giant], tokenizer).longest(2, None)
    assert len(found) == 2
    assert "giant" not in names(found)
    with pytest.raises(InputError, match=r"at most 10000 tokens, found none among 1;.*longest"):
        course_of([giant], tokenizer).longest(2, None)


# Weight


def test_weight_zero_is_no_pair(pairs, tokenizer):
    ignored = replace(pairs[0], id="ignored", twin="", author="nobody", weight=0.0)
    plain, other = course_of(pairs, tokenizer), course_of([ignored, *pairs], tokenizer)
    for step in range(3):
        assert other.step(step, 2, None) == plain.step(step, 2, None)
        assert other.style_step(step, 4, 50) == plain.style_step(step, 4, 50)
    with pytest.raises(InputError, match="a weight above 0, found 1 with 0"):
        course_of([ignored], tokenizer)


# Style


def test_a_step_of_style(pairs, tokenizer):
    one = course_of(pairs, tokenizer)
    found = one.style_step(0, 3, 40)
    assert len(found.authors) == len(set(found.authors)) == 3
    assert [len(some) for some in found.exemplars] == [1, 1, 1]
    by_author: dict[str, set[tuple[int, ...]]] = {pair.author: set() for pair in pairs}
    for pair in pairs:
        by_author[pair.author] |= {
            tuple(tokenizer.encode(text.strip())[:40]) for text in pair.exemplars
        }
    for author, [text] in zip(found.authors, found.exemplars, strict=True):
        assert tuple(text) in by_author[author]
        assert len(text) <= 40
    few = [pair for pair in pairs if pair.author == pairs[0].author]
    with pytest.raises(InputError, match="at least 2 authors"):
        course_of(few, tokenizer).style_step(0, 3, 40)


@pytest.fixture(scope="module")
def style(base) -> Style:
    model = load(base, torch.float32, CPU)
    return Style(model, Lora(model, LoraConfig(rank=2), 0), StyleConfig(tokens=16))


def test_strangers_are_of_other_authors(pairs, tokenizer, style):
    """As many as there are ordered pairs of authors; the domain decides where it has enough."""
    roster = lessons.roster(pairs)
    found = strangers(roster, tokenizer, style, 0)
    domains = [len(authors) for authors in roster.values()]
    within = sum(n * (n - 1) for n in domains)
    authors = [author for some in roster.values() for author in some]
    apart = sum(a != b for a in authors for b in authors)
    assert len(found) == (within if within >= course.FEWEST else apart)
    assert all(-1.0001 <= cosine <= 1.0001 for cosine in found)
    assert found == strangers(roster, tokenizer, style, 0)
    same = {"essays": {pair.author: [pair] for pair in pairs}}
    n = len(same["essays"])
    assert len(strangers(same, tokenizer, style, 0)) == n * (n - 1)
    spread = {pair.author: {pair.author: [pair]} for pair in pairs}  # nobody shares a domain
    assert len(strangers(spread, tokenizer, style, 0)) == n * (n - 1)


def test_nearness_stands_in_the_prompts(pairs, tokenizer, style, monkeypatch):
    monkeypatch.setattr(style, "quantiles", tuple(i / 100 for i in range(101)))
    near = style_evidence_fn(tokenizer, style)
    pair = replace(pairs[0], chosen=f"  {pairs[0].chosen}\n")
    [(percent, chance)] = near(pair.exemplars, [pair.chosen.strip()])
    assert near(pair.exemplars, [pair.chosen]) == [(percent, None)]
    assert chance is None
    said = tokenizer.decode(prompt(pair, "chosen", tokenizer, LONG, near))
    assert f"style {percent:.0f}%" in said
    assert f"style {percent:.0f}%" not in tokenizer.decode(
        prompt(pair, "chosen", tokenizer, LONG, None)
    )
    blind = replace(LONG, evidence=False)
    assert prompt(pair, "chosen", tokenizer, blind, near) == prompt(
        pair, "chosen", tokenizer, blind, None
    )
    monkeypatch.setattr(style, "fusion", fused(pairs, 6, tokenizer, style, 0))
    [(again, chance)] = near(pair.exemplars, [pair.chosen])
    assert again == percent
    assert chance is not None
    said = tokenizer.decode(prompt(pair, "chosen", tokenizer, LONG, near))
    assert f"candidate by this writer: {chance:.0f}% likely" in said
    assert fused(pairs, 6, tokenizer, style, 0) == style.fusion
    assert fused(pairs, 6, tokenizer, style, 1) != style.fusion
    grown = tree(pair, {}, tokenizer, LONG, "0/0", near)
    assert grown is not None
    assert grown != tree(pair, {}, tokenizer, LONG, "0/0", None)
