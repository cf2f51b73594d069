"""TensorBoard's event files, written without TensorFlow or torch."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
    """Scalars of one run, in a new event file.

    Uses tensorboardX's low-level writer, because the thread of its SummaryWriter prints tracebacks
    when the disk is full.
    """

    def __init__(self, folder: Path, first_step: int):
        """Opens a file in `folder`. TensorBoard drops older events from `first_step` on."""
        self._tools = _import_tensorboardx()
        folder.mkdir(exist_ok=True)
        self._writer = self._tools.event_file_writer.EventsWriter(str(folder / "events"))
        session = self._tools.proto.event_pb2.SessionLog
        self._write(first_step, session_log=session(status=session.START))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values` as the scalars of `step` and flushes."""
        for name, value in values.items():
            self._write(step, summary=self._tools.summary.scalar(name, value))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, step: int, **content: object) -> None:
        event = self._tools.proto.event_pb2.Event(wall_time=time.time(), step=step, **content)
        self._writer.write_event(event)


def _import_tensorboardx():
    """Imports tensorboardX without torch, which it imports wherever that is installed."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        import tensorboardX
        import tensorboardX.event_file_writer
        import tensorboardX.proto.event_pb2
        import tensorboardX.summary
    finally:
        if hide:
            del sys.modules["torch"]
    return tensorboardX
