"""What streams to a terminal: nothing is lost, doubled, or shown half."""

from typing import Any

from rich.console import Console
from test_cli import DEMO, DRAFTS, EDMUND, cli, script, tiny_folder, tiny_judge  # noqa: F401


def streamed(*told: tuple[tuple[int, ...], str, bool], names: Any = ("a.txt", "b.txt")) -> str:
    out = Console(record=True, width=80, file=open("/dev/null", "w"))
    follower = script._Follower(out, list(names), Console(stderr=True).status(""))
    for which, text, ended in told:
        follower(which, text, ended)
    return out.export_text()


def test_every_character_is_shown_once():
    shown = streamed(
        ((0,), "", False),
        ((0,), "Terse", False),
        ((0,), "Terse writer.", False),
        ((0,), "Terse writer.\n</", False),
        ((0,), "Terse writer.\n</think", False),
        ((0,), "Terse writer.", True),
    )
    assert shown.split() == ["a.txt", "Terse", "writer."]


def test_what_looks_like_an_ending_and_is_none_comes_later():
    shown = streamed(((0,), "a <", False), ((0,), "a <b", False), ((0,), "a <b </", True))
    assert shown.split() == ["a.txt", "a", "<b", "</"]


def test_the_first_candidate_is_shown_first():
    shown = streamed(
        ((1,), "two", False), ((0,), "one", False), ((1,), "two", True), ((0,), "one", True)
    )
    assert shown.split() == ["a.txt", "one", "b.txt", "two"]


def test_a_folder_of_candidates(cli):  # noqa: F811
    code, out, _ = cli("--exemplar", EDMUND, "--candidates", DEMO / "zoe", "--no-think", "--json")
    assert code == 0
    assert out.count("zoe") == 6


def test_a_mistyped_question_file_is_no_question(cli):  # noqa: F811
    flags = ("--exemplar", EDMUND, "--candidates", *DRAFTS, "--no-think")
    code, _, error = cli(*flags, "--question", "no/such/question.txt")
    assert code == 2
    assert error == "judge.py: error: no/such/question.txt: no such file\n"
