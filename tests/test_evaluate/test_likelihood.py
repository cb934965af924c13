"""Conditional likelihood equals plain forwards of whole texts."""

import pytest
import torch
from fixtures import EXEMPLARS, make_base

from nanopersrm import InputError
from nanopersrm.evaluate.likelihood import likelihood
from nanopersrm.model.cache import Layout
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load

CPU = torch.device("cpu")
TEXTS = ["We arrived late, and there was no supper.", "lol", "lol no food again!!"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Model, Tokenizer]:
    base = make_base(tmp_path_factory.mktemp("likelihood") / "smollm", "smollm", context=512)
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


def test_scores_equal_plain_forwards(parts: tuple[Model, Tokenizer]):
    score = likelihood(*parts)
    for exemplars in (EXEMPLARS, EXEMPLARS[1:]):
        plain = [expected(*parts, exemplars, candidate) for candidate in TEXTS]
        assert score(exemplars, "", TEXTS) == pytest.approx(plain, abs=1e-4)


def test_long_exemplars_lose_their_beginning(parts):
    score = likelihood(*parts)
    long = ["x y z " * 400, *EXEMPLARS]
    longer = ["q r s " * 900, *long]  # what is left out may be anything
    assert score(long, "", TEXTS) == pytest.approx(score(longer, "", TEXTS), abs=1e-5)
    with pytest.raises(InputError, match="candidates"):
        score(EXEMPLARS, "", [TEXTS[0], "no no " * 600])
