"""The transformer: one decoder for the Llama, Qwen2/2.5 and Qwen3 families, on flat tokens.

    h = embed(ids)                                               (N, D)
    for each block:   h = h + o(attention(rope(q(x)), rope(k(x)), v(x)))      x = rms_norm(h)
                      h = h + down(silu(gate(x)) · up(x))                     x = rms_norm(h)
    logits = head(rms_norm(h))                                   (N, V)

Each sum is made by the norm that follows it (`kernels/rms_norm.py`: one pass instead of two), so a
block takes and returns two tensors: the residual stream h, and y, still to be added to it.

The families differ in three switches only: Qwen2 has a bias on q, k and v; Qwen3 normalises each
head of q and k; the head is either the embedding again (tied) or a matrix of its own.

`forward` takes flat rows and says nothing of batches: a `Layout` packs texts and shared prefixes in
one forward with gradients, a `KVCache` continues earlier forwards without (see `cache.py`).

Recompute (activation checkpointing, Chen et al., arXiv 1604.06174): of all that a block computes on
the way, only its input h is kept, one (N, D) tensor: about 1/20, for a third more work. What is
left is the one block whose backward runs, most of it its MLP. So its rows come in tiles of at most
1,024: the first pass keeps nothing, and the backward computes each tile again with its gradient.

Parameters keep their checkpoint names. Left out: sliding windows, mixture of experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import attention
from kernels.linear import can_pack, linear, pack
from kernels.logprob import wide_mm
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rotation
from kernels.swiglu import swiglu
from nanopersrm import InputError
from nanopersrm.model.cache import KVCache, Layout, Step
from nanopersrm.model.linear import Linear

TILE = 1024  # rows of an MLP that are at work at a time in recomputing, at most


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of a base."""

    family: str  # llama, qwen2 or qwen3
    layers: int
    D: int  # width
    H: int  # query heads
    K: int  # key/value heads
    E: int  # head width
    F: int  # MLP width
    V: int  # vocabulary
    eps: float  # of RMSNorm
    context: int  # longest text in tokens
    tied: bool  # the head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rope_theta: float
    rope_scaling: dict[str, Any] | None

    @staticmethod
    def of(config: dict[str, Any]) -> "ModelConfig":
        """From the fields of a Hugging Face config.json, as `base.resolve` normalises them."""
        family = config["model_type"]
        supported = {"hidden_act": "silu", "use_sliding_window": False, "partial_rotary_factor": 1}
        for field, value in supported.items():
            if config.get(field, value) not in (value, None):
                raise InputError(f"expected {field} {value!r}, got {config[field]!r}")
        D, H = config["hidden_size"], config["num_attention_heads"]
        bias = bool(config.get("attention_bias", False))
        return ModelConfig(
            family=family,
            layers=config["num_hidden_layers"],
            D=D,
            H=H,
            K=config.get("num_key_value_heads") or H,
            E=config.get("head_dim") or D // H,
            F=config["intermediate_size"],
            V=config["vocab_size"],
            eps=config["rms_norm_eps"],
            context=config["max_position_embeddings"],
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=True if family == "qwen2" else bias,
            o_bias=bias and family != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            rope_theta=config["rope_theta"],
            rope_scaling=config.get("rope_scaling"),
        )


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(E/2,) fp32 angle per position of each pair, and the attention factor: what cos and sin are
    multiplied by (1 but for YaRN).

    Plain: theta^(-2i/E). Scaled as the config's `rope_scaling` says: `linear` divides all; `llama3`
    divides the slow ones and blends between (Llama 3.1); `yarn` divides those that turn less than
    once in the original context and sharpens the attention (Peng et al., arXiv 2309.00071).
    """
    E, theta = config.E, config.rope_theta
    pairs = torch.arange(E // 2, dtype=torch.float32, device="cpu")  # also when built on "meta"
    plain = theta ** -(2 * pairs / E)  # (E/2,)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return plain, 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(f"expected rope_type default, linear, llama3 or yarn, got {kind!r}")

    def number(field: str, default: float | None = None) -> float:
        value: Any = default if scaling.get(field) is None else scaling[field]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(f"rope scaling {kind!r}: expected {field} above 0, got {value!r}")
        return value

    factor = number("factor")
    if kind == "linear":
        return plain / factor, 1.0
    context = number("original_max_position_embeddings", config.context)
    turns = context * plain / (2 * math.pi)  # full turns of each pair within the original context
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise InputError(f"rope scaling: expected low_freq_factor {low} < high {high}")
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast pairs, untouched
        return plain / factor * (1 - keep) + plain * keep, 1.0

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes this many turns in the original context."""
        return E * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(number("beta_fast", 32)), pair_with(number("beta_slow", 1))
    first, last = max(math.floor(first), 0), min(math.ceil(last), E - 1)
    slow = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    attention_factor = number("attention_factor", 0.1 * math.log(max(factor, 1)) + 1)
    return plain / factor * slow + plain * (1 - slow), attention_factor


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, y: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y and h (N, D) -> the norm of their sum, and the sum; y alone where there is no h yet."""
        if h is None:
            return rms_norm(y, self.weight, self.eps), y
        return add_rms_norm(y, h, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = c = config
        self.q_proj = Linear(c.D, c.H * c.E, c.qkv_bias)
        self.k_proj = Linear(c.D, c.K * c.E, c.qkv_bias)
        self.v_proj = Linear(c.D, c.K * c.E, c.qkv_bias)
        self.o_proj = Linear(c.H * c.E, c.D, c.o_bias)
        if c.family == "qwen3":
            self.q_norm, self.k_norm = RMSNorm(c.E, c.eps), RMSNorm(c.E, c.eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, step: Step | None, layer: int
    ) -> Tensor:
        """x (N, D) -> what each row attended to (N, D)."""
        c = self.config
        q = self.q_proj(x).view(-1, c.H, c.E)  # (N, H, E)
        k = self.k_proj(x).view(-1, c.K, c.E)  # (N, K, E)
        v = self.v_proj(x).view(-1, c.K, c.E)
        if c.family == "qwen3":
            q, k = rope(q, k, cos, sin, self.q_norm.weight, self.k_norm.weight, c.eps)
        else:
            q, k = rope(q, k, cos, sin)
        if step is None:
            out = attention.segments(q, k, v, layout.starts, layout.parents)  # (N, H, E)
        else:
            step.write(layer, k, v)
            out = step.attend(layer, q, k, v)
        return self.o_proj(out.reshape(-1, c.H * c.E))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.gate_proj = Linear(c.D, c.F, c.mlp_bias)
        self.up_proj = Linear(c.D, c.F, c.mlp_bias)
        self.down_proj = Linear(c.F, c.D, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)"""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.D, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.D, config.eps)
        self.mlp = MLP(config)

    def attended(
        self,
        y: Tensor,
        h: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        step: Step | None,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """h (N, D) residual stream, y (N, D) to be added to it -> what the MLP reads, next h."""
        x, h = self.input_layernorm(y, h)
        return self.post_attention_layernorm(self.self_attn(x, cos, sin, layout, step, layer), h)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """As `attended` -> the next y and h."""
        x, h = self.attended(*inputs)
        return self.mlp(x), h

    def recomputed(self, h: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """h (N, D) -> the residual stream after this block; only h is kept for the backward."""

        def run(h: Tensor) -> Tensor:
            x, h = self.attended(h, None, cos, sin, layout, None, 0)
            return _in_tiles(self.mlp, x) + h

        h = h if h.requires_grad else h.detach().requires_grad_()  # of the first: base is frozen
        return checkpoint(run, h, use_reentrant=True)


def _in_tiles(mlp: MLP, x: Tensor) -> Tensor:
    """x (N, D) -> mlp(x) (N, D); where gradients are wanted, zeros with the gradients of mlp(x)."""
    n = -(-len(x) // TILE)  # tiles of about equal size
    if n == 1:
        return mlp(x)
    if torch.is_grad_enabled():  # the second pass
        return _TiledBackward.apply(x, mlp)
    y = torch.empty_like(x)
    for part, out in zip(x.chunk(n), y.chunk(n), strict=True):
        out.copy_(mlp(part))
    return y


class _TiledBackward(torch.autograd.Function):
    """The MLP in the second pass: all of it happens in the backward. Keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: MLP) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mlp = mlp
        return x.new_zeros(1).expand(x.shape)  # whose values nobody reads

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), (g,) = ctx.saved_tensors, gradients
        dx, n = torch.empty_like(x), -(-len(x) // TILE)
        for part, out, into in zip(x.chunk(n), g.chunk(n), dx.chunk(n), strict=True):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.mlp(part)
            torch.autograd.backward(y, out)  # what the adapters get is added to theirs
            assert part.grad is not None
            into.copy_(part.grad)
            del y, part  # before the next tile
        return dx, None


class Model(nn.Module):
    """`forward` gives hidden states, `logits` reads them; `weights.load` fills the parameters."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Parameter(torch.empty(c.V, c.D))
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.D, c.eps)
        self.lm_head = None if c.tied else Linear(c.D, c.V)
        self.packed_head: Tensor | None = None
        self.frequencies, self.attention_factor = rope_frequencies(c)

    def forward(
        self,
        ids: Tensor,
        place: Layout | Step,
        recompute: bool = False,
    ) -> Tensor:
        """ids (N,) int64 -> hidden states after the last norm (N, D).

        A `Layout` packs whole texts and shared prefixes, with gradients. A `Step` of a cache
        continues what earlier forwards left there, without.
        """
        step = place if isinstance(place, Step) else None
        layout = place.layout if isinstance(place, Step) else place
        assert len(ids) == layout.starts[-1], f"{len(ids)} ids for {layout.starts[-1]} rows"
        if self.frequencies.device != ids.device:
            self.frequencies = self.frequencies.to(ids.device)
        rows = ids.to(self.embed_tokens.device)  # in host memory this waits for the GPU
        y, h = F.embedding(rows, self.embed_tokens).to(ids.device), None  # (N, D)
        cos, sin = rotation(layout.positions, self.frequencies, self.attention_factor, y.dtype)
        for i, block in enumerate(self.layers):
            if recompute and torch.is_grad_enabled():
                assert isinstance(block, Block)
                y = block.recomputed(y, cos, sin, layout)
            else:
                y, h = block(y, h, cos, sin, layout, step, i)
        return self.norm(y, h)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (M, D) -> (M, V) fp32; on a CPU rounded to the model's type on the way."""
        if self.packed_head is not None:
            return linear(hidden, self.packed_head).float()
        return wide_mm(hidden, self.head().T)  # as the trainer's log-probabilities have them

    def logits_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """hidden (M, D), ids (n,) -> (M, n) fp32, computed in fp32.

        A bf16 logit of 33 is rounded to a multiple of 1/4: good enough to draw from 49,152,
        too coarse to tell how likely each of nine digits is.
        """
        return hidden.float() @ self.head()[ids].float().T

    def head(self) -> Tensor:
        """(V, D) the rows of the output, the embedding's own where they are tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def new_cache(self) -> KVCache:
        c = self.config
        return KVCache(c.layers, c.H, c.K, c.E, self.norm.weight)

    def pack(self) -> "Model":
        """Re-order the matrices for inference where that pays (bf16, CPU); no training after it."""
        if can_pack(self.norm.weight):
            for module in self.modules():
                if isinstance(module, Linear) and module is not self.lm_head:
                    module.pack()
            self.packed_head = pack(self.head())  # beside the plain one, which `logits_of` reads
        return self
