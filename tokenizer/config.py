"""What a model repository says about its tokenizer besides the vocabulary: named and added tokens, switches, template.

Sources, the first that speaks wins: ``chat_template.jinja`` (template only), ``tokenizer_config.json``,
``chat_template.json`` (template only), ``special_tokens_map.json`` (named tokens only), ``added_tokens.json`` (added
tokens only). ``config.json`` says which family the model is of and for how many ids it has rows.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.foreign import AGAIN, present, read_json_object, read_text

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_LISTS = ("additional_special_tokens", "extra_special_tokens")
#: Token ids at most (the largest real vocabularies have some 260,000); libraries take memory by the highest id.
MAX_IDS = 1 << 22
#: Added tokens at most (real ones: some 30,000, of models that speak).
MAX_ADDED = 1 << 17
#: Characters of an added token at most.
MAX_ADDED_LENGTH = 512
#: Transformers takes this class for these families, whatever the files say.
_CLASS_OF_FAMILY = {"qwen2": "Qwen2Tokenizer"}
#: ... and this one where they say nothing.
_CLASS_IF_UNNAMED = {"qwen3": "Qwen2Tokenizer"}


@dataclass(frozen=True)
class AddedToken:
    """A token matched in the text as a whole, before the vocabulary's own rules.

    Attributes:
        lstrip: The token swallows the whitespace before it.
        rstrip: The token swallows the whitespace after it.
        single_word: The token does not match inside a word.
        normalized: The token is looked for in the normalised text.
    """

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer's side files, parsed. Switches that the files leave open are None."""

    directory: Path
    tokenizer_class: str | None
    """The class that transformers would take, without "Fast"."""
    named: Mapping[str, str | None]
    """``bos_token`` etc. -> its text, or None where a file says ``null``; a name no file mentions is absent."""
    extra_special: tuple[str, ...]
    added: tuple[AddedToken, ...]
    """Added tokens that the model has rows for."""
    add_bos: bool | None
    add_prefix_space: bool | None
    legacy: bool | None
    chat_template: str | None
    chat_template_file: str
    rows: int | None = None
    """Ids that the model has rows for, None where there is no ``config.json`` that says so."""
    beyond: Mapping[str, int] = field(default_factory=dict)
    """Added tokens that it has no rows for: text -> id. They are no tokens then, and their text is text."""


def load_config(directory: Path) -> TokenizerConfig:
    """Read the tokenizer's side files in `directory`; all of them are optional.

    Raises:
        OctoError: A file has malformed JSON, a field of the wrong type, or a list of templates without "default".
    """
    path = directory / "tokenizer_config.json"
    main = _read_if_there(path)
    special_map = _read_if_there(directory / "special_tokens_map.json")
    model = _read_if_there(directory / "config.json")
    merged = {**special_map, **main}
    named: dict[str, str | None] = {}
    for key, value in merged.items():
        if key in NAMED_TOKENS or (key.endswith("_token") and isinstance(value, (str, dict))):
            named[key] = None if value is None else token_text(value, key, path)
    extra: list[str] = []
    for key in _EXTRA_LISTS:
        value = merged.get(key) or []
        values = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(values, list):
            raise _wrong(path, key, "a list of tokens")
        extra.extend(token_text(item, key, path) for item in values)
    template, template_file = _load_template(directory, main, path)
    text = model.get("text_config")  # of a checkpoint that sees or hears
    rows = (text if isinstance(text, dict) else {}).get("vocab_size", model.get("vocab_size"))
    rows = rows if type(rows) is int and rows > 0 else None
    added, beyond = split_added(_load_added(directory, main, path), rows)
    return TokenizerConfig(
        directory=directory,
        tokenizer_class=_class_name(_optional(main, "tokenizer_class", str, path), model.get("model_type")),
        named=named,
        extra_special=tuple(dict.fromkeys(extra)),
        added=added,
        add_bos=_optional(main, "add_bos_token", bool, path),
        add_prefix_space=_optional(main, "add_prefix_space", bool, path),
        legacy=_optional(main, "legacy", bool, path),
        chat_template=template,
        chat_template_file=template_file,
        rows=rows,
        beyond=beyond,
    )


def split_added(tokens: Iterable[AddedToken], rows: int | None) -> tuple[tuple[AddedToken, ...], dict[str, int]]:
    """The tokens that a model of so many rows has, and the texts and ids of the others."""
    within: list[AddedToken] = []
    beyond: dict[str, int] = {}
    for token in tokens:
        if rows is None or token.id < rows:
            within.append(token)
        else:
            beyond[token.content] = token.id
    return tuple(within), beyond


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if present(path) else {}


def _class_name(named: str | None, family: object) -> str | None:
    family = family if isinstance(family, str) else ""
    if family in _CLASS_OF_FAMILY:
        return _CLASS_OF_FAMILY[family]
    return named.removesuffix("Fast") if named else _CLASS_IF_UNNAMED.get(family)


def _wrong(path: Path, key: str, expected: str) -> OctoError:
    return OctoError(f'"{shown(key, 60)}" in {path} is not {expected}.')


def _optional(data: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = data.get(key)
    if value is not None and not isinstance(value, kind):
        raise _wrong(path, key, f"a {kind.__name__}")
    return value


def token_text(value: Any, key: str, path: Path) -> str:
    """A token as its text, given as a string or as an object with "content".

    Raises:
        OctoError: The value is anything else, or the text is no valid Unicode.
    """
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise _wrong(path, key, 'a token (a string, or an object with "content")')
    if not _is_unicode(text):
        raise _wrong(path, key, "valid Unicode (it has half a surrogate pair)")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load_added(directory: Path, main: dict[str, Any], path: Path) -> list[AddedToken]:
    """The added tokens of both files by id; an id of -1 means that there is none, so such a token is left out."""
    added: dict[int, AddedToken] = {}
    old_path = directory / "added_tokens.json"
    for content, token_id in _read_if_there(old_path).items():
        if type(token_id) is not int:
            raise _wrong(old_path, content, "a token id (an integer from 0 on)")
        added[token_id] = AddedToken(token_id, token_text(content, content, old_path), special=False)
    entries = main.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise _wrong(path, "added_tokens_decoder", "an object")
    for key, entry in entries.items():
        if not re.fullmatch(r"-?[0-9]{1,18}", key) or not isinstance(entry, dict):
            raise _wrong(path, f"added_tokens_decoder.{key}", "an entry of the form id: {content, ...}")
        added[int(key)] = added_token(int(key), entry, f"added_tokens_decoder.{key}", path)
    tokens = [added[token_id] for token_id in sorted(added) if token_id >= 0]
    check_added(tokens, directory)
    return tokens


def added_token(token_id: int, entry: dict[str, Any], key: str, path: Path) -> AddedToken:
    """An added token as both files with flags write it.

    Raises:
        OctoError: A flag is neither true nor false, or the entry has no text as `token_text` wants it.
    """
    flags = {name: entry.get(name, False) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
    if any(not isinstance(flag, bool) for flag in flags.values()):
        raise _wrong(path, key, "an entry whose flags are true or false")
    return AddedToken(token_id, token_text(entry, key, path), **flags)


def check_added(tokens: Iterable[AddedToken], where: Path) -> None:
    """Check that added tokens are within all limits.

    Raises:
        OctoError: There are too many tokens, an id is beyond all real ones, or a text is empty or too long.
    """
    for count, token in enumerate(tokens):
        if token.id >= MAX_IDS:
            raise OctoError(
                f"The added token {quoted(token.content)} in {where} has id {token.id}, beyond any vocabulary: {AGAIN}."
            )
        if not token.content:
            raise OctoError(f"The added token {token.id} in {where} has an empty text.")
        if len(token.content) > MAX_ADDED_LENGTH:
            raise OctoError(
                f"The added token {token.id} in {where} has {len(token.content):,} characters, more than any real one: "
                f"{AGAIN}."
            )
        if count >= MAX_ADDED:
            raise OctoError(f"{where} adds more than {MAX_ADDED:,} tokens, more than any real model: {AGAIN}.")


def _load_template(directory: Path, main: dict[str, Any], path: Path) -> tuple[str | None, str]:
    """The chat template and the file it stands in."""
    jinja, older = directory / "chat_template.jinja", directory / "chat_template.json"
    if present(jinja):
        return read_text(jinja), str(jinja)
    value = main.get("chat_template")
    if value is None and present(older):  # of checkpoints that see
        value, path = read_json_object(older).get("chat_template"), older
    if isinstance(value, list):
        named = [isinstance(item, dict) and isinstance(item.get("name"), str) and "template" in item for item in value]
        if not all(named):
            raise _wrong(path, "chat_template", "a string or a list of {name, template}")
        templates = {item["name"]: item["template"] for item in value}
        if "default" not in templates:
            names = shown(", ".join(templates), 200) or "none"
            raise OctoError(f'The chat templates in {path} ({names}) have no "default" among them.')
        value = templates["default"]
    if value is not None and not isinstance(value, str):
        raise _wrong(path, "chat_template", "a string or a list of {name, template}")
    return value, str(path)
