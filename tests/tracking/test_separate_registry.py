"""A registry separate from the tracking store: version, tags, alias and files go there; all commands use it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.export.package import RegisteredModel, register
from pipeline.tracking.registry import check_permissions, tag_version
from pipeline.tracking.run import Tracker
from pipeline.tracking.stores import Stores
from pipeline.train.model_source import resolve_model
from pipeline.train.warm_start import find_pretrained
from tests.models import write_model
from tests.servers import MlflowServer

ELSEWHERE = {
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9",
    "MLFLOW_RUN_ID": "0" * 32,
    "MLFLOW_EXPERIMENT_ID": "77",
    "MLFLOW_EXPERIMENT_NAME": "another",
    "MLFLOW_ACTIVE_MODEL_ID": "m-" + "0" * 32,
    "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
    "_MLFLOW_SERVER_ARTIFACT_ROOT": "/nowhere",
}
NAMES = {"name": "tiny", "alias": "candidate", "data_fingerprint": "f00d"}


def log_run(folder: Path, registry: str, seed: int = 1) -> Tracker:
    """Logs a run whose models go to the registry `registry`."""
    tracking = {"uri": f"sqlite:///{folder}/mlflow.db", "registry_uri": registry}
    config = RunConfig.model_validate({"run": {"output": str(folder), "name": f"run{seed}"}, "tracking": tracking})
    with Tracker(config, folder / f"run{seed}", f"run{seed}", print) as tracker:
        tracker.log_params({"optim.lr": 0.1 * seed})
        tracker.log_metrics({"loss": 1.0}, 1)
    assert not tracker.unsent
    return tracker


def registered(folder: Path, tracker: Tracker, seed: int = 1, **changes: str) -> RegisteredModel:
    checkpoint = folder / f"checkpoint{seed}"
    if not checkpoint.exists():
        write_model(checkpoint, seed=seed)
    return register(checkpoint, stores=tracker.stores, run_id=str(tracker.run_id), **(NAMES | changes))


@pytest.fixture(scope="module", params=["file", pytest.param("server", marks=[pytest.mark.slow, pytest.mark.long])])
def registry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a registry: a SQLite file, or a server with its own artifact store."""
    folder = tmp_path_factory.mktemp("registry")
    if request.param == "file":
        yield f"sqlite:///{folder}/registry.db"
        return
    server = MlflowServer(folder, options=["--artifacts-destination", f"{folder}/files"])
    yield server.uri
    server.stop()


@pytest.fixture(scope="module")
def stores(registry: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stores, Path]:
    """Models of two runs in the registry, registered while the environment named other stores; and the folder."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ELSEWHERE.items():
            patch.setenv(name, value)
        for seed in (1, 2):
            tracker = log_run(folder, registry, seed)
            check_permissions("tiny", tracker.stores)
            assert registered(folder, tracker, seed).version == str(seed)
    return tracker.stores, folder


def test_version_tags_and_alias_are_in_the_registry_only(stores):
    (at, _), client = stores, MlflowClient(stores[0].tracking, stores[0].registry)
    assert at.separate_registry
    version = client.get_model_version_by_alias("tiny", "candidate")
    assert (str(version.version), version.tags["samples_seen"]) == ("2", "123")
    assert client.get_run(version.run_id).info.run_name == "run2"
    (model,) = client.get_run(version.run_id).outputs.model_outputs
    assert client.get_logged_model(model.model_id).status.value == "READY"
    assert MlflowClient(at.tracking, at.tracking).search_registered_models() == []


def test_models_are_located_through_the_registry_and_through_their_run(stores, tmp_path, monkeypatch):
    at, folder = stores
    run_id = MlflowClient(at.tracking, at.registry).get_model_version("tiny", "1").run_id
    for name, value in ELSEWHERE.items():
        monkeypatch.setenv(name, value)
    weights = (folder / "checkpoint1" / "model.safetensors").read_bytes()
    for name in ("models:/tiny/1", f"runs:/{run_id}/model"):
        assert (resolve_model(name, "MODEL", tmp_path / "cache", at) / "model.safetensors").read_bytes() == weights
    tracking = {"uri": at.tracking, "registry_uri": at.registry}
    tree = {"run": {"output": str(tmp_path)}, "model": {"weights": "models:/tiny@candidate"}, "tracking": tracking}
    checkpoint = find_pretrained(RunConfig.model_validate(tree)).weights
    expected = (folder / "checkpoint2" / "model.safetensors").read_bytes()
    assert (checkpoint / "model.safetensors").read_bytes() == expected


@pytest.fixture
def command(stores, densenet) -> Callable[..., str]:
    """`command(*arguments)` runs `densenet` with both URIs and returns its output."""

    def run(*arguments: object) -> str:
        code, printed = densenet(*arguments, "--uri", stores[0].tracking, "--registry-uri", stores[0].registry)
        assert code == 0, printed
        return printed

    return run


def test_all_commands_work_with_two_uris(stores, command, tmp_path):
    at, _ = stores
    assert "@candidate" in command("models", "list")
    assert set(json.loads(command("models", "list", "--json"))) == {"tiny"}
    assert "models:/tiny/2" in command("models", "show", "tiny@candidate")
    assert "optim.lr" in command("models", "diff", "tiny/1", "tiny/2")
    assert "@candidate" in command("models", "history", "tiny")
    image = tmp_path / "set" / "val" / "cat" / "0.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (50, 50), (9, 99, 199)).save(image)
    assert "%" in command("predict", "models:/tiny@candidate", image)
    assert "plain" in command("eval", "models:/tiny/1", "--data", tmp_path / "set")
    assert "tiny@champion is version 1 now" in command("models", "promote", "tiny/1", "--data", tmp_path / "set")
    printed = command("export", "models:/tiny@champion", "--to", "timm", "--out", tmp_path / "out", "--attach")
    version = MlflowClient(at.tracking, at.registry).get_model_version_by_alias("tiny", "champion")
    assert version.tags["export.timm"] in " ".join(printed.split())


def test_registering_again_after_a_rejected_alias_reuses_the_version(stores):
    at, folder = stores
    client = MlflowClient(at.tracking, at.registry)
    run_id = str(client.get_model_version("tiny", "1").run_id)

    def make(alias: str) -> RegisteredModel:
        names = NAMES | {"name": "small", "alias": alias}
        return register(folder / "checkpoint1", stores=at, run_id=run_id, **names)

    with pytest.raises(UserError, match=r"does not move small@latest to version 1: .*reserved"):
        make("latest")
    assert make("candidate") == RegisteredModel("small", "1", "candidate")
    assert [str(version.version) for version in client.search_model_versions("name='small'")] == ["1"]


def test_a_registry_error_names_the_registry(stores):
    with pytest.raises(UserError, match=r"the registry at .* rejects a tag of tiny version 99: "):
        tag_version("tiny", "99", "a", "b", stores[0])
