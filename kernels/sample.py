"""Draw one token a row by the Gumbel-max trick, with noise that depends on the row's own key only.

To draw from p = softmax(logits / temperature), add an independent Gumbel number g = -log(-log u) to
each scaled logit and take the largest; the winner is i with probability p[i] exactly (Gumbel 1954;
Maddison et al., arXiv 1411.0030). Dividing by E = -log u, an exponential number, before the
logarithm picks the same winner:

    argmax_i (logits[i] / temperature + g[i])  =  argmax_i p[i] / E[i]

Worked example: p = (0.7, 0.3), E = (1.4, 0.3): 0.5 against 1.0, so the second is drawn.

What we chose: u comes from a *counter-based* generator, a hash of (key, i), as in Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3" (SC 2011). There is no state: a row's draw is the same
whoever its neighbours are, in any order, and after a resume. The caller derives the two 32-bit keys
of a row from (seed, sample, position) with `draw_key`; the hash of an element is multiply-xorshift
rounds in wrapping 32-bit arithmetic, which a GPU has too. u keeps 2⁻²³ away from 0 and 1, so g lies
between -2.8 and 15.9 and events rarer than about 1e-7 are not told apart.

Where to read next: `nanopersrm/sampler.py`.
"""

import torch
from torch import Tensor

# The multipliers of lowbias32 (Wellons, "Prospecting for hash functions", 2018).
ROUND_1, ROUND_2 = 0x7FEB352D, 0x846CA68B
GOLDEN = 0x9E3779B9  # 2³² / golden ratio: spreads neighbouring counters


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
    """keys (R, 2) int32 -> u (R, width) fp32 in (0, 1): hashes of (the row's keys, i)."""
    x = torch.arange(width, dtype=torch.int32, device=keys.device) * _signed(GOLDEN)  # wraps
    x = x ^ keys[:, :1]  # (R, width)
    x = _shift_xor(x, 16).mul_(_signed(ROUND_1))
    x = _shift_xor(x, 15).bitwise_xor_(keys[:, 1:]).mul_(_signed(ROUND_2))
    x = _shift_xor(x, 16)
    return x.float().mul_(2.0**-32 * (1 - 2.0**-22)).add_(0.5)  # ends 2⁻²³ short of 0 and of 1


def _shift_xor(x: Tensor, shift: int) -> Tensor:
    """x ^ (x >> shift), in place, with zeros shifted in (torch's int32 shift copies the sign)."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << 32 - shift) - 1))


def sample(logits: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits (R, V) fp32, keys (R, 2) int32 -> ids (R,) int64 and log-probabilities (R,).

    The log-probability is that of the drawn id under softmax(logits / temperature). Temperature 0
    takes the largest logit and reports its log-probability at temperature 1.
    """
    top, best = logits.max(-1, keepdim=True)
    scaled = logits - top  # (R, V), the largest is 0: no temperature can overflow it
    if temperature not in (0, 1):
        scaled = scaled.div_(temperature)
    share = scaled.exp()
    total = share.sum(-1)
    if temperature == 0:
        ids = best[:, 0]
    else:  # p / E with E = -log u: the sign is left out, so the smallest wins
        ids = share.div_(uniform(keys, share.shape[-1]).log_()).min(-1).indices
    log_probs = scaled.gather(-1, ids[:, None]).squeeze(-1) - total.log()
    return ids, log_probs
