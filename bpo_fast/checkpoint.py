"""Checkpoints: Hugging Face or PEFT folders plus what a resumed run needs, whole or not there.

checkpoint-<step>/
  adapter_model.safetensors, adapter_config.json     LoRA: the exact average, one adapter of rank M r
  member-<m>/                                        LoRA with M > 1: each member
  model.safetensors, config.json, ...                full fine-tuning
  tokenizer files, trainer_state.json, optimizer.safetensors, ema.safetensors, COMPLETE

The moments of N devices are in N files, optimizer-<rank>-of-<N>.safetensors; however many go on with them read all.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bpo_fast.files import errors_name, new_folder, read_json
from bpo_fast.optim import Optimizer
from bpo_fast.policy import Policy, load_model
from bpo_fast.ranks import Ranks

COMPLETE = "COMPLETE"


@dataclass(frozen=True)
class TrainerState:
    """Where the loop was.

    Attributes:
        step: optimizer steps done.
        phase: the phase that has begun last, -1 before the first.
        num_ended_phases: phases whose steps are done and whose metrics are logged.
        evaluated_step: step of the last evaluation, -1 before the first.
        num_metric_lines: lines of metrics.jsonl written by then.
        num_bad_steps: bad steps in a row.
        num_tokens: tokens trained on.
        seconds: by stage, of all processes that worked on the run.
        work: digest of what there is to do; older checkpoints have none.
    """

    step: int
    phase: int
    num_ended_phases: int
    evaluated_step: int
    num_metric_lines: int
    num_bad_steps: int
    num_tokens: int
    seconds: dict[str, float]
    work: str = ""


def save_checkpoint(
    run_dir: Path,
    state: TrainerState,
    policy: Policy,
    optimizer: Optimizer,
    *,
    ema: dict[str, Tensor] | None,
    keep: int,
    ranks: Ranks,
) -> Path:
    """Writes checkpoint-<step> and prunes older ones down to `keep`; on rank 0, while the others save their moments.

    Args:
        run_dir: the run folder.
        state: where the loop is.
        policy: its weights, members and tokenizer are written.
        optimizer: its moments are written.
        ema: weights of the EMA reference, if there is one.
        keep: complete checkpoints to keep.
        ranks: of the run.
    """
    path = run_dir / f"checkpoint-{state.step}"
    with new_folder(path) as folder:
        save_weights(folder, policy)
        if policy.lora and policy.num_members > 1:
            for m in range(policy.num_members):
                policy.lora.save(folder / f"member-{m}", str(policy.config.path), member=m)
        save_moments(folder, optimizer, ranks)
        ranks.save(folder, state.step)
        if ema is not None:
            save_file(ema, folder / "ema.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        (folder / COMPLETE).touch()
    for old in complete_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return path


def save_moments(folder: Path, optimizer: Optimizer, ranks: Ranks) -> None:
    """Writes the moments that this rank keeps."""
    path = folder / _moments_name(ranks.rank, ranks.size)
    with errors_name(path):  # beside rank 0 there is no `new_folder` around it
        save_file(optimizer.state_dict(), path)


def save_weights(folder: Path, policy: Policy) -> None:
    """Writes the behavior in the form that plain transformers and PEFT load, with the tokenizer."""
    if policy.lora:
        policy.lora.save(folder, str(policy.config.path))
    else:
        policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / COMPLETE).exists()), key=step_of)


def read_state(path: Path) -> TrainerState:
    """Where the loop was at a checkpoint."""
    return TrainerState(**read_json(path / "trainer_state.json"))


def load_checkpoint(path: Path, policy: Policy, optimizer: Optimizer) -> dict[str, Tensor] | None:
    """Puts weights and moments back, in place; returns the EMA weights if the checkpoint has them."""
    load_weights(path, policy)
    optimizer.load_state_dict([load_file(file) for file in moment_files(path)])
    ema = path / "ema.safetensors"
    return load_file(ema) if ema.exists() else None


def load_weights(path: Path, policy: Policy) -> None:
    """Puts the weights of a checkpoint into the policy, in place."""
    if policy.lora is None:
        load_full(path, policy)
        return
    for m in range(policy.num_members):
        policy.lora.load_member(m, path / f"member-{m}" if policy.num_members > 1 else path)


def moment_files(path: Path) -> list[Path]:
    """The files of a checkpoint's moments, in the order of the ranks; ValueError if one is missing."""
    part = next(path.glob("optimizer-*-of-*.safetensors"), None)
    size = int(part.stem.rpartition("-")[2]) if part else 1
    files = [path / _moments_name(rank, size) for rank in range(size)]
    for file in files:
        if not file.exists():
            raise ValueError(f"{file}: missing; a run does not go on without its moments")
    return files


def _moments_name(rank: int, size: int) -> str:
    return f"optimizer-{rank}-of-{size}.safetensors" if size > 1 else "optimizer.safetensors"


def load_full(path: Path, policy: Policy) -> None:
    """Copies the weights of a saved model into the policy's parameters, in place.

    It is loaded as a model: in its files weights can have other names and forms, such as an expert each.
    """
    saved, _ = load_model(replace(policy.config, path=str(path)), policy.device)
    put_weights(policy.model, dict(saved.named_parameters()))


@torch.no_grad()
def put_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights by name into a module's parameters, in place."""
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after: checkpoint-<step>, step-<step>."""
    return int(path.name.partition("-")[2])
