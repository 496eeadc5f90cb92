"""What a chat imports until its prompt is there, and how."""

import json
import subprocess
import sys
from typing import Any

import pytest

_CODE = """
import json, sys
import octo_run
dir(octo_run)
assert "torch" not in sys.modules, "the package by itself imports nothing large"
from octo_run.cli import chat, chat_commands, conversation, runtime
assert "torch" not in sys.modules, "the command line is read before anything large is imported"
from octo_run.cli.options import EngineOptions
usual = dict(kv="oct3", conditioning=None, ctx=None, dtype=None, offline=True, threads=None)
engine = runtime.load_engine(EngineOptions(model="octo-demo", device="cpu", weights="int8", head="int8", **usual))
import prompt_toolkit
from octo_run import SamplingParams
from octo_run.cli import line_editor
with engine:
    ids = [token.id for token in engine.generate("It was a dark", SamplingParams(temperature=0, max_tokens=8))]
octo_run.Token
print(json.dumps([ids, sorted(sys.modules)]))
"""
_SHAPES = """
import json, sys
from octo_run.cli.runtime import import_torch
import_torch()
import torch
left_out = "torch._meta_registrations" not in sys.modules
import torch._meta_registrations as shapes
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    shape = list(torch.empty(3, 4)[torch.tensor([0, 2, 1, 0])].shape)
print(json.dumps([left_out, hasattr(shapes, "meta_index_Tensor"), shape]))
"""
#: What takes long to import, and is for other commands.
_LARGE = ("transformers", "matplotlib", "huggingface_hub", "httpx", "gguf", "rich", "sympy", "llguidance", "jsonschema")
_COMPILER = (
    "torch._meta_registrations",
    "torch._prims",
    "torch._decomp.decompositions",
    "torch._dynamo",
    "torch._inductor",
)


def _run(code: str, *arguments: str) -> Any:
    child = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_what_is_imported_until_the_first_answer() -> None:
    """Not the shapes of operations, which PyTorch's compiler alone needs. The answer is the same as with them."""
    from octo_run.engine import Engine, SamplingParams

    ids, loaded = _run(_CODE)
    assert not {*_LARGE, *_COMPILER} & {*loaded}
    with Engine.load("octo-demo", device="cpu", weights="int8", head="int8") as engine:
        assert ids == [
            token.id for token in engine.generate("It was a dark", SamplingParams(temperature=0, max_tokens=8))
        ]


_FORMATS = """
import json, sys
from octo_run.cli import runtime
from octo_run.cli.options import EngineOptions
usual = dict(conditioning=None, ctx=None, dtype=None, offline=True, threads=None)
answers = {}
for weights, kv in json.loads(sys.argv[1]):
    options = EngineOptions(model="octo-demo", device="cpu", kv=kv, weights=weights, head="bf16", **usual)
    with runtime.load_engine(options) as engine:
        from octo_run import SamplingParams
        params = SamplingParams(temperature=0.5, seed=1, max_tokens=4)
        answers[f"{weights} {kv}"] = [token.id for token in engine.generate("It was a dark", params)]
print(json.dumps([answers, "torch._meta_registrations" in sys.modules]))
"""


@pytest.mark.parametrize(
    "formats",
    [
        [("int4", "oct3")],
        pytest.param(
            [("fp32", "auto:56"), ("bf16", "octopus3"), ("fp8", "bf16"), ("int8", "oct2"), ("int4-128", "oct4")],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_formats_need_no_shapes_of_operations(formats: list[tuple[str, str]]) -> None:
    """A program that has just begun answers with weights and caches of every format as a library's user does."""
    from octo_run.engine import Engine, SamplingParams

    answers, shapes = _run(_FORMATS, json.dumps(formats))
    assert not shapes and len(answers) == len(formats)
    for weights, kv in formats:
        with Engine.load("octo-demo", device="cpu", kv=kv, weights=weights, head="bf16") as engine:
            params = SamplingParams(temperature=0.5, seed=1, max_tokens=4)
            assert answers[f"{weights} {kv}"] == [token.id for token in engine.generate("It was a dark", params)]


@pytest.mark.slow
def test_the_shapes_of_operations_come_when_they_are_asked_for() -> None:
    left_out, there, shape = _run(_SHAPES)
    assert left_out and there and shape == [4, 4]


_PLANS = """
import json, sys
from types import SimpleNamespace
if sys.argv[1] == "program":
    from octo_run.cli.runtime import import_torch
    import_torch()
import torch
from octo_run.engine import plan
from octo_run.engine.random_model import read_shape
from octo_run.engine.shapes import SHAPES
from octo_run.models.quantisation.schemes import head_scheme, scheme_of
card = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=233472)
torch.cuda.get_device_properties = lambda device=None: card
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.current_device = lambda: 0
plan.free_memory, plan.library_workspace = lambda device: 1 << 42, lambda device: 0
usual = dict(device=torch.device("cuda"), dtype=torch.bfloat16, max_context=4096, sequences=2)
totals = {}
for name in SHAPES:
    cfg = read_shape(name)
    for weights in (None, "int4", "fp8") if cfg.quantisation is None else (None,):
        more = dict(quantise=scheme_of(weights), pack_embedding=head_scheme("int8") if weights else None)
        totals[f"{name} {weights}"] = plan.plan_memory(cfg, "oct3", **usual, **more).total
print(json.dumps([totals, "torch._meta_registrations" in sys.modules]))
"""


@pytest.mark.slow
def test_plans_for_a_gpu_need_no_shapes_of_operations() -> None:
    """Every shape is planned in the program as it is with all of PyTorch, which a library's import leaves whole."""
    found = []
    for how in ("program", "library"):
        child = subprocess.run([sys.executable, "-c", _PLANS, how], capture_output=True, text=True, timeout=600)
        assert child.returncode == 0, child.stderr
        found.append(json.loads(child.stdout))
    (program, there), (library, whole) = found
    assert program == library and len(program) > 20 and (there, whole) == (False, True)
