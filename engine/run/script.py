"""The async methods of a learner for scripts, where no event loop is running."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, Never, TypeVar, cast

import anyio
import anyio.from_thread
import anyio.lowlevel

from ...events import Callback
from .arguments import OF_A_FIT, OF_LR_FIND, check_no_unknown
from .fittable import Fittable
from .lr_finder import LRFinderCB
from .prediction_stream import PredictionStream
from .predictions import Keep
from .result import FitResult

R = TypeVar("R")
AsyncMethod = TypeVar("AsyncMethod", bound=Callable[..., Coroutine[Any, Any, Any]])


def has_script_form(
    name: str, instead: Mapping[str, str] | None = None
) -> Callable[[AsyncMethod], AsyncMethod]:
    """Name the form for scripts in Python's warning that a coroutine was never awaited.

    Args:
        name: the form for scripts.
        instead: what to write for keywords that the method does not have; see `check_no_unknown`.
    """

    def decorate(method: AsyncMethod) -> AsyncMethod:
        hint = f"in a script: learner.{name}(...)"
        return cast(AsyncMethod, _HintedMethod(method, hint, instead or {}))

    return decorate


class _HintedMethod:
    """An async method whose coroutines have a hint in their qualified names.

    The warning about a coroutine that was never awaited contains nothing else. The attributes are
    those by which `inspect` recognises a coroutine function that is not written in Python.
    """

    __qualname__: str

    def __init__(
        self,
        method: Callable[..., Coroutine[Any, Any, Any]],
        hint: str,
        instead: Mapping[str, str],
    ) -> None:
        update_wrapper(self, method)
        self._method = method
        self._hint = hint
        self._parameters = inspect.signature(method).parameters
        self._instead = instead
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            setattr(self, name, getattr(method, name))

    def __get__(self, instance: object, owner: type) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        try:
            coroutine: Any = self._method(*args, **kwargs)
        except TypeError:
            unknown = {key: kwargs[key] for key in kwargs if key not in self._parameters}
            check_no_unknown(self._method.__qualname__, unknown, self._instead)
            raise
        coroutine.__qualname__ += f" ({self._hint})"
        return coroutine  # type: ignore[no-any-return]

    def __reduce__(self) -> str:
        return self.__qualname__  # pickled by name, as functions are


class ScriptForms(Fittable):
    """The async methods of a learner for scripts: each starts an event loop, and ends it."""

    fit: Callable[..., Coroutine[Any, Any, FitResult]]
    validate: Callable[..., Coroutine[Any, Any, dict[str, Any]]]
    get_preds: Callable[..., Coroutine[Any, Any, Any]]
    iter_preds: Callable[..., PredictionStream]
    lr_find: Callable[..., Coroutine[Any, Any, LRFinderCB]]

    def run(
        self,
        n_epochs: int | None = None,
        train: bool = True,
        valid: bool = True,
        cbs: Callback | Iterable[Callback] | None = None,
        lr: float | None = None,
        *,
        max_steps: int | None = None,
        epoch_length: int | None = None,
        valid_length: int | None = None,
        run_id: str | None = None,
        resume: str | os.PathLike[str] | None = None,
        graceful: bool | float = False,
        backend: str = "asyncio",
        backend_options: dict[str, Any] | None = None,
        **unknown: Never,
    ) -> FitResult:
        """`fit` for scripts: starts an event loop, fits, and ends the event loop.

        Args:
            n_epochs, train, valid, cbs, lr, max_steps, epoch_length, valid_length, run_id, resume,
                graceful: as in `fit`.
            backend: "asyncio" or "trio".
            backend_options: for `anyio.run`, such as {"use_uvloop": True}.

        Raises:
            RuntimeError: an event loop is running in this thread.
            KeyboardInterrupt: on Ctrl-C, after the training has stopped and cleaned up.
        """
        check_no_unknown("Learner.run", unknown, OF_A_FIT)
        fit = partial(
            self.fit,
            *(n_epochs, train, valid, cbs, lr),
            max_steps=max_steps,
            epoch_length=epoch_length,
            valid_length=valid_length,
            run_id=run_id,
            resume=resume,
            graceful=graceful,
        )
        return _run("run", "fit", fit, backend, backend_options)

    def run_validate(
        self,
        dl: Any = None,
        *,
        backend: str = "asyncio",
        backend_options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`validate` for scripts; see `run`."""
        validate = partial(self.validate, dl)
        return _run("run_validate", "validate", validate, backend, backend_options)

    def run_get_preds(
        self,
        dl: Any = None,
        with_targets: bool = False,
        *,
        keep: Keep = None,
        backend: str = "asyncio",
        backend_options: dict[str, Any] | None = None,
    ) -> Any:
        """`get_preds` for scripts; see `run`."""
        get_preds = partial(self.get_preds, dl, with_targets, keep=keep)
        return _run("run_get_preds", "get_preds", get_preds, backend, backend_options)

    def run_iter_preds(
        self,
        dl: Any = None,
        with_targets: bool = False,
        *,
        keep: Keep = None,
        buffer: int = 2,
        backend: str = "asyncio",
        backend_options: dict[str, Any] | None = None,
    ) -> Iterator[Any]:
        """`iter_preds` for scripts, as a plain iterator; see `run`.

        The event loop runs in another thread, which ends with the iterator, also when that is left
        early.

        Example:
            >>> import torch
            >>> from eventrain.engine import TrainLearner
            >>> learner = TrainLearner(torch.nn.Linear(3, 2))
            >>> for preds in learner.run_iter_preds([torch.ones(4, 3), torch.ones(1, 3)]):
            ...     preds.shape
            torch.Size([4, 2])
            torch.Size([1, 2])
        """
        _check_no_event_loop("run_iter_preds", "async for ... in learner.iter_preds(...)")
        stream = self.iter_preds(dl, with_targets, keep=keep, buffer=buffer)
        return _read(stream, backend, backend_options)

    def run_lr_find(
        self,
        lr_mult: float = 1.3,
        start_lr: float = 1e-5,
        max_epochs: int = 10,
        end_lr: float = 10.0,
        *,
        backend: str = "asyncio",
        backend_options: dict[str, Any] | None = None,
        **unknown: Never,
    ) -> LRFinderCB:
        """`lr_find` for scripts; see `run`."""
        check_no_unknown("Learner.run_lr_find", unknown, OF_LR_FIND)
        lr_find = partial(self.lr_find, lr_mult, start_lr, max_epochs, end_lr)
        return _run("run_lr_find", "lr_find", lr_find, backend, backend_options)


def _run(
    name: str,
    method: str,
    function: Callable[[], Coroutine[Any, Any, R]],
    backend: str,
    backend_options: dict[str, Any] | None,
) -> R:
    _check_no_event_loop(name, f"await learner.{method}(...)")
    return anyio.run(function, backend=backend, backend_options=backend_options)


def _read(
    stream: PredictionStream, backend: str, backend_options: dict[str, Any] | None
) -> Iterator[Any]:
    """Read a stream on an event loop in another thread."""

    async def box() -> list[Any]:
        try:
            return [await anext(stream)]
        except StopAsyncIteration:
            return []

    with (
        anyio.from_thread.start_blocking_portal(backend, backend_options) as portal,
        portal.wrap_async_context_manager(stream),
    ):
        while found := portal.call(box):
            yield found.pop()


def _check_no_event_loop(name: str, instead: str) -> None:
    try:
        anyio.lowlevel.current_token()
    except anyio.NoEventLoopError:
        return
    raise RuntimeError(
        f"{name}() starts an event loop, and one is running in this thread already: use"
        f" `{instead}` here"
    )
