"""A GPU for those who have none: runs a command whose torch.cuda is made of host memory.

`python tests/stand_in/stand_in.py bpo-fast train --device cuda ...`. The device is stand_in.cpp, what a CPU build of
PyTorch lacks in Python is in site/sitecustomize.py. Triton kernels run in the interpreter and flash attention in plain
PyTorch: nothing on it is fast, and no figure taken on it says anything about a GPU.
"""

import functools
import hashlib
import os
import sys
from pathlib import Path

import torch
from bpo_fast_kernels import build

HERE = Path(__file__).parent


@functools.cache
def library() -> Path:
    """The device, compiled unless the cache has it."""
    root, source = Path(torch.__file__).parent, HERE / "stand_in.cpp"
    folders = [root / "include", root / "include/torch/csrc/api/include"]
    command = [build.find_cxx(), "-std=c++20", "-O1", "-w", "-shared", "-fPIC", *(f"-I{folder}" for folder in folders)]
    facts = repr((source.read_bytes(), torch.__version__, command))
    target = build.cache_dir() / f"stand-in-{hashlib.sha256(facts.encode()).hexdigest()[:20]}.so"
    if not target.is_file():
        build.compile_library([*command, str(source), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"], target)
    return target


def environment() -> dict[str, str]:
    """That of a process which has the stand-in, and whose children have it."""
    path = os.pathsep.join(filter(None, [str(HERE / "site"), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "BPO_FAST_STAND_IN": str(library()), "TRITON_INTERPRET": "1"}


if __name__ == "__main__":
    os.execvpe(sys.argv[1], sys.argv[1:], environment())
