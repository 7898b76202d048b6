"""The cache: frozen passes are computed once, and read in every epoch, or by several adapters."""

from e3va_peft.cache.dataset import Cached, cached
from e3va_peft.cache.once import backbone_once

__all__ = ["Cached", "backbone_once", "cached"]
