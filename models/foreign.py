"""Reading what somebody else made: one boundary for faults, one set of limits.

Every file of a model folder, of the cache and of the Hub is foreign. It is opened by :func:`open_regular`, read through
:func:`read_bytes`, :func:`read_text` or :func:`read_json_object`, and parsed inside :func:`parsing`, which turns
whatever a parser throws into one :class:`~octo_run.errors.OctoError` that names the file. Nothing here imports torch.

The limits, for every reader:

- regular files only (no pipe, device or folder), opened without waiting;
- at most ``MAX_FILE_BYTES`` of a file that is read whole, and ``MAX_JSON_ITEMS`` items of a JSON document: within them,
  parsing takes less than 1 GB and a few seconds, whatever the content;
- weight files, which are not read whole: ``MAX_HEADER_BYTES`` of a header, ``MAX_TENSORS`` tensors with
  ``MAX_DIMENSIONS`` dimensions each, and ``MAX_WEIGHT_FILES`` files of one model.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from octo_run.errors import OctoError, quoted

#: Bytes at most of a JSON file, a vocabulary or a template (the largest real one, a tokenizer.json, has some 33 MB).
MAX_FILE_BYTES = 64 << 20
#: Items at most of one JSON document: names, values, list entries (that tokenizer.json has some 1.9 million).
MAX_JSON_ITEMS = 2_500_000
#: Bytes at most of a safetensors header (the limit of the safetensors library).
MAX_HEADER_BYTES = 100_000_000
#: Tensors at most in one safetensors file (real ones have some thousands).
MAX_TENSORS = 100_000
#: Dimensions at most of a tensor.
MAX_DIMENSIONS = 64
#: Weight files at most of one model (real ones have up to some hundreds).
MAX_WEIGHT_FILES = 10_000

AGAIN = "fetch the model again"


def present(path: Path) -> bool:
    """Whether there is something at ``path``; also if it cannot be looked at, which :func:`open_regular` then explains.

    ``Path.exists`` raises for a folder that may not be read and for a name that is too long.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def open_regular(path: Path) -> BinaryIO:
    """``path`` opened for reading, unbuffered.

    A pipe or a device named like a model's file would block or never end; it is refused without waiting for it.

    Raises:
        OctoError: It is missing, unreadable, or no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise OctoError(f"{path} is missing: {AGAIN}.") from None
    except (OSError, ValueError) as error:
        raise OctoError(f"{path} cannot be read: {_reason(error)}.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OctoError(f"{path} is no regular file: {AGAIN}.")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """All bytes of ``path``.

    Raises:
        OctoError: :func:`open_regular` refuses it, it cannot be read, or it has more than ``limit`` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OctoError(f"{path} has {size:,} bytes, more than any file of its kind: {AGAIN}.")
        data = bytearray()
        try:
            while len(data) <= limit and (part := file.read(min(limit + 1 - len(data), 1 << 24))):
                data += part
        except OSError as error:
            raise OctoError(f"{path} cannot be read: {_reason(error)}.") from None
    if len(data) > limit:  # it grew meanwhile, or its size is no size (/proc)
        raise OctoError(f"{path} has more than {limit:,} bytes, more than any file of its kind: {AGAIN}.")
    return bytes(data)


def read_text(path: Path, limit: int = MAX_FILE_BYTES) -> str:
    """The UTF-8 text of ``path``, its lines ended by line feeds.

    Raises:
        OctoError: As :func:`read_bytes`, and for bytes that are no UTF-8.
    """
    data = read_bytes(path, limit)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise OctoError(f"{path} is not UTF-8 text (byte {error.start}): {AGAIN}.") from None


def read_json_object(path: Path, limit: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        OctoError: As :func:`read_text`, and for what is no JSON object.
    """
    return json_object(read_bytes(path, limit), path)


def json_object(data: bytes, source: object, advice: str = AGAIN, *, strict: bool = False) -> dict[str, Any]:
    """The JSON object in ``data``, UTF-8.

    Args:
        strict: Refuse what Python's parser lets through and others do not: NaN and numbers that float64 does not hold,
            halves of surrogate pairs, and an object that has a name twice.

    Raises:
        OctoError: ``data`` is anything else; it names ``source``.
    """
    with parsing(source, "JSON", advice):
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_ITEMS:
            raise ValueError(f"more than {MAX_JSON_ITEMS:,} items")
        text = data.decode("utf-8")
        value = _strict(text) if strict else json.loads(text)
    if not isinstance(value, dict):
        raise OctoError(f"{source} holds a JSON {type(value).__name__} where an object is needed: {advice}.")
    return value


def _strict(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice")
        return result

    def real(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError("a number is out of range")
        return value

    def integer(digits: str) -> int | float:
        return real(digits) if digits == "-0" or len(digits) > 300 else int(digits)

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    value = json.loads(text, object_pairs_hook=unique, parse_float=real, parse_int=integer, parse_constant=constant)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair") from None
    return value


@contextmanager
def parsing(source: object, kind: str, advice: str = AGAIN) -> Iterator[None]:
    """Turn whatever comes out of a parser of ``source`` into one sentence: "is not valid ``kind``".

    OctoErrors and what ends the program pass. Libraries written in Rust raise panics that are no ``Exception``.

    Args:
        source: A path or a name.

    Raises:
        OctoError: That sentence.
    """
    try:
        yield
    except (OctoError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except UnicodeDecodeError as error:
        raise OctoError(f"{source} is not UTF-8 text (byte {error.start}): {advice}.") from error
    except MemoryError as error:
        raise OctoError(f"{source} asks for more memory than there is: {advice}.") from error
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OctoError(f"{source} cannot be read: {_reason(error)}.") from error
        raise OctoError(f"{source} is not valid {kind} ({_reason(error)}): {advice}.") from error


def _reason(error: BaseException) -> str:
    """What an exception says, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 120 else quoted(text, 120).strip("'\"")
