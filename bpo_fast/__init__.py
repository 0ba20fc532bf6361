"""bpo-fast: online preference optimisation against the behavior policy (BPO).

`from bpo_fast import Config, train` is the API under the command line.
"""

from typing import TYPE_CHECKING, Any

from bpo_fast.config import Config, load

if TYPE_CHECKING:
    from bpo_fast.train import train

__all__ = ["Config", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports `train`, and torch with it, on first use."""
    if name == "train":
        from bpo_fast.train import train

        return train
    raise AttributeError(f"module 'bpo_fast' has no attribute {name!r}")
