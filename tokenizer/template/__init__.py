"""The language of chat templates: jinja2 parses it, this package runs it (see `program`)."""
