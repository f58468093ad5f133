"""Look-ups in the model registry, with errors that say what there is."""

import difflib
import io
import os
import re
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.tracking.store import connect, first_line, shown

REGISTRY, RUNS = "models:/", "runs:/"
_FORM = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class ResolvedModel:
    """A registered model version; `uri` names it by its number, which never moves."""

    name: str
    version: str
    run_id: str

    @property
    def uri(self) -> str:
        """MLflow's address of the version."""
        return f"models:/{self.name}/{self.version}"


def resolve(model_uri: str, uri: str) -> ResolvedModel:
    """Finds `models:/NAME@ALIAS` or `models:/NAME/VERSION` in the registry at `uri`.

    Raises:
        UserError: the form is wrong, or there is no such name, alias or version; the message lists those there are.
    """
    match = _FORM.fullmatch(model_uri)
    if match is None:
        raise UserError(f"'{model_uri}' is not a model: write models:/NAME@ALIAS or models:/NAME/VERSION.")
    client = connect(uri)
    name, alias, version = match["name"], match["alias"], match["version"]
    try:
        if alias is not None:
            found = client.get_model_version_by_alias(name, alias)
        else:
            found = client.get_model_version(name, version)
    except MlflowException as error:
        raise UserError(_what_there_is(client, uri, name, model_uri)) from error
    return ResolvedModel(found.name, str(found.version), found.run_id)


def download(model_uri: str, uri: str, cache: Path) -> Path:
    """The folder with a stored model's card and weights, downloaded into `cache` unless it is there.

    `model_uri` is `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or `runs:/ID/NAME` for a model of a run.

    Raises:
        UserError: there is no such model, it was not stored by this project, or it cannot be read.
    """
    client = connect(uri)
    if model_uri.startswith(RUNS):
        source = _model_of_run(client, model_uri, uri)
        folder, shown_as = cache / source.removeprefix("models:/"), model_uri
    else:
        model = resolve(model_uri, uri)
        source = client.get_model_version_download_uri(model.name, model.version)
        folder, shown_as = cache / f"{model.name}-{model.version}-{model.run_id[:8]}", model.uri
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        try:
            with redirect_stderr(io.StringIO()):  # its progress bar
                found = mlflow.artifacts.download_artifacts(source, dst_path=str(partial), tracking_uri=uri)
            Path(found).rename(folder)
        except Exception as error:  # each kind of artifact store has errors of its own
            raise UserError(f"{model_uri} cannot be read from {shown(uri)}: {first_line(error, uri)}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if not (folder / "artifacts" / "model.json").is_file():
        raise UserError(f"{model_uri} ({shown_as} in {shown(uri)}) has no model card: it is not of this project.")
    return folder / "artifacts"


def _model_of_run(client: MlflowClient, model_uri: str, uri: str) -> str:
    """The address `models:/m-...` of a run's model."""
    run_id, _, name = model_uri.removeprefix(RUNS).partition("/")
    try:
        experiment = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        raise UserError(
            f"there is no run {run_id} in {shown(uri)}; `densenet runs list` shows those there are."
        ) from error
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    for model in models:
        if model.name == name:
            return f"models:/{model.model_id}"
    names = ", ".join(sorted({model.name for model in models})) or "none"
    raise UserError(f"the run {run_id} has no model '{name}', it has: {names}. Write runs:/ID/NAME.")


def _what_there_is(client: MlflowClient, uri: str, name: str, model_uri: str) -> str:
    names = [model.name for model in client.search_registered_models()]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=max(1, len(names)), cutoff=0)
        there = f"Registered: {', '.join(near)}." if near else "Nothing is registered there yet."
        return f"no model named '{name}' in {shown(uri)}. {there}"
    aliases = [f"@{alias} (version {version})" for alias, version in client.get_registered_model(name).aliases.items()]
    versions = sorted((int(v.version) for v in client.search_model_versions(f"name='{name}'")), reverse=True)
    return (
        f"{model_uri} is not in {shown(uri)}. Aliases of {name}: {', '.join(aliases) or 'none'}; "
        f"versions: {', '.join(map(str, versions)) or 'none'}."
    )


@dataclass(frozen=True)
class Version:
    """A version of a registered model, with its aliases, its tags and the run that it comes from."""

    version: str
    run_id: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


def registered_names(uri: str) -> list[str]:
    """The names of all registered models.

    Raises:
        UserError: the store at `uri` does not answer, or has no registry.
    """
    client = connect(uri)
    try:
        return [model.name for model in client.search_registered_models()]
    except MlflowException as error:
        raise UserError(f"the store at {shown(uri)} has no model registry: {first_line(error, uri)}") from error


def versions(name: str, uri: str) -> list[Version]:
    """All versions of a model, newest first.

    Raises:
        UserError: there is no such model.
    """
    client = connect(uri)
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        raise UserError(_what_there_is(client, uri, name, f"{REGISTRY}{name}")) from error
    found = client.search_model_versions(f"name='{name}'")
    return [
        Version(
            str(v.version),
            v.run_id or "",
            tuple(a for a, of in aliases.items() if str(of) == str(v.version)),
            dict(v.tags),
        )
        for v in sorted(found, key=lambda v: int(v.version), reverse=True)
    ]


def alias_version(name: str, alias: str, uri: str) -> str | None:
    """The version that an alias of a model stands for, or None."""
    return next((v.version for v in versions(name, uri) if alias in v.aliases), None)


def tag_version(name: str, version: str, key: str, value: str, uri: str) -> None:
    """Records something with a version."""
    connect(uri).set_model_version_tag(name, version, key, value)


def move_alias(name: str, alias: str, version: str, uri: str) -> None:
    """Makes an alias stand for a version."""
    connect(uri).set_registered_model_alias(name, alias, version)


def attach_to_version(model_uri: str, kind: str, file: Path, uri: str) -> str:
    """Stores a file or folder with the run of a model version, and its address as the version's tag `export.KIND`.

    Raises:
        UserError: there is no such version, or the store does not take the file.
    """
    model, client = resolve(model_uri, uri), connect(uri)
    folder = f"exports/{model.name}-{model.version}"
    try:
        if file.is_dir():
            client.log_artifacts(model.run_id, str(file), f"{folder}/{file.name}")
        else:
            client.log_artifact(model.run_id, str(file), folder)
    except Exception as error:  # each kind of artifact store has errors of its own
        raise UserError(f"{file} cannot be stored in {shown(uri)}: {first_line(error, uri)}") from error
    place = f"{RUNS}{model.run_id}/{folder}/{file.name}"
    client.set_model_version_tag(model.name, model.version, f"export.{kind}", place)
    return place
