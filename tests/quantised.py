"""Quantised twins of tiny models, written as their formats are on disk."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128


def save_fp8(source: Path, out: Path) -> dict[str, torch.Tensor]:
    """Writes `source` with linear weights in fp8, a scale for every block of 128 by 128; returns their values."""
    shutil.copytree(source, out, dirs_exist_ok=True)
    stored, values = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj" not in name or weight.dim() != 2:
            stored[name] = weight
            continue
        grid = [torch.arange(n) // BLOCK for n in weight.shape]
        scale = torch.rand([int(g[-1]) + 1 for g in grid], generator=torch.Generator().manual_seed(0)) / 64 + 1 / 64
        each = scale[grid[0]][:, grid[1]]
        stored[name] = (weight / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        values[name] = stored[name].float() * each
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    fp8 = {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    name_quantiser(out, "fp8", modules_to_not_convert=["lm_head"], **fp8)
    return values


def name_quantiser(folder: Path, method: str, **settings: object) -> None:
    """Has config.json say that the weights are quantised."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, **settings}
    path.write_text(json.dumps(config), encoding="utf-8")
