"""A decoder in use: fed, forked and generating by turns, every logit equals a plain forward's."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_sampler import CPU, plain, random_ids

from nanopersrm.model import sampler
from nanopersrm.model.sampler import (
    SHARED_LEAST,
    Decoder,
    SamplingConfig,
    families,
    prefill,
    sample,
)
from nanopersrm.model.transformer import Model, ModelConfig
from nanopersrm.model.weights import SHAPES, load

LONG = SamplingConfig(temperature=4.0, max_new=12, seed=5)


def check_logits(decoder: Decoder, texts: Sequence[list[int]]) -> None:
    """Row i of the decoder stands at the end of texts[i]."""
    assert decoder.logits.shape[0] == len(texts)
    for row, text in enumerate(texts):
        error = (decoder.logits[row] - plain(decoder.model, text)[-1]).abs().max()
        assert error < 1e-4, f"row {row}: {error}"


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    return load(tiny_base, torch.float32, CPU)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Unequal lengths; all begin with the same 20 ids."""
    return [random_ids(20, 1) + random_ids(n, 30 + n) for n in (21, 1, 40, 9)]


# Continuing


@pytest.mark.parametrize("replies", [1, 2])
def test_feed_after_generate(tiny_pair, replies):
    """One row stopped, one was observed, others used their budget; then all are fed unequally,
    twice, and generate once more.
    """
    model = load(tiny_pair[1], torch.float32, CPU)
    prompts = [random_ids(18, 1) + random_ids(n, n) for n in (4, 11, 30)]
    decoder = Decoder(model, prompts, room=60 if replies == 1 else 0)
    check_logits(decoder, prompts)
    decoder.fork([replies] * 3, 60)
    texts = [prompt for prompt in prompts for _ in range(replies)]
    check_logits(decoder, texts)
    config = SamplingConfig(temperature=4.0, max_new=8, seed=1)  # so hot that ids hardly repeat
    free = [reply.ids for group in sample(model, prompts, config, replies) for reply in group]
    stop = next(i for i in free[0] if not any(i in ids for ids in free[1:]))
    out = decoder.generate(config, {stop}, lambda row, ids: row == 1 and len(ids) == 5)
    ends = {"stop": 0, "observed": 0, "budget": 0}
    for row, reply in enumerate(out):
        ends[reply.ended] += 1
        assert reply.ids == free[row][: len(reply.ids)]
        texts[row] = texts[row] + (reply.ids[:-1] if reply.ended == "stop" else reply.ids)
    assert min(ends.values()) > 0
    fed = [random_ids((3, 0, 1, 7, 0, 2)[row], 50 + row) for row in range(len(texts))]
    for turn in range(2):
        decoder.feed(fed)
        texts = [text + more for text, more in zip(texts, fed, strict=True)]
        check_logits(decoder, texts)
        fed = [random_ids((0, 4, 0, 1, 5, 1)[row], 70 + row + turn) for row in range(len(texts))]
    decoder.feed([[] for _ in texts])
    check_logits(decoder, texts)
    again = decoder.generate(config, (), None)
    decoder.feed([[] for _ in texts])
    texts = [text + reply.ids for text, reply in zip(texts, again, strict=True)]
    check_logits(decoder, texts)


@pytest.mark.parametrize("counts", [[9, 9], [1, 4], [2, 1], [1, 1]])
def test_fork_after_feed(tiny_pair, counts):
    """Replies become several replies: a tree of four levels."""
    model = load(tiny_pair[1], torch.float32, CPU)
    prompts = [random_ids(18, 1) + random_ids(n, n) for n in (4, 11)]
    decoder = Decoder(model, prompts)
    decoder.fork([1, 1], 12)
    fed = [random_ids(5, 2), random_ids(9, 3)]
    decoder.feed(fed)
    decoder.fork(counts, 16)
    texts = [
        prompts[i] + fed[i] + random_ids(1 + j % 3, 10 * i + j)
        for i in range(2)
        for j in range(counts[i])
    ]
    starts = [len(prompts[i] + fed[i]) for i in range(2) for _ in range(counts[i])]
    decoder.feed([text[start:] for text, start in zip(texts, starts, strict=True)])
    check_logits(decoder, texts)
    replies = decoder.generate(SamplingConfig(temperature=1.0, max_new=6))
    decoder.feed([[] for _ in texts])
    check_logits(decoder, [text + r.ids for text, r in zip(texts, replies, strict=True)])
    assert len({tuple(reply.ids) for reply in replies}) == len(replies)


def test_fork_wants_nothing_pending(model, prompts):
    decoder = Decoder(model, prompts)
    decoder.fork([1] * 4, 20)
    decoder.generate(SamplingConfig(max_new=2))
    with pytest.raises(AssertionError, match="pending"):
        decoder.fork([2] * 4, 20)


def test_a_second_fork_without_room_makes_a_level(model, prompts):
    """The slab has room for 8 tokens and 6 are taken; the next 8 need one of their own."""
    decoder = Decoder(model, prompts, room=8)
    levels = len(decoder.cache.levels)
    decoder.fork([1] * 4, 8)
    assert len(decoder.cache.levels) == levels
    fed = [random_ids(6, seed) for seed in range(4)]
    decoder.feed(fed)
    decoder.fork([1] * 4, 2)
    assert len(decoder.cache.levels) == levels  # two fit
    decoder.fork([1] * 4, 8)
    assert len(decoder.cache.levels) == levels + 1
    more = [random_ids(8, 10 + seed) for seed in range(4)]
    decoder.feed(more)
    check_logits(decoder, [a + b + c for a, b, c in zip(prompts, fed, more, strict=True)])


@pytest.mark.parametrize("fed", [True, False], ids=["after feed", "at once"])
@pytest.mark.parametrize("n", [1, 5])
def test_generate_goes_on_where_it_stopped(model, prompts, fed, n):
    """n tokens and then 12 - n are the 12 of one call: no noise twice, and none left out."""
    [whole] = zip(*sample(model, prompts, LONG), strict=True)
    decoder = Decoder(model, prompts, room=12)
    first = decoder.generate(replace(LONG, max_new=n))
    if fed:
        decoder.feed([[] for _ in prompts])
    second = decoder.generate(replace(LONG, max_new=12 - n))
    for one, a, b in zip(whole, first, second, strict=True):
        assert a.ids + b.ids == one.ids
        assert a.log_probs + b.log_probs == pytest.approx(one.log_probs, abs=1e-4)
        assert len(set(one.ids)) > 6
    decoder.feed([[] for _ in prompts])
    check_logits(decoder, [prompt + one.ids for prompt, one in zip(prompts, whole, strict=True)])


# The prefix


@pytest.mark.parametrize("held", [0, 5, 15, 16, 17, 20, 25, 40, 60])
def test_prefix_with_any_common_part(tiny_pair, held):
    """A prefix of 60 ids of which the prompts share `held`, whatever that is worth."""
    model = load(tiny_pair[1], torch.float32, CPU)
    prefix = prefill(model, random_ids(60, 1))
    prompts = [prefix.ids[:held] + random_ids(n, 40 + n) for n in (1, 30)]
    if held > 20:  # one of them leaves earlier
        prompts.append(prefix.ids[:20] + random_ids(9, 44))
    check_logits(Decoder(model, prompts, prefix), prompts)
    assert prefix.cache.levels[0].lengths == [60]
    assert len(prefix.cache.levels) == 1
    check_logits(Decoder(model, prompts[:1], prefix), prompts[:1])  # and it was not written to


def test_prompts_inside_the_prefix(model):
    """Prompts that are the prefix, or end within it, still get the logits of their last id."""
    prefix = prefill(model, random_ids(40, 1))
    for prompts in ([prefix.ids], [prefix.ids[:25]], [prefix.ids, prefix.ids], [prefix.ids[:1]]):
        check_logits(Decoder(model, prompts, prefix), prompts)
    check_logits(Decoder(model, [prefix.ids[:25], prefix.ids]), [prefix.ids[:25], prefix.ids])


# Memory and work


def held(decoder: Decoder) -> list[list[int]]:
    return [level.lengths for level in decoder.cache.levels]


def test_a_prompt_is_held_once(model, prompts):
    decoder = Decoder(model, [random_ids(60)])
    decoder.fork([8], 20)
    assert held(decoder) == [[60], [0] * 8]
    assert [level.keys.shape[1] * level.keys.shape[3] for level in decoder.cache.levels] == [
        60,
        160,
    ]
    decoder = Decoder(model, prompts)
    decoder.fork([8] * 4, 20)
    assert held(decoder) == [[20], [21, 1, 40, 9], [0] * 32]
    assert [level.keys.shape[1] for level in decoder.cache.levels] == [1, 4, 32]
    prefix = prefill(model, prompts[0][:18])
    decoder = Decoder(model, prompts, prefix)
    root, kept = decoder.cache.levels[0], prefix.cache.levels[0]
    assert root.keys.data_ptr() == kept.keys.data_ptr()
    assert root.values.data_ptr() == kept.values.data_ptr()
    assert sum(held(decoder)[0]) == 18
    assert SHARED_LEAST <= 18


# Families


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        # (length of the common beginning with the text before, own length)
        ([(0, 30)], None),
        ([(0, 30), (0, 30)], None),  # nothing in common
        ([(0, 30), (SHARED_LEAST - 1, 5)], None),
        ([(0, 30), (SHARED_LEAST, 5)], ([0, 0], [16])),
        ([(0, 30), (20, 5), (0, 9), (0, 40), (25, 3)], ([0, 0, 1, 2, 2], [20, 8, 25])),
        ([(0, 30), (25, 5), (18, 7)], ([0, 0, 0], [18])),  # the third shortens what is shared
        ([(0, 30), (25, 5), (10, 7)], ([0, 0, 1], [25, 16])),
        ([(0, 30), (30, 0)], ([0, 0], [29])),  # equal: each keeps an id
        ([(0, 30), (30, 7)], ([0, 0], [29])),
        ([(0, 1), (0, 30), (20, 5)], None),  # a text of one id begins with nothing
    ],
)
def test_families_are_neighbours_that_begin_alike(lengths, expected):
    texts: list[list[int]] = []
    for i, (common, own) in enumerate(lengths):
        before = texts[-1][:common] if texts else []
        texts.append(before + [1000 * (i + 1) + j for j in range(own)])
    found = families(texts)
    if expected is None:
        assert found is None
        return
    assert found is not None
    family, heads = found
    assert (family, [len(head) for head in heads]) == expected
    for text, kin in zip(texts, family, strict=True):
        assert text[: len(heads[kin])] == heads[kin]
        assert len(text) > len(heads[kin])


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("replies", [1, 3])
def test_families_change_no_reply(tiny_pair, monkeypatch, with_prefix, replies):
    """The same ids and log-probabilities as when every prompt is computed for itself."""
    model = load(tiny_pair[1], torch.float32, CPU)
    start = random_ids(20, 1)
    kin = [start + random_ids(30, seed) for seed in (2, 3)]
    prompts = [kin[0] + random_ids(n, 40 + n) for n in (7, 1, 12)]
    prompts += [start + random_ids(9, 60)]  # alone
    prompts += [kin[1] + random_ids(n, 70 + n) for n in (3, 11)]
    prefix = prefill(model, start) if with_prefix else None
    decoder = Decoder(model, prompts, prefix)
    assert held(decoder)[1:] == [[30, 8, 30], [7, 1, 12, 1, 3, 11]]
    check_logits(decoder, prompts)
    found = sample(model, prompts, LONG, replies, prefix=prefix)
    monkeypatch.setattr(sampler, "families", lambda texts: None)
    plain_replies = sample(model, prompts, LONG, replies, prefix=prefix)
    for group, expected in zip(found, plain_replies, strict=True):
        assert [reply.ids for reply in group] == [reply.ids for reply in expected]
        for one, other in zip(group, expected, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_a_family_is_computed_once(model, monkeypatch):
    """A pair and its twin, two candidates each: both sets of exemplars once."""
    rows = []
    forward = Model.forward

    def counting(self, ids, place):
        rows.append(len(ids))
        return forward(self, ids, place)

    monkeypatch.setattr(Model, "forward", counting)
    exemplars = [random_ids(60, seed) for seed in (1, 2)]
    prompts = [shown + random_ids(10, 5 + seed) for shown in exemplars for seed in (0, 1)]
    Decoder(model, prompts)
    assert sum(rows) == 2 * 60 + 4 * 10
    assert len(rows) == 2


def test_how_many_tokens_of_prompts_come_at_once():
    """A forward without gradients holds 142 KB a token in a 7B base, on a GPU."""
    large = ModelConfig.of(SHAPES["qwen2.5-7b"])
    assert sampler.reading_bytes(large, 2, True) == (3 * 18_944 + 4 * 3584) * 2 == 142_336
    assert sampler.prefill_most(large, 2, True) == 1885 == 2**28 // 142_336
    assert sampler.prefill_most(ModelConfig.of(SHAPES["smollm2-135m"]), 2, False) == 8192


@pytest.mark.parametrize("limit", ["PREFILL", "READING"])
def test_long_prompts_come_in_portions(model, monkeypatch, limit):
    """No forward has more tokens than it may, unless one prompt alone has; the replies are the
    same."""
    exemplars = [random_ids(30, seed) for seed in (1, 2)]
    prompts = [shown + random_ids(n, 5 + n) for shown in exemplars for n in (12, 11, 60)]
    whole = sample(model, prompts, LONG, 2)
    rows = []
    forward = Model.forward

    def counting(self, ids, place):
        rows.append(len(ids))
        return forward(self, ids, place)

    each = sampler.reading_bytes(model.config, 4, False)
    monkeypatch.setattr(sampler, limit, {"PREFILL": 40, "READING": 40 * each + 7}[limit])
    monkeypatch.setattr(Model, "forward", counting)
    decoder = Decoder(model, prompts)
    assert rows == [30, 30, 12 + 11, 60, 12 + 11, 60]
    check_logits(decoder, prompts)
    for group, expected in zip(sample(model, prompts, LONG, 2), whole, strict=True):
        assert [reply.ids for reply in group] == [reply.ids for reply in expected]
