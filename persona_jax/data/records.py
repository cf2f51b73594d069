"""Arrays stored in ArrayRecord files, one record per row: the storage of encodings."""

import errno
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Shaped

from persona_jax.errors import UserError

IN_MEMORY = 2**28
"""Largest size in bytes of an array that is held in memory.

Reading record by record is far slower, and embeddings are read nine times as often as targets.
"""


class Writer:
    """Appends rows to an ArrayRecord file; use as a context manager.

    A record is one uncompressed row, because rows are read one by one, in any order.
    """

    def __init__(self, file: Path):
        """Creates or overwrites `file`."""
        self._file = file
        self._writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")

    def __enter__(self) -> "Writer":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file. Raises OSError if it could not be written."""
        try:
            self._writer.close()
        except RuntimeError as error:
            raise _as_os_error(error, self._file) from error

    def append(self, rows: Shaped[np.ndarray, "R ..."]) -> None:
        """Writes ``R`` records. Raises OSError if they cannot be written."""
        for row in rows:
            try:
                self._writer.write(np.ascontiguousarray(row).tobytes())
            except RuntimeError as error:
                raise _as_os_error(error, self._file) from error


def _as_os_error(error: RuntimeError, file: Path) -> OSError:
    number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
    return OSError(number, first_line(error), str(file))


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return str(error).partition("\n")[0]


class Records:
    """An array ``[P, ...]``, or ``[P, S, ...]`` with S records per row (original and mirrored).

    It is indexed like a numpy array by integer arrays, one for each leading axis. ``np.asarray``
    reads all of it.

    Attributes:
      shape, dtype: of the array.
    """

    def __init__(
        self, files: Sequence[Path], shape: Sequence[int], dtype: np.dtype | str, leading: int
    ):
        """Opens the files; their concatenated records are in row-major order of the leading axes.

        Args:
          files: paths, in order.
          shape, dtype: of the array.
          leading: number of axes that count records, 1 or 2.

        Raises:
          ValueError: the files cannot be read, or do not hold as many records as the shape says.
        """
        self.shape, self.dtype, self._leading = tuple(shape), np.dtype(dtype), leading
        self._files = [str(file) for file in files]
        try:
            self._source = ArrayRecordDataSource(self._files)
        except RuntimeError as error:
            raise ValueError(first_line(error)) from error
        expected = math.prod(self.shape[:leading])
        if len(self._source) != expected:
            raise ValueError(f"{len(self._source)} records, not {expected}")
        self._held = None
        if math.prod(self.shape) * self.dtype.itemsize <= IN_MEMORY:
            self._held = self._read(np.arange(expected)).reshape(self.shape)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | tuple) -> np.ndarray:
        """Returns ``records[rows]`` or ``records[rows, sides]``, as numpy indexing does.

        Raises:
          UserError: a record is damaged.
        """
        index = tuple(np.broadcast_arrays(*(index if isinstance(index, tuple) else (index,))))
        if self._held is not None:
            return self._held[index]
        numbers = np.ravel_multi_index(index, self.shape[: self._leading])
        return self._read(numbers.ravel()).reshape(*numbers.shape, *self.shape[self._leading :])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Returns the whole array."""
        del copy
        held = self._held
        if held is None:
            held = self._read(np.arange(len(self._source))).reshape(self.shape)
        return held if dtype is None else held.astype(dtype)

    def _read(self, numbers: np.ndarray) -> np.ndarray:
        try:
            records = self._source.__getitems__(numbers)
            return np.frombuffer(b"".join(records), self.dtype)
        except (RuntimeError, ValueError) as error:
            folder = Path(self._files[0]).parents[1]
            raise UserError(
                f"encodings {folder}: damaged ({first_line(error)}); delete that folder "
                "and run again"
            ) from error


Arrays = Mapping[str, np.ndarray | Records]
