"""A callback: a group of receivers that together add one feature to the training.

Its methods named after events (`before_batch`, `after_loss`, ...) receive them while it is
attached to a learner; a method named after an action (`predict`, `get_loss`, `backward`,
`step`, `zero_grad`) performs it, or wraps it: `event.proceed()` has the next one in order do it,
last the learner's own method. Either may be an `async def`, but `proceed` needs a plain method.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, get_args

from .base import HOOKS, ActionEvent, Event
from .learner import Purpose

Overflow = Literal["drop_oldest", "latest", "block"]


class Watcher(Protocol):
    """The type that `Callback.watcher` returns: it receives the observed events of one fit.

    It may have an `async def close()`, which is awaited on the event loop when it gets no more
    events: at the end of the fit, or when the callback has been detached or has raised.
    """

    def wants(self, event: Any) -> bool:
        """Whether to observe this event. Called in the training thread, so it must be quick."""
        ...

    def observe(self, event: Any) -> Awaitable[Any] | None:
        """Called on the event loop with each event that is wanted. May be an `async def`."""
        ...


class Callback:
    """Base class of all callbacks.

    Attributes:
        order: callbacks of lower order run earlier; those of equal order in the order of
            attachment.
        run_after: callback classes, or their names, that run before this one if they are attached,
            whatever their `order`.
        run_before: the same, for callbacks that run after this one.
        observes: event classes that are passed to the method `observe(event)`, plain or async, on
            the host's event loop, concurrently with the training.
        buffer, overflow: the buffer for observed events; see `Learner.observe`.
        state_key: a name of its own for its state in checkpoints. Callbacks of one class are told
            apart by it or, if it is None, by the arguments that they were made with.
        fit_purpose: the purpose of a fit while this callback is attached: "lr_find" in LRFinderCB.
            A fit whose purpose is not "fit" is not saved, scheduled or stopped early.
        takes_over: the actions that this callback performs in place of a method of the user's
            learner class, on purpose; otherwise that is an error at `fit`. A callback that calls
            `event.proceed()` does not need it.
        not_with_closures: why it cannot work with an optimizer that computes the loss and its
            gradients several times per step, such as LBFGS, so that such a fit is refused; None if
            it can.
        shareable: whether fits that run at the same time may use one instance. That is refused
            unless its class says so itself (a subclass does not inherit it), because what it keeps
            of one fit would be mixed with the other. A callback that only observes may always be
            shared.
        records_loss: whether it records the loss of each epoch, as MetricsCB does. If no callback
            does, `Learner.validate` records it itself.
        in_extra_validation: whether it receives the events of the validations that a `ValidateCB`
            runs within a fit, whose purpose is "validate". False for callbacks that keep something
            of the fit's own epochs, such as metrics.

    Raises:
        TypeError: when a subclass is defined, if a method looks like a misspelt event name, or
            several event classes belong to its name.

    Example:
        >>> from eventrain.events import AfterBatch, Callback, CancelFitException
        >>> class StopWhenGood(Callback):
        ...     def __init__(self, loss):
        ...         self.loss = loss
        ...
        ...     def after_batch(self, event: AfterBatch):
        ...         if event.training and event.loss.item() < self.loss:
        ...             raise CancelFitException(f"loss below {self.loss}")
        >>> class Typo(Callback):
        ...     def after_bach(self, event): ...
        Traceback (most recent call last):
            ...
        TypeError: Typo.after_bach does not receive an event: did you mean 'after_batch'? ...

    Source: fastai's miniai; `run_after` and `run_before` come from fastai.
    """

    order: float = 0
    run_after: Sequence[str | type[Callback]] = ()
    run_before: Sequence[str | type[Callback]] = ()
    observes: tuple[type[Event], ...] = ()
    buffer: int = 1024
    overflow: Overflow = "drop_oldest"
    state_key: str | None = None
    fit_purpose: ClassVar[Purpose] = "fit"
    takes_over: ClassVar[tuple[type[ActionEvent], ...]] = ()
    shareable: ClassVar[bool] = False
    not_with_closures: str | None = None
    records_loss: ClassVar[bool] = False
    in_extra_validation: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if name.startswith("_") or isinstance(value, type) or name in vars(Callback):
                continue
            method = getattr(cls, name)  # a classmethod is callable only once it is bound
            if name in HOOKS:
                if callable(method):
                    _event_class(cls, name, method)
            elif callable(method):
                _check_name(cls, name, method)
        observed = callable(getattr(cls, "observe", None)) or cls.watcher is not Callback.watcher
        _check_observers(cls)
        if cls.observes and not observed:
            raise TypeError(
                f"{cls.__qualname__} has `observes`, but no method `observe`: define"
                " observe(self, event), or remove `observes`"
            )

    def receivers(self, learner: Any) -> Iterator[tuple[type[Event], Callable[[Any], Any]]]:
        """Yield (event class, method) for each event it receives from `learner`.

        Raises:
            TypeError: a method could mean one of several event classes of the same name.
        """
        for hook in tuple(HOOKS):
            method = getattr(self, hook, None)
            if callable(method) and hook not in _NEVER_RECEIVED:
                yield _event_class(type(self), hook, method), method

    def measured(self) -> Mapping[str, Any]:
        """The numbers that it has measured in the current epoch so far.

        It is called when an epoch is cut short by a cancel or an error, before CleanupEpoch, so
        that the event and `FitResult.history` have them. By default there are none.
        """
        return {}

    def steps_in(self, n_batches: int) -> int:
        """The number of optimizer steps that an epoch of `n_batches` batches will take.

        It is called before a fit, for `learner.n_steps`, by which schedulers are sized. A callback
        that leaves out steps by a rule, as accumulation does, returns a smaller number.
        """
        return n_batches

    def wants(self, event: Event) -> bool:
        """Whether to pass an event of `observes` to `observe`. Called in the training thread, so
        it must be quick."""
        return True

    def watcher(self, event: Event) -> Watcher:
        """Return the object that observes the fit of `event`.

        It is called once per fit and learner, in the training thread, with the first observed event
        of the fit. By default it returns the callback itself, whose attributes then serve all
        fits. A callback that keeps state for each fit returns a new object here.
        """
        return self  # type: ignore[return-value]  # its `observe` is checked where it has `observes`


_NEVER_RECEIVED = {ActionEvent.hook}
_PREFIXES = ("before_", "after_", "cleanup_")


def _event_class(cls: type[Callback], name: str, method: Callable[..., Any]) -> type[Event]:
    """The event class that a method receives: that of its name; of several, the annotated one.

    Raises:
        TypeError: several classes are possible; or the name is that of ActionEvent.
    """
    if name in _NEVER_RECEIVED:
        raise TypeError(
            f"{cls.__qualname__}.{name} would never be called: an action is received by a method"
            " with its own name, such as `step`"
        )
    classes = HOOKS[name]
    if len(classes) == 1:
        return classes[0]
    annotated = _annotation(method)
    if annotated in classes:
        return annotated
    names = " and ".join(f"{c.__module__}.{c.__name__}" for c in classes)
    raise TypeError(
        f"{cls.__qualname__}.{name} could receive {names}: annotate its parameter with the class"
        f" that it receives, as in `def {name}(self, event: {classes[0].__name__})`"
    )


def _annotation(method: Callable[..., Any]) -> type[Event] | None:
    """The event class with which a parameter is annotated; None if it cannot be determined."""
    function = getattr(method, "__func__", method)
    while isinstance(function, partial):
        function = function.func
    namespace = getattr(inspect.unwrap(function), "__globals__", {})
    for parameter in _parameters(method):
        annotation = parameter.annotation
        if isinstance(annotation, str):
            # A name that only a type checker or the enclosing function knows cannot be evaluated.
            with suppress(Exception):
                annotation = eval(annotation, namespace)
        for choice in get_args(annotation) or (annotation,):  # `AfterSave | None`, for one
            if isinstance(choice, type) and issubclass(choice, Event):
                return choice
    return None


def _check_observers(cls: type[Callback]) -> None:
    """Refuse an override that is never called, because the watcher of a base class observes."""
    bypassed = {"wants", "observe"} & vars(cls).keys()
    if bypassed and "watcher" not in vars(cls) and cls.watcher is not Callback.watcher:
        name = min(bypassed)
        owner = next(base for base in cls.__mro__ if "watcher" in vars(base))
        raise TypeError(
            f"{cls.__qualname__}.{name} would never be called: {owner.__qualname__} observes each"
            f" fit with an object of its own. Override watcher(event), which returns it"
        )


def _check_name(cls: type[Callback], name: str, method: Callable[..., Any]) -> None:
    """Raise a TypeError for a method whose name is most likely a misspelt event name."""
    near = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.85)
    prefixed = name.startswith(_PREFIXES)
    if not prefixed and not (near and _takes_an_event(name, near[0], method)):
        return  # another method of the user, such as `steps`
    hint = f"did you mean {near[0]!r}?" if near else f"the events are {', '.join(HOOKS)}."
    raise TypeError(
        f"{cls.__qualname__}.{name} does not receive an event: {hint} If it is not meant to,"
        f" rename it, for example with an underscore: _{name}"
    )


def _takes_an_event(method_name: str, near: str, method: Callable[..., Any]) -> bool:
    """Whether a method with a name like that of the event `near` is meant to receive it.

    Names such as `befor_batch` or `preditc` have no other meaning. One that contains the name of
    an event, such as `steps`, may be meant for something else: that method has to take one argument
    that is named `event` or annotated with an event class.
    """
    if near.startswith(_PREFIXES) or near not in method_name:
        return True
    names = [parameter.name for parameter in _parameters(method) if parameter.name != "self"]
    return names == ["event"] or (len(names) == 1 and _annotation(method) is not None)


def _parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(method).parameters.values())
    except ValueError:  # some builtins have no signature
        return []
