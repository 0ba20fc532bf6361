"""SFT and reward models on a real GPU, in bfloat16 with float32 masters, beside the same in float32 on the host."""

import json

import pytest
import torch

from bpo_fast.progress import Progress
from bpo_fast.reward import train_reward
from bpo_fast.sft import train_sft
from bpo_fast.stage_config import RewardConfig, SftConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = {"hidden": 64, "layers": 2, "heads": 2, "vocab": 300, "batch_tokens": 512, "epochs": 2}
STAGES = {"sft": (SftConfig, train_sft), "reward": (RewardConfig, train_reward)}


@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_as_on_the_host(tmp_path, stage, states):
    answers = ["an apple", "a pear and a plum", "a cherry, a melon and a grape"]
    rows = [{"prompt": f"Number {i}?", "chosen": answers[i % 3], "rejected": answers[(i + 1) % 3]} for i in range(60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"label": row["chosen"]}) + "\n" for row in rows))
    config_class, train = STAGES[stage]
    losses = []
    for device in ("cpu", "cuda"):
        config = config_class(data=str(data), out=str(tmp_path / device), device=device, states=states, **SMALL)
        result = train(config, progress=Progress(quiet=True))
        history = (result["members"][0] if stage == "sft" else result)["history"]
        losses.append([epoch[key] for epoch in history for key in ("train_loss", "loss")])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
