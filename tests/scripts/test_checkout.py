"""Scripts take the package from the checkout that they lie in, installed or not."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_script_finds_the_package_of_its_checkout(tmp_path: Path) -> None:
    """In a checkout elsewhere, whatever is installed and without ``PYTHONPATH``."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "octo_run").symlink_to((ROOT / "scripts" / "octo_run").readlink())  # as git has it
    (tmp_path / "octo_run").mkdir()
    (tmp_path / "octo_run" / "__init__.py").write_text("PLACE = 'this checkout'\n")
    (folder / "probe.py").write_text("import octo_run\nprint(octo_run.PLACE)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, str(folder / "probe.py")], capture_output=True, text=True, env=environment,
                         cwd=tmp_path)  # fmt: skip
    assert ran.stdout == "this checkout\n", ran.stderr


def test_the_link_leads_to_the_package() -> None:
    assert (ROOT / "scripts" / "octo_run" / "engine" / "__init__.py").samefile(ROOT / "engine" / "__init__.py")
