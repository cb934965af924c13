"""train_sft.py --adapter: a run that goes on from what another one has learned."""

import shutil

from test_train_sft import JUDGE, brief, curve, files, given, here, one_thread, whole  # noqa: F401

from nanopersrm.train import checkpoint, trial


def test_what_was_learned_is_where_it_goes_on(whole, given, tmp_path, capsys):  # noqa: F811
    """The first trial is the last one of the run before; its style and rank stay."""
    begun, out = whole / "adapter", tmp_path / "more"
    rank = given.index("--lora.rank")
    assert here(*given[:rank], "--adapter", begun, "--out", out) == 0
    told, aside = capsys.readouterr()
    assert f"{begun} has learned already: a tenth of --optim.lr may be enough" in aside
    assert f"with {begun} on cpu" in told
    assert f"steps: 0 of style, {JUDGE} of" in told
    was, now = curve(whole)[-1], checkpoint.latest(out / "checkpoints")
    assert now is not None
    first, last = now.facts["trials"][0], now.facts["trials"][-1]
    numbers = trial.Trial(**first).numbers()
    assert numbers == {key: was[key] for key in numbers}
    assert last["loss"] < first["loss"]
    before, after = files(begun), files(out / "adapter")
    assert before["style/adapter_model.safetensors"] == after["style/adapter_model.safetensors"]
    assert before["adapter_config.json"] == after["adapter_config.json"]  # of rank 4
    assert before["adapter_model.safetensors"] != after["adapter_model.safetensors"]
    once = files(out / "adapter")
    assert here(*given[:rank], "--adapter", begun, "--out", out, "--resume") == 0
    assert files(out / "adapter") == once
    assert "may be enough" not in capsys.readouterr().err  # a run goes on with its own rate
    slow = "--optim.lr", "2e-4", "--steps", "1"
    assert here(*given[:rank], "--adapter", begun, "--out", tmp_path / "slow", *slow) == 0
    assert "may be enough" not in capsys.readouterr().err


def test_what_an_adapter_to_go_on_from_must_be(whole, given, tmp_path, capsys):  # noqa: F811
    begun = str(whole / "adapter")

    def refused(*more: str) -> str:
        assert here(*given, *more, "--out", tmp_path / "none") == 2
        assert not files(tmp_path / "none")
        return capsys.readouterr().err

    assert "no such folder" in refused("--adapter", str(tmp_path / "nowhere"))
    assert "no adapter comes with the base" in refused("--adapter", "default")
    shutil.copytree(begun, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/style")
    assert "expected the folder style" in refused("--adapter", str(tmp_path / "bare"))
    assert "expected a folder, got an empty name" in refused("--adapter", "")
    said = refused("--adapter", begun, "--lora.rank", "8")
    assert f"--lora.rank: {begun}, which is learned on, has 4, got 8; leave it out" in said
