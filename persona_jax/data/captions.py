"""Captions from templates: what the face does and whether it is a man's or a woman's, no names."""

import csv
import hashlib
import pathlib

from persona_jax.errors import UserError

PLAIN = "a photo of a person"
OPENINGS = ("a photo of", "a portrait of", "a picture of", "a close-up of")
NOUNS = ("person", "man", "woman")
# How each expression label is said; `unknown` says nothing.
PHRASES = {
    "unknown": ("{noun}",),
    "neutral": ("{noun}", "{noun} with a calm face", "{noun} with a neutral expression"),
    "happiness": ("smiling {noun}", "happy {noun}", "{noun} with a smile"),
    "surprise": ("surprised {noun}", "{noun} looking surprised"),
    "anger": ("angry {noun}", "{noun} looking angry"),
    "sadness": ("sad {noun}", "{noun} looking sad"),
    "fear": ("frightened {noun}", "{noun} looking afraid"),
    "disgust": ("disgusted {noun}", "{noun} looking disgusted"),
    "contempt": ("scornful {noun}", "{noun} with a scornful look"),
}


def caption(key: str, labels: tuple[str, str] | None) -> str:
    """The caption of one photo, the same in every run.

    Args:
      key: any string naming the photo; it only chooses the template (by SHA-256).
      labels: (expression, noun), keys of :data:`PHRASES` and :data:`NOUNS`; None when unlabelled.
    """
    if labels is None:
        return PLAIN
    expression, noun = labels
    draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    draw, opening = divmod(draw, len(OPENINGS))
    phrases = PHRASES[expression]
    phrase = phrases[draw % len(phrases)].format(noun=noun)
    article = "an" if phrase[0] in "aeiou" else "a"
    return f"{OPENINGS[opening]} {article} {phrase}"


def read_labels(path: pathlib.Path) -> dict[str, tuple[str, str]]:
    """Reads a table of tab-separated columns file, expression, noun (first line: their names).

    Returns:
      photo file, as `Person/photo.jpg`, to (expression, noun).

    Raises:
      UserError: missing columns, or a label that has no wording.
    """
    with path.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if missing := {"file", "expression", "noun"} - set(rows.fieldnames or ()):
            raise UserError(
                f"{path}: no column {', '.join(sorted(missing))}; "
                "expected a first line naming tab-separated columns file, expression, noun"
            )
        labels = {}
        for row in rows:
            if row["expression"] not in PHRASES or row["noun"] not in NOUNS:
                raise UserError(
                    f"{path}, line {rows.line_num}: found expression {row['expression']!r}, noun "
                    f"{row['noun']!r}; expected one of {', '.join(PHRASES)} and one of "
                    f"{', '.join(NOUNS)}"
                )
            labels[row["file"]] = (row["expression"], row["noun"])
    return labels
