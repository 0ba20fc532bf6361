import re
from pathlib import Path

import pytest

from bpo_fast.config import Config, replace
from bpo_fast.grid import find_grid, read_grid, shipped_grids
from bpo_fast.tasks import ASSETS, resolve


def grid(tmp_path, text):
    path = tmp_path / "g.toml"
    path.write_text(text, encoding="utf-8")
    return path


def names(tmp_path, text, **overrides):
    return [s.name.removeprefix("helpfulness-") for s in read_grid(grid(tmp_path, text), overrides)]


def test_methods_become_sampler_reference_and_phases(tmp_path):
    text = '[grid]\nmethod = ["offline", "online", "on-policy", "bpo", "ema", "moving-ref"]\nF = [4]\n'
    found = {
        s.method: tuple(s.values[f"method.{k}"] for k in ("sampler", "ref", "phases"))
        for s in read_grid(grid(tmp_path, text))
    }
    assert found == {
        "offline": ("initial", "initial", 1),
        "online": ("policy", "initial", 4),
        "on-policy": ("policy", "initial", "on-policy"),
        "bpo": ("policy", "behavior", 4),
        "ema": ("policy", "ema", 4),
        "moving-ref": ("initial", "behavior", 4),
    }


def test_runs_that_are_the_same_are_made_once(tmp_path):
    text = '[grid]\nmethod = ["offline", "online", "bpo", "on-policy"]\nF = [1, 2, "T"]\n'
    assert names(tmp_path, text) == [
        "dpo-offline-F1-M1-s42",
        "dpo-online-F2-M1-s42",
        "dpo-on-policy-FT-M1-s42",
        "dpo-bpo-F2-M1-s42",
        "dpo-bpo-FT-M1-s42",
    ]


def test_the_last_axis_varies_fastest_and_blocks_keep_their_order(tmp_path):
    text = '[[grid]]\nseed = [1, 2]\nloss = ["dpo", "ipo"]\n[[grid]]\nname = "more"\nM = 5\n'
    assert names(tmp_path, text) == [
        "dpo-bpo-F2-M1-s1",
        "ipo-bpo-F2-M1-s1",
        "dpo-bpo-F2-M1-s2",
        "ipo-bpo-F2-M1-s2",
        "more-helpfulness-dpo-bpo-F2-M5-s42",
    ]


def test_any_knob_is_an_axis(tmp_path):
    specs = read_grid(grid(tmp_path, "[grid]\noptim.learning_rate = [1e-3, 0.01]\nmethod.beta = [0.5]\n"))
    assert [s.extra for s in specs] == [{"optim.learning_rate": r, "method.beta": 0.5} for r in (1e-3, 0.01)]
    assert specs[1].name.endswith("-s42-learning_rate=0.01-beta=0.5")


def test_settings_of_file_block_and_command_line(tmp_path):
    text = (
        '[set]\n"method.pairs" = 64\nmethod.beta = 0.2\neval.judges = ["rm={assets}/judge"]\n'
        "[[grid]]\nset.method.pairs = 32\n"
    )
    (spec,) = read_grid(grid(tmp_path, text), {"method.beta": "0.3"})
    config = replace(Config(), spec.values)
    assert (config.method.pairs, config.method.beta, config.eval.judges) == (32, 0.3, (f"rm={ASSETS}/judge",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid]\nlos = ['dpo']", "grid.los: no such axis; did you mean loss?"),
        ("[grid]\nloss = ['dop']", "method.loss = 'dop': not one of dpo, ipo, slic; did you mean dpo?"),
        ("[grid]\nmethod = ['bop']", "grid.method = 'bop': no such method; did you mean bpo?"),
        ("[grid]\nmethod = [3]", "grid.method = 3: no such method; there are offline,"),
        ("[grid]\nF = [0]", 'grid.F = 0: a number of phases, or "T"'),
        ("[grid]\nF = ['t']", "grid.F = 't': a number of phases"),
        ("[grid]\nM = [0]", "model.members = 0: must be >= 1"),
        ("[grid]\nM = ['many']", "model.members = 'many': expected int"),
        ("[grid]\nseed = []", "grid.seed = []: no value"),
        ("[grid]\ntask = ['helpfullness']", "no such task; did you mean helpfulness?"),
        ("[grid]\nmethod = ['golden']", "method.golden = None: method.ref = golden and method.golden go together"),
        (
            "[grid]\noptim.lerning_rate = [1]",
            "grid.optim.lerning_rate: no such axis; did you mean optim.learning_rate?",
        ),
        ("[grid]\nrun.seed = [1]", "grid.run.seed: is the axis seed"),
        ("[grid]\nname = 'a/b'", "grid.name = 'a/b': letters, digits"),
        ("[set]\nmethod.loss = 'ipo'\n[grid]", "set.method.loss: is an axis; it belongs under [grid] as loss"),
        ("[set]\nmethod.bata = 1\n[grid]", "method.bata: no such knob; did you mean method.beta?"),
        ("[sets]\n[grid]", "sets: no such key; did you mean set?"),
        ("[set]\n", "no [grid] in it"),
        ("[grid", "not TOML"),
        ("grid = 3", "grid = 3: not a table"),
        ("grid = [1, 2]", "grid = 1: not a table"),
        ("set = 3\n[grid]", "set = 3: not a table"),
        ("[grid]\nset = 3", "set = 3: not a table"),
        ("[grid]\nmethod = [['bpo']]", "grid.method = ['bpo']: no such method"),
        (
            "[set]\nmethod.pairs = 64\n[grid]\nF = [999]",
            "method.phases = 999: 64 pairs in batches of 16 make only 4 optimizer steps",
        ),
        (
            "[[grid]]\n[[grid]]\nset.method.beta = 0.5",
            "two runs are helpfulness-dpo-bpo-F2-M1-s42, with method.beta = None and 0.5; give one block a name",
        ),
        (
            "[grid]\nmethod = ['bpo', 'golden']\nset.method.golden = 'run:helpfulness-dpo-bpo-F2-M1-s43'",
            "no such run in the grid; did you mean helpfulness-dpo-bpo-F2-M1-s42?",
        ),
    ],
    ids=lambda v: v[:40].replace("\n", " "),
)
def test_bad_grids(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_grid(grid(tmp_path, text))
    assert str(error.value).startswith(str(tmp_path / "g.toml"))


def test_grids_are_found_by_name_and_by_path(tmp_path):
    assert set(shipped_grids()) == {"paper", "frequency", "reference", "stability", "cpu"}
    assert find_grid("cpu").name == "cpu.toml"
    path = grid(tmp_path, "[grid]")
    assert find_grid(str(path)) == path
    with pytest.raises(ValueError, match=r"^stabilty: no such grid; did you mean stability\?$"):
        find_grid("stabilty")
    with pytest.raises(ValueError, match=r"there\.toml: no such grid file"):
        find_grid(str(tmp_path / "there.toml"))


@pytest.mark.parametrize(
    ("name", "num"), [("frequency", 135), ("reference", 21), ("stability", 32), ("paper", 189), ("cpu", 148)]
)
def test_shipped_grids_are_valid(name, num):
    specs = read_grid(find_grid(name))
    assert len(specs) == num
    for spec in specs:
        resolve(replace(Config(), spec.values))


def test_the_paper_s_grid_has_the_released_settings():
    specs = read_grid(find_grid("paper"))
    by_task = {s.task: resolve(replace(Config(), s.values)) for s in specs}
    found = {
        t: (c.data.max_prompt_length, c.sampling.max_new_tokens, c.method.batch_pairs, c.method.pairs)
        for t, c in by_task.items()
    }
    assert found == {
        "tldr": (512, 128, 16, 10_000),
        "helpfulness": (64, 128, 64, 10_000),
        "harmlessness": (256, 128, 16, 10_000),
    }
    config = by_task["tldr"]
    assert (config.model.lora_r, config.model.alpha, config.model.members) == (256, 512, 5)
    assert config.model.adapters[4] == "sft/tldr/member-4"
    assert {s.seed for s in specs} == {42, 43, 44}
    assert {s.loss for s in specs} == {"dpo", "ipo", "slic"}
    assert {s.needs for s in specs if s.method == "golden" and s.task == "tldr"} == {
        f"tldr-{loss}-bpo-F2-M5-s42" for loss in ("dpo", "ipo", "slic")
    }


def test_the_study_starts_with_the_primary_comparison():
    specs = read_grid(Path(__file__).parents[1] / "bench" / "bpo_fast_bench" / "studies" / "helpdesk.toml")
    assert [(s.seed, s.method) for s in specs[:6]] == [
        (seed, method) for seed in (100, 101) for method in ("offline", "bpo", "on-policy")
    ]
    assert len({s.seed for s in specs[:75]}) == 25
