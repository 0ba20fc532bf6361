"""Gradients of a step: those of any split and of single members; out of memory, where no pair is lost."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from relative import worst_error
from tiny_policy import make_pairs, make_policy

from bpo_fast.batches import TokenBudget, microbatch_tokens
from bpo_fast.config import MethodConfig, ModelConfig, OptimConfig
from bpo_fast.gradients import microbatches, step_gradients, sum_over_ranks
from bpo_fast.optim import Optimizer
from bpo_fast.ranks import Group

LORA = {"path": "tiny", "lora_r": 4, "lora_alpha": 8.0}
FORMS = {"full": ModelConfig(path="tiny", full=True), "lora": ModelConfig(**LORA, members=3)}
LOSSES = ("dpo", "ipo", "slic")


def gradients(policy):
    return [p.grad for p in policy.parameters()]


def with_other_reference(pairs):
    """Pairs with margins of either sign, so that every loss has a gradient."""
    return [replace(p, ref_logps=(-20.0 - i, -25.0 + i)) for i, p in enumerate(pairs)]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_does_not_depend_on_the_split(form, loss, shared):
    pairs, found, num_batches = with_other_reference(make_pairs()), [], []
    for tokens in (10_000, 78, 36):  # of all members
        policy = make_policy(FORMS[form])
        policy.shares_prompts = shared
        with torch.no_grad():
            for b in policy.lora.b if policy.lora else ():
                b.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        max_tokens = max(tokens, 22 * policy.num_members)  # apart, the longest pair takes 22
        num_batches.append(len(microbatches(pairs, policy, max_tokens)))
        step_gradients(pairs, policy, MethodConfig(loss=loss), max_tokens=max_tokens)
        found.append(gradients(policy))
    assert num_batches[0] == 1 < num_batches[-1]
    for other in found[1:]:
        assert worst_error(other, found[0]) < 1e-5


@pytest.mark.parametrize("shares", [(slice(0, 3), slice(3, 4)), (slice(0, 4), slice(0, 0))], ids=["both", "one"])
def test_ranks_end_with_what_one_has_and_without_a_gradient_where_it_has_none(tmp_path, shares):
    pairs = with_other_reference(make_pairs())
    alone, *policies = (make_policy() for _ in range(3))
    for policy in (alone, *policies):
        policy.model.unused = torch.nn.Parameter(torch.ones(3))

    def work(rank):
        group, policy = Group(rank, 2, tmp_path / "meeting"), policies[rank]
        group.connect(policy.device)
        sums = step_gradients(pairs[shares[rank]], policy, MethodConfig(), max_tokens=36, num_pairs=len(pairs))
        return sum_over_ranks(sums, policy, group)

    expected = step_gradients(pairs, alone, MethodConfig(), max_tokens=36)
    with ThreadPoolExecutor(2) as ranks:
        for policy, sums in zip(policies, ranks.map(work, range(2)), strict=True):
            assert policy.model.unused.grad is None  # or weight decay would move it
            assert sums.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(torch.as_tensor(sums[name]), torch.as_tensor(value))
            found, wanted = ([g for g in gradients(p) if g is not None] for p in (policy, alone))
            assert worst_error(found, wanted) < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_members_trained_together_end_where_separate_runs_end(loss):
    num_members, num_steps = 3, 10
    together = make_policy(FORMS["lora"])
    start = together.lora.state()
    with together.behavior():
        ref = together.logps(together.pack(make_pairs())).view(2, -1).T.tolist()
    pairs = [replace(p, ref_logps=tuple(both)) for p, both in zip(make_pairs(), ref, strict=True)]

    def train(policy):
        config = OptimConfig(learning_rate=3e-3)
        optimizer = Optimizer(policy.parameters(), config, num_steps=num_steps, num_members=policy.num_members)
        for step in range(num_steps):
            sums = step_gradients(pairs, policy, MethodConfig(loss=loss), max_tokens=1000)
            optimizer.step(step, sums["loss"])
        return policy.lora.state()

    end = train(together)
    for m in range(num_members):
        alone = make_policy(ModelConfig(**LORA))
        alone.lora.load_state({name: tensor[m : m + 1] for name, tensor in start.items()})
        moved = {name: tensor[0] - start[name][m] for name, tensor in train(alone).items()}
        assert all(float(change.norm()) > 1e-3 for change in moved.values())
        # all of it as one vector: where a gradient is next to nothing, Adam makes a whole step of its rounding
        change = torch.cat([tensor.flatten() for tensor in moved.values()])
        other = torch.cat([(end[name][m] - start[name][m]).flatten() for name in moved])
        assert float((other - change).norm() / change.norm()) < 1e-5


@pytest.mark.parametrize("when", [1, 2])
def test_out_of_memory_halves_the_budget_once_and_loses_no_pair(when, monkeypatch, caplog):
    policy, pairs = make_policy(), make_pairs()
    expected = step_gradients(pairs, policy, MethodConfig(), max_tokens=1000)
    wanted = gradients(policy)
    calls, loss = [], policy.loss

    def stub(batch, *args, **kwargs):
        calls.append(len(batch.pairs))
        if len(calls) == when:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return loss(batch, *args, **kwargs)

    monkeypatch.setattr(policy, "loss", stub)
    budget = TokenBudget(26)  # two micro-batches
    with caplog.at_level(logging.WARNING):
        found = budget.run(lambda tokens: step_gradients(pairs, policy, MethodConfig(), max_tokens=tokens))
    assert budget.tokens == 13
    assert caplog.text.count("optim.microbatch_tokens is 13 from here on") == 1
    assert sum(calls[when:]) == len(pairs)  # all over again, each once
    assert worst_error(gradients(policy), wanted) < 1e-5
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["loss"], expected["loss"])


def test_the_budget_is_not_halved_below_the_longest_pair(caplog):
    policy, pairs = make_policy(), make_pairs()
    tried = []

    def work(tokens):
        tried.append(tokens)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step_gradients(pairs, policy, MethodConfig(), max_tokens=tokens)

    TokenBudget(20, longest=12).run(work)
    assert tried == [20, 12]
    assert "optim.microbatch_tokens is 12 from here on" in caplog.text


def test_out_of_memory_with_the_longest_pair_alone_is_no_matter_of_the_budget():
    calls = []

    def work(tokens):
        calls.append(tokens)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match=r"= 12, which one pair at the limits of length takes, \(CUDA .*--dry-run"):
        TokenBudget(12, longest=12).run(work)
    assert calls == [12]


def test_out_of_memory_for_the_second_time_is_one_clear_error():
    def work(tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match=r"out of memory with optim\.microbatch_tokens = 50 .*--dry-run") as caught:
        TokenBudget(100).run(work)
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize(
    ("tokens", "device", "longest", "expected"),
    [(0, "cpu", 100, 1536), (0, "cpu", 1900, 1900), (0, "cuda", 100, 8192), (700, "cpu", 900, 700)],
)
def test_tokens_of_a_microbatch_suit_the_device(tokens, device, longest, expected):
    config = OptimConfig(microbatch_tokens=tokens)
    assert microbatch_tokens(config, torch.device(device), longest) == expected
