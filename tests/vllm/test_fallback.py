"""Layouts of vLLM that the trainer cannot share: copied and proven, or left to engine hf."""

import pytest
import torch
from packaging.version import Version
from tiny_vllm import MAX_LENGTH, greedy_by_transformers, prompts, save_model, settings, train_a_little
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, Qwen3MoeConfig

from bpo_fast.engine import SamplingParams, versions
from bpo_fast.engine.loader import reads_live_lora
from bpo_fast.engine.session import Session
from bpo_fast.engine.versions import UnsupportedModelError
from bpo_fast.setup import load_learner

CPU = torch.device("cpu")
NUM_NEW = 16
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
MODELS = {
    "gpt2": (
        GPT2Config,
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256},
        "c_attn.weight: (64, 192) here",
    ),
    "bloom": (BloomConfig, {"hidden_size": 64, "n_layer": 2, "n_head": 2}, "vLLM holds other values there"),
}


def folder_of(name, tmp_path, tokenizer):
    config_class, options, _ = MODELS[name]
    return save_model(tmp_path / name, config_class(**options, vocab_size=len(tokenizer) + 3), tokenizer)


def greedy(engine, questions, version=4):
    sampled = engine.generate(questions, SamplingParams(NUM_NEW, temperature=0.0), run_seed=0, policy_version=version)
    return [c[0].ids for c in sampled]


def open_saying(folder, **knobs):
    said = []
    policy, engine = load_learner(settings(folder, **knobs), CPU, MAX_LENGTH, said.append)
    return policy, engine, said


def check_follows(policy, engine):
    """What is sampled after a little training is what transformers decodes."""
    train_a_little(policy)
    engine.refresh(4)
    questions = prompts(4)
    assert greedy(engine, questions) == greedy_by_transformers(policy, questions, NUM_NEW)


FULL, LORA = {"model__full": True}, {"model__members": 2}


@pytest.mark.parametrize(("name", "form"), [("gpt2", FULL), ("bloom", FULL), ("bloom", LORA)])
def test_another_layout_is_copied_and_the_copy_proven(name, form, tmp_path, tiny_tokenizer):
    folder = folder_of(name, tmp_path, tiny_tokenizer)
    policy, engine, [line] = open_saying(folder, **form)
    try:
        assert "weights copied at every refresh" in line
        assert MODELS[name][2] in line
        questions = prompts(4)
        start = {n: p.clone() for n, p in policy.model.named_parameters()}
        stored = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
        assert all(torch.equal(p, stored[n]) for n, p in start.items())
        engine.refresh(0)
        before = greedy(engine, questions, 0)
        assert before == greedy_by_transformers(policy, questions, NUM_NEW)
        train_a_little(policy)
        engine.refresh(4)
        after = greedy(engine, questions)
        assert after == greedy_by_transformers(policy, questions, NUM_NEW) != before
        assert engine.last_refresh.bytes_copied == sum(p.numel() * 4 for p in start.values())
        if not policy.config.full:  # the proof has left the base as it was
            assert all(torch.equal(p, start[n]) for n, p in policy.model.named_parameters())
    finally:
        engine.close()


def test_members_are_merged_where_vllm_has_other_rows(tmp_path, tiny_tokenizer, monkeypatch):
    folder = folder_of("bloom", tmp_path, tiny_tokenizer)
    with pytest.raises(
        ValueError, match=r"sampling\.merge_lora = false: vLLM's BloomForCausalLM does not hold the lin"
    ):
        open_saying(folder, sampling__merge_lora=False)
    monkeypatch.setattr("bpo_fast.engine.session.merges_lora", lambda config, device: False)  # the rule on a GPU
    policy, engine, [line] = open_saying(folder, model__members=2)
    try:
        assert "weights copied at every refresh" in line
        check_follows(policy, engine)
    finally:
        engine.close()


def mixture_of_experts(tmp_path, tokenizer):
    config = Qwen3MoeConfig(
        **SMALL,
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    return save_model(tmp_path, config, tokenizer)


def test_a_mixture_of_experts_is_copied_or_left_to_engine_hf(tmp_path, tiny_tokenizer):
    """From 0.28 on vLLM loads one once only; before, it takes copies."""
    folder = mixture_of_experts(tmp_path, tiny_tokenizer)
    if Version(str(versions.installed())) < Version("0.28"):
        policy, engine, _ = open_saying(folder, **FULL)
        try:
            check_follows(policy, engine)
        finally:
            engine.close()
    else:
        wanted = r"cannot be shared \(.*experts.*\) and a copy does not reach all of them .*; choose sampling\.eng"
        with pytest.raises(UnsupportedModelError, match="its weights " + wanted):
            open_saying(folder)
        _, engine, [line] = open_saying(folder, sampling__engine="auto")
        assert engine.name == "hf"
        assert "a copy does not reach all of them" in line


def test_a_weight_that_is_not_copied_is_noticed_at_the_start(tmp_path, tiny_tokenizer, monkeypatch):
    copy_weights = Session.copy_weights

    def copy_but_one(self):
        lost = self.held.module.transformer.h[1].mlp.c_fc.bias
        kept = lost.clone()
        copied = copy_weights(self)
        lost.data.copy_(kept)
        return copied

    monkeypatch.setattr(Session, "copy_weights", copy_but_one)
    with pytest.raises(UnsupportedModelError, match="a copy does not reach all of them"):
        open_saying(folder_of("gpt2", tmp_path, tiny_tokenizer), **FULL)


def test_layers_that_vllm_does_not_have_cannot_read_members(llama_dir, learner):
    policy, engine = learner(llama_dir, sampling__merge_lora=False)
    module = engine._session.held.module
    assert reads_live_lora(module, policy.lora.names)
    assert not reads_live_lora(module, ["model.layers.0.self_attn.nowhere"])
    assert not reads_live_lora(module, ["model.norm"])
