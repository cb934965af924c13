"""The course: which lessons a step of training has.

Step s takes the pairs s · b up to (s + 1) · b of an endless row of epochs, each in an order of its
own (`lessons.plan`), twins side by side. Everything follows from the seed and the number of the
step: nothing is carried from one step to the next, so a run that is interrupted goes on with what
it would have seen, and a checkpoint need not know where in the data it was.

A pair becomes one tree of tokens: the replies of imitation and the score lines of contrast share
the exemplars, and about the same candidate the whole prompt (`packing.grow`).

`strangers` measures for the style similarity what is usual between writers: for a sample of pairs
of the training set, each candidate against exemplars of other writers of its domain. `fused` weighs
it against the instruments that need no model (`nanopersrm/fusion.py`), on another sample. Lessons
show what a fusion says that was fitted without their writer (`writers`).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nanopersrm import InputError
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.pairs import Pair, couples, read
from nanopersrm.style import fusion
from nanopersrm.style.fusion import Fusion
from nanopersrm.style.similarity import Style, StyleEvidenceFn, writer_of
from nanopersrm.train import lessons
from nanopersrm.train.lessons import LessonConfig, Roster, StyleBatch
from nanopersrm.train.packing import Bundle, Text, grow

STRANGERS = 64  # candidates, and as many writers: of each pair of them the likeness is measured
USUAL = 256  # texts for what is usual
EMBEDDED = 64  # texts between two looks at whether to stop
HELD_OUT = 0.1  # share of the writers whose pairs are for trials
FEWEST = 20  # with fewer pairs of strangers in a domain, strangers of other domains count too


class Course:
    """The training pairs, and what each step has of them."""

    def __init__(
        self, pairs: Sequence[Pair], tokenizer: Tokenizer, config: LessonConfig, seed: int
    ):
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.pairs = [pair for pair in pairs if pair.weight > 0]  # the others count for nothing
        if not self.pairs:
            raise InputError(
                f"pairs: expected some with a weight above 0, found {len(pairs)} with 0"
            )
        self.roster = lessons.roster(self.pairs)
        self.epoch, self.order = -1, list[int]()  # the latest
        self.left_out = 0  # trees that were too long

    def step(
        self, step: int, count: int, near: StyleEvidenceFn | None, replies: bool = True
    ) -> list[Bundle]:
        """The trees of the `count` pairs of a step; those too long are left out."""
        found = []
        for place in range(step * count, (step + 1) * count):
            epoch, index = divmod(place, len(self.pairs))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, lessons.plan(self.pairs, self.seed, epoch)
            pair = self.pairs[self.order[index]]
            seed = f"{self.seed}/{epoch}"
            found.append(tree(pair, self.roster, self.tokenizer, self.config, seed, near, replies))
        self.left_out += found.count(None)
        return [bundle for bundle in found if bundle is not None]

    def style_step(self, step: int, writers: int, tokens: int) -> StyleBatch:
        """The texts of a step of style: of each writer one exemplar and one candidate."""
        if writers < 2:
            raise InputError(f"--writers: expected a number from 2, got {writers}")
        rng = random.Random(f"{self.seed}/style/{step}")
        batch = lessons.style_batch(self.roster, self.tokenizer, writers, rng, tokens)
        return replace(batch, exemplars=[[rng.choice(texts)] for texts in batch.exemplars])

    def longest_style(self, writers: int, tokens: int) -> StyleBatch:
        """The most text that a step of style can have, for as many writers."""
        texts = [text for pair in self.pairs for text in (*pair.exemplars, pair.chosen)]
        texts = sorted(dict.fromkeys(texts), key=len, reverse=True)[: 3 * writers]
        ids = [self.tokenizer.encode(text.strip())[:tokens] for text in texts]
        ids += ids[:1] * (3 * writers - len(ids))
        return StyleBatch(
            authors=["longest"] * writers,
            exemplars=[[one] for one in ids[:writers]],
            candidates=ids[writers : 2 * writers],
            negatives=[(i, one) for i, one in enumerate(ids[2 * writers :])],
        )

    def longest(
        self, count: int, near: StyleEvidenceFn | None, replies: bool = True
    ) -> list[Bundle]:
        """The trees of the `count` pairs with the most text, but for those too long to learn from.

        No step has more to compute, but that a rival's text may be longer than those of the pair.
        """

        def size(pair: Pair) -> int:
            return sum(map(len, pair.exemplars)) + 2 * len(pair.chosen) + 2 * len(pair.rejected)

        found: list[Bundle] = []
        for pair in sorted(self.pairs, key=size, reverse=True):
            one = tree(pair, self.roster, self.tokenizer, self.config, "0/0", near, replies)
            found += [one] if one is not None else []
            if len(found) == count:
                break
        if not found:
            raise InputError(
                f"pairs: expected some whose prompt and reply have at most {self.config.longest} "
                f"tokens, found none among {len(self.pairs)}; raise --lesson.longest"
            )
        return found


def tree(
    pair: Pair,
    roster: Roster,
    tokenizer: Tokenizer,
    config: LessonConfig,
    seed: str,
    near: StyleEvidenceFn | None,
    replies: bool = True,
) -> Bundle | None:
    """Imitation and contrast of one pair in one tree; None where it is too long.

    replies: False leaves imitation out, where its weight is 0 or there is nothing to imitate.
    """
    rng = random.Random(f"{seed}/{pair.id}/rivals")
    lines = lessons.contrast_list(pair, roster, tokenizer, config, rng, near)
    told = lessons.imitation(pair, tokenizer, config, seed, near) if replies else []
    if lines is None or (replies and not told):
        return None
    texts: list[Text] = []
    chosen = -1
    for bundle in [*told, lines]:
        before = len(bundle.prefix)
        for i, branch in enumerate(bundle.branches):
            if bundle is lines and i == lines.chosen:
                chosen = len(texts)
            ids = (*bundle.prefix, *branch.ids)
            digit = branch.digit_at + before if branch.digit_at >= 0 else -1
            begin, tail, stress = branch.reply_from + before, branch.tail, branch.stress
            texts.append(Text(ids, begin, branch.weight, digit, tail=tail, stress=stress))
    return grow(pair.id, texts, chosen)


def prompt(
    pair: Pair, role: str, tokenizer: Tokenizer, config: LessonConfig, near: StyleEvidenceFn | None
) -> list[int]:
    """What the judge is asked about one text of a pair, `chosen` or `rejected`."""
    pair = lessons.stripped(pair)
    text = getattr(pair, role)
    percent = lessons.similar(pair, [text], config, near)
    return lessons.prompt(pair, [text], tokenizer, config, percent)


def divided(
    pairs: Sequence[Pair], validation: Path | None, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs for trials, by other writers: those of a file, or held out."""
    if validation is None:
        return lessons.split(pairs, seed, HELD_OUT)
    train, trials = [pair for pair in pairs if pair.split == "train"], read(validation, empty=True)
    if both := {pair.author for pair in train} & {pair.author for pair in trials}:
        raise InputError(
            f"{validation}: expected writers who are not trained on, found {min(both)!r}, who is"
        )
    return train, trials


def usual(roster: Roster, tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    """The ids of texts by many writers, on which the style model measures what is usual."""
    rng = random.Random(f"{seed}/usual")
    pairs = [pair for authors in roster.values() for own in authors.values() for pair in own]
    some = rng.sample(pairs, min(USUAL, len(pairs)))
    return [tokenizer.encode(rng.choice([pair.chosen, *pair.exemplars]).strip()) for pair in some]


def strangers(roster: Roster, tokenizer: Tokenizer, style: Style, seed: int) -> list[float]:
    """The similarities of writers and texts by others, of the same domain."""
    rng = random.Random(f"{seed}/strangers")
    some = [rng.choice(own) for authors in roster.values() for own in authors.values()]
    some = rng.sample(some, min(STRANGERS, len(some)))
    shown = [[tokenizer.encode(text.strip()) for text in pair.exemplars] for pair in some]
    asked = [tokenizer.encode(pair.chosen.strip()) for pair in some]
    vectors = style.embed([text for texts in shown for text in texts]).split([*map(len, shown)])
    writers = torch.stack([writer_of(own) for own in vectors])  # (n, D)
    cosines = (writers @ style.embed(asked).T).tolist()  # (n, n)
    apart = [
        (cosines[i][j], a.domain == b.domain)
        for i, a in enumerate(some)
        for j, b in enumerate(some)
        if a.author != b.author
    ]
    alike = [cosine for cosine, same_domain in apart if same_domain]
    return alike if len(alike) >= FEWEST else [cosine for cosine, _ in apart]


def fused(
    pairs: Sequence[Pair],
    count: int,
    tokenizer: Tokenizer,
    style: Style,
    seed: int,
    pause: Callable[[], None] = lambda: None,
) -> Fusion:
    """All instruments weighed on some `count` of the pairs: whole couples, drawn until there are
    as many. `pause` is called now and then, and may raise."""
    drawn = couples(pairs)
    random.Random(f"{seed}/fused").shuffle(drawn)
    some: list[Pair] = []
    for couple in drawn:
        some += map(lessons.stripped, couple) if len(some) < count else []
    texts = [text for pair in some for text in (*pair.exemplars, pair.chosen, pair.rejected)]
    texts = list(dict.fromkeys(texts))
    vectors: dict[str, torch.Tensor] = {}  # of each text (D,)
    for begin in range(0, len(texts), EMBEDDED):
        pause()
        part = texts[begin : begin + EMBEDDED]
        embedded = style.embed([tokenizer.encode(text) for text in part])  # packed: quicker
        vectors |= zip(part, embedded, strict=True)

    def similar(exemplars: Sequence[str], asked: Sequence[str]) -> list[float]:
        writer = writer_of(torch.stack([vectors[text] for text in exemplars]))
        return [float(vectors[text] @ writer) for text in asked]

    return fusion.fit(some, similar)


def writers(pairs: Sequence[Pair]) -> dict[tuple[str, ...], str]:
    """Whose the exemplars are: the fusion that lessons show must not have seen them."""
    return {lessons.stripped(pair).exemplars: pair.author for pair in pairs}
