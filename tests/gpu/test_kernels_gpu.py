"""The fused operators on a real GPU: numerics, bits, host syncs, CUDA graphs and memory."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from adamw_cases import STATES, Steps, assert_alike
from bpo_fast_kernels import (
    gated,
    linear_draw,
    linear_logps,
    linear_pair_loss,
    linear_token_logps,
    pair_loss,
    rms_norm,
)
from bpo_fast_kernels.linear_logps import linear_token_logps_reference, logits_reference
from bpo_fast_kernels.linear_pair_loss import linear_pair_loss_reference
from bpo_fast_kernels.pair_loss import pair_loss_reference
from trunk_cases import ACTS, NORMS, gate_outcome, norm_outcome, worst
from waits import nothing_waits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BACKENDS = ["triton", "triton-gemm", "torch", "native"]
LENGTHS = [100, 0, 300, 1, 129, 255, 3, 512]


@pytest.fixture(autouse=True)
def backend_exists(request):
    if (
        "backend" in request.fixturenames
        and request.getfixturevalue("backend") == "native"
        and not shutil.which("nvcc")
    ):
        pytest.skip("nvcc is not installed")
    torch.manual_seed(0)


def inputs(rows: int, width: int, vocab: int, dtype=torch.bfloat16, spread: float = 3.0):
    hidden = torch.randn(rows, width, device="cuda").to(dtype)
    weight = (torch.randn(vocab, width, device="cuda") * spread / width**0.5).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (rows,), device="cuda")


def offsets(lengths, device="cuda"):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64, 130), (129, 256, 1003), (1300, 512, 9000), (257, 100, 5000)])
@pytest.mark.parametrize("mode", ["fused", "store", "recompute"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "logit_softcap": 8.0}], ids=["plain", "softcap"])
def test_promise_against_float64(backend, dtype, shape, mode, options):
    x, w, y = inputs(*shape, dtype)
    x.requires_grad_()
    w.requires_grad_(mode != "fused")
    logps = linear_token_logps(x, w, y, mode=mode, backend=backend, **options)
    coefs = torch.randn_like(logps)
    (logps * coefs).sum().backward()
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    want = linear_token_logps_reference(x64, w64, y, **options)
    (want * coefs).sum().backward()
    assert float((logps - want).abs().max()) < 1e-4
    assert relative(x.grad, x64.grad) < 4e-3
    assert mode == "fused" or relative(w.grad, w64.grad) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [62.0, 80.0, 95.0, 400.0])
@pytest.mark.parametrize("mode", ["fused", "store", "recompute"])
def test_targets_past_the_overflow_limit(backend, depth, mode):
    x, w, y = inputs(300, 256, 5000)
    toward = w[y[::7]].double()
    x[::7] = (-depth * toward / toward.square().sum(1, keepdim=True)).to(x.dtype)
    x.requires_grad_()
    w.requires_grad_(mode != "fused")
    logps = linear_token_logps(x, w, y, mode=mode, backend=backend)
    logps.sum().backward()
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    want = linear_token_logps_reference(x64, w64, y)
    want.sum().backward()
    assert want.min() < -depth
    assert float((logps - want).abs().max()) < 1e-4
    assert relative(x.grad, x64.grad) < 4e-3
    assert mode == "fused" or relative(w.grad, w64.grad) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("budget", [None, 1])
def test_training_step(backend, loss, frozen, budget):
    x, w, y = inputs(sum(LENGTHS), 256, 5000)
    cu_seqlens = offsets(LENGTHS)
    ref = linear_logps(x, w, y, cu_seqlens, backend="torch") + 4 * torch.randn(8, device="cuda")
    x.requires_grad_()
    w.requires_grad_(not frozen)
    scalar, parts = linear_pair_loss(x, w, y, cu_seqlens, ref, loss=loss, budget_bytes=budget, backend=backend)
    scalar.backward()
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    want, _, margins = linear_pair_loss_reference(x64, w64, y, cu_seqlens, ref.double(), loss=loss)
    want.backward()
    assert float((parts.margins - margins).abs().max()) < 4e-3
    assert relative(x.grad, x64.grad) < 4e-3
    assert frozen or relative(w.grad, w64.grad) < 4e-3


@pytest.mark.parametrize("backend", ["triton", "triton-gemm", "native"])
@pytest.mark.parametrize("frozen", [True, False])
def test_three_runs_give_the_same_bits(backend, frozen):
    x, w, y = inputs(sum(LENGTHS), 512, 9000)
    cu_seqlens, runs = offsets(LENGTHS), []
    ref = linear_logps(x, w, y, cu_seqlens, backend=backend) + 1
    for _ in range(3):
        hidden, weight = x.clone().requires_grad_(), w.clone().requires_grad_(not frozen)
        scalar, parts = linear_pair_loss(hidden, weight, y, cu_seqlens, ref, backend=backend)
        scalar.backward()
        runs.append((scalar.detach(), parts.policy_logps, hidden.grad, hidden.grad if frozen else weight.grad))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("backend", ["triton", "triton-gemm", "native"])
@pytest.mark.parametrize("frozen", [True, False])
def test_equal_weights_give_a_margin_of_exactly_zero(backend, frozen):
    x, w, y = inputs(sum(LENGTHS), 512, 9000)
    cu_seqlens = offsets(LENGTHS)
    ref = linear_logps(x, w, y, cu_seqlens, backend=backend)
    both = linear_logps(x, w, y, cu_seqlens, behavior_hidden=x.clone(), backend=backend)
    assert torch.equal(both[0], both[1])
    x.requires_grad_()
    w.requires_grad_(not frozen)
    _, parts = linear_pair_loss(x, w, y, cu_seqlens, ref, backend=backend)
    assert parts.margins.tolist() == [0.0] * 4


@pytest.mark.parametrize("backend", ["triton", "triton-gemm"])
@pytest.mark.parametrize("second_head", [False, True])
def test_behavior_rows_in_the_same_launch(backend, second_head):
    x, w, y = inputs(700, 256, 5000)
    other, head, _ = inputs(700, 256, 5000)
    cu_seqlens = offsets([300, 400])
    head = head if second_head else w
    logps, behavior = linear_logps(
        x, w, y, cu_seqlens, behavior_hidden=other, behavior_weight=head if second_head else None, backend=backend
    )
    assert float((logps - linear_logps(x, w, y, cu_seqlens, backend="torch")).abs().max()) < 1e-2
    assert float((behavior - linear_logps(other, head, y, cu_seqlens, backend="torch")).abs().max()) < 1e-2


@pytest.mark.parametrize("tile", ["128x256x64x3p", "128x256x64x4p", "128x128x64x3w4"])
def test_tiles_of_plan_a_give_the_same(tile):
    """More tiles than multiprocessors, the last of them cut off."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("without descriptors none of them is persistent, and they do not fit")
    x, w, y = inputs(1100, 512, 20_001)
    cu_seqlens, found = offsets([500, 600]), []
    for backend in ("triton-gemm", f"triton-gemm:{tile}"):
        hidden = x.clone().requires_grad_()
        logps, behavior = linear_logps(
            hidden, w, y, cu_seqlens, behavior_hidden=x.flip(0), mode="store", backend=backend
        )
        logps.sum().backward()
        found.append((logps, behavior, hidden.grad))
    for want, got in zip(*found, strict=True):
        # sums in another order: a gradient of 16 bits is off by half a unit here and there
        assert relative(got, want) < (1e-5 if got.dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("backend", ["triton", "triton-gemm"])
def test_frozen_step_waits_for_nothing(backend):
    x, w, y = inputs(sum(LENGTHS), 512, 9000)
    cu_seqlens, ref = offsets(LENGTHS), torch.zeros(8, device="cuda")
    x.requires_grad_()
    linear_pair_loss(x, w, y, cu_seqlens, ref, backend=backend)[0].backward()
    with nothing_waits():
        linear_pair_loss(x, w, y, cu_seqlens, ref, backend=backend)[0].backward()


@pytest.mark.parametrize("backend", ["triton", "triton-gemm"])
def test_trained_step_waits_for_nothing_with_offsets_on_the_host(backend):
    x, w, y = inputs(sum(LENGTHS), 512, 9000)
    cu_seqlens, ref = offsets(LENGTHS, "cpu"), torch.zeros(8, device="cuda")
    x.requires_grad_()
    w.requires_grad_()
    linear_pair_loss(x, w, y, cu_seqlens, ref, backend=backend)[0].backward()
    with nothing_waits():
        linear_pair_loss(x, w, y, cu_seqlens, ref, backend=backend)[0].backward()


@pytest.mark.parametrize("backend", ["triton", "triton-gemm"])
def test_frozen_step_is_captured_by_a_cuda_graph(backend):
    x, w, y = inputs(sum(LENGTHS), 512, 9000)
    cu_seqlens, ref = offsets(LENGTHS), torch.zeros(8, device="cuda")
    x.requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        scalar, _ = linear_pair_loss(x, w, y, cu_seqlens, ref, backend=backend)
        return scalar, torch.autograd.grad(scalar, x)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize(("target", "good"), [(4, True), (5, False), (-1, False)])
def test_debugging_asserts_targets_on_the_device(target, good):
    """In a process of its own: a device that asserted serves nobody any more."""
    code = (
        "import torch\nfrom bpo_fast_kernels import linear_token_logps\n"
        "x, w = torch.zeros(3, 8, device='cuda'), torch.zeros(5, 8, device='cuda')\n"
        f"linear_token_logps(x, w, torch.tensor([0, {target}, 1], device='cuda'))\ntorch.cuda.synchronize()"
    )
    env = os.environ | {"BPO_FAST_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == good, done.stderr
    assert good or "assert" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 64, 130), (1, 64, 130), (129, 256, 1003), (700, 100, 128_256)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "logit_softcap": 8.0}], ids=["plain", "softcap"])
def test_draws_against_float64(dtype, shape, options):
    x, w, _ = inputs(*shape, dtype)
    uniforms = torch.rand(shape[0], dtype=torch.float64, device="cuda")
    uniforms[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)[: shape[0]]
    tokens, logps = linear_draw(x, w, uniforms, **options)
    assert (tokens.dtype, logps.dtype, tokens.device, len(tokens)) == (torch.int64, torch.float32, x.device, shape[0])
    again = linear_draw(x, w, uniforms, backend="torch", **options)
    assert torch.equal(tokens, again[0])
    assert torch.equal(logps, again[1])
    likeliest, own = linear_draw(x, w, None, **options)
    scaling = {"temperature": 1.0, "logit_softcap": None} | options
    for cut in range(0, shape[0], 100):
        here = slice(cut, cut + 100)
        whole = logits_reference(x[here].double(), w.double(), **scaling).log_softmax(-1)
        mass = whole.gather(1, tokens[here, None]).squeeze(1)
        above = whole.exp().cumsum(-1).gather(1, tokens[here, None]).squeeze(1)
        assert float((logps[here] - mass).abs().max()) < 1e-4
        assert float((uniforms[here] - above).max()) < 1e-5
        assert float((above - mass.exp() - uniforms[here]).max()) < 1e-5
        assert torch.equal(likeliest[here], whole.argmax(-1))
        assert float((own[here] - whole.amax(-1)).abs().max()) < 1e-4


def test_draws_wait_for_nothing():
    x, w, _ = inputs(300, 64, 300_000)
    uniforms = torch.rand(300, dtype=torch.float64, device="cuda")
    linear_draw(x, w, uniforms)
    with nothing_waits():
        linear_draw(x, w, uniforms)


def test_pair_loss_is_one_launch_and_right():
    policy, ref = 30 * torch.randn(8192, device="cuda") - 90, 30 * torch.randn(8192, device="cuda") - 90
    lengths = torch.randint(1, 128, (8192,), device="cuda")
    for loss in ("dpo", "ipo", "slic"):
        mine, naive = policy.clone().requires_grad_(), policy.double().requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            got = pair_loss(mine, ref, loss=loss, lengths=lengths)
            torch.cuda.synchronize()
        kernels = [event.name for event in profile.events() if "pair_loss_kernel" in event.name]
        assert len(kernels) == 1
        want, _ = pair_loss_reference(naive, ref.double(), loss=loss, lengths=lengths)
        assert torch.allclose(got.loss.double(), want, rtol=3e-5, atol=1e-5)
        got.loss.sum().backward()
        want.sum().backward()
        assert torch.allclose(mine.grad.double(), naive.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_memory_at_a_vocabulary_of_128k(frozen):
    x, w, y = inputs(4096, 1024, 128_256)
    x.requires_grad_()
    w.requires_grad_(not frozen)
    cu_seqlens = offsets([512] * 8)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scalar, _ = linear_pair_loss(x, w, y, cu_seqlens, torch.zeros(8, device="cuda"))
    scalar.backward()
    returned = x.grad.nbytes + (0 if frozen else 3 * w.grad.nbytes)  # dW is summed in float32, then rounded
    assert torch.cuda.max_memory_allocated() - before - returned < (0.25e9 if frozen else 1.4e9)


@pytest.fixture
def large_device():
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")


@pytest.mark.parametrize("backend", ["triton", "triton-gemm", "native"])
def test_e_of_more_numbers_than_32_bits_count(backend, large_device):
    x, w, y = inputs(17_000, 64, 131_072)
    assert len(x) * len(w) > 2**31
    grads = []
    for mode in ("store", "recompute"):  # recompute holds a tile of E at a time
        hidden, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
        logps = linear_token_logps(hidden, weight, y, mode=mode, backend=backend)
        logps.sum().backward()
        grads.append(weight.grad)
        last, w64 = x[-99:].double().requires_grad_(), w.double()
        want = linear_token_logps_reference(last, w64, y[-99:])
        want.sum().backward()
        assert float((logps[-99:] - want).abs().max()) < 1e-4
        assert relative(hidden.grad[-99:], last.grad) < 4e-3
    assert relative(grads[0], grads[1].double()) < 8e-3


def test_rows_of_more_numbers_than_32_bits_count(large_device):
    x = torch.randn(2**21 + 8, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1024, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31

    def outcome(x):
        x = x.detach().requires_grad_()
        out = gated(rms_norm(x, weight, 1e-6), x, "silu")
        return out.detach(), torch.autograd.grad(out, x, x.detach())[0]

    for whole, last in zip(outcome(x), outcome(x[-8:].clone()), strict=True):
        assert torch.equal(whole[-8:], last)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["triton", "triton-gemm", "native"])
def test_a_device_that_is_not_the_current_one(backend):
    x, w, y = inputs(sum(LENGTHS), 256, 5000)
    found = []
    for device in ("cuda:0", "cuda:1"):
        args = (x.to(device).requires_grad_(), w.to(device).requires_grad_(), y.to(device))
        ref = torch.zeros(8, device=device)
        scalar, _ = linear_pair_loss(*args, offsets(LENGTHS, device), ref, backend=backend)
        normed = rms_norm(args[0], args[1][0].detach(), 1e-6)
        (scalar + gated(normed, normed, "silu").float().mean()).backward()
        found.append([t.cpu() for t in (scalar.detach(), args[0].grad, args[1].grad)])
    assert torch.cuda.current_device() == 0
    assert all(map(torch.equal, *found))


TRUNK_SHAPES = [(1, 1), (300, 128), (2, 77, 896), (513, 4096), (5, 8192), (3, 20000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", TRUNK_SHAPES)
def test_norms_and_gates_against_float64(dtype, shape):
    limit = 1e-5 if dtype == torch.float32 else 0.016
    for form in NORMS:
        found = norm_outcome(rms_norm, shape, form, dtype=dtype, device="cuda")
        assert worst(found, norm_outcome(None, shape, form, dtype=dtype, device="cuda")) < limit
    for activation in ACTS:
        found = gate_outcome(gated, shape, activation, dtype=dtype, device="cuda")
        assert worst(found, gate_outcome(None, shape, activation, dtype=dtype, device="cuda")) < limit


def test_norms_and_gates_repeat_bit_for_bit_and_wait_for_nothing():
    x, weight = torch.randn(3000, 896, device="cuda").bfloat16(), torch.randn(896, device="cuda").bfloat16()
    runs = []
    for run in range(3):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with nothing_waits() if run else nullcontext():  # the first compiles
            (gated(rms_norm(a, b, 1e-6), a, "silu") * x).sum().backward()
        runs.append((a.grad, b.grad))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


ADAMW_FORMS = [(states, dtype) for states in STATES for dtype in (torch.float32, torch.bfloat16, torch.float16)]
ON_GPU = {"device": "cuda", "options": {"backend": "triton"}}
FEW = 0.001  # of numbers that roundings of the device may make others, of 8 bits


@pytest.mark.parametrize("shape", [(1,), (257,), (3, 100_001), (4096, 1024)])
@pytest.mark.parametrize("form", ADAMW_FORMS, ids=str)
def test_adamw_is_that_of_the_twin(shape, form):
    assert_alike(Steps(*form, **ON_GPU).trained(shape), Steps(*form).trained(shape), few=FEW)


@pytest.mark.parametrize("form", ADAMW_FORMS, ids=str)
def test_adamw_steps_tensors_together_as_alone(form):
    on_gpu, twin = Steps(*form, **ON_GPU), Steps(*form)
    for found, expected in (
        *zip(on_gpu.trained_together(), twin.trained_together(), strict=True),
        *zip(on_gpu.trained_apart(), twin.trained_apart(), strict=True),
    ):
        assert_alike(found, expected, few=FEW)


@pytest.mark.parametrize("form", ADAMW_FORMS, ids=str)
def test_adamw_leaves_a_nan_with_its_element(form):
    assert_alike(Steps(*form, **ON_GPU).trained_with_a_nan(), Steps(*form).trained_with_a_nan(), few=FEW)


@pytest.mark.parametrize("form", ADAMW_FORMS, ids=str)
def test_adamw_changes_nothing_where_a_gradient_is_not_finite(form):
    assert Steps(*form, **ON_GPU).unmoved_by_what_is_not_finite()


@pytest.mark.parametrize("form", ADAMW_FORMS, ids=str)
def test_adamw_waits_for_nothing_and_holds_no_copies(form):
    steps = Steps(*form, **ON_GPU)
    weight, state = steps.start((2**26,))
    grad, one = torch.randn_like(weight).to(steps.dtype), torch.ones((), device="cuda")
    for run in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with nothing_waits() if run else nullcontext():  # the first compiles
            steps.step(weight, grad, state, grad_scale=one, found_inf=one - 1)
        assert torch.cuda.max_memory_allocated() - before < 2**20
