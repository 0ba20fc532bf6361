"""The stacked optimizer against M separate ones, the schedule, and what happens to bad gradients."""

import dataclasses
import itertools
import weakref

import pytest
import torch
from bpo_fast_kernels import adamw as kernels
from bpo_fast_kernels.adamw_moments import BLOCK
from torch import nn

from bpo_fast.attention import has_native
from bpo_fast.config import OptimConfig
from bpo_fast.memory import _LiveBytes
from bpo_fast.optim import Optimizer, _norm, cut, learning_rate, state_bytes
from bpo_fast.ranks import Ranks

CONFIG = dataclasses.replace(OptimConfig(), learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.1)
SHAPES = ((5, 3), (7,))


def stacked(num_members, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(num_members, *s).to(dtype)) for s in SHAPES]


def set_grads(parameters, step):
    torch.manual_seed(100 + step)
    for p in parameters:
        # members of very different size: clipping them together would couple them
        sizes = torch.tensor([0.01, 1.0, 30.0])[: p.shape[0]].view(-1, *[1] * (p.dim() - 1))
        p.grad = (torch.randn(p.shape) * sizes).to(p.dtype)


def test_stacked_members_train_as_separate_optimizers():
    parameters = stacked(3)
    singles = [[nn.Parameter(p[m].detach().clone()) for p in parameters] for m in range(3)]
    options = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-6}
    decays = [[{"params": [p], "weight_decay": 0.1 * (p.dim() > 1)} for p in s] for s in singles]
    adamws = [torch.optim.AdamW(groups, **options) for groups in decays]
    optimizer = Optimizer(parameters, CONFIG, num_steps=10, num_members=3)
    for step in range(10):
        set_grads(parameters, step)
        for m, (single, adamw) in enumerate(zip(singles, adamws, strict=True)):
            for p, q in zip(parameters, single, strict=True):
                q.grad = p.grad[m].clone()
            torch.nn.utils.clip_grad_norm_(single, 0.5)
            for group in adamw.param_groups:
                group["lr"] = 1e-2 * (1 - step / 10)
            adamw.step()
        norm, finite = optimizer.step(step)
        assert finite
        assert norm > 0
    for m in range(3):
        for p, q in zip(parameters, singles[m], strict=True):
            torch.testing.assert_close(p[m], q, rtol=1e-5, atol=1e-7)


def test_full_fine_tuning_clips_all_tensors_together():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]
    optimizer = Optimizer(parameters, CONFIG, num_steps=1, num_members=None)
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((4,), 3.0)
    norm = float(optimizer.step(0)[0])
    assert norm == pytest.approx((3 * 4 + 4 * 9) ** 0.5)
    assert parameters[0].grad[0] == pytest.approx(2.0 * 0.5 / norm, rel=1e-4)


@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_decay_in_matrices_only(dtype, states):
    matrix, norm = (nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((4, 3), (3,)))
    config = dataclasses.replace(CONFIG, learning_rate=1.0, weight_decay=0.5, schedule="constant", states=states)
    optimizer = Optimizer([matrix, norm], config, num_steps=1, num_members=None)
    matrix.grad, norm.grad = torch.zeros_like(matrix), torch.zeros_like(norm)
    optimizer.step(0)
    assert (matrix == 0.5).all()
    assert (norm == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad):
    parameters = stacked(2)
    optimizer = Optimizer(parameters, CONFIG, num_steps=10, num_members=2)
    set_grads(parameters, 0)
    optimizer.step(0)
    before = [p.detach().clone() for p in parameters]
    moments = {k: v.clone() for k, v in optimizer.state_dict().items()}
    set_grads(parameters, 1)
    parameters[1].grad[1, 3] = bad
    norm, finite = map(float, optimizer.step(1))
    assert not finite
    assert norm != norm or norm == float("inf")
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert all(torch.equal(v, moments[k]) for k, v in optimizer.state_dict().items())


def test_bfloat16_weights_do_not_lose_small_updates():
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    config = dataclasses.replace(CONFIG, learning_rate=1e-4, weight_decay=0.0, schedule="constant")
    optimizer = Optimizer([weight], config, num_steps=100, num_members=None)
    for step in range(100):
        weight.grad = torch.ones(8, dtype=torch.bfloat16)
        optimizer.step(step)
    # 100 steps of 1e-4 are 0.01; each alone is far below half a bf16 step (0.002) at 1
    assert float(weight.detach().float().mean()) == pytest.approx(0.99, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bitwise(dtype):
    parameters = stacked(2, dtype)
    optimizer = Optimizer(parameters, CONFIG, num_steps=6, num_members=2)
    for step in range(3):
        set_grads(parameters, step)
        optimizer.step(step)
    copy = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = Optimizer(copy, CONFIG, num_steps=6, num_members=2)
    other.load_state_dict([{k: v.clone() for k, v in optimizer.state_dict().items()}])
    for step in range(3, 6):
        set_grads(parameters, step)
        set_grads(copy, step)
        optimizer.step(step)
        other.step(step)
    assert all(torch.equal(p, q) for p, q in zip(parameters, copy, strict=True))


@pytest.mark.parametrize("num_members", [None, 3])
def test_moments_of_8_bits_train_almost_as_those_of_32(num_members):
    ways = {}
    for states in ("float32", "8bit"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(3, 20, 30))
        target = torch.randn(3, 20, 30)
        config = dataclasses.replace(CONFIG, states=states, weight_decay=0.0, max_grad_norm=1e9, schedule="constant")
        optimizer = Optimizer([weight], config, num_steps=200, num_members=num_members)
        start = weight.detach().clone()
        for step in range(60):
            weight.grad = (weight.detach() - target) * torch.logspace(-1, 1, 30)  # columns of different size
            optimizer.step(step)
        ways[states] = weight.detach() - start
    error = (ways["8bit"] - ways["float32"]).norm() / ways["float32"].norm()
    assert float(error) < 0.1
    assert sum(v.numel() * v.element_size() for v in optimizer.state_dict().values()) < 2.4 * weight.numel()


def test_8_bit_states_skip_bad_steps_and_go_on_bitwise():
    config = dataclasses.replace(CONFIG, states="8bit")
    parameters = stacked(2)
    optimizer = Optimizer(parameters, config, num_steps=6, num_members=2)
    set_grads(parameters, 0)
    optimizer.step(0)
    kept = {k: v.clone() for k, v in optimizer.state_dict().items()}
    copy = [nn.Parameter(p.detach().clone()) for p in parameters]
    set_grads(parameters, 1)
    parameters[0].grad[0, 0, 0] = float("nan")
    assert not optimizer.step(1)[1]
    assert all(torch.equal(v, kept[k]) for k, v in optimizer.state_dict().items())
    other = Optimizer(copy, config, num_steps=6, num_members=2)
    other.load_state_dict([kept])
    for step in (1, 2):
        set_grads(parameters, step)
        set_grads(copy, step)
        optimizer.step(step)
        other.step(step)
    assert all(torch.equal(p, q) for p, q in zip(parameters, copy, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_states_train_alike(dtype):
    ways = []
    for offload in (False, True):
        parameters = stacked(2, dtype)
        optimizer = Optimizer(parameters, dataclasses.replace(CONFIG, offload=offload), num_steps=5, num_members=2)
        for step in range(5):
            set_grads(parameters, step)
            optimizer.step(step)
        ways.append(parameters)
    assert all(torch.equal(p, q) for p, q in zip(*ways, strict=True))


def test_a_loss_that_is_not_finite_changes_nothing():
    parameters = stacked(2)
    optimizer = Optimizer(parameters, CONFIG, num_steps=10, num_members=2)
    set_grads(parameters, 0)
    before = [p.detach().clone() for p in parameters]
    norm, finite = optimizer.step(0, torch.tensor(float("inf")))
    assert norm.isfinite()
    assert not finite
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


def test_schedules():
    linear = dataclasses.replace(CONFIG, learning_rate=1.0, warmup_steps=2)
    assert [learning_rate(linear, t, 6) for t in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    cosine = dataclasses.replace(CONFIG, learning_rate=1.0, schedule="cosine")
    assert [learning_rate(cosine, t, 4) for t in range(4)] == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-5)
    constant = dataclasses.replace(CONFIG, learning_rate=1.0, schedule="constant")
    assert learning_rate(constant, 5, 6) == 1.0


class OneOf(Ranks):
    """A rank of several in one process, which exchange when all have stepped."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.given = rank, size, ()

    def exchange_(self, tensors, bounds):
        self.given = tuple(zip(tensors, bounds, strict=True))


class Together:
    """The optimizers of several ranks, each with a copy of the weights."""

    def __init__(self, start, config, size, num_members):
        self.ranks = [OneOf(rank, size) for rank in range(size)]
        self.weights = [[nn.Parameter(p.detach().clone()) for p in start] for _ in self.ranks]
        options = {"num_steps": 8, "num_members": num_members}
        self.optimizers = [
            Optimizer(weights, config, **options, ranks=rank)
            for weights, rank in zip(self.weights, self.ranks, strict=True)
        ]

    def step(self, step, without=None):
        for weights, optimizer in zip(self.weights, self.optimizers, strict=True):
            set_grads(weights, step)
            if without is not None:
                weights[without].grad = None
            norm, finite = optimizer.step(step)
        for mine in self.ranks:
            for tensors in zip(*(rank.given for rank in self.ranks), strict=True):
                for rank, (tensor, bounds) in enumerate(tensors):
                    if rank != mine.rank:
                        own = slice(bounds[rank], bounds[rank + 1])
                        row = tensors[mine.rank][0].flatten()  # a copy of what is not contiguous
                        row[own] = tensor.flatten()[own]
                        tensors[mine.rank][0].copy_(row.view_as(tensor))
        return norm, finite

    def exact_weights(self):
        """Of every parameter the pieces that the ranks bring."""
        for start, *brought in zip(self.weights[0], *(o.exact_weights() for o in self.optimizers), strict=True):
            ends = list(itertools.pairwise(cut(start.numel(), len(brought))))
            own = [tensor.flatten()[slice(*ends[rank])] for rank, tensor in enumerate(brought)]
            yield torch.cat(own).view(start.shape)


SHARDED = ((5, 300), (7,), (2, 128, 9), (1, 512))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("num_members", [None, 3])
@pytest.mark.parametrize(
    ("dtype", "knobs"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"states": "8bit"}),
        (torch.bfloat16, {"states": "8bit", "offload": True}),
    ],
    ids=["float32", "bfloat16", "8bit", "offloaded"],
)
def test_pieces_of_ranks_end_as_the_whole_and_go_on_with_another_number_of_ranks(dtype, knobs, num_members, size):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, **knobs)
    start = [nn.Parameter(torch.randn(num_members or 1, *shape).to(dtype)) for shape in SHARDED]
    start.append(nn.Parameter(torch.randn(num_members or 1, 40, 30).to(dtype).transpose(1, 2)))
    whole, pieces = Together(start, config, 1, num_members), Together(start, config, size, num_members)
    for step in range(6):
        without = 1 if step == 2 else None
        for one, other in zip(whole.step(step, without), pieces.step(step, without), strict=True):
            torch.testing.assert_close(one, other)
        for weights in pieces.weights:
            for p, q in zip(whole.weights[0], weights, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
                assert torch.equal(p, q) or num_members is None, "clipping alone may round"
        if step == 3:  # the one goes on as several, and the several as another number
            states = [[o.state_dict() for o in each.optimizers] for each in (whole, pieces)]
            for new_size, state in zip((size, 1 if size == 2 else 2), states, strict=True):
                new = Together(whole.weights[0], config, new_size, num_members)
                for optimizer in new.optimizers:
                    optimizer.load_state_dict(state)
                if new_size == size:
                    pieces = new
                else:
                    whole = new
    for weight, wide, other in zip(whole.weights[0], whole.exact_weights(), pieces.exact_weights(), strict=True):
        torch.testing.assert_close(wide, other, rtol=1e-6, atol=1e-7)
        assert torch.equal(wide.to(dtype), weight)
        assert torch.equal(wide, weight) == (dtype == torch.float32)


def test_each_rank_holds_its_part_of_the_moments():
    start = [nn.Parameter(torch.zeros(1000, 64, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(17))]
    num, device = 64_017, torch.device("cpu")
    for size in (1, 4):
        optimizers = Together(start, CONFIG, size, None).optimizers
        held = [o.num_bytes(device) for o in optimizers]
        assert sum(held) == state_bytes(CONFIG, num, 64_000)
        assert max(held) <= state_bytes(CONFIG, num, 64_000) / size + 12 * 2 * BLOCK
        assert optimizers[-1].gradient_bytes == 2 * 64_000 + 4 * 17


@pytest.mark.parametrize(("num", "size"), [(0, 3), (1, 2), (BLOCK, 2), (BLOCK + 1, 2), (5 * BLOCK, 4), (10**9, 7)])
def test_cuts_are_of_whole_blocks_and_like_sizes(num, size):
    bounds = cut(num, size)
    assert len(bounds) == size + 1
    assert (bounds[0], bounds[-1]) == (0, num)
    assert all(b % BLOCK == 0 or b == num for b in bounds)
    assert all(0 <= b - a <= -(-num // (BLOCK * size)) * BLOCK for a, b in itertools.pairwise(bounds))


def test_gradients_in_16_bits_go_with_the_step():
    parameters = [nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = Optimizer(parameters, CONFIG, num_steps=1, num_members=None)
    alive = []
    for p in parameters:
        p.grad = torch.ones_like(p)
        alive.append(weakref.ref(p.grad))
    optimizer.step(0)
    assert all(reference() is None for reference in alive)


@pytest.mark.skipif(not has_native(), reason="no native kernels")
@pytest.mark.parametrize("states", ["float32", "8bit"])
def test_a_step_of_bfloat16_weights_makes_no_copies(states):
    parameters = [nn.Parameter(torch.randn(300, 1000).bfloat16()) for _ in range(2)]
    optimizer = Optimizer(parameters, dataclasses.replace(CONFIG, states=states), num_steps=3, num_members=None)
    for step in range(2):  # the state comes with the first
        for p in parameters:
            p.grad = torch.randn(p.shape).bfloat16()
        with _LiveBytes() as tensors:
            optimizer.step(step)
    assert 0 < tensors.peak < 1000
    assert optimizer.gradient_bytes == 2 * 2 * 300_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_go_on_from_those_of_pytorch_and_train_as_they_do(dtype):
    """A float32 copy of each gradient, PyTorch's step, a narrow copy of each master: what checkpoints were made by.

    Gradients of sizes that differ from step to step, so that it shows where they are not clipped.
    """
    torch.manual_seed(0)
    weights = [torch.randn(5, 300).to(dtype), torch.randn(40, 3).to(dtype).T, torch.randn(9)]
    config = dataclasses.replace(CONFIG, max_grad_norm=30.0, schedule="constant")
    masters = [nn.Parameter(w.float().contiguous()) for w in weights]
    options, decays = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6}, (0.1, 0.1, 0.0)
    groups = [{"params": [m], "weight_decay": decay} for m, decay in zip(masters, decays, strict=True)]
    adamw, optimizer = torch.optim.AdamW(groups, fused=True, **options), None
    for step in range(8):
        if step == 4:
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master.detach())
            parameters = [nn.Parameter(weight) for weight in weights]
            optimizer = Optimizer(parameters, config, num_steps=8, num_members=None)
            state = {f"{i}.{name}": value for i, m in enumerate(masters) for name, value in adamw.state[m].items()}
            optimizer.load_state_dict([state | {f"{i}.master": masters[i] for i in (0, 1)}])
        for i, (master, weight) in enumerate(zip(masters, weights, strict=True)):
            grad = (torch.randn(weight.shape) * 2.0 ** (step % 3)).to(weight.dtype)
            master.grad = grad.float()
            if optimizer:
                parameters[i].grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(masters, 30.0)
        adamw.step()
        if optimizer:
            optimizer.step(step)
    found = optimizer.state_dict()
    for i, (master, parameter) in enumerate(zip(masters, parameters, strict=True)):
        own = found.get(f"{i}.master", parameter.detach())
        torch.testing.assert_close(own, master.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(parameter.detach(), own.to(parameter.dtype))
        state = {name: found[f"{i}.{name}"] for name in adamw.state[master]}
        assert len(state) + 1 == sum(name.startswith(f"{i}.") for name in found) + (i == 2)
        for name, value in adamw.state[master].items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("offload", [False, True])
def test_weights_that_are_not_contiguous_train_and_go_on_as_others(dtype, states, offload):
    options = {"states": states, "offload": offload, "learning_rate": 0.1, "max_grad_norm": 1e9}
    config = dataclasses.replace(CONFIG, **options)
    start = torch.randn(40, 300).to(dtype)
    weights = [nn.Parameter(w) for w in (start.clone(), start.T.contiguous().T)]
    optimizers = [Optimizer([w], config, num_steps=6, num_members=None) for w in weights]
    for step in range(4):
        grad = torch.randn(40, 300).to(dtype)
        for i, weight in enumerate(weights):
            if step == 2:
                state = {k: v.clone() for k, v in optimizers[i].state_dict().items()}
                optimizers[i] = Optimizer([weight], config, num_steps=6, num_members=None)
                optimizers[i].load_state_dict([state])
            weight.grad = torch.empty_like(weight).copy_(grad)
            optimizers[i].step(step)
    torch.testing.assert_close(*(w.detach().float() for w in weights), rtol=1e-5, atol=1e-6)


def test_without_a_kernel_masters_take_the_step_of_pytorch(monkeypatch):
    """float16 on a CPU; the twin of the kernel would hold several float32 copies."""

    def refuse(*args):
        raise AssertionError("the twin")

    monkeypatch.setattr(kernels, "_take_reference", refuse)
    weight = nn.Parameter(torch.randn(40, 300).half())
    before, config = weight.detach().clone(), dataclasses.replace(CONFIG, learning_rate=0.1)
    optimizer = Optimizer([weight], config, num_steps=2, num_members=None)
    assert optimizer.gradient_bytes == 4 * weight.numel()
    weight.grad = torch.randn(40, 300).half()
    optimizer.step(0)
    assert not torch.equal(weight, before)


def test_the_norm_of_a_narrow_gradient_is_taken_in_cuts(monkeypatch):
    norm, sizes = torch.linalg.vector_norm, []
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "vector_norm", lambda x, **options: sizes.append(len(x)) or norm(x, **options))
        _norm(torch.zeros(2**20 + 1, dtype=torch.bfloat16))
    assert sizes == [2**18] * 4 + [1, 5]
    grad = torch.randn(3, 2**18 + 5) * torch.tensor([1.0, 100.0, 0.01])[:, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = grad.to(dtype)
        found = [_norm(narrow) for _ in range(2)]
        assert torch.equal(*found)
        assert found[0].dtype == torch.float32
        torch.testing.assert_close(found[0].double(), narrow.double().norm(), rtol=1e-5, atol=0)
        torch.testing.assert_close(_norm(narrow.T), found[0], rtol=1e-4, atol=0)
    assert _norm(torch.zeros(0, dtype=torch.bfloat16)) == 0
    grad[2, -1] = float("nan")
    assert _norm(grad.bfloat16()).isnan()
