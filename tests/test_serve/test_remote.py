"""OpenRLHF's remote reward: its requests, as version 0.11.2 sends them, and answers it can use."""

import json
import time
from typing import Any

import pytest
from fake_judge import FakeJudge, digits_of

from nanopersrm import InputError
from nanopersrm.judge.judgement import JudgeConfig
from nanopersrm.judge.verdict import soft_score
from nanopersrm.serve.desk import Done
from nanopersrm.serve.remote import RewardRequest, asks_of, request_of, responses, reward_reply
from nanopersrm.serve.wire import JudgeRequest, Limits, Unknown, Writer

ADA = {"writer": "ada"}
WRITERS = {"ada": Writer(["I came; I saw."], ["Be brief."])}
PROMPT = "<|im_start|>user\nWrite to me.<|im_end|>\n<|im_start|>assistant\n"
LIMITS = Limits(queries=60)


def sent(*written: str, labels: Any = None) -> RewardRequest:
    query = [f"{PROMPT}{text}<|im_end|>\n" for text in written]
    return RewardRequest(query, [PROMPT] * len(query), labels)


def asked(body: RewardRequest, writer: str | None = None) -> Any:
    return asks_of(body, writer, WRITERS, JudgeConfig(mode="pairwise"), LIMITS)


@pytest.mark.parametrize(
    ("both", "prompt", "response"),
    [
        ("Hi? Ho.</s>", "Hi?", "Ho."),
        ("<s> [INST] Hi [/INST] Ho.</s>", "<s>[INST] Hi [/INST]", "Ho."),  # white space moved
        ("Hi?Ho.<|im_end|>\n<|endoftext|><|endoftext|>", "Hi?", "Ho."),
        ("Hi?</s> is a tag.<eos>", "Hi?", "</s> is a tag."),
        ("Hi?Hi?", "Hi?", "Hi?"),
        ("Ho.", "", "Ho."),
        ("Hi? </s>", "Hi?", ""),
    ],
)
def test_the_response_is_what_follows_the_prompt(both: str, prompt: str, response: str):
    assert responses([both], [prompt]) == [response]


@pytest.mark.parametrize(
    ("query", "prompts", "line"),
    [
        ([], [], "at least 1"),
        (["a"], ["a", "b"], "as many prompts as queries"),
        (["Ho."], ["Hi?"], "query[0]: expected a text that begins with its prompt"),
        (["Hi?Ho.", "Hi"], ["Hi?", "Hi?"], "query[1]: expected a text that begins"),
    ],
)
def test_queries_that_have_no_response(query: list[str], prompts: list[str], line: str):
    with pytest.raises(InputError) as caught:
        responses(query, prompts)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    "label",
    [
        {"exemplars": ["So."], "question": "Why?"},
        '{"exemplars": ["So."], "question": "Why?"}',
    ],
)
def test_a_label_says_whose_style_counts(label: Any):
    assert request_of(label, "labels[0]") == JudgeRequest([], ["So."], question="Why?")
    assert request_of(["So."], "") == request_of('["So."]', "") == JudgeRequest([], ["So."])
    assert request_of("So.", "") == JudgeRequest([], ["So."])
    assert request_of('{"writer": "ada"}', "") == JudgeRequest([], writer="ada")
    assert request_of({"exemplars": "So."}, "") == JudgeRequest([], ["So."])


def test_none_is_as_if_the_field_were_not_there():
    """Arrow puts it where a row lacks a field that others have."""
    for given in ({"exemplars": ["So."]}, {"writer": "ada"}):
        label = dict.fromkeys(("exemplars", "writer", "question", "principles")) | given
        for form in (label, json.dumps(label)):
            assert request_of(form, "") == JudgeRequest([], **given)
    assert request_of({"exemplars": ["So."], "principles": []}, "") == JudgeRequest([], ["So."])
    with pytest.raises(InputError, match=r"labels\[0\]: expected texts .* got nothing; or say"):
        asked(sent("One.", labels=[{"exemplars": None, "question": None}]))


def test_beside_a_writer_for_all_the_question_counts():
    labels = [{"question": "Why?"}, '{"question": "Why?", "answer": 4}', "4", 4, None, {"a": 1}]
    found = asked(sent(*"abcdef", labels=labels), writer="ada")
    assert [(members, ask.question) for members, ask in found] == [
        ([0, 1], "Why?"),
        ([2, 3, 4, 5], None),
    ]
    with pytest.raises(InputError, match=r"labels\[0\], field principles: expected none"):
        asked(sent("a", labels=[{"principles": ["Be long."]}]), writer="ada")


@pytest.mark.parametrize("label", ["[Sigh.] I came", "{shrugs} Well.", "{", "[1] So.", "[" * 9999])
def test_a_text_may_begin_like_json(label: str):
    assert request_of(label, "") == JudgeRequest([], [label])


@pytest.mark.parametrize(
    "label",
    ["", None, 3, [1], {}, {"a": 1}, "[1]", "{}", {"exemplars": 3}, {"writer": ["ada"]}],
)
def test_other_labels_are_refused(label: Any):
    for text in ("One.", ""):  # what was written does not matter
        with pytest.raises(InputError, match=r"labels\[0\]"):
            asked(sent(text, labels=[label]))


def test_queries_of_one_writer_are_candidates_of_one_ask():
    found = asked(sent("One.", "Two.", "Three."), writer="ada")
    assert [members for members, _ in found] == [[0, 1, 2]]
    ask = found[0][1]
    assert ask.exemplars == ("I came; I saw.",)
    assert ask.candidates == ("One.", "Two.", "Three.")
    assert ask.config.mode == "pointwise"  # a reward is for a text alone
    mixed = asked(sent("One.", "", "Two.", "Three.", labels=[ADA, ADA, ["So."], ADA]))
    assert [members for members, _ in mixed] == [[0, 3], [2]]  # nothing was written to the second
    many = asked(sent(*map(str, range(60))), writer="ada")
    assert [len(members) for members, _ in many] == [26, 26, 8]
    with pytest.raises(InputError, match="at most 60, got 61"):
        asked(sent(*map(str, range(61))), writer="ada")
    with pytest.raises(InputError, match="labels: expected one for each"):
        asked(sent("One.", labels=[]))
    for text in ("One.", ""):
        with pytest.raises(Unknown, match="'bea'"):
            asked(sent(text), writer="bea")
        with pytest.raises(Unknown, match="'bea'"):
            asked(sent(text, labels=[{"writer": "bea"}]))
    assert asked(sent("", ""), writer="ada") == []


def test_thousands_of_tokens_at_the_end_are_cut_in_one_pass():
    begin = time.process_time()
    assert responses(["Hi?" + "Ho. " + "<eos> " * 150_000], ["Hi?"]) == ["Ho."]
    assert time.process_time() - begin < 2


def test_rewards_stand_in_the_order_of_the_queries():
    judge, body = FakeJudge(), sent("One.", "Two.", "", "Three.", labels=[ADA, ["So."], "x", ADA])
    found = [(m, Done(judge.judge(ask.exemplars, ask.candidates))) for m, ask in asked(body)]
    reply = reward_reply(4, found)
    assert reply is not None
    one, two, three = (soft_score(digits_of(text)) for text in ("One.", "Two.", "Three."))
    assert reply["rewards"] == pytest.approx([(one - 1) / 8, (two - 1) / 8, 0, (three - 1) / 8])
    assert reply["scores"] == reply["rewards"]
    assert reply["extra_logs"] == {"fits_writer": reply["rewards"]}
    json.dumps(reply, allow_nan=False)


def test_no_reward_is_made_up():
    judge = FakeJudge()
    invalid = Done(judge.judge(("So.",), ("One.", "invalid")))
    assert reward_reply(2, [([0, 1], invalid)]) is None
