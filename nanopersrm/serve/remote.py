"""OpenRLHF's remote reward: what `--reward.remote_url` (earlier `--remote_rm_url`) talks to.

    POST /get_reward?writer=ada  {"query": ["…"], "prompts": ["…"], "labels": ["…"]}
    ->  {"rewards": [0.76], "scores": [0.76], "extra_logs": {"fits_writer": [0.76]}}

as OpenRLHF 0.11.2 sends it (openrlhf/utils/agent.py) and its own server answers (cli/serve_rm.py).
It knows no headers; a token goes into the URL: http://any:TOKEN@127.0.0.1:8000/get_reward.

A *query* is the policy's prompt and response, decoded together with special tokens; the response is
what follows the prompt, without the tokens that end a turn. That is the candidate.

Whose style counts is said by ?writer=NAME for all, or by each label (`--data.label_key`): a text of
the writer, a list of such texts, or an object, itself or as JSON in a text, read by `label.py`:

    {"exemplars": ["…"], "question": "…"}        or {"writer": "ada"}; exemplars with principles

With ?writer=NAME no more is read of a label than the question of an object; principles are refused.
The prompt is full of the policy's chat template and is not used as a question.

A reward is (score - 1) / 8, from 0 to 1, as in `reward.py`. An empty response, which fits nobody,
gets 0 by rule and is not shown to the judge; its writer must exist all the same. What has no valid
score fails the whole call: a number in its place would be learned from. OpenRLHF repeats a call
five times, then goes on without a reward; its log says that, and the body of our answer the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.verdict import LABELS
from nanopersrm.serve.desk import Ask, Done
from nanopersrm.serve.reward_fn import (
    FIELDS,
    NAME,
    question_beside_writer,
    read_label,
    reply_in,
    unit,
)
from nanopersrm.serve.wire import JudgeRequest, Limits, Writer, ask_of

NOTHING = "-"  # stands for a candidate where only the writer is checked; nobody judges it


@dataclass(frozen=True)
class RewardRequest:
    """OpenRLHF's request."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    query: Annotated[list[str], Field(description="prompts with their responses")]
    prompts: Annotated[list[str], Field(description="the prompts alone")]
    labels: Annotated[list[Any] | None, Field(description="whose style counts")] = None


@dataclass(frozen=True)
class RewardReply:
    """OpenRLHF's reply, a number for each query."""

    rewards: list[float]  # 0 to 1
    scores: list[float]  # the same: the scale on which OpenRLHF filters
    extra_logs: dict[str, list[float]]


def responses(query: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """What the policy wrote.

    >>> responses(["<s>Hi?Ho.</s>"], ["<s>Hi?"])
    ['Ho.']
    """
    if len(query) != len(prompts) or not query:
        raise InputError(
            f"expected as many prompts as queries, at least 1, got {len(prompts)} and {len(query)}"
        )
    pairs = zip(query, prompts, strict=True)
    return [reply_in(both, prompt, i) for i, (both, prompt) in enumerate(pairs)]


def request_of(label: object, place: str, writer: str | None = None) -> JudgeRequest:
    """A label -> a request without candidates. writer: who was named for all."""
    if writer is not None:
        return JudgeRequest([], writer=writer, question=question_beside_writer(label, place))
    row = read_label(label, place, (*FIELDS, "writer"))
    if row.exemplars is None and row.writer is None:
        raise InputError(
            f"{place}: expected texts of a writer, or an object with exemplars or the name of a "
            "writer, got none; or say ?writer=NAME"
        )
    return JudgeRequest(
        [],
        exemplars=list(row.exemplars) if row.exemplars else None,
        writer=row.writer,
        question=row.question,
        principles=list(row.principles) if row.principles else None,
    )


def asks_of(
    body: RewardRequest,
    writer: str | None,
    writers: Mapping[str, Writer],
    judging: JudgeConfig,
    limits: Limits,
) -> list[tuple[list[int], Ask]]:
    """The asks, and which queries are the candidates of each: one ask for up to 26 of a kind.

    A query without a response is in none.
    """
    if len(body.query) > limits.queries:
        raise InputError(f"query: expected at most {limits.queries}, got {len(body.query)}")
    written = responses(body.query, body.prompts)
    labels = body.labels if body.labels is not None else [None] * len(written)
    if len(labels) != len(written):
        raise InputError(f"labels: expected one for each query, got {len(labels)}")
    groups: list[tuple[JudgeRequest, list[int]]] = []
    for i, label in enumerate(labels):
        asked = request_of(label, f"labels[{i}]", writer)
        for same, members in groups:
            if same == asked and len(members) < len(LABELS):
                break
        else:
            members = []
            groups.append((asked, members))
        if written[i]:
            members.append(i)
    found = []
    for asked, members in groups:
        texts = [written[i] for i in members] or [NOTHING]
        ask = ask_of(replace(asked, candidates=texts, mode="pointwise"), writers, judging, limits)
        if members:
            found.append((members, ask))
    return found


def reward_reply(n: int, found: Sequence[tuple[list[int], Done]]) -> dict[str, Any] | None:
    """See RewardReply; None unless every query that was judged has a valid score."""
    rewards = [0.0] * n  # without a response: the lowest
    for members, done in found:
        for i, score in zip(members, done.judgement.scores, strict=True):
            if score is None:
                return None
            rewards[i] = unit(score)
        if done.judgement.verdict == "invalid":
            return None
    return {"rewards": rewards, "scores": rewards, "extra_logs": {NAME: rewards}}
