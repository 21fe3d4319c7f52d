"""The arithmetic of a fold, recorded once and done again with other numbers.

A question that is asked over and over with other numbers grows the same tree every time, and most of its time goes into
growing it.  `record` evaluates it once on `Traced` numbers, which do every operation on their value and note it down; what
the answer needs of the notes becomes one Python function of the question's numbers.  Where a formula decides in Python by
a number (`if`), the decision taken is a condition of the recording: the function returns None where it does not hold.
The formulas and the fold stay the only ones there are: a recording is made of them and says exactly what they say.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import ceil, floor, log2, sqrt
from typing import Any, NamedTuple, NoReturn

import numpy as np

from simulator import units

#: What numpy is asked of a number: as Python text, and done.
_PLAIN: dict[Any, tuple[str, Callable[..., Any]]] = {
    np.add: ("{} + {}", operator.add), np.subtract: ("{} - {}", operator.sub), np.multiply: ("{} * {}", operator.mul),
    np.divide: ("{} / {}", operator.truediv), np.power: ("{} ** {}", operator.pow), np.negative: ("-{}", operator.neg),
    np.greater: ("{} > {}", operator.gt), np.greater_equal: ("{} >= {}", operator.ge), np.less: ("{} < {}", operator.lt),
    np.less_equal: ("{} <= {}", operator.le), np.equal: ("{} == {}", operator.eq), np.not_equal: ("{} != {}", operator.ne),
    np.bitwise_or: ("{} | {}", operator.or_), np.bitwise_and: ("{} & {}", operator.and_),
    np.minimum: ("min({}, {})", units.minimum), np.maximum: ("max({}, {})", units.maximum),
    np.ceil: ("float(ceil({}))", units.ceil), np.floor: ("float(floor({}))", units.floor), np.sqrt: ("sqrt({})", sqrt),
    np.log2: ("log2({})", log2), np.where: ("{1} if {0} else {2}", lambda condition, x, y: x if condition else y),
}  # fmt: skip
_VARIABLE = re.compile(r"\bv\d+\b")
#: Brackets inside brackets that Python's parser is asked to read.
_DEEPEST = 30
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
        self._conditions: set[str] = set()

    def asked(self, value: float) -> Traced:
        """One of the question's numbers."""
        self._asked.append(f"v{len(self.lines)}")
        return self._add("", (), value)

    def _add(self, text: str, uses: tuple[int, ...], value: Any) -> Traced:
        self.lines.append(_Line(text, uses))
        return Traced(self, len(self.lines) - 1, value)

    def note(self, template: str, function: Callable[..., Any], given: Sequence[Any]) -> Traced:
        """The result of an operation on `given`, noted as `template` filled with them."""
        text = template.format(*map(_text, given))
        if text not in self._known:
            value = function(*(x.value if isinstance(x, Traced) else x for x in given))
            self._known[text] = self._add(text, tuple(x.place for x in given if isinstance(x, Traced)), value)
        return self._known[text]

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
        conditions = self._needed({place for place, line in enumerate(self.lines) if line.condition})
        told = [x.place for x in answer if isinstance(x, Traced)]
        needed = self._needed(set(told)) - conditions
        uses = Counter(itertools.chain(told, *(self.lines[place].uses for place in (*conditions, *needed))))
        body: list[str] = []
        # what is used once stands where it is used: its text, and how many such texts lie in it
        inside: dict[str, tuple[str, int]] = {}
        # conditions first: a question they turn away has not cost much
        for place in (*sorted(conditions), *sorted(needed)):
            line, name = self.lines[place], f"v{place}"
            text = _VARIABLE.sub(lambda found: inside.get(found[0], (found[0],))[0], line.text)
            depth = max((inside[f"v{use}"][1] for use in line.uses if f"v{use}" in inside), default=0)
            if line.condition:
                body.append(text)
            elif text and place in needed and uses[place] == 1 and depth < _DEEPEST:
                inside[name] = f"({text})", depth + 1
            elif text:
                body.append(f"{name} = {text}")
        answers = "".join(f"{inside.get(_text(x), (_text(x),))[0]}, " for x in answer)
        source = "\n ".join([f"def replay({', '.join(self._asked)}):", *body, f"return ({answers})"])
        names: dict[str, Any] = {**_NAMES, "inf": np.inf, "nan": np.nan}
        exec(compile(source, "<recording>", "exec"), names)  # noqa: S102 (its text is written above, of numbers and operators)
        made: Callable[..., tuple[Any, ...] | None] = names["replay"]
        return made

    def _needed(self, places: set[int]) -> set[int]:
        """These lines and all they use."""
        for place in range(len(self.lines) - 1, -1, -1):
            if place in places:
                places.update(self.lines[place].uses)
        return places


def _text(x: Any) -> str:
    """As Python reads it."""
    if isinstance(x, Traced):
        return f"v{x.place}"
    if isinstance(x, np.generic):
        x = x.item()
    if not isinstance(x, (bool, int, float)):
        message = f"{x!r} is no number"
        raise Unrecordable(message)
    return f"({x!r})" if x < 0 else repr(x)


def _applied(function: Any, given: Sequence[Any]) -> Any:
    """A function of numpy's, of numbers or of rows of them."""
    lengths = {len(x) for x in given if isinstance(x, (_Row, list)) or (isinstance(x, np.ndarray) and x.ndim)}
    if lengths:
        (length,) = lengths
        return _Row([_applied(function, [x[i] if np.ndim(x) else x for x in given]) for i in range(length)])
    if function not in _PLAIN:
        message = f"{function}: not known to recordings"
        raise Unrecordable(message)
    template, plain = _PLAIN[function]
    traced = next((x for x in given if isinstance(x, Traced)), None)
    return plain(*given) if traced is None else traced.recorder.note(template, plain, given)


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

    __slots__ = ("place", "recorder", "value")
    ndim, shape = 0, ()

    def __init__(self, recorder: Recorder, place: int, value: Any) -> None:
        self.recorder, self.place, self.value = recorder, place, value

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
        for place, recording in enumerate(self.recordings):
            found = recording(*numbers)
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
