"""Completions from single members of the ensemble, side by side in one batch, on the members' own tensors."""

from types import SimpleNamespace

import pytest
import torch
from tiny_vllm import MAX_LENGTH, greedy_by_transformers, prompts, settings, train_a_little

from bpo_fast.engine import SamplingParams
from bpo_fast.engine.member_rows import MemberRows
from bpo_fast.setup import load_learner

NUM_NEW = 12
MEMBERS = 3


@pytest.fixture(scope="module")
def ensemble(llama_dir):
    config = settings(llama_dir, model__members=MEMBERS, sampling__members="single")
    policy, engine = load_learner(config, torch.device("cpu"), MAX_LENGTH, lambda line: None)
    engine.refresh(0)
    train_a_little(policy)
    with torch.no_grad():  # far apart, so that one cannot pass for another
        for b in policy.lora.b:
            b.add_(0.05 * torch.randn(b.shape, generator=torch.Generator().manual_seed(1)))
    engine.refresh(4)
    yield policy, engine
    engine.close()


def sample(engine, questions, **params):
    return engine.generate(questions, SamplingParams(NUM_NEW, **params), run_seed=1, policy_version=4)


def trainer_logps(policy, prompt, completion):
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt.ids + completion.ids])).logits[0].log_softmax(-1)
    rows = logits[len(prompt.ids) - 1 : -1]
    return rows.gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)


def test_every_completion_is_of_the_member_it_names(ensemble):
    policy, engine = ensemble
    questions = prompts(20, length=40)  # longer than a block: a prefix cached by one member must not serve another
    found = sample(engine, questions, n=2, single_members=True, logps=True)
    assert {c.member for both in found for c in both} == set(range(MEMBERS))
    assert any(a.member != b.member for a, b in found)
    worst = 0.0
    for prompt, both in zip(questions, found, strict=True):
        for c in both:
            assert c.member == c.seed % MEMBERS
            with policy.member(c.member):
                own = trainer_logps(policy, prompt, c)
            torch.testing.assert_close(torch.tensor(c.logps), own, rtol=1e-3, atol=1e-3)
            with policy.member((c.member + 1) % MEMBERS):
                worst = max(worst, float((trainer_logps(policy, prompt, c) - own).abs().max()))
    assert worst > 0.1, "the members differ"
    assert sample(engine, questions, n=2, single_members=True, logps=True) == found
    assert engine.last_refresh.bytes_copied == 0
    assert not engine._session.strays()


def test_without_the_option_the_same_engine_samples_the_average(ensemble):
    policy, engine = ensemble
    questions = prompts(6)
    averaged = sample(engine, questions, temperature=0.0)
    assert [c[0].ids for c in averaged] == greedy_by_transformers(policy, questions, NUM_NEW)
    assert {c[0].member for c in averaged} == {None}


def test_a_stale_member_fails_the_probe(ensemble):
    _, engine = ensemble
    rows = engine._session.member_rows
    rows._choices[[2, 3]] = rows._choices[[3, 2]]  # members 1 and 2 change places
    with pytest.raises(RuntimeError, match="vLLM does not sample from the policy"):
        engine.refresh(5)
    rows._choices[[2, 3]] = rows._choices[[3, 2]]
    engine.refresh(5)


def test_a_step_does_not_wait_for_the_one_before_to_tell_whose_its_rows_are(monkeypatch):
    """What is copied to a GPU from memory that is not pinned is copied when all that the stream has to do is done."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    class Runner:
        input_batch = SimpleNamespace(req_ids=["1-abc", "0-def"])

        def _prepare_inputs(self, scheduled, counts):
            return scheduled

    pinned: list[list[int]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.tolist()) or self)
    rows, runner = MemberRows(5, 2, torch.device("cpu")), Runner()
    rows.weights = rows.weights.as_subclass(OnGpu)
    rows.attach(runner)
    with rows.requests({0: None, 1: 1}):
        runner._prepare_inputs(SimpleNamespace(num_scheduled_tokens={"0-def": 1, "1-abc": 2}), None)
        assert pinned == [[2, 2, 0]]
        assert rows.weights.tolist() == [[0, 2], [0, 2], [1, 1], [1, 1], [1, 1]]
