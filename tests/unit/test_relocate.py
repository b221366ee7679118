from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from support.optional import needed

torch = needed("torch")

from swap_agent.errors import Unsupported  # noqa: E402
from vllm_engine.rank import relocate  # noqa: E402
from vllm_engine.rank.space import Space  # noqa: E402

FRAME = 2 << 20
CPU = torch.device("cpu")


class Model(torch.nn.Module):  # type: ignore[misc]
    """Tied weights, a transposed view, a buffer, an alias outside of the module's registers, nothing in a list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Parameter(torch.randn(700, 512), requires_grad=False)
        self.head = self.embedding
        self.transposed = torch.nn.Parameter(torch.randn(64, 300).t(), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(33).to(torch.bfloat16), requires_grad=False)
        self.empty = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.25), persistent=False)
        self.plain_alias = self.embedding.data[10:20, ::2]
        self.plain_scale = self.scale.view(1)


@pytest.fixture
def space() -> Iterator[Space]:
    space = Space(FRAME)
    yield space
    space.unmap({})


def map_region(space: Space, region: relocate.Region, size: int) -> list[int]:
    frames = -(-size // FRAME)
    space.reserve(region, frames)
    fds = [os.memfd_create("triton-swap-frame") for _ in range(frames)]
    for fd in fds:
        os.truncate(fd, FRAME)
    space.map(region, 0, fds)
    return fds


def inside(space: Space, region: relocate.Region, tensor: torch.Tensor) -> bool:
    start = space.address(region)
    return start <= tensor.data_ptr() < start + space.regions[region] * FRAME


def test_the_layout_counts_every_storage_once_and_keeps_alignment() -> None:
    layout = relocate.plan(Model(), CPU)
    assert [(extent.name, extent.bytes) for extent in layout.weights] == [
        ("embedding", 700 * 512 * 4),
        ("transposed", 64 * 300 * 4),
        ("bias", 33 * 2),
    ]
    assert [(extent.name, extent.dtype, extent.shape) for extent in layout.state] == [("scale", "float32", ())]
    assert all(extent.offset % relocate.ALIGNMENT_BYTES == 0 for extent in [*layout.weights, *layout.state])
    assert layout.size("weights") == layout.weights[-1].offset + 66


def test_moved_tensors_keep_value_shape_stride_and_sharing(space: Space) -> None:
    model = Model()
    names = ["embedding", "head", "transposed", "bias", "scale", "plain_alias", "plain_scale"]
    before = {name: getattr(model, name).clone() for name in names}
    strides = {name: getattr(model, name).stride() for name in names}
    layout = relocate.plan(model, CPU)
    fds = map_region(space, "weights", layout.size("weights")) + map_region(space, "state", layout.size("state"))
    relocate.move(layout, space)
    for name in names:
        tensor = getattr(model, name)
        assert torch.equal(tensor, before[name]), name
        assert tensor.stride() == strides[name], name
        assert inside(space, "state" if "scale" in name else "weights", tensor), name
    assert model.head is model.embedding
    assert model.plain_alias.data_ptr() == model.embedding[10].data_ptr()
    assert isinstance(model.bias, torch.nn.Parameter)

    model.scale.fill_(0.5)  # a change of state shows through every alias, and in the frame
    assert model.plain_scale.item() == 0.5
    assert struct.unpack("f", os.pread(fds[-1], 4, 0)) == (0.5,)
    for fd in fds:
        os.close(fd)


def test_the_originals_are_freed(space: Space) -> None:
    def resident_bytes() -> int:
        with open("/proc/self/statm") as statm:  # noqa: PTH123  # as cheap as it gets
            resident, shared = (int(field) for field in statm.read().split()[1:3])
        return (resident - shared) * 4096

    module = torch.nn.Module()
    for number in range(16):
        module.register_parameter(f"p{number}", torch.nn.Parameter(torch.ones(1 << 20), requires_grad=False))
    layout = relocate.plan(module, CPU)
    fds = map_region(space, "weights", layout.size("weights"))
    before = resident_bytes()
    relocate.move(layout, space)
    assert before - resident_bytes() > 0.95 * (64 << 20)
    assert module.p15.sum().item() == 1 << 20
    for fd in fds:
        os.close(fd)


def test_a_storage_that_a_buffer_shares_is_state() -> None:
    module = torch.nn.Module()
    weight = torch.nn.Parameter(torch.ones(8), requires_grad=False)
    module.register_parameter("weight", weight)
    module.register_buffer("view", weight.data[2:4])
    layout = relocate.plan(module, CPU)
    assert (layout.weights, [extent.name for extent in layout.state]) == ([], ["weight"])


def test_a_tensor_that_cannot_be_swapped_is_named() -> None:
    module = torch.nn.Module()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(Unsupported, match=r"sparse is torch\.sparse_coo on cpu"):
        relocate.plan(module, CPU)
