"""Ranks: what is dealt comes back whole, sums are the same everywhere, and nobody waits for a rank that is gone."""

import json
import subprocess
import sys
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from forks import Forked

from bpo_fast import config as configs
from bpo_fast.loop import Loop
from bpo_fast.ranks import Devices, Group, Ranks, started
from bpo_fast.setup import devices_of

RANK = """
import json, sys, time
from pathlib import Path
import torch
from bpo_fast.ranks import Group

rank, size, meeting = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

def look():
    if meeting.with_name("gone").exists():
        raise RuntimeError("rank 1 is gone")

group = Group(rank, size, meeting, look)
group.connect(torch.device("cpu"))
"""
SUMS = """
items = list(range(11))
share = group.share(items, lambda i: i % 4)
whole = share.gather([{"of": rank, "item": item, "text": "\\u00e9" * item} for item in share.mine])
tensors = [torch.full((3, 2), rank + 0.5, dtype=t) for t in (torch.float32, torch.bfloat16, torch.float64)]
tensors += [torch.tensor(1.0), torch.full((5,), 2.0**rank)]
view = torch.zeros(4, 4)
tensors.append(view.T[1:].add_(rank))  # not contiguous
group.sum_(tensors)
group.check_same(tensors)
tensors[1][0, 0] += rank == 1
try:
    group.check_same(tensors)
except RuntimeError as error:
    strange = str(error)
group.check_alike("sampling.engine", "hf")
try:
    group.check_alike("sampling.engine", "hf" if rank else "vllm")
except ValueError as error:
    unlike = str(error)
group.wait()
sums = [t.double().flatten().tolist() for t in tensors]
print(json.dumps({"mine": share.mine, "whole": whole, "sums": sums, "strange": strange, "unlike": unlike}))
"""
EXCHANGE = """
from bpo_fast import ranks
ranks.EXCHANGED_BYTES = 64
shapes = [((5, 3), torch.float32), ((7,), torch.bfloat16), ((0, 4), torch.float32), ((), torch.float64)]
shapes += [((40,), torch.int8)]
whole = [torch.arange(1, 1 + int(torch.tensor(s).prod())).reshape(s).to(t) for s, t in shapes]
bounds = [[min(r * -(-len(t.view(-1)) // size), len(t.view(-1))) for r in range(size + 1)] for t in whole]
mine = [torch.full_like(t, -1) for t in whole]
whole.append(torch.arange(1, 22).view(7, 3))
mine.append(torch.full((3, 7), -1).T)  # not contiguous
bounds.append([min(r * -(-21 // size), 21) for r in range(size + 1)])
for tensor, right, ends in zip(mine, whole, bounds):
    own = slice(ends[rank], ends[rank + 1])
    row = tensor.flatten()
    row[own] = right.view(-1)[own]
    tensor.copy_(row.view_as(tensor))
group.exchange_(mine, bounds)
print(json.dumps([torch.equal(a, b) for a, b in zip(mine, whole)]))
"""
SAVE = """
folder = meeting.parent
done = []

def save(folder, step):
    time.sleep(0.2)
    (folder / f"of-{rank}-{step}").write_text("x" if step != 9 else str(1 / 0))

def orders():
    while True:
        found = sorted(folder.glob("order-*"))
        if len(found) > len(done):
            done.append(found[len(done)])
            yield json.loads(done[-1].read_text())
        time.sleep(0.01)

def tell(order):
    new = folder / ".new"
    new.write_text(json.dumps(order))
    new.rename(folder / f"order-{order['step']}")

group._tell, group._orders = tell, orders()
group.on_save(save)
if rank == 0:
    seen = []
    for step in (3, 5):
        group.save(folder, step)
        seen.append(sorted(p.name for p in folder.glob("of-*")))
    print(json.dumps(seen))
group.wait()  # the others answer while they are in here
"""
GONE = """
if rank == 1:
    group.wait()
    meeting.with_name("gone").touch()
    sys.exit()
group.wait()
try:
    group.gather("x" * 10**6)
    group.gather("y")
except RuntimeError as error:
    print(json.dumps(str(error)))
"""


def together(code: str, size: int, folder) -> list:
    """What the ranks print that run the code; None for nothing."""
    command = [sys.executable, "-c", RANK + code]
    ranks = [
        Forked([*command, str(rank), str(size), str(folder / "meeting")], stdout=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size
    return [json.loads(text) if text else None for text in said]


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_dealt_comes_back_and_sums_are_the_same(tmp_path, size):
    said = together(SUMS, size, tmp_path)
    assert sorted(item for rank in said for item in rank["mine"]) == list(range(11))
    assert all(rank["mine"] == sorted(rank["mine"]) for rank in said)
    owner = {item: rank for rank, each in enumerate(said) for item in each["mine"]}
    whole = [{"of": owner[item], "item": item, "text": "é" * item} for item in range(11)]
    total = sum(rank + 0.5 for rank in range(size))
    for rank, each in enumerate(said):
        assert each["whole"] == whole
        narrow = [total] * 6
        if rank == 1:
            narrow[0] += 1
        assert each["sums"][:3] == [[total] * 6, narrow, [total] * 6]
        assert each["sums"][3:5] == [[size], [2.0**size - 1] * 5]
        assert each["sums"][5] == [sum(range(size))] * 12
        assert each["unlike"].startswith("sampling.engine: vllm on rank 0, hf on rank 1")
        assert each["strange"] == "the weights of rank 1 are not those of rank 0"


@pytest.mark.parametrize("size", [2, 3])
def test_pieces_of_any_type_reach_all_ranks(tmp_path, size):
    assert together(EXCHANGE, size, tmp_path) == [[True] * 6] * size


def test_others_save_whatever_they_are_doing(tmp_path):
    said = together(SAVE, 3, tmp_path)
    assert said[0] == [["of-1-3", "of-2-3"], ["of-1-3", "of-1-5", "of-2-3", "of-2-5"]]


def test_a_save_that_fails_ends_its_rank(tmp_path):
    code = RANK + SAVE.replace("(3, 5)", "(9,)")
    ranks = [
        Forked(
            [sys.executable, "-c", code, str(rank), "2", str(tmp_path / "meeting")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = ranks[1].communicate(timeout=120)[1]
    (tmp_path / "gone").touch()  # as rank 0 would see it
    assert "RuntimeError: rank 1 is gone" in ranks[0].communicate(timeout=120)[1]
    assert ranks[1].returncode == 1
    assert "ZeroDivisionError" in said


def test_orders_are_not_what_a_program_reads_that_a_rank_starts():
    code = """
import os, subprocess, sys
from bpo_fast.rank_worker import _orders
orders = _orders()
print(next(orders), subprocess.check_output(["cat"]), sys.stdin.read(), next(orders))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write('{"step": 1}\n{"step": 2}\n')
        process.stdin.flush()  # and it stays open, as rank 0 keeps it
        assert process.wait(60) == 0
        assert process.stdout.read() == "{'step': 1} b''  {'step': 2}\n"
    finally:
        process.kill()
        process.wait()


def test_nobody_waits_for_a_rank_that_is_gone(tmp_path):
    assert together(GONE, 2, tmp_path)[0] == "rank 1 is gone"


def test_shares_are_of_like_sizes():
    ranks = Ranks()
    ranks.size = 4
    sizes = [3, 90, 5, 70, 60, 8, 80, 1, 2, 100, 7, 4]
    shares = []
    for ranks.rank in range(4):
        shares.append(ranks.share(sizes, lambda size: size).mine)
    assert sorted(size for share in shares for size in share) == sorted(sizes)
    assert sorted(map(sum, shares)) == [100, 100, 100, 130]


def test_one_alone_keeps_everything_as_it_is():
    ranks = Ranks()
    share = ranks.share([3, 1, 2], lambda item: item)
    assert share.mine == [3, 1, 2]
    values = [(1,), (2,), (3,)]
    assert share.gather(values) == values  # and no JSON, whose lists they would be
    tensor = torch.ones(2)
    ranks.sum_([tensor])
    ranks.check_same([tensor])
    assert tensor.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("kill -9 $$", "rank 1 ended with signal 9$"),
        ("exit 3", "rank 1 ended with code 3$"),
        ("echo last words >&2; exit 0", "rank 1 ended with code 0: last words$"),
    ],
)
def test_how_another_rank_has_ended_is_said(tmp_path, monkeypatch, end, message):
    worker = tmp_path / "worker"
    worker.write_text(f"#!/bin/sh\nread order\n{end}\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    with pytest.raises(RuntimeError, match=message), started(Devices(2, "cpu", "run"), {"name": "train"}) as ranks:
        ranks.connect(torch.device("cpu"))


def test_other_ranks_are_told_the_device_and_do_not_look_for_one(tmp_path, monkeypatch):
    worker = tmp_path / "worker"
    worker.write_text(f"#!/bin/sh\ncat > {tmp_path}/order\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with started(Devices(2, "auto", "run"), {"name": "train"}):
        pass
    assert json.loads((tmp_path / "order").read_text())["device"] == "cpu"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"run.devices": 1000}, "run.devices = 1000: this machine has"),
        ({"run.devices": 2, "run.device": "cuda:1"}, "not with run.device = cuda:1"),
        ({"run.devices": 2, "sampling.tensor_parallel": 2}, "not with sampling.tensor_parallel = 2"),
    ],
)
def test_what_does_not_go_is_said_before_a_process_starts(knobs, message):
    config = configs.load(None, {"run.device": "cpu"} | knobs)
    with pytest.raises(ValueError, match=message), started(devices_of(config), {"name": "train"}):
        pass


def test_moments_are_saved_once_their_step_is_taken(monkeypatch, tmp_path):
    """Rank 0 can be a step ahead of what another has written down."""
    loop, saved = object.__new__(Loop), []
    loop.num_steps, loop._ranks, loop._parts = 2, Ranks(), SimpleNamespace(optimizer=None)
    monkeypatch.setattr("bpo_fast.loop.save_moments", lambda *given: saved.append(loop.num_steps))
    thread = threading.Thread(target=loop._save_moments, args=(tmp_path, 3))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    loop.num_steps = 3
    thread.join(10)
    assert saved == [3]


@pytest.mark.parametrize(("name", "number"), [("cuda", 0), ("cuda:1", 1)])
def test_connections_between_gpus_are_of_numbered_devices(monkeypatch, tmp_path, name, number):
    """That of a device without a number would be found by no sum, which would connect once more."""

    class Nccl:
        Options = SimpleNamespace

        def __init__(self, *args):
            self.eager_connect_single_device = connected.append

        def abort(self):
            pass

    connected = []
    monkeypatch.setattr("torch.distributed.ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    with closing(Group(0, 1, tmp_path / "meeting")) as group:
        group.connect(torch.device(name))
    assert connected == [torch.device("cuda", number)]
