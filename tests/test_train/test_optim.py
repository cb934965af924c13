"""The optimizer: its learning rate, clipping, and state that goes on bit for bit."""

import math

import pytest
import torch
from torch import nn

from nanopersrm import InputError
from nanopersrm.train.optim import (
    OptimConfig,
    clip,
    learning_rate,
    load_scaler,
    load_state_tensors,
    make,
    scaler_numbers,
    set_learning_rate,
    state_tensors,
    update,
)

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
SHAPES = ((16, 300), (300, 16), (7, 5), (1, 1))  # the first two are large enough for 8 bits


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
        set_learning_rate(optimizer, learning_rate(step, 20, config))
        optimizer.step()


@pytest.mark.parametrize("build", [make, fused, in_eight_bits])
@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_that_was_saved_goes_on_to_identical_bytes(build, stop):
    config = OptimConfig(lr=0.05, weight_decay=0.1)
    whole, first, second = parameters(), parameters(), parameters(seed=1)
    train(whole, build(whole, config), 0, 12)

    before = build(first, config)
    train(first, before, 0, stop)
    saved = state_tensors(before)
    masters = [weight.detach().clone() for weight in first]
    train(first, before, stop, 12)  # what was saved is a copy: this changes nothing in it

    after = build(second, config)
    with torch.no_grad():
        for weight, master in zip(second, masters, strict=True):
            weight.copy_(master)
    load_state_tensors(after, saved)
    assert state_tensors(after).keys() == saved.keys()
    train(second, after, stop, 12)
    for once, left, again in zip(whole, first, second, strict=True):
        assert torch.equal(once, left)
        assert torch.equal(once, again)
    ends = state_tensors(before)
    assert all(torch.equal(value, ends[key]) for key, value in state_tensors(after).items())


def test_a_run_without_its_state_ends_elsewhere():
    config = OptimConfig(lr=0.05)
    whole, other = parameters(), parameters()
    train(whole, make(whole, config), 0, 8)
    train(other, make(other, config), 0, 4)
    train(other, make(other, config), 4, 8)
    assert not torch.equal(whole[0], other[0])


def test_state_is_flat_and_plain():
    weights = parameters()
    optimizer = make(weights, OptimConfig())
    assert state_tensors(optimizer) == {}
    train(weights, optimizer, 0, 3)
    saved = state_tensors(optimizer)
    names = ("step", "exp_avg", "exp_avg_sq")
    assert set(saved) == {f"{i}.{name}" for i in range(len(SHAPES)) for name in names}
    assert saved["2.exp_avg"].shape == (7, 5)
    assert saved["2.step"].item() == 3
    train(weights, optimizer, 3, 4)
    assert saved["2.step"].item() == 3


def test_eight_bits_are_a_quarter_of_the_bytes():
    weights = parameters()[:2]
    eight, full = in_eight_bits(weights, OptimConfig()), make(weights, OptimConfig())
    train(weights, eight, 0, 1)
    train(weights, full, 0, 1)
    small, large = (
        sum(t.nbytes for t in state_tensors(optimizer).values()) for optimizer in (eight, full)
    )
    assert small < 0.27 * large


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update({"9.step": torch.zeros(())}), "parameter 9: expected less than 4"),
        (lambda s: s.pop("1.exp_avg"), "parameter 1: expected exp_avg, exp_avg_sq, step, got exp_"),
        (lambda s: s.update({"0.exp_avg": torch.zeros(3)}), r"0.exp_avg: expected .*\(16, 300\)"),
    ],
)
def test_state_of_another_run_is_one_line(change, said):
    weights = parameters()
    optimizer = make(weights, OptimConfig())
    train(weights, optimizer, 0, 1)
    saved = state_tensors(optimizer)
    change(saved)
    with pytest.raises(InputError, match=said) as error:
        load_state_tensors(make(parameters(), OptimConfig()), saved)
    assert "\n" not in str(error.value)


def test_one_step_by_hand():
    """lr 0.1, gradient 3: m̂ = 3 and √v̂ = 3, so the step is lr; then the decay, 0.1 · 0.5 · 2."""
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = make([weight], OptimConfig(lr=0.1, weight_decay=0.5))
    weight.grad = torch.tensor([3.0])
    optimizer.step()
    assert weight.item() == pytest.approx(2 - 0.1 - 0.1, abs=1e-6)


def test_the_learning_rate_climbs_and_falls():
    config = OptimConfig()
    rates = [learning_rate(step, 102, config) for step in range(102)]
    assert rates[0] == pytest.approx(2e-4 / 6)
    assert rates[5] == max(rates) == 2e-4
    assert rates[53] == pytest.approx(1.1e-4)
    assert rates[-1] == pytest.approx(2e-5)
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_short_runs_learn_too(steps, warmup):
    config = OptimConfig(warmup=warmup, floor=0.0)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    assert all(0 <= rate <= config.lr for rate in rates)
    assert rates[0] > 0


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
    set_learning_rate(by_hand, 0.01)
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
        with pytest.raises(FloatingPointError, match="a gradient of length inf"):
            update(optimizer, scaler, 0.01, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert scaler.get_scale() == (4.0 if scaled else 1.0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_is_seen(value):
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, value, 1.0])
    assert not math.isfinite(clip([weight], 1.0))


def test_the_length_is_the_same_every_time():
    weights = parameters()
    for weight in weights:
        weight.grad = torch.randn(weight.shape)
    assert len({clip(weights, 0.0) for _ in range(20)}) == 1


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
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: expected"):
        OptimConfig(**wrong)


def test_eight_bits_need_a_gpu():
    with pytest.raises(InputError, match="needs a GPU"):
        make(parameters(), OptimConfig(eight_bit=True))


def test_what_is_not_fp32_is_refused():
    with pytest.raises(AssertionError, match="fp32"):
        make([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], OptimConfig())


def test_the_loss_scale_goes_on_as_plain_numbers():
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def step(scaling: torch.amp.GradScaler, gradient: float) -> None:
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scaling.scale(weight.sum() * gradient).backward()
        scaling.step(optimizer)
        scaling.update()

    before = scaler()
    for gradient in (1.0, math.inf, 1.0, 1.0):
        step(before, gradient)
    numbers = scaler_numbers(before)
    assert all(isinstance(value, (int, float)) for value in numbers.values())
    assert numbers["scale"] == 512.0
    after = scaler()
    load_scaler(after, numbers)
    step(before, 1.0)
    step(after, 1.0)
    assert before.get_scale() == after.get_scale() == 1024.0  # the third good step in a row
    off = torch.amp.GradScaler("cpu", enabled=False)
    load_scaler(off, scaler_numbers(off))
    with pytest.raises(InputError, match="was on before and is off"):
        load_scaler(off, numbers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_paged_eight_bits_go_on_to_identical_bytes():
    config = OptimConfig(lr=0.05, eight_bit=True)

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
    load_state_tensors(after, state_tensors(before))
    assert getattr(after.state[second[0]]["state1"], "is_paged", False)
    with torch.no_grad():
        for weight, master in zip(second, first, strict=True):
            weight.copy_(master)
    for count in range(3, 6):
        step(first, before, count)
        step(second, after, count)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
