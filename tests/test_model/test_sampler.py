"""Replies equal transformers', have its probabilities and do not depend on their neighbours; a
decoder that is fed, forked and generating by turns has the logits of a plain forward."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny_bases import CPU, random_ids
from tiny_bases import logits as plain
from torch import Tensor

from nanopersrm.model import sampler
from nanopersrm.model.sampler import Decoder, Reply, SamplingConfig, families, prefill, sample
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load

CONFIG = SamplingConfig(temperature=1.0, max_new=12, seed=5)
HOT = SamplingConfig(temperature=4.0, max_new=12, seed=5)


def drawn(replies: list[list[Reply]]) -> list[list[list[int]]]:
    return [[reply.ids for reply in group] for group in replies]


@pytest.fixture(scope="module")
def model(tiny_base) -> Model:
    return load(tiny_base, torch.float32, CPU)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Unequal lengths; all begin with the same 20 ids."""
    return [random_ids(20, 1) + random_ids(n, 30 + n) for n in (21, 1, 40, 9)]


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """The rows of every forward from here on."""
    rows: list[int] = []
    forward = Model.forward

    def counting(self: Model, ids: Tensor, place) -> Tensor:
        rows.append(len(ids))
        return forward(self, ids, place)

    monkeypatch.setattr(Model, "forward", counting)
    return rows


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
@pytest.mark.parametrize("top_k", [0, 4])
def test_log_probs_are_those_of_the_whole_distribution(model, prompts, temperature, top_k):
    config = SamplingConfig(temperature, top_k, max_new=15, seed=3)
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
            forbidden += int(likelier.sum())
    assert (forbidden > 0) == (temperature > 0)  # sampling does leave the top


def test_a_reply_does_not_depend_on_its_batch(model, prompts):
    expected = [drawn(sample(model, [prompt], CONFIG, replies=3))[0] for prompt in prompts]
    assert len({tuple(ids) for group in expected for ids in group}) == 12  # all differ
    assert drawn(sample(model, prompts, CONFIG, replies=3)) == expected
    assert drawn(sample(model, prompts[::-1], CONFIG, replies=3)) == expected[::-1]
    one = [group[:1] for group in expected]
    five = drawn(sample(model, prompts, CONFIG, replies=5))
    assert drawn(sample(model, prompts, CONFIG)) == one
    assert [group[:3] for group in five] == expected
    others = [random_ids(17, 90), *prompts, random_ids(33, 91)]  # and no common prefix
    assert drawn(sample(model, others, CONFIG, replies=3))[1:-1] == expected
    prefix = prefill(model, prompts[0][:20])
    for some in ([0, 1, 2, 3], [3, 1], [2]):
        got = drawn(sample(model, [prompts[i] for i in some], CONFIG, replies=3, prefix=prefix))
        assert got == [expected[i] for i in some]


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 3)])
def test_what_is_forbidden_is_not_drawn(model, prompts, temperature, top_k):
    """Row 0 may only draw 7 after 5 and 5 after all else, row 1 not what it would draw freely."""
    config = SamplingConfig(temperature, top_k, max_new=6, seed=3)
    free = [group[0].ids for group in sample(model, prompts[:2], config)]
    calls = []

    def forbid(rows: list[int], ids: list[list[int]]) -> Tensor:
        calls.append((list(rows), [list(row) for row in ids]))
        mask = torch.zeros(len(rows), 131, dtype=torch.bool)
        for k, row in enumerate(rows):
            mask[k] = row == 0
            mask[k, [7 if ids[k][-1:] == [5] else 5] if row == 0 else free[1]] = row == 1
        return mask

    decoder = Decoder(model, prompts[:2])
    decoder.fork([1, 1], 6)
    replies = decoder.generate(
        config, observe=lambda row, ids: row == 0 and len(ids) == 4, forbid=forbid
    )
    assert replies[0].ids == [5, 7, 5, 7]
    assert not {*replies[1].ids} & {*free[1]}
    assert [rows for rows, _ in calls] == [[0, 1]] * 4 + [[1]] * 2
    assert calls[2] == ([0, 1], [[5, 7], replies[1].ids[:2]])
    for prompt, reply in zip(prompts, replies, strict=False):  # of the whole vocabulary
        whole = plain(model, prompt + reply.ids).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = whole[range(len(reply.ids)), reply.ids]
        assert reply.log_probs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_every_token_is_computed_once(model, prompts, forwards, with_prefix):
    """Prompt tokens once however many replies; a reply's last token, or a stop token, never."""
    prefix = prefill(model, prompts[0][:20]) if with_prefix else None
    forwards.clear()
    free = sample(model, prompts, CONFIG, replies=4, prefix=prefix)
    prompt_tokens = 21 + 1 + 40 + 9 + (0 if with_prefix else 20)
    assert sum(forwards) == prompt_tokens + 16 * 11
    forwards.clear()
    stop = free[0][0].ids[2]
    cut = sample(model, prompts, CONFIG, replies=4, prefix=prefix, stop_ids={stop})
    assert sum(forwards) == prompt_tokens + sum(len(r.ids) - 1 for group in cut for r in group)
    assert sum(forwards) < prompt_tokens + 16 * 11


# Fed and forked


def check_logits(decoder: Decoder, texts: Sequence[list[int]]) -> None:
    """Row i of the decoder stands at the end of texts[i]."""
    assert decoder.logits.shape[0] == len(texts)
    for row, text in enumerate(texts):
        error = (decoder.logits[row] - plain(decoder.model, text)[-1]).abs().max()
        assert error < 1e-4, f"row {row}: {error}"


@pytest.mark.parametrize("replies", [1, 2])
def test_feed_after_generate(tiny_pair, replies):
    """One row stopped, one was observed, others used their budget; then all are fed unequally,
    twice, and generate once more."""
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


@pytest.mark.parametrize("counts", [[9, 9], [1, 4]])
def test_fork_after_feed(model, counts):
    """Replies become several replies: a tree of four levels."""
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


def test_the_vocabulary_is_not_computed_before_it_is_asked_for(model, prompts, monkeypatch):
    monkeypatch.setattr(model, "logits", None)
    decoder = Decoder(model, prompts)
    decoder.fork([2] * 4, 4)
    decoder.feed([[5]] * 8)
    monkeypatch.undo()
    check_logits(decoder, [[*prompt, 5] for prompt in prompts for _ in range(2)])


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
    [whole] = zip(*sample(model, prompts, HOT), strict=True)
    decoder = Decoder(model, prompts, room=12)
    first = decoder.generate(replace(HOT, max_new=n))
    if fed:
        decoder.feed([[] for _ in prompts])
    second = decoder.generate(replace(HOT, max_new=12 - n))
    for one, a, b in zip(whole, first, second, strict=True):
        assert a.ids + b.ids == one.ids
        assert a.log_probs + b.log_probs == pytest.approx(one.log_probs, abs=1e-4)
        assert len(set(one.ids)) > 6
    decoder.feed([[] for _ in prompts])
    check_logits(decoder, [prompt + one.ids for prompt, one in zip(prompts, whole, strict=True)])


# The prefix and families


@pytest.mark.parametrize("held", [0, 15, 16, 40, 60])
def test_prefix_with_any_common_part(model, held):
    """A prefix of 60 ids of which the prompts share `held`, whatever that is worth."""
    prefix = prefill(model, random_ids(60, 1))
    prompts = [prefix.ids[:held] + random_ids(n, 40 + n) for n in (1, 30)]
    if held > 20:  # one of them leaves earlier
        prompts.append(prefix.ids[:20] + random_ids(9, 44))
    check_logits(Decoder(model, prompts, prefix), prompts)
    inside = [prefix.ids[: max(held, 1)], prefix.ids]  # still the logits of their last ids
    check_logits(Decoder(model, inside, prefix), inside)
    assert [level.lengths for level in prefix.cache.levels] == [[60]]  # it was not written to


def held(decoder: Decoder) -> list[list[int]]:
    return [level.lengths for level in decoder.cache.levels]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        # (length of the common beginning with the text before, length of the rest)
        ([(0, 30)], ([0], [29])),
        ([(0, 30), (sampler.SHARED_LEAST - 1, 5)], ([0, 1], [29, 19])),
        ([(0, 30), (sampler.SHARED_LEAST, 5)], ([0, 0], [16])),
        ([(0, 30), (20, 5), (0, 9), (0, 40), (25, 3)], ([0, 0, 1, 2, 2], [20, 8, 25])),
        ([(0, 30), (25, 5), (18, 7)], ([0, 0, 0], [18])),  # the third shortens what is shared
        ([(0, 30), (30, 0)], ([0, 0], [29])),  # equal: each keeps an id
    ],
)
def test_families_are_neighbours_that_begin_alike(lengths, expected):
    texts: list[list[int]] = []
    for i, (common, rest) in enumerate(lengths):
        before = texts[-1][:common] if texts else []
        texts.append(before + [1000 * (i + 1) + j for j in range(rest)])
    family, heads = families(texts)
    assert (family, [len(head) for head in heads]) == expected
    for text, k in zip(texts, family, strict=True):
        assert text[: len(heads[k])] == heads[k]
        assert len(text) > len(heads[k])


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("replies", [1, 3])
def test_families_change_no_reply(model, monkeypatch, with_prefix, replies):
    """The same ids and log-probabilities as when every prompt is computed for itself."""
    start = random_ids(20, 1)
    families_of = [start + random_ids(30, seed) for seed in (2, 3)]
    prompts = [families_of[0] + random_ids(n, 40 + n) for n in (7, 1, 12)]
    prompts += [start + random_ids(9, 60)]  # alone
    prompts += [families_of[1] + random_ids(n, 70 + n) for n in (3, 11)]
    prefix = prefill(model, start) if with_prefix else None
    decoder = Decoder(model, prompts, prefix)
    assert held(decoder)[1:] == [[30, 8, 30], [7, 1, 12, 1, 3, 11]]
    check_logits(decoder, prompts)
    shared = sample(model, prompts, HOT, replies, prefix=prefix)
    monkeypatch.setattr(sampler, "families", lambda texts: ([0] * len(texts), [[]] * len(texts)))
    plain_replies = sample(model, prompts, HOT, replies, prefix=prefix)
    for group, expected in zip(shared, plain_replies, strict=True):
        assert [reply.ids for reply in group] == [reply.ids for reply in expected]
        for one, other in zip(group, expected, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize("limit", ["PREFILL", "PREFILL_BYTES"])
def test_long_prompts_come_in_portions(model, monkeypatch, forwards, limit):
    """No forward has more tokens than it may, unless one prompt alone has; the replies are the
    same."""
    exemplars = [random_ids(30, seed) for seed in (1, 2)]
    prompts = [shown + random_ids(n, 5 + n) for shown in exemplars for n in (12, 11, 60)]
    whole = drawn(sample(model, prompts, HOT, 2))
    each = (4 * model.config.F + 4 * model.config.D) * 4
    monkeypatch.setattr(sampler, limit, {"PREFILL": 40, "PREFILL_BYTES": 40 * each + 7}[limit])
    forwards.clear()
    decoder = Decoder(model, prompts)
    assert forwards == [30, 30, 12 + 11, 60, 12 + 11, 60]
    check_logits(decoder, prompts)
    assert drawn(sample(model, prompts, HOT, 2)) == whole
