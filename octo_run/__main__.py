"""``python -m octo_run`` is the same program as ``octo-run``."""

import sys

from octo_run.cli import main

if __name__ == "__main__":
    sys.exit(main())
