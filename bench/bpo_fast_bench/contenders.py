"""What the benches of whole steps and loops share: contenders in processes of their own, and what is made of them.

Every contender trains on command, so that blocks are interleaved (A B C C B A), and its memory is its own: the
high-water mark of resident memory after loading, minus what was resident then.
"""

import json
import os
import queue
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from bpo_fast_bench.shapes import SHAPES, Shape, make_model, words

LENGTHS = {"tldr": (300, 40), "helpfulness": (24, 45), "long": (512, 128)}
FORMS = {"full": 0, "lora": 1, "lora5": 5}  # members
LORA_RANK = 16
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # unless told otherwise


@dataclass(frozen=True)
class Case:
    """One contender's job.

    Attributes:
        who: ours, "ours compiled", or the name of a peer.
        prompt_tokens, completion_tokens: of every pair.
        members: 0 trains all weights, else LoRA members.
        pairs: of an optimizer step.
        steps: of a block.
        num_blocks: in all, warm-up included.
        threads: of the CPU.
        model: folder.
        device: cpu or cuda.
        dtype: of the weights, float32 or bfloat16.
    """

    who: str
    prompt_tokens: int
    completion_tokens: int
    members: int
    pairs: int
    steps: int
    num_blocks: int
    threads: int
    model: str
    device: str
    dtype: str


@dataclass(frozen=True)
class Work:
    """What a pair takes, where the contender knows: FLOP of a step on it, and the peak of the device."""

    flop_a_pair: float = 0.0
    peak_tflops: float | None = None


BLOCKS_A_TURN = 2  # one to warm up


@dataclass(frozen=True)
class Options:
    """What a bench measures.

    Attributes:
        lengths: names in `LENGTHS` (prompt and completion tokens).
        forms: names in `FORMS`.
        peers: who else; empty: ours alone.
        pairs: pairs an optimizer step; None: 8 on a CPU, 16 on a GPU.
        steps: steps of a block.
        rounds: counted blocks of each contender.
        shape: of the model; None: toy on a CPU, 0.5b on a GPU.
        threads: CPU threads of each contender.
        device: auto, cpu or cuda.
        dtype: of the weights of all, float32 or bfloat16; None: float32 on a CPU, bfloat16 on a GPU.
        out: JSON to write, or None.
    """

    lengths: tuple[str, ...] = tuple(LENGTHS)
    forms: tuple[str, ...] = tuple(FORMS)
    peers: tuple[str, ...] = ()
    pairs: int | None = None
    steps: int = 1
    rounds: int = 5
    shape: Shape | None = None
    threads: int = 2
    device: str = "auto"
    dtype: str | None = None
    out: str | None = None

    def row_form(self, form: str, **knobs: object) -> str:
        """The form of a row, with the type where it is not the device's own, and with the knobs that are turned."""
        named = {} if self.dtype == DTYPES[self.device] else {"dtype": self.dtype}
        return ", ".join([form, *(f"{name} = {value}" for name, value in (named | knobs).items())])

    def contender(self, module: str, who: str, lengths: str, members: int, folder: str) -> "Contender":
        """The process of one contender; `folder` holds the model."""
        assert self.pairs, "resolved() has set it"
        assert self.dtype, "resolved() has set it"
        sizes, place = (self.pairs, self.steps, BLOCKS_A_TURN * self.rounds), (folder, self.device, self.dtype)
        return Contender(module, Case(who, *LENGTHS[lengths], members, *sizes, self.threads, *place))


AnyOptions = TypeVar("AnyOptions", bound=Options)


def check_dtype(dtype: str | None) -> None:
    """ValueError for a type that no bench takes; None is the device's own."""
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(f"bench.dtype = {dtype}: not one of {', '.join(DTYPES.values())}")


def resolved(options: AnyOptions) -> AnyOptions:
    """Options with what depends on the device filled in; ValueError for a device that is not there, or another type."""
    from bpo_fast.loading import pick_device

    check_dtype(options.dtype)
    on_gpu = pick_device("bench.device", options.device).type == "cuda"
    return replace(
        options,
        device="cuda" if on_gpu else "cpu",
        dtype=options.dtype or DTYPES["cuda" if on_gpu else "cpu"],
        pairs=options.pairs or (16 if on_gpu else 8),
        shape=options.shape or SHAPES["0.5b" if on_gpu else "toy"],
    )


def pick_peers(text: str, peers: tuple[str, ...], say: Callable[[str], None] = print) -> tuple[str, ...]:
    """The contenders that `--peers` means: auto (TRL if it is installed, else a line), trl, none, or one by name.

    Raises:
        ValueError: TRL is asked for and not installed.
    """
    if text == "none":
        return ()
    missing = [name for name in ("trl", "peft", "datasets") if find_spec(name) is None]
    reason = f'{", ".join(missing)} not installed; pip install "bpo-fast[bench]"'
    if missing and text == "auto":
        say(f"peers: trl is left out ({reason})")
        return ()
    if missing and text in ("trl", *peers):
        raise ValueError(f"bench.peers = {text}: {reason}")
    return peers if text in ("auto", "trl") else (text,)


class ContenderFailed(RuntimeError):
    """A contender's process ended before its work was done; the message says why in a line."""


class Contender:
    """A process that runs one block when told to.

    Args:
        module: of this package; run as a program with the case it serves it.
        case: what to do.
    """

    def __init__(self, module: str, case: Case):
        self.case = case
        self.work = Work()
        self._command = [sys.executable, "-W", "ignore", "-m", f"bpo_fast_bench.{module}", json.dumps(asdict(case))]

    def start(self) -> None:
        """Load model and data."""
        self._messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True
        )
        self.work = Work(**json.loads(self._expect("ready")))

    def block(self) -> float:
        """Seconds of one block."""
        assert self._process.stdin, "opened with a pipe"
        with suppress(BrokenPipeError):  # it has ended, and its messages say why
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return float(self._expect("block"))

    def finish(self) -> float:
        """Peak extra memory in MiB."""
        peak = float(self._expect("peak"))
        self._process.wait()
        return peak

    def _expect(self, key: str) -> str:
        assert self._process.stdout, "opened with a pipe"
        for line in self._process.stdout:
            name, _, value = line.strip().partition(" ")
            if name == key:
                return value
        code = self._process.wait()
        if code == -signal.SIGKILL:
            raise ContenderFailed("killed, as the system does when memory runs out")
        self._messages.seek(0)
        lines = [line for line in self._messages.read().splitlines() if line.strip()]
        # an exception's first line, of perhaps many
        raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)(:|$)", line)]
        raise ContenderFailed(f"exit code {code}: {[*lines, *raised][-1] if lines else 'no message'}")


def measure(contenders: Mapping[str, Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """`rounds` turns of all, every other turn backwards, two blocks a turn and the second one counted; medians, peaks.

    The first block of a turn warms up: while a process waits, its memory can go back to the host of a virtual machine,
    and touching it again takes up to twenty times as long as the block. Of one that fails (no memory left, say) the
    reason stands in its place, and the others go on.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    out: dict[str, dict[str, Any]] = {}

    def turn(name: str) -> None:
        contenders[name].block()
        times[name].append(contenders[name].block())

    def finish(name: str) -> None:
        contender = contenders[name]
        out[name] = {
            "pairs_per_s": contender.case.pairs * contender.case.steps / statistics.median(times[name]),
            "block_s": [round(t, 4) for t in times[name]],
            "peak_extra_mib": round(contender.finish(), 1),
            "work": contender.work,
        }

    def each(act: Callable[[str], None], names: Iterable[str]) -> None:
        for name in names:
            if name not in out:
                try:
                    act(name)
                except ContenderFailed as error:
                    out[name] = {"failed": str(error)}

    each(lambda name: contenders[name].start(), contenders)
    for i in range(rounds):
        each(turn, contenders if i % 2 == 0 else reversed(list(contenders)))
    each(finish, contenders)
    return out


def serve(case: Case, blocks: Iterator[Any]) -> None:
    """Body of a contender's process; the first item of `blocks`, its `Work`, is there once model and data are loaded,
    the others are seconds."""
    from bpo_fast.allocator import keep_freed_memory, keep_less_code, open_arena
    from bpo_fast.threads import share_cores

    if case.who.startswith("ours") and case.device == "cpu":  # as in every process of bpo-fast
        share_cores()
        keep_freed_memory()
        keep_less_code()
        open_arena()

    import torch

    from bpo_fast import machine

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # trainers print to what would be our line to the parent
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    work = next(blocks)
    start = machine.reset_peak()
    print("ready", json.dumps(asdict(work)), file=out, flush=True)
    for i in range(case.num_blocks):
        sys.stdin.readline()
        seconds = next(blocks)
        if case.device == "cuda" and i % BLOCKS_A_TURN == BLOCKS_A_TURN - 1:
            torch.cuda.empty_cache()  # the others need the memory
        print("block", seconds, file=out, flush=True)
    print("peak", (machine.peak_bytes() - start) / 2**20, file=out, flush=True)


def now(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(
    found: Mapping[str, dict[str, Any]], ours: str, peers: Sequence[str], *, runs: int, **names: str
) -> dict[str, Any]:
    """A row: what was measured of ours and of its peers, each run `runs` times for one of ours, and the ratios of those
    that did not fail."""
    work = found[ours].get("work", Work())
    found = {name: {k: v for k, v in one.items() if k != "work"} for name, one in found.items()}
    row: dict[str, Any] = {**names, "ours": found[ours]}
    row |= {peer: found[peer] for peer in peers}
    peers = [peer for peer in peers if "failed" not in found[peer]]
    for peer in peers:
        row[peer] = found[peer] | {"pairs_per_s": found[peer]["pairs_per_s"] / runs, "runs": runs}
    if "failed" in found[ours]:
        return row
    for peer in peers:
        row[f"speedup/{peer}"] = round(row["ours"]["pairs_per_s"] / row[peer]["pairs_per_s"], 2)
        row[f"memory/{peer}"] = round(row["ours"]["peak_extra_mib"] / max(1.0, row[peer]["peak_extra_mib"]), 3)
    if work.flop_a_pair:  # the same mathematics, whoever does it
        for name in ("ours", *peers):
            tflops = row[name]["pairs_per_s"] * work.flop_a_pair / 1e12
            row[name] |= {"tflops": round(tflops, 4)}
            row[name] |= {"mfu": round(tflops / work.peak_tflops, 4)} if work.peak_tflops else {}
    return row


def make_texts(case: Case) -> list[dict[str, str]]:
    """Rows {prompt, chosen, rejected} of random words; TRL adds the EOS, so completions have one word less."""
    draw = random.Random(0)
    return [
        {
            "prompt": words(draw, case.prompt_tokens),
            "chosen": " " + words(draw, case.completion_tokens - 1),
            "rejected": " " + words(draw, case.completion_tokens - 1),
        }
        for _ in range(case.num_blocks * case.steps * case.pairs)
    ]


def trl_blocks(
    case: Case, make_trainer: Callable[..., Any], model_class: Any = None, **model_options: Any
) -> Iterator[Any]:
    """TRL trains in its own loop, on a thread of its own; a callback holds it at every block.

    Args:
        case: what to do.
        make_trainer: called with the arguments that all of TRL's trainers share here: model, processing_class,
            peft_config, callbacks, and `settings` of its configuration.
        model_class, model_options: what the model is loaded as; a causal LM if none is given.
    """
    import transformers

    begun, ended = queue.Queue(), queue.Queue()

    def train() -> None:
        try:
            trainer.train()
            ended.put(RuntimeError("the trainer ended early"))  # nobody asks, unless it did
        except BaseException as error:  # raised where the blocks are asked for
            ended.put(error)

    class Gate(transformers.TrainerCallback):
        start = 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % case.steps == 0:
                begun.get()
                self.start = now(case.device)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % case.steps == 0:
                ended.put(now(case.device) - self.start)

    with tempfile.TemporaryDirectory() as out:
        settings = {
            "output_dir": out,
            "per_device_train_batch_size": case.pairs,
            "max_steps": case.num_blocks * case.steps,
            "learning_rate": 1e-5,
            "gradient_checkpointing": False,
            "bf16": case.dtype == "bfloat16",
            "use_cpu": case.device == "cpu",
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        trainer = make_trainer(
            settings,
            model=(model_class or transformers.AutoModelForCausalLM).from_pretrained(
                case.model, dtype=case.dtype, **model_options
            ),
            processing_class=transformers.AutoTokenizer.from_pretrained(case.model, padding_side="left"),
            peft_config=_peft_config(case),
            callbacks=[Gate()],
        )
        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        yield Work()
        for _ in range(case.num_blocks):
            begun.put(None)
            took = ended.get()
            if isinstance(took, BaseException):
                raise took
            yield took
        thread.join()


def _peft_config(case: Case) -> Any:
    if not case.members:
        return None
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def run_rows(
    options: AnyOptions,
    known: Mapping[str, Sequence[str]],
    groups: Sequence[Sequence[str]],
    measure_forms: Callable[[AnyOptions, str, Sequence[str], str], list[dict[str, Any]]],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measures every case; says, writes and returns a row each.

    Args:
        options: what to measure.
        known: the names that `options` may hold, see `check_names`.
        groups: forms that are measured together.
        measure_forms: (options, lengths, forms of a group, folder of the model) -> rows.
        say: takes a line for people.

    Raises:
        ValueError: an unknown name, a peer that is not installed, or ours failed.
    """
    from bpo_fast.allocator import give_back_freed_memory

    check_names(options, known)
    options, rows = resolved(options), []
    assert options.shape, "resolved() has set it"
    assert options.dtype, "resolved() has set it"
    with tempfile.TemporaryDirectory() as folder:
        make_model(options.shape, Path(folder), options.dtype)
        give_back_freed_memory()  # the contenders need it
        for lengths in options.lengths:
            for forms in groups:
                new = measure_forms(options, lengths, forms, folder)
                rows += new
                say("\n".join(line(row) for row in new))
                if options.out:
                    write_rows(Path(options.out), options, new, say)
    check_ours(rows)
    return rows


def check_names(options: Any, known: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError for a name in a tuple of `options` that is not among those known."""
    for name, choices in known.items():
        for value in getattr(options, name):
            if value not in choices:
                raise ValueError(f"bench.{name} = {value}: not one of {', '.join(choices)}")


def check_ours(rows: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where ours failed; what was measured of others is written by then."""
    for row in rows:
        if reason := row["ours"].get("failed"):
            raise ValueError(f"bench.lengths = {row['lengths']}, bench.form = {row['form']}: ours failed, {reason}")


def write_rows(path: Path, options: Any, rows: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Adds rows to a JSON file, so a bench can run in pieces; a row replaces that of its lengths and form, unless
    somebody whom that one measured has failed."""
    from bpo_fast.doctor import environment
    from bpo_fast.files import write_atomic

    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    earlier, wanted = {_name(r): r for r in kept}, []
    for row in rows:
        before = earlier.get(_name(row), {})
        lost = [who for who, one in row.items() if _failed(one) and who in before and not _failed(before[who])]
        if lost:
            say(f"{' '.join(_name(row))}: {', '.join(lost)} failed, the earlier row stays in {path}")
        else:
            wanted.append(row)
    names = {_name(r) for r in wanted}
    settings = {name: value for name, value in asdict(options).items() if name != "out"}
    receipt = {"options": settings, "machine": environment(sys.argv)}
    rows = [r for r in kept if _name(r) not in names] + [r | receipt for r in wanted]
    write_atomic(path, json.dumps({"rows": rows}, indent=2) + "\n")


def _name(row: dict[str, Any]) -> tuple[str, str]:
    return row["lengths"], row["form"]


def _failed(one: Any) -> bool:
    return isinstance(one, dict) and "failed" in one


def line(row: dict[str, Any]) -> str:
    """One line for people."""

    def rate(name: str) -> str:
        one = row[name]
        if "failed" in one:
            return f"failed ({one['failed']})"
        tflops = f", {one['tflops']:.3g} TFLOP/s" if "tflops" in one else ""
        mfu = f", MFU {one['mfu']:.3f}" if "mfu" in one else ""
        return f"{one['pairs_per_s']:.2f} pairs/s, {one['peak_extra_mib']:.0f} MiB{tflops}{mfu}"

    parts = [f"{row['lengths']} {row['form']}: ours {rate('ours')}"]
    for key, value in row.items():
        kind, _, peer = key.partition("/")
        if _failed(value) and key != "ours":
            parts.append(f"{key} {rate(key)}")
        elif kind == "speedup":
            parts.append(f"{peer} {rate(peer)} ({value:.1f}x, memory {row[f'memory/{peer}']:.2f})")
    return "; ".join(parts)
