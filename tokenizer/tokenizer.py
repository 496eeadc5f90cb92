"""The tokenizer of a model: one class over both back ends, special tokens kept apart from text."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, UsageError, quoted
from octo_run.models.files import TOKENIZER_NAMES, TOKENIZERS
from octo_run.tokenizer.backend import Backend
from octo_run.tokenizer.chat import ChatTemplate
from octo_run.tokenizer.config import AddedToken, TokenizerConfig, load_config
from octo_run.tokenizer.finder import Finder
from octo_run.tokenizer.stream import StreamingDetokenizer
from octo_run.tokenizer.thinking import Thinking

_BLOCK = 1 << 15  # characters that are encoded at a time where Ctrl-C is to be obeyed


def load_tokenizer(model_dir: Path) -> "Tokenizer":
    """The tokenizer of the model in `model_dir`.

    Vocabulary: ``tokenizer.json``, else ``tokenizer.model`` (SentencePiece), else ``tekken.json`` (Mistral), else
    ``vocab.json`` + ``merges.txt``.

    Raises:
        OctoError: There is no vocabulary, or a file is damaged or contradicts another.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise OctoError(f"{model_dir} is not a folder with a model.")
    config = load_config(model_dir)
    there = {path.name for path in model_dir.iterdir()}
    files = next((files for files in TOKENIZERS if there.issuperset(files)), None)
    if files is None:
        raise OctoError(f"{model_dir} has no tokenizer: it needs {TOKENIZER_NAMES}.")
    backend: Backend
    if files == ("tokenizer.model",):
        from octo_run.tokenizer.spm import SentencePieceBackend

        backend = SentencePieceBackend(model_dir / "tokenizer.model", config)
    else:
        from octo_run.tokenizer.hf import TokenizersBackend

        backend = TokenizersBackend(model_dir / files[0], config)
    return Tokenizer(backend, config)


class Tokenizer:
    """Text to ids and back.

    Tokens that the model has no rows for (``vocab_size`` in config.json) never come out of `encode` and `chat`: their
    texts are texts like any other. Only where the model needs one (BOS, EOS, unknown, or a token that its chat template
    writes) the files contradict each other.

    Attributes:
        vocab_size: The highest id + 1 (a model may have more rows).
        bos_id: The id that begins a text, None for models without one.
        eos_ids: The ids that end an answer as far as tokenizer_config.json says (generation_config.json may name more).
        unk_id: What the vocabulary writes for a character that it cannot spell, None if there is nothing.
        special_ids: Ids that only templates and explicit requests produce, never text. Tokens that the model's files
            add but do not call special (Qwen3's ``<think>``) are matched in every text, as everywhere else.
        adds_bos: Whether the model wants plain text (no chat) to begin with `bos_id`, see `prompt`.
        opening: The ids that plain text begins with, `[bos_id]` or none.
        thinking: How the model's thoughts are told from its answers.
    """

    def __init__(self, backend: Backend, config: TokenizerConfig) -> None:
        """Errors: OctoError when the vocabulary lacks a BOS or EOS that the config names, or the model a needed row."""
        self._backend = backend
        self._directory = config.directory
        own = {"bos_token": backend.bos, "eos_token": backend.eos, "unk_token": backend.unk}
        self._named = {key: text for key, text in {**own, **config.named}.items() if text is not None}
        self._check_beyond(backend.beyond, config)
        self.vocab_size = backend.size
        self.bos_id = self._required_id("bos_token")
        eos = self._required_id("eos_token")
        self.eos_ids = () if eos is None else (eos,)
        self.unk_id = backend.unk_id
        self._special = self._collect_special(config)
        self.special_ids = frozenset(token.id for token in self._special.values())
        ends = {self.bos_id, *self.eos_ids}
        backend.seal(self.special_ids, self.special_ids - ({self.unk_id} - ends))
        self._special_finder = Finder(self._special)
        adds_bos = backend.opening == self._named.get("bos_token") if config.add_bos is None else config.add_bos
        self.adds_bos = adds_bos and self.bos_id is not None
        self.opening = [self.bos_id] if adds_bos and self.bos_id is not None else []
        self._variables: dict[str, Any] = dict(self._named)
        if config.extra_special:
            self._variables["additional_special_tokens"] = list(config.extra_special)
        self._template: ChatTemplate | None = None
        self.thinking = Thinking(self)
        if config.chat_template is not None:
            self.use_template(config.chat_template, config.chat_template_file)

    def __repr__(self) -> str:
        chat = "with" if self.has_chat_template else "without"
        return f"<Tokenizer of {self.vocab_size:,} tokens, {chat} a chat template, from {quoted(str(self._directory))}>"

    def _check_beyond(self, beyond: Mapping[str, int], config: TokenizerConfig) -> None:
        template = config.chat_template or ""
        written = [template[start:stop] for start, stop in Finder(beyond).all(template)]
        for text in (self._named.get("bos_token"), self._named.get("eos_token"), self._backend.unk, *written):
            if text is not None and text in beyond:
                raise OctoError(
                    f"The tokenizer in {self._directory} needs the token {quoted(text)} with id {beyond[text]} and the "
                    f"model has rows for {config.rows} (vocab_size in config.json): the files belong to different "
                    "models."
                )

    def _required_id(self, key: str) -> int | None:
        text = self._named.get(key)
        if text is None:
            return None
        token_id = self._backend.token_id(text)
        if token_id is None:
            raise OctoError(f"The {key} {quoted(text)} of the tokenizer in {self._directory} is not in its vocabulary.")
        return token_id

    def _collect_special(self, config: TokenizerConfig) -> dict[str, AddedToken]:
        declared = {token.content: token for token in self._backend.added}
        special = {text: token for text, token in declared.items() if token.special}
        ends = {self._named.get("bos_token"), self._named.get("eos_token")}
        # Some files name "!" as padding, which is still a text's exclamation mark.
        others = {text for text in (*self._named.values(), *config.extra_special) if len(text) > 1}
        for text in sorted(others.union(text for text in ends if text)):
            token_id = self._backend.token_id(text)
            if token_id is not None and text not in special:
                special[text] = declared.get(text, AddedToken(token_id, text, special=True))
        return special

    # Encoding

    def encode(self, text: str, *, add_bos: bool = False, allow_special: bool = False) -> list[int]:
        """`text` as ids.

        Args:
            add_bos: Begin with `bos_id` (if the model has one, and only once: not again before a BOS that the text
                itself begins with under `allow_special`).
            allow_special: The texts of special tokens become their ids. Otherwise they are text like any other and no
                special id comes out (but `unk_id` for characters that cannot be spelled).

        Raises:
            UsageError: `text` is not valid Unicode.
            OctoError: The vocabulary's files do not let it be encoded.
        """
        _check_unicode(text)
        ids = self._encode_marked(text, None) if allow_special else self._encode_text(text, start=True)
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def count(self, text: str, most: int) -> int:
        """How many tokens a text makes, without encoding more than it takes to know whether they are too many.

        The text is encoded in blocks, between which Ctrl-C is obeyed. Each block may make a token more or less than it
        does within the whole. What is beyond ``most`` is estimated from what was encoded, to two digits.
        """
        _check_unicode(text)
        found = begin = 0
        while begin < len(text):
            end = begin + _BLOCK
            if end < len(text):
                end = next((at for at in range(end, begin + _BLOCK // 2, -1) if text[at - 1].isspace()), end)
            found += len(self._encode_text(text[begin:end], start=not begin))
            begin = min(end, len(text))
            if found > most:
                return max(found, int(float(f"{found * len(text) / begin:.2g}"))) if begin < len(text) else found
        return found

    def prompt(self, text: str) -> list[int]:
        """Plain text to be continued, begun as the model wants it: with BOS or without.

        It begins with BOS if ``add_bos_token`` in tokenizer_config.json is true, and does not if it is false. Without
        this field it does if the post-processor of tokenizer.json puts BOS there, so never with tokenizer.model or
        vocab.json.

        Raises:
            UsageError: As `encode`.
            OctoError: As `encode`.
        """
        return [*self.opening, *self.encode(text)]

    def _encode_text(self, text: str, *, start: bool) -> list[int]:
        return self._backend.encode(text, start=start) if text else []

    def _encode_marked(self, text: str, mark: str | None) -> list[int]:
        """Encode with special tokens, except those right after `mark`; marks themselves vanish."""
        ids: list[int] = []
        position = 0
        for start, stop, token_id in self._find_special(text, mark):
            ids += self._encode_run(text, position, start, mark)
            ids.append(token_id)
            position = stop
        return ids + self._encode_run(text, position, len(text), mark)

    def _encode_run(self, text: str, begin: int, end: int, mark: str | None) -> list[int]:
        run = text[begin:end]
        return self._encode_text(run if mark is None else run.replace(mark, ""), start=begin == 0)

    def _find_special(self, text: str, mark: str | None) -> Iterator[tuple[int, int, int]]:
        """(start, stop, id) of special tokens, with the whitespace that they swallow."""
        position = done = 0
        while (place := self._special_finder.search(text, position)) is not None:
            start, stop = place
            token = self._special[text[start:stop]]
            position = start + 1
            if mark is not None and start > 0 and text[start - 1] == mark:
                continue
            if token.single_word and _inside_word(text, start, stop):
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip())
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip())
            yield start, stop, token.id
            position = done = stop

    def special_id(self, text: str) -> int | None:
        """The id of the special token whose text this is exactly; None for any other text."""
        token = self._special.get(text)
        return None if token is None else token.id

    # Decoding

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Ids without a token (models may have more rows than tokens) give nothing.

        Args:
            skip_special: Leave special tokens out; otherwise they are written as they are.

        Raises:
            ValueError: An id is negative.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.finish()

    def stream(self, after: Sequence[int] = (), *, skip_special: bool = True) -> StreamingDetokenizer:
        """A decoder for ids that come one at a time; see `StreamingDetokenizer`.

        Args:
            after: The ids that they continue (a prompt, a conversation). Their text is not repeated; what comes is the
                text of all ids less theirs. So a space that the continuation begins with stays, which at the start of a
                text is the encoder's and left out.

        Raises:
            ValueError: As `decode`.
        """
        skip = self.special_ids if skip_special else frozenset()
        backend = self._backend
        stream = StreamingDetokenizer(self._piece, skip, backend.strips_space, backend.strips_spaces)
        stream.skip(after)
        return stream

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token in the middle of a text; none for an id without a token.

        Raises:
            ValueError: The id is negative.
        """
        return self._piece(token_id)

    def _piece(self, token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(f"a token id is 0 or more, not {token_id}")
        return self._backend.piece(token_id)

    # Chat

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` and `render` can be used."""
        return self._template is not None

    @property
    def template_source(self) -> str:
        """The text of the chat template, "" where there is none."""
        return "" if self._template is None else self._template.source

    @property
    def template_variables(self) -> frozenset[str]:
        """The variables that the chat template reads; none where there is no template.

        Raises:
            OctoError: The template is faulty.
        """
        return frozenset() if self._template is None else self._template.variables

    def use_template(self, source: str, file: str) -> None:
        """Take another chat template.

        Args:
            file: Where it stands, for messages.
        """
        self._template = ChatTemplate(source, file, self._variables, self._special)
        self.thinking = Thinking(self)

    def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_variables: Any,
    ) -> list[int]:
        """A conversation as ids: the model's chat template, encoded with special tokens where the template wrote them.

        No BOS is added to what the template writes.

        Args:
            messages: Dicts with "role" and "content". Whatever they contain, special ids come from the template alone.
            continue_final_message: End where the last message does, for an answer that was begun.
            template_variables: Visible to the template.

        Raises:
            OctoError: There is no template, or it is faulty, refuses the messages or rewrites the last one that is to
                be continued.
            UsageError: A message is not valid Unicode (the error names it and the position in it), or there is none to
                be continued.
        """
        marked = self._chat_template().render_marked(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_variables,
        )
        return self._encode_marked(marked.text, marked.mark)

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The conversation as the chat template writes it, for reading; encode with `chat`, not from this text.

        Args:
            options: As `chat`.
        """
        return self._chat_template().render(messages, **options)

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise OctoError(
                f"The model in {self._directory} has no chat template (it is a base model); use plain generation."
            )
        return self._template


def _inside_word(text: str, start: int, stop: int) -> bool:
    before = text[start - 1 : start]
    after = text[stop : stop + 1]
    return re.match(r"\w", before) is not None or re.match(r"\w", after) is not None


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"The text is not valid Unicode: it has half a surrogate pair at position {error.start}."
        ) from error
