import dataclasses
import datetime
import json
import math
import random

import numpy as np
import pytest
from tiny_world import write_rows

from bpo_fast.config import DataConfig
from bpo_fast.pairs import PairCounts, PhasePairs, make_pairs, read_pairs, replay_pairs, write_pairs
from bpo_fast.prompts import load_prompts, read_rows
from bpo_fast.tasks import get_task
from bpo_fast.types import Completion, Dropped, Pair, Prompt, Turn


def completion(prompt_id, sample_id, ids, *, truncated=False, **fields):
    return Completion(prompt_id, sample_id, tuple(ids), " ".join(map(str, ids)), truncated, 3, 17, **fields)


def a_pair(i, **fields):
    draw = random.Random(i)
    chosen = completion(i, 0, [draw.randrange(300) for _ in range(4)])
    rejected = completion(i, 1, [draw.randrange(300) for _ in range(6)], truncated=True)
    prompt = Prompt(i, f"Question {i} Assistant:", (5, 6, i), label=f"label {i}", columns={"topic": i})
    return Pair(prompt, chosen, rejected, 1.5, -0.25, **fields)


def a_phase(*pairs, phase=0, **fields):
    return PhasePairs(
        phase, 7, tuple(pairs), PairCounts(kept=len(pairs), tied=2), {"completions/mean_length": 1 / 3}, **fields
    )


def some_dropped():
    prompt = Prompt(8, "Question 8 Assistant:", (5, 6, 8), label="label 8", columns={"topic": "\u2028"})
    sides = completion(8, 0, [1, 2], logps=(-0.5, -1e-30)), completion(8, 1, [1, 3], truncated=True)
    same = completion(9, 0, [4], member=1), completion(9, 1, [4])
    return Dropped(prompt, sides, (math.pi, math.pi), "tied"), Dropped(
        Prompt(9, "", (1,), turns=(Turn("system", "Be kind."), Turn("user", "Q?"))), same, (0.5, None), "identical"
    )


def counts_of(sides, scores):
    pairs, dropped = make_pairs([Prompt(0, "", (1,))], [sides], [scores])
    return PairCounts.of(pairs, (d.reason for d in dropped))


CASES = [  # ids, ids, score, score -> which side is chosen, or why there is no pair
    ([1, 2], [1, 3], 0.5, 0.25, 0),
    ([1, 2], [1, 3], 0.25, 0.5, 1),
    ([1, 2], [1, 3], -1.0, 0.0, 1),
    ([1, 2], [1, 3], 0.5, 0.5, "tied"),
    ([1, 2], [1, 3], 0.0, -0.0, "tied"),
    ([1, 2], [1, 2], 0.5, 0.25, "identical"),
    ([1, 2], [1, 2], None, None, "identical"),
    ([1, 2], [1, 2, 1], 0.1, 0.1 + 1e-12, 1),
    ([1, 2], [1, 3], None, 0.5, "unscored"),
    ([1, 2], [1, 3], 0.5, None, "unscored"),
]


def test_the_higher_score_is_chosen_and_the_rest_is_counted():
    prompts = [Prompt(i, str(i), (1,)) for i in range(len(CASES))]
    completions = [(completion(i, 0, a), completion(i, 1, b)) for i, (a, b, *_) in enumerate(CASES)]
    pairs, dropped = make_pairs(prompts, completions, [(a, b) for _, _, a, b, _ in CASES])
    kept = [i for i, case in enumerate(CASES) if isinstance(case[-1], int)]
    assert [p.prompt.id for p in pairs] == kept
    for pair in pairs:
        case = CASES[pair.prompt.id]
        assert (pair.chosen.sample_id, pair.rejected.sample_id) == (case[-1], 1 - case[-1])
        assert (pair.chosen_score, pair.rejected_score) == (case[2 + case[-1]], case[3 - case[-1]])
    assert dropped == [
        Dropped(prompts[i], completions[i], (a, b), fate)
        for i, (_, _, a, b, fate) in enumerate(CASES)
        if isinstance(fate, str)
    ]
    assert PairCounts.of(pairs, (d.reason for d in dropped)) == PairCounts(
        kept=4, tied=2, identical=2, unscored=2, truncated=0
    )


@pytest.mark.parametrize(("first", "second", "expected"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_a_kept_pair_with_a_truncated_side_counts_once(first, second, expected):
    sides = completion(0, 0, [1], truncated=bool(first)), completion(0, 1, [2], truncated=bool(second))
    assert counts_of(sides, (1.0, 0.0)) == PairCounts(kept=1, truncated=expected)
    assert counts_of(sides, (1.0, 1.0)) == PairCounts(tied=1)


def test_a_completion_that_the_engine_gave_up_drops_its_pair():
    given_up = [Completion(0, s, (), "", True, 0, s) for s in range(2)]
    whole = Completion(0, 1, (5, 1), "a", False, 0, 1)
    for sides in (given_up, [given_up[0], whole]):
        assert counts_of(sides, (1.0, 2.0)) == PairCounts(aborted=1)


def test_a_completion_that_began_with_a_stop_string_drops_its_pair():
    empty = Completion(0, 0, (), "", False, 0, 0, stopped=True)
    whole = Completion(0, 1, (5, 1), "a", False, 0, 1)
    given_up = Completion(0, 1, (), "", True, 0, 1)
    assert counts_of((empty, whole), (1.0, 2.0)) == PairCounts(empty=1)
    assert counts_of((empty, empty), (1.0, 2.0)) == PairCounts(empty=1)
    assert counts_of((empty, given_up), (1.0, 2.0)) == PairCounts(aborted=1)


def test_every_prompt_has_one_fate():
    draw = random.Random(0)
    prompts = [Prompt(i, "", (1,)) for i in range(500)]
    sides = [
        [
            dataclasses.replace(completion(i, s, [draw.randrange(3)] * (draw.random() < 0.9)), stopped=stopped)
            for s in range(2)
        ]
        for i, stopped in enumerate(draw.choices([False, True], k=500))
    ]
    scores = [[draw.choice([None, 0.0, 1.0]) for _ in range(2)] for _ in range(500)]
    pairs, dropped = make_pairs(prompts, sides, scores)
    fates = dataclasses.asdict(PairCounts.of(pairs, (d.reason for d in dropped)))
    del fates["truncated"]
    assert sum(fates.values()) == 500
    assert all(num for fate, num in fates.items() if fate not in ("too_long", "cut"))  # those are of recorded pairs


def test_counts_add_up():
    assert PairCounts(1, 2, 3, 4, 5) + PairCounts(10, 20, 30, 40, 50) == PairCounts(11, 22, 33, 44, 55)


def test_write_and_read_is_exact(tmp_path):
    odd = 'a\u2028b\u2029c\x85d\x0be\r\nf\tg"h\\ \N{GRINNING FACE} \x00 \ufeff'
    draw = np.random.default_rng(0)
    logps = [tuple(float(x) for x in draw.normal(-50, 20, 2).astype(np.float32)) for _ in range(50)]
    pairs = [a_pair(i, ref_logps=both) for i, both in enumerate(logps)]
    pairs[0] = dataclasses.replace(
        pairs[0],
        prompt=Prompt(0, odd, (1, 2), label=odd, columns={odd: odd, "nested": {"a": [1, None, True]}}),
        chosen=dataclasses.replace(pairs[0].chosen, text=odd, seed=2**63 - 1, logps=(-0.1, -1e-30, -3.0, -0.0)),
        chosen_score=math.pi,
    )
    pairs[1] = dataclasses.replace(pairs[1], ref_logps=None)
    phase = a_phase(*pairs, phase=4, num_spare=3, scored=True, dropped=some_dropped())
    path = tmp_path / "pairs" / "phase-04.jsonl"
    write_pairs(path, phase)
    assert read_pairs(path) == phase
    assert np.array_equal(np.float32([p.ref_logps for p in read_pairs(path).pairs[2:]]), np.float32(logps[2:]))
    assert [p.name for p in path.parent.iterdir()] == ["phase-04.jsonl"]


def test_a_phase_without_pairs_is_read_back(tmp_path):
    write_pairs(tmp_path / "p.jsonl", a_phase())
    assert read_pairs(tmp_path / "p.jsonl") == a_phase()


def test_what_was_dropped_is_a_line_of_its_own_with_the_reason(tmp_path):
    path = tmp_path / "p.jsonl"
    write_pairs(path, a_phase(a_pair(0), dropped=some_dropped()))
    header, pair, *rows = (json.loads(line) for line in path.read_text().split("\n")[:-1])
    assert "dropped" not in header.keys() | pair.keys()
    assert [row["dropped"] for row in rows] == ["tied", "identical"]
    assert [row["scores"] for row in rows] == [[math.pi, math.pi], [0.5, None]]
    first, second = rows[0]["completions"]
    assert (first["ids"], second["ids"], first["text"], first["policy_version"], first["seed"]) == (
        [1, 2],
        [1, 3],
        "1 2",
        3,
        17,
    )
    assert rows[0]["prompt"]["ids"] == [5, 6, 8]


def test_a_file_of_before_what_was_dropped_was_kept_is_read(tmp_path):
    path = tmp_path / "p.jsonl"
    write_pairs(path, a_phase(a_pair(0), dropped=some_dropped()))
    lines = path.read_text().split("\n")[:-1]
    path.write_text("".join(line + "\n" for line in lines if not line.startswith('{"dropped"')))
    assert read_pairs(path) == a_phase(a_pair(0))


def test_columns_that_json_does_not_know_are_kept_as_text(tmp_path):
    pair = a_pair(0)
    columns = {"day": datetime.date(2026, 1, 2), "raw": b"x"}
    write_pairs(
        tmp_path / "p.jsonl",
        a_phase(dataclasses.replace(pair, prompt=dataclasses.replace(pair.prompt, columns=columns))),
    )
    assert read_pairs(tmp_path / "p.jsonl").pairs[0].prompt.columns == {"day": "2026-01-02", "raw": "b'x'"}


@pytest.mark.parametrize(
    "content",
    ["", "\n", "{}", "[]", '{"format": "other/1"}', "no json", '{"format": "bpo-fast/pairs/1", "phase": 0}'],
    ids=repr,
)
def test_another_file_is_not_read_as_pairs(content, tmp_path):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"p\.jsonl: not a file of recorded pairs$"):
        read_pairs(tmp_path / "p.jsonl")


def test_what_is_no_text_is_not_read_as_pairs(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"p\.jsonl: not a file of recorded pairs$"):
        read_pairs(tmp_path / "p.jsonl")


def test_a_damaged_pair_is_not_skipped(tmp_path):
    write_pairs(tmp_path / "p.jsonl", a_phase(a_pair(0), a_pair(1)))
    text = (tmp_path / "p.jsonl").read_text()
    (tmp_path / "p.jsonl").write_text(text[:-20])
    with pytest.raises(ValueError, match="not a file of recorded pairs"):
        read_pairs(tmp_path / "p.jsonl")


def replay_counted(source, tokenizer, max_new_tokens=32, eos_ids=None, **data):
    config = DataConfig(**{"max_prompt_length": 100} | data)

    def to_prompts(name):
        rows, unlimited = read_rows(name), dataclasses.replace(config, max_prompt_length=10**9)
        found = load_prompts(rows, unlimited, get_task("helpfulness"), tokenizer, source=name, seed=None, dedupe=False)
        return rows, found.prompts

    limits = {"data": config, "max_new_tokens": max_new_tokens}
    return replay_pairs(str(source), tokenizer, eos_ids or (tokenizer.eos_token_id,), **limits, to_prompts=to_prompts)


def replay(source, tokenizer, max_new_tokens=32, **data):
    return replay_counted(source, tokenizer, max_new_tokens, **data)[0]


def test_replay_of_a_run_its_pairs_or_one_file(tmp_path, tiny_tokenizer):
    numbers = (0, 2, 10, 99, 100)
    for number in numbers:
        write_pairs(
            tmp_path / "pairs" / f"phase-{number:02d}.jsonl",
            a_phase(a_pair(number, ref_logps=(-1.0, -2.0)), scored=True, dropped=some_dropped()),
        )
    wanted = [a_pair(number) for number in numbers]
    assert replay(tmp_path, tiny_tokenizer) == wanted, "in the order of the phases, without their reference"
    assert replay(tmp_path / "pairs", tiny_tokenizer) == wanted
    assert replay(tmp_path / "pairs" / "phase-02.jsonl", tiny_tokenizer) == wanted[1:2]


HH = "\n\nHuman: {}\n\nAssistant: {}"
TEXT_ROWS = [
    {"prompt": "How?", "chosen": "So.", "rejected": " Not so. "},
    {"chosen": HH.format("How?", "So."), "rejected": HH.format("How?", "Not so.")},
    {
        "prompt": [{"role": "user", "content": "How?"}],
        "chosen": [{"role": "assistant", "content": "So."}],
        "rejected": [{"role": "assistant", "content": "Not so."}],
    },
]


@pytest.mark.parametrize("row", TEXT_ROWS, ids=["text", "hh-rlhf", "messages"])
def test_replay_of_preference_rows(row, tmp_path, tiny_tokenizer):
    (pair,) = replay(write_rows(tmp_path / "prefs.jsonl", [row]), tiny_tokenizer)
    encode = lambda text: tuple(tiny_tokenizer(text)["input_ids"])  # noqa: E731
    eos = (tiny_tokenizer.eos_token_id,)
    assert pair.prompt.ids == encode("How? Assistant:")
    assert pair.chosen.ids == encode(" So.") + eos
    assert pair.rejected.ids == encode(" Not so.") + eos
    assert (pair.chosen.truncated, pair.rejected.truncated) == (False, False)
    assert pair.chosen_score > pair.rejected_score
    assert pair.ref_logps is None


def test_replayed_text_follows_a_chat_template_without_a_blank(tmp_path, tiny_model_dir):
    from transformers import AutoTokenizer

    path = write_rows(tmp_path / "prefs.jsonl", TEXT_ROWS[2:])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for ending in ("</s>", "bot\n"):
        tokenizer.chat_template = f"{{{{ messages[0].content + {ending!r} }}}}"
        (pair,) = replay(path, tokenizer)
        assert pair.prompt.text.endswith(ending)
        assert pair.chosen.ids == (*tokenizer("So.")["input_ids"], tokenizer.eos_token_id)


def test_replayed_text_ends_as_a_turn_does_in_the_chat_template(tmp_path, tiny_model_dir):
    from transformers import AutoTokenizer

    path = write_rows(tmp_path / "prefs.jsonl", TEXT_ROWS[2:])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn, eos = tokenizer.convert_tokens_to_ids("<turn>"), tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>\n{% endfor %}"
    for ends, end in (((3, eos, turn), turn), ((3, eos), eos), ((3,), 3)):
        (pair,) = replay(path, tokenizer, eos_ids=ends)
        assert (pair.chosen.ids[-1], pair.rejected.ids[-1]) == (end, end)
        (pair,) = replay(path, tokenizer, eos_ids=ends, chat_template=False)
        assert pair.chosen.ids[-1] == (3 if end == 3 else eos)


LONG_ROWS = [
    {"prompt": "How?", "chosen": "a b c", "rejected": "a b d"},
    {"prompt": "Why?", "chosen": "x", "rejected": "a b"},
    {"prompt": "Where?", "chosen": "x", "rejected": "x"},
    {"prompt": "So long a question? So long a question? So long a question?", "chosen": "x", "rejected": "a"},
    {"prompt": "When?", "chosen": "a", "rejected": "b"},
]


@pytest.mark.parametrize("form", ["text", "recorded"])
def test_pairs_over_the_limits_are_dropped_and_counted_and_cut_only_where_the_config_says_so(
    form, tmp_path, tiny_tokenizer
):
    source = write_rows(tmp_path / "prefs.jsonl", LONG_ROWS)
    limits = {
        "max_new_tokens": len(tiny_tokenizer(" a b")["input_ids"]),  # without its EOS
        "max_prompt_length": len(tiny_tokenizer("Where? Assistant:")["input_ids"]),
    }
    if form == "recorded":
        pairs = replay(write_rows(tmp_path / "all.jsonl", LONG_ROWS[:2] + LONG_ROWS[3:]), tiny_tokenizer)
        pairs.append(dataclasses.replace(pairs[0], rejected=pairs[0].chosen))
        source = tmp_path / "phase-00.jsonl"
        write_pairs(source, a_phase(*pairs))
    pairs, counts = replay_counted(source, tiny_tokenizer, **limits)
    assert [p.prompt.text.split()[0] for p in pairs] == ["When?"]
    too_long = 4 if form == "recorded" else 3  # its identical pair is long as well
    assert counts == PairCounts(kept=1, too_long=too_long, identical=5 - 1 - too_long)

    pairs, counts = replay_counted(source, tiny_tokenizer, **limits, long_completions="truncate")
    assert [p.prompt.text.split()[0] for p in pairs] == ["Why?", "When?"]
    assert pairs[0].rejected.ids == tuple(tiny_tokenizer(" a b")["input_ids"])
    assert (pairs[0].chosen.truncated, pairs[0].rejected.truncated) == (False, True)
    identical = 2  # one of them since it was cut
    assert counts == PairCounts(kept=2, too_long=1, identical=identical, truncated=1, cut=1)

    pairs, counts = replay_counted(source, tiny_tokenizer, **limits, long_prompts="truncate")
    whole = tuple(tiny_tokenizer(LONG_ROWS[3]["prompt"] + " Assistant:")["input_ids"])
    num_bos = int(whole[0] == tiny_tokenizer.bos_token_id)
    wanted = whole[:num_bos] + whole[len(whole) - limits["max_prompt_length"] + num_bos :]
    assert pairs[0].prompt.ids == wanted
    assert (counts.kept, counts.cut, counts.truncated) == (2, 1, 0)


def test_bad_sources_of_pairs_are_named(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="no such file or folder"):
        replay(tmp_path / "none.jsonl", tiny_tokenizer)
    path = write_rows(tmp_path / "prefs.jsonl", [*TEXT_ROWS[:1], {"prompt": "Why?", "chosen": "A."}])
    with pytest.raises(ValueError, match=r"--from-pairs .*prefs\.jsonl: row 2 has no chosen and rejected text"):
        replay(path, tiny_tokenizer)
    for odd in (3, [], ["So."], [{"role": "assistant"}], ""):
        write_rows(path, [{"prompt": "Why?", "chosen": "A.", "rejected": odd}])
        with pytest.raises(ValueError, match="row 1 has no chosen and rejected text"):
            replay(path, tiny_tokenizer)
    write_rows(path, [{"prompt": "How?", "chosen": "So.", "rejected": "So."}])
    with pytest.raises(ValueError, match=r"--from-pairs .*: no pairs \(1 identical\)"):
        replay(path, tiny_tokenizer)
    (tmp_path / "run" / "pairs").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"prompt": "not a prompt"}))
    with pytest.raises(ValueError, match=r"--from-pairs .*run: no pairs"):
        replay(tmp_path / "run", tiny_tokenizer)
