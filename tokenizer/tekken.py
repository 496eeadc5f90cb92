"""`tekken.json`, Mistral's file of a byte-level BPE, as the JSON of a `tokenizer.json`.

The file has the bytes of each token in the order of their ranks (``vocab``), the regular expression that cuts a text
(``config.pattern``), and its special tokens, whose ids come before those of the vocabulary. It has no merges: of two
neighbours those merge first whose joined bytes have the lowest rank, and a piece that is a token is that token. So a
merge is made of each way to cut a token into two tokens, in the order of the ranks. (mistral-common,
``tokens/tokenizers/tekken.py``; tiktoken, ``src/lib.rs``.)
"""

import binascii
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, quoted
from octo_run.models.foreign import AGAIN, read_json_object
from octo_run.tokenizer.config import MAX_IDS, NAMED_TOKENS
from octo_run.tokenizer.decoding import BYTE_ALPHABET

NAME = "tekken.json"
#: The special tokens of files that list none, which are those of the versions up to 7.
_DEFAULT = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_OLD_VERSIONS = ("v1", "v2", "v3", "v7")
#: What the special tokens mean that have a meaning everywhere.
_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
#: Bytes of a token at most (the longest real ones have 76): each way to cut it is looked at.
_LONGEST = 1024
_ALPHABET = dict(enumerate(BYTE_ALPHABET))


def read_tekken(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file as the JSON of a tokenizer.json, with all of its special tokens special.

    Returns:
        The JSON, and ``bos_token`` etc. -> text.

    Raises:
        OctoError: The file is malformed, or of a kind that is not known here.
    """
    data = read_json_object(path)
    config = data.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("pattern"), str):
        raise OctoError(f'"config" in {path} is no object with a pattern: {AGAIN}.')
    first = _whole_number(config, "default_num_special_tokens", path)
    count = _whole_number(config, "default_vocab_size", path) - first
    special = _special_tokens(data.get("special_tokens"), config.get("version"), first, path)
    written = {token: _written(token) for token in _vocabulary(data.get("vocab"), count, path)}
    ids = {text: index for index, text in enumerate((*special, *written.values()))}
    if len(ids) < first + count:
        raise OctoError(f"{path} has the same token twice: {AGAIN}.")
    split = {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    state = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
             "single_word": False}
            for index, text in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, levels]},
        "post_processor": _opening(_NAMED["bos_token"], ids),
        "decoder": levels,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": ids, "merges": _merges(written),
        },
    }  # fmt: skip
    return state, {name: text for name, text in _NAMED.items() if name in NAMED_TOKENS and text in special}


def _whole_number(config: dict[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 <= value <= MAX_IDS:
        raise OctoError(f'"{name}" in {path} is no number of tokens from 0 to {MAX_IDS:,}: {AGAIN}.')
    return value


def _special_tokens(entries: Any, version: Any, count: int, path: Path) -> list[str]:
    """The texts of all special tokens, by id; ids without one in the file have names of the same form everywhere."""
    if entries is None:
        if version not in _OLD_VERSIONS:
            raise OctoError(
                f"{path} is of version {quoted(version)} and lists no special tokens, which only the versions "
                f"{', '.join(_OLD_VERSIONS)} may leave out: {AGAIN}."
            )
        texts: list[Any] = list(_DEFAULT[:count])
    elif isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        texts = [entry.get("token_str") for entry in entries]
        if [entry.get("rank") for entry in entries] != list(range(len(entries))):
            raise OctoError(f"The special tokens in {path} are not in the order of their ranks: {AGAIN}.")
    else:
        raise OctoError(f'"special_tokens" in {path} is no list of tokens: {AGAIN}.')
    if len(texts) > count:
        raise OctoError(f"{path} lists {len(texts):,} special tokens and says that there are {count:,}: {AGAIN}.")
    texts += [f"<SPECIAL_{index}>" for index in range(len(texts), count)]
    if not all(isinstance(text, str) and text for text in texts) or len(set(texts)) < count:
        raise OctoError(f"The special tokens in {path} are not all different texts: {AGAIN}.")
    return texts


def _vocabulary(entries: Any, count: int, path: Path) -> list[bytes]:
    """The bytes of the first ``count`` tokens; a file may have more than its model."""
    if not isinstance(entries, list) or not 256 <= count <= len(entries):
        raise OctoError(f'"vocab" in {path} is no list of the {count:,} tokens that its config speaks of: {AGAIN}.')
    tokens = []
    for rank, entry in enumerate(entries[:count]):
        written = entry.get("token_bytes") if isinstance(entry, dict) and entry.get("rank") == rank else None
        try:
            token = binascii.a2b_base64(written) if isinstance(written, str) else b""
        except ValueError:  # no base64, or no ASCII
            token = b""
        if not 0 < len(token) <= _LONGEST or (rank < 256 and token != bytes([rank])):
            raise OctoError(f"Token {rank:,} in {path} is no token of such a file: {AGAIN}.")
        tokens.append(token)
    return tokens


def _written(token: bytes) -> str:
    return token.decode("latin-1").translate(_ALPHABET)


def _merges(written: dict[bytes, str]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, by the rank of what they make. ``written``: as the library spells them."""
    return [
        (written[token[:cut]], written[token[cut:]])
        for token in written
        for cut in range(1, len(token))
        if token[:cut] in written and token[cut:] in written
    ]


def _opening(text: str, ids: dict[str, int]) -> dict[str, Any] | None:
    """The post-processor that puts BOS before a text, where there is one."""
    if text not in ids:
        return None
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": text, "type_id": 0}}, sequence],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]}},
    }
