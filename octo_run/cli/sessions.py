"""``octo-run sessions``: the conversations that were saved."""

import sys
import time
from typing import Any

import click

from octo_run.cli import completion, console, debug_option, session_files
from octo_run.errors import OctoError, UsageError, shown


@click.group("sessions")
@debug_option
def command() -> None:
    """List, show and delete saved conversations.

    `chat --session NAME` begins or continues one and saves it after each answer; /save and /load do so by hand.
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@debug_option
def list_sessions(as_json: bool) -> None:
    """List the saved conversations, the newest first."""
    entries = session_files.entries()
    if as_json:
        console.print_json([facts(entry) for entry in entries])
        return
    if not entries:
        console.notice("there are no sessions; `octo-run chat --session NAME` begins one")
        return
    console.echo(table(entries))


@command.command("show")
@click.argument("name", shell_complete=completion.sessions)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def show(name: str, as_json: bool) -> None:
    """Print a saved conversation and what its file holds.

    Of a damaged file the text is printed as far as it can be read; the exit code is 1 then.
    """
    try:
        session = session_files.read(name)
    except session_files.Damaged as error:
        _show_text(name, error, as_json=as_json)
        raise
    head = [{"role": "system", "content": session.system}] if session.system else []
    messages = [*head, *session.turns]
    entry = session_files.entry_of(name, session)
    if as_json:
        identity = None if session.identity is None else vars(session.identity)
        console.print_json({**facts(entry), "identity": identity, "messages": messages})
        return
    formats = dict.fromkeys(session.identity.formats if session.identity is not None else ())
    lines = [
        f"session  {name}, saved {entry.when}, {console.human_bytes(entry.bytes)}",
        f"model    {session.model}",
        f"cache    {session.tokens:,} tokens, {session.pages:,} packed pages: {', '.join(formats) or 'unknown'}",
    ]
    console.echo("\n".join([*lines, *_lines(messages)]))


def _lines(messages: "list[dict[str, str]]") -> list[str]:
    from octo_run.tokenizer.thinking import written

    lines = list[str]()
    for message in messages:
        lines += ["", f"{message['role']}:", *console.printable(written(message)).split("\n")]
    return lines


def _show_text(name: str, error: OctoError, *, as_json: bool) -> None:
    """Print what can be read of a damaged conversation, if anything can."""
    text = session_files.read_text(name)
    if text is None:
        return
    messages = [*([{"role": "system", "content": text.system}] if text.system else []), *text.turns]
    if as_json:
        entry = session_files.damaged_entry(name, error)
        console.print_json({**facts(entry), "identity": None, "messages": messages})
        return
    end = [] if text.whole else ["", "(what follows cannot be read)"]
    console.echo("\n".join([f"session  {name}, damaged", *_lines(messages), *end]))


@command.command("rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completion.sessions)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@debug_option
def remove(names: tuple[str, ...], yes: bool) -> None:
    """Delete saved conversations.

    It asks first; if the answer is no, nothing is removed and the exit code is 0.
    """
    names = tuple(dict.fromkeys(names))
    for name in names:
        session_files.find(name)  # what is not there is not asked about, and no others are deleted beside it
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("rm asks before it deletes, and standard input is no terminal: give --yes.")
        if not click.confirm(f"Delete {shown(', '.join(names))}?", err=True):
            console.notice("nothing is removed")
            return
    for name in names:
        console.notice(f"{name} is removed, {console.human_bytes(session_files.remove(name))} freed")


def facts(entry: session_files.Entry) -> dict[str, Any]:
    """What is known of a saved conversation, for programs."""
    session = entry.session
    return {
        "name": entry.name,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(entry.saved)),
        "bytes": entry.bytes,
        "model": None if session is None else session.model,
        "questions": None if session is None else _questions(session),
        "tokens": None if session is None else session.tokens,
        "path": str(session_files.session_path(entry.name)),
        "damage": entry.damage,
    }


def table(entries: list[session_files.Entry]) -> str:
    """The saved conversations as a table."""
    rows = []
    for entry in entries:
        session = entry.session
        if session is None:
            rows.append(
                [entry.name, entry.when, console.human_bytes(entry.bytes), "-", "-", f"damaged: {entry.damage}"]
            )
            continue
        size = console.human_bytes(entry.bytes)
        rows.append([entry.name, entry.when, size, str(_questions(session)), f"{session.tokens:,}", session.model])
    return console.table(["session", "saved", "size", "questions", "tokens", "model"], rows)


def _questions(session: Any) -> int:
    return sum(turn["role"] == "user" for turn in session.turns)
