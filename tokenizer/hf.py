"""Vocabularies of the `tokenizers` library: `tokenizer.json`, and GPT-2 style `vocab.json` + `merges.txt`."""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from octo_run.errors import OctoError
from octo_run.models.foreign import read_json_object, read_text
from octo_run.tokenizer.config import AddedToken, TokenizerConfig

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Qwen2's pre-tokenizer: Qwen2/Qwen2-1.5B tokenizer.json and transformers' tokenization_qwen2.py (Apache-2.0)
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizersBackend:
    """A vocabulary that the `tokenizers` library encodes with; decoding is done here, bytewise, so that it streams."""

    def __init__(self, directory: Path, config: TokenizerConfig) -> None:
        """Errors: OctoError when the files are malformed, contradictory, or decode in a way not known here."""
        path = directory / "tokenizer.json"
        if path.is_file():
            self._path = path
            self._tok = _read(path)
        else:
            self._path = directory / "vocab.json"
            self._tok = _from_vocab_and_merges(directory, config)
        self._tok.no_truncation()  # some files carry the limits of their training
        self._tok.no_padding()
        self._add_missing(config)
        own = self._tok.get_added_tokens_decoder()
        self.added = tuple(
            AddedToken(i, t.content, t.special, t.lstrip, t.rstrip, t.single_word, t.normalized)
            for i, t in sorted(own.items())
        )
        self._literal = {token.id: token.content.encode() for token in self.added}
        vocabulary = self._tok.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise OctoError(f"{self._path} holds no tokens.")
        self.size = max(vocabulary.values()) + 1
        rules = _DecoderRules(self._tok.decoder, self._path)
        self._rules = rules
        self.strips_space = rules.strips_space
        opening = self._tok.encode("", add_special_tokens=True).tokens
        self.bos: str | None = opening[0] if opening else None
        self.eos: str | None = None
        self.unk: str | None = getattr(self._tok.model, "unk_token", None)
        self.adds_bos: bool | None = bool(opening) if path.is_file() else None
        self._inside: Tokenizer | None = None
        self._special: frozenset[int] = frozenset()

    def _add_missing(self, config: TokenizerConfig) -> None:
        """Add the config's tokens that the vocabulary lacks, in the order of their ids."""
        present = self._tok.get_added_tokens_decoder()
        for token in config.added:
            if token.id in present and present[token.id].content == token.content:
                continue
            flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            added = tokenizers.AddedToken(token.content, special=token.special, normalized=token.normalized, **flags)
            self._tok.add_tokens([added])
            if self._tok.token_to_id(token.content) != token.id:
                raise OctoError(
                    f"The added token {token.content!r} has id {token.id} in {config.directory} but "
                    f"{self._path.name} gives it {self._tok.token_to_id(token.content)}; the files do not match."
                )

    def token_id(self, content: str) -> int | None:
        """See `Backend.token_id`."""
        return self._tok.token_to_id(content)

    def seal(self, special: frozenset[int]) -> None:
        """Mark the special tokens as such and have the library treat them as plain text."""
        marked = {token.id for token in self.added if token.special}
        names = [self._tok.id_to_token(i) for i in sorted(special - marked)]
        self._tok.add_special_tokens([name for name in names if name is not None])
        self._tok.encode_special_tokens = True
        if _has_first_prefix(json.loads(_state(self._tok.pre_tokenizer))):
            self._inside = _without_first_prefix(self._tok)
            self._inside.encode_special_tokens = True

    def encode(self, text: str, *, start: bool) -> list[int]:
        """See `Backend.encode`."""
        tok = self._tok if start or self._inside is None else self._inside
        return list(tok.encode(text, add_special_tokens=False).ids)

    def piece(self, token_id: int) -> bytes:
        """See `Backend.piece`."""
        literal = self._literal.get(token_id)
        if literal is not None:
            return literal
        token = self._tok.id_to_token(token_id)
        return b"" if token is None else self._rules.to_bytes(token)


class _DecoderRules:
    """The file's decoder as a map from one token's text to its bytes."""

    def __init__(self, decoder: Any, path: Path) -> None:
        """Errors: OctoError for a decoder that is not bytewise (WordPiece, CTC and the like)."""
        self.strips_space = False
        self._byte_level = False
        self._byte_fallback = False
        self._replace: list[tuple[str, str]] = []
        self._path = path
        state = json.loads(_state(decoder))
        if state is None:
            raise self._unknown("none")
        for step in state["decoders"] if state["type"] == "Sequence" else [state]:
            self._read(step)

    def _read(self, step: dict[str, Any]) -> None:
        kind = step["type"]
        if kind == "ByteLevel":
            self._byte_level = True
        elif kind == "ByteFallback":
            self._byte_fallback = True
        elif kind == "Replace" and "String" in step["pattern"]:
            self._replace.append((step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and step["content"] == " " and step["start"] <= 1 and step["stop"] == 0:
            self.strips_space = step["start"] == 1
        elif kind == "Metaspace":
            self._replace.append((step["replacement"], " "))
            self.strips_space = step.get("prepend_scheme", "always") != "never"
        elif kind != "Fuse":
            raise self._unknown(kind)

    def _unknown(self, kind: str) -> OctoError:
        return OctoError(f"{self._path} uses the decoder {kind}, which octo-run does not know how to stream.")

    def to_bytes(self, token: str) -> bytes:
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._byte_level and all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (openai/gpt-2 src/encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _state(part: Any) -> bytes:
    """A component of a Tokenizer as JSON ("null" for none)."""
    return b"null" if part is None else bytes(part.__getstate__())


def _read(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise OctoError(f"{path} is not a tokenizer file that the tokenizers library reads: {_flat(error)}.") from error


def _flat(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _from_vocab_and_merges(directory: Path, config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE; how text is split before it depends on the class that tokenizer_config.json names."""
    name = (config.tokenizer_class or "").removesuffix("Fast")
    prefix = bool(config.add_prefix_space)
    if name == "Qwen2Tokenizer":
        split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
        levels = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        pre: pre_tokenizers.PreTokenizer = pre_tokenizers.Sequence([split, levels])
    elif name == "GPT2Tokenizer":
        pre = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)
    else:
        raise OctoError(
            f"{directory} has vocab.json and merges.txt, whose rules octo-run knows for Qwen2Tokenizer and "
            f"GPT2Tokenizer only, not for {name or 'an unnamed class'}; it needs the model's tokenizer.json."
        )
    vocabulary = read_json_object(directory / "vocab.json")
    if any(type(token_id) is not int or token_id < 0 for token_id in vocabulary.values()):
        raise OctoError(f"{directory / 'vocab.json'} maps tokens to something else than ids from 0 on.")
    merges = _read_merges(directory / "merges.txt")
    try:
        tok = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # bare Exception, as above
        raise OctoError(f"merges.txt and vocab.json in {directory} do not match: {_flat(error)}.") from error
    if name == "Qwen2Tokenizer":
        tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre
    tok.decoder = decoders.ByteLevel()
    return tok


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise OctoError(f"Line {number} of {path} is not a merge (two parts with a space between).")
        merges.append((parts[0], parts[1]))
    return merges


def _has_first_prefix(state: Any) -> bool:
    """Whether a Metaspace puts a space at the very start of the text only."""
    if isinstance(state, dict):
        return state.get("prepend_scheme") == "first" or any(_has_first_prefix(value) for value in state.values())
    return isinstance(state, list) and any(_has_first_prefix(value) for value in state)


def _without_first_prefix(tok: Tokenizer) -> Tokenizer:
    """A copy for text that does not begin at the start."""
    whole = json.loads(tok.to_str())

    def change(state: Any) -> None:
        for value in state.values() if isinstance(state, dict) else state:
            if isinstance(value, (dict, list)):
                change(value)
        if isinstance(state, dict) and state.get("prepend_scheme") == "first":
            state["prepend_scheme"] = "never"

    change([whole["pre_tokenizer"]])
    return Tokenizer.from_str(json.dumps(whole))
