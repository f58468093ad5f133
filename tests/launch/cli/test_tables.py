"""Tables of the command line: whole lines at any terminal width."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from launch.cli.common.tables import print_table

ROWS = [
    ("a run with a long name", "0123456789abcdef" * 2, "1"),
    ("二", "short"),
    ("[b]", Text("red", style="red"), "123"),
]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [20, 200])
def test_each_row_is_one_line_and_columns_are_aligned(terminal, width):
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None, highlight=False)
    print_table(console, ("run", "id", "n"), ROWS, right=("n",))
    assert stream.getvalue().splitlines() == [
        "run                     id                                  n",
        "a run with a long name  0123456789abcdef0123456789abcdef    1",
        "二                      short",
        "[b]                     red                               123",
    ]
