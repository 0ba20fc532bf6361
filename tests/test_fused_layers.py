"""Layers with kernels compute what they computed before, in every architecture; those that no kernel matches stay."""

import copy
import pickle

import pytest
import torch
import transformers
from relative import relative_error
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bpo_fast import fused_layers
from bpo_fast.config import ModelConfig
from bpo_fast.fused_layers import fuse_layers_
from bpo_fast.policy import load_policy

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
# of each architecture: its norms (of queries and keys, before and after, and the last) and gated MLPs
FUSED = {
    "Llama": 7,
    "Qwen2": 7,
    "Qwen3": 11,
    "Gemma": 7,
    "Gemma2": 11,
    "Gemma3Text": 15,
    "Mistral": 7,
    "Phi3": 7,
    "SmolLM3": 7,
    "Olmo2": 11,
    "GPTNeoX": 0,
    "GPT2": 0,
}


def make_model(name: str, **more):
    config = getattr(transformers, f"{name}Config")
    head = {"head_dim": 12} if name in ("Qwen3", "Gemma", "Gemma2", "Gemma3Text") else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SMALL | head | more)).eval()
    with torch.no_grad():  # norms as training leaves them, not all ones or zeros
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn(weight.shape))
    return model


def outcome(model, ids):
    """Logits, and the gradient of every weight."""
    model.zero_grad()
    logits = model(ids).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", FUSED)
def test_a_model_and_its_gradients_are_as_before(name):
    model = make_model(name)
    ids = torch.randint(2, 97, (2, 19))
    before, exact = outcome(copy.deepcopy(model), ids), outcome(copy.deepcopy(model).double(), ids)
    assert fuse_layers_(model) == FUSED[name]
    for found, plain, right in zip(outcome(model, ids), before, exact, strict=True):
        assert relative_error(found, right) <= max(1e-5, 2 * relative_error(plain, right))


def test_layers_that_compute_something_else_stay():
    class ShiftedRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) + 1e-3

    class NarrowRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x.clamp(-20, 20))

    class Mlp(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act = act

        def forward(self, x):
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))

    class ClampedMlp(Mlp):
        def forward(self, x):
            return self.down_proj(self.act(self.gate_proj(x)).clamp(max=10) * self.up_proj(x))

    class DroppingMlp(Mlp):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.1, self.training))

    class MlpOfLayers(Mlp):
        def forward(self, x, layer_idx=None):
            return super().forward(x) * {0: 1.0}[layer_idx]

    shut, patched = Mlp(nn.ReLU()), LlamaRMSNorm(8)
    nn.init.zeros_(shut.down_proj.weight)
    nn.init.zeros_(shut.down_proj.bias)
    patched.forward = lambda x: x * 5
    others = [ShiftedRMSNorm(8), NarrowRMSNorm(8), Mlp(nn.ReLU()), Mlp(nn.GELU()), nn.RMSNorm(8)]
    others += [ClampedMlp(nn.SiLU()), DroppingMlp(nn.SiLU()), MlpOfLayers(nn.SiLU()), shut, patched]
    assert fuse_layers_(nn.ModuleList(others)) == 0
    assert torch.equal(patched(torch.ones(8)), torch.full((8,), 5.0))
    assert fuse_layers_(nn.ModuleList([LlamaRMSNorm(8), Mlp(nn.SiLU()), Mlp(nn.GELU(approximate="tanh"))])) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "rounds_twice"), [("Llama", True), ("Qwen3", True), ("Gemma2", False), ("Olmo2", False)]
)
def test_how_a_norm_of_16_bits_rounds_is_found(monkeypatch, name, rounds_twice, dtype):
    monkeypatch.setattr(fused_layers, "has_kernels", lambda x: True)  # as on a GPU; the twins run
    model = make_model(name).to(dtype)
    ids = torch.randint(2, 97, (2, 19))
    expected = model(ids).logits
    assert fuse_layers_(model) == FUSED[name]
    assert torch.equal(model(ids).logits, expected)
    assert rounds_twice == (fused_layers._fused_norm(make_model(name).to(dtype).model.norm).keywords["rounds_twice"])


def test_types_that_change_or_differ_later_take_the_models_own_layers():
    model, ids = make_model("Gemma2"), torch.randint(2, 97, (1, 5))
    expected = copy.deepcopy(model).double()(ids).logits
    fuse_layers_(model)
    assert torch.equal(model.double()(ids).logits, expected)
    norm = LlamaRMSNorm(8)
    assert fuse_layers_(norm) == 1
    assert norm(torch.randn(3, 8).bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(ids).logits.isfinite().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_weights_are_as_before_and_a_copy_is_a_model_of_its_own(copied):
    model = make_model("Llama")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    fuse_layers_(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    other, ids = copied(model), torch.randint(2, 97, (1, 5))
    expected = model(ids).logits
    for weight in model.parameters():
        weight.data.zero_()
    assert torch.equal(other(ids).logits, expected)


@pytest.mark.parametrize("fused", [True, False])
def test_a_policy_has_them_unless_told_otherwise(tiny_model_dir, fused):
    form = ModelConfig(path=str(tiny_model_dir), lora_r=2, lora_alpha=4.0, fused_layers=fused)
    policy = load_policy(form, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    own = [name for name, module in policy.model.named_modules() if "forward" in vars(module) and "norm" in name]
    assert len(own) == (5 if fused else 0)
    assert policy.shares_prompts
