"""Texts as token ids: batches, each text once, no text merged with its neighbour."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokens:
    """Token ids of texts, tokenised in batches and each text once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self._inside: dict[str, list[int]] = {}
        plain, special = self._run(["a"])[0], list(tokenizer("a")["input_ids"])
        self._bos = tokenizer.bos_token_id
        if plain:
            at = next((k for k in range(len(special)) if special[k : k + len(plain)] == plain), 0)
        else:  # a small vocabulary that lacks the probe
            at = int(self._bos is not None and special[:1] == [self._bos])
        self.head: list[int] = special[:at]  # BOS, for most that add anything
        # A newline before a text takes the space that SentencePiece-like tokenizers would put before it.
        pieces = tokenizer.convert_ids_to_tokens(plain)
        self._anchor = self._run(["\n"])[0] if pieces and str(pieces[0]).startswith("▁") else []

    def __getitem__(self, text: str) -> list[int]:
        return self._ids[text]

    def inside(self, text: str) -> list[int]:
        """The ids of a text that continues another."""
        return self._inside[text] if self._anchor else self._ids[text]

    def load(self, texts: Iterable[str]) -> None:
        new = list(dict.fromkeys(text for text in texts if text not in self._ids))
        self._ids.update(zip(new, self._run(new), strict=True))

    def load_inside(self, texts: Iterable[str]) -> None:
        new = list(dict.fromkeys(texts))
        if not self._anchor:
            self.load(new)
            return
        n = len(self._anchor)
        for text, ids in zip(new, self._run(["\n" + text for text in new]), strict=True):
            if ids[:n] != self._anchor:  # the newline merged with the text
                ids = self._anchor + self._run([text])[0]
            self._inside[text] = ids[n:] if text else []

    def clear(self) -> None:
        self._ids.clear()
        self._inside.clear()

    def split_head(self, turns: list[tuple[list[int], list[int], list[int]]]) -> tuple[list[int], list[Any]]:
        """Takes BOS off the first prompt if the template wrote it, so that it is there once and outlives truncation."""
        prompt, response, end = turns[0]
        head = self.head
        if head and prompt[: len(head)] == head:
            prompt = prompt[len(head) :]
        elif self._bos is not None and prompt[:1] == [self._bos]:
            head, prompt = [self._bos], prompt[1:]
        return head, [(prompt, response, end), *turns[1:]]

    def _run(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        clean = [without_surrogates(text) for text in texts]
        ids = self._tokenizer(
            clean, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return [one if text else [] for text, one in zip(clean, ids, strict=True)]


def without_surrogates(text: str) -> str:
    """The text with half characters, which JSON can carry and tokenizers refuse, replaced one by one."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
