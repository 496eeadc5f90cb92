"""What a load imports: not the compiler, which takes more than a second to come."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", ["", "kv='bf16'", "kv='oct4:oct2'", "conditioning='mean'", "kv='octopus3'"])
def test_a_chat_on_a_cpu_imports_no_compiler(arguments: str) -> None:
    """Nor does an answer, of which the second step is recorded."""
    code = (
        "import sys; from octo_run import Engine, SamplingParams\n"
        f"engine = Engine.load('octo-demo', device='cpu', max_context=256, {arguments})\n"
        "message = {'role': 'user', 'content': 'Hello'}\n"
        "list(engine.chat([message], SamplingParams(max_tokens=5)))\n"
        "print(*[name for name in ('torch._dynamo', 'torch._inductor', 'sympy', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == ""
