"""Scores of a reward model: any sequence-classification folder of transformers with one label."""

import logging
import math
import re
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers

from bpo_fast.batches import length_batches
from bpo_fast.loading import check_vocabulary, named_load_errors, pick_device, position_limit
from bpo_fast.tokenizer import with_leading_space
from bpo_fast.types import Completion, Prompt, Turn

MAX_LENGTH = 1_000_000  # a tokenizer without a limit says 1e30
ENCODED_TOGETHER = 4096  # texts; an encoding of the tokenizers library takes kilobytes
_CLOSING = re.compile(r"\s*\b(assistant|answer)\s*:\s*$", re.IGNORECASE)

log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """A prompt with its completion as text, and the messages of the prompt if it is a conversation."""

    prompt: str
    completion: str
    turns: tuple[Turn, ...] = ()


class Encoded(NamedTuple):
    """A prompt with a completion: int32 token ids, and the segment that each is of."""

    ids: array
    type_ids: array


class RewardScorer:
    """r(x, y) of prompts and completions, in length-bucketed batches.

    A tokenizer with a chat template is given the conversation and the completion as the assistant's turn. Of a prompt
    that is text, or that its template refuses, all is one user turn, without the cue ` Assistant:` that closes a plain
    prompt. Any other tokenizer is given the pair (prompt text, completion text with its leading space): both are
    encoded apart and its own post-processor joins them, which for encoders is `[CLS] prompt [SEP] completion [SEP]`.
    What is over the model's length limit is cut from the left, so the completion stays; a completion that is too long
    by itself keeps its beginning.

    Padding is on the right and the head reads the last real token, so the score of an answer does not depend on the
    batch it is in, up to float rounding.

    Args:
        model: a transformers model with one label; its pad_token_id is set to the one used here.
        tokenizer: the model's own, a fast one.
        name: what error messages call it.
        batch_tokens: padded tokens of one batch.
        max_length: tokens of prompt and completion together, if less than the model's own limit.

    Raises:
        ValueError: a model with more than one label, or a tokenizer that does not fit.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, batch_tokens: int = 16384, max_length: int | None = None
    ):
        if model.config.num_labels != 1:
            raise ValueError(f"{name}: num_labels = {model.config.num_labels}: a reward model has one")
        if not tokenizer.is_fast:
            raise ValueError(f"{name}: its tokenizer ({type(tokenizer).__name__}) is not a fast one")
        if batch_tokens < 1:
            raise ValueError(f"{name}: batch_tokens = {batch_tokens}: must be >= 1")
        check_vocabulary(name, model, tokenizer)
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        text_config = model.config.get_text_config()
        own_limit = min(position_limit(model)[0] or MAX_LENGTH, tokenizer.model_max_length)
        self.max_length = min(own_limit, max_length or MAX_LENGTH)
        self._has_refused = False
        # The head finds the last real token as the last one that is not padding.
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        model.config.pad_token_id = text_config.pad_token_id = self._pad
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """Scores each completion for the prompt at the same position.

        Args:
            prompts: one a completion; repeated where a prompt has several completions.
            completions: their `text` is scored.

        Returns:
            One score a completion; higher is better.

        Raises:
            ValueError: counts that differ, or a score that is not finite (prompt and sample id named).
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{self.name}: {len(prompts)} prompts for {len(completions)} completions")
        texts = [Answered(p.asked, c.text, p.turns) for p, c in zip(prompts, completions, strict=True)]
        scores = self.score_texts(texts)
        for prompt, completion, score in zip(prompts, completions, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(f"{self.name}: score of prompt {prompt.id} sample {completion.sample_id} is {score}")
        return scores

    def score_texts(self, texts: Sequence[Answered]) -> list[float]:
        """Scores, finite or not; equal token ids get equal scores."""
        encodings = self.encode(texts)
        keys = [e.ids.tobytes() for e in encodings]
        distinct = dict(zip(keys, encodings, strict=True))
        lengths = [len(e.ids) for e in distinct.values()]
        scored, unique = torch.empty(len(distinct)), list(distinct.values())
        with torch.inference_mode():
            for rows in length_batches(lengths, self.batch_tokens):
                scored[rows] = self.forward([unique[i] for i in rows]).float().cpu()
        score_of = dict(zip(distinct, scored.tolist(), strict=True))
        return [score_of[key] for key in keys]

    def encode(self, texts: Sequence[Answered]) -> list[Encoded]:
        """Encodes prompts with their completions within `max_length`."""
        join = self._join_plain if self.tokenizer.chat_template is None else self._join_turns
        encoded = []
        for start in range(0, len(texts), ENCODED_TOGETHER):
            joined = join(texts[start : start + ENCODED_TOGETHER])
            encoded += [Encoded(array("i", e.ids), array("i", e.type_ids)) for e in joined]
        return encoded

    def _join_turns(self, texts: Sequence[Answered]) -> list[Any]:
        rendered = [self._render(text) for text in texts]
        encodings = self.tokenizer.backend_tokenizer.encode_batch(rendered, add_special_tokens=False)
        for encoding in encodings:
            encoding.truncate(self.max_length, direction="left")
        return encodings

    def _join_plain(self, texts: Sequence[Answered]) -> list[Any]:
        backend = self.tokenizer.backend_tokenizer
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        answers = [with_leading_space(text.prompt, text.completion) for text in texts]
        prompts = backend.encode_batch([text.prompt for text in texts], add_special_tokens=False)
        completions = backend.encode_batch(answers, add_special_tokens=False)
        joined = []
        for prompt, completion in zip(prompts, completions, strict=True):
            completion.truncate(room)
            prompt.truncate(room - len(completion.ids), direction="left")
            joined.append(backend.post_process(prompt, completion))
        return joined

    def forward(self, encodings: Sequence[Encoded]) -> torch.Tensor:
        """Scores [len(encodings)] of one right-padded batch, differentiable outside inference mode."""
        longest = max(len(e.ids) for e in encodings)
        shape = (len(encodings), longest)
        ids = torch.full(shape, self._pad, dtype=torch.long)
        mask, types = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, e in enumerate(encodings):
            ids[row, : len(e.ids)] = torch.tensor(e.ids)
            types[row, : len(e.ids)] = torch.tensor(e.type_ids)
            mask[row, : len(e.ids)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.tokenizer.model_input_names:
            inputs["token_type_ids"] = types
        device = next(self.model.parameters()).device
        return self.model(**{k: v.to(device, non_blocking=True) for k, v in inputs.items()}).logits[:, 0]

    def _render(self, text: Answered) -> str:
        from jinja2 import TemplateError

        answer = Turn("assistant", text.completion.strip())
        if text.turns:
            try:
                return self._apply_template([*text.turns, answer])
            except TemplateError as error:  # some take no system turn
                if not self._has_refused:
                    log.warning("%s: its chat template refuses a conversation, shown as one turn: %s", self.name, error)
                self._has_refused = True
        return self._apply_template([Turn("user", _CLOSING.sub("", text.prompt)), answer])

    def _apply_template(self, turns: Sequence[Turn]) -> str:
        return self.tokenizer.apply_chat_template([turn._asdict() for turn in turns], tokenize=False)


class RewardModel(RewardScorer):
    """A reward model from a folder or Hub id; safetensors only.

    Args:
        path: folder or Hub id.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto is float32 on a CPU and bfloat16 on a GPU.
        batch_tokens: padded tokens of one batch.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: not a sequence-classification model, or more than one label.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int = 16384,
        trust_remote_code: bool = False,
    ):
        what = f"reward model {path}"
        place = pick_device(f"{what}: device", device, main=False)
        if dtype == "auto":
            dtype = "bfloat16" if place.type == "cuda" else "float32"
        check_reward_model(path, trust_remote_code=trust_remote_code)
        with named_load_errors(what):
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
            )
        with named_load_errors(what, "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        super().__init__(model.to(place).eval(), tokenizer, name=what, batch_tokens=batch_tokens)


def check_reward_model(path: str, *, trust_remote_code: bool = False) -> None:
    """ValueError if the settings in a folder or on the Hub are not those of a sequence-classification model."""
    what = f"reward model {path}"
    with named_load_errors(what):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    architecture = (config.architectures or ["none"])[0]
    if "ForSequenceClassification" not in architecture and not trust_remote_code:
        raise ValueError(f"{what}: {architecture} is not a sequence-classification model")
