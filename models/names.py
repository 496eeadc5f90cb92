"""Names of models: those of the Hub with their addresses, and GGUF files. Imports neither torch nor the Hub."""

import os
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from octo_run.errors import UsageError, quoted

DEMO_NAME = "octo-demo"
DEFAULT_REVISION = "main"
DEFAULT_ENDPOINT = "https://huggingface.co"
#: The first part of the names of models that `octo-run import` made.
IMPORTED = "imported"
_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_HUB_NAME = re.compile(rf"({_PART}/{_PART})(?:@(.+))?", re.ASCII)
_TAGGED = re.compile(rf"({_PART}/{_PART}):.*", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)
#: Types of GGUF files as they are named, the most exact first.
_EXACT = ("BF16", "F16", "F32", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K", "Q4_K_M", "Q4_K", "Q4_1", "Q4_0")


@dataclass(frozen=True)
class HubName:
    """The name of a model on the Hub.

    Attributes:
        repo: ``org/name``.
        revision: The one asked for: a branch, a tag or a commit; None: the default branch.
    """

    repo: str
    revision: str | None = None

    @property
    def ref(self) -> str:
        return self.revision or DEFAULT_REVISION

    @property
    def command(self) -> str:
        """The command that brings the model into the cache."""
        owner, _, name = self.repo.partition("/")
        return f"octo-run import FILE {name}" if owner == IMPORTED else f"octo-run pull {self}"

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def endpoint() -> str:
    """The address of the Hub (``$HF_ENDPOINT``)."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def parse_hub_name(name: str, others: str = "", near: Callable[[str], str | None] | None = None) -> HubName:
    """``org/name[@revision]`` taken apart, or the address of a model's page or of one of its files.

    Args:
        others: What else may be given, for the message.
        near: Gives what ``name`` is a misspelling of.

    Raises:
        UsageError: ``name`` is anything else.
    """
    plain = _of_address(name.strip().strip("<>\"'`"))
    match = _HUB_NAME.fullmatch(plain.rstrip("/") if near is None else plain)
    repo = match[1] if match else ""
    if match is None or "--" in repo or ".." in repo or repo.endswith((".", "-", ".git")):
        meant = near(name) if near is not None else None
        if (tagged := _TAGGED.fullmatch(plain)) is not None:
            raise UsageError(
                f"{quoted(name)} is no model name: a branch, a tag or a commit stands behind an @, as in "
                f"{tagged[1]}@{DEFAULT_REVISION}."
            )
        hint = f"did you mean {quoted(meant)}?" if meant else f"give {others}ORG/NAME[@REV] of the Hub."
        raise UsageError(f"{quoted(name)} is no model name: {hint}")
    revision = match[2]
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"{quoted(name)}: {quoted(revision)} is no revision, which is a branch, a tag or a commit.")
    return HubName(repo, revision)


def _of_address(name: str) -> str:
    """The name in an address such as ``https://huggingface.co/org/name/tree/revision``; other names as they are."""
    hosts = {"huggingface.co", "www.huggingface.co", "hf.co"}
    with suppress(ValueError):  # HF_ENDPOINT is no address, which is told when it is asked
        hosts.add(urlsplit(endpoint()).netloc)
    with suppress(ValueError):  # an address that is none
        address = re.sub(r"^(hf://|git@(hf\.co|huggingface\.co):)", f"{DEFAULT_ENDPOINT}/", name)
        parts = urlsplit(address if "://" in address else f"https://{address}")
        if parts.netloc.lower() in hosts and parts.scheme in ("http", "https"):
            path = re.sub(r"^(api/)?models/(?=[^/]+/)", "", parts.path.strip("/"))
            org, model, kind, revision, *rest = [*map(unquote, path.split("/")), "", "", "", ""]
            model = model.removesuffix(".git")
            if org in ("datasets", "spaces"):
                raise UsageError(f"{quoted(name)} is the address of one of the {org}, not of a model.")
            if kind == "tree" and any(rest):
                raise UsageError(f"{quoted(name)} is the address of a folder: octo-run takes whole repositories only.")
            file = "/".join(filter(None, rest))
            if kind in ("blob", "resolve", "raw") and file.lower().endswith(".gguf"):
                raise UsageError(
                    fetch_gguf(f"{quoted(name)} is the address of a GGUF file", f"{org}/{model}", [file], revision)
                )
            at = f"@{revision}" if kind in ("tree", "blob", "resolve", "raw", "commit", "commits") and revision else ""
            return f"{org}/{model}{at}"
    return name


def is_gguf(path: Path) -> bool:
    """Whether a file holds a model, or a part of one, as GGUF; what belongs to images alone does not count."""
    return path.suffix.lower() == ".gguf" and "mmproj" not in path.name.lower() and path.is_file()


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a folder, of split models the first, the most exact before the others."""
    try:
        names = {path.name: path for path in folder.iterdir() if is_gguf(path)}
    except OSError:
        return []
    return [names[name] for name in exact_first(list(names))]


def exact_first(names: list[str]) -> list[str]:
    """Names of GGUF files, of split models the first file, the most exact before the others.

    An import makes bfloat16 of all, so the most exact one is the best.
    """
    firsts = [name for name in names if re.search(r"-0*1-of-\d+\.gguf$|^((?!-of-\d+\.gguf$).)*$", name, re.IGNORECASE)]
    return sorted(
        firsts, key=lambda name: (next((i for i, kind in enumerate(_EXACT) if kind in name.upper()), 99), name)
    )


def fetch_gguf(what: str, repo: str, files: list[str], revision: str | None) -> str:
    """How the best of the GGUF files of a repository becomes a model.

    Args:
        what: What was given, as the message begins.
    """
    best = exact_first(files)[0] if exact_first(files) else files[0]
    pattern = re.sub(r"-\d+(-of-\d+\.gguf)$", r"-*\1", best, flags=re.IGNORECASE)
    at = "" if not revision else f" --revision {shlex.quote(str(revision))}"
    command = f"hf download {shlex.quote(repo)} --include {shlex.quote(pattern)}{at} --local-dir ."
    return f"{what}: fetch one with `{command}`, then run `octo-run import {shlex.quote(best)}`."
