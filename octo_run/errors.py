"""The errors a user can cause or meet. Their text is one sentence: what is wrong, where, and what to do."""


class OctoError(Exception):
    """A failure that is explained to the user in one sentence; the command line ends with exit code 1."""

    exit_code = 1


class UsageError(OctoError):
    """Wrong input (an argument, a name, an option); the command line ends with exit code 2."""

    exit_code = 2
