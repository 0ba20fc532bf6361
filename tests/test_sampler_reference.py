"""The sampler's log-probs as the reference: as good as the trainer's, and refused when they are another policy's."""

import json
from dataclasses import replace

import pytest
from tiny_policy import make_pairs, make_policy
from typer.testing import CliRunner

from bpo_fast.batches import TokenBudget
from bpo_fast.cli import app
from bpo_fast.pairs import PairCounts, PhasePairs
from bpo_fast.sampler_reference import with_sampler_reference

BUDGET = TokenBudget(1000)


def phase_by(policy):
    """A phase whose completions carry the log-probs of `policy`."""
    batch = policy.pack(make_pairs())
    parts = [tuple(part.tolist()) for part in policy.token_logps(batch).split(batch.lengths.tolist())]
    both = zip(batch.pairs, parts[: len(batch.pairs)], parts[len(batch.pairs) :], strict=True)
    pairs = tuple(
        replace(p, chosen=replace(p.chosen, logps=a), rejected=replace(p.rejected, logps=b)) for p, a, b in both
    )
    return PhasePairs(0, 0, pairs, PairCounts(), {"kept": 1.0})


def test_the_sampler_is_believed_where_it_agrees():
    policy = make_policy()
    found = with_sampler_reference(phase_by(policy), policy, BUDGET, tolerance=1e-4)
    expected = policy.logps(policy.pack(found.pairs)).view(2, -1).T
    for pair, both in zip(found.pairs, expected.tolist(), strict=True):
        assert pair.ref_logps == pytest.approx(both, rel=1e-5)
    assert found.metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert found.metrics["kept"] == 1.0


def test_a_stale_sampler_is_refused_with_both_numbers():
    stale, policy = make_policy(), make_policy(initializer_range=0.3)
    with pytest.raises(ValueError, match=r"by \d\S* nats a token in the mean and \d\S* at most .*take trainer"):
        with_sampler_reference(phase_by(stale), policy, BUDGET, tolerance=0.1)


def test_one_wrong_token_that_the_mean_hides_is_refused():
    policy = make_policy()
    phase = phase_by(policy)
    first, *others = phase.pairs
    for off, refused in ((1.9, False), (2.1, True)):
        logps = (first.chosen.logps[0] - off, *first.chosen.logps[1:])
        changed = replace(phase, pairs=(replace(first, chosen=replace(first.chosen, logps=logps)), *others))
        if refused:
            with pytest.raises(ValueError, match=r"by 0\.0\d* nats a token in the mean and 2\.1 at most"):
                with_sampler_reference(changed, policy, BUDGET, tolerance=0.1)
        else:
            found = with_sampler_reference(changed, policy, BUDGET, tolerance=0.1)
            assert found.metrics["sampling/sampling_logp_difference/max"] == pytest.approx(off, abs=1e-4)


def test_completions_without_log_probs_are_named():
    found = PhasePairs(0, 0, tuple(make_pairs()), PairCounts(), {})
    with pytest.raises(ValueError, match="a completion of prompt 0 was recorded without log-probs"):
        with_sampler_reference(found, make_policy(), BUDGET, tolerance=0.1)


def test_a_run_with_the_samplers_log_probs(tiny_args, tmp_path, monkeypatch, without_drawings):
    monkeypatch.chdir(tmp_path)
    for name, more in (("trainer", []), ("sampler", ["--ref-logps", "sampler"])):
        done = CliRunner().invoke(app, [*tiny_args, "--members", "2", "--out", name, *more])
        assert done.exit_code == 0, done.stderr
    rows = {}
    for name in ("trainer", "sampler"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        rows[name] = [line for line in lines if "loss" in line]
        phases = [line for line in lines if "sampling/sampling_logp_difference/mean" in line]
        assert len(phases) == (2 if name == "sampler" else 0)
    for a, b in zip(rows["trainer"], rows["sampler"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    refused = CliRunner().invoke(app, [*tiny_args, "--ref", "initial", "--ref-logps", "sampler", "--out", "new"])
    assert refused.exit_code == 2
    assert "method.ref_logps = sampler: not with method.ref = initial" in refused.stderr
