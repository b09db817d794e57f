"""If these failed, runs logged to wandb would be lost to the fit, counted twice, or taken for what they are not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from simulated_ledger import make_record, simulate

from im_lightning.errors import RequestError
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.wandb_import import import_wandb_runs, summary_value
from im_lightning.rule.fit import fit_rule


class NestedSummary:
    """What nested values of a wandb summary are: keys() and [], but no dict."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = {k: NestedSummary(v) if isinstance(v, dict) else v for k, v in values.items()}

    def keys(self) -> Any:
        return self._values.keys()

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]


def wandb_run(number: int, summary: dict[str, Any], config: dict[str, Any] | None = None, **more: Any) -> Any:
    """The attributes that runs of `wandb.Api` have."""
    fields = {
        "id": f"w{number:07d}", "name": f"clear-sun-{number}", "state": "finished",
        "created_at": "2026-01-02T03:04:05Z", "config": config or {}, "summary": NestedSummary(summary),
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **more})


def logged(record: RunRecord, number: int, **summary: Any) -> Any:
    """A run as the callback leaves it in wandb."""
    loss = record.loss("held-out")
    told = {"_step": 40, "im/eval_loss/held-out": {"min": loss}, "im/record": json.dumps(record.to_json()), **summary}
    return wandb_run(number, told, {"im": {"run_id": record.run_id, "purpose": record.purpose}, "model/lr": 1})


class Project:
    """`wandb.Api` with the runs of one project."""

    def __init__(self, runs: list[Any]) -> None:
        self.found = runs
        self.asked: list[Any] = []

    def runs(self, path: str, filters: Any = None, order: str = "+created_at", per_page: int = 50) -> list[Any]:
        self.asked.append((path, order))
        return self.found


@pytest.fixture
def book(tmp_path: Path) -> RunLedger:
    return RunLedger(tmp_path / "runs")


def test_imported_runs_are_those_of_the_ledger_they_came_from(book: RunLedger) -> None:
    records = simulate(12)
    api = Project([logged(record, k) for k, record in enumerate(records)])
    counts = import_wandb_runs("me/instruct", book, api)
    assert counts.added == [r.run_id for r in records] and not counts.skipped
    assert [r.to_json() for r in book.records()] == [r.to_json() for r in records]
    assert fit_rule(book.records()).coef_.tolist() == fit_rule(records).coef_.tolist()
    assert api.asked == [("me/instruct", "+created_at")]
    assert counts.lines("me/instruct") == ["me/instruct: 12 runs imported, 0 known already"]


def test_importing_again_changes_nothing(book: RunLedger) -> None:
    api = Project([logged(record, k) for k, record in enumerate(simulate(5))])
    import_wandb_runs("me/instruct", book, api)
    before = {path.name: path.read_bytes() for path in book.path.iterdir()}
    counts = import_wandb_runs("me/instruct", book, api)
    assert (len(counts.known), counts.added) == (5, [])
    assert {path.name: path.read_bytes() for path in book.path.iterdir()} == before


def test_a_run_of_this_machine_is_not_counted_twice(book: RunLedger) -> None:
    """A run that is in the ledger and in wandb too would else be a repeat without any noise."""
    records = simulate(4)
    book.add(records[0])
    other = simulate(4)[1]
    other.note = "as this machine knows it"
    book.add(other)
    book.add(make_record(2, status="incomplete", evaluation={}))
    counts = import_wandb_runs("me/p", book, Project([logged(r, k) for k, r in enumerate(records)]))
    assert (counts.known, counts.kept, counts.added) == (["run-000"], ["run-001"], ["run-002", "run-003"])
    kept = {r.run_id: r for r in book.records(status=None)}
    assert len(kept) == 4 and kept["run-001"].note and kept["run-002"].status == "complete"
    assert "the ledger has other records of run-001, and keeps them" in counts.lines("me/p")


def test_it_says_which_runs_lack_what(book: RunLedger) -> None:
    torn = logged(make_record(5), 5)
    torn.summary = NestedSummary({"im/record": json.dumps(make_record(5).to_json())[:200]})
    older = make_record(6).to_json() | {"schema_version": 99}
    runs = [
        wandb_run(1, {"loss": 1.0}),
        wandb_run(2, {}, {"im": {"run_id": "a"}}, state="running"),
        wandb_run(3, {"im/eval_loss/held-out": 1.5}, {"im": {"run_id": "b"}}, state="crashed"),
        wandb_run(4, {}, {"im": {"run_id": "c"}}, state="failed"),
        torn,
        wandb_run(6, {"im/record": json.dumps(older)}),
        logged(make_record(7), 7),
    ]
    counts = import_wandb_runs("me/p", book, Project(runs))
    assert counts.added == ["run-007"]
    said = dict(counts.skipped)
    assert list(said) == [f"clear-sun-{k} (w{k:07d})" for k in range(1, 7)]
    texts = list(said.values())
    assert "it was not made with InstructMiningCallback" in texts[0]
    assert "it is still running" in texts[1]
    assert "it has im/eval_loss/held-out, but no means of its indicators" in texts[2] and "crashed" in texts[2]
    assert "it has no evaluation loss, and no means" in texts[3]
    assert "im/record of wandb run w0000005: it is not whole JSON" in texts[4]
    assert "schema_version is 99" in texts[5]
    assert len(counts.lines("me/p", most=2)) == 1 + 2 + 1


def test_a_loss_measured_later_is_added_and_nested_summaries_are_read(book: RunLedger) -> None:
    run = logged(make_record(0, loss=2.5), 0, **{"im/eval_loss/other": {"min": 1.25}, "im/eval_loss/bad": "NaN"})
    import_wandb_runs("me/p", book, Project([run]))
    (record,) = book.records()
    assert record.evaluation["held-out"] == {"loss": 2.5, "tokens": 1000, "examples": 50}
    assert record.evaluation["other"] == {"loss": 1.25, "log_loss": math.log(1.25)} and "bad" not in record.evaluation
    values = NestedSummary({"a": {"max": 3.0, "last": 2.0}, "b": 1, "c": "text", "d": {"odd": 1}})
    assert [summary_value(values, n) for n in "ab"] == [2.0, 1.0]
    assert all(math.isnan(summary_value(values, n)) for n in "cde")


def test_a_record_without_an_id_takes_that_of_wandb(book: RunLedger) -> None:
    value = make_record(0).to_json()
    del value["run_id"]
    run = wandb_run(9, {"im/record": value})
    assert import_wandb_runs("me/p", book, Project([run])).added == ["w0000009"]
    assert import_wandb_runs("me/p", book, Project([run])).known == ["w0000009"]


def test_real_wandb_runs_have_this_shape(book: RunLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own `Run` over a recorded answer of its server: config and summary are JSON strings there."""
    from wandb.apis.public.runs import Run

    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    record = simulate(1)[0]
    answer = {
        "id": "UnVuOnYxOmFiYw==", "name": "abc12345", "displayName": "clear-sun-1", "state": "finished",
        "createdAt": "2026-01-02T03:04:05Z", "tags": [], "group": None, "sweepName": None, "jobType": None,
        "commit": None, "readOnly": False, "heartbeatAt": "2026-01-02T03:05:05Z", "historyKeys": None,
        "config": json.dumps({
            "_wandb": {"value": {"cli_version": "0.31.0"}},
            "im": {"desc": None, "value": {"run_id": record.run_id, "purpose": "designed", "regime": {}}},
        }),
        "summaryMetrics": json.dumps({
            "_step": 40, "im/eval_loss/held-out": {"min": record.loss("held-out")}, "im/eval_loss/b": {"min": 1.5},
            "im/record": json.dumps(record.to_json()), "_wandb": {"runtime": 7},
        }),
    }  # fmt: skip
    run: Any = Run(None, "me", "p", "abc12345", answer, lazy=False)  # type: ignore[arg-type]
    bare = dict(answer, summaryMetrics=json.dumps({"im/eval_loss/held-out": 2.0}), state="killed", name="abd12345")
    lost: Any = Run(None, "me", "p", "abd12345", bare, lazy=False)  # type: ignore[arg-type]
    counts = import_wandb_runs("me/p", book, Project([run, lost]))
    assert counts.added == [record.run_id]
    (found,) = book.records()
    assert found.evaluation.pop("b")["loss"] == 1.5
    assert found.to_json() == record.to_json()
    ((title, why),) = counts.skipped
    assert "abd12345" in title and "no means of its indicators" in why and "killed" in why


@pytest.mark.parametrize("path", ["project", "a/b/c", "/p", "me/"])
def test_a_path_that_is_no_project_is_refused(book: RunLedger, path: str) -> None:
    with pytest.raises(RequestError, match=r"it is not a project.*ENTITY/PROJECT"):
        import_wandb_runs(path, book, Project([]))


def test_without_a_login_or_a_network_it_says_what_to_do(
    book: RunLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RequestError, match=r"--from-wandb me/p: its runs cannot be read from wandb .*wandb login"):
        import_wandb_runs("me/p", book)

    class Offline(Project):
        def runs(self, path: str, **options: Any) -> list[Any]:
            raise ConnectionError("Name or service not known")

    with pytest.raises(RequestError, match=r"Name or service not known.*the network, or refit the ledger alone"):
        import_wandb_runs("me/p", book, Offline([]))
    assert not book.path.exists(), "a failed import leaves nothing behind"
