import json

import pytest
import torch
from bpo_fast_bench import kernels
from bpo_fast_bench.kernels import KernelBench, parse_shape, run, table
from bpo_fast_bench.kernels_impls import Outcome, Problem, answer, eager, errors, make_inputs
from bpo_fast_bench.kernels_peers import liger_dpo


def test_quick_run_writes_json_and_plots(tmp_path):
    options = KernelBench(
        quick=True, shapes=((64, 16, 500),), pairs=2, json_path=tmp_path / "a" / "k.json", plot_path=tmp_path / "k"
    )
    record = run(options)
    assert json.loads((tmp_path / "a" / "k.json").read_text())["problems"] == record["problems"]
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "k.svg").read_text()
    labels = [problem["label"] for problem in record["problems"]]
    kinds = ["forward", "step frozen", "step trained", "behavior frozen", "behavior trained"]
    shapes = [f"{kind} T=64 H=16 V=500 {dtype}" for kind in kinds for dtype in ("float32", "bfloat16")]
    assert labels == [*shapes, "pair_loss P=256"]
    for problem in record["problems"][:-1]:
        rows = problem["implementations"]
        assert {"eager", "native", "torch", "mm"} <= set(rows)
        assert all(row["seconds"] > 0 and row["p20"] <= row["seconds"] <= row["p80"] for row in rows.values())
        assert all(rows[name]["errors"]["value"] < 1e-4 for name in ("native", "torch"))
    text = table(record)
    assert all(label in text for label in labels)
    assert record["environment"]["threads"] == torch.get_num_threads()


def test_a_wrong_implementation_gets_no_time(monkeypatch):
    def wrong(problem, backend):
        def call(inputs):
            return Outcome(torch.zeros(4), torch.zeros_like(inputs.hidden))

        return call

    monkeypatch.setattr("bpo_fast_bench.kernels_peers.ours", wrong)
    options = KernelBench(ops=("forward",), quick=True, shapes=((64, 16, 500),), pairs=2)
    record = run(options)
    rows = record["problems"][0]["implementations"]
    assert not rows["native"]["passed"]
    assert "seconds" not in rows["native"]
    assert "seconds" in rows["eager"]
    assert "not timed" in table(record)


@pytest.mark.parametrize("data", ["peaked", "gauss"])
def test_answers_agree_with_eager_in_float64(data):
    problem = Problem("step", "trained", 300, 48, 700, 3, data)
    inputs = make_inputs(problem, torch.device("cpu"), torch.float32, 1)[0]
    found = errors(eager(problem)(inputs), answer(problem, inputs), inputs.cu_seqlens.diff())
    assert set(found) == {"value", "dx", "dw"}
    assert max(found["dx"], found["dw"]) < 1e-4


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_ligers_chunked_dpo_loss_answers_the_same_question(head):
    pytest.importorskip("liger_kernel.chunked_loss")
    problem = Problem("behavior", head, 100, 16, 300, 2, "peaked")
    inputs = make_inputs(problem, torch.device("cpu"), torch.float32, 1)[0]
    found = errors(liger_dpo(problem)(inputs), answer(problem, inputs), inputs.cu_seqlens.diff())
    assert max(found.values()) < 1e-4


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
        ({"peers": ("verl",)}, "bench.kernels.peers = 'verl'"),
        ({"dtypes": ("float64",)}, "bench.kernels.dtypes = 'float64'"),
        ({"data": "zeros"}, "bench.kernels.data = 'zeros'"),
        ({"shapes": ((64, 16),)}, "bench.kernels.shapes = (64, 16)"),
        ({"shapes": ((64, 0, 9),)}, "bench.kernels.shapes = (64, 0, 9)"),
        ({"pairs": 0}, "bench.kernels.pairs = 0"),
    ],
)
def test_options_are_refused_by_name(change, message):
    with pytest.raises(ValueError) as caught:
        run(KernelBench(**change))
    assert str(caught.value).startswith(message)


def test_shapes_are_read_from_text():
    assert parse_shape("1024x256x32000") == (1024, 256, 32000)
    with pytest.raises(ValueError, match=r"bench\.kernels\.shapes = '1024x256'"):
        parse_shape("1024x256")


def test_order_is_balanced_and_input_sets_rotate():
    calls, seen = [], []
    record = {name: (lambda inputs, name=name: (calls.append(name), seen.append(inputs))) for name in "ABC"}
    kernels.interleave(record, [0, 1, 2], torch.device("cpu"), warmups=1, rounds=2)
    assert "".join(calls) == "ABC" + "ABCCBA" * 2
    assert set(seen) == {0, 1, 2}
