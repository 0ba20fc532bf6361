"""`sample` and `eval` on several devices, processes on a CPU: they do what one does, and end alike."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import Forked
from judge_server import by_length, endpoint
from test_devices import assert_gone
from test_resume import HERE, environment
from tiny_world import write_rows
from typer.testing import CliRunner

from bpo_fast import config as configs
from bpo_fast.cli import app
from bpo_fast.contest import evaluate
from bpo_fast.progress import Progress
from bpo_fast.reward import train_reward
from bpo_fast.sample import sample
from bpo_fast.stage_config import RewardConfig

FILES = ("outputs.jsonl", "against.jsonl")


@pytest.fixture(autouse=True)
def _scorers(monkeypatch, forked_ranks, without_drawings):
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"Number {i}?", "chosen": "a pear and a plum", "rejected": "an apple"} for i in range(8)]
    small = {"hidden": 32, "layers": 1, "heads": 2, "vocab": 300, "device": "cpu", "epochs": 1}
    data = write_rows(folder / "rows.jsonl", rows)
    train_reward(RewardConfig(data=str(data), out=str(folder / "rm"), **small), progress=Progress(quiet=True))
    return folder / "rm"


def settings(data, num, **knobs):
    values = {
        "data.path": f"{data.train}[:21]",
        "data.eval_path": str(data.eval),
        "eval.prompts": 11,
        "sampling.max_new_tokens": 8,
        "sampling.engine": "hf",
        "run.device": "cpu",
        "run.devices": num,
        "model.dtype": "float32",
    }
    return configs.load(None, values | {k.replace("__", "."): v for k, v in knobs.items()})


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize(("n", "temperature"), [(3, 1.0), (1, 0.0)])
def test_two_devices_sample_what_one_does(tiny_model_dir, tiny_data, tmp_path, n, temperature):
    for num in (1, 2):
        out = tmp_path / f"{num}.jsonl"
        sample(settings(tiny_data, num), str(tiny_model_dir), out, n=n, temperature=temperature)
    assert len(rows_of(tmp_path / "1.jsonl")) == 21 * n
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


@pytest.fixture(scope="module")
def rival(tmp_path_factory, tiny_model_dir):
    """Another model: weights of the first, doubled."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("rival")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.get_input_embeddings().weight.data.mul_(2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


def test_two_devices_evaluate_as_one(tiny_model_dir, tiny_data, tmp_path, rival, reward_model):
    found, asked = [], []
    for num in (1, 2):
        with endpoint(by_length) as server:
            judges = ("sum=scorers:by_id_sum", f"llm={server.spec}", f"rm={reward_model}")
            config = settings(tiny_data, num, eval__judges=judges)
            result = evaluate(config, str(tiny_model_dir), str(rival), tmp_path / str(num))
        assert {name: about.pop("spec") for name, about in result["judges"].items()}
        assert json.loads((tmp_path / str(num) / "eval.json").read_text(encoding="utf-8"))["num_prompts"] == 11
        asked.append(len(server.seen))
        found.append(result)
    one, two = (tmp_path / "1", tmp_path / "2")
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / FILES[0]).read_bytes() != (one / FILES[1]).read_bytes()
    for mine, others in zip(rows_of(one / "rows.jsonl"), rows_of(two / "rows.jsonl"), strict=True):
        scored = [k for k in mine if k.endswith("scores") or k == "duels"]
        assert len(scored) == 5
        for key in scored:
            rm = others[key].pop("rm")  # batches of a reward model differ, and with them a rounding
            assert rm == pytest.approx(mine[key].pop("rm"), rel=1e-4)
        assert mine == others
    for result in found:
        for side in result["contestants"]:
            assert set(side["judges"].pop("rm")) > {"num_judged", "win_rate", "score"}
        assert result["head_to_head"].pop("rm")["unjudged"] == 0
        result.pop("out")
    assert found[0] == found[1]
    assert "verdicts went with the position" in found[1]["judges"]["llm"]["notes"][0]
    assert asked[0] == asked[1] == 2 * 3 * 11  # both orders, of each contestant and head to head


def test_two_devices_judge_published_texts_as_one(tiny_data, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"Line {i * i}.\n" for i in range(16)))
    for num in (1, 2):
        config = settings(tiny_data, num, eval__judges="toy_annotator:letters")
        result = evaluate(config, str(texts), None, tmp_path / str(num))
        assert not result["contestants"][0]["sampled"]
    for name in ("eval.json", "rows.jsonl", "outputs.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def start(*args) -> subprocess.Popen:
    # a shell has its background processes ignore the signal, and this may be one
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    command = [sys.executable, "-P", "-m", "bpo_fast", *map(str, args)]
    return Forked(command, env=environment(), cwd=HERE, stderr=subprocess.PIPE, text=True, **default)


def options(command, model, data, out):
    shared = ["--device", "cpu", "--devices", 2, "--engine", "hf", "--max-new-tokens", 8, "--out", out]
    source = [model] if command == "eval" else ["--model", model]
    return [command, *source, "--data", data.eval, *shared]


@pytest.mark.parametrize(
    ("judge", "code", "message"),
    [
        ("fails_beside_rank_0", 2, "error: annotator fails_beside_rank_0: ValueError: no scores here"),
        ("dies_beside_rank_0", 1, "error: rank 1 ended with code 7: the last words"),
    ],
)
def test_what_ends_another_rank_ends_an_evaluation(tiny_model_dir, tiny_data, tmp_path, judge, code, message):
    out = tmp_path / "e"
    process = start(*options("eval", tiny_model_dir, tiny_data, out), "--judge", f"scorers:{judge}")
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == code, stderr
    *_, kept, last = stderr.splitlines()
    assert last.startswith(message)
    assert kept.startswith(f"kept in {out}: outputs.jsonl; judge these answers with ")
    assert "Traceback" not in stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("command", ["eval", "sample"])
def test_ctrl_c_ends_all_processes(tiny_model_dir, tiny_data, tmp_path, command):
    extra = ["--judge", "scorers:sleeps"] if command == "eval" else ["--n", 200]
    process = start(*options(command, tiny_model_dir, tiny_data, tmp_path / "out"), *extra)
    others, lines = ranks_of(process), []
    assert process.stderr
    for line in process.stderr:
        lines.append(line)
        if line.startswith(("judging: 0/", "sampling: 0/")) and "stopped" not in line:
            process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, "".join(lines)
    assert "Traceback" not in "".join(lines)
    if command == "eval":
        assert lines[-1].startswith(f"kept in {tmp_path / 'out'}: outputs.jsonl; judge these answers with ")
    else:
        assert not (tmp_path / "out").exists()
    assert_gone(others)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes of the other ranks, once they are there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        children = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        # a rank leads a session; a compiler, or a fork that is not yet a rank, does not
        if found := [pid for pid in children if os.getsid(pid) == pid]:
            return found
        time.sleep(0.05)
    raise AssertionError(f"no second process: {process.returncode}")


def test_the_devices_of_a_run_are_those_of_its_evaluation(tiny_data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = settings(tiny_data, 1000, task="helpfulness", model__path="none")
    (run / "config.toml").write_text(configs.to_toml(config))
    for args in (["eval", run], ["sample", "--model", run, "--data", tiny_data.eval, "--out", tmp_path / "s.jsonl"]):
        done = CliRunner().invoke(app, [*map(str, args)])
        assert done.exit_code == 2
        assert done.stderr.startswith(f"error: run.devices = 1000: this machine has {os.cpu_count()} cores")
        done = CliRunner().invoke(app, [*map(str, args), "--devices", "1"])
        assert "no complete checkpoint there" in done.stderr
