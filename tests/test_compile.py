"""The compiled trunk: the same numbers, and no compilation anew for other lengths."""

import pytest
import torch
from relative import worst_error
from tiny_policy import make_pairs, make_policy
from torch._dynamo.utils import counters

from bpo_fast.config import MethodConfig, ModelConfig
from bpo_fast.gradients import step_gradients

FORMS = {"full": {"full": True}, "lora": {"lora_r": 4, "lora_alpha": 8.0}}


@pytest.mark.parametrize(("form", "window"), [("full", 5), ("lora", None)])
def test_varying_lengths_compile_once_and_give_the_same_gradients(form, window):
    torch._dynamo.reset()
    counters.clear()
    eager = make_policy(ModelConfig(path="tiny", **FORMS[form]), window=window, num_hidden_layers=1)
    compiled = make_policy(ModelConfig(path="tiny", compile=True, **FORMS[form]), window=window, num_hidden_layers=1)
    num_graphs = []
    for shift in range(3):
        pairs = make_pairs([(4 + shift, 3, 5), (3, 2 + 3 * shift, 6), (6, 4, 2 + shift)][: 2 + shift % 2])
        grads = []
        for policy in (eager, compiled):
            step_gradients(pairs, policy, MethodConfig(), max_tokens=1000)
            grads.append([p.grad for p in policy.parameters()])
        assert worst_error(grads[1], grads[0]) < 1e-5
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[0] > 0
    assert num_graphs[-1] == num_graphs[0]
