"""Argument checks of the public operators: one ValueError that names the argument and the value."""

import math
import os

import torch

LOSSES = ("dpo", "ipo", "slic")
MODES = ("auto", "fused", "store", "recompute", "forward")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32 = torch.finfo(torch.float32)
NATIVE_FLOATS = (torch.float32, torch.bfloat16)  # of what a CPU computes natively, but for the head


def require(condition: bool, argument: str, value: object, expected: str) -> None:
    """Raise the one kind of error a caller can cause."""
    if not condition:
        raise ValueError(f"{argument} = {value}: {expected}")


def check_head(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Check [T, H], [V, H]."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        require(tensor.dim() == 2, f"{name}.shape", list(tensor.shape), "expected two dimensions")
        require(tensor.dtype in FLOATS, f"{name}.dtype", tensor.dtype, "expected float32, bfloat16 or float16")
    require(weight.dtype == hidden.dtype, "weight.dtype", weight.dtype, f"expected {hidden.dtype} like hidden")
    require(weight.device == hidden.device, "weight.device", weight.device, f"expected {hidden.device}")
    width = hidden.shape[1]
    require(weight.shape[1] == width, "weight.shape", list(weight.shape), f"expected [V, {width}]")
    require(weight.numel() > 0, "weight.shape", list(weight.shape), "expected at least one row and one column")


def check_rows(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """Check [T, H], [V, H], [T].

    Targets out of range are an error on the CPU. On a GPU the check would be a host sync: with BPO_FAST_DEBUG=1 it is a
    device-side assertion instead.
    """
    check_head(hidden, weight)
    require(targets.dtype == torch.int64, "targets.dtype", targets.dtype, "expected torch.int64")
    require(targets.shape == hidden.shape[:1], "targets.shape", list(targets.shape), f"expected [{hidden.shape[0]}]")
    require(targets.device == hidden.device, "targets.device", targets.device, f"expected {hidden.device}")
    size = weight.shape[0]
    if targets.is_cuda and os.environ.get("BPO_FAST_DEBUG") == "1":
        torch._assert_async(((targets >= 0) & (targets < size)).all())
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        require(low >= 0, "targets", low, f"expected 0 <= target < {size}")
        require(high < size, "targets", high, f"expected 0 <= target < {size}")


def check_behavior(
    behavior_hidden: torch.Tensor, behavior_weight: torch.Tensor | None, hidden: torch.Tensor, weight: torch.Tensor
) -> None:
    """Check [T, H] and [V, H] against those of the policy."""
    for name, value, like in (("hidden", behavior_hidden, hidden), ("weight", behavior_weight, weight)):
        if value is not None:
            argument, shape = f"behavior_{name}", list(value.shape)
            require(value.shape == like.shape, f"{argument}.shape", shape, f"expected {list(like.shape)} like {name}")
            require(value.dtype == like.dtype, f"{argument}.dtype", value.dtype, f"expected {like.dtype} like {name}")
            require(value.device == like.device, f"{argument}.device", value.device, f"expected {like.device}")


def check_cu_seqlens(cu_seqlens: torch.Tensor, hidden: torch.Tensor, *, paired: bool = False) -> None:
    """Check int32 [N+1] beside the rows or on the CPU, there also that it rises from 0 to T."""
    on_cpu = cu_seqlens.device.type == "cpu"
    expected = f"expected {' or '.join(dict.fromkeys(('cpu', str(hidden.device))))}"
    require(on_cpu or cu_seqlens.device == hidden.device, "cu_seqlens.device", cu_seqlens.device, expected)
    check_bounds("cu_seqlens", cu_seqlens, len(hidden), "rows")
    if paired:
        expected = "expected [2P + 1]: chosen, then rejected"
        require(cu_seqlens.numel() % 2 == 1, "cu_seqlens.shape", list(cu_seqlens.shape), expected)


def check_bounds(name: str, bounds: torch.Tensor, count: int, of: str) -> None:
    """Check int32 [N+1], on the CPU also that it rises from 0 to the number of what it bounds."""
    require(bounds.dtype == torch.int32, f"{name}.dtype", bounds.dtype, "expected torch.int32")
    require(bounds.dim() == 1 and bounds.numel() >= 1, f"{name}.shape", list(bounds.shape), "expected [N + 1]")
    if bounds.device.type == "cpu":
        values = bounds.tolist()
        require(values[0] == 0, f"{name}[0]", values[0], "expected 0")
        require(values[-1] == count, f"{name}[-1]", values[-1], f"expected the number of {of}, {count}")
        falls = [i for i in range(len(values) - 1) if values[i] > values[i + 1]]
        require(not falls, name, values, "expected a sequence that never falls")


def check_scaling(temperature: float, logit_softcap: float | None) -> None:
    """Check the two scalars that shape the logits."""
    require(_in_float32(temperature), "temperature", temperature, "expected a number above 0 that float32 holds")
    check_softcap("logit_softcap", logit_softcap)


def check_softcap(name: str, softcap: float | None) -> None:
    """Check what logits or scores are capped at."""
    good = softcap is None or _in_float32(softcap)
    require(good, name, softcap, "expected None or a number above 0 that float32 holds")


def _in_float32(number: float) -> bool:
    """Whether kernels see a number above 0: a smaller one would be 0 to them, which a cap is where there is none."""
    return FLOAT32.tiny <= number <= FLOAT32.max


def check_loss(loss: str, beta: float, label_smoothing: float) -> None:
    """Check the three arguments that name a loss."""
    require(loss in LOSSES, "loss", repr(loss), f"expected one of {', '.join(LOSSES)}")
    require(math.isfinite(beta) and beta > 0, "beta", beta, "expected a finite number above 0")
    require(0.0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "expected 0 <= label_smoothing < 0.5")
    smooth_ok = label_smoothing == 0.0 or loss == "dpo"
    require(smooth_ok, "label_smoothing", label_smoothing, f"expected 0 for loss {loss!r}; only dpo is smoothed")


def check_logps(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """Check a [2P] float32 vector against another [2P] vector."""
    require(value.shape == like.shape, f"{name}.shape", list(value.shape), f"expected {list(like.shape)}")
    require(value.dtype == torch.float32, f"{name}.dtype", value.dtype, "expected torch.float32")
    require(value.device == like.device, f"{name}.device", value.device, f"expected {like.device}")


def check_lengths(lengths: torch.Tensor, like: torch.Tensor) -> None:
    """Check [2P] against another [2P] vector, on the CPU also that no length is negative."""
    require(lengths.shape == like.shape, "lengths.shape", list(lengths.shape), f"expected {list(like.shape)}")
    good = lengths.dtype in (torch.int32, torch.int64, torch.float32)
    require(good, "lengths.dtype", lengths.dtype, "expected int32, int64 or float32")
    require(lengths.device == like.device, "lengths.device", lengths.device, f"expected {like.device}")
    if lengths.device.type == "cpu" and lengths.numel():
        low = lengths.min().item()
        require(low >= 0, "lengths", low, "expected none below 0")
