"""Quantised weights in frames, without an engine."""

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


def int8_layer(torch: Any, rows: int, symmetric: bool) -> tuple[Any, Any, Any]:
    """A kernel of vLLM's, its layer as it is before repacking, and the weight that it stands for."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    config = cpu.Int8ScaledMMLinearLayerConfig(
        is_static_input_scheme=False, is_channelwise=True, input_symmetric=symmetric
    )
    names = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
    kernel = cpu.CPUInt8ScaledMMLinearKernel(config, names)
    layer = torch.nn.Module()
    layer.logical_widths, layer.bias, layer.input_scale, layer.input_zero_point = [rows], None, None, None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (rows, 64), generator=generator, dtype=torch.int8)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(torch.full((rows, 1), 0.01), requires_grad=False)
    return kernel, layer, weight.float() * 0.01


def test_int8_weights_stay_in_parameters(torch: Any, linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_engine.adapter import quantized

    monkeypatch.setenv("VLLM_CPU_SGL_KERNEL", "1")  # 0.26 has its packed kernels off
    if not quantized.int8_kernel_works():
        pytest.skip("no packed int8 kernel on this CPU")
    kernel, layer, weight = int8_layer(torch, 96, symmetric=True)
    with quantized.in_parameters():
        kernel.process_weights_after_loading(layer)
    x = torch.randn(7, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    expected = x.float() @ weight.t()
    got = kernel.apply_weights(layer, x).float()
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert layer.weight.untyped_storage().nbytes() >= weight.numel()
    layer.weight.data.zero_()
    assert not torch.equal(kernel.apply_weights(layer, x).float(), got)


@pytest.mark.parametrize(("rows", "symmetric"), [(96, False), (80, True)], ids=["asymmetric inputs", "odd size"])
def test_int8_weights_that_only_onednn_takes_are_refused(torch: Any, linear: Any, rows: int, symmetric: bool) -> None:
    from swap_agent.errors import Unsupported
    from vllm_engine.adapter import quantized

    if rows % 32 and torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM packs this size itself on this CPU")
    kernel, layer, _ = int8_layer(torch, rows, symmetric)
    with quantized.in_parameters(), pytest.raises(Unsupported, match=rf"int8 weight of {rows} x 64 in oneDNN's"):
        kernel.process_weights_after_loading(layer)


def test_a_quantisation_that_was_not_seen_in_frames_is_refused_by_name(linear: Any) -> None:
    from swap_agent.errors import Unsupported
    from vllm_engine.adapter import quantized

    quantized.check_method("compressed-tensors")
    with pytest.raises(Unsupported, match=r"quantized \(fp8\).* only AWQ, GPTQ and compressed-tensors"):
        quantized.check_method("fp8")


def test_a_weight_that_a_kernel_keeps_to_itself_is_refused(torch: Any, linear: Any) -> None:
    from swap_agent.errors import Unsupported
    from vllm_engine.adapter import quantized

    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    layer = model[0]
    layer.view_of_the_weight, layer.constant = layer.weight.data[3:], torch.zeros(16)
    layer.quant_method = SimpleNamespace(kernel=SimpleNamespace())
    quantized.check_all_registered(model)
    layer.quant_method.kernel.packed = torch.zeros(64, 64)
    with pytest.raises(Unsupported, match=r"0 \(SimpleNamespace\) keeps 16384 bytes in packed"):
        quantized.check_all_registered(model)


def test_int4_is_refused_where_vllm_has_no_kernel_for_it(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from swap_agent.errors import Unsupported
    from vllm_engine.adapter import quantized

    monkeypatch.setattr(quantized, "int4_kernel_exists", lambda: False)
    for method in ("awq", "auto_gptq"):
        with pytest.raises(Unsupported, match=f"quantized \\({method}\\), and vLLM computes .* with AVX512 only"):
            quantized.check_method(method)
    quantized.check_method("compressed-tensors")
    monkeypatch.setattr(quantized, "int4_kernel_exists", lambda: True)
    quantized.check_method("awq")
