"""A LoRA ensemble on one frozen base: M members in stacked tensors, their exact average, PEFT-format files.

Member m adds scale * B_m A_m x to a linear layer, scale = alpha / r. The behavior is the average of the members'
deltas, (scale / M) * sum_m B_m A_m, which is one adapter of rank M r: A_m stacked, B_m side by side, the same alpha.
(Averaging the A and the B apart, as PEFT's "linear" merge does, is wrong by cross terms.)
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_PREFIX = "base_model.model."


class LoraEnsemble(nn.Module):
    """M LoRA members on the linear layers of a model, attached by forward hooks: the model's own tree is unchanged.

    Args:
        model: the base; its parameters are frozen here.
        num_members: M.
        r: rank of one member.
        alpha: scale is alpha / r.
        dropout: on the input of A while `model.training`.
        targets: last names of linear layers (`q_proj`); empty: all linear layers of the trunk.
        seed: member m starts from A drawn with seed + m (uniform, as PEFT does) and B = 0.

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
    ):
        super().__init__()
        self.num_members, self.r, self.alpha, self.dropout = num_members, r, alpha, dropout
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
            linear.register_forward_hook(self._hook(name))

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

    def save(self, folder: Path, base: str, member: int | None = None) -> None:
        """Writes one member, or the average as one adapter of rank M r, in PEFT's format."""
        tensors = {}
        for name, a, b in zip(self.names, self.a, self.b, strict=True):
            pair = self._averaged(None)[name] if member is None else (a[member], b[member])
            for letter, tensor in zip("AB", pair, strict=True):
                tensors[f"{_PREFIX}{name}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous()
        rank = self.r * (self.num_members if member is None else 1)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
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
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def load_member(self, m: int, folder: str | Path) -> None:
        """Copies a PEFT adapter folder into member m.

        Raises:
            ValueError: no adapter there, other layers, or another rank.
        """
        path = Path(folder) / "adapter_model.safetensors"
        if not path.is_file():
            raise ValueError(f"model.adapters = {folder}: no adapter_model.safetensors there")
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(path)
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

    def _hook(self, name: str):
        def add_delta(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._active is None:
                return None
            a, b = self._active[name]
            x = F.dropout(args[0], self.dropout, training=self._model[0].training) if self.dropout else args[0]
            a, b = a.to(x.dtype), b.to(x.dtype)
            if a.dim() == 3:  # all members: [M, rows, in] against [M, r, in] and [M, out, r]
                delta = x.reshape(self.num_members, -1, x.shape[-1]) @ a.transpose(1, 2) @ b.transpose(1, 2)
                return output + delta.view_as(output) * self.scale
            scale = self.alpha / a.shape[0]  # alpha / r of a member, alpha / (M r) of the average, whose rank is M r
            return output + F.linear(F.linear(x, a), b) * scale

        return add_delta


def find_linears(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, nn.Module]:
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
