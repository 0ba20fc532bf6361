import copy
import json
import math
from pathlib import Path
from tempfile import mkdtemp

import peft
import pytest
import torch
from fused_runs import fused_and_plain
from relative import worst_error
from safetensors.torch import load_file
from tiny_world import write_rows
from tokenizers import processors
from torch.nn import Embedding
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from bpo_fast.batches import length_batches
from bpo_fast.optim import learning_rate
from bpo_fast.progress import Progress
from bpo_fast.ranks import Ranks
from bpo_fast.reward import RewardConfig, train_reward
from bpo_fast.sft import CompletionNll, Example, SftConfig, encode_examples, train_sft
from bpo_fast.stage_checkpoint import StageCheckpoint
from bpo_fast.stages import (
    TrainingRows,
    fit,
    fresh_model,
    optim_config,
    plateau_epoch,
    scratch_config,
    split_by_prompt,
)
from bpo_fast.tokenizer import train_bpe

THINGS = ["apple", "pear", "plum", "cherry", "melon", "grape", "fig", "lemon"]
TINY = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "vocab": 300, "device": "cpu"}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is number {i}?", "label": f"It is a {THINGS[i % 8]}."} for i in range(64)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        **SMALL,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def settings(data, out, **changes):
    return SftConfig(**({"data": str(data), "out": str(out), "epochs": 2, "batch_tokens": 512} | TINY | changes))


def reference_nll(model, example):
    """One sequence alone, no padding, no gather: -log softmax at the completion positions."""
    ids = torch.tensor([example.ids])
    logps = model(input_ids=ids).logits.double().log_softmax(-1)
    first = len(example.ids) - example.num_completion
    return torch.stack([-logps[0, t - 1, example.ids[t]] for t in range(first, len(example.ids))])


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradient_equal_the_sequences_one_by_one(tiny, packed):
    tiny = copy.deepcopy(tiny)
    generator = torch.Generator().manual_seed(1)
    examples = [
        Example(tuple(torch.randint(0, 50, (length,), generator=generator).tolist()), completion)
        for length, completion in [(7, 3), (2, 1), (12, 11), (5, 1)]
    ]
    expected = torch.cat([reference_nll(tiny, e) for e in examples])
    nll = CompletionNll(tiny, examples[:2] if packed else ())
    assert nll.packed == packed
    nats = nll(examples)
    torch.testing.assert_close(nats.double(), expected, rtol=1e-5, atol=0)

    tiny.zero_grad()
    nats.mean().backward()
    got = [p.grad.clone() for p in tiny.parameters()]
    tiny.zero_grad()
    expected.mean().backward()
    assert worst_error(got, [p.grad for p in tiny.parameters()]) < 1e-5


def test_a_packed_row_has_no_padding(tiny):
    tiny = copy.deepcopy(tiny)
    examples = [Example((1, 2, 3), 1), Example((4, 5, 6, 7, 8), 2)]
    nll, seen = CompletionNll(tiny, examples), []
    tiny.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    assert len(nll(examples)) == 3
    assert seen == [[[1, 2, 3, 4, 5, 6, 7, 8]]]


def test_models_that_cannot_be_packed_are_padded(tiny, caplog):
    dropping = copy.deepcopy(tiny)
    dropping.config.attention_dropout = 0.1
    examples = [Example((1, 2, 3), 1), Example((4, 5, 6, 7, 8), 2)]
    assert not CompletionNll(dropping, examples).packed
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)).eval()
    before = CompletionNll(bloom)(examples)
    nll = CompletionNll(bloom, examples)
    assert not nll.packed
    assert "BloomForCausalLM: rows are padded, not packed" in caplog.text
    torch.testing.assert_close(nll(examples), before)


def test_no_logits_are_made_where_the_head_is_known(tiny):
    tiny, made = copy.deepcopy(tiny), []
    nll = CompletionNll(tiny)
    tiny.get_output_embeddings().register_forward_hook(lambda *_: made.append(1))
    nll([Example((1, 2, 3), 1)])
    assert not made


def test_a_bias_of_zeros_is_a_bias_that_can_be_trained():
    model = PhiForCausalLM(PhiConfig(**SMALL, vocab_size=50))
    assert not model.lm_head.bias.any()
    CompletionNll(model)([Example((1, 2, 3), 2)]).sum().backward()
    assert model.lm_head.bias.grad.any()


@pytest.mark.parametrize("packed", [False, True])
def test_a_head_with_a_bias_makes_logits_of_the_completions_alone(packed):
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SMALL, vocab_size=50)).eval()
    model.lm_head.bias.data.normal_()
    examples = [Example((1, 2, 3, 4, 5), 1), Example((4, 5, 6, 7), 2)]
    nll, seen = CompletionNll(model, examples if packed else ()), []
    assert nll.packed == packed
    model.lm_head.register_forward_hook(lambda _, args, logits: seen.append(logits.shape))
    nats = nll(examples)
    assert seen == [(3, 50)]
    torch.testing.assert_close(nats.double(), torch.cat([reference_nll(model, e) for e in examples]))


def test_the_cap_of_the_logits_counts(tiny):
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8, vocab_size=50)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    example = Example(tuple(range(1, 9)), 5)
    torch.testing.assert_close(CompletionNll(model)([example]).double(), reference_nll(model, example))


def test_held_out_sum_does_not_depend_on_the_batches(tiny):
    examples = [Example(tuple(range(1, n)), n // 3 + 1) for n in range(4, 24)]
    total, num_tokens = CompletionNll(tiny).sum(examples, batch_tokens=64)
    assert num_tokens == sum(e.num_completion for e in examples)
    expected = sum(reference_nll(tiny, e).sum().item() for e in examples)
    assert total == pytest.approx(expected, rel=1e-5)


def test_prompt_and_completion_are_encoded_apart_and_end_with_eos():
    tokenizer = train_bpe(["How? Assistant: Like this."] * 4, vocab_size=300)
    config = settings("x", "y", max_prompt_length=3, max_completion_length=6)
    prompt, completion = "How? Assistant:", " Like this."
    p, c = (tokenizer(t)["input_ids"] for t in (prompt, completion))
    assert len(p) > 3
    examples, cut_prompts, cut_completions = encode_examples(
        [(prompt, completion, False), ("A", " B", False), ("A", completion * 3, False)], tokenizer, config
    )
    a, b = (tokenizer(t)["input_ids"] for t in ("A", " B"))
    assert examples[0].ids == (*p[-3:], *c, tokenizer.eos_token_id)
    assert examples[0].num_completion == len(c) + 1
    assert examples[1].ids == (*a, *b, tokenizer.eos_token_id)
    # cut at the limit, so no EOS follows
    assert examples[2].ids == (*a, *tokenizer(completion * 3)["input_ids"][:6])
    assert tokenizer.eos_token_id not in examples[2].ids
    assert (cut_prompts, cut_completions) == (1, 1)


def test_a_cut_prompt_keeps_its_bos():
    tokenizer = train_bpe(["x"], vocab_size=258)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    examples, num_cut, _ = encode_examples([("abcdef", "g", False)], tokenizer, settings("x", "y", max_prompt_length=3))
    assert tokenizer.decode(examples[0].ids) == "<s>efg</s>"
    assert num_cut == 1


def test_eos_fits_exactly_at_the_limit():
    tokenizer = train_bpe(["x"], vocab_size=258)
    texts = [("q", " ab", False), ("q", " abc", False)]
    examples, _, num_cut = encode_examples(texts, tokenizer, settings("x", "y", max_completion_length=4))
    assert [e.ids[-1] == tokenizer.eos_token_id for e in examples] == [True, False]
    assert num_cut == 1


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_training_learns_and_the_folder_loads_in_plain_transformers(tmp_path, data, arch):
    out = tmp_path / "policy"
    result = train_sft(settings(data, out, arch=arch, epochs=15, learning_rate=2e-2), progress=QUIET)
    assert json.loads((out / "sft.json").read_text()) == json.loads(json.dumps(result))
    member = result["members"][0]
    losses = [h["loss"] for h in member["history"]]
    assert losses[-1] < 0.6 * losses[0]
    assert member["held_out_loss"] == min(losses)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == arch
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    prompts = [r["prompt"] + " Assistant:" for r in rows]
    _, held_out = split_by_prompt(prompts, 0.05, 42)
    examples = [
        Example((*tokenizer(prompts[i])["input_ids"], *c, tokenizer.eos_token_id), len(c) + 1)
        for i in held_out
        for c in [tokenizer(" " + rows[i]["label"])["input_ids"]]
    ]
    nats, num_tokens = CompletionNll(model).sum(examples, 512)
    assert nats / num_tokens == pytest.approx(member["held_out_loss"], rel=1e-5)
    assert nats / len(held_out) == pytest.approx(member["held_out_loss_per_sequence"], rel=1e-5)
    answer = model.generate(**tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=24, do_sample=False)
    assert answer[0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("kv_heads", "expected"), [(0, 2), (1, 1)])
def test_key_and_value_heads_are_as_many_as_heads_unless_said_otherwise(data, tmp_path, kv_heads, expected):
    tokenizer = train_bpe(["What is it? It is a plum."], vocab_size=300)
    config = scratch_config(settings(data, tmp_path, kv_heads=kv_heads), tokenizer, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, expected)


def test_same_seed_same_weights_and_another_seed_others(tmp_path, data):
    runs = {n: settings(data, tmp_path / n, seed=s) for n, s in [("a", 1), ("b", 1), ("c", 2)]}
    for config in runs.values():
        train_sft(config, progress=QUIET)
    weights = {n: (tmp_path / n / "model.safetensors").read_bytes() for n in runs}
    assert weights["a"] == weights["b"] != weights["c"]


def losses_of(result):
    return [epoch["train_loss"] for epoch in result["members"][0]["history"]]


def test_micro_batches_leave_the_weights_as_they_were(tmp_path, data):
    found, calls = {}, []
    for tokens in (0, 100, 1):
        out = tmp_path / str(tokens)
        result = train_sft(settings(data, out, microbatch_tokens=tokens, batch_tokens=512), progress=QUIET)
        found[tokens] = (losses_of(result), load_file(out / "model.safetensors"))
        calls.append(result["members"][0]["history"][0]["steps"])
    assert calls == [calls[0]] * 3
    for tokens in (100, 1):
        assert found[tokens][0] == pytest.approx(found[0][0], rel=1e-5)
        for name, one in found[0][1].items():
            assert (found[tokens][1][name] - one).norm() <= 1e-3 * one.norm(), name


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_no_pass_is_larger_than_a_micro_batch(tmp_path, stage):
    rows = [{"prompt": f"Is {i} odd?", "chosen": f"{'yes' * (i % 2)} {i}", "rejected": f"no {i}"} for i in range(40)]
    data, sizes = tmp_path / "rows.jsonl", []
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    knobs = {"eval_fraction": 0.5, "epochs": 1, "batch_tokens": 4096, "microbatch_tokens": 150}
    hook = register_module_forward_pre_hook(
        lambda module, args: sizes.append(args[0].numel()) if isinstance(module, Embedding) else None
    )
    try:
        if stage == "sft":
            train_sft(settings(data, tmp_path / "out", label_column="chosen", **knobs), progress=QUIET)
        else:
            train_reward(RewardConfig(data=str(data), out=str(tmp_path / "out"), **TINY | knobs), progress=QUIET)
    finally:
        hook.remove()
    assert max(sizes) <= 150


def fit_toy(tmp_path, model, config, rows, evaluate=None):
    ranks = Ranks()
    checkpoint = StageCheckpoint(Path(mkdtemp(dir=tmp_path)), config, {}, QUIET, ranks)
    parts = {"checkpoint": checkpoint, "progress": QUIET, "ranks": ranks}
    return fit(model, model, config, rows, evaluate, name="toy", seed=0, **parts)[0]


def test_too_little_memory_halves_the_micro_batches_once(tmp_path, caplog):
    model, passes = torch.nn.Linear(3, 1), []

    def loss(rows):
        passes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(torch.ones(len(rows), 3)).square().sum()

    config = settings("x", "y", epochs=2, microbatch_tokens=6, batch_tokens=8)
    rows = TrainingRows([1] * 8, [1] * 8, loss)
    fit_toy(tmp_path, model, config, rows)
    assert passes == [6, 3, 3, 2, 3, 3, 2]
    assert caplog.text.count("sft.microbatch_tokens is 3 from here on") == 1

    config = settings("x", "y", epochs=1, microbatch_tokens=4, batch_tokens=8)
    rows = TrainingRows([4] * 2, [1] * 2, lambda rows: loss([0] * 4))
    with pytest.raises(
        RuntimeError, match=r"sft\.microbatch_tokens = 4, which one row takes, .*gradient_checkpointing"
    ):
        fit_toy(tmp_path, model, config, rows)


def test_steps_without_a_finite_gradient_are_counted_and_three_in_a_row_are_an_error(tmp_path):
    model, bad = torch.nn.Linear(3, 1), set()

    def loss(rows):
        total = model(torch.ones(len(rows), 3)).square().sum()
        return total + (0 * model.bias.sum()).sqrt() if bad & set(rows) else total  # 0, whose root has no slope

    config = settings("x", "y", epochs=1, batch_tokens=2)
    rows = TrainingRows([1] * 12, [1] * 12, loss)
    order = length_batches(rows.lengths, 2, torch.Generator().manual_seed(0))
    for steps, expected in (([], 0), ([0, 2, 3, 5], 4)):
        bad = {order[step][0] for step in steps}
        [record] = fit_toy(tmp_path, model, config, rows)
        assert (record["steps"], record["bad_steps"]) == (6, expected)
        assert all(p.isfinite().all() for p in model.parameters())
    bad = {order[step][0] for step in (1, 2, 3)}
    with pytest.raises(ValueError, match=r"^toy: loss = [\d.e-]+, no finite gradient in 3 steps in a row, in epoch 1 "):
        fit_toy(tmp_path, model, config, rows)


@pytest.mark.parametrize(("dtype", "states"), [("bfloat16", "float32"), ("float32", "8bit"), ("bfloat16", "8bit")])
def test_narrow_weights_and_moments_train_almost_the_same(tmp_path, data, dtype, states):
    common, changes = {"epochs": 8, "learning_rate": 5e-3}, {"dtype": dtype, "states": states}
    wide, narrow = (
        train_sft(settings(data, tmp_path / name, **common | knobs), progress=QUIET)
        for name, knobs in (("wide", {}), ("narrow", changes))
    )
    assert losses_of(wide)[-1] < 0.7 * losses_of(wide)[0]
    assert losses_of(narrow) == pytest.approx(losses_of(wide), rel=0.02)
    weights = load_file(tmp_path / "narrow" / "model.safetensors").values()
    assert {w.dtype for w in weights} == {getattr(torch, dtype)}


def test_a_fresh_model_in_bfloat16_is_the_one_that_its_folder_holds(tmp_path):
    config = settings("x", "y")
    tokenizer = train_bpe(THINGS, vocab_size=config.vocab)
    fresh = scratch_config(config, tokenizer, 512)
    model = fresh_model(AutoModelForCausalLM, fresh, torch.bfloat16, torch.device("cpu")).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.randint(len(tokenizer), (1, 300), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_checkpointed_layers_train_the_same_weights(tmp_path, data):
    for name in ("plain", "recomputed"):
        config = settings(data, tmp_path / name, gradient_checkpointing=name == "recomputed", epochs=1)
        train_sft(config, progress=QUIET)
    plain, recomputed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "recomputed"))
    assert plain == recomputed


def test_norms_and_gates_with_kernels_leave_the_losses_as_they_were(tmp_path, data, monkeypatch):
    losses, nums = fused_and_plain(
        monkeypatch, lambda i: losses_of(train_sft(settings(data, tmp_path / str(i)), progress=QUIET))
    )
    assert nums == [7, 0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_continued_training_starts_from_the_given_weights(tmp_path, data):
    first = train_sft(settings(data, tmp_path / "a", epochs=6), progress=QUIET)
    second = train_sft(
        settings(data, tmp_path / "b", model=str(tmp_path / "a"), learning_rate=1e-7, epochs=1), progress=QUIET
    )
    before, after = first["members"][0]["held_out_loss"], second["members"][0]["held_out_loss"]
    assert after == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize(("losses", "kept"), [([3.0, 1.0, 2.0], 1), ([3.0, 2.0, 1.0], 2)])
def test_the_weights_of_the_best_epoch_are_kept(tmp_path, losses, kept):
    model = torch.nn.Linear(3, 1)
    seen = []

    def evaluate():
        seen.append(model.weight.detach().clone())
        return {"loss": losses[len(seen) - 1]}

    def loss(rows):
        return model(torch.ones(len(rows), 3)).square().sum()

    config = settings("x", "y", epochs=3, learning_rate=0.1)
    rows = TrainingRows([1] * 8, [1] * 8, loss)
    history = fit_toy(tmp_path, model, config, rows, evaluate)
    assert [h["loss"] for h in history] == losses
    assert torch.equal(model.weight, seen[kept])
    assert not torch.equal(seen[0], seen[1])


def test_members_are_the_single_runs_of_their_seeds(tmp_path, data):
    result = train_sft(settings(data, tmp_path / "m", members=2, seed=5, eval_fraction=0), progress=QUIET)
    assert [m["seed"] for m in result["members"]] == [5, 6]
    train_sft(settings(data, tmp_path / "one", seed=6, eval_fraction=0), progress=QUIET)
    for seed_path in ("m/member-1", "one"):
        assert (tmp_path / seed_path / "tokenizer.json").is_file()
    same = [(tmp_path / p / "model.safetensors").read_bytes() for p in ("m/member-1", "one", "m/member-0")]
    assert same[0] == same[1] != same[2]


def test_lora_members_load_in_peft_and_lower_the_loss(tmp_path, data):
    base = tmp_path / "base"
    train_sft(settings(data, base, learning_rate=2e-2, epochs=10), progress=QUIET)
    frozen = (base / "model.safetensors").read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("It is a", "a or"))
    config = settings(
        other, tmp_path / "l", model=str(base), members=2, lora_r=4, learning_rate=1e-2, batch_tokens=256, epochs=3
    )
    result = train_sft(config, progress=QUIET)

    assert (base / "model.safetensors").read_bytes() == frozen
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    texts = [(r["prompt"] + " Assistant:", " " + r["label"], False) for r in rows]
    _, held_out = split_by_prompt([t[0] for t in texts], 0.05, 42)
    examples, _, _ = encode_examples([texts[i] for i in held_out], tokenizer, config)
    nats, num_tokens = CompletionNll(AutoModelForCausalLM.from_pretrained(base)).sum(examples, 512)
    for m, record in enumerate(result["members"]):
        assert record["held_out_loss"] < 0.8 * nats / num_tokens
        adapted = AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.PeftModel.from_pretrained(adapted, str(tmp_path / "l" / f"member-{m}")).eval()
        total = sum(reference_nll(adapted, e).sum().item() for e in examples)
        assert total / num_tokens == pytest.approx(record["held_out_loss"], rel=1e-5)


def test_half_precision_on_disk(tmp_path, data):
    train_sft(settings(data, tmp_path / "a", epochs=0.5, save_dtype="float16"), progress=QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    for dtype, expected in (("float16", torch.float16), ("auto", torch.float32)):
        knobs = {"model": str(tmp_path / "a"), "lora_r": 2, "epochs": 0.5, "save_dtype": dtype}
        train_sft(settings(data, tmp_path / dtype, **knobs), progress=QUIET)
        adapter = load_file(tmp_path / dtype / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapter.values()} == {expected}


def test_conversations_go_through_the_chat_template(tmp_path):
    tokenizer = train_bpe(["user hello assistant hi"] * 3, vocab_size=280)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tok")
    rows = [
        {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "hi"}]}
        for i in range(8)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = train_sft(
        settings(tmp_path / "chat.jsonl", tmp_path / "o", tokenizer=str(tmp_path / "tok"), eval_fraction=0, epochs=1),
        progress=QUIET,
    )
    # "hi" directly after the template's line break, then EOS
    assert result["num_completion_tokens"] == 8 * (len(tokenizer("hi")["input_ids"]) + 1)
    prompt = len(tokenizer("user: hello 0\nassistant:\n")["input_ids"])
    assert result["num_train_tokens"] == result["num_completion_tokens"] + 8 * prompt


def test_a_chat_model_ends_its_turns_and_keeps_its_generation_config(tmp_path):
    tokenizer = train_bpe(["user hello assistant hi"] * 3, vocab_size=280)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tok")
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<turn>")
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": f"hello {i}", "label": "hi"} for i in range(4)])
    scratch = settings(data, tmp_path / "a", tokenizer=str(tmp_path / "tok"), eval_fraction=0, epochs=1)
    examples, _, _ = encode_examples([("hello", "hi", True), ("hello", " hi", False)], tokenizer, scratch)
    assert [example.ids[-1] for example in examples] == [turn, eos]
    train_sft(scratch, progress=QUIET)
    own = {"eos_token_id": [3, eos], "temperature": 0.6}  # which is read, but not written
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(own))
    train_sft(settings(data, tmp_path / "b", model=str(tmp_path / "a"), eval_fraction=0, epochs=1), progress=QUIET)
    kept = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert {name: kept[name] for name in own} == own | {"eos_token_id": [3, eos, turn]}
    assert kept["do_sample"]


@pytest.mark.parametrize("train", [train_sft, train_reward])
def test_rows_come_from_the_splits_that_are_named(train, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, num in (("train_a", 3), ("train_b", 4), ("test_a", 2), ("test_b", 1)):
        rows = [{"prompt": f"{name} {i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(num)]
        write_rows(data / f"{name}.jsonl", rows)
    splits = {"eval_data": str(data), "split": "train_b", "eval_split": "test_a", "epochs": 1}
    config = {train_sft: SftConfig, train_reward: RewardConfig}[train]
    result = train(config(data=str(data), out=str(tmp_path / "out"), hidden=8, **splits), progress=QUIET)
    assert (result["num_train"], result["num_held_out"]) == (4, 2)


def test_length_batches_hold_every_row_once_within_the_budget():
    generator = torch.Generator().manual_seed(3)
    lengths = [*torch.randint(1, 200, (500,), generator=generator).tolist(), 5000]
    batches = length_batches(lengths, 1024, generator)
    assert sorted(row for batch in batches for row in batch) == list(range(501))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[r] for r in batch) <= 1024
    padded = sum(len(b) * max(lengths[r] for r in b) for b in batches)
    assert padded < 1.1 * sum(lengths)
    assert batches != length_batches(lengths, 1024, generator)


def test_split_keeps_a_prompt_on_one_side():
    prompts = [f"p{i % 10}" for i in range(100)]
    train, held_out = split_by_prompt(prompts, 0.2, 7)
    assert len(held_out) == 20
    assert not {prompts[i] for i in train} & {prompts[i] for i in held_out}
    assert sorted(train + held_out) == list(range(100))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(0.75 * math.pi))]),
    ],
)
def test_schedule(schedule, expected):
    config = settings("x", "y", schedule=schedule, warmup_ratio=0.34, learning_rate=1.0)
    optim = optim_config(config, 6)
    assert [learning_rate(optim, step, 6) for step in range(6)] == pytest.approx(expected)


def test_plateau_is_the_first_epoch_that_no_later_one_beats():
    assert plateau_epoch([3.0, 2.0, 1.999, 1.998]) == 2
    assert plateau_epoch([3.0, 2.0, 2.5, 1.0]) is None
    assert plateau_epoch([3.0, 3.1]) == 1
    assert plateau_epoch([3.0]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "sft.data: a value is required"),
        ({"out": ""}, "sft.out: a value is required"),
        ({"learning_rate": -1.0}, "sft.learning_rate = -1.0: must be > 0"),
        ({"learning_rate": math.nan}, "sft.learning_rate = nan: must be > 0"),
        ({"epochs": 0}, "sft.epochs = 0: must be > 0"),
        ({"batch_tokens": 0}, "sft.batch_tokens = 0: must be >= 1"),
        ({"members": 0}, "sft.members = 0: must be >= 1"),
        ({"vocab": 100}, "sft.vocab = 100: must be >= 258"),
        ({"eval_fraction": 0.95}, "sft.eval_fraction = 0.95: must be <= 0.9"),
        ({"arch": "bert"}, "sft.arch = 'bert': not one of llama, qwen2"),
        ({"schedule": "step"}, "sft.schedule = 'step': not one of cosine, linear, constant"),
        ({"heads": 3}, "sft.heads = 3: must divide hidden = 32 into an even size"),
        ({"heads": 2, "kv_heads": 4}, "sft.kv_heads = 4: must divide heads = 2"),
        ({"lora_r": 8}, "sft.lora_r = 8: adapters need a model"),
        ({"task": "nope"}, "task = 'nope'"),
    ],
)
def test_a_bad_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        settings(**({"data": "x", "out": "y"} | changes))


def test_bad_data_and_models_are_named_and_leave_nothing(tmp_path, data):
    no_label = tmp_path / "no.jsonl"
    no_label.write_text('{"prompt": "a", "label": "b"}\n{"prompt": "c", "label": ""}\n')
    empty, adapter = tmp_path / "folder", tmp_path / "adapter"
    empty.mkdir()
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    cases = [
        (
            settings(no_label, tmp_path / "o"),
            r"no.jsonl: row 2 has no completion \(column label\); its columns: prompt, label \(",
        ),
        (settings(data, tmp_path / "o", prompt_column="ask"), r"no prompt \(column ask\).* \(prompt_column names"),
        (settings(data, tmp_path / "o", chat_template=True), "chat_template = true: the tokenizer has no chat"),
        (settings(tmp_path / "none.jsonl", tmp_path / "o"), "none.jsonl: no such file"),
        (settings(data, tmp_path / "o", model=str(empty)), "sft.model = .*folder: cannot be loaded as a tokenizer"),
        (
            settings(data, tmp_path / "o", model=str(adapter)),
            "sft.model = .*adapter: an adapter; a stage begins from a",
        ),
        (settings(data, tmp_path / "o", tokenizer=str(empty)), "sft.tokenizer = .*folder: cannot be loaded"),
        (settings(data, tmp_path / "o", device="cuda:99"), "sft.device = cuda:99: this machine has"),
        (settings(data, tmp_path / "o", learning_rate=1e30, epochs=4), "loss = .* in epoch . at learning_rate = 1e"),
        (settings(data, tmp_path), "sft.out = .*: already there"),
        (settings(f"{data}[:1]", tmp_path / "o", eval_fraction=0.9), "no training rows left"),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            train_sft(config, progress=QUIET)
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_model_that_does_not_fit_is_named(tmp_path, data, tiny):
    tokenizer = train_bpe(["x"], vocab_size=258)
    no_eos = train_bpe(["x"], vocab_size=258)
    no_eos.eos_token = None
    no_eos.save_pretrained(tmp_path / "no-eos")
    tiny.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    short = LlamaConfig(**(tiny.config.to_dict() | {"vocab_size": 258, "max_position_embeddings": 8}))
    LlamaForCausalLM(short).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    for changes, message in [
        ({"tokenizer": str(tmp_path / "no-eos")}, "sft.tokenizer = .*no-eos: its tokenizer has no EOS token"),
        ({"model": str(tmp_path / "small")}, "sft.model = .*small: 50 embeddings for a tokenizer of 258 tokens"),
        ({"model": str(tmp_path / "short")}, "sft.model = .*short: 8 positions for rows of"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_sft(settings(data, tmp_path / "o", **changes), progress=QUIET)
