"""What this machine has, which path each part of bpo-fast takes on it, and what to install for a faster one."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bpo_fast.engine import versions

# Tested ranges [first, first that is not], as in pyproject.toml.
TESTED = {
    "torch": ("2.11", "2.14"),
    "triton": ("3.6", None),
    "transformers": ("5.10", "6"),
    "vllm": (versions.FIRST, versions.END),
    "flash-attn": ("2.7", None),
}
DISTRIBUTIONS = {"vllm": versions.DISTRIBUTIONS}
MODULES = {"flash-attn": "flash_attn"}
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
COMMAND_TIMEOUT_S = 10.0
NO_TORCH, BROKEN_TORCH = "torch is not installed", "torch does not import"


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        name: what was looked at.
        status: "ok"; "missing" (not there, and the run takes another path); "warn" (there, but it will not do).
        detail: what was found.
        advice: what to do about it, or what that means; empty if nothing.
    """

    name: str
    status: Literal["ok", "missing", "warn"]
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """The facts that several checks share."""

    gpus: tuple[str, ...]
    torch_cuda: str | None
    torch_error: str
    num_cores: int
    memory_gib: float
    cpu: str
    isa: tuple[str, ...]

    @property
    def torch_imports(self) -> bool:
        return not self.torch_error.startswith((NO_TORCH, BROKEN_TORCH))

    @property
    def cuda_works(self) -> bool:
        return self.torch_cuda is not None and not self.torch_error


def diagnose() -> list[Check]:
    """Look at the machine and the installation; nothing that is absent or broken makes it fail."""
    machine = _machine()
    packages = {name: _package(name) for name in TESTED}
    flash_attn, kernel_path = _flash_attn(packages["flash-attn"], machine), _kernel_path(machine)
    return [
        Check("Python", "ok", platform.python_version()),
        _cpu(machine),
        _memory(machine),
        _gpu(machine),
        _torch(packages["torch"], machine),
        _required(packages["transformers"]),
        _triton(packages["triton"], machine),
        _vllm(packages["vllm"], machine),
        flash_attn,
        _compiler(),
        _nvcc(machine),
        *_sampling(packages["vllm"], machine),
        kernel_path,
        _attention_path(machine, flash_attn, kernel_path),
    ]


def _cpu(machine: Machine) -> Check:
    detail = f"{machine.cpu}, {machine.num_cores} cores, {', '.join(machine.isa) or 'no vector flags'}"
    narrow = not machine.cuda_works and "avx512_bf16" in machine.isa
    return Check("CPU", "ok", detail, "model.dtype=bfloat16 is faster than its default here, float32" if narrow else "")


def print_doctor(console: Console) -> None:
    """Print the diagnosis as a table, then what to do, one line each."""
    checks = diagnose()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    table.add_column("part", no_wrap=True)
    table.add_column("what this machine has")
    styles = {"ok": "green", "missing": "dim", "warn": "yellow"}
    for check in checks:
        table.add_row(Text(check.status, style=styles[check.status]), Text(check.name), Text(check.detail))
    console.print(table)
    advised = [check for check in checks if check.advice]
    if advised:
        console.print()
    for check in advised:
        console.print(Text(f"{check.name}: {check.advice}"), soft_wrap=True)


def environment(command: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a reader needs to repeat a run, flat, for env.json.

    Versions, machine, command line and the variables BPO_FAST_* and OMP_*; no host name, no user name, no other
    variable, and no value whose name speaks of a key, token, secret or password.

    Args:
        command: program and arguments as the user typed them; the home folder becomes ~, and a password in a URL ***.
    """
    machine = _machine()
    facts: dict[str, Any] = {"bpo_fast": _version("bpo-fast"), "python": platform.python_version()}
    facts |= {name: _version(name) for name in ("torch", "triton", "transformers", "vllm", "flash-attn", "numpy")}
    facts |= {
        "cuda": machine.torch_cuda,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": machine.cpu,
        "isa": " ".join(machine.isa),
        "cores": machine.num_cores,
        "memory_gib": round(machine.memory_gib, 1),
        "gpu": "; ".join(machine.gpus) or None,
        "command": _command_line(command),
    }
    facts |= _git_facts()
    secret = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
    kept = (name for name in sorted(os.environ) if name.startswith(("BPO_FAST_", "OMP_")) and not secret.search(name))
    return facts | {name: os.environ[name] for name in kept}


def _machine() -> Machine:
    torch_cuda, torch_error, torch_gpus = _torch_facts()
    cpu, isa = _cpu_facts()
    return Machine(
        gpus=torch_gpus or _nvidia_smi(),
        torch_cuda=torch_cuda,
        torch_error=torch_error,
        num_cores=_num_cores(),
        memory_gib=_memory_gib(),
        cpu=cpu,
        isa=isa,
    )


def _torch_facts() -> tuple[str | None, str, tuple[str, ...]]:
    """CUDA version torch was built for, why CUDA does not work (empty if it does), and the GPUs it sees."""
    if find_spec("torch") is None:
        return None, NO_TORCH, ()
    try:
        # Whether the driver serves this build of torch is only known by asking torch.
        import torch
    except (ImportError, OSError) as error:
        return None, f"{BROKEN_TORCH}: {_first_line(str(error))}", ()
    if not torch.cuda.is_available():
        return torch.version.cuda, "torch sees no CUDA device", ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        gpus.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}")
    return torch.version.cuda, "", tuple(gpus)


def _nvidia_smi() -> tuple[str, ...]:
    output = command_output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return tuple(line.strip() for line in output.splitlines() if line.strip())


def _cpu_facts() -> tuple[str, tuple[str, ...]]:
    info = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    known = set(flags.group(1).split()) if flags else set()
    model = name.group(1).strip() if name else platform.processor() or platform.machine()
    return model, tuple(flag for flag in ISA_FLAGS if flag in known)


def _num_cores() -> int:
    """Cores this process may use: its affinity, and the CPU quota of its container."""
    num = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        num = min(num, max(1, round(int(quota[0]) / int(quota[1]))))
    return num


def _memory_gib() -> float:
    num_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        num_bytes = min(num_bytes, int(limit))
    return num_bytes / 2**30


def _git_facts() -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent
    # An installed copy may lie inside somebody else's repository.
    if not (root / ".git").exists():
        return {}
    commit = command_output("git", "-C", str(root), "rev-parse", "HEAD").strip()
    changed = command_output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no").strip()
    return {"git_commit": commit, "git_changed": bool(changed)} if commit else {}


def _command_line(command: Sequence[str]) -> str | None:
    if not command:
        return None
    # `python -m bpo_fast` calls itself by the path of its __main__.py.
    program = "bpo-fast" if command[0].endswith("__main__.py") else Path(command[0]).name
    line = shlex.join([program, *command[1:]]).replace(os.path.expanduser("~"), "~")
    return re.sub(r"//[^/@\s]+@", "//***@", line)


def _version(name: str) -> str | None:
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def command_output(*command: str) -> str:
    """Standard output of a command; empty if it is not there or does not work."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _requirement(name: str) -> str:
    first, end = TESTED[name]
    return f'"{name}>={first}{f",<{end}" if end else ""}"'


def _package(name: str) -> Check:
    """Present and tested, present and untested, or missing."""
    version = _version(name)
    if version is None or find_spec(MODULES.get(name, name)) is None:
        return Check(name, "missing", "not installed", f"pip install {_requirement(name)}")
    first, end = TESTED[name]
    found = versions.numbers(version)
    if found < versions.numbers(first) or (end is not None and found >= versions.numbers(end)):
        advice = f"pip install {_requirement(name)}"
        return Check(name, "warn", f"{version}, outside the tested range {_requirement(name)[1:-1]}", advice)
    return Check(name, "ok", version)


def _required(check: Check) -> Check:
    return Check(check.name, "warn", "not installed, required", check.advice) if check.status == "missing" else check


def _memory(machine: Machine) -> Check:
    detail = f"{machine.memory_gib:.1f} GiB"
    if machine.memory_gib < 4:
        return Check("memory", "warn", detail, "the embedded default run wants 4 GiB")
    return Check("memory", "ok", detail)


def _gpu(machine: Machine) -> Check:
    if not machine.gpus:
        return Check("GPU", "missing", "none: everything runs on the CPU")
    if machine.cuda_works:
        num = len(machine.gpus)
        advice = f"train --devices {num} uses all of them" if num > 1 else ""
        return Check("GPU", "ok", "; ".join(machine.gpus), advice)
    advice = f"pip uninstall -y torch && pip install {_requirement('torch')}"
    if machine.torch_cuda is not None:
        advice = f"update the NVIDIA driver to one that serves CUDA {machine.torch_cuda}"
    return Check("GPU", "warn", f"{'; '.join(machine.gpus)}, but {machine.torch_error}", advice)


def _torch(check: Check, machine: Machine) -> Check:
    if check.status == "missing":
        return _required(check)
    if machine.torch_error.startswith(BROKEN_TORCH):
        advice = f"pip install --force-reinstall {_requirement('torch')}"
        return Check("torch", "warn", f"{check.detail}, {machine.torch_error}", advice)
    built = f"built for CUDA {machine.torch_cuda}" if machine.torch_cuda else "CPU build"
    return Check("torch", check.status, f"{check.detail}, {built}", check.advice)


def _triton(check: Check, machine: Machine) -> Check:
    if check.status == "missing" and not machine.gpus:
        return Check("triton", "missing", "not installed, not needed without a GPU")
    if check.status == "ok" and machine.gpus and not _python_header().is_file():
        advice = "install the headers of this Python (Debian, Ubuntu: apt-get install python3-dev)"
        return Check("triton", "warn", f"{check.detail}, launches nothing: {_python_header()} is not there", advice)
    return check


def _python_header() -> Path:
    """What Triton compiles its launchers with, where it looks."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    return Path(sysconfig.get_path("include", scheme)) / "Python.h"


def _vllm(check: Check, machine: Machine) -> Check:
    if check.status != "missing":
        return check
    if not machine.gpus:
        return Check("vllm", "missing", "not installed, sampling uses transformers")
    return Check("vllm", "missing", "not installed, sampling uses transformers", 'pip install "bpo-fast[vllm]"')


def _flash_attn(check: Check, machine: Machine) -> Check:
    if check.status == "missing":
        need = "optional" if machine.gpus else "not needed without a GPU"
        return Check("flash-attn", "missing", f"not installed, {need}")
    return check


def _compiler() -> Check:
    chosen = os.environ.get("CXX")
    name = chosen or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), "")
    version = _first_line(command_output(name, "--version")) if name else ""
    if version:
        return Check("C++ compiler", "ok", version)
    detail = f"CXX={chosen} does not run" if chosen else "none, the native CPU operators cannot be built"
    return Check("C++ compiler", "missing", detail, "install g++ 11 or newer (Debian, Ubuntu: apt-get install g++)")


def _nvcc(machine: Machine) -> Check:
    name = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "")) / "bin" / "nvcc")
    release = re.search(r"release ([\d.]+)", command_output(name, "--version"))
    if release is None:
        need = "optional: the GPU path is Triton" if machine.gpus else "not needed without a GPU"
        return Check("nvcc", "missing", f"none, {need}")
    if machine.torch_cuda and release.group(1).split(".")[0] != machine.torch_cuda.split(".")[0]:
        detail = f"{release.group(1)}, but torch is built for CUDA {machine.torch_cuda}"
        return Check("nvcc", "warn", detail, f"install the CUDA {machine.torch_cuda} toolkit")
    return Check("nvcc", "ok", release.group(1))


def _sampling(vllm: Check, machine: Machine) -> list[Check]:
    """What a run samples with; where that is vLLM, opens it on a tiny model first, which takes some seconds."""
    hf = Check("sampling path", "ok", "hf: the transformers model with its KV cache")
    if vllm.status != "ok" or find_spec("bpo_fast.engine.vllm") is None:
        return [hf]
    path = Check("sampling path", "ok", "vllm, in this process")
    if not machine.torch_imports or find_spec("bpo_fast.engine.self_test") is None:
        return [path]
    import torch

    name, advice = "vllm self-test", f"sample with sampling.engine = hf, or pip install {_requirement('vllm')}"
    fails = Check("sampling path", "warn", f"vllm, and a run fails: see {name}")
    try:
        from bpo_fast.engine.self_test import self_test
    except (ImportError, OSError) as error:
        return [Check(name, "warn", f"does not import: {_first_line(str(error))}", advice), fails]

    verdicts = self_test(torch.device("cuda" if machine.cuda_works else "cpu"))
    failed = [v for v in verdicts if not v.ok]
    if failed:
        found = Check(name, "warn", f"{failed[0].name}: {failed[0].detail}", advice)
        return [found, hf if failed[0].auto_is_hf else fails]
    return [Check(name, "ok", "; ".join(v.detail for v in verdicts)), path]


def _kernel_path(machine: Machine) -> Check:
    if not machine.torch_imports:
        return Check("kernel path", "warn", f"none: {machine.torch_error}")
    try:
        name = _backend_name("auto", "cuda") if machine.cuda_works else _backend_name("native", "cpu")
    except ValueError as error:
        return Check("kernel path", "warn", "torch: plain PyTorch, slower", str(error))
    return Check("kernel path", "ok", name)


def _backend_name(name: str, device: str) -> str:
    """The backend that serves a device; asking for "native" builds it, which is the proof that it can be built."""
    import torch
    from bpo_fast_kernels.backends import pick_backend

    return type(pick_backend(name, torch.device(device))).__name__.removesuffix("Backend").lower()


def _attention_path(machine: Machine, flash_attn: Check, kernel_path: Check) -> Check:
    """What `bpo_fast.varlen.pick_varlen` and `bpo_fast.attention.shared_prompt_attention` would take here."""
    capabilities = re.findall(r"sm_(\d+)", " ".join(machine.gpus))
    if machine.cuda_works and all(int(capability) >= 80 for capability in capabilities):
        varlen = "torch" if flash_attn.status == "missing" else "flash-attn"
        return Check("attention path", "ok", f"variable-length kernel of {varlen}; sdpa of torch in float32")
    native = "native in float32 and bfloat16, else " if kernel_path.detail == "native" else ""
    return Check("attention path", "ok", f"{native}sdpa of torch")
