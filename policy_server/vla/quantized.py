"""Base weights of 8 or 4 bits, for small cards.  A product computes with the numbers that they stand for:

    int8   w = scale * q         -128 <= q <= 127, a scale for each output
    int4   w = scale * q + low      0 <= q <=  15, a scale and a low for each GROUP inputs of an output

Only the linear layers of the towers, the projector and the decoder: head, embeddings, norms and the state's projector
stay as they are, and so do adapters, which are added beside.  The arithmetic is torchao's.  It is another model than
the one that was stored: near to it, and provably equal to nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from policy_server.vla.lora import linears
from policy_server.vla.model import VLA

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

Bits = Literal["int8", "int4"]

QUANTIZED = ("vision_backbone.", "projector.", "language_model.model.")
GROUP, ROWS = 32, 16
"""What the inputs and the outputs of a layer must be multiples of to fit 4 bits; other layers get 8."""
REMARKING = ("torchao", "torch.utils._pytree")
"""Whose remarks, on kernels for other machines, would only puzzle."""


class CannotQuantize(ValueError):
    """These bits are not to be had here.  The message says why, in a sentence."""


def quantize(model: VLA, bits: Bits, device: torch.device) -> None:
    """Quantises layer by layer on the way to the device, which never holds the model as it was.

    Raises CannotQuantize.
    """
    for name in REMARKING:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        eight = Int8WeightOnlyConfig(set_inductor_config=False)
        four = eight if bits == "int8" else _four_bits(device, model.language_model.lm_head.weight.dtype)
    except ImportError as error:
        raise CannotQuantize(
            f"{bits} weights need the package torchao 0.18, pip install 'vla-rl[quantized]'"
        ) from error
    for layer in [layer for name, layer in linears(model).items() if name.startswith(QUANTIZED)]:
        fits = layer.in_features % GROUP == 0 and layer.out_features % ROWS == 0
        quantize_(layer, four if fits else eight, device=device)
    model.to(device)


def _four_bits(device: torch.device, dtype: torch.dtype) -> AOBaseConfig:
    """The same numbers in the layout of the device's own kernel."""
    if device.type == "cuda":
        from torchao.quantization import Int4WeightOnlyConfig
        from torchao.quantization.quantize_.workflows import Int4PackingFormat

        if dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0):
            raise CannotQuantize(
                f"int4 weights on CUDA need dtype bfloat16 and compute capability 8.0, got {dtype} and"
                f" {torch.cuda.get_device_capability(device)}"
            )
        layout = Int4PackingFormat.TILE_PACKED_TO_4D
        return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=layout, set_inductor_config=False)
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


def stored_bytes(module: nn.Module) -> int:
    """What the parameters take in memory."""
    return sum(part.nbytes for parameter in module.parameters() for part in plain_parts(parameter))


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a quantised one is made of; of a plain one, itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]
