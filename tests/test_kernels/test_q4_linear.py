"""The 4-bit form of the embedded base: the same weights as in 16 bits, and as exact as bf16."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanopersrm.model.cache import Layout
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Linear, Model
from nanopersrm.model.weights import load

CPU = torch.device("cpu")
TEXT = Path(__file__).parents[2] / "data" / "demo" / "edmund" / "1.txt"

pytestmark = pytest.mark.base


def log_probs(model: Model, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.logits(model(ids, Layout.of([len(ids)]))).log_softmax(-1)


def test_rounding_the_blocks_costs_less_than_bf16_itself(smollm):
    """Mean KL from fp32 with the file's own numbers: bf16 scales alone, then bf16 arithmetic."""
    ids = torch.tensor(Tokenizer.load(smollm).encode(TEXT.read_text(encoding="utf-8")))
    exact = log_probs(load(smollm, torch.float32, CPU), ids)
    half = load(smollm, torch.bfloat16, CPU)
    rounded = load(smollm, torch.float32, CPU)
    for name, parameter in rounded.named_parameters():
        owner = half.get_submodule(name.removesuffix(".weight")) if "proj" in name else None
        if isinstance(owner, Linear) and owner.q4 is not None:
            steps, zeros = owner.q4.steps_and_zeros.float().unbind(-1)  # (in / 32, out)
            blocks = parameter.view(len(parameter), -1, 32)
            codes = (blocks - (zeros - 8 * steps).t()[..., None]) / steps.t()[..., None]
            again = (codes.round() - 8) * steps.t()[..., None] + zeros.t()[..., None]
            parameter.copy_(again.view_as(parameter))

    def divergence(other: Tensor) -> float:
        return float((exact.exp() * (exact - other)).sum(-1).mean())

    scales, arithmetic = divergence(log_probs(rounded, ids)), divergence(log_probs(half, ids))
    assert 0 < scales < 3e-4
    assert scales < arithmetic / 4


def test_few_rows_and_many_rows_mean_the_same_weights(smollm):
    """Fed token by token (4-bit form) or at once (16-bit form), the logits differ by rounding."""
    model = load(smollm, torch.bfloat16, CPU)
    if model.get_submodule("layers.0.mlp.up_proj").q4 is None:
        pytest.skip("no 4-bit product on this machine")
    ids = torch.tensor(Tokenizer.load(smollm).encode(TEXT.read_text(encoding="utf-8")))[:40]
    plain = log_probs(model, ids)
    model.pack()
    cache = model.new_cache()
    cache.grow([0], len(ids))
    with torch.inference_mode():
        steps = [model.logits(model(i[None], cache.step([1]))).log_softmax(-1) for i in ids]
    gap = (plain.exp() * (plain - torch.cat(steps))).sum(-1).mean()
    assert 0 < float(gap) < 4e-3
