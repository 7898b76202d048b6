"""Plans: the memory of a training step by each method, before anything is downloaded or allocated."""

from e3va_peft.plan.estimate import MethodPlan, Plan, plan

__all__ = ["MethodPlan", "Plan", "plan"]
