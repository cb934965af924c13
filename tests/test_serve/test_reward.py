"""Rewards are the judge's scores on a stated scale, group by group; what has no score is None."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig, Judgement, check, ranked, verdict_of
from nanopersrm.serve.reward_fn import RewardFunction, Rewards, Scale, end_of_prompt, reward_fn

WRITER = ("I came home late; no supper.", "So be it!")
OTHER = ("lol no food",)
CONTEXT = 60  # characters
LONG = "long " * 20  # more than that


@dataclass
class Rule:
    """A judge that gives the digit a text ends with, and 5 to any other; "?" is not a number."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    calls: list[tuple[tuple[str, ...], list[str], str | None]] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)

    def judge(
        self,
        exemplars: Sequence[str],
        candidates: Sequence[str],
        question: str | None = None,
        principles: Sequence[str] = (),
        config: JudgeConfig | None = None,
    ) -> Judgement:
        check(exemplars, candidates, config or JudgeConfig(), question, principles)
        for text in candidates:
            if len(text) > CONTEXT:
                raise InputError("candidate 1: expected a text that fits")
        self.calls.append((tuple(exemplars), list(candidates), question))
        self.held.append(self.lock.locked())
        worth = [rule(text) for text in candidates]
        scores = [score if math.isfinite(score) else None for score in worth]
        table = [[0.5 + (a - b) / 16 for b in worth] for a in worth]
        order = ranked(table, scores)
        said = verdict_of(scores, table, order)
        return Judgement(scores, table, order, said, [""] * len(scores), True, 0, 0, 0.0, [])


def rule(text: str) -> float:
    end = text.strip()[-1]
    return math.nan if end == "?" else float(end) if end.isdigit() else 5.0


def asked(judge: Rule, completions: Sequence[Any], exemplars: Any = WRITER, **more: Any) -> Rewards:
    """The rewards of completions of one prompt."""
    return reward_fn(judge, exemplars, **more)(["Why?"] * len(completions), completions)


def test_scales():
    texts = ["is a 7", "is a 5", "is a 3"]
    assert asked(Rule(), texts) == [0.75, 0.5, 0.25]
    assert asked(Rule(), texts, scale="soft") == [7.0, 5.0, 3.0]
    # 7 beats 5 with ½ + 2/16, and 3 with ½ + 4/16
    assert asked(Rule(), texts, scale="relative") == [0.6875, 0.5, 0.3125]
    with pytest.raises(InputError, match="scale: expected unit, soft, relative, got 'z'"):
        asked(Rule(), texts, scale=cast(Scale, "z"))


def test_one_call_a_group_and_groups_of_a_writer_in_a_row():
    judge = Rule()
    rows = [  # prompt, exemplars, completion
        ("Why?", WRITER, "a 1"),
        ("Why?", OTHER, "b 2"),
        ("How?", WRITER, "c 3"),
        ("Why?", list(WRITER), "d 4"),
        ("How?", OTHER[0], "e 5"),  # one text is a list of one
        ("Why?", WRITER, "f 6"),
    ]
    prompts, exemplars, completions = (list(column) for column in zip(*rows, strict=True))
    found = reward_fn(judge, scale="soft")(prompts, completions, exemplars=exemplars)
    assert found == [1, 2, 3, 4, 5, 6]
    assert judge.calls == [
        (WRITER, ["a 1", "d 4", "f 6"], "Why?"),
        (WRITER, ["c 3"], "How?"),
        (OTHER, ["b 2"], "Why?"),
        (OTHER, ["e 5"], "How?"),
    ]
    assert all(judge.held)
    assert not judge.lock.locked()


def test_large_groups_are_cut_evenly():
    judge = Rule()
    texts = [f"{k} ends in {1 + k % 9}" for k in range(53)]
    assert asked(judge, texts, scale="soft") == [1 + k % 9 for k in range(53)]
    assert [len(candidates) for _, candidates, _ in judge.calls] == [17, 18, 18]
    assert [text for _, candidates, _ in judge.calls for text in candidates] == texts


def test_the_question():
    judge = Rule()
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    told += [{"role": "assistant", "content": "I."}, {"role": "user", "content": "Who else?"}]
    blocks = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    for prompt in ("Why?", told, blocks, " \n"):
        reward_fn(judge, WRITER)([prompt], ["x"])
    reward_fn(judge, WRITER, question=None)([told], ["x"])
    both = reward_fn(judge, WRITER, question="asks")
    both(["a", "b"], ["x", "y"], asks=["Where?", None])
    heard = [question for _, _, question in judge.calls]
    assert heard == ["Why?", "Who else?", "What?", None, None, "Where?", None]


def test_messages_are_what_the_assistant_says():
    judge = Rule()
    call: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}
    tool = {"role": "tool", "content": "a tool says 9"}
    blocks = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
    completions = [
        [{"role": "assistant", "content": "so 2"}],
        [call, tool, {"role": "assistant", "content": "it is 3"}],
        [{"role": "assistant", "content": "First."}, tool, {"role": "assistant", "content": "4"}],
        [{"role": "assistant", "content": blocks}],
        [call],
        [],
    ]
    assert asked(judge, completions, scale="soft") == [2, 3, 4, 5, 1, 1]
    assert judge.calls[0][1] == ["so 2", "it is 3", "First.\n\n4", "in parts"]


def test_an_empty_completion_gets_the_lowest():
    texts = ["", "is a 5", " \n\t", "is a 7"]
    for scale, expected in (
        ("unit", [0, 0.5, 0, 0.75]),
        ("soft", [1, 5, 1, 7]),
        ("relative", [0, (0.375 + 2) / 3, 0, (0.625 + 2) / 3]),  # above both empty ones
    ):
        judge = Rule()
        assert asked(judge, texts, scale=scale) == expected
        assert judge.calls[0][1] == ["is a 5", "is a 7"]
        assert asked(judge, ["", " "], scale=scale) == [expected[0]] * 2
        assert len(judge.calls) == 1


def test_what_has_no_score():
    assert asked(Rule(), ["what?", "is a 5"]) == [None, 0.5]
    assert asked(Rule(), ["what?", "is a 5"], scale="relative") == [None, None]
    assert asked(Rule(), ["alone 9"], scale="relative") == [None]
    assert asked(Rule(), ["alone 9", ""], scale="relative") == [1, 0]
    assert asked(Rule(), [], scale="relative") == []


def test_too_long_for_the_judge():
    judge = Rule()
    texts = ["long " * 20 + "9", "is a 5", "longer " * 20 + "9", "is a 7"]
    assert asked(judge, texts) == [None, 0.5, None, 0.75]
    assert [candidates for _, candidates, _ in judge.calls] == [["is a 5", "is a 7"]]
    assert asked(judge, texts[:1]) == [None]
    assert not judge.lock.locked()


def test_pairwise_needs_two():
    pairwise = JudgeConfig(mode="pairwise")
    assert asked(Rule(), ["is a 5", "is a 7"], config=pairwise) == [0.5, 0.75]
    assert asked(Rule(), ["is a 5", ""], config=pairwise) == [None, 0]
    assert asked(Rule(), ["is a 5", "long " * 20], config=pairwise) == [None, None]


def test_a_row_without_exemplars_is_not_for_this_judge():
    judge, logged = Rule(), list[tuple[str, float]]()
    reward = reward_fn(judge, name="mine")
    columns: dict[str, Any] = {"exemplars": [None, WRITER, WRITER, WRITER, None]}
    columns["log_metric"] = lambda name, value: logged.append((name, value))
    texts = ["is a 3", "is a 5", "long " * 20, "", ""]
    assert reward(["Why?"] * 5, texts, **columns) == [None, 0.5, None, 0, None]
    assert logged == [("mine/no_score", 1 / 3)]
    assert reward(["Why?"], ["x"], exemplars=[None], log_metric=columns["log_metric"]) == [None]
    assert len(logged) == 1


def test_what_trl_asks_of_a_function():
    reward = reward_fn(Rule(), WRITER)
    assert reward.__name__ == "fits_writer"
    assert reward_fn(Rule(), WRITER, name="mine").__name__ == "mine"
    extra = {"completion_ids": [[1, 2]], "trainer_state": object(), "log_extra": print}
    assert reward(prompts=["Why?"], completions=["is a 5"], **extra) == [0.5]


class Array:
    """As numpy's, which parquet files give."""

    def __init__(self, *texts: str):
        self.texts = list(texts)

    def tolist(self) -> list[str]:
        return self.texts


def test_arrays_are_lists():
    judge = Rule()
    assert reward_fn(judge, scale="soft")(["?"], ["is a 5"], exemplars=[Array(*WRITER)]) == [5]
    assert judge.calls[0][0] == WRITER


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({}, "expected a column 'exemplars' in the data set, found none"),
        ({"texts": [WRITER], "log_metric": print}, "column 'exemplars' in the data set, found tex"),
        ({"exemplars": "texts"}, "column 'exemplars'"),
        ({"exemplars": [WRITER] * 2}, "exemplars: expected 1 values, one a completion, got 2"),
        ({"exemplars": [7]}, r"exemplars\[0\]: expected a text or a list of texts, got int 7"),
        ({"exemplars": [[]]}, r"exemplars\[0\]: expected a text or a list of texts, got list \[\]"),
        ({"exemplars": [{"a": 1}]}, r"exemplars\[0\]: expected a text or a list"),
        ({"exemplars": [["a", " "]]}, r"exemplars\[0\], text 2: expected some text, got ' '"),
        ({"exemplars": [["a", None]]}, r"exemplars\[0\], text 2: expected some text, got None"),
    ],
)
def test_refused_columns(columns: dict[str, Any], part: str):
    judge = Rule()
    with pytest.raises(InputError, match=part) as caught:
        reward_fn(judge)(["Why?"], ["x"], **columns)
    assert "\n" not in str(caught.value)
    assert not judge.calls


@pytest.mark.parametrize(
    ("prompt", "completion", "part"),
    [
        ("Why?", 7, r"completions\[0\]: expected a text or a list of messages, got int"),
        ("Why?", None, r"completions\[0\]: expected a text"),
        ("Why?", ["x"], r"completions\[0\], message 1: expected an object with role"),
        ("Why?", [{}], r"completions\[0\], message 1: expected an object with role"),
        ("Why?", [{"role": "user", "content": "x"}], "of role assistant, found user"),
        ("Why?", [{"role": "assistant", "content": 7}], r"message 1: expected a text or blocks"),
        (7, "x", r"prompt\[0\]: expected a text"),
        ([{"role": "system", "content": "x"}], "x", "of role user, found system"),
        ([{"role": "b\nc" + "d" * 999, "content": "x"}], "x", "of role user, found b cd{77}$"),
    ],
)
def test_refused_texts(prompt: Any, completion: Any, part: str):
    with pytest.raises(InputError, match=part):
        reward_fn(Rule(), WRITER)([prompt], [completion])


def test_refused_before_anything_is_judged():
    for exemplars in ([], "", [" "], 7, ["a", 7]):
        with pytest.raises(InputError, match=r"^exemplars"):
            reward_fn(Rule(), cast(Any, exemplars))
    with pytest.raises(InputError, match="prompts: expected 2, one a completion, got 1"):
        reward_fn(Rule(), WRITER)(["Why?"], ["x", "y"])
    with pytest.raises(InputError, match="principles: expected a list"):
        asked(Rule(), ["x"], principles="Be brief.")


def test_threads_wait_for_each_other():
    judge = Rule()
    reward: RewardFunction = reward_fn(judge, WRITER, scale="soft")
    found: dict[int, Rewards] = {}

    def ask(k: int) -> None:
        for _ in range(20):
            found[k] = reward(["Why?"], [f"is a {k}"])

    judge.lock.acquire()  # somebody else is judging
    threads = [threading.Thread(target=ask, args=(k,)) for k in range(1, 9)]
    for thread in threads:
        thread.start()
    assert not judge.calls
    judge.lock.release()
    for thread in threads:
        thread.join(10)
    assert found == {k: [k] for k in range(1, 9)}
    assert len(judge.calls) == 160


@pytest.mark.parametrize(
    ("prompt", "both", "reply"),
    [
        ("Hi?", "Hi? One.", " One."),
        ("Hi?", "<s>Hi? One.", " One."),
        ("Hi?", "<s> Hi? One.", " One."),
        ("Hi? there", "Hi?  there One.", " One."),
        ("<s> [INST] Hi", "<s>[INST]  Hi Ho.", " Ho."),
        ("", "One.", "One."),
        ("Hi?", "Ho. Hi? One.", None),  # not at the begin
        ("Hi?", "<s><s>Hi? One.", None),
        ("Hi?", "Hi", None),
    ],
)
def test_where_a_reply_begins(prompt, both, reply):
    at = end_of_prompt(prompt, both)
    assert (None if at is None else both[at:]) == reply
