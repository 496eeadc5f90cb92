"""Architectures that are not built: what they have, and the nearest that works. Nothing here imports torch."""

import re
from fnmatch import fnmatchcase

_MLA, _MAMBA, _RECURRENT = "multi-head latent attention (MLA)", "Mamba layers", "recurrent layers of another kind"
_ROUTING, _ENCODER, _OLDER = "experts with a routing of their own", "an encoder", "LayerNorms with a bias"
_PARTS = "parts beside its text that octo-run does not know"

#: What is not built: whole names of models, what these have, and the nearest that works. A ``*`` in a name stands for
#: anything, ``[..]`` for one of some letters. The first line that names a model counts.
UNBUILT: tuple[tuple[str, str, str], ...] = (
    ("DeepseekV[234]* LongcatFlash*", _MLA, "a DeepSeek-R1 distillation into Qwen or Llama"),
    ("Glm4MoeLite* GlmMoeDsa*", _MLA, "Glm4ForCausalLM"),
    ("MiniCPM3 Kimi* Youtu* AXK* BailingHybrid* Mistral4*", _MLA, "Qwen3ForCausalLM"),
    ("Glm4Moe Glm4vMoe* SolarOpen", _ROUTING, "Glm4ForCausalLM"),
    ("Ernie4_5_Moe Ernie4_5_VL*Moe*", _ROUTING, "Ernie4_5ForCausalLM"),
    ("ExaoneMoe", _ROUTING, "Exaone4ForCausalLM"),
    ("Cohere2Moe", _ROUTING, "Cohere2ForCausalLM"),
    ("Phimoe", _ROUTING, "Phi3ForCausalLM"),
    ("Dots1 Afmoe MiniMaxM2 MiMoV2* HYV3 Laguna", _ROUTING, "Qwen3MoeForCausalLM"),
    ("HunYuan*Dense* HunYuan*MoE*", "norms of queries and keys behind RoPE", "Qwen3ForCausalLM"),
    ("NemotronH* FalconH1 FalconMamba Mamba* Jamba Zamba*", _MAMBA, "LlamaForCausalLM"),
    ("Bamba", _MAMBA, "GraniteForCausalLM"),
    ("Qwen3VLMoe*", "experts whose matrices lie the other way round", "Qwen3MoeForCausalLM"),
    ("GraniteMoeShared", "a shared expert without a gate", "GraniteMoeForCausalLM"),
    ("FlexOlmo", "experts in layers whose norms come after attention and MLP", "OlmoeForCausalLM"),
    ("Lfm2*", "short convolutions", "Qwen3ForCausalLM"),
    ("OlmoHybrid", _RECURRENT, "Olmo3ForCausalLM"),
    ("RecurrentGemma", _RECURRENT, "Gemma3ForCausalLM"),
    ("Rwkv* xLSTM MiniMax MiniMaxText01", _RECURRENT, "Qwen3NextForCausalLM"),
    ("Gemma4Assistant", "only drafts of another model's tokens", "Gemma4ForCausalLM"),
    ("Gemma4UnifiedAssistant", "only drafts of another model's tokens", "Gemma4UnifiedForCausalLM"),
    ("Gemma3n*", "per-layer embeddings of another kind and alternating streams", "Gemma4ForCausalLM"),
    ("Llama4*", "chunked attention and experts of their own", "LlamaForCausalLM"),
    ("Mllama*", "cross-attention to images", "LlamaForCausalLM"),
    ("DiffLlama", "attention that subtracts two softmaxes", "LlamaForCausalLM"),
    ("BitNet", "ternary weights and norms between them", "LlamaForCausalLM"),
    ("Apertus* Arcee", "an MLP without a gate", "LlamaForCausalLM"),
    ("Olmo", "norms without weights", "Olmo2ForCausalLM"),
    ("Exaone", "tensors of other names", "Exaone4ForCausalLM"),
    ("InternLM2", "q, k and v fused head by head", "InternLM3ForCausalLM"),
    ("PaliGemma*", "prompts whose tokens see each other", "Gemma3ForConditionalGeneration"),
    ("InternVLChat", _PARTS, "InternVLForConditionalGeneration, as the checkpoints whose names end with -hf have it"),
    ("DeepseekVL* Janus* VideoLlava VipLlava LlavaNextVideo LlavaLlama* LlavaMistral* LlavaQwen*", _PARTS,
     "LlavaForConditionalGeneration"),
    ("Qwen2_5Omni*", _PARTS, "Qwen2_5_VLForConditionalGeneration"),
    ("Qwen3OmniMoe*", _PARTS, "Qwen3MoeForCausalLM"),
    ("Glm4v* Glm46V* GlmOcr*", _PARTS, "Glm4ForCausalLM"),
    ("Phi3V Phi4MM Phi4Multimodal", _PARTS, "Phi3ForCausalLM"),
    ("Idefics Idefics2", _PARTS, "Idefics3ForConditionalGeneration"),
    ("AyaVision Cohere2Vision", _PARTS, "Cohere2ForCausalLM"),
    ("MiniCPMV* MiniCPMO Ovis* Molmo* GotOcr2 LightOnOcr", _PARTS, "Qwen3VLForConditionalGeneration"),
    ("VoxtralRealtime GraniteSpeech* AudioFlamingo3 Qwen3ASR", _PARTS, "VoxtralForConditionalGeneration"),
    ("Phi", _OLDER, "Phi3ForCausalLM"),
    ("Starcoder2 CodeGen GPTBigCode", _OLDER, "Qwen2ForCausalLM"),
    ("Bloom Mpt", "positions by ALiBi", "LlamaForCausalLM"),
    ("GPT2 GPTNeo* GPTJ OPT Falcon StableLm* Nemotron XGLM BioGpt Persimmon OpenAIGPT", _OLDER, "LlamaForCausalLM"),
    ("ModernBertDecoder", "a head with a layer of its own", "Gemma3ForCausalLM"),
    ("*T5*", _ENCODER, "Gemma3ForCausalLM"),
    ("*Bart *Bert* Electra *Pegasus* Marian Blenderbot* ProphetNet Whisper* TrOCR BigBird RoFormer", _ENCODER,
     "LlamaForCausalLM"),
)  # fmt: skip
# What stands behind a model's name in an architecture's.
_PURPOSE = re.compile(r"(For[A-Z]\w*|Model|LMHeadModel|WithLMHead\w*|ModelWithLMHead)$")


def refusal(name: str) -> str:
    """What to say of an architecture, or of a ``model_type``, that is not built: it ends a sentence."""
    bare = _plain(_PURPOSE.sub("", name))
    for words, what, nearest in UNBUILT:
        if any(fnmatchcase(bare, _plain(word)) for word in words.split()):
            return f", which has {what}, and octo-run does not compute that: the nearest that it runs is {nearest}"
    return ", which octo-run does not know: docs/families.md lists the families that it runs"


def _plain(name: str) -> str:
    """The same for ``DeepseekV3`` and ``deepseek_v3``."""
    return re.sub("[_-]", "", name).lower()
