"""Log-probs at a temperature other than 1: those of the trainer, or refused."""

import pytest
from tiny_vllm import prompts

from bpo_fast.batches import TokenBudget
from bpo_fast.engine import SamplingParams
from bpo_fast.pairs import PairCounts, PhasePairs
from bpo_fast.sampler_reference import with_sampler_reference
from bpo_fast.types import Pair


def draw(engine, questions, **params):
    params = SamplingParams(16, n=2, temperature=0.7, **params)
    return engine.generate(questions, params, run_seed=1, policy_version=3)


def test_log_probs_are_the_trainers_at_another_temperature(llama_dir, learner):
    policy, engine = learner(llama_dir, model__full=True, sampling__temperature=0.7)
    engine.refresh(3)
    questions = prompts(8)
    pairs = [Pair(p, a, b, 1.0, 0.0) for p, (a, b) in zip(questions, draw(engine, questions, logps=True), strict=True)]
    found = PhasePairs(0, 3, tuple(pairs), PairCounts(kept=len(pairs)), {})
    found = with_sampler_reference(found, policy, TokenBudget(4096), tolerance=1e-3)
    assert found.metrics["sampling/sampling_logp_difference/max"] < 1e-4
    for cut in ({"top_p": 0.9}, {"top_k": 3}):
        with pytest.raises(ValueError, match=r"temperature = 0\.7: .*log-probs are those after the cut of"):
            draw(engine, questions, logps=True, **cut)
        assert draw(engine, questions, **cut)[0][0].logps is None
