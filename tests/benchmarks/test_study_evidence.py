"""The study's runs as a world of ways: half are bought from, the other half tests, and nobody sees both."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from simulated_ledger import make_record

from benchmarks.evidence.budget import flops
from benchmarks.evidence.table import table
from benchmarks.study import comparisons
from benchmarks.study.command import Study
from benchmarks.study.evidence import EARLY, INDICATORS, KeptWorld, ways
from benchmarks.study.figures import figures
from benchmarks.study.kept import CHEAP, COSTS
from benchmarks.study.sets import FAST, KINDS
from im_lightning import RequestError, RunLedger
from im_lightning.ledger.curve import OF_ITS_ROWS
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule

PER_ROW = ("loss_drop", "gradient_similarity")
TRUTH = dict(zip((*INDICATORS, *PER_ROW), (0.05, -0.2, 0.1, -0.1, 0.15, -0.1, 0.1), strict=True))


def losses_of(log_loss: float) -> dict[str, dict[str, float]]:
    return {
        kind: {"loss": float(np.exp(log_loss + 0.1 * k)), "base_loss": 2.0, "tokens": 900, "examples": 24}
        for k, kind in enumerate(KINDS)
    }


def kept_of(folder: Path, subsets: int) -> list[RunRecord]:
    """Kept runs under a linear truth, three of them repeats, seen after a fifth of their steps too; scoring costs."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(subsets + 3):
        subset = number % subsets
        phi = {name: float(v) for name, v in zip(TRUTH, np.random.default_rng(subset).normal(2, 0.3, 7), strict=True)}
        y = 0.5 + sum(TRUTH[name] * v for name, v in phi.items()) + 0.01 * rng.standard_normal()
        compute = {"parameters": 1e8, "tokens_trained": 50_000, "tokens_evaluated": 40_000}
        early = {**compute, "tokens_trained": 50_000 * 6 // 32, "tokens_evaluated": 20_000}
        seen = {"steps": 6, "seconds": 90.0, "tokens": 1000, "evaluation": losses_of(y / 2), "compute": early}
        seen |= {"indicator_means": phi, "phi_means": phi, "basis_means": {}, "source_phi_means": {}}
        curve = {"steps": 32, "points": [{**seen, "subset": dict.fromkeys(OF_ITS_ROWS)}]}
        records.append(make_record(
            number, phi, subset=subset, evaluation=losses_of(y), compute=compute, seconds=300.0, steps=32, curve=curve,
            seeds={"training": number // subsets}, regime={"evaluation_sets": dict.fromkeys(KINDS, "e" * 32)},
        ))  # fmt: skip
    folder.mkdir()
    lines = [json.dumps({"record": record.to_json()}) for record in records]
    (folder / "runs.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    parts = ("ppl_tuned", "gradients of the targets", "gradients", "gradient_similarity")
    noted = {"flops": dict.fromkeys(parts, 1e13), "seconds": dict.fromkeys(parts, 60.0)}
    (folder / COSTS).write_text(json.dumps(noted))
    return records


def test_halves_share_no_subset_and_repeats_are_in_neither(tmp_path: Path) -> None:
    kept_of(tmp_path / "kept", subsets=45)
    world = KeptWorld(tmp_path / "kept", tmp_path)
    bought, tested = ({r.subset_key for r in part} for part in (world.designed, world.tests))
    assert len(bought) == len(tested) == 22 and not bought & tested
    assert {r.seeds["training"] for r in (*world.designed, *world.tests)} == {0}
    again = KeptWorld(tmp_path / "kept", tmp_path)
    assert [r.run_id for r in again.designed] == [r.run_id for r in world.designed]


def test_every_way_spends_what_it_has_and_ranks_as_scipy_says(tmp_path: Path) -> None:
    kept_of(tmp_path / "kept", subsets=60)
    world, found = KeptWorld(tmp_path / "kept", tmp_path), ways(tmp_path / "kept", tmp_path)
    assert {"full runs", f"stopped at {EARLY}", "loss_drop alone", "with gradient_similarity"} <= set(found["cells"])
    assert not any("small" in way for way in found["cells"])
    assert {cell["why"] for cell in found["cells"]["merged runs"].values()} == {"the stage merged was not run"}
    run = 2e8 * (3 * 50_000 + 20_000)
    assert found["whole"] == pytest.approx({"flops": 30 * run, "seconds": 30 * 300.0})
    for way, cells in found["cells"].items():
        for share, cell in cells.items():
            if not cell["why"]:
                assert cell["flops"] <= float(share) * 1.001, f"{way}: {cell['what']}"
                varied = len(set(cell["predicted"])) > 1
                wanted = spearmanr(found["actual"], cell["predicted"]).statistic if varied else 0.0
                assert cell["spearman"] == pytest.approx(wanted)
    whole, drop = found["cells"]["full runs"]["1"], found["cells"]["loss_drop alone"]["1"]
    assert (whole["flops"], whole["seconds"]) == pytest.approx((1.0, 1.0)) and whole["spearman"] > 0.8
    left = int(30 - 1e13 / run)
    assert drop["what"] == f"scores, {left} full"
    assert drop["seconds"] == pytest.approx((left * 300 + 60) / (30 * 300))
    actual = np.log([np.mean([record.loss(kind) for kind in KINDS]) for record in world.tests])
    assert found["actual"] == pytest.approx(actual.tolist())
    text = table([found], 500)
    assert "TOO SMALL TO CONCLUDE" in text and "another design" not in text
    assert "30 full runs of the other half of the design" in text and "wall seconds" in text


def test_too_few_runs_make_no_table(tmp_path: Path) -> None:
    kept_of(tmp_path / "kept", subsets=39)
    with pytest.raises(
        RequestError, match=r"39 subsets are kept there, 40 are the least\. Fix: go on with the stage runs"
    ):
        KeptWorld(tmp_path / "kept", tmp_path)


def test_what_is_there_is_drawn_and_what_is_not_is_left_out(tmp_path: Path) -> None:
    """A study that is under way has the figures of its runs; nothing stands in for a comparison that was not made."""
    kept_of(tmp_path / "kept", subsets=20)
    (alone,) = figures(tmp_path / "kept", tmp_path)
    assert alone.name == "runs.png" and alone.read_bytes().startswith(b"\x89PNG")
    kept_of(tmp_path / "more", subsets=40)
    assert [path.name for path in figures(tmp_path / "more", tmp_path)] == ["runs.png", "ways.png"]
    assert (tmp_path / "more" / "runs.png").read_bytes() != alone.read_bytes()


def test_cheap_rules_are_of_a_fifth_of_sixty_runs_and_share_random_rows_of_the_same_indicators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without a prediction are in no arm, so under a rule of other indicators random rows are other runs."""
    records = kept_of(tmp_path / "numbers", 60)
    runs, merged, asked = RunLedger(tmp_path / "runs"), RunLedger(tmp_path / "merged"), list[tuple[str, ...]]()
    for ledger in (runs, merged):
        ledger.make()
        for record in records:
            ledger.add(record)
    fit_rule(records, indicators=["ppl"], evaluation="dolly", permutations=0, bootstrap=0).save(tmp_path / "rule.json")

    def command(self: Study, *arguments: str) -> None:
        asked.append(arguments)
        if arguments[0] == "refit":
            names = {"stopped": ["ppl"], "merged": ["mtld"]}[Path(arguments[1]).name]
            rule = fit_rule(records, indicators=names, evaluation="dolly", permutations=0, bootstrap=0)
            rule.save(arguments[arguments.index("--out") + 1])

    monkeypatch.setattr(Study, "command", command)
    study = Study(tmp_path, tmp_path, replace(FAST, rows=8 * records[0].steps), tmp_path / "kept")
    monkeypatch.setattr(comparisons, "take_over", lambda out, name, seeds, steps: asked.append(("took", name)))
    comparisons.cheap_stage(study)
    assert [one[0] for one in asked] == ["refit", "took", "compare", "refit", "compare"] and asked[1][1] == "stopped"
    refits, compared = ([one for one in asked if one[0] == name] for name in ("refit", "compare"))
    assert ["--at" in one for one in refits] == [True, False]
    for name, one in zip(CHEAP, compared, strict=True):
        assert one[one.index("--rule") + 1].endswith(f"rule-{name}.json")
        assert one[one.index("--ledger") + 1].endswith(f"/{name}")
    stopped = RunLedger(tmp_path / "stopped").records()
    spent, whole = sum(flops(r, EARLY) for r in stopped), sum(flops(r) for r in records[:60])
    assert 0.2 - flops(records[0], EARLY) / whole < spent / whole <= 0.2
    assert not any(r.seeds["training"] for r in stopped)
    comparisons.cheap_stage(study)
    assert [one[0] for one in asked[5:]] == ["took", "compare", "compare"], "a rule is fitted once"
