"""Lessons: what a pair becomes in training, as token ids.

Three things are learned from a pair (exemplars of a writer, `chosen` by them, `rejected` not):

    imitation   the prompt that the judge would see, and a reply of `replies.py` to write after it
    contrast    the prompts of the chosen text, the rejected one and texts of other writers, each up
                to "<scores>A=", where the chosen text must get the highest digit
    style       exemplars and one more text by each of 16 writers, for `nanopersrm/style.py`

The first two come as a `Bundle`: what all prompts begin with (instructions, exemplars) is its
prefix, computed once. Of 600 real pairs, prompts had 872 tokens of SmolLM2 on average, 540 of them
shared by the candidates, and replies 121: a pair takes 540 + 2 x (332 + 121) = 1,446 rows where two
texts would take 1,986.

A reply is spelt as the judge would meet it, piece by piece, never as one text:

    the thought | \\n</think>\\n<scores>A= | 7 | </scores> | end of turn      (pairwise: 7 | B= | 3)

What stands after the thought is a tenth of the reply, and one slip in it makes the whole of no use:
its tokens count `stress` times. Not 1, because 60 steps of 4 pairs so taught SmolLM2 to reply well
formed 90 times of 100 (drawn freely at temperature 1), and most of the others had slipped there.

The pieces are those of `answer.py`, which forces the second and draws the third from nine ids; a
tokenizer that joins "." with the line break after it would otherwise make training see other ids.

Replies are drawn by (seed, pair, form, role): the same seed words them alike, the next epoch's
otherwise. What we left out: replies of a teacher model (`teacher.py` writes them to a file), and
lists of candidates side by side.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nanopersrm import InputError
from nanopersrm.judge import verdict
from nanopersrm.judge.prompts import messages
from nanopersrm.model.sampler import common_prefix
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.pairs import Pair, couples
from nanopersrm.style.profile import StyleEvidence, measured_block
from nanopersrm.style.similarity import StyleEvidenceFn
from nanopersrm.train.attacks import with_attack
from nanopersrm.train.facts import ROLES, shown
from nanopersrm.train.packing import Branch, Bundle
from nanopersrm.train.replies import reply

Roster = dict[str, dict[str, list[Pair]]]  # domain -> author of the exemplars -> their pairs
HUMAN = "cross_author"  # in pairs of any other kind a rewrite or a model's text is rejected


@dataclass(frozen=True)
class LessonConfig:
    """What pairs are turned into."""

    form: Literal["pointwise", "pairwise", "both"] = "pointwise"  # one candidate a prompt, or two
    evidence: bool = True  # prompts carry what factors.py measured
    rivals: int = 2  # other candidates in a list for contrast
    longest: int = 2048  # tokens of prompt and reply; longer pairs are left out
    stress: float = 4.0  # a token from </think> on counts so often in imitation
    attacks: float = 0.0  # share of the texts in lists for contrast that ask to be scored high

    def __post_init__(self) -> None:
        if self.form not in ("pointwise", "pairwise", "both"):
            raise InputError(f"form: expected pointwise, pairwise or both, got {self.form!r}")
        for name in ("rivals", "longest", "stress"):
            if not 1 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.attacks <= 1:
            raise InputError(f"attacks: expected a share from 0 to 1, got {self.attacks}")


# Imitation


def imitation(
    pair: Pair,
    tokenizer: Tokenizer,
    config: LessonConfig,
    seed: int | str,
    near: StyleEvidenceFn | None = None,
) -> list[Bundle]:
    """A bundle for each form: pointwise about chosen and rejected, pairwise in both orders.

    Empty when a prompt with its reply is longer than `config.longest`.
    """
    pair, bundles = stripped(pair), []
    instruments = similar(pair, [pair.chosen, pair.rejected], config, near)
    end = turn_end(tokenizer)
    for form in ("pointwise", "pairwise") if config.form == "both" else (config.form,):
        prompts, replies = [], []
        for role in ROLES:  # of A
            texts = list(shown(pair, form, role).values())
            prompts.append(prompt(pair, texts, tokenizer, config, instruments))
            rng = random.Random(f"{seed}/{pair.id}/{form}/{role}")
            made = reply(pair, form, role, rng, config.evidence)
            said = verdict.parse(made.text, made.labels)
            assert said.scores is not None, f"pair {pair.id!r}: {said.problem}"
            thought = tokenizer.encode(said.reasoning)
            told = [*spell(said.reasoning, said.scores, tokenizer), end]
            replies.append((told, len(told) - len(thought)))
        shared = _shared(prompts)
        branches = [
            Branch(
                (*ids[shared:], *told),
                len(ids) - shared,
                pair.weight,
                tail=tail,
                stress=config.stress,
            )
            for ids, (told, tail) in zip(prompts, replies, strict=True)
        ]
        if shared + max(len(branch.ids) for branch in branches) <= config.longest:
            bundles.append(Bundle(pair.id, tuple(prompts[0][:shared]), tuple(branches)))
    return bundles


def stripped(pair: Pair) -> Pair:
    """The pair with its texts as the judge takes them, without white space around."""
    return replace(
        pair,
        exemplars=tuple(text.strip() for text in pair.exemplars),
        chosen=pair.chosen.strip(),
        rejected=pair.rejected.strip(),
    )


def prompt(
    pair: Pair,
    candidates: Sequence[str],
    tokenizer: Tokenizer,
    config: LessonConfig,
    near: Mapping[str, StyleEvidence] | None = None,
) -> list[int]:
    """What the judge would be asked about these candidates, up to the start of the reply.

    near: what trained instruments say of each candidate, for the measured block.
    """
    measured = None
    if config.evidence:
        said = [near[text] for text in candidates] if near is not None else None
        measured = measured_block(pair.exemplars, candidates, style_evidence=said)
    chat = messages(pair.exemplars, candidates, pair.question or None, measured=measured)
    return tokenizer.chat(chat, continuation=verdict.OPEN)


def similar(
    pair: Pair, texts: Sequence[str], config: LessonConfig, near: StyleEvidenceFn | None
) -> dict[str, StyleEvidence] | None:
    """What trained instruments say of each text, where the prompts show it."""
    if near is None or not config.evidence:
        return None
    return dict(zip(texts, near(pair.exemplars, texts), strict=True))


def spell(thought: str, scores: dict[str, int], tokenizer: Tokenizer) -> list[int]:
    """The ids of a reply after "<think>\\n", in the pieces in which the judge would meet them."""
    _, forced = verdict.closing(thought)
    ids = tokenizer.encode(thought) + tokenizer.encode(forced)
    for label, digit in scores.items():
        if label != verdict.LABELS[0]:
            ids += tokenizer.encode(f" {label}=")
        ids.append(tokenizer.digit_ids[digit - 1])
    return ids + tokenizer.encode(verdict.SCORES_END)


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


def _shared(prompts: Sequence[list[int]]) -> int:
    """Ids that all prompts begin with; each keeps one of its own, even where all are the same."""
    return min(common_prefix(prompts), min(map(len, prompts)) - 1)


# Contrast


def roster(pairs: Sequence[Pair]) -> Roster:
    """Who wrote what in which domain: made once, so that drawing from 12,000 pairs is quick."""
    found: Roster = {}
    for pair in pairs:
        found.setdefault(pair.domain, {}).setdefault(pair.author, []).append(pair)
    return found


def contrast_list(
    pair: Pair,
    others: Roster,
    tokenizer: Tokenizer,
    config: LessonConfig,
    rng: random.Random,
    near: StyleEvidenceFn | None = None,
) -> Bundle | None:
    """Chosen, rejected and texts of other writers of the domain, one prompt each, in drawn order.

    Whether a text or the last exemplar is attacked does not depend on whose it is. A branch ends
    where the judge that does not think draws the digit. Rivals too long are left out; None when the
    pair itself is.
    """
    pair = stripped(pair)
    texts = [pair.chosen, pair.rejected, *_rivals(pair, others, config.rivals - 1, rng)]
    if config.attacks:
        texts = [
            with_attack(text, rng) if rng.random() < config.attacks else text for text in texts
        ]
        if rng.random() < config.attacks / 2:  # dear: nothing after it is shared with the replies
            *others_shown, last = pair.exemplars
            pair = replace(pair, exemplars=(*others_shown, with_attack(last, rng)))
    said = similar(pair, texts, config, near)
    _, forced = verdict.closing("")
    score = tokenizer.encode(forced)
    prompts = {text: prompt(pair, [text], tokenizer, config, said) + score for text in texts}
    fitting = [text for text in texts if len(prompts[text]) <= config.longest]
    if fitting[:2] != texts[:2]:
        return None
    rng.shuffle(fitting)
    shared = _shared([prompts[text] for text in fitting])
    branches = []
    for text in fitting:
        ids = tuple(prompts[text][shared:])
        branches.append(Branch(ids, len(ids), pair.weight, digit_at=len(ids) - 1))
    prefix = tuple(prompts[texts[0]][:shared])
    return Bundle(pair.id, prefix, tuple(branches), fitting.index(texts[0]))


def _rivals(pair: Pair, others: Roster, count: int, rng: random.Random) -> list[str]:
    """Texts by `count` other authors of the domain, or by as many as there are."""
    found = [pair.chosen, pair.rejected, *pair.exemplars]  # none of these again
    own, authors = len(found), [name for name in others.get(pair.domain, ()) if name != pair.author]
    for author in rng.sample(authors, len(authors)):
        if len(found) == own + count:
            break
        text = rng.choice(others[pair.domain][author]).chosen.strip()
        if text not in found:
            found.append(text)
    return found[own:]


# Style


@dataclass(frozen=True)
class StyleBatch:
    """Writers of one step of the style adapter; candidate i is by the writer of exemplars i."""

    authors: list[str]
    exemplars: list[list[list[int]]]  # of each writer some texts, of each text its ids
    candidates: list[list[int]]
    negatives: list[tuple[int, list[int]]]  # (writer, a rewrite of theirs or a model's text)

    @property
    def tokens(self) -> int:
        """Of all texts."""
        shown = sum(len(text) for texts in self.exemplars for text in texts)
        return shown + sum(map(len, self.candidates)) + sum(len(ids) for _, ids in self.negatives)


def style_batch(
    others: Roster, tokenizer: Tokenizer, writers: int, rng: random.Random, tokens: int
) -> StyleBatch:
    """One pair of each of `writers` authors of a drawn domain, its texts cut to `tokens`.

    A domain is drawn in proportion to its authors; where it has too few, others help out.
    """
    domains = list(others)
    if len({author for domain in domains for author in others[domain]}) < 2:
        raise InputError("pairs: expected at least 2 authors to learn style from, found fewer")
    first = rng.choices(domains, [len(others[domain]) for domain in domains])[0]
    rest = [(d, author) for d in domains if d != first for author in others[d]]
    drawn: dict[str, Pair] = {}
    for some in ([(first, author) for author in others[first]], rest):
        for domain, author in rng.sample(some, len(some)):
            if len(drawn) < writers and author not in drawn:
                drawn[author] = rng.choice(others[domain][author])

    def cut(text: str) -> list[int]:
        return tokenizer.encode(text.strip())[:tokens]

    return StyleBatch(
        authors=list(drawn),
        exemplars=[[cut(text) for text in pair.exemplars] for pair in drawn.values()],
        candidates=[cut(pair.chosen) for pair in drawn.values()],
        negatives=[
            (i, cut(pair.rejected)) for i, pair in enumerate(drawn.values()) if pair.kind != HUMAN
        ],
    )


# Order


def plan(pairs: Sequence[Pair], seed: int, epoch: int) -> list[int]:
    """The order of an epoch, as indices: couples of twins are shuffled, a couple stays together.

    A step then sees both verdicts about the same two texts, and what a text says on its own,
    without the exemplars, cancels out of the gradient. Give a step an even number of pairs.
    """
    place = {pair.id: i for i, pair in enumerate(pairs)}
    order = couples(pairs)
    random.Random(f"{seed}/order/{epoch}").shuffle(order)
    return [place[pair.id] for couple in order for pair in couple]


def split(pairs: Sequence[Pair], seed: int, share: float) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and pairs by other authors to validate on.

    As the pairs say, where some are of the split "validation". Otherwise a `share` of the authors
    of the training pairs is held out, at least one, and one of their twins' authors if else no pair
    would be left with its twin. A pair whose twin is on the other side goes out. Where fewer than
    two authors would be left to train on, there is nothing to validate on.
    """
    train = [pair for pair in pairs if pair.split == "train"]
    validation = [pair for pair in pairs if pair.split == "validation"]
    if not train:
        raise InputError("pairs: expected some of the split 'train', found none")
    if validation:
        return train, validation
    author_of = {pair.id: pair.author for pair in train}
    beside = {pair.author: author_of.get(pair.twin, pair.author) for pair in train}
    authors = sorted(beside)
    random.Random(f"{seed}/held out").shuffle(authors)
    held = set(authors[: max(1, round(share * len(authors)))])

    def sides() -> tuple[list[Pair], list[Pair]]:
        found: tuple[list[Pair], list[Pair]] = ([], [])
        for pair in train:
            inside = pair.author in held
            if inside == (author_of.get(pair.twin, pair.author) in held):
                found[inside].append(pair)
        return found

    if not sides()[1]:
        held.add(beside[authors[0]])
    left, out = sides()
    return (left, out) if out and len({pair.author for pair in left}) > 1 else (train, [])
