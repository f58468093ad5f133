"""What the registry holds, as tables."""

import json
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from launch.cli.common.tables import print_table
from launch.run.promote import BEFORE, PROMOTED, Candidate
from pipeline.errors import UserError
from pipeline.tracking.queries import differences, get_run
from pipeline.tracking.registry import REGISTRY, ModelVersion, registered_names, resolve, versions
from pipeline.tracking.stores import Stores, redacted, sqlite_file


def registered_command(console: Console, stores: Stores) -> None:
    """Prints each registered model's versions that have an alias, and its newest one."""
    names = _names(stores)
    if not names:
        console.print(f"no model is registered in {redacted(stores.registry)}", soft_wrap=True)
        return
    rows = []
    for name in names:
        found = versions(name, stores)
        for v in found:
            if v.aliases or v is found[0]:
                tags = v.tags
                told = [_hits(v), tags.get("epoch", ""), tags.get(PROMOTED, "")[:10]]
                rows.append((name, v.version, _aliases(v), *told, v.run_id[:8]))
    print_table(console, ("registered", "version", "aliases", "top-1", "epoch", "promoted", "run"), rows)


def registered_as_json(stores: Stores) -> None:
    """Prints all versions of all registered models, newest first, by the models' names."""
    print(json.dumps({name: [asdict(v) for v in versions(name, stores)] for name in _names(stores)}, indent=2))


def show_command(console: Console, model: str, stores: Stores, as_json: bool) -> None:
    """Prints what is known of a model version."""
    name, v = _find(model, stores)
    if as_json:
        print(json.dumps({"name": name} | asdict(v), indent=2))
        return
    lines = [("model", f"{REGISTRY}{name}/{v.version}"), ("aliases", _aliases(v) or "none"), ("top-1", _hits(v))]
    lines += [(key, value) for key, value in sorted(v.tags.items())]
    lines += [("run", v.run_id)]
    width = max(len(key) for key, _ in lines) + 2
    for key, value in lines:
        console.print(f"{key:{width}}{value}", markup=False, soft_wrap=True)


def diff_command(console: Console, first: str, second: str, stores: Stores) -> None:
    """Prints what two model versions differ in: tags, and the parameters of their runs."""
    (name_1, a), (name_2, b) = _find(first, stores), _find(second, stores)
    rows: list[tuple[str, ...]] = [("aliases", _aliases(a), _aliases(b))]
    for key in sorted(a.tags.keys() | b.tags.keys()):
        values = a.tags.get(key, ""), b.tags.get(key, "")
        if values[0] != values[1]:
            rows.append((key, *values))
    runs = [get_run(stores.tracking, v.run_id) for v in (a, b)]
    known = [run for run in runs if run is not None]
    if len(known) == len(runs):
        rows += [(key, *given) for key, given in differences(known)]
    print_table(console, ("", f"{name_1}/{a.version}", f"{name_2}/{b.version}"), rows)
    for v, run in zip((a, b), runs, strict=True):
        if run is None:
            told = (
                f"{redacted(stores.tracking)} does not have the run {v.run_id or 'none'}: parameters are not compared"
            )
            console.print(told, style="yellow", soft_wrap=True)


def history_command(console: Console, name: str, stores: Stores) -> None:
    """Prints the versions of a model, newest first, with their aliases and what they were promoted on."""
    rows = []
    for v in versions(name, stores):
        tags = v.tags
        told = [tags.get(key, "") for key in (PROMOTED, BEFORE, "promoted.gain", "promoted.p")]
        rows.append((v.version, _aliases(v), tags.get("promoted.top1") or _hits(v), tags.get("epoch", ""), *told))
    print_table(console, ("version", "aliases", "top-1", "epoch", "promoted", "against", "gain", "p"), rows)


def _names(stores: Stores) -> list[str]:
    """The registered models; none where there is no store yet, which a look does not make."""
    file = sqlite_file(stores.registry)
    return [] if file is not None and not file.exists() else registered_names(stores)


def _find(model: str, stores: Stores) -> tuple[str, ModelVersion]:
    """A version by NAME@ALIAS, NAME/VERSION, either with `models:/` before it, or NAME for the newest one."""
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


def _hits(version: ModelVersion) -> str:
    """`349/360 = 96.94 %` of the evaluation that the version was registered with."""
    hits, total = version.tags.get("top1_correct"), version.tags.get("total")
    if hits is None or total is None:
        return ""
    side = json.loads(version.tags["transform"])["crop"] if "transform" in version.tags else "?"
    return f"{hits}/{total} = {100 * int(hits) / int(total):.2f} % at {side}"


def print_candidate(console: Console, found: Candidate) -> None:
    """Prints a model's hits beside those of the version that an alias has now."""
    if found.old_N is None or found.paired is None:
        console.print(
            f"{found.name} version {found.new}: {_top1(found.new_N)}; {found.alias} is no version yet", soft_wrap=True
        )
        return
    if found.old_non_finite:
        console.print(
            f"warning: version {found.old} gives NaN or infinities for {found.old_non_finite} images: they are misses",
            style="yellow",
            soft_wrap=True,
        )
    for name, hits_N, only in (
        (f"version {found.new}", found.new_N, found.paired.only_new),
        (f"@{found.alias}, {found.old}", found.old_N, found.paired.only_old),
    ):
        console.print(f"{name:18}{_top1(hits_N)}, {only} that the other one misses", soft_wrap=True)
    console.print(
        f"{'gain':18}{found.paired.gain:+.2f} points, p {found.paired.p_value:.3g} (McNemar's exact test, one-sided)"
    )


def _top1(hits_N: NDArray[np.bool_]) -> str:
    return f"top-1 {hits_N.sum()}/{len(hits_N)} = {100 * hits_N.mean():.2f} %"
