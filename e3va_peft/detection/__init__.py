"""Detectors over any backbone of transformers, from torchvision's parts, registered with the Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForInstanceSegmentation, AutoModelForObjectDetection

from e3va_peft.errors import require_train

require_train(__name__)

from e3va_peft.detection.config import (  # noqa: E402  what they need is known to be there
    CascadeMaskRCNNConfig,
    DetectorConfig,
    MaskRCNNConfig,
    RetinaNetConfig,
)
from e3va_peft.detection.modeling import (  # noqa: E402
    CascadeMaskRCNN,
    DetectionOutput,
    Detector,
    MaskRCNN,
    RetinaNet,
)
from e3va_peft.detection.processing import DetectionImageProcessor  # noqa: E402

for _config, _model in (
    (RetinaNetConfig, RetinaNet),
    (MaskRCNNConfig, MaskRCNN),
    (CascadeMaskRCNNConfig, CascadeMaskRCNN),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoImageProcessor.register(
        _config, image_processor_classes={"torchvision": DetectionImageProcessor}, exist_ok=True
    )
    AutoModelForObjectDetection.register(_config, _model, exist_ok=True)
    if _model is not RetinaNet:
        AutoModelForInstanceSegmentation.register(_config, _model, exist_ok=True)

__all__ = [
    "CascadeMaskRCNN",
    "CascadeMaskRCNNConfig",
    "DetectionImageProcessor",
    "DetectionOutput",
    "Detector",
    "DetectorConfig",
    "MaskRCNN",
    "MaskRCNNConfig",
    "RetinaNet",
    "RetinaNetConfig",
]
