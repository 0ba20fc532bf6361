import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN, so that a number nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _one_thread():
    """Two, in place of the one thread of the other tests: the native kernels share their work."""
    torch.set_num_threads(2)
