"""The options that several commands share, gathered into two frozen dataclasses."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from octo_run.cli import completion
from octo_run.errors import UsageError, nearest, quoted
from octo_run.models.config import CONDITIONINGS, HEADS

DEFAULT_MODEL = "octo-demo"
#: What an engine makes at a time at most.
MOST_SEQUENCES = 64
#: CPU threads at most: native code does not survive some hundreds of thousands.
MAX_THREADS = 512
#: Arithmetic by its name, and by the short one.
DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32",
          "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # fmt: skip

Command = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What to load and where: the common options of every command that runs a model."""

    model: str
    kv: str | None
    conditioning: str | None
    ctx: int | None
    device: str | None
    dtype: str | None
    offline: bool
    threads: int | None
    weights: str | None = None
    head: str | None = None


class Count(click.ParamType):  # type: ignore[type-arg]
    """A whole number from ``least`` to ``most``; by default what native code takes for a size."""

    name = "integer"

    def __init__(self, least: int = 1, most: int = 2**31 - 1) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = self.parse(str(value))
        if number is None:
            usual = re.search(r"\[default: (.+)\]", getattr(param, "help", None) or "")
            # What other programs call so is what ours do without the option.
            hint = f"; leave it out for {usual[1]}" if usual is not None and str(value).strip() in ("0", "-1") else ""
            self.fail(f"{quoted(value)} is no whole number from {self.least:,} to {self.most:,}{hint}", param, ctx)
        return number

    def parse(self, text: str) -> int | None:
        """The number that ``text`` says, None where it says none that is allowed."""
        if not re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", text):
            return None
        number = int(text)
        return number if self.least <= number <= self.most else None


class Tokens(Count):
    """A number of tokens; ``8k`` is 8,192 of them and ``1m`` 1,048,576."""

    name = "tokens"

    def parse(self, text: str) -> int | None:
        match = re.fullmatch(r"\s*([0-9]{1,20})([kKmM])\s*", text)
        if match is None:
            return super().parse(text)
        number = int(match[1]) << (10 if match[2] in "kK" else 20)
        return number if self.least <= number <= self.most else None


class Number(click.ParamType):  # type: ignore[type-arg]
    """A finite number in a range.

    Args:
        above: Whether ``least`` itself is outside.
        below: Whether ``most`` itself is outside.
    """

    name = "number"

    def __init__(
        self, least: float | None = None, most: float | None = None, *, above: bool = False, below: bool = False
    ) -> None:
        self._least, self._most, self._above, self._below = least, most, above, below

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        low = self._least is None or (number > self._least if self._above else number >= self._least)
        high = self._most is None or (number < self._most if self._below else number <= self._most)
        if not (math.isfinite(number) and low and high):
            self.fail(f"{quoted(value)} is no number{self._range()}", param, ctx)
        return number

    def _range(self) -> str:
        """The range in words, with a space before it."""
        low = "" if self._least is None else f"{'above' if self._above else 'from'} {self._least:g}"
        high = "" if self._most is None else f"{'below' if self._below else 'up to'} {self._most:g}"
        joined = " and " if self._above and high else " "
        return f" {joined.join(filter(None, [low, high or ('on' if low and not self._above else '')]))}".rstrip()


class Dtype(click.ParamType):  # type: ignore[type-arg]
    """A dtype, by its long or its short name."""

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        found = DTYPES.get(str(value).strip().lower())
        if found is None:
            near = nearest(str(value), DTYPES)
            hint = f"did you mean {near}?" if near else f"the dtypes are {', '.join(DTYPES)}"
            self.fail(f"{quoted(value)} is no dtype; {hint}", param, ctx)
        return found

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return completion.items(DTYPES, incomplete)


class Format(click.ParamType):  # type: ignore[type-arg]
    """One of some formats of weights, in letters of any case."""

    name = "format"

    def __init__(self, *formats: str) -> None:
        self._formats = formats

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip().lower()
        if text not in self._formats:
            near = nearest(text, self._formats)
            hint = f"did you mean {near}, of" if near else "give one of"
            self.fail(
                f"there is no format of weights {quoted(value)} here: {hint} {', '.join(self._formats)}", param, ctx
            )
        return text

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return completion.items(self._formats, incomplete)


class Text(click.ParamType):  # type: ignore[type-arg]
    """Text for a model: an argument whose bytes are no UTF-8 is none."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            self.fail(f"{quoted(text)} is not UTF-8 text: character {error.start + 1} cannot be decoded", param, ctx)
        return text


class StopText(Text):
    """A text that ends an answer: the empty one would end every answer before it begins."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = super().convert(value, param, ctx)
        if not text:
            self.fail("the text is empty: give at least one character, or leave --stop out", param, ctx)
        return text


COUNT, SEED, TEXT, TOKENS = Count(), Count(0, 2**63 - 1), Text(), Tokens()
dtype_option = click.option(
    "--dtype", type=Dtype(), metavar="NAME",
    help="Arithmetic: bf16, fp16 or fp32.  [default: the model's, float32 on a CPU]",
)  # fmt: skip
stop_option = click.option(
    "--stop", type=StopText(), multiple=True, help="Stop before this text; may be given several times."
)


def _context_length(_ctx: click.Context, _param: click.Parameter, value: str) -> int | None:
    """A number of tokens; ``auto`` becomes ``None``."""
    if value.strip().lower() == "auto":
        return None
    number = TOKENS.parse(value)
    if number is None:
        raise click.BadParameter(f"{quoted(value)} is no number of tokens (like 8192 or 8k) and not 'auto'")
    return number


def lower(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Names that are the same in capital letters."""
    return None if value is None else value.strip().lower()


device_option = click.option(
    "--device",
    metavar="cpu|cuda",
    callback=lower,
    shell_complete=completion.devices,
    help="Where to run.  [default: cuda if there is one]",
)


offline_option = click.option("--offline", is_flag=True, help="Never touch the network.")
_ENGINE_OPTIONS = (
    click.option(
        "--model",
        "-m",
        default=DEFAULT_MODEL,
        show_default=True,
        shell_complete=completion.models,
        help="A folder, ORG/NAME[@REV], imported/NAME or octo-demo.",
    ),
    click.option(
        "--kv",
        default=None,
        callback=lower,
        shell_complete=completion.formats,
        help="KV cache format: NAME, K:V or auto:N (see `show`).  [default: oct3; bf16 where heads have no code]",
    ),
    click.option(
        "--conditioning",
        type=click.Choice(CONDITIONINGS, case_sensitive=False),
        default=None,
        help="Change keys so that their code errs less: not at all, by their mean, or in full.  [default: full]",
    ),
    click.option(
        "--max-context",
        "--ctx",
        "ctx",
        metavar="N|auto",
        shell_complete=completion.contexts,
        default="auto",
        show_default=True,
        callback=_context_length,
        help="Context in tokens; 8k is 8,192.",
    ),
    click.option(
        "--weights",
        metavar="FORMAT",
        callback=lower,
        shell_complete=completion.weights,
        help="Store layers' matrices so: fp32, bf16, fp8, int8, int4, int4-128, or auto: as they are.  "
        "[default: int8 on a CPU with compiled kernels, else auto]",
    ),
    click.option(
        "--head",
        type=click.Choice(HEADS, case_sensitive=False),
        default=None,
        help="Store the embedding and the output head so.  [default: int8 beside int8 and int4 layers on a CPU with "
        "compiled kernels, else bf16 (not quantised)]",
    ),
    device_option,
    dtype_option,
    offline_option,
    click.option("--threads", type=Count(1, MAX_THREADS), help="CPU threads.  [default: PyTorch's choice]"),
)


def template_options(command: Command) -> Command:
    """Add the options of the chat template; the command receives them as ``template_kwargs`` and ``chat_template``."""
    command = click.option(
        "--chat-template", type=click.Path(path_type=Path), help="A file with another chat template (Jinja)."
    )(command)
    return click.option(
        "--template-kwargs", metavar="JSON", type=TEXT,
        help="What the chat template sees beside the messages, for example '{\"enable_thinking\": false}'.",
    )(command)  # fmt: skip


def template_variables(text: str | None) -> dict[str, Any]:
    """The object of ``--template-kwargs``.

    Raises:
        UsageError: It is none.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(
            f"--template-kwargs is {quoted(text)}; give a JSON object like '{{\"enable_thinking\": false}}'."
        )
    return value


def engine_options(command: Command) -> Command:
    """Add the options that say what to load; the command receives them as ``load: EngineOptions``."""
    return gather(command, "load", EngineOptions, _ENGINE_OPTIONS)


def gather(
    command: Command, name: str, target: type[Any], options: tuple[Callable[[Command], Command], ...]
) -> Command:
    """Add options; the command receives their values as ``name``, an object of the dataclass ``target``."""
    fields = [field.name for field in dataclasses.fields(target)]

    @functools.wraps(command)
    def gathered(*args: Any, **values: Any) -> Any:
        values[name] = target(**{field: values.pop(field) for field in fields if field in values})
        return command(*args, **values)

    decorated: Command = gathered
    for option in reversed(options):
        decorated = option(decorated)
    return decorated
