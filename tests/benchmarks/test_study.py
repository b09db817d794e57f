"""The study's sets share no prompt, are the same for everybody, and are never drawn again over what is there."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from simulated_ledger import make_record, simulate
from statsmodels.stats.multitest import multipletests

from benchmarks.study import comparisons, stages
from benchmarks.study.__main__ import main
from benchmarks.study.command import INDICATORS, Study
from benchmarks.study.kept import _PATH, BESIDE, CHEAP, KEPT, LEDGERS, keep, kept_runs, restore, take_over
from benchmarks.study.sets import FAST, KINDS, POOL, Sizes, split
from benchmarks.study.stages import BEGIN, END, _sweep_the_rest, around
from benchmarks.study.tables import TESTED, cells, family, losses, markdown, multipliers
from im_lightning import InstructMiningError, LinearRule, RunLedger, load_examples
from im_lightning._utils.force import accepted
from im_lightning.indicators.transforms import default_regressors
from im_lightning.ledger.record import MERGED
from im_lightning.rule.fit import fit_rule

SMALL = replace(FAST, unopened=0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of 60 rows; every fifth prompt is in two of them, once with a capital and a full stop."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for k, source in enumerate(sorted({*KINDS, *POOL})):
        rows = []
        for i in range(60):
            shared = i % 5 == 0
            text = f"shared task {i}" if shared and k % 2 else f"Shared task {i}." if shared else f"{source} task {i}"
            rows.append({"id": f"{source}-{i}", "instruction": text, "input": "", "output": f"answer {i} of {source}"})
        with gzip.open(folder / f"{source}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_no_prompt_is_in_two_sets(data: Path, tmp_path: Path) -> None:
    counts = split(data, tmp_path / "out", SMALL)
    prompts = []
    for name, of in counts.items():
        examples = load_examples(tmp_path / "out" / f"{name}.jsonl")
        assert len(examples) == sum(of.values())
        prompts += [example.prompt.casefold().rstrip(".") for example in examples]
    assert len(set(prompts)) == len(prompts)
    assert counts["verdict"] == dict.fromkeys(sorted(KINDS), SMALL.verdict)
    assert set(counts["pool"]) == set(POOL) and "seed_tasks" not in counts["pool"]


def test_sets_are_the_same_for_everybody_and_kept(data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        split(data, tmp_path / name, SMALL)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*.jsonl"))]
    assert len(files) == 4 + 2 * len(KINDS)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    (tmp_path / "a" / "pool.jsonl").write_text("mine\n")
    split(data, tmp_path / "a", SMALL)
    assert (tmp_path / "a" / "pool.jsonl").read_text() == "mine\n"


def test_a_file_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "alpaca.jsonl.gz: there is no such file. Fix: give the folder of alpaca.jsonl.gz" in said


def test_a_trial_sees_no_row_that_the_study_is_judged_by(data: Path, tmp_path: Path) -> None:
    judged = replace(SMALL, verdict=5)
    split(data, tmp_path / "study", judged)
    split(data, tmp_path / "trial", replace(SMALL, unopened=judged.verdict))
    opened = {example.prompt for example in load_examples(tmp_path / "study" / "verdict.jsonl")}
    for file in (tmp_path / "trial").rglob("*.jsonl"):
        assert not opened & {example.prompt for example in load_examples(file)}, file.name
    assert FAST.unopened == Sizes().verdict


def compared(out: Path, seeds: int = 4) -> np.ndarray:
    """A comparison's ledger with five examples of each kind; summed nats [arm, seed, example]."""
    (out / "data").mkdir(parents=True)
    rows = [{"instruction": f"{kind} {i}", "output": "yes", "source": kind} for kind in KINDS for i in range(5)]
    (out / "data" / "verdict.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [example.id for example in load_examples(out / "data" / "verdict.jsonl")]
    ledger, rng = RunLedger(out / "compare" / "ledger"), np.random.default_rng(0)
    ledger.make()
    arms = ["random", *TESTED["random"]]
    sums = rng.gamma(20.0, 1.0, (len(arms), 1, 25)) + rng.normal(0, 0.1, (len(arms), seeds, 25))
    for a, arm in enumerate(arms):
        for seed in range(seeds):
            subset = {"arm": arm, "seed": seed, "digest": f"{arm}{seed}", "size": 3}
            record = make_record(a * seeds + seed, purpose="compare", subset=None)
            record.subset, record.loggers = subset, {"TrialLogger": "/home/me/trial"}
            ledger.add_losses(record.run_id, "verdict", ids, sums[a, seed], [10] * 25, sums[a, seed] / 4, [2] * 25)
            ledger.add(record)
    return sums


def test_what_is_kept_holds_numbers_and_comes_back(tmp_path: Path) -> None:
    """Kept twice it is the same file; in another folder the same runs and losses; nobody's paths; never fewer runs."""
    compared(tmp_path / "a")
    for _ in range(2):
        keep(tmp_path / "a", tmp_path / "kept")
        first = (tmp_path / "kept" / "compare.jsonl.gz").read_bytes()
    assert b"/home" not in gzip.decompress(first)
    restore(tmp_path / "b", tmp_path / "kept")
    ledgers = [RunLedger(tmp_path / name / "compare" / "ledger") for name in "ab"]
    (old, new) = (list(ledger.records()) for ledger in ledgers)
    assert [r.subset for r in new] == [r.subset for r in old] and len(new) == 20
    for record in old:
        was, now = (ledger.losses(record.run_id)["verdict"] for ledger in ledgers)
        assert was.ids == now.ids and was.counts.tolist() == now.counts.tolist()
        np.testing.assert_allclose(now.edge_sums, was.edge_sums, rtol=1e-6)
    (tmp_path / "b" / "compare" / "ledger" / f"{old[0].run_id}.json").unlink()
    keep(tmp_path / "b", tmp_path / "kept")
    assert len(kept_runs("compare", tmp_path / "kept")) == 20
    assert (tmp_path / "kept" / "compare.jsonl.gz").read_bytes() == first


def test_the_repository_keeps_no_text_and_no_path() -> None:
    """Of rows digests alone; the sources' licences do not allow more."""
    for file in KEPT.glob("*"):
        if file.suffix == ".png":  # drawn from the others
            continue
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            texts = {
                name: set(table[name].to_pylist()) for name in table.column_names if str(table[name].type) == "string"
            }
            assert texts.pop("source") <= set(POOL) and all(len(id) == 32 for id in texts.pop("id"))
            assert all(values <= {None} or name.endswith("reason") for name, values in texts.items()), list(texts)
        else:
            text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
            assert not _PATH.search(text), file.name


def test_a_path_is_never_kept(tmp_path: Path) -> None:
    (tmp_path / "rate.json").write_text('{"rate": 0.001, "file": "/home/me/rows.jsonl"}')
    with pytest.raises(InstructMiningError, match=r"rate.json: it holds a path: .*/home/.*Fix: numbers alone are kept"):
        keep(tmp_path, tmp_path / "kept")
    assert not (tmp_path / "kept" / "rate.json").exists()


def test_the_tests_are_those_of_the_plan(tmp_path: Path) -> None:
    """Thirty, differences by kind of summed nats over tokens, p by Holm over all thirty (statsmodels)."""
    sums = compared(tmp_path / "out")
    keep(tmp_path / "out", tmp_path / "kept")
    measured = cells(tmp_path / "kept")
    found = family(measured)
    assert len(found) == 30
    arms = ["random", *TESTED["random"]]
    for (kind, arm, reference), (one, _) in found.items():
        at = [k == kind for k in np.repeat(KINDS, 5)]
        wanted = (sums[arms.index(arm)][:, at] - sums[arms.index(reference)][:, at]).sum(1).mean() / 50
        assert one.difference == pytest.approx(wanted, abs=1e-5)
    holm = multipletests([one.p for one, _ in found.values()], method="holm")[1]
    assert [p for _, p in found.values()] == pytest.approx(holm.tolist())
    whole, inner = losses(measured), losses(measured, inner=True)
    assert inner["mix"]["lima"] == pytest.approx(whole["mix"]["lima"] * 10 * 0.75 / 8, rel=1e-5)
    page = markdown(tmp_path / "kept", tmp_path)
    assert (*comparisons.BESIDE, *CHEAP) == BESIDE and "Beside it" not in page
    (tmp_path / "kept" / "compare-arms.jsonl.gz").write_bytes((tmp_path / "kept" / "compare.jsonl.gz").read_bytes())
    gap = whole["mix"]["lima"] - whole["random"]["lima"]
    beside = markdown(tmp_path / "kept", tmp_path).split("### Beside it: arms")[1]
    assert f"| mix | {gap:+.4f} |" in beside
    assert (
        "UNDER WAY: 4 of 10 seeds" in page
        and "Holm p of 30" in page
        and "0 runs are kept" in page
        and page.count("\n| lima | ") == 6
    )


def test_an_arm_as_good_as_twice_the_random_rows_is_worth_two(tmp_path: Path) -> None:
    """Random rows at half to four times the steps are points of a curve, by kind, and not seeds of one arm."""
    out, rng = tmp_path / "out", np.random.default_rng(0)
    (out / "data").mkdir(parents=True)
    rows = [{"instruction": f"{kind} {i}", "output": "yes", "source": kind} for kind in KINDS for i in range(20)]
    (out / "data" / "verdict.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [example.id for example in load_examples(out / "data" / "verdict.jsonl")]
    ledger, hard = RunLedger(out / "compare-curve" / "ledger"), rng.gamma(20.0, 1.0, 100)
    ledger.make()
    cases = [("random", scale, 1 - 0.05 * np.log2(scale)) for scale in (0.5, 1.0, 2.0, 4.0)]
    for number, (arm, scale, level) in enumerate([*cases, ("weighted", 1.0, 0.95)] * 3):
        subset = {"arm": arm, "seed": number // 5, "digest": f"d{number}", "size": 3}
        record = make_record(number, purpose="compare", subset=None, steps=int(32 * scale))
        record.subset = subset
        ledger.add_losses(
            record.run_id, "verdict", ids, level * hard + rng.normal(0, 0.2, 100), [10] * 100, hard / 4, [2] * 100
        )
        ledger.add(record)
    keep(out, tmp_path / "kept")
    measured = cells(tmp_path / "kept", "compare-curve")
    assert set(measured.sums) == {"random 0.5×", "random", "random 2×", "random 4×", "weighted"}
    worth = [multipliers(measured)[kind, "weighted"] for kind in KINDS]
    for one in worth:
        assert one.value == pytest.approx(2.0, rel=0.2) and one.low <= 2 <= one.high
    line = " | ".join(["weighted", *(f"{one.text} ({one.interval})" for one in worth)])
    assert f"| {line} |" in markdown(tmp_path / "kept", tmp_path).split("### Beside it: curve")[1]


def test_restored_runs_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that is begun in another folder leaves out what is kept; one that is under way stays as it is."""
    study, swept = Study(tmp_path, tmp_path, FAST, tmp_path / "kept"), []
    monkeypatch.setattr(Study, "command", lambda self, *arguments: swept.append(arguments))
    values = [f"{{seed_everything: {s}, data: {{subset_seed: {k}, seed: {s}}}}}" for s, k in ((0, 7), (0, 9), (1, 7))]
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({"method": "grid", "parameters": {"config": {"values": values}}}))

    def sweep(*made: tuple[int, int]) -> None:
        _sweep_the_rest(study, "sweep.yaml", lambda o: (o["data"]["subset_seed"], o["seed_everything"]), set(made))

    with pytest.raises(
        InstructMiningError, match=r"1 of the runs .* are none of its 3, the first is \(8, 0\)\. Fix: score"
    ):
        sweep((7, 0), (8, 0))
    sweep((7, 0))
    assert yaml.safe_load(file.read_text())["parameters"]["config"]["values"] == values[1:]
    sweep((9, 0), (7, 1))
    assert len(swept) == 1, "nothing is left"
    (tmp_path / "sweeps" / "sweep").mkdir(parents=True)
    sweep()
    assert len(swept) == 2 and yaml.safe_load(file.read_text())["parameters"]["config"]["values"] == values[1:]


@pytest.mark.parametrize("sizes", [Sizes(), FAST])
def test_blocks_and_mixtures_are_enough_for_the_regressors(sizes: Sizes) -> None:
    """`design --kind merged` refuses fewer, after a day of other stages."""
    least = len(default_regressors(INDICATORS.split(","))) + 3
    assert min(sizes.blocks, sizes.mixtures) >= least and sizes.blocks * sizes.rows < 0.95 * sizes.pool


def test_every_comparison_is_on_the_whole_pool_and_takes_the_rule_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself three seeds would have a third of the rows each, and ten all of them: other arms, another curve."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(Study, "command", lambda self, *arguments: asked.append(arguments))
    RunLedger(tmp_path / "runs").make()
    RunLedger(tmp_path / "runs").add(make_record(0))
    study = Study(tmp_path, tmp_path, FAST, tmp_path / "kept")
    for stage in (stages.refit_stage, stages.compare_stage, stages.beside_stage):
        stage(study)
    compared = [one for one in asked if one[0] == "compare"]
    assert len(compared) == 1 + len(comparisons.BESIDE)
    assert all(one[one.index("--pool-draw") + 1] == "same" for one in compared)
    for one in (*compared, *(one for one in asked if one[0] == "mix")):
        (word,) = [part for part in one if part.startswith("--force")]
        assert accepted(word.partition("=")[2]) == {"weak-rule", "worse-target"}
    names = [one[0] for one in asked]
    diverse = next(k for k, one in enumerate(asked) if any("diverse" in part for part in one))
    assert names.index("score") < diverse, "the arm's vectors may be gone with the store"
    (everything,) = [one for one in compared if one[-1].endswith("compare-everything")]
    assert everything[everything.index("--seeds") + 1] == "1"


def test_a_rule_belongs_to_its_runs_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept runs have no loggers; were they in the rule's digest, a comparison would be made again in another folder."""
    a, b, asked = tmp_path / "a", tmp_path / "b", list[str]()
    ledger = RunLedger(a / "runs")
    ledger.make()
    for record in simulate(24):
        record.loggers = {"TrialLogger": "trial 0"}
        ledger.add(record)

    def command(self: Study, *arguments: str) -> None:
        asked.append(arguments[0])
        if arguments[0] == "refit":
            fit_rule(RunLedger(self.out / "runs").records(), permutations=0, bootstrap=0).save(self.out / "rule.json")
        else:
            (self.out / "mix.json").write_text("{}")

    monkeypatch.setattr(Study, "command", command)
    stages.refit_stage(Study(a, a, FAST, tmp_path / "kept"))
    keep(a, tmp_path / "kept")
    b.mkdir()
    restore(b, tmp_path / "kept")
    stages.refit_stage(Study(b, b, FAST, tmp_path / "kept"))
    assert asked == ["refit", "mix"]
    assert LinearRule.load(b / "rule.json").ledger_digest_ == RunLedger.digest(RunLedger(b / "runs").records())


def test_restored_runs_can_be_repeated_and_are_the_same_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transfer` reads a run's arguments beside it, which are not kept; and a path in them would be another run."""
    monkeypatch.setattr(Study, "command", lambda self, *arguments: None)
    texts = []
    for name in ("a", "b"):
        out, record = tmp_path / name, make_record(3, seeds={"training": 1, "data": 1, "subset": 3})
        record.subset = {**record.subset, "seed": 3, "size": 16, "tilt": 1.0, "version": 2}
        ledger = RunLedger(out / "runs")
        ledger.make()
        ledger.add(record)
        (out / "rate.json").write_text('{"rate": 0.001}')
        stages.transfer_stage(Study(tmp_path, out, FAST, out / "kept"))
        texts.append((ledger.path / f"{record.run_id}.config.yaml").read_text())
    assert texts[0] == texts[1] and str(tmp_path) not in texts[0]
    value = yaml.safe_load(texts[0])
    assert (value["seed_everything"], value["data"]["seed"], value["data"]["subset_seed"]) == (1, 1, 3)
    assert value["data"]["eval_data"]["lima"] == "data/fit/lima.jsonl" and value["model"]["learning_rate"] == 0.001
    assert "eval_at" not in value["mining"]


def test_two_runs_of_one_arm_and_seed_are_refused(tmp_path: Path) -> None:
    """Of two rules, say: one of them would go into the table without a word."""
    compared(tmp_path / "out")
    ledger = RunLedger(tmp_path / "out" / "compare" / "ledger")
    one = next(r for r in ledger.records() if r.subset["arm"] == "mix")
    held = ledger.losses(one.run_id)["verdict"]
    ledger.add_losses("run-999", "verdict", held.ids, held.sums, held.counts, held.edge_sums, held.edge_counts)
    ledger.add(replace(one, run_id="run-999"))
    keep(tmp_path / "out", tmp_path / "kept")
    with pytest.raises(InstructMiningError, match=r"two runs of mix, seed \d: of another rule"):
        cells(tmp_path / "kept")


def test_a_comparison_takes_the_runs_that_another_has_made(tmp_path: Path) -> None:
    """Those of its seeds, arms and steps, with the losses of each example; and none twice."""
    compared(tmp_path / "out")
    ledgers = {name: RunLedger(tmp_path / "out" / folder) for name, folder in LEDGERS.items()}
    steps = ledgers["compare"].records()[0].steps
    longer = replace(ledgers["compare"].records()[0], run_id="run-998", steps=4 * steps)
    ledgers["compare-curve"].make()
    held = ledgers["compare"].losses(ledgers["compare"].records()[0].run_id)["verdict"]
    ledgers["compare-curve"].add_losses(longer.run_id, "verdict", held.ids, held.sums, held.counts)
    ledgers["compare-curve"].add(longer)
    wanted = {"arms": 3, "curve": 9, "fourfold": 1, "everything": 1, "all-weights": 0, "stopped": 3, "merged": 3}
    for name in BESIDE:
        seeds = 1 if name == "everything" else 3
        assert len(take_over(tmp_path / "out", name, seeds, steps)) == wanted[name], name
        assert not take_over(tmp_path / "out", name, seeds, steps)
    for record in ledgers["compare-arms"].records():
        assert record.subset["arm"] == "random" and record.subset["seed"] < 3
        was, now = (ledgers[name].losses(record.run_id)["verdict"] for name in ("compare", "compare-arms"))
        assert was.ids == now.ids and was.sums.tolist() == now.sums.tolist()
    assert {r.subset["arm"] for r in ledgers["compare-curve"].records()} == {"random", "by-source", "weighted"}
    (four,) = ledgers["compare-fourfold"].records()
    assert four == longer


def test_merged_runs_are_kept_once_all_are_there(tmp_path: Path) -> None:
    """The adapters of their blocks are not kept, without which the rest cannot be made."""
    ledger = RunLedger(tmp_path / "out" / "merged")
    ledger.make()
    for number in range(3):
        kept = keep(tmp_path / "out", tmp_path / "kept", mixtures=2)
        assert kept is None and len(kept_runs("merged", tmp_path / "kept")) == 0
        made = {"kind": MERGED, "alpha": {"a": 1.0}, "s": 1.0, "blocks": {}} if number else {}
        ledger.add(make_record(number, made=made))
    keep(tmp_path / "out", tmp_path / "kept", mixtures=2)
    assert len(kept_runs("merged", tmp_path / "kept")) == 3


def test_the_base_stands_beside_the_arms(tmp_path: Path) -> None:
    """It has one run and no seed: in the table of losses, and in no test."""
    compared(tmp_path / "out")
    ledger = RunLedger(tmp_path / "out" / "compare" / "ledger")
    held = ledger.losses(ledger.records()[0].run_id)["verdict"]
    record = make_record(900, purpose="compare", subset=None)
    record.subset = {"kind": "untouched base", "arm": "base", "key": "k", "size": 0, "rows": []}
    ledger.add_losses(record.run_id, "verdict", held.ids, [20.0] * 25, [10] * 25, [4.0] * 25, [2] * 25)
    ledger.add(record)
    keep(tmp_path / "out", tmp_path / "kept")
    page = markdown(tmp_path / "kept", tmp_path)
    assert page.count("| base | 2.0000 | 2.0000 |") == 2 and len(family(cells(tmp_path / "kept"))) == 30


@pytest.mark.slow
def test_the_page_has_the_tables_of_what_is_kept(tmp_path: Path) -> None:
    """Runs that were kept and not told would leave the page behind its numbers."""
    before, after = around(page := KEPT.with_name("study.md").read_text(encoding="utf-8"))
    text = markdown(KEPT, tmp_path)
    assert page == f"{before}{BEGIN}\n\n{text}\n{END}{after}"
    runs = len(kept_runs("runs"))
    assert f"{runs} of {Sizes().runs} designed runs" in KEPT.parents[1].joinpath("README.md").read_text(
        encoding="utf-8"
    )


def test_only_what_is_between_the_marks_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's own words stay; a page that is not there yet is begun."""
    compared(tmp_path / "out")
    study = Study(tmp_path, tmp_path / "out", FAST, tmp_path / "page" / "kept")
    stages.tables_stage(study)
    page = tmp_path / "page" / "study.md"
    tables = page.read_text()
    assert tables.startswith("# Tables of the study\n") and "Holm p of 30" in tables
    page.write_text(f"# Mine\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    stages.tables_stage(study)
    assert page.read_text() == f"# Mine\n\n{BEGIN}{tables.partition(BEGIN)[2].rstrip()}\n\nThe end.\n"
