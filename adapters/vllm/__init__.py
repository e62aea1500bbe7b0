"""Language models through vLLM.

Every process of vLLM imports this package for the plug-in, so that it imports nothing until a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer.adapters.vllm.model import VLLMModel, load
    from steer.adapters.vllm.process import VLLMProcess

__all__ = ["VLLMModel", "VLLMProcess", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "VLLMProcess":
        from steer.adapters.vllm.process import VLLMProcess

        return VLLMProcess
    from steer.adapters.vllm import model

    return getattr(model, name)
