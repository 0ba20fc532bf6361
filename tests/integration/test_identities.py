"""What any implementation of BPO must satisfy (method.md), on whole runs of a tiny model."""

import json
import math
from collections import Counter

import pytest
import torch
from relative import worst_error
from scorers import tie_every_third

from bpo_fast import config as configs
from bpo_fast.config import MethodConfig, ModelConfig
from bpo_fast.gradients import microbatches
from bpo_fast.metrics import read_metrics
from bpo_fast.pairs import PairCounts, PhasePairs, read_pairs
from bpo_fast.policy import Policy, load_policy
from bpo_fast.train import train
from bpo_fast.types import Completion, Pair, Prompt

AT_ZERO = {"dpo": math.log(2), "slic": 1.0, "ipo": 25.0}


@pytest.fixture
def run(tiny_model_dir, tiny_data, tmp_path, without_drawings):
    def start(name, **knobs):
        values = {
            "model.path": str(tiny_model_dir),
            "model.lora_r": 4,
            "data.path": str(tiny_data.train),
            "annotator.path": "scorers:by_id_sum",
            "method.pairs": 32,
            "method.batch_pairs": 8,
            "sampling.max_new_tokens": 12,
            "optim.learning_rate": 3e-3,
            "eval.prompts": 0,
            "eval.kl_prompts": 4,
            "run.output_dir": str(tmp_path / name),
        }
        values |= {k.replace("__", "."): v for k, v in knobs.items()}
        train(configs.load(None, values), quiet=True)
        return [m for m in read_metrics(tmp_path / name) if m["kind"] == "step"]

    start.folder = tmp_path
    return start


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
@pytest.mark.parametrize("full", [False, True])
def test_first_step_of_every_phase_has_margin_zero(run, loss, full):
    steps = run("bpo", method__loss=loss, method__phases=2, model__full=full)
    assert len(steps) == 4
    for first in (0, 2):
        assert steps[first]["rewards/margins"] == 0.0
        assert steps[first]["loss"] == pytest.approx(AT_ZERO[loss], rel=1e-6)
    for later in (1, 3):
        assert steps[later]["rewards/margins"] != 0.0


@pytest.mark.parametrize(("phases", "loss"), [*[("on-policy", loss) for loss in AT_ZERO], (2, "dpo")])
def test_on_policy_bpo_has_margin_zero_at_every_step_and_takes_no_reference_pass(run, monkeypatch, phases, loss):
    num_calls, logps = [], Policy.logps
    monkeypatch.setattr(
        Policy, "logps", lambda policy, batch: num_calls.append(len(batch.pairs)) or logps(policy, batch)
    )
    steps = run("counted", method__loss=loss, method__phases=phases)
    probes = 2 + 1  # of shared prompts: twice apart, once packed
    assert len(steps) == 4
    if phases == "on-policy":
        assert len(num_calls) == probes
        assert [s["phase"] for s in steps] == [0, 1, 2, 3]
        assert all(s["rewards/margins"] == 0.0 for s in steps)
        assert [s["loss"] for s in steps] == pytest.approx([AT_ZERO[loss]] * 4, rel=1e-6)
        assert all(s["grad_norm"] > 0 for s in steps)
    else:
        assert len(num_calls) > probes


@pytest.mark.parametrize("full", [False, True])
def test_one_phase_of_bpo_online_and_offline_coincide_bitwise(run, full):
    methods = {"bpo": {}, "online": {"method__ref": "initial"}, "offline": {"method__ref": "initial"}}
    methods["offline"]["method__sampler"] = "initial"
    weights = {}
    for name, knobs in methods.items():
        run(name, method__phases=1, model__full=full, **knobs)
        file = "model.safetensors" if full else "adapter_model.safetensors"
        weights[name] = (run.folder / name / "checkpoint-4" / file).read_bytes()
    assert weights["bpo"] == weights["online"] == weights["offline"]


def test_with_two_phases_the_methods_differ(run):
    bpo = run("bpo", method__phases=2)
    online = run("online", method__phases=2, method__ref="initial")
    moving = run("moving", method__phases=2, method__sampler="initial")
    offline = run("offline", method__phases=2, method__ref="initial", method__sampler="initial")
    assert [s["loss"] for s in bpo[:2]] == [s["loss"] for s in online[:2]] == [s["loss"] for s in offline[:2]]
    assert bpo[2]["rewards/margins"] == 0.0
    assert moving[2]["rewards/margins"] == 0.0
    assert online[2]["rewards/margins"] != 0.0
    assert offline[2]["rewards/margins"] not in (0.0, online[2]["rewards/margins"])


@pytest.mark.parametrize(("loss", "factor"), [("dpo", -0.05), ("slic", -0.1), ("ipo", -10.0)])
def test_on_policy_gradient_is_the_scaled_gradient_of_the_log_prob_difference(tiny_model_dir, loss, factor):
    """-beta/2, -beta and -1/beta (on per-token means) times the gradient of l(w) - l(l), beta = 0.1."""
    form = ModelConfig(path=str(tiny_model_dir), full=True)
    policy = load_policy(form, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    sides = [Completion(0, i, ids, "", False, 0, 0) for i, ids in enumerate([(7, 8, 9, 10), (11, 12)])]
    pairs = [Pair(Prompt(0, "", (5, 6, 20)), *sides, 1.0, 0.0)]
    (batch,) = microbatches(pairs, policy, 1000)
    value, _ = policy.loss(batch, None, MethodConfig(loss=loss), num_pairs=1)
    assert value.item() == pytest.approx(AT_ZERO[loss], rel=1e-6)
    value.backward()
    found = [p.grad.clone() for p in policy.model.parameters()]
    policy.model.zero_grad()
    terms = []
    for ids in (pairs[0].chosen.ids, pairs[0].rejected.ids):
        logits = policy.model(torch.tensor([pairs[0].prompt.ids + ids])).logits[0]
        rows = logits.log_softmax(-1)[2:-1].gather(1, torch.tensor(ids)[:, None])
        terms.append(rows.mean() if loss == "ipo" else rows.sum())
    (factor * (terms[0] - terms[1])).backward()
    assert worst_error(found, [p.grad for p in policy.model.parameters()]) < 1e-5


def pairs_of(folder) -> list[PhasePairs]:
    return [read_pairs(path) for path in sorted((folder / "pairs").glob("*.jsonl"))]


def test_equal_budget_whatever_the_phases(run):
    for phases in (1, 2, 4):
        run(f"f{phases}", method__phases=phases, annotator__path="scorers:tie_every_third")
        folder = run.folder / f"f{phases}"
        summary = json.loads((folder / "summary.json").read_text())
        counts = summary["pairs"]
        assert counts["kept"] + counts["tied"] + counts["identical"] + counts["unscored"] == 32
        assert counts["tied"] > 0
        assert summary["steps"] == 4
        used = Counter(p.prompt.id for found in pairs_of(folder) for p in (*found.pairs, *found.dropped))
        assert set(used.values()) == {1}
        assert used.total() == 32


def test_everything_annotated_is_stored_with_its_scores(run):
    run("refill", method__phases=2, annotator__path="scorers:tie_every_third", annotator__refill=True)
    folder = run.folder / "refill"
    counts = json.loads((folder / "summary.json").read_text())["pairs"]
    assert counts["kept"] == 32
    assert counts["tied"] > 0
    num_dropped = Counter()
    for found in pairs_of(folder):
        assert found.counts == PairCounts.of(found.pairs, (d.reason for d in found.dropped))
        num_dropped += Counter(d.reason for d in found.dropped)
        for pair in (p for p in found.dropped if p.reason == "tied"):
            ids = [c.ids for c in pair.completions]
            expected = tie_every_third([pair.prompt.text] * 2, None, ids)
            assert list(pair.scores) == expected
            assert [c.sample_id for c in pair.completions] == [0, 1]
            assert all(c.policy_version == found.policy_version and c.seed and c.text for c in pair.completions)
    assert num_dropped == {name: n for name, n in counts.items() if n and name not in ("kept", "truncated")}


def test_ensemble_of_one_seed_behaves_as_its_member(run):
    """M = 2 with a reference that is the average: the first step of a phase is not at zero, since members differ."""
    steps = run("two", model__members=2, method__phases=2)
    assert steps[0]["rewards/margins"] == 0.0  # B = 0: all members are the base
    assert steps[2]["rewards/margins"] != 0.0
    assert (run.folder / "two" / "checkpoint-4" / "member-1" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("ref", ["ema", "golden"])
def test_other_references_run_and_start_at_zero(run, tiny_model_dir, ref):
    golden = {"method__golden": str(tiny_model_dir)} if ref == "golden" else {}
    steps = run(ref, method__ref=ref, method__phases=2, **golden)
    assert steps[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    # neither has followed the policy to the start of the second phase
    assert abs(steps[2]["rewards/margins"]) > 1e-5
