"""If these failed, weights would not have the mean indicators they claim: a rule would speak where it knows nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from im_lightning.errors import RequestError
from im_lightning.sampling.weights.tilting import Tilt, TiltProblem

CHEAP = settings(derandomize=True, deadline=None, max_examples=50, database=None)


def tilted(phi: ArrayLike, target: ArrayLike, base: ArrayLike | None = None) -> Tilt:
    """The weights closest to `base` whose mean regressors are `target`."""
    return TiltProblem(phi, base).solve(target)


@pytest.mark.parametrize("seed", range(4))
def test_it_solves_the_divergence_problem_that_scipy_solves_directly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    phi, base = rng.standard_normal((40, 3)), rng.dirichlet(np.full(40, 2.0))
    target = rng.dirichlet(np.full(40, 0.7)) @ phi
    tilt = tilted(phi, target, base)
    reference = minimize(
        lambda w: (w * np.log(np.maximum(w, 1e-300) / base)).sum(),
        base,
        jac=lambda w: np.log(np.maximum(w, 1e-300) / base) + 1,
        bounds=[(1e-12, 1)] * 40,
        constraints=[
            {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(40)},
            {"type": "eq", "fun": lambda w: phi.T @ w - target, "jac": lambda w: phi.T},
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    assert reference.success and tilt.converged
    assert tilt.weights == pytest.approx(reference.x, abs=1e-6)
    assert tilt.weights @ phi == pytest.approx(target, abs=1e-8)
    assert tilt.weights.sum() == pytest.approx(1.0)
    expected = base * np.exp(phi @ tilt.theta)
    assert tilt.weights == pytest.approx(expected / expected.sum(), rel=1e-9)


@CHEAP
@given(st.integers(0, 2**32), st.integers(1, 6), st.floats(0.05, 5.0), st.floats(1e-6, 1e6))
def test_any_target_inside_the_hull_is_reached_in_any_units(seed: int, p: int, spread: float, unit: float) -> None:
    rng = np.random.default_rng(seed)
    phi = rng.standard_t(3, size=(200, p)) * unit + 5 * unit
    target = rng.dirichlet(np.full(200, spread)) @ phi
    tilt = tilted(phi, target)
    assert tilt.converged and tilt.gap <= 1e-9 and tilt.unreachable < 1e-6
    assert tilt.weights @ phi == pytest.approx(target, rel=1e-6, abs=1e-6 * unit)


@CHEAP
@given(st.integers(0, 2**32), st.integers(1, 6), st.floats(1.001, 1e6))
def test_any_target_outside_the_hull_is_found_out(seed: int, p: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    phi = rng.standard_normal((100, p))
    direction = rng.standard_normal(p)
    direction /= np.linalg.norm(direction)
    target = direction * (phi @ direction).max() * factor  # beyond the farthest row along the direction
    tilt = tilted(phi, target)
    assert tilt.status == "infeasible" and tilt.iterations < 100
    assert np.isfinite(tilt.weights).all() and tilt.weights.sum() == pytest.approx(1.0)


def test_targets_at_the_very_edge_end_and_do_not_loop() -> None:
    phi = np.array([[0.0], [1.0], [1.0], [3.0]])
    for target in (3.0, 0.0, 3.0 - 1e-12):
        tilt = tilted(phi, [target])
        assert tilt.iterations <= 100 and tilt.weights @ phi == pytest.approx(target, abs=1e-6)
    assert not tilted(phi, [3.0001]).converged


def test_the_pools_own_mean_gives_the_base_weights() -> None:
    phi = np.random.default_rng(0).standard_normal((50, 2))
    tilt = tilted(phi, phi.mean(axis=0))
    assert tilt.weights == pytest.approx(np.full(50, 0.02)) and tilt.theta == pytest.approx(np.zeros(2), abs=1e-8)


def test_directions_in_which_the_pool_does_not_vary_are_left_out_and_reported() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal(300)
    phi = np.column_stack([a, 1e6 * a, np.full(300, 0.1)])  # a copy in other units, and a constant
    tilt = tilted(phi, phi.mean(axis=0) + np.array([0.5, 0.5e6, 0.0]))
    assert tilt.converged and tilt.unreachable < 1e-6
    tilt = tilted(phi, phi.mean(axis=0) + np.array([0.5, 0.5e6, 0.05]))
    assert tilt.converged and tilt.unreachable == pytest.approx(0.5, rel=1e-6)
    assert (tilt.weights @ phi)[0] == pytest.approx(phi[:, 0].mean() + 0.5)
    assert tilted(np.ones((4, 2)), [1.0, 1.0]).weights == pytest.approx(np.full(4, 0.25))


def test_the_coordinate_along_a_direction_has_unit_variance() -> None:
    rng = np.random.default_rng(0)
    phi = rng.standard_normal((400, 3)) @ np.array([[1.0, 0.9, 0.0], [0.0, 0.4, 0.2], [0.0, 0.0, 30.0]])
    problem = TiltProblem(phi)
    u, v = problem.along([1.0, 0.0, 0.0]), problem.along([0.0, 2.0, 0.0])
    assert u.mean() == pytest.approx(0, abs=1e-12) and u.var() == pytest.approx(1) and v.var() == pytest.approx(1)
    assert np.mean(u * v) == pytest.approx(0, abs=1e-9)
    assert TiltProblem(np.ones((4, 2))).along([1.0, 0.0]).tolist() == [0.0] * 4


def test_regressors_and_base_weights_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(RequestError, match=r"a missing value in row 1.*leave such rows out"):
        tilted([[1.0], [np.nan]], [1.0])
    with pytest.raises(RequestError, match=r"shape \(2,\)"):
        tilted([1.0, 2.0], [1.0])
    for base in ([1.0], [0.0, 0.0], [-1.0, 2.0], [np.nan, 1.0]):
        with pytest.raises(RequestError, match="one non-negative weight per row"):
            tilted([[1.0], [2.0]], [1.5], base)
