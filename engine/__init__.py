"""The runtime: engine, sessions, KV arena, sampling, memory plan."""

from octo_run.engine.batching import Completion
from octo_run.engine.engine import Engine
from octo_run.engine.generation import Generation, Token
from octo_run.engine.plan import MemoryPlan, plan_memory
from octo_run.engine.reply import Reply
from octo_run.engine.sampling import SamplingParams
from octo_run.engine.session import Session

__all__ = [
    "Completion",
    "Engine",
    "Generation",
    "MemoryPlan",
    "Reply",
    "SamplingParams",
    "Session",
    "Token",
    "plan_memory",
]
