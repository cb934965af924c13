"""The README's Python is run as it stands: every block, with a tiny judge in place of the real one.

What a block leaves to its reader (texts, a policy, a data set) is given here.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_answer import make_base
from test_judge_adapter import make_adapter

from nanopersrm.bases import Base
from nanopersrm.judge import Judge

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
MINE = ["I came home late. No supper; no letters, either.", "So be it! We shall see."]
ROW = {"exemplars": MINE, "question": "What happened?"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("readme") / "smollm", "smollm")


@pytest.fixture
def names(base, tmp_path, monkeypatch) -> dict[str, Any]:
    """What the blocks speak of; `Judge.load` gives a tiny judge."""
    folder = make_adapter(tmp_path / "adapter", base)
    load = Judge.load

    def tiny(*given: object, **named: Any) -> Judge:
        adapter = folder if named.get("adapter") else None
        return load(str(base.path), adapter, dtype="fp32")

    monkeypatch.setattr(Judge, "load", tiny)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    texts = {"text_of_the_writer": MINE[0], "texts_of_the_writer": MINE}
    drafts = {"draft_one": "It rained; I stayed in.", "draft_two": "lol rain"}
    rows = [{"prompt": f"Write about rain, {k}."} for k in range(4)]
    return {**texts, **drafts, "policy": str(base.path), "dataset": rows}


def block(word: str) -> str:
    """The one block of the README with this word."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


def test_every_block_is_run_here():
    assert len(BLOCKS) == 3


def test_from_python(names, capsys):
    exec(block("judge.judge("), names)
    assert len(names["judgement"].scores) == 2
    assert capsys.readouterr().out.startswith("[")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_from_trl(names, tmp_path):
    datasets = pytest.importorskip("datasets")
    import trl

    names["dataset"] = datasets.Dataset.from_list(names["dataset"])
    names["policy"] = transformers.AutoModelForCausalLM.from_pretrained(names["policy"])
    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none"}
    names["arguments"] = trl.GRPOConfig(str(tmp_path / "policy"), **options)
    exec(block("GRPOTrainer"), names)
    (reward,) = names["trainer"].reward_funcs
    found = reward(["Rain?"] * 2, ["It rained; so be it.", ""])
    assert found[1] == 0
    assert 0 < found[0] < 1


def test_from_verl_and_openrlhf(names):
    exec(block("verl_score"), names)
    score = names["compute_score"]("mine", "It rained; so be it.", "", ROW)
    assert 0 < score < 1
    found = names["reward_func"](["Rain? It rained."], ["Rain? "], [MINE])
    assert 0 < float(found["rewards"][0]) < 1
