"""Several trainings with values from a space, the poor ones ended early: Ray Tune with ASHA."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from pipeline.errors import TrainingError, UserError

_FORM = re.compile(r"(?P<key>[\w.]+)=(?P<kind>log|uniform|choice)\((?P<values>.*)\)")
_TRIAL_CPUS = 0.01  # a trial's own process only waits


@dataclass(frozen=True)
class Trial:
    """One training of a search: its values by config key, and the best it came to, top-1 in %."""

    values: dict[str, Any]
    top1: float
    epoch: float


def parse_space(space: list[str]) -> dict[str, Any]:
    """Ray Tune's form of `key=log(low,high)`, `key=uniform(low,high)` and `key=choice(a,b,...)`.

    Raises:
        UserError: it is of no such form.
    """
    found: dict[str, Any] = {}
    for text in space:
        form = _FORM.fullmatch(text.replace(" ", ""))
        values = form["values"].split(",") if form else []
        try:
            if form is None or not values:
                raise ValueError
            if form["kind"] == "choice":
                found[form["key"]] = tune.choice(values)
            else:
                low, high = map(float, values)
                if not low < high or (form["kind"] == "log" and low <= 0):
                    raise ValueError
                found[form["key"]] = (tune.loguniform if form["kind"] == "log" else tune.uniform)(low, high)
        except ValueError:
            raise UserError(
                f"--space {text} is not of the form KEY=log(LOW,HIGH), KEY=uniform(LOW,HIGH) or KEY=choice(A,B,...), "
                f"with LOW below HIGH, and above 0 for log."
            ) from None
    if not found:
        raise UserError("give at least one --space, for example --space 'optim.lr=log(0.01,1)'.")
    return found


def edges(searched: dict[str, Any]) -> list[list[str]]:
    """Overrides at the ends of the space, and for each choice."""
    found: list[list[str]] = []
    for key, domain in searched.items():
        values = domain.categories if hasattr(domain, "categories") else (domain.lower, domain.upper)
        found += [[f"{key}={value}"] for value in values]
    return found


def search(
    trial: Callable[..., None],
    task: dict[str, Any],
    searched: dict[str, Any],
    *,
    trials: int,
    at_once: int,
    evaluations: int,
    folder: Path,
) -> list[Trial]:
    """Calls `trial(values, task=task)` on the connected cluster for values of the space; returns the best first.

    Args:
        trial: A training that calls `tell` after each evaluation.
        task: What all trials are given besides their values.
        searched: The space, of `parse_space`.
        trials: How many there are in all.
        at_once: How many run at one time.
        evaluations: How many a trial makes that is not ended early.
        folder: Where Ray Tune keeps its own files, in `tune`.

    Raises:
        TrainingError: no trial came to an evaluation.
    """
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, task=task), {"CPU": _TRIAL_CPUS}),
        param_space=searched,
        tune_config=tune.TuneConfig(
            metric="top1",
            mode="max",
            num_samples=trials,
            max_concurrent_trials=at_once,
            # A trial that comes to its end ends by itself, not by max_t.
            scheduler=ASHAScheduler(time_attr="evaluations", max_t=evaluations + 1, grace_period=1),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    results = tuner.fit()
    found = [
        Trial(result.config or {}, result.metrics["top1"], result.metrics["epoch"])
        for result in results
        if result.metrics and "top1" in result.metrics
    ]
    if not found:
        errors = [str(result.error).strip().splitlines()[-1] for result in results if result.error]
        raise TrainingError(f"no trial came to an evaluation: {errors[0] if errors else 'no error is known'}")
    return sorted(found, key=lambda one: one.top1, reverse=True)


def trial_id() -> str:
    """Ray Tune's id of the trial that this process is."""
    return tune.get_context().get_trial_id()


def tell(top1: float, loss: float | None, epoch: float, evaluations: int) -> None:
    """Tells Ray Tune of a trial's evaluation, which may end the trial's process at once."""
    tune.report({"top1": top1, "loss": loss, "epoch": epoch, "evaluations": evaluations})
