"""The program ``octo-run``; ``python -m octo_run`` is the same."""

import sys

from octo_run import process


def main() -> int:
    """Run the command line on the process's arguments.

    Returns:
        The exit code, unless the process has ended with it; Ctrl-C at any moment gives 130.
    """
    process.prepare()
    try:
        from octo_run.cli import main as run

        code = run()
    except KeyboardInterrupt:
        code = process.EXIT_INTERRUPTED
    return process.finish(code)


if __name__ == "__main__":
    sys.exit(main())
