"""`densenet models list|show|diff|history`: what the registry holds."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.promote import BEFORE, PROMOTED
from pipeline.errors import UserError
from pipeline.tracking.look import differences, past_run
from pipeline.tracking.registry import REGISTRY, Version, registered_names, resolve, versions
from pipeline.tracking.store import default_tracking_uri, shown


def registered_command(console: Console, uri: str | None) -> None:
    """Prints each registered model's versions that have an alias, and its newest one."""
    uri = uri or default_tracking_uri()
    names = _names(uri)
    if not names:
        console.print(f"no model is registered in {shown(uri)}", soft_wrap=True)
        return
    table = _table("registered", "version", "aliases", "top-1", "epoch", "promoted", "run")
    for name in names:
        found = versions(name, uri)
        for v in found:
            if v.aliases or v is found[0]:
                tags = v.tags
                told = [_hits(v), tags.get("epoch", ""), tags.get(PROMOTED, "")[:10]]
                table.add_row(name, v.version, _aliases(v), *told, v.run_id[:8])
    console.print(table)


def registered_as_json(uri: str | None) -> None:
    """Prints all versions of all registered models, newest first, by the models' names."""
    uri = uri or default_tracking_uri()
    print(json.dumps({name: [asdict(v) for v in versions(name, uri)] for name in _names(uri)}, indent=2))


def show_command(console: Console, model: str, uri: str | None, as_json: bool) -> None:
    """Prints what is known of a model version."""
    uri = uri or default_tracking_uri()
    name, v = _find(model, uri)
    if as_json:
        print(json.dumps({"name": name} | asdict(v), indent=2))
        return
    lines = [("model", f"{REGISTRY}{name}/{v.version}"), ("aliases", _aliases(v) or "none"), ("top-1", _hits(v))]
    lines += [(key, value) for key, value in sorted(v.tags.items())]
    lines += [("run", v.run_id)]
    width = max(len(key) for key, _ in lines) + 2
    for key, value in lines:
        console.print(f"{key:{width}}{value}", markup=False, soft_wrap=True)


def diff_command(console: Console, first: str, second: str, uri: str | None) -> None:
    """Prints what two model versions differ in: tags, and the parameters of their runs."""
    uri = uri or default_tracking_uri()
    (name_1, a), (name_2, b) = _find(first, uri), _find(second, uri)
    table = _table("", f"{name_1}/{a.version}", f"{name_2}/{b.version}")
    table.add_row("aliases", _aliases(a), _aliases(b))
    for key in sorted(a.tags.keys() | b.tags.keys()):
        values = a.tags.get(key, ""), b.tags.get(key, "")
        if values[0] != values[1]:
            table.add_row(key, *values)
    for key, given in differences([past_run(uri, "", v.run_id) for v in (a, b)]):
        table.add_row(key, *given)
    console.print(table)


def history_command(console: Console, name: str, uri: str | None) -> None:
    """Prints the versions of a model, newest first, with their aliases and what they were promoted on."""
    table = _table("version", "aliases", "top-1", "epoch", "promoted", "against", "gain", "p")
    for v in versions(name, uri or default_tracking_uri()):
        tags = v.tags
        told = [tags.get(key, "") for key in (PROMOTED, BEFORE, "promoted.gain", "promoted.p")]
        table.add_row(v.version, _aliases(v), tags.get("promoted.top1") or _hits(v), tags.get("epoch", ""), *told)
    console.print(table)


def _names(uri: str) -> list[str]:
    """The registered models; none where there is no store yet, which a look does not make."""
    file = uri.removeprefix("sqlite:///")
    return [] if file != uri and not Path(file).exists() else registered_names(uri)


def _find(model: str, uri: str) -> tuple[str, Version]:
    """A version by NAME@ALIAS, NAME/VERSION, either with `models:/` before it, or NAME for the newest one."""
    text = model.removeprefix(REGISTRY)
    if "@" not in text and "/" not in text:
        found = versions(text, uri)
        if not found:
            raise UserError(f"{text} has no versions in {shown(uri)}.")
        return text, found[0]
    resolved = resolve(f"{REGISTRY}{text}", uri)
    return resolved.name, next(v for v in versions(resolved.name, uri) if v.version == resolved.version)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _aliases(version: Version) -> str:
    return ", ".join(f"@{alias}" for alias in version.aliases)


def _hits(version: Version) -> str:
    """`349/360 = 96.94 %` of the evaluation that the version was registered with."""
    hits, total = version.tags.get("top1_correct"), version.tags.get("total")
    if hits is None or total is None:
        return ""
    side = json.loads(version.tags["transform"])["crop"] if "transform" in version.tags else "?"
    return f"{hits}/{total} = {100 * int(hits) / int(total):.2f} % at {side}"
