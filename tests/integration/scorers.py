"""Annotators for whole runs, named `scorers:NAME`."""

import atexit
import os
import resource
import sys
import time


def by_id_sum(prompts, completions, completion_ids, **columns):
    """A number that differs for almost all different completions."""
    return [sum((i + 1) * t for i, t in enumerate(ids)) % 9973 for ids in completion_ids]


def tie_every_third(prompts, completions, completion_ids, **columns):
    """The same score for every completion of a third of the prompts."""
    scores = by_id_sum(prompts, completions, completion_ids)
    return [0 if sum(map(ord, p)) % 3 == 0 else s for p, s in zip(prompts, scores, strict=True)]


def fails_beside_rank_0(prompts, completions, completion_ids, **columns):
    """Scores in rank 0; other ranks refuse, and a library of theirs has the last word."""
    if _is_worker():
        atexit.register(print, "W [lib.cpp:1] was not destroyed", file=sys.stderr)
        raise ValueError("no scores here")
    return by_id_sum(prompts, completions, completion_ids)


def dies_beside_rank_0(prompts, completions, completion_ids, **columns):
    """Scores in rank 0; other ranks end without a word but their last."""
    if _is_worker():
        print("the last words", file=sys.stderr, flush=True)
        os._exit(7)
    return by_id_sum(prompts, completions, completion_ids)


def sleeps(prompts, completions, completion_ids, **columns):
    """Takes its time."""
    time.sleep(60)
    return by_id_sum(prompts, completions, completion_ids)


def writes_little_beside_rank_0(prompts, completions, completion_ids, **columns):
    """Scores in every rank; from then on rank 0 alone writes files of more than 20,000 bytes."""
    if _is_worker():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return by_id_sum(prompts, completions, completion_ids)


def _is_worker() -> bool:
    return sys.modules["__main__"].__spec__.name == "bpo_fast.rank_worker"
