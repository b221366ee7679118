from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.optional import needed

torch = needed("torch")

from vllm_engine.rank import model_digest, relocate  # noqa: E402


class Method:
    """As vLLM's layers hold one; the test says that it is vLLM's."""

    __module__ = "vllm.model_executor.layers.linear"

    def __init__(self) -> None:
        self.scale = 0.5
        self.settings = Settings()


class Settings:
    __module__ = "vllm.config.model"

    def __init__(self) -> None:
        self.instance = object()
        self.seed = 1


class Model(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, fill: float = 0.0) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.tied = self.inner.weight
        self.register_buffer("scale", torch.full((2,), fill))
        for parameter in self.parameters():
            torch.nn.init.constant_(parameter, fill)
        self.method = Method()
        self.table = torch.arange(3)
        self.alias = self.inner.weight.data[1:]
        packed = self.inner.weight
        self.linear = lambda x: x @ packed
        self.numbers = {"k": [1.0, None, "x"]}


def digest(model: Any) -> str:
    return model_digest.digest(model, relocate.plan(model, torch.device("cpu")))


def test_what_lies_in_extents_does_not_count() -> None:
    assert digest(Model(0.0)) == digest(Model(3.0))


CHANGES: dict[str, Callable[[Any], object]] = {
    "a number computed from weights": lambda model: setattr(model.method, "scale", 0.25),
    "a number in a container": lambda model: model.numbers["k"].append(2.0),
    "a tensor of its own": lambda model: model.table.add_(1),
    "where an alias begins": lambda model: setattr(model, "alias", model.inner.weight.data[2:]),
    "what is tied": lambda model: setattr(model, "tied", torch.nn.Parameter(model.tied.clone())),
    "a function's own tensor": lambda model: setattr(model, "linear", (lambda w: lambda x: x @ w)(torch.ones(4, 4))),
    "a parameter's form": lambda model: setattr(model.inner, "weight", torch.nn.Parameter(model.inner.weight.t())),
    "a type": lambda model: setattr(model, "method", object()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_everything_else_counts(what: str) -> None:
    model = Model()
    CHANGES[what](model)
    assert digest(model) != digest(Model())
