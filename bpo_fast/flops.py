"""Model FLOP of an optimizer step: what its mathematics takes, whatever packing and kernels make of it.

A multiply-add is 2 FLOP. A matrix of N weights takes 2 N a row forward, 2 N for the gradient of its input and, where it
is trained, 2 N for its own: 6 N, or 4 N frozen beneath adapters. With M members, and prompt, chosen and rejected of p,
c and r tokens in each pair,

    FLOP = M sum_pairs [(p + c + r) trunk + (c + r) head + 12 sum_layers d seen(p, c, r)]

`trunk` is 6 N or 4 N summed over the matrices of the layers and one member's adapters (of the experts of a mixture,
those that a token visits), `head` that of V x H, d = heads * head_dim, and `seen` the (query, key) pairs of attention,
a prompt counted once and no further back than a layer's window: 2 d each for q k and p v, twice that for their
gradients. What checkpointing computes again does not count, nor padding, nor the optimizer.

`perf/tflops` is that over the seconds of the step, in 1e12 FLOP a second; `perf/mfu` is `perf/tflops` over the peak of
the device in dense bfloat16.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bpo_fast.loading import head_weight
from bpo_fast.policy import Policy
from bpo_fast.types import Pair

PEAK_TFLOPS = {  # dense bfloat16, from NVIDIA's data sheets, by the name that the driver gives
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA L40S": 362.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA B200": 2250.0,
}


@dataclass(frozen=True)
class StepFlop:
    """What the steps of a policy take.

    Attributes:
        num_members: M.
        trunk, head: FLOP a row, forward and backward.
        width: d of a layer's attention.
        windows: number of layers by the keys that a query sees at most, itself included; None sees all.
        peak_tflops: of the device, where it is known.
    """

    num_members: int
    trunk: int
    head: int
    width: int
    windows: Mapping[int | None, int]
    peak_tflops: float | None

    @classmethod
    def of(cls, policy: Policy) -> "StepFlop":
        """Counts the weights of a policy where it is."""
        config = policy.model.config.get_text_config()
        layers = [m for m in policy.model.base_model.modules() if not isinstance(m, nn.Embedding)]
        matrices = [w for m in layers for w in m.parameters(recurse=False) if w.dim() > 1]
        adapters = sum(w.numel() for w in policy.lora.parameters()) // policy.num_members if policy.lora else 0
        num_heads = getattr(config, "num_attention_heads", 0)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(1, num_heads)
        return cls(
            num_members=policy.num_members,
            trunk=sum(_row_flop(w, config) for w in matrices) + 6 * adapters,
            head=_row_flop(head_weight(policy.model), config),
            width=num_heads * head_dim,
            windows=_windows(config),
            peak_tflops=_peak_tflops(policy.device),
        )

    def count(self, pairs: Sequence[Pair]) -> int:
        """FLOP of a step on these pairs."""
        lengths = [(len(p.prompt.ids), (len(p.chosen.ids), len(p.rejected.ids))) for p in pairs]
        return self.num_members * sum(self._of_pair(prompt, completions) for prompt, completions in lengths)

    def rates(self, pairs: Sequence[Pair], seconds: float) -> dict[str, float]:
        """`perf/tflops` of a step that took so long and, where the device's peak is known, `perf/mfu`."""
        tflops = self.count(pairs) / max(seconds, 1e-9) / 1e12
        return {"perf/tflops": tflops} | ({"perf/mfu": tflops / self.peak_tflops} if self.peak_tflops else {})

    def _of_pair(self, prompt: int, completions: tuple[int, int]) -> int:
        rows = sum(completions)
        seen = 0
        for window, num_layers in self.windows.items():
            before = _seen(prompt, window)
            seen += num_layers * (before + sum(_seen(prompt + n, window) - before for n in completions))
        return (prompt + rows) * self.trunk + rows * self.head + 12 * self.width * seen


def _row_flop(weight: Tensor, config: Any) -> int:
    """FLOP of a matrix for a row; of stacked experts, [E, out, in], for those that a token visits."""
    num_weights = weight.numel()
    visited = getattr(config, "num_experts_per_tok", None)
    if weight.dim() == 3 and visited:
        num_weights = num_weights // len(weight) * visited
    return num_weights * (6 if weight.requires_grad else 4)


def _windows(config: Any) -> Mapping[int | None, int]:
    """Of the layers that attend; those of other kinds are counted by their matrices alone."""
    window = getattr(config, "sliding_window", None)
    alike = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [alike] * config.num_hidden_layers
    known = {"full_attention": None, "sliding_attention": window}
    return Counter(known[kind] for kind in kinds if kind in known)


def _seen(length: int, window: int | None) -> int:
    """(query, key) pairs of a causal sequence."""
    short = length if window is None else min(length, window)
    return short * (short + 1) // 2 + (length - short) * short


def _peak_tflops(device: torch.device) -> float | None:
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
