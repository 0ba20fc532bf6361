"""A sampler that is not the policy fails the run and is named; each is planted here."""

import pytest
import torch
from tiny_vllm import train_a_little

from bpo_fast.engine.shared_weights import NotShareableError


def test_a_missing_reset_of_the_prefix_cache_is_noticed(llama_dir, learner, monkeypatch):
    policy, engine = learner(llama_dir, model__full=True)
    engine.refresh(0)
    train_a_little(policy)
    session, calls = engine._session, []
    reset = session.reset_prefix_cache
    monkeypatch.setattr(session, "reset_prefix_cache", lambda: reset() if calls else calls.append(1))
    with pytest.raises(RuntimeError, match=r"step 4: vLLM does not sample.*the prefix cache held"):
        engine.refresh(4)
    engine.refresh(4)


def test_a_detached_parameter_is_named(llama_dir, learner):
    policy, engine = learner(llama_dir, model__full=True)
    engine.refresh(0)
    weight = policy.model.model.layers[1].self_attn.k_proj.weight
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight has left the storage"):
        engine.refresh(1)


def test_a_detached_member_is_named(llama_dir, learner):
    policy, engine = learner(llama_dir, sampling__merge_lora=False)
    policy.lora.a[3].data = policy.lora.a[3].data.clone()
    with pytest.raises(RuntimeError, match=rf"the members of {policy.lora.names[3]} has left the storage"):
        engine.refresh(1)


def test_a_merge_that_was_left_out_is_named(llama_dir, learner, monkeypatch):
    policy, engine = learner(llama_dir)
    engine.refresh(0)
    train_a_little(policy)
    monkeypatch.setattr(engine._session, "copy_weights", lambda: 0)
    with pytest.raises(RuntimeError, match=r"first difference: the weights of model\.layers\.0\.self_attn\.q_proj"):
        engine.refresh(4)


def test_a_weight_that_vllm_has_replaced_is_named(llama_dir, learner):
    policy, engine = learner(llama_dir, model__full=True)
    engine.refresh(0)
    layer = engine._session.held.module.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    train_a_little(policy)
    with pytest.raises(RuntimeError, match=r"first difference: the output of model\.layers\.1\.mlp\.down_proj"):
        engine.refresh(4)


def test_a_layer_that_computes_something_else_is_named(llama_dir, learner):
    _, engine = learner(llama_dir, model__full=True)
    engine.refresh(0)
    layer = engine._session.held.module.model.layers[1].mlp.gate_up_proj
    layer.register_forward_hook(lambda module, args, out: (out[0] * torch.linspace(0.5, 1.5, out[0].shape[-1]), out[1]))
    with pytest.raises(RuntimeError, match=r"the output of model\.layers\.1\.mlp\.gate_proj"):
        engine.refresh(0)


def test_where_sharing_is_impossible_weights_are_copied_and_proven(llama_dir, learner, monkeypatch):
    def refuse(module, parameters):
        raise NotShareableError("x: a fused layout")

    monkeypatch.setattr("bpo_fast.engine.held.find_views", refuse)
    policy, engine = learner(llama_dir, model__full=True)
    assert "weights copied at every refresh (x: a fused layout)" in engine._session.in_words()
    engine.refresh(0)
    train_a_little(policy)
    engine.refresh(4)
    assert engine.last_refresh.bytes_copied == sum(p.numel() * 4 for p in policy.model.parameters())
    train_a_little(policy)
    monkeypatch.setattr(engine._session, "copy_weights", lambda: 0)
    with pytest.raises(RuntimeError, match="does not sample from the policy"):
        engine.refresh(8)
