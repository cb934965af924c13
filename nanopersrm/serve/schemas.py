"""What travels between the server and its clients, as pydantic models; the OpenAPI page shows them.

    POST /judge  {"exemplars": ["…"], "candidates": ["…", "…"], "question": "…"}
    ->           {"scores": [7.1, 3.4], "verdict": 0, "preference": [[0.5, 0.93], …], …}

A writer is given as `exemplars`, or as the name of a `writer` that was put on the server before.
What is left out has the server's own setting; an unknown field is an error. A judgement without a
score is a reply like another: verdict "invalid", null for the score. `candidates` has of each its
ledger in the order drawn, the sum last, what all evidence says, and what was read (null: the judge
does not read), as characters start to end of the candidate and gains in nats:

    {"score": 6.9, "decibans": 8.4, "measured": 61.2, "ledger": [
       {"feature": "reading", "writer": null, "candidate": 0.11, "decibans": 6.1, "words":
         [{"start": 0, "end": 11, "text": "The machine", "decibans": 1.9}, …]}, …,
       {"feature": "sum", "writer": null, "candidate": null, "decibans": 7.2, "words": []}],
     "reading": {"forward": 0.21, "back": 0.08,
       "words": [{"start": 0, "end": 3, "gain": 0.4, "topic": false}, …],
       "phrases": [{"start": 0, "end": 11, "text": "The machine", "gain": 2.4, "topic": false}, …]}}
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StrictBool, StrictInt, model_validator
from starlette.exceptions import HTTPException

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig, Judgement, check, orders_of
from nanopersrm.judge.verdict import LABELS
from nanopersrm.serve.reward_fn import NAME, grouped, rows_of, some_text, unit
from nanopersrm.style.evidence import FEATURES
from nanopersrm.style.profile import BY_NAME, profile, reference

THINK_TOKENS = 1024  # budget of free prose
TOKENS = 65_536  # of prose in a judgement: prompts x samples x think_tokens
NO_SCORE = "the judge gave no valid score"
Text = Annotated[str, Field(max_length=20_000), AfterValidator(some_text)]
Texts = Annotated[list[Text], Field(max_length=32)]
Exemplars = Annotated[list[Text], Field(min_length=1, max_length=32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Writer(BaseModel, extra="forbid"):
    """Whose style counts: put once, judge many times."""

    exemplars: Exemplars
    principles: Texts = []


class JudgeRequest(BaseModel, extra="forbid"):
    """Exemplars or a writer, and candidates."""

    candidates: list[Text] = Field(max_length=len(LABELS), description="1 to 26 (pairwise: from 2)")
    exemplars: Exemplars | None = None
    writer: Name | None = Field(default=None, description="or the name of one that was put")
    question: str | None = Field(default=None, max_length=20_000)
    principles: Texts | None = Field(default=None, description="of the writer; not with `writer`")
    mode: Literal["pointwise", "pairwise"] | None = None
    think: StrictBool | None = Field(default=None, description="look at evidence before scoring")
    think_lines: StrictInt | None = Field(default=None, ge=1, le=len(FEATURES))
    all_evidence: StrictBool | None = Field(default=None, description="look at all, choose nothing")
    free: StrictBool | None = Field(default=None, description="reason in free prose instead")
    think_tokens: StrictInt | None = Field(default=None, ge=1, le=THINK_TOKENS)
    samples: StrictInt | None = Field(default=None, ge=1, le=16)
    temperature: float | None = Field(default=None, ge=0, le=100)
    seed: StrictInt | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: StrictBool = Field(default=False, description="server-sent events; /judge only")

    @model_validator(mode="after")
    def one_writer(self) -> "JudgeRequest":
        """Either exemplars, with principles or without, or a name."""
        if (self.exemplars is None) == (self.writer is None):
            raise ValueError("expected either exemplars or a writer")
        if self.writer is not None and self.principles is not None:
            raise ValueError("expected no principles beside a writer, who was put with their own")
        return self


class ProfileRequest(BaseModel, extra="forbid"):
    """Whose habits to measure."""

    exemplars: Exemplars
    top: StrictInt = Field(default=8, ge=1, le=100)


class RewardRequest(BaseModel):
    """OpenRLHF's request; a label is read as in `reward_fn.py`, or names a writer that was put."""

    query: list[str] = Field(min_length=1, max_length=128, description="prompts with replies")
    prompts: list[str]
    labels: list[Any] | None = None


@dataclass(frozen=True)
class JudgeCall:
    """The arguments of `Judge.judge`, by their names."""

    exemplars: tuple[str, ...]
    candidates: tuple[str, ...]
    question: str | None
    principles: tuple[str, ...]
    config: JudgeConfig


def writer_named(name: str, writers: Mapping[str, Writer]) -> Writer:
    """The writer that was put under a name."""
    if name not in writers:
        raise HTTPException(404, f"writer: nobody was put under the name {name!r}")
    return writers[name]


def judge_call(
    body: JudgeRequest, writers: Mapping[str, Writer], defaults: JudgeConfig
) -> JudgeCall:
    """A request -> what the judge is called with. Raises InputError, or HTTPException (404)."""
    writer = body if body.writer is None else writer_named(body.writer, writers)
    changed = {name: value for name, value in body if name in vars(defaults) and value is not None}
    config = replace(defaults, **changed)
    question = body.question if body.question and body.question.strip() else None
    exemplars, principles = tuple(writer.exemplars or ()), tuple(writer.principles or ())
    call = JudgeCall(exemplars, tuple(body.candidates), question, principles, config)
    check(exemplars, call.candidates, config, question, principles)
    prompts = len(orders_of(len({text.strip() for text in call.candidates}), config.mode))
    if prompts * config.samples * config.think_tokens * config.free > TOKENS:
        raise InputError(
            f"expected at most {TOKENS} tokens of prose in a judgement, got {prompts} "
            f"prompts x {config.samples} samples x {config.think_tokens} think_tokens"
        )
    return call


def judge_reply(judgement: Judgement) -> dict[str, Any]:
    """A judgement as JSON. No ranking where it is invalid."""
    reply = judgement.as_dict()
    return reply | {"ranking": None} if judgement.verdict == "invalid" else reply


def rank_reply(judgement: Judgement) -> dict[str, Any]:
    """The candidates, best first; beats_next: P(fits better than the next), null for the last."""
    order = judgement.ranking
    measured = [candidate.measured for candidate in judgement.candidates]
    steps = [*(judgement.preference[i][j] for i, j in pairwise(order)), None]
    places = [
        {"candidate": i, "score": judgement.scores[i], "beats_next": step, "measured": measured[i]}
        for i, step in zip(order, steps, strict=True)
    ]
    ranking = None if judgement.verdict == "invalid" else places
    return {"ranking": ranking, "verdict": judgement.verdict, "notes": judgement.notes}


def profile_reply(exemplars: list[str], top: int) -> list[dict[str, Any]]:
    """The most salient traits, each with the quantiles of many writers."""
    shown = []
    for trait in profile(exemplars, top=top):
        factor, quantiles = BY_NAME[trait.factor], reference().factors[trait.factor].quantiles
        more = {"label": factor.label, "unit": factor.unit, "quantiles": [*quantiles]}
        shown.append(asdict(trait) | more)
    return shown


def reward_calls(
    body: RewardRequest, writer: str | None, writers: Mapping[str, Writer], defaults: JudgeConfig
) -> list[tuple[list[int], JudgeCall]]:
    """The calls, and which queries are the candidates of each. writer: of all queries."""
    labels = [None] * len(body.query) if body.labels is None else body.labels
    rows = rows_of(body.query, body.prompts, labels, fixed=writer is not None)
    for row in rows:
        row.writer = writer or row.writer
    calls = []
    for group in grouped(rows):
        shared = next(iter(group.values())).model_dump(exclude={"completion"})
        fields = {name: value for name, value in shared.items() if value}
        candidates = [row.completion for row in group.values()]
        request = JudgeRequest(candidates=candidates, mode="pointwise", **fields)
        calls.append((list(group), judge_call(request, writers, replace(defaults, topics=False))))
    return calls


def reward_reply(n: int, judged: list[tuple[list[int], Judgement]]) -> dict[str, Any]:
    """OpenRLHF's reply. One reply without a score fails the call: a number would be learned."""
    rewards = [0.0] * n  # of an empty reply: the lowest
    for members, judgement in judged:
        for i, score in zip(members, judgement.scores, strict=True):
            if score is None or judgement.verdict == "invalid":
                raise HTTPException(500, NO_SCORE)
            rewards[i] = unit(score)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {NAME: rewards}}
