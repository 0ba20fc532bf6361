"""bpo-fast: online preference optimisation against the behavior policy (BPO)."""
