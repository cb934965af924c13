"""The command: sanity judges, resume, JSON keys, and one line for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro
from fixtures import PAIRS, TRAIN, make_adapter, make_base

from nanopersrm import InputError
from nanopersrm.evaluate import evaluate, judges
from nanopersrm.evaluate.metrics import KEYS
from nanopersrm.evaluate.predictions import Opinion, from_scores
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.base import resolve
from nanopersrm.pairs import write

ROOT = Path(__file__).parents[2]
GROUPS = ("by_kind", "by_domain", "by_exemplars")
OWNER = {text: p.author for p in PAIRS for text in (*p.exemplars, p.chosen)}


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """(pairs to evaluate, pairs to train on)."""
    write(tmp_path / "test.jsonl", PAIRS)
    write(tmp_path / "train.jsonl.gz", TRAIN)
    return tmp_path / "test.jsonl", tmp_path / "train.jsonl.gz"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("evaluate") / "smollm", "smollm").path


@pytest.fixture
def call(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = evaluate.run(tyro.cli(evaluate.Config, args=[str(a) for a in arguments]), "cmd")
        return code, *capsys.readouterr()

    return call


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plant(monkeypatch, opine) -> list[Any]:
    """The judge "model" is `opine`; gives the list of what it was asked."""
    asked: list[Any] = []

    def listening(exemplars, question, candidates):
        asked.append((exemplars, candidates))
        return opine(exemplars, candidates)

    def made(name, kit):
        return judges.Named(name, listening, {"judge": name}, "planted")

    monkeypatch.setattr(evaluate, "make", made)
    return asked


def oracle(exemplars, candidates) -> Opinion:
    writer = OWNER.get(exemplars[0])
    return from_scores([float(OWNER[c] == writer) for c in candidates], 1.0)


@pytest.mark.parametrize(
    ("opine", "pair", "twin", "gap"),
    [
        (oracle, 1, 1, 1),
        (lambda e, c: from_scores([-x for x in oracle(e, c).scores or ()]), 0, 0, -1),
        (lambda e, c: from_scores([1.0, 0.0]), 0.5, 0, 0),  # always the first
        (lambda e, c: from_scores([float(len(t)) for t in c]), 0.5, 0, 0),
        (lambda e, c: from_scores([1.0, 1.0]), 0, 0, 0),  # always a tie: strict
        (lambda e, c: from_scores(None), 0, 0, 0),
    ],
)
def test_sanity_judges(call, files, tmp_path, monkeypatch, opine, pair, twin, gap):
    asked = plant(monkeypatch, opine)
    code, out, error = call("--pairs", files[0], "--out", tmp_path / "r.json")
    assert (code, error) == (0, "")
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result) == [*KEYS, *GROUPS, "judges", "against", "facts"]
    assert result["pair_accuracy"]["value"] == pair
    assert result["twin_accuracy"]["value"] == twin
    assert result["swap_gap"]["value"] == gap
    assert result["n"] == len(PAIRS)
    assert "| model " in out
    if pair == 1:  # without exemplars nobody knows, and both of a couple are the same question
        assert result["no_exemplar_accuracy"]["value"] == 0  # ties
    assert len(asked) == len(PAIRS) * 3 / 2
    assert [sorted(c) for _, c in asked] == [list(c) for _, c in asked]


def test_a_run_goes_on_where_it_was(call, files, tmp_path, monkeypatch):
    def stopping(exemplars, candidates):
        if len(asked) > 7:
            raise KeyboardInterrupt
        return oracle(exemplars, candidates)

    arguments = ("--pairs", files[0], "--out", tmp_path / "r.json", "--no-neutral")
    asked = plant(monkeypatch, stopping)
    code, out, error = call(*arguments)
    assert (code, out) == (130, "")
    assert error == "nanopersrm.evaluate: interrupted; the same command goes on from here\n"
    assert not (tmp_path / "r.json").exists()
    asked = plant(monkeypatch, oracle)
    assert call(*arguments)[0] == 0
    assert len(asked) == len(PAIRS) - 7
    first = json.loads((tmp_path / "r.json").read_text())
    asked = plant(monkeypatch, oracle)
    assert call(*arguments)[0] == 0
    assert not asked
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["judges"] == first["judges"]
    assert again["facts"]["pairs_per_second"] == {"model": None}
    assert call(*arguments, "--overwrite")[0] == 0
    assert len(asked) == len(PAIRS)


def test_what_a_judge_refuses_is_invalid(call, files, tmp_path, monkeypatch):
    def refusing(exemplars, candidates):
        raise InputError("too long")

    plant(monkeypatch, refusing)
    code, out, _ = call("--pairs", files[0], "--out", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert code == 0
    assert result["invalid_rate"]["value"] == 1
    assert result["pair_accuracy"]["value"] == 0
    assert "invalid, at first: too long" in out


def test_text_baselines_without_torch(files, tmp_path):
    """In a process of its own: torch is never imported, and every number is there."""
    out = tmp_path / "r.json"
    program = (
        "import sys, runpy\n"
        "try: runpy.run_module('nanopersrm.evaluate', run_name='__main__')\n"
        "except SystemExit as error: print(error.code, 'torch' in sys.modules)"
    )
    flags = [
        "--pairs",
        files[0],
        "--train",
        files[1],
        "--judges",
        "ngrams,factors,together",
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, flags), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    result = json.loads(out.read_text())
    assert list(result["judges"]) == ["ngrams", "factors", "together"]
    assert result["pair_accuracy"] == result["judges"]["ngrams"]["pair_accuracy"]
    assert result["judges"]["factors"]["brier"]["value"] < 0.25
    assert result["judges"]["together"]["brier"]["value"] < 0.25
    assert result["facts"]["files"][str(files[0])]["pairs"] == len(PAIRS)
    assert result["facts"]["command"].endswith(str(out))


def test_without_training_pairs_there_are_no_probabilities(call, files, tmp_path):
    call("--pairs", files[0], "--judges", "ngrams,factors", "--out", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["brier"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_all_judges_on_a_tiny_base(call, files, tmp_path, tiny_folder, mode):
    code, out, error = call(
        *("--pairs", files[0], "--base", tiny_folder, "--dtype", "fp32", "--limit", 5),
        *("--exemplars", 1, "--mode", mode, "--baselines", "--out", tmp_path / "r.json"),
    )
    assert code == 0, error
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["n"] == 4  # whole twins
    assert set(result["by_exemplars"]) == {"1"}
    assert result["invalid_rate"]["value"] == 0
    assert result["no_exemplar_accuracy"]["value"] == 0.5
    assert 0 <= result["brier"]["value"] <= 1
    consistency = result["order_consistency"]["value"]
    assert (consistency is None) == (mode == "pointwise")
    expected = {"model", "no_evidence", "ngrams", "factors", "likelihood"}
    assert expected <= set(result["judges"])
    assert result["facts"]["left_out"]["untrained"].startswith("the same as model")
    assert "untrained: left out" in out
    assert result["facts"]["left_out"]["together"] == "needs pairs to fit on: --train"


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), resolve(str(tiny_folder)))


def test_an_adapter_and_the_same_base_without_it(
    call, files, tmp_path, tiny_folder, adapter, monkeypatch
):
    """One model serves all; untrained and likelihood are what they are without --adapter."""
    loads: list[object] = []
    load = Judge.load

    def counting(*arguments, **named):
        loads.append(arguments)
        return load(*arguments, **named)

    monkeypatch.setattr(Judge, "load", counting)
    common = ("--pairs", files[0], "--base", tiny_folder, "--dtype", "fp32", "--limit", 4)
    for names, more in (
        ("likelihood,untrained,style,model", ("--adapter", adapter)),
        ("model,likelihood,style", ()),
    ):
        out = tmp_path / f"{len(more)}.json"
        code, _, error = call(*common, "--judges", names, *more, "--out", out)
        assert code == 0, error
    assert len(loads) == 2
    tuned, plain = (
        {(o["judge"], o["pair"]): o for o in read_lines(tmp_path / f"{n}.opinions.jsonl")}
        for n in (2, 0)
    )
    pairs = {pair for _, pair in plain}
    assert len(pairs) == 4
    for pair in pairs:
        base, likely = plain["model", pair], plain["likelihood", pair]
        assert tuned["untrained", pair]["scores"] == base["scores"]
        assert tuned["untrained", pair]["key"] == base["key"]  # remembered as the same
        assert tuned["likelihood", pair]["scores"] == likely["scores"]
        assert tuned["model", pair]["scores"] != base["scores"]
        assert all(-1 <= cosine <= 1 for cosine in tuned["style", pair]["scores"])
    facts = [json.loads((tmp_path / f"{n}.json").read_text())["facts"] for n in (2, 0)]
    assert facts[0]["left_out"] == {}
    assert facts[0]["adapter"] == str(adapter)
    assert facts[1]["left_out"] == {"style": "there is no --adapter"}


def test_every_file_of_an_adapter_is_in_the_settings(tiny_folder, tmp_path):
    """A changed file can never meet an old opinion."""
    made = make_adapter(tmp_path / "a", resolve(str(tiny_folder)))
    config = JudgeConfig(think=False)

    def settings() -> str:
        load = judges.loader(str(tiny_folder), str(made), "cpu", "fp32")
        kit = judges.Kit(str(tiny_folder), str(made), "cpu", "fp32", config, PAIRS, [], load)
        found = judges.make("model", kit)
        assert isinstance(found, judges.Named)
        return json.dumps(found.settings, sort_keys=True)

    seen = {settings()}
    for name in sorted(file for file in made.rglob("*") if file.is_file()):
        stat = name.stat()
        os.utime(name, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
        seen.add(settings())
    assert len(seen) == 7  # judge.json, and three files of style, two of the adapter
    make_adapter(made, resolve(str(tiny_folder)), nf4=True)
    assert '"nf4": true' in settings()


def test_an_adapter_without_style(tiny_folder, tmp_path):
    made = make_adapter(tmp_path / "a", resolve(str(tiny_folder)), style=False)
    (made / "style").rename(tmp_path / "elsewhere")
    load = judges.loader(str(tiny_folder), str(made), "cpu", "fp32")
    kit = judges.Kit(str(tiny_folder), str(made), "cpu", "fp32", JudgeConfig(), PAIRS, [], load)
    assert judges.make("style", kit) == f"{made} has no folder style"


def test_the_model_is_asked_as_judge_py_asks(tiny_folder):
    judge = Judge.load(str(tiny_folder), dtype="fp32")
    pair = PAIRS[0]
    texts = [pair.chosen, pair.rejected]
    config = JudgeConfig(think=False, evidence=False, mode="pairwise")
    kit = judges.Kit(str(tiny_folder), None, "cpu", "fp32", config, [pair], [], lambda a: judge)
    made = judges.make("model", kit)
    assert isinstance(made, judges.Named)
    found = made.opine(pair.exemplars, "", texts)
    plain = judge.judge(pair.exemplars, texts, config=config)
    assert found.scores == pytest.approx(plain.scores)
    assert found.preference == pytest.approx(plain.preference[0][1])
    assert found.verdict == plain.verdict
    assert isinstance(found.agrees, bool)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--judges", "nobody"], "--judges: expected names out of model"),
        (["--judges", ","], "got none"),
        (["--limit", "0"], "--limit: expected a number from 1, got 0"),
        (["--limit", "1"], "--limit: expected room for a pair and its twin, got 1"),
        (["--exemplars", "9"], "--exemplars: expected pairs with 9 or more"),
        (["--think-tokens", "-1"], "--think-tokens"),
        (["--samples", "0"], "samples"),
        (["--samples", "1", "4"], "--samples: more than one number needs --think-tokens"),
        (["--samples", "4", "4", "--think-tokens", "9"], "--samples: expected different numbers"),
        (["--out", "r.txt"], "ends in .json"),
        (["--train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--judges", "model", "--adapter", "nowhere"], "adapter"),
        (["--base", "no/such/folder/at/all"], "no/such/folder/at/all"),
    ],
)
def test_mistakes_are_one_line(call, files, arguments, part):
    code, out, error = call("--pairs", files[0], *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("nanopersrm.evaluate: error: ")
    assert error.count("\n") == 1
    assert part in error


def test_bad_pairs_are_named(call, files, tmp_path):
    code, _, error = call("--pairs", files[0], files[0])
    assert code == 2
    assert "is also in" in error
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a"}\n')
    assert f"{bad}, line 1, field twin: missing" in call("--pairs", bad)[2]
    bad.write_text("")
    assert "expected pairs, found none" in call("--pairs", bad)[2]


def test_limits_draw_whole_twins_by_seed():
    drawn = [[p.id for p in evaluate.select(PAIRS, 7, None, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for names in drawn:
        assert len(names) == 6
        assert {p.twin for p in PAIRS if p.id in names} == set(names)
    assert [len(p.exemplars) for p in evaluate.select(PAIRS, None, 1, 0)] == [1] * len(PAIRS)


def test_thinking_needs_tokens():
    config = evaluate.Config(pairs=())
    assert not evaluate.judge_config(config).think
    thinking = evaluate.judge_config(evaluate.Config(pairs=(), think_tokens=40))
    assert (thinking.think, thinking.think_tokens) == (True, 40)
    assert not evaluate.judge_config(
        evaluate.Config(pairs=(), think_tokens=40, no_think=True)
    ).think
