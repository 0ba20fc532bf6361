"""Engines sample completions from the weights that the trainer owns.

`hf` uses transformers and runs everywhere; `vllm` is the fast one. Both take token ids and give token ids.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bpo_fast.config import Config
from bpo_fast.engine.stopping import StopStrings
from bpo_fast.types import Completion, Prompt

OnDone = Callable[[Sequence[Completion]], None]


@dataclass(frozen=True)
class SamplingParams:
    """How one call samples.

    Attributes:
        max_new_tokens: completion limit in tokens.
        n: completions a prompt.
        temperature: softmax temperature; 0 is greedy.
        top_p, top_k: nucleus mass (1 is off) and rank cut (0 is off).
        logps: return log-probs of the tokens, at the temperature of the sampler and before any cut of its tail.
        stop: strings that end a completion, which leaves them out; see stopping.py.
        single_members: every completion comes from one member, which its seed draws; otherwise from their average.
    """

    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    logps: bool = False
    stop: tuple[str, ...] = ()
    single_members: bool = False


@dataclass(frozen=True)
class Request:
    """One completion to sample, from one member or, without one, from their average."""

    prompt: Prompt
    sample_id: int
    seed: int
    member: int | None = None

    def completion(
        self,
        ids: tuple[int, ...],
        logps: tuple[float, ...] | None,
        *,
        tokenizer: Any,
        eos_ids: Sequence[int],
        stop: StopStrings,
        policy_version: int,
    ) -> Completion:
        """What was sampled, cut before a stop string; without ids if the engine gave it up.

        Args:
            ids: sampled token ids.
            logps: their log-probs in nats, or None.
            tokenizer: writes the text.
            eos_ids: ids that end a completion.
            stop: the stop strings.
            policy_version: of the weights that sampled it.
        """
        kept = stop.cut(ids)
        ids, logps = (ids, logps) if kept is None else (ids[:kept], logps and logps[:kept])
        return Completion(
            prompt_id=self.prompt.id,
            sample_id=self.sample_id,
            ids=ids,
            text=tokenizer.decode(ids, skip_special_tokens=True),
            truncated=kept is None and (not ids or ids[-1] not in eos_ids),
            policy_version=policy_version,
            seed=self.seed,
            logps=logps,
            stopped=kept is not None,
            member=self.member,
        )


class Engine(Protocol):
    """Samples from the current policy.

    Attributes:
        name: what it is called in settings.
        kv_stays: whether its KV cache keeps its memory while the policy trains.
        num_retried: completions so far that it has sampled a second time.
    """

    name: str
    kv_stays: bool
    num_retried: int

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        run_seed: int,
        policy_version: int,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """Samples `params.n` completions of every prompt, in one call and in the order of the prompts.

        The draw of a completion depends on (run seed, policy version, prompt id, sample id) alone, so that a resumed
        run repeats it. `on_done` is given the completions that have finished since it was last called; those of
        prompts that come first `by_length` tend to finish first.
        """
        ...

    def refresh(self, policy_version: int) -> dict[str, float]:
        """Makes the next call, which must be for that version, sample from the weights as they are now.

        Returns:
            What was measured of that, by the names of metrics.jsonl.
        """
        ...

    def kv_bytes(self, prompt_tokens: int, params: SamplingParams) -> int:
        """What the KV cache takes at most in a call whose prompts have up to so many tokens."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; the policy's weights stay usable."""
        ...


def sampling_params(config: Config) -> SamplingParams:
    """How the pairs of a run are sampled."""
    sampling = config.sampling
    assert sampling.max_new_tokens, "resolve() has set it"
    return SamplingParams(
        max_new_tokens=sampling.max_new_tokens,
        n=2,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        logps=config.method.ref_logps == "sampler",
        stop=sampling.stop or (),
        single_members=config.samples_members,
    )


def by_length(prompts: Sequence[Prompt]) -> list[int]:
    """Positions of the prompts, short ones first: the order in which engines take them up."""
    return sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))


def make_requests(
    prompts: Sequence[Prompt], params: SamplingParams, *, run_seed: int, policy_version: int, num_members: int
) -> list[Request]:
    """One request a completion, the samples of a prompt side by side, short prompts first.

    Args:
        prompts: with their token ids.
        params: how many completions of each, and whether from single members.
        run_seed, policy_version: what the seeds are made of, beside the ids of prompt and sample.
        num_members: of the ensemble; the seed draws the member.

    Raises:
        ValueError: a prompt without tokens, which no model can go on from.
    """
    requests = []
    for i in by_length(prompts):
        if not prompts[i].ids:
            raise ValueError(f"prompt {prompts[i].id} has no tokens")
        for sample_id in range(params.n):
            seed = request_seed(run_seed, policy_version, prompts[i].id, sample_id)
            member = seed % num_members if params.single_members else None
            requests.append(Request(prompts[i], sample_id, seed, member))
    return requests


def in_order(prompts: Sequence[Prompt], n: int, sampled: Sequence[Completion]) -> list[list[Completion]]:
    """The completions of `make_requests`, grouped in the order of the prompts."""
    out: list[list[Completion]] = [[] for _ in prompts]
    for rank, i in enumerate(by_length(prompts)):
        out[i] = list(sampled[rank * n : (rank + 1) * n])
    return out


def request_seed(run_seed: int, policy_version: int, prompt_id: int, sample_id: int) -> int:
    """Seed of one completion, a 63-bit hash of what names it."""
    key = f"{run_seed}:{policy_version}:{prompt_id}:{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
