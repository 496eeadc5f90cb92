"""What each KV format takes for one context: the memory plan, without loading a model."""

import torch

from octo_run.engine import plan_memory
from octo_run.models.config import load_config
from octo_run.models.hub import resolve

config = load_config(resolve("octo-demo"))
for kv in ("bf16", "oct4", "oct3", "oct2", "oct3:oct2"):
    plan = plan_memory(config, kv, device=torch.device("cpu"), dtype=torch.bfloat16, max_context=4096)
    print(f"{kv:10} {plan.bytes_per_token:6,} bytes a token, {plan.arena:10,} bytes of pages, {plan.total:12,} in all")
