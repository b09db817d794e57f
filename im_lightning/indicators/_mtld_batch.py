"""MTLD of many texts at once: the same values as `mtld.mtld` of each, without a Python object per word.

Texts are cut into words as bytes, words become integers (Arrow's hash table), and all walks, forward and backward,
take each step together: a word is new to its factor if it was last seen before the factor began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

THRESHOLD = 0.72
_TYPES_OF = (18, 25)  # the same as integers: exact, and 18 / 25 is the double nearest to 0.72, too
_TOGETHER = 128  # with fewer walks left, a step of all costs more than the plain loop
JOINT = "\x01"  # stands for ’ in the bytes of texts, where it is a letter's neighbour like ' and -


def joined_texts(texts: Sequence[str], fold: Callable[[str], str]) -> tuple[bytes, list[int], list[int]]:
    """Lower-cased texts as UTF-8, each ended by NUL; which text each is; which are left out.

    Left out are texts with the two control characters that have a meaning here. `fold` says what to make of a
    character beyond ASCII.
    """
    plain: list[int] = []
    others: list[int] = []
    odd: list[int] = []
    for position, text in enumerate(texts):
        kind = odd if "\0" in text or JOINT in text else plain if text.isascii() else others
        kind.append(position)
    joined = "\0".join([*(texts[at] for at in plain), ""]).encode("ascii")
    joined += _folded([texts[at] for at in others], fold).encode("utf-8", "surrogatepass")
    return joined.lower(), plain + others, odd


def _folded(texts: list[str], fold: Callable[[str], str]) -> str:
    """The texts, each ended by NUL, with every character beyond ASCII replaced; ASCII as it is.

    Few kinds of characters occur, so each kind is replaced in all texts at once.
    """
    if any("Σ" in text for text in texts):  # the one letter whose lower case depends on its neighbours
        texts = [text.lower() if "Σ" in text else text for text in texts]
    joined = "\0".join([*texts, ""])
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    foreign = {chr(code): fold(chr(code)) for code in np.unique(codes[codes > 127]).tolist()}
    if len(foreign) > 500:
        return "".join([foreign.get(character, character) for character in joined])
    for character, replaced in foreign.items():
        if replaced != character:
            joined = joined.replace(character, replaced)
    return joined


def words_of(joined: bytes, kept: bytes, inner: bytes = b"") -> tuple[bytes, NDArray[np.bool_]]:
    """The letters of all words without anything between, and per byte of `joined` whether it is part of a word.

    Words consist of the bytes `kept`, and of those `inner` that stand alone between two of them.
    """
    mask = np.frombuffer(joined.translate(bytes(byte in kept for byte in range(256))), dtype=np.bool_)
    if not inner:
        return joined.translate(None, bytes(byte for byte in range(256) if byte not in kept)), mask
    data = np.frombuffer(joined, dtype=np.uint8)
    joints = mask.copy()
    for byte in inner:
        at = np.flatnonzero(data == byte)
        at = at[(at > 0) & (at < len(data) - 1)]
        joints[at] = mask[at - 1] & mask[at + 1]
    return data[joints].tobytes(), joints


def occurrences(joined: bytes, letters: bytes, mask: NDArray[np.bool_]) -> tuple[Ints, Ints, NDArray[np.int64]]:
    """Where each word stands before and after in its own text, and how many words each text has.

    Returns:
        previous: int32 [words], position of the same word's last occurrence in the same text; -1 if there is none.
        following: int32 [words], of its next one; the number of words if there is none.
        counts: int64 [texts].
    """
    import pyarrow as pa

    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1  # the last byte is a NUL: each word ends
    if mask[0]:
        edges = np.concatenate([[0], edges])
    starts, ends = edges[::2], edges[1::2]
    nul = np.flatnonzero(np.frombuffer(joined, dtype=np.uint8) == 0)
    counts = np.diff(np.searchsorted(starts, nul), prepend=0)
    n = len(starts)
    offsets = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(ends - starts, out=offsets[1:])
    words = pa.Array.from_buffers(pa.large_binary(), n, [None, pa.py_buffer(offsets), pa.py_buffer(letters)])
    encoded = words.dictionary_encode()
    key = np.repeat(np.arange(len(counts)) * len(encoded.dictionary), counts)
    key += encoded.indices.to_numpy()
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(np.diff(key[order]) == 0)
    previous, following = np.full(n, -1, dtype=np.int32), np.full(n, n, dtype=np.int32)
    previous[order[same + 1]] = order[same]
    following[order[same]] = order[same + 1]
    return previous, following, counts


def factors(previous: Ints, counts: NDArray[np.int64], inclusive: bool) -> NDArray[np.float64]:
    """Factors of a walk through each text of `counts` words, float64 [texts]; 1 where there is none.

    A ratio is below 18/25 where 25 types - 18 tokens < 0: a new word adds 7 to that balance, another takes 18. Where a
    word has not occurred, `previous` (int32 [words of all texts]) is less than its text's first position; `inclusive`
    says whether a ratio of exactly the threshold ends a factor.
    """
    order = np.argsort(-counts, kind="stable")  # the texts still walking are a beginning of the arrays
    length = counts[order]
    at = (np.cumsum(counts)[order] - length).astype(np.int32)
    begun = at.copy()
    balance, found = np.zeros(len(order), dtype=np.int32), np.zeros(len(order), dtype=np.int32)
    change = np.array([-_TYPES_OF[0], _TYPES_OF[1] - _TYPES_OF[0]], dtype=np.int32)
    lowest = 1 if inclusive else 0
    walking = np.searchsorted(-length, -np.arange(1, int(length.max(initial=0)) + 1), side="right")
    for t, n in enumerate(walking.tolist()):
        if n < _TOGETHER:
            for walk in range(n):
                rest = previous[at[walk] : at[walk] + length[walk] - t].tolist()
                _walk_on(walk, rest, at, begun, balance, found, lowest)
            break
        here, now = at[:n], balance[:n]
        now += change.take((previous.take(here) < begun[:n]).view(np.int8))
        here += 1
        low = np.flatnonzero(now < lowest)
        if len(low):
            found[low] += 1
            now[low] = 0
            begun[low] = here[low]
    tokens = at - begun
    with np.errstate(invalid="ignore"):
        ratio = (balance + _TYPES_OF[0] * tokens) // _TYPES_OF[1] / tokens
        total = found.astype(np.float64) + np.where(tokens > 0, (1 - ratio) / (1 - THRESHOLD), 0.0)
    result = np.empty(len(order))
    result[order] = np.where(total == 0, 1.0, total)
    return result


def _walk_on(walk: int, rest: list[int], at: Ints, begun: Ints, balance: Ints, found: Ints, lowest: int) -> None:
    """The same steps for one text to its end; `rest` is what is left of `previous`."""
    start, now, ended = int(begun[walk]), int(balance[walk]), 0
    less, more = _TYPES_OF[0], _TYPES_OF[1] - _TYPES_OF[0]
    for position, before in enumerate(rest, int(at[walk]) + 1):
        if before < start:
            now += more
        else:
            now -= less
            if now < lowest:
                ended += 1
                start, now = position, 0
    at[walk] += len(rest)
    begun[walk], balance[walk] = start, now
    found[walk] += ended


@dataclass(frozen=True)
class Walks:
    """Both walks through each of n texts of `counts` words, ready for `factors`: `previous` (int32 [2 x words]) has
    first the texts, then the same texts mirrored, last first.
    """

    previous: Ints
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, joined: bytes, kept: bytes, inner: bytes) -> Walks:
        """The walks through the texts of `joined`; see `words_of` for `kept` and `inner`."""
        if not joined:
            return cls(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64))
        letters, mask = words_of(joined, kept, inner)
        previous, following, counts = occurrences(joined, letters, mask)
        mirrored = 2 * len(previous) - 1 - following[::-1]
        return cls(np.concatenate([previous, mirrored]), counts)


def mtld_of_walks(walks: Sequence[Walks], inclusive: bool) -> list[NDArray[np.float64]]:
    """MTLD of the texts of each `Walks`, NaN for one without words; all walk together, so there are fewer steps."""
    starts = np.cumsum([0, *(len(each.previous) for each in walks)])
    previous = np.concatenate([each.previous + np.int32(start) for each, start in zip(walks, starts, strict=False)])
    counts = np.concatenate([part for each in walks for part in (each.counts, each.counts[::-1])])
    found, out, at = factors(previous, counts, inclusive), [], 0
    for each in walks:
        n = len(each.counts)
        forward, backward = found[at : at + n], found[at + n : at + 2 * n][::-1]
        out.append(np.where(each.counts > 0, (each.counts / forward + each.counts / backward) / 2, np.nan))
        at += 2 * n
    return out
