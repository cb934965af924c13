"""Conditional likelihood equals plain forwards of whole texts."""

import pytest
import torch
from fixtures import make_base

from nanopersrm import InputError
from nanopersrm.evaluate.likelihood import likelihood, log_likelihoods
from nanopersrm.model.base import Base
from nanopersrm.model.cache import Layout
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load

CPU = torch.device("cpu")
EXEMPLARS = ["I came home late. No supper; no letters, either.", "So be it! We shall see."]
CANDIDATES = ["We arrived late, and there was no supper.", "lol no food again!!"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("likelihood") / "smollm", "smollm", context=512)


@pytest.fixture(scope="module")
def parts(base) -> tuple[Model, Tokenizer]:
    return load(base, torch.float32, CPU), Tokenizer.load(base)


def plainly(model: Model, before: list[int], ids: list[int]) -> float:
    """log p(ids | before) by all logits of one text."""
    whole = before + ids
    hidden = model(torch.tensor(whole), Layout.of([len(whole)]))
    log_p = model.logits(hidden).double().log_softmax(-1)
    return float(sum(log_p[len(before) + n - 1, i] for n, i in enumerate(ids)))


@torch.inference_mode()
def expected(model: Model, tokenizer: Tokenizer, exemplars: list[str], candidate: str) -> float:
    blank = tokenizer.encode("\n\n")
    context = [i for text in exemplars for i in tokenizer.encode(text) + blank]
    ids = tokenizer.encode(candidate)
    return (plainly(model, context, ids) - plainly(model, blank, ids)) / len(ids)


def test_scores_equal_plain_forwards(parts):
    score = likelihood(*parts)
    for exemplars in (EXEMPLARS, EXEMPLARS[1:]):  # the second call remembers log p(c)
        told = [expected(parts[0], parts[1], exemplars, c) for c in CANDIDATES]
        assert score(exemplars, "", CANDIDATES) == pytest.approx(told, abs=1e-4)


def test_exemplars_matter_and_the_order_of_candidates_does_not(parts):
    score = likelihood(*parts)
    one, two = score(EXEMPLARS[:1], "", CANDIDATES), score(EXEMPLARS[1:], "", CANDIDATES)
    assert one is not None
    assert one != pytest.approx(two, abs=1e-3)
    fresh = likelihood(*parts)(EXEMPLARS[:1], "", CANDIDATES[::-1])
    assert fresh == pytest.approx(one[::-1], abs=1e-5)


def test_a_single_token_has_a_probability(parts):
    model, tokenizer = parts
    context, blank = tokenizer.encode("a b c"), tokenizer.encode("\n\n")
    found = log_likelihoods(model, context, blank, [(True, (7,)), (False, (7,))])
    with torch.inference_mode():
        assert found == pytest.approx(
            [plainly(model, context, [7]), plainly(model, blank, [7])], abs=1e-4
        )


def test_long_exemplars_lose_their_beginning(parts):
    score = likelihood(*parts)
    long = ["x y z " * 400, *EXEMPLARS]
    longer = ["q r s " * 900, *long]  # what is left out may be anything
    assert score(long, "", CANDIDATES) == pytest.approx(score(longer, "", CANDIDATES), abs=1e-5)


def test_candidates_that_do_not_fit_are_refused(parts):
    with pytest.raises(InputError, match="candidates"):
        likelihood(*parts)(EXEMPLARS, "", [CANDIDATES[0], "no no " * 600])
