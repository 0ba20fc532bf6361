"""Twenty steps on fixed pairs, against losses recorded once: a change of the numbers is a change of the method."""

import json

import pytest

from bpo_fast import config as configs
from bpo_fast.metrics import read_metrics
from bpo_fast.train import train

GOLDEN = {
    "dpo": """0.693147 0.687188 0.626975 0.702412 0.665395 0.692522 0.68804 0.686936 0.687061 0.672912
        0.69339 0.691149 0.679258 0.681976 0.665136 0.693185 0.691244 0.692771 0.683634 0.693267""",
    "ipo": """25.0 24.429405 17.153606 25.575844 21.247574 25.0 24.558094 25.199465 21.952724 24.50832
        25.0 24.376085 23.831932 22.764259 19.834997 25.0 24.503033 24.023796 22.93231 24.125891""",
    "slic": """1.0 0.987086 0.873651 1.001189 0.950054 1.0 0.99159 0.98588 0.985195 0.959882
        1.0 0.995145 0.971134 0.973741 0.942379 1.0 0.995486 0.997259 0.982339 0.992405""",
}
FORMS = {"dpo": {"model.members": 2, "model.lora_r": 4}, "ipo": {"model.full": True}, "slic": {"model.lora_r": 4}}


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
def test_twenty_steps(loss, tiny_model_dir, tiny_data, tmp_path, without_drawings):
    rows = [json.loads(line) for path in (tiny_data.train, tiny_data.eval) for line in path.read_text().splitlines()]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["label"], "rejected": rows[i - 3]["label"]}
        for i, row in enumerate(rows)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    values = {
        "model.path": str(tiny_model_dir),
        "method.loss": loss,
        "method.pairs": 80,
        "method.batch_pairs": 4,
        "method.phases": 4,
        "optim.learning_rate": 3e-3,
        "eval.kl_prompts": 0,
        "run.output_dir": str(tmp_path / "run"),
    }
    config = configs.load(None, values | FORMS[loss])
    train(config, from_pairs=str(tmp_path / "pairs.jsonl"), quiet=True)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if line["kind"] == "step"]
    assert losses == pytest.approx([float(value) for value in GOLDEN[loss].split()], rel=1e-3)
