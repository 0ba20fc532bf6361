"""The Triton kernels on the CPU, run by test_interpreter.py. Small: the interpreter does about 0.7 GFLOP/s."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
import trunk_cases
import watched
from adamw_cases import FORM as ADAMW_FORM
from adamw_cases import SHAPES as ADAMW_SHAPES
from adamw_cases import STATES, Steps, assert_alike
from bpo_fast_kernels import gated, linear_logps, linear_pair_loss, linear_token_logps, pair_loss, rms_norm
from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.linear_pair_loss import linear_pair_loss_reference
from bpo_fast_kernels.pair_loss import pair_loss_reference
from bpo_fast_kernels.rows import Head, Rows, WeightSums
from bpo_fast_kernels.triton_config import INTERPRETED, SHARED_BYTES, with_tile
from bpo_fast_kernels.trunk import gated_reference, rms_norm_reference
from cases import Case, adversarial_cases, answer, keep_e_as_on_a_gpu, offsets, pairwise, random_case, relative
from gpu_types import replacements
from triton.runtime import interpreter

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PLANS = ("triton", "triton-gemm")
MODES = ("fused", "store", "recompute")
REF = torch.tensor([-9.0, 3.0, -5.0, 2.0])
# Plan A's tile in the interpreter is 16 x 32 x 16.
SHAPES = [(1, 1, 2), (16, 16, 32), (17, 33, 31), (35, 24, 97)]

# Draws for which three roundings of what the targets' rows of dW get were off by 0.0042 to 0.005.
BAD_LUCK = {"p_y_e-80": 25, "past_overflow_e-95": 19, "past_overflow_e-400": 5, "p_y_near_1": 7}


def every_plan(names):
    """(name, plan, mode): both plans for every name, and all modes for either plan."""
    return [(name, plan, MODES[(i + j) % 3]) for i, name in enumerate(names) for j, plan in enumerate(PLANS)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Vocabulary tiles of 64, so that small cases have several, as in both modules that name the constant."""
    from bpo_fast_kernels import torch_backend, triton_backend

    monkeypatch.setattr(torch_backend, "TILE_COLS", 64)
    monkeypatch.setattr(triton_backend, "TILE_COLS", 64)


@pytest.fixture(autouse=True)
def watch(monkeypatch):
    """Programs in a shuffled order; accesses outside of a kernel's arguments and races are errors."""
    for owner, name, function in watched.replacements():
        monkeypatch.setattr(owner, name, function)


@pytest.fixture
def gpu_types(monkeypatch):
    """bfloat16 as a GPU has it."""
    for owner, name, function in replacements():
        monkeypatch.setattr(owner, name, function)
    keep_e_as_on_a_gpu(monkeypatch)


@triton.jit
def _shift_kernel(x, out, size, READ: tl.constexpr, WRITE: tl.constexpr):
    """out[p + WRITE] = x[p + READ] for the programs p of `size`, the last one masked."""
    place = tl.program_id(0)
    tl.store(out + place + WRITE, tl.load(x + place + READ, mask=place < size - 1, other=0.0))


@pytest.mark.parametrize(
    ("parts", "read", "write", "fault"),
    [
        (("x", "out"), 1, 0, None),
        (("x", "x"), 0, 0, None),
        (("x", "out"), -1, 0, "1 of 1 numbers read lie outside"),
        (("x", "out"), 0, 1, "1 of 1 numbers written lie outside"),
        (("x", "x"), 1, 0, "a program reads what another one writes"),
    ],
)
def test_the_watch_tells_what_a_gpu_punishes(parts, read, write, fault):
    tensors = {"x": torch.arange(9.0)[1:8], "out": torch.zeros(9)[1:8]}
    args = [tensors[part] for part in parts]
    call = lambda: _shift_kernel[(7,)](*args, 7, READ=read, WRITE=write)  # noqa: E731
    if fault is None:
        call()
    else:
        with pytest.raises(Exception, match=fault):
            call()


@triton.jit
def _last_kernel(out):
    tl.store(out, tl.program_id(0))


def test_the_watch_tells_two_writers_and_runs_programs_in_any_order():
    out, found = torch.zeros(1, dtype=torch.int32), set()
    for _ in range(9):
        with pytest.raises(AssertionError, match="two programs write the same number"):
            _last_kernel[(7,)](out)
        found.add(int(out))
    assert len(found) > 1


def run(case, backend, mode, frozen, **options):
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(not frozen)
    logps = linear_token_logps(hidden, weight, case.targets, backend=backend, mode=mode, **options)
    coefs = torch.randn(len(logps))
    (logps * coefs).sum().backward()
    return logps.detach(), hidden.grad, weight.grad, coefs


def assert_close(case, backend, mode, *, logp, gradient):
    """Log-probs and gradients are within these limits of float64."""
    logps, dx, dw, coefs = run(case, backend, mode, mode == "fused")
    want = answer(case, coefs)
    assert float((logps - want.logps).abs().max()) < logp
    assert relative(dx, want.dx) < gradient
    assert dw is None or relative(dw, want.dw) < gradient


@pytest.mark.parametrize(("shape", "mode", "backend"), pairwise(SHAPES, MODES, PLANS))
def test_log_probs_and_gradients_match_float64(backend, shape, mode):
    # Plan A keeps E in the working type, which is float32 on the CPU.
    assert_close(random_case(*shape, spread=3.0), backend, mode, logp=1e-5, gradient=1e-5)


@pytest.mark.parametrize(("name", "backend", "mode"), every_plan(adversarial_cases()))
def test_rows_at_the_limits(backend, name, mode):
    assert_close(adversarial_cases()[name], backend, mode, logp=1e-4, gradient=1e-5)


@pytest.mark.parametrize(("name", "backend", "mode"), every_plan(BAD_LUCK))
def test_promise_at_the_limits_with_e_as_on_a_gpu(name, mode, backend, gpu_types):
    torch.manual_seed(BAD_LUCK[name])
    assert_close(adversarial_cases(torch.bfloat16)[name], backend, mode, logp=1e-4, gradient=4e-3)


@pytest.mark.parametrize("backend", PLANS)
def test_dw_of_live_rows_with_e_as_on_a_gpu(backend, gpu_types):
    engine = pick_backend(backend, torch.device("cpu"))
    torch.manual_seed(BAD_LUCK["p_y_e-80"])
    case, coefs = adversarial_cases(torch.bfloat16)["p_y_e-80"], torch.randn(40)
    coefs[1::3] = 0
    rows, want = Rows(case.hidden, case.targets, Head(case.weight)), answer(case, coefs)
    scored = engine.score(rows, dx=False, keep=True)
    assert scored.e.dtype == torch.bfloat16
    sums = engine.dw_sums(case.weight, 1)
    engine.kept_dw_(sums, scored, coefs, rows, zeros=True)
    assert relative(engine.kept_dx(scored, coefs, rows, zeros=True).bfloat16(), want.dx) < 4e-3
    assert relative(sums.result().bfloat16(), want.dw) < 4e-3


@pytest.mark.parametrize("backend", PLANS)
@pytest.mark.parametrize("mode", MODES)
def test_targets_that_lie_apart(backend, mode):
    case = random_case(17, 8, 40)
    targets = torch.stack([case.targets, torch.zeros_like(case.targets)], 1)[:, 0]
    assert targets.stride() == (2,)
    assert_close(Case(case.hidden, case.weight, targets), backend, mode, logp=1e-5, gradient=1e-5)
    if mode != "fused":
        return  # what follows knows no mode
    options = {"cu_seqlens": offsets([10, 7]), "behavior_hidden": case.hidden, "backend": backend}
    found = linear_logps(case.hidden, case.weight, targets, **options)
    assert all(map(torch.equal, found, linear_logps(case.hidden, case.weight, case.targets, **options)))


@pytest.mark.parametrize("backend", PLANS)
def test_kernels_are_launched_on_the_device_of_their_tensors(backend, monkeypatch):
    """Forward; autograd does it backward."""
    launches, inside = [], []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    run = interpreter.GridExecutor.__call__

    def launch(self, *args, **options):
        launches.append(bool(inside))
        return run(self, *args, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    case, bounds = random_case(20, 8, 70), offsets([5, 0, 12, 3])
    for hidden in (case.hidden, case.hidden.clone().requires_grad_()):
        for weight in (case.weight, case.weight.clone().requires_grad_()):
            linear_token_logps(hidden, weight, case.targets, backend=backend)
            linear_logps(hidden, weight, case.targets, bounds, behavior_hidden=case.hidden, backend=backend)
            linear_pair_loss(hidden, weight, case.targets, bounds, REF, backend=backend)
    pair_loss(REF, REF, backend=backend)
    gated(rms_norm(case.hidden, case.weight[0], 1e-6, backend="triton"), case.hidden, "silu", backend="triton")
    assert len(launches) > 40
    assert all(launches)


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("vocab", [1, 3, 50])
def test_rows_of_a_target_add_up_to_its_row_of_dw(num_rows, vocab):
    wide, weight = torch.randn(num_rows, 700), torch.zeros(vocab, 600)
    rows = Rows(wide[:, 100:], torch.randint(vocab, (num_rows,)), Head(weight))
    push, dw = torch.randn(num_rows), torch.randn(vocab, 600)
    want = dw.double().index_add_(0, rows.targets, rows.hidden.double() * push[:, None])
    pick_backend("triton", torch.device("cpu")).push_dw_(dw, rows, push)
    assert relative(dw, want) < 1e-6


@pytest.mark.parametrize("backend", PLANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_promise_for_16_bit_inputs(backend, dtype):
    case = random_case(20, 32, 130, spread=3.0, dtype=dtype)
    logps, dx, dw, coefs = run(case, backend, "store", False)
    want = answer(case, coefs)
    assert float((logps - want.logps).abs().max()) < 1e-4
    assert relative(dx, want.dx) < 4e-3
    assert relative(dw, want.dw) < 4e-3


@pytest.mark.parametrize("backend", PLANS)
@pytest.mark.parametrize("mode", MODES)
def test_temperature_and_softcap(backend, mode):
    case, options = random_case(18, 16, 130, spread=6.0), {"temperature": 0.7, "logit_softcap": 4.0}
    logps, dx, dw, coefs = run(case, backend, mode, mode == "fused", **options)
    want = answer(case, coefs, **options)
    assert float((logps - want.logps).abs().max()) < 1e-5
    assert relative(dx, want.dx) < 1e-5
    assert dw is None or relative(dw, want.dw) < 1e-5


@pytest.mark.parametrize("backend", PLANS)
@pytest.mark.parametrize(("second_head", "num_rows"), [(False, 19), (True, 19), (True, 16)])
def test_policy_and_behavior_share_a_launch(backend, second_head, num_rows):
    case, other = random_case(num_rows, 16, 70), random_case(num_rows, 16, 70)
    weight = other.weight if second_head else None
    hidden = case.hidden.clone().requires_grad_()
    cu_seqlens = offsets([7, 0, num_rows - 7])
    options = {"behavior_hidden": other.hidden, "behavior_weight": weight, "backend": backend}
    logps, behavior = linear_logps(hidden, case.weight, case.targets, cu_seqlens, **options)
    want = linear_logps(
        other.hidden, other.weight if second_head else case.weight, case.targets, cu_seqlens, backend="torch"
    )
    assert float((behavior - want).abs().max()) < 1e-4
    logps.sum().backward()
    assert relative(hidden.grad, answer(case, torch.ones(num_rows)).dx) < 1e-5
    same, again = linear_logps(
        case.hidden, case.weight, case.targets, cu_seqlens, behavior_hidden=case.hidden.clone(), backend=backend
    )
    assert torch.equal(same, again)
    assert torch.equal(same, logps.detach())


@pytest.mark.parametrize("backend", PLANS)
def test_chunks_of_plan_a_and_row_blocks_of_plan_b_join(backend, monkeypatch):
    from bpo_fast_kernels import torch_backend

    monkeypatch.setattr(torch_backend, "TILE_ROWS", 16)
    case = random_case(40, 8, 70)
    engine = pick_backend(backend, torch.device("cpu"))
    monkeypatch.setattr(type(engine), "chunk_bytes", 16 * 70 * 4)
    logps, dx, _, coefs = run(case, backend, "fused", True)
    want = answer(case, coefs)
    assert float((logps - want.logps).abs().max()) < 1e-5
    assert relative(dx, want.dx) < 1e-5


@pytest.mark.parametrize("backend", PLANS)
@pytest.mark.parametrize(("loss", "frozen"), [("dpo", True), ("dpo", False), ("ipo", True), ("slic", False)])
def test_training_step(backend, loss, frozen):
    case, cu_seqlens = random_case(37, 16, 90, spread=2.0), offsets([5, 0, 12, 9, 3, 8])
    ref = linear_logps(case.hidden, case.weight, case.targets, cu_seqlens, backend="torch") + torch.randn(6)
    grads = []
    for name in (backend, "torch"):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(not frozen)
        scalar, parts = linear_pair_loss(
            hidden, weight, case.targets, cu_seqlens, ref, loss=loss, budget_bytes=1, backend=name
        )
        scalar.backward()
        grads.append((scalar.detach(), parts.margins, hidden.grad, weight.grad))
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-4)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-4)
    assert relative(grads[0][2], grads[1][2].double()) < 1e-4
    assert frozen or relative(grads[0][3], grads[1][3].double()) < 1e-4
    _, parts = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, None, loss=loss, backend=backend)
    assert parts.margins.tolist() == [0.0] * 3


@pytest.mark.parametrize("backend", PLANS)
def test_three_runs_give_the_same_bits_and_modes_agree(backend):
    case, runs = random_case(30, 16, 130), []
    for mode in ("store", "store", "store", "recompute"):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        logps = linear_token_logps(hidden, weight, case.targets, mode=mode, backend=backend)
        logps.sum().backward()
        runs.append((logps.detach(), hidden.grad, weight.grad))
    for again in runs[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
    forward = linear_token_logps(case.hidden, case.weight, case.targets, backend=backend)
    assert torch.equal(runs[3][0], forward)
    assert torch.equal(runs[0][0], forward)


def test_plan_a_takes_a_tile_by_name():
    case = random_case(35, 24, 97, spread=3.0)
    logps, dx, dw, coefs = run(case, "triton-gemm:32x16x16x2", "store", False)
    want = answer(case, coefs)
    assert float((logps - want.logps).abs().max()) < 1e-5
    assert relative(dx, want.dx) < 1e-5
    assert relative(dw, want.dw) < 1e-5
    engine = pick_backend("triton-gemm:32x16x16x2", torch.device("cpu"))
    config = engine.config(Rows(case.hidden, case.targets, Head(case.weight)), None)
    assert (config.block_m, config.block_n, config.block_k, config.num_stages) == (32, 16, 16, 2)
    persistent = with_tile(replace(INTERPRETED, tma=True), "128x256x64x4w8p", SHARED_BYTES[90])
    assert (persistent.num_warps, persistent.persistent, persistent.halves) == (8, True, True)
    assert not with_tile(replace(INTERPRETED, tma=True), "128x256x64x3p", SHARED_BYTES[90]).halves
    assert not with_tile(INTERPRETED, "128x256x64x3p").persistent  # without descriptors
    for tile in ("128x256x64", "128x100x64x3", "8x16x16x1", "128x256x64x3w5", "128x256x64x3pw4", "fast"):
        with pytest.raises(ValueError, match=f"^backend = 'triton-gemm:{tile}'"):
            pick_backend(f"triton-gemm:{tile}", torch.device("cpu"))


@pytest.mark.parametrize(
    ("shape", "spread", "cap"),
    [((1, 8, 2), 3.0, None), ((16, 16, 32), 3.0, None), ((35, 24, 97), 3.0, 4.0), ((17, 16, 70), 150.0, None)],
    ids=str,
)
def test_descriptors_load_and_store_what_pointers_do(shape, spread, cap, monkeypatch):
    """The forms of Hopper and later, where a block of rows or of the vocabulary may end inside of its tile.

    The last case takes the second attempt, where half a tile has a largest logit of hundreds, as the other half has.
    """
    from bpo_fast_kernels import triton_backend

    case = random_case(*shape, spread=spread)
    hidden, weight = (torch.nn.functional.pad(x, (0, -x.shape[1] % 4)) for x in (case.hidden, case.weight))
    calls, found = set(), []
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_descriptor_load, builder.create_descriptor_store
    monkeypatch.setattr(builder, "create_descriptor_load", lambda *args: calls.add("load") or load(*args))
    monkeypatch.setattr(builder, "create_descriptor_store", lambda *args: calls.add("store") or store(*args))
    forms = [
        {},
        {"tma": True},
        {"tma": True, "persistent": True},
        {"tma": True, "persistent": True, "halves": True},
    ]
    for form in forms:
        calls.clear()
        monkeypatch.setattr(triton_backend, "INTERPRETED", replace(INTERPRETED, **form))
        torch.manual_seed(0)
        logps, dx, dw, _ = run(Case(hidden, weight, case.targets), "triton-gemm", "store", False, logit_softcap=cap)
        options = {"behavior_hidden": hidden.flip(0), "backend": "triton-gemm"}
        found.append([logps, dx, dw, *linear_logps(hidden, weight, case.targets, offsets([len(hidden)]), **options)])
        assert calls == ({"load", "store"} if "persistent" in form else {"load"} if "tma" in form else set())
    pointers, loads, persistent, halves = found
    assert all(map(torch.equal, pointers, loads))
    assert all(map(torch.equal, pointers, persistent))
    assert max(map(relative, halves, pointers)) < 1e-6  # row sums are those of halves


@pytest.mark.parametrize("backend", PLANS)
@pytest.mark.parametrize(("loss", "frozen"), [("dpo", True), ("slic", False)])
def test_three_steps_give_the_same_bits(backend, loss, frozen):
    case, cu_seqlens, runs = random_case(20, 8, 70), offsets([5, 0, 12, 3]), []
    for _ in range(3):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(not frozen)
        scalar, parts = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, REF, loss=loss, backend=backend)
        scalar.backward()
        runs.append((scalar.detach(), parts.policy_logps, hidden.grad, hidden.grad if frozen else weight.grad))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("backend", PLANS)
@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
@pytest.mark.parametrize("frozen", [True, False])
def test_pairs_without_a_row(backend, loss, frozen):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4).requires_grad_(not frozen)
    args = (torch.zeros(0, dtype=torch.int64), offsets([0] * 4), REF)
    scalar, _ = linear_pair_loss(hidden, weight, *args, loss=loss, backend=backend)
    want, *_ = linear_pair_loss_reference(hidden, weight, *args, loss=loss)
    scalar.backward()
    assert torch.allclose(scalar, want, rtol=1e-4)
    assert frozen or torch.equal(weight.grad, torch.zeros(9, 4))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
@pytest.mark.parametrize("pairs", [0, 1, 127, 128, 129])
def test_pair_loss(loss, pairs):
    policy, ref = 30 * torch.randn(2 * pairs) - 90, 30 * torch.randn(2 * pairs) - 90
    lengths = torch.randint(0, 50, (2 * pairs,), dtype=torch.int32)
    smoothing = 0.1 if loss == "dpo" else 0.0
    options = {"loss": loss, "label_smoothing": smoothing}
    mine, naive = policy.clone().requires_grad_(), policy.double().requires_grad_()
    got = pair_loss(mine, ref, backend="triton", lengths=lengths, **options)
    want, margins = pair_loss_reference(naive, ref.double(), lengths=lengths.clamp(min=1), **options)
    assert torch.allclose(got.loss.double(), want, rtol=3e-5, atol=1e-5)
    assert torch.allclose(got.margins.double(), margins, rtol=1e-5, atol=1e-4)
    got.loss.sum().backward()
    want.sum().backward()
    assert torch.allclose(mine.grad.double(), naive.grad, rtol=1e-3, atol=1e-7)


def test_no_rows():
    for backend in PLANS:
        hidden = torch.zeros(0, 8, requires_grad=True)
        logps = linear_logps(
            hidden, torch.randn(11, 8), torch.zeros(0, dtype=torch.int64), offsets([0, 0]), backend=backend
        )
        logps.sum().backward()
        assert logps.tolist() == [0.0, 0.0]


def test_rows_without_coefficient_are_skipped():
    case = random_case(50, 20, 70)
    engine = pick_backend("triton", torch.device("cpu"))
    rows = Rows(case.hidden, case.targets, Head(case.weight))
    scored = engine.score(rows, dx=False, keep=True)
    coefs = torch.randn(50)
    coefs[::3] = 0
    want = answer(case, coefs)
    scored.e[::3] = torch.nan  # whoever reads them is found out
    sums = WeightSums(torch.ones_like(case.weight), begun=True)
    engine.kept_dw_(sums, scored, coefs, rows, zeros=True)
    assert relative(engine.kept_dx(scored, coefs, rows, zeros=True), want.dx) < 1e-5
    assert relative(sums.total - 1, want.dw) < 1e-5
    coefs.zero_()
    assert engine.kept_dx(scored, coefs, rows, zeros=True).abs().sum() == 0


@pytest.mark.parametrize("shape", trunk_cases.SHAPES)
@pytest.mark.parametrize("form", trunk_cases.NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(gpu_types, shape, form, dtype):
    found = trunk_cases.norm_outcome(rms_norm, shape, form, dtype=dtype, backend="triton")
    expected = trunk_cases.norm_outcome(None, shape, form, dtype=dtype)
    assert trunk_cases.worst(found, expected) < (2e-6 if dtype == torch.float32 else 0.016)
    if dtype == torch.bfloat16:  # as the layers of models round
        twin = trunk_cases.norm_outcome(rms_norm_reference, shape, form, dtype=dtype)
        assert float((found[0] != twin[0]).float().mean()) < 0.01 or not found[0].numel()


@pytest.mark.parametrize("shape", trunk_cases.SHAPES)
@pytest.mark.parametrize("activation", trunk_cases.ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates(gpu_types, shape, activation, dtype):
    found = trunk_cases.gate_outcome(gated, shape, activation, dtype=dtype, backend="triton")
    expected = trunk_cases.gate_outcome(None, shape, activation, dtype=dtype)
    assert trunk_cases.worst(found, expected) < (2e-6 if dtype == torch.float32 else 0.016)
    if dtype == torch.bfloat16 and activation == "silu":  # what is left of a shut gate, PyTorch's gelu rounds to 0
        twin = trunk_cases.gate_outcome(gated_reference, shape, activation, dtype=dtype)
        assert float((found[0] != twin[0]).float().mean()) < 0.01 or not found[0].numel()


def test_a_weight_whose_gradient_several_programs_sum(monkeypatch):
    from bpo_fast_kernels import triton_trunk

    monkeypatch.setattr(triton_trunk, "BLOCK", 64)
    monkeypatch.setattr(triton_trunk, "SUMMING", 3)
    for form in trunk_cases.NORMS:
        found = trunk_cases.norm_outcome(rms_norm, (41, 20), form, backend="triton")
        assert trunk_cases.worst(found, trunk_cases.norm_outcome(None, (41, 20), form)) < 2e-6


def test_halves_of_one_tensor():
    gate, up = torch.randn(9, 2 * 37).chunk(2, -1)
    assert torch.equal(
        gated(gate, up, "silu", backend="triton"),
        gated(gate.contiguous(), up.contiguous(), "silu", backend="triton"),
    )


TRITON = {"options": {"backend": "triton"}}
FORMS_OF_ADAMW = [(states, dtype) for states in STATES for dtype in (torch.float32, torch.bfloat16, torch.float16)]


@pytest.fixture
def small_chunks(monkeypatch):
    """A tensor of 4,096 elements has several."""
    from bpo_fast_kernels import triton_adamw

    monkeypatch.setattr(triton_adamw, "CHUNK", 1024)


@pytest.mark.parametrize("shape", ADAMW_SHAPES)
@pytest.mark.parametrize("form", FORMS_OF_ADAMW, ids=str)
def test_adamw(gpu_types, small_chunks, shape, form):
    assert_alike(Steps(*form, **TRITON).trained(shape), Steps(*form).trained(shape))


@pytest.mark.parametrize("states", STATES)
def test_adamw_divides_by_what_is_left_of_the_betas(states):
    """A beta of 0, and counts of steps where 1 - beta^count is a series, and where it is a difference."""
    for betas in ((0.0, 0.5), (0.9, 0.999), (0.3, 0.99999)):
        form, found = replace(ADAMW_FORM, betas=betas), []
        for options in ({}, TRITON):
            steps = Steps(states, form=form, **options)
            weight, state = steps.start((300,))
            for count in (0, 3, 60, 900, 3e6):
                state["step"].fill_(count)
                steps.step(weight, torch.linspace(-1, 2, 300), state)
            found.append((weight, state))
        assert_alike(*found)


@pytest.mark.parametrize("form", FORMS_OF_ADAMW, ids=str)
def test_adamw_changes_nothing_where_a_gradient_is_not_finite(form):
    assert Steps(*form, **TRITON).unmoved_by_what_is_not_finite()


@pytest.mark.parametrize("form", FORMS_OF_ADAMW, ids=str)
def test_adamw_leaves_a_nan_with_its_element(gpu_types, form):
    assert_alike(Steps(*form, **TRITON).trained_with_a_nan(), Steps(*form).trained_with_a_nan())


@pytest.mark.parametrize("form", FORMS_OF_ADAMW, ids=str)
def test_adamw_steps_many_tensors_in_a_launch(gpu_types, small_chunks, form, monkeypatch):
    """In one, those whose sizes let loads be wide, and in another the rest."""
    launches, run = [], interpreter.GridExecutor.__call__

    def launch(self, *args, **options):
        launches.append(options["ALIGNED"])
        return run(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    together = Steps(*form, **TRITON).trained_together(num=2)
    assert sorted(launches) == [False, False, True, True]
    for found, expected in zip(together, Steps(*form).trained_together(num=2), strict=True):
        assert_alike(found, expected)


@pytest.mark.parametrize("form", FORMS_OF_ADAMW, ids=str)
def test_adamw_takes_any_address_and_size(gpu_types, form):
    both = (Steps(*form, **options).trained_apart() for options in (TRITON, {}))
    for found, expected in zip(*both, strict=True):
        assert_alike(found, expected)
