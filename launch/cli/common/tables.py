"""Tables on the terminal: each row is one line at any width, so that ids can be copied."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_SEPARATOR = "  "


def print_table(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], right: Sequence[str] = ()
) -> None:
    """Prints rows below the column names, the columns `right` right-aligned.

    Cells that a row lacks are empty. No line is cut: a terminal wraps long ones, and a pipe gets whole lines.
    """
    table: list[list[Text]] = [[Text(name, style="bold") for name in columns]]
    for row in rows:
        cells = [Text(cell) if isinstance(cell, str) else cell for cell in row]
        table.append(cells + [Text("")] * (len(columns) - len(cells)))
    widths = [max(cell_len(row[i].plain) for row in table) for i in range(len(columns))]
    for row in table:
        line = Text()
        for i, (name, cell) in enumerate(zip(columns, row, strict=True)):
            padding = " " * (widths[i] - cell_len(cell.plain))
            line += Text(padding) + cell if name in right else cell + Text(padding)
            line += Text(_SEPARATOR)
        line.rstrip()
        console.print(line, soft_wrap=True)
