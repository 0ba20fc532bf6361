from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bpo_fast_kernels import LowRank, linear_logps, linear_pair_loss
from bpo_fast_kernels.backends import pick_backend
from bpo_fast_kernels.linear_pair_loss import linear_pair_loss_reference, pair_chunks
from bpo_fast_kernels.rows import Head, Rows
from cases import Case, adversarial_cases, answer, keep_e_as_on_a_gpu, offsets, peaked_case, random_case, relative

BACKENDS = ("torch", "native")
LENGTHS = [5, 0, 70, 1, 9, 33, 3, 1]  # pairs of 14, 33, 73 and 2 rows
LOSSES = ["dpo", "ipo", "slic"]
BUDGETS = (None, 1)  # one chunk, and a pair a chunk
SEEDS = (0, 3, 12, 14)  # of 24 draws of rows at the limits, those that two roundings more take past 0.004
# a backend, whether the head is frozen, and a budget: any two of them meet
FORMS = [(BACKENDS[0], True, None), (BACKENDS[0], False, 1), (BACKENDS[1], True, 1), (BACKENDS[1], False, None)]
OPTIONS = [
    {"temperature": 0.7},
    {"logit_softcap": 4.0},
    {"temperature": 1.3, "logit_softcap": 5.0},
    {"label_smoothing": 0.1},
]


def reference(case, cu_seqlens, ref, **options):
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    scalar, loss, margins = linear_pair_loss_reference(
        hidden, weight, case.targets, cu_seqlens, ref if ref is None else ref.double(), **options
    )
    scalar.backward()
    return scalar.detach(), loss.detach(), margins.detach(), hidden.grad, weight.grad


def near_ref(case, cu_seqlens, **head):
    """Reference log-probs a few nats away from the policy's."""
    logps = linear_logps(case.hidden, case.weight, case.targets, cu_seqlens, **head)
    return logps + 6 * torch.randn(len(cu_seqlens) - 1)


def step(case, cu_seqlens, ref, frozen, **options):
    """The loss and its gradients."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(not frozen)
    scalar, _ = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, ref, **options)
    scalar.backward()
    return (scalar.detach(), hidden.grad) if frozen else (scalar.detach(), hidden.grad, weight.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("budget", [None, 1], ids=["one_chunk", "a_pair_a_chunk"])
def test_loss_and_gradients_match_float64(backend, loss, frozen, budget):
    case, cu_seqlens = random_case(122, 24, 203, spread=2.0), offsets(LENGTHS)
    ref = near_ref(case, cu_seqlens)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(not frozen)
    scalar, parts = linear_pair_loss(
        hidden, weight, case.targets, cu_seqlens, ref, loss=loss, budget_bytes=budget, backend=backend
    )
    want = reference(case, cu_seqlens, ref, loss=loss)
    assert relative(scalar.detach(), want[0]) < 1e-5
    assert relative(parts.loss, want[1]) < 1e-5
    assert relative(parts.margins, want[2]) < 1e-5
    (3 * scalar).backward()
    assert relative(hidden.grad, 3 * want[3]) < 1e-5
    assert frozen or relative(weight.grad, 3 * want[4]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", adversarial_cases())
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_the_limits(backend, name, frozen, dtype):
    case, cu_seqlens = adversarial_cases(dtype)[name], offsets([10, 9, 20, 1])
    ref = near_ref(case, cu_seqlens)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(not frozen)
    scalar, parts = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, ref, beta=0.01, backend=backend)
    scalar.backward()
    want = reference(case, cu_seqlens, ref, beta=0.01)
    assert torch.allclose(parts.margins.double(), want[2], rtol=1e-5, atol=2e-3)
    limit = 1e-4 if dtype == torch.float32 else 4e-3
    assert relative(hidden.grad, want[3]) < limit
    assert frozen or relative(weight.grad, want[4]) < limit


@pytest.mark.parametrize("name", adversarial_cases())
@pytest.mark.parametrize("loss", ["dpo", "slic"])
def test_rows_at_the_limits_with_e_as_on_a_gpu(name, loss, monkeypatch):
    keep_e_as_on_a_gpu(monkeypatch)
    for seed in SEEDS:
        torch.manual_seed(seed)
        case, cu_seqlens = adversarial_cases(torch.bfloat16)[name], offsets([4, 9, 3, 7, 10, 5, 1, 1])
        ref, options = near_ref(case, cu_seqlens), {"loss": loss, "beta": 0.01}
        want = reference(case, cu_seqlens, ref, **options)
        for budget in BUDGETS:
            got = step(case, cu_seqlens, ref, False, budget_bytes=budget, backend="torch", **options)
            assert relative(got[1], want[3]) < 4e-3, budget
            assert relative(got[2], want[4]) < 4e-3, budget


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.7123, 3.0])
def test_a_factor_of_the_loss_is_not_rounded_to_bfloat16(backend, scale):
    case, cu_seqlens = random_case(122, 24, 203, spread=2.0, dtype=torch.bfloat16), offsets(LENGTHS)
    grads = []
    for factor in (1.0, scale):
        leaves = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        scalar, _ = linear_pair_loss(*leaves, case.targets, cu_seqlens, torch.zeros(8), backend=backend)
        (factor * scalar).backward()
        grads.append([leaf.grad for leaf in leaves])
    for plain, scaled in zip(*grads, strict=True):
        assert torch.equal(scaled, (plain.float() * scale).bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("budget", [None, 1], ids=["one_chunk", "a_pair_a_chunk"])
def test_promise_for_bfloat16(backend, frozen, budget):
    case, cu_seqlens = peaked_case(122, 64, 1003, dtype=torch.bfloat16), offsets(LENGTHS)
    ref = near_ref(case, cu_seqlens)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(not frozen)
    scalar, parts = linear_pair_loss(
        hidden, weight, case.targets, cu_seqlens, ref, budget_bytes=budget, backend=backend
    )
    want = reference(case, cu_seqlens, ref)
    assert float((parts.margins - want[2]).abs().max()) < 2e-3
    scalar.backward()
    assert relative(hidden.grad, want[3]) < 4e-3
    assert frozen or relative(weight.grad, want[4]) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("frozen", [True, False])
def test_margin_is_exactly_zero_against_log_probs_computed_before(backend, loss, frozen):
    case, cu_seqlens = random_case(122, 40, 301), offsets(LENGTHS)
    with torch.no_grad():
        ref = linear_logps(case.hidden, case.weight, case.targets, cu_seqlens, backend=backend)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(not frozen)
    _, parts = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, ref, loss=loss, backend=backend)
    assert torch.equal(parts.policy_logps, ref)
    assert parts.margins.tolist() == [0.0] * 4


def test_native_margin_is_exactly_zero_for_any_cut_of_the_batch():
    case, cu_seqlens = random_case(122, 40, 301), offsets(LENGTHS)
    ref = torch.cat(
        [
            linear_logps(case.hidden[a:b], case.weight, case.targets[a:b], offsets([b - a]), backend="native")
            for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        ]
    )
    for frozen in (True, False):
        weight = case.weight.clone().requires_grad_(not frozen)
        hidden = case.hidden.clone().requires_grad_()
        _, parts = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, ref, budget_bytes=1, backend="native")
        assert parts.margins.tolist() == [0.0] * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_without_reference_the_policy_is_its_own(backend, frozen, loss):
    case, cu_seqlens = random_case(122, 40, 301), offsets(LENGTHS)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(not frozen)
    scalar, parts = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, None, loss=loss, backend=backend)
    want = reference(case, cu_seqlens, None, loss=loss)
    assert parts.margins.tolist() == [0.0] * 4
    scalar.backward()
    assert relative(hidden.grad, want[3]) < 1e-5
    assert frozen or relative(weight.grad, want[4]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["fused", "store", "recompute"])
def test_modes_agree(backend, mode):
    case, cu_seqlens = random_case(122, 40, 301, spread=3.0), offsets(LENGTHS)
    ref = near_ref(case, cu_seqlens)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    scalar, _ = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, ref, mode=mode, backend=backend)
    scalar.backward()
    want = reference(case, cu_seqlens, ref)
    assert relative(hidden.grad, want[3]) < 1e-5
    assert relative(weight.grad, want[4]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["dpo", "slic"])
@pytest.mark.parametrize("budget", [None, 1], ids=["one_chunk", "a_pair_a_chunk"])
def test_low_rank_delta_on_a_frozen_head(backend, dtype, loss, budget):
    case, cu_seqlens = random_case(122, 24, 203, spread=2.0, dtype=dtype), offsets(LENGTHS)
    ref = near_ref(case, cu_seqlens)
    a, b = torch.randn(5, 24).to(dtype).requires_grad_(), (0.02 * torch.randn(203, 5)).to(dtype).requires_grad_()
    hidden = case.hidden.clone().requires_grad_()
    low_rank = LowRank(a, b, 1.5)
    options = {"loss": loss, "low_rank": low_rank, "budget_bytes": budget, "backend": backend}
    scalar, parts = linear_pair_loss(hidden, case.weight, case.targets, cu_seqlens, ref, **options)
    scalar.backward()
    leaves = [t.detach().double().requires_grad_() for t in (hidden, a, b)]
    want, _, margins = linear_pair_loss_reference(
        leaves[0],
        case.weight.double(),
        case.targets,
        cu_seqlens,
        ref.double(),
        loss=loss,
        low_rank=LowRank(*leaves[1:], 1.5),
    )
    want.backward()
    # in bfloat16 the hidden states of rank r are rounded, as those of an adapter are
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    assert float((parts.margins - margins).detach().abs().max()) < (1e-3 if dtype == torch.float32 else 0.5)
    for got, leaf in zip((hidden, a, b), leaves, strict=True):
        assert relative(got.grad, leaf.grad) < limit
    assert case.weight.grad is None


def test_low_rank_delta_has_a_forward_mode_and_may_be_frozen():
    case, cu_seqlens = random_case(122, 24, 203), offsets(LENGTHS)
    low_rank = LowRank(torch.randn(5, 24), torch.randn(203, 5), 0.1)
    args = (case.weight, case.targets, cu_seqlens, near_ref(case, cu_seqlens))
    hidden = case.hidden.clone().requires_grad_()
    scalar, _ = linear_pair_loss(hidden, *args, low_rank=low_rank)
    forward, _ = linear_pair_loss(hidden, *args, low_rank=low_rank, mode="forward")
    want, *_ = linear_pair_loss_reference(hidden, *args, low_rank=low_rank)
    assert torch.equal(scalar.detach(), forward)
    assert torch.allclose(scalar, want, rtol=1e-5)
    scalar.backward()
    assert relative(hidden.grad, torch.autograd.grad(want, hidden)[0].double()) < 1e-5


def test_forward_mode_has_no_gradient():
    case, cu_seqlens = random_case(122, 40, 301), offsets(LENGTHS)
    scalar, _ = linear_pair_loss(
        case.hidden.requires_grad_(), case.weight, case.targets, cu_seqlens, None, mode="forward"
    )
    assert not scalar.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["dpo", "slic"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_runs_give_the_same_bits(backend, loss, frozen, dtype):
    case, cu_seqlens = random_case(122, 40, 301, dtype=dtype), offsets(LENGTHS)
    ref, runs = near_ref(case, cu_seqlens), []
    for _ in range(3):
        runs.append(step(case, cu_seqlens, ref, frozen, loss=loss, budget_bytes=1, backend=backend))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options_of_the_head_and_the_loss_match_float64(loss, dtype, options):
    if "label_smoothing" in options and loss != "dpo":
        pytest.skip("only dpo is smoothed")
    case, cu_seqlens = random_case(122, 24, 203, spread=2.0, dtype=dtype), offsets(LENGTHS)
    head = {name: value for name, value in options.items() if name != "label_smoothing"}
    ref = near_ref(case, cu_seqlens, **head)
    want, limit = reference(case, cu_seqlens, ref, loss=loss, **options), 1e-5 if dtype == torch.float32 else 4e-3
    for backend, frozen, budget in FORMS:
        got = step(case, cu_seqlens, ref, frozen, loss=loss, budget_bytes=budget, backend=backend, **options)
        assert torch.allclose(got[0].double(), want[0], rtol=1e-5), (backend, frozen, budget)
        assert relative(got[1], want[3]) < limit, (backend, frozen, budget)
        assert frozen or relative(got[2], want[4]) < limit, (backend, budget)


def test_the_divisor_is_that_of_the_whole_step():
    case, cu_seqlens = random_case(122, 16, 50), offsets(LENGTHS)
    for frozen in (True, False):
        grads = []
        for num_pairs in (None, 16):
            hidden = case.hidden.clone().requires_grad_()
            weight = case.weight.clone().requires_grad_(not frozen)
            scalar, parts = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, None, num_pairs=num_pairs)
            assert torch.allclose(scalar, parts.loss.sum() / (num_pairs or 4))
            scalar.backward()
            grads.append(hidden.grad)
        assert torch.allclose(grads[0], 4 * grads[1], rtol=1e-5, atol=1e-9)


def test_ipo_takes_lengths_of_its_own():
    case, cu_seqlens = random_case(122, 16, 50), offsets(LENGTHS)
    ref = near_ref(case, cu_seqlens)
    for frozen in (True, False):
        weight = case.weight.clone().requires_grad_(not frozen)
        hidden = case.hidden.clone().requires_grad_()
        _, parts = linear_pair_loss(
            hidden, weight, case.targets, cu_seqlens, ref, loss="ipo", lengths=torch.ones(8, dtype=torch.int32)
        )
        gap = parts.policy_logps - ref
        assert torch.allclose(parts.margins, gap[:4] - gap[4:], atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_pairs(frozen):
    weight = torch.randn(9, 4).requires_grad_(not frozen)
    hidden = torch.zeros(0, 4, requires_grad=True)
    scalar, parts = linear_pair_loss(hidden, weight, torch.zeros(0, dtype=torch.int64), offsets([]), None)
    scalar.backward()
    assert float(scalar.detach()) == 0.0
    assert parts.loss.shape == (0,)
    if not frozen:
        assert torch.equal(weight.grad, torch.zeros(9, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("frozen", [True, False])
def test_pairs_without_a_row(backend, loss, frozen):
    case, ref = Case(torch.zeros(0, 4), torch.randn(9, 4), torch.zeros(0, dtype=torch.int64)), torch.randn(4)
    want = reference(case, offsets([0] * 4), ref, loss=loss)
    got = step(case, offsets([0] * 4), ref, frozen, loss=loss, backend=backend)
    assert torch.allclose(got[0].double(), want[0], rtol=1e-5)
    assert got[1].shape == (0, 4)
    if not frozen:
        assert torch.equal(got[2], torch.zeros(9, 4))


@pytest.mark.parametrize("pairs", [8, 9])
def test_eight_roundings_of_a_bfloat16_gradient_keep_the_promise(pairs):
    case, cu_seqlens = random_case(20 * pairs, 32, 301, spread=2.0, dtype=torch.bfloat16), offsets([10] * 2 * pairs)
    ref, weight = near_ref(case, cu_seqlens), case.weight.clone().requires_grad_()
    scalar, _ = linear_pair_loss(case.hidden, weight, case.targets, cu_seqlens, ref, budget_bytes=1, backend="native")
    scalar.backward()
    assert relative(weight.grad, reference(case, cu_seqlens, ref)[4]) < 4e-3


def test_a_chunk_fills_its_budget():
    """Native E takes whole panels of up to 32 rows; a budget of 64 rows holds 64 rows of short pairs, not two."""
    case, cu_seqlens = random_case(128, 8, 100), offsets([2] * 64)
    engine, calls = pick_backend("native", torch.device("cpu")), []
    budget = engine.kept_bytes(64, Head(case.weight))
    score = engine.score
    try:
        engine.score = lambda rows, **options: (calls.append(len(rows.hidden)), score(rows, **options))[1]
        weight = case.weight.requires_grad_()
        linear_pair_loss(case.hidden, weight, case.targets, cu_seqlens, None, budget_bytes=budget, backend="native")
    finally:
        del engine.score
    inside = engine.free_rows(case.weight)  # where panels are narrow, one of E fits into dW
    assert calls == [64 + inside, 64 - inside]


def test_chunks_hold_whole_pairs():
    bounds = offsets(LENGTHS).tolist()  # pairs of 14, 33, 73 and 2 rows
    assert pair_chunks(bounds, 1000) == [(0, 4)]
    assert pair_chunks(bounds, 75) == [(0, 2), (2, 4)]
    assert pair_chunks(bounds, 1) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert pair_chunks(bounds, 33, free_rows=14) == [(0, 2), (2, 3), (3, 4)]
    assert pair_chunks([0], 5) == []


@pytest.mark.parametrize("width", [64, 65, 66, 160, 321], ids=lambda width: f"H{width}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["dpo", "slic"])
@pytest.mark.parametrize("budget", [None, 1], ids=["one_chunk", "small_chunks"])
def test_rows_of_e_that_lie_in_the_empty_dw(width, dtype, loss, budget):
    """122 rows are four panels of 32: dW holds none to all of them, by its width and type."""
    case, cu_seqlens = random_case(122, width, 203, spread=2.0, dtype=dtype), offsets(LENGTHS)
    ref = near_ref(case, cu_seqlens)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    options = {"loss": loss, "budget_bytes": budget, "backend": "native"}
    scalar, _ = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, ref, **options)
    scalar.backward()
    want = reference(case, cu_seqlens, ref, loss=loss)
    limit = 1e-4 if dtype == torch.float32 else 4e-3
    assert relative(hidden.grad, want[3]) < limit
    assert relative(weight.grad, want[4]) < limit


def test_dw_holds_as_many_rows_of_e_as_its_rows_have_room_for():
    engine = pick_backend("native", torch.device("cpu"))
    for width in (engine.lanes - 1, engine.lanes, 5 * engine.lanes + 2):
        assert engine.free_rows(torch.zeros(3, width)) == width // engine.lanes * engine.lanes
    if engine.pairs:
        weight = torch.zeros(3, 5 * engine.lanes, dtype=torch.bfloat16)
        assert engine.free_rows(weight) == 5 * engine.lanes
        assert engine.free_rows(weight[:, :-1]) == 0, "a row of an odd number of bfloat16 has no whole words"


def test_e_moves_into_dw_only_while_nothing_is_summed_there():
    case, engine = random_case(96, 64, 40), pick_backend("native", torch.device("cpu"))
    rows, coefs = Rows(case.hidden, case.targets, Head(case.weight)), torch.randn(96)
    sums = engine.dw_sums(case.weight, 2)
    for visit in (1, 2):
        scored = engine.score(rows, dx=True, keep=True, sums=sums)
        assert (scored.e_in_dw is sums.total) == (visit == 1)
        again = engine.kept_dx(scored, coefs, rows, zeros=False)
        assert relative(again, (scored.unit_dx * coefs[:, None]).double()) < 1e-5
        engine.kept_dw_(sums, scored, coefs, rows, zeros=False)
        assert relative(sums.total, visit * answer(case, coefs).dw) < 1e-5


def test_a_gradient_without_live_rows_is_zero():
    case, cu_seqlens = random_case(122, 64, 203), offsets(LENGTHS)
    ref = near_ref(case, cu_seqlens)
    ref[:4] -= 1000  # every pair is far past the margin
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    scalar, _ = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, ref, loss="slic", backend="native")
    scalar.backward()
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


def test_gradcheck_of_the_reference():
    case, cu_seqlens = random_case(12, 3, 5), offsets([2, 0, 5, 1, 3, 1])
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    ref = torch.randn(6, dtype=torch.float64)
    for loss in LOSSES:
        assert torch.autograd.gradcheck(
            lambda x, w, name=loss: linear_pair_loss_reference(x, w, case.targets, cu_seqlens, ref, loss=name)[0],
            (hidden, weight),
        )


@pytest.mark.parametrize("frozen", [True, False])
def test_a_gradient_of_a_gradient_is_refused(frozen):
    case, cu_seqlens = random_case(122, 16, 50), offsets(LENGTHS)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen)
    scalar, _ = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, torch.zeros(8))
    (slope,) = torch.autograd.grad(scalar.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaled_loss_lifts_gradients_of_float16(backend):
    case, cu_seqlens = random_case(122, 24, 203, spread=2.0, dtype=torch.float16), offsets(LENGTHS)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    options = {"beta": 0.01, "num_pairs": 1000}
    scalar, _ = linear_pair_loss(hidden, weight, case.targets, cu_seqlens, torch.zeros(8), backend=backend, **options)
    (2.0**14 * scalar).backward()
    _, _, _, dx, dw = reference(case, cu_seqlens, torch.zeros(8), **options)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float16
    assert relative(hidden.grad, 2.0**14 * dx) < 1e-3
    assert relative(weight.grad, 2.0**14 * dw) < 1e-3


def test_gradients_are_handed_out_once():
    case, cu_seqlens = random_case(122, 16, 50), offsets(LENGTHS)
    weight = case.weight.requires_grad_()
    scalar, _ = linear_pair_loss(case.hidden, weight, case.targets, cu_seqlens, None)
    scalar.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        scalar.backward()


def test_what_the_native_backend_keeps_between_calls_changes_nothing():
    """E of a larger and of a smaller call, of both types and of two threads, in the memory of the calls before."""
    backend = pick_backend("native", torch.device("cpu"))

    def gradients(rows, dtype):
        draw = torch.Generator().manual_seed(rows)
        hidden, weight = (torch.randn(n, 40, generator=draw).to(dtype).requires_grad_() for n in (rows, 777))
        targets, cu = torch.randint(777, (rows,), generator=draw), torch.linspace(0, rows, 9).int()
        loss, _ = linear_pair_loss(
            hidden, weight, targets, cu, ref_logps=torch.zeros(8), budget_bytes=200_000, backend="native"
        )
        loss.backward()
        return hidden.grad, weight.grad

    cases = [(400, torch.float32), (90, torch.bfloat16), (700, torch.float32), (400, torch.float32)]
    fresh = []
    for case in cases:
        backend.release()
        fresh.append(gradients(*case))
    backend.release()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(gradients, *case) for case in cases * 4]
        found = [f.result() for f in futures]
    for got, want in zip([gradients(*c) for c in cases] + found, fresh * 5, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
