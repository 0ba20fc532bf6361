"""Annotators for whole runs, named `scorers:NAME`."""


def by_id_sum(prompts, completions, completion_ids, **columns):
    """A number that differs for almost all different completions."""
    return [sum((i + 1) * t for i, t in enumerate(ids)) % 9973 for ids in completion_ids]


def tie_every_third(prompts, completions, completion_ids, **columns):
    """The same score for every completion of a third of the prompts."""
    scores = by_id_sum(prompts, completions, completion_ids)
    return [0 if sum(map(ord, p)) % 3 == 0 else s for p, s in zip(prompts, scores, strict=True)]
