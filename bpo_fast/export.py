"""Merging a checkpoint into a plain Hugging Face folder."""

import dataclasses
from pathlib import Path

from bpo_fast.checkpoint import complete_checkpoints, load_weights
from bpo_fast.files import new_folder
from bpo_fast.loading import pick_device
from bpo_fast.policy import load_policy
from bpo_fast.run import saved_config
from bpo_fast.source import run_of


def export(source: Path, out: Path, *, device: str = "cpu") -> None:
    """Writes the averaged policy of a checkpoint as one model, adapters merged.

    Args:
        source: a run folder (its newest checkpoint is taken) or a checkpoint folder in one.
        out: folder to write; it must not exist.
        device: where the merge happens.

    Raises:
        ValueError: no complete checkpoint, or `out` exists.
    """
    source = source.resolve()
    run_dir = run_of(str(source)) or source
    config = saved_config(run_dir)
    checkpoints = complete_checkpoints(run_dir)
    if source != run_dir:
        checkpoints = [c for c in checkpoints if c.name == source.name]
    if not checkpoints:
        raise ValueError(f"{source}: no complete checkpoint there")
    if out.exists():
        raise ValueError(f"--out {out}: exists already")
    checkpoint = checkpoints[-1]
    form = dataclasses.replace(config.model, adapters=())
    place = pick_device("--device", device)
    policy = load_policy(form, device=place, seed=0, temperature=1.0, max_length=0, keeps_start=False)
    load_weights(checkpoint, policy)
    with policy.merged(), new_folder(out) as folder:
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
