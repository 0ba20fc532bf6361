import pytest

from bpo_fast.config import MethodConfig
from bpo_fast.plan import deal, make_plan

SIZES = [(n, b, f) for n in (1, 7, 16, 100) for b in (1, 3, 16) for f in (1, 2, 3, 5, 7) if f <= -(-n // b)]


def plan(num_prompts, batch, phases):
    return make_plan(MethodConfig(batch_pairs=batch, phases=phases), num_prompts)


@pytest.mark.parametrize(("num_prompts", "batch", "num_phases"), SIZES)
def test_phase_of_step_t_is_floor_of_t_f_by_t(num_prompts, batch, num_phases):
    laid = plan(num_prompts, batch, num_phases)
    assert laid.num_steps == -(-num_prompts // batch)
    owner = [p.index for p in laid.phases for _ in range(p.start, p.stop)]
    assert owner == [t * num_phases // laid.num_steps for t in range(laid.num_steps)]


@pytest.mark.parametrize(("num_prompts", "batch", "num_phases"), SIZES)
def test_every_prompt_is_used_once_and_in_order(num_prompts, batch, num_phases):
    laid = plan(num_prompts, batch, num_phases)
    used = [i for p in laid.phases for i in range(p.first_prompt, p.last_prompt)]
    assert used == list(range(num_prompts))
    assert all(p.last_prompt > p.first_prompt and p.num_steps > 0 for p in laid.phases)


def test_on_policy_is_a_phase_a_step():
    laid = plan(100, 16, "on-policy")
    assert laid == plan(100, 16, 7)
    assert [p.num_steps for p in laid.phases] == [1] * 7


def test_one_phase_is_the_whole_run():
    (phase,) = plan(10, 4, 1).phases
    assert (phase.start, phase.stop, phase.first_prompt, phase.last_prompt) == (0, 3, 0, 10)


def test_more_phases_than_steps_are_named():
    with pytest.raises(
        ValueError,
        match=r"^method\.phases = 8: 100 pairs in batches of 16 make only 7 optimizer steps, and a phase needs one$",
    ):
        plan(100, 16, 8)


@pytest.mark.parametrize("num_items", range(9))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_pairs_are_dealt_in_order_and_evenly(num_items, num_steps):
    dealt = deal(range(num_items), num_steps)
    assert [i for part in dealt for i in part] == list(range(num_items))
    assert len(dealt) == num_steps, "a phase keeps its steps, however many pairs were dropped"
    sizes = [len(part) for part in dealt]
    assert max(sizes) - min(sizes) <= 1
