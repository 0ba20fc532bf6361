"""The report of one run: a page that needs nothing but itself, and the closing words on the terminal."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bpo_fast import plots
from bpo_fast.drawing import Plot
from bpo_fast.files import write_atomic
from bpo_fast.run_folder import (
    Example,
    RunFolder,
    examples,
    judges,
    measures,
    method_words,
    number_text,
    pairs_words,
    printable,
    read_run,
    results,
    stage_seconds,
    wins,
)
from bpo_fast.stats import bootstrap
from bpo_fast.tasks import ASSETS

REPORT_FILE = "report.html"
NUM_FIRST, NUM_EXTREME = 6, 3
PROMPT_CHARS = 400
TWO_COLUMNS_FROM = 100
UNITS_FROM = 60
MAX_PHASE_COLUMNS = 8
PHASE_ROWS = (
    ("pairs kept", "count", "pairs/kept"),
    ("pairs tied", "count", "pairs/tied"),
    ("pairs identical", "count", "pairs/identical"),
    ("mean annotator score", "score", "objective/scores"),
    ("chosen - rejected", "score", "objective/scores_margin"),
    ("KL to the start (nats)", "score", "objective/kl"),
    ("entropy (nats)", "score", "objective/entropy"),
    ("mean length (tokens)", "tenth", "completions/mean_length"),
    ("truncated", "share", "completions/clipped_ratio"),
    ("distinct-2", "score", "completions/distinct_2"),
    ("unique outputs", "share", "completions/unique"),
    ("tokens a second", "count", "perf/tokens_per_s"),
    ("peak memory (GiB)", "score", "perf/peak_memory_gib"),
)


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html: results, figures, completions before and after, settings; one file, no network.

    Whatever the run folder lacks is named on the page, and the rest is shown: a run that was killed, or whose data
    has no reference texts, has a report too.

    Args:
        run_dir: the run folder.

    Returns:
        The path of the page.

    Raises:
        ValueError: `run_dir` is not a folder.
    """
    run = read_run(run_dir)
    drawn, undrawn = plots.plots(run)
    no_figures = [f"No numbers for the figures: {', '.join(undrawn)}."] if undrawn else []
    sections = [
        _header(run),
        notice(run.missing + _no_win_rate(run) + no_figures),
        _result_table(run),
        _phase_table(run),
        figures(drawn),
        _all_examples(run),
        _settings(run),
        _files(run),
    ]
    title = f"bpo-fast: {html(_about(run).get('task', run_dir.resolve().name))}"
    page = html_page(title, sections)
    path = run_dir / REPORT_FILE
    write_atomic(path, page)
    return path


def html_page(title: str, sections: Sequence[str]) -> str:
    """A page that needs nothing but itself; title and sections are HTML already."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Completions are untrusted: even if one got past the escaping, it could run and load nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<style>\n{css}</style>\n</head>\n<body>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the closing table of a run: results before and after, pairs, seconds by stage.

    Args:
        summary: the content of summary.json.
        console: where to print; plain text if it is not a terminal.
    """
    before, after = summary.get("before") or {}, summary.get("after") or {}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    unit = "" if console.width >= UNITS_FROM else " points"  # left out, so that names have room for whole words
    table.add_column("held-out prompts", overflow="fold")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for measure in measures(before, after):
        table.add_row(Text(measure.name), *(text.removesuffix(unit) for text in measure.texts()))
    console.print()
    console.print(table)
    if not after.get("win_rate"):
        _say(console, "No win rate: the evaluation data has no reference texts, or nobody judged them.")
    if pairs := summary.get("pairs"):
        _say(console, f"pairs: {pairs_words(pairs)}")
    if num_bad := summary.get("bad_steps"):
        _say(
            console, f"{num_bad} of {summary.get('steps')} steps changed nothing: their loss or gradient was not finite"
        )
    if seconds := summary.get("seconds"):
        _say(
            console, "seconds: " + ", ".join(f"{name} {number_text(value, 'tenth')}" for name, value in seconds.items())
        )


def print_examples(eval_rows: Sequence[Mapping[str, Any]], console: Console, n: int = 3) -> None:
    """Print completions before and after, spread evenly from the smallest to the largest change in score.

    Args:
        eval_rows: the lines of eval.jsonl.
        console: where to print; from 100 columns on, before and after stand side by side.
        n: number of prompts.
    """
    judge = next(iter(judges(eval_rows)), None)
    chosen = _spread(examples(eval_rows, judge), n)
    for number, example in enumerate(chosen, start=1):
        console.print()
        _say(console, f"Example {number} of {len(chosen)}", style="bold")
        _print_example(example, judge, console)


def _print_example(example: Example, judge: str | None, console: Console) -> None:
    sides = [("before", example.before), ("after", example.after)]
    texts = [(when, "" if row is None else _with_score(row, judge)) for when, row in sides]
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, expand=True)
    if console.width >= TWO_COLUMNS_FROM:
        console.print(Text(_middle_cut(printable(example.prompt)), style="cyan"))
        for when, _ in texts:
            table.add_column(when, ratio=1)
        table.show_header = True
        table.add_row(*(Text(text) for _, text in texts))
    else:
        table.add_column(no_wrap=True, style="bold")
        table.add_column(ratio=1)
        table.add_row("prompt", Text(_middle_cut(printable(example.prompt)), style="cyan"))
        for when, text in texts:
            table.add_row(when, Text(text))
    console.print(table)


def _with_score(row: Mapping[str, Any], judge: str | None) -> str:
    score = (row.get("scores") or {}).get(judge)
    note = "" if score is None else f"  [{judge} {score:+.2f}]"
    return printable(row["output"]).strip() + (" ..." if row.get("truncated") else "") + note


def _middle_cut(text: str) -> str:
    text = text.strip()
    if len(text) <= PROMPT_CHARS:
        return text
    half = PROMPT_CHARS // 2
    return f"{text[:half].rsplit(maxsplit=1)[0]} [...] {text[-half:].split(maxsplit=1)[-1]}"


def _spread(found: Sequence[Example], n: int) -> list[Example]:
    scored = sorted((example for example in found if example.change is not None), key=lambda e: e.change or 0.0)
    if len(scored) <= n:
        return list(found[:n])
    return [scored[int((index + 0.5) / n * len(scored))] for index in range(n)]


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style))


def _about(run: RunFolder) -> dict[str, Any]:
    """Task, method, model, data, annotator and judges: from summary.json, else from the settings."""
    config = run.config
    method = {name: config.get("method", {}).get(name) for name in ("ref", "loss", "phases", "sampler")}
    from_config = {
        "task": config.get("task"),
        "method": method | {"members": config.get("model", {}).get("members", 1)} if any(method.values()) else None,
        "model": config.get("model", {}).get("path"),
        "data": config.get("data", {}).get("path"),
        "annotator": config.get("annotator", {}).get("path"),
        "judges": config.get("eval", {}).get("judges"),
    }
    about = from_config | run.summary
    embedded = f"{ASSETS}/"
    words = {name: v.replace(embedded, "embedded ") if isinstance(v, str) else v for name, v in about.items()}
    return {name: value for name, value in words.items() if value not in (None, [], "")}


def _header(run: RunFolder) -> str:
    about, env = _about(run), run.env
    facts: dict[str, Any] = {}
    if "method" in about:
        facts["method"] = method_words(about["method"], about.get("steps"))
    facts |= {name: about.get(name) for name in ("model", "data", "annotator")}
    facts["judges"] = ", ".join(about.get("judges", [])) + (" (the annotator itself)" if _judges_itself(run) else "")
    facts["machine"] = ", ".join(_machine_words(env))
    versions = ("bpo_fast", "python", "torch", "transformers", "triton", "vllm")
    facts["versions"] = ", ".join(f"{name} {env[name]}" for name in versions if env.get(name))
    facts["commit"] = (
        f"{env['git_commit'][:12]}{' with changes' if env.get('git_changed') else ''}"
        if env.get("git_commit")
        else None
    )
    total = sum(stage_seconds(run).values())
    facts["length"] = ", ".join(_length_words(run, total))
    facts["command"] = env.get("command")
    rows = "".join(f"<dt>{html(k)}</dt><dd>{html(v)}</dd>" for k, v in facts.items() if v)
    task = html(about.get("task", run.path.resolve().name))
    return f"<h1>bpo-fast: {task}</h1>\n{_headline(run)}<dl>{rows}</dl>"


def _judges_itself(run: RunFolder) -> bool:
    """Whether the run was evaluated by its annotator, for want of another judge."""
    has_annotator = bool(run.config.get("annotator", {}).get("path"))
    return has_annotator and bool(run.eval_rows) and not run.config.get("eval", {}).get("judges")


def _machine_words(env: Mapping[str, Any]) -> list[str]:
    words = [str(env[name]) for name in ("gpu", "cpu") if env.get(name)]
    words += [f"{env['cores']} cores"] if env.get("cores") else []
    return words + ([f"{env['memory_gib']} GiB"] if env.get("memory_gib") else [])


def _length_words(run: RunFolder, total: float) -> list[str]:
    steps = run.summary.get("steps", run.steps[-1].get("step") if run.steps else None)
    words = [f"{steps} steps"] if steps is not None else []
    words += [f"{total:,.1f} seconds"] if total else []
    if kept := (run.summary.get("pairs") or {}).get("kept"):
        words.append(f"{kept} pairs")
    if speed := run.summary.get("tokens_per_s"):
        words.append(f"{speed:,.0f} tokens a second")
    if peak := run.summary.get("peak_memory_gib"):
        words.append(f"peak memory {peak:.2f} GiB")
    return words


def _headline(run: RunFolder) -> str:
    """The win rates in one sentence a judge, with the paired interval of the change."""
    lines = []
    for judge in judges(run.eval_rows):
        before, after = wins(run, "before", judge), wins(run, "after", judge)
        both = [prompt_id for prompt_id in before if prompt_id in after]
        if not both:
            continue
        change = bootstrap([after[prompt_id] - before[prompt_id] for prompt_id in both])
        was, now = (sum(side[prompt_id] for prompt_id in both) / len(both) for side in (before, after))
        lines.append(
            f'<p class="headline">Win rate against the reference text under <b>{html(judge)}</b>: '
            f"{100 * was:.1f}% before, <b>{100 * now:.1f}%</b> after "
            f'<span class="soft">({100 * change.mean:+.1f} points, 95% interval {100 * change.low:+.1f} to '
            f"{100 * change.high:+.1f}, {len(both)} held-out prompts)</span></p>\n"
        )
    return "".join(lines)


def _no_win_rate(run: RunFolder) -> list[str]:
    if run.eval_rows and all(row.get("label") is None for row in run.eval_rows):
        return ["The evaluation data has no reference texts: there are no win rates."]
    return []


def notice(sentences: Sequence[str]) -> str:
    """A box with what is not in the report."""
    if not sentences:
        return ""
    items = "".join(f"<li>{html(sentence)}</li>" for sentence in sentences)
    return f'<div class="notice"><b>Not in this report</b><ul>{items}</ul></div>'


def _result_table(run: RunFolder) -> str:
    found = measures(results(run, "before"), results(run, "after"))
    if not found:
        return "<h2>Results</h2>\n<p>The run folder has no evaluation.</p>"
    rows = "".join(
        "<tr>" + "".join(f"<td>{html(text)}</td>" for text in (measure.name, *measure.texts())) + "</tr>\n"
        for measure in found
    )
    pairs = pairs_words(run.summary.get("pairs") or {})
    note = f'<p class="soft">Pairs: {html(pairs)}.</p>' if pairs else ""
    head = "<tr><th>held-out prompts, greedy decoding</th><th>before</th><th>after</th><th>change</th></tr>\n"
    return f"<h2>Results</h2>\n<table>{head}{rows}</table>\n{note}"


def _phase_table(run: RunFolder) -> str:
    """The phases of a run with few of them, one a column."""
    present = [(name, kind, key) for name, kind, key in PHASE_ROWS if any(key in line for line in run.phases)]
    if not present or len(run.phases) > MAX_PHASE_COLUMNS:
        return ""
    head = "".join(f"<th>{number}</th>" for number in range(1, len(run.phases) + 1))
    rows = ""
    for name, kind, key in present:
        cells = "".join(f"<td>{html(number_text(line.get(key), kind))}</td>" for line in run.phases)
        rows += f"<tr><td>{html(name)}</td>{cells}</tr>\n"
    return f'<h2>Phases</h2>\n<div class="wide"><table><tr><th>phase</th>{head}</tr>\n{rows}</table></div>'


def figures(drawn: Sequence[Plot]) -> str:
    """Figures in columns; a wide one has a row of its own."""
    if not drawn:
        return ""
    items = [
        f"<figure{' class=wide' if plot.is_wide else ''}><h3>{html(plot.title)}</h3>"
        f"<figcaption>{html(plot.caption)}</figcaption>"
        f"{plot.svg(f'f{number}')}</figure>"
        for number, plot in enumerate(drawn)
    ]
    return '<h2>Figures</h2>\n<div class="figures">\n' + "\n".join(items) + "\n</div>"


def _all_examples(run: RunFolder) -> str:
    """The first prompts as they come, then the best and the worst changes, each prompt once."""
    names = judges(run.eval_rows)
    judge = names[0] if names else None
    found = examples(run.eval_rows, judge)
    first, rest = found[:NUM_FIRST], found[NUM_FIRST:]
    scored = sorted((example for example in rest if example.change), key=lambda e: e.change or 0.0)
    better = [example for example in reversed(scored) if (example.change or 0.0) > 0][:NUM_EXTREME]
    worse = [example for example in scored if (example.change or 0.0) < 0][:NUM_EXTREME]
    groups = (
        (f"The first {len(first)} held-out prompts", first),
        (f"Most improved of the others, by {judge}", better),
        (f"Most worsened of the others, by {judge}", worse),
    )
    parts = [f"<h3>{html(title)}</h3>" + "".join(map(_example, group)) for title, group in groups if group]
    return "<h2>Completions before and after</h2>\n" + "\n".join(parts) if parts else ""


def _example(example: Example) -> str:
    sides = "".join(
        f'<div class="side"><h4>{when}</h4>{_side(row)}</div>'
        for when, row in (("before", example.before), ("after", example.after))
        if row is not None
    )
    row = example.after or example.before or {}
    label = ""
    if example.label is not None:
        scores = score_notes(row.get("label_scores"))
        label = f"<details><summary>reference text</summary>{html_text(example.label)}{badges(scores)}</details>"
    prompt = f'<div class="prompt">{html_text(example.prompt)}</div>'
    return f'<div class="example">{prompt}<div class="sides">{sides}</div>{label}</div>\n'


def _side(row: Mapping[str, Any]) -> str:
    notes = score_notes(row.get("scores"))
    notes += [f"{row['num_tokens']} tokens"] if "num_tokens" in row else []
    notes += ["truncated"] if row.get("truncated") else []
    return html_text(row["output"]) + badges(notes)


def score_notes(scores: Mapping[str, float | None] | None) -> list[str]:
    """Scores in words, one a judge."""
    return [f"{judge} {'unjudged' if score is None else f'{score:+.2f}'}" for judge, score in (scores or {}).items()]


def html_text(text: str) -> str:
    """A text of a model as a block, in the direction of its first letter."""
    return f'<div class="text" dir="auto">{html(text.strip())}</div>'


def badges(notes: Sequence[str]) -> str:
    """Small words under a block."""
    return f'<div class="badges">{html(" · ".join(notes))}</div>' if notes else ""


def _settings(run: RunFolder) -> str:
    parts = []
    if run.config_text:
        parts.append(f"<details><summary>config.toml</summary><pre>{html(run.config_text)}</pre></details>")
    if run.env:
        env = "\n".join(f"{name} = {value}" for name, value in run.env.items() if value is not None)
        parts.append(f"<details><summary>env.json</summary><pre>{html(env)}</pre></details>")
    return "<h2>Settings and environment</h2>\n" + "\n".join(parts) if parts else ""


def _files(run: RunFolder) -> str:
    names = ["config.toml", "env.json", "metrics.jsonl", "eval.jsonl", "summary.json"]
    names += sorted(str(path.relative_to(run.path)) for path in run.path.glob("pairs/*.jsonl"))
    names += sorted(path.name + "/" for path in run.path.glob("checkpoint-*") if path.is_dir())
    links = [f'<a href="{html(quote(name))}">{html(name)}</a>' for name in names if (run.path / name).exists()]
    return "<h2>Files</h2>\n<p>" + " · ".join(links) + "</p>" if links else ""


def html(value: Any) -> str:
    """Untrusted text as HTML text or attribute."""
    return escape(printable(str(value)))
