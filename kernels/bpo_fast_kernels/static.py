"""Compiles every Triton kernel ahead of time and holds the machine code to budgets.json. Needs no GPU.

`python -m bpo_fast_kernels.static 90` prints one architecture's figures as JSON; `--write` renews its budget, and after
that `--widen`, in an environment with another triton, raises it to what that one makes: it holds for 3.6 and 3.9.
"""

import argparse
import bisect
import itertools
import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bpo_fast_kernels import triton_adamw, triton_gemm, triton_live, triton_pair, triton_passes, triton_trunk
from bpo_fast_kernels.triton_config import SHARED_BYTES, GemmConfig, gemm_config, with_tile
from bpo_fast_kernels.triton_live import live_config
from bpo_fast_kernels.triton_trunk import gate_config, norm_config

BUDGETS = Path(__file__).with_name("budgets.json")
ARCHS = (80, 89, 90, 100)
EXECUTABLE = 4  # SHF_EXECINSTR of an ELF section
# Arguments that hold no address and no stride: nothing is known of their divisibility at run time.
PLAIN = {"scale", "softcap", "slack", "limit", "beta", "smoothing", "vocab", "first", "num_tiles"}
PLAIN |= {"num_rows", "num_slots", "num_pairs", "tile_cols", "eps", "offset"}
ADAMW = {"lr", "beta1", "beta2", "rest_first", "rest_second", "log_first", "log_second", "kept"}
PLAIN |= ADAMW
FLOATS = {"scale", "softcap", "slack", "limit", "beta", "smoothing", "eps", "offset"}
FLOATS |= ADAMW
POINTERS = {
    "targets": "*i64",
    "cu_seqlens": "*i32",
    "lengths": "*i32",
    "flags": "*i32",
    "x": "*bf16",
    "w": "*bf16",
    "w_behavior": "*bf16",
    "e": "*bf16",
    "scaled": "*bf16",
    "ids": "*i64",
    "order": "*i64",
    "num_live": "*i32",
    "table": "*i64",
    "chunks": "*i32",
}


@dataclass(frozen=True)
class Build:
    """One kernel with its compile-time values, as a launcher would ask for it.

    Attributes:
        narrow: pointers to bfloat16 that are to float32 in other kernels.
    """

    name: str
    kernel: Any
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    descriptors: dict[str, list[int]] | None = None
    float32: bool = False
    narrow: tuple[str, ...] = ()


def builds(arch: int) -> Iterator[Build]:
    """Every kernel in the forms that the backends launch for bfloat16, and for float32 where these are other forms.

    float32 rows take Plan B, whose GEMMs are the library's: the passes differ, and the GEMMs over live rows.
    """
    forms = {"TOP": False, "FLAGGED": False, "STORE_E": True, "SECOND_HEAD": False, "HAS_CAP": False}
    main = gemm_config(arch, tma=True, softcap=False)
    yield _gemm("exp_gemm", main, forms)
    yield _gemm("exp_gemm_cap", gemm_config(arch, tma=True, softcap=True), forms | {"HAS_CAP": True})
    yield _gemm("exp_gemm_forward", main, forms | {"STORE_E": False})
    yield _gemm("exp_gemm_again", main, forms | {"FLAGGED": True})
    yield _gemm("exp_gemm_top", main, forms | {"STORE_E": False, "TOP": True, "FLAGGED": True})
    if main.tma:
        for tile in ("128x256x64x3p", "128x256x64x4p" if arch == 90 else "128x128x64x4p"):
            config = with_tile(main, tile, SHARED_BYTES[arch])
            yield _gemm(f"exp_gemm_{tile}", config, forms)
            yield _gemm(f"exp_gemm_forward_{tile}", config, forms | {"STORE_E": False})
        yield _gemm("exp_gemm_128x128x64x3w4", with_tile(main, "128x128x64x3w4"), forms)
    second = gemm_config(arch, tma=False, softcap=False)
    yield _gemm("exp_gemm_second_head", second, forms | {"SECOND_HEAD": True})
    for name in ("row_sums", "raise_shift"):
        yield Build(name, getattr(triton_gemm, f"{name}_kernel"), {"BLOCK_M": main.block_m})
    wide = {"HAS_CAP": False, "HAS_GAIN": False, "COLS": 4096}
    yield Build("exp_tile", triton_passes.exp_tile_kernel, wide, num_warps=8)
    yield Build("exp_tile_cap_gain", triton_passes.exp_tile_kernel, dict.fromkeys(wide, True) | {"COLS": 4096}, 8)
    yield Build("exp_tile_f32", triton_passes.exp_tile_kernel, wide, num_warps=8, float32=True)
    for cap in (False, True):
        name = "target_logit_cap" if cap else "target_logit"
        yield Build(name, triton_passes.target_logit_kernel, {"HAS_CAP": cap, "BLOCK": 1024})
    yield Build("target_logit_f32", triton_passes.target_logit_kernel, {"HAS_CAP": False, "BLOCK": 1024}, float32=True)
    for name in ("shrink", "settle", "finish", "unit_dx", "sequence_sum"):
        yield Build(name, getattr(triton_passes, f"{name}_kernel"), {"BLOCK": 1024})
    for name in ("settle", "unit_dx"):
        yield Build(f"{name}_f32", getattr(triton_passes, f"{name}_kernel"), {"BLOCK": 1024}, float32=True)
    yield Build("push_dw", triton_passes.push_dw_kernel, triton_passes.PUSH_BLOCKS)
    yield Build("push_dw_f32", triton_passes.push_dw_kernel, triton_passes.PUSH_BLOCKS, float32=True)
    for suffix, dtype in (("", torch.bfloat16), ("_f32", torch.float32)):
        for name in ("live_pull", "live_dw"):
            shape = live_config(dtype, cuda=True)
            warps, stages = shape.pop("num_warps"), shape.pop("num_stages")
            kernel = getattr(triton_live, f"{name}_kernel")
            yield Build(name + suffix, kernel, shape, warps, stages, float32=dtype == torch.float32)
    yield from _trunk()
    for name, kernel in triton_adamw.KERNELS.items():
        for suffix, grad, rounded in (("", torch.bfloat16, torch.bfloat16), ("_f32", torch.float32, None)):
            forms = {"HAS_SCALE": True, "HAS_INF": True, "ALIGNED": True, "CHUNK": triton_adamw.CHUNK}
            forms |= {"GRAD": triton_adamw.TYPES[grad], "ROUNDED": triton_adamw.TYPES[rounded]}
            yield Build(name + suffix, kernel, forms | triton_adamw.SIZES[name], triton_adamw.WARPS)
    for loss, number in triton_pair.LOSS_IDS.items():
        yield Build(f"pair_loss_{loss}", triton_pair.pair_loss_kernel, {"LOSS": number, "BLOCK": triton_pair.BLOCK})


def _trunk() -> Iterator[Build]:
    """Norms of narrow and of wide rows, whose programs hold whole ones, and gated activations."""
    for width in (128, 4096, triton_trunk.WIDEST):
        shape = norm_config(width)
        warps = shape.pop("num_warps")
        forms = {"": {"TWICE": True}, "_backward": {"SUMS": True}}
        for suffix, form in forms.items():
            kernel = getattr(triton_trunk, f"rms_norm{suffix}_kernel")
            yield Build(f"rms_norm{suffix}_{width}", kernel, form | shape, warps, narrow=("out", "dout", "dx"))
            if width == 4096:
                other = dict.fromkeys(form, False) | shape
                yield Build(f"rms_norm{suffix}_other", kernel, other, warps, narrow=("out", "dout", "dx"))
                yield Build(f"rms_norm{suffix}_f32", kernel, form | shape, warps)
    shape = gate_config(4096)
    warps = shape.pop("num_warps")
    for silu, name in ((True, "silu"), (False, "gelu")):
        for suffix in ("", "_backward"):
            kernel = getattr(triton_trunk, f"gated{suffix}_kernel")
            narrow = ("gate", "up", "out", "dout", "dgate", "dup")
            yield Build(f"gated_{name}{suffix}", kernel, {"SILU": silu} | shape, warps, narrow=narrow)
            yield Build(f"gated_{name}{suffix}_f32", kernel, {"SILU": silu} | shape, warps)


def _gemm(name: str, config: GemmConfig, forms: dict[str, bool]) -> Build:
    constexprs = forms | config.constexprs() | {"UPCAST": False}
    blocks = config.descriptor_blocks(forms["STORE_E"])
    return Build(name, triton_gemm.exp_gemm_kernel, constexprs, config.num_warps, config.num_stages, blocks)


def source(build: Build) -> ASTSource:
    """Argument types and divisibility as at run time: another kernel would be checked without them."""
    signature, attrs = {}, {}
    for i, name in enumerate(build.kernel.arg_names):
        if name in build.constexprs:
            signature[name] = "constexpr"
        elif build.descriptors and name in build.descriptors:
            rows, cols = build.descriptors[name]
            signature[name] = f"tensordesc<bf16[{rows}, {cols}]>"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in PLAIN or name.startswith(("stride", "width")):
            signature[name] = "i32"
        else:
            signature[name] = "*bf16" if name in build.narrow else POINTERS.get(name, "*fp32")
            if build.float32:
                signature[name] = signature[name].replace("bf16", "fp32")
        if name not in PLAIN and signature[name][0] in "*i":
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(build.kernel, signature, build.constexprs, attrs)


def tool(name: str, *args: str) -> str:
    """Output of a program of the CUDA tools that triton brings along."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


def figure(usage: str, name: str) -> int:
    """A number out of the resource usage, such as REG:190."""
    found = re.search(rf"{name}:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


def machine_code(cubin: bytes) -> bytes:
    """The instructions of the one kernel in an ELF file."""
    (table,), (size, num) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(num)]
    (code,) = (cubin[start : start + length] for _, _, flags, _, start, length in sections if flags & EXECUTABLE)
    return code


def disassembled(codes: list[bytes], arch: int) -> list[str]:
    """Each one's instructions, by one run of the disassembler, most of whose time is its start."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        listing = tool("nvdisasm", "-b", f"SM{arch}{'a' if arch >= 90 else ''}", file.name)
    ends, texts = list(itertools.accumulate(map(len, codes))), [""] * len(codes)
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/(.*)", listing):
        texts[bisect.bisect_right(ends, int(address, 16))] += text + "\n"
    assert all(text.count("\n") == len(code) // 16 for text, code in zip(texts, codes, strict=True))
    return texts


def measure(builds: Iterable[Build], arch: int) -> dict[str, dict[str, Any]]:
    """By name: registers, stack, spills, shared memory, tensor-core and copy instructions of compiled kernels."""
    compiled = {build.name: compiled_kernel(build, arch) for build in builds}
    codes = disassembled([machine_code(kernel.asm["cubin"]) for kernel in compiled.values()], arch)
    return {name: figures(kernel, code) for (name, kernel), code in zip(compiled.items(), codes, strict=True)}


def compiled_kernel(build: Build, arch: int) -> Any:
    """As triton compiles it without a GPU."""
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    return triton.compile(source(build), target=GPUTarget("cuda", arch, 32), options=options)


def figures(compiled: Any, code: str) -> dict[str, Any]:
    """What is measured of a kernel and its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
    found = set(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTMALDG|UTMASTG|LDGSTS)[.\w]*", code))
    if re.search(r"\bLDG\.E\.128\b", code):
        found.add("LDG.E.128")
    if "tcgen05.mma" in compiled.asm["ptx"]:
        found.add("tcgen05.mma")
    return {
        "registers": figure(usage, "REG"),
        "stack": figure(usage, "STACK"),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": compiled.metadata.shared,
        "instructions": sorted(found),
        "narrow": narrow_products(compiled.asm["ttir"]),
    }


def narrow_products(ttir: str) -> list[str]:
    """Products of a stride or a size in 32 bits, but for those with a constant: past 2^31 numbers they would wrap."""
    sizes, found = set(), []
    for line in ttir.splitlines():
        sizes.update(re.findall(r"(%(?:stride|width|vocab)\w*): i32", line))
        parts = re.match(r"\s*(%\w+) = ([\w.]+) ([^:]*) : ", line)
        if parts is None:
            continue
        to, operation, operands = parts.groups()
        if not sizes.intersection(re.findall(r"%\w+", operands)):
            continue
        if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            sizes.add(to)
        elif operation == "arith.muli" and not re.search(r"%c\d+_i32", operands):
            found.append(operands.replace(", ", " * "))
    return found


def over_budget(name: str, got: dict[str, Any], budget: dict[str, Any] | None, arch: int) -> list[str]:
    """What a kernel exceeds or lacks, in words."""
    if budget is None:
        return [f"{name}: no budget"]
    faults = [
        f"{name}: {key} {got[key]} > {budget[key]}"
        for key in ("registers", "stack", "spills", "shared")
        if got[key] > budget[key]
    ]
    if got["shared"] > SHARED_BYTES[arch]:
        faults.append(f"{name}: {got['shared']} bytes of shared memory do not fit sm_{arch}")
    faults += [f"{name}: {one} in 32 bits" for one in got["narrow"]]
    missing = [one for one in budget["instructions"] if one not in got["instructions"]]
    return faults + [f"{name}: no {one}" for one in missing]


def _budget(row: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    """What a kernel with these figures keeps, at least the old one; other instructions or any spills are not let in."""
    # releases of the assembler move a few registers; everything else is exact
    roomy = row | {"registers": min(255, row["registers"] + 8)}
    del roomy["narrow"]  # a fault in any number
    if old is None:
        return roomy
    return old | {key: roomy[key] for key in ("registers", "shared") if row[key] > old[key]}


def main() -> None:
    """Print figures and faults; exit 1 where a kernel is over its budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", type=int, choices=ARCHS)
    parser.add_argument("--write", action="store_true", help="make the figures the new budget")
    parser.add_argument("--widen", action="store_true", help="raise the budget to the figures where they are over it")
    options = parser.parse_args()
    got, key = measure(builds(options.arch), options.arch), str(options.arch)
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}
    if options.write or options.widen:
        old = {} if options.write else budgets[key]
        budgets[key] = {name: _budget(row, old.get(name)) for name, row in got.items()}
        BUDGETS.write_text(json.dumps(dict(sorted(budgets.items())), indent=1) + "\n")
    held = budgets.get(key, {})
    faults = [fault for name in got for fault in over_budget(name, got[name], held.get(name), options.arch)]
    print(json.dumps({"arch": options.arch, "kernels": got, "faults": faults}))
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
