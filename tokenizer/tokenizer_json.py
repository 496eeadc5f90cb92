"""The JSON of a `tokenizer.json`: read and checked before the library sees it, or made of vocab.json and merges.txt.

The library takes memory by the highest id and runs any regular expression, so both are looked at here first.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.foreign import AGAIN, read_json_object, read_text
from octo_run.tokenizer.config import MAX_IDS, TokenizerConfig, added_token, check_added, split_added

State = dict[str, Any]
#: How much longer normaliser and pre-tokenizer may make a text.
MAX_GROWTH = 64
# Qwen2's pre-tokenizer: Qwen2/Qwen2-1.5B tokenizer.json and transformers' tokenization_qwen2.py (Apache-2.0)
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL: State = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
#: BOS and EOS that transformers' classes give to files that name none.
_CLASS_TOKENS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>"},
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "CodeGenTokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "GPTNeoXTokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>"},
}
#: Classes whose vocab.json and merges.txt are byte-level BPE.
_GPT2_LIKE = ("GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer")


def read_tokenizer_json(path: Path, config: TokenizerConfig) -> tuple[State, dict[str, int]]:
    """The checked JSON of a tokenizer.json.

    A decoder that is missing is the one of the class that the config names.

    Returns:
        The JSON, and the added tokens that were taken out because the model has no rows for them: text -> id.

    Raises:
        OctoError: The file is malformed, beyond a limit, or of another model than config.json.
    """
    state = read_json_object(path)
    state["truncation"] = state["padding"] = None  # the limits of some training
    beyond = _take_out_added(state, path, config.rows)
    model = state.get("model")
    if isinstance(model, dict):
        _check_vocabulary(model, path, config.rows, beyond)
        _check_merges(model, path)
    if state.get("decoder") is None:
        state["decoder"] = _decoder_of_class(config, state)
    _check_growth([state.get("normalizer"), state.get("pre_tokenizer")], path)
    return state, beyond


def _take_out_added(state: State, path: Path, rows: int | None) -> dict[str, int]:
    entries = state.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(e, dict) and type(e.get("id")) is int for e in entries):
        raise OctoError(f'"added_tokens" in {path} is not a list of tokens with ids: {AGAIN}.')
    tokens = [added_token(entry["id"], entry, "added_tokens", path) for entry in entries]
    check_added(tokens, path)
    _, beyond = split_added(tokens, rows)
    if beyond:
        state["added_tokens"] = [entry for entry in entries if entry["content"] not in beyond]
    return beyond


def _check_vocabulary(model: State, path: Path, rows: int | None, beyond: dict[str, int]) -> None:
    """Ids within all limits. The library itself looks at everything else."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        for text in beyond:
            vocabulary.pop(text, None)
        wrong = [i for i in vocabulary.values() if type(i) is not int or i < 0]
        if wrong:
            raise OctoError(f"{path} has the token id {quoted(wrong[0])}, which is no integer from 0 on: {AGAIN}.")
    elif not isinstance(vocabulary, list):
        return  # the library says what is wrong
    end = end_of_ids(vocabulary)
    if end > MAX_IDS:
        raise OctoError(f"{path} has the token id {end - 1}, beyond any vocabulary: {AGAIN}.")
    if rows is not None and end > rows:
        raise OctoError(
            f"{path} has token ids up to {end - 1:,} and the model has rows for {rows:,} (vocab_size in config.json): "
            "the files belong to different models."
        )


def _check_merges(model: State, where: object) -> None:
    """The library panics where a merge makes no token, or its second part lacks the prefix that is cut off."""
    merges, vocabulary = model.get("merges"), model.get("vocab")
    prefix = model.get("continuing_subword_prefix") or ""
    if not isinstance(merges, list) or not isinstance(vocabulary, dict) or not isinstance(prefix, str):
        return  # the library says what is wrong
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise OctoError(f"{where} has a merge that is not of two parts ({quoted(merge)}): {AGAIN}.")
        first, second = parts
        if not second.startswith(prefix) or first + second[len(prefix) :] not in vocabulary:
            raise OctoError(f"The merge of {quoted(first)} and {quoted(second)} in {where} makes no token: {AGAIN}.")


def end_of_ids(vocabulary: list[Any] | dict[str, int]) -> int:
    """The highest id of a model's vocabulary + 1."""
    return len(vocabulary) if isinstance(vocabulary, list) else max(vocabulary.values(), default=-1) + 1


def _check_growth(steps: list[Any], path: Path) -> None:
    growth = 1
    for part in _parts(steps):
        if part.get("type") == "ByteLevel":
            growth *= 2  # a byte becomes a character of up to two
        text = part.get("content", part.get("prepend"))
        if isinstance(text, str):
            pattern = part.get("pattern")
            old = pattern.get("String") if isinstance(pattern, dict) else None
            growth *= max(1, len(text) // max(1, len(old) if isinstance(old, str) else 1))
    if growth > MAX_GROWTH:
        raise OctoError(f"Normalizer and pre_tokenizer in {path} make a text over {MAX_GROWTH} times as long: {AGAIN}.")


def _parts(state: Any) -> Iterator[State]:
    """All objects in a component."""
    if isinstance(state, dict):
        yield state
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        yield from _parts(value)


def has_regex(state: State) -> bool:
    """Whether the file brings a regular expression of its own for encoding."""
    patterns = (part.get("Regex") for key in ("normalizer", "pre_tokenizer") for part in _parts(state.get(key)))
    return any(pattern is not None and pattern != _QWEN2_SPLIT for pattern in patterns)


def without_prefix(state: State, schemes: tuple[str, ...]) -> State | None:
    """The JSON for text that does not begin at the start: without the space that is put there.

    Args:
        schemes: The prepend_schemes of a Metaspace that puts no space there any more. With "always" among them, a
            normaliser puts none there either.

    Returns:
        The JSON, None if none of these puts a space there.
    """
    changed = False

    def change(part: Any) -> Any:
        nonlocal changed
        if isinstance(part, list):
            kept = [change(item) for item in part]
            return [item for item in kept if item is not None]
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Prepend" and "always" in schemes:
            changed = True
            return None
        part = {key: change(value) for key, value in part.items()}
        if part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") in schemes:
            changed = True
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
        return part

    parts = {key: change(state.get(key)) for key in ("normalizer", "pre_tokenizer")}
    return {**state, **parts} if changed else None


def opening_token(state: State) -> str | None:
    """The token that the post-processor puts before every text, None if there is none."""
    for part in _parts(state.get("post_processor")):
        single = part.get("single")
        if part.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            first = single[0].get("SpecialToken") if isinstance(single[0], dict) else None
            special = part.get("special_tokens")
            if isinstance(first, dict) and isinstance(special, dict):
                entry = special.get(first.get("id"))
                tokens = entry.get("tokens") if isinstance(entry, dict) else None
                return tokens[0] if isinstance(tokens, list) and tokens and isinstance(tokens[0], str) else None
        if part.get("type") in ("BertProcessing", "RobertaProcessing"):
            cls = part.get("cls")
            return cls[0] if isinstance(cls, list) and cls and isinstance(cls[0], str) else None
    return None


def unknown_token(state: State) -> str | None:
    """The token that the model writes for what it cannot spell."""
    model = state["model"]
    index, vocabulary = model.get("unk_id"), model.get("vocab")
    if isinstance(vocabulary, list) and type(index) is int and 0 <= index < len(vocabulary):
        return str(vocabulary[index][0])
    text = model.get("unk_token")
    return text if isinstance(text, str) else None


def class_tokens(config: TokenizerConfig) -> dict[str, str]:
    """BOS and EOS as the class that the config names has them."""
    return _CLASS_TOKENS.get(config.tokenizer_class or "", {})


def _decoder_of_class(config: TokenizerConfig, state: State) -> State | None:
    """The decoder that transformers' classes bring along, None for the others."""
    if config.tokenizer_class in (*_GPT2_LIKE, "Qwen2Tokenizer"):
        return _BYTE_LEVEL
    byte_level = any(part.get("type") == "ByteLevel" for part in _parts(state.get("pre_tokenizer")))
    if config.tokenizer_class != "LlamaTokenizer" or byte_level:
        return None
    steps: list[State] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if config.add_prefix_space is not False:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def from_vocab_and_merges(directory: Path, config: TokenizerConfig) -> State:
    """The JSON of a byte-level BPE; how text is split before it depends on the class that the config names.

    Raises:
        OctoError: The config names another class or none, or a file is damaged.
    """
    name = config.tokenizer_class
    levels = {**_BYTE_LEVEL, "add_prefix_space": bool(config.add_prefix_space)}
    if name == "Qwen2Tokenizer":
        split = {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
        pre = {"type": "Sequence", "pretokenizers": [split, {**levels, "use_regex": False}]}
    elif name in _GPT2_LIKE:
        pre = levels
    else:
        raise OctoError(
            f"{directory} has vocab.json and merges.txt, whose rules octo-run knows for Qwen2Tokenizer and "
            f"{', '.join(_GPT2_LIKE)} only, not for {shown(name, 60) if name else 'an unnamed class'}; it needs the "
            "model's tokenizer.json."
        )
    path = directory / "vocab.json"
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": read_json_object(path),
        "merges": _read_merges(directory / "merges.txt"),
    }  # fmt: skip
    _check_vocabulary(model, path, config.rows, {})
    _check_merges(model, directory / "merges.txt")
    state: State = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "NFC"} if name in ("Qwen2Tokenizer", "GPTNeoXTokenizer") else None,
        "pre_tokenizer": pre, "post_processor": None, "decoder": _BYTE_LEVEL, "model": model,
    }  # fmt: skip
    return state


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
