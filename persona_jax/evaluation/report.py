"""Tables of verdicts, as Markdown, JSON and a page to look at."""

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from persona_jax.errors import UserError
from persona_jax.evaluation import reference_statistics
from persona_jax.evaluation.evaluators import EvaluationResult
from persona_jax.evaluation.networks import NetworkOutput
from persona_jax.evaluation.reference_statistics import ReferenceStatistics
from persona_jax.metrics import distributions
from persona_jax.metrics.intervals import Mean, bootstrap
from persona_jax.runtime import outputs

Cell = Mean | float | str | None
Table = dict[str, dict[str, Cell]]
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
    rows: Mapping[str, Sequence[EvaluationResult]],
    real: Mapping[str, Float[np.ndarray, "P F"]],
    versus: str,
    fid: bool = False,
) -> Table:
    """Means with 95 % intervals over people and seeds, of one verdict a training seed.

    Diversity is how far two pictures of a person for the same prompt are apart, as a share of how
    far real photos of different people are.

    Args:
      rows: by name, in order.
      real: every network's features of real photos.
      versus: the row whose leading score the others' is compared with, person by person.
      fid: report FID of fewer pictures than there are features, too; it is bias above all.
    """
    first = next(iter(real.values()))
    unlike = np.mean([np.linalg.norm(first - np.roll(first, n, 0), axis=1) for n in (1, 2, 3)])

    def stacked(found: Sequence[EvaluationResult], title: str) -> Float[np.ndarray, "R P"]:
        return np.stack([result.scores[title] for result in found])

    leading, *others = rows[versus][0].scores
    against = {network: reference_statistics.of(features) for network, features in real.items()}
    base, out = stacked(rows[versus], leading), {}
    for name, found in rows.items():
        scores = stacked(found, leading)
        apart = [result.diversity for result in found]
        out[name] = {
            leading: bootstrap(scores),
            # A row of one seed, photos for instance, is held against every seed.
            f"its difference to {versus}": None if name == versus else bootstrap(scores - base),
            **{title: bootstrap(stacked(found, title)) for title in others},
            "diversity": None if None in apart else float(np.mean(apart) / unlike),
        }
        for network, reference in against.items():
            outputs = [result.outputs[network] for result in found]
            out[name] |= realism(outputs, reference, network, fid)
        if rows.keys() & PAPER.keys():
            out[name]["the paper's IS / FID"] = PAPER.get(name)
    return out


def realism(
    outputs: Sequence[NetworkOutput],
    real: ReferenceStatistics,
    network: str,
    fid: bool,
    most_splits: int | None = None,
) -> dict[str, Cell]:
    """KID, IS and FID by a network, which the columns name; means over seeds.

    Args:
      outputs: the network's, of one picture set a seed.
      real: what they are held against.
      network: its name.
      fid: see :func:`table`.
      most_splits: of the Inception Score; None: ten, or as many as there are pictures.

    Raises:
      UserError: fewer pictures than splits, or other features than the reference's.
    """
    out, features = {}, [output.features for output in outputs]
    if features[0].shape[1] != len(real.mean):
        raise UserError(
            f"{network}: {features[0].shape[1]} features, but the photos' statistics are of "
            f"{len(real.mean)}"
        )
    if real.features is not None:
        kid = [distributions.kernel_distance(x, real.features, seed=0)[0] for x in features]
        out[f"KID × 1000 ({network}) ↓"] = float(1000 * np.mean(kid))
    if outputs[0].classes is not None:
        splits = most_splits or min(10, len(features[0]))
        for uniform, word in ((False, ""), (True, ", uniform p(y)")):
            scores = [
                distributions.inception_score(output.classes, 0, splits, uniform)[0]
                for output in outputs
            ]
            out[f"IS, {splits} splits{word} ({network}) ↑"] = float(np.mean(scores))
    fewest = min(len(features[0]), real.count or len(features[0]))
    enough = fewest > len(real.mean)
    if fid or enough:
        mark = network if enough else f"{network}, too few pictures"
        own = [distributions.frechet_distance(distributions.moments(x), real) for x in features]
        out[f"FID ({mark}) ↓"] = float(np.mean(own))
        if len(features[0]) >= 20:
            endless = [distributions.frechet_distance_infinity(x, real, 0) for x in features]
            out[f"FID∞ ({mark}) ↓"] = float(np.mean(endless))
    return out


def text(cell: Cell) -> str:
    """As it stands in a table."""
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def markdown(found: Table) -> str:
    """The table for a README."""
    columns = list(next(iter(found.values())))
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *map(text, row.values())] for name, row in found.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(found: Table, caption: str, pictures: Sequence[str]) -> str:
    """The table as a page, with picture files that lie beside it."""

    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(c)}</{kind}>" for c in cells) + "</tr>\n"

    columns = list(next(iter(found.values())))
    body = "".join(row([name, *map(text, cells.values())], "td") for name, cells in found.items())
    shown = "".join(f'<p><img src="{name}"></p>\n' for name in pictures)
    return (
        f'<!doctype html><meta charset="utf-8"><title>persona_jax</title><style>{_STYLE}</style>\n'
        f"<h1>How true the pictures are</h1><p>{html.escape(caption)}</p>\n"
        f"<table>{row(['', *columns], 'th')}{body}</table>\n{shown}"
    )


def write(out: Path, found: Table, caption: str, pictures: Sequence[str]) -> None:
    """table.md, table.json and report.html in `out`, where the pictures lie; prints the table."""
    outputs.write_text(out / "table.md", markdown(found))
    numbers = json.dumps(found, indent=2, ensure_ascii=False, default=dataclasses.asdict)
    outputs.write_text(out / "table.json", numbers + "\n")
    outputs.write_text(out / "report.html", page(found, caption, pictures))
    print(f"\n{caption}\n\n{markdown(found)}\nwritten to {out}")
