"""A run killed again and again ends bit for bit as the run that was never touched."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import Forked
from safetensors.torch import load_file

from bpo_fast import config as configs
from bpo_fast import report
from bpo_fast.checkpoint import complete_checkpoints
from bpo_fast.loop import Loop
from bpo_fast.metrics import read_metrics
from bpo_fast.run import check_same, saved_config
from bpo_fast.setup import Work
from bpo_fast.train import train
from bpo_fast.types import Prompt

HERE = Path(__file__).parent
NOT_COMPARED = ("timing/", "perf/", "memory/")

pytestmark = pytest.mark.usefixtures("without_drawings")


def settings(model, data, out, **knobs):
    values = {
        "model.path": str(model),
        "model.lora_r": 4,
        "data.path": str(data.train),
        "data.eval_path": str(data.eval),
        "annotator.path": "scorers:tie_every_third",
        "annotator.refill": True,
        "method.pairs": 48,
        "method.batch_pairs": 4,
        "method.phases": 3,
        "sampling.max_new_tokens": 8,
        "optim.learning_rate": 3e-3,
        "eval.prompts": 4,
        "eval.eval_steps": 3,
        "eval.kl_prompts": 4,
        "run.save_steps": 1,
        "run.output_dir": str(out),
        "run.device": "cpu",
        "sampling.engine": "hf",
    }
    return configs.load(None, values | {k.replace("__", "."): v for k, v in knobs.items()})


def contents(run: Path):
    """Everything that must not depend on interruptions."""
    metrics = [{k: v for k, v in line.items() if not k.startswith(NOT_COMPARED)} for line in read_metrics(run)]
    weights = {
        str(p.relative_to(run)): p.read_bytes()
        for p in sorted(complete_checkpoints(run)[-1].rglob("*"))
        if p.is_file() and p.name != "trainer_state.json"
    }
    pairs = {p.name: p.read_bytes() for p in sorted((run / "pairs").iterdir())}
    evals = (run / "eval.jsonl").read_bytes()
    return metrics, weights, pairs, evals


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.mark.parametrize(
    ("name", "knobs", "num_random"),
    [
        (
            "lora",
            {"model__members": 2, "model__lora_dropout": 0.1, "method__ref": "ema", "run__save_total_limit": 1},
            8,
        ),
        ("full", {"model__full": True}, 8),
        ("initial", {"method__sampler": "initial"}, 0),  # among the places: after the pairs of some phases, not all
    ],
)
def test_sigkill_at_any_moment_changes_nothing(tiny_model_dir, tiny_data, tmp_path, name, knobs, num_random):
    tomls = []
    for kind in ("straight", "killed"):
        tomls.append(tmp_path / f"{kind}.toml")
        tomls[-1].write_text(configs.to_toml(settings(tiny_model_dir, tiny_data, tmp_path / kind, **knobs)))
    command = [sys.executable, str(HERE / "kill_driver.py"), *map(str, tomls), "5", str(num_random)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    driver = Forked(command, env=environment(), cwd=HERE, text=True, **pipes)
    out, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors[-2000:]
    num_kills, num_places = map(int, out.split())
    assert num_kills >= num_random
    assert num_places >= 10
    runs = {kind: contents(tmp_path / kind) for kind in ("straight", "killed")}
    for straight, killed in zip(runs["straight"], runs["killed"], strict=True):
        assert straight == killed
    assert not list((tmp_path / "killed").rglob("*.tmp"))
    assert len(complete_checkpoints(tmp_path / "killed")) == (1 if name == "lora" else 2)


def test_interrupt_writes_a_checkpoint_and_leaves_with_130(tiny_model_dir, tiny_data, tmp_path):
    config = settings(tiny_model_dir, tiny_data, tmp_path / "run", run__save_steps=100, method__pairs=40)
    toml = tmp_path / "run.toml"
    toml.write_text(configs.to_toml(config))
    command = [sys.executable, "-m", "bpo_fast", "train", "--config", str(toml)]
    process = Forked(command, env=environment(), cwd=HERE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"step"') >= 4):
        assert process.poll() is None, "finished before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "go on with --resume" in stderr
    (checkpoint,) = complete_checkpoints(tmp_path / "run")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["num_metric_lines"] == len(read_metrics(tmp_path / "run"))
    train(configs.load(tmp_path / "run" / "config.toml"), resume=tmp_path / "run", quiet=True)
    straight = settings(tiny_model_dir, tiny_data, tmp_path / "straight", run__save_steps=100, method__pairs=40)
    train(straight, quiet=True)
    ours, theirs = (
        load_file(complete_checkpoints(tmp_path / d)[-1] / "adapter_model.safetensors") for d in ("run", "straight")
    )
    assert all((ours[k] == theirs[k]).all() for k in theirs)


def test_a_second_command_does_not_disturb_the_first(tiny_model_dir, tiny_data, tmp_path, monkeypatch):
    config = settings(tiny_model_dir, tiny_data, tmp_path / "run", method__pairs=8, method__phases=1)
    end_phase = Loop.end_phase

    def with_another(loop, *args):
        with pytest.raises(ValueError, match=f"^{tmp_path / 'run'}: another command is at work on this run$"):
            train(saved_config(tmp_path / "run"), resume=tmp_path / "run", quiet=True)
        end_phase(loop, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "end_phase", with_another)
    with pytest.raises(KeyboardInterrupt):
        train(config, quiet=True)
    monkeypatch.setattr(Loop, "end_phase", end_phase)
    train(saved_config(tmp_path / "run"), resume=tmp_path / "run", quiet=True)


def test_a_finished_run_has_its_report(tiny_model_dir, tiny_data, tmp_path, monkeypatch):
    config = settings(tiny_model_dir, tiny_data, tmp_path / "run", method__pairs=8, method__phases=1)
    write_report = report.write_report

    def interrupted(run_dir):
        os.kill(os.getpid(), signal.SIGINT)
        return write_report(run_dir)

    monkeypatch.setattr(report, "write_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, quiet=True)
    monkeypatch.setattr(report, "write_report", write_report)
    page = tmp_path / "run" / "report.html"
    assert page.exists()
    page.unlink()  # as after SIGKILL between summary and report
    train(saved_config(tmp_path / "run"), resume=tmp_path / "run", quiet=True)
    assert page.exists()


def test_how_an_endpoint_is_asked_may_change_at_resume(tmp_path):
    (tmp_path / "config.toml").write_text(configs.to_toml(configs.Config()), encoding="utf-8")
    other = {"annotator.timeout_s": 9.0, "annotator.retries": 1, "annotator.requests": 2}
    check_same(configs.replace(configs.Config(), other), tmp_path)


def test_resume_refuses_other_settings_and_other_folders(tiny_model_dir, tiny_data, tmp_path):
    config = settings(tiny_model_dir, tiny_data, tmp_path / "run", method__pairs=8, method__phases=1)
    train(config, quiet=True)
    saved = configs.load(tmp_path / "run" / "config.toml")
    other = configs.replace(saved, {"method.beta": 0.2})
    with pytest.raises(ValueError, match=r"method\.beta = 0\.2: the run to resume has 0\.1"):
        train(other, resume=tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="no run there"):
        train(saved, resume=tmp_path, quiet=True)
    with pytest.raises(ValueError, match="holds another run"):
        train(config, quiet=True)
    again = train(saved, resume=tmp_path / "run", quiet=True)
    assert again == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_resume_refuses_data_that_have_changed(tiny_model_dir, tiny_data, tmp_path):
    data = tmp_path / "train.jsonl"
    lines = Path(tiny_data.train).read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    few = {"method__pairs": 8, "method__phases": 1}
    config = settings(tiny_model_dir, SimpleNamespace(train=str(data), eval=tiny_data.eval), tmp_path / "run", **few)
    train(config, quiet=True)
    (tmp_path / "run" / "summary.json").unlink()
    before = contents(tmp_path / "run")
    data.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=r"^data: other prompts or pairs than when .*run began"):
        train(config, resume=tmp_path / "run", quiet=True)
    assert contents(tmp_path / "run") == before
    data.write_text("".join(lines))
    train(config, resume=tmp_path / "run", quiet=True)


def test_a_run_goes_on_when_the_chat_template_writes_another_date():
    def digest(text, plain):
        prompts = (Prompt(0, text, (len(text),), plain=plain),)
        return Work.digest.func(SimpleNamespace(prompts=prompts, spare=(), held_out=(), replayed=None))

    assert digest("<monday>Q", "Q") == digest("<tuesday>Q", "Q") != digest("<monday>R", "R")


def test_a_run_that_was_given_relative_paths_goes_on_from_another_folder(
    tiny_model_dir, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(HERE)
    for name, target in {"model": tiny_model_dir, "train.jsonl": tiny_data.train, "eval.jsonl": tiny_data.eval}.items():
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    few = {"method__pairs": 8, "method__phases": 1, "method__ref": "golden", "method__golden": "model"}
    config = settings("model", SimpleNamespace(train="train.jsonl[:9]", eval="eval.jsonl"), "run", **few)
    train(config, quiet=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run = Path("../run")
    before = contents(run)
    (run / "summary.json").unlink()
    train(saved_config(run), resume=run, quiet=True)
    assert contents(run) == before
    assert saved_config(run).data.path == f"{tmp_path}/train.jsonl[:9]"
    [adapter] = complete_checkpoints(run)[-1].rglob("adapter_config.json")
    assert json.loads(adapter.read_text())["base_model_name_or_path"] == f"{tmp_path}/model"
