"""Which form of an operation runs, and that the model runs on the kernels and on nothing else: with
each of them switched to its reference, loss and gradients move by rounding only."""

import sys

import pytest
import torch
from oracle import INTERPRETED
from torch import Tensor

from kernels import _dispatch, decode_attention, rms_norm, rope, sample, swiglu
from kernels.logprob import logprob
from nanopersrm.model.cache import Layout
from nanopersrm.model.sampler import Decoder, SamplingConfig
from nanopersrm.model.transformer import Model, ModelConfig

interpreted = pytest.mark.skipif(not INTERPRETED, reason="the references run anyway")
# the file whose `on_triton` decides
OPS = {"rms_norm": rms_norm, "rope": rope, "swiglu": swiglu}
OPS["logprob"] = sys.modules["kernels.logprob"]
LAYOUT = Layout.of([5, 3, 4], [-1, 0, 0])  # a prompt and two replies
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])


def tiny(family: str) -> Model:
    config = ModelConfig.of(
        {"model_type": family, "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "vocab_size": 61,
         "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": True,
         "rope_theta": 1e4}
    )  # fmt: skip
    model = Model(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.3 if parameter.ndim > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def loss_and_gradients(model: Model) -> list[Tensor]:
    hidden = model(IDS, LAYOUT)
    log_probs, entropies = logprob(hidden[4:11], model.head(), IDS[5:])
    loss = -(log_probs.mean())
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), entropies.detach(), *grads]


@interpreted
@pytest.mark.parametrize(
    ("family", "op"),
    [("llama", "all"), ("qwen2", "all"), ("qwen3", "all"), *(("qwen3", op) for op in OPS)],
)
def test_a_reference_instead_of_a_kernel_changes_rounding_only(family, op, monkeypatch):
    model = tiny(family)
    kernels = loss_and_gradients(model)
    calls = []
    for module in OPS.values() if op == "all" else [OPS[op]]:
        monkeypatch.setattr(module, "on_triton", lambda x: bool(calls.append(x)))
    references = loss_and_gradients(model)
    assert calls, "the model does not use the operation"
    for x, y in zip(kernels, references, strict=True):
        assert (x - y).abs().max() <= 2e-5 * max(y.abs().max().item(), 1.0)


@interpreted
def test_the_sampler_draws_the_same_replies(monkeypatch):
    """Prefill, shared-prefix decode and the draw, kernels against references."""
    model = tiny("qwen3")
    config = SamplingConfig(max_new=5, seed=3)

    def replies() -> list[tuple[list[int], list[float]]]:
        decoder = Decoder(model, [[3, 1, 4, 1, 5], [9, 2, 6]])
        decoder.fork([2, 2], config.max_new)
        return [(reply.ids, reply.log_probs) for reply in decoder.generate(config)]

    kernels = replies()
    calls = []
    for module in (rms_norm, rope, swiglu, decode_attention, sample):
        monkeypatch.setattr(module, "on_triton", lambda x: bool(calls.append(x)))
    for (ids, log_probs), (other, others) in zip(kernels, replies(), strict=True):
        assert ids == other
        assert log_probs == pytest.approx(others, abs=2e-5)
    assert calls


def test_triton_runs_on_the_current_device_only(monkeypatch):
    """Triton would launch on cuda:0 with the addresses of cuda:1."""

    class Card:  # what the choice looks at
        is_cuda, device = True, torch.device("cuda:1")

    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setattr(_dispatch, "_fit", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _dispatch.on_triton(Card())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(AssertionError, match="current device"):
        _dispatch.on_triton(Card())
    assert not _dispatch.on_triton(torch.empty(1))
