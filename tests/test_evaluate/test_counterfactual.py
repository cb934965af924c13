"""Counterfactual: where a score comes from, and that only the number in the prompt changes."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from fixtures import FUSED, make_adapter, make_base

from data.build import demo_pairs
from nanopersrm import InputError
from nanopersrm.evaluate import counterfactual
from nanopersrm.evaluate.counterfactual import SAME, answers, said, scores
from nanopersrm.evaluate.evaluate import select
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.base import Base
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.pairs import Pair, write
from nanopersrm.style.similarity import Style


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return demo_pairs(seed=3, pairs=20)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("counterfactual") / "smollm", "smollm")


def fused_adapter(folder: Path, base: Base, /, **changed: object) -> Path:
    """An adapter whose prompts show a chance by all instruments."""
    facts = adapter_settings.read(make_adapter(folder, base))
    assert facts is not None
    replace(facts, **changed).save(folder)  # type: ignore[arg-type]
    style = Style.load(folder / "style", load(base, torch.float32, torch.device("cpu")))
    style.fusion = FUSED
    style.save(folder / "style", base.name)
    return folder


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    return fused_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(scope="module")
def judge(base, folder) -> Judge:
    return Judge.load(base.path, folder, dtype="fp32")


def test_the_table_of_the_docstring():
    found = answers([10, 50, 90], [[3, 5, 7], [4, 6, 8]])
    assert found.scores == [3.5, 5.5, 7.5]
    assert (found.prompts, found.follows) == (2, pytest.approx(1))
    shares = found.by_chance, found.by_rest, found.by_both
    assert shares == pytest.approx((16 / 17.5, 1.5 / 17.5, 0))


@pytest.mark.parametrize(
    ("table", "shares", "follows"),
    [
        ([[1, 5, 9], [1, 5, 9]], (1, 0, 0), 1),  # repeats the number
        ([[9, 5, 1], [9, 5, 1]], (1, 0, 0), -1),  # the wrong way round
        ([[2, 2, 2], [7, 7, 7]], (0, 1, 0), None),  # deaf to it
        ([[1, 5, 9], [9, 5, 1]], (0, 0, 1), None),  # the number means the opposite elsewhere
        ([[4, 4, 4], [4, 4, 4]], (None, None, None), None),
        ([[1, 9, 5]], (1, 0, 0), 0.5),  # the middle and the last are swapped
    ],
)
def test_where_a_score_comes_from(table, shares, follows):
    found = answers([10, 50, 90], table)
    told = (found.by_chance, found.by_rest, found.by_both)
    assert told == (pytest.approx(shares) if None not in shares else shares)
    assert found.follows == (None if follows is None else pytest.approx(follows))
    assert ("the score is the same in all" in said(found)) == (shares[0] is None)
    assert ("rank correlation" in said(found)) == (follows is not None)


def test_the_order_of_the_chances_is_theirs_and_equals_share_a_rank():
    assert answers([80, 20, 50], [[7, 3, 5]]).follows == pytest.approx(1)
    found = answers([1, 2, 3, 4], [[3, 5, 5, 8]])  # ranks 0 to 3 and 0, 1.5, 1.5, 3
    assert found.follows == pytest.approx(4.5 / (5 * 4.5) ** 0.5)


def test_what_hardly_varies_is_the_same_however_many_prompts_there_are():
    for times, varies in ((0.9, False), (1.1, True)):
        gap = 2 * math.sqrt(times * SAME)  # mean square times · SAME
        for prompts in (1, 50):
            found = answers([20, 80], [[3, 3 + gap]] * prompts)
            assert (found.by_chance is not None, found.follows is not None) == (varies, varies)
    assert answers([20, 80], [[3, 3.01]]).by_chance == pytest.approx(1)  # a hundredth is much


def test_what_a_terminal_shows():
    found = answers([10, 50, 90], [[3, 5, 7], [4, 6, 8.5]])
    assert said(found).splitlines() == [
        "chance   mean score",
        "",
        "  10 %    3.50   ##########",
        "  50 %    5.50   ##################",
        "  90 %    7.75   ###########################",
        "",
        "2 prompts x 3 chances: the score varies 89% by the chance, 10% by the rest of the prompt, "
        "0% by both together; rank correlation 1.00",
    ]


@pytest.fixture
def rude(pairs) -> Pair:
    """White space everywhere, a question, two exemplars."""
    exemplars = f"\n {pairs[0].exemplars[0]} ", f" {pairs[1].chosen}\n"
    return replace(pairs[0], exemplars=exemplars, question="Did it rain,  or not?\n")


def test_only_the_number_differs_from_what_the_judge_asks(judge, rude, monkeypatch):
    shown: list[str] = []
    chat = judge.tokenizer.chat

    def listening(turns, *rest, **named):
        shown.append(turns[1]["content"])
        return chat(turns, *rest, **named)

    monkeypatch.setattr(judge.tokenizer, "chat", listening)
    text = f" {rude.rejected}\n"
    found = scores(judge, rude, text, (7, 50, 99))
    assert found is not None
    assert len({round(score, 4) for score in found}) == 3
    assert [re.findall(r"(\d+)% likely", one) for one in shown] == [["7"], ["50"], ["99"]]
    ours = {re.sub(r"\d+% likely", "", one) for one in shown}
    shown.clear()
    near = judge.style_evidence([one.strip() for one in rude.exemplars], [text.strip()])[0]
    asked = JudgeConfig(think=False)
    judged = judge.judge(rude.exemplars, [text], rude.question, config=asked)
    assert len(ours) == 1
    assert ours <= {re.sub(r"\d+% likely", "", one) for one in shown}
    same = scores(judge, rude, text, (round(near.probability), 50))
    assert same is not None
    assert same[0] == pytest.approx(judged.scores[0], abs=1e-4)


def test_what_the_judge_would_cut_is_not_asked(judge, rude, monkeypatch):
    """At the last context in which the judge shows the exemplars whole."""
    config = judge.model.config
    asked = JudgeConfig(think=False)

    def cut(context: int) -> bool:
        monkeypatch.setattr(judge.model, "config", replace(config, context=context))
        notes = judge.judge(rude.exemplars, [rude.chosen], rude.question, config=asked).notes
        return any("was cut" in note for note in notes)

    low, high = 64, config.context
    assert not cut(high)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            low, high = (middle, high) if cut(middle) else (low, middle)
        except InputError:
            low = middle
    assert not cut(high)
    assert scores(judge, rude, rude.chosen, (20, 80)) is not None
    assert cut(high - 1)
    assert scores(judge, rude, rude.chosen, (20, 80)) is None


def asked(*arguments: object) -> int:
    given = [str(one) for one in arguments]
    return counterfactual.run(tyro.cli(counterfactual.Config, args=given))


@pytest.fixture
def file(tmp_path, pairs) -> Path:
    write(path := tmp_path / "pairs.jsonl", pairs)
    return path


def test_the_command(base, folder, judge, pairs, file, capsys):
    own = ("--base", base.path, "--adapter", folder, "--pairs", file, "--dtype", "fp32")
    short = (*own, "--limit", 4, "--chances", 5, 60, 95)
    found = {}
    for seed in (0, 1):
        assert asked(*short, "--seed", seed, "--json") == 0
        found[seed] = json.loads(capsys.readouterr().out)
        table = []
        for pair in select(pairs, 4, None, seed):
            rows = [scores(judge, pair, text, (5, 60, 95)) for text in (pair.chosen, pair.rejected)]
            table += [row for row in rows if row is not None]
        expected = vars(answers((5, 60, 95), table))
        assert found[seed] == {
            name: value if value is None else pytest.approx(value, abs=1e-4)
            for name, value in expected.items()
        }
    assert found[0]["prompts"] == 8
    assert found[0]["scores"] != found[1]["scores"]
    assert asked(*short) == 0
    assert "8 prompts x 3 chances" in capsys.readouterr().out


def test_prompts_that_do_not_fit_are_left_out_and_counted(base, folder, pairs, tmp_path, capsys):
    long = replace(pairs[0], id="long", twin="", exemplars=("It rained again. " * 4000,))
    write(file := tmp_path / "pairs.jsonl", [long, replace(pairs[1], twin="")])
    own = ("--base", base.path, "--adapter", folder, "--dtype", "fp32", "--chances", 5, 95)
    assert asked(*own, "--pairs", file) == 0
    printed = capsys.readouterr()
    assert "2 prompts x 2 chances" in printed.out
    assert "left out: 2 prompts" in printed.err
    write(file, [long])
    assert asked(*own, "--pairs", file) == 2
    assert "expected a pair that fits the context" in capsys.readouterr().err


def test_a_judge_without_numbers_is_said_to_be_one(base, folder, file, monkeypatch, capsys):
    logits_of = Model.logits_of
    monkeypatch.setattr(Model, "logits_of", lambda *given: logits_of(*given) * math.nan)
    own = ("--base", base.path, "--adapter", folder, "--pairs", file, "--dtype", "fp32")
    for more in ((), ("--json",)):
        assert asked(*own, *more) == 2
        printed = capsys.readouterr()
        assert "expected scores, this judge has none that is a number" in printed.err
        assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--chances", 5, 100), "expected percents from 1 to 99, got 100"),
        (("--chances", 0, 50), "expected percents from 1 to 99, got 0"),
        (("--chances", 5, 9, 5), "expected different ones, got 5 twice"),
        (("--chances", 5), "expected at least two, got 5"),
        (("--chances",), "expected at least two, got none"),
        (("--limit", 1), "--limit: expected room for a pair and its twin, got 1"),
    ],
)
def test_wrong_numbers_are_one_line(base, folder, file, arguments, part, capsys):
    own = ("--base", base.path, "--adapter", folder, "--pairs", file, "--dtype", "fp32")
    assert asked(*own, *arguments) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"form": "pairwise"}, "but its prompts show two candidates"),
        ({"evidence": False}, "but it was trained without measured evidence"),
        ({"style": False}, "but it has no instruments in one number"),
        ({"form": "pointwise"}, None),
        (None, None),  # without a judge.json
    ],
)
def test_whose_prompts_show_a_chance(base, file, tmp_path, changed, part, capsys):
    other = fused_adapter(tmp_path / "other", base, **(changed or {}))
    if changed is None:
        (other / adapter_settings.FILE).unlink()
    own = ("--base", base.path, "--pairs", file, "--dtype", "fp32", "--limit", 2)
    assert asked(*own, "--adapter", other, "--chances", 20, 80) == (2 if part else 0)
    assert (part or "") in capsys.readouterr().err


def test_adapters_that_have_none_and_notes(base, file, tmp_path, capsys):
    own = ("--base", base.path, "--pairs", file, "--dtype", "fp32", "--limit", 2)
    plain = make_adapter(tmp_path / "plain", base)  # instruments, but not in one number
    assert asked(*own, "--adapter", plain) == 2
    assert "but it has no instruments in one number" in capsys.readouterr().err
    for name in ("none", "default"):
        assert asked(*own, "--adapter", name) == 2
        assert "but there is no adapter" in capsys.readouterr().err
    other = fused_adapter(tmp_path / "other", base, base="another", base_sha256="0" * 64)
    assert asked(*own, "--adapter", other, "--chances", 20, 80) == 0
    assert "note: " in capsys.readouterr().err
