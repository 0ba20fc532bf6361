"""`bpo-fast bench`: the measurements as commands; what they measure is in bpo_fast_bench."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bpo_fast.cli_errors import reports_errors

bench = typer.Typer(help="Measure: correctness first, interleaved, medians.", no_args_is_help=True)


@bench.command("kernels")
@reports_errors
def bench_kernels(
    op: Annotated[list[str] | None, typer.Option(help="forward, step, behavior, pair_loss; all by default")] = None,
    head: Annotated[list[str] | None, typer.Option(help="frozen, trained; both by default")] = None,
    shapes: Annotated[list[str] | None, typer.Option(help="rows x hidden x vocabulary, as 1024x256x32000")] = None,
    peers: Annotated[str, typer.Option(help="auto: whatever of torch.compile, Liger and CCE is here; none")] = "auto",
    tile: Annotated[list[str] | None, typer.Option(help="of Plan A on a GPU beside its own, as 128x256x64x4")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16; the device's by default")] = None,
    data: Annotated[str, typer.Option(help="peaked or gauss")] = "peaked",
    json_path: Annotated[Path | None, typer.Option("--json", help="where the measurements go")] = None,
    plot: Annotated[Path | None, typer.Option(help="figure without suffix; PNG and SVG are written")] = None,
    static: Annotated[bool, typer.Option("--static", help="compile the Triton kernels ahead of time; no GPU")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="one small shape: a check, no measurement")] = False,
) -> None:
    """Time the fused operators against plain PyTorch and their peers."""
    from bpo_fast_bench.kernels import KernelBench, parse_shape, run, table

    given: dict[str, Any] = {"ops": tuple(op or ()), "heads": tuple(head or ()), "dtypes": tuple(dtype or ())}
    if peers != "auto":
        given["peers"] = () if peers == "none" else tuple(peers.split(","))
    options = KernelBench(
        **{name: value for name, value in given.items() if value or name == "peers"},
        shapes=tuple(parse_shape(text) for text in shapes or ()),
        tiles=tuple(tile or ()),
        data=data,
        json_path=json_path,
        plot_path=plot,
        static=static,
        quick=quick,
    )
    print(table(run(options)))


@bench.command("sampling")
@reports_errors
def bench_sampling(
    model: Annotated[str | None, typer.Option(help="policy folder; none: the embedded one")] = None,
    data: Annotated[str | None, typer.Option(help="prompts; none: the embedded ones")] = None,
    form: Annotated[list[str] | None, typer.Option(help="such as 'full' or 'lora 5, merged'; all by default")] = None,
    rounds: Annotated[int, typer.Option(help="turns of both engines", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves them alone", min=0)] = 0,
    json_path: Annotated[str | None, typer.Option("--json", help="where the measurements go")] = None,
) -> None:
    """Time engine vllm against engine hf on the same model, prompts and lengths."""
    from bpo_fast_bench.sampling import FORMS, SamplingBench, run, table

    forms = tuple(form or FORMS)
    options = SamplingBench(model, data, forms, rounds=rounds, threads=threads, json_path=json_path)
    print(table(run(options)))


@bench.command("step")
@reports_errors
def bench_step(
    peers: Annotated[str, typer.Option(help="trl (in the step and precomputed reference), or none")] = "trl",
    lengths: Annotated[list[str] | None, typer.Option(help="tldr, helpfulness, long; all by default")] = None,
    form: Annotated[list[str] | None, typer.Option(help="full, lora, lora5; all by default")] = None,
    rounds: Annotated[int, typer.Option(help="blocks of each contender", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of each contender", min=1)] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="measurements; rows are added")] = None,
) -> None:
    """Time one optimizer step on preference pairs against TRL's DPOTrainer."""
    from bpo_fast_bench.step import PEERS, StepOptions, run

    names = {"trl": PEERS, "none": ()}.get(peers, (peers,))
    run(_bench_options(StepOptions, names, lengths, form, rounds=rounds, threads=threads, out=json_path))


@bench.command("loop")
@reports_errors
def bench_loop(
    peers: Annotated[str, typer.Option(help="trl, or none")] = "trl",
    lengths: Annotated[list[str] | None, typer.Option(help="tldr, helpfulness, long; the first two by default")] = None,
    form: Annotated[list[str] | None, typer.Option(help="full, lora, lora5; the first two by default")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps of a phase", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="phases of each contender", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of each contender", min=1)] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="measurements; rows are added")] = None,
) -> None:
    """Time whole online phases (sample, score, train) against TRL's OnlineDPOTrainer."""
    from bpo_fast_bench.loop import PEERS, LoopOptions, run

    names = {"trl": PEERS, "none": ()}.get(peers, (peers,))
    run(_bench_options(LoopOptions, names, lengths, form, steps=steps, rounds=rounds, threads=threads, out=json_path))


def _bench_options(options: Any, peers: tuple[str, ...], lengths: Any, forms: Any, *, out: Any, **others: Any) -> Any:
    given = {"lengths": tuple(lengths or ()), "forms": tuple(forms or ())}
    given = {name: value for name, value in given.items() if value}
    return options(peers=peers, out=str(out) if out else None, **given, **others)


@bench.command("study")
@reports_errors
def bench_study(
    out: Annotated[Path, typer.Option("--out", help="folder of the runs")] = Path("sweeps/helpdesk"),
    results: Annotated[Path, typer.Option(help="folder of the numbers and figures")] = Path("bench/results/helpdesk"),
    jobs: Annotated[int, typer.Option("--jobs", help="processes, one thread each", min=1)] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs")] = False,
) -> None:
    """Make the study of the embedded help desk, or go on with it."""
    from bpo_fast_bench.study import StudyOptions, run, table

    found = run(StudyOptions(out=out, results=results, jobs=jobs, dry_run=dry_run))
    if found is not None:
        print(table(found))
