"""Runs of a training stage with its norms and gates by kernels and by the model's own layers."""

from bpo_fast.fused_layers import fuse_layers_


def fused_and_plain(monkeypatch, train):
    """What `train(i)` gives with kernels, then without; and how many layers got them in each."""
    results, nums = [], []
    for fuse in (fuse_layers_, lambda model: 0):

        def counted(model, fuse=fuse):
            assert model.training, "or a dropout would be lost"
            nums.append(fuse(model))

        monkeypatch.setattr("bpo_fast.stages.fuse_layers_", counted)
        results.append(train(len(nums)))
    return results, nums
