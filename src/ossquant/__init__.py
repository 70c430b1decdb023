"""ossquant: gpt-oss models in 4 bits, on hardware you own."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ossquant.runtime.load import load_model as load_model

__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # torch comes with the runtime, so it is imported at the first use
    if name == "load_model":
        from ossquant.runtime.load import load_model

        return load_model
    raise AttributeError(f"module 'ossquant' has no attribute '{name}'")
