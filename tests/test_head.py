"""Logits of hidden rows: those that training has, whatever the type of the weights."""

import pytest
import torch
from relative import relative_error

from bpo_fast import head as heads
from bpo_fast.head import Head, unrounded_logits


def parts(dtype):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 3, 64), 4 * torch.randn(97, 64), torch.randn(97)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_are_not_rounded_to_the_type_of_the_weights(dtype, biased):
    hidden, weight, bias = parts(dtype)
    found = unrounded_logits(hidden, weight, bias if biased else None)
    expected = hidden.double() @ weight.double().T + (bias.double() if biased else 0)
    assert (found.dtype, found.shape) == (torch.float32, (2, 3, 97))
    assert relative_error(found, expected) < 1e-5


def test_without_native_code_bfloat16_is_rounded(monkeypatch):
    hidden, weight, bias = parts(torch.bfloat16)
    monkeypatch.setattr(heads, "has_native", lambda: False)
    rounded = torch.nn.functional.linear(hidden, weight, bias)
    assert torch.equal(unrounded_logits(hidden, weight, bias), rounded.float())


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (30.0, 1.0), (None, 0.125), (5.0, 2.0)])
def test_a_head_caps_and_scales(softcap, scale):
    hidden, weight, _ = parts(torch.bfloat16)
    logits = hidden.double() @ weight.double().T
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    assert relative_error(Head(True, softcap, scale).logits(hidden, weight), scale * capped) < 1e-5
