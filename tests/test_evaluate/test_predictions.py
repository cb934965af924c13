"""What a judge says of two candidates, and the file that remembers it."""

import math

import pytest

from nanopersrm import InputError
from nanopersrm.evaluate.predictions import Opinion, Opinions, from_scores, key_of


def test_scores_to_opinions():
    assert from_scores([1.0, 2.0]) == Opinion(1, (1.0, 2.0))
    assert from_scores([2.0, 1.0], 0.0).preference == 0.5
    assert from_scores([1.0, 1.0]).verdict == "tie"
    assert from_scores([2.0, 1.0], math.log(3)).preference == pytest.approx(0.75)
    assert from_scores([1e9, 0.0], 1.0).preference == 1
    for bad in (None, [float("nan"), 1.0], [1.0, float("inf")]):
        found = from_scores(bad)
        assert (found.verdict, found.scores, found.preference) == ("invalid", None, None)


def test_keys_tell_everything_apart():
    texts = (["e"], "q", ["a", "b"])
    keys = [
        key_of({"judge": "x"}, *texts),
        key_of({"judge": "y"}, *texts),
        key_of({"judge": "x"}, ["e", "e"], "q", ["a", "b"]),
        key_of({"judge": "x"}, ["e"], "", ["a", "b"]),
        key_of({"judge": "x"}, ["e"], "q", ["b", "a"]),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key_of({"judge": "x"}, ("e",), "q", ("a", "b"))


def test_opinions_come_back(tmp_path):
    path = tmp_path / "o.jsonl"
    said = [Opinion(0, (2.0, 1.5), 0.7, True), Opinion("invalid", problem="no"), Opinion("tie")]
    first = Opinions(path)
    for i, opinion in enumerate(said):
        first.put(str(i), "judge", "pair", opinion)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "3", "jud')  # killed here
    again = Opinions(path)
    assert [again.get(str(i)) for i in range(4)] == [*said, None]
    again.put("3", "judge", "pair", said[0])
    assert len(Opinions(path)) == 4


@pytest.mark.parametrize("line", ["[]", "{}", '{"key": 1}', "nonsense", '{"key":"a","judge":"b"}'])
def test_a_strange_file_is_named(tmp_path, line):
    path = tmp_path / "o.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"o\.jsonl, line 1: expected an opinion"):
        Opinions(path)
