"""Replies to imitate: true, well formed, on the side of the label, and never twice alike."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from nanopersrm.judge.faithful import check as faithful
from nanopersrm.train.facts import (
    asked,
    digits,
    digits_together,
    evidence_of,
    facts,
    fit,
    shown,
    words,
)
from nanopersrm.train.lessons import stripped
from nanopersrm.train.phrases import (
    BOTH,
    BREAKS,
    KEEPS,
    NAMED,
    NEAR,
    SIDE_BREAKS,
    SIDE_KEEPS,
    TWO,
    WRITER,
)
from nanopersrm.train.quoting import LEAST, MOST, show

from data.build import demo_pairs
from nanopersrm import pairs
from nanopersrm.judge import verdict
from nanopersrm.judge.claims import PHRASE
from nanopersrm.style.features import COUNTED, FACTORS, measure
from nanopersrm.style.profile import BY_NAME, measured_block
from nanopersrm.train import replies, telling
from nanopersrm.train.replies import Config, Imitation, check, reply, size

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def some() -> list[pairs.Pair]:
    return demo_pairs(seed=3, pairs=160)


@pytest.fixture(scope="module")
def made(some) -> list[tuple[pairs.Pair, str, Imitation]]:
    """600 replies of both forms."""
    found = [
        (pair, form, reply(pair, form, role, rng))
        for pair in some
        for form, role, rng in asked(pair, "both", 1)
    ]
    assert len(found) >= 600
    return found[:600]


def test_every_reply_is_true_and_well_formed(made):
    assert [check(imitation, pair) for pair, _, imitation in made] == [[] for _ in made]


def test_the_checker_reads_what_was_claimed_and_quoted(made):
    """The totals are of the text alone; the generator's own lists are in them."""
    quotes = claims = 0
    for pair, _, imitation in made:
        texts = dict(
            zip(imitation.labels, (getattr(pair, r) for r in imitation.candidates), strict=True)
        )
        report = faithful(imitation.text, pair.exemplars, texts)
        assert sorted(q.text for q in report.found_quotes) == sorted(imitation.quotes)
        assert report.claims >= len(imitation.claims) >= 2, imitation.text
        assert all(LEAST <= len(quote.split()) <= MOST for quote in imitation.quotes)
        assert "\x00" not in imitation.text
        assert "{" not in imitation.text.replace(str(imitation.quotes), "")
        quotes += report.quotes
        claims += report.claims
    assert quotes > 1.5 * len(made)
    assert claims > 4 * len(made)


def test_no_template_is_seen_often(made):
    def masked(text: str) -> str:
        text = re.sub(r'"[^"]*"', "Q", text)
        return re.sub(r"\d+(?:\.\d+)?", "N", PHRASE.sub("F", text))

    bodies = Counter(masked(imitation.text) for _, _, imitation in made)
    assert bodies.most_common(1)[0][1] <= 0.02 * len(made)
    openings = Counter(" ".join(body.split()[1:6]) for body in bodies.elements())
    assert openings.most_common(1)[0][1] <= 0.04 * len(made)


def test_replies_have_the_length_that_was_asked_for(made):
    assert all(replies.TOKENS[0] <= size(m.text) <= replies.TOKENS[1] for _, _, m in made)


@pytest.mark.base
def test_size_is_about_the_tokens_of_the_base(made, tokenizer):
    for _, _, imitation in made:
        assert 60 <= len(tokenizer.encode(imitation.text)) <= 180, imitation.text


@pytest.fixture(scope="module")
def tokenizer():
    from nanopersrm.model.base import DEFAULT_BASE, resolve
    from nanopersrm.model.tokenizer import Tokenizer

    return Tokenizer.load(resolve(DEFAULT_BASE))


def test_digits_follow_the_label_in_both_forms(made):
    pointwise: dict[str, dict[str, int]] = {}
    orders = Counter[tuple[str, ...]]()
    for pair, form, imitation in made:
        scores = verdict.parse(imitation.text, imitation.labels).scores
        assert scores is not None
        of = dict(zip(imitation.candidates, scores.values(), strict=True))
        if form == "pointwise":
            pointwise.setdefault(pair.id, {}).update(of)
        else:
            assert of["chosen"] > of["rejected"]
            orders[imitation.candidates] += 1
    assert all(of["chosen"] > of["rejected"] for of in pointwise.values() if len(of) == 2)
    assert min(orders.values()) > 0.3 * orders.total()  # the order is drawn


def test_the_margin_follows_the_evidence():
    grid = [x / 10 for x in range(-10, 11)]
    for together, least in ((digits, 1), (digits_together, 1)):
        for chosen in grid:
            for rejected in grid:
                high, low = together(chosen, rejected)
                assert 1 <= low <= high - least <= 8
                more, same = together(chosen + 0.1, rejected)
                assert more - same >= high - low
                same, less = together(chosen, rejected - 0.1)
                assert same - less >= high - low
    assert digits(-1, 1) == (5, 4)
    assert digits(1, -1) == (9, 1)


def test_evidence_is_for_the_writer_where_both_are_odd_alike():
    assert evidence_of(0.25, 2, 2) == pytest.approx(0.832, abs=1e-3)
    assert evidence_of(0.25, 2, -1) == pytest.approx(-0.668, abs=1e-3)
    assert evidence_of(0.0, 2, -1) == 0


def test_fits_tell_the_writers_of_the_demo_apart(some):
    better = [fit(p.exemplars, p.chosen) > fit(p.exemplars, p.rejected) for p in some]
    assert sum(better) > 0.9 * len(better)


def test_a_pair_with_wrong_label_is_told_with_care(some):
    """The counts speak for the rejected text: the digits are close and the reply says so."""
    pair = max(some, key=lambda p: fit(p.exemplars, p.chosen) - fit(p.exemplars, p.rejected))
    swapped = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    for form, role, rng in asked(swapped, "both", 0):
        imitation = reply(swapped, form, role, rng)
        assert check(imitation, swapped) == []
        scores = verdict.parse(imitation.text, imitation.labels).scores
        assert scores is not None
        assert all(4 <= digit <= 6 for digit in scores.values())
        assert re.search(r"counts|measure", imitation.text)
        roles = dict(zip(imitation.labels, imitation.candidates, strict=True))
        against = [
            fact
            for fact in facts(swapped.exemplars, shown(swapped, form, role))
            if replies._for_label(fact, roles) < 0
        ]
        assert {fact.factor for fact in against} & {claim[1] for claim in imitation.claims}


def test_without_evidence_no_number_is_told(some):
    for pair in some[:40]:
        for form, role, rng in asked(pair, "both", 0):
            imitation = reply(pair, form, role, rng, evidence=False)
            said = re.sub(r'"[^"]*"', "", verdict.parse(imitation.text, imitation.labels).reasoning)
            assert not re.search(r"\d|%", said), said
            assert check(imitation, pair) == []


def test_check_finds_what_was_changed(made):
    pair, _, imitation = next(m for m in made if m[2].quotes and "many " in m[2].text)
    for before, after in (
        ("many ", "no "),
        (imitation.quotes[0], "never written"),
        ("<scores>", ""),
    ):
        assert check(replace(imitation, text=imitation.text.replace(before, after)), pair)
    pair, _, imitation = next(m for m in made if m[1] == "pairwise")
    a, b = re.findall(r"=(\d)", imitation.text)
    text = imitation.text.replace(f"A={a} B={b}", f"A={b} B={a}")
    assert check(replace(imitation, text=text), pair) == ["the verdict is not the pair's"]


@pytest.mark.parametrize("name", [factor.name for factor in FACTORS])
def test_a_quote_shows_its_habit(name: str):
    factor = next(factor for factor in FACTORS if factor.name == name)
    rng = random.Random(name)
    files = sorted((ROOT / "data" / "demo").glob("*/1.txt"))
    found = 0
    for text in (file.read_text(encoding="utf-8") for file in files):
        quote = show(name, text, rng)
        if quote is None:
            continue
        found += 1
        assert quote in text
        assert LEAST <= len(quote.split()) <= MOST
        assert not set('"<>\n') & set(quote)
        if factor.words == COUNTED and name != "list_lines":
            assert measure([quote])[name], quote
    assert found or name in {
        "quotes", "paragraphs", "list_lines", "variety", "sentence_spread", "opening_variety",
        "sentence_length",
    }  # fmt: skip


def test_awkward_texts_are_never_quoted_wrongly():
    rng = random.Random(0)
    text = 'He said "no; never" <b>twice; more</b>; and\nthen; left.\n\n- milk; bread\n- "tea"\n'
    for factor in FACTORS:
        for high in (True, False):
            quote = show(factor.name, text, rng, high)
            assert quote is None or (quote in text and not set('"<>\n') & set(quote))


def test_no_part_claims_anything_by_itself():
    parts = [*WRITER, *KEEPS, *BREAKS, *NEAR, *SIDE_KEEPS, *SIDE_BREAKS, *TWO, *BOTH]
    assert not [part for part in parts if PHRASE.search(part)]
    for factor in FACTORS:
        assert not PHRASE.search("on " + NAMED.get(factor.name, factor.label))


@pytest.mark.parametrize("kind", ["minor_replacement", "restyle"])
def test_texts_that_are_nearly_alike_are_told_truly_too(kind: str):
    for pair in demo_pairs(seed=2, pairs=20, kinds=(kind,))[:16]:
        for form, role, rng in asked(pair, "both", 0):
            assert check(reply(pair, form, role, rng), pair) == []


def test_labels_stay_capital():
    assert telling._small("A, however, has no dashes") == "A, however, has no dashes"
    assert telling._small("The writer") == "the writer"


def test_words_leave_the_number_out():
    trait = facts(("I came; I saw. " * 20,), {"A": "We left. " * 30})[0].writer
    assert words(trait, True) == trait.phrase
    assert words(trait, False) == trait.phrase.split(" (")[0].split(", about")[0]


@pytest.fixture
def file(some, tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    pairs.write(path, some[:6])
    return path


def test_the_command_gives_the_same_bytes(file, tmp_path, capsys):
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for out in outs:
        assert replies.run(Config(file, out, "both", seed=5)) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert replies.run(Config(file, outs[1], "both", seed=6)) == 0
    assert outs[0].read_bytes() != outs[1].read_bytes()
    lines = [json.loads(line) for line in outs[0].read_text(encoding="utf-8").splitlines()]
    assert Counter(line["form"] for line in lines) == {"pointwise": 12, "pairwise": 6}
    assert {line["source"] for line in lines} == {"measured"}
    assert all(verdict.parse(line["reply"], line["labels"]).well_formed for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "pairs.jsonl"]
    assert "18 replies about 6 pairs" in capsys.readouterr().out


def test_errors_of_use(tmp_path, file, capsys):
    assert replies.run(Config(tmp_path / "none.jsonl", tmp_path / "out.jsonl")) == 2
    assert replies.run(Config(file, tmp_path / "no" / "out.jsonl")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "nanopersrm.train.replies",
        "nanopersrm.train.replies",
    ]


def test_replies_need_no_torch():
    program = "import sys, data.replies; assert 'torch' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr


def test_with_evidence_the_habits_are_those_that_the_prompt_shows():
    """Who is to say true things must be able to know them; without evidence any habit may come."""
    outside = 0
    for pair in demo_pairs(seed=4, pairs=40):
        pair = stripped(pair)
        for evidence in (True, False):
            told = reply(pair, "pointwise", "chosen", random.Random(pair.id), evidence)
            block = measured_block(pair.exemplars, [pair.chosen])
            labels = {BY_NAME[factor].label for _, factor, _ in told.claims}
            missing = {label for label in labels if f"{label}: writer" not in block}
            assert not (evidence and missing)
            outside += len(missing)
    assert outside > 20
