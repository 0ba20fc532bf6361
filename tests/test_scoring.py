import dataclasses
import random
import threading
import time

import pytest
import torch
from tiny_world import answer, question

from bpo_fast import config as configs
from bpo_fast import scoring
from bpo_fast.annotate import Checked
from bpo_fast.engine import by_length
from bpo_fast.metrics import read_metrics
from bpo_fast.scoring import PairScorer
from bpo_fast.train import train
from bpo_fast.types import Completion, Prompt

PROMPTS = [Prompt(7 * i, question(i), (5,) * (3 + (5 * i) % 11)) for i in range(23)]
COMPLETIONS = [
    Completion(p.id, s, (1, s), " " + answer(i + s), False, 0, 0) for i, p in enumerate(PROMPTS) for s in range(2)
]
SHORT_FIRST = [c for i in by_length(PROMPTS) for c in COMPLETIONS[2 * i : 2 * i + 2]]


class Recorder:
    """Answers with the position of the question, as an annotator with a state would."""

    def __init__(self, pause_s: float = 0.0):
        self.asked, self.threads, self._pause_s = [], set(), pause_s

    def score(self, prompts, completions):
        assert [p.id for p in prompts] == [c.prompt_id for c in completions]
        time.sleep(self._pause_s)
        start = sum(map(len, self.asked))
        self.asked.append([(c.prompt_id, c.sample_id) for c in completions])
        self.threads.add(threading.current_thread())
        return [float(start + i) for i in range(len(completions))]


def run(annotator, overlap, order, parts=5):
    with PairScorer(Checked("toy", annotator), PROMPTS, overlap=overlap) as scorer:
        for i in range(0, len(order), parts):
            scorer.add(order[i : i + parts])
        return scorer.scores()


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr(scoring, "GROUP_PAIRS", 4)


def test_questions_and_scores_are_the_same_in_whatever_order_completions_finish():
    plain = Recorder()
    wanted = run(plain, False, COMPLETIONS)
    assert len(wanted) == len(PROMPTS)
    assert [len(group) for group in plain.asked] == [8, 8, 8, 8, 8, 6]
    assert plain.threads == {threading.main_thread()}
    for seed in range(5):
        shuffled, overlapped = random.Random(seed).sample(COMPLETIONS, len(COMPLETIONS)), Recorder()
        assert run(overlapped, True, shuffled) == wanted
        assert overlapped.asked == plain.asked
        assert threading.main_thread() not in overlapped.threads
        assert len(overlapped.threads) == 1


def test_a_reward_model_gives_the_same_bits(tmp_path, tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from bpo_fast.annotate.reward_model import RewardScorer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).eval()
    annotator = RewardScorer(model, tiny_tokenizer, name="rm", batch_tokens=256)
    wanted = run(annotator, False, COMPLETIONS)
    assert len({score for both in wanted.values() for score in both}) > 20
    assert run(annotator, True, COMPLETIONS[::-1]) == wanted


def test_groups_are_scored_while_others_are_still_to_come():
    slow = Recorder(pause_s=0.05)
    with PairScorer(Checked("slow", slow), PROMPTS, overlap=True) as scorer:
        for completion in SHORT_FIRST:
            time.sleep(0.01)
            scorer.add([completion])
        start = time.perf_counter()
        scorer.scores()
        waited_s = time.perf_counter() - start
    assert scorer.busy_s >= 6 * 0.05
    assert waited_s < scorer.busy_s / 2


def test_an_annotator_that_fails_stops_the_sampling_at_once():
    class Failing(Recorder):
        def score(self, prompts, completions):
            super().score(prompts, completions)
            return [1.0]

    failing, num_sampled = Failing(), 0
    with PairScorer(Checked("toy", failing), PROMPTS, overlap=True) as scorer:

        def sample():
            nonlocal num_sampled
            for completion in SHORT_FIRST:
                scorer.add([completion])
                num_sampled += 1
                time.sleep(0.01)

        with pytest.raises(ValueError, match="annotator toy: 1 scores for 8 completions"):
            sample()
    assert num_sampled < len(COMPLETIONS)
    assert len(failing.asked) < 6


def test_an_interrupt_does_not_wait_for_an_annotator_that_hangs():
    goes_on, begun = threading.Event(), threading.Event()

    class Hanging(Recorder):
        def score(self, prompts, completions):
            begun.set()
            goes_on.wait(30)
            return super().score(prompts, completions)

    hanging = Hanging()

    def interrupted():
        with PairScorer(Checked("hanging", hanging), PROMPTS, overlap=True) as scorer:
            scorer.add(COMPLETIONS)
            begun.wait(30)
            raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.perf_counter() - start < 10
    goes_on.set()
    time.sleep(0.2)
    assert len(hanging.asked) <= 1  # groups that had not begun never do


@pytest.mark.parametrize("overlap", [True, False])
def test_what_the_engine_gave_up_is_not_asked_about(overlap):
    lost = {(PROMPTS[2].id, 1), (PROMPTS[9].id, 0)}
    completions = [
        dataclasses.replace(c, ids=(), text="") if (c.prompt_id, c.sample_id) in lost else c for c in COMPLETIONS
    ]
    recorder = Recorder()
    scores = run(recorder, overlap, completions)
    assert {i for i, both in scores.items() if both == (None, None)} == {i for i, _ in lost}
    asked = [key for group in recorder.asked for key in group]
    assert set(asked) == {(p.id, s) for p in PROMPTS for s in range(2) if p.id not in {i for i, _ in lost}}
    assert len(asked) == 2 * (len(PROMPTS) - 2)


def test_a_run_has_the_same_pairs_with_and_without_overlap(tiny_model_dir, tiny_data, tmp_path):
    seconds = {}
    for overlap in (True, False):
        values = {
            "model.path": str(tiny_model_dir),
            "model.lora_r": 4,
            "data.path": str(tiny_data.train),
            "sampling.engine": "hf",
            "sampling.batch_size": 8,
            "sampling.max_new_tokens": 8,
            "annotator.path": "toy_annotator:letters",
            "annotator.overlap": overlap,
            "method.pairs": 24,
            "method.batch_pairs": 4,
            "eval.prompts": 0,
            "run.output_dir": str(tmp_path / str(overlap)),
        }
        train(configs.load(None, values), quiet=True)
        lines = [line for line in read_metrics(tmp_path / str(overlap)) if line["kind"] == "phase"]
        seconds[overlap] = [line["timing/annotate_overlapped_s"] for line in lines]
    for path in (tmp_path / "True" / "pairs").iterdir():
        assert path.read_bytes() == (tmp_path / "False" / "pairs" / path.name).read_bytes()
    assert len(seconds[True]) == len(seconds[False]) == 2
    assert max(seconds[False]) < 1e-3
    assert all(s >= 0 for s in seconds[True])
