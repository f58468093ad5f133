"""The gate in front of a registry's alias, and the way back."""

import datetime
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.dataset import open_split
from pipeline.data.index import DatasetIndex
from pipeline.errors import UserError
from pipeline.evaluation.labels import map_labels
from pipeline.evaluation.mcnemar import McNemarResult, mcnemar_test
from pipeline.evaluation.probabilities import model_probabilities
from pipeline.evaluation.scores import NO_CLASS, best_class
from pipeline.mlflow_names import alias_error
from pipeline.model.card import ModelCard
from pipeline.tracking.registry import (
    REGISTRY,
    alias_version,
    check_permissions,
    download,
    move_alias,
    resolve,
    tag_version,
    versions,
)
from pipeline.tracking.stores import Stores

PROMOTED, BEFORE = "promoted.at", "promoted.before"


@dataclass(frozen=True)
class Candidate:
    """A model version beside the one that an alias has now, on the same images.

    `old` and what belongs to it are None where the alias has no version yet; `old_non_finite` counts the images for
    which the old version gives NaN or infinities, which are misses.
    """

    name: str
    alias: str
    new: str
    new_N: NDArray[np.bool_]
    old: str | None
    old_N: NDArray[np.bool_] | None
    old_non_finite: int
    paired: McNemarResult | None
    evidence: dict[str, str]

    def holds(self, min_gain: float, max_p: float) -> bool:
        """Whether it gains at least `min_gain` percentage points of top-1, at a p-value of at most `max_p`."""
        return self.paired is None or (self.paired.gain >= min_gain and self.paired.p_value <= max_p)


def weigh(model: str, alias: str, root: Path, split: str, stores: Stores, *, will_move: bool) -> Candidate:
    """Evaluates the model and the alias's present one on the same images.

    With `will_move` the right to move the alias is looked at before.

    Raises:
        UserError: there is no such model or split, its classes do not fit, or it gives NaN or infinities.
    """
    check_alias("--to", alias)
    outputs = Path("outputs").absolute()
    new = resolve(model if model.startswith(REGISTRY) else f"{REGISTRY}{model}", stores)
    old = alias_version(new.name, alias, stores)
    if old == new.version:
        raise UserError(f"{new.name}@{alias} is version {old} already.")
    if will_move:
        check_permissions(new.name, stores)  # not after evaluating for an hour
    limit = ModelCard.read(download(new.uri, stores, outputs / "models")).max_pixels
    index = open_split(root, split, outputs / "index", limit)
    new_N, transform, non_finite = _hits(new.uri, stores, index, outputs)
    if non_finite:
        raise UserError(
            f"{new.name} version {new.version} gives NaN or infinities for {non_finite} of {len(new_N)} images of "
            f"{root}/{split}: it is not promoted. Choose another version; its training has diverged."
        )
    evidence = {
        PROMOTED: _now(),
        "promoted.to": alias,
        "promoted.data": f"{split} of {index.fingerprint[:16]}",
        "promoted.transform": transform,
        "promoted.top1": f"{new_N.sum()}/{len(new_N)}",
    }
    if old is None:
        return Candidate(new.name, alias, new.version, new_N, None, None, 0, None, evidence)
    old_N, _, non_finite = _hits(f"{REGISTRY}{new.name}/{old}", stores, index, outputs)
    paired = mcnemar_test(new_N, old_N)
    evidence |= {
        BEFORE: old,
        "promoted.gain": f"{paired.gain:.4f}",
        "promoted.p": f"{paired.p_value:.3g}",
        "promoted.only": f"{paired.only_new} against {paired.only_old}",
    }
    return Candidate(new.name, alias, new.version, new_N, old, old_N, non_finite, paired, evidence)


def move(candidate: Candidate, stores: Stores) -> None:
    """Moves the alias to the candidate's version, with the evidence as its tags."""
    for key, value in candidate.evidence.items():
        tag_version(candidate.name, candidate.new, key, value, stores)
    move_alias(candidate.name, candidate.alias, candidate.new, stores)


def rollback(name: str, alias: str, stores: Stores) -> tuple[str, str]:
    """Moves the alias back to the version that it was before; returns that, and the one that it has left.

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
    tag_version(name, version, "rolled_back.at", _now(), stores)
    move_alias(name, alias, before, stores)
    return before, version


def check_alias(option: str, alias: str) -> None:
    """Raises `UserError` where MLflow takes no such alias."""
    wrong = alias_error(alias)
    if wrong is not None:
        raise UserError(f"{option}={alias} {wrong}.")


def _hits(model: str, stores: Stores, index: DatasetIndex, outputs: Path) -> tuple[NDArray[np.bool_], str, int]:
    """Which images a model hits, by its own transform, that transform in words, and for how many it gives NaN."""
    folder = download(model, stores, outputs / "models")
    card = ModelCard.read(folder)
    labels_N = map_labels(index, card.classes)
    given_NK, _ = model_probabilities(folder, index)
    best_N = best_class(given_NK)
    return best_N == labels_N, card.transform.description, int((best_N == NO_CLASS).sum())


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
