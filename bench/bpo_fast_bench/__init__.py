"""Benchmarks behind `bpo-fast bench`: they check correctness before they time."""
