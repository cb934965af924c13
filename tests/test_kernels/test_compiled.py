"""Kernels compile for five architectures, without a card, and fit them.

Each row names a kernel, the types of its arguments (without the compile-time ones, in order), the
compile-time ones, warps and stages. Pointers and row strides are taken as multiples of 16, as in a
real launch. `cuobjdump` comes with Triton.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from kernels import decode_attention, logprob, nf4, nf4_linear, rms_norm, rope, sample, swiglu
from kernels._dispatch import INTERPRETED, triton

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton is None or INTERPRETED, reason="needs Triton's compiler"),
]
# Ampere (A100, RTX 30), Ada (RTX 40), Hopper (H100, H200), Blackwell (RTX 50)
CAPABILITIES = (80, 86, 89, 90, 120)
SHARED_LIMIT = 101_376  # bytes a block: what sm_86, 89 and 120 have
PRODUCT = {"ASM": nf4_linear.decode_asm(torch.float16), "CONSTRAINTS": nf4_linear.CONSTRAINTS,
           "BYTES": nf4_linear.BYTES, "RUN": nf4.RUN, "BN": nf4_linear.BN}  # fmt: skip
PRODUCT_TYPES = "*i32 *u8 *u8 *fp32 *fp32 *fp32 *i32 *fp32 *fp16 *fp16 *fp16 fp32" + " i32" * 6
ROPE = {"HEADS": 32, "HALF": 64}  # 28 heads of 128
LOOK = {"K": 4, "GROUP": 7, "E": 128, "WIDTH": 128, "BLOCK": 32}
ROWS = {"BLOCK": logprob.BLOCK, "NEVER": logprob.NEVER}
# name: kernel, types, compile-time arguments, warps, stages, most registers; dot, if it has one
KERNELS = {
    "rms_norm": (rms_norm._rms_norm_forward_kernel, "*bf16 " * 5 + "*fp32 i32 i32 i32 fp32",
                 {"ADD": True, "BLOCK": 4096}, 8, 3, 64),
    "rms_norm backward": (rms_norm._rms_norm_backward_kernel,
                          "*bf16 " * 4 + "*fp32 *bf16 *fp32" + " i32" * 5,
                          {"ADD": True, "WEIGHT": True, "BLOCK": 4096}, 16, 3, 64),
    "rope": (rope._rope_forward_kernel, "*bf16 " * 8 + "i32 " * 9 + "fp32 fp32",
             {"NORM": True, **ROPE}, 4, 3, 128),
    "rope backward": (rope._rope_backward_kernel, "*bf16 " * 10 + "*fp32 " + "i32 " * 10 + "fp32",
                      {"WEIGHT": True, **ROPE}, 8, 3, 128),
    "swiglu": (swiglu._swiglu_forward_kernel, "*bf16 *bf16 *bf16 i32 i32 i32",
               {"BLOCK": swiglu.BLOCK}, swiglu.WARPS, 3, 64),
    "swiglu backward": (swiglu._swiglu_backward_kernel, "*bf16 " * 5 + "i32 i32 i32 i32",
                        {"BLOCK": swiglu.BLOCK}, swiglu.WARPS, 3, 64),
    "decode_attention": (decode_attention._partial_kernel,
                         "*bf16 *bf16 *bf16 *i32 *i32 *i32 *fp32 *fp32" + " i32" * 7 + " fp32",
                         {**LOOK, "TILE": decode_attention.LINES}, 4, 2, 168, "dot"),
    "decode_attention merge": (decode_attention._merge_kernel, "*fp32 *fp32 *bf16 i32 i32 i32",
                               {"E": 128, "WIDTH": 128, "LINES": 1}, 1, 3, 64),
    "logprob statistics": (logprob._statistics_kernel,
                           "*fp32 *i64 *fp32 *fp32 *fp32 *fp32 i32 i32 fp32",
                           {**ROWS, "LOWEST": logprob.LOWEST}, 8, 3, 128),
    "logprob coefficients": (logprob._coefficients_kernel,
                             "*fp32 *i64 *fp32 *fp32 *fp32 *fp32 *fp32 *bf16 i32 i32 i32 fp32",
                             {**ROWS, "UPSTREAM": True}, 8, 3, 64),
    "nf4": (nf4._nf4_dequantize_kernel, "*u8 *u8 *fp32 *fp32 *fp32 *fp32 *bf16 i32",
            {"BLOCK": nf4.BLOCK, "RUN": nf4.RUN, "WORDS": nf4.WORDS}, 4, 3, 64),
    "nf4 product, 16 rows": (nf4_linear._nf4_product_kernel, PRODUCT_TYPES,
                             {**PRODUCT, "SPLIT": True, "RANK": 16, "BIAS": True, "TURN": 2,
                              "BM": 16}, 2, 4, 128, "dot"),
    "nf4 product, 32 rows": (nf4_linear._nf4_product_kernel, PRODUCT_TYPES,
                             {**PRODUCT, "SPLIT": True, "RANK": 16, "BIAS": False, "TURN": 1,
                              "BM": 32}, 2, 4, 168, "dot"),
    "nf4 sum": (nf4_linear._nf4_sum_kernel,
                "*fp32 *fp16 *fp16 *fp16 *fp16 fp32 i32 i32 i32 i32",
                {"RANK": 16, "BIAS": True, "BM": 16, "BN": nf4_linear.BN}, 2, 3, 128, "dot"),
    "sample": (sample._sample_forward_kernel, "*fp32 *i32 *fp32 *fp32 *i32 *fp32 i32 i32 fp32",
               {"NOISE": True, "SPLIT": sample.SPLIT}, sample.WARPS, 3, 64),
    "sample merge": (sample._sample_merge_kernel,
                     "*fp32 *fp32 *i32 *fp32 *i32 *i64 *fp32 i32 fp32",
                     {"NOISE": True, "BLOCK": 256}, 1, 3, 64),
}  # fmt: skip
COUNTS = {"M", "S", "lines", "BLOCKS", "PART", "PARTS", "q_heads", "k_heads"}  # any number


@pytest.mark.parametrize("name", KERNELS)
def test_fits_every_card(name, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, warps, stages, most_registers, *dot = KERNELS[name]
    names, rest = kernel.arg_names, iter(types.split())
    signature = {arg: "constexpr" if arg in constants else next(rest) for arg in names}
    assert next(rest, None) is None, "more types than arguments"
    multiples_of_16 = {
        (names.index(arg),): [["tt.divisibility", 16]]
        for arg, kind in signature.items()
        if kind[0] in "*i" and arg not in COUNTS
    }
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for capability in CAPABILITIES:
        source = ASTSource(kernel, signature, dict(constants), multiples_of_16)
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": name != "nf4"}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        run = [tool, "--dump-resource-usage", cubin]
        usage = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        used = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        assert compiled.metadata.shared <= SHARED_LIMIT, capability
        assert used["STACK"] + used["LOCAL"] == 0, f"sm_{capability}: registers spill to memory"
        assert used["REG"] <= most_registers, f"sm_{capability}: {used}"
        ptx = compiled.asm["ptx"]
        assert bool(re.search(r"\b(mma|wgmma)\.", ptx)) == bool(dot), (
            f"sm_{capability}: tensor cores"
        )
        assert re.search(r"ld\.global\S*\.v4|cp\.async\.c[ag]", ptx), "no 128-bit load"
