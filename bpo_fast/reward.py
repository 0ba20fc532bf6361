"""Bradley-Terry reward models: trained on preference pairs, or on reference text against model samples."""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from bpo_fast.annotate.pair_scores import PairScores
from bpo_fast.annotate.reward_model import Answered, RewardScorer
from bpo_fast.batches import microbatch_tokens
from bpo_fast.config import DataConfig
from bpo_fast.loading import check_vocabulary, checkpoint_layers_, named_load_errors, pick_device, working_dtype
from bpo_fast.progress import Progress
from bpo_fast.prompts import missing, read_rows, row_label, row_text
from bpo_fast.ranks import Ranks
from bpo_fast.stage_checkpoint import StageCheckpoint, checkpoint_folder, inputs_of
from bpo_fast.stage_config import RewardConfig
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
from bpo_fast.tokenizer import with_leading_space
from bpo_fast.types import Turn

REWARD_FILE = "reward.json"
NUM_BINS = 10
Z95 = 1.959964


def train_reward(config: RewardConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Trains a reward model r by -log sigmoid(r(x, chosen) - r(x, rejected)) and measures it on held-out prompts.

    Args:
        config: settings, already checked.
        progress: where to show progress; a fresh one if None.

    Returns:
        What OUT/reward.json holds: held-out accuracy with its 95% interval, log-loss, calibration, accuracy by length
        difference, accuracy on swapped answers. OUT is a sequence-classification folder with one label.

    Raises:
        ValueError: bad data or model, by name, or a loss that is not finite.
        RuntimeError: out of memory with the longest pair.
    """
    with progress or Progress() as shown, stage_ranks(config) as ranks:
        return train_rank(config, ranks, shown)


def train_rank(config: RewardConfig, ranks: Ranks, progress: Progress) -> dict[str, Any]:
    """What every process of `train_reward` does; rank 0 measures the result and writes it down."""
    started = time.monotonic()
    device = pick_device("reward.device", config.device)
    with stage_folder(config, ranks, progress) as folder:
        train, held_out = _load_pairs(config, progress)
        if not train:
            raise ValueError(f"reward.data = {config.data}: no training rows left after reward.eval_fraction")
        torch.manual_seed(config.seed)
        model = _open_model(config, train, device)
        ranks.connect(device)
        train = train + swap_answers(train, round(config.swapped * len(train)), config.seed)
        history, weights = _fit(model, config, train, held_out, progress, ranks)
        result: dict[str, Any] = {
            "config": dataclasses.asdict(config),
            "num_train": len(train),
            "num_held_out": len(held_out),
            "num_parameters": sum(p.numel() for p in model.model.parameters()),
            "history": history,
        }
        if folder is None:
            return result
        if held_out:
            model.model.eval()
            result["plateau_epoch"] = plateau_epoch([h["loss"] for h in history])
            result["held_out"] = measure(model, held_out, config.seed)
        save_model(model.model, model.tokenizer, folder, config.save_dtype, weights)
        result["seconds"] = time.monotonic() - started
        (folder / REWARD_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


@dataclass(frozen=True)
class TextPair:
    """A prompt and two completions as text, each with its leading space; `turns` are those of a conversation."""

    prompt: str
    chosen: str
    rejected: str
    turns: tuple[Turn, ...] = ()


def chosen_of(pairs: Iterable[TextPair]) -> list[Answered]:
    """Prompts with their chosen completions."""
    return [Answered(p.prompt, p.chosen, p.turns) for p in pairs]


def rejected_of(pairs: Iterable[TextPair]) -> list[Answered]:
    """Prompts with their rejected completions."""
    return [Answered(p.prompt, p.rejected, p.turns) for p in pairs]


def measure(model: RewardScorer, pairs: Sequence[TextPair], seed: int) -> dict[str, Any]:
    """How a reward model does on preference pairs it has not seen.

    Args:
        model: the reward model.
        pairs: held-out pairs, at least one.
        seed: which other prompt's answer each answer is swapped against.

    Returns:
        accuracy (strict: a tie is wrong) with `interval_95` (Wilson), log_loss in nats, calibration of
        sigmoid(score difference), accuracy by sign of the length difference in characters, swapped accuracy.
    """
    scores = torch.tensor(model.score_texts(chosen_of(pairs) + rejected_of(pairs)), dtype=torch.float64)
    if not scores.isfinite().all():
        raise ValueError(f"{model.name}: {int((~scores.isfinite()).sum())} held-out scores are not finite")
    chosen, rejected = scores.chunk(2)
    margins = chosen - rejected
    result = proportion(margins > 0) | {
        "log_loss": torch.nn.functional.softplus(-margins).mean().item(),
        "margin_mean": margins.mean().item(),
        "score_mean": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
        "calibration": calibration(margins),
        "by_length": _by_length(pairs, margins),
    }
    swapped = swap_answers(pairs, len(pairs), seed)
    if swapped:
        other = torch.tensor(model.score_texts(rejected_of(swapped)), dtype=torch.float64)
        own = torch.tensor(model.score_texts(chosen_of(swapped)), dtype=torch.float64)
        result["swapped"] = proportion(own > other)
    return result


def proportion(hits: torch.Tensor) -> dict[str, Any]:
    """Share of hits with its 95% Wilson score interval, and their number. hits [n] bool, n >= 1."""
    n, share = len(hits), hits.double().mean().item()
    center = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    ends = [round(end, 12) + 0.0 for end in (center - half, center + half)]  # of no hits 0, not 1e-17 or -0
    return {"accuracy": share, "interval_95": ends, "num": n}


def calibration(margins: torch.Tensor) -> dict[str, Any]:
    """Reliability of sigmoid(|score difference|) as the probability that the higher score is right.

    Args:
        margins: [P] float64. chosen minus rejected score.

    Returns:
        `ece`, the mean of |accuracy - confidence| over ten equal bins of [0.5, 1] weighted by their pairs, and `bins`.

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    confidence, right = torch.sigmoid(margins.abs()), (margins > 0).double()
    bin_of = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    bins, ece = [], 0.0
    for b in range(NUM_BINS):
        inside = bin_of == b
        num = int(inside.sum())
        if num == 0:
            continue
        mean_confidence, accuracy = confidence[inside].mean().item(), right[inside].mean().item()
        bins.append({"from": 0.5 + b / (2 * NUM_BINS), "num": num, "confidence": mean_confidence, "accuracy": accuracy})
        ece += num / len(margins) * abs(accuracy - mean_confidence)
    return {"ece": ece, "bins": bins}


def swap_answers(pairs: Sequence[TextPair], num: int, seed: int) -> list[TextPair]:
    """`num` pairs of a chosen answer against a different one, chosen for another prompt; none if there is no such."""
    if len({p.prompt for p in pairs}) < 2 or len({p.chosen for p in pairs}) < 2:
        return []
    generator = torch.Generator().manual_seed(seed)
    swapped: list[TextPair] = []
    while len(swapped) < num:
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for i, j in zip(order, order[1:] + order[:1], strict=True):
            own, other = pairs[i], pairs[j]
            if len(swapped) < num and own.prompt != other.prompt and own.chosen != other.chosen:
                swapped.append(replace(own, rejected=other.chosen))
    return swapped


def _by_length(pairs: Sequence[TextPair], margins: torch.Tensor) -> dict[str, Any]:
    difference = torch.tensor([len(p.chosen) - len(p.rejected) for p in pairs])
    groups = {"chosen_longer": difference > 0, "chosen_shorter": difference < 0, "same_length": difference == 0}
    return {name: proportion(margins[group] > 0) for name, group in groups.items() if bool(group.any())}


def training_rows(model: RewardScorer, pairs: Sequence[TextPair]) -> TrainingRows:
    """Pairs with their loss -log sigmoid(r(x, chosen) - r(x, rejected)); a prompt is encoded once for both."""
    encoded = list(zip(model.encode(chosen_of(pairs)), model.encode(rejected_of(pairs)), strict=True))
    score_pairs = PairScores(model, encoded)

    def loss(rows: list[int]) -> torch.Tensor:
        better, worse = score_pairs([encoded[i] for i in rows]).float()
        return torch.nn.functional.softplus(worse - better).sum()

    return TrainingRows([score_pairs.num_tokens(pair) for pair in encoded], [1] * len(pairs), loss)


def _fit(
    model: RewardScorer,
    config: RewardConfig,
    train: list[TextPair],
    held_out: list[TextPair],
    progress: Progress,
    ranks: Ranks,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    rows = training_rows(model, train)
    if config.gradient_checkpointing:
        checkpoint_layers_(model.model)

    def evaluate() -> dict[str, float]:
        texts = chosen_of(held_out) + rejected_of(held_out)
        share = ranks.share(texts, lambda text: len(text.prompt) + len(text.completion))
        better, worse = torch.tensor(share.gather(model.score_texts(share.mine))).chunk(2)
        loss = torch.nn.functional.softplus(worse - better).mean().item()
        return {"loss": loss, "accuracy": (better > worse).double().mean().item()}

    measured = evaluate if held_out else None
    inputs = inputs_of(config, model.model, model.tokenizer, train, held_out) if ranks.is_main else {}
    return fit(
        model.model,
        model.model,
        config,
        rows,
        measured,
        name="reward",
        seed=config.seed,
        checkpoint=StageCheckpoint(checkpoint_folder(config), config, inputs, progress, ranks),
        progress=progress,
        ranks=ranks,
    )


def _open_model(config: RewardConfig, train: list[TextPair], device: torch.device) -> RewardScorer:
    def corpus() -> Iterator[str]:
        for pair in train:
            yield from (pair.prompt, pair.chosen, pair.rejected)

    tokenizer = open_tokenizer(config, corpus)
    close_pairs_with_eos(tokenizer)
    limit = config.max_prompt_length + config.max_completion_length + tokenizer.num_special_tokens_to_add(pair=True)
    dtype, batch_tokens = working_dtype(config.dtype, device), microbatch_tokens(config, device)
    if config.model is None:
        fresh = scratch_config(config, tokenizer, limit, num_labels=1)
        model = fresh_model(transformers.AutoModelForSequenceClassification, fresh, dtype, device)
        return RewardScorer(model, tokenizer, name="reward", batch_tokens=batch_tokens)
    what = f"reward.model = {config.model}"
    with named_load_errors(what):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            config.model, num_labels=1, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    check_vocabulary(what, model, tokenizer)
    return RewardScorer(model.to(device), tokenizer, name=what, batch_tokens=batch_tokens, max_length=limit)


def close_pairs_with_eos(tokenizer: Any) -> None:
    """Makes a decoder's tokenizer join pairs as `prompt completion EOS`, so that the head reads the EOS position."""
    if tokenizer.chat_template is not None or tokenizer.sep_token_id is not None or not tokenizer.is_fast:
        return
    from tokenizers.processors import TemplateProcessing

    eos, bos = tokenizer.eos_token, tokenizer.bos_token
    start = f"{bos} " if bos is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in {eos, bos} if t is not None]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start}$A", pair=f"{start}$A $B {eos}", special_tokens=special
    )


def _load_pairs(config: RewardConfig, progress: Progress) -> tuple[list[TextPair], list[TextPair]]:
    rows = read_rows(config.data, config.split)
    if config.samples is None:
        pairs = _preference_pairs(rows, config, config.data)
    else:
        pairs = _sample_pairs(rows, config, progress)
    if config.eval_data:
        held_out = read_rows(config.eval_data, config.eval_split)
        return pairs, _preference_pairs(held_out, config, config.eval_data)
    train, held_out = split_by_prompt([p.prompt for p in pairs], config.eval_fraction, config.seed)
    return [pairs[i] for i in train], [pairs[i] for i in held_out]


def _preference_pairs(rows: Sequence[dict], config: RewardConfig, source: str) -> list[TextPair]:
    pairs = []
    for index, row in enumerate(rows):
        chosen = _answered(row, index, config, config.chosen_column, source)
        rejected = row_label(row, DataConfig(label_column=config.rejected_column), None)
        if rejected is None:
            raise missing(row, index, config.rejected_column, "rejected_column", source)
        pairs.append(_pair(chosen, rejected))
    return pairs


def _pair(chosen: Answered, rejected: str) -> TextPair:
    return TextPair(chosen.prompt, chosen.completion, with_leading_space(chosen.prompt, rejected), chosen.turns)


def _answered(row: dict, index: int, config: RewardConfig, column: str | None, source: str) -> Answered:
    columns = DataConfig(prompt_column=config.prompt_column, label_column=column)
    found = row_text(row, index, columns, get_task(config.task), None, source)
    if found.label is None:
        raise missing(row, index, column or "label", "chosen_column", source)
    return Answered(found.text, with_leading_space(found.text, found.label), found.turns)


def _sample_pairs(rows: Sequence[dict], config: RewardConfig, progress: Progress) -> list[TextPair]:
    """One pair a sample: the reference text of its prompt against the sample. Samples of other prompts are left out."""
    assert config.samples is not None
    column = None if config.chosen_column == "chosen" else config.chosen_column
    answered = (_answered(row, i, config, column, config.data) for i, row in enumerate(rows))
    references = {reference.prompt: reference for reference in answered}
    pairs, samples = [], read_rows(config.samples)
    for index, row in enumerate(samples):
        columns = DataConfig(prompt_column=config.prompt_column)
        prompt = row_text(row, index, columns, get_task(config.task), None, config.samples).text
        sample = row.get("completion")  # may be empty: EOS can be the first token
        if not isinstance(sample, str):
            raise ValueError(f"{config.samples}: row {index + 1} has no completion")
        if prompt in references:
            pairs.append(_pair(references[prompt], sample))
    if not pairs:
        raise ValueError(f"{config.samples}: no sample has a prompt of {config.data}")
    if len(pairs) < len(samples):
        progress.print(f"samples: {len(pairs)} of {len(samples)} rows have a prompt of {config.data}")
    return pairs
