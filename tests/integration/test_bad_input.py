"""What a user can get wrong: exit code 2, one clear line that names the field and the value, nothing half-written."""

import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Forked
from safetensors import safe_open
from tiny_world import question, run_cli, write_rows
from typer.testing import CliRunner

from bpo_fast.checkpoint import complete_checkpoints, read_state
from bpo_fast.cli import app
from bpo_fast.config import load
from bpo_fast.metrics import read_metrics
from bpo_fast.pairs import read_pairs

ROWS = [{"prompt": question(i)} for i in range(8)]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch, without_drawings):
    monkeypatch.chdir(tmp_path)


def call(*args):
    """A command in this process: (exit code, lines of standard error)."""
    done = CliRunner().invoke(app, [str(a) for a in args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr.splitlines()


def refused(args, message, *, code=2):
    """Checks the exit code, and that one line, the last, is the error and holds `message`; returns that line."""
    found, lines = call(*args)
    assert found == code, lines
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert message in lines[-1]
    return lines[-1]


@pytest.fixture
def without_weights(monkeypatch):
    """Nothing is loaded that takes a while: a model, an engine."""
    monkeypatch.setattr("bpo_fast.setup.load_learner", None)


def with_option(args, name, value):
    """The arguments with another value of an option that they hold."""
    at = args.index(name)
    return [*args[: at + 1], str(value), *args[at + 2 :]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, "rows.jsonl: no such file or folder"),
        ("rows.jsonl", b"", "rows.jsonl: no rows"),
        ("rows.jsonl", b"\n\n", "rows.jsonl: no rows"),
        ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}', "rows.jsonl: line 2: invalid JSON: "),
        ("rows.jsonl", b'{"prompt": "a"}\n"b"', "rows.jsonl: line 2: not a JSON object"),
        ("rows.jsonl", b'{"prompt": "a"}\n{"text": "b"}', "rows.jsonl: row 2 has no prompt (column prompt)"),
        ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": " "}', "rows.jsonl: row 2 has no prompt"),
        ("rows.jsonl", b'{"prompt": 3}', "rows.jsonl: row 1: a prompt is text or messages"),
        ("rows.jsonl", b'{"prompt": 0}', "rows.jsonl: row 1: a prompt is text or messages"),
        ("rows.jsonl", b'{"prompt": "\xff"}', "rows.jsonl: not UTF-8 text"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-4], "rows.jsonl.gz: Compressed file ended"),
        ("rows.parquet", b"no parquet", "rows.parquet: not a Parquet file"),
        ("folder", None, "folder: no such file or folder"),
    ],
    ids=lambda v: str(v)[:40],
)
@pytest.mark.usefixtures("without_weights")
def test_bad_data(name, content, message, tiny_args, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused([*with_option(tiny_args, "--data", name), "--out", "new"], f"error: {message}")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("without_weights")
def test_no_usable_prompt(tiny_args, tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    args = [*with_option(tiny_args, "--data", "rows.jsonl"), "--max-prompt-tokens", "2", "--out", "new"]
    refused(args, "rows.jsonl: no usable prompt among 8 rows (8 over data.max_prompt_length = 2, 0 repeated")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("without_weights")
def test_bad_evaluation_data(tiny_args, tiny_data, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a"}\n{')
    refused([*with_option(tiny_args, "--eval-data", "eval.jsonl"), "--out", "new"], "eval.jsonl: line 2: invalid JSON")
    args = [*with_option(tiny_args, "--eval-data", tiny_data.train), "--out", "new"]
    refused(
        args, f"{tiny_data.train}: no usable prompt among 64 rows (0 over data.max_prompt_length = 64, 0 repeated, 64"
    )
    assert not (tmp_path / "new").exists()


def test_unknown_task(tiny_args, tmp_path):
    args = [*tiny_args, "--out", "new"]
    refused([*args, "--task", "helpfullness"], "error: task = 'helpfullness': no such task; did you mean helpfulness?")
    refused([*args, "--task", "x"], "error: task = 'x': no such task; known: helpfulness, tldr, harmlessness")
    assert not (tmp_path / "new").exists()


def damaged(model_dir, path, **changes):
    """A copy of the model with other text in, or without, some of its files."""
    shutil.copytree(model_dir, path)
    for name, text in changes.items():
        file = path / name.replace("__", ".")
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config__json": None}, "not a model folder (no config.json)"),
        ({"config__json": "{"}, "model.path = "),
        ({"config__json": '{"model_type": "nothing"}'}, "model.path = "),
        ({"config__json": '{"model_type": "bert"}'}, "weights are not there or do not fit, such as "),
        ({"model__safetensors": None}, "model.path = "),
        ({"model__safetensors": "damaged"}, "model.path = "),
        ({"tokenizer__json": "{"}, "model.path = "),
        ({"tokenizer__json": None, "tokenizer_config__json": None}, "model.path = "),
    ],
    ids=str,
)
def test_a_model_folder_that_is_not_one(changes, message, tiny_args, tiny_model_dir, tmp_path):
    path = damaged(tiny_model_dir, tmp_path / "model", **changes)
    line = refused([*with_option(tiny_args, "--model", path), "--out", "new"], message)
    assert f"model.path = {path}: " in line
    assert not (tmp_path / "new").exists()


def test_weights_that_do_not_fit_the_configuration(tiny_args, tiny_model_dir, tmp_path):
    config = json.loads((tiny_model_dir / "config.json").read_text())
    path = damaged(tiny_model_dir, tmp_path / "model", config__json=json.dumps(config | {"intermediate_size": 96}))
    message = "6 weights are not there or do not fit, such as model.layers.0.mlp.down_proj.weight"
    refused([*with_option(tiny_args, "--model", path), "--out", "new"], f"error: model.path = {path}: {message}")


def test_no_model_at_all(tiny_args, tmp_path):
    for name in ("nothing", "owner/nothing", tmp_path / "nothing"):
        refused([*with_option(tiny_args, "--model", name), "--out", "new"], f"error: model.path = {name}: ")
    assert not (tmp_path / "new").exists()


def test_a_vocabulary_that_does_not_fit_the_tokenizer(tiny_args, tiny_model_dir, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = LlamaConfig.from_pretrained(tiny_model_dir, vocab_size=300)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    message = f"error: model.path = {tmp_path / 'model'}: 300 embeddings for a tokenizer of 320 tokens"
    refused([*with_option(tiny_args, "--model", tmp_path / "model"), "--out", "new"], message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flag", "knob"),
    [
        ("--pairs", "method.pairs"),
        ("--batch-pairs", "method.batch_pairs"),
        ("--phases", "method.phases"),
        ("--members", "model.members"),
        ("--lora-r", "model.lora_r"),
        ("--max-prompt-tokens", "data.max_prompt_length"),
        ("--max-new-tokens", "sampling.max_new_tokens"),
    ],
)
@pytest.mark.parametrize("value", ["0", "-3"])
def test_zero_and_negative_sizes(flag, knob, value, tiny_args, tmp_path):
    refused([*tiny_args, f"{flag}={value}", "--out", "new"], f"error: {knob} = {value}: must be >= 1")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr", "0"], "optim.learning_rate = 0.0: must be > 0"),
        (["--beta", "much"], "method.beta = 'much': expected float"),
        (["--loss", "dppo"], "method.loss = 'dppo': not one of dpo, ipo, slic; did you mean dpo?"),
        (["--set", "method.bta=1"], "method.bta: no such knob; did you mean method.beta?"),
        (["--set", "method.beta"], "--set method.beta: expected NAME=VALUE"),
        (["--config", "none.toml"], "--config none.toml: No such file or directory"),
        (["--phases", "sometimes"], "method.phases = 'sometimes': a number of phases or on-policy"),
        (["--device", "tpu"], "run.device = tpu: not a device; auto, cpu, cuda or cuda:N"),
        (["--device", "meta"], "run.device = meta: not supported; auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "run.device = cuda:99: this machine has "),
        (["--report-to", "paper"], "run.report_to = 'paper': unknown tracker"),
        (
            ["--max-new-tokens", "200"],
            "data.max_prompt_length + sampling.max_new_tokens = 264: the model has 256 positions",
        ),
        (
            ["--set", "optim.microbatch_tokens=79"],
            "optim.microbatch_tokens = 79: one pair at the limits of length needs 80",
        ),
        (["--members", "3", "--set", "optim.microbatch_tokens=239"], "optim.microbatch_tokens = 239: one pair at"),
        (["--set", "model.lora_targets=q_prj"], "model.lora_targets = q_prj: no such linear layer"),
        (["--set", "model.adapters=nowhere"], "model.adapters = nowhere: "),
        (["--ref", "golden", "--set", "method.golden=nowhere"], "method.golden: model.path = nowhere: "),
        (
            ["--judge", "a=toy_annotator:letters", "--judge", "a=toy_annotator:same"],
            "eval.judges = a=toy_annotator:letters, ",
        ),
        (["--from-pairs", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--resume", "nowhere"], "nowhere: no run there (no config.toml)"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_settings(args, message, tiny_args, tmp_path):
    line = refused([*tiny_args, "--out", "new", *args], message)
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--phases", "7"], "method.phases = 7: 24 pairs in batches of 4 make only 6 optimizer steps"),
        (["--set", "data.chat_template=true"], "data.chat_template = true: the tokenizer has no chat template"),
        (["--annotator", "nowhere"], "reward model nowhere: "),
        (["--annotator", "nowhere:score"], "annotator nowhere:score: ModuleNotFoundError"),
        (["--judge", "scores.jsonl"], "annotator scores.jsonl: no such file"),
        (["--judge", "a=toy_annotator:lettrs"], "annotator toy_annotator:lettrs: module toy_annotator has no function"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
@pytest.mark.usefixtures("without_weights")
def test_what_needs_no_weights_is_said_before_they_are_loaded(args, message, tiny_args, tmp_path):
    assert refused([*tiny_args, "--out", "new", *args], message).startswith(f"error: {message}")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("without_weights")
def test_no_annotator(tiny_args, tmp_path):
    at = tiny_args.index("--annotator")
    refused(
        [*tiny_args[:at], *tiny_args[at + 2 :], "--out", "new"],
        "error: annotator.path: no annotator; name a reward model",
    )
    assert not (tmp_path / "new").exists()


def test_an_output_folder_that_is_taken(tiny_args, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('task = "tldr"')
    message = "error: run.output_dir = run: holds another run; go on with --resume, or choose another --out"
    refused([*tiny_args, "--out", "run"], message)
    assert (tmp_path / "run" / "config.toml").read_text() == 'task = "tldr"'
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    refused([*tiny_args, "--out", "full"], "error: run.output_dir = full: is not empty; choose another --out")
    refused([*tiny_args, "--out", "full/notes.txt"], "error: run.output_dir = full/notes.txt: is not a folder")
    refused([*tiny_args, "--out", "full/notes.txt/run"], "error: run.output_dir = full/notes.txt/run: is not a folder")
    assert {p.name for p in tmp_path.rglob("*")} == {"run", "config.toml", "full", "notes.txt"}


@pytest.mark.usefixtures("without_weights")
def test_an_output_folder_that_cannot_be_written(tiny_args, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    refused([*tiny_args, "--out", "new/run"], "error: new/run/config.toml: Permission denied")
    refused(tiny_args, "error: runs/config.toml: Permission denied")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("annotator", "message"),
    [
        ("toy_annotator:nan", "annotator nan: score nan for a completion of prompt "),
        ("toy_annotator:too_few", "annotator too_few: 5 scores for 6 completions"),
        ("toy_annotator:no_list", "annotator no_list: returned None, not a list of scores"),
        ("toy_annotator:words", "annotator words: score 'good' for a completion of prompt "),
        ("toy_annotator:raising", "annotator raising: KeyError: 'score of the reward service' ("),
    ],
)
def test_an_annotator_that_misbehaves(annotator, message, tiny_args, tmp_path):
    line = refused([*with_option(tiny_args, "--annotator", annotator), "--out", "new"], message)
    assert line.startswith("error: annotator ")
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"config.toml", "env.json", "metrics.jsonl"}


@pytest.mark.parametrize(("annotator", "fate"), [("none", "unscored"), ("same", "tied")])
def test_an_annotator_without_a_preference(annotator, fate, tiny_args, tmp_path):
    args = [
        *with_option(tiny_args, "--annotator", f"toy_annotator:{annotator}"),
        "--set",
        "eval.prompts=0",
        "--out",
        "new",
    ]
    line = refused(args, "error: phase 1: no pair left to train on (0 kept")
    assert f"12 {fate}" in line
    assert line.strip().endswith("see new/no-pairs.jsonl")
    names = {"config.toml", "env.json", "metrics.jsonl", "no-pairs.jsonl"}
    assert {p.name for p in (tmp_path / "new").iterdir()} == names
    assert [d.reason for d in read_pairs(tmp_path / "new" / "no-pairs.jsonl").dropped] == [fate] * 12


@pytest.mark.parametrize("refill", ["false", "true"])
def test_an_annotator_that_scores_nothing_ends_an_on_policy_run(refill, tiny_args):
    args = [*with_option(tiny_args, "--annotator", "toy_annotator:none"), "--phases", "on-policy"]
    args += ["--set", "eval.prompts=0", "--set", f"annotator.refill={refill}", "--pairs", "8", "--out", "new"]
    line = refused(args, "error: phase 1: no pair left to train on (0 kept")
    assert " 0 tied, 0 identical, 4 unscored" in line


def test_an_annotator_that_prefers_nothing_ends_an_on_policy_run(tiny_args, tmp_path):
    """A phase without pairs may be bad luck where it has one step; a run that trains on none is an error."""
    args = [*with_option(tiny_args, "--annotator", "toy_annotator:same"), "--phases", "on-policy"]
    line = refused([*args, "--set", "eval.prompts=0", "--out", "new"], "no pair left to train on (0 kept")
    assert " 0 unscored" in line
    phases = sorted((tmp_path / "new" / "pairs").iterdir())
    assert line.startswith(f"error: phase {len(phases) + 1}: ")
    assert len(phases) > 1


def test_a_run_goes_on_when_its_annotator_works_again(tiny_args, tmp_path, monkeypatch):
    module = tmp_path / "later_annotator.py"
    module.write_text("from toy_annotator import raising as score\n")
    args = [*with_option(tiny_args, "--annotator", "later_annotator:score"), "--set", "eval.prompts=0", "--out", "new"]
    refused(args, "error: annotator score: KeyError")
    monkeypatch.delitem(sys.modules, "later_annotator")
    module.write_text("from toy_annotator import letters as score  # works again\n")
    code, lines = call("train", "--resume", "new")
    assert code == 0, lines
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["pairs"]["kept"] == 24


@pytest.mark.parametrize("option", ["--model", "--annotator", "--judge"])
@pytest.mark.parametrize("path", ["../none/such", "./none", "/none/such"])
def test_a_path_to_nothing(option, path, tiny_args):
    args = with_option(tiny_args, option, path) if option in tiny_args else [*tiny_args, option, path]
    assert "no such folder" in refused([*args, "--out", "new"], f"{path}: ")


def test_missing_annotators(tiny_args, tmp_path):
    for spec, message in (
        ("no_such_module:score", "error: annotator no_such_module:score: ModuleNotFoundError"),
        (
            "toy_annotator:nothing",
            "error: annotator toy_annotator:nothing: module toy_annotator has no function nothing",
        ),
        ("labels.jsonl", "error: annotator labels.jsonl: no such file"),
        ("no-such-folder", "no-such-folder"),
    ):
        refused([*with_option(tiny_args, "--annotator", spec), "--out", "new"], message)
    assert not (tmp_path / "new").exists()


def test_a_loss_that_explodes_stops_the_run(tiny_args, tmp_path):
    args = [*tiny_args, "--lr", "1e30", "--set", "eval.prompts=0", "--set", "eval.kl_prompts=0", "--out", "new"]
    line = refused(args, "error: ", code=1)
    assert "not finite" in line or "NaN or infinite" in line


def whole(run):
    """Checks that every file of a run folder can be read to its end."""
    assert not [p for p in run.rglob("*") if p.name.endswith(".tmp")]
    load(run / "config.toml")
    for name in ("env.json", "summary.json"):
        if (run / name).exists():
            json.loads((run / name).read_text())
    if (run / "eval.jsonl").exists():
        assert len([json.loads(line) for line in (run / "eval.jsonl").read_text().split("\n")[:-1]]) in (6, 12)
    read_metrics(run)
    for path in (run / "pairs").glob("*"):
        read_pairs(path)
    for path in run.glob("checkpoint-*"):
        assert path in complete_checkpoints(run)
        read_state(path)
        for file in path.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                assert all(tensors.get_tensor(name).isfinite().all() for name in tensors.keys())  # noqa: SIM118


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory whose size can be set, where this process may mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)

    yield path, resize
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_at_any_stage_and_then_a_larger_one(small_disk, tiny_args):
    disk, resize = small_disk
    run = disk / "run"
    refused([*tiny_args, "--out", run], "No space left on device")
    shutil.rmtree(run, ignore_errors=True)
    args, stopped_at = [*tiny_args, "--out", run], set()
    for kib in (16, 24, 48, 80, 140, 200, 260, 320, 400):
        resize(f"{kib}k")
        code, lines = call(*args)
        if code == 0:
            break
        assert code == 2, lines
        assert re.fullmatch(r"error: .*: No space left on device", lines[-1]), lines[-1]
        if (run / "config.toml").exists():
            whole(run)
            args = ["train", "--resume", run]
            stopped_at.add(max([read_state(c).step for c in complete_checkpoints(run)], default=-1))
        else:
            shutil.rmtree(run, ignore_errors=True)
    resize("4m")
    if code:
        assert call(*args)[0] == 0
    whole(run)
    assert {-1, 3} <= stopped_at, "the disk was full before the first checkpoint and after it"
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


def test_a_file_that_may_not_grow(tiny_args, tmp_path, monkeypatch):
    """Where nothing can be mounted: a limit on the size of files, which the weights are the first to meet."""
    monkeypatch.setattr(signal, "SIGXFSZ", signal.SIGXFSZ)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        refused([*tiny_args, "--out", "new"], f"error: new/checkpoint-3: {os.strerror(27)}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    whole(tmp_path / "new")
    assert call("train", "--resume", "new")[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_may_not_be_written(tiny_args, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused([*tiny_args, "--out", "locked/run"], "error: locked/run: Permission denied")


def test_the_process_itself_prints_one_line_and_exits_with_2(tiny_args, tmp_path):
    done = run_cli([*tiny_args, "--out", "new", "--task", "nothing"], tmp_path, popen=Forked)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: task = 'nothing': no such task; known: helpfulness, tldr, harmlessness\n"
    assert list(tmp_path.iterdir()) == []
    done = run_cli([*with_option(tiny_args, "--data", "none.jsonl"), "--out", "new"], tmp_path, popen=Forked)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "error: none.jsonl: no such file or folder"
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_several_processes_of_a_launcher_are_refused(tiny_args, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(
        [*tiny_args, "--out", "run"],
        "WORLD_SIZE = 2: a run starts its processes itself",
    )
    assert not (tmp_path / "run").exists()
    for command in (["sft"], ["reward"], ["sample", "--model", "model"], ["eval", "model"]):
        refused([*command, "--data", "rows.jsonl", "--out", "run"], "WORLD_SIZE = 2: a run starts its processes itself")


def test_a_knob_by_its_name_in_vllm_is_refused(tiny_args):
    refused([*tiny_args, "--set", "sampling.tensor_parallel_size=2"], "sampling.tensor_parallel_size: no such knob")
