"""A stage that was stopped goes on with the same command, and ends as if it had not been."""

import errno
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from forks import Forked
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_world import rows_of_stages, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from bpo_fast import reward, sft, stage_checkpoint, stages
from bpo_fast.progress import Progress
from bpo_fast.reward import RewardConfig, train_reward
from bpo_fast.sft import CompletionNll, SftConfig, train_sft
from bpo_fast.stage_checkpoint import checkpoint_folder
from bpo_fast.tokenizer import train_bpe

SMALL = {
    "hidden": 32,
    "layers": 2,
    "heads": 2,
    "vocab": 300,
    "device": "cpu",
    "batch_tokens": 200,
    "eval_fraction": 0.2,
}
NUM_STEPS = 6  # two epochs of three
QUIET = Progress(quiet=True)

pytestmark = pytest.mark.usefixtures("forked_ranks")


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", rows_of_stages())


def make_base(folder, **options):
    """A random model with a tokenizer of these rows."""
    tokenizer = train_bpe([text for row in rows_of_stages() for text in row.values()], vocab_size=300)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Heard(Progress):
    """Shows nothing, and keeps the lines of its own that are not of a task."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def print(self, message):
        self.lines.append(message)

    @property
    def of_checkpoints(self):
        return [line for line in self.lines if ".checkpoint" in line]


def run(stage, data, out, progress=QUIET, **changes):
    config_class, train = (SftConfig, train_sft) if stage == "sft" else (RewardConfig, train_reward)
    return train(config_class(data=str(data), out=str(out), **SMALL | {"epochs": 2} | changes), progress=progress)


@contextmanager
def interrupted_after(num, monkeypatch, signals=1):
    """SIGINT comes in the middle of step `num` of a process, as often as that."""
    take, taken = stages.Steps.take, []

    def counted(steps, batch):
        taken.append(batch)
        if len(taken) == num:
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)
        take(steps, batch)

    with monkeypatch.context() as patch:
        patch.setattr(stages.Steps, "take", counted)
        yield taken


def outcome(out):
    """All that must not depend on interrupts: weights, and what was measured."""
    weights = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")}
    [record] = [json.loads(path.read_text()) for path in out.glob("*.json") if path.name in ("sft.json", "reward.json")]

    def timeless(value):
        if isinstance(value, dict):
            timing = ("seconds", "tokens_per_s", "config")
            return {k: timeless(v) for k, v in value.items() if k not in timing}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return weights, timeless(record)


FORMS = {
    "sft": ("sft", {}),
    "reward": ("reward", {}),
    "narrow": ("sft", {"dtype": "bfloat16", "states": "8bit"}),
    "without held-out rows": ("sft", {"eval_fraction": 0}),
    "half an epoch": ("sft", {"epochs": 1.5}),
}


@pytest.mark.parametrize("form", FORMS)
def test_interrupted_at_any_step_it_ends_bit_for_bit(tmp_path, data, form, monkeypatch):
    stage, knobs = FORMS[form]
    run(stage, data, tmp_path / "whole", **knobs)
    expected = outcome(tmp_path / "whole")
    num_steps = sum(h["steps"] for h in (expected[1]["members"][0] if stage == "sft" else expected[1])["history"])
    assert num_steps > 3
    for step in (1, 3, 4, num_steps):
        out = tmp_path / f"stopped-{step}"
        with interrupted_after(step, monkeypatch), pytest.raises(KeyboardInterrupt):
            run(stage, data, out, **knobs)
        assert not out.exists()
        with interrupted_after(0, monkeypatch) as taken:
            run(stage, data, out, **knobs)
        assert len(taken) == num_steps - step
        assert outcome(out) == expected
        assert not checkpoint_folder(SftConfig(data="x", out=str(out))).exists()


FLOATS = {
    "sft": ("sft", {}),
    "reward": ("reward", {}),
    "8bit": ("sft", {"states": "8bit"}),
    "two members": ("sft", {"members": 2}),
    "no held-out rows": ("sft", {"eval_fraction": 0}),
    "two devices": ("sft", {"devices": 2}),
}


@pytest.mark.parametrize("form", FLOATS)
def test_weights_that_are_written_wider_were_not_rounded(tmp_path, data, form, monkeypatch):
    stage, knobs = FLOATS[form]
    knobs = knobs | {"dtype": "bfloat16"}
    run(stage, data, tmp_path / "narrow", **knobs)
    run(stage, data, tmp_path / "whole", save_dtype="float32", **knobs)
    with interrupted_after(NUM_STEPS, monkeypatch), pytest.raises(KeyboardInterrupt):
        run(stage, data, tmp_path / "out", **knobs)
    with monkeypatch.context() as patch:
        patch.setattr(f"bpo_fast.{stage}.save_model", interrupts(stages.save_model))
        with pytest.raises(KeyboardInterrupt):
            run(stage, data, tmp_path / "out", **knobs)
    run(stage, data, tmp_path / "out", save_dtype="float32", **knobs)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    for path in tmp_path.glob("whole/**/*.safetensors"):
        wide, narrow = load_file(path), load_file(tmp_path / "narrow" / path.relative_to(tmp_path / "whole"))
        for name, weight in wide.items():
            assert torch.equal(weight.bfloat16(), narrow[name])
            assert not torch.equal(weight, narrow[name].float())


def test_the_best_epoch_is_remembered(tmp_path, data, monkeypatch):
    def norms(nll, examples, batch_tokens):
        return sum(p.norm().item() for p in nll._model.parameters()), 1

    monkeypatch.setattr(CompletionNll, "sum", norms)  # which grow
    knobs = {"epochs": 3, "learning_rate": 0.01, "dtype": "bfloat16", "save_dtype": "float32"}
    result = run("sft", data, tmp_path / "whole", **knobs)
    assert result["members"][0]["best_epoch"] == 1
    with interrupted_after(NUM_STEPS + 1, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("sft", data, tmp_path / "out", **knobs)
    run("sft", data, tmp_path / "out", **knobs)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_seconds_are_of_the_epoch_that_had_begun(tmp_path, data, monkeypatch):
    with interrupted_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("sft", data, tmp_path / "out")
    path = tmp_path / "out.checkpoint" / "step-2" / "state.json"
    state = json.loads(path.read_text())
    assert 0 < state["seconds"] < 60
    path.write_text(json.dumps(state | {"seconds": 1000.0}))
    first, second = run("sft", data, tmp_path / "out")["members"][0]["history"]
    assert first["seconds"] > 1000 > 60 > second["seconds"]


def test_adapters_go_on(tmp_path, data, monkeypatch):
    knobs = {"model": make_base(tmp_path / "base"), "lora_r": 4, "members": 2}
    first, _ = run("sft", data, tmp_path / "whole", **knobs)["members"]
    num_steps = sum(h["steps"] for h in first["history"])
    with interrupted_after(num_steps + 2, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("sft", data, tmp_path / "out", **knobs)
    with interrupted_after(0, monkeypatch) as taken:
        run("sft", data, tmp_path / "out", **knobs)
    assert len(taken) == num_steps - 2  # the first member has ended, and is not trained again
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_dropout_draws_on(tmp_path, data, monkeypatch):
    knobs = {"model": make_base(tmp_path / "base", attention_dropout=0.3), "learning_rate": 0.01}
    run("sft", data, tmp_path / "whole", **knobs)
    with interrupted_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("sft", data, tmp_path / "out", **knobs)
    torch.manual_seed(7)
    run("sft", data, tmp_path / "out", **knobs)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_an_interrupt_while_it_is_measured_waits_for_the_numbers(tmp_path, data, monkeypatch):
    run("sft", data, tmp_path / "whole")
    end, num = stages.Steps.end_epoch, []

    def interrupted(steps):
        num.append(steps.num_taken)
        if len(num) == 2:
            signal.raise_signal(signal.SIGINT)
        return end(steps)

    with monkeypatch.context() as patch:
        patch.setattr(stages.Steps, "end_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("sft", data, tmp_path / "out")
    with interrupted_after(0, monkeypatch) as taken:
        run("sft", data, tmp_path / "out")
    assert not taken
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def interrupts(function):
    """The function, in which SIGINT comes."""

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    return interrupted


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_an_interrupt_after_the_last_step_keeps_what_was_trained(tmp_path, data, stage, monkeypatch):
    run(stage, data, tmp_path / "whole")
    for name in ["save_model"] + ["measure"] * (stage == "reward"):
        heard, out = Heard(), tmp_path / name
        with monkeypatch.context() as patch:
            module = {"sft": sft, "reward": reward}[stage]
            patch.setattr(module, name, interrupts(getattr(module, name)))
            with pytest.raises(KeyboardInterrupt):
                run(stage, data, out, progress=heard)
        assert heard.of_checkpoints == [f"stopped: the same command goes on from {out}.checkpoint/step-{NUM_STEPS}"]
        with interrupted_after(0, monkeypatch) as taken:
            run(stage, data, out)
        assert not taken
        assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("place", ["bpo_fast.stage_checkpoint.save_file", "bpo_fast.sft.save_model"])
def test_an_interrupt_between_members_keeps_the_first(tmp_path, data, place, monkeypatch):
    run("sft", data, tmp_path / "whole", members=2)
    with monkeypatch.context() as patch:
        patch.setattr(place, interrupts(pkgutil.resolve_name(place)))
        with pytest.raises(KeyboardInterrupt):
            run("sft", data, tmp_path / "out", members=2)
    with interrupted_after(0, monkeypatch) as taken:
        run("sft", data, tmp_path / "out", members=2)
    assert len(taken) == NUM_STEPS
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_a_second_interrupt_does_not_wait(tmp_path, data, monkeypatch, capfd):
    with interrupted_after(2, monkeypatch, signals=2) as taken, pytest.raises(KeyboardInterrupt):
        run("sft", data, tmp_path / "out")
    assert len(taken) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    with interrupted_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
        train_sft(SftConfig(data=str(data), out=str(tmp_path / "out"), **SMALL))  # which prints
    said = capfd.readouterr().err
    assert "stopping after this step, with a checkpoint; a second interrupt stops at once" in said
    assert f"stopped: the same command goes on from {tmp_path / 'out.checkpoint' / 'step-2'}" in said


def test_a_checkpoint_of_something_else_is_named(tmp_path, data, monkeypatch):
    out = tmp_path / "out"
    with interrupted_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("sft", data, out)
    begun = f"{out}.checkpoint was begun with"
    with pytest.raises(ValueError, match=rf"^sft\.learning_rate = 0.5: {begun} None; go on with those, or remove it"):
        run("sft", data, out, learning_rate=0.5)
    with monkeypatch.context() as patch:  # as auto is on a GPU
        patch.setattr("bpo_fast.sft.working_dtype", lambda dtype, device: torch.bfloat16)
        with pytest.raises(ValueError, match=rf"^sft\.dtype = auto: {begun} float32; go on with those"):
            run("sft", data, out)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[:-1], lines[0]]))
    with pytest.raises(ValueError, match=rf"^sft\.data = {data}: {begun} other rows; go on"):
        run("sft", data, out)
    data.write_text("".join(lines))
    result = run("sft", data, out, microbatch_tokens=60, gradient_checkpointing=True, save_dtype="bfloat16")
    assert sum(h["steps"] for h in result["members"][0]["history"]) == NUM_STEPS
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_members_and_one_model_do_not_take_each_others_checkpoint_away(tmp_path, data, monkeypatch):
    for kept, other in ((1, 2), (2, 1)):
        out = tmp_path / f"out-{kept}"
        with interrupted_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
            run("sft", data, out, members=kept)
        with pytest.raises(
            ValueError, match=rf"^sft\.members = {other}: {out}.checkpoint was begun with {kept}; go on"
        ):
            run("sft", data, out, members=other)


def test_a_checkpoint_of_another_command_is_named(tmp_path, data, monkeypatch):
    out = tmp_path / "out"
    with interrupted_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("sft", data, out)
    with pytest.raises(ValueError, match=rf"^reward\.out = {out}: {out}.checkpoint is of bpo-fast sft; finish that"):
        run("reward", data, out)


def add_to(path, name, change):
    """Adds a little to one weight of a model folder."""
    weights = load_file(path)
    weights[name] = weights[name].clone()
    weights[name].view(-1)[0] += change
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("stage", "knobs"), [("sft", {"lora_r": 2, "members": 2}), ("sft", {}), ("reward", {})])
def test_what_was_exchanged_under_the_same_names_is_named(tmp_path, data, stage, knobs, monkeypatch):
    base, out, begun = tmp_path / "base", tmp_path / "out", f"{tmp_path}/out.checkpoint was begun with"
    make_base(base)
    shutil.copytree(base, tmp_path / "kept")
    held_out = write_rows(tmp_path / "dev.jsonl", rows_of_stages()[:9])
    knobs |= {"model": str(base), "eval_data": str(held_out)}
    with interrupted_after(NUM_STEPS + 2, monkeypatch), pytest.raises(KeyboardInterrupt):
        run(stage, data, out, epochs=3, **knobs)
    write_rows(held_out, rows_of_stages()[:8])
    with pytest.raises(ValueError, match=rf"^{stage}\.eval_data = {held_out}: {begun} other rows; go on with those"):
        run(stage, data, out, epochs=3, **knobs)
    write_rows(held_out, rows_of_stages()[:9])
    add_to(base / "model.safetensors", "model.layers.1.mlp.up_proj.weight", 0.01)
    with pytest.raises(ValueError, match=rf"^{stage}\.model = {base}: {begun} other weights; go on"):
        run(stage, data, out, epochs=3, **knobs)
    shutil.copy(tmp_path / "kept" / "model.safetensors", base)
    tokenizer = base / "tokenizer.json"
    settings = json.loads(tokenizer.read_text())
    settings["model"]["merges"].pop()
    tokenizer.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"^{stage}\.model = {base}: {begun} another tokenizer; go on"):
        run(stage, data, out, epochs=3, **knobs)
    shutil.copy(tmp_path / "kept" / "tokenizer.json", base)
    run(stage, data, out, epochs=3, **knobs)


def test_a_row_that_was_held_out_of_the_data_counts_too(tmp_path, data, monkeypatch):
    with interrupted_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("reward", data, tmp_path / "out", tokenizer=make_base(tmp_path / "base"))
    rows = rows_of_stages()
    _, held_out = stages.split_by_prompt([row["prompt"] for row in rows], SMALL["eval_fraction"], seed=42)
    rows[held_out[0]]["rejected"] = "a melon"
    write_rows(data, rows)
    with pytest.raises(ValueError, match=rf"^reward\.data = {data}: .* other rows"):
        run("reward", data, tmp_path / "out", tokenizer=str(tmp_path / "base"))


def test_out_may_be_spelled_anew_and_be_a_link(tmp_path, data, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with interrupted_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("sft", data, tmp_path / "link")
    with interrupted_after(0, monkeypatch) as taken:
        run("sft", data, f"{tmp_path}/./link/")
    assert len(taken) == NUM_STEPS - 2
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").exists()


def test_a_second_command_does_not_disturb_the_first(tmp_path, data, monkeypatch):
    out, take = tmp_path / "out", stages.Steps.take

    def with_another(steps, batch):
        monkeypatch.setattr(stages.Steps, "take", take)
        with pytest.raises(ValueError, match=rf"^sft\.out = {out}: another command is writing it$"):
            run("sft", data, out)
        take(steps, batch)

    monkeypatch.setattr(stages.Steps, "take", with_another)
    run("sft", data, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_a_place_that_cannot_be_written_is_named(tmp_path, data):
    (tmp_path / ".out.lock").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        run("sft", data, tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out")


def test_checkpoints_come_by_the_clock_and_replace_each_other(tmp_path, data, monkeypatch):
    out, seen = tmp_path / "out", []
    take = stages.Steps.take

    def watched(steps, batch):
        seen.append(sorted(path.name for path in tmp_path.glob("out.checkpoint/*")))
        take(steps, batch)

    monkeypatch.setattr(stages.Steps, "take", watched)
    run("sft", data, out, save_minutes=1e-9)
    assert seen == [[], *([f"step-{num}"] for num in range(1, NUM_STEPS))]
    seen.clear()
    shutil.rmtree(out)
    run("sft", data, out, save_minutes=0)
    assert not any(seen)


@contextmanager
def full_disk(monkeypatch, times):
    """The disk is full when these checkpoints, counted from 1, are written; safetensors has an error of its own."""
    save, num = stage_checkpoint.save_file, []

    def save_or_fail(tensors, path):
        is_weights = path.name == stage_checkpoint.WEIGHTS
        num.extend([path] if is_weights else [])
        if is_weights and len(num) in times:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(stage_checkpoint, "save_file", save_or_fail)
        yield


def test_a_full_disk_does_not_end_the_training(tmp_path, data, monkeypatch):
    seen, heard = [], Heard()
    take = stages.Steps.take

    def watched(steps, batch):
        seen.append(sorted(path.name for path in tmp_path.glob("out.checkpoint/*")))
        take(steps, batch)

    run("sft", data, tmp_path / "whole")
    monkeypatch.setattr(stages.Steps, "take", watched)
    with full_disk(monkeypatch, [1, 3, 4]):
        run("sft", data, tmp_path / "out", progress=heard, save_minutes=1e-9)
    assert seen[:5] == [[], [], ["step-2"], ["step-2"], ["step-4"]]  # the fourth was after the epoch
    then = "training goes on, with another try in 1e-09 minutes"
    failed = f"{tmp_path / 'out.checkpoint'}: No space left on device: step {{}} is not kept; {then}"
    assert heard.of_checkpoints == [failed.format(step) for step in (1, 3, 3)]
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_a_full_disk_at_an_interrupt_leaves_the_checkpoint_of_before(tmp_path, data, monkeypatch):
    heard, kept = Heard(), tmp_path / "out.checkpoint"
    for step, older in ((2, None), (3, "step-2")):
        if older:
            with interrupted_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
                run("sft", data, tmp_path / "out")
        heard.lines.clear()
        stopped = interrupted_after(1 if older else 2, monkeypatch)
        with stopped, full_disk(monkeypatch, [1]), pytest.raises(KeyboardInterrupt):
            run("sft", data, tmp_path / "out", progress=heard)
        said = [f"{kept}: No space left on device: step {step} is not kept"]
        said += [f"stopped: the same command goes on from {kept / older}"] if older else []
        assert heard.of_checkpoints == said
        assert [path.name for path in kept.glob("*")] == ([older] if older else [])
        assert kept.exists() == bool(older)


def test_no_room_for_what_is_written_leaves_the_checkpoint(tmp_path, data, monkeypatch):
    def no_room(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    heard, out = Heard(), tmp_path / "out"
    with interrupted_after(NUM_STEPS, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("sft", data, out)
    with monkeypatch.context() as patch:
        patch.setattr("bpo_fast.sft.save_model", no_room)
        with pytest.raises(OSError, match=f"No space left on device: '{out}'"):
            run("sft", data, out, progress=heard)
    assert heard.of_checkpoints == [f"stopped: the same command goes on from {out}.checkpoint/step-{NUM_STEPS}"]
    with interrupted_after(0, monkeypatch) as taken:
        run("sft", data, out)
    assert not taken


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path, data):
    def start(out):
        knobs = SMALL | {"epochs": 8, "save_minutes": 1e-9}
        flags = [part for name, value in knobs.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "bpo_fast", "sft", "--data", str(data), "--out", str(out), *flags]
        return Forked(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    out, reached = tmp_path / "out", 0
    for _ in range(3):
        process, deadline = start(out), time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            steps = [int(path.name[5:]) for path in tmp_path.glob("out.checkpoint/step-*")]
            if max(steps, default=0) >= reached + 4:
                break
        process.kill()
        process.wait()
        steps = [int(path.name[5:]) for path in tmp_path.glob("out.checkpoint/step-*")]
        assert max(steps) > reached
        reached = max(steps)
    assert start(out).wait() == 0
    assert outcome(out) == outcome(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl", "whole"]


def test_a_device_that_cannot_save_does_not_end_the_training(tmp_path, data, monkeypatch):
    folder_of = stage_checkpoint.new_folder

    @contextmanager
    def crowded(path):
        with folder_of(path) as folder:
            if path.name == "step-2":
                (folder / "optimizer-1-of-2.safetensors").mkdir()
            yield folder

    monkeypatch.setattr(stage_checkpoint, "new_folder", crowded)
    heard = Heard()
    with interrupted_after(4, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("sft", data, tmp_path / "out", progress=heard, devices=2, save_minutes=1e-9)
    failed, stopped = heard.of_checkpoints
    assert failed.startswith(f"{tmp_path / 'out.checkpoint'}: Is a directory: step 2 is not kept; training goes on")
    assert stopped == f"stopped: the same command goes on from {tmp_path / 'out.checkpoint' / 'step-4'}"


@pytest.mark.parametrize("devices", [2, 1])
def test_two_devices_are_interrupted_and_go_on(tmp_path, data, devices, monkeypatch):
    knobs = {"epochs": 3}
    run("sft", data, tmp_path / "whole", devices=2, **knobs)
    with interrupted_after(4, monkeypatch), pytest.raises(KeyboardInterrupt):
        run("sft", data, tmp_path / "out", devices=2, **knobs)
    [kept] = (tmp_path / "out.checkpoint").iterdir()
    assert sorted(path.name for path in kept.glob("optimizer*")) == [
        "optimizer-0-of-2.safetensors",
        "optimizer-1-of-2.safetensors",
    ]
    run("sft", data, tmp_path / "out", devices=devices, **knobs)
    (weights, record), (whole, expected) = outcome(tmp_path / "out"), outcome(tmp_path / "whole")
    if devices == 2:
        assert (weights, record) == (whole, expected)
    else:
        assert record["members"][0]["held_out_loss"] == pytest.approx(expected["members"][0]["held_out_loss"], rel=1e-4)
