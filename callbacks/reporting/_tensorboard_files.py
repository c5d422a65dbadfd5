"""What a resumed fit does to the files that TensorBoard has of the run before.

A run has two kinds of steps, of batches and of epochs. TensorBoard purges all scalars from one step
on. With the step of a batch that hides no epoch that is still valid, as an epoch has a batch at
least; but the epochs that are trained again are removed from the files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def event_files(folder: str) -> list[Path]:
    """The files that TensorBoard reads in a folder, which need not exist."""
    return sorted(Path(folder).glob("*tfevents*"))


def purge_steps(writer: SummaryWriter, first: int) -> None:
    """Have TensorBoard hide what was written before this with a step of `first` or later.

    Source: `purge_step` of torch's SummaryWriter, which has to be known when that is made.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    assert writer.file_writer is not None
    start = SessionLog(status=SessionLog.START)
    writer.file_writer.add_event(Event(step=first, file_version="brain.Event:2"), first)
    writer.file_writer.add_event(Event(step=first, session_log=start), first)


def remove_epochs(files: list[Path], phase: str, first: int) -> None:
    """Remove the scalars of the epochs of this phase from `first` on."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    ending = f"/{phase}"

    def is_replaced(raw: bytes) -> bool:
        if ending.encode() not in raw:  # most are of batches; reading them takes longer
            return False
        event = Event.FromString(raw)
        tags = [value.tag for value in event.summary.value]
        return event.step >= first and any(tag.endswith(ending) for tag in tags)

    for file in files:
        events = list(RawEventFileLoader(str(file)).Load())
        kept = [raw for raw in events if not is_replaced(raw)]
        if len(kept) < len(events):
            new = file.with_name(f".{file.name}.new")
            with new.open("wb") as out:
                writer = RecordWriter(out)
                for raw in kept:
                    writer.write(raw)
            os.replace(new, file)
