"""The parameters of a wandb sweep file: their forms, checked, and the value each takes at a quantile.

A parameter is a set of choices (`value`, `values`) or a distribution. Every distribution is used through its inverse
cumulative distribution function, so that random search draws one uniform number per parameter, and TPE searches the
unit cube, whatever the distributions are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from im_lightning.errors import RequestError, message

_NUMBERS: dict[str, dict[str, float | None]] = {  # distribution → its keys, with their defaults (None: required)
    "uniform": {"min": None, "max": None},
    "int_uniform": {"min": None, "max": None},
    "q_uniform": {"min": None, "max": None, "q": 1},
    "log_uniform": {"min": None, "max": None},
    "log_uniform_values": {"min": None, "max": None},
    "q_log_uniform": {"min": None, "max": None, "q": 1},
    "q_log_uniform_values": {"min": None, "max": None, "q": 1},
    "inv_log_uniform": {"min": None, "max": None},
    "inv_log_uniform_values": {"min": None, "max": None},
    "normal": {"mu": 0.0, "sigma": 1.0},
    "q_normal": {"mu": 0.0, "sigma": 1.0, "q": 1},
    "log_normal": {"mu": 0.0, "sigma": 1.0},
    "q_log_normal": {"mu": 0.0, "sigma": 1.0, "q": 1},
    "beta": {"a": 1.0, "b": 1.0},
    "q_beta": {"a": 1.0, "b": 1.0, "q": 1},
}
_CHOICES: dict[str, dict[str, float | None]] = {
    "constant": {"value": None},
    "categorical": {"values": None},
    "categorical_w_probabilities": {"values": None, "probabilities": None},
}
DISTRIBUTIONS = (*_CHOICES, *_NUMBERS)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sweep.

    Args:
        name: Keys from the top, joined by dots where it stands in nested `parameters`.
        path: Those keys, one by one; the first is the name of the argument.
        distribution: One of `DISTRIBUTIONS`.
        choices: What a constant or categorical parameter can be.
        probabilities: Of the choices, summing to one.
        numbers: min, max, q, mu, sigma, a, b, where the distribution has them.
    """

    name: str
    path: tuple[str, ...]
    distribution: str
    choices: tuple[Any, ...] = ()
    probabilities: tuple[float, ...] = ()
    numbers: Mapping[str, float] | None = None

    @property
    def grid(self) -> list[Any] | None:
        """Every value, for a grid; None for a distribution without a finite number of them."""
        if self.choices:
            return list(self.choices)
        n = dict(self.numbers or {})
        if self.distribution == "int_uniform":
            return list(range(int(n["min"]), int(n["max"]) + 1))
        if self.distribution == "q_uniform":
            first, last = round(n["min"] / n["q"]), round(n["max"] / n["q"])
            return [_step(k, n["q"]) for k in range(first, last + 1)]
        return None

    def at(self, u: float) -> Any:
        """The value at the quantile u, 0 ≤ u < 1.

        >>> Parameter("a", ("a",), "log_uniform_values", numbers={"min": 1.0, "max": 100.0}).at(0.0)
        1.0
        """
        if self.choices:
            if not self.probabilities:
                return self.choices[min(len(self.choices) - 1, int(u * len(self.choices)))]
            total = 0.0
            for choice, p in zip(self.choices, self.probabilities, strict=True):
                total += p
                if u < total:
                    return choice
            return self.choices[-1]
        n = dict(self.numbers or {})
        if self.distribution == "int_uniform":
            return min(int(n["max"]), int(n["min"]) + int(u * (int(n["max"]) - int(n["min"]) + 1)))
        value = _PPF[self.distribution.removeprefix("q_")](n, u)
        return _step(round(value / n["q"]), n["q"]) if "q" in n else value


def read_parameters(value: Any, file: str) -> tuple[Parameter, ...]:
    """The parameters of a sweep file, nested ones too, in the file's order.

    Args:
        value: What stands under `parameters`.
        file: For messages.

    Raises:
        RequestError: a form that wandb's sweeps do not have; names the key.
    """
    if not isinstance(value, Mapping) or not value:
        raise wrong(file, "parameters", f"it is {short(value)}", "name one parameter or more, each with its values")
    return tuple(_walk(value, (), file))


def _walk(value: Mapping[str, Any], above: tuple[str, ...], file: str) -> Iterator[Parameter]:
    for key, form in value.items():
        path = (*above, str(key))
        where = ".".join(f"parameters.{part}" for part in path)
        if not isinstance(form, Mapping):
            raise wrong(file, where, f"it is {short(form)}", f"write {{value: {form}}} for a fixed value")
        if "parameters" in form:
            if len(form) > 1:
                others = ", ".join(str(k) for k in form if k != "parameters")
                raise wrong(file, where, f"it has parameters and {others}", "give nested parameters alone")
            if not isinstance(form["parameters"], Mapping) or not form["parameters"]:
                raise wrong(file, f"{where}.parameters", f"it is {short(form['parameters'])}", "name one or more")
            yield from _walk(form["parameters"], path, file)
        else:
            yield _parameter(path, form, where, file)


def _parameter(path: tuple[str, ...], form: Mapping[str, Any], where: str, file: str) -> Parameter:
    distribution = form.get("distribution", _implied(form))
    if distribution is None:
        remedy = "give value, values, or min and max"
        raise wrong(file, where, f"it has {', '.join(map(str, form)) or 'nothing'}", remedy)
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise wrong(file, f"{where}.distribution", f"there is no {short(distribution)}", f"use one of {known}")
    wanted = _CHOICES.get(distribution) or _NUMBERS[distribution]
    for key in form:
        if key != "distribution" and key not in wanted:
            raise wrong(file, f"{where}.{key}", f"{distribution} has no such key", f"use {', '.join(wanted)}")
    missing = [key for key, default in wanted.items() if default is None and key not in form]
    if missing:
        raise wrong(file, where, f"{distribution} lacks {' and '.join(missing)}", f"give {', '.join(wanted)}")
    name = ".".join(path)
    if distribution == "constant":
        return Parameter(name, path, distribution, (form["value"],))
    if "values" in wanted:
        values = form["values"]
        if not isinstance(values, list) or not values:
            raise wrong(file, f"{where}.values", f"it is {short(values)}", "give a list of one value or more")
        return Parameter(name, path, distribution, tuple(values), _probabilities(form, where, file))
    numbers = {key: _number(form.get(key, default), f"{where}.{key}", file) for key, default in wanted.items()}
    _check_range(distribution, numbers, where, file)
    if distribution == "int_uniform" and not all(float(v).is_integer() for v in numbers.values()):
        raise wrong(file, where, "int_uniform has a bound that is no integer", "use uniform, or whole numbers")
    return Parameter(name, path, distribution, numbers=numbers)


def _implied(form: Mapping[str, Any]) -> str | None:
    """The distribution of a form that names none, as wandb has it."""
    if "value" in form:
        return "constant"
    if "values" in form:
        return "categorical_w_probabilities" if "probabilities" in form else "categorical"
    if "min" in form and "max" in form:
        whole = all(isinstance(form[k], int) and not isinstance(form[k], bool) for k in ("min", "max"))
        return "int_uniform" if whole else "uniform"
    return None


def _probabilities(form: Mapping[str, Any], where: str, file: str) -> tuple[float, ...]:
    if "probabilities" not in form:
        return ()
    given = form["probabilities"]
    if not isinstance(given, list) or len(given) != len(form["values"]):
        raise wrong(file, f"{where}.probabilities", f"it is {short(given)}", "give one number for each of the values")
    numbers = [_number(p, f"{where}.probabilities", file) for p in given]
    if min(numbers) < 0 or not math.isclose(sum(numbers), 1.0, abs_tol=1e-6):
        raise wrong(file, f"{where}.probabilities", f"they sum to {sum(numbers):g}", "give shares that sum to 1")
    return tuple(numbers)


def _number(value: Any, where: str, file: str) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a text
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong(file, where, "it is not a number", "give a finite number")
    return value


def _check_range(distribution: str, numbers: Mapping[str, float], where: str, file: str) -> None:
    if "min" in numbers and numbers["min"] >= numbers["max"]:
        raise wrong(file, where, f"min {numbers['min']:g} is not below max {numbers['max']:g}", "swap or mend them")
    if distribution.endswith("log_uniform_values") and numbers["min"] <= 0:
        raise wrong(file, f"{where}.min", f"it is {numbers['min']:g}, and has no logarithm", "give a positive number")
    for key in ("q", "sigma", "a", "b"):
        if key in numbers and numbers[key] <= 0:
            raise wrong(file, f"{where}.{key}", f"it is {numbers[key]:g}", "give a positive number")


def _step(k: int, q: float) -> float:
    """k steps of q: whole where q is, and without the dust of 3 · 0.1."""
    return k * q if isinstance(q, int) else float(f"{k * q:.12g}")


def _between(low: float, high: float, u: float) -> float:
    return low + u * (high - low)


def _normal(n: Mapping[str, float], u: float) -> float:
    from statistics import NormalDist

    return NormalDist(n["mu"], n["sigma"]).inv_cdf(min(max(u, 1e-12), 1 - 1e-12))


def _beta(n: Mapping[str, float], u: float) -> float:
    from scipy.stats import beta

    return float(beta.ppf(u, n["a"], n["b"]))


_PPF: dict[str, Callable[[dict[str, float], float], float]] = {
    "uniform": lambda n, u: _between(n["min"], n["max"], u),
    "log_uniform": lambda n, u: math.exp(_between(n["min"], n["max"], u)),
    "log_uniform_values": lambda n, u: math.exp(_between(math.log(n["min"]), math.log(n["max"]), u)),
    "inv_log_uniform": lambda n, u: math.exp(-_between(n["min"], n["max"], 1 - u)),
    "inv_log_uniform_values": lambda n, u: math.exp(_between(math.log(n["min"]), math.log(n["max"]), u)),  # as wandb's
    "normal": _normal,
    "log_normal": lambda n, u: math.exp(_normal(n, u)),
    "beta": _beta,
}


def wrong(file: str, key: str, cause: str, remedy: str) -> RequestError:
    """The error of a sweep file; names the file and the key."""
    return RequestError(message(f"{file}: {key}", cause, remedy))


def short(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
