"""The memory of the KV cache is there while vLLM works and gone while the policy trains.

vLLM's CPU worker only notes that it sleeps; what is checked here is when it is told to, and what survives it.
"""

import gc
import importlib
import inspect
import os
import signal
import sys
import weakref
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_vllm import MAX_LENGTH, greedy_by_transformers, prompts, settings, train_a_little
from transformers import AutoModelForCausalLM

from bpo_fast.engine import SamplingParams, session
from bpo_fast.engine.session import Session
from bpo_fast.engine.vllm import VllmEngine
from bpo_fast.interrupts import interrupts_call


@pytest.fixture
def releasing(llama_dir, learner, monkeypatch):
    """(policy, engine) that lets go of its KV cache as on a GPU."""
    monkeypatch.setattr(Session, "releases_kv", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return learner(llama_dir, model__full=True)


def sleeps(engine: VllmEngine) -> bool:
    return engine._session.llm.llm_engine.is_sleeping()


def sample(engine, version, seen=None, **params):
    note = None if seen is None else lambda done: seen.append(sleeps(engine))
    return engine.generate(prompts(6), SamplingParams(16, **params), run_seed=1, policy_version=version, on_done=note)


def test_it_is_there_inside_a_call_and_gone_outside(releasing):
    policy, engine = releasing
    seen: list[bool] = []
    assert engine.kv_stays is False
    for version in (0, 4):
        engine.refresh(version)
        assert sleeps(engine)
        greedy = [c[0].ids for c in sample(engine, version, seen, temperature=0.0)]
        assert greedy == greedy_by_transformers(policy, prompts(6), 16)
        assert sleeps(engine)
        assert engine.last_refresh.bytes_copied == 0
        train_a_little(policy)
    assert seen
    assert not any(seen)


def test_an_interrupted_call_lets_go_of_it_too(releasing):
    _, engine = releasing
    engine.refresh(0)
    whole = sample(engine, 0)

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts(6), SamplingParams(16), run_seed=1, policy_version=0, on_done=interrupt)
    assert sleeps(engine)
    assert sample(engine, 0) == whole


@pytest.mark.parametrize("has_room", [True, False])
def test_vllm_is_shut_down_awake_if_there_is_room(releasing, monkeypatch, has_room):
    _, engine = releasing
    engine.refresh(0)
    llm = engine._session.llm
    core, seen = llm.llm_engine.engine_core, []
    shutdown = core.shutdown

    def no_room():
        raise RuntimeError("CUDA Error: out of memory")

    def note():
        seen.append(sleeps(engine))
        shutdown()

    if not has_room:
        monkeypatch.setattr(llm, "wake_up", no_room)
    monkeypatch.setattr(core, "shutdown", note)
    engine.close()
    assert seen == [not has_room]


def test_a_step_may_be_left_over_when_a_call_ends(llama_dir, learner, monkeypatch):
    """On a GPU vLLM prepares a step before it knows the tokens of the last one; on a CPU it has to be told to."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    configure = platform.check_and_update_config

    def look_ahead(cls: type, vllm_config: Any) -> None:
        configure(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(platform, "check_and_update_config", classmethod(look_ahead))
    monkeypatch.setattr(Session, "releases_kv", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    policy, engine = learner(llama_dir, model__full=True)
    core = engine._session.llm.llm_engine.engine_core.engine_core
    for version in (0, 4):
        engine.refresh(version)
        greedy = [c[0].ids for c in sample(engine, version, temperature=0.0)]
        assert core.batch_queue
        assert greedy == greedy_by_transformers(policy, prompts(6), 16)
        assert sample(engine, version, logps=True, n=2) == sample(engine, version, logps=True, n=2)
        train_a_little(policy)


def on_a_gpu(monkeypatch, note) -> Session:
    """A session of no vLLM, which tells what is done with it."""

    @contextmanager
    def on(stream: Any):
        note(stream)
        yield
        note("left")

    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(
            is_sleeping=lambda: True,
            vllm_config=SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True)),
        ),
        wake_up=lambda: note("awake"),
        sleep=lambda level: note("asleep"),
    )
    monkeypatch.setattr(session, "guest_functions", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: note("synchronized"))
    opened: Any = {"llm": llm, "held": None, "kv_bytes": 0, "block_size": 16, "logps_temperature": 1.0}
    return Session(**opened, own_group=True, member_rows=None, stream="its stream")


def test_vllm_works_on_the_stream_that_it_was_opened_on(monkeypatch):
    seen: list[str] = []
    with on_a_gpu(monkeypatch, seen.append).awake():
        seen.append("work")
    assert seen == ["its stream", "synchronized", "awake", "work", "synchronized", "asleep", "left"]


@pytest.mark.parametrize(("when", "before"), [("awake", 0), ("synchronized", 1), ("asleep", 0)])
def test_a_signal_waits_until_all_of_it_is_mapped_or_none(monkeypatch, when, before):
    seen: list[str] = []

    def note(what: str) -> None:
        if what == when and seen.count(what) == before:
            signal.raise_signal(signal.SIGINT)  # vLLM has mapped or unmapped a part
        seen.append(what)

    handled = interrupts_call(signal.default_int_handler)  # a shell's background jobs are started without
    with pytest.raises(KeyboardInterrupt), handled, on_a_gpu(monkeypatch, note).awake():
        seen.append("work")
    assert seen.count("awake") == seen.count("asleep") == 1
    assert seen.count("work") == (when != "awake")


def test_the_collections_of_vllm_pass_over_the_heap(monkeypatch):
    frozen: dict[str, bool] = {}
    with on_a_gpu(monkeypatch, lambda what: frozen.update({what: gc.get_freeze_count() > 0})).awake():
        pass
    assert frozen["awake"]
    assert frozen["asleep"]
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_it_starts_on_the_device_of_the_policy(llama_dir, monkeypatch, name):
    """All but the GPU: vLLM itself is left out."""
    chosen: list[torch.device] = []
    inside: dict[str, str] = {}

    def start(**options: Any):
        inside.update(os.environ)
        return options

    monkeypatch.setattr(session.vllm, "LLM", start)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "a stream")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    options, stream = session._start(settings(llama_dir), model, torch.device(name), MAX_LENGTH, 2**30, None)
    assert options["worker_cls"] == "bpo_fast.engine.worker.KvPoolWorker"
    assert options["enable_sleep_mode"]
    assert not options["enforce_eager"]
    assert stream is not None
    assert chosen == ([torch.device(name)] if name == "cuda:1" else [])  # torch refuses a device without a number
    assert inside["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    assert inside["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


def test_vllms_pool_is_for_the_kv_cache_alone(monkeypatch):
    from vllm.v1.worker.gpu_worker import Worker

    from bpo_fast.engine.worker import KvPoolWorker

    pools: list[str] = []

    def pool(self: Worker, tag: str) -> Any:
        pools.append(tag)
        return nullcontext()

    places = "".join(inspect.getsource(Worker).split())
    assert 'self._maybe_get_memory_pool_context(tag="kv_cache")' in places
    assert 'self._maybe_get_memory_pool_context(tag="weights")' in places
    monkeypatch.setattr(Worker, "_maybe_get_memory_pool_context", pool)
    worker = object.__new__(KvPoolWorker)
    for tag in ("weights", "kv_cache", "runtime"):
        with worker._maybe_get_memory_pool_context(tag=tag):
            pass
    assert pools == ["kv_cache"]
    taken = inspect.signature(Worker).parameters
    assert list(taken)[:4] == ["vllm_config", "local_rank", "rank", "distributed_init_method"]


def test_the_trainers_side_holds_the_model_and_not_the_kv_cache(monkeypatch):
    """vLLM's runners differ in what they let go of; its allocator fails the next engine if that outlives the pool."""
    from vllm.v1.worker.gpu_worker import Worker

    from bpo_fast.engine.worker import KvPoolWorker

    model = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Identity()])
    model[1].kv_cache, tables = torch.zeros(4), torch.zeros(2)
    pool = [weakref.ref(model[1].kv_cache), weakref.ref(tables)]
    worker: Any = object.__new__(KvPoolWorker)
    worker.model_runner = SimpleNamespace(model=model, block_tables=SimpleNamespace(gpu=tables))
    del tables
    left: list[Any] = []
    monkeypatch.setattr(Worker, "shutdown", lambda self: left.extend(part() for part in pool))
    worker.shutdown()
    assert left == [None, None]
    del worker.model_runner.model, worker.model_runner.block_tables
    worker.shutdown()
    object.__new__(KvPoolWorker).shutdown()  # of a start that failed


def test_others_may_take_memory_while_it_is_released(monkeypatch):
    from vllm.v1.worker.gpu_worker import Worker

    from bpo_fast.engine.worker import KvPoolWorker

    assert '"Memory usage increased after sleeping."' in inspect.getsource(Worker.sleep)
    worker: Any = object.__new__(KvPoolWorker)
    for said in ("Memory usage increased after sleeping.", "something else"):

        def sleep(self: Worker, level: int, said: str = said) -> None:
            raise AssertionError(said)

        monkeypatch.setattr(Worker, "sleep", sleep)
        with nullcontext() if "Memory" in said else pytest.raises(AssertionError, match=said):
            worker.sleep(level=1)


def test_a_gpu_is_warmed_up_without_torchvision(monkeypatch):
    from vllm.v1.worker.gpu_worker import Worker

    from bpo_fast.engine.worker import VISION_WARMUP, KvPoolWorker

    warmup = find_spec("vllm.model_executor.warmup.kernel_warmup")
    assert warmup
    assert f"    from {VISION_WARMUP} import" in Path(str(warmup.origin)).read_text()
    monkeypatch.setitem(sys.modules, "torchvision", None)  # find_spec has it that there is none
    monkeypatch.delitem(sys.modules, VISION_WARMUP, raising=False)

    def warm_up(self: Worker) -> Any:
        return importlib.import_module(VISION_WARMUP).minimax_m3_msa_warmup(self)

    monkeypatch.setattr(Worker, "compile_or_warm_up_model", warm_up)
    try:
        assert object.__new__(KvPoolWorker).compile_or_warm_up_model() is None
    finally:
        sys.modules.pop(VISION_WARMUP, None)
