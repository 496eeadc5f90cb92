"""Chat templates: messages to the text a model was trained on, and where in it special tokens may be.

In a rendered conversation, one string, ``<|im_end|>`` written by the template and ``<|im_end|>`` typed by a user look
the same. So the template runs in a machine of our own (`template.program`) that knows of each character whether the
template wrote it. A special token is one only if the template wrote all of its characters; whatever a template cuts,
joins, encodes or turns round, a character of a message stays a character of a message. Two things count as the
template's although it has them from outside: well-known words as ``role`` and ``type`` of a message (templates build
tokens of them: ``'<|' + role + '|>'``), and the texts of the model's own tokens (``bos_token``).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from octo_run.errors import OctoError, UsageError, quoted, shown
from octo_run.tokenizer.template.budget import METER, Meter, OverBudget
from octo_run.tokenizer.template.sandbox import Program
from octo_run.tokenizer.template.text import LostProof, Text, given, text_of, written
from octo_run.tokenizer.thinking import REASONING, thought_of

#: What stands in a marked text before characters at which no special token begins: half a surrogate pair, which no
#: valid text has.
MARK = "\ud800"
# fmt: off
_WORDS = {
    "role": frozenset({
        "system", "developer", "user", "assistant", "model", "human", "bot", "gpt", "tool", "tools", "function",
        "functions", "tool_call", "tool_response", "ipython", "observation", "environment", "documents", "context",
    }),
    "type": frozenset({"text", "image", "image_url", "video", "audio", "function", "tool", "tool_call", "json"}),
}
# fmt: on
_MAX_DEPTH = 100
#: A template that reads thoughts as parts of a message's content.
_THOUGHTS_AS_PARTS = re.compile(r"==\s*(['\"])thinking\1")
#: A template that may read the text of a message as a part of its content.
_TEXTS_AS_PARTS = re.compile(r"(['\"])text\1")
#: Stands behind the message that is to be continued. The space tells whether the template strips the message.
_END = "END_OF_THE_LAST_MESSAGE "
_ADVICE = "use plain generation, or a model with another template"
#: What Python says of its own inside: names of functions at wrong arguments, of modules, addresses.
_INSIDE = re.compile(
    r"^\S+\(\) (?=takes|got|missing|argument)|\b(?:jinja2|octo_run)\.[\w.]*\.|<[^<>]* at 0x[^<>]*>|"
    r"<(?:class|built-in|function|bound) [^<>]*>"
)


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
        self._variables = {name: _written(value) for name, value in variables.items()}
        longest_first = sorted((token for token in special if token), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text.

        A thought under one of the names ``reasoning_content``, ``thinking`` and ``reasoning`` is given to the template
        under the first two, of which templates read one or the other, or as a part of the content for those that read
        it so (Mistral's). A text is given as a part of the content to templates that would leave it out otherwise.

        Args:
            continue_final_message: The text ends where the last message does, so that a model goes on with it. No
                generation prompt is added then.

        Raises:
            OctoError: The template is faulty, refuses the messages, computes without end, or rewrites a message that
                is to be continued.
            UsageError: Something is no plain data, or no valid Unicode (the error names the message); or there is no
                message to be continued.
        """
        return str.__str__(self._render(messages, add_generation_prompt, continue_final_message, variables))

    def render_marked(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> MarkedText:
        """The same text with marks that tell users' special tokens from the template's.

        Raises:
            OctoError: As `render`.
            UsageError: As `render`.
        """
        text = self._render(messages, add_generation_prompt, continue_final_message, variables)
        places = sorted(set(self._unproven(text)))
        pieces = [text[i:j] for i, j in zip([0, *places], [*places, len(text)], strict=True)]
        return MarkedText(MARK.join(pieces), MARK)

    def _unproven(self, text: Text) -> Iterator[int]:
        """A place in each special token of `text` that the template did not write whole, before a character that it
        did not write. (A mark nowhere else: one before or inside a token of the template's would break that.)"""
        match = self._special.search(text)
        while match is not None:
            place = text.mask.find(0, match.start(), match.end())
            if place >= 0:
                yield place
            match = self._special.search(text, match.start() + 1)

    def _render(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, goes_on: bool, variables: Mapping[str, Any]
    ) -> Text:
        if isinstance(messages, (list, tuple)):
            if self._thoughts_as_parts:
                messages = [_with_thought_as_part(message) for message in messages]
            if roles := self._texts_as_parts:
                messages = [_with_text_as_part(message, roles) for message in messages]
        return self._rendered(messages, add_generation_prompt, goes_on, variables)

    def _rendered(
        self, messages: Any, add_generation_prompt: bool, goes_on: bool, variables: Mapping[str, Any]
    ) -> Text:
        """What the template makes of messages as they are."""
        messages = self._plain(messages, 0)
        variables = self._plain(variables, 0)
        _check_unicode(messages, variables)
        if isinstance(messages, list):
            messages = [_with_reasoning(message) for message in messages]
        last = _mark_end(messages) if goes_on else None
        everything = list(_scalars([messages, variables]))
        program = self._program  # made before the clock runs
        meter = Meter(len(everything), sum(len(value) for value in everything if isinstance(value, str)))
        now = datetime.now()
        values = {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: _format_time(now, form),
            "tools": None,
            "documents": None,
            **self._variables,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt and not goes_on,
        }
        text = self._run(program, values, meter)
        if last is not None:
            text = self._up_to_end(text, last)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise OctoError(f"The chat template in {self.file} writes half a surrogate pair: {_ADVICE}.") from None
        return text

    def _up_to_end(self, text: Text, last: str) -> Text:
        """The text up to the end of the last message, which `_mark_end` has marked."""
        place = str.rfind(text, _END.rstrip())
        if place < 0 or last.strip() not in text:
            raise OctoError(
                f"The chat template in {self.file} rewrites or leaves out the last message, so that no answer can go "
                "on with it: let the conversation end with another message."
            )
        return text[:place] if str.startswith(text, _END, place) else text[:place].rstrip()

    def _run(self, program: Program, values: dict[str, Any], meter: Meter) -> Text:
        template = f"The chat template in {self.file}"
        try:
            return program.run(values, meter)
        except _Refusal as error:
            raise OctoError(f"{template} refuses this conversation: {_flat(error)}.") from None
        except OverBudget as error:
            raise OctoError(f"{template} is stopped because {error}: {_ADVICE}.") from None
        except LostProof as error:
            raise OctoError(
                f"{template} rewrites text of a message together with its own ({error}), so that the special tokens in "
                f"it cannot be told from a user's: {_ADVICE}."
            ) from None
        except jinja2.UndefinedError as error:
            raise OctoError(f"{template} misses a value: {_flat(error)}.") from None
        except SecurityError as error:
            raise OctoError(f"{template} tries what is forbidden: {_flat(error)}.") from None
        except RecursionError:
            raise OctoError(f"{template} is nested too deeply: {_ADVICE}.") from None
        except Exception as error:  # a template is a program: any error of Python's can come out of it
            name = type(error).__name__
            raise OctoError(f"{template} fails here ({name}): {_flat(error)}.") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """What the template reads beside what it sets itself.

        Raises:
            OctoError: It is faulty.
        """
        return self._program.variables

    def check(self) -> None:
        """Compile it now.

        Raises:
            OctoError: It is faulty.
        """
        _ = self._program

    @cached_property
    def _thoughts_as_parts(self) -> bool:
        return _THOUGHTS_AS_PARTS.search(self.source) is not None and REASONING[0] not in self.source

    @cached_property
    def _texts_as_parts(self) -> frozenset[str]:
        """The roles whose text the template leaves out, unless it is a part of the message's content. Templates of
        checkpoints that see do: they take a text's characters for parts."""
        if _TEXTS_AS_PARTS.search(self.source) is None:
            return frozenset()
        _ = self._program  # a faulty one is told
        for roles in (("system", "user", "assistant"), ("user", "assistant")):
            messages = [{"role": role, "content": f"the text of the {role}"} for role in roles]
            plain = self._attempt(messages)
            parts = self._attempt([_with_text_as_part(message, frozenset(roles)) for message in messages])
            if parts is not None:
                seen = {one["role"]: [one["content"] in (text or "") for text in (plain, parts)] for one in messages}
                return frozenset(role for role, where in seen.items() if where == [False, True])
        return frozenset()

    def _attempt(self, messages: Any) -> str | None:
        """What the template makes of messages; None: nothing."""
        try:
            return str.__str__(self._rendered(messages, False, False, {}))
        except OctoError:
            return None

    @cached_property
    def _program(self) -> Program:
        try:
            return Program(self.source)
        except jinja2.TemplateSyntaxError as error:
            where = f"line {error.lineno} of {self.file}"
            raise OctoError(f"The chat template is not valid Jinja at {where}: {_flat(error.message)}.") from None
        except RecursionError:
            raise OctoError(f"The chat template in {self.file} is nested too deeply: {_ADVICE}.") from None
        except Exception as error:
            digits = isinstance(error, ValueError) and "digits" in str(error)
            reason = "it has a number of thousands of digits" if digits else _flat(error)
            raise OctoError(f"The chat template in {self.file} cannot be read: {reason}.") from error

    def _plain(self, value: Any, depth: int, name: object = None) -> Any:
        """A copy in plain JSON types that knows which words are the template's (`name`: the key it stands under)."""
        if depth > _MAX_DEPTH:
            raise UsageError("The conversation is nested too deeply.")
        if isinstance(value, str):
            text = str.__str__(value)
            known = isinstance(name, str) and text in _WORDS.get(name, ()) and not self._special.search(text)
            return written(text) if known else Text(text)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, (int, float)):
            return given(value)
        if isinstance(value, Mapping):
            return {self._plain(k, depth + 1): self._plain(item, depth + 1, k) for k, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._plain(item, depth + 1) for item in value]
        raise UsageError(f"A conversation holds text, numbers, lists and dicts only, not {type(value).__name__}.")


def _written(value: Any) -> Any:
    if isinstance(value, list):
        return [_written(item) for item in value]
    return written(value) if isinstance(value, str) else value


def _with_reasoning(message: Any) -> Any:
    """A message whose thought has both names that templates know."""
    if not isinstance(message, dict):
        return message
    thought = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _with_thought_as_part(message: Any) -> Any:
    """A message whose thought and text are the two parts of its content."""
    if not isinstance(message, Mapping) or not isinstance(content := message.get("content"), str):
        return message
    if not (thought := thought_of(message)):
        return message
    parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": content}]
    return {**{name: value for name, value in message.items() if name not in REASONING}, "content": parts}


def _with_text_as_part(message: Any, roles: frozenset[str]) -> Any:
    """A message of one of these roles whose text is a part of its content."""
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if not isinstance(role, str) or role not in roles:
        return message
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _mark_end(messages: Any) -> str:
    """Put `_END` behind the text of the last message, in place.

    Returns:
        The text without it.

    Raises:
        UsageError: There is no message, or none with a text.
    """
    message = messages[-1] if isinstance(messages, list) and messages else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(message, dict) and isinstance(content, str):
        message["content"] = content + _END
        return content
    for part in reversed(content) if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _END
            return text
    raise UsageError("No message can be continued: the last one must be there, and have a text.")


def _check_unicode(messages: list[Any], variables: Mapping[str, Any]) -> None:
    """Errors: UsageError that names the message (or the variable) and the position in its text."""
    named = [(f'The template variable "{shown(name, 40)}"', value) for name, value in variables.items()]
    for i, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        named.append((f"Message {i} ({shown(role, 40)})" if isinstance(role, str) else f"Message {i}", message))
    for name, value in named:
        for text in filter(lambda entry: isinstance(entry, str), _scalars(value)):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{name} is not valid Unicode: it has half a surrogate pair at position {error.start} of "
                    f"{quoted(text, 40)}; take that character out."
                ) from None


def _flat(error: object) -> str:
    """A foreign error in one short line."""
    text = " ".join(_INSIDE.sub("", str(error)[:4000]).split()).rstrip(".")
    return shown(text, 240) or "no reason given"


class _Refusal(jinja2.TemplateError):
    """What a template raises with ``raise_exception``."""


def _raise_exception(message: object = "") -> None:
    raise _Refusal(str.__str__(text_of(message)))


def _format_time(now: datetime, form: Any) -> str:
    if not isinstance(form, str) or len(form) > 1000:
        raise ValueError("strftime_now needs a short text")
    METER.get().make(1 << 18)
    return now.strftime(str.__str__(form))


def _scalars(value: Any) -> Iterator[Any]:
    """All values in messages or variables, keys too."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _scalars(item)
    elif isinstance(value, list):
        for item in value:
            yield from _scalars(item)
    else:
        yield value
