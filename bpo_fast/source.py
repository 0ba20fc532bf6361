"""What a user names as a model: a run, a checkpoint of one, an adapter or model folder, or a Hub id."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from bpo_fast.checkpoint import complete_checkpoints
from bpo_fast.config import Config, ModelConfig
from bpo_fast.engine import Engine
from bpo_fast.loading import pick_device
from bpo_fast.lora import ADAPTER_FILE, read_adapter_config
from bpo_fast.policy import Policy, load_tokenizer
from bpo_fast.run import saved_config
from bpo_fast.setup import load_learner
from bpo_fast.tasks import resolve

NEITHER = f"not a model folder (no config.json), not an adapter (no {ADAPTER_FILE}) and not a run (no config.toml)"


def base_config(*sources: str) -> Config:
    """The settings to start from: those of the first source that is a run or a checkpoint of one."""
    runs = filter(None, map(run_of, sources))
    return next(map(saved_config, runs), Config())


def resolved(config: Config, source: str) -> Config:
    """Settings without holes. The source names the model: without it, the embedded one would be filled in."""
    if config.model.path is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=source))
    return resolve(config)


def load_source(source: str, config: Config, say: Callable[[str], None]) -> tuple[Policy, Engine]:
    """The policy that a source holds, and the engine that samples from it.

    Args:
        source: a run folder (its newest checkpoint is taken), a checkpoint, an adapter or model folder, or a Hub id.
        config: settings without holes; the source stands in for their model.
        say: told in one line which engine it is.

    Raises:
        ValueError: the source is none of these, or cannot be loaded.
    """
    config = dataclasses.replace(config, model=_form(source, config))
    return load_learner(config, pick_device("run.device", config.run.device), config.max_length, say)


def check_source(source: str, config: Config) -> None:
    """Raises what `load_source` does, as far as it is known without weights."""
    load_tokenizer(_form(source, config))


def run_of(source: str) -> Path | None:
    """The run folder that a source is, or is a checkpoint of."""
    path, place = Path(source), Path(source).resolve()  # "." and links have other names
    candidates = (path, place.parent) if place.name.startswith("checkpoint-") else (path,)
    return next((p for p in candidates if (p / "config.toml").is_file()), None)


def _form(source: str, config: Config) -> ModelConfig:
    """How a source is loaded: a checkpoint of LoRA is an adapter on its base, any other a model as it is."""
    path, model = Path(source), config.model
    run = run_of(source)
    if run == path:
        checkpoints = complete_checkpoints(path)
        if not checkpoints:
            raise ValueError(f"{source}: no complete checkpoint there")
        path = checkpoints[-1]
    kept = dataclasses.replace(model, members=1, adapters=(), lora_dropout=0.0, lora_targets=(), full=False)
    if not (path / ADAPTER_FILE).is_file():
        if path.exists() and not (path / "config.json").is_file():
            raise ValueError(f"{source}: {NEITHER}")
        # one fresh adapter of rank 1 adds exactly nothing, and costs less than a second copy of all weights
        return dataclasses.replace(kept, path=str(path) if path.exists() else source, lora_r=1, lora_alpha=2.0)
    adapter = read_adapter_config(path, source)
    if not adapter.get("base_model_name_or_path"):
        raise ValueError(f"{source}: {ADAPTER_FILE} names no base model")
    targets = adapter.get("target_modules")
    return dataclasses.replace(
        kept,
        path=adapter["base_model_name_or_path"],
        adapters=(str(path),),
        lora_r=adapter["r"],
        lora_alpha=float(adapter["lora_alpha"]),
        lora_targets=tuple(sorted({t.rpartition(".")[2] for t in targets})) if isinstance(targets, list) else (),
    )
