"""`bpo-fast eval`: greedy answers of a model, or published ones, judged against the reference text and head to head.

EVAL/outputs.jsonl  against.jsonl  rows.jsonl  eval.json
Whatever can be checked is checked before anything is decoded. Answers are on disk as soon as a contestant has given
them, and verdicts as soon as a judge has gone through the answers of one contestant.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bpo_fast import config as configs
from bpo_fast import prompts as data
from bpo_fast.annotate import Checked
from bpo_fast.config import Config
from bpo_fast.engine import SamplingParams
from bpo_fast.evaluate import against_labels
from bpo_fast.files import check_writable, write_atomic
from bpo_fast.loading import pick_device
from bpo_fast.progress import Progress
from bpo_fast.ranks import HOST, Ranks, Share, started
from bpo_fast.run import check_free, saved_config
from bpo_fast.sample import sample_all
from bpo_fast.setup import check_scorer, devices_of, held_out_prompts, judge_specs, load_scorer, train_prompts
from bpo_fast.source import check_source, load_source, resolved, run_of
from bpo_fast.stats import bootstrap, length_controlled
from bpo_fast.tasks import get_task
from bpo_fast.tokenizer import with_leading_space
from bpo_fast.types import Completion, Prompt

RESULT_FILE = "eval.json"
ROWS_FILE = "rows.jsonl"
OUTPUT_FILES = ("outputs.jsonl", "against.jsonl")
OUTPUT_COLUMNS = ("completion", "output")
Score = float | None
Summary = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """Answers to evaluate.

    Attributes:
        name: for tables.
        prompts, outputs: by `Prompt.id`, the row of the data.
        sampled: False for texts from a file, whose tokens nobody knows.
    """

    name: str
    prompts: dict[int, Prompt]
    outputs: dict[int, Completion]
    sampled: bool


@dataclass(frozen=True)
class Judged:
    """What one judge said of one contestant, in the order of the prompts: (its score, the reference text's)."""

    scores: list[tuple[Score, Score]]

    @property
    def wins(self) -> list[Score]:
        """1 where the output is strictly above the reference text, else 0; None where one of them has no score."""
        return [None if a is None or b is None else float(a > b) for a, b in self.scores]


class Verdicts:
    """What the judges have said so far, on disk after every piece of work: one contestant, or head to head.

    Args:
        path: JSONL, a row a prompt; missing there are judges that were not reached. None: beside rank 0.
        sides: one or two contestants.
        ids: the prompts that count.
        ranks: that share the judging.

    Attributes:
        judged: by name of the judge, the contestants that it is done with.
        duels: by name of the judge.
    """

    def __init__(self, path: Path | None, sides: Sequence[Contestant], ids: Sequence[int], ranks: Ranks):
        self._path, self._sides, self._ids, self._ranks = path, sides, ids, ranks
        self.judged: dict[str, list[Judged]] = {}
        self.duels: dict[str, list[tuple[Score, Score]]] = {}

    def ask(self, judge: Checked) -> None:
        """Lets a judge judge every contestant, then the two against each other."""
        ranks = self._ranks
        if judge.is_pairwise:  # an endpoint: rank 0 asks it as fast as all would, and its notes are of all pairs
            if not ranks.is_main:
                return
            ranks = Ranks()
        share = ranks.share(self._ids, self._length)
        for side in self._sides:
            found = _judge(judge, side, share)
            self.judged.setdefault(judge.name, []).append(found)
            self._write()
        if len(self._sides) == 2:
            self.duels[judge.name] = _duel(judge, self._sides, self.judged[judge.name], self._ids)
            self._write()

    def _length(self, i: int) -> int:
        """What prompts are dealt to ranks by: characters."""
        return sum(len(side.prompts[i].text) + len(side.outputs[i].text) for side in self._sides)

    def _write(self) -> None:
        if self._path is None:
            return
        rows = [_row(i, at, self._sides, self.judged, self.duels) for at, i in enumerate(self._ids)]
        write_atomic(self._path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def evaluate(config: Config, source: str, against: str | None, out: Path | None) -> Summary:
    """Decodes, judges and compares.

    Args:
        config: judges, data, lengths, devices; see `source.base_config`.
        source: a run folder, a checkpoint, a model or adapter folder, a Hub id, or a file of outputs: text with a line
            a row of the data, or JSONL with `completion` (null: not judged).
        against: the same, for a head-to-head comparison.
        out: folder to write; none: evals/<time>-<process>.

    Returns:
        What EVAL/eval.json holds.

    Raises:
        ValueError: bad models, data or judges by name; outputs that do not line up with the data, with both counts.
    """
    config = resolved(config, source)
    out = out or _new_name()
    _check_out(out)
    options: dict[str, Any] = {"source": source, "against": against}
    job = {"name": "eval", "config": configs.to_flat(config)} | options
    with Progress() as progress, started(devices_of(config), job) as ranks:
        found = evaluate_rank(config, ranks, progress, out=out, **options)
    write_atomic(out / RESULT_FILE, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return found | {"out": str(out)}


def evaluate_rank(
    config: Config, ranks: Ranks, progress: Progress, *, source: str, against: str | None, out: Path | None = None
) -> Summary:
    """What every process of `evaluate` does; rank 0, which has `out`, writes it down and returns what was found."""
    device = pick_device("run.device", config.run.device)
    rows = _rows(config)
    sources = [s for s in (source, against) if s is not None]
    published = {s: _published(s, rows, config) for s in sources if Path(s).is_file()}
    for name in sources:
        if name not in published:
            check_source(name, config)
    specs = judge_specs(config)
    if not specs:
        raise ValueError("eval.judges: no judge; name one with --judge")
    for spec in specs:
        check_scorer(spec, config)
    ranks.connect(HOST)
    with _kept(out, config, progress) if out else nullcontext():
        sides = []
        for name, file in zip(sources, OUTPUT_FILES, strict=False):
            sides.append(published.get(name) or _decoded(name, config, ranks, progress))
            if out:
                _write_outputs(out / file, sides[-1], len(rows))
        ids = _common(sides, config)
        progress.print(f"answers: {out}")
        judges = {spec: load_scorer(spec, config, device) for spec in specs}
        verdicts = Verdicts(out / ROWS_FILE if out else None, sides, ids, ranks)
        with progress.task("judging", len(judges)) as task:
            for judge in judges.values():
                verdicts.ask(judge)
                task.advance()
    return _result(config, judges, sides, ids, verdicts) if out else {}


def _result(
    config: Config, judges: Mapping[str, Checked], sides: Sequence[Contestant], ids: Sequence[int], verdicts: Verdicts
) -> Summary:
    """What EVAL/eval.json holds; judges go by their spec."""
    judged, duels = verdicts.judged, verdicts.duels
    found = {
        "data": config.data.eval_path,
        "task": config.task,
        "num_prompts": len(ids),
        "judges": {judge.name: {"spec": spec, "notes": judge.notes()} for spec, judge in judges.items()},
        "contestants": [
            {
                "name": side.name,
                "sampled": side.sampled,
                **shape(side, ids),
                "judges": {n: _rates(side, both[i], ids) for n, both in judged.items()},
            }
            for i, side in enumerate(sides)
        ],
    }
    if len(sides) == 2:
        found["head_to_head"] = {n: head_to_head(duels[n], judged[n], sides, ids) for n in duels}
    return found


def shape(side: Contestant, ids: Sequence[int]) -> Summary:
    """Length, truncation and diversity: distinct-n is the share of distinct n-grams of words among all."""
    texts = [side.outputs[i].text.split() for i in ids]
    found: Summary = {
        "mean_words": sum(map(len, texts)) / len(ids),
        "mean_characters": sum(len(side.outputs[i].text.strip()) for i in ids) / len(ids),
        "unique": len({tuple(t) for t in texts}) / len(ids),
    }
    bigrams = [list(pairwise(t)) for t in texts]
    trigrams = [list(zip(t, t[1:], t[2:], strict=False)) for t in texts]
    for n, grams in enumerate((texts, bigrams, trigrams), 1):
        flat = [g for row in grams for g in row]
        found[f"distinct_{n}"] = len(set(flat)) / max(1, len(flat))
    if side.sampled:
        found["mean_tokens"] = sum(len(side.outputs[i].ids) for i in ids) / len(ids)
        found["clipped_ratio"] = sum(side.outputs[i].truncated for i in ids) / len(ids)
    return found


def head_to_head(
    duels: Sequence[tuple[Score, Score]], judged: Sequence[Judged], sides: Sequence[Contestant], ids: Sequence[int]
) -> Summary:
    """Wins of the first contestant over the second under one judge.

    Returns:
        wins, ties, losses, unjudged; win_rate with ties as halves, the same at equal length, and the paired difference
        of the win rates against the reference text; each with its interval over prompts.
    """
    known = [(i, a, b) for i, (a, b) in zip(ids, duels, strict=True) if a is not None and b is not None]
    points = [1.0 if a > b else 0.0 if a < b else 0.5 for _, a, b in known]
    found: Summary = {"wins": points.count(1.0), "ties": points.count(0.5), "losses": points.count(0.0)}
    found["unjudged"] = len(ids) - len(known)
    if known:
        lengths = [[len(side.outputs[i].text.strip()) for i, _, _ in known] for side in sides]
        found["win_rate"] = _interval(bootstrap, points)
        found["length_controlled_win_rate"] = _interval(
            length_controlled, points, [a - b for a, b in zip(*lengths, strict=True)]
        )
    both = [(a, b) for a, b in zip(judged[0].wins, judged[1].wins, strict=True) if a is not None and b is not None]
    if both:
        found["win_rate_difference"] = _interval(bootstrap, [a - b for a, b in both])
    return found


def read_outputs(source: str, num_rows: int, where: str) -> list[str | None]:
    """The outputs of a file, one a row of the data.

    Raises:
        ValueError: another number of them than rows, both named; a JSONL row without one.
    """
    path = Path(source)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        texts: list[str | None] = [_output(row, number, source) for number, row in enumerate(data.read_rows(source), 1)]
    else:
        try:
            # not splitlines(): a text may hold U+2028
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
        if lines[-1] == "":
            lines.pop()
        texts = [line.rstrip("\r") for line in lines]
    if len(texts) != num_rows:
        raise ValueError(f"{source}: {len(texts)} outputs, but {where} has {num_rows} rows; they must line up")
    return texts


def _output(row: Mapping[str, Any], number: int, source: str) -> str | None:
    column = next((c for c in OUTPUT_COLUMNS if c in row), None)
    if column is None or not isinstance(row[column], str | None):
        raise ValueError(f"{source}: row {number} has no text in {' or '.join(OUTPUT_COLUMNS)}")
    return row[column]


def _new_name() -> Path:
    """Where an eval is written that was given no place; many can begin in one second."""
    return Path("evals") / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _check_out(out: Path) -> None:
    """ValueError if `out` is not free; answers without their result are there to be used."""
    if (flags := _flags(out)) and not (out / RESULT_FILE).exists():
        raise ValueError(
            f"--out {out}: holds answers of an eval that did not end; judge them with {flags} and another --out"
        )
    check_free(out)
    check_writable(out / RESULT_FILE)


def _rows(config: Config) -> list[data.Row]:
    """The rows to evaluate on; ValueError without any."""
    if config.data.eval_path is None:
        raise ValueError("data.eval_path: no held-out data; name some with --data")
    if config.eval.prompts == 0:
        raise ValueError("eval.prompts = 0: nothing to evaluate")
    return data.read_rows(config.data.eval_path, config.data.eval_split)


def _published(source: str, rows: Sequence[data.Row], config: Config) -> Contestant:
    texts = read_outputs(source, len(rows), str(config.data.eval_path))
    prompts = {
        i: _bare_prompt(row, i, config)
        for i, (row, text) in enumerate(zip(rows, texts, strict=True))
        if text is not None
    }
    outputs = {i: _bare_output(prompt, texts[i] or "") for i, prompt in prompts.items()}
    return Contestant(Path(source).name, prompts, outputs, sampled=False)


def _decoded(source: str, config: Config, ranks: Ranks, progress: Progress) -> Contestant:
    name = Path(source).name or source
    policy, engine = load_source(source, config, progress.print)
    run = run_of(source)
    train = train_prompts(saved_config(run), policy.tokenizer, progress) if run else ()
    prompts = held_out_prompts(config, policy.tokenizer, train, progress)
    if not prompts:
        raise ValueError(f"data.eval_path = {config.data.eval_path}: no prompt of it is left")
    sampling = config.sampling
    assert sampling.max_new_tokens, "resolve() has set it"
    params = SamplingParams(max_new_tokens=sampling.max_new_tokens, temperature=0.0, stop=sampling.stop or ())
    answered, outputs = sample_all(engine, prompts, params, ranks, progress, title=f"decoding {name}", run_seed=0)
    if len(answered) < len(prompts):
        progress.print(f"{name}: left out: {len(prompts) - len(answered)} that the engine gave up")
    return Contestant(name, {p.id: p for p in answered}, {c.prompt_id: c for c in outputs}, sampled=True)


def _bare_prompt(row: Mapping[str, Any], index: int, config: Config) -> Prompt:
    """A prompt as text alone: what judges need."""
    where = str(config.data.eval_path)
    found = data.row_text(dict(row), index, config.data, get_task(config.task), None, where)
    columns = {k: v for k, v in row.items() if k not in data.RESERVED_COLUMNS}
    return Prompt(index, found.text, (), label=found.label, columns=columns, turns=found.turns)


def _bare_output(prompt: Prompt, text: str) -> Completion:
    return Completion(prompt.id, 0, (), with_leading_space(prompt.text, text), False, -1, 0)


def _common(sides: Sequence[Contestant], config: Config) -> list[int]:
    """Rows that every contestant has answered, as many as `eval.prompts`; for texts from a file alone, all of them."""
    ids = [i for i in sides[0].prompts if all(i in side.prompts for side in sides)]
    if not ids:
        raise ValueError(f"{sides[-1].name}: no prompt in common with {sides[0].name}")
    return ids if any(side.sampled for side in sides) else ids[: config.eval.prompts or None]


def _judge(judge: Checked, side: Contestant, share: Share[int]) -> Judged:
    mine = against_labels(judge, [side.prompts[i] for i in share.mine], [side.outputs[i] for i in share.mine])
    return Judged([(score, label_score) for score, label_score in share.gather(mine)])


def _duel(
    judge: Checked, sides: Sequence[Contestant], judged: Sequence[Judged], ids: Sequence[int]
) -> list[tuple[Score, Score]]:
    if judge.is_pairwise:
        first, second = ([side.outputs[i] for i in ids] for side in sides)
        return judge.duel([sides[0].prompts[i] for i in ids], first, second)
    return [(a, b) for (a, _), (b, _) in zip(judged[0].scores, judged[1].scores, strict=True)]


def _rates(side: Contestant, judged: Judged, ids: Sequence[int]) -> Summary:
    """Win rate, the same at equal length, mean score; the number judged and not."""
    won = [(i, w) for i, w in zip(ids, judged.wins, strict=True) if w is not None]
    labelled = sum(side.prompts[i].label is not None for i in ids)
    found: Summary = {"num_judged": len(won), "num_unjudged": labelled - len(won)}
    if won:
        points = [w for _, w in won]
        lengths = [len(side.outputs[i].text.strip()) - len(side.prompts[i].label or "") for i, _ in won]
        found["win_rate"] = _interval(bootstrap, points)
        found["length_controlled_win_rate"] = _interval(length_controlled, points, lengths)
    scores = [s for s, _ in judged.scores if s is not None]
    return found | ({"score": _interval(bootstrap, scores)} if scores else {})


def _interval(estimate: Callable[..., Any], *values: Sequence[float]) -> dict[str, float]:
    return dataclasses.asdict(estimate(*values))


def _row(
    i: int, at: int, sides: Sequence[Contestant], judged: Mapping[str, list[Judged]], duels: Mapping[str, list[Any]]
) -> Summary:
    prompt = sides[0].prompts[i]
    row: Summary = {"prompt_id": i, "prompt": prompt.text, "label": prompt.label}
    for n, (side, prefix) in enumerate(zip(sides, ("", "against_"), strict=False)):
        row[f"{prefix}output"] = side.outputs[i].text.strip()
        known = {name: both[n].scores[at] for name, both in judged.items() if n < len(both)}
        row[f"{prefix}scores"] = {name: score for name, (score, _) in known.items()}
        row[f"{prefix}label_scores"] = {name: score for name, (_, score) in known.items()}
    return row | ({"duels": {name: list(found[at]) for name, found in duels.items()}} if duels else {})


@contextmanager
def _kept(out: Path, config: Config, progress: Progress) -> Iterator[None]:
    """Says what is there and how to go on if the block ends early."""
    try:
        yield
    except BaseException:
        if flags := _flags(out):
            names = [name for name in (*OUTPUT_FILES, ROWS_FILE) if (out / name).is_file()]
            again = f"{flags} --task {config.task} --data {config.data.eval_path}"
            progress.print(f"kept in {out}: {', '.join(names)}; judge these answers with {again}")
        raise


def _flags(out: Path) -> str:
    """The flags that judge the answers in a folder."""
    pairs = zip(("--outputs", "--against"), (out / name for name in OUTPUT_FILES), strict=True)
    return " ".join(f"{flag} {path}" for flag, path in pairs if path.is_file())


def _write_outputs(path: Path, side: Contestant, num_rows: int) -> None:
    """One line a row of the data, in the form that `read_outputs` takes."""
    lines = []
    for i in range(num_rows):
        output = side.outputs.get(i)
        line = (
            {"completion": None}
            if output is None
            else {"completion": output.text.strip(), "truncated": output.truncated}
        )
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))
