"""Where runs are kept and models are registered: chosen once, from config, options and environment."""

import shlex

import pytest

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking.stores import Stores, redacted, stores_from_config, stores_from_options

HTTP = "http://127.0.0.1:5000"


def config(**tracking: str) -> RunConfig:
    return RunConfig.model_validate({"run": {"output": "/runs"}, "tracking": tracking})


def test_config_comes_before_the_environment_and_the_registry_is_the_tracking_store(monkeypatch):
    assert stores_from_config(config()) == Stores("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db")
    assert not stores_from_config(config()).separate_registry
    monkeypatch.setenv("MLFLOW_TRACKING_URI", HTTP + "/")
    assert stores_from_config(config()) == Stores(HTTP, HTTP)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:////registry.db")
    assert stores_from_config(config()) == Stores(HTTP, "sqlite:////registry.db")
    assert stores_from_config(config()).separate_registry
    named = config(uri="sqlite:////a.db", registry_uri=HTTP)
    assert stores_from_config(named) == Stores("sqlite:////a.db", HTTP)
    assert stores_from_options("sqlite:////b.db", None) == Stores("sqlite:////b.db", "sqlite:////registry.db")
    assert stores_from_options(None, "sqlite:////c.db") == Stores(HTTP, "sqlite:////c.db")


def test_a_command_is_given_what_it_would_not_find_by_itself(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cases = [{}, {"MLFLOW_TRACKING_URI": HTTP}, {"MLFLOW_REGISTRY_URI": "sqlite:////r.db"}]
    for environment in cases:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert stores_from_options(None, None).options() == (
            " --registry-uri sqlite:////r.db" if "MLFLOW_REGISTRY_URI" in environment else ""
        )
        for stores in (
            Stores("sqlite:////a b.db", "sqlite:////a b.db"),
            Stores("sqlite:////a.db", "sqlite:////r.db"),
            Stores(HTTP, "sqlite:////s.db"),
        ):
            words = shlex.split(stores.options())
            given = dict(zip(words[::2], words[1::2], strict=True))
            assert stores_from_options(given.get("--uri"), given.get("--registry-uri")) == stores, (environment, given)


def test_relative_paths_are_absolute_and_passwords_are_not_shown(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert stores_from_options("sqlite:///mine.db", None).tracking == f"sqlite:///{tmp_path}/mine.db"
    assert stores_from_options(None, None).tracking == f"sqlite:///{tmp_path}/outputs/mlflow.db"
    assert redacted("http://me:secret@host:5000") == "http://me:***@host:5000"
    with pytest.raises(UserError, match=r"run.output=/a\?b: MLflow takes what follows a `\?` for options"):
        stores_from_config(RunConfig.model_validate({"run": {"output": "/a?b"}}))
