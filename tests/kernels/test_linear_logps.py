import math
from dataclasses import replace

import pytest
import torch
from bpo_fast_kernels import linear_logps, linear_token_logps
from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.linear_logps import linear_logps_reference, linear_token_logps_reference
from bpo_fast_kernels.rows import Head, Rows
from cases import (
    Case,
    adversarial_cases,
    answer,
    keep_e_as_on_a_gpu,
    logits_case,
    offsets,
    peaked_case,
    random_case,
    relative,
)

BACKENDS = ("torch", "native")
MODES = ("fused", "store", "recompute")
# Draws that one or two roundings more, in 16 bits, take past the limit or near it: of 12 of rows at the limits, and
# of 120 (seed, rows) that are sure of a wrong token.
SEEDS = (2, 5, 7, 11)
FEW = [(2, 8), (11, 1), (18, 4), (26, 1), (32, 1), (36, 1), (37, 4), (38, 1), (38, 8)]
# 32 is the panel of the native kernels with AVX-512; 14 and 56 and 112 are their vocabulary steps.
SHAPES = [(1, 1, 2), (31, 17, 13), (32, 32, 14), (33, 33, 15), (64, 7, 301), (130, 48, 1000)]


def run(case, backend, mode="auto", frozen=False, coefs=None, **options):
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(not frozen)
    logps = linear_token_logps(hidden, weight, case.targets, backend=backend, mode=mode, **options)
    coefs = torch.randn(len(logps)) if coefs is None else coefs
    (logps * coefs).sum().backward()
    return logps.detach(), hidden.grad, weight.grad, coefs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_log_probs_and_gradients_match_float64(backend, shape, mode):
    case = random_case(*shape, spread=3.0)
    logps, dx, dw, coefs = run(case, backend, mode, frozen=mode == "fused")
    want = answer(case, coefs)
    assert float((logps - want.logps).abs().max()) < 1e-5
    assert relative(dx, want.dx) < 1e-5
    assert dw is None if mode == "fused" else relative(dw, want.dw) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", adversarial_cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_at_the_limits(backend, name, dtype):
    """In 16 bits on draws whose roundings show: where few numbers carry a gradient, a lucky draw hides them."""
    for seed in SEEDS if dtype != torch.float32 else (0,):
        torch.manual_seed(seed)
        case = adversarial_cases(dtype)[name]
        # float16 holds nothing below 6e-8: what p_y near 1 leaves of a gradient takes a scaled loss
        scale = 2.0**14 if (dtype, name) == (torch.float16, "p_y_near_1") else 1.0
        coefs = scale * torch.randn(len(case.targets))
        want, limit = answer(case, coefs), 1e-5 if dtype == torch.float32 else 4e-3
        for mode in MODES:
            logps, dx, dw, _ = run(case, backend, mode, frozen=mode == "fused", coefs=coefs)
            assert float((logps - want.logps).abs().max()) < 1e-4, mode
            assert relative(dx, want.dx) < limit, mode
            assert dw is None or relative(dw, want.dw) < limit, mode


@pytest.mark.parametrize("name", adversarial_cases())
def test_rows_at_the_limits_with_e_as_on_a_gpu(name, monkeypatch):
    keep_e_as_on_a_gpu(monkeypatch)
    test_rows_at_the_limits("torch", name, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparse", [True, False])
def test_few_rows_that_are_sure_of_a_wrong_token(backend, sparse, monkeypatch):
    """Where a hidden state is one large number nothing averages out: the exception that the promise names."""
    keep_e_as_on_a_gpu(monkeypatch)
    for seed, rows in FEW:
        torch.manual_seed(seed)
        targets, row = torch.randint(0, 77, (rows,)), torch.arange(rows)
        wrong = (targets + torch.randint(1, 77, (rows,))) % 77
        if sparse:
            logits = torch.randn(rows, 77)
            logits[row, wrong] = 14 + 2 * torch.rand(rows)
            case = logits_case(logits, targets)
        else:
            weight = torch.randn(77, 64)
            case = Case(weight[wrong] / 4 + 0.3 * torch.randn(rows, 64), weight, targets)
        case = Case(case.hidden.bfloat16(), case.weight.bfloat16(), targets)
        coefs = torch.randn(rows)
        want, limit = answer(case, coefs), 6e-3 if sparse else 4e-3
        for mode in MODES:
            _, dx, dw, _ = run(case, backend, mode, frozen=mode == "fused", coefs=coefs)
            assert relative(dx, want.dx) < limit, mode
            assert dw is None or relative(dw, want.dw) < limit, mode


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sure_target_keeps_its_small_log_prob_and_gradient(backend):
    case = adversarial_cases()["p_y_near_1"]
    logps, dx, _, coefs = run(case, backend, "fused", frozen=True)
    want = answer(case, coefs)
    assert float((logps.double() / want.logps - 1).abs().max()) < 1e-4
    assert float((dx.double() - want.dx).norm(dim=1).div(want.dx.norm(dim=1)).max()) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [random_case, peaked_case])
@pytest.mark.parametrize("mode", MODES)
def test_promise_for_16_bit_inputs(backend, dtype, make, mode):
    case = make(70, 64, 501, dtype=dtype)
    logps, dx, dw, coefs = run(case, backend, mode, frozen=mode == "fused")
    want = answer(case, coefs)
    assert logps.dtype == torch.float32
    assert dx.dtype == dtype
    assert float((logps - want.logps).abs().max()) < 1e-4
    assert relative(dx, want.dx) < 4e-3
    assert dw is None or relative(dw, want.dw) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options", [{"temperature": 0.6}, {"logit_softcap": 4.0}, {"temperature": 1.7, "logit_softcap": 9.0}]
)
def test_temperature_and_softcap(backend, mode, options):
    case = random_case(45, 24, 203, spread=6.0)
    logps, dx, dw, coefs = run(case, backend, mode, frozen=mode == "fused", **options)
    want = answer(case, coefs, **options)
    assert float((logps - want.logps).abs().max()) < 1e-5
    assert relative(dx, want.dx) < 1e-5
    assert dw is None or relative(dw, want.dw) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_vocabulary_tiles_and_a_shift_that_moves_between_them(backend):
    case = random_case(9, 16, 9001, spread=2.0)
    case.weight[5000:5003] += 30 * case.hidden[0] / case.hidden[0].norm() ** 2 * 4
    case.weight[8999] += 30 * case.hidden[0] / case.hidden[0].norm() ** 2 * 7
    for mode in MODES:
        logps, dx, dw, coefs = run(case, backend, mode, frozen=mode == "fused")
        want = answer(case, coefs)
        assert want.logps.min() < -150
        assert float((logps - want.logps).abs().max()) < 1e-4
        assert relative(dx, want.dx) < 1e-5
        assert dw is None or relative(dw, want.dw) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_with_empty_and_single_token_ones(backend):
    case = random_case(60, 32, 257, spread=3.0)
    cu_seqlens = offsets([0, 1, 20, 0, 38, 1, 0])
    logps = linear_logps(case.hidden, case.weight, case.targets, cu_seqlens, backend=backend)
    want = linear_logps_reference(case.hidden.double(), case.weight.double(), case.targets, cu_seqlens)
    assert logps.shape == (7,)
    assert float((logps - want).abs().max()) < 1e-4
    assert logps[[0, 3, 6]].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_rows(backend, lengths):
    hidden = torch.zeros(0, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    logps = linear_logps(hidden, weight, torch.zeros(0, dtype=torch.int64), offsets(lengths), backend=backend)
    assert logps.tolist() == [0.0] * len(lengths)
    logps.sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequence_stays_within_two_millinats(backend):
    case = peaked_case(512, 128, 3001, dtype=torch.bfloat16)
    logps = linear_logps(case.hidden, case.weight, case.targets, offsets([512]), backend=backend)
    want = linear_logps_reference(case.hidden.double(), case.weight.double(), case.targets, offsets([512]))
    assert abs(float(logps - want)) < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_runs_give_the_same_bits(backend):
    case = random_case(200, 96, 2003, spread=4.0)
    coefs = torch.randn(200)
    for mode in ("store", "recompute"):
        runs = []
        for _ in range(3):
            hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
            logps = linear_token_logps(hidden, weight, case.targets, mode=mode, backend=backend)
            (logps * coefs).sum().backward()
            runs.append((logps.detach(), hidden.grad, weight.grad))
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_modes_give_the_same_log_prob_bits(backend):
    case = random_case(100, 64, 1201, spread=4.0)
    want = linear_token_logps(case.hidden, case.weight, case.targets, backend=backend)
    for mode in MODES:
        logps, *_ = run(case, backend, mode, frozen=mode == "fused")
        assert torch.equal(logps, want), mode


@pytest.mark.parametrize("backend", BACKENDS)
def test_behavior_with_the_same_weights_gives_the_same_bits(backend):
    case = random_case(75, 40, 333)
    cu_seqlens = offsets([30, 45])
    hidden = case.hidden.clone().requires_grad_()
    options = {"behavior_hidden": case.hidden.clone(), "backend": backend}
    logps, behavior = linear_logps(hidden, case.weight, case.targets, cu_seqlens, **options)
    assert torch.equal(logps, behavior)
    assert logps.requires_grad
    assert not behavior.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_behavior_with_a_head_of_its_own(backend):
    case, other = random_case(50, 24, 100), random_case(50, 24, 100)
    cu_seqlens = offsets([20, 30])
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    logps, behavior = linear_logps(
        hidden,
        weight,
        case.targets,
        cu_seqlens,
        behavior_hidden=other.hidden,
        behavior_weight=other.weight,
        backend=backend,
    )
    want = linear_logps_reference(other.hidden.double(), other.weight.double(), case.targets, cu_seqlens)
    assert float((behavior - want).abs().max()) < 1e-4
    logps.sum().backward()
    assert relative(weight.grad, answer(case, torch.ones(50)).dw) < 1e-5


def test_long_sums_of_equal_numbers_round_as_the_target_does():
    weight = torch.full((200, 8192), 20 / 8192 / 1.1)
    hidden, targets = torch.full((3, 8192), 1.1), torch.tensor([0, 7, 199])
    logps = linear_token_logps(hidden.bfloat16(), weight.bfloat16(), targets, backend="native")
    assert torch.allclose(logps, torch.full((3,), -math.log(200)), rtol=0, atol=1e-4)


def test_native_rows_do_not_depend_on_their_neighbors():
    case = random_case(150, 40, 777, spread=3.0)
    together = linear_token_logps(case.hidden, case.weight, case.targets, backend="native")
    order = torch.randperm(150)
    for part in (order[:1], order[:37], order[37:]):
        alone = linear_token_logps(case.hidden[part], case.weight, case.targets[part], backend="native")
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("shape", [(70, 64, 225), (33, 34, 13), (5, 16, 14)])
def test_a_head_that_has_to_be_packed_gives_the_bits_of_one_that_has_not(shape):
    """Pairs of bfloat16 that do not begin at a word are packed."""
    case = random_case(*shape, dtype=torch.bfloat16)
    moved = torch.empty(case.weight.numel() + 1, dtype=torch.bfloat16)[1:].view_as(case.weight).copy_(case.weight)
    assert (case.weight.data_ptr() % 4, moved.data_ptr() % 4) == (0, 2)
    for mode in ("fused", "recompute"):
        torch.manual_seed(1)
        found = run(replace(case, weight=moved), "native", mode, frozen=mode == "fused")
        torch.manual_seed(1)
        for own, wanted in zip(found, run(case, "native", mode, frozen=mode == "fused"), strict=True):
            assert own is wanted is None or torch.equal(own, wanted)


@pytest.mark.parametrize(("width", "dtype"), [(1024, torch.float32), (2048, torch.bfloat16)])
def test_rows_of_a_head_that_meet_in_the_cache(width, dtype):
    """Of 4 KiB each: a single panel of tokens takes them where they stand, several pack them."""
    case = random_case(70, width, 45, dtype=dtype)
    together = linear_token_logps(case.hidden, case.weight, case.targets, backend="native")
    assert float((together - answer(case, torch.ones(70)).logps).abs().max()) < 1e-4
    for part in (slice(0, 7), slice(60, 70)):
        alone = linear_token_logps(case.hidden[part], case.weight, case.targets[part], backend="native")
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_native_sums_dw_over_several_visits(dtype, mode):
    """A visit takes 1,024 rows of float32 or 2,048 of bfloat16."""
    case = random_case(2100, 33, 61, dtype=dtype)
    _, _, dw, coefs = run(case, "native", mode)
    assert relative(dw, answer(case, coefs).dw) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_rows_of_a_kept_e_begin_on_16_bytes():
    engine, case = pick_backend("torch", torch.device("cpu")), random_case(5, 16, 61)
    rows = Rows(case.hidden, case.targets, Head(case.weight))
    e = engine.score(rows, dx=False, keep=True).e
    assert e.shape == (5, 61)
    assert e.stride(0) * e.itemsize % 16 == 0
    assert e.untyped_storage().nbytes() == engine.kept_bytes(5, rows.head)


@pytest.fixture
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_medium_precision_keeps_twice_the_rows_of_e_in_dw(medium_precision):
    engine, case = pick_backend("native", torch.device("cpu")), random_case(128, 64, 203)
    rows, coefs = Rows(case.hidden, case.targets, Head(case.weight)), torch.randn(128)
    sums = engine.dw_sums(case.weight, 1)
    scored = engine.score(rows, dx=False, keep=True, sums=sums)
    panels, _, lanes = scored.e.shape
    assert panels * lanes == (0 if engine.pairs else 64)
    want = answer(case, coefs)
    assert relative(engine.kept_dx(scored, coefs, rows, zeros=False), want.dx) < 4e-3
    engine.kept_dw_(sums, scored, coefs, rows, zeros=False)
    assert relative(sums.total, want.dw) < 4e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(5, 3, 9), (33, 33, 15), (130, 48, 1001)])
def test_native_float32_with_bfloat16_gradient_products(medium_precision, mode, shape):
    engine = pick_backend("native", torch.device("cpu"))
    case = random_case(*shape, spread=3.0)
    logps, dx, dw, coefs = run(case, "native", mode, frozen=mode == "fused")
    want = answer(case, coefs)
    assert float((logps - want.logps).abs().max()) < 1e-5, "log-probs stay exact"
    assert relative(dx, want.dx) < 4e-3
    assert dw is None or relative(dw, want.dw) < 4e-3
    assert not engine.pairs or relative(dx, want.dx) > 1e-5, "the option does something"


def test_native_sums_bfloat16_gradients_in_their_own_type_for_a_few_visits():
    engine, weight = pick_backend("native", torch.device("cpu")), torch.zeros(5, 3, dtype=torch.bfloat16)
    assert engine.dw_sums(weight, 8).total.dtype == torch.bfloat16
    assert engine.dw_sums(weight, 9).total.dtype == torch.float32
    assert engine.dw_sums(weight.float(), 1).total.dtype == torch.float32
    assert pick_backend("torch", torch.device("cpu")).dw_sums(weight, 1).total.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_coefficient_are_skipped(backend, dtype):
    case = random_case(96, 16, 150, dtype=dtype)
    engine = pick_backend(backend, torch.device("cpu"))
    rows = Rows(case.hidden, case.targets, Head(case.weight))
    scored = engine.score(rows, dx=False, keep=True)
    coefs = torch.randn(96)
    coefs[:64] = 0
    want = answer(case, coefs)
    # The first 64 rows of E become NaN: whoever reads them is found out.
    scored.e.view(96, -1)[:64].fill_(torch.nan)
    sums = engine.dw_sums(case.weight, 1)
    engine.kept_dw_(sums, scored, coefs, rows, zeros=True)
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    assert relative(engine.kept_dx(scored, coefs, rows, zeros=True), want.dx) < limit
    assert relative(sums.total, want.dw) < limit


def test_auto_stores_only_within_its_budget():
    from bpo_fast_kernels.linear_logps import choose_mode

    case = random_case(64, 8, 500)
    engine, head = pick_backend("torch", torch.device("cpu")), Head(case.weight.requires_grad_())
    hidden = case.hidden.requires_grad_()
    assert choose_mode("auto", hidden, head, engine, 64 * 500 * 4) == "store"
    assert choose_mode("auto", hidden, head, engine, 64 * 500 * 4 - 1) == "recompute"
    assert choose_mode("auto", hidden, Head(case.weight.detach()), engine, 0) == "fused"
    with torch.no_grad():
        assert choose_mode("auto", hidden, head, engine, 10**9) == "forward"
    assert choose_mode("auto", hidden.detach(), Head(case.weight.detach()), engine, 10**9) == "forward"


def test_only_the_head_is_trained():
    case = random_case(40, 16, 90)
    for mode in ("store", "recompute"):
        weight = case.weight.clone().requires_grad_()
        linear_token_logps(case.hidden, weight, case.targets, mode=mode).sum().backward()
        assert relative(weight.grad, answer(case, torch.ones(40)).dw) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_of_a_gradient_is_refused(mode):
    case = random_case(5, 4, 7)
    hidden = case.hidden.requires_grad_()
    logps = linear_token_logps(hidden, case.weight, case.targets, mode=mode)
    (slope,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_targets_that_change_before_the_backward_pass_are_noticed(mode):
    case = random_case(5, 4, 7)
    logps = linear_token_logps(case.hidden, case.weight.requires_grad_(), case.targets, mode=mode)
    case.targets.fill_(-100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_views_of_larger_tensors():
    case = random_case(40, 16, 90)
    wide = torch.randn(40, 32)
    wide[:, ::2] = case.hidden
    for backend in BACKENDS:
        got = linear_token_logps(wide[:, ::2], case.weight.T.contiguous().T, case.targets, backend=backend)
        want = linear_token_logps(case.hidden, case.weight, case.targets, backend=backend)
        assert float((got - want).abs().max()) < 1e-6


def test_gradcheck_of_the_reference():
    case = random_case(5, 4, 7)
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    options = {"temperature": 0.8, "logit_softcap": 3.0}
    assert torch.autograd.gradcheck(
        lambda x, w: linear_token_logps_reference(x, w, case.targets, **options), (hidden, weight)
    )
