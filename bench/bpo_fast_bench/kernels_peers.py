"""The implementations that `bench kernels` sets side by side, peers where importable.

Liger's chunked DPO loss is plain PyTorch and runs on a CPU too; its cross entropy and CCE are Triton kernels.
"""

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from bpo_fast_kernels.pair_loss import pair_loss_reference

from bpo_fast_bench.kernels_impls import (
    BETA,
    Implementation,
    Inputs,
    Outcome,
    Problem,
    ceiling,
    eager,
    gradients,
    ours,
    wide_ceiling,
)

PEERS = ("compile", "liger", "liger-dpo", "cce")


def cut_cross_entropy(problem: Problem) -> Implementation:
    """Apple's CCE: log-probs a token from its kernel, sums and loss in PyTorch."""
    cce = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def call(inputs: Inputs) -> torch.Tensor:
        tokens = -cce(inputs.hidden, inputs.weight, inputs.targets, reduction="none").float()
        return torch.segment_reduce(tokens, "sum", lengths=inputs.cu_seqlens.diff().long())

    def step(inputs: Inputs) -> Outcome:
        values, _ = pair_loss_reference(call(inputs), inputs.ref_logps, beta=BETA)
        return gradients(inputs, values.sum() / len(values), values)

    return {"forward": lambda inputs: Outcome(call(inputs).detach()), "step": step}[problem.op]


def liger(problem: Problem) -> Implementation:
    """Liger's fused linear cross entropy a token (recomputing scheme), sums and loss in PyTorch."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction

    def forward(inputs: Inputs) -> Outcome:
        args = (inputs.hidden.detach(), inputs.weight.detach(), inputs.targets, None, None, -100, 0.0, 0.0, "none")
        tokens = -function.apply(*args)[0].float()
        return Outcome(torch.segment_reduce(tokens, "sum", lengths=inputs.cu_seqlens.diff().long()))

    return {"forward": forward}[problem.op]


def liger_dpo(problem: Problem) -> Implementation:
    """Liger's chunked DPO loss, the behavior as its reference model; sequences padded to [2P, longest, H]."""
    function = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    loss = function(beta=BETA, compiled=torch.cuda.is_available())

    def call(inputs: Inputs) -> Outcome:
        lengths = inputs.cu_seqlens.diff().tolist()
        hidden, behavior, targets = (
            torch.nn.utils.rnn.pad_sequence(part.split(lengths), batch_first=True, padding_value=fill)
            for part, fill in ((inputs.hidden, 0.0), (inputs.behavior_hidden, 0.0), (inputs.targets, -100))
        )
        scalar, parts = loss(inputs.weight, hidden, targets, ref_input=behavior, ref_weight=inputs.weight.detach())
        return gradients(inputs, scalar, -F.logsigmoid((parts[-2] - parts[-1]).float()))

    return {"behavior": call}[problem.op]


def implementations(
    problem: Problem, device: torch.device, peers: tuple[str, ...], tiles: tuple[str, ...] = ()
) -> dict[str, Implementation]:
    """Ours, plain PyTorch, the ceiling, and the peers that exist here and offer the operation."""
    gpu = device.type == "cuda"
    out = {"eager": eager(problem)}
    backends = ("triton", "triton-gemm", "native") if gpu else ("native", "torch")
    if problem.op == "pair_loss":
        backends = ("triton",) if gpu else ("torch",)
    elif problem.op == "draw" and gpu:
        backends = ("torch",)  # which draws for all of them there
    for backend in backends:
        out[backend] = ours(problem, backend)
    for tile in tiles if "triton-gemm" in backends else ():
        out[f"triton-gemm:{tile}"] = ours(problem, f"triton-gemm:{tile}")
    if gpu and "compile" in peers:
        out["compile"] = eager(problem, compiled=True)
    makers = {"cce": cut_cross_entropy, "liger": liger, "liger-dpo": liger_dpo}
    ops = {"cce": ("forward", "step"), "liger": ("forward",), "liger-dpo": ("behavior",)}
    for name in peers:
        if name in makers and problem.op in ops[name] and (gpu or name == "liger-dpo") and importable(name):
            out[name] = makers[name](problem)
    if problem.op != "pair_loss":
        out["mm"] = ceiling(problem)
    if gpu and problem.op in ("forward", "draw"):
        out["mm-f32"] = wide_ceiling
    return out


def importable(name: str) -> bool:
    """Whether the package of a peer is here."""
    package = "cut_cross_entropy" if name == "cce" else "liger_kernel"
    return importlib.util.find_spec(package) is not None
