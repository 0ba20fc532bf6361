"""Collecting a phase: sample two completions a prompt from the behavior, score them, keep the pairs that differ."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch

from bpo_fast.annotate import Checked
from bpo_fast.batches import TokenBudget
from bpo_fast.config import Config
from bpo_fast.engine import Engine, sampling_params
from bpo_fast.evaluate import prompt_tokens, sample_share, shape
from bpo_fast.gradients import microbatches
from bpo_fast.pairs import PairCounts, PhasePairs, make_pairs
from bpo_fast.plan import Phase, deal
from bpo_fast.policy import Policy
from bpo_fast.progress import Progress
from bpo_fast.ranks import Ranks
from bpo_fast.reference import Reference
from bpo_fast.run import Run
from bpo_fast.scoring import PairScorer
from bpo_fast.types import Completion, Dropped, Pair, Prompt


class Collector:
    """Samples and scores the pairs of a phase.

    Args:
        config: sampling, annotator and seed.
        engine: samples the behavior.
        annotator: scores completions.
        run: its stages are timed: `annotate` is the wait for scores once everything is sampled.
        progress: where progress is shown.
        ranks: that share the prompts.

    Attributes:
        overlapped_s: seconds that the annotator has worked during the sampling of the last phase.
    """

    def __init__(self, config: Config, engine: Engine, annotator: Checked, run: Run, progress: Progress, ranks: Ranks):
        self._config, self._engine, self._annotator = config, engine, annotator
        self._run, self._progress, self._ranks = run, progress, ranks
        self.overlapped_s = 0.0

    def collect(self, phase: Phase, prompts: Sequence[Prompt], spare: Sequence[Prompt], version: int) -> PhasePairs:
        """The pairs of a phase, and, with `annotator.refill`, of spare prompts in place of tied and identical ones.

        Args:
            phase: which phase, for its number.
            prompts: its prompts.
            spare: prompts that no phase owns.
            version: optimizer steps of the weights that sample.
        """
        self.overlapped_s = 0.0
        num_retried = self._engine.num_retried
        pairs, dropped, completions = self._sample(phase, prompts, version)
        num_spare, num_lacking = 0, _num_equal(dropped)
        while self._config.annotator.refill and num_lacking and num_spare < len(spare):
            more = spare[num_spare : num_spare + num_lacking]
            num_spare += len(more)
            new_pairs, new_dropped, new_completions = self._sample(phase, more, version)
            pairs, dropped, completions = pairs + new_pairs, dropped + new_dropped, completions + new_completions
            num_lacking = _num_equal(new_dropped)
        metrics = _completion_metrics([c for c in completions if not c.aborted], pairs)
        metrics["completions/num_retried"] = sum(self._ranks.gather(self._engine.num_retried - num_retried))
        counts = PairCounts.of(pairs, (d.reason for d in dropped))
        return PhasePairs(phase.index, version, tuple(pairs), counts, metrics, num_spare, dropped=tuple(dropped))

    def _sample(self, phase: Phase, prompts: Sequence[Prompt], version: int):
        config, share = self._config, self._ranks.share(prompts, prompt_tokens)
        title, num = f"phase {phase.index + 1}: ", 2 * len(share.mine)
        with PairScorer(self._annotator, share.mine, overlap=config.annotator.overlap) as scorer:
            with self._run.timed("rollout"), self._progress.task(title + "sampling", num) as task:

                def take(done: Sequence[Completion]) -> None:
                    task.advance(len(done))
                    scorer.add(done)

                params, seed = sampling_params(config), config.run.seed
                completions = sample_share(
                    self._engine, share, params, run_seed=seed, policy_version=version, on_done=take
                )
            start = time.perf_counter()
            with self._run.timed("annotate"), self._progress.task(title + "scoring", num) as task:
                scores = scorer.scores()
                all_scores = share.gather([scores[p.id] for p in share.mine])
                task.advance(num)
            self.overlapped_s += max(0.0, scorer.busy_s - (time.perf_counter() - start))
        pairs, dropped = make_pairs(prompts, completions, all_scores)
        return pairs, dropped, [c for both in completions for c in both]


def _num_equal(dropped: Sequence[Dropped]) -> int:
    """How many the annotator had no choice in."""
    return sum(d.reason in ("tied", "identical") for d in dropped)


def with_reference(
    found: PhasePairs,
    num_steps: int,
    policy: Policy,
    reference: Reference,
    budget: TokenBudget,
    *,
    on_done: Callable[[int], None],
    ranks: Ranks | None = None,
) -> PhasePairs:
    """The pairs of a phase with the reference's log-probs, computed once.

    Args:
        found: pairs without them.
        num_steps: optimizer steps of the phase.
        policy: for padding and device.
        reference: scores them.
        budget: of a micro-batch.
        on_done: told how many pairs are done.
        ranks: that share the pairs of every step, as they will in training.
    """

    def score(pairs: Sequence[Pair], tokens: int) -> dict[int, list[float]]:
        scored = {}
        batches = microbatches(pairs, policy, tokens)
        for batch, logps in zip(batches, reference.logps(batches), strict=True):
            for pair, both in zip(batch.pairs, logps.view(2, -1).T.tolist(), strict=True):
                scored[id(pair)] = both
        return scored

    ranks, logps = ranks or Ranks(), []
    for step_pairs in deal(found.pairs, num_steps):
        share = ranks.share(step_pairs, policy.pair_tokens)
        scored = budget.run(partial(score, share.mine))
        logps += share.gather([scored[id(p)] for p in share.mine])
        on_done(len(step_pairs))
    pairs = tuple(replace(p, ref_logps=tuple(both)) for p, both in zip(found.pairs, logps, strict=True))
    return replace(found, pairs=pairs)


@torch.no_grad()
def divergence(pairs: Sequence[Pair], policy: Policy, budget: TokenBudget, *, ref: str) -> dict[str, float]:
    """Monte-Carlo KL of the behavior to the start, in nats a completion, and entropy, in nats a token.

    Both are means over completions that the behavior itself sampled: log p - log p_init, and -log p.

    Args:
        pairs: what to take the means over.
        policy: the behavior and the start.
        budget: of a micro-batch.
        ref: whose log-probs the pairs carry, if any; those of the behavior or the start are not computed again.
    """

    def total(tokens: int, view: Callable[[], AbstractContextManager[None]]) -> float:
        with view():
            return float(sum(policy.logps(b).double().sum() for b in microbatches(pairs, policy, tokens)))

    if not pairs:
        return {}
    known = {ref: math.fsum(logp for p in pairs for logp in p.ref_logps or ())} if pairs[0].ref_logps else {}
    now = known["behavior"] if "behavior" in known else budget.run(partial(total, view=policy.behavior))
    if policy.version == 0:  # the behavior is the start
        start = now
    else:
        start = known["initial"] if "initial" in known else budget.run(partial(total, view=policy.initial))
    num_tokens = sum(len(p.chosen.ids) + len(p.rejected.ids) for p in pairs)
    return {"kl": (now - start) / (2 * len(pairs)), "entropy": -now / num_tokens}


def _completion_metrics(completions: Sequence[Completion], pairs: Sequence[Pair]) -> dict[str, float]:
    lengths = [len(c.ids) for c in completions]
    out = {
        f"completions/{k}": v
        for k, v in shape([c.ids for c in completions], [c.truncated for c in completions]).items()
    }
    out |= {"completions/min_length": min(lengths, default=0), "completions/max_length": max(lengths, default=0)}
    out["completions/num_tokens"] = sum(lengths)
    if pairs:
        out["objective/scores"] = sum(p.chosen_score + p.rejected_score for p in pairs) / (2 * len(pairs))
        out["objective/scores_margin"] = sum(p.chosen_score - p.rejected_score for p in pairs) / len(pairs)
    return out
