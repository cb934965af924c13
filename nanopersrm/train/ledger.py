"""The ledger: the bytes of a training step, part by part, from sizes alone.

    predict(config, plan)       part -> bytes, at the moment when memory is fullest

Memory is fullest at one of two moments, and the table has a column for each. Both hold all weights;
then either the forward has just ended and log-probabilities are computed from chunks of logits, or
the backward is inside the last block. Below, N packed tokens, s bytes a number (2), w what a norm
keeps a number in (s; on a CPU 4, an fp32 copy), Q = H E, KV = K E, R the rank, L blocks.

**Weights.** The base takes 0.516 or s bytes a weight in the blocks (`quant.py`), s elsewhere. The
adapters have W = L Σ R (in + out) numbers, the sum over the seven matrices of a block: masters 4 W,
copies s W (none where s is 4), gradients 4 W, Adam's two moments 8 W, or 2 (1 + 4/256) W in 8 bits.
With NF4 one matrix at a time is dequantized, into one buffer as large as the largest, s D F.

**What a block keeps for its backward.** Follow a row through it, with adapters on all matrices.
    norm             the sum it read, D w, and its rstd, 4
    q, k, v          their input once, D s; of each adapter x Aᵀ, R s
    rope             nothing of its own; with Qwen3's norm of each head, what came, (Q + KV) w
    attention        q, k, v, out and lse, (2 Q + 2 KV) s + 4 H
    o_proj           out, which is there already; R s. PyTorch's attention on a GPU works segment
                     by segment and lays results end to end: out twice, Q s. flash-attn does not
    norm             D w + 4
    gate, up         their input, D s; 2 R s
    swiglu           gate and up, 2 F s; on a CPU silu(gate) too, F s
    down             their product, F s; R s
On a GPU with flash-attn these are s (4 D + 2 Q + 2 KV + 3 F + 7 R) + 8 + 4 H bytes: 159 KB for
Qwen2.5-7B in bf16 at rank 16. 4,096 rows take 651 MB, 28 blocks 18 GB. The first norm of all keeps
nothing, because nothing below it learns; the norm after the last block makes up for it.

**Recompute.** Instead, a block keeps its input only: D s a row, 29 MB of those 651. All of the
above then exists once, for the one block whose backward runs (its input is its first norm's sum
already), with its result, D s. With offload the inputs wait in the host's memory, and only that
block's is here.

**A block's backward** is fullest where swiglu makes two gradients from one: 3 F s a row is new, F s
has just gone with down's share; and D s for the gradient of the stream. With recompute the MLP's
rows come in tiles of t ≤ 1,024 (`forgetful.py`): what it keeps, (3 F + 3 R) s a row, and those two
gradients exist for t rows only; a tile's result, t D s, and D s a row for their gradient are new.

**Log-probabilities**: hidden states, the rows of them that predict, and U, the gradient of those: D
s each. A chunk of 256 rows or more has logits and coefficients, V (4 + s) a row (on a CPU one takes
the place of the other, V s, beside two fp32 copies of some rows) and its part of U in fp32, 4 D.

**Drawing**, where a plan has prompts, is a moment of its own: no gradients, nothing kept. P prompts
of p tokens become R rows of r: keys and values take 2 KV s L (P p + R r) bytes, 57,344 a token of
Qwen2.5-7B, and P and R are as large as `rows` and `cache_bytes` allow (`rollouts.in_turn`; what
prompts share comes off, which is not counted here). Reading the prompts, in forwards of n tokens
(`sampler.prefill_most`, or one prompt), gate, up and their product are held (on a CPU silu(gate)
too) and four streams, before a reply has any keys: (3 F + 4 D) s n. Later there are the logits of a
token and of the one before, 2 · 4 R V.

What we chose: every row predicts; segments are texts of their own (a prefix shared by branches is
gathered once for each of them, 2 KV s a row, in the block at work). 8-bit moments count here even
though bitsandbytes can page them out. What we left out: the reference adapter of --grpo.beta,
another (4 + s) W; attention, which is fullest where F is below about 2 D, or in a 7B base beyond
some 20,000 rows; the optimizer's temporaries, which come when the rest has gone; PyTorch may round
page-locked host memory up to a power of two.
tests/test_memory.py measures steps against this.
"""

from dataclasses import dataclass

from kernels.logprob import PART, rows_of_chunk
from nanopersrm.model.quant import nf4_bytes
from nanopersrm.model.recompute import tiles
from nanopersrm.model.sampler import prefill_most, reading_bytes
from nanopersrm.model.transformer import ModelConfig

EIGHT_BIT_RUN = 256  # numbers that share a scale in bitsandbytes' 8-bit moments
EIGHT_BIT_LEAST = 4096  # smaller tensors keep fp32 moments there
FULLEST, DRAWING = ("log-probabilities", "backward of a block"), "drawing"


@dataclass(frozen=True)
class Plan:
    """How a step is computed."""

    tokens: int  # N, packed tokens of a micro-batch
    rank: int  # R of the adapters
    width: int  # s, bytes a number: 2 or 4
    nf4: bool
    recompute: bool
    offload: bool
    eight_bit: bool
    host_embedding: bool
    chunk_bytes: int  # of logits
    cuda: bool = True  # the kernels of a GPU, or the CPU's
    flash: bool = False  # flash-attn is installed
    prompt: int = 0  # tokens of a prompt that replies are drawn to; 0: none are
    group: int = 8  # G: replies to a prompt
    rows: int = 8  # replies side by side, at most
    cache_bytes: int = 1 << 50  # of keys and values, which may make them fewer
    reply: int = 0  # tokens of a reply


def matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of the seven matrices of a block."""
    c = config
    Q, KV = c.H * c.E, c.K * c.E
    return [(Q, c.D), (KV, c.D), (KV, c.D), (c.D, Q), (c.F, c.D), (c.F, c.D), (c.D, c.F)]


def base_bytes(config: ModelConfig, nf4: bool, width: int) -> dict[str, int]:
    """As `quant.bytes_of` finds them in a loaded model."""
    c = config
    Q, KV = c.H * c.E, c.K * c.E
    block = sum(nf4_bytes(*m) if nf4 else m[0] * m[1] * width for m in matrices(c))
    biases = c.qkv_bias * (Q + 2 * KV) + c.o_bias * c.D + c.mlp_bias * (2 * c.F + c.D)
    norms = 2 * c.D + 2 * c.E * (c.family == "qwen3")
    return {
        "matrices": c.layers * block,
        "embedding": c.V * c.D * width,
        "head": 0 if c.tied else c.V * c.D * width,
        "norms": (c.layers * (biases + norms) + c.D) * width,
    }


def learned_bytes(config: ModelConfig, plan: Plan) -> dict[str, int]:
    """Adapters, and what learning them takes."""
    parts = [plan.rank * size for m in matrices(config) for size in m] * config.layers
    weights = sum(parts)
    moments = 8 * weights
    if plan.eight_bit:
        moments = sum(
            8 * n if n < EIGHT_BIT_LEAST else 2 * (n + 4 * -(-n // EIGHT_BIT_RUN)) for n in parts
        )
    return {
        "adapter masters": 4 * weights,
        "adapter copies": plan.width * weights if plan.width < 4 else 0,
        "gradients": 4 * weights,
        "moments": moments,
    }


def kept_bytes(config: ModelConfig, plan: Plan) -> int:
    """What one block keeps for its backward, all N rows."""
    c, s = config, plan.width
    Q, KV, w = c.H * c.E, c.K * c.E, s if plan.cuda else 4
    norms = 2 * (c.D * w + 4)
    into = 2 * c.D * s
    attention = (2 * Q + 2 * KV) * s + 4 * c.H
    if plan.cuda and not plan.flash:
        attention += Q * s
    if c.family == "qwen3":
        attention += (Q + KV) * w + (0 if plan.cuda else 4 * (c.H + c.K))
    return plan.tokens * (norms + into + attention + 4 * plan.rank * s + mlp_bytes(c, plan))


def mlp_bytes(config: ModelConfig, plan: Plan) -> int:
    """What a row of an MLP keeps for its backward, its input aside."""
    return ((3 if plan.cuda else 4) * config.F + 3 * plan.rank) * plan.width


def chunk_bytes(config: ModelConfig, plan: Plan) -> int:
    """A chunk of logits and what is computed beside it."""
    V, D, s = config.V, config.D, plan.width
    if plan.cuda:
        each = 4 + s * (s < 4)  # a logit in fp32, and its coefficient
        rows = min(rows_of_chunk(V, each, plan.chunk_bytes), plan.tokens)
        return rows * (V * each + 4 * D)
    rows = min(rows_of_chunk(V, s, plan.chunk_bytes), plan.tokens)
    part = min(max(1, PART // V), rows)  # rows of the two fp32 copies
    return rows * V * s + max(2 * part * V * 4, rows * D * (4 + s * (s < 4)))


def moments(config: ModelConfig, plan: Plan) -> dict[str, dict[str, int]]:
    """Part -> bytes, at each of FULLEST."""
    c, N, s = config, plan.tokens, plan.width
    row = N * c.D * s  # bytes of one (N, D) tensor
    norm = N * (c.D * (s if plan.cuda else 4) + 4)  # what the last norm keeps
    base = base_bytes(c, plan.nf4, s)
    if plan.host_embedding and plan.cuda and not c.tied:
        base["embedding"] = 0
    always = {
        **base,
        **learned_bytes(c, plan),
        "dequantize buffer": max(a * b for a, b in matrices(c)) * s if plan.nf4 else 0,
        "angles": 2 * N * c.E * s,
    }
    block = kept_bytes(c, plan)
    offload = plan.offload and plan.cuda
    inputs = (0 if offload else c.layers) * row if plan.recompute else 0
    at_a_time, tiled = N, 0  # rows of an MLP
    if plan.recompute and tiles(N) > 1:
        at_a_time = -(-N // tiles(N))
        block -= (N - at_a_time) * mlp_bytes(c, plan)
        tiled = row + at_a_time * c.D * s  # their gradient, and a tile's result
    if plan.recompute:
        again = block - (row if plan.cuda or s == 4 else 0)  # its first sum is its input
        at_head = inputs + norm
        at_work = again + row + offload * row
        kept = inputs
    else:
        at_head = c.layers * block
        at_work = block
        kept = at_head - block - norm
    head = {
        "kept for backward": at_head,
        "block at work": 0,
        "hidden states and U": 3 * row,
        "logits": chunk_bytes(c, plan),
    }
    work = {
        "kept for backward": kept,
        "block at work": at_work + row + 2 * at_a_time * c.F * s + tiled,
        "hidden states and U": 0,
        "logits": 0,
    }
    found = {FULLEST[0]: always | head, FULLEST[1]: always | work}
    return found | ({DRAWING: always | drawing_bytes(c, plan)} if plan.prompt else {})


def side_by_side(config: ModelConfig, plan: Plan) -> tuple[int, int]:
    """Prompts that replies are drawn to at a time, and these replies (`rollouts.in_turn`)."""
    most = plan.cache_bytes // (2 * config.layers * config.K * config.E * plan.width)  # tokens
    fitting = most // (plan.prompt + plan.group * plan.reply)
    if prompts := min(plan.rows // plan.group, fitting):
        return prompts, prompts * plan.group
    return 1, max(1, min(plan.group, plan.rows, (most - plan.prompt) // plan.reply))


def drawing_bytes(config: ModelConfig, plan: Plan) -> dict[str, int]:
    """What drawing holds beside the weights, at its fuller moment."""
    c, s = config, plan.width
    prompts, rows = side_by_side(c, plan)
    together = max(1, prefill_most(c, s, plan.cuda) // plan.prompt)  # prompts in one forward
    n = min(prompts, together) * plan.prompt
    token = 2 * c.layers * c.K * c.E * s  # keys and values of one
    streams = n * reading_bytes(c, s, plan.cuda)
    reading = prompts * plan.prompt * token, streams + 4 * prompts * c.V
    later = (prompts * plan.prompt + rows * plan.reply) * token, 2 * 4 * rows * c.V
    both = (reading, "block at work"), (later, "logits")
    (cached, rest), busy = max(both, key=lambda moment: sum(moment[0]))
    none = ("gradients", "angles", "kept for backward", "block at work", "hidden states and U")
    return {**dict.fromkeys(none, 0), "logits": 0, busy: rest, "keys and values": cached}


def predict(config: ModelConfig, plan: Plan) -> dict[str, int]:
    """Part -> bytes at the fuller moment; their sum is the peak of PyTorch's allocations."""
    return max(moments(config, plan).values(), key=lambda parts: sum(parts.values()))


def host_bytes(config: ModelConfig, plan: Plan) -> dict[str, int]:
    """What waits in the host's memory, page-locked."""
    c = config
    away = plan.host_embedding and plan.cuda and not c.tied
    inputs = plan.recompute and plan.offload and plan.cuda
    return {
        "embedding": away * c.V * c.D * plan.width,
        "inputs of blocks": inputs * c.layers * plan.tokens * c.D * plan.width,
    }
