"""A model of the transformers library with its KV cache in codes: a long prompt, and what it takes."""

import torch
from transformers import AutoModelForCausalLM

from octo_run.integrations.transformers import OctoCache
from octo_run.models.hub import resolve
from octo_run.tokenizer import load_tokenizer

tokenizer = load_tokenizer(resolve("octo-demo"))
model = AutoModelForCausalLM.from_pretrained(resolve("octo-demo"), dtype=torch.float32)
prompt = torch.tensor([tokenizer.prompt("I want to book a table for two in San Jose tonight. " * 60)])
model.set_attn_implementation("octo")
for kv in ("bf16", "oct4", "oct3"):
    cache = OctoCache(model.config, kv=kv)
    answer = model.generate(prompt, cache=cache, max_new_tokens=16, do_sample=False)
    print(cache, repr(tokenizer.decode(answer[0, prompt.shape[1] :].tolist())))
