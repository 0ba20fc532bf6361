"""Engine `vllm`: vLLM in the trainer's process, on the trainer's weights.

vLLM loads the policy; the trainer's parameters become views of its storages (shared_weights.py, loader.py), so an
optimizer step in place is what the next sample comes from. After every refresh a probe proves it (probe.py).
"""

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bpo_fast.config import Config
from bpo_fast.engine import SamplingParams, request_seed
from bpo_fast.engine.diagnose import first_difference
from bpo_fast.engine.host_state import Interrupts, preserved, preserved_random
from bpo_fast.engine.probe import Probe, ProbeResult
from bpo_fast.engine.session import Session, open_session
from bpo_fast.policy import Policy, load_policy
from bpo_fast.types import Completion, Prompt

with preserved():
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind


@dataclass(frozen=True)
class Refresh:
    """What the last refresh did: seconds without the probe, bytes of weights copied, and the probe's verdict."""

    seconds: float
    bytes_copied: int
    probe: ProbeResult


@dataclass(frozen=True)
class _Request:
    """One completion to sample."""

    prompt: Prompt
    sample_id: int
    seed: int


def load_learner(
    config: Config, device: torch.device, max_length: int, say: Callable[[str], None]
) -> tuple[Policy, "VllmEngine"]:
    """Opens vLLM on the policy and builds the trainer's policy on the same weights.

    Args:
        config: resolved settings.
        device: of both.
        max_length: longest prompt plus completion in tokens.
        say: told in one line how the weights are held.

    Raises:
        ValueError: vLLM is missing or untested, does not know the model, or has no room for its KV cache.
        RuntimeError: this process has an engine already.
    """
    sessions: list[Session] = []
    try:
        policy = load_policy(
            config.model,
            device=device,
            seed=config.run.seed,
            temperature=config.sampling.temperature,
            max_length=max_length,
            place=lambda model: sessions.append(open_session(config, model, device, max_length)),
        )
    except BaseException:
        for session in sessions:
            session.close()
        raise
    [session] = sessions
    session.attach(policy)
    say(session.in_words())
    return policy, VllmEngine(policy, session, max_length=max_length)


class VllmEngine:
    """Samples with vLLM.

    Args:
        policy: the trainer's policy.
        session: vLLM, opened on the same weights.
        max_length: longest prompt plus completion in tokens.
    """

    name = "vllm"

    def __init__(self, policy: Policy, session: Session, *, max_length: int):
        self._policy, self._session, self._max_length = policy, session, max_length
        self._probe = Probe(policy, self._draw_probe, max_length=max_length, block_size=session.block_size)
        # at exit, too, and then before vLLM's own shutdown, which would miss the functions it put into torch
        self._close = weakref.finalize(self, session.close)
        self.num_retried = 0
        self.last_refresh: Refresh | None = None

    def refresh(self, policy_version: int) -> None:
        """Makes the next call sample from the weights as they are now, and proves it.

        Raises:
            RuntimeError: the sampler is not the policy; names the first module that differs.
        """
        session = self._session
        start = time.perf_counter()
        bytes_copied = session.copy_weights()
        session.reset_prefix_cache()
        seconds = time.perf_counter() - start
        lost = session.strays()
        if lost:
            raise RuntimeError(f"step {policy_version}: {lost[0]} has left the storage that vLLM samples from")
        result = self._probe.run()
        self.last_refresh = Refresh(seconds, bytes_copied, result)
        if not result.mean <= result.limit:  # NaN fails too
            where = first_difference(session, self._policy, self._probe)
            raise RuntimeError(
                f"step {policy_version}: vLLM does not sample from the policy: log-probs of the probe differ by"
                f" {result.mean:.2g} nats a token (limit {result.limit:.2g}); first difference: {where}"
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        run_seed: int,
        policy_version: int,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`; continuous batching, all prompts in one call.

        A request that vLLM aborts is sampled once more; if it is aborted again, its completion has no ids.

        Raises:
            ValueError: a prompt that leaves no room for the completion.
        """
        self._check(prompts, params)
        requests = [
            _Request(p, s, request_seed(run_seed, policy_version, p.id, s)) for p in prompts for s in range(params.n)
        ]
        done = self._run(dict(enumerate(requests)), params, self._policy.eos_ids, on_done)
        missing = {i: r for i, r in enumerate(requests) if i not in done}
        if missing:
            self.num_retried += len(missing)
            done |= self._run(missing, params, self._policy.eos_ids, on_done)
        flat = [
            self._completion(request, done.get(i, ((), None)), policy_version) for i, request in enumerate(requests)
        ]
        return [flat[i * params.n : (i + 1) * params.n] for i in range(len(prompts))]

    def close(self) -> None:
        """Shuts vLLM down; the policy's weights stay usable."""
        self._close()

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        for prompt in prompts:
            if len(prompt.ids) + params.max_new_tokens > self._max_length:
                raise ValueError(
                    f"prompt {prompt.id} has {len(prompt.ids)} tokens: with sampling.max_new_tokens ="
                    f" {params.max_new_tokens} it is longer than the {self._max_length} that vLLM was opened for"
                )
        if params.logps and params.temperature not in (0.0, self._session.logps_temperature):
            raise ValueError(f"temperature = {params.temperature}: log-probs are of {self._session.logps_temperature}")

    def _run(
        self,
        requests: dict[int, _Request],
        params: SamplingParams,
        stop_ids: Sequence[int],
        on_done: Callable[[int], None] | None = None,
    ) -> dict[int, tuple[tuple[int, ...], tuple[float, ...] | None]]:
        """(ids, log-probs) of the requests that finish, by their keys."""
        engine = self._session.llm.llm_engine
        done: dict[int, tuple[tuple[int, ...], tuple[float, ...] | None]] = {}
        with self._session.awake(), preserved_random(), Interrupts() as interrupts, self._emptied(requests):
            for key, request in requests.items():
                prompt = {"prompt_token_ids": list(request.prompt.ids)}
                engine.add_request(str(key), prompt, _vllm_params(params, request.seed, stop_ids))
            while engine.has_unfinished_requests():
                finished = [o for o in engine.step() if o.finished and o.outputs[0].finish_reason != "abort"]
                for output in finished:
                    done[int(output.request_id)] = _ids_and_logps(output.outputs[0])
                interrupts.deliver()
                if on_done and finished:
                    on_done(len(finished))
        return done

    @contextmanager
    def _emptied(self, requests: dict[int, _Request]) -> Iterator[None]:
        """Nothing of a call that was cut short stays in vLLM's queues."""
        engine = self._session.llm.llm_engine
        try:
            yield
        finally:
            if engine.has_unfinished_requests():
                engine.abort_request([str(key) for key in requests])
                while engine.has_unfinished_requests():
                    engine.step()

    def _completion(self, request: _Request, sampled, policy_version: int) -> Completion:
        ids, logps = sampled
        return Completion(
            prompt_id=request.prompt.id,
            sample_id=request.sample_id,
            ids=ids,
            text=self._policy.tokenizer.decode(ids, skip_special_tokens=True),
            truncated=not ids or ids[-1] not in self._policy.eos_ids,
            policy_version=policy_version,
            seed=request.seed,
            logps=logps,
        )

    def _draw_probe(self, prompts: Sequence[Prompt], num_new: int):
        params = SamplingParams(max_new_tokens=num_new, logps=True)
        requests = {p.id: _Request(p, 0, request_seed(0, 0, p.id, 0)) for p in prompts}
        done = self._run(requests, params, stop_ids=())
        return [done[p.id][0] for p in prompts], [done[p.id][1] for p in prompts]


def _vllm_params(params: SamplingParams, seed: int, stop_ids: Sequence[int]) -> VllmParams:
    return VllmParams(
        max_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=seed if params.temperature > 0 else None,
        stop_token_ids=list(stop_ids),
        ignore_eos=True,  # the ids above are all that end a completion
        logprobs=0 if params.logps else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _ids_and_logps(output) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    ids = tuple(output.token_ids)
    if output.logprobs is None:
        return ids, None
    return ids, tuple(at[token].logprob for token, at in zip(ids, output.logprobs, strict=True))
