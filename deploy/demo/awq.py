"""AWQ's INT4 storage format, "gemm" version, in which the production Llama is stored.

For a linear layer with weight W of shape [out, in] and groups of `GROUP` input features:
  scales  [in / GROUP, out]      fp16
  qzeros  [in / GROUP, out / 8]  int32, eight 4-bit zero points each
  qweight [in, out / 8]          int32, eight 4-bit values each
and W[o, i] is (q - zero) * scale. Within an int32 the columns are in the order `ORDER`, lowest bits first.

Values are rounded to the nearest. AWQ's search for scales that protect salient channels needs calibration activations
and does not change the format. Models this small keep their answers without it.
"""

import torch

GROUP = 128
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIG = {"quant_method": "awq", "bits": BITS, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[out, in] floats -> values [in, out], zeros [in / GROUP, out] (int32, 0..15), scales [in / GROUP, out] (fp16)."""
    columns = weight.detach().float().t()
    inputs, outputs = columns.shape
    if inputs % GROUP or outputs % 8:
        raise ValueError(f"cannot group {inputs} inputs by {GROUP} or pack {outputs} outputs by 8")
    groups = columns.reshape(inputs // GROUP, GROUP, outputs)
    low = groups.amin(1).clamp(max=0)
    high = groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-5).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    values = (groups / scales.float().unsqueeze(1)).round() + zeros.unsqueeze(1)
    return values.clamp(0, 15).reshape(inputs, outputs).int(), zeros.int(), scales


def dequantise(values: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `quantise` up to rounding: [out, in] floats."""
    inputs, outputs = values.shape
    groups = values.reshape(-1, GROUP, outputs) - zeros.unsqueeze(1)
    return (groups * scales.float().unsqueeze(1)).reshape(inputs, outputs).t().contiguous()


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    """The weight that an engine computes with after INT4."""
    return dequantise(*quantise(weight))


def pack(values: torch.Tensor) -> torch.Tensor:
    """[n, out] of 0..15 -> [n, out / 8] int32."""
    eights = values.long().reshape(values.shape[0], -1, 8)
    packed = torch.zeros(eights.shape[:2], dtype=torch.int64)
    for place, column in enumerate(ORDER):
        packed |= eights[:, :, column] << (BITS * place)
    # Above 2^31 the same bits are a negative int32.
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def tensors(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint stores for the linear layer `name` (without ".weight")."""
    values, zeros, scales = quantise(weight)
    return {f"{name}.qweight": pack(values), f"{name}.qzeros": pack(zeros), f"{name}.scales": scales}
