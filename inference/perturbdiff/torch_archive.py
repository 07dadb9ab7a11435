"""Looking into a torch checkpoint without loading it: what it holds, what it names, how large its arrays claim to be.

A checkpoint is a zip of uncompressed records: `ROOT/data.pkl`, a program that rebuilds the objects, and one record
`ROOT/data/KEY` for the numbers of each array. The program is only read here, opcode by opcode (`pickletools`), never
run: a literal stays a literal, whatever would be made by a call is opaque.
"""

import pickletools
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MAX_PROGRAM = 64 * 2**20  # bytes of data.pkl; that of the published model is below one
_ITEM_BYTES = {
    "torch.FloatStorage": 4, "torch.DoubleStorage": 8, "torch.HalfStorage": 2, "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8, "torch.IntStorage": 4, "torch.ShortStorage": 2, "torch.CharStorage": 1,
    "torch.ByteStorage": 1, "torch.BoolStorage": 1,
}  # fmt: skip
STORAGES = frozenset(_ITEM_BYTES)
_OPAQUE = object()
_MARK = object()
_LITERALS = {"BINUNICODE", "SHORT_BINSTRING", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE"}
_LITERALS |= {"NEWTRUE", "NEWFALSE"}
_NEW = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class CheckpointError(ValueError):
    """A checkpoint that is not read; the message says why."""


@dataclass
class Program:
    """What a `data.pkl` says, unrun: the names it would look up, and the bytes that each storage claims."""

    names: set[str] = field(default_factory=set)
    storages: dict[str, int] = field(default_factory=dict)


def check_archive(path: Path, allowed: Iterable[str]) -> None:
    """Refuse a file that is not a whole torch archive naming nothing but `allowed` things.

    Raises:
        CheckpointError: not a zip archive of torch (the legacy formats run code while they are recognised), damaged,
            compressed or overlapping records, storages that claim other sizes than their records have, names that
            are not allowed.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        kind = (
            "a tar archive, the format of torch before 1.0" if tarfile.is_tarfile(path) else "no zip archive"
        )
        raise CheckpointError(f"{path}: is {kind}; save it again with torch >= 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            sizes, program = _records(archive, path)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is a damaged archive ({error}); copy or download it again") from None
    found = read_program(program, path)
    if strangers := sorted(found.names - set(allowed) - STORAGES):
        raise CheckpointError(
            f"{path}: names {', '.join(strangers)}, which no PerturbDiff checkpoint needs; nothing of it was run"
        )
    for key, size in found.storages.items():
        if sizes.get(key) != size:
            held = "no record" if key not in sizes else f"a record of {sizes[key]:,} bytes"
            raise CheckpointError(f"{path}: storage {key!r} claims {size:,} bytes and has {held}")


def _records(archive: zipfile.ZipFile, path: Path) -> tuple[dict[str, int], bytes]:
    """Sizes of the storage records by key, and the program."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    names = [entry.filename for entry in entries]
    roots = {name.partition("/")[0] for name in names}
    root = next(iter(roots), "")
    if len(roots) != 1 or len(set(names)) < len(names) or f"{root}/data.pkl" not in names:
        raise CheckpointError(f"{path}: is a zip archive, but not one that torch wrote")
    end = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(
                f"{path}: record {entry.filename} is compressed; torch stores records as they are"
            )
        if entry.header_offset < end or entry.header_offset + entry.file_size > path.stat().st_size:
            raise CheckpointError(
                f"{path}: record {entry.filename} overlaps another one or the end of the file"
            )
        end = entry.header_offset + entry.file_size
    program = archive.getinfo(f"{root}/data.pkl")
    if program.file_size > _MAX_PROGRAM:
        raise CheckpointError(
            f"{path}: data.pkl has {program.file_size:,} bytes, at most {_MAX_PROGRAM:,} are read"
        )
    if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
        raise CheckpointError(f"{path}: its numbers are not little-endian")
    prefix = f"{root}/data/"
    sizes = {
        name.removeprefix(prefix): archive.getinfo(name).file_size
        for name in names
        if name.startswith(prefix)
    }
    return sizes, archive.read(program)


def read_program(data: bytes, path: Path) -> Program:
    """What a pickled program names and claims. Raises: CheckpointError if it does what torch's loader never does."""
    found = Program()
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            _follow(opcode.name, argument, stack, memo, found)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its data.pkl is damaged ({error})") from None
    return found


def _follow(name: str, argument: Any, stack: list[Any], memo: dict[int, Any], found: Program) -> None:
    """One opcode."""
    if name in _LITERALS:
        stack.append(argument)
    elif name == "GLOBAL":
        stack.append(_Name(_modern(*argument.split(" ", 1))))
        found.names.add(stack[-1].text)
    elif name in _NEW:
        stack.append(_OPAQUE)
    elif name in _TUPLES:
        stack.append(_pop(stack, _TUPLES[name]))
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "TUPLE":
        stack.append(_to_mark(stack))
    elif name in ("APPENDS", "SETITEMS"):
        _to_mark(stack)
    elif name in ("APPEND", "BUILD"):
        stack.pop()
    elif name == "SETITEM":
        _pop(stack, 2)
    elif name in ("REDUCE", "NEWOBJ"):
        _pop(stack, 2)
        stack.append(_OPAQUE)
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "BINPERSID":
        _claim(stack.pop(), found)
        stack.append(_OPAQUE)
    elif name not in ("PROTO", "STOP"):
        raise CheckpointError(f"opcode {name} has no place in a checkpoint")


@dataclass(frozen=True)
class _Name:
    """A name the program looks up."""

    text: str


def _modern(module: str, name: str) -> str:
    """Dotted name; programs are written for Python 2, which called some things otherwise."""
    module = "builtins" if module == "__builtin__" else module
    return "builtins.int" if (module, name) == ("builtins", "long") else f"{module}.{name}"


def _claim(reference: Any, found: Program) -> None:
    """Note the storage that a persistent reference claims: ('storage', type, key, place, number of items)."""
    match reference:
        case ("storage", _Name(text=kind), str(key), str(), int(number)) if (
            kind in _ITEM_BYTES and number >= 0
        ):
            size = number * _ITEM_BYTES[kind]
        case _:
            raise CheckpointError("data.pkl refers to something that is not a storage of numbers")
    if found.storages.setdefault(key, size) != size:
        raise CheckpointError(f"storage {key!r} claims two sizes")


def _pop(stack: list[Any], number: int) -> tuple[Any, ...]:
    items = tuple(stack[len(stack) - number :])
    if len(items) < number or _MARK in items:
        raise IndexError("its stack runs empty")
    del stack[len(stack) - number :]
    return items


def _to_mark(stack: list[Any]) -> tuple[Any, ...]:
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return tuple(reversed(items))
