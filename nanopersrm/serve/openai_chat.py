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

`nanopersrm` is a body of POST /judge. Clients that can send nothing else put the texts in the
user's messages, in tags, and may name a writer that was put by the model `nanopersrm:ada`:

    <exemplar> … </exemplar>  <question> … </question>  <candidate A> … </candidate A>

The digits are rounded scores; the exact ones stand in the field `nanopersrm` of the completion.
temperature, seed and max_tokens (the budget of the reasoning) are heard, other settings are not.
"""

import math
import re
import time
import uuid
from typing import Any

from pydantic import BaseModel, StrictBool, StrictFloat, StrictInt

from nanopersrm import InputError
from nanopersrm.judge.judgement import Judgement
from nanopersrm.judge.verdict import CLOSE, LABELS, OPEN, SCORES, SCORES_END
from nanopersrm.serve.reward_fn import Message
from nanopersrm.serve.schemas import THINK_TOKENS, JudgeRequest, NotFound, judge_reply

MODEL = "nanopersrm"
TAG = re.compile(r"<(/?)(exemplar|principle|question|candidate [A-Z])>")
Reasoning = dict[tuple[int, ...], tuple[str, bool]]  # candidates -> (reasoning so far, ended)


class ChatRequest(BaseModel):
    """What is read of OpenAI's request."""

    messages: list[Message]
    model: str = MODEL
    nanopersrm: JudgeRequest | None = None
    temperature: StrictFloat | None = None
    seed: StrictInt | None = None
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = None
    n: StrictInt | None = None
    stream: StrictBool | None = None


def judge_request(body: ChatRequest) -> JudgeRequest:
    """What a chat asks of the judge. Raises InputError or NotFound."""
    model, _, writer = body.model.partition(":")
    if model != MODEL:
        raise NotFound(f"model: expected {MODEL} or {MODEL}:WRITER, got {body.model!r}")
    if body.n not in (None, 1):
        raise InputError(f"n: expected 1, got {body.n}")
    request = body.nanopersrm
    if request is None:
        request = from_tags("\n".join(m.text for m in body.messages if m.role == "user"))
    if request.stream:
        raise InputError("nanopersrm.stream: expected false; say stream beside messages")
    fields = request.model_dump(exclude_none=True)
    if writer and (request.exemplars is not None or fields.setdefault("writer", writer) != writer):
        raise InputError(f"model: {body.model!r} names a writer, and the request another")
    budget = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    chat = {"temperature": body.temperature, "seed": body.seed}
    if budget is not None:
        chat["think_tokens"] = min(budget, THINK_TOKENS)
    fields = {name: value for name, value in chat.items() if value is not None} | fields
    return JudgeRequest(**fields)


def from_tags(text: str) -> JudgeRequest:
    """The texts of a message that is written like a prompt of the judge's.

    >>> from_tags("<exemplar>So.</exemplar> <candidate A>No.</candidate A>").candidates
    ['No.']
    """
    tagged: dict[str, list[str]] = {}
    ends = {match[0]: match.start() for match in TAG.finditer(text)}  # the last of each tag
    begin = 0
    while match := TAG.search(text, begin):
        begin, close = match.end(), f"</{match[2]}>"
        if not match[1] and ends.get(close, 0) >= begin:
            end = text.index(close, begin)
            tagged.setdefault(match[2], []).append(text[begin:end].strip())
            begin = end + len(close)
    tags = [tag for tag in tagged if tag.startswith("candidate ")]
    expected = [f"candidate {label}" for label in LABELS[: len(tags)]]
    if not tags or tags != expected or any(len(tagged[tag]) > 1 for tag in tags):
        raise InputError(
            "expected a nanopersrm object, or messages with <candidate A> … </candidate A>, "
            f"then B, C, …; got {', '.join(tags) or 'neither'}"
        )
    questions = tagged.get("question", [])
    if len(questions) > 1:
        raise InputError(f"messages: expected at most one <question>, got {len(questions)}")
    return JudgeRequest(
        candidates=[tagged[tag][0] for tag in tags],
        exemplars=tagged.get("exemplar"),
        question=questions[0] if questions else None,
        principles=tagged.get("principle"),
    )


def reply_text(judgement: Judgement) -> str | None:
    """The reasoning and a digit for each candidate; None without a valid score for each."""
    scores = judgement.scores
    if judgement.verdict == "invalid" or None in scores:
        return None
    digits = [min(9, max(1, math.floor((score or 0) + 0.5))) for score in scores]
    line = " ".join(f"{label}={digit}" for label, digit in zip(LABELS, digits, strict=False))
    first: Reasoning = {}  # sample of each prompt
    for reply in judgement.replies:
        first.setdefault(reply.candidates, (reply.reasoning, True))
    reasoning = reply_so_far(first, len(scores) > 1)
    return f"{reasoning}\n{CLOSE}\n{SCORES}{line}{SCORES_END}"


def reply_so_far(reasoning: Reasoning, many: bool) -> str:
    """The beginning of `reply_text` that is known while the candidates are reasoned about. What
    begins side by side is shown one after the other, the first in the request first."""
    if not reasoning or min(reasoning)[0] != 0:
        return ""
    shown = []
    for which, (text, ended) in sorted(reasoning.items()):
        label = " against ".join(LABELS[i] for i in which)
        shown.append(f"{label}: {text}" if many else text)
        if not ended:
            break
    return OPEN + "\n\n".join(shown)


def head(kind: str, model: str) -> dict[str, Any]:
    """The same in all chunks of a stream."""
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def completion(judgement: Judgement, model: str) -> dict[str, Any] | None:
    """OpenAI's chat.completion; None for an invalid judgement."""
    text = reply_text(judgement)
    if text is None:
        return None
    read, drawn = judgement.prompt_tokens, judgement.tokens
    usage = {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    reply = head("chat.completion", model) | {"choices": [choice], "usage": usage}
    return reply | {"nanopersrm": judge_reply(judgement)}


def chunk(head: dict[str, Any], delta: dict[str, str], ended: bool = False) -> dict[str, Any]:
    """OpenAI's chat.completion.chunk."""
    finish = "stop" if ended else None
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return head | {"choices": [choice]}
