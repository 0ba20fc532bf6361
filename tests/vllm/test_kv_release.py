"""The memory of the KV cache is there while vLLM works and gone while the policy trains.

vLLM's CPU worker only notes that it sleeps; what is checked here is when it is told to, and what survives it.
"""

import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_vllm import greedy_by_transformers, prompts, train_a_little

from bpo_fast.engine import SamplingParams
from bpo_fast.engine.session import Session
from bpo_fast.engine.vllm import VllmEngine


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


def test_vllms_pool_is_for_the_kv_cache_alone(monkeypatch):
    from vllm.v1.worker.gpu_worker import Worker

    from bpo_fast.engine.worker import KvPoolWorker

    pools: list[str] = []

    def pool(self: Worker, tag: str) -> Any:
        pools.append(tag)
        return nullcontext()

    places = inspect.getsource(Worker)
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
