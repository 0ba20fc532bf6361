"""`bpo-fast sample`: completions of a model to the prompts of a data set."""

import json
from pathlib import Path

from bpo_fast import prompts as data
from bpo_fast.config import Config
from bpo_fast.engine import SamplingParams
from bpo_fast.evaluate import whole
from bpo_fast.files import write_atomic
from bpo_fast.progress import Progress
from bpo_fast.source import load_source, resolved
from bpo_fast.tasks import get_task


def sample(config: Config, source: str, out: Path, *, n: int, temperature: float) -> None:
    """Writes one row a completion: {"prompt", "completion", "label", "truncated", "num_tokens"}.

    Args:
        config: data, lengths, engine, seed; see `source.base_config`.
        source: a run folder, a checkpoint, a model or adapter folder, or a Hub id.
        out: JSONL to write, all or nothing.
        n: completions a prompt.
        temperature: 0 is greedy.

    Raises:
        ValueError: bad model or data, by name, or an `out` that is there already.
    """
    if out.exists():
        raise ValueError(f"--out {out}: already there")
    config = resolved(config, source)
    assert config.sampling.max_new_tokens, "resolve() has set it"
    where = str(config.data.path)
    with Progress() as progress:
        rows = data.read_rows(where, config.data.split)
        policy, engine = load_source(source, config, progress.print)
        found = data.load_prompts(rows, config.data, get_task(config.task), policy.tokenizer, source=where, seed=None)
        progress.print(f"{where}: {found.words(config.data.max_prompt_length)}")
        prompts = found.prompts
        params = SamplingParams(
            max_new_tokens=config.sampling.max_new_tokens,
            n=n,
            temperature=temperature,
            stop=config.sampling.stop or (),
        )
        engine.refresh(0)
        with progress.task("sampling", n * len(prompts)) as task:
            sampled = engine.generate(
                prompts,
                params,
                run_seed=config.run.seed,
                policy_version=0,
                on_done=lambda done: task.advance(len(done)),
            )
        engine.close()
        owners, completions = whole(prompts, sampled)
        if len(completions) < n * len(prompts):
            progress.print(f"left out: {n * len(prompts) - len(completions)} completions that the engine gave up")
    lines = [
        {
            "prompt": prompt.text,
            "completion": completion.text.strip(),
            "label": prompt.label,
            "truncated": completion.truncated,
            "num_tokens": len(completion.ids),
        }
        for prompt, completion in zip(owners, completions, strict=True)
    ]
    write_atomic(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
