"""bpo-fast: online preference optimisation against the behavior policy (BPO).

`from bpo_fast import Config, train` is the API under the command line.
"""

import sys
import types
from typing import TYPE_CHECKING, Any

from bpo_fast.config import Config, load

if TYPE_CHECKING:
    from bpo_fast.train import train

__all__ = ["Config", "load", "train"]


class _Package(types.ModuleType):
    """`bpo_fast.train` is the function: importing its module of the same name must not put the module there."""

    def __getattr__(self, name: str) -> Any:
        if name != "train":
            raise AttributeError(f"module 'bpo_fast' has no attribute {name!r}")
        from bpo_fast.train import train  # on first use, since it imports torch

        return train

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and isinstance(value, types.ModuleType):
            value = value.train
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
