"""`bpo-fast bench sampling`: vLLM on the trainer's weights against generate of transformers, same model and prompts.

Every form of training runs in a process of its own (a process has one vLLM): correctness first, then the engines take
turns on the same requests, with the lengths that the policy gives them. `python -m bpo_fast_bench.sampling --help`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from bpo_fast import config as configs
from bpo_fast import prompts as data
from bpo_fast.config import Config
from bpo_fast.doctor import environment
from bpo_fast.engine import Engine, SamplingParams
from bpo_fast.engine.hf import HfEngine
from bpo_fast.loading import pick_device
from bpo_fast.policy import Policy
from bpo_fast.setup import load_learner
from bpo_fast.tasks import get_task, resolve
from bpo_fast.types import Prompt

FORMS: dict[str, dict[str, Any]] = {
    "full": {"model.full": True},
    "full, two copies": {"model.full": True},
    "lora, merged": {"model.members": 5, "sampling.merge_lora": True},
    "lora, in place": {"model.members": 5, "sampling.merge_lora": False},
}
TWO_COPIES = "full, two copies"  # the baseline of peak memory: what everyone else does


@dataclass(frozen=True)
class SamplingBench:
    """What to measure.

    Attributes:
        model: policy folder.
        data: prompts, as `data.path`.
        forms: of FORMS.
        num_prompts: two completions of each are sampled.
        max_new_tokens: limit of a completion.
        lora_r: rank of one of five members.
        rounds: turns of both engines.
        threads: of torch; 0 leaves it alone.
        device: of both engines.
        json_path: where the measurements go.
    """

    model: str
    data: str
    forms: tuple[str, ...] = tuple(FORMS)
    num_prompts: int = 128
    max_new_tokens: int = 64
    lora_r: int = 16
    rounds: int = 5
    threads: int = 0
    device: str = "auto"
    json_path: str | None = "bench/results/sampling-cpu.json"


def run(options: SamplingBench) -> dict[str, Any]:
    """Measures every form in a fresh process and writes the JSON; returns what it holds.

    Raises:
        RuntimeError: the engines do not agree, or a process failed.
    """
    results = {}
    for form in options.forms:
        single = replace(options, forms=(form,), json_path=None)
        command = [sys.executable, "-m", "bpo_fast_bench.sampling", "--one", json.dumps(asdict(single))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"bench sampling, {form}: the process failed")
        results[form] = json.loads(done.stdout.splitlines()[-1])
    out = {"options": asdict(options), "environment": environment(), "forms": results}
    if options.json_path:
        Path(options.json_path).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json_path).write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")
    return out


def table(results: dict[str, Any]) -> str:
    """The measurements as text, one line a form."""
    lines = [f"{'form':<18} {'vllm':>9} {'hf':>9}  ratio  (CPU)  start   refresh    copied  weights   peak"]
    for form, r in results["forms"].items():
        lines.append(
            f"{form:<18} {r['vllm']['tokens_per_s']:>7.0f}/s {r['hf']['tokens_per_s']:>7.0f}/s {r['ratio']:>5.2f}x"
            f" {r['ratio_cpu']:>5.2f}x {r['start_s']:>5.1f} s {1e3 * r['refresh_s']:>6.2f} ms"
            f" {r['bytes_copied'] / 2**20:>5.1f} MiB {r['weight_bytes'] / 2**20:>5.1f} MiB {r['peak_gib']:>5.2f} GiB"
        )
    return "\n".join(lines)


def measure(options: SamplingBench) -> dict[str, Any]:
    """One form in this process."""
    [form] = options.forms
    if options.threads:
        torch.set_num_threads(options.threads)
    config = _config(options, form)
    device = pick_device("run.device", config.run.device)
    assert config.data.max_prompt_length, "resolve() has set it"
    max_length = config.data.max_prompt_length + options.max_new_tokens
    start = time.perf_counter()
    with mock.patch("bpo_fast.engine.session.find_views", _refuse) if form == TWO_COPIES else nullcontext():
        policy, engine = load_learner(config, device, max_length, lambda line: None)
    engine.refresh(0)
    start_s = time.perf_counter() - start
    by_hf = HfEngine(
        policy.model,
        policy.tokenizer,
        behavior=policy.merged,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        batch_size=config.sampling.batch_size,
    )
    _train_a_step(policy)
    engine.refresh(1)
    prompts = _prompts(config, policy)[: options.num_prompts]
    agreement = _check(engine, by_hf, prompts[:16])
    timings = {"vllm": _Timings(), "hf": _Timings()}
    params = SamplingParams(max_new_tokens=options.max_new_tokens, n=2)
    for turn in range(options.rounds + 1):
        for name, sampler in (("vllm", engine), ("hf", by_hf)):
            timings[name].add(sampler, prompts, params, turn)
    refreshes = [_refresh(engine) for _ in range(5)]
    vllm, hf = (timings[name].summary() for name in ("vllm", "hf"))
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in (*policy.model.parameters(), *engine._session.module.parameters())
    }
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else _peak_rss_gib()
    out = {"start_s": start_s, "vllm": vllm, "hf": hf, "ratio": vllm["tokens_per_s"] / hf["tokens_per_s"]}
    out |= {"ratio_cpu": vllm["tokens_per_cpu_s"] / hf["tokens_per_cpu_s"], "greedy_agreement": agreement}
    out |= {"refresh_s": median(refreshes), "bytes_copied": engine.last_refresh.bytes_copied}
    out |= {"probe_mean": engine.last_refresh.probe.mean, "weight_bytes": sum(storages.values()), "peak_gib": peak}
    engine.close()
    return out


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


def _config(options: SamplingBench, form: str) -> Config:
    knobs = {
        "model.path": options.model,
        "model.lora_r": options.lora_r,
        "data.path": options.data,
        "sampling.engine": "vllm",
        "sampling.max_new_tokens": options.max_new_tokens,
        "run.device": options.device,
    }
    return resolve(configs.load(None, knobs | FORMS[form]))


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


def _check(engine: Engine, by_hf: Engine, prompts: list[Prompt]) -> float:
    """Share of prompts with the same greedy tokens; below 0.9 the engines do not compute the same."""
    params = SamplingParams(max_new_tokens=32, temperature=0.0)
    ours, theirs = (e.generate(prompts, params, run_seed=0, policy_version=1) for e in (engine, by_hf))
    share = sum(a[0].ids == b[0].ids for a, b in zip(ours, theirs, strict=True)) / len(prompts)
    if share < 0.9:
        raise RuntimeError(f"greedy tokens of the engines agree on {share:.0%} of {len(prompts)} prompts only")
    return share


def _refresh(engine) -> float:
    engine.refresh(1)
    return engine.last_refresh.seconds


def _refuse(*args: Any) -> None:
    from bpo_fast.engine.shared_weights import NotShareableError

    raise NotShareableError("the baseline keeps two copies")


def _peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--rounds", type=int, default=SamplingBench.rounds)
    parser.add_argument("--prompts", type=int, default=SamplingBench.num_prompts)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", default=SamplingBench.json_path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        one = json.loads(flags.one)
        print(json.dumps(measure(SamplingBench(**one | {"forms": tuple(one["forms"])}))))
        return
    if not flags.model or not flags.data:
        parser.error("--model and --data are required")
    options = SamplingBench(
        model=flags.model,
        data=flags.data,
        rounds=flags.rounds,
        num_prompts=flags.prompts,
        threads=flags.threads,
        json_path=flags.json,
    )
    print(table(run(options)))


if __name__ == "__main__":
    main()
