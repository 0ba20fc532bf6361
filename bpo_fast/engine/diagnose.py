"""Which module is to blame when the sampler is not the policy."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bpo_fast.engine.probe import Probe
from bpo_fast.engine.shared_weights import NotShareableError, locate_linear
from bpo_fast.lora import find_linears
from bpo_fast.policy import Policy

if TYPE_CHECKING:
    from bpo_fast.engine.session import Session

# of a layer's output, relative to its largest value
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def first_difference(session: "Session", policy: Policy, probe: Probe) -> str:
    """Names the first module, in the order of the model, whose weights or outputs differ between the engines.

    Args:
        session: vLLM.
        policy: the trainer's side.
        probe: has just failed.
    """
    view = policy.behavior if session.held.live_lora else policy.merged
    with torch.no_grad(), nullcontext() if session.held.live_lora else policy.merged():
        for name, parameter in policy.model.named_parameters():
            if session.held.views and not torch.equal(parameter, session.held.views[name]):
                return f"the weights of {name}"
    session.reset_prefix_cache()
    result = probe.run()
    if result.mean <= result.limit:
        return "no weights differ; the prefix cache held states of older ones"
    if session.held.module is None:
        return "not known, the weights in the processes of vLLM's workers are not compared one by one"
    if session.has_graphs:
        return "no weights; sampling.enforce_eager = true shows the outputs of layers, which vLLM's graphs hide"
    session.reset_prefix_cache()
    name = _first_output(session.held.module, policy, probe, view)
    return f"the output of {name}" if name else "no weights and no linear layer; look at attention and norms"


def _first_output(
    module: nn.Module, policy: Policy, probe: Probe, view: Callable[[], AbstractContextManager[None]]
) -> str | None:
    """The first linear layer that computes something else on the probe's prompts; None, too, after one never called."""
    layers = find_linears(policy.model, ())
    try:
        located = {name: locate_linear(module, name) for name in layers}
    except NotShareableError:
        return None
    with _outputs({n: (layer, slice(None)) for n, layer in layers.items()}) as ours, torch.no_grad(), view():
        policy.model(input_ids=probe.prompt_ids(), use_cache=False)
    with _outputs(located) as theirs:
        probe.run()
    for name in layers:
        if name not in theirs:
            return None
        a, b = ours[name].float(), theirs[name].float()[: len(ours[name])]
        if a.shape != b.shape or (a - b).abs().max() > TOLERANCE[policy.model.dtype] * a.abs().max():
            return name
    return None


@contextmanager
def _outputs(layers: dict[str, tuple[nn.Module, slice]]) -> Iterator[dict[str, Tensor]]:
    """Name to the rows of the first output of each layer, [tokens, out], filled while it is open."""
    found: dict[str, Tensor] = {}

    def keep(name: str, rows: slice):
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if name not in found:
                found[name] = out.detach().flatten(0, -2)[:, rows].clone()

        return hook

    handles = [layer.register_forward_hook(keep(name, rows)) for name, (layer, rows) in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
