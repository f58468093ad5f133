"""The public API of the library."""

import subprocess
import sys

import pytest

import pipeline

HEAVY = ("torch", "nvidia", "deepspeed", "ray", "mlflow")


def test_import_pipeline_imports_no_heavy_packages():
    code = f"""
import sys, pipeline
config = pipeline.load_config("demo", "train.epochs=3")
assert config.train.epochs == 3 and issubclass(pipeline.DataError, pipeline.UserError)
print(sorted({set(HEAVY)} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_importable():
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__module__.startswith("pipeline."), name
        assert name in dir(pipeline)
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'fti'"):
        _ = pipeline.fti  # type: ignore[attr-defined]


def test_a_config_may_be_a_dictionary():
    tree = {"include": ["demo"], "train": {"epochs": 2}, "optim": {"lr": 0.5}}
    config = pipeline.load_config(tree, "optim.lr=0.2")
    assert (config.train.epochs, config.optim.lr, config.model.name) == (2, 0.2, "densenet_tiny")
    assert tree["include"] == ["demo"]
    with pytest.raises(pipeline.ConfigError, match=r"the config is not a valid config:\n  train.epoch: unknown key"):
        pipeline.load_config({"train": {"epoch": 3}})
    with pytest.raises(
        pipeline.ConfigError, match=r"config 'dmeo' is neither a file nor built in. Did you mean 'demo'"
    ):
        pipeline.load_config({"include": "dmeo"})
