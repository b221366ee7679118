"""Quantised weights in frames: which methods may load, and int8 layers that stay out of oneDNN's private memory.

vLLM's CPU kernels repack a layer's weights into parameters of it, which move into frames as they are. Its int8 kernel
alone gives them to oneDNN, unless the CPU has AMX; the packed kernel that it uses then needs no more than AVX512-VNNI.

Tried on vLLM 0.32.0 and 0.26.0, which uses that kernel only with VLLM_CPU_SGL_KERNEL=1. The operators
`_C.convert_weight_packed` and `_C.int8_scaled_mm_with_quant` are tried at run time. Without AVX512, vLLM's build has no
`_C.cpu_gemm_wna16`: an engine with int4 weights would start, and die of its first request.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.kernels.linear.scaled_mm import cpu as scaled_mm
from vllm.platforms import current_platform

from swap_agent.errors import Unsupported
from vllm_engine.adapter.patch import Patch

METHODS = ("auto_gptq", "awq", "compressed-tensors")
"""vLLM's names (`ModelConfig.quantization`) of the methods whose weights were seen in frames."""
_INT4 = ("auto_gptq", "awq")
"""Methods of `METHODS` that always run on vLLM's int4 kernel. Of compressed-tensors, int4 schemes do."""
TRY_ANYWAY = "TRITON_SWAP_TRY_ANY_QUANTIZATION"
"""Environment variable; `1` lets any method load. Weights that no swap would reach are refused all the same."""
SMALL_BYTES = 4096
"""Constants that a layer may keep beside its parameters."""
_TILE = 32
"""Rows and columns of an int8 weight come in multiples of it (csrc/cpu/sgl-kernels/gemm_int8.cpp)."""


def check_method(method: str) -> None:
    """Raise Unsupported for a quantisation whose weights were not seen in frames, unless the user wants to try it."""
    if os.environ.get(TRY_ANYWAY) == "1":
        return
    if not current_platform.is_cpu():
        raise Unsupported(
            f"the weights are quantized ({method}), which was not tried on a GPU yet: use others, or set "
            f"{TRY_ANYWAY}=1 to try them anyway"
        )
    if method not in METHODS:
        raise Unsupported(
            f"the weights are quantized ({method}), and of quantized weights only AWQ, GPTQ and compressed-tensors "
            "are supported: use one of these, or unquantized weights"
        )
    if method in _INT4 and not int4_kernel_exists():
        raise Unsupported(
            f"the weights are quantized ({method}), and vLLM computes with int4 weights on CPUs with AVX512 only, "
            "which this one lacks: use unquantized weights"
        )


def int4_kernel_exists() -> bool:
    """False when vLLM would call an operator for int4 weights that its build for this CPU does not have."""
    return not hasattr(ops, "cpu_gemm_wna16") or hasattr(torch.ops._C, "cpu_gemm_wna16")


@contextmanager
def in_parameters() -> Iterator[None]:
    """While active, loading packs int8 weights into parameters, or raises Unsupported where it cannot."""
    works = int8_kernel_works()
    off = not getattr(envs, "VLLM_CPU_SGL_KERNEL", True)  # 0.26 has the switch

    def check(n: int, k: int, dtype: torch.dtype) -> bool:
        fits = dtype is torch.int8 and n % _TILE == 0 and k % _TILE == 0
        return (works and fits) or vllms.original(n, k, dtype)

    def refuse(weight: torch.Tensor, *_: Any) -> None:
        k, n = weight.shape
        why = (
            "this CPU has no AVX512-VNNI" if not works
            else "this vLLM's packed kernels are off (VLLM_CPU_SGL_KERNEL=1 turns them on)" if off
            else "its inputs are quantized asymmetrically, or its sizes are no multiples of 32"
        )  # fmt: skip
        raise Unsupported(
            f"vLLM keeps an int8 weight of {n} x {k} in oneDNN's private memory, out of a swap's reach, since {why}: "
            "use int4 (AWQ, GPTQ), int8 weights with symmetric inputs, or unquantized weights"
        )

    vllms = Patch(scaled_mm, "check_cpu_sgl_kernel", check)
    with vllms, Patch(ops, "create_onednn_scaled_mm", refuse):
        yield


def int8_kernel_works() -> bool:
    """True when vLLM's packed int8 kernel computes what it should on this CPU."""
    weight = torch.arange(64 * 64).remainder(255).sub(127).view(64, 64).to(torch.int8)
    x = torch.eye(64, dtype=torch.bfloat16)[:8] * 127
    try:
        packed = torch.ops._C.convert_weight_packed(weight)
        got = torch.ops._C.int8_scaled_mm_with_quant(x, packed, torch.full((64, 1), 1 / 127), None, x.dtype, True)
    except (AttributeError, RuntimeError):
        return False  # a build or a CPU without it
    return bool(torch.allclose(got.float(), weight[:, :8].t().float(), atol=1))


def check_all_registered(model: torch.nn.Module) -> None:
    """Raise Unsupported when a layer keeps more than constants outside of its parameters and buffers.

    No swap would free the memory of these tensors.
    """
    registered = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        scheme = getattr(module, "scheme", None)
        for holder in (module, method, scheme, getattr(method, "kernel", None), getattr(scheme, "kernel", None)):
            for attribute, value in getattr(holder, "__dict__", {}).items():
                if not issubclass(type(value), torch.Tensor) or value.is_meta:
                    continue
                storage = value.untyped_storage()
                if storage.nbytes() > SMALL_BYTES and storage.data_ptr() not in registered:
                    raise Unsupported(
                        f"{name} ({type(holder).__name__}) keeps {storage.nbytes()} bytes in {attribute}, which is no "
                        "parameter and no buffer: a swap would not free them; use another quantization"
                    )
