"""Blocks that are computed again, their MLP in tiles: the same gradients, and no more memory."""

from typing import Any

import pytest
import torch
from test_lora import FLAT, SHARED, gradients, loss_of, model_of, random_lora

from nanopersrm.model import recompute as forgetful
from nanopersrm.model.lora import LoraConfig
from nanopersrm.model.transformer import MLP


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert any(grad.abs().max() > 1e-3 for grad in theirs[1:])
    for one, other in zip(ours, theirs, strict=True):
        size = other.abs().max().item()
        torch.testing.assert_close(one, other, atol=1e-5 * max(size, 1), rtol=1e-4)


def found(model: Any, lora: Any, layout: Any, **how: Any) -> list[torch.Tensor]:
    """The loss and all gradients; the same random numbers each time."""
    torch.manual_seed(3)
    loss = loss_of(model, layout, **how)
    loss.backward()
    return [loss.detach(), *gradients(lora)]


@pytest.mark.parametrize("tile", [1, 4, 7, 11])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_tiles_change_nothing(tile, nf4, offload, tiny_base, monkeypatch):
    monkeypatch.setattr(forgetful, "TILE", tile)
    model = model_of(tiny_base, nf4=nf4).train()
    lora = random_lora(model, LoraConfig(rank=4))
    lora.on(model)
    for layout in (FLAT, SHARED):
        plain = found(model, lora, layout)
        same(found(model, lora, layout, recompute=True, offload=offload), plain)


@pytest.mark.parametrize("nf4", [False, True])
def test_dropout_is_that_of_the_first_pass(nf4, tiny_base, monkeypatch):
    """Against plain tiles that are kept, which draw in the same order."""
    monkeypatch.setattr(forgetful, "TILE", 4)
    model = model_of(tiny_base, nf4=nf4).train()
    lora = random_lora(model, LoraConfig(rank=4, dropout=0.3))
    lora.on(model)
    again = found(model, lora, FLAT, recompute=True)
    whole = MLP.forward

    def kept(self: MLP, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole(self, part) for part in x.chunk(forgetful.tiles(len(x)))])

    monkeypatch.setattr(MLP, "forward", kept)
    same(again, found(model, lora, FLAT))


def test_random_numbers_go_on_as_without_a_backward(tiny_base, monkeypatch):
    monkeypatch.setattr(forgetful, "TILE", 4)
    model = model_of(tiny_base).train()
    random_lora(model, LoraConfig(rank=4, dropout=0.3)).on(model)
    torch.manual_seed(3)
    loss = loss_of(model, FLAT, recompute=True)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_row_is_computed_twice(tiny_base, monkeypatch):
    """In the first pass and in the backward, however many tiles: no oftener than without."""
    model = model_of(tiny_base).train()
    random_lora(model, LoraConfig(rank=4)).on(model)
    rows: list[int] = []
    whole = MLP.forward

    def counting(self: MLP, x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return whole(self, x)

    monkeypatch.setattr(MLP, "forward", counting)
    counts = []
    for tile in (1024, 5):
        monkeypatch.setattr(forgetful, "TILE", tile)
        rows.clear()
        loss_of(model, FLAT, recompute=True).backward()
        counts.append(sum(rows))
        assert max(rows) <= tile
    assert counts[0] == counts[1] == 2 * model.config.layers * FLAT.starts[-1]
