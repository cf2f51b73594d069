"""Tables of verdicts, as Markdown, JSON and a page to look at."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from persona_jax.metrics import distributions
from persona_jax.metrics.intervals import bootstrap
from persona_jax.metrics.judging import Verdict

Table = dict[str, dict[str, str]]
"""Row → column → what stands there."""

_STYLE = "body{font:15px sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:right}\
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f3f3f3}\
img{max-width:100%;image-rendering:pixelated}"


PAPER = {
    "ip": "15.37 / 8.92",
    "max": "14.12 / 10.10",
    "avg": "13.56 / 11.82",
    "sa": "18.72 / 7.56",
    "dreambooth": "17.64 / 9.61",
}
"""What the source paper reports, of its own base, data and network: IS / FID. No other column
compares with it."""


def table(
    rows: Mapping[str, Sequence[Verdict]],
    real: Float[np.ndarray, "P F"],
    versus: str,
    fid: bool = False,
) -> Table:
    """Means with 95 % intervals over people and seeds, of one verdict a training seed.

    Diversity is how far two pictures of a person for the same prompt are apart, as a share of how
    far real photos of different people are.

    Args:
      rows: by name, in order.
      real: the judge's features of real photos, for KID.
      versus: the row whose leading score the others' is compared with, person by person.
      fid: report FID of fewer pictures than it has features, too; it is bias above all.
    """
    reference = distributions.moments(real)
    splits = min(10, len(real))

    def stacked(found: Sequence[Verdict], title: str) -> Float[np.ndarray, "R P"]:
        return np.stack([verdict.scores[title] for verdict in found])

    unlike = float(np.mean([np.linalg.norm(real - np.roll(real, n, 0), axis=1) for n in (1, 2, 3)]))
    leading, *others = rows[versus][0].scores
    base, out = stacked(rows[versus], leading), {}
    for name, found in rows.items():
        scores = stacked(found, leading)
        # A row of one seed, photos for instance, is held against every seed.
        away = "" if name == versus else str(bootstrap(scores - base))
        kid = [
            1000 * distributions.kernel_distance(verdict.features, real, seed=0)[0]
            for verdict in found
        ]
        out[name] = {
            leading: str(bootstrap(scores)),
            f"its difference to {versus}": away,
            **{title: str(bootstrap(stacked(found, title))) for title in others},
            "diversity": _share([verdict.diversity for verdict in found], unlike),
            "KID × 1000 ↓": f"{np.mean(kid):.1f}",
        }
        if found[0].classes is not None:
            score = [
                distributions.inception_score(verdict.classes, seed=0, splits=splits)[0]
                for verdict in found
            ]
            out[name][f"IS, {splits} splits ↑"] = f"{np.mean(score):.2f}"
        if fid or distributions.full_rank(reference, reference):
            own = [distributions.moments(verdict.features) for verdict in found]
            distance = np.mean([distributions.frechet_distance(one, reference) for one in own])
            mark = "" if distributions.full_rank(own[0], reference) else " (too few pictures)"
            out[name]["FID ↓" + mark] = f"{distance:.1f}"
        out[name]["the paper's IS / FID"] = PAPER.get(name, "")
    return out


def _share(found: Sequence[float | None], whole: float) -> str:
    return "" if None in found else f"{np.mean(found) / whole:.2f}"


def markdown(found: Table) -> str:
    """The table for a README."""
    columns = list(next(iter(found.values())))
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *row.values()] for name, row in found.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(found: Table, caption: str, pictures: Sequence[str]) -> str:
    """The table as a page, with picture files that lie beside it."""

    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(c)}</{kind}>" for c in cells) + "</tr>\n"

    columns = list(next(iter(found.values())))
    body = "".join(row([name, *cells.values()], "td") for name, cells in found.items())
    shown = "".join(f'<p><img src="{name}"></p>\n' for name in pictures)
    return (
        f'<!doctype html><meta charset="utf-8"><title>persona_jax</title><style>{_STYLE}</style>\n'
        f"<h1>How true the pictures are</h1><p>{html.escape(caption)}</p>\n"
        f"<table>{row(['', *columns], 'th')}{body}</table>\n{shown}"
    )


def write(out: Path, found: Table, caption: str, pictures: Sequence[str]) -> None:
    """table.md, table.json and report.html in `out`, where the pictures lie; prints the table."""
    (out / "table.md").write_text(markdown(found))
    (out / "table.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    (out / "report.html").write_text(page(found, caption, pictures))
    print(f"\n{caption}\n\n{markdown(found)}\nwritten to {out}")
