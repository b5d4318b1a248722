"""``backend=plugin``: the attention plugin of the report's last column, TensorRT-Edge-LLM's, for full TensorRT only.

Its row stays in every table.  Where it cannot run, its report says ``unavailable`` and why; nothing is measured, and
nothing is made up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.errors import RunError

if TYPE_CHECKING:
    from passes.tensorrt.versions import Stack
    from pipeline.config.schema import BackendConfig


def why_not(backend: BackendConfig, stack: Stack) -> str:
    """Why the plugin cannot run; raises :class:`RunError` of kind ``untested`` where it perhaps could."""
    if stack.flavour == "tensorrt_rtx":
        return "TensorRT-RTX has no add_plugin; the attention plugin runs in full TensorRT only"
    if backend.plugin_library is None:
        return "backend.plugin_library=null: no library of TensorRT-Edge-LLM's attention plugin is named"
    raise RunError(
        "untested",
        f"backend.plugin_library={backend.plugin_library}: nothing here ever drove this plugin, so there is "
        "no code for it that could be trusted",
    )
