"""The comparison of two journals of `JournalCB`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from .journal import DIGESTS, END, PLACE


@dataclass(frozen=True)
class Difference:
    """The first difference of two journals; `str()` of it is a sentence.

    Attributes:
        line: the number of the line, from 1.
        event, epoch, phase, iter: the event of that line in the first journal or, if that has
            ended, in the second; None for what the event does not have.
        fields: the keys that differ. They include "event", "epoch", "phase" or "iter" if different
            events happened; otherwise the events are the same, with different values.
        a, b: the values of these keys in the first and in the second journal, or None.
        equal: the digests of this line that are equal.
    """

    line: int
    event: str
    epoch: int | None
    phase: str | None
    iter: int | None
    fields: tuple[str, ...]
    a: dict[str, Any]
    b: dict[str, Any]
    equal: tuple[str, ...]

    def __str__(self) -> str:
        place = {key: getattr(self, key) for key in PLACE}
        if not set(PLACE).isdisjoint(self.fields):
            one, two = _sentence(place | self.a), _sentence(place | self.b)
            return f"line {self.line} is {one} in the first run, {two} in the second"
        values = [f"{DIGESTS.get(k, k)} ({self.a[k]} and {self.b[k]})" for k in self.fields]
        text = f"at line {self.line}, {_sentence(place)}, these differ: {', '.join(values)}"
        equal = ", ".join(DIGESTS[key] for key in self.equal)
        return f"{text}; these are equal: {equal}" if equal else text


def _sentence(line: dict[str, Any]) -> str:
    text: str = line["event"] or "missing"
    if line["epoch"] is not None:
        text += f" of {'training' if line['phase'] == 'train' else 'validating'}"
        text += f" epoch {line['epoch']}"
    if line["iter"] is not None:
        text += f", batch {line['iter']}"
    if line.get("status") not in (None, "completed"):
        text += f" ({line['status']} by {line.get('who')}: {line.get('reason')})"
    return text


def compare_runs(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Difference | None:
    """Find the first difference of two journals that `JournalCB` wrote; None if they are equal.

    They are read line by line, and never held as a whole. If digests differ, the runs have diverged
    since the digests before them; with `every=1`, in this very batch.

    Raises:
        ValueError: a line is damaged; perhaps the run was killed while it was written.
        OSError: a journal cannot be read.
    """
    nothing: dict[str, Any] = {}
    for number, (one, two) in enumerate(zip_longest(_lines(a), _lines(b), fillvalue=nothing), 1):
        differ = [key for key in one | two if repr(one.get(key)) != repr(two.get(key))]
        equal = tuple(key for key in DIGESTS if key in one and key not in differ)
        if not set(PLACE).isdisjoint(differ):
            differ = [key for key in differ if key in PLACE + END]
        if differ:
            return Difference(
                number,
                **{key: (one or two).get(key) for key in PLACE},  # type: ignore[arg-type]
                fields=tuple(differ),
                a={key: one.get(key) for key in differ},
                b={key: two.get(key) for key in differ},
                equal=equal,
            )
    return None


def _lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                line["event"], text.index(b"\n")
                line |= {f"metrics.{name}": x for name, x in line.pop("metrics", {}).items()}
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(f"{path}: line {number} is damaged: {text[:80]!r}") from None
            yield line
