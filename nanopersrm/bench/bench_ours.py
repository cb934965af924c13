"""Our side of `bench_train.py`: an adapter in training; texts and weights for everybody.

A step is a few bundles (`packing.py`). Everybody else takes whole texts, (ids, index of the first
token of the reply), so this is the one place that knows what a bundle is made of.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.transformer import Model
from nanopersrm.train import objective, optim, packing
from nanopersrm.train.packing import Branch, Bundle
from nanopersrm.train.presets import Preset

Text = tuple[list[int], int]  # ids, and the index of the first one of the reply


def whole(bundle: Bundle) -> list[Text]:
    """The texts of a bundle that have a reply, each with all that it continues."""
    paths: list[list[int]] = []
    found = []
    for branch in bundle.branches:
        above = bundle.prefix if branch.under < 0 else paths[branch.under]
        paths.append([*above, *branch.ids])
        if branch.reply_from < len(branch.ids):
            found.append((paths[-1], len(above) + branch.reply_from))
    return found


def unshared(bundles: Sequence[Bundle]) -> list[Bundle]:
    """The same texts, a bundle each."""
    return [
        Bundle(bundle.name, (), (Branch(tuple(ids), first),))
        for bundle in bundles
        for ids, first in whole(bundle)
    ]


def texts(bundles: Sequence[Bundle]) -> list[Text]:
    return [text for bundle in bundles for text in whole(bundle)]


def for_peers(bundles: Sequence[Bundle], budget: int) -> dict[str, Any]:
    """A step as `bench_peers.py` takes it: texts, and the indices of those in each micro-batch.

    Padded batches follow the data's order; packed ones are filled as ours are.
    """
    found, padded = texts(bundles), [[0]]
    longest = len(found[0][0])
    for i, (ids, _) in enumerate(found[1:], start=1):
        longest = max(longest, len(ids))
        if longest * (len(padded[-1]) + 1) > budget:
            padded.append([])
            longest = len(ids)
        padded[-1].append(i)
    numbered = [replace(one, name=str(i)) for i, one in enumerate(unshared(bundles))]
    packed = [[int(one.name) for one in some] for some in packing.pack(numbered, budget)]
    return {"texts": found, "padded": padded, "packed": packed}


class Ours:
    """An adapter of ours in training. Several of them may share a model: they take turns."""

    def __init__(
        self,
        model: Model,
        how: Preset,
        sizes: LoraConfig,
        lr: float,
        seed: int,
        digit_ids: Sequence[int],
        sharing: bool,
    ):
        """sharing: what texts of a bundle begin with is computed once."""
        self.model, self.how, self.digit_ids, self.sharing = model, how, digit_ids, sharing
        self.lora = Lora(model, sizes, seed)
        chosen = optim.OptimConfig(lr=lr, eight_bit=how.eight_bit)
        self.optimizer = optim.make(self.lora.parameters(), chosen)

    def step(self, bundles: Sequence[Bundle]) -> float:
        """One step on these bundles -> the mean loss of a reply token."""
        count = sum(len(ids) - first for ids, first in texts(bundles))
        self.lora.on(self.model)
        total = torch.zeros((), device=self.model.device)
        for some in packing.pack(bundles if self.sharing else unshared(bundles), self.how.budget):
            sums = objective.sums(
                self.model,
                packing.batch(some, self.model.device),
                self.digit_ids,
                objective.ObjectiveConfig(pair=0.0, list=0.0),
                self.how,
            )
            loss = sums.imitation / count
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lora.refresh()
        return float(total)


def write_base(model: Model, sizes: dict[str, Any], folder: Path) -> str:
    """A Hugging Face folder with the weights of `model`, without a tokenizer."""
    folder.mkdir(parents=True)
    names = {name: f"model.{name}" for name, _ in model.named_parameters()}
    names |= {"embed_tokens": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    tensors = {names[name]: p.data.contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return str(folder)
