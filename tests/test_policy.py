"""Sequence log-probs against the model's own logits, for heads of every kind; views of the weights."""

import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    PhiConfig,
    PhiForCausalLM,
)

from bpo_fast.config import MethodConfig, ModelConfig
from bpo_fast.packing import pack_apart
from bpo_fast.policy import Policy, load_policy
from bpo_fast.types import Completion, Pair, Prompt

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FORM = ModelConfig(path="made-here", full=True)


class Tokens:
    """What Policy needs of a tokenizer."""

    pad_token_id, eos_token_id = 0, 1


def make_model(name):
    torch.manual_seed(0)
    mlp = {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 1}
    if name == "gemma2":
        config = Gemma2Config(**SMALL, **mlp, head_dim=8, final_logit_softcapping=5.0, sliding_window=64)
        return Gemma2ForCausalLM(config)
    if name == "granite":
        return GraniteForCausalLM(GraniteConfig(**SMALL, **mlp, logits_scaling=4.0))
    if name == "phi":
        model = PhiForCausalLM(PhiConfig(**SMALL, intermediate_size=64, initializer_range=0.3, eos_token_id=1))
        torch.nn.init.normal_(model.lm_head.bias)
        return model
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, eos_token_id=1))


def make_pairs():
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for i, (num_prompt, num_chosen, num_rejected) in enumerate([(3, 5, 1), (9, 2, 7), (1, 1, 12)]):
        ids = torch.randint(2, 97, (num_prompt + num_chosen + num_rejected,), generator=generator).tolist()
        chosen, rejected = tuple(ids[num_prompt : num_prompt + num_chosen]), tuple(ids[num_prompt + num_chosen :])
        sides = [Completion(i, s, c, "", False, 0, 0) for s, c in enumerate((chosen, rejected))]
        pairs.append(Pair(Prompt(i, "", tuple(ids[:num_prompt])), *sides, 1.0, 0.0))
    return pairs


@torch.no_grad()
def naive_logps(model, pairs, temperature):
    out = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            prompt, completion = pair.prompt.ids, getattr(pair, side).ids
            logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
            rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            out.append(rows.gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(out).float()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("name", "fused"), [("gemma2", True), ("granite", True), ("phi", False), ("gpt2", True)])
def test_logps_are_those_of_the_models_own_logits(name, fused, temperature):
    model = make_model(name)
    policy = Policy(model, Tokens(), FORM, seed=0, temperature=temperature)
    assert policy.head.fused == fused
    pairs = make_pairs()
    assert policy.shares_prompts
    batch = policy.pack(pairs)
    expected = naive_logps(model, pairs, temperature)
    torch.testing.assert_close(policy.logps(batch), expected, rtol=1e-5, atol=0)
    apart = pack_apart(pairs, pad_id=0, device=torch.device("cpu"))
    policy.shares_prompts = False
    torch.testing.assert_close(policy.logps(apart), expected, rtol=1e-5, atol=0)
    policy.shares_prompts = True
    zeros = torch.zeros(2 * len(pairs))
    loss, parts = policy.loss(batch, zeros, MethodConfig(), num_pairs=len(pairs))
    h = expected[:3] - expected[3:]
    torch.testing.assert_close(parts.margins, h, rtol=1e-5, atol=0)
    expected_loss = torch.nn.functional.softplus(-0.1 * h).mean()
    torch.testing.assert_close(loss.detach().float(), expected_loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["gemma2", "phi"])  # a fused head and one that is not
def test_ipo_on_means_and_on_sums(name):
    policy = Policy(make_model(name), Tokens(), FORM, seed=0)
    batch = policy.pack(make_pairs())
    chosen, rejected = policy.logps(batch).chunk(2)
    num_chosen, num_rejected = batch.lengths.chunk(2)
    zeros = torch.zeros(len(batch.lengths))
    for ipo_sum, h in ((False, chosen / num_chosen - rejected / num_rejected), (True, chosen - rejected)):
        method = MethodConfig(loss="ipo", beta=0.5, ipo_sum=ipo_sum)
        loss, _ = policy.loss(batch, zeros, method, num_pairs=len(batch.pairs))
        torch.testing.assert_close(loss.detach().float(), (h - 1.0).square().mean(), rtol=1e-5, atol=0)


def test_dropout_of_the_model_is_off_in_training():
    model = make_model("gpt2")
    policy = Policy(model, Tokens(), FORM, seed=0)
    batch = policy.pack(make_pairs())
    before = policy.logps(batch)
    model.train()
    assert torch.equal(policy.logps(batch), before)


def test_a_view_whose_end_is_interrupted_can_be_ended_again(tiny_model_dir, monkeypatch):
    form = ModelConfig(path=str(tiny_model_dir), full=True)
    policy = load_policy(form, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    trained, own = policy.model.state_dict(), policy.model.named_parameters

    def cut_short():
        for i, found in enumerate(own()):
            if i == 3:
                raise KeyboardInterrupt
            yield found

    with pytest.raises(KeyboardInterrupt), policy.initial():
        monkeypatch.setattr(policy.model, "named_parameters", cut_short)
    monkeypatch.undo()
    mixed = [not torch.equal(now, trained[name]) for name, now in policy.model.state_dict().items()]
    assert any(mixed)
    assert not all(mixed)
    for _ in range(2):
        policy.put_back_()
        assert all(torch.equal(now, trained[name]) for name, now in policy.model.state_dict().items())


@pytest.mark.parametrize("full", [True, False])
def test_initial_is_where_the_run_began(tiny_model_dir, full):
    form = ModelConfig(path=str(tiny_model_dir), full=full, members=1, lora_r=4, lora_alpha=8.0)
    policy = load_policy(form, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    batch = policy.pack(make_pairs())
    before = policy.logps(batch)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    with policy.behavior():
        assert not torch.allclose(policy.logps(batch), before)
    with policy.initial():
        assert torch.equal(policy.logps(batch), before)
    with policy.behavior():
        moved = policy.logps(batch)
    with policy.dense(policy.dense_state()):
        torch.testing.assert_close(policy.logps(batch), moved, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rope_that_follows_the_batch_ends_where_that_begins(kind, tiny_model_dir, tmp_path):
    """Beyond it the log-probs of a sequence depend on the longest one beside it."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {}
    sizes = {**SMALL, "vocab_size": 320, "num_key_value_heads": 2, "intermediate_size": 64, "eos_token_id": 1}
    config = LlamaConfig(**sizes, max_position_embeddings=128, rope_parameters=rope | factors)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for file in tiny_model_dir.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    form = ModelConfig(path=str(tmp_path), full=True)
    where = {"device": torch.device("cpu"), "seed": 0, "temperature": 1.0}
    assert load_policy(form, **where, max_length=32).shares_prompts
    with pytest.raises(ValueError, match=rf"= 33: the model has 32 positions before .* rope \({kind}\) depend on the"):
        load_policy(form, **where, max_length=33)


def test_load_errors_name_the_model(tiny_model_dir, tmp_path):
    form = ModelConfig(path=str(tmp_path), full=True)
    where = {"device": torch.device("cpu"), "seed": 0, "temperature": 1.0}
    with pytest.raises(ValueError, match=r"model\.path = .*not a model folder"):
        load_policy(form, **where, max_length=8)
    good = dataclasses.replace(form, path=str(tiny_model_dir))
    with pytest.raises(ValueError, match=r"max_new_tokens = 100000: the model has \d+ positions"):
        load_policy(good, **where, max_length=100000)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.resize_token_embeddings(16)
    for file in tiny_model_dir.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"16 embeddings for a tokenizer of 320 tokens"):
        load_policy(form, **where, max_length=8)
