"""Every reply parses, and the probabilities behind its digits are those of plain forwards.

Two kinds of tiny model: random ones on a small trained tokenizer, and a *chain*, a model whose next
token follows from the last one by a table, so that replies and probabilities are known by hand.
"""

import math
from itertools import pairwise

import pytest
import torch
from fixtures import KINDS, digits_after, fond_of_quotes, make_base, prompts_of
from tiny_bases import make_folder

from nanopersrm.judge import claims, verdict
from nanopersrm.judge.answer import Answer, AnswerConfig, answer
from nanopersrm.model.base import Base
from nanopersrm.model.cache import Layout
from nanopersrm.model.sampler import prefill
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model, ModelConfig
from nanopersrm.model.weights import load

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=list(KINDS))
def tiny(request, tmp_path_factory) -> tuple[Model, Tokenizer]:
    base = make_base(tmp_path_factory.mktemp("answer") / request.param, request.param)
    return load(base, torch.float32, CPU), Tokenizer.load(base)


def think(model: Model, tokenizer: Tokenizer, prompt: list[int], budget: int) -> list[int]:
    """Prompt, greedy reasoning by plain forwards, and the ids that must stand before A's digit."""
    drawn: list[int] = []
    while len(drawn) < budget and verdict.CLOSE not in tokenizer.decode(drawn):
        ids = torch.tensor(prompt + drawn)
        with torch.inference_mode():
            token = int(model.logits(model(ids, Layout.of([len(ids)]))[-1:]).argmax())
        if token in tokenizer.eos_ids:
            break
        drawn.append(token)
    free = tokenizer.decode(drawn)
    given = "" if not free or free.endswith("\n") else "\n"
    given += "<scores>A=" if verdict.CLOSE in free else "</think>\n<scores>A="
    return prompt + drawn + tokenizer.encode(given)


def check(found: Answer, labels: int, budget: int) -> None:
    said = verdict.parse(found.text, verdict.LABELS[:labels])
    assert said.problem is None, found.text
    assert math.fsum(found.digits) == pytest.approx(1)
    assert len(found.digits) == 9
    assert labels <= found.tokens <= budget + labels
    if labels == 1:
        assert found.joint is None
    else:
        assert found.joint is not None
        sums = [math.fsum(row) for row in found.joint]
        assert sums == pytest.approx(found.digits, abs=1e-12)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_every_reply_parses(tiny, labels, temperature):
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, labels)
    texts = set()
    for seed in range(8 if temperature else 1):
        config = AnswerConfig(
            think_tokens=14, samples=1 + seed % 3, temperature=temperature, seed=seed
        )
        groups = answer(model, tokenizer, prompts, labels, config)
        assert [len(group) for group in groups] == [config.samples] * 2
        for group in groups:
            for found in group:
                check(found, labels, 14)
                texts.add(found.text)
    assert len(texts) >= (2 if temperature == 0 else 20)  # the draws do differ


@pytest.mark.parametrize("thinking", [False, True])
def test_digits_equal_a_plain_forward(tiny, thinking):
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, 1)
    config = AnswerConfig(think=thinking, think_tokens=10)
    prefix = prefill(model, prompts[0][:40])
    for held in (None, prefix):
        for prompt, [found] in zip(
            prompts, answer(model, tokenizer, prompts, 1, config, held), strict=True
        ):
            ids = think(model, tokenizer, prompt, 10 if thinking else 0)
            expected = digits_after(model, tokenizer, ids)
            assert found.digits == pytest.approx(expected.tolist(), abs=1e-5)
            score = math.fsum((d + 1) * float(p) for d, p in enumerate(expected))
            assert verdict.soft_score(found.digits) == pytest.approx(score, abs=1e-4)
            scores = verdict.parse(found.text, "A").scores
            assert scores == {"A": 1 + int(expected.argmax())}
            assert max(expected) - min(expected) > 0.01


def test_a_stop_token_is_no_part_of_the_reply(tiny, monkeypatch):
    """One row stops in the middle, the other not; the digits follow what stands before the stop."""
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, 1)
    config = AnswerConfig(think_tokens=9, temperature=2.0)
    shown: list[list[int]] = []
    decode = tokenizer.decode

    def listening(ids, *rest) -> str:
        shown.append(list(ids))
        return decode(ids, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "decode", listening)
        answer(model, tokenizer, prompts, 1, config)
    one, two = shown[-2:]  # the whole replies, decoded once each
    assert len(one) == len(two) == 9
    stop = next(i for i in one[2:] if i not in two and i not in one[:2])
    monkeypatch.setattr(tokenizer, "eos_ids", frozenset({stop}))
    [first], [second] = answer(model, tokenizer, prompts, 1, config)
    kept = one[: one.index(stop)]
    assert (first.tokens, first.cut) == (len(kept) + 2, False)
    assert (second.tokens, second.cut) == (10, True)
    for found, prompt, ids in ((first, prompts[0], kept), (second, prompts[1], two)):
        given = "</think>\n<scores>A="
        given = given if decode(ids).endswith("\n") else f"\n{given}"
        expected = digits_after(model, tokenizer, prompt + ids + tokenizer.encode(given))
        assert found.digits == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("thinking", [False, True])
def test_joint_equals_plain_forwards(tiny, thinking):
    """p(A = a) p(B = b | A = a), with a forward for each of the nine a."""
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, 2)
    config = AnswerConfig(think=thinking, think_tokens=6)
    between = tokenizer.encode(" B=")
    for prompt, [found] in zip(prompts, answer(model, tokenizer, prompts, 2, config), strict=True):
        ids = think(model, tokenizer, prompt, 6 if thinking else 0)
        first = digits_after(model, tokenizer, ids)
        rows = [
            digits_after(model, tokenizer, [*ids, digit, *between]) for digit in tokenizer.digit_ids
        ]
        expected = first[:, None] * torch.stack(rows)
        assert found.joint is not None
        assert (torch.tensor(found.joint, dtype=torch.float64) - expected).abs().max() < 1e-5
        spread = torch.stack(rows).amax(0) - torch.stack(rows).amin(0)
        assert spread.max() > 3e-4  # B's digit does depend on A's, more than the tolerance
        a = int(first.argmax())
        scores = verdict.parse(found.text, "AB").scores
        assert scores == {"A": a + 1, "B": 1 + int(rows[a].argmax())}


def test_on_text_follows_every_reply(tiny):
    model, tokenizer = tiny
    told: dict[tuple[int, int], list[tuple[str, bool]]] = {}

    def on_text(prompt: int, number: int, text: str, ended: bool) -> None:
        told.setdefault((prompt, number), []).append((text, ended))

    config = AnswerConfig(think_tokens=8, samples=2, temperature=1.0)
    groups = answer(model, tokenizer, prompts_of(tokenizer, 1), 1, config, on_text=on_text)
    assert set(told) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for (prompt, number), calls in told.items():
        assert [ended for _, ended in calls] == [False] * (len(calls) - 1) + [True]
        found = groups[prompt][number]
        assert calls[-1][0] == verdict.parse(found.text, "A").reasoning
        for (before, _), (after, _) in pairwise(calls):
            assert after.startswith(before.rstrip("\ufffd").strip())


def test_quotes_are_copied_from_the_texts_of_their_prompt(tiny, monkeypatch):
    """Whatever a random model draws; left free, it quotes what is nowhere."""
    model, tokenizer = tiny
    fond_of_quotes(model, tokenizer, monkeypatch)
    prompts, seen = prompts_of(tokenizer, 1), {"copied": [0, 0], "free": [0, 0]}
    texts = [["Short. So.", text] for text in ("I am terse.", "Well; it rambles, as I do, and on.")]
    config = AnswerConfig(think_tokens=30, samples=12, temperature=1.0)
    for how, own in (("copied", texts), ("free", None)):
        groups = answer(model, tokenizer, prompts, 1, config, texts=own)
        for (exemplar, text), group in zip(texts, groups, strict=True):
            for found in group:
                check(found, 1, 30)
                report = claims.check(found.text, [exemplar], {"A": text})
                assert how == "free" or report.quotes == report.quotes_true
                seen[how][0] += report.quotes_true
                seen[how][1] += report.quotes
    assert seen["copied"][0] == seen["copied"][1] >= 5
    assert seen["free"][0] < seen["free"][1]


# A chain: the next token follows from the last one by a table, so replies are known by hand


def chain(tokenizer: Tokenizer, table: dict[int, dict[int, float]]) -> Model:
    """A model with p(next | all before) = table[last][next]; others are a million times rarer.

    The embedding is the identity, blocks add nothing, and the head is the table."""
    V = tokenizer.vocab_size
    D = V + V % 2
    config = ModelConfig.of(
        {
            "model_type": "llama",
            "hidden_size": D,
            "num_attention_heads": 1,
            "head_dim": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 2,
            "vocab_size": V,
            "rms_norm_eps": 1e-12,
            "max_position_embeddings": 4096,
            "rope_theta": 1e4,
        }
    )
    model = Model(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    model.embed_tokens.copy_(torch.eye(V, D))
    assert model.lm_head is not None
    for last, shares in table.items():
        model.lm_head.weight[:, last] = math.log(1e-6) / D**0.5
        for token, share in shares.items():
            model.lm_head.weight[token, last] = math.log(share) / D**0.5
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    folder = make_folder(tmp_path_factory.mktemp("chain") / "smollm", "smollm")
    return Tokenizer.load(Base("tiny", folder, "safetensors", {}))


def says(tokenizer: Tokenizer, prompt: list[int], reply: str, end: int | None = None) -> Model:
    """Greedy: `reply`, then the token `end`, and p(d) = d / 45 for every digit d after "="."""
    path = [prompt[-1], *tokenizer.encode(reply)] + ([] if end is None else [end])
    assert len(set(path)) == len(path), f"a token twice in {reply!r}"
    table = {last: {after: 1.0} for last, after in pairwise(path)}
    equals = tokenizer.encode("A=")[-1]
    table[equals] = {token: (i + 1) / 45 for i, token in enumerate(tokenizer.digit_ids)}
    return chain(tokenizer, table)


@pytest.mark.parametrize(
    ("reply", "stops", "reasoning", "cut", "drawn"),
    [
        ("Umpf</think>", False, "Umpf", False, None),
        ("Umpf", True, "Umpf", False, None),
        ("", True, "", False, 1),
        ("</think>", False, "", False, None),
        ("Umpf", False, None, True, 24),
    ],
)
def test_known_replies(small, reply, stops, reasoning, cut, drawn):
    """The model closes, stops, stops at once, closes at once, or never ends."""
    [prompt, _] = prompts_of(small, 1)
    [eos] = small.encode("Z") if not stops else [min(small.eos_ids)]
    model = says(small, prompt, reply, eos if stops else None)
    if cut:  # the last token of the reply leads to itself
        assert model.lm_head is not None
        last = small.encode(reply)[-1]
        model.lm_head.weight[last, last] = 1.0
    [[found]] = answer(model, small, [prompt], 1, AnswerConfig(think_tokens=24))
    assert found.cut == cut
    said = verdict.parse(found.text, "A")
    assert said.problem is None
    assert said.scores == {"A": 9}
    if reasoning is not None:
        assert said.reasoning == reasoning
    else:
        assert said.reasoning.startswith("Umpf")
    expected = drawn or len(small.encode(reply)) + stops
    assert found.tokens == expected + 1
    assert found.digits == pytest.approx([d / 45 for d in range(1, 10)], abs=1e-5)
    assert verdict.soft_score(found.digits) == pytest.approx(285 / 45, abs=1e-4)


def test_known_joint(small):
    """Independent digits with p(d) = d / 45, in one table."""
    [prompt, _] = prompts_of(small, 2)
    model = says(small, prompt, "Umpf</think>")
    [[found]] = answer(model, small, [prompt], 2, AnswerConfig(think_tokens=24))
    assert found.joint is not None
    for a in range(9):
        expected = [(a + 1) * (b + 1) / 45**2 for b in range(9)]
        assert found.joint[a] == pytest.approx(expected, abs=1e-6)
    assert verdict.beats_jointly(found.joint) == pytest.approx(0.5, abs=1e-5)
    assert found.text.endswith("<scores>A=9 B=9</scores>")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("labels", [1, 2])
def test_a_digit_without_a_probability_is_no_score(small, bad, labels):
    [prompt, _] = prompts_of(small, labels)
    model = says(small, prompt, "Umpf</think>")
    assert model.lm_head is not None
    model.lm_head.weight[small.digit_ids[4], small.encode("A=")[-1]] = bad
    [[found]] = answer(model, small, [prompt], labels, AnswerConfig(think=False))
    said = verdict.parse(found.text, "AB"[:labels])
    assert said.scores is None
    assert said.reasoning == ""
    assert not all(map(math.isfinite, found.digits))


# The real base


@pytest.mark.base
def test_real_digits_equal_plain_forwards(smollm):
    """Both modes on the embedded base in fp32, with six tokens of reasoning."""
    model, tokenizer = load(smollm, torch.float32, CPU), Tokenizer.load(smollm)
    for labels in (1, 2):
        prompt = prompts_of(tokenizer, labels)[1]
        [[found]] = answer(model, tokenizer, [prompt], labels, AnswerConfig(think_tokens=6))
        check(found, labels, 6)
        ids = think(model, tokenizer, prompt, 6)
        first = digits_after(model, tokenizer, ids)
        assert found.digits == pytest.approx(first.tolist(), abs=1e-4)
        if found.joint is not None:
            between = tokenizer.encode(" B=")
            for a in (0, 8):
                second = digits_after(model, tokenizer, [*ids, tokenizer.digit_ids[a], *between])
                expected = (first[a] * second).tolist()
                assert found.joint[a] == pytest.approx(expected, abs=1e-4)
