"""The decoder of a tokenizer.json as a map from one token's text to its bytes, so that text can be streamed."""

import re
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, shown
from octo_run.models.foreign import AGAIN

#: Characters of one token's text at most; replacements could make it endless.
_LONGEST = 1 << 16
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (openai/gpt-2 src/encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
#: The stand-in of each byte.
BYTE_ALPHABET = tuple(sorted(_BYTE_OF, key=_BYTE_OF.__getitem__))


class DecoderRules:
    """What a decoder does to each token.

    Attributes:
        strips_space: Whether one space at the very start of the text is dropped, too.
    """

    def __init__(self, decoder: dict[str, Any] | None, path: Path) -> None:
        """``decoder``: its JSON. Errors: OctoError for a decoder that is not bytewise (WordPiece, CTC and the like).

        Without a decoder the library writes the tokens with a space between, so every token but the first begins with
        one.
        """
        self._path = path
        self._joins = decoder is None
        self.strips_space = self._joins
        self._byte_level = False
        self._byte_fallback = False
        self._strips_each = False
        self._fused = False
        self._replace: list[tuple[str, str]] = []
        if decoder is not None:
            for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
                self._read(step)

    def _read(self, step: dict[str, Any]) -> None:
        kind = step["type"]
        if kind == "ByteLevel":
            self._byte_level = self._fused = True
        elif kind == "ByteFallback":
            self._byte_fallback = True
        elif kind == "Replace" and "String" in step["pattern"]:
            self._replace.append((step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and step["content"] == " " and step["start"] <= 1 and step["stop"] == 0:
            self.strips_space |= self._fused and step["start"] == 1
            self._strips_each |= not self._fused and step["start"] == 1
        elif kind == "Metaspace":
            self._replace.append((step["replacement"], " "))
            self.strips_space = step.get("prepend_scheme", "always") != "never"
        elif kind == "Fuse":
            self._fused = True
        else:
            raise OctoError(
                f"{self._path} uses the decoder {shown(str(kind), 60)}, which octo-run does not know how to stream."
            )

    def to_bytes(self, token: str) -> bytes:
        """The bytes of a token of the vocabulary."""
        for old, new in self._replace:
            if len(new) * (len(token) + 1) > _LONGEST:
                raise OctoError(f"The decoder in {self._path} makes endless text of a token: {AGAIN}.")
            token = token.replace(old, new)
        if self._strips_each:
            token = token.removeprefix(" ")
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._byte_level and all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        return self.literal(token)

    def literal(self, token: str) -> bytes:
        """The bytes of a token whose text is what it stands for (an added token)."""
        return b" " * self._joins + token.encode()
