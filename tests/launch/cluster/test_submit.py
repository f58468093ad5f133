"""A submitted job's MLflow variables: the URIs of the submitter's shell, and no password."""

import pytest

from launch.cluster.submit import _job_env
from pipeline.errors import UserError


def test_the_uris_of_both_stores_are_sent_and_passwords_are_not(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://registry:5000")
    both = {"MLFLOW_TRACKING_URI": "http://tracking:5000", "MLFLOW_REGISTRY_URI": "http://registry:5000"}
    assert _job_env(()) == both
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///here.db")
    assert _job_env(()) == {"MLFLOW_TRACKING_URI": both["MLFLOW_TRACKING_URI"]}, "a local file is not sent"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://me:hunter2@registry:5000")
    with pytest.raises(UserError, match="MLFLOW_REGISTRY_URI holds a password, which is not sent") as error:
        _job_env(())
    assert "hunter2" not in str(error.value)
