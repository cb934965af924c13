"""Judges by name: more samples of the model are judges of their own."""

import json

import tyro
from fixtures import PAIRS, make_base

from nanopersrm.evaluate import evaluate
from nanopersrm.pairs import write


def test_more_samples_are_more_rows(tmp_path, capsys):
    base = make_base(tmp_path / "smollm", "smollm").path
    write(tmp_path / "test.jsonl", PAIRS[:2])
    out = tmp_path / "result.json"
    arguments = ["--pairs", tmp_path / "test.jsonl", "--base", base, "--limit", "2", "--out", out]
    arguments += ["--think-tokens", "3", "--samples", "1", "2", "--no-neutral", "--dtype", "fp32"]
    code = evaluate.run(tyro.cli(evaluate.Config, args=[str(a) for a in arguments]))
    assert code == 0, capsys.readouterr().err
    judges = json.loads(out.read_text())["facts"]["judges"]
    assert list(judges) == ["model", "model x2"]
    assert judges["model x2"].endswith("3 tokens of reasoning, 2 samples")
    kept = out.with_suffix(".opinions.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in kept]
    one, two = ([o["scores"] for o in lines if o["judge"] == name] for name in judges)
    assert one != two
