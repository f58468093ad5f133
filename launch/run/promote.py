"""`densenet models promote|rollback`: the gate in front of a registry's alias."""

import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pipeline.data.dataset import open_split
from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.evaluation.labels import labels_of
from pipeline.evaluation.paired import Paired, compare
from pipeline.evaluation.probabilities import Transform, model_probabilities
from pipeline.evaluation.scores import NO_CLASS, best_class
from pipeline.model.sources import read_card
from pipeline.names import alias_fault
from pipeline.tracking.registry import (
    REGISTRY,
    alias_version,
    check_rights,
    download,
    move_alias,
    resolve,
    tag_version,
    versions,
)
from pipeline.tracking.stores import Stores

PROMOTED, BEFORE = "promoted.at", "promoted.before"


def promote_command(
    console: Console,
    model: str,
    alias: str,
    root: Path,
    split: str,
    min_gain: float,
    max_p: float,
    dry_run: bool,
    stores: Stores,
) -> bool:
    """Evaluates the model and the alias's present one on the same pictures, and moves the alias to the better one.

    Returns whether the conditions hold: a gain of at least `min_gain` percentage points of top-1, at a p-value of at
    most `max_p`; where the alias has no model yet, that the model can be evaluated.

    Raises:
        UserError: there is no such model or split, or its classes do not fit.
    """
    check_alias("--to", alias)
    outputs = Path("outputs").absolute()
    new = resolve(model if model.startswith(REGISTRY) else f"{REGISTRY}{model}", stores)
    old = alias_version(new.name, alias, stores)
    if old == new.version:
        raise UserError(f"{new.name}@{alias} is version {old} already.")
    if not dry_run:
        check_rights(new.name, stores)  # not after evaluating for an hour
    limit = read_card(download(new.uri, stores, outputs / "models"))["max_pixels"]
    index = open_split(root, split, outputs / "index", limit)
    new_N, transform, non_finite = _hits(new.uri, stores, index, outputs)
    if non_finite:
        raise UserError(
            f"{new.name} version {new.version} gives NaN or infinities for {non_finite} of {len(new_N)} pictures of "
            f"{root}/{split}: it is not promoted. Choose another version; its training has diverged."
        )
    evidence = {
        PROMOTED: f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "promoted.to": alias,
        "promoted.data": f"{split} of {index.fingerprint[:16]}",
        "promoted.transform": transform,
        "promoted.top1": f"{new_N.sum()}/{len(new_N)}",
    }
    holds = True
    if old is None:
        console.print(f"{new.name} version {new.version}: {_share(new_N)}; {alias} is no version yet", soft_wrap=True)
    else:
        old_N, _, non_finite = _hits(f"{REGISTRY}{new.name}/{old}", stores, index, outputs)
        if non_finite:
            console.print(
                f"warning: version {old} gives NaN or infinities for {non_finite} pictures: they are misses",
                style="yellow",
                soft_wrap=True,
            )
        paired = compare(new_N, old_N)
        holds = paired.gain >= min_gain and paired.p_value <= max_p
        _print(console, new.version, old, alias, new_N, old_N, paired)
        console.print(
            f"asked for: a gain of {min_gain:g} points or more at p {max_p:g} or less: {'yes' if holds else 'no'}"
        )
        evidence |= {
            BEFORE: old,
            "promoted.gain": f"{paired.gain:.4f}",
            "promoted.p": f"{paired.p_value:.3g}",
            "promoted.only": f"{paired.only_new} against {paired.only_old}",
        }
    if not holds:
        console.print(f"{new.name}@{alias} stays version {old}", style="yellow")
    elif dry_run:
        console.print(f"{new.name}@{alias} would become version {new.version} (dry run)")
    else:
        for key, value in evidence.items():
            tag_version(new.name, new.version, key, value, stores)
        move_alias(new.name, alias, new.version, stores)
        console.print(f"{new.name}@{alias} is version {new.version} now", style="green")
    return holds


def rollback_command(console: Console, name: str, alias: str, stores: Stores) -> None:
    """Moves the alias back to the version that it was before.

    Raises:
        UserError: it is not known, or has gone.
    """
    version = alias_version(name, alias, stores)
    if version is None:
        raise UserError(f"{name}@{alias} is no version: there is nothing to roll back.")
    tags = next(v.tags for v in versions(name, stores) if v.version == version)
    before = tags.get(BEFORE) if tags.get("promoted.to") == alias else None
    if before is None:
        raise UserError(f"{name} version {version} does not tell what @{alias} was before: nothing is changed.")
    resolve(f"{REGISTRY}{name}/{before}", stores)
    now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
    tag_version(name, version, "rolled_back.at", now, stores)
    move_alias(name, alias, before, stores)
    console.print(f"{name}@{alias} is version {before} again, {version} before")


def check_alias(option: str, alias: str) -> None:
    """Raises `UserError` where MLflow takes no such alias."""
    wrong = alias_fault(alias)
    if wrong is not None:
        raise UserError(f"{option}={alias} {wrong}.")


def _hits(model: str, stores: Stores, index: DatasetIndex, outputs: Path) -> tuple[NDArray[np.bool_], str, int]:
    """Which pictures a model hits, by its own transform, that transform in words, and for how many it gives NaN."""
    folder = download(model, stores, outputs / "models")
    card = read_card(folder)
    labels_N = labels_of(index, card["classes"])
    given_NK, _ = model_probabilities(folder, index)
    best_N = best_class(given_NK)
    return best_N == labels_N, Transform(**card["transform"]).description, int((best_N == NO_CLASS).sum())


def _share(hits_N: NDArray[np.bool_]) -> str:
    return f"top-1 {hits_N.sum()}/{len(hits_N)} = {100 * hits_N.mean():.2f} %"


def _print(
    console: Console,
    new: str,
    old: str,
    alias: str,
    new_N: NDArray[np.bool_],
    old_N: NDArray[np.bool_],
    paired: Paired,
) -> None:
    for name, hits_N, only in (
        (f"version {new}", new_N, paired.only_new),
        (f"@{alias}, {old}", old_N, paired.only_old),
    ):
        console.print(f"{name:18}{_share(hits_N)}, {only} that the other one misses", soft_wrap=True)
    console.print(f"{'gain':18}{paired.gain:+.2f} points, p {paired.p_value:.3g} (McNemar's exact test, one-sided)")
