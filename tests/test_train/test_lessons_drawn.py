"""Lists for contrast, writers for style, the order of an epoch, and who is held out."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_bases import make_folder

from data.build import demo_pairs
from nanopersrm import InputError
from nanopersrm.judge import verdict
from nanopersrm.model.base import Base
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.pairs import Pair
from nanopersrm.train.lessons import (
    LessonConfig,
    contrast_list,
    imitation,
    plan,
    roster,
    split,
    style_batch,
)
from nanopersrm.train.packing import Bundle, batch

CONFIG = LessonConfig(rivals=3, longest=10_000)  # tiny vocabularies need three times the tokens


def writer(name: str, domain: str = "letters", kind: str = "cross_author", n: int = 0) -> Pair:
    """A pair of a made-up writer; its texts say whose they are."""
    text = f"{name} {domain} {n}"
    return Pair(
        id=f"{text} {kind}",
        twin="",
        author=name,
        domain=domain,
        split="train",
        kind=kind,
        exemplars=(f" exemplar of {text}\n", f"another of {text}"),
        question="",
        chosen=f"chosen of {text} ",
        rejected=f"rejected for {text}",
        chosen_from=f"{name}/x",
        rejected_from="y/z",
    )


def couple(one: str, two: str, n: int = 0) -> list[Pair]:
    """A pair of two writers, and its twin."""
    first, second = writer(one, n=n), writer(two, n=n)
    first = replace(first, id=f"{one}-{two}-{n}a", twin=f"{one}-{two}-{n}b")
    first = replace(first, rejected=second.chosen)
    second = replace(second, id=first.twin, twin=first.id, rejected=first.chosen)
    return [first, second]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return demo_pairs(seed=1, pairs=40, kinds=("cross_author", "restyle"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("drawn") / "tiny"
    make_folder(folder, "smollm")
    return Tokenizer.load(Base("tiny", Path(folder), "safetensors", {}))


# Contrast


def full_list(*asked) -> Bundle:
    """contrast_list, where there is one."""
    found = contrast_list(*asked)
    assert found is not None
    return found


def test_a_list_holds_chosen_rejected_and_other_writers(tokenizer, pairs):
    others = roster(pairs)
    places = set()
    for seed, pair in enumerate(pairs[:12]):
        found = full_list(pair, others, tokenizer, CONFIG, random.Random(seed))
        assert found == full_list(pair, others, tokenizer, CONFIG, random.Random(seed))
        said = [tokenizer.decode(found.prefix + branch.ids) for branch in found.branches]
        shown = [text.split("<candidate A>\n")[1].split("\n</candidate A>")[0] for text in said]
        assert shown[found.chosen] == pair.chosen.strip()
        assert len(set(shown)) == len(shown) == 4
        assert pair.rejected.strip() in shown
        authors = {p.chosen.strip(): p.author for p in pairs}
        rivals = [
            text for text in shown if text not in (pair.chosen.strip(), pair.rejected.strip())
        ]
        assert pair.author not in [authors[text] for text in rivals]
        assert len({authors[text] for text in rivals}) == 2
        for text, branch in zip(said, found.branches, strict=True):
            assert text.endswith(f"{verdict.OPEN}</think>\n<scores>A=")
            assert branch.reply_from == len(branch.ids) == branch.digit_at + 1
        assert len({branch.ids[0] for branch in found.branches}) > 1
        places.add(found.chosen)
    assert len(places) >= 3  # in drawn order
    laid = batch([found], torch.device("cpu"))
    assert laid.lists == [(0, 4, found.chosen)]
    assert len(laid.rows) == 0
    assert len(laid.ids) == found.tokens


def test_rivals_are_of_the_domain_and_as_many_as_there_are(tokenizer):
    pair = writer("ann")
    others = [pair, writer("ann", n=1), writer("bea"), writer("cat", "verse"), writer("dot")]
    others.append(replace(writer("eve"), chosen=f"{pair.rejected} "))  # a text of the pair
    config = replace(CONFIG, rivals=9, evidence=False)
    drawn: Counter[str] = Counter()
    for seed in range(20):
        found = full_list(pair, roster(others), tokenizer, config, random.Random(seed))
        said = "".join(tokenizer.decode(branch.ids) for branch in found.branches)
        assert len(found.branches) == 4
        assert "of bea" in said
        assert "of dot" in said
        assert not any(name in said for name in ("cat", "eve", "ann letters 1"))
        few = replace(config, rivals=2)
        found = full_list(pair, roster(others), tokenizer, few, random.Random(seed))
        assert len(found.branches) == 3
        said = "".join(tokenizer.decode(branch.ids) for branch in found.branches)
        drawn["bea" if "of bea" in said else "dot"] += 1
    assert min(drawn["bea"], drawn["dot"]) >= 4
    alone = full_list(pair, {}, tokenizer, config, random.Random(0))
    assert len(alone.branches) == 2


def test_lists_leave_out_what_is_too_long(tokenizer):
    pair, config = writer("ann"), replace(CONFIG, evidence=False)
    long = replace(writer("bea"), chosen="word " * 400)
    found = full_list(pair, {}, tokenizer, config, random.Random(0))
    longest = max(len(found.prefix) + len(branch.ids) for branch in found.branches)
    config = replace(config, longest=longest)
    others = roster([long])
    assert len(full_list(pair, others, tokenizer, config, random.Random(0)).branches) == 2
    config = replace(config, longest=longest - 1)
    assert contrast_list(pair, others, tokenizer, config, random.Random(0)) is None


# Style


def test_writers_of_one_domain_each_with_their_own_texts(tokenizer):
    some = [writer(f"w{i}", "letters", n=n) for i in range(20) for n in range(3)]
    some += [writer(f"v{i}", "verse") for i in range(5)]
    domains: Counter[str] = Counter()
    for seed in range(200):
        found = style_batch(roster(some), tokenizer, 4, random.Random(seed), tokens=99)
        assert len(set(found.authors)) == len(found.authors) == 4
        assert len(found.exemplars) == len(found.candidates) == 4
        of = {"letters" if name.startswith("w") else "verse" for name in found.authors}
        assert len(of) == 1
        domains += Counter(of)
        for name, exemplars, candidate in zip(
            found.authors, found.exemplars, found.candidates, strict=True
        ):
            said = tokenizer.decode(candidate)
            assert said.startswith(f"chosen of {name} ")
            rest = said.removeprefix("chosen of ")
            assert [tokenizer.decode(ids) for ids in exemplars] == [
                f"exemplar of {rest}",
                f"another of {rest}",
            ]
        assert found.negatives == []
    assert 140 <= domains["letters"] <= 180  # 20 authors of 25: 160 expected, sd 5.7


def test_other_domains_fill_up_and_nobody_stands_twice(tokenizer):
    some = [writer(name, "letters") for name in ("ann", "bea")]
    some += [writer(name, "verse") for name in ("ann", "cat", "dot")]
    for seed in range(20):
        found = style_batch(roster(some), tokenizer, 16, random.Random(seed), tokens=9)
        assert sorted(found.authors) == ["ann", "bea", "cat", "dot"]
        own = found.authors[:2]
        assert set(own) == {"ann", "bea"} or "bea" not in own
        first = "letters" if "bea" in own else "verse"
        full = style_batch(roster(some), tokenizer, 16, random.Random(seed), tokens=99)
        for name, ids in zip(full.authors[: len(own)], full.candidates, strict=False):
            assert tokenizer.decode(ids) == f"chosen of {name} {first} 0"
        assert max(len(ids) for texts in found.exemplars for ids in texts) == 9


def test_rewrites_are_negatives_of_their_writer(tokenizer):
    some = [writer("ann", kind="restyle"), writer("bea"), writer("cat", kind="style_mimicking")]
    found = style_batch(roster(some), tokenizer, 3, random.Random(0), tokens=50)
    said = {found.authors[i]: tokenizer.decode(ids) for i, ids in found.negatives}
    assert said == {name: f"rejected for {name} letters 0" for name in ("ann", "cat")}


@pytest.mark.parametrize("some", [[], [writer("ann"), writer("ann", "verse", n=1)]])
def test_one_writer_is_not_enough(tokenizer, some):
    with pytest.raises(InputError, match="at least 2 authors"):
        style_batch(roster(some), tokenizer, 16, random.Random(0), tokens=50)


# Order


def test_an_epoch_has_every_pair_once_and_twins_together(pairs):
    shuffled = random.Random(5).sample(pairs, len(pairs))[:-7]  # some have lost their twins
    order = plan(shuffled, seed=0, epoch=0)
    assert sorted(order) == list(range(len(shuffled)))
    assert order == plan(shuffled, 0, 0)
    assert order != plan(shuffled, 0, 1) != plan(shuffled, 1, 0)
    place = {shuffled[i].id: at for at, i in enumerate(order)}
    together = [abs(place[p.twin] - place[p.id]) for p in shuffled if p.twin in place]
    assert len(together) >= len(pairs) - 14
    assert set(together) == {1}


def test_a_validation_split_is_taken_as_it_is(pairs):
    train, validation = split(pairs, seed=0, share=0.5)
    assert train == [pair for pair in pairs if pair.split == "train"]
    assert validation == [pair for pair in pairs if pair.split == "validation"]
    assert validation


def test_otherwise_authors_are_held_out():
    names = [f"w{i}" for i in range(10)]
    some = [pair for a in names for b in names if a < b for pair in couple(a, b)]
    train, validation = split(some, seed=0, share=0.3)
    held = {pair.author for pair in validation}
    assert len(held) == 3
    assert not held & {pair.author for pair in train}
    assert (len(train), len(validation)) == (7 * 6, 3 * 2)  # couples of both sides are out
    for side in (train, validation):
        assert {pair.twin for pair in side} == {pair.id for pair in side}
    assert split(some, 0, 0.3) == (train, validation)
    assert {pair.author for pair in split(some, 1, 0.3)[1]} != held


def test_at_least_one_author_and_one_couple_of_twins():
    alone = [writer(f"w{i}") for i in range(5)]
    assert [len(side) for side in split(alone, seed=0, share=0.0)] == [4, 1]
    crossed = [pair for n in range(3) for pair in couple("a", "b", n) + couple("c", "d", n)]
    for seed in range(9):  # one author alone has no couple
        sides = split(crossed, seed, share=0.1)
        assert [len(side) for side in sides] == [6, 6]
        found = ["".join(sorted({pair.author for pair in side})) for side in sides]
        assert sorted(found) == ["ab", "cd"]


def test_nobody_to_hold_out():
    for some in ([writer("ann"), writer("ann", n=1)], couple("ann", "bea")):
        assert split(some, seed=0, share=0.2) == (some, [])
    with pytest.raises(InputError, match="expected some of the split 'train'"):
        split([replace(writer("ann"), split="test")], seed=0, share=0.2)


# The real base


@pytest.mark.base
def test_real_lessons(smollm, pairs):
    """SmolLM2: the end of a reply, where branches part, and the line of scores."""
    tokenizer = Tokenizer.load(smollm)
    pair = next(pair for pair in pairs if pair.kind == "cross_author")
    (bundle,) = imitation(pair, tokenizer, LessonConfig(), seed=0)
    said = [tokenizer.decode(branch.ids, special=True) for branch in bundle.branches]
    assert all(text.endswith("</scores><|im_end|>") for text in said)
    assert tokenizer.decode(bundle.prefix).endswith("</exemplar>\n\n<candidate A>\n")
    listed = full_list(pair, roster(pairs), tokenizer, LessonConfig(), random.Random(0))
    score = tokenizer.encode("</think>\n<scores>A=")
    assert all(list(branch.ids[-len(score) :]) == score for branch in listed.branches)
