"""The loop on vLLM: the probe passes at every phase, and interrupted runs end as if they had never stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_vllm import settings

from bpo_fast import scoring
from bpo_fast.annotate import Checked
from bpo_fast.checkpoint import complete_checkpoints
from bpo_fast.config import replace, to_toml
from bpo_fast.contest import evaluate
from bpo_fast.engine.session import Session
from bpo_fast.engine.vllm import VllmEngine
from bpo_fast.metrics import read_metrics
from bpo_fast.run import Run
from bpo_fast.source import base_config
from bpo_fast.train import train


def knobs(tiny_data, out, **more):
    return {
        "data__path": str(tiny_data.train),
        "data__eval_path": str(tiny_data.eval),
        "data__max_prompt_length": 64,
        "annotator__path": "toy_annotator:letters",
        "method__pairs": 24,
        "method__batch_pairs": 4,
        "method__phases": 3,
        "sampling__max_new_tokens": 8,
        "optim__learning_rate": 3e-3,
        "eval__prompts": 4,
        "eval__kl_prompts": 4,
        "run__output_dir": str(out),
    } | more


def contents(run: Path):
    """Pairs, answers and weights of a finished run."""
    weights = {
        str(path.relative_to(run)): load_file(path) for path in complete_checkpoints(run)[-1].rglob("*.safetensors")
    }
    return (
        {p.name: p.read_bytes() for p in sorted((run / "pairs").iterdir())},
        (run / "eval.jsonl").read_bytes(),
        weights,
    )


def assert_same(first: Path, second: Path) -> None:
    (pairs, answers, weights), (other_pairs, other_answers, other_weights) = contents(first), contents(second)
    assert pairs == other_pairs
    assert answers == other_answers
    assert weights.keys() == other_weights.keys()
    for file, tensors in weights.items():
        for name, tensor in tensors.items():
            assert tensor.equal(other_weights[file][name]), (file, name)


@pytest.mark.parametrize(
    "form",
    [{"model__full": True}, {"model__members": 2}, {"model__members": 2, "run__save_steps": 100}],
    ids=["full", "lora", "saved amid a phase"],
)
def test_a_killed_and_resumed_run_ends_as_one_that_was_not(llama_dir, tiny_data, tmp_path, monkeypatch, form):
    probes = []
    refresh = VllmEngine.refresh

    def counted(self, version):
        measured = refresh(self, version)
        probes.append((version, self.last_refresh.probe.mean <= self.last_refresh.probe.limit))
        return measured

    monkeypatch.setattr(VllmEngine, "refresh", counted)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(settings(llama_dir, **knobs(tiny_data, whole, **form)), quiet=True)
    assert [v for v, passed in probes if passed] == [0, 0, 2, 4, 6]  # evaluation, three phases, evaluation
    phases = [line for line in read_metrics(whole) if line["kind"] == "phase"]
    assert all(0 <= line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in phases)
    assert {line["sampling/refresh_bytes"] > 0 for line in phases} == {"model__full" not in form}

    generate = VllmEngine.generate

    def interrupted(self, questions, params, *, on_done=None, policy_version, **options):
        if policy_version != 2:
            return generate(self, questions, params, on_done=on_done, policy_version=policy_version, **options)
        stop = lambda num: signal.raise_signal(signal.SIGINT)  # noqa: E731
        return generate(self, questions, params, on_done=stop, policy_version=policy_version, **options)

    config = settings(llama_dir, **knobs(tiny_data, cut, **form))
    with monkeypatch.context() as patch:
        patch.setattr(VllmEngine, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, quiet=True)
    assert complete_checkpoints(cut)[-1].name == "checkpoint-2"
    with pytest.raises(ValueError, match=r"sampling\.engine = hf: the run to resume has vllm"):
        train(replace(config, {"sampling.engine": "hf"}), resume=cut, quiet=True)
    train(settings(llama_dir, **knobs(tiny_data, cut, **form)), resume=cut, quiet=True)
    assert_same(whole, cut)


def test_a_run_whose_sampler_is_stale_fails(llama_dir, tiny_data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(Session, "copy_weights", lambda self: 0)
    config = settings(llama_dir, **knobs(tiny_data, out, model__members=2, optim__learning_rate=3e-2))
    with pytest.raises(
        RuntimeError, match=r"^step 2: vLLM does not sample from the policy: .* the weights of model\.l"
    ):
        train(config, quiet=True)
    assert [p.name for p in (out / "pairs").iterdir()] == ["phase-00.jsonl"]
    assert not (out / "summary.json").exists()


def test_pairs_are_the_same_with_and_without_overlap_and_where_vllm_aborts(llama_dir, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "GROUP_PAIRS", 2)
    run, duel, places = VllmEngine._run, Checked.duel, set()

    def run_and_abort(self, requests, call, on_done=None):
        """The second phase loses a completion at first, the third one loses another for good."""
        if call.params.n == 2 and (call.policy_version, len(requests)) in ((2, 16), (4, 16), (4, 1)):
            requests = {key: r for key, r in requests.items() if key != 5}
        return run(self, requests, call, on_done)

    def noted(self, *args):
        places.add(threading.current_thread() is threading.main_thread())
        return duel(self, *args)

    monkeypatch.setattr(VllmEngine, "_run", run_and_abort)
    monkeypatch.setattr(Checked, "duel", noted)
    for overlap in (True, False):
        out = tmp_path / str(overlap)
        train(settings(llama_dir, **knobs(tiny_data, out, model__full=True, annotator__overlap=overlap)), quiet=True)
        phases = [line for line in read_metrics(out) if line["kind"] == "phase"]
        assert [line["completions/num_retried"] for line in phases] == [0, 1, 1]
        assert [line["pairs/aborted"] for line in phases] == [0, 0, 1]
        assert places == {not overlap}
        places.clear()
    assert_same(tmp_path / "True", tmp_path / "False")


def test_eval_decodes_what_the_run_has_trained(llama_dir, tiny_data, tmp_path):
    run = tmp_path / "run"
    knobs_ = knobs(tiny_data, run, model__members=2, optim__learning_rate=3e-2, eval__judges=("toy_annotator:letters",))
    train(settings(llama_dir, **knobs_), quiet=True)
    answers = {
        when: [r["output"] for r in Run(run, resume=True).read_eval() if r["when"] == when]
        for when in ("before", "after")
    }
    for num in (1, 2):
        out, config = tmp_path / f"eval-{num}", replace(base_config(str(run)), {"run.devices": num})
        evaluate(config, str(run), None, out)
        again = [json.loads(line)["output"] for line in (out / "rows.jsonl").read_text().splitlines()]
        assert again == answers["after"] != answers["before"]


def test_a_run_that_was_killed_outright_resumes_to_the_same_bits(llama_dir, tiny_data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config = settings(llama_dir, **knobs(tiny_data, cut, model__members=2, sampling__members="single"))
    (tmp_path / "run.toml").write_text(to_toml(config))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bpo_fast", "train", "--config", str(tmp_path / "run.toml")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("phase 1:") and "kept" in line:  # its pairs are on disk and trained on
            process.kill()
    assert process.wait() == -signal.SIGKILL, "".join(lines)
    assert not (cut / "summary.json").exists()
    train(config, resume=cut, quiet=True)
    train(replace(config, {"run.output_dir": str(whole)}), quiet=True)
    assert_same(whole, cut)


def test_ctrl_c_during_generation_writes_a_checkpoint_and_exits_with_130(llama_dir, tiny_data, tmp_path):
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "bpo_fast", "train", "--engine", "vllm", "--model", str(llama_dir), "--device", "cpu"),
        *("--data", str(tiny_data.train), "--eval-data", str(tiny_data.eval), "--annotator", "toy_annotator:letters"),
        *(
            "--pairs",
            "64",
            "--batch-pairs",
            "16",
            "--max-new-tokens",
            "90",
            "--lora-r",
            "4",
            "--set",
            "eval.prompts=0",
            "--out",
            str(out),
        ),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("phase 1: sampling: 0/") and "stopped" not in line:
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130, "".join(lines)
    assert "interrupted at step 0; go on with --resume" in lines[-1]
    assert sum(line.startswith("sampling: vLLM") for line in lines) == 1
    [checkpoint] = complete_checkpoints(out)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["step"] == 0


@pytest.mark.parametrize("form", [{"model__full": True}, {"model__members": 2}], ids=["full", "lora"])
def test_two_devices_with_a_sampler_each_end_as_one(llama_dir, tiny_data, tmp_path, form):
    runs = [tmp_path / "one", tmp_path / "two"]
    for num, run in enumerate(runs, 1):
        train(settings(llama_dir, **knobs(tiny_data, run, run__devices=num, **form)), quiet=True)
    (pairs, _, weights), (other_pairs, _, other_weights) = map(contents, runs)
    ids = [
        [(row["chosen"]["ids"], row["rejected"]["ids"]) for text in found.values() for row in rows(text)]
        for found in (pairs, other_pairs)
    ]
    assert ids[0] == ids[1]
    files = [file for file in weights if file.endswith("model.safetensors")]
    assert files
    for file in files:
        for name, tensor in weights[file].items():
            assert (other_weights[file][name] - tensor).norm() <= 1e-4 * tensor.norm(), (file, name)


def rows(text: bytes):
    """The pairs of a file of recorded pairs."""
    return [row for line in text.splitlines()[1:] if "dropped" not in (row := json.loads(line))]
