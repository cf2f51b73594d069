"""Tables of evaluation results, as Markdown, JSON and HTML."""

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
"""Row → column → cell."""

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
"""IS / FID that the source paper reports for its own base, data and network. Not comparable with
any other column."""


def table(
    rows: Mapping[str, Sequence[EvaluationResult]],
    real: Mapping[str, Float[np.ndarray, "P F"]],
    versus: str,
    fid: bool = False,
) -> Table:
    """Computes means with 95 % intervals over people and training seeds.

    Diversity is the feature distance of two images of a person for the same prompt, divided by the
    distance of real photos of different people.

    Args:
      rows: results by name of the row, one for each training seed.
      real: features of real photos by network.
      versus: the row with which the leading scores of the others are compared, person by person.
      fid: report FID even with fewer images than features, where bias dominates it.
    """
    first = next(iter(real.values()))
    distance_of_people = np.mean(
        [np.linalg.norm(first - np.roll(first, n, 0), axis=1) for n in (1, 2, 3)]
    )

    def stacked(results: Sequence[EvaluationResult], title: str) -> Float[np.ndarray, "R P"]:
        return np.stack([result.scores[title] for result in results])

    leading, *others = rows[versus][0].scores
    references = {network: reference_statistics.of(features) for network, features in real.items()}
    base = stacked(rows[versus], leading)
    result_table: Table = {}
    for name, results in rows.items():
        scores = stacked(results, leading)
        diversities = [result.diversity for result in results if result.diversity is not None]
        result_table[name] = {
            leading: bootstrap(scores),
            # A row with one seed, such as real photos, is compared with every seed.
            f"its difference to {versus}": None if name == versus else bootstrap(scores - base),
            **{title: bootstrap(stacked(results, title)) for title in others},
            "diversity": float(np.mean(diversities) / distance_of_people)
            if len(diversities) == len(results)
            else None,
        }
        for network, reference in references.items():
            outputs = [result.outputs[network] for result in results]
            result_table[name] |= realism(outputs, reference, network, fid)
        if rows.keys() & PAPER.keys():
            result_table[name]["the paper's IS / FID"] = PAPER.get(name)
    return result_table


def realism(
    outputs: Sequence[NetworkOutput],
    real: ReferenceStatistics,
    network: str,
    fid: bool,
    most_splits: int | None = None,
) -> dict[str, Cell]:
    """KID, IS and FID by one network; means over seeds.

    Args:
      outputs: of the network, one for the images of each seed.
      real: statistics of real photos.
      network: its name, which the columns contain.
      fid: see :func:`table`.
      most_splits: of the Inception Score; None: ten, or the number of images if that is less.

    Raises:
      UserError: there are fewer images than splits, or the feature sizes differ.
    """
    columns: dict[str, Cell] = {}
    features = [output.features for output in outputs]
    classes = [output.classes for output in outputs if output.classes is not None]
    if features[0].shape[1] != len(real.mean):
        raise UserError(
            f"{network}: {features[0].shape[1]} features, but the photos' statistics are of "
            f"{len(real.mean)}"
        )
    if real.features is not None:
        kid = [distributions.kernel_distance(x, real.features, seed=0)[0] for x in features]
        columns[f"KID × 1000 ({network}) ↓"] = float(1000 * np.mean(kid))
    if classes:
        splits = most_splits or min(10, len(features[0]))
        for uniform, suffix in ((False, ""), (True, ", uniform p(y)")):
            scores = [distributions.inception_score(x, 0, splits, uniform)[0] for x in classes]
            columns[f"IS, {splits} splits{suffix} ({network}) ↑"] = float(np.mean(scores))
    fewest = min(len(features[0]), real.count or len(features[0]))
    enough = fewest > len(real.mean)
    if fid or enough:
        mark = network if enough else f"{network}, too few pictures"
        distances = [
            distributions.frechet_distance(distributions.moments(x), real) for x in features
        ]
        columns[f"FID ({mark}) ↓"] = float(np.mean(distances))
        if len(features[0]) >= 20:
            extrapolated = [distributions.frechet_distance_infinity(x, real, 0) for x in features]
            columns[f"FID∞ ({mark}) ↓"] = float(np.mean(extrapolated))
    return columns


def text(cell: Cell) -> str:
    """Formats a cell."""
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def markdown(contents: Table) -> str:
    """Formats the table in Markdown."""
    columns = list(next(iter(contents.values())))
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *map(text, row.values())] for name, row in contents.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(contents: Table, caption: str, pictures: Sequence[str]) -> str:
    """Formats the table as an HTML page with image files of the same folder."""

    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(c)}</{kind}>" for c in cells) + "</tr>\n"

    columns = list(next(iter(contents.values())))
    body = "".join(
        row([name, *map(text, cells.values())], "td") for name, cells in contents.items()
    )
    img_tags = "".join(f'<p><img src="{name}"></p>\n' for name in pictures)
    return (
        f'<!doctype html><meta charset="utf-8"><title>persona_jax</title><style>{_STYLE}</style>\n'
        f"<h1>Evaluation report</h1><p>{html.escape(caption)}</p>\n"
        f"<table>{row(['', *columns], 'th')}{body}</table>\n{img_tags}"
    )


def write(out: Path, contents: Table, caption: str, pictures: Sequence[str]) -> None:
    """Writes table.md, table.json and report.html to `out`, and prints the table.

    Args:
      out: folder that has the picture files.
      contents: the table.
      caption: above the table.
      pictures: names of image files for the page.
    """
    outputs.write_text(out / "table.md", markdown(contents))
    numbers = json.dumps(contents, indent=2, ensure_ascii=False, default=dataclasses.asdict)
    outputs.write_text(out / "table.json", numbers + "\n")
    outputs.write_text(out / "report.html", page(contents, caption, pictures))
    print(f"\n{caption}\n\n{markdown(contents)}\nwritten to {out}")
