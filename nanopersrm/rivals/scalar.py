"""A reward without words: the usual reward model, to know what reasoning is worth.

    s = w · h        h (D,): the state of the last row of the prompt, after the last norm

(Ouyang et al., arXiv 2203.02155.) The same base, an adapter of the same size, the same prompts up
to "<scores>A=": but where the judge reads nine digits there, one trained vector w reads a single
number, without scale and without reasons. It is learned from the same pairs by Bradley-Terry,
-log σ(s[chosen] - s[rival]); `data/train_scalar.py` does it.

What it cannot do is say why, or be wrong in a way that can be read. What it can do is measured
beside the judge by `evaluate.py --beside scalar=FOLDER`: a judge that reasons and is no better has
only learned to talk.

On disk: an adapter folder as train_sft.py leaves it, and in it head.safetensors with w (D,) fp32.
w starts normal with deviation 1 / sqrt(D), so that s starts near the size of a state's numbers.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanopersrm import InputError
from nanopersrm.evaluate.predictions import Score
from nanopersrm.judge import verdict
from nanopersrm.judge.prompts import messages
from nanopersrm.model.lora import Lora, LoraConfig, load_lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.style.profile import measured_block
from nanopersrm.style.similarity import StyleEvidenceFn
from nanopersrm.train import packing
from nanopersrm.train.packing import Batch, Branch

FILE = "head.safetensors"
HEAD = "head"  # its tensor, there and in a checkpoint


class Scalar:
    """An adapter with a head. It learns as a `Lora` does (`training.Learns`)."""

    def __init__(self, lora: Lora, head: Tensor):
        """head (D,) fp32."""
        self.lora, self.head = lora, nn.Parameter(head)

    @staticmethod
    def new(model: Model, config: LoraConfig, seed: int) -> "Scalar":
        """An adapter that does nothing yet, and a random head."""
        D = model.config.D
        random = torch.Generator().manual_seed(seed)
        head = torch.randn(D, generator=random) * D**-0.5
        return Scalar(Lora(model, config, seed), head.to(model.device))

    def parameters(self) -> list[nn.Parameter]:
        return [*self.lora.parameters(), self.head]

    def tensors(self) -> dict[str, Tensor]:
        return {**self.lora.tensors(), HEAD: self.head.detach()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        rest = dict(tensors)
        self.head.detach().copy_(rest.pop(HEAD))
        self.lora.load_tensors(rest)

    def refresh(self) -> None:
        self.lora.refresh()

    def on(self, model: Model) -> None:
        self.lora.on(model)

    def scores(self, hidden: Tensor, batch: Batch) -> Tensor:
        """hidden (N, D) of a batch -> s (n,) fp32 at the rows where the judge reads its digit."""
        return hidden[batch.digit_rows].float() @ self.head


def save_head(folder: Path, scalar: Scalar) -> None:
    """The head, into a folder that has or will have the adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({HEAD: scalar.head.detach().float().cpu()}, folder / FILE)


def load(folder: Path, model: Model) -> Scalar:
    """From its folder; the adapter is not switched on."""
    file = folder / FILE
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cannot be read as safetensors ({error})") from error
    head, D = tensors.get(HEAD), model.config.D
    if head is None or tuple(head.shape) != (D,) or not bool(torch.isfinite(head).all()):
        came = "none" if head is None else f"{tuple(head.shape)}"
        raise InputError(f"{file}: expected {HEAD!r} with {D} finite numbers, found {came}")
    return Scalar(load_lora(folder, model).freeze(), head.float().to(model.device))


def scorer(
    model: Model, tokenizer: Tokenizer, scalar: Scalar, evidence: bool, near: StyleEvidenceFn | None
) -> Score:
    """A judge as `opinions.py` has it: s of each candidate; None where a prompt is too long."""

    @torch.inference_mode()
    def score(
        exemplars: Sequence[str], question: str, candidates: Sequence[str]
    ) -> list[float] | None:
        shown = [text.strip() for text in exemplars]
        asked = [text.strip() for text in candidates]
        told = near(shown, asked) if near is not None and evidence else None
        _, forced = verdict.closing("")
        texts = []
        for i, text in enumerate(asked):
            said = None if told is None else [told[i]]
            measured = measured_block(shown, [text], style_evidence=said) if evidence else None
            chat = messages(shown, [text], question.strip() or None, measured=measured)
            ids = tokenizer.chat(chat, continuation=verdict.OPEN) + tokenizer.encode(forced)
            if len(ids) > model.config.context:
                return None
            texts.append(Branch(tuple(ids), len(ids), digit_at=len(ids) - 1, number=i))
        tree = packing.build_tree("asked", texts)
        batch = packing.batch([tree], model.device)
        with scalar.lora.using(model):
            found = scalar.scores(model(batch.ids, batch.layout), batch).tolist()
        order = [branch.number for branch in tree.branches if branch.digit_at >= 0]
        return [found[order.index(i)] for i in range(len(asked))]

    return score
