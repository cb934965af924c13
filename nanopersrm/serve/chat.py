"""The judge behind OpenAI's chat completions, so that what can call a chat model can call it.

    client.chat.completions.create(
        model="nanopersrm",
        messages=[{"role": "user", "content": "judge"}],
        extra_body={"nanopersrm": {"exemplars": ["…"], "candidates": ["…", "…"]}},
    )
    ->  <think>
        A: Short sentences, as the writer's. …

        B: …
        </think>
        <scores>A=7 B=3</scores>

`nanopersrm` is a body of POST /judge; the messages are not read then. Without it, the user's
messages hold the texts in tags, for clients that can send nothing else:

    <exemplar> … </exemplar>  <question> … </question>  <candidate A> … </candidate A>

and the model's name can name a writer that was put: `nanopersrm:ada`. A text can contain such a
tag and so pass for two: send texts of strangers by `nanopersrm`.

The reply is the judge's reasoning and a digit for each candidate: its score, rounded. The exact
scores, preferences and notes stand beside it, in the field `nanopersrm` of the completion. Without
a valid score there is no reply but an error.

What we chose. temperature, seed and max_tokens (or max_completion_tokens) are heard; the latter is
the budget of the reasoning, as far as the server's limit goes, since chat clients ask for thousands
of tokens without wanting them. n must be 1. Other settings of a chat model mean nothing here and
are passed over, as OpenAI-compatible servers do. Streaming follows the candidates one after the
other.
"""

import math
import re
import time
import uuid
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from nanopersrm import InputError
from nanopersrm.judge.judgement import Judgement
from nanopersrm.judge.verdict import CLOSE, LABELS, OPEN, SCORES, SCORES_END
from nanopersrm.serve.desk import Done
from nanopersrm.serve.wire import JudgeRequest, Limits, Number, Switch, Unknown, Whole, judge_reply

MODEL = "nanopersrm"
OPENING = re.compile(r"<(exemplar|principle|question|candidate [A-Z])>")


@dataclass(frozen=True)
class Message:
    """A turn of the conversation."""

    role: str
    content: Annotated[
        str | list[dict[str, Any]] | None, Field(description="a text, or parts of type text")
    ] = None


@dataclass(frozen=True)
class ChatRequest:
    """What is read of OpenAI's request; other fields are passed over."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    messages: list[Message]
    model: str = MODEL
    nanopersrm: Annotated[JudgeRequest | None, Field(description="as for /judge")] = None
    temperature: Number | None = None
    seed: Whole | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    n: Whole | None = None
    stream: Switch | None = None


def judge_request(body: ChatRequest, limits: Limits) -> JudgeRequest:
    """What a chat asks of the judge. Raises InputError or Unknown."""
    model, _, writer = body.model.partition(":")
    if model != MODEL:
        raise Unknown(f"model: expected {MODEL} or {MODEL}:WRITER, got {body.model!r}")
    if body.n not in (None, 1):
        raise InputError(f"n: expected 1, got {body.n}")
    asked = body.nanopersrm
    if asked is None:
        asked = from_tags("\n".join(_text(m) for m in body.messages if m.role == "user"))
    if asked.stream:
        raise InputError("nanopersrm.stream: expected false; say stream beside messages")
    if writer and asked.writer is None and asked.exemplars is None:
        asked = replace(asked, writer=writer)
    elif writer and asked.writer != writer:
        raise InputError(f"model: {body.model!r} names a writer, and the request another")
    budget = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if budget is not None and budget < 1:
        raise InputError(f"max_tokens: expected at least 1, got {budget}")
    said: dict[str, Any] = {
        "temperature": body.temperature,
        "seed": body.seed,
        "think_tokens": None if budget is None else min(budget, limits.think_tokens),
    }
    heard = {
        name: value
        for name, value in said.items()
        if value is not None and getattr(asked, name) is None
    }
    return replace(asked, **heard)


def _text(message: Message) -> str:
    """The text of a message, whole or in parts."""
    if not isinstance(message.content, list):
        return message.content or ""
    parts = [part.get("text") for part in message.content if part.get("type") == "text"]
    if len(parts) < len(message.content) or not all(isinstance(part, str) for part in parts):
        raise InputError("messages: expected parts of type text, found something else")
    return "\n".join(str(part) for part in parts)


def from_tags(text: str) -> JudgeRequest:
    """The texts of a message that is written like a prompt of the judge's.

    >>> from_tags("<exemplar>So.</exemplar> <candidate A>No.</candidate A>").candidates
    ['No.']
    """
    found: dict[str, list[str]] = {}
    at, unclosed = 0, set[str]()  # tags that never close, looked for once: a message may be long
    while match := OPENING.search(text, at):
        at, tag = match.end(), match[1]
        end = -1 if tag in unclosed else text.find(f"</{tag}>", at)
        if end < 0:
            unclosed.add(tag)
            continue
        found.setdefault(tag, []).append(text[at:end].strip())
        at = end + len(f"</{tag}>")
    labels = [tag for tag in found if tag.startswith("candidate ")]
    expected = [f"candidate {label}" for label in LABELS[: len(labels)]]
    if not labels or labels != expected or any(len(found[tag]) > 1 for tag in labels):
        raise InputError(
            "expected a nanopersrm object, or messages with <candidate A> … </candidate A>, "
            f"then B, C, …; found {', '.join(labels) or 'neither'}"
        )
    questions = found.get("question", [])
    if len(questions) > 1:
        raise InputError(f"messages: expected at most one <question>, found {len(questions)}")
    return JudgeRequest(
        candidates=[found[tag][0] for tag in labels],
        exemplars=found.get("exemplar"),
        question=questions[0] if questions else None,
        principles=found.get("principle"),
    )


def reply_of(judgement: Judgement) -> str | None:
    """The reasoning and a digit for each candidate; None without a valid score for each."""
    if judgement.verdict == "invalid":
        return None
    line = []
    for label, score in zip(LABELS, judgement.scores, strict=False):
        if score is None:
            return None
        line.append(f"{label}={min(9, max(1, math.floor(score + 0.5)))}")
    thoughts: dict[tuple[int, ...], str] = {}
    for reply in judgement.replies:
        thoughts.setdefault(reply.candidates, reply.reasoning)  # the first sample
    many = len(judgement.scores) > 1
    said = [f"{_named(which)}: {text}" if many else text for which, text in thoughts.items()]
    return f"{OPEN}{_joined(said)}\n{CLOSE}\n{SCORES}{' '.join(line)}{SCORES_END}"


def reply_so_far(followed: dict[tuple[int, ...], tuple[str, bool]], many: bool) -> str:
    """The beginning of `reply_of` that is known while the candidates are reasoned about.

    followed: candidates -> (reasoning so far, ended). What begins side by side is shown one after
    the other, the first in the request first.
    """
    said = []
    for which, (text, ended) in sorted(followed.items()):
        said.append(f"{_named(which)}: {text}" if many else text)
        if not ended:
            break
    return OPEN + _joined(said) if (0,) in followed else ""


def _named(which: tuple[int, ...]) -> str:
    return " against ".join(LABELS[i] for i in which)


def _joined(said: list[str]) -> str:
    return "\n\n".join(said)


def completion(done: Done, model: str) -> dict[str, Any]:
    """OpenAI's chat.completion. The judgement must be valid."""
    text = reply_of(done.judgement)
    assert text is not None, "an invalid judgement has no reply"
    answer: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "nanopersrm": judge_reply(done),
    }
    if done.together == 1:  # of a shared call nobody knows whose tokens they were
        read, drawn = done.judgement.prompt_tokens, done.judgement.tokens
        answer["usage"] = {
            "prompt_tokens": read,
            "completion_tokens": drawn,
            "total_tokens": read + drawn,
        }
    return answer


def chunk(head: dict[str, Any], delta: dict[str, str], ended: bool = False) -> dict[str, Any]:
    """OpenAI's chat.completion.chunk. head: id, created and model, the same in all of a stream."""
    choice = {"index": 0, "delta": delta, "logprobs": None}
    finish = {"finish_reason": "stop" if ended else None}
    return head | {"object": "chat.completion.chunk", "choices": [choice | finish]}
