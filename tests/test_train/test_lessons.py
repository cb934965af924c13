"""Lessons are what the judge meets: the same prompts, the same forced ids, the reply's own text."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures import KINDS, make_base

from data.build import demo_pairs
from nanopersrm import InputError
from nanopersrm.judge import answer as answering
from nanopersrm.judge import verdict
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.sampler import Decoder, Reply
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import load
from nanopersrm.pairs import Pair
from nanopersrm.style.profile import StyleEvidence
from nanopersrm.train import lessons
from nanopersrm.train.facts import shown
from nanopersrm.train.lessons import LessonConfig, contrast_list, imitation, roster
from nanopersrm.train.packing import Bundle
from nanopersrm.train.replies import reply

CPU = torch.device("cpu")
ENDS = {
    "smollm": "<|im_end|>",
    "qwen2": "<|im_end|>",
    "llama-bpe": "<|eot_id|>",
    "gpt-2": "<|endoftext|>",
}
LONG = LessonConfig(longest=10_000)  # the tiny vocabularies need three times as many tokens
BOTH = replace(LONG, form="both")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Short ones first."""
    found = demo_pairs(seed=1, pairs=40, kinds=("cross_author", "restyle"))
    return sorted(found, key=lambda pair: len("".join((*pair.exemplars, pair.chosen))))


@pytest.fixture(scope="module", params=list(KINDS))
def judge(request, tmp_path_factory) -> Judge:
    base = make_base(tmp_path_factory.mktemp("lessons") / request.param, request.param, 16_384)
    return Judge(load(base, torch.float32, CPU), Tokenizer.load(base), trained=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(make_base(tmp_path_factory.mktemp("lessons") / "one", "smollm"))


def texts(bundle: Bundle) -> list[tuple[int, ...]]:
    """Each branch after its prefix."""
    return [bundle.prefix + branch.ids for branch in bundle.branches]


def replies(bundle: Bundle) -> list[tuple[int, ...]]:
    return [branch.ids[branch.reply_from :] for branch in bundle.branches]


def made(pair: Pair, form: str, seed: int = 0, evidence: bool = True) -> list[str]:
    """The replies to a pair, as data.replies words them."""
    pair = lessons.stripped(pair)
    return [
        reply(pair, form, role, random.Random(f"{seed}/{pair.id}/{form}/{role}"), evidence).text
        for role in ("chosen", "rejected")
    ]


# Imitation


@pytest.mark.parametrize("form", ["pointwise", "pairwise"])
def test_the_ids_say_the_reply_and_end_the_turn(judge, pairs, form):
    tokenizer = judge.tokenizer
    for pair in pairs[:2]:
        (bundle,) = imitation(pair, tokenizer, replace(LONG, form=form), seed=0)
        assert bundle.name == pair.id
        for ids, text in zip(replies(bundle), made(pair, form), strict=True):
            assert tokenizer.decode(ids[-1:], special=True) == ENDS[tokenizer_kind(judge)]
            assert tokenizer.special_ids.isdisjoint(ids[:-1])
            assert verdict.OPEN + tokenizer.decode(ids[:-1], special=True) == text
            scores = verdict.parse(text, "AB"[: 1 + (form == "pairwise")]).scores
            assert scores is not None
            assert (
                list(scores.values())
                == [tokenizer.digit_ids.index(i) + 1 for i in ids if i in tokenizer.digit_ids][
                    -len(scores) :
                ]
            )


def tokenizer_kind(judge: Judge) -> str:
    return next(kind for kind in KINDS if judge.tokenizer.name.endswith(kind))


def judged(judge: Judge, monkeypatch, pair: Pair, config: JudgeConfig, reply=None):
    """(prompts, what was fed to the rows after the reasoning), which may be `reply` for all."""
    fed, asked = [], []
    feed, answer = Decoder.feed, answering.answer

    def feeding(self, tokens):
        fed.append([list(new) for new in tokens])
        feed(self, tokens)

    def asking(model, tokenizer, prompts, *rest, **more):
        asked.extend(prompts)
        return answer(model, tokenizer, prompts, *rest, **more)

    def thinking(decoder, *_):
        fed.clear()  # the prompts
        return [reply for _ in decoder.names]

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "feed", feeding)
        patch.setattr("nanopersrm.judge.judge.answer", asking)
        if reply is not None:
            patch.setattr("nanopersrm.judge.answer._think", thinking)
        candidates = sorted({pair.chosen, pair.rejected})
        judge.judge(pair.exemplars, candidates, pair.question or None, config=config)
    return asked, fed


@pytest.mark.parametrize("form", ["pointwise", "pairwise"])
@pytest.mark.parametrize("evidence", [True, False])
def test_prompts_are_the_judges_own(judge, pairs, form, evidence, monkeypatch):
    for pair in pairs[:1]:
        config = JudgeConfig(mode=form, evidence=evidence, think=False)
        asked, _ = judged(judge, monkeypatch, pair, config)
        asked_of = replace(LONG, form=form, evidence=evidence)
        (bundle,) = imitation(pair, judge.tokenizer, asked_of, seed=0)
        found = [(*bundle.prefix, *branch.ids[: branch.reply_from]) for branch in bundle.branches]
        assert sorted(found) == sorted(map(tuple, asked))
        assert len({branch.ids[0] for branch in bundle.branches}) == 2  # the prefix is the longest


@pytest.mark.parametrize("form", ["pointwise", "pairwise"])
@pytest.mark.parametrize("ended", ["budget", "observed", "stop"])
def test_forced_ids_are_those_of_the_judge(judge, pairs, form, ended, monkeypatch):
    """The same thought, cut by the budget or closed by the model: the judge feeds the lesson."""
    tokenizer, pair = judge.tokenizer, pairs[0]
    (bundle,) = imitation(pair, tokenizer, replace(LONG, form=form), seed=0)
    for told, text in zip(replies(bundle), made(pair, form), strict=True):
        labels = "AB"[: 1 + (form == "pairwise")]
        said = verdict.parse(text, labels)
        assert said.scores is not None
        drawn = tokenizer.encode(said.reasoning)
        if ended == "observed":  # the model goes on by itself until "</think>" is there
            while verdict.CLOSE not in tokenizer.decode(drawn):
                drawn = list(told[: len(drawn) + 1])

        stop = [min(tokenizer.eos_ids)] * (ended == "stop")
        drawn_reply = Reply(drawn + stop, ended=ended)
        prompts, fed = judged(judge, monkeypatch, pair, JudgeConfig(mode=form), drawn_reply)
        forced, *rest = fed
        digits = [tokenizer.digit_ids[digit - 1] for digit in said.scores.values()]
        assert forced == forced[:1] * len(prompts)
        expected = [*drawn, *forced[0], digits[0]]
        if form == "pairwise":
            after = next(new for new in rest[0] if new[0] == digits[0])
            expected += [*after[1:], digits[1]]
        assert told[: len(expected)] == tuple(expected)
        assert len(told) == len(expected) + len(tokenizer.encode(verdict.SCORES_END)) + 1


def test_a_reply_is_spelt_in_the_pieces_of_the_judge():
    """Some vocabularies join the "." of a thought with the line break after it."""

    class Joining:
        digit_ids = tuple(range(1001, 1010))

        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text.replace(".\n", "\x00")]

    joining: Any = Joining()
    ids = lessons.spell("Terse.", {"A": 7, "B": 3}, joining)
    said = "".join(str(i - 1000) if i > 1000 else chr(i) for i in ids)
    assert said == "Terse.\n</think>\n<scores>A=7 B=3</scores>"


def test_both_forms_and_both_orders(tokenizer, pairs):
    pair = replace(pairs[0], weight=2.5)
    single, double = imitation(pair, tokenizer, BOTH, seed=0)
    one_form = (replace(LONG, form="pointwise"), replace(LONG, form="pairwise"))
    for bundle, config in zip((single, double), one_form, strict=True):
        assert bundle == imitation(pair, tokenizer, config, seed=0)[0]
        assert [branch.weight for branch in bundle.branches] == [2.5, 2.5]
        assert bundle.chosen == -1
    for ids, role, sign in zip(texts(double), ("chosen", "rejected"), (1, -1), strict=True):
        said = tokenizer.decode(ids)
        one, two = shown(lessons.stripped(pair), "pairwise", role).values()
        assert said.index(f"<candidate A>\n{one}") < said.index(f"<candidate B>\n{two}")
        a, b = (int(said[said.rindex(f"{label}=") + 2]) for label in "AB")
        assert sign * (a - b) > 0


def test_another_seed_words_replies_otherwise(tokenizer, pairs):
    again = [imitation(pairs[0], tokenizer, LONG, seed) for seed in (0, 0, 1)]
    assert again[0] == again[1]
    assert again[0][0].prefix == again[2][0].prefix
    assert all(a != b for a, b in zip(replies(again[0][0]), replies(again[2][0]), strict=True))


def test_without_evidence_nothing_is_measured(tokenizer, pairs):
    (bundle,) = imitation(pairs[0], tokenizer, replace(LONG, evidence=False), 0, near=None)
    for ids in texts(bundle):
        assert "<measured>" not in tokenizer.decode(ids)
    told = [verdict.OPEN + tokenizer.decode(ids) for ids in replies(bundle)]
    assert told == made(pairs[0], "pointwise", evidence=False)


def test_long_pairs_are_left_out(tokenizer, pairs):
    (bundle,) = imitation(pairs[0], tokenizer, LONG, seed=0)
    longest = max(map(len, texts(bundle)))
    for limit, left in ((longest, [bundle]), (longest - 1, [])):
        assert imitation(pairs[0], tokenizer, LessonConfig(longest=limit), seed=0) == left
    single, _ = imitation(pairs[0], tokenizer, BOTH, seed=0)
    assert imitation(pairs[0], tokenizer, replace(BOTH, longest=longest), seed=0) == [single]


@pytest.mark.parametrize("wrong", [{"form": "list"}, {"rivals": 0}, {"longest": 0}])
def test_odd_settings_are_refused(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}: expected"):
        LessonConfig(**wrong)


def test_style_percentiles_stand_at_their_candidates(tokenizer, pairs):
    pair, asked = lessons.stripped(pairs[0]), []

    def style(exemplars, candidates):
        asked.append((exemplars, list(candidates)))
        return [
            StyleEvidence(91.0) if text == pair.chosen else StyleEvidence(7.0)
            for text in candidates
        ]

    spaced = tuple(f"{text} " for text in pair.exemplars)
    loose = replace(pair, chosen=f"\n {pair.chosen}", exemplars=spaced)
    single, double = imitation(loose, tokenizer, BOTH, 0, style)
    assert asked == [(pair.exemplars, [pair.chosen, pair.rejected])]
    said = [tokenizer.decode(ids) for ids in texts(single) + texts(double)]
    found = [[int(part.split("%")[0]) for part in text.split(", style ")[1:]] for text in said]
    assert found == [[91], [7], [91, 7], [7, 91]]
    listed = contrast_list(pair, roster(pairs), tokenizer, LONG, random.Random(0), style)
    assert len(asked) == 2
    assert listed is not None
    for i, ids in enumerate(texts(listed)):
        assert f", style {91 if i == listed.chosen else 7}%" in tokenizer.decode(ids)


def test_a_template_that_ends_no_reply_is_an_error(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "eos_ids", frozenset({5000}))
    with pytest.raises(InputError, match=r"ends a reply with one of the tokens \[5000\]"):
        lessons.turn_end(tokenizer)


@pytest.mark.parametrize("form", ["pointwise", "pairwise"])
def test_what_comes_after_the_thought_counts_more(judge, pairs, form):
    """From the piece with </think> on, the end of the turn included, and nothing before it."""
    config = replace(LONG, form=form, stress=5.0)
    tokenizer = judge.tokenizer
    for bundle in imitation(pairs[0], tokenizer, config, seed=0):
        for branch in bundle.branches:
            weights = branch.weights
            assert set(weights) == {1.0, 5.0}
            heavy = weights.index(5.0)
            assert weights == [1.0] * heavy + [5.0] * (len(weights) - heavy)
            told = branch.ids[branch.reply_from :]
            assert verdict.CLOSE in tokenizer.decode(list(told[heavy:]))
            assert verdict.CLOSE not in tokenizer.decode(list(told[:heavy]))
            assert len(told) - heavy == branch.tail
    flat = imitation(pairs[0], tokenizer, replace(config, stress=1.0), seed=0)
    assert all(set(branch.weights) == {1.0} for bundle in flat for branch in bundle.branches)
