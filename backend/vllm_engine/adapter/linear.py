"""Linear layers whose weights are ordinary tensors, so that they can live in frames.

Stock vLLM on CPU repacks each weight into private memory of oneDNN. Here a bf16 weight is repacked with vLLM's own
kernel for small matrices, whose packed form is a tensor of the same size (faster than oneDNN's at decode where the CPU
has AVX512-BF16); any other goes through `torch.nn.functional.linear`, where asked for in float32 on a CPU without
AVX512. See docs/adr/0002.

Tried on vLLM 0.32.0, and on 0.26.0, whose `_C.weight_packed_linear` is another: there all goes through F.linear. vLLM
calls `dispatch_cpu_unquantized_gemm` once per linear and vocabulary layer after loading. The operators
`_C.convert_weight_packed` and `_C.weight_packed_linear` are tried at run time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from vllm import _custom_ops as ops
from vllm.model_executor.layers import utils as vllm_layers
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_engine.adapter import quantized
from vllm_engine.adapter.patch import Patch

ROWS_PER_BLOCK = 32
"""Packed form of an (n, k) weight: (n / 32, k / 2, 32, 2), pairs along k innermost (csrc/cpu/sgl-kernels/gemm.cpp)."""

FLOAT32_PROMPTS = "TRITON_SWAP_FLOAT32_PROMPTS"
"""Environment variable; `1`: a CPU without AVX512 computes prompts in float32. They take an eighth of the time; an
answer may then depend, in the last bit of bf16, on the requests beside it."""
FLOAT32_ROWS = 8
"""From as many rows of input on, a bf16 product is faster in float32 on a CPU without AVX512 (2 cores of Zen 3)."""
FLOAT32_WEIGHTS = 1 << 22
"""Weights that are float32 at a time: 16 MiB beside the model, whatever its size."""

log = logging.getLogger(__name__)


def load_with_ordinary_weights(
    load: Callable[[], None], model: Callable[[], torch.nn.Module], *, placeholders: bool = False
) -> None:
    """Call `load`, which loads `model()`, so that its linear weights end up in registered parameters.

    With `placeholders` the weights have no content yet: what is made of them has the right form and none either.
    Raises Unsupported when the hook is gone.
    """
    pack = packing_works()
    in_float32 = os.environ.get(FLOAT32_PROMPTS) == "1" and not torch.cpu._is_avx512_supported()
    pack_weight = _placeholder if placeholders else _pack
    if not pack:
        log.warning("no packed bf16 kernel in this vLLM on this CPU: F.linear, slower than stock vLLM at decode")

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        # Vocabulary layers (remove_weight=False) serve as embedding too; _pack_vocabulary decides about them.
        if pack and remove_weight and _fits(layer.weight):
            _use_packed(layer, pack_weight(layer.weight))
        else:
            layer.cpu_linear = float32_linear if in_float32 else F.linear

    with Patch(vllm_layers, "dispatch_cpu_unquantized_gemm", dispatch), quantized.in_parameters():
        load()
    if pack:
        _pack_vocabulary(model(), pack_weight)


def float32_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` for a CPU without AVX512, where torch multiplies bf16 matrices 8 times slower than float32 ones.

    `x` is (…, k), `weight` (n, k), `bias` (n). Products of bf16 numbers are exact in float32 and are rounded once, as
    in `F.linear`; the order of the sum may differ.
    """
    if weight.dtype is not torch.bfloat16 or x.numel() < FLOAT32_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    single = x.float()
    parts = weight.split(max(1, FLOAT32_WEIGHTS // weight.shape[1]))
    product = torch.cat([F.linear(single, part.float()) for part in parts], dim=-1)
    return (product if bias is None else product + bias.float()).to(x.dtype)


def _pack_vocabulary(model: torch.nn.Module, pack_weight: Callable[[torch.Tensor], torch.nn.Parameter]) -> None:
    """Pack the weight of every vocabulary layer that computes logits, once for tied layers.

    An input embedding tied to one reads its rows out of the packed form, bit by bit the same.
    """
    layers: dict[int, list[torch.nn.Module]] = {}
    heads: set[int] = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, VocabParallelEmbedding) and type(layer.quant_method) is UnquantizedEmbeddingMethod:
            group = layers.setdefault(id(layer.weight), [])
            if all(layer is not other for other in group):
                group.append(layer)
            if isinstance(layer, ParallelLMHead) or name.rpartition(".")[2] == "lm_head":
                heads.add(id(layer.weight))
    for key in heads:
        group = layers[key]
        if _fits(group[0].weight):
            packed = pack_weight(group[0].weight)
            for layer in group:
                _use_packed(layer, packed)
                layer.quant_method = PackedEmbeddingMethod()


def packing_works() -> bool:
    """True when this CPU and this vLLM have the kernel and its packed form is the one known here."""
    if not torch.cpu._is_avx512_bf16_supported() or not hasattr(ops, "weight_packed_linear_cpu"):
        return False
    weight = torch.arange(64 * 64, dtype=torch.int16).view(64, 64).view(torch.bfloat16)
    expected = weight.view(torch.int16).view(2, ROWS_PER_BLOCK, 32, 2).permute(0, 2, 1, 3).flatten()
    return bool(torch.equal(_pack(weight).data.view(torch.int16).flatten(), expected))


class PackedEmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]  # vLLM has no types here
    """Embedding and logits from one packed weight."""

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Rows `input_` of the weight, shape (*input_.shape, k)."""
        packed: Any = layer.packed_weight
        rows, columns = packed.shape
        blocks = packed.view(rows // ROWS_PER_BLOCK, columns // 2, ROWS_PER_BLOCK, 2)
        picked = blocks[input_ // ROWS_PER_BLOCK, :, input_ % ROWS_PER_BLOCK]
        return picked.reshape(*input_.shape, columns)


def _fits(weight: torch.Tensor) -> bool:
    return (
        not weight.is_meta
        and weight.ndim == 2
        and weight.dtype == torch.bfloat16
        and weight.shape[0] % ROWS_PER_BLOCK == 0
        and weight.shape[1] % 32 == 0
    )


def _pack(weight: torch.Tensor) -> torch.nn.Parameter:
    packed = torch.ops._C.convert_weight_packed(weight.detach().contiguous())
    return torch.nn.Parameter(packed, requires_grad=False)


def _placeholder(weight: torch.Tensor) -> torch.nn.Parameter:
    """What `_pack` would return, without content."""
    return torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=False)


def _use_packed(layer: torch.nn.Module, packed: torch.nn.Parameter) -> None:
    """Compute with `packed`. As stock vLLM does after repacking, `weight` becomes empty: a direct use fails loudly."""
    layer.packed_weight = packed
    layer.weight = torch.nn.Parameter(torch.empty(0, dtype=packed.dtype), requires_grad=False)

    def linear(x: torch.Tensor, _weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        bias = None if bias is None else bias.float()  # the kernel adds it in fp32
        return ops.weight_packed_linear_cpu(x, packed, packed.shape[0], bias)

    layer.cpu_linear = linear
