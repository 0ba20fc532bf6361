"""`bpo-fast bench loop`: whole online phases (sample, score, train), ours against TRL's OnlineDPOTrainer, in one run.

Same model, prompts, reward function, lengths and optimizer; both sample from the transformers model and its KV cache. A
block is one phase: ours samples its prompts in one call and takes its steps on them; TRL samples anew at every step.
Ours is measured as it is by default, with `method.ref_logps = sampler`, which needs no reference pass, and where all
weights are trained with `optim.states = 8bit`. Longer phases, as those of a run with F = 2, sample more rows at once;
TRL samples at every step whatever their length.
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo_fast_bench.contenders import (
    FORMS,
    LENGTHS,
    LORA_RANK,
    Case,
    Options,
    Work,
    compare,
    measure,
    now,
    run_rows,
    serve,
    trl_blocks,
)
from bpo_fast_bench.shapes import words

PEERS = ("trl",)
OURS = {"ours": {}, "ours by sampler": {"method.ref_logps": "sampler"}, "ours in 8 bits": {"optim.states": "8bit"}}
OF_FULL = {"ours in 8 bits"}  # LoRA's moments are small


@dataclass(frozen=True)
class LoopOptions(Options):
    """`steps` are the optimizer steps of a phase."""

    lengths: tuple[str, ...] = ("tldr", "helpfulness")
    forms: tuple[str, ...] = ("full", "lora")
    peers: tuple[str, ...] = PEERS
    steps: int = 4
    rounds: int = 3


def run(options: LoopOptions, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Measures every case; see `run_rows`."""
    known = {"lengths": tuple(LENGTHS), "forms": tuple(FORMS), "peers": PEERS}
    return run_rows(options, known, [[form] for form in options.forms], _measure, say)


def _measure(options: LoopOptions, lengths: str, forms: Sequence[str], folder: str) -> list[dict[str, Any]]:
    (form,) = forms
    contenders, ours = {}, [who for who in OURS if form == "full" or who not in OF_FULL]
    for who in (*ours, *options.peers):
        members = FORMS[form] if who in OURS else min(1, FORMS[form])
        contenders[who] = options.contender("loop", who, lengths, members, folder)
    found = measure(contenders, options.rounds)
    rows, steps = [], {} if options.steps == LoopOptions.steps else {"steps": options.steps}
    for who in ours:
        name = options.row_form(form, **steps, **{knob.partition(".")[2]: value for knob, value in OURS[who].items()})
        rows.append(compare(found, who, options.peers, runs=max(1, FORMS[form]), lengths=lengths, form=name))
    return rows


def reward(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
) -> list[float | None]:
    """The reward of both: the mean token id, which no two random completions share."""
    return [sum(ids) / max(1, len(ids)) for ids in completion_ids]


def _ours(case: Case) -> Iterator[Any]:
    """The loop of `bpo-fast train`, a phase a block, without checkpoints, evaluation and its estimate of the KL."""
    from bpo_fast import config as configs
    from bpo_fast.loop import Loop
    from bpo_fast.progress import Progress
    from bpo_fast.run import open_run
    from bpo_fast.setup import build
    from bpo_fast.tasks import resolve

    num_steps = case.num_blocks * case.steps
    with tempfile.TemporaryDirectory() as out, Progress(quiet=True) as progress:
        rows = Path(out) / "prompts.jsonl"
        rows.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in _prompts(case)), encoding="utf-8")
        settings = {
            "model.path": case.model,
            "model.full": case.members == 0,
            "model.members": max(1, case.members),
            "model.lora_r": LORA_RANK,
            "data.path": str(rows),
            "data.max_prompt_length": case.prompt_tokens + 8,  # the task ends prompts with a word of its own
            "sampling.engine": "hf",
            "sampling.max_new_tokens": case.completion_tokens,
            "sampling.stop": (),  # TRL looks for none
            "annotator.path": "bpo_fast_bench.loop:reward",
            "method.pairs": num_steps * case.pairs,
            "method.batch_pairs": case.pairs,
            "method.phases": case.num_blocks,
            "optim.learning_rate": 1e-5,
            "eval.prompts": 0,
            "eval.kl_prompts": 0,
            "run.device": case.device,
            "model.dtype": case.dtype,
            "run.output_dir": f"{out}/run",
            "run.save_steps": 10 * num_steps,
        } | OURS[case.who]
        parts = build(resolve(configs.replace(configs.Config(), settings)), progress)
        _, run = open_run(parts.config, resume=None, command=[])
        loop = Loop(parts, run, progress)
        yield Work()
        for phase in loop.remaining_phases():
            start = now(case.device)
            found = loop.collect(phase)
            for step, pairs in loop.remaining_steps(phase, found):
                loop.step(step, pairs)
            seconds = now(case.device) - start
            assert len(found.pairs) == case.steps * case.pairs, "no ties among random completions"
            yield seconds


def _trl(case: Case) -> Iterator[Any]:
    from datasets import Dataset
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    def make_trainer(settings: dict[str, Any], **parts: Any) -> Any:
        length = case.prompt_tokens + case.completion_tokens
        sampling = {"max_new_tokens": case.completion_tokens, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        settings = settings | {"beta": 0.1}  # TRL's types know it as a list only
        args = OnlineDPOConfig(**settings, **sampling, disable_dropout=True, max_length=length)
        rows = Dataset.from_list([{"prompt": p} for p in _prompts(case)])
        return OnlineDPOTrainer(args=args, train_dataset=rows, reward_funcs=reward, **parts)

    return trl_blocks(case, make_trainer)


def _prompts(case: Case) -> list[str]:
    draw = random.Random(0)
    return [words(draw, case.prompt_tokens) for _ in range(case.num_blocks * case.steps * case.pairs)]


if __name__ == "__main__":
    CASE = Case(**json.loads(sys.argv[1]))
    serve(CASE, _ours(CASE) if CASE.who in OURS else _trl(CASE))
