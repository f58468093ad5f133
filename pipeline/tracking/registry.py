"""Look-ups in the model registry, with errors that say what there is."""

import difflib
import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.errors import UserError
from pipeline.files import atomic_folder
from pipeline.tracking.client import connect, connect_registry, first_line
from pipeline.tracking.stores import Stores, redacted

REGISTRY, RUNS = "models:/", "runs:/"
_MADE_BY = "made_by"  # tag of a registered model
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


def resolve(model_uri: str, stores: Stores) -> ResolvedModel:
    """Finds `models:/NAME@ALIAS` or `models:/NAME/VERSION` in the registry.

    Raises:
        UserError: the form is wrong, or there is no such name, alias or version; the message lists those there are.
    """
    match = _FORM.fullmatch(model_uri)
    if match is None:
        raise UserError(f"'{model_uri}' is not a model: write models:/NAME@ALIAS or models:/NAME/VERSION.")
    client = connect_registry(stores)
    name, alias, version = match["name"], match["alias"], match["version"]
    try:
        if alias is not None:
            found = client.get_model_version_by_alias(name, alias)
        else:
            found = client.get_model_version(name, version)
    except MlflowException as error:
        raise UserError(_what_there_is(client, stores, name, model_uri)) from error
    return ResolvedModel(found.name, str(found.version), found.run_id or "")


def download(model_uri: str, stores: Stores, cache: Path) -> Path:
    """The folder with a stored model's card and weights, downloaded into `cache` unless it is there.

    `model_uri` is `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or `runs:/ID/NAME` for a model of a run.

    Raises:
        UserError: there is no such model, it was not stored by this project, or it cannot be read.
    """
    if model_uri.startswith(RUNS):
        store = server = stores.tracking
        model_id, source = _model_of_run(connect(store), model_uri, store)
        folder, shown_as = cache / model_id, model_uri
    else:
        store, model = stores.registry, resolve(model_uri, stores)
        # What a server passes on has no host in its address: a registry's server passes on what it has itself.
        server = store if store.startswith("http") else stores.tracking
        source = connect_registry(stores).get_model_version_download_uri(model.name, model.version)
        folder, shown_as = cache / f"{model.name}-{model.version}-{model.run_id[:8]}", model.uri
    if not folder.exists():
        try:
            with redirect_stderr(io.StringIO()), atomic_folder(folder) as aside:  # its progress bar
                given = aside / "download"
                found = download_artifacts(
                    source, dst_path=str(given), tracking_uri=server, registry_uri=stores.registry
                )
                for part in list(Path(found).iterdir()):  # which is `given`, or a folder in it
                    part.rename(aside / part.name)
                shutil.rmtree(given)
        except Exception as error:  # each kind of artifact store has errors of its own
            raise UserError(f"{model_uri} cannot be read from {redacted(store)}: {first_line(error, store)}") from error
    if not (folder / "artifacts" / "model.json").is_file():
        raise UserError(f"{model_uri} ({shown_as} in {redacted(store)}) has no model card: it is not of this project.")
    return folder / "artifacts"


def _model_of_run(client: MlflowClient, model_uri: str, uri: str) -> tuple[str, str]:
    """The id of a run's model, and where its files are."""
    run_id, _, name = model_uri.removeprefix(RUNS).partition("/")
    try:
        experiment = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        raise UserError(
            f"there is no run {run_id} in {redacted(uri)}; `densenet runs list` shows those there are."
        ) from error
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    for model in models:
        if model.name == name:
            return model.model_id, model.artifact_location
    names = ", ".join(sorted({model.name for model in models})) or "none"
    raise UserError(f"the run {run_id} has no model '{name}', it has: {names}. Write runs:/ID/NAME.")


def _what_there_is(client: MlflowClient, stores: Stores, name: str, model_uri: str) -> str:
    where = redacted(stores.registry)
    names = [model.name for model in client.search_registered_models()]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=max(1, len(names)), cutoff=0)
        there = f"Registered: {', '.join(near)}." if near else "Nothing is registered there yet."
        return f"no model named '{name}' in {where}. {there}"
    aliases = [f"@{alias} (version {version})" for alias, version in client.get_registered_model(name).aliases.items()]
    versions = sorted((int(v.version) for v in client.search_model_versions(version_filter(name))), reverse=True)
    return (
        f"{model_uri} is not in {where}. Aliases of {name}: {', '.join(aliases) or 'none'}; "
        f"versions: {', '.join(map(str, versions)) or 'none'}."
    )


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model, with its aliases, its tags and the run that it comes from."""

    version: str
    run_id: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


def registered_names(stores: Stores) -> list[str]:
    """The names of all registered models.

    Raises:
        UserError: the registry does not answer, or the store has none.
    """
    client = connect_registry(stores)
    with _refusals(stores, "does not list its models"):
        return [model.name for model in client.search_registered_models()]


def versions(name: str, stores: Stores) -> list[ModelVersion]:
    """All versions of a model, newest first.

    Raises:
        UserError: there is no such model.
    """
    client = connect_registry(stores)
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        raise UserError(_what_there_is(client, stores, name, f"{REGISTRY}{name}")) from error
    found = client.search_model_versions(version_filter(name))
    return [
        ModelVersion(
            str(v.version),
            v.run_id or "",
            tuple(a for a, of in aliases.items() if str(of) == str(v.version)),
            dict(v.tags),
        )
        for v in sorted(found, key=lambda v: int(v.version), reverse=True)
    ]


def alias_version(name: str, alias: str, stores: Stores) -> str | None:
    """The version that an alias of a model stands for, or None."""
    return next((v.version for v in versions(name, stores) if alias in v.aliases), None)


def tag_version(name: str, version: str, key: str, value: str, stores: Stores) -> None:
    """Records something with a version.

    Raises:
        UserError: the registry refuses it.
    """
    with _refusals(stores, f"does not take a tag of {name} version {version}"):
        connect_registry(stores).set_model_version_tag(name, version, key, value)


def move_alias(name: str, alias: str, version: str, stores: Stores) -> None:
    """Makes an alias stand for a version.

    Raises:
        UserError: the registry refuses it.
    """
    with _refusals(stores, f"does not move {name}@{alias} to version {version}"):
        connect_registry(stores).set_registered_model_alias(name, alias, version)


def check_permissions(name: str, stores: Stores) -> None:
    """Tries what registering needs: the registered model is made where it is missing, and gets a tag.

    Raises:
        UserError: the registry refuses it, or the name is a prompt's.
    """
    client = connect_registry(stores)
    with _refusals(stores, f"does not let this user register {name}"):
        create_registered_model(client, name)
        try:
            client.get_registered_model(name)
        except MlflowException as error:  # it is there, and no model
            raise UserError(
                f"{name} is the name of a prompt in {redacted(stores.registry)}: set tracking.registered_model_name to another name."
            ) from error
        client.set_registered_model_tag(name, _MADE_BY, "densenet-pipeline")


def create_registered_model(client: MlflowClient, name: str) -> None:
    """Makes a registered model, unless there is one of this name.

    Raises:
        MlflowException: the registry refuses it.
    """
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise


def find_version(run_id: str, name: str, tags: dict[str, str], stores: Stores) -> str | None:
    """The newest version of a model that a run has registered with these tags, or None."""
    client = connect_registry(stores)
    with _refusals(stores, f"does not list the versions of {name}"):
        found = [v for v in client.search_model_versions(version_filter(name)) if v.run_id == run_id]
        same = [int(v.version) for v in found if tags.items() <= dict(v.tags).items()]
    return str(max(same)) if same else None


def check_attachable(model_uri: str, stores: Stores) -> None:
    """Looks whether files can be attached to a model version: they go to its run.

    Raises:
        UserError: there is no such version, or its run is not in the tracking store.
    """
    model = resolve(model_uri, stores)
    try:
        connect(stores.tracking).get_run(model.run_id)
    except MlflowException as error:
        raise UserError(
            f"{model_uri} is of the run {model.run_id or 'none'}, which {redacted(stores.tracking)} does not have: files "
            f"are attached to a version's run. Give its store as --uri, or leave --attach out."
        ) from error


def attach_to_version(model_uri: str, kind: str, file: Path, stores: Stores) -> str:
    """Stores a file or folder with the run of a model version, and its address as the version's tag `export.KIND`.

    Raises:
        UserError: there is no such version, or a store does not take the file or its tag.
    """
    model, client = resolve(model_uri, stores), connect(stores.tracking)
    folder = f"exports/{model.name}-{model.version}"
    try:
        if file.is_dir():
            client.log_artifacts(model.run_id, str(file), f"{folder}/{file.name}")
        else:
            client.log_artifact(model.run_id, str(file), folder)
    except Exception as error:  # each kind of artifact store has errors of its own
        uri = stores.tracking
        raise UserError(f"{file} cannot be stored in {redacted(uri)}: {first_line(error, uri)}") from error
    place = f"{RUNS}{model.run_id}/{folder}/{file.name}"
    tag_version(model.name, model.version, f"export.{kind}", place, stores)
    return place


def version_filter(name: str) -> str:
    """MLflow's search for the versions of a model."""
    quote = '"' if "'" in name else "'"
    return f"name={quote}{name}{quote}"


@contextmanager
def _refusals(stores: Stores, what: str) -> Iterator[None]:
    """Turns a registry's refusal into an error that names it."""
    try:
        yield
    except MlflowException as error:
        uri = stores.registry
        raise UserError(f"the registry at {redacted(uri)} {what}: {first_line(error, uri)}") from error
