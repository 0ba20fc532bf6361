"""The implementations that `bench kernels` sets side by side, peers where importable.

On a CPU, too: Liger's chunked DPO loss and verl's chunked log-probs, which are plain PyTorch, CCE in the form that it
has for torch.compile, and plain PyTorch compiled. Liger's cross entropy and the kernels of CCE and verl are Triton's.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

PEERS = ("compile", "liger", "liger-dpo", "cce", "verl", "verl-triton")
ON_CPU = ("compile", "liger-dpo", "cce", "verl")
PACKAGES = {"cce": "cut_cross_entropy", "liger": "liger_kernel", "liger-dpo": "liger_kernel"}
PACKAGES |= {"verl": "verl", "verl-triton": "verl"}


def cut_cross_entropy(problem: Problem) -> Implementation:
    """Apple's CCE: log-probs a token from its kernel, sums and loss in PyTorch."""
    cce = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def tokens(inputs: Inputs) -> torch.Tensor:
        how = {} if inputs.hidden.is_cuda else {"impl": "torch_compile"}
        return -cce(inputs.hidden, inputs.weight, inputs.targets, reduction="none", **how).float()

    return _from_tokens(problem, tokens)


def verl(problem: Problem) -> Implementation:
    """verl's chunked log-probs, 512 rows of logits at a time, which are made again in the backward pass."""
    logps = _verls_module("utils/experimental/torch_functional.py").FusedLinearForPPO()
    return _from_tokens(problem, lambda inputs: logps(inputs.hidden, inputs.weight, inputs.targets)[0])


def verl_triton(problem: Problem) -> Implementation:
    """verl's Triton kernels for log-probs and entropy."""
    logps = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return _from_tokens(problem, lambda inputs: logps(inputs.hidden, inputs.weight, inputs.targets, 1.0)[0].float())


def _from_tokens(problem: Problem, tokens: Callable[[Inputs], torch.Tensor]) -> Implementation:
    """An implementation from log-probs a token: [T] float32."""

    def call(inputs: Inputs) -> torch.Tensor:
        return torch.segment_reduce(tokens(inputs), "sum", lengths=inputs.cu_seqlens.diff().long())

    def step(inputs: Inputs) -> Outcome:
        values, _ = pair_loss_reference(call(inputs), inputs.ref_logps, beta=BETA)
        return gradients(inputs, values.sum() / len(values), values)

    def forward(inputs: Inputs) -> Outcome:
        with torch.no_grad():
            return Outcome(call(inputs))

    return {"forward": forward, "step": step}[problem.op]


def _verls_module(file: str) -> Any:
    """A module of verl by itself: the package would import Ray and what else its trainer needs."""
    package = importlib.util.find_spec("verl")
    assert package is not None, "importable"
    assert package.origin is not None, "a package in a folder"
    spec = importlib.util.spec_from_file_location("verls_functions", Path(package.origin).parent / file)
    assert spec is not None, "a file of Python"
    assert spec.loader is not None, "a file of Python"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
            torch.nn.utils.rnn.pad_sequence(list(part.split(lengths)), batch_first=True, padding_value=fill)
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
    known = [name for name in peers if gpu or name in ON_CPU]
    if "compile" in known:
        out["compile"] = eager(problem, compiled=True)
    makers = {
        "cce": cut_cross_entropy,
        "liger": liger,
        "liger-dpo": liger_dpo,
        "verl": verl,
        "verl-triton": verl_triton,
    }
    ops = {"liger": ("forward",), "liger-dpo": ("behavior",)}
    for name in known:
        if name in makers and problem.op in ops.get(name, ("forward", "step")) and importable(name):
            out[name] = makers[name](problem)
    if problem.op != "pair_loss":
        out["mm"] = ceiling(problem)
    if gpu and problem.op in ("forward", "draw"):
        out["mm-f32"] = wide_ceiling
    return out


def importable(name: str) -> bool:
    """Whether the package of a peer is here."""
    return importlib.util.find_spec(PACKAGES[name]) is not None
