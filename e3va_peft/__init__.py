"""E3VA for PEFT: fine-tune large vision models on small GPUs.

Importing this package registers the method with PEFT:

    import e3va_peft
    model = peft.get_peft_model(model, e3va_peft.E3VAConfig())
"""

from e3va_peft.backbones import Backbone, Run, Site, StageSpec, TapPoint, register_backbone, registered_backbones
from e3va_peft.config import E3VAConfig
from e3va_peft.highway import Highway
from e3va_peft.layer import E3VALayer
from e3va_peft.loading import load_adapter
from e3va_peft.model import E3VAModel, record_metrics, register

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "E3VAConfig",
    "E3VALayer",
    "E3VAModel",
    "Highway",
    "Run",
    "Site",
    "StageSpec",
    "TapPoint",
    "__version__",
    "load_adapter",
    "record_metrics",
    "register",
    "register_backbone",
    "registered_backbones",
]

register()
