"""What the documents say that can be checked: links, files, code, the README's length."""

import contextlib
import io
import re
from pathlib import Path

import click
import pytest

from octo_run.kernels.codec.rotation import HEAD_DIMS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
WRITTEN = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*WRITTEN, *sorted((ROOT / "docs" / "results").glob("*.md"))]
#: Names of files and folders of the project, in text, code and pictures.
PLACE = re.compile(
    r"(?<![\w./-])(?:octo_run|engine|kernels|models|tokenizer|scripts|tests|docs|examples|\.ci)/[\w./*-]+"
)


def text_of(path: Path, *, code: bool = True) -> str:
    text = path.read_text(encoding="utf-8")
    return text if code else re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """The names that a page's headings have as link targets."""
    headings = re.findall(r"^#+ (.+)$", text_of(path, code=False), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    text = text_of(path, code=False)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.M)
    targets += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.exists(), f"{relative(path)} links to {target}"
        assert place.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(place), f"{relative(path)} links to {target}"
    used = set(re.findall(r"\[[^\]]+\]\[([^\]]+)\]", text))
    assert used == set(re.findall(r"^\[([^\]]+)\]: ", text, re.M))


@pytest.mark.parametrize("name", ["formats.md", "transformers.md"])
def test_all_head_dimensions_of_codes_are_named(name: str) -> None:
    text = " ".join(text_of(ROOT / "docs" / name).split())
    dims = ", ".join(map(str, HEAD_DIMS[:-1]))
    assert re.search(rf"oded formats take head.* of {dims} (and|or) {HEAD_DIMS[-1]}", text)


@pytest.mark.parametrize("path", WRITTEN, ids=relative)
def test_named_files_exist(path: Path) -> None:
    for name in PLACE.findall(text_of(path)):
        assert list(ROOT.glob(name.rstrip("/."))), f"{relative(path)} names {name}"


@pytest.mark.parametrize("path", WRITTEN, ids=relative)
def test_lines_are_short(path: Path) -> None:
    long = [number for number, line in enumerate(text_of(path).splitlines(), 1) if len(line) > 120]
    assert not long, f"lines of {relative(path)} longer than 120 characters"


def test_the_readme_is_short_and_has_eight_figures() -> None:
    text = text_of(README)
    assert len(text.splitlines()) <= 150
    section = text.split("## Eight figures\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \[.+?\]\[(\w+)\] \|", section, re.M)
    assert len(rows) == 8
    for name in rows:
        assert f"[{name}]: docs/results/" in section
    for theme in ("dark", "light"):
        assert f"docs/results/terminal-{theme}.svg" in text
        assert (ROOT / "docs" / "results" / f"terminal-{theme}.svg").stat().st_size <= 40_000


def test_octahedral_is_said_of_the_formats_that_are() -> None:
    """The trellis codes, the default among them, fold nothing onto an octahedron."""
    for path in (README, *sorted((ROOT / "docs").glob("*.md"))):
        for part in re.split(r"\n\n|\n(?=\|)", text_of(path)):
            assert "octahedr" not in part.lower() or "octopus" in part.lower(), f"{relative(path)}: {part}"


def commands(group: click.Group, name: str = "octo-run") -> dict[str, set[str]]:
    """The options of each command by its whole name."""
    found: dict[str, set[str]] = {}
    context = click.Context(group, info_name=name)
    for own in group.list_commands(context):
        command = group.get_command(context, own)
        assert command is not None
        whole = f"{name} {own}"
        options = {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}
        found |= {whole: options | {"--help", "-h"}} | (
            commands(command, whole) if isinstance(command, click.Group) else {}
        )
    return found


def test_commands_that_list_or_measure_have_a_form_for_programs() -> None:
    """By one name, and the page of commands names them."""
    from octo_run.cli import cli

    known, others = commands(cli), {"chat", "pull", "import", "rm", "sessions rm", "quantize", "completion"}
    groups = {"sessions", "eval"}
    with_it = {name.removeprefix("octo-run ") for name, options in known.items() if "--json" in options}
    assert with_it == {name.removeprefix("octo-run ") for name in known} - others - groups
    (row,) = re.findall(r"^\| `--json` \| of (.*): ", text_of(ROOT / "docs" / "commands.md"), re.M)
    named = re.findall(r"`([a-z ]+)`", row)
    assert {name for name in with_it if not name.startswith("eval ")} | {"eval"} == {*named}


def code_in(path: Path) -> list[str]:
    """What stands between backticks, and the lines of code blocks."""
    text = text_of(path)
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```$", text, re.M | re.S)
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", text_of(path, code=False))
    return [*(span.replace("\n", " ") for span in spans), *(line for block in blocks for line in block.split("\n"))]


def test_commands_in_documents_have_their_options() -> None:
    """Where a command is written with options, it has them; one that stands alone in its page is some command's."""
    from octo_run.cli import cli

    known = commands(cli)
    seen, wrong = 0, []
    for path in [README, *sorted((ROOT / "docs").glob("*.md"))]:
        for line in code_in(path):
            words = re.sub(r"[^\w\s.,:/=+-]", " ", line[max(0, line.find("octo-run ")) :]).split()
            own = [name for name in known if words[: len(name.split())] == name.split()]
            if own:
                options = known[max(own, key=len)]
            elif path.name == "commands.md" and line.startswith("--"):
                options = set().union(*known.values())
            else:
                continue
            seen += 1
            named = {word.split("=")[0] for word in words if re.match("--[a-z]", word)}
            wrong += [(relative(path), line, option) for option in sorted(named - options)]
    assert not wrong and seen > 60


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "path", [README, *(ROOT / "docs" / name for name in ("python.md", "transformers.md"))], ids=relative
)
def test_python_in_documents_runs(path: Path) -> None:
    if path.name == "transformers.md":
        pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 is not installed")
    blocks = re.findall(r"^```python\n(.*?)^```$", text_of(path), re.M | re.S)
    assert blocks
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, {})
        assert len(printed.getvalue().split()) > 2, block
