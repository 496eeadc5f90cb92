"""octo-run."""
