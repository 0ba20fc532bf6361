"""Imported by Python at its start: plugs the stand-in in where $BPO_FAST_STAND_IN names its library (stand_in.py)."""

import contextlib
import ctypes
import importlib.util
import os
import runpy
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).parents[2]  # not on the path: it has folders of the names of packages


def plug_in(library: str) -> None:
    """Load the device, before torch asks for its accelerators, and what torch.cuda and Triton need of it."""
    folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)
    import torch

    for name, value in cuda_functions(torch.ops.stand_in).items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    attention = torch.library.Library("aten", "IMPL")
    attention.impl("_flash_attention_forward", flash_forward, "CUDA")
    attention.impl("_flash_attention_backward", flash_backward, "CUDA")
    torch.stand_in_attention = attention  # lives as long as torch does
    make_the_interpreter_a_gpu()


class Stream:
    """The one stream: everything is done when it returns."""

    cuda_stream = 0

    def __init__(self, *args, **options):
        import torch

        self.device = torch.device("cuda", 0)

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True


class Event:
    """A moment of the host's clock."""

    def __init__(self, *args, **options):
        self.at = 0.0

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


# what makes the host wait for the device: 0 is allowed, 1 warned of, 2 an error
waits = 0


def set_sync_debug_mode(mode):
    import torch

    global waits
    waits = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)
    torch.ops.stand_in.set_waits(waits)


@contextlib.contextmanager
def waiting_for_a_kernel():
    """What the stand-in's own kernels do on the host is no wait."""
    import torch

    torch.ops.stand_in.set_waits(0)
    try:
        yield
    finally:
        torch.ops.stand_in.set_waits(waits)


def cuda_functions(ops):
    """Of torch.cuda, for one device of compute capability 9.0; a function each, as torch.compile wants it."""
    facts = SimpleNamespace(name="Stand-in", major=9, minor=0, total_memory=ops.limit(), multi_processor_count=8)
    stream = Stream()
    answers = {
        **dict.fromkeys(("_lazy_init", "init", "set_device", "synchronize", "empty_cache", "set_stream"), None),
        **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
        **dict.fromkeys(("current_stream", "default_stream"), stream),
        "is_current_stream_capturing": False,
        **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), 0),
        "get_device_capability": (9, 0),
        "get_device_name": facts.name,
        "get_device_properties": facts,
    }
    return {name: lambda *args, answer=answer, **options: answer for name, answer in answers.items()} | {
        # all of them this process's own
        "device_count": lambda: len(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")),
        "memory_allocated": lambda device=None: ops.live(),
        "memory_reserved": lambda device=None: ops.live(),
        "max_memory_allocated": lambda device=None: ops.peak(),
        "reset_peak_memory_stats": lambda device=None: ops.reset_peak(),
        "mem_get_info": lambda device=None: (ops.limit() - ops.live(), ops.limit()),
        "manual_seed": lambda seed: ops.seed(seed),
        "manual_seed_all": lambda seed: ops.seed(seed),
        "get_rng_state": lambda device="cuda": ops.rng_state(),
        "get_rng_state_all": lambda: [ops.rng_state()],
        "set_rng_state": lambda state, device="cuda": ops.set_rng_state(state),
        "set_rng_state_all": lambda states: ops.set_rng_state(*states),
        "stream": lambda stream: contextlib.nullcontext(),
        "set_sync_debug_mode": set_sync_debug_mode,
        "Stream": Stream,
        "Event": Event,
    }


def check_flash(q, k, v, cu_q, cu_k, max_q, max_k):
    """What the kernel of a GPU asks for."""
    import torch

    assert all(x.is_cuda for x in (q, k, v, cu_q, cu_k))
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert q.shape[-1] % 8 == q.shape[1] % k.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for bounds, num, longest in ((cu_q, len(q), max_q), (cu_k, len(k), max_k)):
        assert bounds.dtype == torch.int32
        assert (int(bounds[0]), int(bounds[-1])) == (0, num)
        assert bounds.diff().max() <= longest


def sequences(q, k, cu_q, cu_k, causal, scale, left, right):
    """Of each: its queries, its keys, and the weights [heads, Q, K] between them with their log-sums."""
    import torch

    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        hidden = distance < (0 if causal or right == 0 else -d)
        if left is not None and left >= 0:
            hidden |= distance > left
        scores = scores.masked_fill(hidden.to(q.device), -torch.inf)
        yield slice(a, b), slice(c, d), scores.softmax(-1), scores.logsumexp(-1)


def widened(q, k, v):
    """In float32, with as many heads of keys and values as of queries."""
    groups = q.shape[1] // k.shape[1]
    return q.float(), *(x.float().repeat_interleave(groups, 1) for x in (k, v))


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, **options):
    import torch

    with waiting_for_a_kernel():
        check_flash(q, k, v, cu_q, cu_k, max_q, max_k)
        wide_q, wide_k, wide_v = widened(q, k, v)
        out, sums = torch.zeros_like(wide_q), []
        for mine, theirs, weights, log_sums in sequences(wide_q, wide_k, cu_q, cu_k, causal, *knobs(q, options)):
            out[mine] = torch.einsum("hqk,khd->qhd", weights, wide_v[theirs])
            sums.append(log_sums)
        none = torch.empty(0, device=q.device)
        return out.to(q.dtype), torch.cat(sums, 1), torch.zeros(2, dtype=torch.int64, device=q.device), none, none


def flash_backward(grad, q, k, v, out, sums, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, **options):
    import torch

    with waiting_for_a_kernel():
        wide_q, wide_k, wide_v = widened(q, k, v)
        wide_grad = grad.float()
        dq, dk, dv = (torch.zeros_like(x) for x in (wide_q, wide_k, wide_v))
        scale, *window = knobs(q, options)
        for mine, theirs, weights, _ in sequences(wide_q, wide_k, cu_q, cu_k, causal, scale, *window):
            dv[theirs] = torch.einsum("hqk,qhd->khd", weights, wide_grad[mine])
            dweights = torch.einsum("qhd,khd->hqk", wide_grad[mine], wide_v[theirs])
            dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
            dq[mine] = torch.einsum("hqk,khd->qhd", dscores, wide_k[theirs])
            dk[theirs] = torch.einsum("hqk,qhd->khd", dscores, wide_q[mine])
        dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def knobs(q, options):
    """Scale, and the window to the left and to the right."""
    return options["scale"] or q.shape[-1] ** -0.5, options["window_size_left"], options["window_size_right"]


def make_the_interpreter_a_gpu():
    """Triton's interpreter with a GPU's types; its copies from the device are no waits."""
    from triton.runtime import interpreter

    for owner, name, function in runpy.run_path(str(TESTS / "gpu_types.py"))["replacements"]():
        setattr(owner, name, function)
    run = interpreter.GridExecutor.__call__

    def launch(self, *args, **options):
        with waiting_for_a_kernel():
            return run(self, *args, **options)

    interpreter.GridExecutor.__call__ = launch


if "BPO_FAST_STAND_IN" in os.environ:
    plug_in(os.environ["BPO_FAST_STAND_IN"])
