"""An HTTP server on loopback that speaks the protocol of chat completions, and goes wrong on purpose.

It runs in a process of its own, so that it outlives clients that are killed, and writes a line per request that it
answered (and so was paid for) to a file.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "sk-secret-0123456789"
Reply = Callable[[str, int], Any]
"""What a server says to a text at the so-manieth time that it is asked it (from 1): an answer as text, or one of the
dicts {status, error, code, retry_after}, {finish}, {stall}, {cut}, {broken}, {usage: None}."""


def echo(text: str, time: int) -> str:
    return f"Answer to {text}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    reply: Reply
    log: Path
    delay: float
    stopped: threading.Event
    asked: Counter[str]
    lock: threading.Lock
    in_flight = most = 0

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        cls = type(self)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][-1]["content"]
        with self.lock:
            self.asked[text] += 1
            time = self.asked[text]
            cls.in_flight += 1
            cls.most = max(cls.most, cls.in_flight)
        try:
            self._answer(body, text, time)
        finally:
            with self.lock:
                cls.in_flight -= 1

    def _answer(self, body: dict[str, Any], text: str, time: int) -> None:
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": {"message": f"no such path {self.path}", "code": None}})
        key = self.headers.get("authorization")
        if key != f"Bearer {KEY}":
            return self._send(401, {"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid_key"}})
        said = self.reply(text, time)
        more = {"content": said} if isinstance(said, str) else dict(said)
        if "status" in more:
            headers = {"retry-after": str(more["retry_after"])} if "retry_after" in more else {}
            error = {"message": more.get("error", "something"), "code": more.get("code"), "type": "t", "param": None}
            return self._send(more["status"], {"error": error}, headers)
        if more.get("stall"):
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"id": ')
            self.wfile.flush()
            self.stopped.wait(60)
            self.close_connection = True
            return None
        self.stopped.wait(self.delay)
        answer = more.get("content", echo(text, time))
        whole = {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": more.get("finish", "stop"),
                         "message": {"role": "assistant", "content": answer, "refusal": more.get("refusal")}}],
            "usage": more.get("usage", {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}),
        }  # fmt: skip
        with self.lock, self.log.open("a") as stream:
            stream.write(json.dumps({"text": text, "time": time, "most": self.most, "body": body}) + "\n")
        if more.get("broken"):
            self._raw(200, b'{"choices": [{"ind', {})
        elif more.get("cut"):
            self._raw(200, json.dumps(whole).encode(), {}, keep=20)
        else:
            self._send(200, whole)
        return None

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._raw(status, json.dumps(value).encode(), headers or {})

    def _raw(self, status: int, content: bytes, headers: dict[str, str], keep: int | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in {**headers, "content-type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:keep])
            if keep is not None:
                self.close_connection = True
        except OSError:
            self.close_connection = True  # the client was killed


class Server:
    """A running server: its address, and what it answered."""

    def __init__(self, url: str, log: Path) -> None:
        self.url, self.log = url, log

    @property
    def answered(self) -> list[dict[str, Any]]:
        """A line per request that it answered, in order."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@contextmanager
def serving(log: Path, reply: Reply = echo, delay: float = 0.0) -> Iterator[Server]:
    """A server in a process of its own; `delay` is how long an answer takes, in seconds."""
    shared = {
        "reply": staticmethod(reply), "log": log, "delay": delay,
        "stopped": threading.Event(), "asked": Counter(), "lock": threading.Lock(),
    }  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), shared))
    server.daemon_threads = True
    pid = os.fork()
    if not pid:
        try:
            server.serve_forever()
        finally:
            os._exit(0)
    server.socket.close()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}/v1", log)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
