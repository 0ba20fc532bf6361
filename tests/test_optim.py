"""The stacked optimizer against M separate ones, the schedule, and what happens to bad gradients."""

import dataclasses

import pytest
import torch
from torch import nn

from bpo_fast.config import OptimConfig
from bpo_fast.optim import Optimizer, learning_rate

CONFIG = dataclasses.replace(OptimConfig(), learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.1)
SHAPES = ((5, 3), (7,))


def stacked(num_members, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(num_members, *s).to(dtype)) for s in SHAPES]


def set_grads(parameters, step):
    torch.manual_seed(100 + step)
    for p in parameters:
        # members of very different size: clipping them together would couple them
        sizes = torch.tensor([0.01, 1.0, 30.0])[: p.shape[0]].view(-1, *[1] * (p.dim() - 1))
        p.grad = (torch.randn(p.shape) * sizes).to(p.dtype)


def test_stacked_members_train_as_separate_optimizers():
    parameters = stacked(3)
    singles = [[nn.Parameter(p[m].detach().clone()) for p in parameters] for m in range(3)]
    options = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
    adamws = [torch.optim.AdamW(s, **options) for s in singles]
    optimizer = Optimizer(parameters, CONFIG, num_steps=10, num_members=3)
    for step in range(10):
        set_grads(parameters, step)
        for m, (single, adamw) in enumerate(zip(singles, adamws, strict=True)):
            for p, q in zip(parameters, single, strict=True):
                q.grad = p.grad[m].clone()
            torch.nn.utils.clip_grad_norm_(single, 0.5)
            adamw.param_groups[0]["lr"] = 1e-2 * (1 - step / 10)
            adamw.step()
        norm, finite = optimizer.step(step)
        assert finite
        assert norm > 0
    for m in range(3):
        for p, q in zip(parameters, singles[m], strict=True):
            torch.testing.assert_close(p[m], q, rtol=1e-5, atol=1e-7)


def test_full_fine_tuning_clips_all_tensors_together():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]
    optimizer = Optimizer(parameters, CONFIG, num_steps=1, num_members=None)
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((4,), 3.0)
    norm = float(optimizer.step(0)[0])
    assert norm == pytest.approx((3 * 4 + 4 * 9) ** 0.5)
    assert parameters[0].grad[0] == pytest.approx(2.0 * 0.5 / norm, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad):
    parameters = stacked(2)
    optimizer = Optimizer(parameters, CONFIG, num_steps=10, num_members=2)
    set_grads(parameters, 0)
    optimizer.step(0)
    before = [p.detach().clone() for p in parameters]
    moments = {k: v.clone() for k, v in optimizer.state_dict().items()}
    set_grads(parameters, 1)
    parameters[1].grad[1, 3] = bad
    norm, finite = map(float, optimizer.step(1))
    assert not finite
    assert norm != norm or norm == float("inf")
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert all(torch.equal(v, moments[k]) for k, v in optimizer.state_dict().items())


def test_bfloat16_weights_do_not_lose_small_updates():
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    config = dataclasses.replace(CONFIG, learning_rate=1e-4, weight_decay=0.0, schedule="constant")
    optimizer = Optimizer([weight], config, num_steps=100, num_members=None)
    for step in range(100):
        weight.grad = torch.ones(8, dtype=torch.bfloat16)
        optimizer.step(step)
    # 100 steps of 1e-4 are 0.01; each alone is far below half a bf16 step (0.002) at 1
    assert float(weight.detach().float().mean()) == pytest.approx(0.99, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bitwise(dtype):
    parameters = stacked(2, dtype)
    optimizer = Optimizer(parameters, CONFIG, num_steps=6, num_members=2)
    for step in range(3):
        set_grads(parameters, step)
        optimizer.step(step)
    copy = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = Optimizer(copy, CONFIG, num_steps=6, num_members=2)
    other.load_state_dict({k: v.clone() for k, v in optimizer.state_dict().items()})
    for step in range(3, 6):
        set_grads(parameters, step)
        set_grads(copy, step)
        optimizer.step(step)
        other.step(step)
    assert all(torch.equal(p, q) for p, q in zip(parameters, copy, strict=True))


@pytest.mark.parametrize("num_members", [None, 3])
def test_moments_of_8_bits_train_almost_as_those_of_32(num_members):
    ways = {}
    for states in ("float32", "8bit"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(3, 20, 30))
        target = torch.randn(3, 20, 30)
        config = dataclasses.replace(CONFIG, states=states, weight_decay=0.0, max_grad_norm=1e9, schedule="constant")
        optimizer = Optimizer([weight], config, num_steps=200, num_members=num_members)
        start = weight.detach().clone()
        for step in range(60):
            weight.grad = (weight.detach() - target) * torch.logspace(-1, 1, 30)  # columns of different size
            optimizer.step(step)
        ways[states] = weight.detach() - start
    error = (ways["8bit"] - ways["float32"]).norm() / ways["float32"].norm()
    assert float(error) < 0.1
    assert sum(v.numel() * v.element_size() for v in optimizer.state_dict().values()) < 2.4 * weight.numel()


def test_8_bit_states_skip_bad_steps_and_go_on_bitwise():
    config = dataclasses.replace(CONFIG, states="8bit")
    parameters = stacked(2)
    optimizer = Optimizer(parameters, config, num_steps=6, num_members=2)
    set_grads(parameters, 0)
    optimizer.step(0)
    kept = {k: v.clone() for k, v in optimizer.state_dict().items()}
    copy = [nn.Parameter(p.detach().clone()) for p in parameters]
    set_grads(parameters, 1)
    parameters[0].grad[0, 0, 0] = float("nan")
    assert not optimizer.step(1)[1]
    assert all(torch.equal(v, kept[k]) for k, v in optimizer.state_dict().items())
    other = Optimizer(copy, config, num_steps=6, num_members=2)
    other.load_state_dict(kept)
    for step in (1, 2):
        set_grads(parameters, step)
        set_grads(copy, step)
        optimizer.step(step)
        other.step(step)
    assert all(torch.equal(p, q) for p, q in zip(parameters, copy, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_states_train_alike(dtype):
    ways = []
    for offload in (False, True):
        parameters = stacked(2, dtype)
        optimizer = Optimizer(parameters, dataclasses.replace(CONFIG, offload=offload), num_steps=5, num_members=2)
        for step in range(5):
            set_grads(parameters, step)
            optimizer.step(step)
        ways.append(parameters)
    assert all(torch.equal(p, q) for p, q in zip(*ways, strict=True))


def test_a_loss_that_is_not_finite_changes_nothing():
    parameters = stacked(2)
    optimizer = Optimizer(parameters, CONFIG, num_steps=10, num_members=2)
    set_grads(parameters, 0)
    before = [p.detach().clone() for p in parameters]
    norm, finite = optimizer.step(0, torch.tensor(float("inf")))
    assert norm.isfinite()
    assert not finite
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


def test_schedules():
    linear = dataclasses.replace(CONFIG, learning_rate=1.0, warmup_steps=2)
    assert [learning_rate(linear, t, 6) for t in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    cosine = dataclasses.replace(CONFIG, learning_rate=1.0, schedule="cosine")
    assert [learning_rate(cosine, t, 4) for t in range(4)] == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-5)
    constant = dataclasses.replace(CONFIG, learning_rate=1.0, schedule="constant")
    assert learning_rate(constant, 5, 6) == 1.0
