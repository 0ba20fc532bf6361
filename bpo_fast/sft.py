"""Supervised fine-tuning: the policy that BPO starts from, from a model or from scratch."""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from bpo_fast.attention import NAME as PACKED
from bpo_fast.attention import exchange_attention_, has_attention_dropout, lay_out, packed_arguments
from bpo_fast.config import DataConfig
from bpo_fast.files import new_folder
from bpo_fast.loading import check_vocabulary, checkpoint_layers_, named_load_errors, pick_device, position_limit
from bpo_fast.lora import LoraEnsemble
from bpo_fast.progress import Progress
from bpo_fast.prompts import encode_prompts, read_rows, row_text
from bpo_fast.stage_config import SftConfig
from bpo_fast.stages import (
    check_new,
    fit,
    length_batches,
    open_tokenizer,
    plateau_epoch,
    save_model,
    scratch_config,
    split_by_prompt,
)
from bpo_fast.tasks import get_task
from bpo_fast.tokenizer import with_leading_space

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
    """
    progress = progress or Progress()
    started = time.monotonic()
    device = pick_device("sft.device", config.device)
    with new_folder(check_new("sft.out", config.out)) as folder, progress:
        data = _load_data(config)
        members = []
        for member in range(config.members):
            name = "sft" if config.members == 1 else f"sft member {member}"
            out = folder if config.members == 1 else folder / f"member-{member}"
            members.append(_train_member(config, data, config.seed + member, name, out, device, progress))
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
    rows = read_rows(config.data)
    held_out = read_rows(config.eval_data, "test") if config.eval_data else []

    def corpus() -> Iterator[str]:
        for prompt, completion, _ in _to_texts(rows, config, None, config.data):
            yield prompt
            yield completion

    tokenizer = open_tokenizer("sft", config, corpus)
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
        prompt, label, templated = row_text(row, index, columns, get_task(config.task), tokenizer, source)
        if label is None:
            raise ValueError(f"{source}: row {index + 1} has no completion (column {config.label_column or 'label'})")
        texts.append((prompt, label if templated else with_leading_space(prompt, label), templated))
    return texts


def encode_examples(
    texts: Sequence[tuple[str, str, bool]], tokenizer: Any, config: SftConfig
) -> tuple[list[Example], int, int]:
    """Encodes (prompt, completion, templated) texts; prompt and completion apart.

    EOS follows every completion that fits `max_completion_length` with it; a longer one is cut and stays without. A
    long prompt loses its beginning, but not its BOS.

    Returns:
        The examples, the number of cut prompts, the number of cut completions.
    """
    prompts = encode_prompts([p for p, _, _ in texts], [t for _, _, t in texts], tokenizer)
    completions = tokenizer([c for _, c, _ in texts], add_special_tokens=False)["input_ids"] if texts else []
    examples, num_cut_prompts, num_cut_completions = [], 0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        if len(prompt) > config.max_prompt_length:
            num_cut_prompts += 1
            num_bos = int(prompt[0] == tokenizer.bos_token_id)
            prompt = prompt[:num_bos] + prompt[len(prompt) - config.max_prompt_length + num_bos :]
        target = [*completion, tokenizer.eos_token_id]
        num_cut_completions += len(target) > config.max_completion_length
        target = target[: config.max_completion_length]
        examples.append(Example((*prompt, *target), len(target)))
    return examples, num_cut_prompts, num_cut_completions


def _train_member(
    config: SftConfig, data: SftData, seed: int, name: str, out: Path, device: torch.device, progress: Progress
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = _open_model(config, data).to(device)
    packed = pack_rows(model, data.train[:2])
    if config.gradient_checkpointing:
        checkpoint_layers_(model)
    lora, view = None, nullcontext()
    if config.lora_r:
        alpha = config.lora_alpha or 2.0 * config.lora_r
        lora = LoraEnsemble(model, num_members=1, r=config.lora_r, alpha=alpha, seed=seed)
        view = lora.member(0)
    with view:
        history = _fit(model, lora or model, config, data, name, seed, progress)
    if lora is None:
        save_model(model, data.tokenizer, out, config.save_dtype)
    else:
        lora.save(out, str(config.model), member=0)
    record = {
        "seed": seed,
        "packed": packed,
        "num_parameters": sum(p.numel() for p in (lora or model).parameters()),
        "history": history,
    }
    return record | (_summary(history) if data.held_out else {})


def _fit(
    model: Any, trained: Any, config: SftConfig, data: SftData, name: str, seed: int, progress: Progress
) -> list[dict[str, float]]:
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda")

    def loss_of(rows: list[int]) -> tuple[torch.Tensor, int]:
        with autocast:
            nats = completion_nll(model, [data.train[i] for i in rows])
        return nats.mean(), len(nats)

    def evaluate() -> dict[str, float]:
        nats, num_tokens = held_out_nll(model, data.held_out, config.batch_tokens)
        return {"loss": nats / num_tokens, "loss_per_sequence": nats / len(data.held_out)}

    lengths = [len(e.ids) for e in data.train]
    evaluate_or_none = evaluate if data.held_out else None
    return fit(model, trained, config, lengths, loss_of, evaluate_or_none, name=name, seed=seed, progress=progress)


def _summary(history: list[dict[str, float]]) -> dict[str, Any]:
    best = min(history, key=lambda h: h["loss"])
    return {
        "best_epoch": best["epoch"],
        "held_out_loss": best["loss"],
        "held_out_loss_per_sequence": best["loss_per_sequence"],
        "plateau_epoch": plateau_epoch([h["loss"] for h in history]),
    }


def _open_model(config: SftConfig, data: SftData) -> Any:
    if config.model is None:
        max_positions = max(config.max_prompt_length + config.max_completion_length, 1024)
        return transformers.AutoModelForCausalLM.from_config(scratch_config(config, data.tokenizer, max_positions))
    what = f"sft.model = {config.model}"
    with named_load_errors(what):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    check_vocabulary(what, model, data.tokenizer)
    longest = max(len(e.ids) for e in data.train + data.held_out)
    limit, kind = position_limit(model)
    if limit and longest > limit:
        raise ValueError(f"{what}: {limit} {kind} for rows of {longest} tokens; lower sft.max_prompt_length")
    return model


def completion_nll(model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """-log pi of every completion token of a batch: one padding-free row after `pack_rows`, else right-padded rows.

    Only the rows that predict completion tokens reach the head.

    Returns:
        [num completion tokens] float32. nats, in the order of the examples.
    """
    device = next(model.parameters()).device
    is_packed = model.config._attn_implementation == PACKED
    predicts, inputs = (_packed if is_packed else _padded)(examples, device)
    targets = torch.tensor([i for e in examples for i in e.ids[len(e.ids) - e.num_completion :]])
    predicts = predicts.to(device)
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][predicts],))
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    return torch.nn.functional.cross_entropy(logits.float(), targets.to(device), reduction="none")


def pack_rows(model: Any, examples: Sequence[Example]) -> bool:
    """Switches a model to packed rows if it then gives the same log-probs of `examples`; True if it does."""
    if has_attention_dropout(model):
        return False
    model.eval()
    with torch.no_grad():
        nll = functools.partial(completion_nll, model, examples)
        reason = exchange_attention_(model, nll, nll, tolerance=1e-3)
    if reason:
        log.warning("%s: rows are padded, not packed (%s)", type(model).__name__, reason)
    return not reason


def _packed(examples: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
    """(mask [1, S] of what predicts a completion token, arguments of the model)."""
    layout, positions = lay_out([(len(e.ids),) for e in examples], device)
    ids = torch.tensor([[i for e in examples for i in e.ids]])
    first = [len(e.ids) - e.num_completion - 1 for e in examples]
    predicts = [f <= t < len(e.ids) - 1 for f, e in zip(first, examples, strict=True) for t in range(len(e.ids))]
    return torch.tensor([predicts]), {"input_ids": ids.to(device), **packed_arguments(layout, positions[None])}


def _padded(examples: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
    """(mask [examples, longest] of what predicts a completion token, arguments of the model)."""
    longest = max(len(e.ids) for e in examples)
    # Causal attention never looks at the right padding, so no mask is needed.
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    predicts = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, e in enumerate(examples):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
        predicts[row, len(e.ids) - e.num_completion - 1 : len(e.ids) - 1] = True
    return predicts, {"input_ids": ids.to(device), "use_cache": False}


@torch.no_grad()
def held_out_nll(model: Any, examples: Sequence[Example], batch_tokens: int) -> tuple[float, int]:
    """(sum of -log pi over all completion tokens in nats, number of these tokens)."""
    total, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for rows in length_batches([len(e.ids) for e in examples], batch_tokens):
        nats = completion_nll(model, [examples[i] for i in rows])
        total += nats.sum(dtype=torch.float64).cpu()
        num_tokens += len(nats)
    return total.item(), num_tokens
