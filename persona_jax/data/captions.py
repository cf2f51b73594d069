"""Captions from templates: expression and noun (person, man, woman); never the person's name."""

import codecs
import csv
import hashlib
import io
import pathlib
import stat
import unicodedata
from collections.abc import Iterator

from persona_jax.errors import UserError, shown

MOST_BYTES = 2**28
"""Largest table of labels that is read, in bytes."""
PLAIN = "a photo of a person"
OPENINGS = ("a photo of", "a portrait of", "a picture of", "a close-up of")
NOUNS = ("person", "man", "woman")
# Phrases for each expression label; `unknown` adds no expression.
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
    """Returns the caption of one photo, the same in every run.

    Args:
      key: any string that identifies the photo; its SHA-256 chooses the template.
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
    """Reads a table of tab-separated columns file, expression, noun, named in its first line.

    Returns:
      a mapping from photo file, as `Person/photo.jpg` (:func:`label_key`), to (expression, noun).

    Raises:
      UserError: the table cannot be read, lacks a column, or has a label without a phrase.
    """
    try:
        return dict(_labels(path))
    except csv.Error as error:
        raise UserError(f"{shown(path)}: not a table of tab-separated columns ({error})") from error


def label_key(file: str) -> str:
    """Returns a photo's name in Unicode NFC, so that composed and decomposed é match."""
    return unicodedata.normalize("NFC", file)


def _labels(path: pathlib.Path) -> Iterator[tuple[str, tuple[str, str]]]:
    rows = csv.DictReader(io.StringIO(_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    if missing := {"file", "expression", "noun"} - set(rows.fieldnames or ()):
        raise UserError(
            f"{shown(path)}: no column {', '.join(sorted(missing))}; "
            "expected a first line naming tab-separated columns file, expression, noun"
        )
    for row in rows:
        if row["expression"] not in PHRASES or row["noun"] not in NOUNS:
            expression, noun = (shown(row[name])[:40] for name in ("expression", "noun"))
            raise UserError(
                f"{shown(path)}, line {rows.line_num}: found expression {expression!r}, noun "
                f"{noun!r}; expected one of {', '.join(PHRASES)} and one of "
                f"{', '.join(NOUNS)}"
            )
        yield label_key(row["file"]), (row["expression"], row["noun"])


def _text(path: pathlib.Path) -> str:
    """Reads a text file in UTF-8, with or without byte-order mark, or UTF-16 with one."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > MOST_BYTES:
            raise UserError(f"{shown(path)}: not a regular file of at most {MOST_BYTES >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror})") from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{shown(path)}: not UTF-8 (byte {error.start}); save it as UTF-8 text"
        ) from error
