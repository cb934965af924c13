"""The judge behind OpenAI's chat completions, so that what can call a chat model can call it.

    client.chat.completions.create(
        model="nanopersrm",
        messages=[{"role": "user", "content": "judge"}],
        extra_body={"nanopersrm": {"exemplars": ["…"], "candidates": ["…", "…"]}},
    )
    ->  <think> A: It reads like the writer (+6.1). …  B: … </think> <scores>A=7 B=3</scores>

`nanopersrm` is a body of POST /judge. Clients that can send nothing else put the texts in the
user's messages, in tags, and may name a writer that was put by the model `nanopersrm:ada`:

    <exemplar> … </exemplar>  <question> … </question>  <candidate A> … </candidate A>

The digits are rounded scores; the exact ones stand in the completion's field `nanopersrm`. Of the
settings temperature, seed and, for free prose, max_tokens (its budget) count.
"""

import math
import re
import time
import uuid
from typing import Any

from pydantic import BaseModel, StrictBool, StrictInt
from starlette.exceptions import HTTPException

from nanopersrm import InputError
from nanopersrm.judge.judgement import Judgement
from nanopersrm.judge.verdict import CLOSE, LABELS, OPEN, SCORES, SCORES_END
from nanopersrm.serve.reward_fn import Message
from nanopersrm.serve.schemas import NO_SCORE, THINK_TOKENS, JudgeRequest, judge_reply

MODEL = "nanopersrm"
TAG = re.compile(r"<(/?)(exemplar|principle|question|candidate [A-Z])>")
Reasoning = dict[tuple[int, ...], tuple[str, bool]]  # candidates -> (reasoning so far, ended)


class ChatRequest(BaseModel):
    """What is read of OpenAI's request."""

    messages: list[Message]
    model: str = MODEL
    nanopersrm: dict[str, Any] | None = None
    temperature: float | None = None
    seed: StrictInt | None = None
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = None
    n: StrictInt | None = None
    stream: StrictBool | None = None


def judge_request(body: ChatRequest) -> JudgeRequest:
    """What a chat asks of the judge. Raises ValidationError, InputError, or HTTPException (404)."""
    model, _, writer = body.model.partition(":")
    if model != MODEL:
        raise HTTPException(404, f"model: expected {MODEL} or {MODEL}:WRITER, got {body.model!r}")
    if body.n not in (None, 1):
        raise InputError(f"n: expected 1, got {body.n}")
    fields = body.nanopersrm
    if fields is None:
        fields = from_tags("\n".join(m.text for m in body.messages if m.role == "user"))
    budget = body.max_completion_tokens or body.max_tokens
    chat = {"temperature": body.temperature, "seed": body.seed, "writer": writer or None}
    chat |= {"think_tokens": budget and min(budget, THINK_TOKENS)}
    return JudgeRequest.model_validate(chat | fields)


def from_tags(text: str) -> dict[str, Any]:
    """The texts of a message that is written like a prompt of the judge's.

    >>> from_tags("<exemplar>So.</exemplar> <candidate A>No.</candidate A>")["candidates"]
    ['No.']
    """
    tagged: dict[str, list[str]] = {}
    tag, begin = "", 0  # that is open
    for match in TAG.finditer(text):
        if not tag and not match[1]:
            tag, begin = match[2], match.end()
        elif match[1] and match[2] == tag:
            tagged.setdefault(tag, []).append(text[begin : match.start()].strip())
            tag = ""
    tags = [name for name in tagged if name.startswith("candidate ")]
    expected = [f"candidate {label}" for label in LABELS[: len(tags)]]
    single = all(len(tagged[name]) == 1 for name in tagged if name in ("question", *tags))
    if tag or not tags or tags != expected or not single:
        raise InputError(
            "expected a nanopersrm object, or messages with <candidate A> … </candidate A>, then "
            "B, C, …, and at most one question"
        )
    fields: dict[str, Any] = {"candidates": [tagged[tag][0] for tag in tags]}
    fields |= {f"{tag}s": tagged[tag] for tag in ("exemplar", "principle") if tag in tagged}
    return fields | {"question": tagged["question"][0]} if "question" in tagged else fields


def reply_text(judgement: Judgement) -> str:
    """The reasoning and a digit for each candidate. HTTPException without a score for each."""
    scores = [score for score in judgement.scores if score is not None]
    if judgement.verdict == "invalid" or len(scores) < len(judgement.scores):
        raise HTTPException(500, NO_SCORE)
    digits = [min(9, max(1, math.floor(score + 0.5))) for score in scores]
    line = " ".join(f"{label}={digit}" for label, digit in zip(LABELS, digits, strict=False))
    first: Reasoning = {}  # sample of each prompt
    for reply in judgement.replies:
        first.setdefault(reply.candidates, (reply.reasoning, True))
    reasoning = reply_so_far(first, len(scores) > 1)
    return f"{reasoning}\n{CLOSE}\n{SCORES}{line}{SCORES_END}"


def reply_so_far(reasoning: Reasoning, many: bool) -> str:
    """The beginning of `reply_text` that is known while the candidates are reasoned about side by
    side: whole, one after the other, in the order of the request."""
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


def completion(judgement: Judgement, model: str) -> dict[str, Any]:
    """OpenAI's chat.completion."""
    read, drawn = judgement.prompt_tokens, judgement.tokens
    usage = {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}
    message = {"role": "assistant", "content": reply_text(judgement)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    more = {"choices": [choice], "usage": usage, "nanopersrm": judge_reply(judgement)}
    return head("chat.completion", model) | more


def chunk(head: dict[str, Any], delta: dict[str, str], ended: bool = False) -> dict[str, Any]:
    """OpenAI's chat.completion.chunk."""
    choice = {"index": 0, "delta": delta, "logprobs": None}
    return head | {"choices": [choice | {"finish_reason": "stop" if ended else None}]}
