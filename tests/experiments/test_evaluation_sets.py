"""A set that the rule has seen may not judge it; where that cannot be known, the text says so."""

from __future__ import annotations

import json

import pytest
from simulated_ledger import simulate

from im_lightning.data.settings import Reading
from im_lightning.errors import RequestError
from im_lightning.experiments.finetuning import UNKNOWN_ROWS, check_unseen
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.fit import fit_rule
from im_lightning.training.run.encoded_pool import read_pool


def test_runs_without_losses_by_example_are_no_obstacle(tmp_path) -> None:
    """Runs imported from wandb have none; of the others any one knows the rows."""
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"Say {k}.", "output": str(k)}) + "\n" for k in range(4)))
    one, book = read_pool(str(path), Reading()), RunLedger(tmp_path / "runs")
    for record in simulate(12):
        book.add(record)
    runs = book.records()
    rule = fit_rule(runs)
    assert check_unseen("--eval-data", one, rule, book, runs) == UNKNOWN_ROWS
    book.add_losses(runs[3].run_id, "held-out", ["other", one.ids[0]], [1.0, 2.0], [3, 4])
    with pytest.raises(RequestError, match=r"1 of its 4 rows are in the set that refit was fitted on"):
        check_unseen("--eval-data", one, rule, book, runs)
    book.add_losses(runs[3].run_id, "held-out", ["other"], [1.0], [3])
    assert check_unseen("--eval-data", one, rule, book, runs) == ""
