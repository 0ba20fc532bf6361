"""What the stages before the loop share: tokenizer and model, batches, fitting, saving."""

import dataclasses
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bpo_fast.batches import TokenBudget, length_batches, microbatch_tokens
from bpo_fast.checkpoint import put_weights
from bpo_fast.config import OptimConfig
from bpo_fast.files import errors_name, new_folder, take_lock
from bpo_fast.fused_layers import fuse_layers_
from bpo_fast.interrupts import interrupts_call
from bpo_fast.loading import generation_eos_ids, named_load_errors
from bpo_fast.lora import ADAPTER_FILE
from bpo_fast.optim import Optimizer
from bpo_fast.progress import Progress
from bpo_fast.ranks import Devices, Ranks, started, sum_gradients
from bpo_fast.stage_checkpoint import Fitted, StageCheckpoint, checkpoint_folder, newest_checkpoint
from bpo_fast.stage_config import StageConfig
from bpo_fast.tokenizer import end_of_turn, train_bpe

CONFIGS = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
PLATEAU_NATS = 0.005
MAX_BAD_STEPS = 3
DROPOUT_STREAM = 1_000_003  # between the seeds of the ranks


def stage_ranks(config: StageConfig) -> AbstractContextManager[Ranks]:
    """Rank 0 of the processes of a stage; the others begin, and end with the block."""
    job = {"name": config.stage, "config": dataclasses.asdict(config)}
    return started(Devices(config.devices, config.device, config.stage), job)


@contextmanager
def stage_folder(config: StageConfig, ranks: Ranks, progress: Progress) -> Iterator[Path | None]:
    """On rank 0 a folder that becomes `out` when the block ends well, with no checkpoints beside it; None elsewhere.

    Where it ends by an interrupt or by the system, such as for want of room, a line says from where it goes on.

    Raises:
        ValueError: `out` is taken, or `model` is an adapter.
    """
    if not ranks.is_main:
        yield None
        return
    if config.model and (Path(config.model) / ADAPTER_FILE).is_file():
        raise ValueError(f"{config.stage}.model = {config.model}: an adapter; a stage begins from a whole model")
    out = check_new(f"{config.stage}.out", config.out).resolve()  # a link stays, and leads to the new folder
    with _alone(out, f"{config.stage}.out = {config.out}"):
        try:
            with interrupts_call(signal.default_int_handler), new_folder(out) as folder:
                yield folder
        except (KeyboardInterrupt, OSError):
            if kept := newest_checkpoint(config):
                progress.print(f"stopped: the same command goes on from {kept}")
            else:  # there may have been no room for one
                shutil.rmtree(checkpoint_folder(config), ignore_errors=True)
            raise
    shutil.rmtree(checkpoint_folder(config), ignore_errors=True)


@contextmanager
def _alone(out: Path, what: str) -> Iterator[None]:
    """ValueError if another command writes the same folder: each would remove what the other has half written."""
    path = out.with_name(f".{out.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with errors_name(out):
        lock = take_lock(path, f"{what}: another command is writing it")
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def open_tokenizer(config: StageConfig, corpus: Callable[[], Iterator[str]]) -> Any:
    """The tokenizer that the settings name, or one trained on `corpus()`."""
    source, field = (config.tokenizer, "tokenizer") if config.tokenizer else (config.model, "model")
    if source is None:
        return train_bpe(corpus(), vocab_size=config.vocab, arch=config.arch)
    with named_load_errors(f"{config.stage}.{field} = {source}", "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{config.stage}.{field} = {source}: its tokenizer has no EOS token")
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


def fresh_model(auto_class: Any, hf_config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights in `dtype`; buffers, such as RoPE's frequencies, stay float32 as in a loaded one."""
    model = auto_class.from_config(hf_config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device)


def split_by_prompt(prompts: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(training rows, held-out rows); all rows of one prompt fall on the same side."""
    distinct = list(dict.fromkeys(prompts))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {distinct[i] for i in order[: round(fraction * len(distinct))]}
    sides: tuple[list[int], list[int]] = ([], [])  # indexed by "is held out"
    for row, prompt in enumerate(prompts):
        sides[prompt in held_out].append(row)
    return sides


@dataclass(frozen=True)
class TrainingRows:
    """What `fit` trains on.

    Attributes:
        lengths: tokens of each row, before padding.
        num_terms: of each row: how many numbers its loss sums up.
        loss: rows -> [] the sum of their losses, differentiable.
    """

    lengths: Sequence[int]
    num_terms: Sequence[int]
    loss: Callable[[list[int]], Tensor]

    def gradients(self, parameters: Sequence[nn.Parameter], rows: Sequence[int], num_terms: int, tokens: int) -> Tensor:
        """Leaves the gradients of some rows' losses over `num_terms`, those of before forgotten; returns that loss.

        Args:
            parameters: in training.
            rows: as many micro-batches as `tokens` padded tokens make of them.
            num_terms: of the whole step.
            tokens: of a micro-batch.
        """
        for parameter in parameters:
            parameter.grad = None
        total = torch.zeros((), device=parameters[0].device)
        for part in length_batches([self.lengths[row] for row in rows], tokens):
            loss = self.loss([rows[i] for i in part]) / num_terms
            loss.backward()
            total += loss.detach()
        return total


class Steps:
    """Optimizer steps on rows dealt to the ranks, and what an epoch of them adds up to, on the device."""

    def __init__(self, parameters: list[nn.Parameter], config: StageConfig, rows: TrainingRows, num: int, ranks: Ranks):
        self._parameters, self._rows, self._ranks = parameters, rows, ranks
        self._device = parameters[0].device
        self._budget = token_budget(config, rows.lengths, self._device)
        self.optimizer = Optimizer(parameters, optim_config(config, num), num_steps=num, num_members=None, ranks=ranks)
        self.num_taken = 0
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        self._sums: dict[str, Tensor] = dict.fromkeys(
            ("loss", "num_terms", "num_bad", "in_a_row", "most_in_a_row"), zero
        )

    def so_far(self, fitted: Fitted, started: float) -> Fitted:
        """How far it is after the steps that were taken since; they began, or could have, at `started`."""
        seconds = time.monotonic() - started
        return dataclasses.replace(fitted, num_steps=self.num_taken, seconds=seconds, sums=self._read_sums())

    def go_on(self, fitted: Fitted) -> None:
        """After the steps that were taken before, with what they have added up to."""
        self.num_taken = fitted.num_steps
        for name, value in fitted.sums.items():
            self._sums[name] = torch.full_like(self._sums[name], value)

    def exact_weights(self, trained: nn.Module) -> dict[str, Tensor]:
        """The weights of what holds the parameters, as a `Fitted` has them; by all ranks."""
        names = [name for name, _ in trained.named_parameters()]
        weights = zip(names, self.optimizer.exact_weights(), strict=True)
        return {name: weight for name, weight in weights if self._ranks.is_main}

    def take(self, batch: list[int]) -> None:
        """One step."""
        rows, sums = self._rows, self._sums
        num_terms = sum(rows.num_terms[row] for row in batch)
        mine = self._ranks.share(batch, rows.lengths.__getitem__).mine
        loss = self._budget.run(partial(rows.gradients, self._parameters, mine, num_terms))
        (loss,) = sum_gradients(self._parameters, [loss], self._device, self._ranks)
        bad = ~self.optimizer.step(self.num_taken)[1].to(self._device)
        self.optimizer.release_gradients()
        self.num_taken += 1
        in_a_row = (sums["in_a_row"] + 1) * bad
        self._sums = {
            "loss": sums["loss"] + loss * num_terms,
            "num_terms": sums["num_terms"] + num_terms,
            "num_bad": sums["num_bad"] + bad,
            "in_a_row": in_a_row,
            "most_in_a_row": sums["most_in_a_row"].maximum(in_a_row),
        }

    def end_epoch(self) -> tuple[float, int]:
        """(mean loss of the epoch's terms, how many of its steps changed nothing: their gradients were not finite).

        Raises:
            ValueError: the loss, or the gradient of three steps in a row, is not finite.
        """
        sums = self._read_sums()
        loss, in_a_row = sums["loss"] / sums["num_terms"], int(sums["most_in_a_row"])
        if not math.isfinite(loss) or in_a_row >= MAX_BAD_STEPS:
            bad = f", no finite gradient in {in_a_row} steps in a row," if in_a_row else ""
            raise ValueError(f"loss = {loss}{bad}")
        self._ranks.check_same([p.data for p in self._parameters])
        for name in ("loss", "num_terms", "num_bad"):
            self._sums[name] = torch.zeros_like(self._sums[name])
        return loss, int(sums["num_bad"])

    def _read_sums(self) -> dict[str, float]:
        return {name: value.item() for name, value in self._sums.items()}


def fit(
    model: nn.Module,
    trained: nn.Module,
    config: StageConfig,
    rows: TrainingRows,
    evaluate: Callable[[], dict[str, float]] | None,
    *,
    name: str,
    seed: int,
    checkpoint: StageCheckpoint,
    progress: Progress,
    ranks: Ranks,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Trains in place and leaves the weights of the epoch with the lowest held-out loss (the last one without it).

    Args:
        model: switched between training and evaluation mode; its norms and MLPs get kernels where these fit.
        trained: holds the parameters that are trained: the model, or the adapters on it.
        config: epochs, batch sizes and the optimizer's settings.
        rows: what on; the loss of a step is the mean over its terms.
        evaluate: held-out numbers with the key `loss`, the same on all ranks, or None.
        name: what the progress lines call this.
        seed: order of the rows.
        checkpoint: from which a training that was stopped goes on, on a CPU to the same bits.
        progress: shows the steps.
        ranks: share the rows of every step, and the moments.

    Returns:
        One record an epoch: epoch, steps, bad_steps (left out of training: a gradient that was not finite), train_loss,
        seconds, tokens_per_s (padding not counted) and held-out numbers. And the weights, as a `Fitted` has them.

    Raises:
        ValueError: the loss, or the gradient of three steps in a row, is not finite; or the checkpoint is another's.
        RuntimeError: out of memory with the longest row, or with half of the tokens of a micro-batch.
        KeyboardInterrupt: after a checkpoint was written; at once for the second interrupt.
    """
    fuse_layers_(model.train())  # a layer with dropout is tried with it, and stays
    generator = torch.Generator().manual_seed(seed)
    epochs = [length_batches(rows.lengths, config.batch_tokens, generator) for _ in range(math.ceil(config.epochs))]
    epochs[-1] = epochs[-1][: math.ceil(round(len(epochs[-1]) * (config.epochs - len(epochs) + 1), 6))]
    num_steps = sum(len(batches) for batches in epochs)
    steps = Steps(list(trained.parameters()), config, rows, num_steps, ranks)
    if ranks.size > 1:
        torch.manual_seed(seed + DROPOUT_STREAM * ranks.rank)
    fitted = checkpoint.load(trained, steps.optimizer)
    steps.go_on(fitted)
    with progress.task(name, num_steps, done=steps.num_taken) as task, checkpoint.heeds_interrupts():
        begin = 0  # of the steps of an epoch
        for epoch, batches in enumerate(epochs, 1):
            if epoch <= len(fitted.history):
                begin += len(batches)
                continue
            started = time.monotonic() - fitted.seconds
            model.train()
            for batch in batches[steps.num_taken - begin :]:
                steps.take(batch)
                task.advance()
                checkpoint.keep(partial(steps.so_far, fitted, started), trained, steps.optimizer)
            begin += len(batches)
            try:
                train_loss, num_bad = steps.end_epoch()
            except ValueError as error:
                rate = config.peak_learning_rate
                raise ValueError(f"{name}: {error} in epoch {epoch} at learning_rate = {rate}") from None
            seconds = time.monotonic() - started
            num_tokens = sum(rows.lengths[row] for batch in batches for row in batch)
            record = {"epoch": epoch, "steps": len(batches), "bad_steps": num_bad, "train_loss": train_loss}
            record |= {"seconds": seconds, "tokens_per_s": num_tokens / seconds}
            if evaluate is not None:
                model.eval()
                record |= evaluate()
                task.advance(0, note=f"held-out loss {record['loss']:.4f}")
                if record["loss"] < (fitted.best[0] if fitted.best else math.inf):
                    fitted.best = (record["loss"], steps.exact_weights(trained))
            fitted.history.append(record)
            fitted.seconds = 0.0
            if epoch < len(epochs):
                checkpoint.keep(partial(steps.so_far, fitted, time.monotonic()), trained, steps.optimizer)
        weights = fitted.weights
        if weights is None:
            weights = fitted.best[1] if fitted.best else steps.exact_weights(trained)
            checkpoint.end(steps.so_far(fitted, time.monotonic()), weights)
    if ranks.is_main:
        put_weights(trained, weights)
    return fitted.history, weights


def optim_config(config: StageConfig, num_steps: int) -> OptimConfig:
    """The optimizer's part of a stage's settings."""
    return OptimConfig(
        learning_rate=config.peak_learning_rate,
        schedule=config.schedule,
        warmup_steps=round(config.warmup_ratio * num_steps),
        adam_beta2=config.adam_beta2,
        adam_epsilon=1e-8,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        states=config.states,
    )


def token_budget(config: StageConfig, lengths: Sequence[int], device: torch.device) -> TokenBudget:
    """Tokens of a micro-batch in training."""
    longest = max(lengths)
    return TokenBudget(
        microbatch_tokens(config, device, longest),
        longest=longest,
        knob=f"{config.stage}.microbatch_tokens",
        part="one row",
        advice="; try gradient_checkpointing, or states = 8bit",
    )


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


def save_model(model: Any, tokenizer: Any, folder: Path, dtype: str, weights: Mapping[str, Tensor]) -> None:
    """Writes a plain Hugging Face folder: safetensors, config, tokenizer, generation config.

    Args:
        model: in place, it becomes what is written.
        tokenizer: of the model.
        folder: where to.
        dtype: of the weights; `auto` is that of the model.
        weights: its parameters in float32, by name.
    """
    transformers.utils.logging.disable_progress_bar()
    if hasattr(model, "generation_config"):
        own = model.generation_config
        eos = list(dict.fromkeys([*generation_eos_ids(model), tokenizer.eos_token_id, end_of_turn(tokenizer)]))
        own.eos_token_id = eos if len(eos) > 1 else eos[0]
        own.pad_token_id, own.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    if dtype != "auto":
        put_weights(model.to(getattr(torch, dtype)), weights)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
