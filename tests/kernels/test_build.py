import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bpo_fast_kernels import backends, build, linear_token_logps
from bpo_fast_kernels.native_backend import NativeBackend
from cases import random_case

COMPILERS = ("g++", "g++-11", "clang++", "clang++-14", "aarch64-linux-gnu-g++")  # those that are installed are tried


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and pickers that have not chosen yet."""
    monkeypatch.setenv("BPO_FAST_CACHE", str(tmp_path / "cache"))
    pickers = (backends._native_cpu, backends._auto_cpu, build.built_library)
    for picker in pickers:
        picker.cache_clear()
    yield tmp_path / "cache"
    for picker in pickers:
        picker.cache_clear()


@pytest.fixture
def small(fresh, monkeypatch, tmp_path):
    """Builds another text in place of ops_cpu.cpp, which takes many seconds."""

    def built(text, libraries=()):
        build.built_library.cache_clear()  # as in another process
        (tmp_path / "ops_cpu.cpp").write_text(text)
        monkeypatch.setattr(build, "source_dir", lambda: tmp_path)
        return build.built_library("ops_cpu.cpp", (build.find_cxx(), "-shared", "-fPIC"), libraries)

    return built


def test_a_library_is_built_once_and_found_again(fresh, small):
    times = []
    for _ in range(2):
        library = small("int one() { return 1; }")
        assert list(fresh.iterdir()) == [library]
        times.append(library.stat().st_mtime_ns)
    assert times[0] == times[1]
    assert small("int two() { return 2; }") != library


def test_other_flags_make_another_library(fresh, monkeypatch):
    compiled = []
    monkeypatch.setattr(build, "compile_library", lambda command, target: compiled.append(target.name))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    for flags in (("g++", "-O3"), ("g++", "-O2")):
        build.load_library("ops_cpu.cpp", flags, ())
    assert len(set(compiled)) == 2


def test_without_a_compiler_auto_says_so_once_and_runs_on_pytorch(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    case = random_case(6, 4, 9)
    with caplog.at_level(logging.WARNING, "bpo_fast_kernels"):
        got = [linear_token_logps(case.hidden, case.weight, case.targets) for _ in range(2)]
    assert torch.equal(got[0], linear_token_logps(case.hidden, case.weight, case.targets, backend="torch"))
    assert torch.equal(got[0], got[1])
    (message,) = (record.getMessage() for record in caplog.records)
    assert "no C++ compiler found" in message
    assert "\n" not in message


def test_auto_is_plan_b_on_a_gpu():
    triton_backend = pytest.importorskip("bpo_fast_kernels.triton_backend")
    assert type(backends.pick_backend("auto", torch.device("cuda"))) is triton_backend.TritonBackend


def test_without_a_compiler_native_is_refused(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    case = random_case(6, 4, 9)
    with pytest.raises(
        backends.BackendUnavailable, match=r"^backend = 'native': CXX=/no/such/compiler is not a program$"
    ):
        linear_token_logps(case.hidden, case.weight, case.targets, backend="native")


def test_who_has_no_home_needs_to_name_a_cache(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("BPO_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.Path, "home", homeless)
    with pytest.raises(build.NativeUnavailable, match="BPO_FAST_CACHE names one"):
        build.cache_dir()


def test_a_compiler_that_cannot_be_run_is_named(fresh, small, tmp_path, monkeypatch):
    broken = tmp_path / "broken-g++"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.NativeUnavailable, match=r"^broken-g\+\+ could not be run: "):
        small("int one() { return 1; }", ())
    assert not list(fresh.iterdir())


def test_an_interrupted_build_leaves_nothing(fresh, small, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(build.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small("int one() { return 1; }", ())
    assert not list(fresh.iterdir())


@pytest.mark.parametrize(("text", "libraries"), [("nonsense", ()), ("int one() { return 1; }", ("no_such",))])
def test_a_failed_build_names_the_error_and_leaves_nothing(fresh, small, text, libraries):
    with pytest.raises(build.NativeUnavailable, match=r"could not compile csrc: .*(error|-lno_such)") as caught:
        small(text, libraries)
    assert "\n" not in str(caught.value)
    assert not list(fresh.iterdir())


def test_a_cache_that_cannot_be_written_is_named(fresh, monkeypatch):
    fresh.write_text("a file where the folder should be")
    with pytest.raises(build.NativeUnavailable, match="cannot write to the cache folder"):
        NativeBackend()


@pytest.mark.parametrize(
    "flags", [["-mavx2", "-mfma", "-mno-avx512f"], ["-mno-avx", "-mno-avx512f"]], ids=["avx2", "sse2"]
)
def test_narrower_vectors_give_the_same_answers(fresh, tmp_path, flags, monkeypatch):
    """The tests of the native backend again in a process whose library is built for an older processor.

    It builds the library once, and this process finds it.
    """
    if os.uname().machine != "x86_64":
        pytest.skip("flags of x86-64")
    wrapper = tmp_path / "older-g++"
    wrapper.write_text(f'#!/bin/sh\nexec {build.find_cxx()} "$@" -march=x86-64-v2 {" ".join(flags)}\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    tests = Path(__file__).with_name("test_linear_logps.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-k",
        "native",
        str(tests),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    (library,) = fresh.iterdir()
    before = library.stat().st_mtime_ns
    command = (*build.cxx_command(), build.ABI_FLAG)
    assert build.built_library("ops_cpu.cpp", command, ("torch_cpu", "torch")) == library
    assert library.stat().st_mtime_ns == before


@pytest.mark.parametrize("compiler", filter(shutil.which, COMPILERS))
def test_compilers_understand_the_sources(compiler):
    """Ubuntu 22.04's GCC has no __builtin_shufflevector, GCC 12 no _Float16 on ARM."""
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-Wall", "-Werror", "-fsyntax-only", f"-I{include}"]
    if os.uname().machine == "x86_64" and not compiler.startswith("aarch64"):
        flags += ["-march=x86-64-v4", "-mavx512bf16"]  # what other processors leave out
    for source, own in {"ops_cpu.cpp": [build.ABI_FLAG], "arena_cpu.cpp": []}.items():
        command = [compiler, *flags, *own, str(build.source_dir() / source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_cuda_sources_compile(tmp_path, arch):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    root = Path(torch.__file__).parent / "include"
    command = [part for part in build.nvcc_command(arch) if part != "-shared"]
    for source in sorted(build.source_dir().glob("*.cu")):
        target = tmp_path / f"{source.stem}.cubin"
        done = subprocess.run(
            [*command, "-cubin", "-Xptxas=-v", f"-I{root}", str(source), "-o", str(target)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert target.stat().st_size > 0
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr


def test_cuda_sources_include_the_header_of_each_macro():
    """The other headers of PyTorch bring it along from some release on, which is not the oldest that is supported."""
    for source in sorted(build.source_dir().glob("*.cu")):
        text = source.read_text()
        assert "STD_CUDA_" not in text or "#include <torch/csrc/stable/macros.h>" in text
