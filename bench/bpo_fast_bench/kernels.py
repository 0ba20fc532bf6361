"""`bpo-fast bench kernels`: the fused operators against plain PyTorch and their peers, correctness first."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from bpo_fast_kernels.backends import BackendUnavailable, pick_backend
from bpo_fast_kernels.triton_config import INTERPRETED, with_tile

from bpo_fast.allocator import give_back_freed_memory
from bpo_fast.doctor import command_output, environment
from bpo_fast.files import write_atomic
from bpo_fast_bench.contenders import LENGTHS
from bpo_fast_bench.kernels_adamw import (
    AdamwInputs,
    AdamwProblem,
    adamw_answer,
    adamw_implementations,
    adamw_inputs,
)
from bpo_fast_bench.kernels_attention import (
    AttentionInputs,
    AttentionProblem,
    attention_answer,
    attention_implementations,
    attention_inputs,
)
from bpo_fast_bench.kernels_impls import (
    GRADS,
    Implementation,
    Inputs,
    Outcome,
    Problem,
    answer,
    errors,
    make_inputs,
)
from bpo_fast_bench.kernels_linear import (
    LinearInputs,
    LinearProblem,
    linear_answer,
    linear_implementations,
    linear_inputs,
)
from bpo_fast_bench.kernels_peers import PEERS, implementations
from bpo_fast_bench.kernels_trunk import (
    TrunkInputs,
    TrunkProblem,
    trunk_answer,
    trunk_implementations,
    trunk_inputs,
)

AnyProblem = Problem | AttentionProblem | LinearProblem | TrunkProblem
AnyInputs = Inputs | AttentionInputs | LinearInputs | TrunkInputs | AdamwInputs
ROW_OPS = ("norm", "gate", "adamw")  # whose shapes are rows and width
OPS = ("forward", "step", "behavior", "draw", "pair_loss", "attention", "linear", *ROW_OPS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CEILINGS = ("mm", "mm-f32")
OUR_BACKENDS = ("native", "torch", "triton", "triton-gemm")
OURS = (*OUR_BACKENDS, "masked", "varlen")  # the last two through kernels of others, which round as they do
# Ours must keep the promise of the operators. Peers only have to compute the same thing: their errors are reported.
# Errors of log-probs move the border of two tokens' shares by at most half of them. Logits of bfloat16 are off by up to
# 0.06 from 16 to 32, which averages out over a sequence only.
OUR_GATE = {"value": 1e-4, "logp": 1e-4, "token": 5e-5, **dict.fromkeys(GRADS, 4e-3)}
PEER_GATE = {"value": 3e-2, "logp": 1.2e-1, "token": 6e-2, **dict.fromkeys(GRADS, 5e-2)}
CPU_SHAPES = ((1024, 256, 32000), (1024, 1024, 32000))
GPU_SHAPES = ((4096, 2048, 128256), (4096, 4096, 128256))
QUICK_SHAPES = ((128, 64, 4000),)
ATTENTION_HEADS = {"cpu": 4, "cuda": 16}
QUICK_ATTENTION_SHAPES = ((24, 9, 2),)
# of a model of 2 million parameters and of Qwen2.5-0.5B; the last has the rows of prompts
LINEAR_LAYERS = ((192, 512), (896, 896), (896, 4864), (4864, 896))
LINEAR_SHAPES = (*((rows, *layer) for layer in LINEAR_LAYERS for rows in (32, 256)), (2048, 896, 896))
QUICK_LINEAR_SHAPES = ((5, 33, 48),)
TRUNK_SHAPES = {
    "cpu": ((1024, 256), (1024, 672), (4096, 1024)),
    "cuda": ((8192, 896), (8192, 4864), (8192, 4096)),
}
ADAMW_SHAPES = {"cpu": ((32000, 256), (4096, 1024)), "cuda": ((128256, 2048), (8192, 4096))}
QUICK_ROW_SHAPES = ((33, 48),)


@dataclass(frozen=True)
class KernelBench:
    """What to measure.

    Attributes:
        ops: of "forward", "step", "behavior", "draw", "pair_loss", "attention", "linear" (on a CPU, in float32),
            "norm", "gate", "adamw".
        heads: of "frozen", "trained"; for "step" and "behavior".
        shapes: (rows, hidden, vocabulary) each, or (prompt, completion, heads) where "attention" is the one operation,
            (rows, width, outputs) where "linear" is, (rows, width) where there are none but "norm", "gate" and
            "adamw"; the device's own list if empty.
        peers: of "compile", "liger", "liger-dpo", "cce", "verl", "verl-triton"; only where importable, and on a CPU
            none that is written in Triton.
        tiles: of Plan A beside its own, as `triton_config.with_tile` takes them; on a GPU.
        dtypes: of "float32", "bfloat16", "float16"; if empty, bfloat16 on a GPU and float32 and bfloat16 on a CPU,
            without bfloat16 where PyTorch's products of it take minutes (no AVX512_BF16), and both for "adamw"
            everywhere. "pair_loss" and "linear" take float32 whatever they are.
        data: "peaked" or "gauss".
        pairs: pairs of "forward", "step" and "attention".
        json_path: where the measurements go.
        plot_path: figure without its suffix; PNG and SVG are written.
        static: also compile every Triton kernel ahead of time and record its figures.
        quick: one small shape and few samples: a check of the bench, not a measurement.
    """

    ops: tuple[str, ...] = OPS
    heads: tuple[str, ...] = ("frozen", "trained")
    shapes: tuple[tuple[int, ...], ...] = ()
    peers: tuple[str, ...] = PEERS
    tiles: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    data: str = "peaked"
    pairs: int = 8
    json_path: Path | None = None
    plot_path: Path | None = None
    static: bool = False
    quick: bool = False


def run(options: KernelBench) -> dict[str, Any]:
    """Measure, write what was asked for, and return the record.

    Raises:
        ValueError: an option outside its choices.
    """
    check(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {"environment": receipt(device), "options": printable(options), "problems": []}
    if options.static:
        record["static"] = static_figures()
        write_json(record, options.json_path)
    for problem in problems(options, device):
        for dtype in dtypes_of(problem.op, options, device):
            record["problems"].append(measure(problem, dtype, device, options))
            write_json(record, options.json_path)
    if options.plot_path:
        from bpo_fast_bench.kernels_plot import plot

        plot(record, options.plot_path)
    return record


def write_json(record: dict[str, Any], path: Path | None) -> None:
    """Write what is measured so far; a bench that is cut off leaves that."""
    if path is not None:
        write_atomic(path, json.dumps(record, indent=1) + "\n")


def check(options: KernelBench) -> None:
    """Refuse what the options do not offer."""
    choices = {"ops": OPS, "heads": ("frozen", "trained"), "peers": PEERS, "dtypes": tuple(DTYPES)}
    for name, allowed in choices.items():
        for value in getattr(options, name):
            if value not in allowed:
                raise ValueError(f"bench.kernels.{name} = {value!r}: expected some of {', '.join(allowed)}")
    if options.data not in ("peaked", "gauss"):
        raise ValueError(f"bench.kernels.data = {options.data!r}: expected peaked or gauss")
    numbers = 2 if set(options.ops) <= set(ROW_OPS) else 3
    for shape in options.shapes:
        if len(shape) != numbers or min(shape) < 1:
            raise ValueError(f"bench.kernels.shapes = {shape}: expected {numbers} numbers, each at least 1")
    for tile in options.tiles:
        with_tile(INTERPRETED, tile)
    if options.pairs < 1:
        raise ValueError(f"bench.kernels.pairs = {options.pairs}: expected at least 1")


def problems(options: KernelBench, device: torch.device) -> list[AnyProblem]:
    """The questions, one an operation, head and shape."""
    default = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    shapes = options.shapes or (QUICK_SHAPES if options.quick else default)
    out = []
    for op in options.ops:
        if op == "pair_loss":
            out.append(Problem(op, "frozen", 4 * 4096, 1, 2, 256 if options.quick else 4096, options.data))
            continue
        if op == "attention":
            own = tuple((*lengths, ATTENTION_HEADS[device.type]) for lengths in LENGTHS.values())
            given = options.shapes if options.ops == (op,) else ()
            wanted = given or (QUICK_ATTENTION_SHAPES if options.quick else own)
            out += [AttentionProblem(*shape, pairs=options.pairs) for shape in wanted]
            continue
        if op == "linear":
            given = options.shapes if options.ops == (op,) else ()
            wanted = given or (QUICK_LINEAR_SHAPES if options.quick else LINEAR_SHAPES)
            out += [LinearProblem(*shape) for shape in wanted] if device.type == "cpu" else []
            continue
        if op in ROW_OPS:
            given = options.shapes if set(options.ops) <= set(ROW_OPS) else ()
            own = (ADAMW_SHAPES if op == "adamw" else TRUNK_SHAPES)[device.type]
            wanted = given or (QUICK_ROW_SHAPES if options.quick else own)
            out += [(AdamwProblem if op == "adamw" else TrunkProblem)(op, *shape) for shape in wanted]
            continue
        for shape in shapes:
            heads = options.heads if op in ("step", "behavior") else ("frozen",)
            out += [Problem(op, head, *shape, pairs=options.pairs, data=options.data) for head in heads]
    return out


def dtypes_of(op: str, options: KernelBench, device: torch.device) -> tuple[str, ...]:
    """The types that an operation is measured in."""
    if op in ("pair_loss", "linear"):
        return ("float32",)
    if options.dtypes:
        return options.dtypes
    if device.type == "cuda" and op != "adamw":
        return ("bfloat16",)
    multiplies = op not in ("norm", "gate", "adamw")
    return ("float32",) if multiplies and not torch.cpu._is_avx512_bf16_supported() else ("float32", "bfloat16")


def measure(problem: AnyProblem, dtype: str, device: torch.device, options: KernelBench) -> dict[str, Any]:
    """Gate, then time and weigh the implementations of one problem."""
    lengths = None
    if isinstance(problem, AttentionProblem):
        sets = attention_inputs(problem, device, DTYPES[dtype], 3)
        calls, want = attention_implementations(sets[0]), attention_answer(sets[0])
    elif isinstance(problem, LinearProblem):
        sets = linear_inputs(problem, 3)
        calls, want = linear_implementations(), linear_answer(sets[0])
    elif isinstance(problem, AdamwProblem):
        sets = adamw_inputs(problem, device, DTYPES[dtype], 3)
        calls, want = adamw_implementations(sets[0], peers=bool(options.peers)), adamw_answer(sets[0])
    elif isinstance(problem, TrunkProblem):
        sets = trunk_inputs(problem, device, DTYPES[dtype], 3)
        calls, want = trunk_implementations(problem, sets[0], options.peers), trunk_answer(problem, sets[0])
    else:
        sets = make_inputs(problem, device, DTYPES[dtype], 3)
        calls = implementations(problem, device, options.peers, options.tiles)
        want, lengths = answer(problem, sets[0]), sets[0].cu_seqlens.diff()
    rows, passed = {}, {}
    for name, call in calls.items():
        try:
            rows[name] = gate(name, call, sets[0], want, lengths)
        except Exception as error:  # no compiler, no memory, another library's change: the others are timed
            rows[name] = {"passed": False, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
            rows[name] |= {"unavailable": True} if isinstance(error, BackendUnavailable) else {}
        if rows[name]["passed"]:
            passed[name] = call
    del want
    brief = device.type == "cuda" or problem.op in ("linear", *ROW_OPS)  # calls of milliseconds
    warmups, rounds = (1, 2) if options.quick else (25, 15) if brief else (2, 5)
    for name, samples in interleave(passed, sets, device, warmups, rounds).items():
        low, *_, high = quantiles(samples, n=5)
        seconds = median(samples)
        rows[name] |= {"seconds": seconds, "p20": low, "p80": high, "samples": len(samples)}
        if isinstance(problem, TrunkProblem):
            rows[name]["effective_gbps"] = problem.min_bytes(DTYPES[dtype]) / seconds / 1e9
        else:
            rows[name]["effective_tflops"] = problem.min_flop() / seconds / 1e12
    for name, call in passed.items():
        rows[name]["extra_mib"] = extra_mib(call, sets[0], device)
    for row in rows.values():
        if "seconds" in row and "seconds" in rows["eager"]:
            row["against_eager"] = against(rows["eager"], row)
    label = problem.label() if problem.op == "pair_loss" else f"{problem.label()} {dtype}"
    return {"problem": asdict(problem), "dtype": dtype, "label": label, "implementations": rows}


def gate(
    name: str, call: Implementation, inputs: AnyInputs, want: Outcome, lengths: torch.Tensor | None
) -> dict[str, Any]:
    """Errors against float64; an implementation past its limits gets no time."""
    outcome = call(inputs)
    if name in CEILINGS:
        return {"passed": True}
    if isinstance(inputs, AttentionInputs) and outcome.values.shape != want.values.shape:
        outcome = inputs.shared(outcome)
    mine = name.partition(":")[0] in OUR_BACKENDS
    limits, found = OUR_GATE if mine else PEER_GATE, errors(outcome, want, lengths)
    # What an operator puts out is rounded to its type, and in there a factor of it may be.
    limits = limits | {"value": limits["value"] + torch.finfo(outcome.values.dtype).eps}
    if lengths is not None and len(lengths) != len(want.values):
        # A pair loss sums the errors of all tokens of two sequences.
        limits = limits | {"value": limits["value"] * float(lengths.max()) * 2}
    return {"errors": found, "passed": all(found[key] <= limits[key] for key in found)}


def interleave(
    calls: dict[str, Implementation], sets: Sequence[AnyInputs], device: torch.device, warmups: int, rounds: int
) -> dict[str, list[float]]:
    """Times in seconds: A B C C B A a round, another input set every call."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmups):
        for call in calls.values():
            call(sets[i % len(sets)])
    order = [*calls, *reversed(calls)]
    for _ in range(rounds):
        for name in order:
            inputs = sets[len(samples[name]) % len(sets)]
            samples[name].append(timed(calls[name], inputs, device))
    return samples


def timed(call: Implementation, inputs: AnyInputs, device: torch.device) -> float:
    """Seconds of one call: events on a GPU, the clock on a CPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(inputs)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    call(inputs)
    return time.perf_counter() - begun


def extra_mib(call: Implementation, inputs: AnyInputs, device: torch.device) -> float:
    """Peak memory above the inputs and above the gradients that the implementation must return."""
    outcome = call(inputs)
    returned = sum(t.nbytes for t in outcome.grads.values())
    del outcome
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(inputs)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before - returned) / 2**20
    # Free pages and what a backend keeps between calls go back to the system first, else the peak could hide in them;
    # "5" resets the kernel's peak counter.
    with contextlib.suppress(BackendUnavailable):
        pick_backend("native", device).release()
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call(inputs)
    return _resident("VmHWM") - before - returned / 2**20


def _resident(field: str) -> float:
    """MiB from the kernel's accounts of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def against(eager: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """How many times faster and leaner than eager; a speed-up counts only where the p20 to p80 intervals are apart."""
    apart = row["p80"] < eager["p20"] or row["p20"] > eager["p80"]
    return {
        "speedup": eager["seconds"] / row["seconds"],
        "apart": apart,
        "memory": eager["extra_mib"] / max(row["extra_mib"], 0.1),
    }


def check_ours(record: dict[str, Any]) -> None:
    """Raises RuntimeError where one of ours failed or is wrong; one that cannot run on this machine is neither."""
    for problem in record["problems"]:
        for name, row in problem["implementations"].items():
            ours = name.partition(":")[0] in OURS
            if ours and not row["passed"] and "unavailable" not in row:
                reason = row.get("reason", f"errors {row.get('errors')} against float64")
                raise RuntimeError(f"bench.kernels, {problem['label']}: {name}: {reason}")


def static_figures() -> dict[str, Any]:
    """Ahead-of-time figures of every Triton kernel, an architecture a process.

    Raises:
        RuntimeError: a process that ended without figures.
    """
    out = {}
    for arch in (80, 89, 90, 100):
        command = [sys.executable, "-W", "ignore", "-m", "bpo_fast_kernels.static", str(arch)]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        try:
            out[str(arch)] = json.loads(done.stdout)
        except json.JSONDecodeError:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            reason = lines[-1] if lines else f"exit code {done.returncode}"
            raise RuntimeError(f"bench.kernels.static: the kernels do not compile for sm_{arch}: {reason}") from None
    return out


def receipt(device: torch.device) -> dict[str, Any]:
    """When, where and with what the figures were taken."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    out = {"date": date, **environment(sys.argv), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        fields = "name,driver_version,clocks.sm,clocks.max.sm,power.limit"
        out["gpu_state"] = command_output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").strip()
    return out


def printable(options: KernelBench) -> dict[str, Any]:
    """The options as JSON can hold them, output paths left out."""
    return asdict(replace(options, json_path=None, plot_path=None))


def table(record: dict[str, Any]) -> str:
    """The record as lines of text."""
    lines = []
    for problem in record["problems"]:
        lines.append(problem["label"])
        rate = "GB/s" if problem["problem"]["op"] in ROW_OPS else "TFLOP/s"
        head = ("", "ms", "p20", "p80", rate, "x eager", "extra MiB", "x leaner", "error")
        wide = max(12, *(len(name) + 1 for name in problem["implementations"]))
        lines.append("  {:<{wide}}{:>10}{:>10}{:>10}{:>9}{:>9}{:>11}{:>10}{:>10}".format(*head, wide=wide))
        for name, row in problem["implementations"].items():
            worst = max(row.get("errors", {"": 0.0}).values())
            if "seconds" not in row:
                reason = row.get("reason", f"error {worst:.1e} against float64")
                lines.append(f"  {name:<{wide}} not timed: {reason}")
                continue
            ms = [1e3 * row[key] for key in ("seconds", "p20", "p80")]
            speedup = leaner = "-"  # eager failed its gate
            if "against_eager" in row:
                ratio = row["against_eager"]
                speedup, leaner = f"{'' if ratio['apart'] else '~'}{ratio['speedup']:.2f}", f"{ratio['memory']:.1f}"
            effective = f"{row['effective_gbps']:.1f}" if rate == "GB/s" else f"{row['effective_tflops']:.3f}"
            cells = f"{effective:>9}{speedup:>9}{row['extra_mib']:>11.1f}{leaner:>10}"
            lines.append(f"  {name:<{wide}}{ms[0]:>10.3f}{ms[1]:>10.3f}{ms[2]:>10.3f}{cells}{worst:>10.1e}")
    for arch, figures in record.get("static", {}).items():
        worst = max(row["registers"] for row in figures["kernels"].values())
        lines.append(
            f"sm_{arch}: {len(figures['kernels'])} kernels, at most {worst} registers, faults: {figures['faults']}"
        )
    return "\n".join(lines)


def parse_shape(text: str) -> tuple[int, ...]:
    """ "1024x256x32000" -> (1024, 256, 32000)."""
    parts = text.split("x")
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"bench.kernels.shapes = {text!r}: expected numbers, such as 1024x256x32000")
    return tuple(map(int, parts))
