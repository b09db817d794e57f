"""Which model is asked, how fast, and what it may cost; commands offer a flag per field."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from im_lightning.errors import RequestError, message

TOKENS_FIELDS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible endpoint."""

    base_url: str | None = None
    """Address of the endpoint, such as https://api.openai.com/v1 or http://localhost:8000/v1."""
    api_model: str | None = None
    """Name of the model there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written or printed."""
    max_answer_tokens: int = 512
    """Most tokens of an answer."""
    tokens_field: str = "max_tokens"
    """What the endpoint calls that limit: max_tokens, or max_completion_tokens (newer OpenAI models)."""
    omit_temperature: bool = False
    """Name no temperature in requests: some models (OpenAI's reasoning models) refuse any but their own."""
    concurrency: int = 8
    """Requests in flight at a time; after a kill at most these are sent again."""
    requests_per_minute: float | None = None
    """Most requests sent per minute."""
    timeout_seconds: float = 120.0
    """How long a request may take in all; a stalled one is sent again."""
    retries: int = 5
    """How often a request that failed (rate limit, time-out, server error) is sent again."""
    backoff_seconds: float = 0.5
    """Wait before the first of these, doubled each time; an endpoint that says how long to wait is obeyed, up to
    two minutes."""

    def check(self) -> None:
        """Raises a RequestError where a field is missing or out of bounds."""
        if self.base_url is None or self.api_model is None:
            absent = "--api-model" if self.base_url else "--base-url"
            raise RequestError(message("the endpoint", f"there is no {absent}", "name the address and the model"))
        if not self.base_url.startswith(("http://", "https://")):
            raise RequestError(message(f"--base-url {self.base_url}", "is no address", "begin it with http(s)://"))
        if self.tokens_field not in TOKENS_FIELDS:
            raise RequestError(
                message(f"--tokens-field {self.tokens_field}", "is not known", f"use {' or '.join(TOKENS_FIELDS)}")
            )
        least = {"max_answer_tokens": 1, "concurrency": 1, "timeout_seconds": 0, "retries": 0, "backoff_seconds": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound or (name == "timeout_seconds" and not self.timeout_seconds):
                flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                least_text = "more than 0" if name == "timeout_seconds" else f"{bound} or more"
                raise RequestError(message(flag, "is too small", f"give {least_text}"))
        if self.requests_per_minute is not None and not self.requests_per_minute > 0:
            cause = "nothing could be sent"
            raise RequestError(
                message(f"--requests-per-minute {self.requests_per_minute:g}", cause, "give more than 0")
            )

    @property
    def key(self) -> str:
        """The key; a placeholder where the variable is not set, which local servers take."""
        return os.environ.get(self.api_key_env) or "none"

    def body(self, messages: list[dict[str, str]], temperature: float) -> dict[str, Any]:
        """What is asked, as the protocol has it."""
        out: dict[str, Any] = {"model": self.api_model, "messages": messages}
        out |= {} if self.omit_temperature else {"temperature": temperature}
        return {**out, self.tokens_field: self.max_answer_tokens}


@dataclass(frozen=True)
class Caps:
    """What may be spent: at least one cap is needed. A request that could go beyond one is not sent."""

    price_in: float | None = None
    """Price of a million tokens sent, in any currency."""
    price_out: float | None = None
    """Price of a million tokens answered."""
    max_cost: float | None = None
    """Most that all requests of this output may cost, earlier runs included; needs both prices."""
    max_total_tokens: int | None = None
    """Most tokens, sent and answered."""
    max_requests: int | None = None
    """Most requests, repeated ones included."""

    def check(self) -> None:
        """Raises a RequestError where nothing is capped, or a cap lacks its prices."""
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            remedy = "add --price-in and --price-out, per million tokens"
            raise RequestError(message(f"--max-cost {self.max_cost:g}", "the prices are not known", remedy))
        if self.max_cost is None and self.max_total_tokens is None and self.max_requests is None:
            remedy = "add --max-cost with --price-in and --price-out, or --max-total-tokens, or --max-requests"
            raise RequestError(message("the endpoint", "nothing limits what it may cost", remedy))
        for name, value in asdict(self).items():
            if value is not None and not 0 <= value < math.inf:
                flag = f"--{name.replace('_', '-')} {value:g}"
                raise RequestError(message(flag, "it limits nothing", "give a number from 0 on"))
        if (self.price_in is None) != (self.price_out is None):
            cause = "one is given without the other"
            raise RequestError(message("--price-in, --price-out", cause, "give both or none"))

    def cost(self, tokens_in: float, tokens_out: float) -> float | None:
        """The price of so many tokens; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6
