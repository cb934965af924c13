"""Replies to imitate: honest reasoning about a pair, with its verdict, in the grammar of the judge.

    python -m nanopersrm.train.replies --pairs pairs/train.jsonl --out replies.jsonl --form both

writes one JSON object a line: {"pair", "form", "labels", "candidates", "source", "reply"}, where
`candidates` names the role behind each label. Pointwise gives two lines a pair, pairwise one with
the order drawn.

    <think>
    The writer has no contractions and many semicolons, as in "ran freely; the pump". A keeps to
    that: many semicolons ("it stopped; I"). But the text has few long words. On balance, A fits.
    </think>
    <scores>A=8</scores>

A model that is to say true things must be able to know them. It cannot count, so with evidence the
habits are those that the measured block of its prompt shows. Of other habits
it could only make something up.

How it works. `facts.py` ranks the habits by what they say of the candidates. Some three of them are
drawn, the heavy ones and those that bear out the verdict more often; the strongest fact against the
verdict is always told when it outweighs all that speak for it. `phrases.py` has the words, and
`quoting.py` finds words of the texts that show the habit. Whatever is said is measured, and
`check` reads it back out of the finished text by `nanopersrm/faithful.py`, which knows nothing of
how it was written.

What we chose. The verdict is the pair's, the margin is the evidence's, and a reply whose counts do
not carry its verdict says so. Replies have about 60 to 180 tokens, counted roughly by words and
marks. With `--no-evidence` (for prompts without the measured block) no numbers are told.

What we left out. The reasons are of what can be counted; irony, subject and rhythm do not occur.
`--teacher BASE` takes replies that a model wrote instead, see `teacher.py`.
"""

import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import track

from nanopersrm import InputError, pairs
from nanopersrm.command import exit_code
from nanopersrm.judge import verdict
from nanopersrm.judge.faithful import check as faithful
from nanopersrm.pairs import Pair
from nanopersrm.style.profile import salient
from nanopersrm.train import teacher
from nanopersrm.train.facts import (
    ROLES,
    Fact,
    asked,
    digits,
    digits_together,
    facts,
    fit,
    roles_of,
    shown,
)
from nanopersrm.train.telling import Claim, Writing, body, conclusion

TOKENS = (75, 160)  # by `size`; the tokens of a real vocabulary are within about a tenth
TRIES = 12
POOL = 14  # habits among which the ones to tell are drawn
PART = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Imitation:
    """One reply to imitate."""

    labels: str
    candidates: tuple[str, ...]  # the role behind each label
    text: str
    claims: tuple[Claim, ...]
    quotes: tuple[str, ...]


def size(text: str) -> int:
    """Words and marks, long words as two, emoji as four: about the tokens of a reply."""
    return sum(
        1 + (len(part) > 8) + 3 * (not part.isascii() and not part.isalpha())
        for part in PART.findall(text)
    )


def _for_label(fact: Fact, roles: dict[str, str]) -> float:
    """What a fact says for the known verdict: above 0 for, below 0 against."""
    return sum(fact.evidence[label] * (1 if roles[label] == "chosen" else -1) for label in roles)


def _draw_facts(found: list[Fact], roles: dict[str, str], rng: random.Random) -> list[Fact]:
    """The habits to tell, in the order in which to tell them."""
    count = rng.choice((2, 3, 3, 3, 4, 4) if len(roles) == 1 else (2, 2, 3, 3))
    interest = {
        fact.factor: (fact.weight + 0.5 * fact.writer.salience)
        * rng.uniform(0.5, 1.5)
        * (1.5 if _for_label(fact, roles) > 0 else 1.0)
        for fact in found[:POOL]
    }
    drawn = sorted(found[:POOL], key=lambda fact: -interest[fact.factor])[:count]
    against = min(found, key=lambda fact: _for_label(fact, roles))
    most = max(_for_label(fact, roles) for fact in drawn)
    if -_for_label(against, roles) > most and against not in drawn:
        drawn[-1] = against  # what speaks loudest against the verdict is told
    rng.shuffle(drawn)
    return drawn


def scores_of(pair: Pair, form: str, roles: dict[str, str]) -> dict[str, int]:
    """The digit of each label: the verdict is the pair's, the margin is the evidence's."""
    fits = [fit(pair.exemplars, text) for text in (pair.chosen, pair.rejected)]
    drawn = (digits if form == "pointwise" else digits_together)(*fits)
    return {label: dict(zip(ROLES, drawn, strict=True))[role] for label, role in roles.items()}


def reply(
    pair: Pair, form: str, candidate: str, rng: random.Random, evidence: bool = True
) -> Imitation:
    """A reply about one candidate (pointwise), or about both with `candidate` as A (pairwise)."""
    texts = shown(pair, form, candidate)
    roles = roles_of(texts, candidate)
    scores = scores_of(pair, form, roles)
    block = {trait.factor for trait in salient(pair.exemplars)} if evidence else None
    found = facts(pair.exemplars, texts, block) or facts(pair.exemplars, texts)
    if not found:
        raise InputError(f"pair {pair.id!r}: expected texts with words, nothing can be measured")
    best: tuple[int, Imitation] | None = None
    for _ in range(TRIES):
        writing = Writing(rng, pair.exemplars, texts, evidence)
        told = _draw_facts(found, roles, rng)
        sentences = [*body(writing, told, roles), conclusion(writing, roles, scores)]
        text = verdict.write(writing.finish(sentences), scores)
        off = max(TOKENS[0] - size(text), size(text) - TOKENS[1], 0)
        if best is None or off < best[0]:
            quotes, claims = tuple(writing.quotes), tuple(dict.fromkeys(writing.claims))
            best = off, Imitation("".join(texts), tuple(roles.values()), text, claims, quotes)
        if off == 0:
            break
    assert best is not None
    return best[1]


def check(imitation: Imitation, pair: Pair) -> list[str]:
    """What is wrong with a reply, read from its text alone; [] when nothing is."""
    roles = dict(zip(imitation.labels, imitation.candidates, strict=True))
    texts = {label: getattr(pair, role) for label, role in roles.items()}
    said = verdict.parse(imitation.text, imitation.labels)
    report = faithful(imitation.text, pair.exemplars, texts)
    wrong = [said.problem] if said.problem else []
    wrong += [flaw.message for flaw in report.flaws]
    wrong += [f'"{q.text}" is not in {q.subject}' for q in report.found_quotes if not q.placed]
    read = {(claim.subject, claim.factor, claim.said) for claim in report.found_claims}
    wrong += [f"not found in the text: {claim}" for claim in imitation.claims if claim not in read]
    if said.scores and len(said.scores) == 2:
        best = max(said.scores, key=lambda label: (said.scores or {})[label])
        if roles[best] != "chosen":
            wrong.append("the verdict is not the pair's")
    return wrong


@dataclass(frozen=True)
class Config:
    """Write reasoning replies to imitate, for pairs."""

    pairs: Path  # a .jsonl or .jsonl.gz file of pairs
    out: Path  # the .jsonl file to write
    form: Literal["pointwise", "pairwise", "both"] = "pointwise"  # one candidate a reply, or two
    seed: int = 0  # same seed, same bytes
    evidence: bool = True  # tell numbers, for prompts that carry the measured block
    teacher: str | None = None  # a base that writes the replies; what is untrue is dropped
    limit: int | None = None  # only so many pairs


def records(
    config: Config, some: Iterable[Pair], tally: Counter[str], log: Console
) -> Iterator[dict[str, Any]]:
    """The lines of the file; `tally` counts what became of a teacher's replies."""
    if config.teacher is not None:
        source = f"model:{config.teacher}"
        sample = teacher.load(config.teacher, log.print)
        for record in teacher.taught(
            some, config.form, config.seed, config.evidence, sample, tally
        ):
            yield record | {"source": source}
        return
    for pair in some:
        for form, role, rng in asked(pair, config.form, config.seed):
            made = reply(pair, form, role, rng, config.evidence)
            yield {
                "pair": pair.id,
                "form": form,
                "labels": made.labels,
                "candidates": made.candidates,
                "source": "measured",
                "reply": made.text,
            }


def main(config: Config) -> None:
    """Read pairs, write replies to a temporary name, rename."""
    log = Console(stderr=True, highlight=False)
    given = pairs.read(config.pairs)[: config.limit]
    part = config.out.with_name(config.out.name + ".part")
    hidden = not log.is_terminal
    count, tally = 0, Counter[str]()
    try:
        with open(part, "w", encoding="utf-8") as file:
            some = track(given, "writing replies", console=log, disable=hidden, transient=True)
            for record in records(config, some, tally, log):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
        os.replace(part, config.out)
    except OSError as error:
        raise InputError(f"{config.out}: cannot be written ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)
    print(f"{config.out}: {count} replies about {len(given)} pairs")
    for what, times in tally.most_common():
        print(f"  {what}: {times}")


def run(config: Config) -> int:
    """`main` with an exit code."""
    return exit_code("nanopersrm.train.replies", lambda: main(config))


if __name__ == "__main__":
    sys.exit(
        run(
            tyro.cli(
                Config, prog="nanopersrm.train.replies", description=__doc__.split("How it")[0]
            )
        )
    )
