"""The judge as a reward function for TRL, OpenRLHF and verl.

    judge = LazyJudge(adapter="runs/mine/adapter")        # names; loaded by the first call

    GRPOTrainer(policy, reward_fn(judge, texts_of_the_writer), arguments, dataset)       # TRL
    reward_func = openrlhf_reward(judge)          # OpenRLHF: in the file of --reward.remote_url
    compute_score = verl_score(judge)             # verl: in reward.custom_reward_function.path

All three can be pickled, unless they have a loaded `Judge`. The writer is the same for all rows, or
a row has its own: TRL in the column `exemplars`, verl in `extra_info`, OpenRLHF in its label, which
is a text of the writer, a list of such texts, or an object (itself, or as JSON in a text):

    {"exemplars": ["…"], "question": "…", "principles": ["…"]}        the last two may be left out

A reward is (soft score - 1) / 8, from 0 to 1: soft scores 7, 5 and 3 are 0.75, 0.5 and 0.25. An
empty completion gets 0, unjudged. What the judge cannot read (too long) or score is None for TRL,
which leaves it out. verl and OpenRLHF know no None: there it is an error, or the number `unjudged`.
"""

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Protocol, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import from_json

from nanopersrm import InputError
from nanopersrm.judge import judgement
from nanopersrm.judge.adapter_settings import DEFAULT
from nanopersrm.judge.judgement import JudgeConfig, check
from nanopersrm.judge.verdict import DIGITS, LABELS
from nanopersrm.model.base import DEFAULT_BASE

Rewards = list[float | None]  # None: no score
Schema = TypeVar("Schema", bound=BaseModel)

NAME = "fits_writer"  # of the reward in logs
SPACE = re.compile(r"\s*")
FIRST_TOKEN = re.compile(r"\s*<[^<>\s]{1,40}>")  # such as <s>
# What ends a turn or fills a row, in the chat templates of common policies.
ENDS = re.compile(
    r"\s+|<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|<\|end_of_text\|>|<\|end\|>"
    r"|<end_of_turn>|<eos>|<pad>|</s>"
)
_loading = threading.Lock()
_loaded: dict["LazyJudge", "Judges"] = {}  # by this process


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
            if self not in _loaded:
                from nanopersrm.judge.judge import Judge  # torch takes seconds

                names = self.base, self.adapter, self.device, self.dtype
                _loaded[self] = Judge.load(*names, say=self.say)
            return _loaded[self]


class Message(BaseModel):
    """A turn of a conversation: a text, or parts, of which those with a text count."""

    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        parts = self.content if isinstance(self.content, list) else [{"text": self.content}]
        return "".join(text for part in parts if isinstance(text := part.get("text"), str))


MESSAGES = TypeAdapter(list[Message])


def _texts_by(role: str, value: Any) -> list[str]:
    """What this role says in a list of messages; a text is said by anybody."""
    if value is None or isinstance(value, str):
        return [value or ""]
    messages = MESSAGES.validate_python(value)
    texts = [message.text for message in messages if message.role == role]
    if messages and not texts:
        raise ValueError(f"expected a message of role {role}")
    return texts


def _question(value: Any) -> str | None:
    """What the user said last."""
    text = "".join(_texts_by("user", value)[-1:])
    return text if text.strip() else None


def completion_of(value: Any) -> str:
    """All that the assistant says."""
    return "\n\n".join(filter(None, _texts_by("assistant", value)))


def _listed(value: Any) -> Any:
    """One text is a list of one, a blank one a list of none; so are arrays of parquet files."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return ([value] if value.strip() else []) if isinstance(value, str) else value


def some_text(text: str) -> str:
    """For pydantic: a text that is not blank."""
    if not text.strip() or "\0" in text:
        raise ValueError("expected a text, got an empty one or a zero byte")
    return text


Text = Annotated[str, AfterValidator(some_text)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_listed)]
Question = Annotated[str | None, BeforeValidator(_question)]


class Row(BaseModel, extra="forbid"):
    """A completion, and what its label says; None: nothing."""

    completion: Annotated[str, BeforeValidator(completion_of)] = ""
    exemplars: Texts | None = None
    question: Question = None
    principles: Texts | None = None
    writer: str | None = None  # the name of one who was put on the server


def read_row(completion: Any, label: Any, place: str, fixed: bool) -> Row:
    """A row of a data set. fixed: the writer is the same for all rows; then the label may be
    anything, such as an answer, or have a question and principles."""
    label = label.tolist() if hasattr(label, "tolist") else label
    if isinstance(label, str) and label.lstrip()[:1] in ("{", "["):
        with suppress(ValueError):  # a text that begins so
            label = from_json(label)
    if not isinstance(label, Mapping):
        label = {"exemplars": label}
    # Arrow puts None where a row lacks a field that others have.
    fields = {name: value for name, value in label.items() if value is not None}
    if fixed:
        fields = {name: fields[name] for name in ("question", "principles") if name in fields}
    row = checked(Row, {**fields, "completion": completion}, place)
    if not fixed and not row.exemplars and not row.writer:
        raise InputError(f"{place}: expected exemplars, texts of a writer, got none")
    return row


def checked(schema: type[Schema], value: Any, place: str) -> Schema:
    """A value of a schema; an error names the place."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{place}: {fault(error.errors()[0])}") from error


def fault(first: Mapping[str, Any]) -> str:
    """One of pydantic's errors on a line: where, what was expected, and what came."""
    keys = [key for key in first["loc"] if key != "body"]
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    line = f"{where.lstrip('.')}: {first['msg'].removeprefix('Value error, ')}"
    if first["type"] == "json_invalid":
        return f"expected JSON: {first['ctx']['error']}, at character {keys[-1]}"
    if isinstance(first["input"], bytes):
        return "expected a body with Content-Type: application/json, got another"
    if first["type"] not in ("missing", "value_error", "extra_forbidden"):
        line += f", got {type(first['input']).__name__}"
    return line.removeprefix(": ")


def reply_in(query: str, prompt: str, place: str) -> str:
    """What follows the prompt in a query, without the tokens that end it. Some tokenizers give a
    prompt back with other white space between its words, or with a token before it.

    >>> reply_in("<s> Hi? there One.</s>", "Hi?  there", "queries[0]")
    'One.'
    """
    token = FIRST_TOKEN.match(query)
    for begin in (0, token.end() if token else 0):
        for word in prompt.split():
            begin = cast(re.Match[str], SPACE.match(query, begin)).end()
            if not query.startswith(word, begin):
                break
            begin += len(word)
        else:
            end, ends = len(query), [*ENDS.finditer(query, begin)]
            while ends and ends[-1].end() == end:
                end = ends.pop().start()
            return query[begin:end].strip()
    raise InputError(f"{place}: expected a text that begins with its prompt, got another")


@dataclass(frozen=True)
class Settings:
    """What holds for all completions."""

    judge: Judges | LazyJudge
    exemplars: tuple[str, ...] | None  # None: each row has its own
    principles: Sequence[str] = ()
    config: JudgeConfig = field(default_factory=JudgeConfig)
    unjudged: float | None = None  # instead of no score; None: an error
    name: str = NAME  # of the reward in logs

    def __post_init__(self) -> None:
        if self.exemplars is not None:  # a text, a list or an array
            row = read_row("", {"exemplars": self.exemplars}, "settings", fixed=False)
            object.__setattr__(self, "exemplars", row.exemplars)
        if self.config.mode == "pairwise":
            raise InputError("mode: expected pointwise for rewards, got pairwise")
        unmarked = replace(self.config, topics=False)  # marks are for people
        object.__setattr__(self, "config", unmarked)
        if self.unjudged is not None and not math.isfinite(self.unjudged):
            raise InputError(f"unjudged: expected a finite number, got {self.unjudged}")


def grouped(rows: Sequence[Row | None]) -> Iterator[dict[int, Row]]:
    """The rows of each call, by their index: of one writer and question, 26 at most. Empty
    completions are in none. Groups of a writer follow each other: exemplars are read once."""
    groups: dict[Any, dict[str | None, list[tuple[int, Row]]]] = {}
    for i, row in enumerate(rows):
        if row is not None and row.completion.strip():
            questions = groups.setdefault((row.writer, row.exemplars, row.principles), {})
            questions.setdefault(row.question, []).append((i, row))
    for members in (members for questions in groups.values() for members in questions.values()):
        n, parts = len(members), -(-len(members) // len(LABELS))  # of even size
        yield from (dict(members[k * n // parts : (k + 1) * n // parts]) for k in range(parts))


def rewards(settings: Settings, rows: Sequence[Row | None]) -> Rewards:
    """A reward for each row; None for None and for what has no score. While the texts of a group
    do not fit the context, the longest is left out, and has no score."""
    scored: Rewards = [None if row is None else 0.0 for row in rows]
    for group in grouped(rows):
        row = next(iter(group.values()))
        exemplars, config = row.exemplars or settings.exemplars or (), settings.config
        principles = settings.principles if row.principles is None else row.principles
        texts = {i: row.completion for i, row in group.items()}
        check(exemplars, list(texts.values()), config, row.question, principles)
        judge = settings.judge.load() if isinstance(settings.judge, LazyJudge) else settings.judge
        scores: dict[int, float | None] = {}
        while texts and not scores:
            more = row.question, principles, config
            try:
                with judge.lock:
                    judged = judge.judge(exemplars, list(texts.values()), *more)
                scores = dict(zip(texts, judged.scores, strict=True))
            except InputError:  # all else was checked above
                del texts[max(texts.items(), key=lambda item: len(item[1]))[0]]
        for i in group:
            score = scores.get(i)
            scored[i] = None if score is None else unit(score)
    return scored


def unit(score: float) -> float:
    """A soft score from 1 to 9 -> from 0 to 1."""
    return (score - DIGITS[0]) / (DIGITS[-1] - DIGITS[0])


def _numbers(settings: Settings, rows: Sequence[Row]) -> list[float]:
    """For trainers that know no None."""
    numbers = [settings.unjudged if x is None else x for x in rewards(settings, rows)]
    if None in numbers:
        raise InputError("the judge gave a completion no score (too long?), and no `unjudged`")
    return cast(list[float], numbers)


def reward_fn(judge: Judges | LazyJudge, exemplars: Any = None, **settings: Any) -> "TrlReward":
    """A function for TRL's `reward_funcs`; settings: see `Settings`. The question is the prompt.

    exemplars: texts of the writer; None: each row has its own in the column `exemplars`; a row with
    None there gets None. `NAME/no_score` in TRL's logs is the share of completions without a score.
    """
    return TrlReward(Settings(judge, exemplars, **settings))


class TrlReward:
    """A function with a name, as TRL looks for it: of a partial it would take the inner one's."""

    def __init__(self, settings: Settings):
        self.settings, self.__name__ = settings, settings.name

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Rewards:
        fixed = self.settings.exemplars is not None
        exemplars = prompts if fixed else columns.get("exemplars")
        if exemplars is None:
            raise InputError(f"expected a column exemplars, got {', '.join(sorted(columns))}")
        rows: list[Row | None] = []
        for i, (prompt, text, own) in enumerate(zip(prompts, completions, exemplars, strict=True)):
            label = {"question": prompt, "exemplars": own}
            rows.append(None if own is None else read_row(text, label, f"row {i}", fixed))
        scored = rewards(self.settings, rows)
        if columns.get("log_metric") and (apply := len(rows) - rows.count(None)):
            lost = scored.count(None) - rows.count(None)
            columns["log_metric"](f"{self.__name__}/no_score", lost / apply)
        return scored


def verl_score(
    judge: Judges | LazyJudge, exemplars: Any = None, **settings: Any
) -> Callable[..., float]:
    """verl's `compute_score`. exemplars: of every completion; None: those in `extra_info`."""
    return partial(_verl_score, Settings(judge, exemplars, **settings))


def _verl_score(
    settings: Settings,
    data_source: Any,
    solution_str: str,
    ground_truth: Any,
    extra_info: Any = None,
    **_: Any,
) -> float:
    names = {"exemplars", "question", "principles"}  # verl puts others beside them
    label = {name: extra_info[name] for name in names & set(extra_info or ())}
    row = read_row(solution_str, label, "extra_info", settings.exemplars is not None)
    return _numbers(settings, [row])[0]


def openrlhf_reward(
    judge: Judges | LazyJudge, exemplars: Any = None, **settings: Any
) -> Callable[..., dict[str, Any]]:
    """OpenRLHF's `reward_func`. exemplars: of all replies; None: those in labels."""
    return partial(_openrlhf_reward, Settings(judge, exemplars, **settings))


def _openrlhf_reward(
    settings: Settings,
    queries: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[Any],
    **_: Any,
) -> dict[str, Any]:
    import torch

    rows = rows_of(queries, prompts, labels, settings.exemplars is not None)
    if any(row.writer for row in rows):
        raise InputError("labels: expected exemplars, got a writer's name, which a server knows")
    scored = torch.tensor(_numbers(settings, rows))  # (B,)
    return {"rewards": scored, "scores": scored, "extra_logs": {settings.name: scored}}


def rows_of(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], fixed: bool
) -> list[Row]:
    """Rows of OpenRLHF's three lists."""
    if not len(queries) == len(prompts) == len(labels):
        raise InputError("labels: expected as many queries as prompts and labels")
    return [
        read_row(reply_in(query, prompt, f"queries[{i}]"), label, f"labels[{i}]", fixed)
        for i, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True))
    ]
