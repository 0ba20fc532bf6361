"""Builds what the loop works with from a resolved configuration."""

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bpo_fast import prompts as data
from bpo_fast.annotate import Checked, check_annotator, judge_name, load_annotator
from bpo_fast.config import Config
from bpo_fast.engine import Engine, versions
from bpo_fast.engine.hf import HfEngine
from bpo_fast.loading import pick_device
from bpo_fast.memory import token_budget
from bpo_fast.optim import Optimizer
from bpo_fast.pairs import PairCounts, replay_pairs
from bpo_fast.plan import Plan, make_plan
from bpo_fast.policy import Policy, load_policy
from bpo_fast.progress import Progress
from bpo_fast.ranks import Devices, Ranks
from bpo_fast.reference import Reference
from bpo_fast.run_folder import pairs_words
from bpo_fast.sampler_reference import check_settings as check_sampler_reference
from bpo_fast.tasks import get_task
from bpo_fast.types import Pair, Prompt


@dataclass(frozen=True)
class Parts:
    """What one run works with.

    Attributes:
        config: resolved, with the budget as the data allow.
        plan: phases and steps.
        policy, engine, reference, optimizer: the learner.
        annotator: None when pairs are replayed.
        judges: of the evaluation.
        prompts: the budget, in order; spare: what is left over; held_out: for evaluation.
        replayed: pairs to train on instead of sampling, or None.
        not_replayed: counts of recorded pairs that were left out or cut.
    """

    config: Config
    plan: Plan
    policy: Policy
    engine: Engine
    reference: Reference
    optimizer: Optimizer
    annotator: Checked | None
    judges: tuple[Checked, ...]
    prompts: tuple[Prompt, ...]
    spare: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    replayed: tuple[Pair, ...] | None
    not_replayed: PairCounts


def build(config: Config, progress: Progress, *, from_pairs: str | None = None, ranks: Ranks | None = None) -> Parts:
    """Loads models and data and lays out the run.

    Args:
        config: resolved settings.
        progress: for one line on each thing that was left out.
        from_pairs: recorded pairs to replay instead of sampling.
        ranks: of the run.

    Raises:
        ValueError: whatever a user can have got wrong, by name.
    """
    device = pick_device("run.device", config.run.device)
    assert config.sampling.max_new_tokens, "resolve() has set it"
    assert config.data.max_prompt_length, "resolve() has set it"
    max_length = config.data.max_prompt_length + config.sampling.max_new_tokens
    if config.optim.offload and device.type == "cpu":
        raise ValueError("optim.offload = true: on a CPU the moments are in host memory already")
    check_sampler_reference(config, from_pairs)
    policy, engine = load_learner(config, device, max_length, progress.print)
    token_budget(config, policy)  # or a pair would not fit it
    budget = config.method.pairs
    assert budget, "resolve() has set it"
    if from_pairs is None:
        usable = train_prompts(config, policy.tokenizer, progress)
        replayed, not_replayed = None, PairCounts()
        num_pairs = min(budget, len(usable))
        if num_pairs < budget:
            progress.print(f"data has {len(usable)} usable prompts: method.pairs is {num_pairs}, not {budget}")
    else:
        recorded, not_replayed = _replayed(config, policy, from_pairs, progress)
        replayed = tuple(recorded[:budget])
        usable = tuple(p.prompt for p in replayed)
        num_pairs = len(replayed)
    plan = make_plan(config.method, num_pairs)
    reference = Reference(policy, config.method, config.model, max_length=max_length)
    members = policy.num_members if policy.lora else None
    optimizer = Optimizer(policy.parameters(), config.optim, num_steps=plan.num_steps, num_members=members, ranks=ranks)
    judges, scoring = judge_specs(config), _share_requests(config)
    held_out = held_out_prompts(config, policy.tokenizer, usable, progress) if judges else ()
    if held_out and not config.eval.judges and replayed is None:
        progress.print("judge: the annotator itself, so a win rate says how well it was pleased; --judge names another")
    return Parts(
        config=replace(
            config,
            method=replace(config.method, pairs=num_pairs),
            sampling=replace(config.sampling, engine=engine.name),  # a resumed run draws with the same one
        ),
        plan=plan,
        policy=policy,
        engine=engine,
        reference=reference,
        optimizer=optimizer,
        annotator=None if replayed is not None else _annotator(scoring, device),
        judges=tuple(load_scorer(j, scoring, device) for j in judges) if held_out else (),
        prompts=usable[:num_pairs],
        spare=usable[num_pairs:] if replayed is None else (),
        held_out=held_out,
        replayed=replayed,
        not_replayed=not_replayed,
    )


def devices_of(config: Config) -> Devices:
    """Those that share a run; ValueError if settings forbid several."""
    if config.run.devices > 1 and config.sampling.tensor_parallel > 1:
        other = f"sampling.tensor_parallel = {config.sampling.tensor_parallel}"
        raise ValueError(f"run.devices = {config.run.devices}: not with {other}")
    return Devices(config.run.devices, config.run.device, "run")


def load_learner(
    config: Config, device: torch.device, max_length: int, say: Callable[[str], None]
) -> tuple[Policy, Engine]:
    """The policy and the engine that samples from it.

    Args:
        config: resolved settings; engine auto is vllm wherever a tested version is installed and runs the model.
        device: of both.
        max_length: longest prompt plus completion in tokens.
        say: told in one line which engine it is.
    """
    wanted = config.sampling.engine
    reason = versions.trouble() if wanted == "auto" else None
    if wanted != "hf" and reason is None:
        versions.require()
        try:
            return _load_on_vllm(config, device, max_length, say)
        except versions.UnusableError as error:
            if wanted == "vllm":
                raise
            reason = str(error)
        gc.collect()  # a start that failed half-way has a model and a cache, which engine hf needs the memory of
        if device.type == "cuda":
            torch.cuda.empty_cache()
    say(f"sampling: transformers{f' ({reason})' if reason else ''}")
    policy = load_policy(
        config.model,
        device=device,
        seed=config.run.seed,
        temperature=config.sampling.temperature,
        max_length=max_length,
    )
    return policy, HfEngine.of(policy, config.sampling.batch_size)


def _load_on_vllm(config: Config, device: torch.device, max_length: int, say: Callable[[str], None]):
    try:
        # importing vLLM takes seconds and changes the process: only where it is used
        from bpo_fast.engine.vllm import load_learner as load_on_vllm
    except (ImportError, OSError) as error:
        raise versions.unusable("import", error) from error
    return load_on_vllm(config, device, max_length, say)


def _share_requests(config: Config) -> Config:
    """An endpoint sees as many requests at once from several devices as from one."""
    requests = max(1, config.annotator.requests // config.run.devices)
    return replace(config, annotator=replace(config.annotator, requests=requests))


def _annotator(config: Config, device: torch.device) -> Checked:
    if config.annotator.path is None:
        raise ValueError("annotator.path: no annotator; name a reward model, module:function or file with --annotator")
    return load_scorer(config.annotator.path, config, device)


def load_scorer(spec: str, config: Config, device: torch.device) -> Checked:
    """The annotator or judge called `spec`."""
    return load_annotator(spec, config.annotator, device=str(device), trust_remote_code=config.model.trust_remote_code)


def check_scorer(spec: str, config: Config) -> None:
    """Raises what `load_scorer` does, as far as it is known without weights."""
    check_annotator(spec, config.annotator, trust_remote_code=config.model.trust_remote_code)


def judge_specs(config: Config) -> tuple[str, ...]:
    """What `eval.judges` names, else the annotator, if there is one; ValueError if two have one name."""
    judges = config.eval.judges or ((config.annotator.path,) if config.annotator.path else ())
    if len({judge_name(j) for j in judges}) < len(judges):
        raise ValueError(f"eval.judges = {', '.join(judges)}: two have one name; give names, as in --judge NAME=JUDGE")
    return judges


def train_prompts(config: Config, tokenizer: Any, progress: Progress) -> tuple[Prompt, ...]:
    """Every usable prompt of the training data, in the order of the run's seed."""
    source = str(config.data.path)
    found = data.load_prompts(
        data.read_rows(source, config.data.split),
        config.data,
        get_task(config.task),
        tokenizer,
        source=source,
        seed=config.run.seed,
    )
    progress.print(f"training data: {found.words(config.data.max_prompt_length)}")
    return found.prompts


def held_out_prompts(config: Config, tokenizer: Any, train: Sequence[Prompt], progress: Progress) -> tuple[Prompt, ...]:
    """The first `eval.prompts` prompts of the evaluation data that are not among those of the training."""
    source, num_wanted = config.data.eval_path, config.eval.prompts
    if source is None:
        progress.print("evaluation: no held-out data (--eval-data)")
    if not num_wanted or source is None:
        return ()
    found = data.load_prompts(
        data.read_rows(source, config.data.eval_split),
        config.data,
        get_task(config.task),
        tokenizer,
        source=source,
        seed=None,
        exclude=(p.text for p in train),
    )
    progress.print(f"evaluation data: {found.words(config.data.max_prompt_length)}")
    return found.prompts[:num_wanted]


def _replayed(config: Config, policy: Policy, source: str, progress: Progress) -> tuple[list[Pair], PairCounts]:
    """(pairs within the limits, counts of those that were not)"""

    def to_prompts(name: str):
        rows, unlimited = data.read_rows(name, config.data.split), replace(config.data, max_prompt_length=sys.maxsize)
        found = data.load_prompts(
            rows, unlimited, get_task(config.task), policy.tokenizer, source=name, seed=config.run.seed, dedupe=False
        )
        return rows, found.prompts

    assert config.sampling.max_new_tokens, "resolve() has set it"
    pairs, counts = replay_pairs(
        source,
        policy.tokenizer,
        policy.eos_ids[0],
        data=config.data,
        max_new_tokens=config.sampling.max_new_tokens,
        to_prompts=to_prompts,
    )
    progress.print(f"recorded pairs: {pairs_words({k: n for k, n in vars(counts).items() if n})}")
    num_rows = policy.model.get_input_embeddings().weight.shape[0]
    for pair in pairs:
        last = max(*pair.prompt.ids, *pair.chosen.ids, *pair.rejected.ids)
        if last >= num_rows:
            raise ValueError(
                f"--from-pairs {source}: token id {last} of prompt {pair.prompt.id}: the model has {num_rows} rows"
            )
    return pairs, replace(counts, kept=0, truncated=0)
