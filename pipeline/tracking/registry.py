"""Model registry: resolve, download, tag and register models; errors list the existing names, aliases and versions."""

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
PROMOTED_AT, PREVIOUS_VERSION = "promoted.at", "promoted.before"  # tags of a model version
_MADE_BY = "made_by"  # tag of a registered model
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class ResolvedModel:
    """A registered model version. `uri` contains the version number, so it stays valid when an alias moves."""

    name: str
    version: str
    run_id: str

    @property
    def uri(self) -> str:
        """MLflow's URI of the version."""
        return f"models:/{self.name}/{self.version}"


def resolve(model_uri: str, stores: Stores) -> ResolvedModel:
    """Resolves `models:/NAME@ALIAS` or `models:/NAME/VERSION` in the registry.

    Raises:
        UserError: The URI is malformed, or the name, alias or version does not exist; the message lists those that do.
    """
    match = _MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise UserError(f"'{model_uri}' is not a model URI: write models:/NAME@ALIAS or models:/NAME/VERSION.")
    client = connect_registry(stores)
    name, alias, version = match["name"], match["alias"], match["version"]
    try:
        if alias is not None:
            model_version = client.get_model_version_by_alias(name, alias)
        else:
            model_version = client.get_model_version(name, version)
    except MlflowException as error:
        raise UserError(_not_found_message(client, stores, name, model_uri)) from error
    return ResolvedModel(model_version.name, str(model_version.version), model_version.run_id or "")


def download(model_uri: str, stores: Stores, cache: Path) -> Path:
    """Downloads a model into `cache`, unless it is cached; returns the folder with its model card and weights.

    `model_uri` is `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or `runs:/ID/NAME` for a model of a run.

    Raises:
        UserError: There is no such model, another program stored it, or it cannot be read.
    """
    if model_uri.startswith(RUNS):
        store = server = stores.tracking
        model_id, source = _model_of_run(connect(store), model_uri, store)
        folder, resolved_uri = cache / model_id, model_uri
    else:
        store, model = stores.registry, resolve(model_uri, stores)
        # The URI of a proxied artifact has no host; a registry server proxies only its own artifacts.
        server = store if store.startswith("http") else stores.tracking
        source = connect_registry(stores).get_model_version_download_uri(model.name, model.version)
        folder, resolved_uri = cache / f"{model.name}-{model.version}-{model.run_id[:8]}", model.uri
    if not folder.exists():
        try:
            with redirect_stderr(io.StringIO()), atomic_folder(folder) as temporary:  # MLflow's progress bar
                target = temporary / "download"
                downloaded = download_artifacts(
                    source, dst_path=str(target), tracking_uri=server, registry_uri=stores.registry
                )
                for part in list(Path(downloaded).iterdir()):  # MLflow returns `target`, or a folder in it
                    part.rename(temporary / part.name)
                shutil.rmtree(target)
        except Exception as error:  # artifact stores raise errors of many kinds
            raise UserError(f"{model_uri} cannot be read from {redacted(store)}: {first_line(error, store)}") from error
    if not (folder / "artifacts" / "model.json").is_file():
        raise UserError(
            f"{model_uri} ({resolved_uri} in {redacted(store)}) has no model card: another program stored it. Use a "
            f"model of this project."
        )
    return folder / "artifacts"


def _model_of_run(client: MlflowClient, model_uri: str, uri: str) -> tuple[str, str]:
    """Returns the id and the artifact location of a run's model."""
    run_id, _, name = model_uri.removeprefix(RUNS).partition("/")
    try:
        experiment = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        raise UserError(f"there is no run {run_id} in {redacted(uri)}; `densenet runs list` lists the runs.") from error
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    for model in models:
        if model.name == name:
            return model.model_id, model.artifact_location
    names = ", ".join(sorted({model.name for model in models})) or "none"
    raise UserError(f"the run {run_id} has no model '{name}', its models: {names}. Write runs:/ID/NAME.")


def _not_found_message(client: MlflowClient, stores: Stores, name: str, model_uri: str) -> str:
    registry = redacted(stores.registry)
    names = [model.name for model in client.search_registered_models()]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=max(1, len(names)), cutoff=0)
        existing = f"Registered: {', '.join(close)}." if close else "No models are registered there yet."
        return f"no model named '{name}' in {registry}. {existing}"
    aliases = [f"@{alias} (version {version})" for alias, version in client.get_registered_model(name).aliases.items()]
    versions = sorted((int(v.version) for v in client.search_model_versions(version_filter(name))), reverse=True)
    return (
        f"{model_uri} is not in {registry}. Aliases of {name}: {', '.join(aliases) or 'none'}; "
        f"versions: {', '.join(map(str, versions)) or 'none'}."
    )


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model, with its source run, aliases and tags."""

    version: str
    run_id: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


def registered_names(stores: Stores) -> list[str]:
    """Returns the names of all registered models.

    Raises:
        UserError: The registry is unreachable, or the store has no registry.
    """
    client = connect_registry(stores)
    with _registry_errors(stores, "does not list its models"):
        return [model.name for model in client.search_registered_models()]


def versions(name: str, stores: Stores) -> list[ModelVersion]:
    """Returns all versions of a model, newest first.

    Raises:
        UserError: There is no such model.
    """
    client = connect_registry(stores)
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        raise UserError(_not_found_message(client, stores, name, f"{REGISTRY}{name}")) from error
    existing = client.search_model_versions(version_filter(name))
    return [
        ModelVersion(
            str(v.version),
            v.run_id or "",
            tuple(alias for alias, version in aliases.items() if str(version) == str(v.version)),
            dict(v.tags),
        )
        for v in sorted(existing, key=lambda v: int(v.version), reverse=True)
    ]


def alias_version(name: str, alias: str, stores: Stores) -> str | None:
    """Returns the version that an alias of a model points to, or None."""
    return next((v.version for v in versions(name, stores) if alias in v.aliases), None)


def tag_version(name: str, version: str, key: str, value: str, stores: Stores) -> None:
    """Sets a tag of a model version.

    Raises:
        UserError: The registry rejects it.
    """
    with _registry_errors(stores, f"rejects a tag of {name} version {version}"):
        connect_registry(stores).set_model_version_tag(name, version, key, value)


def move_alias(name: str, alias: str, version: str, stores: Stores) -> None:
    """Points an alias to a version.

    Raises:
        UserError: The registry rejects it.
    """
    with _registry_errors(stores, f"does not move {name}@{alias} to version {version}"):
        connect_registry(stores).set_registered_model_alias(name, alias, version)


def check_permissions(name: str, stores: Stores) -> None:
    """Checks write permission: creates the registered model if it is missing, and sets a tag.

    Raises:
        UserError: The registry rejects it, or the name belongs to a prompt.
    """
    client = connect_registry(stores)
    with _registry_errors(stores, f"does not allow this user to register {name}"):
        create_registered_model(client, name)
        try:
            client.get_registered_model(name)
        except MlflowException as error:  # the name exists, but is not a model
            raise UserError(
                f"{name} is the name of a prompt in {redacted(stores.registry)}: set tracking.registered_model_name to "
                f"another name."
            ) from error
        client.set_registered_model_tag(name, _MADE_BY, "densenet-pipeline")


def create_registered_model(client: MlflowClient, name: str) -> None:
    """Creates a registered model, unless it exists.

    Raises:
        MlflowException: The registry rejects it.
    """
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
            raise


def find_version(run_id: str, name: str, tags: dict[str, str], stores: Stores) -> str | None:
    """Returns the newest version of a model that a run has registered with these tags, or None."""
    client = connect_registry(stores)
    with _registry_errors(stores, f"does not list the versions of {name}"):
        of_run = [v for v in client.search_model_versions(version_filter(name)) if v.run_id == run_id]
        matching = [int(v.version) for v in of_run if tags.items() <= dict(v.tags).items()]
    return str(max(matching)) if matching else None


def check_attachable(model_uri: str, stores: Stores) -> None:
    """Checks that files can be attached to a model version; they are stored with its run.

    Raises:
        UserError: There is no such version, or its run is not in the tracking store.
    """
    model = resolve(model_uri, stores)
    try:
        connect(stores.tracking).get_run(model.run_id)
    except MlflowException as error:
        raise UserError(
            f"{model_uri} belongs to the run {model.run_id or 'none'}, which is not in {redacted(stores.tracking)}: "
            f"--attach stores files with the run. Pass the tracking store of that run as --uri, or omit --attach."
        ) from error


def attach_to_version(model_uri: str, kind: str, file: Path, stores: Stores) -> str:
    """Stores a file or folder with the run of a model version; returns its URI and sets it as the tag `export.KIND`.

    Raises:
        UserError: There is no such version, or a store rejects the file or the tag.
    """
    model, client = resolve(model_uri, stores), connect(stores.tracking)
    folder = f"exports/{model.name}-{model.version}"
    try:
        if file.is_dir():
            client.log_artifacts(model.run_id, str(file), f"{folder}/{file.name}")
        else:
            client.log_artifact(model.run_id, str(file), folder)
    except Exception as error:  # artifact stores raise errors of many kinds
        uri = stores.tracking
        raise UserError(f"{file} cannot be stored in {redacted(uri)}: {first_line(error, uri)}") from error
    artifact_uri = f"{RUNS}{model.run_id}/{folder}/{file.name}"
    tag_version(model.name, model.version, f"export.{kind}", artifact_uri, stores)
    return artifact_uri


def version_filter(name: str) -> str:
    """Returns the MLflow filter string for the versions of a model."""
    quote = '"' if "'" in name else "'"
    return f"name={quote}{name}{quote}"


@contextmanager
def _registry_errors(stores: Stores, what: str) -> Iterator[None]:
    """Turns errors of the registry into a `UserError` that names the registry."""
    try:
        yield
    except MlflowException as error:
        uri = stores.registry
        raise UserError(f"the registry at {redacted(uri)} {what}: {first_line(error, uri)}") from error
