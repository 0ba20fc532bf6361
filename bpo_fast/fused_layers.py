"""Norms and gated MLPs of a transformers model by the kernels of bpo_fast_kernels, where these give the same.

Layers are known by their names, and what they compute by trying: a copy with random weights in float32, on random rows
of several sizes, by its own forward and by each form of the kernel. A layer that no form matches stays as it is, such
as one with another activation or a clamp.
"""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bpo_fast_kernels import gated, rms_norm
from bpo_fast_kernels.trunk import ACTIVATIONS, gated_reference, has_kernels
from torch import Tensor, nn

Forward = Callable[[Any, Tensor], Tensor]
SIZES = (1.0, 1e-3, 30.0, 1e3)  # of the rows tried: the least feel a norm's epsilon, the greatest a clamp
TOLERANCE = 1e-5  # of a row's largest number: the rounding of two unlike sums
WIDTH = 24  # of the MLPs tried


def fuse_layers_(model: nn.Module) -> int:
    """Gives norms and MLPs of a model their kernels, where these compute the same; returns how many got them."""
    num = 0
    if not all(has_kernels(p) for p in model.parameters() if p.is_floating_point()):
        return num
    for module in model.modules():
        # what others have put in place of a forward, and one that takes more than rows, stays
        if "forward" in vars(module) or len(inspect.signature(type(module).forward).parameters) != 2:
            continue
        fused = _fused_norm(module) if _is_norm(module) else _fused_mlp(module) if _is_mlp(module) else None
        if fused:
            module.forward = partial(fused, module)  # not a method of a partial, which has no name to be pickled by
            num += 1
    return num


def _is_norm(module: nn.Module) -> bool:
    weights = [(name, weight.dim()) for name, weight in module.named_parameters()]
    return type(module).__name__.endswith("RMSNorm") and weights == [("weight", 1)]


def _fused_norm(module: Any) -> Forward | None:
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not isinstance(eps, float) or eps <= 0:
        return None
    for offset in (0.0, 1.0):
        forms = [partial(_norm, eps=eps, offset=offset, rounds_twice=twice) for twice in (True, False)]
        if _same(_norm_like(module, torch.float32), forms[0]):
            # where it rounds shows in the type it has: the form that differs in fewer numbers
            like = _norm_like(module, module.weight.dtype)
            x = _rows(len(module.weight), module.weight.device).to(module.weight.dtype)
            with torch.no_grad():
                expected = type(module).forward(like, x)
                return min(forms, key=lambda form: int((form(like, x) != expected).sum()))
    return None


def _norm(module: Any, x: Tensor, *, eps: float, offset: float, rounds_twice: bool) -> Tensor:
    if x.dtype != module.weight.dtype or not has_kernels(x):  # under autocast, or where a model mixes types
        return type(module).forward(module, x)
    return rms_norm(x, module.weight, eps, offset=offset, rounds_twice=rounds_twice)


def _norm_like(module: Any, dtype: torch.dtype) -> Any:
    """The norm with other weights than all ones."""
    weight = _rows(len(module.weight), module.weight.device)[0, 0].to(dtype)
    return _with(module, "_parameters", weight=nn.Parameter(weight))


def _is_mlp(module: nn.Module) -> bool:
    return _linears(module) in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


def _linears(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children() if isinstance(child, nn.Linear)}


def _fused_mlp(module: Any) -> Forward | None:
    joined, device = hasattr(module, "gate_up_proj"), module.down_proj.weight.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"gate_up_proj": (WIDTH, 2 * WIDTH)}
        linears = {name: nn.Linear(*sizes.get(name, (WIDTH, WIDTH))).to(device) for name in _linears(module)}
    like = _with(module, "_modules", **linears)
    forms = (partial(_joined if joined else _apart, activation=activation) for activation in ACTIVATIONS)
    return next((form for form in forms if _same(like, form)), None)


def _apart(module: Any, x: Tensor, *, activation: str) -> Tensor:
    return module.down_proj(_gated(module.gate_proj(x), module.up_proj(x), activation))


def _joined(module: Any, x: Tensor, *, activation: str) -> Tensor:
    return module.down_proj(_gated(*module.gate_up_proj(x).chunk(2, -1), activation=activation))


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    fits = gate.dtype == up.dtype and has_kernels(gate)
    return gated(gate, up, activation) if fits else gated_reference(gate, up, activation)


def _with(module: Any, kind: str, **parts: Any) -> Any:
    """A module that is this one but for some parameters or children."""
    like = copy.copy(module)
    vars(like)[kind] = {**vars(module)[kind], **parts}
    return like


def _rows(width: int, device: torch.device) -> Tensor:
    """[sizes, 5, width] float32"""
    rows = torch.randn(len(SIZES), 5, width, generator=torch.Generator().manual_seed(0))
    return (rows * torch.tensor(SIZES)[:, None, None]).to(device)


@torch.no_grad()
def _same(like: Any, fused: Forward) -> bool:
    """Whether a form gives what a layer's own forward gives, in float32 and not all zero."""
    weight = next(like.parameters())
    x = _rows(weight.shape[-1], weight.device)
    try:
        expected, found = type(like).forward(like, x), fused(like, x)
        gaps, largest = ((t.flatten(1).abs().amax(1)) for t in (found - expected, expected))
    except Exception:  # remote code included, nothing of which is to keep a model from being loaded
        return False
    return bool((largest > 0).all() and (gaps <= TOLERANCE * largest).all())
