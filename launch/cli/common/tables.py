"""Tables on the terminal: each row is one line, however narrow the terminal, so that ids can be copied."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_BETWEEN = "  "


def print_table(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], right: Sequence[str] = ()
) -> None:
    """Prints rows under the names of their columns; those of the columns `right` end where their column does.

    A row with fewer cells than columns is empty in the others. Nothing is cut or broken: a terminal wraps what it has
    no room for, and a pipe gets whole lines.
    """
    table: list[list[Text]] = [[Text(name, style="bold") for name in columns]]
    for row in rows:
        cells = [Text(cell) if isinstance(cell, str) else cell for cell in row]
        table.append(cells + [Text("")] * (len(columns) - len(cells)))
    widths = [max(cell_len(row[i].plain) for row in table) for i in range(len(columns))]
    for row in table:
        line = Text()
        for i, (name, cell) in enumerate(zip(columns, row, strict=True)):
            blank = " " * (widths[i] - cell_len(cell.plain))
            line += Text(blank) + cell if name in right else cell + Text(blank)
            line += Text(_BETWEEN)
        line.rstrip()
        console.print(line, soft_wrap=True)
