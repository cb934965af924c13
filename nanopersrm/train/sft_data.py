"""SFT data: which examples a step has, and what a pair becomes, as token ids.

Step s takes the pairs s * b up to (s + 1) * b of an endless row of epochs. All that is drawn
follows from the seed and the number of the step, so a run that is interrupted goes on with what it
would have seen.

A pair (exemplars of a writer, `chosen` by them, `rejected` not) becomes one tree. It has a ledger
of each candidate, as a teacher chooses it: the teacher stops with the chance σ((STOP - m) / SHARP),
where the best line left says m decibans either way, and else takes a line with a chance in
proportion to exp(|decibans| / SOFT). So lines that say much come first, and the ledger ends when
the rest says little. All chances are to be imitated, not only what was drawn.

Under the first lines of each ledger, some or all or none, hang many endings with a made-up sum.
They teach what a digit means, and only the digit is a target. The sums are spread evenly from -36
to +36, one in four from -99 to +99. An ending takes some 20 tokens, so it is learned cheaply.

The digit. A text with a sum of s decibans may get any digit, with chances that make two digits
compare as the odds say. Let u = s · log(10) / 10 nats, and g from Gumbel's distribution. The digit
counts how many of eight CUTS are below u + g:

    P(digit <= k) = exp(-exp(u - cut_k))

For two texts P(u + g > u' + g') = 1 / (1 + exp(u' - u)), which is what the evidence means: so the
preference of the two digits is the odds of the ledgers, but for ties. Worked numbers: sums of +10
and -10 give soft scores of 7.8 and 4.6; the evidence says 0.990, their digits 0.987.

All else in a reply is context. A reply is spelt as the judge meets it, piece by piece, never as one
text (`reply.py`). With `free` the ledger is told in sentences (`tell.py`), each token a target, and
no sum is made up.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from nanopersrm import InputError
from nanopersrm.judge.reply import Prompt, choice_ids, prompts_about, spell, sum_text
from nanopersrm.judge.tell import sentences
from nanopersrm.judge.verdict import closing
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.pairs import Pair, read, twin_pairs
from nanopersrm.style import evidence
from nanopersrm.style.evidence import DECIBAN, GUESS, Evidence
from nanopersrm.style.ledger import Measurer
from nanopersrm.style.reading import Reading
from nanopersrm.train.packing import PrefixTree, Target, Text, build_tree
from nanopersrm.train.run import Run

SOFT = 1.0  # decibans: a line that says so much more is e times as likely to be next
STOP, SHARP = 0.8, 0.2  # decibans: the ledger ends where the best line left says less
CUTS = tuple(DECIBAN * x for x in (-26.5, -20.0, -14.0, -8.0, -2.0, 4.0, 10.0, 16.0))  # nats
SWEEP, FARTHEST = 36.0, 99.0  # decibans: of three made-up sums in four, and of all
MEASURED = 2000  # pairs on which features that need no model are weighed
HELD_OUT = 0.1  # share of the writers whose pairs are for validation


@dataclass(frozen=True)
class ExamplesConfig:
    """What pairs are turned into."""

    think_lines: int = 8  # lines of a ledger, at most
    synthetic: int = 24  # made-up sums of each ledger, to teach the scale of digits
    digit: float = 4.0  # weight of a digit after a true sum, beside 1 for a line or a made-up sum
    free: bool = False  # replies in free prose instead, for bases that can
    longest: int = 2048  # tokens of prompt and reply; longer pairs are left out

    def __post_init__(self) -> None:
        if min(self.think_lines, self.longest) < 1 or min(self.synthetic, self.digit) < 0:
            raise InputError(f"examples: expected numbers from 1 (synthetic, digit: 0), got {self}")


class SftData:
    """The training pairs, and what each step has of them."""

    def __init__(
        self, pairs: Sequence[Pair], tokenizer: Tokenizer, config: ExamplesConfig, seed: int
    ):
        self.pairs = [stripped(pair) for pair in pairs]
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.measurer: Measurer | None = None  # see `weigh_features`
        self.epoch, self.order = -1, list[Pair]()  # the latest
        self.left_out = 0  # trees that were too long

    def trees(self, step: int, count: int) -> list[PrefixTree]:
        """The trees of the `count` pairs of a step; those too long are left out."""
        trees = list[PrefixTree | None]()
        for place in range(step * count, (step + 1) * count):
            epoch, index = divmod(place, len(self.pairs))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, epoch_order(self.pairs, self.seed, epoch)
            pair, seed = self.order[index], f"{self.seed}/{epoch}"
            assert self.measurer is not None, "nothing measures yet"
            free = self.config.free
            prompts = prompts_of(pair, self.tokenizer, self.measurer, pair.author, free)
            trees.append(pair_tree(pair, prompts, self.tokenizer, self.config, seed))
        self.left_out += trees.count(None)
        return [tree for tree in trees if tree is not None]

    def weigh_features(
        self, reading: Reading | None, count: int, held_out: Sequence[Pair], run: Run
    ) -> Evidence:
        """What each feature is worth beside the others. `count` pairs are read, of writers held
        out, whom the reading has not learned. Habits and n-grams are weighed on training pairs."""
        sample = [*map(stripped, held_out[:count]), *self._sample(MEASURED)]
        read = min(count, len(held_out) or len(sample)) if reading is not None else 0
        run.note(f"features: weighing them on {len(sample):,} pairs, {read:,} of them read")

        def readings(exemplars: Sequence[str], texts: Sequence[str]) -> list[float]:
            run.check_signal()
            assert reading is not None, "nothing reads"
            return reading.scores(exemplars, texts)

        weighed = evidence.fit(sample, readings, read) if read else evidence.fit(sample)
        run.note(f"features: {weighed.loss:.2f} nats a pair by other writers, a guess {GUESS:.2f}")
        return weighed

    def _sample(self, count: int) -> list[Pair]:
        """Some `count` of the pairs, with their twins, or all."""
        couples = twin_pairs(self.pairs)
        random.Random(f"{self.seed}/evidence").shuffle(couples)
        return [pair for couple in couples for pair in couple][:count]


# One pair, `stripped`


def stripped(pair: Pair) -> Pair:
    """The pair with its texts as the judge takes them, without white space around."""
    return replace(
        pair,
        exemplars=tuple(text.strip() for text in pair.exemplars),
        chosen=pair.chosen.strip(),
        rejected=pair.rejected.strip(),
    )


def prompts_of(
    pair: Pair, tokenizer: Tokenizer, measurer: Measurer, writer: str | None, free: bool = False
) -> list[Prompt]:
    """The judge's prompts about the chosen and the rejected text.

    writer: who is trained on; the evidence is then weighed without this writer.
    """
    candidates = (pair.chosen, pair.rejected)
    question = pair.question or None
    return prompts_about(tokenizer, measurer, pair.exemplars, candidates, question, writer, free)


def pair_tree(
    pair: Pair, prompts: Sequence[Prompt], tokenizer: Tokenizer, config: ExamplesConfig, seed: str
) -> PrefixTree | None:
    """Replies about the chosen text and the rejected, as the teacher gives them; None: too long."""
    texts: list[Text] = []
    for role, prompt in zip(("chosen", "rejected"), prompts, strict=True):
        rng = random.Random(f"{seed}/{pair.id}/{role}")
        if config.free:
            texts.append(_prose(prompt, tokenizer, config, rng))
        else:
            texts += _ledger(prompt, tokenizer, config, rng)
    if max(len(text.ids) for text in texts) > config.longest:
        return None
    return build_tree(pair.id, texts, 0)


def _ledger(
    prompt: Prompt, tokenizer: Tokenizer, config: ExamplesConfig, rng: random.Random
) -> list[Text]:
    """A ledger as the teacher chooses it, and beginnings of it with made-up sums."""
    ids = choice_ids(tokenizer)
    size = {f: abs(prompt.ledgers[0].lines[f].decibans) for f in prompt.menu}
    reply, features, targets = list[int](), list[str](), list[Target]()
    while len(features) < config.think_lines and len(features) < len(size):
        left = [feature for feature in size if feature not in features]
        chances = teacher_chances([size[feature] for feature in left])
        allowed = (*(ids.letters[feature] for feature in left), ids.stop)
        at = len(prompt.ids) + len(reply)
        (drawn,) = rng.choices([*left, None], chances)
        chosen = ids.stop if drawn is None else ids.letters[drawn]
        targets.append(Target(at, allowed, tuple(chances), chosen))
        if drawn is None:
            break
        features.append(drawn)
        reply = spell(tokenizer, prompt, features, stop=False)
    whole = (*prompt.ids, *spell(tokenizer, prompt, features))
    (total,) = prompt.sums(features)
    targets.append(_digit(len(whole), total, tokenizer, config.digit))
    texts = [Text(whole, tuple(targets), listed=True)]
    for total in made_up_sums(config.synthetic, rng):
        lines = spell(tokenizer, prompt, features[: rng.randint(0, len(features))], stop=False)
        whole = (*prompt.ids, *lines, ids.stop, *tokenizer.encode(sum_text([total])))
        texts.append(Text(whole, (_digit(len(whole), total, tokenizer),)))
    return texts


def made_up_sums(count: int, rng: random.Random) -> list[float]:
    """So many sums in decibans, spread evenly: three in four within SWEEP, all within FARTHEST."""
    far = count // 4
    return [
        round(most * (2 * (i + rng.random()) / n - 1), 1) + 0.0  # never -0.0
        for most, n in ((SWEEP, count - far), (FARTHEST, far))
        for i in range(n)
    ]


def teacher_chances(sizes: Sequence[float]) -> list[float]:
    """|decibans| of lines -> the chance of each to be the next, and last of the full stop.

    >>> [round(p, 2) for p in teacher_chances([1.0, 0.2])]
    [0.5, 0.23, 0.27]
    """
    stop = 1 / (1 + math.exp(min(50.0, (max(sizes) - STOP) / SHARP)))
    heights = [math.exp((size - max(sizes)) / SOFT) for size in sizes]
    return [*((1 - stop) * height / math.fsum(heights) for height in heights), stop]


def _prose(
    prompt: Prompt, tokenizer: Tokenizer, config: ExamplesConfig, rng: random.Random
) -> Text:
    """The teacher's ledger in sentences, written token by token."""
    ledger, features = prompt.ledgers[0], list[str]()
    while len(features) < config.think_lines and len(features) < len(prompt.menu):
        left = [feature for feature in prompt.menu if feature not in features]
        sizes = [abs(ledger.lines[feature].decibans) for feature in left]
        (drawn,) = rng.choices([*left, None], teacher_chances(sizes))
        if drawn is None:
            break
        features.append(drawn)
    prose = tokenizer.encode(sentences(ledger.shown(features)))
    reply = [*prose, *tokenizer.encode(closing("Prose.")[1])]
    whole = (*prompt.ids, *reply)
    first = len(prompt.ids)
    targets = [Target(first + i, (), id=token) for i, token in enumerate(reply)]
    digit = _digit(len(whole), ledger.total(features), tokenizer, config.digit)
    return Text(whole, (*targets, digit), listed=True)


def _digit(at: int, total: float, tokenizer: Tokenizer, weight: float = 1.0) -> Target:
    """The target of a digit after this sum."""
    chances = tuple(digit_chances(total))
    return Target(at, tuple(tokenizer.digit_ids), chances, weight=weight)


def digit_chances(total: float) -> list[float]:
    """A sum in decibans -> the chances of the digits 1 to 9 (see above).

    >>> [round(p, 2) for p in digit_chances(0.0)]
    [0.0, 0.0, 0.0, 0.0, 0.2, 0.47, 0.23, 0.07, 0.02]
    """
    below = [0.0, *(math.exp(-math.exp(min(50.0, DECIBAN * total - cut))) for cut in CUTS), 1.0]
    return [high - low for low, high in pairwise(below)]


def epoch_order(pairs: Sequence[Pair], seed: int, epoch: int) -> list[Pair]:
    """The pairs in the order of an epoch: couples of twins are shuffled, a couple stays together.

    A step of an even number of pairs then sees both verdicts about the same two texts, and what a
    text says without the exemplars cancels out of the gradient.
    """
    order = twin_pairs(pairs)
    random.Random(f"{seed}/order/{epoch}").shuffle(order)
    return [pair for couple in order for pair in couple]


def split_pairs(
    pairs: Sequence[Pair], validation: Path | None, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, without those of weight 0, and to validate on, by other writers: those of
    a file, or held out."""
    pairs = [pair for pair in pairs if pair.weight > 0]
    if validation is None:
        return hold_out(pairs, seed, HELD_OUT)
    train, held = [pair for pair in pairs if pair.split == "train"], read(validation, empty=True)
    if not train:
        raise InputError("pairs: expected some of the split 'train', found none")
    if both := {pair.author for pair in train} & {pair.author for pair in held}:
        raise InputError(
            f"{validation}: expected writers who are not trained on, found {min(both)!r}, who is"
        )
    return train, held


def hold_out(pairs: Sequence[Pair], seed: int, share: float) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and pairs by other authors to validate on.

    As the pairs say, where some are of the split "validation". Otherwise a `share` of the authors,
    and a twin's author with the first of them. A pair whose twin is on the other side goes out.
    Where fewer than two authors would be left to train on, there is nothing to validate on.
    """
    train = [pair for pair in pairs if pair.split == "train"]
    validation = [pair for pair in pairs if pair.split == "validation"]
    if not train:
        raise InputError(
            "pairs: expected some of the split 'train' and a weight above 0, found none"
        )
    if validation:
        return train, validation
    author_of = {pair.id: pair.author for pair in train}
    twin_author = {pair.author: author_of.get(pair.twin, pair.author) for pair in train}
    authors = sorted(twin_author)
    random.Random(f"{seed}/held out").shuffle(authors)
    held = {*authors[: max(1, round(share * len(authors)))], twin_author[authors[0]]}
    left, out = (
        [
            pair
            for pair in train
            if (pair.author in held) == (author_of.get(pair.twin, pair.author) in held) == side
        ]
        for side in (False, True)
    )
    return (left, out) if out and len({pair.author for pair in left}) > 1 else (train, [])
