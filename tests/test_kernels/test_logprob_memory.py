"""How much memory the log-probabilities of 8,192 tokens take, beside inputs and results.

Counted are all allocations of PyTorch's own CPU allocator while the operation runs, temporaries
inside of its calls included, as the profiler reports them. Not counted is what oneDNN and MKL keep
for themselves.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kernels._dispatch import INTERPRETED
from kernels.logprob import CHUNK_BYTES, logprob, rows_of_chunk

N, V, D = 8192, 152_064, 32
LOGITS = N * V * 4  # bytes of all of them in fp32
pytestmark = pytest.mark.skipif(INTERPRETED, reason="counts what the CPU path allocates; slow")


def peak(run) -> int:
    """The most bytes held at one moment of `run()`, beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        run()
    events = [e for e in made.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_the_count_sees_temporaries():
    x = torch.ones(1000, 250)  # a million bytes
    assert 2_000_000 <= peak(lambda: (x + 1).add(1)) < 2_100_000
    assert 1_000_000 <= peak(lambda: [(x + 1, None)[1] for _ in range(5)]) < 1_100_000


@pytest.mark.parametrize(
    ("dtype", "trained", "rows"),
    [
        (torch.bfloat16, False, N),
        (torch.float32, False, 600),  # three chunks, the last one ragged, are enough to see
        (torch.bfloat16, True, 600),  # the peak: U, the part that grows with N, is small at D 32
        (torch.float32, True, 600),
    ],
)
def test_forward_and_backward_stay_under_six_percent_of_the_logits(dtype, trained, rows):
    """U and the gradients are in the count; the head's, V D in fp32, when it is trained."""
    hidden = torch.randn(rows, D).to(dtype).requires_grad_()
    head = torch.randn(V, D).to(dtype).requires_grad_(trained)
    ids = torch.randint(V, (rows,))
    most = peak(lambda: logprob(hidden, head, ids)[0].sum().backward())
    assert hidden.grad is not None
    assert most <= 0.06 * LOGITS


def test_and_so_does_qwen_on_a_gpu():
    """There a chunk is fp32 logits and 16-bit coefficients; U and dL/dhidden are 16-bit."""
    width, rows = 3584, rows_of_chunk(V, 4 + 2, CHUNK_BYTES["cuda"])
    U = N * width * 2
    wide = rows * width * 4  # a chunk's rows of U before they are rounded
    found = N * 4 * 4
    assert rows == 256
    assert rows * V * 6 + U + wide + found <= 0.06 * LOGITS  # forward: 298 MB of 4,983
    assert 2 * U + found <= 0.06 * LOGITS  # backward
