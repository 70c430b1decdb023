"""Load and run a 4-bit gpt-oss model. torch lives here.

Importing this package teaches transformers our quantization_config, so that plain
AutoModelForCausalLM.from_pretrained loads our checkpoints.
"""

import logging

from ossquant.errors import MissingExtraError

# at import it warns that an optional kernel of its own is not installed
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

try:
    from ossquant.runtime.quantizer import OssquantConfig, OssquantQuantizer
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"running a model needs '{error.name}', which is not installed", hint="pip install 'ossquant[run]'"
    ) from error

__all__ = ["OssquantConfig", "OssquantQuantizer"]
