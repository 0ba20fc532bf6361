"""The process is the same after vLLM starts, samples and closes; a process group that was there stays."""

import gc
import os
import random
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_vllm import MAX_LENGTH, greedy_by_transformers, prompts, settings

from bpo_fast.engine import SamplingParams, host_state
from bpo_fast.engine.host_state import preserved
from bpo_fast.setup import load_learner


def state():
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "set threads": torch.set_num_threads,
        "accelerator": [getattr(torch.accelerator, n) for n in ("synchronize", "empty_cache", "get_memory_info")],
        "cuda": [getattr(torch.cuda, n) for n in ("Event", "Stream", "set_stream", "current_stream", "stream")],
        "events": (torch.Event, torch.Tensor.pin_memory, torch.Tensor.record_stream),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "precision": torch.get_float32_matmul_precision(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "environ": dict(os.environ),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1)],
        "gc": (gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()),
        "warnings": list(warnings.filters),
        "excepthook": sys.excepthook,
        "directory": os.getcwd(),
    }


@pytest.mark.parametrize("num_threads", [1, 2])
def test_nothing_of_the_process_changes(llama_dir, learner, capfd, num_threads):
    torch.set_num_threads(num_threads)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    import bpo_fast.engine.vllm  # noqa: F401

    before = state()
    assert before["threads"] == num_threads
    try:
        policy, engine = learner(llama_dir, model__full=True)
        after_start = state()
        engine.refresh(0)
        engine.generate(prompts(3), SamplingParams(8), run_seed=0, policy_version=0)
        after_sampling = state()
        engine.close()
        after_close = state()
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, value in before.items():
        assert after_start[name] == value, name
        assert after_sampling[name] == value, name
        assert after_close[name] == value, name
    assert not torch.distributed.is_initialized()
    out, err = capfd.readouterr()
    noise = [line for line in (out + err).splitlines() if line.strip() and "Loading weights" not in line]
    assert noise == []
    # the weights outlive the engine
    policy.model.train()
    policy.model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    engine.close()


def test_an_engine_after_another(llama_dir, learner):
    questions = prompts(3)
    for _ in range(2):
        policy, engine = learner(llama_dir, model__full=True)
        engine.refresh(0)
        drawn = engine.generate(questions, SamplingParams(8, temperature=0.0), run_seed=0, policy_version=0)
        assert [c[0].ids for c in drawn] == greedy_by_transformers(policy, questions, 8)
        engine.close()


def test_an_engine_that_nobody_holds_is_closed(llama_dir):
    for _ in range(2):
        load_learner(settings(llama_dir, model__full=True), torch.device("cpu"), MAX_LENGTH, lambda line: None)


def test_a_policy_that_cannot_be_built_leaves_no_engine(llama_dir, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("no such policy")

    arguments = settings(llama_dir), torch.device("cpu"), MAX_LENGTH, lambda line: None
    with monkeypatch.context() as patch:
        patch.setattr("bpo_fast.policy.Policy", refuse)
        with pytest.raises(ValueError, match="no such policy"):
            load_learner(*arguments)
    load_learner(*arguments)[1].close()


@pytest.mark.parametrize("is_grouped", [False, True])
def test_a_start_that_fails_half_way_leaves_nothing_behind(llama_dir, learner, monkeypatch, tmp_path, is_grouped):
    import bpo_fast.engine.vllm  # noqa: F401

    if is_grouped:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        before = state()
        with monkeypatch.context() as patch:
            patch.setattr("bpo_fast.engine.session.kv_budget", lambda *args: 1000)
            with pytest.raises(
                ValueError,
                match=r"^sampling\.engine = vllm: .*(cache blocks|KV cache memory).*; choose sampling\.engine = hf",
            ):
                learner(llama_dir, model__full=True)
        after = state()
        for name, value in before.items():
            assert after[name] == value, name
        assert torch.distributed.is_initialized() == is_grouped
        policy, engine = learner(llama_dir, model__full=True)
        engine.refresh(0)
        [[c]] = engine.generate(prompts(1), SamplingParams(8, temperature=0.0), run_seed=0, policy_version=0)
        assert [c.ids] == greedy_by_transformers(policy, prompts(1), 8)
        engine.close()
        assert torch.distributed.is_initialized() == is_grouped
    finally:
        if is_grouped:
            torch.distributed.destroy_process_group()


def test_a_process_group_that_was_there_stays(llama_dir, learner, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        _, engine = learner(llama_dir, model__full=True)
        engine.refresh(0)
        engine.close()
        value = torch.ones(2)
        torch.distributed.all_reduce(value)
        assert value.tolist() == [1.0, 1.0]
    finally:
        torch.distributed.destroy_process_group()


RANK = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_vllm import MAX_LENGTH, prompts, settings

from bpo_fast.engine import SamplingParams
from bpo_fast.setup import load_learner

dist.init_process_group("gloo")
policy, engine = load_learner(
    settings(Path(sys.argv[1]), model__full=True), torch.device("cpu"), MAX_LENGTH, lambda line: None
)
with torch.no_grad():  # what data-parallel training does: the same step everywhere
    for parameter in policy.parameters():
        parameter.mul_(1.01)
engine.refresh(1)
mine = prompts(8)[dist.get_rank() :: 2]
drawn = engine.generate(mine, SamplingParams(8), run_seed=0, policy_version=1)
every = [None, None]
dist.all_gather_object(every, {c.prompt_id: c.ids for [c] in drawn})
alone = engine.generate(prompts(8), SamplingParams(8), run_seed=0, policy_version=1)
assert {c.prompt_id: c.ids for [c] in alone} == every[0] | every[1]
engine.close()
value = torch.ones(2) * (1 + dist.get_rank())
dist.all_reduce(value)
assert value.tolist() == [3.0, 3.0]
dist.destroy_process_group()
print("rank is done")
"""


def test_two_processes_of_torchrun_have_an_engine_each(llama_dir, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "rank.py"), str(llama_dir)],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rank is done") == 2


UNCLOSED = """
import atexit
import sys
from pathlib import Path

import torch
from tiny_vllm import MAX_LENGTH, settings

from bpo_fast.engine import session, vllm
from bpo_fast.setup import load_learner

open_session, shut_down = vllm.open_session, session._shut_down


def open_and_register(*args):
    opened = open_session(*args)
    atexit.register(print, "the allocator ends")  # as vLLM's does at its start
    return opened


def shut_down_and_tell(*args):
    shut_down(*args)
    print("vLLM is shut down")


vllm.open_session, session._shut_down = open_and_register, shut_down_and_tell
learner = load_learner(
    settings(Path(sys.argv[1]), model__full=True), torch.device("cpu"), MAX_LENGTH, lambda line: None
)
"""


def test_an_engine_left_open_ends_before_what_vllm_registered(llama_dir):
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", UNCLOSED, str(llama_dir)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["vLLM is shut down", "the allocator ends"]


def test_what_is_preserved_is_put_back_after_an_error(monkeypatch):
    monkeypatch.setattr(host_state, "_replacements", {})  # what is spoilt here is not for the next guest
    before = state()

    def spoil():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(2)
        torch.set_num_threads = None
        os.environ["SPOILT"] = "1"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gc.freeze()
        warnings.simplefilter("error")
        sys.excepthook = None
        raise RuntimeError(os.environ["SET"])

    with pytest.raises(RuntimeError, match="spoilt"), preserved({"SET": "spoilt"}):
        spoil()
    after = state()
    for name, value in before.items():
        assert after[name] == value, name


def test_triton_does_not_go_on_telling_vllm_of_kernels(monkeypatch):
    """vLLM has a GPU's worker told of kernels that are compiled after its start: those of the trainer, then."""
    knobs = SimpleNamespace(autotuning=SimpleNamespace(), runtime=SimpleNamespace(own=1))
    monkeypatch.setitem(sys.modules, "triton.knobs", knobs)
    with preserved():
        knobs.autotuning.print, knobs.runtime.jit_post_compile_hook, knobs.runtime.own = True, print, 2
    assert vars(knobs.autotuning) == {}
    assert vars(knobs.runtime) == {"own": 1}
    monkeypatch.delitem(sys.modules, "triton.knobs")
    with preserved():
        monkeypatch.setitem(sys.modules, "triton.knobs", knobs)
        knobs.autotuning.print = True
    assert vars(knobs.autotuning) == {}
