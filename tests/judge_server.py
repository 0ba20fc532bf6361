"""A chat endpoint on the loopback for tests of the pairwise judge."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def said(text: str) -> tuple[int, str]:
    """A chat completion with this content."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Endpoint(ThreadingHTTPServer):
    """Answers every request by `answer(question, number of the request) -> (status, body[, headers])`.

    Attributes:
        seen: (path, headers, body as JSON) of every request.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[str, int], tuple]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.seen, self.lock = answer, [], threading.Lock()

    @property
    def spec(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1#some/model"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.seen)
            self.server.seen.append((self.path, dict(self.headers), body))
        status, text, *headers = self.server.answer(body["messages"][-1]["content"], number)
        try:
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())
        except (BrokenPipeError, ConnectionResetError):
            pass

    def log_message(self, *args):
        pass


@contextmanager
def endpoint(answer: Callable[[str, int], tuple]) -> Iterator[Endpoint]:
    """Runs an endpoint while the block lasts."""
    server = Endpoint(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def by_length(question: str, number: int) -> tuple[int, str]:
    """Prefers the longer answer, wherever it stands."""
    a, b = answers(question)
    return said(f"I compared them.\n[[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]")


def answers(question: str) -> tuple[str, str]:
    """Answers A and B of a question."""
    rest = question.split("[Answer A]\n", 1)[1]
    a, b = rest.split("\n\n[Answer B]\n", 1)
    return a, b.rsplit("\n\n[Which", 1)[0]
