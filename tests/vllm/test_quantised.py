"""Quantised checkpoints: the trainer and vLLM share the dequantised weights, for LoRA and for full fine-tuning."""

import json

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from quantised import save_fp8
from test_train import knobs
from tiny_vllm import greedy_by_transformers, prompts, settings, train_a_little
from transformers import AutoModelForCausalLM, AutoTokenizer

from bpo_fast.checkpoint import complete_checkpoints
from bpo_fast.engine import SamplingParams
from bpo_fast.export import export
from bpo_fast.train import train

NUM_NEW = 16
GROUP = 32


def save_int4(source, out):
    """compressed-tensors, four bits packed into int32, a scale for 32 inputs."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    apply_quantization_config(
        model,
        QuantizationConfig(
            config_groups=scheme, ignore=["lm_head"], format="pack-quantized", quantization_status="frozen"
        ),
    )
    values = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.unflatten(1, (-1, GROUP))
            scale = groups.abs().amax(-1, keepdim=True) / 7
            module.weight_scale.data.copy_(scale.squeeze(-1))
            values[f"{name}.weight"] = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return values


SAVE = {"compressed-tensors": save_int4, "fp8": save_fp8}


def greedy(engine, questions, version=4):
    sampled = engine.generate(questions, SamplingParams(NUM_NEW, temperature=0.0), run_seed=0, policy_version=version)
    return [c[0].ids for c in sampled]


FULL, LORA = {"model__full": True}, {"model__members": 2}


@pytest.mark.parametrize(
    ("method", "form"), [("compressed-tensors", FULL), ("compressed-tensors", LORA), ("fp8", FULL)]
)
def test_dequantised_weights_are_shared(method, form, llama_dir, tmp_path, learner, caplog, capfd):
    values = SAVE[method](llama_dir, tmp_path / "quantised")
    capfd.readouterr()
    policy, engine = learner(tmp_path / "quantised", **form)
    assert capfd.readouterr() == ("", "")  # pytest has the line of the log, below
    assert f"its {method} weights are dequantised to float32" in caplog.text
    session, parameters = engine._session, dict(policy.model.named_parameters())
    assert session.held.why_copied is None
    assert len(values) == 14
    for name, value in values.items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=1e-6)
    merged = set() if policy.config.full else {f"{n}.weight" for n in policy.lora.names}
    for name, parameter in parameters.items():
        assert (parameter.data_ptr() == session.held.views[name].data_ptr()) == (name not in merged)
    questions = prompts(4)
    engine.refresh(0)
    before = greedy(engine, questions, 0)
    assert before == greedy_by_transformers(policy, questions, NUM_NEW)
    train_a_little(policy)
    engine.refresh(4)
    assert greedy(engine, questions) == greedy_by_transformers(policy, questions, NUM_NEW) != before
    assert engine.last_refresh.bytes_copied == sum(parameters[n].numel() * 4 for n in merged)


def test_a_run_on_a_quantised_policy_ends_in_dense_weights(llama_dir, tiny_data, tmp_path):
    save_int4(llama_dir, tmp_path / "quantised")
    run = tmp_path / "run"
    train(settings(tmp_path / "quantised", **knobs(tiny_data, run, **FULL)), quiet=True)
    export(run, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    exported, trained = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "dense", complete_checkpoints(run)[-1])
    )
    for ours, theirs in zip(exported.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)
