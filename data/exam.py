"""The exam: validation pairs as lessons, made once, so that every trial asks the same.

Each pair is a tree of its chosen and its rejected text (`course.tree`), judged without reasoning;
the first few are also answered freely, the chosen text of one, the rejected text of the next. The
measuring is in `nanopersrm/trial.py`.

Where to read next: `train_sft.py`.
"""

from collections.abc import Sequence
from dataclasses import replace

from data import course
from data.lessons import LessonConfig, Style
from nanopersrm import trial, verdict
from nanopersrm.model import Model
from nanopersrm.pairs import Pair
from nanopersrm.presets import Preset
from nanopersrm.tokenizer import Tokenizer
from nanopersrm.trial import Trial

WRITTEN = 8  # free replies
RULE = f"\n\n{'=' * 80}\n\n"  # between two of them


class Exam:
    """What all trials of a run ask. `near`: the style percentiles for the prompts, or None."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: Tokenizer,
        config: LessonConfig,
        seed: int,
        near: Style | None,
    ):
        self.tokenizer, self.seed = tokenizer, seed
        config = replace(config, form="pointwise", rivals=1)
        trees = [course.tree(pair, {}, tokenizer, config, f"{seed}/exam", near) for pair in pairs]
        self.bundles = [bundle for bundle in trees if bundle is not None]
        self.twins = {pair.id: pair.twin for pair in pairs}
        prompts = [
            course.prompt(pair, ("chosen", "rejected")[i % 2], tokenizer, config, near)
            for i, pair in enumerate(pairs[:WRITTEN])
        ]
        self.prompts = [prompt for prompt in prompts if len(prompt) <= config.longest]

    def hold(self, model: Model, how: Preset) -> tuple[Trial, str]:
        """A trial of the model as it is now, and its replies with their prompts as one text."""
        found, replies = trial.hold(
            model, self.tokenizer, self.bundles, self.twins, self.prompts, how, self.seed
        )
        pages = [
            self.tokenizer.decode(prompt).removesuffix(verdict.OPEN) + reply
            for prompt, reply in zip(self.prompts, replies, strict=True)
        ]
        return found, RULE.join(pages) + "\n"
