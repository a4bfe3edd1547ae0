"""Text generation: a cache of keys and values, sampling, rows that come and go."""

from loopos.generation.engine import Generation
from loopos.generation.generate import Session, generate, stream
from loopos.generation.kv_cache import KVCache
from loopos.generation.sampling import SamplingOptions

__all__ = ["Generation", "KVCache", "SamplingOptions", "Session", "generate", "stream"]
