"""A *chain*, a model whose next token follows from the last one by a table: replies and their
probabilities are known by hand.
"""

import math
from itertools import pairwise

import pytest
import torch
from fixtures import prompts_of
from test_answer import check
from tiny_bases import make_folder

from nanopersrm.judge import verdict
from nanopersrm.judge.answer import AnswerConfig, answer
from nanopersrm.model.base import Base
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model, ModelConfig


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


def test_a_budget_that_ends_with_the_close_is_no_cut(small):
    [prompt, _] = prompts_of(small, 1)
    model = says(small, prompt, "Umpf</think>")
    budget = len(small.encode("Umpf</think>"))
    for think_tokens, cut in ((budget, False), (budget - 1, True)):
        [[found]] = answer(model, small, [prompt], 1, AnswerConfig(think_tokens=think_tokens))
        assert found.cut == cut
        check(found, 1, budget)


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
