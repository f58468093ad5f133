"""The notebooks run in an empty folder, and their stored outputs match."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import notebooks

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))


def outputs(notebook: dict[str, Any], kind: str) -> list[Any]:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [[out for out in cell["outputs"] if out["output_type"] == kind] for cell in cells]


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_a_notebook_runs_and_its_stored_outputs_match(file, tmp_path, monkeypatch, one_rank):
    stored, ran = json.loads(file.read_text(encoding="utf-8")), json.loads(file.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    notebooks.run(ran)
    assert file.stat().st_size < 1_000_000
    images = [len(found) for found in outputs(stored, "display_data")]
    assert images == [len(found) for found in outputs(ran, "display_data")]
    assert sum(images) > 0
    assert all(bool(a) == bool(b) for a, b in zip(outputs(stored, "stream"), outputs(ran, "stream"), strict=True))
