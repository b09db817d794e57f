"""`im-lightning make-eval`: an evaluation set of reference outputs from a model behind an endpoint."""

from __future__ import annotations

from pathlib import Path

from im_lightning._utils.answer import answer
from im_lightning._utils.outputs import Replacing
from im_lightning.data.file_io import check_rows_path
from im_lightning.data.settings import Reading
from im_lightning.endpoint.client import estimate_text
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.experiments.answers.evaluation_set import cost_of, make_evaluation_set
from im_lightning.experiments.answers.prompts import is_answers, read_prompts

SUMMARY = "ask a model behind an endpoint for reference outputs: an evaluation set, within a cap on its cost"
EXAMPLE = (
    "im-lightning make-eval self-instruct@user_oriented_instructions.jsonl mt-bench@question.jsonl --outputs 5 "
    "--base-url https://api.openai.com/v1 --api-model gpt-3.5-turbo --price-in 0.5 --price-out 1.5 --max-cost 2 "
    "--out eval.jsonl"
)
POSITIONAL = ("data",)
REQUIRED = ("base_url", "api_model")

_CAPS, _READING, _REPLACING = Caps(), Reading(), Replacing()


def run(
    data: list[str],
    out: str,
    endpoint: Endpoint,
    caps: Caps = _CAPS,
    outputs: int = 1,
    temperature: float = 1.0,
    dry_run: bool = False,
    reading: Reading = _READING,
    replacing: Replacing = _REPLACING,
) -> int:
    """Asks a model for outputs to the instructions of one or several test sets, and writes them as an evaluation set.

    Every answer is kept with its request in OUT.requests.jsonl as it comes. The same command goes on where it was
    interrupted, or where a cap ended it: no request that was answered is sent again. What it may cost at most is
    counted before it is spent.

    Args:
        data: Test sets whose instructions are asked; answers that they have are left aside.
        out: Evaluation set to write (.jsonl, .json, also .gz, .zst): a row per output.
        endpoint: The model.
        caps: What may be spent.
        outputs: Outputs per instruction; the paper has five.
        temperature: Of the answers; at 0 several outputs are alike.
        dry_run: Only say how many requests and tokens there are, and what they would cost.
        reading: How rows are read.
        replacing: What may be replaced.
    """
    check_rows_path(out)
    prompts = read_prompts(data, reading)
    if dry_run:
        found = cost_of(prompts, outputs, endpoint, caps, temperature)
        answer(found, estimate_text(found))
        return 0
    replacing.check(out, "file of answers", is_answers)
    answer(*make_evaluation_set(prompts, outputs, endpoint, caps, temperature, Path(out)))
    return 0
