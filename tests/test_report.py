import io
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from fake_run import write_fake_run
from rich.console import Console

from bpo_fast.metrics import Metrics
from bpo_fast.report import html_text, print_examples, print_summary, write_report
from bpo_fast.tasks import ASSETS

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, visible text and links of a page; fails if the tags do not nest."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.links, self.texts, self._open = [], [], [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on")]
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not set(self._open) & {"style", "svg"}:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture
def no_figures(monkeypatch):
    """For the tests that look at text alone."""
    monkeypatch.setattr("bpo_fast.report.plots.plots", lambda run: ([], []))


def _page(run_dir) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def _rewrite(run_dir, name: str, **changes) -> None:
    path = run_dir / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_rows(run_dir, edit) -> None:
    path = run_dir / "eval.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(edit(row)) + "\n" for row in rows))


def _rows(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]


def _printed(function, *args, width: int = 80, **kwargs) -> str:
    console = Console(file=io.StringIO(), width=width)
    function(*args, console, **kwargs)
    return console.file.getvalue()


def test_page_tells_the_whole_run(tmp_path):
    write_fake_run(tmp_path)
    page = _page(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    before, after = (summary[when]["win_rate"]["rubric"] for when in ("before", "after"))
    assert f"rubric : {100 * before:.1f}% before, {100 * after:.1f}% after" in page.text
    assert f"({100 * (after - before):+.1f} points, 95% interval" in page.text
    assert "BPO: DPO against the behavior LLM (the policy at the start of the phase), 2 phases, 1 member" in page.text
    assert "40 steps, 104.8 seconds, 455 pairs, 2,310 tokens a second, peak memory 1.33 GiB" in page.text
    assert "AMD EPYC, 2 cores, 23.5 GiB" in page.text
    assert "bpo-fast train --task helpfulness --phases 2" in page.text
    assert "truncated 9.0% 6.0% -3.0 points" in page.text
    assert "Pairs: 455 kept (51 with a truncated completion), 32 tied, 17 identical, 8 unscored." in page.text
    assert "Not in this report" not in page.text
    assert page.tags.count("svg") == 11


def test_page_needs_nothing_but_itself(tmp_path):
    write_fake_run(tmp_path)
    (tmp_path / "checkpoint-40").mkdir()
    (tmp_path / "pairs" / "phase 'x' #2.jsonl").write_text("")
    page = _page(tmp_path)
    html = (tmp_path / "report.html").read_text()
    outside = [link for link in page.links if not link.startswith("#")]
    assert all((tmp_path / unquote(link)).exists() for link in outside)
    assert {"checkpoint-40/", "pairs/phase-00.jsonl", "summary.json"} <= set(outside)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.findall(r"@import|url\((?!#)", html)
    assert "default-src 'none'" in html
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


EVIL = "$x_{$ </div></body><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\x00&amp;\"'"


def test_untrusted_text_stays_text(tmp_path):
    write_fake_run(tmp_path, judges=(EVIL,))
    _edit_rows(tmp_path, lambda row: row | {"prompt": EVIL, "output": EVIL, "label": EVIL})
    _rewrite(tmp_path, "summary.json", task=EVIL, model=EVIL, judges=[EVIL])
    _rewrite(tmp_path, "env.json", command=EVIL, cpu=EVIL)
    (tmp_path / "config.toml").write_text(f"task = {json.dumps(EVIL)}\n")
    page = _page(tmp_path)
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("body") == 1
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "&amp;\"'" in page.text
    html = (tmp_path / "report.html").read_text()
    assert "\x1b" not in html
    assert "\x00" not in html


def test_first_improved_and_worsened_prompts_are_shown_once(tmp_path, no_figures):
    write_fake_run(tmp_path, judges=("rubric",), num_prompts=20)
    change = {8: 5.0, 9: -5.0, 10: 4.0, 0: 9.0}

    def edit(row):
        score = change.get(row["prompt_id"], 0.0) if row["when"] == "after" else 0.0
        return row | {"prompt": f"prompt-{row['prompt_id']}.", "scores": {"rubric": score}}

    _edit_rows(tmp_path, edit)
    text = _page(tmp_path).text
    first, rest = text.split("Most improved of the others, by rubric")
    better, worse = rest.split("Most worsened of the others, by rubric")
    assert re.findall(r"prompt-(\d+)\.", first) == ["0", "1", "2", "3", "4", "5"]
    assert re.findall(r"prompt-(\d+)\.", better) == ["8", "10"]
    assert re.findall(r"prompt-(\d+)\.", worse) == ["9"]


def test_run_without_reference_texts(tmp_path, no_figures):
    write_fake_run(tmp_path, labels=False)
    page = _page(tmp_path)
    assert "The evaluation data has no reference texts: there are no win rates." in page.text
    assert "mean score, rubric" in page.text
    assert "win rate," not in page.text
    assert "reference text " not in page.text


def test_killed_run_has_a_report(tmp_path):
    write_fake_run(tmp_path, finished=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    page = _page(tmp_path)
    assert "summary.json is missing: the run was stopped before its end, or is still going." in page.text
    assert "eval.jsonl is missing" in page.text
    assert "metrics.jsonl" not in page.text.partition("Results")[0]
    assert "win rate, rubric 42.0% n/a n/a" in page.text
    assert "BPO: DPO against the behavior LLM" in page.text
    assert page.tags.count("svg") == 10


def test_empty_folder_has_a_report(tmp_path):
    page = _page(tmp_path)
    for name in ("config.toml", "env.json", "metrics.jsonl", "eval.jsonl", "summary.json"):
        assert f"{name} is missing" in page.text
    assert "The run folder has no evaluation." in page.text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    write_fake_run(tmp_path)
    (tmp_path / "config.toml").write_text("task = ")
    (tmp_path / "env.json").write_text("{")
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([lines[0], "nonsense\n", "[1]\n", *lines[1:]]))
    _edit_rows(tmp_path, lambda row: {"when": "before"} if row["prompt_id"] == 3 else row)
    page = _page(tmp_path)
    for sentence in (
        "config.toml is not TOML",
        "env.json is damaged",
        "summary.json cannot be read",
        f"metrics.jsonl is damaged: 2 of {len(lines) + 2} JSON objects cannot be read.",
        "eval.jsonl: 2 rows lack when, prompt_id, prompt or output.",
    ):
        assert sentence in page.text
    assert page.tags.count("svg") == 11


def test_values_that_are_missing_or_null(tmp_path):
    write_fake_run(tmp_path)
    _edit_rows(tmp_path, lambda row: row | {"scores": {"rubric": None}, "label_scores": None})
    _rewrite(tmp_path, "summary.json", before={}, after={"score": {"rubric": None}, "kl": 1.0}, seconds={"total": None})
    metrics = Metrics(tmp_path, keep_lines=0)
    metrics.log("phase", 0, {"phase": 0, "objective/kl": float("nan"), "timing/rollout_s": float("nan")})
    metrics.close()
    page = _page(tmp_path)
    assert "rubric unjudged" in page.text
    assert "KL to the start (nats) n/a 1.000 n/a" in page.text


def test_embedded_parts_are_called_embedded(tmp_path, no_figures):
    write_fake_run(tmp_path)
    _rewrite(tmp_path, "summary.json", model=str(ASSETS / "policy"), annotator="org/reward-model")
    text = _page(tmp_path).text
    assert "model embedded policy data" in text
    assert "annotator org/reward-model judges" in text


def test_an_annotator_that_judges_itself_is_said_to(tmp_path, no_figures):
    write_fake_run(tmp_path, judges=("rm",))
    assert "(the annotator itself)" not in _page(tmp_path).text
    path = tmp_path / "config.toml"
    path.write_text(path.read_text().replace("[annotator]", '[annotator]\npath = "rm"'))
    assert "judges rm (the annotator itself)" in _page(tmp_path).text


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("width", [80, 120])
def test_summary_is_plain_and_fits(tmp_path, width):
    write_fake_run(tmp_path, judges=("rubric", "OpenAssistant/reward-model-deberta-v3-large-v2-and-more" * 2))
    summary = json.loads((tmp_path / "summary.json").read_text())
    text = _printed(print_summary, summary, width=width)
    assert "\x1b" not in text
    assert all(len(line) <= width for line in text.splitlines())
    row = next(line for line in text.splitlines() if line.startswith("win rate, rubric"))
    before, after = (100 * summary[when]["win_rate"]["rubric"] for when in ("before", "after"))
    assert row.split()[3:] == [f"{before:.1f}%", f"{after:.1f}%", f"{after - before:+.1f}", "points"]
    assert "455 kept (51 with a truncated completion), 32 tied, 17 identical" in text
    assert "rollout 28.4" in text


def test_a_narrow_summary_keeps_words_whole(tmp_path):
    write_fake_run(tmp_path, judges=("rubric",))
    text = _printed(print_summary, json.loads((tmp_path / "summary.json").read_text()), width=40)
    assert all(len(line) <= 40 for line in text.splitlines())
    assert {"prompts", "rubric", "truncated", "distinct-2", "(tokens)", "outputs"} <= set(text.split())


def test_summary_without_labels_says_so():
    text = _printed(print_summary, {"after": {"win_rate": {}, "kl": 1.0}})
    assert "No win rate: the evaluation data has no reference texts" in text
    assert "KL to the start (nats)     n/a  1.000     n/a" in text


@pytest.mark.parametrize("width", [80, 120])
def test_examples_are_plain_and_fit(tmp_path, width):
    write_fake_run(tmp_path)
    _edit_rows(tmp_path, lambda row: row | {"prompt": "begin " + "very long " * 100 + "end?"})
    text = _printed(print_examples, _rows(tmp_path), width=width)
    assert "\x1b" not in text
    assert all(len(line) <= width for line in text.splitlines())
    assert re.findall(r"Example (\d) of 3", text) == ["1", "2", "3"]
    assert len(re.findall(r"long\s+\[\.\.\.\]\s+(?:long|very)", text)) == 3
    assert text.count("end?") == 3
    # Side by side where there is room, one under the other where there is not.
    headings = [line for line in text.splitlines() if "before" in line and "after" in line]
    assert len(headings) == (3 if width == 120 else 0)


def test_examples_are_spread_from_least_to_most_change(tmp_path):
    write_fake_run(tmp_path, judges=("rubric",), num_prompts=30)

    def edit(row):
        score = float(row["prompt_id"]) if row["when"] == "after" else 0.0
        return row | {"prompt": f"prompt-{row['prompt_id']}.", "scores": {"rubric": score}}

    _edit_rows(tmp_path, edit)
    assert re.findall(r"prompt-(\d+)\.", _printed(print_examples, _rows(tmp_path))) == ["5", "15", "25"]
    assert re.findall(r"prompt-(\d+)\.", _printed(print_examples, _rows(tmp_path), n=1)) == ["15"]


def test_examples_without_scores_are_the_first_ones(tmp_path):
    write_fake_run(tmp_path, judges=())
    text = _printed(print_examples, _rows(tmp_path), n=2)
    assert re.findall(r"room (\d+)", text) == ["0", "1"]


def test_examples_cannot_drive_the_terminal():
    row = {"when": "after", "prompt_id": 1, "prompt": "[red]hi[/red]\x1b]0;x\x07", "output": "\x1b[2J[bold]\r\nend"}
    text = _printed(print_examples, [row])
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]hi[/red]" in text
    assert "[bold]" in text


def test_texts_run_in_the_direction_of_their_script():
    assert html_text(" \u05e9\u05dc\u05d5\u05dd ") == '<div class="text" dir="auto">\u05e9\u05dc\u05d5\u05dd</div>'
