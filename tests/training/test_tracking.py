"""Logging to real loggers: CSV, TensorBoard and wandb offline, read back from the files they write."""

from __future__ import annotations

import csv
import json
import re
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from fitting import World, trainer
from speed import slowness
from test_callback import callback, designed, fit

from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.training.loggers import TERM_COLUMNS, term_rows

DOCS = Path(__file__).parents[2] / "docs" / "logging.md"


def test_the_line_of_the_page_leaves_out_what_lightning_advertises(tmp_path: Path) -> None:
    """And nothing that warns."""
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    code += "pl.Trainer(accelerator='cpu')\nlogging.getLogger('pytorch_lightning.x').warning('mind this')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Tip" not in done.stderr and "GPU available" not in done.stderr and "mind this" in done.stderr


def documented() -> list[str]:
    """The keys of docs/logging.md as patterns, without prefix."""
    keys = re.findall(r"^\| `im/([^`]+)` \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"<[a-z]+>", "[^ ]+", re.escape(key).replace(r"\<", "<").replace(r"\>", ">")) for key in keys]


def csv_columns(folder: Path) -> dict[str, list[float]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0] if key.startswith("im/")}


def tensorboard_scalars(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(path))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag.startswith("im/")}


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of an offline run's transaction log: blocks of 32 KiB, as LevelDB's log has them."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("run-*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part, at = data[at + 7 : at + 7 + length], at + 7 + length
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            record = Record()
            try:
                record.ParseFromString(whole)
            except DecodeError:  # still being written
                return
            yield record


def finished_records(folder: Path) -> list[Any]:
    """All records, once wandb's own process, which writes them, has written the last."""
    deadline = time.monotonic() + 60 * slowness()
    while time.monotonic() < deadline:
        records = list(wandb_records(folder))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    pytest.fail("wandb's process never wrote the end of the run")


class Offline:
    """What an offline wandb run holds."""

    def __init__(self, folder: Path) -> None:
        self.history: dict[str, list[float]] = {}
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.artifacts: dict[str, Any] = {}
        self.tables = {
            re.sub(r"_\d+_\w+\.table\.json$", "", str(path.relative_to(next(folder.rglob("media/table"))))): path
            for path in folder.rglob("*.table.json")
        }
        for record in finished_records(folder):
            for item in record.history.item:
                key, value = item.key or "/".join(item.nested_key), json.loads(item.value_json)
                if key.startswith("im/") and len(item.nested_key) < 2:  # a table's size and the like are nested
                    self.history.setdefault(key, []).append(value)
            for item in record.summary.update:
                self.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            for item in (*record.run.config.update, *record.config.update):
                self.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            for artifact in (record.artifact, record.request.log_artifact.artifact):
                if artifact.name:
                    self.artifacts[artifact.name] = artifact


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.finish()  # the next run of this process would go on in this one


def test_the_same_numbers_reach_every_logger(world: World, offline: None) -> None:
    """A key that only one logger gets, or that no page explains, is a number nobody can use."""
    for seed in range(5):  # the sixth run refits
        designed(world, 0, seed)
    loggers = [
        pl.loggers.CSVLogger(world.root / "csv"),
        pl.loggers.TensorBoardLogger(world.root / "tb"),
        pl.loggers.WandbLogger(project="p", offline=True, save_dir=str(world.root / "wb")),
    ]
    (world.root / "wb").mkdir()
    data = world.data(subset_size=12, subset_seed=5, indicators=["ppl", "mtld", "length_output"])
    watch = callback(world, log_every_n_steps=2)
    fit(world, watch, data=data, logger=loggers, max_epochs=1)
    loggers[2].experiment.finish()
    ledger = RunLedger(world.root / "runs")
    record = next(r for r in ledger.records() if r.run_id == watch.run_id)

    table, board, wandb_run = (
        csv_columns(world.root / "csv"),
        tensorboard_scalars(world.root / "tb"),
        Offline(world.root / "wb"),
    )
    assert {"im/pool_seen", "im/ess", "im/eval_loss/eval", "im/base_loss/eval", "im/left_out"} <= table.keys()
    assert any(key.startswith("im/decile_loss/") for key in table)
    assert table.keys() == board.keys() == wandb_run.history.keys()
    for key, values in table.items():
        assert board[key] == pytest.approx(values, rel=1e-6) and wandb_run.history[key] == pytest.approx(values)
        assert any(re.fullmatch(pattern, key[3:]) for pattern in documented()), f"{key} is not in docs/logging.md"
    assert table["im/pool_seen"] == [8 / 40, 12 / 40]
    assert table["im/eval_loss/eval"] == pytest.approx([record.evaluation["eval"]["loss"]])

    told = wandb_run.summary["im/record"]
    assert RunRecord.from_json(json.loads(told), "wandb").run_id == record.run_id
    assert json.loads(told) == json.loads((world.root / "runs" / f"{record.run_id}.json").read_text())
    assert wandb_run.config["im"]["regime"] == record.regime and wandb_run.config["im"]["purpose"] == "designed"
    binned = json.loads(wandb_run.tables["im/decile_loss"].read_text())
    assert binned["columns"] == ["scale", "decile", "exposure", "loss", "examples"]
    statistics = ledger.statistics(record.run_id)
    for scale, decile, exposure, loss, examples in binned["data"]:
        assert exposure == "first" and loss == pytest.approx(statistics["by_decile"][scale][decile - 1])
        assert examples == statistics["decile_examples"][scale][decile - 1]
    assert {row[0] for row in binned["data"]} == {"length_output", "ppl", "mtld"}
    assert sum(row[4] for row in binned["data"]) == 3 * 12
    refitted = LinearRule.load(world.root / "runs" / "rule.json")
    rows = json.loads(wandb_run.tables["im/refitted_rule"].read_text())
    assert rows["columns"] == list(TERM_COLUMNS)
    assert [r[0] for r in rows["data"]] == ["intercept", "length_output", "ppl", "mtld"]
    assert [r[1] for r in rows["data"]] == pytest.approx([refitted.intercept_, *refitted.coef_])
    assert "im/rule" not in wandb_run.tables
    kinds = {name: (a.type, [e.path for e in a.manifest.contents]) for name, a in wandb_run.artifacts.items()}
    assert kinds["im-scores"] == ("scores", ["table.parquet"])
    assert kinds["im-refitted_rule"] == ("rule", ["rule.json"])


def test_the_rule_used_is_a_table_and_an_artifact(world: World, offline: None) -> None:
    (world.root / "wb").mkdir()
    logger = pl.loggers.WandbLogger(project="p", offline=True, save_dir=str(world.root / "wb"))
    fit(world, callback(world, log_prefix="my mining", refit=False), logger=logger, max_epochs=1)
    logger.experiment.finish()
    run = Offline(world.root / "wb")
    rows = json.loads(run.tables["my mining/rule"].read_text())["data"]
    assert rows[1][:3] == ["length_output", pytest.approx(-0.1), None]
    assert {"my-mining-rule", "my-mining-scores"} <= run.artifacts.keys() and "im/record" in run.summary
    scales = {row[0] for row in json.loads(run.tables["my mining/decile_loss"].read_text())["data"]}
    assert scales == {"predicted_log_loss", "length_output", "ppl", "mtld"}


def test_what_wandb_refuses_does_not_cost_the_run(
    world: World, offline: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run of hours must not be lost because a table could not be drawn."""

    class Refuses(pl.loggers.WandbLogger):
        def log_table(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionError("no route to host")

    (world.root / "wb").mkdir()
    logger = Refuses(project="p", offline=True, save_dir=str(world.root / "wb"))
    fit(world, callback(world), logger=logger, max_epochs=1)
    assert RunLedger(world.root / "runs").records()
    err = capfd.readouterr().err
    assert "wandb: the table im/rule could not be logged: ConnectionError: no route to host" in err
    assert "wandb: the artifact" not in err


def test_a_logger_that_fails_at_the_end_does_not_cost_the_evaluation(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """wandb's service may be gone after a night: the losses just measured must reach the ledger all the same."""

    class Gone(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(key.startswith("im/eval_loss/") for key in metrics):
                raise ConnectionResetError("Connection lost")
            super().log_metrics(metrics, step)

    fit(world, callback(world), logger=Gone(world.root / "csv"), max_epochs=1)
    (record,) = RunLedger(world.root / "runs").records()
    assert record.status == "complete" and record.loss("eval") is not None
    assert "Gone: numbers could not be logged: ConnectionResetError: Connection lost" in capfd.readouterr().err


def test_without_a_wandb_logger_wandb_is_not_imported(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its import takes a second and starts a service; most fits have no use for either."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # whoever imports it now fails
    fit(world, callback(world), logger=pl.loggers.CSVLogger(world.root / "csv"), max_epochs=1)
    assert RunLedger(world.root / "runs").records() and csv_columns(world.root / "csv")
    assert "could not be logged" not in capfd.readouterr().err


def test_a_published_rule_has_rows_without_statistics() -> None:
    from im_lightning.rule.published import load_rule

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unverified, once per process
        rule = load_rule("instructmining-v3")
    rows = term_rows(rule)
    assert rows[0][:3] == ["intercept", pytest.approx(0.0274), None] and len(rows) == 5


def test_nothing_is_logged_in_the_sanity_check(world: World) -> None:
    from im_lightning.training.loggers import log_scalars

    logger = pl.loggers.CSVLogger(world.root / "csv")
    fitting = trainer(world.root, logger=logger)
    fitting.sanity_checking = True
    log_scalars(fitting, {"a": 1.0}, "im")
    assert not logger.experiment.metrics
    fitting.sanity_checking = False
    log_scalars(fitting, {"a": 1.0}, "im")
    assert logger.experiment.metrics[0]["im/a"] == 1.0
