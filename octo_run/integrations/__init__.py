"""octo-run's KV cache in other libraries. Each module needs the library that it is named after."""
