"""Which preset a machine gets, that presets say how and never what, and what a step needs."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from fixtures import CPU
from torch.profiler import ProfilerActivity, profile

from nanopersrm import InputError
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.transformer import ModelConfig
from nanopersrm.model.weights import SHAPES, random
from nanopersrm.train.presets import PRESETS, SIZES, memory_estimate, preset_for, resolve_preset


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [(None, "cpu"), (140, "24gb"), (21.5, "12gb"), (10.7, "8gb"), (4.0, "8gb")],
)
def test_a_card_gets_the_largest_that_fits(gigabytes, name):
    assert preset_for(None if gigabytes is None else int(gigabytes * 1e9)) == name


def test_smaller_cards_do_less_at_a_time():
    for larger, smaller in pairwise(PRESETS[name] for name in ("24gb", "12gb", "8gb")):
        assert larger.budget > smaller.budget
        assert larger.rows > smaller.rows
    assert all(preset.batch_pairs % 2 == 0 for preset in PRESETS.values())  # both twins


def test_flags_change_a_preset():
    flags = {"budget": 7, "recompute": False, "steps": None, "out": "elsewhere", "seed": 3}
    changed = replace(PRESETS["24gb"], budget=7, recompute=False)
    assert resolve_preset("24gb", flags) == changed
    for name in (*SIZES, "twin_pairs"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')}"):
            resolve_preset("tiny", {name: 0})


def test_the_presets_fit_their_cards():
    """7 billion weights; 0.7 GB are left for the CUDA context."""
    sizes = ModelConfig.of(SHAPES["qwen2.5-7b"])
    for preset in PRESETS.values():
        if preset.card_gb is not None:
            total = sum(memory_estimate(sizes, 16, preset, 2).values())
            assert 4.5e9 < total < preset.card_gb * 1e9 - 0.7e9, f"{total:,}"
    parts = memory_estimate(sizes, 16, PRESETS["12gb"], 2)
    assert parts["weights"] / 1e9 == pytest.approx(4.5, abs=0.1)  # 3.37 in NF4, a head of 1.09


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_is_near_a_measured_step(recompute):
    """Activations of one forward on a CPU, by PyTorch's own count of allocations."""
    sizes = SHAPES["smollm2-135m"] | {"vocab_size": 512, "num_hidden_layers": 4}
    preset = replace(PRESETS["cpu"], budget=512, recompute=recompute, chunk_mb=1)
    model = random(sizes, torch.float32, CPU, False, 0).train()
    lora = Lora(model, LoraConfig(rank=8), 0)
    lora.on(model)
    ids, layout = torch.randint(512, (preset.budget,)), Layout.of([preset.budget])
    model(ids, layout, recompute=recompute).sum().backward()  # warm
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        hidden = model(ids, layout, recompute=recompute)
    kept = sum(event.self_cpu_memory_usage for event in seen.events())
    del hidden
    estimate = memory_estimate(model.config, 8, preset, 4)["kept for the backward"]
    if recompute:  # without the block at work, which its backward computes
        estimate -= memory_estimate(
            model.config, 8, replace(preset, recompute=False), 4
        )["kept for the backward"] // 4  # fmt: skip
    assert 0.6 < kept / estimate < 1.6, f"estimated {estimate:,}, measured {kept:,}"
