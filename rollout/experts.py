"""Routed experts: found in a model, multiplied with other weights than it holds, and held packed in MXFP4.

transformers keeps the routed experts of a layer in one module, as three-dimensional weights, and looks up in a registry how to multiply them.
`substitute_weights` registers a function of ours there that calls the one in force (grouped or one by one) on the same module seen with other
weights. Nothing in the model is edited and no parameter renamed, so checkpoints, ZeRO and optimizers see what they always saw. Training puts
fake-quantised weights there (opd/qat.py), sampling decoded ones: one code path, so that both multiply the same numbers in the same way.

The input of a product is the last dimension of a weight [E, out, in]; gpt-oss stores [E, in, out], and is turned round for quantisation, since FP4
blocks run along the input.

E: experts.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from rollout.fp4 import BLOCK, PackedFP4, decode, fake_quantize, quantize, scale_spread

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""Parameters of a module of routed experts that are matrices; biases stay as they are."""

SUBSTITUTED = "opd_substituted"
"""Our name in transformers' registry of experts implementations."""

Multiply = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""Runs an experts module's product with the given weights in place of its own; the other inputs are bound."""

Substitution = Callable[[nn.Module, Multiply], torch.Tensor]
"""Called in place of an experts module's forward; calls its second argument with the weights to use."""


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold routed experts as three-dimensional weights, by name."""
    return {name: module for name, module in model.named_modules() if _is_experts(module)}


def require_quantizable(model: PreTrainedModel, role: str) -> dict[str, nn.Module]:
    """The experts modules of a model, if FP4 can be attached to all of them.

    Raises ValueError where there are none, where transformers does not look their product up in its registry, and where an input dimension is no
    multiple of a block.
    """
    experts = find_experts(model)
    if not experts:
        raise ValueError(f"the {role} ({model.config.model_type}) has no routed experts to quantise to FP4")
    for name, module in experts.items():
        if "is_transposed" not in vars(module):  # set by the decorator that makes the class use the registry
            raise ValueError(f"the experts {name} of the {role} ({type(module).__name__}) are not multiplied through transformers' registry: FP4 needs that")
        for weight, (_, inputs) in ((weight, _matrix_shape(module, weight)) for weight in EXPERT_WEIGHTS):
            if inputs % BLOCK:
                raise ValueError(f"{name}.{weight} of the {role} has {inputs} inputs, no multiple of FP4's block of {BLOCK}")
    return experts


def substitute_weights(model: PreTrainedModel, substitution: Substitution) -> None:
    """Have every experts module of the model multiply what `substitution` chooses. A second call takes the place of the first."""
    for module in find_experts(model).values():
        if "substitution" not in vars(module):
            module.own_product = _product_in_force(module)
        module.substitution = substitution
    ALL_EXPERTS_FUNCTIONS.register(SUBSTITUTED, _substituted_forward)
    model.set_experts_implementation(SUBSTITUTED)


def input_last(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight of an experts module as [E, out, in]; the inverse of itself. A view where the module stores [E, in, out]."""
    return weight.transpose(-2, -1) if module.is_transposed else weight


def fake_quantized(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """FP4 values of a weight of an experts module, in the module's own layout and contiguous."""
    return input_last(module, fake_quantize(input_last(module, weight))).contiguous()


def copy_with_packed_experts(model: PreTrainedModel, role: str) -> PreTrainedModel:
    """A copy of a model whose routed experts are held packed and decoded, layer by layer, when they are multiplied.

    The experts' weights never exist twice in full. Raises as `require_quantizable`.
    """
    experts = require_quantizable(model, role)
    shared = {id(getattr(module, weight)): getattr(module, weight) for module in experts.values() for weight in EXPERT_WEIGHTS}
    packed = copy.deepcopy(model, memo=shared)
    substitute_weights(packed, _decoded_product)
    for module in find_experts(packed).values():
        for weight in EXPERT_WEIGHTS:
            tensor = getattr(module, weight)
            delattr(module, weight)
            module.packed_dtype = tensor.dtype
            module.register_buffer(_codes(weight), None)
            module.register_buffer(_scale(weight), None)
            pack_weight(module, weight, tensor)
    return packed


def find_packed(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Packed weights by the name the parameter had: (module, name in it)."""
    found = {}
    for name, module in model.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        found |= {f"{name}.{weight}": (module, weight) for weight in EXPERT_WEIGHTS if _codes(weight) in buffers}
    return found


def scale_spread_of_experts(weight: str, packed: PackedFP4) -> torch.Tensor:
    """Spread of the scales in each 128 x 128 block of the experts' matrices, flattened; gate and up projections are two matrices, not one."""
    parts = 2 if weight == "gate_up_proj" else 1
    codes, scale = (tensor.unflatten(-2, (parts, -1)) for tensor in (packed.codes, packed.scale))
    return scale_spread(PackedFP4(codes, scale)).flatten()


def is_packed_buffer(name: str) -> bool:
    """Whether a name in a state dict is that of packed codes or scales."""
    return name.endswith(tuple(suffix(weight) for weight in EXPERT_WEIGHTS for suffix in (_codes, _scale)))


def pack_weight(module: nn.Module, weight: str, tensor: torch.Tensor) -> None:
    """Put a full weight, in the module's own layout, packed into a module of `copy_with_packed_experts`."""
    packed = quantize(input_last(module, tensor))
    setattr(module, _codes(weight), packed.codes)
    setattr(module, _scale(weight), packed.scale)


def packed_weight(module: nn.Module, weight: str) -> PackedFP4:
    """A packed weight [E, out, in]."""
    return PackedFP4(getattr(module, _codes(weight)), getattr(module, _scale(weight)))


def decoded_weight(module: nn.Module, weight: str) -> torch.Tensor:
    """The values of a packed weight, in the module's own layout and the dtype it had."""
    return input_last(module, decode(packed_weight(module, weight), module.packed_dtype)).contiguous()


class _ModuleWithWeights:
    """An experts module with some of its weights replaced; everything else is the module's."""

    def __init__(self, module: nn.Module, weights: dict[str, torch.Tensor]):
        self.__dict__.update(weights, replaced=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replaced, name)


def _substituted_forward(module: nn.Module, *inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
    return module.substitution(module, lambda weights: module.own_product(_ModuleWithWeights(module, weights), *inputs, **named))


def _decoded_product(module: nn.Module, multiply: Multiply) -> torch.Tensor:
    return multiply({weight: decoded_weight(module, weight) for weight in EXPERT_WEIGHTS})


def _product_in_force(module: nn.Module) -> Callable:
    """The function that multiplies this module's experts now: one of the registry, or the loop of its own class."""
    return ALL_EXPERTS_FUNCTIONS.get_interface(module.config._experts_implementation, type(module).forward.__wrapped__)


def _matrix_shape(module: nn.Module, weight: str) -> tuple[int, int]:
    """(outputs, inputs) of an experts module's weight."""
    _, first, second = getattr(module, weight).shape
    return (second, first) if module.is_transposed else (first, second)


def _codes(weight: str) -> str:
    return f"{weight}_codes"


def _scale(weight: str) -> str:
    return f"{weight}_scale"


def _is_experts(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return set(EXPERT_WEIGHTS) <= names
