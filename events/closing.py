"""A base class for objects that can be closed, which makes them context managers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """Adds the two methods of a context manager to a class with `close`."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> object:
        """End it; closing again must be harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
