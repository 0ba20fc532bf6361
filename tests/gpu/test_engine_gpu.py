"""vLLM on a real GPU: one copy of the weights, a KV cache that training gets back, CUDA graphs that follow updates."""

import pytest
import torch
from transformers import AutoTokenizer, SmolLM3Config, SmolLM3ForCausalLM

from bpo_fast import config as configs
from bpo_fast.engine import SamplingParams, versions
from bpo_fast.engine.self_test import MAX_LENGTH, self_test, write_model
from bpo_fast.setup import load_learner
from bpo_fast.types import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(versions.trouble() is not None, reason=str(versions.trouble())),
]


def open_engine(folder, **knobs):
    write_model(folder)
    return load(folder, **knobs)


def load(folder, **knobs):
    values = {"model.path": str(folder), "model.lora_r": 4, "model.lora_alpha": 8.0, "sampling.engine": "vllm"}
    return load_learner(configs.load(None, values | knobs), torch.device("cuda"), MAX_LENGTH, lambda line: None)


def move(policy):
    """Another policy, in place."""
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, device="cuda").to(parameter.dtype))


def test_every_verdict_is_good():
    assert [v for v in self_test(torch.device("cuda")) if not v.ok] == []


def test_training_gets_the_kv_cache_back_and_refresh_copies_nothing(tmp_path):
    policy, engine = open_engine(tmp_path, **{"model.full": True, "sampling.kv_cache_gib": 2.0})
    try:
        with engine._session.awake():
            free_while_sampling = torch.cuda.mem_get_info()[0]
        addresses = [p.data_ptr() for p in policy.parameters()]
        assert torch.cuda.mem_get_info()[0] - free_while_sampling > 1.8 * 2**30
        for version in range(3):
            move(policy)
            engine.refresh(version)
            assert engine.last_refresh.bytes_copied == 0
        assert [p.data_ptr() for p in policy.parameters()] == addresses
    finally:
        engine.close()


def test_a_compiled_graph_is_not_taken_for_that_of_another_form(tmp_path):
    for form in ({"model.full": True}, {"model.members": 1}, {"model.members": 5}):
        policy, engine = open_engine(tmp_path, **form)
        try:
            engine.refresh(0)
            move(policy)
            engine.refresh(1)
        finally:
            engine.close()


@pytest.mark.parametrize("members", ["average", "single"])
def test_graphs_follow_the_members_in_place(tmp_path, members):
    policy, engine = open_engine(tmp_path, **{"model.members": 3, "sampling.members": members})
    try:
        for version in range(2):
            move(policy)
            engine.refresh(version)  # the probe compares the average, and with single members each of them
        prompts = [Prompt(i, "", tuple(range(5 + i, 45 + i))) for i in range(16)]
        params = SamplingParams(max_new_tokens=8, n=2, single_members=members == "single")
        drawn = engine.generate(prompts, params, run_seed=0, policy_version=1)
        assert engine.generate(prompts, params, run_seed=0, policy_version=1) == drawn
    finally:
        engine.close()


def test_graphs_of_transformers_own_layers_follow_updates(tmp_path):
    write_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    small |= {"num_key_value_heads": 1, "vocab_size": 270, "max_position_embeddings": 256, "initializer_range": 0.2}
    SmolLM3ForCausalLM(SmolLM3Config(**small, **ids)).save_pretrained(tmp_path)
    policy, engine = load(tmp_path, **{"model.full": True})
    try:
        graphs = engine._session.llm.llm_engine.vllm_config.compilation_config
        assert (graphs.mode.name, graphs.cudagraph_mode.name) == ("NONE", "FULL_DECODE_ONLY")
        for version in range(2):
            move(policy)
            engine.refresh(version)
    finally:
        engine.close()
