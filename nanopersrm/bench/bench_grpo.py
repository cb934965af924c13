"""Our side of `bench_rft.py`: an adapter of ours, a step of GRPO at a time.

A step is what `learn` in `train_rft.py` does with one prompt: draw a group, reward it, compare,
train, step. Here rewards come from the ids alone, and replies never end early.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kernels.logprob import logprob
from kernels.process import trim
from nanopersrm.bench.bench_trl import CLIP
from nanopersrm.bench.bench_turns import Turns
from nanopersrm.model import weights
from nanopersrm.model.bases import resolve
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.sampler import Reply, SamplingConfig, sample
from nanopersrm.model.transformer import Model
from nanopersrm.train import grpo, optim, packing
from nanopersrm.train.packing import Branch, Bundle, Text
from nanopersrm.train.presets import Preset


class Ours:
    """An adapter of ours, a step at a time."""

    def __init__(
        self, model: Model, how: Preset, sizes: LoraConfig, lr: float, seed: int, sharing: bool
    ):
        """sharing: replies are trained in one tree, with the prompt once."""
        self.model, self.how, self.lr, self.seed = model, how, lr, seed
        self.sharing, self.lora = sharing, Lora(model, sizes, seed)
        chosen = optim.OptimConfig(lr=lr, eight_bit=how.eight_bit)
        self.optimizer = optim.make(self.lora.parameters(), chosen)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=False)
        self.lora.on(model)
        self.model.eval()

    def draw(self, prompt: list[int], G: int, R: int, number: int) -> list[Reply]:
        """G replies of R tokens to the prompt of step `number`."""
        drawing = SamplingConfig(max_new=R, seed=self.seed + number)
        return sample(self.model, [prompt], drawing, G)[0]

    def bundles(self, prompt: list[int], replies: Sequence[Sequence[int]]) -> list[Bundle]:
        """What is trained on: one tree, or each reply with the whole prompt."""
        P = len(prompt)
        whole = [(*prompt, *ids) for ids in replies]
        if not self.sharing:
            return [Bundle(str(i), (), (Branch(ids, P, number=i),)) for i, ids in enumerate(whole)]
        texts = [Text(ids, P, number=i) for i, ids in enumerate(whole)]
        return packing.grow_within("group", texts, self.how.budget)

    def train(
        self,
        prompt: list[int],
        replies: Sequence[Sequence[int]],
        rewards: Sequence[float],
        drawn: Sequence[Sequence[float]] | None = None,
    ) -> float:
        """One update, as in `train_rft.py` -> the loss. drawn: the sampler's log-probabilities."""
        device, how, kind = self.model.device, self.how, grpo.GrpoConfig()
        group = torch.zeros(len(replies), dtype=torch.int64)
        parts = torch.tensor(rewards)[:, None]  # (G, 1)
        advantage = grpo.advantages(parts, torch.ones(1), group, 1, kind).to(device)  # (G,)
        lengths = torch.tensor([len(ids) for ids in replies])
        weight = grpo.token_weights(lengths, max(map(len, replies)), kind).to(device)  # (G,)
        total, seen = torch.zeros((), device=device), []
        for micro in packing.pack(self.bundles(prompt, replies), how.budget):
            batch = packing.batch(micro, device)
            hidden = self.model(
                batch.ids, batch.layout, recompute=how.recompute, offload=how.offload
            )
            log_probs, entropy = logprob(
                hidden[batch.rows], self.model.head(), batch.targets, chunk_bytes=how.chunk_mb << 20
            )  # (M,) each
            owners = torch.unique_consecutive(batch.owners).tolist()
            flat = [p for i in owners for p in drawn[i]] if drawn is not None else None
            loss, measured = grpo.policy_loss(
                log_probs,
                batch.owners,
                advantage,
                weight,
                kind,
                sampler=None if flat is None else torch.tensor(flat, device=device),
                entropy=entropy,
            )
            loss.backward()
            seen.append(measured)
            total += loss.detach()
        optim.update(self.optimizer, self.scaler, self.lr, CLIP)
        self.lora.refresh()
        grpo.statistics(seen)
        if device.type == "cpu":
            trim()
        return float(total)

    def step(self, prompt: list[int], G: int, R: int, number: int, turns: Turns) -> None:
        """Draw, reward and train, when it is our turn."""
        turns.wait()
        replies = self.draw(prompt, G, R, number)
        ids = [reply.ids for reply in replies]
        rewards = turns.drawn(ids)
        self.train(prompt, ids, rewards, [reply.log_probs for reply in replies])
        turns.done()


def load(
    base: str | None,
    sizes: dict[str, Any] | None,
    how: Preset,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Model:
    """The weights in the folder `base`, or else random ones of these sizes."""
    if base is not None:
        model = weights.load(resolve(base), dtype, device, how.nf4, how.host_embedding)
    else:
        assert sizes is not None, "neither a base nor sizes"
        model = weights.random(sizes, dtype, device, how.nf4, seed, how.host_embedding)
    with torch.no_grad():  # every weight is touched once, as on the other sides
        layout = Layout.of([8])
        placed = Layout(layout.starts, layout.parents, layout.positions.to(device))
        model.logits(model(torch.arange(8, device=device), placed))
    return model
