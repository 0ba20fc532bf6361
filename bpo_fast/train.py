"""The loop: `run_rank()` reads as Algorithm 1 of BPO (Xu et al., EMNLP 2024).

Every phase freezes the policy as the behavior, samples two completions a prompt from it, lets the annotator order them,
and takes K = T / F optimizer steps against the behavior's own log-probs. Start reading here; the parts of the loop are
in loop.py.
"""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bpo_fast import config as configs
from bpo_fast import report
from bpo_fast.config import Config
from bpo_fast.files import check_writable
from bpo_fast.loop import Loop
from bpo_fast.metrics import check_trackers
from bpo_fast.progress import Progress
from bpo_fast.ranks import Ranks, started
from bpo_fast.run import Run, check_free, check_same, open_run
from bpo_fast.setup import build, devices_of
from bpo_fast.tasks import resolve


def train(
    config: Config, *, resume: Path | None = None, from_pairs: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Trains a policy online from preferences.

    Args:
        config: settings; knobs left open are filled in from the task.
        resume: folder of a run to go on with; on a CPU it ends as if it had never stopped.
        from_pairs: a run folder or preference rows to train on instead of sampling.
        quiet: print nothing.

    Returns:
        What summary.json holds: win rates before and after, counts, seconds.

    Raises:
        ValueError: bad settings or data, by name: before the run folder is made where that can be known.
        OSError: the run folder cannot be written.
        RuntimeError: the loss stayed NaN or infinite for `optim.max_bad_steps` steps.
        KeyboardInterrupt: after a checkpoint was written, if there was a run to write one of.
    """
    config = resolve(config)
    check_trackers(config.run.report_to)
    if resume is None:
        if config.run.output_dir:
            check_free(Path(config.run.output_dir))
        check_writable(Path(config.run.output_dir or "runs") / "config.toml")
    else:
        left_open = {"method.pairs", "sampling.engine"} if config.sampling.engine == "auto" else {"method.pairs"}
        check_same(config, resume, but=left_open)  # these are settled, and checked, with the data and the model
    options = {"resume": str(resume) if resume else None, "from_pairs": from_pairs}
    job = {"name": "train", "config": configs.to_flat(config)} | options
    with Progress(quiet=quiet) as progress, started(devices_of(config), job) as ranks:
        run, summary = run_rank(config, ranks, progress, **options)
    if not quiet and not run.was_finished:
        console = Console()
        report.print_summary(summary, console)
        report.print_examples(run.read_eval(), console)
        console.print(f"report: {run.path / 'report.html'}", soft_wrap=True, highlight=False)
    return summary


def run_rank(
    config: Config, ranks: Ranks, progress: Progress, *, resume: str | None, from_pairs: str | None
) -> tuple[Run, dict[str, Any]]:
    """What every process of a run does; rank 0 writes it down.

    Args:
        config: resolved settings.
        ranks: of the run.
        progress: where progress is shown.
        resume, from_pairs: as `train` takes them; a path is text.

    Returns:
        (the run, what summary.json holds)
    """
    parts = build(config, progress, from_pairs=from_pairs, ranks=ranks)
    ranks.connect(parts.policy.device)
    ranks.check_alike("sampling.engine", parts.engine.name)
    shares = "shared prompts" if parts.policy.shares_prompts else "the model's own"  # by which pairs are dealt
    ranks.check_alike("model.attn_implementation", shares)
    config, run = open_run(parts.config, resume=Path(resume) if resume else None, command=sys.argv, ranks=ranks)
    if run.was_finished:
        progress.print(f"{run.path}: this run has finished")
        if ranks.is_main and not (run.path / report.REPORT_FILE).exists():  # killed when all else was done
            report.write_report(run.path)
        return run, run.read_summary() or {}
    loop = Loop(replace(parts, config=config), run, progress, ranks)
    with run.interruptible() if ranks.is_main else nullcontext():
        try:
            if not progress.quiet:
                loop.print_memory()
            loop.evaluate("before")
            for phase in loop.remaining_phases():
                found = loop.collect(phase)  # the behavior: the average of the members as they are now
                for step, pairs in loop.remaining_steps(phase, found):
                    loop.step(step, pairs)
                loop.end_phase(phase, found)
            loop.evaluate("after")
            ranks.wait()  # for rank 0 to have had what it saves of the others
            return run, loop.finish()
        except KeyboardInterrupt:
            loop.save()
            progress.print(f"interrupted at step {loop.num_steps}; go on with --resume {run.path}")
            raise
        finally:
            loop.close()
