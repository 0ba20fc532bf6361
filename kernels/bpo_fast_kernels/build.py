"""Builds the native code of csrc/ on first use and keeps the result in a cache folder.

The cache is `$BPO_FAST_CACHE`, else `$XDG_CACHE_HOME/bpo-fast`, else `~/.cache/bpo-fast`. A library's name carries a
hash of its sources, the compiler, the flags, the PyTorch version and the processor's features: nothing stale is loaded.
"""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

# Built against the oldest stable ABI that the package supports; one build serves every later PyTorch.
ABI_FLAG = "-DTORCH_TARGET_VERSION=0x020b000000000000"


class NativeUnavailable(RuntimeError):
    """The native code cannot be built here; the message says why in one line."""


def source_dir() -> Path:
    """csrc/ beside the installed package, or at the root of the repository."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "csrc", here.parents[2] / "csrc"):
        if (folder / "ops_cpu.cpp").is_file():
            return folder
    raise NativeUnavailable("the csrc folder is not part of this installation")


def cache_dir() -> Path:
    """The folder that built libraries live in; NativeUnavailable where nobody is at home."""
    if chosen := os.environ.get("BPO_FAST_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bpo-fast"
    except RuntimeError as error:  # HOME is not set, and the user has no entry
        raise NativeUnavailable(f"there is no cache folder: {error}; BPO_FAST_CACHE names one") from error


def find_cxx() -> str:
    """Path of the C++ compiler: $CXX, else the usual names."""
    if chosen := os.environ.get("CXX"):
        if path := shutil.which(chosen):
            return path
        raise NativeUnavailable(f"CXX={chosen} is not a program")
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name):
            return path
    raise NativeUnavailable("no C++ compiler found (looked for g++, c++, clang++; set CXX to name one)")


def find_nvcc() -> str:
    """Path of nvcc: on PATH, else under $CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    if path := shutil.which("nvcc") or (shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None):
        return path
    raise NativeUnavailable("no CUDA compiler found (nvcc on PATH, or CUDA_HOME)")


def cxx_command() -> list[str]:
    """Compiler and flags of the CPU library, sources and output left out."""
    tuned = {"x86_64": ["-march=native"], "aarch64": ["-mcpu=native"]}.get(platform.machine(), [])
    return [find_cxx(), "-std=c++20", "-O3", *tuned, "-fno-math-errno", "-fPIC", "-shared"]


def nvcc_command(arch: str) -> list[str]:
    """Compiler and flags of the CUDA library for one architecture such as "90a"."""
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    return [find_nvcc(), "-std=c++20", "-O3", gencode, "-Xcompiler=-fPIC", "-shared", "-DUSE_CUDA"]


def _cpu_features() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def load_library(source: str, command: tuple[str, ...], libraries: tuple[str, ...]) -> None:
    """Registers the operators of `source`, which is on the stable ABI."""
    torch.ops.load_library(str(built_library(source, (*command, ABI_FLAG), libraries)))


@functools.cache
def built_library(source: str, command: tuple[str, ...], libraries: tuple[str, ...]) -> Path:
    """Compiles `source` of csrc/ unless a cached library fits.

    Args:
        source: name of the file.
        command: compiler and flags.
        libraries: of PyTorch, to link with.

    Raises:
        NativeUnavailable: it cannot be compiled here.
    """
    folder = source_dir()
    root = Path(torch.__file__).parent
    texts = [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in {".h", Path(source).suffix}]
    key = hashlib.sha256(repr((texts, command, torch.__version__, _cpu_features())).encode()).hexdigest()[:20]
    target = cache_dir() / f"{Path(source).stem}-{key}.so"
    if not target.is_file():
        links = [f"-L{root / 'lib'}", *(f"-l{name}" for name in libraries)]
        compile_library([*command, f"-I{root / 'include'}", str(folder / source), *links], target)
    return target


def compile_library(command: list[str], target: Path) -> None:
    """Compile to a temporary name and rename: processes that build at once do not see halves."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=target.parent, suffix=".so.tmp")
    except OSError as error:
        raise NativeUnavailable(f"cannot write to the cache folder {target.parent}: {error.strerror}") from error
    os.close(handle)
    compiler = Path(command[0]).name
    try:
        done = subprocess.run([*command, "-o", draft], capture_output=True, text=True)
        if done.returncode:
            lines = (line for line in done.stderr.splitlines() if re.search("error|cannot find", line))
            reason = next(lines, done.stderr.strip()[-200:])
            raise NativeUnavailable(f"{compiler} could not compile csrc: {reason}")
        os.replace(draft, target)
    except OSError as error:
        raise NativeUnavailable(f"{compiler} could not be run: {error.strerror}") from error
    finally:
        Path(draft).unlink(missing_ok=True)
