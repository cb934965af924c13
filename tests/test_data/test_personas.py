"""Personas: each does what it says, by measurement; each belongs to one split."""

from itertools import combinations

import pytest

from data.accept import grams, text_fault
from data.kinds.personas import OPENINGS, PERSONAS, Persona, of_split
from nanopersrm.style.features import FACTORS, measure

MEASURED = {persona.name: measure(persona.paragraphs) for persona in PERSONAS}


@pytest.mark.parametrize("persona", PERSONAS, ids=lambda persona: persona.name)
def test_a_persona_stands_out_in_its_habits(persona: Persona):
    assert persona.habits
    for habit in persona.habits:
        assert habit in {factor.name for factor in FACTORS}
        rates = sorted((MEASURED[other.name][habit] or 0.0 for other in PERSONAS), reverse=True)
        own = MEASURED[persona.name][habit]
        assert own is not None
        assert own >= rates[1], f"{persona.name}: {habit} {own}, others have {rates[:3]}"


@pytest.mark.parametrize("persona", PERSONAS, ids=lambda persona: persona.name)
def test_its_paragraphs_are_whole_texts_for_every_opening(persona: Persona):
    assert len(persona.paragraphs) == len(OPENINGS)
    for paragraph in persona.paragraphs:
        assert text_fault(paragraph, 20, strict=True) is None, paragraph
    assert 0 < persona.temperature <= 1.2


def test_names_and_paragraphs_are_all_different():
    assert len({persona.name for persona in PERSONAS}) == len(PERSONAS) >= 12
    texts = [paragraph for persona in PERSONAS for paragraph in persona.paragraphs]
    for one, other in combinations(texts, 2):
        assert set(grams(one)).isdisjoint(grams(other))


def test_personas_of_training_are_not_tested():
    names = {split: {p.name for p in of_split(split)} for split in ("train", "validation", "test")}
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == len(PERSONAS)
    assert all(len(there) >= 2 for there in names.values())
    assert {p.name for p in of_split("ood")} == names["test"]
