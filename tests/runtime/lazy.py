"""torch's lazy backend in this process: a device that every build has, and that refuses the host's tensors."""

from functools import cache

import torch._lazy.ts_backend


@cache
def lazy_device() -> str:
    """Start the backend, which can be done once, and return its device."""
    torch._lazy.ts_backend.init()
    return "lazy:0"
