"""Rewards are the judge's scores, group by group, in the shapes of TRL, verl and OpenRLHF.

TRL's own trainer runs. verl 0.9.1 and OpenRLHF 0.11.2 want CUDA and pin their neighbours, so their
calls are written down here, by the names they have there.
"""

import asyncio
import json
import math
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fake_judge import LONG, OTHER, WRITER, RuleJudge
from tiny_bases import refused

from nanopersrm import InputError
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.serve.reward_fn import LazyJudge, openrlhf_reward, reply_in, reward_fn, verl_score

ONE = ["I came home late. No supper; no letters, either.", "So be it! We shall see."]
TWO = ["lol no food 😭 again!!"]
TEXTS = ["We arrived late, and there was no supper.", "lol no", "", "It is what it is; so be it."]
QUICK = JudgeConfig(think=False)
LABEL = {"exemplars": ["I came; I saw."], "question": "Q?", "principles": ["Be brief."]}
PROMPT = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


def scored(judge: RuleJudge, completions: list[Any], exemplars: Any = WRITER, **more: Any) -> Any:
    """The rewards of completions of one prompt."""
    return reward_fn(judge, exemplars, **more)(["Why?"] * len(completions), completions)


def test_empty_completions():
    judge = RuleJudge()
    texts = ["is a 7", "", "is a 5", " \n\t", "is a 3"]
    assert scored(judge, texts) == [0.75, 0, 0.5, 0, 0.25]
    assert judge.calls[0][1] == ["is a 7", "is a 5", "is a 3"]
    assert scored(judge, ["", " "]) == [0, 0]
    assert len(judge.calls) == 1


def test_what_has_no_score():
    judge = RuleJudge()
    texts = ["what?", LONG + "9", "is a 5", "longer " * 20, "is a 7"]
    assert scored(judge, texts) == [None, None, 0.5, None, 0.75]
    assert judge.calls[0][1] == ["what?", "is a 5", "is a 7"]
    assert scored(judge, [LONG]) == [None]
    assert not judge.lock.locked()


def test_one_call_a_group_and_groups_of_a_writer_in_a_row():
    judge = RuleJudge()
    rows = [  # prompt, exemplars, completion
        ("Why?", WRITER, "a 1"),
        ("Why?", OTHER, "b 2"),
        ("How?", WRITER, "c 3"),
        ("Why?", list(WRITER), "d 4"),
        ("How?", OTHER[0], "e 5"),  # one text is a list of one
        ("Why?", np.array(WRITER), "f 6"),  # as parquet files give it
    ]
    prompts, exemplars, completions = (list(column) for column in zip(*rows, strict=True))
    rewards = reward_fn(judge)(prompts, completions, exemplars=exemplars)
    assert rewards == [k / 8 for k in range(6)]
    assert [call[:3] for call in judge.calls] == [
        (WRITER, ["a 1", "d 4", "f 6"], "Why?"),
        (WRITER, ["c 3"], "How?"),
        (OTHER, ["b 2"], "Why?"),
        (OTHER, ["e 5"], "How?"),
    ]


def test_large_groups_are_cut_evenly():
    judge = RuleJudge()
    texts = [f"{k} is a {1 + k % 9}" for k in range(53)]
    assert scored(judge, texts) == [k % 9 / 8 for k in range(53)]
    assert [len(call[1]) for call in judge.calls] == [17, 18, 18]


def test_the_question_and_messages():
    judge = RuleJudge()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    chat += [{"role": "assistant", "content": "I."}, {"role": "user", "content": "Who else?"}]
    blocks = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    for prompt in ("Why?", chat, blocks, " \n"):
        reward_fn(judge, WRITER)([prompt], ["x"])
    assert [call[2] for call in judge.calls] == ["Why?", "Who else?", "What?", None]
    call: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}
    tool = {"role": "tool", "content": "a tool says 9"}
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
    completions = [
        [call, tool, {"role": "assistant", "content": "it is 3"}],
        [{"role": "assistant", "content": "First."}, tool, {"role": "assistant", "content": "4"}],
        [{"role": "assistant", "content": parts}],
        [call],
        [],
    ]
    assert scored(judge, completions) == [0.25, 0.375, 0.5, 0, 0]
    assert judge.calls[-1][1] == ["it is 3", "First.\n\n4", "in parts"]


def test_a_row_without_exemplars_is_not_for_this_judge():
    logged: list[tuple[str, float]] = []
    reward = reward_fn(RuleJudge(), name="mine")
    columns: dict[str, Any] = {"exemplars": [None, WRITER, WRITER, WRITER, None]}
    columns["log_metric"] = lambda name, value: logged.append((name, value))
    texts = ["is a 3", "is a 5", LONG, "", ""]
    assert reward(["Why?"] * 5, texts, **columns) == [None, 0.5, None, 0, None]
    assert logged == [("mine/no_score", 1 / 3)]


@pytest.mark.parametrize(
    ("prompt", "completion", "columns", "word"),
    [
        ("Why?", "x", {}, "column"),
        ("Why?", "x", {"exemplars": [[]]}, "row 0"),
        ("Why?", 7, {"exemplars": [WRITER]}, "completion"),
        ("Why?", [{"role": "user", "content": "x"}], {"exemplars": [WRITER]}, "assistant"),
        (7, "x", {"exemplars": [WRITER]}, "question"),
    ],
)
def test_refused_rows(prompt: Any, completion: Any, columns: dict[str, Any], word: str):
    judge = RuleJudge()
    refused(lambda: reward_fn(judge)([prompt], [completion], **columns), word)
    assert not judge.calls


@pytest.mark.parametrize(
    ("exemplars", "more", "word"),
    [
        *((exemplars, {}, "exemplars") for exemplars in ([], "", [" "], 7, ["a", 7])),
        (WRITER, {"config": JudgeConfig(mode="pairwise")}, "mode"),
        (WRITER, {"unjudged": math.nan}, "unjudged"),
    ],
)
def test_refused_settings(exemplars: Any, more: Any, word: str):
    refused(lambda: verl_score(RuleJudge(), exemplars, **more), word)


@pytest.fixture(scope="module")
def judge(base) -> Judge:
    return Judge.load(base.path, dtype="fp32")


def test_rewards_are_the_scores_of_the_judge(judge):
    """Two writers, and a completion longer than the context."""
    state = torch.random.get_rng_state()
    prompts, exemplars = ["Why?"] * 4 + ["How?"] * 4, [ONE] * 4 + [TWO] * 4
    reward = reward_fn(judge, config=QUICK)
    rewards = reward(prompts, TEXTS * 2, exemplars=exemplars)
    written = [text for text in TEXTS if text]
    for k, (question, writer) in enumerate((("Why?", ONE), ("How?", TWO))):
        scores = judge.judge(writer, written, question, config=QUICK).scores
        one, two, empty, three = rewards[k * 4 : k * 4 + 4]
        expected = [(score - 1) / 8 for score in scores if score is not None]
        assert [one, two, three] == pytest.approx(expected, abs=1e-5)
        assert empty == 0
        assert len({one, two, three}) == 3
    assert torch.equal(torch.random.get_rng_state(), state)  # training draws as before
    too_long = reward_fn(judge, ONE, config=QUICK)(["Why?"] * 2, ["supper " * 5000, TEXTS[0]])
    assert too_long == [None, pytest.approx(rewards[0], abs=1e-5)]


def test_names_of_a_judge_can_be_pickled(base, judge, monkeypatch):
    """What travels to a worker has no weights; they are loaded once, by the first call."""
    loads: list[Any] = []

    def load(*names: Any, **_: Any) -> Judge:
        loads.append(names)
        return judge

    monkeypatch.setattr(Judge, "load", load)
    names = LazyJudge(str(base.path), None, "cpu", "fp32")
    reward = reward_fn(names, ONE, config=QUICK, name="mine")
    assert (reward.__name__, reward.settings.config) == ("mine", replace(QUICK, topics=False))
    data = pickle.dumps([reward, verl_score(names, ONE, config=QUICK), openrlhf_reward(names, ONE)])
    assert len(data) < 5000
    assert loads == []
    reward, score, _ = pickle.loads(data)
    assert reward.__name__ == "mine"
    expected = reward_fn(judge, ONE, config=QUICK)([""], [TEXTS[0]])[0]
    assert score("", TEXTS[0], "") == expected
    assert loads == [(str(base.path), None, "cpu", "fp32")]


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_trl_trains_with_it(chat, base, judge, tmp_path):
    """Two steps of GRPO, each on the prompts of two writers and of nobody."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    G = 4
    rows: list[dict[str, Any]] = []
    for prompt, writer in (("Why?", ONE), ("How?", TWO), ("Who?", None)):
        message = [{"role": "user", "content": prompt}] if chat else prompt
        rows.append({"prompt": message, "exemplars": writer})
    reward = reward_fn(judge, config=QUICK, name="mine")
    seen: list[tuple[list[Any], list[Any], list[float | None]]] = []

    def looking_on(prompts: list[Any], completions: list[Any], **columns: Any) -> list[None]:
        """A second reward, which never applies."""
        again = reward(prompts, completions, **{**columns, "log_metric": None})
        seen.append((prompts, completions, again))
        return [None] * len(completions)

    tokenizer = transformers.AutoTokenizer.from_pretrained(base.path, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"
    policy = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    before = [weight.detach().clone() for weight in policy.parameters()]
    options = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=2, learning_rate=1e-2,
        per_device_train_batch_size=3 * G, num_generations=G, max_completion_length=6,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=3,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    functions = [reward, looking_on]
    trainer = trl.GRPOTrainer(policy, functions, options, data, processing_class=tokenizer)
    trainer.train()
    logs = [line for line in trainer.state.log_history if "rewards/mine/mean" in line]
    assert len(logs) == len(seen) == 2
    for log, (prompts, completions, rewards) in zip(logs, seen, strict=True):
        questions = [prompt[0]["content"] if chat else prompt for prompt in prompts]
        assert [x is None for x in rewards] == [question == "Who?" for question in questions]
        numbers = [x for x in rewards if x is not None]
        assert all(0 <= x <= 1 for x in numbers)
        assert len(set(numbers)) > 1
        assert log["rewards/mine/mean"] == pytest.approx(math.fsum(numbers) / 8, abs=1e-5)
        assert log["mine/no_score"] == 0
        texts = [completion[0]["content"] if chat else completion for completion in completions]
        for question, writer in (("Why?", ONE), ("How?", TWO)):
            which = [i for i in range(12) if questions[i] == question and texts[i].strip()]
            judged = judge.judge(writer, [texts[i] for i in which], question, config=QUICK)
            expected = [(score - 1) / 8 for score in judged.scores if score is not None]
            assert [rewards[i] for i in which] == pytest.approx(expected, abs=1e-5)
    moved = [not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True)]
    assert any(moved)


# verl 0.9.1


async def verl_reward(function: Any, response: str, extra_info: Any) -> float:
    """verl.experimental.reward_loop.reward_manager.naive, NaiveRewardManager.run_single."""
    extra_info |= {"num_turns": None, "rollout_reward_scores": {}}
    named = {"data_source": "letters", "solution_str": response, "ground_truth": ""}
    named |= {"extra_info": extra_info, "reward_router_address": "here"}
    loop = asyncio.get_running_loop()
    return float(await loop.run_in_executor(None, partial(function, **named)))


def test_verl():
    judge = RuleJudge()
    score = verl_score(judge)

    async def batch() -> list[float]:
        rows: list[tuple[str, Any]] = []
        rows += [("is a 7", {"exemplars": list(WRITER), "question": "Why?"})]
        rows += [("is a 3", {"exemplars": np.array(WRITER)}), ("", {"exemplars": OTHER[0]})]
        rows += [(f"is a {k % 9 + 1}", {"exemplars": OTHER}) for k in range(40)]
        return await asyncio.gather(*(verl_reward(score, *row) for row in rows))

    assert asyncio.run(batch()) == [0.75, 0.25, 0] + [k % 9 / 8 for k in range(40)]
    assert len(judge.calls) == 42
    assert (WRITER, ["is a 7"], "Why?") in [call[:3] for call in judge.calls]
    assert (WRITER, ["is a 3"], None) in [call[:3] for call in judge.calls]
    assert verl_score(RuleJudge(), "One text.")("", "is a 7", "", {"exemplars": OTHER}) == 0.75
    assert verl_score(RuleJudge(), WRITER, unjudged=-1)("", LONG, "", None) == -1


@pytest.mark.parametrize(
    ("text", "extra_info", "word"),
    [
        ("x", None, "extra_info"),
        ("x", {"exemplars": [7]}, "exemplars[0]"),
        (LONG, {"exemplars": "a"}, "no score"),
    ],
)
def test_verl_refuses(text: Any, extra_info: Any, word: str):
    refused(lambda: verl_score(RuleJudge())("letters", text, "", extra_info), word)


async def openrlhf_sample(reward_func: Any, query: str, prompt: str, label: Any) -> Any:
    """openrlhf.utils.agent, SingleTurnAgentExecutor._fetch_rewards_via_func, and what
    openrlhf.trainer.ppo_utils.samples_generator makes of it."""
    info = await asyncio.to_thread(reward_func, [query], [prompt], [label])
    logs = {k: torch.tensor([v.flatten()[0].item()]) for k, v in info["extra_logs"].items()}
    return torch.tensor([info.get("rewards")]), torch.tensor([info.get("scores")]), logs


def test_openrlhf():
    judge = RuleJudge()
    reward_func = openrlhf_reward(judge)

    async def batch() -> list[Any]:
        rows: list[tuple[str, str, Any]] = [
            (PROMPT + "is a 7<|im_end|>", PROMPT, list(WRITER)),
            ("<s>" + PROMPT + f"{PROMPT}is a 3</s></s>\n", PROMPT, OTHER[0]),
            (PROMPT + "<|im_end|>", PROMPT, {"exemplars": WRITER, "question": "Why?"}),
            (PROMPT + "is a 9", PROMPT, {"exemplars": WRITER, "question": "Why?"}),
        ]
        return await asyncio.gather(*(openrlhf_sample(reward_func, *row) for row in rows))

    samples = asyncio.run(batch())
    assert torch.cat([reward for reward, _, _ in samples]).tolist() == [0.75, 0.25, 0, 1]
    for reward, scores, logs in samples:
        assert (reward.shape, reward.dtype) == ((1,), torch.float32)
        assert torch.equal(reward, scores)
        assert logs == {"fits_writer": reward}
    assert (OTHER, [f"{PROMPT}is a 3"], None) in [call[:3] for call in judge.calls]
    together = openrlhf_reward(judge, WRITER)
    queries = [PROMPT + text for text in ("is a 7", "", "is a 3")]
    rewards = together(queries, [PROMPT] * 3, [""] * 3, datasources=["x"] * 3)["rewards"]
    assert rewards.tolist() == [0.75, 0, 0.25]


def heard(label: Any, exemplars: Any = None, principles: Any = ()) -> Any:
    """What the judge is called with for a label."""
    judge = RuleJudge()
    openrlhf_reward(judge, exemplars, principles=principles)(["Q? R one."], ["Q? "], [label])
    called, _, question, wanted = judge.calls[0]
    return called, question, wanted


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("So.", (("So.",), None, ())),
        ('["So.", "Ha."]', (("So.", "Ha."), None, ())),
        ("[Sigh.] I came.", (("[Sigh.] I came.",), None, ())),
        ("[" * 9999, (("[" * 9999,), None, ())),
        (LABEL, (("I came; I saw.",), "Q?", ("Be brief.",))),
        (f"\n {json.dumps(LABEL)}", (("I came; I saw.",), "Q?", ("Be brief.",))),
        ({"exemplars": "So.", "question": None, "note": None}, (("So.",), None, ())),
        ({"exemplars": np.array(["So."]), "principles": np.array([])}, (("So.",), None, ())),
    ],
)
def test_labels(label: Any, expected: Any):
    assert heard(label) == expected


def test_principles_and_questions_of_a_row():
    assert heard("So.", principles=["Be long."])[2] == ("Be long.",)
    assert heard(LABEL, principles=["Be long."])[2] == ("Be brief.",)
    for unread in ("So.", 4, None, {"answer": 4}, "[4]", {"writer": 3, "exemplars": 3}):
        assert heard(unread, WRITER) == (WRITER, None, ())
    assert heard('{"question": "Why?", "answer": 4}', WRITER)[1] == "Why?"
    assert heard(LABEL, WRITER, ["Be long."]) == (WRITER, "Q?", ("Be brief.",))


@pytest.mark.parametrize(
    "label",
    [
        *(None, "", " ", [], "{}", [1], [["So."]], 3, {"a": 1}, {"exemplars": []}),
        *({"question": "Q?"}, LABEL | {"question": 3}, LABEL | {"principles": [3]}),
        *(LABEL | {"principle": ["Be brief."]}, {"writer": "ada"}),
    ],
)
def test_refused_labels(label: Any):
    with pytest.raises(InputError, match=r"^labels"):
        heard(label)


@pytest.mark.parametrize(
    ("prompt", "query", "reply"),
    [
        ("Hi?", "Hi? One.", "One."),
        ("Hi? there", "Hi?  there One.", "One."),
        ("<s> [INST] Hi", "<s>[INST]  Hi Ho.", "Ho."),
        ("Hi?", "Hi?Ho.<|im_end|>\n<|endoftext|><|endoftext|>", "Ho."),
        ("Hi?", "Hi?</s> is a tag.<eos>", "</s> is a tag."),
        ("Hi?", "Hi?" + "Ho. " + "<eos> " * 100_000, "Ho."),
        ("Hi?", "Ho. Hi? One.", None),
    ],
    ids=range(7),
)
def test_where_a_reply_begins_and_ends(prompt: str, query: str, reply: str | None):
    if reply is not None:
        assert reply_in(query, prompt, "queries[0]") == reply
    else:
        refused(lambda: reply_in(query, prompt, "queries[0]"), "queries[0]")
