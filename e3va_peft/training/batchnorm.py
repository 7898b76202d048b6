"""Batch normalisation that trains on one value per channel."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def allow_single_values(model: nn.Module) -> nn.Module:
    """Let the batch norms of a model train where they see one value per channel, and return the model.

    A pooling branch with a 1x1 output, as in UperNet's head, hands its batch norm one value per channel at batch size
    1. Torch refuses: the variance of one value is undefined, and its normalised value would be 0 whatever the input,
    so the branch would carry neither signal nor gradient. Here such a value is normalised with the running statistics,
    which stay as they are: those of the checkpoint, or mean 0 and variance 1 in a new head. The layer is then the same
    affine function in training and in evaluation. With two values per channel or more nothing changes, to the bit.

    The class of each module is changed in place, so its identity, parameters, buffers and state-dict keys stay. Call
    it before or after adapters are injected; a second call changes nothing. Only exactly `nn.BatchNorm1d`, `2d` and
    `3d` are changed: a subclass has a forward of its own, and `nn.SyncBatchNorm` counts the values of all processes. A
    layer without running statistics (`track_running_stats=False`) has nothing to normalise with and keeps torch's
    error.

    Args:
        model: Any module; its batch norms, also those inside adapters, are changed in place.
    """
    for module in model.modules():
        if type(module) in _SINGLE_VALUE:  # not `isinstance`, see above
            module.__class__ = _SINGLE_VALUE[type(module)]
    return model


class _SingleValue(nn.modules.batchnorm._BatchNorm):
    """The forward of all three; the class beside it in the bases knows the number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, `(N, C, ...) -> (N, C, ...)`; one value per channel with the running statistics."""
        if not self.training or not self.track_running_stats or input.dim() < 2 or input.numel() != input.shape[1]:
            return super().forward(input)
        self._check_input_dim(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class SingleValueBatchNorm1d(_SingleValue, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that trains on one value per channel, see `allow_single_values`."""


class SingleValueBatchNorm2d(_SingleValue, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that trains on one value per channel, see `allow_single_values`."""


class SingleValueBatchNorm3d(_SingleValue, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that trains on one value per channel, see `allow_single_values`."""


_SINGLE_VALUE: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SingleValueBatchNorm1d,
    nn.BatchNorm2d: SingleValueBatchNorm2d,
    nn.BatchNorm3d: SingleValueBatchNorm3d,
}
