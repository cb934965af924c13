"""What travels between the server and its clients, as pydantic models; the OpenAPI page shows them.

    POST /judge  {"exemplars": ["…"], "candidates": ["…", "…"], "question": "…"}
    ->           {"scores": [7.1, 3.4], "verdict": 0, "preference": [[0.5, 0.93], …], …}

A writer is given as `exemplars`, or as the name of a `writer` that was put on the server before;
exactly one of them. What is left out has the server's own setting. An unknown field is an error.
A judgement without a score is a reply like another: verdict "invalid", null for the score.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
)

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig, Judgement, check, schedule
from nanopersrm.judge.verdict import LABELS
from nanopersrm.serve.reward_fn import (
    FIELDS,
    NAME,
    question_beside_writer,
    read_label,
    reply_in,
    unit,
)
from nanopersrm.style.profile import BY_NAME, profile, reference

TEXT_CHARS = 20_000  # of one text
TEXTS = 32  # of one writer, and as many principles
THINK_TOKENS = 1024  # budget of a reasoning
SAMPLES = 16  # replies for each prompt
TOKENS = 65_536  # of reasoning in a judgement: prompts x samples x think_tokens
QUERIES = 128  # of a call of /get_reward
WRITER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
FORBID = ConfigDict(extra="forbid")


class NotFound(InputError):
    """Nothing has this name."""


def _some_text(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("expected a text, got an empty one or a zero byte")
    return text


Text = Annotated[str, Field(max_length=TEXT_CHARS), AfterValidator(_some_text)]
Texts = Annotated[list[Text], Field(max_length=TEXTS)]


class Writer(BaseModel):
    """Whose style counts: put once, judge many times."""

    model_config = FORBID

    exemplars: Annotated[Texts, Field(min_length=1)]
    principles: Texts = []


class JudgeRequest(BaseModel):
    """Exemplars or a writer, and candidates."""

    model_config = FORBID

    candidates: list[Text] = Field(max_length=len(LABELS), description="1 to 26 (pairwise: from 2)")
    exemplars: Annotated[Texts, Field(min_length=1)] | None = None
    writer: str | None = Field(default=None, description="or the name of one that was put")
    question: Annotated[str, Field(max_length=TEXT_CHARS)] | None = None
    principles: Texts | None = Field(default=None, description="of the writer; not with `writer`")
    mode: Literal["pointwise", "pairwise"] | None = None
    evidence: StrictBool | None = Field(default=None, description="show the model measured facts")
    think: StrictBool | None = Field(default=None, description="reason before scoring")
    think_tokens: Annotated[StrictInt, Field(ge=1, le=THINK_TOKENS)] | None = None
    copy_quotes: StrictBool | None = Field(default=None, description="quote only what was written")
    samples: Annotated[StrictInt, Field(ge=1, le=SAMPLES)] | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=100)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: StrictBool = Field(default=False, description="server-sent events; /judge only")


class ProfileRequest(BaseModel):
    """Whose habits to measure."""

    model_config = FORBID

    exemplars: Annotated[Texts, Field(min_length=1)]
    top: Annotated[StrictInt, Field(ge=1, le=100)] = 8


class RewardRequest(BaseModel):
    """OpenRLHF's request; a label is read as in `reward_fn.py`, or names a writer that was put."""

    query: list[str] = Field(min_length=1, max_length=QUERIES, description="prompts with replies")
    prompts: list[str]
    labels: list[Any] | None = None


class Ranked(BaseModel):
    """A candidate in its place."""

    candidate: int
    score: float
    beats_next: float | None  # P(fits better than the next); null: the last
    measured: float | None


class RankReply(BaseModel):
    """Candidates, best first."""

    ranking: list[Ranked] | None  # null: invalid
    verdict: int | Literal["tie", "invalid"]
    notes: list[str]


class ErrorReply(BaseModel):
    """Every error, as OpenAI has them: {"message": one line, "type": …, "param", "code"}."""

    error: dict[str, str | None]


@dataclass(frozen=True)
class JudgeCall:
    """The arguments of `Judge.judge`."""

    exemplars: tuple[str, ...]
    candidates: tuple[str, ...]
    question: str | None = None
    principles: tuple[str, ...] = ()
    config: JudgeConfig = field(default_factory=JudgeConfig)


def writer_named(name: str, writers: Mapping[str, Writer]) -> Writer:
    """The writer that was put under a name."""
    if not WRITER_NAME.fullmatch(name):
        raise InputError(f"writer: expected a name of letters, digits and . _ -, got {name!r}")
    if name not in writers:
        raise NotFound(f"writer: nobody was put under the name {name!r}")
    return writers[name]


def judge_call(
    body: JudgeRequest, writers: Mapping[str, Writer], defaults: JudgeConfig
) -> JudgeCall:
    """A request -> what the judge is called with. Raises InputError or NotFound."""
    if (body.exemplars is None) == (body.writer is None):
        both = "both" if body.writer is not None else "neither"
        raise InputError(f"expected either exemplars or a writer, got {both}")
    if body.writer is not None and body.principles is not None:
        raise InputError("principles: expected none beside a writer, who was put with their own")
    if body.writer is None:
        writer = Writer(exemplars=body.exemplars or [], principles=body.principles or [])
    else:
        writer = writer_named(body.writer, writers)
    names = (name for name in vars(defaults) if getattr(body, name) is not None)
    config = replace(defaults, **{name: getattr(body, name) for name in names})
    question = body.question if body.question and body.question.strip() else None
    call = JudgeCall(
        tuple(writer.exemplars),
        tuple(body.candidates),
        question,
        tuple(writer.principles),
        config,
    )
    check(call.exemplars, call.candidates, config, question, call.principles)
    n = len({candidate.strip() for candidate in call.candidates})
    prompts = n if config.mode == "pointwise" else 2 * len(schedule(n))
    if prompts * config.samples * config.think_tokens * config.think > TOKENS:
        raise InputError(
            f"expected at most {TOKENS} tokens of reasoning in a judgement, got {prompts} "
            f"prompts x {config.samples} samples x {config.think_tokens} think_tokens"
        )
    return call


def judge_reply(judgement: Judgement) -> dict[str, Any]:
    """A judgement as JSON. No ranking where it is invalid."""
    reply = judgement.as_dict()
    return reply | {"ranking": None} if judgement.verdict == "invalid" else reply


def rank_reply(judgement: Judgement) -> RankReply:
    """The candidates in order."""
    reply = RankReply(ranking=None, verdict=judgement.verdict, notes=judgement.notes)
    if judgement.verdict != "invalid":
        ranking, measured = judgement.ranking, judgement.measured
        beats = [judgement.preference[i][j] for i, j in pairwise(ranking)]
        reply.ranking = [
            Ranked(
                candidate=i,
                score=cast(float, judgement.scores[i]),
                beats_next=step,
                measured=None if measured is None else measured[i],
            )
            for i, step in zip(ranking, [*beats, None], strict=True)
        ]
    return reply


def profile_reply(exemplars: list[str], top: int) -> list[dict[str, Any]]:
    """The most salient traits, each with the quantiles of many writers."""
    factors = reference().factors
    return [
        asdict(trait)
        | {"label": BY_NAME[trait.factor].label, "unit": BY_NAME[trait.factor].unit}
        | {"quantiles": [*factors[trait.factor].quantiles]}
        for trait in profile(exemplars, top=top)
    ]


def reward_calls(
    body: RewardRequest, writer: str | None, writers: Mapping[str, Writer], defaults: JudgeConfig
) -> list[tuple[list[int], JudgeCall]]:
    """The calls, and which queries are the candidates of each, up to 26. A query with an empty
    reply is in none, but its writer must exist. writer: whose style counts for all."""
    n = len(body.query)
    labels = body.labels if body.labels is not None else [None] * n
    if not n == len(body.prompts) == len(labels):
        counts = f"{n}, {len(body.prompts)} and {len(labels)}"
        raise InputError(f"expected as many queries as prompts and labels, got {counts}")
    replies = [reply_in(body.query[i], body.prompts[i], i) for i in range(n)]
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for i, label in enumerate(labels):
        shared = _of_label(label, f"labels[{i}]", writer)
        for same, members in groups:
            if same == shared and len(members) < len(LABELS):
                break
        else:
            members = []
            groups.append((shared, members))
        if replies[i]:
            members.append(i)
    calls = []
    for shared, members in groups:
        texts = [replies[i] for i in members] or ["-"]  # nobody judges it
        request = JudgeRequest(candidates=texts, mode="pointwise", **shared)
        calls.append((members, judge_call(request, writers, defaults)))
    return [(members, call) for members, call in calls if members]


def _of_label(label: object, place: str, writer: str | None) -> dict[str, Any]:
    """Fields of a JudgeRequest."""
    if writer is not None:
        return {"writer": writer, "question": question_beside_writer(label, place)}
    row = read_label(label, place, (*FIELDS, "writer"))
    if row.exemplars is None and row.writer is None:
        raise InputError(
            f"{place}: expected exemplars, texts of a writer, or the name of a writer that was "
            "put, got none; or say ?writer=NAME"
        )
    return {name: value or None for name, value in asdict(row).items()}


def reward_reply(n: int, judged: list[tuple[list[int], Judgement]]) -> dict[str, Any] | None:
    """OpenRLHF's reply; None unless every query that was judged has a valid score."""
    rewards = [0.0] * n  # of an empty reply: the lowest
    for members, judgement in judged:
        for i, score in zip(members, judgement.scores, strict=True):
            if score is None or judgement.verdict == "invalid":
                return None
            rewards[i] = unit(score)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {NAME: rewards}}
