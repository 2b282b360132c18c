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
import contextlib
import gc
import hashlib
import hmac
import http.client
import itertools
import json
import logging
import os
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
import threading
import time
import tracemalloc
import types
import urllib.parse
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import hypothesis
import hypothesis.strategies as st
import jwt
import kosoku
import prometheus_client.parser
import pytest
import websockets.exceptions
import websockets.sync.client

import philote

HERE = Path(__file__).resolve().parent
SECRET = "a secret of the tests, long enough for every algorithm that there is, as RFC 7518 wants"
NONCE = "dGhlIHNhbXBsZSBub25jZQ=="
PATIENCE = 15  # seconds that anything may take on a busy machine


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
def server():
    """A server with default settings, but for its secret, host and port."""
    with running() as server:
        yield server


def port_of(server):
    return server.server_address[1]


def make_token(read=(), write=(), secret=SECRET, algorithm="HS256", **claims):
    return jwt.encode(
        {"read": list(read), "write": list(write), **claims}, secret, algorithm=algorithm)


def wait_until(condition, what="the condition"):
    """Wait until a condition holds; this is the one place that sleeps."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true within {PATIENCE} seconds"
        time.sleep(0.005)


def frame(opcode, payload=b"", fin=True, rsv=0, mask=b"\x37\xfa\x21\x3d", size=None):
    """A client's frame; size overrules the length field, as (bits, number)."""
    if isinstance(payload, str):
        payload = payload.encode()
    flag = 0x80 if mask else 0
    bits, number = size or (
        7 if len(payload) < 126 else 16 if len(payload) < 65536 else 64, len(payload))
    length = {7: lambda: bytes([flag | number]),
              16: lambda: bytes([flag | 126]) + struct.pack("!H", number),
              64: lambda: bytes([flag | 127]) + struct.pack("!Q", number)}[bits]()
    keys = itertools.cycle(mask or b"\0")
    return bytes([fin << 7 | rsv << 4 | opcode]) + length + (mask or b"") + bytes(
        byte ^ key for byte, key in zip(payload, keys))


def message(channel="a", data="x"):
    return json.dumps({"channel": channel, "data": data})


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
    """Connect a plain socket."""
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(PATIENCE)
    sock.connect(("127.0.0.1", port_of(server)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


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
        try:
            return read_response(file)
        except ConnectionError:
            return None


def status_of(server, request):
    response = ask(server, request)
    return response and response[0]


class RawClient:
    """A WebSocket client made of a socket; `rest` goes out in one packet with the handshake."""

    def __init__(self, server, read=(), write=(), rest=b"", receive_buffer=None, token=None,
                 **claims):
        self.sock = dial(server, receive_buffer)
        self.file = self.sock.makefile("rb")
        token = make_token(read, write, **claims) if token is None else token
        self.send(upgrade_request(headers={"Authorization": "Bearer " + token}) + rest)
        self.response = read_response(self.file)
        assert self.response[0] == 101, self.response

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()
        self.sock.close()

    def reset(self):
        """End the connection with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def send(self, data):
        self.sock.sendall(data)

    def publish(self, channel, data):
        self.send(text(channel, data))

    def read_frame(self):
        """The next frame, as (opcode, payload); None at the end of the connection."""
        head = self.file.read(2)
        if len(head) < 2:
            return None
        assert head[0] & 0xF0 == 0x80 and not head[1] & 0x80, \
            "the server fragments or masks a frame"
        size = head[1]
        if size > 125:
            size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
        return head[0] & 15, self.file.read(size)

    def receive(self):
        """The next message, decoded."""
        opcode, payload = self.read_frame()
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
        return self.read_frame() == (10, b"quiet?")


def is_served(server):
    """Whether a fresh client gets what another fresh client publishes."""
    with RawClient(server, read=["fresh"]) as reader, RawClient(server, write=["fresh"]) as writer:
        writer.publish("fresh", "still here")
        return reader.receive()["data"] == "still here"


def footprint(server):
    """What must be back where it was: subscribers, strangers, channels, threads, descriptors."""
    return (len(server.subscribers), len(server.strangers), len(server.registry),
            threading.active_count(),
            len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0)


@contextlib.contextmanager
def undisturbed(server, caplog):
    """Check after a fault: a bystander missed nothing, newcomers are served, nothing is left."""
    caplog.set_level(logging.DEBUG, "philote")
    with RawClient(server, read=["by"]) as bystander, RawClient(server, write=["by"]) as publisher:
        wait_until(lambda: len(server.subscribers) == 2 and not server.strangers)
        before = footprint(server)
        publisher.publish("by", "before")
        yield
        publisher.publish("by", "after")
        assert bystander.receive_data(2) == ["before", "after"]
        assert is_served(server)
        wait_until(lambda: footprint(server) == before, f"{before} (now {footprint(server)})")
    assert "Traceback" not in caplog.text
    assert "eyJ" not in caplog.text, "a token in the log"


# ----------------------------------------------------------------------------------------- settings

def test_the_defaults_are_those_of_the_original():
    settings = philote.Settings.from_environ({})
    assert (settings.secret, settings.port, settings.loglevel, settings.max_connections) == (
        "", 6380, "info", 255)
    assert (settings.read_buffer_size, settings.write_buffer_size, settings.check_origin) == (
        1024, 1024, False)
    assert (settings.host, settings.max_message_size, settings.max_queue_size) == (
        "", 1 << 20, 1 << 20)
    assert (settings.ping_interval, settings.max_message_rate, settings.shutdown_timeout) == (
        25, 0, 10)


@pytest.mark.parametrize("name, value, expected", [
    ("SECRET", "s3cret", "s3cret"), ("HOST", "::1", "::1"), ("PORT", "0", 0),
    ("PORT", "65535", 65535), ("LOGLEVEL", "debug", "debug"), ("LOGLEVEL", "PANIC", "panic"),
    ("LOGLEVEL", "fatal", "fatal"), ("MAX_CONNECTIONS", "1", 1), ("READ_BUFFER_SIZE", "4096", 4096),
    ("WRITE_BUFFER_SIZE", "1", 1), ("MAX_MESSAGE_SIZE", "10", 10), ("MAX_QUEUE_SIZE", "10", 10),
    ("MAX_MESSAGE_RATE", "0.5", 0.5), ("PING_INTERVAL", "0", 0), ("SHUTDOWN_TIMEOUT", "2.5", 2.5),
    *[("CHECK_ORIGIN", value, True) for value in ("1", "t", "T", "true", "TRUE", "True")],
    *[("CHECK_ORIGIN", value, False) for value in ("0", "f", "F", "false", "FALSE", "False")],
    ("CHECK_ORIGIN", "https://a.example, HTTP://b:81", ("https://a.example", "http://b:81")),
])
def test_a_setting_is_read(name, value, expected):
    assert getattr(philote.Settings.from_environ({name: value}), name.lower()) == expected


@pytest.mark.parametrize("name, value", [
    ("PORT", "65536"), ("PORT", "-1"), ("PORT", "http"), ("PORT", ""), ("PORT", "1_0"),
    ("PORT", "\u0661"), ("PORT", "9" * 5000), ("LOGLEVEL", "verbose"), ("MAX_CONNECTIONS", "0"),
    ("MAX_CONNECTIONS", "1.5"), ("READ_BUFFER_SIZE", "0"), ("WRITE_BUFFER_SIZE", "1k"),
    ("MAX_MESSAGE_SIZE", "0"), ("MAX_QUEUE_SIZE", "-5"), ("MAX_MESSAGE_RATE", "nan"),
    ("PING_INTERVAL", "inf"), ("SHUTDOWN_TIMEOUT", "-1"), ("CHECK_ORIGIN", "yes"),
    ("CHECK_ORIGIN", "example.com"), ("CHECK_ORIGIN", "https://a.example,"), ("CHECK_ORIGIN", ""),
    ("SECRET", "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----"),
])
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(name, value):
    with pytest.raises(philote.SettingsError) as caught:
        philote.Settings.from_environ({name: value})
    line = str(caught.value)
    assert line.startswith(name + ": ") and "it takes" in line and "\n" not in line
    assert ("MIIB" not in line) if name == "SECRET" else (repr(value[:80]) in line)


def test_bad_settings_are_reported_together():
    with pytest.raises(philote.SettingsError) as caught:
        philote.Settings.from_environ(
            {"PORT": "x", "LOGLEVEL": "y", "CHECK_ORIGIN": "z", "HOST": "fine"})
    assert [line.partition(":")[0] for line in str(caught.value).split("\n")] == [
        "PORT", "LOGLEVEL", "CHECK_ORIGIN"]


def test_settings_do_not_show_the_secret():
    assert "hush" not in repr(philote.Settings(secret="hush"))


# -------------------------------------------------------------------------------------- access keys

def test_a_token_made_by_new_token_says_what_was_asked_for():
    claims = jwt.decode(philote.new_token(SECRET, ["a"], ["b", "c"], 60, api=True), SECRET,
                        algorithms=["HS256"])
    assert (claims["read"], claims["write"], claims["api"]) == (["a"], ["b", "c"], True)
    assert 58 <= claims["exp"] - time.time() <= 61


def test_the_signature_is_that_of_the_secret_as_it_is():
    # The original signs with the bare secret; PyJWT does, too.
    for secret in ("x", "k" * 31, "k" * 64, "k" * 65, "k" * 200, "schl\u00fcssel"):
        assert philote.decode_token(make_token(["a"], secret=secret), secret).read == {"a"}
        jwt.decode(philote.new_token(secret, ["a"]), secret, algorithms=["HS256"])


def test_the_empty_secret_signs_as_the_originals_clients_do():
    # An empty key and one zero byte give the same HMAC; PyJWT refuses the first.
    assert philote.decode_token(make_token(["a"], secret="\0"), "").read == {"a"}
    assert jwt.decode(philote.new_token("", ["a"]), "\0", algorithms=["HS256"])["read"] == ["a"]


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_three_algorithms_are_accepted(server, algorithm):
    RawClient(server, token=make_token(algorithm=algorithm)).close()


@pytest.mark.parametrize("claims", [
    {"exp": 2**40}, {"exp": time.time() + 1000.5}, {"nbf": 5}, {"iat": 5}, {"aud": "x"}, {"aud": 5},
    {"iss": "x"}, {"sub": "x"}, {"sub": 5}, {"jti": 5}, {"jti": ["x"]}, {"read": None},
    {"write": None}, {"other": {}},
])
def test_a_token_is_accepted(server, claims):
    token = jwt.api_jws.encode(json.dumps({"read": [], **claims}).encode(), SECRET)
    RawClient(server, token=token).close()


def raw_token(header, claims, secret=SECRET):
    """Sign anything, with HS256 whatever the header says."""
    head, body = (
        base64.urlsafe_b64encode(
            part if isinstance(part, bytes) else json.dumps(part).encode()).rstrip(b"=")
        for part in (header, claims))
    mark = hmac.new(secret.encode(), head + b"." + body, hashlib.sha256).digest()
    return (head + b"." + body + b"." + base64.urlsafe_b64encode(mark).rstrip(b"=")).decode()


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
    "too long": "a" * 9000,
    **{f"claims {claims}": raw_token({"alg": "HS256"}, claims.encode()) for claims in (
        '{"exp": 5}', '{"exp": NaN}', '{"exp": Infinity}', '{"exp": null}',
        '{"exp": "99999999999"}', '{"exp": true}', '{"exp": [5]}', '{"nbf": 99999999999}',
        '{"iat": 99999999999}', '{"nbf": "1"}', '{"read": "abc"}', '{"read": 5}',
        '{"read": {"a": 1}}', '{"read": [5]}', '{"read": ["a", null]}', '{"read": [""]}',
        '{"write": "abc"}', '{"write": [["a"]]}', '{"write": false}')},
    "exp now": make_token(exp=int(time.time())),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_a_bad_token_is_answered_with_401(server, name):
    token = urllib.parse.quote(BAD_TOKENS[name])
    status, headers, body = ask(
        server, upgrade_request("/?auth=" + token if name != "none at all" else "/"))
    if name == "too long":
        assert status in (401, 414, 431)
        return
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert (body.count(b"\n") == 1 and json.loads(body)["error"] == "unauthorized"
            and len(json.loads(body)["reason"]) > 9)
    assert not token or token.encode() not in body


@pytest.mark.parametrize("auth", ["%ED%B3%BF", "%00", "%FF%FE%61%00", "a&auth=b", "%", ""])
def test_a_token_of_odd_bytes_is_answered_with_401(server, auth):
    assert status_of(server, upgrade_request("/?auth=" + auth)) == 401


GOOD, BAD = make_token(["a"]), make_token(["a"], secret="wrong" * 8)


@pytest.mark.parametrize("path, header, expected", [
    ("/", "Bearer " + GOOD, 101), ("/", "bearer " + GOOD, 101), ("/", "BEARER   " + GOOD, 101),
    ("/", GOOD, 101), ("/?auth=" + GOOD, None, 101), ("/any/path?x=1&auth=" + GOOD, None, 101),
    ("/?auth=" + GOOD, "Bearer " + BAD, 101), ("/?auth=" + BAD, "Bearer " + GOOD, 101),
    ("/?auth=" + GOOD, "Basic YTpi", 101), ("/?auth=" + BAD, "Bearer " + BAD, 401),
    ("/?token=" + GOOD, None, 401), ("/", "Bearer", 401), ("/", "", 401),
    ("/", "Token " + GOOD, 401),
])
def test_a_token_comes_in_the_header_or_else_in_the_query(server, path, header, expected):
    headers = {} if header is None else {"Authorization": header}
    assert status_of(server, upgrade_request(path, headers)) == expected


@pytest.mark.parametrize("address, expected", [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True),
    ("::ffff:10.0.0.1", False), ("10.0.0.1", False), ("192.168.1.1", False), ("::", False),
    ("fe80::1%eth0", False), ("8.8.8.8", False),
])
def test_loopback_addresses_are_known(address, expected):
    assert philote.is_loopback(address) is expected


def test_without_a_secret_only_this_machine_is_let_in(monkeypatch):
    with running(secret="") as server:
        request = upgrade_request("/?auth=" + philote.new_token("", ["a"]))
        assert status_of(server, request) == 101
        # A peer from elsewhere cannot be had here.
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
        server.said.clear()
    assert caplog.text and not re.search("eyJ|garbage-token|" + re.escape(SECRET), caplog.text)


def test_expiry_is_judged_by_the_clock_when_the_token_is_used():
    token = make_token(exp=time.time() + 100)
    assert philote.decode_token(token, SECRET).expires > time.time()


# ----------------------------------------------------------------------------------------- messages

def test_a_message_reaches_every_other_reader_and_not_its_publisher(server):
    with RawClient(server, ["a"], ["a"]) as one, RawClient(server, ["a", "b"]) as two, \
            RawClient(server, ["b"]) as other:
        one.publish("a", "hello")
        received = two.receive()
        assert list(received) == ["issuer", "channel", "data"] and received["data"] == "hello"
        assert uuid.UUID(received["issuer"]).version == 4
        assert one.is_quiet() and other.is_quiet()


def test_the_bytes_on_the_wire_are_those_of_the_original(server):
    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        writer.publish("a", 'say "h\u00e9" \u2028\n')
        assert re.fullmatch(
            r'\{"issuer":"[0-9a-f-]{36}","channel":"a","data":"say \\"h\u00e9\\" \u2028\\n"\}',
            reader.read_frame()[1].decode())


@pytest.mark.parametrize("sent, data", [
    ('{"channel": "a", "data": "x", "issuer": "me"}', "x"), ('{"Channel": "a", "Data": "x"}', "x"),
    ('{"CHANNEL": "a", "dATA": "x"}', "x"),
    ('{"channel": "a", "data": "x", "event": "message", "id": [1]}', "x"),
    ('{"channel": "a", "data": "x", "Channel": 5, "DATA": 6}', "x"),
    ('{"channel":"b","channel":"a","data":"x"}', "x"), (' \n{"channel"\t:"a","data":"x"}\r\n', "x"),
    ('{"channel": "a"}', None), ('{"channel": "a", "data": ""}', None),
    ('{"channel": "a", "data": null}', None),
    ('{"channel": "a", "data": "\\u0000\\ud83d\\ude00"}', "\0\U0001f600"),
    ('{"channel": "a", "data": "\\ud800"}', "\ud800"), ('{"channel": "\\u0061", "data": "x"}', "x"),
    ('{"channel": "a", "data": "x", "n": 1e999, "m": 123456789012345678901234567890}', "x"),
])
def test_a_message_is_accepted(server, sent, data):
    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        for opcode in (1, 2):
            writer.send(frame(opcode, sent))
            received = reader.receive()
            assert (received.get("data") == data and received["channel"] == "a"
                    and received["issuer"] != "me")
            assert ("data" in received) == bool(data)


BAD_MESSAGES = [
    "", "{", "[]", "5", "null", "true", '"text"', "NaN", "[" * 200000, "[" * 200000 + "]" * 200000,
    "7" * 5000, '{"a":' * 50000, '{"data": "x"}', '{"channel": 5}', '{"channel": []}',
    '{"channel": null}', '{"channel": ""}', '{"channel": "a", "data": {}}',
    '{"channel": "a", "data": 5}', '{"channel": "a", "data": ["x"]}',
    '{"channel": "a", "data": "x", "n": NaN}', '{"channel": "a"} {}', '\ufeff{"channel": "a"}',
    "{'channel': 'a'}", '{"channel": "a", "data": "tab\there"}',
    '{"channel": "a", "n": ' + "7" * 5000 + "}"]


@pytest.mark.parametrize("sent", BAD_MESSAGES, ids=lambda sent: repr(sent[:24]))
def test_a_bad_message_is_reported_to_its_sender_and_to_the_log(server, caplog, sent):
    with undisturbed(server, caplog), RawClient(server, ["a"]) as reader, \
            RawClient(server, write=["a"]) as writer:
        for opcode in (1, 2):
            writer.send(frame(opcode, sent))
            error = writer.receive()
            assert (set(error) == {"error", "reason"} and error["error"] == "bad_message"
                    and len(error["reason"]) < 200)
        assert reader.is_quiet() and writer.is_quiet()
        assert "WARNING" in caplog.text and "message dropped" in caplog.text


def test_a_message_nested_to_any_depth_is_a_bad_message(server, caplog):
    with undisturbed(server, caplog), RawClient(server, write=["a"]) as writer:
        for depth in range(880, 1010):
            deep = "[" * depth + "]" * depth
            for sent in (deep, '{"channel": %s}' % deep, '{"channel": "a", "data": %s}' % deep):
                writer.send(frame(1, sent))
                assert writer.receive()["error"] == "bad_message"


@pytest.mark.parametrize("sent", [b"\xff\xfe{\x00}\x00", b"\x80", b'{"channel": "a\xff"}'])
def test_bytes_that_are_not_utf8_are_a_bad_message_in_a_binary_frame(server, sent):
    with RawClient(server, write=["a"]) as writer:
        writer.send(frame(2, sent))
        assert writer.receive()["error"] == "bad_message"


def test_a_message_to_a_channel_that_may_not_be_written_is_refused(server, caplog):
    with undisturbed(server, caplog), RawClient(server, ["a", "b"]) as reader, \
            RawClient(server, ["b"], ["a"]) as writer:
        writer.publish("b", "secret words")
        error = writer.receive()
        assert error["error"] == "forbidden" and '"b"' in error["reason"]
        writer.publish("a", "fine")
        assert reader.receive()["data"] == "fine"
        assert any(r.levelname == "INFO" and "may not write 'b'" in r.message
                   for r in caplog.records)
        assert "secret words" not in caplog.text


# ------------------------------------------------------------------------------------------- frames

def many_messages(count):
    return [f"{i}:" + "\u00e9" * (i * 7 % 90) for i in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
def test_frames_split_and_joined_anywhere_give_the_same_messages(server, size):
    expected = many_messages(40)
    stream = b"".join(text("a", data) for data in expected)
    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        for at in range(0, len(stream), size):
            writer.send(stream[at:at + size])
        assert reader.receive_data(40) == expected


def test_a_frame_cut_at_every_byte_is_read_whole():
    # Without a socket in between, so that the cuts are where they are meant to be.
    stream = text("a", "first") + frame(9, b"ping") + frame(2, message()) + text("a", "x" * 200)
    whole = [message("a", "first"), frame(9, b"ping"), frame(2, message()), message("a", "x" * 200)]
    for cut in range(len(stream) + 1):
        frames = philote.read_frames(1000)
        items = [next(frames)]
        for part in filter(None, (stream[:cut], stream[cut:])):
            items.append(frames.send(part))
            while items[-1] is not None:
                items.append(next(frames))
        assert [item for item in items if item is not None] == whole, cut


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
    assert philote.unmask(mask, payload) == bytes(
        byte ^ key for byte, key in zip(payload, itertools.cycle(mask)))


@pytest.mark.parametrize("size", [0, 50, 125, 126, 65535, 65536, 500_000])
def test_a_message_of_any_size_goes_through(server, size):
    data = "x" * size
    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        writer.publish("a", data)
        writer.publish("a", "end")
        assert reader.receive().get("data", "") == data
        assert reader.receive()["data"] == "end"


def test_a_message_may_be_as_large_as_the_limit_and_no_larger(server):
    limit = server.settings.max_message_size
    envelope = len(message("a", ""))
    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        writer.publish("a", "x" * (limit - envelope))
        assert len(reader.receive()["data"]) == limit - envelope
        writer.publish("a", "x" * (limit - envelope + 1))
        assert writer.read_close() == 1009 and reader.is_quiet()


def test_frames_in_the_packet_of_the_handshake_are_delivered(server):
    with RawClient(server, ["a"]) as reader:
        rest = text("a", "one") + text("a", "two")[:5]
        with RawClient(server, write=["a"], rest=rest) as writer:
            writer.send(text("a", "two")[5:])
            assert reader.receive_data(2) == ["one", "two"]


@pytest.mark.parametrize("opcode", [1, 2])
def test_a_fragmented_message_is_put_together_with_a_ping_in_between(server, opcode):
    sent = message("a", "h\u00e9" * 50).encode()
    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        for cuts in ([3], [1, 2, 3], list(range(1, len(sent), 9)), [0, 0, len(sent)]):
            parts = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)])]
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                writer.send(frame(0 if i else opcode, part, fin=last))
                writer.send(b"" if last else frame(9, b"between"))
                assert last or writer.read_frame() == (10, b"between")
            assert reader.receive()["data"] == "h\u00e9" * 50


def test_whole_messages_overtake_no_fragmented_one(server):
    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        whole = message("a", "2")
        writer.send(text("a", "1") + frame(1, whole[:9], fin=False) + frame(0, whole[9:])
                    + text("a", "3"))
        assert reader.receive_data(3) == ["1", "2", "3"]


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
    "nothing but an end": (None, "gone"),
}


@pytest.mark.parametrize("name", BROKEN_FRAMES)
def test_a_broken_frame_ends_its_own_connection_only(server, caplog, name):
    sent, code = BROKEN_FRAMES[name]
    with undisturbed(server, caplog), RawClient(server, ["x"], ["by", "a"]) as client:
        if sent is None:
            client.sock.shutdown(socket.SHUT_WR)
        else:
            with contextlib.suppress(ConnectionError):
                client.send(sent)
        assert client.read_close() == code
        assert code == "gone" or client.read_frame() is None, \
            "the server did not end the TCP connection"


@pytest.mark.parametrize("behind", ["nothing", "frames without end"])
def test_a_peer_that_does_not_answer_a_close_frame_is_dropped(server, caplog, behind):
    with undisturbed(server, caplog), RawClient(server) as client:
        client.send(frame(3))
        assert client.read_close() == 1002
        with contextlib.suppress(OSError):
            while behind != "nothing":
                client.send(text() * 1000)
        wait_until(lambda: not server.strangers)


def test_a_frame_too_large_is_never_held_in_memory(server, caplog):
    with undisturbed(server, caplog), RawClient(server, write=["a"]) as client:
        tracemalloc.start()
        try:
            with contextlib.suppress(ConnectionError):
                client.send(frame(1, b"", size=(64, 1 << 32)))
                for _ in range(1000):
                    client.send(b"x" * 100_000)
            assert client.read_close() in (1009, "gone")
            assert tracemalloc.get_traced_memory()[1] < 3 << 20
        finally:
            tracemalloc.stop()


def test_every_case_of_the_autobahn_suite_passes(monkeypatch):
    class Echo(philote.WebSocket):
        def receive(self, text):
            self.queue.put(philote.encode_frame(1, text.encode()))

        def take(self):
            while self.ws and self.ws.input_buffer:
                data = self.ws.input_buffer.pop(0)
                opcode, data = (1, data.encode()) if isinstance(data, str) else (2, data)
                self.queue.put(philote.encode_frame(opcode, data))

    monkeypatch.setattr(philote, "WebSocket", Echo)
    with running(max_message_size=1 << 26, max_queue_size=1 << 27) as server:
        address = f"ws://127.0.0.1:{port_of(server)}/?auth={GOOD}"
        results = asyncio.run(kosoku.run_fuzzingclient(address, exclude_cases=["12.*", "13.*"]))
    verdicts = {result.case_id: (result.behavior.value, result.behavior_close.value)
                for result in results}
    good = {"OK", "NON-STRICT", "INFORMATIONAL"}
    assert len(verdicts) > 200
    assert {case: verdict for case, verdict in verdicts.items() if not set(verdict) <= good} == {}


# ------------------------------------------------------------------------------------ writer queues

def test_a_stalled_subscriber_delays_nobody_and_is_dropped(caplog, full):
    count, data = (3200, "x" * 32_000) if full else (320, "x" * 32_000)
    with running(max_queue_size=200_000) as server, undisturbed(server, caplog), \
            RawClient(server, ["a"], receive_buffer=4096) as stalled, \
            RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        for i in range(count):
            writer.publish("a", f"{i} {data}")
            assert reader.receive()["data"].startswith(f"{i} ")
        wait_until(lambda: server.statistics()[0]["slow_consumers"] == 1)
        assert "slow consumer" in caplog.text
        assert stalled.sock.fileno() > 0


def test_a_slow_consumer_that_reads_at_last_is_told_why():
    with running(max_queue_size=200_000) as server, RawClient(server, write=["a"]) as writer, \
            RawClient(server, ["a"], receive_buffer=4096) as slow:
        while not server.statistics()[0]["slow_consumers"]:
            writer.publish("a", "x" * 100_000)
        frames = list(iter(slow.read_frame, None))  # what was on its way, the reason, the end
        assert {opcode for opcode, _ in frames[:-1]} == {1}
        assert {len(payload) for _, payload in frames[:-1]} == {100_000 + len(
            json.dumps({"issuer": str(uuid.uuid4()), "channel": "a", "data": ""}, separators=",:"))}
        assert frames[-1] == (8, struct.pack("!H", 1008) + b"slow consumer")


def test_a_slow_subscriber_within_the_limit_misses_nothing(server):
    count = 900
    with RawClient(server, ["a"], receive_buffer=4096) as slow, \
            RawClient(server, write=["a"]) as writer:
        for i in range(count):
            writer.publish("a", f"{i} " + "x" * 1000)
        wait_until(lambda: server.statistics()[0]["published"] == count)
        assert [int(data.split()[0]) for data in slow.receive_data(count)] == list(range(count))


def test_one_message_always_fits_into_an_empty_queue(caplog):
    with running(max_queue_size=1) as server, undisturbed(server, caplog), \
            RawClient(server, ["a"], receive_buffer=4096) as reader, \
            RawClient(server, write=["a"]) as writer:
        for size in (1_000_000, 10, 900_000):
            writer.publish("a", "x" * size)
            assert len(reader.receive()["data"]) == size


def test_stalled_subscribers_hold_no_more_than_their_limit(full):
    stalled, limit = (100 if full else 20), 100_000
    with running(max_queue_size=limit) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server, ["a"], receive_buffer=4096))
                   for _ in range(stalled)]
        writer = stack.enter_context(RawClient(server, write=["a"]))
        highest = 0
        while server.statistics()[0]["slow_consumers"] < stalled:
            writer.publish("a", "x" * 10_000)
            highest = max(highest, server.statistics()[0]["queued"])
        assert highest <= stalled * (limit + 31_000) and len(clients) == stalled


def test_pings_without_end_from_a_peer_that_never_reads_end_it(caplog):
    with running(max_queue_size=50_000) as server, undisturbed(server, caplog), \
            RawClient(server, receive_buffer=4096) as client:
        with pytest.raises(OSError):
            while True:
                client.send(frame(9, b"x" * 125) * 100)
        wait_until(lambda: server.statistics()[0]["slow_consumers"] == 1)


def test_many_sockets_that_become_writable_at_once_are_all_written():
    count, data = 40, "x" * 120_000  # more than the kernel takes for a socket that is not read
    with running(max_queue_size=1 << 24) as server, contextlib.ExitStack() as stack:
        readers = [stack.enter_context(RawClient(server, ["a"], receive_buffer=4096))
                   for _ in range(25)]
        writer = stack.enter_context(RawClient(server, write=["a"]))
        for i in range(count):
            writer.publish("a", f"{i} {data}")
        wait_until(lambda: server.statistics()[0]["published"] == count)
        assert all(subscriber.queue.full for subscriber in server.subscribers.values()
                   if "a" in subscriber.channels)
        for reader in readers:
            assert [int(d.split()[0]) for d in reader.receive_data(count)] == list(range(count))


def test_a_full_alarm_blocks_nobody_who_rings_the_keeper():
    keeper = philote.Keeper()  # not started: nobody reads the alarm
    for _ in range(100_000):
        keeper._wake()
    keeper.start()
    keeper.stop()


class Due:
    """Something for the keeper to look at: it notes when, and asks for the next times."""

    forgotten = False

    def __init__(self, number, *again):
        self.number, self.again, self.looks = number, list(again), []

    def look(self, now):
        self.looks.append(now)
        return self.again.pop(0) if self.again else None


def test_the_keeper_looks_when_it_is_due_and_at_the_time_asked_for_last():
    keeper = philote.Keeper()
    keeper.start()
    now = time.monotonic()
    early, moved, forgotten = Due(1, now + 0.05, now + 0.1), Due(2), Due(3)
    keeper.look_at(forgotten, now + 0.02)
    keeper.forget(forgotten)
    keeper.look_at(moved, now + 0.03)
    keeper.look_at(moved, now + 0.15)
    keeper.look_at(early, now + 0.02)
    wait_until(lambda: moved.looks)
    keeper.stop()
    assert len(early.looks) == 3 and len(moved.looks) == 1 and not forgotten.looks
    assert early.looks[0] >= now + 0.02 and moved.looks[0] >= now + 0.15


def test_a_socket_closed_before_the_keeper_could_watch_it_disturbs_no_other():
    keeper = philote.Keeper()  # started only when two requests for one socket wait for it
    pairs = [socket.socketpair() for _ in range(2)]
    queues = [philote.WriterQueue(ours, keeper, 1 << 30) for ours, _ in pairs]
    for queue in queues:
        while not queue.full:
            queue.put(b"x" * 100_000)
            queue.flush()
        if queue is queues[0]:
            queue.close()
    keeper.start()
    pairs[1][1].settimeout(PATIENCE)
    left = queues[1].sent + queues[1].size
    while left:
        left -= len(pairs[1][1].recv(1 << 20))
    keeper.stop()
    assert pairs[0][0].fileno() == -1 and queues[1].size == 0
    for sock in (pairs[0][1], *pairs[1]):
        sock.close()


def test_an_end_asked_for_while_the_keeper_looks_is_not_put_off():
    keeper = philote.Keeper()
    keeper.start()
    peer = Due(1)

    def look(now):
        peer.looks.append(now)
        keeper.look_at(peer, now + 0.02)  # as another thread's end() would
        return now + 1000

    peer.look = look
    keeper.look_at(peer, 0)
    wait_until(lambda: len(peer.looks) > 2)
    peer.forgotten = True
    wait_until(lambda: not keeper.peers)
    keeper.stop()


def test_the_keeper_holds_nothing_of_peers_that_are_gone():
    keeper = philote.Keeper()
    for number in range(1000):
        peer = Due(number)
        keeper.look_at(peer, 1e9)
        keeper.forget(peer)
        keeper.look_at(peer, 1e9)  # as a thread that is late would
    assert not keeper.peers and len(keeper.timers) < 100
    keeper.stop()


class Meddling:
    """A socket that calls somebody in the middle of a write."""

    def __init__(self, sock, meddle):
        self.sock, self.meddle = sock, meddle

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def sendmsg(self, *arguments):
        sent = self.sock.sendmsg(*arguments)
        self.meddle()
        return sent


def read_what_is_there(sock):
    """Read all that has come to a socket, without waiting."""
    data = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            data += sock.recv(1 << 20, socket.MSG_DONTWAIT)
    return data


def test_what_is_put_while_the_keeper_writes_is_written_too():
    ours, theirs = socket.socketpair()
    queue = philote.WriterQueue(ours, philote.Keeper(), 1 << 30)  # this thread is the keeper
    while not queue.full:
        queue.put(b"x" * 50_000)
        queue.flush()

    def publish():
        queue.put(b"late")
        queue.flush()  # finds the lock taken, and leaves it to the holder

    queue.sock = Meddling(ours, publish)
    read_what_is_there(theirs)
    queue.resume()
    assert not queue.pending and not queue.size
    assert read_what_is_there(theirs).endswith(b"xlate")
    queue.keeper.stop(), ours.close(), theirs.close()


def test_a_flush_that_finds_everything_written_meanwhile_does_nothing():
    ours, theirs = socket.socketpair()
    queue = philote.WriterQueue(ours, philote.Keeper(), 1000)
    with queue.writing:
        assert queue._write() is False and queue.sent == 0
    queue.keeper.stop(), ours.close(), theirs.close()


def test_the_keeper_outlives_an_error(caplog):
    keeper = philote.Keeper()
    keeper.start()
    bad, good = Due(1), Due(2)
    bad.look = lambda now: 1 / 0
    keeper.look_at(bad, 0)
    keeper.look_at(good, time.monotonic() + 0.05)
    wait_until(lambda: good.looks)
    keeper.stop()
    assert "ZeroDivisionError" in caplog.text


# -------------------------------------------------------------------------------------- connections

def test_heartbeats_keep_a_peer_that_answers(caplog):
    with running(ping_interval=0.2) as server, RawClient(server) as client:
        for _ in range(6):
            assert client.read_frame() == (9, b"")
            client.send(frame(10))
        assert len(server.subscribers) == 1


@pytest.mark.parametrize("sent", [frame(10), text("x"), frame(1, "{")[:1]])
def test_any_bytes_count_as_life(sent):
    with running(ping_interval=0.4) as server, RawClient(server, write=["x"]) as client:
        end = time.monotonic() + 1.6
        wait_until(lambda: client.send(sent) or time.monotonic() > end)
        assert len(server.subscribers) == 1


def test_a_silent_peer_is_told_1011_and_dropped(caplog):
    caplog.set_level(logging.INFO)
    with running(ping_interval=0.2) as server, RawClient(server, ["a"]) as client:
        assert client.read_frame() == (9, b"")
        assert client.read_close() == 1011
        wait_until(lambda: footprint(server)[:3] == (0, 0, 0))
    assert "nothing came for" in caplog.text


def test_a_silent_peer_whose_socket_is_full_is_dropped_too():
    with running(ping_interval=0.5, max_message_size=1 << 23) as server, \
            RawClient(server, ["a"], receive_buffer=4096) as stalled:
        with RawClient(server, write=["a"]) as writer:
            writer.publish("a", "x" * 6_000_000)
            wait_until(lambda: server.statistics()[0]["queued"] > 0)
        wait_until(lambda: footprint(server)[:3] == (0, 0, 0))
        assert stalled.sock.fileno() > 0


def test_no_heartbeat_without_an_interval():
    with running(ping_interval=0) as server, RawClient(server) as client:
        client.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.read_frame()


@pytest.mark.parametrize("jump", [3600, -3600])
def test_heartbeats_go_on_when_the_clock_jumps(monkeypatch, jump):
    with running(ping_interval=0.2) as server, RawClient(server) as client:
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        for _ in range(3):
            assert client.read_frame() == (9, b"")
            client.send(frame(10))
        assert len(server.subscribers) == 1


def test_a_token_that_expires_ends_its_connection_behind_what_was_queued(server, caplog):
    expires = time.time() + 1
    with undisturbed(server, caplog), RawClient(server, write=["a"]) as writer, \
            RawClient(server, ["a"], exp=expires) as reader:
        writer.publish("a", "in time")
        assert reader.receive()["data"] == "in time"
        opcode, payload = reader.read_frame()
        assert (opcode, payload) == (8, struct.pack("!H", 4401) + b"token expired")
        assert time.time() >= expires
        writer.publish("a", "too late")
        assert reader.read_frame() is None


@pytest.mark.parametrize("expires", [2**40, 10**400, 1e308])
def test_a_token_may_expire_in_any_distant_future(expires, caplog):
    with running(ping_interval=0) as server, undisturbed(server, caplog):
        token = jwt.api_jws.encode(json.dumps({"read": ["a"], "exp": expires}).encode(), SECRET)
        with RawClient(server, token=token) as reader, RawClient(server, write=["a"]) as writer:
            writer.publish("a", "x")
            assert reader.receive()["data"] == "x"


def test_a_connection_whose_token_expired_publishes_no_more(server):
    with RawClient(server, ["a"]) as reader, \
            RawClient(server, write=["a"], exp=time.time() + 1) as writer:
        assert writer.read_close() == 4401
        with contextlib.suppress(OSError):
            writer.publish("a", "too late")
        assert reader.is_quiet()


def test_a_client_that_hammers_with_a_dead_token_costs_one_log_line(server, caplog):
    caplog.set_level(logging.DEBUG)
    request = upgrade_request("/?auth=" + make_token(exp=5))
    assert [status_of(server, request) for _ in range(20)] == [401] * 20
    assert len([r for r in caplog.records if "expired" in r.message]) == 1
    assert server.statistics()[1]["unauthorized"] == 20


def test_the_memory_of_who_was_logged_is_bounded(server):
    assert server.may_say("first") and not server.may_say("first")
    for i in range(5000):
        server.may_say(f"address {i}")
    assert len(server.said) <= 1024


def test_over_the_rate_a_publisher_is_read_later_and_loses_nothing():
    with running(max_message_rate=20) as server, RawClient(server, ["a"]) as reader, \
            RawClient(server, ["b"]) as other, RawClient(server, write=["a"]) as writer, \
            RawClient(server, write=["b"]) as calm:
        start = time.monotonic()
        writer.send(b"".join(text("a", str(i)) for i in range(40)))
        calm.publish("b", "not delayed")
        assert other.receive()["data"] == "not delayed"
        assert server.statistics()[0]["published"] < 41
        assert reader.receive_data(40) == [str(i) for i in range(40)]
        assert time.monotonic() - start > 0.9  # 20 at once, then 20 a second: a limit, not a speed


def test_a_throttled_publisher_is_not_taken_for_dead():
    with running(max_message_rate=4, ping_interval=0.3) as server, \
            RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        stop = threading.Event()

        def pong():
            while not stop.wait(0.1):
                reader.send(frame(10))
        thread = threading.Thread(target=pong)
        thread.start()
        writer.send(b"".join(text("a", str(i)) for i in range(12)))
        messages = []
        while len(messages) < 12:
            opcode, payload = reader.read_frame()
            if opcode == 1:
                messages.append(json.loads(payload)["data"])
        stop.set()
        thread.join()
        assert messages == [str(i) for i in range(12)]


@pytest.mark.parametrize("error", [
    ValueError("x"), UnicodeError("x"), MemoryError(), AssertionError("x")])
def test_an_exception_out_of_the_library_ends_that_connection_with_a_line(
        server, caplog, monkeypatch, error):
    def fail(self):
        raise error
    with undisturbed(server, caplog), RawClient(server) as client, monkeypatch.context() as patch:
        patch.setattr(philote.simple_websocket.Server, "_handle_events", fail)
        client.send(frame(9))
        assert client.read_close() == 1011
        assert type(error).__name__ in caplog.text


# --------------------------------------------------------------------------------- channel registry

def test_all_subscribers_see_one_order(server, full):
    publishers, count = 6, (2000 if full else 300)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(RawClient(server, ["a"])) for _ in range(5)]
        writers = [stack.enter_context(RawClient(server, write=["a"])) for _ in range(publishers)]
        threads = [threading.Thread(target=lambda i=i, w=w: [
            w.publish("a", f"{i} {n}") for n in range(count)]) for i, w in enumerate(writers)]
        for thread in threads:
            thread.start()
        seen = [reader.receive_data(publishers * count) for reader in readers]
        for thread in threads:
            thread.join()
    assert all(order == seen[0] for order in seen)
    for i in range(publishers):
        assert [d for d in seen[0] if d.startswith(f"{i} ")] == [f"{i} {n}" for n in range(count)]


def test_one_publishers_messages_keep_their_order_across_channels(server):
    with RawClient(server, ["a", "b"]) as reader, RawClient(server, write=["a", "b"]) as writer:
        expected = [str(i) for i in range(500)]
        writer.send(b"".join(text("ab"[i % 3 == 0], data) for i, data in enumerate(expected)))
        assert reader.receive_data(500) == expected


def test_a_message_published_after_the_handshake_was_answered_is_never_missed(server):
    with RawClient(server, write=["a"]) as writer:
        for i in range(100):
            with RawClient(server, ["a"]) as reader:
                writer.publish("a", str(i))
                assert reader.receive()["data"] == str(i)


def test_a_connection_with_many_channels_joins_and_leaves_them_all(server):
    channels = [f"c{i}" for i in range(400)]
    with RawClient(server, channels) as reader, RawClient(server, write=channels) as writer:
        wait_until(lambda: len(server.registry) == 400)
        for channel in channels:
            writer.publish(channel, channel)
        assert reader.receive_data(400) == channels
    wait_until(lambda: len(server.registry) == 0)


@pytest.mark.parametrize("switch_interval", [1e-6, 0.005])
def test_publishers_joiners_and_leavers_do_not_disturb_each_other(server, switch_interval, full):
    """Steady readers miss nothing, in order and once; passers-by see a part without gaps."""
    count, errors, done = (3000 if full else 300), [], threading.Event()

    def publish(writer, name):
        for n in range(count):
            writer.publish("ab"[n % 2], f"{name} {n}")

    def come_and_go():
        while not done.is_set():
            with RawClient(server, ["a"]) as reader:
                last = {}
                for data in reader.receive_data(5) if not done.is_set() else []:
                    name, n = data.split()
                    if name != "last" and last.get(name, int(n) - 2) != int(n) - 2:
                        errors.append(data)
                    last[name] = int(n)

    def run(target, *arguments):
        try:
            target(*arguments)
        except (AssertionError, OSError, TypeError, ValueError) as error:
            if not done.is_set():
                errors.append(error)

    interval = sys.getswitchinterval()
    with contextlib.ExitStack() as stack:
        steady = [stack.enter_context(RawClient(server, ["a", "b"])) for _ in range(3)]
        writers = [stack.enter_context(RawClient(server, write=["a", "b"])) for _ in range(4)]
        sys.setswitchinterval(switch_interval)
        stack.callback(sys.setswitchinterval, interval)
        publishers = [threading.Thread(target=run, args=(publish, w, i))
                      for i, w in enumerate(writers)]
        visitors = [threading.Thread(target=run, args=(come_and_go,), daemon=True)
                    for _ in range(4)]
        for thread in (*visitors, *publishers):
            thread.start()
        for reader in steady:
            data = reader.receive_data(4 * count)
            for i in range(4):
                for part in (0, 1):
                    own = [d for d in data
                           if d.startswith(f"{i} ") and int(d.split()[1]) % 2 == part]
                    assert own == [f"{i} {n}" for n in range(part, count, 2)]
        done.set()
        with RawClient(server, write=["a"]) as writer:  # lets the last visitors go
            wait_until(lambda: writer.publish("a", "last 0")
                       or not any(t.is_alive() for t in visitors))
    assert errors == []
    wait_until(lambda: footprint(server)[:3] == (0, 0, 0))


# ------------------------------------------------------------------------------------ HTTP requests

WRITER, API = make_token(write=["a", "b"]), make_token(api=True)


def http_request(method, path, body=None, token="", headers=(), without=()):
    """A request, as bytes; headers replace or add to the usual ones."""
    fields = {"Host": "localhost", **({"Authorization": "Bearer " + token} if token else {}),
              **({} if body is None else {"Content-Length": len(body)}), **dict(headers)}
    lines = [f"{k}: {v}" for k, v in fields.items() if k not in without]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
    return head.encode("latin-1") + (body or b"")


def publish_request(body=b'{"channel": "a", "data": "x"}', token=WRITER, headers=(), without=()):
    return http_request("POST", "/api/publish", body, token, headers, without)


@contextlib.contextmanager
def http_connection(server):
    """A connection of the standard library's client, which keeps it alive."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=PATIENCE)
    with contextlib.closing(connection):
        yield connection


def exchange(connection, method, path, body=None, token="", headers=()):
    """Send a request and read its response: (status, headers in small letters, body)."""
    fields = {**({"Authorization": "Bearer " + token} if token else {}), **dict(headers)}
    connection.request(method, path, body, fields)
    response = connection.getresponse()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def call(server, method, path, body=None, token="", headers=()):
    """One request on a connection of its own."""
    with http_connection(server) as connection:
        return exchange(connection, method, path, body, token, headers)


def publish(server, value, token=WRITER, connection=None):
    """Publish over HTTP what must be accepted, and return the answer."""
    request = "POST", "/api/publish", json.dumps(value).encode(), token
    status, headers, body = exchange(connection, *request) if connection else call(server, *request)
    assert (status, headers["content-type"]) == (200, "application/json"), body
    return json.loads(body)


class Follower:
    """A client of /api/events made of a socket."""

    def __init__(self, server, read=("a",), query="", receive_buffer=None, **claims):
        self.sock = dial(server, receive_buffer)
        self.file = self.sock.makefile("rb")
        token = make_token(read, **claims)
        self.sock.sendall(http_request("GET", "/api/events" + query, token=token))
        self.response = read_response(self.file)
        assert self.response[0] == 200, self.response

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.sock.close()

    def read_event(self):
        """The lines up to the next empty one; none at the end of the stream."""
        return list(itertools.takewhile(bytes.strip, iter(self.file.readline, b"")))

    def receive(self):
        """The next message, decoded."""
        line, = self.read_event()
        assert line.startswith(b"data: ") and line.endswith(b"\n"), line
        return json.loads(line[6:])

    def receive_data(self, count):
        return [self.receive()["data"] for _ in range(count)]

    def has_ended(self):
        """Skip to the end of the stream."""
        with contextlib.suppress(ConnectionError):
            while self.file.readline():
                pass
        return True


def drip(sock, data):
    """Send byte by byte until the server answers or closes; return what it sent."""
    sock.settimeout(0.05)  # the pause between two bytes
    for byte in data:
        try:
            sock.sendall(bytes([byte]))
            return sock.recv(65536)
        except TimeoutError:
            pass
        except ConnectionError:
            return b""


def test_a_message_published_over_http_reaches_the_subscribers(server):
    with RawClient(server, ["a"]) as one, Follower(server) as two, \
            RawClient(server, ["b"]) as other:
        answer = publish(server, {"channel": "a", "data": "h\u00e9\u2028"})
        assert set(answer) == {"issuer", "receivers"} and answer["receivers"] == 2
        assert uuid.UUID(answer["issuer"]).version == 4
        expected = {"issuer": answer["issuer"], "channel": "a", "data": "h\u00e9\u2028"}
        assert one.receive() == two.receive() == expected and other.is_quiet()


def test_only_the_subscribers_that_are_connected_are_counted_as_receivers(server):
    assert publish(server, {"channel": "a", "data": "x"})["receivers"] == 0
    with RawClient(server, ["a"], ["a"]), RawClient(server, ["b"]):
        with RawClient(server, ["a", "b"]), Follower(server, ["a", "b"], "?channel=b"):
            assert publish(server, {"channel": "a", "data": "x"})["receivers"] == 2
            assert publish(server, {"channel": "b", "data": "x"})["receivers"] == 3
        wait_until(lambda: len(server.subscribers) == 2)
        wait_until(lambda: publish(server, {"channel": "a", "data": "x"})["receivers"] == 1)


def test_an_array_is_published_in_order_and_answered_with_an_array(server):
    with RawClient(server, ["a", "b"]) as reader, RawClient(server, ["a"]):
        messages = [{"channel": "ab"[i % 2], "data": str(i)} for i in range(300)]
        answers = publish(server, messages)
        assert reader.receive_data(300) == [str(i) for i in range(300)]
        assert [answer["receivers"] for answer in answers] == [2, 1] * 150
        assert len({answer["issuer"] for answer in answers}) == 1
        assert publish(server, []) == [] and reader.is_quiet()


def test_each_request_has_an_issuer_of_its_own(server):
    with RawClient(server, ["a"]) as reader, http_connection(server) as connection:
        answers = [publish(server, {"channel": "a"}, connection=connection) for _ in range(9)]
        answers += [publish(server, [{"channel": "a"}] * 2)[1] for _ in range(2)]
        issuers = [answer["issuer"] for answer in answers]
        assert len(set(issuers)) == 11
        assert [reader.receive()["issuer"] for _ in range(10)] == issuers[:10]


def test_requests_on_one_connection_are_published_in_order(server):
    with RawClient(server, ["a"]) as reader, http_connection(server) as connection:
        for i in range(0, 300, 3):
            one, *others = [{"channel": "a", "data": str(i + n)} for n in range(3)]
            publish(server, one, connection=connection)
            publish(server, others, connection=connection)
        assert reader.receive_data(300) == [str(i) for i in range(300)]


@pytest.mark.parametrize("body", [
    b'[{"channel": "a", "data": "x"}, {"channel": "a", "data": 5}]', b'[{"channel": "a"}, []]',
    b'[{"channel": "a"}, {"channel": "other"}]', b'[{"channel": "a"}, {"channel": "b"}',
    b'[{"channel": "a"}, null]',
])
def test_of_an_array_with_one_bad_message_nothing_is_published(server, body):
    with RawClient(server, ["a", "b"]) as reader:
        status, _, answer = call(server, "POST", "/api/publish", body, WRITER)
        expected = (403, "forbidden") if b"other" in body else (400, "bad_message")
        assert (status, json.loads(answer)["error"]) == expected
        assert reader.is_quiet()


@pytest.mark.parametrize("kind", [
    None, "", "application/json", "Application/JSON", "application/json; charset=utf-8",
    "application/json;charset=UTF-8", "application/x-www-form-urlencoded",
])
def test_a_body_of_this_content_type_is_taken_for_json(server, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    assert status_of(server, publish_request(headers=headers)) == 200


@pytest.mark.parametrize("body, data", [
    ('{"Channel": "a", "DATA": "x"}', "x"), ('{"channel": "a", "event": "message"}', None),
    ('\n {"channel": "a", "data": "\\ud800"}\r\n', "\ud800"),
    ('{"channel": "a", "data": null}', None),
])
def test_over_http_a_message_is_read_as_over_the_socket(server, body, data):
    with RawClient(server, ["a"]) as reader:
        assert call(server, "POST", "/api/publish", body.encode(), WRITER)[0] == 200
        assert reader.receive().get("data") == data


PUBLISH_ERRORS = {
    "no JSON": (400, "bad_message", publish_request(b"channel=a&data=x")),
    "nothing": (400, "bad_message", publish_request(b"")),
    "a text": (400, "bad_message", publish_request(b'"a"')),
    "no channel": (400, "bad_message", publish_request(b'{"data": "x"}')),
    "no UTF-8": (400, "bad_message", publish_request(b'{"channel": "a", "data": "\xff"}')),
    "nested deeply": (400, "bad_message", publish_request(b"[" * 200_000)),
    "nested array": (400, "bad_message", publish_request(b'[[{"channel": "a"}]]')),
    "no token": (401, "unauthorized", publish_request(token="")),
    "bad token": (401, "unauthorized", publish_request(
        token=make_token(write=["a"], secret="x" * 32))),
    "expired token": (401, "unauthorized", publish_request(token=make_token(write=["a"], exp=5))),
    "may only read": (403, "forbidden", publish_request(token=make_token(["a"]))),
    "another channel": (403, "forbidden", publish_request(b'{"channel": "c", "data": "x"}')),
    "no length": (411, "length_required", publish_request(without=["Content-Length"])),
    "chunked": (411, "length_required", publish_request(
        b"5\r\n{}   \r\n0\r\n\r\n", headers={"Transfer-Encoding": "chunked"},
        without=["Content-Length"])),
    "chunked with a length": (411, "length_required", publish_request(
        headers={"Transfer-Encoding": "chunked"})),
    "too long": (413, "too_large", publish_request(b" " * ((1 << 20) + 1))),
    "length of 99 digits": (413, "too_large", publish_request(
        headers={"Content-Length": "9" * 99})),
    "length no number": (400, "bad_request", publish_request(headers={"Content-Length": "1e3"})),
    "length below zero": (400, "bad_request", publish_request(headers={"Content-Length": "-1"})),
    "two lengths": (400, "bad_request", publish_request(headers={"content-length": "29"})),
    "a form": (415, "unsupported_media_type", publish_request(
        headers={"Content-Type": "multipart/form-data"})),
    "plain text": (415, "unsupported_media_type", publish_request(
        headers={"Content-Type": "text/plain"})),
}


@pytest.mark.parametrize("name", PUBLISH_ERRORS)
def test_what_cannot_be_published_is_refused_with_an_error_in_json(server, caplog, name):
    status, code, request = PUBLISH_ERRORS[name]
    with undisturbed(server, caplog), RawClient(server, ["a", "b", "c"]) as reader:
        answer = ask(server, request)
        assert (answer[0], answer[1]["content-type"]) == (status, "application/json")
        error = json.loads(answer[2])
        assert set(error) == {"error", "reason"} and error["error"] == code
        assert 9 < len(error["reason"]) < 200
        assert ("www-authenticate" in answer[1]) == (status == 401)
        assert reader.is_quiet()


def test_a_body_may_be_as_long_as_a_message_and_no_longer():
    with running(max_message_size=1000) as server:
        body = message().encode().ljust(1000)
        assert status_of(server, publish_request(body)) == 200
        assert status_of(server, publish_request(body + b" ")) == 413


def test_who_sends_too_long_a_body_can_read_why_it_is_refused(server):
    request = publish_request(b"x" * (4 << 20))
    with dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(request[:2 << 20])
        assert read_response(file)[0] == 413
        sock.sendall(request[2 << 20:])  # a close with unread input would reset the connection
        sock.shutdown(socket.SHUT_WR)
        assert file.read() == b""


def test_one_connection_serves_many_requests_also_after_errors(server):
    good, bad = message().encode(), b'{"channel": 5}'
    expected = [
        ("POST", "/api/publish", good, WRITER, 200), ("POST", "/api/publish", bad, WRITER, 400),
        ("POST", "/api/publish", message("c").encode(), WRITER, 403),
        ("POST", "/api/publish", b"", WRITER, 400), ("GET", "/health", None, "", 200),
        ("GET", "/nothing", None, "", 404), ("PUT", "/health", None, "", 405),
        ("GET", "/metrics", None, "", 401), ("GET", "/api/info", None, WRITER, 403),
        ("GET", "/api/info", None, API, 200), ("OPTIONS", "/api/publish", None, "", 204),
        ("HEAD", "/metrics", None, API, 200), ("GET", "/api/events", None, "", 401),
        ("POST", "/api/publish", good, WRITER, 200),
    ]
    with http_connection(server) as connection:
        connection.connect()
        sock = connection.sock
        for method, path, body, token, status in expected * 2:
            assert exchange(connection, method, path, body, token)[0] == status, (method, path)
            assert connection.sock is sock, (method, path)


@pytest.mark.parametrize("request_", [
    publish_request(token=""), publish_request(headers={"Content-Type": "text/plain"}),
    publish_request(headers={"Connection": "close"}),
    publish_request(headers={"Connection": "x, CLOSE"}), http_request("GET", "/health", b"a body"),
    http_request("GET", "/nothing", headers={"Transfer-Encoding": "chunked"}),
    http_request("GET", "/health").replace(b"/1.1", b"/1.0"),
    http_request("GET", "/health HTTP/1.1\r\n x"), publish_request(without=["Content-Length"]),
], ids=range(9))
def test_an_answer_that_announces_the_end_is_followed_by_it(server, monkeypatch, request_):
    # An unread body must not be taken for the next request.
    monkeypatch.setattr(philote, "REQUEST_TIME", 10 * PATIENCE)
    with dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(request_ + http_request("GET", "/health", headers={"Connection": "close"}))
        assert "close" in read_response(file)[1]["connection"]
        assert read_response(file) is None


def test_a_client_that_asks_first_is_told_to_continue(server):
    with dial(server) as sock, sock.makefile("rb") as file:
        for _ in range(2):
            request = publish_request(headers={"Expect": "100-continue"})
            sock.sendall(request[:-29])
            assert read_response(file)[0] == 100
            sock.sendall(request[-29:])
            assert read_response(file)[0] == 200


@pytest.mark.parametrize("expected, changes", [
    (401, {"token": ""}), (413, {"headers": {"Content-Length": 1 << 30}}),
    (415, {"headers": {"Content-Type": "a/b"}}),
])
def test_a_client_that_asks_first_need_not_send_what_would_be_refused(server, expected, changes):
    changes["headers"] = {"Expect": "100-continue", **changes.get("headers", {})}
    assert status_of(server, publish_request(**changes)[:-29]) == expected


def test_a_request_may_come_in_pieces(server):
    request = publish_request()
    with RawClient(server, ["a"]) as reader, dial(server) as sock, sock.makefile("rb") as file:
        for size in (1, 7, 100, len(request) - 29, len(request) - 1):
            for at in range(0, len(request), size):
                sock.sendall(request[at:at + size])
            assert read_response(file)[0] == 200
        assert reader.receive_data(5) == ["x"] * 5


def test_requests_may_come_before_the_answers_to_those_before(server):
    requests = [publish_request(message("a", str(i)).encode()) for i in range(100)]
    requests[50:50] = [http_request("GET", "/health"), publish_request(b"{"),
                       http_request("GET", "/x")]
    with RawClient(server, ["a"]) as reader, dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(b"".join(requests))
        assert [read_response(file)[0] for _ in requests] == [200] * 51 + [400, 404] + [200] * 50
        assert reader.receive_data(100) == [str(i) for i in range(100)]


@pytest.mark.parametrize("at_once", [True, False])
def test_empty_lines_before_a_request_are_passed_over(server, at_once):
    # RFC 9112, section 2.2
    with dial(server) as sock, sock.makefile("rb") as file:
        for _ in range(2):
            for part in [b"\r\n" + publish_request()] if at_once else [b"\r\n", publish_request()]:
                sock.sendall(part)
            assert read_response(file)[0] == 200


@pytest.mark.parametrize("first", [b"", b'{"channel": "a", "data": "'])
def test_a_body_that_drips_is_cut_off(server, caplog, monkeypatch, first):
    with undisturbed(server, caplog), RawClient(server, ["a"]) as reader, \
            monkeypatch.context() as patch:
        patch.setattr(philote, "REQUEST_TIME", 0.5)
        with dial(server) as sock:
            sock.sendall(publish_request(first, headers={"Content-Length": 1000}))
            answer = drip(sock, b"x" * 300)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
        assert reader.is_quiet()


def test_a_connection_kept_alive_without_a_request_is_closed(server, caplog, monkeypatch):
    with undisturbed(server, caplog), monkeypatch.context() as patch:
        patch.setattr(philote, "REQUEST_TIME", 0.5)
        with dial(server) as sock, sock.makefile("rb") as file:
            sock.sendall(http_request("GET", "/health"))
            assert read_response(file)[0] == 200 and read_response(file) is None


def test_a_client_gone_in_the_middle_of_a_body_publishes_nothing(server, caplog):
    with undisturbed(server, caplog), RawClient(server, ["a"]) as reader:
        for end in range(1, 30, 7):
            assert ask(server, publish_request()[:-end], half_close=True) is None
        assert reader.is_quiet()


def test_messages_over_http_are_slowed_down_to_the_rate_that_is_allowed():
    with running(max_message_rate=20) as server, RawClient(server, ["a"]) as reader:
        start = time.monotonic()
        publish(server, [{"channel": "a", "data": "x"}] * 30)
        assert time.monotonic() - start > 0.25 and reader.receive_data(30) == ["x"] * 30


# What the server is doing

INFO = {
    "version", "python", "implementation", "gil", "num_cpu", "pid", "uptime_in_seconds", "tcp_port",
    "connections", "max_connections", "channels", "read_buffer_size", "write_buffer_size",
    "check_origin", "host", "loglevel", "max_message_size", "max_queue_size", "max_message_rate",
    "ping_interval", "shutdown_timeout",
}


def info_of(server):
    status, headers, body = call(server, "GET", "/api/info", token=API)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert SECRET.encode() not in body
    return json.loads(body)


def test_info_describes_the_server():
    settings = {"max_connections": 9, "check_origin": ("https://a.example",), "ping_interval": 7.5}
    with running(**settings) as server:
        with RawClient(server, ["a", "b"]), Follower(server, ["b", "c"]):
            info = info_of(server)
            assert set(info) == INFO
            assert (info["version"], info["pid"]) == (philote.__version__, os.getpid())
            assert info["python"] == ".".join(map(str, sys.version_info[:3]))
            assert (info["tcp_port"], info["num_cpu"]) == (port_of(server), os.cpu_count())
            assert (info["connections"], info["channels"], info["max_connections"]) == (2, 3, 9)
            assert (info["check_origin"], info["ping_interval"]) == (["https://a.example"], 7.5)
            assert info["uptime_in_seconds"] in range(PATIENCE) and type(info["gil"]) is bool


def test_the_uptime_grows(server):
    wait_until(lambda: info_of(server)["uptime_in_seconds"] > 0)


@pytest.mark.parametrize("path", ["/api/info", "/metrics"])
@pytest.mark.parametrize("token, expected", [
    (API, 200), ("", 401), (make_token(api=True, secret="x" * 32), 401),
    (make_token(api=True, exp=5), 401), (make_token(["a"], ["a"]), 403),
    (make_token(api="true"), 403), (make_token(api=1), 403), (make_token(api=False), 403),
])
def test_only_tokens_with_the_claim_api_are_told_about_the_server(server, path, token, expected):
    status, headers, body = call(server, "GET", path, token=token)
    assert status == expected == call(server, "GET", f"{path}?auth={token}")[0]
    if status != 200:
        assert json.loads(body)["error"] == {401: "unauthorized", 403: "forbidden"}[status]
        assert b"max_" not in body and b"philote_" not in body


def families_of(response):
    status, headers, body = response
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert body.endswith(b"\n")
    return list(prometheus_client.parser.text_string_to_metric_families(body.decode()))


def samples_of(response):
    """The samples, by name and value of their label: {"errors_total forbidden": 1.0}"""
    return {" ".join([sample.name.removeprefix("philote_"), *sample.labels.values()]): sample.value
            for family in families_of(response) for sample in family.samples}


def get_metrics(server):
    return call(server, "GET", "/metrics", token=API)


def metrics_of(server):
    return samples_of(get_metrics(server))


def test_the_metrics_are_in_prometheus_text_format(server):
    with RawClient(server, ["a"], ["a"]) as client:
        client.publish("a", "x")
        status_of(server, upgrade_request())
        families = families_of(get_metrics(server))
    samples = [sample for family in families for sample in family.samples]
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    assert all(family.samples for family in families)
    assert len({(sample.name, *sample.labels.items()) for sample in samples}) == len(samples) == 13
    assert all(sample.name.startswith("philote_") for sample in samples)


def test_the_metrics_of_a_known_run_are_exact(server):
    with RawClient(server, ["a"]) as one, RawClient(server, ["a", "b"]) as two, Follower(server), \
            RawClient(server, ["c"], ["a", "d"]) as writer:
        for channel in ("a", "a", "a", "d", "x", "y"):  # the last two are forbidden
            writer.publish(channel, "x")
        for bad in ("{", "5", "null"):
            writer.send(frame(1, bad))
        errors = [writer.receive()["error"] for _ in range(5)]
        assert errors == ["forbidden"] * 2 + ["bad_message"] * 3
        publish(server, {"channel": "b", "data": "x"})
        publish(server, [{"channel": "a"}, {"channel": "b"}])
        for request in (publish_request(token=""), upgrade_request(), http_request("GET", "/x")):
            ask(server, request)
        assert [one.receive()["channel"] for _ in range(4)] == list("aaaa")
        assert [two.receive()["channel"] for _ in range(6)] == list("aaabab")
        wait_until(lambda: not server.strangers)
        metrics = metrics_of(server)
    assert {name: metrics[name] for name in metrics if "bytes" not in name} == {
        "connections": 4, "connections_total": 4, "channels": 3, "messages_received_total": 12,
        "messages_published_total": 7, "messages_delivered_total": 14,
        "errors_total bad_message": 3,
        "errors_total forbidden": 2, "slow_consumers_total": 0, "refusals_total unauthorized": 2,
        "refusals_total not_found": 1}


REFUSALS = {
    "unauthorized": upgrade_request(), "forbidden": publish_request(token=make_token()),
    "bad_request": b"{}\r\n\r\n",
    "method_not_allowed": http_request("PUT", "/health"), "not_found": http_request("GET", "/x"),
    "upgrade_required": upgrade_request(headers={"Sec-WebSocket-Version": "8"}),
    "bad_message": publish_request(b"5"),
    "length_required": publish_request(None, without=["Content-Length"]),
    "not_acceptable": http_request(
        "GET", "/api/events", token=make_token(["a"]), headers={"Accept": "image/png"}),
    "too_large": publish_request(headers={"Content-Length": 1 << 30}),
    "unsupported_media_type": publish_request(headers={"Content-Type": "a/b"}),
    "uri_too_long": http_request("GET", "/" + "x" * 9000),
    "full": upgrade_request(headers={"Authorization": API}),
    "request_header_fields_too_large": http_request("GET", "/", headers={"X": "x" * 17000}),
    "origin": upgrade_request(headers={"Origin": "http://elsewhere"}),
}


def test_refusals_are_counted_by_their_reasons():
    with running(max_connections=1, check_origin=True) as server, RawClient(server):
        for i, request in enumerate(REFUSALS.values(), 1):
            for _ in range(i):
                ask(server, request)
        metrics = metrics_of(server)
        assert {name.split()[1]: metrics[name] for name in metrics if "refusals" in name} == {
            reason: i for i, reason in enumerate(REFUSALS, 1)}


def test_a_request_that_came_too_slowly_is_counted_as_refused(server, monkeypatch):
    monkeypatch.setattr(philote, "REQUEST_TIME", 0.5)
    assert status_of(server, b"GET / HTTP/1.1\r\n") == 408
    monkeypatch.undo()
    assert metrics_of(server)["refusals_total request_timeout"] == 1


def test_connections_and_channels_are_counted_now_and_in_all(server):
    for _ in range(3):
        with RawClient(server, ["a", "b"]), Follower(server, ["b", "c"]):
            metrics = metrics_of(server)
            assert (metrics["connections"], metrics["channels"]) == (2, 3)
        wait_until(lambda: not server.subscribers and not len(server.registry))
    metrics = metrics_of(server)
    assert (metrics["connections"], metrics["connections_total"], metrics["channels"]) == (0, 6, 0)


def read_all(sock):
    """All bytes up to the end of the connection."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def test_bytes_are_counted_both_ways(server):
    token = {"Authorization": make_token(["a"], ["a"])}
    frames = text("a", "x" * 1000) + text("b") + frame(9, b"ping") + frame(8)
    sent = [upgrade_request(headers=token) + frames,
            publish_request(headers={"Connection": "close"}), b"GARBAGE\r\n\r\n"]
    received = 0
    for request in sent:
        with dial(server) as sock:
            sock.sendall(request)
            received += len(read_all(sock))
    wait_until(lambda: not server.strangers)
    scrape = http_request("GET", "/metrics", token=API)
    metrics = samples_of(ask(server, scrape))
    assert metrics["sent_bytes_total"] == received
    assert metrics["received_bytes_total"] == sum(map(len, sent)) + len(scrape)


def test_a_slow_consumer_is_counted_and_what_waits_for_it_is_shown():
    large = {"channel": "a", "data": "x" * 200_000}
    with running(max_queue_size=10**6) as server, \
            RawClient(server, ["a"], receive_buffer=4096) as slow:
        assert metrics_of(server)["queued_bytes"] == 0
        wait_until(lambda: publish(server, large) and metrics_of(server)["queued_bytes"] > 200_000)
        wait_until(lambda: publish(server, large)["receivers"] == 0)
        metrics = metrics_of(server)
        assert (metrics["slow_consumers_total"], metrics["connections"]) == (1, 0)
        slow.close()
        wait_until(lambda: metrics_of(server)["queued_bytes"] == 0)


def in_threads(count, work):
    """Run work(i) in so many threads at once; raises what any of them raised."""
    errors, barrier = [], threading.Barrier(count)

    def run(i):
        try:
            barrier.wait(PATIENCE)
            work(i)
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def restless():
    """Let threads interrupt each other at every turn."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_the_counters_are_exact_when_many_threads_publish_at_once(server, restless):
    def work(i):
        with RawClient(server, write=["a"]) as client:
            client.send((text("a", "x") * 2 + text("b") + frame(1, "{")) * 25)
            errors = [client.receive()["error"] for _ in range(50)]
            assert errors == ["forbidden", "bad_message"] * 25
        for _ in range(5):
            publish(server, [{"channel": "a"}] * 10)

    with RawClient(server, ["a"]) as one, Follower(server, ["a"]) as two:
        in_threads(8, work)
        for reader in (one, two):
            for _ in range(800):
                reader.receive()
        wait_until(lambda: len(server.subscribers) == 2 and not server.strangers)
        metrics = metrics_of(server)
    assert (metrics["messages_received_total"], metrics["messages_published_total"]) == (1200, 800)
    assert (metrics["errors_total bad_message"], metrics["errors_total forbidden"]) == (200, 200)
    assert (metrics["messages_delivered_total"], metrics["connections_total"]) == (1600, 10)


def test_no_counter_ever_goes_down(server, restless):
    done, seen = threading.Event(), []

    def work(i):
        if i == 0:
            while not done.is_set():
                seen.append(server.statistics()[0])
        else:
            for _ in range(40):
                with RawClient(server, write=["a"]) as client:
                    client.send(text("a", "x") * 5)
                    assert client.is_quiet()
            if i == 1:
                done.set()

    in_threads(5, work)
    for name in ("received", "published", "bytes_received", "bytes_sent", "connections"):
        values = [totals[name] for totals in seen]
        assert values == sorted(values), name


def test_a_slow_consumer_is_counted_once_however_many_publish_to_it(caplog, restless):
    large = [{"channel": "a", "data": "x" * 50_000}] * 10
    with running(max_queue_size=10_000) as server:
        for count in range(1, 6):
            with RawClient(server, ["a"], receive_buffer=4096):
                in_threads(8, lambda i: wait_until(
                    lambda: publish(server, large)[9]["receivers"] == 0))
            assert metrics_of(server)["slow_consumers_total"] == count


def test_no_label_tells_of_a_channel_or_of_a_client(server):
    names = {f"channel-{i}" for i in range(50)}
    for name in names:
        publish(server, {"channel": name}, make_token(write=names))
        status_of(server, http_request("GET", "/" + name))
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(RawClient(server, [name], [name])).publish(name, "x")
        families = families_of(get_metrics(server))
    samples = [sample for family in families for sample in family.samples]
    assert {key for sample in samples for key in sample.labels} == {"code", "reason"}
    assert len(samples) < 20
    assert not re.search(r"channel-|[0-9a-f]{8}-|127\.0", repr(families))


def test_health_is_open_to_everybody(server):
    status, headers, body = call(server, "GET", "/health")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"status": "ok"}


def test_while_the_server_stops_health_tells_and_nothing_new_begins():
    with running(shutdown_timeout=PATIENCE) as server, http_connection(server) as connection:
        with RawClient(server):  # it leaves the close frame unanswered: stopping takes a while
            assert exchange(connection, "GET", "/health")[0] == 200
            stop = threading.Thread(target=server.stop)
            stop.start()
            wait_until(server.stopping.is_set)
            status, _, body = exchange(connection, "GET", "/health")
            assert status == 503 and json.loads(body)["status"] != "ok"
            answer = exchange(connection, "POST", "/api/publish", message().encode(), WRITER)
            assert (answer[0], json.loads(answer[2])["error"]) == (503, "shutting_down")
            events = exchange(connection, "GET", "/api/events", token=make_token(["a"]))
            assert events[0] == 503 and "retry-after" in events[1]
        assert connection.sock.recv(1) == b""
        connection.close()
        stop.join()


# Server-sent events

def test_events_follow_the_channels_in_order(server):
    with Follower(server, ["a", "b", "c"], "?channel=a&channel=b") as follower:
        status, headers, _ = follower.response
        assert headers["content-type"] == "text/event-stream"
        assert headers["cache-control"] == "no-store"
        messages = [{"channel": "abc"[i % 3], "data": str(i)} for i in range(300)]
        publish(server, messages, make_token(write="abc"))
        assert follower.receive_data(200) == [str(i) for i in range(300) if i % 3 < 2]


def test_events_are_what_publishers_of_all_kinds_send(server):
    with Follower(server) as follower, RawClient(server, ["a"], ["a"]) as client:
        issuer = publish(server, {"channel": "a", "data": "one\nline\r\n"})["issuer"]
        assert follower.receive() == client.receive() == {
            "issuer": issuer, "channel": "a", "data": "one\nline\r\n"}
        client.publish("a", "two")
        received = follower.receive()
        assert list(received) == ["issuer", "channel", "data"] and received["data"] == "two"
        client.publish("a", "")
        assert "data" not in follower.receive() and client.is_quiet()


def test_the_bytes_of_an_event_are_those_of_the_socket(server):
    with Follower(server) as follower, RawClient(server, ["a"]) as reader:
        for data in ("x", "\u2028\u00e9", "", "\ud800", "y" * 70_000):
            publish(server, {"channel": "a", "data": data})
        for _ in range(5):
            assert follower.read_event() == [b"data: " + reader.read_frame()[1] + b"\n"]


def test_without_a_channel_named_events_follow_all_that_may_be_read(server):
    with Follower(server, ["a", "b"]) as follower:
        messages = [{"channel": name, "data": name} for name in ("a", "c", "b")]
        publish(server, messages, make_token(write="abc"))
        assert follower.receive_data(2) == ["a", "b"]


@pytest.mark.parametrize("query", ["?channel=b", "?channel=a&channel=b", "?channel=", "?channel=A",
                                   "?channel=a%00"])
def test_events_of_channels_that_may_not_be_read_are_refused(server, query):
    status, _, body = call(server, "GET", "/api/events" + query, token=make_token(["a"], ["b"]))
    assert (status, json.loads(body)["error"]) == (403, "forbidden")
    assert not server.subscribers and not len(server.registry)


@pytest.mark.parametrize("accept, expected", [
    (None, 200), ("", 200), ("text/event-stream", 200), ("*/*", 200), ("text/*", 200),
    ("TEXT/Event-Stream", 200), ("text/html, text/event-stream;q=0.5", 200), ("text/html", 406),
    ("application/json, image/*", 406),
])
def test_events_are_sent_to_who_accepts_them(server, accept, expected):
    headers = {} if accept is None else {"Accept": accept}
    request = http_request("GET", "/api/events", token=make_token(["a"]), headers=headers)
    status, _, body = ask(server, request)
    assert status == expected
    assert status == 200 or json.loads(body)["error"] == "not_acceptable"


@pytest.mark.parametrize("token", ["", "garbage", make_token(["a"], secret="x" * 32),
                                   make_token(["a"], exp=5)])
def test_events_need_a_token_in_the_header_or_in_the_query(server, token):
    good = make_token(["a"])
    assert status_of(server, http_request("GET", "/api/events", token=token)) == 401
    assert status_of(server, http_request("GET", "/api/events?auth=" + token)) == 401
    assert status_of(server, http_request("GET", "/api/events?channel=a&auth=" + good)) == 200


def test_a_quiet_stream_gets_a_comment_now_and_then():
    with running(ping_interval=0.1) as server, Follower(server) as follower:
        assert [follower.read_event() for _ in range(3)] == [[b":\n"]] * 3
        publish(server, {"channel": "a", "data": "x"})
        events = [follower.read_event() for _ in range(20)]
        assert sum(event[0].startswith(b"data: ") for event in events) == 1
        assert len(server.subscribers) == 1


def test_a_stream_counts_as_a_connection():
    token, events = make_token(["a"]), http_request("GET", "/api/events", token=make_token(["a"]))
    with running(max_connections=1) as server:
        with Follower(server):
            for request in (events, upgrade_request(headers={"Authorization": token})):
                status, headers, body = ask(server, request)
                assert (status, json.loads(body)["error"]) == (503, "full")
                assert int(headers["retry-after"]) > 0
            assert publish(server, {"channel": "a"})["receivers"] == 1
        wait_until(lambda: not server.subscribers)
        with RawClient(server):
            assert status_of(server, events) == 503


def test_a_stream_ends_when_its_token_expires(server):
    soon, late = int(time.time()) + 2, int(time.time()) + 999
    with Follower(server, exp=soon) as follower, Follower(server, exp=late) as other:
        publish(server, {"channel": "a", "data": "x"})
        assert follower.receive_data(1) == ["x"] and follower.read_event() == []
        assert publish(server, {"channel": "a", "data": "y"})["receivers"] == 1
        assert other.receive_data(2) == ["x", "y"]


def test_a_stream_that_is_not_read_is_dropped_and_the_others_miss_nothing(caplog):
    with running(max_queue_size=100_000) as server, Follower(server, receive_buffer=4096) as slow:
        with Follower(server) as other:
            sent = []
            while len(server.subscribers) == 2:
                assert len(sent) < 1000, "nobody was dropped"
                sent.append(f"{len(sent)}".ljust(50_000))
                publish(server, {"channel": "a", "data": sent[-1]})
                assert other.receive()["data"] == sent[-1]
            assert "slow consumer" in caplog.text
            assert metrics_of(server)["slow_consumers_total"] == 1
            assert publish(server, {"channel": "a"})["receivers"] == 1
        assert slow.has_ended()


def test_a_stream_whose_client_goes_away_is_cleaned_up(server, caplog):
    with undisturbed(server, caplog):
        for _ in range(5):
            with Follower(server) as follower:
                publish(server, {"channel": "a", "data": "x"})
                follower.sock.shutdown(socket.SHUT_WR)
                assert follower.receive_data(1) == ["x"] and follower.read_event() == []


def test_what_a_client_sends_behind_its_request_for_events_is_ignored(server, caplog):
    with undisturbed(server, caplog), Follower(server) as follower:
        follower.sock.sendall(publish_request() + b"\0" * 100_000)
        assert publish(server, {"channel": "a", "data": "y"})["receivers"] == 1
        assert follower.receive_data(1) == ["y"]


def test_a_stream_ends_with_the_server_and_behind_all_that_was_published():
    with running(max_queue_size=1 << 26) as server, \
            Follower(server, receive_buffer=4096) as follower:
        sent = []
        while server.statistics()[0]["queued"] < 100_000:
            sent.append(f"{len(sent)}".ljust(50_000))
            publish(server, {"channel": "a", "data": sent[-1]})
        stop = threading.Thread(target=server.stop)
        stop.start()
        wait_until(lambda: not server.subscribers)
        assert follower.receive_data(len(sent)) == sent and follower.read_event() == []
    stop.join()


# Browsers

ORIGINS = [  # CHECK_ORIGIN, the request's origin, whether it is allowed
    (False, None, True), (False, "http://elsewhere", True), (False, "null", True),
    (True, None, True), (True, "http://localhost", True), (True, "https://LocalHost", True),
    (True, "http://elsewhere", False), (True, "http://localhost:81", False),
    (True, "http://localhost.elsewhere", False), (True, "null", False), (True, "", False),
    (("https://a.example",), "https://a.example", True),
    (("https://a.example",), "HTTPS://A.Example", True),
    (("https://a.example",), "http://localhost", True),
    (("https://a.example",), "http://a.example", False),
    (("https://a.example",), "https://b.a.example", False),
    (("https://a.example",), "https://a.example.net", False), (("https://a.example",), None, True),
]


def origin_headers(origin):
    return {} if origin is None else {"Origin": origin}


@pytest.mark.parametrize("check_origin, origin, allowed", ORIGINS)
def test_a_browser_is_told_which_origins_may_ask(check_origin, origin, allowed):
    told = "*" if not check_origin else origin
    with running(check_origin=check_origin) as server:
        for method, path, token, body, status in [
                ("OPTIONS", "/api/publish", "", None, 204),
                ("POST", "/api/publish", WRITER, b"{}", 400), ("GET", "/health", "", None, 200),
                ("GET", "/api/info", "", None, 401), ("PUT", "/metrics", "", None, 405),
                ("GET", "/api/events", API, None, 200)]:
            request = http_request(method, path, body, token, origin_headers(origin))
            answer = ask(server, request)
            assert answer[0] == (status if allowed else 403), path
            assert answer[1].get("access-control-allow-origin") == (told if allowed else None), path
            assert not told or not allowed or answer[1]["vary"] == "Origin"


@pytest.mark.parametrize("path, method", [
    ("/api/publish", "POST"), ("/api/events", "GET"), ("/api/info", "GET"), ("/metrics", "GET"),
    ("/health", "GET"),
])
def test_a_preflight_request_is_answered(server, path, method):
    status, headers, body = call(server, "OPTIONS", path, headers={
        "Origin": "https://a.example", "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization, content-type"})
    assert (status, body, headers["access-control-allow-origin"]) == (204, b"", "*")
    assert method in headers["access-control-allow-methods"].split(", ")
    assert headers["access-control-allow-headers"].lower() == "authorization, content-type"
    assert int(headers["access-control-max-age"]) > 0 and "content-length" not in headers


@pytest.mark.parametrize("path", [
    "/api", "/api/", "/api/publish/", "/api/publish/a", "/Health", "/metrics.txt", "//health",
    "/%68ealth", "*",
])
def test_there_is_nothing_at_other_paths(server, path):
    for method in ("GET", "POST", "OPTIONS", "GARBAGE"):
        status, headers, body = call(server, method, path, token=API)
        assert (status, headers["content-type"]) == (404, "application/json")
        assert json.loads(body)["error"] == "not_found"


@pytest.mark.parametrize("method, path, allow", [
    ("GET", "/api/publish", "OPTIONS, POST"), ("HEAD", "/api/publish", "OPTIONS, POST"),
    ("PUT", "/api/publish", "OPTIONS, POST"), ("POST", "/api/events", "GET, HEAD, OPTIONS"),
    ("POST", "/api/info", "GET, HEAD, OPTIONS"), ("DELETE", "/metrics", "GET, HEAD, OPTIONS"),
    ("POST", "/health", "GET, HEAD, OPTIONS"), ("get", "/health", "GET, HEAD, OPTIONS"),
    ("CONNECT", "/", "GET, HEAD, OPTIONS"), ("POST", "/", "GET, HEAD, OPTIONS"),
    ("TRACE", "/health", "GET, HEAD, OPTIONS"),
])
def test_another_method_is_answered_with_those_that_are_allowed(server, method, path, allow):
    status, headers, body = call(server, method, path, token=API)
    assert (status, headers["allow"]) == (405, allow)
    assert (json.loads(body)["error"] if body else method) in ("method_not_allowed", "HEAD")


@pytest.mark.parametrize("path, token, expected", [
    ("/health", "", 200), ("/api/info", API, 200), ("/metrics", API, 200), ("/metrics", "", 401),
    ("/x", "", 404), ("/api/publish", WRITER, 405),
])
def test_head_is_answered_as_get_without_a_body(server, path, token, expected):
    answers = []
    for method in ("GET", "HEAD"):
        with dial(server) as sock:
            request = http_request(method, path, token=token, headers={"Connection": "close"})
            sock.sendall(request)
            answers.append(read_all(sock).partition(b"\r\n\r\n"))
    (get, _, body), (head, _, nothing) = answers
    assert body and not nothing and b" %d " % expected in head
    names = [re.findall(rb"(?m)^[\w-]+:", answer) for answer in (get, head)]
    assert names[0] == names[1] and (
        path == "/metrics" or re.search(rb"Content-Length: .*", head)[0] in get)


def test_head_of_events_is_not_a_connection(server, caplog):
    with undisturbed(server, caplog), dial(server) as sock:
        sock.sendall(http_request("HEAD", "/api/events", token=make_token(["a"])))
        head, _, rest = read_all(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ") and b"text/event-stream" in head and rest == b""
        assert metrics_of(server)["connections_total"] == 2  # those of undisturbed()


def test_who_comes_without_a_websocket_is_told_to_upgrade(server):
    with dial(server) as sock, sock.makefile("rb") as file:
        sock.sendall(http_request("GET", "/") + http_request("GET", "/health"))
        status, headers, body = read_response(file)
        assert (status, headers["upgrade"]) == (426, "websocket")
        assert json.loads(body)["error"] == "upgrade_required"
        words = headers["connection"].lower().split(", ")
        assert "upgrade" in words and (read_response(file) is None) == ("close" in words)


def test_a_target_may_be_absolute(server):
    assert status_of(server, http_request("GET", "http://localhost/health?x=1")) == 200


# curl

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
NO_PROXY = {**os.environ, "no_proxy": "*"}


@needs_curl
@pytest.mark.parametrize("size", [1, 100_000])
def test_curl_publishes(server, size):
    with RawClient(server, ["a"]) as reader:
        command = ["curl", "-sS", "-d", "@-", "-H", "Authorization: Bearer " + WRITER,
                   f"http://127.0.0.1:{port_of(server)}/api/publish"]
        done = subprocess.run(command, input=message("a", "x" * size), capture_output=True,
                              text=True,
                              timeout=PATIENCE, env=NO_PROXY)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["receivers"] == 1
        assert reader.receive_data(1) == ["x" * size]


@needs_curl
def test_curl_follows_a_channel(server):
    url = f"http://127.0.0.1:{port_of(server)}/api/events?channel=a&auth={make_token(['a'])}"
    with subprocess.Popen(["curl", "-sSN", url], stdout=subprocess.PIPE, env=NO_PROXY) as curl:
        try:
            wait_until(lambda: len(server.registry))
            for data in ("one", "two"):
                publish(server, {"channel": "a", "data": data})
                assert json.loads(curl.stdout.readline().removeprefix(b"data: "))["data"] == data
                assert curl.stdout.readline() == b"\n"
        finally:
            curl.kill()
    wait_until(lambda: not server.subscribers)


# ---------------------------------------------------------------------------- the opening handshake

READER = {"Authorization": "Bearer " + make_token(["a"], ["a"])}


def upgrade(headers=(), **changes):
    """An upgrade with a good token."""
    return upgrade_request(headers={**READER, **dict(headers)}, **changes)


def test_an_upgrade_is_answered_as_rfc_6455_wants(server):
    # The key and the answer are those of its section 1.3.
    status, headers, _ = ask(server, upgrade())
    assert (status, headers["sec-websocket-accept"]) == (101, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
    assert (headers["upgrade"].lower(), headers["connection"].lower()) == ("websocket", "upgrade")


@pytest.mark.parametrize("headers", [
    {"Upgrade": "WebSocket"}, {"Upgrade": "h2c, websocket"}, {"Connection": "upgrade"},
    {"Connection": "UPGRADE"}, {"Connection": "keep-alive, Upgrade"},
    {"Connection": "keep-alive ,\tupgrade"}, {"Host": "localhost:6380"}, {"Host": "[::1]:80"},
    {"Host": "xn--bcher-kva.example"}, {"Host": "EXAMPLE.com."}, {"Host": "a_b.local"},
    {"Content-Length": "0"}, {"Sec-WebSocket-Protocol": "chat, superchat"},
    {"Sec-WebSocket-Protocol": ""}, {"Sec-WebSocket-Extensions": "permessage-deflate"},
    {"Sec-WebSocket-Extensions": "x-unknown; a=\"b\""},
    {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"},
    {"Sec-WebSocket-Extensions": "permessage-deflate; server_max_window_bits=8"},
    {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits=15"},
    {"Sec-WebSocket-Extensions": "permessage-deflate; server_max_window_bits=99"},
    {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits=x, x-y"},
    {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits=\"9"},
    {"Origin": "null"}, {"X-Any": "\xe4\xff"}, {"X-Empty": ""}, {"X-Spaces": "  a\tb  "},
    {"Expect": "100-continue"},
], ids=repr)
def test_an_upgrade_is_accepted_without_extension_or_subprotocol(server, headers):
    status, answered, _ = ask(server, upgrade(headers))
    assert status == 101 and set(answered) == {"upgrade", "connection", "sec-websocket-accept"}


@pytest.mark.parametrize("path", ["/", "/any/path", "/health", "/api/publish?x=1", "/?%ff",
                                  "http://localhost/", "*"])
def test_a_websocket_is_opened_at_any_path(server, path):
    assert status_of(server, upgrade(path=path)) == 101


def header_line(line):
    """An upgrade with a line of these bytes among its headers."""
    return upgrade().replace(b"\r\n", b"\r\n" + line + b"\r\n", 1)


BAD_HANDSHAKES = {
    "POST": (405, upgrade(method="POST")), "HEAD": (405, upgrade(method="HEAD")),
    "OPTIONS": (405, upgrade(method="OPTIONS")), "GARBAGE": (405, upgrade(method="GARBAGE")),
    "get": (405, upgrade(method="get")), "G@T": (400, upgrade(method="G@T")),
    "no method": (400, upgrade(method="")),
    **{f"version {version!r}": (426, upgrade({"Sec-WebSocket-Version": version}))
       for version in ("8", "0", "14", "", "13, 8", "013", "x")},
    "no version": (426, upgrade(without=["Sec-WebSocket-Version"])),
    "no key": (400, upgrade(without=["Sec-WebSocket-Key"])),
    **{f"key {key!r}": (400, upgrade({"Sec-WebSocket-Key": key})) for key in (
        "", "abc", NONCE[:-4], NONCE + "AAAA", "!" * 24, NONCE[:-2], "dGhlIHNhbXBsZSBub25j ZQ==",
        NONCE + ", " + NONCE)},
    "two keys": (400, upgrade({"sec-websocket-key": NONCE})),
    **{f"Upgrade {value!r}": (400, upgrade({"Upgrade": value}))
       for value in ("", "h2c", "web socket", "websocket/13")},
    "no Upgrade": (400, upgrade(without=["Upgrade"])),
    "no Connection": (400, upgrade(without=["Connection"])),
    **{f"Connection {value!r}": (400, upgrade({"Connection": value}))
       for value in ("", "keep-alive", "xupgrade")},
    **{f"Host {value!r}": (400, upgrade({"Host": value})) for value in (
        "", "\xff", "xn--a-0000000000000", "a b", "a/b", "a, b", "user@host")},
    "no Host": (400, upgrade(without=["Host"])), "two Hosts": (400, upgrade({"host": "localhost"})),
    **{f"header {line!r}": (400, header_line(line)) for line in (
        b"X: a\nY: b", b"X: a\rb", b"X: a\0b", b"no colon", b" folded", b"\tfolded", b"X : a",
        b": a", b"X\xe4: a", b"X: a\r", b"(X): a", b"X: \x7f")},
    "HTTP/1.0": (400, upgrade().replace(b"HTTP/1.1", b"HTTP/1.0", 1)),
    **{f"line {line!r}": (400, upgrade().replace(b"GET / HTTP/1.1", line, 1)) for line in (
        b"GET / HTTP/2.0", b"GET / HTTP/1.1 ", b"GET  / HTTP/1.1", b"GET /", b"GET / a HTTP/1.1",
        b"GET /\xff HTTP/1.1", b"GET / http/1.1", b"GET / HTTP/1.11", b"GET /\0 HTTP/1.1",
        b" GET / HTTP/1.1")},
    "a length": (400, upgrade({"Content-Length": 5}) + b"12345"),
    "a bad length": (400, upgrade({"Content-Length": "x"})),
    "chunked": (400, upgrade({"Transfer-Encoding": "chunked"}) + b"0\r\n\r\n"),
    "a head of 17 KiB": (431, upgrade({"X": "x" * 17 * 1024})),
    "a head of 1 MB without end": (431, upgrade({"X": "x" * 10**6})[:-4]),
    "200 headers": (431, upgrade({f"X-{i}": "x" for i in range(200)})),
    "a target of 9 KiB": (414, upgrade(path="/" + "x" * 9 * 1024)),
    "200 parameters": (400, upgrade(path="/?" + "a=b&" * 200)),
}


@pytest.mark.parametrize("name", BAD_HANDSHAKES)
def test_a_bad_handshake_is_refused_with_the_reason_in_json(server, caplog, name):
    expected, request = BAD_HANDSHAKES[name]
    with undisturbed(server, caplog), dial(server) as sock:
        sock.sendall(request)
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == expected
    assert re.search(rb"\r\nConnection: (Upgrade, )?close", head)
    assert (b"\r\nSec-WebSocket-Version: 13" in head) == (expected == 426)
    assert (b"\r\nAllow: GET" in head) == (expected == 405)
    assert body.count(b"\n") == (name != "HEAD")
    assert name == "HEAD" or set(json.loads(body)) == {"error", "reason"}


def test_messages_behind_the_handshake_in_the_same_packet_are_delivered(server):
    with RawClient(server, ["a"]) as reader:
        frames = b"".join(text("a", str(i)) for i in range(100))
        last = text("a", "last")
        with RawClient(server, write=["a"], rest=frames + last[:-5]) as writer:
            assert reader.receive_data(100) == [str(i) for i in range(100)]
            writer.send(last[-5:])
            assert reader.receive_data(1) == ["last"]


def test_a_handshake_may_come_in_pieces_and_behind_another_request(server):
    data = http_request("GET", "/health") + publish_request() + upgrade() + text("a", "y")
    with RawClient(server, ["a"]) as reader:
        for size in (1, 10, len(data) - 1):
            with dial(server) as sock, sock.makefile("rb") as file:
                for at in range(0, len(data), size):
                    sock.sendall(data[at:at + size])
                assert [read_response(file)[0] for _ in range(3)] == [200, 200, 101]
                assert reader.receive_data(2) == ["x", "y"]


def endless_head():
    return b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 300


@pytest.mark.parametrize("begin", [b"", b"\r\n", endless_head()[:20], upgrade()[:-2],
                                   b"GET / HTTP/1.1\n\n"])
def test_a_handshake_that_does_not_come_to_its_end_is_cut_off(server, caplog, monkeypatch, begin):
    with undisturbed(server, caplog), monkeypatch.context() as patch:
        patch.setattr(philote, "REQUEST_TIME", 0.5)
        with dial(server) as sock:
            sock.sendall(begin)
            head, _, body = read_all(sock).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ") or (head == b"" and not begin.strip())
            assert not body or json.loads(body)["error"] == "request_timeout"


@pytest.mark.parametrize("data", [endless_head(), b"\r\n" * 150], ids=["a header", "empty lines"])
def test_a_handshake_that_drips_is_cut_off(server, caplog, monkeypatch, data):
    with undisturbed(server, caplog), monkeypatch.context() as patch:
        patch.setattr(philote, "REQUEST_TIME", 0.5)
        with dial(server) as sock:
            answer = drip(sock, data)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("end", [0, 1, 30, 100, -1])
def test_half_a_handshake_and_an_end_is_closed(server, caplog, end):
    with undisturbed(server, caplog):
        assert ask(server, upgrade()[:end], half_close=True) is None


def test_a_reset_in_the_middle_of_a_handshake_is_cleaned_up(server, caplog):
    request = upgrade()
    with undisturbed(server, caplog):
        for end in range(0, len(request) + 1, 20):
            sock = dial(server)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.sendall(request[:end])
            sock.close()


def client_hello():
    """What a client begins with that takes us for a TLS server."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("data", [
    client_hello(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    b"SSH-2.0-OpenSSH_9.6\r\n", b"\0" * 100, b"{}\r\n\r\n", b"\xff" * 20_000,
    b"\xef\xbb\xbf" + upgrade(), frame(1, "hello"), b"*1\r\n$4\r\nPING\r\n",
], ids=["TLS", "HTTP/2", "SSH", "NUL", "JSON", "FF", "BOM", "frame", "Redis"])
def test_another_protocol_is_refused_at_once(server, caplog, monkeypatch, data):
    with undisturbed(server, caplog):
        monkeypatch.setattr(philote, "REQUEST_TIME", 10 * PATIENCE)
        assert status_of(server, data) == 400


def test_random_bytes_are_refused(server, caplog):
    chance = random.Random(4)
    with undisturbed(server, caplog):
        for _ in range(100):
            answer = ask(server, chance.randbytes(chance.randrange(1, 3000)), half_close=True)
            assert answer is None or answer[0] == 400
        for _ in range(200):  # one byte of an upgrade is another
            request = bytearray(upgrade(without=["Authorization"]))
            request[chance.randrange(len(request))] = chance.randrange(256)
            answer = ask(server, bytes(request), half_close=True)
            assert answer is None or 400 <= answer[0] < 500


@pytest.mark.parametrize("check_origin, origin, allowed", ORIGINS)
def test_a_websocket_is_opened_from_the_origins_that_are_allowed(check_origin, origin, allowed):
    with running(check_origin=check_origin) as server:
        status, _, body = ask(server, upgrade(origin_headers(origin)))
        assert status == (101 if allowed else 403)
        assert allowed or json.loads(body)["error"] == "origin"


@pytest.mark.parametrize("host, origin, allowed", [
    ("example.com:81", "http://example.com:81", True), ("EXAMPLE.com", "https://example.COM", True),
    ("[::1]:81", "http://[::1]:81", True), ("example.com:81", "http://example.com", False),
    ("example.com", "example.com", False), ("example.com", "http://example.com/", False),
])
def test_an_origin_is_compared_with_the_host_that_was_asked(host, origin, allowed):
    with running(check_origin=True) as server:
        status = status_of(server, upgrade({"Host": host, "Origin": origin}))
        assert status == (101 if allowed else 403)


def test_the_connection_over_the_limit_is_refused(caplog):
    with running(max_connections=4) as server, undisturbed(server, caplog):
        with RawClient(server), RawClient(server):
            for _ in range(3):
                status, headers, body = ask(server, upgrade())
                assert (status, json.loads(body)["error"]) == (503, "full")
                assert int(headers["retry-after"]) > 0
            assert status_of(server, upgrade_request()) == 401  # who may not come in learns nothing
        wait_until(lambda: len(server.subscribers) == 2)
        with RawClient(server), RawClient(server):
            pass
        wait_until(lambda: len(server.subscribers) == 2)


@pytest.mark.parametrize("max_connections", [1, 3])
def test_of_fifty_handshakes_at_once_for_the_last_place_one_gets_in(restless, max_connections):
    with running(max_connections=max_connections) as server, contextlib.ExitStack() as stack:
        for _ in range(max_connections - 1):
            stack.enter_context(RawClient(server))
        for _ in range(5):
            with contextlib.ExitStack() as crowd:
                socks = [crowd.enter_context(dial(server)) for _ in range(50)]
                files = [crowd.enter_context(sock.makefile("rb")) for sock in socks]
                for sock in socks:
                    sock.sendall(upgrade()[:-1])
                in_threads(50, lambda i: socks[i].sendall(b"\n"))
                statuses = [read_response(file)[0] for file in files]
                assert sorted(statuses) == [101] + [503] * 49
            wait_until(lambda: len(server.subscribers) == max_connections - 1)


def test_a_place_is_free_again_as_often_as_it_was_taken():
    with running(max_connections=1) as server:
        for _ in range(20):
            wait_until(lambda: not server.subscribers)
            with RawClient(server, ["a"]):
                assert status_of(server, upgrade()) == 503


def test_the_oldest_silent_stranger_makes_room_for_a_newcomer():
    with running(max_connections=1) as server, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(dial(server)) for _ in range(64)]
        wait_until(lambda: len(server.strangers) == 64)
        for gone in range(3):
            newcomer = stack.enter_context(dial(server))
            assert strangers[gone].recv(1) == b""
            wait_until(lambda: len(server.strangers) == 64)
        for sock in (*strangers[3:], newcomer):
            sock.sendall(http_request("GET", "/health", headers={"Connection": "close"}))
            assert read_all(sock).startswith(b"HTTP/1.1 200 ")


def test_strangers_keep_nobody_out_and_subscribers_are_never_dropped_for_them():
    with running(max_connections=3) as server, contextlib.ExitStack() as stack:
        reader = stack.enter_context(RawClient(server, ["a"]))
        for _ in range(3):
            for _ in range(100):
                stack.enter_context(dial(server))
            assert is_served(server)
            assert publish(server, {"channel": "a", "data": "x"})["receivers"] == 1
        assert reader.receive_data(3) == ["x"] * 3
        wait_until(lambda: len(server.strangers) <= 64)


# --------------------------------------------------------------------------------------- the faults

@pytest.mark.parametrize("stage", ["handshake", "frame", "fan-out", "fragment"])
def test_a_reset_connection_is_cleaned_up(server, caplog, stage):
    with undisturbed(server, caplog):
        if stage == "handshake":
            sock = dial(server)
            sock.sendall(upgrade_request()[:50])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            return
        with RawClient(server, write=["a"]) as writer:
            victims = [RawClient(server, ["a"], ["a"], receive_buffer=4096) for _ in range(5)]
            for victim in victims:
                victim.send({"frame": text()[:9], "fan-out": b"",
                             "fragment": frame(1, "{", fin=False)}[stage])
            for i, victim in enumerate(victims):
                writer.publish("a", "x" * 300_000)
                victim.reset()
            assert writer.is_quiet()


def test_nothing_of_one_client_lands_on_the_reused_descriptor_of_another(server, full):
    stop = threading.Event()

    def flood():
        with RawClient(server, write=["a"]) as writer:
            while not stop.is_set():
                writer.publish("a", "for a alone " + "x" * 3000)
    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for _ in range(1000 if full else 100):
            victim = RawClient(server, ["a"], receive_buffer=4096)
            victim.reset()
            with RawClient(server, ["b"]) as newcomer:
                assert newcomer.is_quiet()
    finally:
        stop.set()
        thread.join()


def test_churn_leaves_nothing_behind(full):
    """Connects and disconnects, a third of them by RST, while a publisher runs."""
    rounds, each = (200, 100) if full else (8, 50)
    with running(ping_interval=0) as server, RawClient(server, ["a"]) as steady, \
            RawClient(server, write=["a"]) as writer:
        def churn():
            for i in range(each):
                client = RawClient(server, ["a", "b"])
                client.reset() if i % 3 == 0 else client.close()
        before, memory, sent = None, [], 0
        for i in range(rounds):
            thread = threading.Thread(target=churn)
            thread.start()
            while thread.is_alive():
                writer.publish("a", str(sent))
                assert steady.receive()["data"] == str(sent)
                sent += 1
            thread.join()
            if i in (rounds // 4, rounds - 1):
                wait_until(lambda: len(server.subscribers) == 2 and not server.strangers)
                wait_until(lambda: before is None or footprint(server) == before)
                before = footprint(server)
                memory.append(
                    int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
                    if os.path.exists("/proc/self/status") else 1)
        assert memory[-1] <= memory[0] * 1.1, memory


def test_silent_strangers_do_not_keep_out_a_newcomer(caplog):
    with running(max_connections=5) as server, undisturbed(server, caplog), \
            contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(dial(server)) for _ in range(200)]
        assert is_served(server)
        wait_until(lambda: len(server.strangers) <= 64)
        assert strangers[0].recv(1) == b"", "the oldest is not the one that was dropped"


def test_silent_strangers_do_not_push_out_a_publisher_with_a_token():
    with running(max_connections=1) as server, http_connection(server) as connection, \
            contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(dial(server))
            if _ % 20 == 0:
                assert exchange(connection, "POST", "/api/publish", message(), WRITER)[0] == 200
        assert exchange(connection, "POST", "/api/publish", message(), WRITER)[0] == 200


@pytest.mark.parametrize("field", [b"a:" + b" " * 16000 + b"\x01", b"a: " + b"b \t" * 5000 + b"\0",
                                   b"a" * 16000 + b" :", b"Host: " + b"a." * 7000])
def test_no_header_keeps_the_process_busy(server, caplog, field):
    with undisturbed(server, caplog):
        request = b"GET / HTTP/1.1\r\n" + field + b"\r\n\r\n"
        assert status_of(server, request) in (400, 426)


def test_a_server_that_never_served_can_be_stopped():
    server = philote.Server(philote.Settings(host="127.0.0.1", port=0))
    server.stop()
    assert server.socket.fileno() == -1


def test_without_threads_newcomers_are_refused_and_the_rest_goes_on(server, caplog):
    with undisturbed(server, caplog):
        # No system has room for such a stack: a thread cannot be started.
        size = threading.stack_size(1 << 46)
        try:
            assert [status_of(server, upgrade_request()) for _ in range(3)] in (
                [503] * 3, [503, 503, None], [503, None, 503])
        finally:
            threading.stack_size(size)
        assert len([r for r in caplog.records if "no more threads" in r.message]) == 1


def test_without_descriptors_newcomers_are_refused_and_nothing_spins(full):
    code = ("import resource, sys, philote, threading;"
            " resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40));"
            "s = philote.Server(philote.Settings("
            "secret=sys.argv[1], host='127.0.0.1', port=0)).__enter__();"
            "print(s.server_address[1], flush=True); sys.stdin.read()")
    process = subprocess.Popen(
        [sys.executable, "-c", code, SECRET], cwd=HERE, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server = type("Remote", (), {"server_address": ("127.0.0.1", int(process.stdout.readline()))})
    try:
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(RawClient(server, ["a"]))
            writer = stack.enter_context(RawClient(server, write=["a"]))
            others = [stack.enter_context(dial(server)) for _ in range(60)]
            assert others[-1].recv(12) in (b"HTTP/1.1 503", b"")
            used = sum(os.times()[2:4]) if not os.path.isdir("/proc") else cpu_of(process.pid)
            writer.publish("a", "still here")
            assert reader.receive()["data"] == "still here"
            end = time.monotonic() + 1
            wait_until(lambda: time.monotonic() > end)
            assert cpu_of(process.pid) - used < 0.5, "it spins"
        wait_until(lambda: status_of(
            server, upgrade_request(headers={"Authorization": GOOD})) == 101)
    finally:
        _, errors = process.communicate("")
    assert errors.count("no more descriptors") <= 1 and "Traceback" not in errors


def cpu_of(pid):
    """Seconds of processor time that a process has used."""
    if not os.path.isdir("/proc/self"):
        return 0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_stopped_peer_is_gone_within_its_heartbeats():
    with running(ping_interval=0.5) as server:
        code = ("import socket, sys, time;"
                " s = socket.create_connection(('127.0.0.1', int(sys.argv[1])));"
                "s.sendall(sys.argv[2].encode()); print(s.recv(99)[:12], flush=True);"
                " time.sleep(99)")
        request = upgrade_request(headers={"Authorization": GOOD}).decode()
        peer = subprocess.Popen([sys.executable, "-c", code, str(port_of(server)), request],
                                stdout=subprocess.PIPE)
        try:
            assert b"101" in peer.stdout.readline()
            os.kill(peer.pid, signal.SIGSTOP)
            wait_until(lambda: footprint(server)[:3] == (0, 0, 0))
        finally:
            peer.kill()
            peer.communicate()


# ------------------------------------------------------------------------------------------ the end

def test_stopping_writes_what_is_queued_and_closes_with_1001(caplog):
    with running() as server, contextlib.ExitStack() as stack:
        readers = [stack.enter_context(RawClient(server, ["a"])) for _ in range(20)]
        writer = stack.enter_context(RawClient(server, write=["a"]))
        for i in range(50):
            writer.publish("a", f"{i} " + "x" * 10_000)
        wait_until(lambda: server.statistics()[0]["published"] == 50)
        stop = threading.Thread(target=server.stop)
        stop.start()
        for reader in readers:
            assert [int(d.split()[0]) for d in reader.receive_data(50)] == list(range(50))
            assert reader.read_close() == 1001
            reader.close()
        writer.close()
        stop.join()
        assert footprint(server)[:3] == (0, 0, 0)


def test_stopping_loses_no_message_that_anybody_has_seen(full):
    """Stop under load: all subscribers that read see the same messages, to the last."""
    for _ in range(20 if full else 2):
        with running(max_message_rate=2000, shutdown_timeout=PATIENCE) as server, \
                contextlib.ExitStack() as stack:
            readers = [stack.enter_context(RawClient(server, ["a"])) for _ in range(4)]
            writers = [stack.enter_context(RawClient(server, write=["a"])) for _ in range(4)]

            def publish(writer, name):
                with contextlib.suppress(OSError):
                    for n in itertools.count():
                        writer.publish("a", f"{name} {n}")

            def read(client, into):
                with contextlib.suppress(OSError):
                    into.extend(json.loads(p)["data"] for o, p in iter(client.read_frame, None)
                                if o == 1)
                client.sock.shutdown(socket.SHUT_RDWR)

            seen = [[] for _ in readers]
            threads = [threading.Thread(target=read, args=pair) for pair in zip(
                (*readers, *writers), (*seen, *([] for _ in writers)))]
            threads += [threading.Thread(target=publish, args=(w, i))
                        for i, w in enumerate(writers)]
            for thread in threads:
                thread.start()
            wait_until(lambda: server.statistics()[0]["published"] > 9000, "9,000 messages")
            published = server.statistics()[0]["published"]
            server.stop()
            for thread in threads:
                thread.join()
            assert all(order == seen[0] for order in seen) and len(seen[0]) >= published


def test_a_stuck_client_holds_up_the_end_for_no_longer_than_allowed():
    with running(shutdown_timeout=1, max_queue_size=1 << 24) as server:
        with RawClient(server, ["a"], receive_buffer=4096), RawClient(server, ["a"]) as reader, \
                RawClient(server, write=["a"]) as writer:
            for _ in range(8):
                writer.publish("a", "x" * 1_000_000)
            wait_until(lambda: server.statistics()[0]["published"] == 8)
            stop = threading.Thread(target=server.stop)
            stop.start()
            assert ([len(d) for d in reader.receive_data(8)] == [1_000_000] * 8
                    and reader.read_close() == 1001)
            stop.join(PATIENCE)
            assert not stop.is_alive() and footprint(server)[:3] == (0, 0, 0)


# ------------------------------------------------------------------------------------------ fuzzing

def fuzz(examples):
    """Let hypothesis try so many examples, on a server that they share."""
    return hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=False, print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck))


@pytest.fixture(scope="module")
def fuzzed():
    """A server that many examples are thrown at; it must log no traceback and serve to the end."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    philote.log.addHandler(handler)
    with running(max_message_size=10_000) as server:
        yield server
        assert is_served(server)
    philote.log.removeHandler(handler)
    assert not [record for record in records if record.exc_info]


def until_closed(sock):
    """Read what comes until the server closes, which it must do within PATIENCE."""
    with contextlib.suppress(ConnectionError):
        while sock.recv(65536):
            pass


FRAMES = st.builds(
    frame, st.sampled_from([0, 1, 1, 1, 2, 8, 9, 10, 3, 15]), st.one_of(
        st.binary(max_size=130), st.text(max_size=60), st.just(message("a", "x")),
        st.just(message("no"))),
    fin=st.sampled_from([True, True, True, False]), rsv=st.sampled_from([0] * 9 + [4]),
    mask=st.sampled_from([b"\x37\xfa\x21\x3d"] * 9 + [b""]))


def check_bytes_behind_the_handshake(server, sent):
    with RawClient(server, write=["a"]) as client:
        with contextlib.suppress(OSError):
            client.send(sent)
            client.sock.shutdown(socket.SHUT_WR)
        until_closed(client.sock)


@hypothesis.given(st.one_of(st.binary(max_size=300), st.lists(FRAMES, max_size=12).map(b"".join)))
@fuzz(150)
def test_any_bytes_behind_the_handshake_do_no_harm(fuzzed, sent):
    check_bytes_behind_the_handshake(fuzzed, sent)


@pytest.mark.full
@hypothesis.given(st.one_of(st.binary(max_size=300), st.lists(FRAMES, max_size=12).map(b"".join)))
@fuzz(3000)
def test_any_bytes_behind_the_handshake_do_no_harm_in_full(fuzzed, sent):
    check_bytes_behind_the_handshake(fuzzed, sent)


LINES = st.one_of(
    st.binary(max_size=40), st.sampled_from([
        b"Host: x", b"Upgrade: websocket", b"Connection: upgrade", b"Sec-WebSocket-Version: 13",
        b"Content-Length: 5", b"Sec-WebSocket-Key: " + NONCE.encode(),
        b"Authorization: " + GOOD.encode(), b"Transfer-Encoding: chunked", b"Expect: 100-continue",
        b"Origin: null", b"", b"Connection: close", b"Content-Type: text/plain"]))
HANDSHAKES = st.one_of(st.binary(max_size=200), st.tuples(
    st.sampled_from([
        b"GET / HTTP/1.1", b"POST /api/publish HTTP/1.1", b"GET /metrics HTTP/1.0",
        b"GET /api/events?channel=a HTTP/1.1", b"OPTIONS * HTTP/1.1", b"HEAD /health HTTP/1.1",
        b"GET /?auth=%00%ff HTTP/1.1"]),
    st.lists(LINES, max_size=9), st.binary(max_size=20)).map(
        lambda t: b"\r\n".join([t[0], *t[1], b"", t[2]])))


def check_handshake(server, sent):
    with dial(server) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
        until_closed(sock)


@hypothesis.given(HANDSHAKES)
@fuzz(150)
def test_any_handshake_does_no_harm(fuzzed, sent):
    check_handshake(fuzzed, sent)


@pytest.mark.full
@hypothesis.given(HANDSHAKES)
@fuzz(3000)
def test_any_handshake_does_no_harm_in_full(fuzzed, sent):
    check_handshake(fuzzed, sent)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["channel", "data", "Channel", "DATA", "x"]), inner, max_size=4),
    max_leaves=6)


@hypothesis.given(JSON)
@fuzz(300)
def test_any_json_value_is_published_or_answered_with_an_error(fuzzed, value):
    with RawClient(fuzzed, ["a"], ["a"]) as client:
        client.send(frame(1, json.dumps(value)) + frame(9))
        opcode, payload = client.read_frame()
        if opcode == 1:
            assert json.loads(payload)["error"] in ("bad_message", "forbidden")
        else:
            assert opcode == 10 and value["channel" if "channel" in value else "Channel"] == "a"


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(["whole", "binary", "fragments"]), st.text(max_size=80)),
             min_size=1, max_size=8),
    st.lists(st.integers(1, 400), max_size=12))
@fuzz(150)
def test_any_split_of_a_valid_stream_gives_the_same_messages(fuzzed, messages, cuts):
    stream = b""
    for kind, data in messages:
        body = message("a", data).encode()
        stream += {"whole": frame(1, body), "binary": frame(2, body),
                   "fragments": frame(1, body[:9], fin=False) + frame(9) + frame(0, body[9:])}[kind]
    with RawClient(fuzzed, ["a"]) as reader, RawClient(fuzzed, write=["a"]) as writer:
        at = 0
        for cut in [*cuts, len(stream)]:
            writer.send(stream[at:at + cut])
            at += cut
        assert [reader.receive().get("data", "") for _ in messages] == [
            data for _, data in messages]


# -------------------------------------------------------------------------- clients of other people

@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost"])
def test_the_websockets_library_talks_to_it_over_ipv4_and_ipv6(address):
    with running(host="") as server:
        host = f"[{address}]" if ":" in address else address
        url = f"ws://{host}:{port_of(server)}/?auth={make_token(['a'], ['a'])}"
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
    with websockets.sync.client.connect(url) as client:
        threading.Thread(target=server.stop).start()
        with pytest.raises(websockets.exceptions.ConnectionClosed) as caught:
            client.recv(PATIENCE)
        assert caught.value.rcvd.code == 1001


# ------------------------------------------------------------------------------------------- client

def url_of(server, path=""):
    return f"ws://127.0.0.1:{port_of(server)}{path}"


def connect(server, read=(), write=()):
    return philote.Client(url_of(server), make_token(read, write))


@contextlib.contextmanager
def answering(*scripts):
    """A server made of a socket: each script, a function of (socket, file), has a connection."""
    failures = []

    def run(listener):
        for script in scripts:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # the test is over
            sock.settimeout(PATIENCE)
            with sock, sock.makefile("rb") as file, contextlib.suppress(ConnectionError):
                try:
                    script(sock, file)
                except AssertionError as failure:
                    failures.append(failure)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, args=(listener,))
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)
    assert not failures, failures


def accept_upgrade(file):
    """Read a client's opening handshake and make the answer to it."""
    head = b"".join(iter(file.readline, b"\r\n"))
    nonce = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)[1]
    accept = base64.b64encode(
        hashlib.sha1(nonce + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    return (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")


@contextlib.contextmanager
def deaf():
    """A server that upgrades one connection and then reads nothing."""
    over = threading.Event()

    def script(sock, file):
        sock.sendall(accept_upgrade(file))
        over.wait()

    with answering(script) as url:
        try:
            yield url
        finally:
            over.set()


def wait_until_it_stands_still(items):
    """Wait until a list has something, and has had no more than that a hundred times."""
    seen = collections.deque(maxlen=100)

    def stands_still():
        seen.append(len(items))
        return len(seen) == 100 and 0 < seen[0] == seen[-1]

    wait_until(stands_still)


def read_masked(file):
    """The next frame of a client, as (opcode, payload)."""
    first, second = file.read(2) or (0x88, 0x80)  # the end, without a close frame
    size = second & 0x7F
    if size > 125:
        size = int.from_bytes(file.read(2 if size == 126 else 8), "big")
    return first & 15, unmasked(file.read(4), file.read(size))


def answer_close(sock, file):
    """Read until the client's close frame, and answer it."""
    while (item := read_masked(file))[0] != 8:
        pass
    sock.sendall(plain(8, item[1]))


def unmasked(mask, payload):
    key = (mask * (len(payload) // 4 + 1))[:len(payload)]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(len(key), "big")


def plain(opcode, payload=b""):
    """A server's frame."""
    return frame(opcode, payload, mask=b"")


def trickle(sock, data):
    """Send each byte by itself."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for i in range(len(data)):
        sock.sendall(data[i:i + 1])


def send_in_parts(sock, *parts):
    """Send parts one by one; between them a client has the time to do something wrong."""
    for part in parts:
        sock.sendall(part)
        select.select([sock], [], [], 0.2)


def stamped(data, channel="a"):
    return json.dumps({"issuer": "someone", "channel": channel, "data": data})


def receive_all(client, count):
    """The data of the next messages, or less where nothing comes any more."""
    received = []
    while len(received) < count and (message := client.receive(PATIENCE)):
        received.append(message.data)
    return received


@contextlib.contextmanager
def threads(*targets):
    """Run functions in threads of their own; what they return is in the list that this gives."""
    results = [None] * len(targets)

    def run(i, target):
        try:
            results[i] = target()
        except philote.PhiloteError as error:
            results[i] = error

    running = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(targets)]
    for thread in running:
        thread.start()
    yield results
    for thread in running:
        thread.join(4 * PATIENCE)
        assert not thread.is_alive(), "a thread hangs"


def test_a_message_goes_from_client_to_client_and_not_back(server):
    with connect(server, ["a"], ["a"]) as one, connect(server, ["a"]) as two:
        assert one.publish("a", "hello") is None
        message = two.receive()
        assert isinstance(message, philote.Message)
        assert (message.channel, message.data) == ("a", "hello")
        assert uuid.UUID(message.issuer).version == 4
        assert one.receive(timeout=0.05) is None


@pytest.mark.parametrize("data", [
    "", "two\nlines", "h\u00e9 \u2028", "\U0001f600", "\0", '"\\', "\ud800", "x" * 70000,
], ids=ascii)
def test_any_text_goes_through(server, data):
    with connect(server, ["a"]) as reader, connect(server, write=["a"]) as writer:
        writer.publish("a", data)
        assert reader.receive(PATIENCE).data == data


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_receive_gives_none_where_nothing_came_in_time(server, timeout):
    with connect(server, ["a"]) as client:
        assert client.receive(timeout) is None
        assert client.receive(timeout=timeout) is None


def test_receive_without_a_timeout_waits(server):
    with connect(server, ["a"]) as reader, connect(server, write=["a"]) as writer:
        with threads(reader.receive) as results:
            assert writer.receive(0.3) is None  # a while
            writer.publish("a", "at last")
        assert results[0].data == "at last"


def test_iteration_gives_messages_until_close(server):
    got = []
    with connect(server, ["a"]) as reader, connect(server, write=["a"]) as writer:
        with threads(lambda: got.extend(iter(reader)) or "over") as results:
            for data in "one", "two", "three":
                writer.publish("a", data)
            wait_until(lambda: len(got) == 3)
            assert results == [None]
            reader.close()
    assert results == ["over"]
    assert [message.data for message in got] == ["one", "two", "three"]


def test_iteration_may_be_left_and_taken_up_again(server):
    with connect(server, ["a"]) as reader, connect(server, write=["a"]) as writer:
        for data in "one", "two", "three":
            writer.publish("a", data)
        assert next(iter(reader)).data == "one"
        assert next(iter(reader)).data == "two"
        assert reader.receive(PATIENCE).data == "three"


def test_what_came_before_the_close_is_still_received(server):
    with connect(server, ["a"]) as reader, connect(server, write=["a"]) as writer:
        writer.publish("a", "kept")
        writer.publish("a", "kept, too")
        assert reader.receive(PATIENCE).data == "kept"
        wait_until(lambda: server.statistics()[0]["delivered"] == 2)
        reader.close()
        assert [message.data for message in reader] == ["kept, too"]


def test_the_end_of_the_block_closes_the_connection(server):
    with connect(server, ["a"], ["a"]) as client:
        assert len(server.subscribers) == 1
    wait_until(lambda: not server.subscribers and not server.strangers)
    for call in client.receive, lambda: client.publish("a", "x"):
        with pytest.raises(philote.ConnectionClosed) as caught:
            call()
        assert caught.value.code == 1000
    client.close()


def test_close_returns_once_the_server_has_everything(server):
    client = connect(server, write=["a"])
    for _ in range(500):
        client.publish("a", "x" * 100)
    client.close()
    assert server.statistics()[0]["published"] == 500


def test_a_closed_client_leaves_no_thread_and_no_descriptor(server):
    threads_before = threading.active_count()
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()  # it would close what was forgotten
    try:
        clients = [connect(server, ["a"]) for _ in range(10)]
        for client in clients:
            client.close()
        for _ in range(10):
            with pytest.raises(philote.Unauthorized):
                philote.Client(url_of(server), "bad")
        wait_until(lambda: threading.active_count() <= threads_before)
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, f"{before} descriptors")
    finally:
        gc.enable()


def test_an_error_in_the_block_is_not_replaced_by_a_refusal(server):
    with pytest.raises(KeyError):
        with connect(server) as client:
            client.publish("secret", "x")
            raise KeyError


@pytest.mark.parametrize("path, token", [
    ("", GOOD), ("/", GOOD), ("/any/path?x=1", GOOD), ("/#fragment", GOOD),
    ("?auth=" + GOOD, ""), ("/x?auth=" + GOOD, ""),
])
def test_a_url_may_have_a_path_and_a_query(server, path, token):
    with philote.Client(url_of(server, path), token) as client:
        assert client.receive(0) is None


def test_the_client_speaks_ipv6():
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with running(host="::1") as server:
        with philote.Client(f"ws://[::1]:{port_of(server)}", GOOD) as client:
            assert client.receive(0) is None


@pytest.fixture
def without_gc():
    """Keep the garbage collector from closing what was forgotten."""
    gc.disable()
    yield
    gc.enable()


def test_a_client_whose_connection_broke_leaves_no_descriptor(without_gc):
    def script(sock, file):
        sock.sendall(accept_upgrade(file))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with answering(*[script] * 10) as url:
        before = len(os.listdir("/proc/self/fd"))
        clients = [philote.Client(url) for _ in range(10)]
        for client in clients:
            with pytest.raises(philote.ConnectionClosed):
                client.receive(PATIENCE)
            client.close()
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, f"{before} descriptors")


def test_a_refusal_whose_connection_stays_open_is_raised_at_once():
    def script(sock, file):
        accept_upgrade(file)
        sock.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>")
        assert file.read() == b"", "the client hangs up"

    with answering(script) as url, pytest.raises(philote.Unauthorized) as caught:
        philote.Client(url)
    assert caught.value.status == 502


def test_localhost_is_tried_at_each_of_its_addresses(server, monkeypatch):
    # Where localhost is ::1 first (as on most machines), and the server is on 127.0.0.1 alone.
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    look_up = socket.getaddrinfo

    def both(host, *arguments, **options):
        return [item for name in ("::1", "127.0.0.1") for item in look_up(
            name if host == "localhost" else host, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with philote.Client(f"ws://localhost:{port_of(server)}", GOOD) as client:
        assert client.receive(0) is None


# Refused by the server

NO_LIST = BAD_TOKENS['claims {"read": "abc"}']


@pytest.mark.parametrize("token", ["", "garbage", BAD, make_token(exp=5), NO_LIST])
def test_unauthorized_says_what_the_server_said(server, token):
    headers = {"Authorization": "Bearer " + token} if token else {}
    status, _, body = ask(server, upgrade_request(headers=headers))
    with pytest.raises(philote.Unauthorized) as caught:
        philote.Client(url_of(server), token)
    assert status == caught.value.status == 401
    assert json.loads(body)["reason"] in str(caught.value) and "401" in str(caught.value)
    assert not token or token not in str(caught.value)


def test_unauthorized_tells_that_the_server_is_full():
    with running(max_connections=1) as server, connect(server):
        with pytest.raises(philote.Unauthorized, match="all 1 connections are taken") as caught:
            connect(server)
        assert caught.value.status == 503


def test_the_reason_is_read_whole_however_it_comes():
    def script(sock, file):
        accept_upgrade(file)
        body = b'{"error": "unauthorized", "reason": "no, it said"}\n'
        head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: %d\r\n\r\n" % len(body)
        send_in_parts(sock, head, body[:20], body[20:])
        file.read()  # and leaves the connection open

    with answering(script) as url, pytest.raises(philote.Unauthorized, match="no, it said"):
        philote.Client(url)


@pytest.mark.parametrize("answer, status", [
    (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>", 502),
    (b"HTTP/1.1 301 Moved Permanently\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", 301),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", 200),
    (b"HTTP/1.1 404 Not Found\r\nContent-Length: 15\r\n\r\n{\"reason\": null}"[:-1], 404),
    (b"HTTP/1.1 401 Unauthorized\r\n\r\n", 401),
])
def test_any_other_answer_than_an_upgrade_is_unauthorized_with_its_status(answer, status):
    def script(sock, file):
        accept_upgrade(file)
        sock.sendall(answer)

    with answering(script) as url, pytest.raises(philote.Unauthorized) as caught:
        philote.Client(url)
    assert caught.value.status == status


@pytest.mark.parametrize("answer", [
    b"", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"\0\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: wrong\r\n\r\n", b"HTTP/1.1 999\r\n\r\n", b"HTTP/1.1 200 OK\r\n",
], ids=ascii)
def test_what_is_no_websocket_server_is_an_error_that_callers_expect(answer):
    def script(sock, file):
        accept_upgrade(file)
        sock.sendall(answer)

    with answering(script) as url, pytest.raises((philote.PhiloteError, OSError)):
        philote.Client(url)


def test_a_server_that_is_not_there_is_an_oserror():
    with pytest.raises(ConnectionRefusedError):
        philote.Client(f"ws://127.0.0.1:{free_port()}", GOOD)


@pytest.mark.parametrize("url", [
    "", "localhost:6380", "http://localhost", "https://localhost", "ws:", "ws://", "ws:///path",
    "wss://:6380", "ftp://localhost", "ws//localhost", "ws://localhost:port",
    "ws://localhost:99999", "ws://[::1",
], ids=ascii)
def test_a_bad_url_is_named(url):
    with pytest.raises(philote.PhiloteError) as caught:
        philote.Client(url, GOOD)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("host", ["a..b", "a" * 70, "local host", "nowhere.invalid"])
def test_a_host_that_cannot_be_is_an_error_that_callers_expect(host):
    with pytest.raises((philote.PhiloteError, OSError)):
        philote.Client(f"ws://{host}:{free_port()}", GOOD)


@pytest.mark.parametrize("path", ["/a b", "/\u00e9", "/?x=\0"], ids=ascii)
def test_a_path_that_cannot_be_is_an_error_that_callers_expect(server, path):
    with pytest.raises((philote.PhiloteError, OSError)):
        philote.Client(url_of(server, path), GOOD)


@pytest.mark.parametrize("token", ["two\nlines", "\u00e9", "a\0b", "\ud800", " "], ids=ascii)
def test_a_token_that_fits_in_no_header_is_refused(server, token):
    with pytest.raises(philote.PhiloteError) as caught:
        philote.Client(url_of(server), token)
    assert token == " " or token not in str(caught.value)


# Refused messages

def test_forbidden_is_raised_by_receive(server):
    with connect(server, ["a"], ["a"]) as client, connect(server, write=["a"]) as other:
        client.publish("secret", "x")
        with pytest.raises(philote.Forbidden, match='may not write the channel "secret"'):
            client.receive()
        other.publish("a", "still connected")
        assert client.receive(PATIENCE).data == "still connected"


def test_forbidden_is_raised_by_the_next_publish(server):
    def refused():
        try:
            client.publish("a", "x")
        except philote.Forbidden as error:
            return '"secret"' in str(error)

    with connect(server, write=["a"]) as client:
        client.publish("secret", "x")
        wait_until(refused)
        client.publish("a", "x")


def test_forbidden_is_raised_by_iteration(server):
    with connect(server, ["a"]) as client:
        client.publish("secret", "x")
        with pytest.raises(philote.Forbidden):
            next(iter(client))


def test_forbidden_is_raised_by_close(server):
    client = connect(server)
    client.publish("secret", "x")
    with pytest.raises(philote.Forbidden, match='"secret"'):
        client.close()
    wait_until(lambda: not server.subscribers)


def test_forbidden_is_raised_by_the_end_of_the_block(server):
    with pytest.raises(philote.Forbidden, match='"secret"'):
        with connect(server, write=["a"]) as client:
            client.publish("secret", "x")
            client.publish("a", "x")
    wait_until(lambda: not server.subscribers)
    assert server.statistics()[0]["published"] == 1


def test_each_refused_message_is_raised_once(server):
    with connect(server, ["a"]) as client:
        client.publish("secret", "x")
        with pytest.raises(philote.Forbidden):
            client.receive()
        assert client.receive(0.05) is None


def test_a_malformed_message_is_refused_with_the_servers_reason(server):
    with connect(server, ["a"]) as client:
        client.publish("", "x")
        with pytest.raises(philote.Forbidden, match="channel must be a string"):
            client.receive()


def test_all_errors_are_philote_errors():
    for error in philote.Unauthorized, philote.Forbidden, philote.ConnectionClosed:
        assert issubclass(error, philote.PhiloteError)


def test_a_ping_that_crosses_our_close_loses_no_refusal():
    def script(sock, file):
        sock.sendall(accept_upgrade(file))
        assert read_masked(file)[0] == 1
        assert read_masked(file) == (8, struct.pack("!H", 1000))
        send_in_parts(sock, plain(9), plain(1, '{"error": "forbidden", "reason": "no"}'),
                      plain(8, struct.pack("!H", 1000)))

    with answering(script) as url:
        client = philote.Client(url)
        client.publish("secret", "x")
        with pytest.raises(philote.Forbidden):
            client.close()


# The end of a connection

def test_a_server_that_stops_closes_with_1001():
    with running() as server:
        client = connect(server, ["a"], ["a"])
    for call in client.receive, lambda: client.publish("a", "x"), lambda: next(iter(client)):
        with pytest.raises(philote.ConnectionClosed, match="1001.*shutting down") as caught:
            call()
        assert caught.value.code == 1001
    client.close()


def test_what_came_before_the_servers_end_is_received_first():
    with running() as server:
        reader = connect(server, ["a"])
        with connect(server, write=["a"]) as writer:
            writer.publish("a", "one")
            writer.publish("a", "two")
    assert receive_all(reader, 2) == ["one", "two"]
    with pytest.raises(philote.ConnectionClosed):
        reader.receive()


@pytest.mark.parametrize("linger", [struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)],
                         ids=["RST", "FIN"])
def test_a_connection_that_breaks_is_closed_with_1006(linger):
    def script(sock, file):
        sock.sendall(accept_upgrade(file) + plain(1, stamped("x")))
        read_masked(file)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with answering(script) as url, philote.Client(url) as client:
        assert client.receive(PATIENCE).data == "x"
        client.publish("a", "x")
        for call in client.receive, lambda: client.publish("a", "x"):
            with pytest.raises(philote.ConnectionClosed) as caught:
                call()
            assert caught.value.code == 1006


def test_a_message_that_is_too_big_closes_with_1009():
    with running(max_message_size=1000) as server, connect(server, ["a"], ["a"]) as client:
        client.publish("a", "x" * 1000)
        with pytest.raises(philote.ConnectionClosed) as caught:
            client.receive()
        assert caught.value.code == 1009


def test_a_far_too_big_message_closes_with_1009(server):
    with connect(server, ["a"], ["a"]) as client:
        with pytest.raises(philote.ConnectionClosed) as caught:
            client.publish("a", "x" * (20 << 20))
            client.receive()
        assert caught.value.code == 1009


def test_a_token_that_expires_closes_with_4401(server):
    client = philote.Client(url_of(server), make_token(["a"], exp=time.time() + 1.2))
    with pytest.raises(philote.ConnectionClosed, match="token expired") as caught:
        client.receive(PATIENCE)
    assert caught.value.code == 4401


def test_a_server_that_is_killed_in_the_middle_ends_both_threads():
    with serving() as server, connect(server, ["a"], ["b"]) as client, \
            connect(server, ["b"], ["a"]) as other:
        def publish(client, channel):
            while True:
                client.publish(channel, "x" * 1000)

        with threads(lambda: publish(client, "b"), lambda: collections.deque(client, 0),
                     lambda: publish(other, "a")) as results:
            for _ in range(20):
                assert other.receive(PATIENCE)
            server.process.kill()
        assert [result.code for result in results] == [1006] * 3


def test_a_server_that_stops_in_the_middle_of_many_publishers_closes_each_with_1001():
    def publish(client):
        while True:
            client.publish("a", "x")

    for _ in range(5):
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(running())
            clients = [stack.enter_context(connect(server, ["a"], ["a"])) for _ in range(4)]
            with threads(*[lambda client=client: publish(client) for client in clients]) as results:
                wait_until(lambda: server.statistics()[0]["published"] > 100)
                server.stop()
            assert [getattr(result, "code", result) for result in results] == [1001] * 4


def test_close_ends_the_publishing_of_other_threads_with_1000(server, restless):
    def publish(client):
        while True:
            client.publish("a", "x")

    for _ in range(5):
        with connect(server, ["a"], ["a"]) as one, connect(server, ["a"], ["a"]) as two:
            before = server.statistics()[0]["published"]
            with threads(*[lambda: publish(one), lambda: publish(two)] * 2) as results:
                wait_until(lambda: server.statistics()[0]["published"] > before + 100)
                one.close()
                two.close()
            assert [getattr(result, "code", result) for result in results] == [1000] * 4


def test_close_ends_a_connection_whose_server_reads_nothing():
    def publish():
        while True:
            client.publish("a", "x" * 100_000)
            published.append(1)

    published = []
    with deaf() as url:
        client = philote.Client(url)
        with threads(publish) as results:
            wait_until_it_stands_still(published)
            with threads(client.close):
                pass
    assert isinstance(results[0], philote.ConnectionClosed)


def test_close_leaves_a_server_that_does_not_answer_it():
    with deaf() as url:
        client = philote.Client(url)
        with threads(client.close):
            pass


# Many messages, large ones, and several threads

def test_two_threads_exchange_10000_messages_both_ways_in_order():
    expected = [f"message {i}" for i in range(10_000)]

    def publish(client, channel):
        for data in expected:
            client.publish(channel, data)

    with running(max_queue_size=1 << 26) as server, connect(server, ["a"], ["b"]) as one, \
            connect(server, ["b"], ["a"]) as two:
        with threads(lambda: receive_all(one, 10_000), lambda: receive_all(two, 10_000),
                     lambda: publish(one, "b"), lambda: publish(two, "a")) as results:
            pass
        assert results == [expected, expected, None, None]


@pytest.mark.parametrize("count, sizes", [
    (5, [10, 5_000_000, 100, 70_000, 1000]), (1000, [1, 10, 20, 30])], ids=["large", "small"])
def test_threads_that_share_a_client_tear_no_frame(restless, count, sizes):
    def expected(name):
        return [f"{name} {i} " + name * sizes[i % len(sizes)] for i in range(count)]

    def publish(name):
        for data in expected(name):
            writer.publish("a", data)

    with running(max_message_size=1 << 26, max_queue_size=1 << 28) as server, \
            connect(server, ["a"]) as reader, connect(server, write=["a"]) as writer:
        with threads(*[lambda name=name: publish(name) for name in "ABCD"]) as results:
            received = receive_all(reader, 4 * count)
        assert results == [None] * 4
        for name in "ABCD":
            assert [data for data in received if data[0] == name] == expected(name)


def test_the_answers_to_pings_tear_no_frame():
    def script(sock, file):
        sock.sendall(accept_upgrade(file))
        head, parts = file.read(14), []  # the message is too large to be sent at once
        assert head[:2] == b"\x81\xff"
        size = int.from_bytes(head[2:10], "big")
        for at in range(0, size, 100_000):
            sock.sendall(plain(9, b"?"))
            parts.append(file.read(min(100_000, size - at)))
        assert json.loads(unmasked(head[10:], b"".join(parts)))["data"] == "x" * 10_000_000
        assert {read_masked(file) for _ in parts} == {(10, b"?")}
        done.append(True)
        answer_close(sock, file)

    done = []
    with answering(script) as url, philote.Client(url) as client:
        client.publish("a", "x" * 10_000_000)
        wait_until(lambda: done)


def test_a_message_of_exactly_the_limit_goes_through_in_both_directions(server):
    limit = server.settings.max_message_size
    data = "x" * (limit - len(json.dumps({"channel": "a", "data": ""})))
    with connect(server, ["a"], ["b"]) as one, connect(server, ["b"], ["a"]) as two:
        for _ in range(3):
            two.publish("a", data)
            assert one.receive(PATIENCE).data == data
            one.publish("b", data)
            assert two.receive(PATIENCE).data == data
        two.publish("a", data + "x")
        with pytest.raises(philote.ConnectionClosed, match="1009"):
            two.receive(PATIENCE)


def test_a_large_message_of_every_character_is_put_together_right(server):
    data = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x18000)]))
    assert len(json.dumps(data)) < server.settings.max_message_size
    with connect(server, ["a"]) as reader, connect(server, write=["a"]) as writer:
        writer.publish("a", data)
        assert reader.receive(PATIENCE).data == data


@pytest.mark.parametrize("fragments", [1, 2, 50])
def test_a_message_in_fragments_is_received(fragments):
    data = stamped("h\u00e9" * 1000).encode()
    cuts = [len(data) * i // fragments for i in range(fragments + 1)]

    def script(sock, file):
        sock.sendall(accept_upgrade(file))
        for i, (start, end) in enumerate(zip(cuts, cuts[1:])):
            sock.sendall(frame(0 if i else 1, data[start:end], fin=end == len(data), mask=b""))
        answer_close(sock, file)

    with answering(script) as url, philote.Client(url) as client:
        assert client.receive(PATIENCE).data == "h\u00e9" * 1000


def test_a_message_in_the_packet_of_the_handshake_is_received_at_once():
    def script(sock, file):
        frames = [plain(1, stamped(data)) for data in ("first", "second")]
        sock.sendall(accept_upgrade(file) + b"".join(frames))
        answer_close(sock, file)

    with answering(script) as url, philote.Client(url) as client:
        assert receive_all(client, 2) == ["first", "second"]


def test_an_answer_that_drips_is_put_together():
    def script(sock, file):
        trickle(sock, accept_upgrade(file) + plain(1, stamped("x" * 200)))
        answer_close(sock, file)

    with answering(script) as url, philote.Client(url) as client:
        assert client.receive(PATIENCE).data == "x" * 200


def test_pings_are_answered_by_a_client_that_does_nothing():
    with running(ping_interval=0.1) as server, connect(server, ["a"]) as client, \
            connect(server, write=["a"]) as writer:
        assert client.receive(timeout=1) is None  # ten times as long as a ping waits for its pong
        assert len(server.subscribers) == 2
        writer.publish("a", "x")
        assert client.receive(PATIENCE).data == "x"


# TLS

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The paths of a certificate for localhost and of its key."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    paths = [str(tmp_path_factory.mktemp("tls") / name) for name in ("certificate.pem", "key.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-out", paths[0],
         "-keyout", paths[1], "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True)
    return paths


@contextlib.contextmanager
def behind_tls(server, certificate):
    """Run a proxy that takes TLS off, in a thread; gives its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    async def copy(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def handle(reader, writer):
        behind = await asyncio.open_connection("127.0.0.1", port_of(server))
        await asyncio.gather(copy(reader, behind[1]), copy(behind[0], writer))

    async def run():
        proxy = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
        started.append((proxy.sockets[0].getsockname()[1], asyncio.get_running_loop(),
                        over := asyncio.Event()))
        await over.wait()

    started = []
    with threads(lambda: asyncio.run(run())):
        wait_until(lambda: started)
        port, loop, over = started[0]
        try:
            yield f"wss://127.0.0.1:{port}"
        finally:
            loop.call_soon_threadsafe(over.set)


@pytest.mark.parametrize("count, size", [(1000, 3000), (150, 300_000), (3, 1_048_000)])
def test_messages_go_both_ways_at_once_through_tls(certificate, monkeypatch, count, size):
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    expected = [f"{i} " + "x" * size for i in range(count)]

    def publish(client, channel):
        for data in expected:
            client.publish(channel, data)

    with running(max_queue_size=1 << 30) as server, behind_tls(server, certificate) as url, \
            philote.Client(url, make_token(["a"], ["b"])) as one, \
            philote.Client(url, make_token(["b"], ["a"])) as two:
        with threads(lambda: receive_all(one, count), lambda: receive_all(two, count),
                     lambda: publish(one, "b"), lambda: publish(two, "a")) as results:
            pass
        assert results == [expected, expected, None, None]


def test_errors_are_the_same_through_tls(server, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    with behind_tls(server, certificate) as url:
        with pytest.raises(philote.Unauthorized, match="not signed with this server's secret"):
            philote.Client(url, BAD)
        with pytest.raises(philote.Forbidden), philote.Client(url, GOOD) as client:
            client.publish("secret", "x")
        client = philote.Client(url, GOOD)
        server.stop()
        with pytest.raises(philote.ConnectionClosed, match="1001"):
            client.receive(PATIENCE)


def test_a_certificate_of_nobody_is_refused(server, certificate):
    with behind_tls(server, certificate) as url, pytest.raises(ssl.SSLCertVerificationError):
        philote.Client(url, GOOD)


# Importing

def python(code, *options, **environ):
    return subprocess.run([sys.executable, *options, "-c", code], cwd=HERE, timeout=PATIENCE,
                          env=environment(**environ), capture_output=True, text=True)


def test_importing_starts_nothing_and_configures_nothing():
    code = """if True:
        import logging, os, signal, sys, threading
        def state():
            return (threading.active_count(), logging.root.handlers, logging.root.level,
                    logging.getLogger("philote").handlers, logging.getLogger("philote").level,
                    signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
                    threading.stack_size(), sys.getswitchinterval(),
                    signal.pthread_sigmask(signal.SIG_BLOCK, []), os.listdir("/proc/self/fd"))
        before = state()
        from philote import Client, new_token
        assert state() == before and before[:2] == (1, []), (before, state())"""
    done = python(code, PORT="bad", LOGLEVEL="bad", SECRET="-----BEGIN PUBLIC KEY-----",
                  PHILOTE_URL="bad")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_reads_no_environment():
    code = """if True:
        import importlib, os, philote  # and with it all that it imports
        class Spy(dict):
            def read(self, *arguments):
                print("read", arguments)
            __getitem__ = get = __contains__ = __iter__ = keys = items = values = copy = read
        os.environ = os.environb = Spy()
        importlib.reload(philote)"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_the_module_offers_is_there():
    assert {"Client", "Message", "PhiloteError", "new_token"} < set(philote.__all__)
    assert all(hasattr(philote, name) for name in philote.__all__)
    assert philote.Message._fields == ("issuer", "channel", "data")


# ------------------------------------------------------------------------------------- command line

SCRIPT = (sys.executable, "philote.py")
COMMANDS = ("serve", "token", "subscribe", "publish")


def environment(**environ):
    """An environment with nothing in it that could hide or cause something."""
    return {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **environ}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Command:
    """A command as a process. The lines that it says are collected while it runs."""

    def __init__(self, *arguments, launcher=SCRIPT, cwd=HERE, stdout=subprocess.PIPE, **environ):
        self.process = subprocess.Popen(
            [*launcher, *arguments], cwd=cwd, env=environment(**environ),
            stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE)
        self.out, self.err = [], []
        self.readers = [threading.Thread(target=self._read, args=item, daemon=True) for item in (
            (self.process.stdout, self.out), (self.process.stderr, self.err)) if item[0]]
        for reader in self.readers:
            reader.start()

    def _read(self, pipe, lines):
        with pipe:
            lines.extend(line.decode("utf-8", "replace") for line in iter(pipe.readline, b""))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join(PATIENCE)
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def say(self, text):
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def signal(self, number):
        self.process.send_signal(number)

    def status(self):
        """Wait for the end."""
        status = self.process.wait(PATIENCE)
        for reader in self.readers:
            reader.join(PATIENCE)
        return status

    def says(self, text):
        return any(text in line for line in list(self.err))


def run(*arguments, input="", launcher=SCRIPT, cwd=HERE, **environ):
    """Run a command to its end."""
    return subprocess.run([*launcher, *arguments], cwd=cwd, env=environment(**environ), text=True,
                          input=input, capture_output=True, timeout=PATIENCE)


@contextlib.contextmanager
def serving(launcher=SCRIPT, cwd=HERE, **environ):
    """Run `philote serve`; what this gives can be dialled like a server in this process."""
    environ = {"SECRET": SECRET, "HOST": "127.0.0.1", "PORT": "0", **environ}
    with Command("serve", launcher=launcher, cwd=cwd, **environ) as command:
        wait_until(lambda: command.says("listens on") or command.process.poll() is not None)
        found = re.search(r" port ([0-9]+)", "".join(command.err))
        assert found, command.err
        command.server_address = ("127.0.0.1", int(found[1]))
        yield command


def subscribing(server, *arguments, **options):
    """Run `philote subscribe` until it is connected (`server` is one in this process)."""
    before = len(server.registry)
    command = Command("subscribe", *arguments, "--url", url_of(server),
                      **{"SECRET": SECRET, **options})
    try:
        wait_until(lambda: len(server.registry) > before or command.process.poll() is not None)
    except BaseException:
        command.__exit__()
        raise
    return command


def claims_of(token):
    return jwt.decode(token, SECRET, algorithms=["HS256"], options={"verify_exp": False})


def is_one_line(text):
    return text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text


# Every command

def test_version_is_that_of_the_module():
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"philote {philote.__version__}\n"


def test_the_help_names_every_command_and_shows_an_example():
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "example" in done.stdout and "philote publish news" in done.stdout
    assert all(re.search(rf"(?m)^ +{name}\b", done.stdout) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_shows_an_example(name):
    done = run(name, "--help", PHILOTE_TOKEN="hush", SECRET="hush")
    assert (done.returncode, done.stderr) == (0, "") and "hush" not in done.stdout
    assert re.search(rf"(?s)example:\n.*philote {name}\b", done.stdout)


def test_the_help_of_serve_lists_every_setting():
    text = run("serve", "--help").stdout
    for name in ("SECRET", "HOST", "PORT", "LOGLEVEL", "MAX_CONNECTIONS", "MAX_MESSAGE_SIZE",
                 "MAX_QUEUE_SIZE", "MAX_MESSAGE_RATE", "READ_BUFFER_SIZE", "WRITE_BUFFER_SIZE",
                 "CHECK_ORIGIN", "PING_INTERVAL", "SHUTDOWN_TIMEOUT"):
        assert re.search(rf"(?m)^ +{name} +\w", text), name


@pytest.mark.parametrize("arguments", [
    ["bogus"], ["--bogus"], ["serve", "extra"], ["serve", "--port", "1"], ["subscribe"],
    ["publish"],
    ["publish", "a", "b", "c"], ["subscribe", "a", "--count"], ["subscribe", "a", "--count", "x"],
    ["subscribe", "a", "--count", "0"], ["subscribe", "a", "--count", "-1"], ["token", "extra"],
    ["token", "--check"], ["token", "--expires", "soon"], ["token", "--expires", "1.5h"],
    ["token", "--expires", ""], ["token", "--expires", "1y"], ["token", "--expires", "-1h"],
    ["token", "--expires", "\u0661h"], ["token", "--read"], ["publish", "a", "b", "--url"],
    ["publish", "a", "b", "--url", "http://localhost"], ["subscribe", "a", "--url", "localhost"],
    ["subscribe", "a", "--url", "ws://localhost:99999"],
    ["publish", "a", "b", "--url", "ws://[::1"],
], ids=" ".join)
def test_bad_arguments_are_answered_with_one_line_and_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert is_one_line(done.stderr) and done.stderr.startswith("philote")


@pytest.mark.parametrize("command", [["publish", "a", "b"], ["subscribe", "a"]], ids=" ".join)
def test_a_bad_url_in_the_environment_is_answered_with_one_line_and_2(command):
    done = run(*command, PHILOTE_URL="http://localhost")
    assert (done.returncode, done.stdout) == (2, "")
    assert is_one_line(done.stderr) and "'http://localhost'" in done.stderr


@pytest.mark.parametrize("command", [["publish", "a", "b"], ["subscribe", "a"]], ids=" ".join)
@pytest.mark.parametrize("token", ["two\nlines", "\u00e9"], ids=ascii)
def test_a_token_that_fits_in_no_header_is_answered_with_one_line(server, command, token):
    done = run(*command, "--url", url_of(server), "--token", token)
    assert done.returncode in (1, 2) and is_one_line(done.stderr) and token not in done.stderr


@pytest.mark.parametrize("command", [["publish", "a", "b"], ["subscribe", "a"], ["token"]],
                         ids=" ".join)
def test_a_secret_that_is_a_public_key_is_answered_as_a_bad_setting(server, command):
    environ = {"SECRET": "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----"}
    done = run(*command, PHILOTE_URL=url_of(server), **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert is_one_line(done.stderr) and "SECRET" in done.stderr and "MIIB" not in done.stderr


@pytest.mark.parametrize("options", [["-S", "-E"], ["-S", "-I"]], ids=" ".join)
def test_without_the_packages_one_line_says_what_to_install(options):
    done = run("serve", launcher=(sys.executable, *options, "philote.py"))
    assert (done.returncode, done.stdout) == (1, "") and is_one_line(done.stderr)
    assert "pip install simple-websocket PyJWT" in done.stderr


@pytest.mark.parametrize("name", ["jwt", "simple_websocket", "wsproto"])
def test_the_package_that_is_missing_is_named(tmp_path, name):
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('none', name={name!r})")
    done = run("--version", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "") and is_one_line(done.stderr)
    assert f"{name} is missing" in done.stderr and "pip install" in done.stderr


def test_without_the_packages_importing_raises_importerror():
    done = python("import sys; sys.path.insert(0, '.')\ntry: import philote\n"
                  "except ImportError: print('caught')", "-S", "-E")
    assert (done.returncode, done.stdout) == (0, "caught\n")


# philote serve

@pytest.mark.parametrize("words", [[], ["serve"]], ids=["philote", "philote serve"])
def test_the_first_line_says_what_runs_where_and_with_which_settings(words):
    with Command(*words, HOST="127.0.0.1", PORT="0", SECRET=SECRET, MAX_CONNECTIONS="7",
                 CHECK_ORIGIN="https://a.example") as command:
        wait_until(lambda: command.says("listens on"))
        command.signal(signal.SIGTERM)
        assert command.status() == 0 and command.out == []
    assert re.match(
        r"[0-9]{4}-[0-9-]+T[0-9:.]+Z INFO philote " + re.escape(philote.__version__)
        + r" on Python 3\.\S+ listens on 127\.0\.0\.1 port [1-9][0-9]*: .*MAX_CONNECTIONS=7 .*"
        r"https://a\.example.*SECRET set", command.err[0])
    assert not command.says("WARNING") and not command.says(SECRET)


@pytest.mark.parametrize("secret, expected", [
    (None, "SECRET is empty"), ("", "SECRET is empty"), ("s3cr3t-of-9", "SECRET has 11 characters"),
    ("x" * 31, "SECRET has 31"), ("x" * 32, None),
])
def test_a_weak_secret_is_warned_of(secret, expected):
    environ = {} if secret is None else {"SECRET": secret}
    with Command("serve", HOST="127.0.0.1", PORT="0", **environ) as command:
        wait_until(lambda: command.says("listens on"))
        command.signal(signal.SIGTERM)
        assert command.status() == 0, command.err
    warnings = [line for line in command.err if "WARNING" in line]
    assert len(warnings) == bool(expected) and (not expected or expected in warnings[0])
    assert not secret or not command.says(secret)


def test_without_a_host_it_serves_ipv4_and_ipv6():
    with serving(HOST="") as server:
        addresses = ["127.0.0.1"] + ["[::1]"] * socket.has_dualstack_ipv6()
        for address in addresses:
            philote.Client(f"ws://{address}:{port_of(server)}", GOOD).close()


def test_bad_settings_are_reported_together_with_2():
    done = run("serve", PORT="x", LOGLEVEL="loud", MAX_CONNECTIONS="0", READ_BUFFER_SIZE="1k",
               WRITE_BUFFER_SIZE="", CHECK_ORIGIN="maybe", SHUTDOWN_TIMEOUT="-1", HOST="fine")
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert sorted(line.partition(":")[0] for line in done.stderr.splitlines()) == [
        "CHECK_ORIGIN", "LOGLEVEL", "MAX_CONNECTIONS", "PORT", "READ_BUFFER_SIZE",
        "SHUTDOWN_TIMEOUT", "WRITE_BUFFER_SIZE"]
    assert all("it takes" in line for line in done.stderr.splitlines())


def test_a_port_that_is_taken_is_one_line_and_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", HOST="127.0.0.1", PORT=str(port), SECRET=SECRET)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_line(done.stderr) and str(port) in done.stderr


@pytest.mark.parametrize("host", ["203.0.113.1", "256.0.0.0.1", "a..b", "a" * 70, "::g"])
def test_a_host_that_is_not_this_machine_is_one_line_and_1(host):
    done = run("serve", HOST=host, PORT="0", SECRET=SECRET)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_line(done.stderr) and host in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_the_clients_with_1001(number):
    with serving() as server, RawClient(server, ["a"]) as reader, \
            RawClient(server, write=["a"]) as writer, \
            philote.Client(url_of(server), GOOD) as client:
        writer.publish("a", "before")
        assert reader.receive()["data"] == "before"
        server.signal(number)
        assert reader.read_close() == 1001
        reader.send(frame(8, struct.pack("!H", 1001)))
        with pytest.raises(philote.ConnectionClosed, match="1001"):
            receive_all(client, 2)
        writer.close()
        assert server.status() == 0
    assert server.says(number.name) and not server.says("Traceback")


@pytest.mark.parametrize("first, second", [
    (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_it_at_once(first, second):
    with serving(SHUTDOWN_TIMEOUT="3600") as server, RawClient(server):  # which answers no close
        server.signal(first)
        wait_until(lambda: server.says("shutting down"))
        assert server.process.poll() is None
        server.signal(second)
        assert server.status() == 1


def test_a_client_that_is_stuck_holds_the_end_up_for_the_timeout_only():
    with serving(SHUTDOWN_TIMEOUT="0.3") as server, RawClient(server, ["a"]):
        server.signal(signal.SIGTERM)
        assert server.status() == 0


def test_it_starts_again_on_the_same_port_at_once():
    with serving() as server:
        port = port_of(server)
        with RawClient(server):
            server.signal(signal.SIGTERM)
            assert server.status() == 0
    for _ in range(2):
        with serving(PORT=str(port)) as server, RawClient(server):
            server.process.kill()
            server.status()


# philote token

@pytest.mark.parametrize("arguments, expected", [
    ([], {"read": [], "write": []}),
    (["--read", "a,b", "--write", "b"], {"read": ["a", "b"], "write": ["b"]}),
    (["--write", "c d,\u00e9"], {"read": [], "write": ["c d", "\u00e9"]}),
    (["--read", "a", "--api"], {"read": ["a"], "write": [], "api": True}),
])
def test_a_token_is_all_that_is_printed(arguments, expected):
    done = run("token", *arguments, SECRET=SECRET)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", done.stdout)
    assert claims_of(done.stdout.strip()) == expected


@pytest.mark.parametrize("text, seconds", [
    ("90s", 90), ("15m", 900), ("1h", 3600), ("7d", 604800), ("60", 60), ("0", 0)])
def test_a_token_expires_when_it_was_said(text, seconds):
    before = time.time()
    token = run("token", "--expires", text, SECRET=SECRET).stdout.strip()
    assert before + seconds <= claims_of(token)["exp"] <= time.time() + seconds + 1


def test_a_token_of_the_command_opens_the_server(server):
    token = run("token", "--read", "a", "--write", "a", "--expires", "1h", SECRET=SECRET).stdout
    with RawClient(server, token=token.strip()) as one, RawClient(server, ["a"]) as two:
        one.publish("a", "x")
        assert two.receive()["data"] == "x"


def test_a_token_of_the_empty_secret_opens_the_open_server():
    with running(secret="") as server:
        RawClient(server, token=run("token", "--read", "a").stdout.strip()).close()


@pytest.mark.parametrize("claims, expected", [
    ({"read": ["b", "a"]}, "valid for ever; read: a, b; write: nothing; api: no"),
    ({"write": ["c"], "api": True}, "valid for ever; read: nothing; write: c; api: yes"),
    ({"exp": 4102444800}, "valid until 2100-01-01 00:00:00 UTC; read: nothing; write: nothing"),
    ({"exp": 4102444800.5}, "valid until 2100-01-01 00:00:00 UTC"),
    ({"exp": 2 ** 40}, "valid until"), ({"exp": 10 ** 18}, "valid "), ({"exp": 1e300}, "valid "),
])
def test_check_says_what_a_token_allows_and_until_when(server, claims, expected):
    token = make_token(**claims)
    done = run("token", "--check", token, SECRET=SECRET)
    assert (done.returncode, done.stderr) == (0, "") and is_one_line(done.stdout)
    assert done.stdout.startswith(expected)
    RawClient(server, token=token).close()  # the server says the same


@pytest.mark.parametrize("token, reason", [
    (BAD, "not signed with this server's secret"), (make_token(exp=5), "has expired"),
    (make_token(nbf=2 ** 40), "not valid yet"), ("garbage", "malformed"), ("", "malformed"),
    (NO_LIST, "claim read must be a list"), ("a" * 9000, "longer than"),
    (make_token(iat=True), "iat must be a number"), ("\u00e9", "malformed"),
], ids=["another secret", "expired", "early", "garbage", "empty", "claim", "long", "type", "odd"])
def test_check_says_why_a_token_is_refused_with_1(token, reason):
    done = run("token", "--check", token, SECRET=SECRET)
    assert (done.returncode, done.stderr) == (1, "") and is_one_line(done.stdout)
    assert done.stdout.startswith("refused: ") and reason in done.stdout
    assert not token or token not in done.stdout


@pytest.mark.parametrize("input, status", [
    (GOOD + "\n", 0), (GOOD, 0), (f"  {GOOD} \r\n", 0), (BAD + "\n", 1), ("", 1), ("\n", 1),
    ("a\0b\n", 1)], ids=["line", "no line", "spaces", "bad", "nothing", "empty", "NUL"])
def test_check_reads_a_token_from_standard_input(input, status):
    done = run("token", "--check", "-", input=input, SECRET=SECRET)
    assert (done.returncode, done.stderr) == (status, "") and is_one_line(done.stdout)
    assert done.stdout.startswith("refused" if status else "valid for ever; read: a;")


# philote subscribe

def test_subscribe_prints_each_message_as_it_comes(server):
    with subscribing(server, "a") as command, connect(server, write=["a"]) as writer:
        for i, data in enumerate(["one", "", "h\u00e9 \U0001f600"]):
            writer.publish("a", data)
            wait_until(lambda: command.out[i:] == [data + "\n"], "a line that is flushed")
        assert command.process.poll() is None and command.err == []


def test_subscribe_prints_json(server):
    with subscribing(server, "a", "--json") as command, connect(server, write=["a"]) as writer:
        for data in "two\nlines", "", "\ud800":
            writer.publish("a", data)
        wait_until(lambda: len(command.out) == 3)
    received = [json.loads(line) for line in command.out]
    assert [item["data"] for item in received] == ["two\nlines", "", "\ud800"]
    assert all(item["channel"] == "a" and uuid.UUID(item["issuer"]) for item in received)


@pytest.mark.parametrize("data", ["two\nlines", "carriage\rreturn\x85\u2028\0"], ids=ascii)
def test_subscribe_prints_one_line_per_message_whatever_is_in_it(server, data):
    with subscribing(server, "a", "--count", "2") as command, \
            connect(server, write=["a"]) as writer:
        writer.publish("a", data)
        writer.publish("a", "next")
        assert command.status() == 0, command.err
    assert len(command.out) == 2 and command.out[1] == "next\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("data", ["\ud800", "\u20ac", "\udcff"], ids=ascii)
def test_subscribe_survives_what_it_cannot_print(server, data, encoding):
    with subscribing(server, "a", "--count", "2", PYTHONIOENCODING=encoding) as command, \
            connect(server, write=["a"]) as writer:
        writer.publish("a", data)
        writer.publish("a", "next")
        assert command.status() == 0 and command.err == []
    assert len(command.out) == 2 and command.out[1] == "next\n"


@pytest.mark.parametrize("count", [1, 3])
def test_subscribe_ends_after_count_messages(server, count):
    with subscribing(server, "a", "--count", str(count)) as command, \
            connect(server, write=["a"]) as writer:
        for i in range(5):
            writer.publish("a", str(i))
        assert command.status() == 0, command.err
    assert command.out == [f"{i}\n" for i in range(count)] and command.err == []
    wait_until(lambda: not server.subscribers)


def test_subscribe_takes_several_channels_and_no_others(server):
    token = make_token(["a", "b", "c"])
    with subscribing(server, "a", "b", "--count", "2", "--token", token) as command, \
            connect(server, write=["a", "b", "c"]) as writer:
        wait_until(lambda: len(server.registry) == 3)
        for channel in "c", "a", "c", "b":
            writer.publish(channel, "in " + channel)
        assert command.status() == 0, command.err
    assert command.out == ["in a\n", "in b\n"]


def test_subscribe_prints_in_order(server):
    with subscribing(server, "a", "--count", "2000") as command, \
            connect(server, write=["a"]) as writer:
        for i in range(2000):
            writer.publish("a", str(i))
        assert command.status() == 0, command.err
    assert command.out == [f"{i}\n" for i in range(2000)]


def test_subscribe_comes_back_with_growing_pauses_and_says_so():
    with running() as server, subscribing(server, "a") as command:
        port = port_of(server)
        server.stop()
        wait_until(lambda: len(command.err) == 3)
        pauses = [float(re.search("again in ([0-9.]+) seconds", line)[1]) for line in command.err]
        assert pauses[0] < pauses[1] < pauses[2] and "1001" in command.err[0]
        with running(port=port) as server:
            wait_until(lambda: len(server.registry) == 1)
            with connect(server, write=["a"]) as writer:
                writer.publish("a", "back again")
            wait_until(lambda: command.out == ["back again\n"])
        wait_until(lambda: len(command.err) > 3)
        said = [line for line in command.err if "1001" in line]
        wait_until(lambda: len([line for line in command.err if "1001" in line]) == 2)
        assert f"in {pauses[0]:g} seconds" in said[-1], "the pauses start anew"
        assert command.process.poll() is None


@pytest.mark.parametrize("code", [1000, 1012])
def test_subscribe_comes_back_whatever_the_server_closes_with_and_says_so(code):
    def close(sock, file):
        sock.sendall(accept_upgrade(file) + plain(8, struct.pack("!H", code)))

    def work(sock, file):
        sock.sendall(accept_upgrade(file) + plain(1, stamped("here")))
        answer_close(sock, file)

    with answering(close, work) as url, \
            Command("subscribe", "a", "--count", "1", "--url", url) as command:
        assert command.status() == 0 and command.out == ["here\n"]
        assert len(command.err) == 1 and f"closed with {code}" in command.err[0]


def test_subscribe_waits_for_a_server_that_is_not_there_yet():
    port = free_port()
    with Command("subscribe", "a", "--url", f"ws://127.0.0.1:{port}", SECRET=SECRET) as command:
        wait_until(lambda: command.says("trying again"))
        with running(port=port) as server:
            wait_until(lambda: len(server.registry) == 1)
            assert command.process.poll() is None and command.out == []


def test_subscribe_comes_back_where_the_server_is_full_for_a_while():
    with running(max_connections=1) as server:
        with connect(server), Command("subscribe", "a", "--url", url_of(server),
                                      SECRET=SECRET) as command:
            wait_until(lambda: command.says("connections are taken") and command.err)
            assert command.says("trying again"), command.err


@pytest.mark.parametrize("answer", [b"502 Bad Gateway", b"503 Service Unavailable"])
def test_subscribe_comes_back_where_the_proxy_has_no_server_for_a_while(answer):
    def fail(sock, file):
        accept_upgrade(file)
        sock.sendall(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % answer)

    def work(sock, file):
        sock.sendall(accept_upgrade(file) + plain(1, stamped("here")))
        answer_close(sock, file)

    with answering(fail, work) as url, \
            Command("subscribe", "a", "--count", "1", "--url", url) as command:
        assert command.status() == 0, command.err
        assert command.out == ["here\n"] and command.says("trying again")


def test_subscribe_ends_with_1_where_its_token_is_refused(server):
    done = run("subscribe", "a", "--url", url_of(server), "--token", BAD)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_line(done.stderr) and "not signed with this server's secret" in done.stderr


def test_subscribe_ends_with_1_when_its_token_has_expired(server):
    token = make_token(["a"], exp=time.time() + 2)
    with subscribing(server, "a", "--token", token) as command:
        assert command.status() == 1
        assert command.says("4401") or command.says("expired")
        assert "401" in command.err[-1] and not command.says("Traceback")


def test_subscribe_ends_with_0_on_sigint(server):
    with subscribing(server, "a") as command:
        command.signal(signal.SIGINT)
        assert (command.status(), command.out, command.err) == (0, [], [])
    wait_until(lambda: not server.subscribers)


def test_subscribe_ends_with_0_on_sigint_while_it_pauses():
    with Command("subscribe", "a", "--url", f"ws://127.0.0.1:{free_port()}") as command:
        wait_until(lambda: command.says("again in 1 seconds"))
        command.signal(signal.SIGINT)
        assert command.status() == 0 and not command.says("Traceback")


def test_token_ends_quietly_when_nobody_reads_its_output():
    reading, writing = os.pipe()
    os.close(reading)
    with Command("token", stdout=writing) as command:
        os.close(writing)
        assert (command.status(), command.err) == (0, [])


def test_subscribe_ends_quietly_when_nobody_reads_its_output_any_more(server):
    reading, writing = os.pipe()
    with subscribing(server, "a", stdout=writing) as command, \
            connect(server, write=["a"]) as writer:
        os.close(writing)
        os.close(reading)
        writer.publish("a", "x")
        assert (command.status(), command.err) == (0, [])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_token_ends_with_1_when_its_output_is_full():
    with open("/dev/full", "w") as full, Command("token", stdout=full) as command:
        assert command.status() == 1
        assert len(command.err) == 1 and "No space left" in command.err[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_subscribe_ends_with_1_when_its_output_is_full(server):
    with open("/dev/full", "w") as full, subscribing(server, "a", stdout=full) as command, \
            connect(server, write=["a"]) as writer:
        writer.publish("a", "x")
        assert command.status() == 1
        assert len(command.err) == 1 and "No space left" in command.err[0]


# philote publish

def test_publish_sends_its_argument_and_nothing_else(server):
    with RawClient(server, ["a"]) as reader:
        done = run("publish", "a", "hello world", "--url", url_of(server), SECRET=SECRET,
                   input="not this")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert reader.receive()["data"] == "hello world" and reader.is_quiet()


@pytest.mark.parametrize("data", [
    "", "-1", "\u00e9", "x" * 100_000, "two\nlines", "its end\n\n", " "], ids=len)
def test_publish_sends_any_argument(server, data):
    with RawClient(server, ["a"]) as reader:
        done = run("publish", "--url", url_of(server), "a", data, SECRET=SECRET)
        assert done.returncode == 0, done.stderr
        assert reader.receive().get("data", "") == data


@pytest.mark.parametrize("input, expected", [
    ("a\nb\n", ["a", "b"]), ("a\nb", ["a", "b"]), ("", []), ("\n\n", ["", ""]),
    (" a \n\tb\n", [" a ", "\tb"]), ("\u00e9\n", ["\u00e9"]),
    ("x" * 500_000 + "\ny", ["x" * 500_000, "y"]),
], ids=["lines", "no end", "nothing", "empty lines", "spaces", "accent", "long"])
def test_publish_sends_each_line_of_its_input(server, input, expected):
    with RawClient(server, ["a"]) as reader:
        done = run("publish", "a", "--url", url_of(server), SECRET=SECRET, input=input)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert [reader.receive().get("data", "") for _ in expected] == expected
        assert reader.is_quiet()


def test_publish_takes_a_pipe_of_the_shell(server):
    with RawClient(server, ["a"]) as reader:
        line = f"printf 'a\\nb\\n' | {sys.executable} philote.py publish a --url {url_of(server)}"
        done = subprocess.run(line, shell=True, cwd=HERE, env=environment(SECRET=SECRET),
                              capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert reader.receive_data(2) == ["a", "b"]


def test_publish_sends_a_line_before_the_next_one_comes(server):
    with RawClient(server, ["a"]) as reader, \
            Command("publish", "a", "--url", url_of(server), SECRET=SECRET) as command:
        for data in "one", "two":
            command.say(data + "\n")
            assert reader.receive()["data"] == data
        command.process.stdin.close()
        assert (command.status(), command.err) == (0, [])


def test_publish_returns_once_the_server_has_it_all(server):
    lines = [f"line {i}" for i in range(5000)]
    done = run("publish", "a", "--url", url_of(server), SECRET=SECRET, input="\n".join(lines))
    assert done.returncode == 0
    assert server.statistics()[0]["published"] == 5000


def test_publish_waits_for_a_server_that_takes_its_time():
    with running(max_message_rate=5) as server:
        done = run("publish", "a", "--url", url_of(server), SECRET=SECRET, input="x\n" * 30)
        assert (done.returncode, done.stderr) == (0, "")
        assert server.statistics()[0]["published"] == 30


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_publish_sends_a_line_that_is_not_text(server, encoding):
    with RawClient(server, ["a"]) as reader:
        done = subprocess.run(
            [*SCRIPT, "publish", "a", "--url", url_of(server)], input=b"caf\xe9\nnext\n", cwd=HERE,
            env=environment(SECRET=SECRET, PYTHONIOENCODING=encoding + ":strict"),
            capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, b"")
        received = reader.receive_data(2)
        assert received[0].startswith("caf") and received[1] == "next"


@pytest.mark.parametrize("words, input", [(["x"], ""), ([], "x\n"), ([], "x\n" * 100)],
                         ids=["argument", "a line", "lines"])
def test_publish_ends_with_1_and_the_servers_reason_where_it_is_forbidden(server, words, input):
    done = run("publish", "secret", *words, "--url", url_of(server), "--token", GOOD, input=input)
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_line(done.stderr) and 'may not write the channel "secret"' in done.stderr


def test_publish_ends_with_1_and_the_servers_reason_where_its_token_is_refused(server):
    done = run("publish", "a", "x", "--url", url_of(server), "--token", make_token(exp=5))
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_line(done.stderr) and "the token has expired" in done.stderr


def test_publish_ends_with_1_where_the_server_is_full():
    with running(max_connections=1) as server, connect(server):
        done = run("publish", "a", "x", "--url", url_of(server), SECRET=SECRET)
    assert done.returncode == 1 and is_one_line(done.stderr) and "taken" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_publish_ends_with_1_where_there_is_no_server(host):
    done = run("publish", "a", "x", "--url", f"ws://{host}:{free_port()}")
    assert (done.returncode, done.stdout) == (1, "") and is_one_line(done.stderr)


@pytest.mark.parametrize("answer", [
    b"", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"], ids=ascii)
def test_publish_ends_with_1_where_there_is_another_server(answer):
    def script(sock, file):
        accept_upgrade(file)
        sock.sendall(answer)

    with answering(script) as url:
        done = run("publish", "a", "x", "--url", url)
    assert (done.returncode, done.stdout) == (1, "") and is_one_line(done.stderr)


@pytest.mark.parametrize("as_input", [False, True], ids=["argument", "input"])
def test_publish_ends_with_1_where_the_message_is_too_big(as_input):
    with running(max_message_size=1000) as server:
        words = ["publish", "a", *([] if as_input else ["x" * 2000]), "--url", url_of(server)]
        done = run(*words, SECRET=SECRET, input="x" * 2000 + "\n" if as_input else "")
    assert (done.returncode, done.stdout) == (1, "")
    assert is_one_line(done.stderr) and "1009" in done.stderr


@pytest.mark.parametrize("last", [b"", frame(8, struct.pack("!H", 1001) + b"going", mask=b"")],
                         ids=["no close", "1001"])
def test_publish_ends_with_1_where_the_server_goes_before_it_has_it_all(last):
    def script(sock, file):
        sock.sendall(accept_upgrade(file))
        read_masked(file)
        sock.sendall(last)

    with answering(script) as url:
        done = run("publish", "a", "x", "--url", url)
    assert (done.returncode, done.stdout) == (1, "") and is_one_line(done.stderr)


def test_publish_ends_with_1_where_the_server_goes_in_the_middle():
    with serving() as server, \
            Command("publish", "a", "--url", url_of(server), SECRET=SECRET) as command:
        with RawClient(server, ["a"]) as reader:
            command.say("one\n")
            assert reader.receive()["data"] == "one"
        server.process.kill()
        server.status()
        with contextlib.suppress(BrokenPipeError):
            for _ in range(3):
                command.say("two\n")
        assert command.status() == 1
        assert len(command.err) == 1 and "1006" in command.err[0]


def test_publish_ends_on_sigint_and_what_it_read_has_arrived(server):
    with RawClient(server, ["a"]) as reader, \
            Command("publish", "a", "--url", url_of(server), SECRET=SECRET) as command:
        command.say("one\n")
        assert reader.receive()["data"] == "one"
        command.signal(signal.SIGINT)
        assert (command.status(), command.err) == (0, [])
    wait_until(lambda: not server.subscribers)


def test_one_sigint_ends_publish_where_the_server_reads_nothing():
    def write():
        with contextlib.suppress(OSError):
            while True:
                command.say("x" * 100_000 + "\n")
                written.append(1)

    written = []
    with deaf() as url, Command("publish", "a", "--url", url) as command, threads(write):
        wait_until_it_stands_still(written)
        command.signal(signal.SIGINT)
        assert command.status() == 0


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
    values = {"URL": url_of(server), "TOKEN": make_token(["a"], ["a"]), "SECRET": SECRET}
    words = [values.get(word, word) for word in words]
    environ = {name: values.get(value, value) for name, value in environ.items()}
    with Command("subscribe", "a", "--count", "1", *words, **environ) as command:
        wait_until(lambda: len(server.registry) == 1 or command.process.poll() is not None)
        assert run("publish", "a", "hello", *words, **environ).returncode == 0
        assert (command.status(), command.out, command.err) == (0, ["hello\n"], [])


def test_an_open_server_on_this_machine_needs_no_token():
    with running(secret="") as server, \
            subscribing(server, "a", "--count", "1", SECRET="") as command:
        assert run("publish", "a", "hello", "--url", url_of(server)).returncode == 0
        assert (command.status(), command.out) == (0, ["hello\n"])


def test_a_token_made_on_the_spot_is_for_just_these_channels(server):
    with subscribing(server, "a", "b"):
        wait_until(lambda: len(server.registry) == 2)
        (subscriber,) = server.subscribers.values()
        assert (subscriber.key.read, subscriber.key.write) == ({"a", "b"}, set())
    with Command("publish", "c", "--url", url_of(server), SECRET=SECRET):
        wait_until(lambda: [s.key.write for s in server.subscribers.values()] == [{"c"}])
        assert not next(iter(server.subscribers.values())).key.read


def test_the_default_server_is_localhost_at_6380():
    try:
        socket.create_server(("127.0.0.1", 6380)).close()
    except OSError:
        pytest.skip("port 6380 is taken")
    with Command() as server, Command("subscribe", "news", "--count", "1") as command:
        wait_until(lambda: server.says("port 6380"))
        client = philote.Client(token=philote.new_token("", ["news"], ["news"]))
        wait_until(lambda: publishes(client, command))
        assert command.status() == 0 and command.out[0] in ("hello\n", "hello again\n")
        client.close()
        assert run("publish", "news", "hello").returncode == 0


def publishes(client, command):
    """Publish until the command, which connects when it can, has it."""
    client.publish("news", "hello")
    return command.process.poll() is not None


def test_the_commands_speak_tls(server, certificate):
    with behind_tls(server, certificate) as url, RawClient(server, ["a"]) as reader:
        environ = {"PHILOTE_URL": url, "SECRET": SECRET}
        assert run("publish", "a", "x", SSL_CERT_FILE=certificate[0], **environ).returncode == 0
        assert reader.receive()["data"] == "x"
        done = run("publish", "a", "x", **environ)
        assert done.returncode == 1 and is_one_line(done.stderr)
        assert "certificate" in done.stderr and reader.is_quiet()


# The three forms: the file, the installed command, and the zipapp

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with what the README's line builds: the packages, installed, and the zipapp."""
    path = tmp_path_factory.mktemp("built")
    for name in ("philote.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HERE / name, path)
    line = re.search("(?m)^python3 -m pip install .* zipapp .*$", (path / "README.md").read_text())
    done = subprocess.run(line[0].replace("python3 -m", sys.executable + " -m"), shell=True,
                          cwd=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return path


def zipapp(built):
    return sys.executable, "-S", "-E", "-I", str(built / "philote.pyz")


def installed(built):
    """The installed command, and the directory of the packages."""
    (path,) = built.glob("*/bin/philote")
    return (sys.executable, "-S", str(path)), str(path.parent.parent)


def test_the_zipapp_runs_on_a_python_that_has_no_packages(built, tmp_path):
    done = run("--version", launcher=zipapp(built), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"philote {philote.__version__}\n"


@pytest.mark.parametrize("words, environ, status", [
    (["token", "--check", GOOD], {"SECRET": SECRET}, 0), (["bogus"], {}, 2),
    (["token", "--check", BAD], {"SECRET": SECRET}, 1), (["serve"], {"PORT": "x"}, 2)])
def test_the_zipapp_hands_on_the_exit_status(built, tmp_path, words, environ, status):
    done = run(*words, launcher=zipapp(built), cwd=tmp_path, **environ)
    assert done.returncode == status and is_one_line(done.stdout + done.stderr)


def test_the_zipapp_serves_subscribes_and_publishes(built, tmp_path):
    form = {"launcher": zipapp(built), "cwd": tmp_path}
    with serving(**form) as server:
        environ = {"PHILOTE_URL": url_of(server), "SECRET": SECRET}
        carries_a_message(form, environ)
        server.signal(signal.SIGTERM)
        assert server.status() == 0


def test_the_installed_command_takes_the_same_words(built, tmp_path):
    launcher, packages = installed(built)
    form, path = {"launcher": launcher, "cwd": tmp_path}, {"PYTHONPATH": packages}
    assert run("--version", **form, **path).stdout == f"philote {philote.__version__}\n"
    with serving(**form, **path) as server:
        carries_a_message(form, {"PHILOTE_URL": url_of(server), "SECRET": SECRET, **path})


def test_the_single_file_runs_in_an_empty_directory(tmp_path):
    shutil.copy(HERE / "philote.py", tmp_path)
    form = {"cwd": tmp_path}
    with serving(**form) as server:
        carries_a_message(form, {"PHILOTE_URL": url_of(server), "SECRET": SECRET})


def carries_a_message(form, environ):
    """Let two commands talk over a server in another process."""
    with Command("subscribe", "news", "--count", "1", **form, **environ) as subscribe, \
            contextlib.closing(philote.Client(
                environ["PHILOTE_URL"], make_token(["echo"], ["news"]))):
        api = types.SimpleNamespace(server_address=("", urlsplit(environ["PHILOTE_URL"]).port))
        token = make_token(api=True)
        wait_until(lambda: json.loads(ask(api, (
            f"GET /api/info?auth={token} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        ).encode())[2])["channels"] == 2)
        done = run("publish", "news", "hello", **form, **environ)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (subscribe.status(), subscribe.out, subscribe.err) == (0, ["hello\n"], [])
