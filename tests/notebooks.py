"""Runs a notebook's code cells in this process, as Jupyter does, and stores their text, values and figures.

python -m tests.notebooks examples/NAME.ipynb    # writes the outputs into the notebook
"""

import ast
import base64
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_DPI = 60


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Runs the cells in the current folder and stores their outputs in them; returns the variables they define."""
    names: dict[str, Any] = {"__name__": "__main__"}
    code_cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code_cells, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = _run_cell("".join(cell["source"]), names, f"cell {number}")
        cell["execution_count"], cell["outputs"] = number, []
        if printed.getvalue():
            text = printed.getvalue().splitlines(keepends=True)
            cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": text})
        for figure in pyplot.get_fignums():
            cell["outputs"].append(_image(pyplot.figure(figure)))
        pyplot.close("all")
        if value is not None:
            data = {"text/plain": repr(value).splitlines(keepends=True)}
            result = {"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}}
            cell["outputs"].append(result)
    return names


def _run_cell(source: str, names: dict[str, Any], where: str) -> Any:
    """Runs a cell; returns the value of its last expression, unless it ends with a semicolon."""
    tree = ast.parse(source)
    shown = bool(tree.body) and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last: Any = tree.body.pop() if shown else None
    exec(compile(tree, where, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), where, "eval"), names)


def _image(figure: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": [repr(figure)]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def main() -> None:
    """Runs a notebook in an empty folder and writes the outputs into it."""
    file = Path(sys.argv[1]).absolute()
    notebook = json.loads(file.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run(notebook)
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
