import pytest
import torch

from bpo_fast.loading import pick_device


@pytest.mark.parametrize(
    ("name", "main", "current"), [("cuda:1", True, 1), ("cuda:1", False, 0), ("cuda", True, 0), ("auto", True, 0)]
)
def test_a_main_device_is_the_current_one(name, main, current, monkeypatch):
    now = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: now.append(device.index))
    device = pick_device("run.device", name, main=main)
    assert device.type == "cuda"
    assert now[-1] == current
