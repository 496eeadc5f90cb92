"""``octo-run eval tasks``: exact match on a file of prompts and answers, with each KV format."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octo_run.cli import console, debug_option, runtime
from octo_run.cli.evaluate import common
from octo_run.cli.evaluate.common import CacheOptions, cache_options
from octo_run.cli.options import COUNT, TEXT, TOKENS, EngineOptions, engine_options, stop_option
from octo_run.cli.output import OutputFile, deliver
from octo_run.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octo_run.engine.evaluation.reading import Progress
    from octo_run.engine.evaluation.tasks import Outcome, Score, Task


@click.command("tasks")
@click.argument("file", type=common.text_type)
@click.option("--prompt-key", help="Field of the prompt.  [default: prompt, question or input]")
@click.option("--answer-key", help="Field of the answer.  [default: answer, target or output]")
@click.option(
    "--extract",
    type=click.Choice(["last-number", "first-number", "last-line", "first-line", "whole", "regex"]),
    default="last-number",
    show_default=True,
    help="What is compared, in the model's answer and in the file's.",
)
@click.option("--pattern", help="The expression for --extract regex: its last match, or that one's first group.")
@click.option("--ignore-case", is_flag=True, help="Upper and lower case are the same.")
@click.option("--chat/--raw", "as_chat", default=True, help="Through the chat template (the default), or as it is.")
@click.option("--system", type=TEXT, help="System prompt (with --chat).")
@click.option("--max-tokens", "-n", type=TOKENS, default=256, show_default=True, help="Longest answer.")
@stop_option
@click.option("--limit", type=COUNT, help="Only the first tasks of the file.")
@click.option("--output", type=common.figure_type, help="Write every answer to this JSONL file.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of rows.")
@engine_options
@cache_options
@debug_option
def command(
    file: Path,
    prompt_key: str | None,
    answer_key: str | None,
    extract: str,
    pattern: str | None,
    ignore_case: bool,
    as_chat: bool,
    system: str | None,
    max_tokens: int,
    stop: tuple[str, ...],
    limit: int | None,
    output: Path | None,
    as_json: bool,
    load: EngineOptions,
    cache: CacheOptions,
) -> int:
    """Answer the tasks of FILE with each format of --kv A,B,C and count exact matches.

    FILE has one JSON object a line with a prompt and an answer (GSM8K's lines are such). Answers are greedy. The same
    rule takes what is compared out of the model's answer and out of the file's; numbers are compared as numbers, texts
    without regard to white space.

    Ctrl-C ends the measurement with the tasks that are answered.

    The keys of a --json row: kv, tasks (answered), correct, accuracy, its 95 % Wilson interval low and high, partial
    (whether that is not all tasks).
    """
    common.check_outputs(output)
    if system is not None and not as_chat:
        raise UsageError("--system needs --chat: a raw prompt has no system prompt.")
    text = console.read_text(file)
    common.model_config(load)  # before PyTorch is imported
    from octo_run.engine.evaluation import tasks as evaluation
    from octo_run.engine.evaluation.reading import Progress

    rule = evaluation.extractor(extract, pattern, ignore_case=ignore_case)
    found = evaluation.read_tasks(text, str(file), prompt_key, answer_key)[:limit]
    wanted = evaluation.wanted_answers(found, rule)
    kvs = common.formats(load)
    prompts = _prompts(load, found, stop, as_chat=as_chat, system=system)
    answered: dict[str, list[Outcome]] = {kv: [] for kv in kvs}
    engine_of = common.loader(
        load, cache, load.ctx, check=lambda _tokenizer, plan: evaluation.check_lengths(plan, found, prompts)
    )

    def run() -> "Iterator[Progress]":
        for kv, outcomes in answered.items():
            for outcome in evaluation.run(
                engine_of(kv), found, prompts, wanted, rule, max_tokens=max_tokens, stop=stop
            ):
                outcomes.append(outcome)
                yield Progress(sum(map(len, answered.values())), len(found) * len(kvs))

    def scores() -> "list[Score]":
        return [evaluation.score(kv, outcomes, len(found)) for kv, outcomes in answered.items() if outcomes]

    def deliver_scores() -> None:
        answers = [{"kv": kv, **dataclasses.asdict(own)} for kv, outcomes in answered.items() for own in outcomes]
        files = [] if output is None else [OutputFile(output, lambda path: _write_jsonl(path, answers))]
        values = [dataclasses.asdict(row) for row in scores()]
        deliver(console.as_json(values) if as_json else _table(scores()), files, as_json=as_json)

    return common.follow("eval tasks", run(), lambda: _table(scores()), deliver_scores)


def _prompts(
    load: EngineOptions, found: "list[Task]", stop: tuple[str, ...], *, as_chat: bool, system: str | None
) -> list[list[int]]:
    """The ids of the prompts, made before a model is loaded; a stop text that no answer can hold is told.

    Raises:
        OctoError: The model cannot be asked so.
    """
    from octo_run.engine.evaluation import tasks as evaluation
    from octo_run.models.hub import resolve
    from octo_run.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve(load.model))
    if as_chat and not tokenizer.has_chat_template:
        raise UsageError(f"{load.model} has no chat template: use --raw.")
    prompts = evaluation.prompts(tokenizer, found, as_chat=as_chat, system=system)
    runtime.warn_of_stops(tokenizer, "--stop", stop)
    return prompts


def _write_jsonl(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), "utf-8")


def _table(scores: list["Score"]) -> str:
    """The scores as a table; "" without any."""
    if not scores:
        return ""
    rows = [
        [
            row.kv,
            f"{row.correct}/{row.tasks}",
            f"{100 * row.accuracy:.1f}",
            f"{100 * row.low:.1f} - {100 * row.high:.1f}",
        ]
        for row in scores
    ]
    table = console.table(["kv", "correct", "accuracy %", "95 % interval"], rows)
    return table + "\npartial: not all tasks were answered" * any(row.partial for row in scores)
