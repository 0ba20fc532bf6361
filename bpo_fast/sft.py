"""Supervised fine-tuning: the policy that BPO starts from, from a model or from scratch."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from bpo_fast_kernels import linear_token_logps
from torch import Tensor

from bpo_fast.attention import exchange_attention_, has_attention_dropout, lay_out, packed_arguments
from bpo_fast.batches import length_batches, microbatch_tokens
from bpo_fast.config import DataConfig
from bpo_fast.head import probe_head
from bpo_fast.loading import (
    check_vocabulary,
    checkpoint_layers_,
    head_weight,
    named_load_errors,
    pick_device,
    position_limit,
    settle_generation_config_,
    trunk_of,
    working_dtype,
)
from bpo_fast.lora import LoraEnsemble
from bpo_fast.progress import Progress
from bpo_fast.prompts import cut_prompt, encode_prompts, missing, read_rows, row_text
from bpo_fast.ranks import Ranks
from bpo_fast.stage_checkpoint import StageCheckpoint, checkpoint_folder, inputs_of
from bpo_fast.stage_config import SftConfig
from bpo_fast.stages import (
    TrainingRows,
    fit,
    fresh_model,
    open_tokenizer,
    plateau_epoch,
    save_model,
    scratch_config,
    split_by_prompt,
    stage_folder,
    stage_ranks,
)
from bpo_fast.tasks import get_task
from bpo_fast.tokenizer import end_of_turn, with_leading_space

log = logging.getLogger(__name__)

SFT_FILE = "sft.json"


def train_sft(config: SftConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Trains one model, or `members` of them, on the completions of prompt and label rows.

    The loss is the mean over completion tokens, EOS included where the completion is complete, of -log pi; prompt
    tokens carry none. Deterministic on a CPU with a fixed number of threads.

    Args:
        config: settings, already checked.
        progress: where to show progress; a fresh one if None.

    Returns:
        What OUT/sft.json holds. OUT is a Hugging Face folder, or holds member-0, member-1, ... (LoRA: PEFT folders).

    Raises:
        ValueError: bad data or model, by name, or a loss that is not finite.
        RuntimeError: out of memory with the longest row.
    """
    with progress or Progress() as shown, stage_ranks(config) as ranks:
        return train_rank(config, ranks, shown)


def train_rank(config: SftConfig, ranks: Ranks, progress: Progress) -> dict[str, Any]:
    """What every process of `train_sft` does; rank 0 writes it down."""
    started = time.monotonic()
    device = pick_device("sft.device", config.device)
    with stage_folder(config, ranks, progress) as folder:
        data = _load_data(config)
        ranks.connect(device)
        train = partial(_train_member, config, data, folder=folder, device=device, progress=progress, ranks=ranks)
        members = [train(member) for member in range(config.members)]
        result = {
            "config": dataclasses.asdict(config),
            "num_train": len(data.train),
            "num_held_out": len(data.held_out),
            "num_train_tokens": sum(len(e.ids) for e in data.train),
            "num_completion_tokens": sum(e.num_completion for e in data.train),
            "num_cut_prompts": data.num_cut_prompts,
            "num_cut_completions": data.num_cut_completions,
            "vocab_size": len(data.tokenizer),
            "members": members,
            "seconds": time.monotonic() - started,
        }
        if folder:
            (folder / SFT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


@dataclass(frozen=True)
class Example:
    """One row as token ids: prompt and completion, the last `num_completion` of them trained on."""

    ids: tuple[int, ...]
    num_completion: int


@dataclass(frozen=True)
class SftData:
    """Encoded rows, the tokenizer that encoded them, and what the limits cut."""

    tokenizer: Any
    train: list[Example]
    held_out: list[Example]
    num_cut_prompts: int
    num_cut_completions: int


def _load_data(config: SftConfig) -> SftData:
    rows = read_rows(config.data, config.split)
    held_out = read_rows(config.eval_data, config.eval_split) if config.eval_data else []

    def corpus() -> Iterator[str]:
        for prompt, completion, _ in _to_texts(rows, config, None, config.data):
            yield prompt
            yield completion

    tokenizer = open_tokenizer(config, corpus)
    texts = _to_texts(rows, config, tokenizer, config.data)
    if config.eval_data:
        eval_texts = _to_texts(held_out, config, tokenizer, config.eval_data)
    else:
        train, rest = split_by_prompt([t[0] for t in texts], config.eval_fraction, config.seed)
        texts, eval_texts = [texts[i] for i in train], [texts[i] for i in rest]
    if not texts:
        raise ValueError(f"sft.data = {config.data}: no training rows left after sft.eval_fraction")
    examples, num_cut_prompts, num_cut_completions = encode_examples(texts + eval_texts, tokenizer, config)
    return SftData(tokenizer, examples[: len(texts)], examples[len(texts) :], num_cut_prompts, num_cut_completions)


def _to_texts(rows: Sequence[dict], config: SftConfig, tokenizer: Any, source: str) -> list[tuple[str, str, bool]]:
    """(prompt, completion with its leading space, True if a chat template made the prompt) of every row."""
    columns = DataConfig(
        prompt_column=config.prompt_column, label_column=config.label_column, chat_template=config.chat_template
    )
    texts = []
    for index, row in enumerate(rows):
        found = row_text(row, index, columns, get_task(config.task), tokenizer, source)
        if found.label is None:
            column = config.label_column or "label"
            raise missing(row, index, f"completion (column {column})", "label_column", source)
        templated = found.plain is not None
        completion = found.label if templated else with_leading_space(found.text, found.label)
        texts.append((found.text, completion, templated))
    return texts


def encode_examples(
    texts: Sequence[tuple[str, str, bool]], tokenizer: Any, config: SftConfig
) -> tuple[list[Example], int, int]:
    """Encodes (prompt, completion, templated) texts; prompt and completion apart.

    EOS, or what ends a turn in the chat template, follows every completion that fits `max_completion_length` with it; a
    longer one is cut and stays without. A long prompt loses its beginning, but not its BOS.

    Returns:
        The examples, the number of cut prompts, the number of cut completions.
    """
    prompts = encode_prompts([p for p, _, _ in texts], [t for _, _, t in texts], tokenizer)
    completions = tokenizer([c for _, c, _ in texts], add_special_tokens=False)["input_ids"] if texts else []
    examples, num_cut_prompts, num_cut_completions = [], 0, 0
    ends = {False: tokenizer.eos_token_id, True: end_of_turn(tokenizer)}
    for prompt, completion, (_, _, templated) in zip(prompts, completions, texts, strict=True):
        if len(prompt) > config.max_prompt_length:
            num_cut_prompts += 1
            prompt = cut_prompt(prompt, config.max_prompt_length, tokenizer.bos_token_id)
        target = [*completion, ends[templated]]
        num_cut_completions += len(target) > config.max_completion_length
        target = target[: config.max_completion_length]
        examples.append(Example((*prompt, *target), len(target)))
    return examples, num_cut_prompts, num_cut_completions


def _train_member(
    config: SftConfig,
    data: SftData,
    member: int,
    *,
    folder: Path | None,
    device: torch.device,
    progress: Progress,
    ranks: Ranks,
) -> dict[str, Any]:
    seed, alone = config.seed + member, config.members == 1
    torch.manual_seed(seed)
    model = _open_model(config, data, device)
    nll = CompletionNll(model, data.train[:2])
    if config.gradient_checkpointing:
        checkpoint_layers_(model)
    lora, view = None, nullcontext()
    if config.lora_r:
        alpha = config.lora_alpha or 2.0 * config.lora_r
        lora = LoraEnsemble(model, num_members=1, r=config.lora_r, alpha=alpha, seed=seed)
        view = lora.member(0)
    train, held_out = data.train, data.held_out

    def evaluate() -> dict[str, float]:
        mine = ranks.share(held_out, lambda e: len(e.ids)).mine
        parts = ranks.gather(nll.sum(mine, microbatch_tokens(config, device)))
        nats, num_tokens = map(sum, zip(*parts, strict=True))
        return {"loss": nats / num_tokens, "loss_per_sequence": nats / len(held_out)}

    name, kept = ("sft", "") if alone else (f"sft member {member}", f"member-{member}")
    inputs = inputs_of(config, model, data.tokenizer, train, held_out) if ranks.is_main else {}
    checkpoint = StageCheckpoint(checkpoint_folder(config) / kept, config, inputs, progress, ranks)
    with view:
        history, weights = fit(
            model,
            lora or model,
            config,
            training_rows(nll, train),
            evaluate if held_out else None,
            name=name,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
            ranks=ranks,
        )
    if folder:
        out = folder if alone else folder / f"member-{member}"
        if lora is None:
            save_model(model, data.tokenizer, out, config.save_dtype, weights)
        else:
            dtype = torch.float32 if config.save_dtype == "auto" else getattr(torch, config.save_dtype)
            lora.save(out, str(config.model), member=0, dtype=dtype)
    record = {
        "seed": seed,
        "packed": nll.packed,
        "num_parameters": sum(p.numel() for p in (lora or model).parameters()),
        "history": history,
    }
    return record | (_summary(history) if held_out else {})


def _summary(history: list[dict[str, float]]) -> dict[str, Any]:
    best = min(history, key=lambda h: h["loss"])
    return {
        "best_epoch": best["epoch"],
        "held_out_loss": best["loss"],
        "held_out_loss_per_sequence": best["loss_per_sequence"],
        "plateau_epoch": plateau_epoch([h["loss"] for h in history]),
    }


def _open_model(config: SftConfig, data: SftData, device: torch.device) -> Any:
    dtype = working_dtype(config.dtype, device)
    if config.model is None:
        max_positions = max(config.max_prompt_length + config.max_completion_length, 1024)
        fresh = scratch_config(config, data.tokenizer, max_positions)
        return fresh_model(transformers.AutoModelForCausalLM, fresh, dtype, device)
    what = f"sft.model = {config.model}"
    with named_load_errors(what):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    check_vocabulary(what, model, data.tokenizer)
    settle_generation_config_(model)
    if config.tokenizer:
        model.generation_config.eos_token_id = None  # of the model's own tokenizer
    longest = max(len(e.ids) for e in data.train + data.held_out)
    limit, kind = position_limit(model)
    if limit and longest > limit:
        raise ValueError(f"{what}: {limit} {kind} for rows of {longest} tokens; lower sft.max_prompt_length")
    return model.to(device)


class CompletionNll:
    """-log pi of the completion tokens of a batch, differentiable; no logits are kept.

    Args:
        model: a causal LM. Its attention is exchanged, for rows without padding, where that gives the same.
        tried: rows on which that is tried out; none: rows are padded.

    Attributes:
        packed: whether a batch is one row without padding.
    """

    def __init__(self, model: Any, tried: Sequence[Example] = ()):
        self._model, self._head = model, probe_head(model)
        self.packed = bool(tried) and self._pack(tried)

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """[num completion tokens] float32. nats, in the order of the examples."""
        return self._nats(examples, _packed if self.packed else _padded)

    def _nats(self, examples: Sequence[Example], lay: Callable[..., tuple[Tensor, dict[str, Any]]]) -> Tensor:
        model, head = self._model, self._head
        device = next(model.parameters()).device
        rows, inputs = lay(examples, device)
        targets = torch.tensor([i for e in examples for i in e.ids[len(e.ids) - e.num_completion :]])
        targets = targets.to(device, non_blocking=True)
        if not head.fused:
            logits = _logits(model, rows, inputs).float()
            return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        hidden = trunk_of(model)(**inputs).last_hidden_state.flatten(0, 1).index_select(0, rows)
        return -linear_token_logps(hidden, head_weight(model), targets, **head.options())

    @torch.no_grad()
    def sum(self, examples: Sequence[Example], batch_tokens: int) -> tuple[float, int]:
        """(sum over all completion tokens in nats, number of these tokens), in batches of so many padded tokens."""
        total, num_tokens = torch.zeros((), dtype=torch.float64), 0
        for rows in length_batches([len(e.ids) for e in examples], batch_tokens):
            nats = self([examples[i] for i in rows])
            total += nats.sum(dtype=torch.float64).cpu()
            num_tokens += len(nats)
        return total.item(), num_tokens

    def _pack(self, tried: Sequence[Example]) -> bool:
        model = self._model
        if has_attention_dropout(model):
            return False
        model.eval()
        with torch.no_grad():
            tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
            padded, packed = (partial(self._nats, tried, lay) for lay in (_padded, _packed))
            reason = exchange_attention_(model, padded, packed, tolerance=tolerance)
        if reason:
            log.warning("%s: rows are padded, not packed (%s)", type(model).__name__, reason)
        return not reason


def _logits(model: Any, rows: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[len(rows), V] by the model's own head, which sees these rows of the batch alone."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1).index_select(0, rows),))
    try:
        return model(**inputs).logits
    finally:
        hook.remove()


def training_rows(nll: CompletionNll, examples: Sequence[Example]) -> TrainingRows:
    """Examples with the loss of their completion tokens."""
    return TrainingRows(
        lengths=[len(e.ids) for e in examples],
        num_terms=[e.num_completion for e in examples],
        loss=lambda rows: nll([examples[i] for i in rows]).sum(),
    )


def _packed(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """(places of what predicts a completion token, arguments of the model)."""
    layout, positions = lay_out([(len(e.ids),) for e in examples], device)
    ids = torch.tensor([[i for e in examples for i in e.ids]])
    ends = accumulate(len(e.ids) for e in examples)
    rows = _places((end, e) for end, e in zip(ends, examples, strict=True))
    inputs = {"input_ids": ids.to(device, non_blocking=True), **packed_arguments(layout, positions[None])}
    return rows.to(device, non_blocking=True), inputs


def _padded(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """(places of what predicts a completion token, arguments of the model)."""
    longest = max(len(e.ids) for e in examples)
    # Causal attention never looks at the right padding, so no mask is needed.
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, e in enumerate(examples):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
    rows = _places((row * longest + len(e.ids), e) for row, e in enumerate(examples))
    inputs = {"input_ids": ids.to(device, non_blocking=True), "use_cache": False}
    return rows.to(device, non_blocking=True), inputs


def _places(ended: Iterable[tuple[int, Example]]) -> Tensor:
    """Of the tokens that predict a completion token, in a batch where each example ends at the place beside it."""
    return torch.tensor([place for end, e in ended for place in range(end - 1 - e.num_completion, end - 1)])
