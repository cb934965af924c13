"""Replies equal transformers', have its probabilities and do not depend on their neighbours."""

import math
from itertools import chain

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanopersrm.model.cache import Layout
from nanopersrm.model.sampler import (
    Decoder,
    Prefix,
    Reply,
    SamplingConfig,
    common_prefix,
    prefill,
    sample,
    truncate,
)
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load

CPU = torch.device("cpu")
NEVER = SamplingConfig(temperature=1.0, max_new=12, seed=5)


def random_ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 131, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain(model: Model, ids: list[int]) -> Tensor:
    """Logits (T, V) of one text in one forward."""
    with torch.inference_mode():
        return model.logits(model(torch.tensor(ids), Layout.of([len(ids)])))


def drawn(replies: list[list[Reply]]) -> list[list[list[int]]]:
    return [[reply.ids for reply in group] for group in replies]


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    return load(tiny_base, torch.float32, CPU)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Unequal lengths; all begin with the same 20 ids."""
    return [random_ids(20, 1) + random_ids(n, 30 + n) for n in (21, 1, 40, 9)]


# Against transformers and the plain forward


def test_greedy_equals_transformers(tiny_pair):
    oracle, base = tiny_pair
    model = load(base, torch.float32, CPU)
    prompts = [random_ids(20, 1) + random_ids(n, n) for n in (5, 40, 1)]
    config = SamplingConfig(temperature=0, max_new=16)
    replies = sample(model, prompts, config, replies=3, stop_ids={2})
    alone = sample(model, prompts, config, stop_ids={2})
    for prompt, group, [single] in zip(prompts, replies, alone, strict=True):
        ids = torch.tensor([prompt])
        out = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
        )
        expected = out[0, len(prompt) :].tolist()
        assert [reply.ids for reply in group] == [expected] * 3
        assert single.ids == expected


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.6, 0), (1.0, 4), (0.8, 9)])
def test_log_probs_are_those_of_the_whole_distribution(model, prompts, temperature, top_p, top_k):
    config = SamplingConfig(temperature, top_p, top_k, max_new=15, seed=3)
    replies = sample(model, prompts, config, replies=2, stop_ids={2})
    forbidden = 0
    for prompt, group in zip(prompts, replies, strict=True):
        for reply in group:
            assert len(reply.log_probs) == len(reply.ids) > 0
            logits = plain(model, prompt + reply.ids)[len(prompt) - 1 : -1]
            all_probs = (logits / (temperature or 1)).log_softmax(-1)
            ids = torch.tensor(reply.ids)
            expected = all_probs.gather(-1, ids[:, None])[:, 0]
            assert (torch.tensor(reply.log_probs) - expected).abs().max() < 1e-4
            likelier = (logits > logits.gather(-1, ids[:, None]) + 1e-4).sum(-1)
            if temperature == 0:
                assert not likelier.any()
            elif top_k:
                assert likelier.max() < top_k
            elif top_p < 1:
                taken = all_probs.exp() * (all_probs > expected[:, None] + 1e-4)
                assert (taken.sum(-1) < top_p).all()
            forbidden += int(likelier.sum())
    assert (forbidden > 0) == (temperature > 0)  # sampling does leave the top


# Who else is in the batch


def test_a_reply_does_not_depend_on_its_batch(model, prompts):
    expected = [drawn(sample(model, [prompt], NEVER, replies=3))[0] for prompt in prompts]
    assert len({tuple(ids) for group in expected for ids in group}) == 12  # all differ
    assert drawn(sample(model, prompts, NEVER, replies=3)) == expected
    assert drawn(sample(model, prompts[::-1], NEVER, replies=3)) == expected[::-1]
    one = [group[:1] for group in expected]
    five = drawn(sample(model, prompts, NEVER, replies=5))
    assert drawn(sample(model, prompts, NEVER)) == one
    assert [group[:3] for group in five] == expected
    others = [random_ids(17, 90), *prompts, random_ids(33, 91)]  # and no common prefix
    assert drawn(sample(model, others, NEVER, replies=3))[1:-1] == expected
    prefix = prefill(model, prompts[0][:20])
    for some in ([0, 1, 2, 3], [3, 1], [2]):
        got = drawn(sample(model, [prompts[i] for i in some], NEVER, replies=3, prefix=prefix))
        assert got == [expected[i] for i in some]


def test_stopping_neighbours_change_nothing(model, prompts):
    """Rows that end early leave the forwards; the others go on as before."""
    free = drawn(sample(model, prompts, NEVER, replies=2))
    stop = free[0][0][2]
    cut = drawn(sample(model, prompts, NEVER, replies=2, stop_ids={stop}))
    for whole, part in zip(chain(*free), chain(*cut), strict=True):
        assert part == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_seeds(model, prompts):
    first = drawn(sample(model, prompts, NEVER, replies=2))
    assert drawn(sample(model, prompts, NEVER, replies=2)) == first
    other = SamplingConfig(temperature=1.0, max_new=12, seed=6)
    second = drawn(sample(model, prompts, other, replies=2))
    assert all(a != b for a, b in zip(chain(*first), chain(*second), strict=True))


def test_draws_follow_the_probabilities(model):
    """First tokens of 2,000 replies: each frequency within 5 standard deviations."""
    prompt = random_ids(30, 8)
    config = SamplingConfig(temperature=1.0, max_new=1)
    [replies] = sample(model, [prompt], config, replies=2000)
    p = plain(model, prompt)[-1].softmax(-1).double()
    counts = torch.bincount(torch.tensor([reply.ids[0] for reply in replies]), minlength=131)
    spread = (2000 * p * (1 - p)).sqrt()
    assert ((counts - 2000 * p).abs() <= 5 * spread + 1).all()
    assert (counts > 0).sum() > 5


# How a reply ends


def test_ends(model, prompts):
    config = SamplingConfig(temperature=0, max_new=9)
    [whole] = sample(model, prompts[:1], config)[0]
    assert (whole.ended, len(whole.ids)) == ("budget", 9)
    stop = whole.ids[4]
    [stopped] = sample(model, prompts[:1], config, stop_ids=[stop])[0]
    assert stopped.ended == "stop"
    assert stopped.ids == whole.ids[: whole.ids.index(stop) + 1]
    assert stopped.log_probs == whole.log_probs[: len(stopped.ids)]


def test_observe_sees_every_token_and_can_end(model, prompts):
    seen: dict[int, list[list[int]]] = {}

    def observe(row: int, ids: list[int]) -> bool:
        seen.setdefault(row, []).append(list(ids))
        return len(ids) == row + 2

    replies = sample(model, prompts[:3], NEVER, replies=2, observe=observe)
    for p in range(3):
        for g in range(2):
            row, reply = p * 2 + g, replies[p][g]
            assert reply.ended == "observed"
            assert len(reply.ids) == row + 2
            assert seen[row] == [reply.ids[:n] for n in range(1, row + 3)]
    assert drawn(replies)[0][0] == drawn(sample(model, prompts[:1], NEVER))[0][0][:2]


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (1.0, 3)])
def test_what_is_forbidden_is_not_drawn(model, prompts, temperature, top_k):
    """Row 0 may only draw 7 after 5 and 5 after all else, row 1 not what it would draw freely."""
    config = SamplingConfig(temperature=temperature, top_k=top_k, max_new=6, seed=3)
    free = [group[0].ids for group in sample(model, prompts[:2], config)]
    asked = []

    def forbid(rows: list[int], ids: list[list[int]]) -> Tensor:
        asked.append((list(rows), [list(own) for own in ids]))
        mask = torch.zeros(len(rows), 131, dtype=torch.bool)
        for k, row in enumerate(rows):
            mask[k] = row == 0
            mask[k, [7 if ids[k][-1:] == [5] else 5] if row == 0 else free[1]] = row == 1
        return mask

    decoder = Decoder(model, prompts[:2])
    decoder.fork([1, 1], 6)
    found = decoder.generate(
        config, observe=lambda row, ids: row == 0 and len(ids) == 4, forbid=forbid
    )
    assert found[0].ids == [5, 7, 5, 7]
    assert not {*found[1].ids} & {*free[1]}
    assert [rows for rows, _ in asked] == [[0, 1]] * 4 + [[1]] * 2
    assert asked[2] == ([0, 1], [[5, 7], found[1].ids[:2]])
    for prompt, reply in zip(prompts, found, strict=False):  # of the whole vocabulary
        whole = plain(model, prompt + reply.ids).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = whole[range(len(reply.ids)), reply.ids]
        assert reply.log_probs == pytest.approx(expected.tolist(), abs=1e-4)


def test_wrong_arguments(model):
    for bad in (
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new": 0},
        {"temperature": math.nan},
    ):
        with pytest.raises(AssertionError):
            SamplingConfig(**bad)
    for prompts in ([], [[3], []]):
        with pytest.raises(AssertionError):
            Decoder(model, prompts)


# The prompts


@given(st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=5))
def test_common_prefix(texts):
    naive = 0
    while all(len(t) > naive for t in texts) and len({t[naive] for t in texts}) == 1:
        naive += 1
    assert common_prefix(texts) == naive


@pytest.mark.parametrize("with_prefix", [False, True])
def test_every_token_is_computed_once(model, prompts, monkeypatch, with_prefix):
    """Prompt tokens once however many replies; a reply's last token, or a stop token, never."""
    prefix: Prefix | None = prefill(model, prompts[0][:20]) if with_prefix else None
    counted = 0
    forward = Model.forward

    def counting(self: Model, ids: Tensor, place) -> Tensor:
        nonlocal counted
        counted += len(ids)
        return forward(self, ids, place)

    monkeypatch.setattr(Model, "forward", counting)
    free = sample(model, prompts, NEVER, replies=4, prefix=prefix)
    prompt_tokens = 21 + 1 + 40 + 9 + (0 if with_prefix else 20)
    assert counted == prompt_tokens + 16 * 11
    counted, stop = 0, free[0][0].ids[2]
    cut = sample(model, prompts, NEVER, replies=4, prefix=prefix, stop_ids={stop})
    assert counted == prompt_tokens + sum(len(r.ids) - 1 for group in cut for r in group)
    assert counted < prompt_tokens + 16 * 11


# Truncation


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.integers(0, 14),
    st.floats(0.01, 1.0),
    st.sampled_from([0.3, 1.0, 2.5]),
)
def test_truncate_against_naive(tenths, top_k, top_p, temperature):
    logits = [tenth / 10 for tenth in tenths]
    kept = sorted(logits, reverse=True)
    if top_k:
        kept = [x for x in kept if sum(y > x for y in logits) < top_k]  # ties at the edge stay
    if top_p < 1:
        weights = [math.exp(x / temperature) for x in kept]
        befores = [math.fsum(weights[:i]) / math.fsum(weights) for i in range(len(kept))]
        assume(all(abs(before - top_p) > 1e-5 for before in befores))
        kept = [x for x, before in zip(kept, befores, strict=True) if before < top_p]
    config = SamplingConfig(temperature, top_p, top_k)
    rows = torch.tensor([logits, logits[::-1]])
    out = truncate(rows, config)
    for row, given_row in zip(out, rows, strict=True):
        stays = row.isfinite()
        assert torch.equal(row[stays], given_row[stays])
        assert (row[~stays] == -math.inf).all()
        assert torch.equal(row[stays].sort(descending=True).values, torch.tensor(kept))
    assert torch.equal(rows, torch.tensor([logits, logits[::-1]]))  # the caller's are untouched


def test_truncate_by_hand():
    """p = (0.5, 0.2, 0.3): top-p 0.6 keeps two tokens, top-p 0.49 one."""
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
    for config, expected in (
        (SamplingConfig(top_p=0.6), [True, False, True]),
        (SamplingConfig(top_p=0.49), [True, False, False]),
        (SamplingConfig(top_p=1e-9), [True, False, False]),
        (SamplingConfig(top_k=1), [True, False, False]),
        (SamplingConfig(top_k=2, top_p=0.9), [True, False, True]),  # of 0.625 and 0.375
        (SamplingConfig(temperature=0.1, top_p=0.9), [True, False, False]),
        (SamplingConfig(top_k=50), [True, True, True]),
    ):
        assert truncate(logits, config)[0].isfinite().tolist() == expected, config
