"""`bpo-fast bench`: the measurements as commands; what they measure is in bpo_fast_bench."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bpo_fast.cli_errors import reports_errors

SHAPES_HELP = (
    "rows x hidden x vocabulary, as 1024x256x32000; for attention alone prompt x completion x heads, "
    "for linear alone rows x width x outputs, for norm, gate and adamw alone rows x width"
)
bench = typer.Typer(help="Measure: correctness first, interleaved, medians.", no_args_is_help=True)


@bench.command("kernels")
@reports_errors
def bench_kernels(
    op: Annotated[
        list[str] | None,
        typer.Option(
            help="forward, step, behavior, draw, pair_loss, attention, linear, norm, gate, adamw; all if none"
        ),
    ] = None,
    head: Annotated[list[str] | None, typer.Option(help="frozen, trained; both by default")] = None,
    shapes: Annotated[list[str] | None, typer.Option(help=SHAPES_HELP)] = None,
    peers: Annotated[
        str, typer.Option(help="auto: whatever of torch.compile, Liger, CCE and verl is here; none")
    ] = "auto",
    tile: Annotated[
        list[str] | None,
        typer.Option(help="of Plan A on a GPU beside its own, as 128x256x64x4, 128x256x64x4p, 128x128x64x3w4"),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16; the device's by default")] = None,
    data: Annotated[str, typer.Option(help="peaked or gauss")] = "peaked",
    json_path: Annotated[Path | None, typer.Option("--json", help="where the measurements go")] = None,
    plot: Annotated[Path | None, typer.Option(help="figure without suffix; PNG and SVG are written")] = None,
    static: Annotated[bool, typer.Option("--static", help="compile the Triton kernels ahead of time; no GPU")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="one small shape: a check, no measurement")] = False,
) -> None:
    """Time the fused operators against plain PyTorch and their peers."""
    from bpo_fast_bench.kernels import KernelBench, check_ours, parse_shape, run, table

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
    record = run(options)
    print(table(record))
    check_ours(record)


DEVICE = typer.Option(help="auto, cpu or cuda")
SHAPE = typer.Option(help="toy, 0.5b, 1.5b or HIDDENxLAYERSxVOCABULARY; toy on a CPU, 0.5b on a GPU by default")
DTYPE = typer.Option(help="float32 or bfloat16, of all contenders; float32 on a CPU, bfloat16 on a GPU by default")
PAIRS = typer.Option(help="pairs an optimizer step; 8 on a CPU, 16 on a GPU by default", min=1)
PEERS = typer.Option(help="trl, none, or auto: trl if it is installed")
FIRST_LENGTHS = typer.Option(help="tldr, helpfulness, long; the first two by default")
BLOCKS = typer.Option(help="blocks of each contender", min=1)
THREADS = typer.Option(help="CPU threads of each contender", min=1)
ROWS = typer.Option("--json", help="measurements; rows are added")


@bench.command("sampling")
@reports_errors
def bench_sampling(
    model: Annotated[str | None, typer.Option(help="policy folder; none: the embedded one")] = None,
    data: Annotated[str | None, typer.Option(help="prompts; none: the embedded ones")] = None,
    form: Annotated[list[str] | None, typer.Option(help="such as 'full' or 'lora 5, merged'; all by default")] = None,
    prompts: Annotated[int, typer.Option(help="two completions of each are sampled", min=1)] = 128,
    rounds: Annotated[int, typer.Option(help="turns of both engines", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves them alone", min=0)] = 0,
    dtype: Annotated[str | None, DTYPE] = None,
    memory_hidden: Annotated[
        int, typer.Option(help="hidden size of the model that memory is measured on; 0: no memory", min=0)
    ] = 768,
    json_path: Annotated[str | None, typer.Option("--json", help="where the measurements go")] = None,
) -> None:
    """Time engine vllm against engine hf on the same model, prompts and lengths."""
    from bpo_fast_bench.sampling import FORMS, SamplingBench, run, table

    options = SamplingBench(
        model,
        data,
        tuple(form or FORMS),
        num_prompts=prompts,
        rounds=rounds,
        threads=threads,
        memory_hidden=memory_hidden,
        dtype=dtype,
        json_path=json_path,
    )
    print(table(run(options)))


@bench.command("step")
@reports_errors
def bench_step(
    peers: Annotated[str, PEERS] = "auto",
    lengths: Annotated[list[str] | None, typer.Option(help="tldr, helpfulness, long; all by default")] = None,
    form: Annotated[list[str] | None, typer.Option(help="full, lora, lora5; all by default")] = None,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str | None, DTYPE] = None,
    shape: Annotated[str | None, SHAPE] = None,
    pairs: Annotated[int | None, PAIRS] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="ours with a compiled trunk beside ours")] = False,
    rounds: Annotated[int, BLOCKS] = 5,
    threads: Annotated[int, THREADS] = 2,
    json_path: Annotated[Path | None, ROWS] = None,
) -> None:
    """Time one optimizer step on preference pairs against TRL's DPOTrainer."""
    from bpo_fast_bench.step import PEERS, StepOptions, run

    options = {"device": device, "dtype": dtype, "pairs": pairs, "rounds": rounds, "threads": threads}
    options |= {"compiled": compiled}
    run(_bench_options(StepOptions, PEERS, peers, lengths, form, shape, json_path, options))


@bench.command("loop")
@reports_errors
def bench_loop(
    peers: Annotated[str, PEERS] = "auto",
    lengths: Annotated[list[str] | None, FIRST_LENGTHS] = None,
    form: Annotated[list[str] | None, typer.Option(help="full, lora, lora5; the first two by default")] = None,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str | None, DTYPE] = None,
    shape: Annotated[str | None, SHAPE] = None,
    pairs: Annotated[int | None, PAIRS] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps of a phase", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="phases of each contender", min=1)] = 3,
    threads: Annotated[int, THREADS] = 2,
    json_path: Annotated[Path | None, ROWS] = None,
) -> None:
    """Time whole online phases (sample, score, train) against TRL's OnlineDPOTrainer."""
    from bpo_fast_bench.loop import PEERS, LoopOptions, run

    options = {"device": device, "dtype": dtype, "pairs": pairs, "steps": steps, "rounds": rounds, "threads": threads}
    run(_bench_options(LoopOptions, PEERS, peers, lengths, form, shape, json_path, options))


@bench.command("stages")
@reports_errors
def bench_stages(
    peers: Annotated[str, PEERS] = "auto",
    lengths: Annotated[list[str] | None, FIRST_LENGTHS] = None,
    form: Annotated[list[str] | None, typer.Option(help="sft, sft-lora, reward; all by default")] = None,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str | None, DTYPE] = None,
    shape: Annotated[str | None, SHAPE] = None,
    pairs: Annotated[int | None, PAIRS] = None,
    rounds: Annotated[int, BLOCKS] = 5,
    threads: Annotated[int, THREADS] = 2,
    json_path: Annotated[Path | None, ROWS] = None,
) -> None:
    """Time a step of SFT and of a reward model against TRL's SFTTrainer and RewardTrainer."""
    from bpo_fast_bench.stages import PEERS, StageOptions, run

    options = {"device": device, "dtype": dtype, "pairs": pairs, "rounds": rounds, "threads": threads}
    run(_bench_options(StageOptions, PEERS, peers, lengths, form, shape, json_path, options))


def _bench_options(
    options: Any, known: tuple[str, ...], peers: str, lengths: Any, forms: Any, shape: str | None, out: Any, others: Any
) -> Any:
    from bpo_fast_bench.contenders import pick_peers
    from bpo_fast_bench.shapes import parse_shape

    given: dict[str, Any] = {"lengths": tuple(lengths or ()), "forms": tuple(forms or ())}
    given = {name: value for name, value in given.items() if value}
    if shape:
        given["shape"] = parse_shape(shape)
    return options(peers=pick_peers(peers, known), out=str(out) if out else None, **given, **others)


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
