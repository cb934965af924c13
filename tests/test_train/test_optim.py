"""The optimizer: its learning rate, clipping, and state that goes on bit for bit."""

import io
import math

import pytest
import torch
from torch import nn

from nanopersrm import InputError
from nanopersrm.train.optim import OptimConfig, clip, learning_rate, make, update

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
SHAPES = ((16, 300), (300, 16), (7, 5), (1, 1))  # the first two are large enough for 8 bits
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
)


def parameters(seed: int = 0, device: str = "cpu") -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape).to(device)) for shape in SHAPES]


def optimizer_of(weights: list[nn.Parameter], eight_bit: bool) -> torch.optim.Optimizer:
    """On a CPU, where `make` refuses it, bitsandbytes does the same sums in 8 bits, slowly."""
    if eight_bit and weights[0].device.type == "cpu":
        return pytest.importorskip("bitsandbytes").optim.PagedAdamW8bit(weights, weight_decay=0.0)
    return make(weights, OptimConfig(eight_bit=eight_bit))


def train(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int):
    """Steps with gradients that only the number of the step decides."""
    config, scaler = OptimConfig(lr=0.05), torch.amp.GradScaler("cpu", enabled=False)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)
        update(optimizer, scaler, learning_rate(step, 20, config), config.clip)


def test_the_learning_rate_climbs_and_falls():
    config = OptimConfig()
    rates = [learning_rate(step, 102, config) for step in range(102)]
    assert rates[0] == pytest.approx(2e-4 / 6)
    assert rates[5] == max(rates) == 2e-4
    assert rates[53] == pytest.approx(1.1e-4)
    assert rates[-1] == pytest.approx(2e-5)
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_clipping_by_hand():
    for limit, expected in ((1.0, [[0.6, 0.0], [0.0, 0.8]]), (10.0, [[3.0, 0.0], [0.0, 4.0]])):
        weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]  # the third has no gradient
        weights[0].grad, weights[1].grad = torch.tensor([3.0, 0]), torch.tensor([0, 4.0])
        assert clip(weights, limit) == 5.0
        for weight, gradient in zip(weights, expected, strict=False):
            assert weight.grad is not None
            assert weight.grad.tolist() == pytest.approx(gradient, abs=1e-6)
    assert clip(weights[2:], 1.0) == 0.0


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_update_is_clipping_and_a_step(scaled, eight_bit):
    plain, updated = parameters(), parameters()
    by_hand, optimizer = (optimizer_of(weights, eight_bit) for weights in (plain, updated))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    scaler.scale(torch.zeros(()))  # it makes itself ready at its first use
    for weights, scale in ((plain, 1.0), (updated, 8.0 if scaled else 1.0)):
        for weight in weights:
            weight.grad = torch.full_like(weight, scale)
    length = clip(plain, 1.0)
    by_hand.param_groups[0]["lr"] = 0.01
    by_hand.step()
    assert update(optimizer, scaler, 0.01, 1.0) == length == pytest.approx(math.sqrt(9636))
    assert all(torch.equal(a, b) for a, b in zip(plain, updated, strict=True))
    assert all(weight.grad is None for weight in updated)


@pytest.mark.parametrize("scaled", [False, True])
def test_no_weight_moves_when_a_gradient_is_no_number(scaled):
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    scaler.scale(torch.zeros(()))
    for weight in weights:
        weight.grad = torch.full_like(weight, math.inf)
    optimizer = make(weights, OptimConfig())
    if scaled:
        assert not math.isfinite(update(optimizer, scaler, 0.01, 1.0))
    else:
        with pytest.raises(FloatingPointError):
            update(optimizer, scaler, 0.01, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert scaler.get_scale() == (4.0 if scaled else 1.0)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"lr": math.nan}, {"warmup": 1.5}, {"clip": -1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(InputError):
        OptimConfig(**wrong)


def test_eight_bits_need_a_gpu():
    with pytest.raises(InputError):
        make(parameters(), OptimConfig(eight_bit=True))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_run_that_was_saved_goes_on_to_identical_bytes(eight_bit, device):
    whole, again = parameters(device=device), parameters(1, device)
    before, after = optimizer_of(whole, eight_bit), optimizer_of(again, eight_bit)
    train(whole, before, 0, 7)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for weight, master in zip(again, whole, strict=True):
            weight.copy_(master)
    train(whole, before, 7, 12)
    after.load_state_dict(torch.load(file, weights_only=True))
    train(again, after, 7, 12)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
