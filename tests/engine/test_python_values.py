"""What Python callers may hand over, and what they see of the objects that they get."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from octo_run import Engine, SamplingParams, Session, UsageError


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(
        "octo-demo", device=torch.device("cpu"), max_context=256, kv="OCT3", dtype="BF16", conditioning="off"
    ) as engine:
        yield engine


IDS = [5, 60, 700]
KINDS = [torch.tensor(IDS), np.array(IDS), tuple(IDS), [np.int64(i) for i in IDS], [*torch.tensor(IDS)]]


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_ids_of_any_kind_are_ids_everywhere(engine: Engine, kind: int) -> None:
    ids: Any = KINDS[kind]
    wanted = [token.id for token in engine.generate(IDS, SamplingParams(max_tokens=2))]
    assert [token.id for token in engine.generate(ids, SamplingParams(max_tokens=2))] == wanted
    assert engine.logits(ids).shape == (3, engine.config.vocab_size)
    assert next(iter(engine.logit_rows(ids))).shape[0] == 3
    sequence = engine.sequence()
    assert engine.prefill(sequence, ids).shape == (engine.config.vocab_size,)
    assert sequence.ids == IDS
    sequence.close()


def test_a_text_is_a_prompt_everywhere(engine: Engine) -> None:
    count = len(engine.tokenizer.prompt("Hello"))
    assert engine.generate("Hello").prompt_tokens == count and engine.logits("Hello").shape[0] == count


@pytest.mark.parametrize("wrong", [5, 5.0, [5.0], [True], None, b"Hello", {"a": 1}, np.array([[5, 6]]), np.array(5)])
def test_what_is_no_prompt_is_one_sentence_everywhere(engine: Engine, wrong: Any) -> None:
    for call in (engine.generate, engine.logits, engine.logit_rows):
        with pytest.raises(UsageError, match="a text or one list of token ids"):
            call(wrong)
    sequence = engine.sequence()
    with pytest.raises(UsageError, match="a text or one list of token ids"):
        engine.prefill(sequence, wrong)
    sequence.close()


def test_stop_ids_may_lie_in_an_array() -> None:
    assert SamplingParams(stop_ids=np.array([5, 6])).stop_ids == (5, 6)  # type: ignore[arg-type]
    assert SamplingParams(stop_ids=torch.tensor([5])).stop_ids == (5,)  # type: ignore[arg-type]


def test_names_in_capital_letters_are_names(engine: Engine) -> None:
    assert engine.kv.name == "oct3" and engine.dtype == torch.bfloat16


def test_advice_about_the_context_can_be_followed(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"longer context \(max_context or --ctx, 4096 at most\)"):
        engine.generate([5] * 300)
    with Engine.load("octo-demo", device="cpu", max_context=4096, kv="oct2") as longest:
        with pytest.raises(UsageError, match="this model's context cannot be longer") as caught:
            longest.generate([5] * 5000)
        assert "--ctx" not in str(caught.value)
        with pytest.raises(UsageError, match="this model's context cannot be longer"):
            Session(longest).ask("word " * 5000)


def test_a_repr_says_what_the_object_is(engine: Engine) -> None:
    generation, session = engine.generate("Hello", SamplingParams(max_tokens=1)), Session(engine)
    reply = engine.chat([{"role": "user", "content": "Hello."}], SamplingParams(max_tokens=1))
    sequence = engine.sequence()
    shown = [repr(each) for each in (engine, generation, reply, session, sequence, engine.tokenizer)]
    sequence.close()
    assert not any(" object at 0x" in text for text in shown), shown
    assert shown[0] == "<Engine octo-demo: oct3 cache, bfloat16 on cpu, context 256>"
    list(generation)
    assert "1 generated, length" in repr(generation)
    other = Engine.load("octo-demo", device="cpu", max_context=128, kv="oct2")
    other.close()
    assert repr(other).endswith(", closed>")
