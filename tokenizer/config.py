"""What a model repository says about its tokenizer besides the vocabulary: named and added tokens, switches, template.

Sources, the first that speaks wins: ``chat_template.jinja`` (template only), ``tokenizer_config.json``,
``special_tokens_map.json`` (named tokens only), ``added_tokens.json`` (added tokens only).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, shown
from octo_run.models.foreign import read_json_object, read_text

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token matched in the text as a whole, before the vocabulary's own rules.

    ``lstrip``/``rstrip``: the token swallows the whitespace before/after it; ``single_word``: it does not match inside
    a word; ``normalized``: it is looked for in the normalised text.
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
    named: Mapping[str, str | None]
    """``bos_token`` etc. -> its text, or None where a file says ``null``; a name no file mentions is absent."""
    extra_special: tuple[str, ...]
    added: tuple[AddedToken, ...]
    add_bos: bool | None
    add_prefix_space: bool | None
    legacy: bool | None
    chat_template: str | None
    chat_template_file: str


def load_config(directory: Path) -> TokenizerConfig:
    """Read the tokenizer's side files in `directory`; all of them are optional.

    Errors: OctoError for malformed JSON, a field of the wrong type, or a list of templates without "default".
    """
    path = directory / "tokenizer_config.json"
    main = read_json_object(path) if path.is_file() else {}
    map_path = directory / "special_tokens_map.json"
    special_map = read_json_object(map_path) if map_path.is_file() else {}
    merged = {**special_map, **main}
    named: dict[str, str | None] = {}
    for key, value in merged.items():
        if key in NAMED_TOKENS or (key.endswith("_token") and isinstance(value, (str, dict))):
            named[key] = None if value is None else _token_text(value, key, path)
    extra: list[str] = []
    for key in _EXTRA_LISTS:
        value = merged.get(key) or []
        values = value.values() if isinstance(value, dict) else value
        if isinstance(values, str):
            raise _wrong(path, key, "a list of tokens")
        extra.extend(_token_text(item, key, path) for item in values)
    template, template_file = _load_template(directory, main, path)
    return TokenizerConfig(
        directory=directory,
        tokenizer_class=_optional(main, "tokenizer_class", str, path),
        named=named,
        extra_special=tuple(dict.fromkeys(extra)),
        added=_load_added(directory, main, path),
        add_bos=_optional(main, "add_bos_token", bool, path),
        add_prefix_space=_optional(main, "add_prefix_space", bool, path),
        legacy=_optional(main, "legacy", bool, path),
        chat_template=template,
        chat_template_file=template_file,
    )


def _wrong(path: Path, key: str, expected: str) -> OctoError:
    return OctoError(f'"{shown(key, 60)}" in {path} is not {expected}.')


def _optional(data: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = data.get(key)
    if value is not None and not isinstance(value, kind):
        raise _wrong(path, key, f"a {kind.__name__}")
    return value


def _token_text(value: Any, key: str, path: Path) -> str:
    """A token as its text, given as a string or as an object with "content"."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise _wrong(path, key, 'a token (a string, or an object with "content")')
    return text


def _load_added(directory: Path, main: dict[str, Any], path: Path) -> tuple[AddedToken, ...]:
    added: dict[int, AddedToken] = {}
    old_path = directory / "added_tokens.json"
    for content, token_id in (read_json_object(old_path) if old_path.is_file() else {}).items():
        if type(token_id) is not int or not 0 <= token_id < 10**9:
            raise _wrong(old_path, content, "a token id (an integer from 0 on)")
        added[token_id] = AddedToken(token_id, content, special=False)
    entries = main.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise _wrong(path, "added_tokens_decoder", "an object")
    for key, entry in entries.items():
        if not re.fullmatch(r"[0-9]{1,9}", key) or not isinstance(entry, dict):
            raise _wrong(path, f"added_tokens_decoder.{key}", "an entry of the form id: {content, ...}")
        flags = {name: entry.get(name, False) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        if any(not isinstance(flag, bool) for flag in flags.values()):
            raise _wrong(path, f"added_tokens_decoder.{key}", "an entry whose flags are true or false")
        added[int(key)] = AddedToken(int(key), _token_text(entry, f"added_tokens_decoder.{key}", path), **flags)
    empty = [token.id for token in added.values() if not token.content]
    if empty:
        raise OctoError(f"The added token {empty[0]} in {directory} has an empty text.")
    return tuple(added[token_id] for token_id in sorted(added))


def _load_template(directory: Path, main: dict[str, Any], path: Path) -> tuple[str | None, str]:
    """The chat template and the file it stands in; ``chat_template.jinja`` wins over tokenizer_config.json."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return read_text(jinja), str(jinja)
    value = main.get("chat_template")
    if isinstance(value, list):
        if not all(isinstance(item, dict) and {"name", "template"} <= item.keys() for item in value):
            raise _wrong(path, "chat_template", "a string or a list of {name, template}")
        templates = {item["name"]: item["template"] for item in value}
        if "default" not in templates:
            names = ", ".join(str(name) for name in templates) or "none"
            raise OctoError(f'The chat templates in {path} ({names}) have no "default" among them.')
        value = templates["default"]
    if value is not None and not isinstance(value, str):
        raise _wrong(path, "chat_template", "a string or a list of {name, template}")
    return value, str(path)
