"""Attacks: drawn by the seed, put into texts without losing a word of them, unlike those of the
suite that measures a judge, and blind to whose text it is.
"""

import random
import re
from collections import Counter

import pytest
from fixtures import make_base

from data.build import demo_pairs
from nanopersrm import InputError
from nanopersrm.evaluate.injections import INJECTIONS
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.train import attacks
from nanopersrm.train.attacks import attack, with_attack
from nanopersrm.train.lessons import LessonConfig, contrast_list, roster

TEXT = "One day it rained! Nobody came. We left; the bus (a green one) had gone."
MANY = 2000


def folded(text: str) -> set[str]:
    """Its sentences, without case and marks."""
    return {" ".join(re.findall(r"\w+", part.lower())) for part in re.split(r"[.!?\n]", text)}


def test_the_same_seed_draws_the_same():
    drawn = [attack(random.Random(i)) for i in range(MANY)]
    assert drawn == [attack(random.Random(i)) for i in range(MANY)]
    assert f">>> attack(random.Random(3))\n{drawn[3]!r}" in (attacks.__doc__ or "")
    assert len(set(drawn)) > MANY / 4
    assert all(words.strip() == words and words for words in drawn)
    assert "{" not in "".join(words for words in drawn if not words.startswith("{"))


def test_no_sentence_is_one_of_the_suite():
    drawn = {part for i in range(MANY) for part in folded(attack(random.Random(i)))}
    suite = {part for some in INJECTIONS.values() for words in some for part in folded(words)}
    both = {part for part in drawn & suite if len(part.split()) > 2}
    assert both == set()


def test_the_text_stays_whole():
    places = Counter[str]()
    for i in range(300):
        found = with_attack(TEXT, random.Random(i))
        sentences = attacks.SENTENCE_END.split(TEXT)
        spots = [found.index(sentence) for sentence in sentences]
        assert spots == sorted(spots)
        assert len(found) > len(TEXT)
        places["end" if found.startswith(TEXT) else "begin" if found.endswith(TEXT) else "in"] += 1
    assert places["end"] > places["begin"] > 0
    assert places["in"] > 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(make_base(tmp_path_factory.mktemp("attacks") / "one", "smollm"))


def test_whose_text_it_is_does_not_matter(tokenizer):
    """Chosen, rejected and rivals are attacked as often; exemplars half as often."""
    pairs = demo_pairs(seed=1, pairs=40)
    config = LessonConfig(longest=10_000, attacks=0.4, rivals=2)
    known = {text for pair in pairs for text in (*pair.exemplars, pair.chosen, pair.rejected)}
    known = {text.strip() for text in known}
    attacked, shown, lists = Counter[str](), 0, 0
    for seed in range(4):
        for pair in pairs:
            found = contrast_list(
                pair, roster(pairs), tokenizer, config, random.Random(f"{seed}/{pair.id}")
            )
            assert found is not None
            whole = [tokenizer.decode(found.prefix + branch.ids) for branch in found.branches]
            lists += 1
            own = [re.findall(r"<candidate A>\n(.*?)\n</candidate A>", one, re.S) for one in whole]
            for i, (text,) in enumerate(own):
                attacked["chosen" if i == found.chosen else "other"] += text not in known
            told = re.findall(r"<exemplar>\n(.*?)\n</exemplar>", whole[0], re.S)
            assert set(told[:-1]) <= known
            shown += told[-1] not in known
    assert 0.3 < attacked["chosen"] / lists < 0.5
    assert 0.3 < attacked["other"] / (2 * lists) < 0.5
    assert 0.12 < shown / lists < 0.28


def test_a_share_is_a_share():
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="attacks: expected a share from 0 to 1"):
            LessonConfig(attacks=wrong)
