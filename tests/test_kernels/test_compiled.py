"""Every kernel variant, compiled for five architectures: no GPU is needed to see that it fits."""

import pytest

from kernels import aot
from kernels._compile import CAPABILITIES, SHARED_LIMIT, build
from kernels._dispatch import INTERPRETED, triton

pytestmark = pytest.mark.skipif(triton is None or INTERPRETED, reason="needs Triton's compiler")
VARIANTS = aot.variants() if triton is not None and not INTERPRETED else []


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_fits_the_card(variant, capability):
    made = build(variant, capability)
    assert made.shared <= SHARED_LIMIT
    assert made.stack == 0, "registers spill to memory"
    assert made.registers <= variant.most_registers
    assert (made.mma > 0) == variant.dot
    assert made.vector_loads > 0, "no 128-bit load: are pointers and strides known to divide by 16?"
    if variant.weights:
        assert made.per_weight(variant) <= variant.most_per_weight * 1.05


def test_names_are_unique():
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
