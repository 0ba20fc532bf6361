"""Weights in memory that another process maps."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from bpo_fast.engine.handover import Handover, handed_over

READ = """
import pickle, sys
for name, tensor in pickle.load(sys.stdin.buffer).weights():
    print(name, tensor.dtype, tuple(tensor.shape), tensor.double().sum().item())
    tensor.fill_(7)  # is seen by nobody else
"""


def test_another_process_reads_what_was_written():
    whole = torch.randn(6, 5)
    weights = {
        "a": torch.randn(3, 7, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "rows of a whole": whole[2:4],
        "turned": whole.t(),
        "flags": torch.tensor([True, False, True]),
    }
    with handed_over(weights.items()) as handover:
        for name, tensor in handover.weights():
            assert tensor.dtype == weights[name].dtype
            assert torch.equal(tensor, weights[name])
        done = subprocess.run(
            [sys.executable, "-c", READ], input=pickle.dumps(handover), capture_output=True, check=True, env=os.environ
        )
        assert done.stdout.decode().splitlines() == [
            f"{n} {t.dtype} {tuple(t.shape)} {t.double().sum().item()}" for n, t in weights.items()
        ]
        assert all(torch.equal(t, weights[n]) for n, t in handover.weights())
    assert not os.path.exists(handover.path)


def test_the_memory_goes_after_an_error_too():
    seen: list[Handover] = []

    def fail():
        with handed_over([("a", torch.zeros(4))]) as handover:
            seen.append(handover)
            raise KeyError("a")

    with pytest.raises(KeyError):
        fail()
    assert not os.path.exists(seen[0].path)
    with handed_over([]) as handover:
        assert list(handover.weights()) == []
