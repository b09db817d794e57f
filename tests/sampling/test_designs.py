"""If these failed, designed runs could not be made again, or a rule fitted on them would rest on no evidence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from im_lightning.errors import RequestError
from im_lightning.rule.validation.diagnostics import condition_number, variance_inflation
from im_lightning.sampling.designs.subsets import designed_subset

RUNS, SIZE, P = 48, 200, 6


def make_pool(rows: int = 5000, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Correlated, heavy-tailed, clipped indicators in four sources of unequal size with means of their own."""
    rng = np.random.default_rng(seed)
    phi = rng.standard_t(4, size=(rows, P)) / np.sqrt(2)
    phi[:, 1] = 0.9 * phi[:, 0] + np.sqrt(1 - 0.81) * phi[:, 1]
    phi[:, 3] = -0.9 * phi[:, 2] + np.sqrt(1 - 0.81) * phi[:, 3]
    source = rng.choice(4, rows, p=[0.5, 0.3, 0.15, 0.05])
    phi += 0.7 * rng.standard_normal((4, P))[source]
    low, high = np.quantile(phi, [0.005, 0.995], axis=0)
    return np.clip(phi, low, high) * [1, 1, 50, 1, 0.01, 1], [f"source-{s}" for s in source]


PHI, SOURCES = make_pool()
NAMES = np.array(SOURCES)


def quality_of(designs: list[np.ndarray]) -> tuple[float, float, float]:
    """Condition number, largest VIF and geometric mean standard error (noise sd 1, per pool sd) of the run means."""
    means = np.array([PHI[rows].mean(axis=0) for rows in designs]) / PHI.std(axis=0)
    centred = means - means.mean(axis=0)
    errors = np.sqrt(np.diag(np.linalg.inv(centred.T @ centred)))
    return condition_number(means), float(variance_inflation(means).max()), float(np.exp(np.log(errors).mean()))


def test_the_seed_alone_decides_and_no_row_comes_twice() -> None:
    one, same = (designed_subset(PHI, SOURCES, SIZE, 7) for _ in range(2))
    other = designed_subset(PHI, SOURCES, SIZE, 8)
    assert one.rows.tolist() == same.rows.tolist() and one.design == same.design
    assert one.rows.tolist() != other.rows.tolist()
    assert len(np.unique(one.rows)) == SIZE == len(one.rows) and one.rows.dtype == np.int64
    assert json.loads(json.dumps(one.design)) == one.design


def test_rows_come_in_random_order_and_not_source_by_source() -> None:
    rows = designed_subset(PHI, SOURCES, SIZE, 7).rows
    shares = np.unique(NAMES[rows], return_counts=True)[1] / SIZE
    same = np.mean(NAMES[rows[1:]] == NAMES[rows[:-1]])
    assert same == pytest.approx((shares**2).sum(), abs=4 * np.sqrt(0.25 / SIZE))


def test_shares_are_dirichlet_with_a_source_left_out_in_a_quarter_of_the_runs() -> None:
    designs = [designed_subset(PHI[:1000], SOURCES[:1000], 20, seed, subset_tilt=0.0).design for seed in range(400)]
    dropped = [d for d in designs if d["dropped"] is not None]
    assert abs(len(dropped) - 100) <= 4 * np.sqrt(400 * 0.25 * 0.75)
    assert all(d["shares_wanted"][d["dropped"]] == 0 for d in dropped)
    assert {d["dropped"] for d in dropped} == set(SOURCES)
    shares = np.array([list(d["shares_wanted"].values()) for d in designs if d["dropped"] is None])
    assert shares.sum(axis=1) == pytest.approx(np.ones(len(shares)))
    assert shares.mean(axis=0) == pytest.approx(np.full(4, 0.25), abs=4 * 0.194 / np.sqrt(300))
    assert shares.var() == pytest.approx(3 / 80, rel=0.15)  # of a Dirichlet(1, 1, 1, 1) component


def test_new_designs_leave_out_several_sources_and_old_seeds_keep_their_rows() -> None:
    """A rule is tested on a source from the runs without it, which a quarter of the runs would not give them all."""
    drawn = [designed_subset(PHI[:1000], SOURCES[:1000], 20, s, None, 0.0, version=2).design for s in range(400)]
    shares = np.array([list(d["shares_wanted"].values()) for d in drawn])
    assert shares.sum(axis=1) == pytest.approx(np.ones(400))
    missing = (shares == 0).sum(axis=1)
    error = 4 * np.sqrt(400 / 4)
    assert abs((missing == 0).sum() - 200) <= error and set(missing.tolist()) == {0, 1, 2, 3}
    assert (np.abs((shares == 0).sum(axis=0) - 100) <= error).all() and ((shares >= 0.5).sum(axis=0) > 40).all()
    assert all(d["version"] == 2 and len((d["dropped"] or "").split(", ")) == max(k, 1)
               for d, k in zip(drawn, missing, strict=True))  # fmt: skip
    old = designed_subset(PHI, SOURCES, SIZE, 7)
    assert old.design["version"] == 1 and old.rows[:5].tolist() == [593, 567, 547, 864, 1537]
    with pytest.raises(RequestError, match=r"subset_version=3: there is no such draw\. Fix: pass 1 or 2"):
        designed_subset(PHI, SOURCES, SIZE, 7, version=3)


def test_realised_shares_are_the_wanted_ones_up_to_a_row() -> None:
    design = designed_subset(PHI, SOURCES, SIZE, 3, {"source-0": 1, "source-1": 3}).design
    assert design["source_shares"] == {"source-0": 0.25, "source-1": 0.75, "source-2": 0.0, "source-3": 0.0}
    assert design["mixture"] == {"source-0": 1.0, "source-1": 3.0} and design["dropped"] is None
    rows = designed_subset(PHI, SOURCES, SIZE, 3, {"source-0": 1, "source-1": 3}).rows
    assert np.sum(NAMES[rows] == "source-1") == 150
    for seed in range(20):
        design = designed_subset(PHI, SOURCES, SIZE, seed).design
        for name, wanted in design["shares_wanted"].items():
            if not design["deficit"]:
                assert abs(design["source_shares"][name] - wanted) <= 1 / SIZE


def test_a_short_sources_deficit_goes_to_the_others_and_is_recorded() -> None:
    short = int(np.sum(NAMES == "source-3"))
    mixture = {"source-3": 0.8, "source-1": 0.1, "source-0": 0.1}
    result = designed_subset(PHI, SOURCES, 500, 0, mixture)
    assert result.design["deficit"] == {"source-3": 400 - short}
    counts = {name: int(np.sum(NAMES[result.rows] == name)) for name in set(SOURCES)}
    assert counts["source-3"] == short and counts["source-2"] == 0 and abs(counts["source-0"] - counts["source-1"]) <= 1
    alone = designed_subset(PHI, SOURCES, 500, 0, {"source-3": 1.0})  # nobody else has a share: then all help
    assert len(np.unique(alone.rows)) == 500 and alone.design["source_shares"]["source-0"] > 0
    whole = designed_subset(PHI, SOURCES, len(PHI), 0, subset_tilt=8.0)
    assert sorted(whole.rows) == list(range(len(PHI)))


def test_the_tilt_moves_the_means_along_its_direction() -> None:
    z = np.random.default_rng(1).standard_normal((20_000, 3))
    for seed in range(3):
        subset = designed_subset(z, ["a"] * len(z), 2000, seed, subset_tilt=0.8)
        moved = np.array(subset.design["mean_shift"])
        # Gaussian and whitened: the mean moves by the tilt along the direction, and not otherwise
        assert moved == pytest.approx(0.8 * np.array(subset.design["direction"]), abs=0.12)
    assert np.abs(designed_subset(z, ["a"] * len(z), 2000, 0, subset_tilt=0.0).design["mean_shift"]).max() < 0.09


def test_designs_identify_coefficients_that_random_subsets_and_mixtures_do_not() -> None:
    rng = np.random.default_rng(0)
    random = quality_of([rng.permutation(len(PHI))[:SIZE] for _ in range(RUNS)])
    mixtures = quality_of([designed_subset(PHI, SOURCES, SIZE, s, subset_tilt=0.0).rows for s in range(RUNS)])
    designed = quality_of([designed_subset(PHI, SOURCES, SIZE, s).rows for s in range(RUNS)])
    # Measured (condition number, largest VIF, error): random 4.8, 4.6, 3.55; mixtures 16.9, 37.5, 2.70; designed 4.3,
    # 3.6, 0.79. Random means are no more collinear than rows are, but they hardly differ: their errors show it.
    assert random[2] / designed[2] > 4
    assert mixtures[2] / designed[2] > 2
    assert mixtures[0] / designed[0] > 1.5
    assert designed[0] < 10 and designed[1] < 15


def test_rows_that_lack_a_regressor_or_are_not_eligible_are_never_drawn() -> None:
    phi = PHI.copy()
    phi[:2000, 0] = np.nan
    eligible = np.arange(len(PHI)) < 4000
    subset = designed_subset(phi, SOURCES, 1500, 0, eligible=eligible)
    assert subset.rows.min() >= 2000 and subset.rows.max() < 4000 and subset.design["eligible"] == 2000


def test_one_source_and_no_regressors_still_make_a_subset() -> None:
    subset = designed_subset(np.empty((50, 0)), ["only"] * 50, 10, 0)
    assert len(np.unique(subset.rows)) == 10 and subset.design["dropped"] is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"subset_size": 0}, "subset_size=0: 5000 of 5000 rows can be drawn"),
        ({"subset_size": 5001}, "choose a size from 1 to 5000"),
        ({"subset_tilt": -1.0}, "subset_tilt=-1.0"),
        ({"subset_tilt": float("nan")}, "subset_tilt=nan"),
        ({"subset_seed": -1}, "seed=-1"),
        ({"subset_mixture": {"books": 1.0}}, "there are no rows of books.*source-0, source-1"),
        ({"subset_mixture": {"source-0": -1.0}}, "not numbers from 0 on"),
        ({"subset_mixture": {"source-0": 0.0}}, "give positive shares"),
        ({"sources": ["a"]}, "and 1 sources"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(options: dict, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(RequestError, match=text):
        designed_subset(**({"phi": PHI, "sources": SOURCES, "subset_size": SIZE, "subset_seed": 0} | options))
