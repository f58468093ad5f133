"""Tracking and registry URIs: determined once from config, options and environment."""

import shlex

import pytest

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking.stores import Stores, redacted, stores_from_config, stores_from_options

HTTP = "http://127.0.0.1:5000"


def config(**tracking: str) -> RunConfig:
    return RunConfig.model_validate({"run": {"output": "/runs"}, "tracking": tracking})


def test_the_config_overrides_the_environment_and_the_registry_defaults_to_the_tracking_store(monkeypatch):
    assert stores_from_config(config()) == Stores("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db")
    assert not stores_from_config(config()).separate_registry
    monkeypatch.setenv("MLFLOW_TRACKING_URI", HTTP + "/")
    assert stores_from_config(config()) == Stores(HTTP, HTTP)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:////registry.db")
    assert stores_from_config(config()) == Stores(HTTP, "sqlite:////registry.db")
    assert stores_from_config(config()).separate_registry
    explicit = config(uri="sqlite:////a.db", registry_uri=HTTP)
    assert stores_from_config(explicit) == Stores("sqlite:////a.db", HTTP)
    assert stores_from_options("sqlite:////b.db", None) == Stores("sqlite:////b.db", "sqlite:////registry.db")
    assert stores_from_options(None, "sqlite:////c.db") == Stores(HTTP, "sqlite:////c.db")


def test_options_contain_only_stores_that_differ_from_the_defaults(monkeypatch, tmp_path):
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
            options = dict(zip(words[::2], words[1::2], strict=True))
            parsed = stores_from_options(options.get("--uri"), options.get("--registry-uri"))
            assert parsed == stores, (environment, options)


def test_relative_paths_become_absolute_and_passwords_are_redacted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert stores_from_options("sqlite:///mine.db", None).tracking == f"sqlite:///{tmp_path}/mine.db"
    assert stores_from_options(None, None).tracking == f"sqlite:///{tmp_path}/outputs/mlflow.db"
    assert redacted("http://me:secret@host:5000") == "http://me:***@host:5000"
    with pytest.raises(UserError, match=r"run.output=/a\?b must not contain `\?`: MLflow reads the rest"):
        stores_from_config(RunConfig.model_validate({"run": {"output": "/a?b"}}))
