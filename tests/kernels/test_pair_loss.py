import math

import pytest
import torch
from bpo_fast_kernels import pair_loss
from bpo_fast_kernels.pair_loss import pair_loss_reference

LOSSES = ["dpo", "ipo", "slic"]


def vectors(pairs: int, scale: float = 30.0):
    lengths = torch.randint(1, 128, (2 * pairs,))
    return scale * torch.randn(2 * pairs) - 100, scale * torch.randn(2 * pairs) - 100, lengths


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("pairs", [1, 127, 300])
def test_loss_margin_and_coefficients_match_autograd(loss, beta, pairs):
    policy, ref, lengths = vectors(pairs)
    mine, naive = policy.clone().requires_grad_(), policy.double().requires_grad_()
    got = pair_loss(mine, ref, loss=loss, beta=beta, lengths=lengths)
    want, margins = pair_loss_reference(naive, ref.double(), loss=loss, beta=beta, lengths=lengths)
    assert torch.allclose(got.loss.double(), want, rtol=2e-5, atol=1e-6)
    assert torch.allclose(got.margins.double(), margins, rtol=1e-5, atol=3e-5)
    weights = torch.rand(pairs)
    (got.loss * weights).sum().backward()
    (want * weights).sum().backward()
    assert torch.allclose(mine.grad.double(), naive.grad, rtol=1e-3, atol=1e-7)
    assert not got.margins.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing_of_dpo(smoothing):
    policy, ref, _ = vectors(64)
    mine, naive = policy.clone().requires_grad_(), policy.double().requires_grad_()
    got = pair_loss(mine, ref, label_smoothing=smoothing)
    want, _ = pair_loss_reference(naive, ref.double(), label_smoothing=smoothing)
    assert torch.allclose(got.loss.double(), want, rtol=2e-5, atol=1e-6)
    got.loss.sum().backward()
    want.sum().backward()
    assert torch.allclose(mine.grad.double(), naive.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "value", "slope"), [("dpo", math.log(2), -0.05), ("slic", 1.0, -0.1), ("ipo", 25.0, -10.0)]
)
def test_losses_and_slopes_where_policy_and_reference_agree(loss, value, slope):
    policy = torch.randn(10).requires_grad_()
    got = pair_loss(policy, policy.detach(), loss=loss, lengths=torch.ones(10))
    assert got.margins.tolist() == [0.0] * 5
    assert torch.allclose(got.loss, torch.full((5,), value))
    got.loss.sum().backward()
    assert torch.allclose(policy.grad, torch.tensor([slope] * 5 + [-slope] * 5))


def test_margins_without_bound_stay_finite():
    policy = torch.tensor([-1e4, 0.0, 0.0, -1e4]).requires_grad_()
    got = pair_loss(policy, torch.zeros(4))
    got.loss.sum().backward()
    assert torch.allclose(got.loss, torch.tensor([1000.0, 0.0]))
    assert torch.allclose(policy.grad, torch.tensor([-0.1, 0.0, 0.1, 0.0]))


def test_slic_is_flat_past_its_margin():
    policy = torch.tensor([10.0, 11.0, 0.0, 0.0]).requires_grad_()
    got = pair_loss(policy, torch.zeros(4), loss="slic", beta=0.1)
    got.loss.sum().backward()
    assert got.loss.tolist() == [0.0, 0.0]
    assert policy.grad.tolist() == [0.0] * 4


@pytest.mark.parametrize("loss", LOSSES)
def test_a_margin_that_is_nan_has_a_gradient(loss):
    policy = torch.tensor([float("nan"), 0.0, 0.0, 0.0]).requires_grad_()
    got = pair_loss(policy, torch.zeros(4), loss=loss, lengths=torch.ones(4))
    got.loss.sum().backward()
    assert got.loss.isnan().tolist() == [True, False]
    assert bool((policy.grad[::2] != 0).all())


def test_a_gradient_of_a_gradient_is_refused():
    policy = torch.zeros(4, requires_grad=True)
    loss = pair_loss(policy, torch.zeros(4)).loss.square().sum()
    (slope,) = torch.autograd.grad(loss, policy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_ipo_sum_form_is_lengths_of_one_and_empty_sequences_count_as_one():
    policy, ref, _ = vectors(4)
    ones = pair_loss(policy, ref, loss="ipo", lengths=torch.ones(8, dtype=torch.int64))
    empty = pair_loss(policy, ref, loss="ipo", lengths=torch.zeros(8, dtype=torch.int64))
    h = (policy - ref)[:4] - (policy - ref)[4:]
    assert torch.allclose(ones.loss, (h - 5) ** 2, rtol=1e-4)
    assert torch.equal(ones.loss, empty.loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_of_the_reference(loss):
    policy = (10 * torch.randn(12, dtype=torch.float64)).requires_grad_()
    ref, lengths = torch.randn(12, dtype=torch.float64), torch.randint(1, 9, (12,))
    smoothing = 0.2 if loss == "dpo" else 0.0
    options = {"loss": loss, "lengths": lengths, "label_smoothing": smoothing}
    assert torch.autograd.gradcheck(lambda p: pair_loss_reference(p, ref, **options)[0], (policy,))


def test_no_pairs():
    got = pair_loss(torch.zeros(0), torch.zeros(0))
    assert got.loss.shape == got.margins.shape == (0,)
