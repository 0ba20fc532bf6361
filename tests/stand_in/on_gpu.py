"""What is written for a GPU, on the stand-in; run by tests/test_stand_in.py.

The first tests are of the stand-in: that it refuses what a GPU refuses is what the others rest on.
"""

import gc
import logging
from contextlib import contextmanager, nullcontext

import pytest
import torch
from bpo_fast_kernels import triton_adamw
from bpo_fast_kernels.torch_backend import add_dw_
from memory_parts import make_parts
from relative import relative_error
from test_attention import EXACT, alone, make_model, make_pairs
from test_pair_scores import encoded
from test_reward import llama_scorer
from tiny_policy import Tokens
from waits import nothing_waits

from bpo_fast import varlen
from bpo_fast.annotate.pair_scores import PairScores
from bpo_fast.batches import TokenBudget
from bpo_fast.config import MethodConfig, ModelConfig, OptimConfig
from bpo_fast.dryrun import _try_steps
from bpo_fast.engine import SamplingParams
from bpo_fast.engine.hf import HfEngine
from bpo_fast.gradients import step_gradients
from bpo_fast.memory import make_ledger
from bpo_fast.optim import Optimizer
from bpo_fast.policy import Policy
from bpo_fast.ranks import Ranks
from bpo_fast.sft import CompletionNll, Example
from bpo_fast.stage_config import SftConfig
from bpo_fast.stages import Steps, TrainingRows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LORA = {"lora_r": 4, "lora_alpha": 8.0}
FORM = {"full": {"full": True}, "lora": LORA, "members": LORA | {"members": 3}}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """A program takes the interpreter 10 ms, whatever its size."""
    monkeypatch.setitem(triton_adamw.SIZES["adamw"], "SIZE", 2**16)
    monkeypatch.setattr(triton_adamw, "CHUNK", 2**16)


@contextmanager
def memory(num_bytes):
    """A device of this size."""
    whole = torch.ops.stand_in.limit()
    torch.ops.stand_in.set_limit(num_bytes)
    try:
        yield
    finally:
        torch.ops.stand_in.set_limit(whole)


def make_policy(name="llama", layers=1, **form):
    model = make_model(name, torch.bfloat16, num_hidden_layers=layers).cuda()
    return Policy(model, Tokens(), ModelConfig(path=name, **(form or FORM["full"])), seed=0)


def test_the_device_refuses_operands_of_the_host():
    x = torch.ones(2, 3, device="cuda")
    for call in (lambda y: x + y, lambda y: torch.cat([x, y]), lambda y: x @ y.T, lambda y: torch.addcmul(x, x, y)):
        with pytest.raises(RuntimeError, match="same device"):
            call(torch.ones(2, 3))
    assert (x + torch.tensor(1.0)).tolist() == [[2.0] * 3] * 2  # a number is none


def test_outputs_of_another_size_keep_their_memory():
    ones, out = torch.ones(300, device="cuda"), torch.empty(1000, device="cuda")
    torch.add(ones, ones, out=out)
    del ones
    torch.zeros(1000, device="cuda")
    assert out.tolist() == [2.0] * 300
    small = torch.empty(0, device="cuda")
    torch.add(out, out, out=small)
    assert small.tolist() == [4.0] * 300


def test_the_device_draws_from_one_stream_of_numbers():
    torch.manual_seed(1)
    state = torch.cuda.get_rng_state()
    first = torch.randn(5, device="cuda")
    assert not torch.equal(first, torch.randn(5, device="cuda"))
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.randn(5, device="cuda"))
    torch.manual_seed(1)
    assert torch.equal(first, torch.randn(5, device="cuda"))


def test_the_device_tells_waits():
    x, mask = torch.ones(3, device="cuda"), torch.tensor([True, False, True], device="cuda")
    calls = (
        x.sum().item,
        x.cpu,
        x.tolist,
        x.nonzero,
        lambda: x[mask],
        lambda: torch.ones(3).cuda(),
        lambda: x.equal(x),
    )
    for call in calls:
        call()
        with nothing_waits(), pytest.raises(RuntimeError, match="synchronizing"):
            call()
    with nothing_waits(), pytest.raises(RuntimeError, match="too early"):
        x.to("cpu", non_blocking=True)
    with nothing_waits():
        torch.ones(3).to("cuda", non_blocking=True).add_(x).clamp(min=1.5).sum()


def test_the_device_counts_bytes_and_ends():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = torch.ones(1 << 20, device="cuda")
    y = (x + 1) * 2  # three blocks at once
    assert torch.cuda.memory_allocated() - before == 2 * x.nbytes
    assert torch.cuda.max_memory_allocated() - before == 3 * x.nbytes
    with memory(torch.cuda.memory_allocated() + 100), pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        y + 1


def test_products_are_added_where_the_sum_is():
    e, x = torch.rand(64, 5000, device="cuda").bfloat16(), torch.rand(64, 32, device="cuda").bfloat16()
    total = torch.ones(5000, 32, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    add_dw_(total, e, x)
    assert torch.cuda.max_memory_allocated() == before
    torch.testing.assert_close(total, 1 + e.float().T @ x.float())


@pytest.mark.parametrize("name", EXACT)
def test_architectures_share_prompts(name, monkeypatch):
    """Log-probs and gradients of packed pairs in bfloat16, near those of sequences alone in float64."""
    ways = []
    pick = varlen.pick_varlen
    monkeypatch.setattr("bpo_fast.attention.pick_varlen", lambda *args: ways.append(pick(*args)) or ways[-1])
    layers = 4 if name == "smollm3" else 2  # the first that differs from those before it
    policy, pairs = make_policy(name, layers), make_pairs()
    assert policy.shares_prompts
    by_sdpa = name.startswith(("gemma2", "deepseek"))  # a cap of scores, and values narrower than keys
    assert set(ways) == {None if by_sdpa else varlen._torch_varlen}
    batch = policy.pack(pairs)
    loss, _ = policy.loss(batch, torch.zeros(2 * len(pairs), device="cuda"), MethodConfig(), num_pairs=len(pairs))
    loss.backward()
    plain = make_model(name, torch.bfloat16, num_hidden_layers=layers).double()
    expected = alone(plain, pairs)
    torch.nn.functional.softplus(-0.1 * (expected[: len(pairs)] - expected[len(pairs) :])).mean().backward()
    assert float((policy.logps(batch).cpu() - expected).detach().abs().max()) < 0.3
    mine = torch.cat([p.grad.flatten().cpu().double() for p in policy.parameters()])
    assert relative_error(mine, torch.cat([p.grad.flatten() for p in plain.parameters()])) < 0.15


def test_heads_that_the_kernel_of_torch_does_not_take_go_to_sdpa():
    def q(width, dtype=torch.bfloat16):
        return torch.zeros(1, 2, 3, width, dtype=dtype, device="cuda")

    assert varlen.pick_varlen(q(16), q(16), None) is varlen._torch_varlen
    for queries, values, softcap in (
        (q(12), q(12), None),
        (q(16), q(8), None),
        (q(264), q(264), None),
        (q(16), q(16), 5.0),
    ):
        assert varlen.pick_varlen(queries, values, softcap) is None
    assert varlen.pick_varlen(q(16, torch.float32), q(16, torch.float32), None) is None


@pytest.mark.parametrize("form", FORM)
def test_a_training_step_waits_for_nothing(form):
    policy, pairs = make_policy(**FORM[form]), make_pairs()
    members = policy.num_members if policy.lora else None
    optimizer = Optimizer(policy.parameters(), OptimConfig(learning_rate=1e-3), num_steps=9, num_members=members)
    start = [p.detach().clone() for p in policy.parameters()]
    for step in range(2):  # in the second all that is kept is there
        with nothing_waits() if step else nullcontext():
            sums = step_gradients(pairs, policy, MethodConfig(), max_tokens=60 * policy.num_members)
            _, finite = optimizer.step(step, sums["loss"])
        assert finite
    assert any(not torch.equal(a, b) for a, b in zip(start, policy.parameters(), strict=True))


def sft_loss():
    examples = [Example(tuple(range(2, 2 + length)), 3) for length in (9, 5, 7, 4)]
    nll = CompletionNll(make_model("llama", torch.bfloat16).cuda(), examples[:2])
    assert nll.packed
    return nll._model, [len(e.ids) for e in examples], lambda rows: nll([examples[i] for i in rows]).sum()


def reward_loss():
    scorer = llama_scorer()
    pairs = encoded(scorer)
    scorer.model.cuda().bfloat16()
    scores = PairScores(scorer, pairs)
    assert scores.packed
    return scorer.model, [scores.num_tokens(p) for p in pairs], lambda rows: scores([pairs[i] for i in rows]).sum()


@pytest.mark.parametrize("make", [sft_loss, reward_loss])
def test_a_step_of_a_stage_waits_for_nothing(make):
    model, lengths, loss = make()
    rows = TrainingRows(lengths, [1] * len(lengths), loss)
    config = SftConfig(data="rows", out="out", microbatch_tokens=max(lengths))
    steps = Steps(list(model.train().parameters()), config, rows, 9, Ranks())
    for step in range(2):
        with nothing_waits() if step else nullcontext():
            steps.take(list(range(len(lengths))))
    assert steps.end_epoch()[1] == 0


@pytest.mark.parametrize(("how", "num"), [("none", 2), ("selective", 2), ("full", 3)])
def test_selective_checkpointing_keeps_attention(how, num, caplog):
    policy, pairs = make_policy(layers=2, full=True, activation_checkpointing=how), make_pairs()
    with caplog.at_level(logging.INFO, logger="torch.nn.attention.varlen"):
        step_gradients(pairs, policy, MethodConfig(), max_tokens=10**6)
    calls = [line for line in caplog.messages if "varlen_attn" in line]  # forward and backward, of each layer
    assert len(calls) == num * policy.model.config.num_hidden_layers


def test_too_little_memory_halves_the_budget_once(caplog):
    policy, pairs = make_policy(), make_pairs() * 4
    step_gradients(pairs, policy, MethodConfig(), max_tokens=10**6)
    needed = {}
    for tokens in (10**6, 200, 100):
        gc.collect()  # what the interpreter of earlier kernels has left would count here and be gone below
        torch.cuda.reset_peak_memory_stats()
        step_gradients(pairs, policy, MethodConfig(), max_tokens=tokens)
        needed[tokens] = torch.cuda.max_memory_allocated()
    assert needed[100] < needed[200] < needed[10**6]
    budget = TokenBudget(200)
    with memory((needed[100] + needed[200]) // 2), caplog.at_level(logging.WARNING):
        budget.run(lambda tokens: step_gradients(pairs, policy, MethodConfig(), max_tokens=tokens))
    assert budget.tokens == 100
    assert "optim.microbatch_tokens is 100 from here on" in caplog.text


@pytest.mark.parametrize("form", ["full", "lora"])
def test_predicted_and_measured_peaks_agree(form):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 1000, "num_hidden_layers": 2}
    parts = make_parts(form, pairs=4, lengths=(24, 12), place=("cuda", torch.bfloat16), sizes=sizes)
    found = _try_steps(parts, make_ledger(parts.config, parts.policy, parts.optimizer, parts.engine))
    assert found["measured_gib"] == pytest.approx(found["predicted_gib"], rel=0.1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_completions_are_those_of_the_cpu(name):
    """In float32 the same draws of the same distributions."""
    drawn = []
    for device in ("cpu", "cuda"):
        policy = Policy(make_model(name).to(device), Tokens(), ModelConfig(path=name, full=True), seed=0)
        prompts = [pair.prompt for pair in make_pairs()]
        engine = HfEngine.of(policy, 3)
        drawn.append(engine.generate(prompts, SamplingParams(max_new_tokens=9, n=2), run_seed=0, policy_version=0))
    here, there = ([c.ids for both in one for c in both] for one in drawn)
    assert here == there
    assert len(set(here)) > 4
