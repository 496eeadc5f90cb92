"""Architectures that are not built: what they have, and the nearest that works. Nothing here imports torch."""

import re
from fnmatch import fnmatchcase

from octo_run.models.families import FAMILIES
from octo_run.models.text_parts import WRAPPERS

_MLA, _MAMBA, _RECURRENT = "multi-head latent attention (MLA)", "Mamba layers", "recurrent layers of another kind"
_ROUTING, _ENCODER, _OLDER = "experts with a routing of their own", "an encoder", "LayerNorms with a bias"
_PARTS = "parts beside its text that octo-run does not know"
_SPARSE, _SIZES = "attention to tokens that an index chooses", "layers of several sizes"
_DIFFUSION, _DRAFTS = "tokens that are not drawn one after the other", "only drafts of another model's tokens"
_HEADLESS = "no head that gives the next token"

#: What is not built: whole names of models, what these have, and the nearest that works. A ``*`` in a name stands for
#: anything, ``[..]`` for one of some letters. The first line that names a model counts.
UNBUILT: tuple[tuple[str, str, str], ...] = (
    ("*Eagle* *Medusa* *DFlash*", _DRAFTS, "LlamaForCausalLM"),
    ("DeepseekV[234]* LongcatFlash*", _MLA, "a DeepSeek-R1 distillation into Qwen or Llama"),
    ("Glm4MoeLite* GlmMoeDsa*", _MLA, "Glm4ForCausalLM"),
    ("MiniCPM3 Kimi* Youtu* AXK* BailingHybrid*", _MLA, "Qwen3ForCausalLM"),
    ("Mistral4* MistralLarge3*", _MLA, "Ministral3ForCausalLM"),
    ("MistralLarge4*", _SPARSE, "Ministral3ForCausalLM"),
    ("Glm5Next*", _SPARSE, "Glm4ForCausalLM"),
    ("Qwen4Exp*", _SPARSE, "Qwen3_5MoeForCausalLM"),
    ("HYV4* Dots3Note* MiniMaxM3*", _SPARSE, "Qwen3MoeForCausalLM"),
    ("Glm4Moe Glm4vMoe* SolarOpen", _ROUTING, "Glm4ForCausalLM"),
    ("Ernie4_5_Moe Ernie4_5_VL*Moe*", _ROUTING, "Ernie4_5ForCausalLM"),
    ("ExaoneMoe", _ROUTING, "Exaone4ForCausalLM"),
    ("Cohere2Moe", _ROUTING, "Cohere2ForCausalLM"),
    ("Phimoe", _ROUTING, "Phi3ForCausalLM"),
    ("Dots1 Afmoe MiniMaxM2 MiMoV2* HYV3 Laguna BailingMoe* Step3*", _ROUTING, "Qwen3MoeForCausalLM"),
    ("HunYuan*Dense* HunYuan*MoE*", "norms of queries and keys behind RoPE", "Qwen3ForCausalLM"),
    ("NemotronH* FalconH1 FalconMamba Mamba* Jamba Zamba*", _MAMBA, "LlamaForCausalLM"),
    ("Bamba", _MAMBA, "GraniteForCausalLM"),
    ("Phi4Flash", _MAMBA, "Phi3ForCausalLM"),
    ("Plamo2", _MAMBA, "LlamaForCausalLM"),
    ("Qwen3VLMoe*", "experts whose matrices lie the other way round", "Qwen3MoeForCausalLM"),
    ("GraniteMoeShared", "a shared expert without a gate", "GraniteMoeForCausalLM"),
    ("GraniteSWA", "windows and sinks beside its multipliers", "GraniteForCausalLM"),
    ("GraniteMoeSWA", "windows and sinks beside its multipliers", "GraniteMoeForCausalLM"),
    ("Deepseek", "a shared expert without a gate", "Qwen2MoeForCausalLM"),
    ("Mellum", "experts in layers with windows", "Qwen3MoeForCausalLM"),
    ("Dbrx", "q, k and v that are clipped", "MixtralForCausalLM"),
    ("JetMoe", "experts of attention", "MixtralForCausalLM"),
    ("Grok*", "experts whose sums have norms", "MixtralForCausalLM"),
    ("Zaya*", "convolutions in attention", "Qwen3MoeForCausalLM"),
    ("FlexOlmo", "experts in layers whose norms come after attention and MLP", "OlmoeForCausalLM"),
    ("Lfm[23]*", "short convolutions", "Qwen3ForCausalLM"),
    ("OlmoHybrid", _RECURRENT, "Olmo3ForCausalLM"),
    ("RecurrentGemma", _RECURRENT, "Gemma3ForCausalLM"),
    ("Rwkv* xLSTM MiniMax MiniMaxText01", _RECURRENT, "Qwen3NextForCausalLM"),
    ("Gemma4Assistant", _DRAFTS, "Gemma4ForCausalLM"),
    ("Gemma4UnifiedAssistant", _DRAFTS, "Gemma4UnifiedForCausalLM"),
    ("Gemma3n*", "per-layer embeddings of another kind and alternating streams", "Gemma4ForCausalLM"),
    ("Llama4*", "chunked attention and experts of their own", "LlamaForCausalLM"),
    ("Mllama*", "cross-attention to images", "LlamaForCausalLM"),
    ("DiffLlama", "attention that subtracts two softmaxes", "LlamaForCausalLM"),
    ("BitNet", "ternary weights and norms between them", "LlamaForCausalLM"),
    ("DiffusionGemma", _DIFFUSION, "Gemma3ForCausalLM"),
    ("Dream", _DIFFUSION, "Qwen2ForCausalLM"),
    ("SDAR*", _DIFFUSION, "Qwen3ForCausalLM"),
    ("LLaDA*", _DIFFUSION, "LlamaForCausalLM"),
    ("Ouro", "layers that a token goes through several times", "Qwen3ForCausalLM"),
    ("Cwm", "Llama's layers with windows", "MinistralForCausalLM"),
    ("DeciLM OpenELM", _SIZES, "LlamaForCausalLM"),
    ("Phi3Small", "attention that leaves out blocks of tokens", "Phi3ForCausalLM"),
    ("MiMo", "heads that predict further tokens", "Qwen2ForCausalLM"),
    ("NanoChat", "norms without weights", "Qwen3ForCausalLM"),
    ("Doge", "masks that it computes", "LlamaForCausalLM"),
    ("Apertus* Arcee", "an MLP without a gate", "LlamaForCausalLM"),
    ("Olmo", "norms without weights", "Olmo2ForCausalLM"),
    ("Exaone", "tensors of other names", "Exaone4ForCausalLM"),
    ("QWen", "tensors of other names", "Qwen2ForCausalLM"),
    ("ChatGLM*", "tensors of other names", "GlmForCausalLM, as the checkpoints whose names end with -hf have it"),
    ("MiniCPM", "factors that only its own code reads", "LlamaForCausalLM"),
    ("Baichuan*", "q, k and v fused in one matrix", "LlamaForCausalLM"),
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
    ("AyaVision Cohere2Vision CohereCompass*", _PARTS, "Cohere2ForCausalLM"),
    ("Exaone4_5_*", _PARTS, "Exaone4ForCausalLM"),
    ("Granite4Vision GraniteDocling", _PARTS, "GraniteForCausalLM"),
    ("HyperCLOVAXVision*", _PARTS, "HyperCLOVAXForCausalLM"),
    ("PaddleOCRVL", _PARTS, "Ernie4_5ForCausalLM"),
    ("FastVlm VideoLlama3 HunYuanVL*", _PARTS, "Qwen2_5_VLForConditionalGeneration"),
    ("PerceptionLM Aria* Chameleon Emu3* Fuyu Kosmos2* Blip* InstructBlip* Florence2 Git Pixtral", _PARTS,
     "LlavaForConditionalGeneration"),
    ("MiniCPMV* MiniCPMO Ovis* Molmo* GotOcr2 LightOnOcr", _PARTS, "Qwen3VLForConditionalGeneration"),
    ("VoxtralRealtime GraniteSpeech* AudioFlamingo3 Qwen3ASR", _PARTS, "VoxtralForConditionalGeneration"),
    ("Phi", _OLDER, "Phi3ForCausalLM"),
    ("Starcoder2 CodeGen GPTBigCode", _OLDER, "Qwen2ForCausalLM"),
    ("Bloom Mpt", "positions by ALiBi", "LlamaForCausalLM"),
    ("Jais*", _OLDER, "LlamaForCausalLM"),
    ("GPT2 GPTNeo* GPTJ OPT Falcon StableLm* Nemotron XGLM BioGpt Persimmon OpenAIGPT", _OLDER, "LlamaForCausalLM"),
    ("ModernBertDecoder", "a head with a layer of its own", "Gemma3ForCausalLM"),
    ("*T5*", _ENCODER, "Gemma3ForCausalLM"),
    ("MPNet Longformer XLM XLNet Xmod Ernie Data2Vec* Wav2Vec2* CLIP* Siglip* ViT Gte* Mvp Funnel Reformer", _ENCODER,
     "LlamaForCausalLM"),
    ("*Bart *Bert* Electra *Pegasus* Marian Blenderbot* ProphetNet Whisper* TrOCR BigBird RoFormer", _ENCODER,
     "LlamaForCausalLM"),
)  # fmt: skip
# What stands behind a model's name in an architecture's, and what of it has no head of a language model.
_PURPOSE = re.compile(r"(For[A-Z]\w*|Model|LMHeadModel|WithLMHead\w*|ModelWithLMHead)$")
_WITHOUT_HEAD = re.compile(r"(For(Sequence|Token)Classification|ForQuestionAnswering|For\w*Reward\w*|(Text)?Model)$")


def refusal(name: str) -> str:
    """What to say of an architecture, or of a ``model_type``, that is not built: it ends a sentence."""
    names = [_plain(_PURPOSE.sub("", name)), _plain(name)]
    for words, what, nearest in (*UNBUILT, *_without_head(name)):
        if any(fnmatchcase(one, _plain(word)) for word in words.split() for one in names):
            return f", which has {what}, and octo-run does not compute that: the nearest that it runs is {nearest}"
    return ", which octo-run does not know: docs/families.md lists the families that it runs"


def _without_head(name: str) -> tuple[tuple[str, str, str], ...]:
    """A line for a model of a known family that classifies texts or gives vectors of them."""
    bare = _WITHOUT_HEAD.sub("", name)
    nearest = [
        known for known in (f"{bare}ForCausalLM", f"{bare}ForConditionalGeneration") if known in (*FAMILIES, *WRAPPERS)
    ]
    return ((name, _HEADLESS, nearest[0]),) if bare != name and nearest else ()


def _plain(name: str) -> str:
    """The same for ``DeepseekV3`` and ``deepseek_v3``."""
    return re.sub("[_-]", "", name).lower()
