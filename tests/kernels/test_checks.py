import re

import pytest
import torch
from bpo_fast_kernels import LowRank, linear_logps, linear_pair_loss, linear_token_logps, pair_loss
from cases import offsets, random_case


def good():
    case = random_case(10, 4, 7)
    return {
        "hidden": case.hidden,
        "weight": case.weight,
        "targets": case.targets,
        "cu_seqlens": offsets([3, 2, 4, 1]),
        "ref_logps": torch.zeros(4),
    }


BAD_ROWS = [
    ({"hidden": torch.zeros(2, 5, 4)}, "hidden.shape = [2, 5, 4]"),
    ({"hidden": torch.zeros(10, 4, dtype=torch.float64)}, "hidden.dtype = torch.float64"),
    ({"weight": torch.zeros(7, 4, dtype=torch.bfloat16)}, "weight.dtype = torch.bfloat16"),
    ({"weight": torch.zeros(7, 5)}, "weight.shape = [7, 5]"),
    ({"weight": torch.zeros(0, 4)}, "weight.shape = [0, 4]"),
    ({"weight": torch.zeros(7)}, "weight.shape = [7]"),
    ({"hidden": torch.zeros(10, 0), "weight": torch.zeros(7, 0)}, "weight.shape = [7, 0]"),
    ({"weight": torch.zeros(7, 4, device="meta")}, "weight.device = meta"),
    ({"targets": torch.zeros(10, dtype=torch.int32)}, "targets.dtype = torch.int32"),
    ({"targets": torch.zeros(9, dtype=torch.int64)}, "targets.shape = [9]"),
    ({"targets": torch.zeros(10, dtype=torch.int64, device="meta")}, "targets.device = meta"),
    ({"targets": torch.full((10,), 7)}, "targets = 7"),
    ({"targets": torch.full((10,), -1)}, "targets = -1"),
]
BAD_SEQUENCES = [
    ({"cu_seqlens": torch.tensor([0, 3, 5, 9, 10])}, "cu_seqlens.dtype = torch.int64"),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens.shape = [0]"),
    ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, "cu_seqlens.shape = [2, 2]"),
    ({"cu_seqlens": offsets([3, 2, 4])}, "cu_seqlens"),
    ({"cu_seqlens": torch.tensor([1, 3, 5, 9, 10]).int()}, "cu_seqlens[0] = 1"),
    ({"cu_seqlens": offsets([3, 2, 4, 2])}, "cu_seqlens[-1] = 11"),
    ({"cu_seqlens": torch.tensor([0, 5, 3, 9, 10]).int()}, "cu_seqlens = [0, 5, 3, 9, 10]"),
    ({"cu_seqlens": torch.zeros(5, dtype=torch.int32, device="meta")}, "cu_seqlens.device = meta: expected cpu"),
]
BAD_OPTIONS = [
    ({"temperature": 0.0}, "temperature = 0.0"),
    ({"temperature": float("nan")}, "temperature = nan"),
    ({"temperature": 1e-39}, "temperature = 1e-39"),
    ({"temperature": 1e39}, "temperature = 1e+39"),
    ({"logit_softcap": -3.0}, "logit_softcap = -3.0"),
    ({"logit_softcap": 1e-300}, "logit_softcap = 1e-300"),
    ({"logit_softcap": float("nan")}, "logit_softcap = nan"),
    ({"mode": "fast"}, "mode = 'fast'"),
    ({"backend": "cuda"}, "backend = 'cuda'"),
    ({"backend": "triton"}, "backend = 'triton'"),
]
BAD_LOSSES = [
    ({"loss": "kto"}, "loss = 'kto'"),
    ({"beta": 0.0}, "beta = 0.0"),
    ({"beta": float("inf")}, "beta = inf"),
    ({"label_smoothing": 0.5}, "label_smoothing = 0.5"),
    ({"label_smoothing": 0.1, "loss": "slic"}, "label_smoothing = 0.1"),
    ({"ref_logps": torch.zeros(3)}, "ref_logps.shape = [3]"),
    ({"ref_logps": torch.zeros(4, device="meta")}, "ref_logps.device = meta"),
    ({"ref_logps": torch.zeros(4, dtype=torch.int64)}, "ref_logps.dtype = torch.int64"),
    ({"ref_logps": torch.zeros(4, dtype=torch.complex64)}, "ref_logps.dtype = torch.complex64"),
    ({"lengths": torch.ones(3)}, "lengths.shape = [3]"),
    ({"lengths": torch.ones(4, dtype=torch.complex64)}, "lengths.dtype = torch.complex64"),
    ({"lengths": torch.ones(4, device="meta")}, "lengths.device = meta"),
    ({"lengths": torch.tensor([1, -3, 1, 1])}, "lengths = -3"),
    ({"lengths": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, "lengths = nan"),
]


def refuses(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), BAD_ROWS + BAD_OPTIONS)
def test_linear_token_logps_names_what_is_wrong(change, message):
    names = ("hidden", "weight", "targets")
    args = good() | change
    options = {key: value for key, value in change.items() if key not in names}
    refuses(lambda: linear_token_logps(*(args[name] for name in names), **options), message)


@pytest.mark.parametrize(("change", "message"), BAD_ROWS + BAD_SEQUENCES + BAD_OPTIONS)
def test_linear_logps_names_what_is_wrong(change, message):
    names = ("hidden", "weight", "targets", "cu_seqlens")
    args = good() | change
    options = {key: value for key, value in change.items() if key not in names}
    refuses(lambda: linear_logps(*(args[name] for name in names), **options), message)


@pytest.mark.parametrize(("change", "message"), BAD_ROWS + BAD_SEQUENCES + BAD_OPTIONS + BAD_LOSSES)
def test_linear_pair_loss_names_what_is_wrong(change, message):
    names = ("hidden", "weight", "targets", "cu_seqlens", "ref_logps")
    args = good() | change
    options = {key: value for key, value in change.items() if key not in names}
    refuses(lambda: linear_pair_loss(*(args[name] for name in names), **options), message)


def test_linear_pair_loss_wants_pairs():
    args = good() | {"cu_seqlens": offsets([3, 2, 5])}
    refuses(lambda: linear_pair_loss(*args.values()), "cu_seqlens.shape = [4]")
    refuses(lambda: linear_pair_loss(*good().values(), num_pairs=0), "num_pairs = 0")


@pytest.mark.parametrize(
    ("a", "b", "mode", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(7, 2), "auto", "low_rank.a.shape = [2, 5]"),
        (torch.zeros(2, 4), torch.zeros(7, 3), "auto", "low_rank.b.shape = [7, 3]"),
        (torch.zeros(0, 4), torch.zeros(7, 0), "auto", "low_rank.a.shape = [0, 4]"),
        (torch.zeros(()), torch.zeros(7, 2), "auto", "low_rank.a.shape = []"),
        (torch.zeros(2, 4), torch.zeros(7, 2, dtype=torch.bfloat16), "auto", "low_rank.b.dtype = torch.bfloat16"),
        (torch.zeros(2, 4), torch.zeros(7, 2, device="meta"), "auto", "low_rank.b.device = meta"),
        (torch.zeros(2, 4), torch.zeros(7, 2), "store", "mode = 'store'"),
    ],
)
def test_a_low_rank_delta_must_fit_the_head(a, b, mode, message):
    refuses(lambda: linear_pair_loss(*good().values(), low_rank=LowRank(a, b, 1.0), mode=mode), message)


def test_a_low_rank_delta_wants_a_frozen_head():
    args = good()
    args["weight"].requires_grad_()
    low_rank = LowRank(torch.zeros(2, 4), torch.zeros(7, 2), 1.0)
    refuses(lambda: linear_pair_loss(*args.values(), low_rank=low_rank), "weight.requires_grad = True")


@pytest.mark.parametrize(("change", "message"), BAD_LOSSES)
def test_pair_loss_names_what_is_wrong(change, message):
    options = {"ref_logps": torch.zeros(4)} | change
    refuses(lambda: pair_loss(torch.zeros(4), **options), message)


def test_pair_loss_wants_an_even_vector_and_lengths_for_ipo():
    refuses(lambda: pair_loss(torch.zeros(3), torch.zeros(3)), "policy_logps.shape = [3]")
    refuses(lambda: pair_loss(torch.zeros(2, 2), torch.zeros(2, 2)), "policy_logps.shape = [2, 2]")
    refuses(lambda: pair_loss(torch.zeros(4), torch.zeros(4), loss="ipo"), "lengths = None")
    refuses(lambda: pair_loss(torch.zeros(4, dtype=torch.int64), torch.zeros(4)), "policy_logps.dtype = torch.int64")


def test_behavior_rows_are_checked_too():
    args, right = [good()[name] for name in ("hidden", "weight", "targets", "cu_seqlens")], torch.zeros(10, 4)
    for change, message in (
        ({"behavior_hidden": torch.zeros(9, 4)}, "behavior_hidden.shape = [9, 4]: expected [10, 4] like hidden"),
        ({"behavior_hidden": torch.zeros(10, 5)}, "behavior_hidden.shape = [10, 5]: expected [10, 4] like hidden"),
        ({"behavior_hidden": right.half()}, "behavior_hidden.dtype = torch.float16: expected torch.float32"),
        ({"behavior_hidden": right.to("meta")}, "behavior_hidden.device = meta"),
        ({"behavior_hidden": right, "behavior_weight": torch.zeros(3, 4)}, "behavior_weight.shape = [3, 4]"),
        ({"behavior_hidden": right, "behavior_weight": torch.zeros(7, 5)}, "behavior_weight.shape = [7, 5]"),
        ({"behavior_hidden": right, "behavior_weight": torch.zeros(7, 4).half()}, "behavior_weight.dtype"),
        ({"behavior_weight": torch.zeros(7, 4)}, "behavior_hidden = None"),
    ):
        refuses(lambda change=change: linear_logps(*args, **change), message)


def test_fused_needs_the_loss_for_a_trained_head():
    args = good()
    args["weight"].requires_grad_()
    names = ("hidden", "weight", "targets")
    refuses(lambda: linear_token_logps(*(args[name] for name in names), mode="fused"), "mode = 'fused'")
