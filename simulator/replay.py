"""The arithmetic of a fold, recorded once and done again with other numbers.

A question that is asked over and over with other numbers grows the same tree every time, and most of its time goes into
growing it.  `record` evaluates it once on `Traced` numbers, which do every operation on their value and note it down; what
the answer needs of the notes is a `Recording`, a list of operations to do on the numbers of another question.  Where a formula
decides in Python by a number (`if`), the decision taken is a condition of the recording, which answers None where it does not hold.
The formulas and the fold stay the only ones there are: a recording is made of them and says exactly what they say.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

#: What numpy is asked of numbers, as a function of two: what needs one ignores the other.
_PLAIN: dict[Any, Callable[[Any, Any], Any]] = {
    np.add: operator.add, np.subtract: operator.sub, np.multiply: operator.mul, np.divide: operator.truediv, np.power: operator.pow,
    np.greater: operator.gt, np.greater_equal: operator.ge, np.less: operator.lt, np.less_equal: operator.le, np.equal: operator.eq,
    np.not_equal: operator.ne, np.bitwise_or: operator.or_, np.bitwise_and: operator.and_, np.minimum: min, np.maximum: max,
    np.negative: lambda x, _: -x, np.ceil: lambda x, _: float(math.ceil(x)), np.floor: lambda x, _: float(math.floor(x)),
    np.sqrt: lambda x, _: math.sqrt(x), np.log2: lambda x, _: math.log2(x),
}  # fmt: skip

#: What these do to a number on their left changes nothing.
_NEUTRAL = {(operator.add, 0.0), (operator.sub, 0.0), (operator.mul, 1.0), (operator.truediv, 1.0)}
#: Those whose sides may change places.
_EITHER = {operator.add, operator.mul}


class Unrecordable(TypeError):  # noqa: N818 (a state of the recording, not of the program)
    """Something was made of a number that no recording can follow."""


#: One operation on the values at two places: a plain tuple, which Python unpacks fastest.
_Step = tuple[Callable[[Any, Any], Any], int, int]


@dataclass(frozen=True, slots=True)
class Recording:
    """What is done with a question's numbers: they and the constants come first, and every step adds a value.  The first steps
    decide: the values at the places of `conditions` must be as true as they were.
    """

    constants: tuple[Any, ...]
    deciding: tuple[_Step, ...]
    conditions: tuple[tuple[int, bool], ...]
    steps: tuple[_Step, ...]
    told: tuple[int, ...]

    def __call__(self, *numbers: float) -> tuple[Any, ...] | None:
        """The answer for these numbers; None where a condition does not hold."""
        values: list[Any] = [*numbers, *self.constants]
        add = values.append
        for function, left, right in self.deciding:
            add(function(values[left], values[right]))
        for place, truth in self.conditions:
            if values[place] != truth:
                return None
        for function, left, right in self.steps:
            add(function(values[left], values[right]))
        return tuple([values[place] for place in self.told])


class Recorder:
    """Notes the operations on its numbers, each once."""

    def __init__(self) -> None:
        self.asked_for = 0
        self._steps: list[_Step | None] = []
        self._values: list[Any] = []
        self._known: dict[tuple[Any, ...], int] = {}
        self._conditions: dict[int, bool] = {}

    def asked(self, value: float) -> Traced:
        """One of the question's numbers."""
        self.asked_for += 1
        return Traced(self, self._add(None, value))

    def _add(self, step: _Step | None, value: Any) -> int:
        self._steps.append(step)
        self._values.append(value)
        return len(self._steps) - 1

    def value(self, place: int) -> Any:
        """What it was for the numbers recorded."""
        return self._values[place]

    def _place(self, x: Any) -> int:
        """Of a traced number its own, of another that of a constant."""
        if type(x) is Traced:
            return x.place
        x = x.item() if isinstance(x, np.generic) else x
        if not isinstance(x, (bool, int, float)):
            message = f"{x!r} is no number"
            raise Unrecordable(message)
        key = (type(x), x)
        if key not in self._known:
            self._known[key] = self._add(None, x)
        return self._known[key]

    def note(self, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Traced:
        """The result of an operation."""
        if type(left) is not Traced and function in _EITHER:
            left, right = right, left
        if type(right) in (float, int) and (function, right) in _NEUTRAL and type(left) is Traced:
            return left
        key = step = (function, self._place(left), self._place(right))
        if key not in self._known:
            self._known[key] = self._add(step, function(self._values[step[1]], self._values[step[2]]))
        return Traced(self, self._known[key])

    def holds(self, traced: Traced) -> bool:
        """The truth of a number, which from here on is taken for granted."""
        return self._conditions.setdefault(traced.place, bool(traced.value))

    def decided(self, traced: Traced) -> bool | None:
        """The truth of a number that is taken for granted already."""
        return self._conditions.get(traced.place)

    def recording(self, answer: Sequence[Any]) -> Recording:
        """The conditions and what `answer` needs, in as few steps."""
        told = [self._place(x) for x in answer]
        deciding = self._needed(set(self._conditions))
        needed = self._needed(set(told)) - deciding
        numbers = range(self.asked_for)
        constants = [place for place in sorted(deciding | needed) if place not in numbers and self._steps[place] is None]
        order = [*numbers, *constants, *self._done(deciding), *self._done(needed)]
        at = {place: number for number, place in enumerate(order)}

        def moved(places: set[int]) -> tuple[_Step, ...]:
            steps = (self._steps[place] for place in self._done(places))
            return tuple((step[0], at[step[1]], at[step[2]]) for step in steps if step is not None)

        return Recording(
            tuple(self._values[place] for place in constants), moved(deciding),
            tuple((at[place], truth) for place, truth in self._conditions.items()), moved(needed), tuple(at[place] for place in told),
        )  # fmt: skip

    def _needed(self, places: set[int]) -> set[int]:
        """These and all they are made of."""
        for place in range(len(self._steps) - 1, -1, -1):
            step = self._steps[place]
            if place in places and step is not None:
                places |= {step[1], step[2]}
        return places

    def _done(self, places: set[int]) -> list[int]:
        """Those that are results of steps, in their order."""
        return [place for place in sorted(places) if self._steps[place] is not None]


def _pair(x: Any, y: Any) -> tuple[Any, Any]:
    return x, y


def _or_nothing(x: Any, condition: Any) -> Any:
    return x if condition else 0.0


def _many(x: Any) -> bool:
    """Whether it is a row of numbers."""
    return isinstance(x, (_Row, list)) or (isinstance(x, np.ndarray) and x.ndim > 0)


def _applied(function: Any, given: Sequence[Any]) -> Any:
    """A function of numpy's, of numbers or of rows of them."""
    lengths = {len(x) for x in given if type(x) is not Traced and type(x) is not float and _many(x)}
    if lengths:
        (length,) = lengths
        return _Row([_applied(function, each) for each in zip(*(x if _many(x) else [x] * length for x in given), strict=True)])
    if function is np.where:
        return _chosen(*given)
    if function not in _PLAIN:
        message = f"{function}: not known to recordings"
        raise Unrecordable(message)
    left, right = given if len(given) == 2 else (*given, 0.0)  # noqa: PLR2004 (functions of one or two numbers)
    traced = left if type(left) is Traced else right
    return traced.recorder.note(_PLAIN[function], left, right) if type(traced) is Traced else _PLAIN[function](left, right)


def _chosen(condition: Any, x: Any, y: Any) -> Any:
    """One of two numbers."""
    known = condition.recorder.decided(condition) if isinstance(condition, Traced) else bool(condition)
    if known is not None:
        return x if known else y
    recorder = condition.recorder
    if type(y) is float and y == 0.0:
        return recorder.note(_or_nothing, x, condition)
    # a truth is the number 0 or 1
    return recorder.note(operator.getitem, recorder.note(_pair, y, x), condition)


def _reduced(function: Any) -> Callable[..., Any]:
    """The same of all numbers of a row, from the first to the last."""
    return lambda row, axis=0: functools.reduce(lambda x, y: _applied(function, (x, y)), row)  # noqa: ARG005 (it has one)


#: What else numpy is asked of numbers and rows.
_OTHERS: dict[Any, Callable[..., Any]] = {
    np.ndim: lambda x: x.ndim, np.shape: lambda x: x.shape, np.size: lambda x: len(x) if x.ndim else 1, np.ones_like: lambda x: x * 0.0 + 1.0,
    np.stack: lambda rows: _Row(rows), np.broadcast_to: lambda x, shape: x if np.ndim(x) or not shape else _Row([x] * shape[0]),  # noqa: PLW0108
    np.cumsum: lambda row, axis=0: _Row(list(itertools.accumulate(row))),  # noqa: ARG005
    np.any: lambda x: any(map(bool, x)) if x.ndim else bool(x), np.all: lambda x: all(map(bool, x)) if x.ndim else bool(x),
    np.max: _reduced(np.maximum), np.min: _reduced(np.minimum),
}  # fmt: skip


def _operator(function: Any) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    """An operator with the traced number on its left, and on its right."""
    return lambda self, other: _applied(function, (self, other)), lambda self, other: _applied(function, (other, self))


class _Number:
    """What traced numbers and rows of them have in common: every operation is noted."""

    __slots__ = ()

    __add__, __radd__ = _operator(np.add)
    __sub__, __rsub__ = _operator(np.subtract)
    __mul__, __rmul__ = _operator(np.multiply)
    __truediv__, __rtruediv__ = _operator(np.divide)
    __pow__, __rpow__ = _operator(np.power)
    __or__, __ror__ = _operator(np.bitwise_or)
    __and__, __rand__ = _operator(np.bitwise_and)
    __lt__, __gt__ = _operator(np.less)[0], _operator(np.greater)[0]
    __le__, __ge__ = _operator(np.less_equal)[0], _operator(np.greater_equal)[0]
    __eq__, __ne__ = _operator(np.equal)[0], _operator(np.not_equal)[0]
    __hash__ = None  # type: ignore[assignment]

    def __neg__(self) -> Any:
        """Noted like the rest."""
        return _applied(np.negative, (self,))

    def __float__(self) -> NoReturn:
        """Refused: what follows would not be noted."""
        message = "a traced number became a plain one"
        raise Unrecordable(message)

    __int__ = __index__ = __complex__ = __float__

    def __array_ufunc__(self, ufunc: Any, method: str, *given: Any, **options: Any) -> Any:
        """What numpy's arithmetic makes of it."""
        return _reduced(ufunc)(*given) if method == "reduce" else _applied(ufunc, given)

    def __array_function__(self, function: Any, types: Any, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What numpy's other functions make of it."""
        return _OTHERS[function](*given, **options) if function in _OTHERS else _applied(function, given)


class Traced(_Number):
    """A number whose operations are noted down."""

    __slots__ = ("place", "recorder")
    ndim, shape = 0, ()

    def __init__(self, recorder: Recorder, place: int) -> None:
        self.recorder, self.place = recorder, place

    @property
    def value(self) -> Any:
        """What it was for the numbers recorded."""
        return self.recorder.value(self.place)

    def __bool__(self) -> bool:
        """A decision: a condition of the recording."""
        return self.recorder.holds(self)


class _Row(_Number):
    """Numbers along the runs of a prefill, each traced alone."""

    __slots__ = ("numbers",)
    ndim = 1

    def __init__(self, numbers: Sequence[Any]) -> None:
        if any(np.ndim(x) for x in numbers):
            message = "rows of rows are not recorded"
            raise Unrecordable(message)
        self.numbers = list(numbers)

    @property
    def shape(self) -> tuple[int]:
        """How many numbers."""
        return (len(self.numbers),)

    def tolist(self) -> list[Any]:
        """The numbers."""
        return self.numbers

    def __len__(self) -> int:
        """How many numbers."""
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        """One of them, or some."""
        return _Row(self.numbers[index]) if isinstance(index, slice) else self.numbers[index]

    def __iter__(self) -> Iterator[Any]:
        """The numbers."""
        return iter(self.numbers)


#: Questions folded before one is recorded: a recording takes as long as about ten folds.
OFTEN = 10
#: Recordings kept of a question, one for every way its decisions went; what meets none of them is folded.
_MOST = 8


class Often:
    """A question that may be asked often: folded at first, then by its recordings."""

    def __init__(self, question: Callable[..., Sequence[Any]]) -> None:
        self.question, self.recordings = question, list[Recording]()
        self._folded, self._recordable = 0, True

    def answer(self, numbers: Sequence[float]) -> Sequence[Any]:
        """The answer for these numbers."""
        for place, recording in enumerate(self.recordings):
            try:
                found = recording(*numbers)
            except (ArithmeticError, ValueError):  # numpy goes on where Python does not: the fold answers
                break
            if found is not None:
                # what was met last is likely to be met next
                self.recordings[0], self.recordings[place] = recording, self.recordings[0]
                return found
        self._folded += 1
        if self._folded % OFTEN == 0 and self._recordable and len(self.recordings) < _MOST:
            made = record(self.question, numbers)
            self._recordable = made is not None
            self.recordings = [made, *self.recordings] if made is not None else self.recordings
        return self.question(*numbers)


def record(question: Callable[..., Sequence[Any]], numbers: Sequence[float]) -> Recording | None:
    """`question` of as many numbers, recorded on these; None where it cannot be, or not on these.

    >>> mean = record(lambda a, b: [np.minimum(a, b) / 2 if a > 0 else a], [3.0, 4.0])
    >>> mean(8.0, 6.0), mean(-1.0, 6.0)
    ((3.0,), None)
    """
    recorder = Recorder()
    try:
        return recorder.recording(question(*(recorder.asked(x) for x in numbers)))
    except (Unrecordable, ArithmeticError, ValueError):
        return None
