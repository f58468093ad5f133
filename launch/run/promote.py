"""Model promotion: the evaluation gate of a registry's alias, and rollback."""

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
    PREVIOUS_VERSION,
    PROMOTED_AT,
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


@dataclass(frozen=True)
class Candidate:
    """A model version, and the alias's current version, evaluated on the same images.

    Attributes:
        name: Registered model name.
        alias: The alias to move.
        new: Version to promote.
        new_correct_N: Whether `new` predicts each image's class.
        old: The alias's current version; None, like `old_correct_N` and `paired`, if it has none.
        old_correct_N: Whether `old` predicts each image's class.
        old_non_finite: Images for which `old` gives NaN or infinities, which count as wrong.
        paired: McNemar's test of both.
        evidence: Tags for the promoted version.
    """

    name: str
    alias: str
    new: str
    new_correct_N: NDArray[np.bool_]
    old: str | None
    old_correct_N: NDArray[np.bool_] | None
    old_non_finite: int
    paired: McNemarResult | None
    evidence: dict[str, str]

    def passes(self, min_gain: float, max_p: float) -> bool:
        """Returns whether it gains at least `min_gain` percentage points of top-1, with a p-value up to `max_p`."""
        return self.paired is None or (self.paired.gain >= min_gain and self.paired.p_value <= max_p)


def evaluate_candidate(
    model: str,
    alias: str,
    root: Path,
    split: str,
    stores: Stores,
    *,
    classes: Path | None = None,
    will_promote: bool,
) -> Candidate:
    """Evaluates the model and the alias's current version on the same images.

    `classes` is a list of classes to choose or merge. With `will_promote` it first checks the permission to move the
    alias.

    Raises:
        UserError: The model or split does not exist, its classes do not match, or the model gives NaN or infinities.
    """
    check_alias("--to", alias)
    outputs = Path("outputs").absolute()
    new = resolve(model if model.startswith(REGISTRY) else f"{REGISTRY}{model}", stores)
    old = alias_version(new.name, alias, stores)
    if old == new.version:
        raise UserError(f"{new.name}@{alias} is version {old} already.")
    if will_promote:
        check_permissions(new.name, stores)  # before an evaluation of perhaps an hour
    limit = ModelCard.read(download(new.uri, stores, outputs / "models")).max_pixels
    index = open_split(root, split, outputs / "index", limit, classes)
    new_correct_N, transform, non_finite = _correct_predictions(new.uri, stores, index, outputs)
    if non_finite:
        raise UserError(
            f"{new.name} version {new.version} gives NaN or infinities for {non_finite} of {len(new_correct_N)} images "
            f"of {root}/{split}: it is not promoted. Choose another version; the training of this one diverged."
        )
    evidence = {
        PROMOTED_AT: _now(),
        "promoted.to": alias,
        "promoted.data": f"{split} of {index.fingerprint[:16]}",
        "promoted.transform": transform,
        "promoted.top1": f"{new_correct_N.sum()}/{len(new_correct_N)}",
    }
    if old is None:
        return Candidate(new.name, alias, new.version, new_correct_N, None, None, 0, None, evidence)
    old_correct_N, _, non_finite = _correct_predictions(f"{REGISTRY}{new.name}/{old}", stores, index, outputs)
    paired = mcnemar_test(new_correct_N, old_correct_N)
    evidence |= {
        PREVIOUS_VERSION: old,
        "promoted.gain": f"{paired.gain:.4f}",
        "promoted.p": f"{paired.p_value:.3g}",
        "promoted.only": f"{paired.only_new} against {paired.only_old}",
    }
    return Candidate(new.name, alias, new.version, new_correct_N, old, old_correct_N, non_finite, paired, evidence)


def promote(candidate: Candidate, stores: Stores) -> None:
    """Moves the alias to the candidate's version, and tags that version with the evidence."""
    for key, value in candidate.evidence.items():
        tag_version(candidate.name, candidate.new, key, value, stores)
    move_alias(candidate.name, candidate.alias, candidate.new, stores)


def rollback(name: str, alias: str, stores: Stores) -> tuple[str, str]:
    """Moves the alias back to its previous version; returns that version, and the one that had the alias until now.

    Raises:
        UserError: The previous version is unknown or deleted.
    """
    version = alias_version(name, alias, stores)
    if version is None:
        raise UserError(f"{name}@{alias} does not exist: there is nothing to roll back.")
    tags = next(v.tags for v in versions(name, stores) if v.version == version)
    previous = tags.get(PREVIOUS_VERSION) if tags.get("promoted.to") == alias else None
    if previous is None:
        raise UserError(f"{name} version {version} has no record of the previous @{alias}: nothing is changed.")
    resolve(f"{REGISTRY}{name}/{previous}", stores)
    tag_version(name, version, "rolled_back.at", _now(), stores)
    move_alias(name, alias, previous, stores)
    return previous, version


def check_alias(option: str, alias: str) -> None:
    """Raises `UserError` if MLflow does not allow the alias."""
    problem = alias_error(alias)
    if problem is not None:
        raise UserError(f"{option}={alias} {problem}.")


def _correct_predictions(
    model: str, stores: Stores, index: DatasetIndex, outputs: Path
) -> tuple[NDArray[np.bool_], str, int]:
    """Evaluates a model with its own transform.

    Returns:
        Whether each prediction is correct, [N]; the transform's description; the number of non-finite predictions.
    """
    folder = download(model, stores, outputs / "models")
    card = ModelCard.read(folder)
    labels_N = map_labels(index, card.classes)
    probabilities_NK, _ = model_probabilities(folder, index)
    predictions_N = best_class(probabilities_NK)
    non_finite = int((predictions_N == NO_CLASS).sum())
    return predictions_N == labels_N, card.transform.description, non_finite


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
