"""SFT data: which examples a step has, and what a pair becomes, as token ids.

Step s takes the pairs s * b up to (s + 1) * b of an endless row of epochs. All that is drawn
follows from the seed and the number of the step, so a run that is interrupted goes on with what it
would have seen.

From a pair (exemplars of a writer, `chosen` by them, `rejected` not) two things are learned:

    imitation   the prompt that the judge would see, and a reply of `replies.py` to write after it
    contrast    the prompts of the chosen text, the rejected one and texts of other writers, each up
                to "<scores>A=", where the chosen text must get the highest digit

Both share one tree (`packing.build_tree`): the exemplars once, under them each candidate,
under the candidate its reply and its score line.

A reply is spelt as the judge would meet it, piece by piece, never as one text:

    the thought | \\n</think>\\n<scores>A= | 7 | </scores> | end of turn

A tokenizer that joins "." with the line break after it would otherwise make training see other ids
than judging. One slip after the thought makes the whole of no use: these tokens are the tail that
counts more (`packing.TAIL_WEIGHT`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanopersrm import InputError
from nanopersrm.judge import verdict
from nanopersrm.judge.prompts import prompt_ids
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.pairs import Pair, read, twin_pairs
from nanopersrm.style import evidence
from nanopersrm.style.evidence import GUESS
from nanopersrm.style.profile import measured_block
from nanopersrm.style.reading import Reading, StyleEvidenceFn, style_evidence_fn
from nanopersrm.train.packing import Branch, PrefixTree, build_tree
from nanopersrm.train.replies import ROLES, reply
from nanopersrm.train.run import Run

PairsByAuthor = dict[str, dict[str, list[Pair]]]  # domain -> author of the exemplars -> their pairs
LEAST_GAIN = 1e-3  # nats a pair, of evidence over a guess
MEASURED = 2000  # pairs on which features that need no model are weighed
HELD_OUT = 0.1  # share of the writers whose pairs are for validation


@dataclass(frozen=True)
class ExamplesConfig:
    """What pairs are turned into."""

    evidence: bool = True  # prompts carry what was measured of the texts
    rivals: int = 2  # other candidates in a list for contrast
    longest: int = 2048  # tokens of prompt and reply; longer pairs are left out

    def __post_init__(self) -> None:
        if min(self.rivals, self.longest) < 1:
            raise InputError(
                f"expected numbers from 1, got rivals {self.rivals}, longest {self.longest}"
            )


class SftData:
    """The training pairs, and what each step has of them."""

    def __init__(
        self, pairs: Sequence[Pair], tokenizer: Tokenizer, config: ExamplesConfig, seed: int
    ):
        self.pairs = [stripped(pair) for pair in pairs]
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.by_author = pairs_by_author(self.pairs)
        self.style_evidence: StyleEvidenceFn | None = None  # for the prompts, see `show`
        self.epoch, self.order = -1, list[Pair]()  # the latest
        self.left_out = 0  # trees that were too long

    def trees(self, step: int, count: int) -> list[PrefixTree]:
        """The trees of the `count` pairs of a step; those too long are left out."""
        trees = []
        for place in range(step * count, (step + 1) * count):
            epoch, index = divmod(place, len(self.pairs))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, epoch_order(self.pairs, self.seed, epoch)
            trees.append(self._tree(self.order[index], f"{self.seed}/{epoch}"))
        self.left_out += trees.count(None)
        return [tree for tree in trees if tree is not None]

    def _tree(self, pair: Pair, seed: str) -> PrefixTree | None:
        texts = pair_texts(
            pair, self.by_author, self.tokenizer, self.config, seed, self.style_evidence
        )
        return None if texts is None else build_tree(pair.id, *texts)

    def show(self, reading: Reading, held_out: Sequence[Pair]) -> None:
        """Have prompts show what reading measures, by weights that have not seen their
        writer. An error where then even the pair with the least text is too long."""
        authors = authors_by_exemplars([*self.pairs, *held_out])
        self.style_evidence = style_evidence_fn(reading, authors)
        shortest = min(
            self.pairs, key=lambda p: sum(map(len, (*p.exemplars, p.chosen, p.rejected)))
        )
        if self._tree(shortest, "0/0") is None:
            raise InputError(
                f"pairs: expected some whose prompt and reply have at most {self.config.longest} "
                f"tokens, found none among {len(self.pairs)}; raise --examples.longest"
            )

    # What reading measures

    def weigh_features(
        self, reading: Reading, count: int, held_out: Sequence[Pair], run: Run
    ) -> None:
        """Weigh all features as one, where it has not been done: what each is worth beside the
        others. `count` pairs are read, of writers held out, whom the reading has not learned.
        Not used where it is no better than a guess."""
        if not count or not self.config.evidence:
            reading.evidence = None
        elif reading.evidence is not None:
            run.note("features: weighed before, with the reading")
        else:
            sample = [*held_out[:count], *self._sample(MEASURED)]
            read = min(count, len(held_out) or len(sample))
            run.note(f"features: weighing them on {len(sample):,} pairs, {read:,} of them read")

            def readings(exemplars: Sequence[str], texts: Sequence[str]) -> list[float]:
                run.check_signal()
                return reading.scores(exemplars, texts)

            weighed = evidence.fit(sample, readings, read)
            assert weighed.loss is not None, "a fit measures it"
            reading.evidence = weighed if weighed.loss < GUESS - LEAST_GAIN else None
            run.note(
                f"features: {weighed.loss:.2f} nats a pair by other writers, a guess {GUESS:.2f}"
            )

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
    pair: Pair,
    tokenizer: Tokenizer,
    config: ExamplesConfig,
    style_evidence: StyleEvidenceFn | None,
    candidates: Sequence[str] = (),
) -> list[list[int]]:
    """What the judge would be asked about each candidate, up to the start of the reply.

    candidates: by default the chosen and the rejected text.
    """
    candidates = candidates or (pair.chosen, pair.rejected)
    shown = list[float]()
    if style_evidence is not None and config.evidence:
        shown = style_evidence(pair.exemplars, candidates)
    prompts = []
    for i, text in enumerate(candidates):
        measured = None
        if config.evidence:
            measured = measured_block(pair.exemplars, [text], shown[i : i + 1])
        texts = (pair.exemplars, [text], pair.question or None)
        prompts.append(prompt_ids(tokenizer, *texts, measured=measured))
    return prompts


def pair_texts(
    pair: Pair,
    by_author: PairsByAuthor,
    tokenizer: Tokenizer,
    config: ExamplesConfig,
    seed: str,
    style_evidence: StyleEvidenceFn | None,
    tails: bool = True,
) -> tuple[list[Branch], int] | None:
    """The whole texts of a pair, and which of them is the chosen one of the list; None where a
    prompt and its reply are too long.

    First imitation, a reply about the chosen text and one about the rejected; then contrast, in
    drawn order, of these and texts of other writers, each up to where the judge that does not think
    draws the digit. Rivals too long are left out. tails: they count more.
    """
    rng = random.Random(f"{seed}/{pair.id}/rivals")
    candidates = [pair.chosen, pair.rejected, *_rivals(pair, by_author, config.rivals - 1, rng)]
    prompts = prompts_of(pair, tokenizer, config, style_evidence, candidates)
    end, texts = turn_end(tokenizer), list[Branch]()
    for role, prompt in zip(ROLES, prompts, strict=False):
        words = random.Random(f"{seed}/{pair.id}/pointwise/{role}")
        written = verdict.parse(reply(pair, role, words, config.evidence), verdict.LABELS[:1])
        assert written.scores is not None, f"pair {pair.id!r}: {written.problem}"
        thought = written.reasoning
        ids = [*spell(thought, written.scores[verdict.LABELS[0]], tokenizer), end]
        tail = len(ids) - len(tokenizer.encode(thought)) if tails else 0
        texts.append(Branch((*prompt, *ids), len(prompt), tail=tail))
    if max(len(text.ids) for text in texts) > config.longest:
        return None
    score_line = tokenizer.encode(verdict.closing("")[1])
    lines = {text: (*prompt, *score_line) for text, prompt in zip(candidates, prompts, strict=True)}
    listed = [text for text in candidates if len(lines[text]) <= config.longest]
    rng.shuffle(listed)
    sizes = [len(lines[text]) for text in listed]
    texts += [Branch(lines[t], n, digit_at=n - 1) for t, n in zip(listed, sizes, strict=True)]
    return texts, len(ROLES) + listed.index(pair.chosen)


def spell(thought: str, digit: int, tokenizer: Tokenizer) -> list[int]:
    """The ids of a reply after "<think>\\n", in the pieces in which the judge would meet them."""
    _, forced = verdict.closing(thought)
    ids = tokenizer.encode(thought) + tokenizer.encode(forced)
    return [*ids, tokenizer.digit_ids[digit - 1], *tokenizer.encode(verdict.SCORES_END)]


def turn_end(tokenizer: Tokenizer) -> int:
    """The token with which the chat template ends what the assistant says."""
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    ends = [i for i in tokenizer.chat(chat, generation=False) if i in tokenizer.eos_ids]
    if not ends:
        raise InputError(
            f"{tokenizer.name}: expected a chat template that ends a reply with one of the tokens "
            f"{sorted(tokenizer.eos_ids)}, found none of them"
        )
    return ends[-1]


def _rivals(pair: Pair, by_author: PairsByAuthor, count: int, rng: random.Random) -> list[str]:
    """Texts by `count` other authors of the domain, or by as many as there are."""
    known = [pair.chosen, pair.rejected, *pair.exemplars]  # none of these again
    rivals: list[str] = []
    authors = [name for name in by_author.get(pair.domain, ()) if name != pair.author]
    for author in rng.sample(authors, len(authors)):
        if len(rivals) == count:
            break
        text = rng.choice(by_author[pair.domain][author]).chosen
        if text not in known and text not in rivals:
            rivals.append(text)
    return rivals


def pairs_by_author(pairs: Sequence[Pair]) -> PairsByAuthor:
    """Who wrote what in which domain: made once, so that drawing from 12,000 pairs is quick."""
    by_author: PairsByAuthor = {}
    for pair in pairs:
        by_author.setdefault(pair.domain, {}).setdefault(pair.author, []).append(pair)
    return by_author


def authors_by_exemplars(pairs: Sequence[Pair]) -> dict[tuple[str, ...], str]:
    """Whose the exemplars are: the weights of what prompts show must not have seen them."""
    return {stripped(pair).exemplars: pair.author for pair in pairs}


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
