"""Annotators for tests, named `toy_annotator:NAME` on a command line."""

import os
import signal
import time


def letters(prompts, completions, completion_ids, **columns):
    """Share of ASCII letters, then the sum of the ids: no ties between different completions, or hardly any."""
    return [
        sum(c.isascii() and c.isalpha() for c in text) / (1 + len(text)) + 1e-5 * sum(ids)
        for text, ids in zip(completions, completion_ids, strict=True)
    ]


def slow(prompts, completions, completion_ids, **columns):
    time.sleep(0.5)
    return letters(prompts, completions, completion_ids)


def cues(prompts, completions, completion_ids, **columns):
    """Whether a judge is shown what it is shown of a plain prompt."""
    return [float(p.endswith("? Assistant:")) for p in prompts]


def same(prompts, completions, completion_ids, **columns):
    return [1.0] * len(completions)


def none(prompts, completions, completion_ids, **columns):
    return [None] * len(completions)


def nan(prompts, completions, completion_ids, **columns):
    return [0.5] * (len(completions) - 1) + [float("nan")]


def too_few(prompts, completions, completion_ids, **columns):
    return [0.5] * (len(completions) - 1)


def no_list(prompts, completions, completion_ids, **columns):
    return None


def numbered(prompts, completions, completion_ids, **columns):
    return dict.fromkeys(range(len(completions)), 0.5)


def words(prompts, completions, completion_ids, **columns):
    return ["good"] * len(completions)


def raising(prompts, completions, completion_ids, **columns):
    raise KeyError("score of the reward service")


def killed(prompts, completions, completion_ids, **columns):
    os.kill(os.getpid(), signal.SIGKILL)


NOT_A_FUNCTION = 3
