"""`scripts/benchmark_refit`: `fit_rule` on RegMix's public runs, beside LightGBM and plain least squares.

RegMix (arXiv 2407.01492) trained 512 models of 1M parameters on mixtures of 17 sources, and 256 each of 1M and 60M
parameters on other mixtures. Regressors are the shares of the sources, one left out. Rules are fitted on draws of the
512; the figure is Spearman's correlation of predicted and measured loss over the 256 of a size. `--picks` prints how
good a mixture the fit picks instead: its place among the 256 of 60M parameters. `--best-index` prints how well any
linear index of the shares could order them.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import status_of
from im_lightning._utils.progress import log
from im_lightning._utils.text_tables import Column, terminal_width, text_table
from im_lightning.errors import RequestError, message
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.mixture_law import fit_mixture_law
from im_lightning.rule.validation.cross_validation import rank_correlation

TARGET = "metric/the_pile_pile_cc_val_loss"
RUNS = (30, 60, 128, 512)
LAST = "the last source"
LIGHTGBM = {"num_iterations": 1000, "learning_rate": 1e-2, "seed": 42, "num_threads": 1, "verbosity": -1}
"""RegMix's own settings, but for its early stopping, which looked at the test runs."""


class Mixtures(NamedTuple):
    """Finetunes of one size: names [p] of the sources but the last, shares float64 [n, p], loss float64 [n] in nats."""

    sources: list[str]
    shares: np.ndarray
    loss: np.ndarray


def read(folder: Path, part: str, target: str) -> Mixtures:
    """The runs of one part: "train_…_1m", "test_…_1m" or "test_…_60m"."""
    kind, size = part.split("_")
    tables = []
    for what in ("mixture", "pile_loss"):
        file = folder / f"{kind}_{what}_{size}.csv"
        if not file.is_file():
            cause = "there is no such file"
            raise RequestError(message(str(file), cause, "give the folder of RegMix's csv files (regression data)"))
        lines = file.read_text(encoding="utf-8").splitlines()
        tables.append((lines[0].split(","), np.array([[float(v) for v in line.split(",")] for line in lines[1:]])))
    (names, mixtures), (columns, losses) = tables
    if target not in columns:
        cause = f"no such column; there are {', '.join(c for c in columns if c.startswith('metric/'))}"
        raise RequestError(message(f"--target {target}", cause, "name one of these"))
    row = {index: i for i, index in enumerate(losses[:, 0])}
    loss = losses[[row[index] for index in mixtures[:, 0]], columns.index(target)]
    return Mixtures([n.removeprefix("train_the_pile_") for n in names[1:-1]], mixtures[:, 1:-1], loss)


def records(runs: Mixtures, chosen: np.ndarray) -> list[RunRecord]:
    """The chosen runs as a ledger would hold them, with shares for indicators."""
    phi = {name: {"kind": "identity", "low": -np.inf, "high": np.inf} for name in runs.sources}
    return [
        RunRecord(
            run_id=f"mixture-{i}",
            status="complete",
            purpose="designed",
            created=f"2024-07-01T00:{i // 60 % 60:02}:{i % 60:02}Z",
            subset={"digest": str(i), "source_shares": _all_shares(runs, runs.shares[i])},
            phi_means=dict(zip(runs.sources, runs.shares[i].tolist(), strict=True)),
            transforms=phi,
            evaluation={TARGET: {"loss": float(runs.loss[i])}},
        )
        for i in chosen
    ]


def _all_shares(runs: Mixtures, shares: np.ndarray) -> dict[str, float]:
    """Source → share, the last one too."""
    return dict(zip([*runs.sources, LAST], [*shares.tolist(), 1.0 - float(shares.sum())], strict=True))


def _lightgbm(train: Mixtures, chosen: np.ndarray) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """{} where it is not installed: it is no dependency."""
    try:
        from lightgbm import LGBMRegressor
    except ImportError:
        return {}
    model = LGBMRegressor(**LIGHTGBM).fit(train.shares[chosen], train.loss[chosen])
    return {"LightGBM": lambda shares: np.asarray(model.predict(shares))}


def _rule(fitted: LinearRule) -> Callable[[np.ndarray], np.ndarray]:
    return lambda shares: np.array([fitted.predict_mean(row)[0] for row in shares])


def measure(folder: Path, target: str, counts: list[int], draws: int) -> str:
    """The table of mean correlations, and how often `auto` took which rule."""
    train, *tests = (read(folder, part, target) for part in ("train_1m", "test_1m", "test_60m"))
    rows = []
    for count in counts:
        found: dict[str, list[list[float | None]]] = {}
        taken: Counter[str] = Counter()
        each = draws if count < len(train.loss) else 1
        for draw in range(each):
            chosen = np.random.default_rng(draw).permutation(len(train.loss))[:count]
            runs = records(train, chosen)
            auto = fit_rule(runs, "auto", train.sources, permutations=0, bootstrap=0)
            taken[auto.method] += 1
            predictors = {"auto": _rule(auto), "least squares": _rule(fit_rule(runs, "ols", train.sources))}
            predictors |= _lightgbm(train, chosen)
            for name, predict in predictors.items():
                found.setdefault(name, []).append([rank_correlation(predict(t.shares), t.loss) for t in tests])
            log(f"{count} runs, draw {draw + 1} of {each}: auto took {auto.method}")
        for name, values in found.items():
            known = np.array(values, dtype=np.float64)
            constant = int(np.isnan(known).any(axis=1).sum())
            means = [f"{v:.3f}" for v in np.nanmean(known, axis=0)] if constant < len(known) else ["constant"] * 2
            took = ", ".join(f"{k} {n}" for k, n in taken.most_common()) if name == "auto" else ""
            rows.append([str(count), str(each), name, *means, took or (f"constant {constant}" if constant else "")])
    heads = [Column(name) for name in ("runs", "draws", "fitted by", "1M", "60M", "of them")]
    return text_table(heads, rows, terminal_width())


def measure_picks(folder: Path, target: str, counts: list[int], draws: int) -> str:
    """The places, by loss at 60M, of the mixtures that each fit predicts best; a tie has its mean place."""
    train, test = (read(folder, part, target) for part in ("train_1m", "test_60m"))
    place = np.argsort(np.argsort(test.loss)) + 1.0
    rows = []
    for count in counts:
        found: dict[str, list[float]] = {}
        for draw in range(draws):
            chosen = np.random.default_rng(draw).permutation(len(train.loss))[:count]
            runs = records(train, chosen)
            law = fit_mixture_law(runs, bootstrap=0)
            at = [([*test.sources, LAST]).index(name) for name in law.sources]
            every = np.column_stack([test.shares, 1.0 - test.shares.sum(axis=1)])[:, at]
            predicted = {"mixture law": np.asarray(law.log_loss(every))}
            predictors = {"least squares": _rule(fit_rule(runs, "ols", train.sources)), **_lightgbm(train, chosen)}
            predicted |= {name: predict(test.shares) for name, predict in predictors.items()}
            for name, values in predicted.items():
                found.setdefault(name, []).append(float(place[values == values.min()].mean()))
            picked = found["mixture law"][-1]
            log(f"{count} runs, draw {draw + 1} of {draws}: the law ({law.rule.method}) picks place {picked:g}")
        rows += [[str(count), str(draws), name, f"{np.mean(v):.1f}", f"{max(v):g}"] for name, v in found.items()]
    heads = [Column(name) for name in ("runs", "draws", "fitted by", "mean place", "worst")]
    return text_table(heads, rows, terminal_width())


def best_index(folder: Path, target: str, starts: int = 4, steps: int = 3000) -> str:
    """How well any law that is monotone in one linear index b·x can order the 256 runs of a size, its b looked for on
    these very runs: Adam on the correlation of smoothed ranks, from least squares and `starts` − 1 points around it.
    """
    import torch

    rows = []
    for part in ("test_1m", "test_60m"):
        runs = read(folder, part, target)
        x = torch.from_numpy(runs.shares)
        rank = torch.from_numpy(np.argsort(np.argsort(runs.loss)) / len(runs.loss))
        first = np.linalg.lstsq(np.column_stack([np.ones(len(x)), runs.shares]), np.log(runs.loss), rcond=None)[0][1:]
        found = []
        for seed in range(starts):
            away = np.random.default_rng(seed).standard_normal(len(first)) * first.std() / 2 * (seed > 0)
            b = torch.from_numpy(first + away).requires_grad_()
            optimiser = torch.optim.Adam([b], lr=0.02)
            for step in range(steps):
                index = x @ b
                index = (index - index.mean()) / index.std()
                sharp = 20.0 if step < steps // 2 else 60.0
                smooth = torch.sigmoid(sharp * (index[:, None] - index[None, :])).mean(dim=1)
                optimiser.zero_grad()
                (-torch.corrcoef(torch.stack([smooth, rank]))[0, 1]).backward()
                optimiser.step()
            found.append(rank_correlation(runs.shares @ b.detach().numpy(), runs.loss) or 0.0)
            log(f"{part}, start {seed + 1} of {starts}: {found[-1]:.3f}")
        rows.append([part.removeprefix("test_").upper(), f"{max(found):.3f}"])
    return text_table([Column("runs"), Column("Spearman, looked for on them")], rows, terminal_width())


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 2 for a wrong request."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark_refit", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="RegMix's csv files: train_mixture_1m.csv, train_pile_loss_1m.csv, …")
    parser.add_argument("--target", default=TARGET, help="column of the losses")
    parser.add_argument("--runs", type=int, nargs="+", default=list(RUNS), help="runs that a rule is fitted on")
    parser.add_argument("--draws", type=int, default=20, help="random draws of these runs, each a fit")
    parser.add_argument("--picks", action="store_true", help="the places of the mixtures that are picked instead")
    parser.add_argument("--best-index", action="store_true", help="how well any linear index could do, instead")
    given = parser.parse_args(argv)
    if given.best_index:
        return status_of("benchmark_refit", lambda: print(best_index(given.folder, given.target)) or 0)
    table = measure_picks if given.picks else measure
    return status_of("benchmark_refit", lambda: print(table(given.folder, given.target, given.runs, given.draws)) or 0)


if __name__ == "__main__":
    sys.exit(main())
