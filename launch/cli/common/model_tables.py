"""Tables of registered models."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from launch.cli.common.tables import print_table
from pipeline.errors import UserError
from pipeline.tracking.queries import differences, get_run
from pipeline.tracking.registry import (
    PREVIOUS_VERSION,
    PROMOTED_AT,
    REGISTRY,
    ModelVersion,
    registered_names,
    resolve,
    versions,
)
from pipeline.tracking.stores import Stores, redacted, sqlite_file

if TYPE_CHECKING:
    from launch.run.promote import Candidate


def registered_command(console: Console, stores: Stores) -> None:
    """Prints each registered model's newest version, and its versions with an alias."""
    names = _names(stores)
    if not names:
        console.print(f"no model is registered in {redacted(stores.registry)}", soft_wrap=True)
        return
    rows = []
    for name in names:
        found = versions(name, stores)
        for v in found:
            if v.aliases or v is found[0]:
                results = [_top1_tag(v), v.tags.get("epoch", ""), v.tags.get(PROMOTED_AT, "")[:10]]
                rows.append((name, v.version, _aliases(v), *results, v.run_id[:8]))
    print_table(console, ("registered", "version", "aliases", "top-1", "epoch", "promoted", "run"), rows)


def registered_as_json(stores: Stores) -> None:
    """Prints all versions of all registered models as JSON, by model name, newest first."""
    print(json.dumps({name: [asdict(v) for v in versions(name, stores)] for name in _names(stores)}, indent=2))


def show_command(console: Console, model: str, stores: Stores, as_json: bool) -> None:
    """Prints the aliases, results, tags and run of a model version."""
    name, v = _find(model, stores)
    if as_json:
        print(json.dumps({"name": name} | asdict(v), indent=2))
        return
    lines = [("model", f"{REGISTRY}{name}/{v.version}"), ("aliases", _aliases(v) or "none"), ("top-1", _top1_tag(v))]
    lines += [(key, value) for key, value in sorted(v.tags.items())]
    lines += [("run", v.run_id)]
    width = max(len(key) for key, _ in lines) + 2
    for key, value in lines:
        console.print(f"{key:{width}}{value}", markup=False, soft_wrap=True)


def diff_command(console: Console, first: str, second: str, stores: Stores) -> None:
    """Prints the differences of two model versions: tags, and the parameters of their runs."""
    (name_1, a), (name_2, b) = _find(first, stores), _find(second, stores)
    rows: list[tuple[str, ...]] = [("aliases", _aliases(a), _aliases(b))]
    for key in sorted(a.tags.keys() | b.tags.keys()):
        values = a.tags.get(key, ""), b.tags.get(key, "")
        if values[0] != values[1]:
            rows.append((key, *values))
    runs = [get_run(stores.tracking, v.run_id) for v in (a, b)]
    found = [run for run in runs if run is not None]
    if len(found) == len(runs):
        rows += [(key, *values) for key, values in differences(found)]
    print_table(console, ("", f"{name_1}/{a.version}", f"{name_2}/{b.version}"), rows)
    for v, run in zip((a, b), runs, strict=True):
        if run is None:
            warning = (
                f"{redacted(stores.tracking)} does not have the run {v.run_id or 'none'}: parameters are not compared"
            )
            console.print(warning, style="yellow", soft_wrap=True)


def history_command(console: Console, name: str, stores: Stores) -> None:
    """Prints a model's versions, newest first, with their aliases and promotions."""
    rows = []
    for v in versions(name, stores):
        tags = v.tags
        promotion = [tags.get(key, "") for key in (PROMOTED_AT, PREVIOUS_VERSION, "promoted.gain", "promoted.p")]
        top1 = tags.get("promoted.top1") or _top1_tag(v)
        rows.append((v.version, _aliases(v), top1, tags.get("epoch", ""), *promotion))
    print_table(console, ("version", "aliases", "top-1", "epoch", "promoted", "previous", "gain", "p"), rows)


def _names(stores: Stores) -> list[str]:
    """Returns the names of the registered models; does not create a missing store."""
    file = sqlite_file(stores.registry)
    return [] if file is not None and not file.exists() else registered_names(stores)


def _find(model: str, stores: Stores) -> tuple[str, ModelVersion]:
    """Finds a version by NAME@ALIAS, NAME/VERSION, either with the prefix `models:/`, or NAME for the newest."""
    text = model.removeprefix(REGISTRY)
    if "@" not in text and "/" not in text:
        found = versions(text, stores)
        if not found:
            raise UserError(f"{text} has no versions in {redacted(stores.registry)}.")
        return text, found[0]
    resolved = resolve(f"{REGISTRY}{text}", stores)
    return resolved.name, next(v for v in versions(resolved.name, stores) if v.version == resolved.version)


def _aliases(version: ModelVersion) -> str:
    return ", ".join(f"@{alias}" for alias in version.aliases)


def _top1_tag(version: ModelVersion) -> str:
    """Returns the top-1 accuracy at registration, as `349/360 = 96.94 % at 32` (pixels), or an empty string."""
    correct, total = version.tags.get("top1_correct"), version.tags.get("total")
    if correct is None or total is None:
        return ""
    side = json.loads(version.tags["transform"])["crop"] if "transform" in version.tags else "?"
    return f"{correct}/{total} = {100 * int(correct) / int(total):.2f} % at {side}"


def print_candidate(console: Console, candidate: "Candidate") -> None:
    """Prints the accuracies of the candidate and of the alias's current version, and McNemar's test."""
    paired, old_correct_N = candidate.paired, candidate.old_correct_N
    if old_correct_N is None or paired is None:
        console.print(
            f"{candidate.name} version {candidate.new}: {_top1(candidate.new_correct_N)}; @{candidate.alias} has no "
            f"version yet",
            soft_wrap=True,
        )
        return
    if candidate.old_non_finite:
        console.print(
            f"warning: version {candidate.old} gives NaN or infinities for {candidate.old_non_finite} images: they "
            f"count as wrong",
            style="yellow",
            soft_wrap=True,
        )
    for name, correct_N, only in (
        (f"version {candidate.new}", candidate.new_correct_N, paired.only_new),
        (f"@{candidate.alias}, {candidate.old}", old_correct_N, paired.only_old),
    ):
        console.print(f"{name:18}{_top1(correct_N)}, {only} that only this version predicts correctly", soft_wrap=True)
    console.print(f"{'gain':18}{paired.gain:+.2f} points, p {paired.p_value:.3g} (McNemar's exact test, one-sided)")


def _top1(correct_N: NDArray[np.bool_]) -> str:
    return f"top-1 {correct_N.sum()}/{len(correct_N)} = {100 * correct_N.mean():.2f} %"
