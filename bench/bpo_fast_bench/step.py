"""`bpo-fast bench step`: one optimizer step on preference pairs, ours against TRL's DPOTrainer, in one run.

Every contender lives in a process of its own that trains on command, so the blocks of steps are interleaved (A B C C B
A) and peak memory is the process's own: peak resident memory minus what it held after loading model and data. Same
model, same pairs, same optimizer, no dropout. Ours includes the reference pass (once a phase); TRL is timed with the
reference model in the step and with `precompute_ref_log_probs`, whose cost it does not pay inside the timed steps.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LENGTHS = {"tldr": (300, 40), "helpfulness": (24, 45), "long": (512, 128)}
FORMS = {"full": 0, "lora": 1, "lora5": 5}
PEERS = ("trl", "trl-precomputed")


@dataclass(frozen=True)
class StepOptions:
    """What to measure.

    Attributes:
        lengths: names in `LENGTHS` (prompt and completion tokens).
        forms: names in `FORMS`; TRL trains an ensemble one member after the other.
        peers: names in `PEERS`; empty: ours alone.
        pairs: pairs an optimizer step.
        steps: steps of a block.
        rounds: blocks of each contender, at least 3.
        hidden, layers, vocab: the Llama-shaped model with random weights.
        threads: CPU threads of each contender.
        out: JSON to write, or None.
    """

    lengths: tuple[str, ...] = ("tldr", "helpfulness", "long")
    forms: tuple[str, ...] = ("full", "lora", "lora5")
    peers: tuple[str, ...] = PEERS
    pairs: int = 8
    steps: int = 1
    rounds: int = 5
    hidden: int = 256
    layers: int = 4
    vocab: int = 32000
    threads: int = 2
    out: str | None = None


@dataclass(frozen=True)
class Case:
    """One contender's job."""

    who: str
    prompt_tokens: int
    completion_tokens: int
    members: int
    pairs: int
    steps: int
    num_blocks: int
    threads: int
    model: str


def run(options: StepOptions, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures every case and returns (and writes) the result.

    Raises:
        ValueError: an unknown name, or a peer that is not installed.
    """
    for name, known in (("lengths", LENGTHS), ("forms", FORMS), ("peers", PEERS)):
        for value in getattr(options, name):
            if value not in known:
                raise ValueError(f"bench.{name} = {value}: not one of {', '.join(known)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        _make_model(options, Path(folder))
        for lengths in options.lengths:
            for form in options.forms:
                row = _measure(options, lengths, form, folder)
                rows.append(row)
                say(_line(row))
    result = {"options": asdict(options), "machine": _machine(), "rows": rows}
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _measure(options: StepOptions, lengths: str, form: str, folder: str) -> dict[str, Any]:
    prompt, completion = LENGTHS[lengths]
    members = FORMS[form]
    contenders = {}
    for who in ("ours", *options.peers):
        # an ensemble of M members costs TRL M runs: one is timed
        own = members if who == "ours" else min(members, 1)
        case = Case(
            who, prompt, completion, own, options.pairs, options.steps, options.rounds + 1, options.threads, folder
        )
        contenders[who] = _Contender(case)
    order = list(contenders.values())
    for contender in order:
        contender.block()  # warm-up
    times: dict[str, list[float]] = {who: [] for who in contenders}
    for i in range(options.rounds):
        for contender in order if i % 2 == 0 else reversed(order):
            times[contender.case.who].append(contender.block())
    row: dict[str, Any] = {"lengths": lengths, "prompt_tokens": prompt, "completion_tokens": completion, "form": form}
    for who, contender in contenders.items():
        runs = max(1, members) if who != "ours" else 1
        seconds = statistics.median(times[who]) * runs
        row[who] = {
            "pairs_per_s": options.pairs * options.steps / seconds,
            "block_s": [t * runs for t in times[who]],
            "peak_extra_mib": contender.finish(),
        }
    for peer in options.peers:
        row[f"speedup/{peer}"] = row["ours"]["pairs_per_s"] / row[peer]["pairs_per_s"]
        row[f"memory/{peer}"] = row["ours"]["peak_extra_mib"] / max(1.0, row[peer]["peak_extra_mib"])
    return row


class _Contender:
    """A process that trains one block of steps when told to."""

    def __init__(self, case: Case):
        self.case = case
        command = [sys.executable, "-W", "ignore", "-m", "bpo_fast_bench.step", json.dumps(asdict(case))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
        assert self._process.stderr, "opened with a pipe"
        lines = [line for line in self._process.stderr.read().splitlines() if line.strip()]
        raise ValueError(f"bench.peers = {self.case.who}: {lines[-1] if lines else 'ended early'}")


def _work(case: Case) -> None:
    """Body of a contender's process."""
    import torch

    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    blocks = _ours(case) if case.who == "ours" else _trl(case)
    next(blocks)  # loads model and data
    start_kib = _resident_kib()
    print("ready", flush=True)
    for _ in range(case.num_blocks):
        sys.stdin.readline()
        print("block", next(blocks), flush=True)
    print("peak", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_kib) / 1024, flush=True)
    sys.stdout.flush()


def _ours(case: Case) -> Iterator[float]:
    from dataclasses import replace

    import torch

    from bpo_fast.collect import microbatches, with_reference
    from bpo_fast.config import MethodConfig, ModelConfig, OptimConfig
    from bpo_fast.loop import _ref_logps
    from bpo_fast.optim import Optimizer
    from bpo_fast.pairs import PairCounts, PhasePairs
    from bpo_fast.policy import load_policy
    from bpo_fast.reference import Reference
    from bpo_fast.types import Completion, Pair, Prompt

    full = case.members == 0
    form = ModelConfig(path=case.model, full=full, members=max(1, case.members), lora_r=16, lora_alpha=32.0)
    length = case.prompt_tokens + case.completion_tokens
    policy = load_policy(form, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=length)
    config = replace(OptimConfig(), learning_rate=1e-5)
    optimizer = Optimizer(policy.parameters(), config, num_steps=10**6, num_members=None if full else case.members)
    method = MethodConfig()
    reference = Reference(policy, method, form, max_length=length)
    texts = _texts(case)
    pairs = []
    for i, row in enumerate(texts):
        ids = {k: tuple(policy.tokenizer(row[k], add_special_tokens=False)["input_ids"]) for k in row}
        sides = [
            Completion(i, k, (*ids[s], policy.eos_ids[0]), "", False, 0, 0)
            for k, s in enumerate(("chosen", "rejected"))
        ]
        pairs.append(Pair(Prompt(i, "", ids["prompt"]), *sides, 1.0, 0.0))
    yield 0.0
    budget = config.microbatch_tokens * policy.num_members
    for block in range(case.num_blocks):
        size = case.pairs * case.steps
        mine = tuple(pairs[block * size : (block + 1) * size])
        start = time.perf_counter()
        found = PhasePairs(0, 0, mine, PairCounts(), {})
        found = with_reference(found, case.steps, policy, reference, max_tokens=budget, on_done=lambda n: None)
        policy.model.train()
        for step in range(case.steps):
            optimizer.zero_grad()
            for batch in microbatches(found.pairs[step * case.pairs : (step + 1) * case.pairs], policy, budget):
                ref_logps = _ref_logps(batch.pairs, policy.num_members, policy.device)
                with policy.members():
                    repeated = batch.repeat(policy.num_members)
                    loss, _ = policy.loss(repeated, ref_logps, method, num_pairs=case.pairs)
                    loss.backward()
            optimizer.step(step)
        policy.model.eval()
        yield time.perf_counter() - start


def _trl(case: Case) -> Iterator[float]:
    """TRL trains in its own loop, on a thread of its own; a callback holds it at every block."""
    import queue
    import threading

    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

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

    model = transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.model)
    peft = None
    if case.members:
        from peft import LoraConfig

        peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out:
        args = DPOConfig(
            output_dir=out,
            per_device_train_batch_size=case.pairs,
            max_steps=case.num_blocks * case.steps,
            learning_rate=1e-5,
            beta=0.1,
            max_length=None,
            precompute_ref_log_probs=case.who == "trl-precomputed",
            gradient_checkpointing=False,
            disable_dropout=True,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(_texts(case)),
            processing_class=tokenizer,
            peft_config=peft,
            callbacks=[Gate()],
        )
        thread = threading.Thread(target=trainer.train, daemon=True)
        thread.start()
        yield 0.0
        for _ in range(case.num_blocks):
            begun.put(None)
            yield ended.get()
        thread.join()


def _texts(case: Case) -> list[dict[str, str]]:
    """Rows of random words, one token each; TRL adds the EOS, so completions have one word less."""
    import random

    draw = random.Random(0)

    def words(num: int) -> str:
        return " ".join(f"w{draw.randrange(20000)}" for _ in range(num))

    return [
        {
            "prompt": words(case.prompt_tokens),
            "chosen": " " + words(case.completion_tokens - 1),
            "rejected": " " + words(case.completion_tokens - 1),
        }
        for _ in range(case.num_blocks * case.steps * case.pairs)
    ]


def _make_model(options: StepOptions, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(options.vocab - 3)}
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
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        num_key_value_heads=max(1, options.hidden // 64),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['prompt_tokens']}/{row['completion_tokens']} {row['form']}: ours {row['ours']['pairs_per_s']:.2f}"]
    for key, value in row.items():
        kind, _, peer = key.partition("/")
        if kind == "speedup":
            parts.append(f"{peer} {row[peer]['pairs_per_s']:.2f} ({value:.1f}x, memory {row[f'memory/{peer}']:.2f})")
    return ", ".join(parts) + " pairs/s"


def _resident_kib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1024


def _machine() -> dict[str, Any]:
    from bpo_fast.doctor import environment

    return environment() | {"platform": platform.platform()}


def _main(arguments: Sequence[str]) -> None:
    _work(Case(**json.loads(arguments[0])))


if __name__ == "__main__":
    _main(sys.argv[1:])
