"""The valid files that mutants are made of: the embedded demo model's, small ones written here, and real ones where a
folder of them is given. Those written here are the same on every machine."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.gguf_mutants import File as GgufFile
from fuzzing.gguf_mutants import Tensor as GgufTensor
from fuzzing.gguf_mutants import write as write_gguf
from fuzzing.protobuf_mutants import NORMALIZER, PIECE, TRAINER, Field, write
from fuzzing.safetensors_mutants import tensors

DEMO = Path(__file__).resolve().parents[2] / "models" / "octo_demo"


@dataclass(frozen=True)
class Seed:
    """A valid file ``target`` and what stands beside it. Real ones may be files that octo-run refuses.

    Attributes:
        weight: How often it is taken, against 1 for the others: little for large files, which are slow.
    """

    name: str
    target: str
    data: bytes
    beside: dict[str, bytes] = field(default_factory=dict)
    weight: float = 1.0
    real: bool = False


def encoded(value: Any) -> bytes:
    """A value as JSON."""
    return json.dumps(value, ensure_ascii=False).encode()


def _real(data: Path | None, pattern: str) -> Iterator[tuple[str, bytes]]:
    if data is not None:
        for path in sorted(data.glob(pattern)):
            yield str(path.relative_to(data)), path.read_bytes()


# Configurations

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 24,
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, linear": {"tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama, llama3": {"rope_scaling": _LLAMA3, "attention_bias": True, "mlp_bias": True, "eos_token_id": [2, 3]},
    "llama, rope_parameters": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "mistral": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 32, "attention_bias": None,
        "mlp_bias": None,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32,
        "max_window_layers": 1, "attention_bias": None, "mlp_bias": None, "dtype": "bfloat16",
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "layer_types": ["full_attention"],
        "mlp_bias": None,
    },
}  # fmt: skip


def configs(data: Path | None) -> list[Seed]:
    """Configurations of all families, tiny enough to run."""
    seeds = []
    for name, changes in _FAMILIES.items():
        values = {key: value for key, value in (LLAMA | changes).items() if value is not None}
        seeds.append(Seed(name, "config.json", encoded(values)))
    seeds.append(Seed("octo_demo/config.json", "config.json", (DEMO / "config.json").read_bytes(), weight=0.5))
    seeds += [
        Seed(name, "config.json", text, weight=0.2, real=True) for name, text in _real(data, "configs/*.config.json")
    ]
    return [seed for seed in seeds if "generation" not in seed.name]


def generation_configs(data: Path | None) -> list[Seed]:
    """Sampling settings."""
    full = {
        "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.05,
        "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "transformers_version": "4.51.0",
    }  # fmt: skip
    values: list[dict[str, Any]] = [full, {"eos_token_id": 2, "do_sample": False}, {"temperature": 1.0, "top_k": 0}, {}]
    name = "generation_config.json"
    seeds = [Seed(f"settings {i}", name, encoded(value)) for i, value in enumerate(values)]
    seeds.append(Seed(f"octo_demo/{name}", name, (DEMO / name).read_bytes()))
    return seeds + [Seed(path, name, text, real=True) for path, text in _real(data, f"*/*{name}")]


# Weights


def _tiny_model() -> list[tuple[str, str, list[int], int]]:
    """The tensors of the tiny Llama, float32."""
    prefix = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": [24, 16],
        f"{prefix}self_attn.q_proj.weight": [128, 16],
        f"{prefix}self_attn.k_proj.weight": [64, 16],
        f"{prefix}self_attn.v_proj.weight": [64, 16],
        f"{prefix}self_attn.o_proj.weight": [16, 128],
        f"{prefix}mlp.gate_proj.weight": [24, 16],
        f"{prefix}mlp.up_proj.weight": [24, 16],
        f"{prefix}mlp.down_proj.weight": [16, 24],
        f"{prefix}input_layernorm.weight": [16],
        f"{prefix}post_attention_layernorm.weight": [16],
        "model.norm.weight": [16],
        "lm_head.weight": [24, 16],
    }
    found = []
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        found.append((name, "F32", shape, 4 * count))
    return found


def weights(_data: Path | None) -> list[Seed]:
    """Weight files (one with the tensors of a tiny model, others with a few of all dtypes) and an index of shards."""
    beside = {"config.json": encoded(LLAMA)}
    name, index = "model.safetensors", "model.safetensors.index.json"
    model = _tiny_model()
    half = [(tensor, "BF16", shape, size // 2) for tensor, _, shape, size in model]
    few = [("a", "F32", [2, 3], 24), ("b", "I64", [1], 8), ("c", "BOOL", [4], 4), ("d", "F16", [2, 2], 8)]
    empty = [("a", "F16", [0, 3], 0), ("b", "U8", [], 1), ("c", "F8_E4M3", [7], 7)]
    first, second = tensors(model[:5], {"format": "pt"}), tensors(model[5:])
    places = {tensor[0]: f"model-{1 + (i >= 5)}.safetensors" for i, tensor in enumerate(model)}
    shards = {**beside, "model-1.safetensors": first, "model-2.safetensors": second}
    return [
        Seed("tiny model", name, tensors(model, {"format": "pt"}), beside),
        Seed("tiny model, bf16", name, tensors(half), beside),
        Seed("few tensors", name, tensors(few, {"format": "pt", "a": ""}), {}, weight=3.0),
        Seed("empty tensors", name, tensors(empty), {}, weight=2.0),
        Seed("no tensors", name, tensors([]), {}, weight=0.3),
        Seed("index", index, encoded({"metadata": {"total_size": 1}, "weight_map": places}), shards, weight=0.7),
    ]


# GGUF

_GGUF_NAMES = {
    "embed_tokens": "token_embd", "q_proj": "blk.0.attn_q", "k_proj": "blk.0.attn_k", "v_proj": "blk.0.attn_v",
    "o_proj": "blk.0.attn_output", "gate_proj": "blk.0.ffn_gate", "up_proj": "blk.0.ffn_up",
    "down_proj": "blk.0.ffn_down", "input_layernorm": "blk.0.attn_norm", "post_attention_layernorm": "blk.0.ffn_norm",
    "norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def ggufs(_data: Path | None) -> list[Seed]:
    """The tiny Llama in float32 and in bfloat16, with a BPE and with SentencePiece, and with rotary factors."""
    numbers = {
        "block_count": 1, "context_length": 64, "embedding_length": 16, "feed_forward_length": 24,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 64, "vocab_size": 24,
        "attention.value_length": 64, "rope.dimension_count": 64,
    }  # fmt: skip
    model = [("general.architecture", 8, "llama"), ("general.name", 8, "tiny"), ("general.alignment", 4, 32)]
    model += [(f"llama.{key}", 4, value) for key, value in numbers.items()]
    model += [("llama.attention.layer_norm_rms_epsilon", 6, 1e-5), ("llama.rope.freq_base", 6, 10000.0)]
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(18)), "ab", "abc", "<|im_end|>"]
    kinds = [2, 3, 3, *[1] * 20, 4]
    shared = [("tokens", 9, (8, tokens)), ("token_type", 9, (5, kinds)), ("bos_token_id", 4, 1), ("eos_token_id", 4, 2)]
    bpe = [("model", 8, "gpt2"), ("pre", 8, "llama-bpe"), ("merges", 9, (8, ["a b", "ab c"])), *shared]
    spm = [("model", 8, "llama"), ("scores", 9, (6, [-float(i) for i in range(24)])), *shared]
    spm += [("add_space_prefix", 7, True), ("add_bos_token", 7, True), ("unknown_token_id", 4, 0)]
    template = ("tokenizer.chat_template", 8, CHATML)
    seeds = []
    for title, words, kind in (("bpe", bpe, 0), ("sentencepiece", spm, 0), ("bpe, bf16", bpe, 30)):
        file = GgufFile([*model, *((f"tokenizer.ggml.{key}", type_, value) for key, type_, value in words), template])
        if kind == 30:
            file.entries.append(("general.sampling.temp", 6, 0.5))
            file.tensors.append(GgufTensor("rope_freqs.weight", [32], 0, 0))
            file.data += struct.pack("<32f", *[1.0] * 32)
        for name, _, shape, size in _tiny_model():
            stem = _GGUF_NAMES[name.split(".")[-2]] + ".weight"
            narrow = kind if len(shape) > 1 else 0
            file.tensors.append(GgufTensor(stem, shape[::-1], narrow, len(file.data)))
            file.data += bytes(size // (2 if narrow else 1))
            file.data += bytes(-len(file.data) % 32)
        seeds.append(Seed(title, "model.gguf", write_gguf(file)))
    return seeds


# SentencePiece

_WORDS = ("he", "ll", "hell", "hello", "▁w", "or", "▁wor", "ld", "▁world", "th", "the", "▁the", "in", "an", "er", "▁a")


def sentencepiece(
    kind: int = 2, dummy_prefix: bool = True, collapse: bool = False, extra: tuple[str, ...] = ()
) -> bytes:
    """A model (``kind`` 1: Unigram, 2: BPE) with byte pieces, ASCII letters and a few words."""
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((text, 4) for text in extra)]
    pieces = special + [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    letters = ["▁", *map(chr, range(0x21, 0x7F)), "ä", "ß", "你"]
    pieces += [(text, 1) for text in dict.fromkeys((*_WORDS, *letters))]
    fields = []
    for rank, (text, type_) in enumerate(pieces):
        inner = [Field(1, 2, text.encode()), Field(2, 5, struct.pack("<f", -float(rank) if type_ == 1 else 0.0))]
        fields.append(Field(PIECE, 2, write(inner + ([Field(3, 0, type_)] if type_ != 1 else []))))
    trainer = [Field(3, 0, kind), Field(4, 0, len(pieces)), Field(35, 0, 1)]
    trainer += [Field(40, 0, 0), Field(41, 0, 1), Field(42, 0, 2), Field(43, 0, -1)]
    normalizer = [Field(1, 2, b"identity"), Field(3, 0, dummy_prefix), Field(4, 0, collapse), Field(5, 0, 1)]
    return write([*fields, Field(TRAINER, 2, write(trainer)), Field(NORMALIZER, 2, write(normalizer))])


def sentencepieces(data: Path | None) -> list[Seed]:
    """SentencePiece models."""
    name, config = "tokenizer.model", {"tokenizer_config.json": encoded(TOKENIZER_CONFIG)}
    chatml = ("<|im_start|>", "<|im_end|>")
    seeds = [
        Seed("bpe", name, sentencepiece(), config),
        Seed("bpe, alone", name, sentencepiece(), {}),
        Seed("bpe, ChatML pieces", name, sentencepiece(extra=chatml), config),
        Seed("bpe, no prefix", name, sentencepiece(dummy_prefix=False, collapse=True), config),
        Seed("unigram", name, sentencepiece(1), config),
    ]
    seeds.append(Seed(f"octo_demo/{name}", name, (DEMO / name).read_bytes(), config, weight=0.1))
    return seeds + [
        Seed(path, name, text, weight=0.02, real=True) for path, text in _real(data, f"tokenizers/*/{name}")
    ]


# Templates

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TEMPLATES = {
    "chatml": CHATML,
    "llama2": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\\n' ~ messages[0].content.strip()"
        " ~ '\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must "
        "alternate, not ' ~ m.role) }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' ~ (system if loop.first else '')"
        " ~ m.content|trim ~ ' [/INST]' }}{% else %}{{ ' ' ~ m['content'] ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "tools": (
        "{%- macro line(m, n=2) -%}{{ m.role|upper ~ ': ' }}{{ m.content if m.content is string else m.content|tojson "
        "}}{%- endmacro %}{%- set ns = namespace(last=messages|length - 1, found=false) -%}{# a comment #}"
        "{%- if tools %}{{ tools|tojson(indent=2) }}{%- endif -%}{%- for m in messages[::-1] %}{%- if not ns.found and "
        "m.role == 'user' %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- set ns.found = true %}{%- endif "
        "%}{%- endfor %}{%- for m in messages %}{{ line(m) }}{%- if '</think>' in m.content %}{{ m.content.split("
        "'</think>')[-1].lstrip('\\n') }}{%- endif %}{%- if loop.index0 > ns.last %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{%- endif %}{%- if loop.last or (not loop.last and messages[loop.index0 + 1].role != m."
        "role) %}{{ '\\n' }}{%- endif %}{%- endfor %}{{ strftime_now('%d %b %Y') }}"
    ),
}


def templates(data: Path | None) -> list[Seed]:
    """Chat templates, with the small SentencePiece model."""
    name = "chat_template.jinja"
    beside = {"tokenizer.model": sentencepiece(extra=("<|im_start|>", "<|im_end|>"))}
    seeds = [Seed(title, name, source.encode(), beside) for title, source in _TEMPLATES.items()]
    real = _real(data, "chat_templates/*.jinja")
    return seeds + [Seed(path, name, text, beside, weight=0.15, real=True) for path, text in real]


# Tokenizers' side files


def _token(content: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **flags, "special": special}


TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "add_prefix_space": None,
    "legacy": False, "bos_token": "<s>", "eos_token": _token("</s>"), "unk_token": "<unk>", "pad_token": None,
    "additional_special_tokens": ["<s>"], "clean_up_tokenization_spaces": False, "model_max_length": 10**30,
    "added_tokens_decoder": {"0": _token("<unk>"), "1": _token("<s>"), "2": _token("</s>")},
    "chat_template": CHATML,
}  # fmt: skip


def tokenizer_configs(data: Path | None) -> list[Seed]:
    """tokenizer_config.json, special_tokens_map.json and added_tokens.json beside vocabularies of every kind."""
    name = "tokenizer_config.json"
    model = {"tokenizer.model": sentencepiece()}
    size = 256 + 3 + len(set(_WORDS)) + 1 + 94 + 3
    added = {str(size): _token("<|im_end|>"), str(size + 1): _token("<think>", special=False)}
    decoder = {**TOKENIZER_CONFIG["added_tokens_decoder"], **added}
    beyond = {**TOKENIZER_CONFIG, "added_tokens_decoder": decoder, "legacy": True, "add_prefix_space": False}
    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": _TEMPLATES["tools"]}]
    listed = {**TOKENIZER_CONFIG, "chat_template": several, "extra_special_tokens": {"image_token": "<unk>"}}
    byte_level = {"tokenizer.json": encoded(byte_level_bpe())}
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": CHATML}
    vocab, merges = byte_level_bpe()["model"]["vocab"], "#version: 0.2\nh e\nl l\nhe ll\n"
    files = {"vocab.json": encoded(vocab), "merges.txt": merges.encode()}
    qwen: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>", "chat_template": CHATML}
    qwen["added_tokens_decoder"] = {str(len(vocab)): _token("<|end|>")}
    special = {"bos_token": _token("<s>"), "eos_token": "</s>", "additional_special_tokens": ["<unk>"]}
    seeds = [
        Seed("llama", name, encoded(TOKENIZER_CONFIG), model),
        Seed("llama, added", name, encoded(beyond), model),
        Seed("llama, templates", name, encoded(listed), model),
        Seed("byte-level", name, encoded(named), byte_level),
        Seed("qwen2", name, encoded(qwen), files),
        Seed("special_tokens_map", "special_tokens_map.json", encoded(special), model, weight=0.5),
        Seed("added_tokens", "added_tokens.json", encoded({"<|im_end|>": size, "<a>": size + 1}), model, weight=0.5),
        Seed("vocab", "vocab.json", files["vocab.json"], {**files, name: encoded(qwen)}, weight=0.3),
        Seed("merges", "merges.txt", files["merges.txt"], {**files, name: encoded(qwen)}, weight=0.3),
    ]
    demo = {"tokenizer.model": (DEMO / "tokenizer.model").read_bytes()}
    seeds.append(Seed(f"octo_demo/{name}", name, (DEMO / name).read_bytes(), demo, weight=0.05))
    return seeds + [
        Seed(path, name, text, byte_level, weight=0.2, real=True) for path, text in _real(data, f"tokenizers/*/{name}")
    ]


# tokenizer.json


def _alphabet() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def _tokenizer(model: dict[str, Any], added: list[str], **parts: Any) -> dict[str, Any]:
    size = len(model["vocab"])
    known = (
        model["vocab"] if isinstance(model["vocab"], dict) else {text: i for i, (text, _) in enumerate(model["vocab"])}
    )
    extra = [text for text in added if text not in known]
    ids = {text: known[text] if text in known else size + extra.index(text) for text in added}
    tokens = [{"id": i, **_token(text, text != "<think>")} for text, i in ids.items()]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": tokens, "model": model, **parts}


def _bpe(tokens: list[str], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    vocab = {text: i for i, text in enumerate(dict.fromkeys([*tokens, *("".join(merge) for merge in merges)]))}
    base: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    base |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {**base, **settings, "vocab": vocab, "merges": merges}


_SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level_bpe() -> dict[str, Any]:
    """A tokenizer.json of the byte-level kind (GPT-2, Llama 3, Qwen)."""
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    return _tokenizer(
        _bpe(_alphabet(), [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], ["Ġ", "w"]]),
        ["<|end|>", "<|im_start|>", "<|im_end|>", "<think>"],
        normalizer={"type": "NFC"},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, levels]},
        post_processor={**levels, "trim_offsets": False},
        decoder={**levels},
    )


def _llama_json() -> dict[str, Any]:
    letters = ["▁", *map(chr, range(0x21, 0x7F))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    post = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return _tokenizer(
        _bpe(tokens, [["h", "e"], ["l", "l"], ["▁", "w"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        ["<unk>", "<s>", "</s>"],
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        post_processor=post,
        decoder={"type": "Sequence", "decoders": steps},
    )


def _unigram_json() -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *_WORDS, "▁", *map(chr, range(0x21, 0x7F))]
    vocab = [[text, -float(i)] for i, text in enumerate(dict.fromkeys(pieces))]
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}
    return _tokenizer(model, ["<unk>", "<s>", "</s>"], pre_tokenizer=meta, decoder=meta)


def tokenizer_jsons(_data: Path | None) -> list[Seed]:
    """tokenizer.json of the kinds that models have."""
    name, config = "tokenizer.json", {"chat_template": CHATML, "tokenizer_class": "PreTrainedTokenizerFast"}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llama = {"tokenizer_config.json": encoded({**config, **ends})}
    return [
        Seed("byte-level", name, encoded(byte_level_bpe()), {"tokenizer_config.json": encoded(config)}),
        Seed("byte-level, alone", name, encoded(byte_level_bpe())),
        Seed("llama", name, encoded(_llama_json()), llama),
        Seed("unigram", name, encoded(_unigram_json()), llama),
    ]


def _pattern(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


#: Parts of tokenizer.json that the seeds lack: every other model, normaliser, splitter, decoder; regexes that explode.
PARTS: list[Any] = [
    {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
     "vocab": {"[UNK]": 0, "a": 1}},
    {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"},
    {"type": "BPE", "vocab": {"a": 0, "b": 2**31, "ab": 2**32 - 1}, "merges": [["a", "b"]]},
    {"type": "BPE", "vocab": {}, "merges": ["a b"]},
    {"type": "Unigram", "unk_id": 10**9, "vocab": [["a", 0.0]]},
    {"type": "Unigram", "unk_id": None, "vocab": [["", -1e308], ["a", 1e308]]},
    {"id": 2**31, **_token("<far>")},
    {"id": 10**7, **_token("<far>")},
    {"id": 5, **_token("")},
    {"id": 6, **_token("a", special=False), "lstrip": True, "rstrip": True, "single_word": True, "normalized": True},
    _pattern("(a+)+$"), _pattern("(a|aa)+$"), _pattern("(.*)*x"), _pattern(r"(\w+\s?)*$"), _pattern("(?=(a+))\\1*b"),
    _pattern(""), _pattern("("), _pattern("a{100000}"), _pattern("(a{1,1000}){1,1000}"), _pattern("(?:)*"),
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000},
    {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "first"},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    {"type": "Strip", "content": " ", "start": 2**40, "stop": 1}, {"type": "Fuse"}, {"type": "ByteFallback"},
    {"type": "BPEDecoder", "suffix": "</w>"}, {"type": "Whitespace"}, {"type": "BertPreTokenizer"},
    {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "MergedWithNext"},
    {"type": "CharDelimiterSplit", "delimiter": "ab"}, {"type": "UnicodeScripts"}, {"type": "FixedLength", "length": 0},
    {"type": "Lowercase"}, {"type": "Nmt"}, {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
     "lowercase": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Prepend", "prepend": "x" * 100_000},
    {"type": "ByteLevel"}, {"type": "Sequence", "pretokenizers": []}, {"type": "Sequence", "decoders": []},
    {"type": "Sequence", "normalizers": []}, {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0},
    {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0,
     "pad_token": "x"},
]  # fmt: skip
