import dataclasses

import pytest
import torch
from tiny_policy import make_pairs, make_policy
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, mm_flop
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, Qwen2Config

from bpo_fast.config import ModelConfig
from bpo_fast.flops import PEAK_TFLOPS, StepFlop, _row_flop, _windows
from bpo_fast.policy import Policy

IN_PLACE = {  # which PyTorch does not count
    torch.ops.aten.addmm_: lambda out, left, right, **_: mm_flop(left, right),
    torch.ops.aten.baddbmm_: lambda out, left, right, **_: bmm_flop(left, right),
}
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, *IN_PLACE)


def counted(policy, pairs) -> int:
    """FLOP of the matrix products that the trunk runs, forward and backward; its attention is one operator.

    Some releases of transformers multiply positions and frequencies by a matrix product, too.
    """
    policy.model.train()
    batch = policy.pack(pairs).repeat(policy.num_members)
    with policy.members(), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        policy.hidden(batch).sum().backward()
    assert policy.shares_prompts
    counts = counter.get_flop_counts()
    rotary = [own for name, own in counts.items() if name.endswith("rotary_emb")]
    whole, *parts = [sum(n for op, n in own.items() if op in PRODUCTS) for own in (counts["Global"], *rotary)]
    return whole - sum(parts)


def num_rows(pairs) -> int:
    return sum(len(p.prompt.ids) + len(p.chosen.ids) + len(p.rejected.ids) for p in pairs)


def test_the_trunk_of_a_policy_trained_whole_is_what_is_run():
    policy, pairs = make_policy(), make_pairs()
    assert counted(policy, pairs) == num_rows(pairs) * StepFlop.of(policy).trunk


@pytest.mark.parametrize("members", [1, 3])
def test_the_trunk_beneath_adapters_is_what_is_run(members):
    policy, pairs = make_policy(ModelConfig(path="tiny", members=members, lora_r=4, lora_alpha=8.0)), make_pairs()
    rows = members * num_rows(pairs)
    first = policy.model.model.layers[0].self_attn
    # the first layer's input is an embedding that nobody trains: q, k and v have no gradient of it to make
    unneeded = sum(m.weight.numel() + 4 * m.in_features for m in (first.q_proj, first.k_proj, first.v_proj))
    flop = StepFlop.of(policy)
    assert counted(policy, pairs) == rows * (flop.trunk - 2 * unneeded)
    assert flop.head == 4 * 97 * 32


def test_a_step_counts_rows_pairs_of_attention_and_members():
    policy, pairs = make_policy(), make_pairs()
    flop = dataclasses.replace(StepFlop.of(policy), num_members=3)
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    expected = 0
    for p in pairs:
        n, c, r = (len(x.ids) for x in (p.prompt, p.chosen, p.rejected))
        seen = sum(key <= query for length in (n, n + c, n + r) for query in range(length) for key in range(length))
        seen -= sum(key <= query for query in range(n) for key in range(n)) * 2
        expected += 3 * (6 * weights * (n + c + r) + 6 * 97 * 32 * (c + r) + 12 * 32 * 2 * seen)
    assert flop.count(pairs) == expected
    assert flop.count([]) == 0


def test_a_window_cuts_what_is_seen():
    flop = StepFlop(num_members=1, trunk=0, head=0, width=1, windows={None: 1, 3: 2}, peak_tflops=None)
    pairs = make_pairs([(4, 3, 5), (2, 1, 9), (1, 1, 1)])
    expected = 0
    for p in pairs:
        n, c, r = (len(x.ids) for x in (p.prompt, p.chosen, p.rejected))
        for window, num in ((100, 1), (3, 2)):
            rows = [*range(n), *range(n, n + c), *range(n, n + r)]
            expected += 12 * num * sum(min(window, row + 1) for row in rows)
    assert flop.count(pairs) == expected


def test_layers_attend_as_their_configuration_says():
    sliding = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    assert _windows(LlamaConfig(num_hidden_layers=3)) == {None: 3}
    assert _windows(Qwen2Config(num_hidden_layers=3, **sliding)) == {None: 1, 7: 2}
    assert _windows(MixtralConfig(num_hidden_layers=2, sliding_window=5)) == {5: 2}


def test_of_the_experts_those_count_that_a_token_visits():
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    experts = [w for n, w in model.named_parameters() if "experts" in n]
    assert sum(_row_flop(w, model.config) for w in experts) == 6 * 2 * 3 * 16 * 8
    assert _row_flop(model.lm_head.weight, model.config) == 6 * 50 * 16


def test_mfu_only_where_the_peak_is_known(monkeypatch):
    policy, pairs = make_policy(), make_pairs()
    flop = StepFlop.of(policy)
    tflops = flop.count(pairs) / 0.5 / 1e12
    assert flop.rates(pairs, 0.5) == {"perf/tflops": tflops}, "no peak of a CPU is known"
    assert flop.rates([], 0.0) == {"perf/tflops": 0.0}
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GH200 480GB", "NVIDIA GB200"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak = PEAK_TFLOPS.get(name)
        wanted = {"perf/mfu": tflops / 989.5} if peak else {}
        assert StepFlop.of(policy).rates(pairs, 0.5) == {"perf/tflops": tflops} | wanted
        assert bool(peak) == (name == "NVIDIA H100 80GB HBM3")
