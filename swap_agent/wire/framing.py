"""Length-prefixed msgpack messages over Unix stream sockets, asyncio and blocking, with file descriptors on the latter.

A frame is a big-endian unsigned 32-bit length, then that many bytes of msgpack. A frame that is too long, cut short or
not of the expected types raises `ProtocolError`; the reader closes that connection and no other.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from swap_agent.errors import PeerGone, ProtocolError

CONTROL_LIMIT_BYTES = 16 << 20
"""Control and memory plane: the longest message is a manifest of some ten thousand extents."""
DATA_LIMIT_BYTES = 64 << 20
"""Data plane: a prompt of a few million tokens."""
FDS_PER_MESSAGE = 128
"""Half of Linux's SCM_MAX_FD (253), so that a batch fits whatever the kernel reserves."""

_LENGTH = struct.Struct("!I")
_PEERCRED = struct.Struct("3i")

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of all messages; the class name is the tag on the wire."""


def encode(message: Message) -> bytes:
    """One frame holding `message`."""
    payload = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(payload)) + payload


def peer(sock: Any) -> tuple[int, int]:
    """(pid, uid) of the process that connected or listens at the other end (SO_PEERCRED, unix(7))."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _gid = _PEERCRED.unpack(raw)
    return pid, uid


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0600; a leftover file there is replaced. Raises OSError."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(old)
    sock.listen(128)
    return sock


class AsyncChannel(Generic[T]):
    """One end of a connection on an asyncio loop; `T` is the union of messages it receives."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        receives: Any,
        limit_bytes: int = CONTROL_LIMIT_BYTES,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)
        self._limit_bytes = limit_bytes
        self.pid, self.uid = peer(writer.get_extra_info("socket"))

    @classmethod
    async def connect(cls, path: str, receives: Any, limit_bytes: int = CONTROL_LIMIT_BYTES) -> AsyncChannel[T]:
        """Connect to the socket at `path`. Raises OSError when no process listens there."""
        reader, writer = await asyncio.open_unix_connection(path)
        return cls(reader, writer, receives, limit_bytes)

    def fileno(self) -> int:
        """Descriptor of the socket, to poll for the peer's end while the loop is blocked."""
        sock: Any = self._writer.get_extra_info("socket")
        return int(sock.fileno())

    async def receive(self) -> T:
        """The next message. Raises PeerGone at the end of the stream, ProtocolError on a malformed frame."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > self._limit_bytes:
                raise ProtocolError(f"a message of {length} bytes exceeds the limit of {self._limit_bytes}")
            payload = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise PeerGone("the connection was closed") from error
        return _decode(self._decoder, payload)

    def send(self, message: Message) -> None:
        """Queue `message`; never blocks. Messages to a closed peer are dropped: `receive` reports the end."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def drain(self, timeout_s: float | None = None) -> None:
        """Wait until the peer has taken enough of what was queued. Raises PeerGone, TimeoutError."""
        try:
            if self._writer.transport.get_write_buffer_size() == 0:
                await self._writer.drain()  # does not wait, but raises what ended the connection
            else:
                await asyncio.wait_for(self._writer.drain(), timeout_s)
        except ConnectionError as error:
            raise PeerGone("the connection was closed") from error

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._writer.close()

    def abort(self) -> None:
        """Close the connection without sending what is queued."""
        self._writer.transport.abort()

    async def closed(self) -> None:
        """Close the connection and return when it is closed."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class Channel(Generic[T]):
    """One end of a blocking connection that can carry file descriptors; used by one thread at a time."""

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)
        self.pid, self.uid = peer(sock)

    @classmethod
    def connect(cls, path: str, receives: Any) -> Channel[T]:
        """Connect to the socket at `path`. Raises OSError when no process listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        return cls(sock, receives)

    def send(self, message: Message, fds: list[int] | None = None) -> None:
        """Send `message` and up to FDS_PER_MESSAGE descriptors with it; the caller still owns its copies.

        Raises PeerGone.
        """
        data = encode(message)
        try:
            if fds:
                sent = socket.send_fds(self._sock, [data], fds)
                data = data[sent:]
            self._sock.sendall(data)
        except OSError as error:
            raise PeerGone(f"the connection was closed: {error}") from error

    def receive(self, timeout_s: float | None = None) -> tuple[T, list[int]]:
        """The next message and the descriptors on it, which the caller then owns.

        Raises PeerGone at the end of the stream, ProtocolError on a malformed frame, TimeoutError.
        """
        fds: list[int] = []
        try:
            self._sock.settimeout(timeout_s)
            header = self._receive_exactly(_LENGTH.size, fds)
            (length,) = _LENGTH.unpack(header)
            if length > CONTROL_LIMIT_BYTES:
                raise ProtocolError(f"a message of {length} bytes exceeds the limit of {CONTROL_LIMIT_BYTES}")
            return _decode(self._decoder, self._receive_exactly(length, fds)), fds
        except BaseException as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise PeerGone(f"the connection was closed: {error.strerror}") from error
            raise

    def _receive_exactly(self, count: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < count:
            part, ancillary, flags, _ = self._sock.recvmsg(
                count - len(data), socket.CMSG_LEN(FDS_PER_MESSAGE * array.array("i").itemsize)
            )
            for level, kind, raw in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(raw[: len(raw) - len(raw) % received.itemsize])
                    fds.extend(received)
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("more file descriptors on one message than allowed, or the limit of open files")
            if not part:
                raise PeerGone("the connection was closed")
            data += part
        return data

    def close(self) -> None:
        """Close the connection; idempotent. A `receive` in another thread raises PeerGone."""
        with contextlib.suppress(OSError):  # not connected any more
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _decode(decoder: msgspec.msgpack.Decoder[T], payload: bytes) -> T:
    try:
        return decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"not a message of this conversation: {error}") from error
