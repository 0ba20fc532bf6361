"""Data parallelism on one machine: a process a device, each with a copy of the policy, each with its share of the work.

Rank 0 is the run: it alone writes, prints and can be interrupted, and its weights are those of the checkpoints. It
starts the others, which take their share of the prompts to sample, of the pairs to score and of the pairs of every
step, and which end with it. What they make is gathered in the order of the prompts, gradients are summed, and every
rank steps its piece of the weights and gets the others'. The group is none that torch.distributed knows of, so that
vLLM can have its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import typer
from torch import Tensor, distributed, nn

from bpo_fast.cli_errors import reports_errors
from bpo_fast.threads import PREFIX, Threads

Item = TypeVar("Item")
# between two looks at a collective: at first, growing by a fiftieth each, at most; and at the processes
POLL_S, LONGEST_POLL_S, LOOK_S = 1e-4, 1e-2, 0.2
ENDED_S = 5.0  # a process is seen to have ended so long after its connections
SHOWN_LINES = 40  # of what a rank said that crashed
EXCHANGED_BYTES = 2**26  # of tensors that go from rank to rank in one piece
DONE_S = 60.0  # for the others to end by themselves after rank 0
HOST = torch.device("cpu")  # of ranks that exchange no tensors
NO_LIMIT = timedelta(days=365)  # one rank may wait for another's sampling
# on the path of rank 0, which no file of the working folder gets in front of
WORKER = """import sys
sys.path[:] = {path!r}
import runpy
runpy.run_module("bpo_fast.rank_worker", run_name="__main__", alter_sys=True)"""


@dataclass(frozen=True)
class Share(Generic[Item]):
    """Items dealt to the ranks.

    Attributes:
        mine: this rank's, in the order of the whole.
    """

    mine: list[Item]
    _ranks: "Ranks"
    _dealt: list[list[int]]

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """A value for each of `mine` -> one for each item, in their order; JSON goes between processes."""
        assert len(values) == len(self.mine), "a value an item"
        whole: list[Any] = [None] * sum(map(len, self._dealt))
        for places, part in zip(self._dealt, self._ranks.gather(list(values)), strict=True):
            for place, value in zip(places, part, strict=True):
                whole[place] = value
        return whole


class Ranks:
    """The processes that train one policy together; this class is one alone.

    Attributes:
        rank: of this process, 0, 1, ...
        size: processes.
    """

    rank, size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[Item], size_of: Callable[[Item], int]) -> Share[Item]:
        """Deals items to the ranks, in sum of like sizes, and the same way whenever it is asked for.

        Args:
            items: of all ranks.
            size_of: what an item takes, such as tokens.
        """
        dealt: list[list[int]] = [[] for _ in range(self.size)]
        filled = [0] * self.size
        for size, place in sorted(((size_of(item), -place) for place, item in enumerate(items)), reverse=True):
            rank = filled.index(min(filled))
            dealt[rank].append(-place)
            filled[rank] += size
        dealt = [sorted(hand) for hand in dealt]
        return Share([items[place] for place in dealt[self.rank]], self, dealt)

    def connect(self, device: torch.device) -> None:
        """Waits until every rank is here, on its device.

        Raises:
            ValueError, RuntimeError: another rank has ended, with its message.
        """

    def close(self) -> None:
        """Gives up the connections; what the GPU still does for a collective ends."""

    def gather(self, mine: Any) -> list[Any]:
        """The values of all ranks, in their order; JSON goes between processes."""
        return [mine]

    def wait(self) -> None:
        """Returns when all ranks are here."""
        self.gather(None)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sums tensors over the ranks, in place; all ranks end with the same bits."""

    def exchange_(self, tensors: Sequence[Tensor], bounds: Sequence[Sequence[int]]) -> None:
        """Brings each rank's piece of every tensor to all of them, in place.

        Args:
            tensors: of any type.
            bounds: of each: rank r has brought the elements bounds[r] to bounds[r + 1] up to date, in their order.
        """

    def on_save(self, save: Callable[[Path, int], None]) -> None:
        """Has a rank beside rank 0 save what it alone holds, whatever it is doing, when rank 0 calls `save`.

        Args:
            save: takes the folder and the step; runs in a thread of its own.
        """

    def save(self, folder: Path, step: int) -> None:
        """Has the other ranks save what they alone hold, and returns when they have."""

    def check_alike(self, what: str, value: str) -> None:
        """Raises ValueError if ranks differ in a setting that each of them found for itself."""
        values = self.gather(value)
        if len(set(values)) > 1:
            raise ValueError(f"{what}: {', '.join(f'{v} on rank {rank}' for rank, v in enumerate(values))}; name one")

    def check_same(self, tensors: Sequence[Tensor]) -> None:
        """Raises RuntimeError if the ranks do not hold the same bits."""
        digests = self.gather(_digest(tensors)) if self.size > 1 else []
        strangers = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if strangers:
            raise RuntimeError(f"the weights of rank {strangers[0]} are not those of rank 0")


class Group(Ranks):
    """One of several processes.

    Args:
        rank: of this process.
        size: processes.
        meeting: a file through which they find each other.
        look: raises if another rank has ended; called now and then while waiting.
        tell: on rank 0: takes an order to all others.
        orders: on the others: those of rank 0, as they come.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        meeting: Path,
        look: Callable[[], None] = lambda: None,
        tell: Callable[[dict[str, Any]], None] = lambda order: None,
        orders: Iterable[dict[str, Any]] = (),
    ):
        self.rank, self.size = rank, size
        self._meeting, self._look, self._looked = meeting, look, 0.0
        self._tell, self._orders = tell, orders
        self._host: Any = None
        self._device: Any = None

    def connect(self, device: torch.device) -> None:
        """See `Ranks.connect`."""
        store = distributed.FileStore(str(self._meeting), self.size)
        store.set(f"here/{self.rank}", "")
        here = [f"here/{rank}" for rank in range(self.size)]
        self._until(lambda: store.check(here))
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = NO_LIMIT
        self._host = gloo(distributed.PrefixStore("host", store), self.rank, self.size, options)
        if device.type == "cuda" and distributed.is_nccl_available():
            nccl = distributed.ProcessGroupNCCL
            options = nccl.Options()
            options._timeout = NO_LIMIT
            self._device = nccl(distributed.PrefixStore("device", store), self.rank, self.size, options)
            # while all are here: NCCL would begin with the first sum, deaf to signals and to the end of others; a
            # connection is kept by the number of its device, and "cuda", the current one, has none
            numbered = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
            with Threads(1) as thread:
                connected = thread.submit(self._device.eager_connect_single_device, numbered)
                self._until(connected.done)
                connected.result()

    def close(self) -> None:
        """See `Ranks.close`."""
        if self._device is not None:  # and no sum is left to be waited for
            self._device.abort()
            self._device = None

    def gather(self, mine: Any) -> list[Any]:
        """See `Ranks.gather`."""
        data = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._done(self._host.allgather([lengths], [torch.tensor([len(data)])]))
        longest = int(max(lengths))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        self._done(self._host.allgather([parts], [torch.nn.functional.pad(data, (0, longest - len(data)))]))
        return [json.loads(part[: int(length)].numpy().tobytes()) for part, length in zip(parts, lengths, strict=True)]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.sum_`."""
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            same = [t for t in tensors if t.dtype == dtype]
            # themselves, but for those that are not contiguous or, without NCCL, on a GPU
            held = [(t if self._device else t.cpu()).contiguous() for t in same]
            self._done((self._device or self._host).allreduce_coalesced(held))
            for tensor, sums in zip(same, held, strict=True):
                if sums is not tensor:
                    tensor.copy_(sums)

    def exchange_(self, tensors: Sequence[Tensor], bounds: Sequence[Sequence[int]]) -> None:
        """See `Ranks.exchange_`."""
        bucket: list[tuple[Tensor, Sequence[int]]] = []
        num_bytes = 0
        for tensor, ends in zip(tensors, bounds, strict=True):
            bucket.append((tensor, ends))
            num_bytes += tensor.nbytes
            if num_bytes >= EXCHANGED_BYTES:
                self._exchange(bucket)
                bucket, num_bytes = [], 0
        if bucket:
            self._exchange(bucket)

    def _exchange(self, tensors: list[tuple[Tensor, Sequence[int]]]) -> None:
        """Of (tensor, bounds)."""
        held = [tensor.contiguous() for tensor, _ in tensors]  # themselves, but for those that are not
        self._exchange_bytes(
            [
                (whole.view(-1).view(torch.uint8), [end * whole.element_size() for end in ends])
                for whole, (_, ends) in zip(held, tensors, strict=True)
            ]
        )
        for whole, (tensor, _) in zip(held, tensors, strict=True):
            if whole is not tensor:
                tensor.copy_(whole)

    def _exchange_bytes(self, bucket: list[tuple[Tensor, Sequence[int]]]) -> None:
        """Of (bytes, bounds); bytes go as they are, whatever the type."""
        longest = max(sum(ends[r + 1] - ends[r] for _, ends in bucket) for r in range(self.size))
        mine = torch.cat([row[ends[self.rank] : ends[self.rank + 1]] for row, ends in bucket])
        mine = torch.nn.functional.pad(mine if self._device else mine.cpu(), (0, longest - len(mine)))
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._done((self._device or self._host).allgather([parts], [mine]))
        for rank, part in enumerate(parts):
            begin = 0
            for row, ends in bucket:
                num = ends[rank + 1] - ends[rank]
                if rank != self.rank:
                    row[ends[rank] : ends[rank + 1]].copy_(part[begin : begin + num])
                begin += num

    def on_save(self, save: Callable[[Path, int], None]) -> None:
        """See `Ranks.on_save`."""
        if not self.is_main:
            threading.Thread(target=self._answer, args=(save,), name=f"{PREFIX}-saves", daemon=True).start()

    def save(self, folder: Path, step: int) -> None:
        """See `Ranks.save`."""
        saved = [self._saved(rank) for rank in range(1, self.size)]
        for path in saved:
            path.unlink(missing_ok=True)
        self._tell({"folder": str(folder.absolute()), "step": step})
        self._until(lambda: all(path.exists() for path in saved))

    def _answer(self, save: Callable[[Path, int], None]) -> None:
        """Follows the orders of rank 0; what goes wrong ends the process, as it does in its main thread."""

        @reports_errors
        def follow() -> None:
            for order in self._orders:
                save(Path(order["folder"]), order["step"])
                self._saved(self.rank).touch()

        try:
            follow()
        except typer.Exit as error:
            os._exit(error.exit_code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _saved(self, rank: int) -> Path:
        """Is there once a rank has saved."""
        return self._meeting.with_name(f"saved-{rank}")

    def _done(self, work: Any) -> None:
        """Waits for a collective, and not for a rank that has ended."""
        try:
            self._until(work.is_completed)
        except BaseException:  # the GPU waits on, and with it whatever else it is given
            self.close()
            raise
        try:
            work.wait()
        except RuntimeError:  # its connections went with it: its end is seen a moment later
            deadline = time.monotonic() + ENDED_S
            self._until(lambda: time.monotonic() > deadline)
            raise

    def _until(self, holds: Callable[[], bool]) -> None:
        """Polls, so that signals are heard."""
        pause = POLL_S
        while not holds():
            time.sleep(pause)
            pause = min(1.02 * pause, LONGEST_POLL_S)
            if time.monotonic() - self._looked > LOOK_S:
                self._looked = time.monotonic()
                self._look()


@torch.no_grad()
def sum_gradients(
    parameters: Sequence[nn.Parameter], values: Sequence[float | Tensor], device: torch.device, ranks: Ranks
) -> Tensor:
    """Sums the gradients of all ranks, in place; a rank may be without gradients.

    Args:
        parameters: of this rank.
        values: numbers that are summed with them.
        device: of the parameters.
        ranks: that all call this.

    Returns:
        [len(values)] float64. the sums of the values.
    """
    numbers = [torch.as_tensor(v, dtype=torch.float64, device=device) for v in values]
    if ranks.size == 1:
        return torch.stack(numbers)
    has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float64).to(device)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = torch.cat([torch.stack(numbers), has_gradient])
    ranks.sum_([*grads, total])
    sums, num_with_gradient = total.split([len(numbers), len(grads)])
    for parameter, grad, num in zip(parameters, grads, num_with_gradient.tolist(), strict=True):
        parameter.grad = grad if num else None  # as on one device, which leaves alone what has none
    return sums


@dataclass(frozen=True)
class Devices:
    """The devices that share the work, as settings name them.

    Attributes:
        num: how many.
        name: auto, cpu, cuda or cuda:N.
        what: in front of the settings' names, such as `run`.
    """

    num: int
    name: str
    what: str

    def check(self) -> bool:
        """Whether the other ranks have GPUs; ValueError if there are not enough, or if settings forbid several."""
        if self.num == 1:
            return False
        what = f"{self.what}.devices = {self.num}"
        on_gpu = self.name.startswith("cuda") or (self.name == "auto" and torch.cuda.is_available())
        if ":" in self.name:
            raise ValueError(f"{what}: not with {self.what}.device = {self.name}; choose GPUs by CUDA_VISIBLE_DEVICES")
        num, kind = (torch.cuda.device_count(), "CUDA devices") if on_gpu else (os.cpu_count() or 1, "cores")
        if self.num > num:
            raise ValueError(f"{what}: this machine has {num} {kind}")
        return on_gpu


@contextmanager
def started(devices: Devices, job: dict[str, Any]) -> Iterator[Ranks]:
    """Rank 0 of the processes of a run; the others begin, and end with the block.

    Args:
        devices: how many there are.
        job: what the others do, as rank_worker.py reads it.

    Raises:
        ValueError: more devices than this machine has, or settings that do not go with several.
    """
    size = devices.num
    if size == 1:
        yield Ranks()
        return
    on_gpu = devices.check()
    before = torch.get_num_threads()
    threads = max(1, before // size)
    with tempfile.TemporaryDirectory(prefix="bpo-fast-ranks-") as folder:
        meeting = Path(folder) / "meeting"
        order = {
            "size": size,
            "meeting": str(meeting),
            # a rank whose GPU does not answer fails, where auto would be a CPU that the others wait for
            "device": "cuda" if on_gpu else "cpu",
            "job": job,
            "parent": os.getpid(),
        }
        others: list[_Other] = []

        def look() -> None:
            for other in others:
                other.check()

        def tell(order: dict[str, Any]) -> None:
            for other in others:
                other.tell(order)

        try:
            for rank in range(1, size):
                others.append(_Other(rank, order, Path(folder) / f"rank-{rank}.log", threads, on_gpu))
            torch.set_num_threads(threads)
            with closing(Group(0, size, meeting, look, tell)) as ranks:
                yield ranks
            for other in others:
                other.wait()
        finally:
            torch.set_num_threads(before)
            for other in others:
                other.kill()


class _Other:
    """A process of another rank, seen from rank 0."""

    def __init__(self, rank: int, order: dict[str, Any], log: Path, threads: int, on_gpu: bool):
        self._rank, self._log = rank, log
        environ = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if on_gpu:  # it sees its own device alone, and so does the vLLM in it
            environ["CUDA_VISIBLE_DEVICES"] = _visible()[rank]
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER.format(path=[*map(str, sys.path)])],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=file,
                text=True,
                env=environ,
                start_new_session=True,  # Ctrl-C is for rank 0
            )
        self.tell(order | {"rank": rank})

    def tell(self, order: dict[str, Any]) -> None:
        """Gives it a line of JSON; that it has ended is seen by `check`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def check(self) -> None:
        """Raises what ended it, if it has."""
        code = self._process.poll()
        if code is None:
            return
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        errors = [line for line in said if line.startswith("error: ")]  # libraries can have words after it
        last = (errors or said or [""])[-1].removeprefix("error: ")
        if code == 2:  # what a user can cause, as rank 0 itself would have said it
            raise ValueError(last)
        if not errors:  # a crash: its traceback
            print(*lines[-SHOWN_LINES:], sep="\n", file=sys.stderr)
        how = f"code {code}" if code >= 0 else f"signal {-code}"
        raise RuntimeError(f"rank {self._rank} ended with {how}" + (f": {last}" if last else ""))

    def wait(self) -> None:
        """For its own end, a while; there are no more orders."""
        self._hang_up()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(DONE_S)

    def kill(self) -> None:
        """Ends it, whatever it does: nothing of it is kept."""
        self._process.kill()
        self._process.wait()
        self._hang_up()

    def _hang_up(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


def _visible() -> list[str]:
    """The GPUs of this process, by the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _digest(tensors: Sequence[Tensor]) -> int:
    """The sum of the bits as integers, in which the order of a sum makes no difference."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [t.detach().contiguous().view(-1).view(kinds[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return int(torch.stack(sums).sum()) if sums else 0
