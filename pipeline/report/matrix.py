"""A table of counts whose rows and columns add up, as a section of a report."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """A column's name, its tip and its colour of CSS."""

    name: str
    tip: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Matrix:
    """Counts by row and column.

    Attributes:
        columns: the first is the whole of a row: cells are shaded by their share of it.
        rows: counts by the row's name, one for each column.
        total: of each column, the last row.
    """

    columns: Sequence[Column]
    rows: Mapping[str, Sequence[int]]
    total: Sequence[int]
    corner: str = ""
    title: str = ""
    text: str = ""
    note: str = ""
    wide: bool = True
    total_name: str = field(default="total")

    def html(self, side: int) -> str:
        """The table, its first column fixed where it scrolls."""
        head = "".join(map(_head, self.columns))
        lines = "".join(_row(name, counts) for name, counts in self.rows.items())
        last = _row(self.total_name, self.total, "total")
        text = f"<p>{html.escape(self.text)}</p>" if self.text else ""
        note = f"<p class='note'>{html.escape(self.note)}</p>" if self.note else ""
        corner = html.escape(self.corner)
        return (
            f"{text}<div class='scroll' tabindex='0'><table class='matrix'><thead><tr>"
            f"<th>{corner}</th>{head}</tr></thead><tbody>{lines}{last}</tbody></table></div>{note}"
        )


def _head(column: Column) -> str:
    dot = f"<i class='dot' style='background:{column.colour}'></i>" if column.colour else ""
    tip = f" title='{html.escape(column.tip, quote=True)}'" if column.tip else ""
    return f"<th scope='col'{tip}>{dot}{html.escape(column.name)}</th>"


def _row(name: str, counts: Sequence[int], kind: str = "") -> str:
    whole = counts[0] if counts else 0
    cells = [f"<td class='number'>{whole:,}</td>"] if counts else []
    for count in counts[1:]:
        share = 100 * count / whole if whole else 0.0
        if not count:
            cells.append("<td class='number none'>0</td>")
            continue
        tip = f"{share:.3g} % of {whole:,}"
        cells.append(
            f"<td class='number' title='{tip}' style='--share:{share:.1f}%'>{count:,}</td>"
        )
    shown = html.escape(name, quote=True)  # the column may cut it: the whole is its title
    head = f"<th scope='row' title='{shown}'>{shown}</th>"
    return f"<tr class='{kind}'>{head}{''.join(cells)}</tr>"
