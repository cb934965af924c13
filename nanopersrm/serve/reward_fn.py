"""The judge as a reward function: TRL's `reward_funcs`, and what `callers.py` builds for others.

    judge = Judge.load(adapter="runs/mine/adapter")
    trainer = GRPOTrainer(policy, judge.reward_fn(texts_of_the_writer), arguments, dataset)

TRL calls it with a batch, `prompts`, `completions` and the columns of the data set, and wants a
number a completion. Plain texts and messages are both read. The exemplars are those given here, or
each row's own from the column `exemplars`; a row that has None there gets None, TRL's word for
"does not apply". The prompt (of messages: what the user said last) is shown to the judge as the
question; `question` names another column, or None for none: right where the prompt itself holds the
exemplars.

Completions of one prompt for one writer are a *group*: judged in one call, so that exemplars and
question are computed once; groups of one writer follow each other, so that the exemplars are kept.
A call holds 26 at most; a larger group is cut into even parts.

    scale       of a completion                                       from .. to
    unit        (soft score - 1) / 8                                    0 .. 1
    soft        soft score, the expected digit                          1 .. 9
    relative    mean P(fits better) over the others of its call         0 .. 1

Worked example: soft scores 7, 5 and 3 are 0.75, 0.5 and 0.25 as unit. If the first beats the others
with 0.9 and 0.8, its relative reward is 0.85.

What has no score. An empty completion is a legal one, and it fits nobody: by rule it gets the
lowest of the scale, the judge never sees it, and in `relative` every other text beats it. What the
judge cannot read (too long for the context), has nothing to compare with or gave no finite number
gets None. TRL leaves that reward out, and where no other has a number, it leaves the completion out
of the average of its group, with an advantage of 0. TRL's log has the share of such completions as
`NAME/no_score`. Wrong settings, columns and types are an InputError.

What we left out. A policy's own reasoning is judged with its answer: cut it off before. Tool calls
and images are not shown.
"""

import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, get_args

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig, Judgement, check
from nanopersrm.judge.verdict import DIGITS, LABELS

Scale = Literal["unit", "soft", "relative"]
Rewards = list[float | None]  # None: no score
RewardFunction = Callable[..., Rewards]  # (prompts, completions, **columns)

NAME = "fits_writer"  # of the reward in logs
BEGIN = re.compile(r"\s*<[^<>\s]{1,40}>")  # a token that begins a text
# What ends a turn or fills a row, in the chat templates of the policies that people train.
ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
    "<pad>",
    "</s>",
)


class Judges(Protocol):
    """What is needed of `Judge`."""

    lock: threading.Lock  # one call at a time

    def judge(
        self,
        exemplars: Sequence[str],
        candidates: Sequence[str],
        question: str | None = None,
        principles: Sequence[str] = (),
        config: JudgeConfig | None = None,
    ) -> Judgement: ...


@dataclass(frozen=True)
class Completion:
    """A text of a policy, and what it is judged by."""

    exemplars: tuple[str, ...]
    question: str | None
    text: str
    principles: tuple[str, ...] | None = None  # None: those for all


def reward_fn(
    judge: Judges,
    exemplars: Sequence[str] | str | None = None,
    *,
    column: str = "exemplars",
    question: str | None = "prompt",
    scale: Scale = "unit",
    principles: Sequence[str] = (),
    config: JudgeConfig | None = None,
    name: str = NAME,
) -> RewardFunction:
    """A function for TRL's `reward_funcs`.

    exemplars: texts of the writer; None: each row has its own in `column`. question: the column
    that the candidates answer, by default the prompt; None: none is shown. name: of the reward in
    TRL's logs.
    """
    check_scale(scale)
    fixed = None if exemplars is None else texts_of(exemplars, "exemplars")

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Rewards:
        n = len(completions)
        own = [fixed] * n if fixed else _column(columns, column, n)
        answered = [None] * n if question is None else prompts
        if question not in (None, "prompt"):
            answered = _column(columns, cast(str, question), n)
        if len(answered) != n:
            raise InputError(f"prompts: expected {n}, one a completion, got {len(answered)}")
        rows: list[Completion | None] = []
        for i, (whose, asked, said) in enumerate(zip(own, answered, completions, strict=True)):
            text = completion_text(said, f"completions[{i}]")
            asks = None if asked is None else question_text(asked, f"{question}[{i}]")
            texts = None if whose is None else texts_of(whose, f"{column}[{i}]")
            rows.append(None if texts is None else Completion(texts, asks, text))
        found = rewards(judge, rows, scale, principles, config)
        log, apply = columns.get("log_metric"), sum(row is not None for row in rows)
        if callable(log) and apply:
            log(f"{name}/no_score", (found.count(None) - (n - apply)) / apply)
        return found

    reward.__name__ = name
    return reward


def rewards(
    judge: Judges,
    completions: Sequence[Completion | None],
    scale: Scale = "unit",
    principles: Sequence[str] = (),
    config: JudgeConfig | None = None,
) -> Rewards:
    """A reward for each, group by group; None for None and for what has no score."""
    groups: dict[Any, dict[str | None, list[int]]] = {}
    for i, one in enumerate(completions):
        if one is not None:
            asked = groups.setdefault((one.exemplars, one.principles), {})
            asked.setdefault(one.question, []).append(i)
    found: Rewards = [None] * len(completions)
    for (exemplars, own), asked in groups.items():
        settings = scale, principles if own is None else own, config
        for question, which in asked.items():
            texts = [cast(Completion, completions[i]).text for i in which]
            judged = group_rewards(judge, exemplars, texts, question, *settings)
            for i, reward in zip(which, judged, strict=True):
                found[i] = reward
    return found


def group_rewards(
    judge: Judges,
    exemplars: Sequence[str],
    texts: Sequence[str],
    question: str | None = None,
    scale: Scale = "unit",
    principles: Sequence[str] = (),
    config: JudgeConfig | None = None,
) -> Rewards:
    """The rewards of texts that answer one question for one writer."""
    found: Rewards = [1.0 if scale == "soft" else 0.0] * len(texts)  # of an empty one
    written = [i for i, text in enumerate(texts) if text.strip()]
    empty = len(texts) - len(written)
    for part in _parts(written):
        judged = [texts[i] for i in part]
        kept, judgement = _judgement(judge, exemplars, judged, question, principles, config)
        for i in part:
            found[i] = None
        for place, k in enumerate(kept):
            assert judgement is not None
            found[part[k]] = _reward(judgement, place, scale, empty)
    return found


def _judgement(
    judge: Judges,
    exemplars: Sequence[str],
    texts: Sequence[str],
    question: str | None,
    principles: Sequence[str],
    config: JudgeConfig | None,
) -> tuple[list[int], Judgement | None]:
    """Which of 1 to 26 texts the judge could read, and what it found.

    While they do not fit its context, the longest is left out.
    """
    config = config or JudgeConfig()
    least = 2 if config.mode == "pairwise" else 1
    enough = [*texts, "more"] if len(texts) < least else texts
    check(exemplars, enough, config, question, principles)
    kept = list(range(len(texts)))
    while len(kept) >= least:
        try:
            with judge.lock:
                return kept, judge.judge(
                    exemplars, [texts[k] for k in kept], question, principles, config
                )
        except InputError:  # all else was checked above
            kept.remove(max(kept, key=lambda k: len(texts[k])))
    return [], None


def _reward(judgement: Judgement, i: int, scale: Scale, empty: int) -> float | None:
    """Of candidate i, among the other candidates and so many empty ones."""
    score = judgement.scores[i]
    if score is None or not math.isfinite(score):
        return None
    if scale == "soft":
        return score
    if scale == "unit":
        return unit(score)
    wins = [p for j, p in enumerate(judgement.preference[i]) if j != i] + [1.0] * empty
    mean = math.fsum(wins) / len(wins) if wins else math.nan
    return mean if math.isfinite(mean) else None


def unit(score: float) -> float:
    """A soft score from 1 to 9 -> from 0 to 1."""
    return (score - DIGITS[0]) / (DIGITS[-1] - DIGITS[0])


def without_ends(text: str, ends: Sequence[str] = ENDS) -> str:
    """Without the tokens at its end, any number of them, and without white space around."""
    stop = len(text)  # moved, so that thousands of them are not as many copies
    while True:
        while stop and text[stop - 1].isspace():
            stop -= 1
        end = next((end for end in ends if end and text.endswith(end, 0, stop)), "")
        if not end:
            return text[:stop].strip()
        stop -= len(end)


def end_of_prompt(prompt: str, both: str) -> int | None:
    """Where the reply begins; None in another text. Some tokenizers give a prompt back with other
    white space, or with a token before it.

    >>> end_of_prompt("Hi?  there", "<s> Hi? there One."), end_of_prompt("Hi?", "Ho! Hi?")
    (13, None)
    """
    token = BEGIN.match(both)
    for at in (0, token.end() if token else 0):
        if both.startswith(prompt, at):
            return at + len(prompt)
        for char in "".join(prompt.split()):
            while both[at : at + 1].isspace():
                at += 1
            if both[at : at + 1] != char:
                break
            at += 1
        else:
            return at
    return None


def _parts(which: Sequence[int]) -> Iterator[Sequence[int]]:
    """Even parts of at most 26.

    >>> [len(part) for part in _parts(range(27))]
    [13, 14]
    """
    count = -(-len(which) // len(LABELS))
    for k in range(count):
        yield which[k * len(which) // count : (k + 1) * len(which) // count]


def check_scale(scale: str) -> None:
    """A scale that does not exist is an InputError."""
    if scale not in get_args(Scale):
        raise InputError(f"scale: expected {', '.join(get_args(Scale))}, got {scale!r}")


def _column(columns: dict[str, Any], name: str, n: int) -> Sequence[Any]:
    """A value a completion."""
    values = columns.get(name)
    if not isinstance(values, list | tuple):
        there = sorted(key for key, value in columns.items() if isinstance(value, list | tuple))
        found = ", ".join(there) or "none"
        raise InputError(f"expected a column {name!r} in the data set, found {found}")
    if len(values) != n:
        raise InputError(f"{name}: expected {n} values, one a completion, got {len(values)}")
    return values


def texts_of(value: Any, place: str) -> tuple[str, ...]:
    """One text or a list of texts, as they come from data sets, as a tuple."""
    if hasattr(value, "tolist"):  # an array: parquet files give such lists
        value = value.tolist()
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts:
        got = f"{type(value).__name__} {value!r}"[:60]
        raise InputError(f"{place}: expected a text or a list of texts, got {got}")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{place}, text {i + 1}: expected some text, got {repr(text)[:40]}")
    return tuple(texts)


def completion_text(value: Any, place: str) -> str:
    """A text, or what the assistant says in a list of messages."""
    if isinstance(value, str):
        return value
    return "\n\n".join(text for text in _said(value, "assistant", place) if text)


def question_text(value: Any, place: str) -> str | None:
    """A text, or what the user said last in a list of messages; None: nothing."""
    said = [value] if isinstance(value, str) else _said(value, "user", place)[-1:]
    return said[0] if said and said[0].strip() else None


def _said(messages: Any, role: str, place: str) -> list[str]:
    """What this role says, message by message."""
    if not isinstance(messages, list | tuple):
        got = type(messages).__name__
        raise InputError(f"{place}: expected a text or a list of messages, got {got}")
    said = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(
                f"{place}, message {i + 1}: expected an object with role and content, "
                f"got {repr(message)[:40]}"
            )
        if message["role"] == role:
            said.append(_content(message.get("content"), f"{place}, message {i + 1}"))
    if messages and not said:
        roles = ", ".join(sorted({message["role"] for message in messages}))
        found = " ".join(roles.split())[:80]
        raise InputError(f"{place}: expected a message of role {role}, found {found}")
    return said


def _content(content: Any, place: str) -> str:
    """The text of a message; None, as beside a tool call, is an empty one."""
    if content is None or isinstance(content, str):
        return content or ""
    blocks = content if isinstance(content, list | tuple) else [content]
    texts = [block.get("text") for block in blocks if isinstance(block, dict)]
    if len(texts) < len(blocks):
        raise InputError(f"{place}: expected a text or blocks of text, got {repr(content)[:40]}")
    return "".join(text for text in texts if isinstance(text, str))
