import json
import sys
from dataclasses import replace

import pytest
import torch
from bpo_fast_bench import kernels, kernels_adamw
from bpo_fast_bench.kernels import KernelBench, gate, parse_shape, run, table
from bpo_fast_bench.kernels_adamw import FORM, AdamwProblem, adamw_implementations, adamw_inputs
from bpo_fast_bench.kernels_attention import (
    AttentionProblem,
    attention_answer,
    attention_implementations,
    attention_inputs,
)
from bpo_fast_bench.kernels_impls import Outcome, Problem, answer, eager, errors, make_inputs
from bpo_fast_bench.kernels_linear import LinearProblem, linear_answer, linear_implementations, linear_inputs
from bpo_fast_bench.kernels_peers import PEERS, implementations, importable, verl
from bpo_fast_bench.kernels_plot import plot
from bpo_fast_bench.kernels_trunk import (
    TrunkProblem,
    trunk_answer,
    trunk_implementations,
    trunk_inputs,
)
from bpo_fast_kernels import linear_draw
from bpo_fast_kernels.backends import BackendUnavailable, pick_backend
from typer.testing import CliRunner

from bpo_fast.cli import app

SMALL = ("bench", "kernels", "--quick", "--peers", "none", "--dtype", "float32")


def call(*args):
    """A command in this process: (exit code, standard output, standard error)."""
    done = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "200", "TERM": "dumb"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Takes the place of the processes that compile ahead of time; the function takes what they print and return."""

    def put(text, code):
        (tmp_path / "text").write_text(text)
        (tmp_path / "python").write_text(f"#!/bin/sh\ncat '{tmp_path}/text'\nexit {code}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    return put


def test_quick_run_writes_json_and_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # or bfloat16 is left out
    path = tmp_path / "a" / "k.json"
    # of the peers on a CPU, "compile" takes seconds and has a test of its own
    options = KernelBench(quick=True, shapes=((64, 16, 500),), pairs=2, peers=("cce", "verl"), json_path=path)
    record = run(options)
    assert json.loads(path.read_text())["problems"] == record["problems"]
    plot(record | {"problems": record["problems"][::5]}, tmp_path / "k")  # half a second a problem
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "k.svg").read_text()
    labels = [problem["label"] for problem in record["problems"]]
    kinds = ["forward", "step frozen", "step trained", "behavior frozen", "behavior trained", "draw"]
    shapes = [f"{kind} T=64 H=16 V=500 {dtype}" for kind in kinds for dtype in ("float32", "bfloat16")]
    kinds = ["attention 24/9 heads=2 P=2", "linear R=5 33->48", "norm R=33 H=48", "gate R=33 H=48", "adamw R=33 H=48"]
    trunk = [f"{kind} {dtype}" for kind in kinds for dtype in ("float32", "bfloat16")]
    trunk.remove("linear R=5 33->48 bfloat16")
    assert labels == [*shapes, "pair_loss P=256", *trunk]
    for problem in record["problems"]:
        rows, op = problem["implementations"], problem["problem"]["op"]
        if op == "pair_loss" or (op in ("attention", "norm", "gate") and problem["label"].endswith("bfloat16")):
            assert "native" in rows or op == "pair_loss"  # whose results are rounded to it
            continue
        if problem["label"] == "adamw R=33 H=48 bfloat16":
            assert list(rows) == ["eager", "native", "native:8bit", "torch", "torch:8bit"]
            assert all(row["passed"] for row in rows.values())
            continue
        others = {
            "attention": {"torch", "masked"},
            "linear": {"swapped"},
            "norm": set(),
            "gate": set(),
            "adamw": {"torch"},
        }
        others = others.get(op, {"torch", "mm"})
        assert {"eager", "native"} | others <= set(rows)
        assert all(row["seconds"] > 0 and row["p20"] <= row["seconds"] <= row["p80"] for row in rows.values())
        value = "logp" if op == "draw" else "value"
        assert all(rows[name]["errors"][value] < 1e-4 for name in {"native", "torch"} & set(rows))
    text = table(record)
    assert all(label in text for label in labels)
    assert (text.count("GB/s"), text.count("TFLOP/s")) == (6, len(labels) - 6)
    assert record["environment"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("static", [False, True])
def test_what_is_measured_is_written_once(static, compiler, monkeypatch, tmp_path):
    """The figures of --static as soon as they are there, and then a problem at a time."""
    write, written = kernels.write_atomic, []

    def counted(path, text):
        write(path, text)
        record = json.loads(path.read_text())
        written.append(("static" in record, len(record["problems"])))

    compiler('{"kernels": {}, "faults": []}', 0)
    monkeypatch.setattr(kernels, "write_atomic", counted)
    options = {"shapes": ((9, 5, 1), (8, 4, 1)), "dtypes": ("float32",), "json_path": tmp_path / "k.json"}
    run(KernelBench(ops=("attention",), quick=True, static=static, **options))
    assert written == [(True, 0)] * static + [(static, 1), (static, 2)]


def test_a_wrong_implementation_gets_no_time(monkeypatch):
    def wrong(problem, backend):
        def call(inputs):
            return Outcome(torch.zeros(4), torch.zeros_like(inputs.hidden))

        return call

    monkeypatch.setattr("bpo_fast_bench.kernels_peers.ours", wrong)
    options = KernelBench(ops=("forward",), quick=True, shapes=((64, 16, 500),), pairs=2, peers=())
    record = run(options)
    rows = record["problems"][0]["implementations"]
    assert not rows["native"]["passed"]
    assert "seconds" not in rows["native"]
    assert "seconds" in rows["eager"]
    assert "not timed" in table(record)


def test_what_cannot_run_leaves_a_reason_and_the_others_go_on(monkeypatch, tmp_path):
    def broken(problem, backend):
        def call(inputs):
            assert json.loads(path.read_text())["problems"] if problem.op == "draw" else not path.exists()
            raise {"native": BackendUnavailable("no compiler"), "torch": KeyError("no\nsuch")}[backend]

        return call

    path = tmp_path / "k.json"
    monkeypatch.setattr("bpo_fast_bench.kernels_peers.ours", broken)
    options = (*SMALL, "--op", "forward", "--op", "draw", "--shapes", "64x16x500", "--json", path)
    code, out, err = call(*options)
    rows = json.loads(path.read_text())["problems"][0]["implementations"]
    reason = "BackendUnavailable: no compiler"
    assert rows["native"] == {"passed": False, "reason": reason, "unavailable": True}
    assert "seconds" in rows["eager"]
    assert f"not timed: {reason}" in out
    assert code != 0
    assert "forward T=64 H=16 V=500 float32: torch: KeyError: " in err


def test_what_the_machine_cannot_run_is_no_failure_and_what_only_says_so_is_one():
    with pytest.raises(BackendUnavailable, match=r"^backend = 'triton': on CPU tensors it needs TRITON_INTERPRET=1$"):
        pick_backend("triton", torch.device("cpu"))
    rows = {"native": {"passed": False, "reason": "BackendUnavailable: no compiler", "unavailable": True}}
    record = {"problems": [{"label": "draw", "implementations": rows}]}
    kernels.check_ours(record)
    rows["native"] = {"passed": False, "reason": "ValueError: backend = 'native': a fault of its own"}
    with pytest.raises(RuntimeError, match="draw: native: ValueError: backend = 'native': a fault of its own"):
        kernels.check_ours(record)


def test_eager_that_fails_its_gate_leaves_the_others_without_ratios(monkeypatch):
    def wrong(problem, compiled=False):
        return lambda inputs: Outcome(torch.zeros(len(inputs.cu_seqlens) - 1))

    monkeypatch.setattr("bpo_fast_bench.kernels_peers.eager", wrong)
    record = run(
        KernelBench(ops=("forward",), quick=True, shapes=((64, 16, 500),), pairs=2, peers=(), dtypes=("float32",))
    )
    rows = record["problems"][0]["implementations"]
    assert not rows["eager"]["passed"]
    assert rows["native"]["seconds"] > 0
    assert "against_eager" not in rows["native"]
    lines = {line.split()[0]: line.split() for line in table(record).splitlines()}
    assert lines["eager"][1:3] == ["not", "timed:"]
    assert lines["native"][5] == lines["native"][7] == "-"


def test_the_command_measures_what_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bpo-fast", "bench", "kernels", "--quick"])
    options = ("--op", "step", "--head", "frozen", "--shapes", "64x16x500", "--shapes", "32x8x100", "--data", "gauss")
    code, out, _ = call(*SMALL, *options, "--json", tmp_path / "k.json", "--plot", tmp_path / "k")
    assert code == 0
    record = json.loads((tmp_path / "k.json").read_text())
    labels = [problem["label"] for problem in record["problems"]]
    assert labels == ["step frozen T=64 H=16 V=500 float32", "step frozen T=32 H=8 V=100 float32"]
    assert all(label in out for label in labels)
    assert record["options"]["data"] == "gauss"
    assert record["options"]["peers"] == []
    assert (tmp_path / "k.svg").is_file()
    machine = record["environment"]
    assert machine["command"] == "bpo-fast bench kernels --quick"
    assert machine["threads"] == torch.get_num_threads()
    if "git_commit" in machine:
        assert isinstance(machine["git_changed"], bool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shapes", "3x"), "error: bench.kernels.shapes = '3x'"),
        (("--shapes", "3x3"), "error: bench.kernels.shapes = (3, 3): expected 3 numbers"),
        (("--shapes", "3x3x3", "--op", "gate"), "error: bench.kernels.shapes = (3, 3, 3): expected 2 numbers"),
        (("--op", "softmax"), "error: bench.kernels.ops = 'softmax'"),
        (("--peers", "cce,unsloth"), "error: bench.kernels.peers = 'unsloth'"),
    ],
)
def test_the_command_refuses_in_one_line(options, message):
    code, out, err = call(*SMALL, *options)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_static_adds_the_figures_of_every_architecture(compiler):
    report = {"kernels": {"k": {"registers": 77}, "l": {"registers": 9}}, "faults": ["k: stack 8 > 0"]}
    compiler(json.dumps(report), 1)
    code, out, _ = call(*SMALL, "--op", "pair_loss", "--static")
    assert code == 0
    for arch in (80, 89, 90, 100):
        assert f"sm_{arch}: 2 kernels, at most 77 registers, faults: ['k: stack 8 > 0']" in out


@pytest.mark.parametrize(
    ("text", "reason"), [("Traceback\nImportError: no triton\n", "ImportError: no triton"), ("", "exit code 3")]
)
def test_static_says_why_the_compiler_failed(compiler, text, reason):
    compiler(text, 3)
    code, out, err = call(*SMALL, "--op", "pair_loss", "--static")
    assert (code, out) == (1, "")
    assert err == f"error: bench.kernels.static: the kernels do not compile for sm_80: {reason}\n"


@pytest.mark.parametrize("data", ["peaked", "gauss"])
def test_answers_agree_with_eager_in_float64(data):
    problem = Problem("step", "trained", 300, 48, 700, 3, data)
    inputs = make_inputs(problem, torch.device("cpu"), torch.float32, 1)[0]
    found = errors(eager(problem)(inputs), answer(problem, inputs), inputs.cu_seqlens.diff())
    assert set(found) == {"value", "dx", "dw"}
    assert max(found["dx"], found["dw"]) < 1e-4


@pytest.fixture
def drawn():
    """(inputs, answer) of 200 draws; half of the numbers lie 1e-9 beside the border of two shares."""
    problem = Problem("draw", "frozen", 200, 32, 700, 3, "peaked")
    inputs = make_inputs(problem, torch.device("cpu"), torch.float32, 1)[0]
    ends = (inputs.hidden.detach().double() @ inputs.weight.double().T).softmax(1).cumsum(1)
    borders = ends.gather(1, torch.searchsorted(ends, inputs.uniforms[:, None]))[::2, 0]
    inputs.uniforms[::2] = borders + torch.tensor([-1e-9, 1e-9], dtype=torch.float64).repeat(50)
    return inputs, answer(problem, inputs)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_draws_pass_that_differ_at_the_border_of_two_shares(drawn, backend):
    inputs, want = drawn
    assert float(want.gaps[::2].max()) < 2e-9
    tokens, values = linear_draw(inputs.hidden, inputs.weight, inputs.uniforms, backend=backend)
    assert not torch.equal(tokens, want.tokens), "rounding turned some over"
    found = gate(backend, lambda _: Outcome(values, tokens=tokens), inputs, want, inputs.cu_seqlens.diff())
    assert found["passed"]
    assert found["errors"]["token"] < 2e-9


@pytest.mark.parametrize("change", ["token", "value", "nan"])
def test_a_wrong_draw_fails_its_gate(drawn, change):
    inputs, want = drawn
    tokens, values = want.tokens.clone(), want.values.clone()
    row = int(want.gaps.argmax())
    if change == "token":
        tokens[row] += 1
    else:
        values[row] += 2e-4 if change == "value" else torch.nan
    found = gate("native", lambda _: Outcome(values, tokens=tokens), inputs, want, inputs.cu_seqlens.diff())
    assert not found["passed"]


@pytest.fixture
def attended():
    """(inputs, answer) of attention, in float64."""
    inputs = attention_inputs(AttentionProblem(9, 5, 2, 3), torch.device("cpu"), torch.float64, 1)[0]
    return inputs, attention_answer(inputs)


def test_padded_rows_ask_the_same_of_attention_as_the_packed_row(attended):
    inputs, want = attended
    calls = attention_implementations(inputs)
    assert list(calls) == ["eager", "masked"]  # ours are for float32
    for name, call in calls.items():
        found = gate(name, call, inputs, want, None)
        assert set(found["errors"]) == {"value", "dq", "dk", "dv"}
        assert max(found["errors"].values()) < 1e-14


@pytest.mark.parametrize("wrong", ["values", "dq", "dk", "dv"])
@pytest.mark.parametrize("name", ["native", "eager"])
def test_wrong_attention_fails_its_gate(attended, name, wrong):
    inputs, want = attended
    right = attention_implementations(inputs)["eager" if name == "eager" else "masked"](inputs)
    assert gate(name, lambda _: right, inputs, want, None)["passed"]
    spoiled = getattr(right, wrong).clone()
    spoiled[:, :, 3] *= 1.5  # a token of a prompt
    assert not gate(name, lambda _: replace(right, **{wrong: spoiled}), inputs, want, None)["passed"]


def test_shapes_are_those_of_attention_where_it_is_alone():
    shapes, cpu = ((20, 9, 1), (7, 3, 2)), torch.device("cpu")
    found = kernels.problems(KernelBench(ops=("attention",), shapes=shapes, pairs=4), cpu)
    assert found == [AttentionProblem(20, 9, 1, 4), AttentionProblem(7, 3, 2, 4)]
    found = kernels.problems(KernelBench(ops=("draw", "attention"), shapes=shapes[:1]), cpu)
    assert found[1:] == [AttentionProblem(*lengths, 4, 8) for lengths in ((300, 40), (24, 45), (512, 128))]
    assert (found[0].rows, found[0].width, found[0].vocab) == shapes[0]


def test_linear_layers_are_measured_on_a_cpu():
    shapes, options = ((7, 12, 20), (3, 8, 9)), {"ops": ("linear",)}
    found = kernels.problems(KernelBench(**options, shapes=shapes), torch.device("cpu"))
    assert found == [LinearProblem(*shape) for shape in shapes]
    assert len(kernels.problems(KernelBench(**options), torch.device("cpu"))) == 9
    assert kernels.problems(KernelBench(**options, shapes=shapes), torch.device("cuda")) == []


@pytest.mark.parametrize("wrong", ["eager", "swapped", "native"])
def test_a_wrong_linear_layer_fails_its_gate(wrong):
    inputs = linear_inputs(LinearProblem(7, 12, 20), 1)[0]
    calls, want = linear_implementations(), linear_answer(inputs)
    assert gate(wrong, calls[wrong], inputs, want, None)["passed"]
    other = replace(inputs, x=inputs.x.flip(0))
    assert not gate(wrong, lambda _: calls[wrong](other), inputs, want, None)["passed"]


def test_the_work_of_attention_is_what_its_tokens_see():
    problem = AttentionProblem(9, 5, 2, 3)
    layout = attention_inputs(problem, torch.device("cpu"), torch.float32, 1)[0].layout
    seen = layout.mask("prompts", None).sum() + layout.mask("completions", None).sum()
    assert problem.min_flop() == 6 * 2 * 64 * 2 * int(seen)


@pytest.fixture(params=["norm", "gate"])
def trunk(request):
    """(a problem of a norm or a gate, what makes its inputs and answer for a type)."""
    problem = TrunkProblem(request.param, 70, 33)

    def make(dtype):
        inputs = trunk_inputs(problem, torch.device("cpu"), dtype, 1)[0]
        return inputs, trunk_answer(problem, inputs)

    return problem, make


def test_norms_and_gates_pass_their_gate(trunk):
    problem, make = trunk
    inputs, want = make(torch.float32)
    calls = trunk_implementations(problem, inputs, kernels.PEERS)
    assert list(calls) == ["eager", "native"]
    for call in calls.values():
        found = gate("native", call, inputs, want, None)
        assert found["passed"]
        assert set(found["errors"]) == {"value", *want.grads}
        assert max(found["errors"].values()) < 1e-6


def test_rounding_passes_the_gate_and_more_does_not(trunk):
    """In bfloat16, where the eager form rounds its result as the kernels do."""
    problem, make = trunk
    inputs, want = make(torch.bfloat16)
    calls = trunk_implementations(problem, inputs, kernels.PEERS)
    assert all(gate(name, call, inputs, want, None)["passed"] for name, call in calls.items())
    values = calls["eager"](inputs).values
    assert gate("triton", lambda _: replace(want, values=values), inputs, want, None)["passed"]
    assert not gate("triton", lambda _: replace(want, values=values * 1.02), inputs, want, None)["passed"]


@pytest.mark.parametrize("wrong", range(3))
def test_a_wrong_norm_or_gate_fails_its_gate(trunk, wrong):
    problem, make = trunk
    inputs, want = make(torch.float32)
    name = ("values", *want.grads)[wrong]
    right = trunk_implementations(problem, inputs, ())["native"](inputs)
    spoiled = getattr(right, name).clone()
    spoiled[..., ::4] *= 1.5
    for contender in ("native", "eager"):
        assert gate(contender, lambda _: right, inputs, want, None)["passed"]
        assert not gate(contender, lambda _: replace(right, **{name: spoiled}), inputs, want, None)["passed"]


@pytest.mark.parametrize("wrong", [lambda form: {"lr": 2 * form.lr}, lambda form: {"weight_decay": 1.0}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_step_of_adamw_fails_its_gate(wrong, dtype, monkeypatch):
    problem, options = AdamwProblem("adamw", 9, 40), KernelBench(quick=True, peers=())
    rows = kernels.measure(problem, dtype, torch.device("cpu"), options)["implementations"]
    assert all(row["passed"] for row in rows.values())
    assert rows["native"]["effective_gbps"] == 9 * 40 * 16 / rows["native"]["seconds"] / 1e9
    monkeypatch.setattr(kernels_adamw, "FORM", replace(FORM, **wrong(FORM)))
    rows = kernels.measure(problem, dtype, torch.device("cpu"), options)["implementations"]
    assert not rows["eager"]["passed"], "which takes its numbers from elsewhere"


@pytest.mark.parametrize("multiplies", [True, False])
def test_types_are_those_that_the_machine_is_fast_in(multiplies, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    cpu, gpu, both = torch.device("cpu"), torch.device("cuda"), ("float32", "bfloat16")
    found = {op: [kernels.dtypes_of(op, KernelBench(), device) for device in (cpu, gpu)] for op in kernels.OPS}
    assert found.pop("pair_loss") == found.pop("linear") == [("float32",)] * 2
    assert found.pop("adamw") == [both] * 2
    assert found.pop("norm") == found.pop("gate") == [both, ("bfloat16",)]
    here = both if multiplies else ("float32",)
    assert all(dtypes == [here, ("bfloat16",)] for dtypes in found.values())
    assert kernels.dtypes_of("adamw", KernelBench(dtypes=("float16",)), cpu) == ("float16",)


def test_steps_of_narrow_weights_by_pytorch_are_those_of_their_masters():
    (inputs,) = adamw_inputs(AdamwProblem("adamw", 9, 40), torch.device("cpu"), torch.bfloat16, 1)
    calls = adamw_implementations(inputs, peers=True)
    for _ in range(4):
        values = {name: call(inputs).values.clone() for name, call in calls.items()}
    assert torch.equal(values["eager"], values["native"])
    assert all(v.dtype == torch.bfloat16 for v in values.values())
    assert not torch.equal(values["eager"], values["native:8bit"])


def test_who_writes_into_inputs_gets_copies(trunk):
    _, make = trunk
    inputs, _ = make(torch.float32)
    copies = inputs.copies
    assert copies is inputs.copies
    for mine, own in zip((*copies.leaves, copies.weights), (*inputs.leaves, inputs.weights), strict=True):
        assert torch.equal(mine, own)
        assert mine.requires_grad == own.requires_grad
        with torch.no_grad():
            mine.zero_()
        assert own.any()


def test_shapes_are_those_of_norms_and_gates_where_they_are_alone():
    shapes, cpu = ((20, 9), (7, 3)), torch.device("cpu")
    found = kernels.problems(KernelBench(ops=("norm", "gate"), shapes=shapes), cpu)
    assert found == [TrunkProblem(op, *shape) for op in ("norm", "gate") for shape in shapes]
    found = kernels.problems(KernelBench(ops=("draw", "gate"), shapes=((20, 9, 30),)), cpu)
    assert found[1:] == [TrunkProblem("gate", *shape) for shape in ((1024, 256), (1024, 672), (4096, 1024))]


def test_rates_of_norms_and_gates_are_what_they_move_at_least(trunk, monkeypatch):
    """x, out; dout, x, dx of a norm, and gate, up, out; dout, gate, up, dgate, dup of a gate."""
    problem, make = trunk
    _, want = make(torch.float32)
    forward, backward = (2, 3) if problem.op == "norm" else (3, 5)
    assert problem.min_bytes(torch.float32) == (forward + backward) * want.values.numel() * 4
    monkeypatch.setattr(kernels, "median", lambda samples: 2e-9)
    row = kernels.measure(problem, "float32", torch.device("cpu"), KernelBench(quick=True))["implementations"]["eager"]
    assert row["effective_gbps"] == problem.min_bytes(torch.float32) / 2


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize(
    ("peer", "op"),
    [("compile", "step"), ("cce", "step"), ("verl", "step"), ("verl", "forward"), ("liger-dpo", "behavior")],
)
def test_peers_answer_the_same_question_on_a_cpu(peer, op, head):
    if peer != "compile" and not importable(peer):
        pytest.skip(f"{peer} is not installed")
    problem = Problem(op, head, 100, 16, 300, 2, "peaked")
    inputs = make_inputs(problem, torch.device("cpu"), torch.float32, 1)[0]
    call = implementations(problem, torch.device("cpu"), (peer,))[peer]
    found = errors(call(inputs), answer(problem, inputs), inputs.cu_seqlens.diff())
    assert max(found.values()) < 1e-4


def test_peers_written_in_triton_are_left_out_on_a_cpu(monkeypatch):
    monkeypatch.setattr("bpo_fast_bench.kernels_peers.importable", lambda name: True)
    monkeypatch.setattr("bpo_fast_bench.kernels_peers.verl", lambda problem: None)
    monkeypatch.setattr("bpo_fast_bench.kernels_peers.cut_cross_entropy", lambda problem: None)
    problem = Problem("forward", "frozen", 8, 4, 9, 2, "gauss")
    assert list(implementations(problem, torch.device("cpu"), PEERS)) == [
        *("eager", "native", "torch", "compile", "cce", "verl", "mm")
    ]


def test_a_module_of_verl_is_read_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "verl" / "utils" / "experimental").mkdir(parents=True)
    (tmp_path / "verl" / "__init__.py").write_text("raise ImportError('what its trainer needs')\n")
    (tmp_path / "verl" / "utils" / "experimental" / "torch_functional.py").write_text(
        "class FusedLinearForPPO:\n    def __call__(self, hidden, weight, ids):\n"
        "        logps = (hidden @ weight.T).log_softmax(-1)\n"
        "        return logps.gather(1, ids[:, None]).squeeze(1), None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    problem = Problem("step", "trained", 30, 8, 50, 2, "gauss")
    inputs = make_inputs(problem, torch.device("cpu"), torch.float32, 1)[0]
    found = errors(verl(problem)(inputs), answer(problem, inputs), inputs.cu_seqlens.diff())
    assert max(found.values()) < 1e-4


def test_on_a_gpu_the_ceilings_come_with_every_backend():
    names = {}
    for op in ("forward", "step", "behavior", "draw", "pair_loss"):
        names[op] = list(implementations(Problem(op, "frozen", 8, 4, 9, 2, "gauss"), torch.device("cuda"), ()))
    ours = ["eager", "triton", "triton-gemm", "native"]
    assert names["forward"] == [*ours, "mm", "mm-f32"]
    assert names["step"] == names["behavior"] == [*ours, "mm"]
    assert names["draw"] == ["eager", "torch", "mm", "mm-f32"]
    assert names["pair_loss"] == ["eager", "triton"]
    found = implementations(Problem("step", "frozen", 8, 4, 9, 2, "gauss"), torch.device("cuda"), (), ("128x128x64x4",))
    assert list(found) == ["eager", "triton", "triton-gemm", "native", "triton-gemm:128x128x64x4", "mm"]


def test_peaked_data_is_what_it_says():
    problem = Problem("forward", "frozen", 400, 256, 8000, 4, "peaked")
    inputs = make_inputs(problem, torch.device("cpu"), torch.float32, 1)[0]
    logits = inputs.hidden.detach() @ inputs.weight.T
    logps = torch.log_softmax(logits, 1).gather(1, inputs.targets[:, None])
    assert 2.8 < float(logits.std()) < 3.3
    assert -0.6 < float(logps.mean()) < -0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": ("softmax",)}, "bench.kernels.ops = 'softmax'"),
        ({"heads": ("tied",)}, "bench.kernels.heads = 'tied'"),
        ({"peers": ("unsloth",)}, "bench.kernels.peers = 'unsloth'"),
        ({"dtypes": ("float64",)}, "bench.kernels.dtypes = 'float64'"),
        ({"data": "zeros"}, "bench.kernels.data = 'zeros'"),
        ({"shapes": ((64, 16),)}, "bench.kernels.shapes = (64, 16)"),
        ({"shapes": ((64, 0, 9),)}, "bench.kernels.shapes = (64, 0, 9)"),
        ({"pairs": 0}, "bench.kernels.pairs = 0"),
        ({"tiles": ("128x256",)}, "backend = 'triton-gemm:128x256'"),
    ],
)
def test_options_are_refused_by_name(change, message):
    with pytest.raises(ValueError) as caught:
        run(KernelBench(**change))
    assert str(caught.value).startswith(message)


def test_shapes_are_read_from_text():
    assert parse_shape("1024x256x32000") == (1024, 256, 32000)
    assert parse_shape("1024x256") == (1024, 256)
    with pytest.raises(ValueError, match=r"bench\.kernels\.shapes = '1024xH'"):
        parse_shape("1024xH")


def test_order_is_balanced_and_input_sets_rotate():
    calls, seen = [], []
    record = {name: (lambda inputs, name=name: (calls.append(name), seen.append(inputs))) for name in "ABC"}
    kernels.interleave(record, [0, 1, 2], torch.device("cpu"), warmups=1, rounds=2)
    assert "".join(calls) == "ABC" + "ABCCBA" * 2
    assert set(seen) == {0, 1, 2}
