"""Engines sample completions from the weights that the trainer owns.

`hf` uses transformers and runs everywhere; `vllm` is the fast one. Both take token ids and give token ids.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bpo_fast.types import Completion, Prompt


@dataclass(frozen=True)
class SamplingParams:
    """How one call samples.

    Attributes:
        max_new_tokens: completion limit in tokens.
        n: completions a prompt.
        temperature: softmax temperature; 0 is greedy.
        top_p, top_k: nucleus mass (1 is off) and rank cut (0 is off).
        logps: return log-probs of the tokens, at the temperature of the sampler and before any cut of its tail.
    """

    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    logps: bool = False


class Engine(Protocol):
    """Samples from the current policy."""

    name: str

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        run_seed: int,
        policy_version: int,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Samples `params.n` completions of every prompt, in one call and in the order of the prompts.

        The draw of a completion depends on (run seed, policy version, prompt id, sample id) alone, so that a resumed
        run repeats it. `on_done` is told how many completions have finished since it was last called.
        """
        ...

    def refresh(self, policy_version: int) -> None:
        """Makes the next call sample from the weights as they are now (the average of the members)."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; the policy's weights stay usable."""
        ...


def request_seed(run_seed: int, policy_version: int, prompt_id: int, sample_id: int) -> int:
    """Seed of one completion, a 63-bit hash of what names it."""
    key = f"{run_seed}:{policy_version}:{prompt_id}:{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
