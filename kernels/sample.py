"""Draw one token a row by the Gumbel-max trick, with noise that depends on the row's own key only.

To draw from p = softmax(logits / temperature), add an independent Gumbel number g = -log(-log u) to
each scaled logit and take the largest; the winner is i with probability p[i] exactly (Gumbel 1954;
Maddison et al., arXiv 1411.0030). Dividing by E = -log u, an exponential number, before the
logarithm picks the same winner:

    argmax_i (logits[i] / temperature + g[i])  =  argmax_i p[i] / E[i]

Worked example: p = (0.7, 0.3), E = (1.4, 0.3): 0.5 against 1.0, so the second is drawn. What is
computed, with top = max_i logits[i]:

    x[i] = (logits[i] - top) / temperature        at most 0: no temperature can overflow it
    share[i] = exp(x[i])                          total = Σ_i share[i], p[i] = share[i] / total
    id = argmin_i share[i] / log u[i]             log p[id] = x[id] - log total

A draw has no gradient, so there is no backward; training asks for its log-probabilities again.

u comes from a *counter-based* generator, a hash of (key, i), as in Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011). There is no state: a row's draw is the same whoever its
neighbours are, in any order, and after a resume. The two 32-bit keys of a row come from (seed,
sample, position) by `draw_key`; the hash is multiply-xorshift rounds in wrapping 32-bit arithmetic.
u keeps 2⁻²³ away from 0 and 1, so events rarer than about 1e-7 are not told apart.

Why a kernel: as PyTorch calls this reads or writes each of the R · V numbers 41 times, 27 of them
for the hash. The kernel reads a logit once and keeps the rest in registers. For 8 rows of 152,064:
4.9 MB instead of 200.

    first kernel, grid (R, splits)    a split's top, total (under its own top), winner and its logit
    second kernel, grid (R,)          the same of the row, from those of its splits

Decoding has 1 to 64 rows, which alone would leave most of a GPU idle: hence the splits. Their width
is fixed and the second kernel goes through them in one order, so a row's bits do not depend on R.

Numerics: fp32. The noise of the kernel has the bits of `uniform`. Its winner may be another than
the reference's where two values of share / E are closer than their roundings, at most (3.5 |x| + 5)
· 2⁻²³ of either; exact ties go to the first index in both. Left out: skipping tokens that cannot
win; picking them out took longer on a CPU than hashing them all.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from kernels._dispatch import jit, on_triton, rows_of, tl, triton, wide

# The multipliers of lowbias32 (Wellons, "Prospecting for hash functions", 2018).
ROUND_1, ROUND_2 = 0x7FEB352D, 0x846CA68B
GOLDEN = 0x9E3779B9  # 2³² / golden ratio: spreads neighbouring counters
SCALE = 2.0**-32 * (1 - 2.0**-22)  # int32 -> (-1/2, 1/2): ends 2⁻²³ short of both
AT_ONCE = 1 << 18  # numbers that the reference hashes at a time: its two buffers stay in the cache
SPLIT = 1024  # columns a program: 8 a thread of 4 warps, and 48 programs a row of SmolLM2's
WARPS = 4


def _signed(word: int) -> int:
    """A 32-bit word as torch.int32 sees it."""
    return (word & 0xFFFFFFFF) - (1 << 32 if word & 0x80000000 else 0)


def _mix64(word: int) -> int:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014): 64 bits in, 64 mixed bits out."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & (1 << 64) - 1
    return word ^ (word >> 31)


def draw_key(seed: int, sample: int, position: int) -> tuple[int, int]:
    """(seed, sample, position) -> the two keys of one draw, as signed 32-bit ints."""
    word = 0
    for part in (seed, sample, position):
        word = _mix64(word ^ (part & (1 << 64) - 1) + 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    return _signed(word), _signed(word >> 32)


def uniform(keys: Tensor, width: int) -> Tensor:
    """keys (R, 2) int32 -> u (R, width) fp32 in (0, 1): hashes of (the row's keys, i).

    Word by word, with >>> shifting zeros in and all products modulo 2³²:

        x = i · GOLDEN ^ key 1;  x = (x ^ x >>> 16) · ROUND_1;  x = x ^ x >>> 15 ^ key 2
        x = x · ROUND_2;         x = x ^ x >>> 16;              u = x · SCALE + 1/2, x as int32
    """
    first = keys[:, :1].clone()
    x = _counters(width, keys.device) ^ _shift_xor(first, 16, torch.empty_like(first))  # (R, width)
    room = torch.empty_like(x)
    x = _shift_xor(x.mul_(_signed(ROUND_1)), 15, room).bitwise_xor_(keys[:, 1:])
    x = _shift_xor(x.mul_(_signed(ROUND_2)), 16, room)
    return room.view(torch.float32).copy_(x).mul_(SCALE).add_(0.5)


@cache
def _counters(width: int, device: torch.device) -> Tensor:
    """(width,): what all rows have in common. A shift of a ^ b is that of a ^ that of b, so the
    first round can be had for the counters and the keys apart."""
    x = torch.arange(width, dtype=torch.int32, device=device).mul_(_signed(GOLDEN))  # wraps
    return _shift_xor(x, 16, torch.empty_like(x))


def _shift_xor(x: Tensor, shift: int, room: Tensor) -> Tensor:
    """x ^ x >>> shift, in place; `room` is overwritten. (torch's int32 shift copies the sign.)"""
    torch.bitwise_right_shift(x, shift, out=room)
    return x.bitwise_xor_(room.bitwise_and_((1 << 32 - shift) - 1))


def _first_least(x: Tensor) -> Tensor:
    """x (R, V) -> (R,): the first index of each row's least number.

    Two steps, because a minimum is vectorised on the CPU and one with its index is not: the block
    that has it, then the place in the block."""
    block = math.gcd(x.shape[-1], 64)
    blocks = x.unflatten(-1, (-1, block))
    at = blocks.amin(-1).min(-1).indices
    inside = blocks[torch.arange(len(x), device=x.device), at].min(-1).indices
    return at * block + inside


def sample_reference(logits: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits (R, V), keys (R, 2) int32 -> ids (R,) int64 and log-probabilities (R,)."""
    R, V = logits.shape
    top = logits.amax(-1, keepdim=True)
    share = logits - top  # (R, V)
    if temperature not in (0, 1):
        share.div_(temperature)
    total = share.exp_().sum(-1)
    if temperature == 0:
        ids = _first_least(-logits)
    else:  # share / E with E = -log u: the sign is left out, so the smallest wins
        ids = torch.empty(R, dtype=torch.int64, device=logits.device)
        step = max(AT_ONCE // V, 1)
        for start in range(0, R, step):
            some = slice(start, start + step)
            ids[some] = _first_least(share[some].div_(uniform(keys[some], V).log_()))
    drawn = logits.gather(-1, ids[:, None]) - top
    if temperature not in (0, 1):
        drawn.div_(temperature)
    return ids, drawn.squeeze(-1) - total.log()


@jit
def _uniform(
    columns, key_1, key_2,
    GOLDEN: tl.constexpr = GOLDEN, ROUND_1: tl.constexpr = ROUND_1,
    ROUND_2: tl.constexpr = ROUND_2, SCALE: tl.constexpr = SCALE,
):  # fmt: skip
    """`uniform` at `columns`, bit for bit; keys are int32."""
    x = (columns.to(tl.uint32) * GOLDEN) ^ key_1.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * ROUND_1
    x = (x ^ (x >> 15) ^ key_2.to(tl.uint32, bitcast=True)) * ROUND_2
    x = x ^ (x >> 16)
    # "+ 0" keeps the compiler from fusing product and sum, which PyTorch rounds one by one.
    return tl.fma(x.to(tl.int32, bitcast=True).to(tl.float32), SCALE, 0.0) + 0.5


@jit
def _sample_forward_kernel(
    Logits, Keys, Top, Total, Winner, Best,
    logits_stride, V, temperature,
    NOISE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program, SPLIT columns of a row, read once and held in registers."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    columns = split * SPLIT + tl.arange(0, SPLIT)
    logits = Logits + row * logits_stride
    z = wide(tl.load(logits + columns, mask=columns < V, other=float("-inf")))
    top = tl.max(z)
    low = tl.where(top == float("-inf"), 0.0, top)  # nothing but -inf: all shares are 0, not NaN
    share = tl.exp((z - low) / temperature)
    if NOISE:
        u = _uniform(columns, tl.load(Keys + row * 2), tl.load(Keys + row * 2 + 1))
        at = tl.argmin(share / tl.log(u), 0)  # the first, if several are least
    else:
        at = tl.argmax(z, 0)
    # A split past the end offers the last token again, which changes nothing; so may one with NaN.
    winner = tl.minimum(split * SPLIT + at, V - 1)
    place = row * splits + split
    tl.store(Top + place, top)
    tl.store(Total + place, tl.sum(share))
    tl.store(Winner + place, winner)
    tl.store(Best + place, tl.load(logits + winner))  # from the cache: it has just been read


@jit
def _sample_merge_kernel(
    Top, Total, Winner, Best, Keys, Ids, LogProbs,
    splits, temperature,
    NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, one row: the best of its splits' winners, under the top of the whole row."""
    row = tl.program_id(0).to(tl.int64)
    start, columns = row * splits, tl.arange(0, BLOCK)
    inside = columns < splits
    tops = tl.load(Top + start + columns, mask=inside, other=float("-inf"))
    totals = tl.load(Total + start + columns, mask=inside, other=0.0)
    best = wide(tl.load(Best + start + columns, mask=inside, other=float("-inf")))
    top = tl.max(tops)
    low = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(totals * tl.exp((tops - low) / temperature))
    if NOISE:
        winners = tl.load(Winner + start + columns, mask=inside, other=0)
        u = _uniform(winners, tl.load(Keys + row * 2), tl.load(Keys + row * 2 + 1))
        at = tl.argmin(tl.exp((best - low) / temperature) / tl.log(u), 0)
    else:
        at = tl.argmax(best, 0)
    place = start + tl.minimum(at, splits - 1)
    drawn = wide(tl.load(Best + place))
    tl.store(Ids + row, tl.load(Winner + place).to(tl.int64))
    tl.store(LogProbs + row, (drawn - low) / temperature - tl.log(total))


def _shape(V: int) -> tuple[int, int]:
    """Splits of a row, and the block that holds their results: functions of V alone."""
    splits = triton.cdiv(V, SPLIT)
    if splits > 16:  # whole sixteens let the second kernel load 128 bits at a time
        splits = triton.cdiv(splits, 16) * 16
    return splits, max(triton.next_power_of_2(splits), 128)  # 4 or more a thread of one warp


def _sample(logits: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`sample_reference` by the two kernels."""
    logits, keys = rows_of(logits), keys.contiguous()
    R, V = logits.shape
    splits, block = _shape(V)
    top, total, best = torch.empty(3, R, splits, dtype=torch.float32, device=logits.device)
    winner = torch.empty(R, splits, dtype=torch.int32, device=logits.device)
    ids = torch.empty(R, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(R, dtype=torch.float32, device=logits.device)
    if R:
        noise = temperature != 0
        divisor = float(temperature) if noise else 1.0
        _sample_forward_kernel[(R, splits)](
            logits, keys, top, total, winner, best, logits.stride(0), V, divisor,
            NOISE=noise, SPLIT=SPLIT, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        _sample_merge_kernel[(R,)](
            top, total, winner, best, keys, ids, log_probs, splits, divisor,
            NOISE=noise, BLOCK=block, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return ids, log_probs


@torch.no_grad()
def sample(logits: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits (R, V) fp32, keys (R, 2) int32 -> ids (R,) int64 and log-probabilities (R,).

    The log-probability is that of the drawn id under softmax(logits / temperature). Temperature 0
    takes the largest logit and reports its log-probability at temperature 1.
    """
    assert logits.dim() == 2, f"expected logits (R, V), got {logits.shape}"
    assert logits.shape[1], "no token to draw: V is 0"
    assert logits.dtype == torch.float32, f"expected logits in float32, got {logits.dtype}"
    assert keys.shape == (len(logits), 2), f"expected keys ({len(logits)}, 2), got {keys.shape}"
    assert keys.dtype == torch.int32, f"expected keys in int32, got {keys.dtype}"
    form = _sample if on_triton(logits) else sample_reference
    return form(logits, keys, temperature)
