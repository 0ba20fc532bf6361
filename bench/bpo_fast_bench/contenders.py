"""What the benches of whole steps and loops share: contenders in processes of their own, and a model for them.

Every contender trains on command, so that blocks are interleaved (A B C C B A), and its memory is its own: the
high-water mark of resident memory after loading, minus what was resident then.
"""

import json
import os
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LENGTHS = {"tldr": (300, 40), "helpfulness": (24, 45), "long": (512, 128)}
FORMS = {"full": 0, "lora": 1, "lora5": 5}  # members
LORA_RANK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model with random weights and a tokenizer of words."""

    hidden: int = 256
    layers: int = 4
    vocab: int = 32000


@dataclass(frozen=True)
class Case:
    """One contender's job.

    Attributes:
        who: ours, or the name of a peer.
        prompt_tokens, completion_tokens: of every pair.
        members: 0 trains all weights, else LoRA members.
        pairs: of an optimizer step.
        steps: of a block.
        num_blocks: in all, warm-up included.
        threads: of the CPU.
        model: folder.
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


BLOCKS_A_TURN = 2  # one to warm up


@dataclass(frozen=True)
class Options:
    """What a bench measures.

    Attributes:
        lengths: names in `LENGTHS` (prompt and completion tokens).
        forms: names in `FORMS`.
        peers: who else; empty: ours alone.
        pairs: pairs an optimizer step.
        steps: steps of a block.
        rounds: counted blocks of each contender.
        shape: of the model.
        threads: CPU threads of each contender.
        out: JSON to write, or None.
    """

    lengths: tuple[str, ...] = tuple(LENGTHS)
    forms: tuple[str, ...] = tuple(FORMS)
    peers: tuple[str, ...] = ()
    pairs: int = 8
    steps: int = 1
    rounds: int = 5
    shape: Shape = field(default_factory=Shape)
    threads: int = 2
    out: str | None = None

    def contender(self, module: str, who: str, lengths: str, members: int, folder: str) -> "Contender":
        """The process of one contender; `folder` holds the model."""
        sizes = (self.pairs, self.steps, BLOCKS_A_TURN * self.rounds)
        return Contender(module, Case(who, *LENGTHS[lengths], members, *sizes, self.threads, folder))


class Contender:
    """A process that runs one block when told to.

    Args:
        module: of this package; run as a program with the case it serves it.
        case: what to do.
    """

    def __init__(self, module: str, case: Case):
        self.case = case
        command = [sys.executable, "-W", "ignore", "-m", f"bpo_fast_bench.{module}", json.dumps(asdict(case))]
        self._messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True
        )
        self._expect("ready")

    def block(self) -> float:
        """Seconds of one block."""
        assert self._process.stdin, "opened with a pipe"
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
        self._messages.seek(0)
        lines = [line for line in self._messages.read().splitlines() if line.strip()]
        reason = f"exit code {code}: {lines[-1] if lines else 'no message'}"
        raise ValueError(f"bench.peers = {self.case.who}: {reason}")


def measure(contenders: Mapping[str, Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """`rounds` turns of all, every other turn backwards, two blocks a turn and the second one counted; medians, peaks.

    The first block of a turn warms up: while a process waits, its memory can go back to the host of a virtual machine,
    and touching it again takes up to twenty times as long as the block.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name in contenders if i % 2 == 0 else reversed(contenders):
            contenders[name].block()
            times[name].append(contenders[name].block())
    out = {}
    for name, contender in contenders.items():
        num_pairs = contender.case.pairs * contender.case.steps
        out[name] = {
            "pairs_per_s": num_pairs / statistics.median(times[name]),
            "block_s": [round(t, 4) for t in times[name]],
            "peak_extra_mib": round(contender.finish(), 1),
        }
    return out


def serve(case: Case, blocks: Iterator[float]) -> None:
    """Body of a contender's process; the first item of `blocks` is there once model and data are loaded."""
    import torch

    from bpo_fast import machine

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # trainers print to what would be our line to the parent
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    next(blocks)
    start = machine.reset_peak()
    print("ready", file=out, flush=True)
    for _ in range(case.num_blocks):
        sys.stdin.readline()
        print("block", next(blocks), file=out, flush=True)
    print("peak", (machine.peak_bytes() - start) / 2**20, file=out, flush=True)


def compare(
    found: Mapping[str, dict[str, Any]], ours: str, peers: Sequence[str], *, runs: int, **names: str
) -> dict[str, Any]:
    """A row: what was measured of ours and of its peers, each run `runs` times for one of ours, and the ratios."""
    row: dict[str, Any] = {**names, "ours": found[ours]}
    for peer in peers:
        row[peer] = found[peer] | {"pairs_per_s": found[peer]["pairs_per_s"] / runs, "runs": runs}
        row[f"speedup/{peer}"] = round(row["ours"]["pairs_per_s"] / row[peer]["pairs_per_s"], 2)
        row[f"memory/{peer}"] = round(row["ours"]["peak_extra_mib"] / max(1.0, row[peer]["peak_extra_mib"]), 3)
    return row


def trl_blocks(case: Case, make_trainer: Callable[..., Any]) -> Iterator[float]:
    """TRL trains in its own loop, on a thread of its own; a callback holds it at every block.

    Args:
        case: what to do.
        make_trainer: called with the arguments that all of TRL's trainers share here: model, processing_class,
            peft_config, callbacks, and `settings` of its configuration.
    """
    import transformers

    begun, ended = queue.Queue(), queue.Queue()

    class Gate(transformers.TrainerCallback):
        start = 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % case.steps == 0:
                begun.get()
                self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % case.steps == 0:
                ended.put(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as out:
        settings = {
            "output_dir": out,
            "per_device_train_batch_size": case.pairs,
            "max_steps": case.num_blocks * case.steps,
            "learning_rate": 1e-5,
            "beta": 0.1,
            "gradient_checkpointing": False,
            "disable_dropout": True,
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        trainer = make_trainer(
            settings,
            model=transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype="float32"),
            processing_class=transformers.AutoTokenizer.from_pretrained(case.model, padding_side="left"),
            peft_config=_peft_config(case),
            callbacks=[Gate()],
        )
        thread = threading.Thread(target=trainer.train, daemon=True)
        thread.start()
        yield 0.0
        for _ in range(case.num_blocks):
            begun.put(None)
            yield ended.get()
        thread.join()


def _peft_config(case: Case) -> Any:
    if not case.members:
        return None
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def make_model(shape: Shape, folder: Path) -> None:
    """Saves a model with random weights; its tokenizer knows `w0`, `w1`, ... as one token each."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(shape.vocab - 3)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden // 64),
        num_key_value_heads=max(1, shape.hidden // 64),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def words(draw: random.Random, num: int, vocab: int = 20000) -> str:
    """Random words, one token each."""
    return " ".join(f"w{draw.randrange(vocab)}" for _ in range(num))


def check_names(options: Any, known: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError for a name in a tuple of `options` that is not among those known."""
    for name, choices in known.items():
        for value in getattr(options, name):
            if value not in choices:
                raise ValueError(f"bench.{name} = {value}: not one of {', '.join(choices)}")


def write_rows(path: Path, options: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a JSON file; rows of the same lengths and form are replaced, so a bench can run in pieces."""
    from bpo_fast.doctor import environment

    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    names = {(r["lengths"], r["form"]) for r in rows}
    settings = {name: value for name, value in asdict(options).items() if name != "out"}
    receipt = {"options": settings, "machine": environment(sys.argv)}
    rows = [r for r in kept if (r["lengths"], r["form"]) not in names] + [r | receipt for r in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    """One line for people."""

    def rate(name: str) -> str:
        return f"{row[name]['pairs_per_s']:.2f} pairs/s, {row[name]['peak_extra_mib']:.0f} MiB"

    parts = [f"{row['lengths']} {row['form']}: ours {rate('ours')}"]
    for key, value in row.items():
        kind, _, peer = key.partition("/")
        if kind == "speedup":
            parts.append(f"{peer} {rate(peer)} ({value:.1f}x, memory {row[f'memory/{peer}']:.2f})")
    return "; ".join(parts)
