"""The policy: a transformers model, trained whole or through a LoRA ensemble, and its sequence log-probs.

A policy has views, each a context manager: `members()` is what an optimizer step trains, `member(m)` one of them,
`behavior()` their average, `initial()` where the run began, `merged()` the behavior as dense weights for sampling.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bpo_fast_kernels import PairLoss, linear_logps, linear_pair_loss, linear_token_logps, pair_loss
from bpo_fast_kernels.backends import pick_backend
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bpo_fast.allocator import arena_is_open
from bpo_fast.attention import exchange_attention_, packed_arguments
from bpo_fast.config import MethodConfig, ModelConfig
from bpo_fast.dequantise import dense_, loading_options, quantised_by, quietly
from bpo_fast.fused_layers import fuse_layers_
from bpo_fast.head import probe_head
from bpo_fast.loading import (
    check_vocabulary,
    checkpoint_layers_,
    generation_eos_ids,
    head_weight,
    move_,
    named_load_errors,
    num_embeddings,
    position_limit,
    settle_generation_config_,
    trunk_of,
    working_dtype,
)
from bpo_fast.lora import LoraEnsemble
from bpo_fast.packing import PairBatch, pack_apart, pack_shared, pair_tokens
from bpo_fast.types import Completion, Pair, Prompt
from bpo_fast.varlen import varlen_operator

log = logging.getLogger(__name__)

# what selective checkpointing keeps: matrix products and attention; norms, activations and products of gates are redone
_COSTLY_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


# a CPU builds code for every size of a product of 16 bits, 0.3 ms and half a MB each: packed rows come in multiples
CPU_TOKENS_16_BITS = 64


class Policy:
    """The weights in training.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        config: form of training (LoRA or full, members).
        seed: start of the LoRA members.
        temperature: of the sampler; log-probs are those of the tempered distribution.
        keeps_start: whether there is an `initial` view; of a fully trained model it takes a copy of all weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        config: ModelConfig,
        *,
        seed: int,
        temperature: float = 1.0,
        keeps_start: bool = True,
    ):
        self.model, self.tokenizer, self.config, self.temperature = model, tokenizer, config, temperature
        self.version = 0
        _disable_dropout(model)
        if config.fused_layers and not config.compile:
            fuse_layers_(model)
        self.head = probe_head(model)
        self.pad_id = _pad_id(tokenizer, model)
        self.eos_ids = _eos_ids(tokenizer, model)
        self.chunk_bytes = config.head_chunk_mib * 2**20 if config.head_chunk_mib else None
        _checkpoint_activations(model, config.recomputed)
        self._rows: Tensor | None = None
        self._trunk: Any = trunk_of(model)
        norm = getattr(self._trunk, "norm", None)
        self._norm_picks = isinstance(norm, nn.Module)
        if isinstance(norm, nn.Module):
            norm.register_forward_pre_hook(self._pick_rows)
        self.lora: LoraEnsemble | None = None
        self.shares_prompts = False
        if not config.full:
            assert config.lora_r, "resolve() has set it"
            self.lora = LoraEnsemble(
                model,
                num_members=config.members,
                r=config.lora_r,
                alpha=config.alpha,
                dropout=config.lora_dropout,
                targets=config.lora_targets,
                seed=seed,
                in_place=config.recomputed != "selective",
            )
            for m, folder in enumerate(config.adapters):
                self.lora.load_member(m, folder)
        # the base is on disk for LoRA, so its start is the adapters alone; a full copy waits in host memory
        self.shares_prompts = not config.attn_implementation and _share_prompts(self)
        if config.compile:
            self._trunk = torch.compile(self._trunk, dynamic=True)
        self._kept: dict[str, Tensor] = {}
        self._initial: dict[str, Tensor] | None = None
        if keeps_start and self.lora:
            self._initial = self.lora.state()
        elif keeps_start:
            self._initial = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}

    @property
    def num_members(self) -> int:
        """M."""
        return self.lora.num_members if self.lora else 1

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains; LoRA tensors carry the members in dimension 0."""
        return list(self.lora.parameters()) if self.lora else list(self.model.parameters())

    def members(self) -> AbstractContextManager[None]:
        """Forwards inside run all members at once, on `PairBatch.repeat(M)`; run the backward inside too."""
        return self.lora.members() if self.lora and self.num_members > 1 else self.member(0)

    def member(self, m: int) -> AbstractContextManager[None]:
        """Forwards inside run member m. Run the backward inside too: checkpointing recomputes the forward."""
        return self.lora.member(m) if self.lora else nullcontext()

    def behavior(self) -> AbstractContextManager[None]:
        """Forwards inside run the exact average of the members."""
        return self.lora.average() if self.lora else nullcontext()

    def merged(self, member: int | None = None) -> AbstractContextManager[None]:
        """Forwards inside run the behavior, or one member, as dense weights."""
        if self.lora is None:
            return nullcontext()
        return self.lora.merged(None if member is None else {n: self.lora.delta(n, member) for n in self.lora.names})

    @contextmanager
    def initial(self) -> Iterator[None]:
        """Forwards inside run the weights at the start of the run."""
        assert self._initial is not None, "keeps_start"
        with self.lora.average(self._initial) if self.lora else self._swapped(self._initial):
            yield

    @contextmanager
    def dense(self, deltas: dict[str, Tensor]) -> Iterator[None]:
        """Forwards inside run the start plus `deltas` (LoRA: a layer's name to its delta; full: to its new value)."""
        with self.lora.merged(deltas) if self.lora else self._swapped(deltas):
            yield

    def dense_state(self) -> dict[str, Tensor]:
        """The behavior in the form that `dense` takes."""
        if self.lora:
            return {n: self.lora.delta(n).contiguous() for n in self.lora.names}
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def pair_tokens(self, pair: Pair) -> int:
        """What a pair takes of a micro-batch of one member."""
        return pair_tokens(pair, self.shares_prompts)

    def pack(self, pairs: Sequence[Pair], *, filled: bool = True) -> PairBatch:
        """One micro-batch in the form that the model's attention allows; `filled` up where that spares time."""
        if self.shares_prompts:
            wide = self.device.type != "cpu" or self.model.dtype == torch.float32
            multiple = 1 if wide or not filled else max(1, CPU_TOKENS_16_BITS // self.num_members)
            return pack_shared(pairs, device=self.device, multiple=multiple)
        return pack_apart(pairs, pad_id=self.pad_id, device=self.device)

    @torch.no_grad()
    def logps(self, batch: PairBatch) -> Tensor:
        """Sequence log-probs of the view in force: [2P] float32, nats, chosen first."""
        if not self.head.fused:
            return self._plain_logps(batch)
        logps = linear_logps(
            self.hidden(batch), self._weight(), batch.targets, batch.cu_seqlens, **self._head_options()
        )
        assert isinstance(logps, Tensor), "without behavior rows there is one result"
        return logps

    @torch.no_grad()
    def token_logps(self, batch: PairBatch) -> Tensor:
        """Log-probs of the view in force: [T] float32, nats, in the order of `batch.targets`."""
        if not self.head.fused:
            return self._plain_token_logps(batch)
        return linear_token_logps(self.hidden(batch), self._weight(), batch.targets, **self._head_options())

    def loss(
        self, batch: PairBatch, ref_logps: Tensor | None, method: MethodConfig, *, num_pairs: int
    ) -> tuple[Tensor, PairLoss]:
        """Preference loss of the view in force.

        Args:
            batch: P pairs.
            ref_logps: [2P] float32. reference log-probs, or None where the reference is the policy itself.
            method: loss, beta, label smoothing and the form of ipo.
            num_pairs: pairs of the whole step, which divide the sum.

        Returns:
            (scalar, differentiable; the parts of each pair, detached)
        """
        options: dict[str, Any] = {"loss": method.loss, "beta": method.beta, "label_smoothing": method.label_smoothing}
        if method.loss == "ipo":
            lengths = torch.ones_like(batch.lengths) if method.ipo_sum else batch.lengths
            options["lengths"] = lengths.to(batch.rows.device, non_blocking=True)
        if not self.head.fused:
            logps = self._plain_logps(batch)
            reference = logps.detach() if ref_logps is None else ref_logps
            parts = pair_loss(logps, reference, **options)
            return parts.loss.sum() / num_pairs, parts
        found = linear_pair_loss(
            self.hidden(batch),
            self._weight(),
            batch.targets,
            batch.cu_seqlens,
            ref_logps,
            num_pairs=num_pairs,
            budget_bytes=self.chunk_bytes,
            **options,
            **self._head_options(),
        )
        # memory of E that the backward pass has a use for, and that is whole and has its pages when it comes back
        if self.config.recomputed != "none" or (self.device.type == "cpu" and arena_is_open()):
            pick_backend("auto", self.device).release()
        return found

    def hidden(self, batch: PairBatch) -> Tensor:
        """[T, H] rows of the trunk's output that predict completion tokens; the final norm sees only them."""
        if batch.layout is None or not self._norm_picks:
            return self._forward(self._trunk, batch).last_hidden_state.flatten(0, 1).index_select(0, batch.rows)
        self._rows = batch.rows
        try:
            return self._forward(self._trunk, batch).last_hidden_state
        finally:
            self._rows = None

    def _pick_rows(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """In front of the final norm: the rows that `hidden` wants, or all."""
        if self._rows is None:
            return None
        return (args[0].flatten(0, 1).index_select(0, self._rows),)

    def _forward(self, module: nn.Module, batch: PairBatch) -> Any:
        if batch.layout is None:
            return module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        assert batch.position_ids is not None, "a layout comes with them"
        return module(input_ids=batch.input_ids, **packed_arguments(batch.layout, batch.position_ids))

    def _weight(self) -> Tensor:
        return head_weight(self.model)

    def _plain_token_logps(self, batch: PairBatch) -> Tensor:
        """[T] through the model's own logits, for heads that the kernels do not know."""
        logits = self._forward(self.model, batch).logits.flatten(0, 1).index_select(0, batch.rows).float()
        return (logits / self.temperature).log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)

    def _plain_logps(self, batch: PairBatch) -> Tensor:
        """[2P] sums of the same."""
        token_logps = self._plain_token_logps(batch)
        num_sequences, device = len(batch.lengths), token_logps.device
        segment = torch.arange(num_sequences).repeat_interleave(batch.lengths).to(device, non_blocking=True)
        return torch.zeros(num_sequences, device=device).index_add(0, segment, token_logps)

    def _head_options(self) -> dict[str, Any]:
        return self.head.options(self.temperature)

    @contextmanager
    def _swapped(self, weights: dict[str, Tensor]) -> Iterator[None]:
        self._kept = {name: parameter.data for name, parameter in self.model.named_parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                parameter.data = weights[name].to(parameter.device, parameter.dtype)
            yield
        finally:
            self.put_back_()

    def put_back_(self) -> None:
        """Ends a view; again where an interrupt has cut its end short, and the weights of two would be mixed."""
        if self._kept:
            for name, parameter in self.model.named_parameters():
                parameter.data = self._kept[name]
            self._kept = {}


def load_policy(
    config: ModelConfig,
    *,
    device: torch.device,
    seed: int,
    temperature: float,
    max_length: int,
    place: Callable[[PreTrainedModel], None] | None = None,
    keeps_start: bool = True,
) -> Policy:
    """Loads a policy from a folder or the Hub.

    Args:
        config: where from, and the form of training.
        device: where to.
        seed: start of the LoRA members.
        temperature: of the sampler.
        max_length: longest prompt plus completion in tokens.
        place: moves the model from the host to the device in a way of its own, such as into storages that exist.
        keeps_start: whether the policy has an `initial` view.

    Raises:
        ValueError: not a causal LM, a tokenizer that does not fit, positions that do not reach `max_length`.
    """
    assert config.path is not None, "resolve() has set it"
    model, tokenizer = load_model(config, device)
    check_vocabulary(f"model.path = {config.path}", model, tokenizer)
    limit, what = position_limit(model)
    if limit and max_length > limit:
        raise ValueError(
            f"data.max_prompt_length + sampling.max_new_tokens = {max_length}: the model has {limit} {what}"
        )
    if place:
        place(model)
    else:
        move_(model, device)
    return Policy(model, tokenizer, config, seed=seed, temperature=temperature, keeps_start=keeps_start)


def load_model(config: ModelConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(causal LM on the host, in eval mode and the type for `device`; its tokenizer); ValueError names `model.path`."""
    path = str(config.path)
    dtype = working_dtype(config.dtype, device)
    options = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    tokenizer, stored = load_tokenizer(config)
    quantised = quantised_by(stored)
    with named_load_errors(f"model.path = {path}"), quietly() if quantised else nullcontext():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
            **options,
            **loading_options(stored),
        )
        model, found = loaded
        if quantised:
            model = dense_(model, dtype)
    settle_generation_config_(model)
    drawn = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if drawn:  # at random, by transformers
        raise ValueError(f"model.path = {path}: {len(drawn)} weights are not there or do not fit, such as {drawn[0]}")
    if quantised:
        log.warning(
            "model.path = %s: its %s weights are dequantised to %s", path, quantised, str(dtype).removeprefix("torch.")
        )
    return model.eval(), tokenizer


def load_tokenizer(config: ModelConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """(tokenizer, settings) of a model, without its weights; ValueError names `model.path`."""
    path = str(config.path)
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"model.path = {path}: not a model folder (no config.json)")
    with named_load_errors(f"model.path = {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        return tokenizer, AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)


def _share_prompts(policy: Policy) -> bool:
    """Switches the model to shared-prompt attention if it then gives the same log-probs as sequences apart."""
    generator = torch.Generator().manual_seed(0)
    vocab = num_embeddings(policy.model)
    pairs = []
    for i, (prompt, chosen, rejected) in enumerate(((9, 5, 10), (4, 11, 3))):
        ids = torch.randint(0, vocab, (prompt + chosen + rejected,), generator=generator).tolist()
        cuts = (ids[prompt : prompt + chosen], ids[prompt + chosen :])
        sides = [Completion(i, k, tuple(cut), "", False, 0, 0) for k, cut in enumerate(cuts)]
        pairs.append(Pair(Prompt(i, "", tuple(ids[:prompt])), *sides, chosen_score=1.0, rejected_score=0.0))
    # bf16 keeps 8 bits: a sum over ten tokens may be off by about 0.1 nats
    reason = exchange_attention_(
        policy.model,
        lambda: policy.logps(pack_apart(pairs, pad_id=policy.pad_id, device=policy.device)),
        lambda: policy.logps(pack_shared(pairs, device=policy.device)),
        tolerance=1e-3 if policy.model.dtype == torch.float32 else 0.3,
    )
    if reason:
        log.warning("%s: prompts are not shared within pairs (%s)", type(policy.model).__name__, reason)
    return not reason


def _checkpoint_activations(model: PreTrainedModel, how: str) -> None:
    """Lets the backward pass recompute whole layers ("full"), or of a layer what is cheap to ("selective")."""
    options: dict[str, Any] = {}
    if how == "selective":
        on_gpu = model.device.type == "cuda"
        costly = [*_COSTLY_OPS, varlen_operator()] if on_gpu else list(_COSTLY_OPS)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, costly)
    if how != "none":
        checkpoint_layers_(model, **options)


def _disable_dropout(model: PreTrainedModel) -> None:
    """The policy has no dropout (LoRA's own aside): training and scoring run the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout", "residual_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _pad_id(tokenizer, model: PreTrainedModel) -> int:
    eos = _eos_ids(tokenizer, model)
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos[0] if eos else 0)


def _eos_ids(tokenizer, model: PreTrainedModel) -> tuple[int, ...]:
    """Ids that end a completion: those of the generation config, else the tokenizer's."""
    ids = generation_eos_ids(model)
    if not ids and tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id]
    if not ids:
        raise ValueError("model.path: neither generation_config.json nor the tokenizer names an EOS token")
    return tuple(ids)
