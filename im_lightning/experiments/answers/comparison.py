"""`im-lightning judge`: two files of answers compared, by a judge or references; `judge.json` and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from im_lightning._utils.files import plain, write_json, write_text
from im_lightning._utils.hashing import digest_strings
from im_lightning._utils.text_tables import wrapped
from im_lightning.data.example import Example
from im_lightning.data.loading import load_examples
from im_lightning.data.settings import Reading
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.errors import RequestError, message
from im_lightning.experiments.answers.judging import COMPARE, judge_pairs, pairs_of, read_prompt
from im_lightning.experiments.answers.references import compared, reference_scores
from im_lightning.experiments.answers.win_rate import WinRate
from im_lightning.experiments.finetuning import check_out

_WIDTH = 110
_PLACES = ("request", "first", "second")
_TITLES = {"exact_match": "exact match", "rouge_l": "ROUGE-L"}


@dataclass(frozen=True)
class Answers:
    """Answers of one model, or reference outputs: the file, what it is called, its examples."""

    path: str
    name: str
    examples: list[Example]

    @classmethod
    def read(cls, path: str, reading: Reading) -> Answers:
        return cls(path, _file(path).name.split(".")[0], load_examples(path, **asdict(reading)))

    @property
    def digest(self) -> str:
        return digest_strings([one.id for one in self.examples])


def _file(path: str) -> Path:
    """Without the name of a published set before it."""
    return Path(path.partition("@")[2] or path)


def _told_apart(a: Answers, b: Answers) -> tuple[Answers, Answers]:
    """Files of one name (weighted/answers.jsonl, random/answers.jsonl) by their folders too, else by their paths."""
    if a.name != b.name:
        return a, b
    names = ["/".join([*_file(one.path).parts[-2:-1], one.name]) for one in (a, b)]
    names = [a.path, b.path] if names[0] == names[1] else names
    return replace(a, name=names[0]), replace(b, name=names[1])


def compare_answers(
    a: Answers,
    b: Answers | None,
    references: Answers | None,
    endpoint: Endpoint | None,
    caps: Caps,
    prompt_file: str | None,
    out: Path,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compares, writes OUT/judge.json and judge.txt (requests lie in OUT/requests.jsonl), and returns what the first
    holds, the text as `rendered`.

    Raises:
        RequestError: there is nothing to compare with, or OUT holds another comparison.
    """
    if endpoint is None and references is None:
        remedy = "name a judge (--base-url, --api-model), or reference outputs (--references)"
        raise RequestError(message(a.path, "nothing says what a good answer is", remedy))
    if endpoint is not None and b is None:
        raise RequestError(message(a.path, "a judge compares two files of answers", "name a second one, --against"))
    if b is not None:
        a, b = _told_apart(a, b)
    prompt = read_prompt(prompt_file, COMPARE, _PLACES)
    judge = None if endpoint is None else {"model": endpoint.api_model, "prompt": prompt.digest}
    files = {"a": a, "b": b, "references": references}
    inputs = {"judge": judge, **{name: one and one.digest for name, one in files.items()}}
    check_out(out / "judge.json", ("inputs", "rendered"), inputs, overwrite)
    value: dict[str, Any] = {"format": "im_lightning.judge", "inputs": inputs}
    value["files"] = {name: one and {"path": one.path, "name": one.name} for name, one in files.items()}
    lines: list[str] = []
    scores: dict[str, Any] = {}
    if references is not None:  # before anything is paid for
        of_b = None if b is None else reference_scores(b.examples, references.examples, b.path)
        scores = compared(reference_scores(a.examples, references.examples, a.path), of_b)
    if endpoint is not None and b is not None:
        pairs = pairs_of(a.examples, b.examples, (a.path, b.path))
        judged = judge_pairs(pairs, prompt, endpoint, caps, out / "requests.jsonl")
        found = WinRate.of(judged)
        value |= {"judge": judge, "win_rate": found.to_json(), "pairs": [asdict(pair) for pair in judged]}
        lines += [
            f"{a.name} against {b.name}, judged by {endpoint.api_model} in both orders.",
            *found.sentences(a.name, b.name),
        ]
    if references is not None:
        value["references"] = {k: {which: asdict(mean) for which, mean in one.items()} for k, one in scores.items()}
        lines += _of_references(scores, a, b)
    lines.append("Brackets and ± are 95 % intervals over instructions.")
    value["rendered"] = "\n".join(wrapped(line, _WIDTH) for line in lines)
    write_json(out / "judge.json", plain(value))
    write_text(out / "judge.txt", value["rendered"] + "\n")
    return value


def _of_references(scores: dict[str, Any], a: Answers, b: Answers | None) -> Sequence[str]:
    out = []
    for metric, found in scores.items():
        line = f"{_TITLES[metric]} with the references: {a.name} {found['a'].text}"
        if b is not None:
            line += f", {b.name} {found['b'].text}, difference {found['difference'].text}"
        count = found["a"].instructions
        out.append(f"{line} ({count:,} instruction{'s' * (count != 1)}).")
    return out
