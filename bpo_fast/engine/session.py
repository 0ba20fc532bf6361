"""One vLLM inside this process: how it is opened on a policy, how the weights are held, how it is closed."""

import gc
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bpo_fast.config import Config
from bpo_fast.engine import versions
from bpo_fast.engine.decode import head_size
from bpo_fast.engine.handover import handed_over
from bpo_fast.engine.host_state import (
    Interrupts,
    guest_functions,
    heap_frozen,
    preserved,
    preserved_class,
    quiet_stderr,
)
from bpo_fast.engine.kv_budget import BLOCK_SIZE, MAX_NUM_SEQS, kv_budget, workers_on
from bpo_fast.engine.member_rows import MemberRows
from bpo_fast.loading import batch_ropes, move_
from bpo_fast.lora import find_linears
from bpo_fast.policy import Policy

log = logging.getLogger(__name__)

ENVIRON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    # of no use to requests with seeds; vLLM imports it at its start on a GPU, and fails where it is not installed
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
MAX_BATCHED_TOKENS = 4096

_open: "Session | None" = None

with preserved(ENVIRON):
    import pydantic
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform

    from bpo_fast.engine import loader
    from bpo_fast.engine.held import Held, held_by_workers, held_here

    # where vLLM is not installed, type checkers take `import vllm` for the file beside this one
    vllm: Any = importlib.import_module("vllm")


@dataclass
class Session:
    """vLLM on a policy.

    Attributes:
        llm: the engine.
        held: how it holds the weights.
        kv_bytes: budget of the KV cache on the trainer's device.
        block_size: tokens of a block of the KV cache.
        logps_temperature: temperature of the log-probs that vLLM returns.
        own_group: whether vLLM made the process group, which goes with it.
        member_rows: opened for sampling from single members.
        stream: of a GPU, on which vLLM was opened.
        policy: whose weights these are, once it is there.
    """

    llm: Any
    held: Held
    kv_bytes: int
    block_size: int
    logps_temperature: float
    own_group: bool
    member_rows: MemberRows | None
    stream: torch.cuda.Stream | None
    policy: Policy | None = field(default=None)

    def attach(self, policy: Policy) -> None:
        """Takes the policy whose weights these are; the members of a live ensemble move into vLLM's storages."""
        self.policy = policy
        self.held.attach(policy)

    def strays(self) -> list[str]:
        """Names of the trainer's tensors that no longer lie in the storage that vLLM reads."""
        assert self.policy is not None, "attach() comes first"
        return self.held.strays(self.policy)

    def copy_weights(self) -> int:
        """Brings the copied weights up to date; returns the bytes that took."""
        assert self.policy is not None, "attach() comes first"
        return self.held.copy(self.policy)

    def reset_prefix_cache(self) -> None:
        """Forgets the KV of older weights; vLLM does not do it when weights change."""
        done = self.llm.reset_prefix_cache()
        assert done, "no request is running"

    def drawn_from(self, member_of: Mapping[int, int | None]) -> AbstractContextManager[None]:
        """Inside, requests are drawn from these members; None is the average."""
        return self.member_rows.requests(member_of) if self.member_rows else nullcontext()

    @property
    def releases_kv(self) -> bool:
        """Whether training has the memory of the KV cache outside of `awake`: on a GPU."""
        return self.llm.llm_engine.vllm_config.model_config.enable_sleep_mode

    @property
    def has_graphs(self) -> bool:
        """Whether vLLM compiles the model or records its steps, which hides what single layers give."""
        chosen = self.llm.llm_engine.vllm_config.compilation_config
        return chosen.mode != CompilationMode.NONE or chosen.cudagraph_mode != CUDAGraphMode.NONE

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The KV cache has memory inside; outside, on a GPU, training has it."""
        # on a GPU too: vLLM learns of the current stream from its own torch.cuda.set_stream
        with guest_functions():
            if not self.releases_kv:
                # vLLM compiles a helper of its log-probs: five seconds and a C++ compiler for a comparison and a sum
                with nullcontext() if self.has_graphs else torch.compiler.set_stance("force_eager"):
                    yield
                return
            # vLLM keeps the stream it was opened on, and copies its tokens to the host once that one has made them
            with torch.cuda.stream(self.stream), heap_frozen():
                torch.cuda.synchronize()
                try:
                    with Interrupts():  # a pool that is mapped by half can be neither used nor mapped again
                        _wake(self.llm)
                    yield
                finally:
                    with Interrupts():
                        torch.cuda.synchronize()
                        self.llm.sleep(level=1)

    def in_words(self) -> str:
        """One line for the log."""
        kv = f"KV cache {self.kv_bytes / 2**30:.2f} GiB"
        return f"sampling: vLLM {versions.installed()} in this process, {self.held.in_words()}; {kv}"

    def close(self) -> None:
        """Shuts vLLM down and leaves a process group that was there before it."""
        global _open
        if _open is not self:
            return
        _open = None
        _shut_down(self.llm, self.own_group)


def open_session(config: Config, model: PreTrainedModel, device: torch.device, max_length: int) -> Session:
    """Opens vLLM on the policy and puts the trainer's model on the device, into vLLM's storages where that can be.

    Args:
        config: resolved settings.
        model: the trainer's model, on the host.
        device: of both.
        max_length: longest prompt plus completion in tokens.

    Raises:
        ValueError: vLLM does not run this model here, or its KV cache does not fit.
        RuntimeError: this process has an engine already, or vLLM does not start.
    """
    global _open
    versions.require()
    gc.collect()  # an engine that nobody holds is closed by that
    if _open is not None:
        raise RuntimeError("this process has a vLLM engine already; close it before another is opened")
    reason = unsupported(model, device)
    if reason:
        raise versions.UnsupportedModelError(
            f"sampling.engine = vllm: {config.model.path}: {reason}; choose sampling.engine = hf"
        )
    lora_names = () if config.model.full else tuple(find_linears(model, config.model.lora_targets))
    live = _live_lora(config, device, lora_names, max_length)
    num_workers = config.sampling.tensor_parallel
    if device.type == "cuda" and num_workers > torch.cuda.device_count():
        raise ValueError(f"sampling.tensor_parallel = {num_workers}: this machine has {torch.cuda.device_count()} GPUs")
    kv_bytes = kv_budget(config, model, device, max_length)
    own_group = not torch.distributed.is_initialized()
    loader.register()
    loader.PolicyLoader.policy, loader.PolicyLoader.live_lora = model, live
    try:
        llm, stream = _start(config, model, device, max_length, kv_bytes, live)
    except BaseException:
        with preserved(ENVIRON), _group_spared(own_group):  # what a start that failed half-way has left
            if num_workers > 1:
                _workers().close_all()
            destroy_model_parallel()
            destroy_distributed_environment()
        raise
    finally:
        loader.PolicyLoader.policy = loader.PolicyLoader.live_lora = None
    try:
        if num_workers > 1:
            held = held_by_workers(llm, model, num_workers)
        else:
            module = llm.apply_model(lambda m: m)[0]
            held = held_here(module, model, lora_names, live_lora=live is not None)
            if lora_names and not held.live_lora:
                _check_merging(config, module)
        move_(model, device)
        rows = live.rows if live and held.live_lora else None
        if rows:
            rows.attach(llm.collective_rpc(lambda worker: worker.model_runner)[0])
        _open = Session(
            llm=llm,
            held=held,
            kv_bytes=kv_bytes,
            block_size=llm.llm_engine.vllm_config.cache_config.block_size,
            logps_temperature=config.sampling.temperature,
            own_group=own_group,
            member_rows=rows,
            stream=stream,
        )
    except BaseException:
        _shut_down(llm, own_group)
        raise
    return _open


def _check_merging(config: Config, module: nn.Module) -> None:
    """ValueError where members that cannot be read in place are to be, by a setting."""
    for knob, is_set in (
        ("sampling.members = single", config.samples_members),
        ("sampling.merge_lora = false", config.sampling.merge_lora is False),
    ):
        if is_set:
            layers = f"the linear layers of {config.model.path} as the trainer has them"
            raise ValueError(f"{knob}: vLLM's {type(module).__name__} does not hold {layers}")


def unsupported(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why vLLM cannot sample from this model here, in words, or None."""
    if current_platform.device_type != device.type:
        return f"this vLLM {versions.installed()} runs on {current_platform.device_type}, the policy on {device.type}"
    config = model.config.get_text_config()
    architecture = _architecture(model)
    if architecture not in ModelRegistry.get_supported_archs():
        return f"vLLM {versions.installed()} does not know {architecture}"
    if device.type == "cpu":
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        size, known = head_size(config), CPUAttentionBackend.get_supported_head_sizes()
        if size not in known:
            return f"vLLM's CPU attention has no heads of size {size}, only {', '.join(map(str, known))}"
    return None


def merges_lora(config: Config, device: torch.device) -> bool:
    """Whether the average of the members is merged into a copy of the linear layers, or read from the members.

    The rule, from bench/results/sampling-cpu.json: on a CPU, against engine hf beside it, a merged copy samples 1.3
    times as fast as five members read in place and as fast as one, and a merge costs milliseconds a refresh, so it is
    merged. On a GPU, where a second copy is what memory lacks, the members are read in place.
    """
    if config.samples_members:
        return False  # a merged copy is one policy, not several
    if config.sampling.tensor_parallel > 1:
        return True  # other processes have copies
    if config.sampling.merge_lora is not None:
        return config.sampling.merge_lora
    return device.type == "cpu"


def _start(
    config: Config,
    model: PreTrainedModel,
    device: torch.device,
    max_length: int,
    kv_bytes: int,
    live: loader.LiveLora | None,
) -> tuple[Any, torch.cuda.Stream | None]:
    """vLLM, and the stream of a GPU that it goes on using."""
    on_gpu = device.type == "cuda"
    num_workers = config.sampling.tensor_parallel
    options: dict[str, Any] = {"worker_cls": "bpo_fast.engine.worker.KvPoolWorker"} if on_gpu else {}
    plain = config.sampling.temperature == 1.0
    environ = ENVIRON | ({"HF_HUB_OFFLINE": "1"} if Path(str(config.model.path)).exists() else {})
    if num_workers > 1:
        options = _workers().options(num_workers)
        environ |= _workers().environ(num_workers, device)
    if config.samples_members:
        environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # MemberRows hooks into the first one
    if on_gpu and "PYTORCH_ALLOC_CONF" in os.environ:
        # vLLM 0.25 looks for expandable segments, which its pool is not made of, under PyTorch's older name alone
        environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"]
    quiet = nullcontext() if "VLLM_LOGGING_LEVEL" in os.environ else quiet_stderr()
    # all that the processes of its workers can load is what lies in memory they map, too
    handing_over = handed_over(loader.checkpoint_weights(model)) if num_workers > 1 else nullcontext()
    with preserved(environ), preserved_class(type(model.base_model)), quiet, handing_over as handover:
        vllm.envs.disable_envs_cache()  # an engine before this one has left its variables there
        if on_gpu and device.index is not None:  # "cuda" is the current one
            torch.cuda.set_device(device)
        try:
            options |= _compilation_options(_import_architecture(model), model)
            llm = vllm.LLM(
                model=str(config.model.path),
                dtype=str(model.dtype).removeprefix("torch."),
                trust_remote_code=config.model.trust_remote_code,
                load_format=loader.LOAD_FORMAT,
                model_loader_extra_config={loader.HANDOVER: handover} if handover else {},
                hf_overrides={"quantization_config": None},  # the trainer's weights are dense, whatever the file holds
                use_tqdm_on_load=False,
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's own repetition penalties and the like
                max_model_len=max_length,
                max_num_seqs=MAX_NUM_SEQS,
                block_size=BLOCK_SIZE[device.type],
                # a seeded request whose prompt is cut over two steps fails on a CPU, whose generators cannot step back
                enable_chunked_prefill=False,
                max_num_batched_tokens=_batched_tokens(max_length),
                kv_cache_memory_bytes=kv_bytes // workers_on(config, device),
                gpu_memory_utilization=0.1,  # only checked against what is free; the line above decides
                enable_prefix_caching=True,
                enable_sleep_mode=on_gpu,
                enforce_eager=not on_gpu if config.sampling.enforce_eager is None else config.sampling.enforce_eager,
                logprobs_mode="raw_logprobs" if plain else "processed_logprobs",
                additional_config={"bpo_fast": loader.graph_key(live)},
                seed=0,
                **options,
            )
        except ImportError as error:  # vLLM imports the most of what it needs when it comes to that
            raise versions.unusable("start", error) from None
        except (ValueError, RuntimeError) as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(f"sampling.engine = vllm: {_said(error)}; choose sampling.engine = hf") from None
        return llm, torch.cuda.current_stream() if on_gpu else None


def _workers() -> ModuleType:
    """Brings more of vLLM with it, which an engine in one process does without."""
    with preserved(ENVIRON):
        from bpo_fast.engine import workers
    return workers


def _said(error: Exception) -> str:
    """One line of an error."""
    if isinstance(error, pydantic.ValidationError):  # of vLLM's settings; its own text shows all of them
        return "; ".join(part["msg"].removeprefix("Value error, ") for part in error.errors(include_context=False))
    return " ".join(str(error).split())


def _shut_down(llm: Any, own_group: bool) -> None:
    """Ends vLLM."""
    with preserved(ENVIRON), _group_spared(own_group):
        # vLLM unmaps the memory of the KV cache then, and where there is none its allocator fails the next engine; if
        # the process has no room for it, there will be no next engine
        try:
            _wake(llm)
        except RuntimeError as error:
            log.warning("the KV cache of vLLM could not be given its memory back before the end: %s", error)
        finally:
            llm.llm_engine.engine_core.shutdown()


def _wake(llm: Any) -> None:
    """Gives the KV cache its memory back, if it has none."""
    if llm.llm_engine.is_sleeping():
        torch.cuda.empty_cache()
        llm.wake_up()


@contextmanager
def _group_spared(own_group: bool) -> Iterator[None]:
    """vLLM destroys whatever process group it finds; inside, not one that was there before it."""
    destroy = torch.distributed.destroy_process_group
    try:
        if not own_group:
            torch.distributed.destroy_process_group = lambda group=None: group and destroy(group)
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


def _import_architecture(model: PreTrainedModel) -> type[nn.Module]:
    """Imports vLLM's class of the model here; vLLM would ask a subprocess what it can do, which takes ten seconds."""
    architecture = _architecture(model)
    found = ModelRegistry.models[architecture].load_model_cls()
    ModelRegistry.register_model(architecture, found)
    return found


def _compilation_options(found: type[nn.Module], model: PreTrainedModel) -> dict[str, Any]:
    """How vLLM is to compile its class of the model; empty: as it does by itself."""
    if not found.__module__.startswith("vllm.model_executor.models.transformers"):
        return {}
    # transformers' own layers, of a class that is the trainer's, too, and so does not stay as vLLM compiles it; a step
    # of decoding is a graph all the same, of which vLLM 0.25 is to be told, where nothing in it waits for the device
    graphs = CUDAGraphMode.NONE if batch_ropes(model) else CUDAGraphMode.FULL_DECODE_ONLY
    return {"compilation_config": {"mode": CompilationMode.NONE, "cudagraph_mode": graphs}}


def _architecture(model: PreTrainedModel) -> str:
    return (model.config.architectures or [type(model).__name__])[0]


def _live_lora(config: Config, device: torch.device, names: tuple[str, ...], max_length: int) -> loader.LiveLora | None:
    """The members as vLLM's layers are to read them, or None where they are merged or there are none."""
    if not names or merges_lora(config, device):
        return None
    model = config.model
    assert model.lora_r, "resolve() has set it"
    rows = MemberRows(_batched_tokens(max_length), model.members, device) if config.samples_members else None
    return loader.LiveLora(names, model.members, model.lora_r, model.alpha / (model.lora_r * model.members), rows)


def _batched_tokens(max_length: int) -> int:
    """Longest batch of one step."""
    return max(MAX_BATCHED_TOKENS, max_length)
