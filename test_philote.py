"""Tests of philote.py, in the order of its sections, over real sockets on port 0.

    python -m pytest            # the ordinary run
    python -m pytest -m full    # the long ones in full: churn, floods, fuzzing

The raw client below shares no code with philote.py, so that two mistakes cannot cancel out; the library `websockets`
talks to the server from outside as well.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.parse
import uuid
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jwt
import pytest
import websockets.exceptions
import websockets.sync.client

import philote

HERE = Path(__file__).resolve().parent
SECRET = "a secret of the tests, long enough for every algorithm that there is, as RFC 7518 wants"
NONCE = "dGhlIHNhbXBsZSBub25jZQ=="
PATIENCE = 15  # seconds that anything may take on a busy machine


# ----------------------------------------------------------------------------------------------------------- helpers

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
    return jwt.encode({"read": list(read), "write": list(write), **claims}, secret, algorithm=algorithm)


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
    bits, number = size or (7 if len(payload) < 126 else 16 if len(payload) < 65536 else 64, len(payload))
    length = {7: lambda: bytes([flag | number]), 16: lambda: bytes([flag | 126]) + struct.pack("!H", number),
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
    fields = {"Host": "localhost", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": NONCE,
              "Sec-WebSocket-Version": "13", **dict(headers)}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items() if k not in without), "", ""]
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
    """Read one HTTP response: (status, headers in small letters, body); None at the end of the connection."""
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
    """A WebSocket client made of a socket. With `rest`, those bytes go out in one packet with the handshake."""

    def __init__(self, server, read=(), write=(), rest=b"", receive_buffer=None, token=None, **claims):
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
        assert head[0] & 0xF0 == 0x80 and not head[1] & 0x80, "the server fragments or masks a frame"
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
        """Skip to the close frame: its code, None for one without, or 'gone' where there is none."""
        try:
            while (item := self.read_frame()) is not None:
                if item[0] == 8:
                    return struct.unpack("!H", item[1][:2])[0] if item[1] else None
        except ConnectionError:
            pass
        return "gone"

    def is_quiet(self):
        """Whether the server has sent nothing for this client: its answer to a ping is the next thing that comes."""
        self.send(frame(9, b"quiet?"))
        return self.read_frame() == (10, b"quiet?")


def is_served(server):
    """Whether a fresh client gets what another fresh client publishes."""
    with RawClient(server, read=["fresh"]) as reader, RawClient(server, write=["fresh"]) as writer:
        writer.publish("fresh", "still here")
        return reader.receive()["data"] == "still here"


def footprint(server):
    """What must be back where it was: subscribers, strangers, channels, threads, descriptors."""
    return (len(server.subscribers), len(server.strangers), len(server.registry), threading.active_count(),
            len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0)


@contextlib.contextmanager
def undisturbed(server, caplog):
    """Check what must hold after every fault: a bystander missed nothing, newcomers are served, nothing is left."""
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


# ---------------------------------------------------------------------------------------------------------- settings

def test_the_defaults_are_those_of_the_original():
    settings = philote.Settings.from_environ({})
    assert (settings.secret, settings.port, settings.loglevel, settings.max_connections) == ("", 6380, "info", 255)
    assert (settings.read_buffer_size, settings.write_buffer_size, settings.check_origin) == (1024, 1024, False)
    assert (settings.host, settings.max_message_size, settings.max_queue_size) == ("", 1 << 20, 1 << 20)
    assert (settings.ping_interval, settings.max_message_rate, settings.shutdown_timeout) == (25, 0, 10)


@pytest.mark.parametrize("name, value, expected", [
    ("SECRET", "s3cret", "s3cret"), ("HOST", "::1", "::1"), ("PORT", "0", 0), ("PORT", "65535", 65535),
    ("LOGLEVEL", "debug", "debug"), ("LOGLEVEL", "PANIC", "panic"), ("LOGLEVEL", "fatal", "fatal"),
    ("MAX_CONNECTIONS", "1", 1), ("READ_BUFFER_SIZE", "4096", 4096), ("WRITE_BUFFER_SIZE", "1", 1),
    ("MAX_MESSAGE_SIZE", "10", 10), ("MAX_QUEUE_SIZE", "10", 10), ("MAX_MESSAGE_RATE", "0.5", 0.5),
    ("PING_INTERVAL", "0", 0), ("SHUTDOWN_TIMEOUT", "2.5", 2.5),
    *[("CHECK_ORIGIN", value, True) for value in ("1", "t", "T", "true", "TRUE", "True")],
    *[("CHECK_ORIGIN", value, False) for value in ("0", "f", "F", "false", "FALSE", "False")],
    ("CHECK_ORIGIN", "https://a.example, HTTP://b:81", ("https://a.example", "http://b:81")),
])
def test_a_setting_is_read(name, value, expected):
    assert getattr(philote.Settings.from_environ({name: value}), name.lower()) == expected


@pytest.mark.parametrize("name, value", [
    ("PORT", "65536"), ("PORT", "-1"), ("PORT", "http"), ("PORT", ""), ("PORT", "1_0"), ("PORT", "\u0661"),
    ("PORT", "9" * 5000), ("LOGLEVEL", "verbose"), ("MAX_CONNECTIONS", "0"), ("MAX_CONNECTIONS", "1.5"),
    ("READ_BUFFER_SIZE", "0"), ("WRITE_BUFFER_SIZE", "1k"), ("MAX_MESSAGE_SIZE", "0"), ("MAX_QUEUE_SIZE", "-5"),
    ("MAX_MESSAGE_RATE", "nan"), ("PING_INTERVAL", "inf"), ("SHUTDOWN_TIMEOUT", "-1"), ("CHECK_ORIGIN", "yes"),
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
        philote.Settings.from_environ({"PORT": "x", "LOGLEVEL": "y", "CHECK_ORIGIN": "z", "HOST": "fine"})
    assert [line.partition(":")[0] for line in str(caught.value).split("\n")] == ["PORT", "LOGLEVEL", "CHECK_ORIGIN"]


def test_settings_do_not_show_the_secret():
    assert "hush" not in repr(philote.Settings(secret="hush"))


# ------------------------------------------------------------------------------------------------------- access keys

def test_a_token_made_by_new_token_says_what_was_asked_for():
    claims = jwt.decode(philote.new_token(SECRET, ["a"], ["b", "c"], 60, api=True), SECRET, algorithms=["HS256"])
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
    {"exp": 2**40}, {"exp": time.time() + 1000.5}, {"nbf": 5}, {"iat": 5}, {"aud": "x"}, {"aud": 5}, {"iss": "x"},
    {"sub": "x"}, {"sub": 5}, {"jti": 5}, {"jti": ["x"]}, {"read": None}, {"write": None}, {"other": {}},
])
def test_a_token_is_accepted(server, claims):
    token = jwt.api_jws.encode(json.dumps({"read": [], **claims}).encode(), SECRET)
    RawClient(server, token=token).close()


def raw_token(header, claims, secret=SECRET):
    """Sign anything, with HS256 whatever the header says."""
    import hashlib
    import hmac
    head, body = (base64.urlsafe_b64encode(part if isinstance(part, bytes) else json.dumps(part).encode()).rstrip(b"=")
                  for part in (header, claims))
    mark = hmac.new(secret.encode(), head + b"." + body, hashlib.sha256).digest()
    return (head + b"." + body + b"." + base64.urlsafe_b64encode(mark).rstrip(b"=")).decode()


BAD_TOKENS = {
    "none at all": "", "garbage": "garbage", "two dots": "a.b.c", "another secret": make_token(secret="x" * 32),
    "alg none": "eyJhbGciOiJub25lIn0.e30.", "alg RS256": raw_token({"alg": "RS256"}, {}), "no alg": raw_token({}, {}),
    "alg an int": raw_token({"alg": 5}, {}), "alg a list": raw_token({"alg": ["HS256"]}, {}),
    "header a list": raw_token([], {}), "claims a list": raw_token({"alg": "HS256"}, []),
    "claims not UTF-8": raw_token({"alg": "HS256"}, b"\xff"), "claims not JSON": raw_token({"alg": "HS256"}, b"{"),
    "kid an int": raw_token({"alg": "HS256", "kid": 5}, {}), "crit": raw_token({"alg": "HS256", "crit": ["x"]}, {}),
    "deeply nested header": base64.urlsafe_b64encode(b"[" * 6000).decode().rstrip("=") + ".e30.x",
    "deeply nested claims": raw_token({"alg": "HS256"}, b"[" * 5000), "NUL": "a\0b", "too long": "a" * 9000,
    **{f"claims {claims}": raw_token({"alg": "HS256"}, claims.encode()) for claims in (
        '{"exp": 5}', '{"exp": NaN}', '{"exp": Infinity}', '{"exp": null}', '{"exp": "99999999999"}',
        '{"exp": true}', '{"exp": [5]}', '{"nbf": 99999999999}', '{"iat": 99999999999}', '{"nbf": "1"}',
        '{"read": "abc"}', '{"read": 5}', '{"read": {"a": 1}}', '{"read": [5]}', '{"read": ["a", null]}',
        '{"read": [""]}', '{"write": "abc"}', '{"write": [["a"]]}', '{"write": false}')},
    "exp now": make_token(exp=int(time.time())),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_a_bad_token_is_answered_with_401(server, name):
    token = urllib.parse.quote(BAD_TOKENS[name])
    status, headers, body = ask(server, upgrade_request("/?auth=" + token if name != "none at all" else "/"))
    if name == "too long":
        assert status in (401, 414, 431)
        return
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert body.count(b"\n") == 1 and json.loads(body)["error"] == "unauthorized" and len(json.loads(body)["reason"]) > 9
    assert not token or token.encode() not in body


@pytest.mark.parametrize("auth", ["%ED%B3%BF", "%00", "%FF%FE%61%00", "a&auth=b", "%", ""])
def test_a_token_of_odd_bytes_is_answered_with_401(server, auth):
    assert status_of(server, upgrade_request("/?auth=" + auth)) == 401


GOOD, BAD = make_token(["a"]), make_token(["a"], secret="wrong" * 8)


@pytest.mark.parametrize("path, header, expected", [
    ("/", "Bearer " + GOOD, 101), ("/", "bearer " + GOOD, 101), ("/", "BEARER   " + GOOD, 101), ("/", GOOD, 101),
    ("/?auth=" + GOOD, None, 101), ("/any/path?x=1&auth=" + GOOD, None, 101), ("/?auth=" + GOOD, "Bearer " + BAD, 101),
    ("/?auth=" + BAD, "Bearer " + GOOD, 101), ("/?auth=" + GOOD, "Basic YTpi", 101), ("/?auth=" + BAD, "Bearer " + BAD, 401),
    ("/?token=" + GOOD, None, 401), ("/", "Bearer", 401), ("/", "", 401), ("/", "Token " + GOOD, 401),
])
def test_a_token_comes_in_the_header_or_else_in_the_query(server, path, header, expected):
    headers = {} if header is None else {"Authorization": header}
    assert status_of(server, upgrade_request(path, headers)) == expected


@pytest.mark.parametrize("address, expected", [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True), ("::ffff:10.0.0.1", False),
    ("10.0.0.1", False), ("192.168.1.1", False), ("::", False), ("fe80::1%eth0", False), ("8.8.8.8", False),
])
def test_loopback_addresses_are_known(address, expected):
    assert philote.is_loopback(address) is expected


def test_without_a_secret_only_this_machine_is_let_in(monkeypatch):
    with running(secret="") as server:
        request = upgrade_request("/?auth=" + philote.new_token("", ["a"]))
        assert status_of(server, request) == 101
        monkeypatch.setattr(philote, "is_loopback", lambda address: False)  # a peer from elsewhere cannot be had here
        status, _, body = ask(server, request)
        assert status == 403 and b"SECRET" in body


def test_no_token_and_no_secret_reaches_the_log(server, caplog):
    caplog.set_level(logging.DEBUG)
    for token in (GOOD, BAD, "garbage-token"):
        for request in (upgrade_request("/?auth=" + token), upgrade_request(headers={"Authorization": token}),
                        f"GET /metrics?auth={token} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
                        f"GET /?auth={token} HTTP/3\r\n\r\n".encode()):
            ask(server, request)
        server.said.clear()
    assert caplog.text and not re.search("eyJ|garbage-token|" + re.escape(SECRET), caplog.text)


def test_expiry_is_judged_by_the_clock_when_the_token_is_used():
    token = make_token(exp=time.time() + 100)
    assert philote.decode_token(token, SECRET).expires > time.time()


# ---------------------------------------------------------------------------------------------------------- messages

def test_a_message_reaches_every_other_reader_and_not_its_publisher(server):
    with RawClient(server, ["a"], ["a"]) as one, RawClient(server, ["a", "b"]) as two, RawClient(server, ["b"]) as other:
        one.publish("a", "hello")
        received = two.receive()
        assert list(received) == ["issuer", "channel", "data"] and received["data"] == "hello"
        assert uuid.UUID(received["issuer"]).version == 4
        assert one.is_quiet() and other.is_quiet()


def test_the_bytes_on_the_wire_are_those_of_the_original(server):
    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        writer.publish("a", 'say "h\u00e9" \u2028\n')
        assert re.fullmatch(r'\{"issuer":"[0-9a-f-]{36}","channel":"a","data":"say \\"h\u00e9\\" \u2028\\n"\}',
                            reader.read_frame()[1].decode())


@pytest.mark.parametrize("sent, data", [
    ('{"channel": "a", "data": "x", "issuer": "me"}', "x"), ('{"Channel": "a", "Data": "x"}', "x"),
    ('{"CHANNEL": "a", "dATA": "x"}', "x"), ('{"channel": "a", "data": "x", "event": "message", "id": [1]}', "x"),
    ('{"channel": "a", "data": "x", "Channel": 5, "DATA": 6}', "x"), ('{"channel":"b","channel":"a","data":"x"}', "x"),
    (' \n{"channel"\t:"a","data":"x"}\r\n', "x"), ('{"channel": "a"}', None), ('{"channel": "a", "data": ""}', None),
    ('{"channel": "a", "data": null}', None), ('{"channel": "a", "data": "\\u0000\\ud83d\\ude00"}', "\0\U0001f600"),
    ('{"channel": "a", "data": "\\ud800"}', "\ud800"), ('{"channel": "\\u0061", "data": "x"}', "x"),
    ('{"channel": "a", "data": "x", "n": 1e999, "m": 123456789012345678901234567890}', "x"),
])
def test_a_message_is_accepted(server, sent, data):
    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        for opcode in (1, 2):
            writer.send(frame(opcode, sent))
            received = reader.receive()
            assert received.get("data") == data and received["channel"] == "a" and received["issuer"] != "me"
            assert ("data" in received) == bool(data)


BAD_MESSAGES = ["", "{", "[]", "5", "null", "true", '"text"', "NaN", "[" * 200000, "[" * 200000 + "]" * 200000, "7" * 5000,
                '{"a":' * 50000, '{"data": "x"}', '{"channel": 5}', '{"channel": []}', '{"channel": null}', '{"channel": ""}',
                '{"channel": "a", "data": {}}', '{"channel": "a", "data": 5}', '{"channel": "a", "data": ["x"]}',
                '{"channel": "a", "data": "x", "n": NaN}', '{"channel": "a"} {}', '\ufeff{"channel": "a"}', "{'channel': 'a'}",
                '{"channel": "a", "data": "tab\there"}', '{"channel": "a", "n": ' + "7" * 5000 + "}"]


@pytest.mark.parametrize("sent", BAD_MESSAGES, ids=lambda sent: repr(sent[:24]))
def test_a_bad_message_is_reported_to_its_sender_and_to_the_log(server, caplog, sent):
    with undisturbed(server, caplog), RawClient(server, ["a"]) as reader, RawClient(server, write=["a"]) as writer:
        for opcode in (1, 2):
            writer.send(frame(opcode, sent))
            error = writer.receive()
            assert set(error) == {"error", "reason"} and error["error"] == "bad_message" and len(error["reason"]) < 200
        assert reader.is_quiet() and writer.is_quiet()
        assert "WARNING" in caplog.text and "message dropped" in caplog.text


@pytest.mark.parametrize("sent", [b"\xff\xfe{\x00}\x00", b"\x80", b'{"channel": "a\xff"}'])
def test_bytes_that_are_not_utf8_are_a_bad_message_in_a_binary_frame(server, sent):
    with RawClient(server, write=["a"]) as writer:
        writer.send(frame(2, sent))
        assert writer.receive()["error"] == "bad_message"


def test_a_message_to_a_channel_that_may_not_be_written_is_refused(server, caplog):
    with undisturbed(server, caplog), RawClient(server, ["a", "b"]) as reader, RawClient(server, ["b"], ["a"]) as writer:
        writer.publish("b", "secret words")
        error = writer.receive()
        assert error["error"] == "forbidden" and '"b"' in error["reason"]
        writer.publish("a", "fine")
        assert reader.receive()["data"] == "fine"
        assert any(r.levelname == "INFO" and "may not write 'b'" in r.message for r in caplog.records)
        assert "secret words" not in caplog.text


# ------------------------------------------------------------------------------------------------------------ frames

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
        writer.send(text("a", "1") + frame(1, whole[:9], fin=False) + frame(0, whole[9:]) + text("a", "3"))
        assert reader.receive_data(3) == ["1", "2", "3"]


def test_a_ping_is_answered_with_its_payload_and_a_pong_is_not(server):
    with RawClient(server) as client:
        client.send(frame(10, b"unasked") + frame(9, b"") + frame(9, b"x" * 125))
        assert [client.read_frame(), client.read_frame()] == [(10, b""), (10, b"x" * 125)]


BAD_UTF8 = b'{"channel": "a", "data": "\xce\xba\xe1\xbd\xb9\xcf\x83\xed\xa0\x80"}'
BROKEN_FRAMES = {
    "text not UTF-8": (frame(1, BAD_UTF8), 1007),
    "text not UTF-8 behind a good message": (text() + frame(1, BAD_UTF8), 1007),
    "text not UTF-8 in fragments": (frame(1, BAD_UTF8[:30], fin=False) + frame(0, BAD_UTF8[30:]), 1007),
    "a character cut short": (frame(1, b"\xc3"), 1007),
    "unmasked": (frame(1, message(), mask=b""), 1002), "RSV1": (frame(1, message(), rsv=4), 1002),
    "RSV3": (frame(9, b"", rsv=1), 1002), "opcode 3": (frame(3, b"x"), 1002), "opcode 11": (frame(11), 1002),
    "a ping of 126 bytes": (frame(9, b"x" * 126), 1002), "a fragmented ping": (frame(9, b"", fin=False), 1002),
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
    "too big in 10,000 fragments": (frame(2, b"", fin=False) + frame(0, b" " * 110, fin=False) * 10_000, 1009),
    **{f"close {code}": (frame(8, struct.pack("!H", code)), 1002) for code in (0, 999, 1004, 1005, 1006, 1014, 1015,
                                                                                1016, 2999, 5000, 65535)},
    **{f"close {code}": (frame(8, struct.pack("!H", code)), code) for code in (1000, 1001, 1011, 3000, 4999)},
    "close of one byte": (frame(8, b"x"), 1002), "close without a code": (frame(8), None),
    "close with a reason not UTF-8": (frame(8, b"\x03\xe8\xff"), 1007),
    "anything behind a close frame": (frame(8, b"\x03\xe8") + text("by", "no") + frame(3) + b"\xff" * 99, 1000),
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
        assert code == "gone" or client.read_frame() is None, "the server did not end the TCP connection"


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
    import tracemalloc
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
    import asyncio

    import kosoku

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
    verdicts = {result.case_id: (result.behavior.value, result.behavior_close.value) for result in results}
    good = {"OK", "NON-STRICT", "INFORMATIONAL"}
    assert len(verdicts) > 200
    assert {case: verdict for case, verdict in verdicts.items() if not set(verdict) <= good} == {}

# ----------------------------------------------------------------------------------- writer queues

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
    with RawClient(server, ["a"], receive_buffer=4096) as slow, RawClient(server, write=["a"]) as writer:
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


# ------------------------------------------------------------------------------------- connections

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
    with RawClient(server, ["a"]) as reader, RawClient(server, write=["a"], exp=time.time() + 1) as writer:
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
    with running(max_message_rate=4, ping_interval=0.3) as server, RawClient(server, ["a"]) as reader, \
            RawClient(server, write=["a"]) as writer:
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


@pytest.mark.parametrize("error", [ValueError("x"), UnicodeError("x"), MemoryError(), AssertionError("x")])
def test_an_exception_out_of_the_library_ends_that_connection_with_a_line(server, caplog, monkeypatch, error):
    def fail(self):
        raise error
    with undisturbed(server, caplog), RawClient(server) as client, monkeypatch.context() as patch:
        patch.setattr(philote.simple_websocket.Server, "_handle_events", fail)
        client.send(frame(9))
        assert client.read_close() == 1011
        assert type(error).__name__ in caplog.text


# -------------------------------------------------------------------------------- channel registry

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
    """Steady readers miss nothing, in order and once; those who come and go see a part without gaps."""
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
        publishers = [threading.Thread(target=run, args=(publish, w, i)) for i, w in enumerate(writers)]
        visitors = [threading.Thread(target=run, args=(come_and_go,), daemon=True) for _ in range(4)]
        for thread in (*visitors, *publishers):
            thread.start()
        for reader in steady:
            data = reader.receive_data(4 * count)
            for i in range(4):
                for part in (0, 1):
                    own = [d for d in data if d.startswith(f"{i} ") and int(d.split()[1]) % 2 == part]
                    assert own == [f"{i} {n}" for n in range(part, count, 2)]
        done.set()
        with RawClient(server, write=["a"]) as writer:  # lets the last visitors go
            wait_until(lambda: writer.publish("a", "last 0") or not any(t.is_alive() for t in visitors))
    assert errors == []
    wait_until(lambda: footprint(server)[:3] == (0, 0, 0))


# ---------------------------------------------------------------------------------------- the faults

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
                victim.send({"frame": text()[:9], "fan-out": b"", "fragment": frame(1, "{", fin=False)}[stage])
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
                memory.append(int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
                              if os.path.exists("/proc/self/status") else 1)
        assert memory[-1] <= memory[0] * 1.1, memory


def test_silent_strangers_do_not_keep_out_a_newcomer(caplog):
    with running(max_connections=5) as server, undisturbed(server, caplog), contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(dial(server)) for _ in range(200)]
        assert is_served(server)
        wait_until(lambda: len(server.strangers) <= 64)
        assert strangers[0].recv(1) == b"", "the oldest is not the one that was dropped"


def test_without_threads_newcomers_are_refused_and_the_rest_goes_on(server, caplog):
    with undisturbed(server, caplog):
        size = threading.stack_size(1 << 46)  # no system has room for such a stack: a thread cannot be started
        try:
            assert [status_of(server, upgrade_request()) for _ in range(3)] in ([503] * 3, [503, 503, None], [503, None, 503])
        finally:
            threading.stack_size(size)
        assert len([r for r in caplog.records if "no more threads" in r.message]) == 1


def test_without_descriptors_newcomers_are_refused_and_nothing_spins(full):
    code = ("import resource, sys, philote, threading; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40));"
            "s = philote.Server(philote.Settings(secret=sys.argv[1], host='127.0.0.1', port=0)).__enter__();"
            "print(s.server_address[1], flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code, SECRET], cwd=HERE, stdin=subprocess.PIPE,
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
        wait_until(lambda: status_of(server, upgrade_request(headers={"Authorization": GOOD})) == 101)
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
        code = ("import socket, sys, time; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])));"
                "s.sendall(sys.argv[2].encode()); print(s.recv(99)[:12], flush=True); time.sleep(99)")
        request = upgrade_request(headers={"Authorization": GOOD}).decode()
        peer = subprocess.Popen([sys.executable, "-c", code, str(port_of(server)), request], stdout=subprocess.PIPE)
        try:
            assert b"101" in peer.stdout.readline()
            os.kill(peer.pid, signal.SIGSTOP)
            wait_until(lambda: footprint(server)[:3] == (0, 0, 0))
        finally:
            peer.kill()
            peer.communicate()


# --------------------------------------------------------------------------------------- the end

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
            threads += [threading.Thread(target=publish, args=(w, i)) for i, w in enumerate(writers)]
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
            assert [len(d) for d in reader.receive_data(8)] == [1_000_000] * 8 and reader.read_close() == 1001
            stop.join(PATIENCE)
            assert not stop.is_alive() and footprint(server)[:3] == (0, 0, 0)
    

# ----------------------------------------------------------------------------------------- fuzzing

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
        st.binary(max_size=130), st.text(max_size=60), st.just(message("a", "x")), st.just(message("no"))),
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
        b"Host: x", b"Upgrade: websocket", b"Connection: upgrade", b"Sec-WebSocket-Version: 13", b"Content-Length: 5",
        b"Sec-WebSocket-Key: " + NONCE.encode(), b"Authorization: " + GOOD.encode(), b"Transfer-Encoding: chunked",
        b"Expect: 100-continue", b"Origin: null", b"", b"Connection: close", b"Content-Type: text/plain"]))
HANDSHAKES = st.one_of(st.binary(max_size=200), st.tuples(
    st.sampled_from([b"GET / HTTP/1.1", b"POST /api/publish HTTP/1.1", b"GET /metrics HTTP/1.0",
                     b"GET /api/events?channel=a HTTP/1.1", b"OPTIONS * HTTP/1.1", b"HEAD /health HTTP/1.1",
                     b"GET /?auth=%00%ff HTTP/1.1"]),
    st.lists(LINES, max_size=9), st.binary(max_size=20)).map(lambda t: b"\r\n".join([t[0], *t[1], b"", t[2]])))


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
        st.sampled_from(["channel", "data", "Channel", "DATA", "x"]), inner, max_size=4), max_leaves=6)


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


@hypothesis.given(st.lists(st.tuples(st.sampled_from(["whole", "binary", "fragments"]), st.text(max_size=80)),
                           min_size=1, max_size=8), st.lists(st.integers(1, 400), max_size=12))
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
        assert [reader.receive().get("data", "") for _ in messages] == [data for _, data in messages]


# ------------------------------------------------------------------------- clients of other people

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
