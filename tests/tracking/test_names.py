"""Name rules compared with MLflow's validators: MLflow accepts every name that the config accepts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.utils import validation

from pipeline.config import Tracking
from pipeline.mlflow_names import alias_error, experiment_name_error, model_name_error

TEXT = st.text(st.sampled_from("abvV019-_./:@ '\"\\\0é"), max_size=6)
ALIASES = ["latest", "LATEST", "v1", "V12", "v", "va1", "candidate", "a-b_c", "1", "", "a b", "a" * 255, "a" * 256]
NAMES = ["a:b", "a/b", "a", "..", ".", " ", "", "a b", "densenet121", "é", "a@b"]


def accepts(check, *values) -> bool:
    try:
        check(*values)
    except MlflowException:
        return False
    return True


def accepts_alias(alias: str) -> bool:
    checks = (validation._validate_model_alias_name, validation._validate_model_alias_name_reserved)
    return all(accepts(check, alias) for check in checks)


@given(st.one_of(TEXT, st.sampled_from([*ALIASES, *NAMES])))
def test_mlflow_accepts_every_name_that_the_config_accepts(name):
    if alias_error(name) is None:
        assert accepts_alias(name)
    if model_name_error(name) is None:
        assert accepts(validation._validate_model_name, name)
    if experiment_name_error(name) is None:
        assert accepts(validation._validate_experiment_name, name)


def test_reserved_names_are_rejected_and_common_names_are_not():
    for alias in ALIASES:
        if not accepts_alias(alias):
            assert alias_error(alias) is not None, alias
    for alias in ("candidate", "champion", "v", "va1", "latest-one", "a" * 255):
        assert alias_error(alias) is None, alias
    for name in ("densenet121", "my model", "a.b-c_d"):
        assert model_name_error(name) is None, name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("alias", "latest", "is reserved by MLflow"),
        ("alias", "v1", "is reserved by MLflow"),
        ("alias", "a b", "must be letters"),
        ("registered_model_name", "a:b", "must not be blank, begin with a dot, or contain slashes, colons"),
        ("registered_model_name", " ", "must not be blank"),
        ("experiment", "", "must not be blank"),
        ("experiment", "e" * 501, "at most 500 characters"),
        ("registry_uri", "http://me:secret@host", "must not contain a password"),
    ],
)
def test_the_config_rejects_invalid_names(key, value, message):
    with pytest.raises(ValueError, match=message):
        Tracking.model_validate({key: value})
