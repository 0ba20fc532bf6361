"""A card may be lent for minutes: something of every test comes first, and a device that broke ends no more than one.

A kernel that reads what is not its own breaks the device for its process, and every later test there would fail.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    """The first case of every test, then the second of each, and so on."""
    mine = [item for item in items if item.path.parent == Path(__file__).parent]
    seen, turns = Counter(), {}
    for item in mine:
        name = item.nodeid.partition("[")[0]
        turns[item] = seen[name]
        seen[name] += 1
    items[:] = [item for item in items if item not in turns] + sorted(mine, key=turns.__getitem__)


@pytest.fixture(autouse=True)
def _device_still_works():
    """pytest-xdist begins another worker in place of one that ends; what failed has been reported by then."""
    yield
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            raise
