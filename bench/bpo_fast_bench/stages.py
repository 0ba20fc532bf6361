"""`bpo-fast bench stages`: one optimizer step of SFT and of a reward model, ours against TRL's trainers, in one run.

Same model, same rows, same batch, no dropout. The loss of SFT is that of the completions alone, for both. TRL is timed
with its default loss and with `chunked_nll`, which makes logits a chunk at a time; its `padding_free` needs flash
attention, and the sequences here are of one length, so nothing is padded. With bfloat16 weights ours have float32
masters, TRL's have none.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from bpo_fast_bench.contenders import (
    LENGTHS,
    LORA_RANK,
    Case,
    Options,
    Work,
    compare,
    make_texts,
    measure,
    now,
    run_rows,
    serve,
    trl_blocks,
)

STAGES = {"sft": 0, "sft-lora": 1, "reward": 0}  # members
PEERS = ("trl", "trl-chunked")


@dataclass(frozen=True)
class StageOptions(Options):
    """`forms` are names in `STAGES`; a pair is a prompt and its completion, or, for `reward`, its two."""

    lengths: tuple[str, ...] = ("tldr", "helpfulness")
    forms: tuple[str, ...] = tuple(STAGES)
    peers: tuple[str, ...] = PEERS
    steps: int = 4


def run(options: StageOptions, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Measures every case; see `run_rows`."""
    known = {"lengths": tuple(LENGTHS), "forms": tuple(STAGES), "peers": PEERS}
    return run_rows(options, known, [[form] for form in options.forms], _measure, say)


def _measure(options: StageOptions, lengths: str, forms: Sequence[str], folder: str) -> list[dict[str, Any]]:
    (form,) = forms
    peers = [peer for peer in options.peers if form != "reward" or peer == "trl"]
    contenders = {
        who: options.contender("stages", f"{who} {form}", lengths, STAGES[form], folder) for who in ("ours", *peers)
    }
    found = measure(contenders, options.rounds)
    return [compare(found, "ours", peers, runs=1, lengths=lengths, form=options.row_form(form))]


def _ours(case: Case, form: str) -> Iterator[Any]:
    from bpo_fast.fused_layers import fuse_layers_
    from bpo_fast.ranks import Ranks
    from bpo_fast.stage_config import RewardConfig, SftConfig
    from bpo_fast.stages import Steps

    texts = make_texts(case)
    config_class = RewardConfig if form == "reward" else SftConfig
    config = config_class(data="rows", out="out", model=case.model, learning_rate=1e-5, weight_decay=0.0)
    with ExitStack() as active:
        model, trained, rows = (_pair_rows if form == "reward" else _completion_rows)(case, texts, active)
        fuse_layers_(model.train())
        steps = Steps(list(trained.parameters()), config, rows, num=10**6, ranks=Ranks())
        yield Work()
        size = case.pairs
        for block in range(case.num_blocks):
            start = now(case.device)
            for first in range(block * case.steps * size, (block + 1) * case.steps * size, size):
                steps.take(list(range(first, first + size)))
            yield now(case.device) - start


def _completion_rows(case: Case, texts: Sequence[dict[str, str]], active: ExitStack) -> tuple[Any, Any, Any]:
    import transformers

    from bpo_fast.lora import LoraEnsemble
    from bpo_fast.sft import CompletionNll, Example, training_rows

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype=case.dtype)
    model = loaded.to(case.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.model)
    examples = []
    for row in texts:
        prompt, target = (tokenizer(row[k], add_special_tokens=False)["input_ids"] for k in ("prompt", "chosen"))
        examples.append(Example((*prompt, *target, tokenizer.eos_token_id), len(target) + 1))
    nll, trained = CompletionNll(model, examples[:2]), model
    if case.members:
        trained = LoraEnsemble(model, num_members=1, r=LORA_RANK, alpha=2.0 * LORA_RANK, seed=0)
        active.enter_context(trained.member(0))
    return model, trained, training_rows(nll, examples)


def _pair_rows(case: Case, texts: Sequence[dict[str, str]], active: ExitStack) -> tuple[Any, Any, Any]:
    import transformers

    from bpo_fast.annotate.reward_model import RewardScorer
    from bpo_fast.reward import TextPair, close_pairs_with_eos, training_rows

    tokenizer = transformers.AutoTokenizer.from_pretrained(case.model)
    close_pairs_with_eos(tokenizer)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(case.model, num_labels=1, dtype=case.dtype)
    scorer = RewardScorer(loaded.to(case.device), tokenizer, name="reward")
    pairs = [TextPair(row["prompt"], row["chosen"], row["rejected"]) for row in texts]
    return loaded, loaded, training_rows(scorer, pairs)


def _trl(case: Case, peer: str, form: str) -> Iterator[Any]:
    import transformers
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    texts = make_texts(case)

    def make_trainer(settings: dict[str, Any], **parts: Any) -> Any:
        if form == "reward":
            args = RewardConfig(**settings, max_length=None, disable_dropout=True)
            return RewardTrainer(args=args, train_dataset=Dataset.from_list(texts), **parts)
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in texts]
        loss: dict[str, Any] = {"loss_type": "chunked_nll"} if peer == "trl-chunked" else {}
        args = SFTConfig(**settings, **loss, max_length=None, completion_only_loss=True)
        return SFTTrainer(args=args, train_dataset=Dataset.from_list(rows), **parts)

    if form != "reward":
        return trl_blocks(case, make_trainer)
    return trl_blocks(case, make_trainer, transformers.AutoModelForSequenceClassification, num_labels=1)


if __name__ == "__main__":
    CASE = Case(**json.loads(sys.argv[1]))
    WHO, FORM = CASE.who.split()
    serve(CASE, _ours(CASE, FORM) if WHO == "ours" else _trl(CASE, WHO, FORM))
