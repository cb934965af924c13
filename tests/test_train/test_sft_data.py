"""SFT data: ledgers as a teacher chooses them, made-up sums under them, by seed and number of the
step, and digits that compare as the odds of the evidence."""

import math
import random
import re
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
from fixtures import KINDS, TRAIN, WEIGHED, fresh, instrument, make_base

from data.build import demo_pairs
from nanopersrm import InputError
from nanopersrm.judge import judge as judging
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.reply import Prompt, choice_ids, line_text, sum_text
from nanopersrm.judge.tell import sentences
from nanopersrm.judge.verdict import beats, soft_score
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.pairs import Pair
from nanopersrm.style.evidence import FOLDS, NGRAMS, READING, fold_of
from nanopersrm.style.ledger import Measurer
from nanopersrm.train import sft_data
from nanopersrm.train.packing import Text
from nanopersrm.train.sft_data import ExamplesConfig, SftData, digit_chances, pair_tree, prompts_of

LONG = ExamplesConfig(longest=10_000, synthetic=3)  # the tiny vocabularies need many more tokens
READS = Measurer(WEIGHED, instrument(lambda word: len(word) / 20 - 0.2))
LINE = re.compile(r"(\S) \S.*: ([+-]\d+\.\d)\n")
SUM_LINE = re.compile(r"\. sum ([+-]\d+\.\d)\n</think>\n<scores>A=")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Short ones first, without white space around their texts."""
    some = demo_pairs(seed=1, pairs=24, kinds=("cross_author", "restyle"))
    train = [sft_data.stripped(pair) for pair in some if pair.split == "train"]
    return sorted(train, key=lambda pair: len("".join((*pair.exemplars, pair.chosen))))


@pytest.fixture(scope="module")
def tokenizer(base) -> Tokenizer:
    return Tokenizer.load(base)


def data_of(
    pairs: list[Pair], tokenizer: Tokenizer, seed: int = 0, config: ExamplesConfig = LONG
) -> SftData:
    data = SftData(pairs, tokenizer, config, seed)
    data.measurer = Measurer(WEIGHED)
    return data


def couple(one: str, two: str, n: int = 0) -> list[Pair]:
    """A pair of two writers, and its twin."""
    ids = [f"{one}-{two}-{n}{side}" for side in "ab"]
    return [
        replace(TRAIN[0], author=author, id=ids[i], twin=ids[1 - i], split="train")
        for i, author in enumerate((one, two))
    ]


def replies_to(
    pair: Pair, tokenizer: Tokenizer, config: ExamplesConfig, seed: str, measurer: Measurer = READS
) -> list[tuple[Text, Prompt]]:
    """The teacher's replies to a pair, and the prompts they answer."""
    prompts = prompts_of(pair, tokenizer, measurer, None, config.free)
    tree = pair_tree(pair, prompts, tokenizer, config, seed)
    assert tree is not None
    assert (tree.name, tree.chosen) == (pair.id, 0)
    assert len(tree.texts) == 2 + 2 * config.synthetic * (not config.free)
    return list(zip([text for text in tree.texts if text.listed], prompts, strict=True))


# Chances


def test_digits_compare_as_the_evidence():
    for low, gap in product(range(-40, 31), range(11)):
        high, odds = digit_chances((low + gap) / 2), 1 / (1 + 10 ** (-gap / 20))
        if low + gap <= 30:
            assert beats(high, digit_chances(low / 2)) == pytest.approx(odds, abs=0.035)
    assert beats(digit_chances(10), digit_chances(-10)) == pytest.approx(0.987, abs=5e-4)


def test_digits_rise_with_the_sum():
    scores = [soft_score(digit_chances(half / 2)) for half in range(-72, 41)]
    assert all(low < high for low, high in pairwise(scores))
    assert [round(soft_score(digit_chances(x)), 1) for x in (10, -10)] == [7.8, 4.6]
    for total in (-1e6, -36.0, 0.3, 36.0, 1e6):
        assert min(digit_chances(total)) >= 0
        assert math.fsum(digit_chances(total)) == pytest.approx(1)


def test_what_a_teacher_takes():
    """A line of 1.0 and one of 0.2: the stop has 1 / (1 + e), they share the rest e^0.8 : 1."""
    stop, share = 1 / (1 + math.e), math.exp(0.8) / (1 + math.exp(0.8))
    chances = sft_data.teacher_chances([1.0, 0.2])
    assert chances == pytest.approx([(1 - stop) * share, (1 - stop) * (1 - share), stop])
    assert [round(p, 2) for p in chances] == [0.5, 0.23, 0.27]
    for sizes in ([0.0] * 5, [1e9] * 3, [0.1]):
        assert math.fsum(sft_data.teacher_chances(sizes)) == pytest.approx(1)
    assert sft_data.teacher_chances([1e9, 3.0]) == pytest.approx([1, 0, 0])


# Ledgers


def test_a_ledger_has_the_teachers_chances(tokenizer, pairs):
    """Each letter and the stop that is drawn are targets, what is filled in is none. The stop is
    given where no line is left, or no more are allowed; then there is nothing to learn."""
    ids, stopped, lengths = choice_ids(tokenizer), set[tuple[int, bool]](), set[int]()
    for number, most in product(range(8), (2, 9)):
        config = replace(LONG, think_lines=most, digit=3.0)
        for text, prompt in replies_to(pairs[number % 4], tokenizer, config, str(number)):
            (ledger,) = prompt.ledgers
            left, expected, ended, total = [*prompt.menu], [*prompt.ids], False, 0.0
            *choices, digit = text.targets
            for target in choices:
                assert (target.at, target.weight, ended) == (len(expected), 1, False)
                assert target.allowed == (*(ids.letters[f] for f in left), ids.stop)
                sizes = [abs(ledger.lines[f].decibans) for f in left]
                assert target.probs == pytest.approx(sft_data.teacher_chances(sizes))
                ended = target.id == ids.stop
                if not ended:
                    line = ledger.lines[left.pop(target.allowed.index(target.id))]
                    total = round(total + line.decibans, 1)
                    expected += [target.id, *tokenizer.encode(line_text([line]))]
            lines = len(prompt.menu) - len(left)
            assert ended == (lines < min(most, len(prompt.menu)))
            assert [*text.ids] == [*expected, ids.stop, *tokenizer.encode(sum_text([total]))]
            assert (digit.at, digit.weight) == (len(text.ids), 3)
            assert digit.allowed == tokenizer.digit_ids
            assert digit.probs == pytest.approx(digit_chances(total))
            stopped.add((most, ended))
            lengths.add(lines)
    assert stopped >= {(2, False), (9, False), (9, True)}
    assert len(lengths) >= 3


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_judge_meets_what_was_imitated(kind, pairs, tmp_path, monkeypatch):
    """Its prompts and its replies, where a teacher always takes the largest line."""
    monkeypatch.setattr(sft_data, "SOFT", 1e-6)
    monkeypatch.setattr(sft_data, "STOP", -100.0)
    judge, seen = fresh(make_base(tmp_path / kind, kind, 16_384)), list[list[int]]()
    draw = judging.draw

    def watched(model: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        drawn = draw(model, tokenizer, prompts, *rest)
        seen.extend([*p.ids, *r.ids[:-1]] for p, (r,) in zip(prompts, drawn, strict=True))
        return drawn

    monkeypatch.setattr(judging, "draw", watched)
    pair, config = (
        replace(pairs[0], question="Why so?"),
        JudgeConfig(think_lines=2, choose="largest"),
    )
    judge.judge(pair.exemplars, [pair.chosen, pair.rejected], pair.question, config=config)
    two = replace(LONG, think_lines=2)
    replies = replies_to(pair, judge.tokenizer, two, "0", Measurer(WEIGHED))
    assert sorted([*text.ids] for text, _ in replies) == sorted(seen)


def test_free_prose_is_written_token_by_token(tokenizer, pairs):
    totals = set[str]()
    for number in range(6):
        config = replace(LONG, free=True)
        for text, prompt in replies_to(pairs[number % 3], tokenizer, config, str(number)):
            assert "quote telling words" in tokenizer.decode(prompt.ids)
            *tokens, digit = text.targets
            assert {(t.allowed, t.probs, t.weight) for t in tokens} == {((), (), 1.0)}
            assert (*prompt.ids, *(t.id for t in tokens)) == text.ids
            assert [t.at for t in tokens] == [*range(len(prompt.ids), len(text.ids))]
            told, (ledger,) = tokenizer.decode([t.id for t in tokens]), prompt.ledgers
            assert told.endswith(".\n</think>\n<scores>A=")
            features = [f for f, line in ledger.lines.items() if sentences([line]) in told]
            (total,) = re.findall(r"Together ([+-]\d+\.\d) decibans", told)
            assert float(total) == ledger.total(features)
            assert (digit.at, digit.allowed) == (len(text.ids), tokenizer.digit_ids)
            assert digit.probs == pytest.approx(digit_chances(float(total)))
            totals.add(total)
    assert len(totals) > 4


def test_evidence_of_a_writer_is_of_the_fold_without_them(tokenizer, pairs):
    """Of each fold n-grams count something else, and nothing else counts."""
    weights = [{NGRAMS: 10.0 * k} for k in range(1, FOLDS + 1)]
    folds = tuple(replace(WEIGHED, weights=w, means={NGRAMS: 0.9}) for w in weights)
    measurer = Measurer(replace(WEIGHED, folds=folds))
    assert len({fold_of(pair.author) for pair in pairs}) > 1
    for pair in {pair.author: pair for pair in pairs}.values():
        data = data_of([pair], tokenizer, config=replace(LONG, synthetic=0))
        data.measurer = measurer
        (tree,) = data.trees(0, 1)
        for text, candidate in zip(tree.texts, (pair.chosen, pair.rejected), strict=True):
            decibans = folds[fold_of(pair.author)].total(pair.exemplars, candidate)
            assert decibans < -2  # so that a teacher takes the line
            shown = reply_of(tokenizer, text)
            assert [(f, float(x)) for f, x in LINE.findall(shown)] == [("n", decibans)]
            assert [float(x) for x in SUM_LINE.findall(shown)] == [decibans]
        assert len(prompts_of(pair, tokenizer, measurer, None)[0].menu) > 1  # of nobody


def reply_of(tokenizer: Tokenizer, text: Text) -> str:
    return tokenizer.decode([*text.ids]).rpartition("<think>\n")[2]


# Made-up sums


def test_made_up_sums_hang_under_a_ledgers_first_lines(tokenizer, pairs):
    """All, some or none of them; only the digit after a sum is a target, and lines are shared."""
    prompts, kept, sums = prompts_of(pairs[0], tokenizer, READS, None), set[int](), set[int]()
    tree = pair_tree(pairs[0], prompts, tokenizer, replace(LONG, synthetic=40), "0")
    assert tree is not None
    assert [text.listed for text in tree.texts] == [True, *[False] * 40] * 2
    ending = [*tokenizer.encode(f".{sum_text([-36.0])}"), 0, 0]
    assert tree.tokens <= 2 * len(tree.texts[0].ids) + 2 * 40 * len(ending)
    lines = LINE.findall(reply_of(tokenizer, tree.texts[0]))
    for text in tree.texts[1:41]:
        reply = reply_of(tokenizer, text)
        some, (shown,) = LINE.findall(reply), SUM_LINE.findall(reply)
        assert some == lines[: len(some)]
        assert LINE.sub("", reply) == f".{sum_text([float(shown)])}"
        (digit,) = text.targets
        assert (digit.at, digit.weight, digit.allowed) == (len(text.ids), 1, tokenizer.digit_ids)
        assert digit.probs == pytest.approx(digit_chances(float(shown)))
        kept.add(len(some))
        sums.add(round(float(shown)))
    assert kept == {*range(len(lines) + 1)} >= {0, 1, 2}
    assert len(sums) > 25


def test_made_up_sums_are_spread_evenly(monkeypatch):
    """Three in four within 36 decibans, each in a stretch of its own, and the others within 99."""
    for seed in range(5):
        sums = sft_data.made_up_sums(40, random.Random(seed))
        for some, most in ((sums[:30], 36), (sums[30:], 99)):
            stretches = [math.floor((x + most) / (2 * most) * len(some) + 1e-9) for x in some]
            off = [abs(a - b) for a, b in zip(stretches, range(len(some)), strict=True)]
            assert sum(off) <= 2  # rounded to a tenth
    assert sft_data.made_up_sums(0, random.Random(0)) == []
    monkeypatch.setattr(sft_data, "SWEEP", 0.04)
    assert {str(x) for x in sft_data.made_up_sums(3, random.Random(0))} == {"0.0"}


# Steps


def test_a_step_follows_from_seed_and_number(pairs, tokenizer):
    """In order, out of order, and by data that never saw the steps before."""
    data = data_of(pairs, tokenizer)
    in_order = [data.trees(step, 2) for step in range(3)]
    for step in (2, 0):
        assert data_of(pairs, tokenizer).trees(step, 2) == in_order[step] == data.trees(step, 2)
    other = data_of(pairs, tokenizer, seed=1)
    assert [other.trees(step, 2) for step in range(3)] != in_order


def test_every_pair_once_an_epoch_and_twins_side_by_side(pairs):
    shuffled = random.Random(5).sample(pairs, len(pairs))[:-7]  # some have lost their twins
    order = sft_data.epoch_order(shuffled, seed=0, epoch=0)
    assert sorted(pair.id for pair in order) == sorted(pair.id for pair in shuffled)
    assert order == sft_data.epoch_order(shuffled, 0, 0)
    assert order != sft_data.epoch_order(shuffled, 0, 1) != sft_data.epoch_order(shuffled, 1, 0)
    place = {pair.id: at for at, pair in enumerate(order)}
    together = [abs(place[p.twin] - place[p.id]) for p in shuffled if p.twin in place]
    assert set(together) == {1}


def test_steps_across_the_end_of_an_epoch_are_reworded(pairs, tokenizer):
    some = [replace(pair, twin="") for pair in pairs[:2]]
    trees = data_of(some, tokenizer).trees(0, 3)
    orders = [sft_data.epoch_order(some, 0, epoch) for epoch in (0, 1)]
    names = [pair.id for pair in (*orders[0], orders[1][0])]
    assert [tree.name for tree in trees] == names
    alone = data_of(some[:1], tokenizer)
    assert len({alone.trees(step, 1)[0].texts for step in range(3)}) >= 2


def test_pairs_that_are_too_long_are_left_out(pairs, tokenizer):
    texts = [text for text, _ in replies_to(pairs[0], tokenizer, LONG, "0")]
    prompts, most = prompts_of(pairs[0], tokenizer, READS, None), max(len(t.ids) for t in texts)
    for longest, fits in ((most, True), (most - 1, False)):
        config = replace(LONG, longest=longest)
        assert (pair_tree(pairs[0], prompts, tokenizer, config, "0") is not None) == fits
    data = data_of(pairs, tokenizer, config=ExamplesConfig(longest=9))
    assert (data.trees(0, 2), data.left_out) == ([], 2)
    for wrong, number in (("think_lines", 0), ("longest", 0), ("synthetic", -1), ("digit", -1)):
        flags: dict[str, Any] = {wrong: number}
        with pytest.raises(InputError, match="examples"):
            ExamplesConfig(**flags)


def test_features_are_weighed_on_writers_held_out(pairs, tokenizer):
    """Those read are the first held out, or of the training pairs where nobody is. Without a
    reading n-grams and habits alone are weighed."""
    train, held = pairs[:12], [replace(p, chosen=f" {p.chosen}\n") for p in pairs[12:20]]
    noted, asked, signals = list[str](), list[str](), list[int]()
    run: Any = SimpleNamespace(note=noted.append, check_signal=lambda: signals.append(1))

    def scores(exemplars: Any, texts: Any) -> list[float]:
        asked.append(texts[0])
        return [0.3 + len(asked) / 100, 0.1]  # always right

    reading: Any = SimpleNamespace(scores=scores)
    data = data_of(train, tokenizer)
    weighed = data.weigh_features(reading, 6, held, run)
    assert asked == [pair.chosen for pair in pairs[12:18]]
    assert (len(signals), len(weighed.folds)) == (6, FOLDS)
    assert weighed.weights[READING] > 0
    assert "on 18 pairs, 6 of them read" in noted[0]
    data.weigh_features(reading, 6, [], run)
    assert {*asked[6:]} <= {pair.chosen for pair in train}
    assert READING not in data.weigh_features(None, 6, held, run).weights
    assert len(asked) == 12


# Who is held out


def test_otherwise_authors_are_held_out():
    authors = [f"w{i}" for i in range(10)]
    some = [pair for a in authors for b in authors if a < b for pair in couple(a, b)]
    train, validation = sft_data.hold_out(some, seed=0, share=0.3)
    held = {pair.author for pair in validation}
    n = len(held)
    assert n in (3, 4)  # the first comes with the author of a twin
    assert not held & {pair.author for pair in train}
    assert (len(train), len(validation)) == ((10 - n) * (9 - n), n * (n - 1))  # no couple is cut
    assert sft_data.hold_out(some, 0, 0.3) == (train, validation)
    assert {pair.author for pair in sft_data.hold_out(some, 1, 0.3)[1]} != held


def test_at_least_one_author_and_one_couple_of_twins():
    crossed = [pair for n in range(3) for pair in couple("a", "b", n) + couple("c", "d", n)]
    sides = sft_data.hold_out(crossed, seed=0, share=0.1)  # one author alone has no couple
    authors = ["".join(sorted({pair.author for pair in side})) for side in sides]
    assert sorted(authors) == ["ab", "cd"]
    assert sft_data.hold_out(couple("ann", "bea"), seed=0, share=0.2) == (couple("ann", "bea"), [])
