import json
from pathlib import Path

import pytest
import torch

from bpo_fast.annotate.reward_model import Answered, RewardModel
from bpo_fast.helpdesk import preference_rows, prompt_rows, rubric_score, sft_rows, swapped_rows
from bpo_fast.tasks import ASSETS
from bpo_fast.tokenizer import with_leading_space

BUDGET = 12_000_000


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def policy():
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "policy")
    return transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "policy", dtype=torch.float32).eval(), tokenizer


@pytest.fixture(scope="module", params=["annotator", "judge"])
def reward_model(request):
    return RewardModel(str(ASSETS / request.param), device="cpu")


def accuracy(model, rows):
    chosen = model.score_texts([Answered(r["prompt"], r["chosen"]) for r in rows])
    rejected = model.score_texts([Answered(r["prompt"], r["rejected"]) for r in rows])
    return sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(rows)


def test_assets_fit_their_budget_and_hold_weights_and_data_only():
    files = [p for p in ASSETS.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= BUDGET
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jsonl", ".md"}


def test_questions_are_those_of_the_world_and_apart():
    train, held_out = read(ASSETS / "prompts.jsonl"), read(ASSETS / "eval.jsonl")
    assert len(train) >= 4000
    assert len(held_out) >= 256
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert train[:200] == prompt_rows(200, 101)
    assert held_out[:100] == prompt_rows(100, 102, "eval")


def test_policy_speaks_the_language_nearly_as_well_as_its_generator(policy):
    model, tokenizer = policy
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    nats = []
    for row in sft_rows(64, 7, "eval"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(with_leading_space(row["prompt"], row["label"]))["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        nats.append(-sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
    assert 9 < sum(nats) / len(nats) < 13


def test_policy_answers_the_question_and_stops(policy):
    model, tokenizer = policy
    question = "My kettle will not switch on. What should I do? Assistant:"
    ids = tokenizer(question, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert out[-1] == tokenizer.eos_token_id
    assert 2 <= rubric_score(question, tokenizer.decode(out, skip_special_tokens=True)) < 9


def test_reward_models_follow_the_rubric(reward_model):
    assert accuracy(reward_model, preference_rows(400, 5, "eval", flips=0)) >= 0.85


def test_reward_models_see_relevance(reward_model):
    assert accuracy(reward_model, swapped_rows(200, 6, "eval")) >= 0.85


def test_reward_models_are_not_each_other():
    weights = [(ASSETS / role / "model.safetensors").read_bytes() for role in ("annotator", "judge")]
    assert weights[0] != weights[1]
