"""Running out of memory: the budget is halved once and no pair is lost."""

import logging

import pytest
import torch
from tiny_policy import make_pairs, make_policy

from bpo_fast.config import MethodConfig
from bpo_fast.gradients import TokenBudget, step_gradients


def gradients(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


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
    torch.testing.assert_close(gradients(policy), wanted, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["loss"], expected["loss"])


def test_out_of_memory_for_the_second_time_is_one_clear_error():
    def work(tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match=r"out of memory with optim\.microbatch_tokens = 50 .*--dry-run") as caught:
        TokenBudget(100).run(work)
    assert type(caught.value) is RuntimeError
