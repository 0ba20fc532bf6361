"""Shared prompts against one sequence at a time, for every architecture, forward and backward."""

from functools import partial
from itertools import combinations, pairwise

import pytest
import torch
import transformers
from packaging.version import Version
from relative import relative_error, worst_error
from transformers import AutoModelForCausalLM

from bpo_fast import attention
from bpo_fast.attention import exchange_attention_, lay_out, shared_prompt_attention
from bpo_fast.config import MethodConfig, ModelConfig
from bpo_fast.packing import pack_apart, pack_shared
from bpo_fast.policy import Policy
from bpo_fast.types import Completion, Pair, Prompt
from bpo_fast.varlen import VarlenLayout, _torch_varlen, attend_varlen, pick_varlen, varlen_reference

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
HEAD = {"head_dim": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}
# values that are narrower than keys
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 4,
}
SHORT_LLAMA4 = {"intermediate_size_mlp": 64, "use_qk_norm": False}
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", HEAD),
    "gemma2": ("Gemma2Config", {**HEAD, "sliding_window": 6, "attn_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**HEAD, "sliding_window": 6}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "phi3": ("Phi3Config", {"sliding_window": 6}),
    "smollm3": ("SmolLM3Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),  # Pythia
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),  # SmolLM, SmolLM2
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),  # Qwen2.5-0.5B
    "deepseek3": ("DeepseekV3Config", LATENT),
    "phi3-longrope": ("Phi3Config", {"max_position_embeddings": 128, "rope_scaling": LONGROPE}),
    "mistral-32": ("MistralConfig", {"sliding_window": 32}),
    "gemma2-32": ("Gemma2Config", {**HEAD, "sliding_window": 32}),
    "gemma3-32": ("Gemma3TextConfig", {**HEAD, "sliding_window": 32}),
    "cohere2-32": ("Cohere2Config", {**HEAD, "sliding_window": 32}),
    "doge-32": ("DogeConfig", {"sliding_window": 32}),
    "llama4-32": ("Llama4TextConfig", {**HEAD, "attention_chunk_size": 32, "num_local_experts": 2, **SHORT_LLAMA4}),
}
EXACT = [name for name in CONFIGS if not name.endswith("-32")]
LENGTHS = ((9, 5, 11), (3, 1, 7), (14, 8, 2), (1, 1, 1))


class Tokens:
    pad_token_id, eos_token_id = 0, 1


def make_model(name, dtype=torch.float32, **changes):
    skip_where_wrong(name)
    torch.manual_seed(0)
    config_class, extra = CONFIGS[name]
    config = getattr(transformers, config_class)(**SMALL | extra | changes)
    # some releases of transformers let SDPA drop a softcap
    options = {"attn_implementation": "eager"} if hasattr(config, "attn_logit_softcapping") else {}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()


def skip_where_wrong(name):
    """Leaves out models that transformers itself computes otherwise beside padding."""
    if name == "doge-32" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("Doge of transformers before 5.18 looks at padding")


def make_pairs(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for i, (n, c, r) in enumerate(lengths):
        ids = torch.randint(2, 97, (n + c + r,), generator=generator).tolist()
        sides = [Completion(i, k, tuple(x), "", False, 0, 0) for k, x in enumerate((ids[n : n + c], ids[n + c :]))]
        pairs.append(Pair(Prompt(i, "", tuple(ids[:n])), *sides, 1.0, 0.0))
    return pairs


def alone(model, pairs):
    """[2P] log-probs, a forward a sequence, chosen first; differentiable."""
    out = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            prompt, completion = pair.prompt.ids, getattr(pair, side).ids
            rows = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            out.append(rows.gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(out)


def check_exact(policy, plain, pairs):
    """Log-probs and gradients of packed pairs are those of a model that takes every sequence alone.

    In float64: in float32 that model's own gradients are up to 7e-6 off.
    """
    expected = alone(plain.double(), pairs)
    h = expected[: len(pairs)] - expected[len(pairs) :]
    torch.nn.functional.softplus(-0.1 * h).mean().backward()
    batch = policy.pack(pairs)
    torch.testing.assert_close(policy.logps(batch), expected.detach().float(), rtol=1e-5, atol=0)
    loss, _ = policy.loss(batch, torch.zeros(2 * len(pairs)), MethodConfig(), num_pairs=len(pairs))
    loss.backward()
    for (key, p), q in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < 1e-5, key


@pytest.mark.parametrize("name", EXACT)
def test_log_probs_and_gradients_are_those_of_sequences_alone(name):
    policy = Policy(make_model(name), Tokens(), ModelConfig(path=name, full=True), seed=0)
    pairs = make_pairs()
    assert policy.shares_prompts
    assert policy.pack(pairs).input_ids.numel() == sum(map(sum, LENGTHS))
    check_exact(policy, make_model(name), pairs)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "mistral-32"])
@pytest.mark.parametrize("form", [{"full": True}, {"lora_r": 4, "lora_alpha": 8.0, "members": 3}])
def test_in_bfloat16_rows_are_filled_up_and_are_off_as_transformers_own_are(name, form, monkeypatch):
    """A CPU builds code for each size of a product of 16 bits."""
    if attention.has_native():
        monkeypatch.setattr(attention, "attend_sdpa", None)
    policy = Policy(make_model(name, torch.bfloat16), Tokens(), ModelConfig(path=name, **form), seed=0)
    pairs = make_pairs(((60, 20, 31), (5, 3, 4)) if name.endswith("-32") else (*LENGTHS, (8, 2, 3)))
    assert policy.shares_prompts
    batch = policy.pack(pairs)
    assert batch.input_ids.numel() > sum(map(policy.pair_tokens, pairs))
    assert batch.input_ids.numel() % (64 // policy.num_members) == 0
    exact, rough = make_model(name, torch.bfloat16).double(), make_model(name, torch.bfloat16)
    expected, by_rows = alone(exact, pairs), alone(rough, pairs)
    error = relative_error(policy.logps(batch), expected)
    assert error <= 2 * relative_error(by_rows, expected)
    if policy.lora:
        return
    for logps in (expected, by_rows):
        torch.nn.functional.softplus(-0.1 * (logps[: len(pairs)] - logps[len(pairs) :])).mean().backward()
    loss, _ = policy.loss(batch, torch.zeros(2 * len(pairs)), MethodConfig(), num_pairs=len(pairs))
    loss.backward()
    grads, found, others = ([p.grad for p in m.parameters()] for m in (exact, policy.model, rough))
    assert worst_error(found, grads) <= 2 * worst_error(others, grads)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("mistral-32", True),
        ("gemma2-32", True),
        ("gemma3-32", True),
        ("cohere2-32", True),
        ("doge-32", False),  # its windows are in masks that its layers make
        ("llama4-32", False),  # its chunks are in masks
    ],
)
def test_windows_longer_than_what_is_tried_are_kept(name, shares, caplog):
    policy = Policy(make_model(name), Tokens(), ModelConfig(path=name, full=True), seed=0)
    assert policy.shares_prompts == shares
    said = [record.getMessage() for record in caplog.records if record.name.startswith("bpo_fast")]
    assert ["prompts are not shared within pairs" in line for line in said] == [True] * (not shares)
    pairs = make_pairs(((60, 20, 31), (5, 3, 4)))
    if shares:
        check_exact(policy, make_model(name), pairs)
    else:
        expected = alone(make_model(name), pairs).detach()
        torch.testing.assert_close(policy.logps(policy.pack(pairs)), expected, rtol=1e-5, atol=0)


def test_a_window_that_is_not_handed_over_is_noticed_in_16_bits(monkeypatch, caplog):
    """Where the weights are small a window changes less than rounding may."""
    form = {"path": "mistral-32", "full": True}
    assert Policy(make_model(form["path"], torch.bfloat16), Tokens(), ModelConfig(**form), seed=0).shares_prompts
    attend = attention.shared_prompt_attention
    monkeypatch.setattr(
        attention, "shared_prompt_attention", lambda *parts, **options: attend(*parts, **options | {"window": None})
    )
    model = make_model(form["path"], torch.bfloat16, initializer_range=0.02)
    assert not Policy(model, Tokens(), ModelConfig(**form), seed=0).shares_prompts
    assert "results differ by 0." in caplog.text


def test_a_softcap_is_not_left_to_sdpa():
    """Where the attention cannot be exchanged, either."""
    model = make_model("gemma2")
    model.config._attn_implementation = "sdpa"  # as a release takes it that does not know better
    ids = torch.arange(2, 20)[None]

    def shared():
        raise ValueError("not this one")

    with torch.no_grad():
        assert exchange_attention_(model, lambda: model(ids).logits, shared, tolerance=1e-3) == "not this one"
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_every_way_is_the_same_attention(num_rows, window, softcap, monkeypatch):
    """Padded for SDPA, natively, and what a flash kernel would be given, by its naive twin; groups of 2, 1 and 3."""
    generator = torch.Generator().manual_seed(0)
    layout, _ = lay_out(((9, 5, 11), (3, 7), (4, 2, 1, 6)), torch.device("cpu"))
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    grads = []
    for way in ("padded", "native", "varlen"):
        monkeypatch.setattr(attention, "has_native", lambda way=way: way == "native")
        q, k, v = (
            torch.randn(num_rows, heads, 48, 8, generator=generator.manual_seed(heads)).requires_grad_()
            for heads in (4, 2, 2)
        )
        if way == "varlen":
            out = attend_varlen(q, k, v, layout.varlen(num_rows), varlen_reference, **options)
        else:
            out = shared_prompt_attention(q, k, v, layout, **options)
        out.backward(torch.randn(out.shape, generator=generator.manual_seed(9)))
        grads.append((out, q.grad, k.grad, v.grad))
    *ours, varlen = grads
    for way in ours:
        assert worst_error(way, varlen) < 1e-5


def test_sequences_on_a_cpu_go_to_sdpa():
    q = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert pick_varlen(q, q, None) is None


def test_the_kernel_of_torch_2_11_takes_fewer_heads_of_keys_without_a_word(monkeypatch):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        layout = VarlenLayout(cu_q, cu_k, torch.empty(0), max_q, max_k)
        return varlen_reference(q, k, v, layout, scale, window_size[0] + 1 or None, None)

    from torch.nn.attention import varlen as of_torch

    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    args = (q, k, v, VarlenLayout(bounds, bounds, torch.empty(0), 4, 4), 0.3)
    monkeypatch.setattr(of_torch, "varlen_attn", varlen_attn)
    for window in (None, 2):
        assert torch.equal(_torch_varlen(*args, window, None), varlen_reference(*args, window, None))


def test_bounds_of_a_batch_stay_on_the_host():
    """Where the loss reads them: on a GPU that would wait for the trunk."""
    for pack in (pack_shared, partial(pack_apart, pad_id=0)):
        batch = pack(make_pairs(), device=torch.device("meta")).repeat(3)
        assert {batch.rows.device.type, batch.targets.device.type, batch.input_ids.device.type} == {"meta"}
        assert batch.cu_seqlens.device.type == batch.lengths.device.type == "cpu"


def test_three_completions_of_a_prompt_are_three_sequences():
    """Any number of completions packs the same way: each sees its prompt and itself."""
    model = make_model("llama")
    Policy(model, Tokens(), ModelConfig(path="llama", full=True), seed=0)
    ids = torch.randint(2, 97, (16,), generator=torch.Generator().manual_seed(2))
    prompt, *completions = ids.split([5, 4, 1, 6])
    layout, positions = lay_out(((5, 4, 1, 6),), torch.device("cpu"))
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool)
    with torch.no_grad():
        packed = model(ids[None], position_ids=positions[None], attention_mask=mask, shared_prompts=layout).logits[0]
        for completion, part in zip(completions, packed[5:].split([4, 1, 6]), strict=True):
            alone = model(torch.cat([prompt, completion])[None]).logits[0]
            assert relative_error(part, alone[5:]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_without_a_layout_the_model_attends_as_before(name):
    ids = torch.randint(2, 97, (2, 15), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padded on the left, as in sampling
    plain = make_model(name)
    policy = Policy(make_model(name), Tokens(), ModelConfig(path=name, full=True), seed=0)
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": mask}):
            expected, found = plain(ids, **kwargs).logits, policy.model(ids, **kwargs).logits
            seen = mask.bool() if kwargs else torch.ones_like(mask, dtype=torch.bool)
            assert relative_error(found[seen], expected[seen]) < 1e-5


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_the_gradient_does_not_depend_on_the_split(order):
    policy = Policy(make_model("qwen2"), Tokens(), ModelConfig(path="qwen2", full=True), seed=0)
    pairs, grads = make_pairs(), []
    splits = [(0, *inner, 4) for n in range(4) for inner in combinations((1, 2, 3), n)]
    for cuts in splits:
        policy.model.zero_grad()
        for first, last in pairwise(cuts):
            part = [pairs[i] for i in order[first:last]]
            loss, _ = policy.loss(policy.pack(part), torch.zeros(2 * len(part)), MethodConfig(), num_pairs=4)
            loss.backward()
        grads.append([p.grad for p in policy.model.parameters()])
    assert len(grads) == 8
    assert all(worst_error(other, grads[0]) < 1e-5 for other in grads[1:])


@pytest.mark.parametrize("num_members", [2, 5])
def test_members_in_one_pass_are_members_one_by_one(num_members):
    form = ModelConfig(path="llama", members=num_members, lora_r=4, lora_alpha=8.0)
    pairs, ref = make_pairs(), torch.randn(8, generator=torch.Generator().manual_seed(1))
    grads, losses = {}, {}
    for way in ("together", "one by one"):
        policy = Policy(make_model("llama"), Tokens(), form, seed=0)
        with torch.no_grad():
            for b in policy.lora.b:
                b.normal_(0, 0.1, generator=torch.Generator().manual_seed(b.shape[1]))
        batch = pack_shared(pairs, device=torch.device("cpu"))
        if way == "together":
            ref_logps = ref.view(2, -1).repeat(1, num_members).flatten()
            with policy.members():
                loss, parts = policy.loss(batch.repeat(num_members), ref_logps, MethodConfig(), num_pairs=4)
                loss.backward()
            losses[way] = parts.loss.detach()
        else:
            found = []
            for m in range(num_members):
                with policy.member(m):
                    loss, parts = policy.loss(batch, ref, MethodConfig(), num_pairs=4)
                    loss.backward()
                found.append(parts.loss.detach())
            losses[way] = torch.cat(found)
        grads[way] = [p.grad for p in policy.parameters()]
    torch.testing.assert_close(losses["together"], losses["one by one"], rtol=1e-5, atol=0)
    assert worst_error(grads["together"], grads["one by one"]) < 1e-5


def test_a_model_that_cannot_share_prompts_says_so_and_takes_sequences_apart(caplog):
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, eos_token_id=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    policy = Policy(model, Tokens(), ModelConfig(path="bloom", full=True), seed=0)
    assert not policy.shares_prompts
    (line,) = caplog.records
    assert line.getMessage().startswith("BloomForCausalLM: prompts are not shared within pairs (")
    pairs = make_pairs()
    torch.testing.assert_close(policy.logps(policy.pack(pairs)), alone(model, pairs).detach(), rtol=1e-5, atol=0)
