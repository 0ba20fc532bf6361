"""Rows of JSONL(.gz), Parquet or a Hub data set, and how a row becomes a `Prompt`.

Recognised forms: {"prompt": str | messages, ...}, {"messages": [...]}, preference rows {"prompt", "chosen",
"rejected"} as text or messages, and HH-RLHF's "Human: ... Assistant: ..." strings. Blanks at the end of a plain prompt
are cut: a sampler speaks " word", not "word" after a dangling space.
"""

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from bpo_fast.config import LABEL_COLUMNS, PROMPT_COLUMNS, SLICED, DataConfig, did_you_mean, read_spec
from bpo_fast.tasks import ENDINGS, Task
from bpo_fast.types import Prompt, Turn

SPLIT_STEMS = {"train": ("train", "prompts"), "test": ("test", "dev", "eval", "validation")}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?\.parquet")  # as the Hub names them, the split first
_TURN = re.compile(r"\s*\n\n(Human|Assistant):[ ]?")

# an annotator callable gets these from the run, never from a row
RESERVED_COLUMNS = ("prompt", "prompts", "completion", "completions", "completion_ids")

Row = dict[str, Any]


@dataclass(frozen=True)
class PromptSet:
    """Prompts in sampling order, and what was left out on the way.

    Attributes:
        prompts: usable prompts, shuffled by seed.
        num_rows: rows read.
        num_duplicates, num_too_long, num_truncated, num_excluded: rows dropped as repeated, dropped as over the
            limit, cut from the left, dropped because another set holds them.
    """

    prompts: tuple[Prompt, ...]
    num_rows: int
    num_duplicates: int = 0
    num_too_long: int = 0
    num_truncated: int = 0
    num_excluded: int = 0

    def words(self, max_tokens: int | None) -> str:
        """How many prompts there are, and what became of the other rows; the limit was `max_tokens`."""
        reasons = {
            "repeated": self.num_duplicates,
            f"over {max_tokens} tokens": self.num_too_long,
            "also in the training data": self.num_excluded,
        }
        left_out = ", ".join(f"{n} {reason}" for reason, n in reasons.items() if n)
        return (
            f"{len(self.prompts)} prompts of {self.num_rows} rows"
            + (f"; left out: {left_out}" if left_out else "")
            + (f"; {self.num_truncated} cut from the left" if self.num_truncated else "")
        )


def read_rows(source: str, split: str = "train") -> list[Row]:
    """Reads the rows of a file, a folder or a Hub data set.

    Args:
        source: path of a .jsonl, .jsonl.gz or .parquet file, a folder of such files, or a Hub id `owner/name` (with
            `/folder` inside it if need be); `[:n]` at the end takes the first n rows, `[m:n]` those after the first m.
        split: which file of a folder or data set: train or test.

    Returns:
        One dict a row.

    Raises:
        ValueError: nothing there, an empty file, invalid JSON or a row that is no object (file and line named).
    """
    found = read_spec(source, SLICED)
    name, start, stop = found["path"], int(found["start"] or 0), int(found["stop"]) if found["stop"] else None
    if name.endswith("]") and not Path(name).exists():
        raise ValueError(f"{source}: rows are taken as [:n] or [m:n], counted from the first")
    rows: list[Row] = []
    for path in _files(name, split):
        if path.suffix.lower() in (".csv", ".tsv"):
            raise ValueError(f"{path}: a table of text is not read; write JSONL (a JSON object a line) or Parquet")
        read = _parquet_rows if path.name.endswith(".parquet") else _json_rows
        rows += islice(read(path), None if stop is None else stop - len(rows))
        if stop is not None and len(rows) == stop:  # and the files behind it are not opened
            break
    rows = rows[start:]
    if not rows:
        raise ValueError(f"{source}: no rows")
    return rows


def load_prompts(
    rows: Sequence[Row],
    data: DataConfig,
    task: Task,
    tokenizer: Any,
    *,
    source: str,
    seed: int | None,
    exclude: Iterable[str] = (),
    dedupe: bool = True,
) -> PromptSet:
    """Turns rows into prompts: form, template, token ids, limits, order.

    Args:
        rows: rows as `read_rows` gives them.
        data: columns, chat template and the prompt limit in tokens.
        task: closes bare questions (`Task.suffix`).
        tokenizer: a transformers tokenizer.
        source: name of the rows in error messages.
        seed: shuffle seed; None keeps the order.
        exclude: prompt texts that must not occur, such as those of the training set.
        dedupe: keep only the first row of every prompt text.

    Raises:
        ValueError: a row without a prompt, no usable prompt at all, or a label column that no row has.
    """
    if data.label_column and not any(data.label_column in row for row in rows):
        near = did_you_mean(data.label_column, rows[0])
        raise ValueError(f"data.label_column = {data.label_column}: {source} has no such column{near}")
    texts = [row_text(row, i, data, task, tokenizer, source) for i, row in enumerate(rows)]
    seen, excluded = set(), set(exclude)
    kept, num_duplicates, num_excluded = [], 0, 0
    for i, text in enumerate(t.text for t in texts):
        num_duplicates += dedupe and text in seen
        num_excluded += text in excluded and text not in seen
        if text not in seen and text not in excluded:
            kept.append(i)
        if dedupe:
            seen.add(text)
    encoded = encode_prompts([texts[i].text for i in kept], [texts[i].plain is not None for i in kept], tokenizer)
    limit = data.max_prompt_length
    assert limit is not None, "resolve() has set the limit"
    prompts, num_too_long, num_truncated = [], 0, 0
    for i, ids in zip(kept, encoded, strict=True):
        if len(ids) > limit and data.long_prompts == "drop":
            num_too_long += 1
            continue
        if len(ids) > limit:
            num_truncated += 1
            ids = cut_prompt(ids, limit, tokenizer.bos_token_id)
        columns = {k: v for k, v in rows[i].items() if k not in RESERVED_COLUMNS}
        text, plain, label, turns = texts[i]
        prompts.append(Prompt(i, text, tuple(ids), label=label, columns=columns, plain=plain, turns=turns))
    if not prompts:
        raise ValueError(
            f"{source}: no usable prompt among {len(rows)} rows ({num_too_long} over data.max_prompt_length = {limit},"
            f" {num_duplicates} repeated, {num_excluded} held by the training set)"
        )
    if seed is not None:
        random.Random(seed).shuffle(prompts)
    return PromptSet(tuple(prompts), len(rows), num_duplicates, num_too_long, num_truncated, num_excluded)


def cut_prompt(ids: Sequence[int], limit: int, bos_id: int | None) -> tuple[int, ...]:
    """The last `limit` tokens of a longer prompt, of which a BOS in front stays the first."""
    num_bos = int(ids[0] == bos_id)
    return (*ids[:num_bos], *ids[len(ids) - limit + num_bos :])


def split_answer(text: str) -> tuple[list[dict[str, str]], str | None]:
    """Reads an HH-RLHF string into messages before the last assistant turn, and that turn's text (None if empty)."""
    parts = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text)
    turns = [{"role": _ROLES[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]
    if turns and turns[-1]["role"] == "assistant":
        return turns[:-1], turns[-1]["content"] or None
    return turns, None


_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowText(NamedTuple):
    """What a row asks.

    Attributes:
        text: the prompt as the model is given it; by a chat template it holds special tokens.
        plain: the prompt without a chat template, if `text` is by one.
        label: reference text, if the row has one.
        turns: the messages of a conversation.
    """

    text: str
    plain: str | None
    label: str | None
    turns: tuple[Turn, ...] = ()


def row_text(row: Row, index: int, data: DataConfig, task: Task, tokenizer: Any, source: str) -> RowText:
    """What a row asks.

    Args:
        row: a row of the data.
        index: its position, for error messages.
        data: columns, and whether the chat template is applied.
        task: closes bare questions.
        tokenizer: with the chat template; None: there is none.
        source: name of the rows in error messages.

    Raises:
        ValueError: no prompt, one of another form, or a chat template that refuses it.
    """
    value, label = _asked(row, index, data, task, source)
    has_template = getattr(tokenizer, "chat_template", None) is not None
    wanted = data.chat_template if data.chat_template is not None else has_template and not isinstance(value, str)
    turns: tuple[Turn, ...] = ()
    if isinstance(value, str):
        text = value.rstrip()
        plain = text if _is_closed(text, task) else text + task.suffix
        value = [{"role": "user", "content": value.strip()}]
    else:
        plain = _plain(value, task)
        turns = tuple(Turn(**message) for message in value)
    if not wanted or tokenizer is None:
        return RowText(plain, None, label, turns)
    return RowText(_render(value, tokenizer, f"{source}: row {index + 1}"), plain, label, turns)


def _asked(
    row: Row, index: int, data: DataConfig, task: Task, source: str
) -> tuple[str | list[dict[str, str]], str | None]:
    """(text or messages without the answer, label)"""
    column = data.prompt_column or next((c for c in PROMPT_COLUMNS if row.get(c) is not None), None)
    value = row.get(column) if column else None
    is_turns = isinstance(value, str) and _TURN.match(value if value.startswith("\n\n") else "\n\n" + value)
    # a bare answer in "chosen" holds no prompt
    if value in (None, [], {}) or (isinstance(value, str) and not (value.strip() if column != "chosen" else is_turns)):
        raise missing(row, index, f"prompt (column {data.prompt_column or 'prompt'})", "prompt_column", source)
    label = row_label(row, data, column)
    if isinstance(value, str) and is_turns:
        turns, answer = split_answer(value)
        if len(turns) != 1 or answer or not _is_closed(turns[0]["content"], task):  # else _plain() wrote it
            value, label = turns, label or answer
    elif isinstance(value, str) and data.prompt_column is None:
        value = _conversation(row, value) or value
    if isinstance(value, str):
        return value, label
    messages = _messages(value, source, index)
    if messages and messages[-1]["role"] == "assistant":
        label = label or messages[-1]["content"].strip() or None
        messages = messages[:-1]
    if not messages or not messages[-1]["content"].strip():
        raise ValueError(f"{source}: row {index + 1} has no prompt before the answer")
    return messages, label


def _conversation(row: Row, prompt: str) -> list[Any] | None:
    """The messages of a row whose first question is its prompt, as in UltraFeedback."""

    def asks(message: Any) -> bool:
        is_question = isinstance(message, Mapping) and message.get("role") == "user"
        return is_question and str(message.get("content")).strip() == prompt.strip()

    lists = (row.get(column) for column in ("chosen", "messages"))
    return next((v for v in lists if isinstance(v, list) and any(map(asks, v[:2]))), None)


def _is_closed(text: str, task: Task) -> bool:
    return text.rstrip().lower().endswith((task.suffix.strip().lower(), "assistant:"))


def missing(row: Row, index: int, what: str, knob: str, source: str) -> ValueError:
    """That a row does not have `what`, with what it has; `knob` names another column."""
    columns = ", ".join(list(row)[:8]) or "none"
    return ValueError(f"{source}: row {index + 1} has no {what}; its columns: {columns} ({knob} names another)")


def row_label(row: Row, data: DataConfig, prompt_column: str | None) -> str | None:
    """The reference text of a row, from the label column or the first of the usual ones; None if it has none."""
    names = (data.label_column,) if data.label_column else [c for c in LABEL_COLUMNS if c != prompt_column]
    value = next((row[c] for c in names if row.get(c) and isinstance(row[c], str | list)), None)
    if isinstance(value, str):
        if _TURN.match(value):
            return split_answer(value)[1]
        return value.strip() or None
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        return str(value[-1].get("content", "")).strip() or None
    return None


def _messages(value: Any, source: str, index: int) -> list[dict[str, str]]:
    def is_text(message: Any) -> bool:
        return isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))

    if not isinstance(value, list) or not all(map(is_text, value)):
        raise ValueError(f"{source}: row {index + 1}: a prompt is text or messages with a role and content of text")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _render(messages: list[dict[str, str]], tokenizer: Any, where: str) -> str:
    from jinja2 import TemplateError  # it takes a while, and plain rows need none of it

    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("data.chat_template = true: the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # some take no system turn, or no two turns of one side in a row
        raise ValueError(f"{where}: the tokenizer's chat template refuses it: {error}") from None


def _plain(messages: list[dict[str, str]], task: Task) -> str:
    """The paper's forms: a lone question plus the suffix, several turns as `user: ... assistant: ...`."""
    if len(messages) == 1:
        return messages[0]["content"].rstrip() + task.suffix
    names = {"assistant": task.suffix.strip(), "user": "Human:" if task.suffix.strip()[0].isupper() else "user:"}
    turns = (f"{names.get(m['role'], m['role'] + ':')} {m['content'].strip()}" for m in messages)
    return " ".join(turns) + task.suffix


def encode_prompts(texts: list[str], templated: list[bool], tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts; special tokens are added to plain text only, and never an EOS at the end."""
    found: dict[int, list[int]] = {}
    for want in (False, True):
        group = [i for i, is_templated in enumerate(templated) if is_templated == want]
        if group:
            encoded = tokenizer([texts[i] for i in group], add_special_tokens=not want)["input_ids"]
            found |= dict(zip(group, encoded, strict=True))
    eos = tokenizer.eos_token_id
    for i, ids in found.items():
        if not templated[i] and len(ids) > 1 and ids[-1] == eos:
            found[i] = ids[:-1]
    return [found[i] for i in range(len(texts))]


def _files(name: str, split: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _pick([p for p in sorted(path.rglob("*")) if p.name.endswith(ENDINGS)], path, name, split)
    if name.count("/") >= 1 and not name.startswith((".", "/", "~")) and not name.endswith(ENDINGS):
        return _hub_files(name, split)
    raise ValueError(f"{name}: no such file or folder")


def _pick(files: list[Path], root: Path, name: str, split: str) -> list[Path]:
    stems = SPLIT_STEMS.get(split, (split,))
    for stem in stems:
        named = re.compile(rf"{re.escape(stem)}(?![a-z])")
        by_file = [p for p in files if named.match(p.name.lower())]
        by_folder = [p for p in files if any(named.match(part.lower()) for part in p.relative_to(root).parts[:-1])]
        shards = {p: found[1] for p in by_file if (found := _SHARD.fullmatch(p.name))}
        if split in shards.values():
            return [p for p in by_file if shards.get(p, split) == split]
        if len(splits := sorted(set(shards.values()))) > 1:  # UltraFeedback has the rows of one in another
            raise ValueError(f"{name}: {split!r} may be {', '.join(splits)}; name one as split or eval_split")
        if by_file or by_folder:
            return by_file or by_folder
    if len(files) == 1:
        return files
    listed = ", ".join(str(p.relative_to(root)) for p in files[:6]) or "no data files"
    raise ValueError(f"{name}: no file for split {split!r} ({' or '.join(stems)}); there: {listed}")


def _hub_files(name: str, split: str) -> list[Path]:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    owner, repo, *folder = name.rstrip("/").split("/")
    prefix = "".join(part + "/" for part in folder)
    repo_id = f"{owner}/{repo}"
    try:
        listing = huggingface_hub.HfApi().list_repo_files(repo_id, repo_type="dataset")
        files = [Path(f) for f in sorted(listing) if f.endswith(ENDINGS) and f.startswith(prefix)]
        picked = _pick(files, Path(), repo_id, split)
        return [Path(huggingface_hub.hf_hub_download(repo_id, str(f), repo_type="dataset")) for f in picked]
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: no such file or folder, and the Hub did not give it: {reason}") from None


def _json_rows(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_row(line, f"{path}: line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _json_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: invalid JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    if "\\u" in line:  # half of a surrogate pair can be escaped in JSON, but no tokenizer and no file can hold it
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: half of a surrogate pair is no text") from None
    return row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from None
    yield from table.to_pylist()
