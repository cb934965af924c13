"""The judge for those who call with one completion, verl and OpenRLHF, and TRL's former judges.

verl (0.9.1) loads a function from a file and calls it by name, in threads or, if it is a coroutine,
in its event loop. The data set's `extra_info` carries the writer's texts, what was asked and what
the writer wants (`principles`, in place of those given here):

    judge = Judge.load(adapter="runs/mine/adapter")      # reward.custom_reward_function.path: this
    compute_score = verl_score(judge)                    # file; .name: compute_score
    extra_info = {"exemplars": ["…", "…"], "question": "…"}      # the first alone is enough

OpenRLHF (0.11.2) loads `reward_func` from the file that `--reward.remote_url` names and calls it in
threads. A query is prompt and reply as one text; the label is a text of the writer, a list of such
texts, or an object as `extra_info` above, itself or as JSON in a text (`label.py`):

    reward_func = openrlhf_reward(judge)

TRL had judges with a method `judge(prompts, completions, shuffle_order)` up to 1.0.0, for its
trainers Online DPO, Nash-MD and XPO; 1.16.0 has none. Ours need no class of theirs:

    trainer = OnlineDPOTrainer(policy, judge=pairwise_judge(judge, texts_of_the_writer), …)

What we chose. Rewards are those of `reward.py`; an empty completion gets the lowest. verl and
OpenRLHF know no None: what the judge could not read or score is an error, unless you say with
`unjudged` which number stands for it. (verl's reward loop `rate_limited` makes 0 of an error, which
is a fair score there: give `unjudged` with it.) Calls wait for each other, one at a time, and
exemplars that come again soon are not computed again. verl's coroutine waits in a thread of its
own, so that the threads that verl decodes with stay free.

What we left out. One completion at a time has no others: no relative scale, no pairwise mode.
Order is nothing to a judge that gives swapped calls mirrored answers: `shuffle_order` is ignored.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig, Judgement, check
from nanopersrm.serve.label import Label, fields_of, label_of, question_of
from nanopersrm.serve.reward_fn import (
    ENDS,
    NAME,
    Completion,
    Judges,
    Scale,
    check_scale,
    completion_text,
    end_of_prompt,
    question_text,
    rewards,
    texts_of,
    without_ends,
)

FAILED = -1  # what TRL's pairwise judges say of a pair without a verdict


def verl_score(
    judge: Judges,
    exemplars: Sequence[str] | str | None = None,
    *,
    scale: Scale = "unit",
    principles: Sequence[str] = (),
    config: JudgeConfig | None = None,
    unjudged: float | None = None,
) -> Callable[..., float]:
    """verl's `compute_score`. exemplars: of every completion; None: those in `extra_info`.

    Other fields of `extra_info` are for others. With exemplars, its own are not read, and
    principles of its own are an InputError.
    """
    _check_alone(scale, config, unjudged)
    fixed = None if exemplars is None else texts_of(exemplars, "exemplars")

    def compute_score(
        data_source: Any,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> float:
        if not isinstance(extra_info, Mapping | None):
            raise InputError(f"extra_info: expected an object, got {type(extra_info).__name__}")
        row = _carried(extra_info or {}, fixed, solution_str, "extra_info", fields_of)
        return _number(rewards(judge, [row], scale, principles, config)[0], unjudged)

    return compute_score


def verl_score_async(judge: Judges, *exemplars: Any, **settings: Any) -> Callable[..., Any]:
    """The same as a coroutine; arguments as in `verl_score`."""
    score = verl_score(judge, *exemplars, **settings)
    thread = ThreadPoolExecutor(1, "judge")

    async def compute_score(
        data_source: Any,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> float:
        loop, given = asyncio.get_running_loop(), (data_source, solution_str, ground_truth)
        found: Awaitable[float] = loop.run_in_executor(thread, score, *given, extra_info)
        return await found

    return compute_score


def openrlhf_reward(
    judge: Judges,
    exemplars: Sequence[str] | str | None = None,
    *,
    principles: Sequence[str] = (),
    config: JudgeConfig | None = None,
    unjudged: float | None = None,
    ends: Sequence[str] = ENDS,
) -> Callable[..., dict[str, Any]]:
    """OpenRLHF's `reward_func`, from 0 to 1. exemplars: of all replies; None: those in the labels.

    With exemplars, no more is read of a label than the question of an object; its principles are
    an InputError. Names of writers are known to the server alone (`remote.py`).
    ends: what is cut off the end of a reply, any number of times.
    """
    _check_alone("unit", config, unjudged)
    fixed = None if exemplars is None else texts_of(exemplars, "exemplars")

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any
    ) -> dict[str, Any]:
        if not len(queries) == len(prompts) == len(labels):
            raise InputError(
                "expected as many queries as prompts and labels, got "
                f"{len(queries)}, {len(prompts)} and {len(labels)}"
            )
        rows = []
        for i, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True)):
            reply = _reply(query, prompt, ends, f"queries[{i}]")
            rows.append(_carried(label, fixed, reply, f"labels[{i}]"))
        found = rewards(judge, rows, "unit", principles, config)
        worth = torch.tensor([_number(reward, unjudged) for reward in found])  # (B,)
        return {"rewards": worth, "scores": worth, "extra_logs": {NAME: worth}}

    return reward_func


@dataclass(frozen=True)
class PairwiseJudge:
    """TRL's pairwise judge: which of two completions fits the writer better.

    By the preference alone, so that index and probability agree: P(first fits better) = 0.6 is the
    first, also where the second has the better score, as digits far apart can have it.
    """

    of: Judges
    exemplars: tuple[str, ...]
    question: bool  # the prompts are shown
    principles: Sequence[str]
    config: JudgeConfig

    def judge(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        shuffle_order: bool = True,
        return_scores: bool = False,
    ) -> list[int] | list[float]:
        """The index of the better one, -1 for no verdict, 0 for a tie; `return_scores`: the
        probability that it is the first, NaN for no verdict."""
        indices, scores = [], []
        for prompt, texts in _asked(prompts, completions, self.question):
            if len(texts) != 2:
                raise InputError(f"completions: expected pairs, got {len(texts)}")
            empty = [not text.strip() for text in texts]
            found = None if any(empty) else _judged(self, texts, prompt)
            if any(empty):
                first = 0.5 + (empty[1] - empty[0]) / 2
            elif found is None or found.verdict == "invalid":
                first = math.nan
            else:
                first = found.preference[0][1]
            indices.append(FAILED if math.isnan(first) else int(first < 0.5))
            scores.append(first)
        return scores if return_scores else indices


@dataclass(frozen=True)
class RankJudge:
    """TRL's rank judge: the indices of the completions of each prompt, best first."""

    of: Judges
    exemplars: tuple[str, ...]
    question: bool  # the prompts are shown
    principles: Sequence[str]
    config: JudgeConfig

    def judge(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        shuffle_order: bool = True,
    ) -> list[list[int]]:
        """[1, 2, 0]: the second is the best; empty ones come last. An InputError where there is
        no verdict, because a rank has no word for it."""
        ranks = []
        for number, (prompt, texts) in enumerate(_asked(prompts, completions, self.question)):
            written = [i for i, text in enumerate(texts) if text.strip()]
            order = list(range(len(written)))
            if len(written) > 1:
                found = _judged(self, [texts[i] for i in written], prompt)
                if found is None or found.verdict == "invalid":
                    raise InputError(f"completions[{number}]: the judge could not rank these")
                order = found.ranking
            ranks.append([written[i] for i in order] + sorted({*range(len(texts))} - {*written}))
        return ranks


def pairwise_judge(
    judge: Judges,
    exemplars: Sequence[str] | str,
    *,
    question: bool = True,
    principles: Sequence[str] = (),
    config: JudgeConfig | None = None,
) -> PairwiseJudge:
    """For TRL's `judge=`. question: show the prompt as what the completions answer."""
    texts = texts_of(exemplars, "exemplars")
    return PairwiseJudge(judge, texts, question, tuple(principles), config or JudgeConfig())


def rank_judge(
    judge: Judges,
    exemplars: Sequence[str] | str,
    *,
    question: bool = True,
    principles: Sequence[str] = (),
    config: JudgeConfig | None = None,
) -> RankJudge:
    """The same for any number of completions up to 26."""
    texts = texts_of(exemplars, "exemplars")
    return RankJudge(judge, texts, question, tuple(principles), config or JudgeConfig())


def _asked(
    prompts: Sequence[Any], completions: Sequence[Sequence[Any]], question: bool
) -> Iterator[tuple[str | None, list[str]]]:
    """Question and texts, prompt by prompt."""
    if len(prompts) != len(completions):
        got = f"{len(prompts)} and {len(completions)}"
        raise InputError(f"expected as many prompts as lists of completions, got {got}")
    for i, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        if isinstance(group, str) or not isinstance(group, Sequence):
            got = type(group).__name__
            raise InputError(f"completions[{i}]: expected a list of completions, got {got}")
        texts = [completion_text(one, f"completions[{i}][{k}]") for k, one in enumerate(group)]
        yield question_text(prompt, f"prompts[{i}]") if question else None, texts


def _judged(
    asks: PairwiseJudge | RankJudge, texts: Sequence[str], question: str | None
) -> Judgement | None:
    """None: these are too long for the judge's context."""
    check(asks.exemplars, texts, asks.config, question, asks.principles)
    try:
        with asks.of.lock:
            return asks.of.judge(asks.exemplars, texts, question, asks.principles, asks.config)
    except InputError:  # all else was checked above
        return None


def _check_alone(scale: Scale, config: JudgeConfig | None, unjudged: float | None) -> None:
    """What cannot be said of one completion is refused before training starts."""
    check_scale(scale)
    if scale == "relative":
        raise InputError("scale: expected unit or soft, one completion alone is relative to none")
    if config is not None and config.mode == "pairwise":
        raise InputError("mode: expected pointwise, one completion alone makes no pair")
    if unjudged is not None and not math.isfinite(unjudged):
        raise InputError(f"unjudged: expected a finite number, got {unjudged}")


def _carried(
    label: Any,
    fixed: tuple[str, ...] | None,
    text: Any,
    place: str,
    read: Callable[[Any, str], Label] = label_of,
) -> Completion:
    """A completion with what its row of the data set says."""
    if not isinstance(text, str):
        raise InputError(f"expected the completion as a text, got {type(text).__name__}")
    if fixed is not None:
        return Completion(fixed, question_of(label, place), text)
    found = read(label, place)
    if found.exemplars is None:
        there = ", ".join(map(str, label if isinstance(label, Mapping) else found.said()))
        raise InputError(
            f"{place}: expected the field exemplars, texts of the writer, got {there or 'nothing'}"
        )
    return Completion(found.exemplars, found.question, text, found.principles)


def _reply(query: Any, prompt: Any, ends: Sequence[str], place: str) -> str:
    """What comes after the prompt, without the tokens that end it."""
    if not isinstance(query, str) or not isinstance(prompt, str):
        raise InputError(f"{place}: expected texts, got {type(query).__name__}")
    begin = end_of_prompt(prompt, query)
    if begin is None:
        raise InputError(f"{place}: expected the prompt and a reply, found another text")
    return without_ends(query[begin:], ends)


def _number(reward: float | None, unjudged: float | None) -> float:
    """For callers that know no None."""
    if reward is not None:
        return reward
    if unjudged is None:
        raise InputError(
            "the judge gave this completion no score (too long for its context?); "
            "unjudged=… says which number stands for that"
        )
    return unjudged
