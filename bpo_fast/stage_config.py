"""Settings of the stages before the loop; imports no torch, so that the command line can show them."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from bpo_fast.config import LABEL_COLUMNS, PROMPT_COLUMNS, check_rules, knob, one_of
from bpo_fast.tasks import get_task
from bpo_fast.tokenizer import MIN_VOCAB

ARCHS = ("llama", "qwen2")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class StageConfig:
    """Settings that SFT and reward-model training share; every field is a flag of the same name.

    Attributes:
        stage: the name of the command.
    """

    stage: ClassVar[str]

    data: str = knob("", "training rows: file, folder or Hub id, `name[:n]` for the first n rows")
    out: str = knob("", "folder to write; it must not exist yet, or be empty")
    eval_data: str | None = knob(None, "held-out rows; none: eval_fraction of the prompts of data")
    eval_fraction: float = knob(0.05, "share of the prompts of data held out when eval_data is none", ge=0, le=0.9)
    split: str = knob("train", "split of a folder or Hub data set")
    eval_split: str = knob("test", "split of the held-out rows")
    task: str = knob("helpfulness", "closes bare questions: helpfulness, tldr, harmlessness")
    prompt_column: str | None = knob(None, f"none: {one_of(PROMPT_COLUMNS)}, whichever is there")
    model: str | None = knob(None, "model folder or Hub id to start from; none: from scratch")
    tokenizer: str | None = knob(None, "tokenizer folder or Hub id; none: the model's, or trained on the data")
    arch: str = knob("llama", "architecture from scratch", choices=ARCHS)
    hidden: int = knob(256, "hidden size from scratch", ge=8)
    layers: int = knob(4, "decoder layers from scratch", ge=1)
    heads: int = knob(4, "attention heads from scratch; divides hidden", ge=1)
    kv_heads: int = knob(0, "key and value heads from scratch, a divisor of heads; 0: as many", ge=0)
    intermediate: int = knob(0, "MLP width from scratch; 0: 8/3 hidden rounded up to 32", ge=0)
    vocab: int = knob(4096, "upper limit of a trained vocabulary", ge=MIN_VOCAB)
    max_prompt_length: int = knob(512, "prompt tokens; longer prompts lose their beginning", ge=1)
    max_completion_length: int = knob(
        256, "completion tokens with EOS; longer completions lose their end and EOS", ge=1
    )
    epochs: float = knob(3.0, "passes over the training rows", gt=0)
    batch_tokens: int = knob(4096, "padded tokens of one optimizer step", ge=1)
    microbatch_tokens: int = knob(
        0, "padded tokens of one pass of a device; 0: 8192, on a CPU 1536, or the longest row", ge=0
    )
    learning_rate: float | None = knob(None, "peak; none: 2e-3 from scratch, 2e-5 from a model", gt=0)
    schedule: str = knob("cosine", "decay to 0, or none", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = knob(0.05, "share of the steps with linear warm-up", ge=0, le=0.9)
    adam_beta2: float = knob(0.95, "second-moment decay", ge=0, le=0.99999)
    weight_decay: float = knob(0.1, "decoupled weight decay of the matrices", ge=0)
    max_grad_norm: float = knob(1.0, "clip by global norm", gt=0)
    states: str = knob("float32", "moments of AdamW; 8bit takes a quarter of the memory", choices=("float32", "8bit"))
    dtype: str = knob("auto", "weights in training; auto: float32 on a CPU, else bfloat16", choices=("auto", *DTYPES))
    gradient_checkpointing: bool = knob(False, "recompute activations in the backward pass")
    save_dtype: str = knob("auto", "weights on disk; auto: as in training", choices=("auto", "float16", *DTYPES))
    save_minutes: float = knob(
        10.0, "between checkpoints, from which the same command goes on; 0: when interrupted and at the end", ge=0
    )
    seed: int = knob(42, "seed of start weights, held-out split and order of the rows", ge=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    devices: int = knob(1, "devices of this machine that share every step; on a CPU processes", ge=1)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up."""
        return self.learning_rate or (2e-3 if self.model is None else 2e-5)

    def __post_init__(self) -> None:
        """Checks every field against its range; ValueError with `stage.field = value` otherwise."""
        stage = self.stage
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{stage}.{name}: a value is required")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                check_rules(f"{stage}.{field.name}", value, field.metadata)
        if self.model is None and self.hidden % (2 * self.heads):
            raise ValueError(f"{stage}.heads = {self.heads}: must divide hidden = {self.hidden} into an even size")
        if self.model is None and self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"{stage}.kv_heads = {self.kv_heads}: must divide heads = {self.heads}")
        get_task(self.task)


@dataclass(frozen=True)
class SftConfig(StageConfig):
    """Settings of `train_sft`; ValueError with the dotted name for a value out of range."""

    stage = "sft"
    label_column: str | None = knob(None, f"completion text; none: {one_of(LABEL_COLUMNS)}")
    chat_template: bool | None = knob(None, "apply the tokenizer's; none: to conversational rows, if it has one")
    members: int = knob(1, "models trained, each from its own seed: seed, seed + 1, ...", ge=1)
    lora_r: int = knob(0, "rank of LoRA adapters on a frozen model; 0: train all weights", ge=0)
    lora_alpha: float | None = knob(None, "LoRA alpha; none: 2 r", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_r and self.model is None:
            raise ValueError(f"sft.lora_r = {self.lora_r}: adapters need a model to sit on; set sft.model")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up; 2e-4 for adapters if none was set."""
        return self.learning_rate or (2e-4 if self.lora_r else super().peak_learning_rate)


@dataclass(frozen=True)
class RewardConfig(StageConfig):
    """Settings of `train_reward`; ValueError with the dotted name for a value out of range."""

    stage = "reward"
    chosen_column: str = knob("chosen", "preferred completion; with samples: the reference text (label, ...)")
    rejected_column: str = knob("rejected", "the other completion; unused with samples")
    samples: str | None = knob(
        None, "rows {prompt, completion} of a policy: chosen is then the label of data, rejected the sample"
    )
    swapped: float = knob(0.0, "extra training pairs a row: its answer against the answer to another prompt", ge=0)
