"""Sweep files: what is read, what the trials' words are (against wandb's own code), and that nothing unknown passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from im_lightning.errors import RequestError
from im_lightning.experiments.sweep.file import check_sweep, read_sweep
from im_lightning.experiments.sweep.parameters import DISTRIBUTIONS, read_parameters

RECIPES = Path(__file__).parents[2] / "recipes"
SWEEPS = sorted(p for p in RECIPES.rglob("*.yaml") if "parameters" in yaml.safe_load(p.read_text()))
COMMAND = ["${env}", "im-lightning", "fit", "--config", "x.yaml", "${args}"]


def sweep(**changes: Any) -> dict[str, Any]:
    value = {"method": "grid", "command": COMMAND, "parameters": {"data.subset_seed": {"values": [0, 1, 2]}}}
    return {k: v for k, v in {**value, **changes}.items() if v is not None}


def parameter(form: Any) -> Any:
    return read_parameters({"x": form}, "f.yaml")[0]


# what the values are


REFERENCES = {
    "uniform": ({"min": -1.0, "max": 3.0}, stats.uniform(-1, 4)),
    "log_uniform_values": ({"min": 1e-5, "max": 1e-2}, stats.loguniform(1e-5, 1e-2)),
    "inv_log_uniform_values": ({"min": 1e-5, "max": 1e-2}, stats.loguniform(1e-5, 1e-2)),
    "log_uniform": ({"min": -3.0, "max": 1.0}, stats.loguniform(math.exp(-3), math.exp(1))),
    "inv_log_uniform": ({"min": -1.0, "max": 3.0}, stats.loguniform(math.exp(-3), math.exp(1))),
    "normal": ({"mu": 2.0, "sigma": 0.5}, stats.norm(2, 0.5)),
    "log_normal": ({"mu": 1.0, "sigma": 0.3}, stats.lognorm(0.3, scale=math.e)),
    "beta": ({"a": 2.0, "b": 5.0}, stats.beta(2, 5)),
    "int_uniform": ({"min": 3, "max": 9}, stats.randint(3, 10)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_distribution_is_scipys(name: str) -> None:
    """A sweep's draws must be those that the file asks for, or its conclusions are about another design."""
    numbers, reference = REFERENCES[name]
    p = parameter({"distribution": name, **numbers})
    for u in np.linspace(0.01, 0.99, 25):
        assert p.at(float(u)) == pytest.approx(float(reference.ppf(u)), rel=1e-6)


@pytest.mark.parametrize("name", [n for n in DISTRIBUTIONS if n.startswith("q_")])
def test_a_quantised_distribution_is_the_plain_one_rounded(name: str) -> None:
    numbers = {"q_beta": {"a": 2.0, "b": 2.0}, "q_log_normal": {"mu": 1.0}, "q_normal": {"mu": 4.0}}.get(name)
    numbers = numbers or {"min": 1.0, "max": 3.0}
    plain, rounded = parameter({"distribution": name[2:], **numbers}), None
    for q in (0.25, 1):
        rounded = parameter({"distribution": name, **numbers, "q": q})
        for u in np.linspace(0.01, 0.99, 25):
            value = rounded.at(float(u))
            assert abs(value - plain.at(float(u))) <= q / 2 + 1e-9 and value / q == pytest.approx(round(value / q))
    assert isinstance(rounded.at(0.5), int), "a whole step gives whole numbers, which integer arguments need"


def test_choices() -> None:
    assert [parameter({"values": ["a", "b"]}).at(u) for u in (0.0, 0.49, 0.5, 0.999)] == ["a", "a", "b", "b"]
    weighted = parameter({"values": ["a", "b"], "probabilities": [0.9, 0.1]})
    assert [weighted.at(u) for u in (0.0, 0.89, 0.91)] == ["a", "a", "b"]
    assert parameter({"value": None}).grid == [None] and parameter({"min": 1, "max": 3}).grid == [1, 2, 3]
    assert parameter({"distribution": "q_uniform", "min": 0.1, "max": 0.3, "q": 0.1}).grid == [0.1, 0.2, 0.3]
    assert parameter({"min": 0.0, "max": 1.0}).distribution == "uniform"
    assert parameter({"distribution": "log_uniform_values", "min": "1e-4", "max": 1}).at(0.5) == pytest.approx(1e-2)


# what the trial's words are


MACROS = ("args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags", "args_json")


@pytest.mark.parametrize("macro", MACROS)
def test_words_are_those_of_wandbs_agent(macro: str) -> None:
    """A file must give the same runs with `wandb agent` and without a server."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    nested = {"parameters": {"alpaca": {"value": 0.25}, "dolly": {"value": 1}}}
    value = sweep(
        command=["${env}", "im-lightning", "fit", "${" + macro + "}"],
        parameters={
            "data.subset_seed": {"value": 3},
            "model.learning_rate": {"value": 1e-05},
            "mining.refit": {"value": False},
            "data.resample_each_epoch": {"value": True},
            "data": {"parameters": {"subset_mixture": nested, "subset_tilt": {"value": 0.5}}},
            "data.rule": {"value": "instructmining-v3"},
        },
    )
    one = check_sweep(value, "f.yaml")
    values = {p.name: p.at(0.5) for p in one.parameters}
    assert values["data.subset_mixture.alpaca"] == 0.25
    sent = {
        "data.subset_seed": 3, "model.learning_rate": 1e-05, "mining.refit": False, "data.resample_each_epoch": True,
        "data": {"subset_mixture": {"alpaca": 0.25, "dolly": 1}, "subset_tilt": 0.5}, "data.rule": "instructmining-v3",
    }  # fmt: skip
    theirs = create_sweep_command_args({"args": {name: {"value": v} for name, v in sent.items()}})
    assert one.arguments(values) == theirs[macro]


@pytest.mark.parametrize("macro", ["args", "args_no_equals", "args_no_boolean_flags"])
@pytest.mark.parametrize("agent", [False, True])
def test_null_reaches_the_option_as_null(macro: str, agent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as the text None, of which a rule's file would be looked for; from our own sweep and from wandb's agent."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    from im_lightning.training.cli import run_fit

    sent = {"data.rule": None, "data.budget": None, "data.eval_data": {"a": "b", "None": "c"}}
    if agent:
        monkeypatch.setenv("WANDB_SWEEP_ID", "s")
        words = create_sweep_command_args({"args": {name: {"value": v} for name, v in sent.items()}})[macro]
    else:
        value = sweep(
            command=["im-lightning", "fit", "${" + macro + "}"], parameters={k: {"value": v} for k, v in sent.items()}
        )
        one = check_sweep(value, "f.yaml")
        words = one.arguments({p.name: p.at(0.5) for p in one.parameters})
    found: dict[str, Any] = {}

    class Enough(Exception):
        pass

    def before(cli: Any) -> None:
        found.update(cli.datamodule.hparams)
        raise Enough

    with pytest.raises(Enough):
        run_fit(["--data.data=pool.jsonl", "--data.model=model", "--trainer.logger=false", *words], before=before)
    assert {name: found[name.removeprefix("data.")] for name in sent} == sent


def test_the_command_keeps_its_words_and_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOL", "pool.jsonl")
    words = ["${interpreter}", "-m", "im_lightning.cli", "fit", "--data.data=${envvar:POOL}", "${args}", "--last=1"]
    one = check_sweep(sweep(command=words), "f.yaml")
    assert one.arguments({"data.subset_seed": 2}) == ["--data.data=pool.jsonl", "--data.subset_seed=2", "--last=1"]
    more = one.with_arguments(["--data.model=m"])
    assert more.arguments({"data.subset_seed": 2})[:3] == [
        "--data.data=pool.jsonl", "--data.model=m", "--data.subset_seed=2",
    ]  # fmt: skip
    assert more.digest != one.digest and one.with_arguments([]) is one


def test_counts_and_bands() -> None:
    two = {"a": {"values": [1, 2]}, "b": {"min": 0, "max": 4}}
    assert check_sweep(sweep(parameters=two), "f").trials == 10
    assert check_sweep(sweep(parameters=two, run_cap=3), "f").trials == 3
    assert check_sweep(sweep(method="random"), "f").trials is None
    metric = {"name": "train_loss"}
    early = check_sweep(sweep(metric=metric, early_terminate={"type": "hyperband", "min_iter": 3, "eta": 2}), "f").early
    assert early is not None and early.bands[:4] == (3, 6, 12, 24) and early.eta == 2
    stop = {"type": "hyperband", "max_iter": 27, "s": 2}
    early = check_sweep(sweep(metric=metric, early_terminate=stop), "f").early
    assert early is not None and early.bands == (3, 9)
    assert check_sweep(sweep(metric={"name": "x", "goal": "maximize", "target": 2}), "f").metric.reached(2.5)  # type: ignore[union-attr]


# what is refused


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([], "f.yaml: it does not hold a mapping"),
        (sweep(methods="grid"), "f.yaml: methods: this key is not supported"),
        (sweep(job="a"), "f.yaml: job: this key is not supported"),
        (sweep(method=None), "f.yaml: method: it is missing"),
        (sweep(method="custom"), "f.yaml: method: there is no 'custom'. Fix: use one of grid, random, bayes"),
        (sweep(parameters=None), "f.yaml: parameters: it is missing"),
        (sweep(parameters={}), "f.yaml: parameters: it is {}"),
        (sweep(parameters={"x": 3}), "f.yaml: parameters.x: it is 3. Fix: write {value: 3}"),
        (sweep(parameters={"x": {"value": 3, "min": 1}}), "parameters.x.min: constant has no such key"),
        (sweep(parameters={"x": {"q": 1}}), "parameters.x: it has q"),
        (sweep(parameters={"x": {"values": 3}}), "parameters.x.values: it is 3"),
        (sweep(parameters={"x": {"distribution": "cauchy"}}), "x.distribution: there is no 'cauchy'"),
        (sweep(parameters={"x": {"distribution": "uniform", "min": 1}}), "parameters.x: uniform lacks max"),
        (sweep(parameters={"x": {"min": 2, "max": 1}}), "parameters.x: min 2 is not below max 1"),
        (sweep(parameters={"x": {"min": 1, "max": "b"}}), "parameters.x.max: it is not a number"),
        (sweep(parameters={"x": {"distribution": "int_uniform", "min": 1, "max": 2.5}}), "bound that is no integer"),
        (
            sweep(method="random", parameters={"x": {"distribution": "log_uniform_values", "min": 0, "max": 1}}),
            "parameters.x.min: it is 0, and has no logarithm",
        ),
        (sweep(parameters={"x": {"distribution": "q_normal", "q": 0}}), "parameters.x.q: it is 0"),
        (
            sweep(method="random", parameters={"x": {"values": [1, 2], "probabilities": [0.5, 0.6]}}),
            "parameters.x.probabilities: they sum to 1.1",
        ),
        (
            sweep(method="random", parameters={"x": {"values": [1, 2], "probabilities": [1]}}),
            "parameters.x.probabilities: it is [1]",
        ),
        (sweep(parameters={"x": {"values": [1, 2], "probabilities": [0.5, 0.5]}}), "probabilities: grid has no use"),
        (sweep(parameters={"x": {"min": 0.5, "max": 1.0}}), "parameters.x: a grid has no values of uniform"),
        (sweep(parameters={"x": {"parameters": {}}}), "parameters.x.parameters: it is {}"),
        (sweep(parameters={"x": {"parameters": {"y": 1}}}), "parameters.x.parameters.y: it is 1"),
        (sweep(parameters={"x": {"parameters": {"y": {"value": 1}}, "value": 1}}), "it has parameters and value"),
        (sweep(method="bayes"), "metric: it is missing, and method bayes needs it"),
        (sweep(early_terminate={"type": "hyperband", "min_iter": 1}), "metric: it is missing, and early_terminate"),
        (sweep(metric={"goal": "minimize"}), "metric: it has no name"),
        (sweep(metric={"name": "a", "goal": "min"}), "metric.goal: there is no 'min'"),
        (sweep(metric={"name": "a", "impute": "best"}), "metric.impute: this key is not supported"),
        (sweep(metric={"name": "a", "target": "low"}), "metric.target: it is 'low'"),
        (sweep(metric={"name": "a"}, early_terminate={"type": "envelope"}), "early_terminate.type: there is no 'env"),
        (
            sweep(metric={"name": "a"}, early_terminate={"type": "hyperband", "min_iter": 1, "strict": True}),
            "early_terminate.strict: this key is not supported",
        ),
        (
            sweep(metric={"name": "a"}, early_terminate={"type": "hyperband", "min_iter": 1, "eta": 1}),
            "early_terminate.eta: it is 1",
        ),
        (
            sweep(metric={"name": "a"}, early_terminate={"type": "hyperband", "max_iter": 9}),
            "early_terminate: it gives max_iter",
        ),
        (sweep(run_cap=0), "run_cap: it is 0"),
        (sweep(command="im-lightning fit"), "command: it is 'im-lightning fit'"),
        (sweep(command=None, program="train.py"), "command: it runs 'python train.py ${args}'"),
        (sweep(command=None), "program: it is missing"),
        (sweep(command=["im-lightning", "fit"]), "command: the trial's arguments have no place in it"),
        (sweep(command=["im-lightning", "fit", "${args_json_file}"]), "the macro ${args_json_file} is not supported"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(value: Any, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_sweep(value, "f.yaml")
    assert text in str(caught.value) and "f.yaml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no such file"):
        read_sweep(str(tmp_path / "no.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RequestError, match="it is not YAML"):
        read_sweep(str(tmp_path / "bad.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(RequestError, match="it cannot be read"):
        read_sweep(str(tmp_path / "latin.yaml"))


# the recipes' own


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: str(p.relative_to(RECIPES)))
def test_every_sweep_file_of_the_recipes(path: Path) -> None:
    """Ours reads it, wandb's own converter knows every parameter's form, and its command names files that exist."""
    from wandb.sdk.sweeps.scheduler.optuna import search_space_from_sweep_config

    one, raw = read_sweep(str(path)), yaml.safe_load(path.read_text())
    flat = {k: v for k, v in raw["parameters"].items() if "parameters" not in v}
    assert set(search_space_from_sweep_config(flat)) == set(flat)
    assert one.trials is not None, "a recipe's sweep must have an end"
    assert raw["program"] == "im-lightning", "wandb's agent needs a program"
    named = [word for word in one.command if word.startswith("recipes/")]
    assert named and all((RECIPES.parent / name).exists() for name in named)
    assert all(isinstance(word, str) for word in one.arguments({p.name: p.at(0.5) for p in one.parameters}))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: str(p.relative_to(RECIPES)))
def test_the_agents_command_is_ours(path: Path) -> None:
    """`wandb agent` puts its command together from the file; after `im-lightning fit` it must be the same words."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    one, raw = read_sweep(str(path)), yaml.safe_load(path.read_text())
    values = {p.name: p.at(0.5) for p in one.parameters}
    nested: dict[str, Any] = {}
    for p in one.parameters:
        into = nested
        for key in p.path[:-1]:
            into = into.setdefault(key, {})
        into[p.path[-1]] = values[p.name]
    filled = create_sweep_command_args({"args": {name: {"value": value} for name, value in nested.items()}})
    filled |= {"program": [raw["program"]], "env": ["/usr/bin/env"], "interpreter": ["python"]}
    words = []
    for word in create_sweep_command(raw["command"]):
        words += filled[word[2:-1]] if word.startswith("${") else [word]
    assert words == ["/usr/bin/env", "im-lightning", "fit", *one.arguments(values)]
