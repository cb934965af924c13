"""Sampling replies: ids in, ids and log-probabilities out, each prompt computed once.

    decoder = Decoder(model, prompts)              prefill what all share, then the rest of each
    decoder.fork([G] * len(prompts), room)         each prompt becomes G replies; nothing is copied
    replies = decoder.generate(config, stop_ids)   one forward a token for all running replies
    decoder.feed([[...], ...])                     append fixed tokens, as a line that must stand

`sample` strings these together for plain use. Under it lies the tree of `cache.py`: common prefix
-> families of prompts that begin alike -> prompts -> replies. A reply that has ended takes no
further rows, and can be continued by `feed`.

Each draw depends on (seed, sample, position) only, see `kernels/sample.py`; the sample is named by
its prompt's ids and its number within the prompt. The log-probability of a token is that under
softmax(logits / temperature) over the whole vocabulary, also when a part of it is forbidden.
"""

import hashlib
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.sample import draw_key
from kernels.sample import sample as draw
from nanopersrm.model.cache import KVCache
from nanopersrm.model.transformer import Model

SHARED_LEAST = 16  # a shorter common prefix is not worth a level of its own
PREFIXES = 4  # texts whose keys and values a `PrefixCache` keeps
PREFILL = 8192  # tokens of prompts in one forward, or one prompt ...
PREFILL_BYTES = 1 << 28  # ... and fewer where a block would hold more bytes: 1,885 in a 7B base

# Called as observe(row, ids so far) after each token of a row; True ends the row's reply.
Observe = Callable[[int, list[int]], bool]
# Called as forbid(rows, ids of each so far) before each draw: (R, V) bool, True: not this token.
Forbid = Callable[[list[int], list[list[int]]], Tensor]


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # keep this many of the likeliest tokens (0: all)
    max_new: int = 256  # token budget of a reply
    seed: int = 0  # same seed, same replies

    def __post_init__(self) -> None:
        assert self.temperature >= 0, f"temperature {self.temperature} is negative"
        assert self.top_k >= 0, f"top_k {self.top_k} is negative"
        assert self.max_new >= 1, f"max_new {self.max_new} leaves no token to draw"


@dataclass
class Reply:
    ids: list[int] = field(default_factory=list)  # what was drawn, with the stop token if one was
    log_probs: list[float] = field(default_factory=list)  # one for each id
    ended: str = "budget"  # "stop": a stop token, "observed": `observe` said so, "budget": neither


@dataclass
class Prefix:
    """The keys and values of a text that many prompts begin with, kept between calls."""

    ids: list[int]
    cache: KVCache


def common_prefix(texts: Sequence[list[int]]) -> int:
    """How many leading ids all texts have in common."""
    first, last = min(texts), max(texts)
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differ, min(len(first), len(last)))


def families(texts: Sequence[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Neighbours that begin alike: the family of each text, and what each family begins with.

    Every text keeps at least one id of its own.
    """
    heads: list[list[int]] = []
    family: list[int] = []
    for text in texts:
        same = common_prefix([heads[-1], text[:-1]]) if heads else 0
        if same >= SHARED_LEAST:
            heads[-1] = heads[-1][:same]
        else:
            heads.append(text[:-1])
        family.append(len(heads) - 1)
    return family, heads


class PromptTree(NamedTuple):
    """Prompts by what they share: each is the shared ids, the head of its family, and its tail."""

    shared: int  # how many first ids all have in common
    family: list[int]  # of each prompt
    heads: list[list[int]]  # of each family; none where families save nothing
    tails: list[list[int]]  # of each prompt


def prompt_tree(prompts: Sequence[list[int]], done: int = 0) -> PromptTree:
    """How to hold prompts of which all share `done` ids that are held already."""
    shared = min(common_prefix(prompts), min(map(len, prompts)) - 1)
    if len(prompts) == 1 or shared - done < SHARED_LEAST:
        shared = done
    tails = [prompt[shared:] for prompt in prompts]
    family, heads = families(tails)  # prompts about the same exemplars, say
    if len(heads) == len(tails) or not all(heads):
        return PromptTree(shared, [0] * len(prompts), [], tails)
    tails = [tail[len(heads[k]) :] for tail, k in zip(tails, family, strict=True)]
    return PromptTree(shared, family, heads, tails)


def _portions(lengths: Sequence[int], most: int) -> list[range]:
    """Neighbours with at most `most` tokens together, or one alone that has more.

    >>> _portions([5000, 3000, 9000, 100], 8192)
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    portions, first, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and total + length > most:
            portions.append(range(first, i))
            first, total = i, 0
        total += length
    return [*portions, range(first, len(lengths))]


def sample_name(parts: Sequence[int]) -> int:
    """A 64-bit name for a prompt's ids, or for (the name of a row, the number of its branch)."""
    words = array("Q", [part & (1 << 64) - 1 for part in parts])
    digest = hashlib.blake2b(words.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Decoder:
    """Replies in progress: a tree of keys and values, and the last state of each row."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Model,
        prompts: Sequence[list[int]],
        prefix: Prefix | None = None,
        room: int = 0,
    ):
        """Prefill `prompts` (ids, at least one each), reusing what they share with `prefix`.

        `room` tokens can follow each prompt in its own slab, which saves single replies a level of
        the tree.
        """
        assert prompts, "no prompts"
        assert all(prompts), "every prompt needs at least one id"
        self.model = model
        self.device = model.device
        self.names = [sample_name(prompt) for prompt in prompts]
        done = 0
        if prefix:
            done = min(common_prefix([*prompts, prefix.ids]), min(map(len, prompts)) - 1)
        if prefix and done >= SHARED_LEAST:
            self.cache = prefix.cache.branch(done)
        else:
            self.cache, done = model.new_cache(), 0
        shared, parents, heads, tails = prompt_tree(prompts, done)
        if shared > done:
            _extend(model, self.cache, prompts[0][done:shared])
        self.pending: list[list[int]] = [[] for _ in prompts]  # drawn, not yet in the tree
        self.drawn = [0] * len(prompts)  # tokens so far: no two draws of a row share their noise
        dtype = model.norm.weight.dtype
        D, F = model.config.D, model.config.F  # a block holds of each token gate, up, their
        width = ((3 if model.device.type == "cuda" else 4) * F + 4 * D) * dtype.itemsize
        most = min(PREFILL, max(1, PREFILL_BYTES // width))  # product, silu(gate), four streams
        if heads:
            self.cache.grow([0] * len(heads), max(map(len, heads)))
            for some in _portions([*map(len, heads)], most):
                lengths = [len(head) if i in some else 0 for i, head in enumerate(heads)]
                flat = [i for head in heads[some.start : some.stop] for i in head]
                model(torch.tensor(flat, device=self.device), self.cache.step(lengths))
        self.cache.grow(parents, max(map(len, tails)) + room)
        self.hidden = model.norm.weight.new_empty(len(prompts), model.config.D)
        for some in _portions([*map(len, tails)], most):
            self.feed([tail if i in some else [] for i, tail in enumerate(tails)])

    @property
    def logits(self) -> Tensor:
        """(R, V) of the next token of each row, computed anew each time."""
        return self.model.logits(self.hidden)

    @torch.inference_mode()
    def fork(self, counts: Sequence[int], room: int, first: int = 0) -> None:
        """Row i becomes counts[i] rows, each with room for `room` further tokens.

        first: the number of the first of them, where others were drawn before.
        """
        assert not any(self.pending), "feed what is pending before a fork"
        if set(counts) == {1} and room <= self.cache.room() and not first:
            return  # the replies continue in the slabs they are in
        parents = [row for row, count in enumerate(counts) for _ in range(count)]
        numbers = [first + number for count in counts for number in range(count)]
        self.cache.grow(parents, room)
        rows = torch.tensor(parents, device=self.device)
        self.hidden = self.hidden[rows]
        self.names = [  # the first branch keeps its name: one reply is the first of many
            sample_name([self.names[parent], number]) if number else self.names[parent]
            for parent, number in zip(parents, numbers, strict=True)
        ]
        self.pending = [[] for _ in parents]
        self.drawn = [self.drawn[parent] for parent in parents]

    @torch.inference_mode()
    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append tokens[i] (and what is pending) to row i; rows that get none stay as they are."""
        tokens = [wait + list(new) for wait, new in zip(self.pending, tokens, strict=True)]
        self.pending = [[] for _ in tokens]
        lengths = [len(new) for new in tokens]
        if not any(lengths):
            return
        ids = torch.tensor([i for new in tokens for i in new], device=self.device)
        hidden = self.model(ids, self.cache.step(lengths))  # (N, D)
        ends = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        fed = [row for row, length in enumerate(lengths) if length]
        if len(fed) == len(tokens):
            self.hidden = hidden[ends]
        else:
            rows = torch.tensor(fed, device=self.device)
            self.hidden[rows] = hidden[ends[rows]]

    @torch.inference_mode()
    def generate(
        self,
        config: SamplingConfig,
        stop_ids: Collection[int] = (),
        observe: Observe | None = None,
        forbid: Forbid | None = None,
    ) -> list[Reply]:
        """Draw up to config.max_new tokens for every row. Afterwards `feed` can continue each row.

        A stop token ends the reply, is part of its ids and is not fed; any other last token waits
        in `pending` and is fed first by the next `feed`.
        """
        self.feed([[] for _ in self.names])  # what is pending
        replies = [Reply() for _ in self.names]
        running = list(range(len(replies)))
        for position in range(config.max_new):
            rows = torch.tensor(running, device=self.device)
            hidden = self.hidden if len(running) == len(replies) else self.hidden[rows]
            logits = self.model.logits(hidden)
            keys = [draw_key(config.seed, self.names[row], self.drawn[row]) for row in running]
            mask = forbid(running, [replies[row].ids for row in running]) if forbid else None
            ids, log_probs = _draw(logits, mask, keys, config)
            left, feeding = [], [[] for _ in replies]  # type: list[int], list[list[int]]
            for row, i, log_prob in zip(running, ids.tolist(), log_probs.tolist(), strict=True):
                reply, self.drawn[row] = replies[row], self.drawn[row] + 1
                reply.ids.append(i)
                reply.log_probs.append(log_prob)
                if i in stop_ids:
                    reply.ended = "stop"
                elif observe is not None and observe(row, reply.ids):
                    reply.ended = "observed"
                    self.pending[row] = [i]
                elif position + 1 == config.max_new:
                    self.pending[row] = [i]
                else:
                    feeding[row] = [i]
                    left.append(row)
            running = left
            if not running:
                break
            held, self.pending = self.pending, [[] for _ in replies]
            self.feed(feeding)
            self.pending = held
        return replies


def _draw(
    logits: Tensor, mask: Tensor | None, keys: list[tuple[int, int]], config: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """logits (R, V) -> ids (R,), log-probabilities (R,) under the whole distribution.

    mask: (R, V) bool, True: not this token.
    """
    counters = torch.tensor(keys, dtype=torch.int32, device=logits.device)  # (R, 2)
    left = logits if mask is None else logits.masked_fill(mask, float("-inf"))
    if config.temperature and config.top_k:
        least = left.topk(min(config.top_k, left.shape[-1])).values[:, -1:]
        left = left.masked_fill(left < least, float("-inf"))
    ids, log_probs = draw(left, counters, config.temperature)
    if left is logits:
        return ids, log_probs
    log_probs = (logits / (config.temperature or 1)).log_softmax(-1)
    return ids, log_probs.gather(-1, ids[:, None]).squeeze(-1)


@torch.inference_mode()
def prefill(model: Model, ids: list[int]) -> Prefix:
    """Compute the keys and values of a common beginning once."""
    cache = model.new_cache()
    _extend(model, cache, ids)
    return Prefix(ids, cache)


def _extend(model: Model, cache: KVCache, ids: list[int]) -> None:
    """A new level of one node that holds `ids`."""
    cache.grow([0], len(ids))
    model(torch.tensor(ids, device=model.device), cache.step([len(ids)]))


class PrefixCache:
    """Keys and values of the last few texts that prompts begin with, the latest at the end.

    A token has a key and a value in each layer: 23,040 bytes for SmolLM2-135M in 16 bits. All
    together hold no more tokens than one context.
    """

    def __init__(self, model: Model):
        self.model, self.kept = model, list[Prefix]()

    def prefix_of(self, ids: list[int]) -> Prefix | None:
        """Kept or computed; None for one too short to be worth a level of the tree."""
        if len(ids) < SHARED_LEAST:
            return None
        prefix = next((prefix for prefix in self.kept if prefix.ids == ids), None)
        if prefix is not None:
            self.kept.remove(prefix)
        else:
            context = self.model.config.context
            self.kept = self.kept[-(PREFIXES - 1) :]  # room is made before it is computed
            while self.kept and sum(len(old.ids) for old in self.kept) > context - len(ids):
                del self.kept[0]
            prefix = prefill(self.model, ids)
        self.kept.append(prefix)
        return prefix


def sample(
    model: Model,
    prompts: Sequence[list[int]],
    config: SamplingConfig,
    replies: int = 1,
    stop_ids: Collection[int] = (),
    observe: Observe | None = None,
    prefix: Prefix | None = None,
) -> list[list[Reply]]:
    """`replies` replies for each prompt: result[p][g]; `observe` sees row p · replies + g."""
    decoder = Decoder(model, prompts, prefix, room=config.max_new if replies == 1 else 0)
    decoder.fork([replies] * len(prompts), config.max_new)
    flat = decoder.generate(config, stop_ids, observe)
    return [flat[p * replies : (p + 1) * replies] for p in range(len(prompts))]
