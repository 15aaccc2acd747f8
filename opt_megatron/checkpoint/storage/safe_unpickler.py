"""A pickle interpreter that builds plain data and executes no code.

Python's own cannot be restricted enough: whatever `find_class` allows, it sets attributes of any object, hashes any
key, and its C version allocates memory for any memo index. This one knows the opcodes that torch.save writes
(protocols 2 to 5) and a few constructors, and replaces every other class or function by an inert stub. What it
allocates is counted and limited: one byte of a pickle may be a set of 216 bytes.
Only plain values of a pickle are hashed, compared or printed: nested tuples that share their elements take little
memory, but walking through them may never end.

It is also several times faster than `pickle._Unpickler`: the raw files of OPT-175B hold 17 million opcodes.
(Opcodes: CPython's Lib/pickletools.py.)
"""

from __future__ import annotations

import argparse
import collections
import pickle as op
import struct
import sys
from collections.abc import Callable
from typing import Any


class Inert:
    """A stub for an unknown class, function or object. Operations on it have no effect."""


class Record:
    """An object that is not built: the name of its class and what was stored of it. Hashed by its identity.

    Attributes:
        kind: the class's name.
        state: what its attributes would be set from, most often a dictionary; None if nothing was stored.
    """

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


class InvalidPickleError(ValueError):
    """The bytes are not a pickle, or use opcodes or calls that this interpreter does not know."""


def unpickle(
    data: bytes,
    known: dict[tuple[str, str], Any],
    persistent_load: Callable[[Any], Any],
    *,
    bytes_per_byte: int = 32,
) -> Any:
    """The object that a pickle describes.

    Args:
        known: (module, name) -> a function that may be called, or a value.
        persistent_load: returns the object for a persistent id.
        bytes_per_byte: how much may be allocated for a byte of the pickle; the names of tensors take 15 to 20.

    Raises:
        InvalidPickleError: the bytes are not a pickle, or use what is not known here.
        IndexError, struct.error, TypeError, ValueError ...: the bytes end early or contradict themselves.
    """
    return _Unpickler(data, known, persistent_load, _FREE_BYTES + bytes_per_byte * len(data)).run()


class _Unpickler:
    def __init__(
        self, data: bytes, known: dict[tuple[str, str], Any], persistent_load: Callable[[Any], Any], budget: int
    ) -> None:
        self._data = data
        self._at = 0
        self._known = known
        self._callable = {value for value in known.values() if callable(value)} | {argparse.Namespace}
        self._persistent_load = persistent_load
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._budget = budget

    def run(self) -> Any:
        """Interpret the bytes up to STOP. The most frequent opcodes are handled here, the others by methods."""
        data, memo, unpack_4, unpack_2 = self._data, self._memo, _UINT32.unpack_from, _UINT16.unpack_from
        stack, at = self._stack, 0
        while True:
            code = data[at]
            at += 1
            if code == _LONG_BINGET:
                stack.append(memo[unpack_4(data, at)[0]])
                at += 4
            elif code == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif code == _LONG_BINPUT:
                memo[unpack_4(data, at)[0]] = stack[-1]
                at += 4
            elif code == _BINPUT:
                memo[data[at]] = stack[-1]
                at += 1
            elif code == _BININT1:
                stack.append(data[at])
                at += 1
            elif code == _BININT2:
                stack.append(unpack_2(data, at)[0])
                at += 2
            elif code == _BINUNICODE:
                end = at + 4 + unpack_4(data, at)[0]
                stack.append(self._text(at + 4, end))
                at = end
            elif code == _MARK:
                self._marks.append(stack)
                stack = self._stack = []
                if len(self._marks) > _MOST_MARKS:
                    raise InvalidPickleError(f"more than {_MOST_MARKS:,} containers in each other")
            elif code == _STOP:
                return stack.pop()
            else:
                handler = _HANDLERS.get(code)
                if handler is None:
                    raise InvalidPickleError(f"opcode {code:#x} is not one that torch.save writes")
                self._at = at
                self._budget -= _COSTS.get(code, _USUAL_COST)
                if self._budget < 0:
                    raise InvalidPickleError("what it describes takes more memory than a checkpoint of its size needs")
                handler(self)
                stack, at = self._stack, self._at

    # Reading

    def _read(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise InvalidPickleError("it ends early")
        return self._data[start : self._at]

    def _text(self, start: int, end: int) -> str:
        if end > len(self._data):
            raise InvalidPickleError("it ends early")
        return self._data[start:end].decode("utf-8", "surrogatepass")

    def _length(self, size: int) -> int:
        return int.from_bytes(self._read(size), "little")

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at)
        line = self._data[self._at : end].decode("utf-8")
        self._at = end + 1
        return line

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    # Values

    def _proto(self) -> None:
        if self._read(1)[0] > 5:
            raise InvalidPickleError("its protocol is newer than 5")

    def _frame(self) -> None:
        self._read(8)

    def _pop(self) -> None:
        self._stack.pop()

    def _pop_mark(self) -> None:
        self._since_mark()

    def _int(self) -> None:
        self._stack.append(int.from_bytes(self._read(4), "little", signed=True))

    def _long(self, size: int) -> None:
        self._stack.append(int.from_bytes(self._read(self._length(size)), "little", signed=True))

    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._read(8))[0])

    def _unicode(self, size: int) -> None:
        self._stack.append(self._read(self._length(size)).decode("utf-8", "surrogatepass"))

    def _byte_string(self, size: int) -> None:
        self._stack.append(self._read(self._length(size)))

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    # Containers

    def _tuple_of(self, count: int) -> None:
        items = self._stack[len(self._stack) - count :]
        if len(items) != count:
            raise InvalidPickleError("its stack is empty")
        self._stack[len(self._stack) - count :] = [tuple(items)]

    def _marked(self, make: Callable[[list[Any]], Any]) -> None:
        items = self._since_mark()
        self._stack.append(make(items))

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        self._budget -= _ITEM_COST * len(items)
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Inert):
            raise InvalidPickleError(f"items for a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        self._budget -= _ITEM_COST * len(items)
        if type(target) in (dict, collections.OrderedDict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_plain_key(key)] = value
        elif not isinstance(target, Inert):
            raise InvalidPickleError(f"keys for a {type(target).__name__}")

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _add_items(self) -> None:
        items, target = self._since_mark(), self._stack[-1]
        self._budget -= _ITEM_COST * len(items)
        if type(target) is set:
            target.update(map(_plain_key, items))
        elif not isinstance(target, Inert):
            raise InvalidPickleError(f"members for a {type(target).__name__}")

    # Classes, functions and calls

    def _global(self, module: Any, name: Any) -> None:
        known = self._known.get((module, name)) if type(module) is type(name) is str else None
        self._stack.append(Inert() if known is None else known)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _call(self, function: Any, arguments: Any) -> None:
        if isinstance(function, Inert):
            self._stack.append(Inert())
        elif type(arguments) is tuple and callable(function) and function in self._callable:
            # A file can ask for copies of the same long list a thousand times.
            copied = (len(value) for value in arguments if type(value) in (list, tuple, str, dict))
            self._budget -= _ITEM_COST * sum(copied)
            self._stack.append(function(*arguments))
        else:
            raise InvalidPickleError(f"a call of a {type(function).__name__}")

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._call(function, arguments)

    def _new_object_ex(self) -> None:
        self._stack.pop()  # keyword arguments, which none of the known functions has
        self._reduce()

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        # Only a record and a namespace get a state. Unknown objects, and classes above all, stay unchanged.
        if type(target) is Record:
            target.state = state
        elif type(target) is argparse.Namespace and type(state) is dict:
            self._budget -= _ITEM_COST * len(state)
            vars(target).update({key: value for key, value in state.items() if type(key) is str})

    def _persistent(self) -> None:
        self._stack.append(self._persistent_load(self._stack.pop()))


def _plain_key(key: Any) -> Any:
    """The key itself if it is plain, or a record, and no other key has its hash by intention; else a stub.

    Python hashes a number modulo 2^61 - 1, and texts with a secret: thousands of large numbers can have one hash.
    """
    if type(key) is int:
        return key if -sys.hash_info.modulus < key < sys.hash_info.modulus else Inert()
    return key if type(key) in (str, bool, bytes, type(None), Record) else Inert()


def ordered_dict(items: Any = ()) -> collections.OrderedDict:
    """collections.OrderedDict, of pairs whose keys are plain."""
    return collections.OrderedDict((_plain_key(key), value) for key, value in items)


def latin1_bytes(text: Any, encoding: Any) -> bytes:
    """_codecs.encode, by which protocol 2 represents a bytes object."""
    if type(text) is not str or type(encoding) is not str or encoding != "latin1":
        raise InvalidPickleError("bytes that are not encoded as latin1")
    return text.encode("latin1")


def _dictionary(items: list[Any]) -> dict[Any, Any]:
    return {_plain_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


# What a pickle may allocate, and what opcodes are taken to allocate: at least what CPython does, with the entry of the
# stack or the memo.
_FREE_BYTES = 64 * 2**20
_MOST_MARKS = 10_000
_USUAL_COST, _ITEM_COST = 100, 50
_COSTS = {
    **dict.fromkeys((op.EMPTY_SET[0], op.FROZENSET[0], op.EMPTY_DICT[0], op.DICT[0]), 300),
    **dict.fromkeys((op.REDUCE[0], op.NEWOBJ[0], op.NEWOBJ_EX[0], op.BINPERSID[0]), 300),
}
_UINT16, _UINT32 = struct.Struct("<H"), struct.Struct("<I")
_BINGET, _LONG_BINGET, _BINPUT, _LONG_BINPUT = op.BINGET[0], op.LONG_BINGET[0], op.BINPUT[0], op.LONG_BINPUT[0]
_BININT1, _BININT2, _BINUNICODE, _MARK, _STOP = op.BININT1[0], op.BININT2[0], op.BINUNICODE[0], op.MARK[0], op.STOP[0]
_HANDLERS: dict[int, Callable[[_Unpickler], None]] = {
    code[0]: handler
    for code, handler in (
        (op.PROTO, _Unpickler._proto),
        (op.FRAME, _Unpickler._frame),
        (op.POP, _Unpickler._pop),
        (op.POP_MARK, _Unpickler._pop_mark),
        (op.NONE, lambda m: m._stack.append(None)),
        (op.NEWTRUE, lambda m: m._stack.append(True)),
        (op.NEWFALSE, lambda m: m._stack.append(False)),
        (op.BININT, _Unpickler._int),
        (op.LONG1, lambda m: m._long(1)),
        (op.LONG4, lambda m: m._long(4)),
        (op.BINFLOAT, _Unpickler._float),
        (op.SHORT_BINUNICODE, lambda m: m._unicode(1)),
        (op.BINUNICODE8, lambda m: m._unicode(8)),
        (op.SHORT_BINBYTES, lambda m: m._byte_string(1)),
        (op.BINBYTES, lambda m: m._byte_string(4)),
        (op.BINBYTES8, lambda m: m._byte_string(8)),
        (op.BYTEARRAY8, lambda m: m._byte_string(8)),
        (op.MEMOIZE, _Unpickler._memoize),
        (op.EMPTY_LIST, lambda m: m._stack.append([])),
        (op.EMPTY_TUPLE, lambda m: m._stack.append(())),
        (op.EMPTY_DICT, lambda m: m._stack.append({})),
        (op.EMPTY_SET, lambda m: m._stack.append(set())),
        (op.TUPLE1, lambda m: m._tuple_of(1)),
        (op.TUPLE2, lambda m: m._tuple_of(2)),
        (op.TUPLE3, lambda m: m._tuple_of(3)),
        (op.TUPLE, lambda m: m._marked(tuple)),
        (op.LIST, lambda m: m._marked(list)),
        (op.DICT, lambda m: m._marked(_dictionary)),
        (op.FROZENSET, lambda m: m._marked(lambda items: frozenset(map(_plain_key, items)))),
        (op.APPEND, lambda m: m._append([m._stack.pop()])),
        (op.APPENDS, lambda m: m._append(m._since_mark())),
        (op.SETITEM, _Unpickler._set_item),
        (op.SETITEMS, lambda m: m._set_items(m._since_mark())),
        (op.ADDITEMS, _Unpickler._add_items),
        (op.GLOBAL, lambda m: m._global(m._line(), m._line())),
        (op.STACK_GLOBAL, _Unpickler._stack_global),
        (op.REDUCE, _Unpickler._reduce),
        (op.NEWOBJ, _Unpickler._reduce),
        (op.NEWOBJ_EX, _Unpickler._new_object_ex),
        (op.BUILD, _Unpickler._build),
        (op.BINPERSID, _Unpickler._persistent),
    )
}
