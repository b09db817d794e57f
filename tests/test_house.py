"""The house stands: imports point down the layers, the lower layers need no Lightning, and starting is fast."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import speed

import im_lightning
from scripts import house_bars

PACKAGE = Path(im_lightning.__file__).parent

# Lower rank = lower layer. Rooms of one rank (scoring and ledger) do not know each other; the report says what an
# experiment found in the experiment's own sentences.
LAYERS = (
    {"errors": 0, "_utils": 1}
    | {"data": 10, "models": 11, "indicators": 12, "endpoint": 13}
    | {"scoring": 20, "ledger": 20, "rule": 21}
    | {"sampling": 30}
    | {"_lightning": 40, "training": 41}
    | {"experiments": 50, "report": 51, "commands": 52, "cli": 53, "__main__": 54}
)


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> set[str]:
    """Every module of the package that the file imports, wherever in the file the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the package imports by full name"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module}
    prefix = "im_lightning."
    return {name[len(prefix) :] for name in names if name and name.startswith(prefix)}


def test_every_module_stands_in_a_known_layer() -> None:
    unknown = {name for name in modules() if name and name.split(".")[0] not in LAYERS}
    assert not unknown, f"in no layer of tests/test_house.py: {sorted(unknown)}"


def test_imports_point_down() -> None:
    wrong = []
    for name, path in modules().items():
        if not name:  # the package's own __init__ re-exports from every layer, lazily
            continue
        here = name.split(".")[0]
        for target in imported(path):
            there = target.split(".")[0]
            if there == here or there not in LAYERS:
                continue
            if LAYERS[there] >= LAYERS[here]:
                wrong.append(f"{name} imports {target}")
    assert not wrong, "imports that point up: " + "; ".join(wrong)


def test_no_module_imports_itself_in_a_circle() -> None:
    known = modules()
    graph = {name: {t for t in imported(path) if t in known and t} for name, path in known.items() if name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "circular import: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


BARS = [bar for bar in house_bars.measure(PACKAGE) if not bar.name.startswith("lines ")]  # features may add lines


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: bar.name)
def test_a_bar_of_the_house_is_kept(bar: house_bars.Bar) -> None:
    """Lengths, calls, folders, and how many files of its own folder one needs; `scripts/trace_walks` shows them all."""
    assert bar.kept, f"{bar.name}: {bar.value}; wanted {bar.wanted}"


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the counts are those of Python 3.11")
@pytest.mark.parametrize("walk", ["a", "b1", "b2", "c"])
def test_a_walk_enters_no_more_files_than_its_bar(walk: str) -> None:
    """What a run does not use costs its reader nothing: a new feature is asked for once, at the entrance."""
    command = [sys.executable, str(Path(house_bars.__file__).with_name("trace_walks.py")), "--check", "--walk", walk]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.stderr}{done.stdout}"


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_layers_one_to_three_need_no_lightning_peft_or_wandb() -> None:
    """A cluster job that only scores must not need the training stack."""
    light = [name for name in modules() if name and LAYERS[name.split(".")[0]] < LAYERS["_lightning"]]
    run_python(
        "import sys, importlib\n"
        "for name in ('pytorch_lightning', 'lightning', 'peft', 'wandb'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module('im_lightning.' + name)\n"
    )


def test_every_public_name_loads() -> None:
    run_python(
        "import im_lightning\n"
        "for name in im_lightning.__all__:\n"
        "    assert getattr(im_lightning, name) is not None, name\n"
    )


@pytest.mark.parametrize("arguments", [["-c", "import im_lightning"], ["-m", "im_lightning.cli", "--help"]])
def test_starting_takes_under_a_second(arguments: list[str]) -> None:
    def seconds() -> float:
        """The processor's, of all children: the machine may be busy, the import may not be slow."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    best = float("inf")
    for _ in range(3):
        start = seconds()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        best = min(best, seconds() - start)
    assert best < 1.0, f"{best:.2f} s"


def test_time_limits_grow_with_the_load(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that a busy machine exceeds says nothing about the package."""
    marker = request.node.get_closest_marker("timeout")
    assert marker is not None and marker.args[0] >= 300
    monkeypatch.setattr(speed, "_last", None)
    monkeypatch.setattr(speed, "_work", lambda: time.sleep(4 * speed.IDLE_SECONDS))
    assert speed.slowness() >= 4


def test_importing_the_package_loads_nothing_heavy() -> None:
    out = run_python(
        "import sys, im_lightning\n"
        "print([m for m in ('torch', 'transformers', 'pytorch_lightning', 'peft', 'wandb', 'pyarrow', 'numpy') "
        "if m in sys.modules])"
    )
    assert out.strip() == "[]"
