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


def at_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def parameters(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def in_eight_bits(weights: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """What `make` gives on a GPU; on a CPU bitsandbytes does the same sums, slowly."""
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.optim.PagedAdamW8bit(weights, lr=config.lr, weight_decay=config.weight_decay)


def fused(weights: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def train(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int):
    """Steps with gradients that only the number of the step decides."""
    config = OptimConfig(lr=0.05)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        clip(weights, config.clip)
        at_rate(optimizer, learning_rate(step, 20, config))
        optimizer.step()


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
    def pair() -> list[nn.Parameter]:
        weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
        weights[0].grad, weights[1].grad = torch.tensor([3.0, 0]), torch.tensor([0, 4.0])
        return weights  # the third has no gradient

    def gradient(weight: nn.Parameter) -> list[float]:
        assert weight.grad is not None
        return weight.grad.tolist()

    cut, left, measured = pair(), pair(), pair()
    assert clip(cut, 1.0) == 5.0
    assert gradient(cut[0]) == pytest.approx([0.6, 0.0], abs=1e-6)
    assert gradient(cut[1]) == pytest.approx([0.0, 0.8], abs=1e-6)
    assert clip(left, 10.0) == 5.0
    assert clip(measured, 0.0) == 5.0
    for weights in (left, measured):
        assert gradient(weights[0]) == [3.0, 0.0]
    assert clip([nn.Parameter(torch.zeros(2))], 1.0) == 0.0


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("build", [make, fused, in_eight_bits])
def test_an_update_is_clipping_and_a_step(scaled, build):
    config = OptimConfig()
    plain, updated = parameters(), parameters()
    by_hand, optimizer = build(plain, config), build(updated, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    for weights in (plain, updated):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
    scaler.scale(torch.zeros(()))  # it makes itself ready at its first use
    for weight in updated if scaled else ():
        assert weight.grad is not None
        weight.grad *= 8.0
    length = clip(plain, 1.0)
    at_rate(by_hand, 0.01)
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


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": math.nan},
        {"warmup": 1.5},
        {"floor": -0.1},
        {"weight_decay": -1.0},
        {"clip": math.inf},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(InputError):
        OptimConfig(**wrong)


def test_eight_bits_need_a_gpu():
    with pytest.raises(InputError):
        make(parameters(), OptimConfig(eight_bit=True))


def saved(optimizer: torch.optim.Optimizer) -> dict:
    """Its state, through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("build", [make, fused, in_eight_bits])
@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_that_was_saved_goes_on_to_identical_bytes(build, stop):
    config = OptimConfig(lr=0.05, weight_decay=0.1)
    whole, again = parameters(), parameters(seed=1)
    before, after = build(whole, config), build(again, config)
    train(whole, before, 0, stop)
    state = saved(before)
    with torch.no_grad():
        for weight, master in zip(again, whole, strict=True):
            weight.copy_(master)
    train(whole, before, stop, 12)
    after.load_state_dict(state)
    train(again, after, stop, 12)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("eight_bit", [False, True])
def test_on_a_gpu_it_goes_on_to_identical_bytes(eight_bit):
    config = OptimConfig(lr=0.05, eight_bit=eight_bit)

    def on_gpu(seed: int) -> list[nn.Parameter]:
        torch.manual_seed(seed)
        return [nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((512, 400), (7, 5))]

    def step(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, count: int) -> None:
        for weight in weights:
            weight.grad = torch.sin(torch.arange(weight.numel(), device="cuda") * (count + 1.0))
            weight.grad = weight.grad.view(weight.shape)
        optimizer.step()

    first, second = on_gpu(0), on_gpu(1)
    before, after = make(first, config), make(second, config)
    for count in range(3):
        step(first, before, count)
    after.load_state_dict(saved(before))
    with torch.no_grad():
        for weight, master in zip(second, first, strict=True):
            weight.copy_(master)
    for count in range(3, 6):
        step(first, before, count)
        step(second, after, count)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
