"""`im-lightning generate`: a finetuned model's answers to an evaluation set."""

from __future__ import annotations

from pathlib import Path

from im_lightning._utils.answer import answer
from im_lightning._utils.outputs import Replacing
from im_lightning.data.file_io import check_rows_path
from im_lightning.data.settings import Encoding, Reading
from im_lightning.experiments.answers.prompts import Generating, is_answers, read_prompts

SUMMARY = "answer an evaluation set with a finetuned model"
EXAMPLE = "im-lightning generate eval.jsonl --model meta-llama/Llama-3.2-1B --adapter adapter --out answers.jsonl"
POSITIONAL = ("data",)
REQUIRED = ("model",)

_GENERATING, _READING, _REPLACING = Generating(), Reading(), Replacing()


def run(
    data: list[str],
    out: str,
    encoding: Encoding,
    adapter: str | None = None,
    generating: Generating = _GENERATING,
    reading: Reading = _READING,
    replacing: Replacing = _REPLACING,
) -> int:
    """Answers each different prompt of the data once, in its template, up to the template's end of a turn.

    The answers are the most likely tokens, the same each time, unless --temperature is given. They are kept in
    OUT.partial.jsonl as they come; the same command goes on where it was interrupted.

    Args:
        data: Evaluation sets; answers that they have are left aside.
        out: File to write (.jsonl, .json, also .gz, .zst): a row per prompt, with its answer.
        encoding: Base model and template.
        adapter: Folder of a LoRA adapter on top of the base (im-lightning fit --export adapter).
        generating: How answers are made.
        reading: How rows are read.
        replacing: What may be replaced.
    """
    from im_lightning.experiments.answers.generation import generate_answers
    from im_lightning.training.run.encoded_pool import coding_of

    check_rows_path(out)
    replacing.check(out, "file of answers", is_answers)
    prompts = read_prompts(data, reading, coding_of(encoding).template.refusal)
    answer(*generate_answers(prompts, encoding, adapter, generating, Path(out)))
    return 0
