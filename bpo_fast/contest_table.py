"""The table of `bpo-fast eval` on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bpo_fast.run_folder import number_text, printable

SHAPES = (
    ("mean length (tokens)", "tenth", "mean_tokens"),
    ("mean length (words)", "tenth", "mean_words"),
    ("truncated", "share", "clipped_ratio"),
    ("distinct-1 (words)", "score", "distinct_1"),
    ("distinct-2 (words)", "score", "distinct_2"),
    ("distinct-3 (words)", "score", "distinct_3"),
    ("unique outputs", "share", "unique"),
)
RATES = (
    ("win rate", "share", "win_rate"),
    ("win rate at equal length", "share", "length_controlled_win_rate"),
    ("mean score", "score", "score"),
)


def print_evaluation(found: Mapping[str, Any], console: Console) -> None:
    """Prints what `contest.evaluate` returned: a column a contestant, intervals in brackets, then head to head."""
    sides = found["contestants"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    greedy = ", greedy" if all(side["sampled"] for side in sides) else ""
    table.add_column(f"{found['num_prompts']} prompts{greedy}, [95% interval]", overflow="fold")
    for side in sides:
        table.add_column(Text(printable(side["name"])), justify="right", overflow="fold")
    for judge in found["judges"]:
        for words, kind, key in RATES:
            cells = [_interval_text(side["judges"][judge].get(key), kind) for side in sides]
            table.add_row(Text(f"{words}, {judge}"), *map(Text, cells))
        if any(side["judges"][judge]["num_unjudged"] for side in sides):
            table.add_row(Text(f"unjudged, {judge}"), *(str(side["judges"][judge]["num_unjudged"]) for side in sides))
    for words, kind, key in SHAPES:
        if any(key in side for side in sides):
            table.add_row(words, *(number_text(side.get(key), kind) for side in sides))
    console.print(table)
    for judge, duel in found.get("head_to_head", {}).items():
        console.print(Text(f"{printable(sides[0]['name'])} against {printable(sides[1]['name'])}, {judge}:", "bold"))
        counts = ", ".join(f"{duel[key]} {key}" for key in ("wins", "ties", "losses", "unjudged"))
        console.print(Text(f"  {counts}"))
        for words, _, key in RATES[:2]:
            if key in duel:
                console.print(Text(f"  {words} (ties are halves): {_interval_text(duel[key], 'share')}"))
        if change := duel.get("win_rate_difference"):
            mean, low, high = (100 * change[key] for key in ("mean", "low", "high"))
            console.print(
                Text(
                    f"  difference of the win rates against the reference: {mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
                )
            )
    for judge, about in found["judges"].items():
        for note in about["notes"]:
            console.print(Text(f"{judge}: {note}"))


def _interval_text(interval: Mapping[str, float] | None, kind: str) -> str:
    if interval is None:
        return "n/a"
    mean, low, high = (number_text(interval[key], kind) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
