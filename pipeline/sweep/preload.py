"""Imported once, by the server that the processes of jobs are forked from: what every job would import again.

A job that starts in a fresh interpreter spends ten seconds on imports; one that is forked finds them done.  CUDA must
not be initialised here, because it does not survive a fork.  Importing Torch-TensorRT does so where there is a GPU, so
there only the libraries that it imports in turn are loaded, which is most of the time.
"""

import gc
import importlib
import importlib.util

from pipeline.host import gpu

gc.disable()  # a second, and nothing that is imported is ever dropped

for name in (
    "torch",
    "torch.export",
    "torch._inductor.compile_fx",
    "transformers",
    "passes.graph.driver",
    "pipeline.__main__",  # the main module of every process
    "pipeline.run",
    "pipeline.trace.call_form",
    "pipeline.model.load",
    "pipeline.verify.logits",
    "pipeline.measure.prompt",
    "pipeline.record.plots",
    "z3",
):
    importlib.import_module(name)

if gpu.card().name is None and importlib.util.find_spec("torch_tensorrt") is not None:
    importlib.import_module("passes.tensorrt.versions").load_stack()
    importlib.import_module("pipeline.engine.network")

gc.freeze()  # the collector of a fork would write to, and so copy, every page it walks
gc.enable()
