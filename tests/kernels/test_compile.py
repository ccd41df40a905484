"""The Triton kernels compile for GPUs that are not here, spill no register, and keep float64."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tsdkd.fused import tiles_triton
from tsdkd.fused.tiles_torch import _TOPK_TILE

TARGETS = {"A100": 80, "H100": 90, "B200": 100}
KERNELS = {
    "normalisers": tiles_triton._normalisers,
    "sums": tiles_triton._sums_and_gradient,
    "student": tiles_triton._student_rows,
}
SIZES = {"fp32": (tl.float32, 2.0**-126), "fp64": (tl.float64, 2.0**-1022)}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(kernel, target, block=2048, warps=8, logits="bf16", work="fp32", **flags):
    """A kernel for a target, with every factor of a head that it has."""
    dtype, tiny = SIZES[work]
    factors = dict(s_scale=1.3, s_cap=30.0, t_scale=0.7, t_cap=20.0, inverse_tau=1 / 1.7, parameter=0.3)
    switches = dict(S_BIAS=True, S_CAP=True, T_BIAS=True, T_CAP=True, KIND=4, GRADIENT=True, SAMPLED=False)
    sizes = dict(vocab=151_936, TILE=_TOPK_TILE, BLOCK=block, WORK=dtype, TINY=tiny)
    values = {**factors, **switches, **sizes, **flags}
    types = {"s_ptr": f"*{logits}", "t_ptr": f"*{logits}", "ids_ptr": "*i64"}
    signature, constants = {}, {}
    for parameter in KERNELS[kernel].params:
        name = parameter.name
        pointer = f"*{work}" if name.endswith(("_ptr", "_bias")) else "i32"
        signature[name] = "constexpr" if parameter.is_constexpr else types.get(name, pointer)
        if parameter.is_constexpr:
            constants[name] = values[name]
    source = ASTSource(fn=KERNELS[kernel], signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", TARGETS[target], 32), options={"num_warps": warps})


def spilled(binary, folder):
    """Bytes of a thread's registers that went to memory, and how many registers it has."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    shown = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, memory = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", shown).groups())
    return stack + memory, registers


OVER = [("normalisers", 0), *(("sums", kind) for kind in tiles_triton.KINDS.values()), ("student", 0)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel,kind", OVER)
def test_no_configuration_that_autotune_may_choose_spills(kernel, kind, target, tmp_path):
    for config in tiles_triton.CONFIGS:
        for factors in (True, False):
            heads = dict.fromkeys(("S_BIAS", "S_CAP", "T_BIAS", "T_CAP"), factors)
            logits = "bf16" if factors else "fp32"
            binary = compiled(kernel, target, *config, KIND=kind, logits=logits, SAMPLED=factors, **heads)
            assert spilled(binary, tmp_path)[0] == 0, (config, factors)


def test_a_configuration_that_was_dropped_spills(tmp_path):
    """So that the law above is known to fail where it should."""
    assert (8192, 4) not in tiles_triton.CONFIGS
    assert spilled(compiled("sums", "H100", 8192, 4), tmp_path)[0] > 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", tiles_triton.KINDS.values(), ids=tiles_triton.KINDS)
def test_float64_stays_float64(kernel, kind):
    """A Python float that a kernel took as float32 would show as a conversion in its intermediate code."""
    code = compiled(kernel, "H100", 1024, 4, logits="fp64", work="fp64", KIND=kind, SAMPLED=True).asm["ttir"]
    assert "f64" in code and "f32" not in code
