"""Checkpoints: whole or not there, whatever happens while they are written."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanopersrm import InputError
from nanopersrm.train import checkpoint
from nanopersrm.train.checkpoint import best, check_room, clear, latest, save

ROOT = Path(__file__).resolve().parents[2]
TENSORS = {
    "layers.0.A": torch.randn(4, 6),
    "layers.0.B": torch.randn(6, 4).t(),  # not contiguous
    "half": torch.randn(5).bfloat16(),
    "random": torch.get_rng_state(),
    "0.step": torch.tensor(7),
    "none": torch.zeros(0, 3),
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    facts = {"score": 0.25, "order": [3, 1, 2], "scale": 65536.0, "name": "é", "none": None}
    path = save(folder, 120, TENSORS, facts)
    assert path == folder / "step-000120"
    assert names(path) == ["facts.json", "state.safetensors"]
    found = latest(folder)
    assert found is not None
    assert (found.step, found.facts, found.path) == (120, facts, path)
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        save(tmp_path / folder, 3, TENSORS, {"score": None})
    for name in ("state.safetensors", "facts.json"):
        first, second = (tmp_path / folder / "step-000003" / name for folder in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


def test_nothing_is_there_yet(tmp_path):
    assert latest(tmp_path) is best(tmp_path) is latest(tmp_path / "missing") is None
    clear(tmp_path / "missing")


def test_the_last_two_and_the_best_are_kept(tmp_path):
    scores = {10: 0.5, 20: 0.9, 30: 0.9, 40: None, 50: 0.1, 1000000: 0.2}
    for step, score in scores.items():
        save(tmp_path, step, {"a": torch.tensor([step])}, {"score": score})
    assert names(tmp_path) == ["step-000030", "step-000050", "step-1000000"]
    newest, top = latest(tmp_path), best(tmp_path)
    assert newest is not None
    assert top is not None
    assert (newest.step, top.step) == (1000000, 30)
    assert top.tensors["a"].tolist() == [30]


def test_without_scores_none_is_the_best(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, {}, {}, keep_last=1)
    assert names(tmp_path) == ["step-000003"]
    assert best(tmp_path) is None


def test_a_step_can_be_saved_again(tmp_path):
    for value in (1, 2):
        save(tmp_path, 5, {"a": torch.tensor([value])}, {"value": value})
    found = latest(tmp_path)
    assert found is not None
    assert (found.tensors["a"].item(), found.facts) == (2, {"value": 2})
    assert names(tmp_path) == ["step-000005"]


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-000009").write_text("a file")
    for step in (1, 2):
        save(tmp_path, step, {}, {}, keep_last=1)
    clear(tmp_path)
    assert names(tmp_path) == ["step-000009", "step-notes"]


# The process dies just before the n-th call that changes the disk. Each try is a fork of a process
# that has torch already: to start one anew takes seconds.
DYING = """
import importlib, os, sys, torch
from nanopersrm.train import checkpoint

def scenario(folder, deadly):
    def write(step, value, score=None):
        checkpoint.save(folder, step, {"a": torch.full((100,), value)}, {"score": score})

    write(1, 1.0, score=0.9)
    write(2, 2.0)
    write(3, 3.0)
    count = 0
    def dying(call):
        def wrapped(*given, **named):
            nonlocal count
            count += 1
            if count == deadly:
                os._exit(9)
            return call(*given, **named)
        return wrapped
    for call in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, call, dying(getattr(os, call)))
    checkpoint.save_file = dying(checkpoint.save_file)
    write(3, 4.0)
    write(5, 5.0)

died = 0
while True:
    child = os.fork()
    if child == 0:
        scenario(checkpoint.Path(sys.argv[1]) / str(died), died + 1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        break
    assert code == 9, code
    died += 1
print(died)
"""


def test_a_process_that_dies_anywhere_leaves_whole_checkpoints(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    died = int(done.stdout)
    assert died > 25
    for deadly in range(died + 1):
        folder = tmp_path / str(deadly)
        found, top = latest(folder), best(folder)
        assert found is not None
        assert top is not None
        assert found.step in (3, 5)
        values = {3: (3.0, 4.0), 5: (5.0,)}[found.step]
        assert found.tensors["a"].unique().tolist() in [[value] for value in values]
        assert top.step == 1
        assert not [name for name in names(folder) if name.startswith(".")]
        save(folder, 6, {"a": torch.zeros(1)}, {})
        assert names(folder) in (
            ["step-000001", "step-000003", "step-000006"],
            ["step-000001", "step-000005", "step-000006"],
        )


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.safetensors", _cut),
        ("state.safetensors", _flip),
        ("state.safetensors", Path.unlink),
        ("state.safetensors", lambda path: path.write_bytes(b"")),
        ("facts.json", _cut),
        ("facts.json", Path.unlink),
        ("facts.json", lambda path: path.write_text("[1]")),
        ("facts.json", lambda path: path.write_text('{"step": 2}')),
        ("facts.json", lambda path: path.write_text('{"step": 3, "sha256": "", "facts": {}}')),
        ("facts.json", lambda path: path.write_bytes(b"\xff\xfe")),
    ],
)
def test_a_damaged_checkpoint_is_one_line_with_the_file(name, damage, tmp_path):
    for step in (1, 2):
        save(tmp_path, step, TENSORS, {"score": step / 10})
    damage(tmp_path / "step-000002" / name)
    for read in (latest, best):
        with pytest.raises(InputError, match=f"step-000002/{name}: a damaged") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)
    save(tmp_path, 3, TENSORS, {}, keep_last=1)  # but the run goes on
    shutil.rmtree(tmp_path / "step-000002", ignore_errors=True)
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 3


@pytest.mark.parametrize("call", ["save_file", "write_json"])
def test_a_full_disk_is_one_line_and_leaves_what_was(call, tmp_path, monkeypatch):
    save(tmp_path, 1, TENSORS, {})

    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, call, full)
        with pytest.raises(InputError, match=r"step-000002: cannot be written \(No space left"):
            save(tmp_path, 2, TENSORS, {})
    assert names(tmp_path) == ["step-000001"]
    save(tmp_path, 2, TENSORS, {})
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_score_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="score nan"):
        save(tmp_path, 1, {}, {"score": float("nan")})


def test_room_is_checked(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "run"
    check_room(folder, 10)
    assert names(folder) == []
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_room(folder, 1_500_000_000)
    with pytest.raises(InputError, match=r"run: expected 2.50 GB of free disk, found 1.50 GB"):
        check_room(folder, 2_500_000_000)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    for folder in (tmp_path / "run", tmp_path / "run" / "deeper"):
        with pytest.raises(InputError, match=r"expected a folder|Not a directory"):
            check_room(folder, 0)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot be written"):
            check_room(tmp_path, 0)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_that_not_even_root_can_make():
    with pytest.raises(InputError, match=r"^/proc/nanopersrm: cannot be written"):
        check_room(Path("/proc/nanopersrm"), 0)
