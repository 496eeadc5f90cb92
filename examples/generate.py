"""Continue a text and print it as it comes; the last token says why the answer ends."""

from octo_run import Engine, SamplingParams

engine = Engine.load("octo-demo", kv="oct3")
prompt = "It was a dark and stormy night, and"
print(prompt, end="")
for token in engine.generate(prompt, SamplingParams(temperature=0.7, seed=1, max_tokens=40, stop=("\n",))):
    print(token.text, end="", flush=True)
print(f"\n[{token.finish_reason}]")
