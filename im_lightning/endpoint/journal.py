"""Everything that was sent to an endpoint and came back, a line each, in a file that only grows.

A request is noted before it is sent, so that one that a kill cut off is known, and counted at the most it can cost.
An answer is on the disk before anything else is done with it. A line that a kill tore is passed over.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from im_lightning._utils.files import parse_json
from im_lightning._utils.hashing import digest_json
from im_lightning.endpoint.settings import TOKENS_FIELDS
from im_lightning.errors import DataError, InstructMiningError, RequestError, message

FORMAT = "im_lightning.endpoint/1"
_THOUGHTS = re.compile(r"\s*<think>.*?(</think>|\Z)|((?!<think>).)*?</think>", re.DOTALL)


def request_key(body: Mapping[str, Any], number: int) -> str:
    """Digest of a request without its limit of tokens: an answer that ended within one does so within a higher one."""
    return digest_json([{name: value for name, value in body.items() if name not in TOKENS_FIELDS}, number])


@dataclass(frozen=True)
class Answer:
    """What came back for one request.

    Args:
        text: The answer.
        finish: Why it ended, as the endpoint says: "stop", "length" (cut at the limit), ….
        tokens_in: Tokens sent, as the endpoint counts them, else at most.
        tokens_out: Tokens answered.
        refusal: Why there is no answer that can be used, or "".
        limit: The most tokens that were asked for.
    """

    text: str
    finish: str = "stop"
    tokens_in: int = 0
    tokens_out: int = 0
    refusal: str = ""
    limit: int = 0

    @property
    def final(self) -> str:
        """The text without the thoughts that a reasoning model puts before it; "" where it was cut within them.

        >>> Answer("<think>Or 5?</think>\\n4").final
        '4'
        """
        thoughts = _THOUGHTS.match(self.text)
        return self.text if thoughts is None else self.text[thoughts.end() :].strip()

    @property
    def cut(self) -> bool:
        """Whether it was cut at the limit of its length."""
        return self.finish == "length"


@dataclass
class Spent:
    """What was used up: requests sent, tokens in and out, and how many requests came to nothing."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    lost: int = 0
    """Cut off by a kill, and perhaps paid for: counted at the most they can have cost."""
    failed: int = 0
    """Failed and were sent again, or given up."""


@dataclass
class Journal:
    """The file of one output's requests, open for this process alone.

    Args:
        path: The file; made where there is none.

    Attributes:
        answers: Key → answer, of this and earlier runs.
        spent: What they used up.
    """

    path: Path
    answers: dict[str, Answer] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            cause, remedy = "another process is asking for the same output", "wait for it, or name another --out"
            raise RequestError(message(str(self.path), cause, remedy)) from None
        try:
            torn = self._read()
            self._stream: IO[str] = self.path.open("a", encoding="utf-8")
            if torn:
                self._stream.write("\n")
            if not self.path.stat().st_size:
                self._write({"format": FORMAT})
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()
        self._lock.release()

    def sent(self, key: str, tokens_in: int, tokens_out: int) -> None:
        """Notes a request that is about to be sent, with the most tokens that it can use."""
        self._write({"event": "sent", "key": key, "tokens_in": tokens_in, "tokens_out": tokens_out})
        self.spent.requests += 1

    def failed(self, key: str, cause: str, tokens_in: int = 0, tokens_out: int = 0) -> None:
        """Notes that a request came to nothing, and the most that it can have cost all the same."""
        self._take({"event": "failed", "key": key, "cause": cause, "tokens_in": tokens_in, "tokens_out": tokens_out})

    def answered(self, key: str, answer: Answer, request: dict[str, Any], about: dict[str, Any]) -> None:
        """Keeps an answer with its request; it is on the disk when this returns."""
        kept = {name: getattr(answer, name) for name in Answer.__dataclass_fields__}
        self._take({"event": "answer", "key": key, **kept, "about": about, "request": request})
        os.fsync(self._stream.fileno())

    def _take(self, line: dict[str, Any]) -> None:
        self._write(line)
        self._count(line)

    def _count(self, line: dict[str, Any]) -> None:
        self.spent.tokens_in += line["tokens_in"]
        self.spent.tokens_out += line["tokens_out"]
        if line["event"] == "failed":
            self.spent.failed += 1
        else:
            self.answers[line["key"]] = Answer(**{name: line[name] for name in Answer.__dataclass_fields__})

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(line, ensure_ascii=True) + "\n")
            self._stream.flush()
        except OSError as error:
            cause, remedy = f"cannot be written: {error.strerror}", "free some space; the same command goes on"
            raise InstructMiningError(message(str(self.path), cause, remedy)) from error

    def _read(self) -> bool:
        """Takes over what earlier runs left; whether the last line is torn."""
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        content = self.path.read_bytes()
        pending: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for number, text in enumerate(content.split(b"\n")):
            try:
                line = parse_json(text)
            except ValueError:  # torn by a kill, or the empty end
                continue
            if number == 0 and (not isinstance(line, dict) or line.get("format") != FORMAT):
                break
            if line.get("event") == "sent":
                self.spent.requests += 1
                pending[line["key"]].append(line)
            elif "event" in line:
                pending[line["key"]][-1:] = []
                if line["event"] == "answer" and "limit" not in line:  # of a version that kept the limit in the key
                    line["limit"] = max(line["request"].get(name, 0) for name in TOKENS_FIELDS)
                    line["key"] = request_key(line["request"], line["about"].get("output", 0))
                self._count(line)
        else:
            for line in (one for lines in pending.values() for one in lines):
                self.spent.lost += 1
                self.spent.tokens_in += line["tokens_in"]
                self.spent.tokens_out += line["tokens_out"]
            return not content.endswith(b"\n")
        cause, remedy = "it is no file of requests as im-lightning writes it", "name another --out, or move it away"
        raise DataError(message(str(self.path), cause, remedy))
