"""Standard output and standard error, redirected to appear above a live display."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.file_proxy import FileProxy

if TYPE_CHECKING:
    from rich.console import Console

_STREAMS = ("stdout", "stderr")


class Redirection:
    """Between `start` and `stop`, what is printed appears above the live display of a console.

    It is not the redirection of rich's `Live`, which gives back the stream that it found: if the
    host had replaced that for a while, and put the old one back meanwhile, the process would go on
    with a stream that is closed or that nobody reads.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._redirected: dict[str, _Redirected] = {}

    def start(self) -> None:
        for name in _STREAMS:
            stream = getattr(sys, name)
            if stream is not None and not isinstance(stream, FileProxy):
                self._redirected[name] = _Redirected(self._console, stream)
                setattr(sys, name, self._redirected[name])

    def stop(self) -> None:
        while self._redirected:
            name, redirected = self._redirected.popitem()
            if getattr(sys, name) is redirected:
                setattr(sys, name, redirected.rich_proxied_file)
            redirected.end()


class _Redirected(FileProxy):
    """Whoever has kept it, as `redirect_stdout` does, may write to it when the display is gone."""

    _ended = False

    def end(self) -> None:
        self.flush()
        self._ended = True

    def write(self, text: str) -> int:
        return self.rich_proxied_file.write(text) if self._ended else super().write(text)

    def flush(self) -> None:
        self.rich_proxied_file.flush() if self._ended else super().flush()
