"""Decoding with transformers' KV cache: a prompt is encoded once for all its completions, rows that are done leave."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bpo_fast.attention import DecodedRows, lay_out, no_mask, packed_arguments
from bpo_fast.engine.choose import Chooser
from bpo_fast.loading import head_weight, num_embeddings, trunk_of
from bpo_fast.varlen import bounds_of

# what cache and logits of a batch may take; how many rows it has at least (fewer leave matrix products waiting for the
# weights) and at most (more gain nothing)
CPU_BYTES, GPU_BYTES = 2**28, 2**31
MIN_ROWS, MAX_ROWS = 64, 512
# rows that are done are dropped once they are this share of the batch: that copies the cache of the others
DROPPED_SHARE = 1 / 8
# prompts encoded at once where nothing is padded: what layers make of more tokens no longer fits the caches of a CPU
PROMPT_TOKENS = 2048
# of the largest hidden state: between rounding, in bfloat16 up to 0.09 in 48 layers, and another function, above 0.6
TRIED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.25}
# places of the cache that are taken at a time: every time copies it
PLACES = 64
log = logging.getLogger(__name__)


def cache_argument(model: Any) -> str:
    """Under which name the model's forward takes a KV cache.

    Raises:
        ValueError: it takes none of transformers' own kind, or no mask for prompts of unlike lengths.
    """
    takes = inspect.signature(model.forward).parameters
    names = [n for n in ("cache", "past_key_values") if n in takes]  # transformers 5 began with the second
    if not names or "attention_mask" not in takes:
        raise ValueError(
            f"sampling.engine = hf: {type(model).__name__} takes no KV cache of transformers or no attention mask"
        )
    return names[0]


def takes_cache(trunk: Any) -> bool:
    """Whether hidden states can be had token by token."""
    try:
        return bool(cache_argument(trunk))
    except ValueError:
        return False


def cache_bytes(model: Any, length: int) -> int:
    """Bytes of the KV cache of one sequence."""
    form = model.config.get_text_config()
    return 2 * form.num_hidden_layers * num_kv_heads(form) * head_size(form) * length * model.dtype.itemsize


def num_kv_heads(config: Any) -> int:
    """Heads of keys and values; `config` is that of the text model."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_size(config: Any) -> int:
    """Of one attention head; `config` is that of the text model."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def row_bytes(model: Any, prompt_tokens: int, new_tokens: int, *, sharing: int) -> int:
    """Bytes of the KV cache of a prompt's completion; so many completions share what the prompt takes."""
    places = -(-new_tokens // PLACES) * PLACES
    return cache_bytes(model, places) + -(-cache_bytes(model, prompt_tokens) // sharing)


def rows_together(model: Any, bytes_a_row: int, *, logits: bool) -> int:
    """How many sequences are decoded together: as many as the memory of a batch is meant for.

    Args:
        model: a causal LM.
        bytes_a_row: of the KV cache of one.
        logits: whether tokens are chosen from logits; drawn from hidden states, a row makes none.
    """
    row = bytes_a_row + (len(head_weight(model)) * 4 if logits else 0)
    rows = (CPU_BYTES if model.device.type == "cpu" else GPU_BYTES) // row
    return min(max(rows, MIN_ROWS), MAX_ROWS)


class GrowingLayer(DynamicLayer):
    """Keys and values that new tokens are written behind; `DynamicLayer` copies all of them at every token."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes a prompt's as they are: its rows are about to be picked, and room would be copied with them."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._room: tuple[Tensor, Tensor] | None = None
        self._places = 0  # of a row, with those that are still empty
        self.keys, self.values = key_states, value_states

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, n, D] to what is there and returns all of it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        assert self.keys is not None, "initialized"
        assert self.values is not None, "initialized"
        length, total = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._places < total:
            self._places, self._room = max(length + PLACES, total), None
        if self._room is None:
            self._room = _with_room(self.keys, self._places), _with_room(self.values, self._places)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, length:total] = new
        self.keys, self.values = (room[:, :, :total] for room in self._room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Goes on with these rows."""
        super().reorder_cache(beam_idx)
        self._room = None


class SharedLayer(GrowingLayer):
    """Keys and values of prompts, held once for all rows that share them, and of what the rows wrote behind them.

    Attributes:
        prompts: of all prompts, one after the other: twice [1, heads, S, D].
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompts: tuple[Tensor, ...] = ()
        self._parts: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes prompts until `join`, and gives them back; from then on what the rows wrote."""
        if self.prompts:
            return super().update(key_states, value_states, *args, **kwargs)
        self._parts.append((key_states, value_states))
        return key_states, value_states

    def join(self) -> None:
        """There are no more prompts."""
        self.prompts, self._parts = tuple(torch.cat(part, 2) for part in zip(*self._parts, strict=True)), []


def _with_room(kept: Tensor, places: int) -> Tensor:
    """[B, heads, L, D] -> [B, heads, places, D] that begins with it."""
    room = kept.new_empty((*kept.shape[:2], places, kept.shape[3]))
    room[:, :, : kept.shape[2]] = kept
    return room


class CachedRows:
    """Sequences of a batch that have gone through the model and go on token by token.

    Args:
        model: a causal LM that has a `cache_argument`.
        ids, mask: [U, L] int64. prompts, filled up on the left where the mask is 0.
        hidden: whether hidden states are wanted and not logits.

    Attributes:
        last: of the next token of each row: [B, V] logits or [B, H] hidden states.
    """

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, *, hidden: bool):
        model = trunk_of(model) if hidden else model
        takes = inspect.signature(model.forward).parameters
        self._model, self._mask = model, mask
        self._takes_positions = "position_ids" in takes
        self._cache: Any = DynamicCache(config=model.config)
        self._cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self._cache.layers]
        self._options = {cache_argument(model): self._cache, "use_cache": True}
        first = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.last = self._forward(ids, (mask.cumsum(-1) - 1).clamp_min(0), **first)

    def pick(self, rows: Tensor) -> None:
        """Goes on with these rows of the batch; a row may be taken more than once or not at all."""
        self._cache.reorder_cache(rows)
        self._mask, self.last = self._mask.index_select(0, rows), self.last.index_select(0, rows)

    def append(self, tokens: Tensor) -> None:
        """Appends a token to every row: [B] int64."""
        positions = self._mask.sum(-1, keepdim=True)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self.last = self._forward(tokens[:, None], positions)

    def _forward(self, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
        if self._takes_positions:
            options["position_ids"] = positions
        out = self._model(input_ids=ids, attention_mask=self._mask, **self._options, **options)
        return (out.logits if "logits" in out else out.last_hidden_state)[:, -1]


class SharedRows:
    """The same where nothing is padded and a prompt's keys and values are held once: native attention, hidden states.

    Args:
        model: a causal LM whose `shares_rows`.
        prompts: token ids.

    Attributes:
        last: [B, H] hidden states of the next token of each row.
    """

    def __init__(self, model: Any, prompts: Sequence[tuple[int, ...]]):
        self._model = trunk_of(model)
        self._cache: Any = DynamicCache(config=model.config)
        layers = [SharedLayer() for _ in self._cache.layers]
        self._cache.layers = layers
        self._options = {cache_argument(self._model): self._cache, "use_cache": True}
        lengths = [len(ids) for ids in prompts]
        self.last = torch.cat([self._encode(part) for part in _parts(prompts, PROMPT_TOKENS)])
        for layer in layers:
            layer.join()
        self._rows = DecodedRows(layers, bounds_of(lengths), torch.arange(len(prompts)))
        self._positions = torch.tensor(lengths)

    def _encode(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        layout, positions = lay_out([(len(ids),) for ids in prompts], self._model.device)
        ids = torch.tensor([token for prompt in prompts for token in prompt])
        out = self._model(input_ids=ids[None], **packed_arguments(layout, positions[None]) | self._options)
        cu_seqlens, _ = layout.bounds
        return out.last_hidden_state[0, cu_seqlens[1:] - 1]

    def pick(self, rows: Tensor) -> None:
        """See `CachedRows.pick`."""
        self._cache.reorder_cache(rows)
        self._rows = replace(self._rows, prompts=self._rows.prompts[rows])
        self._positions, self.last = self._positions[rows], self.last[rows]

    def append(self, tokens: Tensor) -> None:
        """See `CachedRows.append`."""
        out = self._model(
            input_ids=tokens[:, None],
            position_ids=self._positions[:, None],
            attention_mask=no_mask(tokens.device),
            decoded_rows=self._rows,
            **self._options,
        )
        self._positions = self._positions + 1
        self.last = out.last_hidden_state[:, -1]


@torch.no_grad()
def shares_rows(model: Any) -> bool:
    """Whether `SharedRows` gives what `CachedRows` gives, tried on a few tokens; says why not if no layer has a window.

    Some layers repeat or join heads behind the cache, and attention would meet prompts without that.

    Args:
        model: a causal LM with the attention of attention.py, natively.
    """
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    was_training = model.training
    model.eval()
    vocab = num_embeddings(model)
    prompts = [tuple(i % vocab for i in ids) for ids in ((1, 2), (3, 4, 5, 6))]
    try:
        expected = _try_rows(CachedRows(model, *_padded(prompts, 0, model.device), hidden=True))
        found = _try_rows(SharedRows(model, prompts))
        error = float((found - expected).abs().max() / expected.abs().max())
        reason = "" if error < TRIED_ERROR[model.dtype] else f"hidden states differ by {error:.3g}"
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as raised:
        reason = str(raised).split("\n")[0]
    finally:
        model.train(was_training)
    if reason:
        log.warning("%s: every row decodes with a prompt of its own (%s)", type(model).__name__, reason)
    return not reason


def _try_rows(batch: CachedRows | SharedRows) -> Tensor:
    """Hidden states of two prompts' rows, the second's twice, and of two tokens behind each."""
    batch.pick(torch.tensor([0, 1, 1]))
    rows = [batch.last]
    for _ in range(2):
        batch.append(torch.tensor([0, 1, 2]))
        rows.append(batch.last)
    return torch.cat(rows)


def _parts(prompts: Sequence[tuple[int, ...]], most_tokens: int) -> Iterator[Sequence[tuple[int, ...]]]:
    """Neighbors of together so many tokens, or one by itself."""
    start = tokens = 0
    for end, ids in enumerate(prompts):
        if end > start and tokens + len(ids) > most_tokens:
            yield prompts[start:end]
            start, tokens = end, 0
        tokens += len(ids)
    yield prompts[start:]


def decode(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    choose: Chooser,
    *,
    ended: Callable[[list[int]], bool],
    max_new_tokens: int,
    pad_id: int,
    shared: bool = False,
) -> list[tuple[list[int], list[float]]]:
    """Decodes a completion for each prompt.

    Args:
        model: a causal LM that has a `cache_argument`.
        prompts: token ids; those that are equal are encoded once.
        choose: chooses next tokens; request i is that of prompt i.
        ended: whether a completion is over with its newest token.
        max_new_tokens: where it is over at the latest.
        pad_id: id that fills up prompts.
        shared: whether to decode by `SharedRows`; `choose` reads hidden states then.

    Returns:
        For each prompt the completion's ids and, if `choose` gives them, their log-probs.
    """
    device = model.device
    places: dict[tuple[int, ...], int] = {}
    rows = torch.tensor([places.setdefault(ids, len(places)) for ids in prompts], device=device)
    if shared:
        batch = SharedRows(model, list(places))
    else:
        batch = CachedRows(model, *_padded(list(places), pad_id, device), hidden=choose.reads_hidden)
    batch.pick(rows)
    out: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    requests, open_rows = list(range(len(prompts))), set(range(len(prompts)))
    whose = torch.arange(len(prompts), device=device)
    for step in range(max_new_tokens):
        tokens, logps = choose(batch.last, whose, step)
        values = None if logps is None else logps.tolist()
        for row, token in enumerate(tokens.tolist()):
            request = requests[row]
            if request not in open_rows:
                continue
            ids, ids_logps = out[request]
            ids.append(token)
            if values is not None:
                ids_logps.append(values[row])
            if ended(ids):
                open_rows.discard(request)
        if not open_rows or step + 1 == max_new_tokens:
            break
        if len(requests) - len(open_rows) >= DROPPED_SHARE * len(requests):
            kept = [row for row, request in enumerate(requests) if request in open_rows]
            requests = [requests[row] for row in kept]
            picked = torch.tensor(kept, device=device)
            batch.pick(picked)
            tokens, whose = tokens.index_select(0, picked), whose.index_select(0, picked)
        batch.append(tokens)
    return out


def _padded(prompts: Sequence[tuple[int, ...]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[U, L] ids and mask, filled up on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
