"""`generate` with compiled decode steps, on a CPU, and what the compiler made of them."""

import torch
from transformers import CompileConfig


class Graphs(list):
    """What the compiler made; as a backend it runs the graphs as they are."""

    def __init__(self):
        torch._dynamo.reset()

    def compiling(self):
        """The option of `generate` that makes transformers compile decode steps on a CPU too."""

        def backend(graph, _):
            self.append(graph)
            return graph

        config = CompileConfig(fullgraph=True, backend=backend, mode=None)
        config._compile_all_devices = True
        return {"compile_config": config}


TWELVE = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
