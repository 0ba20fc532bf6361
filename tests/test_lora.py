"""The ensemble against plain matrices and against PEFT."""

import json

import pytest
import torch
from peft import PeftModel
from relative import relative_error, worst_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from bpo_fast.lora import LoraEnsemble

IDS = torch.tensor([[5, 9, 17, 3, 40, 11]])


def ensemble(model, members=3, r=4, alpha=12.0, **options):
    lora = LoraEnsemble(model, num_members=members, r=r, alpha=alpha, seed=7, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for b in lora.b:
            b.normal_(0, 0.05, generator=generator)
    return lora


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny_model_dir):
    if request.param == "gpt2":
        return gpt2()
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@torch.no_grad()
def test_average_is_the_mean_of_the_members_deltas(model):
    lora = ensemble(model)
    for name, a, b in zip(lora.names, lora.a, lora.b, strict=True):
        mean = sum(b[m] @ a[m] for m in range(3)) * (12.0 / 4) / 3
        expected = mean.T if "gpt2" in type(model).__name__.lower() else mean
        assert relative_error(lora.delta(name), expected) < 1e-5


@torch.no_grad()
def test_identical_members_average_to_themselves(model):
    lora = ensemble(model)
    for tensor in (*lora.a, *lora.b):
        tensor.copy_(tensor[:1].expand_as(tensor))
    with lora.member(0):
        one = model(IDS).logits
    with lora.average():
        assert relative_error(model(IDS).logits, one) < 1e-5


@torch.no_grad()
def test_merged_weights_compute_the_average_and_are_put_back_bitwise(model):
    lora = ensemble(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with lora.average():
        expected = model(IDS).logits
    with lora.merged():
        assert relative_error(model(IDS).logits, expected) < 1e-5
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@torch.no_grad()
def test_a_fresh_ensemble_is_the_base_bitwise(model):
    base = model(IDS).logits
    lora = LoraEnsemble(model, num_members=2, r=4, alpha=8.0)
    with lora.member(1):
        assert torch.equal(model(IDS).logits, base)
    with lora.average():
        assert torch.equal(model(IDS).logits, base)


@torch.no_grad()
@pytest.mark.parametrize("member", [None, 1])
def test_peft_loads_what_is_saved(model, member, tmp_path):
    lora = ensemble(model)
    with lora.average() if member is None else lora.member(member):
        expected = model(IDS).logits
    model.save_pretrained(tmp_path / "base")
    lora.save(tmp_path / "adapter", str(tmp_path / "base"), member=member)
    rank = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"]
    assert rank == (12 if member is None else 4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert relative_error(peft(IDS).logits, expected) < 1e-5


def test_gradients_reach_the_active_member_only(model):
    lora = ensemble(model)
    with lora.member(1):
        model(IDS).logits.square().sum().backward()
    for tensor in (*lora.a, *lora.b):
        norms = tensor.grad.flatten(1).norm(dim=1)
        assert norms[1] > 0
        assert norms[0] == norms[2] == 0
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()
def test_a_member_saved_and_loaded_is_bitwise_the_same(model, tmp_path):
    lora = ensemble(model)
    before = lora.state()
    lora.save(tmp_path / "a", "base", member=2)
    lora.a[0][2].zero_()
    lora.load_member(2, tmp_path / "a")
    assert all(torch.equal(v, before[k]) for k, v in lora.state().items())


class Odd(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x):
        return super().forward(x)


class OneLayer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.proj = kind(24, 40)

    def get_output_embeddings(self):
        return None

    def forward(self, x):
        return self.proj(x)


@pytest.mark.parametrize("how", ["in place", "apart", "own forward", "autocast"])
@pytest.mark.parametrize("members", [1, 3])
def test_a_layer_and_its_gradients_are_those_written_out(how, members):
    model = OneLayer(Odd if how == "own forward" else nn.Linear)
    lora = ensemble(model, members, in_place=how != "apart")
    x = torch.randn(3, 5, 24, requires_grad=True)
    weights = torch.randn(3, 5, 40)
    by_member = x.view(members, -1, 24)
    deltas = by_member @ lora.a[0].mT @ lora.b[0].mT * lora.scale
    expected = model.proj(x) + deltas.view(3, 5, 40)
    leaves = [x, lora.a[0], lora.b[0]]
    wanted = [expected, *torch.autograd.grad(expected, leaves, weights)]
    with lora.members() if members > 1 else lora.member(0), torch.autocast("cpu", torch.bfloat16, how == "autocast"):
        found = model(x)
    found = [found, *torch.autograd.grad(found, leaves, weights)]
    assert worst_error(found, wanted) < (0.03 if how == "autocast" else 1e-6)


def test_deltas_take_no_pass_over_a_layers_output_but_that_of_their_products():
    model, seen = OneLayer(nn.Linear), []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            views = func.is_view or func._schema.name == "aten::_unsafe_view"
            if isinstance(out, torch.Tensor) and out.numel() >= 100 * 24 and not views:
                seen.append(func._schema.name.removeprefix("aten::"))
            return out

    lora, x, dout = ensemble(model, 1), torch.randn(100, 24, requires_grad=True), torch.ones(100, 40)
    with lora.member(0), Listener():
        model(x).backward(dout)
    assert seen == ["addmm", "addmm_", "mm", "addmm_"]  # the layer with its bias, B; backward the layer, A


def test_dropout_acts_in_training_only(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    lora = ensemble(model, dropout=0.5)
    with torch.no_grad(), lora.member(0):
        assert torch.equal(model(IDS).logits, model(IDS).logits)
        model.train()
        assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_targets_choose_layers(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    lora = LoraEnsemble(model, num_members=1, r=2, alpha=4.0, targets=("q_proj", "down_proj"))
    assert {n.rpartition(".")[2] for n in lora.names} == {"q_proj", "down_proj"}
    everywhere = LoraEnsemble(model, num_members=1, r=2, alpha=4.0)
    assert not any("lm_head" in n for n in everywhere.names)


def test_errors_name_the_knob(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match=r"model\.lora_targets = q_porj: no such linear layer; there are .*q_proj"):
        LoraEnsemble(model, num_members=1, r=2, alpha=4.0, targets=("q_porj",))
    lora = ensemble(model, members=1)
    with pytest.raises(ValueError, match=r"model\.adapters = .*no adapter_model"):
        lora.load_member(0, tmp_path)
    lora.save(tmp_path / "r4", "base", member=0)
    other = LoraEnsemble(model, num_members=1, r=2, alpha=4.0)
    with pytest.raises(ValueError, match=r"rank 4, but model\.lora_r = 2"):
        other.load_member(0, tmp_path / "r4")
    fewer = LoraEnsemble(model, num_members=1, r=4, alpha=4.0, targets=("q_proj",))
    with pytest.raises(ValueError, match=r"layers differ from model\.lora_targets"):
        fewer.load_member(0, tmp_path / "r4")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("use_rslora", True, "use_rslora in adapter_config.json is not supported; merge the adapter"),
        ("alpha_pattern", {"q_proj": 2}, "alpha_pattern in adapter_config.json is not supported"),
        (
            "init_lora_weights",
            "pissa_niter_4",
            "init_lora_weights = pissa_niter_4 in adapter_config.json goes with a changed",
        ),
        ("lora_alpha", None, "adapter_config.json names no r or no lora_alpha"),
    ],
)
def test_adapters_with_another_scale_or_base_are_refused(tiny_model_dir, tmp_path, key, value, said):
    lora = ensemble(AutoModelForCausalLM.from_pretrained(tiny_model_dir), members=1)
    lora.save(tmp_path, "base", member=0)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=said):
        lora.load_member(0, tmp_path)


def test_torn_adapters_are_named(tiny_model_dir, tmp_path):
    lora = ensemble(AutoModelForCausalLM.from_pretrained(tiny_model_dir), members=1)
    lora.save(tmp_path, "base", member=0)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.adapters = .*adapter_model\.safetensors cannot be read"):
        lora.load_member(0, tmp_path)
    weights.with_name("adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"model\.adapters = .*adapter_config\.json cannot be read"):
        lora.load_member(0, tmp_path)
