"""The ensemble: merged into a second copy, or read in place; the trainer's arithmetic is that of engine hf."""

import pytest
import torch
from tiny_vllm import greedy_by_transformers, prompts, settings, train_a_little

from bpo_fast.engine import SamplingParams
from bpo_fast.engine.session import merges_lora

NUM_NEW = 16


@pytest.mark.parametrize("members", [1, 5])
@pytest.mark.parametrize("merge", [True, False])
def test_the_behavior_is_the_exact_average(llama_dir, learner, members, merge):
    policy, engine = learner(llama_dir, model__members=members, sampling__merge_lora=merge)
    questions = prompts(6)
    engine.refresh(0)
    base = [c[0].ids for c in sample(engine, questions, 0, temperature=0.0)]
    assert base == greedy_by_transformers(policy, questions, NUM_NEW)
    train_a_little(policy)
    addresses = {p.data_ptr() for p in policy.parameters()}
    engine.refresh(4)
    after = [c[0].ids for c in sample(engine, questions, temperature=0.0)]
    assert after == greedy_by_transformers(policy, questions, NUM_NEW)
    assert after != base
    linears = {f"{n}.weight" for n in policy.lora.names}
    num_bytes = sum(p.numel() * 4 for n, p in policy.model.named_parameters() if n in linears)
    assert engine.last_refresh.bytes_copied == (num_bytes if merge else 0)
    for name, parameter in policy.model.named_parameters():
        shared = parameter.data_ptr() == engine._session.held.views[name].data_ptr()
        assert shared == (not merge or name not in linears)
    if not merge:
        storages = [s.data_ptr() for layer in engine._session.held.module.modules() for s in storage(layer)]
        assert addresses == set(storages)


def test_the_rule_merges_on_a_cpu_and_reads_in_place_on_a_gpu(llama_dir):
    def merges(device, **knobs):
        return merges_lora(settings(llama_dir, **knobs), torch.device(device))

    assert merges("cpu")
    assert not merges("cuda")
    assert merges("cuda", sampling__merge_lora=True)
    assert not merges("cpu", sampling__merge_lora=False)
    assert not merges("cpu", model__members=2, sampling__members="single")
    assert merges("cpu", model__members=1, sampling__members="single")


@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_layer_reads_the_members_at_their_scale(bias):
    """On a GPU vLLM compiles its layers; inductor took x W + alpha (A B) for an addmm, whose alpha it left at 1."""
    from bpo_fast.engine.loader import PlainLinear

    layer = torch.nn.Linear(512, 640, bias=bias).requires_grad_(False)
    a, b = torch.randn(3, 4, 512), torch.randn(3, 320, 4)
    rows = slice(32, 352)
    layer.lora_parts = ((rows, a, b),)
    method, x = PlainLinear(0.25), torch.randn(40, 512)
    expected = layer(x)
    expected[:, rows] += 0.25 * torch.einsum("mor,mri,ti->to", b, a, x)
    compiled = torch.compile(lambda x: method.apply(layer, x, layer.bias), fullgraph=True)
    for apply in (compiled, lambda x: method.apply(layer, x, layer.bias)):
        torch.testing.assert_close(apply(x), expected, rtol=1e-4, atol=1e-4)


def storage(layer):
    return [t for _, a, b in getattr(layer, "lora_parts", ()) for t in (a, b)]


def sample(engine, questions, version=4, **params):
    return engine.generate(questions, SamplingParams(NUM_NEW, **params), run_seed=1, policy_version=version)


def test_training_is_bit_for_bit_that_of_engine_hf(llama_dir, learner):
    by_hf, _ = learner(llama_dir, sampling__engine="hf", model__members=2)
    live, engine = learner(llama_dir, model__members=2, sampling__merge_lora=False)
    for policy in (by_hf, live):
        train_a_little(policy)
    engine.refresh(4)
    for ours, theirs in zip(live.parameters(), by_hf.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    questions = prompts(8)
    with by_hf.behavior():
        assert [c[0].ids for c in sample(engine, questions, temperature=0.0)] == greedy_by_transformers(
            by_hf, questions, NUM_NEW
        )


def test_vllm_knows_the_compiled_graphs_of_the_forms_apart(llama_dir, learner):
    form = {"sampling__merge_lora": False}
    forms = [
        {"model__full": True},
        *({"model__members": members} | form for members in (1, 5)),
        {"model__members": 5, "model__lora_alpha": 16.0} | form,
        {"model__members": 5, "sampling__members": "single"} | form,
    ]
    keys = []
    for knobs in (*forms, forms[2]):
        _, engine = learner(llama_dir, **knobs)
        keys.append(engine._session.llm.llm_engine.vllm_config.compute_hash())
        engine.close()
    assert len(set(keys)) == len(forms)
    assert keys[-1] == keys[2]


def test_some_targets_only(llama_dir, learner):
    policy, engine = learner(llama_dir, model__lora_targets=["v_proj", "up_proj"], sampling__merge_lora=False)
    train_a_little(policy)
    engine.refresh(4)
    questions = prompts(4)
    assert [c[0].ids for c in sample(engine, questions, temperature=0.0)] == greedy_by_transformers(
        policy, questions, NUM_NEW
    )
