"""Inputs shared by the kernel tests, and the float64 answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bpo_fast_kernels.linear_logps import linear_token_logps_reference
from bpo_fast_kernels.torch_backend import TorchBackend


@dataclass(frozen=True)
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor


def random_case(rows: int, width: int, vocab: int, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Case:
    """Logits with a standard deviation of about `spread`."""
    hidden = torch.randn(rows, width, dtype=torch.float32)
    weight = torch.randn(vocab, width) * (spread / width**0.5)
    return Case(hidden.to(dtype), weight.to(dtype), torch.randint(0, vocab, (rows,)))


def peaked_case(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32) -> Case:
    """Targets that the model expects: hidden states lie along their target's row of the head."""
    weight = torch.randn(vocab, width)
    targets = torch.randint(0, vocab, (rows,))
    hidden = weight[targets] * (9.0 / width) + torch.randn(rows, width) * (2.0 / width**0.5)
    return Case(hidden.to(dtype), weight.to(dtype), targets)


def logits_case(logits: torch.Tensor, targets: torch.Tensor) -> Case:
    """Exactly these logits: the head is the identity."""
    return Case(logits.clone(), torch.eye(logits.shape[1]), targets)


def adversarial_cases(dtype: torch.dtype = torch.float32) -> dict[str, Case]:
    """Rows at the limits of the shift, each kind also beside ordinary rows of the same panel."""
    vocab, rows = 77, 40
    base = torch.randn(rows, vocab)
    targets = torch.randint(0, vocab, (rows,))
    row = torch.arange(rows)
    cases = {}
    for name, depth in (
        ("p_y_e-62", 62.0),
        ("p_y_e-80", 80.0),
        ("past_overflow_e-95", 95.0),
        ("past_overflow_e-400", 400.0),
    ):
        logits = base.clone()
        logits[::3].index_put_((torch.arange(len(base[::3])), targets[::3]), torch.tensor(-depth))
        cases[name] = logits_case(logits, targets)
    cases["logits_60"] = logits_case(60.0 * torch.sign(base), targets)
    cases["all_equal"] = logits_case(torch.full((rows, vocab), 1.7), targets)
    sure = base.clone()
    sure[row, targets] = 20.0
    cases["p_y_near_1"] = logits_case(sure, targets)
    cases["one_token_vocabulary"] = Case(torch.randn(rows, 5), torch.randn(1, 5), torch.zeros(rows, dtype=torch.int64))
    return {name: Case(c.hidden.to(dtype), c.weight.to(dtype), c.targets) for name, c in cases.items()}


@dataclass(frozen=True)
class Answer:
    logps: torch.Tensor
    dx: torch.Tensor
    dw: torch.Tensor


def answer(case: Case, coefs: torch.Tensor, **options) -> Answer:
    """float64 log-probs and gradients on the very same inputs."""
    hidden = case.hidden.double().requires_grad_()
    weight = case.weight.double().requires_grad_()
    logps = linear_token_logps_reference(hidden, weight, case.targets, **options)
    (logps * coefs.double()).sum().backward()
    return Answer(logps.detach(), hidden.grad, weight.grad)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius error relative to the wanted tensor; against exact zeros, the absolute error."""
    scale = float(want.norm())
    return float((got.double() - want).norm()) / (scale if scale > 1e-12 else 1.0)


def keep_e_as_on_a_gpu(monkeypatch) -> None:
    """E of 16-bit inputs is bfloat16; products of bfloat16 are exact in float32 on the CPU too."""

    def work_dtype(self, hidden: torch.Tensor) -> torch.dtype:
        return torch.float32 if hidden.dtype == torch.float32 else torch.bfloat16

    monkeypatch.setattr(TorchBackend, "work_dtype", work_dtype)


def pairwise(first: Sequence, second: Sequence, third: Sequence) -> list[tuple]:
    """Cases of one value each, in which any two values of different lists meet."""
    assert len(third) <= min(len(first), len(second))
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()
