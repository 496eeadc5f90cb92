"""Vocabularies of the `tokenizers` library: `tokenizer.json`, and what becomes one when it is read: Mistral's
`tekken.json`, and GPT-2 style `vocab.json` + `merges.txt`."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer

from octo_run.errors import OctoError, quoted
from octo_run.models.foreign import parsing
from octo_run.tokenizer import tekken
from octo_run.tokenizer.config import AddedToken, TokenizerConfig
from octo_run.tokenizer.decoding import DecoderRules
from octo_run.tokenizer.tokenizer_json import (
    State,
    class_tokens,
    end_of_ids,
    from_vocab_and_merges,
    has_regex,
    opening_token,
    read_tokenizer_json,
    unknown_token,
    without_prefix,
)
from octo_run.tokenizer.watch import run_watched

#: Seconds that encoding may take where a file brings its own regular expressions, and characters that add a second.
SECONDS, CHARACTERS_A_SECOND = 3.0, 100_000


class TokenizersBackend:
    """A vocabulary that the `tokenizers` library encodes with; decoding is done here, bytewise, so that it streams."""

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        """Read the vocabulary.

        Args:
            path: ``tokenizer.json``, ``tekken.json``, or ``vocab.json`` with ``merges.txt`` beside it.

        Raises:
            OctoError: The files are malformed, contradictory, or decode in a way not known here.
        """
        self._path = path
        beyond: dict[str, int] = {}
        named = class_tokens(config)
        if self._path.name == "tokenizer.json":
            self._state, beyond = read_tokenizer_json(self._path, config)
        elif self._path.name == tekken.NAME:
            self._state, named = tekken.read_tekken(self._path)
        else:
            self._state = from_vocab_and_merges(path.parent, config)
        self.beyond: Mapping[str, int] = {**config.beyond, **beyond}
        self._special: list[str] = []
        self._never: frozenset[int] = frozenset()
        self._replacement: list[int] = []
        with self._parsing():
            self._added = _library_tokens(config)
            if self._path.name == "vocab.json":
                self._added += _class_tokens(config, self._state)
            self._tok = self._build(self._state)
            self._check_ids(config)
            self._read_facts(config, named)

    def _parsing(self) -> AbstractContextManager[None]:
        source = f"{self._path} with merges.txt" if self._path.name == "vocab.json" else self._path
        return parsing(source, "tokenizer data")

    def _build(self, state: State) -> Tokenizer:
        """The library's tokenizer for this JSON, with the config's tokens and what `seal` marked."""
        tok = Tokenizer.from_str(json.dumps(state, ensure_ascii=False, separators=(",", ":")))
        tok.post_processor = None
        present = {token.content for token in tok.get_added_tokens_decoder().values()}
        tok.add_tokens([token for token in self._added if token.content not in present])
        tok.add_special_tokens(self._special)
        tok.encode_special_tokens = bool(self._special)
        return tok

    def _check_ids(self, config: TokenizerConfig) -> None:
        for token in config.added:
            found = self._tok.token_to_id(token.content)
            if found != token.id:
                raise OctoError(
                    f"The added token {quoted(token.content)} has id {token.id} in {config.directory} but "
                    f"{self._path.name} gives it {found}; the files do not match."
                )

    def _read_facts(self, config: TokenizerConfig, named: Mapping[str, str]) -> None:
        """``named``: ``bos_token`` etc. as the vocabulary's file or its class has them."""
        own = self._tok.get_added_tokens_decoder()
        self.size = max([end_of_ids(self._state["model"]["vocab"]), *(i + 1 for i in own)])
        if not self.size:
            raise OctoError(f"{self._path} holds no tokens.")
        if config.rows is not None and self.size > config.rows:
            raise OctoError(
                f"{self._path} makes token ids up to {self.size - 1:,} and the model has rows for {config.rows:,} "
                "(vocab_size in config.json): the files belong to different models."
            )
        self.added = tuple(
            AddedToken(i, t.content, t.special, t.lstrip, t.rstrip, t.single_word, t.normalized)
            for i, t in sorted(own.items())
        )
        decoder = self._tok.decoder
        self._rules = DecoderRules(None if decoder is None else json.loads(decoder.__getstate__()), self._path)
        self.strips_space, self.strips_spaces = self._rules.strips_space, False
        self._literal = {token.id: self._rules.literal(token.content) for token in self.added}
        named = {key: text for key, text in named.items() if self.token_id(text) is not None}
        self.opening = opening_token(self._state)
        known = self.opening is not None and self.token_id(self.opening) is not None
        self.bos = self.opening if known else named.get("bos_token")
        self.eos = named.get("eos_token")
        self.unk = unknown_token(self._state)
        self.unk_id = None if self.unk is None else self._tok.token_to_id(self.unk)

    def token_id(self, content: str) -> int | None:
        """See `Backend.token_id`."""
        return self._tok.token_to_id(content)

    def seal(self, special: frozenset[int], never: frozenset[int]) -> None:
        """Mark the special tokens as such and have the library treat them as plain text."""
        self._never = never
        self._replacement = [] if self.unk_id is None or self.unk_id in never else [self.unk_id]
        with self._parsing():
            names = (self._tok.id_to_token(i) for i in sorted(special))
            self._special = [name for name in names if name is not None]
            self._tok.add_special_tokens(self._special)
            self._tok.encode_special_tokens = True
            inside = without_prefix(self._state, ("first",))
            self._inside = self._tok if inside is None else self._build(inside)
            self._watched = has_regex(self._state)
            # The JSON takes twice what the library makes of it, so it goes unless it is needed again.
            self._bare_state = without_prefix(self._state, ("first", "always"))
            del self._state

    @cached_property
    def _bare(self) -> Tokenizer:
        """For the inside of words: without any space of its own."""
        return self._tok if self._bare_state is None else self._build(self._bare_state)

    def encode(self, text: str, *, start: bool) -> list[int]:
        """See `Backend.encode`."""
        tok = self._tok if start else self._inside
        with self._parsing():
            ids, _ = self._run(tok, text)
            return ids if self._never.isdisjoint(ids) else self._respelled(tok, text)

    def _run(self, tok: Tokenizer, text: str, *, offsets: bool = False) -> tuple[list[int], Sequence[tuple[int, int]]]:
        """The ids of a text, and if asked for where in it each comes from (in characters)."""
        if not self._watched:
            whole = tok.encode(text, add_special_tokens=False)
        else:
            encode = tok.encode_batch if offsets else tok.encode_batch_fast
            seconds = SECONDS + len(text) / CHARACTERS_A_SECOND
            try:
                whole = run_watched(lambda: encode([text], add_special_tokens=False)[0], seconds)
            except TimeoutError as error:
                raise OctoError(
                    f"{self._path} has a regular expression that does not come to an end with this text ({error}); "
                    "shorten the text, or use another model."
                ) from None
        return list(whole.ids), whole.offsets if offsets else ()

    def _respelled(self, tok: Tokenizer, text: str) -> list[int]:
        """The ids of a text whose model writes special tokens as ordinary ones: those are spelled by characters."""
        ids: list[int] = []
        for token_id, (begin, end) in zip(*self._run(tok, text, offsets=True), strict=True):
            if token_id not in self._never:
                ids.append(token_id)
                continue
            for place in range(begin, end):
                spelled, _ = self._run(self._bare if ids else tok, text[place])
                ids += [i for one in spelled for i in ([one] if one not in self._never else self._replacement)]
        return ids

    def piece(self, token_id: int) -> bytes:
        """See `Backend.piece`."""
        literal = self._literal.get(token_id)
        if literal is not None:
            return literal
        token = self._tok.id_to_token(token_id) if token_id < self.size else None
        return b"" if token is None else self._rules.to_bytes(token)


def _library_tokens(config: TokenizerConfig) -> list[tokenizers.AddedToken]:
    return [
        tokenizers.AddedToken(
            t.content, special=t.special, normalized=t.normalized, lstrip=t.lstrip, rstrip=t.rstrip,
            single_word=t.single_word,
        )
        for t in config.added
    ]  # fmt: skip


def _class_tokens(config: TokenizerConfig, state: State) -> list[tokenizers.AddedToken]:
    """The tokens that the config's class has where the files name none; they come after all others."""
    names = {text for key, text in class_tokens(config).items() if key not in config.named}
    names -= {token.content for token in config.added}
    end = max([end_of_ids(state["model"]["vocab"]), *(token.id + 1 for token in config.added)])
    room = len(names) if config.rows is None else config.rows - end
    return [tokenizers.AddedToken(name, special=True) for name in sorted(names)[: max(0, room)]]
