"""The README's Python is run as it stands, block by block, with a tiny judge in place of the real
one; so is its command for files. What a block leaves to its reader (texts, a policy, a data set) is
given here."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures import PAIRS, make_adapter

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.pairs import write

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
WRITER = ["I came home late. No supper; no letters, either.", "So be it! We shall see."]


@pytest.fixture
def names(base, tmp_path, monkeypatch) -> dict[str, Any]:
    """What the blocks speak of; `Judge.load` gives a tiny judge."""
    folder = make_adapter(tmp_path / "adapter", base)
    load = Judge.load

    def tiny(*_: object, adapter: object = None, **__: object) -> Judge:
        return load(str(base.path), folder if adapter else None, dtype="fp32")

    monkeypatch.setattr(Judge, "load", tiny)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    texts = {"text_of_the_writer": WRITER[0], "texts_of_the_writer": WRITER}
    drafts = {"draft_one": "It rained; I stayed in.", "draft_two": "lol rain"}
    rows = [{"prompt": f"Write about rain, {k}."} for k in range(4)]
    return {**texts, **drafts, "policy": str(base.path), "dataset": rows}


def block(word: str) -> str:
    """The one block of the README with this word."""
    (text,) = [text for text in BLOCKS if word in text]
    return text


def test_every_block_is_run_here():
    assert len(BLOCKS) == 5
    assert len(README.split()) <= 1800


def test_links_and_pictures_lead_somewhere():
    names = re.findall(r"\]\(([^)#]+)\)|<img src=\"([^\"]+)\"", README)
    assert len(names) >= 6
    for link, picture in names:
        assert (ROOT / (link or picture)).exists()


def test_the_map_names_what_is_there():
    (house,) = re.findall(r"^```text\n(judge\.py.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(house.splitlines()) <= 25
    for room in re.findall(r"^  (\w+)/", house, re.MULTILINE):
        assert (ROOT / "nanopersrm" / room / "__init__.py").exists()
    rooms = {path.parent.name for path in (ROOT / "nanopersrm").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^  (\w+)/", house, re.MULTILINE))


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
    rewards = reward(["Rain?"] * 2, ["It rained; so be it.", ""])
    assert rewards[1] == 0
    assert 0 < rewards[0] < 1


def test_from_openrlhf(names):
    exec(block("openrlhf_reward"), names)
    result = names["reward_func"](["Rain? It rained."], ["Rain? "], [WRITER])
    assert 0 < float(result["rewards"][0]) < 1


def test_from_verl(names):
    exec(block("verl_score"), names)
    row = {"exemplars": WRITER, "question": "What happened?"}
    assert 0 < names["compute_score"]("mine", "It rained; so be it.", "", row) < 1


@pytest.fixture
def url(names) -> Iterator[str]:
    """Where a server with the tiny judge is, without reasoning."""
    pytest.importorskip("openai")
    from test_server import serving

    from nanopersrm.serve.server import build_app

    app, _ = build_app(Judge.load(), JudgeConfig(think=False))
    with serving(app) as port:
        yield f"http://127.0.0.1:{port}"


def test_from_openai(names, url, capsys):
    exec(block("OpenAI").replace("http://127.0.0.1:8000", url), names)
    printed = capsys.readouterr().out
    assert re.search(r"<scores>A=[1-9] B=[1-9]</scores>\n$", printed), printed


@pytest.mark.slow
def test_from_ray(base, tmp_path, monkeypatch):
    """The command as it stands, but for the base and the reasoning."""
    pytest.importorskip("ray")
    (command,) = [text for text in COMMANDS if "--ray" in text]
    words = shlex.split(command)
    assert words[:2] == ["python", "judge.py"]
    make_adapter(tmp_path / "runs" / "mine" / "adapter", base)
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs" / "test.jsonl", PAIRS[:2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the workers too
    words = [sys.executable, str(ROOT / "judge.py"), *words[2:], "--base", str(base.path)]
    run = subprocess.run([*words, "--dtype", "fp32", "--no-think"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "judged.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 2]
