"""Frozen linear layers on the CPU with their weights laid out once for oneDNN: the same fp32 products, sooner.

torch gives fp32 products on x86 to MKL, which lays a weight out anew for every product and which is slow on AMD's processors. oneDNN,
which torch brings too, multiplies by a weight that was laid out beforehand. Only a weight that never changes can be: that of a base
model under LoRA, or of a judge. The operators are those that torch's own compiler calls for frozen models on a CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import psutil
import torch
from peft.tuners import lora
from transformers.activations import SiLUActivation

_OPERATORS = torch.ops.mkldnn


class Frozen:
    """A matrix of shape (out, in) that never changes, laid out for oneDNN."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight: torch.Tensor = _OPERATORS._reorder_linear_weight(weight.contiguous())

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None, then: str = "none") -> torch.Tensor:
        """Returns x Wᵀ, with `bias` (out,) added to it, and then put through the function that oneDNN knows by this name."""
        product: torch.Tensor = _OPERATORS._linear_pointwise(x, self._weight, bias, then, [], "")
        return product

    def times(self, x: torch.Tensor, bias: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor:
        """Returns (x Wᵀ + bias) multiplied elementwise by `factor`, of the product's own shape."""
        product: torch.Tensor = _OPERATORS._linear_pointwise.binary(x, factor, self._weight, bias, "mul")
        return product


class Prepacked(torch.nn.Module):
    """A frozen linear layer whose weight is laid out, and the transposed too where gradients pass through it.

    `weight` stays only where it is asked for: a tied output layer shares it with the embeddings.
    """

    def __init__(self, layer: torch.nn.Linear, *, gradients: bool, keep: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        values = layer.weight.detach()
        # Neither parameters nor buffers: nothing may save, move or share out a tensor that only oneDNN can read.
        self.product = Frozen(values)
        self.transposed = Frozen(values.T) if gradients else None
        self.bias = layer.bias
        if keep:
            self.weight = layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            product: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return product
        return self.product(x, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Prepacked) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.transposed(gradient.contiguous()), None


class _LowRank(torch.autograd.Function):
    """W x + s B A x̃ as one node, where x̃ is x after dropout: sums and scaling happen within the products."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dropped: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scaling: float, layer: Prepacked
    ) -> torch.Tensor:
        low = (x if dropped is None else dropped).flatten(0, -2)
        inner = low @ a.T
        result = layer.product(x, layer.bias)
        result.view(-1, layer.out_features).addmm_(inner, b.T, alpha=scaling)
        ctx.layer, ctx.scaling, ctx.apart = layer, scaling, dropped is not None
        ctx.save_for_backward(low, inner, a, b)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, inner, a, b = ctx.saved_tensors
        gradient = gradient.contiguous()
        flat = gradient.flatten(0, -2)
        of_inner = (flat @ b).mul_(ctx.scaling)
        of_a, of_b = of_inner.T @ low, (inner.T @ flat).mul_(ctx.scaling).T
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = ctx.layer.transposed(gradient)
            if not ctx.apart:
                of_x.view(-1, ctx.layer.in_features).addmm_(of_inner, a)
        if ctx.apart and ctx.needs_input_grad[1]:
            of_dropped = (of_inner @ a).view(*gradient.shape[:-1], -1)
        return of_x, of_dropped, of_a, of_b, None, None


def _forward_with_lora(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Takes the place of the forward pass of PEFT's LoRA layer while its one adapter is on."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        result: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    (name,) = layer.active_adapters
    drop = layer.lora_dropout[name]
    dropped = None if isinstance(drop, torch.nn.Identity) or not layer.training else drop(x)
    product: torch.Tensor = _LowRank.apply(  # type: ignore[no-untyped-call]
        x, dropped, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], layer.base_layer
    )
    return product


def _forward_of_mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """Takes the place of the forward pass of a gated MLP: its activation and its gate happen within the products."""
    gate = mlp.gate_proj.product(x, mlp.gate_proj.bias, "swish")
    result: torch.Tensor = mlp.down_proj(mlp.up_proj.product.times(x, mlp.up_proj.bias, gate))
    return result


def _usable(weight: torch.Tensor) -> bool:
    """Says whether this torch has the operators (x86 and ARM builds do), and a weight's device and precision are theirs."""
    named = all(hasattr(_OPERATORS, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    there = named and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there) and weight.device.type == "cpu" and weight.dtype == torch.float32


def spare(size: int) -> bool:
    """Says whether so many bytes are at most half of the memory now free."""
    return size <= psutil.virtual_memory().available // 2


def prepack(model: Any, *, gradients: bool = False, whole: bool = False) -> bool:
    """Replaces the frozen fp32 linear layers of a model on the CPU, where torch has the operators and there is memory to spare.

    Adapters must be in place before, or read: PEFT knows linear layers by their class.

    Args:
        model: its layers are replaced in place. The output layer keeps `weight`, which the loss and the embeddings read.
        gradients: the model is trained: only frozen layers are replaced, and gradients pass through them.
        whole: nothing hooks into the model's layers nor trains them, so an MLP may be computed as one.

    Returns:
        Whether layers were replaced.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is torch.nn.Linear and not (gradients and layer.weight.requires_grad)
    ]
    weights = [layer.weight for _, _, layer in found]
    if not weights or not all(map(_usable, weights)):
        return False
    # One layout takes the place of the weight that it was made of; those of the output layer, and the transposed, come on top.
    more = sum(w.nbytes * gradients for w in weights) + (head.weight.nbytes if head is not None else 0)
    if not spare(more):
        return False
    for parent, name, layer in found:
        setattr(parent, name, Prepacked(layer, gradients=gradients, keep=layer is head))
    for mlp in model.modules() if whole else ():
        gated = all(isinstance(getattr(mlp, name, None), Prepacked) for name in ("gate_proj", "up_proj", "down_proj"))
        if gated and isinstance(mlp.act_fn, torch.nn.SiLU | SiLUActivation) and len(list(mlp.children())) == 4:
            mlp.forward = partial(_forward_of_mlp, mlp)
    for layer in model.modules() if gradients else ():
        if (
            type(layer) is lora.Linear
            and isinstance(layer.base_layer, Prepacked)
            and not layer.lora_variant
            and not any(layer.lora_bias.values())
        ):
            layer.forward = partial(_forward_with_lora, layer)
    return True
