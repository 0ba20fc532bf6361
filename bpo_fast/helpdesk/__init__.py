"""A small synthetic help-desk language with a known judge: the world of the embedded default.

`questions` asks about one of 224 `topics` in one of 48 forms, `answers` writes answers of graded quality and knows
their log-probability, `rubric` scores any answer by its text, `rows` makes data of them. Pure Python, no torch, equal
for equal seeds.

Held out: 6 question forms are used in evaluation only, and of the other forms each (topic, form) combination belongs to
exactly one of the roles sft, prompts, annotator, judge and eval. Half of the evaluation questions have a new form, half
a new combination.
"""

from bpo_fast.helpdesk.rows import critic_rows, preference_rows, prompt_rows, sft_rows, swapped_rows
from bpo_fast.helpdesk.rubric import judge, rubric_breakdown, rubric_score

__all__ = [
    "critic_rows",
    "judge",
    "preference_rows",
    "prompt_rows",
    "rubric_breakdown",
    "rubric_score",
    "sft_rows",
    "swapped_rows",
]
