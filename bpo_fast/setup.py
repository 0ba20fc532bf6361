"""Builds what the loop works with from a resolved configuration."""

import gc
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from bpo_fast import prompts as data
from bpo_fast.annotate import Checked, check_annotator, judge_name, load_annotator
from bpo_fast.config import Config
from bpo_fast.engine import Engine, versions
from bpo_fast.engine.hf import HfEngine
from bpo_fast.loading import num_embeddings, pick_device
from bpo_fast.memory import Ledger, make_ledger, token_budget
from bpo_fast.optim import Optimizer
from bpo_fast.pairs import PairCounts, replay_pairs
from bpo_fast.plan import Plan, make_plan
from bpo_fast.policy import Policy, load_policy, load_tokenizer
from bpo_fast.progress import Progress
from bpo_fast.ranks import Devices, Ranks
from bpo_fast.reference import Reference
from bpo_fast.run_folder import pairs_words
from bpo_fast.sampler_reference import check_settings as check_sampler_reference
from bpo_fast.tasks import get_task
from bpo_fast.types import Pair, Prompt


@dataclass(frozen=True)
class Work:
    """What there is to do in one run.

    Attributes:
        plan: phases and steps.
        prompts: the budget, in order; spare: what is left over; held_out: for evaluation.
        replayed: pairs to train on instead of sampling, or None.
        not_replayed: counts of recorded pairs that were left out or cut.
    """

    plan: Plan
    prompts: tuple[Prompt, ...]
    spare: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    replayed: tuple[Pair, ...] | None
    not_replayed: PairCounts

    @cached_property
    def digest(self) -> str:
        """Of its prompts and recorded pairs: what a run that goes on must find again."""
        # not their ids: a chat template may write the date
        prompts = [(p.id, p.asked, p.label) for p in (*self.prompts, *self.spare, *self.held_out)]
        pairs = [(p.chosen.ids, p.rejected.ids) for p in self.replayed or ()]
        return hashlib.sha256(repr((prompts, pairs)).encode()).hexdigest()


@dataclass(frozen=True)
class Parts:
    """What one run works with.

    Attributes:
        config: resolved, with the budget as the data allow.
        work: what there is to do.
        policy, engine, reference, optimizer: the learner.
        annotator: None when pairs are replayed.
        judges: of the evaluation.
    """

    config: Config
    work: Work
    policy: Policy
    engine: Engine
    reference: Reference
    optimizer: Optimizer
    annotator: Checked | None
    judges: tuple[Checked, ...]

    def ledger(self) -> Ledger:
        """What a step will take; see `make_ledger`."""
        own = self.reference.num_bytes
        return make_ledger(self.config, self.policy, self.optimizer, self.engine, reference_bytes=own)


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
    max_length = config.max_length
    if config.optim.offload and device.type == "cpu":
        raise ValueError("optim.offload = true: on a CPU the moments are in host memory already")
    check_sampler_reference(config, from_pairs)
    annotator, judges = _annotator(config) if from_pairs is None else None, judge_specs(config)
    evaluates = config.eval.prompts and config.data.eval_path
    for spec in dict.fromkeys((annotator, *(judges if evaluates else ()))):
        if spec is not None:
            check_scorer(spec, config)
    work = _to_sample(config, load_tokenizer(config.model)[0], progress) if from_pairs is None else None
    # what can be said without weights has been said: they take a while, and so does the start of an engine
    policy, engine = load_learner(config, device, max_length, progress.print)
    token_budget(config, policy)  # or a pair would not fit it
    work = work or _to_replay(config, policy, str(from_pairs), progress)
    reference = Reference(policy, config.method, config.model, max_length=max_length)
    members, num_steps = policy.num_members if policy.lora else None, work.plan.num_steps
    optimizer = Optimizer(policy.parameters(), config.optim, num_steps=num_steps, num_members=members, ranks=ranks)
    scoring = _share_requests(config)
    return Parts(
        config=replace(
            config,
            method=replace(config.method, pairs=work.plan.num_prompts),
            sampling=replace(config.sampling, engine=engine.name),  # a resumed run draws with the same one
        ),
        work=work,
        policy=policy,
        engine=engine,
        reference=reference,
        optimizer=optimizer,
        annotator=None if annotator is None else load_scorer(annotator, scoring, device),
        judges=tuple(load_scorer(j, scoring, device) for j in judges) if work.held_out else (),
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

    Returns:
        (policy, engine), which may share their weights.

    Raises:
        ValueError: the model cannot be loaded, or vLLM is asked for and cannot run it here.
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


def _annotator(config: Config) -> str:
    if config.annotator.path is None:
        raise ValueError("annotator.path: no annotator; name a reward model, module:function or file with --annotator")
    return config.annotator.path


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


def _to_sample(config: Config, tokenizer: Any, progress: Progress) -> Work:
    """Work on the budget's prompts; what is left over is spare."""
    usable, budget = train_prompts(config, tokenizer, progress), config.method.pairs
    assert budget, "resolve() has set it"
    if len(usable) < budget:
        progress.print(f"data has {len(usable)} usable prompts: method.pairs is {len(usable)}, not {budget}")
    plan = make_plan(config.method, min(budget, len(usable)))
    held_out = held_out_prompts(config, tokenizer, usable, progress) if judge_specs(config) else ()
    if held_out and not config.eval.judges:
        progress.print("judge: the annotator itself, so a win rate says how well it was pleased; --judge names another")
    return Work(plan, usable[:budget], usable[budget:], held_out, None, PairCounts())


def _to_replay(config: Config, policy: Policy, source: str, progress: Progress) -> Work:
    """Work on recorded pairs, within the budget."""
    recorded, not_replayed = _replayed(config, policy, source, progress)
    replayed = tuple(recorded[: config.method.pairs])
    prompts = tuple(p.prompt for p in replayed)
    plan = make_plan(config.method, len(replayed))
    held_out = held_out_prompts(config, policy.tokenizer, prompts, progress) if judge_specs(config) else ()
    return Work(plan, prompts, (), held_out, replayed, not_replayed)


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
        policy.eos_ids,
        data=config.data,
        max_new_tokens=config.sampling.max_new_tokens,
        to_prompts=to_prompts,
    )
    progress.print(f"recorded pairs: {pairs_words({k: n for k, n in vars(counts).items() if n})}")
    num_rows = num_embeddings(policy.model)
    for pair in pairs:
        last = max(*pair.prompt.ids, *pair.chosen.ids, *pair.rejected.ids)
        if last >= num_rows:
            raise ValueError(
                f"--from-pairs {source}: token id {last} of prompt {pair.prompt.id}: the model has {num_rows} rows"
            )
    return pairs, replace(counts, kept=0, truncated=0)
