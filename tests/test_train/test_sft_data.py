"""SFT examples: the prompts and forced ids of the judge, drawn by seed and number of the step."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures import CPU, KINDS, TRAIN, WEIGHED, make_base, moved

from data.build import demo_pairs
from nanopersrm import InputError
from nanopersrm.judge import judge as judging
from nanopersrm.judge import verdict
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import load
from nanopersrm.pairs import Pair
from nanopersrm.style.reading import Reading, ReadingConfig
from nanopersrm.train.packing import TAIL_WEIGHT, Branch
from nanopersrm.train.replies import reply
from nanopersrm.train.sft_data import (
    ExamplesConfig,
    SftData,
    epoch_order,
    hold_out,
    pair_texts,
    pairs_by_author,
    prompts_of,
    spell,
    stripped,
    turn_end,
)

ENDS = {
    "smollm": "<|im_end|>",
    "qwen2": "<|im_end|>",
    "llama-bpe": "<|eot_id|>",
    "gpt-2": "<|endoftext|>",
}
LONG = ExamplesConfig(longest=10_000)  # the tiny vocabularies need three times as many tokens


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Short ones first, without white space around their texts."""
    some = demo_pairs(seed=1, pairs=24, kinds=("cross_author", "restyle"))
    train = [stripped(pair) for pair in some if pair.split == "train"]
    return sorted(train, key=lambda pair: len("".join((*pair.exemplars, pair.chosen))))


@pytest.fixture(scope="module")
def tokenizer(base) -> Tokenizer:
    return Tokenizer.load(base)


def data_of(
    pairs: list[Pair], tokenizer: Tokenizer, seed: int = 0, longest: int = 10_000
) -> SftData:
    return SftData(pairs, tokenizer, ExamplesConfig(longest=longest), seed)


def writer(name: str, domain: str = "letters", kind: str = "cross_author", n: int = 0) -> Pair:
    """A pair of a made-up writer; its texts say whose they are."""
    text = f"{name} {domain} {n}"
    names: dict[str, Any] = {"id": f"{text} {kind}", "author": name, "domain": domain, "kind": kind}
    names |= {"chosen": f"chosen of {text} ", "rejected": f"rejected for {text}"}
    exemplars = (f" exemplar of {text}\n", f"another of {text}")
    return replace(TRAIN[0], **names, twin="", split="train", exemplars=exemplars)


def couple(one: str, two: str, n: int = 0) -> list[Pair]:
    """A pair of two writers, and its twin."""
    first, second = writer(one, n=n), writer(two, n=n)
    first = replace(first, id=f"{one}-{two}-{n}a", twin=f"{one}-{two}-{n}b")
    first = replace(first, rejected=second.chosen)
    second = replace(second, id=first.twin, twin=first.id, rejected=first.chosen)
    return [first, second]


def texts_of(pair: Pair, tokenizer: Tokenizer, config: ExamplesConfig, seed: str, *others: Pair):
    """Two replies, then the list, and which of them is the chosen one."""
    texts = pair_texts(pair, pairs_by_author(others), tokenizer, config, seed, None)
    assert texts is not None
    return texts


def written(pair: Pair, evidence: bool = True) -> list[str]:
    """The replies to a pair."""
    names = [(role, f"0/{pair.id}/pointwise/{role}") for role in ("chosen", "rejected")]
    return [reply(pair, role, random.Random(name), evidence) for role, name in names]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_prompts_and_replies_are_the_judges_own(kind, pairs, tmp_path, monkeypatch):
    """The prompts that it asks, the pieces that it forces, and the end of the turn."""
    base = make_base(tmp_path / kind, kind, 16_384)
    judge = Judge(load(base, torch.float32, CPU), Tokenizer.load(base), trained=True)
    prompts_seen: list[list[int]] = []
    answer = judging.answer

    def watched(model: Any, tokenizer: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
        prompts_seen.extend(prompts)
        return answer(model, tokenizer, prompts, *rest, **more)

    monkeypatch.setattr(judging, "answer", watched)
    pair, tokenizer = pairs[0], judge.tokenizer
    for evidence in (True, False):
        prompts_seen.clear()
        config = JudgeConfig(evidence=evidence, think=False)
        judge.judge(pair.exemplars, [pair.chosen, pair.rejected], config=config)
        texts = texts_of(pair, tokenizer, replace(LONG, evidence=evidence), "0")[0][:2]
        assert sorted(list(text.ids[: text.reply_from]) for text in texts) == sorted(prompts_seen)
        for text, expected in zip(texts, written(pair, evidence), strict=True):
            ids = list(text.ids[text.reply_from :])
            assert tokenizer.decode(ids[-1:], special=True) == ENDS[kind]
            assert tokenizer.special_ids.isdisjoint(ids[:-1])
            assert verdict.OPEN + tokenizer.decode(ids[:-1]) == expected
            parsed = verdict.parse(expected, "A")
            assert parsed.scores is not None
            thought = tokenizer.encode(parsed.reasoning)
            forced = tokenizer.encode(verdict.closing(parsed.reasoning)[1])
            digit = tokenizer.digit_ids[parsed.scores["A"] - 1]
            pieces = [*thought, *forced, digit, *tokenizer.encode(verdict.SCORES_END)]
            assert ids[:-1] == pieces
            heavy = len(ids) - len(thought)  # from the piece with </think> on
            assert text.weights == [1.0] * len(thought) + [TAIL_WEIGHT] * heavy


def test_a_reply_is_spelt_in_the_pieces_of_the_judge():
    """Some vocabularies join the "." of a thought with the line break after it."""

    class Joining:
        digit_ids = tuple(range(1001, 1010))

        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text.replace(".\n", "\x00")]

    joining: Any = Joining()
    ids = spell("Terse.", 7, joining)
    text = "".join(str(i - 1000) if i > 1000 else chr(i) for i in ids)
    assert text == "Terse.\n</think>\n<scores>A=7</scores>"


def test_style_evidence_stands_at_its_candidates(tokenizer, pairs):
    pair = pairs[0]

    def style(exemplars: Any, candidates: Any) -> list[float]:
        assert exemplars == pair.exemplars
        return [91.0 if text == pair.chosen else 7.0 for text in candidates]

    prompts = prompts_of(pair, tokenizer, LONG, style)
    for percent, prompt in zip((91, 7), prompts, strict=True):
        assert f"by this writer: {percent}% likely" in tokenizer.decode(prompt)
    texts = pair_texts(pair, {}, tokenizer, LONG, "0", style)
    assert texts is not None
    assert "by this writer: 91% likely" in tokenizer.decode(list(texts[0][texts[1]].ids))
    blind = replace(LONG, evidence=False)
    assert prompts_of(pair, tokenizer, blind, style) == prompts_of(pair, tokenizer, blind, None)


def test_what_is_refused(tokenizer, monkeypatch):
    for wrong in (dict[str, Any](rivals=0), dict[str, Any](longest=0)):
        with pytest.raises(InputError, match=next(iter(wrong))):
            ExamplesConfig(**wrong)
    monkeypatch.setattr(tokenizer, "eos_ids", frozenset({5000}))
    with pytest.raises(InputError, match="5000"):
        turn_end(tokenizer)


# Contrast


def candidate_of(tokenizer: Tokenizer, text: Branch) -> str:
    shown = tokenizer.decode(list(text.ids))
    assert shown.endswith(f"{verdict.OPEN}</think>\n<scores>A=")
    return shown.split("<candidate A>\n")[1].split("\n</candidate A>")[0]


def test_a_list_holds_chosen_rejected_and_other_writers(tokenizer, pairs):
    config, authors = replace(LONG, rivals=3), {pair.chosen: pair.author for pair in pairs}
    places = set()
    for seed, pair in enumerate(pairs[:8]):
        texts, chosen = texts_of(pair, tokenizer, config, str(seed), *pairs)
        listed = texts[2:]
        shown = [candidate_of(tokenizer, text) for text in listed]
        assert shown[chosen - 2] == pair.chosen
        assert len(set(shown)) == 4
        assert pair.rejected in shown
        rivals = [authors[text] for text in shown if text not in (pair.chosen, pair.rejected)]
        assert len({*rivals, pair.author}) == 3
        assert all(text.reply_from == len(text.ids) == text.digit_at + 1 for text in listed)
        places.add(chosen)
    assert len(places) >= 3  # in drawn order


def test_rivals_are_of_the_domain_and_as_many_as_there_are(tokenizer, pairs):
    pair = replace(pairs[0], domain="letters")
    others = [pair, writer("bea"), writer("cat", "verse"), writer("dot")]
    others += [writer(pair.author), replace(writer("eve"), chosen=pair.rejected)]
    config = replace(LONG, rivals=9)
    texts, _ = texts_of(pair, tokenizer, config, "0", *others)
    shown = {candidate_of(tokenizer, text) for text in texts[2:]}
    rivals = {stripped(other).chosen for other in (others[1], others[3])}
    assert shown == {pair.chosen, pair.rejected, *rivals}
    assert len(texts) == 6
    longest = max(len(text.ids) for text in texts[:2])
    giant = replace(writer("bea"), chosen="word " * 4000)
    config = ExamplesConfig(longest=longest)
    assert len(texts_of(pair, tokenizer, config, "0", giant)[0]) == 4  # without the giant
    config = ExamplesConfig(longest=longest - 1)
    assert pair_texts(pair, {}, tokenizer, config, "0", None) is None


# Steps


def test_a_step_follows_from_seed_and_number(pairs, tokenizer):
    """In order, out of order, and by data that never saw the steps before."""
    data = data_of(pairs, tokenizer)
    in_order = [data.trees(step, 2) for step in range(4)]
    for step in (3, 0):
        assert data_of(pairs, tokenizer).trees(step, 2) == in_order[step] == data.trees(step, 2)
    other = data_of(pairs, tokenizer, seed=1)
    assert [other.trees(step, 2) for step in range(4)] != in_order


def test_every_pair_once_an_epoch_and_twins_side_by_side(pairs):
    shuffled = random.Random(5).sample(pairs, len(pairs))[:-7]  # some have lost their twins
    order = epoch_order(shuffled, seed=0, epoch=0)
    assert sorted(pair.id for pair in order) == sorted(pair.id for pair in shuffled)
    assert order == epoch_order(shuffled, 0, 0)
    assert order != epoch_order(shuffled, 0, 1) != epoch_order(shuffled, 1, 0)
    place = {pair.id: at for at, pair in enumerate(order)}
    together = [abs(place[p.twin] - place[p.id]) for p in shuffled if p.twin in place]
    assert set(together) == {1}


def test_steps_across_the_end_of_an_epoch_are_reworded(pairs, tokenizer):
    some = [replace(pair, twin="") for pair in pairs[:2]]
    trees = data_of(some, tokenizer).trees(0, 3)
    orders = [epoch_order(some, 0, epoch) for epoch in (0, 1)]
    assert [tree.name for tree in trees] == [pair.id for pair in (*orders[0], orders[1][0])]
    alone = data_of(some[:1], tokenizer)
    texts = {tuple(branch.ids for branch in alone.trees(step, 1)[0].branches) for step in range(3)}
    assert len(texts) >= 2


# Reading


def test_what_prompts_show_of_a_reading(pairs, tokenizer, base):
    model = load(base, torch.float32, CPU)
    config = ReadingConfig(exemplar_tokens=32, candidate_tokens=16)
    reading = Reading(model, tokenizer, config, moved(model, 2))
    reading.evidence = WEIGHED
    data = data_of(pairs[:4], tokenizer)
    without = data.trees(0, 1)
    data.show(reading, [])
    assert data.trees(0, 1) != without
    with pytest.raises(InputError, match=r"--examples\.longest"):
        data_of(pairs[:4], tokenizer, longest=100).show(reading, [])


# Who is held out


def test_otherwise_authors_are_held_out():
    authors = [f"w{i}" for i in range(10)]
    some = [pair for a in authors for b in authors if a < b for pair in couple(a, b)]
    train, validation = hold_out(some, seed=0, share=0.3)
    held = {pair.author for pair in validation}
    n = len(held)
    assert n in (3, 4)  # the first comes with the author of a twin
    assert not held & {pair.author for pair in train}
    assert (len(train), len(validation)) == ((10 - n) * (9 - n), n * (n - 1))  # no couple is cut
    assert hold_out(some, 0, 0.3) == (train, validation)
    assert {pair.author for pair in hold_out(some, 1, 0.3)[1]} != held


def test_at_least_one_author_and_one_couple_of_twins():
    crossed = [pair for n in range(3) for pair in couple("a", "b", n) + couple("c", "d", n)]
    sides = hold_out(crossed, seed=0, share=0.1)  # one author alone has no couple
    authors = ["".join(sorted({pair.author for pair in side})) for side in sides]
    assert sorted(authors) == ["ab", "cd"]
    assert hold_out(couple("ann", "bea"), seed=0, share=0.2) == (couple("ann", "bea"), [])
