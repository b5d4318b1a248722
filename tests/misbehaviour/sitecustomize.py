"""Put on PYTHONPATH by tests of sweeps: jobs with these seeds misbehave while they load, until a file says stop.

It patches ``pipeline.run`` when that is imported, which only the processes of jobs do.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path


def raising() -> None:
    raise RuntimeError("a job that raises\nand says more")


def out_of_memory() -> None:
    bytearray(1 << 60)


def segmentation_fault() -> None:
    import ctypes

    ctypes.string_at(0)


MISBEHAVIOUR = {
    101: lambda: os.kill(os.getpid(), signal.SIGKILL),
    102: raising,
    103: lambda: time.sleep(1000),
    104: out_of_memory,
    105: segmentation_fault,
}


class Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "pipeline.run":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def patched(module):
            execute(module)
            load = module._load

            def misbehaving(record):
                if not Path(os.environ["BEHAVE"]).exists():
                    MISBEHAVIOUR.get(record.config.seed, lambda: None)()
                return load(record)

            module._load = misbehaving

        spec.loader.exec_module = patched
        return spec


sys.meta_path.insert(0, Patch())
