"""The ledger of drawing: what is held beside the weights, and how many replies find room."""

import json
from dataclasses import replace

import pytest
import torch
from test_memory import CPU, PLAN, QWEN_7B, SIZES, Step, peak

from kernels._dispatch import INTERPRETED
from nanopersrm.model import weights
from nanopersrm.model.sampler import Decoder, SamplingConfig
from nanopersrm.model.transformer import ModelConfig
from nanopersrm.train import memory
from nanopersrm.train.ledger import (
    DRAWING,
    FULLEST,
    base_bytes,
    learned_bytes,
    moments,
    side_by_side,
)
from nanopersrm.train.memory import Config, main, plan_of
from nanopersrm.train.rollouts import RolloutConfig, in_turn


@pytest.mark.skipif(INTERPRETED, reason="the sampler keeps other things there")
@pytest.mark.parametrize(("vocabulary", "reply"), [(500, 6), (20_000, 6), (500, 300)])
def test_drawing_takes_what_was_predicted(vocabulary, reply):
    """Fullest while it reads, in its logits, or in the keys of its replies: 10 % near."""
    sizes = SIZES | {"vocab_size": vocabulary}
    plan = replace(PLAN, prompt=200, group=4, rows=16, reply=reply)
    step = Step(sizes, plan)
    prompts = torch.randint(vocabulary, (4, 200)).tolist()

    def draw() -> None:
        decoder = Decoder(step.model, prompts)
        decoder.fork([4] * 4, reply)
        decoder.generate(SamplingConfig(max_new=2))

    columns = moments(ModelConfig.of(sizes), plan)
    stays = sum(step.stays().values()) - step.stays()["gradients"]
    measured, rest = peak(draw), sum(columns[DRAWING].values()) - stays
    assert abs(rest / measured - 1) < 0.1, f"predicted {rest:,}, measured {measured:,}"


@pytest.mark.parametrize("cache_mb", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("rows", [1, 3, 8, 30, 100])
def test_as_many_side_by_side_as_are_drawn(rows, cache_mb):
    """The forecast and the sampler count alike, where no two prompts share anything."""
    model = weights.random(SIZES, torch.float32, CPU)
    prompts = torch.randint(500, (13, 150), generator=torch.Generator().manual_seed(0)).tolist()
    config = RolloutConfig(8, rows, 70, cache_mb=cache_mb)
    plan = replace(PLAN, prompt=150, group=8, rows=rows, reply=70, cache_bytes=cache_mb << 20)
    found = side_by_side(ModelConfig.of(SIZES), plan)
    parts = in_turn(model, prompts, config)
    assert found[0] == max(len(some) for some, _ in parts)
    assert found[1] == max(len(some) * len(numbers) for some, numbers in parts)


@pytest.mark.parametrize(
    ("preset", "prompt", "reply", "expected"),
    [
        ("24gb", 1792, 256, (16, 128)),  # rows are the limit
        ("24gb", 2048, 1024, (6, 48)),
        ("12gb", 1792, 256, (4, 32)),
        ("12gb", 2048, 1024, (1, 8)),
        ("8gb", 1792, 256, (3, 24)),
        ("8gb", 2048, 1024, (1, 8)),
        ("8gb", 2048, 4096, (1, 2)),  # of a group of 8: four times two
    ],
)
def test_presets_draw_what_finds_room(preset, prompt, reply, expected):
    plan = plan_of(Config(preset=preset, prompt=prompt, reply=reply))
    found = side_by_side(QWEN_7B, plan)
    assert found == expected
    held = moments(QWEN_7B, plan)[DRAWING]["keys and values"]
    assert held == (found[0] * prompt + found[1] * reply) * 57_344 <= plan.cache_bytes


def test_no_text_is_cut():
    """A prompt with its reply is a micro-batch, even where the budget is smaller."""
    assert plan_of(Config(preset="8gb", prompt=4096, reply=1024)).tokens == 5120
    assert plan_of(Config(preset="8gb", tokens=5000, prompt=2048, reply=1024)).tokens == 5000
    assert plan_of(Config(preset="8gb", reply=1024)).tokens == 4096


@pytest.mark.parametrize(
    ("name", "figures"),
    [("24gb", "8.83 9.83 48 11.02"), ("12gb", "5.74 5.51 8 6.72"), ("8gb", "5.58 5.51 8 6.56")],
)
def test_the_figures_of_the_docstring(name, figures, capsys):
    """Rows of replies to long prompts, and the floor of the smallest preset."""
    main(Config(preset=name, prompt=2048, reply=1024, json=True))
    found = json.loads(capsys.readouterr().out)
    training, drawing = max(found["sums"][m] for m in FULLEST), found["sums"][DRAWING]
    rows = side_by_side(QWEN_7B, plan_of(Config(preset=name, prompt=2048, reply=1024)))[1]
    told = [f"{training / 1e9:.2f}", f"{drawing / 1e9:.2f}", str(rows)]
    assert [*told, f"{found['total'] / 1e9:.2f}"] == figures.split()
    row = next(line for line in (memory.__doc__ or "").splitlines() if line[4:].startswith(name))
    assert row.split()[1:] == figures.split()
    floor = plan_of(Config(preset="8gb", tokens=1))
    always = {**base_bytes(QWEN_7B, True, 2), **learned_bytes(QWEN_7B, floor), "embedding": 0}
    held = sum(always.values()) + 2 * 18_944 * 3584
    assert f"{held / 1e9:.2f} {(1.05 * held + 0.7e9) / 1e9:.2f}" == "5.08 6.03"
