"""What the stages before the loop share: tokenizer and model, batches, fitting, saving."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bpo_fast.fused_layers import fuse_layers_
from bpo_fast.loading import named_load_errors
from bpo_fast.progress import Progress
from bpo_fast.stage_config import StageConfig
from bpo_fast.tokenizer import train_bpe

CONFIGS = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
POOL_BATCHES = 50
PLATEAU_NATS = 0.005


def open_tokenizer(stage: str, config: StageConfig, corpus: Callable[[], Iterator[str]]) -> Any:
    """The tokenizer that the settings name, or one trained on `corpus()`."""
    source, field = (config.tokenizer, "tokenizer") if config.tokenizer else (config.model, "model")
    if source is None:
        return train_bpe(corpus(), vocab_size=config.vocab, arch=config.arch)
    with named_load_errors(f"{stage}.{field} = {source}", "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{stage}.{field} = {source}: its tokenizer has no EOS token")
    return tokenizer


def scratch_config(config: StageConfig, tokenizer: Any, max_positions: int, **extra: Any) -> Any:
    """Hugging Face config of a fresh model for this tokenizer; `extra` goes in as it is."""
    return CONFIGS[config.arch](
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate or math.ceil(config.hidden * 8 / 3 / 32) * 32,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **extra,
    )


def split_by_prompt(prompts: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(training rows, held-out rows); all rows of one prompt fall on the same side."""
    distinct = list(dict.fromkeys(prompts))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {distinct[i] for i in order[: round(fraction * len(distinct))]}
    sides: tuple[list[int], list[int]] = ([], [])  # indexed by "is held out"
    for row, prompt in enumerate(prompts):
        sides[prompt in held_out].append(row)
    return sides


def length_batches(lengths: Sequence[int], budget: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """Cuts rows into batches of like length, each at most `budget` padded tokens (or one row).

    Args:
        lengths: tokens of each row.
        budget: rows times the longest row of a batch.
        generator: shuffles rows and batches, so that a batch holds random rows of one length out of a pool of about
            50 batches; None sorts all rows by length.
    """
    order = list(range(len(lengths)))
    pool = max(len(order), 1)
    if generator is not None and order:
        order = torch.randperm(len(order), generator=generator).tolist()
        pool = max(int(POOL_BATCHES * budget * len(lengths) / max(sum(lengths), 1)), 1)
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        batch: list[int] = []
        for row in sorted(order[start : start + pool], key=lengths.__getitem__):
            if batch and (len(batch) + 1) * lengths[row] > budget:
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def make_optimizer(
    trained: torch.nn.Module, config: StageConfig, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Fused AdamW (decay on matrices only) and its schedule over `num_steps`."""
    params = list(trained.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (0.9, config.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.peak_learning_rate, betas=betas, fused=True)
    warmup = round(config.warmup_ratio * num_steps)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        left = 1 - (step - warmup) / max(num_steps - warmup, 1)
        return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[config.schedule]

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def fit(
    model: torch.nn.Module,
    trained: torch.nn.Module,
    config: StageConfig,
    lengths: Sequence[int],
    loss_of: Callable[[list[int]], tuple[torch.Tensor, int]],
    evaluate: Callable[[], dict[str, float]] | None,
    *,
    name: str,
    seed: int,
    progress: Progress,
) -> list[dict[str, float]]:
    """Trains in place and leaves the weights of the epoch with the lowest held-out loss (the last one without it).

    Args:
        model: switched between training and evaluation mode; its norms and MLPs get kernels where these fit.
        trained: holds the parameters that are trained: the model, or the adapters on it.
        lengths: padded-length key of each training row, in tokens.
        loss_of: rows -> (mean loss, number of terms it is a mean of).
        evaluate: held-out numbers with the key `loss`, or None.
        name: what the progress lines call this.
        seed: order of the rows.

    Returns:
        One record an epoch: epoch, steps, train_loss, seconds, tokens_per_s (padding not counted) and held-out numbers.

    Raises:
        ValueError: the loss is no longer finite.
    """
    fuse_layers_(model.train())  # a layer with dropout is tried with it, and stays
    generator = torch.Generator().manual_seed(seed)
    epochs = [length_batches(lengths, config.batch_tokens, generator) for _ in range(math.ceil(config.epochs))]
    epochs[-1] = epochs[-1][: math.ceil(len(epochs[-1]) * (config.epochs - len(epochs) + 1))]
    num_steps = sum(len(batches) for batches in epochs)
    optimizer, scheduler = make_optimizer(trained, config, num_steps)
    history: list[dict[str, float]] = []
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    with progress.task(name, num_steps) as task:
        for epoch, batches in enumerate(epochs, 1):
            started = time.monotonic()
            model.train()
            total, weight = torch.zeros((), device=next(trained.parameters()).device), 0
            for rows in batches:
                loss, num_terms = loss_of(rows)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                total += loss.detach() * num_terms
                weight += num_terms
                task.advance()
            train_loss = total.item() / weight
            if not math.isfinite(train_loss):
                raise ValueError(
                    f"{name}: loss = {train_loss} in epoch {epoch} at learning_rate = {config.peak_learning_rate}"
                )
            seconds = time.monotonic() - started
            num_tokens = sum(lengths[row] for rows in batches for row in rows)
            record = {"epoch": epoch, "steps": len(batches), "train_loss": train_loss, "seconds": seconds}
            record["tokens_per_s"] = num_tokens / seconds
            if evaluate is not None:
                model.eval()
                record |= evaluate()
                task.advance(0, note=f"held-out loss {record['loss']:.4f}")
                if best is None or record["loss"] < best[0]:
                    best = (record["loss"], {k: v.detach().cpu().clone() for k, v in trained.state_dict().items()})
            history.append(record)
    if best is not None and best[0] < history[-1]["loss"]:
        trained.load_state_dict(best[1])
    return history


def plateau_epoch(losses: Sequence[float]) -> int | None:
    """First epoch (from 1) that no later one beats by 0.005 nats of held-out loss; None: the last one still gained."""
    later = (i + 1 for i in range(len(losses) - 1) if losses[i] - min(losses[i + 1 :]) < PLATEAU_NATS)
    return next(later, None)


def check_new(what: str, path: str) -> Path:
    """The path, if nothing is there yet or an empty folder is; ValueError otherwise."""
    out = Path(path)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{what} = {path}: already there")
    return out


def save_model(model: Any, tokenizer: Any, folder: Path, dtype: str) -> None:
    """Writes a plain Hugging Face folder: safetensors, config, tokenizer, generation config."""
    transformers.utils.logging.disable_progress_bar()
    if hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig(
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
