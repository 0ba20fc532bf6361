"""`bpo-fast sample`: completions of a model to the prompts of a data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpo_fast import config as configs
from bpo_fast import prompts as data
from bpo_fast.config import Config
from bpo_fast.engine import Engine, SamplingParams
from bpo_fast.evaluate import prompt_tokens, sample_share, whole
from bpo_fast.files import check_writable, write_atomic
from bpo_fast.progress import Progress
from bpo_fast.ranks import HOST, Ranks, started
from bpo_fast.setup import devices_of
from bpo_fast.source import load_source, resolved
from bpo_fast.tasks import get_task
from bpo_fast.types import Completion, Prompt


def sample(config: Config, source: str, out: Path, *, n: int, temperature: float) -> None:
    """Writes one row a completion: {"prompt", "completion", "label", "truncated", "num_tokens"}.

    Args:
        config: data, lengths, engine, seed, devices; see `source.base_config`.
        source: a run folder, a checkpoint, a model or adapter folder, or a Hub id.
        out: JSONL to write, all or nothing.
        n: completions a prompt.
        temperature: 0 is greedy.

    Raises:
        ValueError: bad model or data, by name, or an `out` that is there already.
        OSError: `out` cannot be written.
    """
    if out.exists():
        raise ValueError(f"--out {out}: already there")
    check_writable(out)
    config = resolved(config, source)
    options: dict[str, Any] = {"source": source, "n": n, "temperature": temperature}
    job = {"name": "sample", "config": configs.to_flat(config)} | options
    with Progress() as progress, started(devices_of(config), job) as ranks:
        owners, completions = sample_rank(config, ranks, progress, **options)
    lines = [
        {
            "prompt": prompt.asked,
            "completion": completion.text.strip(),
            "label": prompt.label,
            "truncated": completion.truncated,
            "num_tokens": len(completion.ids),
        }
        for prompt, completion in zip(owners, completions, strict=True)
    ]
    write_atomic(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def sample_rank(
    config: Config, ranks: Ranks, progress: Progress, *, source: str, n: int, temperature: float
) -> tuple[list[Prompt], list[Completion]]:
    """What every process of `sample` does: the completions of all prompts, each with its prompt."""
    assert config.sampling.max_new_tokens, "resolve() has set it"
    where = str(config.data.path)
    rows = data.read_rows(where, config.data.split)
    ranks.connect(HOST)
    policy, engine = load_source(source, config, progress.print)
    found = data.load_prompts(rows, config.data, get_task(config.task), policy.tokenizer, source=where, seed=None)
    progress.print(f"{where}: {found.words(config.data.max_prompt_length)}")
    params = SamplingParams(
        max_new_tokens=config.sampling.max_new_tokens, n=n, temperature=temperature, stop=config.sampling.stop or ()
    )
    owners, completions = sample_all(
        engine, found.prompts, params, ranks, progress, title="sampling", run_seed=config.run.seed
    )
    if missing := n * len(found.prompts) - len(completions):
        progress.print(f"left out: {missing} completions that the engine gave up")
    return owners, completions


def sample_all(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    ranks: Ranks,
    progress: Progress,
    *,
    title: str,
    run_seed: int,
) -> tuple[list[Prompt], list[Completion]]:
    """The completions of a policy that does not train, each with its prompt, without those that the engine gave up.

    Args:
        engine: of this rank; it is closed.
        prompts: of all ranks, which take their shares.
        params: how to sample.
        ranks: that all call this.
        progress: where progress is shown, this rank's.
        title: of the progress.
        run_seed: of the draws.
    """
    ranks.check_alike("sampling.engine", engine.name)
    share = ranks.share(prompts, prompt_tokens)
    engine.refresh(0)
    with progress.task(title, params.n * len(share.mine)) as task:
        sampled = sample_share(
            engine,
            share,
            params,
            run_seed=run_seed,
            policy_version=0,
            on_done=lambda done: task.advance(len(done)),
        )
    engine.close()
    return whole(prompts, sampled)
