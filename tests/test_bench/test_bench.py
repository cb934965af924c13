"""Both sides of the bench do the same work: equal losses, equal updates from the same replies."""

import importlib.util

import pytest
import torch

from nanopersrm.bench import __main__ as bench
from nanopersrm.bench import peers

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 131}  # fmt: skip
HERE = all(importlib.util.find_spec(name) for name in ("trl", "peft", "transformers"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HERE, reason="needs the extra bench")]


@pytest.fixture
def config(monkeypatch) -> bench.Config:
    monkeypatch.setitem(bench.SHAPES, "smollm2-135m", bench.SHAPES["smollm2-135m"] | TINY)
    monkeypatch.setattr(bench, "EXEMPLARS", 40)
    monkeypatch.setattr(bench, "JOBS", ((1, 2),))
    return bench.Config(
        shape="smollm2-135m", dtype="fp32", prompt=20, reply=5, group=3, rounds=2, rank=4, lr=1e-2
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_sft_losses_are_equal(config, rows):
    ours, adapted = bench.training_sides(config)
    pairs = bench.sft_pairs(config)
    peer = peers.PeftSide(adapted, config.lr, rows, autocast=False)
    losses = [ours.sft_step(pairs) for _ in range(3)]
    texts = [text for pair in pairs for text in pair]
    assert losses == pytest.approx([peer.step(texts) for _ in range(3)], rel=1e-4)
    assert losses[2] < losses[0]


def test_the_same_replies_give_the_same_update(config):
    ours, adapted = bench.training_sides(config)
    (prompt,) = config.ids(1, config.prompt).tolist()
    drawn: list[list[int]] = []

    def rewards(replies):
        drawn.extend(replies)
        return [bench.reward(ids) for ids in replies]

    trainer = peers.trl_trainer(adapted, [prompt], rewards, lambda _: None, lambda: None, config)
    trainer.train()
    assert [len(ids) for ids in drawn] == [config.reply] * config.group
    ours.learn(prompt, drawn)
    for name, (_, B) in ours.lora.masters.items():
        theirs = adapted.get_submodule(f"base_model.model.model.{name}").lora_B["default"].weight
        assert B.abs().max() > 0
        assert torch.allclose(B, theirs, atol=0.02 * config.lr)


def test_every_case_has_its_rows(config, capsys):
    bench.main(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    for case, sides in (("prefill", 2), ("decode", 2), ("sft", 3), ("grpo, training", 2)):
        assert sum(line.startswith(f"| {case}, ") for line in lines) == sides, case
