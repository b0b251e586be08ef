"""Rill: a small, fast engine that runs Qwen3, Qwen2 and Llama checkpoints.

>>> from engine import LLM, SamplingParams
>>> LLM("models/tiny-qwen3").generate("Once upon a time", SamplingParams(max_tokens=50)).text
"""

from engine.errors import RillError, UsageError
from engine.llm import LLM, Stream
from engine.request import Completion, Timings, TokenLogprob
from engine.sampler import SamplingParams
from engine.version import __version__ as __version__

__all__ = ["LLM", "Completion", "RillError", "SamplingParams", "Stream", "Timings", "TokenLogprob", "UsageError"]
