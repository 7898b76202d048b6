"""Meters: what one training step costs in memory and time, or would cost, and how much of a backbone is trained."""

from e3va_peft.measure.parameters import BackboneShare, backbone_share
from e3va_peft.measure.prediction import MethodPlan, Plan, plan
from e3va_peft.measure.step import StepReport, live_bytes, measure_step

__all__ = [
    "BackboneShare",
    "MethodPlan",
    "Plan",
    "StepReport",
    "backbone_share",
    "live_bytes",
    "measure_step",
    "plan",
]
