"""Meters: the cost of one training step in memory and time, and the share of a backbone that is trained."""

from e3va_peft.meter.parameters import BackboneShare, backbone_share
from e3va_peft.meter.step import StepReport, live_bytes, measure_step

__all__ = ["BackboneShare", "StepReport", "backbone_share", "live_bytes", "measure_step"]
