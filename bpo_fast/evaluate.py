"""Evaluation: greedy answers to held-out prompts, judged against the reference text.

Win rate is the share of prompts where the judge puts the output strictly above the reference text. The judges are not
the annotator of the training, and length, truncation and diversity stand beside every win rate, because a policy can
buy score with length or collapse.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from bpo_fast.annotate import Checked
from bpo_fast.engine import Engine, OnDone, SamplingParams
from bpo_fast.ranks import Share
from bpo_fast.types import Completion, Prompt

EvalRow = dict[str, Any]


def judge_greedy(
    engine: Engine,
    share: Share[Prompt],
    judges: Sequence[Checked],
    *,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    policy_version: int,
    when: str,
    task,
) -> list[EvalRow]:
    """Decodes greedily and scores outputs and reference texts.

    Args:
        engine: samples from the averaged policy.
        share: held-out prompts and who answers which; those without a label are judged by score alone.
        judges: scorers, each with a name.
        max_new_tokens: completion limit.
        stop: strings that end a completion.
        policy_version: optimizer steps taken.
        when: "before", "after" or "step".
        task: progress task; it advances by one a prompt of this rank's.

    Returns:
        One row a prompt, as RUN/eval.jsonl holds them; none where the engine gave the output up.
    """
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, stop=stop)
    sampled = engine.generate(
        share.mine, params, run_seed=0, policy_version=policy_version, on_done=lambda done: task.advance(len(done))
    )
    mine, outputs = whole(share.mine, sampled)
    judged = {j.name: against_labels(j, mine, outputs) for j in judges}
    rows = {
        prompt.id: {
            "when": when,
            "step": policy_version,
            "prompt_id": prompt.id,
            "prompt": prompt.text,
            "label": prompt.label,
            "output": output.text.strip(),
            "ids": list(output.ids),
            "num_tokens": len(output.ids),
            "truncated": output.truncated,
            "scores": {name: both[i][0] for name, both in judged.items()},
            "label_scores": {name: both[i][1] for name, both in judged.items()},
        }
        for i, (prompt, output) in enumerate(zip(mine, outputs, strict=True))
    }
    return [row for row in share.gather([rows.get(prompt.id) for prompt in share.mine]) if row]


def prompt_tokens(prompt: Prompt) -> int:
    """What prompts are dealt to ranks by."""
    return len(prompt.ids)


def sample_share(
    engine: Engine,
    share: Share[Prompt],
    params: SamplingParams,
    *,
    run_seed: int,
    policy_version: int,
    on_done: OnDone,
) -> list[list[Completion]]:
    """The completions of all prompts, as `Engine.generate` gives them; every rank samples its share."""
    mine = engine.generate(share.mine, params, run_seed=run_seed, policy_version=policy_version, on_done=on_done)
    rows = share.gather([[vars(completion) for completion in group] for group in mine])
    return [[Completion.from_row(row) for row in group] for group in rows]


def whole(prompts: Sequence[Prompt], sampled: Sequence[Sequence[Completion]]) -> tuple[list[Prompt], list[Completion]]:
    """The completions of one call, each with its prompt, without those that the engine gave up."""
    kept = [(p, c) for p, group in zip(prompts, sampled, strict=True) for c in group if not c.aborted]
    return [p for p, _ in kept], [c for _, c in kept]


def against_labels(
    judge: Checked, prompts: Sequence[Prompt], outputs: Sequence[Completion]
) -> list[tuple[float | None, float | None]]:
    """Scores of (output, reference text) under one judge; None without a reference, or without an opinion."""
    labelled = [i for i, prompt in enumerate(prompts) if prompt.label]
    owners = [prompts[i] for i in labelled]
    references = [reference_completion(p) for p in owners]
    if judge.is_pairwise:
        duels = dict(zip(labelled, judge.duel(owners, [outputs[i] for i in labelled], references), strict=True))
        return [duels.get(i, (None, None)) for i in range(len(prompts))]
    scores = judge.score(prompts, outputs)
    label_scores = dict(zip(labelled, judge.score(owners, references), strict=True))
    return [(score, label_scores.get(i)) for i, score in enumerate(scores)]


def summarise(rows: Sequence[EvalRow], judges: Sequence[str]) -> dict[str, Any]:
    """Win rate and mean score by judge, length, truncation and diversity of the rows of one evaluation."""
    won: dict[str, float] = {}
    score: dict[str, float] = {}
    for judge in judges:
        judged = [r["scores"][judge] for r in rows if r["scores"][judge] is not None]
        score |= {judge: sum(judged) / len(judged)} if judged else {}
        duels = [(r["scores"][judge], r["label_scores"].get(judge)) for r in rows]
        wins = [a > b for a, b in duels if a is not None and b is not None]
        won |= {judge: sum(wins) / len(wins)} if wins else {}
    return {"win_rate": won, "score": score, **shape([tuple(r["ids"]) for r in rows], [r["truncated"] for r in rows])}


def shape(outputs: Sequence[tuple[int, ...]], truncated: Sequence[bool]) -> dict[str, float]:
    """Length, truncation, distinct-2 (distinct over all bigrams of ids) and the share of unique outputs."""
    bigrams = [b for ids in outputs for b in pairwise(ids)]
    num = max(1, len(outputs))
    return {
        "mean_length": sum(map(len, outputs)) / num,
        "clipped_ratio": sum(truncated) / num,
        "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
        "unique": len(set(outputs)) / num,
    }


def as_metrics(when: str, summary: Mapping[str, Any]) -> dict[str, float | str]:
    """The summary of one evaluation under the names of metrics.jsonl."""
    out: dict[str, float | str] = {"eval/when": when}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            out |= {f"eval/{name}/{judge}": v for judge, v in value.items()}
        elif value is not None:
            out[f"eval/{name}"] = value
    return out


def reference_completion(prompt: Prompt) -> Completion:
    """The reference text in the form that annotators take; it has no ids."""
    assert prompt.label is not None, "only prompts with a label have one"
    lead = " " if prompt.plain is None else ""  # what is sampled after a chat template has none
    return Completion(prompt.id, -1, (), lead + prompt.label, False, -1, 0)
