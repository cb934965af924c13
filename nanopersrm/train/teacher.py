"""Teacher: replies that a model wrote, kept only where they are right, well formed and true.

`python -m nanopersrm.train.replies --pairs … --out … --teacher BASE` asks a base for its own reasoning about
each pair, at temperature 1, with the decoding of the judge (free reasoning, then a forced line of
digits). A reply is kept when `fault` finds nothing:

    form      it parses
    truth     every quote is verbatim and from the text it speaks of, every claim holds
              (`nanopersrm/faithful.py`), and at least LEAST_QUOTES words were quoted
    verdict   the chosen text above 5, the rejected below (pointwise), chosen above rejected (both)

A reply with a fault gets one more try: the prompt names the fault and the right answer, and the
reply is continued from the last sentence before the fault. What is kept is the reply alone, with
the prompt as it was; the hint is seen by nobody who learns from it. What fails again is dropped.

What we chose. The idea of a second pass that knows the verdict is that of RM-R1; continuing from
before the fault keeps what was right and cannot hide the hint in a new beginning.

What we left out. The embedded base, 135M parameters and not trained to judge, hardly ever passes:
of 20 pointwise replies about pairs of the demo none was kept (first try: 14 quoted nothing, 6 were
untrue; after repair 16 and 4). Use a larger one, or a judge trained here.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nanopersrm.judge import verdict
from nanopersrm.judge.faithful import check
from nanopersrm.judge.prompts import Message, messages
from nanopersrm.judge.verdict import CLOSE, OPEN
from nanopersrm.pairs import Pair
from nanopersrm.style.profile import measured_block
from nanopersrm.train.facts import asked, roles_of, shown

LEAST_QUOTES = 1
LEAST_WORDS = 20  # of the reasoning
THINK_TOKENS = 160  # as the judge has by default
BATCH = 8  # replies drawn together
HINT = (
    "An earlier reply went wrong: {fault}. The right answer: {truth}. Your reply goes on where the "
    "earlier one was still right. Do not mention this note."
)
SENTENCE = re.compile(r"[.!?;]\s+")


@dataclass(frozen=True)
class Prompt:
    """A chat, and the beginning of the reply that goes on it."""

    messages: list[Message]
    start: str = OPEN


# (prompts, number of labels, seed) -> whole replies, each beginning with its prompt's start
Sample = Callable[[Sequence[Prompt], int, int], list[str]]


@dataclass(frozen=True)
class Question:
    """One reply that is asked for."""

    pair: Pair
    form: str
    texts: dict[str, str]  # label -> text
    roles: dict[str, str]  # label -> role
    prompt: Prompt


def load(base: str, say: Callable[[str], None] | None = None) -> Sample:
    """Sampling from a base at temperature 1, by the judge's own decoding."""
    from nanopersrm.judge.answer import AnswerConfig, answer  # torch takes seconds
    from nanopersrm.judge.judge import Judge

    judge = Judge.load(base, None, say=say)

    def sample(prompts: Sequence[Prompt], labels: int, seed: int) -> list[str]:
        ids = [judge.tokenizer.chat(p.messages, continuation=p.start) for p in prompts]
        config = AnswerConfig(think_tokens=THINK_TOKENS, temperature=1.0, seed=seed)
        drawn = answer(judge.model, judge.tokenizer, ids, labels, config)
        return [
            joined(prompt.start, group[0].text)
            for prompt, group in zip(prompts, drawn, strict=True)
        ]

    return sample


def joined(start: str, reply: str) -> str:
    """The beginning that was given and the reply drawn after it, which opens anew.

    >>> joined("<think>\\nTerse.", "<think>\\nA fits.\\n</think>")
    '<think>\\nTerse. A fits.\\n</think>'
    """
    kept = start.removeprefix(OPEN).strip()
    return f"{OPEN}{kept} {reply.removeprefix(OPEN)}" if kept else reply


def truth(roles: Mapping[str, str]) -> str:
    """The known verdict in words.

    >>> truth({"A": "rejected", "B": "chosen"})
    'A is by another writer, B is by the writer'
    """
    by = {"chosen": "by the writer", "rejected": "by another writer"}
    return ", ".join(f"{label} is {by[role]}" for label, role in roles.items())


def right(scores: Mapping[str, int], roles: Mapping[str, str]) -> bool:
    """Whether digits say what is known."""
    if len(roles) == 1:
        ((label, role),) = roles.items()
        return scores[label] > 5 if role == "chosen" else scores[label] < 5
    of = {role: scores[label] for label, role in roles.items()}
    return of["chosen"] > of["rejected"]


def fault(question: Question, reply: str) -> tuple[str, str, int] | None:
    """What kind of fault a reply has, in words, and how much of it is still right; or None."""
    said = verdict.parse(reply, "".join(question.roles))
    if said.scores is None:
        return "form", f"its form was wrong ({said.problem})", len(OPEN)
    end = reply.index(CLOSE)
    report = check(reply, question.pair.exemplars, question.texts)
    if report.flaws:
        flaw = report.flaws[0]
        return "truth", f"it is not true: {flaw.message}", max(len(OPEN), flaw.sentence)
    for quote in report.found_quotes:
        if quote.subject is not None and not quote.placed:
            message = f'"{quote.text}" does not stand in {quote.subject}'
            return "truth", message, _sentence_before(reply, quote.start)
    if report.quotes < LEAST_QUOTES:
        return "no quote", "it quoted no words of the texts", end
    if len(said.reasoning.split()) < LEAST_WORDS:
        return "short", "it ended too early", end
    if not right(said.scores, question.roles):
        return "verdict", "its scores were wrong", _sentence_before(reply, end - 2)
    return None


def _sentence_before(reply: str, at: int) -> int:
    """Where the sentence around a place begins."""
    ends = [match.end() for match in SENTENCE.finditer(reply, len(OPEN), at)]
    return ends[-1] if ends else len(OPEN)


def repair(question: Question, reply: str, message: str, kept: int) -> Prompt:
    """The prompt of the second try: the hint, and what was still right as a beginning."""
    hint = HINT.format(fault=message, truth=truth(question.roles))
    chat = [dict(turn) for turn in question.prompt.messages]
    chat[-1]["content"] += f"\n\n{hint}"
    return Prompt(chat, OPEN + reply[len(OPEN) : kept].strip())


def questions(pairs: Iterable[Pair], form: str, seed: int, evidence: bool) -> Iterator[Question]:
    """What is asked about each pair."""
    for pair in pairs:
        for one, role, _ in asked(pair, form, seed):
            texts = shown(pair, one, role)
            block = measured_block(pair.exemplars, list(texts.values())) if evidence else None
            chat = messages(pair.exemplars, list(texts.values()), pair.question, (), block)
            yield Question(pair, one, texts, roles_of(texts, role), Prompt(chat))


def taught(
    pairs: Iterable[Pair], form: str, seed: int, evidence: bool, sample: Sample, tally: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Records of the replies that pass, at once or after one repair; `tally` counts all."""
    rest = questions(pairs, form, seed, evidence)
    number = 0
    while some := list(islice(rest, BATCH)):
        for labels in (1, 2):
            batch = [question for question in some if len(question.texts) == labels]
            if batch:
                rng = random.Random(f"{seed}/teacher/{number}")
                number += 1
                yield from _batch(batch, labels, rng, sample, tally)


def _batch(
    batch: list[Question], labels: int, rng: random.Random, sample: Sample, tally: Counter[str]
) -> Iterator[dict[str, Any]]:
    first = sample([question.prompt for question in batch], labels, rng.randrange(2**31))
    faults = [fault(question, reply) for question, reply in zip(batch, first, strict=True)]
    again = [i for i, found in enumerate(faults) if found is not None]
    prompts = []
    for i in again:
        found = faults[i]
        assert found is not None
        tally[f"first try: {found[0]}"] += 1
        prompts.append(repair(batch[i], first[i], found[1], found[2]))
    second = sample(prompts, labels, rng.randrange(2**31)) if prompts else []
    repaired = dict(zip(again, second, strict=True))
    for i, question in enumerate(batch):
        reply = repaired.get(i, first[i])
        if i in repaired:
            found = fault(question, reply)
            tally[f"after repair: {found[0] if found else 'kept'}"] += 1
            if found:
                continue
        else:
            tally["first try: kept"] += 1
        yield {
            "pair": question.pair.id,
            "form": question.form,
            "labels": "".join(question.roles),
            "candidates": list(question.roles.values()),
            "repaired": i in repaired,
            "reply": reply,
        }
