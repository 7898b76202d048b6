"""The cache: frozen passes are computed once per image and view, and read in every epoch."""

from e3va_peft.cache.dataset import Cached, cached

__all__ = ["Cached", "cached"]
