"""Random JSON schemas: every answer of the demonstration model is valid."""

import json
import random
from collections.abc import Callable
from types import ModuleType

import pytest

from octo_run import Engine

pytest.importorskip("llguidance", reason="grammars need llguidance")
jsonschema = pytest.importorskip("jsonschema", reason="answers are checked by jsonschema")


def test_schemas_are_schemas(script: Callable[[str], ModuleType]) -> None:
    chance, kinds = random.Random(1), set()
    for _ in range(300):
        schema = script("grammar_check").random_schema(chance)
        jsonschema.Draft202012Validator.check_schema(schema)
        kinds |= {schema.get("type"), *(name for name in ("enum", "const", "anyOf", "pattern") if name in schema)}
    assert kinds >= {"string", "integer", "number", "object", "array", "enum", "const", "anyOf", "pattern"}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_every_answer_is_valid(script: Callable[[str], ModuleType], temperature: float) -> None:
    """60 schemas, 8 at a time; `scripts/grammar_check.py` takes 500."""
    check, chance = script("grammar_check"), random.Random(int(10 * temperature))
    schemas = [check.random_schema(chance) for _ in range(60)]
    with Engine.load("octo-demo", max_context=2048, sequences=8, device="cpu") as engine:
        assert check.check(engine, schemas, temperature, seed=1) == [], json.dumps(schemas)
