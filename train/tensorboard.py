"""Event files for TensorBoard, beside the rows of JSON and made of nothing else."""

import importlib.util
import time
from pathlib import Path
from typing import Any

from train.errors import UsageError
from train.records import Row


def check() -> None:
    """Raises UsageError if the writer isn't installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UsageError(
            "--log.tensorboard: the package tensorboardX is missing; install it with "
            "pip install tensorboardX, or leave the option out"
        )


class Board:
    """The event file of one process.

    What an earlier process of the run left is removed: the rows that stand are given again before
    new ones (`Records`), so that no step is there twice and nothing is torn. Those steps then have
    the time of the resumption. (TensorBoard's own way, a mark that has readers forget later steps,
    would leave both on the disk.)

    Args:
      folder: where to; made if need be.
    """

    def __init__(self, folder: Path):
        # Here and not above: it takes a while, and few runs ask for it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer: Any = EventsWriter(str(folder / "events"))

    def write(self, row: Row) -> None:
        """The numbers of a row, each under the tag `kind/name`."""
        values = [
            self._summary.Value(tag=f"{row['kind']}/{name}", simple_value=float(value))
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        ]
        event = self._event(step=row["step"], summary=self._summary(value=values))
        event.wall_time = time.time()
        self._writer.write_event(event)
        if row["kind"] != "train":  # of which there are too many to wait for the disk
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
