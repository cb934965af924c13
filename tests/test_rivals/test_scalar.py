"""The scalar reward: one number at the row where the judge reads its digit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from fixtures import CANDIDATES, EXEMPLARS, PAIRS, WEIGHED, make_adapter
from safetensors.torch import load_file, save_file

from nanopersrm import InputError
from nanopersrm.evaluate import evaluate
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.prompts import prompt_ids
from nanopersrm.judge.reply import line_text
from nanopersrm.model.cache import Layout
from nanopersrm.pairs import write
from nanopersrm.rivals import scalar
from nanopersrm.style.ledger import LETTERS

SHORT = [
    replace(p, exemplars=(p.exemplars[0][:40],), chosen=p.chosen[:40], rejected=p.rejected[:40])
    for p in PAIRS[:2]
]


@pytest.fixture(scope="module")
def judge(base, tmp_path_factory) -> Judge:
    """With an adapter that has learned something."""
    return Judge.load(base.path, make_adapter(tmp_path_factory.mktemp("a"), base), dtype="fp32")


def by_hand(judge: Judge, head: torch.Tensor, text: str) -> float:
    """One prompt with all that is measured, one plain forward, one product."""
    (ledger,), encode = judge.measurer.ledgers(EXEMPLARS, [text]), judge.tokenizer.encode
    ids = prompt_ids(judge.tokenizer, EXEMPLARS, [text], "Why?", (), judge.measurer.menu(EXEMPLARS))
    for feature, line in ledger.lines.items():
        ids += encode(LETTERS[feature]) + encode(line_text([line])) if line.decibans else []
    ids += encode(".") + encode(f" sum {ledger.total():+05.1f}\n</think>\n<scores>A=")
    with torch.no_grad():
        hidden = judge.model(torch.tensor(ids), Layout.of([len(ids)]))
    return float(hidden[-1].double() @ head.double())


def test_a_score_is_a_product_with_the_state_before_the_digit(judge, tmp_path):
    head = torch.randn(judge.model.config.D, generator=torch.Generator().manual_seed(3))
    save_file({"head": head}, tmp_path / scalar.FILE)
    score = scalar.scorer(tmp_path, judge)
    scores = score(EXEMPLARS, "Why?", CANDIDATES)
    assert scores is not None
    assert scores == pytest.approx([by_hand(judge, head, text) for text in CANDIDATES], abs=2e-4)
    assert len(set(scores)) == len(CANDIDATES)
    assert score(EXEMPLARS, "Why?", CANDIDATES[::-1]) == pytest.approx(scores[::-1], abs=2e-4)
    too_long = "word " * judge.model.config.context
    assert score(EXEMPLARS, "", ["Short.", too_long]) is None


def test_a_writer_is_trained_on_with_evidence_that_does_not_know_them(judge, monkeypatch):
    measurer, (pair, _) = judge.measurer, SHORT
    other = replace(WEIGHED, weights={name: 2 * w for name, w in WEIGHED.weights.items()})
    texts = (pair.exemplars, "", (pair.chosen, pair.rejected))
    expected = []
    for evidence in (WEIGHED, other, replace(WEIGHED, folds=(other,) * 5)):
        monkeypatch.setattr(judge, "measurer", replace(measurer, evidence=evidence))
        expected.append(scalar.prompts_of(judge, *texts))
    assert expected[0] == expected[2] != expected[1]
    config = scalar.Config(Path("none"), longest=9000)
    assert next(scalar.training_prompts(judge, [pair], config)) == expected[1]


@pytest.mark.parametrize("head", [torch.zeros(5), torch.full((48,), float("nan")), None])
def test_a_broken_head_is_named(judge, head, tmp_path):
    if head is None:
        (tmp_path / scalar.FILE).write_bytes(b"nonsense")
    else:
        save_file({"head": head}, tmp_path / scalar.FILE)
    with pytest.raises(InputError, match=r"head\.safetensors"):
        scalar.scorer(tmp_path, judge)


def train(*arguments: object) -> int:
    return scalar.run(tyro.cli(scalar.Config, args=[str(a) for a in arguments]))


@pytest.mark.slow
def test_training_learns_and_its_folder_can_be_evaluated(base, tmp_path, capsys):
    write(pairs := tmp_path / "pairs.jsonl", SHORT)
    adapter = make_adapter(tmp_path / "a", base)
    common = ["--base", base.path, "--pairs", pairs, "--dtype", "fp32", "--longest", 9000]
    common += ["--reading-from", adapter / "reading", "--batch-pairs", 2, "--steps", 8]
    common += ["--lr", "1e-2"]
    for name in ("one", "two"):
        assert train(*common, "--out", tmp_path / name) == 0, capsys.readouterr()
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert losses[:8] == losses[8:]
    assert losses[7] < losses[0] / 2
    one, two = (load_file(tmp_path / name / scalar.FILE)["head"] for name in ("one", "two"))
    assert torch.equal(one, two)  # the same seed, the same run
    for name in ("evidence.json", "reading/adapter_model.safetensors"):  # what the prompts show
        assert (tmp_path / "one" / name).read_bytes() == (adapter / name).read_bytes()

    arguments = ["--pairs", pairs, "--base", base.path, "--dtype", "fp32", "--json"]
    arguments += ["--beside", f"scalar={tmp_path / 'one'}"]
    assert evaluate.run(tyro.cli(evaluate.Config, args=[*map(str, arguments)])) == 0
    judges = json.loads(capsys.readouterr().out)["judges"]
    assert list(judges) == ["model", "scalar"]
    assert judges["scalar"]["pair_accuracy"]["value"] == 1


@pytest.mark.parametrize(
    ("more", "word"),
    [(("--steps", 0), "--steps"), (("--longest", 9), "--longest"), (("--out", "."), "--out")],
)
def test_mistakes_are_one_line(base, tmp_path, more, word, capsys):
    write(tmp_path / "pairs.jsonl", PAIRS[:2])
    common = ["--base", base.path, "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "new"]
    assert train(*common, *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert word in error
