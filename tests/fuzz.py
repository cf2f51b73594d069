"""Rounds of random input with hypothesis: fixed seeds, and further ones on request.

``PERSONA_FUZZ_SECONDS=3600 pytest tests/test_fuzz.py -k json_of_any`` runs further seeds for an
hour. A failure names its seed; add it to the test's seeds after the fix.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterable

import hypothesis
from hypothesis import strategies as st

SECONDS = float(os.environ.get("PERSONA_FUZZ_SECONDS", 0))
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def rounds(
    check: Callable[[object], None],
    inputs: st.SearchStrategy,
    seeds: Iterable[int] = (0,),
    examples: int = 150,
) -> None:
    """Calls `check` with inputs of each seed; a call may take ten seconds at most."""
    end = time.monotonic() + SECONDS
    further = itertools.count(1000)
    for seed in itertools.chain(
        seeds, itertools.takewhile(lambda _: time.monotonic() < end, further)
    ):

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples,
            deadline=10_000,
            database=None,
            print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(inputs)
        def one_round(value):
            check(value)

        try:
            one_round()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def refusal(error: Exception) -> None:
    """Checks that an error message is a short printable line."""
    text = str(error)
    assert 0 < len(text) < 500, len(text)
    assert text.isprintable(), text
    assert text.encode()


@st.composite
def damaged(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """Draws one of the files, with a few bytes changed, cut, repeated, or taken from another."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(0, 64))
        what = draw(st.sampled_from(["flip", "number", "cut", "repeat", "splice", "noise", "end"]))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "number":
            order = draw(st.sampled_from(["little", "big"]))
            data[at : at + 4] = draw(st.sampled_from(EXTREMES)).to_bytes(4, order)
        elif what == "cut":
            del data[at : at + length]
        elif what == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
        elif what == "splice":
            other = draw(st.sampled_from(files))
            data[at : at + length] = other[at : at + length]
        elif what == "noise":
            data[at : at + length] = draw(st.binary(max_size=64))
        else:
            del data[at:]
    return bytes(data)
