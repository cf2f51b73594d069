import itertools

import pytest
from synthetic import SHARED

from persona_jax.data.captions import NOUNS, OPENINGS, PHRASES, caption, read_labels
from persona_jax.errors import UserError


def test_unlabelled():
    assert caption("Someone/Someone_0001.jpg", None) == "a photo of a person"


def test_fixed_wording():
    """Frozen: a changed caption would silently change every trained model's data."""
    assert caption("a", ("happiness", "man")) == "a picture of a man with a smile"
    assert caption("b", ("anger", "woman")) == "a picture of an angry woman"


@pytest.mark.parametrize("labels", list(itertools.product(PHRASES, NOUNS)))
def test_every_label_says_its_noun_and_uses_all_templates(labels):
    expression, noun = labels
    said = {caption(str(i), labels) for i in range(400)}
    assert len(said) == len(OPENINGS) * len(PHRASES[expression])
    for text in said:
        assert text.split().count(noun) == 1
        assert text.startswith(OPENINGS)
        assert not any(f" a {vowel}" in text for vowel in "aeiou")
        assert len(text) < 60


def test_read_labels_and_mistakes(tmp_path):
    table = tmp_path / "captions_meta.tsv"
    table.write_text('file\texpression\tnoun\nA/A_0001.jpg\tfear\tman\nB"/1.jpg\tneutral\tperson\n')
    assert read_labels(table)["A/A_0001.jpg"] == ("fear", "man")
    assert read_labels(table)['B"/1.jpg'] == ("neutral", "person")
    table.write_text("file\tnoun\nA/A_0001.jpg\tman\n")
    with pytest.raises(UserError, match="no column expression"):
        read_labels(table)
    table.write_text("file\texpression\tnoun\nA/A_0001.jpg\tjoy\tman\n")
    with pytest.raises(UserError, match=r"captions_meta.tsv, line 2: found expression 'joy'"):
        read_labels(table)


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_tables_in_every_unicode(tmp_path, code):
    table, mark = tmp_path / "t.tsv", "\ufeff" if code[-3:] in ("-le", "-be") else ""
    rows = f"{mark}file\texpression\tnoun\r\nZoë/1.jpg\tfear\twoman\r\n"
    table.write_bytes(rows.encode(code))
    assert read_labels(table) == {"Zoë/1.jpg": ("fear", "woman")}


def test_tables_that_cannot_be_read(tmp_path):
    table = tmp_path / "t.tsv"
    head = b"file\texpression\tnoun\n"
    for data, words in {
        head + b"Zo\xeb/1.jpg\tfear\twoman\n": "not UTF-8",
        head + b"a.jpg\n": "line 2",
        head + b"a.jpg\t" + b"x" * 10**6 + b"\twoman\n": "not a table",
        head + b"a.jpg\t" + b"x\x07" * 9999 + b"\twoman\n": "found expression",
        b"": "no column",
    }.items():
        table.write_bytes(data)
        with pytest.raises(UserError, match=words) as error:
            read_labels(table)
        assert len(str(error.value)) < 500
        assert str(error.value).isprintable()
    for path in (tmp_path, tmp_path / "absent.tsv"):
        with pytest.raises(UserError, match=str(path)):
            read_labels(path)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/lfw/captions_meta.tsv")
def test_no_name_enters_a_caption():
    labels = read_labels(SHARED / "lfw/captions_meta.tsv")
    assert len(labels) == 12_916
    # Renaming everyone does not change the set of captions, so no name is in it.
    ours = {caption(file, label) for file, label in labels.items()}
    possible = {caption(str(i), label) for i in range(400) for label in set(labels.values())}
    assert ours <= possible
    for file in labels:
        name = file.split("/")[0].replace("_", " ").lower()
        assert not any(name in text for text in possible)
