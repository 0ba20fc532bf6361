"""Checkpoints of the stages before the loop, from which the command that was stopped goes on when it is given again.

OUT.checkpoint/[member-<m>/]step-<n>/
  weights.safetensors                         what is in training; what has come of it, in float32, once it has ended
  best.safetensors                            the same at the best epoch so far, in float32
  optimizer[-<rank>-of-<N>].safetensors       moments and masters; not there once the training has ended
  random-<rank>-of-<N>.safetensors            states of the generators that dropout draws from
  state.json                                  settings, which rows, how far

A folder is whole or not there; the newest replaces the one before. All of them go when OUT is there.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bpo_fast.checkpoint import moment_files, put_weights, save_moments, step_of
from bpo_fast.files import errors_name, new_folder, remove_temporaries
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


class StageCheckpoint:
    """Where one training of a stage is kept while it runs.

    Args:
        folder: of its checkpoints.
        config: settings of the stage, kept and compared.
        rows: what it trains on; a digest of them, as they are printed, is kept and compared.
        progress: told where the checkpoint of an interrupted training is.
        ranks: of the stage; rank 0 decides when to save, all of them do.
    """

    def __init__(self, folder: Path, config: StageConfig, rows: Iterable[Any], progress: Progress, ranks: Ranks):
        self._folder, self._config, self._rows, self._progress, self._ranks = folder, config, rows, progress, ranks
        self._saved_at, self._is_asked = time.monotonic(), False

    def load(self, trained: nn.Module, optimizer: Optimizer) -> Fitted:
        """Puts weights, moments and generators back, in place, and says how far it was.

        Raises:
            ValueError: the checkpoint is of other settings or rows.
        """
        path = self._ranks.gather(str(self._find() or "") if self._ranks.is_main else "")[0]
        if not path:
            return Fitted()
        folder = Path(path)
        state, weights = json.loads((folder / STATE).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
        for name, parameter in trained.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                begun = self._advice(f"was begun with another {name}")
                raise ValueError(f"{self._config.stage}.model = {self._config.model}: {begun}")
            # auto is another type on another device
            if weights[name].dtype != parameter.dtype and not state["ended"]:
                begun = self._advice(f"was begun with {str(weights[name].dtype).removeprefix('torch.')}")
                raise ValueError(f"{self._config.stage}.dtype = {self._config.dtype}: {begun}")
        put_weights(trained, weights)
        is_main = self._ranks.is_main
        fitted = Fitted(*(state[name] for name in ("num_steps", "history", "seconds", "sums")))
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
            self._check_config(json.loads(path.read_text(encoding="utf-8"))["config"])
        found = max(self._folder.glob("step-*"), key=step_of, default=None)
        if found is None:
            return None
        if json.loads((found / STATE).read_text(encoding="utf-8"))["rows"] != self._digest:
            advice = self._advice("was begun with other rows")
            raise ValueError(f"{self._config.stage}.data = {self._config.data}: {advice}")
        return found

    @cached_property
    def _digest(self) -> str:
        """Of the rows; most trainings end before their first checkpoint, and need none."""
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(f"{row}\n".encode())
        return digest.hexdigest()

    def _check_config(self, begun: Mapping[str, Any]) -> None:
        for name, value in dataclasses.asdict(self._config).items():
            old = begun.get(name)
            if value != old and name not in MAY_CHANGE:
                advice = self._advice(f"was begun with {old}")
                raise ValueError(f"{self._config.stage}.{name} = {value}: {advice}")

    def _advice(self, what: str) -> str:
        return f"{checkpoint_folder(self._config)} {what}; go on with those, or remove it to begin anew"

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
            "config": dataclasses.asdict(self._config),
            "rows": self._digest,
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
