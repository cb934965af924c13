"""Writers in turns are computed once each, the oldest goes first, and no answer changes."""

import pytest
import torch
from fixtures import CANDIDATES, EXEMPLARS, make_base, plain
from nanopersrm.judge.prefixes import PREFIXES, Prefixes
from test_judge import PAIRS, QUICK, fresh

from nanopersrm.judge import prefixes
from nanopersrm.model.sampler import SHARED_LEAST, Prefix, prefill
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load

WRITERS = [EXEMPLARS] + [[f"Writer {k} wrote this. " * 6, "And so on."] for k in range(PREFIXES)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("prefixes") / "smollm", "smollm")


@pytest.fixture
def made(monkeypatch) -> list[list[int]]:
    """The ids of every beginning that was computed."""
    made: list[list[int]] = []

    def counting(model: Model, ids: list[int]) -> Prefix:
        made.append(ids)
        return prefill(model, ids)

    monkeypatch.setattr(prefixes, "prefill", counting)
    return made


@pytest.mark.parametrize("config", [QUICK, PAIRS], ids=["pointwise", "pairwise"])
def test_two_writers_in_turns_are_computed_once_each(base, made, config):
    two = WRITERS[:2]
    expected = [plain(fresh(base).judge(who, CANDIDATES[:2], config=config)) for who in two]
    made.clear()
    judge = fresh(base)
    for _ in range(3):
        for who, before in zip(two, expected, strict=True):
            assert plain(judge.judge(who, CANDIDATES[:2], config=config)) == before
    assert len(made) == 2
    assert expected[0]["scores"] != expected[1]["scores"]


def test_one_writer_too_many_pushes_out_the_oldest(base, made):
    judge = fresh(base)

    def asked(k: int) -> int:
        """Judge for writer k -> how many beginnings that took."""
        before = len(made)
        found = judge.judge(WRITERS[k], CANDIDATES[:2], config=QUICK)
        taken = len(made) - before
        assert plain(found) == plain(fresh(base).judge(WRITERS[k], CANDIDATES[:2], config=QUICK))
        return taken

    assert len(WRITERS) == PREFIXES + 1
    assert [asked(k) for k in range(PREFIXES)] == [1] * PREFIXES
    assert asked(0) == 0  # so that writer 1 is the oldest now
    assert asked(PREFIXES) == 1
    assert [asked(k) for k in (0, *range(2, PREFIXES + 1))] == [0] * PREFIXES
    assert asked(1) == 1
    assert len(judge._prefixes.kept) == PREFIXES


def test_together_they_are_no_longer_than_one_context(base, made):
    model = load(base, torch.float32, torch.device("cpu"))
    kept, context = Prefixes(model), model.config.context
    half = context // 2
    texts = [[k] * n for k, n in ((5, half), (6, context - half), (7, 20), (8, context))]
    held = []
    for ids in texts:
        found = kept.of(ids)
        assert found is not None
        assert found.ids == ids
        held.append([prefix.ids[0] for prefix in kept.kept])
        assert sum(prefix.cache.levels[0].lengths[0] for prefix in kept.kept) <= context
    assert held == [[5], [5, 6], [6, 7], [8]]
    assert len(made) == 4


def test_the_old_is_forgotten_before_the_new_is_computed(base, monkeypatch):
    """Else two contexts would be in memory for a while."""
    kept = Prefixes(load(base, torch.float32, torch.device("cpu")))
    there: list[int] = []

    def looking(model: Model, ids: list[int]) -> Prefix:
        there.append(len(kept.kept))
        return prefill(model, ids)

    monkeypatch.setattr(prefixes, "prefill", looking)
    for k in range(2):
        kept.of([k] * kept.model.config.context)
    assert there == [0, 0]


def test_what_is_too_short_is_not_kept_and_pushes_nobody_out(base):
    kept = Prefixes(load(base, torch.float32, torch.device("cpu")))
    first = kept.of([3] * SHARED_LEAST)
    assert kept.of([4] * (SHARED_LEAST - 1)) is None
    assert kept.of([3] * SHARED_LEAST) is first
    assert kept.kept == [first]


@pytest.mark.parametrize(
    ("layers", "heads", "width", "bytes_a_token"), [(30, 3, 64, 23_040), (28, 4, 128, 57_344)]
)
def test_the_bytes_in_the_docstring(layers: int, heads: int, width: int, bytes_a_token: int):
    """What one more token takes in a tree of these shapes."""
    from nanopersrm.model.cache import KVCache

    assert prefixes.__doc__ is not None
    assert f"{bytes_a_token:,} bytes in 16 bits" in prefixes.__doc__
    cache = KVCache(layers, heads, heads, width, torch.zeros(1, dtype=torch.bfloat16))
    level = cache.grow([0], 10)
    assert level.keys.nbytes + level.values.nbytes == 10 * bytes_a_token
