"""What `bpo-fast sample` and `bpo-fast eval` take as a model: runs, checkpoints, adapters, models, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_world import write_rows
from typer.testing import CliRunner

from bpo_fast.checkpoint import complete_checkpoints
from bpo_fast.cli import app
from bpo_fast.source import run_of


def call(*args):
    """A command in this process: (exit code, standard output, standard error)."""
    done = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "160", "TERM": "dumb"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module", params=[1, 2], ids=["one member", "two members"])
def run(request, tmp_path_factory, tiny_args):
    folder = tmp_path_factory.mktemp("source") / "run"
    code, _, err = call(*tiny_args, "--members", request.param, "--out", folder)
    assert code == 0, err
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_a_run_in_every_form_gives_the_same_samples(run, tiny_data, tiny_model_dir, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    checkpoint = complete_checkpoints(run)[-1]
    shutil.copytree(checkpoint, adapter)
    assert call("export", run, "--out", merged)[0] == 0
    settings = ["--max-new-tokens", 8, "--device", "cpu", "--engine", "hf"]
    after = [(r["prompt"], r["output"]) for r in rows_of(run / "eval.jsonl") if r["when"] == "after"]
    # a run and its checkpoints say by themselves how they sample
    sources = [(run, []), (checkpoint, []), (adapter, settings), (merged, settings), (tiny_model_dir, settings)]
    for source, flags in sources:
        out = tmp_path / f"{source.name}.jsonl"
        args = ["--data", f"{tiny_data.eval}[:6]", "--temperature", 0, *flags, "--out", out]
        code, _, err = call("sample", "--model", source, *args)
        assert code == 0, err
        found = [(r["prompt"], r["completion"]) for r in rows_of(out)]
        assert (found == after) == (source != tiny_model_dir), source


def test_a_checkpoint_is_known_from_within_and_by_a_link(run, tmp_path, monkeypatch):
    checkpoint = complete_checkpoints(run)[-1]
    (tmp_path / "best").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint)
    assert [run_of(name) for name in (".", "../" + checkpoint.name, str(tmp_path / "best"))] == [run.resolve()] * 3
    for i, name in enumerate((".", tmp_path / "best")):
        out = tmp_path / f"merged-{i}"
        assert call("export", name, "--out", out) == (0, f"{out}\n", "")
    monkeypatch.chdir(run)
    assert run_of(".") == Path()


def test_rows_that_are_left_out_are_counted(tiny_model_dir, tiny_data, tmp_path):
    rows = rows_of(tiny_data.eval)[:2]
    data = write_rows(tmp_path / "rows.jsonl", [*rows, rows[0]])
    args = ["--model", tiny_model_dir, "--data", data, "--max-new-tokens", 2, "--engine", "hf"]
    code, _, err = call("sample", *args, "--out", tmp_path / "s.jsonl")
    assert (code, "2 prompts of 3 rows; left out: 1 repeated" in err) == (0, True), err


def test_flags_are_stronger_than_the_settings_of_the_run(run, tiny_data, tmp_path):
    out = tmp_path / "s.jsonl"
    args = ["--data", f"{tiny_data.eval}[:2]", "--max-new-tokens", 3, "--set", "data.max_prompt_length=100"]
    assert call("sample", "--model", run, *args, "--n", 4, "--out", out)[0] == 0
    assert max(r["num_tokens"] for r in rows_of(out)) == 3
    code, _, err = call("sample", "--model", run, *args, "--set", "data.max_promt_length=3", "--out", out)
    assert (code, "did you mean data.max_prompt_length?" in err) == (2, True)


@pytest.fixture
def sources(tmp_path, tiny_model_dir):
    """Folders by name, each with something wrong."""
    for name in ("plain", "checkpoint-4", "run", "torn", "bare", "baseless", "dora"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "config.toml").touch()
    adapter = {"base_model_name_or_path": str(tiny_model_dir), "r": 4, "lora_alpha": 8, "use_dora": True}
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    (tmp_path / "torn" / "adapter_config.json").write_text('{"r": ', encoding="utf-8")
    (tmp_path / "bare" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "baseless" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}', encoding="utf-8")
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain", "plain: not a model folder (no config.json), not an adapter (no adapter_config.json) and not a run"),
        ("checkpoint-4", "checkpoint-4: not a model folder (no config.json), not an adapter"),
        ("run", "run: no complete checkpoint there"),
        ("torn", "torn: adapter_config.json cannot be read: Expecting value"),
        ("bare", "bare: adapter_config.json names no r or no lora_alpha"),
        ("baseless", "baseless: adapter_config.json names no base model"),
        ("dora", "dora: use_dora in adapter_config.json is not supported; merge the adapter into a model folder"),
        ("file", "file: not a model folder (no config.json)"),
    ],
)
def test_what_is_no_model_is_named_in_one_line(sources, tiny_data, name, message):
    code, out, err = call("sample", "--model", sources / name, "--data", tiny_data.eval, "--out", sources / "s.jsonl")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (sources / "s.jsonl").exists()
