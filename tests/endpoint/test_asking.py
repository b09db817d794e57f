"""Asking an endpoint: nothing is paid for twice, nothing is spent beyond the cap, and what goes wrong is said."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from api_server import KEY, Server, echo, serving
from killing import child, killed_after, run, wait

from im_lightning.endpoint.client import Ask, ask
from im_lightning.endpoint.journal import Answer, Journal
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.errors import DataError, InstructMiningError, RequestError

CAPS = Caps(max_requests=1000)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)


def endpoint(server: Server | str, **more: Any) -> Endpoint:
    url = server if isinstance(server, str) else server.url
    fast: dict[str, Any] = {"backoff_seconds": 0.01, "retries": 3, "timeout_seconds": 20.0, "max_answer_tokens": 50}
    return Endpoint(url, "some-model", "TEST_KEY", **{**fast, **more})


def asks(count: int, to: Endpoint) -> list[Ask]:
    return [Ask(to.body([{"role": "user", "content": f"question {k}"}], 1.0), {"row": k}) for k in range(count)]


def texts(answers: dict[str, Answer]) -> list[str]:
    return sorted(answer.text for answer in answers.values())


WANTED = sorted(f"Answer to question {k}" for k in range(12))


def test_every_answer_is_kept_with_its_request(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        to = endpoint(server)
        assert texts(ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")) == WANTED
        lines = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
        kept = [line for line in lines if line.get("event") == "answer"]
        assert all(line["text"] == f"Answer to {line['request']['messages'][0]['content']}" for line in kept)
        assert sorted(line["about"]["row"] for line in kept) == list(range(12))
        assert ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers").keys() == {one.key for one in asks(12, to)}
        assert len(server.answered) == 12, "an answer that was stored was asked for again"


def test_the_key_is_neither_written_nor_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server repeats the key in its error, as real ones do in part."""

    def tells(text: str, time: int) -> Any:
        return {"status": 400, "error": f"Your key {KEY} may not"} if "3" in text else f"Answer to {text}"

    with serving(tmp_path / "log", tells) as server:
        to = endpoint(server)
        found = ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")
    assert any("Your key … may not" in answer.refusal for answer in found.values())
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    assert not [path for path in tmp_path.rglob("*") if path.name != "log" and KEY in path.read_text()]


def test_what_fails_for_a_while_is_sent_again(tmp_path: Path) -> None:
    """Rate limits, server errors, a body cut off and one that is no JSON: each once, for every question."""
    wrong = [{"status": 429, "error": "slow down"}, {"status": 503}, {"cut": True}, {"broken": True}]

    def reply(text: str, time: int) -> Any:
        return wrong[int(text.split()[-1]) % 4] if time == 1 else f"Answer to {text}"

    with serving(tmp_path / "log", reply) as server:
        to = endpoint(server)
        assert texts(ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")) == WANTED
    with Journal(tmp_path / "j.jsonl") as journal:
        assert (journal.spent.requests, journal.spent.failed, journal.spent.lost) == (24, 12, 0)
        # what was cut off or broken may have been paid for: counted at the most it can have cost
        bound = sum(sum(one.bound(50)) for k, one in enumerate(asks(12, to)) if k % 4 > 1)
        assert journal.spent.tokens_in + journal.spent.tokens_out == 12 * 15 + bound


def test_an_endpoint_that_says_how_long_to_wait_is_obeyed(tmp_path: Path) -> None:
    def reply(text: str, time: int) -> Any:
        return {"status": 429, "retry_after": 1} if time == 1 else f"Answer to {text}"

    with serving(tmp_path / "log", reply) as server:
        to, start = endpoint(server, concurrency=1), time.monotonic()
        ask(asks(1, to), to, CAPS, tmp_path / "j.jsonl", "answers")
        assert time.monotonic() - start > 0.95


def test_a_stalled_answer_is_sent_again(tmp_path: Path) -> None:
    """Bytes came, and then none: the whole request has a limit, not each byte."""

    def reply(text: str, time: int) -> Any:
        return {"stall": True} if time == 1 and text.endswith(" 2") else f"Answer to {text}"

    with serving(tmp_path / "log", reply) as server:
        to = endpoint(server, timeout_seconds=1.0)
        assert texts(ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")) == WANTED
    assert '"cause": "no whole answer within 1 s"' in (tmp_path / "j.jsonl").read_text()


def test_an_answer_cut_at_its_limit_says_so(tmp_path: Path) -> None:
    with serving(tmp_path / "log", lambda text, time: {"finish": "length"}) as server:
        to = endpoint(server)
        (answer,) = ask(asks(1, to), to, CAPS, tmp_path / "j.jsonl", "answers").values()
        assert answer.cut and not answer.refusal


def test_a_higher_limit_pays_for_what_was_cut_alone(tmp_path: Path) -> None:
    """As also where an earlier version wrote the file, whose keys held the limit."""

    def reply(text: str, time: int) -> Any:
        cut = time == 1 and text in ("question 1", "question 2")
        return {"content": "" if text.endswith("2") else "half", "finish": "length"} if cut else echo(text, time)

    path = tmp_path / "j.jsonl"
    with serving(tmp_path / "log", reply) as server:
        to = endpoint(server)
        found = ask(asks(12, to), to, CAPS, path, "answers")
        assert [found[one.key].cut for one in asks(4, to)] == [False, True, True, False]
        assert not any(answer.refusal for answer in found.values())
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line.pop("limit", None)
            line["key"] = f"old-{line.get('key')}"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for limit in (40, 50):
            assert ask(asks(12, lower := endpoint(server, max_answer_tokens=limit)), lower, CAPS, path, "answers")
            assert len(server.answered) == 12, "a limit that is not higher would cut them again"
        more = endpoint(server, max_answer_tokens=60)
        assert texts(ask(asks(12, more), more, CAPS, path, "answers")) == WANTED
        assert len(server.answered) == 14
        assert texts(ask(asks(12, to), to, CAPS, path, "answers")) == WANTED and len(server.answered) == 14


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("4", "4"),
        ("<think>[[1]]?</think>\n\nGood. [[7]]\n", "Good. [[7]]"),
        ("Perhaps [[1]]?\n</think>\n[[7]]", "[[7]]"),  # the template opened them
        ("<think>[[1]] as", ""),
        ("In HTML <think> is no tag, nor is </think>.", "In HTML <think> is no tag, nor is </think>."),
    ],
)
def test_thoughts_before_an_answer_are_no_part_of_it(text: str, final: str) -> None:
    assert Answer(text).final == final


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"content": "", "refusal": "I cannot help."}, "I cannot help."),
        ({"content": " "}, "the answer is empty"),
        ({"content": "", "finish": "content_filter"}, "filtered by the endpoint"),
    ],
)
def test_a_refusal_is_an_answer_with_a_reason(reply: Any, reason: str, tmp_path: Path) -> None:
    """It was paid for, and would be refused again."""
    with serving(tmp_path / "log", lambda text, time: reply) as server:
        to = endpoint(server)
        for _ in range(2):
            (answer,) = ask(asks(1, to), to, CAPS, tmp_path / "j.jsonl", "answers").values()
            assert answer.refusal == reason
        assert len(server.answered) == 1


def test_a_wrong_key_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path / "log") as server:
        to = endpoint(server, concurrency=2)
        for value, cause in (("sk-wrong-key", "the key in it was refused"), ("", "it is not set, and a key is wanted")):
            monkeypatch.setenv("TEST_KEY", value)
            with pytest.raises(RequestError) as error:
                ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")
            assert str(error.value).startswith(
                f"$TEST_KEY: {cause} (HTTP 401). Fix: export TEST_KEY with a valid key of"
            )
            assert not value or value not in str(error.value)
        monkeypatch.setenv("TEST_KEY", KEY)
        assert texts(ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")) == WANTED


def test_a_dead_endpoint_is_named(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        pass
    to = endpoint(server, retries=2)
    with pytest.raises(InstructMiningError) as error:
        ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")
    said = str(error.value)
    assert said.startswith(f"{server.url}: it did not answer after 3 tries; the last: the connection failed (")
    assert "0 of 12 answers are kept. Fix: see that the endpoint is up" in said


def test_an_endpoint_that_dies_leaves_what_it_answered(tmp_path: Path) -> None:
    def reply(text: str, time: int) -> Any:
        return {"status": 500, "error": "out of memory"} if int(text.split()[-1]) > 7 else f"Answer to {text}"

    with serving(tmp_path / "log", reply) as server:
        to = endpoint(server, concurrency=1)
        with pytest.raises(InstructMiningError, match=r"HTTP 500: .*out of memory.* 8 of 12 answers are kept"):
            ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")
    with serving(tmp_path / "log2") as server:
        assert texts(ask(asks(12, to), endpoint(server), CAPS, tmp_path / "j.jsonl", "answers")) == WANTED
        assert len(server.answered) == 4


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ({"status": 404, "error": "The model does not exist"}, "check --base-url (it ends before /chat/completions"),
        ({"status": 429, "error": "no money", "code": "insufficient_quota"}, "no money. 0 of 12 answers are kept"),
        ({"status": 400, "error": "the temperature outside?"}, "it refused the first 5 requests; the last: HTTP 400: "),
        ({"status": 400, "error": "'temperature' does not support 0 with this model"}, "Fix: add --omit-temperature"),
        (
            {"status": 400, "error": "Use 'max_completion_tokens' instead."},
            "Fix: add --tokens-field max_completion_tokens",
        ),
    ],
)
def test_what_will_not_get_better_stops_everything(reply: Any, said: str, tmp_path: Path) -> None:
    with serving(tmp_path / "log", lambda text, time: reply) as server:
        to = endpoint(server, concurrency=1)
        with pytest.raises(InstructMiningError) as error:
            ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")
        assert said in str(error.value)
    with Journal(tmp_path / "j.jsonl") as journal:
        assert journal.spent.requests <= 5


@pytest.mark.parametrize(
    "caps",
    [
        Caps(max_requests=7),
        Caps(max_total_tokens=7 * 15 + 120),
        Caps(price_in=10.0, price_out=30.0, max_cost=(7 * (10 * 10 + 5 * 30) + 60 * 10 + 50 * 30) / 1e6),
    ],
    ids=["requests", "tokens", "cost"],
)
def test_a_cap_holds_before_it_is_spent(caps: Caps, tmp_path: Path) -> None:
    """A request is sent only if the most that it can cost, with all in flight, stays within the cap."""
    with serving(tmp_path / "log", delay=0.01) as server:
        to = endpoint(server)
        with pytest.raises(InstructMiningError) as error:
            ask(asks(12, to), to, caps, tmp_path / "j.jsonl", "answers")
        answered = len(server.answered)
        assert 1 <= answered < 12
        assert "the cap is reached: the next request could use" in str(error.value)
        assert f"{answered} of 12 answers are kept. Fix: raise --max-" in str(error.value)
        with Journal(tmp_path / "j.jsonl") as journal:
            spent = journal.spent
            assert caps.max_requests is None or spent.requests <= caps.max_requests
            assert caps.max_total_tokens is None or spent.tokens_in + spent.tokens_out <= caps.max_total_tokens
            cost = caps.cost(spent.tokens_in, spent.tokens_out)
            assert caps.max_cost is None or (cost is not None and cost <= caps.max_cost)
        assert texts(ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")) == WANTED
        assert len(server.answered) == 12


def test_requests_that_fail_count_towards_the_cap(tmp_path: Path) -> None:
    with serving(tmp_path / "log", lambda text, time: {"status": 503}) as server:
        to = endpoint(server, concurrency=4, retries=50)
        with pytest.raises(InstructMiningError, match="the cap is reached"):
            ask(asks(12, to), to, Caps(max_requests=9), tmp_path / "j.jsonl", "answers")
    with Journal(tmp_path / "j.jsonl") as journal:
        assert journal.spent.requests == 9


def test_no_more_are_in_flight_than_allowed(tmp_path: Path) -> None:
    with serving(tmp_path / "log", delay=0.02) as server:
        to = endpoint(server, concurrency=3)
        ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")
        assert max(line["most"] for line in server.answered) == 3


def test_requests_are_no_faster_than_allowed(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        to, start = endpoint(server, requests_per_minute=1200), time.monotonic()
        ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")
        assert time.monotonic() - start > 11 * 0.05 * 0.95


def test_requests_that_wait_for_their_turn_count_towards_the_cap(tmp_path: Path) -> None:
    """After a rate limit several wait at once, each of which had been let pass."""
    with serving(tmp_path / "log", lambda text, time: {"status": 429}) as server:
        to = endpoint(server, concurrency=4, retries=50, backoff_seconds=0.2)
        with pytest.raises(InstructMiningError, match="the cap is reached"):
            ask(asks(12, to), to, Caps(max_requests=6), tmp_path / "j.jsonl", "answers")
    with Journal(tmp_path / "j.jsonl") as journal:
        assert journal.spent.requests == 6


def test_an_endpoint_that_names_a_time_is_obeyed(tmp_path: Path) -> None:
    """Which the protocol allows beside a number of seconds."""
    until: list[float] = []

    def busy(text: str, time_: int) -> Any:
        if time_ > 1:
            return echo(text, time_)
        until.append(time.time() + 3)
        return {"status": 429, "retry_after": formatdate(until[0], usegmt=True)}

    with serving(tmp_path / "log", busy) as server:
        to, begun = endpoint(server, backoff_seconds=0.01), time.time()
        ask(asks(1, to), to, CAPS, tmp_path / "j.jsonl", "answers")
    assert time.time() - begun > 1.9, "the time is in whole seconds"


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C raises, though a shell started this in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_an_interrupt_waits_for_what_is_paid_for(tmp_path: Path) -> None:
    """Ctrl-C while requests are in flight: their answers are kept, none is lost, and the same call goes on."""
    interrupted = tmp_path / "interrupted"

    def first_at_once(text: str, time_: int) -> str:
        while text != "question 0" and not interrupted.exists():
            time.sleep(0.005)
        return echo(text, time_)

    with serving(tmp_path / "log", first_at_once) as server:
        to = endpoint(server, concurrency=4)

        def interrupt() -> None:
            while not server.answered:
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)
            interrupted.touch()

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")
        answered = len(server.answered)
        assert 4 <= answered < 12
        with Journal(tmp_path / "j.jsonl") as journal:
            assert len(journal.answers) == answered and journal.spent.lost == 0
        assert texts(ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")) == WANTED
        assert len(server.answered) == 12


@pytest.mark.usefixtures("heard")
def test_an_interrupt_sends_nothing_that_waits_for_its_turn(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        to = endpoint(server, concurrency=4, requests_per_minute=6)

        def interrupt() -> None:
            while not server.answered:
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            ask(asks(12, to), to, CAPS, tmp_path / "j.jsonl", "answers")
        assert len(server.answered) == 1


@pytest.mark.parametrize("wanted", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_points(wanted: int, tmp_path: Path) -> None:
    """Every stored answer is there once; only what was in flight is sent again, and it is counted."""
    import openai  # noqa: F401, forked children need not import it

    journal, report, concurrency, rows = tmp_path / "j.jsonl", tmp_path / "report", 4, 40 * wanted
    with serving(tmp_path / "log", delay=0.015) as server:
        to = endpoint(server, concurrency=concurrency)

        def work() -> None:
            ask(asks(rows, to), to, Caps(max_requests=4000), journal, "answers")

        kills, stored, draw = 0, 0, random.Random(7)
        for _ in range(200):
            if kills == wanted:
                break
            kills += killed_after(draw.uniform(0.05, 0.35), work, report)
            now = _stored(journal)
            assert now >= stored, "an answer that was stored is gone"
            stored = now
        run(work, report)
        assert kills == wanted
        with Journal(journal) as kept:
            assert len(kept.answers) == rows
            lost = kept.spent.lost
        times = Counter(line["text"] for line in server.answered)
    assert sum(times.values()) - rows <= lost <= kills * concurrency
    lines = [json.loads(line) for line in journal.read_text().splitlines() if _whole(line)]
    answers = Counter(line["key"] for line in lines if line.get("event") == "answer")
    assert set(answers.values()) == {1}, "a request whose answer was stored was sent again"


def _whole(line: str) -> bool:
    try:
        return bool(json.loads(line))
    except ValueError:
        return False


def _stored(journal: Path) -> int:
    if not journal.exists():
        return 0
    return sum(_whole(line) and json.loads(line).get("event") == "answer" for line in journal.read_text().split("\n"))


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        to = endpoint(server)
        ask(asks(3, to), to, CAPS, tmp_path / "j.jsonl", "answers")
        whole = (tmp_path / "j.jsonl").read_bytes()
        (tmp_path / "j.jsonl").write_bytes(whole[:-30])
        assert len(ask(asks(3, to), to, CAPS, tmp_path / "j.jsonl", "answers")) == 3
        assert len(server.answered) == 4
        with Journal(tmp_path / "j.jsonl") as journal:
            assert len(journal.answers) == 3 and journal.spent.lost == 1


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "U", "response": "A"}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl: it is no file of requests as im-lightning writes it"):
        Journal(path).__enter__()
    assert path.read_text() == '{"prompt": "U", "response": "A"}\n'


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(RequestError, match="another process is asking for the same output"):
            Journal(tmp_path / "j.jsonl").__enter__()

    with Journal(tmp_path / "j.jsonl"):
        assert wait(child(second, tmp_path / "report")) == 0, (tmp_path / "report").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_url": "localhost:8000"}, "--base-url localhost:8000: is no address"),
        ({"timeout_seconds": 0}, "--timeout-seconds 0: is too small. Fix: give more than 0"),
        ({"concurrency": 0}, "--concurrency 0: is too small. Fix: give 1 or more"),
        ({"requests_per_minute": 0}, "--requests-per-minute 0: nothing could be sent"),
        ({"tokens_field": "most"}, "--tokens-field most: is not known. Fix: use max_tokens or max_completion_tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as error:
        replace(endpoint("http://localhost:1/v1"), **change).check()
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("caps", "said"),
    [
        (Caps(), "the endpoint: nothing limits what it may cost. Fix: add --max-cost with --price-in and --price-out"),
        (Caps(max_cost=math.nan, price_in=1.0, price_out=1.0), "--max-cost nan: it limits nothing. Fix: give a number"),
        (Caps(max_requests=5, price_in=-1.0, price_out=1.0), "--price-in -1: it limits nothing"),
        (Caps(max_requests=5, price_in=1.0), "--price-in, --price-out: one is given without the other"),
        (Caps(max_cost=1.0, price_in=1.0), "--max-cost 1: the prices are not known. Fix: add --price-in and"),
    ],
)
def test_nothing_is_asked_without_a_cap(caps: Caps, said: str) -> None:
    with pytest.raises(RequestError) as error:
        caps.check()
    assert said in str(error.value)
