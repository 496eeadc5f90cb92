"""SentencePiece vocabularies (`tokenizer.model`).

A model file is a protocol buffer (sentencepiece_model.proto: pieces = field 1 with type = field 3, normalizer_spec =
field 3 with add_dummy_prefix = field 3). Of a scalar field that occurs twice the last one holds and messages that occur
twice are merged, so both changes made here are appended bytes.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, quoted
from octo_run.models.foreign import AGAIN, parsing, read_bytes
from octo_run.tokenizer.config import MAX_IDS, AddedToken, TokenizerConfig
from octo_run.tokenizer.finder import Finder

_SPACE = "\u2581"
_NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])
_TYPE_CONTROL = bytes([3 << 3, 3])


class SentencePieceBackend:
    """A SentencePiece vocabulary, and added tokens beyond its end (Phi-3) or in place of spare pieces (InternLM2)."""

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        """Errors: OctoError when `path` is not a SentencePiece model or an added token contradicts it."""
        self._path = path
        self._proto = read_bytes(path)
        if not self._proto:
            raise OctoError(f"{path} is empty: {AGAIN}.")
        with self._parsing():
            self._read(config)

    def _parsing(self) -> AbstractContextManager[None]:
        return parsing(self._path, "SentencePiece data")

    def _read(self, config: TokenizerConfig) -> None:
        self._sp = _load(self._proto)
        self._pieces: list[str] = self._sp.id_to_piece(list(range(self._sp.get_piece_size())))
        count = len(self._pieces)
        if not 0 < count <= MAX_IDS:
            raise OctoError(f"{self._path} is a SentencePiece model with {count:,} pieces: {AGAIN}.")
        if config.rows is not None and count > config.rows:
            raise OctoError(
                f"{self._path} has {count:,} tokens and the model has rows for {config.rows:,} (vocab_size in "
                "config.json): the files belong to different models."
            )
        dummy_prefix = str(self._sp.normalize("a")).startswith(_SPACE)
        collapses = str(self._sp.normalize("a  b")).count(_SPACE) == 1 + dummy_prefix
        self._prefix = dummy_prefix and config.add_prefix_space is not False
        self._prefix_everywhere = self._prefix and config.legacy is True
        self.strips_space, self.strips_spaces = self._prefix or collapses, collapses
        self._own = {token.id: token for token in config.added if self._is_own(token, config)}
        self.added = self._declared(config)
        self.beyond: Mapping[str, int] = config.beyond
        self.size = max([count, *(i + 1 for i in self._own)])
        self.bos = self._named(self._sp.bos_id())
        self.eos = self._named(self._sp.eos_id())
        self.unk_id: int | None = self._sp.unk_id()
        self.unk = self._named(self._sp.unk_id())
        self.opening: str | None = None  # such a file does not say
        self._bytes = {i: bytes([int(piece[3:-1], 16)]) for i, piece in enumerate(self._pieces) if self._sp.is_byte(i)}
        self._ids = {token.content: token.id for token in self._own.values()}
        plain = [token.content for token in self._own.values() if not token.special]
        self._plain_added = Finder(plain) if plain else None

    def _named(self, token_id: int) -> str | None:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else None

    def _is_own(self, token: AddedToken, config: TokenizerConfig) -> bool:
        """Whether the model lacks this token, so that it is to be matched here."""
        if token.id < len(self._pieces) and self._pieces[token.id] == token.content:
            return False
        if token.id < len(self._pieces) and self._sp.is_byte(token.id):  # a text may need it, the control bytes too
            raise OctoError(
                f"Token {quoted(token.content)} has id {token.id} in the config of {config.directory}, which is "
                f"that of the byte {self._pieces[token.id]} in its {self._path.name}; the files belong to different "
                "models."
            )
        elsewhere = self._piece_id(token.content)
        if elsewhere is not None:
            raise OctoError(
                f"Token {quoted(token.content)} has id {token.id} in the config of {config.directory} but "
                f"{elsewhere} in its {self._path.name}; the files belong to different models."
            )
        return True

    def _declared(self, config: TokenizerConfig) -> tuple[AddedToken, ...]:
        declared = {token.id: token for token in config.added}
        for i, piece in enumerate(self._pieces):
            if i not in declared and (self._sp.is_control(i) or self._sp.is_unknown(i)):
                declared[i] = AddedToken(i, piece, special=True)
        return tuple(declared[i] for i in sorted(declared))

    def token_id(self, content: str) -> int | None:
        """See `Backend.token_id`."""
        if content in self._ids:
            return self._ids[content]
        return self._piece_id(content)

    def _piece_id(self, content: str) -> int | None:
        found: int = self._sp.piece_to_id(content)  # the unknown piece's for what is none
        return found if 0 <= found < len(self._pieces) and self._pieces[found] == content else None

    def seal(self, special: frozenset[int], never: frozenset[int]) -> None:
        """Make the special pieces control pieces, which SentencePiece never produces from text.

        Nor does it from what its normaliser makes of the text. It would produce user-defined pieces, as ChatML markers
        often are.
        """
        pieces = {i for i in special.union(self._own) if i < len(self._pieces)}
        sealed = {i for i in pieces if not (self._sp.is_unknown(i) or self._sp.is_byte(i))}
        with self._parsing():
            proto = _with_control_pieces(self._proto, sealed)
            self._sp_inside = _load(proto + _NO_DUMMY_PREFIX)
            self._sp_start = _load(proto) if self._prefix else self._sp_inside
        self._proto = b""

    def encode(self, text: str, *, start: bool) -> list[int]:
        """See `Backend.encode`."""
        if self._plain_added is None:
            return self._encode_pieces(text, start=start)
        ids: list[int] = []
        position = 0
        for begin, end in self._plain_added.all(text):
            ids += self._encode_pieces(text[position:begin], start=start and position == 0)
            ids.append(self._ids[text[begin:end]])
            position = end
        return ids + self._encode_pieces(text[position:], start=start and position == 0)

    def _encode_pieces(self, text: str, *, start: bool) -> list[int]:
        sp = self._sp_start if start or self._prefix_everywhere else self._sp_inside
        with self._parsing():
            ids: list[int] = sp.encode(text)
        return ids

    def piece(self, token_id: int) -> bytes:
        """See `Backend.piece`."""
        if token_id in self._own:
            return self._own[token_id].content.encode()
        if token_id >= len(self._pieces):
            return b""
        if token_id in self._bytes:
            return self._bytes[token_id]
        return self._pieces[token_id].replace(_SPACE, " ").encode()


def _load(proto: bytes) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def _with_control_pieces(proto: bytes, ids: set[int]) -> bytes:
    """The model with the type of these pieces changed to CONTROL."""
    out = bytearray()
    index = 0
    for tag, field, payload in _fields(proto):
        if tag == (1 << 3 | 2):
            if index in ids:
                payload += _TYPE_CONTROL
                field = varint(tag) + varint(len(payload)) + payload
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
            position += {1: 8, 5: 4}[wire]  # groups (3 and 4) are no part of these messages
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


def varint(value: int) -> bytes:
    """A whole number from 0 on as protocol buffers write it."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
