import dataclasses
import subprocess
import sys
import tomllib

import pytest

from bpo_fast.config import (
    KNOBS,
    Config,
    in_force,
    load,
    parse_assignments,
    replace,
    to_flat,
    to_toml,
    with_full_paths,
)

# a value that is no default, for every knob: as TOML gives it, and as text on the command line
OTHER = {
    "task": ("tldr", "tldr"),
    "model.path": ("some/model", "some/model"),
    "model.dtype": ("bfloat16", "bfloat16"),
    "model.attn_implementation": ("sdpa", "sdpa"),
    "model.trust_remote_code": (True, "yes"),
    "model.gradient_checkpointing": (True, "1"),
    "model.activation_checkpointing": ("selective", "selective"),
    "model.fused_layers": (False, "false"),
    "model.compile": (True, "true"),
    "model.head_chunk_mib": (64, "64"),
    "model.full": (True, "TRUE"),
    "model.members": (5, "5"),
    "model.lora_r": (8, "8"),
    "model.lora_alpha": (12.5, "12.5"),
    "model.lora_dropout": (0.05, "5e-2"),
    "model.lora_targets": (["q_proj", "v_proj"], "q_proj, v_proj"),
    "model.adapters": (["a", "b"], "a,b"),
    "data.path": ("rows.jsonl[:10]", "rows.jsonl[:10]"),
    "data.eval_path": ("dev.parquet", "dev.parquet"),
    "data.split": ("validation", "validation"),
    "data.eval_split": ("validation", "validation"),
    "data.prompt_column": ("post", "post"),
    "data.label_column": ("summary", "summary"),
    "data.chat_template": (False, "no"),
    "data.max_prompt_length": (32, "32"),
    "data.long_prompts": ("truncate", "truncate"),
    "data.long_completions": ("truncate", "truncate"),
    "sampling.engine": ("hf", "hf"),
    "sampling.max_new_tokens": (16, "16"),
    "sampling.temperature": (0.7, "0.7"),
    "sampling.top_p": (0.9, "0.9"),
    "sampling.top_k": (50, "50"),
    "sampling.stop": (["\n\nHuman:", " a, b"], '["\\n\\nHuman:", " a, b"]'),
    "sampling.members": ("single", "single"),
    "sampling.batch_size": (4, "4"),
    "sampling.kv_cache_gib": (1.5, "1.5"),
    "sampling.merge_lora": (False, "false"),
    "sampling.enforce_eager": (True, "true"),
    "sampling.tensor_parallel": (2, "2"),
    "annotator.path": ("judge:score", "judge:score"),
    "annotator.batch_tokens": (512, "512"),
    "annotator.timeout_s": (5.5, "5.5"),
    "annotator.retries": (0, "0"),
    "annotator.requests": (2, "2"),
    "annotator.overlap": (False, "false"),
    "annotator.refill": (True, "true"),
    "method.loss": ("ipo", "ipo"),
    "method.beta": (0.5, "0.5"),
    "method.label_smoothing": (0.1, "0.1"),
    "method.ipo_sum": (True, "true"),
    "method.ref": ("golden", "golden"),
    "method.sampler": ("initial", "initial"),
    "method.phases": (4, "4"),
    "method.pairs": (100, "100"),
    "method.batch_pairs": (4, "4"),
    "method.ref_logps": ("sampler", "sampler"),
    "method.ref_logps_tolerance": (0.2, "0.2"),
    "method.ema_rate": (0.25, "0.25"),
    "method.golden": ("folder", "folder"),
    "optim.learning_rate": (1e-5, "1e-5"),
    "optim.schedule": ("cosine", "cosine"),
    "optim.warmup_steps": (3, "3"),
    "optim.adam_beta1": (0.5, "0.5"),
    "optim.adam_beta2": (0.95, "0.95"),
    "optim.adam_epsilon": (1e-8, "1e-8"),
    "optim.weight_decay": (0.1, "0.1"),
    "optim.max_grad_norm": (float("inf"), "inf"),
    "optim.states": ("8bit", "8bit"),
    "optim.offload": (True, "true"),
    "optim.microbatch_tokens": (100, "100"),
    "optim.max_bad_steps": (1, "1"),
    "eval.judges": (["rm=folder", "judge:score"], "rm=folder,judge:score"),
    "eval.prompts": (0, "0"),
    "eval.kl_prompts": (3, "3"),
    "eval.eval_steps": (10, "10"),
    "run.output_dir": ("runs/x", "runs/x"),
    "run.seed": (7, "7"),
    "run.devices": (2, "2"),
    "run.device": ("cpu", "cpu"),
    "run.save_steps": (5, "5"),
    "run.save_total_limit": (1, "1"),
    "run.report_to": (["wandb"], "wandb"),
}


def test_every_knob_has_a_meaning_and_a_case_here():
    assert set(OTHER) == set(KNOBS)
    assert all(field.metadata["doc"] for field, _ in KNOBS.values())


@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_is_set_alone_from_toml_and_from_text(name):
    value, text = OTHER[name]
    value = tuple(value) if isinstance(value, list) else value
    before = to_flat(Config())
    assert before[name] != value
    for given in (OTHER[name][0], text):
        after = to_flat(replace(Config(), {name: given}))
        assert after == before | {name: value}
        assert type(after[name]) is type(value)


def test_toml_round_trip_of_every_knob(tmp_path):
    config = replace(Config(), {name: value for name, (value, _) in OTHER.items()})
    (tmp_path / "all.toml").write_text(to_toml(config), encoding="utf-8")
    assert load(tmp_path / "all.toml") == config
    (tmp_path / "none.toml").write_text(to_toml(Config()), encoding="utf-8")
    assert load(tmp_path / "none.toml") == Config()


@pytest.mark.parametrize("text", ['quote " and \\ slash', "line\nbreak\r\n", "tab\tbell\x07del\x7f", "名前\u2028ü", ""])
def test_toml_round_trip_of_any_text(text, tmp_path):
    config = replace(Config(), {"run.output_dir": text, "eval.judges": [f"a={text}"]})
    assert tomllib.loads(to_toml(config))["run"]["output_dir"] == text
    (tmp_path / "c.toml").write_text(to_toml(config), encoding="utf-8", newline="")
    assert load(tmp_path / "c.toml") == config


def test_overrides_are_stronger_than_the_file_and_none_unsets(tmp_path):
    (tmp_path / "c.toml").write_text('task = "tldr"\n[method]\nbeta = 0.3\npairs = 8\n')
    config = load(tmp_path / "c.toml", {"method.beta": "0.2", "method.pairs": "none"})
    assert (config.task, config.method.beta, config.method.pairs) == ("tldr", 0.2, None)


@pytest.mark.parametrize(("alias", "loss"), [("sigmoid", "dpo"), ("hinge", "slic"), ("dpo", "dpo")])
def test_loss_aliases(alias, loss):
    assert replace(Config(), {"method.loss": alias}).method.loss == loss


def test_phases_are_a_number_or_on_policy():
    assert replace(Config(), {"method.phases": "16"}).method.phases == 16
    assert replace(Config(), {"method.phases": "on-policy"}).method.phases == "on-policy"


BAD = [
    ("method.beta", 0, "method.beta = 0.0: must be > 0"),
    ("method.beta", "-1", "method.beta = -1.0: must be > 0"),
    ("method.beta", float("nan"), "method.beta = nan: must be > 0"),
    ("method.beta", True, "method.beta = True: expected float"),
    ("method.beta", "big", "method.beta = 'big': expected float"),
    ("method.beta", None, "method.beta = none: a value is required"),
    ("method.label_smoothing", 0.6, "method.label_smoothing = 0.6: must be < 0.5"),
    ("method.label_smoothing", 0.5, "method.label_smoothing = 0.5: must be < 0.5"),
    ("method.beta", float("inf"), "method.beta = inf: must be < inf"),
    ("method.pairs", 0, "method.pairs = 0: must be >= 1"),
    ("method.pairs", "-5", "method.pairs = -5: must be >= 1"),
    ("method.pairs", 2.5, "method.pairs = 2.5: expected int"),
    ("method.pairs", float("inf"), "method.pairs = inf: expected int"),
    ("method.batch_pairs", 0, "method.batch_pairs = 0: must be >= 1"),
    ("method.phases", 0, "method.phases = 0: must be >= 1"),
    ("method.phases", -2, "method.phases = -2: must be >= 1"),
    ("method.phases", 1.5, "method.phases = 1.5: expected int or str"),
    ("method.loss", "dop", "method.loss = 'dop': not one of dpo, ipo, slic; did you mean dpo?"),
    ("method.ref", "golde", "did you mean golden?"),
    ("model.members", 0, "model.members = 0: must be >= 1"),
    ("model.lora_r", 0, "model.lora_r = 0: must be >= 1"),
    ("model.lora_dropout", 1.0, "model.lora_dropout = 1.0: must be <= 0.99"),
    ("model.full", "maybe", "model.full = 'maybe': expected bool"),
    ("model.lora_targets", 3, "model.lora_targets = 3: expected tuple"),
    ("model.lora_targets", [3], "model.lora_targets = [3]: expected tuple"),
    ("model.path", 3, "model.path = 3: expected str"),
    ("data.max_prompt_length", 0, "data.max_prompt_length = 0: must be >= 1"),
    ("sampling.max_new_tokens", "-1", "sampling.max_new_tokens = -1: must be >= 1"),
    ("sampling.temperature", 0, "sampling.temperature = 0.0: must be >= 1e-06"),
    ("sampling.top_p", 1.1, "sampling.top_p = 1.1: must be <= 1"),
    ("sampling.top_k", -1, "sampling.top_k = -1: must be >= 0"),
    ("sampling.batch_size", 0, "sampling.batch_size = 0: must be >= 1"),
    ("optim.learning_rate", 0, "optim.learning_rate = 0.0: must be > 0"),
    ("optim.schedule", "linea", "did you mean linear?"),
    ("run.seed", -1, "run.seed = -1: must be >= 0"),
    ("run.save_total_limit", 0, "run.save_total_limit = 0: must be >= 1"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=lambda v: str(v)[:40])
def test_a_bad_value_is_named(name, value, message):
    with pytest.raises(ValueError) as caught:
        replace(Config(), {name: value})
    assert message in str(caught.value)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    "name", [n for n, (f, _) in KNOBS.items() if any(f.metadata[r] is not None for r in ("gt", "ge"))]
)
def test_no_number_below_its_range(name):
    with pytest.raises(ValueError, match=f"^{name} = "):
        replace(Config(), {name: -1})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("method.bta", "method.beta"),
        ("learning_rate", "optim.learning_rate"),
        ("optim.learning_rat", "optim.learning_rate"),
        ("train.seed", "run.seed"),
        ("taks", "task"),
    ],
)
def test_an_unknown_name_brings_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"^{name}: no such knob; did you mean {near}\\?$"):
        replace(Config(), {name: 1})


def test_an_unknown_name_far_from_all():
    with pytest.raises(ValueError, match=r"^zzz: no such knob$"):
        replace(Config(), {"zzz": 1})


def test_a_section_is_no_knob():
    with pytest.raises(ValueError, match=r"^method: no such knob"):
        replace(Config(), {"method": "dpo"})


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.toml: No such file"):
        load(tmp_path / "missing.toml")
    with pytest.raises(ValueError, match="Is a directory"):
        load(tmp_path)
    (tmp_path / "bad.toml").write_text("[method\nbeta = 1")
    with pytest.raises(ValueError, match=r"bad\.toml: not TOML: .*line 1"):
        load(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'task = "\xff"')
    with pytest.raises(ValueError, match=r"latin\.toml: not TOML"):
        load(tmp_path / "latin.toml")
    (tmp_path / "unknown.toml").write_text("[method]\nbetta = 1")
    with pytest.raises(ValueError, match=r"method\.betta: no such knob; did you mean method\.beta\?"):
        load(tmp_path / "unknown.toml")


def test_full_paths_are_those_of_files_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.jsonl", "b.jsonl", "m[:3]"):
        (tmp_path / name).touch()
    (tmp_path / "rm").mkdir()
    values = {
        "task": "rm",
        "model.path": "m[:3]",
        "model.adapters": ("../" + tmp_path.name + "/rm/", "owner/name"),
        "data.path": "a=b.jsonl[2:]",
        "data.eval_path": "none.jsonl[:3]",
        "annotator.path": "a=b.jsonl",
        "eval.judges": ("rm", "x=rm", "module:function", "x=module:function", "http://host/v1#m", f"{tmp_path}/rm"),
    }
    full = to_flat(with_full_paths(replace(Config(), values)))
    assert {name: full[name] for name in values} == {
        "task": "rm",
        "model.path": f"{tmp_path}/m[:3]",
        "model.adapters": (f"{tmp_path}/rm", "owner/name"),
        "data.path": f"{tmp_path}/a=b.jsonl[2:]",
        "data.eval_path": "none.jsonl[:3]",
        "annotator.path": f"a={tmp_path}/b.jsonl",
        "eval.judges": (f"{tmp_path}/rm", f"x={tmp_path}/rm", *values["eval.judges"][2:]),
    }
    assert full["method.golden"] is None


def test_runs_are_compared_by_the_alpha_in_force():
    unnamed, named = ({"model.lora_r": 4, "model.lora_alpha": alpha} for alpha in (None, 8.0))
    assert in_force(replace(Config(), unnamed)) == in_force(replace(Config(), named))
    assert in_force(replace(Config(), named | {"model.lora_r": 3})) != in_force(replace(Config(), {"model.lora_r": 3}))
    assert in_force(Config())["model.lora_alpha"] is None


def test_assignments():
    assert parse_assignments(["a.b=c", " x = y=z "]) == {"a.b": "c", "x": "y=z"}
    for bad in ("a.b", "=3", " =3"):
        with pytest.raises(ValueError, match=f"^--set {bad}: expected NAME=VALUE$"):
            parse_assignments([bad])


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().task = "tldr"  # type: ignore[misc]


def test_config_tasks_and_cli_import_no_torch():
    modules = "bpo_fast, bpo_fast.config, bpo_fast.tasks, bpo_fast.types, bpo_fast.cli"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
