"""Models of the transformers library on an OctoCache: against transformers' own caches, and against the codec.

Cases of the device ``cuda`` run where there is a GPU: there pages are in another layout, and kernels read them.
"""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.errors import OctoError, UsageError
from octo_run.kernels.codec import parse_kv

transformers = pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 is not installed")

from octo_run.integrations import octo_attention  # noqa: E402
from octo_run.integrations import transformers as cache_module  # noqa: E402
from octo_run.integrations.stored_states import StoredStates  # noqa: E402
from octo_run.integrations.transformers import OctoCache  # noqa: E402

Decoder = Callable[..., Any]
ATTENTIONS = ["octo", "sdpa", "eager"]


@pytest.fixture(autouse=True)
def _every_warning_anew() -> Iterator[None]:
    octo_attention._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the kernels do it, unless a test says otherwise
        yield
    octo_attention._warned.clear()


def ids(rows: int, count: int, seed: int = 1, device: str = "cpu") -> Tensor:
    return torch.randint(3, 300, (rows, count), generator=torch.Generator().manual_seed(seed)).to(device)


def generate(model: Any, prompt: Tensor, cache: Any, new: int = 80, **options: Any) -> list[list[int]]:
    options = {"do_sample": False} | options
    answer: list[list[int]] = model.generate(prompt, max_new_tokens=new, cache=cache, **options).tolist()
    return answer


@torch.no_grad()
def logits(model: Any, cache: Any, parts: list[Tensor], **options: Any) -> Tensor:
    """Those of all parts, fed one after the other."""
    return torch.cat([model(part, cache=cache, **options).logits.double().cpu() for part in parts], 1)


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def near(device: str) -> float:
    """A bound on differences of float32 logits that are the same but for the order of sums."""
    return 1e-5 if device == "cpu" else 1e-4


def parts_of(prompt: Tensor) -> list[Tensor]:
    """A prompt in parts that end at, before and behind edges of pages, and single tokens across one."""
    sizes = [63 + 64 + 64, 1, 1, 64, 63, 2]
    sizes += [1] * (prompt.shape[1] - sum(sizes))
    return list(prompt.split(sizes, 1))


class CodecCache(transformers.DynamicCache):  # type: ignore[misc]
    """Transformers' own cache in which what is old is replaced by what the codec makes of it: the reference."""

    def __init__(self, config: Any, kv: str, sinks: int, window: int) -> None:
        super().__init__(config=config)
        self.kv, self.sinks, self.window = kv, sinks, window
        self.coded = [0] * len(self.layers)

    def code(self, index: int) -> None:
        layer, done = self.layers[index], self.sinks + 64 * self.coded[index]
        fmt = parse_kv(self.kv, layer.keys.shape[3], plain_dtype=layer.keys.dtype)
        for name, codec in (("keys", fmt.k), ("values", fmt.v)):
            states = getattr(layer, name).clone()
            page = states[:, :, done : done + 64]
            states[:, :, done : done + 64] = codec.decode(codec.encode(page.cpu())).to(page)
            setattr(layer, name, states)
        self.coded[index] += 1

    def tail(self, index: int) -> int:
        return int(self.get_seq_length(index)) - self.sinks - 64 * self.coded[index]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        one = key_states.shape[2] == 1
        if one and self.tail(layer_idx) == self.window + 64:
            self.code(layer_idx)
        seen = super().update(key_states, value_states, layer_idx)
        while not one and self.tail(layer_idx) >= self.window + 64:
            self.code(layer_idx)
        return seen


@pytest.mark.few("cpu-{}-octo")
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=str)
def test_uncompressed_pages_answer_as_a_dynamic_cache(
    decoder: Decoder, device: str, attention: str, options: dict[str, Any]
) -> None:
    model, prompt = decoder("Llama", device), ids(2, 190, device=device)
    torch.manual_seed(5)
    want = generate(model, prompt, transformers.DynamicCache(config=model.config), **options)
    model.set_attn_implementation(attention)
    torch.manual_seed(5)
    assert generate(model, prompt, OctoCache(model.config, kv="bf16"), **options) == want


@pytest.mark.few("cpu-oct3-octo")
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kv", ["oct4", "oct3", "oct2:oct3", "octopus3", "bf16"])
def test_logits_are_those_of_what_the_codec_gives_back(decoder: Decoder, device: str, attention: str, kv: str) -> None:
    model, parts = decoder("Llama", device), parts_of(ids(2, 370, device=device))
    want = logits(model, CodecCache(model.config, kv, 64, 64), parts)
    exact = logits(model, transformers.DynamicCache(config=model.config), parts)
    model.set_attn_implementation(attention)
    cache = OctoCache(model.config, kv=kv)
    got = logits(model, cache, parts)
    bound = near(device) if kv == "bf16" else 2e-3 if device == "cpu" else 1e-2  # a code may differ at a tie
    assert difference(got, want) < bound
    first = slice(0, parts[0].shape[1])
    assert difference(got[:, first], exact[:, first]) < near(device), "a prompt sees itself in full precision"
    assert (difference(got, exact) < near(device)) == (kv == "bf16"), "older tokens are coded"
    assert cache.layers[0]._store.packed == 3 and cache.get_seq_length() == 370


@pytest.mark.few("cpu-dtype0-80")
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_our_attention_equals_that_over_decoded_pages(
    decoder: Decoder, device: str, dim: int, dtype: torch.dtype
) -> None:
    model = decoder("Llama", device, dtype, head_dim=dim)
    parts = parts_of(ids(2, 370, device=device))
    want = logits(model, OctoCache(model.config, kv="oct3"), parts)
    model.set_attn_implementation("octo")
    got = logits(model, OctoCache(model.config, kv="oct3"), parts)
    exact = dtype == torch.float32 and device == "cpu"
    assert difference(got, want) < (1e-3 if exact else 3e-2)


@pytest.mark.few("cpu-5-64")
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (5, 64), (64, 128)])
def test_sinks_and_window_are_exact(decoder: Decoder, device: str, sinks: int, window: int) -> None:
    """A wrong count of them would be seen in the keys; in the rotated basis they are rounded once."""
    model, prompt = decoder("Llama", device), ids(2, 400, device=device)
    cache, want = OctoCache(model.config, kv="oct2", sinks=sinks, window=window), transformers.DynamicCache()
    logits(model, want, [prompt])
    logits(model, cache, [prompt])
    off = (cache.layers[0].keys - want.layers[0].keys).norm(dim=-1) / want.layers[0].keys.norm(dim=-1)
    coded = (off > 1e-4).all(1).all(0).nonzero().flatten().tolist()
    pages = (400 - sinks - window) // 64
    assert coded == list(range(sinks, sinks + 64 * pages))


def test_padding_on_the_left_is_masked(decoder: Decoder, device: str) -> None:
    """And is said to be slow. Texts alone answer as they do beside a longer one."""
    model, prompt = decoder("Llama", device), ids(2, 190, device=device)
    mask = torch.ones_like(prompt)
    mask[0, :70] = 0
    prompt[0, :70] = 0
    model.set_attn_implementation("octo")
    with pytest.warns(UserWarning, match="decodes the pages .*padding on the left"):
        got = generate(model, prompt, OctoCache(model.config, kv="bf16"), attention_mask=mask)
    alone = [
        generate(model, prompt[:1, 70:], OctoCache(model.config, kv="bf16"))[0],
        generate(model, prompt[1:], OctoCache(model.config, kv="bf16"))[0],
    ]
    assert got[0][70:] == alone[0] and got[1] == alone[1]


def test_a_mask_of_a_chunk_knows_its_padding(decoder: Decoder) -> None:
    """Also where the mask is too short: what it does not name is padding to transformers."""
    model = decoder("Llama")
    parts = [ids(1, 200), ids(1, 5, seed=2)]
    for width, lowest in ((205, 1), (205, 0), (150, 1)):
        mask = torch.ones(1, width, dtype=torch.long)
        mask[0, 0] = lowest
        results = []
        for attention in ("sdpa", "octo"):
            model.set_attn_implementation(attention)
            cache = OctoCache(model.config, kv="bf16", window=0)
            logits(model, cache, parts[:1])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                results.append(logits(model, cache, parts[1:], attention_mask=mask))
        assert difference(results[1], results[0]) < 1e-5


@pytest.mark.few("cpu-False-GptOss")
@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "GptOss"])
@pytest.mark.parametrize("padded", [False, True])
def test_what_the_kernels_cannot_do_is_done_over_decoded_pages(
    decoder: Decoder, device: str, family: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sliding windows; soft caps; a logit of each head that takes its share: as the models themselves do it."""
    monkeypatch.setattr(cache_module, "SHORT_WINDOW", 0)
    extra = {"Gemma2": {"query_pre_attn_scalar": 64}, "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1}}
    model = decoder(family, device, sliding_window=100, **extra.get(family, {}))
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    prompt = ids(2, 190, device=device)
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :30] = 0
    model.set_attn_implementation("eager")
    want = generate(model, prompt, transformers.DynamicCache(config=model.config), attention_mask=mask)
    model.set_attn_implementation("octo")
    cache = OctoCache(model.config, kv="bf16")
    with pytest.warns(UserWarning, match="decodes the pages of the cache for every call"):
        assert generate(model, prompt, cache, attention_mask=mask) == want
    coded = OctoCache(model.config, kv="oct3")
    generate(model, prompt, coded, attention_mask=mask)
    assert coded.nbytes < cache.nbytes
    lengths = [layer._store.length for layer in coded.layers if layer.is_sliding]
    assert lengths and all(99 <= length < 100 + 64 + 64 for length in lengths), "pages out of sight are let go of"


@pytest.mark.parametrize(("window", "kv"), [(256, "bf16"), (257, "oct3")])
def test_a_short_window_has_no_codes(decoder: Decoder, window: int, kv: str) -> None:
    """What it stores is what a cache of bf16 stores, bit for bit."""
    model = decoder("Gemma2", sliding_window=window, query_pre_attn_scalar=64)
    model.set_attn_implementation("eager")
    caches = [OctoCache(model.config, kv=name) for name in ("oct3", "bf16")]
    for cache in caches:
        with torch.no_grad():
            for first in (0, 250):
                model(ids(1, 500)[:, first : first + 250], past_key_values=cache)
    of_oct3, of_bf16 = (cache.layers for cache in caches)
    assert [layer.kv for layer in of_oct3 if layer.is_sliding] == [kv] * sum(one.is_sliding for one in of_oct3)
    assert {layer.kv for layer in of_oct3 if not layer.is_sliding} == {"oct3"}
    assert of_oct3[0].is_sliding and caches[0].nbytes < caches[1].nbytes
    for side in ("keys", "values"):
        one, two = (getattr(layers[0], side) + 0 for layers in (of_oct3, of_bf16))
        assert torch.equal(one, two) == (kv == "bf16")


def test_a_sliding_window_that_is_not_full_is_read_from_pages(decoder: Decoder) -> None:
    model = decoder("Mistral", sliding_window=500)
    prompt = ids(1, 290)
    want = generate(model, prompt, transformers.DynamicCache(config=model.config))
    model.set_attn_implementation("octo")
    assert generate(model, prompt, OctoCache(model.config, kv="bf16")) == want  # without a warning


@pytest.mark.few("cpu-Llama-octo")
@pytest.mark.parametrize("attention", ["octo", "sdpa"])
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_assisted_decoding_takes_tokens_back(decoder: Decoder, device: str, attention: str, family: str) -> None:
    model = decoder(family, device, **({"sliding_window": 100} if family == "Mistral" else {}))
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    prompt = ids(1, 190, device=device)
    want = generate(model, prompt, None)
    model.set_attn_implementation(attention)
    if family == "Mistral":
        warnings.simplefilter("ignore", UserWarning)
    assert generate(model, prompt, OctoCache(model.config, kv="bf16"), assistant_model=draft) == want


def test_crop_goes_back_into_a_page(decoder: Decoder, device: str) -> None:
    model, prompt = decoder("Llama", device), ids(2, 330, device=device)
    model.set_attn_implementation("octo")
    for kv, bound in (("bf16", near(device)), ("oct4", 0.2)):
        cut, straight = OctoCache(model.config, kv=kv), OctoCache(model.config, kv=kv)
        logits(model, cut, [prompt, ids(2, 9, seed=3, device=device)])
        cut.crop(-9 - 330 + 170)
        assert cut.get_seq_length() == 170 and cut.layers[1]._store.packed == 1
        logits(model, straight, [prompt[:, :170]])
        after = [ids(2, 4, seed=4, device=device)]
        assert difference(logits(model, cut, after), logits(model, straight, after)) < bound
        with pytest.raises(ValueError, match="give a negative number"):
            cut.crop(5)
        cut.crop(-1000)
        assert cut.get_seq_length() == 0
        assert difference(logits(model, cut, after), logits(model, None, after)) < near(device)


def test_a_sliding_layer_says_when_it_cannot_go_back(decoder: Decoder) -> None:
    model = decoder("Mistral", sliding_window=100)
    cache = OctoCache(model.config)
    warnings.simplefilter("ignore", UserWarning)
    logits(model, cache, [ids(1, 400), ids(1, 1), ids(1, 1)])
    with pytest.raises(OctoError, match="300 tokens cannot be removed from a layer with a sliding window of 100"):
        cache.crop(-300)


def whisper() -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=200, d_model=128, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=150,
        max_target_positions=448, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, begin_suppress_tokens=None, suppress_tokens=None, init_std=0.3,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def musicgen() -> Any:
    torch.manual_seed(0)
    decoder = transformers.MusicgenDecoderConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, num_codebooks=2,
        max_position_embeddings=600, pad_token_id=64, bos_token_id=64, initializer_factor=0.3,
    )  # fmt: skip
    text = transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    audio = transformers.EncodecConfig(
        target_bandwidths=[1.5], num_filters=2, num_residual_layers=1, upsampling_ratios=[2, 2], hidden_size=8,
        codebook_size=64, codebook_dim=8, sampling_rate=100,
    )  # fmt: skip
    config = transformers.MusicgenConfig(
        text_encoder=text.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder.to_dict()
    )
    return transformers.MusicgenForConditionalGeneration(config).eval()


def reference(config: Any, kv: str) -> Any:
    """What ``both(config, kv)`` is to hold."""
    return transformers.EncoderDecoderCache(CodecCache(config, kv, 16, 0), CodecCache(config, kv, 0, 0))


def both(config: Any, kv: str, cross: str | None = None) -> Any:
    """Self-attention, and cross-attention in the same format or as ``cross`` says."""
    second = OctoCache(config, kv=kv, sinks=0, window=0) if cross is None else transformers.DynamicCache()
    return transformers.EncoderDecoderCache(OctoCache(config, kv=kv, sinks=16, window=0), second)


@pytest.mark.few("cpu-1-octo")
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("beams", [1, 3])
def test_whisper(device: str, attention: str, beams: int) -> None:
    model = whisper().to(device)
    features, start = torch.randn(2, 8, 300, device=device), torch.randint(4, 200, (2, 5), device=device)
    options = {"decoder_input_ids": start, "do_sample": False, "max_new_tokens": 100, "num_beams": beams}
    want = model.generate(features, **options)
    assert len(set(want.flatten().tolist())) > 20, "the model says something"
    model.set_attn_implementation(attention)
    for cross in (None, "exact"):
        got = model.generate(features, cache=both(model.config, "bf16", cross), **options)
        assert torch.equal(got, want)
    cache = both(model.config, "oct4")
    model.generate(features, cache=cache, **options)
    assert cache.self_attention_cache.get_seq_length() >= 100
    assert cache.cross_attention_cache.get_seq_length() == 150
    packed = [held.layers[1]._store.packed for held in (cache.self_attention_cache, cache.cross_attention_cache)]
    assert packed == [1, 2]


@pytest.mark.slow
@torch.no_grad()
def test_whisper_s_logits(device: str) -> None:
    """Its decoder step by step: a start of several tokens sees all of what was heard, from pages too."""
    model = whisper().to(device)
    heard = model.model.encoder(torch.randn(2, 8, 300, device=device)).last_hidden_state
    tokens = torch.randint(4, 200, (2, 300), device=device)
    results: dict[str, Tensor] = {}
    warnings.filterwarnings("ignore", message=".*several queries that see later keys")  # the part of 240
    for name, attention in (("exact", "sdpa"), ("oct4 reference", "sdpa"), ("bf16", "octo"), ("oct4", "octo"),
                            ("oct4", "sdpa")):  # fmt: skip
        model.set_attn_implementation(attention)
        cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        if name != "exact":
            cache = reference(model.config, "oct4") if "reference" in name else both(model.config, name)
        options = {"encoder_hidden_states": heard, "cache": cache, "use_cache": True}
        parts = tokens.split([4, 1, 3, 240, *[1] * 52], 1)
        steps = [model.model.decoder(part, **options).last_hidden_state for part in parts]
        results[f"{name} {attention}"] = torch.cat(steps, 1).double().cpu()
    exact = results["exact sdpa"]
    assert difference(results["bf16 octo"], exact) < near(device)
    assert difference(results["oct4 octo"], exact) > 1e-2
    bound = 2e-3 if device == "cpu" else 1e-2  # a code may differ at a tie
    for attention in ("octo", "sdpa"):
        assert difference(results[f"oct4 {attention}"], results["oct4 reference sdpa"]) < bound


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_musicgen(device: str, attention: str) -> None:
    model, prompt = musicgen().to(device), torch.randint(2, 50, (2, 7)).to(device)
    options = {"do_sample": True, "max_new_tokens": 160, "guidance_scale": 3.0}
    torch.manual_seed(3)
    want = model.generate(prompt, **options)
    model.set_attn_implementation({"decoder": attention, "text_encoder": "eager", "audio_encoder": "eager"})
    for cross in (None, "exact"):
        torch.manual_seed(3)
        got = model.generate(prompt, cache=both(model.config, "bf16", cross), **options)
        assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
    codes = torch.randint(0, 60, (4, 300), device=device)  # two texts of two codebooks
    results = []
    for cache in (transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache()),
                  both(model.config, "bf16"), both(model.config, "oct4"), reference(model.config, "oct4")):  # fmt: skip
        text = {"encoder_hidden_states": torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1)).to(device)}
        steps = codes.split([200, *[1] * 100], 1)
        results.append(torch.cat([model.decoder(part, cache=cache, **text).logits for part in steps], 1).double().cpu())
    assert difference(results[1], results[0]) < near(device)
    assert difference(results[2], results[0]) > 1e-2
    assert difference(results[2], results[3]) < (2e-3 if device == "cpu" else 1e-2)


@pytest.mark.parametrize("build", [whisper, musicgen])
def test_half_a_cache_is_refused(build: Callable[[], Any]) -> None:
    """Whisper would put two caches in full precision in its place, MusicGen would mix two: neither says a word."""
    model = build()
    given = torch.randn(1, 8, 300) if build is whisper else torch.randint(2, 50, (1, 7))
    with pytest.raises(UsageError, match=r"two caches: give it EncoderDecoderCache\(OctoCache"):
        model.generate(given, cache=OctoCache(model.config), max_new_tokens=3)


def test_bytes(decoder: Decoder, device: str) -> None:
    model, prompt = decoder("Llama", device), ids(2, 1500, device=device)
    caches = {kv: OctoCache(model.config, kv=kv) for kv in ("oct2", "oct3", "oct4", "bf16")}
    assert all(cache.nbytes == 0 for cache in caches.values())
    model.set_attn_implementation("octo")
    for cache in caches.values():
        logits(model, cache, [prompt, prompt[:, :1]])
    dense = 2 * 2 * 2 * 2 * 1501 * 64 * 4  # layers, sides, texts, KV heads
    held = {kv: sum(layer.nbytes for layer in cache.layers) / dense for kv, cache in caches.items()}
    assert held["oct2"] < held["oct3"] < held["oct4"] < 0.35 and 1 <= held["bf16"] < 1.1
    workspace = caches["oct3"].scratch.nbytes
    assert caches["oct3"].nbytes == sum(layer.nbytes for layer in caches["oct3"].layers) + workspace
    assert workspace > 4096 if device == "cuda" else workspace < 4096
    text = repr(caches["oct3"])
    assert text == f"OctoCache(oct3, 2 layers, 1,501 tokens, {caches['oct3'].nbytes:,} bytes)"
    store = caches["oct3"].layers[0]._store
    tensors = (store.arena.pages, store.arena.page_table, *store.arena.full_precision)
    assert caches["oct3"].layers[0].nbytes >= sum(x.numel() * x.element_size() for x in tensors)
    caches["oct3"].reset()
    assert caches["oct3"].get_seq_length() == 0 and caches["oct3"].nbytes == workspace
    again = logits(model, caches["oct3"], [prompt[:, :300], prompt[:, :1]])
    fresh = logits(model, OctoCache(model.config), [prompt[:, :300], prompt[:, :1]])
    assert difference(again, fresh) < near(device)


def test_a_copy_goes_its_own_way(decoder: Decoder, device: str) -> None:
    """As for a prompt that many answers begin with."""
    model, prompt = decoder("Llama", device), ids(1, 290, device=device)
    model.set_attn_implementation("octo")
    cache = OctoCache(model.config)
    logits(model, cache, [prompt])
    answers = [logits(model, copy.deepcopy(cache), [ids(1, 70, seed, device)]) for seed in (7, 8, 7)]
    assert difference(answers[0], answers[2]) < near(device) and difference(answers[0], answers[1]) > 0.1
    assert cache.get_seq_length() == 290
    assert copy.deepcopy(cache).layers[0]._store.fmt is cache.layers[0]._store.fmt


def test_texts_are_repeated_and_selected(decoder: Decoder, device: str) -> None:
    model, prompt = decoder("Llama", device), ids(2, 290, device=device)
    model.set_attn_implementation("octo")
    cache, rows = OctoCache(model.config), [0, 0, 1, 1]
    logits(model, cache, [prompt])
    cache.batch_repeat_interleave(2)
    more = ids(4, 1, seed=5, device=device)
    got = logits(model, cache, [more])
    single = OctoCache(model.config)
    assert difference(got, logits(model, single, [prompt[rows], more])[:, 290:]) < near(device)
    cache.batch_select_indices(torch.tensor([3, 0]))
    kept = logits(model, cache, [more[[3, 0]]])
    assert difference(kept, logits(model, single, [more])[[3, 0]]) < near(device)


def test_weights_of_attention_can_be_had(decoder: Decoder) -> None:
    model, prompt = decoder("Llama"), ids(1, 290)
    model.set_attn_implementation("octo")
    cache = OctoCache(model.config)
    logits(model, cache, [prompt])
    with torch.no_grad(), pytest.warns(UserWarning, match="output_attentions"):
        weights = model(ids(1, 3), cache=cache, output_attentions=True).attentions
    assert [tuple(weight.shape) for weight in weights] == [(1, 4, 3, 293)] * 2
    assert torch.allclose(weights[0].sum(-1), torch.ones(1, 4, 3))


@pytest.mark.slow
def test_attention_without_our_cache_is_that_of_transformers(decoder: Decoder) -> None:
    model, prompt = decoder("Llama"), ids(2, 100)
    want = generate(model, prompt, None)
    model.set_attn_implementation("octo")
    assert generate(model, prompt, None) == want
    parts = [prompt, ids(2, 7), ids(2, 1)]
    got = logits(model, transformers.DynamicCache(config=model.config), parts)
    assert difference(got, logits(model, None, [torch.cat(parts, 1)])) < 1e-5
    static = transformers.StaticCache(config=model.config, max_cache_len=300)
    assert generate(model, prompt, static) == want


def test_modes_of_autograd(decoder: Decoder) -> None:
    """Inference mode and no_grad may alternate; gradients are refused."""
    model, prompt = decoder("Llama"), ids(1, 130)
    model.set_attn_implementation("octo")
    cache = OctoCache(model.config)
    with pytest.raises(OctoError, match=r"no gradients: call the model within torch\.no_grad\(\)"):
        model(prompt, cache=cache)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.inference_mode(), torch.no_grad()):
        with mode:
            model(prompt, cache=cache)
            model(prompt[:, :1], cache=cache)
            cache.reorder_cache(torch.tensor([0]))
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([1]))
            cache.crop(-70)
    assert cache.get_seq_length() == 4 * (131 - 70)


def test_states_are_tensors_to_others(decoder: Decoder) -> None:
    model = decoder("Llama")
    cache = OctoCache(model.config, kv="oct4")
    assert cache.layers[0].keys is None
    logits(model, cache, [ids(2, 300)])
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert isinstance(keys, StoredStates) and keys.shape == (2, 2, 300, 64) and keys.view_of is values.view_of
    assert repr(keys) == "StoredStates(K, (2, 2, 300, 64), torch.float32, cpu)"
    scores = keys @ values.transpose(2, 3)
    assert type(scores) is Tensor and torch.equal(scores, keys.dense() @ values.dense().transpose(2, 3))
    assert torch.cat((keys, keys), 2).shape == (2, 2, 600, 64) and keys.repeat_interleave(2, 1).shape == (2, 4, 300, 64)


def test_states_have_the_strides_that_they_say(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values come as views of a projection; of a sliding window's a part is returned."""
    monkeypatch.setattr(cache_module, "SHORT_WINDOW", 0)
    for family, settings in (("Llama", {}), ("Mistral", {"sliding_window": 100})):
        layer = OctoCache(decoder(family, **settings).config, kv="bf16").layers[0]
        for count in (300, 7, 1):
            new = torch.randn(2, count, 2, 64)
            for states in layer.update(new.transpose(1, 2), new.transpose(1, 2)):
                assert states.is_contiguous()
                flat = states.view(4, -1, 64)
                assert torch.equal(flat[:, -count:], new.transpose(1, 2).reshape(4, count, 64)), (family, count)


def test_pages_are_not_offloaded(decoder: Decoder) -> None:
    cache = OctoCache(decoder("Llama").config)
    for owner, place in ((cache, (0,)), (cache.layers[0], ())):
        for name in ("offload", "prefetch"):
            with pytest.raises(OctoError, match="does not offload pages: use it without offloading"):
                getattr(owner, name)(*place)


def test_formats_may_be_in_capital_letters(decoder: Decoder) -> None:
    assert OctoCache(decoder("Llama").config, kv=" Oct4:OCT2 ").kv == "oct4:oct2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv": "auto:56"}, "'auto:56', and OctoCache does not measure which layers .* give one format, oct3 say, or"),
        ({"kv": "oct9"}, "unknown KV format 'oct9': did you mean oct4, of oct2, oct3"),
        ({"kv": 3}, "The KV format is 3"),
        ({"sinks": -1}, "number of sink tokens is -1"),
        ({"window": 100}, "give a multiple of 64"),
        ({"window": 1.5}, "The window is 1.5"),
    ],
)
def test_wrong_settings(decoder: Decoder, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OctoCache(decoder("Llama").config, **settings)


def test_what_is_no_configuration() -> None:
    with pytest.raises(UsageError, match="The model's configuration is 'oct3'"):
        OctoCache("oct3")


def test_heads_that_no_codec_takes(decoder: Decoder) -> None:
    model = decoder("Llama", head_dim=48)
    with pytest.raises(UsageError, match=r"heads of 48 numbers in oct3, only of 64, 80, .*, 256 or 512: give kv="):
        generate(model, ids(1, 5), OctoCache(model.config))
    want = generate(model, ids(1, 150), None)
    model.set_attn_implementation("octo")
    assert generate(model, ids(1, 150), OctoCache(model.config, kv="bf16")) == want


def test_another_batch_is_refused(decoder: Decoder) -> None:
    model = decoder("Llama")
    cache = OctoCache(model.config)
    logits(model, cache, [ids(2, 5)])
    with pytest.raises(OctoError, match="give every batch a cache of its own"):
        logits(model, cache, [ids(3, 5)])


def test_numbers_that_overflowed_are_named(decoder: Decoder) -> None:
    model = decoder("Llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.fill_(torch.inf)
    with pytest.raises(OctoError, match="keys or values are not finite in float32"):
        logits(model, OctoCache(model.config), [ids(1, 300)])


def test_layers_of_an_unknown_kind() -> None:
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    assert [type(layer).__name__ for layer in OctoCache(config).layers] == ["LinearAttentionLayer"] * 3 + ["OctoLayer"]
    assert "1 of 4 layers" in repr(OctoCache(config))
    config.layer_types = ["linear_attention"] * 4
    with pytest.raises(OctoError, match="no layer whose keys and values OctoCache could store"):
        OctoCache(config)


@pytest.mark.slow
def test_octo_run_does_not_import_transformers() -> None:
    code = "import sys, octo_run, octo_run.engine, octo_run.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_a_missing_library_is_named() -> None:
    code = "import sys; sys.modules['transformers'] = None; import octo_run.integrations.transformers"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: octo_run.integrations.transformers needs transformers 5.24 or newer: pip install" in run.stderr
