"""``octo-run generate``: one prompt in, one continuation out, for scripts."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from octo_run.cli import checks, console, debug_option, runtime
from octo_run.cli.generate_batch import SEQUENCES, Prompts, load_for, run_batch, run_several, told_logprobs
from octo_run.cli.options import (
    MOST_SEQUENCES,
    TEXT,
    Count,
    EngineOptions,
    engine_options,
    template_options,
    template_variables,
)
from octo_run.cli.progress import PromptProgress
from octo_run.cli.sampling_options import SamplingOptions, sampling_options
from octo_run.errors import UsageError
from octo_run.process import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from octo_run.engine import Engine, Reply


#: Seconds until it is said that standard input is waited for.
PATIENCE = 2.0
#: What the engine tells of alternatives at most.
MOST_LOGPROBS = 20


@click.command("generate")
@click.option("--prompt", "-p", type=TEXT, help="The text to continue; without it, standard input is read.")
@click.option("--file", "-f", "files", type=click.Path(path_type=Path), multiple=True,
              help="A text to put before the prompt; may be given several times.")  # fmt: skip
@click.option("--chat/--raw", "as_chat", default=False, help="Answer the prompt, or continue it.")
@click.option("--system", type=TEXT, help="System prompt (with --chat).")
@click.option("--bos/--no-bos", "bos", default=None,
              help="Begin a raw text with the model's first token, or not.  [default: as it wants]")  # fmt: skip
@click.option("--n", "answers", type=Count(1, 1000), default=1, show_default=True, help="Answers to give.")
@click.option("--logprobs", type=Count(0, MOST_LOGPROBS), default=0, metavar="K",
              help="With --json: the log-probability of each token and of the K likeliest ones.")  # fmt: skip
@click.option("--batch", type=click.Path(path_type=Path), metavar="FILE.jsonl",
              help="Answer the prompts of this file, a JSON object in each line.")  # fmt: skip
@click.option("--out", "-o", type=click.Path(path_type=Path), metavar="OUT.jsonl",
              help="With --batch: where the answers go.  [default: standard output]")  # fmt: skip
@click.option("--force", is_flag=True, help="With -o: replace the file if it is there.")
@click.option("--sequences", type=Count(1, MOST_SEQUENCES), metavar="N",
              help="With --batch and --n: answers that are made at a time.  [default: 8]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each answer instead of the text.")
@template_options
@engine_options
@sampling_options
@debug_option
def command(
    prompt: str | None,
    files: tuple[Path, ...],
    as_chat: bool,
    system: str | None,
    bos: bool | None,
    answers: int,
    logprobs: int,
    batch: Path | None,
    out: Path | None,
    force: bool,
    sequences: int | None,
    as_json: bool,
    template_kwargs: str | None,
    chat_template: Path | None,
    load: EngineOptions,
    sampling: SamplingOptions,
) -> int:
    """Continue one text or answer one question.

    The text comes from -p, or from standard input (of which one final line feed is taken off). Where both are given,
    and with --file, the files and standard input are documents: they come first, then the text of -p, with an empty
    line between. It is continued as it is (--raw, the default) or answered through the model's chat template (--chat).
    The answer ends at the model's end token, a --stop text, --max-tokens, or where the context is full.

    The keys of the --json object: text, ids, finish_reason (stop, length, context or interrupted), prompt_tokens,
    reused_tokens, read_tokens (fewer than the rest of the prompt if its reading was interrupted), generated_tokens,
    seconds; with --logprobs also logprobs. With --n each answer is an object of its own, with its index.

    --batch answers many prompts, several at a time: each line has "prompt" or "messages", and may have "id" and
    settings of its own. An interrupted batch goes on when the same command is given again.
    """
    if system is not None and not as_chat:
        raise UsageError("--system needs --chat: a raw continuation has no system prompt.")
    if bos is not None and as_chat:
        raise UsageError("--bos and --no-bos are for raw texts: with --chat the chat template begins the text.")
    if out is not None and batch is None:
        raise UsageError("-o needs --batch; send the answer of one prompt to a file with >.")
    if force and out is None:
        raise UsageError("--force needs -o: it lets that file be replaced.")
    for name, given in (("--chat-template", chat_template), ("--template-kwargs", template_kwargs)):
        if given is not None and not (as_chat or batch is not None):
            raise UsageError(f"{name} needs --chat: a raw text goes through no template.")
    if sequences is not None and batch is None and answers == 1:
        raise UsageError("--sequences needs --batch or --n: one answer has no others beside it.")
    if logprobs and not (as_json or batch is not None):
        raise UsageError("--logprobs needs --json: a text has no place for them.")
    prompts = Prompts(
        as_chat,
        system,
        bos,
        template_variables(template_kwargs),
        None if chat_template is None else (console.read_text(chat_template), str(chat_template)),
    )
    if batch is not None and (prompt is not None or files or answers > 1):
        raise UsageError("--batch has all prompts in its file: leave out -p, --file and --n.")
    sampling = checks.answering(load, sampling, prompts.template)
    if batch is not None:
        console.require_output()
        return run_batch(batch, out, prompts, load, sampling, sequences or SEQUENCES, logprobs, force=force)
    text = _prompt_text(prompt, files)
    if answers > 1:
        return run_several(text, answers, prompts, load, sampling, sequences or SEQUENCES, logprobs, as_json=as_json)
    engine, ids = load_for(prompts, text, load)
    progress = PromptProgress()
    reply = runtime.open_reply(engine, ids, sampling, progress.report, logprobs)
    interrupted = _run(reply, progress, stream=not as_json)
    if as_json:
        console.print_json(_report(engine, reply, logprobs))
    return EXIT_INTERRUPTED if interrupted else 0


def _prompt_text(prompt: str | None, files: tuple[Path, ...]) -> str:
    """Files, standard input and ``-p`` in this order; raises UsageError where there is none of them."""
    parts = [console.read_text(path).removesuffix("\n") for path in files]
    if prompt is None and not files:
        console.require_input("give -p TEXT or pipe a text into standard input")
        if sys.stdin.isatty():
            raise UsageError("there is no prompt: give -p TEXT or pipe a text into standard input.")
    if (prompt is None and not files) or console.input_is_given():
        parts.append(console.read_stdin_text(patience=PATIENCE).removesuffix("\n").removesuffix("\r"))
    text = "\n\n".join(part for part in [*parts, prompt or ""] if part.strip())
    if not text:
        raise UsageError("the prompt is empty: give -p TEXT or pipe a text into standard input.")
    return text


def _run(reply: "Reply", progress: PromptProgress, *, stream: bool) -> bool:
    """Generate to the end, printing the pieces if ``stream``; returns whether Ctrl-C ended it."""
    interrupted = False
    try:
        with progress:
            for piece in reply:
                if stream:
                    console.stream(piece)
    except KeyboardInterrupt:
        interrupted = True
        reply.close()
    if stream and not reply.text.endswith("\n"):
        console.echo()
    return interrupted


def _report(engine: "Engine", reply: "Reply", logprobs: int) -> dict[str, object]:
    found: dict[str, object] = {
        "text": reply.text,
        "ids": list(reply.ids),
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "reused_tokens": reply.reused_tokens,
        "read_tokens": reply.read_tokens,
        "generated_tokens": reply.generated_tokens,
        "seconds": round(reply.prefill_seconds + reply.decode_seconds, 6),
    }
    if logprobs:
        found["logprobs"] = told_logprobs(engine, reply.tokens)
    return found
