"""A LoRA ensemble on one frozen base: M members in stacked tensors, their exact average, PEFT-format files.

Member m adds scale * B_m A_m x to a linear layer, scale = alpha / r. The behavior is the average of the members'
deltas, (scale / M) * sum_m B_m A_m, which is one adapter of rank M r: A_m stacked, B_m side by side, the same alpha.
(Averaging the A and the B apart, as PEFT's "linear" merge does, is wrong by cross terms.)
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bpo_fast.config import full_path
from bpo_fast.loading import is_plain_linear

ADAPTER_FILE = "adapter_config.json"
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")  # of PEFT's names, those that leave the base as it is
_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


class LoraEnsemble(nn.Module):
    """M LoRA members on the linear layers of a model, attached to their forwards: the model's own tree is unchanged.

    Args:
        model: the base; its parameters are frozen here.
        num_members: M.
        r: rank of one member.
        alpha: scale is alpha / r.
        dropout: on the input of A while `model.training`.
        targets: last names of linear layers (`q_proj`); empty: all linear layers of the trunk.
        seed: member m starts from A drawn with seed + m (uniform, as PEFT does) and B = 0.
        in_place: deltas are added to what a product gave; not where that is kept to be given again, by selective
            checkpointing.

    Raises:
        ValueError: a target that names no linear layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_members: int,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        targets: Sequence[str] = (),
        seed: int = 0,
        in_place: bool = True,
    ):
        super().__init__()
        self.num_members, self.r, self.alpha, self.dropout, self.in_place = num_members, r, alpha, dropout, in_place
        self.linears = find_linears(model, targets)
        self.names = tuple(self.linears)
        self._model = [model]  # in a list: the base must not become a submodule
        self._active: dict[str, tuple[Tensor, Tensor]] | None = None
        model.requires_grad_(False)
        self.a = nn.ParameterList()
        self.b = nn.ParameterList()
        generators = [torch.Generator().manual_seed(seed + m) for m in range(num_members)]
        for name, linear in self.linears.items():
            num_in, num_out = _shape(linear)
            bound = 1 / math.sqrt(num_in)
            start = [torch.empty(r, num_in).uniform_(-bound, bound, generator=g) for g in generators]
            self.a.append(nn.Parameter(torch.stack(start).to(linear.weight.device)))
            self.b.append(nn.Parameter(torch.zeros(num_members, num_out, r, device=linear.weight.device)))
            linear.forward = self._adapted(name, linear)

    @property
    def scale(self) -> float:
        """What multiplies B A x."""
        return self.alpha / self.r

    @contextmanager
    def member(self, m: int) -> Iterator[None]:
        """Forwards inside run member m, differentiable in its A and B."""
        with self._activated({n: (a[m], b[m]) for n, a, b in zip(self.names, self.a, self.b, strict=True)}):
            yield

    @contextmanager
    def members(self) -> Iterator[None]:
        """Forwards inside run all members at once: dimension 0 of the input holds M equal blocks, one for each."""
        with self._activated({n: (a, b) for n, a, b in zip(self.names, self.a, self.b, strict=True)}):
            yield

    @contextmanager
    def average(self, state: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Forwards inside run the exact average of the members, or of those in a `state()`."""
        with self._activated(self._averaged(state)):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Forwards inside run the base alone."""
        with self._activated(None):
            yield

    def state(self) -> dict[str, Tensor]:
        """A copy of all members: `<layer>.a` [M, r, in], `<layer>.b` [M, out, r], float32."""
        return {k: v.detach().clone() for k, v in self._named().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copies a `state()` into the members, in place."""
        with torch.no_grad():
            for name, tensor in self._named().items():
                tensor.copy_(state[name])

    @torch.no_grad()
    def delta(self, name: str, member: int | None = None) -> Tensor:
        """Delta of one layer, of a member or on average, in the layout of its weight, float32."""
        a, b = self._averaged(None)[name]
        scale = self.scale / self.num_members
        if member is not None:
            layer = self.names.index(name)
            a, b, scale = self.a[layer][member], self.b[layer][member], self.scale
        delta = (b.float() @ a.float()) * scale
        return delta.T if isinstance(self.linears[name], Conv1D) else delta

    @contextmanager
    def merged(self, deltas: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Forwards inside run dense weights, base plus `deltas` (default: the average), with no adapter work."""
        kept = {}
        try:
            for name, linear in self.linears.items():
                kept[name] = linear.weight.data
                delta = self.delta(name) if deltas is None else deltas[name].to(linear.weight.device)
                linear.weight.data = (kept[name].float() + delta).to(kept[name].dtype)
            with self.disabled():
                yield
        finally:
            for name, weight in kept.items():
                self.linears[name].weight.data = weight

    def save(self, folder: Path, base: str, member: int | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        """Writes one member, or the average as one adapter of rank M r, in PEFT's format.

        Args:
            folder: where to; it is there.
            base: name or path of the base model, for whoever loads the adapter.
            member: which; None: the average.
            dtype: of what is written.
        """
        tensors = {}
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            pair = self._averaged(None)[name] if member is None else (a[member], b[member])
            for letter, tensor in zip("AB", pair, strict=True):
                tensors[f"{_PREFIX}{name}.lora_{letter}.weight"] = tensor.detach().to("cpu", dtype).contiguous()
        rank = self.r * (self.num_members if member is None else 1)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": full_path(base),
            "r": rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": sorted({n.rpartition(".")[2] for n in self.names}),
            "exclude_modules": None,
            "fan_in_fan_out": any(isinstance(m, Conv1D) for m in self.linears.values()),
            "bias": "none",
            "inference_mode": True,
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / ADAPTER_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def load_member(self, m: int, folder: str | Path) -> None:
        """Copies a PEFT adapter folder into member m.

        Raises:
            ValueError: no adapter there, one of another form, other layers, or another rank.
        """
        path = Path(folder) / _WEIGHTS_FILE
        if not path.is_file():
            raise ValueError(f"model.adapters = {folder}: no {_WEIGHTS_FILE} there")
        config = read_adapter_config(path.parent, f"model.adapters = {folder}")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"model.adapters = {folder}: {_WEIGHTS_FILE} cannot be read: {error}") from None
        wanted = {f"{_PREFIX}{n}.lora_{letter}.weight" for n in self.names for letter in "AB"}
        if set(tensors) != wanted:
            odd = sorted(set(tensors) ^ wanted)[0]
            raise ValueError(f"model.adapters = {folder}: layers differ from model.lora_targets, first {odd}")
        if config["r"] != self.r:
            raise ValueError(f"model.adapters = {folder}: rank {config['r']}, but model.lora_r = {self.r}")
        with torch.no_grad():
            for name, a, b in zip(self.names, self.a, self.b, strict=True):
                a[m].copy_(tensors[f"{_PREFIX}{name}.lora_A.weight"])
                b[m].copy_(
                    tensors[f"{_PREFIX}{name}.lora_B.weight"] * (config["lora_alpha"] / config["r"] / self.scale)
                )

    def _named(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            out |= {f"{name}.a": a, f"{name}.b": b}
        return out

    def _averaged(self, state: dict[str, Tensor] | None) -> dict[str, tuple[Tensor, Tensor]]:
        named = self._named() if state is None else state
        return {n: (named[f"{n}.a"].flatten(0, 1), named[f"{n}.b"].permute(1, 0, 2).flatten(1, 2)) for n in self.names}

    @contextmanager
    def _activated(self, active: dict[str, tuple[Tensor, Tensor]] | None) -> Iterator[None]:
        before, self._active = self._active, active
        try:
            yield
        finally:
            self._active = before

    def _adapted(self, name: str, linear: nn.Module) -> Callable[[Tensor], Tensor]:
        """The forward of a layer that adds what is active."""
        own, weight_of = linear.forward, _weight_of(linear)

        def forward(x: Tensor) -> Tensor:
            if self._active is None:
                return own(x)
            a, b = self._active[name]
            a = a * (self.alpha / a.shape[-2])  # alpha / r of a member, alpha / (M r) of the average, whose rank is M r
            dropped = self.dropout > 0 and self._model[0].training
            if dropped or weight_of is None or torch.is_autocast_enabled(x.device.type):
                rows = _rows(F.dropout(x, self.dropout, dropped), a)
                return own(x) + (rows @ a.mT.to(x.dtype) @ b.mT.to(x.dtype)).view(*x.shape[:-1], -1)
            weight, bias = weight_of()
            return _AdaptedLinear.apply(x, weight, bias, a.to(x.dtype), b.to(x.dtype), self.in_place)

        return forward


class _AdaptedLinear(torch.autograd.Function):
    """x W^T + bias + x A^T B^T with a frozen W, the second product added as it is made.

    Written out, its scale and the sum are two more passes over the output, and over the gradients as many.

    Args:
        x: [..., in].
        weight, bias: [out, in] and [out] or None.
        a, b: [r, in] and [out, r], or of M members for M equal blocks of rows, [M, r, in] and [M, out, r].
        in_place: whether the sum may take the place of x W^T.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, in_place: bool
    ) -> Tensor:
        out, low = F.linear(x, weight, bias), _rows(x, a) @ a.mT
        ctx.save_for_backward(x, weight, a, b, low)
        return _add_product(_rows(out, a), low, b.mT, in_place=in_place).view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        rows, dx = _rows(dout, a), None
        dlow = rows @ b
        if ctx.needs_input_grad[0]:
            dx = _rows(dout.reshape(-1, dout.shape[-1]) @ weight, a)
            dx = _add_product(dx, dlow, a, in_place=True).view_as(x)
        return dx, None, None, dlow.mT @ _rows(x, a), rows.mT @ low, None


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """[..., n] -> [rows, n], or [M, rows, n] for tensors of M members."""
    return x.reshape(*like.shape[:-2], -1, x.shape[-1])


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, in_place: bool) -> Tensor:
    """out + left @ right, of matrices or of M of them."""
    name = "addmm" if out.dim() == 2 else "baddbmm"
    return getattr(out, f"{name}_" if in_place else name)(left, right)


def _weight_of(linear: nn.Module) -> Callable[[], tuple[Tensor, Tensor | None]] | None:
    """What gives a layer's weight [out, in] and bias; None for a layer with a forward of its own."""
    if is_plain_linear(linear):
        return lambda: (linear.weight, linear.bias)
    if isinstance(linear, Conv1D) and type(linear).forward is Conv1D.forward:
        return lambda: (linear.weight.T, linear.bias)
    return None


def read_adapter_config(folder: Path, named: str) -> dict[str, Any]:
    """PEFT's description of the adapter in a folder: `r`, `lora_alpha` and what else it says.

    Args:
        folder: of the adapter.
        named: how its user named it, for messages.

    Raises:
        ValueError: no description, or of deltas that are not all alpha / r B A, or of ones to another base.
    """
    try:
        config = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{named}: {ADAPTER_FILE} cannot be read: {error}") from None
    if not isinstance(config, dict) or not all(config.get(k) for k in ("r", "lora_alpha")):
        raise ValueError(f"{named}: {ADAPTER_FILE} names no r or no lora_alpha")
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise ValueError(
                f"{named}: {key} in {ADAPTER_FILE} is not supported; merge the adapter into a model folder"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in PLAIN_STARTS:  # PiSSA, OLoRA and the like take a part out of the base
        what = f"init_lora_weights = {init} in {ADAPTER_FILE}"
        raise ValueError(f"{named}: {what} goes with a changed base; merge the adapter into a model folder")
    return config


def find_linears(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, Any]:
    """The linear layers of the trunk by name, all or those called `targets`; ValueError for a target not there."""
    head = model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    known = sorted({n.rpartition(".")[2] for n in linears})
    for target in targets:
        if target not in known:
            raise ValueError(f"model.lora_targets = {target}: no such linear layer; there are {', '.join(known)}")
    return {n: m for n, m in linears.items() if not targets or n.rpartition(".")[2] in targets}


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(in, out)."""
    weight = linear.weight
    assert isinstance(weight, Tensor), "a linear layer has one"
    rows, columns = weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)
