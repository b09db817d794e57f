"""A fit that answers its evaluation rows records the share of right answers, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from fitting import World, trainer
from pools import write_jsonl
from tiny import make_tiny_llama

from im_lightning.errors import RequestError
from im_lightning.ledger.ledger import RunLedger
from im_lightning.models.generation import Made, _cut
from im_lightning.training import exact_match
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.exact_match import AnswerSettings


def write(path: Path, answers: list[str]) -> str:
    rows = [{"instruction": f"Say {k} of {path.stem}.", "output": answer} for k, answer in enumerate(answers)]
    return write_jsonl(path, rows)


def fit(world: World, name: str, evaluation: str, **options: Any) -> Any:
    """A model that is taught to answer "yes" to everything."""
    pool = write(world.root / "yes.jsonl", ["yes"] * 40)
    data = world._replace(pool=pool).data(scores=None, indicators=["length_output"], eval_data=evaluation)
    callback = InstructMiningCallback(str(world.root / name), exact_match=True, refit=False)
    pl.seed_everything(1, verbose=False)
    fitting = trainer(world.root, callbacks=[callback], max_epochs=4, **options)
    fitting.fit(world.tuner(lora_rank=0, learning_rate=1e-2), datamodule=data)
    return RunLedger(world.root / name).records()[0]


@pytest.mark.parametrize("ranks", [{}, {"strategy": "ddp_fork", "devices": 2}])
def test_the_share_of_right_answers_is_in_the_record(world: World, ranks: dict[str, Any]) -> None:
    """A rule on a task's score needs the score of every run, and no row counted twice."""
    evaluation = write(world.root / "eval.jsonl", ["yes", "no", "yes", "yes", "no", "yes", "yes"])
    record = fit(world, "runs", evaluation, **ranks)
    assert (
        record.evaluation["eval"]["exact_match"] == pytest.approx(5 / 7) and record.evaluation["eval"]["answers"] == 7
    )
    assert record.loss("em:eval") == pytest.approx(2.5 / 8) and record.loss("eval") > 0


def test_sets_of_long_answers_have_no_score_and_alone_are_refused_before_training(world: World) -> None:
    long = write(world.root / "long.jsonl", ["many words " * 40] * 3)
    with pytest.raises(RequestError, match=r"exact_match: no evaluation set has rows with a single response"):
        fit(world, "runs", long)
    assert not (world.root / "runs").exists()


def test_a_module_that_cannot_answer_is_refused_before_training(world: World) -> None:
    class Own(pl.LightningModule):
        response_nll = training_step = configure_optimizers = lambda self, *batch: None

    callback = InstructMiningCallback(str(world.root / "runs"), exact_match=True)
    with pytest.raises(RequestError, match=r"Own has no `network`, a causal LM .*docs/targets\.md"):
        trainer(world.root, callbacks=[callback]).fit(Own(), datamodule=world.data())


CLOSED_BY_A_TEXT = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '[/]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def test_an_answer_ends_where_all_of_its_closing_text_stands(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended at the last token of that text alone, every answer kept the rest of it and matched nothing."""
    base = make_tiny_llama(world.root / "chat", hidden=16, layers=1, chat_template=CLOSED_BY_A_TEXT)
    data = world._replace(base=base).data(scores=None, eval_data=write(world.root / "eval.jsonl", ["yes", "no"]))
    data.setup("fit")
    said = data.coding.tokenizer("yes[/]yes[/]", add_special_tokens=False)["input_ids"]
    assert len(data.coding.tokenizer("[/]", add_special_tokens=False)["input_ids"]) > 1

    def generate(network: Any, prompts: Any, ends: Any, pad: int, most: int) -> list[Made]:
        return [_cut(said, ends, most) for _ in prompts]

    monkeypatch.setattr(exact_match, "generate", generate)
    answers = exact_match.greedy_answers(None, data.eval_sets["eval"], data.coding.tokenizer, AnswerSettings())
    assert {one.reference: (one.answer, one.match) for one in answers} == {"yes": ("yes", True), "no": ("yes", False)}
