"""Two processes of vLLM that split the model: copies of the weights that follow the policy, and that end with it."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from test_state import state
from tiny_vllm import MAX_LENGTH, greedy_by_transformers, prompts, save_model, settings, train_a_little
from transformers import LlamaConfig

from bpo_fast.checkpoint import complete_checkpoints
from bpo_fast.engine import SamplingParams
from bpo_fast.run import saved_config
from bpo_fast.setup import load_learner
from bpo_fast.train import train

TWO = {"sampling__tensor_parallel": 2}
NUM_NEW = 16
SHARED_MEMORY = Path("/dev/shm")


def draw(engine, version, temperature=0.0):
    sampled = engine.generate(
        prompts(4), SamplingParams(NUM_NEW, temperature=temperature), run_seed=1, policy_version=version
    )
    return [c[0].ids for c in sampled]


def open_saying(folder, **knobs):
    said = []
    policy, engine = load_learner(settings(folder, **TWO, **knobs), torch.device("cpu"), MAX_LENGTH, said.append)
    return policy, engine, said


@pytest.fixture
def temporary(monkeypatch):
    """Where files go for a while; of a short name, which those of sockets begin with."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_copies_follow_full_fine_tuning_and_nothing_of_the_process_changes(llama_dir, temporary, capfd):
    import bpo_fast.engine.vllm  # noqa: F401

    before, in_memory = state(), set(SHARED_MEMORY.iterdir())
    policy, engine, [line] = open_saying(llama_dir, model__full=True)
    try:
        assert "weights copied at every refresh (vLLM's 2 workers are processes of their own)" in line
        after_start = state()
        [sockets] = temporary.glob("bpo-fast-*")
        assert any(path.is_socket() for path in sockets.iterdir())
        assert len(multiprocessing.active_children()) == 2
        engine.refresh(0)
        first = draw(engine, 0)
        assert first == greedy_by_transformers(policy, prompts(4), NUM_NEW)
        train_a_little(policy)
        engine.refresh(4)
        assert engine.last_refresh.bytes_copied == sum(p.numel() * 4 for p in policy.model.parameters())
        assert draw(engine, 4) == greedy_by_transformers(policy, prompts(4), NUM_NEW) != first
        assert draw(engine, 4, 1.0) == draw(engine, 4, 1.0) != draw(engine, 4)
        after_sampling = state()
    finally:
        engine.close()
    after_close = state()
    for name, value in before.items():
        assert after_start[name] == after_sampling[name] == after_close[name] == value, name
    assert not multiprocessing.active_children()
    assert set(SHARED_MEMORY.iterdir()) <= in_memory
    assert not [path for path in temporary.iterdir() if path.is_socket() or path.name.startswith("bpo-fast-")]
    out, err = capfd.readouterr()
    assert [line for line in (out + err).splitlines() if line.strip() and "Loading weights" not in line] == []


def test_copies_hold_the_average_of_the_members_and_stale_ones_are_noticed(llama_dir, monkeypatch):
    policy, engine, _ = open_saying(llama_dir, model__members=2)
    try:
        base = {n: p.clone() for n, p in policy.model.named_parameters()}
        train_a_little(policy)
        engine.refresh(4)
        assert draw(engine, 4) == greedy_by_transformers(policy, prompts(4), NUM_NEW)
        assert all(torch.equal(p, base[n]) for n, p in policy.model.named_parameters())
        train_a_little(policy)
        with monkeypatch.context() as patch:
            patch.setattr(engine._session, "copy_weights", lambda: 0)
            with pytest.raises(
                RuntimeError, match=r"step 8: vLLM does not sample from the policy.*not compared one by"
            ):
                engine.refresh(8)
        reset, calls = engine._session.reset_prefix_cache, []
        with monkeypatch.context() as patch:
            patch.setattr(engine._session, "reset_prefix_cache", lambda: reset() if calls else calls.append(1))
            with pytest.raises(RuntimeError, match="the prefix cache held states of older ones"):
                engine.refresh(8)
        engine.refresh(8)
        multiprocessing.active_children()[0].kill()
        while multiprocessing.active_children():  # vLLM ends the other one
            time.sleep(0.1)
        with pytest.raises(RuntimeError, match=r"^sampling\.tensor_parallel: a worker process of vLLM has died$"):
            draw(engine, 8)
    finally:
        engine.close()
    assert not multiprocessing.active_children()


def llama(folder, tokenizer, **options):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    return save_model(folder, LlamaConfig(vocab_size=len(tokenizer), **small | options), tokenizer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"hidden_size": 96, "num_attention_heads": 3},
            r"Total number of attention heads \(3\) must be divisible by .*",
        ),
        ({"intermediate_size": 97}, r"in a worker process, assert all\(output_size % self\.tp_size == 0 .*"),
    ],
)
def test_a_model_that_two_cannot_split_is_said_in_one_line(options, words, tmp_path, tiny_tokenizer, capfd):
    folder = llama(tmp_path, tiny_tokenizer, **options)
    with pytest.raises(ValueError, match=rf"^sampling\.engine = vllm: {words}; choose sampling\.engine = hf$"):
        open_saying(folder)
    assert not multiprocessing.active_children()
    assert "orker" not in "".join(capfd.readouterr())


def test_a_start_that_fails_after_that_of_the_workers_ends_them(llama_dir, monkeypatch):
    import bpo_fast.engine.vllm  # noqa: F401

    before = state()
    monkeypatch.setattr("bpo_fast.engine.session.kv_budget", lambda *args: 2000)
    with pytest.raises(ValueError, match=r"^sampling\.engine = vllm: .*(cache blocks|KV cache memory)"):
        open_saying(llama_dir)
    assert not multiprocessing.active_children()
    after = state()
    assert all(after[name] == value for name, value in before.items())


def test_sockets_that_have_no_place_are_named(llama_dir, tmp_path, monkeypatch):
    nowhere = tmp_path / "nowhere"
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(nowhere))
    with pytest.raises(FileNotFoundError, match=re.escape(str(nowhere))):
        open_saying(llama_dir)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("length", [52, 53])
def test_sockets_have_short_paths_where_temporary_files_have_long_ones(llama_dir, monkeypatch, length):
    with tempfile.TemporaryDirectory(prefix="t" * (length - len(tempfile.gettempdir()) - 9)) as folder:
        assert len(folder) == length
        monkeypatch.setattr(tempfile, "tempdir", folder)
        before = set(Path("/tmp").glob("bpo-fast-*"))
        _, engine, _ = open_saying(llama_dir)
        try:
            [sockets] = [*Path(folder).glob("bpo-fast-*"), *(set(Path("/tmp").glob("bpo-fast-*")) - before)]
            assert str(sockets.parent) == (folder if length == 52 else "/tmp")
            assert any(path.is_socket() for path in sockets.iterdir())
            engine.refresh(0)
            assert draw(engine, 0)
        finally:
            engine.close()
        assert not sockets.exists()


def run(arguments: list[str], *, at: str, number: int) -> tuple[int, list[str], set[int]]:
    """(exit code, lines of standard error, processes below it at that line) of `bpo-fast train`.

    The trainer's process group gets the signal there, as from a terminal; SIGKILL is for the trainer alone.
    """
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bpo_fast", "train", *arguments],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines, below = [], set()
    for line in process.stderr:
        lines.append(line)
        if at in line and "stopped" not in line and not below:
            below = descendants(process.pid)
            if number == signal.SIGKILL:
                process.kill()
            else:
                os.killpg(process.pid, number)
    return process.wait(), lines, below


def descendants(pid: int) -> set[int]:
    children = {int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return children.union(*map(descendants, children))


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def have_ended(pids: set[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(map(runs, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_ctrl_c_and_sigkill_leave_no_process_and_a_resumed_run_ends(llama_dir, tiny_data, tmp_path):
    out = tmp_path / "run"
    arguments = [
        *("--engine", "vllm", "--set", "sampling.tensor_parallel=2", "--model", str(llama_dir), "--device", "cpu"),
        *("--data", str(tiny_data.train), "--eval-data", str(tiny_data.eval), "--annotator", "toy_annotator:letters"),
        *("--pairs", "32", "--batch-pairs", "16", "--max-new-tokens", "90", "--lora-r", "4", "--members", "2"),
        *("--set", "eval.prompts=0", "--set", "eval.kl_prompts=0"),
    ]
    code, lines, below = run([*arguments, "--out", str(out)], at="phase 1: sampling: 0/", number=signal.SIGINT)
    assert code == 130, "".join(lines)
    assert "interrupted at step 0; go on with --resume" in lines[-1]
    assert len(below) >= 2
    assert have_ended(below, 5)
    [checkpoint] = complete_checkpoints(out)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["step"] == 0
    code, lines, below = run(["--resume", str(out)], at="phase 1: sampling: 0/", number=signal.SIGKILL)
    assert code == -signal.SIGKILL, "".join(lines)
    assert len(below) >= 2
    assert have_ended(below, 20)
    summary = train(saved_config(out), resume=out, quiet=True)
    assert summary["pairs"]["kept"] > 0
    assert not multiprocessing.active_children()
