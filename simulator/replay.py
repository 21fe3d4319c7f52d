"""The arithmetic of a fold, recorded once and done again with other numbers.

A question that is asked over and over with other numbers grows the same tree every time, and most of its time goes into
growing it.  `record` evaluates it once on `Traced` numbers, which do every operation on their value and note it down; what
the answer needs of the notes becomes one Python function of the question's numbers.  Where a formula decides in Python by
a number (`if`), the decision taken is a condition of the recording: the function returns None where it does not hold.
The formulas and the fold stay the only ones there are: a recording is made of them and says exactly what they say.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from math import ceil, floor, log2, sqrt
from typing import Any, NamedTuple, NoReturn

import numpy as np

from simulator import units

#: What numpy is asked of plain numbers, in Python: as text, and done.
_PLAIN: dict[Any, tuple[str, Callable[..., Any]]] = {
    np.add: ("{} + {}", operator.add), np.subtract: ("{} - {}", operator.sub), np.multiply: ("{} * {}", operator.mul),
    np.divide: ("{} / {}", operator.truediv), np.power: ("{} ** {}", operator.pow), np.greater: ("{} > {}", operator.gt),
    np.greater_equal: ("{} >= {}", operator.ge), np.less: ("{} < {}", operator.lt), np.less_equal: ("{} <= {}", operator.le),
    np.minimum: ("min({}, {})", units.minimum), np.maximum: ("max({}, {})", units.maximum),
    np.ceil: ("float(ceil({}))", units.ceil), np.floor: ("float(floor({}))", units.floor), np.sqrt: ("sqrt({})", sqrt),
    np.log2: ("log2({})", log2), np.where: ("{1} if {0} else {2}", lambda condition, x, y: x if condition else y),
    np.any: ("bool({})", bool), np.all: ("bool({})", bool), np.ones_like: ("1.0", lambda _: 1.0),
}  # fmt: skip
_NAMES = {"ceil": ceil, "floor": floor, "sqrt": sqrt, "log2": log2}


class Unrecordable(TypeError):  # noqa: N818 (a state of the recording, not of the program)
    """Something was made of a number that no recording can follow."""


class _Line(NamedTuple):
    """One operation: its text, the lines it uses, and whether it is a condition."""

    text: str
    uses: tuple[int, ...]
    condition: bool = False


class Recorder:
    """Notes the operations on its numbers, each once."""

    def __init__(self) -> None:
        self.lines: list[_Line] = []
        self._asked: list[str] = []
        self._known: dict[str, Traced] = {}
        self._bound: dict[int, tuple[str, Any]] = {}
        self._conditions: set[str] = set()

    def asked(self, value: float) -> Traced:
        """One of the question's numbers."""
        self._asked.append(f"v{len(self.lines)}")
        return self._add("", (), value)

    def _add(self, text: str, uses: tuple[int, ...], value: Any) -> Traced:
        self.lines.append(_Line(text, uses))
        return Traced(self, len(self.lines) - 1, value)

    def call(self, function: Any, given: Sequence[Any], options: dict[str, Any]) -> Traced:
        """The result of a function of traced numbers, as Python has it where all are plain, else as numpy has it."""
        values = [_value(x) for x in given]
        plain = _PLAIN.get(function)
        if plain is not None and not options and not any(isinstance(x, np.ndarray) for x in values):
            template, function = plain
            return self.note(template, function, given)
        named = "".join(f", {name}={self._text(x)}" for name, x in options.items())
        return self.note(f"{self._text(function)}({', '.join(['{}'] * len(given))}{named})", lambda *x: function(*x, **options), given)

    def note(self, template: str, function: Callable[..., Any], given: Sequence[Any]) -> Traced:
        """The result of an operation on `given`, noted as `template` filled with them."""
        text = template.format(*(self._text(x) for x in given))
        if text not in self._known:
            value = function(*(_value(x) for x in given))
            if isinstance(value, np.generic):  # numpy's own scalars are slow
                value, text = value.item(), f"{text}.item()" if text.endswith(")") else f"({text}).item()"
            self._known[text] = self._add(text, tuple(_places(given)), value)
        return self._known[text]

    def _text(self, x: Any) -> str:
        """As Python reads it: numbers in full, the rest by a name."""
        if isinstance(x, Traced):
            return f"v{x.place}"
        if isinstance(x, np.generic):
            x = x.item()
        if isinstance(x, (list, tuple)):
            return f"[{', '.join(self._text(part) for part in x)}]"
        if x is None or (isinstance(x, (bool, int, float)) and abs(x) < np.inf):
            return f"({x!r})" if x is not None and x < 0 else repr(x)
        return self._bound.setdefault(id(x), (f"c{len(self._bound)}", x))[0]

    def holds(self, traced: Traced) -> bool:
        """The truth of a number, which from here on is taken for granted."""
        truth = bool(traced.value)
        text = f"if {'not ' if truth else ''}v{traced.place}: return None"
        if text not in self._conditions:
            self._conditions.add(text)
            self.lines.append(_Line(text, (traced.place,), condition=True))
        return truth

    def function(self, answer: Sequence[Any]) -> Callable[..., tuple[Any, ...] | None]:
        """The recording as a function of the numbers asked, in their order: its conditions and what `answer` needs."""
        needed = {place for place, line in enumerate(self.lines) if line.condition} | set(_places(answer))
        for place in range(len(self.lines) - 1, -1, -1):
            if place in needed:
                needed.update(self.lines[place].uses)
        body = [
            line.text if line.condition else f"v{place} = {line.text}" for place, line in enumerate(self.lines) if place in needed and line.text
        ]
        told = ", ".join(self._text(x) for x in answer)
        source = "\n ".join([f"def replay({', '.join(self._asked)}):", *body, f"return ({told},)"])
        names: dict[str, Any] = {**_NAMES, **dict(self._bound.values())}
        exec(compile(source, "<recording>", "exec"), names)  # noqa: S102 (its text is written above, from numbers and operators)
        made: Callable[..., tuple[Any, ...] | None] = names["replay"]
        return made


def _value(x: Any) -> Any:
    if isinstance(x, Traced):
        return x.value
    if isinstance(x, np.generic):
        return x.item()
    return [_value(part) for part in x] if isinstance(x, (list, tuple)) else x


def _places(given: Sequence[Any]) -> Iterator[int]:
    for x in given:
        if isinstance(x, Traced):
            yield x.place
        elif isinstance(x, (list, tuple)):
            yield from _places(x)


def _both(symbol: str, operate: Callable[[Any, Any], Any]) -> tuple[Callable[[Traced, Any], Traced], Callable[[Traced, Any], Traced]]:
    """An operator with the traced number on its left, and on its right."""
    template = f"{{}} {symbol} {{}}"
    return lambda self, other: self.recorder.note(template, operate, (self, other)), lambda self, other: self.recorder.note(template, operate, (other, self))


class Traced:
    """A number, or a row of numbers over the runs of a prefill, whose operations are noted down."""

    __slots__ = ("place", "recorder", "value")

    def __init__(self, recorder: Recorder, place: int, value: Any) -> None:
        self.recorder, self.place, self.value = recorder, place, value

    __add__, __radd__ = _both("+", operator.add)
    __sub__, __rsub__ = _both("-", operator.sub)
    __mul__, __rmul__ = _both("*", operator.mul)
    __truediv__, __rtruediv__ = _both("/", operator.truediv)
    __pow__, __rpow__ = _both("**", operator.pow)
    __or__, __ror__ = _both("|", operator.or_)
    __and__, __rand__ = _both("&", operator.and_)
    __lt__, __gt__ = (_both(symbol, operate)[0] for symbol, operate in (("<", operator.lt), (">", operator.gt)))
    __le__, __ge__ = (_both(symbol, operate)[0] for symbol, operate in (("<=", operator.le), (">=", operator.ge)))
    __eq__, __ne__ = (_both(symbol, operate)[0] for symbol, operate in (("==", operator.eq), ("!=", operator.ne)))  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    def __neg__(self) -> Traced:
        """Noted like the rest."""
        return self.recorder.note("-{}", operator.neg, (self,))

    def __bool__(self) -> bool:
        """A decision: a condition of the recording."""
        return self.recorder.holds(self)

    def __float__(self) -> NoReturn:
        """Refused: what follows would not be noted."""
        message = "a traced number became a plain one"
        raise Unrecordable(message)

    __int__ = __index__ = __complex__ = __float__

    def __getitem__(self, index: int) -> Traced:
        """One of its numbers."""
        return self.recorder.note(f"{{}}[{index}]", operator.itemgetter(index), (self,))

    def __len__(self) -> int:
        """How many numbers it has."""
        return len(self.value)

    def __iter__(self) -> Iterator[Traced]:
        """Its numbers."""
        return (self[i] for i in range(len(self)))

    @property
    def ndim(self) -> int:
        """Axes of its value."""
        return np.ndim(self.value)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of its value."""
        return np.shape(self.value)

    def tolist(self) -> list[Traced]:
        """Its numbers, plain."""
        return list(self.recorder.note("{}.tolist()", lambda value: value.tolist(), (self,)))

    def __array_ufunc__(self, ufunc: Any, method: str, *given: Any, **options: Any) -> Traced:
        """What numpy's arithmetic makes of it."""
        return self.recorder.call(ufunc if method == "__call__" else getattr(ufunc, method), given, options)

    def __array_function__(self, function: Any, types: Any, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What numpy's other functions make of it."""
        if function in (np.ndim, np.shape, np.size):
            return function(*(_value(x) for x in given))
        return self.recorder.call(function, given, options)


#: Questions folded before one is recorded: a recording takes as long as about fifty folds.
OFTEN = 50
#: Recordings kept of a question, one for every way its decisions went; what meets none of them is folded.
_MOST = 8


class Often:
    """A question that may be asked often: folded at first, then by its recordings."""

    def __init__(self, question: Callable[..., Sequence[Any]]) -> None:
        self.question, self.recordings = question, list[Callable[..., "tuple[Any, ...] | None"]]()
        self._folded, self._recordable = 0, True

    def answer(self, numbers: Sequence[float]) -> Sequence[Any]:
        """The answer for these numbers."""
        for recording in self.recordings:
            found = recording(*numbers)
            if found is not None:
                return found
        self._folded += 1
        if self._folded % OFTEN == 0 and self._recordable and len(self.recordings) < _MOST:
            made = record(self.question, numbers)
            self._recordable = made is not None
            self.recordings = [made, *self.recordings] if made is not None else self.recordings
        return self.question(*numbers)


def record(question: Callable[..., Sequence[Any]], numbers: Sequence[float]) -> Callable[..., tuple[Any, ...] | None] | None:
    """`question` of as many numbers, recorded on these; None where it cannot be.

    >>> mean = record(lambda a, b: [units.minimum(a, b) / 2 if a > 0 else a], [3.0, 4.0])
    >>> mean(8.0, 6.0), mean(-1.0, 6.0)
    ((3.0,), None)
    """
    recorder = Recorder()
    try:
        return recorder.function(question(*(recorder.asked(x) for x in numbers)))
    except Unrecordable:
        return None
