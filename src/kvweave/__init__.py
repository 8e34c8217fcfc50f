"""KV-cache compression for multimodal LLMs on Hugging Face Transformers.

with kvweave.compress(model, kvweave.FlowMM(budget=0.2)) as session:
    out = model.generate(**inputs, max_new_tokens=64)
session.report
"""

from kvweave.layer import LayerView
from kvweave.methods import *  # noqa: F403
from kvweave.methods import __all__ as _methods
from kvweave.plan import Compacted, Merge, Plan
from kvweave.prompt import Prompt
from kvweave.tensors import compress_tensors

__all__ = ["Compacted", "LayerView", "Merge", "Plan", "Prompt", "compress_tensors", *_methods]
__version__ = "0.1.0"
