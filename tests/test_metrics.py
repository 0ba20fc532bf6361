import errno
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bpo_fast.metrics import Metrics, check_trackers, read_metrics

FAKE_WANDB = """
import json, pathlib
class Error(Exception): pass
class Run:
    def __init__(self, folder): self.file = (pathlib.Path(folder) / "fake-wandb.jsonl").open("a")
    def define_metric(self, name, step_metric): self.file.write(json.dumps([name, step_metric]) + "\\n")
    def log(self, values): self.file.write(json.dumps(values) + "\\n")
    def finish(self): self.file.close()
def init(**options):
    if options["name"] == "refused":
        raise Error("no API key configured\\nmore")
    (pathlib.Path(options["dir"]) / "fake-init.json").write_text(json.dumps(options))
    return Run(options["dir"])
"""


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    package = tmp_path / "site" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield
    sys.modules.pop("wandb", None)


def test_lines_are_exact_and_in_order(tmp_path):
    metrics = Metrics(tmp_path)
    values = {"loss": 0.1 + 0.2, "num_tokens": 2**60, "note": "é\n\x1b", "tiny": 5e-324}
    metrics.log("step", 3, values)
    metrics.log("phase", 3, {"phase": 1})
    assert metrics.num_lines == 2
    # Readable while the run goes on: every line is flushed.
    assert read_metrics(tmp_path) == [{"kind": "step", "step": 3} | values, {"kind": "phase", "step": 3, "phase": 1}]
    metrics.close()


def test_an_error_of_the_system_names_the_file(tmp_path):
    metrics = Metrics(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
        with pytest.raises(OSError) as caught:
            metrics.log("step", 1, {"loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "metrics.jsonl"))
    metrics.close()


def test_non_finite_values_are_null(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.log("step", 1, {"loss": math.nan, "grad_norm": math.inf, "fine": 1.0})
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "kind": "step",
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "fine": 1.0,
    }


def test_resume_keeps_what_the_checkpoint_counted(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.log("step", 1, {"loss": 1.0})
    metrics.log("step", 2, {"loss": 0.5})
    at_checkpoint = metrics.num_lines
    # The same step as the checkpoint, but after it: the resumed run writes it again.
    metrics.log("eval", 2, {"eval/when": "step"})
    metrics.log("step", 3, {"loss": 0.25})
    metrics.close()
    resumed = Metrics(tmp_path, keep_lines=at_checkpoint)
    assert resumed.num_lines == 2
    resumed.log("eval", 2, {"eval/when": "step"})
    resumed.close()
    assert [(line["kind"], line["step"]) for line in read_metrics(tmp_path)] == [("step", 1), ("step", 2), ("eval", 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("keep_lines", [None, 0, 1])
def test_torn_last_line_is_dropped(tmp_path, keep_lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "st')
    assert len(read_metrics(tmp_path)) == 1
    metrics = Metrics(tmp_path, keep_lines=keep_lines)
    metrics.log("step", 2, {})
    metrics.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == ([2] if keep_lines == 0 else [1, 2])


def test_too_few_lines_for_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.log("step", 1, {})
    metrics.close()
    with pytest.raises(ValueError, match=r"metrics.jsonl: has 1 lines, the checkpoint was taken after 2"):
        Metrics(tmp_path, keep_lines=2)
    assert len(read_metrics(tmp_path)) == 1


def test_nothing_logged_is_lost_to_a_kill(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from bpo_fast.metrics import Metrics\n"
        "metrics = Metrics(Path(sys.argv[1]))\n"
        "for step in range(7): metrics.log('step', step, {'loss': step / 7})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["loss"] for line in read_metrics(tmp_path)] == [step / 7 for step in range(7)]


def test_unknown_tracker(tmp_path):
    with pytest.raises(ValueError, match=r"run.report_to = 'mlflow': unknown tracker; known are tensorboard and wandb"):
        Metrics(tmp_path, ("mlflow",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_tracker_names_the_extra(name, monkeypatch):
    monkeypatch.setattr("bpo_fast.metrics.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'run.report_to = {name}: not installed; pip install "bpo-fast\[{name}\]"'):
        check_trackers((name,))


def test_wandb_gets_numbers_config_and_one_id(tmp_path, fake_wandb):
    (tmp_path / "config.toml").write_text('task = "tldr"\n[optim]\nlearning_rate = 1e-4\n')
    for keep_lines in (None, 1):
        metrics = Metrics(tmp_path, ("wandb", "wandb"), keep_lines=keep_lines)
        metrics.log("step", 4, {"loss": 0.5, "eval/when": "step"})
        metrics.close()
        options = json.loads((tmp_path / "fake-init.json").read_text())
        assert options["id"] == (tmp_path / "wandb-id").read_text()
        assert options["config"] == {"task": "tldr", "optim": {"learning_rate": 1e-4}}
    sent = [json.loads(line) for line in (tmp_path / "fake-wandb.jsonl").read_text().splitlines()]
    assert sent == [["*", "step"], {"loss": 0.5, "step": 4}] * 2


def test_wandb_that_refuses_is_one_clear_line(tmp_path, fake_wandb):
    run_dir = tmp_path / "refused"
    run_dir.mkdir()
    with pytest.raises(ValueError, match=r"^run.report_to = wandb: no API key configured \(WANDB_MODE=offline"):
        Metrics(run_dir, ("wandb",))


def test_tensorboard_forgets_what_was_logged_past_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, ("tensorboard",))
    for step in range(5):
        metrics.log("step", step, {"loss": 1.0 / (step + 1), "note": "text"})
    metrics.close()
    resumed = Metrics(tmp_path, ("tensorboard",), keep_lines=3)
    resumed.log("step", 3, {"loss": 9.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    # TensorBoard stores float32.
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == pytest.approx({0: 1.0, 1: 0.5, 2: 1 / 3, 3: 9.0})


def processes_with(word: str) -> list[str]:
    """Command lines of the processes that have a word in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended, or is not ours
            pass
    return found


def test_the_real_trackers_together_offline(tmp_path):
    """They call nobody, keep to the run folder and leave nothing running."""
    run_dir, home = tmp_path / "run", tmp_path / "home"
    run_dir.mkdir()
    home.mkdir()
    script = (
        "import sys; from pathlib import Path; from bpo_fast.metrics import Metrics\n"
        "metrics = Metrics(Path(sys.argv[1]), ('tensorboard', 'wandb'))\n"
        "metrics.log('step', 1, {'loss': 0.5}); metrics.close()\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        env = kept | {"HOME": str(home), "TMPDIR": str(home), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        env |= {"WANDB_BASE_URL": url, "http_proxy": url, "https_proxy": url, "no_proxy": ""}
        env |= {"WANDB_X_SERVICE_WAIT": "200"}  # seconds, on a busy machine
        subprocess.run([sys.executable, "-c", script, str(run_dir)], check=True, env=env, timeout=240)
        nobody.settimeout(0)
        with pytest.raises(BlockingIOError):
            nobody.accept()
    (record,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert b"loss" in record.read_bytes()
    assert list(run_dir.glob("tensorboard/events.*"))
    assert not [p for p in home.rglob("*") if p.name in (".netrc", "settings")], "no login and no key is written"
    deadline = time.monotonic() + 30
    while (running := processes_with(str(home))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running
