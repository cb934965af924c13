"""The page of a run: whole, safe, and honest about what is missing."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nanopersrm import InputError
from nanopersrm.train import report
from nanopersrm.train.report import Config, flatten, panels, read_metrics

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "link", "br", "hr", "img", "input"}
FETCHING = {
    "script",
    "img",
    "iframe",
    "object",
    "embed",
    "audio",
    "video",
    "source",
    "form",
    "base",
}
HOSTILE = (
    '</pre></details><script>alert(1)</script><img src="http://evil.example/x" onerror=alert(1)>'
    "<style>@import url(http://evil.example/x.css)</style><!-- ]]> & &amp; \x00 \ufffd"
)


class Page(HTMLParser):
    """Tags must nest, nothing may be fetched."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def make(folder: Path, lines: list[dict[str, Any]] | None = None, **facts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if lines is None:
        lines = [
            {"step": i, "phase": "judge", "loss": 1 / i, "lr": 1e-4, "memory": 2e9 + i}
            for i in range(1, 30)
        ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if facts:
        (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def drawn(folder: Path) -> tuple[Page, str]:
    assert report.run(Config(folder)) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    return Page(text), text


def test_a_run_becomes_one_page(tmp_path, capsys):
    folder = make(
        tmp_path / "sft",
        config={"base": "smollm2", "lora": {"rank": 16, "targets": ["q", "k"]}},
        parts=[{"command": "python train_sft.py --out 'a b'", "from_step": None}],
        commit="abc+changes",
    )
    (folder / "replies").mkdir()
    for step in (100, 999999, 1000000, 50):
        (folder / "replies" / f"step-{step:06d}.txt").write_text(f"reply of {step}")
    page, _ = drawn(folder)
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert page.texts["h1"] == ["sft"]
    assert page.texts["figcaption"] == ["loss (judge)", "learning rate", "memory"]
    assert page.texts["pre"] == ["reply of 1000000", "reply of 999999", "reply of 100"]
    table = dict(zip(page.texts["th"], page.texts["td"], strict=True))
    assert table["lora.rank"] == "16"
    assert table["lora.targets"] == '["q", "k"]'
    assert table["parts.1.command"] == "python train_sft.py --out 'a b'"
    assert table["commit"] == "abc+changes"


def test_nothing_is_fetched_whatever_the_replies_say(tmp_path):
    folder = make(tmp_path / "<run>&", config={"<b>": HOSTILE}, parts=HOSTILE)
    lines = [{"step": 1, "phase": HOSTILE, "loss": 1.0, f"{HOSTILE}_x": 2.0, "why": HOSTILE}]
    make(folder, [*lines, {"step": 2, "phase": "<i>", "loss": 1.0}])
    (folder / "replies").mkdir()
    (folder / "replies" / "step-000001.txt").write_text(HOSTILE, encoding="utf-8")
    (folder / "replies" / "step-000002.txt").write_bytes(b"\xff\xfe half a character")
    page, text = drawn(folder)
    assert not {tag for tag, _ in page.tags} & FETCHING
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert attributes.get("href", "data:,") == "data:,", tag
    assert HOSTILE.replace("\x00", "") in "".join(page.texts["pre"]).replace("\x00", "")
    assert "<script" not in text
    assert "@import" not in text.split("</style>")[0]
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_light_dark_and_small_screens(tmp_path):
    _, text = drawn(make(tmp_path))
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text


def test_every_number_has_its_chart():
    lines: list[dict[str, Any]] = [
        {"step": 1, "phase": "style", "loss": 3.0, "lr": 1e-4},
        {"step": 2, "phase": "judge", "loss": 2.0, "loss_imitation": 1.5, "reward": 0.1},
        {"step": 3, "phase": "judge", "reward_format": 1, "kl": 0.0, "tokens_per_second": 900},
        {"step": 3, "phase": "judge", "validation_loss": 1.0, "validation_twin_accuracy": 0.4},
        {"step": 4, "phase": "judge", "memory": 2e9, "memory_peak": 3e9, "seconds": 2.0},
        {"step": 5, "phase": "judge", "gradient_norm": 1.0, "names": ["a"], "fine": True, "s": "x"},
    ]
    found = {p.title: [s.name for s in p.series] for p in panels(lines)}
    assert list(found.items()) == [
        ("loss (style)", ["loss"]),
        ("loss (judge)", ["loss", "loss imitation"]),
        ("validation loss", ["validation loss"]),
        ("validation twin accuracy", ["validation twin accuracy"]),
        ("reward", ["reward", "reward format"]),
        ("kl", ["kl"]),
        ("learning rate", ["lr"]),
        ("gradient norm", ["gradient norm"]),
        ("speed", ["tokens per second"]),
        ("memory", ["memory", "memory peak"]),
        ("time of a step", ["seconds"]),
    ]
    memory = panels(lines)[-2]
    assert (memory.unit, memory.from_zero) == ("GB", True)
    assert memory.series[0].points == ((4, 2.0),)


def test_what_is_no_number_is_a_gap(tmp_path):
    big = 10**400
    text = (
        '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": null}\n{"step": 3, "loss": NaN}\n'
        '{"step": 4, "loss": -Infinity}\n{"step": 6, "loss": 2}\n'
        f'{{"step": 5, "loss": {big}}}\n'  # out of order
    )
    (make(tmp_path) / "metrics.jsonl").write_text(text)
    (panel,) = panels(read_metrics(tmp_path))
    assert [y for _, y in panel.series[0].points] == [1.0, None, None, None, None, 2]
    drawn(tmp_path)


def test_a_half_written_last_line_is_left_out(tmp_path):
    with open(make(tmp_path) / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 30))


@pytest.mark.parametrize(
    "line", ["nonsense", "[1]", '{"loss": 1}', '{"step": "1"}', '{"step": 0.5}']
)
def test_a_wrong_line_is_named(line, tmp_path):
    path = make(tmp_path) / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: expected a JSON object"):
        read_metrics(tmp_path)


def one_line(capsys) -> str:
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("nanopersrm.report: error: ")
    return said.err


def test_every_mistake_is_one_line(tmp_path, capsys):
    assert report.run(Config(tmp_path / "missing")) == 2
    assert "missing: expected the folder of a run" in one_line(capsys)
    assert report.run(Config(tmp_path)) == 2
    assert "expected a run with metrics.jsonl, found none" in one_line(capsys)
    for empty in ("", "\n\n", '{"step": 1'):
        (tmp_path / "metrics.jsonl").write_text(empty)
        assert report.run(Config(tmp_path)) == 2
        assert "expected steps, found none" in one_line(capsys)
    make(tmp_path)
    for wrong in ("{", "[]"):
        (tmp_path / "config.json").write_text(wrong)
        assert report.run(Config(tmp_path)) == 2
        assert "config.json: expected a JSON object" in one_line(capsys)
    (tmp_path / "config.json").unlink()
    assert report.run(Config(tmp_path, out=tmp_path / "metrics.jsonl" / "page.html")) == 2
    assert "page.html: cannot be written" in one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_half_a_character_becomes_a_question_mark(tmp_path):
    """JSON may hold one, as \\ud800; UTF-8 may not."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "a\\ud800b", "loss": 1.0}\n')
    assert report.run(Config(tmp_path)) == 0
    assert "a?b" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_steps_without_numbers_are_a_page_too(tmp_path):
    page, _ = drawn(make(tmp_path, [{"step": 3, "phase": "style"}]))
    assert "up to step 3, style" in page.texts["p"]


def test_settings_are_flat():
    nested = {"a": {"b": {"c": 1}}, "list": [1, 2], "objects": [{"x": None}], "empty": {}}
    assert flatten(nested) == {"a.b.c": "1", "list": "[1, 2]", "objects.1.x": "null", "empty": "{}"}


def test_the_command_needs_no_torch(tmp_path):
    make(tmp_path)
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    words = [sys.executable, "-m", "nanopersrm.train.report"]

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
        return subprocess.run([*words, *more], cwd=ROOT, env=path, capture_output=True, text=True)

    shown = call("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "report.html in that folder" in " ".join(shown.stdout.split())
    done = call(str(tmp_path), "--out", str(tmp_path / "page.html"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "page.html").exists()
    failed = call(str(tmp_path / "missing"))
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
