"""Hyperparameter search: training runs with values from a search space, with Ray Tune and ASHA early stopping."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from pipeline.errors import TrainingError, UserError

_DIMENSION = re.compile(r"(?P<key>[\w.]+)=(?P<kind>log|uniform|choice)\((?P<values>.*)\)")
_TRIAL_CPUS = 0.01  # a trial's own process only waits


@dataclass(frozen=True)
class Trial:
    """A training run of a search: its values by config key, its best top-1 accuracy in %, and the last epoch."""

    values: dict[str, Any]
    top1: float
    epoch: float


def parse_space(space: list[str]) -> dict[str, Any]:
    """Parses `key=log(low,high)`, `key=uniform(low,high)` and `key=choice(a,b,...)` into Ray Tune's search space.

    Raises:
        UserError: An item has another form.
    """
    parsed: dict[str, Any] = {}
    for text in space:
        match = _DIMENSION.fullmatch(text.replace(" ", ""))
        values = match["values"].split(",") if match else []
        try:
            if match is None or not values:
                raise ValueError
            if match["kind"] == "choice":
                parsed[match["key"]] = tune.choice(values)
            else:
                low, high = map(float, values)
                if not low < high or (match["kind"] == "log" and low <= 0):
                    raise ValueError
                parsed[match["key"]] = (tune.loguniform if match["kind"] == "log" else tune.uniform)(low, high)
        except ValueError:
            raise UserError(
                f"--space {text} is not of the form KEY=log(LOW,HIGH), KEY=uniform(LOW,HIGH) or KEY=choice(A,B,...), "
                f"with LOW below HIGH, and above 0 for log."
            ) from None
    if not parsed:
        raise UserError("give at least one --space, for example --space 'optim.lr=log(0.01,1)'.")
    return parsed


def boundary_overrides(search_space: dict[str, Any]) -> list[list[str]]:
    """Returns config overrides for the lowest and highest value of each range, and for each choice."""
    overrides: list[list[str]] = []
    for key, domain in search_space.items():
        values = domain.categories if hasattr(domain, "categories") else (domain.lower, domain.upper)
        overrides += [[f"{key}={value}"] for value in values]
    return overrides


def search(
    trial: Callable[..., None],
    settings: dict[str, Any],
    search_space: dict[str, Any],
    *,
    trials: int,
    max_concurrent: int,
    evaluations: int,
    folder: Path,
) -> list[Trial]:
    """Calls `trial(values, settings=settings)` on the connected cluster for sampled values.

    Args:
        trial: A training run that calls `report_evaluation` after each evaluation.
        settings: Settings that all trials share.
        search_space: The search space, from `parse_space`.
        trials: Number of trials.
        max_concurrent: Most trials that run at the same time.
        evaluations: Number of evaluations in a trial that is not stopped early.
        folder: Ray Tune stores its files in the folder `tune` below it.

    Returns:
        The trials, best first.

    Raises:
        TrainingError: No trial reached an evaluation.
    """
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, settings=settings), {"CPU": _TRIAL_CPUS}),
        param_space=search_space,
        tune_config=tune.TuneConfig(
            metric="top1",
            mode="max",
            num_samples=trials,
            max_concurrent_trials=max_concurrent,
            # max_t is out of reach: a complete trial ends by itself.
            scheduler=ASHAScheduler(time_attr="evaluations", max_t=evaluations + 1, grace_period=1),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    results = tuner.fit()
    completed = [
        Trial(result.config or {}, result.metrics["top1"], result.metrics["epoch"])
        for result in results
        if result.metrics and "top1" in result.metrics
    ]
    if not completed:
        errors = [str(result.error).strip().splitlines()[-1] for result in results if result.error]
        raise TrainingError(f"no trial reached an evaluation: {errors[0] if errors else 'no error is known'}")
    return sorted(completed, key=lambda trial: trial.top1, reverse=True)


def trial_id() -> str:
    """Returns Ray Tune's id of the trial in this process."""
    return tune.get_context().get_trial_id()


def report_evaluation(top1: float, loss: float | None, epoch: float, evaluations: int) -> None:
    """Reports a trial's evaluation to Ray Tune, which may end the trial's process at once."""
    tune.report({"top1": top1, "loss": loss, "epoch": epoch, "evaluations": evaluations})
