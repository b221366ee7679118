"""Quantises the linear layers of a small model's file, in the formats of the tools that people use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

GROUP = 64
"""Weights of one row that share a scale."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Tensors = dict[str, Any]


def quantize(folder: Path, method: str) -> None:
    """Rewrite `folder`'s model.safetensors and config.json; embedding and head stay bf16."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors: Tensors = {}
    for name, tensor in load_file(file).items():
        if name.endswith("_proj.weight"):
            layer = int(name.split(".")[2])
            prefix = name.removesuffix("weight")
            parts = _METHODS[method](layer)(tensor.float())
            tensors |= {prefix + part: value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, file)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = _CONFIGS[method]
    (folder / "config.json").write_text(json.dumps(config))


def _awq(weight: Any) -> Tensors:
    values, scales, zeros = _int4(weight, symmetric=False)
    return {
        "qweight": _pack(values.t(), _AWQ_ORDER), "qzeros": _pack(zeros.t(), _AWQ_ORDER), "scales": scales.t().half(),
    }  # fmt: skip


def _gptq(weight: Any) -> Tensors:
    import torch

    values, scales, zeros = _int4(weight, symmetric=True)
    groups = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    packed = {"qweight": _pack(values).t(), "qzeros": _pack((zeros - 1).t()), "scales": scales.t().half()}
    return {**packed, "g_idx": groups}


def _gptq_desc_act(weight: Any) -> Tensors:
    """Groups of inputs that do not lie beside each other."""
    import torch

    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    values, scales, zeros = _int4(weight[:, order], symmetric=True)
    groups = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    values[:, order], groups[order] = values.clone(), groups.clone()
    packed = {"qweight": _pack(values).t(), "qzeros": _pack((zeros - 1).t()), "scales": scales.t().half()}
    return {**packed, "g_idx": groups}


def _w8a16(weight: Any) -> Tensors:
    import torch

    scales = weight.abs().amax(-1, keepdim=True) / 127
    values = (weight / scales).round().to(torch.int32) + 128
    shape = torch.tensor(weight.shape)
    return {"weight_packed": _pack(values, bits=8), "weight_scale": scales.bfloat16(), "weight_shape": shape}


def _fp8_tensor(weight: Any) -> Tensors:
    import torch

    scale = (weight.abs().max() / 448).reshape(1)
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale.float()}


def _w4a16(weight: Any) -> Tensors:
    import torch

    values, scales, _ = _int4(weight, symmetric=True)
    return {
        "weight_packed": _pack(values), "weight_scale": scales.bfloat16(), "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip


def _int8(weight: Any) -> Tensors:
    import torch

    scales = weight.abs().amax(-1, keepdim=True) / 127
    return {"weight": (weight / scales).round().to(torch.int8), "weight_scale": scales.bfloat16()}


def _fp8(weight: Any) -> Tensors:
    import torch

    scales = weight.abs().amax(-1, keepdim=True) / 448
    return {"weight": (weight / scales).to(torch.float8_e4m3fn), "weight_scale": scales.bfloat16()}


def _int4(weight: Any, symmetric: bool) -> tuple[Any, Any, Any]:
    """Values 0..15 (rows, columns), scales and zero points (rows, groups)."""
    import torch

    groups = weight.view(weight.shape[0], -1, GROUP)
    if symmetric:
        scales = groups.abs().amax(-1, keepdim=True) / 7
        zeros = torch.full_like(scales, 8)
    else:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scales = (high - low) / 15
        zeros = (-low / scales).round()
    values = (groups / scales + zeros).round().clamp(0, 15).to(torch.int32)
    return values.view(weight.shape), scales.squeeze(-1), zeros.squeeze(-1).to(torch.int32)


def _pack(values: Any, order: tuple[int, ...] = tuple(range(8)), bits: int = 4) -> Any:
    """As many values of the last dimension to one int32 as it has room for, the first in the lowest bits."""
    import torch

    count = 32 // bits
    together = values.contiguous().view(*values.shape[:-1], -1, count).to(torch.int64)
    packed = sum(together[..., position] << (bits * place) for place, position in enumerate(order[:count]))
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


_COMPRESSED: list[tuple[Callable[[Any], Tensors], str, dict[str, Any], dict[str, Any] | None]] = [
    (_w4a16, "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}, None),
    (_int8, "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, {"num_bits": 8, "type": "int"}),
    (_fp8, "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"},
     {"num_bits": 8, "type": "float"}),
]  # fmt: skip
"""(function, format, weights, inputs): one scheme after the other, layer by layer."""

_METHODS: dict[str, Callable[[int], Callable[[Any], Tensors]]] = {
    "awq": lambda _: _awq,
    "gptq": lambda _: _gptq,
    "gptq-desc-act": lambda _: _gptq_desc_act,
    "w8a16": lambda _: _w8a16,
    "fp8-tensor": lambda _: _fp8_tensor,
    "fp8-weights": lambda _: _fp8,
    "compressed-tensors": lambda layer: _COMPRESSED[layer % len(_COMPRESSED)][0],
}


def _compressed_group(index: int) -> dict[str, Any]:
    _, kind, weights, inputs = _COMPRESSED[index]
    return {
        "targets": [rf"re:.*layers\.({index}|{index + 3})\..*_proj"],
        "format": kind,
        "weights": {**weights, "symmetric": True, "dynamic": False},
        "input_activations": inputs and {**inputs, "symmetric": True, "dynamic": True, "strategy": "token"},
    }


def _compressed(kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """One scheme for all layers."""
    group = {
        "targets": ["Linear"], "format": kind, "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": inputs and {"symmetric": True, "dynamic": True, **inputs},
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


_FLOAT8 = {"num_bits": 8, "type": "float"}
_CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "gptq-desc-act": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": True},
    "w8a16": _compressed("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, None),
    "fp8-tensor": _compressed(
        "float-quantized", _FLOAT8 | {"strategy": "tensor"}, _FLOAT8 | {"strategy": "token"}
    ),
    "fp8-weights": _compressed("float-quantized", _FLOAT8 | {"strategy": "channel"}, None),
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {f"group_{index}": _compressed_group(index) for index in range(len(_COMPRESSED))},
    },
}  # fmt: skip
