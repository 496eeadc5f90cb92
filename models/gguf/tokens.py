"""The tokenizer in the metadata of a GGUF file as the files of a model folder.

A byte-level BPE (``tokenizer.ggml.model`` "gpt2") becomes a ``tokenizer.json``, SentencePiece ("llama") a
``tokenizer.model``. The metadata name how a BPE splits text (``tokenizer.ggml.pre``) and do not say it: the rules here
are those of the published ``tokenizer.json`` files, as llama.cpp quotes them.
"""

import json
import struct
from dataclasses import dataclass
from typing import Any

from octo_run.errors import OctoError, quoted
from octo_run.models.foreign import AGAIN
from octo_run.models.gguf.fields import Fields
from octo_run.models.gguf.header import GgufModel
from octo_run.tokenizer.spm import varint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
#: Named tokens of tokenizer_config.json -> what their ids are called in the metadata.
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
#: Control tokens that end an answer, whatever the metadata name: most files name one of several.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
#: ... where all of these are there, as in gpt-oss, ``<|end|>`` ends a part of an answer and the others a whole one.
_PART, _WHOLE = "<|end|>", ("<|return|>", "<|call|>")
#: Special tokens of Phi-3 that do not swallow the white space after them, as all others do.
_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")

State = dict[str, Any]
_DIGITS: State = {"type": "Digits", "individual_digits": True}
_GPT2: State = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES: State = {**_GPT2, "use_regex": False}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT, _PATHS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}" + _PATHS
_GPT4O = rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}" + _PATHS
_MARKS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_QWEN35 = _MARKS + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SEED = _WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(regex: str) -> State:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before a BPE, and what goes with it.

    Attributes:
        steps: Pre-tokenizers of the tokenizers library, one after another.
        nfc: Text is brought into Unicode's normal form C first.
        ignore_merges: A piece that is a token is that token, whatever the merges make of it.
        add_bos: BOS comes first where the metadata do not say.
    """

    steps: tuple[State, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = PreTokenizer((_split(_WORDS + r"\p{N}{1,3}" + _REST), _BYTES), ignore_merges=True, add_bos=True)
_CL100K = PreTokenizer(_LLAMA3.steps)
_QWEN2 = PreTokenizer((_split(_WORDS + r"\p{N}" + _REST), _BYTES), nfc=True)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((_DIGITS, _GPT2)),
    "starcoder": PreTokenizer((_DIGITS, _GPT2)),
    "refact": PreTokenizer((_DIGITS, _GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _CL100K,
    "dbrx": _CL100K,
    "glm4": _CL100K,
    "chatglm-bpe": _CL100K,
    "gpt-4o": PreTokenizer((_split(_GPT4O), _BYTES)),
    "seed-coder": PreTokenizer((_split(_SEED), _BYTES)),
    "exaone4": PreTokenizer((_GPT2,)),
    "command-r": PreTokenizer((_DIGITS, _GPT2), nfc=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": PreTokenizer((_split(_QWEN35), _BYTES), nfc=True),
    "tekken": PreTokenizer((_split(_TEKKEN), _BYTES), ignore_merges=True, add_bos=True),
}
"""What `tokenizer.ggml.pre` names."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What a model folder needs of a tokenizer.

    Attributes:
        files: File name -> content.
        ends: ``bos_token_id``, ``eos_token_id`` (the first ends every text, all end an answer) and ``pad_token_id``,
            as far as there are such, for config.json.
    """

    files: dict[str, bytes]
    ends: dict[str, Any]


def tokenizer_files(model: GgufModel) -> TokenizerFiles:
    """The tokenizer of a model.

    Raises:
        OctoError: It is of a kind or splits text in a way that octo-run does not know, or something is missing or
            contradictory.
    """
    return _Vocabulary(model).written()


class _Vocabulary:
    """The tokens and what the metadata say of them."""

    def __init__(self, model: GgufModel) -> None:
        self.fields = Fields(model.path, model.metadata, "tokenizer.ggml.")
        self.kind = self.fields.need("model", str)
        if self.kind not in ("gpt2", "llama"):
            raise self.fields.fail("model", f"is {quoted(self.kind)}, and octo-run knows gpt2 (BPE) and llama (SPM)")
        self.tokens = self._list("tokens", str)
        self.types = self._list("token_type", int, [NORMAL] * len(self.tokens))
        for i, token in enumerate(self.tokens):
            if not token:
                self.tokens[i], self.types[i] = f"[EMPTY_{i}]", UNUSED
            if token in _ENDS:
                self.types[i] = CONTROL
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise self.fields.fail("tokens", f"has {quoted(twice)} twice: {AGAIN}")
        self.named = {name: token_id for name, key in _NAMED.items() if (token_id := self._id(key)) is not None}
        # What the published tokenizer says of each token the metadata do not.
        self.swallows = model.metadata.get("general.architecture") == "phi3" and self.kind == "llama"
        self.template = Fields(model.path, model.metadata, "tokenizer.").get("chat_template", str)

    def _list(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        values = self.fields.get(key, list, default)
        if values is None:
            raise self.fields.fail(key, f"is missing: {AGAIN}, or make the file again")
        if not values or not all(type(value) is kind or (kind is float and type(value) is int) for value in values):
            raise self.fields.fail(key, f"is {quoted(values)}, not a list of {kind.__name__}: {AGAIN}")
        if key not in ("tokens", "merges") and len(values) != len(self.tokens):
            raise self.fields.fail(key, f"has {len(values):,} entries for {len(self.tokens):,} tokens: {AGAIN}")
        return list(values)

    def _id(self, key: str) -> int | None:
        value = self.fields.get(key, int)
        if value is not None and not 0 <= value < len(self.tokens):
            raise self.fields.fail(key, f"is {value:,}, and there are {len(self.tokens):,} tokens: {AGAIN}")
        return None if value is None else int(value)

    def written(self) -> TokenizerFiles:
        """All files, and the ids for config.json."""
        if self.kind == "gpt2":
            pre = self._pre_tokenizer()
            add_bos = self.fields.get("add_bos_token", bool, pre.add_bos)
            files = {"tokenizer.json": _json(self._bpe(pre, add_bos))}
            config: State = {"tokenizer_class": "PreTrainedTokenizerFast"}
        else:
            defaults = {"unk_token": 0, "bos_token": 1, "eos_token": 2}
            self.named = {name: i for name, i in defaults.items() if i < len(self.tokens)} | self.named
            add_bos = self.fields.get("add_bos_token", bool, True)
            files = {"tokenizer.model": self._sentencepiece()}
            # llama.cpp puts the space before each stretch of text between special tokens, which is called legacy
            config = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
            if self.swallows:
                config["added_tokens_decoder"] = self._swallowing()
        config |= {name: self.tokens[token_id] for name, token_id in self.named.items()}
        config |= {"add_bos_token": add_bos, "add_eos_token": self.fields.get("add_eos_token", bool, False)}
        config["clean_up_tokenization_spaces"] = False
        files["tokenizer_config.json"] = _json(config)
        if self.template is not None:
            files["chat_template.jinja"] = self.template.encode()
        return TokenizerFiles(files, self._ends())

    def _swallowing(self) -> State:
        """The special tokens that swallow the white space after them."""
        texts = {i: self.tokens[i] for i, kind in enumerate(self.types) if kind == CONTROL or self.tokens[i] == "</s>"}
        return {
            str(i): {"content": text, "special": True, "rstrip": True, "lstrip": False, "normalized": False}
            for i, text in texts.items()
            if text not in _KEEPS_SPACE
        }

    def _ends(self) -> dict[str, Any]:
        found = [self.named.get("eos_token"), self._id("eot_token_id"), self._id("eom_token_id")]
        texts: tuple[str, ...] = _ENDS
        if all(text in self.ids for text in _WHOLE):
            texts = (*_WHOLE, *(text for text in _ENDS if text != _PART))
            found = [i for i in found if i is None or self.tokens[i] != _PART]
        found += [self.ids.get(text) for text in texts]
        eos = list(dict.fromkeys(i for i in found if i is not None))
        ends: dict[str, Any] = {"eos_token_id": eos[0] if len(eos) == 1 else eos} if eos else {}
        return ends | {f"{name}_id": self.named[name] for name in ("bos_token", "pad_token") if name in self.named}

    def _pre_tokenizer(self) -> PreTokenizer:
        name = self.fields.get("pre", str)
        if name not in PRE_TOKENIZERS:
            what = "is missing" if name is None else f"is {quoted(name)}"
            raise self.fields.fail("pre", f"{what}, and octo-run splits text as {', '.join(PRE_TOKENIZERS)} do")
        return PRE_TOKENIZERS[name]

    def _bpe(self, pre: PreTokenizer, add_bos: bool) -> State:
        merges = []
        for merge in self._list("merges", str):
            place = merge.find(" ", 1)
            if place < 0:
                raise self.fields.fail("merges", f"has {quoted(merge)}, which is not of two parts: {AGAIN}")
            merges.append([merge[:place], merge[place + 1 :]])
        made = {first + second for first, second in merges}
        # A converter fills the rows that no token has with texts of its own, which no text may be read as.
        vocabulary = {token: i for i, token in enumerate(self.tokens) if self.types[i] != UNUSED or token in made}
        added = [
            {
                "id": i, "content": self.tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": kind == CONTROL,
            }
            for i, kind in enumerate(self.types) if kind in (CONTROL, USER_DEFINED)
        ]  # fmt: skip
        bos = self.named.get("bos_token") if add_bos else None
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if pre.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre.steps)},
            "post_processor": None if bos is None else _bos_first(self.tokens[bos], bos),
            "decoder": _GPT2,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                "ignore_merges": pre.ignore_merges, "vocab": vocabulary, "merges": merges,
            },
        }  # fmt: skip

    def _sentencepiece(self) -> bytes:
        """A SentencePiece model, a protocol buffer (sentencepiece_model.proto)."""
        if self.fields.get("precompiled_charsmap", list):
            raise self.fields.fail("precompiled_charsmap", "is given, and octo-run reads SPM without one only")
        scores = self._list("scores", float)
        if UNKNOWN not in self.types:
            self.types[self.named["unk_token"]] = UNKNOWN
        out = bytearray()
        for token, score, kind in zip(self.tokens, scores, self.types, strict=True):
            if not NORMAL <= kind <= BYTE:
                raise self.fields.fail("token_type", f"holds {kind}, which is no type of a token: {AGAIN}")
            text = token.replace(" ", "\u2581") if kind == USER_DEFINED else token
            out += _field(1, _field(1, text.encode()) + struct.pack("<Bf", 2 << 3 | 5, score) + _field(3, kind))
        trainer = _field(3, 2) + _field(4, len(self.tokens)) + _field(35, int(BYTE in self.types))
        for field, name in ((45, "unk_token"), (46, "bos_token"), (47, "eos_token"), (48, "pad_token")):
            token_id = self.named.get(name)
            if token_id is not None:
                trainer += _field(field - 5, token_id) + _field(field, self.tokens[token_id].encode())
        space = self.fields.get("add_space_prefix", bool, True)
        collapse = self.fields.get("remove_extra_whitespaces", bool, False)
        normalizer = _field(1, b"identity") + _field(3, int(space)) + _field(4, int(collapse)) + _field(5, 1)
        return bytes(out + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def _json(value: State) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _bos_first(text: str, token_id: int) -> State:
    """A post-processor that puts BOS before every text."""
    bos = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
    }


def check_rows(model: GgufModel, rows: int) -> None:
    """Check that the model has a row for every token.

    Raises:
        OctoError: It has fewer.
    """
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise OctoError(f"{model.path} has {len(tokens):,} tokens and rows for {rows:,} of them: {AGAIN}.")
