"""The exam of a trained adapter, by its command: a line of figures, and the replies in a file."""

from dataclasses import replace

import pytest
import torch
import tyro
from fixtures import make_adapter, make_base
from test_train_sft import short_pairs

from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import load
from nanopersrm.pairs import write
from nanopersrm.train import course, exam, trial
from nanopersrm.train.presets import PRESETS

REAL = exam.LessonConfig


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("exam")
    base = make_base(folder / "smollm", "smollm", 16_384)
    adapter = make_adapter(folder / "adapter", base)
    write(folder / "pairs.jsonl", short_pairs())
    return [
        *("--pairs", str(folder / "pairs.jsonl"), "--adapter", str(adapter)),
        *("--base", str(base.path), "--limit", "4", "--replies", "2"),
    ]


def call(*arguments: str) -> int:
    return exam.run(tyro.cli(exam.Config, args=list(arguments)))


def test_a_line_and_the_replies(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exam, "LessonConfig", lambda **k: REAL(longest=16_384, **k))
    monkeypatch.setattr("nanopersrm.train.trial.REPLY_TOKENS", 8)
    assert call(*asked, "--out", str(tmp_path / "replies.txt")) == 0
    said = capsys.readouterr().out
    assert "of 4 validation pairs" in said
    assert "of 2 replies well formed" in said
    page = (tmp_path / "replies.txt").read_text()
    assert page.count("<think>") >= 2
    assert page.count("=" * 80) == 1


def test_replies_without_chance(asked, tmp_path, capsys, monkeypatch):
    """At temperature 0 the seed does not matter to the replies, at 1 it does."""
    monkeypatch.setattr(exam, "LessonConfig", lambda **k: REAL(longest=16_384, **k))
    monkeypatch.setattr("nanopersrm.train.trial.REPLY_TOKENS", 8)
    monkeypatch.setattr(exam.random.Random, "shuffle", lambda self, x: None)  # the same pairs
    pages = {}
    for temperature in ("0", "1"):
        for seed in ("0", "1"):
            out = tmp_path / "replies.txt"
            flags = ("--temperature", temperature, "--seed", seed, "--out", str(out))
            assert call(*asked, *flags) == 0
            pages[temperature, seed] = out.read_text()
    assert pages["0", "0"] == pages["0", "1"]
    assert pages["1", "0"] != pages["1", "1"]
    assert call(*asked, "--temperature", "-1") == 2
    assert "--temperature: expected a number from 0, got -1" in capsys.readouterr().err


def test_a_wrong_folder_is_one_line(asked, tmp_path, capsys):
    assert call(*asked, "--adapter", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("data.exam: error: --adapter ")


# Pairs that are judged after reasoning


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("reasoned") / "smollm", "smollm", 16_384)
    return load(base, torch.float32, torch.device("cpu")), Tokenizer.load(base)


LONG = REAL(longest=16_384, evidence=False)


@pytest.mark.parametrize(("form", "labels"), [("pointwise", 1), ("pairwise", 2)])
def test_the_first_pairs_are_reasoned_about(known, form, labels, monkeypatch):
    model, tokenizer = known
    pairs = short_pairs()[:4]
    seen = []

    def reasoned(model, tokenizer, asked, count, tokens, how):
        assert how == PRESETS["tiny"]
        seen.append((dict(asked), count, tokens))
        return dict(zip(asked, (True, False, True), strict=True))

    monkeypatch.setattr(trial, "reason", reasoned)
    config = replace(LONG, form=form)
    held = exam.Exam(pairs, tokenizer, config, 0, None, replies=0, reasoned=3)
    found, page = held.hold(model, PRESETS["tiny"])
    ((asked, count, tokens),) = seen
    assert (count, tokens) == (labels, exam.REASONING)
    assert list(asked) == [pair.id for pair in pairs[:3]]
    for pair in pairs[:3]:
        shown = [tokenizer.decode(prompt) for prompt in asked[pair.id]]
        for text, role in zip(shown, ("chosen", "rejected"), strict=True):
            assert getattr(pair, role) in text
            assert text.endswith("<think>\n")
        if form == "pointwise":
            expected = [
                course.prompt(pair, role, tokenizer, config, None)
                for role in ("chosen", "rejected")
            ]
            assert list(asked[pair.id]) == expected
    assert found.reasoned == pytest.approx(2 / 3)
    assert (found.reasoned_twins, found.reasoned_pairs) == (0.0, 3)  # of one couple one was right
    assert (found.pairs, found.replies, page) == (4, 0, "\n")


def test_who_asks_for_no_reasoning_gets_none(known, monkeypatch):
    model, tokenizer = known
    monkeypatch.setattr(trial, "reason", None)  # would fail
    held = exam.Exam(short_pairs()[:2], tokenizer, LONG, 0, None, replies=0)
    found, _ = held.hold(model, PRESETS["tiny"])
    assert (found.reasoned, found.reasoned_twins, found.reasoned_pairs) == (None, None, 0)
    assert "reasoning" not in found.said()


def test_a_pair_too_long_is_not_reasoned_about(known):
    _, tokenizer = known
    pairs = short_pairs()[:2]
    pairs[0] = replace(pairs[0], chosen=pairs[0].chosen + " and on" * 400)
    held = exam.Exam(pairs, tokenizer, replace(LONG, longest=1200), 0, None, 0, reasoned=2)
    assert list(held.asked) == [pairs[1].id]


def test_reasoning_on_the_command_line(asked, capsys, monkeypatch):
    monkeypatch.setattr(exam, "LessonConfig", lambda **k: REAL(longest=16_384, **k))
    monkeypatch.setattr(exam, "REASONING", 5)
    monkeypatch.setattr("nanopersrm.train.trial.REPLY_TOKENS", 4)
    assert call(*asked, "--reasoned", "2") == 0
    assert "% of 2" in capsys.readouterr().out.split("after reasoning")[1]


def test_what_replies_say_is_held_against_their_own_texts(tmp_path, monkeypatch):
    """Of the first pair the chosen text is asked about, of the second the rejected one."""
    tokenizer = Tokenizer.load(make_base(tmp_path / "smollm", "smollm", 16_384))
    first, second, *_ = short_pairs()
    held = exam.Exam([first, second], tokenizer, REAL(longest=16_384), 0, None, replies=2)
    words = [" ".join(text.split()[:3]) for text in (first.chosen, second.rejected)]
    assert not any('"' in some for some in words)
    replies = [
        f'<think>\nA says "{words[0]}", never "{words[0]} at all". A has no emoji and smileys.',
        f'<think>\nA says "{words[1]}". A has many emoji and smileys.',
    ]
    blank = trial.Trial(0.5, None, 1.0, 2, 0.0, 2)
    monkeypatch.setattr(trial, "hold", lambda *_: (blank, replies))
    found, _ = held.hold(None, PRESETS["tiny"])  # type: ignore[arg-type]
    assert found.quotes == 2 / 3
    assert found.claims == 1 / 2
    assert "67% of quotes verbatim, 50% of claims true, " in found.said()
    assert found.numbers()["validation_claims"] == 0.5
    monkeypatch.setattr(trial, "hold", lambda *_: (blank, ["Nothing.", "Nothing."]))
    found, _ = held.hold(None, PRESETS["tiny"])  # type: ignore[arg-type]
    assert (found.quotes, found.claims) == (None, None)
    assert "verbatim" not in found.said()
