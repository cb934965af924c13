"""The command: planted judges, resume, real judges on a tiny base, and one line for a mistake."""

import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tyro
from fixtures import PAIRS, TRAIN, fresh, make_adapter

from nanopersrm import InputError
from nanopersrm.evaluate import evaluate, judges
from nanopersrm.evaluate.judges import Prediction, from_scores
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.pairs import write
from nanopersrm.style.ledger import Ledger, Measurer

ROOT = Path(__file__).parents[2]
AUTHOR = {text: p.author for p in PAIRS for text in (*p.exemplars, p.chosen)}


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """Of pairs to evaluate and to train on."""
    write(tmp_path / "test.jsonl", PAIRS)
    write(tmp_path / "train.jsonl", TRAIN)
    return tmp_path / "test.jsonl", tmp_path / "train.jsonl"


@pytest.fixture
def call(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = evaluate.run(tyro.cli(evaluate.Config, args=[str(a) for a in arguments]), "cmd")
        return code, *capsys.readouterr()

    return call


def plant(monkeypatch, predict) -> list[Any]:
    """The judge "model" is `predict`, "ngrams" its opposite; gives the calls as they come."""
    calls: list[Any] = []

    def make(name, setup):
        def listening(exemplars, question, candidates):
            calls.append((exemplars, candidates))
            prediction = predict(exemplars, candidates)
            if name == "model":
                return prediction
            return from_scores([-score for score in prediction.scores or ()])

        return judges.NamedJudge(listening, {"judge": name}, "planted")

    monkeypatch.setattr(evaluate, "make", make)
    return calls


def oracle(exemplars, candidates) -> Prediction:
    return from_scores([float(AUTHOR[c] == AUTHOR[exemplars[0]]) for c in candidates], 1.0)


@pytest.mark.parametrize(
    ("predict", "pair", "twin", "swap"),
    [
        (oracle, 1, 1, 1),
        (lambda e, c: from_scores([-x for x in oracle(e, c).scores or ()]), 0, 0, -1),
        (lambda e, c: from_scores([1.0, 0.0]), 0.5, 0, 0),  # always the first
        (lambda e, c: from_scores(None), 0, 0, 0),
    ],
)
def test_planted_judges(call, files, tmp_path, monkeypatch, predict, pair, twin, swap):
    calls = plant(monkeypatch, predict)
    code, out, error = call("--pairs", files[0], "--out", tmp_path / "r.json")
    assert (code, error) == (0, "")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["pair_accuracy"]["value"] == pair
    assert result["twin_accuracy"]["value"] == twin
    assert result["swap_gap"]["value"] == swap
    assert result["n"] == len(PAIRS) == len(calls)
    assert "| model " in out
    assert "swap gap" in out
    assert all(sorted(c) == list(c) for _, c in calls)


def test_a_run_goes_on_where_it_was(call, files, tmp_path, monkeypatch):
    def stopping(exemplars, candidates):
        if len(calls) > 7:
            raise KeyboardInterrupt
        return oracle(exemplars, candidates)

    arguments = ("--pairs", files[0], "--out", tmp_path / "r.json")
    calls = plant(monkeypatch, stopping)
    code, out, error = call(*arguments)
    assert (code, out, error.count("\n")) == (130, "", 1)
    assert not (tmp_path / "r.json").exists()
    calls = plant(monkeypatch, oracle)
    assert call(*arguments)[0] == 0
    assert len(calls) == len(PAIRS) - 7
    first = json.loads((tmp_path / "r.json").read_text())
    with open(tmp_path / "r.predictions.jsonl", "a", encoding="utf-8") as file:
        file.write('{"key": "3", "jud')  # killed here
    calls = plant(monkeypatch, oracle)
    assert call(*arguments)[0] == 0
    assert not calls
    assert json.loads((tmp_path / "r.json").read_text())["judges"] == first["judges"]
    (tmp_path / "r.predictions.jsonl").write_text('{"key": 1}\n')
    code, _, error = call(*arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert "r.predictions.jsonl" in error


def test_what_a_judge_refuses_is_invalid(call, files, monkeypatch):
    def refusing(exemplars, candidates):
        raise InputError("too long")

    plant(monkeypatch, refusing)
    result = json.loads(call("--pairs", files[0], "--json")[1])
    assert result["invalid_rate"]["value"] == 1
    assert "too long" in result["facts"]["notes"]["model"]


def test_the_first_judge_against_another(call, files, monkeypatch):
    plant(monkeypatch, oracle)
    _, out, _ = call("--pairs", files[0], "--judges", "model,ngrams")
    line = out[out.index("| model against") :].splitlines()[2]
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    points = "100.0 [100.0, 100.0]"
    assert cells == ["ngrams", "20 / 0", "0.001", points, "10 / 0", "0.002", points]


def test_text_judges_without_torch(files):
    """In a process of its own: torch is never imported, and every number is there."""
    program = (
        "import sys, runpy\n"
        "try: runpy.run_module('nanopersrm.evaluate', run_name='__main__')\n"
        "except SystemExit as error: print('torch' in sys.modules)"
    )
    flags = ["--pairs", files[0], "--train", files[1], "--judges", "ngrams,factors,together"]
    command = [sys.executable, "-c", program, *map(str, flags), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    line, torch = done.stdout.splitlines()
    assert torch == "False", done.stderr
    result = json.loads(line)
    assert list(result["judges"]) == ["ngrams", "factors", "together"]
    assert result["judges"]["factors"]["brier"]["value"] < 0.25
    assert result["judges"]["together"]["pair_accuracy"]["value"] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_all_judges_on_a_tiny_base(call, files, base, tmp_path, mode, monkeypatch):
    """Each predicts what no other does, each pair is measured once, and asked once."""
    measured: list[Any] = []
    ledgers = Measurer.ledgers

    def counting(*texts: Any, **more: Any) -> list[Ledger]:
        measured.append(texts)
        return ledgers(*texts, **more)

    monkeypatch.setattr(Measurer, "ledgers", counting)
    folder, file = make_adapter(tmp_path / "a", base), tmp_path / "r.predictions.jsonl"
    common = ["--pairs", files[0], "--base", base.path, "--dtype", "fp32", "--limit", 5]
    common += ["--exemplars", 1, "--mode", mode, "--train", files[1], "--adapter", folder]
    common += ["--out", tmp_path / "r.json", "--baselines", "--beside", f"same={folder}"]

    def predicted(lines: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        code, _, error = call(*common, "--think-lines", lines)
        assert code == 0, error
        result = json.loads((tmp_path / "r.json").read_text())
        return result, [json.loads(line) for line in file.read_text().splitlines()]

    result, lines = predicted(2)
    assert result["n"] == 4 == len(measured)  # whole twins
    assert set(result["by_exemplars"]) == {"1"}
    assert list(result["judges"]) == [*judges.NAMES, "same"]
    assert result["invalid_rate"]["value"] == 0
    scores: dict[str, dict[str, Any]] = {name: {} for name in result["judges"]}
    for line in lines:
        scores[line["judge"]][line["pair"]] = line["prediction"]["scores"]
    assert scores.pop("same") == scores["model"]
    assert all(a != b for a, b in combinations(scores.values(), 2))
    alone, tuned = fresh(base), Judge.load(str(base.path), folder, dtype="fp32")
    alone.measurer = tuned.measurer
    (pair,) = (pair for pair in PAIRS if pair.id == lines[0]["pair"])
    texts = sorted((pair.chosen, pair.rejected))
    for judge, name in ((alone, "untrained"), (tuned, "model")):
        config = JudgeConfig(mode, think_lines=2, all_evidence=judge is alone)
        judgement = judge.judge(pair.exemplars[:1], texts, config=config)
        assert scores[name][pair.id] == pytest.approx(judgement.scores, abs=1e-4)
    again = predicted(1)[1][len(lines) :]
    settled = {*judges.TEXT, "reading", "evidence"}  # no lines change them
    assert {line["judge"] for line in again} == {*judges.NAMES, "same"} - settled
    assert predicted(1)[1] == lines + again


def test_what_cannot_be_made_is_left_out(call, files, base):
    names = ("--judges", "reading,model,untrained,evidence,together")
    common = ("--pairs", files[0], "--base", base.path, "--dtype", "fp32", "--limit", 2, "--json")
    code, out, error = call(*common, *names)
    assert code == 0, error
    result = json.loads(out)
    assert list(result["judges"]) == ["reading", "model"]
    left_out = {k for k, note in result["facts"]["notes"].items() if "left out" in note}
    assert left_out == {"untrained", "evidence", "together"}


def test_whatever_changes_a_judge_changes_its_settings(base, tmp_path, monkeypatch):
    """No prediction is remembered for another judge, or for a file that has changed."""
    folder = make_adapter(tmp_path / "a", base)
    monkeypatch.setattr(adapter_settings, "SHIPPED", folder)

    def settings(name: str = "model", adapter: str | None = str(folder), **changed: Any) -> str:
        config = JudgeConfig(**changed)
        setup = judges.Setup(str(base.path), adapter, "cpu", "fp32", config, [], {}, print)
        judge = judges.make(name, setup)
        assert isinstance(judge, judges.NamedJudge)
        return json.dumps(judge.settings, sort_keys=True)

    seen = [settings(name) for name in judges.NAMES if name != "together"]
    for changed in ({"mode": "pairwise"}, {"think_lines": 2}, {"samples": 2}, {"seed": 1}):
        seen.append(settings(**changed))
    seen.append(settings(adapter=None))
    names = sorted(file for file in folder.rglob("*") if file.is_file())
    for name in names:
        stat = name.stat()
        os.utime(name, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
        seen.append(settings())
    seen.append(settings(adapter=None))  # the evidence is the shipped one, which has changed
    assert len({*seen}) == len(seen) == len(judges.NAMES) - 1 + 4 + 2 + len(names)


def test_predictions_from_scores():
    assert from_scores([1.0, 2.0]) == Prediction(1, (1.0, 2.0))
    assert from_scores([1.0, 1.0]).verdict == "tie"
    assert from_scores([2.0, 1.0], math.log(3)).preference == pytest.approx(0.75)
    assert from_scores([1e9, 0.0], 1.0).preference == 1
    for bad in (None, [float("nan"), 1.0], [1.0, float("inf")]):
        assert from_scores(bad).verdict == "invalid"


def test_limits_draw_whole_twins_by_seed():
    drawn = [[p.id for p in evaluate.select(PAIRS, 7, None, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for names in drawn:
        assert len(names) == 6
        assert {p.twin for p in PAIRS if p.id in names} == set(names)
    assert [len(p.exemplars) for p in evaluate.select(PAIRS, None, 1, 0)] == [1] * len(PAIRS)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--judges", "nobody"], "--judges"),
        (["--limit", "1"], "--limit"),
        (["--exemplars", "9"], "--exemplars"),
        (["--think-lines", "0"], "think_lines"),
        (["--out", "r.txt"], ".json"),
        (["--train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--beside", "scalar"], "NAME=FOLDER"),
        (["--beside", "ngrams=runs"], "ngrams"),
        (["--pairs", "FILE", "FILE"], "two"),
        (["--pairs", "empty.jsonl"], "pairs"),
        (["--pairs", "bad.jsonl"], "line 1"),
    ],
)
def test_mistakes_are_one_line(call, files, arguments, word, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"id": "a"}\n')
    arguments = [str(files[0]) if a == "FILE" else a for a in arguments]
    first = () if "--pairs" in arguments else ("--pairs", files[0])
    code, out, error = call(*first, *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("nanopersrm.evaluate: error: ")
    assert error.count("\n") == 1
    assert word in error
