"""Training texts: reading them, a SentencePiece vocabulary for them, and their token ids."""

import io
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from octo_run.errors import OctoError, UsageError

Ids = npt.NDArray[np.uint16]
Chat = list[dict[str, str]]

SEPARATOR = "<|endoftext|>"
TURN, END = "<|im_start|>", "<|im_end|>"
BOS, EOS = 1, 2
#: Ids that stand for no text: ``<unk> <s> </s> <|im_start|> <|im_end|>``.
SPECIAL_IDS = 5
ROLES = ("system", "user", "assistant")
_TOKENIZER_CHARACTERS = 200_000_000  # of the text that the vocabulary is made from, at most
_LINE_CHARACTERS = 2000  # longer lines are cut: SentencePiece skips those of more than _LINE_BYTES
_LINE_BYTES = 4 * _LINE_CHARACTERS


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        UsageError: The file, which the error names, cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start:,}): convert it first.") from None


def read_documents(paths: Iterable[Path]) -> list[str]:
    """The documents of plain-text files, which ``<|endoftext|>`` separates.

    Raises:
        UsageError: As :func:`read_text`.
    """
    parts = (part.strip("\n") for path in paths for part in read_text(path).split(SEPARATOR))
    return [part + "\n" for part in parts if part.strip()]


def read_chats(paths: Iterable[Path]) -> list[Chat]:
    """The dialogues of JSONL files, one ``{"messages": [{"role", "content"}, ...]}`` a line.

    Raises:
        UsageError: As :func:`read_text`, or a line is no such dialogue.
    """
    return [
        _chat(line, f"{path}, line {number}")
        for path in paths
        for number, line in enumerate(read_text(path).split("\n"), start=1)
        if line.strip()
    ]


def _chat(line: str, place: str) -> Chat:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is not JSON ({error}): correct or remove it.") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UsageError(f'{place} has no list "messages" with something in it.')
    for message in messages:
        good = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not good or message.get("role") not in ROLES:
            raise UsageError(f'{place}: a message needs a "role" of {", ".join(ROLES)} and a text as "content".')
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def chat_text(chat: Iterable[dict[str, str]]) -> str:
    """A dialogue in ChatML, as the model's chat template writes it."""
    return "".join(f"{TURN}{message['role']}\n{message['content']}{END}\n" for message in chat)


def train_tokenizer(documents: list[str], chats: list[Chat], vocab_size: int, seed: int) -> bytes:
    """A SentencePiece BPE model with the settings of the demonstration model's.

    Byte fallback (a newline is ``<0x0A>``), digits apart, no normalization, no prefix space, spaces kept.

    Raises:
        UsageError: The text has not as many pieces.
    """
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents, chats, seed), model_writer=out, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, character_coverage=0.9995, max_sentence_length=_LINE_BYTES,
            user_defined_symbols=[TURN, END], num_threads=os.cpu_count() or 1, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        reason = str(error).split(") ")[-1].strip()
        raise UsageError(
            f"No vocabulary of {vocab_size:,} pieces can be made from this text ({reason}): give more text or a "
            "smaller --vocab."
        ) from None
    return out.getvalue()


def _lines(documents: list[str], chats: list[Chat], seed: int) -> Iterator[str]:
    """Lines of the texts, all of them or a random part with ``_TOKENIZER_CHARACTERS``."""
    texts = documents + ["\n".join(message["content"] for message in chat) for chat in chats]
    random.Random(seed).shuffle(texts)
    left = _TOKENIZER_CHARACTERS
    for text in texts:
        for line in text[:left].split("\n"):
            parts = (line[i : i + _LINE_CHARACTERS] for i in range(0, len(line), _LINE_CHARACTERS))
            yield from (part for part in parts if part.strip())
        left -= len(text)
        if left <= 0:
            return


def load_processor(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model of :func:`train_tokenizer`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    found = [processor.id_to_piece(i) for i in range(SPECIAL_IDS)]
    if found != ["<unk>", "<s>", "</s>", TURN, END]:
        raise OctoError(f"The vocabulary begins with {found}: this version of sentencepiece orders pieces differently.")
    return processor


@dataclass(frozen=True)
class Corpus:
    """Token ids of all texts.

    Attributes:
        plain: All documents in a row, each ``<s> ... </s>``.
        chats: Dialogues.
        has_system: Whether each of them has a system message already.
        systems: System messages to put before others.
        stops: Which ids end a sentence, bool ``[vocab]``.
    """

    processor: sentencepiece.SentencePieceProcessor
    plain: Ids
    chats: list[Ids]
    has_system: list[bool]
    systems: list[Ids]
    stops: npt.NDArray[np.bool_]

    def ids(self, text: str) -> Ids:
        """Token ids of a text; ChatML marks in it are marks."""
        return np.array(self.processor.encode(text), dtype=np.uint16)


SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You help people to book and to look things up. Ask for what is missing.",
    "Answer briefly and politely.",
)


def encode_corpus(processor: sentencepiece.SentencePieceProcessor, documents: list[str], chats: list[Chat]) -> Corpus:
    """Token ids of all texts, on all cores."""

    def encode(texts: list[str]) -> list[Ids]:
        return [np.array(ids, dtype=np.uint16) for ids in processor.encode(texts, num_threads=os.cpu_count() or 1)]

    ends = (np.array([BOS], dtype=np.uint16), np.array([EOS], dtype=np.uint16))
    plain = [part for ids in encode(documents) for part in (ends[0], ids, ends[1])]
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return Corpus(
        processor=processor,
        plain=np.concatenate(plain) if plain else np.zeros(0, dtype=np.uint16),
        chats=encode([chat_text(chat) for chat in chats]),
        has_system=[chat[0]["role"] == "system" for chat in chats],
        systems=encode([chat_text([{"role": "system", "content": line}]) for line in SYSTEM_LINES]),
        stops=np.array([piece.endswith((".", "!", "?")) for piece in pieces]),
    )
