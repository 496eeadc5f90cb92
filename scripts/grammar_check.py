"""Random JSON schemas, one answer of a model to each: every answer must be valid. Prints what a token costs.

Times are of the processor, so that neighbours on the machine do not count.

python scripts/grammar_check.py --count 500 --model octo-demo
"""

import argparse
import json
import random
import time
from typing import Any

from octo_run import Engine, SamplingParams
from octo_run.engine.grammar import Grammar, Guide

WORDS = (
    "name",
    "age",
    "city",
    "tags",
    "size",
    "kind",
    "note",
    "when",
    "über",
    "with space",
    "a/b",
    "日本",
    "_id",
    "x-1",
)


def random_schema(chance: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose documents are finite: bounded texts, lists and numbers."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kinds += ["object", "object", "array", "anyOf"] if depth else []
    match chance.choice(kinds):
        case "string":
            least = chance.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 8)}
        case "integer":
            low = chance.randint(-1000, 1000)
            return {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 5000)}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": chance.randint(1, 100), "multipleOf": 0.25}
        case "boolean":
            return {"type": "boolean"}
        case "null":
            return {"type": "null"}
        case "enum":
            return {
                "enum": chance.sample([1, 2.5, "a", "b c", "ü", None, True, "日本", '"', "\\"], chance.randint(1, 5))
            }
        case "const":
            return {"const": chance.choice(["fixed", 7, False, [1, 2], {"k": "v"}])}
        case "pattern":
            return {"type": "string", "pattern": chance.choice(["^[a-z]{1,5}$", "^[0-9]{3}-[0-9]{2}$", "^(yes|no)$"])}
        case "array":
            least = chance.randint(0, 2)
            items = random_schema(chance, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + chance.randint(0, 2)}
        case "anyOf":
            return {"anyOf": [random_schema(chance, depth - 1) for _ in range(chance.randint(1, 3))]}
    names = chance.sample(WORDS, chance.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(chance, depth - 1) for name in names},
        "required": chance.sample(names, chance.randint(0, len(names))),
        "additionalProperties": False,
    }


def check(engine: Engine, schemas: list[dict[str, Any]], temperature: float, seed: int) -> list[str]:
    """What is wrong with the answers to ``schemas``; nothing if all are valid."""
    import jsonschema

    params = [
        SamplingParams(
            grammar=Grammar("json", json.dumps(schema)), temperature=temperature, seed=seed + number, max_tokens=1500
        )
        for number, schema in enumerate(schemas)
    ]
    wrong = list[str]()
    for done in engine.generate_batch(["A document:"] * len(schemas), params):
        try:
            jsonschema.validate(json.loads(done.text), schemas[done.index])
        except (ValueError, jsonschema.ValidationError) as error:
            wrong.append(f"{json.dumps(schemas[done.index])}: {done.text!r} ({done.finish_reason}): {error}"[:400])
        if done.finish_reason != "stop":
            wrong.append(f"{json.dumps(schemas[done.index])}: {done.finish_reason}"[:400])
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--model", default="octo-demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--sequences", type=int, default=8)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    schemas = [random_schema(chance) for _ in range(given.count)]
    spent, masks, fill = 0.0, 0, Guide.fill

    def watched(self: Guide, bits: Any) -> None:
        nonlocal spent, masks
        begun = time.thread_time()
        fill(self, bits)
        spent, masks = spent + time.thread_time() - begun, masks + 1

    Guide.fill = watched  # type: ignore[method-assign]
    engine = Engine.load(given.model, max_context=2048, sequences=given.sequences)
    begun = time.process_time()
    wrong = check(engine, schemas, given.temperature, given.seed)
    took = time.process_time() - begun
    print("\n".join(wrong))
    print(
        f"{given.count - len(wrong)} of {given.count} answers are valid; {masks:,} masks, {1e6 * spent / masks:.0f} us "
        f"each, {100 * spent / took:.1f} % of {took:.0f} s on {engine.device}"
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
