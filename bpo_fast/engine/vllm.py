"""Engine `vllm`: vLLM in the trainer's process, on the trainer's weights.

vLLM loads the policy; the trainer's parameters become views of its storages (shared_weights.py, loader.py), so an
optimizer step in place is what the next sample comes from. After every refresh a probe proves it (probe.py).
"""

import atexit
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bpo_fast.config import Config
from bpo_fast.engine import OnDone, Request, SamplingParams, in_order, make_requests, request_seed
from bpo_fast.engine.diagnose import first_difference
from bpo_fast.engine.host_state import Interrupts, preserved, preserved_random
from bpo_fast.engine.probe import Probe, ProbeResult
from bpo_fast.engine.session import Session, open_session
from bpo_fast.engine.stopping import StopStrings
from bpo_fast.engine.versions import UnsupportedModelError, UnusableError
from bpo_fast.policy import Policy, load_policy
from bpo_fast.types import Completion, Prompt

with preserved():
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as VllmParams


CUT_LOGPS = "at a temperature other than 1 its log-probs are those after the cut of sampling.top_p and sampling.top_k"
# ends of a request that are none of a completion
GIVEN_UP = ("abort", "error")


@dataclass(frozen=True)
class Refresh:
    """What the last refresh did: seconds without the probe, bytes of weights copied, and the probe's verdict."""

    seconds: float
    bytes_copied: int
    probe: ProbeResult

    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl says of it."""
        values = {f"sampling/sampling_logp_difference/{k}": getattr(self.probe, k) for k in ("mean", "max")}
        return values | {"sampling/refresh_bytes": self.bytes_copied, "sampling/refresh_s": self.seconds}


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
        UnusableError: log-probs are asked for that vLLM does not have, or it does not run the model.
        ValueError: vLLM is missing or untested, or has no room for its KV cache.
        RuntimeError: this process has an engine already, or vLLM does not start.
    """
    sampling = config.sampling
    if config.method.ref_logps == "sampler" and _cuts_logps(sampling.temperature, sampling.top_p, sampling.top_k):
        raise UnusableError(f"sampling.engine = vllm: {CUT_LOGPS}; choose method.ref_logps = trainer")
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
    engine = VllmEngine(policy, session, max_length=max_length)
    if session.held.why_copied:
        _prove_copy(config, policy, engine, session.held.why_copied)
    say(session.in_words())
    return policy, engine


@torch.no_grad()
def _prove_copy(config: Config, policy: Policy, engine: "VllmEngine", why: str) -> None:
    """Shows that a copy reaches every weight: it must follow when one half changes its sign, and then the other.

    Raises:
        UnsupportedModelError: vLLM samples from something else.
    """
    weights: list[torch.Tensor] = list(policy.model.parameters())
    try:
        engine.refresh(0)
        for half in (weights[::2], weights[1::2]):
            torch._foreach_neg_(half)
            try:
                engine.refresh(0)
            finally:
                torch._foreach_neg_(half)
        engine.refresh(0)
    except torch.OutOfMemoryError:
        engine.close()
        raise
    except (RuntimeError, AttributeError) as error:  # vLLM 0.25 has loaders that run once only, and fail by the second
        engine.close()
        raise UnsupportedModelError(
            f"sampling.engine = vllm: {config.model.path}: its weights cannot be shared ({why}) and a copy does not"
            f" reach all of them ({error}); choose sampling.engine = hf"
        ) from None


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
        self.kv_stays = not session.releases_kv
        members = tuple(range(policy.num_members)) if session.member_rows else ()
        self._probe = Probe(
            policy, self._draw_probe, max_length=max_length, block_size=session.block_size, members=members
        )
        # at exit, too, and then before vLLM's own shutdown, which would miss the functions it put into torch, and
        # before its allocator gives up the pool that a KV cache on a GPU is still to be freed in
        self._close = weakref.finalize(self, session.close)
        atexit.register(self._close)
        self.num_retried = 0
        self._version: int | None = None  # of the weights that the next call samples from
        self.last_refresh: Refresh | None = None

    def refresh(self, policy_version: int) -> dict[str, float]:
        """Makes the next call sample from the weights as they are now, and proves it; returns `Refresh.metrics`.

        Raises:
            RuntimeError: the sampler is not the policy; names the first module that differs.
        """
        session = self._session
        self._version = None
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
        self._version = policy_version
        return self.last_refresh.metrics()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        run_seed: int,
        policy_version: int,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`; continuous batching, all prompts in one call.

        A request that vLLM aborts is sampled once more; if it is aborted again, its completion has no ids.

        Raises:
            ValueError: a prompt that leaves no room for the completion.
            RuntimeError: the weights of `policy_version` are not those of the last refresh.
        """
        if policy_version != self._version:
            raise RuntimeError(f"vLLM was last refreshed at step {self._version}: not the policy of {policy_version}")
        self._check(prompts, params)
        requests = make_requests(
            prompts, params, run_seed=run_seed, policy_version=policy_version, num_members=self._policy.num_members
        )
        call = _Call(params, self._policy.eos_ids, StopStrings(self._policy.tokenizer, params.stop), policy_version)
        done = self._run(dict(enumerate(requests)), call, on_done)
        missing = {i: r for i, r in enumerate(requests) if i not in done}
        if missing:
            self.num_retried += len(missing)
            done |= self._run(missing, call, on_done)
            dropped = {i: self._completion(r, (), None, call) for i, r in missing.items() if i not in done}
            done |= dropped
            if on_done and dropped:
                on_done(list(dropped.values()))
        return in_order(prompts, params.n, [done[i] for i in range(len(requests))])

    def kv_bytes(self, prompt_tokens: int, params: SamplingParams) -> int:
        """What was taken at the start: it outlives a call."""
        return self._session.kv_bytes

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
        if params.logps and _cuts_logps(params.temperature, params.top_p, params.top_k):
            raise ValueError(f"temperature = {params.temperature}: {CUT_LOGPS}")
        if params.single_members and not self._session.member_rows:
            raise ValueError("sampling.members: vLLM was not opened for single members")

    def _run(self, requests: dict[int, Request], call: "_Call", on_done: OnDone | None = None) -> dict[int, Completion]:
        """The completions of the requests that finish, by their keys."""
        engine, session = self._session.llm.llm_engine, self._session
        drawn = {key: _Drawn() for key in requests}
        done: dict[int, Completion] = {}
        with (
            session.awake(),
            preserved_random(),
            session.drawn_from({key: r.member for key, r in requests.items()}),
            Interrupts() as interrupts,
            self._emptied(requests),
        ):
            for key, request in requests.items():
                # a block of the prefix cache holds states of one member, or of the average
                salt = {} if request.member is None else {"cache_salt": str(request.member)}
                prompt = {"prompt_token_ids": list(request.prompt.ids), **salt}
                engine.add_request(str(key), prompt, call.vllm_params(request.seed))
            while engine.has_unfinished_requests():
                finished, stopped = [], []
                for output in engine.step():
                    key = int(output.request_id)
                    drawn[key].add(output.outputs[0])
                    if call.stop and not output.finished and call.stop.found(drawn[key].ids):
                        stopped.append(str(key))
                    elif not output.finished or output.outputs[0].finish_reason in GIVEN_UP:
                        continue
                    done[key] = self._completion(requests[key], drawn[key].ids, drawn[key].logps, call)
                    finished.append(done[key])
                if stopped:
                    engine.abort_request(stopped)
                interrupts.deliver()
                if on_done and finished:
                    on_done(finished)
        return done

    @contextmanager
    def _emptied(self, requests: dict[int, Request]) -> Iterator[None]:
        """Nothing of a call that was cut short stays in vLLM's queues."""
        engine = self._session.llm.llm_engine
        try:
            yield
        finally:
            if engine.has_unfinished_requests():
                engine.abort_request([str(key) for key in requests])
                while engine.has_unfinished_requests():
                    engine.step()

    def _completion(
        self, request: Request, ids: Sequence[int], logps: Sequence[float] | None, call: "_Call"
    ) -> Completion:
        return request.completion(
            tuple(ids),
            None if logps is None else tuple(logps),
            tokenizer=self._policy.tokenizer,
            eos_ids=self._policy.eos_ids,
            stop=call.stop,
            policy_version=call.policy_version,
        )

    def _draw_probe(self, prompts: Sequence[Prompt], members: Sequence[int | None], num_new: int):
        call = _Call(SamplingParams(num_new, logps=True), (), StopStrings(self._policy.tokenizer, ()), 0)
        requests = {
            i: Request(p, 0, request_seed(0, 0, p.id, 0), m)
            for i, (p, m) in enumerate(zip(prompts, members, strict=True))
        }
        done = self._run(requests, call)
        logps: list[Any] = [done[i].logps for i in requests]  # asked for, and so none is None
        return [done[i].ids for i in requests], logps


def _cuts_logps(temperature: float, top_p: float, top_k: int) -> bool:
    """Whether vLLM's log-probs are of what the tail's cut has left: those at 1 are taken before it, others after."""
    return temperature not in (0.0, 1.0) and (top_p < 1 or top_k > 0)


@dataclass(frozen=True)
class _Call:
    """What the requests of one call share."""

    params: SamplingParams
    eos_ids: Sequence[int]
    stop: StopStrings
    policy_version: int

    def vllm_params(self, seed: int) -> VllmParams:
        params = self.params
        return VllmParams(
            max_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=seed if params.temperature > 0 else None,
            stop_token_ids=list(self.eos_ids),
            ignore_eos=True,  # the ids above and the stop strings are all that end a completion
            logprobs=0 if params.logps else None,
            detokenize=False,
            # stop strings are looked for after every token; without them the end is soon enough
            output_kind=RequestOutputKind.DELTA if self.stop else RequestOutputKind.FINAL_ONLY,
        )


class _Drawn:
    """Ids of one request so far, and their log-probs if they were asked for."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logps: list[float] | None = None

    def add(self, output: Any) -> None:
        """Takes what one step of vLLM has brought."""
        ids = list(output.token_ids)
        self.ids += ids
        if output.logprobs is not None:
            new = [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)]
            self.logps = (self.logps or []) + new
