"""Linear layers whose weights are ordinary tensors, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.optional import needed

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own


@pytest.fixture(scope="module")
def linear() -> Any:
    return needed("vllm_engine.adapter.linear")


@pytest.fixture(scope="module")
def torch() -> Any:
    return needed("torch")


def test_a_packed_weight_multiplies_as_the_plain_one(linear: Any, torch: Any) -> None:
    if not linear.packing_works():
        pytest.skip("no packed bf16 kernel in this vLLM on this CPU")
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter((torch.randn(96, 256) / 16).to(torch.bfloat16), requires_grad=False)
    plain = layer.weight.data.clone()
    linear._use_packed(layer, linear._pack(layer.weight))
    assert layer.weight.numel() == 0
    assert layer.packed_weight.shape == plain.shape
    for rows in (1, 3, 64):
        x, bias = torch.randn(rows, 256).to(torch.bfloat16), torch.randn(96).to(torch.bfloat16)
        exact = x.double() @ plain.double().t() + bias.double()
        error = (layer.cpu_linear(x, layer.weight, bias).double() - exact).abs().max()
        assert error <= exact.abs().max() / 128  # bf16 has 8 bits of mantissa


@pytest.mark.parametrize("rows", [1, 7, 8, 64])
def test_a_product_in_float32_is_the_plain_one(
    rows: int, linear: Any, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "FLOAT32_WEIGHTS", 20 * 256)  # 96 rows in five parts
    torch.manual_seed(0)
    weight, bias = (torch.randn(96, 256) / 16).to(torch.bfloat16), torch.randn(96).to(torch.bfloat16)
    x = torch.randn(2, rows, 256).to(torch.bfloat16)[:1]
    for b in (None, bias):
        exact = x.double() @ weight.double().t() + (0 if b is None else b.double())
        got = linear.float32_linear(x, weight, b)
        assert (got.shape, got.dtype) == ((1, rows, 96), torch.bfloat16)
        assert (got.double() - exact).abs().max() <= exact.abs().max() / 256  # rounded once
    assert torch.equal(linear.float32_linear(x.float(), weight.float()), x.float() @ weight.float().t())


def test_rows_read_out_of_a_packed_weight_are_the_same_bits(linear: Any, torch: Any) -> None:
    if not linear.packing_works():
        pytest.skip("no packed bf16 kernel in this vLLM on this CPU")
    weight = torch.randn(64, 128).to(torch.bfloat16)
    layer = SimpleNamespace(packed_weight=linear._pack(weight))
    tokens = torch.tensor([[0, 63, 31], [32, 5, 5]])
    rows = linear.PackedEmbeddingMethod().embedding(layer, tokens)
    assert torch.equal(rows.view(torch.int16), torch.nn.functional.embedding(tokens, weight).view(torch.int16))


def test_a_vllm_without_the_linear_hook_is_refused(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from swap_agent.errors import Unsupported

    monkeypatch.delattr(linear.vllm_layers, "dispatch_cpu_unquantized_gemm")
    with pytest.raises(Unsupported, match="dispatch_cpu_unquantized_gemm"):
        linear.load_with_ordinary_weights(lambda: None, lambda: None)
