"""The beginnings of prompts that a judge keeps: those of the writers it was asked about last.

    kept = Prefixes(model)
    prefix = kept.of(ids)            # computed, or found from before; None where it does not pay

All prompts about one writer begin alike, so their keys and values are worth keeping between calls.
A server is asked about several writers in turns: the last PREFIXES beginnings stay, and the one
that was not asked for the longest goes first.

What it costs. A token has a key and a value in each layer: 2 · layers · K · E numbers.

    SmolLM2-135M   2 · 30 · 3 · 64  = 11,520 numbers    23,040 bytes in 16 bits, 46,080 in fp32
    Qwen2.5-7B     2 · 28 · 4 · 128 = 28,672 numbers    57,344 bytes in 16 bits

Four writers with 1,000 tokens of exemplars each are 92 MB beside SmolLM2 in 16 bits. All beginnings
together hold no more tokens than one context of the model, which a single one may fill: 8,192
tokens, 189 MB, are the most for SmolLM2, as many as if only the last one were kept.

Nothing else changes. A beginning is found by all of its ids and was computed by the same forward as
a new one would be, so a judgement is the same to the last bit.

What we left out. Two beginnings of one writer that differ in their last tokens, as with and without
a question, are two.
"""

from nanopersrm.model.sampler import SHARED_LEAST, Prefix, prefill
from nanopersrm.model.transformer import Model

PREFIXES = 4  # beginnings that are kept


class Prefixes:
    """The last few beginnings, the latest at the end."""

    def __init__(self, model: Model):
        self.model, self.kept = model, list[Prefix]()

    def of(self, ids: list[int]) -> Prefix | None:
        """The keys and values of a beginning; None for one too short to be worth a level."""
        if len(ids) < SHARED_LEAST:
            return None
        found = next((prefix for prefix in self.kept if prefix.ids == ids), None)
        if found is not None:
            self.kept.remove(found)
        else:
            self._make_room(len(ids))  # before it is computed: never more than one context
            found = prefill(self.model, ids)
        self.kept.append(found)
        return found

    def _make_room(self, tokens: int) -> None:
        """Forget the oldest until one more of so many tokens is within both bounds."""
        most = self.model.config.context - tokens
        while self.kept and (
            len(self.kept) >= PREFIXES or sum(len(prefix.ids) for prefix in self.kept) > most
        ):
            del self.kept[0]
