"""Whether vLLM does here what the engine needs of it: one line of verdict for each thing, on a tiny random model."""

import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from bpo_fast import config as configs
from bpo_fast.engine import SamplingParams, versions
from bpo_fast.types import Prompt

MAX_LENGTH = 160


@dataclass(frozen=True)
class Verdict:
    """One thing that was tried.

    Attributes:
        name: what.
        ok: whether it worked.
        detail: what was seen.
        auto_is_hf: of what did not work: sampling.engine = auto then samples with transformers, else the run fails.
    """

    name: str
    ok: bool
    detail: str
    auto_is_hf: bool = False


def self_test(device: torch.device) -> list[Verdict]:
    """Opens vLLM on a tiny random model, updates the weights in place and compares both engines; a few seconds.

    Args:
        device: of vLLM and the trainer.
    """
    version, trouble = versions.installed(), versions.trouble()
    if trouble:
        return [Verdict("version", False, trouble, auto_is_hf=True)]
    tested = versions.TESTED.get(str(version))
    found = [
        Verdict("version", True, f"{version}, {f'tested ({tested})' if tested else 'in range, not itself tested'}")
    ]
    try:
        from bpo_fast.engine.vllm import load_learner
    except Exception as error:
        return [*found, _failed("import", error, auto_is_hf=isinstance(error, ImportError | OSError))]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        knobs = {"model.path": folder, "model.full": True, "sampling.max_new_tokens": 8}
        try:
            policy, engine = load_learner(configs.load(None, knobs), device, MAX_LENGTH, lambda line: None)
        except Exception as error:
            return [*found, _failed("start", error, auto_is_hf=isinstance(error, versions.UnusableError))]
    found.append(Verdict("start", True, "opened in this process"))
    try:
        with closing(engine):
            engine.refresh(0)
            assert engine.last_refresh, "refresh() has set it"
            copied = engine.last_refresh.bytes_copied
            found.append(Verdict("one copy of the weights", copied == 0, f"{copied} bytes copied at a refresh"))
            before = _greedy(engine, 0)
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1], device=parameter.device))
            engine.refresh(1)
            probe = engine.last_refresh.probe
            found.append(Verdict("policy = sampler", True, f"log-probs differ by {probe.mean:.1e} nats a token"))
            found.append(
                Verdict("in-place updates", _greedy(engine, 1) != before, "the next sample comes from the new weights")
            )
    except Exception as error:
        found.append(_failed("policy = sampler", error))
    return found


def _failed(name: str, error: Exception, *, auto_is_hf: bool = False) -> Verdict:
    return Verdict(name, False, " ".join(f"{type(error).__name__}: {error}".split()), auto_is_hf)


def _greedy(engine, policy_version: int) -> list[tuple[int, ...]]:
    prompts = [Prompt(i, "", tuple(range(5 + i, 45 + i))) for i in range(4)]
    params = SamplingParams(max_new_tokens=8, temperature=0.0)
    return [c[0].ids for c in engine.generate(prompts, params, run_seed=0, policy_version=policy_version)]


def write_model(folder: Path) -> None:
    """A Llama of two layers with peaked distributions, and its tokenizer."""
    from bpo_fast.tokenizer import train_bpe

    tokenizer: Any = train_bpe(["a self-test needs few words"], vocab_size=270)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=270,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                max_position_embeddings=256,
                initializer_range=0.2,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
