"""Every error that triton-swap raises on purpose.

TritonSwapError
├── InvalidModel       a model's configuration cannot work: the user has to change it
├── InvalidUsage       a flag, a device, a path or a port cannot work: the user has to change it
├── Unavailable        cannot be served now; trying later can succeed
│   ├── OutOfDeviceMemory  a device has not that many free frames
│   ├── OutOfHostMemory    the machine has not that much memory left
│   └── RolledBack         a swap-in failed and was undone: the model is SWAPPED as before
├── Unsupported        this version does not do it
├── MirrorMismatch     a mirror is not of what an engine has: its weights come from disk
├── WeightsCorrupted   weights in memory are not what they were: bad memory, or a bug
├── AccountingError    frames were lost or counted twice: a bug
├── Refusal            another process of triton-swap said no; carries its code
├── PeerGone           the process at the other end of a connection closed it or died
└── ProtocolError      a peer sent what this conversation does not allow
"""

from __future__ import annotations

from typing import Literal

Code = Literal["INVALID_ARG", "UNAVAILABLE", "NOT_FOUND", "CANCELLED", "UNSUPPORTED", "INTERNAL"]
"""Error codes; the names are those of Triton's `TRITONSERVER_Error_Code`."""


class TritonSwapError(Exception):
    """Base class; the text is one line for a person."""

    code: Code = "INTERNAL"
    """The code of an answer that carries this error."""


class InvalidModel(TritonSwapError):
    """A model's configuration cannot work."""

    code = "INVALID_ARG"


class InvalidUsage(TritonSwapError):
    """What was asked for on the command line or through the API cannot work."""

    code = "INVALID_ARG"


class Unavailable(TritonSwapError):
    """Not now; trying later can succeed."""

    code = "UNAVAILABLE"


class Unsupported(TritonSwapError):
    """This version does not do it."""

    code = "UNSUPPORTED"


class OutOfDeviceMemory(Unavailable):
    """A device has not that many free frames."""


class OutOfHostMemory(Unavailable):
    """The machine has not that much memory left for a mirror, a staging or a preserved KV cache."""


class RolledBack(Unavailable):
    """A swap-in failed and was undone: the model is SWAPPED as before, its mirror intact."""


class MirrorMismatch(TritonSwapError):
    """A mirror does not hold what an engine asks of it."""


class WeightsCorrupted(TritonSwapError):
    """Weights in memory are not what they were."""


class AccountingError(TritonSwapError):
    """Frames were lost or counted twice."""


class Refusal(TritonSwapError):
    """Another process of triton-swap refused; `code` and text are its own."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class PeerGone(TritonSwapError):
    """The process at the other end closed the connection or died."""

    code = "UNAVAILABLE"


class ProtocolError(TritonSwapError):
    """A peer sent what this conversation does not allow."""
