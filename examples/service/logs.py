"""Logging, configured by the host: JSON lines, and a copy for the clients of a run."""

from __future__ import annotations

import logging
import sys

import structlog
from eventrain.callbacks import SCHEMA_VERSION, to_jsonable
from structlog.typing import EventDict, Processor

from .journal import current_journal


def configure_logging() -> None:
    """Send the log lines of structlog and of the standard library to standard error."""
    renderer: Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    first: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.MaybeTimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[_drop_irrelevant, *first, copy_to_journal, renderer],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=first,
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _drop_irrelevant(logger: object, method: str, line: EventDict) -> EventDict:
    """Drop a warning that does not apply: each run has random generators of its own."""
    if line["event"] == "concurrent_fits_share_rng":
        raise structlog.DropEvent
    return line


def copy_to_journal(logger: object, method: str, line: EventDict) -> EventDict:
    """Add lines that are logged in the context of a run to its journal, too."""
    if journal := current_journal.get():
        fields = to_jsonable(line)
        fields.pop("exception", None)  # a traceback has paths of this machine
        journal.append(
            {
                "event": "log",
                "schema_version": SCHEMA_VERSION,
                "timestamp": fields.pop("timestamp"),
                "run_id": fields.pop("run_id"),
                "level": fields.pop("level"),
                "message": fields.pop("event"),
                "fields": fields,
            }
        )
    return line
