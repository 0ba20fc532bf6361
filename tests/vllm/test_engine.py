"""What comes out of the engine: the right distribution, the right order, whatever the batch, whatever goes wrong."""

import random
import signal

import numpy as np
import pytest
import torch
from tiny_vllm import MAX_LENGTH, greedy_by_transformers, prompts, settings

from bpo_fast.engine import SamplingParams, request_seed
from bpo_fast.engine.stopping import StopStrings
from bpo_fast.setup import load_learner
from bpo_fast.types import Prompt


@pytest.fixture(scope="module")
def full(llama_dir):
    config = settings(llama_dir, model__full=True)
    policy, engine = load_learner(config, torch.device("cpu"), MAX_LENGTH, lambda line: None)
    engine.refresh(3)
    yield policy, engine
    engine.close()


def draw(engine, questions, run_seed=1, num_new=16, n=2, **params):
    return engine.generate(questions, SamplingParams(num_new, n=n, **params), run_seed=run_seed, policy_version=3)


def flat(groups):
    return [c for group in groups for c in group]


def test_completions_come_in_order_with_what_names_them(full):
    policy, engine = full
    done = []
    questions = prompts(7)
    groups = engine.generate(
        questions, SamplingParams(16, n=2, logps=True), run_seed=5, policy_version=3, on_done=done.append
    )
    finished = [c for part in done for c in part]
    assert len(finished) == 14
    assert {(c.prompt_id, c.sample_id): c for c in finished} == {(c.prompt_id, c.sample_id): c for c in flat(groups)}
    for prompt, group in zip(questions, groups, strict=True):
        for sample_id, c in enumerate(group):
            assert (c.prompt_id, c.sample_id, c.policy_version) == (prompt.id, sample_id, 3)
            assert c.seed == request_seed(5, 3, prompt.id, sample_id)
            assert c.text == policy.tokenizer.decode(c.ids, skip_special_tokens=True)
            assert c.truncated == (c.ids[-1] not in policy.eos_ids)
            assert all(t not in policy.eos_ids for t in c.ids[:-1])
    assert {c.truncated for c in flat(draw(engine, prompts(40), num_new=120))} == {True, False}


def test_logps_are_the_trainers(full):
    policy, engine = full
    questions = prompts(5)
    for prompt, (c, *_) in zip(questions, draw(engine, questions, logps=True), strict=True):
        with torch.no_grad():
            logps = policy.model(input_ids=torch.tensor([prompt.ids + c.ids])).logits[0].log_softmax(-1)
        ours = logps[len(prompt.ids) - 1 : -1].gather(1, torch.tensor(c.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(c.logps), ours, rtol=1e-4, atol=1e-4)
    assert draw(engine, questions)[0][0].logps is None


def test_a_completion_does_not_depend_on_its_batch(full):
    _, engine = full
    questions = prompts(12)
    whole = draw(engine, questions)
    assert draw(engine, questions) == whole
    assert flat(draw(engine, questions[::-1])[::-1]) == flat(whole)
    assert flat(draw(engine, questions[3:4])) == whole[3]
    assert [c.ids for c in flat(draw(engine, questions, run_seed=2))] != [c.ids for c in flat(whole)]


def test_prompts_that_fill_more_than_one_step(full):
    _, engine = full
    questions = [Prompt(i, "", tuple((i * 7 + j) % 300 + 2 for j in range(140 + i % 4))) for i in range(40)]
    whole = draw(engine, questions, num_new=4)  # 5,600 tokens of prompts, above the 4,096 of a step
    assert draw(engine, questions[28:31], num_new=4) == whole[28:31]


def test_draws_follow_the_policy(full):
    policy, engine = full
    [question] = prompts(1)
    num = 3000
    drawn = [c.ids[0] for c in draw(engine, [question], num_new=1, n=num)[0]]
    with torch.no_grad():
        probs = policy.model(input_ids=torch.tensor([question.ids])).logits[0, -1].double().softmax(-1)
    expected = probs * num
    observed = torch.bincount(torch.tensor(drawn), minlength=len(probs)).double()
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    degrees = len(expected) - 1
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert degrees >= 10
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_greedy_tokens_are_transformers_tokens(full):
    policy, engine = full
    questions = prompts(6)
    greedy = [c[0].ids for c in draw(engine, questions, n=1, temperature=0.0)]
    assert greedy == greedy_by_transformers(policy, questions, 16)


def test_logps_are_those_before_a_cut(full):
    policy, engine = full
    [question] = prompts(1)
    with torch.no_grad():
        logps = policy.model(input_ids=torch.tensor([question.ids])).logits[0, -1].log_softmax(-1)
    for cut in ({"top_p": 0.5}, {"top_k": 2}):
        for c in draw(engine, [question], num_new=1, n=20, logps=True, **cut)[0]:
            assert c.logps[0] == pytest.approx(float(logps[c.ids[0]]), abs=1e-4)


def test_top_k_cuts(full):
    policy, engine = full
    [question] = prompts(1)
    with torch.no_grad():
        best = policy.model(input_ids=torch.tensor([question.ids])).logits[0, -1].topk(2).indices.tolist()
    assert {c.ids[0] for c in draw(engine, [question], num_new=1, n=200, top_k=2)[0]} == set(best)


def test_top_p_cuts(full):
    policy, engine = full
    [question] = prompts(1)
    with torch.no_grad():
        probs, ids = (
            policy.model(input_ids=torch.tensor([question.ids])).logits[0, -1].softmax(-1).sort(descending=True)
        )
    mass = probs.cumsum(0)
    kept = int((mass < 0.5).sum()) + 1  # the fewest tokens that hold half of the mass
    assert 2 <= kept <= 20
    drawn = {c.ids[0] for c in draw(engine, [question], num_new=1, n=400, top_p=0.5)[0]}
    assert drawn <= set(ids[:kept].tolist())
    assert set(ids[: kept - 1].tolist()) <= drawn
    [surest] = draw(engine, [question], top_p=1e-6, n=1)
    assert surest[0].ids == draw(engine, [question], temperature=0.0, n=1)[0][0].ids


def test_a_prompt_may_be_as_long_as_the_engine_allows(full):
    policy, engine = full
    longest = Prompt(1, "", tuple(2 + j % 200 for j in range(MAX_LENGTH - 16)))
    [[c]] = draw(engine, [longest], n=1, temperature=0.0)
    assert [c.ids] == greedy_by_transformers(policy, [longest], 16)


def test_what_does_not_fit_is_named(full):
    _, engine = full
    long = Prompt(3, "", (5,) * (MAX_LENGTH - 15))
    with pytest.raises(ValueError, match=f"prompt 3 has 145 tokens.* = 16 it is longer than the {MAX_LENGTH}"):
        draw(engine, [long])
    with pytest.raises(ValueError, match="prompt 9 has no tokens"):
        draw(engine, [*prompts(2), Prompt(9, "", ())])
    with pytest.raises(ValueError, match=r"temperature = 0\.5: log-probs are of 1\.0"):
        draw(engine, prompts(1), temperature=0.5, logps=True)
    with pytest.raises(ValueError, match=r"sampling\.members: vLLM was not opened for single members"):
        draw(engine, prompts(1), single_members=True)


@pytest.mark.parametrize("reason", [None, "abort", "error"])
@pytest.mark.parametrize("num_aborts", [1, 2])
def test_an_aborted_request_is_sampled_once_more_then_dropped(full, monkeypatch, num_aborts, reason):
    _, engine = full
    questions = prompts(4)
    whole = draw(engine, questions)
    vllm_engine, aborted = engine._session.llm.llm_engine, []
    add_request, step = vllm_engine.add_request, vllm_engine.step

    def add_and_abort(request_id, *args):  # no output ever comes of it
        add_request(request_id, *args)
        if request_id == "3" and len(aborted) < num_aborts:
            aborted.append(request_id)
            vllm_engine.abort_request([request_id])

    def step_and_abort():  # it ends with what has been sampled so far, and this reason
        outputs = step()
        for output in outputs:
            if output.request_id == "3" and output.finished and len(aborted) < num_aborts:
                aborted.append(output.request_id)
                output.outputs[0].finish_reason = reason
        return outputs

    if reason:
        monkeypatch.setattr(vllm_engine, "step", step_and_abort)
    else:
        monkeypatch.setattr(vllm_engine, "add_request", add_and_abort)
    before = engine.num_retried
    again = flat(draw(engine, questions))
    assert engine.num_retried == before + 1
    assert [c for i, c in enumerate(again) if i != 3] == [c for i, c in enumerate(flat(whole)) if i != 3]
    assert again[3].ids == (flat(whole)[3].ids if num_aborts == 1 else ())
    assert [c.aborted for c in again] == [i == 3 and num_aborts == 2 for i in range(len(again))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_the_engine_usable(full, number):
    _, engine = full
    questions = prompts(8)
    whole = draw(engine, questions)

    def raise_interrupt(*args):
        raise KeyboardInterrupt

    before = signal.signal(number, raise_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(
                questions,
                SamplingParams(16, n=2),
                run_seed=1,
                policy_version=3,
                on_done=lambda num: signal.raise_signal(number),
            )
        assert signal.getsignal(number) is raise_interrupt
    finally:
        signal.signal(number, before)
    assert not engine._session.llm.llm_engine.has_unfinished_requests()
    assert draw(engine, questions) == whole


def test_an_interrupt_that_is_only_noted_changes_nothing(full):
    _, engine = full
    questions, noted = prompts(8), []
    whole = draw(engine, questions)
    before = signal.signal(signal.SIGINT, lambda *args: noted.append(args))
    try:
        again = engine.generate(
            questions,
            SamplingParams(16, n=2),
            run_seed=1,
            policy_version=3,
            on_done=lambda num: noted or signal.raise_signal(signal.SIGINT),
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert again == whole
    assert len(noted) == 1


def test_generators_are_left_alone(full):
    _, engine = full
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    draw(engine, prompts(3), logps=True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_weights_that_it_was_not_refreshed_for_are_refused(full):
    _, engine = full
    with pytest.raises(RuntimeError, match="last refreshed at step 3: not the policy of 4"):
        engine.generate(prompts(1), SamplingParams(4), run_seed=0, policy_version=4)


def test_a_second_engine_is_refused(full, llama_dir):
    with pytest.raises(RuntimeError, match="has a vLLM engine already; close it"):
        load_learner(settings(llama_dir), torch.device("cpu"), MAX_LENGTH, lambda line: None)


def test_a_stop_string_ends_a_completion_where_it_would_have_begun(full):
    policy, engine = full
    questions = prompts(12)
    free = flat(draw(engine, questions, logps=True))
    text = policy.tokenizer.decode(free[4].ids, skip_special_tokens=False)
    strings = (text[len(text) // 2 :][:3], free[1].text[:1])  # in the middle of a completion, and at the start of one
    stop, done = StopStrings(policy.tokenizer, strings), []
    params = SamplingParams(16, n=2, logps=True, stop=strings)
    cut = flat(engine.generate(questions, params, run_seed=1, policy_version=3, on_done=done.extend))
    assert len(done) == len(cut)
    assert any(c.stopped and not c.ids for c in cut)
    assert any(c.stopped and c.ids for c in cut)
    assert any(not c.stopped for c in cut)
    for whole, short in zip(free, cut, strict=True):
        kept = stop.cut(whole.ids)
        if kept is None:
            assert short.ids == whole.ids
            continue
        assert short.ids == whole.ids[:kept]
        assert (short.stopped, short.truncated) == (True, False)
        assert not set(policy.eos_ids) & set(short.ids)
        assert len(short.logps) == kept
    assert not engine._session.llm.llm_engine.has_unfinished_requests()
