"""Fewer kernels around the experts of a few tokens: what one kernel does for two is what the two do.

The Triton cases run where there is a GPU, or interpreted (see test_attention_interpreted.py).
"""

import os
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.engine import Engine, SamplingParams
from octo_run.kernels import experts as routed
from octo_run.kernels import step as ops
from octo_run.kernels.experts import Scratch
from octo_run.kernels.step import AddNorm, Mixture, reference
from octo_run.models.config import parse_config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
shapes = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "test_experts.py")))
triton_only = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="Triton kernels need a GPU or TRITON_INTERPRET=1"
)
#: Of sums of float32 or of what was rounded; the interpreter cuts bfloat16 off instead of rounding it.
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CHOSEN = 3


class Case:
    """What a router with a norm in front of it is given.

    Args:
        wide: Weights of norms are float32.
    """

    def __init__(
        self, rows: int, hidden: int, dtype: torch.dtype = torch.float32, *, experts: int = 7, outputs: int = 7,
        biased: bool = False, summed: bool = True, post: bool = False, multiplier: float = 1.0, centred: bool = False,
        wide: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int, kind: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=random) * scale).to(DEVICE, kind)

        def near_one() -> Tensor:
            return 1 + normal(hidden, kind=torch.float32 if wide else dtype, scale=0.3)

        self.x, self.residual = normal(rows, hidden) + 0.5, normal(rows, hidden) if summed else None
        self.weight, self.post, self.eps = near_one(), near_one() if post else None, 1e-5
        self.multiplier, self.centred, self.normalised = multiplier, centred, bool(seed % 2)
        self.router = normal(outputs, hidden, scale=hidden**-0.5)
        self.bias = normal(outputs, scale=0.3) if biased else None
        self.shapes = Scratch.shapes(rows, experts, CHOSEN, outputs, hidden, 8, dtype)

    def run(self) -> dict[str, Tensor]:
        """What is written."""
        from octo_run.kernels.experts import launch

        residual = None if self.residual is None else self.residual.clone()
        out, scratch = torch.full_like(self.x, torch.nan), shapes.poisoned(Scratch.make(self.shapes, DEVICE))
        norm = AddNorm(self.x, residual, self.weight, self.eps, out, self.post, self.multiplier, self.centred)
        assert launch.route(norm, self.router, self.bias, self.normalised, scratch) is out
        found = {"normed": out, "logits": scratch.logits, "indices": scratch.indices, "weights": scratch.weights}
        if len(out) == 1:
            found |= {"tiles": scratch.tiles[:CHOSEN], "order": scratch.order}
        return found if residual is None else found | {"residual": residual}

    def exact(self) -> dict[str, Tensor]:
        """Residual, normed rows and logits by float64."""

        def normed(x: Tensor, weight: Tensor) -> Tensor:
            if self.centred:
                x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * weight.double()

        x = self.x.double()
        x = (x if self.post is None else normed(x, self.post)) * self.multiplier
        found = {}
        if self.residual is not None:
            x = found["residual"] = x + self.residual.double()
        found["normed"] = normed(x, self.weight)
        found["logits"] = found["normed"] @ self.router.double().T
        if self.bias is not None:
            found["logits"] = found["logits"] + self.bias.double()
        return found


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call in which the router did the norm."""
    from octo_run.kernels.experts import launch

    calls, norm_route = list[int](), launch._norm_route

    def counted(norm: AddNorm, *rest: Any) -> None:
        calls.append(len(norm.x))
        norm_route(norm, *rest)

    monkeypatch.setattr(launch, "_norm_route", counted)
    return calls


CASES: list[dict[str, Any]] = [
    {}, {"biased": True, "seed": 1}, {"experts": 6, "biased": True, "post": True, "multiplier": 0.22, "wide": True},
    {"experts": 40, "outputs": 41, "centred": True, "seed": 1}, {"summed": False, "wide": True},
    {"experts": 150, "outputs": 150, "multiplier": 0.5, "post": True, "centred": True},
]  # fmt: skip


@triton_only
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("rows", "hidden", "dtype"),
    [(1, 96, torch.float32), (2, 77, torch.float16), (4, 301, torch.bfloat16), (1, 1000, torch.bfloat16)],
)
def test_triton_router_with_the_norm_in_front(
    rows: int, hidden: int, dtype: torch.dtype, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch, folded: list[int]
) -> None:
    """Near float64, and what the two kernels give: rows bit by bit where a row's norm has the same division."""
    from octo_run.kernels.experts import launch
    from octo_run.kernels.step import launch as step

    given = Case(rows, hidden, dtype, **case)
    ours = given.run()
    assert folded == [rows] and not bool(launch._counters(given.x.device).any())
    for name, want in given.exact().items():
        error = float((ours[name].double() - want).norm() / want.norm())
        assert error < BOUNDS[dtype], f"{name}: {error}"
    monkeypatch.setattr(launch, "NORM_TOKENS", 0)
    monkeypatch.setattr(ops, "add_rms_norm", step.add_rms_norm)
    theirs = given.run()
    assert folded == [rows]
    more_warps = len(given.router) > 128  # than the norm's own kernel has
    for name, want in theirs.items():
        if name in ("logits", "weights") or (name in ("normed", "residual") and more_warps):
            bound = BOUNDS[dtype] if more_warps else 1e-5
            torch.testing.assert_close(ours[name], want, rtol=bound, atol=bound)
        else:
            assert torch.equal(ours[name], want), name


@triton_only
@pytest.mark.parametrize(("rows", "hidden"), [(5, 64), (64, 48), (70, 48), (1, 4097)])
def test_triton_router_leaves_the_norm_to_others(rows: int, hidden: int, folded: list[int]) -> None:
    """Of many tokens or of long rows."""
    given = Case(rows, hidden, experts=5, outputs=5)
    ours = given.run()
    assert not folded
    for name, want in given.exact().items():
        assert float((ours[name].double() - want).norm() / want.norm()) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(("rows", "experts"), [(1, 32), (1, 512), (4, 512)])
def test_the_sum_is_stored_when_all_programs_have_read_what_it_replaces(rows: int, experts: int) -> None:
    """More programs than run at once: if one read the sum in its place, its logits would be others."""
    given = Case(rows, 4096, torch.bfloat16, experts=experts, outputs=experts)
    first = given.run()
    for _ in range(200):
        again = given.run()
        assert all(torch.equal(again[name], want) for name, want in first.items())
    want = given.exact()["logits"]
    assert float((first["logits"].double() - want).norm() / want.norm()) < BOUNDS[torch.bfloat16]


def mixture_of(rows: int, parts: int, hidden: int, dtype: torch.dtype, shared: bool, seed: int) -> Mixture:
    """Gates lie in the last column of a router's outputs."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=random).to(DEVICE, kind)

    gates = normal(rows, 5)[:, 4] if shared else None
    weights = normal(rows, parts).softmax(1)
    return Mixture(normal(rows * parts, hidden, kind=dtype), weights, normal(rows, hidden, kind=dtype) if shared else
                   None, gates)  # fmt: skip


def exactly(mixture: Mixture) -> Tensor:
    """Its sums by float64."""
    weights = mixture.weights.double()
    total = (mixture.parts.double().view(*weights.shape, -1) * weights[..., None]).sum(1)
    if mixture.shared is not None and mixture.gates is not None:
        total += mixture.shared.double() / (1 + (-mixture.gates.double()).exp())[:, None]
    return total


@pytest.mark.parametrize("shared", [False, True])
def test_the_reference_of_a_mixture(shared: bool) -> None:
    mixture = mixture_of(3, 4, 50, torch.float32, shared, 0)
    torch.testing.assert_close(mixture.summed().double(), exactly(mixture), rtol=1e-5, atol=1e-5)
    residual, out, weight = (torch.randn(3, 50).to(DEVICE) for _ in range(3))
    wanted = residual + mixture.summed()
    reference.add_rms_norm(mixture, residual, weight[0], 1e-5, out)
    torch.testing.assert_close(residual, wanted)
    torch.testing.assert_close(out, reference.normed(wanted, weight[0], 1e-5))


@triton_only
@pytest.mark.parametrize("how", [{}, {"multiplier": 0.22}, {"post": True, "multiplier": 0.5}, {"centred": True}, {
    "normed": False, "post": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("rows", "parts", "hidden", "dtype", "shared"), [
    (1, 4, 96, torch.float32, False), (2, 8, 77, torch.float16, True), (4, 1, 301, torch.bfloat16, True),
    (3, 3, 1000, torch.float32, True),
])  # fmt: skip
def test_triton_norm_adds_up_what_experts_give(
    rows: int, parts: int, hidden: int, dtype: torch.dtype, shared: bool, how: dict[str, Any]
) -> None:
    """Bit by bit as the sum's own kernel and the norm's; near float64."""
    from octo_run.kernels.experts import launch
    from octo_run.kernels.step import launch as step

    mixture, rest = mixture_of(rows, parts, hidden, dtype, shared, 3), Case(rows, hidden, dtype, post=True, seed=4)
    assert rest.residual is not None and rest.post is not None
    post, centred = rest.post if how.get("post") else None, how.get("centred", False)
    weight, multiplier = rest.weight if how.get("normed", True) else None, how.get("multiplier", 1.0)
    summed = torch.full_like(rest.x, torch.nan)
    launch._combine(mixture, summed)
    error = float((summed.double() - exactly(mixture)).norm() / exactly(mixture).norm())
    assert error < BOUNDS[dtype], error
    found = []
    for x in (mixture, summed):
        residual, out = rest.residual.clone(), torch.full_like(rest.x, 7 if weight is None else torch.nan)
        step.add_rms_norm(x, residual, weight, 1e-5, out, post, multiplier, centred)
        found.append((residual, out))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert bool(found[0][1].isfinite().all()) and not torch.equal(found[0][0], rest.residual)


@triton_only
@pytest.mark.parametrize(("rows", "left"), [(1, True), (5, True), (64, True), (65, False)])
def test_triton_sums_are_left_to_the_norm_for_few_tokens(rows: int, left: bool) -> None:
    """Of tiles of sorted tokens, where the second product does not add up; only where that is asked for."""
    from octo_run.kernels.experts import launch

    layer = shapes.Layer(rows, packed=("int8", None), hidden=40, inner=24, experts=3, shared=True).to(DEVICE)
    launch.route(layer.x, layer.router, layer.bias, layer.normalised, layer.scratch)
    gave = launch.mix(layer.x, layer.weights, layer.scratch, layer.out, layer.shared, unsummed=True)
    assert isinstance(gave, Mixture) == left and bool(layer.out.isnan().all()) == left
    unsummed = gave.summed() if isinstance(gave, Mixture) else gave
    assert launch.mix(layer.x, layer.weights, layer.scratch, layer.out, layer.shared) is layer.out
    torch.testing.assert_close(unsummed, layer.out, rtol=1e-5, atol=1e-5)
    layer.check(1e-5)


BASE: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 88, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
}  # fmt: skip
QWEN = {"moe_intermediate_size": 24, "num_experts": 7, "num_experts_per_tok": 3, "hidden_act": "silu"}
#: Fields, weights, and layers that have experts.
MODELS: dict[str, tuple[dict[str, Any], str | None, int]] = {
    "qwen3": ({"architectures": ["Qwen3MoeForCausalLM"], **QWEN, "num_hidden_layers": 2}, None, 2),
    "qwen3-packed": ({"architectures": ["Qwen3MoeForCausalLM"], **QWEN, "norm_topk_prob": True}, "int4", 3),
    "gpt-oss-packed": (
        {"architectures": ["GptOssForCausalLM"], "num_local_experts": 6, "num_experts_per_tok": 2, "hidden_act": "silu",
         "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "attention_bias": True, "swiglu_limit": 7.0, "rope_scaling": {
             "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0,
             "beta_slow": 1.0, "truncate": False}}, "int8", 3,
    ),
    "granite": (
        {"architectures": ["GraniteMoeForCausalLM"], "num_local_experts": 6, "num_experts_per_tok": 2,
         "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0,
         "head_dim": None, "num_attention_heads": 1, "hidden_size": 64, "hidden_act": "silu"}, "int8", 3,
    ),
    "qwen2-shared": (
        {"architectures": ["Qwen2MoeForCausalLM"], **QWEN, "shared_expert_intermediate_size": 56,
         "mlp_only_layers": [1], "head_dim": None, "num_attention_heads": 1, "hidden_size": 64}, "int4", 2,
    ),
    "gemma4": (
        {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "global_head_dim": 128,
         "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 70,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
         "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 48,
         "hidden_activation": "gelu_pytorch_tanh"}, "int8", 3,
    ),
}  # fmt: skip


def randomised(engine: Engine) -> None:
    """Norms and biases as if they had been trained, so that one that is left out is seen."""
    random = torch.Generator(DEVICE).manual_seed(5)
    for layer in engine.forward.decoder.layers:
        for part in (*vars(layer.norms).values(), *vars(layer.mlp).values()):
            if isinstance(part, Tensor) and part.ndim == 1:
                part.mul_(1 + 0.3 * torch.randn(part.shape, generator=random, device=DEVICE))


@triton_only
@pytest.mark.parametrize("dtype", ["float32", *(["bfloat16"] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_triton_steps_of_models_with_fewer_kernels(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch, folded: list[int]
) -> None:
    """Logits of steps are those of steps in which every kernel does its own part."""
    from octo_run.kernels.experts import launch
    from octo_run.kernels.step import launch as step

    fields, weights, layers = MODELS[name]
    cfg = parse_config({k: v for k, v in (BASE | fields).items() if v is not None}, Path("config.json"))
    engine = Engine.load(
        name, random_weights=cfg, device=DEVICE, dtype=dtype, kv="bf16", weights=weights, max_context=256
    )
    randomised(engine)
    monkeypatch.setattr(engine.step, "_run", lambda _key, work: work())  # a recorded step would be the same again
    if DEVICE == "cpu":  # the interpreter's kernels on a CPU's tensors, which no replay knows of
        monkeypatch.setattr(routed, "route", launch.route)
        monkeypatch.setattr(routed, "mix", launch.mix)
        monkeypatch.setattr(engine.forward._replays, "run", lambda _key, work: work())
    add, mixtures = ops.add_rms_norm, list[int]()

    def adding(x: Tensor | Mixture, *rest: Any, **more: Any) -> None:
        if isinstance(x, Mixture):
            mixtures.append(len(x.weights))
        if isinstance(x, Mixture) and DEVICE == "cpu":
            assert rest[7:] in ((), (1.0,))
            step.add_rms_norm(x, *rest[:7], **more)
        else:
            add(x, *rest, **more)

    monkeypatch.setattr(ops, "add_rms_norm", adding)
    ids, found = torch.randint(0, 500, (6,), generator=torch.Generator().manual_seed(7)).tolist(), []
    for tokens, sums in ((0, 0), (launch.NORM_TOKENS, launch.UNSUMMED_TOKENS)):
        monkeypatch.setattr(launch, "NORM_TOKENS", tokens)
        monkeypatch.setattr(launch, "UNSUMMED_TOKENS", sums)
        folded.clear()
        sequence = engine.sequence()
        engine.prefill(sequence, ids[:3])
        for token in ids[3:]:
            engine.step.start(sequence, token, SamplingParams())
            engine.step.launch([sequence])
            engine.step.read(sequence)
            found.append(engine.step.logits[0].clone())
        assert folded == ([3] * layers + [1] * layers * 3 if tokens else [])
        assert mixtures == (folded if weights is not None else [])
        sequence.discard()
    bound = 1e-5 if weights is None else 1e-3  # a CPU rounds what packed matrices are multiplied by
    bound = bound if dtype == "float32" else 3e-2
    for one, other in zip(found[:3], found[3:], strict=True):
        assert float((one - other).norm() / other.norm()) < bound
