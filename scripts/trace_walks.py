"""Traces four walks through the package, and says how many files a reader opens to follow each.

The walks, on CPU, with a one-layer LLaMA of random weights and synthetic data:

- a: one Alpaca row, `load_examples` and `score_examples` (length_output, ppl), to the `ScoreTable`
- b1: a fit of a pool of 40 rows by a rule, with data module, module and callback, to the record in the ledger
- b2: `fit_rule(auto)` on 40 records (20 permutations, 60 resamples), the rule file, the summary
- c: `im-lightning compare`, arms random and weighted, 400 tokens, 2 seeds, to the printed table

Definitions. A *function entered* is a code object of a file of the package that was called at least once during the
walk, seen by `sys.setprofile`; bodies of modules and classes, lambdas and comprehensions are none of their own (they
belong to the function around them). A *file entered* is one in which a function was. A *move* is a call of a function
in another file than that of the function called before it: the sequence of calls, file after file, in which returns do
not count, nor does a generator that goes on (only its call). `_utils/`, `errors.py` and, before there was a `_utils/`,
its files' earlier places are left out, as if they were of a library; the columns "with `_utils`" count them.

Each walk runs in a process of its own, with one thread, after another process has made the inputs. The public names it
begins with are imported before; functions that are called while more is imported on the way belong to the walk. The
counts are the same on every run of one Python version (the bars are for 3.11).

    scripts/trace_walks [--list] [--moves] [--check] [--walk NAME]
"""

from __future__ import annotations

import argparse
import dis
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import house_bars
from walks import ROWS, make_inputs, walk

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "im_lightning"

WALKS = {
    "a": "one Alpaca row → ScoreTable",
    "b1": "fit of 40 rows with a rule → ledger",
    "b2": "`fit_rule(auto)` on 40 records → summary",
    "c": "`compare`, 2 arms × 2 seeds → table",
}
MOST_FILES = {"a": 24, "b1": 42, "b2": 22, "c": 52}
MOST_MOVES = {"a": 149, "b1": 650, "b2": 668, "c": 1900}

OUTSIDE = (
    "_utils/", "errors.py",
    "_digest.py", "_files.py", "_progress.py", "sampling/_random.py", "rule/tables.py", "rule/identity.py",
)  # fmt: skip
"""Files that do not count, and folders with a slash."""

PHI = ("phi_matrix", "LinearRule.phi")
"""Functions that make φ of a table, as far as they return a new array [rows, p]; nested ones count once. After a
rename, put the new name here: φ that nobody made is a bar missed."""
COLUMN = ("Transform.apply",)
"""Functions that make φ of one column; how often they do for all rows is told beside it, means and knots included."""
KEY = ("ArmRunner.key", "cell_key", "Cell.key", "key_of_cell", "Arms.key", "ArmRuns.key")
"""Functions that make the key of a comparison's cell: they return its digest."""

_GENERATOR = 0x20 | 0x80 | 0x200  # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR
_OPTIMIZED = 0x1  # CO_OPTIMIZED: functions have it, bodies of modules and classes do not


class Trace:
    """A profile function that keeps what the walk enters.

    Attributes:
        entered: (file, function) → times called.
        moves: "all" and "counted" (without OUTSIDE) → (file, next file) → times.
        made: Whole-pool φ per caller; columns of the pool transformed, per φ; keys of cells, per key.
    """

    def __init__(self) -> None:
        self.entered: Counter[tuple[str, CodeType]] = Counter()  # by file: equal code in two files is one object else
        self.moves: dict[str, Counter[tuple[str, str]]] = {"all": Counter(), "counted": Counter()}
        self.made: dict[str, Counter[str]] = {"phi": Counter(), "columns": Counter(), "keys": Counter()}
        self._phi: list[Any] = []  # kept, so that what is handed out again is not counted again
        self._last: dict[str, str] = {}
        self._files: dict[tuple[str, CodeType], str] = {}  # "" for code that is no function of the package
        self._begins: dict[CodeType, int] = {}

    def run(self, walk: Callable[[], Any]) -> None:
        """Calls the walk and keeps what it enters, in threads of its own, too."""
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            walk()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        key = code.co_filename, code
        file = self._files.get(key)
        if file is None:
            file = self._files[key] = _file(code)
        if not file:
            return
        if event == "return":
            self._watch(frame, value)
        elif event == "call" and not self._goes_on(frame):
            self.entered[file, code] += 1
            self._move("all", file)
            if not outside(file):
                self._move("counted", file)

    def _move(self, which: str, file: str) -> None:
        last = self._last.get(which, file)
        if last != file:
            self.moves[which][last, file] += 1
        self._last[which] = file

    def _goes_on(self, frame: FrameType) -> bool:
        """Whether a generator is resumed, which Python reports like a call."""
        code = frame.f_code
        if not code.co_flags & _GENERATOR:
            return False
        if code not in self._begins:
            found = [i.offset for i in dis.get_instructions(code) if i.opname == "RETURN_GENERATOR"]
            self._begins[code] = found[0] if found else 0
        return frame.f_lasti >= self._begins[code]

    def _watch(self, frame: FrameType, value: Any) -> None:
        name = frame.f_code.co_qualname
        if name in PHI and getattr(value, "ndim", 0) == 2 and len(value) == ROWS:
            above = _above(frame)
            if not any(code.co_qualname in PHI for code in above) and not any(value is known for known in self._phi):
                self._phi.append(value)
                self.made["phi"][above[0].co_qualname if above else "the walk"] += 1
        elif name in COLUMN and getattr(value, "shape", None) == (ROWS,):
            self.made["columns"][repr(frame.f_locals.get("self"))] += 1
        elif name in KEY and isinstance(value, str) and not any(code.co_qualname in KEY for code in _above(frame)):
            self.made["keys"][value] += 1

    def result(self) -> dict[str, Any]:
        """What was seen, JSON-like."""
        functions = Counter(file for file, _ in self.entered)
        return {
            "functions": dict(sorted(functions.items())),
            "moves": {k: [[*pair, n] for pair, n in v.most_common()] for k, v in self.moves.items()},
            "made": {k: dict(v) for k, v in self.made.items()},
        }


def outside(file: str) -> bool:
    """Whether the file does not count."""
    return any(file.startswith(one) if one.endswith("/") else file == one for one in OUTSIDE)


def _file(code: CodeType) -> str:
    prefix = f"{PACKAGE}{os.sep}"
    if not code.co_filename.startswith(prefix) or code.co_name.startswith("<") or not code.co_flags & _OPTIMIZED:
        return ""
    return code.co_filename[len(prefix) :].replace(os.sep, "/")


def _above(frame: FrameType) -> list[CodeType]:
    """The functions of the package that a call came from, the nearest first."""
    found, above = [], frame.f_back
    while above is not None:
        if _file(above.f_code):
            found.append(above.f_code)
        above = above.f_back
    return found


def trace(name: str, folder: Path) -> dict[str, Any]:
    """Traces one walk in this process; what the walk prints goes to standard error."""
    import contextlib

    import torch

    torch.set_num_threads(1)
    for logger in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    one, seen = walk(name, folder), Trace()
    with contextlib.redirect_stdout(sys.stderr):
        torch.manual_seed(0)
        seen.run(one)
    return seen.result()


def traced(names: list[str]) -> dict[str, dict[str, Any]]:
    """Every walk in a process of its own, on the same inputs.

    Raises:
        SystemExit: a walk failed; with what it printed.
    """
    results = {}
    with tempfile.TemporaryDirectory(prefix="walks-") as name:
        folder = Path(name).resolve()
        _process("inputs", folder)
        for one in names:
            _process(one, folder)
            results[one] = json.loads((folder / f"{one}.trace.json").read_text(encoding="utf-8"))
    return results


def _process(step: str, folder: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
    alone = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "COLUMNS": "110"}
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    done = subprocess.run(
        command, env={**os.environ, **offline, **alone}, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def main() -> int:
    """Prints the tables; with --check, 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="scripts/trace_walks", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--walk", action="append", choices=list(WALKS), help="only this walk, and no other measure")
    parser.add_argument("--list", action="store_true", help="the files of each walk with their lines and functions")
    parser.add_argument("--moves", action="store_true", help="the 40 moves that each walk makes most often")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed, and say which")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        if asked.step == "inputs":
            make_inputs(asked.folder)
        else:
            out = asked.folder / f"{asked.step}.trace.json"
            out.write_text(json.dumps(trace(asked.step, asked.folder)), encoding="utf-8")
        return 0
    results = traced(asked.walk or list(WALKS))
    print(walks_table(results))
    if asked.list:
        for name, result in results.items():
            print(f"\n{files_table(name, result)}")
    if asked.moves:
        for name, result in results.items():
            print(f"\n{moves_table(name, result)}")
    bars = walk_bars(results)
    if not asked.walk:
        bars += house_bars.measure(PACKAGE)
        print(f"\n{house_bars.table(bars)}")
    missed = [bar for bar in bars if not bar.kept]
    if asked.check:
        for bar in missed:
            print(f"missed: {bar.name}: {bar.value}, {bar.wanted}", file=sys.stderr)
    return int(asked.check and bool(missed))


# what is printed


def counts(result: dict[str, Any], every: bool) -> tuple[int, int, int]:
    """(files, functions, moves), with the files of OUTSIDE or without."""
    functions = {file: n for file, n in result["functions"].items() if every or not outside(file)}
    moves = result["moves"]["all" if every else "counted"]
    return len(functions), sum(functions.values()), sum(n for _, _, n in moves)


def walks_table(results: dict[str, dict[str, Any]]) -> str:
    """One line per walk."""
    lines = [
        "| walk | files | at most | functions | moves | at most | with `_utils`: files | functions | moves |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, result in results.items():
        (files, functions, moves), every = counts(result, False), counts(result, True)
        cells = [files, MOST_FILES[name], functions, moves, MOST_MOVES[name], *every]
        lines.append(f"| ({name}) {WALKS[name]} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join(lines)


def files_table(name: str, result: dict[str, Any]) -> str:
    """The files of a walk; those that do not count in brackets."""
    lines = [f"| ({name}) file | lines | functions entered | moves into it |", "|---|--:|--:|--:|"]
    into: Counter[str] = Counter()
    for _, file, n in result["moves"]["all"]:
        into[file] += n
    for file, functions in result["functions"].items():
        shown = f"({file})" if outside(file) else file
        lines.append(f"| {shown} | {house_bars.length(PACKAGE / file)} | {functions} | {into[file]} |")
    return "\n".join(lines)


def moves_table(name: str, result: dict[str, Any]) -> str:
    """The most frequent moves of a walk, without the files that do not count."""
    lines = [f"| ({name}) from | to | moves |", "|---|---|--:|"]
    return "\n".join([*lines, *(f"| {a} | {b} | {n} |" for a, b, n in result["moves"]["counted"][:40])])


def walk_bars(results: dict[str, dict[str, Any]]) -> list[house_bars.Bar]:
    """The bars of files and moves, and how often φ of the pool and the key of a cell are made."""
    bars = []
    for name, result in results.items():
        files, _, moves = counts(result, False)
        bars.append(house_bars.at_most(f"({name}) files entered", files, MOST_FILES[name]))
        bars.append(house_bars.at_most(f"({name}) moves", moves, MOST_MOVES[name]))
    if "b1" in results:
        made = results["b1"]["made"]
        phi = sum(made["phi"].values())
        where = ", ".join(f"{caller} {n}" for caller, n in made["phi"].items()) or "nothing of PHI was called"
        bars.append(house_bars.Bar("(b1) φ of the pool made", f"{phi} ({where})", "once", phi == 1))
        columns = max(made["columns"].values(), default=0)
        bars.append(house_bars.Bar("(b1) φ of a whole column", f"at most {columns} times", "", True))
    if "c" in results:
        keys = results["c"]["made"]["keys"]
        text = ", ".join(str(n) for n in keys.values()) or "nothing of KEY was called: 0"
        once = bool(keys) and set(keys.values()) == {1}
        bars.append(house_bars.Bar("(c) key of a cell made", f"{text} times, per key", "once each", once))
    return bars


if __name__ == "__main__":
    sys.exit(main())
