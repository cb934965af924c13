"""What a run leaves: the adapter as it ended, and as it was when it judged best."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file
from test_train_rft import here as rft
from test_train_sft import brief, files, given, here, one_thread  # noqa: F401

from nanopersrm.judge import adapter_settings
from nanopersrm.train import checkpoint, trial


@pytest.fixture
def scored(monkeypatch):
    """scored(*shares): what the trials of the next run find, in their order."""
    hold = trial.hold
    shares: list[float] = []

    def held(*more):
        found, replies = hold(*more)
        return replace(found, accuracy=shares.pop(0)), replies

    monkeypatch.setattr(trial, "hold", held)
    return shares.extend


def test_the_best_trial_is_left_too(given, scored, tmp_path, brief, capsys):  # noqa: F811
    small = ("--warmup-steps", "1", "--steps", "3", "--eval-every", "1", "--save-every", "1")
    asked = (*given, "--out", tmp_path, *small, "--keep-last", "1")
    scored((0.5, 0.25, 0.75, 0.5))  # before, and after steps 2, 3 and 4
    assert here(*asked) == 0
    said = "best is the adapter of step 3, whose trial went best (75.0% at once)"
    assert said in capsys.readouterr().out
    last, best = files(tmp_path / "adapter"), files(tmp_path / "best")
    other = {name for name, data in best.items() if last[name] != data}
    assert last.keys() == best.keys()
    assert other == {"adapter_model.safetensors"}
    kept = checkpoint.best(tmp_path / "checkpoints")
    assert kept is not None
    assert kept.step == 3
    found = load_file(tmp_path / "best" / "adapter_model.safetensors")
    for name, tensor in found.items():
        own = name.removeprefix("base_model.model.model.").replace(".weight", "")
        assert tensor.equal(kept.tensors[f"judge.{own.replace('lora_', '')}"])
    assert adapter_settings.read(tmp_path / "best") == adapter_settings.read(tmp_path / "adapter")

    assert here(*asked, "--resume") == 0  # nothing is left to do: the same again
    assert files(tmp_path / "best") == best
    assert said in capsys.readouterr().out

    scored((0.0, 0.25, 0.75, 0.75))  # of equal ones the later, which is the last
    assert here(*asked, "--overwrite") == 0
    assert "went best" not in capsys.readouterr().out
    assert not (tmp_path / "best").exists()
    assert (tmp_path / "adapter").exists()

    scored((0.75, 0.25, 0.75, 0.5))
    assert here(*asked, "--overwrite") == 0
    assert "no trial went better than the one before training" in capsys.readouterr().out
    assert not (tmp_path / "best").exists()


def test_what_is_not_ours_stays(given, scored, tmp_path, brief, capsys):  # noqa: F811
    """A folder of that name, and a checkpoint that has been damaged."""
    small = ("--warmup-steps", "1", "--steps", "3", "--eval-every", "1", "--save-every", "1")
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "thesis.txt").write_text("mine")
    scored((0.5, 0.25, 0.75, 0.5))
    assert here(*given, "--out", tmp_path, *small) == 0
    assert "best holds other files, so it is left alone" in capsys.readouterr().out
    assert (tmp_path / "best" / "thesis.txt").read_text() == "mine"

    (tmp_path / "best" / "thesis.txt").unlink()
    state = tmp_path / "checkpoints" / "step-000003" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    assert here(*given, "--out", tmp_path, *small, "--resume") == 0
    out = capsys.readouterr().out
    assert "no earlier step is looked at: " in out
    assert "To judge with it" in out


@pytest.mark.base
def test_reinforcement_leaves_its_best_too(scored, tmp_path, capsys):
    few = ("--eval-pairs", "2", "--reason-pairs", "0", "--steps", "3", "--eval-every", "1")
    scored((0.25, 0.75, 0.5, 0.5))
    assert rft("--preset", "tiny", "--out", tmp_path, *few) == 0
    assert "best is the adapter of step 1, whose trial went best" in capsys.readouterr().out
    last, best = files(tmp_path / "adapter"), files(tmp_path / "best")
    assert {name for name in last if last[name] != best[name]} == {"adapter_model.safetensors"}
