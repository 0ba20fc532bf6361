import dataclasses
import io
import json
import math

import pytest
import torch
from fused_runs import fused_and_plain
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from bpo_fast.annotate.reward_model import Answered, RewardModel, RewardScorer
from bpo_fast.progress import Progress
from bpo_fast.reward import RewardConfig, TextPair, calibration, measure, proportion, swap_answers, train_reward
from bpo_fast.tokenizer import train_bpe
from bpo_fast.types import Completion, Prompt, Turn

QUIET = Progress(quiet=True)
TINY = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "vocab": 300, "device": "cpu"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
COLORS = ["red", "blue", "green", "pink"]
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    """Separable: the chosen answer says good, the rejected one bad, among words that mean nothing."""
    rows = [
        {
            "prompt": f"Is {COLORS[i % 4]} {i} nice?",
            "chosen": f"{COLORS[i % 3]} is good" + " indeed" * (i % 3),
            "rejected": f"{COLORS[i % 3]} is bad" + " indeed" * (i // 3 % 3),
        }
        for i in range(160)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


def settings(data, out, **changes):
    base = {"data": str(data), "out": str(out), "epochs": 3, "batch_tokens": 512, "learning_rate": 5e-3}
    return RewardConfig(**(base | {"eval_fraction": 0.25} | TINY | changes))


def llama_scorer(**changes):
    torch.manual_seed(0)
    tokenizer = changes.pop("tokenizer", None) or train_bpe(["hello there friend"] * 3, vocab_size=270)
    options = {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "num_labels": 1, "pad_token_id": 0}
    model = LlamaForSequenceClassification(LlamaConfig(**(SMALL | options | changes))).eval()
    # the random head is so flat that a wrong row would go unnoticed
    model.score.weight.data.mul_(50)
    return RewardScorer(model, tokenizer, name="tiny")


def bert_scorer():
    torch.manual_seed(0)
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "how", "are", "you", "fine", "bad", "thanks"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    config = BertConfig(**SMALL, vocab_size=len(words), max_position_embeddings=16, num_labels=1)
    model = BertForSequenceClassification(config).eval()
    model.classifier.weight.data.mul_(50)
    model.bert.pooler.dense.weight.data.mul_(20)
    return RewardScorer(model, tokenizer, name="bert")


def prompt(text, i=0):
    return Prompt(id=i, text=text, ids=(1,))


def completion(text, i=0):
    return Completion(prompt_id=i, sample_id=0, ids=(1,), text=text, truncated=False, policy_version=0, seed=0)


@pytest.mark.parametrize("make", [llama_scorer, bert_scorer])
def test_scores_do_not_depend_on_the_batch(make):
    scorer = make()
    texts = [Answered("how are you", "fine" + " thanks" * n) for n in range(7)]
    texts += [Answered("you", "bad"), Answered("how", "")]
    together = scorer.score_texts(texts)
    alone = [scorer.score_texts([t])[0] for t in texts]
    scorer.batch_tokens = 30
    bucketed = scorer.score_texts(texts)
    assert together == pytest.approx(alone, abs=1e-5)
    assert together == pytest.approx(bucketed, abs=1e-5)
    assert len({round(s, 4) for s in together}) == len(texts)


def test_a_decoder_scores_the_plain_pair_encoding_at_its_last_token():
    scorer = llama_scorer()
    got = scorer.score_texts([Answered("hello", "there friend"), Answered("hello friend hello", "x")])
    for text, score in zip([("hello", " there friend"), ("hello friend hello", " x")], got, strict=True):
        ids = torch.tensor([[i for t in text for i in scorer.tokenizer(t)["input_ids"]]])
        hidden = scorer.model.model(input_ids=ids).last_hidden_state[0, -1]
        assert score == pytest.approx(scorer.model.score(hidden).item(), abs=1e-5)


def test_an_encoder_scores_what_its_tokenizer_makes_of_a_pair():
    scorer = bert_scorer()
    inputs = scorer.tokenizer("how are you", "fine thanks", return_tensors="pt")
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    expected = scorer.model(**inputs).logits.item()
    assert scorer.score([prompt("how are you")], [completion(" fine thanks")]) == pytest.approx([expected], abs=1e-5)


def test_truncation_keeps_the_completion_and_the_end_of_the_prompt():
    scorer = bert_scorer()
    ids = scorer.tokenizer.convert_tokens_to_ids
    long_prompt = Answered("how " * 20 + "are you", "fine thanks")
    encoded = scorer.encode([long_prompt])[0].ids.tolist()
    assert len(encoded) == scorer.max_length == 16
    assert encoded[-6:] == ids(["are", "you", "[SEP]", "fine", "thanks", "[SEP]"])
    too_long = scorer.encode([Answered("how are", "bad " + "fine " * 40)])[0].ids.tolist()
    assert too_long == ids(["[CLS]", "[SEP]", "bad"] + ["fine"] * 12 + ["[SEP]"])


def test_a_chat_template_gets_turns_without_the_cue():
    tokenizer = train_bpe(["hello there friend"] * 3, vocab_size=270)
    tokenizer.chat_template = CHAT
    scorer = llama_scorer(tokenizer=tokenizer)
    for text in ("hello? Assistant:", "hello?"):
        encoded = scorer.encode([Answered(text, " friend ")])[0].ids.tolist()
        assert tokenizer.decode(encoded) == "<user>hello?\n<assistant>friend\n"
    templated = Prompt(0, "<|policy|>hello?<|bot|>", (1,), plain="hello? Assistant:")
    assert scorer.score([templated], [completion("friend")]) == scorer.score_texts([Answered("hello?", "friend")])
    scorer.max_length = 5
    assert len(scorer.encode([Answered("hello?", "friend")])[0].ids) == 5


def test_a_chat_template_gets_the_turns_of_a_conversation(caplog):
    tokenizer = train_bpe(["hello there friend"] * 3, vocab_size=270)
    tokenizer.chat_template = CHAT
    scorer = llama_scorer(tokenizer=tokenizer)
    turns = (Turn("system", "Be kind."), Turn("user", "hello?"), Turn("assistant", "there"), Turn("user", "friend?"))
    asked = "system: Be kind. Human: hello? Assistant: there Human: friend? Assistant:"
    text = Answered(asked, " hello", turns)
    shown = "<system>Be kind.\n<user>hello?\n<assistant>there\n<user>friend?\n<assistant>hello\n"
    assert tokenizer.decode(scorer.encode([text])[0].ids.tolist()) == shown
    of_run = Prompt(0, "<|policy|>...", (1,), plain=asked, turns=turns)
    assert scorer.score([of_run], [completion("hello")]) == scorer.score_texts([text])
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT
    one_turn = f"<user>{asked.removesuffix(' Assistant:')}\n<assistant>hello\n"
    for _ in range(2):
        assert tokenizer.decode(scorer.encode([text])[0].ids.tolist()) == one_turn
    said = "tiny: its chat template refuses a conversation, shown as one turn: no system"
    assert [record.message for record in caplog.records] == [said]
    plain = llama_scorer()
    assert plain.score_texts([text]) == plain.score_texts([Answered(asked, "hello")])


def test_an_answer_scores_the_same_with_or_without_its_leading_space():
    scorer = llama_scorer()
    a, b = scorer.score_texts([Answered("hello:", "there"), Answered("hello:", " there")])
    assert a == b


def test_training_separates_and_the_folder_scores_the_same(tmp_path, data):
    out = tmp_path / "rm"
    result = train_reward(settings(data, out), progress=QUIET)
    assert json.loads((out / "reward.json").read_text()) == json.loads(json.dumps(result))
    held_out = result["held_out"]
    assert held_out["num"] == result["num_held_out"] == 40
    assert held_out["accuracy"] >= 0.95
    assert held_out["interval_95"][0] <= held_out["accuracy"] <= held_out["interval_95"][1]
    assert held_out["log_loss"] < 0.3
    assert sum(group["num"] for group in held_out["by_length"].values()) == 40
    assert sum(b["num"] for b in held_out["calibration"]["bins"]) == 40

    model = RewardModel(str(out), device="cpu")
    question = "Is red 3 nice? Assistant:"
    good, bad = model.score([prompt(question)] * 2, [completion(" red is good"), completion(" red is bad")])
    assert good > bad
    # plain transformers gives the same number: pair encoding, EOS at the end, one label
    plain = AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer(question, " red is good", return_tensors="pt")
    assert inputs["input_ids"][0, -1] == tokenizer.eos_token_id
    assert plain(input_ids=inputs["input_ids"]).logits.item() == pytest.approx(good, abs=1e-5)


def test_same_seed_same_weights(tmp_path, data):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train_reward(settings(data, tmp_path / name, seed=seed, epochs=1), progress=QUIET)
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_a_qwen2_reward_model_keeps_its_pair_encoding(tmp_path, data):
    train_reward(settings(data, tmp_path / "rm", arch="qwen2", epochs=0.5), progress=QUIET)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    parts = [tokenizer(t)["input_ids"] for t in ("Is it?", " Yes.")]
    assert tokenizer("Is it?", " Yes.")["input_ids"] == [*parts[0], *parts[1], tokenizer.eos_token_id]


@pytest.mark.filterwarnings("error::FutureWarning")
def test_checkpointed_layers_train_the_same_weights(tmp_path, data):
    for name in ("plain", "recomputed"):
        config = settings(data, tmp_path / name, gradient_checkpointing=name == "recomputed", epochs=1)
        train_reward(config, progress=QUIET)
    plain, recomputed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "recomputed"))
    assert plain == recomputed


def test_norms_and_gates_with_kernels_leave_the_losses_as_they_were(tmp_path, data, monkeypatch):
    def losses_of(i):
        result = train_reward(settings(data, tmp_path / str(i), epochs=1), progress=QUIET)
        return [epoch["train_loss"] for epoch in result["history"]]

    losses, nums = fused_and_plain(monkeypatch, losses_of)
    assert nums == [7, 0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_policy_lends_its_backbone(tmp_path, data):
    tokenizer = train_bpe(["is it good or bad"] * 3, vocab_size=280)
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=len(tokenizer), tie_word_embeddings=True))
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    config = settings(data, tmp_path / "rm", model=str(tmp_path / "policy"), learning_rate=1e-9, epochs=0.1)
    train_reward(config, progress=QUIET)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    for (name, got), (_, start) in zip(reward.model.named_parameters(), policy.model.named_parameters(), strict=True):
        torch.testing.assert_close(got, start, rtol=0, atol=1e-6, msg=name)
    assert reward.score.weight.abs().sum() > 0
    # the policy's own tokenizer is left as it was
    assert AutoTokenizer.from_pretrained(tmp_path / "policy")("a", "b")["input_ids"][-1] != tokenizer.eos_token_id


def test_reference_text_against_samples(tmp_path):
    rows = [{"prompt": f"Number {i}?", "label": "a careful answer"} for i in range(60)]
    samples = [
        {"prompt": f"Number {i}? Assistant:", "completion": " junk" * (i % 3)} for i in range(60) for _ in range(2)
    ]
    config = settings(
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "rm",
        samples=write_rows(tmp_path / "samples.jsonl", samples),
    )
    result = train_reward(config, progress=QUIET)
    assert (result["num_train"], result["num_held_out"]) == (90, 30)
    part = dataclasses.replace(config, data=f"{config.data}[40:]", out=str(tmp_path / "part"), epochs=1)
    said = io.StringIO()
    part_result = train_reward(part, progress=Progress(console=Console(file=said, width=500)))
    assert (part_result["num_train"], part_result["num_held_out"]) == (30, 10)
    assert "samples: 40 of 120 rows have a prompt of" in said.getvalue()
    assert result["held_out"]["accuracy"] >= 0.95
    good, bad = RewardModel(str(tmp_path / "rm")).score_texts(
        [Answered("Number 7? Assistant:", answer) for answer in ("a careful answer", "")]
    )
    assert good > bad


def test_swapped_pairs_teach_relevance(tmp_path):
    rows = [
        {"prompt": f"Say {COLORS[i % 4]}", "chosen": COLORS[i % 4], "rejected": COLORS[(i + 1 + i // 4 % 3) % 4]}
        for i in range(200)
    ]
    result = train_reward(
        settings(
            write_rows(tmp_path / "rows.jsonl", rows),
            tmp_path / "rm",
            swapped=1.0,
            epochs=12,
            eval_fraction=0,
            batch_tokens=256,
        ),
        progress=QUIET,
    )
    assert result["num_train"] == 400
    model = RewardModel(str(tmp_path / "rm"))
    pairs = [TextPair(f"Say {c} Assistant:", f" {c}", f" {other}") for c in COLORS for other in COLORS if other != c]
    report = measure(model, pairs, seed=0)
    # 10 of 12 and more over many seeds; whoever does not read the prompt gets 6
    assert min(report["accuracy"], report["swapped"]["accuracy"]) > 0.7


def test_swapped_answers_come_from_other_prompts():
    pairs = [TextPair(f"p{i % 3}", f"c{i}", "r") for i in range(9)]
    swapped = swap_answers(pairs, 20, seed=1)
    owner = {p.chosen: p.prompt for p in pairs}
    assert len(swapped) == 20
    for p in swapped:
        assert owner[p.chosen] == p.prompt != owner[p.rejected]
    assert swap_answers([TextPair("p", "a", "b")] * 3, 5, seed=1) == []


def test_wilson_interval():
    # 9 of 10: the Wilson interval is (0.5958, 0.9821)
    got = proportion(torch.tensor([True] * 9 + [False]))
    assert got["accuracy"] == 0.9
    assert got["interval_95"] == pytest.approx([0.59585, 0.98212], abs=1e-4)
    assert proportion(torch.tensor([True] * 4))["interval_95"][1] == 1.0
    lows = [proportion(torch.zeros(n, dtype=torch.bool))["interval_95"][0] for n in range(1, 12)]
    assert {str(low) for low in lows} == {"0.0"}


def test_calibration_compares_confidence_with_accuracy():
    # sigmoid(1.0986) = 0.75; right 3 times of 4: calibrated
    margins = torch.tensor([math.log(3)] * 3 + [-math.log(3)], dtype=torch.float64)
    assert calibration(margins)["ece"] == pytest.approx(0.0, abs=1e-12)
    # always sure, right half of the time: off by one half
    report = calibration(torch.tensor([50.0, -50.0], dtype=torch.float64))
    assert report["ece"] == pytest.approx(0.5)
    assert report["bins"] == [{"from": 0.95, "num": 2, "confidence": pytest.approx(1.0), "accuracy": 0.5}]


def test_measure_sees_a_length_bias():
    class Longer(RewardScorer):
        def __init__(self):
            self.name = "longer"

        def score_texts(self, texts):
            return [float(len(text.completion)) for text in texts]

    pairs = [TextPair("p", "aaa", "a"), TextPair("q", "a", "aaa"), TextPair("r", "bb", "cc"), TextPair("s", "dd", "d")]
    report = measure(Longer(), pairs, seed=0)
    assert report["accuracy"] == 0.5
    groups = {name: (g["accuracy"], g["num"]) for name, g in report["by_length"].items()}
    assert groups == {"chosen_longer": (1.0, 2), "chosen_shorter": (0.0, 1), "same_length": (0.0, 1)}
    margins = torch.tensor([2.0, -2.0, 0.0, 1.0])
    assert report["log_loss"] == pytest.approx(-torch.sigmoid(margins).log().mean().item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swapped": -1.0}, "reward.swapped = -1.0: must be >= 0"),
        ({"batch_tokens": 0}, "reward.batch_tokens = 0: must be >= 1"),
        ({"task": "nope"}, "task = 'nope'"),
        ({"data": ""}, "reward.data: a value is required"),
    ],
)
def test_a_bad_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**({"data": "x", "out": "y"} | changes))


def test_bad_data_is_named_and_leaves_nothing(tmp_path, data):
    no_chosen = write_rows(tmp_path / "c.jsonl", [{"prompt": "a", "chosen": "", "rejected": "b"}])
    no_rejected = write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "chosen": "b"}])
    labels = write_rows(tmp_path / "l.jsonl", [{"prompt": "a", "label": "b"}])
    stranger = write_rows(tmp_path / "s.jsonl", [{"prompt": "other", "completion": "c"}])
    no_text = write_rows(tmp_path / "t.jsonl", [{"prompt": "a"}])
    (tmp_path / "empty").mkdir()
    cases = [
        (settings(no_chosen, tmp_path / "o"), r"c.jsonl: row 1 has no chosen; .*\(chosen_column names"),
        (settings(no_rejected, tmp_path / "o"), r"row 1 has no rejected; its columns: prompt, chosen \(rejected_"),
        (settings(labels, tmp_path / "o", samples=stranger), "s.jsonl: no sample has a prompt of .*l.jsonl"),
        (settings(labels, tmp_path / "o", samples=no_text), "t.jsonl: row 1 has no completion"),
        (settings(no_text, tmp_path / "o", samples=stranger), "t.jsonl: row 1 has no label"),
        (settings(data, tmp_path), "reward.out = .*: already there"),
        (settings(data, tmp_path / "o", model=str(tmp_path / "empty")), "reward.model = .*empty: cannot be loaded"),
        (settings(f"{data}[:1]", tmp_path / "o", eval_fraction=0.9), "no training rows left"),
        (settings(data, tmp_path / "o", learning_rate=1e30), "loss = .* in epoch"),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            train_reward(config, progress=QUIET)
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_folder_that_is_no_reward_model_is_named(tmp_path):
    tokenizer = train_bpe(["x"], vocab_size=258)
    options = SMALL | {"vocab_size": 258, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**options)).save_pretrained(tmp_path / "policy")
    LlamaForSequenceClassification(LlamaConfig(**options, num_labels=2)).save_pretrained(tmp_path / "two")
    LlamaForSequenceClassification(LlamaConfig(**(options | {"vocab_size": 99}), num_labels=1)).save_pretrained(
        tmp_path / "small"
    )
    (tmp_path / "empty").mkdir()
    LlamaForSequenceClassification(LlamaConfig(**options, num_labels=1)).save_pretrained(tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    for name in ("policy", "two", "small", "torn"):
        tokenizer.save_pretrained(tmp_path / name)
    for name, message in [
        ("policy", "policy: LlamaForCausalLM is not a sequence-classification model"),
        ("two", "two: num_labels = 2: a reward model has one"),
        ("small", "small: 99 embeddings for a tokenizer of 258 tokens"),
        ("empty", "empty: cannot be loaded as a model"),
        ("torn", "torn: cannot be loaded as a model"),
        ("nowhere", "nowhere: no such folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            RewardModel(str(tmp_path / name), device="cpu")
    with pytest.raises(ValueError, match="policy: device = cuda:99: this machine has"):
        RewardModel(str(tmp_path / "policy"), device="cuda:99")
    with pytest.raises(ValueError, match="batch_tokens = 0: must be >= 1"):
        RewardScorer(llama_scorer().model, tokenizer, name="tiny", batch_tokens=0)


def test_a_score_that_is_no_number_is_named():
    scorer = llama_scorer()
    prompts, completions = [prompt("hello", 4), prompt("friend", 9)], [completion("a", 4), completion("b", 9)]
    marker = scorer.tokenizer("friend")["input_ids"][0]
    scorer.model.model.embed_tokens.weight.data[marker] = math.nan
    with pytest.raises(ValueError, match="tiny: score of prompt 9 sample 0 is nan"):
        scorer.score(prompts, completions)
    with pytest.raises(ValueError, match="tiny: 2 prompts for 1 completions"):
        scorer.score(prompts, completions[:1])
    with pytest.raises(ValueError, match="tiny: 1 held-out scores are not finite"):
        measure(scorer, [TextPair("hello", "\nfriend", " hello")], seed=0)
    assert scorer.score([], []) == []
