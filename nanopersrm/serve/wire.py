"""What travels between the server and its clients: requests, replies, and the checks between.

    POST /judge  {"exemplars": ["…"], "candidates": ["…", "…"], "question": "…"}
    ->           {"scores": [7.1, 3.4], "verdict": 0, "preference": [[0.5, 0.93], …], …}

A writer is given as `exemplars`, or as the name of a `writer` that was put on the server before
(PUT /writers/NAME); exactly one of them. Whatever is left out has the server's own setting.

These dataclasses are the JSON schemas of the OpenAPI page. An unknown field is an error, so that a
mistyped one does not pass for a default. `ask_of` checks what no schema says: lengths, counts,
half characters, budgets.

What we chose. A judgement that is not valid is a reply like another: verdict "invalid", null where
there is no score, and no ranking. Who must have a number (`remote.py`, `chat.py`) gets an error.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.ranking import schedule
from nanopersrm.serve.desk import Ask, Done
from nanopersrm.style.profile import BY_NAME, profile, reference

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: in JSON, in no text
LONGEST_LINE = 400  # characters of an error
NO_OTHERS = ConfigDict(extra="forbid")

Whole = Annotated[int, Strict()]
Switch = Annotated[bool, Strict()]
Number = Annotated[float, Strict()]
Texts = Annotated[list[str], Field(description="texts, in order")]


class Unknown(Exception):
    """Nothing has this name."""


@dataclass(frozen=True)
class Limits:
    """What one client may take."""

    waiting: int = 64  # requests in line; one more gets 503
    seconds: float = 120.0  # that a request may take, waiting included; then 504
    body_kb: int = 1024  # of a request
    text_chars: int = 20_000  # of one text
    exemplars: int = 32  # texts of one writer, and as many principles
    think_tokens: int = 1024  # budget of a reasoning
    samples: int = 16  # replies for each prompt
    tokens: int = 65_536  # of reasoning in a judgement: prompts x samples x think_tokens
    writers: int = 256  # that can be put
    queries: int = 128  # of a call of /get_reward

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"limits.{name}: expected a number above 0, got {value}")


@dataclass(frozen=True)
class Writer:
    """Whose style counts: put once, judge many times."""

    __pydantic_config__ = NO_OTHERS

    exemplars: Texts
    principles: Texts = field(default_factory=list)


@dataclass(frozen=True)
class JudgeRequest:
    """Exemplars or a writer, and candidates."""

    __pydantic_config__ = NO_OTHERS

    candidates: Annotated[list[str], Field(description="1 to 26 texts (pairwise: 2 to 26)")]
    exemplars: Annotated[list[str] | None, Field(description="texts of the writer")] = None
    writer: Annotated[str | None, Field(description="or the name of one that was put")] = None
    question: Annotated[str | None, Field(description="what the candidates answer")] = None
    principles: Annotated[
        list[str] | None, Field(description="what the writer says they want; not with `writer`")
    ] = None
    mode: Literal["pointwise", "pairwise"] | None = None
    evidence: Annotated[Switch | None, Field(description="show the model measured facts")] = None
    think: Annotated[Switch | None, Field(description="reason before scoring")] = None
    think_tokens: Annotated[Whole | None, Field(description="budget of the reasoning")] = None
    copy_quotes: Annotated[Switch | None, Field(description="quote only what was written")] = None
    samples: Annotated[Whole | None, Field(description="replies a prompt, averaged")] = None
    temperature: Annotated[Number | None, Field(description="of the reasoning")] = None
    seed: Whole | None = None
    stream: Annotated[Switch, Field(description="server-sent events; /judge only")] = False


@dataclass(frozen=True)
class ProfileRequest:
    """Whose habits to measure."""

    __pydantic_config__ = NO_OTHERS

    exemplars: Texts
    top: Annotated[Whole, Field(description="the most salient traits", ge=1, le=100)] = 8


@dataclass(frozen=True)
class ReplyPart:
    """A reply of the model."""

    candidates: list[int]  # indices; the first was shown as A, a second as B
    text: str
    reasoning: str
    problem: str | None  # null: well formed
    cut: bool  # the budget ended the reasoning
    claims: int  # of the reasoning, that can be measured in the texts
    claims_true: int
    untrue: list[str]  # the others, and quotes that are in no text


@dataclass(frozen=True)
class JudgeReply:
    """A judgement. Lists follow the order of the candidates."""

    scores: list[float | None]  # 1 to 9; null: nothing valid was said
    preference: list[list[float | None]]  # [i][j] = P(i fits better than j)
    ranking: list[int] | None  # indices, best first; null: invalid
    verdict: int | Literal["tie", "invalid"]  # index of the best
    reasoning: list[str]
    well_formed: bool
    tokens: int  # drawn in the call
    prompt_tokens: int
    seconds: float  # of the call
    together: int  # requests that shared the call
    replies: list[ReplyPart]
    notes: list[str]
    measured: list[float] | None  # 1 to 99 % likely by all instruments; null: not shown


@dataclass(frozen=True)
class Ranked:
    """A candidate in its place."""

    candidate: int
    score: float
    beats_next: float | None  # P(fits better than the next); null: the last
    measured: float | None  # 1 to 99 % likely by all instruments; null: not shown


@dataclass(frozen=True)
class RankReply:
    """Candidates, best first."""

    ranking: list[Ranked] | None  # null: invalid
    verdict: int | Literal["tie", "invalid"]
    notes: list[str]


@dataclass(frozen=True)
class TraitReply:
    """A habit of the writer against the reference of many writers."""

    factor: str
    label: str
    unit: str
    phrase: str  # in words, as judge.py prints it
    value: float
    z: float  # deviations from the mean, -4 to 4
    percentile: float  # of the reference below the value
    salience: float
    quantiles: list[float]  # of the reference, evenly spaced


@dataclass(frozen=True)
class Problem:
    """What went wrong."""

    message: str  # one line: what was expected, what came
    type: str
    param: str | None
    code: str | None


@dataclass(frozen=True)
class ErrorReply:
    """Every error, as OpenAI has them."""

    error: Problem


def one_line(text: str) -> str:
    """Fit for an error: no line ends, no half characters, not for ever."""
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} …"


def named(name: str) -> str:
    """A name for a writer."""
    if not NAME.fullmatch(name):
        raise InputError(f"writer: expected a name of letters, digits and . _ -, got {name!r}")
    return name


def texts_of(name: str, texts: Sequence[str], limits: Limits, most: int) -> tuple[str, ...]:
    """Texts that are not too many, too long, or no text."""
    if len(texts) > most:
        raise InputError(f"{name}: expected at most {most} texts, got {len(texts)}")
    for i, text in enumerate(texts):
        if len(text) > limits.text_chars:
            raise InputError(
                f"{name}[{i}]: expected at most {limits.text_chars} characters, got {len(text)}"
            )
        if not text.strip():
            raise InputError(f"{name}[{i}]: expected a text, got an empty one")
        if "\0" in text:
            raise InputError(f"{name}[{i}]: expected a text, found a zero byte")
        if HALF.search(text):
            raise InputError(f"{name}[{i}]: expected a text, found half of a surrogate pair")
    return tuple(texts)


def writer_of(body: Writer, limits: Limits) -> Writer:
    """A writer fit to be kept."""
    exemplars = texts_of("exemplars", body.exemplars, limits, limits.exemplars)
    if not exemplars:
        raise InputError("exemplars: expected at least one text, got none")
    principles = texts_of("principles", body.principles, limits, limits.exemplars)
    return Writer([*exemplars], [*principles])


def known(name: str, writers: Mapping[str, Writer]) -> Writer:
    """The writer of that name."""
    if named(name) not in writers:
        raise Unknown(f"writer: nobody was put under the name {name!r}")
    return writers[name]


def ask_of(
    body: JudgeRequest, writers: Mapping[str, Writer], judging: JudgeConfig, limits: Limits
) -> Ask:
    """A request -> what the judge is asked. Raises InputError or Unknown."""
    if (body.exemplars is None) == (body.writer is None):
        both = "both" if body.writer is not None else "neither"
        raise InputError(f"expected either exemplars or a writer, got {both}")
    if body.writer is None:
        writer = writer_of(Writer(body.exemplars or [], body.principles or []), limits)
    elif body.principles is None:
        writer = known(body.writer, writers)
    else:
        raise InputError("principles: expected none beside a writer, who was put with their own")
    question = None
    if body.question and body.question.strip():
        (question,) = texts_of("question", [body.question], limits, 1)
    names = vars(judging)  # a request may set each of them
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    config = replace(judging, **given)
    for name in ("think_tokens", "samples"):
        if given.get(name, 0) > getattr(limits, name):
            raise InputError(f"{name}: expected at most {getattr(limits, name)}, got {given[name]}")
    if not -(2**63) <= config.seed < 2**63:
        raise InputError(f"seed: expected a number of 64 bits, got {config.seed}")
    ask = Ask(
        tuple(writer.exemplars),
        texts_of("candidates", body.candidates, limits, 26),
        question,
        tuple(writer.principles),
        config,
    )
    ask.check()
    n = len(ask.texts)
    prompts = n if config.mode == "pointwise" else 2 * len(schedule(n))
    if prompts * config.samples * config.think_tokens * config.think > limits.tokens:
        raise InputError(
            f"expected at most {limits.tokens} tokens of reasoning in a judgement, got {prompts} "
            f"prompts x {config.samples} samples x {config.think_tokens} think_tokens"
        )
    return ask


def judge_reply(done: Done) -> dict[str, Any]:
    """A judgement as JSON; see JudgeReply."""
    plain = done.judgement.as_dict() | {"together": done.together}
    return plain | {"ranking": None} if done.judgement.verdict == "invalid" else plain


def rank_reply(done: Done) -> dict[str, Any]:
    """See RankReply."""
    found, ranking = done.judgement, None
    if found.verdict != "invalid":
        following = [*found.ranking[1:], None]
        ranking = [
            {
                "candidate": i,
                "score": found.scores[i],
                "beats_next": None if j is None else found.preference[i][j],
                "measured": None if found.measured is None else found.measured[i],
            }
            for i, j in zip(found.ranking, following, strict=True)
        ]
    return {"ranking": ranking, "verdict": found.verdict, "notes": found.notes}


def profile_reply(writer: Writer, top: int) -> list[dict[str, Any]]:
    """The most salient traits, see TraitReply."""
    against = reference().factors
    return [
        asdict(trait)
        | {"label": BY_NAME[trait.factor].label, "unit": BY_NAME[trait.factor].unit}
        | {"quantiles": [*against[trait.factor].quantiles]}
        for trait in profile(writer.exemplars, top=top)
    ]
