"""A layer that stays in float beside the integer ones."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from dqtool.nn.packed_layer import PackedLayer
from dqtool.runtimes.cpu.threads import float_threads

__all__ = ["FloatLayer"]


class FloatLayer(PackedLayer):
    """A packed layer that has all threads for its product where that is much work, on a crowded machine, too."""

    @classmethod
    def of(cls, layer: PackedLayer) -> FloatLayer:
        """Return a float layer with the tensors of `layer`."""
        made = cls.__new__(cls)
        made.__dict__.update(layer.__dict__)
        return made

    def multiply(self, x: Tensor) -> Tensor:
        """See `QuantLayer.multiply`."""
        if is_compiling():
            return super().multiply(x)
        positions = x[:, 0].numel() if self.is_conv else x[..., 0].numel()
        with float_threads(positions * self._weight_shape().numel()):
            return super().multiply(x)
