import importlib
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from bpo_fast_kernels.static import ARCHS, BUDGETS, Build, builds, measure, over_budget
from bpo_fast_kernels.triton_config import BARRIER_BYTES
from triton.runtime import JITFunction


@pytest.mark.parametrize("arch", ARCHS)
def test_compiled_kernels_keep_their_budget(arch, tmp_path):
    """In a process of its own: the interpreter and the compiler cannot share one."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "bpo_fast_kernels.static", str(arch)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["faults"] == []
    assert done.returncode == 0
    assert set(report["kernels"]) == set(json.loads(BUDGETS.read_text())[str(arch)])
    float32 = [row["instructions"] for name, row in report["kernels"].items() if name.endswith("_f32")]
    assert float32
    assert not any("mma" in one.lower() for row in float32 for one in row), "tensor cores would round to TF32"


def test_no_kernel_escapes_the_budgets():
    files = [path for path in BUDGETS.parent.glob("*.py") if "@triton.jit" in path.read_text()]
    modules = [importlib.import_module(f"bpo_fast_kernels.{path.stem}") for path in files]
    found = {name for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)}
    kernels = {name for name in found if not name.startswith("_")}  # the others are called by kernels
    assert len(kernels) > 10
    for arch in ARCHS:
        assert {build.kernel.__name__ for build in builds(arch)} == kernels


@pytest.mark.parametrize(
    ("arch", "mma", "load"),
    [
        (80, "HMMA.16816.F32.BF16", "LDGSTS"),
        (89, "HMMA.16816.F32.BF16", "LDGSTS"),
        (90, "HGMMA.64x256x16.F32.BF16", "UTMALDG"),
        (100, "tcgen05.mma", "UTMALDG"),
    ],
)
def test_budgets_demand_no_spills_and_the_right_instructions(arch, mma, load):
    budget = json.loads(BUDGETS.read_text())[str(arch)]
    assert all(row["spills"] == row["stack"] == 0 for row in budget.values())
    main = budget["exp_gemm"]["instructions"]
    assert mma in main
    assert any(one.startswith(load) for one in main)


def test_what_is_over_budget_is_named():
    budget = {"registers": 100, "stack": 0, "spills": 0, "shared": 200_000, "instructions": ["HMMA"]}
    got = {"registers": 101, "stack": 8, "spills": 2, "shared": 200_000, "instructions": [], "narrow": ["%a * %b"]}
    faults = over_budget("k", got, budget, 80)
    assert faults == [
        "k: registers 101 > 100",
        "k: stack 8 > 0",
        "k: spills 2 > 0",
        "k: 200000 bytes of shared memory do not fit sm_80",
        "k: %a * %b in 32 bits",
        "k: no HMMA",
    ]
    assert over_budget("k", got, None, 80) == ["k: no budget"]


@triton.jit
def _rows_kernel(x, stride_x, width, WIDE: tl.constexpr):
    row = tl.program_id(0) * 2
    if WIDE:
        row = row.to(tl.int64)
    at = x + (row + tl.arange(0, 2))[:, None] * stride_x + tl.arange(0, 16)[None, :]
    for _ in range(0, width, 16):
        tl.store(at, 0.0)
        at += 16 * stride_x


@pytest.mark.parametrize("wide", [False, True])
def test_offsets_that_would_wrap_are_found(wide):
    found = measure([Build("rows", _rows_kernel, {"WIDE": wide}, narrow=("x",))], 90)
    assert len(found["rows"]["narrow"]) == (0 if wide else 1)


@pytest.mark.parametrize("arch", ["90", "100"])
def test_what_a_pipeline_takes_beside_its_tiles_is_reckoned_with(arch):
    """Or a whole tile of E would be chosen where it does not fit."""
    row = json.loads(BUDGETS.read_text())[arch]["exp_gemm_128x256x64x3p"]
    tiles = 2 * (3 * (128 + 256) * 64 + 128 * 256)
    assert tiles < row["shared"] <= tiles + BARRIER_BYTES
