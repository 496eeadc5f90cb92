"""``octo-run generate``: one prompt in, one continuation out, for scripts."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from octo_run.cli import console, debug_option, runtime
from octo_run.cli.options import TEXT, EngineOptions, SamplingOptions, engine_options, sampling_options
from octo_run.cli.progress import PromptProgress
from octo_run.errors import UsageError
from octo_run.process import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from octo_run.engine import Engine, Reply


#: Seconds until it is said that standard input is waited for.
PATIENCE = 2.0


@click.command("generate")
@click.option("--prompt", "-p", type=TEXT, help="The text to continue; without it, standard input is read.")
@click.option("--file", "-f", "files", type=click.Path(path_type=Path), multiple=True,
              help="A text to put before the prompt; may be given several times.")  # fmt: skip
@click.option("--chat/--raw", "as_chat", default=False, help="Answer the prompt, or continue it.")
@click.option("--system", type=TEXT, help="System prompt (with --chat).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@engine_options
@sampling_options
@debug_option
def command(
    prompt: str | None,
    files: tuple[Path, ...],
    as_chat: bool,
    system: str | None,
    as_json: bool,
    load: EngineOptions,
    sampling: SamplingOptions,
) -> int:
    """Continue one text or answer one question.

    The text comes from -p, or from standard input (of which one final line feed is taken off). Where both are given,
    and with --file, the files and standard input are documents: they come first, then the text of -p, with an empty
    line between. It is continued as
    it is (--raw, the default) or answered through the model's chat template (--chat). The answer ends at the
    model's end token, a --stop text, --max-tokens, or where the context is full.

    The keys of the --json object: text, ids, finish_reason (stop, length, context or interrupted), prompt_tokens,
    reused_tokens, read_tokens (fewer than the rest of the prompt if its reading was interrupted), generated_tokens,
    seconds.
    """
    if system is not None and not as_chat:
        raise UsageError("--system needs --chat: a raw continuation has no system prompt.")
    text = _prompt_text(prompt, files)
    engine = runtime.load_engine(load)
    progress = PromptProgress()
    reply = runtime.open_reply(engine, _prompt_ids(engine, text, as_chat, system), sampling, progress.report)
    interrupted = _run(reply, progress, stream=not as_json)
    if as_json:
        console.print_json(_report(reply))
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


def _prompt_ids(engine: "Engine", text: str, as_chat: bool, system: str | None) -> list[int]:
    """Token ids of the prompt, through the chat template or as plain text after the model's first token."""
    tokenizer = engine.tokenizer
    if not as_chat:
        return tokenizer.prompt(text)
    if not tokenizer.has_chat_template:
        raise UsageError("this model has no chat template: use --raw.")
    head = [{"role": "system", "content": system}] if system else []
    return tokenizer.chat([*head, {"role": "user", "content": text}])


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


def _report(reply: "Reply") -> dict[str, object]:
    return {
        "text": reply.text,
        "ids": list(reply.ids),
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "reused_tokens": reply.reused_tokens,
        "read_tokens": reply.read_tokens,
        "generated_tokens": reply.generated_tokens,
        "seconds": round(reply.prefill_seconds + reply.decode_seconds, 6),
    }
