"""The README's Python is run as it stands: every block, with a tiny judge in place of the real one,
and so is every command of its section "Use it from …".

What a block leaves to its reader (texts, a policy, a data set) is given here.
"""

import asyncio
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures import PAIRS, make_adapter, make_base
from test_batch import start, with_ray

from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.model.base import Base
from nanopersrm.pairs import write

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
(SECTION,) = re.findall(r"^## Use it from …\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
SCRIPTS = re.findall(r"^```bash\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
MINE = ["I came home late. No supper; no letters, either.", "So be it! We shall see."]
URL = "http://127.0.0.1:8000"
with_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
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


def script(*words: str) -> str:
    """The one command of the section with these words."""
    (found,) = [text for text in SCRIPTS if all(word in text for word in words)]
    return found


def test_every_block_is_run_here():
    assert len(BLOCKS) == 5
    assert len(SCRIPTS) == 6


def test_every_tool_has_its_snippet():
    """A heading each, and below it what is run here; the page has pictures instead."""
    parts = re.split(r"^### (.*)\n", SECTION, flags=re.MULTILINE)
    assert len(parts) == 1 + 2 * 9
    for tool, text in zip(parts[1::2], parts[2::2], strict=True):
        assert "```" in text or "<img" in text, tool


def test_the_pictures_are_there_and_small():
    pictures = re.findall(r'<img src="([^"]+)" width="\d+%" alt="[^"]+">', README)
    assert README.count("<img") == len(pictures) == 2
    for name in pictures:
        data = (ROOT / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n")
        assert len(data) < 120 * 1024


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


def test_from_judges_of_pairs_and_ranks(names, capsys):
    exec(block("pairwise_judge"), names)
    (better,), (order,) = names["better"], names["order"]
    assert sorted(order) == [0, 1]
    assert better == order[0]
    assert capsys.readouterr().out == f"[{better}] [{order}]\n"


def test_from_verl_and_openrlhf(names):
    exec(block("verl_score"), names)
    score = names["compute_score"]("mine", "It rained; so be it.", "", ROW)
    assert 0 < score < 1
    found = names["compute_score_async"]("mine", "It rained; so be it.", "", ROW)
    assert asyncio.run(found) == score
    found = names["reward_func"](["Rain? It rained."], ["Rain? "], [MINE])
    assert 0 < float(found["rewards"][0]) < 1


@pytest.fixture
def served(names) -> Iterator[str]:
    """Where a server with the tiny judge is, without reasoning."""
    uvicorn = pytest.importorskip("uvicorn")
    from nanopersrm.server import bind, build_app

    app, _ = build_app(Judge.load(), JudgeConfig(think=False))
    place, _ = bind("127.0.0.1", 0, None)
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
    exec(block("OpenAI").replace(URL, served), names)
    said = capsys.readouterr().out
    assert re.search(r"<scores>A=[1-9] B=[1-9]</scores>\n$", said), said


def curled(served: str, text: str) -> Any:
    """What a script of the README prints, which asks the server by curl."""
    text = text.replace(URL, served)
    done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@with_curl
def test_from_curl(served):
    found = curled(served, script("/judge"))
    assert found["verdict"] in (0, 1)
    assert all(1 <= score <= 9 for score in found["scores"])
    ranked = curled(served, script("/writers/me", "/rank"))
    assert [place["candidate"] for place in ranked["ranking"]] == found["ranking"]


@with_curl
def test_from_openrlhf_over_http(served):
    text = script("/get_reward")
    missing = curled(served, text)
    assert "nobody was put under the name 'me'" in missing["error"]["message"]
    curled(served, script("/writers/me"))
    found = curled(served, text)
    assert len(found["rewards"]) == 1
    assert 0 < found["rewards"][0] < 1
    assert f"--reward.remote_url {URL}/get_reward?writer=me" in SECTION.replace("\n", " ")


def test_the_server(base, tmp_path):
    """The second command of the line, but for base and port, until it is told to end."""
    install, serve = script("nanopersrm.serve").split(" && ")
    assert install == "pip install -e '.[serve]'"
    words = shlex.split(serve)
    assert words[:3] == ["python", "-m", "nanopersrm.serve"]
    make_adapter(tmp_path / "runs" / "mine" / "adapter", base)
    words = [sys.executable, *words[1:], "--base", str(base.path), "--port", "0"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        assert process.stderr is not None
        told = next((line for line in process.stderr if "serving on" in line), "")
        url = re.search(r"http://\S+", told)
        assert url, told
        with urllib.request.urlopen(url[0], timeout=20) as page:
            assert "Which text sounds like this writer?" in page.read().decode()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


def batch_words(base: Base, folder: Path, text: str) -> list[str]:
    """The arguments of judge.py in a script, with what it needs in the folder, and a tiny base."""
    words = shlex.split(text)
    assert words[:2] == ["python", "judge.py"]
    make_adapter(folder / "runs" / "mine" / "adapter", base)
    (folder / "pairs").mkdir()
    write(folder / "pairs" / "test.jsonl", PAIRS[:2])
    return [*words[2:], "--base", str(base.path), "--dtype", "fp32", "--no-think"]


def test_batch(base, tmp_path):
    """The command as it stands, but for the base, in a process of its own."""
    (text,) = [text for text in SCRIPTS if "--batch" in text and "--ray" not in text]
    words = [sys.executable, str(ROOT / "judge.py"), *batch_words(base, tmp_path, text)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("judged.jsonl: 2 judged, 0 bad; ")
    assert len((tmp_path / "judged.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@with_ray
def test_batch_with_ray(base, tmp_path, monkeypatch):
    words = batch_words(base, tmp_path, script("--batch", "--ray"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the workers too
    done = start(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("judged.jsonl: 2 judged, 0 bad; ")
    assert len((tmp_path / "judged.jsonl").read_text().splitlines()) == 2
