"""How a plain prompt begins (BOS or not), and text that continues one."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import processors

from octo_run.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
ENDS = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = folder / name
        if isinstance(content, Path):
            shutil.copy(content, path)
        elif isinstance(content, Library):
            content.save(str(path))
        elif content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def metaspace_with(make_library: Callable[[str], Library]) -> Callable[[Any], Library]:
    """A Metaspace tokenizer with this post-processor."""

    def make(post_processor: Any) -> Library:
        library = make_library("metaspace-first")
        library.post_processor = post_processor
        return library

    return make


@pytest.mark.parametrize("field", [True, False, None])
@pytest.mark.parametrize(
    "kind", ["json with BOS", "json without", "json with EOS", "sentencepiece", "vocab and merges"]
)
def test_a_prompt_begins_as_the_field_or_else_the_vocabulary_says(
    tmp_path: Path,
    demo_dir: Path,
    make_library: Callable[[str], Library],
    metaspace_with: Callable[[Any], Library],
    kind: str,
    field: bool | None,
) -> None:
    config: dict[str, object] = {"bos_token": "<s>", "eos_token": "</s>"}
    if field is not None:
        config["add_bos_token"] = field
    if kind.startswith("json"):
        post = {"json with BOS": TEMPLATE, "json without": None, "json with EOS": ENDS}[kind]
        files: dict[str, object] = {"tokenizer.json": metaspace_with(post)}
    elif kind == "sentencepiece":
        files = {"tokenizer.model": demo_dir / "tokenizer.model"}
    else:
        vocabulary = json.loads(make_library("byte-level").to_str())["model"]["vocab"]
        write(tmp_path, {"vocab.json": {"<s>": 1000, "</s>": 1001, **vocabulary}})
        (tmp_path / "merges.txt").write_text("", encoding="utf-8")
        files = {}
        config["tokenizer_class"] = "GPT2Tokenizer"
    tok = load_tokenizer(write(tmp_path, {**files, "tokenizer_config.json": config}))
    wanted = kind == "json with BOS" if field is None else field
    assert tok.bos_id is not None and tok.adds_bos is wanted
    assert tok.opening == [tok.bos_id] * wanted
    assert tok.prompt("the dog") == [tok.bos_id] * wanted + tok.encode("the dog")
    assert tok.prompt("") == tok.opening


def transformers_tokenizer(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("post", [TEMPLATE, None])
@pytest.mark.parametrize(
    "config", [{}, {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "LlamaTokenizer"}]
)
def test_without_a_field_a_prompt_begins_as_in_transformers(
    tmp_path: Path, metaspace_with: Callable[[Any], Library], post: Any, config: dict[str, object]
) -> None:
    named = {**config, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files = {
        "tokenizer.json": metaspace_with(post),
        "tokenizer_config.json": named,
        "config.json": {"model_type": "llama"},
    }
    folder = write(tmp_path, files)
    assert load_tokenizer(folder).prompt("the dog") == transformers_tokenizer(folder)("the dog").input_ids


@pytest.mark.parametrize("field", [True, False, None])
def test_a_sentencepiece_prompt_begins_as_in_transformers(
    tmp_path: Path, shared: Callable[[str], Path], field: bool | None
) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")
    config = {"tokenizer_class": "LlamaTokenizer"} | ({} if field is None else {"add_bos_token": field})
    model = shared("tokenizers/llama2/tokenizer.model")
    folder = write(
        tmp_path,
        {"tokenizer.model": model, "tokenizer_config.json": config, "config.json": {"model_type": "llama"}},
    )
    assert load_tokenizer(folder).prompt("the dog") == transformers_tokenizer(folder)("the dog").input_ids


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
@pytest.mark.parametrize("field", [True, False, None])
@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_vocab_and_merges_prompt_begins_as_in_transformers(
    tmp_path: Path, qwen2_dir: Path, name: str, field: bool | None, model_type: str
) -> None:
    config = {"tokenizer_class": name} | ({} if field is None else {"add_bos_token": field})
    files = {file: qwen2_dir / file for file in ("vocab.json", "merges.txt")}
    folder = write(tmp_path, {**files, "tokenizer_config.json": config, "config.json": {"model_type": model_type}})
    theirs, ours = transformers_tokenizer(folder), load_tokenizer(folder)
    assert ours.prompt("the dog's 12") == theirs("the dog's 12").input_ids
    assert ours.bos_id == theirs.bos_token_id and ours.eos_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize("field", [True, False, None])
def test_whatever_feeds_plain_text_begins_it_so(make_checkpoint: Callable[..., Path], field: bool | None) -> None:
    """`generate --raw`, `eval ppl`, `eval needle`, `eval tasks` and the capture of keys."""

    from octo_run.cli.generate_batch import Prompts
    from octo_run.engine.evaluation import needle, perplexity, tasks
    from octo_run.engine.evaluation.capture import capture
    from octo_run.errors import UsageError

    folder = make_checkpoint()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("add_bos_token")
    write(folder, {path.name: config if field is None else {**config, "add_bos_token": field}})
    tok = load_tokenizer(folder)
    begin = [1] if field else []
    text = "The dog sleeps in the garden."
    ids = tok.encode(text)
    assert Prompts(False, None, None, {}, None).ids(tok, text) == begin + ids
    assert Prompts(False, None, True, {}, None).ids(tok, text) == [1, *ids]
    assert Prompts(False, None, False, {}, None).ids(tok, text) == ids
    assert tasks.prompt_ids(tok, text, as_chat=False) == begin + ids
    asked = needle._prompt(tok, text, "key", "continue")
    assert asked[: len(begin) + 2] == begin + ids[:2] and (1 in asked) is bool(begin)
    joined = needle._prompt(tok, text, "key", "text")
    assert joined[: len(begin) + 2] == begin + ids[:2] and joined.count(1) == len(begin)
    assert perplexity.window_ids(tok, ids, perplexity.Window(0, len(ids), 0)) == begin + ids
    assert capture(folder, text, len(begin) + len(ids)).k.shape[2] == len(begin) + len(ids)
    with pytest.raises(UsageError, match=f"has {len(begin) + len(ids)} tokens"):
        capture(folder, text, len(begin) + len(ids) + 1)


# Continuing text


def spelled(tok: Tokenizer, ids: list[int], after: list[int]) -> str:
    stream = tok.stream(after)
    return "".join(map(stream.push, ids)) + stream.finish()


@pytest.fixture(scope="module", params=["metaspace-first", "prepend", "no decoder", "byte-level", "demo", "llama2"])
def any_tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_library: Callable[[str], Library]
) -> Tokenizer:
    kind: str = request.param
    if kind in ("demo", "llama2"):
        tok: Tokenizer = request.getfixturevalue(kind)
        return tok
    library = make_library("metaspace-first" if kind == "no decoder" else kind)
    if kind == "no decoder":
        library.decoder = None
    return load_tokenizer(write(tmp_path_factory.mktemp("tok"), {"tokenizer.json": library}))


@pytest.mark.few(2)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_continuation_is_the_whole_less_the_prompt(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    tok = any_tokenizer
    ids = data.draw(st.lists(st.integers(0, min(tok.vocab_size - 1, 900)), max_size=14))
    cut = data.draw(st.integers(0, len(ids)))
    before = tok.stream()
    said = "".join(map(before.push, ids[:cut]))
    assert said + spelled(tok, ids[cut:], ids[:cut]) == tok.decode(ids)


def test_the_space_that_a_continuation_begins_with(llama2: Tokenizer) -> None:
    hello = llama2.encode("Hello")
    assert spelled(llama2, [3186], hello) == " world" == llama2.decode([*hello, 3186])[5:]
    assert spelled(llama2, [3186], [1]) == "world", "after BOS alone the text begins"
    assert spelled(llama2, hello, []) == "Hello"


def test_a_continuation_equals_transformers(llama2: Tokenizer, shared: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")
    files = {"tokenizer.model": shared("tokenizers/llama2/tokenizer.model"), "config.json": {"model_type": "llama"}}
    theirs = transformers_tokenizer(
        write(tmp_path, {**files, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}})
    )
    for prompt in ([1], [1, *llama2.encode("[INST] Hi [/INST]")], llama2.encode("Once upon a time")):
        for answer in ([18585, 29892], [29871, 10, 13], [727, 471]):
            whole, head = (theirs.decode(ids, skip_special_tokens=True) for ids in ([*prompt, *answer], prompt))
            assert spelled(llama2, answer, prompt) == whole[len(head) :]


def test_an_answer_continues_its_prompt(shared: Callable[[str], Path]) -> None:
    """What `generate --raw` prints: the first piece keeps its space."""
    from octo_run.engine import SamplingParams
    from octo_run.engine.stopping import AnswerText

    tok = load_tokenizer(shared("tokenizers/llama2"))
    answer = AnswerText(tok, SamplingParams(), frozenset({2}), tok.encode("Once"))
    assert "".join(answer.push(token, last=token == 471)[0] for token in (727, 471)) == " there was"


def documented_loop() -> str:
    """The code of docs/python.md that turns ids into text one by one."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.M | re.S
    )
    (code,) = (block for block in blocks if "stream(after=prompt)" in block)
    return code


def test_the_documented_loop_prints_the_text_of_all_tokens() -> None:
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(documented_loop(), names)
    engine, prompt = names["engine"], names["prompt"]
    ids = [token.id for token in engine.generate(prompt, names["SamplingParams"](max_tokens=40))]
    whole = engine.tokenizer.decode(ids)
    assert len(whole.split()) > 2 and printed.getvalue() == whole + "\n"


def test_the_documented_loop_keeps_spaces_and_letters_of_any_tokenizer(any_tokenizer: Tokenizer) -> None:
    """Its body with another tokenizer: the ids of a text, one by one."""
    body = documented_loop().split("prompt = ", 1)[1].split("\n", 1)[1]
    before, after = any_tokenizer.encode("the dog"), any_tokenizer.encode("the dog 42 crème brûlée 🦙")
    after = after[len(before) :]

    class Engine:
        tokenizer = any_tokenizer

        def generate(self, *_: object) -> list[Any]:
            return [type("Token", (), {"id": i}) for i in after]

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(body, {"engine": Engine(), "prompt": before, "SamplingParams": dict})
    head, whole = any_tokenizer.decode(before), any_tokenizer.decode([*before, *after])
    assert head + printed.getvalue() == whole + "\n"


def test_special_id(demo: Tokenizer, qwen2: Tokenizer) -> None:
    assert demo.special_id("<|im_end|>") == 4 and demo.special_id("</s>") == 2
    for text in ("", "the", "<|im_end|> ", "<|im_end", "a<|im_end|>"):
        assert demo.special_id(text) is None
    assert qwen2.special_id("<|im_end|>") == 151645 and qwen2.special_id("!") is None
