import json
import socket
import threading
import time
from contextlib import suppress

import pytest
from judge_server import by_length, endpoint, said

from bpo_fast.annotate import Checked, judge_name, load_annotator
from bpo_fast.annotate.pairwise import DOWN_AFTER, KEY_VARIABLE, HttpJudge
from bpo_fast.config import AnnotatorConfig
from bpo_fast.evaluate import against_labels
from bpo_fast.types import Completion, Prompt

PROMPTS = [
    Prompt(0, "<user>Q0?\n<bot>", (1,), label="four words of text", plain="Q0?"),
    *(Prompt(i, f"Q{i}?", (1,), label="four words of text") for i in (1, 2)),
]


def completions(*texts):
    return [Completion(i, 0, (1,), f" {text}", False, 0, 0) for i, text in enumerate(texts)]


FIRST = completions("the longer answer", "no", "same")
SECOND = completions("short", "a longer one", "sAme")


def judge(spec, **options):
    return HttpJudge(spec, **{"timeout_s": 5.0, "retries": 2, "requests": 4, "backoff_s": 0.01} | options)


def test_both_orders_are_asked_and_agree():
    with endpoint(by_length) as server:
        asked = judge(server.spec)
        assert asked.compare(PROMPTS, FIRST, SECOND) == [1.0, 0.0, 0.5]
    questions = sorted(body["messages"][-1]["content"] for _, _, body in server.seen)
    assert len(questions) == len(set(questions)) == 6
    path, headers, body = server.seen[0]
    assert (path, body["model"], body["temperature"]) == ("/v1/chat/completions", "some/model", 0)
    assert "Authorization" not in headers
    assert "[Prompt]\nQ0?\n" in questions[0]
    assert asked.notes() == ["0% of 3 verdicts went with the position and count as ties"]


def test_a_judge_that_likes_a_position_has_no_preference():
    with endpoint(lambda q, n: said("[[A]]")) as server:
        asked = judge(server.spec)
        assert asked.compare(PROMPTS, FIRST, SECOND) == [0.5, 0.5, 0.5]
    assert asked.tally.swapped == 3


def test_half_a_preference():
    def tie_or_longer(question, number):
        return said("[[C]]") if "\nno\n\n[Answer B]" in question else by_length(question, number)

    with endpoint(tie_or_longer) as server:
        assert judge(server.spec).compare(PROMPTS, FIRST, SECOND) == [1.0, 0.25, 0.5]


@pytest.mark.parametrize(
    "nonsense",
    [
        said("I would rather not say."),
        said("[[A]] or perhaps [[B]]"),
        said("[[D]]"),
        said(""),
        (200, "<html>Welcome</html>"),
        (200, json.dumps({"choices": []})),
        (200, json.dumps({"choices": [{"message": {"content": None}}]})),
        (200, json.dumps([1])),
        (200, "[" * 200_000),
        (200, said("DIGITS")[1].replace('"DIGITS"', "9" * 5000)),
        (500, "busy"),
        (429, "slow down", {"Retry-After": "0"}),
    ],
    ids=lambda a: a[1][:30],
)
def test_nonsense_is_asked_again_then_left_unjudged(nonsense):
    with endpoint(lambda q, n: nonsense if "Q1" in q else by_length(q, n)) as server:
        asked = judge(server.spec)
        assert asked.compare(PROMPTS, FIRST, SECOND) == [1.0, None, 0.5]
    assert sum("Q1" in body["messages"][-1]["content"] for *_, body in server.seen) == 3
    assert (asked.tally.judged, asked.tally.unjudged, asked.tally.retries) == (2, 1, 2)
    assert asked.notes()[0].startswith("1 pairs unjudged, the last because: ")


def test_a_judge_without_verdicts_warns_once(caplog):
    with endpoint(lambda q, n: said("no idea")) as server:
        assert judge(server.spec, retries=0).compare(PROMPTS * 4, FIRST * 4, SECOND * 4) == [None] * 12
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == ["no clear verdict in 'no idea'"]


def test_a_verdict_on_the_second_try_counts(caplog):
    with endpoint(lambda q, n: by_length(q, n) if n % 2 else (503, "\x1b[31mbusy")) as server:
        asked = judge(server.spec, requests=1)
        assert asked.compare(PROMPTS, FIRST, SECOND) == [1.0, 0.0, 0.5]
    assert len(server.seen) == 12
    told = f"judge {asked.name}: status 503 Service Unavailable: \N{REPLACEMENT CHARACTER}[31mbusy; it is asked again"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_a_bare_letter_is_a_verdict():
    with endpoint(lambda q, n: said(" C\n")) as server:
        assert judge(server.spec).compare(PROMPTS, FIRST, SECOND) == [0.5, 0.5, 0.5]


def test_silence_ends_at_the_limit():
    def silent(question, number):
        time.sleep(0.6 if "Q0" in question else 0)
        return by_length(question, number)

    with endpoint(silent) as server:
        asked = judge(server.spec, timeout_s=0.2, retries=1)
        start = time.monotonic()
        assert asked.compare(PROMPTS, FIRST, SECOND) == [None, 0.0, 0.5]
        assert time.monotonic() - start < 3
    assert asked.tally.last_error == "no answer within 0.2 s"


@pytest.mark.parametrize(
    "part", [b"HTTP/1.1 100 Continue\r\n\r\n", b"X", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["interim", "head", "body"]
)
def test_an_answer_that_never_ends_ends_at_the_limit(part):
    def serve():
        with suppress(OSError):  # the judge is gone
            while True:
                sock = listening.accept()[0]
                with suppress(OSError), sock:
                    while True:
                        sock.sendall(part)
                        time.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        asked = judge(f"http://127.0.0.1:{listening.getsockname()[1]}/v1#m", timeout_s=0.3, retries=0, requests=1)
        assert asked.compare(PROMPTS[:1], FIRST[:1], SECOND[:1]) == [None]
    assert asked.tally.last_error == "no answer within 0.3 s"


def test_an_endpoint_that_is_down_is_given_up():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        spec = f"http://127.0.0.1:{free.getsockname()[1]}/v1#m"
    asked = judge(spec, retries=0, requests=1)
    prompts = [Prompt(i, "Q", (1,)) for i in range(DOWN_AFTER + 5)]
    answers = completions(*["a"] * len(prompts))
    assert asked.compare(prompts, answers, answers) == [None] * len(prompts)
    assert "was given up after" in asked.tally.last_error


def test_an_endpoint_that_answers_without_a_verdict_is_not_given_up():
    prompts = [Prompt(i, f"Q{i}", (1,)) for i in range(DOWN_AFTER + 5)]
    answers = completions(*["a"] * len(prompts))
    with endpoint(lambda question, number: said("Hard to say.")) as server:
        asked = judge(server.spec, retries=0, requests=1)
        assert asked.compare(prompts, answers, answers) == [None] * len(prompts)
        assert len(server.seen) == len(prompts)
    assert "no clear verdict" in asked.tally.last_error


def test_credentials_in_an_address_are_refused():
    with pytest.raises(ValueError, match="no credentials"):
        judge("http://me:secret@host/v1#m")


@pytest.mark.parametrize(("status", "word"), [(401, "Unauthorized"), (404, "Not Found")])
def test_a_refusal_ends_at_once_and_keeps_the_key_to_itself(monkeypatch, status, word):
    monkeypatch.setenv(KEY_VARIABLE, "sk-very-secret")
    with (
        endpoint(lambda q, n: (status, "wrong key sk-very-secret")) as server,
        pytest.raises(ValueError, match=rf"^judge http://127.0.0.1:\d+/v1#some/model: status {status} {word}") as error,
    ):
        judge(server.spec, requests=1).compare(PROMPTS, FIRST, SECOND)
    assert "secret" not in str(error.value)
    assert server.seen[0][1]["Authorization"] == "Bearer sk-very-secret"


@pytest.mark.parametrize(("status", "named"), [(401, True), (403, True), (404, False)])
def test_a_missing_key_is_named_where_one_would_help(monkeypatch, status, named):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with endpoint(lambda q, n: (status, "no")) as server, pytest.raises(ValueError, match=f"status {status}") as error:
        judge(server.spec, requests=1).compare(PROMPTS, FIRST, SECOND)
    assert (KEY_VARIABLE in str(error.value)) == named


def test_a_redirect_is_not_followed():
    with endpoint(by_length) as other, endpoint(lambda q, n: (307, "", {"Location": other.spec})) as server:
        assert judge(server.spec).compare(PROMPTS, FIRST, SECOND) == [None] * 3
    assert other.seen == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("http://host/v1", "expected http://HOST/v1#MODEL"),
        ("http://#m", "expected http://HOST/v1#MODEL"),
        ("http://host:x/v1#m", "not a port"),
        ("http://me:abc@host:x/v1#m", "not a port"),
        ("http://me:abc@[::1/v1?key=abc#m", "judge .*: not an address"),
        ("http://[::1/v1#m", "judge .*: not an address"),
        ("http://a..host/v1#m", "judge .*: not an address"),
        ("http://ho st/v1#m", "judge .*: not an address"),
        ("http://host/v 1#m", "judge .*: not an address"),
        ("http://host/v\u0131#m", "judge .*: not an address"),
        ("https://host/v1?api_key=abc#m", f"no credentials or queries in the address; set {KEY_VARIABLE}"),
    ],
)
def test_bad_addresses(spec, words):
    with pytest.raises(ValueError, match=words) as error:
        load_annotator(spec, AnnotatorConfig())
    assert "abc" not in str(error.value)


@pytest.mark.parametrize("key", ["sk-secret\n", "sk secret", "sk-secr\u00e9t"])
def test_a_key_that_no_header_can_carry(monkeypatch, key):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ValueError, match=f"^{KEY_VARIABLE}: holds a blank or a letter that no key has$"):
        judge("http://host/v1#m")


def test_names():
    assert judge_name("http://host/v1#Qwen/Qwen3-8B") == "Qwen3-8B"
    assert judge_name("big=http://host/v1#m") == "big"


def test_as_annotator_and_as_judge():
    with endpoint(by_length) as server:
        found = load_annotator(f"llm={server.spec}", AnnotatorConfig())
        assert found.name == "llm"
        assert found.duel(PROMPTS, FIRST, SECOND) == [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
        unlabelled = [*PROMPTS[:2], Prompt(2, "Q2?", (1,))]
        longer = completions("a very much longer answer", "no", "same")
        assert against_labels(found, unlabelled, longer) == [(1.0, 0.0), (0.0, 1.0), (None, None)]


def test_scorers_duel_by_their_scores():
    class Length:
        def score(self, prompts, completions):
            return [None if c.text == " no" else len(c.text) for c in completions]

    assert Checked("length", Length()).duel(PROMPTS, FIRST, SECOND) == [(18.0, 6.0), (None, 13.0), (5.0, 5.0)]
