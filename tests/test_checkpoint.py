"""What a checkpoint holds: the weights of a model, whatever their names are on disk, and the moments of every rank."""

import pytest
import torch
import transformers

from bpo_fast.checkpoint import load_full, moment_files, save_weights
from bpo_fast.config import ModelConfig
from bpo_fast.policy import load_policy


@pytest.mark.parametrize("name", ["GPTNeoX", "Mixtral"])
def test_weights_with_other_names_on_disk_come_back(name, tiny_tokenizer, tmp_path):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    form = ModelConfig(path=str(tmp_path / "model"), full=True)
    policy = load_policy(form, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=8)
    trained = [torch.randn_like(parameter) for parameter in policy.parameters()]
    for parameter, values in zip(policy.parameters(), trained, strict=True):
        parameter.data.copy_(values)
    save_weights(tmp_path, policy)
    for parameter in policy.parameters():
        parameter.data.zero_()
    load_full(tmp_path, policy)
    assert all(torch.equal(p, values) for p, values in zip(policy.parameters(), trained, strict=True))


@pytest.mark.parametrize("size", [1, 2, 11])
def test_moments_of_all_ranks_are_found_in_their_order(tmp_path, size):
    names = ["optimizer.safetensors"] if size == 1 else [f"optimizer-{r}-of-{size}.safetensors" for r in range(size)]
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in moment_files(tmp_path)] == names
    (tmp_path / names[-1]).unlink()
    with pytest.raises(ValueError, match=rf"{names[-1]}: missing"):
        moment_files(tmp_path)
