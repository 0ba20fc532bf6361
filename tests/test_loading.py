import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from bpo_fast.loading import pick_device, settle_generation_config_


@pytest.mark.parametrize(
    ("name", "main", "current"), [("cuda:1", True, 1), ("cuda:1", False, 0), ("cuda", True, 0), ("auto", True, 0)]
)
def test_a_main_device_is_the_current_one(name, main, current, monkeypatch):
    now = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: now.append(device.index))
    device = pick_device("run.device", name, main=main)
    assert device.type == "cuda"
    assert now[-1] == current


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"early_stopping": True, "temperature": 0.6}, {"do_sample": None, "temperature": None}),
    ],
)
def test_a_generation_config_that_is_read_can_be_written(own, kept, tmp_path):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **shape))
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], pad_token_id=0, **own)
    settle_generation_config_(model)
    model.save_pretrained(tmp_path)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(found, name) for name in kept} == kept
    assert (found.eos_token_id, found.pad_token_id) == ([2, 3], 0)
