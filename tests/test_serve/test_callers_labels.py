"""Labels: what a row of a data set says of its writer, in process and over the server alike."""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from test_reward import OTHER, WRITER, Array, Rule

from nanopersrm import InputError
from nanopersrm.judge import judgement
from nanopersrm.judge.judgement import JudgeConfig, Judgement
from nanopersrm.serve.callers import openrlhf_reward, pairwise_judge, verl_score
from nanopersrm.serve.label import Label, label_of
from nanopersrm.serve.remote import RewardRequest, asks_of
from nanopersrm.serve.wire import Limits

OBJECT = {"exemplars": ["I came; I saw."], "question": "Q?", "principles": ["Be brief."]}


class Listener(Rule):
    """Remembers all that it was asked, principles too."""

    def __init__(self) -> None:
        super().__init__(threading.Lock())
        self.heard: list[tuple[Any, ...]] = []

    def judge(self, *given: Any) -> Judgement:
        exemplars, candidates, question, principles, _ = given
        self.heard.append((tuple(exemplars), tuple(candidates), question, tuple(principles)))
        return super().judge(*given)


def in_process(label: Any, exemplars: Any = None, principles: Sequence[str] = ()) -> Any:
    judge = Listener()
    reward_func = openrlhf_reward(judge, exemplars, principles=principles)
    reward_func(["Q? R one."], ["Q? "], [label])
    return judge.heard[0]


def over_the_server(label: Any) -> Any:
    body = RewardRequest(["Q? R one."], ["Q? "], [label])
    ((_, ask),) = asks_of(body, None, {}, JudgeConfig(), Limits())
    return ask.exemplars, ask.candidates, ask.question, ask.principles


@pytest.mark.parametrize(
    ("label", "exemplars", "question", "principles"),
    [
        ("So.", ("So.",), None, ()),
        (["So.", "Ha."], ("So.", "Ha."), None, ()),
        ('["So.", "Ha."]', ("So.", "Ha."), None, ()),
        ("[Sigh.] I came.", ("[Sigh.] I came.",), None, ()),
        ("{shrugs} Well.", ("{shrugs} Well.",), None, ()),
        (OBJECT, ("I came; I saw.",), "Q?", ("Be brief.",)),
        (json.dumps(OBJECT), ("I came; I saw.",), "Q?", ("Be brief.",)),
        (f"\n {json.dumps(OBJECT)}", ("I came; I saw.",), "Q?", ("Be brief.",)),
        ({"exemplars": "So.", "question": None, "note": None}, ("So.",), None, ()),
        ({"exemplars": ["So."], "question": " ", "principles": []}, ("So.",), None, ()),
        ('{"exemplars": ["So."], "principles": null}', ("So.",), None, ()),
        ({"exemplars": Array("So."), "principles": Array()}, ("So.",), None, ()),
        (Array("So."), ("So.",), None, ()),
    ],
)
def test_a_label_means_the_same_in_process_and_over_the_server(
    label: Any, exemplars: Any, question: Any, principles: Any
):
    expected = (exemplars, ("R one.",), question, principles)
    assert in_process(label) == over_the_server(label) == expected


@pytest.mark.parametrize(
    "label",
    [
        *(None, "", " ", [], {}, "{}", "[]", [1], "[1]", [["So."]], 3, {"a": 1}, '{"a": 1}'),
        *({"exemplars": []}, {"exemplars": None}, {"question": "Q?"}, OBJECT | {"question": 3}),
        *(OBJECT | {"principles": [3]}, OBJECT | {"principle": ["Be brief."]}),
    ],
)
def test_both_refuse_the_same(label: Any):
    for reader in (in_process, over_the_server):
        with pytest.raises(InputError, match=r"^labels\[0\]"):
            reader(label)


def test_names_are_known_to_the_server_alone():
    for label in ({"writer": "ada"}, '{"writer": "ada"}', OBJECT | {"writer": "ada"}):
        with pytest.raises(InputError, match=r"fields exemplars, question, pri.* got 'writer'"):
            in_process(label)
    names = ("exemplars", "writer")
    assert label_of({"writer": "ada"}, "label", names) == Label(writer="ada")


def test_the_principles_of_a_row_stand_in_place_of_those_for_all():
    assert in_process("So.", principles=["Be long."])[3] == ("Be long.",)
    assert in_process(OBJECT, principles=["Be long."])[3] == ("Be brief.",)
    assert in_process(OBJECT | {"principles": []}, principles=["Be long."])[3] == ()
    judge = Listener()
    labels = [OBJECT, OBJECT | {"principles": ["Be long."]}, OBJECT]
    openrlhf_reward(judge)(["a 1", "a 2", "a 3"], ["a "] * 3, labels)
    assert [(heard[1], heard[3]) for heard in judge.heard] == [
        (("1", "3"), ("Be brief.",)),
        (("2",), ("Be long.",)),
    ]


def test_beside_exemplars_for_all_the_question_counts():
    for unread in ("So.", ["So."], 4, None, {"answer": 4}, "[4]", {"writer": 3, "exemplars": 3}):
        assert in_process(unread, WRITER) == (WRITER, ("R one.",), None, ())
    for label in ({"question": "Why?", "answer": 4}, '{"question": "Why?"}'):
        assert in_process(label, WRITER)[2] == "Why?"
    with pytest.raises(InputError, match=r"labels\[0\], field principles: expected none"):
        in_process(OBJECT, WRITER)


def test_verl_reads_principles_and_leaves_the_fields_of_others():
    judge = Listener()
    extra: Mapping[str, Any] = OBJECT | {"index": 3, "split": "train", "writer": 7}
    verl_score(judge, principles=["Be long."])("", "is a 7", "", extra)
    assert judge.heard == [(("I came; I saw.",), ("is a 7",), "Q?", ("Be brief.",))]
    with pytest.raises(InputError, match="extra_info, field principles, text 1: expected some"):
        verl_score(judge)("", "is a 7", "", OBJECT | {"principles": [3]})
    with pytest.raises(InputError, match="extra_info, field principles: expected none"):
        verl_score(judge, OTHER)("", "is a 7", "", extra)
    with pytest.raises(InputError, match="extra_info: expected an object, got str"):
        verl_score(judge, OTHER)("", "is a 7", "", cast(Any, "So."))


class Drawn:
    joint = None

    def __init__(self, digits: list[float]):
        self.digits = digits


class Contrary(Rule):
    """The first fits better with 0.6, and the second has the better score, 4.0 over 3.4."""

    def judge(self, *given: Any) -> Judgement:
        digits = [0.4, 0, 0, 0, 0.6, 0, 0, 0, 0], [0, 0, 0, 1.0, 0, 0, 0, 0, 0]
        scores, table = judgement.pointwise(2, [], [[Drawn(list(one))] for one in digits])
        order = judgement.ranked(table, scores)
        said = judgement.verdict_of(scores, table, order)
        return Judgement(scores, table, order, said, [""] * 2, True, 0, 0, 0.0, [])


def test_the_index_of_a_pair_agrees_with_its_probability():
    trl = pairwise_judge(Contrary(), WRITER)
    assert trl.judge(["Why?"], [("a", "b")], return_scores=True) == pytest.approx([0.6])
    assert trl.judge(["Why?"], [("a", "b")]) == [0]
