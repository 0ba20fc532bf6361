"""Which prompts and steps belong to which phase: phase of step t = floor(t F / T), every prompt used once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from bpo_fast.config import ON_POLICY, MethodConfig

Item = TypeVar("Item")


@dataclass(frozen=True)
class Phase:
    """One phase of data collection.

    Attributes:
        index: 0, 1, ...
        start, stop: its optimizer steps, stop excluded.
        first_prompt, last_prompt: its slice of the prompts, last excluded.
    """

    index: int
    start: int
    stop: int
    first_prompt: int
    last_prompt: int

    @property
    def num_steps(self) -> int:
        """K, about T / F."""
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """T steps in F phases over N prompts."""

    num_prompts: int
    num_steps: int
    phases: tuple[Phase, ...]


def make_plan(method: MethodConfig, num_prompts: int) -> Plan:
    """Lays out a run.

    Args:
        method: phases F and pairs a step B.
        num_prompts: N, the annotation budget.

    Raises:
        ValueError: more phases than steps.
    """
    size = method.batch_pairs
    assert size is not None, "resolve() has set it"
    num_steps = -(-num_prompts // size)
    num_phases = num_steps if method.phases == ON_POLICY else int(method.phases)
    if num_phases > num_steps:
        raise ValueError(
            f"method.phases = {num_phases}: {num_prompts} pairs in batches of {size} make only"
            f" {num_steps} optimizer step{'s' * (num_steps > 1)}, and a phase needs one"
        )
    bounds = [-(-f * num_steps // num_phases) for f in range(num_phases + 1)]
    phases = tuple(
        Phase(f, start, stop, start * size, min(stop * size, num_prompts))
        for f, (start, stop) in enumerate(pairwise(bounds))
    )
    return Plan(num_prompts, num_steps, phases)


def deal(items: Sequence[Item], num_steps: int) -> list[list[Item]]:
    """Deals the pairs of a phase to its steps in order, as evenly as can be: dropped pairs make smaller batches,
    never fewer steps, so that the schedule is the same for every method."""
    bounds = [len(items) * k // num_steps for k in range(num_steps + 1)]
    return [list(items[a:b]) for a, b in pairwise(bounds)]
