"""The options that say how answers are drawn."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octo_run.cli import console
from octo_run.cli.options import SEED, TEXT, TOKENS, Command, Count, Number, gather, stop_option
from octo_run.errors import UsageError, quoted

if TYPE_CHECKING:
    from octo_run.engine.grammar import Grammar

_HISTORY = 4096  # tokens that penalties and DRY look at, at most: that of the engine's rules


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens. ``None`` leaves a value to the model's ``generation_config.json``."""

    temp: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    penalty_range: int | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_range: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: Path | None = None
    regex: str | None = None
    grammar: Path | None = None
    read: "Grammar | None" = None  # what the three above say, once they are read


def bias_of(text: str) -> tuple[int, float] | None:
    """A token id and what is added to its logit, of ``ID=VALUE``; None for another text."""
    token, _, number = text.partition("=")
    try:
        found = int(token), float(number)
    except ValueError:
        return None
    return found if found[0] >= 0 and -100 <= found[1] <= 100 else None


class Bias(click.ParamType):  # type: ignore[type-arg]
    """A token id and what is added to its logit."""

    name = "bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        found = bias_of(str(value))
        if found is None:
            self.fail(f"{quoted(value)} is no token id with a number from -100 to 100, like 123=-5", param, ctx)
        return found


_SAMPLING_OPTIONS = (
    click.option("--temperature", "--temp", "temp", type=Number(0), help="0 = greedy.  [default: the model's]"),
    click.option("--top-k", type=Count(0), help="Only the K likeliest tokens, 0 = all."),
    click.option("--top-p", type=Number(0, 1, above=True), help="Nucleus of this probability."),
    click.option("--min-p", type=Number(0, 1, below=True), help="Least probability, relative to the likeliest."),
    click.option(
        "--repetition-penalty",
        type=Number(0, above=True),
        help="Divides logits of tokens of prompt and answer, 1 = off.",
    ),
    click.option(
        "--presence-penalty",
        type=Number(-100, 100),
        help="Taken from logits of the answer's tokens, 0 = off.",
    ),
    click.option(
        "--frequency-penalty", type=Number(-100, 100), help="The same for each time that they occur, 0 = off."
    ),
    click.option(
        "--seed",
        type=SEED,
        help="Seed of the sampling.  [default: a new one each time]",
    ),
    click.option("--max-tokens", "-n", type=TOKENS, help="Longest answer.  [default: no limit]"),
    stop_option,
    click.option(
        "--penalty-range", type=Count(0, _HISTORY), metavar="N", help="The penalties count the last N tokens, 0 = all."
    ),
    click.option("--typical-p", type=Number(0, 1, above=True), help="Tokens of typical surprise, 1 = off."),
    click.option(
        "--top-n-sigma", type=Number(0, 1000), help="Logits within N standard deviations of the best, 0 = off."
    ),
    click.option("--xtc-probability", type=Number(0, 1), help="How often the likeliest tokens are left out, 0 = off."),
    click.option(
        "--xtc-threshold", type=Number(0, 0.5), help="What --xtc-probability takes for likely.  [default: 0.1]"
    ),
    click.option("--dry-multiplier", type=Number(0, 100), help="Lowers what goes on with a repetition, 0 = off."),
    click.option("--dry-base", type=Number(1, 10), help="Times so much for each repeated token.  [default: 1.75]"),
    click.option("--dry-allowed-length", type=Count(1, 64), help="Repeated tokens that are free.  [default: 2]"),
    click.option("--dry-range", type=Count(0, _HISTORY), metavar="N", help="Look at the last N tokens, 4,096 at most."),
    click.option(
        "--logit-bias",
        type=Bias(),
        metavar="ID=VALUE",
        multiple=True,
        help="Added to the logit of a token, -100 = never; may be given several times.",
    ),
    click.option(
        "--json-schema", type=click.Path(path_type=Path), metavar="FILE", help="Answer with JSON of this schema."
    ),
    click.option("--regex", type=TEXT, metavar="PATTERN", help="Answer with what matches this regular expression."),
    click.option(
        "--grammar",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Answer with what this grammar says: Lark as llguidance reads it, or .gbnf.",
    ),
)


def sampling_options(command: Command) -> Command:
    """Add the options that say how to sample; the command receives them as ``sampling: SamplingOptions``."""
    return gather(command, "sampling", SamplingOptions, _SAMPLING_OPTIONS)


def read_grammar(options: SamplingOptions) -> "Grammar | None":
    """What the answer must be, of the options that say so.

    Raises:
        UsageError: Several of them, or what is none.
    """
    if options.read is not None:
        return options.read
    given = {
        "--json-schema": options.json_schema, "--regex": options.regex, "--grammar": options.grammar,
    }  # fmt: skip
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} are given; an answer follows one of them.")
    if not named:
        return None
    from octo_run.engine.grammar import Grammar

    if options.regex is not None:
        return Grammar("regex", options.regex)
    if options.json_schema is not None:
        return Grammar("json", console.read_text(options.json_schema))
    assert options.grammar is not None
    return Grammar("gbnf" if options.grammar.suffix.lower() == ".gbnf" else "lark", console.read_text(options.grammar))


def given(options: SamplingOptions) -> dict[str, Any]:
    """The options by the names of ``SamplingParams``; None: nothing is said."""
    found = {**vars(options), "temperature": options.temp, "grammar": read_grammar(options)}
    for name in ("temp", "json_schema", "regex", "read"):
        del found[name]
    return {name: None if value == () else value for name, value in found.items()}
