"""The judge as a reward function for TRL, OpenRLHF and verl.

    judge = LazyJudge(adapter="runs/mine/adapter")        # names; loaded by the first call

    GRPOTrainer(policy, reward_fn(judge, texts_of_the_writer), arguments, dataset)       # TRL
    reward_func = openrlhf_reward(judge)          # OpenRLHF: in the file of --reward.remote_url
    compute_score = verl_score(judge)             # verl: in reward.custom_reward_function.path

All three can be pickled. A loaded `Judge` does as well, where nothing is.

Whose style counts is fixed for all rows, or each row says it: TRL in the column `exemplars`, verl
in `extra_info`, OpenRLHF in its label. A label is a text of the writer, a list of such texts, or an
object (itself, or as JSON in a text):

    {"exemplars": ["…"], "question": "…", "principles": ["…"]}        the last two may be left out

A reward is (soft score - 1) / 8, from 0 to 1: soft scores 7, 5 and 3 are 0.75, 0.5 and 0.25.
Completions for one writer and question are judged in one call, 26 at most. An empty completion fits
nobody: it gets 0 and is not shown to the judge. What the judge cannot read (too long) or score is
None for TRL, which leaves it out. verl and OpenRLHF know no None: there it is an error, unless
`unjudged` says which number stands for it.
"""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Protocol, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from nanopersrm import InputError
from nanopersrm.judge import judgement
from nanopersrm.judge.adapter_settings import DEFAULT
from nanopersrm.judge.judgement import JudgeConfig, check
from nanopersrm.judge.verdict import DIGITS, LABELS
from nanopersrm.model.base import DEFAULT_BASE

Rewards = list[float | None]  # None: no score

NAME = "fits_writer"  # of the reward in logs
FIELDS = ("exemplars", "question", "principles")  # of a label
FIRST_TOKEN = re.compile(r"\s*<[^<>\s]{1,40}>")  # such as <s>
# What ends a turn or fills a row, in the chat templates of common policies.
END_TOKENS = (
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>"),
    *("<end_of_turn>", "<eos>", "<pad>", "</s>"),
)
_loading = threading.Lock()


class Judges(judgement.Judges, Protocol):
    """What is needed of `Judge`: its method `judge`, one call at a time."""

    lock: threading.Lock


@dataclass(frozen=True)
class LazyJudge:
    """The names of a judge. It can be pickled; each process loads it once, when it is needed."""

    base: str = DEFAULT_BASE
    adapter: str | None = DEFAULT
    device: str = "auto"
    dtype: str = "auto"
    say: Callable[[str], None] | None = field(default=None, compare=False)  # as in `Judge.load`

    def load(self) -> Judges:
        """The judge, the same one at each call."""
        with _loading:
            return _load(self)


@cache
def _load(names: LazyJudge) -> Judges:
    from nanopersrm.judge.judge import Judge  # torch takes seconds

    return Judge.load(names.base, names.adapter, names.device, names.dtype, say=names.say)


@dataclass(frozen=True)
class Settings:
    """What holds for all completions."""

    judge: Judges | LazyJudge
    exemplars: tuple[str, ...] | None  # None: each row has its own
    principles: Sequence[str] = ()
    config: JudgeConfig | None = None
    unjudged: float | None = None  # instead of no score; None: an error

    def __post_init__(self) -> None:
        if self.config is not None and self.config.mode == "pairwise":
            raise InputError("mode: expected pointwise for rewards, got pairwise")
        if self.unjudged is not None and not math.isfinite(self.unjudged):
            raise InputError(f"unjudged: expected a finite number, got {self.unjudged}")


@dataclass(frozen=True)
class Label:
    """What a row of a data set says; None: nothing."""

    exemplars: tuple[str, ...] | None = None
    writer: str | None = None  # the name of one who was put on the server
    question: str | None = None
    principles: tuple[str, ...] | None = None


# TRL


def reward_fn(
    judge: Judges | LazyJudge,
    exemplars: Sequence[str] | str | None = None,
    *,
    column: str = "exemplars",
    question: str | None = "prompt",
    name: str = NAME,
    **settings: Any,
) -> "TrlReward":
    """A function for TRL's `reward_funcs`.

    exemplars: texts of the writer; None: each row has its own in `column`; a row with None there
    gets None. question: the column that the completions answer; None: none is shown. name: of the
    reward in TRL's logs, where `NAME/no_score` is the share of completions without a score.
    settings: `principles` and `config`, see `Settings`.
    """
    return TrlReward(Settings(judge, _fixed(exemplars), **settings), column, question, name)


@dataclass(frozen=True)
class TrlReward:
    """A function with a name, as TRL looks for it, that can be pickled."""

    settings: Settings
    column: str
    question: str | None
    __name__: str  # type: ignore[misc]

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Rewards:
        n = len(completions)
        columns["prompt"] = list(prompts)
        exemplars: list[Any] = [None] * n
        questions: list[Any] = [None] * n
        if self.settings.exemplars is None:
            exemplars = _column(columns, self.column, n)
        if self.question is not None:
            questions = _column(columns, self.question, n)
        rows: list[tuple[str, Label] | None] = []
        for i, completion in enumerate(completions):
            text, writer, question = completion_text(completion, f"completions[{i}]"), None, None
            if questions[i] is not None:
                question = question_text(questions[i], f"{self.question}[{i}]")
            if exemplars[i] is not None:
                writer = texts_of(exemplars[i], f"{self.column}[{i}]")
            known = writer is not None or self.settings.exemplars is not None
            rows.append((text, Label(writer, question=question)) if known else None)
        scored = rewards(self.settings, rows)
        log, apply = columns.get("log_metric"), sum(row is not None for row in rows)
        if callable(log) and apply:
            log(f"{self.__name__}/no_score", (scored.count(None) - (n - apply)) / apply)
        return scored


def _column(columns: Mapping[str, Any], name: str, n: int) -> list[Any]:
    """A value a completion."""
    values = columns.get(name)
    if not isinstance(values, list | tuple):
        lists = sorted(key for key, value in columns.items() if isinstance(value, list | tuple))
        raise InputError(f"expected a column {name!r} in the data set, got {', '.join(lists)}")
    if len(values) != n:
        raise InputError(f"{name}: expected {n} values, one a completion, got {len(values)}")
    return list(values)


# verl


def verl_score(
    judge: Judges | LazyJudge, exemplars: Sequence[str] | str | None = None, **settings: Any
) -> Callable[..., float]:
    """verl's `compute_score`. exemplars: of every completion; None: those in `extra_info`.

    settings: `principles`, `config` and `unjudged`, see `Settings`.
    """
    return partial(_verl_score, Settings(judge, _fixed(exemplars), **settings))


def _verl_score(
    settings: Settings,
    data_source: Any,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **_: Any,
) -> float:
    if not isinstance(extra_info, Mapping | None):
        raise InputError(f"extra_info: expected an object, got {type(extra_info).__name__}")
    known = {name: value for name, value in (extra_info or {}).items() if name in FIELDS}
    return _numbers(settings, [(solution_str, _row_label(settings, known, "extra_info"))])[0]


# OpenRLHF


def openrlhf_reward(
    judge: Judges | LazyJudge, exemplars: Sequence[str] | str | None = None, **settings: Any
) -> Callable[..., dict[str, Any]]:
    """OpenRLHF's `reward_func`. exemplars: of all replies; None: those in labels.

    settings: `principles`, `config` and `unjudged`, see `Settings`.
    """
    return partial(_openrlhf_reward, Settings(judge, _fixed(exemplars), **settings))


def _openrlhf_reward(
    settings: Settings,
    queries: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[Any],
    **_: Any,
) -> dict[str, Any]:
    import torch

    if not len(queries) == len(prompts) == len(labels):
        counts = f"{len(queries)}, {len(prompts)} and {len(labels)}"
        raise InputError(f"expected as many queries as prompts and labels, got {counts}")
    rows = []
    for i, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True)):
        rows.append((reply_in(query, prompt, i), _row_label(settings, label, f"labels[{i}]")))
    scored = torch.tensor(_numbers(settings, rows))  # (B,)
    return {"rewards": scored, "scores": scored, "extra_logs": {NAME: scored}}


def reply_in(query: str, prompt: str, i: int) -> str:
    """What follows the prompt in query i, without the tokens that end it. Some tokenizers give a
    prompt back with other white space, or with a token before it.

    >>> reply_in("<s> Hi? there One.</s>", "Hi?  there", 0)
    'One.'
    """
    if not isinstance(query, str) or not isinstance(prompt, str):
        raise InputError(f"queries[{i}]: expected texts, got {type(query).__name__}")
    token = FIRST_TOKEN.match(query)
    for begin in (0, token.end() if token else 0):
        if query.startswith(prompt, begin):
            return _without_end(query[begin + len(prompt) :])
        place = begin
        for char in "".join(prompt.split()):
            while query[place : place + 1].isspace():
                place += 1
            if query[place : place + 1] != char:
                break
            place += 1
        else:
            return _without_end(query[place:])
    raise InputError(f"queries[{i}]: expected a text that begins with its prompt, got another")


def _without_end(text: str) -> str:
    stop = len(text)  # moved, so that thousands of tokens are not as many copies
    while True:
        while stop and text[stop - 1].isspace():
            stop -= 1
        end = next((end for end in END_TOKENS if text.endswith(end, 0, stop)), "")
        if not end:
            return text[:stop].strip()
        stop -= len(end)


def _row_label(settings: Settings, label: Any, place: str) -> Label:
    """What a row says of its completion."""
    if settings.exemplars is not None:
        return Label(question=question_beside_writer(label, place))
    row = read_label(label, place)
    if row.exemplars is None:
        raise InputError(f"{place}: expected exemplars, texts of the writer, got none")
    return row


def _numbers(settings: Settings, rows: Sequence[tuple[str, Label]]) -> list[float]:
    """For trainers that know no None."""
    numbers = [settings.unjudged if x is None else x for x in rewards(settings, rows)]
    if None in numbers:
        raise InputError(
            "the judge gave this completion no score (too long for its context?); "
            "unjudged=… says which number stands for that"
        )
    return cast(list[float], numbers)


# Labels


def read_label(label: Any, place: str, names: Sequence[str] = FIELDS) -> Label:
    """A label in one of its forms. names: the fields that an object may have."""
    label = _decoded(label)
    if label is None or _is_empty(label):
        return Label()
    if isinstance(label, str | list | tuple):
        return Label(texts_of(label, place))
    if not isinstance(label, Mapping):
        got = type(label).__name__
        raise InputError(f"{place}: expected a text, a list of texts or an object, got {got}")
    values: dict[str, Any] = {}
    for name, value in label.items():
        where = f"{place}, field {name}"
        if value is None:  # Arrow puts it where a row lacks a field that others have
            continue
        if name not in names:
            raise InputError(f"{place}: expected the fields {', '.join(names)}, got {name!r}")
        if name == "writer" and not isinstance(value, str):
            raise InputError(f"{where}: expected a name, got {type(value).__name__}")
        if name == "question":
            value = question_text(value, where)
        elif name == "principles" and _is_empty(_decoded(value)):
            value = ()
        elif name != "writer":
            value = texts_of(value, where)
        values[name] = value
    return Label(**values)


def question_beside_writer(label: Any, place: str) -> str | None:
    """The question of a label, where the writer is fixed for all rows.

    Its principles are an InputError, or they would be lost in silence; all else is not read.
    """
    label = _decoded(label)
    if not isinstance(label, Mapping):
        return None
    row = read_label({name: label.get(name) for name in ("question", "principles")}, place)
    if row.principles:
        raise InputError(
            f"{place}, field principles: expected none, because the writer is fixed for all rows, "
            f"got {len(row.principles)}"
        )
    return row.question


def _decoded(label: Any) -> Any:
    """Arrays (of parquet files) as lists, JSON in a text as its value."""
    label = label.tolist() if hasattr(label, "tolist") else label
    if not isinstance(label, str) or label.lstrip()[:1] not in ("{", "["):
        return label
    try:
        return json.loads(label)
    except (ValueError, RecursionError):
        return label  # a text that begins so


def _is_empty(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else value in ([], (), {})


# Rewards


def rewards(settings: Settings, rows: Sequence[tuple[str, Label] | None]) -> Rewards:
    """A reward for each completion and its label; None for None and for what has no score.

    Groups of one writer follow each other, so that the judge reads the exemplars once.
    """
    groups: dict[Any, dict[str | None, list[int]]] = {}
    scored: Rewards = [None] * len(rows)
    texts = ["" if row is None else row[0] for row in rows]
    for i, row in enumerate(rows):
        if not isinstance(texts[i], str):
            raise InputError(f"expected the completion as a text, got {type(texts[i]).__name__}")
        if row is not None and texts[i].strip():
            writer = row[1].exemplars or settings.exemplars, row[1].principles
            groups.setdefault(writer, {}).setdefault(row[1].question, []).append(i)
        elif row is not None:
            scored[i] = 0.0
    for (exemplars, principles), questions in groups.items():
        principles = settings.principles if principles is None else principles
        for question, members in questions.items():
            for part in _parts(members):
                shown = [texts[i] for i in part]
                scores = _scores(settings, exemplars, shown, question, principles)
                for i, score in zip(part, scores, strict=True):
                    scored[i] = None if score is None else unit(score)
    return scored


def _parts(members: Sequence[int]) -> Iterator[Sequence[int]]:
    """Even parts of at most 26.

    >>> [len(part) for part in _parts(range(27))]
    [13, 14]
    """
    count = -(-len(members) // len(LABELS))
    for k in range(count):
        yield members[k * len(members) // count : (k + 1) * len(members) // count]


def _scores(
    settings: Settings,
    exemplars: Sequence[str],
    texts: Sequence[str],
    question: str | None,
    principles: Sequence[str],
) -> Rewards:
    """The soft scores of 1 to 26 texts. While they do not fit the context, the longest is left
    out; it has none."""
    config = settings.config or JudgeConfig()
    check(exemplars, texts, config, question, principles)
    judge = settings.judge.load() if isinstance(settings.judge, LazyJudge) else settings.judge
    scores: Rewards = [None] * len(texts)
    kept = list(range(len(texts)))
    while kept:
        candidates = [texts[k] for k in kept]
        try:
            with judge.lock:
                judged = judge.judge(exemplars, candidates, question, principles, config)
        except InputError:  # all else was checked above
            kept.remove(max(kept, key=lambda k: len(texts[k])))
            continue
        for k, score in zip(kept, judged.scores, strict=True):
            scores[k] = score
        break
    return scores


def unit(score: float) -> float:
    """A soft score from 1 to 9 -> from 0 to 1."""
    return (score - DIGITS[0]) / (DIGITS[-1] - DIGITS[0])


# Texts of data sets


def _fixed(exemplars: Sequence[str] | str | None) -> tuple[str, ...] | None:
    return None if exemplars is None else texts_of(exemplars, "exemplars")


def texts_of(value: Any, place: str) -> tuple[str, ...]:
    """One text or a list of texts, as they come from data sets, as a tuple."""
    value = value.tolist() if hasattr(value, "tolist") else value
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts:
        got = f"{type(value).__name__} {value!r}"[:60]
        raise InputError(f"{place}: expected a text or a list of texts, got {got}")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{place}, text {i + 1}: expected some text, got {repr(text)[:40]}")
    return tuple(texts)


class Message(BaseModel):
    """A turn of a conversation: a text, or parts, of which those with a text count."""

    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        texts = (part.get("text") for part in self.content)
        return "".join(text for text in texts if isinstance(text, str))


def completion_text(value: Any, place: str) -> str:
    """A text, or what the assistant says in a list of messages."""
    if isinstance(value, str):
        return value
    return "\n\n".join(text for text in _messages(value, "assistant", place) if text)


def question_text(value: Any, place: str) -> str | None:
    """A text, or what the user said last in a list of messages; None: nothing."""
    texts = [value] if isinstance(value, str) else _messages(value, "user", place)[-1:]
    return texts[0] if texts and texts[0].strip() else None


def _messages(value: Any, role: str, place: str) -> list[str]:
    """What this role says, message by message."""
    try:
        messages = TypeAdapter(list[Message]).validate_python(value)
    except ValidationError as error:
        where = "".join(
            f", message {int(key) + 1}" for key in error.errors()[0]["loc"][:1] if value
        )
        got = repr(value)[:40]
        raise InputError(f"{place}{where}: expected a text or messages, got {got}") from error
    texts = [message.text for message in messages if message.role == role]
    if messages and not texts:
        raise InputError(f"{place}: expected a message of role {role}, got none")
    return texts
