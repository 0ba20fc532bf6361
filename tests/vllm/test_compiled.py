"""vLLM's model compiled, as a GPU runs it: piece by piece, with its graphs in vLLM's cache; here by inductor for a CPU.

No CUDA graphs are recorded here.
"""

import gc
import re
import weakref
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tiny_vllm import MAX_LENGTH, greedy_by_transformers, prompts, save_model, settings, train_a_little
from torch._dynamo import convert_frame
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, Olmo2Config, PhiConfig, SmolLM3Config, Starcoder2Config
from vllm.compilation.counter import compilation_counter
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.platforms.cpu import CpuPlatform

from bpo_fast.engine import SamplingParams, session
from bpo_fast.setup import load_learner

NUM_NEW = 12
QUESTIONS = prompts(6)
FULL = {"model__full": True}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
ROPE = {"rope_theta": 1e4, "factor": 2.0}


@pytest.fixture(autouse=True)
def mode_of_a_gpu(monkeypatch, tmp_path):
    """vLLM leaves it on a CPU for a lesser one; its cache is empty."""
    update = CpuPlatform.check_and_update_config.__func__

    def update_but_for_the_mode(cls: Any, vllm_config: Any) -> None:
        update(cls, vllm_config)
        chosen = vllm_config.compilation_config
        if chosen.mode != CompilationMode.NONE:
            chosen.mode, chosen.cudagraph_mode = CompilationMode.VLLM_COMPILE, CUDAGraphMode.NONE
            chosen.ir_enable_torch_wrap, chosen.compile_sizes = True, []

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(update_but_for_the_mode))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


@contextmanager
def opened(folder, **knobs):
    """(policy, engine), which compiles."""
    config = settings(folder, sampling__enforce_eager=False, **knobs)
    policy, engine = load_learner(config, torch.device("cpu"), MAX_LENGTH, lambda line: None)
    try:
        yield policy, engine
    finally:
        engine.close()


def counted() -> tuple[int, int]:
    """Graphs compiled, and loaded from the cache, so far."""
    return compilation_counter.num_aot_compiles, compilation_counter.num_aot_artifacts_loaded


def greedy(engine, version: int) -> list[tuple[int, ...]]:
    params = SamplingParams(NUM_NEW, temperature=0.0)
    return [c[0].ids for c in engine.generate(QUESTIONS, params, run_seed=1, policy_version=version)]


def samples_what_is_trained(policy, engine) -> None:
    engine.refresh(0)  # the probe fails where log-probs are not those of the policy
    first = greedy(engine, 0)
    train_a_little(policy)
    engine.refresh(4)
    assert greedy(engine, 4) == greedy_by_transformers(policy, QUESTIONS, NUM_NEW) != first
    assert not engine._session.strays()


def test_a_graph_reads_the_weights_of_the_trainer_and_goes_with_its_engine(llama_dir):
    before = counted()
    for loaded in (0, 1):  # the second engine finds the graph of the first
        with opened(llama_dir, **FULL) as (policy, engine):
            samples_what_is_trained(policy, engine)
            module = engine._session.held.module
        assert counted() == (before[0] + 1, before[1] + loaded)
        last, module = weakref.ref(module), None
        del policy, engine
        gc.collect()
        assert last() is None, "its KV cache would outlive it"
        assert not convert_frame._bytecode_hooks


def test_graphs_read_the_members_at_their_scale(llama_dir):
    before = counted()
    for alpha, num in ((8.0, 1), (24.0, 2)):
        in_place = {"model__members": 3, "sampling__merge_lora": False, "model__lora_alpha": alpha}
        with opened(llama_dir, **in_place) as (policy, engine):
            samples_what_is_trained(policy, engine)
        assert counted() == (before[0] + num, before[1])


def test_graphs_read_single_members(llama_dir):
    with opened(llama_dir, model__members=3, sampling__members="single") as (policy, engine):
        samples_what_is_trained(policy, engine)
        assert engine.last_refresh.probe.mean < 1e-4, "of every member by itself"


def test_a_class_that_is_transformers_own_is_not_compiled(tmp_path, tiny_tokenizer):
    """The trainer has it, too, and so it is put back once vLLM has started."""
    config = SmolLM3Config(**SMALL, num_key_value_heads=1, vocab_size=len(tiny_tokenizer), max_position_embeddings=256)
    before = counted()
    with opened(save_model(tmp_path, config, tiny_tokenizer), **FULL) as (policy, engine):
        samples_what_is_trained(policy, engine)
        assert torch.compile(torch.add, backend="eager")(torch.ones(2), 1).tolist() == [2, 2]
    assert counted() == before


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a GPU, which ends the recording of a CUDA graph."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        named = function.overloadpacket.__name__
        assert named not in ("is_nonzero", "item", "_local_scalar_dense", "nonzero", "lift_fresh", "equal"), named
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("config", "waits"),
    [
        (GPTNeoXConfig(**SMALL), False),
        (GPTNeoXConfig(**SMALL, rope_parameters=ROPE | {"rope_type": "dynamic", "partial_rotary_factor": 0.5}), True),
        (Olmo2Config(**SMALL), False),
        (PhiConfig(**SMALL | {"intermediate_size": 256}), False),  # of the only width that vLLM's own code has
        (SmolLM3Config(**SMALL, num_key_value_heads=1), False),
        (SmolLM3Config(**SMALL, num_key_value_heads=1, rope_parameters=ROPE | {"rope_type": "dynamic"}), True),
        (Starcoder2Config(**SMALL, num_key_value_heads=1), False),
    ],
    ids=["neox", "neox-dynamic", "olmo2", "phi", "smollm3", "smollm3-dynamic", "starcoder2"],
)
def test_a_step_of_transformers_own_layers_is_a_graph(tmp_path, tiny_tokenizer, monkeypatch, config, waits):
    """All of it on a GPU, unless something in it waits for the device; here it is looked at for what waits."""
    config.vocab_size, config.max_position_embeddings = len(tiny_tokenizer), 256
    modes: list[Any] = []
    start = session.vllm.LLM

    def note(**options: Any) -> Any:
        modes.append(options.get("compilation_config"))
        return start(**options)

    monkeypatch.setattr(session.vllm, "LLM", note)
    folder = save_model(tmp_path, config, tiny_tokenizer)
    _, engine = load_learner(settings(folder, **FULL), torch.device("cpu"), MAX_LENGTH, lambda line: None)
    try:
        module: Any = engine._session.held.module
        if not type(module).__module__.startswith("vllm.model_executor.models.transformers"):
            assert modes == [None], "vLLM before 0.32 has code of its own for some of these"
            return
        graphs = CUDAGraphMode.NONE if waits else CUDAGraphMode.FULL_DECODE_ONLY
        assert modes == [{"mode": CompilationMode.NONE, "cudagraph_mode": graphs}]
        assert not graphs.requires_piecewise_compilation()
        assert engine._session.held.why_copied is None
        forward = module.forward

        def watched(*args: Any, **options: Any) -> Any:
            with NoWaiting():
                return forward(*args, **options)

        module.forward = watched
        with pytest.raises(AssertionError, match="is_nonzero") if waits else nullcontext():
            engine.refresh(0)
    finally:
        engine.close()


def test_what_graphs_hide_is_said(llama_dir):
    with opened(llama_dir, **FULL) as (_, engine):
        engine.refresh(0)
        for name, buffer in engine._session.held.module.named_buffers():
            if name.endswith("cos_sin_cache"):
                buffer.copy_(torch.randn_like(buffer))
        with pytest.raises(RuntimeError, match=re.escape("no weights; sampling.enforce_eager = true shows")):
            engine.refresh(1)
