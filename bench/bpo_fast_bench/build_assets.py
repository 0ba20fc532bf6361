"""Builds the embedded default of bpo-fast from nothing: `python -m bpo_fast_bench.build_assets --out DIR`.

Everything comes out of `bpo_fast.helpdesk` and the project's own stages. The policy is trained on answers of mixed
quality, twice on some and then once on twice as many. Annotator and judge each begin as a smaller model of its kind,
learn as critics whether advice fits a question, then become reward models on noisy preference pairs, which are seen
once each, the last ones half in question forms that the policy never sees; the two share no row, no (topic, form)
combination, no seed and no weight. A stage whose result is in DIR already is kept, so an interrupted build goes on.
What to ship lies in DIR/assets, what was measured in DIR/assets.json.
"""

import argparse
import json
import os
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers

from bpo_fast.annotate.reward_model import Answered, RewardModel
from bpo_fast.config import load
from bpo_fast.helpdesk import (
    critic_rows,
    preference_rows,
    prompt_rows,
    rubric_breakdown,
    rubric_score,
    sft_rows,
    swapped_rows,
)
from bpo_fast.helpdesk.answers import write_answer
from bpo_fast.helpdesk.rows import FLIPS, TEMPERATURE
from bpo_fast.helpdesk.topics import topics
from bpo_fast.reward import train_reward
from bpo_fast.sample import sample
from bpo_fast.sft import train_sft
from bpo_fast.stage_config import RewardConfig, SftConfig

SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SFT: dict[str, Any] = {
    "layers": 4,
    "vocab": 2048,
    "max_prompt_length": 64,
    "max_completion_length": 64,
    "batch_tokens": 1024,
    "learning_rate": 3e-3,
}
# the policy, and the smaller speakers that the reward models begin as
POLICY: dict[str, Any] = SFT | {"hidden": 192, "heads": 6, "kv_heads": 6, "epochs": 2, "save_dtype": "float16"}
MORE: dict[str, Any] = SFT | {"learning_rate": 1e-3, "epochs": 1, "save_dtype": "float16"}
SPEAKER: dict[str, Any] = SFT | {"hidden": 128, "heads": 4, "kv_heads": 4, "epochs": 1}
CRITIC: dict[str, Any] = {
    "max_prompt_length": 96,
    "max_completion_length": 16,
    "epochs": 1,
    "batch_tokens": 1024,
    "learning_rate": 2e-3,
}
REWARD: dict[str, Any] = {
    "max_prompt_length": 64,
    "max_completion_length": 64,
    "epochs": 1,
    "batch_tokens": 2048,
    "save_dtype": "float16",
}
# peak learning rates of the two stages of pairs
PAIRS_RATE, NEW_FORMS_RATE = 1.5e-3, 1e-3
ROWS = {"policy": 75_000, "speaker": 60_000, "critic": 80_000, "pairs": 200_000, "prompts": 5_000, "eval": 512}
ROWS |= {"more for the policy": 150_000}
ROWS |= {"pairs in new forms": 20_000}  # and as many in the others again
SEEDS = {"policy": 1, "annotator": 11, "judge": 21}
REWARD_MODELS = ("annotator", "judge")


@dataclass(frozen=True)
class Build:
    """Where a build keeps its rows and stages (`root`) and what it ships (`root`/assets)."""

    root: Path

    @property
    def assets(self) -> Path:
        return self.root / "assets"

    def rows(self, name: str, make: Any, *args: Any, **options: Any) -> str:
        """Path of DIR/NAME.jsonl, written by `make(*args, **options)` unless it is there."""
        path = self.root / f"{name}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path, make(*args, **options))
        return str(path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes JSONL in one go."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def build_policy(build: Build) -> None:
    """SFT from scratch on answers of mixed quality, then on more of them."""
    first, seed = "policy-first", SEEDS["policy"]
    build_sft(build, first, "sft", ROWS["policy"], seed, POLICY)
    more = MORE | {"model": str(build.root / first), "seed": seed}
    build_sft(build, "policy", "sft", ROWS["more for the policy"], seed + 1, more)


def build_reward(build: Build, role: str) -> None:
    """A speaker, a critic that starts from it, a reward model that starts from the critic and then sees new forms."""
    seed, speaker, critic, narrow = SEEDS[role], f"{role}-speaker", f"{role}-critic", f"{role}-narrow"
    build_sft(build, speaker, role, ROWS["speaker"], seed, SPEAKER)
    if not (build.root / critic).exists():
        data = build.rows(f"{critic}-rows", critic_rows, ROWS["critic"], seed, role)
        held_out = build.rows(f"{critic}-eval", critic_rows, 1500, 31, "eval", flips=0)
        files = {"data": data, "eval_data": held_out, "out": str(build.root / critic)}
        train_sft(SftConfig(**files, model=str(build.root / speaker), device="cpu", seed=seed, **CRITIC))
    pairs = build.rows(f"{role}-pairs", preference_rows, ROWS["pairs"], seed + 1, role)
    fit_pairs(build, narrow, pairs, critic, seed, PAIRS_RATE)
    pairs = build.rows(f"{role}-pairs-new-forms", rows_with_new_forms, ROWS["pairs in new forms"], seed + 2, role)
    fit_pairs(build, role, pairs, narrow, seed, NEW_FORMS_RATE)


def rows_with_new_forms(num: int, seed: int, role: str) -> list[dict[str, str]]:
    """`num` pairs in the forms that the policy never sees, and as many in the others."""
    return preference_rows(num, seed, role) + preference_rows(num, seed, f"{role}-new")


def fit_pairs(build: Build, name: str, pairs: str, start: str, seed: int, rate: float) -> None:
    """A reward model that starts from the model called `start`."""
    if not (build.root / name).exists():
        held_out = build.rows(f"{name}-eval", preference_rows, 1500, 13, "eval", flips=0)
        files = {"data": pairs, "eval_data": held_out, "out": str(build.root / name), "model": str(build.root / start)}
        train_reward(RewardConfig(**files, device="cpu", seed=seed, learning_rate=rate, **REWARD))


def build_sft(build: Build, name: str, role: str, num_rows: int, seed: int, settings: dict[str, Any]) -> None:
    """A model trained on answers to the questions of `role`; `seed` draws the rows and, by default, the model."""
    torch.set_num_threads(1)  # so that equal seeds give equal weights on every machine of this kind
    out = build.root / name
    if not out.exists():
        data = build.rows(f"{name}-sft", sft_rows, num_rows, seed, role)
        held_out = build.rows(f"{name}-sft-eval", sft_rows, 1000, 2, "eval")
        files = {"data": data, "eval_data": held_out, "out": str(out)}
        train_sft(SftConfig(**files, device="cpu", **{"seed": seed, **settings}))


def ship(build: Build) -> None:
    """Copies weights, tokenizers and questions to DIR/assets, without records that name paths of this machine."""
    shutil.rmtree(build.assets, ignore_errors=True)
    for folder in ("policy", *REWARD_MODELS):
        (build.assets / folder).mkdir(parents=True)
        for name in SHIPPED:
            if (build.root / folder / name).exists():
                shutil.copyfile(build.root / folder / name, build.assets / folder / name)
    write_rows(build.assets / "prompts.jsonl", prompt_rows(ROWS["prompts"], 101))
    write_rows(build.assets / "eval.jsonl", prompt_rows(ROWS["eval"], 102, "eval"))


def measure(build: Build) -> dict[str, Any]:
    """What DIR/assets.json holds: entropy, cross-entropy, win rates against the labels, accuracies, sizes."""
    held_out = [json.loads(line) for line in (build.assets / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    greedy = _sample(build, "greedy", n=1, temperature=0.0)
    sampled = _sample(build, "sampled", n=2, temperature=1.0)
    pairs = {
        "generated": preference_rows(1000, 14, "eval", flips=0),
        "generated_training_prompts": preference_rows(1000, 14, "prompts", flips=0),
        "sampled": _in_order(sampled),
        "near_swaps": swapped_rows(1000, 15, "eval"),
        "near_swaps_training_prompts": swapped_rows(1000, 15, "prompts"),
    }
    reports = {role: json.loads((build.root / role / "reward.json").read_text()) for role in REWARD_MODELS}
    models = {role: RewardModel(str(build.assets / role), device="cpu") for role in REWARD_MODELS}
    return {
        "policy": _measure_policy(build),
        "labels": {"score": fmean(rubric_score(r["prompt"], r["label"]) for r in held_out)},
        "greedy": _against_labels(greedy, models["judge"]),
        "sampled": _against_labels(sampled, models["judge"]) | _pair_numbers(sampled),
        "accuracy": {role: {kind: _accuracy(m, rows) for kind, rows in pairs.items()} for role, m in models.items()},
        "reward_models": {
            role: {k: report[k] for k in ("num_parameters", "held_out")} for role, report in reports.items()
        },
        "bytes": {
            p.name: sum(f.stat().st_size for f in ([p] if p.is_file() else p.iterdir()))
            for p in sorted(build.assets.iterdir())
        },
        "settings": {"policy": [POLICY, MORE], "speaker": SPEAKER, "critic": CRITIC, "reward": REWARD, "seeds": SEEDS}
        | {"reward_rates": [PAIRS_RATE, NEW_FORMS_RATE]}
        | {"rows": ROWS, "pairs": {"temperature": TEMPERATURE, "flips": FLIPS}},
    }


def _measure_policy(build: Build) -> dict[str, Any]:
    """Entropy of the generator beside the cross-entropy of the policy on answers the generator writes."""
    first, last = (
        json.loads((build.root / name / "sft.json").read_text(encoding="utf-8")) for name in ("policy-first", "policy")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(build.assets / "policy")
    rng = random.Random("entropy")
    answers = [write_answer(rng.choice(topics()), rng) for _ in range(20_000)]
    num_tokens = sum(len(ids) + 1 for ids in tokenizer([" " + a.text for a in answers])["input_ids"])
    nats = -sum(a.logp for a in answers)
    member = last["members"][0]
    history = [h for report in (first, last) for h in report["members"][0]["history"]]
    return {
        "num_parameters": member["num_parameters"],
        "seconds": first["seconds"] + last["seconds"],
        "generator_entropy_nats_per_answer": nats / len(answers),
        "generator_entropy_nats_per_token": nats / num_tokens,
        "tokens_per_answer": num_tokens / len(answers),
        "held_out_nats_per_answer": member["held_out_loss_per_sequence"],
        "held_out_nats_per_token": member["held_out_loss"],
        "epochs": [{k: h[k] for k in ("train_loss", "loss", "seconds")} for h in history],
    }


def _sample(build: Build, name: str, *, n: int, temperature: float) -> list[dict[str, Any]]:
    out = build.root / f"{name}.jsonl"
    out.unlink(missing_ok=True)
    settings = {
        "data.path": str(build.assets / "eval.jsonl"),
        "sampling.max_new_tokens": 64,
        "sampling.engine": "hf",
        "run.device": "cpu",
    }
    sample(load(None, settings), str(build.assets / "policy"), out, n=n, temperature=temperature)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def _against_labels(rows: list[dict[str, Any]], judge: RewardModel) -> dict[str, Any]:
    own = [rubric_score(r["prompt"], r["completion"]) for r in rows]
    label = [rubric_score(r["prompt"], r["label"]) for r in rows]
    own_rm = judge.score_texts([Answered(r["prompt"], r["completion"]) for r in rows])
    label_rm = judge.score_texts([Answered(r["prompt"], r["label"]) for r in rows])
    parts = [rubric_breakdown(r["prompt"], r["completion"]) for r in rows]
    return {
        "num": len(rows),
        "score": fmean(own),
        "win_rate_rubric": fmean(a > b for a, b in zip(own, label, strict=True)),
        "win_rate_judge": fmean(a > b for a, b in zip(own_rm, label_rm, strict=True)),
        "tokens": fmean(r["num_tokens"] for r in rows),
        "truncated": fmean(r["truncated"] for r in rows),
        "unique": len({r["completion"] for r in rows}) / len(rows),
        "breakdown": {name: fmean(p[name] for p in parts) for name in parts[0]},
    }


def _pair_numbers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    gaps = [
        abs(rubric_score(a["prompt"], a["completion"]) - rubric_score(b["prompt"], b["completion"])) for a, b in pairs
    ]
    return {
        "identical_pairs": fmean(a["completion"] == b["completion"] for a, b in pairs),
        "tied_pairs": fmean(gap == 0 for gap in gaps),
        "mean_gap": fmean(gaps),
    }


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Pairs of samples of one prompt, the one that the rubric prefers chosen; ties are left out."""
    pairs = []
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        ranked = sorted((one, other), key=lambda r: rubric_score(r["prompt"], r["completion"]), reverse=True)
        if rubric_score(one["prompt"], one["completion"]) != rubric_score(other["prompt"], other["completion"]):
            chosen, rejected = (r["completion"] for r in ranked)
            pairs.append({"prompt": one["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def _accuracy(model: RewardModel, rows: list[dict[str, str]]) -> float:
    chosen = model.score_texts([Answered(r["prompt"], r["chosen"]) for r in rows])
    rejected = model.score_texts([Answered(r["prompt"], r["rejected"]) for r in rows])
    return fmean(a > b for a, b in zip(chosen, rejected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the embedded default of bpo-fast from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the build; stages found in it are kept")
    build = Build(parser.parse_args().out)
    started = time.monotonic()
    torch.set_num_threads(1)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for done in [
            *(pool.submit(build_reward, build, role) for role in REWARD_MODELS),
            pool.submit(build_policy, build),
        ]:
            done.result()
    ship(build)
    results = measure(build) | {"seconds": time.monotonic() - started, "cores": os.cpu_count()}
    (build.root / "assets.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
