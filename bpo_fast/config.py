"""Every knob of a run: one tree of frozen dataclasses, read from TOML and `--set a.b=c`, checked in one place.

A knob left at None is filled in by `resolve`: from the task's preset (lengths, batch, budget), or, where no model is
named, from the embedded default. Names follow TRL where TRL has one.
"""

import dataclasses
import difflib
import json
import math
import operator
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ON_POLICY = "on-policy"
# of a row, the first that is there
PROMPT_COLUMNS = ("prompt", "question", "query", "post", "messages", "chosen")
LABEL_COLUMNS = ("label", "completion", "response", "answer", "summary", "chosen")
LOSS_ALIASES = {"sigmoid": "dpo", "hinge": "slic"}


def knob(default: Any, doc: str, *, choices=None, gt=None, ge=None, lt=None, le=None) -> Any:
    """A dataclass field that carries its one-line meaning and its range."""
    rules = {"choices": choices, "gt": gt, "ge": ge, "lt": lt, "le": le}
    return dataclasses.field(default=default, metadata={"doc": doc} | rules)


def one_of(columns: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(columns[:-1]), columns[-1]])


@dataclass(frozen=True)
class ModelConfig:
    """The policy and the form in which it is trained."""

    path: str | None = knob(None, "model folder or Hub id; none: the embedded policy")
    dtype: str = knob(
        "auto", "auto is float32 on a CPU, bfloat16 on a GPU", choices=("auto", "float32", "bfloat16", "float16")
    )
    attn_implementation: str | None = knob(None, "attention of transformers, such as sdpa or flash_attention_2")
    trust_remote_code: bool = knob(False, "run code that comes with the model")
    gradient_checkpointing: bool = knob(False, "TRL's name of activation_checkpointing = full")
    activation_checkpointing: str = knob(
        "none",
        "what the backward pass recomputes: all of a layer, or all but its matrix products and attention",
        choices=("none", "selective", "full"),
    )
    fused_layers: bool = knob(True, "norms and gated MLPs by kernels that give the same; a compiled trunk has its own")
    compile: bool = knob(False, "compile the trunk for training and scoring; minutes at the start")
    head_chunk_mib: int | None = knob(None, "memory of a chunk of the head; none: the kernels' own choice", ge=1)
    full: bool = knob(False, "train all weights; otherwise LoRA on a frozen base")
    members: int = knob(1, "LoRA members of the ensemble; the behavior is their exact average", ge=1)
    lora_r: int | None = knob(None, "LoRA rank of one member", ge=1)
    lora_alpha: float | None = knob(None, "LoRA alpha; none: 2 r", gt=0)
    lora_dropout: float = knob(0.0, "dropout in front of A, in training only", ge=0, le=0.99)
    lora_targets: tuple[str, ...] = knob((), "names of linear layers; empty: all of the trunk")
    adapters: tuple[str, ...] = knob((), "PEFT folders, one a member, that the members start from")

    @property
    def recomputed(self) -> str:
        """What the backward pass recomputes, by either name: none, selective or full."""
        return "full" if self.gradient_checkpointing else self.activation_checkpointing

    @property
    def alpha(self) -> float:
        """LoRA alpha, by default of the rank that `resolve` has set."""
        assert self.lora_r, "resolve() has set it"
        return self.lora_alpha or 2.0 * self.lora_r


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from and how a row becomes a prompt."""

    path: str | None = knob(None, "file, folder or Hub id, `name[:n]` for the first n rows; none: the task's own")
    eval_path: str | None = knob(None, "the same for held-out rows")
    split: str = knob("train", "split of a folder or Hub data set")
    eval_split: str = knob("test", "split of the evaluation data")
    prompt_column: str | None = knob(None, f"none: {one_of(PROMPT_COLUMNS)}, whichever is there")
    label_column: str | None = knob(None, f"reference text; none: {one_of(LABEL_COLUMNS)}")
    chat_template: bool | None = knob(None, "apply the tokenizer's; none: to conversational rows, if it has one")
    max_prompt_length: int | None = knob(None, "prompt tokens", ge=1)
    long_prompts: str = knob("drop", "prompts over the limit", choices=("drop", "truncate"))
    long_completions: str = knob("drop", "completions of --from-pairs over the limit", choices=("drop", "truncate"))


@dataclass(frozen=True)
class SamplingConfig:
    """How the behavior LLM is sampled. The defaults are pure ancestral sampling."""

    engine: str = knob("auto", "auto is vllm where it can run, else hf", choices=("auto", "hf", "vllm"))
    max_new_tokens: int | None = knob(None, "completion tokens", ge=1)
    temperature: float = knob(1.0, "softmax temperature of the sampler", ge=1e-6, lt=math.inf)
    top_p: float = knob(1.0, "nucleus mass; 1 is off", gt=0, le=1)
    top_k: int = knob(0, "0 is off", ge=0)
    stop: tuple[str, ...] | None = knob(
        None, "strings that end a completion and are left out of it, found on its ids; none: the task's own"
    )
    members: str = knob(
        "average",
        "whom completions come from: the exact average, or single members, drawn by the seed of the completion",
        choices=("average", "single"),
    )
    batch_size: int | None = knob(
        None, "sequences decoded together by the hf engine; none: by the memory they take", ge=1
    )
    kv_cache_gib: float | None = knob(None, "KV cache of vLLM; none: what a full batch needs, if it is free", gt=0)
    merge_lora: bool | None = knob(
        None, "vLLM: merge the members into a second copy of their layers, or read them in place; none: merge on a CPU"
    )
    enforce_eager: bool | None = knob(
        None,
        "vLLM: neither compile the model nor record CUDA graphs, to start sooner and sample slower; none: on a CPU",
    )
    tensor_parallel: int = knob(
        1, "processes that split the model of vLLM, each on a GPU; over 1 it has copies of the weights", ge=1
    )


@dataclass(frozen=True)
class AnnotatorConfig:
    """Who picks the better completion."""

    path: str | None = knob(
        None,
        "reward model folder or Hub id, module:function, a .jsonl of recorded labels, or http://HOST/v1#MODEL, a chat"
        " model that compares two completions",
    )
    batch_tokens: int = knob(16384, "padded tokens a reward-model batch", ge=1)
    timeout_s: float = knob(60.0, "limit of one request to an endpoint", gt=0)
    retries: int = knob(4, "times a request to an endpoint is sent again before the pair stays unjudged", ge=0)
    requests: int = knob(8, "requests to an endpoint in flight", ge=1, le=256)
    overlap: bool = knob(True, "score finished completions, in a thread, while the rest is being sampled")
    refill: bool = knob(False, "replace tied and identical pairs by pairs of further prompts")


@dataclass(frozen=True)
class MethodConfig:
    """The algorithm: BPO is ref = behavior, sampler = policy."""

    loss: str = knob("dpo", "sigmoid means dpo, hinge means slic", choices=("dpo", "ipo", "slic"))
    beta: float = knob(0.1, "loss temperature", gt=0, lt=math.inf)
    label_smoothing: float = knob(0.0, "dpo only", ge=0, lt=0.5)
    ipo_sum: bool = knob(False, "ipo on sums of log-probs instead of their means over a completion's tokens")
    ref: str = knob(
        "behavior",
        "whose log-probs the loss is against; behavior is the policy at the start of the phase",
        choices=("behavior", "initial", "ema", "golden"),
    )
    sampler: str = knob("policy", "who samples: the current policy, or the initial one", choices=("policy", "initial"))
    phases: int | str = knob(2, "data-collection phases F, or on-policy for F = T", ge=1)
    pairs: int | None = knob(None, "annotation budget: prompts used, each once", ge=1)
    batch_pairs: int | None = knob(None, "pairs an optimizer step", ge=1)
    ref_logps: str = knob(
        "trainer",
        "who computes the behavior's log-probs: the trainer, or the sampler itself if the two agree",
        choices=("trainer", "sampler"),
    )
    ref_logps_tolerance: float = knob(
        0.1, "mean difference in nats a token up to which the sampler is believed; 20 times that for one token", gt=0
    )
    ema_rate: float = knob(5e-3, "share of the policy taken into the EMA reference at a refresh", gt=0, le=1)
    golden: str | None = knob(None, "folder of the golden reference")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW under one schedule over all phases."""

    learning_rate: float | None = knob(None, "peak learning rate", gt=0)
    schedule: str = knob("linear", "decay to 0, or none", choices=("linear", "constant", "cosine"))
    warmup_steps: int = knob(0, "linear warm-up", ge=0)
    adam_beta1: float = knob(0.9, "first-moment decay", ge=0, le=0.9999)
    adam_beta2: float = knob(0.999, "second-moment decay", ge=0, le=0.99999)
    adam_epsilon: float = knob(1e-6, "AdamW epsilon", gt=0)
    weight_decay: float = knob(0.0, "decoupled weight decay of the matrices", ge=0)
    max_grad_norm: float = knob(1.0, "clip by global norm, of each member alone", gt=0)
    states: str = knob("float32", "moments of AdamW; 8bit takes a quarter of the memory", choices=("float32", "8bit"))
    offload: bool = knob(False, "keep moments and float32 masters in host memory and step there")
    microbatch_tokens: int = knob(
        0, "tokens of a micro-batch of all members; 0: 8192, on a CPU 1536, or the longest pair", ge=0
    )
    max_bad_steps: int = knob(3, "steps in a row with NaN or Inf before the run stops", ge=1)


@dataclass(frozen=True)
class EvalConfig:
    """Greedy decoding of held-out prompts, judged against the reference text."""

    judges: tuple[str, ...] = knob((), "each like annotator.path; empty: the task's own, else the annotator")
    prompts: int | None = knob(None, "held-out prompts used", ge=0)
    kl_prompts: int = knob(64, "held-out prompts sampled to estimate the KL to the start", ge=0)
    eval_steps: int = knob(0, "evaluate every so many steps as well; 0: before and after", ge=0)


@dataclass(frozen=True)
class RunConfig:
    """The run folder and what is kept in it."""

    output_dir: str | None = knob(None, "run folder; none: runs/<task>-<ref>-<loss>-<time>")
    seed: int = knob(42, "seed of shuffle, sampling and LoRA start", ge=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    devices: int = knob(
        1, "devices of this machine that share the work, each with a copy of the policy; on a CPU processes", ge=1
    )
    save_steps: int = knob(0, "checkpoint every so many steps; 0: at the end of each phase", ge=0)
    save_total_limit: int = knob(2, "complete checkpoints kept", ge=1)
    report_to: tuple[str, ...] = knob((), "trackers beside metrics.jsonl: tensorboard, wandb")


@dataclass(frozen=True)
class Config:
    """One run of `bpo_fast.train`."""

    task: str = knob("helpfulness", "preset of lengths, batch and data: helpfulness, tldr, harmlessness")
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    annotator: AnnotatorConfig = dataclasses.field(default_factory=AnnotatorConfig)
    method: MethodConfig = dataclasses.field(default_factory=MethodConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt with the longest completion, which `resolve` has set."""
        assert self.data.max_prompt_length, "resolve() has set it"
        assert self.sampling.max_new_tokens, "resolve() has set it"
        return self.data.max_prompt_length + self.sampling.max_new_tokens

    @property
    def samples_members(self) -> bool:
        """Whether every completion comes from one member of several."""
        return self.sampling.members == "single" and self.model.members > 1


def knobs(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yields (dotted name, field, resolved type) of every leaf knob."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from knobs(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, hints[f.name]


KNOBS = {name: (f, hint) for name, f, hint in knobs()}
# knobs that hold a path, and what may stand beside it: the slice of rows, the name of a scorer; they take any text
PLAIN = re.compile(r"(?P<path>.*)", re.DOTALL)
SLICED = re.compile(r"(?P<path>.*?)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?", re.DOTALL)
NAMED = re.compile(r"(?:(?P<name>[\w-]+)=(?=.))?(?P<path>.*)", re.DOTALL)
PATHS = {
    **dict.fromkeys(("model.path", "model.adapters", "method.golden"), PLAIN),
    **dict.fromkeys(("data.path", "data.eval_path"), SLICED),
    **dict.fromkeys(("annotator.path", "eval.judges"), NAMED),
}


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` with dotted knobs set, each checked.

    Args:
        config: the tree to copy.
        values: dotted name to value; strings are read as the knob's type.

    Raises:
        ValueError: an unknown name (with the nearest known one), a wrong type, a value out of range.
    """
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in values.items():
        if name not in KNOBS:
            raise ValueError(f"{name}: no such knob{did_you_mean(name, KNOBS)}")
        value = _checked(name, value)
        section, _, leaf = name.rpartition(".")
        (sections.setdefault(section, {}) if section else top)[leaf] = value
    for section, leaves in sections.items():
        top[section] = dataclasses.replace(getattr(config, section), **leaves)
    return dataclasses.replace(config, **top)


def load(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a TOML file and applies overrides on top.

    Args:
        path: TOML file, or None for the defaults.
        overrides: dotted name to value, stronger than the file.

    Raises:
        ValueError: an unreadable file or a bad knob, by name.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--config {path}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {path}: not TOML: {error}") from None
        values.update(flatten(tree))
    return replace(Config(), values | dict(overrides or {}))


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """Reads `--set a.b=c` arguments into {dotted name: text}."""
    out = {}
    for item in assignments:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {item}: expected NAME=VALUE")
        out[name.strip()] = value.strip()
    return out


def with_full_paths(config: Config) -> Config:
    """The same with files and folders by their full paths: they are found from another working directory, too."""
    flat, full = to_flat(config), {}
    for name, form in PATHS.items():
        specs = flat[name] if isinstance(flat[name], tuple) else (flat[name],)
        found = tuple(spec and _with_full_path(spec, form) for spec in specs)
        full[name] = found if isinstance(flat[name], tuple) else found[0]
    return replace(config, full)


def full_path(path: str) -> str:
    """Of a file or folder that is there; anything else, such as a name on the Hub, as it is."""
    return os.path.abspath(path) if os.path.exists(path) else path


def read_spec(spec: str, form: re.Pattern[str]) -> re.Match[str]:
    """The parts of what one of the knobs in `PATHS` holds: its path and what stands beside it."""
    found = form.fullmatch(spec)
    assert found, "every form takes any text"
    return found


def _with_full_path(spec: str, form: re.Pattern[str]) -> str:
    start, stop = read_spec(spec, form).span("path")
    return spec[:start] + full_path(spec[start:stop]) + spec[stop:]


def in_force(config: Config) -> dict[str, Any]:
    """`to_flat` of what counts, to compare runs by: full paths, and LoRA's alpha where only its rank is named."""
    flat = to_flat(with_full_paths(config))
    return flat | ({"model.lora_alpha": config.model.alpha} if config.model.lora_r else {})


def to_flat(config: Config) -> dict[str, Any]:
    """Dotted name to value of every knob."""
    flat = {}
    for name in KNOBS:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        flat[name] = value
    return flat


def to_toml(config: Config) -> str:
    """The tree as TOML, unset knobs left out; `load` reads it back to an equal tree."""
    lines: list[str] = []
    section = ""
    for name, value in to_flat(config).items():
        if value is None:
            continue
        head, _, leaf = name.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
        lines.append(f"{leaf} = {_toml_value(value)}")
    return "\n".join(lines).strip() + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested TOML tables as dotted name to value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def did_you_mean(name: str, known: Any) -> str:
    """`; did you mean X?` for the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # a bare leaf name, such as learning_rate
        leaves = {k.rpartition(".")[2]: k for k in known}
        near = [leaves[n] for n in difflib.get_close_matches(name.rpartition(".")[2], leaves, n=1, cutoff=0.75)]
    return f"; did you mean {near[0]}?" if near else ""


def _checked(name: str, value: Any) -> Any:
    field, hint = KNOBS[name]
    value = _coerce(name, value, hint)
    if value is None:
        return None
    if name == "method.loss":
        value = LOSS_ALIASES.get(value, value)
    for item in value if isinstance(value, tuple) else (value,):
        check_rules(name, item, field.metadata)
    return value


RANGES = {"gt": (">", operator.gt), "ge": (">=", operator.ge), "lt": ("<", operator.lt), "le": ("<=", operator.le)}


def check_rules(what: str, value: Any, rules: Mapping[str, Any]) -> None:
    """ValueError `what = value` if a value is not among a knob's choices or out of its range; NaN is in no range."""
    if rules["choices"]:
        if value not in rules["choices"]:
            known = ", ".join(rules["choices"])
            raise ValueError(f"{what} = {value!r}: not one of {known}{did_you_mean(value, rules['choices'])}")
    elif not isinstance(value, str):
        for rule, (sign, holds) in RANGES.items():
            if rules[rule] is not None and not holds(value, rules[rule]):
                raise ValueError(f"{what} = {value}: must be {sign} {rules[rule]}")


def _coerce(name: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in options):
        if type(None) in options:
            return None
        raise ValueError(f"{name} = none: a value is required")
    for option in options:
        try:
            return _as_type(value, option)
        except (ValueError, TypeError, OverflowError):
            continue
    wanted = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    raise ValueError(f"{name} = {value!r}: expected {wanted}")


def _as_type(value: Any, option: Any) -> Any:
    if typing.get_origin(option) is tuple:
        return tuple(_as_type(i, typing.get_args(option)[0]) for i in _items(value) if i != "")
    if option is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[_lower(value)]
    if option is int:
        if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
            raise ValueError
        return int(value)
    if option is float:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    if option is str and isinstance(value, str):
        return value
    raise ValueError


def _items(value: Any) -> list[Any]:
    """The items of a list: as it is, JSON in brackets (which keeps blanks and commas), or split at commas."""
    if not isinstance(value, str):
        return list(value)
    if not value.lstrip().startswith("["):
        return [item.strip() for item in value.split(",")]
    found = json.loads(value)
    if not isinstance(found, list):
        raise ValueError
    return found


def _lower(value: Any) -> str:
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError
    return text
