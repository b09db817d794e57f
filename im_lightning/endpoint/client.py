"""Asks an endpoint many things at once: at most so many in flight, no faster than allowed, within what may be spent.

What fails for a while (rate limits, time-outs, server errors) is sent again after a wait. What will not get better (a
wrong key, an unknown model) stops everything, and so does a cap; what was answered by then is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from im_lightning._utils.optional import require
from im_lightning._utils.progress import log, progress
from im_lightning.endpoint.journal import Answer, Journal, request_key
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.errors import InstructMiningError, RequestError, message

_OVERHEAD = 16
"""Tokens that a template may add per message, and once more."""
_REFUSALS = 5
"""So many requests refused as wrong, and none answered: the request itself is wrong."""
_LONGEST_WAIT = 120.0


@dataclass(frozen=True)
class Ask:
    """One request.

    Args:
        body: What is sent.
        about: What it is for, kept with the answer.
        number: Which of several equal requests.
    """

    body: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    number: int = 0

    @property
    def key(self) -> str:
        """Digest of the request: a whole answer to an equal one is never asked for again."""
        return request_key(self.body, self.number)

    def bound(self, answer: int) -> tuple[int, int]:
        """The most tokens that it can use, in and out: no tokenizer makes more tokens of a text than it has bytes."""
        texts = [turn["content"] for turn in self.body["messages"]]
        sizes = [len(text.encode("utf-8", "surrogatepass")) + _OVERHEAD for text in texts]
        return sum(sizes) + _OVERHEAD, answer


class _Stop(Exception):
    """Nothing more is to be sent."""


def ask(asks: Sequence[Ask], endpoint: Endpoint, caps: Caps, journal: Path, what: str) -> dict[str, Answer]:
    """The answers by key: those that the journal has, and those of the others, which are asked for now.

    Args:
        asks: The requests.
        endpoint: Whom to ask.
        caps: What may be spent, counting what the journal says was spent before.
        journal: The file that keeps requests and answers.
        what: What they are, for messages: "reference outputs".

    Returns:
        Key → answer; one that the endpoint refused has its reason, and is asked for anew by the next call.

    Raises:
        RequestError: the key or the request is refused, or openai is not installed.
        InstructMiningError: a cap is reached, or the endpoint is dead; what was answered is kept.
    """
    endpoint.check()
    caps.check()
    openai = require("openai", "api", "asking an endpoint")
    with Journal(journal) as kept:
        run = _Run(endpoint, caps, kept, openai, what, list({one.key: one for one in asks}.values()))
        try:
            asyncio.run(run.all())
        finally:
            log(run.spent())
        return {**kept.answers, **run.refused}


def estimate(asks: Sequence[Ask], endpoint: Endpoint, caps: Caps) -> dict[str, Any]:
    """What so many requests will use: about a token per four bytes, and at most. Costs are None without prices."""
    bounds = [one.bound(endpoint.max_answer_tokens) for one in asks]
    most_in, most_out = sum(b[0] for b in bounds), sum(b[1] for b in bounds)
    tokens = {"tokens_in": most_in // 4, "most_tokens_out": most_out}
    costs = {"cost": caps.cost(most_in / 4, most_out / 2), "most_cost": caps.cost(most_in, most_out)}
    return {"requests": len(asks), **tokens, **costs}


def estimate_text(found: Mapping[str, Any]) -> str:
    """An estimate, in words."""
    text = (
        f"{found['requests']:,} requests, about {found['tokens_in']:,} tokens to send, at most "
        f"{found['most_tokens_out']:,} to be answered"
    )
    if found["cost"] is None:
        return text
    return f"{text}; about {found['cost']:.4g}, at most {found['most_cost']:.4g}"


class _Run:
    def __init__(
        self, endpoint: Endpoint, caps: Caps, journal: Journal, openai: Any, what: str, asks: Sequence[Ask]
    ) -> None:
        self.endpoint, self.caps, self.journal, self.openai, self.what = endpoint, caps, journal, openai, what
        self.total = len(asks)
        for one in asks:
            known = journal.answers.get(one.key)
            if known is not None and known.cut and known.limit < endpoint.max_answer_tokens:  # now it may end
                del journal.answers[one.key]
        self.left = [one for one in asks if one.key not in journal.answers]
        self.reserved: dict[str, tuple[int, int]] = {}
        self.unsent: set[str] = set()
        self.refused: dict[str, Answer] = {}
        self.error: InstructMiningError | None = None
        self.ended = asyncio.Event()
        self.untried = asyncio.Event()
        """Nothing is tried again; what has its place within the caps is sent all the same, unless all has ended."""
        self._not_before = 0.0

    async def all(self) -> None:
        """Sends what is left; raises the first error that no further request would mend."""
        if not self.left:
            return
        spent = self.journal.spent
        lost = f" ({spent.lost:,} were cut off, and are counted at the most they can have cost)" if spent.lost else ""
        log(
            f"{self.what}: {self.total - len(self.left):,} of {self.total:,} are here{lost}; to ask: "
            + self._estimate()
        )
        tasks: set[asyncio.Task[None]] = set()
        client = self.openai.AsyncOpenAI(
            base_url=self.endpoint.base_url, api_key=self.endpoint.key, max_retries=0, timeout=None
        )
        async with client:
            with progress(self.what, len(self.left), "requests") as bar:
                try:
                    for one in self.left:
                        await self._room(tasks, one)
                        task = asyncio.create_task(self._one(client, one))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                        task.add_done_callback(lambda _: bar.advance())
                except _Stop:
                    pass
                except BaseException:  # interrupted: what is in flight is paid for, and waited for; no more is sent
                    self._end()
                    raise
                finally:
                    await asyncio.gather(*tasks, return_exceptions=True)
        if self.error is not None:
            raise self.error

    async def _room(self, tasks: set[asyncio.Task[None]], one: Ask) -> None:
        """Waits until one more request may be sent."""
        while self.error is None:
            bound = one.bound(self.endpoint.max_answer_tokens)
            over = self._over(bound)
            if len(tasks) < self.endpoint.concurrency and not over:
                self.reserved[one.key] = bound
                self.unsent.add(one.key)
                return
            if not tasks:
                self.error = self._capped(over, bound)
                break
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        raise _Stop

    def _over(self, bound: tuple[int, int]) -> str:
        """The cap that one more request could go beyond, or ""."""
        spent, caps, waiting = self.journal.spent, self.caps, [*self.reserved.values(), bound]
        tokens_in = spent.tokens_in + sum(b[0] for b in waiting)
        tokens_out = spent.tokens_out + sum(b[1] for b in waiting)
        if caps.max_requests is not None and spent.requests + len(self.unsent) >= caps.max_requests:
            return f"--max-requests {caps.max_requests}"
        if caps.max_total_tokens is not None and tokens_in + tokens_out > caps.max_total_tokens:
            return f"--max-total-tokens {caps.max_total_tokens}"
        cost = caps.cost(tokens_in, tokens_out)
        if caps.max_cost is not None and cost is not None and cost > caps.max_cost:
            return f"--max-cost {caps.max_cost:g}"
        return ""

    async def _one(self, client: Any, one: Ask) -> None:
        try:
            for attempt in range(self.endpoint.retries + 1):
                if attempt and (over := self._over((0, 0))):
                    self.error = self.error or self._capped(over, self.reserved[one.key])
                    self.untried.set()
                    return
                self.unsent.add(one.key)  # a retry, too, counts towards the cap while it waits for its turn
                wait = await self._attempt(client, one, attempt)
                if wait is None or await _comes_within(wait, self.untried):
                    return
        except InstructMiningError as error:
            self.error = self.error or error
            self._end()
        finally:
            self.reserved.pop(one.key, None)
            self.unsent.discard(one.key)

    async def _attempt(self, client: Any, one: Ask, attempt: int) -> float | None:
        """Sends a request once.

        Returns:
            None where it was answered or refused for good, or nothing more is to be sent; else how long to wait before
            it is sent again.
        """
        if await _comes_within(self._turn(), self.ended):
            return None
        bound = self.reserved[one.key]
        self.unsent.discard(one.key)
        self.journal.sent(one.key, *bound)
        cost, waits = (0, 0), self.endpoint.backoff_seconds * 2**attempt * random.uniform(0.75, 1.25)
        try:
            made = await asyncio.wait_for(client.chat.completions.create(**one.body), self.endpoint.timeout_seconds)
            self.journal.answered(one.key, self._answer(made, bound), one.body, one.about)
            return None
        except (TimeoutError, self.openai.APITimeoutError):
            cause, cost = f"no whole answer within {self.endpoint.timeout_seconds:g} s", bound
        except self.openai.APIConnectionError as error:
            cause, cost = f"the connection failed ({self._said(error.__cause__ or error)})", bound
        except self.openai.APIStatusError as error:
            cause = f"HTTP {error.status_code}: {self._said(error)}"
            if not self._passing(error):
                self.journal.failed(one.key, cause)
                self._give_up(one, error, cause)
                return None
            waits = max(waits, _asked_wait(error))
            if error.status_code == 429:
                self._not_before = max(self._not_before, asyncio.get_running_loop().time() + waits)
        except (self.openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError) as error:
            cause, cost = f"what came back is no answer ({self._said(error)})", bound
        self.journal.failed(one.key, cause, *cost)
        if attempt == self.endpoint.retries:
            raise InstructMiningError(
                message(
                    f"{self.endpoint.base_url}",
                    f"it did not answer after {attempt + 1} tries; the last: {cause}. {self._kept()}",
                    "see that the endpoint is up, or raise --timeout-seconds or --retries; the same command goes on",
                )
            )
        return waits

    def _end(self) -> None:
        """Nothing more is sent."""
        self.ended.set()
        self.untried.set()

    def _turn(self) -> float:
        """Seconds until the turn of this request: after a rate limit, and at most so many a minute."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        turn = max(now, self._not_before)
        if self.endpoint.requests_per_minute is not None:
            self._not_before = turn + 60.0 / self.endpoint.requests_per_minute
        return turn - now

    def _answer(self, made: Any, bound: tuple[int, int]) -> Answer:
        choice, usage = made.choices[0], made.usage
        text = choice.message.content or ""
        refusal = getattr(choice.message, "refusal", None) or ""
        finish = str(choice.finish_reason or "stop")
        if finish == "content_filter":
            refusal = refusal or "filtered by the endpoint"
        if not text.strip() and not refusal and finish != "length":  # a limit may be used up by hidden thoughts
            refusal = "the answer is empty"
        tokens = bound if usage is None else (int(usage.prompt_tokens), int(usage.completion_tokens))
        return Answer(text, finish, *tokens, refusal=refusal, limit=self.endpoint.max_answer_tokens)

    def _passing(self, error: Any) -> bool:
        """Whether it may go better later."""
        passing = error.status_code in (408, 409, 429) or error.status_code >= 500
        return passing and error.code != "insufficient_quota"

    def _give_up(self, one: Ask, error: Any, cause: str) -> None:
        """Stops everything where no request would fare better; else keeps the refusal of this one as its answer."""
        endpoint, variable = str(self.endpoint.base_url), self.endpoint.api_key_env
        if error.status_code in (401, 403):
            known = "the key in it was refused" if self.endpoint.key != "none" else "it is not set, and a key is wanted"
            remedy = f"export {variable} with a valid key of {endpoint}, or name another variable (--api-key-env)"
            raise RequestError(message(f"${variable}", f"{known} (HTTP {error.status_code})", remedy))
        if error.status_code == 404:
            remedy = "check --base-url (it ends before /chat/completions, often in /v1) and --api-model"
            raise RequestError(message(f"{endpoint}, model {self.endpoint.api_model}", cause, remedy))
        if error.status_code not in (400, 413, 422):
            raise InstructMiningError(
                message(endpoint, f"{cause}. {self._kept()}", "mend that; the same command goes on")
            )
        if "max_completion_tokens" in cause and self.endpoint.tokens_field == "max_tokens":
            raise RequestError(message(endpoint, cause, "add --tokens-field max_completion_tokens"))
        if (error.param == "temperature" or "'temperature'" in cause) and "temperature" in one.body:
            raise RequestError(message(endpoint, cause, "add --omit-temperature"))
        self.refused[one.key] = Answer("", "refused", refusal=cause)
        if len(self.refused) >= _REFUSALS and not self.journal.answers:
            cause = f"it refused the first {len(self.refused)} requests; the last: {cause}"
            raise RequestError(message(endpoint, cause, "check --api-model and --max-answer-tokens"))

    def _said(self, error: Any) -> str:
        """An error's words in one line, without the key."""
        text = " ".join(str(getattr(error, "message", "") or error).split()) or type(error).__name__
        if self.endpoint.key != "none":
            text = text.replace(self.endpoint.key, "…")
        return text[:300]

    def _capped(self, cap: str, bound: tuple[int, int]) -> InstructMiningError:
        cause = f"the cap is reached: the next request could use {sum(bound):,} tokens. {self._kept()}"
        remedy = f"raise {cap.partition(' ')[0]}; the same command goes on where this one ended"
        return InstructMiningError(message(cap, cause, remedy))

    def _kept(self) -> str:
        here = self.total - sum(one.key not in self.journal.answers for one in self.left)
        return f"{here:,} of {self.total:,} {self.what} are kept"

    def _estimate(self) -> str:
        return estimate_text(estimate(self.left, self.endpoint, self.caps))

    def spent(self) -> str:
        """What was used up so far, by this and earlier runs."""
        s = self.journal.spent
        cost = self.caps.cost(s.tokens_in, s.tokens_out)
        parts = [f"{s.requests:,} requests", f"{s.tokens_in:,} tokens sent", f"{s.tokens_out:,} answered"]
        parts += [] if cost is None else [f"cost {cost:.4g}"]
        parts += [f"{count:,} {what}" for what, count in (("failed", s.failed), ("cut off", s.lost)) if count]
        return f"{self.what}: used so far: {', '.join(parts)}"


async def _comes_within(seconds: float, event: asyncio.Event) -> bool:
    """Waits so long, or until an event comes; whether it has."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()


def _asked_wait(error: Any) -> float:
    """How long the endpoint asks to wait, in seconds; it may name the time instead (RFC 9110, section 10.2.3)."""
    text = error.response.headers.get("retry-after") or "0"
    try:
        return min(float(text), _LONGEST_WAIT)
    except ValueError:
        try:
            return min(parsedate_to_datetime(text).timestamp() - time.time(), _LONGEST_WAIT)
        except ValueError:
            return 0.0
