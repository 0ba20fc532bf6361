import pytest
from tiny_world import write_rows

from bpo_fast.config import Config, replace
from bpo_fast.tasks import ASSETS, get_task, resolve


def resolved(**values):
    return resolve(replace(Config(), {"model.path": "m", **{k.replace("__", "."): v for k, v in values.items()}}))


@pytest.mark.parametrize(
    ("task", "prompt_length", "batch", "ending"),
    [("tldr", 512, 16, "TL;DR:"), ("helpfulness", 64, 64, " Assistant:"), ("harmlessness", 256, 16, " assistant:")],
)
def test_presets_are_the_paper_s(task, prompt_length, batch, ending):
    config = resolved(task=task)
    assert config.data.max_prompt_length == prompt_length
    assert config.sampling.max_new_tokens == 128
    assert (config.method.batch_pairs, config.method.pairs) == (batch, 10_000)
    assert (config.model.lora_r, config.model.alpha) == (256, 512)
    assert config.optim.learning_rate == 5e-5
    assert get_task(task).suffix.endswith(ending)


def test_what_the_user_sets_is_kept():
    wanted = {
        "data.max_prompt_length": 7,
        "sampling.max_new_tokens": 8,
        "method.batch_pairs": 3,
        "method.pairs": 9,
        "model.lora_r": 4,
        "model.lora_alpha": 3.0,
        "optim.learning_rate": 0.1,
        "eval.prompts": 0,
        "data.path": "x/y",
        "data.eval_path": "z/w",
    }
    config = replace(Config(), {"model.path": "m"} | wanted)
    after = resolve(config)
    for name, value in wanted.items():
        section, leaf = name.split(".")
        assert getattr(getattr(after, section), leaf) == value, name


def test_stop_strings_are_the_task_s_unless_the_user_says_so():
    assert resolved(task="helpfulness").sampling.stop == ("\n\nHuman:",)
    assert resolved(task="tldr").sampling.stop == ("\nSUBREDDIT:", "\n\nPOST:")
    assert resolved(task="harmlessness").sampling.stop == ("\n\nHuman:", " user:")
    assert resolved(sampling__stop="").sampling.stop == ()
    assert resolved(sampling__stop="END").sampling.stop == ("END",)
    assert resolve(Config()).sampling.stop == ()  # the embedded policy ends with EOS


def test_single_members_are_not_merged():
    with pytest.raises(ValueError, match=r"sampling\.merge_lora = true: .* sampling\.members = single"):
        resolved(sampling__members="single", sampling__merge_lora=True)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"sampling__engine": "hf"}, r"sampling\.engine = hf: one process"),
        ({"sampling__members": "single"}, r"sampling\.members = single: copies hold the average"),
        ({"sampling__merge_lora": False}, r"sampling\.merge_lora = false: no member is read in place"),
    ],
)
def test_several_processes_of_vllm_have_copies_of_the_average(knobs, words):
    with pytest.raises(ValueError, match=rf"^sampling\.tensor_parallel = 2: {words}"):
        resolved(sampling__tensor_parallel=2, **knobs)
    assert resolved(sampling__tensor_parallel=1, **knobs)
    assert resolved(sampling__tensor_parallel=2).sampling.engine == "vllm"
    assert resolved().sampling.engine == "auto"
    with pytest.raises(ValueError, match=r"^sampling\.tensor_parallel = 0: must be >= 1$"):
        resolved(sampling__tensor_parallel=0)


def test_resolve_twice_changes_nothing():
    for config in (Config(), replace(Config(), {"model.path": "m", "task": "tldr"})):
        once = resolve(config)
        assert resolve(once) == once


def test_the_default_is_the_embedded_world():
    config = resolve(Config())
    assert config.model.path == str(ASSETS / "policy")
    assert config.data.path == str(ASSETS / "prompts.jsonl")
    assert config.data.eval_path == str(ASSETS / "eval.jsonl")
    assert config.annotator.path == str(ASSETS / "annotator")
    assert [j.partition("=")[0] for j in config.eval.judges] == ["rubric", "rm"]


def test_lora_alpha_follows_r():
    assert resolved(model__lora_r=6).model.alpha == 12


def test_lora_alpha_follows_the_rank_that_replaces_another_run_s():
    assert resolve(replace(resolved(), {"model.lora_r": 8})).model.alpha == 16
    assert resolve(replace(resolved(model__lora_alpha=3.0), {"model.lora_r": 8})).model.alpha == 3


def test_held_out_rows_beside_the_training_file(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [])
    assert resolved(data__path=str(train)).data.eval_path is None
    write_rows(tmp_path / "test.jsonl", [])
    assert resolved(data__path=str(train)).data.eval_path == str(tmp_path / "test.jsonl")
    dev = write_rows(tmp_path / "dev.jsonl", [])
    for source in (train, f"{train}[:5]", tmp_path, f"{tmp_path}[:5]"):
        assert resolved(data__path=str(source)).data.eval_path == str(dev)
    assert resolved(data__path=str(dev)).data.eval_path == str(tmp_path / "test.jsonl"), "never the training file"


def test_held_out_rows_of_the_hub_are_those_of_the_data_set():
    assert resolved(task="tldr").data.eval_path == get_task("tldr").eval_data
    assert resolved(data__path="owner/name[:100]").data.eval_path == "owner/name"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "helpfullness"}, "task = 'helpfullness': no such task; did you mean helpfulness?"),
        ({"task": "zzz"}, "task = 'zzz': no such task; known: helpfulness, tldr, harmlessness"),
        ({"method.phases": "often"}, "method.phases = 'often': a number of phases or on-policy"),
        ({"model.compile": True, "model.members": 2}, "model.compile = true: one member only, not model.members = 2"),
        ({"model.full": True, "model.members": 2}, "model.members = 2: an ensemble needs LoRA"),
        ({"model.full": True, "model.adapters": ["a"]}, "model.adapters = a: full fine-tuning"),
        ({"model.adapters": ["a", "b"], "model.members": 3}, "model.adapters = a, b: 2 for model.members = 3"),
        ({"method.ref": "golden"}, "method.golden = None: method.ref = golden and method.golden go together"),
        ({"method.golden": "g"}, "method.golden = 'g': method.ref = golden and method.golden go together"),
        (
            {"method.loss": "ipo", "method.label_smoothing": 0.1},
            "method.label_smoothing = 0.1: only dpo has it, not ipo",
        ),
    ],
    ids=str,
)
def test_contradictions_are_named(values, message):
    with pytest.raises(ValueError) as caught:
        resolve(replace(Config(), {"model.path": "m"} | values))
    assert str(caught.value).startswith(message)


def test_other_tasks_have_no_embedded_policy():
    with pytest.raises(
        ValueError, match=r"task = 'tldr': only helpfulness has an embedded policy; name one with --model"
    ):
        resolve(replace(Config(), {"task": "tldr"}))
