"""Two sequences by hand: read their prompts, then take steps in which both draw a token."""

from octo_run import Engine, SamplingParams

engine = Engine.load("octo-demo", sequences=2)
prompts = [engine.tokenizer.prompt(text) for text in ("The captain looked at the sea and", "In the morning she")]
sequences = [engine.sequence() for _ in prompts]
for sequence, ids in zip(sequences, prompts, strict=True):
    engine.step.start(sequence, int(engine.prefill(sequence, ids).argmax()), SamplingParams())
for _ in range(12):
    engine.step.launch(sequences)
    drawn = [engine.step.read(sequence) for sequence in sequences]
for sequence, (_, logprob) in zip(sequences, drawn, strict=True):
    text, count = engine.tokenizer.decode(sequence.ids), len(sequence)
    print(f"{text!r} [{count} tokens held, the next one has log-probability {logprob:.2f}]")
