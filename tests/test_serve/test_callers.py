"""verl, OpenRLHF and TRL's judges, against contracts recorded from their packages.

What verl 0.9.1 and OpenRLHF 0.11.2 do with a reward function is written down here in a few lines,
by the names it has there, so that these tests need neither; `test_callers_peers.py` runs the
packages themselves. TRL 1.0.0 is the last release with judges. TRL 1.16 itself is in
`test_reward_trl.py`.
"""

import asyncio
import inspect
import math
import threading
from functools import partial
from typing import Any, cast

import pytest
import torch
from test_reward import LONG, OTHER, WRITER, Array, Rule

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.serve.callers import (
    openrlhf_reward,
    pairwise_judge,
    rank_judge,
    verl_score,
    verl_score_async,
)

# verl 0.9.1


async def verl_reward(compute_score: Any, response: str, extra_info: Any) -> float:
    """verl.experimental.reward_loop.reward_manager.naive, NaiveRewardManager.run_single; the
    function wrapped as verl.trainer.ppo.reward.get_custom_reward_fn does."""

    def call(raw: Any, extra: dict[str, Any], **named: Any) -> Any:
        return raw(**{**named, **extra})

    async def call_async(raw: Any, extra: dict[str, Any], **named: Any) -> Any:
        return await raw(**{**named, **extra})

    is_async = inspect.iscoroutinefunction(compute_score)
    wrapped = partial(call_async if is_async else call, compute_score, {})
    extra_info["num_turns"], extra_info["rollout_reward_scores"] = None, {}
    given = {"data_source": "letters", "solution_str": response, "ground_truth": ""}
    given |= {"extra_info": extra_info, "reward_router_address": "here"}
    if inspect.iscoroutinefunction(wrapped):
        result = await wrapped(**given)
    else:
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(None, lambda: wrapped(**given))
    score = result["score"] if isinstance(result, dict) else result
    return float(torch.zeros(1).new_tensor([score])[0])  # RewardManagerBase.assemble_rm_scores


@pytest.mark.parametrize("make", [verl_score, verl_score_async])
def test_verl(make: Any):
    judge = Rule()
    score = make(judge)
    assert inspect.iscoroutinefunction(score) == (make is verl_score_async)

    async def batch() -> list[float]:
        rows: list[tuple[str, Any]] = []
        rows += [("is a 7", {"exemplars": list(WRITER), "question": "Why?"})]
        rows += [("is a 3", {"exemplars": Array(*WRITER)}), ("", {"exemplars": OTHER[0]})]
        rows += [(f"is a {k % 9 + 1}", {"exemplars": OTHER}) for k in range(40)]
        return await asyncio.gather(*(verl_reward(score, *row) for row in rows))

    found = asyncio.run(batch())
    assert found == [0.75, 0.25, 0] + [k % 9 / 8 for k in range(40)]
    assert len(judge.calls) == 42
    assert (WRITER, ["is a 7"], "Why?") in judge.calls
    assert (WRITER, ["is a 3"], None) in judge.calls
    assert all(judge.held)


def test_verl_waits_in_one_thread_of_its_own():
    judge = Rule()
    seen = []
    lock = judge.lock

    class Noting(Rule):
        def judge(self, *given: Any) -> Any:
            seen.append(threading.current_thread().name)
            return judge.judge(*given)

    score = verl_score_async(Noting(lock), WRITER)

    async def both() -> list[float]:
        return await asyncio.gather(*(score("", f"a {k}", "") for k in (1, 9)))

    assert asyncio.run(both()) == [0, 1]
    assert asyncio.run(both()) == [0, 1]  # another event loop
    assert set(seen) == {"judge_0"}


def test_verl_settings():
    assert verl_score(Rule(), WRITER, scale="soft")("", "is a 7", "") == 7
    assert verl_score(Rule(), "One text.")("", "is a 7", "", {"exemplars": OTHER}) == 0.75
    assert verl_score(Rule(), WRITER, unjudged=-1)("", LONG, "", None) == -1
    assert verl_score(Rule(), WRITER, unjudged=-1)("", "what?", "") == -1
    for make in (verl_score, verl_score_async, openrlhf_reward):
        with pytest.raises(InputError, match="unjudged: expected a finite number, got nan"):
            make(Rule(), unjudged=math.nan)
        with pytest.raises(InputError, match="mode: expected pointwise"):
            make(Rule(), config=JudgeConfig(mode="pairwise"))
    with pytest.raises(InputError, match="scale: expected unit or soft"):
        verl_score(Rule(), scale="relative")
    with pytest.raises(InputError, match="scale: expected unit, soft, rel"):
        verl_score(Rule(), scale=cast(Any, "digits"))


@pytest.mark.parametrize(
    ("text", "extra_info", "part"),
    [
        ("x", None, "extra_info: expected the field exemplars, texts of the writer, got nothing"),
        ("x", {"index": 1, "split": "train"}, "got index, split"),
        ("x", {"exemplars": None}, "expected the field exemplars"),
        ("x", {"exemplars": []}, "extra_info, field exemplars: expected a text or a list"),
        ("x", {"exemplars": [7]}, "extra_info, field exemplars, text 1: expected some text"),
        ("x", {"exemplars": "a", "question": 7}, "extra_info, field question: expected a text"),
        ("x", "exemplars", "extra_info: expected an object, got str"),
        (None, {"exemplars": "a"}, "expected the completion as a text, got NoneType"),
        (LONG, {"exemplars": "a"}, "the judge gave this completion no score"),
        ("what?", {"exemplars": "a"}, "the judge gave this completion no score"),
    ],
)
def test_verl_refuses(text: Any, extra_info: Any, part: str):
    with pytest.raises(InputError, match=part):
        verl_score(Rule())("letters", text, "", extra_info)
    with pytest.raises(InputError, match=part):
        asyncio.run(verl_score_async(Rule())("letters", text, "", extra_info))


# OpenRLHF 0.11.2

PROMPT = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


async def openrlhf_sample(reward_func: Any, query: str, prompt: str, label: Any) -> Any:
    """openrlhf.utils.agent, SingleTurnAgentExecutor._fetch_rewards_via_func, and what
    openrlhf.trainer.ppo_utils.samples_generator makes of it."""
    info = await asyncio.to_thread(reward_func, [query], [prompt], [label])
    reward, scores = info.get("rewards"), info.get("scores")
    logs = {k: torch.tensor([v.flatten()[0].item()]) for k, v in info["extra_logs"].items()}
    return torch.tensor([reward]), torch.tensor([scores]), logs


def test_openrlhf():
    judge = Rule()
    reward_func = openrlhf_reward(judge)

    async def batch() -> list[Any]:
        rows: list[tuple[str, str, Any]] = [
            (PROMPT + "is a 7<|im_end|>", PROMPT, list(WRITER)),
            ("<s>" + PROMPT + f"{PROMPT}is a 3</s></s>\n", PROMPT, OTHER[0]),
            (PROMPT + "<|im_end|>", PROMPT, {"exemplars": WRITER, "question": "Why?"}),
            (PROMPT + "is a 9", PROMPT, {"exemplars": WRITER, "question": "Why?"}),
            ("is a 1", "", WRITER),
        ]
        return await asyncio.gather(*(openrlhf_sample(reward_func, *row) for row in rows))

    found = asyncio.run(batch())
    assert [reward.shape for reward, _, _ in found] == [(1,)] * 5
    assert torch.cat([reward for reward, _, _ in found]).tolist() == [0.75, 0.25, 0, 1, 0]
    for reward, scores, logs in found:
        assert reward.dtype == torch.float32
        assert torch.equal(reward, scores)
        assert logs == {"fits_writer": reward}
    assert sorted(judge.calls) == [
        (WRITER, ["is a 1"], None),
        (WRITER, ["is a 7"], None),
        (WRITER, ["is a 9"], "Why?"),
        (OTHER, [f"{PROMPT}is a 3"], None),
    ]


def test_openrlhf_in_one_call():
    judge = Rule()
    queries = [PROMPT + text for text in ("is a 7", "", "is a 3")]
    found = openrlhf_reward(judge, WRITER)(queries, [PROMPT] * 3, [""] * 3, datasources=["x"] * 3)
    assert found["rewards"].tolist() == [0.75, 0, 0.25]
    assert len(judge.calls) == 1


def test_openrlhf_refuses():
    reward_func = openrlhf_reward(Rule())
    for given, part in (
        ((["ab"], ["a"], [""]), r"labels\[0\]: expected the field exemplars.*got nothing"),
        ((["ab"], ["a"], [None]), r"labels\[0\]: expected the field exemplars"),
        (
            (["ab"], ["a"], [{"text": "x"}]),
            r"labels\[0\]: expected the fields exemplars.*got 'text'",
        ),
        ((["ab"], ["c"], ["x"]), r"queries\[0\]: expected the prompt and a reply, found another"),
        ((["ab"], [["a"]], ["x"]), r"queries\[0\]: expected texts"),
        ((["ab"], ["a"], []), "expected as many queries as prompts and labels, got 1, 1 and 0"),
        ((["a" + LONG], ["a"], ["x"]), "the judge gave this completion no score"),
    ):
        with pytest.raises(InputError, match=part):
            reward_func(*given)
    found = openrlhf_reward(Rule(), unjudged=0.5)(["a" + LONG], ["a"], ["x"])
    assert found["rewards"].tolist() == [0.5]


# TRL 1.0.0: trl.experimental.judges


def test_pairwise_judge():
    """As online_dpo_trainer and nash_md_trainer call it: tuples of completions."""
    judge = Rule()
    trl = pairwise_judge(judge, WRITER)
    prompts = [f"{k}?" for k in range(8)]
    firsts = ["a 7", "a 3", "same 5", "", "text", "", LONG, "what?"]
    seconds = ["a 3", "a 7", "same 5", "text", " ", "\n", "text", "text"]
    pairs = list(zip(firsts, seconds, strict=True))
    assert trl.judge(prompts, pairs) == [0, 1, 0, 1, 0, 0, -1, -1]
    assert trl.judge(prompts, pairs, shuffle_order=False) == [0, 1, 0, 1, 0, 0, -1, -1]
    scores = trl.judge(prompts, pairs, return_scores=True)
    assert scores[:6] == [0.75, 0.25, 0.5, 0, 1, 0.5]
    assert all(math.isnan(score) for score in scores[6:])
    assert judge.calls[0] == (WRITER, ["a 7", "a 3"], "0?")
    pairwise_judge(judge, WRITER, question=False).judge(["Why?"], [("a", "b")])
    assert judge.calls[-1] == (WRITER, ["a", "b"], None)
    assert all(judge.held)
    with pytest.raises(InputError, match="expected pairs, got 3"):
        trl.judge(["Why?"], [["a", "b", "c"]])
    with pytest.raises(InputError, match="expected as many prompts"):
        trl.judge(["Why?", "How?"], [["a", "b"]])
    with pytest.raises(InputError, match=r"completions\[0\]: expected a list of completions"):
        trl.judge(["Why?"], ["ab"])


def test_rank_judge():
    trl = rank_judge(Rule(), WRITER)
    groups = [["a 3", "a 9", "a 7"], ["", "a 3", " ", "a 5"], ["alone"], ["", ""]]
    assert trl.judge(["Why?"] * 4, groups) == [[1, 2, 0], [3, 1, 0, 2], [0], [0, 1]]
    said = [[{"role": "assistant", "content": text}] for text in ("a 1", "a 2")]
    assert trl.judge([[{"role": "user", "content": "Why?"}]], [said]) == [[1, 0]]
    for group in (["a", "what?"], ["a", LONG]):
        with pytest.raises(InputError, match=r"completions\[1\]: the judge could not rank these"):
            trl.judge(["Why?"] * 2, [["a", "b"], group])
    with pytest.raises(InputError, match="expected 1 to 26 candidates"):
        trl.judge(["Why?"], [[f"text {k}" for k in range(27)]])
    with pytest.raises(InputError, match="exemplars: expected a text or a list"):
        rank_judge(Rule(), [])
