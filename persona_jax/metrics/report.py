"""Tables of verdicts, as Markdown, JSON and a page to look at."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Float

from persona_jax.metrics.distributions import kernel_distance
from persona_jax.metrics.intervals import bootstrap
from persona_jax.metrics.judging import Verdict

Table = dict[str, dict[str, str]]
"""Row → column → what stands there."""

_STYLE = "body{font:15px sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:right}\
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f3f3f3}\
img{max-width:100%;image-rendering:pixelated}"


def table(
    rows: Mapping[str, Sequence[Verdict]], real: Float[np.ndarray, "P F"], versus: str
) -> Table:
    """Means with 95 % intervals over people and seeds, of one verdict a training seed.

    Args:
      rows: by name, in order.
      real: the reader's features of real photos, for KID.
      versus: the row whose traits' error the others' is compared with, person by person.
    """

    def stacked(found: Sequence[Verdict], name: str) -> Float[np.ndarray, "R P"]:
        return np.stack([getattr(verdict, name) for verdict in found])

    base, out = stacked(rows[versus], "error"), {}
    for name, found in rows.items():
        error = stacked(found, "error")
        # A row of one seed, photos for instance, is held against every seed.
        away = "" if name == versus else str(bootstrap(error - base))
        kid = [1000 * kernel_distance(verdict.features, real, seed=0)[0] for verdict in found]
        out[name] = {
            "error of the traits ↓": str(bootstrap(error)),
            f"its difference to {versus}": away,
            "named, of 32 ↑": str(bootstrap(stacked(found, "named"))),
            "prompt ↑": str(bootstrap(stacked(found, "prompt"))),
            "KID × 1000 ↓": "" if name == "real photos" else f"{np.mean(kid):.1f}",
        }
    return out


def markdown(found: Table) -> str:
    """The table for a README."""
    columns = list(next(iter(found.values())))
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *row.values()] for name, row in found.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(found: Table, caption: str) -> str:
    """The table as a page, ``grid.png`` below it."""

    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(c)}</{kind}>" for c in cells) + "</tr>\n"

    columns = list(next(iter(found.values())))
    body = "".join(row([name, *cells.values()], "td") for name, cells in found.items())
    return (
        f'<!doctype html><meta charset="utf-8"><title>comparison</title><style>{_STYLE}</style>\n'
        f"<h1>Comparison</h1><p>{html.escape(caption)}</p>\n"
        f'<table>{row(["", *columns], "th")}{body}</table>\n<p><img src="grid.png"></p>\n'
    )


def write(out: Path, found: Table, caption: str, grid: PIL.Image.Image) -> None:
    """table.md, table.json, report.html and grid.png in `out`; prints the table."""
    grid.save(out / "grid.png")
    (out / "table.md").write_text(markdown(found))
    (out / "table.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    (out / "report.html").write_text(page(found, caption))
    print(f"\n{caption}\n\n{markdown(found)}\nwritten to {out}")
