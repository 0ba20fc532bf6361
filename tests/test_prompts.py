import datetime
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_world import write_rows

from bpo_fast.config import DataConfig
from bpo_fast.prompts import load_prompts, read_rows, split_answer
from bpo_fast.tasks import get_task

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
HH = "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: Who are you? \n\nAssistant: A model."
CHAT = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Who are you? "},
]
ANSWER = [{"role": "assistant", "content": " A model."}]
PLAIN_CHAT = "Human: Hi there Assistant: Hello! Human: Who are you? Assistant:"


def load(rows, tokenizer, task="helpfulness", seed=None, dedupe=True, exclude=(), **data):
    data = DataConfig(**({"max_prompt_length": 200} | data))
    return load_prompts(rows, data, get_task(task), tokenizer, source="rows", seed=seed, dedupe=dedupe, exclude=exclude)


def one(row, tokenizer, task="helpfulness", **data):
    (prompt,) = load([row], tokenizer, task, **data).prompts
    return prompt


@pytest.fixture
def chat_tokenizer(tiny_model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("helpfulness", "Who are you?", "Who are you? Assistant:"),
        ("helpfulness", "Who are you? \n", "Who are you? Assistant:"),
        ("helpfulness", "Who are you? Assistant: ", "Who are you? Assistant:"),
        ("tldr", "SUBREDDIT: r/x POST: long", "SUBREDDIT: r/x POST: long\nTL;DR:"),
        ("tldr", "POST: long TL;DR: ", "POST: long TL;DR:"),
        ("harmlessness", "user: a assistant: b user: c", "user: a assistant: b user: c assistant:"),
    ],
)
def test_plain_text_ends_with_the_suffix_and_without_blanks(task, text, expected, tiny_tokenizer):
    prompt = one({"prompt": text}, tiny_tokenizer, task)
    assert prompt.text == expected
    assert list(prompt.ids) == tiny_tokenizer(expected)["input_ids"]
    assert prompt.label is None


@pytest.mark.parametrize(
    ("row", "text", "label"),
    [
        ({"prompt": "Q?", "label": " A. "}, "Q? Assistant:", "A."),
        ({"prompt": "Q?", "completion": "A."}, "Q? Assistant:", "A."),
        ({"question": "Q?", "answer": "A."}, "Q? Assistant:", "A."),
        ({"post": "Q?", "summary": "A."}, "Q? Assistant:", "A."),
        ({"query": "Q?", "response": "A."}, "Q? Assistant:", "A."),
        ({"prompt": "Q?", "chosen": "A.", "rejected": "B."}, "Q? Assistant:", "A."),
        ({"prompt": "Q?", "label": "", "chosen": "A."}, "Q? Assistant:", "A."),
        ({"chosen": HH, "rejected": HH + "!"}, PLAIN_CHAT, "A model."),
        ({"prompt": HH}, PLAIN_CHAT, "A model."),
        ({"prompt": "Human: Hi there\n\nAssistant:"}, "Hi there Assistant:", None),
        ({"prompt": HH.removesuffix(" A model."), "chosen": HH}, PLAIN_CHAT, "A model."),
        ({"prompt": CHAT}, PLAIN_CHAT, None),
        ({"messages": [*CHAT, {"role": "assistant", "content": " A model."}]}, PLAIN_CHAT, "A model."),
        ({"prompt": CHAT, "completion": [{"role": "assistant", "content": "A model."}]}, PLAIN_CHAT, "A model."),
        (
            {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "A model."}], "rejected": []},
            PLAIN_CHAT,
            "A model.",
        ),
        (  # UltraFeedback: the question stands beside the conversation that it begins
            {"prompt": "Who are you?", "chosen": [{"role": "user", "content": "Who are you? "}, *ANSWER]},
            "Who are you? Assistant:",
            "A model.",
        ),
        ({"prompt": "Hi there", "messages": [*CHAT, *ANSWER]}, PLAIN_CHAT, "A model."),
        ({"prompt": "Hi", "messages": [*CHAT, *ANSWER]}, "Hi Assistant:", None),
        ({"prompt": PLAIN_CHAT}, PLAIN_CHAT, None),  # as `sample` writes it
        (  # TRL's preference form with an implicit prompt
            {
                "chosen": [*CHAT, {"role": "assistant", "content": "A model."}],
                "rejected": [*CHAT, {"role": "assistant", "content": "Go away."}],
            },
            PLAIN_CHAT,
            "A model.",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_forms_of_a_row(row, text, label, tiny_tokenizer):
    prompt = one(row, tiny_tokenizer)
    assert (prompt.text, prompt.label) == (text, label)


@pytest.mark.parametrize("row", [{"prompt": CHAT}, {"messages": CHAT}, {"prompt": HH}, {"chosen": HH}], ids=str)
def test_conversations_take_the_chat_template(row, chat_tokenizer, tiny_tokenizer):
    rendered = "".join(f"<{m['role']}>{m['content'].strip()}\n" for m in CHAT) + "<bot>"
    prompt = one(row, chat_tokenizer)
    if "messages" in row or isinstance(row.get("prompt"), list):
        rendered = rendered.replace("Who are you?", "Who are you? ")  # the content of messages is left as it is
    assert prompt.text == rendered
    assert list(prompt.ids) == tiny_tokenizer(rendered)["input_ids"]
    assert one(row, chat_tokenizer, chat_template=False).text == PLAIN_CHAT


def test_a_question_beside_its_conversation_takes_the_chat_template(chat_tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}]
    row = {"prompt": "Q? ", "chosen": [*turns, *ANSWER], "rejected": [*turns, *ANSWER]}
    assert one(row, chat_tokenizer).text == "<system>Be brief.\n<user>Q?\n<bot>"
    assert one(row, chat_tokenizer, prompt_column="prompt").text == "Q? Assistant:"
    assert one({"prompt": "Q?", "chosen": ANSWER}, chat_tokenizer).text == "Q? Assistant:"


def test_annotators_are_shown_a_prompt_without_the_chat_template(chat_tokenizer):
    assert one({"prompt": CHAT}, chat_tokenizer).asked == PLAIN_CHAT
    assert one({"prompt": "Q?"}, chat_tokenizer, chat_template=True).asked == "Q? Assistant:"
    plain = one({"prompt": "Q?"}, chat_tokenizer)
    assert (plain.asked, plain.plain) == (plain.text, None)


def test_conversations_keep_their_turns(tiny_tokenizer):
    turns = (("user", "Hi there"), ("assistant", "Hello!"), ("user", "Who are you?"))
    for row in ({"prompt": HH}, {"chosen": HH}, {"messages": CHAT}):
        assert tuple((t.role, t.content.strip()) for t in one(row, tiny_tokenizer).turns) == turns
    assert one({"prompt": "Q?"}, tiny_tokenizer).turns == ()


def test_plain_text_takes_the_chat_template_only_when_asked(chat_tokenizer, tiny_tokenizer):
    assert one({"prompt": "Q?"}, chat_tokenizer).text == "Q? Assistant:"
    assert one({"prompt": "Q? "}, chat_tokenizer, chat_template=True).text == "<user>Q?\n<bot>"
    with pytest.raises(ValueError, match=r"data\.chat_template = true: the tokenizer has no chat template"):
        one({"prompt": "Q?"}, tiny_tokenizer, chat_template=True)


def test_what_a_chat_template_refuses_is_named(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('no system role') if messages[0].role == 'system' else 'Q' }}"
    turns = [{"role": "system", "content": "Be brief."}, *CHAT]
    with pytest.raises(ValueError, match=r"^rows: row 2: the tokenizer's chat template refuses it: no system role$"):
        load([{"prompt": CHAT}, {"prompt": turns}], chat_tokenizer)


def test_plain_conversations_of_other_tasks(tiny_tokenizer):
    expected = "user: Hi there assistant: Hello! user: Who are you? assistant:"
    assert one({"prompt": CHAT}, tiny_tokenizer, "harmlessness").text == expected
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert one({"prompt": system}, tiny_tokenizer).text == "system: Be brief. " + PLAIN_CHAT


def test_split_answer():
    messages, answer = split_answer(HH)
    assert [m["content"] for m in messages] == ["Hi there", "Hello!", "Who are you?"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert answer == "A model."
    assert split_answer("\n\nHuman: a\n\nAssistant: ")[1] is None
    assert split_answer("\n\nHuman: a")[1] is None


def test_columns_by_option(tiny_tokenizer):
    row = {"prompt": "no", "title": "Q?", "human": "A.", "label": "no"}
    prompt = one(row, tiny_tokenizer, prompt_column="title", label_column="human")
    assert (prompt.text, prompt.label) == ("Q? Assistant:", "A.")


def test_a_label_column_that_no_row_has_is_named(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"data\.label_column = sumary: .*; did you mean summary\?"):
        one({"prompt": "a question", "summary": "an answer"}, tiny_tokenizer, label_column="sumary")


def test_columns_ride_along_for_annotators(tiny_tokenizer):
    reserved = {"prompts": 1, "completion": "A", "completions": 2, "completion_ids": 3}
    assert one({"prompt": "Q?", "topic": "x", "n": 1, **reserved}, tiny_tokenizer).columns == {"topic": "x", "n": 1}


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": ""},
        {"prompt": None},
        {"prompt": " \n"},
        {"prompt": []},
        {"text": "Q?"},
        {"prompt": "", "chosen": HH},
        {"chosen": "An answer without its question."},
        {"prompt": [{"role": "assistant", "content": "A."}]},
        {"prompt": [{"role": "user", "content": " "}]},
        {"prompt": "\n\nHuman: \n\nAssistant: A."},
    ],
    ids=str,
)
def test_a_row_without_a_prompt_is_named(row, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"^rows: row 2 has no prompt"):
        load([{"prompt": "Q?"}, row], tiny_tokenizer)


@pytest.mark.parametrize("row", [{"prompt": "Assistant:"}, {"chosen": "\n\nAssistant: "}], ids=str)
def test_an_empty_answer_alone_is_no_prompt(row, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"^rows: row 1 has no prompt before the answer"):
        one(row, tiny_tokenizer)


@pytest.mark.parametrize("label", [True, False, 1])
def test_a_label_that_is_a_verdict_is_no_reference_text(label, tiny_tokenizer):
    assert one({"prompt": "Q?", "completion": "Yes.", "label": label}, tiny_tokenizer).label == "Yes."


def test_the_missing_column_is_named(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"row 1 has no prompt \(column title\)"):
        one({"prompt": "Q?"}, tiny_tokenizer, prompt_column="title")
    with pytest.raises(ValueError, match=r"row 1 has no prompt \(column prompt\); its columns: text, id \("):
        one({"text": "Q?", "id": 3}, tiny_tokenizer)


@pytest.mark.parametrize(
    "value", [3, {"role": "user"}, ["Q?"], [{"role": "user"}], [{"role": "user", "content": None}]], ids=str
)
def test_a_prompt_of_another_type_is_named(value, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"^rows: row 1: a prompt is text or messages"):
        one({"prompt": value}, tiny_tokenizer)


def test_repeated_prompts_are_dropped_and_counted(tiny_tokenizer):
    rows = [{"prompt": p} for p in ("a", "b", "a ", "c", "a", "b Assistant:")]
    found = load(rows, tiny_tokenizer)
    assert [p.id for p in found.prompts] == [0, 1, 3]
    assert (found.num_rows, found.num_duplicates) == (6, 3)
    assert len(load(rows, tiny_tokenizer, dedupe=False).prompts) == 6


def test_prompts_of_another_set_are_dropped_and_counted(tiny_tokenizer):
    found = load([{"prompt": p} for p in "aabcc"], tiny_tokenizer, exclude=["a Assistant:", "z"])
    assert [p.text[0] for p in found.prompts] == ["b", "c"]
    assert (found.num_excluded, found.num_duplicates) == (1, 2)


def test_long_prompts_are_dropped_or_cut_from_the_left(tiny_tokenizer):
    rows = [{"prompt": "How do I reset the printer?"}, {"prompt": "How?"}]
    ids = [tiny_tokenizer(r["prompt"] + " Assistant:")["input_ids"] for r in rows]
    limit = len(ids[0]) - 1
    assert len(ids[1]) <= limit
    found = load(rows, tiny_tokenizer, max_prompt_length=limit)
    assert [p.id for p in found.prompts] == [1]
    assert (found.num_too_long, found.num_truncated) == (1, 0)
    found = load(rows, tiny_tokenizer, max_prompt_length=limit, long_prompts="truncate")
    assert [list(p.ids) for p in found.prompts] == [ids[0][1:], ids[1]]
    assert (found.num_too_long, found.num_truncated) == (0, 1)
    assert load(rows, tiny_tokenizer, max_prompt_length=limit + 1).num_too_long == 0


def test_no_usable_prompt_says_why(tiny_tokenizer):
    with pytest.raises(
        ValueError, match=r"^rows: no usable prompt among 2 rows \(1 over data.max_prompt_length = 1, 1 rep"
    ):
        load([{"prompt": "a"}, {"prompt": "a"}], tiny_tokenizer, max_prompt_length=1)


def with_specials(tokenizer, template):
    """A copy whose encodings carry <pad> as BOS or </s> as EOS."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<pad>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<pad>", eos_token="</s>")


def test_an_eos_that_the_tokenizer_appends_is_cut(tiny_tokenizer):
    tokenizer = with_specials(tiny_tokenizer, "$A </s>")
    assert tokenizer("Q? Assistant:")["input_ids"][-1] == 1
    assert list(one({"prompt": "Q?"}, tokenizer).ids) == tiny_tokenizer("Q? Assistant:")["input_ids"]


def test_bos_is_kept_even_where_the_prompt_is_cut(tiny_tokenizer):
    tokenizer = with_specials(tiny_tokenizer, "<pad> $A")
    ids = tiny_tokenizer("How do I reset it? Assistant:")["input_ids"]
    row = {"prompt": "How do I reset it?"}
    assert list(one(row, tokenizer).ids) == [0, *ids]
    assert list(one(row, tokenizer, max_prompt_length=4, long_prompts="truncate").ids) == [0, *ids[-3:]]
    assert list(one(row, tokenizer, max_prompt_length=1, long_prompts="truncate").ids) == [0]


def test_the_seed_alone_decides_the_order(tiny_tokenizer):
    rows = [{"prompt": f"{i}"} for i in range(50)]
    orders = [[p.id for p in load(rows, tiny_tokenizer, seed=s).prompts] for s in (1, 1, 2, None)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[3] == list(range(50))
    assert sorted(orders[0]) == orders[3]


ROWS = [{"prompt": f"Q{i}\u2028ü?", "n": i} for i in range(5)]


def test_files_behind_the_last_row_that_is_wanted_are_not_read(tmp_path):
    for i in range(2):
        write_rows(tmp_path / f"train-{i}.jsonl", ROWS)
    (tmp_path / "train-2.jsonl").write_text("no rows")
    assert read_rows(f"{tmp_path}[3:10]") == ROWS[3:] + ROWS
    with pytest.raises(ValueError, match=r"train-2\.jsonl: line 1: invalid JSON"):
        read_rows(f"{tmp_path}[:11]")


@pytest.mark.parametrize(
    ("value", "reason"), [("7" * 5000, "Exceeds the limit"), ("[" * 100_000, "maximum recursion depth")]
)
def test_a_value_that_python_cannot_hold_is_named(value, reason, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Q?", "n": ' + value + "}\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 1: invalid JSON: {reason}"):
        read_rows(str(tmp_path / "a.jsonl"))


def test_jsonl_gz_and_parquet_hold_the_same_rows(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS)
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS)
    (tmp_path / "raw.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n \r\n").encode())
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    for name in ("a.jsonl", "raw.jsonl", "b.jsonl.gz", "c.parquet"):
        assert read_rows(str(tmp_path / name)) == ROWS, name
        assert read_rows(f"{tmp_path / name}[:2]") == ROWS[:2], name
        assert read_rows(f"{tmp_path / name}[:9]") == ROWS, name


def test_parquet_messages_become_prompts(tmp_path, tiny_tokenizer):
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": CHAT, "when": datetime.date(2026, 1, 2)}]), tmp_path / "c.parquet"
    )
    assert one(read_rows(str(tmp_path / "c.parquet"))[0], tiny_tokenizer).text == PLAIN_CHAT


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["train.jsonl", "dev.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["train.jsonl", "validation.jsonl"], "test", ["validation.jsonl"]),
        (["train.jsonl", "validation.jsonl"], "validation", ["validation.jsonl"]),
        (
            ["training-notes.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            "train",
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        ),
        (["prompts.jsonl", "sft.jsonl"], "train", ["prompts.jsonl"]),
        (["data/train.jsonl", "data/test.jsonl"], "train", ["data/train.jsonl"]),
        (["train/0000.jsonl", "test/0000.jsonl"], "test", ["test/0000.jsonl"]),
        (["anything.jsonl"], "train", ["anything.jsonl"]),
    ],
)
def test_a_folder_is_read_by_split(files, split, expected, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / file, [{"prompt": file}])
    assert [r["prompt"] for r in read_rows(str(tmp_path), split)] == expected


def test_a_split_whose_name_others_begin_with(tmp_path):
    for name in ("train_gen-00000-of-00001", "train_prefs-00000-of-00002", "train_prefs-00001-of-00002", "test_a"):
        table = pyarrow.Table.from_pylist([{"prompt": name}])
        (tmp_path / "data").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{name}.parquet")
    message = rf"{tmp_path}: 'train' may be train_gen, train_prefs; name one as split or eval_split"
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path))
    preferred = [row["prompt"] for row in read_rows(str(tmp_path), "train_prefs")]
    assert preferred == [f"train_prefs-0000{i}-of-00002" for i in range(2)]
    assert read_rows(str(tmp_path), "test") == [{"prompt": "test_a"}]
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001-0123abcd.parquet")
    assert read_rows(str(tmp_path)) == [{"prompt": "test_a"}]


def test_a_folder_without_the_split_lists_what_is_there(tmp_path):
    with pytest.raises(ValueError, match=r"no file for split 'train' \(train or prompts\); there: no data files"):
        read_rows(str(tmp_path))
    write_rows(tmp_path / "a.jsonl", ROWS)
    write_rows(tmp_path / "b.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"no file for split 'test' .*; there: a\.jsonl, b\.jsonl"):
        read_rows(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", b"", "no rows"),
        ("e.jsonl", b"\n \n", "no rows"),
        ("e.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3: invalid JSON: Expecting ',' delimiter"),
        ("e.jsonl", b'{"prompt": "a"}\n["b"]\n', "line 2: not a JSON object"),
        ("e.jsonl", b'{"prompt": "\\ud83d"}', "line 1: half of a surrogate pair is no text"),
        ("e.jsonl", b'{"prompt": "\xff"}', "not UTF-8 text"),
        ("e.jsonl.gz", b'{"prompt": "a"}', "Not a gzipped file"),
        ("e.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "Compressed file ended before"),
        ("e.parquet", b"PAR1 no", "not a Parquet file"),
        ("e.csv", b"prompt,label\na,b\n", "a table of text is not read"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_bad_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_rows(str(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_surrogate_pairs_are_text(tmp_path):
    (tmp_path / "e.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}')
    assert read_rows(str(tmp_path / "e.jsonl")) == [{"prompt": "\N{GRINNING FACE}"}]


@pytest.mark.parametrize("name", ["./no/such", "/no/such/file.jsonl", "nothing.jsonl", "data/none.jsonl", "nothing"])
def test_a_missing_file_is_named_and_not_sought_elsewhere(name):
    with pytest.raises(ValueError, match=r"no such file or folder$"):
        read_rows(name)


@pytest.mark.parametrize("rows", ["[5]", "[-3:]", "[::2]", "[]"])
def test_other_slices_are_not_sought_on_the_hub(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    with pytest.raises(ValueError, match=r"rows\.jsonl\[.*\]: rows are taken as \[:n\] or \[m:n\]"):
        read_rows(f"{path}{rows}")


def test_a_slice_of_nothing_is_no_rows(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"no rows$"):
        read_rows(f"{path}[:0]")


HUB_FILES = {
    "base/train.jsonl.gz": gzip.compress(json.dumps({"chosen": HH}).encode(), mtime=0),
    "base/test.jsonl.gz": gzip.compress(json.dumps({"chosen": HH + " For the test."}).encode(), mtime=0),
    "base-large/train.jsonl": b'{"prompt": "another folder"}',
    "README.md": b"# data",
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The two endpoints that reading a data set takes: the file tree, and a file by name."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/owner/chats/tree/"):
            tree = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in HUB_FILES.items()]
            self._send(json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
        elif path.startswith("/datasets/owner/chats/resolve/main/"):
            name = path.removeprefix("/datasets/owner/chats/resolve/main/")
            self._send(HUB_FILES[name], body, {"ETag": f'"{name}"', "X-Repo-Commit": "1" * 40})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content, body, headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


READ = """
import json, sys, time
time.sleep = lambda seconds: None  # between the retries of the client
from bpo_fast.prompts import read_rows
for source, split in json.loads(sys.argv[1]):
    try:
        print(json.dumps(read_rows(source, split)))
    except ValueError as error:
        print(error)
"""


def read_in_subprocess(cache: Path, endpoint: str, sources, **env):
    """read_rows in a process of its own: the address of the Hub is read at import."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), **env}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(sources)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return done.stdout.splitlines()


def test_a_hub_data_set_is_read_by_split_and_folder(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        train, test, wrong_split, missing = read_in_subprocess(
            tmp_path,
            endpoint,
            [
                ("owner/chats/base", "train"),
                ("owner/chats/base[:1]", "test"),
                ("owner/chats/base", "dev"),
                ("owner/none", "train"),
            ],
        )
    finally:
        server.shutdown()
        server.server_close()
    assert json.loads(train) == [{"chosen": HH}]
    assert json.loads(test) == [{"chosen": HH + " For the test."}]
    assert "owner/chats: no file for split 'dev'" in wrong_split
    assert "base/test.jsonl.gz" in wrong_split
    assert missing.startswith("owner/none: no such file or folder, and the Hub did not give it: ")


@pytest.mark.parametrize(("offline", "reason"), [("1", "offline"), ("0", "Connection refused")])
def test_an_unreachable_hub_is_one_clear_line(offline, reason, tmp_path):
    (line,) = read_in_subprocess(tmp_path, "http://127.0.0.1:9", [("owner/chats", "train")], HF_HUB_OFFLINE=offline)
    assert line.startswith("owner/chats: no such file or folder, and the Hub did not give it: ")
    assert reason in line


@pytest.mark.parametrize(("cut", "rows"), [("[1:]", ROWS[1:]), ("[1:2]", ROWS[1:2]), ("[:]", ROWS)])
def test_rows_after_the_first_ones(tmp_path, cut, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS), encoding="utf-8")
    assert read_rows(f"{path}{cut}") == rows
