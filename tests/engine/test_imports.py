"""What a load imports: not the compiler, which takes more than a second to come."""

import subprocess
import sys

import pytest

CODE = """
import sys
from octo_run import Engine, SamplingParams

for arguments in ({}, {"kv": "bf16"}, {"kv": "oct4:oct2"}, {"conditioning": "mean"}, {"kv": "octopus3"}):
    engine = Engine.load("octo-demo", device="cpu", max_context=256, **arguments)
    list(engine.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=5)))
    print(arguments, [name for name in ("torch._dynamo", "torch._inductor", "sympy", "triton") if name in sys.modules])
"""


@pytest.mark.slow
def test_a_chat_on_a_cpu_imports_no_compiler() -> None:
    """Nor does an answer, of which the second step is recorded."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120)
    said = done.stdout.splitlines()
    assert len(said) == 5 and all(line.endswith("} []") for line in said), said
