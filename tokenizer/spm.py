"""SentencePiece vocabularies (`tokenizer.model`).

A model file is a protocol buffer (sentencepiece_model.proto: pieces = field 1 with type = field 3, normalizer_spec =
field 3 with add_dummy_prefix = field 3). Of a scalar field that occurs twice the last one holds and messages that occur
twice are merged, so both changes made here are appended bytes.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError
from octo_run.tokenizer.config import AddedToken, TokenizerConfig

_SPACE = "\u2581"
_NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])
_TYPE_CONTROL = bytes([3 << 3, 3])


class SentencePieceBackend:
    """A SentencePiece vocabulary, and added tokens beyond its end (Phi-3) or in place of spare pieces (InternLM2)."""

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        """Errors: OctoError when `path` is not a SentencePiece model or an added token contradicts it."""
        try:
            self._proto = path.read_bytes()
        except OSError as error:
            raise OctoError(f"{path} cannot be read: {error.strerror or error}.") from error
        self._path = path
        self._sp = _load(self._proto, path)
        self._pieces: int = self._sp.get_piece_size()
        dummy_prefix = str(self._sp.normalize("a")).startswith(_SPACE)
        collapses = str(self._sp.normalize("a  b")).count(_SPACE) == 1 + dummy_prefix
        self._prefix = dummy_prefix and config.add_prefix_space is not False
        self._prefix_everywhere = self._prefix and config.legacy is True
        self.strips_space = self._prefix or collapses
        self._own = {token.id: token for token in config.added if self._is_own(token, config)}
        self.added = self._declared(config)
        self.size = max([self._pieces, *(i + 1 for i in self._own)])
        self.bos = self._named(self._sp.bos_id())
        self.eos = self._named(self._sp.eos_id())
        self.unk = self._named(self._sp.unk_id())
        self.adds_bos: bool | None = self.bos is not None
        self._ids = {token.content: token.id for token in self._own.values()}
        plain = [token for token in self._own.values() if not token.special]
        longest_first = sorted((token.content for token in plain), key=len, reverse=True)
        self._plain_added = re.compile("|".join(map(re.escape, longest_first))) if plain else None

    def _named(self, token_id: int) -> str | None:
        return None if token_id < 0 else str(self._sp.id_to_piece(token_id))

    def _is_own(self, token: AddedToken, config: TokenizerConfig) -> bool:
        """Whether the model lacks this token, so that it is to be matched here."""
        if token.id < self._pieces and self._sp.id_to_piece(token.id) == token.content:
            return False
        elsewhere: int = self._sp.piece_to_id(token.content)
        if self._sp.id_to_piece(elsewhere) == token.content:
            raise OctoError(
                f"Token {token.content!r} has id {token.id} in the config of {config.directory} but {elsewhere} in its "
                f"{self._path.name}; the files belong to different models."
            )
        return True

    def _declared(self, config: TokenizerConfig) -> tuple[AddedToken, ...]:
        declared = {token.id: token for token in config.added}
        for i in range(self._pieces):
            if i not in declared and (self._sp.is_control(i) or self._sp.is_unknown(i)):
                declared[i] = AddedToken(i, self._sp.id_to_piece(i), special=True)
        return tuple(declared[i] for i in sorted(declared))

    def token_id(self, content: str) -> int | None:
        """See `Backend.token_id`."""
        if content in self._ids:
            return self._ids[content]
        found: int = self._sp.piece_to_id(content)
        return found if found >= 0 and self._sp.id_to_piece(found) == content else None

    def seal(self, special: frozenset[int]) -> None:
        """Make the special pieces control pieces, which SentencePiece never produces from text (nor from what its
        normaliser makes of it); user-defined pieces, as ChatML markers often are, it would."""
        pieces = {i for i in special.union(self._own) if i < self._pieces}
        sealed = {i for i in pieces if not (self._sp.is_unknown(i) or self._sp.is_byte(i))}
        proto = _with_control_pieces(self._proto, sealed)
        bare = _load(proto + _NO_DUMMY_PREFIX, self._path)
        self._sp_inside = bare
        self._sp_start = _load(proto, self._path) if self._prefix else bare
        self._proto = b""

    def encode(self, text: str, *, start: bool) -> list[int]:
        """See `Backend.encode`."""
        if self._plain_added is None:
            return self._encode_pieces(text, start=start)
        ids: list[int] = []
        position = 0
        for match in self._plain_added.finditer(text):
            ids += self._encode_pieces(text[position : match.start()], start=start and position == 0)
            ids.append(self._ids[match.group()])
            position = match.end()
        return ids + self._encode_pieces(text[position:], start=start and position == 0)

    def _encode_pieces(self, text: str, *, start: bool) -> list[int]:
        sp = self._sp_start if start or self._prefix_everywhere else self._sp_inside
        ids: list[int] = sp.encode(text)
        return ids

    def piece(self, token_id: int) -> bytes:
        """See `Backend.piece`."""
        if token_id in self._own:
            return self._own[token_id].content.encode()
        if token_id >= self._pieces:
            return b""
        piece: str = self._sp.id_to_piece(token_id)
        if self._sp.is_byte(token_id):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(_SPACE, " ").encode()


def _load(proto: bytes, path: Path) -> Any:
    import sentencepiece

    if not proto:
        raise OctoError(f"{path} is empty; download the file again.")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, OSError, ValueError) as error:
        raise OctoError(f"{path} is not a SentencePiece model (or is damaged); download the file again.") from error
    if sp.get_piece_size() == 0:
        raise OctoError(f"{path} is a SentencePiece model without pieces; download the file again.")
    return sp


def _with_control_pieces(proto: bytes, ids: set[int]) -> bytes:
    """The model with the type of these pieces changed to CONTROL."""
    out = bytearray()
    index = 0
    for tag, field, payload in _fields(proto):
        if tag == (1 << 3 | 2):
            if index in ids:
                payload += _TYPE_CONTROL
                field = _varint(tag) + _varint(len(payload)) + payload
            index += 1
        out += field
    return bytes(out)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """The fields of a message: (tag, the whole field, its payload where it has a length)."""
    position = 0
    while position < len(message):
        start = position
        tag, position = _read_varint(message, position)
        wire = tag & 7
        payload = b""
        if wire == 2:
            length, position = _read_varint(message, position)
            payload = message[position : position + length]
            position += length
        elif wire == 0:
            _, position = _read_varint(message, position)
        else:
            position += {1: 8, 5: 4}[wire]
        yield tag, message[start:position], payload


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
