"""Every reply parses, and the probabilities behind its digits are those of plain forwards.

Two kinds of tiny model: random ones on a small trained tokenizer, and a *chain*, a model whose next
token follows from the last one by a table, so that replies and probabilities are known by hand.
"""

import math
from itertools import pairwise

import pytest
import torch
from fixtures import KINDS, digits_after, make_base, prompts_of
from tiny_bases import CPU, make_folder

from nanopersrm.judge import verdict
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.reply import Answer, answer
from nanopersrm.model.base import Base
from nanopersrm.model.cache import Layout
from nanopersrm.model.sampler import prefill
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model, ModelConfig
from nanopersrm.model.weights import load


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
    forced = "" if not free or free.endswith("\n") else "\n"
    forced += "<scores>A=" if verdict.CLOSE in free else "</think>\n<scores>A="
    return prompt + drawn + tokenizer.encode(forced)


def check(reply: Answer, labels: int, budget: int) -> None:
    assert verdict.parse(reply.text, verdict.LABELS[:labels]).problem is None, reply.text
    assert math.fsum(reply.digits) == pytest.approx(1)
    assert labels <= reply.tokens <= budget + labels
    assert (reply.joint is None) == (labels == 1)
    if reply.joint is not None:
        sums = [math.fsum(row) for row in reply.joint]
        assert sums == pytest.approx(reply.digits, abs=1e-12)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_every_reply_parses(tiny, labels, temperature):
    model, tokenizer = tiny
    texts = set()
    for seed in range(4 if temperature else 1):
        config = JudgeConfig(think_tokens=14, samples=3, temperature=temperature, seed=seed)
        groups = answer(model, tokenizer, prompts_of(tokenizer, labels), labels, config)
        assert [len(group) for group in groups] == [3, 3]
        for reply in (reply for group in groups for reply in group):
            check(reply, labels, 14)
            texts.add(reply.text)
    assert len(texts) >= (2 if temperature == 0 else 20)  # the draws do differ


@pytest.mark.parametrize("thinking", [False, True])
def test_digits_equal_a_plain_forward(tiny, thinking):
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, 1)
    config = JudgeConfig(think=thinking, think_tokens=10)
    prefix = prefill(model, prompts[0][:40])
    for held in (None, prefix):
        for prompt, [reply] in zip(
            prompts, answer(model, tokenizer, prompts, 1, config, held), strict=True
        ):
            ids = think(model, tokenizer, prompt, 10 if thinking else 0)
            expected = digits_after(model, tokenizer, ids)
            assert reply.digits == pytest.approx(expected.tolist(), abs=1e-5)
            score = math.fsum((d + 1) * float(p) for d, p in enumerate(expected))
            assert verdict.soft_score(reply.digits) == pytest.approx(score, abs=1e-4)
            scores = verdict.parse(reply.text, "A").scores
            assert scores == {"A": 1 + int(expected.argmax())}
            assert max(expected) - min(expected) > 0.01


@pytest.mark.parametrize("thinking", [False, True])
def test_joint_equals_plain_forwards(tiny, thinking):
    """p(A = a) p(B = b | A = a), with a forward for each of the nine a."""
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer, 2)
    config = JudgeConfig(think=thinking, think_tokens=6)
    between = tokenizer.encode(" B=")
    for prompt, [reply] in zip(prompts, answer(model, tokenizer, prompts, 2, config), strict=True):
        ids = think(model, tokenizer, prompt, 6 if thinking else 0)
        first = digits_after(model, tokenizer, ids)
        rows = [
            digits_after(model, tokenizer, [*ids, digit, *between]) for digit in tokenizer.digit_ids
        ]
        expected = first[:, None] * torch.stack(rows)
        assert reply.joint is not None
        assert (torch.tensor(reply.joint, dtype=torch.float64) - expected).abs().max() < 1e-5
        spread = torch.stack(rows).amax(0) - torch.stack(rows).amin(0)
        assert spread.max() > 3e-4  # B's digit does depend on A's, more than the tolerance
        a = int(first.argmax())
        scores = verdict.parse(reply.text, "AB").scores
        assert scores == {"A": a + 1, "B": 1 + int(rows[a].argmax())}


# A chain: the next token follows from the last one by a table, so replies are known by hand


def chain(tokenizer: Tokenizer, table: dict[int, dict[int, float]]) -> Model:
    """A model with p(next | all before) = table[last][next]; others are a million times rarer.

    The embedding is the identity, blocks add nothing, and the head is the table."""
    V = tokenizer.vocab_size
    D = V + V % 2
    config = ModelConfig.of(
        {"model_type": "llama", "hidden_size": D, "num_attention_heads": 1, "head_dim": 2,
         "num_hidden_layers": 1, "intermediate_size": 2, "vocab_size": V, "rms_norm_eps": 1e-12,
         "max_position_embeddings": 4096, "rope_theta": 1e4}
    )  # fmt: skip
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


def scripted(tokenizer: Tokenizer, prompt: list[int], script: str, end: int | None = None) -> Model:
    """Greedy: `script`, then the token `end`, and p(d) = d / 45 for every digit d after "="."""
    path = [prompt[-1], *tokenizer.encode(script)] + ([] if end is None else [end])
    assert len(set(path)) == len(path), f"a token twice in {script!r}"
    table = {last: {after: 1.0} for last, after in pairwise(path)}
    equals = tokenizer.encode("A=")[-1]
    table[equals] = {token: (i + 1) / 45 for i, token in enumerate(tokenizer.digit_ids)}
    return chain(tokenizer, table)


@pytest.mark.parametrize(
    ("script", "end", "tokens"),
    [("Umpf</think>", "", None), ("Umpf", "eos", None), ("", "eos", 1), ("Umpf", "loop", 24)],
)
def test_known_replies(small, script, end, tokens):
    """The model closes, stops, stops at once, or never ends."""
    [prompt, _] = prompts_of(small, 1)
    model = scripted(small, prompt, script, min(small.eos_ids) if end == "eos" else None)
    if end == "loop":  # the last token leads to itself
        assert model.lm_head is not None
        last = small.encode(script)[-1]
        model.lm_head.weight[last, last] = 1.0
    [[reply]] = answer(model, small, [prompt], 1, JudgeConfig(think_tokens=24))
    assert reply.cut == (end == "loop")
    parsed = verdict.parse(reply.text, "A")
    assert parsed.scores == {"A": 9}
    assert parsed.reasoning.startswith(script.removesuffix("</think>"))
    assert reply.tokens == 1 + (tokens or len(small.encode(script)) + (end == "eos"))
    assert reply.digits == pytest.approx([d / 45 for d in range(1, 10)], abs=1e-5)
    assert verdict.soft_score(reply.digits) == pytest.approx(285 / 45, abs=1e-4)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_digit_without_a_probability_is_no_score(small, labels):
    [prompt, _] = prompts_of(small, labels)
    model = scripted(small, prompt, "Umpf</think>")
    assert model.lm_head is not None
    model.lm_head.weight[small.digit_ids[4], small.encode("A=")[-1]] = math.nan
    [[reply]] = answer(model, small, [prompt], labels, JudgeConfig(think=False))
    assert verdict.parse(reply.text, "AB"[:labels]).scores is None
    assert not all(map(math.isfinite, reply.digits))
