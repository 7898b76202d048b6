"""E3VA for PEFT: fine-tune large vision models on small GPUs.

Importing this package registers the method with PEFT:

    import e3va_peft
    model = peft.get_peft_model(model, e3va_peft.E3VAConfig())
"""

from e3va_peft.backbones import Backbone, Branch, Host, Merging, register_backbone, registered_backbones
from e3va_peft.cache import backbone_once, cached
from e3va_peft.card import record_metrics
from e3va_peft.check import check_backbone
from e3va_peft.config import E3VAConfig
from e3va_peft.highway import Highway
from e3va_peft.layer import E3VALayer
from e3va_peft.loading import load_adapter
from e3va_peft.model import E3VAModel
from e3va_peft.registration import register

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "Branch",
    "E3VAConfig",
    "E3VALayer",
    "E3VAModel",
    "Highway",
    "Host",
    "Merging",
    "__version__",
    "backbone_once",
    "cached",
    "check_backbone",
    "load_adapter",
    "record_metrics",
    "register_backbone",
    "registered_backbones",
]

register(E3VAConfig, E3VAModel)
