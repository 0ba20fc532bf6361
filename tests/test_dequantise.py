"""A quantised checkpoint becomes an ordinary dense policy, or is refused in one line."""

import json
import logging
import shutil

import pytest
import torch
from forks import Forked
from quantised import name_quantiser, save_fp8
from tiny_world import run_cli
from transformers import AutoModelForCausalLM

from bpo_fast import config as configs
from bpo_fast.dequantise import dense_
from bpo_fast.policy import load_model

CPU = torch.device("cpu")


def model_config(folder, **knobs):
    return configs.load(None, {"model.path": str(folder), **knobs}).model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_weights_become_dense_ones_and_are_saved_as_such(tiny_model_dir, tmp_path, caplog, dtype):
    values = save_fp8(tiny_model_dir, tmp_path / "fp8")
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(model_config(tmp_path / "fp8", **{"model.dtype": dtype}), CPU)
    assert f"{tmp_path / 'fp8'}: its fp8 weights are dequantised to {dtype}" in caplog.text
    parameters = dict(model.named_parameters())
    assert len(values) == 14
    for name, value in values.items():
        assert torch.equal(parameters[name], value.to(parameters[name].dtype)), name
    assert {(p.dtype, p.requires_grad) for p in parameters.values()} == {(getattr(torch, dtype), True)}
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=model.dtype)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    buffers = dict(model.named_buffers())
    for name, buffer in again.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name


def test_lora_trains_on_the_dequantised_base(tiny_model_dir, tiny_args, tmp_path):
    save_fp8(tiny_model_dir, tmp_path / "fp8")
    args = [str(tmp_path / "fp8") if arg == str(tiny_model_dir) else arg for arg in tiny_args]
    args += ["--pairs", "8", "--out", "run"]
    done = run_cli(args, tmp_path, popen=Forked)
    assert done.returncode == 0, done.stderr
    assert "its fp8 weights are dequantised to float32" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["pairs"]["kept"] == 8
    assert "sampling: transformers" in done.stderr


@pytest.mark.parametrize("method", ["gptq", "awq", "made-up"])
def test_what_cannot_be_undone_is_refused(tiny_model_dir, tmp_path, method):
    shutil.copytree(tiny_model_dir, tmp_path / "quantised")
    name_quantiser(tmp_path / "quantised", method, bits=4)
    wanted = rf"^model\.path = .*: quantised by {method}, which transformers cannot turn back .* name the model that"
    with pytest.raises(ValueError, match=wanted) as caught:
        load_model(model_config(tmp_path / "quantised"), CPU)
    assert "\n" not in str(caught.value)


def test_what_a_quantiser_leaves_behind_goes(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    plain = dict(model.named_parameters())
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    layer = model.model.layers[0].mlp.up_proj
    layer.weight_scale = torch.nn.Parameter(torch.ones(1))
    layer.weight_shape = torch.nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    layer.forward = lambda x: torch.zeros(1)
    layer.weight.requires_grad_(False)
    model._weight_conversions = [object()]
    model = dense_(model, torch.float32)
    assert dict(model.named_parameters()).keys() == plain.keys()
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert not hasattr(model, "_weight_conversions")


def test_what_is_still_packed_is_dequantised_by_a_call_and_must_fit(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.hf_quantizer, called = object(), []

    def dequantize(dtype):
        called.append(dtype)
        return model

    model.dequantize = dequantize
    assert dense_(model, torch.float32) is model
    assert called == [torch.float32]
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(
        ValueError, match=r"dequantised, its model\.layers\.1\.mlp\.up_proj\.weight is not as the model"
    ):
        dense_(model, torch.float32)
