"""What a user can cause is said in one line that names the way out."""

import dataclasses
import re
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from tiny_vllm import MAX_LENGTH, save_model, settings
from transformers import LlamaConfig

from bpo_fast.engine import SamplingParams, kv_budget, session, versions
from bpo_fast.engine.versions import UnsupportedModelError, UnusableError
from bpo_fast.policy import load_model
from bpo_fast.setup import load_learner
from bpo_fast.types import Prompt

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "vLLM is not installed"),
        ("0.25.0", "vLLM 0.25.0 is older than what was tested"),
        ("0.33.0", "vLLM 0.33.0 is newer than what was tested"),
    ],
)
def test_a_missing_or_untested_vllm_names_the_range_and_engine_hf(monkeypatch, llama_dir, version, words):
    def fake(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)
    wanted = rf'sampling\.engine = vllm: {words}; install "vllm>=0\.25\.1,<0\.33", or choose sampling\.engine = hf'
    with pytest.raises(ValueError, match=wanted):
        load_learner(settings(llama_dir), CPU, MAX_LENGTH, lambda line: None)
    said = []
    _, engine = load_learner(settings(llama_dir, sampling__engine="auto"), CPU, MAX_LENGTH, said.append)
    assert engine.name == "hf"
    assert said == [f"sampling: transformers ({words})"]


@pytest.mark.parametrize("version", versions.TESTED)
def test_tested_versions_are_in_the_range(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert versions.require() == version


def test_a_model_that_vllm_does_not_run_goes_to_hf_by_itself(tmp_path, tiny_tokenizer):
    small_heads = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    folder = save_model(tmp_path, small_heads, tiny_tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"no heads of size 16, only 32, .*choose sampling\.engine = hf"):
        load_learner(settings(folder), CPU, MAX_LENGTH, lambda line: None)
    said = []
    _, engine = load_learner(settings(folder, sampling__engine="auto"), CPU, MAX_LENGTH, said.append)
    assert engine.name == "hf"
    assert len(said) == 1
    assert "no heads of size 16" in said[0]


def test_unknown_models_are_named(llama_dir):
    model, _ = load_model(settings(llama_dir).model, CPU)
    assert session.unsupported(model, CPU) is None
    model.config.architectures = ["FooForCausalLM"]
    assert "does not know FooForCausalLM" in session.unsupported(model, CPU)


def test_the_kv_budget_is_checked_before_vllm_opens(llama_dir, monkeypatch):
    config = settings(llama_dir)
    model, _ = load_model(config.model, CPU)
    a_token = 2 * 2 * 1 * 32 * 4  # key and value, layers, heads, head size, bytes
    needed = (MAX_LENGTH + 2 * 32) * a_token

    def budget(gib, max_length=MAX_LENGTH):
        sampling = dataclasses.replace(config.sampling, kv_cache_gib=gib)
        return kv_budget.kv_budget(dataclasses.replace(config, sampling=sampling), model, CPU, max_length)

    assert budget(None) == (256 * MAX_LENGTH + 2 * 32) * a_token
    assert budget(0.5) == 2**29
    assert budget(needed / 2**30) == needed
    with pytest.raises(ValueError, match=rf"kv_cache_gib = .*: one sequence of 160 tokens needs {needed / 2**30:.3g}"):
        budget((needed - 1) / 2**30)
    with pytest.raises(ValueError, match=r"kv_cache_gib = 1000000\.0: only .* GiB are free; .* do"):
        budget(1e6)
    num_lora = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))  # layers, rank, q and o, k and v, the MLP
    held = 4 * model.num_parameters() + (4 + 8) * num_lora  # adapters have two moments
    monkeypatch.setattr(kv_budget, "_free_host_bytes", lambda: held + 10 * needed)  # as it is when called
    assert budget(None) == int(0.4 * 10 * needed)
    config = settings(llama_dir, model__full=True)
    held = (4 + 8) * model.num_parameters()
    assert budget(None) == int(0.4 * 10 * needed)
    config = settings(llama_dir, model__full=True, run__devices=2)  # which have half of the moments each
    held = 2 * (4 + 8 // 2) * model.num_parameters() + 10 * needed
    assert budget(None) == int(0.4 * 10 * needed)


@pytest.mark.parametrize(("num_heads", "num_workers", "times"), [(1, 2, 2), (2, 2, 1), (2, 4, 2)])
def test_the_kv_budget_is_of_all_workers(tmp_path, tiny_tokenizer, num_heads, num_workers, times):
    small = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    folder = save_model(
        tmp_path, LlamaConfig(vocab_size=len(tiny_tokenizer), num_key_value_heads=num_heads, **small), tiny_tokenizer
    )
    config = settings(folder, sampling__tensor_parallel=num_workers)
    model, _ = load_model(config.model, CPU)
    a_token = times * 2 * num_heads * 32 * 4  # a head is held by every worker that has no other
    assert kv_budget.kv_budget(config, model, CPU, MAX_LENGTH) == (256 * MAX_LENGTH + 2 * 32) * a_token


def test_the_least_kv_budget_is_enough_and_gives_the_same_completions(llama_dir, learner):
    a_token = 2 * 2 * 1 * 32 * 4
    questions = [Prompt(i, "", tuple((i * 7 + j) % 300 + 2 for j in range(100 + i % 4))) for i in range(8)]
    params = SamplingParams(40, n=2, logps=True)
    found = []
    for gib in (None, (MAX_LENGTH + 2 * 32) * a_token / 2**30, (3 * MAX_LENGTH + 2 * 32) * a_token / 2**30):
        _, engine = learner(llama_dir, model__full=True, sampling__kv_cache_gib=gib)
        engine.refresh(0)
        found.append(engine.generate(questions, params, run_seed=1, policy_version=0))
        assert engine.num_retried == 0
        engine.close()
    roomy, least, few = ([c.ids for group in groups for c in group] for groups in found)
    assert least == few == roomy  # with little room vLLM stops sequences half-way and begins them anew


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(ValueError, ValueError), (RuntimeError, RuntimeError), (torch.OutOfMemoryError, RuntimeError)],
)
def test_an_error_of_vllm_is_one_line(llama_dir, monkeypatch, raised, kind):
    def refuse(**options):
        raise raised("no\n  such thing")

    monkeypatch.setattr(session.vllm, "LLM", refuse)
    wanted = r"^sampling\.engine = vllm: no such thing; choose sampling\.engine = hf$"
    with pytest.raises(kind, match=wanted) as found:
        load_learner(settings(llama_dir), CPU, MAX_LENGTH, lambda line: None)
    assert found.type is kind  # what the command line turns into one line


@pytest.mark.parametrize("error", [ImportError("libcudart.so.13: cannot open\n shared object file"), OSError("libc")])
def test_a_vllm_that_does_not_import_leaves_the_run_to_hf(llama_dir, monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "bpo_fast.engine.vllm":
                raise error

    monkeypatch.delitem(sys.modules, "bpo_fast.engine.vllm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    said = " ".join(str(error).split())
    words = f"sampling.engine = vllm: vLLM {versions.installed()} does not import ({said}); choose sampling.engine = hf"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        load_learner(settings(llama_dir), CPU, MAX_LENGTH, lambda line: None)
    assert falls_back(llama_dir) == [f"sampling: transformers ({words})"]


def test_a_vllm_that_lacks_something_when_it_starts_leaves_the_run_to_hf(llama_dir, monkeypatch):
    """Its models and the kernels of a GPU import more than vLLM itself does."""

    def load(**options):
        raise ModuleNotFoundError("No module named 'einops'")

    monkeypatch.setattr(session.vllm, "LLM", load)
    words = r"does not start \(No module named 'einops'\)"
    with pytest.raises(UnusableError, match=rf"vLLM [0-9.]+ {words}; choose sampling\.engine = hf"):
        load_learner(settings(llama_dir), CPU, MAX_LENGTH, lambda line: None)
    said: list[str] = []
    _, engine = load_learner(settings(llama_dir, sampling__engine="auto"), CPU, MAX_LENGTH, said.append)
    assert engine.name == "hf"
    assert "does not start" in said[0]


def test_a_vllm_for_another_device_leaves_the_run_to_hf(llama_dir, monkeypatch):
    monkeypatch.setattr(session, "current_platform", SimpleNamespace(device_type="cuda"))
    words = f"this vLLM {versions.installed()} runs on cuda, the policy on cpu"
    with pytest.raises(UnsupportedModelError, match=f"{re.escape(words)}; choose sampling.engine = hf"):
        load_learner(settings(llama_dir), CPU, MAX_LENGTH, lambda line: None)
    [line] = falls_back(llama_dir)
    assert words in line


def test_log_probs_that_vllm_does_not_have_leave_the_run_to_hf(llama_dir):
    wanted = {"method__ref_logps": "sampler", "sampling__temperature": 0.7, "sampling__top_p": 0.9}
    with pytest.raises(UnusableError, match=r"those after the cut of .*; choose method\.ref_logps = trainer"):
        load_learner(settings(llama_dir, **wanted), CPU, MAX_LENGTH, lambda line: None)
    [line] = falls_back(llama_dir, **wanted)
    assert "those after the cut" in line


def falls_back(folder, **knobs) -> list[str]:
    """What is said where engine auto takes hf."""
    said: list[str] = []
    _, engine = load_learner(settings(folder, sampling__engine="auto", **knobs), CPU, MAX_LENGTH, said.append)
    assert engine.name == "hf"
    return said
