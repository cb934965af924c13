"""Which preset a machine gets, and that presets say how and never what."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nanopersrm import InputError
from nanopersrm.model.weights import dtype_of
from nanopersrm.train.presets import PRESETS, SIZES, Preset, for_card, settled
from nanopersrm.train.rollouts import RolloutConfig


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [
        (None, "cpu"),
        (140, "24gb"),
        (80, "24gb"),
        (25.4, "24gb"),  # an RTX 3090 says 25.4e9, and a 4090 25.3e9
        (22.0, "24gb"),  # an L4 says 23.6e9; some of it may be taken
        (21.5, "12gb"),
        (16.9, "12gb"),
        (12.6, "12gb"),  # an RTX 3060
        (10.7, "8gb"),
        (8.2, "8gb"),
        (4.0, "8gb"),  # too little for any: the smallest
    ],
)
def test_a_card_gets_the_largest_that_fits(gigabytes, name):
    assert for_card(None if gigabytes is None else int(gigabytes * 1e9)) == name


def test_smaller_cards_do_less_at_a_time():
    cards = [PRESETS[name] for name in ("24gb", "12gb", "8gb")]
    for one, smaller in pairwise(cards):
        assert one.budget > smaller.budget
        assert one.chunk_mb > smaller.chunk_mb
        for switch in ("nf4", "recompute", "offload", "eight_bit", "host_embedding"):
            assert getattr(one, switch) <= getattr(smaller, switch)
        # What is learned stays the same.
        for name in ("steps", "warmup_steps", "bundles", "rft_steps", "plans", "group", "reply"):
            assert getattr(one, name) == getattr(smaller, name)
        assert one.rows > smaller.rows


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_sound(name):
    how = PRESETS[name]
    assert isinstance(how, Preset)
    for field in ("budget", "chunk_mb", "steps", "warmup_steps", "bundles", "rft_steps", "plans"):
        assert getattr(how, field) >= 1
    assert how.rows >= how.group >= 2  # one prompt's replies run side by side
    RolloutConfig(how.group, how.rows, how.reply)  # raises what it does not take
    assert how.bundles % 2 == 0  # a step sees both twins of a couple
    assert how.recompute or not how.offload  # offload alone would do nothing
    assert how.card_gb is not None or not (how.eight_bit or how.host_embedding)
    if how.dtype != "auto":
        dtype_of(how.dtype, torch.device("cpu"))


def test_what_is_not_a_card_is_chosen_by_name_alone():
    others = {name for name, preset in PRESETS.items() if preset.card_gb is None}
    assert others == {"tiny", "cpu"}
    assert {for_card(memory) for memory in range(0, 200_000_000_000, 10**9)} == {
        "24gb",
        "12gb",
        "8gb",
    }


def test_what_a_command_line_says_otherwise():
    said = {"budget": 7, "recompute": False, "steps": None, "out": "elsewhere", "seed": 3}
    assert settled("24gb", said) == replace(PRESETS["24gb"], budget=7, recompute=False)
    assert settled("cpu", {}) == PRESETS["cpu"]


@pytest.mark.parametrize("name", [*SIZES, "budget"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(InputError, match=rf"^--{name.replace('_', '-')}: expected a .* got 0$"):
        settled("tiny", {name: 0})
