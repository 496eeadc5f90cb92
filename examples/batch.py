"""Continue six prompts, three at a time. A finished answer is printed, and the next prompt takes its place."""

from octo_run import Engine, SamplingParams

names = ("Anna", "Bob", "Clara", "David", "Emma", "Frank")
prompts = [f"{name} opened the old door and saw" for name in names]
lengths = [SamplingParams(max_tokens=8 * (1 + index % 3)) for index in range(len(prompts))]
engine = Engine.load("octo-demo", sequences=3)
for done in engine.generate_batch(prompts, lengths):
    print(f"{done.index}: {prompts[done.index] + done.text!r} [{len(done.ids)} tokens, {done.finish_reason}]")
