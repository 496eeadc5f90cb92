"""The program ``octo-run``; ``python -m octo_run`` is the same."""

import sys

from octo_run import process


def main() -> int:
    """Run the command line on the process's arguments.

    Returns:
        The exit code; Ctrl-C at any moment gives 130.
    """
    process.prepare()
    try:
        from octo_run.cli import main as run

        return run()
    except KeyboardInterrupt:
        return process.EXIT_INTERRUPTED
    finally:
        process.finish()


if __name__ == "__main__":
    sys.exit(main())
