"""What a submitted job is told of MLflow: the addresses of the submitter's shell, and no password."""

import pytest

from launch.cluster.submit import _variables
from pipeline.errors import UserError


def test_the_addresses_of_both_stores_go_along_and_passwords_do_not(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://registry:5000")
    both = {"MLFLOW_TRACKING_URI": "http://tracking:5000", "MLFLOW_REGISTRY_URI": "http://registry:5000"}
    assert _variables(()) == both
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///here.db")
    assert _variables(()) == {"MLFLOW_TRACKING_URI": both["MLFLOW_TRACKING_URI"]}, "a file of this machine"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://me:hunter2@registry:5000")
    with pytest.raises(UserError, match="MLFLOW_REGISTRY_URI holds a password, which is not sent") as error:
        _variables(())
    assert "hunter2" not in str(error.value)
