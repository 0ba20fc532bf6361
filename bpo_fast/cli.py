"""The command line: parse, load the configuration, call one function; torch is imported when a command runs."""

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from bpo_fast import config as configs
from bpo_fast.allocator import keep_freed_memory, keep_less_code
from bpo_fast.cli_bench import bench
from bpo_fast.cli_errors import check_alone, names_output, reports_errors
from bpo_fast.config import KNOBS, Config
from bpo_fast.stage_config import RewardConfig, SftConfig
from bpo_fast.threads import leaves_threads, share_cores

SOURCE_HELP = "run folder, checkpoint, model or adapter folder, Hub id"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `bpo-fast`."""
    share_cores()
    keep_freed_memory()
    keep_less_code()
    with leaves_threads(), names_output():
        app(prog_name="bpo-fast")


def _flag(name: str, knob: str, **extra: Any) -> Any:
    field = KNOBS[knob][0]
    told = field.default not in (None, False, (), dataclasses.MISSING)  # None: the task's own, or nothing
    default = f" (default: {field.default})" if told else ""
    return typer.Option(name, help=escape(_help(field) + default), show_default=False, **extra)


def _help(field: dataclasses.Field) -> str:
    choices = field.metadata["choices"]
    return field.metadata["doc"] + (f" [{'|'.join(choices)}]" if choices else "")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"bpo-fast {metadata.version('bpo-fast')}")
        raise typer.Exit


@app.callback()
def every(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train language models online from preferences, against the behavior policy that sampled the pairs (BPO)."""


@app.command()
@reports_errors
def train(
    task: Annotated[str | None, _flag("--task", "task")] = None,
    model: Annotated[str | None, _flag("--model", "model.path")] = None,
    data: Annotated[str | None, _flag("--data", "data.path")] = None,
    eval_data: Annotated[str | None, _flag("--eval-data", "data.eval_path")] = None,
    annotator: Annotated[str | None, _flag("--annotator", "annotator.path")] = None,
    judge: Annotated[list[str] | None, _flag("--judge", "eval.judges")] = None,
    loss: Annotated[str | None, _flag("--loss", "method.loss")] = None,
    ref: Annotated[str | None, _flag("--ref", "method.ref")] = None,
    ref_logps: Annotated[str | None, _flag("--ref-logps", "method.ref_logps")] = None,
    sampler: Annotated[str | None, _flag("--sampler", "method.sampler")] = None,
    phases: Annotated[str | None, _flag("--phases", "method.phases")] = None,
    pairs: Annotated[str | None, _flag("--pairs", "method.pairs")] = None,
    batch_pairs: Annotated[str | None, _flag("--batch-pairs", "method.batch_pairs")] = None,
    beta: Annotated[str | None, _flag("--beta", "method.beta")] = None,
    lr: Annotated[str | None, _flag("--lr", "optim.learning_rate")] = None,
    members: Annotated[str | None, _flag("--members", "model.members")] = None,
    lora_r: Annotated[str | None, _flag("--lora-r", "model.lora_r")] = None,
    full: Annotated[bool | None, _flag("--full/--lora", "model.full")] = None,
    max_prompt_tokens: Annotated[str | None, _flag("--max-prompt-tokens", "data.max_prompt_length")] = None,
    max_new_tokens: Annotated[str | None, _flag("--max-new-tokens", "sampling.max_new_tokens")] = None,
    engine: Annotated[str | None, _flag("--engine", "sampling.engine")] = None,
    device: Annotated[str | None, _flag("--device", "run.device")] = None,
    devices: Annotated[str | None, _flag("--devices", "run.devices")] = None,
    seed: Annotated[str | None, _flag("--seed", "run.seed")] = None,
    out: Annotated[str | None, _flag("--out", "run.output_dir")] = None,
    save_steps: Annotated[str | None, _flag("--save-steps", "run.save_steps")] = None,
    save_total_limit: Annotated[str | None, _flag("--save-total-limit", "run.save_total_limit")] = None,
    eval_steps: Annotated[str | None, _flag("--eval-steps", "eval.eval_steps")] = None,
    report_to: Annotated[list[str] | None, _flag("--report-to", "run.report_to")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file of settings; flags are stronger")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="any knob, as NAME=VALUE; see bpo-fast knobs")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="go on with the run in this folder")] = None,
    from_pairs: Annotated[
        str | None, typer.Option("--from-pairs", help="train on recorded pairs (a run folder or preference rows)")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="load all, try the longest step, write nothing")] = False,
) -> None:
    """Run the online loop: sample, annotate, train, F times over; then evaluate and write a report."""
    check_alone()
    flags = {
        "task": task,
        "model.path": model,
        "data.path": data,
        "data.eval_path": eval_data,
        "annotator.path": annotator,
        "eval.judges": tuple(judge) if judge else None,
        "method.loss": loss,
        "method.ref": ref,
        "method.ref_logps": ref_logps,
        "method.sampler": sampler,
        "method.phases": phases,
        "method.pairs": pairs,
        "method.batch_pairs": batch_pairs,
        "method.beta": beta,
        "optim.learning_rate": lr,
        "model.members": members,
        "model.lora_r": lora_r,
        "model.full": full,
        "data.max_prompt_length": max_prompt_tokens,
        "sampling.max_new_tokens": max_new_tokens,
        "sampling.engine": engine,
        "run.device": device,
        "run.devices": devices,
        "run.seed": seed,
        "run.output_dir": out,
        "run.save_steps": save_steps,
        "run.save_total_limit": save_total_limit,
        "eval.eval_steps": eval_steps,
        "run.report_to": tuple(report_to) if report_to else None,
    }
    settings = _settings(flags, config, set_ or [], resume)
    _quiet_libraries()
    if dry_run:
        from bpo_fast.dryrun import dry_run as run_dry

        run_dry(settings, from_pairs=from_pairs)
        return
    from bpo_fast.train import train as run_train

    run_train(settings, resume=resume, from_pairs=from_pairs)


@app.command()
@reports_errors
def knobs() -> None:
    """List every setting of `train` with its default and meaning, for --set and --config."""
    defaults = configs.to_flat(Config())
    for name, (field, _) in KNOBS.items():
        print(f"{name} = {defaults[name]}\n    {_help(field)}")


@app.command()
@reports_errors
def doctor() -> None:
    """Say what this machine has, which path each part takes, and what to install."""
    from rich.console import Console

    from bpo_fast.doctor import print_doctor

    print_doctor(Console())


@app.command("eval")
@reports_errors
def evaluate(
    source: Annotated[str | None, typer.Argument(help=SOURCE_HELP, show_default=False)] = None,
    outputs: Annotated[
        str | None, typer.Option("--outputs", help="judge these texts instead: a line a row of the data, or JSONL")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="head to head with another model, run or file of outputs")
    ] = None,
    task: Annotated[str | None, _flag("--task", "task")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="rows to evaluate on; none: the run's or task's own")
    ] = None,
    judge: Annotated[list[str] | None, _flag("--judge", "eval.judges")] = None,
    prompts: Annotated[str | None, _flag("--prompts", "eval.prompts")] = None,
    max_new_tokens: Annotated[str | None, _flag("--max-new-tokens", "sampling.max_new_tokens")] = None,
    max_prompt_tokens: Annotated[str | None, _flag("--max-prompt-tokens", "data.max_prompt_length")] = None,
    engine: Annotated[str | None, _flag("--engine", "sampling.engine")] = None,
    device: Annotated[str | None, _flag("--device", "run.device")] = None,
    devices: Annotated[str | None, _flag("--devices", "run.devices")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="any knob, as NAME=VALUE; see bpo-fast knobs")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder to write; none: evals/<time>-<process>")] = None,
) -> None:
    """Judge greedy answers of a model against the reference text, or two models against each other."""
    check_alone()
    if (source is None) == (outputs is None):
        raise ValueError("eval: name a model or run, or --outputs FILE, and not both")
    if outputs is not None and not Path(outputs).is_file():
        raise ValueError(f"--outputs {outputs}: no such file")
    flags = {
        "task": task,
        "data.eval_path": data,
        "eval.judges": tuple(judge) if judge else None,
        "eval.prompts": prompts,
        "sampling.max_new_tokens": max_new_tokens,
        "data.max_prompt_length": max_prompt_tokens,
        "sampling.engine": engine,
        "run.device": device,
        "run.devices": devices,
    }
    given = configs.parse_assignments(set_ or []) | {k: v for k, v in flags.items() if v is not None}
    _quiet_libraries()
    from rich.console import Console

    from bpo_fast.contest import evaluate as run_evaluate
    from bpo_fast.contest_table import print_evaluation
    from bpo_fast.source import base_config

    settings = configs.replace(base_config(*filter(None, (source, against))), given)
    found = run_evaluate(settings, source or str(outputs), against, out)
    print_evaluation(found, Console())
    print(found["out"])


@app.command()
@reports_errors
def sweep(
    grid: Annotated[str, typer.Argument(help="grid file, or shipped: cpu, frequency, reference, stability, paper")],
    out: Annotated[Path | None, typer.Option("--out", help="folder of the sweep; none: sweeps/<grid>")] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", help="processes, one thread each; 0: a core each on the CPU, else 1", min=0)
    ] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="any knob of every run, as NAME=VALUE")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs and what is done, run nothing")] = False,
) -> None:
    """Make every run of a grid; the same command goes on where it was stopped."""
    from bpo_fast.grid import find_grid, read_grid
    from bpo_fast.progress import Progress
    from bpo_fast.sweep import RESULTS_FILE, Sweep, default_jobs, row_words

    path = find_grid(grid)
    specs = read_grid(path, configs.parse_assignments(set_ or []))
    found = Sweep(specs, out or Path("sweeps") / path.stem)
    if dry_run:
        for spec in specs:
            print(row_words(found.rows[spec.name]) if spec.name in found.rows else spec.name)
        print(f"{len(specs)} runs, {len(found.waiting)} to do")
        return
    with Progress() as progress:
        found.run(jobs or default_jobs(specs), progress)
    print(found.folder / RESULTS_FILE)
    if found.num_failed:
        raise RuntimeError(f"{found.num_failed} of {len(specs)} runs failed; the same command tries them again")


@app.command()
@reports_errors
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, sweep folders or results files")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the report of many runs; none: the sweep's, else report")
    ] = None,
) -> None:
    """Write the report of a run anew, or one page and figures of many runs, and print where it is."""
    if len(runs) == 1 and (runs[0] / "config.toml").is_file() and out is None:
        from bpo_fast.report import write_report

        print(write_report(runs[0]))
        return
    from bpo_fast.sweep_report import write_sweep_report

    own = runs[0] if len(runs) == 1 and runs[0].is_dir() else Path("report")
    print(write_sweep_report(runs, out or own))


@app.command()
@reports_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a run folder or one of its checkpoints")],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    device: Annotated[str, typer.Option("--device", help="where to merge")] = "cpu",
) -> None:
    """Merge a checkpoint into a plain Hugging Face folder, which transformers and vLLM load as it is."""
    from bpo_fast.export import export as run_export

    _quiet_libraries()
    run_export(checkpoint, out, device=device)
    print(out)


@app.command()
@reports_errors
def sample(
    model: Annotated[str, typer.Option("--model", help=SOURCE_HELP)],
    data: Annotated[str, typer.Option("--data", help="prompts: file, folder or Hub id, `name[:n]` for the first n")],
    out: Annotated[Path, typer.Option("--out", help="JSONL to write, a completion a row")],
    task: Annotated[str | None, _flag("--task", "task")] = None,
    n: Annotated[int, typer.Option("--n", help="completions a prompt", min=1)] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy", min=0)] = 1.0,
    max_new_tokens: Annotated[str | None, _flag("--max-new-tokens", "sampling.max_new_tokens")] = None,
    max_prompt_tokens: Annotated[str | None, _flag("--max-prompt-tokens", "data.max_prompt_length")] = None,
    engine: Annotated[str | None, _flag("--engine", "sampling.engine")] = None,
    device: Annotated[str | None, _flag("--device", "run.device")] = None,
    devices: Annotated[str | None, _flag("--devices", "run.devices")] = None,
    seed: Annotated[str | None, _flag("--seed", "run.seed")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="any knob, as NAME=VALUE; see bpo-fast knobs")] = None,
) -> None:
    """Sample completions of a model to prompts; a run's own settings hold where no flag says otherwise."""
    check_alone()
    flags = {
        "task": task,
        "data.path": data,
        "sampling.max_new_tokens": max_new_tokens,
        "data.max_prompt_length": max_prompt_tokens,
        "sampling.engine": engine,
        "run.device": device,
        "run.devices": devices,
        "run.seed": seed,
    }
    given = configs.parse_assignments(set_ or []) | {k: v for k, v in flags.items() if v is not None}
    _quiet_libraries()
    from bpo_fast.sample import sample as run_sample
    from bpo_fast.source import base_config

    run_sample(configs.replace(base_config(model), given), model, out, n=n, temperature=temperature)
    print(out)


def _train_sft(config: SftConfig) -> dict[str, Any]:
    from bpo_fast.sft import train_sft

    return train_sft(config)


def _train_reward(config: RewardConfig) -> dict[str, Any]:
    from bpo_fast.reward import train_reward

    return train_reward(config)


def _stage_command(name: str, config_class: type, run: Callable[[Any], dict[str, Any]], doc: str) -> None:
    """Adds a command with a flag for every field of a settings class."""
    hints = typing.get_type_hints(config_class)

    def command(**values: Any) -> None:
        check_alone()
        settings = config_class(**values)
        _quiet_libraries()
        result = run(settings)
        print(settings.out)
        print(json.dumps({k: v for k, v in result.items() if k not in ("config", "history")}, indent=2))

    options = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=f.default,
            annotation=Annotated[hints[f.name], typer.Option(f"--{f.name.replace('_', '-')}", help=_help(f))],
        )
        for f in dataclasses.fields(config_class)
    ]
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__doc__ = doc
    app.command(name)(reports_errors(command))


_stage_command("sft", SftConfig, _train_sft, "Train a policy on prompt and label rows, from a model or from scratch.")
_stage_command("reward", RewardConfig, _train_reward, "Train a Bradley-Terry reward model on preference rows.")


app.add_typer(bench, name="bench")


def _settings(flags: dict[str, Any], path: Path | None, assignments: list[str], resume: Path | None) -> Config:
    """Defaults, then the file (or the run to resume), then --set, then flags."""
    given = configs.parse_assignments(assignments) | {k: v for k, v in flags.items() if v is not None}
    if resume is None:
        return configs.load(path, given)
    from bpo_fast.run import saved_config

    if path is not None:
        raise ValueError(f"--config {path}: --resume takes its settings from the run")
    saved, out = saved_config(resume), given.get("run.output_dir")
    if out is not None and Path(out).resolve() != resume.resolve():
        raise ValueError(f"run.output_dir = {out}: --resume {resume} goes on in the folder of the run")
    return configs.replace(saved, given)


def _quiet_libraries() -> None:
    """Progress bars and warnings of transformers and of the Hub's client would break ours."""
    import logging

    import huggingface_hub.utils
    import transformers

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
