"""Fused operators for preference training: sequence log-probs and the pair loss."""
