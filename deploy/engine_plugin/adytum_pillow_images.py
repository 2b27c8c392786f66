"""A plugin of vLLM for an environment without torchvision: Gemma 3 reads images with Pillow.

There, transformers uses its image processor that works with Pillow, `Gemma3ImageProcessorPil`. vLLM 0.32's
`gemma3_mm` imports the other one, only for annotations, from a module that cannot be imported without torchvision. So
this plugin supplies that module, with the class that is used. It changes nothing in vLLM or transformers, and does
nothing if torchvision is installed, as on a GPU.
"""

import importlib.util
import sys
import types

_MODULE = "transformers.models.gemma3.image_processing_gemma3"


def register() -> None:
    """Called by vLLM, possibly more than once in a process."""
    if importlib.util.find_spec("torchvision") is not None or _MODULE in sys.modules:
        return
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    module = types.ModuleType(_MODULE, "A substitute without torchvision (adytum_pillow_images).")
    vars(module)["Gemma3ImageProcessor"] = Gemma3ImageProcessorPil
    sys.modules[_MODULE] = module
