"""ossquant: gpt-oss models in 4 bits, on hardware you own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ossquant.runtime.load import load_model as load_model

__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":  # torch comes with the runtime, so it is imported at the first use
        from ossquant.runtime.load import load_model

        return load_model
    if name == "__version__":
        from importlib.metadata import version

        return version("ossquant")
    raise AttributeError(f"module 'ossquant' has no attribute '{name}'")
