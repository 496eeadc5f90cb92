"""The settings of a chat: what ``/set`` shows and changes."""

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from octo_run.cli import runtime
from octo_run.cli.hints import nearest_setting, option_for
from octo_run.cli.options import TOKENS
from octo_run.cli.sampling_options import bias_of
from octo_run.errors import UsageError, quoted, shown

if TYPE_CHECKING:
    from octo_run.cli.conversation import Conversation

#: Settings that a chat has from its options alone, and which those are.
FIXED = {"grammar": "by --json-schema, --regex or --grammar when the chat begins"}
#: What other programs set with the same command, and what has a command of its own here.
_ELSEWHERE = {
    "parameter": "/set NAME VALUE", "system": "/system TEXT", "think": "/think on", "nothink": "/think off",
    "model": "/model NAME", "kv": "/kv FORMAT", "verbose": "/stats",
}  # fmt: skip
_NAME_AND_VALUE = re.compile(r"([^\s=]*)(?:=|\s*)(.*)", re.DOTALL)


def change(chat: "Conversation", argument: str) -> None:
    """Carry out ``/set``: show all settings or one, or set one.

    Raises:
        UsageError: There is no such setting, or it has no such value.
    """
    known = names()
    name, value = _NAME_AND_VALUE.fullmatch(argument).groups()  # type: ignore[union-attr]
    if not name:
        own = runtime.model_defaults(chat.engine)
        lines = []
        for setting in (*known, *FIXED):
            value = getattr(chat.params, setting)
            mark = "  (the model's own)" if setting in own and own[setting] == value else ""
            mark = f"  (fixed: {FIXED[setting]})" if setting in FIXED else mark
            lines.append(f"{setting:20}{_shown(value)}{mark}")
        chat.print("\n".join(lines))
        return
    name = name.lower().lstrip("-").replace("-", "_")  # as the options are written, too
    name = "temperature" if name == "temp" else name
    if name in FIXED:
        if value.strip():
            raise UsageError(f"{name} is fixed while a chat runs: {FIXED[name]}.")
    elif name not in known:
        raise UsageError(f"there is no setting {shown(name, 40)}; {_hint(name, known)}")
    if value.strip():
        changes: dict[str, Any] = {name: _parsed(name, value.strip())}
        params = dataclasses.replace(chat.params, **changes)
        chat.engine.check_params(params)
        if name == "stop":
            runtime.warn_of_stops(chat.engine.tokenizer, name, params.stop)
        chat.params = params
        chat.changed |= changes
        chat.keeper.settings_changed()
    chat.tell(f"{name} {_shown(getattr(chat.params, name))}")


def _hint(name: str, known: list[str]) -> str:
    """What a setting that there is not was meant to be."""
    if name in _ELSEWHERE:
        return f"did you mean {_ELSEWHERE[name]}?"
    option = option_for(f"--{name.replace('_', '-')}")
    if option and option.lstrip("-").replace("-", "_") not in known:
        return f"{option} says it when the chat begins."
    near = nearest_setting(name, known)
    return f"did you mean {near}?" if near else f"the settings are {', '.join(known)}."


def names() -> list[str]:
    """What ``/set`` sets."""
    from octo_run.engine import SamplingParams

    # Nobody gives a chat ids to stop at, and it shows no log-probabilities.
    others = ("stop_ids", "logprobs", *FIXED)
    return [field.name for field in dataclasses.fields(SamplingParams) if field.name not in others]


def _shown(value: object) -> str:
    from octo_run.engine.grammar import Grammar

    if value is None or value == ():
        return "none"
    if isinstance(value, Grammar):
        return f"a {value.name} of {len(value.text):,} characters"
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        return " ".join(f"{token}={number:g}" for token, number in value)
    return ", ".join(map(repr, value)) if isinstance(value, tuple) else str(value)


def _parsed(name: str, value: str) -> object:
    """The value of a setting as :class:`SamplingParams` takes it; ``none`` is no limit, seed, stop text or bias."""
    if name == "stop":
        return () if value.lower() == "none" else (value,)
    if name == "logit_bias":
        pairs = () if value.lower() == "none" else tuple(map(bias_of, re.split(r"[\s,]+", value)))
        if None in pairs:
            raise UsageError(
                f"logit_bias is {quoted(value)}; give token ids and numbers from -100 to 100, like 123=-5."
            )
        return pairs
    if name in ("seed", "max_tokens") and value.lower() == "none":
        return None
    number = TOKENS.parse(value) if name == "max_tokens" else None
    if number is not None:
        return number
    try:
        return int(value) if re.fullmatch(r"[+-]?[0-9]{1,20}", value) else float(value)
    except ValueError:
        raise UsageError(f"{name} is {quoted(value)}; give a number.") from None
