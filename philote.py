#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["simple-websocket>=1.1", "PyJWT>=2.14"]
# ///
"""Philote: a WebSocket publish/subscribe server in one file.

    python philote.py            # serves ws://localhost:6380
    python philote.py --help     # the other commands: token, subscribe, publish

A client connects with a JSON Web Token that lists the channels it may read and write. What one
connection writes to a channel, every other connection that may read it receives:

    client -> server    {"channel": "news", "data": "hello"}
    server -> others    {"issuer":"0f8fad5b-d9cb-469f-a165-70867728950e",
                         "channel":"news","data":"hello"}
    server -> client    {"error": "forbidden", "reason": "..."}    where it may not write there

The way of a message. One thread, that of the publisher's connection, walks all of it; nobody hands
over to anybody:

    socket -> SocketAdapter, read_frames -> WebSocket.receive (JSON, access key)
           -> Batch, ChannelRegistry.publish -> WriterQueue of each subscriber -> sockets

There are three kinds of thread:

    accept      Server.serve_forever: accepts, starts a thread per connection
    connection  RequestHandler.run: reads a request, answers it, and where it is an upgrade
                becomes WebSocket.run: reads frames, publishes messages, writes them to the
                subscribers' sockets
    keeper      Keeper.run: writes to the sockets that were full, and looks at each connection
                when it is due (request deadline, heartbeat, expiry of its token, end of its
                closing handshake)

Left out on purpose: storage and replay of messages, TLS (a proxy does that), compression (it would
cost each connection some 300 KB and each message its shared frame), clusters of servers, Windows.

The sections, in the order of a message's way: settings, access keys, messages, frames, writer
queues, connections, channel registry, HTTP requests, server, client, command line.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import email.utils
import errno
import functools
import hashlib
import heapq
import http
import ipaddress
import itertools
import json
import json.encoder
import logging
import math
import os
import platform
import re
import resource
import selectors
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

try:
    import jwt
    import simple_websocket
    import wsproto.events
    from wsproto.connection import Connection, ConnectionType
    from wsproto.utilities import ProtocolError
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"philote: {error.name} is missing; install it with: pip install simple-websocket PyJWT")

__version__ = "1.0.0"
__all__ = [
    "AccessKey", "Client", "ConnectionClosed", "Forbidden", "Message", "PhiloteError", "Server",
    "Settings", "SettingsError", "Unauthorized", "new_token",
]

log = logging.getLogger("philote")


# ----------------------------------------------------------------------------------------- settings
# What an operator can choose, from the environment. One table is the parser and the documentation
# of what is allowed.

class SettingsError(ValueError):
    """Settings that are not allowed, one line for each."""


def _number(low: float, high: float, convert: type = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?" if convert is float else "[0-9]+", text, re.ASCII):
            raise ValueError
        if not low <= (number := convert(text[:400])) <= high:
            raise ValueError
        return number
    return parse


def _parse_level(text: str) -> str:
    if text.lower() not in _LEVELS:
        raise ValueError
    return text.lower()


def _parse_origins(text: str) -> bool | tuple[str, ...]:
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    origins = tuple(origin.strip().lower() for origin in text.split(","))
    if not all(re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+", origin) for origin in origins):
        raise ValueError
    return origins


def _parse_secret(text: str) -> str:
    try:
        jwt.encode({}, _signing_key(text), algorithm="HS256")
    except jwt.PyJWTError:
        raise ValueError from None
    return text


_LEVELS = {
    "debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING,
    "error": logging.ERROR, "fatal": logging.CRITICAL, "panic": logging.CRITICAL,
}
_SIZE = (_number(1, 2**30), "a number of bytes from 1 to 1073741824")
_SECONDS = (_number(0, 86400, float), "a number of seconds from 0 to 86400")
_ALLOWED: dict[str, tuple[Callable[[str], Any], str]] = {
    "secret": (_parse_secret, "any text that is not a public key, a certificate or a JWK"),
    "host": (str, "an address or name of this machine, or nothing for all"),
    "port": (_number(0, 65535), "a number from 0 to 65535"),
    "loglevel": (_parse_level, "one of " + ", ".join(_LEVELS)),
    "max_connections": (_number(1, 10**6), "a number from 1 to 1000000"),
    "max_message_size": _SIZE,
    "max_queue_size": _SIZE,
    "max_message_rate": (
        _number(0, 10**9, float), "a number of messages a second, or 0 for no limit"),
    "read_buffer_size": _SIZE,
    "write_buffer_size": _SIZE,
    "check_origin": (
        _parse_origins, "true, false, or a list of origins such as https://example.com"),
    "ping_interval": _SECONDS,
    "shutdown_timeout": _SECONDS,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the server may do. Sizes are in bytes, times in seconds."""

    secret: str = dataclasses.field(default="", repr=False)
    host: str = ""
    port: int = 6380
    loglevel: str = "info"
    max_connections: int = 255
    max_message_size: int = 1 << 20
    max_queue_size: int = 1 << 20
    max_message_rate: float = 0
    read_buffer_size: int = 1024
    write_buffer_size: int = 1024
    check_origin: bool | tuple[str, ...] = False
    ping_interval: float = 25
    shutdown_timeout: float = 10

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from variables named like the fields, in capitals.

        Raises SettingsError that lists all that are not allowed, a line each.
        """
        values, errors = {}, []
        for name, (parse, allowed) in _ALLOWED.items():
            if (text := environ.get(name.upper())) is not None:
                try:
                    values[name] = parse(text)
                except ValueError:
                    shown = "what is set" if name == "secret" else repr(text[:80])
                    errors.append(f"{name.upper()}: {shown} is not allowed; it takes {allowed}")
        if errors:
            raise SettingsError("\n".join(errors))
        return cls(**values)

    @property
    def max_strangers(self) -> int:
        """How many connections may be without a finished handshake at a time."""
        return max(64, self.max_connections)


# -------------------------------------------------------------------------------------- access keys
# A JSON Web Token (RFC 7519), signed with the server's secret, says which channels its bearer may
# read and write.

MAX_TOKEN_SIZE = 8192  # bytes; a longer one is refused before any work is spent on it
_END_OF_TIME = 253402300799  # the year 9999; a number far larger would fit no clock
_ALGORITHMS = ["HS256", "HS384", "HS512"]
_UNJUDGED: Any = {
    "verify_aud": False, "verify_iss": False, "verify_sub": False, "verify_jti": False,
}


class TokenError(ValueError):
    """A token that lets nobody in; its text says why."""


class AccessKey(NamedTuple):
    """What a token allows."""

    read: frozenset[str] = frozenset()
    write: frozenset[str] = frozenset()
    expires: float | None = None  # seconds since the epoch
    api: bool = False  # whether it may see what the server is doing


def _signing_key(secret: str) -> bytes:
    # HMAC pads its key with zero bytes (RFC 2104, section 2), so this changes no signature; but
    # PyJWT refuses the empty key, which is the default that the original's clients sign with, and
    # warns of a short one at every use.
    return secret.encode("utf-8", "surrogateescape").ljust(64, b"\0")


def new_token(secret: str, read: Iterable[str] = (), write: Iterable[str] = (),
              expires_in: float | None = None, api: bool = False) -> str:
    """Make a token for the channels `read` and `write`.

    It is valid for `expires_in` seconds (None: for ever). `api` opens /api/info and /metrics too.
    """
    claims: dict[str, Any] = {"read": list(read), "write": list(write)}
    if expires_in is not None:
        claims["exp"] = math.ceil(time.time() + expires_in)
    if api:
        claims["api"] = True
    return jwt.encode(claims, _signing_key(secret), algorithm="HS256")


def decode_token(token: str, secret: str) -> AccessKey:
    """Verify a token and read its claims. Raises TokenError."""
    if len(token) > MAX_TOKEN_SIZE:
        raise TokenError(f"the token is longer than {MAX_TOKEN_SIZE} bytes")
    try:
        claims = jwt.decode(token, _signing_key(secret), algorithms=_ALGORITHMS, options=_UNJUDGED)
    except jwt.ExpiredSignatureError:
        raise TokenError("the token has expired") from None
    except jwt.ImmatureSignatureError:
        raise TokenError("the token is not valid yet") from None
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):  # PyJWT lets all of these out
        raise TokenError(
            "the token is malformed, or not signed with this server's secret") from None
    for name in ("exp", "nbf", "iat"):
        if name in claims and type(claims[name]) not in (int, float):
            raise TokenError(f"the token's claim {name} must be a number")
    expires = min(claims["exp"], _END_OF_TIME) if "exp" in claims else None
    return AccessKey(_channel_names(claims, "read"), _channel_names(claims, "write"), expires,
                     claims.get("api") is True)


def _channel_names(claims: dict[str, Any], name: str) -> frozenset[str]:
    names = claims.get(name)
    if names is None:
        return frozenset()
    if not isinstance(names, list) or not all(
            isinstance(channel, str) and channel for channel in names):
        raise TokenError(f"the token's claim {name} must be a list of channel names")
    return frozenset(names)


# ----------------------------------------------------------------------------------------- messages
# JSON in, JSON out. These functions are pure.

class BadMessage(ValueError):
    """Not a JSON object with a channel and data; its text says what is wrong."""

    code = "bad_message"


class Message(NamedTuple):
    """A message as a subscriber receives it."""

    issuer: str  # the connection that published it, a UUID
    channel: str
    data: str


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # the library takes NaN and Infinity, RFC 8259 does not


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)
_quote, _quote_ascii = json.encoder.encode_basestring, json.encoder.encode_basestring_ascii


def decode_json(text: str) -> Any:
    """Decode JSON text from outside. Raises BadMessage, whatever the text holds."""
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise BadMessage(f"not JSON: {error}") from None
    except (ValueError, RecursionError):  # a number of 5,000 digits, NaN; 200,000 brackets
        raise BadMessage(
            "not JSON that can be read: a number too long, a nesting too deep, or NaN") from None


def check_message(value: Any) -> tuple[str, str]:
    """Take (channel, data) from a decoded message. Raises BadMessage.

    Keys are matched exactly first, then whatever their case, as Go's encoding/json does: the
    original's Go client sends "Channel" and "Data". Missing or null data is the empty string.
    """
    if type(value) is not dict:
        raise BadMessage(f"a message is a JSON object, not {_shown(value)}")
    channel, data = value.get("channel"), value.get("data")
    if "channel" not in value or "data" not in value:
        folded = {key.lower(): value[key] for key in value}
        channel, data = (
            value.get("channel", folded.get("channel")), value.get("data", folded.get("data")))
    if type(channel) is not str or not channel:
        raise BadMessage(f"channel must be a string that is not empty, not {_shown(channel)}")
    if data is None:
        return channel, ""
    if type(data) is not str:
        raise BadMessage(f"data must be a string, not {_shown(data)}")
    return channel, data


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):  # may be large, or nested as deep as can be
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def encode_head(issuer: str, channel: str) -> str:
    """Encode the part of a message that one issuer's messages on one channel share."""
    return f'{{"issuer":{_quote(issuer)},"channel":{_quoted(channel)}'


def encode_message(head: str, data: str) -> bytes:
    """Encode a message; data that is empty is left out, as Go's omitempty does."""
    return (f'{head},"data":{_quoted(data)}}}' if data else head + "}").encode()


def _quoted(text: str) -> str:
    # A lone surrogate can stand in JSON as an escape, but not in UTF-8.
    return (_quote(text) if text.isascii() or not re.search("[\ud800-\udfff]", text)
            else _quote_ascii(text))


def encode_error(code: str, reason: str) -> bytes:
    """Encode what a client is told when its message or request was refused."""
    return json.dumps({"error": code, "reason": reason}).encode()


# ------------------------------------------------------------------------------------------- frames
# RFC 6455, section 5. What the server sends is not masked, so one encoded frame serves all
# subscribers. What clients send is cut into frames here; the common one, a whole text message, is
# also decoded here (a factor of 4 on incoming messages), every other one is left as it is for
# simple-websocket, which judges it.

TEXT, CLOSE, PING = 1, 8, 9  # opcodes
# Close codes.
NORMAL, GOING_AWAY, POLICY, TOO_BIG, INTERNAL, EXPIRED = 1000, 1001, 1008, 1009, 1011, 4401
_XOR = [bytes(a ^ b for a in range(256)) for b in range(256)]


class MessageTooBig(ValueError):
    """A frame that makes its message exceed MAX_MESSAGE_SIZE; known before its payload was read."""


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """Encode a whole, unmasked frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def encode_text_frames(payloads: Sequence[bytes]) -> bytes:
    """Encode a text frame for each payload, one behind the other."""
    return b"".join([encode_frame(TEXT, payload) for payload in payloads])


def encode_close(code: int, reason: str) -> bytes:
    """Encode a close frame; the reason is ASCII of at most 123 bytes (RFC 6455, section 5.5.1)."""
    return encode_frame(CLOSE, struct.pack("!H", code) + reason.encode())


def unmask(mask: bytes, payload: bytes) -> bytes:
    """Apply a masking key of 4 bytes (RFC 6455, section 5.3)."""
    size = len(payload)
    if size > 1000:  # four strides, each by a table
        masked = bytearray(payload)
        for i in range(4):
            masked[i::4] = masked[i::4].translate(_XOR[mask[i]])
        return bytes(masked)
    # one exclusive or of two very long integers
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")).to_bytes(
        size, "little")


def _is_well_formed(first: int, second: int, size: int) -> bool:
    # What simple-websocket refuses for the frame's head alone it gets at once, without waiting for
    # the payload.
    if first & 0x70 or not second & 0x80 or first & 15 not in (0, 1, 2, 8, 9, 10):
        return False
    if first & 8:
        return bool(first & 0x80) and size <= 125
    return size >= _LEAST[second & 0x7F] and size < 1 << 63


_LEAST = [0] * 126 + [126, 65536]  # the sizes must be written in the shortest form


def _gather(part: bytes, size: int) -> Generator[None, bytes, bytes]:
    buffer = bytearray(part)
    while len(buffer) < size:
        buffer += yield None
    return bytes(buffer)


def read_frames(max_message_size: int) -> Generator[str | bytes | None, bytes, NoReturn]:
    """Cut a client's bytes into frames; a coroutine without any input or output of its own.

    It yields a str for a text message that came whole in one frame, bytes for any other frame (as
    it came), and None when it needs more bytes, given to it by send(). Raises MessageTooBig.
    """
    data, at = b"", 0
    # Whether a message's fragments are under way, and their bytes so far.
    fragmented, message_size = False, 0
    while True:
        have = len(data) - at
        size = data[at + 1] & 0x7F if have >= 2 else 0
        head = 6 if size < 126 else 8 if size == 126 else 14
        if have < head - 4:
            rest, data = data[at:], b""  # nothing big is held while it waits
            data, at = rest + (yield None), 0
            continue
        first, second = data[at], data[at + 1]
        if size >= 126:
            size = int.from_bytes(data[at + 2:at + head - 4], "big")
        if not _is_well_formed(first, second, size):
            yield data[at:]
            data, at = (yield None), 0
            continue
        if not first & 8:
            message_size += size
            if message_size > max_message_size:
                raise MessageTooBig
        end = at + head + size
        if end > len(data):
            data, at, end = (yield from _gather(data[at:], end - at)), 0, end - at
        if first == 0x80 | TEXT and not fragmented:
            body = at + head
            try:
                yield unmask(data[body - 4:body], data[body:end]).decode()
            except UnicodeDecodeError:
                yield data[at:end]
        else:
            yield data[at:end]
        if not first & 8:
            fragmented = not first & 0x80
            message_size = message_size if fragmented else 0
        at = end


# ------------------------------------------------------------------------------------ writer queues
# What waits to be written to one socket. Whoever put something there writes it, in its own thread
# and without waiting: no thread is woken for the ordinary case. Only what a full socket did not
# take is left for the keeper's thread, so a subscriber that does not read costs the others nothing.

_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
_BUFFERS_PER_WRITE = 64  # in one system call; every system has room for more (IOV_MAX is 1024)


class WriterQueue:
    """A socket with a queue in front. All writing to the socket and its closing are done here."""

    __slots__ = ("sock", "keeper", "limit", "on_overflow", "pending", "writing", "unsent", "size",
                 "sent", "full", "overflowed", "finished", "closed")

    def __init__(self, sock: socket.socket, keeper: Keeper, limit: int) -> None:
        self.sock = sock
        self.keeper = keeper
        self.limit = limit  # bytes that may wait behind the frame that is being written
        self.on_overflow: Callable[[], None] = self.abort
        # Put by any thread: deque.append is thread-safe.
        self.pending: collections.deque[bytes] = collections.deque()
        self.writing = threading.Lock()  # guards all below, each write to the socket, and its close
        # Taken from pending, in order.
        self.unsent: collections.deque[bytes | memoryview] = collections.deque()
        self.size = 0  # bytes in unsent
        self.sent = 0  # bytes written so far
        self.full = False  # the socket took no more; the keeper waits for it
        self.overflowed = False  # more than the limit has waited
        self.finished = False  # what is in unsent is the last to be written
        self.closed = False

    def put(self, data: bytes) -> None:
        """Queue data; it is written by the next flush()."""
        self.pending.append(data)

    def flush(self) -> None:
        """Write what the socket takes without waiting. Any thread."""
        # A thread that finds the lock taken leaves its data to the holder; so the holder looks
        # again after letting go.
        while self.pending and self.writing.acquire(False):
            try:
                overflow = self._write()
            finally:
                self.writing.release()
            if overflow:
                self.on_overflow()

    def finish(self, last: bytes, discard: bool = False) -> None:
        """Queue the last data: later puts are dropped; our half of the connection ends behind it.

        With `discard`, what was queued is dropped too, but for the rest of what is half written.
        """
        with self.writing:
            if not self.finished:
                self._take()
                if discard:
                    half = [data for data in self.unsent if isinstance(data, memoryview)]
                    self.unsent = collections.deque(half)
                    self.size = sum(map(len, half))
                if last:
                    self.unsent.append(last)
                    self.size += len(last)
                self.finished = True
            self._write_unsent()

    def resume(self) -> None:
        """Go on after the socket was full. The keeper's thread."""
        with self.writing:
            if not self.closed:
                self.full = False
                self._take()
                self._write_unsent()
        self.flush()  # what others left to the holder of the lock

    def abort(self) -> None:
        """Drop what waits and end the connection, which wakes the thread reading it. Any thread."""
        with self.writing:
            self._give_up()

    def drain(self) -> None:
        """Read and drop until the peer has closed. The thread that reads the socket.

        A close with unread input would destroy what was just sent. The keeper ends this by abort()
        where a peer takes too long.
        """
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass

    def close(self) -> None:
        """Close the socket. The thread that reads it, as its last act."""
        with self.writing:
            self._give_up()
            self.closed = True
            if not self.full:
                self.sock.close()
                return
        self.keeper.request(self)  # it closes the socket once its selector has let go of it

    # The holder of `writing`

    def _write(self) -> bool:
        # Returns whether this is the moment when too much is left.
        if self.unsent or self.finished:
            self._take()
            self._write_unsent()
        elif not self.pending:  # somebody else has written it meanwhile
            return False
        else:
            data = self.pending.popleft()
            if self.pending:
                data = b"".join([data, *(self.pending.popleft() for _ in range(len(self.pending)))])
            try:
                sent = self.sock.send(data, _DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._give_up()
                return False
            self.sent += sent
            if sent == len(data):
                return False
            self.unsent.append(memoryview(data)[sent:] if sent else data)
            self.size = len(data) - sent
            self._wait_for_room()
        # The frame that is being written does not count, so that one message always fits.
        if self.finished or self.overflowed or self.size - len(self.unsent[0]) <= self.limit:
            return False
        self.overflowed = True
        return True

    def _take(self) -> None:
        for _ in range(len(self.pending)):
            data = self.pending.popleft()
            if not self.finished:
                self.unsent.append(data)
                self.size += len(data)

    def _write_unsent(self) -> None:
        while self.unsent and not self.full:
            try:
                sent = self.sock.sendmsg(
                    list(itertools.islice(self.unsent, _BUFFERS_PER_WRITE)), (), _DONTWAIT)
            except BlockingIOError:
                self._wait_for_room()
            except OSError:
                self._give_up()
            else:
                self._drop(sent)
        if self.finished and not self.unsent and not self.closed:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    def _drop(self, sent: int) -> None:
        self.sent += sent
        self.size -= sent
        while self.unsent and sent >= len(self.unsent[0]):
            sent -= len(self.unsent.popleft())
        if sent:
            self.unsent[0] = memoryview(self.unsent[0])[sent:]

    def _wait_for_room(self) -> None:
        self.full = True
        self.keeper.request(self)

    def _give_up(self) -> None:
        self.finished = True
        self.pending.clear()
        self.unsent.clear()
        self.size = 0
        if not self.closed:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


_LONGEST_PAUSE = 3600  # seconds; selectors take no number of any size


class Keeper(threading.Thread):
    """The one thread beside the connections': it waits for full sockets and for points in time."""

    def __init__(self) -> None:
        super().__init__(name="philote-keeper", daemon=True)
        self.lock = threading.Lock()  # guards the next three
        self.requests: list[WriterQueue] = []  # queues to be watched or closed
        # A heap of (due, number of a peer); the older of two entries is void.
        self.timers: list[tuple[float, int]] = []
        self.peers: dict[int, tuple[float, Peer]] = {}  # number: (due, peer)
        self.selector = selectors.DefaultSelector()  # used by run() alone
        # A byte written to the bell ends the keeper's wait.
        self.alarm, self.bell = socket.socketpair()
        for end in (self.alarm, self.bell):
            # A full pipe means that the keeper has been woken: nobody waits for it.
            end.setblocking(False)
        self.selector.register(self.alarm, selectors.EVENT_READ)
        self.stopped = False

    # Any thread

    def request(self, queue: WriterQueue) -> None:
        """Ask for queue.resume() when its socket is writable.

        For a queue that is `closed`, ask for its socket's close.
        """
        with self.lock:
            self.requests.append(queue)
        self._wake()

    def look_at(self, peer: Peer, due: float, unless_asked: bool = False) -> None:
        """Ask for peer.look() at a point of the monotonic clock, in place of any asked before."""
        with self.lock:
            if peer.forgotten or (unless_asked and peer.number in self.peers):
                return
            first = not self.timers or due < self.timers[0][0]
            self.peers[peer.number] = (due, peer)
            heapq.heappush(self.timers, (due, peer.number))
        if first:
            self._wake()

    def forget(self, peer: Peer) -> None:
        """Ask for no look() at a peer any more."""
        with self.lock:
            peer.forgotten = True
            self.peers.pop(peer.number, None)
            if len(self.timers) > 2 * len(self.peers) + 64:  # most are void by now
                self.timers = [(due, number) for number, (due, _) in self.peers.items()]
                heapq.heapify(self.timers)

    def stop(self) -> None:
        """End the thread, and wait for it."""
        self.stopped = True
        self._wake()
        if self.is_alive():
            self.join(1)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self.bell.send(b"\0")

    # The keeper's thread

    def run(self) -> None:
        """Wait and work until stop()."""
        while not self.stopped:
            with self.lock:
                pause = self.timers[0][0] - time.monotonic() if self.timers else _LONGEST_PAUSE
            self._resume_writable(max(0, min(pause, _LONGEST_PAUSE)))
            self._serve_requests()
            self._look_at_who_is_due()
        self._serve_requests()
        self.selector.close()
        self.alarm.close()
        self.bell.close()

    def _resume_writable(self, pause: float) -> None:
        for key, _ in self.selector.select(pause):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self.alarm.recv(4096)
            else:
                self.selector.unregister(key.fileobj)
                self._try(key.data.resume)

    def _serve_requests(self) -> None:
        with self.lock:
            requests, self.requests = self.requests, []
        for queue in requests:
            self._try(self._serve, queue)

    def _try(self, work: Callable[..., Any], *arguments: Any) -> Any:
        # Each piece of work begins here: an error in one must not cost the others their turn.
        try:
            return work(*arguments)
        except Exception:
            log.exception("keeper: unexpected error")

    def _serve(self, queue: WriterQueue) -> None:
        with queue.writing:
            if queue.closed:
                if queue.sock.fileno() >= 0:  # it may have been asked for twice
                    with contextlib.suppress(KeyError):
                        self.selector.unregister(queue.sock)
                    queue.sock.close()
            elif queue.full:
                self.selector.register(queue.sock, selectors.EVENT_WRITE, queue)

    def _look_at_who_is_due(self) -> None:
        now = time.monotonic()
        for peer in self._take_due(now):
            again = self._try(peer.look, now)
            if again is not None:
                self.look_at(peer, again, unless_asked=True)

    def _take_due(self, now: float) -> list[Peer]:
        due = []
        with self.lock:
            while self.timers and self.timers[0][0] <= now:
                entry, number = heapq.heappop(self.timers)
                if self.peers.get(number, (None,))[0] == entry:
                    due.append(self.peers.pop(number)[1])
        return due


# -------------------------------------------------------------------------------------- connections
# The two kinds of subscribers, WebSocket and event stream, and what they share with a connection
# that has not got so far: a number, a writer queue, counters, and the keeper's looks at them.

CLOSING_TIME = 3  # seconds that a peer has to answer our end of the connection with its own
_numbering = threading.Lock()  # guards _numbers
_numbers = itertools.count(1)


class Peer:
    """One accepted connection. Its own thread reads from it."""

    # Counted by its own thread alone.
    received = published = delivered = bytes_received = bad_messages = forbidden = 0
    busy = False  # whether its own thread is handling something that it read
    forgotten = False  # whether the keeper looks at it no more; guarded by the keeper's lock
    patience = 0.0  # until when the last bytes may take to be written

    def __init__(self, server: Server, queue: WriterQueue, address: str) -> None:
        with _numbering:
            self.number = next(_numbers)
        self.server = server
        self.queue = queue
        self.address = address
        self.rate = RateLimit(server.settings.max_message_rate)
        self.heard = time.monotonic()  # when anything came last

    def flush(self) -> None:
        """Write what was queued here and there. Its own thread."""
        self.queue.flush()

    def wait_for_its_turn(self, messages: int = 1) -> bool:
        """Wait as MAX_MESSAGE_RATE demands; False if the connection has ended. Its own thread."""
        delay = self.rate.take(messages) if self.rate.limit else 0
        while delay > 0 and not self.queue.finished and not self.server.stopping.is_set():
            self.flush()
            self.server.stopping.wait(min(delay, 0.25))
            self.heard = time.monotonic()
            delay -= 0.25
        return not self.queue.finished

    def look(self, now: float) -> float | None:
        """See what is due; return when to look again. The keeper's thread."""
        if not self.queue.finished:
            return self.watch(now)
        if self.queue.size and now < self.patience:
            return min(now + CLOSING_TIME, self.patience)
        self.queue.abort()
        return None

    def watch(self, now: float) -> float | None:
        """See what is due on a connection that is open; return when to look again."""
        raise NotImplementedError

    def finish(self, last: bytes, discard: bool = False, patience: float = 0.0) -> None:
        """Write what is queued and then `last`, and see to the connection's end. Any thread.

        The peer has CLOSING_TIME to read it, and longer while it has not, until `patience`.
        """
        self.patience = patience
        self.queue.finish(last, discard)
        self.queue.keeper.look_at(self, time.monotonic() + CLOSING_TIME)


class Subscriber(Peer):
    """A connection that messages are queued for, whichever way they are encoded."""

    encode: Callable[[Sequence[bytes]], bytes]  # from the JSON of some messages to what is written

    def __init__(self, server: Server, queue: WriterQueue, address: str, key: AccessKey) -> None:
        super().__init__(server, queue, address)
        self.id = str(uuid.uuid4())
        self.key = key
        self.channels: Iterable[str] = ()  # what it joined

    def first_look(self) -> None:
        """Begin with the heartbeats and the watch over the token's expiry."""
        interval = self.server.settings.ping_interval or math.inf
        if interval < math.inf and hasattr(socket, "TCP_USER_TIMEOUT"):
            # Bytes that a dead peer does not acknowledge would keep the system busy for a quarter
            # of an hour.
            self.queue.sock.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * interval))
        if (pause := min(interval, self._time_left())) < math.inf:
            self.queue.keeper.look_at(self, time.monotonic() + pause, unless_asked=True)

    def _time_left(self) -> float:
        # Until the token expires, in seconds: `exp` is the one time not on the monotonic clock.
        return math.inf if self.key.expires is None else self.key.expires - time.time()

    def watch(self, now: float) -> float | None:
        """End the connection if its token expired, else see to its heartbeat."""
        time_left = self._time_left()
        if time_left <= 0:
            log.info("%s %s: the token expired", self.address, self.id)
            self.end(EXPIRED, "token expired")
            return None
        interval = self.server.settings.ping_interval
        due = min(now + time_left, self.beat(now, interval) if interval else math.inf)
        return due if due < math.inf else None

    def beat(self, now: float, interval: float) -> float:
        """See to the heartbeat, and return when to do so again."""
        raise NotImplementedError

    def farewell(self, code: int, reason: str) -> bytes:
        """Encode the end of the connection."""
        raise NotImplementedError

    def end(self, code: int, reason: str, discard: bool = False, patience: float = 0.0) -> None:
        """Take the connection out of its channels and begin to close it. Any thread."""
        self.server.leave(self)
        self.finish(self.farewell(code, reason), discard, patience)

    def drop_slow(self) -> None:
        """Disconnect a subscriber whose queue grew over its limit. The publisher's thread."""
        log.warning("%s %s: slow consumer, disconnected with more than %d bytes queued",
                    self.address, self.id, self.queue.limit)
        self.server.count("slow_consumers")
        self.end(POLICY, "slow consumer", discard=True)

    def run(self) -> None:
        """Serve the connection until it ends. Its own thread."""
        raise NotImplementedError


class WebSocket(Subscriber):
    """A WebSocket connection. simple-websocket runs the protocol, in the connection's thread."""

    encode = staticmethod(encode_text_frames)
    busy = True  # with what came behind the request, at first

    def __init__(self, server: Server, queue: WriterQueue, address: str, key: AccessKey) -> None:
        super().__init__(server, queue, address, key)
        self.pinged = 0.0  # when the last ping went out
        # Channels it published to, and what all its messages there begin with.
        self.heads: dict[str, str] = {}
        self.batch = Batch(server, self)
        self.ws: Any = None

    # Its own thread

    def open(self, nonce: str, rest: bytes) -> None:
        """Queue the answer to an upgrade; `rest` is what came behind its request."""
        # One thread per connection, really one: the library's thread is never started, its loop is
        # run() here; and its event, set for every message, hands the message on in the same thread.
        self.ws = _ServerWebSocket.accept(
            {"werkzeug.socket": SocketAdapter(self, rest), "nonce": nonce},
            thread_class=_UnstartedThread, event_class=functools.partial(_Arrival, self))

    def run(self) -> None:
        """Run the library's read loop until the connection ends."""
        try:
            self.ws.thread.run()
        except (ValueError, AssertionError, MemoryError) as error:  # known to get out of the loop
            log.warning("%s %s: closed after %s", self.address, self.id, type(error).__name__)
            self.end(INTERNAL, "internal error")
        finally:
            self.batch.flush()

    def receive(self, text: str) -> None:
        """Publish what the client sent, or tell it why not."""
        self.received += 1
        if self.rate.limit and not self.wait_for_its_turn():
            return
        try:
            channel, data = check_message(decode_json(text))
        except BadMessage as error:
            self.bad_messages += 1
            log.warning("%s %s: message dropped: %s", self.address, self.id, error)
            self._tell(error.code, str(error))
            return
        head = self.heads.get(channel)
        if head is None:
            if channel not in self.key.write:
                self.forbidden += 1
                log.info("%s %s: message dropped: may not write %.80r",
                         self.address, self.id, channel)
                self._tell("forbidden", f"the token may not write the channel {_shown(channel)}")
                return
            head = self.heads[channel] = encode_head(self.id, channel)
        self.batch.add(channel, encode_message(head, data))

    def take(self) -> None:
        """Receive what the library has put together from frames."""
        while self.ws and self.ws.input_buffer:
            message = self.ws.input_buffer.pop(0)
            try:
                self.receive(message if isinstance(message, str) else message.decode())
            except UnicodeDecodeError:
                # What is not UTF-8 is no more a message than a byte order mark is.
                self.receive("\ufeff")

    def _tell(self, code: str, reason: str) -> None:
        self.batch.flush()
        self.queue.put(encode_frame(TEXT, encode_error(code, reason)))

    def flush(self) -> None:
        """Write to all subscribers, and what is for this connection itself."""
        self.batch.flush()
        self.queue.flush()

    # The keeper's thread

    def beat(self, now: float, interval: float) -> float:
        """Ping a silent peer; end the connection of one that stayed silent."""
        heard = self.heard
        if now < heard + interval:
            return heard + interval
        if self.pinged <= heard:
            self.pinged = now
            self.queue.put(_PING)
            self.queue.flush()
        if now < self.pinged + interval:
            return self.pinged + interval
        log.info("%s %s: nothing came for %g seconds, disconnected",
                 self.address, self.id, now - heard)
        self.end(INTERNAL, "ping timeout")
        self.queue.abort()
        return math.inf

    # Any thread

    def farewell(self, code: int, reason: str) -> bytes:
        """Encode a close frame."""
        return encode_close(code, reason)


_PING = encode_frame(PING, b"")


class _ServerWebSocket(simple_websocket.Server):
    def handshake(self) -> None:
        # The library would parse the request's head once more, and keep what it needs for that:
        # half of the time and a fifth of the memory that a connection takes. check_upgrade() has
        # looked more closely already.
        self.ws = Connection(ConnectionType.SERVER)
        self.sock.send(encode_upgrade(self.environ["nonce"]))
        self.connected = True


class _UnstartedThread:
    def __init__(self, target: Callable[[], None]) -> None:
        self.run = target
        self.name = ""

    def start(self) -> None:
        pass


class _Arrival:
    def __init__(self, connection: WebSocket | Client) -> None:
        self.set = connection.take


class SocketAdapter:
    """What simple-websocket is given as its socket. The connection's own thread."""

    def __init__(self, websocket: WebSocket, rest: bytes) -> None:
        settings = websocket.server.settings
        self.websocket = websocket
        self.frames = read_frames(settings.max_message_size)
        self.rest = rest  # what came behind the request's head
        self.least = self.size = settings.read_buffer_size  # bytes to ask of the socket

    def send(self, data: bytes) -> int:
        """Queue what the library sends: the answer to the upgrade, a pong, or a close frame."""
        if data[0] == 0x80 | CLOSE:
            self.websocket.batch.flush()
            self.websocket.finish(bytes(data))
        else:
            self.websocket.queue.put(bytes(data))
        return len(data)

    def recv(self, _: int) -> bytes:
        """Return the next frame that is not a whole text message; b"" is the end.

        Whole text messages are received at once.
        """
        websocket = self.websocket
        try:
            item = next(self.frames)
            while not isinstance(item, bytes):
                if item is not None:
                    websocket.receive(item)
                    item = next(self.frames)
                elif data := self._read():
                    item = self.frames.send(data)
                else:
                    return b""
            return item
        except MessageTooBig:
            websocket.end(TOO_BIG, "message too big")
            return b""

    def close(self) -> None:
        """Leave the socket open: its connection closes it."""

    def _read(self) -> bytes:
        # Gather, then write: what the last read brought is queued by now, and each subscriber is
        # written to once.
        websocket = self.websocket
        sock, queue, stopping = websocket.queue.sock, websocket.queue, websocket.server.stopping
        data, self.rest = self.rest, b""
        while not data:
            websocket.flush()
            websocket.busy = False
            data = sock.recv(self.size)
            websocket.busy = True
            websocket.bytes_received += len(data)
            if not data or queue.finished:
                return b""
            if stopping.is_set():
                data = b""
        size = len(data)
        websocket.heard = time.monotonic()
        if size == self.size:
            self.size = max(min(4 * size, _LARGEST_READ), self.least)
        elif size < self.size >> 2:
            self.size = max(self.size >> 1, self.least)
        return data


_LARGEST_READ = 65536


class RateLimit:
    """A bucket of one second's worth of messages. Used by one thread."""

    def __init__(self, limit: float) -> None:
        self.limit = limit  # messages a second; 0 is none
        self.allowance = max(1.0, limit)
        self.at = time.monotonic()

    def take(self, count: int = 1) -> float:
        """Take so many messages and return how many seconds to wait before the next ones."""
        now = time.monotonic()
        self.allowance = min(
            max(1.0, self.limit), self.allowance + (now - self.at) * self.limit) - count
        self.at = now
        return max(0.0, -self.allowance / self.limit)


class EventStream(Subscriber):
    """A client that follows channels as server-sent events (WHATWG HTML, section 9.2)."""

    encode = staticmethod(
        lambda payloads: b"".join([b"data: %b\n\n" % payload for payload in payloads]))

    def run(self) -> None:
        """Wait for the client to go away; it has nothing to say."""
        with contextlib.suppress(OSError):
            while data := self.queue.sock.recv(1024):
                self.bytes_received += len(data)

    def beat(self, now: float, interval: float) -> float:
        """Send a comment.

        A client that is gone is found out by the system, which waits for its acknowledgement.
        """
        self.queue.put(b":\n\n")
        self.queue.flush()
        return now + interval

    def farewell(self, code: int, reason: str) -> bytes:
        """Encode the end of the stream: there is nothing to say."""
        return b""


# --------------------------------------------------------------------------------- channel registry
# Who reads which channel. Order is made here: a message enters all its subscribers' queues under
# its channel's lock.

class Channel:
    """The subscribers of one channel, by the way they are encoded for."""

    __slots__ = ("lock", "groups")

    def __init__(self) -> None:
        # Guards groups, and the order of this channel's messages in all queues.
        self.lock = threading.Lock()
        self.groups: dict[
            Callable[[Sequence[bytes]], bytes], dict[WriterQueue, Callable[[bytes], None]]] = {}


class ChannelRegistry:
    """All channels that anybody reads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards channels; taken before a channel's lock, never after
        self.channels: dict[str, Channel] = {}

    def __len__(self) -> int:
        with self.lock:
            return len(self.channels)

    def join(self, subscriber: Subscriber, names: Iterable[str]) -> None:
        """Let a subscriber have all that is published to these channels from now on."""
        for name in names:
            with self.lock:
                channel = self.channels.setdefault(name, Channel())
                with channel.lock:
                    group = channel.groups.setdefault(subscriber.encode, {})
                    group[subscriber.queue] = subscriber.queue.pending.append

    def leave(self, subscriber: Subscriber, names: Iterable[str]) -> None:
        """Undo join(); a channel that nobody reads any more is forgotten."""
        for name in names:
            with self.lock:
                channel = self.channels.get(name)
                if channel is None:
                    continue
                with channel.lock:
                    group = channel.groups.get(subscriber.encode, {})
                    group.pop(subscriber.queue, None)
                    if not group:
                        channel.groups.pop(subscriber.encode, None)
                if not channel.groups:
                    del self.channels[name]

    def publish(self, name: str, payloads: Sequence[bytes], issuer: WriterQueue,
                touched: dict[WriterQueue, Any]) -> int:
        """Queue messages for all subscribers of a channel but their issuer.

        Returns how many subscribers that is. They are added to `touched`: the caller flushes their
        queues, without any lock.
        """
        with self.lock:
            channel = self.channels.get(name)
        if channel is None:
            return 0
        receivers = 0
        with channel.lock:
            for encode, group in channel.groups.items():
                data = encode(payloads)  # once for all of them
                for queue, put in group.items():
                    if queue is not issuer:
                        put(data)
                        receivers += 1
                touched.update(group)
        return receivers


_LARGEST_GATHERED = 65536


class Batch:
    """Messages that one thread publishes together.

    All are queued first, then each subscriber is written to once.
    """

    def __init__(self, server: Server, issuer: Peer) -> None:
        self.registry = server.registry
        self.issuer = issuer
        self.least = self.limit = server.settings.write_buffer_size
        self.channel = ""
        self.payloads: list[bytes] = []  # consecutive messages to that channel
        self.size = 0
        self.touched: dict[WriterQueue, Any] = {}
        self.receivers = 0  # how many subscribers there were for what was published last

    def add(self, channel: str, payload: bytes) -> None:
        """Publish a message, by the next flush() at the latest."""
        if channel != self.channel:
            self.publish()
            self.channel = channel
        self.payloads.append(payload)
        self.size += len(payload)
        if self.size >= self.limit:
            self.flush()
            # Under load, one system call carries more.
            self.limit = min(4 * self.limit, _LARGEST_GATHERED)

    def publish(self) -> None:
        """Queue the messages for all subscribers."""
        if self.payloads:
            self.receivers = self.registry.publish(
                self.channel, self.payloads, self.issuer.queue, self.touched)
            self.issuer.published += len(self.payloads)
            self.issuer.delivered += self.receivers * len(self.payloads)
            self.payloads = []

    def flush(self) -> None:
        """Queue the messages and write to all that they were queued for."""
        self.publish()
        if self.size < self.limit >> 2:
            self.limit = max(self.limit >> 1, self.least)
        self.size = 0
        if self.touched:
            touched, self.touched = self.touched, {}
            for queue in touched:
                queue.flush()


# ------------------------------------------------------------------------------------ HTTP requests
# What comes before the WebSocket, and what goes without it. The head of a request is read strictly
# (RFC 9112): the standard library's parser takes bare line feeds and folded lines, which other
# parsers in front may read otherwise.

REQUEST_TIME = 10  # seconds for a whole request, however its bytes drip
MAX_HEAD_SIZE, MAX_HEADERS, MAX_TARGET_SIZE = 16384, 100, 8192
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%b) ([!-~]+) HTTP/1\.([01])" % _TOKEN)
_FIELD = re.compile(rb"(%b):([\t\x20-\x7e\x80-\xff]*)" % _TOKEN)


class HTTPError(Exception):
    """A refused request: the answer's status (RFC 9110, section 15), code and reason in JSON."""

    def __init__(self, status: int, reason: str, code: str = "",
                 headers: Mapping[str, str] = {}) -> None:
        super().__init__(reason)
        self.status = status
        self.code = code or http.HTTPStatus(status).phrase.lower().replace(" ", "_")
        self.headers = headers

    def body(self) -> bytes:
        """Encode code and reason, as a line of JSON."""
        return encode_error(self.code, str(self)) + b"\n"


class Request(NamedTuple):
    """The head of a request."""

    method: str
    path: str
    query: dict[str, list[str]]
    # By name in small letters; the values of one that came twice are joined by a comma.
    headers: dict[str, str]
    version: str

    def tokens(self, name: str) -> list[str]:
        """Split a header that is a list of words, in small letters."""
        return [word.strip().lower() for word in self.headers.get(name, "").split(",")]

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow on the same connection (RFC 9112, section 9.3)."""
        return self.version == "1.1" and "close" not in self.tokens("connection")

    @property
    def has_body(self) -> bool:
        """Whether a body follows the head."""
        return "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"

    @property
    def wants_upgrade(self) -> bool:
        """Whether this is meant to open a WebSocket, well or badly."""
        return "websocket" in self.tokens("upgrade") or "sec-websocket-key" in self.headers


def decode_request(head: bytes) -> Request:
    """Decode a request's head, without the empty line at its end. Raises HTTPError."""
    line, *fields = head.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise HTTPError(400, "the request line must be METHOD /PATH HTTP/1.1")
    method, target, minor = (part.decode() for part in match.groups())
    if len(target) > MAX_TARGET_SIZE:
        raise HTTPError(414, f"the request target may have {MAX_TARGET_SIZE} bytes", "uri_too_long")
    if len(fields) > MAX_HEADERS:
        raise HTTPError(431, f"a request may have {MAX_HEADERS} header fields")
    headers: dict[str, str] = {}
    for field in fields:
        match = _FIELD.fullmatch(field)
        if not match:
            raise HTTPError(400, "a header field must be NAME: VALUE on one line")
        name, value = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    path, _, query = re.sub("(?i)^https?://[^/?]*", "", target).partition("?")
    try:
        parsed = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=MAX_HEADERS)
    except ValueError:
        raise HTTPError(400, f"a query may have {MAX_HEADERS} parameters") from None
    request = Request(method, path or "/", parsed, headers, "1." + minor)
    _check_host(request)
    return request


def _check_host(request: Request) -> None:
    host = request.headers.get("host", "" if request.version == "1.1" else "unknown")
    try:
        if not re.fullmatch(r"[][A-Za-z0-9._~!$&'()*+;=%:-]+", host):
            raise ValueError
        host.encode("ascii").decode("idna")  # raises UnicodeError
    except ValueError:
        raise HTTPError(400, "there must be one Host header, naming a host") from None


def check_upgrade(request: Request) -> None:
    """Check the opening handshake (RFC 6455, section 4.2.1), more closely than the library.

    Raises HTTPError.
    """
    headers = request.headers
    if request.method != "GET":
        raise HTTPError(405, "a WebSocket is opened with GET", headers={"Allow": "GET"})
    if request.version != "1.1" or "host" not in headers:
        raise HTTPError(400, "a WebSocket is opened with HTTP/1.1")
    if ("upgrade" not in request.tokens("connection")
            or "websocket" not in request.tokens("upgrade")):
        raise HTTPError(
            400, "a WebSocket needs the headers Upgrade: websocket and Connection: Upgrade")
    if headers.get("sec-websocket-version") != "13":
        raise HTTPError(426, "this server speaks WebSocket version 13",
                        headers={"Sec-WebSocket-Version": "13", **_UPGRADE})
    try:
        nonce = base64.b64decode(headers.get("sec-websocket-key", ""), validate=True)
    except ValueError:
        nonce = b""
    if len(nonce) != 16:
        raise HTTPError(400, "there must be one Sec-WebSocket-Key, 16 bytes in base64")
    if request.has_body:
        raise HTTPError(400, "an upgrade has no body")


def encode_response(status: int, body: bytes = b"", headers: Mapping[str, str] = {},
                    whole: bool = True) -> bytes:
    """Encode a response; one that is not `whole` goes on until the connection ends."""
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
             f"Date: {email.utils.formatdate(usegmt=True)}"]
    if whole and status >= 200 and status != 204 and "Content-Length" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def encode_upgrade(nonce: str) -> bytes:
    """Encode the answer to an opening handshake (RFC 6455, section 4.2.2).

    Extensions and subprotocols are declined.
    """
    accept = base64.b64encode(
        hashlib.sha1(nonce.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    return (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept)


def is_loopback(address: str) -> bool:
    """Whether an IP address is this machine's own (127.0.0.0/8, ::1, the first written as IPv6)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


class RequestHandler(Peer):
    """A connection while it speaks HTTP. Its own thread runs it; then it becomes a subscriber's."""

    def __init__(self, server: Server, queue: WriterQueue, address: str) -> None:
        super().__init__(server, queue, address)
        self.buffer = b""  # read, and not yet used
        self.deadline = time.monotonic() + REQUEST_TIME  # for the request under way
        self.begun = False  # whether any of it has come
        self.unread = False  # whether it has a body that was not read
        self.cors: dict[str, str] = {}  # what a browser is told about the answer to it
        self.subscriber: Subscriber | None = None  # what the connection became

    # The keeper's thread

    def watch(self, now: float) -> float | None:
        """End the connection when a request takes too long to come."""
        if self.busy or now < self.deadline:
            return now + 1 if self.busy else self.deadline
        late = HTTPError(
            408, f"a request must be complete within {REQUEST_TIME} seconds", "request_timeout")
        if self.begun:
            self.server.refuse(self.address, late)
        self.finish(encode_response(408, late.body(), _CLOSE | _JSON) if self.begun else b"")
        return None

    # Its own thread

    def run(self) -> None:
        """Answer requests until the connection ends, or is a subscriber's and that ends."""
        try:
            self.queue.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._serve_request():
                self.busy = self.begun = False
                self.deadline = time.monotonic() + REQUEST_TIME
        except OSError:
            pass  # the peer is gone
        except Exception:
            log.exception("%s: unexpected error", self.address)
        finally:
            self._end()

    def _end(self) -> None:
        peer = self.subscriber or self
        peer.busy = False
        if self.subscriber:
            self.server.leave(self.subscriber)
        if not self.queue.finished:
            peer.finish(b"")
        self.queue.drain()
        self.queue.close()
        self.queue.keeper.forget(peer)
        self.server.forget(peer)

    def _serve_request(self) -> bool:
        # Returns whether another request may follow.
        request, self.cors = None, {}
        try:
            head = self._read_head()
            if head is None:
                return False
            request = decode_request(head)
            self.unread = request.has_body
            if request.wants_upgrade:
                return self._upgrade(request)
            return self._route(request)
        except HTTPError as error:
            self.server.refuse(self.address, error)
            return self._respond(request, error.status, error.body(), {**_JSON, **error.headers})

    def _read(self) -> bytes:
        self.queue.flush()
        data = self.queue.sock.recv(max(self.server.settings.read_buffer_size, 1024))
        self.bytes_received += len(data)
        return b"" if self.queue.finished else data

    def _read_head(self) -> bytes | None:
        while True:
            self.buffer = self.buffer.lstrip(b"\r\n")  # RFC 9112, section 2.2
            self.begun = bool(self.buffer)
            if self.buffer and not re.match(_TOKEN + b"( |$)", self.buffer):
                raise HTTPError(400, "this is not HTTP/1.1")
            end = self.buffer.find(b"\r\n\r\n")
            if (end if end >= 0 else len(self.buffer)) > MAX_HEAD_SIZE:
                raise HTTPError(431, f"the head of a request may have {MAX_HEAD_SIZE} bytes")
            if end >= 0:
                break
            if not (data := self._read()):
                return None
            self.buffer += data
        self.busy = True
        head, self.buffer = self.buffer[:end], self.buffer[end + 4:]
        return head

    def _read_body(self, request: Request) -> bytes:
        length = request.headers.get("content-length")
        limit = self.server.settings.max_message_size
        if length is None or "transfer-encoding" in request.headers:
            self.unread = True  # how much comes, nobody knows
            raise HTTPError(411, "a request with a body needs a Content-Length")
        if not re.fullmatch("[0-9]+", length):
            raise HTTPError(400, "Content-Length must be a number")
        if len(length) > 18 or int(length) > limit:
            raise HTTPError(413, f"the body may have {limit} bytes", "too_large")
        if request.version == "1.1" and "100-continue" in request.tokens("expect"):
            self.queue.put(encode_response(100))
        size = int(length)
        body = bytearray(self.buffer)
        self.busy = False
        while len(body) < size:
            if not (data := self._read()):
                raise ConnectionError
            body += data
        self.busy = True
        self.buffer, self.unread = bytes(body[size:]), False
        return bytes(body[:size])

    def _route(self, request: Request) -> bool:
        methods = ROUTES.get(request.path)
        if methods is None:
            raise HTTPError(404, "there is nothing here")
        origin = self._check_origin(request)
        if origin:
            self.cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        allowed = ", ".join(sorted({*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])}))
        if request.method == "OPTIONS":
            return self._respond(request, 204, b"", {
                "Allow": allowed, "Access-Control-Allow-Methods": allowed,
                "Access-Control-Allow-Headers": "Authorization, Content-Type",
                "Access-Control-Max-Age": "600"})
        method = "GET" if request.method == "HEAD" else request.method
        if method not in methods:
            raise HTTPError(405, f"the methods here are {allowed}", headers={"Allow": allowed})
        return methods[method](self, request)

    def _respond(self, request: Request | None, status: int, body: bytes,
                 headers: Mapping[str, str]) -> bool:
        # Returns whether another request may follow. A body that nobody read would be taken for it.
        going_on = bool(
            request and request.keeps_alive and not request.wants_upgrade and not self.unread)
        headers = {**headers, **self.cors}
        if not going_on:
            headers["Connection"] = ", ".join([*filter(None, [headers.get("Connection")]), "close"])
        if request and request.method == "HEAD":
            headers, body = {"Content-Length": str(len(body)), **headers}, b""
        self.queue.put(encode_response(status, body, headers))
        self.queue.flush()
        return going_on

    def _respond_json(self, request: Request, value: Any, status: int = 200) -> bool:
        return self._respond(request, status, json.dumps(value).encode() + b"\n", _JSON)

    # Who may do what

    def _check_origin(self, request: Request) -> str:
        # Returns what a browser may be told: the origin that was checked, any, or nothing.
        allowed, origin = self.server.settings.check_origin, request.headers.get("origin")
        if not allowed:
            return "*"
        if origin is None:
            return ""
        same = origin.lower().partition("://")[2] == request.headers.get("host", "-").lower()
        if not same and not (isinstance(allowed, tuple) and origin.lower() in allowed):
            raise HTTPError(
                403, f"the origin {_shown(origin)} is not allowed (CHECK_ORIGIN)", "origin")
        return origin

    def _authorize(self, request: Request) -> AccessKey:
        secret = self.server.settings.secret
        if not secret and not is_loopback(self.address):
            raise HTTPError(
                403, "SECRET is not set, so only clients on the server's own machine are let in",
                "protected")
        tokens = [re.sub("(?i)^bearer +", "", request.headers.get("authorization", ""))]
        tokens += request.query.get("auth", [])[:1]
        reason = ""
        for token in filter(None, tokens):
            try:
                key = decode_token(token, secret)
            except TokenError as error:
                reason = reason or str(error)
            else:
                self.server.renew(self)
                return key
        raise HTTPError(
            401, reason or "a token is needed: Authorization: Bearer TOKEN, or ?auth=TOKEN",
            headers={"WWW-Authenticate": "Bearer"})

    def _authorize_api(self, request: Request) -> None:
        if not self._authorize(request).api:
            raise HTTPError(403, "the token's claim api must be true")

    # What is answered

    def _upgrade(self, request: Request) -> bool:
        check_upgrade(request)
        self._check_origin(request)
        websocket = WebSocket(self.server, self.queue, self.address, self._authorize(request))
        self.server.enter(self, websocket)
        websocket.open(request.headers["sec-websocket-key"], self.buffer)
        return self._become(websocket, websocket.key.read)

    def _follow(self, request: Request) -> bool:
        key = self._authorize(request)
        channels = frozenset(request.query.get("channel", key.read))
        if not channels <= key.read:
            raise HTTPError(
                403, f"the token may not read the channel {_shown(min(channels - key.read))}")
        kinds = {word.partition(";")[0].strip() for word in request.tokens("accept")}
        if not kinds & {"", "*/*", "text/*", "text/event-stream"}:
            raise HTTPError(406, "this is a text/event-stream")
        head = encode_response(
            200, b"", {"Content-Type": "text/event-stream", "Cache-Control": "no-store",
                       "X-Accel-Buffering": "no", **_CLOSE, **self.cors}, whole=False)
        if request.method == "HEAD":
            self.queue.put(head)
            return False
        stream = EventStream(self.server, self.queue, self.address, key)
        self.server.enter(self, stream)
        self.queue.put(head)
        return self._become(stream, channels)

    def _become(self, subscriber: Subscriber, channels: Iterable[str]) -> bool:
        # The answer is queued by now, so nothing of the channels can come before it.
        self.buffer = b""
        self.queue.on_overflow = subscriber.drop_slow
        subscriber.channels = channels
        self.server.registry.join(subscriber, channels)
        subscriber.first_look()
        log.debug("%s %s: connected", self.address, subscriber.id)
        self.queue.flush()
        subscriber.run()
        log.debug("%s %s: disconnected", self.address, subscriber.id)
        return False

    def _publish(self, request: Request) -> bool:
        key = self._authorize(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # The last of these is curl's default.
        if kind not in ("", "application/json", "application/x-www-form-urlencoded"):
            raise HTTPError(415, "the body must be JSON", "unsupported_media_type")
        try:
            value = decode_json(self._read_body(request).decode())
            messages = [
                check_message(item) for item in (value if isinstance(value, list) else [value])]
        except (BadMessage, UnicodeDecodeError) as error:
            raise HTTPError(400, str(error), BadMessage.code) from None
        self.received += len(messages)
        for channel, _ in messages:
            if channel not in key.write:
                raise HTTPError(403, f"the token may not write the channel {_shown(channel)}")
        answers = self._publish_all(messages)
        return self._respond_json(request, answers if isinstance(value, list) else answers[0])

    def _publish_all(self, messages: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        if self.server.stopping.is_set():
            raise HTTPError(503, "the server is shutting down", "shutting_down")
        issuer, batch, answers = str(uuid.uuid4()), Batch(self.server, self), []
        if not self.wait_for_its_turn(len(messages)):
            raise ConnectionError("the request came too slowly, and was told so")
        for channel, data in messages:
            batch.add(channel, encode_message(encode_head(issuer, channel), data))
            batch.publish()
            answers.append({"issuer": issuer, "receivers": batch.receivers})
        batch.flush()
        return answers

    def _health(self, request: Request) -> bool:
        stopping = self.server.stopping.is_set()
        return self._respond_json(
            request, {"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    def _info(self, request: Request) -> bool:
        self._authorize_api(request)
        return self._respond_json(request, self.server.info())

    def _metrics(self, request: Request) -> bool:
        self._authorize_api(request)
        kind = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return self._respond(request, 200, self.server.metrics().encode(), kind)

    def _ask_for_upgrade(self, request: Request) -> bool:
        raise HTTPError(426, "this is a WebSocket server", headers=_UPGRADE)


_CLOSE = {"Connection": "close"}
_UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade"}
_JSON = {"Content-Type": "application/json"}
ROUTES: dict[str, dict[str, Callable[[RequestHandler, Request], bool]]] = {
    "/": {"GET": RequestHandler._ask_for_upgrade},
    "/api/publish": {"POST": RequestHandler._publish},
    "/api/events": {"GET": RequestHandler._follow},
    "/api/info": {"GET": RequestHandler._info},
    "/metrics": {"GET": RequestHandler._metrics},
    "/health": {"GET": RequestHandler._health},
}


# ------------------------------------------------------------------------------------------- server
# Accepts connections, counts them, and ends them.

class Server(socketserver.ThreadingTCPServer):
    """A Philote server. As a context manager it serves from its own threads until the block ends.

    It listens from the start: raises OSError where it cannot. `server_address` holds the port that
    it got for port 0.
    """

    allow_reuse_address = True
    block_on_close = False
    daemon_threads = True
    request_queue_size = 1024  # connections that the system holds until they are accepted

    def __init__(self, settings: Settings = Settings()) -> None:
        self.settings = settings
        self.registry = ChannelRegistry()
        self.stopping = threading.Event()
        self.keeper = Keeper()
        self.started = time.monotonic()
        self.lock = threading.Lock()  # guards all below
        self.subscribers: dict[int, Subscriber] = {}  # counted against max_connections
        # All others, the oldest first.
        self.strangers: collections.OrderedDict[Peer, None] = collections.OrderedDict()
        # Of the connections that are gone.
        self.totals: collections.Counter[str] = collections.Counter()
        self.refusals: collections.Counter[str] = collections.Counter()
        self.said: dict[str, float] = {}  # what is not to be logged again before when
        # A descriptor to refuse with when there is none.
        self.reserve: int | None = os.open(os.devnull, os.O_RDONLY)
        self.address_family, address = _resolve(settings.host, settings.port)
        super().__init__(address, RequestHandler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind, for all interfaces to IPv4 and IPv6 alike."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(self.settings.host)))
        super().server_bind()

    def __enter__(self) -> Server:
        self.keeper.start()
        threading.Thread(
            target=self.serve_forever, name="philote-accept", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # The accepting thread. What socketserver calls a request is a connection, here in the form of
    # its handler.

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; out of descriptors, refuse it."""
        try:
            sock, address = super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._refuse_for_want_of_descriptors(error)
            raise
        queue = WriterQueue(sock, self.keeper, self.settings.max_queue_size)
        return RequestHandler(self, queue, address[0].removeprefix("::ffff:")), address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread; where the system has none left, refuse it."""
        with self.lock:
            oldest = self._add_stranger(request)
        if oldest:
            oldest.queue.abort()
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:
            if self.may_say("threads"):
                log.error("no more threads, newcomers are refused: %s", error)
            self.forget(request)
            self._refuse_at_the_door(request.queue.sock)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Run a connection. Its own thread begins here."""
        self.keeper.look_at(request, request.deadline)
        request.run()

    def shutdown_request(self, request: Any) -> None:
        """Do nothing: a connection is closed by its own thread."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what socketserver would print."""
        log.exception("%s: unexpected error", client_address[0])

    def _refuse_for_want_of_descriptors(self, error: OSError) -> None:
        if self.may_say("descriptors"):
            log.error("no more descriptors, newcomers are refused: %s", error.strerror)
        if self.reserve is not None:
            os.close(self.reserve)
            self.reserve = None
            with contextlib.suppress(OSError):
                self._refuse_at_the_door(self.socket.accept()[0])
        try:
            self.reserve = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            # Without a wait this thread would spin: the listening socket stays readable.
            self.stopping.wait(0.1)

    def _refuse_at_the_door(self, sock: socket.socket) -> None:
        error = HTTPError(503, "the server has no room for another connection", "exhausted", _RETRY)
        with self.lock:
            self.refusals[error.code] += 1
        with sock, contextlib.suppress(OSError):
            sock.send(encode_response(503, error.body(), _CLOSE | _JSON | _RETRY), _DONTWAIT)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(65536, _DONTWAIT)

    # Any thread

    def enter(self, handler: RequestHandler, subscriber: Subscriber) -> None:
        """Count a connection that becomes a subscriber's. Raises HTTPError if there is no room."""
        with self.lock:
            if len(self.subscribers) >= self.settings.max_connections:
                raise HTTPError(503, f"all {self.settings.max_connections} connections are taken",
                                "full", _RETRY)
            if self.stopping.is_set():
                raise HTTPError(503, "the server is shutting down", "shutting_down", _RETRY)
            self.strangers.pop(handler, None)
            self._add(handler)
            self.subscribers[subscriber.number] = handler.subscriber = subscriber
            self.totals["connections"] += 1
        self.keeper.forget(handler)

    def leave(self, subscriber: Subscriber) -> None:
        """Take a subscriber out of its channels and the count; what is left of it is a stranger."""
        with self.lock:
            left = self.subscribers.pop(subscriber.number, None)
            oldest = self._add_stranger(subscriber) if left else None
        if oldest:
            oldest.queue.abort()
        self.registry.leave(subscriber, subscriber.channels)

    def renew(self, stranger: Peer) -> None:
        """Let a connection that showed a good token be the last to be dropped for a newcomer."""
        with self.lock:
            if stranger in self.strangers:
                self.strangers.move_to_end(stranger)

    def forget(self, peer: Peer) -> None:
        """Forget a connection that is closed, but for what it counted."""
        with self.lock:
            if peer in self.strangers:
                del self.strangers[peer]
                self._add(peer)
                self.totals["bytes_sent"] += peer.queue.sent

    def _add_stranger(self, peer: Peer) -> Peer | None:
        # Returns the one that has to go for it. The lock is held.
        self.strangers[peer] = None
        if len(self.strangers) <= self.settings.max_strangers:
            return None
        oldest = next(iter(self.strangers))
        self.strangers.move_to_end(oldest)  # it goes when its thread ends; the next is another
        return oldest

    def _add(self, peer: Peer, totals: collections.Counter[str] | None = None) -> None:
        totals = self.totals if totals is None else totals
        for name in _COUNTED:
            totals[name] += getattr(peer, name)

    def count(self, name: str) -> None:
        """Count something that no connection counts for itself."""
        with self.lock:
            self.totals[name] += 1

    def refuse(self, address: str, error: HTTPError) -> None:
        """Count a refusal, and log it once in a while for each address."""
        with self.lock:
            self.refusals[error.code] += 1
        if self.may_say(address):
            log.info("%s: refused with %d: %s (said once a minute)", address, error.status, error)

    def may_say(self, key: str) -> bool:
        """Whether something may be logged that may be logged once a minute."""
        now = time.monotonic()
        with self.lock:
            if self.said.get(key, now) > now:
                return False
            if len(self.said) >= 1024:
                self.said = {key: until for key, until in self.said.items() if until > now}
            if len(self.said) < 1024:
                self.said[key] = now + 60
                return True
            return False

    # What the server is doing

    def statistics(self) -> tuple[collections.Counter[str], collections.Counter[str]]:
        """Sum up what all connections counted, and the refusals by reason."""
        with self.lock:
            totals, refusals = self.totals.copy(), self.refusals.copy()
            for peer in itertools.chain(self.subscribers.values(), self.strangers):
                self._add(peer, totals)
                totals["bytes_sent"] += peer.queue.sent
                totals["queued"] += peer.queue.size
            totals["open"] = len(self.subscribers)
        totals["channels"] = len(self.registry)
        return totals, refusals

    def info(self) -> dict[str, Any]:
        """Describe the server for GET /api/info."""
        totals, _ = self.statistics()
        settings = dataclasses.asdict(self.settings)
        del settings["secret"], settings["port"]
        return {
            "version": __version__, "python": platform.python_version(),
            "implementation": platform.python_implementation(),
            "gil": getattr(sys, "_is_gil_enabled", lambda: True)(), "num_cpu": os.cpu_count(),
            "pid": os.getpid(), "uptime_in_seconds": round(time.monotonic() - self.started),
            "tcp_port": self.server_address[1],
            "connections": totals["open"], "channels": totals["channels"], **settings,
        }

    def metrics(self) -> str:
        """Describe the server in Prometheus' text format, version 0.0.4."""
        totals, refusals = self.statistics()
        lines = []
        for name, kind, about, samples in _METRICS:
            lines += [f"# HELP philote_{name} {about}", f"# TYPE philote_{name} {kind}"]
            lines += [f"philote_{name}{label} {totals[count]}" for label, count in samples.items()]
        lines += ["# HELP philote_refusals_total Requests refused, by reason.",
                  "# TYPE philote_refusals_total counter"]
        lines += [f'philote_refusals_total{{reason="{code}"}} {count}'
                  for code, count in sorted(refusals.items())]
        return "\n".join(lines) + "\n"

    # The end

    def stop(self, timeout: float | None = None) -> None:
        """Stop serving: no newcomers, queued messages are written, everybody gets close 1001.

        It takes `timeout` seconds at most, by default those of the settings. A message that was
        read before the call reaches all subscribers that read.
        """
        if self.stopping.is_set():
            return
        if timeout is None:
            timeout = self.settings.shutdown_timeout
        deadline = time.monotonic() + timeout
        patience = deadline - min(1, timeout / 5)  # leaves time to cut what is left
        self.stopping.set()  # from now on, whatever is read is dropped
        if self.keeper.is_alive():
            with contextlib.suppress(OSError):  # on Linux this wakes the accepting thread at once
                self.socket.shutdown(socket.SHUT_RDWR)
            self.shutdown()
        self.server_close()
        _wait_until(lambda: not any(peer.busy for peer in self._peers()), patience)
        for peer in self._peers():
            if isinstance(peer, Subscriber):
                peer.end(GOING_AWAY, "server is shutting down", patience=patience)
        _wait_until(lambda: not any(isinstance(p, Subscriber) for p in self._peers()), patience)
        for peer in self._peers():
            peer.finish(b"", patience=patience)
        _wait_until(lambda: not self._peers(), patience)
        for peer in self._peers():
            peer.queue.abort()
        _wait_until(lambda: not self._peers(), deadline)
        self.keeper.stop()
        if self.reserve is not None:
            os.close(self.reserve)

    def _peers(self) -> list[Peer]:
        with self.lock:
            return [*self.subscribers.values(), *self.strangers]


_RETRY = {"Retry-After": "5"}
_COUNTED = ("received", "published", "delivered", "bytes_received", "bad_messages", "forbidden")
_METRICS = (
    ("connections", "gauge", "Connections now.", {"": "open"}),
    ("connections_total", "counter", "Connections since the start.", {"": "connections"}),
    ("channels", "gauge", "Channels that anybody reads now.", {"": "channels"}),
    ("queued_bytes", "gauge", "Bytes that wait for slow subscribers now.", {"": "queued"}),
    ("messages_received_total", "counter", "Messages that came, good and bad.", {"": "received"}),
    ("messages_published_total", "counter", "Messages that were published.", {"": "published"}),
    ("messages_delivered_total", "counter", "Messages queued for subscribers, once for each.",
     {"": "delivered"}),
    ("received_bytes_total", "counter", "Bytes read.", {"": "bytes_received"}),
    ("sent_bytes_total", "counter", "Bytes written.", {"": "bytes_sent"}),
    ("errors_total", "counter", "Messages dropped, by code.",
     {'{code="bad_message"}': "bad_messages", '{code="forbidden"}': "forbidden"}),
    ("slow_consumers_total", "counter", "Subscribers disconnected for not reading.",
     {"": "slow_consumers"}),
)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    if host or not socket.has_dualstack_ipv6():
        family, _, _, _, address = socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return family, address
    return socket.AF_INET6, ("::", port)


def _wait_until(condition: Callable[[], bool], deadline: float) -> None:
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------- client
# For Python programs, and for the commands below. simple-websocket runs the protocol, in a thread
# of its own.

_ANSWER_TIME = 10  # seconds without a byte either way, after which a server will not answer


class PhiloteError(Exception):
    """What a Client raises, beside OSError where the server cannot be reached."""


class Unauthorized(PhiloteError):
    """The server did not let us in; `status` is its HTTP status: 401 for the token, 503 if full."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{reason} (HTTP {status})")
        self.status = status


class Forbidden(PhiloteError):
    """The server dropped a published message: the token does not allow it, or it was malformed."""


class ConnectionClosed(PhiloteError):
    """The connection has ended, with a close code of RFC 6455, section 7.4.

    Code 1006 is an end without a closing handshake.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"connection closed with {code}" + (f": {reason}" if reason else ""))
        self.code = code


class Client:
    """A connection to a Philote server. Threads may share it: one publishes while another receives.

        with Client("ws://localhost:6380",
                    new_token(secret, read=["news"], write=["news"])) as client:
            client.publish("news", "hello")
            print(client.receive(timeout=1))

    Raises OSError where the server cannot be reached, Unauthorized where it does not let us in,
    PhiloteError where there is another kind of server, or the URL or token cannot be.

    A server answers a message that it drops some time later: Forbidden is raised by the next call
    that finds the answer. ConnectionClosed is raised once all that came has been received. close()
    and the end of the `with` block raise them too, where a message that was published may be lost.
    """

    def __init__(self, url: str = "ws://localhost:6380", token: str = "") -> None:
        self._arrived = threading.Condition()  # guards the next four
        self._messages: collections.deque[Message] = collections.deque()
        self._refusals: collections.deque[PhiloteError] = collections.deque()
        self._end: ConnectionClosed | None = None
        self._told = True  # whether somebody knows the fate of what was published
        # Keeps one message's encoding apart from another's, and the close frame behind them.
        self._publishing = threading.Lock()
        self._ws: Any = None
        if not re.fullmatch("[!-~]*", token):
            raise PhiloteError("the token holds characters that no token has")
        self._ws = _ClientWebSocket(
            split_url(url), token, thread_class=functools.partial(_ReaderThread, self),
            event_class=functools.partial(_Arrival, self))
        self._ws.thread.opened.set()

    def publish(self, channel: str, data: str) -> None:
        """Send a message. Raises ConnectionClosed, and Forbidden for a message before this one."""
        self._raise_refusal()
        try:
            with self._publishing:
                if self._ws.sock.closing:
                    raise ConnectionError
                self._told = False
                self._ws.send(json.dumps({"channel": channel, "data": data}))
        except (OSError, simple_websocket.ConnectionClosed):
            self._ws.thread.join(CLOSING_TIME)  # it knows why
            self._raise_refusal()
            self._raise_end()
            raise ConnectionClosed(1006) from None

    def receive(self, timeout: float | None = None) -> Message | None:
        """Wait `timeout` seconds (None: for ever) for the next message; None if there was none.

        Raises ConnectionClosed once all that came has been received, and Forbidden for a message
        that we published.
        """
        with self._arrived:
            self._arrived.wait_for(lambda: self._refusals or self._messages or self._end, timeout)
            if self._messages and not self._refusals:
                return self._messages.popleft()
        self._raise_refusal()
        self._raise_end()
        return None

    def __iter__(self) -> Iterator[Message]:
        """Receive messages until close() is called. Raises what receive() raises."""
        while True:
            try:
                message = self.receive()
            except ConnectionClosed:
                if self._ws.sock.closing:
                    return
                raise
            if message:
                yield message

    def close(self) -> None:
        """End the connection, once the server has read all that was published."""
        self._close()
        self._raise_refusal()
        if not self._told:
            self._raise_end()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._close()

    def _close(self) -> None:
        # A closing handshake, for as long as anything moves: the server may take its time to read.
        sock, thread = self._ws.sock, self._ws.thread

        def send_close() -> None:
            with self._publishing:
                sock.send_close()

        threading.Thread(target=send_close, daemon=True).start()
        moved = None
        while thread.is_alive() and moved != sock.moved():
            moved = sock.moved()
            thread.join(_ANSWER_TIME)
        sock.abort()
        thread.join()

    def _raise_refusal(self) -> None:
        with self._arrived:
            if self._refusals:
                raise self._refusals.popleft()

    def _raise_end(self) -> None:
        with self._arrived:
            if self._end:
                self._told = True
                raise self._end

    # The reader's thread

    def take(self) -> None:
        """Take what the library has read."""
        with self._arrived:
            while self._ws and self._ws.input_buffer:
                value = json.loads(self._ws.input_buffer.pop(0))
                if "error" in value:
                    self._refusals.append(Forbidden(value.get("reason", value["error"])))
                else:
                    self._messages.append(
                        Message(*(value.get(name, "") for name in Message._fields)))
            self._arrived.notify_all()

    def read(self, loop: Callable[[], None]) -> None:
        """Run the library's read loop, to the connection's end."""
        try:
            loop()
        except (ValueError, AttributeError) as error:  # what no Philote server sends
            log.debug("closed after %s: %s", type(error).__name__, error)
        finally:
            sock = self._ws.sock
            clean = not sock.ended
            code = int(self._ws.close_reason) if clean else 1006
            sock.abort()
            with self._arrived:
                self._told |= clean and sock.closing and code == NORMAL
                self._end = ConnectionClosed(code, self._ws.close_message or "")
                self._arrived.notify_all()


class _ReaderThread(threading.Thread):
    def __init__(self, client: Client, target: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.client, self.loop = client, target
        self.opened = threading.Event()  # set once the client has its socket

    def run(self) -> None:
        self.opened.wait()
        self.client.read(self.loop)


def split_url(url: str) -> urllib.parse.SplitResult:
    """Split the URL of a server. Raises PhiloteError that names it."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise PhiloteError(
            f"the URL must begin with ws:// or wss:// and name a host, not {url!r}") from None
    if not re.fullmatch("[!-~]*", parts.path + parts.query):
        raise PhiloteError(f"the path of the URL must be percent-encoded, not {url!r}")
    return parts


class _ClientWebSocket(simple_websocket.Client):
    # The library's own way to connect tries one address only, and tells nothing of a refusal.

    def __init__(self, url: urllib.parse.SplitResult, token: str, **classes: Any) -> None:
        self.url, self.token = url, token
        secure = url.scheme == "wss"
        try:
            sock = socket.create_connection((url.hostname, url.port or (443 if secure else 80)))
            if secure:
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=url.hostname)
        except UnicodeError:
            raise PhiloteError(f"{url.hostname!r} cannot be the name of a host") from None
        self.sock = _ClientSocket(sock)
        try:
            super(simple_websocket.Client, self).__init__(
                self.sock, connection_type=ConnectionType.CLIENT, **classes)
        except BaseException:
            self.sock.abort()
            raise

    def handshake(self) -> None:
        target = (self.url.path or "/") + ("?" + self.url.query if self.url.query else "")
        headers = [(b"Authorization", b"Bearer " + self.token.encode())] if self.token else []
        self.sock.send(self.ws.send(wsproto.events.Request(
            host=self.url.netloc.rpartition("@")[2], target=target, extra_headers=headers)))
        try:
            self.ws.receive_data(self.sock.read_head())
            event = next(self.ws.events(), None)
        except (ProtocolError, ValueError) as error:
            raise PhiloteError(f"this is no WebSocket server: {error}") from None
        if isinstance(event, wsproto.events.RejectConnection):
            raise Unauthorized(event.status_code, self.sock.read_reason())
        if not isinstance(event, wsproto.events.AcceptConnection):
            raise PhiloteError("this is no WebSocket server")
        self.connected = True


class _ClientSocket:
    """A socket, TLS or not, that one thread may read while another writes; send() writes all.

    No thread is ever inside a call of the socket for long, and never two: they wait outside. Two
    threads inside one TLS connection corrupt it or wait for each other.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.calling = threading.Lock()  # guards the socket and the two counts
        self.sent = self.received = 0  # bytes
        self.sending = threading.Lock()  # keeps a frame whole; guards `closing`
        self.closing = False  # whether our close frame is out; what comes behind it is dropped
        self.ended = False  # whether the connection ended without a closing handshake
        self.head = b""  # of the answer to the opening handshake
        self.rest = b""  # what was read behind it

    def send(self, data: bytes) -> int:
        with self.sending:
            if not self.closing:
                self._send(data)
        return len(data)

    def send_close(self) -> None:
        # Behind the library's back, which would answer no ping from here on, and read no further.
        with self.sending, contextlib.suppress(OSError):
            if not self.closing:
                self.closing = True
                self._send(b"\x88\x82\0\0\0\0" + struct.pack("!H", NORMAL))

    def recv(self, size: int) -> bytes:
        data, self.rest = self.rest, b""
        return data or self._receive()

    def read_head(self) -> bytes:
        """Read the answer to the opening handshake. What comes behind it is kept for recv()."""
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > MAX_HEAD_SIZE:
                raise ValueError("its answer does not end")
            data += self._receive()
        self.head, self.rest = data[:end + 4], data[end + 4:]
        return self.head

    def read_reason(self) -> str:
        """Read why a server refused us, if it says so as Philote does."""
        length = re.search(rb"(?i)\r\ncontent-length: *([0-9]{1,4})\r\n", self.head)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            while length and len(self.rest) < int(length[1]):
                self.rest += self._receive()
            return str(json.loads(self.rest)["reason"])
        return "the server refused the connection"

    def moved(self) -> tuple[int, int]:
        """How many bytes went out and came in so far."""
        with self.calling:
            return self.sent, self.received

    def close(self) -> None:
        """Leave the socket open for what comes before the server's close frame."""

    def abort(self) -> None:
        """End the connection, and the wait of whoever waits for it."""
        with self.calling:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
            self.sock.close()

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            sent = self._call(self.sock.send, view, selectors.EVENT_WRITE)
            self.sent += sent
            view = view[sent:]

    def _receive(self) -> bytes:
        data = self._call(self.sock.recv, _LARGEST_READ, selectors.EVENT_READ)
        if not data:
            self.ended = True
            raise ConnectionResetError("the server closed the connection")
        self.received += len(data)
        return data

    def _call(self, call: Callable[[Any], Any], argument: Any, event: int) -> Any:
        while True:
            try:
                with self.calling:
                    return call(argument)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                wanted = (selectors.EVENT_READ if isinstance(error, ssl.SSLWantReadError) else
                          selectors.EVENT_WRITE if isinstance(error, ssl.SSLWantWriteError) else
                          event)
            except OSError:
                self.ended = True
                raise
            with _Selector() as selector, contextlib.suppress(ValueError):  # of a closed socket
                selector.register(self.sock, wanted)
                selector.select()


_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


# ------------------------------------------------------------------------------------- command line
# philote [serve], philote token, philote subscribe, philote publish.

_EXAMPLES = {
    "": "example, in two terminals:\n  philote serve\n  philote subscribe news\n"
        "  philote publish news hello",
    "serve": "example:\n  SECRET=$(openssl rand -hex 32) PORT=8080 philote serve\n\n"
             "settings, from the environment:\n"
             + "\n".join(f"  {name.upper():18}{allowed}"
                         for name, (_, allowed) in _ALLOWED.items()),
    "token": "example:\n  SECRET=... philote token --read news,chat --write chat --expires 1h",
    "subscribe": "example:\n"
                 "  philote subscribe news --json --token \"$(philote token --read news)\"",
    "publish": "example:\n  tail -f /var/log/syslog | philote publish logs",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parse_duration(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90s, 15m, 1h or 7d")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _parse_count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,17}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _parse_url(text: str) -> str:
    try:
        split_url(text)
    except PhiloteError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _parse_names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="philote", description="WebSocket publish/subscribe server, and the tools for it.",
        epilog=_EXAMPLES[""], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"philote {__version__}")
    parser.set_defaults(command=_serve)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    def add(name: str, command: Callable[[argparse.Namespace], int],
            about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + ".",
            epilog=_EXAMPLES[name], formatter_class=argparse.RawDescriptionHelpFormatter)
        added.set_defaults(command=command)
        return added

    add("serve", _serve, "serve; what philote does without a command")
    token = add("token", _token, "print a token signed with SECRET, or check one")
    token.add_argument("--read", type=_parse_names, default=[], metavar="A,B",
                       help="channels that it may read")
    token.add_argument("--write", type=_parse_names, default=[], metavar="A,B",
                       help="channels that it may write")
    token.add_argument("--expires", type=_parse_duration, metavar="1h",
                       help="how long it is valid (default: for ever)")
    token.add_argument("--api", action="store_true", help="also open /api/info and /metrics")
    token.add_argument("--check", metavar="TOKEN",
                       help="say what a token allows instead; - reads it from standard input")
    subscribe = add("subscribe", _subscribe, "print the messages of channels, a line each")
    subscribe.add_argument("channels", nargs="+", metavar="CHANNEL")
    subscribe.add_argument("--json", action="store_true", help="print the whole message as JSON")
    subscribe.add_argument("--count", type=_parse_count, metavar="N", help="end after N messages")
    publish = add(
        "publish", _publish, "publish a message, or a message for each line of standard input")
    publish.add_argument("channel", metavar="CHANNEL")
    publish.add_argument("data", nargs="?", metavar="DATA")
    for command in (subscribe, publish):
        command.add_argument(
            "--url", type=_parse_url, default=os.environ.get("PHILOTE_URL", "ws://localhost:6380"),
            help="server (default: PHILOTE_URL, or ws://localhost:6380)")
        command.add_argument(
            "--token", default=os.environ.get("PHILOTE_TOKEN"),
            help="token (default: PHILOTE_TOKEN, or one made on the spot with SECRET)")
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its status."""
    parsed = _make_parser().parse_args(arguments)
    status = 0
    try:
        status = parsed.command(parsed)
    except KeyboardInterrupt:
        pass
    except SettingsError as error:
        print(error, file=sys.stderr)
        status = 2
    except (PhiloteError, OSError) as error:
        print(f"philote: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)


def _print(text: str) -> None:
    # Ends the program where nobody takes its output: quietly if he has seen enough, like head.
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush of all
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        sys.exit(f"philote: cannot write: {error.strerror}")


def _serve(_: argparse.Namespace) -> int:
    settings = Settings.from_environ(os.environ)
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=_LEVELS[settings.loglevel], stream=sys.stderr,
        format="%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
    # Taken one by one with sigwait(), signals interrupt no thread in the middle of anything.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    # JSON nested deeply needs it; memory that is not touched costs nothing.
    threading.stack_size(2 << 20)
    # A thread that waits for the interpreter's lock asks for it once in every such interval. When
    # thousands are woken at a time (a proxy went away), at the default 5 ms they do little else;
    # and ours let go at every system call.
    sys.setswitchinterval(min(1, max(0.005, settings.max_connections / 10_000)))
    _raise_descriptor_limit(settings)
    try:
        server = Server(settings)
    except (OSError, UnicodeError) as error:  # the latter for a name that no host can have
        print(f"philote: cannot listen on {settings.host or 'all interfaces'}, port "
              f"{settings.port}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    with server:
        _greet(server)
        caught = signal.sigwait(signals)
        for number in signals:
            signal.signal(number, lambda *_: os._exit(1))  # a second signal ends it at once
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        log.info("%s: shutting down", signal.Signals(caught).name)
    log.info("stopped")
    return 0


def _greet(server: Server) -> None:
    settings, (address, port, *_) = server.settings, server.server_address
    log.info("philote %s on Python %s listens on %s port %d: "
             "MAX_CONNECTIONS=%d CHECK_ORIGIN=%s SECRET %s LOGLEVEL=%s",
             __version__, platform.python_version(), address, port, settings.max_connections,
             settings.check_origin, "set" if settings.secret else "empty", settings.loglevel)
    if not settings.secret:
        log.warning(
            "SECRET is empty: anybody can make a token, so only clients on this machine are let in")
    elif len(settings.secret) < 32:
        log.warning("SECRET has %d characters; one of 32 or more cannot be guessed",
                    len(settings.secret))


def _raise_descriptor_limit(settings: Settings) -> None:
    needed = settings.max_connections + settings.max_strangers + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard == resource.RLIM_INFINITY or hard >= needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        else:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            log.warning(
                "MAX_CONNECTIONS=%d needs %d descriptors, and the system allows %d (ulimit -n)",
                settings.max_connections, needed, hard)


def _secret() -> str:
    return Settings.from_environ(
        {name: os.environ[name] for name in ("SECRET",) if name in os.environ}).secret


def _token(arguments: argparse.Namespace) -> int:
    secret = _secret()
    if arguments.check is None:
        _print(new_token(
            secret, arguments.read, arguments.write, arguments.expires, arguments.api))
        return 0
    token = sys.stdin.readline().strip() if arguments.check == "-" else arguments.check
    try:
        key = decode_token(token, secret)
    except TokenError as error:
        print(f"refused: {error}")
        return 1
    until = "for ever" if key.expires is None else time.strftime(
        "until %Y-%m-%d %H:%M:%S UTC", time.gmtime(key.expires))
    print(f"valid {until}; read: {', '.join(sorted(key.read)) or 'nothing'}; "
          f"write: {', '.join(sorted(key.write)) or 'nothing'}; api: {'yes' if key.api else 'no'}")
    return 0


def _connect(arguments: argparse.Namespace, read: Sequence[str] = (),
             write: Sequence[str] = ()) -> Client:
    return Client(arguments.url, arguments.token or new_token(_secret(), read, write))


def _subscribe(arguments: argparse.Namespace) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    left, pause = arguments.count or math.inf, 0.5
    while True:
        try:
            with _connect(arguments, read=arguments.channels) as client:
                pause = 0.5
                for message in client:
                    if message.channel in arguments.channels:
                        _print(json.dumps(message._asdict()) if arguments.json else
                               _on_one_line(message.data))
                        left -= 1
                        if left <= 0:
                            return 0
        except (Unauthorized, ConnectionClosed, OSError) as error:
            if isinstance(error, Unauthorized) and error.status < 500:
                raise
            print(f"philote: {error}; trying again in {pause:g} seconds", file=sys.stderr)
        time.sleep(pause)
        pause = min(2 * pause, 30)


def _on_one_line(text: str) -> str:
    # Line ends are escaped, and so is what a terminal would take for a command.
    return re.sub("[\0-\x08\n-\x1f\x7f-\x9f\u2028\u2029]",
                  lambda match: match[0].encode("unicode_escape").decode(), text)


def _publish(arguments: argparse.Namespace) -> int:
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    with _connect(arguments, write=[arguments.channel]) as client:
        if arguments.data is not None:
            client.publish(arguments.channel, arguments.data)
        else:
            for line in sys.stdin:
                client.publish(arguments.channel, line.removesuffix("\n"))
    return 0


if __name__ == "__main__":
    main()
