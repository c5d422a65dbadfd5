"""A watcher for runs that a reporter leaves out: it keeps the numbers of fits alone."""

from __future__ import annotations

from ...events import Event


class NotReported:
    """Observes nothing of a run of `validate`, `get_preds` or `lr_find`."""

    def wants(self, event: Event) -> bool:
        return False

    def observe(self, event: Event) -> None:
        """Never called."""
