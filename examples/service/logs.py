"""Logging, which is the host's to configure: JSON lines, and a copy for the clients of a run."""

from __future__ import annotations

import logging
import sys

import structlog
from eventrain.callbacks import SCHEMA_VERSION, to_jsonable
from structlog.typing import EventDict, Processor

from .journal import current_journal


def configure_logging() -> None:
    """Send structlog's lines and those of the standard library to standard error."""
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
        processors=[_needless, *first, tell_clients, renderer],
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


def _needless(logger: object, method: str, line: EventDict) -> EventDict:
    """No warning of what does not concern us: each run has random generators of its own."""
    if line["event"] == "concurrent_fits_share_rng":
        raise structlog.DropEvent
    return line


def tell_clients(logger: object, method: str, line: EventDict) -> EventDict:
    """Put what is logged in the context of a run into its journal, too."""
    if journal := current_journal.get():
        fields = to_jsonable(line)
        fields.pop("exception", None)  # a traceback, with this machine's paths, is the log's
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
