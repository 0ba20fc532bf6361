import io

import pytest
import torch
from rich.console import Console

from bpo_fast import doctor
from bpo_fast.engine import self_test as module
from bpo_fast.engine import versions
from bpo_fast.engine.probe import Probe
from bpo_fast.engine.self_test import self_test
from bpo_fast.engine.session import Session

CPU = torch.device("cpu")


def test_every_verdict_is_good_here():
    verdicts = {v.name: v for v in self_test(CPU)}
    assert list(verdicts) == ["version", "start", "one copy of the weights", "policy = sampler", "in-place updates"]
    assert all(v.ok for v in verdicts.values())
    assert versions.installed() in verdicts["version"].detail
    assert verdicts["one copy of the weights"].detail == "0 bytes copied at a refresh"


def test_a_vllm_that_does_not_start_or_does_not_follow_is_told(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(versions, "trouble", lambda: "vLLM is not installed")
        assert [(v.name, v.ok, v.auto_is_hf) for v in self_test(CPU)] == [("version", False, True)]
    with monkeypatch.context() as patch:
        patch.setattr(Session, "copy_weights", lambda self: 7)
        patch.setattr(Probe, "_trainer_logps", lambda self, drawn: torch.zeros(len(drawn), len(drawn[0])))
        failed = [v for v in self_test(CPU) if not v.ok]
        assert [v.name for v in failed] == ["policy = sampler"]


@pytest.mark.parametrize(
    ("place", "error", "verdict"),
    [
        ("bpo_fast.engine.held.find_views", AttributeError("gone"), ("start", "AttributeError: gone")),
        ("bpo_fast.engine.vllm.open_session", KeyError("q_proj"), ("start", "KeyError: 'q_proj'")),
        ("bpo_fast.engine.vllm.open_session", OSError(), ("start", "OSError:")),
        ("bpo_fast.engine.probe.Probe.run", IndexError("no\nrow"), ("policy = sampler", "IndexError: no row")),
        (
            "bpo_fast.engine.vllm.VllmEngine.generate",
            AssertionError("key"),
            ("policy = sampler", "AssertionError: key"),
        ),
    ],
)
def test_whatever_is_raised_is_a_verdict(monkeypatch, place, error, verdict):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(place, refuse)
    last = self_test(CPU)[-1]
    assert (last.name, last.detail, last.ok, last.auto_is_hf) == (*verdict, False, False)


def test_a_model_that_vllm_does_not_run_goes_to_transformers(monkeypatch):
    monkeypatch.setattr("bpo_fast.engine.session.unsupported", lambda model, device: "another attention")
    last = self_test(CPU)[-1]
    assert (last.name, last.ok, last.auto_is_hf) == ("start", False, True)
    assert "another attention" in last.detail


def test_doctor_runs_it(monkeypatch):
    console = Console(file=io.StringIO(), width=400)
    doctor.print_doctor(console)
    [line] = [line for line in console.file.getvalue().splitlines() if "vllm self-test" in line]
    assert line.startswith("ok")
    assert "0 bytes copied at a refresh" in line
    monkeypatch.setattr(module, "self_test", lambda device: [module.Verdict("start", False, "AttributeError: gone")])
    checks = {check.name: check for check in doctor.diagnose()}
    check = checks["vllm self-test"]
    assert (check.status, check.detail) == ("warn", "start: AttributeError: gone")
    assert "sampling.engine = hf" in check.advice
    assert (checks["sampling path"].status, checks["sampling path"].detail[:21]) == ("warn", "vllm, and a run fails")
    monkeypatch.delattr(module, "self_test")
    check = {check.name: check for check in doctor.diagnose()}["vllm self-test"]
    assert (check.status, check.detail[:16]) == ("warn", "does not import:")
