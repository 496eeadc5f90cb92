"""A chat of two turns. The second turn reads only what is new: the KV cache still holds the first one."""

from octo_run import Engine, Session

session = Session(Engine.load("octo-demo"))
for question in ("I want to book a table for two in San Jose tonight.", "Italian food, please, at 7 pm."):
    print(f"> {question}")
    reply = session.ask(question)
    for piece in reply:
        print(piece, end="", flush=True)
    print(f"\n[{reply.prompt_tokens} prompt tokens, {reply.reused_tokens} of them reused]")
