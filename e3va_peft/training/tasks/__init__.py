"""Tasks, by what differs between them: model, views of an image, and scores. One task, one file."""

from e3va_peft.training.config import RunConfig
from e3va_peft.training.tasks.base import Task
from e3va_peft.training.tasks.classification import ImageClassification
from e3va_peft.training.tasks.detection import InstanceSegmentation, ObjectDetection
from e3va_peft.training.tasks.segmentation import SemanticSegmentation

_TASKS: dict[str, type[Task]] = {
    "image-classification": ImageClassification,
    "semantic-segmentation": SemanticSegmentation,
    "object-detection": ObjectDetection,
    "instance-segmentation": InstanceSegmentation,
}


def task_of(config: RunConfig) -> Task:
    """Return the task of a run."""
    return _TASKS[config.task](config)


__all__ = [
    "ImageClassification",
    "InstanceSegmentation",
    "ObjectDetection",
    "SemanticSegmentation",
    "Task",
    "task_of",
]
