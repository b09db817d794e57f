"""What `--force` was needed for: sentences for the result, since a warning at the start is gone when it is read."""

from __future__ import annotations

from im_lightning.data.score_table import ScoreTable
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.training.run.encoded_pool import base_model_name, coding_of


def check_rule(
    rule: LinearRule, table: ScoreTable, model: str, template: str, max_length: int, cache_dir: str | None, force: bool
) -> list[str]:
    """Checks the rule against the scores and against the base that is to be finetuned, before anything is.

    Args:
        rule: The rule.
        table: Scores of the pool.
        model, template, max_length, cache_dir: As the data module's.
        force: Accept what would be refused.

    Returns:
        What was forced, one sentence each.

    Raises:
        RequestError: the rule does not fit, and `force` is not set.
    """
    mark = ", forced: "
    forced = [f"FORCED: {note.replace(mark, ': ', 1)}." for note in rule.check(table, force) if mark in note]
    coding = coding_of(model, None, template, max_length, cache_dir)
    here = {
        "base_model": base_model_name(coding.model),
        "template": f"{coding.template.name} {coding.template.identity}",
    }
    return forced + [f"FORCED: {note}." for note in rule.check_regime(here, force)]
