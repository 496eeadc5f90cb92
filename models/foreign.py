"""Reading what somebody else made: one boundary for faults, one set of limits.

Every file of a model folder, of the cache and of the Hub is foreign. It is read through :func:`read_bytes`,
:func:`read_text` or :func:`read_json_object`, which take regular files of a known largest size only, and parsed inside
:func:`parsing`, which turns whatever a parser throws into one :class:`~octo_run.errors.OctoError` that names the file.
Nothing here imports torch.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from octo_run.errors import OctoError, quoted

#: Bytes at most of a JSON file, a vocabulary or a template (the largest real one, a tokenizer.json, has some 40 MB).
MAX_FILE_BYTES = 256 << 20
#: Items at most of one JSON document: names, values, list entries.
MAX_JSON_ITEMS = 8_000_000

AGAIN = "fetch the model again"


def open_regular(path: Path) -> BinaryIO:
    """``path`` opened for reading, unbuffered. OctoError for what is missing, unreadable, or no regular file.

    A pipe or a device named like a model's file would block or never end; it is refused without waiting for it.
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
    """All bytes of ``path``. OctoError for what :func:`open_regular` refuses and for more than ``limit`` bytes."""
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

    OctoError as :func:`read_bytes`, and for bytes that are no UTF-8.
    """
    data = read_bytes(path, limit)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise OctoError(f"{path} is not UTF-8 text (byte {error.start}): {AGAIN}.") from None


def read_json_object(path: Path, limit: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``. OctoError as :func:`read_text`, and for what is no JSON object."""
    return json_object(read_bytes(path, limit), path)


def json_object(data: bytes, source: object, advice: str = AGAIN) -> dict[str, Any]:
    """The JSON object in ``data``, UTF-8. OctoError, naming ``source``, for anything else."""
    with parsing(source, "JSON", advice):
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_ITEMS:
            raise ValueError(f"more than {MAX_JSON_ITEMS:,} items")
        value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise OctoError(f"{source} holds a JSON {type(value).__name__} where an object is needed: {advice}.")
    return value


@contextmanager
def parsing(source: object, kind: str, advice: str = AGAIN) -> Iterator[None]:
    """Turn whatever comes out of a parser of ``source`` (a path or a name) into one sentence: "is not valid ``kind``".

    OctoErrors and what ends the program pass. Libraries written in Rust raise panics that are no ``Exception``.
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
