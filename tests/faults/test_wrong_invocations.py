"""Wrong invocations, some hundreds of them, made from right ones: each ends with its status and one line that names
what was wrong; no traceback, no dump of a parser, no file written or changed."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fitting import write_pool, write_rule, write_scores
from simulated_ledger import simulate

from im_lightning.cli import COMMANDS, main
from im_lightning.ledger.ledger import RunLedger

RIGHT = {
    "run": "pool.jsonl --eval-data eval.jsonl --model MODEL --out im-run",
    "demo": "--fast --out demo-out",
    "score": "pool.jsonl --indicators mtld --rule rule.json --out new.parquet",
    "design": "scores.parquet pool.jsonl --config recipe.yaml --runs 8 --subset-size 10 --out new.yaml",
    "select": "scores.parquet pool.jsonl --rule rule.json --budget 5 --out new.jsonl",
    "fit": "--config=recipe.yaml --data.scores=scores.parquet --data.rule=rule.json",
    "sweep": "sweep.yaml --out sweeps/new --count 2",
    "runs": "runs",
    "refit": "runs --permutations 0 --bootstrap 0 --out new.json",
    "search": "pool.jsonl --scores scores.parquet --rule rule.json --model MODEL --eval-data eval.jsonl "
    "--report-data report.jsonl --low 5 --high 20 --out search",
    "compare": "pool.jsonl --scores scores.parquet --rule rule.json --model MODEL --eval-data eval.jsonl "
    "--tokens 100 --steps 3 --out compare",
    "report": "--ledger runs --rule rule.json --scores scores.parquet --data pool.jsonl --out new.html",
    "check": "pool.jsonl eval.jsonl --out new.jsonl",
    "mix": "runs --scores scores.parquet --budget 20 --out new.json",
    "explain": "0 nope.jsonl",
    "plan": "--rows 5000 --ledger runs --scores scores.parquet",
    "transfer": "runs --model MODEL --rule rule.json --out transfer",
    "clean": "--folder nope",
    "recipe": "designed",
    "completion": "bash",
    "make-eval": "pool.jsonl --base-url http://127.0.0.1:9/v1 --api-model m --max-requests 1 --out new.jsonl",
    "generate": "pool.jsonl --model ./nope --out new.jsonl",
    "judge": "pool.jsonl --against nope.jsonl --out judged",
    "score-llm": "pool.jsonl --base-url http://127.0.0.1:9/v1 --api-model m --max-requests 1 --out new.parquet",
}  # fmt: skip
"""Command → an invocation that would work; nothing here is run as it stands."""
KINDS = {
    "pool.jsonl": "data", "eval.jsonl": "data", "report.jsonl": "data", "scores.parquet": "scores", "runs": "ledger",
    "rule.json": "rule", "recipe.yaml": "recipe", "sweep.yaml": "sweep",
}  # fmt: skip
CHOICES = {
    "--method", "--weighting", "--format", "--on-bad-row", "--answer", "--template", "--objective", "--pool-draw",
    "--device", "--dtype", "--precision", "--engine", "--arms", "--indicators", "--evaluation", "--data.force",
    "--data.weighting", "--data.format", "--data.template", "--model.dtype", "--model.quantization", "--force",
}  # fmt: skip
DUMPS = ("Traceback", "Parser key", "usage:", "Subtypes", "<class", "unrecognized arguments", "the following arguments")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    write_pool(folder / "pool.jsonl", n=60)
    for seed, name in enumerate(("eval", "report"), start=8):
        write_pool(folder / f"{name}.jsonl", n=5, seed=seed, tag=name)
    write_rule(folder / "rule.json", write_scores(folder / "scores.parquet", str(folder / "pool.jsonl")))
    (folder / "recipe.yaml").write_text("data: {data: pool.jsonl, eval_data: eval.jsonl, model: model}\n")
    (folder / "sweep.yaml").write_text(
        "method: grid\ncommand: [im-lightning, fit, --config, recipe.yaml, '${args}']\n"
        "parameters: {data.subset_seed: {values: [0, 1]}, data.subset_size: {value: 5}}\n"
    )
    for record in simulate(12, repeats=2):
        RunLedger(folder / "runs").add(record)
    return folder


def test_the_right_ones_are_of_every_command() -> None:
    assert set(RIGHT) == set(COMMANDS)


def options(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Option → the type that the help names ("" for a switch)."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = re.sub(r"\n {10,}", "  ", capsys.readouterr().out)
    found = re.findall(r"^  (--[\w.-]+)((?: \S+)*)  .*?(?:type: (\w+(?: \| \w+)*)[,)].*)?$", text, re.MULTILINE)
    ours = re.compile(r"--(?!.*help$)([^.]+|(data|model|mining)\..*)")
    return {flag: kind if takes else "" for flag, takes, kind in found if ours.fullmatch(flag)}


def of_wrong_type(command: str, known: dict[str, str]) -> Iterator[list[str]]:
    """Words and fractions where numbers belong, and values of switches."""
    for flag, kind in known.items():
        if kind in ("int", "int | null"):
            yield [*RIGHT[command].split(), f"{flag}=lots"]
            yield [*RIGHT[command].split(), flag, "1.5"]
        elif kind in ("float", "float | null"):
            yield [*RIGHT[command].split(), f"{flag}=much"]
        elif not kind and flag not in ("--force", "--config", "--print_config"):
            yield [*RIGHT[command].split(), f"{flag}=7"]


def misspelt(command: str, known: dict[str, str]) -> Iterator[list[str]]:
    """One letter lost, one doubled, two exchanged."""
    draw = random.Random(command)
    for flag in known:
        for change in ("lost", "doubled", "exchanged"):
            at = draw.randrange(min(3, len(flag) - 2), len(flag) - 1)
            word = {
                "lost": flag[:at] + flag[at + 1 :],
                "doubled": flag[:at] + flag[at] + flag[at:],
                "exchanged": flag[:at] + flag[at + 1] + flag[at] + flag[at + 2 :],
            }[change]
            if not any(one.startswith(word) for one in known) and (command != "fit" or change == "lost"):
                yield [*RIGHT[command].split(), word, "3"]


def missing_or_swapped(command: str, known: dict[str, str]) -> Iterator[list[str]]:
    """Each file replaced by one that is not there, and by one of each other kind."""
    words = RIGHT[command].split()
    if command in ("make-eval", "score-llm"):  # those that are right for it would be sent to the endpoint
        return
    for at, word in enumerate(words):
        head, _, name = word.rpartition("=")
        if name not in KINDS:
            continue
        others = [other for other, kind in KINDS.items() if kind != KINDS[name] and other != "report.jsonl"]
        for other in [f"nope{Path(name).suffix}", *others]:
            yield [*words[:at], f"{head}={other}" if head else other, *words[at + 1 :]]


def of_no_choice(command: str, known: dict[str, str]) -> Iterator[list[str]]:
    """A word that is none of those that an option takes."""
    for flag in CHOICES & known.keys():
        yield [*RIGHT[command].split(), f"{flag}=nonesuch"]


def incomplete(command: str, known: dict[str, str]) -> Iterator[list[str]]:
    """One option that takes a value without it, an option of no command, a word too many."""
    words = RIGHT[command].split()
    yield [*words, "--colour", "red"]
    takes = [flag for flag, kind in known.items() if kind]
    if takes:
        yield [*words, takes[-1]]
    if command not in ("run", "score", "design", "select", "search", "compare", "report"):  # they take several files
        yield [*words, "extra"]


@pytest.mark.parametrize("most", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_each_is_answered_in_one_line(
    most: int | None,
    desk: Path,
    tiny_llama: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(desk)
    before, made, wrong = contents(desk), 0, []
    makers: list[Callable[[str, dict[str, str]], Iterator[list[str]]]]
    makers = [of_wrong_type, misspelt, of_no_choice, missing_or_swapped, incomplete]
    for command in RIGHT:
        known = options(command, capsys, monkeypatch)
        made_from = [list(maker(command, known)) for maker in makers]
        if most is not None:
            made_from = [random.Random(command).sample(one, min(len(one), most)) for one in made_from]
        for arguments in itertools.chain(*made_from):
            made += 1
            fault = fault_of(command, [word.replace("MODEL", tiny_llama) for word in arguments], capsys)
            if (after := contents(desk)) != before:
                fault += f"\nchanged: {[name for name in {**before, **after} if after.get(name) != before.get(name)]}"
                before = after
            if fault:
                wrong.append(f"im-lightning {command} {' '.join(arguments)}: {fault}")
    assert not wrong, f"{len(wrong)} of {made}:\n" + "\n\n".join(wrong)
    assert made >= 300, made


def fault_of(command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is wrong with the answer to a wrong invocation; nothing where it is right."""
    try:
        status = main([command, *arguments])
    except (SystemExit, Exception) as error:
        return f"{type(error).__name__}: {error}"
    said = capsys.readouterr()
    *notes, last = said.err.strip().splitlines() or [""]
    begins = f"im-lightning {command}: "
    right = (
        status in (1, 2)
        and not said.out.strip()
        and not any(dump in said.err for dump in DUMPS)
        and last.startswith(begins)
        and " Fix: " in last
        and len(last) < 700
        and not any(line.startswith(begins) for line in notes)
    )
    return "" if right else f"status {status}\n{said.out}{said.err}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and folder; the content of the files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}
