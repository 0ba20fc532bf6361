"""Checkpoints of the stages before the loop, from which the command that was stopped goes on when it is given again.

OUT.checkpoint/[member-<m>/]step-<n>/
  weights.safetensors                         what is in training; what has come of it, in float32, once it has ended
  best.safetensors                            the same at the best epoch so far, in float32
  optimizer[-<rank>-of-<N>].safetensors       moments and masters; not there once the training has ended
  random-<rank>-of-<N>.safetensors            states of the generators that dropout draws from
  state.json                                  settings, digests of what they name, how far

A folder is whole or not there; the newest replaces the one before. All of them go when OUT is there.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bpo_fast.checkpoint import moment_files, put_weights, save_moments, step_of
from bpo_fast.files import errors_name, new_folder, read_json, remove_temporaries
from bpo_fast.interrupts import interrupts_call
from bpo_fast.optim import Optimizer
from bpo_fast.progress import Progress
from bpo_fast.ranks import Ranks
from bpo_fast.stage_config import StageConfig

# settings that change how the work is done or how OUT is spelled, not what comes of it but for the order of sums
MAY_CHANGE = {
    *("device", "devices", "microbatch_tokens", "gradient_checkpointing"),
    *("out", "save_dtype", "save_minutes"),
}
# how a change of what a setting names is called
CHANGES = {"tokenizer": "another tokenizer", "model": "other weights", "data": "other rows", "eval_data": "other rows"}
SAMPLED = 64  # elements of a tensor
STATE, WEIGHTS, BEST = "state.json", "weights.safetensors", "best.safetensors"
GO_ON, SAVE, STOP = range(3)


@dataclass
class Fitted:
    """How far a training is.

    Attributes:
        num_steps: taken.
        history: a record for every epoch that has been measured.
        seconds: of the epoch that has begun.
        sums: of the epoch that has begun, by name.
        best: (lowest held-out loss so far, the weights of then), if there is held-out data.
        weights: what has come of it, once it has ended.

    Weights are float32, as they are stepped, by name, on the host of rank 0; elsewhere there are none.
    """

    num_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    best: tuple[float, dict[str, Tensor]] | None = None
    weights: dict[str, Tensor] | None = None


def checkpoint_folder(config: StageConfig) -> Path:
    """Where the checkpoints of a stage are while it runs: beside what it will write."""
    out = Path(config.out).absolute()
    return out.with_name(f"{out.name}.checkpoint")


def newest_checkpoint(config: StageConfig) -> Path | None:
    """The checkpoint of a stage that was written last."""
    states = checkpoint_folder(config).rglob(STATE)
    return max((state.parent for state in states), key=lambda path: path.stat().st_mtime_ns, default=None)


def inputs_of(
    config: StageConfig, model: Any, tokenizer: Any, train: Sequence[Any], held_out: Sequence[Any]
) -> dict[str, str]:
    """What is behind the settings of a stage, before it trains: the type of its weights, and digests of the rest.

    Args:
        config: settings of the stage.
        model: of transformers; of its parameters a sample is read, rounded to bfloat16.
        tokenizer: of transformers.
        train: rows, which are printed.
        held_out: rows, which are printed.
    """
    inputs = {"dtype": str(model.dtype).removeprefix("torch.")}
    rows = {"data": _digest(train if config.eval_data else [*train, *held_out])}
    if config.eval_data:
        rows["eval_data"] = _digest(held_out)
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    encoding = {"tokenizer": _digest([backend, tokenizer.chat_template, tokenizer.special_tokens_map])}
    # a message names the first that differs: a given tokenizer makes the ids of rows, one trained here is made of rows
    inputs |= encoding | rows if config.tokenizer or config.model else rows | encoding
    if config.model:
        sizes, samples = zip(*(_size_and_sample(p.detach()) for p in model.parameters()), strict=True)
        inputs["model"] = _digest([sizes, torch.cat(samples).tolist()])
    return inputs


def _size_and_sample(tensor: Tensor) -> tuple[torch.Size, Tensor]:
    row = tensor.flatten()
    return tensor.shape, row[:: len(row) // SAMPLED + 1].bfloat16()


def _digest(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row}\n".encode())
    return digest.hexdigest()


class StageCheckpoint:
    """Where one training of a stage is kept while it runs.

    Args:
        folder: of its checkpoints.
        config: settings of the stage, kept and compared.
        inputs: see `inputs_of`; kept and compared by rank 0.
        progress: told of what cannot be kept.
        ranks: of the stage; rank 0 decides when to save, all of them do.
    """

    def __init__(self, folder: Path, config: StageConfig, inputs: Mapping[str, str], progress: Progress, ranks: Ranks):
        self._folder, self._config, self._inputs, self._progress, self._ranks = folder, config, inputs, progress, ranks
        self._saved_at, self._is_asked = time.monotonic(), False

    def load(self, trained: nn.Module, optimizer: Optimizer) -> Fitted:
        """Puts weights, moments and generators back, in place, and says how far it was.

        Raises:
            ValueError: the checkpoint is of another command, of other settings or of other inputs.
        """
        path = self._ranks.gather(str(self._find() or "") if self._ranks.is_main else "")[0]
        if not path:
            return Fitted()
        folder = Path(path)
        state, weights = read_json(folder / STATE), load_file(folder / WEIGHTS)
        put_weights(trained, weights)
        is_main = self._ranks.is_main
        fitted = Fitted(**{name: state[name] for name in ("num_steps", "history", "seconds", "sums")})
        if state["ended"]:
            return dataclasses.replace(fitted, weights=weights if is_main else {})
        optimizer.load_state_dict([load_file(file) for file in moment_files(folder)])
        generators = folder / self._random_name()
        if generators.exists():
            _put_generators(load_file(generators))
        if state["best_loss"] is not None:
            fitted.best = (state["best_loss"], load_file(folder / BEST) if is_main else {})
        return fitted

    def keep(self, fitted: Callable[[], Fitted], trained: nn.Module, optimizer: Optimizer) -> None:
        """Between two steps: saves if it is time to; where that fails, it is tried again when it is time to again.

        Args:
            fitted: how far it is, asked for when it is saved.
            trained: what is in training.
            optimizer: of its weights.

        Raises:
            KeyboardInterrupt: on rank 0, after saving, if there was an interrupt.
        """
        wish = self._ranks.gather(self._wish())[0]
        if wish == GO_ON:
            return
        then = f"; training goes on, with another try in {self._config.save_minutes:g} minutes"
        weights = weights_of(trained) if self._ranks.is_main else {}
        self._try_to_save(fitted(), weights, optimizer, "" if wish == STOP else then)
        self._saved_at = time.monotonic()
        if wish == STOP and self._ranks.is_main:
            raise KeyboardInterrupt

    def end(self, fitted: Fitted, weights: dict[str, Tensor]) -> None:
        """Keeps what has come of a training: it is measured and written yet, or its stage has more of them to do."""
        self._try_to_save(dataclasses.replace(fitted, best=None), weights, None)

    @contextmanager
    def heeds_interrupts(self) -> Iterator[None]:
        """Inside, an interrupt waits for `keep` or `end`; a second one does not."""
        if not self._ranks.is_main:
            yield
            return
        with interrupts_call(self._ask):
            yield
        if self._is_asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: Any) -> None:
        if self._is_asked:
            raise KeyboardInterrupt
        self._is_asked = True
        if not self._progress.quiet:  # not through it: this can come in the middle of its own line
            os.write(2, b"stopping after this step, with a checkpoint; a second interrupt stops at once\n")

    def _wish(self) -> int:
        if not self._ranks.is_main:
            return GO_ON
        if self._is_asked:
            return STOP
        minutes = self._config.save_minutes
        return SAVE if minutes and time.monotonic() - self._saved_at >= 60 * minutes else GO_ON

    def _find(self) -> Path | None:
        """The newest checkpoint, if there is one and it is of this training."""
        root = checkpoint_folder(self._config)
        remove_temporaries(root)
        for path in root.rglob(STATE):  # those of other members too: all of them go when OUT is there
            self._check(read_json(path))
        return max(self._folder.glob("step-*"), key=step_of, default=None)

    def _check(self, begun: Mapping[str, Any]) -> None:
        """Raises ValueError if the state of a checkpoint is of another command, of other settings or other inputs."""
        config, stage, place = self._config, self._config.stage, checkpoint_folder(self._config)
        if begun.get("stage") != stage:
            what = f"{place} is of {'an older version' if 'stage' not in begun else 'bpo-fast ' + begun['stage']}"
            raise ValueError(f"{stage}.out = {config.out}: {what}; finish that, or remove it, or choose another out")
        advice = "go on with those, or remove it to begin anew"
        for name, value in dataclasses.asdict(config).items():
            old = begun["config"].get(name)
            if value != old and name not in MAY_CHANGE:
                raise ValueError(f"{stage}.{name} = {value}: {place} was begun with {old}; {advice}")
        for name, value in self._inputs.items():
            old = begun["inputs"].get(name)
            if value != old:
                field = "model" if name == "tokenizer" and not config.tokenizer else name
                was = f"{place} was begun with {CHANGES.get(name, old)}"
                raise ValueError(f"{stage}.{field} = {getattr(config, field)}: {was}; {advice}")

    def _try_to_save(
        self, fitted: Fitted, weights: dict[str, Tensor], optimizer: Optimizer | None, then: str = ""
    ) -> None:
        """By all ranks; if one of them cannot, the checkpoint of before stays, and a line says so, and what `then`."""
        try:
            self._save(fitted, weights, optimizer)
        except OSError as error:
            place = checkpoint_folder(self._config)
            self._progress.print(f"{place}: {error.strerror}: step {fitted.num_steps} is not kept{then}")

    def _save(self, fitted: Fitted, weights: dict[str, Tensor], optimizer: Optimizer | None) -> None:
        """By all ranks: each its moments and generators, rank 0 the rest; OSError on all of them if one cannot."""
        ranks, path, folder = self._ranks, self._folder / f"step-{fitted.num_steps}", Path()
        with ExitStack() as until_whole:
            with self._failing_together(path):
                if ranks.is_main:
                    folder = until_whole.enter_context(new_folder(path)).absolute()
            folder = Path(ranks.gather(str(folder))[0])
            with self._failing_together(path):
                if optimizer is not None:
                    save_moments(folder, optimizer, ranks)
                    save_file(_generators(), folder / self._random_name())
                if ranks.is_main:
                    self._save_shared(folder, fitted, weights, ended=optimizer is None)
        if ranks.is_main:
            for old in self._folder.glob("step-*"):
                if old != path:
                    shutil.rmtree(old, ignore_errors=True)

    def _save_shared(self, folder: Path, fitted: Fitted, weights: dict[str, Tensor], *, ended: bool) -> None:
        """What is the same on all ranks."""
        save_file(weights, folder / WEIGHTS)
        best_loss, best = fitted.best or (None, {})
        if best:
            save_file(best, folder / BEST)
        state = {
            "stage": self._config.stage,
            "config": dataclasses.asdict(self._config),
            "inputs": self._inputs,
            "num_steps": fitted.num_steps,
            "ended": ended,
            "history": fitted.history,
            "seconds": fitted.seconds,
            "sums": fitted.sums,
            "best_loss": best_loss,
        }
        (folder / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def _failing_together(self, path: Path) -> Iterator[None]:
        """An error of the system inside, on any rank, is an OSError on all of them."""
        failed = None
        try:
            with errors_name(path):
                yield
        except OSError as error:
            failed = (error.errno, error.strerror)
        for errno_and_words in filter(None, self._ranks.gather(failed)):
            raise OSError(*errno_and_words, str(path))

    def _random_name(self) -> str:
        return f"random-{self._ranks.rank}-of-{self._ranks.size}.safetensors"


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters on the host, by name, as `put_weights` takes them; what is tied is there once."""
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in module.named_parameters()}


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _put_generators(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
