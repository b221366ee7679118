"""What reaches into vLLM, against the installed vLLM, without an engine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.optional import needed
from support.tiny_llama import make_tiny_llama

from swap_agent.wire import requests

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def linear() -> Any:
    return needed("vllm_engine.adapter.linear")


@pytest.fixture(scope="module")
def torch() -> Any:
    return needed("torch")


def sampling(text: str, stream: bool = False) -> Any:
    from vllm_engine.adapter.requests import sampling_params

    return sampling_params(text, stream)


def test_sampling_parameters_given_as_strings_are_cast() -> None:
    params = sampling(
        '{"temperature": "0.1", "top_k": "5", "max_tokens": "64", "ignore_eos": "true", "stop": "x", "seed": null,'
        ' "logit_bias": {"7": "1.5"}, "stop_token_ids": ["3"], "n": 2}'
    )
    assert (params.temperature, params.top_k, params.max_tokens, params.ignore_eos) == (0.1, 5, 64, True)
    assert (params.stop, params.seed, params.logit_bias, params.n) == (["x"], None, {7: 1.5}, 2)
    assert params.stop_token_ids == [3]


def test_sampling_parameters_decide_between_deltas_and_one_final_output() -> None:
    from vllm.sampling_params import RequestOutputKind

    assert sampling("", stream=True).output_kind is RequestOutputKind.DELTA
    assert sampling("{}").output_kind is RequestOutputKind.FINAL_ONLY


def test_structured_outputs_come_as_a_json_string() -> None:
    assert sampling('{"structured_outputs": "{\\"choice\\": [\\"a\\", \\"b\\"]}"}').structured_outputs.choice == [
        "a",
        "b",
    ]


def parameters(embeds: bool, request: requests.Submit | requests.Embed) -> Any:
    from vllm_engine.adapter.requests import parameters

    return parameters("tiny/1#0", embeds, request)


def test_pooling_parameters() -> None:
    params = parameters(True, requests.Embed(1, "hi", '{"dimensions": ["64"], "use_activation": "false"}'))
    assert (params.task, params.dimensions, params.use_activation) == ("embed", 64, False)
    assert parameters(True, requests.Embed(1, "hi", '{"dimensions": 32}')).dimensions == 32
    assert parameters(True, requests.Embed(1, "hi", "")).dimensions is None


@pytest.mark.parametrize(
    ("embeds", "request_", "says"),
    [
        (True, requests.Submit(1, "hi", "", False), "Model tiny does not support 'generate' request"),
        (False, requests.Embed(1, "hi", ""), "Model tiny does not support 'embed' request"),
        (True, requests.Embed(1, "hi", "[1]"), "pooling_params is not a JSON object"),
        (True, requests.Embed(1, "hi", '{"dimension": 3}'), 'unknown key "dimension"; did you mean "dimensions"?'),
        (True, requests.Embed(1, "hi", '{"dimensions": "many"}'), "pooling_params: Expected `int | null`"),
    ],
)
def test_a_request_that_does_not_suit_the_model_is_refused(
    embeds: bool, request_: requests.Submit | requests.Embed, says: str
) -> None:
    from swap_agent.errors import TritonSwapError

    with pytest.raises(TritonSwapError) as caught:
        parameters(embeds, request_)
    assert caught.value.code == "INVALID_ARG"
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "sampling_parameters is not a JSON object"),
        ("[1]", "sampling_parameters is not a JSON object"),
        ('{"temprature": 1}', 'unknown key "temprature"; did you mean "temperature"?'),
        ('{"temperature": "hot"}', 'key "temperature": Expected `float`'),
        ('{"max_tokens": 1.5}', 'key "max_tokens"'),
        ('{"temperature": -1}', "temperature must be"),
        ('{"top_p": 2}', "top_p must be in"),
        ('{"n": 0}', "n must be"),
        ('{"output_kind": 1}', 'unknown key "output_kind"'),
        ('{"lora_name": "x"}', "LoRA feature is not enabled."),
        ('{"structured_outputs": {"colour": "red"}}', 'key "structured_outputs"'),
    ],
)
def test_malformed_sampling_parameters_name_the_key(text: str, says: str) -> None:
    from swap_agent.errors import TritonSwapError

    with pytest.raises(TritonSwapError) as caught:
        sampling(text)
    assert says in str(caught.value)
    assert caught.value.code == "INVALID_ARG"


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


def test_the_kv_hook_replaces_the_expected_buffers_and_nothing_else(torch: Any) -> None:
    from swap_agent.errors import Unsupported
    from vllm_engine.adapter.kv_frames import KVCacheInFrames

    given: list[int] = []

    def allocate(size: int) -> Any:
        given.append(size)
        return torch.ones(size, dtype=torch.int8)

    with KVCacheInFrames([4096], allocate) as hook:
        assert torch.zeros(4096, dtype=torch.float32).sum() == 0
        assert torch.zeros(64, dtype=torch.int8).sum() == 0
        assert torch.zeros(4096, dtype=torch.int8, device="cpu").sum() == 4096
        assert torch.zeros(4096, dtype=torch.int8, device="cpu").sum() == 0
    hook.check_all_replaced()
    assert given == [4096]
    with KVCacheInFrames([4096], allocate) as hook:
        torch.zeros((4096,), dtype=torch.uint8)
    with pytest.raises(Unsupported, match="allocates its KV cache in another way"):
        hook.check_all_replaced()


@pytest.mark.parametrize(("block_stride", "sizes"), [(0, [64, 128]), (16, [64])], ids=["one each", "one for all"])
def test_the_kv_buffers_that_a_layout_takes(block_stride: int, sizes: list[int], torch: Any) -> None:
    from vllm_engine.adapter.kv_frames import buffer_sizes

    tensors = [SimpleNamespace(size=size, block_stride=block_stride) for size in (64, 128)]
    assert buffer_sizes(SimpleNamespace(kv_cache_tensors=tensors)) == sizes
    assert buffer_sizes(SimpleNamespace(kv_cache_tensors=[])) == []


def test_a_vllm_without_the_hooks_message_queue_takes_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from swap_agent.errors import Unsupported

    message_queue = needed("vllm_engine.adapter.message_queue")
    from vllm_engine.adapter.executor import executor

    monkeypatch.delattr(message_queue.shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS", raising=False)  # as in 0.26
    assert executor(ranks=1) == "vllm_engine.adapter.executor.InProcessExecutor"
    with pytest.raises(Unsupported, match=r"several ranks needs vLLM 0\.32\.0 .*RECHECK.* tensor_parallel_size"):
        executor(ranks=2)


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

    quantized.check_method("awq")
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


def test_a_process_that_waits_for_another_falls_asleep_before_long(monkeypatch: pytest.MonkeyPatch) -> None:
    message_queue = needed("vllm_engine.adapter.message_queue")
    now_s, naps, yields = 100.0, 0, 0

    def sleep(seconds: float) -> None:
        nonlocal now_s, naps
        now_s, naps = now_s + seconds, naps + 1

    def sched_yield() -> None:
        nonlocal now_s, yields
        now_s, yields = now_s + 10e-6, yields + 1

    monkeypatch.setattr(message_queue, "time", SimpleNamespace(monotonic=lambda: now_s, sleep=sleep))
    monkeypatch.setattr(message_queue.os, "sched_yield", sched_yield)
    pause = message_queue.Pause()
    for _ in range(1000):
        pause()
    assert 45 <= yields <= 55 and naps == 1000 - yields, "half a millisecond, then 50 µs each"
    asleep = naps
    now_s += 1e-3  # it works on what came
    pause()
    assert naps == asleep, "the next wait begins anew"


def test_a_kv_cache_that_may_grow_is_laid_out_with_blocks_outermost_where_that_can_be(
    tmp_path: Path, torch: Any
) -> None:
    if find_spec("vllm.v1.kv_cache_layout") is None:
        pytest.skip("a KV cache grows from vLLM 0.32 on")
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_engine.adapter import args, kv_frames

    class AnyLayout(CPUAttentionBackend):  # type: ignore[misc]  # as FlashAttention on a GPU
        @classmethod
        def supported_kv_cache_layouts(cls) -> None:
            return None

    def preferred(backend: Any) -> str:
        return kv_frames.blocks_outermost_first([each.name for each in get_supported_kv_cache_layouts([backend])])[0]

    weights = make_tiny_llama(tmp_path, hidden=512, layers=4, tied=True)
    values = {"model": str(weights), "max_model_len": 512, "block_size": 32}
    config = args.engine_config(args.engine_args(values))
    spec = FullAttentionSpec(block_size=32, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)
    specs = {f"model.layers.{layer}.self_attn.attn": spec for layer in range(4)}
    steps = {}
    for layout in ("LBNHC", preferred(CPUAttentionBackend), preferred(AnyLayout)):
        config.cache_config.kv_cache_layout = layout
        planned = kv_frames.planned_config(config, specs, 64 << 20)
        blocks = kv_frames.planned_layout(config, planned, 2 << 20)
        steps[layout] = (len(blocks.ranges), blocks.frames(1), blocks.frames(17), blocks.most_frames)
    # 16 blocks of all layers to a frame, or 64 of one layer.
    assert steps == {"LBNHC": (4, 4, 4, 32), "LBHNC": (4, 4, 4, 32), "BLNHC": (1, 1, 2, 32)}
