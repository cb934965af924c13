"""The README's Python is run as it stands: every block, with a tiny judge in place of the real one,
and so are its commands for files and for the server.

What a block leaves to its reader (texts, a policy, a data set) is given here.
"""

import asyncio
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_answer import make_base
from test_baselines import PAIRS
from test_judge_adapter import make_adapter

from nanopersrm.bases import Base
from nanopersrm.judge import Judge
from nanopersrm.judgement import JudgeConfig
from nanopersrm.pairs import write

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SCRIPTS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
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
    assert len(BLOCKS) == 4


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


@pytest.fixture
def served(names) -> Iterator[str]:
    """Where a server with the tiny judge is, without reasoning."""
    uvicorn = pytest.importorskip("uvicorn")
    from nanopersrm.routes import app_of
    from nanopersrm.serve import bound

    app, _ = app_of(Judge.load(), JudgeConfig(think=False))
    place, _ = bound("127.0.0.1", 0, None)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[place])))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        place.close()


def test_from_openai(names, served, capsys):
    pytest.importorskip("openai")
    exec(block("OpenAI").replace("http://127.0.0.1:8000", served), names)
    said = capsys.readouterr().out
    assert re.search(r"<scores>A=[1-9] B=[1-9]</scores>\n$", said), said


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_from_curl(served):
    (script,) = [text for text in SCRIPTS if "curl" in text]
    script = script.replace("http://127.0.0.1:8000", served)
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sorted(place["candidate"] for place in found["ranking"]) == [0, 1]


def test_batch(base, tmp_path):
    """The command as it stands, but for the base, in a process of its own."""
    (script,) = [text for text in SCRIPTS if "--batch" in text]
    words = shlex.split(script)
    assert words[:2] == ["python", "judge.py"]
    make_adapter(tmp_path / "runs" / "mine" / "adapter", base)
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs" / "test.jsonl", PAIRS[:2])
    words = [sys.executable, str(ROOT / "judge.py"), *words[2:]]
    words += ["--base", str(base.path), "--dtype", "fp32", "--no-think"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("judged.jsonl: 2 judged, 0 bad; ")
    assert len((tmp_path / "judged.jsonl").read_text().splitlines()) == 2
