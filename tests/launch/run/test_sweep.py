"""A sweep over the demo's learning rate."""

import re

import pytest
from mlflow.tracking import MlflowClient


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_over_the_learning_rate(shell, tmp_path):
    arguments = ["configs/demo.yaml", "train.epochs=3", "cluster.workers=1", "cluster.cpus_per_worker=1"]
    output = [f"run.output={tmp_path}", "run.name=sweep"]
    wrong = shell("densenet", "sweep", *arguments, *output, "--space", "optim.rl=log(0.1,1)")
    assert wrong.returncode == 2
    assert "did you mean 'optim.lr'?" in wrong.stdout

    done = shell("densenet", "sweep", *arguments, *output, "--space", "optim.lr=choice(0.1,0.00001)", "--trials", "3")
    assert done.returncode == 0, done.stdout
    rows = re.findall(r"^ +([\d.]+) +([\d.]+) +([\d.e-]+)$", done.stdout, re.MULTILINE)
    assert len(rows) == 3
    top1 = [float(row[0]) for row in rows]
    assert top1 == sorted(top1, reverse=True)
    best = re.search(r"to train with the best values: densenet train (.*)", done.stdout)[1]
    assert best.endswith(f"optim.lr={rows[0][2]}")
    assert "run.name" not in best

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "densenet"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 3
    assert all("val/top1" in run.data.metrics for run in children)
    assert parent.info.status == "FINISHED"
    statuses = {float(run.data.params["optim.lr"]): run.info.status for run in children}
    assert statuses[float(rows[0][2])] == "FINISHED", "the best trial is complete"
    assert set(statuses.values()) <= {"FINISHED", "KILLED"}
    for run in children:
        printed = [float(row[0]) for row in rows if float(row[2]) == float(run.data.params["optim.lr"])]
        values = [m.value for m in client.get_metric_history(run.info.run_id, "val/top1")]
        assert any(values[-1] == pytest.approx(top1, abs=0.01) for top1 in printed)
