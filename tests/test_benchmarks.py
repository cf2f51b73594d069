"""The benchmark: both sides do the same work, and it prints a table."""

import re
import sys

import numpy as np
import pytest
from world import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as benchmark
from benchmarks import inputs, ours, sizes, theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("towers")


def test_it_writes_a_table(folder, capsys):
    argv = ["--what", "matmul", "clip", "--repeats", "2", "--folder", str(folder)]
    benchmark.main(benchmark.parser().parse_args([*argv, "--out", str(folder / "RESULTS.md")]))
    table = (folder / "RESULTS.md").read_text()
    assert table.strip() in capsys.readouterr().out
    matmul, clip = (re.search(rf"\| {what} \|.*", table)[0] for what in ("matmul", "clip"))
    for row in (matmul, clip):
        share, first, peak = (cell.strip() for cell in row.split("|")[-4:-1])
        assert int(share.removesuffix("%")) > 0
        assert len(first.split("/")) == len(peak.split("/")) == 2


def test_both_sides_use_the_requested_batch_size(folder):
    small = sizes.size_of("small", 2, 1)
    assert (small.batch, small.steps) == (2, 1)
    assert sizes.size_of("small").batch == 16
    sizes.write(small, folder / "benchmarks-small")
    there = folder / "benchmarks-small"
    ours.make("unet", small, there, "float32")()
    once = theirs.count(theirs.make("unet", small, there, "float32"))
    twice = theirs.count(theirs.make("unet", sizes.size_of("small", 4), there, "float32"))
    assert twice == 2 * once > 0


def test_flops_of_a_matrix_product(folder):
    work = theirs.make("matmul", sizes.size_of("small"), folder, "float32")
    assert theirs.count(work) == 2 * sizes.MATRIX["cpu"] ** 3
    assert theirs.device_memory() is None
    np.testing.assert_equal(ours.device_memory(), None)


def test_the_steps_worker_is_started_for_the_input_pipeline(folder):
    sizes.write(sizes.size_of("small"), folder / "benchmarks-small")
    arguments = inputs.parser().parse_args(["--folder", str(folder)])
    worker = benchmark.start("ours", "matmul", folder / "benchmarks-small", arguments)
    worker.stdin.close()
    assert float(benchmark.read(worker)) > 0
    assert worker.wait() == 0
