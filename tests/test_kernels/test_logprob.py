"""log p and entropy by chunks against the full matrix of logits; both ways of the backward."""

import pytest
import torch
from oracle import BF16, FP16, FP32, INTERPRETED, KINDS, gappy, no_worse_than_plain, spread, strided
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kernels.logprob as logprob_file
from kernels.linear import Adapter
from kernels.logprob import logprob, logprob_reference

# N, V, D: one block and several, ragged and full, one chunk and several.
SHAPES = [(1, 1, 1), (1, 7, 3), (4, 32, 8), (6, 33, 8), (9, 70, 16)]
OPS = [logprob, logprob_reference]


@pytest.fixture(autouse=True)
def small(monkeypatch, request):
    """Chunks of 4 rows, blocks of 32 columns, parts of 2 rows: tiny inputs cross every edge."""
    if "six_percent" in request.node.name:
        return
    monkeypatch.setattr("kernels.logprob.LEAST_ROWS", 4)
    monkeypatch.setattr("kernels.logprob.BLOCK", 32)
    monkeypatch.setattr("kernels.logprob.PART", 150)


def plain(hidden, head, ids, temperature, A=None, B=None, scale=0.0) -> tuple[Tensor, Tensor]:
    """The formula in the type of its inputs, rounding after each step."""
    z = hidden @ head.T
    if A is not None:
        z = z + scale * ((hidden @ A.T) @ B.T)
    log_p = torch.log_softmax(z / temperature, -1)
    return log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def narrow(outs: tuple[Tensor, Tensor], like: Tensor) -> tuple[Tensor, ...]:
    """In the type of `like`: what can be asked where the logits were rounded to it (on a CPU)."""
    return tuple(out.to(like.dtype) for out in outs)


def some(N: int, V: int, D: int, dtype=FP32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a few units: peaked, but not on one token."""
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    return spread(N, D, dtype=dtype), spread(V, D, dtype=dtype, seed=1, size=2 / D**0.5), ids


@pytest.mark.parametrize("layout", [Tensor.contiguous, strided, gappy])
@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_head(shape, device, dtype, layout):
    hidden, head, ids = some(*shape, dtype)
    head = layout(head).to(device)
    no_worse_than_plain(
        lambda x, i: narrow(logprob(x, head, i, 0.7, chunk_bytes=1), x),
        lambda x, i: (lambda a, b: (a, b.detach()))(*plain(x, head.to(x.dtype), i, 0.7)),
        [layout(hidden), ids],
        device,
    )


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_trained(shape, device, dtype):
    """dL/d of hidden, head, A and B, for a loss in log p and in the entropy."""
    hidden, head, ids = some(*shape, dtype)
    A = spread(2, shape[2], dtype=dtype, seed=4)
    B = spread(shape[1], 2, dtype=dtype, seed=5, size=0.3)
    no_worse_than_plain(
        lambda x, w, i, A, B: narrow(logprob(x, w, i, 1.3, Adapter(A, B, 0.5), True, 1), x),
        lambda x, w, i, A, B: plain(x, w, i, 1.3, A, B, 0.5),
        [hidden, strided(head), ids, A, B],
        device,
    )


TRAINED = [
    (which, with_adapter)
    for which in ("hidden", "entropy", "head", "A", "B", "all")
    for with_adapter in (False, True)
    if with_adapter or which not in ("A", "B")
]


@pytest.mark.parametrize(("which", "with_adapter"), TRAINED)
def test_backward_against_finite_differences(which, with_adapter):
    N, V, D, R = 6, 35, 3, 2
    hidden, head, ids = (x.double() if x.is_floating_point() else x for x in some(N, V, D))
    A, B = spread(R, D, seed=4).double(), spread(V, R, seed=5).double()
    for name, x in {"hidden": hidden, "head": head, "A": A, "B": B}.items():
        x.requires_grad_(which in (name, "all") or (name, which) == ("hidden", "entropy"))

    def op(hidden, head, A, B):
        adapter = Adapter(A, B, 0.5) if with_adapter else None
        outs = logprob(hidden, head, ids, 0.8, adapter, which in ("entropy", "all"), chunk_bytes=1)
        return tuple(out for out in outs if out.requires_grad)

    assert len(op(hidden, head, A, B)) == 1 + (which in ("entropy", "all"))
    assert torch.autograd.gradcheck(op, (hidden, head, A, B), fast_mode=INTERPRETED)


@pytest.mark.parametrize("op", OPS)
def test_worked_example(op):
    hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    log_probs, entropies = op(hidden, head, torch.tensor([1]))
    assert log_probs.tolist() == pytest.approx([-0.4076], abs=5e-5)
    assert entropies.tolist() == pytest.approx([0.8324], abs=5e-5)
    log_probs.sum().backward()
    assert hidden.grad[0].tolist() == pytest.approx([-0.2447, 0.3348], abs=5e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_no_rows(trained):
    hidden = torch.empty(0, 8, requires_grad=True)
    head = spread(5, 8).requires_grad_(trained)
    log_probs, entropies = logprob(hidden, head, torch.empty(0, dtype=torch.int64))
    assert log_probs.shape == entropies.shape == (0,)
    log_probs.sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert not trained or head.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates 16-bit stores")
def test_small_upstream_gradients_survive(dtype):
    """Divided by 10⁵ tokens and halved in rank: in fp16 such coefficients alone would be 0."""
    hidden, head, ids = some(6, 40, 8, dtype)
    grads = []
    for size in (1.0, 2.0**-20):
        w = head.float().requires_grad_()  # keeps the gradient of a cast in fp32
        log_probs, _ = logprob(hidden, w.to(dtype), ids)
        (log_probs.sum() * size).backward()
        grads.append(w.grad / size)
    # fp16 itself holds the second result, to a quarter of its smallest step, 2⁻²⁴
    near = 2.0**-24 / 2.0**-20 if dtype == FP16 else 1e-6
    torch.testing.assert_close(grads[1], grads[0], rtol=0.02, atol=near)


def rows(logits: Tensor, ids: Tensor, inverse=1.0) -> logprob_file.Rows:
    made = logprob_file.empty_rows(logits)
    logprob_file.statistics(logits, ids, inverse, made)
    return made


def test_impossible_tokens_and_huge_logits():
    inf = float("inf")
    logits = torch.full((4, 70), -inf)  # the first two blocks of row 0 hold nothing possible
    logits[0, 66:68] = 5.0
    logits[1] = -3e4  # all equal: log p = -log 70
    logits[2, 3], logits[2, 40] = 3e4, -3e4  # certain
    logits[3, :2] = torch.tensor([0.0, 3.0]).log()[1] * torch.tensor([0.0, 1.0])  # 1 to 3
    ids = torch.tensor([66, 69, 3, 2])
    found = rows(logits, ids)
    assert found.log_probs.tolist() == pytest.approx([-0.693147, -4.248495, 0.0, -inf])
    assert found.entropies.tolist() == pytest.approx([0.693147, 4.248495, 0.0, 0.562335], abs=1e-6)
    for upstream in (None, (torch.ones(4), torch.zeros(4)), (torch.zeros(4), torch.ones(4))):
        c = torch.empty_like(logits)
        logprob_file.coefficients(logits, ids, 1.0, found, upstream, c)
        assert c.isfinite().all()
        assert c.sum(-1).tolist() == pytest.approx([0, 0, 0, 0], abs=1e-5)


def peak(run) -> int:
    """The most bytes held at one moment of `run()`, beyond those held before, by PyTorch's own CPU
    allocator, temporaries inside of its calls included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        run()
    events = [e for e in made.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="counts what the CPU path allocates")
@pytest.mark.parametrize(
    ("dtype", "trained", "rows"),
    [
        (torch.bfloat16, False, 8192),
        (torch.float32, False, 600),  # three chunks, the last one ragged, are enough to see
        (torch.bfloat16, True, 600),  # the peak: U, the part that grows with N, is small at D 32
        (torch.float32, True, 600),
    ],
)
def test_forward_and_backward_stay_under_six_percent_of_the_logits(dtype, trained, rows):
    """U and the gradients are in the count; the head's, V D in fp32, when it is trained."""
    V, all_logits = 152_064, 8192 * 152_064 * 4  # bytes of 8,192 rows in fp32
    hidden = torch.randn(rows, 32).to(dtype).requires_grad_()
    head = torch.randn(V, 32).to(dtype).requires_grad_(trained)
    ids = torch.randint(V, (rows,))
    most = peak(lambda: logprob(hidden, head, ids)[0].sum().backward())
    assert hidden.grad is not None
    assert most <= 0.06 * all_logits
