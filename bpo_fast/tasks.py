"""Task presets: template, lengths, batch and default data of the paper's tasks, and of the embedded world.

Source: the released settings of Xu et al. 2024 (arXiv 2406.12168).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo_fast.config import ON_POLICY, SLICED, Config, SamplingConfig, did_you_mean, read_spec

ASSETS = Path(__file__).parent / "assets"
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Task:
    """What a task fixes unless the user says otherwise.

    Attributes:
        max_prompt_length, max_new_tokens: limits in tokens.
        batch_pairs: pairs an optimizer step.
        pairs: annotation budget in prompts.
        data, eval_data: Hub data sets used when a model but no data is named.
        suffix: what a bare question is closed with to become a prompt.
        stop: where a completion would go on with a turn or a post of its own.
    """

    name: str
    max_prompt_length: int
    max_new_tokens: int
    batch_pairs: int
    pairs: int
    data: str
    eval_data: str
    suffix: str
    stop: tuple[str, ...]


TASKS = {
    t.name: t
    for t in (
        Task(
            "helpfulness",
            64,
            128,
            64,
            10_000,
            "Anthropic/hh-rlhf/helpful-base",
            "Anthropic/hh-rlhf/helpful-base",
            " Assistant:",
            ("\n\nHuman:",),
        ),
        Task("tldr", 512, 128, 16, 10_000, "trl-lib/tldr", "trl-lib/tldr", "\nTL;DR:", ("\nSUBREDDIT:", "\n\nPOST:")),
        Task(
            "harmlessness",
            256,
            128,
            16,
            10_000,
            "Anthropic/hh-rlhf/harmless-base",
            "Anthropic/hh-rlhf/harmless-base",
            " assistant:",
            ("\n\nHuman:", " user:"),
        ),
    )
}


def get_task(name: str) -> Task:
    """The preset called `name`; ValueError with the known names otherwise."""
    if name not in TASKS:
        hint = did_you_mean(name, TASKS) or f"; known: {', '.join(TASKS)}"
        raise ValueError(f"task = {name!r}: no such task{hint}")
    return TASKS[name]


def resolve(config: Config) -> Config:
    """Fills every knob left at None from the task, or from the embedded default where no model is named.

    Raises:
        ValueError: knobs that contradict each other, by name.
    """
    task = get_task(config.task)
    embedded = config.model.path is None
    if embedded and config.task != "helpfulness":
        raise ValueError(f"task = {config.task!r}: only helpfulness has an embedded policy; name one with --model")
    base: dict[str, Any] = {"pairs": task.pairs, "batch_pairs": task.batch_pairs, "r": 256, "eval": 512}
    base |= {"lr": 1e-6 if config.model.full else 5e-5, "new": task.max_new_tokens, "stop": task.stop}
    if embedded:
        config = _embed(config)
        base |= {"pairs": 1024, "batch_pairs": 16, "r": 16, "eval": 128}
        base |= {"lr": 3e-4 if config.model.full else 3e-3, "new": 64, "stop": ()}
    several = config.sampling.tensor_parallel > 1
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, lora_r=config.model.lora_r or base["r"]),
        data=dataclasses.replace(
            config.data,
            path=config.data.path or task.data,
            eval_path=config.data.eval_path or _default_eval(config.data.path, task),
            max_prompt_length=config.data.max_prompt_length or task.max_prompt_length,
        ),
        sampling=dataclasses.replace(
            config.sampling,
            engine="vllm" if several and config.sampling.engine == "auto" else config.sampling.engine,
            max_new_tokens=config.sampling.max_new_tokens or base["new"],
            stop=base["stop"] if config.sampling.stop is None else config.sampling.stop,
        ),
        method=dataclasses.replace(
            config.method,
            pairs=config.method.pairs or base["pairs"],
            batch_pairs=config.method.batch_pairs or base["batch_pairs"],
        ),
        optim=dataclasses.replace(config.optim, learning_rate=config.optim.learning_rate or base["lr"]),
        eval=dataclasses.replace(
            config.eval, prompts=base["eval"] if config.eval.prompts is None else config.eval.prompts
        ),
    )
    _check(config)
    return config


def _embed(config: Config) -> Config:
    """The embedded policy, and with it the rest of its world as far as the user names nothing else."""
    judge = f"rm={ASSETS / 'judge'}"
    data, judges = config.data, (judge,)
    if data.path is None:
        eval_path = data.eval_path or str(ASSETS / "eval.jsonl")
        data = dataclasses.replace(data, path=str(ASSETS / "prompts.jsonl"), eval_path=eval_path)
        judges = ("rubric=bpo_fast.helpdesk:judge", judge)  # the rubric knows the embedded questions only
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(ASSETS / "policy")),
        data=data,
        annotator=dataclasses.replace(config.annotator, path=config.annotator.path or str(ASSETS / "annotator")),
        eval=dataclasses.replace(config.eval, judges=config.eval.judges or judges),
    )


def _default_eval(data: str | None, task: Task) -> str | None:
    """Held-out rows for training data: of the task, of the same Hub data set, or dev.jsonl and the like beside it."""
    if data is None:
        return task.eval_data
    path = Path(read_spec(data, SLICED)["path"])
    if not path.exists():
        return str(path)
    folder = path if path.is_dir() else path.parent
    names = (stem + ending for stem in ("dev", "eval", "test", "validation") for ending in ENDINGS)
    return next((str(folder / n) for n in names if (folder / n).is_file() and folder / n != path), None)


def _check(config: Config) -> None:
    model, method = config.model, config.method
    if isinstance(method.phases, str) and method.phases != ON_POLICY:
        raise ValueError(f"method.phases = {method.phases!r}: a number of phases or {ON_POLICY}")
    if model.full and model.members > 1:
        raise ValueError(f"model.members = {model.members}: an ensemble needs LoRA; full fine-tuning has one member")
    if model.full and model.adapters:
        raise ValueError(f"model.adapters = {', '.join(model.adapters)}: full fine-tuning starts from no adapter")
    if model.compile and model.members > 1:
        raise ValueError(f"model.compile = true: one member only, not model.members = {model.members}")
    if model.adapters and len(model.adapters) != model.members:
        raise ValueError(
            f"model.adapters = {', '.join(model.adapters)}: {len(model.adapters)} for model.members = {model.members}"
        )
    if config.sampling.members == "single" and config.sampling.merge_lora:
        raise ValueError("sampling.merge_lora = true: what is merged is the average, not sampling.members = single")
    if config.sampling.tensor_parallel > 1:
        _check_tensor_parallel(config.sampling)
    if (method.ref == "golden") != (method.golden is not None):
        raise ValueError(f"method.golden = {method.golden!r}: method.ref = golden and method.golden go together")
    if method.label_smoothing and method.loss != "dpo":
        raise ValueError(f"method.label_smoothing = {method.label_smoothing}: only dpo has it, not {method.loss}")


def _check_tensor_parallel(sampling: SamplingConfig) -> None:
    """ValueError for what cannot be sampled from by several processes."""
    for knob, is_set, why in (
        ("sampling.engine = hf", sampling.engine == "hf", "one process; it is vllm that has several"),
        ("sampling.members = single", sampling.members == "single", "copies hold the average only"),
        ("sampling.merge_lora = false", sampling.merge_lora is False, "no member is read in place"),
    ):
        if is_set:
            raise ValueError(f"sampling.tensor_parallel = {sampling.tensor_parallel}: {knob}: {why}")
