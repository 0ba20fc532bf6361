"""One copy of the weights, for every architecture: in-place steps move the sampler, and greedy tokens are the same."""

from unittest import mock

import pytest
import torch
from tiny_vllm import greedy_by_transformers, prompts, save_model, train_a_little
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from vllm.model_executor.models import ModelRegistry

from bpo_fast.engine import SamplingParams, loader
from bpo_fast.engine.shared_weights import NotShareableError, adopt_, find_views

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
NUM_NEW = 24
MODELS = {
    "llama, biases, untied": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2, untied": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3, tied": (Qwen3Config, {"tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "mistral, untied": (MistralConfig, {"sliding_window": None, "tie_word_embeddings": False}),
    # vLLM has no code of its own for these and decorates that of transformers
    "smollm3": (SmolLM3Config, {"tie_word_embeddings": False}),
    "gpt_neox": (GPTNeoXConfig, {"num_key_value_heads": 2}),
}
if not ModelRegistry.models["GPTNeoXForCausalLM"].module_name.endswith(".transformers"):
    del MODELS["gpt_neox"]  # vLLM 0.25 has, and orders the rows of a layer otherwise


def greedy(engine, questions, version=4):
    """(ids, log-probs) of every answer."""
    params = SamplingParams(max_new_tokens=NUM_NEW, temperature=0.0, logps=True)
    sampled = engine.generate(questions, params, run_seed=0, policy_version=version)
    return [c[0].ids for c in sampled], [c[0].logps for c in sampled]


@pytest.mark.parametrize("name", MODELS)
def test_full_fine_tuning_moves_the_sampler_without_a_copy(name, tmp_path, tiny_tokenizer, learner):
    config_class, options = MODELS[name]
    vocabulary = len(tiny_tokenizer) + 3  # no multiple of 64: vLLM pads it
    config = config_class(**SHAPE | options, vocab_size=vocabulary)
    policy, engine = learner(save_model(tmp_path, config, tiny_tokenizer), model__full=True)
    stored = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    assert all(torch.equal(p, stored[n]) for n, p in policy.model.named_parameters())
    session, questions = engine._session, prompts(6)
    storages = {p.untyped_storage().data_ptr() for p in session.held.module.parameters()}
    addresses = {n: p.data_ptr() for n, p in policy.model.named_parameters()}
    assert all(p.untyped_storage().data_ptr() in storages for p in policy.model.parameters())
    assert max(len(p) for p in session.held.module.parameters()) > vocabulary
    assert type(policy.model.base_model).__call__ is nn.Module.__call__
    engine.refresh(0)
    before, logps_before = greedy(engine, questions, 0)
    assert before == greedy_by_transformers(policy, questions, NUM_NEW)
    train_a_little(policy)
    engine.refresh(4)
    after, logps_after = greedy(engine, questions)
    assert after == greedy_by_transformers(policy, questions, NUM_NEW)
    assert logps_after != logps_before  # a tied random model may say the same tokens, but not as surely
    assert addresses == {n: p.data_ptr() for n, p in policy.model.named_parameters()}
    assert engine.last_refresh.bytes_copied == 0


def test_a_decoding_step_reads_large_weights_where_they_stand(tmp_path, tiny_tokenizer, learner):
    shape = SHAPE | {"hidden_size": 512, "intermediate_size": 640, "num_attention_heads": 16}
    config = LlamaConfig(**shape, vocab_size=len(tiny_tokenizer))
    policy, engine = learner(save_model(tmp_path, config, tiny_tokenizer), model__full=True)
    engine.refresh(0)

    def greedy_and_products(questions, num_new):
        params = SamplingParams(max_new_tokens=num_new, temperature=0.0)
        with mock.patch.object(loader, "rowwise_linear", wraps=loader.rowwise_linear) as product:
            sampled = engine.generate(questions, params, run_seed=0, policy_version=0)
        assert [c.ids for [c] in sampled] == greedy_by_transformers(policy, questions, num_new)
        return max(len(c.ids) for [c] in sampled), product.call_count

    a_step = 2 * 4  # q, k and v; o; gate and up; down. The head is small
    num_steps, num_products = greedy_and_products(prompts(4), 6)
    assert num_products == num_steps * a_step
    num_steps, num_products = greedy_and_products(prompts(30), 2)
    assert num_products == (num_steps - 1) * a_step  # the prompts, of over 256 tokens, are the library's


def test_layers_of_transformers_own_read_members_in_place(tmp_path, tiny_tokenizer, learner):
    config_class, options = MODELS["smollm3"]
    folder = save_model(tmp_path, config_class(**SHAPE | options, vocab_size=len(tiny_tokenizer)), tiny_tokenizer)
    policy, engine = learner(folder, model__members=2, sampling__merge_lora=False)
    train_a_little(policy)
    engine.refresh(4)
    questions = prompts(6)
    assert greedy(engine, questions)[0] == greedy_by_transformers(policy, questions, NUM_NEW)
    assert engine.last_refresh.bytes_copied == 0


def test_bfloat16_weights_are_shared_and_stay_within_the_limit(llama_dir, learner):
    policy, engine = learner(llama_dir, model__full=True, model__dtype="bfloat16")
    assert policy.model.dtype == torch.bfloat16
    engine.refresh(0)
    train_a_little(policy)
    engine.refresh(4)
    assert engine.last_refresh.probe.mean < engine.last_refresh.probe.limit <= 0.1
    assert engine.last_refresh.bytes_copied == 0


def test_logits_of_bfloat16_weights_are_float32(llama_dir, learner):
    _, engine = learner(llama_dir, model__full=True, model__dtype="bfloat16")
    engine.refresh(4)
    with mock.patch.object(loader, "unrounded_logits", wraps=loader.unrounded_logits) as head:
        _, drawn = greedy(engine, prompts(4))
        assert head.call_count == NUM_NEW
        head.side_effect = lambda *inputs: loader.linear(*inputs)
        _, rounded = greedy(engine, prompts(4))
    first, others = (torch.tensor([logps[0] for logps in found]) for found in (drawn, rounded))
    assert 0 < float((first - others).abs().max()) < 0.1


class Fused(torch.nn.Module):
    """The outside of vLLM's fused layers, enough to find views in."""

    def __init__(self):
        super().__init__()
        self.packed_modules_mapping = {"qkv": ["q", "k"]}
        self.qkv = torch.nn.Linear(4, 6, bias=False)
        self.qkv.output_sizes = [4, 2]


def test_what_cannot_be_shared_is_named():
    fused = Fused()
    q, k = torch.zeros(4, 4), torch.zeros(2, 4)
    views = find_views(fused, {"q.weight": q, "k.weight": k})
    assert torch.equal(torch.cat(list(views.values())), fused.qkv.weight)
    with pytest.raises(NotShareableError, match=r"^v: not in vLLM's Fused"):
        find_views(fused, {"v.weight": q})
    with pytest.raises(NotShareableError, match=r"k\.weight: \(3, 4\) here, \(2, 4\) in vLLM"):
        find_views(fused, {"q.weight": q, "k.weight": torch.zeros(3, 4)})
    with pytest.raises(NotShareableError, match=r"q\.weight: torch\.bfloat16 here, torch\.float32 in vLLM"):
        find_views(fused, {"q.weight": q.bfloat16()})
    fused.norm = torch.nn.LayerNorm(4, bias=False)
    with pytest.raises(NotShareableError, match=r"norm\.weight: only vLLM has it"):
        find_views(fused, {"q.weight": q, "k.weight": k})
    fused.qkv.output_sizes = [6]
    with pytest.raises(NotShareableError, match="1 parts in vLLM, not 2"):
        find_views(fused, {"q.weight": q})


def test_other_values_are_not_adopted():
    model = torch.nn.Linear(2, 2, bias=False)
    kept = model.weight.data_ptr()
    with pytest.raises(NotShareableError, match="vLLM holds other values"):
        adopt_(model, {"weight": model.weight.detach() + 1}, ["weight"])
    assert model.weight.data_ptr() == kept
