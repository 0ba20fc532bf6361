"""Completions and scores become pairs; pairs are kept on disk.

Ties and identical completions teach nothing about order: they are dropped, counted and kept on record. A phase is one
file, `pairs/phase-NN.jsonl`: a header line, then a pair a line with everything needed to replay it, then what was
dropped, a line each that says why in "dropped".
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bpo_fast.config import DataConfig
from bpo_fast.files import write_atomic
from bpo_fast.prompts import cut_prompt, split_answer
from bpo_fast.tokenizer import end_of_turn, with_leading_space
from bpo_fast.types import Completion, Dropped, Pair, Prompt, Turn

FORMAT = "bpo-fast/pairs/1"
RowReader = Callable[[str], tuple[list[Any], Sequence[Prompt]]]


@dataclass(frozen=True)
class PairCounts:
    """What became of the prompts of a phase: kept + tied + identical + unscored + aborted + empty of them were sampled.

    `aborted`: the engine gave up a completion, twice. `empty`: a completion began with a stop string. `truncated`
    counts kept pairs in which a completion ended at the length limit. Recorded pairs, in the counts of the first phase:
    `too_long` were over a limit and dropped, `cut` were over one, cut and kept.
    """

    kept: int = 0
    tied: int = 0
    identical: int = 0
    unscored: int = 0
    truncated: int = 0
    aborted: int = 0
    empty: int = 0
    too_long: int = 0
    cut: int = 0

    @classmethod
    def of(cls, pairs: Sequence[Pair], reasons: Iterable[str] = ()) -> "PairCounts":
        """Counts of the kept pairs, and of the reasons for which others were dropped."""
        truncated = sum(p.chosen.truncated or p.rejected.truncated for p in pairs)
        return cls(kept=len(pairs), truncated=truncated, **Counter(reasons))

    def __add__(self, other: "PairCounts") -> "PairCounts":
        return PairCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class PhasePairs:
    """The pairs of one phase.

    Attributes:
        phase: 0, 1, ...
        policy_version: optimizer steps of the behavior that sampled them.
        pairs: in the order of the prompts.
        counts: see `PairCounts`.
        metrics: what was measured while collecting them.
        num_spare: spare prompts used to refill dropped pairs.
        scored: True once the reference has seen them.
        dropped: what was sampled and scored beside them; empty in files of before it was kept.
    """

    phase: int
    policy_version: int
    pairs: tuple[Pair, ...]
    counts: PairCounts
    metrics: dict[str, float]
    num_spare: int = 0
    scored: bool = False
    dropped: tuple[Dropped, ...] = ()


def make_pairs(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], scores: Sequence[Sequence[float | None]]
) -> tuple[list[Pair], list[Dropped]]:
    """Orders the two completions of every prompt by score.

    Args:
        prompts: P prompts.
        completions: two of each prompt.
        scores: the annotator's score of each.

    Returns:
        (kept pairs, what was dropped), each in the order of the prompts
    """
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    for prompt, (first, second), (a, b) in zip(prompts, completions, scores, strict=True):
        if first.aborted or second.aborted:
            reason = "aborted"
        elif not first.ids or not second.ids:
            reason = "empty"
        elif first.ids == second.ids:
            reason = "identical"
        elif a is None or b is None:
            reason = "unscored"
        elif a == b:
            reason = "tied"
        else:
            sides = (first, second, a, b) if a > b else (second, first, b, a)
            pairs.append(Pair(prompt, *sides))
            continue
        dropped.append(Dropped(prompt, (first, second), (a, b), reason))
    return pairs, dropped


def write_pairs(path: Path, phase: PhasePairs) -> None:
    """Writes a phase's pairs and what it dropped, all or nothing."""
    header = {
        "format": FORMAT,
        "phase": phase.phase,
        "policy_version": phase.policy_version,
        "counts": vars(phase.counts),
        "metrics": phase.metrics,
        "num_spare": phase.num_spare,
        "scored": phase.scored,
    }
    rows = [*map(_to_row, phase.pairs), *map(_to_dropped_row, phase.dropped)]
    # columns of a Parquet file can hold dates and the like, which only annotators look at
    lines = [json.dumps(header), *(json.dumps(row, ensure_ascii=False, default=str) for row in rows)]
    write_atomic(path, "\n".join(lines) + "\n")


def read_pairs(path: Path) -> PhasePairs:
    """Reads what `write_pairs` wrote; ValueError if it is not that."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        header = json.loads(lines[0])
        if header.get("format") != FORMAT:
            raise ValueError
        rows = [json.loads(line) for line in lines[1:]]
        return PhasePairs(
            phase=header["phase"],
            policy_version=header["policy_version"],
            pairs=tuple(_from_row(row) for row in rows if "dropped" not in row),
            counts=PairCounts(**header["counts"]),
            metrics=header["metrics"],
            num_spare=header["num_spare"],
            scored=header["scored"],
            dropped=tuple(_from_dropped_row(row) for row in rows if "dropped" in row),
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path}: not a file of recorded pairs") from None


def replay_pairs(
    source: str,
    tokenizer: Any,
    eos_ids: tuple[int, ...],
    *,
    data: DataConfig,
    max_new_tokens: int,
    to_prompts: RowReader,
) -> tuple[list[Pair], PairCounts]:
    """Reads pairs to train on without sampling: a run folder, its pairs, or preference rows.

    Args:
        source: a run folder, a `pairs` folder, one recorded file, or rows of {"prompt", "chosen", "rejected"}.
        tokenizer: of the policy, for rows of text.
        eos_ids: ids that end a completion. Of them a text is closed by the one that ends a turn in the chat template,
            if that made its prompt, else by the tokenizer's EOS, else by the first.
        data: the limit of prompts, and what becomes of prompts and completions that are longer.
        max_new_tokens: the limit of completions.
        to_prompts: reads rows of text and makes their prompts, of any length, `Prompt.id` being the row.

    Returns:
        (pairs within the limits, what became of all)

    Raises:
        ValueError: no pairs there.
    """
    path = Path(source)
    folder = path / "pairs" if (path / "pairs").is_dir() else path
    files = sorted(folder.glob("phase-*.jsonl"), key=lambda p: (len(p.name), p.name)) if folder.is_dir() else [path]
    if (files and files[0].is_file() and _is_recorded(files[0])) or folder != path:
        found = [replace(p, ref_logps=None) for f in files for p in read_pairs(f).pairs]
    else:
        found = _pairs_of_text(source, tokenizer, eos_ids, to_prompts)
    fates = [_within_limits(pair, data, max_new_tokens, tokenizer.bos_token_id) for pair in found]
    pairs = [pair for pair in fates if isinstance(pair, Pair)]
    dropped = Counter(fate for fate in fates if isinstance(fate, str))
    if not pairs:
        reasons = ", ".join(f"{num} {reason.replace('_', ' ')}" for reason, num in dropped.items())
        raise ValueError(f"--from-pairs {source}: no pairs{f' ({reasons})' if reasons else ''}")
    num_cut = sum(pair is not before for pair, before in zip(fates, found, strict=True)) - dropped.total()
    return pairs, replace(PairCounts.of(pairs, dropped.elements()), cut=num_cut)


def _within_limits(pair: Pair, data: DataConfig, max_new_tokens: int, bos_id: int | None) -> Pair | str:
    """The pair, cut where `data` says so, or what it is counted as."""
    assert data.max_prompt_length, "resolve() has set it"
    ids, sides = pair.prompt.ids, (pair.chosen, pair.rejected)
    if not all((ids, *(side.ids for side in sides))):
        return "empty"
    if len(ids) > data.max_prompt_length:
        if data.long_prompts == "drop":
            return "too_long"
        pair = replace(pair, prompt=replace(pair.prompt, ids=cut_prompt(ids, data.max_prompt_length, bos_id)))
    if max(len(side.ids) for side in sides) > max_new_tokens:
        if data.long_completions == "drop":
            return "too_long"
        chosen, rejected = (_cut(side, max_new_tokens) for side in sides)
        pair = replace(pair, chosen=chosen, rejected=rejected)
    return "identical" if pair.chosen.ids == pair.rejected.ids else pair


def _cut(side: Completion, limit: int) -> Completion:
    if len(side.ids) <= limit:
        return side
    logps = None if side.logps is None else side.logps[:limit]
    return replace(side, ids=side.ids[:limit], logps=logps, truncated=True, stopped=False)


def _is_recorded(path: Path) -> bool:
    if path.suffix != ".jsonl":
        return False
    with path.open(encoding="utf-8", errors="replace") as lines:
        return FORMAT in lines.readline()


def _pairs_of_text(source: str, tokenizer: Any, eos_ids: tuple[int, ...], to_prompts: RowReader) -> list[Pair]:
    rows, prompts = to_prompts(source)
    plain_end = tokenizer.eos_token_id if tokenizer.eos_token_id in eos_ids else eos_ids[0]
    turn_end = end if (end := end_of_turn(tokenizer)) in eos_ids else plain_end
    pairs = []
    for prompt in prompts:
        templated = prompt.plain is not None
        texts = [t for t in (_answer(rows[prompt.id].get(side)) for side in ("chosen", "rejected")) if t]
        if len(texts) < 2:
            raise ValueError(f"--from-pairs {source}: row {prompt.id + 1} has no chosen and rejected text")
        sides = []
        for i, text in enumerate(texts):
            text = text if templated else with_leading_space(prompt.text, text)
            ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], turn_end if templated else plain_end)
            sides.append(Completion(prompt.id, i, ids, text, truncated=False, policy_version=-1, seed=0))
        pairs.append(Pair(prompt, *sides, chosen_score=1.0, rejected_score=0.0))
    return pairs


def _answer(value: Any) -> str | None:
    """The last answer of a text, an HH-RLHF string or a list of messages."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str):
        return None
    return (split_answer(value)[1] if "\n\nAssistant:" in value else value.strip()) or None


def _to_row(pair: Pair) -> dict[str, Any]:
    row = {"prompt": _to_prompt_row(pair.prompt), "chosen": vars(pair.chosen), "rejected": vars(pair.rejected)}
    return row | {k: getattr(pair, k) for k in ("chosen_score", "rejected_score", "ref_logps")}


def _to_dropped_row(dropped: Dropped) -> dict[str, Any]:
    row = {"dropped": dropped.reason, "prompt": _to_prompt_row(dropped.prompt)}
    return row | {"completions": [vars(c) for c in dropped.completions], "scores": dropped.scores}


def _to_prompt_row(prompt: Prompt) -> dict[str, Any]:
    return vars(prompt) | {"columns": dict(prompt.columns)}


def _from_row(row: dict[str, Any]) -> Pair:
    ref_logps = None if row["ref_logps"] is None else tuple(row["ref_logps"])
    sides = Completion.from_row(row["chosen"]), Completion.from_row(row["rejected"])
    return Pair(_from_prompt_row(row["prompt"]), *sides, row["chosen_score"], row["rejected_score"], ref_logps)


def _from_dropped_row(row: dict[str, Any]) -> Dropped:
    (first, second), (a, b) = row["completions"], row["scores"]
    prompt = _from_prompt_row(row["prompt"])
    return Dropped(prompt, (Completion.from_row(first), Completion.from_row(second)), (a, b), row["dropped"])


def _from_prompt_row(row: dict[str, Any]) -> Prompt:
    turns = tuple(Turn(*turn) for turn in row.get("turns", ()))
    return Prompt(**{**row, "ids": tuple(row["ids"]), "turns": turns})
