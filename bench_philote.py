#!/usr/bin/env python3
"""What Philote does on this machine, beside what one would write instead of it.

    pip install websockets aiohttp matplotlib    # beside what philote.py itself needs
    python bench_philote.py                      # every load, five rounds: under ten minutes
    python bench_philote.py --quick              # about half a minute, one round
    python bench_philote.py --loads fanout-8,latency --rounds 9 --save out.json --plot out.svg
    python bench_philote.py --compare out.json   # medians beside those of that run
    python bench_philote.py --peer 'original=./philote-go'
    python bench_philote.py --redis              # servers that share a Redis, which it starts

With --redis (pip install redis[hiredis] python-socketio aiohttp, and redis-server on PATH) the rows
are Philote in memory, one and two Philotes on one Redis, and one and two python-socketio with its
Redis manager, which is what one installs for the same job: rooms, many servers, browsers. That one
forwards by PUBLISH and keeps nothing, so a lost connection to Redis loses messages there.
Subscribers of two servers are spread over both; publishers are at the first.

The servers take turns (A B C A B C ...), each started afresh for every load and round, Philote
with its default settings. The peers stand in this file, each as its library's documentation would
write it: the same JSON, tokens and permissions; no compression, no pings, no uvloop. --peer adds
any server that speaks Philote's protocol on $PORT with $SECRET.

How one figure comes about, process by process:

    this one      starts a server, then a load process beside it; ends both; median and range
    the server    philote.py, or `bench_philote.py serve-peer NAME`, or the command of a --peer
    the load      `bench_philote.py run-load NAME PORTS PIDS WIRE SECONDS`: connects, publishes,
                  receives and checks every byte, reads the server's CPU time, prints one line of
                  JSON

A publisher keeps its window full: it has so many messages in flight, and sends the next one when
every subscriber has received the oldest. A message lost, doubled or out of order fails the row.

What the figures do not say: loopback has no latency, no loss and no bandwidth limit; server and
load share the machine's cores and caches, so a busy load process slows the server down as well;
latency includes the time in which the load process gets round to reading; clients that wait for
one another (a closed loop) never show what an overrun server does; memory is the server process's
own and leaves out the kernel's socket buffers. Compare the rows of one run, not two machines.

The sections, bottom up: loads, WebSocket by hand, connecting, checking, publishing and receiving,
the load process, peers, servers, rounds, table, plot, command line.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import datetime
import functools
import gc
import hashlib
import hmac
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import select
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


# ------------------------------------------------------------------------------------------ loads
# What is asked of each server, as one table. Add a row and it is measured, printed and plotted.

@dataclasses.dataclass(frozen=True)
class Load:
    """One load. It lasts for the seconds of a run, within the bounds of `least` and `most`."""

    name: str
    title: str
    most: int                  # messages of each publisher, or connections
    least: int = 0             # messages of each publisher
    kind: str = "messages"     # or another one of KINDS
    publishers: int = 1
    subscribers: int = 1
    stalled: int = 0           # subscribers that never read, beside the others
    window: int = 1            # messages in flight, of each publisher
    size: int = 100            # bytes of `data`
    figure: str = "rate"       # what the ratio compares: "rate", "p50" or "kib"

    @property
    def connections(self) -> int:
        """How many subscribers or idle connections it opens."""
        return self.subscribers if self.kind in ("messages", "return") else self.most

    @property
    def unit(self) -> str:
        """Name what the first column of the table counts."""
        if self.kind == "memory":
            return "KiB per connection; less is better"
        if self.kind == "connections":
            return "connections/s"
        if self.kind == "last":
            return "deliveries/s; the ratio is of p50, less is better"
        if self.kind == "return":
            return "messages/s; p50 and p99 of one that was never away"
        if self.kind == "back":
            return "connections/s; p50 of a message to all of them"
        if self.kind == "churn":
            return "joins and leaves/s; p50 and p99 of the pause between two messages"
        unit = "deliveries/s" if self.subscribers > 1 else "messages/s"
        return unit + ("; the ratio is of p50, less is better" if self.figure == "p50" else "")


LOADS = {load.name: load for load in (
    Load("fanout-1", "1 -> 200, 1 in flight", 20_000, subscribers=200),
    Load("fanout-8", "1 -> 200, 8 in flight", 20_000, subscribers=200, window=8),
    Load("many", "8 -> 50, 8 in flight each", 10_000, publishers=8, subscribers=50, window=8),
    Load("fanin", "8 -> 1, 16 in flight each", 30_000, publishers=8, window=16),
    Load("latency", "1 -> 1, 1 in flight", 60_000, figure="p50"),
    Load("pipe", "1 -> 1, 64 in flight", 240_000, window=64),
    Load("big", "1 -> 50, 16 KiB, 4 in flight", 4_000, subscribers=50, window=4, size=16384),
    # At least 8 MiB: more than the kernel buffers for the one that never reads (tcp(7), tcp_wmem).
    Load("stalled", "1 -> 49 and one that never reads", 12_000, 4_000, subscribers=49, stalled=1,
         window=8, size=2048),
    Load("return", "200 come back, 10,000 messages behind", 10_000, kind="return",
         subscribers=200),
    Load("connect", "connections accepted", 8_000, kind="connections"),
    Load("back", "10,000 come back at once", 10_000, kind="back"),
    Load("last", "1 -> 10,000, until the last has it", 10_000, kind="last", figure="p50"),
    Load("churn", "5,000 a second join and leave, beside 1,000 messages/s", 10_000, kind="churn"),
    Load("idle-1000", "1,000 idle connections", 1_000, kind="memory", figure="kib"),
    Load("idle-10000", "10,000 idle connections", 10_000, kind="memory", figure="kib"),
)}
CHANNEL = "bench"
AT_ONCE = 64           # handshakes under way; below the listen backlog that asyncio servers have
STUCK = 3.0            # seconds without any event after which a load has failed
DRAIN = 15.0           # seconds in which the last messages must have arrived
BUSY = 0.9             # from this share of a core on the load process counts as the limit


@dataclasses.dataclass(frozen=True)
class Target:
    """What a load is made on: servers that act as one, and the protocol that they speak."""

    ports: list[int]
    pids: list[int]
    wire: str = "philote"      # or "socketio"


class LoadFailed(Exception):
    """The load could not be made, or a server broke its promise: the row fails, in these words."""


# -------------------------------------------------------------------------------- WebSocket by hand
# A client's half of RFC 6455, as much as a load needs, on plain bytes: what is sent is encoded
# before the clock starts, what arrives is compared and not parsed. None of it is philote.py's code.

_KEY = "dGhlIHNhbXBsZSBub25jZQ=="           # RFC 6455, section 1.3: the sample key
_ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="   # and the answer to it


def encode_token(secret: str, read: list[str], write: list[str]) -> str:
    """Sign an access key with HS256 (RFC 7515); no two are the same, as with real users."""
    def base64url(data: bytes) -> bytes:
        return base64.urlsafe_b64encode(data).rstrip(b"=")
    claims = {"read": read, "write": write, "jti": uuid.uuid4().hex}
    signed = b".".join(base64url(json.dumps(part).encode())
                       for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    signature = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    return (signed + b"." + base64url(signature)).decode()


def encode_upgrade(target: Target, token: str, query: str = "") -> bytes:
    """Build the opening handshake that presents the token; no extension is offered."""
    path = "/" if target.wire == "philote" else "/socket.io/"
    if target.wire == "socketio":
        query += "&EIO=4&transport=websocket"
    return (f"GET {path}?auth={token}{query} HTTP/1.1\r\nHost: localhost\r\n"
            "Upgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {_KEY}\r\nSec-WebSocket-Version: 13\r\n"
            "\r\n").encode()


def encode_text(payload: bytes, mask: bytes) -> bytes:
    """Build one masked text frame of at most 65,535 bytes (RFC 6455, section 5.2)."""
    size = len(payload)
    head = struct.pack("!BB", 0x81, 0x80 | size) if size < 126 else struct.pack(
        "!BBH", 0x81, 0x80 | 126, size)
    masks = (mask * (size // 4 + 1))[:size]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(masks, "big")
    return head + mask + masked.to_bytes(size, "big")


def decode_head(data: bytes | bytearray, at: int) -> tuple[int, int, int] | None:
    """Return opcode, start of the payload and end of the frame at `at`; None for half a head."""
    if len(data) < at + 2:
        return None
    opcode, size, start = data[at] & 15, data[at + 1], at + 2
    extra = {126: 2, 127: 8}.get(size, 0)
    if len(data) < start + extra:
        return None
    if extra:
        size = int.from_bytes(data[start:start + extra], "big")
    return opcode, start + extra, start + extra + size


def text_of(publisher: int, number: int, size: int) -> bytes:
    """Return the `data` of a message: a mark, its publisher as a letter, its number, padding."""
    return (b"@@%c%07d" % (65 + publisher, number)).ljust(size, b"x")


def encode_messages(load: Load, publisher: int, count: int, wire: str = "philote") -> bytes:
    """Encode all messages of one publisher: frames of one size, one behind the other."""
    masks = random.Random(publisher).randbytes(4 * count)
    before, after = b'{"channel":"%s","data":"' % CHANNEL.encode(), b'"}'
    if wire == "socketio":
        before, after = b'42["publish",' + before, after + b"]"
    return b"".join(
        encode_text(before + text_of(publisher, number, load.size) + after,
                    masks[4 * number:4 * number + 4])
        for number in range(count))


def encode_each(load: Load, count: int, wire: str = "philote") -> list[bytes]:
    """Encode messages of the first publisher, one by one."""
    frames = encode_messages(load, 0, count, wire)
    size = len(frames) // count
    return [frames[at:at + size] for at in range(0, len(frames), size)]


# --------------------------------------------------------------------------------------- connecting
# Opening handshakes, many under way at a time, on one thread.

def open_poller() -> tuple[Any, Callable[[float], list[tuple[int, int]]]]:
    """Return an epoll object, or poll where there is none, and a wait() that takes seconds."""
    if hasattr(select, "epoll"):
        epoll = select.epoll()
        return epoll, epoll.poll
    poller = select.poll()
    return poller, lambda seconds: poller.poll(seconds * 1000)


READ, WRITE = select.POLLIN, select.POLLOUT  # the same numbers for epoll


class TLSSocket(ssl.SSLSocket):
    """A TLS socket that raises BlockingIOError where it would wait, as a plain socket does."""

    def recv_into(self, *arguments: Any) -> int:
        """Read. The buffer must hold a whole record: a rest kept by TLS would wake no poller."""
        try:
            return super().recv_into(*arguments)
        except ssl.SSLWantReadError:
            raise BlockingIOError from None

    def send(self, *arguments: Any) -> int:
        """Write what the socket takes."""
        try:
            return super().send(*arguments)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None


@functools.cache
def client_context() -> ssl.SSLContext | None:
    """Make the clients' context, which trusts any certificate; None without --tls."""
    if "TLS_CERT" not in os.environ:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.sslsocket_class = TLSSocket
    return context


def server_context() -> ssl.SSLContext | None:
    """Load the certificate with which a peer of --tls serves; None without."""
    if "TLS_CERT" not in os.environ:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(os.environ["TLS_CERT"])
    return context


def new_socket() -> socket.socket:
    """Make a socket whose closing resets: ten thousand leave no TIME_WAIT to the next round."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return sock


def start_handshake(port: int, request: bytes, receive_buffer: int = 0) -> socket.socket:
    """Connect and send the request; the reply is still to come."""
    sock = new_socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(STUCK)
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if context := client_context():
        sock = context.wrap_socket(sock)
    sock.sendall(request)
    return sock


def finish_handshake(sock: socket.socket) -> socket.socket:
    """Read the reply and make the socket non-blocking. Raises LoadFailed unless it is a 101."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):  # what is behind it is a message, and left there
        if isinstance(sock, TLSSocket):  # which cannot peek
            data = sock.recv(1)
        else:
            seen = sock.recv(4096, socket.MSG_PEEK)
            end = (head[-3:] + seen).find(b"\r\n\r\n") + 4 - len(head[-3:])
            data = sock.recv(end if end >= 4 - len(head[-3:]) else len(seen)) if seen else b""
        if not data:
            raise LoadFailed("the server closed a connection during the handshake")
        head += data
    if not head.startswith(b"HTTP/1.1 101") or _ACCEPT not in head:
        raise LoadFailed(f"a handshake was refused: {head.splitlines()[0].decode('latin-1')}")
    sock.setblocking(False)
    return sock


def greet_socketio(sock: socket.socket) -> None:
    """Connect to the default namespace, as the protocols of Engine.IO and Socket.IO begin."""
    sock.settimeout(STUCK)
    sock.sendall(encode_text(b"40", b"mask"))
    data = b""
    while b"40{" not in data or not data.endswith(b"}"):
        data += (more := sock.recv(4096))
        if not more:
            raise LoadFailed("the server closed a connection during the greeting")
    sock.setblocking(False)


def connect_all(target: Target, requests: Iterable[bytes]) -> list[socket.socket]:
    """Open one connection for each request, AT_ONCE of them under way at a time."""
    poller, wait = open_poller()
    requests, ports = iter(requests), itertools.cycle(target.ports)
    under_way: dict[int, socket.socket] = {}
    done: list[socket.socket] = []
    while True:
        for request in itertools.islice(requests, AT_ONCE - len(under_way)):
            sock = start_handshake(next(ports), request)
            under_way[sock.fileno()] = sock
            poller.register(sock.fileno(), READ)
        if not under_way:
            return done
        ready = wait(STUCK)
        if not ready:
            raise LoadFailed(f"no answer to a handshake in {STUCK:.0f} s, after {len(done)}")
        for fd, _ in ready:
            poller.unregister(fd)
            done.append(finish_handshake(under_way.pop(fd)))
            if target.wire == "socketio":
                greet_socketio(done[-1])


def close_all(sockets: Iterable[socket.socket]) -> None:
    """Close them, each with a reset."""
    for sock in sockets:
        sock.close()


# ----------------------------------------------------------------------------------------- checking
# Every byte that arrives is checked, yet no Python code runs per delivery. All subscribers of a
# channel are sent the same frames, so one of them - whoever is ahead - has each message checked,
# once; the others must receive those very bytes, which is one memcmp per read. A subscriber that
# receives them in another order is checked on its own from there on: only the order of each
# publisher's messages is a promise that every server makes.

class Stream:
    """The messages of the channel in one order of arrival, each checked as it comes in."""

    def __init__(self, load: Load, sent_at: list[list[float]]) -> None:
        self.load = load
        self.raw = bytearray()                # whole frames, then perhaps a part of one
        self.checked = 0                      # bytes of `raw` that are whole, checked frames
        self.size = sys.maxsize               # of each frame, known with the first
        self.publishers: list[int] = []       # who sent message 0, 1, 2 ...
        self.sent_times: list[float] = []     # and when
        self._sent_at = sent_at               # by publisher and number
        self._next = [0] * load.publishers    # the number each one's next message must have
        self._patterns: dict[int, tuple[bytes, bytes]] = {}  # frames without their number
        self._letter = 0                      # where the publisher's letter stands in a frame

    def extend(self, data: bytes) -> None:
        """Take what arrived behind all that is known. Raises LoadFailed where it is not right."""
        raw = self.raw
        raw += data
        while len(raw) > self.checked:
            publisher = self._foreseen()
            if publisher < 0:
                if not self._inspect():
                    return
                continue
            self.publishers.append(publisher)
            self.sent_times.append(self._sent_at[publisher][self._next[publisher]])
            self._next[publisher] += 1
            self.checked += self.size

    def _foreseen(self) -> int:
        """Return the publisher of the next message if the message is exactly as due, else -1."""
        at = self.checked
        if len(self.raw) - at < self.size:
            return -1
        publisher = self.raw[at + self._letter] - 65
        if publisher not in self._patterns:
            return -1
        before, after = self._patterns[publisher]
        expected = b"%b%07d%b" % (before, self._next[publisher], after)
        return publisher if self.raw.startswith(expected, at) else -1

    def _inspect(self) -> bool:
        """Look at what was not foreseen: False if it is not a whole frame yet.

        It may be a ping, which is taken out, or a publisher's first message, which is learnt.
        """
        at = self.checked
        head = decode_head(self.raw, at)
        if head is None or len(self.raw) < head[2]:
            return False
        opcode, start, end = head
        frame = bytes(self.raw[at:end])
        if opcode == 9:
            del self.raw[at:end]
        elif opcode == 8:
            code = int.from_bytes(self.raw[start:start + 2], "big")
            raise LoadFailed(f"the server closed a subscriber's connection with code {code}")
        else:
            try:
                value = json.loads(frame[start - at:].removeprefix(b"42"))
                self._learn(frame, value[1] if isinstance(value, list) else value)
            except (ValueError, LookupError, TypeError, AttributeError):
                raise LoadFailed(f"a frame that is no message: {frame[:80]!r}") from None
        return True

    def _learn(self, frame: bytes, message: dict[str, Any]) -> None:
        """Take a publisher's first message as the pattern of those that follow."""
        mark = frame.index(b"@@")
        publisher, number = frame[mark + 2] - 65, int(frame[mark + 3:mark + 10])
        due = self._next[publisher]
        if number != due:
            what = "lost" if number > due else "doubled or out of order"
            raise LoadFailed(f"a message was {what}: number {number} came where {due} was due")
        right = (message["channel"] == CHANNEL and isinstance(message["issuer"], str)
                 and message["data"].encode() == text_of(publisher, number, self.load.size))
        if not right or publisher in self._patterns or self.size not in (sys.maxsize, len(frame)):
            raise LoadFailed(f"a message arrived changed: {frame[:80]!r}")
        self._patterns[publisher] = frame[:mark + 3], frame[mark + 10:]
        self.size, self._letter = len(frame), mark + 2

    def fork(self, at: int) -> Stream:
        """Return a stream of its own for a subscriber that has received the first `at` bytes."""
        other = Stream(self.load, self._sent_at)
        other.extend(bytes(self.raw[:at]))
        return other


# ------------------------------------------------------------------------ publishing and receiving
# One thread and one epoll object do both. The loops below are what must be fast: they handle what
# one read brought, be it one message or fifty.

class Reader:
    """A subscriber: how far it has come in the stream it follows."""

    __slots__ = ("recv_into", "stream", "at", "sampled")

    def __init__(self, sock: socket.socket, stream: Stream, sampled: bool) -> None:
        self.recv_into = sock.recv_into
        self.stream = stream
        self.at = 0              # bytes received
        self.sampled = sampled   # whether its latencies are noted


class Publisher:
    """A publisher: its frames, encoded beforehand, and how many may be and are sent."""

    def __init__(self, sock: socket.socket, frames: bytes, count: int) -> None:
        self.sock = sock
        self.frames = memoryview(frames)
        self.frame_size = len(frames) // count
        self.position = 0                  # bytes sent
        self.goal = 0                      # messages to be sent by now
        self.done = 0                      # messages that every subscriber has received
        self.sent_at: list[float] = []     # when each became due

    def send(self) -> bool:
        """Send up to the goal; tell whether the socket took all of it."""
        end = self.goal * self.frame_size
        try:
            self.position += self.sock.send(self.frames[self.position:end])
        except BlockingIOError:
            pass
        return self.position == end


class Exchange:
    """Publishers that keep their windows full, and subscribers that must receive everything."""

    def __init__(self, load: Load, publishers: list[Publisher],
                 subscribers: list[socket.socket]) -> None:
        self.load = load
        self.publishers = {publisher.sock.fileno(): publisher for publisher in publishers}
        self.stream = Stream(load, [publisher.sent_at for publisher in publishers])
        self._by_number = publishers
        step = max(1, len(subscribers) // 10)   # ten of them are enough for latencies
        self.readers = {sock.fileno(): Reader(sock, self.stream, number % step == step // 2)
                        for number, sock in enumerate(subscribers)}
        self.latencies: list[float] = []
        self.finished = 0                       # messages that every subscriber has received
        self._standing = [0] * (load.publishers * load.most + 1)  # readers by messages received
        self._standing[0] = len(subscribers)
        self._buffer = memoryview(bytearray(1 << 17))  # one for all: it stays in the cache
        self.poller, self.wait = open_poller()
        for fd in itertools.chain(self.publishers, self.readers):
            self.poller.register(fd, READ)

    def run(self, seconds: float, least: int, most: int) -> int:
        """Publish for so long, or until each one's message `most`, and return when all arrived.

        When the time is over it goes on to message `least`. Returns the number of messages.
        """
        before = self.finished
        end = time.perf_counter() + seconds
        while True:
            now = time.perf_counter()
            if now > end:
                most = least
                if now > end + DRAIN:
                    raise LoadFailed(f"messages were still missing after {DRAIN:.0f} s")
            if not self.publish(now, most):
                return self.finished - before
            events = self.wait(STUCK)
            if not events:
                raise LoadFailed(f"stuck: nothing arrived for {STUCK:.0f} s")
            self.receive(events)
            self.advance()

    def check_silence(self) -> None:
        """See that nothing comes behind the last message. Raises LoadFailed."""
        if events := self.wait(0.05):
            self.receive(events)

    def publish(self, now: float, most: int) -> bool:
        """Send what the windows allow; tell whether any message is in flight."""
        in_flight, window = False, self.load.window
        for publisher in self._by_number:
            goal = min(publisher.done + window, most)
            if goal > publisher.goal:
                publisher.sent_at.extend([now] * (goal - publisher.goal))
                publisher.goal = goal
                if not publisher.send():
                    self.poller.modify(publisher.sock.fileno(), READ | WRITE)
            if publisher.goal > publisher.done:
                in_flight = True
        return in_flight

    def receive(self, events: list[tuple[int, int]]) -> None:
        """Read from each socket that has something, and move its reader on."""
        readers, standing, stream, buffer = self.readers, self._standing, self.stream, self._buffer
        for fd, _ in events:
            reader = readers.get(fd)
            if reader is None:
                self.attend(self.publishers[fd])
                continue
            try:
                data, old = buffer[:reader.recv_into(buffer)], reader.at
            except BlockingIOError:  # a part of a record of TLS, or nothing for us
                continue
            if data and reader.stream.raw.startswith(data, old):
                reader.at = new = old + len(data)
            else:
                reader.at = new = self.go_ahead(reader, bytes(data))
            old //= stream.size
            new //= stream.size
            if old != new:
                standing[old] -= 1
                standing[new] += 1
                if reader.sampled:
                    now = time.perf_counter()
                    self.latencies.extend([now - t for t in reader.stream.sent_times[old:new]])

    def go_ahead(self, reader: Reader, data: bytes) -> int:
        """Take bytes that the reader's stream does not have yet, or has otherwise."""
        if not data:
            raise LoadFailed("the server closed a subscriber's connection")
        raw = reader.stream.raw
        known = len(raw) - reader.at
        if raw[reader.at:] == data[:known]:
            reader.stream.extend(data[known:])
        else:
            reader.stream = reader.stream.fork(reader.at)
            reader.stream.extend(data)
        return len(reader.stream.raw)

    def advance(self) -> None:
        """Count the messages that the slowest reader has received by now."""
        standing, publishers, finished = self._standing, self.stream.publishers, self.finished
        while not standing[finished]:
            self._by_number[publishers[finished]].done += 1
            finished += 1
        self.finished = finished

    def attend(self, publisher: Publisher) -> None:
        """Go on sending to a socket that was full; nothing should arrive on it."""
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            data = publisher.sock.recv(4096)
            if not data:
                raise LoadFailed("the server closed a publisher's connection")
            if data[0] != 0x89:  # a ping
                raise LoadFailed(f"the server told a publisher: {data[:80]!r}")
        if publisher.send():
            self.poller.modify(publisher.sock.fileno(), READ)


# -------------------------------------------------------------------------------- the load process
# What `run-load` does: one load on one server. It measures the server from outside, through /proc.

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def cpu_seconds(pids: list[int]) -> float | None:
    """Return the CPU time processes have used, to 10 ms; None where there is no /proc (proc(5))."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def resident_kib(pids: list[int]) -> int | None:
    """Return the resident memory of processes in KiB; None where there is no /proc."""
    try:
        return sum(
            int(line.split()[1]) for pid in pids
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmRSS:"))
    except OSError:
        return None


def difference(before: float | None, after: float | None) -> float | None:
    """Subtract what may not have been measured."""
    return None if before is None or after is None else after - before


class Meter:
    """What a stretch of time cost: the server's CPU, this process's, and the clock."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids
        self.cpu = cpu_seconds(pids)
        self.own = time.process_time()
        self.start = time.perf_counter()

    def read(self, events: int) -> dict[str, float | None]:
        """Return the figures of so many events since the meter was made."""
        seconds = time.perf_counter() - self.start
        own = time.process_time() - self.own
        spent = difference(self.cpu, cpu_seconds(self.pids))
        return {"rate": events / seconds, "busy": own / seconds, "events": events,
                "seconds": seconds, "server_busy": None if spent is None else spent / seconds,
                "cpu_us": None if spent is None else spent * 1e6 / max(events, 1)}


def upgrades(target: Target, secret: str, count: int, may: str = "read",
             query: str = "") -> list[bytes]:
    """Build the handshakes of that many clients that may read, or write, the channel."""
    read, write = ([CHANNEL], []) if may == "read" else ([], [CHANNEL])
    return [encode_upgrade(target, encode_token(secret, read, write), query) for _ in range(count)]


def load_messages(load: Load, target: Target, secret: str, seconds: float) -> dict[str, Any]:
    """Publish and receive; `most` is cut for short runs, as encoding takes its time as well."""
    load = dataclasses.replace(load, most=max(load.least, int(load.most * min(seconds, 1))))
    frames = [encode_messages(load, number, load.most, target.wire)
              for number in range(load.publishers)]
    port = target.ports[0]
    stalled = [finish_handshake(start_handshake(port, request, receive_buffer=4096))
               for request in upgrades(target, secret, load.stalled)]
    subscribers = connect_all(target, upgrades(target, secret, load.subscribers))
    publishers = connect_all(target, upgrades(target, secret, load.publishers, "write"))
    time.sleep(0.1)  # a server may answer a handshake a moment before it takes the subscriber in
    exchange = Exchange(load, [Publisher(sock, text, load.most)
                               for sock, text in zip(publishers, frames)], subscribers)
    gc.disable()
    exchange.run(seconds / 8, 0, load.most // 8)  # to warm up
    exchange.latencies.clear()
    meter, memory = Meter(target.pids), resident_kib(target.pids)
    messages = exchange.run(seconds, load.least, load.most)
    result: dict[str, Any] = meter.read(messages * load.subscribers)
    result.update(latencies_ms(exchange.latencies))
    result["grown_kib"] = difference(memory, resident_kib(target.pids))
    exchange.check_silence()
    if stalled:
        result["note"] = "stalled one " + ("dropped" if was_dropped(stalled[0]) else "kept")
    close_all(stalled + subscribers + publishers)
    return result


def latencies_ms(latencies: list[float]) -> dict[str, float | None]:
    """Return median and 99th percentile in milliseconds, by nearest rank."""
    ordered = sorted(latencies)
    return {name: 1e3 * ordered[int((len(ordered) - 1) * share)] if ordered else None
            for name, share in (("p50", 0.5), ("p99", 0.99))}


def was_dropped(sock: socket.socket) -> bool:
    """Read what waits for a subscriber that never read, to see whether the end is behind it."""
    end = time.monotonic() + 2
    sock.settimeout(0.3)
    with contextlib.suppress(socket.timeout):
        while time.monotonic() < end:
            try:
                if not sock.recv(1 << 20):
                    return True
            except ConnectionError:
                return True
    return False


def load_connections(load: Load, target: Target, secret: str,
                     seconds: float) -> dict[str, Any]:
    """Open connections, and keep them, for some seconds."""
    requests = upgrades(target, secret, fitting(load.most))
    first = connect_all(target, requests[:AT_ONCE])  # to warm up
    meter = Meter(target.pids)
    end = meter.start + seconds
    in_time = itertools.takewhile(lambda _: time.perf_counter() < end, requests[AT_ONCE:])
    connections = connect_all(target, in_time)
    result = meter.read(len(connections))
    close_all(first + connections)
    return result


def load_memory(load: Load, target: Target, secret: str, seconds: float) -> dict[str, Any]:
    """Open connections that then do nothing, and see how much memory the server has taken."""
    count = fitting(load.most)
    first = connect_all(target, upgrades(target, secret, 1))  # a server may import more for it
    before = settled_kib(target.pids)
    requests = upgrades(target, secret, count)
    meter = Meter(target.pids)
    connections = connect_all(target, requests)
    result: dict[str, Any] = meter.read(count)
    grown = difference(before, settled_kib(target.pids))
    result["kib"] = None if grown is None else grown / count
    if count < load.most:
        result["note"] = f"only {count:,} connections: the limit of open files allows no more"
    poller, wait = open_poller()
    for sock in connections:
        poller.register(sock.fileno(), READ)
    for fd, _ in wait(0):
        sock = next(sock for sock in connections if sock.fileno() == fd)
        if not sock.recv(4096)[:1] == b"\x89":  # a ping
            raise LoadFailed("the server did not keep all connections")
    close_all(first + connections)
    return result


def tell_all(connections: list[socket.socket], publisher: socket.socket,
             message: bytes) -> float:
    """Publish a message; returns the seconds until the last has it, whole. Raises LoadFailed."""
    poller, wait = open_poller()
    under_way = {sock.fileno(): (sock, b"") for sock in connections}
    for number in under_way:
        poller.register(number, READ)
    start = time.perf_counter()
    publisher.sendall(message)
    while under_way:
        ready = wait(STUCK)
        if not ready:
            raise LoadFailed(f"{len(under_way)} have not received a message in {STUCK:.0f} s")
        for number, _ in ready:
            sock, data = under_way[number]
            if not (more := sock.recv(4096)):
                raise LoadFailed("the server closed a connection")
            data += more
            under_way[number] = sock, data
            if b"@@" in data and (head := decode_head(data, 0)) and len(data) == head[2]:
                poller.unregister(number)
                del under_way[number]
    return time.perf_counter() - start


def load_last(load: Load, target: Target, secret: str, seconds: float) -> dict[str, Any]:
    """Publish one message at a time to many subscribers, each when the last has the one before."""
    connections = connect_all(target, upgrades(target, secret, fitting(load.most)))
    publisher, = connect_all(target, upgrades(target, secret, 1, "write"))
    publisher.settimeout(STUCK)
    messages = encode_each(load, 30, target.wire)
    time.sleep(0.5)
    meter = Meter(target.pids)
    times = [tell_all(connections, publisher, message) for message in messages]
    result: dict[str, Any] = meter.read(len(times) * len(connections))
    result.update(latencies_ms(times))
    result["note"] = f"worst {1e3 * max(times):.0f} ms"
    close_all([publisher, *connections])
    return result


def load_back(load: Load, target: Target, secret: str, seconds: float) -> dict[str, Any]:
    """Open all connections at once, each with a position, then publish a message to them."""
    stayed, = connect_all(target, upgrades(target, secret, 1, query="&since=now"))
    query = ""
    with contextlib.suppress(LoadFailed):  # a peer has no positions: its clients come without
        query = "&since=" + read_position(stayed, 0.5)
    publisher, = connect_all(target, upgrades(target, secret, 1, "write"))
    publisher.settimeout(STUCK)
    requests = upgrades(target, secret, fitting(load.most), query=query)
    poller, wait = open_poller()
    meter, under_way, done = Meter(target.pids), dict[int, tuple[socket.socket, bytes]](), []
    for request in requests:
        sock = new_socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", target.ports[0]))
        under_way[sock.fileno()] = sock, request
        poller.register(sock.fileno(), WRITE)
    while under_way:
        ready = wait(2 * STUCK)
        if not ready:
            raise LoadFailed(f"{len(under_way)} were not served in {2 * STUCK:.0f} s")
        for number, _ in ready:
            sock, request = under_way[number]
            if request:
                sock.sendall(request)  # into an empty buffer; raises OSError where it was refused
                under_way[number] = sock, b""
                poller.modify(number, READ)
            else:
                poller.unregister(number)
                del under_way[number]
                done.append(finish_handshake(sock))
    result: dict[str, Any] = meter.read(len(done))
    served = time.perf_counter() - meter.start
    if query:
        for sock in done:
            read_frames(sock, 1)
            sock.setblocking(False)
    told = tell_all(done, publisher, encode_messages(load, 0, 1, target.wire))
    result.update(latencies_ms([told]))
    result["note"] = f"all within {served:.1f} s"
    close_all([stayed, publisher, *done])
    return result


def leave_all(sockets: list[socket.socket], order: bytes) -> None:
    """Let each leave, one after the other. Raises LoadFailed where a server knows no such order."""
    for sock in sockets:
        sock.send(order)
        sock.settimeout(STUCK)
        try:
            while b"unsubscribed" not in sock.recv(4096):
                pass
        except socket.timeout:
            raise LoadFailed("this server lets nobody join and leave") from None
        sock.setblocking(False)


def join_and_leave(sockets: list[socket.socket], join: bytes, leave: bytes) -> Iterator[None]:
    """Let one after the other join and leave; each step is one of the two."""
    for sock in itertools.cycle(sockets):
        sock.send(join)
        yield
        sock.send(leave)
        with contextlib.suppress(BlockingIOError):
            sock.recv(1 << 16)  # what came since the last time it had its turn
        yield


def load_churn(load: Load, target: Target, secret: str, seconds: float) -> dict[str, Any]:
    """Let subscribers join and leave a channel in turn, while messages go to one that stays."""
    stayed, = connect_all(target, upgrades(target, secret, 1))
    publisher, = connect_all(target, upgrades(target, secret, 1, "write"))
    others = connect_all(target, upgrades(target, secret, fitting(load.most), query="&last=0"))
    join, leave = (encode_text(json.dumps({order: [CHANNEL]}).encode(), b"mask")
                   for order in ("subscribe", "unsubscribe"))
    leave_all(others, leave)
    messages = encode_each(load, int(1000 * max(3, 3 * seconds)), target.wire)
    gc.disable()
    steps, arrived, data = join_and_leave(others, join, leave), [], b""
    meter = Meter(target.pids)
    for number, message in enumerate(messages, 1):
        publisher.send(message)
        for _ in range(5):
            next(steps)
        while (left := meter.start + number / 1000 - time.perf_counter()) > 0:
            if select.select([stayed], [], [], left)[0]:
                data += stayed.recv(1 << 16)
                arrived.append(time.perf_counter())
    result: dict[str, Any] = meter.read(5 * len(messages))
    stayed.settimeout(STUCK)
    while data.count(b"@@") < len(messages):
        if not (more := stayed.recv(1 << 16)):
            raise LoadFailed("the server closed a connection")
        data += more
        arrived.append(time.perf_counter())
    pauses = [after - before for before, after in zip(arrived, arrived[1:])]
    result.update(latencies_ms(pauses))
    result["note"] = f"longest pause {1e3 * max(pauses):.0f} ms"
    close_all([stayed, publisher, *others])
    return result


def read_frames(sock: socket.socket, count: int, seconds: float = STUCK) -> bytes:
    """Read so many whole frames. Raises LoadFailed where they do not come."""
    data, at = b"", 0
    sock.settimeout(seconds)
    try:
        while count:
            head = decode_head(data, at)
            if head and head[2] <= len(data):
                at, count = head[2], count - 1
            elif more := sock.recv(1 << 20):
                data += more
            else:
                raise LoadFailed("the server closed a connection")
    except socket.timeout:
        raise LoadFailed("this server sends nothing of the past") from None
    return data


def read_position(sock: socket.socket, seconds: float = STUCK) -> str:
    """Return the position that the first frame tells a client of `since`. Raises LoadFailed."""
    begin = read_frames(sock, 1, seconds)
    return json.loads(begin[2 if begin[1] < 126 else 4:])["connected"]["id"]


def read_what_was_missed(sockets: list[socket.socket], missed: bytes) -> None:
    """Read until each has a first frame and these bytes behind it. Raises LoadFailed."""
    poller, wait = open_poller()
    under_way = {sock.fileno(): sock for sock in sockets}
    at = dict.fromkeys(under_way, -1)  # bytes of `missed` received; -1: not yet the first frame
    for number, sock in under_way.items():
        sock.setblocking(False)
        poller.register(number, READ)
    while under_way:
        ready = wait(STUCK)
        if not ready:
            raise LoadFailed("this server sends nothing of the past")
        for number, _ in ready:
            data = under_way[number].recv(1 << 20)
            if at[number] < 0:
                data, at[number] = data[decode_head(data, 0)[2]:], 0
            part = missed[at[number]:at[number] + len(data)]
            if data[:len(part)] != part:
                raise LoadFailed("what came back is not what was missed")
            at[number] += len(part)
            if at[number] == len(missed):
                poller.unregister(number)
                del under_way[number]


def load_return(load: Load, target: Target, secret: str, seconds: float) -> dict[str, Any]:
    """Let subscribers come back at once and read what they missed, beside one that stayed.

    What comes back must be, byte for byte, what the one that stayed was sent.
    """
    stayed, = connect_all(target, upgrades(target, secret, 1, query="&since=now"))
    position = read_position(stayed)
    publisher, = connect_all(target, upgrades(target, secret, 1, "write"))
    messages = encode_messages(load, 0, load.most + 10_000)
    size = len(messages) // (load.most + 10_000)
    publisher.settimeout(None)
    sender = threading.Thread(target=publisher.sendall, args=(messages[:size * load.most],))
    sender.start()
    missed = read_frames(stayed, load.most)
    sender.join()
    requests = upgrades(target, secret, load.subscribers, query=f"&since={position}")
    meter, latencies = Meter(target.pids), []
    over = threading.Event()

    def stay() -> None:
        for number in itertools.count(load.most):
            start = time.perf_counter()
            publisher.sendall(messages[size * number:size * (number + 1)])
            read_frames(stayed, 1)
            latencies.append(time.perf_counter() - start)
            if over.wait(0.01):
                return

    staying = threading.Thread(target=stay)
    staying.start()
    try:
        returned = connect_all(target, requests)
        read_what_was_missed(returned, missed)
        result: dict[str, Any] = meter.read(load.most * load.subscribers)
    finally:
        over.set()
        staying.join()
    result.update(latencies_ms(latencies))
    result["note"] = f"all caught up within {result['seconds']:.1f} s"
    close_all([stayed, publisher, *returned])
    return result


def settled_kib(pids: list[int]) -> int | None:
    """Return the resident memory as soon as it stays within 1 % for a while, or after 3 s."""
    last = None
    for _ in range(15):
        time.sleep(0.2)
        now = resident_kib(pids)
        if now is None or last is not None and abs(now - last) <= last / 100:
            return now
        last = now
    return last


def fitting(connections: int) -> int:
    """Cut a number of connections to what a process may open; the server has the same limit."""
    import resource
    return min(connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)


KINDS = {"messages": load_messages, "connections": load_connections, "memory": load_memory,
         "return": load_return, "back": load_back, "last": load_last, "churn": load_churn}


def run_load(name: str, ports: str, pids: str, wire: str, seconds: str) -> int:
    """Make one load and print its result, or why it failed, as one line of JSON."""
    load = LOADS[name]
    try:
        target = Target([*map(int, ports.split(","))], [*map(int, pids.split(","))], wire)
        result = KINDS[load.kind](load, target, os.environ["SECRET"], float(seconds))
    except LoadFailed as error:
        result = {"failed": str(error)}
    except OSError as error:
        result = {"failed": f"connection: {error.strerror or error}"}
    print(json.dumps(result))
    return 0


# ------------------------------------------------------------------------------------------- peers
# The same service, as one would write it with a library: its documentation's way of authenticating
# and of broadcasting, on plain asyncio. The imports stand in the functions: nobody needs a peer's
# package who measures without it, and a load process starts sooner.

def decode_access_key(token: str, secret: str) -> tuple[list[str], list[str]]:
    """Return the channels that may be read and written. Raises jwt.PyJWTError or KeyError."""
    import jwt
    claims = jwt.decode(token, secret, algorithms=["HS256"])
    return claims["read"], claims["write"]


def decode_message(text: str, writable: Iterable[str]) -> tuple[str, str] | None:
    """Return channel and data of a client's message, None where it may not be published."""
    try:
        message = json.loads(text)
        channel, data = message["channel"], message["data"]
    except (ValueError, KeyError, TypeError):
        return None
    return (channel, data) if channel in writable else None


def encode_message(issuer: str, channel: str, data: str) -> str:
    """Build what the subscribers get."""
    return json.dumps({"issuer": issuer, "channel": channel, "data": data})


async def serve_websockets(port: int, secret: str) -> None:
    """Serve with the `websockets` library and its broadcast()."""
    from urllib.parse import parse_qs, urlsplit

    import jwt
    from websockets.asyncio.server import ServerConnection, broadcast, serve
    from websockets.http11 import Request, Response

    readers: dict[str, set[ServerConnection]] = {}

    def authenticate(connection: Any, request: Request) -> Response | None:
        query = parse_qs(urlsplit(request.path).query)
        try:
            connection.access_key = decode_access_key(query["auth"][0], secret)
        except (jwt.PyJWTError, KeyError):
            return connection.respond(401, "a valid token is needed\n")
        return None

    async def handle(connection: Any) -> None:
        issuer, (readable, writable) = str(uuid.uuid4()), connection.access_key
        for channel in readable:
            readers.setdefault(channel, set()).add(connection)
        try:
            async for text in connection:
                if message := decode_message(text, writable):
                    others = readers.get(message[0], set()) - {connection}
                    broadcast(others, encode_message(issuer, *message))
                else:
                    await connection.send('{"error": "forbidden"}')
        finally:
            for channel in readable:
                readers[channel].discard(connection)

    async with serve(handle, "127.0.0.1", port, process_request=authenticate,
                     compression=None, ping_interval=None, ssl=server_context()) as server:
        await server.serve_forever()


async def serve_aiohttp(port: int, secret: str) -> None:
    """Serve with aiohttp; each send is awaited in turn, as in its documentation's examples."""
    import asyncio

    import jwt
    from aiohttp import WSMsgType, web

    readers: dict[str, set[web.WebSocketResponse]] = {}

    async def handle(request: web.Request) -> web.WebSocketResponse:
        try:
            readable, writable = decode_access_key(request.query["auth"], secret)
        except (jwt.PyJWTError, KeyError):
            raise web.HTTPUnauthorized() from None
        issuer, websocket = str(uuid.uuid4()), web.WebSocketResponse(compress=False)
        await websocket.prepare(request)
        for channel in readable:
            readers.setdefault(channel, set()).add(websocket)
        try:
            async for received in websocket:
                if received.type != WSMsgType.TEXT:
                    continue
                if message := decode_message(received.data, writable):
                    text = encode_message(issuer, *message)
                    for reader in readers.get(message[0], set()) - {websocket}:
                        with contextlib.suppress(ConnectionResetError):
                            await reader.send_str(text)
                else:
                    await websocket.send_str('{"error": "forbidden"}')
        finally:
            for channel in readable:
                readers[channel].discard(websocket)
        return websocket

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=server_context()).start()
    await asyncio.Event().wait()


async def serve_socketio(port: int, secret: str) -> None:
    """Serve with python-socketio: a room for each channel, and its manager that shares a Redis."""
    import asyncio

    import jwt
    import socketio
    from aiohttp import web

    server = socketio.AsyncServer(
        async_mode="aiohttp", client_manager=socketio.AsyncRedisManager(os.environ["REDIS_URL"]),
        async_handlers=False, ping_interval=3600, http_compression=False,  # in order
        max_http_buffer_size=1 << 20)
    writable: dict[str, list[str]] = {}

    async def connect(sid: str, environ: dict[str, Any], auth: Any = None) -> None:
        from urllib.parse import parse_qs
        try:
            readable, writable[sid] = decode_access_key(
                parse_qs(environ["QUERY_STRING"])["auth"][0], secret)
        except (jwt.PyJWTError, KeyError):
            raise socketio.exceptions.ConnectionRefusedError("a valid token is needed") from None
        for channel in readable:
            await server.enter_room(sid, channel)

    async def publish(sid: str, message: dict[str, str]) -> None:
        if message["channel"] in writable[sid]:
            await server.emit("message", {"issuer": sid, **message}, room=message["channel"],
                              skip_sid=sid)

    async def disconnect(sid: str, reason: Any = None) -> None:
        writable.pop(sid, None)

    for handler in connect, publish, disconnect:
        server.on(handler.__name__, handler)
    app = web.Application()
    server.attach(app)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


PEERS: dict[str, Callable[[int, str], Any]] = {
    "websockets": serve_websockets, "aiohttp": serve_aiohttp}
REDIS_PEERS: dict[str, Callable[[int, str], Any]] = {"socketio": serve_socketio}


def serve_peer(name: str) -> int:
    """Serve until the process is ended."""
    import asyncio
    asyncio.run({**PEERS, **REDIS_PEERS}[name](int(os.environ["PORT"]), os.environ["SECRET"]))
    return 0


# ----------------------------------------------------------------------------------------- servers
# Starting and ending a server process. Each one started here is ended here, and nothing else is.

class NoServer(Exception):
    """A server does not start; the message says why in one line."""


@dataclasses.dataclass
class Server:
    """One of the servers that are compared."""

    name: str
    command: list[str]
    whole_environ: bool = False     # a --peer may need what stands in ours
    is_philote: bool = False
    processes: int = 1
    wire: str = "philote"
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    down: str = ""                  # why it was left out, once it did not start

    def environ(self, port: int, secret: str) -> dict[str, str]:
        """Return its environment; settings of the caller's own must not reach Philote."""
        common = "PATH", "HOME", "LANG", "TMPDIR", "TLS_CERT"
        kept = {name: value for name, value in os.environ.items() if self.whole_environ
                or name.startswith("PYTHON") or name in common}
        return {**kept, "PORT": str(port), "SECRET": secret, "LOGLEVEL": "error",
                "MAX_CONNECTIONS": "20000", **self.settings}

    def is_serving(self, port: int) -> bool:
        """Ask Philote for its health; of a peer it is enough that it accepts a connection."""
        try:
            if not self.is_philote:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return True
            context = client_context()
            connection = (http.client.HTTPSConnection("127.0.0.1", port, timeout=1, context=context)
                          if context else http.client.HTTPConnection("127.0.0.1", port, timeout=1))
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def free_port() -> int:
    """Ask the system for a port that nobody uses."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def running(server: Server, secret: str) -> Iterator[Target]:
    """Run a server, or several that are one. Raises NoServer where it does not start."""
    target = Target([free_port() for _ in range(server.processes)], [], server.wire)
    with contextlib.ExitStack() as stack:
        for port in target.ports:
            errors = stack.enter_context(tempfile.TemporaryFile())
            try:
                process = subprocess.Popen(
                    server.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=errors, env=server.environ(port, secret), start_new_session=True)
            except OSError as error:
                raise NoServer(f"{server.command[0]}: {error.strerror}") from None
            stack.callback(end_process, process)
            await_serving(server, process, port, errors)
            target.pids.append(process.pid)
        yield target


@contextlib.contextmanager
def running_redis() -> Iterator[str]:
    """Run a Redis that writes nothing to disk; yields its URL."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [shutil.which("redis-server") or "valkey-server", "--port", str(port), "--bind",
             "127.0.0.1", "--save", "", "--dir", folder], stdout=subprocess.DEVNULL)
        try:
            await_serving(Server("redis", []), process, port, tempfile.TemporaryFile())
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            end_process(process)


@contextlib.contextmanager
def new_certificate() -> Iterator[str]:
    """Let openssl make a key and its certificate; yields the path of the file that holds both."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "localhost.pem")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-days", "2", "-subj", "/CN=localhost", "-out", path, "-keyout", path],
            check=True, stderr=subprocess.DEVNULL)
        yield path


def await_serving(server: Server, process: subprocess.Popen[bytes], port: int,
                  errors: Any, limit: float = 10) -> None:
    """Wait until the server serves. Raises NoServer with the last line it wrote to stderr."""
    end = time.monotonic() + limit
    while not server.is_serving(port):
        late = time.monotonic() > end
        if late or process.poll() is not None:
            errors.seek(0)
            last = (errors.read().decode(errors="replace").strip() or "no message").splitlines()[-1]
            raise NoServer(f"not serving after {limit:.0f} s: {last}" if late else
                           f"ended with status {process.returncode}: {last}")
        time.sleep(0.02)


def end_process(process: subprocess.Popen[Any]) -> None:
    """End a process that was started here, by its id: politely, then for good."""
    process.terminate()
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def own_servers() -> tuple[list[Server], list[str]]:
    """Return Philote and the peers whose packages are there, and a line for each that is not."""
    servers = [Server("philote", [sys.executable, str(HERE.with_name("philote.py"))],
                      is_philote=True)]
    missing = []
    for name in PEERS:
        lacking = [package for module, package in ((name, name), ("jwt", "PyJWT"))
                   if importlib.util.find_spec(module) is None]
        if lacking:
            missing.append(f"{name} is left out; to have it: pip install {' '.join(lacking)}")
        else:
            servers.append(Server(name, [sys.executable, str(HERE), "serve-peer", name]))
    return servers, missing


def redis_servers(url: str) -> list[Server]:
    """Return what is compared with --redis."""
    philote = [sys.executable, str(HERE.with_name("philote.py"))]
    shared = {"REDIS_URL": url}
    return [
        Server("in memory", philote, is_philote=True),
        Server("redis", philote, is_philote=True, settings=shared),
        Server("redis x2", philote, is_philote=True, processes=2, settings=shared),
        Server("socketio", [sys.executable, str(HERE), "serve-peer", "socketio"], wire="socketio",
               settings=shared),
        Server("socketio x2", [sys.executable, str(HERE), "serve-peer", "socketio"],
               wire="socketio", processes=2, settings=shared)]


# ------------------------------------------------------------------------------------------ rounds
# The servers take turns in each round, so that what disturbs the machine disturbs them all alike.

Rounds = list[dict[str, Any]]       # the results of one server on one load, a round each
Results = dict[str, dict[str, Rounds]]  # by load and server


def make_load(load: Load, target: Target, secret: str, seconds: float) -> dict[str, Any]:
    """Run the load process; the result of one that fails has "failed" in it, and says why."""
    command = [sys.executable, str(HERE), "run-load", load.name, ",".join(map(str, target.ports)),
               ",".join(map(str, target.pids)), target.wire, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "SECRET": secret}, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=seconds + 60)
    except subprocess.TimeoutExpired:
        return {"failed": "the load did not end in time"}
    finally:
        end_process(process)
    if process.returncode:
        last = (errors.strip() or "no message").splitlines()[-1]
        return {"failed": f"the load process ended with status {process.returncode}: {last}"}
    return json.loads(output)


def measure(server: Server, load: Load, secret: str, seconds: float) -> dict[str, Any]:
    """Run one load on a fresh server."""
    try:
        with running(server, secret) as target:
            return make_load(load, target, secret, seconds)
    except NoServer as error:
        server.down = str(error)
        return {"failed": "did not start"}


def measure_all(loads: list[Load], servers: list[Server], rounds: int, seconds: float,
                progress: Progress) -> Results:
    """Run every load, round by round, on the servers in turn; a failed row is not tried again."""
    secret = os.urandom(32).hex()
    results: Results = {load.name: {server.name: [] for server in servers} for load in loads}
    for load in loads:
        for number in range(rounds):
            for server in servers:
                row = results[load.name][server.name]
                if server.down or row and "failed" in row[-1]:
                    continue
                progress.show(f"{load.title}: round {number + 1} of {rounds}, {server.name}")
                row.append(measure(server, load, secret, seconds))
                if server.down:
                    progress.say(f"{server.name} does not start: {server.down}")
        progress.done(load.title)
    return results


class Progress:
    """A line per load on stderr: rewritten in place on a terminal, else written when it is done."""

    def __init__(self, loads: int) -> None:
        self._in_place = sys.stderr.isatty()
        self._loads, self._done, self._start = loads, 0, time.monotonic()

    def show(self, text: str) -> None:
        if self._in_place:
            print(f"\r\x1b[K[{self._done + 1}/{self._loads}] {text}", end="", file=sys.stderr,
                  flush=True)

    def say(self, text: str) -> None:
        print(("\r\x1b[K" if self._in_place else "") + text, file=sys.stderr, flush=True)

    def done(self, text: str) -> None:
        self._done += 1
        passed = time.monotonic() - self._start
        self.say(f"[{self._done}/{self._loads}] {text}: done, {passed:.0f} s in all")


# ------------------------------------------------------------------------------------------ table
# From raw rounds to what is printed: the median of each figure with its range.

Spread = tuple[float, float, float]     # median, least, most


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return median, least and most; None if there is nothing or something was not measured."""
    given = list(values)
    numbers = [value for value in given if value is not None]
    if not given or len(numbers) < len(given):
        return None
    return statistics.median(numbers), min(numbers), max(numbers)


def figure(rounds: Rounds, key: str) -> Spread | None:
    """Return one figure of a row; None where the row failed or does not have it."""
    if any("failed" in result for result in rounds):
        return None
    return spread(result.get(key) for result in rounds)


def ratio(load: Load, ours: Rounds, theirs: Rounds) -> Spread | None:
    """Return Philote's figure over a peer's, taken round by round."""
    if figure(ours, load.figure) is None or figure(theirs, load.figure) is None:
        return None
    return spread(our[load.figure] / their[load.figure] for our, their in zip(ours, theirs))


def short(number: float) -> str:
    """Write a number with three digits: 1.23, 12.3, 123, 1,230, 12.3k, 123k."""
    for limit, text in ((9.995, "{:.2f}"), (99.95, "{:.1f}"), (9999.5, "{:,.0f}")):
        if abs(number) < limit:
            return text.format(number)
    return f"{number / 1e3:.1f}k" if number < 99_950 else f"{number / 1e3:,.0f}k"


def shown(values: Spread | None, absent: str = "-", unit: str = "") -> str:
    """Write a median with its range, if there was more than one round."""
    if values is None:
        return absent
    median, least, most = values
    return short(median) + unit + (f" ({short(least)}-{short(most)})" if least < most else "")


_COLUMNS = "  {:<12}{:<21}{:<20}{:<20}{:<20}{:>9}  {}"


def table_of(loads: list[Load], servers: list[Server], results: Results) -> str:
    """Lay out the whole report: a block per load, a line per server."""
    lines = [_COLUMNS.format("", "", "p50 ms", "p99 ms", "server CPU us", "busy %", "philote/peer")]
    for load in loads:
        lines += ["", f"{load.title} ({load.unit})"]
        rows = results[load.name]
        for server in servers:
            if rows[server.name]:
                lines.append(line_of(load, server.name, rows).rstrip())
    busy = any(is_limit(rounds) for rows in results.values() for rounds in rows.values())
    lines += ["", "Median (least-most). Server CPU: per delivery, or per connection.",
              "busy: server/load process, in % of a core. philote/peer: taken round by round."]
    if busy:
        lines += ["* The load process was at its limit, or near it: the server may be faster than",
                  "  shown, unless it has filled a core as well."]
    return "\n".join(lines)


def line_of(load: Load, name: str, rows: dict[str, Rounds]) -> str:
    """Write the line of one server."""
    rounds = rows[name]
    failed = next((result["failed"] for result in rounds if "failed" in result), None)
    if failed:
        return f"  {name:<12}FAILED: {failed}"
    main = figure(rounds, "kib" if load.kind == "memory" else "rate")
    compared = None if name == "philote" else ratio(load, rows.get("philote", []), rounds)
    notes = sorted({result["note"] for result in rounds if "note" in result})
    if load.stalled and (grown := figure(rounds, "grown_kib")):
        notes.append(f"server grew by {short(grown[0])} KiB")
    return _COLUMNS.format(
        name, shown(main, "not measured"), shown(figure(rounds, "p50")),
        shown(figure(rounds, "p99")), shown(figure(rounds, "cpu_us")),
        busy_of(rounds, "server_busy") + "/" + busy_of(rounds, "busy")
        + ("*" if is_limit(rounds) else " "),
        shown(compared, "", "x") + "".join(f" [{note}]" for note in notes))


def comparison_of(loads: list[Load], servers: list[Server], results: Results,
                  before: Results) -> str:
    """Lay out medians beside those of an earlier run."""
    lines = ["", f"  {'beside the run before':<54}{'now':>10}{'then':>10}{'now/then':>10}"]
    for load in loads:
        for server in servers:
            now = figure(results[load.name][server.name], load.figure)
            then = figure(before.get(load.name, {}).get(server.name, []), load.figure)
            if now and then:
                lines.append(f"  {load.title:<40.40}  {server.name:<12}{short(now[0]):>10}"
                             f"{short(then[0]):>10}{now[0] / then[0]:>9.2f}x")
    return "\n".join(lines)


def busy_of(rounds: Rounds, key: str) -> str:
    """Write the median share of a core in percent."""
    values = figure(rounds, key)
    return f"{100 * values[0]:.0f}" if values else "-"


def is_limit(rounds: Rounds) -> bool:
    """Tell whether the load process was so busy that the row measures it."""
    busy = figure(rounds, "busy")
    return busy is not None and busy[0] >= BUSY


def report_of(loads: list[Load], servers: list[Server], results: Results,
              options: argparse.Namespace) -> dict[str, Any]:
    """Return all that --save writes: the raw rounds and where they come from."""
    packages = ("websockets", "aiohttp", "python-socketio", "redis", "hiredis",
                "simple-websocket", "PyJWT", "wsproto")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(), "machine": machine(), "cpu_count": os.cpu_count(),
        "versions": {name: version_of(name) for name in packages},
        "philote_sha256": checksum(HERE.with_name("philote.py")),
        "rounds": options.rounds, "seconds": options.seconds,
        "servers": {server.name: {"command": server.command, "down": server.down}
                    for server in servers},
        "loads": {load.name: {**dataclasses.asdict(load), "unit": load.unit,
                              "rounds": results[load.name]} for load in loads},
    }


def machine() -> str:
    """Return the processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def checksum(path: Path) -> str | None:
    """Return a file's SHA-256, so that a report tells which Philote it speaks of."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def version_of(package: str) -> str | None:
    """Return a package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------- plot
# One panel for each unit: bars per load, a colour per server, whiskers from least to most.

PANELS: tuple[tuple[str, str, Callable[[Load], bool]], ...] = (
    ("deliveries/s, many subscribers", "rate",
     lambda load: load.kind == "messages" and load.subscribers > 1),
    ("messages/s, one subscriber", "rate",
     lambda load: load.kind == "messages" and load.subscribers == 1),
    ("connections accepted/s", "rate", lambda load: load.kind == "connections"),
    ("median latency with 1 in flight, ms", "p50",
     lambda load: load.kind == "messages" and load.window == 1),
    ("server CPU per delivery, µs", "cpu_us", lambda load: load.kind == "messages"),
    ("KiB per idle connection", "kib", lambda load: load.kind == "memory"),
)


def plot(path: str, loads: list[Load], servers: list[Server], results: Results,
         caption: str) -> None:
    """Draw the panels that have a load, one above the other, and save them; the suffix says how."""
    from matplotlib.figure import Figure
    panels = [(title, key, chosen) for title, key, belongs in PANELS
              if (chosen := [load for load in loads if belongs(load)])]
    heights = [len(chosen) * len(servers) + 1.5 for _, _, chosen in panels]
    drawing = Figure(figsize=(9, 0.24 * sum(heights) + 0.8), layout="constrained")
    grid = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (title, key, chosen) in zip(grid[:, 0], panels):
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        for place, server in enumerate(servers):
            values = [figure(results[load.name][server.name], key) for load in chosen]
            draw_bars(axes, values, place, len(servers), server.name)
        axes.set_yticks(range(len(chosen)), [load.title for load in chosen], fontsize=9)
        axes.set_ylim(len(chosen) - 0.5, -0.5)
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.spines[["top", "right"]].set_visible(False)
    drawing.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right",
                   ncols=len(servers), fontsize=9, frameon=False)
    drawing.supxlabel(caption, fontsize=8)
    drawing.savefig(path)


def draw_bars(axes: Any, values: list[Spread | None], place: int, of: int, label: str) -> None:
    """Draw one server's bars, one for each load, in its place within the groups."""
    height = 0.8 / of
    for number, value in enumerate(values):
        y = number + (place - (of - 1) / 2) * height
        median, least, most = value or (0, 0, 0)
        axes.barh(y, median, 0.9 * height, color=f"C{place}",
                  label=label if number == 0 else None,
                  xerr=[[median - least], [most - median]] if least < most else None,
                  error_kw={"elinewidth": 1, "capsize": 2})
        axes.annotate(short(median) if value else "failed", (most, y), (4, 0), fontsize=8,
                      textcoords="offset points", va="center")


# ----------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def parse_peer(text: str) -> Server:
    """Read NAME=COMMAND."""
    name, _, command = text.partition("=")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if not name.strip() or not words:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND")
    return Server(name.strip(), words, whole_environ=True)


def parse_loads(text: str) -> list[Load]:
    """Read names of loads, with commas between."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in LOADS]:
        raise argparse.ArgumentTypeError(
            f"there is no load {unknown[0]!r}; there are {', '.join(LOADS)}")
    return [LOADS[name] for name in dict.fromkeys(names)]


def parse_rounds(text: str) -> int:
    """Read a number of rounds."""
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)


def parse_output(text: str) -> str:
    """Take the path of a file; one that cannot be written must not fail at the end of a run."""
    folder = Path(text).absolute().parent
    existing = Path(text) if Path(text).exists() else folder
    if Path(text).is_dir() or not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return text


def parse_report(text: str) -> dict[str, Any]:
    """Read what --save has written."""
    try:
        loads = json.loads(Path(text).read_text(encoding="utf-8"))["loads"]
        return {name: load["rounds"] for name, load in loads.items()}
    except (OSError, ValueError, LookupError, TypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is no file that --save wrote") from None


def parse_picture(text: str) -> str:
    """Take the path of a picture in a format that matplotlib writes."""
    if Path(text).suffix not in (".svg", ".png", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .svg nor in .png or .pdf")
    return parse_output(text)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; whatever is wrong with it ends the process with status 2."""
    parser = Parser(prog="bench_philote.py", description=(__doc__ or "").splitlines()[0],
                    epilog=f"loads: {', '.join(LOADS)}")
    parser.add_argument("--quick", action="store_true",
                        help="about half a minute: one round, short loads, no 10,000 connections")
    parser.add_argument("--rounds", type=parse_rounds, metavar="N",
                        help="how many rounds (default: 5; with --quick 1)")
    parser.add_argument("--loads", type=parse_loads, metavar="A,B", help="only these loads")
    parser.add_argument("--peer", type=parse_peer, action="append", default=[], dest="peers",
                        metavar="NAME=COMMAND",
                        help="another server that speaks the protocol; started without a shell")
    parser.add_argument("--redis", action="store_true",
                        help="compare servers that share a Redis, by the loads of messages")
    parser.add_argument("--tls", action="store_true",
                        help="with TLS everywhere, by a certificate that openssl makes; a --peer "
                        "finds its path in TLS_CERT")
    parser.add_argument("--save", "--json", type=parse_output, metavar="FILE", dest="json",
                        help="write all raw rounds")
    parser.add_argument("--compare", type=parse_report, metavar="FILE", dest="before",
                        help="show the medians beside those of a run that was saved")
    parser.add_argument("--plot", type=parse_picture, metavar="FILE.svg", help="draw the bars")
    options = parser.parse_args(arguments)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    names = ["philote", *PEERS, *(peer.name for peer in options.peers)]
    if len(set(names)) < len(names):
        parser.error(f"a --peer needs a name of its own, other than {', '.join(PEERS)}")
    options.seconds = 0.3 if options.quick else 1.2
    options.rounds = options.rounds or (1 if options.quick else 5)
    every = [load for load in LOADS.values() if not options.quick or load.connections < 10_000]
    if options.redis and options.tls:
        parser.error("--tls is not for --redis")
    if options.redis or options.tls:
        every = [load for load in every if load.kind == "messages" and not load.stalled
                 or options.tls and load.name in ("connect", "idle-1000")]
    if options.tls and (others := [load.name for load in options.loads or [] if load not in every]):
        parser.error(f"--tls is not for {', '.join(others)}")
    options.loads = options.loads or every
    return options


def raise_file_limit() -> None:
    """Allow this process, and the servers and loads it starts, as many open files as it may."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 20_000 if hard == resource.RLIM_INFINITY else min(hard, 20_000)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def summary(options: argparse.Namespace) -> str:
    """Say in one line what was run where."""
    rounds = f"{options.rounds} round{'s' if options.rounds > 1 else ''}"
    few = ", fewer than the five that make a figure" if options.rounds < 5 else ""
    tls = ", TLS" * options.tls
    return (f"{rounds} of {options.seconds} s{tls}{few}; {machine()}, {os.cpu_count()} cores, "
            f"{platform.python_implementation()} {platform.python_version()}, "
            f"{datetime.date.today()}")


def compare(options: argparse.Namespace) -> int:
    """Run everything, and report; returns the exit status, 1 if a server did not start."""
    raise_file_limit()
    os.environ.pop("TLS_CERT", None)  # inherited, it would turn on TLS without --tls
    with contextlib.ExitStack() as stack:
        if options.tls:
            os.environ["TLS_CERT"] = stack.enter_context(new_certificate())
        if options.redis:
            servers, missing = redis_servers(stack.enter_context(running_redis())), []
        else:
            servers, missing = own_servers()
        servers += options.peers
        print(*missing, sep="\n", end="\n" if missing else "", file=sys.stderr, flush=True)
        results = measure_all(options.loads, servers, options.rounds, options.seconds,
                              Progress(len(options.loads)))
    print(summary(options) + "\n\n" + table_of(options.loads, servers, results), flush=True)
    if options.before:
        print(comparison_of(options.loads, servers, results, options.before), flush=True)
    if options.json:
        report = report_of(options.loads, servers, results, options)
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(options.plot, options.loads, servers, results, summary(options))
    return 1 if any(server.down for server in servers) else 0


def main(arguments: list[str]) -> int:
    """Run the command line, or the part of it that another process of this file asked for."""
    inner: dict[str, Callable[..., int]] = {"run-load": run_load, "serve-peer": serve_peer}
    if arguments and arguments[0] in inner:
        return inner[arguments[0]](*arguments[1:])
    options = parse_arguments(arguments)
    # SIGTERM must end the servers as well: as an exception, like SIGINT, it runs the cleanup.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return compare(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
