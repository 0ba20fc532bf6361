"""The ledger against what the process really holds, and each way to hold less."""

import json
import mmap
import sys
from dataclasses import replace

import pytest
import torch
from memory_parts import make_parts
from prepared import Prepared
from relative import worst_error
from tiny_policy import make_pairs
from transformers import DynamicCache

from bpo_fast import machine
from bpo_fast.attention import has_native
from bpo_fast.config import MethodConfig, ModelConfig
from bpo_fast.engine import SamplingParams, decode
from bpo_fast.engine.decode import cache_bytes
from bpo_fast.engine.hf import HfEngine
from bpo_fast.gradients import microbatches, step_gradients
from bpo_fast.memory import Ledger, _activations, _LiveBytes, longest_pairs, make_ledger
from bpo_fast.policy import load_policy
from bpo_fast.reference import Reference
from bpo_fast.types import Prompt

SMALL = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def peaks_of_steps():
    """What `print_peaks` prints, in a process of its own."""

    def peaks(form, options, **arena):
        done = process.run(f"import memory_parts; memory_parts.print_peaks({form!r}, {options!r}, **{arena!r})")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with Prepared("import memory_parts") as process:
        yield peaks


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("full", {}),
        ("full", {"microbatch_tokens": 1024, "states": "8bit"}),
        ("full-selective", {}),
        ("full-checkpointed", {}),
        ("lora", {}),
    ],
    ids=str,
)
def test_predicted_and_measured_peaks_agree(form, options, peaks_of_steps):
    found = peaks_of_steps(form, options)
    assert found["measured_gib"] == pytest.approx(found["predicted_gib"], rel=0.1)


@pytest.mark.skipif(not has_native(), reason="no native kernels")
@pytest.mark.parametrize("states", ["float32", "8bit"])
def test_a_step_of_bfloat16_weights_holds_what_is_predicted(states):
    place = ("cpu", torch.bfloat16)
    parts = make_parts("full", lengths=(16, 8), microbatch_tokens=128, place=place, sizes=SMALL, states=states)
    ledger = make_ledger(parts.config, parts.policy, parts.optimizer, parts.engine)
    pairs = longest_pairs(parts.config, parts.policy, 8)
    for step in range(2):  # moments come with the first
        with _LiveBytes() as tensors:
            sums = step_gradients(pairs, parts.policy, parts.config.method, max_tokens=128)
            parts.optimizer.step(step, sums["loss"])
    assert ledger.num_microbatches == 2
    dw_bytes = 4 * parts.policy.model.get_output_embeddings().weight.numel()
    since_the_first = ledger.head_chunk - dw_bytes + ledger.optimizer  # what of E is not in dW, which differs by CPU
    assert tensors.peak == pytest.approx(ledger.training - since_the_first, rel=0.1)
    held = [parts.optimizer.state_dict(), *(p.grad for p in parts.policy.parameters())]
    assert held[1:] == [None] * (len(held) - 1)
    assert sum(t.nbytes for t in held[0].values()) == pytest.approx(ledger.optimizer, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("form", ["full", "full-selective", "lora"])
def test_in_the_arena_a_step_takes_little_more_than_what_is_alive(form, peaks_of_steps):
    found = peaks_of_steps(form, {}, arena=True)
    assert found["measured_gib"] < 1.25 * found["predicted_gib"]


@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_ledger_leaves_no_gradients_behind(form):
    parts = make_parts(form)
    make_ledger(parts.config, parts.policy, parts.optimizer, parts.engine)
    assert all(p.grad is None for p in parts.policy.parameters())


@pytest.mark.parametrize(("prompt", "new"), [(8, 4), (16, 16), (24, 45)])
def test_what_short_rows_are_filled_up_with_does_not_bend_the_line(prompt, new):
    # as deep as to have its peak where the backward begins
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 16}
    parts = make_parts("full", pairs=96, microbatch_tokens=1536, place=("cpu", torch.bfloat16), sizes=sizes)
    data = replace(parts.config.data, max_prompt_length=prompt)
    config = replace(parts.config, data=data, sampling=replace(parts.config.sampling, max_new_tokens=new))
    largest, *_ = microbatches(longest_pairs(config, parts.policy, 96), parts.policy, 1536)
    ledger = make_ledger(config, parts.policy, parts.optimizer, parts.engine)
    assert ledger.activations == pytest.approx(_activations(parts.policy, largest), rel=0.02)


@pytest.mark.filterwarnings("error::FutureWarning")  # of a name of transformers that it is about to drop
def test_checkpointing_takes_less_memory_and_gives_the_same_gradients():
    peaks, grads = [], []
    for form in ("full", "full-selective", "full-checkpointed"):
        parts = make_parts(form)
        peaks.append(make_ledger(parts.config, parts.policy, parts.optimizer, parts.engine).activations)
        step_gradients(make_pairs(vocab=4096), parts.policy, MethodConfig(), max_tokens=8192)
        grads.append([p.grad for p in parts.policy.parameters()])
    assert peaks[2] < 0.7 * peaks[1] < 0.7 * 0.9 * peaks[0]
    assert all(worst_error(other, grads[0]) < 1e-5 for other in grads[1:])


@pytest.mark.skipif(not has_native(), reason="no native kernels")
def test_the_cache_of_a_batch(monkeypatch):
    parts, kv = make_parts("full"), []
    model = parts.policy.model
    pair, apart = (cache_bytes(model, 128 // shared + 64) for shared in (2, 1))
    monkeypatch.setattr(decode, "MIN_ROWS", 1)
    monkeypatch.setattr(decode, "CPU_BYTES", 8 * apart)
    for top_k in (0, 3):  # with a tail to cut, logits are made
        sampling = replace(parts.config.sampling, batch_size=None, top_k=top_k)
        config, engine = replace(parts.config, sampling=sampling), HfEngine.of(parts.policy, None)
        kv.append(make_ledger(config, parts.policy, parts.optimizer, engine).kv)
    assert kv == [8 * apart // (pair + logits) * pair for logits in (0, 4 * 4096)]


def test_a_reference_with_weights_of_its_own_is_counted(tiny_model_dir):
    form = ModelConfig(path=str(tiny_model_dir), lora_r=4)
    policy = load_policy(form, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=16)
    of_all = sum(p.numel() * 4 for p in policy.model.parameters())
    merged = sum(policy.lora.delta(name).numel() * 4 for name in policy.lora.names)
    for ref, num_bytes in (("behavior", 0), ("ema", merged), ("golden", of_all)):
        method = MethodConfig(ref=ref, golden=str(tiny_model_dir) if ref == "golden" else None)
        reference = Reference(policy, method, form, max_length=16)
        assert reference.num_bytes == num_bytes
        if ref == "golden":  # and once: its own start is not kept beside it
            assert reference._golden._initial is None


@pytest.mark.skipif(not has_native(), reason="no native kernels")
@pytest.mark.parametrize("tail", [{}, {"top_k": 3}], ids=["prompts shared", "prompts apart"])
def test_a_cache_takes_what_the_engine_foretells(tail, monkeypatch):
    engine, params = HfEngine.of(make_parts("full").policy, 8), SamplingParams(70, n=2, **tail)
    most, update = 0, DynamicCache.update

    def held(cache):
        parts = [getattr(layer, name, None) or () for layer in cache.layers for name in ("prompts", "_room")]
        return sum(t.numel() * t.element_size() for part in parts for t in part)

    def watched(self, *args, **kwargs):
        nonlocal most
        out = update(self, *args, **kwargs)
        most = max(most, held(self))
        return out

    monkeypatch.setattr(DynamicCache, "update", watched)
    prompts = [Prompt(i, "", tuple(range(1, 41))) for i in range(4)]
    engine.generate(prompts, params, run_seed=0, policy_version=0)
    assert 0.75 * engine.kv_bytes(40, params) < most <= engine.kv_bytes(40, params)


def test_words_name_every_part():
    ledger = Ledger(2**30, 2**29, 2**28, 3 * 2**30, 2**20, 2**27, kv_stays=True, num_microbatches=2)
    assert ledger.training == 2**28 + 2**29 + 3 * 2**30 + 2**20
    assert ledger.peak == 2**30 + 2**27 + ledger.training
    assert ledger.words() == (
        "memory: weights 1.00 GiB, gradients 0.50 GiB, optimizer 0.25 GiB, activations 3.00 GiB, head chunk 1.0 MiB,"
        " kv 0.12 GiB; peak about 4.88 GiB"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="peaks are those of the GPU")
def test_a_peak_counts_blocks_and_not_the_pages_of_mapped_files(tmp_path):
    size = 2**26
    (tmp_path / "file").write_bytes(bytes(size))
    start = machine.reset_peak()
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert sum(pages[:: mmap.PAGESIZE]) == 0
        assert machine.peak_bytes() - start < size / 4
        block = bytearray(size)
        assert machine.peak_bytes() - start == pytest.approx(size, rel=0.25)
    del block
    assert machine.peak_bytes() - start > size / 2
