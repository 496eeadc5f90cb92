"""Chat templates: messages to the text a model was trained on, in jinja2's immutable sandbox.

Where a special token may come from. In a rendered conversation, one string, ``<|im_end|>`` written by the template and
``<|im_end|>`` typed by a user look the same. Templates strip, split, replace and compare the contents, so neither a str
subclass nor sentinels around the contents survive. What survives is a mark *inside* a content: a private-use character
(one that occurs nowhere in the conversation) put before each character where a special token could begin. After the
rendering, a special token right after a mark is text, any other one is the template's; then the marks go.

Two strengths of marking, tried in this order; the first whose text without marks equals the unmarked rendering counts:

- strong: before every character that some special token begins with, unless it stands in a string that the template
  itself looks for (``content.startswith('<tool_response>')``) and no special token begins there; and before the first
  character of a text that could continue a special token. Then nothing that a template cuts out of a content or puts
  together (two parts, each half of a token) becomes a special token.
- weak: before every complete special token, and before the beginning of one at the end of a text.

If neither gives the same text (a template may count or slice characters), the weakly marked rendering stands. Templates
that look for complete special tokens in contents find them, since marks stand before them, not within.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
from jinja2.exceptions import SecurityError

from octo_run.errors import OctoError, UsageError

_PRIVATE_USE = range(0xE000, 0xF900)
_UNTOUCHED_STARTS = frozenset({"role", "type"})
"""Keys whose values templates build tokens of (``'<|' + role + '|>'``) or compare."""


@dataclass(frozen=True)
class MarkedText:
    """A rendered conversation; `mark` stands before characters of user text at which no special token may begin."""

    text: str
    mark: str


class ChatTemplate:
    """One model's chat template. It is compiled on first use, so a faulty one fails no command that does without."""

    def __init__(self, source: str, file: str, variables: Mapping[str, Any], special: Iterable[str]) -> None:
        """`file`: where the template stands, for messages; `variables`: ``bos_token`` etc.; `special`: token texts."""
        self.source = source
        self.file = file
        self._variables = dict(variables)
        self._special = tuple(special)
        self._first = frozenset(token[0] for token in self._special)
        self._inner = frozenset("".join(token[1:] for token in self._special))

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as text. Errors: OctoError when the template is faulty or refuses the messages."""
        return self._render(_plain(messages), add_generation_prompt, _plain(variables), datetime.now())

    def render_marked(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> MarkedText:
        """The same text with marks that tell users' special tokens from the template's (see the module's text)."""
        messages, variables, now = _plain(messages), _plain(variables), datetime.now()
        text = self._render(messages, add_generation_prompt, variables, now)
        used = set(text).union(*_strings([messages, variables]))
        mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
        if mark is None:
            raise OctoError("The conversation uses every private-use character of Unicode, so it cannot be rendered.")
        marked = text
        for strong in (True, False):
            inputs = self._mark([messages, variables], mark, strong, "")
            if inputs == [messages, variables]:
                return MarkedText(text, mark)
            try:
                marked = self._render(inputs[0], add_generation_prompt, inputs[1], now)
            except OctoError:
                if not strong:
                    raise
                continue
            if marked.replace(mark, "") == text:
                break
        return MarkedText(marked, mark)

    def _render(self, messages: Any, add_generation_prompt: bool, variables: Any, now: datetime) -> str:
        template, _ = self._compiled
        values = {
            "tools": None,
            "documents": None,
            "strftime_now": now.strftime,
            **self._variables,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(values)
        except _Refusal as error:
            raise OctoError(f"The chat template in {self.file} refuses this conversation: {_flat(error)}.") from error
        except jinja2.UndefinedError as error:
            raise OctoError(f"The chat template in {self.file} misses a value: {_flat(error)}.") from error
        except SecurityError as error:
            raise OctoError(f"The chat template in {self.file} tries what is forbidden: {_flat(error)}.") from error
        except Exception as error:  # a template is a program: any error of Python's can come out of it
            name = type(error).__name__
            raise OctoError(f"The chat template in {self.file} fails here ({name}): {_flat(error)}.") from error

    @cached_property
    def _compiled(self) -> tuple[jinja2.Template, dict[str, list[int]]]:
        """The template, and the strings it looks for with the offsets in them that strong marking leaves alone."""
        environment = _environment()
        try:
            constants = {node.value for node in environment.parse(self.source).find_all(jinja2.nodes.Const)}
            template = environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            where = f"line {error.lineno} of {self.file}"
            raise OctoError(f"The chat template is not valid Jinja at {where}: {_flat(error.message)}.") from error
        except (RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise OctoError(f"The chat template in {self.file} cannot be compiled: {_flat(error)}.") from error
        safe: dict[str, list[int]] = {}
        for constant in constants:
            if isinstance(constant, str):
                offsets = [i for i, char in enumerate(constant) if char in self._first]
                safe[constant] = [i for i in offsets if not self._may_begin(constant[i:])]
        return template, {constant: offsets for constant, offsets in safe.items() if offsets}

    def _may_begin(self, text: str) -> bool:
        return any(token.startswith(text) or text.startswith(token) for token in self._special)

    def _mark(self, value: Any, mark: str, strong: bool, key: str) -> Any:
        if isinstance(value, str):
            places = sorted(self._places(value, strong, key))
            pieces = [value[i:j] for i, j in zip([0, *places], [*places, len(value)], strict=True)]
            return mark.join(pieces)
        if isinstance(value, dict):
            return {self._mark(k, mark, False, ""): self._mark(v, mark, strong, str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self._mark(item, mark, strong, key) for item in value]
        return value

    def _places(self, text: str, strong: bool, key: str) -> set[int]:
        """The positions in `text` before which a mark belongs."""
        places = {i for token in self._special for i in _occurrences(token, text)}
        end = text.rstrip()
        for token in self._special:
            places.update(len(end) - n for n in range(1, len(token)) if end.endswith(token[:n]))
        if strong:
            spared = {
                i + offset
                for constant, offsets in self._compiled[1].items()
                for i in _occurrences(constant, text)
                for offset in offsets
            }
            places.update(i for i, char in enumerate(text) if char in self._first and i not in spared)
            start = len(text) - len(text.lstrip())
            if start < len(text) and text[start] in self._inner and key not in _UNTOUCHED_STARTS:
                places.add(start)
        return places


def _occurrences(needle: str, text: str) -> Iterator[int]:
    """Where `needle` begins in `text`, overlapping ones too."""
    i = text.find(needle)
    while i >= 0:
        yield i
        i = text.find(needle, i + 1)


def _plain(value: Any) -> Any:
    """A copy in plain JSON types, so that a template meets nothing with methods of its own."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise UsageError(f"A conversation holds text, numbers, lists and dicts only, not {type(value).__name__}.")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _flat(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".") or "no reason given"


class _Refusal(jinja2.TemplateError):
    """What a template raises with ``raise_exception``."""


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: unlike jinja2's own it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` without underscore names: the sandbox guards attributes, but not a namespace's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks answers for training; here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_contents"), [], [], body).set_lineno(line)

    def _contents(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.pop("lipsum")
    environment.globals.update(raise_exception=_raise_exception, dict=_dict, namespace=_Namespace)
    return environment
