"""Norms and gated MLPs of a transformers model by the kernels of bpo_fast_kernels, where these give the same.

What a layer computes is found by trying: its own forward and each form of the kernel on random rows of several sizes
and random weights. A layer that none of them matches, such as one with a bias or another activation, stays as it is.
Sampling keeps a model's own layers (`torch.inference_mode`): the few rows of a decoding step leave nothing to gain.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import MethodType
from typing import Any

import torch
from bpo_fast_kernels import gated, rms_norm
from bpo_fast_kernels.trunk import ACTIVATIONS, has_kernels
from torch import Tensor, nn

Forward = Callable[[Any, Tensor], Tensor]
SIZES = (1.0, 1e-3, 30.0)  # of the rows tried: the least feel a norm's epsilon
# largest difference, of the largest number: rounding, of two unlike sums in float32, of one last place in 16 bits
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def fuse_layers_(model: nn.Module) -> int:
    """Gives norms and MLPs of a model their kernels, where these compute the same; returns how many got them."""
    num = 0
    if not all(p.dtype in TOLERANCES and has_kernels(p) for p in model.parameters()):
        return num
    for module in model.modules():
        forms = _norms(module) if _is_norm(module) else _mlps(module) if _is_mlp(module) else ()
        fused = next((form for form in forms if _same(module, form)), None)
        if fused:
            module.forward = MethodType(_in_training(fused, type(module).forward), module)
            num += 1
    return num


def _in_training(fused: Forward, own: Forward) -> Forward:
    def forward(module: Any, x: Tensor) -> Tensor:
        return own(module, x) if torch.is_inference_mode_enabled() else fused(module, x)

    return forward


def _is_norm(module: nn.Module) -> bool:
    weights = list(module.named_parameters())
    return type(module).__name__.endswith("RMSNorm") and [(n, w.dim()) for n, w in weights] == [("weight", 1)]


def _norms(module: Any) -> Iterator[Forward]:
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    for offset, rounds_twice in product((0.0, 1.0), (True, False)) if eps else ():
        yield partial(_norm, eps=eps, offset=offset, rounds_twice=rounds_twice)


def _norm(module: Any, x: Tensor, *, eps: float, offset: float, rounds_twice: bool) -> Tensor:
    return rms_norm(x, module.weight, eps, offset=offset, rounds_twice=rounds_twice)


def _is_mlp(module: nn.Module) -> bool:
    linears = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
    return linears in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


def _mlps(module: Any) -> Iterator[Forward]:
    for activation in ACTIVATIONS:
        yield partial(_apart if hasattr(module, "gate_proj") else _joined, activation=activation)


def _apart(module: Any, x: Tensor, *, activation: str) -> Tensor:
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x), activation))


def _joined(module: Any, x: Tensor, *, activation: str) -> Tensor:
    return module.down_proj(gated(*module.gate_up_proj(x).chunk(2, -1), activation))


@torch.no_grad()
def _same(module: Any, fused: Forward) -> bool:
    """Whether a kernel gives what a layer's own forward gives; a norm is tried with weights unlike those it has."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(SIZES), 5, weight.shape[-1], generator=generator) * torch.tensor(SIZES)[:, None, None]
    x, kept = rows.to(weight.device, weight.dtype), weight.data
    try:
        if weight.dim() == 1:
            weight.data = torch.randn(weight.shape, generator=generator).to(weight)
        expected, found = type(module).forward(module, x).float(), fused(module, x).float()
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        weight.data = kept
    if found.shape != expected.shape:
        return False
    gaps, largest = ((t.flatten(1).abs().amax(1)) for t in (found - expected, expected))
    return bool((gaps <= TOLERANCES[weight.dtype] * largest).all())
