"""`bpo-fast bench sampling`: vLLM on the trainer's weights against engine hf and transformers' own `generate`.

Every form of training runs in a process of its own (a process has one vLLM): correctness first, then the engines take
turns on the same requests, with the lengths that the policy gives them. Memory and refresh are measured on a random
model that is large enough to see a copy of the weights.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import transformers

from bpo_fast import config as configs
from bpo_fast import prompts as data
from bpo_fast.annotate import Checked
from bpo_fast.config import Config
from bpo_fast.doctor import environment
from bpo_fast.engine import Engine, SamplingParams
from bpo_fast.engine.hf import HfEngine
from bpo_fast.files import write_atomic
from bpo_fast.loading import pick_device
from bpo_fast.policy import Policy
from bpo_fast.sampler_reference import logp_differences
from bpo_fast.scoring import PairScorer
from bpo_fast.setup import load_learner
from bpo_fast.tasks import ASSETS, get_task, resolve
from bpo_fast.types import Completion, Pair, Prompt
from bpo_fast_bench.contenders import check_dtype

FORMS: dict[str, dict[str, Any]] = {
    "full": {"model.full": True},
    "lora 1, merged": {"model.members": 1, "sampling.merge_lora": True},
    "lora 1, in place": {"model.members": 1, "sampling.merge_lora": False},
    "lora 5, merged": {"model.members": 5, "sampling.merge_lora": True},
    "lora 5, in place": {"model.members": 5, "sampling.merge_lora": False},
    "lora 5, single": {"model.members": 5, "sampling.members": "single"},
}
# Below it the engines do not compute the same. Roundings of 16 bits part some of 32 greedy tokens; the probe of every
# refresh compares log-probs.
LEAST_AGREEMENT = {torch.float32: 0.9, torch.bfloat16: 0.25, torch.float16: 0.25}
NUM_COMPARED = 64  # prompts
TWO_COPIES = "full, two copies"  # the baseline of memory: what everyone else does
MEMORY_FORMS: dict[str, dict[str, Any]] = {name: {"model.full": True} for name in ("full", TWO_COPIES)}


@dataclass(frozen=True)
class SamplingBench:
    """What to measure.

    Attributes:
        model: policy folder; None: the embedded one.
        data: prompts, as `data.path`; None: the embedded ones.
        forms: of FORMS.
        memory_hidden: hidden size of the model that memory is measured on, 12 layers; 0 leaves memory out.
        num_prompts: two completions of each are sampled.
        max_new_tokens: limit of a completion.
        lora_r: rank of one of five members.
        rounds: turns of both engines.
        threads: of torch; 0 leaves it alone.
        device: of both engines.
        dtype: of the weights, float32 or bfloat16; None: float32 on a CPU, bfloat16 on a GPU.
        json_path: where the measurements go.
    """

    model: str | None = None
    data: str | None = None
    forms: tuple[str, ...] = tuple(FORMS)
    memory_hidden: int = 768
    num_prompts: int = 128
    max_new_tokens: int = 64
    lora_r: int = 16
    rounds: int = 5
    threads: int = 0
    device: str = "auto"
    dtype: str | None = None
    json_path: str | None = None


def run(options: SamplingBench) -> dict[str, Any]:
    """Measures every form in a fresh process and writes each to the JSON; returns what it holds.

    Raises:
        ValueError: an unknown form or type.
        RuntimeError: the engines do not agree, or a process failed.
    """
    unknown = [form for form in options.forms if form not in FORMS]
    if unknown:
        raise ValueError(f"bench.form = {unknown[0]}: not one of {'; '.join(FORMS)}")
    check_dtype(options.dtype)
    given = {name: value for name, value in asdict(options).items() if name != "json_path"}
    out = {"options": given, "environment": environment(sys.argv), "forms": {}, "memory": {}}

    def keep(kind: str, form: str, found: dict[str, Any]) -> None:
        out[kind][form] = found
        if options.json_path:
            write_atomic(Path(options.json_path), json.dumps(out, indent=2) + "\n")

    for form in options.forms:
        keep("forms", form, _in_a_process(replace(options, forms=(form,), memory_hidden=0)))
    if options.memory_hidden:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), options.memory_hidden)
            for form in MEMORY_FORMS:
                keep("memory", form, _in_a_process(replace(options, model=folder, forms=(form,))))
    return out


def table(results: dict[str, Any]) -> str:
    """The measurements as text, one line a form."""
    heading = f"{'tokens a second':<18} {'vllm':>6} {'hf':>12} {'generate':>14}   start    refresh      copied"
    lines = [f"{heading}   off by, vllm    hf   as hf's, vllm  generate"]
    overlap = ""
    for form, r in results["forms"].items():
        lines.append(
            f"{form:<18} {r['vllm']['tokens_per_s']:>6.0f}"
            f" {r['hf']['tokens_per_s']:>6.0f} {r['against_hf']:>4.2f}x"
            f" {r['generate']['tokens_per_s']:>8.0f} {r['against_generate']:>4.2f}x"
            f" {r['start_s']:>5.1f} s {1e3 * r['refresh_s']:>7.2f} ms"
            f" {r['bytes_copied'] / 2**20:>6.1f} MiB"
            f" {r['logp_difference']['vllm']['mean']:>12.1e} {r['logp_difference']['hf']['mean']:>8.1e}"
            f" {r['greedy_agreement']['vllm']:>13.0%} {r['greedy_agreement']['generate']:>9.0%}"
        )
        if "overlap" in r:
            o = r["overlap"]
            overlap = (
                f"\nannotator overlap, {o['num_pairs']} pairs, a service of {o['service_s']:.2f} s: sampling alone"
                f" {o['sampling_s']:.2f} s, then scoring {o['in_turn_s']:.2f} s, at once {o['overlapped_s']:.2f} s"
            )
    lines.append("off by: from the trainer's log-probs, nats a token; as hf's: prompts with the same greedy tokens")
    lines += [overlap] if overlap else []
    if results["memory"]:
        lines.append(f"\n{'memory':<18} {'weights':>11} {'resident':>10} {'peak':>10}    refresh     copied")
    for form, r in results["memory"].items():
        lines.append(
            f"{form:<18} {r['weight_bytes'] / 2**20:>7.0f} MiB {r['resident_gib']:>6.2f} GiB {r['peak_gib']:>6.2f} GiB"
            f" {1e3 * r['refresh_s']:>7.2f} ms {r['bytes_copied'] / 2**20:>6.1f} MiB"
        )
    return "\n".join(lines)


def _in_a_process(options: SamplingBench) -> dict[str, Any]:
    command = [sys.executable, "-m", "bpo_fast_bench.sampling", json.dumps(asdict(options))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench sampling, {options.forms[0]}: the process failed")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: SamplingBench) -> dict[str, Any]:
    """One form in this process: speed of the engines in turn."""
    [form] = options.forms
    config, policy, engine, start_s = _open(options, FORMS[form])
    by_hf, by_generate = (kind.of(policy, config.sampling.batch_size) for kind in (HfEngine, GenerateEngine))
    _train_a_step(policy)
    engine.refresh(1)
    prompts = _prompts(config, policy)[: options.num_prompts]
    samplers = {"vllm": engine, "hf": by_hf, "generate": by_generate}
    some, dtype = prompts[:NUM_COMPARED], policy.model.dtype
    agreement = {name: _agreement(samplers[name], by_hf, some, dtype) for name in ("vllm", "generate")}
    differences = {name: _logp_difference(samplers[name], policy, some) for name in ("vllm", "hf")}
    timings = {name: _Timings() for name in samplers}
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        n=2,
        stop=config.sampling.stop or (),
        single_members=config.sampling.members == "single",
    )
    for turn in range(options.rounds + 1):
        for name, sampler in samplers.items():
            timings[name].add(sampler, prompts, params, turn)
    speeds = {name: timing.summary() for name, timing in timings.items()}
    vllm = speeds["vllm"]
    out = {"start_s": start_s, **speeds, "greedy_agreement": agreement, "logp_difference": differences}
    for name in ("hf", "generate"):
        out[f"against_{name}"] = vllm["tokens_per_s"] / speeds[name]["tokens_per_s"]
    out["against_hf_cpu"] = vllm["tokens_per_cpu_s"] / speeds["hf"]["tokens_per_cpu_s"]
    out |= _refreshes(engine)
    if form == "full":
        out["overlap"] = _overlap(engine, _prompts(config, policy)[: 4 * options.num_prompts], params)
    engine.close()
    return out


def measure_memory(options: SamplingBench) -> dict[str, Any]:
    """One form in this process: what the weights take, with one copy of them or with two."""
    [form] = options.forms
    with mock.patch("bpo_fast.engine.held.find_views", _refuse) if form == TWO_COPIES else nullcontext():
        _, policy, engine, _ = _open(options, MEMORY_FORMS[form])
    prompts = [Prompt(i, "", (5, 6, 7 + i)) for i in range(4)]
    engine.generate(prompts, SamplingParams(max_new_tokens=8), run_seed=0, policy_version=0)
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in (*policy.model.parameters(), *engine._session.held.module.parameters())
    }
    on_gpu = policy.device.type == "cuda"
    out = _refreshes(engine) | {
        "weight_bytes": sum(storages.values()),
        "resident_gib": torch.cuda.memory_allocated() / 2**30 if on_gpu else _resident_gib(),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else _peak_rss_gib(),
    }
    engine.close()
    return out


def write_model(folder: Path, hidden: int) -> None:
    """A random Llama of 12 layers with the embedded tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "policy")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=12,
        num_attention_heads=hidden // 64,
        head_dim=64,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _open(options: SamplingBench, form: dict[str, Any]) -> tuple[Config, Policy, Any, float]:
    """Settings, policy and engine of a form, and the seconds that opening took (vLLM imported before)."""
    import bpo_fast.engine.vllm  # noqa: F401

    if options.threads:
        torch.set_num_threads(options.threads)
    config = _config(options, form)
    assert config.data.max_prompt_length, "resolve() has set it"
    max_length = config.data.max_prompt_length + options.max_new_tokens
    start = time.perf_counter()
    policy, engine = load_learner(config, pick_device("run.device", config.run.device), max_length, lambda line: None)
    start_s = time.perf_counter() - start
    engine.refresh(0)
    return config, policy, engine, start_s


class GenerateEngine(HfEngine):
    """Engine hf with transformers' `generate` in place of its own loop, as other trainers sample; seeds are torch's."""

    def _decode(self, requests, params, stop):
        longest = max(len(r.prompt.ids) for r in requests)
        padding = [longest - len(r.prompt.ids) for r in requests]
        rows = [[self._pad_id] * n + list(r.prompt.ids) for n, r in zip(padding, requests, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        ways = {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        sampled = self._model.generate(
            input_ids=torch.tensor(rows, device=self._model.device),
            attention_mask=torch.tensor(mask, device=self._model.device),
            max_new_tokens=params.max_new_tokens,
            eos_token_id=list(self._eos_ids),
            pad_token_id=self._pad_id,
            **(ways if params.temperature else {"do_sample": False}),
        )
        completions = []
        for ids in sampled[:, longest:].tolist():
            end = next((i + 1 for i, token in enumerate(ids) if token in self._eos_ids), len(ids))
            completions.append((tuple(ids[:end]), None))
        return completions


class _Timings:
    """Turns of one engine; the first is a warm-up."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, float, float]] = []
        self._lengths: list[int] = []

    def add(self, engine: Engine, prompts: list[Prompt], params: SamplingParams, turn: int) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        sampled = engine.generate(prompts, params, run_seed=turn, policy_version=1)
        self._lengths = [len(c.ids) for both in sampled for c in both]
        self._rows.append((sum(self._lengths), time.perf_counter() - start, time.process_time() - cpu))

    def summary(self) -> dict[str, float]:
        rows = self._rows[1:]
        return {
            "tokens_per_s": median(tokens / seconds for tokens, seconds, _ in rows),
            "tokens_per_cpu_s": median(tokens / max(1e-9, cpu) for tokens, _, cpu in rows),
            "seconds": median(seconds for _, seconds, _ in rows),
            "mean_length": sum(self._lengths) / len(self._lengths),
            "max_length": max(self._lengths),
        }


def _config(options: SamplingBench, form: dict[str, Any]) -> Config:
    knobs = {
        "model.path": options.model,
        "model.lora_r": options.lora_r,
        "data.path": options.data or str(ASSETS / "prompts.jsonl"),
        "sampling.engine": "vllm",
        "sampling.max_new_tokens": options.max_new_tokens,
        "run.device": options.device,
        "model.dtype": options.dtype or "auto",
    }
    return resolve(configs.load(None, knobs | form))


def _prompts(config: Config, policy: Policy) -> list[Prompt]:
    source = str(config.data.path)
    rows = data.read_rows(source, config.data.split)
    found = data.load_prompts(rows, config.data, get_task(config.task), policy.tokenizer, source=source, seed=0)
    return list(found.prompts)


def _train_a_step(policy: Policy) -> None:
    """An update in place, so that what is timed is not the policy of the file."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))


def _agreement(engine: Engine, by_hf: Engine, prompts: list[Prompt], dtype: torch.dtype) -> float:
    """Share of prompts with the same greedy tokens, too small a one raises RuntimeError."""
    params = SamplingParams(max_new_tokens=32, temperature=0.0)
    ours, theirs = (e.generate(prompts, params, run_seed=0, policy_version=1) for e in (engine, by_hf))
    share = sum(a[0].ids == b[0].ids for a, b in zip(ours, theirs, strict=True)) / len(prompts)
    if share < LEAST_AGREEMENT[dtype]:
        raise RuntimeError(f"greedy tokens of the engines agree on {share:.0%} of {len(prompts)} prompts only")
    return share


def _logp_difference(engine: Engine, policy: Policy, prompts: list[Prompt]) -> dict[str, float]:
    """How far a sampler's log-probs of what it draws are from the trainer's, in nats a token."""
    params = SamplingParams(max_new_tokens=32, n=2, logps=True)
    sampled = engine.generate(prompts, params, run_seed=0, policy_version=1)
    pairs = [Pair(p, *both, chosen_score=1.0, rejected_score=0.0) for p, both in zip(prompts, sampled, strict=True)]
    difference = logp_differences(pairs, policy, 4096)
    return {"mean": float(difference.mean()), "max": float(difference.max())}


def _refreshes(engine: Any) -> dict[str, Any]:
    """Median of five, without the probe."""
    seconds = []
    for _ in range(5):
        engine.refresh(1)
        seconds.append(engine.last_refresh.seconds)
    last = engine.last_refresh
    return {"refresh_s": median(seconds), "bytes_copied": last.bytes_copied, "probe_mean": last.probe.mean}


def _overlap(engine: Any, prompts: list[Prompt], params: SamplingParams) -> dict[str, float]:
    """Seconds to sample and score pairs with a service that takes 5 ms a pair: in turn, and at the same time."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    found, rollout = [], []
    for turn in range(3):
        for overlap in seconds:
            start = time.perf_counter()
            with PairScorer(Checked("service", _SlowService()), prompts, overlap=overlap) as scorer:
                engine.generate(prompts, params, run_seed=turn, policy_version=1, on_done=scorer.add)
                rollout.append(time.perf_counter() - start)
                found.append(scorer.scores())
            seconds[overlap].append(time.perf_counter() - start)
        if found[-1] != found[-2]:
            raise RuntimeError("scores depend on the overlap")
    out = {"num_pairs": len(prompts), "service_s": 0.005 * len(prompts), "sampling_s": median(rollout[::2])}
    return out | {"in_turn_s": median(seconds[False]), "overlapped_s": median(seconds[True])}


class _SlowService:
    """Stands in for a judge behind a network."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        time.sleep(0.0025 * len(completions))
        return [sum(c.ids) % 97 for c in completions]


def _refuse(*args: Any) -> None:
    from bpo_fast.engine.shared_weights import NotShareableError

    raise NotShareableError("the baseline keeps two copies")


def _resident_gib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**30


def _peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    ONE = SamplingBench(**given | {"forms": tuple(given["forms"])})
    print(json.dumps(measure_memory(ONE) if ONE.memory_hidden else measure(ONE)))
