#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["simple-websocket>=1.1", "wsproto>=1.2", "PyJWT>=2.14"]
# ///
"""Philote: a WebSocket publish/subscribe server in one file.

    python philote.py            # serves ws://localhost:6380
    python philote.py --help     # the other commands: token, subscribe, publish and more

A client connects with a JSON Web Token that lists the channels it may read and write. What one
connection writes to a channel, every other connection that may read it receives:

    client -> server    {"channel": "news", "data": "hello"}
    server -> others    {"issuer":"0f8fad5b-d9cb-469f-a165-70867728950e",
                         "channel":"news","data":"hello"}
    server -> client    {"error": "forbidden", "reason": "..."}    where it may not write there

A client that asks for it gets ids, which are positions in the server's log of all messages; one
that comes back with its position first gets all that it missed.

This is a port of the Go server of the same name, `the original` below, whose clients it serves.

The way of a message. The thread of the publisher's connection does every step, up to the sockets of
the subscribers; only what a socket does not take at once is left to another thread, and, where many
publish at the same moment, one of them writes for all. (The sections of this file stand in another
order: most build on those before them.)

    Transport.receive -> read_frames -> WebSocket.receive (JSON, the token's rights)
        -> Batch -> Log.append (id, History) -> Connection.put of each subscriber
        -> Gathering -> Connection.flush

Where many servers share a log in Redis, the publisher's thread goes as far as Batch, and another
goes on with what comes back:

    Batch -> Outbox -> (append thread) -> Redis -> (read thread) -> Log.append -> ...

The threads, and what each may wait for:

    accept      Server.serve_forever. Waits for newcomers only; starts a thread for each.
    connection  Server.run_connection. Waits for its own peer: for bytes, for room while it sends
                the past (Connection.catch_up), and where a limit slows the peer down
                (Connection.pause). Also 0.3 ms for others that publish just now (Gathering); up to
                5 seconds for the keys of an identity provider; and with REDIS_URL for Redis: while
                too much that was published here has not come back (Outbox), up to 5 seconds for its
                request's answer, and 8 for an id that another server gave out. Never waits for
                another peer: it writes to the sockets of all subscribers, but only what they take
                at once.
    poller      Poller.run. Waits for sockets that were full and for points in time, for all
                connections together.
    append,     RedisLog, only with REDIS_URL. Each waits for Redis on a connection of its own; read
    read        also up to 10 seconds for subscribers that fall behind (RedisLog._let_read). What a
                server asks all to end, a short-lived thread ends (RedisLog._end_own).
    main        `philote serve` waits for a signal there, then calls Server.stop.
    log         BackgroundHandler: the only thread that waits for standard error.
    keys        Provider._run, while it fetches the keys of an identity provider.

The class Client shares no state with the server. Its section describes its own threads and locks.

The locks, in the order in which they may be taken while another is held:

    Server.turn      held by a thread that works on much input, see Server.take_turn
    Admission.lock   which connections there are, how many, what the gone ones counted
    Log.lock         the order of all messages, their history, who has joined what. No system call
                     is made under it
    Outbox.changed   what has not come back from Redis, and whether Redis can be reached
    Connection.lock  a connection's state, its queue, each write to its socket, and its close
    TLSTransport.lock  the TLS of a connection; nothing else is taken under it
    Poller.lock      what the poller is to do next
    Metrics.lock, LogLimit.lock  a few counters; nothing else is taken under them
    Gathering.lock   who writes for whom; nothing else is taken under it
    Provider.lock    whether keys are being fetched; nothing else is taken under it

A connection is in one state at a time; see State below for the table, and Connection._move() for
the one place where it changes.

What the server promises, and where each promise is kept:

    one order       A message gets its id and enters the queues of all its subscribers under
                    Log.lock (Log.append), and a queue is written first in, first out.
    all messages,   A queue over its limit ends its connection (Connection.flush, Subscriber.
    or an end,      on_overflow). A client that comes back is sent the past. Its last piece is
    or a gap        queued, and the channels are joined, under one lock: nothing falls between
                    (Log.replay). Where messages are no longer there to be sent, a subscriber with
                    ids is told of a gap, and others are disconnected (RedisLog.tell_gap).
    nobody waits    A publisher writes to a socket only what that takes at once (Transport.send);
    for another     the rest is the poller's work (Connection.resume). What it leaves to another
                    publisher's thread, a third one writes where that is late (Gathering).

Left out on purpose: compression (it would cost each connection some 300 KB and each message its
shared frame), Windows. Without Redis, messages do not outlive the process.

Behind the Python stand two texts that the server hands to browsers: a client, /philote.js, and the
console, a page that uses it.
"""

from __future__ import annotations

import _thread
import argparse
import atexit
import base64
import bisect
import collections
import contextlib
import dataclasses
import email.utils
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import heapq
import html
import http
import http.client
import importlib
import io
import ipaddress
import itertools
import json
import json.encoder
import logging
import logging.handlers
import math
import operator
import os
import platform
import queue
import random
import re
import resource
import select
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import struct
import sys
import termios
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

try:
    import jwt
    import simple_websocket
    import wsproto.events
    from wsproto.connection import Connection as ProtocolConnection, ConnectionType
    from wsproto.frame_protocol import CloseReason, Opcode
    from wsproto.utilities import ProtocolError, generate_accept_token
except ImportError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"philote: {missing.name} is missing; install it with: pip install simple-websocket PyJWT")

__version__ = "1.2.0"
__all__ = [
    "AccessKey", "Client", "ConnectionClosed", "Forbidden", "Gap", "Message", "PhiloteError",
    "Server", "Settings", "SettingsError", "Unauthorized", "new_token",
]

log = logging.getLogger("philote")


# ----------------------------------------------------------------------------------------- settings
# What an operator can choose, from the environment. Each setting is one row of the class Settings:
# its name, default, parser, what is allowed, and what it means. --help is made of these rows.
#
# Nothing is guessed: an empty number, a size of 1k, a boolean of "yes" are refused, each with what
# is allowed, and all bad ones at once. A server that runs with another limit than its operator
# believes is worse than one that does not start. The value of a setting that may hold a secret is
# never shown, not even where it is refused. TLS_KEY takes a path, which is shown; but what it
# refuses is not, for somebody may have put the key itself there.

class SettingsError(ValueError):
    """Settings that are not allowed, one line for each."""


class Kind(NamedTuple):
    """What a setting takes."""

    parse: Callable[[str], Any]  # raises ValueError
    allowed: str  # the same in words


def _number(low: float, high: float, what: str = "a number", convert: Any = int) -> Kind:
    pattern = r"[0-9]+(\.[0-9]+)?" if convert is float else "[0-9]+"

    def parse(text: str) -> Any:
        """Parse plain digits; int() or float() would also take " 5", "+5", "1_000", "1e3", "inf".

        Of more than 4,300 digits int() raises ValueError by itself.
        """
        if not re.fullmatch(pattern, text) or not low <= convert(text) <= high:
            raise ValueError
        return convert(text)
    return Kind(parse, f"{what} from {low} to {high}")


def _parse_level(text: str) -> str:
    if text.lower() not in _LEVELS:
        raise ValueError
    return text.lower()


def _parse_boolean(text: str) -> bool:
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise ValueError


def _parse_origins(text: str) -> bool | tuple[str, ...]:
    with contextlib.suppress(ValueError):
        return _parse_boolean(text)
    origins = tuple(origin.strip().lower() for origin in text.split(","))
    # As browsers write an Origin (RFC 6454, section 6): in ASCII, without a path, and without the
    # port where it is the default of the scheme.
    pattern = r"(?!http:.*:80$|https:.*:443$)[a-z][a-z0-9+.-]*://[^\s/?#@*]+"
    if not text.isascii() or not all(re.fullmatch(pattern, origin) for origin in origins):
        raise ValueError
    return origins


def _parse_host(text: str) -> str:
    # Linux has 108 bytes for the path, and the last is a NUL (unix(7)); other systems have 104.
    if text.startswith(_UNIX) and not 0 < len(os.fsencode(text)) - len(_UNIX) <= 107:
        raise ValueError
    return text


def _parse_secret(text: str) -> str:
    with contextlib.suppress(jwt.PyJWTError):
        # Encoded only because PyJWT checks the key then: it refuses keys and certificates in PEM.
        jwt.encode({}, _signing_key(text), algorithm="HS256")
        is_jwk = text.lstrip().startswith("{") and '"kty"' in text  # RFC 7517, section 4
        if not is_jwk and not _is_bare_key(text):
            return text
    raise ValueError


def _parse_redis_url(text: str) -> str:
    # redis-py takes a path that is no number for database 0.
    pattern = r"rediss?://[^/?#\s]+(/[0-9]*/?)?(\?\S*)?|unix://(\S*@)?/\S*"
    if text and not re.fullmatch(pattern, text):
        raise ValueError
    return text


def _is_bare_key(text: str) -> bool:
    # Whether this is a public key or a certificate as identity providers show it: PEM without its
    # first and last line. As a SECRET it would be one that everybody knows.
    #
    # What remains of PEM is base64 of DER (X.690): a SEQUENCE, whose tag is 0x30, "0" in ASCII;
    # then its length, in one byte up to 127, else in one byte behind 0x81 or two behind 0x82; and
    # just so many bytes, which begin with another SEQUENCE or, in an RSA PUBLIC KEY, with an
    # INTEGER (0x02) of 128 bytes or more.
    try:
        data = base64.b64decode("".join(text.replace("\\n", "").split()), validate=True)
    except ValueError:
        return False
    head = re.match(rb"0([\0-\x7f]|\x81.|\x82..)(?=0|\x02[\x81\x82])", data, re.DOTALL)
    return head is not None and len(data) == head.end() + int.from_bytes(
        head[1][1:] or head[1], "big")


def _parse_file(text: str) -> str:
    # Somebody may have put here what should be in the file.
    if "-----BEGIN" in text or not re.fullmatch("[^\0\n]*", text):
        raise ValueError
    return text


def _parse_keys(text: str) -> str:
    if "://" in text:
        url = urllib.parse.urlsplit(text)
        is_safe = url.scheme == "https" or url.scheme == "http" and is_local_name(url.netloc)
        # No user:password@, which urllib would take for a part of the host's name.
        if (not is_safe or not re.fullmatch("[!-~]+", text) or "@" in url.netloc
                or not url.hostname or url.port == 0):
            raise ValueError
        return text
    return _parse_file(text)


_UNIX = "unix:"  # what stands before the path of a Unix socket
_LEVELS = {
    "debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING,
    "error": logging.ERROR, "fatal": logging.CRITICAL, "panic": logging.CRITICAL,
}
_SIZE = _number(1, 2**30, "a number of bytes")
_SECONDS = _number(0, 86400, "a number of seconds", float)
_SECRET = Kind(_parse_secret, "any text that is not a public key, a certificate or a JWK")
_TEXT = Kind(str, "any text")
_KEYS = Kind(_parse_keys, "the path of a file, or the URL of a JWKS: https://, and http:// on this "
                          "machine")
_HOST = Kind(_parse_host, "an address or name of this machine, unix:PATH (of up to 107 bytes), or "
                          "nothing for all")
_FILE = Kind(_parse_file, "the path of a file")
_LEVEL = Kind(_parse_level, "one of " + ", ".join(_LEVELS))
_RATE = _number(0, 10**9, "a number of messages a second (0: no limit)", float)
_BOOLEAN = Kind(_parse_boolean, "true or false")
_REDIS = Kind(_parse_redis_url, "redis://HOST:PORT/DB, rediss:// (TLS) or unix://PATH")
_ORIGINS = Kind(_parse_origins, "true, false, or a list of origins such as https://example.com")


def _setting(default: Any, kind: Kind, meaning: str, shown: bool = True) -> Any:
    # `shown` is false for what may hold a secret: repr(), /api/info and `philote check` omit it.
    return dataclasses.field(default=default, repr=shown, metadata={
        "parse": kind.parse, "allowed": kind.allowed, "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the server may do. Sizes are in bytes, times in seconds.

    Raises SettingsError for a value of another type; whether it is allowed, from_environ() checks.
    """

    secret: str = _setting("", _SECRET, "signs the tokens; while it and PUBLIC_KEYS are empty, "
                           "only clients on the same machine are let in", shown=False)
    old_secret: str = _setting(
        "", _SECRET, "the SECRET of before: tokens that it signed are let in, too", shown=False)
    public_keys: str = _setting("", _KEYS, "public keys or certificates (PEM), or the JWKS of an "
                                "identity provider, for tokens that others sign", shown=False)
    claim: str = _setting("", _TEXT, "the token's claim that holds read, write and api; by default "
                          "these are claims themselves")
    audience: str = _setting("", _TEXT, "what the token's claim aud must be, or hold")
    issuer: str = _setting("", _TEXT, "what the token's claim iss must be")
    host: str = _setting("", _HOST, "what to listen on; by default all, IPv4 and IPv6 alike; the "
                         "file of a Unix socket is for its owner and group")
    port: int = _setting(6380, _number(0, 65535), "port to listen on; 0 takes any that is free")
    reuse_port: bool = _setting(
        False, _BOOLEAN, "whether others that say so too may listen on the same port; the system "
        "deals out the newcomers")
    tls_cert: str = _setting("", _FILE, "certificate (PEM) with its chain; then TLS is all that is "
                             "spoken")
    tls_key: str = _setting("", _FILE, "its key, where that does not stand in the same file")
    loglevel: str = _setting("info", _LEVEL, "what the log on standard error says")
    max_connections: int = _setting(
        255, _number(1, 10**6), "WebSockets and event streams at a time")
    max_message_size: int = _setting(1 << 20, _SIZE, "bytes of one message")
    max_queue_size: int = _setting(1 << 20, _SIZE, "bytes that may wait for one subscriber")
    max_message_rate: float = _setting(0, _RATE, "messages a second from one connection")
    max_subscriptions: int = _setting(
        1000, _number(1, 10**6), "channels and patterns that one connection may have joined")
    history_time: float = _setting(
        300, _SECONDS, "seconds that a message is kept for those who come back; 0 keeps none")
    history_size: int = _setting(
        1 << 24, _number(0, 2**40, "a number of bytes"), "bytes of messages that are kept; the "
        "oldest go first")
    redis_url: str = _setting(
        "", _REDIS, "all servers that share this Redis are one; needs the packages redis and "
        "hiredis", shown=False)
    redis_key: str = _setting("philote", _TEXT, "the stream that they share there")
    read_buffer_size: int = _setting(
        1024, _SIZE, "bytes that are read at a time; 65536 where it is less")
    write_buffer_size: int = _setting(
        1024, _SIZE, "bytes that one publisher's messages may have before they are written, at "
        "first; more under load")
    check_origin: bool | tuple[str, ...] = _setting(
        False, _ORIGINS, "which web pages may connect: those from the same host, or listed as well")
    console: bool = _setting(
        True, _BOOLEAN, "whether a browser that asks for / gets a page to see what flows")
    ping_interval: float = _setting(25, _SECONDS, "seconds between heartbeats; 0 turns them off")
    request_timeout: float = _setting(
        10, _number(0.1, 86400, "a number of seconds", float),
        "seconds for a whole request, however its bytes drip")
    shutdown_timeout: float = _setting(10, _SECONDS, "seconds that a shutdown may take")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from variables named like the fields, in capitals.

        Raises SettingsError that lists all that are not allowed, a line each.
        """
        values, errors = {}, []
        for field in dataclasses.fields(cls):
            name = field.name.upper()
            if (text := environ.get(name)) is not None:
                try:
                    values[field.name] = field.metadata["parse"](text)
                except ValueError:
                    errors.append(_not_allowed(name, text, field.metadata["allowed"]))
        if errors:
            raise SettingsError("\n".join(errors))
        return cls(**values)

    def __post_init__(self) -> None:
        # A program may give "100" for 100, or a Path for a str.
        types: dict[Any, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}
        errors = [f"{field.name.upper()}: it must be {field.type}, not {type(value).__name__}"
                  for field in dataclasses.fields(Settings)
                  if not isinstance(value := getattr(self, field.name),
                                    types.get(field.type, (bool, tuple)))]
        if errors:
            raise SettingsError("\n".join(errors))

    @property
    def protected(self) -> bool:
        """Whether neither SECRET nor PUBLIC_KEYS is set, so that the empty secret signs tokens.

        Anybody can make one then, so the server protects itself, see check_local().
        """
        return not self.secret and not self.public_keys

    @property
    def max_pending(self) -> int:
        """How many connections may be anything but subscribers at a time, see Admission."""
        return max(64, self.max_connections)


def _not_allowed(name: str, value: str, allowed: str) -> str:
    secret = name in ("SECRET", "OLD_SECRET", "PUBLIC_KEYS", "REDIS_URL", "TLS_CERT", "TLS_KEY")
    shown = "what is set" if secret else repr(value[:80])
    return f"{name}: {shown} is not allowed; it takes {allowed}"


# -------------------------------------------------------------------------------------- access keys
# A JSON Web Token (RFC 7519) says which channels its bearer may read and write. It is signed with
# the server's secret, or by an identity provider of whom the server knows the public keys.
#
#     HEADER.CLAIMS.SIGNATURE, each in base64url
#       |       |        '--- of what stands before it, by the algorithm that the header names
#       |       '--- {"read": ["news"], "write": [], "exp": 1700000000, "sub": "alice"}
#       '--- {"alg": "HS256"}, with a "kid" where one of several keys is meant
#
# All of it is the client's word until the signature is verified, the name of the algorithm too. So
# that name only selects among the keys that the server has (Keyring), and each key is for the
# algorithms of its own kind. PyJWT verifies the signature and the times; then _access_key() checks
# the form of the claims, which PyJWT does not know, or takes in other forms too: "1700000000" for
# `exp`. A token is decoded once for each request, into an AccessKey. A subscriber keeps that, and
# is disconnected when it expires.

MAX_TOKEN_SIZE = 8192  # bytes; a longer one is refused before any work is spent on it
_END_OF_TIME = 253402300799  # the end of the year 9999; a far larger integer fits no float
_HMAC = "HS256", "HS384", "HS512"
_HMAC_LENGTHS = 43, 64, 86  # characters of their signatures
_RSA = "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"
_CURVES = {"secp256r1": ("ES256",), "secp384r1": ("ES384",), "secp521r1": ("ES512",)}
_PUBLIC = *_RSA, "ES256", "ES384", "ES512", "EdDSA"
_Wait = Callable[[float, threading.Event], Any]  # waits so many seconds, or until the event is set
# A fetch asks an identity provider for its keys. All times are in seconds.
_FETCH_TIME = 5  # that a token waits for one; also its timeout for each wait, and for the body
_LONGEST_FETCH = 60  # after which another may begin, though the provider draws this one out
_FETCH_PAUSE = 60  # from the beginning of one to that of the next
_KEYS_TIME = 300  # after which there is another, though the keys of all tokens are known
_MAX_KEYS_SIZE = 1 << 20  # bytes


class TokenError(Exception):
    """A token that lets nobody in; its text says why.

    Where `retry_after` is not 0, the token may be good: its key cannot be looked up now, but may be
    known after so many seconds.
    """

    def __init__(self, reason: str, retry_after: int = 0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Names(frozenset[str]):
    """Names of channels and patterns: "chat.*" is all channels that begin with "chat."."""

    @functools.cached_property
    def prefixes(self) -> tuple[str, ...]:
        """What the patterns' channels begin with."""
        return tuple(name[:-1] for name in self if name.endswith("*"))

    def cover(self, name: str) -> bool:
        """Whether a channel, or all that a pattern stands for, is among them."""
        # A pattern is compared without its star: "a*" covers "ab*", but "a**", which is all that
        # begin with "a*", does not cover "a*".
        return name in self or name.removesuffix("*").startswith(self.prefixes)


_NO_NAMES = Names()


class AccessKey(NamedTuple):
    """What a token allows."""

    read: Names = _NO_NAMES
    write: Names = _NO_NAMES
    expires: float | None = None  # seconds since the epoch
    api: bool = False  # whether it may see what the server is doing, and end connections
    user: str = ""  # who bears it, as other clients are told

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and time.time() >= self.expires

    def may_read(self, channel: str) -> bool:
        """Whether its bearer may subscribe to a channel or pattern."""
        return self.read.cover(channel)

    def may_write(self, channel: str) -> bool:
        """Whether its bearer may publish to a channel."""
        return self.write.cover(channel)


def _signing_key(secret: str) -> bytes:
    # HMAC pads its key with zero bytes (RFC 2104, section 2), so this changes no signature; but
    # PyJWT refuses the empty key, which is the default that the original's clients sign with, and
    # warns of a short one at every use.
    return secret.encode("utf-8", "surrogateescape").ljust(64, b"\0")


def new_token(secret: str, read: Iterable[str] = (), write: Iterable[str] = (),
              expires_in: float | None = None, api: bool = False, user: str = "", *,
              claim: str = "", audience: str = "", issuer: str = "") -> str:
    """Make a token for the channels `read` and `write`; `chat.*` is all that begin with `chat.`.

    It is valid for `expires_in` seconds (None: for ever). `api` opens /api/info, /metrics and
    /api/connections too. `user` is who bears it: those who ask for ids are told beside each
    message. The last three are for a server that has these settings.
    """
    if isinstance(read, str) or isinstance(write, str) or not isinstance(user, str):
        raise TypeError("read and write are lists of channels, and user is a string")
    rights: dict[str, Any] = {"read": list(read), "write": list(write)}
    if api:
        rights["api"] = True
    claims: dict[str, Any] = {claim: rights} if claim else rights
    if expires_in is not None:
        claims["exp"] = math.ceil(time.time() + expires_in)
    about = {"sub": user, "aud": audience, "iss": issuer}
    claims |= {name: value for name, value in about.items() if value}
    return jwt.encode(claims, _signing_key(secret), algorithm="HS256")


class Key(NamedTuple):
    """What a signature is verified with, and the algorithms that it is for."""

    key: Any
    algorithms: Sequence[str]


class _PreparedHMAC(jwt.algorithms.HMACAlgorithm):
    def prepare_key(self, key: Any) -> Any:
        """Return the key: _Secret has checked it once, PyJWT's own method would at each token."""
        return key


class _Secret(jwt.PyJWK):
    """A secret for one algorithm. Raises SettingsError for a public key, a certificate or a JWK.

    Where PyJWT is given bare bytes it looks for these at each token, for a third of its time. A
    PyJWK brings the algorithm that prepares its key: here one that does not look again. Of a PyJWK
    this has only the three attributes that PyJWT reads; there is no JWK.
    """

    def __init__(self, secret: str, name: str) -> None:
        self.algorithm_name = name
        self.Algorithm = _PreparedHMAC(getattr(hashlib, "sha" + name[2:]))
        try:
            self.key = _signing_key(_parse_secret(secret))
        except ValueError:
            raise SettingsError(f"SECRET, OLD_SECRET: a secret is {_SECRET.allowed}") from None


def _public_key(key: Any) -> Key:
    # The algorithms follow from the kind of the key; what comes with it, as a JWK's `alg`, can only
    # take some away (_read_key_set). A key that is too weak, private or secret is for none.
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

    if isinstance(key, rsa.RSAPublicKey):
        return Key(key, _RSA if key.key_size >= 2048 else ())  # RFC 7518, section 3.3
    if isinstance(key, ec.EllipticCurvePublicKey):
        return Key(key, _CURVES.get(key.curve.name, ()))
    is_edwards = isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey))
    return Key(key, ("EdDSA",) if is_edwards else ())


def read_public_keys(path: str) -> list[Key]:
    """Read a file of public keys and certificates in PEM (RFC 7468). Raises SettingsError."""
    from cryptography import exceptions, x509
    from cryptography.hazmat.primitives import serialization

    keys: list[Key] = []
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_KEYS_SIZE + 1)
    except OSError as error:
        raise SettingsError(f"PUBLIC_KEYS: cannot read {path!r}: {error.strerror}") from None
    if len(text) > _MAX_KEYS_SIZE:
        raise SettingsError(f"PUBLIC_KEYS: {path!r} has more than {_MAX_KEYS_SIZE} bytes")
    for part in re.split(b"(?=-----BEGIN )", text)[1:]:
        try:
            if part.startswith(b"-----BEGIN CERTIFICATE"):
                key = _public_key(x509.load_pem_x509_certificate(part).public_key())
            else:
                key = _public_key(serialization.load_pem_public_key(part))
        except (ValueError, exceptions.UnsupportedAlgorithm, x509.InvalidVersion):
            key = Key(None, ())
        if not key.algorithms:
            raise SettingsError(
                f"PUBLIC_KEYS: number {len(keys) + 1} in {path!r} is no certificate or public key "
                "of RSA (2048 bits or more), P-256, P-384, P-521, Ed25519 or Ed448")
        keys.append(key)
    if not keys:
        raise SettingsError(f"PUBLIC_KEYS: there is no public key or certificate in {path!r}")
    return keys


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Return no request, so urllib raises HTTPError: it might lead to a URL without TLS."""


class Provider:
    """An identity provider, which publishes its public keys as a JWKS (RFC 7517, section 5).

    PyJWT has a client for that. But with it all tokens wait while keys are fetched; and if the
    provider is away when they are 5 minutes old, all are refused, and each makes another fetch.
    Here a separate thread fetches, at most once in _FETCH_PAUSE (but for a SIGHUP). Only a token
    whose key is not known waits for that. Keys stay good until the next ones are there.
    """

    def __init__(self, url: str) -> None:
        self.url, self.name = url, url.partition("?")[0]  # what follows may be secret
        self.keys: dict[str, Key] = {}  # by id; replaced as a whole
        self.problem = ""  # why the last fetch brought no keys
        # Guards each change of the next four. Where an older value does no harm, they are read
        # without it.
        self.lock = threading.Lock()
        self.under_way: threading.Event | None = None  # a fetch, set at its end
        self.begun = -math.inf  # when it began; these are points of the monotonic clock
        self.due = -math.inf  # when the next may begin
        self.fetched = -math.inf  # when the last that brought keys had begun

    def find(self, kid: str, wait: _Wait) -> Key:
        """Find a key by its id. Raises TokenError."""
        # `fetched` is read before the keys, both times, and _run() sets it after them: so the keys
        # that are read here are at least as new as it says.
        now, fetched = time.monotonic(), self.fetched
        if key := self.keys.get(kid):
            self.fetch(now, fetched + _KEYS_TIME)  # the provider may have taken this one back
            return key
        if under_way := self.fetch(now):
            wait(_FETCH_TIME, under_way)
        fetched = self.fetched
        if key := self.keys.get(kid):  # or a fetch has ended before we asked for one
            return key
        if fetched >= now:  # one that began before may not have seen the newest key
            raise TokenError("the token's key (kid) is not among those of PUBLIC_KEYS")
        again = math.ceil(max(1, self.due - time.monotonic()))
        raise TokenError("the token's key (kid) is not known; the keys of PUBLIC_KEYS are fetched "
                         f"again in {again} seconds at the earliest", again)

    def fetch(self, now: float, due: float = -math.inf) -> threading.Event | None:
        """Begin to fetch the keys, from `due` on; returns what is set at the end of a fetch."""
        with self.lock:
            # urllib's timeout is for each wait for bytes. A provider that sends the head of its
            # answer byte by byte never exceeds that, and no other fetch would begin.
            given_up = now > self.begun + _LONGEST_FETCH
            if now >= max(due, self.due) and (given_up or not self.under_way):
                self.begun, self.due = now, now + _FETCH_PAUSE
                self.under_way = threading.Event()
                try:
                    # Why not threading.Thread, see Server._start_thread().
                    _thread.start_new_thread(self._run, (now, self.under_way))
                except (RuntimeError, MemoryError):  # no more threads
                    self.under_way = None
            return self.under_way

    # The thread that fetches

    def _run(self, begun: float, under_way: threading.Event) -> None:
        try:
            keys = _read_key_set(self._fetch())
            if not any(key.algorithms for key in keys.values()):
                raise ValueError("none of them is a public key that can be used")
            with self.lock:
                if self.under_way is not under_way:  # fetch() has begun another
                    raise ValueError("it took too long")
                self.keys, self.fetched, self.problem = keys, begun, ""  # in this order, see find()
            log.info("PUBLIC_KEYS: %d keys from %s", len(keys), self.name)
        except Exception as error:
            self.problem = _on_one_line(str(error)[:200]) or type(error).__name__
            log.warning("PUBLIC_KEYS: no keys from %s, those of before stay valid: %s",
                        self.name, self.problem)
        finally:
            with self.lock:
                if self.under_way is under_way:
                    self.under_way = None
            under_way.set()

    def _fetch(self) -> bytearray:
        # http:// is allowed for this machine alone, see _parse_keys(). A proxy (HTTP_PROXY) would
        # ask its own localhost, and its answer could come from anybody.
        direct = [urllib.request.ProxyHandler({})] if self.url.lower().startswith("http:") else []
        opener, body = urllib.request.build_opener(_NoRedirects, *direct), bytearray()
        opener.addheaders = [("User-Agent", f"philote/{__version__}")]
        end = time.monotonic() + _FETCH_TIME
        with opener.open(self.url, timeout=_FETCH_TIME) as response:
            while part := response.read1(_FULL_READ):
                body += part
                if len(body) > _MAX_KEYS_SIZE or time.monotonic() > end:
                    raise ValueError(f"more than {_MAX_KEYS_SIZE} bytes, or {_FETCH_TIME} seconds")
        return body


def _read_key_set(text: bytearray) -> dict[str, Key]:
    # By id. A key of a kind that we do not know, or that is broken, is passed over for the sake of
    # the others (RFC 7517, section 5).
    from cryptography.exceptions import UnsupportedAlgorithm

    keys = {}
    for jwk in json.loads(text)["keys"]:
        with contextlib.suppress(jwt.PyJWTError, ValueError, TypeError, AttributeError, KeyError,
                                 NotImplementedError, UnsupportedAlgorithm):
            kid, key = jwk.get("kid"), _public_key(jwt.PyJWK(jwk).key)
            if (kid and jwk.get("use") in (None, "sig")
                    and "verify" in (jwk.get("key_ops") or ["verify"])):  # null or [] says nothing
                only = jwk.get("alg")  # the one that it is said to be for (RFC 8725, section 3.1)
                keys[kid] = key if only is None else Key(
                    key.key, [name for name in key.algorithms if name == only])
    return keys


class Keyring:
    """All that tokens may be signed with, by the settings. Raises SettingsError, ImportError.

    Each key is for the algorithms of its own kind, whatever algorithm a token names. Else anybody
    could sign by HMAC, with the text of a public key for the secret (RFC 8725, section 2.1).
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.public_keys: list[Key] = []  # of the file; replaced as a whole
        self.provider: Provider | None = None
        if settings.old_secret and not settings.secret:
            raise SettingsError("OLD_SECRET: it is let in only beside a SECRET")
        # Without any key of ours the empty secret verifies, as the original's clients sign with it.
        # Beside public keys it must not, for everybody knows it.
        secrets = filter(None, [settings.secret, settings.old_secret])
        self.secrets = [Key(_Secret(secret, name), [name])
                        for secret in ([""] if settings.protected else secrets) for name in _HMAC]
        # Where there is one secret and nothing else, the length of a signature tells the algorithm,
        # and so the key: the header need not be read first, which takes 11 us, and half of all the
        # time where the token is long.
        self.usual = dict(zip(_HMAC_LENGTHS, self.secrets)) if (
            len(self.secrets) == len(_HMAC) and not settings.public_keys) else {}
        # PyJWT refuses a token that has `aud` unless it is told which one to expect, and a `sub` or
        # `jti` that is no string. The original's clients may send these with any value: so aud and
        # iss are verified only where the settings name one, sub and jti never.
        self.verify: Callable[..., dict[str, Any]] = functools.partial(
            jwt.decode, audience=settings.audience or None, issuer=settings.issuer or None,
            options={"verify_aud": bool(settings.audience), "verify_iss": bool(settings.issuer),
                     "verify_sub": False, "verify_jti": False})
        if settings.public_keys and not jwt.algorithms.has_crypto:
            raise ImportError("PUBLIC_KEYS needs one more package; install it with: "
                              "pip install cryptography")
        if "://" in settings.public_keys:
            self.provider = Provider(settings.public_keys)
        else:
            self.reload()

    def reload(self) -> None:
        """Read the public keys again. Raises SettingsError, and goes on with those of before."""
        if self.provider:
            with self.provider.lock:
                self.provider.due = -math.inf
            self.provider.fetch(time.monotonic())
        elif self.settings.public_keys:
            self.public_keys = read_public_keys(self.settings.public_keys)

    def decode(self, token: str,
               wait: _Wait = lambda seconds, event: event.wait(seconds)) -> AccessKey:
        """Verify a token's signature and claims (RFC 7519, section 4.1). Raises TokenError.

        `wait` is called where that has to wait for an identity provider.
        """
        if len(token) > MAX_TOKEN_SIZE:
            raise TokenError(f"the token is longer than {MAX_TOKEN_SIZE} bytes")
        try:
            claims = self._verify(token, wait)
        except jwt.ExpiredSignatureError:
            raise TokenError("the token has expired") from None
        except jwt.ImmatureSignatureError:
            raise TokenError("the token is not valid yet") from None
        except (jwt.InvalidAudienceError, jwt.InvalidIssuerError, jwt.MissingRequiredClaimError):
            raise TokenError("the token is for another server, or from another issuer (AUDIENCE, "
                             "ISSUER)") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            # PyJWT lets all these out; an exp of Infinity overflows in its version 2.14.
            known = "secret or public keys" if self.settings.public_keys else "secret"
            raise TokenError("the token is malformed, or not signed with this server's "
                             + known) from None
        return self._access_key(claims)

    def _verify(self, token: str, wait: _Wait) -> dict[str, Any]:
        if key := self.usual.get(len(token) - token.rfind(".") - 1):
            with contextlib.suppress(jwt.InvalidAlgorithmError):  # made by another algorithm
                return self.verify(token, *key)
        for key in self._find_keys(jwt.get_unverified_header(token), wait):
            with contextlib.suppress(jwt.InvalidSignatureError):
                return self.verify(token, *key)
        raise jwt.InvalidSignatureError

    def _find_keys(self, header: Mapping[str, Any], wait: _Wait) -> list[Key]:
        algorithm, keys = header.get("alg"), self.secrets + self.public_keys
        if self.provider and algorithm in _PUBLIC:
            if not header.get("kid"):
                raise TokenError("the token names no key (kid) of PUBLIC_KEYS")
            keys = [self.provider.find(header["kid"], wait)]
        if keys := [key for key in keys if algorithm in key.algorithms]:
            return keys
        raise TokenError(f"the token is signed by {_shown(algorithm)}, and no key is for that")

    def _access_key(self, claims: dict[str, Any]) -> AccessKey:
        for name in ("exp", "nbf", "iat"):
            if name in claims and type(claims[name]) not in (int, float):
                raise TokenError(f"the token's claim {name} must be a number")
        expires = min(claims["exp"], _END_OF_TIME) if "exp" in claims else None
        claim, user = self.settings.claim, claims.get("sub")
        rights = claims.get(claim) if claim else claims
        if not isinstance(rights, dict):
            raise TokenError(f"the token's claim {claim} must be an object (CLAIM)")
        return AccessKey(_channel_names(rights, "read"), _channel_names(rights, "write"), expires,
                         rights.get("api") is True, user if isinstance(user, str) else "")


def _channel_names(claims: dict[str, Any], name: str) -> Names:
    names = claims.get(name)
    if names is None:
        return _NO_NAMES
    if not isinstance(names, list) or not all(map(_is_name, names)):
        raise TokenError(f"the token's claim {name} must be a list of channel names")
    return Names(names) if names else _NO_NAMES


# ----------------------------------------------------------------------------------------- messages
# JSON in, JSON out. These functions are pure.
#
# A message's data is decoded, to know that it is JSON, and encoded anew, once for all who receive
# it. So nothing reaches another client just as its publisher wrote it. A key that came twice, of
# which two parsers may take different values, goes out once. NaN is refused. Half of a surrogate
# pair goes out as an escape: UTF-8 cannot hold it, and a frame with it would end the connection of
# each client that reads it.

class Refused(ValueError):
    """A message or request that is dropped; its text says why, its code is for programs.

    The code is also the name of the counter in Connection.
    """

    def __init__(self, reason: str, code: str = "bad_message") -> None:
        super().__init__(reason)
        self.code = code


class Message(NamedTuple):
    """A message as a subscriber receives it."""

    issuer: str  # the connection that published it, a UUID
    channel: str
    data: Any  # any JSON value
    id: str = ""  # where it stands in the log; empty for who did not ask for ids
    user: str = ""  # who published it, where the token said so


_MAX_REF_SIZE = 64  # characters
_MAX_LAST = 10_000  # messages of each channel
# Levels of nesting, which the json module goes through by recursion in C. CPython 3.11 stops below
# 1,000; 3.13 at 10,000, where the encoder would need more stack than a thread has.
_MAX_DEPTH = 800


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError  # the library takes NaN and Infinity, RFC 8259 does not


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)
# What was decoded from JSON has no circle: to look for one takes a fifth of the time.
_encoder = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))
_quote, _quote_ascii = json.encoder.encode_basestring, json.encoder.encode_basestring_ascii


def decode_json(text: str) -> Any:
    """Decode JSON text from outside. Raises Refused, whatever the text holds."""
    try:
        # Half of decode()'s time goes into a look for white space around it.
        value, end = _decoder.raw_decode(text) if text[:1] == "{" else (None, -1)
        if end != len(text):
            value = _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise Refused(f"not JSON: {error}") from None
    except (ValueError, RecursionError):  # a number of 5,000 digits, NaN; 200,000 brackets
        raise Refused(
            "not JSON that can be read: a number too long, a nesting too deep, or NaN") from None
    if (len(text) > _MAX_DEPTH and text.count("[") + text.count("{") > _MAX_DEPTH
            and _is_too_deep(value)):
        raise Refused(f"JSON may be nested to {_MAX_DEPTH} levels")
    return value


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level
                 for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def check_message(value: Any, has_escapes: bool = True) -> tuple[str, str]:
    """Take (channel, data in JSON) from a decoded message. Raises Refused.

    `has_escapes` is whether there is a backslash in the JSON that it was decoded from. Without one,
    no string in it holds what has to be escaped, and to look for that takes 2 ns a character.

    Keys are matched exactly first, then whatever their case, as Go's encoding/json does: the
    original's Go client sends "Channel" and "Data". Missing or null data is "", as is the empty
    string: it is left out of what subscribers get, as Go's omitempty does.
    """
    if type(value) is not dict:
        raise Refused(f"a message is a JSON object, not {_shown(value)}")
    if "channel" not in value or "data" not in value:
        value = {**{key.lower(): value[key] for key in value}, **value}
    channel, data = value.get("channel"), value.get("data")
    if type(channel) is not str or not channel:
        raise Refused(f"channel must be a string that is not empty, not {_shown(channel)}")
    if has_escapes and not _is_encodable(channel):
        raise Refused(f"{_shown(channel)} holds half of a surrogate pair, which no URL can name")
    if channel[-1] == "*":
        raise Refused(f"{_shown(channel)} is a pattern; a message has one channel")
    if type(data) is str:
        return channel, data and (_quoted(data) if has_escapes else f'"{data}"')
    if data is None:
        return channel, ""
    try:
        text = _encoder.encode(data)
        return channel, text if _is_encodable(text) else json.dumps(data, separators=(",", ":"))
    except (RecursionError, ValueError):  # the latter for 1e999, which is Infinity to most
        raise Refused("data is nested too deep, or holds a number too large") from None


def check_ref(ref: Any) -> str:
    """Check a message's `ref`, which the answer to it repeats. Raises Refused."""
    if type(ref) is not str or len(ref) > _MAX_REF_SIZE:
        raise Refused(f"ref must be a string of up to {_MAX_REF_SIZE} characters")
    return ref


def check_names(names: Any) -> list[str]:
    """Take the channels and patterns of a subscription. Raises Refused."""
    if type(names) is not list or not all(map(_is_name, names)):
        raise Refused("channels are a list of strings that are not empty, in Unicode")
    return list(dict.fromkeys(names))


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):  # may be large, or nested as deep as can be
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _is_encodable(text: str) -> bool:
    # A lone surrogate can stand in JSON as an escape, but not in UTF-8.
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _is_name(value: Any) -> bool:
    return type(value) is str and value != "" and _is_encodable(value)


def _quoted(text: str) -> str:
    return _quote(text) if _is_encodable(text) else _quote_ascii(text)


# ------------------------------------------------------------------------------------------- frames
# RFC 6455, section 5. What a client sends:
#
#     1 byte        1 byte          0, 2 or 8 bytes    4 bytes    `size` bytes
#     FIN, RSV,     MASK = 1,       size               masking    payload, masked
#     opcode        short size                         key
#
# The short size is the size up to 125; 126 and 127 say that it stands behind, in 2 or 8 bytes. What
# the server sends has no mask, so one encoded frame serves all subscribers.
#
# What clients send is taken apart here, messages, fragments and pings alike; wsproto's parser takes
# 25 to 50 us for each frame, which is 4 times what a whole message takes here, and lets one client
# that sends empty frames occupy the server. Frames that are broken, and close frames, are left as
# they came for simple-websocket, which judges and answers them.

# Our own close codes (section 7.4.2): the token expired; an operator ended the connection.
EXPIRED, ENDED = 4401, 4403
_WHOLE_TEXT, _WHOLE_CLOSE = 0x80 | Opcode.TEXT, 0x80 | Opcode.CLOSE  # first bytes of frames
_XOR = [bytes(a ^ b for a in range(256)) for b in range(256)]  # _XOR[b][a], for bytes.translate()


class FrameError(ValueError):
    """Frames that end their connection, with a close code and a reason of ASCII."""

    def __init__(self, code: CloseReason, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Frame(NamedTuple):
    """Any frame that is no text message: binary message, ping, pong, or a part of a message."""

    opcode: int
    payload: bytes


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """Encode a whole, unmasked frame (RFC 6455, section 5.2)."""
    return encode_frames(opcode, [payload])


def encode_frames(opcode: int, payloads: Iterable[bytes]) -> bytes:
    """Encode many frames. In one loop: a call for each would be half of all the time spent."""
    parts, first = list[bytes](), 0x80 | opcode
    for payload in payloads:
        size = len(payload)
        head = (bytes((first, size)) if size < 126
                else struct.pack("!BBH", first, 126, size) if size < 65536
                else struct.pack("!BBQ", first, 127, size))
        parts += head, payload
    return b"".join(parts)


def encode_answer(value: Mapping[str, Any], ref: str | None = None) -> bytes:
    """Encode a text frame of what the server itself tells, with the `ref` that the client gave."""
    text = json.dumps(value if ref is None else {**value, "ref": ref})
    return encode_frame(Opcode.TEXT, text.encode())


def unmask(mask: bytes, payload: bytes) -> bytes:
    """Apply a masking key of 4 bytes (RFC 6455, section 5.3)."""
    size = len(payload)
    if size > 1000:  # from about here on this is faster: four strides, each by a table
        masked = bytearray(payload)
        for i in range(4):
            masked[i::4] = masked[i::4].translate(_XOR[mask[i]])
        return bytes(masked)
    # one exclusive or of two very long integers
    words = size + 3 >> 2
    plain = int.from_bytes(payload, "little") ^ int.from_bytes(mask * words, "little")
    return plain.to_bytes(4 * words, "little")[:size]


# By the short size: the size of the head, mask included; and the least size that may be written so,
# for a size must be written in its shortest form.
_HEAD_SIZE = [6] * 126 + [8, 14]
_LEAST = [0] * 126 + [126, 65536]


def _is_well_formed(first: int, second: int, size: int) -> bool:
    """Whether a head is in order: reserved bits, mask, opcode, length in its shortest form."""
    if first & 0x70 or not second & 0x80 or first & 15 not in (0, 1, 2, 8, 9, 10):
        return False
    if first & 8 and (not first & 0x80 or size > 125):  # a control frame (section 5.5)
        return False
    return _LEAST[second & 0x7F] <= size < 1 << 63


class _Fragments:
    """The message whose fragments are under way (RFC 6455, section 5.4)."""

    def __init__(self) -> None:
        self.opcode = 0  # of the first of them; 0 where there is none
        self.payload = bytearray()

    def add(self, first: int, payload: bytes) -> str | Frame:
        """Add a fragment; returns the message behind the last. Raises FrameError.

        For each fragment before the last, it returns an empty frame, which the peer is charged for.
        `first` is the first byte of the frame.
        """
        if bool(first & 15) is bool(self.opcode):  # a message inside another, or a part of none
            raise FrameError(CloseReason.PROTOCOL_ERROR, "fragments out of order")
        self.opcode = self.opcode or first & 15
        self.payload += payload
        if not first & 0x80:
            return Frame(Opcode.CONTINUATION, b"")
        opcode, message = self.opcode, bytes(self.payload)
        self.opcode, self.payload = 0, bytearray()
        return _decode(message) if opcode == Opcode.TEXT else Frame(Opcode.BINARY, message)


def _decode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise FrameError(CloseReason.INVALID_FRAME_PAYLOAD_DATA, "text not UTF-8") from None


def read_frames(max_message_size: int) -> Generator[str | Frame | bytes | None, bytes, NoReturn]:
    """Take a client's bytes apart; a coroutine without any input or output of its own.

    It yields a str for a text message, a Frame for any other frame that is in order, bytes for
    what simple-websocket has to judge (all from a broken frame on, which is the end, or one close
    frame), and None when it needs more bytes. Raises FrameError.

        next() -> None         once, to begin
        send(bytes) -> item    next() -> item ... next() -> None: all is used up, send() again
    """
    # The frame under way begins at `at`, its payload at `body`; the four bytes before that are the
    # masking key.
    data, at, fragments = b"", 0, _Fragments()
    while True:
        have = len(data) - at
        second = data[at + 1] if have >= 2 else 0  # the shortest head, until it has come
        body = at + _HEAD_SIZE[second & 0x7F]
        if have < body - 4 - at:  # all but the mask, which is not needed to judge
            rest, data, payload = data[at:], b"", b""  # nothing big is held while it waits
            data, at = rest + (yield None), 0
            continue
        first, size = data[at], second & 0x7F
        if size >= 126:
            size = int.from_bytes(data[at + 2:body - 4], "big")
        # What follows a broken frame cannot be understood: all of it is the library's, which ends
        # the connection for what this head says. If it asks for more, that is the end. Most frames
        # are short text messages, and need no closer look.
        if not (first == _WHOLE_TEXT and 0x80 <= second < 0xFE) and not _is_well_formed(
                first, second, size):
            yield data[at:]
            while True:
                yield b""
        if not first & 8 and len(fragments.payload) + size > max_message_size:
            raise FrameError(CloseReason.MESSAGE_TOO_BIG, "message too big")
        start, at = at, body + size  # from here on, the frame is data[start:at]
        if at > len(data):  # it came in part
            buffer, data = bytearray(data[start:]), b""
            start, body, at = 0, body - start, at - start
            while len(buffer) < at:
                buffer += yield None
            data, buffer = bytes(buffer), bytearray()
        if first == _WHOLE_CLOSE:
            yield data[start:at]
            continue
        payload = unmask(data[body - 4:body], data[body:at])
        if first & 8:
            yield Frame(first & 15, payload)
        elif first == _WHOLE_TEXT and not fragments.opcode:
            yield _decode(payload)
        else:
            yield fragments.add(first, payload)


# ---------------------------------------------------------------------------------------- transport
# Bytes to and from a socket. Here is the reason why a flood on one connection delays the others
# little.
#
# Each call of a method of `socket` lets go of the interpreter's lock (the GIL; a free-threaded
# CPython has none). A message to 200 subscribers is 200 such calls, and after each of them another
# busy thread may keep the lock for a whole switch interval: one client that sent pings without end
# raised the median time of such a message from 0.7 to 1,560 ms (CPython 3.11, interval 25 ms). But
# these calls never wait, and take 3 us each. So they are made without letting go, by ctypes.PyDLL.
# Then the median is 28 ms, and 2.6 with the interval of 0.5 ms that SwitchInterval sets. The calls
# that end a connection are made so, too, for thousands may end at once. Where there is no ctypes,
# the methods of `socket` do the same work.

_DONTWAIT = socket.MSG_DONTWAIT
_BUFFERS_PER_WRITE = 64  # in one system call; every system has room for more (IOV_MAX is 1024)
_LARGEST_HELD_SEND = 32768  # bytes; to copy more takes so long that others may have the lock
_FULL_READ = 65536  # bytes
_LARGE_READ = 4096  # bytes; who sends so much at a time takes turns, see Server.take_turn()

try:
    import ctypes

    # Without argtypes, which would take 0.5 us more where a call takes 1.1. So ctypes passes whole
    # numbers as C's int, also the size, which is a size_t: libffi widens it as the machine needs.
    _system = ctypes.PyDLL(None)
    _send: Callable[..., int] = _system.send
    _recv: Callable[..., int] = _system.recv
    _close: Callable[..., int] = _system.close
    _make_buffer = functools.partial(ctypes.create_string_buffer, _FULL_READ)

    def _end(sock: socket.socket, how: int) -> None:
        _system.shutdown(sock.fileno(), how)
except (ImportError, OSError, AttributeError):  # pragma: no cover
    def _send(*_: object) -> int:
        return -1  # that is what they return for an error; the methods of `socket` are tried then

    def _end(sock: socket.socket, how: int) -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(how)

    _recv, _close, _make_buffer = _send, socket.close, bytearray  # type: ignore[assignment]
    _system = None  # type: ignore[assignment]

# Buffers to read into; a thread that waits holds none. deque.append and deque.pop are thread-safe.
_buffers: collections.deque[Any] = collections.deque(maxlen=8)


class Transport:
    """A socket: read by one thread, written by any. wait() blocks, and no other method does.

    `descriptor` is a bare number. Once the socket is closed, the system gives it to another
    connection, where a late write would reach a stranger. So Connection sends and closes under its
    lock, and sends nothing behind the close. receive(), which writes where TLS has something to
    answer, is called by the connection's own thread, before it closes.
    """

    __slots__ = ("sock", "descriptor", "is_unix")
    # Bytes that send() has begun to write, but not counted as sent: its next call must begin with
    # the same. Only TLS owes any.
    owed = 0

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.descriptor = sock.fileno()
        self.is_unix = sock.family == socket.AF_UNIX

    def wait(self) -> None:
        """Wait until there is something to read, or the end.

        The bytes stay in the socket, to be taken by receive() when the connection is marked as
        busy: why in this order, see Connection.read().
        """
        self.sock.recv(1, socket.MSG_PEEK)

    def receive(self, size: int) -> bytes | None:
        """Read what has come, at most `size` bytes; b"" is the end, None that nothing has come."""
        # With bytes over a Unix socket, a peer may send descriptors. The call that takes the bytes,
        # or the close that leaves them unread, closes these too, and that may wait (SO_LINGER). So
        # both calls let go of the interpreter's lock there.
        if size <= _FULL_READ and not self.is_unix:
            try:
                buffer = _buffers.pop()
            except IndexError:
                buffer = _make_buffer()
            count = _recv(self.descriptor, buffer, size, _DONTWAIT)
            data: bytes = buffer[:max(count, 0)]
            _buffers.append(buffer)
            if count >= 0:
                return data
        try:
            # For more than a buffer holds; or again, as _recv says no more of an error than -1.
            return self.sock.recv(size, _DONTWAIT)
        except BlockingIOError:
            return None

    def send(self, data: bytes) -> int:
        """Write what the socket takes at once; returns how many bytes. Raises OSError."""
        if len(data) <= _LARGEST_HELD_SEND:
            sent = _send(self.descriptor, data, len(data), _DONTWAIT)
            if sent >= 0:
                return sent
        try:
            return self.sock.send(data, _DONTWAIT)  # what is larger; or again, as in receive()
        except BlockingIOError:
            return 0

    def send_all(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Write as send() does, from many buffers in one system call."""
        try:
            return self.sock.sendmsg(buffers, (), _DONTWAIT)
        except BlockingIOError:
            return 0

    def set_tcp(self, option: int, value: int) -> None:
        """Set an option of TCP, where this is TCP."""
        if not self.is_unix:
            self.sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def unacknowledged(self) -> int:
        """How many bytes were written that the peer's system has not acknowledged."""
        return self._count(termios.TIOCOUTQ)

    def unread(self) -> int:
        """How many bytes have come that were not read."""
        return self._count(termios.FIONREAD)

    def _count(self, what: int) -> int:
        try:
            return int.from_bytes(fcntl.ioctl(self.sock, what, bytes(4)), sys.byteorder)
        except (OSError, ValueError):  # the latter where it is closed
            return 0

    def end_output(self) -> None:
        """Send our end of the connection (FIN)."""
        _end(self.sock, socket.SHUT_WR)

    def end(self) -> None:
        """End both directions, which wakes the thread that waits (a close would not)."""
        _end(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back to the system."""
        if self.is_unix:
            self.sock.close()  # see receive()
        elif (descriptor := self.sock.detach()) >= 0:
            _close(descriptor)


_RECORD = 16384  # bytes in one record of TLS (RFC 8446, section 5.1)
_MOST_ENCRYPTED = 65536  # bytes that are encrypted before the socket has taken them
_MOST_REPLIES = 65536  # bytes of answers to a peer's TLS, which it provokes and does not read
_TLS_ONLY = b'{"error":"tls","reason":"this port speaks TLS: https:// or wss://"}'
_NO_TLS = (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
           b"Content-Length: %d\r\n\r\n%b" % (len(_TLS_ONLY), _TLS_ONLY))


class TLSTransport(Transport):
    """TLS over a socket (RFC 8446), for a server, or for a client that gives the server's name.

    Threads that share a TLS object corrupt its stream or wait for each other. So each call of it is
    made under one lock, and none of them waits: it reads and writes memory. What came is decrypted
    as a whole, so nothing is left that wait() would not see. What is sent is encrypted a piece at a
    time, when the socket has taken the one before. So what a peer does not read waits in the queue
    of its connection: counted, and as plain text, of which all subscribers share one copy.

    What is encrypted cannot be taken back. A piece counts as sent once all of its record is
    written; until then the caller still has it, and begins each call with the same bytes:

        the queue of the connection    [######## owed ########|......... plain .........]
                                          its record is in `encrypted`, partly written

    The handshake is part of receive().
    """

    __slots__ = ("lock", "incoming", "outgoing", "tls", "encrypted", "owed")

    def __init__(self, sock: socket.socket, context: ssl.SSLContext,
                 name: str | None = None) -> None:
        super().__init__(sock)
        self.lock = threading.Lock()  # guards what follows, and each write to the socket
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self.incoming, self.outgoing, server_side=name is None, server_hostname=name)
        self.encrypted = b""  # and not yet taken by the socket
        self.owed = 0

    def receive(self, size: int) -> bytes | None:
        """Read and decrypt what has come; None where no data was in it. Raises ssl.SSLError."""
        data = super().receive(min(size, 2 * _RECORD))
        # The end without that of TLS. OpenSSL is not told, or it would send nothing any more, and
        # the peer may have ended only its half. All that came before is decrypted already.
        if data == b"":
            return data
        parts: list[bytes] = []
        with self.lock:
            try:
                if data:
                    self.incoming.write(data)
                while part := self.tls.read(_RECORD):
                    parts.append(part)
            except ssl.SSLWantReadError:
                return b"".join(parts) or None
            except ssl.SSLError as error:
                if error.reason == "HTTP_REQUEST":
                    super().send(_NO_TLS)
                if not isinstance(error, ssl.SSLZeroReturnError):
                    raise
            finally:
                with contextlib.suppress(OSError):  # the next send() or wait() meets it again
                    self._write_encrypted()
                # What send() has encrypted is in `encrypted` by now: these are TLS's own answers.
                if self.outgoing.pending > _MOST_REPLIES:
                    raise ConnectionError("the peer does not read what its TLS provokes")
        # The peer has ended its TLS: nothing more is read, and the next wait() returns at once.
        _end(self.sock, socket.SHUT_RD)
        return b"".join(parts)

    def shake_hands(self, size: int) -> bool:
        """Begin or go on with the handshake of a client; returns whether it is done."""
        if self.receive(size) == b"":
            raise ConnectionResetError("the server closed the connection")
        with self.lock:
            return self.tls.version() is not None

    def send(self, data: bytes) -> int:
        """Encrypt and write what the socket takes at once; returns how many bytes of `data`."""
        with self.lock:
            # The common case: the last piece is written and counted. Where something is owed though
            # nothing encrypted is left, receive() has written the rest, and send_all() counts it.
            if not (self.encrypted or self.owed) and len(data) <= _MOST_ENCRYPTED:
                self.tls.write(data)
                encrypted = self.outgoing.read()
                sent = Transport.send(self, encrypted)
                if sent == len(encrypted):
                    return len(data)
                self.encrypted, self.owed = encrypted[sent:], len(data)
                return 0
        return self.send_all((data,))

    def send_all(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Write as send() does, from many buffers. What is `owed` must be the beginning of them."""
        sent = 0
        with self.lock:
            while self._write_encrypted():
                sent, self.owed = sent + self.owed, 0
                if not (data := _slice(buffers, sent, _MOST_ENCRYPTED)):
                    break
                self.owed = self.tls.write(data)
        return sent

    def end_output(self) -> None:
        """Send the end of our TLS, and of the connection."""
        with self.lock, contextlib.suppress(OSError):
            with contextlib.suppress(ssl.SSLError):  # the peer has not ended its own
                self.tls.unwrap()
            self._write_encrypted()
        super().end_output()

    def _write_encrypted(self) -> bool:
        # Returns whether the socket has taken all.
        while self.encrypted or self.outgoing.pending:
            self.encrypted = self.encrypted or self.outgoing.read()
            if not (sent := super().send(self.encrypted)):
                return False
            self.encrypted = self.encrypted[sent:]
        return True


def _slice(buffers: Sequence[bytes | memoryview], at: int, size: int) -> bytes | memoryview:
    """Take up to `size` bytes of what the buffers hold together, from `at` on."""
    parts = list[bytes | memoryview]()
    for buffer in buffers:
        if at < len(buffer) and size:
            parts.append(memoryview(buffer)[at:at + size])
            size -= len(parts[-1])
        at = max(0, at - len(buffer))
    return parts[0] if len(parts) == 1 else b"".join(parts)


# --------------------------------------------------------------------------------------- connection
# What every connection is made of, whichever protocol it speaks: its state, a queue in front of
# its socket, and a deadline. Whoever queues something writes it, in its own thread and without
# waiting: no thread is woken for the ordinary case. Only what a full socket did not take is left
# to the poller's thread, so a subscriber that does not read costs the others nothing.
#
#     put() --> pending ----------------> unsent ---------------------> socket
#               appended to without       [rest|bytes|bytes|...]        what it has room for
#               the lock, not counted     moved there under the lock,
#                                         counted in `size`
#
# A subscriber's data goes past `unsent` as long as the socket takes it all. Where it takes less,
# the rest goes to `unsent`, `full` is set, and the poller calls resume() when there is room. Until
# then flush() only moves what is pending to `unsent`, and ends a connection over the limit.

CLOSING_TIME = 3  # seconds that a peer has to answer our end of the connection with its own
_OVERHEAD = 64  # bytes that Python takes for an entry of a queue, beside its data
_SMALL = 1024  # bytes; smaller entries that wait are put together, as pongs of two bytes each
# Why something cannot be written. What was taken out of the queue is lost then, so the connection
# ends. The thread that writes is often another connection's, and goes on.
_FAILURES = OSError, MemoryError
# The empty queue that all connections share until something has to wait: one of its own would cost
# each 0.8 KiB. This one drops whatever is put in (maxlen 0), so that no mistake could bring it to
# another connection.
_NOTHING: collections.deque[bytes | memoryview] = collections.deque(maxlen=0)


class State(enum.Enum):
    """The life of a connection.

    READING -----> ANSWERING -----> SUBSCRIBED        its thread goes this way, and back to READING
       |     <-----    |                |             behind an answer that is not the last
       '---------------+----------------'---> CLOSING ---> CLOSED

    It changes in Connection._move() alone, under the connection's lock, and only along these lines.
    So where two want to change it, the first one wins, and the other finds that it is too late:

    deadline, request   finish(only=READING) against move(ANSWERING): 408, or the answer
    eviction, upgrade   Connection.evict() against move(SUBSCRIBED): subscribers are not evicted
    stop, upgrade       Admission.subscribe() refuses when stopping; one that was in time gets its
                        close 1001 behind the head of the answer, for move() queues that
    any two ends        Connection.finish(): the first one's last words are sent, no others
    """

    READING = "waits for a request, or for the rest of one"
    ANSWERING = "a request is whole, and its answer is being made"
    SUBSCRIBED = "is a WebSocket or an event stream"
    CLOSING = "its last bytes are queued; waits until the peer ends the connection, too"
    CLOSED = "its thread is done; its socket is closed, or will be by the poller, which watches it"


READING, ANSWERING, SUBSCRIBED, CLOSING, CLOSED = State
TRANSITIONS = {
    READING: {ANSWERING, CLOSING},
    ANSWERING: {READING, SUBSCRIBED, CLOSING},
    SUBSCRIBED: {CLOSING},
    CLOSING: {CLOSED},
    CLOSED: set(),
}


class Connection:
    """An accepted socket. Its own thread reads from it; all writing and its closing are here."""

    __slots__ = (
        "number", "server", "transport", "peer", "address", "lock", "state", "handler", "pending",
        "unsent", "size", "sent", "full", "written", "patience", "cut_at", "busy",
        "last_received", "rate", "credit", "received", "published", "bytes_received",
        "bad_message", "forbidden", "too_many")

    def __init__(self, server: Server, sock: socket.socket, address: str) -> None:
        self.number = next(server.numbers)
        self.server = server
        self.transport = TLSTransport(sock, server.tls) if server.tls else Transport(sock)
        self.peer = address  # of whoever connected, which may be a proxy
        self.address = address  # of the client, whom a proxy may name; see Admission.rename()
        # Guards the fields below, except where noted, each write to the socket, and its close.
        self.lock = threading.Lock()
        self.state = READING
        self.handler: HTTPHandler | Subscriber | None = None  # set by its own thread
        # Any thread appends to it without the lock, as list.append is thread-safe. Only the holder
        # of the lock takes from the front, which an append does not disturb. A deque would take 0.7
        # KiB more.
        self.pending: list[bytes] = []
        # Taken from pending, in order; between two holders of the lock empty unless `full`. If the
        # socket took a part of the first entry, that is a memoryview of the rest; what TLS has
        # begun to write may still be whole here, see Transport.owed.
        self.unsent = _NOTHING
        self.size = 0  # bytes that unsent takes, overhead included
        self.sent = 0  # bytes written so far
        self.full = False  # the socket took no more: the poller waits for it, or is about to
        self.written: threading.Event | None = None  # set when nothing waits any more
        # Of the monotonic clock: when a connection that is closing is cut off; and until when it is
        # spared while its peer has not taken its last bytes.
        self.cut_at = self.patience = 0.0
        # Its own thread's.
        self.busy = True  # whether its thread is at work, and not waiting for bytes
        self.last_received = time.monotonic()
        self.rate = RateLimit(server.settings.max_message_rate)
        self.credit: RateLimit | None = None  # see charge()
        self.received = self.published = self.bytes_received = 0
        self.bad_message = self.forbidden = self.too_many = 0

    # Any thread

    def put(self, data: bytes) -> None:
        """Queue data; it is written by the next flush()."""
        if data:
            self.pending.append(data)

    def flush(self) -> None:
        """Write what the socket takes without waiting."""
        # A thread that finds the lock taken leaves its data to the holder; so the holder looks
        # again after letting go. Whichever comes first, one of the two sees the data:
        #
        #     A:  lock | take, write ... | unlock | is anything pending? yes: lock, write it
        #     B:          append | try to lock: taken, go on
        #
        # So each method that has held the lock calls this afterwards. It need not where nothing can
        # be written any more (abort, close); while the socket is full, for resume() will come; and
        # in move(), whose caller calls it.
        while self.pending and self.lock.acquire(False):
            try:
                overflow = self._write()
            finally:
                self.lock.release()
            # Without the lock: Subscriber.on_overflow() takes Admission.lock and Log.lock, which
            # come before this one in the order of locks; and then this one, in finish().
            if overflow:
                handler = self.handler
                # An HTTP client that reads no answers is cut off.
                handler.on_overflow() if isinstance(handler, Subscriber) else self.abort()

    def move(self, to: State, head: bytes = b"", handler: Subscriber | None = None) -> None:
        """Change the state. Raises ConnectionError where it is too late.

        In the same moment `head` is queued, and the connection becomes its handler's.
        """
        with self.lock:
            if not self._move(to):
                raise ConnectionError("the connection was ended meanwhile")
            self.put(head)
            self.handler = handler or self.handler

    def finish(self, last: bytes = b"", only: State | None = None, discard: bool = False,
               patience: float = 0.0) -> bool:
        """Move to CLOSING; `last` is queued, and behind it our end of the connection.

        Returns whether that happened: not where the state is CLOSING already, or is not `only`.
        With `discard`, what was queued before is dropped, but for the rest of what is half written.
        The peer has CLOSING_TIME to read it all and end the connection, too; one that has not read
        it all by then has more, until `patience`, a point of the monotonic clock.
        """
        with self.lock:
            done = only in (None, self.state) and self._close_behind(last, discard, patience)
        if done:
            self.server.poller.call_at(self, self.cut_at)
        self.flush()  # what others left to the holder of the lock
        return done

    def abort(self) -> None:
        """Drop what waits and end the connection, which wakes the thread reading it."""
        with self.lock:
            self._give_up()

    def evict(self) -> None:
        """Make room for a newcomer, unless this one has become a subscriber meanwhile."""
        with self.lock:
            if self.state is not SUBSCRIBED:
                self._give_up()
        self.flush()  # what others left to the holder of the lock

    # The poller's thread

    def resume(self) -> None:
        """Go on after the socket was full."""
        with self.lock:
            if self.state is not CLOSED:
                self.full = False
                self._take()
                self._write_unsent()
                if self.written and not self.unsent:
                    self.written.set()
        self.flush()  # what others left to the holder of the lock

    def on_deadline(self, now: float) -> float | None:
        """See what is due; returns when to look again."""
        if self.state not in (CLOSING, CLOSED):
            handler = self.handler
            return handler.on_deadline(now) if handler else None
        if now < self.cut_at:
            return self.cut_at
        if (self.size or self.transport.unacknowledged()) and now < self.patience:
            return min(now + CLOSING_TIME, self.patience)
        self.abort()
        return None

    # Its own thread

    def read(self, size: int, look_first: bool = False) -> bytes:
        """Wait for bytes and read them; b"" where the connection has ended or is closing.

        With `look_first` it waits only if nothing has come: a thread that waits lets go of the
        interpreter's lock, and comes behind all others that want it.

        What a subscriber sends to a server that is stopping is taken and dropped, but what was read
        before is published. Nothing falls between: this thread sets `busy` and then looks at
        `stopping`; Server.stop() sets `stopping` and then looks at `busy`. So at least one of them
        sees what the other has set. That is why wait() takes no bytes.
        """
        while True:
            if not look_first:
                self.wait()
            look_first = False
            drop = self.server.stopping.is_set() and self.state is SUBSCRIBED
            data = self.transport.receive(size)
            if data == b"" or self.state is CLOSING:
                return b""
            if data:
                self.bytes_received += len(data)
                self.last_received = time.monotonic()
                if not drop:
                    return data

    def wait(self) -> None:
        """Wait until there is something to read."""
        self.busy = False
        self.transport.wait()
        if switch_interval := self.server.switch_interval:
            switch_interval.count_read()
        self.busy = True

    def pause(self, seconds: float, until: threading.Event | None = None) -> None:
        """Let the peer wait. Raises ConnectionError where it hangs up meanwhile.

        Returns early when the connection or the server ends, which is looked for four times a
        second, or when the event is set.

        The peer's end (FIN) is a hang-up. But an HTTP client may end its half behind a request and
        still read the answer: while that waits for no event, only the end of both is one (RST).
        """
        if seconds <= 0:
            return
        end = time.monotonic() + seconds
        hang_up = select.poll()  # which tells of the end of both, whatever it is asked for
        half_is_end = until or self.state is SUBSCRIBED
        hang_up.register(self.transport.descriptor,
                         getattr(select, "POLLRDHUP", 0) if half_is_end else 0)
        while (self.state is not CLOSING and not self.server.stopping.is_set()
               and (left := end - time.monotonic()) > 0):
            if until and until.wait(min(left, 0.25)):
                break
            if hang_up.poll(0 if until else 1000 * min(left, 0.25)):
                raise ConnectionResetError("the peer is gone; what had to wait is lost")
            self.last_received = time.monotonic()  # a peer that waits misses no heartbeat

    def catch_up(self) -> bool:
        """Wait until nothing is queued; False where the connection or server ends.

        What another thread has just taken out to write it does not count: that thread holds the
        lock, so nothing that is queued later gets in front of it.
        """
        # The event is cleared before the queue is looked at. So if resume() empties the queue after
        # that look, the event is set, and the wait ends at once.
        self.written = self.written or threading.Event()
        while self.state is SUBSCRIBED and not self.server.stopping.is_set():
            self.written.clear()
            self.flush()
            if not self.size and not self.pending:
                return True
            # The poller sets it when all is written. For the other two reasons to go on, an end of
            # the connection or the server, this looks every 0.25 s. Where the socket is not full,
            # another thread is just writing.
            self.written.wait(0.25 if self.full else 0.001)
        return False

    def charge(self, cost: float) -> float:
        """Charge a peer for work that it shows nothing for: no token, or no good message.

        It may cost 100 at once, and 100 a second. Returns how many seconds it has to wait. A cost
        of 1 is about 0.1 ms, so one connection can waste a hundredth of a core.
        """
        self.credit = self.credit or RateLimit(100)
        return self.credit.take(cost)

    def log(self, level: int, message: str, *arguments: object) -> None:
        """Log a line about what the peer did: at most one a second."""
        if log.isEnabledFor(level) and self.server.log_limit.may_log(f"{self.number}", 1):
            log.log(level, "%s: " + message, self.address, *arguments)

    def drain(self) -> None:
        """Read and drop until the peer has ended the connection; wait until it is sent the rest.

        A close with unread input would destroy what was just sent (RST). And who has ended only his
        half (FIN) behind a request still reads the answer. The poller ends this by abort() where a
        peer takes too long.
        """
        with contextlib.suppress(OSError):
            # It looks before it waits: most are gone already, perhaps thousands at once.
            while Transport.receive(self.transport, _FULL_READ) != b"":
                self.wait()
        with self.lock:
            if not self.size:
                return
            self.written = threading.Event()
        self.written.wait()  # for resume(), which comes behind abort(), too: see _give_up()

    def close(self) -> None:
        """Close the socket; the last act of its thread.

        While the poller may be waiting for the socket, its descriptor must not be given to another
        connection, which it would be waiting for then: the poller itself closes it.
        """
        with self.lock:
            self._give_up()
            self._move(CLOSED)
            self.handler = None  # which holds this connection: no cycle is left to the collector
            if not self.full:
                self.transport.close()
                return
        self.server.poller.watch(self)

    # The holder of the lock

    def _move(self, to: State) -> bool:
        if to not in TRANSITIONS[self.state]:
            return False
        self.state = to
        return True

    def _close_behind(self, last: bytes, discard: bool, patience: float) -> bool:
        self._take()
        if CLOSING not in TRANSITIONS[self.state]:
            return False
        # The times before the state: on_deadline() reads the state first, and takes no lock.
        self.cut_at, self.patience = time.monotonic() + CLOSING_TIME, patience
        self._move(CLOSING)
        # What the peer has a part of is kept: the first entry, if it is a memoryview; with TLS,
        # each entry that has any of the first `owed` bytes, for these are encrypted already.
        if discard:
            begun, queued, self.unsent = self.transport.owed, self.unsent, collections.deque()
            for data in queued:
                if begun > 0 or isinstance(data, memoryview):
                    self.unsent.append(data)
                begun -= len(data)
            self.size = sum(len(data) + _OVERHEAD for data in self.unsent)
        if last:
            self._append(last)
        self._write_unsent()
        return True

    def _write(self) -> bool:
        # Returns whether more than the limit has come to wait.
        try:
            if self.unsent or self.state is not SUBSCRIBED:
                self._take()
                self._write_unsent()
            elif not self.pending:  # somebody else has written it meanwhile
                return False
            else:  # the common case: nothing waits, and the socket takes it all
                data = self.pending.pop(0)
                if self.pending:
                    data = b"".join([data, *self._take_pending()])
                sent = self.transport.send(data)
                self.sent += sent
                if sent == len(data):
                    return False
                self.unsent = collections.deque([memoryview(data)[sent:] if sent else data])
                self.size = len(data) - sent + _OVERHEAD
                self._mark_full()
        except _FAILURES:
            self._give_up()
        # The first entry does not count, however large it is: it may be one message, or all that
        # was pending.
        return self.state not in (CLOSING, CLOSED) and bool(self.unsent) and (
            self.size - len(self.unsent[0]) - _OVERHEAD > self.server.settings.max_queue_size)

    def _take(self) -> None:
        # Of a connection that is closing, what is still put in is dropped: whoever put it there, as
        # a rule a publisher, has not seen yet that it closes.
        for data in self._take_pending():
            if self.state not in (CLOSING, CLOSED):
                self._append(data)

    def _take_pending(self) -> list[bytes]:
        taken = self.pending[:]
        del self.pending[:len(taken)]
        return taken

    def _append(self, data: bytes) -> None:
        last = self.unsent[-1] if self.unsent else None
        if isinstance(last, bytes) and len(last) + len(data) <= _SMALL:
            self.unsent[-1] = last + data
            self.size += len(data)
        else:
            self.unsent = self.unsent or collections.deque()
            self.unsent.append(data)
            self.size += len(data) + _OVERHEAD

    def _write_unsent(self) -> None:
        while self.unsent and not self.full:
            try:
                sent = self.transport.send_all(
                    list(itertools.islice(self.unsent, _BUFFERS_PER_WRITE)))
            except _FAILURES:
                self._give_up()
            else:
                self._drop(sent)
                if not sent:
                    self._mark_full()
        if self.state is CLOSING and not self.unsent:
            self.transport.end_output()

    def _drop(self, sent: int) -> None:
        self.sent += sent
        while self.unsent and sent >= len(self.unsent[0]):
            size = len(self.unsent.popleft())
            sent -= size
            self.size -= size + _OVERHEAD
        if sent:
            self.unsent[0] = memoryview(self.unsent[0])[sent:]
            self.size -= sent

    def _mark_full(self) -> None:
        self.full = True
        self.server.poller.watch(self)

    def _give_up(self) -> None:
        # `full` is left as it is: if the poller watches the socket, close() has to know. The end of
        # the socket makes it writable, so the poller unregisters it and calls resume().
        self._move(CLOSING)
        self.pending.clear()
        self.unsent = _NOTHING
        self.size = 0
        if self.state is not CLOSED:
            self.transport.end()


class RateLimit:
    """A token bucket. Used by one thread.

    It fills by `limit` a second, and holds what it gets in one second, at least 1. It may be
    overdrawn: take() never refuses and never waits, but tells how long it is until the bucket is
    level again. The caller waits for so long, or gives back what it took.

        limit 10     take() twelve times at once: ten times 0, then 0.1 s, then 0.2 s
        limit 0.5    twice at once: 0, then 2 s
    """

    __slots__ = ("limit", "allowance", "at")

    def __init__(self, limit: float) -> None:
        self.limit = limit  # a second; 0 is no limit
        self.allowance = max(1.0, limit)
        self.at = time.monotonic()

    def take(self, cost: float = 1) -> float:
        """Take so much out; returns how many seconds to wait before the next is taken."""
        if not self.limit:
            return 0
        now = time.monotonic()
        self.allowance = min(
            max(1.0, self.limit), self.allowance + (now - self.at) * self.limit) - cost
        self.at = now
        return max(0.0, -self.allowance / self.limit)


# ------------------------------------------------------------------------------------------- poller
# A connection's thread waits for its peer's bytes, and can wait for nothing else. What else there
# is to wait for, one thread waits for on behalf of all: that a full socket takes more, and that a
# point in time has come. Neither is the rule. Most sockets take at once what is written, and most
# deadlines pass with nothing to be done but to set the next. So a deadline is cheap to ask for (a
# lock and an entry in a heap), and is not taken back while the connection lives: when it comes, the
# connection itself looks whether anything is due. None of this thread's work may wait, or one peer
# would delay all others.

# Seconds. With thousands of deadlines there is nearly always one due: those of a short pause are
# served together, for it takes longer to wake the thread than to look whether anything is due.
_SHORTEST_PAUSE = 0.02
_LONGEST_PAUSE = 3600  # seconds; selectors take no number of any size


def _start(thread: threading.Thread) -> None:
    # Raises OSError where the system has no thread left, for which Python has a RuntimeError.
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from None


class Poller(threading.Thread):
    """The thread that waits on behalf of all connections: for full sockets and points in time.

    A socket is registered with the selector for one event. If it is full again after that, it is
    registered again:

        watch() -> requests -> _watch(): register -> select: unregister -> Connection.resume()
           ^---------------------------------- full again ----------------------------'

    A connection has one deadline. Others that were asked for stay in the heap, void, until they are
    due:

        call_at(c, 30)     deadlines {c: 30}    timers 30
        call_at(c, 13)     deadlines {c: 13}    timers 13, 30
        call_at(c, 50)     nothing: 13 comes first, and on_deadline() says what is next
        at 13              deadlines {}         timers 30, and on_deadline() is called
    """

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        super().__init__(name="philote-poller", daemon=True)
        self.on_failure = on_failure
        self.lock = threading.Lock()  # guards the next three
        self.requests: list[Connection] = []  # to be watched or closed
        # A heap of (due, number of a connection); void where `deadlines` has another `due`.
        self.timers: list[tuple[float, int]] = []
        self.deadlines: dict[int, tuple[float, Connection]] = {}
        self.selector = selectors.DefaultSelector()  # used by run() alone
        # A byte written to one end wakes the thread, which waits at the other. A full pipe means
        # that it has been woken: nobody waits for it.
        self.wake_up, self.waker = socket.socketpair()
        for end in (self.wake_up, self.waker):
            end.setblocking(False)
        self.selector.register(self.wake_up, selectors.EVENT_READ)
        self.stopped = False

    # Any thread

    def watch(self, connection: Connection) -> None:
        """Ask for connection.resume() when its socket takes more; for its close if it is CLOSED."""
        with self.lock:
            self.requests.append(connection)
        self._wake()

    def call_at(self, connection: Connection, due: float) -> None:
        """Ask for connection.on_deadline() at a point of the monotonic clock, or before.

        A connection has one deadline, the earliest that was asked for. on_deadline() finds out what
        is due, and returns the next. It may be called later by _SHORTEST_PAUSE.

        on_deadline() looks at the connection without its lock. If finish() asks for an earlier time
        meanwhile, that one stands: the deadline was taken out before, and so the later one that
        on_deadline() returns is not heeded.
        """
        with self.lock:
            number = connection.number
            asked = self.deadlines[number][0] if number in self.deadlines else math.inf
            if connection.state is CLOSED or asked <= due:
                return
            first = not self.timers or due < self.timers[0][0]
            # In this order: if there is no memory for it, the deadline of before stands.
            heapq.heappush(self.timers, (due, number))
            self.deadlines[number] = (due, connection)
        if first and threading.get_ident() != self.ident:  # run() looks again before it waits
            self._wake()

    def forget(self, connection: Connection) -> None:
        """Let a connection that is CLOSED have no deadline any more; call_at() gives it none."""
        with self.lock:
            self.deadlines.pop(connection.number, None)
            if len(self.timers) > 2 * len(self.deadlines) + 64:  # most are void by now
                self.timers = [(due, number) for number, (due, _) in self.deadlines.items()]
                heapq.heapify(self.timers)

    def stop(self) -> None:
        """End the thread, and wait a second for it."""
        self.stopped = True
        self._wake()
        if self.is_alive():
            self.join(1)
        else:  # it was never started, or has ended, which does no harm
            self._close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self.waker.send(b"\0")

    # The poller's thread

    def run(self) -> None:
        """Wait and work until stop().

        A socket that is registered is closed by _serve_requests() alone, so never between select()
        and the last of its events. So no event is for a descriptor that was closed and given out
        anew meanwhile.
        """
        try:
            while not self.stopped:
                with self.lock:
                    pause = self.timers[0][0] - time.monotonic() if self.timers else _LONGEST_PAUSE
                self._resume_writable(max(_SHORTEST_PAUSE, min(pause, _LONGEST_PAUSE)))
                self._serve_requests()
                self._call_due()
            self._serve_requests()
        except BaseException as error:
            self.on_failure(error)
        finally:
            self._close()

    def _resume_writable(self, pause: float) -> None:
        for key, _ in self.selector.select(pause):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self.wake_up.recv(4096)
            else:
                self.selector.unregister(key.fileobj)
                self._try(key.data, key.data.resume)

    def _serve_requests(self) -> None:
        with self.lock:
            requests, self.requests = self.requests, []
        for connection in requests:
            self._try(connection, self._watch, connection)

    def _watch(self, connection: Connection) -> None:
        sock = connection.transport.sock
        with connection.lock:
            if connection.state is CLOSED:
                if sock.fileno() >= 0:  # it may have been asked for twice
                    with contextlib.suppress(KeyError):
                        self.selector.unregister(sock)
                    connection.transport.close()
            elif connection.full:
                self.selector.register(sock, selectors.EVENT_WRITE, connection)

    def _call_due(self) -> None:
        now = time.monotonic()
        for connection in self._take_due(now):
            again = self._try(connection, connection.on_deadline, now)
            if again is not None:
                self.call_at(connection, again)

    def _take_due(self, now: float) -> list[Connection]:
        connections = []
        with self.lock:
            while self.timers and self.timers[0][0] <= now:
                due, number = heapq.heappop(self.timers)
                if number in self.deadlines and self.deadlines[number][0] == due:
                    connections.append(self.deadlines.pop(number)[1])
        return connections

    def _try(self, connection: Connection, work: Callable[..., Any], *arguments: Any) -> Any:
        # Each piece of work begins here: an error in one must not cost the others their turn. Its
        # own connection is ended: it might wait for ever, for a deadline or for room in its socket.
        try:
            return work(*arguments)
        except Exception:
            log.exception("poller: unexpected error")
            connection.abort()

    def _close(self) -> None:
        self.selector.close()
        self.wake_up.close()
        self.waker.close()


# ---------------------------------------------------------------------------------------------- log
# What is published is appended to one log: there a message gets its id, is kept for those who come
# back, and enters the queues of all who have joined its channel; in one step, under one lock. So
# there is one order, an id is a position in it for all channels at once, and a subscriber that says
# up to which id it has everything gets the rest.
#
# An id is MILLISECONDS-N: the time, or that of the last id where the clock went back, and a counter
# within the millisecond. It is held as one whole number, milliseconds << 64 | N. So ids can be
# compared, those of a batch are consecutive, and a time is an id too.

_COUNTER_BITS = 64  # what Redis has for it
_COUNTER = (1 << _COUNTER_BITS) - 1
_ID = re.compile("[0-9]{1,19}-[0-9]{1,19}")  # 19 digits always fit 64 bits
# Groups that are looked at, or old messages forgotten, before the lock is let go of: 1 to 3 ms.
_SCAN = 2000
_PIECE = 32768  # bytes of messages that are sent at a time to one who catches up
_LAST_PIECE = 64  # messages that may be encoded under the lock: 0.2 ms
_KEPT_OVERHEAD = 64  # bytes that Python takes to keep a message, beside its JSON
_GROUP_OVERHEAD = 250  # and to keep together what was published together
_CHANNEL_OVERHEAD = 900  # and to keep the groups of a channel, beside its name
_MAX_PATTERN_SIZE = 256  # characters; each length of a joined pattern costs each message a look-up
_LONG_NAME = 1024  # characters; MAX_SUBSCRIPTIONS times as many may be in all that one has joined


def encode_id(position: int) -> str:
    """Write an id as clients see it."""
    return f"{position >> _COUNTER_BITS}-{position & _COUNTER}"


def decode_id(text: str) -> int:
    """Read an id as clients see it; no id ("") is below all. Raises ValueError."""
    milliseconds, _, counter = text.partition("-")
    return int(milliseconds or 0) << _COUNTER_BITS | int(counter or 0)


def _now() -> int:
    return time.time_ns() // 1_000_000 << _COUNTER_BITS


class Past(NamedTuple):
    """What a subscriber wants of the past."""

    since: int | None = None  # everything behind this id; None: from now on
    partly: bool = False  # if not all of that is kept, the rest will do
    last: int = 0  # of each channel, where `since` cannot be met or is not given
    resumable: bool = False  # whether it gets ids

    def is_empty(self) -> bool:
        """Whether it wants nothing of it."""
        return self.since is None and not self.last


def parse_past(since: Any, last: Any) -> Past:
    """Take what a client asks for of the past; None is not given. Raises Refused."""
    if last is not None and (type(last) not in (int, str) or not re.fullmatch(
            "[0-9]{1,5}", str(last)) or int(last) > _MAX_LAST):
        raise Refused(f"last must be a number from 0 to {_MAX_LAST}, not {_shown(last)}")
    count = int(last or 0)
    if since is None or since == "now":
        return Past(None, False, count, since is not None or last is not None)
    text = since if isinstance(since, str) else ""
    if _ID.fullmatch(text):
        return Past(decode_id(text), False, count, True)
    try:
        ago = 1000 * parse_duration(text)
    except ValueError:
        raise Refused(f"since must be an id such as 1700000000000-0, a duration such as 10m, or "
                      f"now, not {_shown(since)}") from None
    return Past(max(0, _now() - (ago << _COUNTER_BITS)), True, count, True)


def parse_duration(text: str) -> int:
    """Read a duration, in seconds. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if not match:
        raise ValueError(f"{text!r} is not a duration such as 90s, 15m, 1h or 7d")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


# A message in the log: its id, and its JSON, which is made before the id is known. For WebSockets
# the id goes in behind the first brace; an event stream has it on a line of its own. Who gets no
# ids is not told the user either.
#
#     kept           {"issuer":"0f8f...","user":"alice","channel":"news","data":"hello"}
#     with ids       {"id":"1700000000000-0","issuer":"0f8f...","user":"alice","channel":"news",...
#     without ids    {"issuer":"0f8f...","channel":"news","data":"hello"}
Entry = tuple[int, bytes]


def encode_entries(entries: Iterable[Entry]) -> list[bytes]:
    """Encode messages with their ids."""
    return [b'{"id":"%d-%d",%b' % (position >> _COUNTER_BITS, position & _COUNTER, payload[1:])
            for position, payload in entries]


@dataclasses.dataclass(eq=False, slots=True)
class Encoder:
    """How messages are written for a kind of subscriber, with ids or without.

    There are four: a WebSocket and an event stream have two each (`encoders`). A message is encoded
    once by each, for all who share it. An Encoder is a key in Log.joined, by identity (eq=False).
    """

    encode: Callable[[Iterable[Any]], bytes]  # of entries; of JSON where it tells no ids
    with_ids: bool  # whether it tells ids and users


def check_subscriptions(names: Names, settings: Settings) -> None:
    """Refuse more subscriptions of one connection than are allowed, or names too long."""
    if len(names) > settings.max_subscriptions:
        raise Refused(f"a connection may have {settings.max_subscriptions} subscriptions, not "
                      f"{len(names)} (MAX_SUBSCRIPTIONS)", "too_many")
    if sum(map(len, names)) > (most := _LONG_NAME * settings.max_subscriptions):
        raise Refused(f"the names of a connection's subscriptions may have {most} characters in "
                      "all", "too_many")
    if any(len(prefix) > _MAX_PATTERN_SIZE for prefix in names.prefixes):
        raise Refused(f"a pattern may have {_MAX_PATTERN_SIZE} characters")


# Messages that were published together: the first one's id, the channel, the JSON of each, bytes.
Group = tuple[int, str, Sequence[bytes], int]
_FORGOTTEN: Group = 0, "", (), 0  # stands where one was, until the list is cut


def _last_id(group: Group) -> int:
    return group[0] + len(group[2]) - 1


class History:
    """The last messages of the log, within a time and a size. Guarded by the log's lock.

    Messages that were published together stay together: they are kept and forgotten as one.

        groups     [ gone gone gone | G1 G2 G3 G4 ... ]    by id; `start` is at the bar
        by_name    "a" -> G1 G3    "b" -> G2 G4            the same groups

    Ids rise, so one is found by bisection. The oldest of all is the oldest of its channel, too: to
    forget it is to move the bar and take the first of that channel's. What is gone is cut off when
    it is half of the list, so that a step costs little on average. Nothing behind `floor` is gone:
    that is the whole test of whether somebody missed anything.
    """

    def __init__(self, settings: Settings, floor: int) -> None:
        self.limit = settings.history_size if settings.history_time else 0
        self.time = int(1000 * settings.history_time) << _COUNTER_BITS
        self.piece = min(_PIECE, settings.max_queue_size >> 1)  # bytes that behind() reads at once
        self.clear(floor)

    def clear(self, floor: int) -> None:
        """Forget all."""
        self.floor = floor  # all that was published behind this id is here
        self.size = 0  # bytes, overhead included
        self.count = 0  # messages
        self.groups: list[Group] = []  # by age, from index `start` on
        self.start = 0
        # By channel: its groups, and its name as the one object that all these hold, for it comes
        # as a new one with each message.
        self.by_name: dict[str, tuple[str, collections.deque[Group]]] = {}

    def append(self, first: int, name: str, payloads: Sequence[bytes]) -> None:
        """Keep messages with consecutive ids."""
        size = sum(map(len, payloads)) + _GROUP_OVERHEAD + len(payloads) * _KEPT_OVERHEAD
        if size > self.limit >> 3 and len(payloads) > 1:  # too much to be forgotten as one
            for position, payload in enumerate(payloads, first):
                self.append(position, name, [payload])
            return
        kept = self.by_name[name] if name in self.by_name else (name, collections.deque[Group]())
        group = first, kept[0], payloads, size
        self.groups.append(group)
        try:
            kept[1].append(group)
            if name not in self.by_name:
                self.by_name[name] = kept
                self.size += sys.getsizeof(name) + _CHANNEL_OVERHEAD
        except MemoryError:  # what is in one of them alone would stop trim() for ever
            self.groups.pop()
            raise
        self.count += len(payloads)
        self.size += size
        if self.size > self.limit or self.groups[self.start][0] < first - self.time:
            self.trim(first)

    def trim(self, now: int) -> None:
        """Forget what is too old or too much."""
        groups, at, oldest = self.groups, self.start, now - self.time
        if at < len(groups) and groups[at][0] < oldest:  # nobody gets it any more
            self.floor = _last_id(groups[bisect.bisect_left(
                groups, oldest, at, key=operator.itemgetter(0)) - 1])
        # Of what is too old, _SCAN messages at most: after a quiet time there may be many, and the
        # next calls forget the others. What is too much goes at once, and a little more, so that
        # the next message need not do it again.
        least = self.count - _SCAN
        limit = self.limit if self.size <= self.limit else self.limit - (self.limit >> 6)
        while at < len(groups) and (
                self.size > limit or groups[at][0] < oldest and self.count > least):
            _, name, payloads, size = groups[at]
            self.floor = max(self.floor, _last_id(groups[at]))
            groups[at] = _FORGOTTEN
            at += 1
            self.count -= len(payloads)
            self.size -= size
            kept = self.by_name[name][1]
            kept.popleft()
            if not kept:
                del self.by_name[name]
                self.size -= sys.getsizeof(name) + _CHANNEL_OVERHEAD
        self.start = at
        if at > 1000 and at > len(groups) >> 1:
            del groups[:at]
            self.start = 0

    def behind(self, position: int, names: Names, lasts: Mapping[str, int], live: Names,
               begun: int) -> tuple[list[Entry], int]:
        """Read a piece of what lies behind an id; returns it, and the id up to which it goes.

        Of a channel that `lasts` holds, only messages from the id there on are read, see last().
        The channels `live` the subscriber had joined before: what was published there since `begun`
        is left out, for it is in the subscriber's queue, and would come twice.

               lasts["a"]    lasts["b"]     begun              the end of the log
            ---|-------------|--------------|------------------|
               `old`: only channels of      all of `names`, which means that patterns are
               `lasts`, from these ids on   compared; but for what `live` covers

        Where there are no `lasts`, nothing is `old`; where there are, no piece goes across `begun`.
        """
        # `lasts`, if there are any, holds each channel of `names`, or of their patterns, that had
        # messages up to `begun`: so until there no patterns need to be compared.
        old = bool(lasts) and position < begun
        prefixes, begin = () if old else names.prefixes, self._index(position + 1)
        # The more patterns to compare, the fewer groups under one hold of the lock: 2,002 with up
        # to 9 patterns, 183 with 100, 21 with 1,000. At least two: the first may end at the
        # position.
        groups = self.groups[begin:begin + _SCAN // (1 + len(prefixes) // 10) + 2]
        entries, size = list[Entry](), 0
        for first, name, payloads, _ in groups:
            if old and first > begun:
                return entries, begun
            if (name in (lasts if old else names) or prefixes and name.startswith(prefixes)) and (
                    not (live and first > begun and live.cover(name))):
                least = max(position + 1, lasts.get(name, 0))
                for number, payload in enumerate(payloads, first):
                    if number >= least:
                        entries.append((number, payload))
                        size += len(payload)
                        if size >= self.piece:
                            return entries, number
        return entries, max(position, _last_id(groups[-1])) if groups else position

    def ends_at(self, position: int) -> bool:
        """Whether nothing lies behind an id."""
        return not self.count or position >= _last_id(self.groups[-1])

    def last(self, count: int, names: Iterable[str]) -> dict[str, int]:
        """Find the ids at which the last so many messages of each channel begin."""
        lasts: dict[str, int] = {}
        for name in names if count else ():
            if name in self.by_name:
                left = count
                for first, _, payloads, _ in reversed(self.by_name[name][1]):
                    if left <= 0 or first <= self.floor:
                        break
                    left -= len(payloads)
                    lasts[name] = first - min(left, 0)  # a group may have more than needed
        return lasts

    def names_behind(self, position: int) -> set[str]:
        """List the channels of all that lies behind an id, and perhaps of the group before it."""
        return {name for _, name, _, _ in self.groups[self._index(position + 1):]}

    def _index(self, position: int) -> int:
        # Finds the last group that begins at or before an id; if that is forgotten, the first that
        # is kept. Forgotten groups are not compared: they have lost their ids.
        return max(self.start, bisect.bisect_right(
            self.groups, position, self.start, key=operator.itemgetter(0)) - 1)


# Who has joined a channel or pattern, by the way they are encoded for: the connection of each, with
# what puts something in its queue: list.append, one call less than Connection.put().
Audience = dict[Encoder, dict[Connection, Callable[[bytes], None]]]
Ack = Callable[[int, int], None]  # takes a message's id, and how many subscribers got it


class Log:
    """All that is published, and who has joined what. `position` is the id of the last message."""

    ROWS: tuple[tuple[str, ...], ...] = ()  # more of Metrics.ROWS

    @property
    def reason(self) -> str:
        """Why the log cannot be reached; "" where it can."""
        return ""

    @property
    def now(self) -> int:
        """The time, as an id."""
        return _now()

    def __init__(self, settings: Settings) -> None:
        # Guards all below, and the order of messages in all queues. One lock for all channels
        # costs no more than one for each: it is held for 50 ns a subscriber, while the system call
        # that writes to the subscriber's socket takes 3 us, and holds no lock of the log.
        self.lock = threading.Lock()
        self.position = _now()
        self.history = History(settings, self.position)
        # By channel or pattern:
        #
        #     {"news":   {without_ids: {c1: c1.pending.append, c2: c2.pending.append}},
        #      "chat.*": {with_ids:    {c3: c3.pending.append}}}
        #
        # `prefix_sizes` is {5: 1} then: a message to "chat.de" takes one look-up more, of "chat.*".
        self.joined: dict[str, Audience] = {}
        self.prefix_sizes: collections.Counter[int] = collections.Counter()  # of joined patterns
        self.issuers: dict[str, Connection] = {}  # of the subscribers, by id
        self.resumed = self.not_resumed = self.gaps = 0  # replays by how they went
        self.delivered = 0  # messages queued for subscribers
        # Set by the server: what ends connections of its own, whether it is ending, and what is
        # told that a thread of the log cannot go on.
        self.end_own: Callable[..., int] = lambda **_: 0
        self.stopping = threading.Event()
        self.on_failure: Callable[[BaseException], None] = lambda _: None

    def publish(self, batch: Batch) -> None:
        """Publish messages to a channel, and acknowledge those that ask for it."""
        self.append(
            batch.channel, batch.payloads, batch.issuer, batch.user, batch.touched, batch.acks)

    def append(self, name: str, payloads: Sequence[bytes], issuer: str, user: bytes,
               touched: dict[Connection, Any], acks: Sequence[tuple[int, Ack]] = (),
               first: int = 0) -> None:
        """Give ids to messages of one issuer to one channel, and queue them for its subscribers.

        `user` is the part of each message's JSON that names the user; subscribers without ids get
        the messages without it. The connections that they are queued for are added to `touched`:
        the caller flushes them, without any lock. `acks` are called under the same lock, so that
        an acknowledgement stands in its queue before all higher ids. Else a client could see one of
        those, lose its connection, come back from behind its own message, and publish it again.
        """
        receivers = 0
        # Here and under any lock of the server, a dictionary that threads share is not asked by
        # get(): where another thread made the key that it holds, or the value, free-threaded
        # CPython 3.13 takes the dictionary's lock for that, and 60 us instead of 0.1.
        #
        # What needs no id is encoded before the log's lock is taken, for those that seem to have
        # joined: they are looked for again under it. The first match of `user` is the right one: it
        # stands behind the issuer, a UUID, and only the data, which comes later, may hold the same
        # text.
        bare = [payload.replace(user, b"", 1) for payload in payloads] if user else payloads
        try:
            seeming = self.joined[name].copy()  # without the lock, a test first would prove nothing
        except KeyError:
            seeming = {}
        encoded = {encoder: encoder.encode(bare) for encoder in seeming if not encoder.with_ids}
        with self.lock:
            first = first or max(self.position + 1, _now())
            audience = (self._find_audience(name) if self.prefix_sizes else
                        self.joined[name] if name in self.joined else {})
            # What needs memory comes first. If it fails, nobody has got the messages yet: when the
            # publisher's last flush() publishes them again, nobody gets them twice.
            for encoder in audience:
                touched.update(audience[encoder])
                if encoder not in encoded:  # once for all of them
                    encoded[encoder] = encoder.encode(
                        enumerate(payloads, first) if encoder.with_ids else bare)
            self.position = first + len(payloads) - 1
            if self.history.limit:
                self.history.append(first, name, payloads)
            else:
                self.history.floor = self.position
            own = self.issuers[issuer] if issuer in self.issuers else None
            for encoder, members in audience.items():
                data = encoded[encoder]
                receivers += len(members) - (own in members)
                for connection, put in members.items():
                    if connection is not own:
                        put(data)
            self.delivered += receivers * len(payloads)
            for index, ack in acks:
                ack(first + index, receivers)

    def replay(self, subscriber: Subscriber, names: Names, past: Past, live: Names,
               before: Callable[[int, bool], bytes], after: Callable[[int, bool], bytes],
               ) -> Iterator[None]:
        """Queue what was asked for of the past, piece by piece, then let a subscriber join.

        It goes towards the end of the log, which moves on meanwhile:

            floor        since             position               Log.position
            --|------------|===============>|- - - - - - - - - - ->|
            gone           queued so far    still to be read       messages are appended here

        At each yield the caller waits until the queue is empty; no lock is held then, so who reads
        slowly holds up nobody. When a piece reaches the end, it is queued and the channels are
        joined under one lock: nothing falls between. When the floor passes the position, the
        subscriber was too slow; it is told of a gap, and goes on at the end.

        A piece that reaches the end, but has more than _LAST_PIECE messages, is sent like those
        before it: to encode it under the lock would take too long. For a client that reads faster
        than others publish, the pieces become shorter, until one is the last. One that reads more
        slowly meets the floor; behind the gap nothing is left to send, so it joins then.

        `live` is what the subscriber has joined before. `before` and `after` encode what is queued
        in front of the messages and behind them. They are called with the position there, and with
        whether nothing is missing up to it. Raises ConnectionError behind forget().
        """
        connection = subscriber.connection
        if past.is_empty():
            with self.lock:
                self._join(subscriber, names)
                connection.put(before(self.position, True) + after(self.position, True))
            return
        if (past.since or 0) > self.position:
            connection.flush()  # the head of the answer, before wait_until() in _find_kept()

        def begin(position: int, resumed: bool) -> None:
            self.resumed += resumed and past.since is not None
            self.not_resumed += not resumed
            # New messages of the channels that it had joined before come between the pieces of the
            # past. So it may have a message and not yet all up to its id: until it has joined
            # again, position_for() tells it none.
            subscriber.live = False
            connection.put(before(position, resumed))

        def tell_gap(position: int) -> None:
            self.gaps += 1
            connection.put(subscriber.encode_gap(position))

        walk = self._walk(names, past, live, self._find_kept(names, past), begin, tell_gap)
        while True:
            with self.lock:
                self._check(subscriber)
                entries, position, complete, at_end = next(walk)
                if at_end and len(entries) <= _LAST_PIECE:
                    connection.put(subscriber.encoder.encode(entries) + after(position, complete))
                    self._join(subscriber, names)
                    return
            connection.put(subscriber.encoder.encode(entries))
            yield

    def read(self, names: Names, past: Past, most: int) -> tuple[list[Entry], int, bool]:
        """Read messages of the past, about so many bytes at most.

        Returns them, the id up to which they are complete, and whether nothing is missing.
        """
        found: list[Entry] = []
        walk = self._walk(names, past, Names(), self._find_kept(names, past),
                          lambda *_: None, lambda _: found.clear())
        size, at_end = 0, False
        while not at_end and size < most:
            with self.lock:
                entries, position, complete, at_end = next(walk)
            found += entries
            size += sum(len(payload) for _, payload in entries)
        return found, position, complete

    def _find_kept(self, names: Names, past: Past) -> tuple[Iterable[str], int]:
        # Comes before a walk, and may take long: so it holds the lock only to copy the names. First
        # it waits for the id that the walk begins at, which another server may have given out. Then
        # it compares the patterns with all channels, for `last`. Returns the channels that it
        # found, and up to which id they are all: _look_back() adds those that have come since.
        self.wait_until(0 if past.partly else past.since or 0)
        if not past.last or not names.prefixes:
            return names, self.position
        with self.lock:
            kept, seen = [*self.history.by_name], self.position
        return [*filter(names.cover, kept)], seen

    def position_for(self, subscriber: Subscriber) -> None:
        """Queue the position that a subscriber has reached, who got all up to it."""
        with self.lock:
            if subscriber.live:
                subscriber.connection.put(subscriber.encode_position(self.position))

    def add_ids(self, subscriber: Subscriber) -> None:
        """Let a subscriber have ids from now on."""
        with self.lock:
            self._leave(subscriber, subscriber.channels)
            subscriber.encoder = subscriber.encoders[True]
            self._join(subscriber, subscriber.channels)

    def join(self, subscriber: Subscriber, names: Iterable[str]) -> None:
        """Let a subscriber have all that is published to these channels from now on."""
        with self.lock:
            self._join(subscriber, names)

    def leave(self, subscriber: Subscriber, names: Iterable[str]) -> None:
        """Undo join(); a channel that nobody has joined any more is forgotten."""
        for name in names:
            with self.lock:  # let go of between two, so that no publisher waits for a thousand
                self._leave(subscriber, [name])

    def forget(self, subscriber: Subscriber) -> None:
        """Let a subscriber leave all for good; at once, as it comes back from the last id it got.

        Were a channel left before another, or another joined behind that, it would never get what
        was published to the first one meanwhile.
        """
        with self.lock:
            subscriber.forgotten = True
            self._leave(subscriber, subscriber.channels)
            self.issuers.pop(subscriber.id, None)

    def totals(self) -> dict[str, Any]:
        """Count what there is."""
        with self.lock:
            self.history.trim(self.now)
            oldest = self.history.groups[self.history.start][0] if self.history.count else 0
            return {
                "channels": len(self.joined), "history_messages": self.history.count,
                "history_bytes": self.history.size, "history_oldest": oldest,
                "resumed": self.resumed, "not_resumed": self.not_resumed, "gaps": self.gaps,
                "delivered": self.delivered}

    def end_connections(self, whom: Mapping[str, str]) -> tuple[int, bool]:
        """End connections of all servers; returns how many, and whether all have answered."""
        return self.end_own(**whom), True

    # What RedisLog does more: a log in memory is always there, and has nothing to wait for

    def begin(self, is_over: Callable[[], bool]) -> None:
        """Make ready for the first connection."""

    def wait_for_room(self, connection: Connection, seconds: float = math.inf) -> bool:
        """Wait until more may be published; returns whether it may."""
        return True

    def wait_until(self, position: int) -> None:
        """Wait for an id that another server gave out."""

    def wait_for_all(self, connection: Connection) -> None:
        """Wait until all that any server had to publish before is in the log, and read here."""

    def describe(self) -> dict[str, Any]:
        """Say more for /api/info."""
        return {}

    def drain(self, deadline: float) -> None:
        """Wait until all that was published is delivered."""

    def close(self) -> None:
        """End what begin() began."""

    # The holder of the lock

    def _look_back(self, past: Past, names: Names, kept: Iterable[str],
                   seen: int) -> tuple[int, bool, dict[str, int]]:
        # Where a replay begins, whether nothing is missing there, and for `last` the earlier id at
        # which the messages of each channel begin.
        self.history.trim(self.now)
        # Whether all behind `since` is kept. An id that was not given out yet is another log's, or
        # a wrong clock's.
        met = past.since is None or self.history.floor <= past.since and (
            past.partly or past.since <= self.position)
        if past.since is not None and (met or past.partly):
            return min(max(past.since, self.history.floor), self.position), met, {}
        new = filter(names.cover, self.history.names_behind(seen))
        return self.position, met, self.history.last(past.last, {*kept, *new})

    def _walk(self, names: Names, past: Past, live: Names, kept: tuple[Iterable[str], int],
              begin: Callable[[int, bool], None], tell_gap: Callable[[int], None],
              ) -> Iterator[tuple[list[Entry], int, bool, bool]]:
        # A generator: all of its body, from the first line on, runs within next(), which the holder
        # of the lock calls. Between two steps the lock is let go of, and the log moves on. A step
        # yields a piece of the past, the position behind it, whether nothing was missing so far,
        # and whether the log ends there.
        # What `last` asks for comes first. To list its ids might take more memory than the client's
        # queue may, so this walks from the oldest of it through all that was published since.
        history, begun = self.history, self.position
        position, complete, lasts = self._look_back(past, names, *kept)
        begin(position, complete)
        position = min(lasts.values(), default=position + 1) - 1
        while True:
            if position < history.floor:  # it was overtaken
                position, complete = self.position, False
                tell_gap(position)
            entries, position = history.behind(position, names, lasts, live, begun)
            at_end = history.ends_at(position)
            if at_end:
                position = self.position
            yield entries, position, complete, at_end

    def _check(self, subscriber: Subscriber) -> None:
        if subscriber.forgotten:  # by another thread; its own ends, too
            raise ConnectionError("the subscriber was ended meanwhile")

    def _join(self, subscriber: Subscriber, names: Iterable[str]) -> None:
        self._check(subscriber)
        connection = subscriber.connection
        subscriber.live = True
        self.issuers[subscriber.id] = connection
        for name in names:
            if name not in self.joined:
                self.joined[name] = {}
                if name[-1] == "*":
                    self.prefix_sizes[len(name) - 1] += 1
            members = self.joined[name].setdefault(subscriber.encoder, {})
            members[connection] = connection.pending.append

    def _leave(self, subscriber: Subscriber, names: Iterable[str]) -> None:
        for name in names:
            audience = self.joined[name] if name in self.joined else {}
            members = audience[subscriber.encoder] if subscriber.encoder in audience else {}
            if subscriber.connection not in members:
                continue
            del members[subscriber.connection]
            if not members:
                del audience[subscriber.encoder]
            if not audience:
                del self.joined[name]
                if name[-1] == "*":
                    self.prefix_sizes -= collections.Counter([len(name) - 1])  # keeps none at zero

    def _find_audience(self, name: str) -> Audience:
        # Who has joined a channel by several patterns is in it once.
        joined = self.joined
        found = [joined[pattern] for size in self.prefix_sizes if size <= len(name)
                 and (pattern := name[:size] + "*") in joined]
        if name in joined:
            found.append(joined[name])
        if len(found) < 2:
            return found[0] if found else {}
        merged: Audience = {}
        for audience in found:
            for encoder, members in audience.items():
                merged.setdefault(encoder, {}).update(members)
        return merged


_LARGEST_GATHERED = 65536  # bytes
_MOST_GATHERED = 1 << 20  # bytes, whatever WRITE_BUFFER_SIZE is; see also _INDEX_BITS
_MAX_HEADS = 1000  # of channels whose names are not long: a name may be as large as a message


class Gathering:
    """Lets publishers that come at the same moment write together.

    A message to 50 subscribers is 50 system calls, which are most of what it costs; of eight
    publishers, each would make 50 of its own. So who comes right behind another waits a little, and
    the others have the interpreter's lock meanwhile. They queue their messages, leave the writing
    to the one that waits, and go on:

        A:  queue | wait . . . . . . . . . . . . . . . . . . | write what all have queued
        B:              queue, leave it to A
        C:                         queue, leave it to A

    Who publishes alone never waits, nor who has little to write, or much. Where nobody came in such
    a wait, there is no other for a while. A sleep may last far longer than it should, a second
    where many threads want the interpreter's lock: who comes then writes for the one that waits.
    Where nobody does, as in a program whose own threads are busy, nobody waits for far longer. And
    who has few connections is not left behind somebody's thousands. On 2 cores, 8 publishers with 8
    messages in flight each and 50 subscribers have twice the rate by that, and half the delay.
    """

    WAIT = 0.0003  # seconds
    RECENT = 0.0005  # seconds since another's messages were written: who comes then may wait
    PAUSE = 0.01  # seconds without a wait behind one in which nobody came
    OVERRUN = 0.003  # seconds: that a wait lasted so long shows that a thread keeps the lock
    LONG_PAUSE = 0.1  # seconds without a wait behind such a one
    FEW = 16  # connections to write to; for fewer, the wait would take longer than it saves
    MUCH = 16384  # bytes; of more, the system call is the smaller part
    LATE = 0.001  # seconds behind which a wait should have ended
    UNLIKE = 8  # times as many connections: two of whom one has so many do not write together

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards what follows
        self.touched: dict[Connection, Any] | None = None  # of the thread that waits, if one does
        self.last: int | None = None  # the connection that published last; None: several together
        self.written = 0.0  # when that was
        self.due = 0.0  # from when on somebody may wait again
        self.late = 0.0  # from when on nothing is left to the thread that waits

    def write(self, publisher: Connection, touched: dict[Connection, Any], size: int) -> None:
        """Write to connections what `publisher` queued, or leave it to the thread that waits.

        `touched` may have more of them behind the call. `size` is that of the messages, in bytes.
        """
        if len(touched) < self.FEW or size > self.MUCH:
            for connection in touched:
                connection.flush()
            return
        left = False
        try:
            left = self._leave_or_wait(publisher.number, touched)
        finally:  # where that fails, too: others may have left theirs to this thread
            if not left:
                for connection in touched:
                    connection.flush()
                with self.lock:
                    self.written = time.monotonic()

    def _leave_or_wait(self, number: int, touched: dict[Connection, Any]) -> bool:
        # Returns whether it was left to another thread.
        with self.lock:
            now = time.monotonic()
            if self.touched is not None:
                few, many = sorted((len(touched), len(self.touched)))
                if many > self.UNLIKE * few:
                    return False
                self.last = None
                if now < self.late:
                    self.touched.update(touched)
                    return True
                touched.update(self.touched)
                self.touched = None
                return False
            waits = self.last != number and self.due <= now < self.written + self.RECENT
            self.last = number
            if waits:
                self.touched, self.late = touched, now + self.LATE
        if waits:
            try:
                time.sleep(self.WAIT)
            finally:
                with self.lock:
                    if self.touched is touched:  # else another has written it meanwhile
                        self.touched = None
                        if self.last is not None:  # nobody came
                            self.due = now + self.PAUSE
                        if time.monotonic() - now > self.OVERRUN:
                            self.due = now + self.LONG_PAUSE
        return False


class Batch:
    """Messages that one thread publishes together.

    All are queued first, then each subscriber is written to once: under load, one system call
    carries many messages.

        add() --> payloads, of one channel --deliver()--> Log.append(): in the subscribers' queues
                     |                                        |
                     '- another channel: deliver() first      '-> touched --flush()--> Gathering

    So a change of channel costs one more Log.append(), and no write. When `limit` bytes are
    gathered, add() calls flush() by itself. With Redis, deliver() ends at the Outbox, and the read
    thread does the rest.
    """

    __slots__ = ("log", "gathering", "issuer", "user", "connection", "least", "limit", "channel",
                 "payloads", "acks", "heads", "size", "touched")

    def __init__(self, server: Server, issuer: str, user: str, connection: Connection) -> None:
        self.log, self.gathering = server.log, server.gathering
        self.issuer = issuer
        self.user = f'"user":{_quoted(user)},'.encode() if user else b""
        self.connection = connection  # the publisher's, which counts what is published
        # Once `limit` bytes are gathered, more are likely to come, and it grows fourfold. A flush
        # that finds it less than a quarter used halves it, down to `least`.
        self.least = self.limit = min(server.settings.write_buffer_size, _MOST_GATHERED)
        self.channel = ""
        self.payloads: list[bytes] = []  # consecutive messages to that channel
        self.acks: list[tuple[int, Ack]] = []  # by the message's index in these
        # By channel: what all its messages begin with. One that is in here was found writable by
        # the token, and WebSocket.receive() does not check it again.
        self.heads: dict[str, str] = {}
        self.size = 0
        self.touched: dict[Connection, Any] = {}  # to be flushed; the values are not used

    def add(self, channel: str, data: str, ack: Ack | None = None) -> None:
        """Publish a message with data in JSON, by the next flush() at the latest."""
        if channel != self.channel:
            self.deliver()
            self.channel = channel
        head = self.heads.get(channel)
        if head is None:
            head = f'{{"issuer":"{self.issuer}",{self.user.decode()}"channel":{_quoted(channel)}'
            if len(channel) <= _LONG_NAME:
                if len(self.heads) >= _MAX_HEADS:
                    self.heads.clear()
                self.heads[channel] = head
        payload = (f'{head},"data":{data}}}' if data else head + "}").encode()
        if ack:
            self.acks.append((len(self.payloads), ack))
        self.payloads.append(payload)
        self.size += len(payload)
        if self.size >= self.limit:
            self.flush()
            self.limit = max(self.least, min(4 * self.limit, _LARGEST_GATHERED))

    def deliver(self) -> None:
        """Append the messages to the log."""
        if self.payloads:
            self.connection.published += len(self.payloads)
            self.log.publish(self)
            # Only now: if publish() raises, the next deliver() publishes them again.
            self.payloads, self.acks = [], []

    def flush(self) -> None:
        """Append the messages and write to all that they were queued for."""
        self.deliver()
        if self.size < self.limit >> 2:
            self.limit = max(self.limit >> 1, self.least)
        size, self.size = self.size, 0
        if self.touched:
            self.gathering.write(self.connection, self.touched, size)
            self.touched = {}


# -------------------------------------------------------------------------------------------- Redis
# The log that several servers share, and that makes them one: a stream in Redis (6.2 or later, or
# Valkey). A stream is a list of entries; Redis appends to it (XADD) and cuts off its old end
# (XTRIM). It gives each entry an id that is higher than all before, so a reader that keeps the last
# id it has read can ask for all that is above (XREAD), and wait for it.
#
# One thread appends what is published here. Another reads what every server has appended, ours
# included, and does with it what a publisher's thread does where there is no Redis. Nothing is
# delivered before it has been read back. So there is one order for all servers, and a message that
# has come back is acknowledged to its publisher (`acks`).
#
#     publisher's thread       append thread               read thread, of every server
#     Outbox.put -+-> unsent -- take --> MULTI XADD EXEC --> [stream] -- XREAD --> _receive
#                 '-> entries <-- take_back, of what is its own --------------------+
#                            queues of the subscribers here, `acks` <--- Log.append-'
#
# Each server numbers its entries 1, 2, 3, and keeps them until they have come back. An answer of
# Redis does not prove that an entry is there: it may be lost when a replica takes over (a
# failover). An error does not prove that it is not. Only what is read back counts. So after any
# failure the rule is the same: connect again, and append again all that has not come back. A read
# thread drops an entry whose number it has had, and notices when a number is missing. Where
# messages may be missing, every subscriber is told of a gap.
#
#     what happens                          who notices it                and does what
#     the answer to XADD is lost            append thread, by an error    appends all again
#     Redis lost what it had (a failover)   read thread: a number is      tells of a gap; ours get
#                                           missing                       new numbers
#     the log is another one, or has lost   append thread: its id is not  _lift()
#     its end, and its clock is behind      above what was read
#     it was emptied, or cut past us        read thread, when it comes    tells of a gap, up to
#                                           back or was late: the first   what it reads next
#                                           entry is later
#     it has a hole when a server starts    read thread: a number above   keeps what is behind
#                                           1 of a server not met so far  it only
#     we append to one server and read      append thread: nothing has    both connect again
#     another                               come back for 10 s
#
# An entry holds up to 65,536 messages of one channel, and Redis gives it an id, MILLISECONDS-N. The
# id of its first message is MILLISECONDS-(N << 16), and each next one is higher by 1. All servers
# make the same ids of the same entry, so a client may come back to any of them.
#
# The fields of an entry, in this order; they are found by their places. The JSON of `user` is only
# a piece, "user":"alice", with its comma, or nothing (see Batch.user).
#
#     0       1 2      3  4      5 6       7    8      9  10   11   12      13   14      15
#     philote 1 server ID number N channel NAME issuer ID user JSON message JSON message JSON ...
#     philote 1 server ID number N heartbeat JSON
#     philote 1 server ID number N end JSON         see RedisLog.end_connections()
#     philote 1 server ID number N ended JSON
#     philote 1 server ID number 0 lift ""          see RedisLog._lift()

_FORMAT = [b"philote", b"1"]
# The kinds of entries, and what their JSON holds at least.
_KINDS: dict[bytes, dict[str, type]] = {
    b"channel": {}, b"lift": {}, b"end": {"ask": str, "whom": dict},
    b"ended": {"ask": str, "count": int}, b"heartbeat": {
        "id": str, "host": str, "version": str, "connections": int, "since": int, "floor": str,
        "gone": bool}}
_INDEX_BITS = 16  # for a message's place in its entry: no batch has 65,536 (see _MOST_GATHERED)
_HEARTBEAT_TIME = 2  # seconds between heartbeats
_GONE_TIME = 30  # seconds without one, after which a server counts as gone. It may just be late:
#                  its read thread may wait 10 s for its subscribers, and ours for ours (_let_read)
_UNAVAILABLE_TIME = 5  # seconds for an answer of Redis, and for an entry to come back
_ANSWERED_TIME = 1  # seconds for the answers of other servers, once ours is there (wait_for_all())
_LAG_TIME = 8  # seconds that a client waits whose position we have not read yet (wait_until()):
#                less than the 10 that ours wait for an answer, or they would never get in
_LONGEST_WAIT = 10.0  # seconds that the read thread waits for subscribers (_let_read())
_STALLED_TIME = 1  # seconds in which one takes no bytes, after which it is not waited for
_OUTBOX_SIZE = 1 << 24  # bytes that may wait to come back; with more, publishers have to wait
_MOST_ENTRIES, _MOST_BYTES = 500, 1 << 20  # that are appended, or read, at a time
_MOST_TRIMMED = 100_000  # entries that are cut off at a heartbeat, at most: more than come between
#                          two, and 20 ms of work for Redis. Without a LIMIT it would stop at
#                          10,000, and while more than that came, the stream would only grow.
_LARGEST_IN_REDIS = 1 << 26  # bytes of a message. Encoded anew it may have 6 times as many: beside
#                              half a surrogate pair, DEL becomes \u007f (and 1e15, anywhere,
#                              1000000000000000.0). Redis refuses more than 8 times as many.
_MOST_SERVERS = 1000  # with more, those that were not heard of for a day are forgotten


def _before(first: int) -> int:
    # An id below this one and above all that were given out before it. Where the counter is 0, that
    # is in the millisecond before. The highest counter there would be 2**64 - 1, which has 20
    # digits, and clients can send no more than 19 (_ID): so it is 2**63 - 1.
    return first - 1 if first & _COUNTER else first - 1 - (1 << _COUNTER_BITS - 1)


class Outgoing:
    """An entry that this server appends, kept until it has been read back."""

    __slots__ = ("number", "fields", "size", "acks", "connection", "born", "sent")

    def __init__(self, fields: list[bytes], acks: Sequence[tuple[int, Ack]] = (),
                 connection: Connection | None = None) -> None:
        self.number = 0
        self.fields = fields
        self.size = sum(map(len, fields)) + _GROUP_OVERHEAD + len(fields) * _KEPT_OVERHEAD
        self.acks = acks
        self.connection = connection  # the publisher's, flushed when `acks` have been called
        self.born = time.monotonic()
        self.sent = 0.0  # when it was sent last; 0 where it has to be sent (again)


class Incoming:
    """An entry as it was read. Raises any Exception where no Philote of this version wrote it.

    What is used later is tried here, such as the floor, so a bad entry is skipped as a whole.
    """

    __slots__ = ("server", "number", "kind", "name", "issuer", "user", "payloads", "value")

    def __init__(self, fields: list[bytes]) -> None:
        if fields[:2] != _FORMAT or fields[6] not in _KINDS:
            raise ValueError
        self.server, self.number, self.kind = fields[3], int(fields[5]), fields[6]
        self.name, self.issuer, self.user = "", "", b""
        self.payloads, self.value = list[bytes](), dict[str, Any]()
        if self.kind == b"channel":
            self.name, self.issuer = fields[7].decode(), fields[9].decode()
            self.user, self.payloads = fields[11], fields[13::2]
        elif self.kind != b"lift":
            self.value = json.loads(fields[7])
            for name, kind in _KINDS[self.kind].items():
                if not isinstance(self.value[name], kind):
                    raise TypeError
            decode_id(self.value.get("floor", ""))
            self.server.decode()


class Outbox:
    """The entries of this server that have not come back, and which of them are still to be sent.

    An entry goes from `unsent` to Redis, and stays in `entries` until it is read back. After a
    failure nobody knows which have arrived: all of `entries` are unsent again.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()  # guards all below
        self.entries: collections.deque[Outgoing] = collections.deque()  # by number
        self.unsent: collections.deque[Outgoing] = collections.deque()  # the last of these
        self.size = 0  # bytes, of all
        self.last_number = 0
        self.closing = threading.Event()

    def put(self, entry: Outgoing) -> None:
        """Give an entry the next number, and let it be appended."""
        with self.changed:  # its lock is an RLock: take_back() calls this, and holds the lock
            self.last_number += 1
            entry.number, entry.sent = self.last_number, 0
            self.entries.append(entry)
            self.unsent.append(entry)
            self.size += entry.size
            self.changed.notify()

    def take(self, seconds: float) -> list[Outgoing]:
        """Take entries to send them; where there are none, wait for so many seconds at most."""
        with self.changed:
            self.changed.wait_for(lambda: self.unsent or self.closing.is_set(), seconds)
            taken, size, now = list[Outgoing](), 0, time.monotonic()
            while self.unsent and len(taken) < _MOST_ENTRIES and size < _MOST_BYTES:
                entry = self.unsent.popleft()
                entry.sent = now
                # Not later, when it is sent: by then take_back() may have given it a higher number,
                # which would stand in front of lower ones of this batch.
                entry.fields[5] = b"%d" % entry.number
                size += entry.size
                taken.append(entry)
        return taken

    def restore(self) -> None:
        """Let all that has not come back be sent again."""
        with self.changed:
            for entry in self.entries:
                entry.sent = 0
            self.unsent = self.entries.copy()

    def take_back(self, number: int) -> Outgoing | None:
        """Remove and return an entry that came back; None where it has got a new number since.

        Entries are sent in the order of their numbers. So those with lower numbers that have not
        come back by now are lost, and appended again. They get new numbers: a read thread drops an
        entry whose number is not above the last one.

            5, 6 and 7 were sent, and Redis has lost 5 and 6. When 7 is read back:
            the read thread, which expected 5, tells of a gap, and expects 8
            take_back(7) returns 7; what was 5 and 6 is sent again as 8 and 9
        """
        with self.changed:
            lost = []
            while self.entries and self.entries[0].number <= number:
                lost.append(self.entries.popleft())
                self.size -= lost[-1].size
            found = lost.pop() if lost and lost[-1].number == number else None
            for entry in lost:
                self.put(entry)
            # After restore(), `unsent` held them already, and what was found, too: it is made anew.
            if lost:
                self.unsent = collections.deque(e for e in self.entries if not e.sent)
            return found

    def close(self) -> None:
        """Let nobody wait any more."""
        self.closing.set()
        with self.changed:
            self.changed.notify()

    def count_messages(self) -> int:
        """Count the messages that have not come back."""
        with self.changed:  # names and values take turns; from 12 on, all names are of messages
            return sum(entry.fields[12::2].count(b"message") for entry in self.entries)

    def age(self) -> float:
        """How long the oldest entry has waited, in seconds."""
        with self.changed:
            return time.monotonic() - self.entries[0].born if self.entries else 0.0


class _Question:
    """What this server has asked all servers, see RedisLog.end_connections()."""

    def __init__(self, servers: set[str]) -> None:
        self.servers = servers  # by id, that are to answer
        self.answers: dict[str, int] = {}  # how many connections each has ended; the read thread's
        self.answered = threading.Event()  # set with each answer

    def missing(self) -> set[str]:
        """The servers that have not answered."""
        return self.servers - self.answers.copy().keys()


class RedisLog(Log):
    """A log that many servers share. Its own two threads do all that Redis is asked for.

    Each of these works with a connection of its own, and after an error with a new one (_keep). The
    first error sets `failure` (_fail), and the log counts as out of reach until an entry that was
    sent after that has been read back (_recover): then the whole way works again.

    Raises SettingsError, and PhiloteError where a package is missing.
    """

    ROWS = (
        ("redis_up", "gauge", "Whether the log can be reached.", "redis_up"),
        ("redis_entries_written_total", "counter", "Entries appended.", "redis_written"),
        ("redis_entries_read_total", "counter", "Entries read.", "redis_read"),
        ("redis_entries_skipped_total", "counter", "Entries that no server of this version wrote.",
         "redis_skipped"),
        ("redis_entries_repeated_total", "counter", "Entries read once more.", "redis_repeated"),
        ("redis_outbox_entries", "gauge", "Entries that have not come back.", "redis_outbox"),
        ("redis_outbox_bytes", "gauge", "Bytes of these.", "redis_outbox_bytes"),
        ("redis_oldest_unacknowledged_seconds", "gauge", "Age of the oldest of them.", "redis_age"),
        ("redis_gaps_total", "counter", "Times that messages may have been missing.", "redis_gaps"),
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if settings.max_message_size > _LARGEST_IN_REDIS:
            raise SettingsError(f"MAX_MESSAGE_SIZE: with REDIS_URL it may be {_LARGEST_IN_REDIS}")
        self.redis, self.connect, self.address = _find_redis(settings.redis_url)
        self.key = settings.redis_key
        self.id = uuid.uuid4().hex[:16].encode()
        self.head = [*_FORMAT, b"server", self.id, b"number", b"0"]  # of our entries
        self.began = round(time.time())
        self.position = 0
        self.outbox = Outbox()
        self.ready = threading.Event()  # set when the first of our entries, and all before, is read
        self.closing = self.outbox.closing
        self.fatal: PhiloteError | None = None  # why it cannot begin
        self.failure = ""  # why the log cannot be reached; outbox.changed guards these three
        self.failed_at = 0.0  # when that began
        self.heard_until = 0.0  # up to when we had read, at that time, what other servers wrote
        # How often both connections had to be opened again: the append thread counts, and the read
        # thread, which it cannot interrupt, ends its loop when it sees another number.
        self.breaks = 0
        self.written = 0  # entries; the append thread's, as is the next
        self.full = False  # whether Redis has refused the last for want of memory
        # Whether a heartbeat is on its way: set by the append thread, undone by the read thread, so
        # that none pile up during a break.
        self.beating = False
        self.leaving = False  # whether this server stops, and its heartbeats say that it is gone
        # The read thread's; others only look.
        self.cursor = 0  # the stream's id of the last entry that was read
        self.first = 0  # the first entry that was read, or the last lift, by its first message's id
        # The log was emptied, or cut past the cursor. That is a gap up to the next entry that is
        # read, whose id tells how far: other servers may have read more of what is gone.
        self.cut = False
        self.ahead = 0  # how much the clock of Redis is ahead of ours, as a difference of ids
        # By server: its next number, and when it was heard of; what it said of itself, and when.
        self.expected: dict[bytes, tuple[int, float]] = {self.id: (1, math.inf)}
        self.servers: dict[bytes, tuple[dict[str, Any], float]] = {}
        self.asked: dict[str, _Question] = {}  # that are not done
        self.read_count = self.skipped = self.repeated = self.losses = 0
        self.at_end = 0.0  # all that was in the log at that time has been read
        self.patience, self.rested = _LONGEST_WAIT, time.monotonic()  # see _let_read()
        self.stalled: dict[Connection, int] = {}  # and the bytes written to each when it stalled
        # Bytes that may wait for a subscriber before _let_read() waits for it, too: what comes
        # until it is looked at again must still fit into its queue.
        self.most = min(settings.max_queue_size >> 1,
                        max(0, settings.max_queue_size - 2 * _LARGEST_GATHERED))
        self.threads = [
            threading.Thread(target=self._run, args=(work,), name=f"philote-{name}", daemon=True)
            for name, work in (("append", self._append_forever), ("read", self._read_forever))]

    # Any thread

    def begin(self, is_over: Callable[[], bool]) -> None:
        """Read the log up to now; wait for Redis where it is not there.

        Raises PhiloteError where it would be in vain, OSError where the system has no thread left,
        and _Stopped once `is_over`.
        """
        try:
            for thread in self.threads:
                _start(thread)
        except OSError:
            self.close()
            raise
        said = time.monotonic()
        while not self.ready.wait(0.05) or self.fatal:  # with `fatal` they may still set `ready`
            if self.fatal or is_over():
                self.close()
                raise self.fatal or _Stopped
            if time.monotonic() > said + 60:
                said = time.monotonic()
                log.warning("still waiting: %s", self.reason)
        log.info("the log is in Redis at %s, stream %s; this server's id is %s",
                 self.address, self.key, self.id.decode())

    def check(self) -> None:
        """Try whether Redis lets us in. Raises PhiloteError."""
        connection = self.connect()
        try:
            connection.connect()
            self._look_at_server(connection)
            self._execute(connection, ("XLEN", self.key))
        except (self.redis.RedisError, OSError) as error:
            self._fail(error)
        finally:
            connection.disconnect()
        if self.fatal or self.failure:
            raise self.fatal or PhiloteError(self.failure)

    def publish(self, batch: Batch) -> None:
        """Let messages be appended; they are acknowledged when they have come back."""
        fields = [*self.head, b"channel", batch.channel.encode(), b"issuer", batch.issuer.encode(),
                  b"user", batch.user]
        for payload in batch.payloads:
            fields += b"message", payload
        self.outbox.put(Outgoing(fields, batch.acks, batch.connection))

    def end_connections(self, whom: Mapping[str, str]) -> tuple[int, bool]:
        """End connections of all servers, our own at once; the others are asked through the log.

            here              end {"ask": A, "whom": {"user": "alice"}}   -> log -> all servers
            all servers       ended {"ask": A, "count": 2}                -> log -> here: asked[A]

        Returns how many, and whether all servers that are known answered in time. Our own answer
        counts only who came since: to end somebody twice counts once.
        """
        count, end = self.end_own(**whom), time.monotonic() + _UNAVAILABLE_TIME
        with self._ask(whom) as question:
            while question.missing() and (left := end - time.monotonic()) > 0:
                question.answered.wait(left)
                question.answered.clear()
            return count + sum(question.answers.copy().values()), not question.missing()

    def wait_for_all(self, connection: Connection) -> None:
        """Wait until all that any server had to append before has been read here.

        Each server answers the question of end_connections() behind that. So it is asked to end
        nobody. Our own answer shows that Redis can be reached; then the others have _ANSWERED_TIME,
        for one that was killed a moment ago still counts as living.
        """
        if not self.wait_for_room(connection):
            return
        end = math.inf
        with self._ask({}) as question:
            while (question.missing() and (left := end - time.monotonic()) > 0
                   and connection.state is SUBSCRIBED and not self.stopping.is_set()):
                connection.pause(left, question.answered)
                question.answered.clear()
                if end == math.inf and self.id.decode() not in question.missing():
                    end = time.monotonic() + _ANSWERED_TIME

    @contextlib.contextmanager
    def _ask(self, whom: Mapping[str, str]) -> Iterator[_Question]:
        # Our own answer is waited for, too. Where no other server is known, nothing else would
        # show that the question is in the log, to be found by those that are not known.
        question = _Question({about["id"] for about in self._living()} | {self.id.decode()})
        ask = uuid.uuid4().hex
        self.asked[ask] = question
        self.outbox.put(self._make_entry(b"end", {"ask": ask, "whom": whom}))
        try:
            yield question
        finally:
            del self.asked[ask]

    def wait_for_room(self, connection: Connection, seconds: float = math.inf) -> bool:
        """Wait while too much has not come back; returns whether there is room."""
        end = time.monotonic() + seconds
        while self.outbox.size >= _OUTBOX_SIZE:
            if time.monotonic() >= end or connection.state is CLOSING or self.stopping.is_set():
                return False
            connection.pause(0.05)
        return True

    def wait_until(self, position: int) -> None:
        """Wait a while until the log is read up to an id that another server gave out."""
        # One that is not there once all is read that was in the log by now is another log's, and
        # will never come.
        begin = time.monotonic()
        while (self.position < position and self.at_end < begin
               and time.monotonic() < begin + _LAG_TIME and not self.stopping.is_set()):
            time.sleep(0.01)

    def drain(self, deadline: float) -> None:
        """Take leave, and wait until all that was published has come back."""
        self.leaving = True
        self.outbox.put(self._make_heartbeat())
        # While Redis is away, only messages are waited for, not our last heartbeat.
        while ((lost := self.outbox.count_messages()) or self.outbox.entries and not self.reason
               ) and time.monotonic() < deadline:
            time.sleep(0.01)
        if lost:
            log.error("%d messages have not come back from Redis, and may be lost", lost)

    def close(self) -> None:
        """End the threads."""
        self.outbox.close()
        end = time.monotonic() + 0.5  # they may be waiting for Redis, and end with the process
        for thread in self.threads:
            if thread.is_alive():
                thread.join(max(0, end - time.monotonic()))

    @property
    def reason(self) -> str:
        """Why the log cannot be reached: an error that is not overcome, or no entry comes back."""
        age = self.outbox.age()
        return self.failure or (
            f"nothing has come back from Redis for {age:.0f} s" if age > _UNAVAILABLE_TIME else "")

    @property
    def now(self) -> int:
        """The time of Redis, as of the last entry: our own clock may be another."""
        return self.position

    def describe(self) -> dict[str, Any]:
        """Say how the log is, and which servers share it."""
        reason, shown = self.reason, ("id", "host", "version", "connections", "since")
        return {"cluster": {"up": not reason, "reason": reason, "id": self.id.decode(), "servers": [
            {name: about[name] for name in shown} for about in self._living()]}}

    def totals(self) -> dict[str, Any]:
        """Count what there is, here and in Redis."""
        return {
            **super().totals(), "redis_up": int(not self.reason), "redis_written": self.written,
            "redis_read": self.read_count, "redis_skipped": self.skipped,
            "redis_repeated": self.repeated, "redis_outbox": len(self.outbox.entries),
            "redis_outbox_bytes": self.outbox.size, "redis_age": round(self.outbox.age(), 3),
            "redis_gaps": self.losses}

    def tell_gap(self, position: int) -> None:
        """Tell all subscribers that messages up to an id may be missing. The read thread.

        A subscriber with ids gets a message that says so. One without ids could not know what it
        missed, and is disconnected. The history is cleared: else a client that comes back would get
        what is left of it, and not learn of the gap.
        """
        if self.ready.is_set():
            log.error("Redis: messages may be missing, all subscribers are told")
        told, ended = list[Connection](), list[Subscriber]()
        with self.lock:
            self.losses += self.ready.is_set()
            self.cut = False
            self.position = max(self.position, position)
            self.history.clear(self.position)
            for connection in self.issuers.values():
                subscriber = connection.handler
                if isinstance(subscriber, Subscriber):
                    if subscriber.encoder.with_ids:
                        self.gaps += 1
                        connection.put(subscriber.encode_gap(self.position))
                        told.append(connection)
                    elif subscriber.channels:  # nothing may come behind what it missed
                        self._leave(subscriber, subscriber.channels)
                        ended.append(subscriber)
        for connection in told:
            connection.flush()
        for subscriber in ended:
            subscriber.end(CloseReason.SERVICE_RESTART, "messages may be missing")

    # The holder of the log's lock

    def _look_back(self, past: Past, names: Names, kept: Iterable[str],
                   seen: int) -> tuple[int, bool, dict[str, int]]:
        if past.since and past.partly:  # a duration: parse_past() went by our clock
            past = past._replace(since=max(0, past.since + self.ahead))
        return super()._look_back(past, names, kept, seen)

    # The append thread and the read thread

    def _run(self, work: Callable[[Any], None]) -> None:
        try:
            self._keep(work)
        except BaseException as error:  # where there is no memory, not even to try it again
            self.on_failure(error)

    def _keep(self, work: Callable[[Any], None]) -> None:
        # Works with a connection of its own, and with a new one when that fails.
        while not self.closing.is_set():
            connection = self.connect()
            try:
                connection.connect()
                work(connection)
            except (self.redis.RedisError, OSError, ValueError) as error:
                self._fail(error)
            except Exception as error:
                log.exception("Redis: unexpected error")
                self._fail(error)
            finally:
                with contextlib.suppress(self.redis.RedisError, OSError):
                    connection.disconnect()
            # Random, for the connections of all servers may have ended at the same moment.
            self.closing.wait(random.uniform(0.1, 0.4))

    def _execute(self, connection: Any, *commands: Sequence[Any]) -> Any:
        # Sends all commands, then returns the answer to the last. Raises the error that one of them
        # was answered with; those of commands within a transaction are items of EXEC's answer.
        connection.send_packed_command(connection.pack_commands(commands))
        answer = [connection.read_response() for _ in commands][-1]
        for item in answer if isinstance(answer, list) else ():
            if isinstance(item, Exception):
                raise item
        return answer

    def _fail(self, error: Exception) -> None:
        reason = _on_one_line(str(error) or type(error).__name__).rstrip(".")
        refused = self.redis.AuthenticationError, self.redis.exceptions.NoPermissionError
        if (isinstance(error, refused) or "DB index" in reason) and not self.ready.is_set():
            self.fatal = PhiloteError(f"Redis at {self.address} refuses us: {reason}")
        with self.outbox.changed:
            first, self.failure = not self.failure, f"Redis at {self.address}: {reason}"
            if first:
                self.failed_at = time.monotonic()
                self.heard_until = self.at_end
        if first and not self.closing.is_set() and not self.fatal:
            log.error("%s; it is tried again until it works", self.failure)

    def _recover(self, entry: Outgoing) -> None:
        # The read thread. An entry that was sent after the failure has come back, so the whole way
        # works again. Where nobody publishes, it is a heartbeat.
        with self.outbox.changed:
            if not self.failure or entry.sent <= self.failed_at:
                return
            now = time.monotonic()
            # Servers that lived when the failure began may not have been heard since: they have
            # _GONE_TIME from now on.
            for server, (about, heard) in self.servers.items():
                if heard > self.heard_until - _GONE_TIME:
                    self.servers[server] = about, now
            self.failure = ""  # after the loop, for _living() goes by it without the lock
        seconds = now - self.failed_at
        log.info("Redis at %s is there again after %.1f seconds", self.address, seconds)

    # The append thread

    def _append_forever(self, connection: Any) -> None:
        self.outbox.restore()
        if self.full:
            self._make_room(connection)
        beat = 0.0
        while not self.closing.is_set():
            now = time.monotonic()
            if now >= beat + _HEARTBEAT_TIME:
                beat = now
                self._look_whether_entries_return(now)
                if not self.beating:
                    self.beating = True
                    self.outbox.put(self._make_heartbeat())
                self._trim(connection, self._find_floor())
            if entries := self.outbox.take(beat + _HEARTBEAT_TIME - now):
                self._append(connection, entries)

    def _append(self, connection: Any, entries: Sequence[Outgoing]) -> None:
        # In a transaction: were one refused and the next taken, its number would be skipped.
        before = self.cursor
        try:
            ids = self._execute(connection, ("MULTI",), *(
                ("XADD", self.key, "*", *entry.fields) for entry in entries), ("EXEC",))
        except self.redis.ResponseError as error:  # XADD was refused, or EXEC
            self.full = (isinstance(error, self.redis.exceptions.OutOfMemoryError)
                         or "OOM" in str(error))
            raise
        self.written += len(entries)
        if decode_id(ids[0].decode()) <= before:
            self._lift(connection, before)

    def _lift(self, connection: Any, before: int) -> None:
        # Redis gave our entry an id that is not above what was read before. In one stream ids never
        # fall, whatever the clock does: so this is another log, or one that has lost its end, and
        # its clock is behind. Read threads ask for what is above the last id that they have, and
        # would never see what we append. So an entry is added with an id that we choose, above all
        # that was read; what is appended after it gets higher ones. It also tells each read thread
        # that messages may be missing, and that numbers which it has had may come again. That is
        # why it is needed even where the log has come above our id meanwhile, by another server's
        # lift or with time, and Redis refuses that id.
        lift = *self.head, "lift", ""
        try:
            self._execute(connection, ("XADD", self.key, encode_id(before + 1), *lift))
        except self.redis.ResponseError:
            self._execute(connection, ("XADD", self.key, "*", *lift))
        self.outbox.restore()

    def _look_whether_entries_return(self, now: float) -> None:
        # After a failover we may be appending to one Redis server and reading from another. It is
        # certain only if the read thread has been at the end of its log since the entry was sent,
        # and a second later than that: what was sent is not in the log at once.
        with self.outbox.changed:
            oldest = self.outbox.entries[0].sent if self.outbox.entries else 0
        if oldest and now > oldest + 2 * _UNAVAILABLE_TIME and self.at_end > oldest + 1:
            self.breaks += 1
            raise OSError("what was written does not come back")

    def _make_room(self, connection: Any) -> None:
        # Redis has no memory left. It refuses heartbeats, too: so no server's floor rises, and the
        # stream would stay as it is for ever, however old. Therefore our own floor alone counts
        # here, at the time that Redis has. What is younger than a heartbeat is left: who is later
        # than that notices the cut (_read_forever()).
        self.full = False
        now = int(self._execute(connection, ("TIME",))[0]) * 1000
        floor = min(self._own_floor(now << _COUNTER_BITS),
                    now - int(1000 * _HEARTBEAT_TIME) << _COUNTER_BITS)
        self._trim(connection, encode_id(floor))

    def _trim(self, connection: Any, floor: str) -> None:
        self._execute(
            connection, ("XTRIM", self.key, "MINID", "~", floor, "LIMIT", _MOST_TRIMMED))

    def _own_floor(self, now: int) -> int:
        # As far back as this server's history reaches: one that starts fills its own from the
        # stream. But not past what we have read, see _find_floor().
        with self.lock:
            self.history.trim(now)
            kept = max(self.history.floor, now - self.history.time)
        return min(kept & ~_COUNTER | (kept & _COUNTER) >> _INDEX_BITS, self.cursor)

    def _make_heartbeat(self) -> Outgoing:
        about = {
            "id": self.id.decode(), "host": platform.node(), "version": __version__,
            "connections": len(self.issuers), "since": self.began, "gone": self.leaving,
            "floor": encode_id(self._own_floor(self.now))}
        return self._make_entry(b"heartbeat", about)

    def _make_entry(self, kind: bytes, value: Any) -> Outgoing:
        return Outgoing([*self.head, kind, json.dumps(value).encode()])

    def _find_floor(self) -> str:
        # The stream is cut in front of the lowest floor of all servers that live. That of each is
        # at most its own cursor: nothing is cut that one of them has not read.
        return encode_id(min((decode_id(about["floor"]) for about in self._living()), default=0))

    def _living(self) -> list[dict[str, Any]]:
        # Silence counts only up to the time to which we have read the log. After a break, or where
        # this process was stopped for a while, what the others wrote meanwhile is still to be read.
        now = self.heard_until if self.failure else self.at_end
        return [about for about, heard in self.servers.copy().values() if now < heard + _GONE_TIME]

    # The read thread

    def _read_forever(self, connection: Any) -> None:
        if not self.ready.is_set():
            self._look_at_server(connection)
        breaks, count, is_new = self.breaks, 10, True
        while breaks == self.breaks and not self.closing.is_set():
            # BLOCK is in milliseconds. It answers within a second, so that silence of
            # _UNAVAILABLE_TIME is a failure; and twice within a heartbeat, so that a thread that
            # has nothing to read is not taken for late, below.
            asked = time.monotonic()
            answer = self._execute(connection, (
                "XREAD", "COUNT", count, "BLOCK", 180 * _UNAVAILABLE_TIME, "STREAMS", self.key,
                encode_id(self.cursor)))
            entries = answer[0][1] if answer else []
            # If the last entry that we have read is gone, so may be later ones. It can be after a
            # break, or where this thread was late (_make_room()).
            if self.cursor and (is_new or time.monotonic() > self.at_end + _HEARTBEAT_TIME):
                oldest = self._execute(connection, ("XRANGE", self.key, "-", "+", "COUNT", 1))
                self.cut |= not oldest or decode_id(oldest[0][0].decode()) > self.cursor
            is_new = False
            size = self._receive(entries)
            if len(entries) < count:
                self.at_end = asked  # this process may have been stopped since
            # While there is more, ask for more at a time. But not where entries are large: COUNT
            # limits their number, and nothing limits their bytes.
            more = len(entries) == count and size < _MOST_BYTES >> 1
            count = min(2 * count, _MOST_ENTRIES) if more else max(10, count >> 1)

    def _look_at_server(self, connection: Any) -> None:
        try:
            about = self._execute(connection, ("INFO",)).decode(errors="replace")
        except self.redis.ResponseError:
            return  # a service that does not tell
        version = re.search(r"^redis_version:((\d+)\.(\d+))", about, re.MULTILINE)
        if version and (int(version[2]), int(version[3])) < (6, 2):
            self.fatal = PhiloteError(
                f"Redis at {self.address} is {version[1]}; 6.2 or later is needed")
        policy = re.search(r"^maxmemory_policy:(allkeys\S*)", about, re.MULTILINE)
        if policy:
            log.warning("Redis at %s may throw the log away (maxmemory-policy %s); set: "
                        "maxmemory-policy noeviction", self.address, policy[1])

    def _receive(self, entries: Sequence[tuple[bytes, list[bytes]]]) -> int:
        # Returns how many bytes they had.
        touched: dict[Connection, Any] = {}
        size = written = 0
        for text, fields in entries:
            cursor = decode_id(text.decode())  # its own; `first` is its first message's
            first = cursor & ~_COUNTER | (cursor & _COUNTER) << _INDEX_BITS
            if not self.cursor:  # the first entry: what was before it is not known here
                self.first = first
                self.history.floor = self.position = _before(first)
            size += sum(map(len, fields))
            try:
                self._receive_entry(first, Incoming(fields), touched)
            except Exception:
                self.skipped += 1
                if self.skipped == 1:
                    log.warning("Redis: the stream %s has entries that no Philote of this version "
                                "wrote, such as %s; they are skipped", self.key, text.decode())
            self.cursor = cursor
            self.read_count += 1
            # Written every so many bytes and at the end, so that what one answer brings does not
            # fill a queue by itself.
            if size - written >= _LARGEST_GATHERED or text is entries[-1][0]:
                written = size
                for connection in touched:
                    connection.flush()
                self._let_read(touched)
                touched.clear()
        return size

    def _let_read(self, connections: Iterable[Connection]) -> None:
        # What piled up during a break comes all at once, and would overflow the queues even of
        # peers that read well. So this waits for all of these while they take any bytes. One that
        # takes none for a second has stalled: it is left to on_overflow(), and not waited for again
        # before it has taken some. All other subscribers wait meanwhile. So this waits for ten
        # seconds at most (`patience`), and regains two of them in each minute.
        begin = time.monotonic()
        self.patience = min(_LONGEST_WAIT, self.patience + (begin - self.rested) / 30)
        # The bytes written to each, and since when it has taken no more.
        slow = {c: (c.sent, begin) for c in connections
                if c.size > self.most and self.stalled.get(c) != c.sent}
        while slow and (now := time.monotonic()) <= begin + self.patience:
            for connection, (sent, since) in [*slow.items()]:
                if connection.size <= self.most:
                    del slow[connection]
                elif connection.sent != sent:
                    slow[connection] = connection.sent, now
                elif now > since + _STALLED_TIME:
                    self.stalled[connection] = sent
                    del slow[connection]
            time.sleep(0.002)
        if self.stalled:
            self.stalled = {c: n for c, n in self.stalled.items() if c.size > self.most}
        self.rested = time.monotonic()
        self.patience -= self.rested - begin

    def _receive_entry(self, first: int, entry: Incoming, touched: dict[Connection, Any]) -> None:
        if entry.kind == b"lift":
            self.tell_gap(_before(first))
            # As if the log began here: what others append again may have numbers that we have had.
            # What we append again has not: it has not come back.
            self.first = first
            self.expected = {server: (0, heard) if server != self.id else (number, heard)
                             for server, (number, heard) in self.expected.items()}
            return
        if not self._is_next(entry.server, entry.number, first):
            self.repeated += 1
            return
        own = self.outbox.take_back(entry.number) if entry.server == self.id else None
        acks = own.acks if own else ()
        try:
            if entry.kind == b"channel":
                self.append(
                    entry.name, entry.payloads, entry.issuer, entry.user, touched, acks, first)
            else:
                self._receive_notice(entry)
                if own:  # a heartbeat, in most cases
                    self.ahead = first - _now()
                # So the position moves on while nobody publishes. It is `now`, by which the history
                # forgets what is too old.
                with self.lock:
                    self.position = first
        except Exception:  # no memory, or no thread: some subscribers may have it, others not
            log.exception("Redis: unexpected error")
            if entry.payloads:
                self.tell_gap(first + len(entry.payloads) - 1)
            for index, ack in acks:  # they are in the log; some may be called already
                ack(first + index, 0)
            # Where it is our question, or our answer to it, no other answer of ours will come.
            if own and (question := self.asked.get(entry.value.get("ask", ""))):
                question.answers.setdefault(self.id.decode(), 0)
                question.answered.set()
        if own:
            if own.acks and own.connection:
                touched[own.connection] = None
            self._recover(own)
            self.ready.set()

    def _is_next(self, server: bytes, number: int, first: int) -> bool:
        # Whether an entry is new. If one is missing, the next of the same server shows it, which is
        # a heartbeat at the latest.
        #
        # The first entry that we meet of a server may have any number if those before it were cut
        # off from the log: but then the server has written a heartbeat within the first _GONE_TIME
        # of what is left. A server that is met later has just started, and the number is 1. If it
        # is not, the log has lost what the server wrote before, or we have forgotten the server
        # (see _MOST_SERVERS): that is a gap.
        if server not in self.expected:
            late = first > self.first + (int(1000 * _GONE_TIME) << _COUNTER_BITS)
            self.expected[server] = 1 if late or self.ready.is_set() else number, 0
        expected = self.expected[server][0] or number  # after a lift it is 0: any number will do
        if number < expected:
            return False
        if number > expected or self.cut:
            self.tell_gap(_before(first))
        self.expected[server] = number + 1, time.monotonic()
        return True

    def _receive_notice(self, entry: Incoming) -> None:
        value = entry.value
        if entry.kind == b"heartbeat":
            self._receive_heartbeat(entry.server, value)
        elif entry.kind == b"ended":
            if question := self.asked.get(value["ask"]):
                question.answers[entry.server.decode()] = value["count"]
                question.answered.set()
        elif not self.ready.is_set():  # it was asked before our time
            pass
        elif not value["whom"]:  # wait_for_all()
            self._tell_ended(value["ask"], 0)
        else:  # there may be thousands to end, and all that comes would wait meanwhile
            threading.Thread(target=self._end_own, args=(value,), daemon=True).start()

    def _end_own(self, asked: dict[str, Any]) -> None:
        whom = asked["whom"]
        self._tell_ended(asked["ask"], self.end_own(whom.get("user", ""), whom.get("issuer", "")))

    def _tell_ended(self, ask: str, count: int) -> None:
        self.outbox.put(self._make_entry(b"ended", {"ask": ask, "count": count}))

    def _receive_heartbeat(self, server: bytes, about: dict[str, Any]) -> None:
        if server == self.id:
            self.beating = False  # before anything that may fail: else there would be no other
            # Our last entry has come back, unless some that were lost are appended again after it.
            if about["gone"] and not self.outbox.entries:
                self.closing.set()
        now = time.monotonic()
        # One that says that it is gone is gone at once, see _living().
        self.servers[server] = about, -math.inf if about["gone"] else now
        if len(self.expected) > _MOST_SERVERS:
            for name in [name for name, (_, at) in self.expected.items() if at < now - 86400]:
                del self.expected[name]
                self.servers.pop(name, None)


def _find_redis(url: str) -> tuple[Any, Callable[[], Any], str]:
    # Returns the package, a function that makes a connection as the URL says, and the address of
    # Redis for people to read. Raises SettingsError, and PhiloteError where a package is missing.
    try:
        redis: Any = importlib.import_module("redis")
        importlib.import_module("hiredis")  # several times as fast
    except ImportError:
        raise PhiloteError("REDIS_URL needs more packages; install them with: "
                           "pip install 'redis[hiredis]'") from None
    try:
        # The pool is only asked what the URL says; some options that may stand there are ours. No
        # retries of the library's: what has to be sent again, only the outbox knows.
        pool = redis.ConnectionPool.from_url(url)
        connect = functools.partial(pool.connection_class, **{
            **pool.connection_kwargs, "protocol": 2, "decode_responses": False, "retry": None,
            "socket_timeout": _UNAVAILABLE_TIME, "socket_connect_timeout": _UNAVAILABLE_TIME})
        one = connect()  # made, not opened: it raises where it does not know an option
    except (ValueError, TypeError, redis.RedisError):  # whose text may hold the password
        raise SettingsError(
            _not_allowed("REDIS_URL", "", _REDIS.allowed) + "; a password has to be "
            "percent-encoded in it, and what stands behind ? must be options of redis-py"
        ) from None
    where = getattr(one, "path", "") or f"{one.host}:{one.port}"
    return redis, connect, where + (f", database {one.db}" if one.db else "")


# -------------------------------------------------------------------------------------- subscribers
# What a connection becomes: a WebSocket or an event stream. All that deals with simple-websocket
# stands here.
#
# Three kinds of threads have to do with a subscriber. Its own lets it catch up with the past and
# join its channels (follow), then reads what the client sends. The threads of publishers put
# messages in its queue and write them; all that the log gave them of it is its connection and a
# function that takes bytes. The poller's thread does what is due at a point in time: it ends a
# subscriber whose token expired, pings, and tells the position to one that was sent nothing else.
#
# To end a subscriber the server calls end(): first the subscriber leaves its channels, then the
# close frame, if it is a WebSocket, is queued, so no message stands behind that. The close codes:
# 1001 the server stops; 1002, 1007, 1009 the client sent bad frames, text or too much; 1008 it
# reads too slowly; 1011 it was silent and answered no ping, or there was an error of ours; 1012
# messages may be missing and it has no ids; 4401 its token expired; 4403 an operator ended it. A
# close that the client begins is answered by the library.

class Subscriber:
    """A connection that messages are queued for, whichever way they are encoded."""

    encoders: tuple[Encoder, Encoder]  # without ids, and with them
    uncounted = 0  # bytes, see put_uncounted()
    forgotten = False  # whether Log.forget() was called; guarded by the log's lock

    def __init__(self, connection: Connection, key: AccessKey, channels: Names,
                 past: Past) -> None:
        self.connection = connection
        self.server = connection.server
        self.id = str(uuid.uuid4())
        self.key = key
        self.channels = channels  # to join, and then those that it has joined
        self.past = past
        # Guarded by the log's lock.
        self.encoder = self.encoders[past.resumable]
        self.live = False  # whether it has joined; False while it catches up, see Log.replay()
        # The poller's: how many bytes were written when it last found more, without the uncounted,
        # and when that was.
        self.sent, self.quiet_since = 0, 0.0

    def run(self) -> None:
        """Serve the connection until it ends. Its own thread."""
        connection, interval = self.connection, self.server.settings.ping_interval
        if interval and hasattr(socket, "TCP_USER_TIMEOUT"):
            # Bytes that a dead peer does not acknowledge would keep the system busy for a quarter
            # of an hour. Two heartbeats, in milliseconds.
            connection.transport.set_tcp(socket.TCP_USER_TIMEOUT, int(2000 * interval))
        # A subscriber with ids is looked at more often, see tell_position().
        look = min(interval / 4, _LONGEST_LOOK) if self.past.resumable else interval
        if (pause := min(look or math.inf, self._time_left())) < math.inf:
            self.server.poller.call_at(connection, time.monotonic() + pause)
        log.info("%s: %s connected", connection.address, self.id)
        affinity = self.server.affinity
        if affinity and not self.past.is_empty():  # which may take long
            affinity.unpin()
            affinity = None
        # The head of the answer is queued by now, so nothing of the channels can come before it. It
        # is written behind the join: who has read it gets all that is published from then on.
        if self.past.resumable:
            self.follow(self.channels, self.past, self.encode_beginning, lambda *_: b"")
        else:
            self.server.log.join(self, self.channels)
        connection.flush()
        if affinity:
            affinity.unpin()
        self.serve()
        log.info("%s: %s disconnected", connection.address, self.id)

    def follow(self, names: Names, past: Past, before: Callable[[int, bool], bytes],
               after: Callable[[int, bool], bytes]) -> None:
        """Send what was asked for of the past, then join channels; see Log.replay()."""
        live = self.channels if self.live else Names()
        self.channels = Names(self.channels | names)
        # If it is live, its queue is emptied first: a piece of the past shall not overflow it.
        if not self.live or self.connection.catch_up():
            for _ in self.server.log.replay(self, names, past, live, before, after):
                if not self.connection.catch_up():
                    break
        self.connection.flush()

    def serve(self) -> None:
        """Read what the client sends."""
        raise NotImplementedError

    def _time_left(self) -> float:
        # Until the token expires, in seconds: `exp` is the one time not on the monotonic clock.
        return math.inf if self.key.expires is None else self.key.expires - time.time()

    # The poller's thread

    def on_deadline(self, now: float) -> float | None:
        """End the connection if its token expired, else see to its heartbeat."""
        time_left = self._time_left()
        if time_left <= 0:
            if self.end(EXPIRED, "token expired"):
                self.connection.log(logging.INFO, "%s the token expired", self.id)
            return None
        due = now + time_left
        if interval := self.server.settings.ping_interval:
            if self.encoder.with_ids:
                due = min(due, self.tell_position(now, interval))
            due = min(due, self.on_heartbeat(now, interval))
        return due if due < math.inf else None

    def on_heartbeat(self, now: float, interval: float) -> float:
        """See whether the peer lives; returns when to do so again."""
        raise NotImplementedError

    def tell_position(self, now: float, interval: float) -> float:
        """Tell the position if nothing was sent for an interval; returns when to look again.

        Else a client of a quiet channel would come back with an old position, which the history
        may not reach any more, though it has missed nothing. And a page in a browser, which sees no
        pings, would take the connection for dead.
        """
        connection = self.connection
        if connection.sent - self.uncounted == self.sent and now >= self.quiet_since + interval:
            self.server.log.position_for(self)
            connection.flush()
        if (sent := connection.sent - self.uncounted) != self.sent:
            self.sent, self.quiet_since = sent, now
        return now + min(interval / 4, _LONGEST_LOOK)

    # Any thread

    def put_uncounted(self, data: bytes) -> None:
        """Queue what moves no client's position, so that tell_position() does not count it.

        Where two threads count at once, one may be lost; then the position comes an interval later.
        """
        self.uncounted += len(data)
        self.connection.put(data)

    def encode_beginning(self, position: int, resumed: bool) -> bytes:
        """Encode what a client that asked for ids is told first."""
        raise NotImplementedError

    def encode_position(self, position: int) -> bytes:
        """Encode that a client has all up to an id."""
        raise NotImplementedError

    def encode_gap(self, position: int) -> bytes:
        """Encode that messages may be missing, and that what follows is complete."""
        raise NotImplementedError

    def encode_end(self, code: int, reason: str) -> bytes:
        """Encode the last words to the client; an event stream has none."""
        return b""

    def end(self, code: int, reason: str, discard: bool = False, patience: float = 0.0) -> bool:
        """Leave the channels, then begin to close; False where it was closing already.

        In this order nothing is queued behind the last words, and when the peer has read these, its
        place (MAX_CONNECTIONS) is free.
        """
        try:
            self.leave()
            return self.connection.finish(
                self.encode_end(code, reason), discard=discard, patience=patience)
        except MemoryError:  # who has left must not stay connected; whoever ends it goes on
            self.connection.abort()
            return True

    def leave(self) -> None:
        """Leave the channels, and count no more as a subscriber."""
        try:
            self.server.admission.leave(self.connection)
        finally:  # where that finds no memory, too: the log would hold the connection for good
            self.server.log.forget(self)

    def on_overflow(self) -> None:
        """Disconnect a subscriber whose queue grew over its limit. Any thread that writes to it."""
        if self.end(CloseReason.POLICY_VIOLATION, "slow consumer", discard=True):
            log.warning("%s: %s slow consumer, disconnected with more than %d bytes queued",
                        self.connection.address, self.id, self.server.settings.max_queue_size)
            with self.server.admission.lock:
                self.server.admission.gone["slow_consumers"] += 1


_PONGS = 16  # pings of one read that are answered one by one; of more, the last (RFC 6455, 5.5.3)
_LONGEST_LOOK = 5  # seconds between two looks whether a subscriber with ids was sent anything
# What counts for MAX_MESSAGE_RATE, in messages.
_CONTROL_COST = 0.1  # a ping, a pong or a fragment
_REFUSED_COST = 10  # a message that is dropped, beside the 1 of any message
_BAD_BYTES = 5_000  # of a bad message that cost 1, see Connection.charge(): to find out that a
#                     megabyte is bad takes 30 ms, in which no other thread can do anything


class WebSocket(Subscriber):
    """A WebSocket connection. simple-websocket runs the protocol, in the connection's thread."""

    encoders = (
        Encoder(lambda payloads: encode_frames(Opcode.TEXT, payloads), False),
        Encoder(lambda entries: encode_frames(Opcode.TEXT, encode_entries(entries)), True))

    def __init__(self, connection: Connection, key: AccessKey, channels: Names, past: Past,
                 rest: bytes) -> None:
        super().__init__(connection, key, channels, past)
        self.rest = rest  # what was read together with the request, and is not part of it
        self.frames = read_frames(self.server.settings.max_message_size)
        next(self.frames)  # up to its first yield, where it takes bytes
        self.read_size = max(self.server.settings.read_buffer_size, _FULL_READ)
        self.batch = Batch(self.server, self.id, key.user, connection)
        # What the client asked for that may take long: read_messages() calls it.
        self.asked: Callable[[], None] | None = None
        self.pings, self.last_ping = 0, b""  # that came since the last flush
        self.delay = 0.0  # seconds that the peer has to wait, see RateLimit and Connection.charge()
        # The poller's, see on_heartbeat().
        self.pinged = 0.0  # when the last ping went out
        self.acknowledged = self.unacknowledged = 0  # bytes written, as of the last look
        self.moved = 0.0  # when the peer was last seen to take bytes from a full buffer
        self.spared = 0.0  # since when nothing had been read, when unread bytes kept it alive

    # Its own thread, in the order of a message's way

    def serve(self) -> None:
        """Run the library's read loop until the connection ends."""
        # One thread per connection, really one: the library's thread is never started, its loop is
        # run here. It reads from a socket that is none: what it is given to read is only what
        # read_messages() leaves to it.
        library = _ServerWebSocket.accept(
            {"werkzeug.socket": _LibrarySocket(self)},  # the key under which it takes any socket
            thread_class=_UnstartedThread, event_class=_UnusedEvent)
        loop, library.thread = library.thread.run, None  # which would be a reference cycle
        try:
            loop()
        except FrameError as error:
            try:
                self.flush()  # what came before it is acknowledged (with Redis, if that was faster)
            finally:
                self.end(error.code, str(error))
        except (ValueError, AssertionError, MemoryError) as error:  # known to get out of the loop
            log.warning("%s: %s closed after %s",
                        self.connection.address, self.id, type(error).__name__)
            self.end(CloseReason.INTERNAL_ERROR, "internal error")
        finally:
            self.flush()

    def read_messages(self) -> bytes:
        """Publish what comes; returns bytes that the library has to judge, or b"" at the end.

        Gather, then write: what one read brought is queued for all subscribers, then each of them
        is written to once.

        A client that sends without end keeps its thread busy for ever. Ten of them would leave any
        other publisher an eleventh of the interpreter's time. So they take turns, and have one
        share of it together (Server.take_turn).

        _take_apart() works through what was read. It stops at bytes, which are for the library, and
        behind what takes long (`asked`) or a message for which the peer has to wait (`delay`). The
        turn is given back and all is written before that is seen to; another is taken for the rest
        of the read.
        """
        while data := self.rest or self.connection.read(self.read_size):
            self.rest, published = b"", self.connection.published
            with self.server.take_turn(size := len(data)):
                item = self._take_apart(self.frames.send(data))
            data = b""  # which may be large, and the wait for more long
            self.flush()
            while item is not None:  # it is the library's, or the peer has to wait behind it
                if isinstance(item, bytes):
                    return item
                if self.asked:
                    asked, self.asked = self.asked, None
                    asked()
                self.connection.pause(self.delay)
                if self.connection.state is CLOSING:
                    return b""
                self.delay = 0
                with self.server.take_turn(size):
                    item = self._take_apart(next(self.frames))
                self.flush()
            if self.connection.published > published:  # who only subscribes need not wait
                self.server.log.wait_for_room(self.connection)
        return b""

    def _take_apart(self, item: str | Frame | bytes | None) -> str | Frame | bytes | None:
        # Returns None when more bytes are needed, else the item that it stopped at.
        while item is not None:
            if isinstance(item, str):
                self.receive(item)
            elif isinstance(item, Frame):
                self._receive_frame(item)
            else:
                return item
            if self.delay > 0 or self.asked or self.connection.state is CLOSING:
                return item
            item = next(self.frames)
        return None

    def _receive_frame(self, frame: Frame) -> None:
        if frame.opcode == Opcode.BINARY:
            try:
                self.receive(frame.payload.decode())
            except UnicodeDecodeError:
                # The byte order mark makes it no JSON, whatever it is; it is charged by its length.
                self.receive("\ufeff" + frame.payload.decode("latin-1"))
            return
        if frame.opcode == Opcode.PING:
            self.pings += 1
            self.last_ping = frame.payload
            if self.pings <= _PONGS:
                self.put_uncounted(encode_frame(Opcode.PONG, frame.payload))
        if self.connection.rate.limit:
            self.delay = self.connection.rate.take(_CONTROL_COST)

    def receive(self, text: str) -> None:
        """Publish what the client sent, or tell it why not."""
        connection = self.connection
        connection.received += 1
        if connection.rate.limit:  # one more for each 16,384 characters
            self.delay = connection.rate.take(1 + (len(text) >> 14))
        ref: str | None = None
        try:
            value = decode_json(text)
            if type(value) is dict:
                if (given := value.get("ref")) is not None:
                    ref = check_ref(given)
                if "channel" not in value and ("subscribe" in value or "unsubscribe" in value):
                    self._change_subscriptions(value, ref)
                    return
            channel, data = check_message(value, "\\" in text)
            if channel not in self.batch.heads and not self.key.may_write(channel):
                raise Refused(f"the token may not write the channel {_shown(channel)}", "forbidden")
            self.batch.add(channel, data,
                           None if ref is None else functools.partial(self._acknowledge, ref))
        except Refused as error:
            setattr(connection, error.code, getattr(connection, error.code) + 1)
            connection.log(logging.INFO if error.code == "forbidden" else logging.WARNING,
                           "%s message dropped: %s", self.id, error)
            self.batch.flush()
            connection.put(encode_answer({"error": error.code, "reason": str(error)}, ref))
            self.delay = max(connection.charge(1 + len(text) / _BAD_BYTES),
                             connection.rate.take(_REFUSED_COST))

    def _acknowledge(self, ref: str, position: int, _: int) -> None:
        try:
            answer = encode_answer({"published": {"ref": ref, "id": encode_id(position)}})
            self.put_uncounted(answer)
        except MemoryError:  # out of Log.append() it would publish again what all have by now
            self.connection.abort()

    def _change_subscriptions(self, value: dict[str, Any], ref: str | None) -> None:
        if "subscribe" in value and "unsubscribe" in value:
            raise Refused("a message may subscribe or unsubscribe, not both")
        if "subscribe" not in value:
            names = check_names(value["unsubscribe"])
            if not names and ref and self.key.write:
                self.asked = functools.partial(self._wait_for_all, ref)
                return
            self.batch.deliver()  # acknowledgements come first, but for those of Redis
            self.server.log.leave(self, names)
            self.channels = Names(self.channels - {*names})
            self.connection.put(encode_answer({"unsubscribed": {"channels": names}}, ref))
            return
        names = check_names(value["subscribe"])
        past = parse_past(value.get("since"), value.get("last"))
        for name in names:
            if not self.key.may_read(name):
                raise Refused(f"the token may not read the channel {_shown(name)}", "forbidden")
        check_subscriptions(Names(self.channels.union(names)), self.server.settings)
        self.asked = functools.partial(self._subscribe, names, past, ref)

    def _wait_for_all(self, ref: str) -> None:
        # The answer to an unsubscription of nothing says that all that was read is in the log.
        self.connection.pause(self.connection.charge(10))  # all servers have work with it
        self.server.log.wait_for_all(self.connection)
        if not self.server.stopping.is_set():  # or it has not waited for all
            self.connection.put(encode_answer({"unsubscribed": {"channels": []}}, ref))

    def _subscribe(self, names: list[str], past: Past, ref: str | None) -> None:
        if past.resumable and not self.encoder.with_ids:
            self.server.log.add_ids(self)
            self.server.poller.call_at(self.connection, time.monotonic())  # see tell_position()
        # What is asked for of the past comes also from channels that were joined before.
        new = Names(names if past.resumable else {*names} - self.channels)
        self.follow(new, past, lambda *_: b"", lambda position, resumed: encode_answer(
            {"subscribed": {"channels": names, "id": encode_id(position), "resumed": resumed}},
            ref))

    def flush(self) -> None:
        """Write to all subscribers, and what is for this connection itself."""
        if self.pings > _PONGS:
            self.put_uncounted(encode_frame(Opcode.PONG, self.last_ping))
        self.pings = 0
        self.batch.flush()
        self.connection.flush()

    # The poller's thread

    def on_heartbeat(self, now: float, interval: float) -> float:
        """Ping a silent peer; end the connection of one that stayed silent."""
        connection = self.connection
        unacknowledged = connection.transport.unacknowledged()
        acknowledged = connection.sent - unacknowledged
        # A peer that is slow may reach our ping only after much else. But where more than
        # _FULL_READ bytes were unacknowledged, its receive buffer is taken to have been full: if it
        # takes bytes again, the peer has read. With room in the buffer, an acknowledgement shows
        # nothing: the peer's system sends it whether anybody reads or not.
        if acknowledged > self.acknowledged and self.unacknowledged > _FULL_READ:
            self.moved = now
        self.acknowledged, self.unacknowledged = acknowledged, unacknowledged
        heard = max(connection.last_received, self.moved)
        if now < heard + interval:
            return heard + interval
        if self.pinged <= heard:
            self.pinged = now
            self.put_uncounted(encode_frame(Opcode.PING, b""))
            connection.flush()
        if now < self.pinged + interval:
            return self.pinged + interval
        # What came, but was not read yet, counts once: after a stop of this process (SIGSTOP, a
        # virtual machine that is moved), its threads go on in any order.
        if self.spared < heard and connection.transport.unread():
            self.spared = heard
            return now + interval
        if self.end(CloseReason.INTERNAL_ERROR, "ping timeout"):
            connection.log(logging.INFO, "%s nothing came for %g seconds, disconnected",
                           self.id, now - heard)
        connection.abort()  # at once, not after CLOSING_TIME: a dead peer answers no close
        return math.inf

    # Any thread

    def encode_beginning(self, position: int, resumed: bool) -> bytes:
        """Encode a message with what the client has to know to come back."""
        return encode_answer({"connected": {
            "issuer": self.id, "id": encode_id(position), "resumed": resumed,
            "channels": sorted(self.channels), "ping": self.server.settings.ping_interval}})

    def encode_position(self, position: int) -> bytes:
        """Encode a message with nothing but an id."""
        return encode_answer({"id": encode_id(position)})

    def encode_gap(self, position: int) -> bytes:
        """Encode a gap as a message."""
        return encode_answer({"gap": {"id": encode_id(position)}})

    def encode_end(self, code: int, reason: str) -> bytes:
        """Encode a close frame; the reason is ASCII of at most 123 bytes (RFC 6455, 5.5.1)."""
        return encode_frame(Opcode.CLOSE, struct.pack("!H", code) + reason.encode())


class _ServerWebSocket(simple_websocket.Server):  # type: ignore[misc]
    def handshake(self) -> None:
        """Skip the library's handshake: check_upgrade() has checked more, and the answer is queued.

        The library would parse the request's head once more, and keep what it needs for that: half
        of the time and a fifth of the memory that a connection takes. So what it has made for that,
        `ws`, is dropped, and the property below takes its name.
        """
        del self.ws
        self.connected = True

    @functools.cached_property
    def ws(self) -> ProtocolConnection:
        """Made when the library has something to judge, for most at the end; it takes 1.6 KiB."""
        return ProtocolConnection(ConnectionType.SERVER)


class _UnstartedThread:
    def __init__(self, target: Callable[[], None]) -> None:
        self.run = target
        self.name = ""

    def start(self) -> None:
        """Start nothing: WebSocket.serve() calls run()."""


class _UnusedEvent:
    def set(self) -> None:
        """Tell nobody that a message came: none is left to the library."""


class _LibrarySocket:
    """What simple-websocket is given as its socket. The connection's own thread."""

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket

    def recv(self, _: int) -> bytes:
        """Return what the library has to judge; b"" is the end."""
        return self.websocket.read_messages()

    def send(self, data: bytes) -> int:
        """Send the close frame by which the library answers."""
        self.websocket.batch.flush()
        self.websocket.connection.finish(bytes(data))
        return len(data)

    def close(self) -> None:
        """Leave the socket open: its connection closes it."""


class EventStream(Subscriber):
    """A client that follows channels as server-sent events (WHATWG HTML, section 9.2)."""

    encoders = (
        Encoder(lambda payloads: b"".join([
            b"data: %b\n\n" % payload for payload in payloads]), False),
        Encoder(lambda entries: b"".join([
            b"id: %b\ndata: %b\n\n" % (encode_id(position).encode(), payload)
            for position, payload in entries]), True))

    def serve(self) -> None:
        """Wait for the client to go away; it has nothing to say."""
        while self.connection.read(1024):
            pass

    def on_heartbeat(self, now: float, interval: float) -> float:
        """Send a comment.

        If the client is gone, nobody acknowledges that, and the system ends the connection.
        """
        if not self.encoder.with_ids:  # the others are told their position
            self.connection.put(b":\n")  # no empty line, which some clients take for an event
            self.connection.flush()
        return now + interval

    # Any thread

    def encode_beginning(self, position: int, resumed: bool) -> bytes:
        """Encode the position, or a gap."""
        return self.encode_position(position) if resumed else self.encode_gap(position)

    def encode_position(self, position: int) -> bytes:
        """Encode an event of nothing but an id, which a browser sends when it comes back."""
        return f"id: {encode_id(position)}\n\n".encode()

    def encode_gap(self, position: int) -> bytes:
        """Encode a gap as an event of its own kind."""
        return f"event: gap\nid: {encode_id(position)}\ndata: {{}}\n\n".encode()


# --------------------------------------------------------------------------------------------- HTTP
# What comes before the WebSocket, and what goes without it: HTTP/1.1, as little as that takes.
#
# Why not http.server? Where a proxy in front and the server disagree on where a request ends, one
# client can slip a request into what another one sent (request smuggling). The standard library's
# parser takes bare line feeds and folded lines, which a proxy may read otherwise. So the head is
# read strictly (RFC 9112): what is not plainly right is refused. A body has a Content-Length and is
# read to its end, or else the connection ends after the answer: bytes of a body that nobody read
# are never taken for the next request.
#
# A connection's requests are answered one by one, in order. Each has to be there, with its body,
# before a deadline: a thread costs too much to be held by a client that sends a byte now and then.
#
#     POST /api/publish HTTP/1.1               HTTP/1.1 200 OK
#     Host: localhost:6380                     Date: Sat, 28 Nov 2026 18:00:00 GMT
#     Authorization: Bearer eyJ...             Content-Length: ...
#     Content-Length: 36                       Content-Type: application/json
#                                              Cache-Control: no-store
#     {"channel": "news", "data": "hello"}     Access-Control-Allow-Origin: *
#                                              Vary: Origin
#
#                                              {"issuer": "...", "id": "17...-0", "receivers": 3}
#
# A refusal looks the same: another status, and {"error": "unauthorized", "reason": "..."}.
#
# How HTTPHandler goes through a request, and the connection's state (State) after each step:
#
#     run               READING     the deadline is REQUEST_TIMEOUT from now, for all of it
#     _read_request     ANSWERING   the head is there; what came behind it waits in `buffer`
#     _answer                       path, Origin, method, token, parameters; then the endpoint
#       read_body       READING     only if the endpoint wants a body; the deadline is the same
#                       ANSWERING   the body is there; what came behind it is in `buffer`
#     _respond          READING     the answer is queued, and the next request is read
#     or _subscribe     SUBSCRIBED  the connection is a Subscriber's now; `buffer` is a WebSocket's
#
# While an answer is made nothing else is read: requests that come early (pipelining) wait in
# `buffer` or in the socket. The deadline can end a connection only while it is READING. An
# HTTPError that is raised on the way becomes the answer. A ConnectionError is raised where somebody
# has ended the connection meanwhile; run_connection() takes that for a peer that is gone.

# Limits of a head: bytes, fields, bytes of the target, parameters of the query in it. 8 KiB have
# room for 4,000 parameters, each of which costs far more than its bytes; 1,100 are as many channels
# as MAX_SUBSCRIPTIONS allows by default, and some more.
MAX_HEAD_SIZE, MAX_HEADERS, MAX_TARGET_SIZE, MAX_PARAMETERS = 16384, 100, 8192, 1100
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2; no JSON Web Token is meant
_REQUEST_LINE = re.compile(rb"(%b) ([!-~]+) HTTP/1\.([01])" % _TOKEN)
_FIELD = re.compile(rb"(%b):([\t\x20-\x7e\x80-\xff]*)" % _TOKEN)
# No comma and no space: decode_request() joins the values of two Host headers with these.
_HOST_FIELD = re.compile(
    r"(?=.{1,255}$)(?:(?:[A-Za-z0-9._~!$&'()*+;=%-]+|\[[A-Za-z0-9._~:%-]+\])(?::[0-9]*)?"
    # An address of IPv6 to which a client gave no brackets.
    "|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*)")
_NONCE = re.compile("[A-Za-z0-9+/]{22}==")  # 16 bytes in base64
_CLOSE = {"Connection": "close"}  # where the answer is not sent by _respond(), which adds it
_UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade"}
_FRESH = {"Cache-Control": "no-store"}  # else a cache may keep an answer for a while by itself
_JSON = {"Content-Type": "application/json", **_FRESH}
_RETRY = {"Retry-After": "5"}


class Response(NamedTuple):
    """What a request is answered, and what the connection becomes behind that, if anything."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}
    subscriber: Subscriber | None = None

    def encode(self, head_only: bool = False) -> bytes:
        """Encode it. The answer to HEAD, `head_only`, tells the length of the body of GET."""
        lines = [f"HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}"]
        if self.status != 101:
            lines.append(f"Date: {email.utils.formatdate(usegmt=True)}")
        # With these there is no body, so no length of one; what a subscriber is sent has no end.
        if not self.subscriber and self.status not in (100, 204, 304):
            lines.append(f"Content-Length: {len(self.body)}")
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        return head if head_only else head + self.body


def respond_json(value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    """Make a response of a value in JSON, on one line."""
    return Response(status, json.dumps(value).encode() + b"\n", {**_JSON, **headers})


class HTTPError(Exception):
    """A refused request: the answer's status (RFC 9110, section 15), code and reason in JSON."""

    def __init__(self, status: int, reason: str, code: str = "",
                 headers: Mapping[str, str] = {}) -> None:
        super().__init__(reason)
        self.status = status
        self.code = code or http.HTTPStatus(status).phrase.lower().replace(" ", "_")
        self.headers = headers

    def response(self) -> Response:
        """Make the answer."""
        return respond_json({"error": self.code, "reason": str(self)}, self.status, self.headers)


@dataclasses.dataclass
class Request:
    """A request, as an endpoint sees it."""

    method: str
    path: str
    query: dict[str, list[str]]
    # By name in small letters; the values of one that came twice are joined by a comma.
    headers: dict[str, str]
    version: str
    address: str = ""
    key: AccessKey = AccessKey()  # what the token allows, where the endpoint asks for one

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

    @functools.cached_property
    def wants_upgrade(self) -> bool:
        """Whether this is meant to open a WebSocket, well or badly."""
        return "websocket" in self.tokens("upgrade") or "sec-websocket-key" in self.headers


def decode_request(head: bytes) -> Request:
    """Decode a request's head, without the empty line at its end. Raises HTTPError."""
    line, *fields = head.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise HTTPError(400, "the request line must be METHOD /PATH HTTP/1.1, in ASCII")
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
    if not re.fullmatch("[0-9]+", headers.get("content-length", "0")):
        raise HTTPError(400, "Content-Length must be a number")
    # A client of a proxy may send a whole URL (RFC 9112, section 3.2.2).
    path, _, query = re.sub("(?i)^https?://[^/?]*", "", target).partition("?")
    try:
        parsed = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise HTTPError(400, f"a query may have {MAX_PARAMETERS} parameters") from None
    host = headers.get("host", "" if minor == "1" else "unknown")  # HTTP/1.0 knows no such header
    try:
        if not _HOST_FIELD.fullmatch(host):  # 255 bytes at most: to decode them takes 0.1 ms
            raise ValueError
        host.encode("ascii").decode("idna")  # UnicodeError, a ValueError, for "xn--" with nonsense
    except ValueError:
        raise HTTPError(400, "there must be one Host header, naming a host") from None
    return Request(method, path or "/", parsed, headers, "1." + minor)


def check_upgrade(request: Request) -> None:
    """Check the opening handshake (RFC 6455, section 4.2.1), more closely than the library.

    Raises HTTPError.
    """
    headers = request.headers
    if request.method != "GET":
        raise HTTPError(405, "a WebSocket is opened with GET", headers={"Allow": "GET"})
    if request.version != "1.1":
        raise HTTPError(400, "a WebSocket is opened with HTTP/1.1")
    if ("upgrade" not in request.tokens("connection")
            or "websocket" not in request.tokens("upgrade")):
        raise HTTPError(
            400, "a WebSocket needs the headers Upgrade: websocket and Connection: Upgrade")
    if headers.get("sec-websocket-version") != "13":
        raise HTTPError(426, "this server speaks WebSocket version 13",
                        headers={"Sec-WebSocket-Version": "13", **_UPGRADE})
    if not _NONCE.fullmatch(headers.get("sec-websocket-key", "")):
        raise HTTPError(400, "there must be one Sec-WebSocket-Key, 16 bytes in base64")
    if request.has_body:
        raise HTTPError(400, "an upgrade has no body")


class HTTPHandler:
    """Reads requests from a connection and answers them, until it ends or becomes a subscriber.

    To ask is cheaper than to answer. So a request without a good token, or with bad messages, is
    charged to its connection; after too many of these, the next one is read later. Those that need
    no token count as well: of short ones, as for /health, some 8 a second are not held up.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.server = connection.server
        self.timeout = self.server.settings.request_timeout
        self.buffer = b""  # read, and not yet used
        self.deadline = time.monotonic() + self.timeout  # for the request under way
        self.begun = False  # whether any of it has come
        self.unread = False  # whether it has a body that was not read
        self.cost = 0.0  # of its answer, see Connection.charge()
        # Tells a browser whether a page of another site may see the answer (CORS).
        self.cors: dict[str, str] = {}

    # The poller's thread

    def on_deadline(self, now: float) -> float | None:
        """End the connection when a request takes too long to come."""
        # run() asks for one deadline, and this finds out what has become of it: so it need not be
        # asked for anew with each request.
        if self.connection.state is ANSWERING:
            return now + 1
        if now < self.deadline:
            return self.deadline
        late = HTTPError(408, f"a request must be complete within {self.timeout:g} seconds",
                         headers=_CLOSE)
        # A client that has sent nothing is told nothing: it could take that for the answer to the
        # request that it is just sending.
        begun = self.begun  # read once: the other thread may change it meanwhile
        last = late.response().encode() if begun else b""
        if not self.connection.finish(last, only=READING):
            return now + 1  # it has been answering since
        if begun:
            self.server.refuse(self.connection.address, late)
        return None

    # Its own thread

    def run(self) -> Subscriber | None:
        """Answer requests; returns what the connection becomes, None at its end."""
        self.connection.transport.set_tcp(socket.TCP_NODELAY, 1)
        self.server.poller.call_at(self.connection, self.deadline)
        affinity = self.server.affinity
        while True:
            request, self.cors = None, {}
            try:
                if (request := self._read_request()) is None:
                    return None
                response = self._answer(request)
                if response.subscriber and request.method != "HEAD":
                    return self._subscribe(response, response.subscriber)
            except HTTPError as error:
                self.server.refuse(self.connection.address, error)
                response = error.response()
                # Refused before it was whole. From here on, the deadline puts no 408 behind this
                # answer; and where it was faster, move() raises.
                if self.connection.state is READING:
                    self.connection.move(ANSWERING)
            if not self._respond(request, response):
                return None
            if affinity:  # behind the first answer
                affinity.unpin()
                affinity = None
            if self.cost and (delay := self.connection.charge(self.cost)):
                self.connection.pause(delay)
            # Before the state, which on_deadline() looks at first: else it would hold the deadline
            # of this request against the next.
            self.deadline = time.monotonic() + self.timeout
            self.connection.move(READING)

    def _read_request(self) -> Request | None:
        while True:
            self.buffer = self.buffer.lstrip(b"\r\n")  # RFC 9112, section 2.2
            self.begun = bool(self.buffer)
            # The connection of a proxy carries requests of many clients. So far it counted for the
            # client of the last one; now it counts for the proxy, until the head names the next.
            if self.begun:
                self.server.admission.rename(self.connection, self.connection.peer)
                # What is not HTTP, such as TLS, may never bring the empty line that ends a head.
                # The "$" is for a method of which only a part has come.
                if not re.match(_TOKEN + b"( |$)", self.buffer):
                    raise HTTPError(400, "this is not HTTP/1.1")
            head, is_whole, rest = self.buffer.partition(b"\r\n\r\n")
            if len(head) > MAX_HEAD_SIZE:
                raise HTTPError(431, f"the head of a request may have {MAX_HEAD_SIZE} bytes")
            if is_whole:
                break
            self.connection.flush()  # as after any move(), see Connection.flush()
            if not (data := self.connection.read(4096, look_first=not self.begun)):
                return None
            self.buffer += data
        self.connection.move(ANSWERING)
        self.buffer = rest
        self.cost = 10 + len(head) / 100  # until it shows a good token; 1 is 0.1 ms of work
        request = decode_request(head)
        request.address = client_address(request, self.connection.peer)
        self.server.admission.rename(self.connection, request.address)
        self.unread = request.has_body
        return request

    def read_body(self, request: Request) -> bytes:
        """Read what follows a head, up to MAX_MESSAGE_SIZE bytes.

        Raises HTTPError, also for a body in chunks, which are not taken; ConnectionError where the
        connection ends first, or the deadline is over.
        """
        length = request.headers.get("content-length")
        limit = self.server.settings.max_message_size
        if length is None or "transfer-encoding" in request.headers:
            self.unread = True  # a body may follow, and we do not look for its end
            raise HTTPError(411, "a request with a body needs a Content-Length")
        if len(length) > 18 or (size := int(length)) > limit:
            raise HTTPError(413, f"the body may have {limit} bytes", "too_large")
        if request.version == "1.1" and "100-continue" in request.tokens("expect"):
            self.connection.put(Response(100).encode())
        body = bytearray(self.buffer)
        self.connection.move(READING)  # the deadline holds for the body, too
        while len(body) < size:
            self.connection.flush()
            if not (data := self.connection.read(_FULL_READ)):
                raise ConnectionError("the body has not come")
            body += data
        self.connection.move(ANSWERING)
        self.buffer, self.unread = bytes(body[size:]), False
        return bytes(body[:size])

    def _answer(self, request: Request) -> Response:
        # A WebSocket may be opened at any path. Browsers ask for OPTIONS without a token, before a
        # request of another site's page (CORS). To HEAD the endpoint answers as to GET.
        if request.wants_upgrade:
            check_upgrade(request)
        origin = check_origin(self.server.settings, request)
        if origin and not request.wants_upgrade:
            self.cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        # OPTIONS * is about the server as a whole (RFC 9110, section 9.3.7).
        path = "/" if (request.method, request.path) == ("OPTIONS", "*") else request.path
        if not request.wants_upgrade and path not in ENDPOINTS:
            raise HTTPError(404, "there is nothing here")
        endpoint = UPGRADE if request.wants_upgrade else ENDPOINTS[path]
        methods = {endpoint.method, "OPTIONS"} | ({"HEAD"} if endpoint.method == "GET" else set())
        allowed = ", ".join(sorted(methods))
        if request.method == "OPTIONS":
            return Response(204, b"", {
                "Allow": allowed, "Access-Control-Allow-Methods": allowed,
                "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
                "Access-Control-Max-Age": "600"})
        if request.method not in methods:
            raise HTTPError(405, f"the methods here are {allowed}", headers={"Allow": allowed})
        if endpoint.right:
            request.key = authorize(self, request)
            self.cost = 0
            self.server.admission.renew(self.connection)
            if endpoint.right == "api" and not request.key.api:
                raise HTTPError(403, "the token's claim api must be true")
        if request.path.startswith("/api/") and not request.wants_upgrade:
            known = [*endpoint.parameters, "auth"]
            for name in request.query:
                if name not in known:  # most likely it is a mistake
                    raise HTTPError(400, f"there is no parameter {_shown(name)}, "
                                    f"only {', '.join(known)}")
        return endpoint.answer(self, request)

    def _respond(self, request: Request | None, response: Response) -> bool:
        # Returns whether another request may follow. Not where nobody knows where this one ends:
        # its head was refused (`request` is None), or its body was not read, and would be taken for
        # the next request. Nor behind a refused upgrade, for its client may have sent frames.
        going_on = bool(request and request.keeps_alive and not request.wants_upgrade
                        and not self.unread and not response.subscriber)
        # The response's headers stand here twice: first to come first, last so that its own Vary
        # (of the console: Accept, Origin) replaces that of CORS.
        headers = {**response.headers, **self.cors, **response.headers}
        if not going_on:
            # Upgrade is for one hop only, which Connection has to say (RFC 9110, section 7.8).
            headers["Connection"] = "Upgrade, close" if "Upgrade" in headers else "close"
        self.connection.put(response._replace(headers=headers).encode(
            head_only=request is not None and request.method == "HEAD"))
        self.connection.flush()
        return going_on

    def _subscribe(self, response: Response, subscriber: Subscriber) -> Subscriber:
        # Counted before it moves: from then on any thread may end it, and Admission.leave() must
        # find it among the subscribed.
        self.server.admission.subscribe(self.connection)
        head = response._replace(headers={**response.headers, **self.cors}).encode()
        self.connection.move(SUBSCRIBED, head, subscriber)
        return subscriber


# ---------------------------------------------------------------------------------------- endpoints
# First what finds out who asks, then functions from a request to a response, the endpoints. The
# table ENDPOINTS at the end says which of them a path leads to, and what method and token it takes;
# HTTPHandler._answer() checks these, then calls the endpoint. Endpoints read a body through
# the handler, and raise HTTPError.

MAX_MESSAGES = 10_000  # in the list of one request
_UNIX_PEER = "unix"  # stands for the address of whoever comes over a Unix socket


@functools.lru_cache  # each connection asks twice, and to find out takes 5 us
def is_loopback(address: str) -> bool:
    """Whether an IP address is this machine's own (127.0.0.0/8, also written as IPv6, or ::1).

    Who comes over a Unix socket is on this machine as well.
    """
    if address == _UNIX_PEER:
        return True
    try:
        return _parse_address(address).is_loopback
    except ValueError:
        return False


def _parse_address(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    # An IPv4 address that is written as IPv6 is taken for what it is.
    ip = ipaddress.ip_address(address)
    return getattr(ip, "ipv4_mapped", None) or ip


def client_address(request: Request, peer: str) -> str:
    """Find out whose request this is: the peer's, or the client's that a local proxy names.

    Only the last address counts: the proxy itself has added it. What stands before that was sent to
    the proxy, and may be made up. A proxy on another machine is not believed at all: what it brings
    counts as one client's.
    """
    if is_loopback(peer) and "x-forwarded-for" in request.headers:
        last = request.headers["x-forwarded-for"].rpartition(",")[2].strip()
        with contextlib.suppress(ValueError):
            return str(_parse_address(last.partition("%")[0]))
    return peer


def is_local_name(host: str) -> bool:
    """Whether a host with or without a port, as in a Host header, names this machine itself."""
    name = re.sub(r":[0-9]*$", "", host.lower()).removesuffix(".")
    return (name == "localhost" or name.endswith(".localhost")
            or is_loopback(re.sub(r"^\[(.*)\]$", r"\1", name)))


def check_origin(settings: Settings, request: Request) -> str:
    """Check where a browser's page comes from (RFC 6454).

    Returns what the browser may be told: the origin that was checked, `*` for any, or nothing.

        CHECK_ORIGIN       Origin                       result
        false              any, or none                 "*"
        true, or a list    none                         ""
        true, or a list    as Host says                 the origin
        a list             in the list                  the origin
        true, or a list    any other                    403

    A browser names the origin wherever a page of another site could read the answer. By default any
    page may come, since there are no cookies here: without a token it can do nothing. While the
    empty secret signs tokens, check_local() looks at the origin as well.
    """
    allowed, origin = settings.check_origin, request.headers.get("origin")
    if not allowed:
        return "*"
    if origin is None:
        return ""
    # "-" where there is no Host: "" is what this leaves of the origin "null" (a sandboxed page).
    # Host may name the port that is the scheme's default; a browser's origin never does.
    scheme, _, host = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme, "")
    asked = request.headers.get("host", "-").lower()
    same = host.removesuffix(port) == asked.removesuffix(port)
    if not same and not (isinstance(allowed, tuple) and origin.lower() in allowed):
        raise HTTPError(403, f"the origin {_shown(origin)} is not allowed (CHECK_ORIGIN)", "origin")
    return origin


def authorize(handler: HTTPHandler, request: Request) -> AccessKey:
    """Find a good token, in the header (RFC 6750, section 2.1) or else in the query.

    Raises HTTPError: 401; 403, see check_local(); 503 where the keys of an identity provider cannot
    be had now. The wait for these, Connection.pause(), ends when the peer hangs up.
    """
    server, connection = handler.server, handler.connection
    if server.settings.protected:
        check_local(request)
    tokens = [re.sub("(?i)^bearer +", "", request.headers.get("authorization", ""))]
    tokens += request.query.get("auth", [])[:1]
    # What the first bad token was refused for is kept as text. The error itself would make a cycle,
    # for its traceback holds this frame, and keep the connection in memory.
    reason, retry_after = "a token is needed: Authorization: Bearer TOKEN, or ?auth=TOKEN", 0
    for number, token in enumerate(filter(None, tokens)):
        try:
            return server.keys.decode(token, connection.pause)
        except TokenError as error:
            if not number:
                reason, retry_after = str(error), error.retry_after
    if retry_after:
        raise HTTPError(503, reason, "unknown_key", {"Retry-After": str(retry_after)})
    raise HTTPError(401, reason, headers={"WWW-Authenticate": "Bearer"})


def check_local(request: Request) -> None:
    """Refuse what may come from elsewhere, while anybody can make a token.

    A page of another site may run in a browser on this machine. It is known by its Origin, or, if
    it made its own name point here (DNS rebinding), by the Host that it asks for. What a proxy on
    this machine brings may be anybody's.
    """
    if any(name in ("forwarded", "via", "x-real-ip") or name.startswith("x-forwarded-")
           for name in request.headers):
        raise HTTPError(403, "SECRET is not set, so nobody is let in through a proxy", "protected")
    host, origin = request.headers.get("host", "localhost"), request.headers.get("origin")
    if not is_loopback(request.address) or not is_local_name(host):
        raise HTTPError(403, "SECRET is not set, so only clients on the server's own machine that "
                        "ask for localhost are let in", "protected")
    if origin is not None and not is_local_name(origin.partition("://")[2]):
        raise HTTPError(403, f"SECRET is not set, so only pages of localhost are let in, not of "
                        f"{_shown(origin)}", "protected")


def find_past(handler: HTTPHandler, request: Request) -> tuple[Names, Past]:
    """Take from the query which channels a client asks for, and of what time."""
    key, given = request.key, request.query
    names = Names(given["channel"]) if "channel" in given else key.read
    for name in sorted(names):
        if not name:
            raise HTTPError(400, "a channel must have a name")
        if not key.may_read(name):
            raise HTTPError(403, f"the token may not read the channel {_shown(name)}")
    try:
        check_subscriptions(names, handler.server.settings)
        for name in "since", "last":
            if len(given.get(name, [])) > 1:
                raise Refused(f"there may be one {name}")
        past = parse_past(*(given.get(name, [None])[0] for name in ("since", "last")))
    except Refused as error:  # the rules are those of a subscription, but this is no message
        code = "bad_request" if error.code == "bad_message" else error.code
        raise HTTPError(400, str(error), code) from None
    return names, past


def open_websocket(handler: HTTPHandler, request: Request) -> Response:
    """Answer an opening handshake (RFC 6455, section 4.2.2); extensions are declined."""
    accept = generate_accept_token(request.headers["sec-websocket-key"].encode()).decode()
    websocket = WebSocket(
        handler.connection, request.key, *find_past(handler, request), handler.buffer)
    return Response(101, b"", {**_UPGRADE, "Sec-WebSocket-Accept": accept}, websocket)


def follow_events(handler: HTTPHandler, request: Request) -> Response:
    """GET /api/events: follow channels, by default all that the token may read."""
    # Of a browser that comes back; or of a library in its place, which can send no header.
    known = [request.headers.get("last-event-id"), *request.query.get("lastEventId", [])]
    if since := next(filter(None, known), ""):
        request.query["since"] = [since]
    stream = EventStream(handler.connection, request.key, *find_past(handler, request))
    kinds = {word.partition(";")[0].strip() for word in request.tokens("accept")}
    if not kinds & {"", "*/*", "text/*", "text/event-stream"}:
        raise HTTPError(406, "this is a text/event-stream")
    # Without a length, and not in chunks: it ends with the connection. The third header is for
    # nginx, which would gather events before it passes them on.
    headers = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no", **_FRESH, **_CLOSE}
    return Response(200, b"", headers, stream)


def tell_history(handler: HTTPHandler, request: Request) -> Response:
    """GET /api/history: what is kept, some MAX_QUEUE_SIZE bytes at most.

        {"messages":[{"id":"17...-3","issuer":"0f8f...",...}],"id":"17...-9","complete":true}

    To go on, ask with since=17...-9. `complete` is false where messages behind the given `since`
    may be missing: they are no longer kept, or the id was not given out here.
    """
    names, past = find_past(handler, request)
    if not past.resumable:  # neither `since` nor `last` was given: all that is kept
        past = Past(0, True)
    entries, position, complete = handler.server.log.read(
        names, past, handler.server.settings.max_queue_size)
    complete = complete or "since" not in request.query  # it is about what came after `since`
    return Response(200, b'{"messages":[%b],"id":"%b","complete":%b}\n' % (
        b",".join(encode_entries(entries)), encode_id(position).encode(),
        b"true" if complete else b"false"), _JSON)


def publish(handler: HTTPHandler, request: Request) -> Response:
    """POST /api/publish: publish a message, or a list of them, all or none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # The last of these is curl's default.
    if kind not in ("", "application/json", "application/x-www-form-urlencoded"):
        raise HTTPError(415, f"the Content-Type must be application/json, not {_shown(kind)}")
    # Some name the charset there.
    if unknown := {*request.tokens("content-encoding")} - {"", "identity", "utf-8"}:
        raise HTTPError(415, f"the body must not be encoded, as it is by {_shown(unknown.pop())}",
                        headers={"Accept-Encoding": "identity"})
    try:
        body = handler.read_body(request)
        handler.cost = 1 + len(body) / _BAD_BYTES  # until it shows good messages
        with handler.server.take_turn(len(body)):
            value = decode_json(body.decode())
        if isinstance(value, list) and len(value) > MAX_MESSAGES:
            raise HTTPError(413, f"a list may have {MAX_MESSAGES} messages", "too_large")
        single, has_escapes = not isinstance(value, list), b"\\" in body
        messages = [check_message(item, has_escapes) for item in ([value] if single else value)]
        del body, value  # they may be large, and wait long
    except (Refused, UnicodeDecodeError) as error:
        raise HTTPError(400, str(error), "bad_message") from None
    answers = publish_all(handler, request, messages)
    handler.cost = 0
    return respond_json(answers[0] if single else answers)


def publish_all(handler: HTTPHandler, request: Request,
                messages: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Publish messages, as slowly as MAX_MESSAGE_RATE demands; returns an answer for each.

    Raises HTTPError: 403; 429; 401 for a token that expired meanwhile; 503 where the server
    stops or Redis fails. Behind the last of these the messages may still be published.
    """
    server, connection, timeout = handler.server, handler.connection, handler.timeout
    connection.received += len(messages)
    for channel, _ in messages:
        if not request.key.may_write(channel):
            raise HTTPError(403, f"the token may not write the channel {_shown(channel)}")
    # Before the wait: what waits for its rate when the server stops is published, not refused.
    if server.stopping.is_set():
        raise HTTPError(503, "the server is shutting down", "shutting_down")
    cost = sum(1 + (len(data) >> 14) for _, data in messages)
    if (delay := connection.rate.take(cost)) > timeout:
        connection.rate.take(-cost)  # gives it back: nothing is published
        raise HTTPError(429, f"at MAX_MESSAGE_RATE this would take {delay:.0f} seconds, and a "
                        f"request may take {timeout:g}", headers=_RETRY)
    if delay:
        connection.pause(delay)
        if request.key.expired:
            raise HTTPError(401, "the token has expired")
    # After that wait, during which others may have taken the room.
    if not server.log.wait_for_room(connection, _UNAVAILABLE_TIME):
        if server.stopping.is_set():
            raise HTTPError(503, "the server is shutting down", "shutting_down")
        reason = server.log.reason or "too much waits for Redis"
        raise HTTPError(503, f"nothing was published: {reason}", "unavailable", _RETRY)
    # The issuer is one that no subscriber has, so that nobody is left out as the publisher.
    issuer, answers, done = str(uuid.uuid4()), dict[int, dict[str, Any]](), threading.Event()

    def ack(index: int, position: int, receivers: int) -> None:
        """Put down what a message is answered, with how many subscribers of this server got it.

        Called under the log's lock: by this thread, or with Redis by the read thread, when the
        message has come back.
        """
        answers[index] = {
            "issuer": issuer, "id": encode_id(position), "receivers": receivers}
        if len(answers) == len(messages):
            done.set()

    batch = Batch(server, issuer, request.key.user, connection)
    for index, (channel, data) in enumerate(messages):
        batch.add(channel, data, functools.partial(ack, index))
    batch.flush()
    if messages and not done.wait(_UNAVAILABLE_TIME):
        raise HTTPError(503, "the messages have not come back from the log; they may still be "
                        "published", "unavailable", _RETRY)
    return [answers[index] for index in range(len(messages))]


def end_connections(handler: HTTPHandler, request: Request) -> Response:
    """DELETE /api/connections: end those of a user, or the one that has a message's issuer."""
    given = [(name, value) for name in ("user", "issuer") for value in request.query.get(name, [])]
    if len(given) != 1 or not given[0][1]:
        raise HTTPError(400, "name one user, or one issuer")
    name, value = given[0]
    count, complete = handler.server.log.end_connections({name: value})
    handler.connection.log(logging.INFO, "ended %d connections of the %s %s", count, name,
                           _shown(value))
    if not complete:
        raise HTTPError(503, f"{count} were ended; there are servers that have not answered, and "
                        "do it when they can be reached", "unavailable", _RETRY)
    return respond_json({"ended": count})


def tell_health(handler: HTTPHandler, request: Request) -> Response:
    """GET /health: whether a proxy may send clients here."""
    if handler.server.stopping.is_set():
        return respond_json({"status": "stopping"}, 503)
    if reason := handler.server.log.reason:
        return respond_json({"status": "unavailable", "reason": reason}, 503)
    return respond_json({"status": "ok"})


def tell_info(handler: HTTPHandler, request: Request) -> Response:
    """GET /api/info: version, settings and state."""
    server = handler.server
    totals = server.metrics.totals()
    settings = {field.name: getattr(server.settings, field.name)
                for field in dataclasses.fields(Settings) if field.repr and field.name != "port"}
    return respond_json({
        "version": __version__, "python": platform.python_version(),
        "implementation": platform.python_implementation(), "gil": server.interpreter_lock,
        "num_cpu": os.cpu_count(), "pid": os.getpid(),
        "uptime_in_seconds": round(time.monotonic() - server.started),
        "tcp_port": server.port,
        "connections": totals["open"], "channels": totals["channels"],
        "history_messages": totals["history_messages"], "history_bytes": totals["history_bytes"],
        "history_oldest": encode_id(totals["history_oldest"]) if totals["history_oldest"] else None,
        "resumes": totals["resumed"], "resumes_failed": totals["not_resumed"],
        "gaps": totals["gaps"], **settings, **server.log.describe(),
    })


def tell_metrics(handler: HTTPHandler, request: Request) -> Response:
    """GET /metrics: counters in Prometheus' text format, version 0.0.4."""
    return Response(200, handler.server.metrics.render().encode(),
                    {"Content-Type": "text/plain; version=0.0.4; charset=utf-8", **_FRESH})


def tell_file(request: Request, kind: str, text: bytes, headers: Mapping[str, str]) -> Response:
    """Answer with a text, or with 304 where the client has just this (RFC 9110, 13.1.2)."""
    etag = f'"{hashlib.sha256(text).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff",
               "Referrer-Policy": "no-referrer", **headers}
    known = request.headers.get("if-none-match", "")
    if known == "*" or etag in re.split(r"[\s,]+|W/", known):
        return Response(304, b"", headers)
    return Response(200, text, {"Content-Type": f"text/{kind}; charset=utf-8", **headers})


def tell_script(handler: HTTPHandler, request: Request) -> Response:
    """GET /philote.js: the browser client."""
    return tell_file(request, "javascript", PHILOTE_JS.encode(),
                     {"Content-Security-Policy": "default-src 'none'"})


def show_console(handler: HTTPHandler, request: Request) -> Response:
    """GET /: the console for a browser; others are told to open a WebSocket."""
    if "text/html" not in request.headers.get("accept", "").lower():
        raise HTTPError(426, "this is a WebSocket server", headers=_UPGRADE)
    settings = handler.server.settings
    if not settings.console:
        raise HTTPError(404, "there is nothing here: CONSOLE is false")
    page, policy = _make_console(
        settings.protected and not (settings.claim or settings.audience or settings.issuer),
        settings.claim)
    return tell_file(request, "html", page, {
        "Vary": "Accept, Origin", "X-Frame-Options": "DENY", "Content-Security-Policy": policy})


@functools.cache
def _make_console(is_open: bool, claim: str) -> tuple[bytes, str]:
    # `is_open`: whether the empty secret signs tokens that are good here; the page offers to make
    # one then.
    script, style = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                     for text in (_CONSOLE_SCRIPT, _CONSOLE_STYLE))
    page = _CONSOLE_PAGE.replace("STYLE", _CONSOLE_STYLE, 1).replace("SCRIPT", _CONSOLE_SCRIPT, 1)
    if is_open:
        page = page.replace('data-secret="set"', 'data-secret="empty"', 1)
    page = page.replace('data-claim=""', f'data-claim="{html.escape(claim)}"', 1)
    return page.encode(errors="replace"), (  # CLAIM may hold any bytes
        f"default-src 'none'; script-src 'self' 'sha256-{script}'; style-src 'sha256-{style}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'")


class Endpoint(NamedTuple):
    """A function from a request to a response, and what it asks of the request."""

    method: str
    answer: Callable[[HTTPHandler, Request], Response]
    right: str = ""  # "" for anybody, "token" for any good token, "api" for one with the claim api
    parameters: tuple[str, ...] = ()  # of the query, beside `auth`; /api/ refuses others


UPGRADE = Endpoint("GET", open_websocket, "token")
ENDPOINTS = {
    "/": Endpoint("GET", show_console),
    "/philote.js": Endpoint("GET", tell_script),
    "/api/publish": Endpoint("POST", publish, "token"),
    "/api/events": Endpoint(
        "GET", follow_events, "token", ("channel", "since", "last", "lastEventId")),
    "/api/history": Endpoint("GET", tell_history, "token", ("channel", "since", "last")),
    "/api/connections": Endpoint("DELETE", end_connections, "api", ("user", "issuer")),
    "/api/info": Endpoint("GET", tell_info, "api"),
    "/metrics": Endpoint("GET", tell_metrics, "api"),
    "/health": Endpoint("GET", tell_health),
}


# --------------------------------------------------------------------------- the interpreter's lock
# The threads of a process share one lock (the GIL), unless the CPython is free-threaded. These two
# classes make thousands of threads cheap all the same: SwitchInterval where many are woken at once,
# Affinity where many are started. Only `philote serve` uses them, since both change what belongs to
# the whole process.

class SwitchInterval:
    """Keeps threads that wait for the interpreter's lock from spending the CPU on asking for it.

    A thread that waits for that lock asks its holder to let go, once in each switch interval. With
    a short one, a busy thread delays the others little. But when thousands are woken at once, they
    do nothing but ask, and the one that gets the lock loses it again after a few instructions: at
    0.5 ms, 3,000 peers that sent one ping each kept both cores busy for 27 s. At 1 s each thread is
    done before it is asked to let go, and all of them take 0.5 s.

    Nothing tells how many threads are waiting. But each sleeps before it asks, which the system
    counts as a voluntary context switch (getrusage(2)). When there are far more of these than the
    reads explain, the interval is made long at once; after a while it is shortened, step by step,
    until there are too many again.
    """

    SHORT, LONG = 0.0005, 1.0  # seconds
    # Where thousands are woken at once, the look that finds it out may come too late: if they begin
    # to ask before it, no thread gets far enough to look. So with more than FEW threads the
    # interval is at least so many seconds for each above FEW: with thousands, about as long as a
    # message to all of them takes.
    FEW, PER_THREAD = 300, 0.00001
    # Seconds between two looks, at least. During a look the interval is long, and who begins to
    # wait then does not ask for so long: with a look every 5 ms, one in a hundred messages beside a
    # flood took twice as long.
    PAUSE = 0.02
    HOLD = 0.1  # seconds that the interval stays long, before it is shortened
    NEWCOMER = 0.001  # seconds: the interval, and how long it stays so, for each newcomer
    EXPLAINED = 8  # switches that a read explains: it sleeps, and then asks a few times
    TOO_MANY = 20_000  # other switches a second; each costs 15 us where machines are slow

    def __init__(self) -> None:
        # Used by all threads without a lock: two may look at once, and some reads go uncounted.
        self.reads = 0
        self.seen = self.switches = 0  # reads and switches at the last look
        self.looked = self.due = self.until = 0.0  # when that was; when to look again, or shorten
        self.interval = self.SHORT
        sys.setswitchinterval(self.interval)

    def count_read(self) -> None:
        """Count that a thread has waited for its peer, or is done; look, if it is time."""
        self.reads += 1
        if (now := time.monotonic()) >= self.due:
            # First of all, or this thread might lose the lock many times before it has looked.
            sys.setswitchinterval(self.LONG)
            self.due = now + self.PAUSE
            self._look(now)

    def expect(self, newcomers: int) -> None:
        """Let threads that are about to start run one after the other: each needs about 1 ms."""
        seconds = newcomers * self.NEWCOMER
        self.interval = max(self.interval, seconds)
        self.until = max(self.until, time.monotonic() + seconds)
        sys.setswitchinterval(self.interval)

    def _look(self, now: float) -> None:
        switches, reads = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, self.reads
        began, now = now, time.monotonic()
        asked = switches - self.switches - self.EXPLAINED * (reads - self.seen)
        if asked > self.TOO_MANY * (now - self.looked) > 0:
            self.interval, self.until = self.LONG, now + self.HOLD
        else:
            many = self.PER_THREAD * (_thread._count() - self.FEW)
            shorter = self.interval / 4 if now >= self.until else self.interval
            self.interval = max(self.SHORT, many, shorter)
        self.looked, self.seen, self.switches = now, reads, switches
        sys.setswitchinterval(self.interval)
        # getrusage() adds up what all threads did, which takes 1 ms for 10,000 of them: at most a
        # fiftieth of the time is for looks. A long one may only have waited for a processor, so the
        # next is never put off for longer than HOLD.
        self.due = max(self.due, now + min(self.HOLD, 50 * (now - began)))


class Affinity:
    """Lets the threads of new connections begin on one processor, that of the accepting thread.

    Of threads that share one interpreter's lock, one works at a time. The system begins each of
    them where there is least to do. So with every other turn of the lock a processor has to wake
    up, and finds nothing of what the interpreter needs in its cache. Therefore the accepting thread
    is pinned to its processor while newcomers come, and so are its threads, which inherit that,
    until they have sent their first answer. On 2 cores that saves a fifth of what a new connection
    costs.

    Once a second the accepting thread is unpinned, so that the system can move it to where there is
    less to do.
    """

    HOLD = 1  # seconds

    def __init__(self) -> None:
        self.until = 0.0  # when the accepting thread is to be unpinned; 0: it is not pinned

    @staticmethod
    def is_possible() -> bool:
        """Find out whether the system can; in a process of its own, which a sandbox may kill."""
        if not hasattr(_system, "sched_getcpu") or not hasattr(os, "sched_setaffinity"):
            return False  # sched_setaffinity(2) is of Linux, and a few others
        with contextlib.suppress(OSError):
            if child := os.fork():
                return os.waitpid(child, 0)[1] == 0
            try:
                os.sched_setaffinity(0, os.sched_getaffinity(0))
                os._exit(0)
            finally:
                os._exit(1)
        return False

    def pin(self) -> None:
        """Stay on this processor: the accepting thread, before it starts others."""
        if not self.until:
            with contextlib.suppress(OSError, ValueError, MemoryError):
                os.sched_setaffinity(0, {_system.sched_getcpu()})
                self.until = time.monotonic() + self.HOLD

    def unpin_if_due(self) -> None:
        """Unpin the accepting thread, if it is time, for its next wait."""
        if self.until and time.monotonic() >= self.until:
            self.until = 0.0
            self.unpin()

    @staticmethod
    def unpin() -> None:
        """Let this thread run wherever the main thread may, which is never pinned.

        So what somebody asks of the whole process while it runs, as by `taskset`, holds for it.
        """
        with contextlib.suppress(OSError, MemoryError):
            os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))


# ------------------------------------------------------------------------------------------- server
# Which connections there are, what they counted, what is logged of them; then the server itself,
# which accepts and ends them.

class Admission:
    """The connections that there are, within the limits of the settings.

    Each is here once: among the subscribed, or among the pending ones of its address, which are
    new, or HTTP clients, or closing.

        admit --> pending, of its peer's address
                            ^
                            | rename: to and fro, with each request that a proxy brings
                            v
                  pending, of its client's address ---- subscribe ----> subscribed
                            ^                                               |
                            '------------ leave: it is closing -------------'

        remove, from either, when its thread ends: what it counted is added to `gone`

    To refuse newcomers when there are too many pending would let anybody keep out all others, by
    connecting and saying nothing. So the address that has most loses its oldest, which is cut off
    without an answer; to have shown a good token makes a connection the youngest again.
    """

    def __init__(self, settings: Settings, stopping: threading.Event) -> None:
        self.settings = settings
        self.stopping = stopping
        self.lock = threading.Lock()  # guards all below
        self.subscribed: set[Connection] = set()  # counted against max_connections
        # All others, by address, the oldest first; they are counted against max_pending.
        self.pending: dict[str, dict[Connection, None]] = {}
        self.pending_count = 0
        # What connections that are gone have counted; and of all, how many were ever subscribed,
        # and how many were cut for not reading.
        self.gone: collections.Counter[str] = collections.Counter()

    def admit(self, connection: Connection) -> None:
        """Take in a newcomer; where there is no room, a pending one has to go."""
        with self.lock:
            victim = self._add_pending(connection)
        if victim:
            victim.evict()

    def renew(self, connection: Connection) -> None:
        """Let a connection that showed a good token be the last to be evicted."""
        with self.lock:
            mates = self._mates_of(connection)
            if connection in mates:
                mates[connection] = mates.pop(connection)

    def rename(self, connection: Connection, address: str) -> None:
        """Count a connection for another address. Its own thread, while it is pending."""
        if address != connection.address:
            with self.lock:
                self._remove_pending(connection)
                connection.address = address
                self.pending.setdefault(address, {})[connection] = None
                self.pending_count += 1

    def subscribe(self, connection: Connection) -> None:
        """Count a pending connection as a subscriber's. Raises HTTPError if there is no room."""
        with self.lock:
            if len(self.subscribed) >= self.settings.max_connections:
                raise HTTPError(503, f"all {self.settings.max_connections} connections are taken",
                                "full", _RETRY)
            if self.stopping.is_set():
                raise HTTPError(503, "the server is shutting down", "shutting_down", _RETRY)
            self._remove_pending(connection)
            self.subscribed.add(connection)
            self.gone["connections"] += 1

    def leave(self, connection: Connection) -> None:
        """Count a subscriber's connection as one that is closing."""
        victim = None
        with self.lock:
            if connection in self.subscribed:
                self.subscribed.remove(connection)
                victim = self._add_pending(connection)
        if victim:
            victim.evict()

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed, but for what it counted."""
        with self.lock:
            if self._remove_pending(connection) or connection in self.subscribed:
                self.subscribed.discard(connection)
                _add_counters(connection, self.gone)

    def connections(self) -> list[Connection]:
        """List them all."""
        with self.lock:
            return [*self.subscribed, *itertools.chain(*self.pending.values())]

    def totals(self) -> collections.Counter[str]:
        """Sum up what all connections counted, and what waits for them."""
        with self.lock:
            totals = self.gone.copy()
            for connection in itertools.chain(self.subscribed, *self.pending.values()):
                _add_counters(connection, totals)
                totals["queued"] += connection.size
            totals["open"] = len(self.subscribed)
        return totals

    # The holder of the lock

    def _add_pending(self, connection: Connection) -> Connection | None:
        # Returns the one that has to go for it: of the address that has most, so that one client
        # cannot keep out all others. The one that goes is counted until its thread ends; it becomes
        # the youngest, so that the next to go is another. The caller ends it without the lock, for
        # that writes to its socket.
        self.pending.setdefault(connection.address, {})[connection] = None
        self.pending_count += 1
        if self.pending_count <= self.settings.max_pending:
            return None
        mates = max(self.pending.values(), key=len)
        victim = next(iter(mates))
        mates[victim] = mates.pop(victim)
        return victim

    def _mates_of(self, connection: Connection) -> dict[Connection, None]:
        # All pending ones of its address. Why without get(), see Log.append().
        return self.pending[connection.address] if connection.address in self.pending else {}

    def _remove_pending(self, connection: Connection) -> bool:
        mates = self._mates_of(connection)
        if connection not in mates:
            return False
        del mates[connection]
        self.pending_count -= 1
        if not mates:
            del self.pending[connection.address]
        return True


_COUNTED = "received", "published", "bytes_received", "bad_message", "forbidden", "too_many"


def _add_counters(connection: Connection, totals: collections.Counter[str]) -> None:
    for name in _COUNTED:
        totals[name] += getattr(connection, name)
    totals["bytes_sent"] += connection.sent


class Metrics:
    """What the server counts: each connection for itself, and refusals here.

    If all threads added to the same counters, they would need a lock, for each message. So they
    are added up when somebody asks; what a thread is counting just then may not be in it yet.
    """

    # Name, type and help for Prometheus, and which of the totals() it is.
    ROWS = (
        ("connections", "gauge", "Connections now.", "open"),
        ("connections_total", "counter", "Connections since the start.", "connections"),
        ("channels", "gauge", "Channels that anybody reads now.", "channels"),
        ("queued_bytes", "gauge", "Bytes that wait for slow subscribers now.", "queued"),
        ("messages_received_total", "counter", "Messages that came, good and bad.", "received"),
        ("messages_published_total", "counter", "Messages that were published.", "published"),
        ("messages_delivered_total", "counter", "Messages queued for subscribers.", "delivered"),
        ("received_bytes_total", "counter", "Bytes read.", "bytes_received"),
        ("sent_bytes_total", "counter", "Bytes written.", "bytes_sent"),
        ("errors_total", "counter", "Messages dropped, by code.", "bad_message", "forbidden",
         "too_many"),
        ("history_messages", "gauge", "Messages kept for those who come back.", "history_messages"),
        ("history_bytes", "gauge", "Bytes that these take.", "history_bytes"),
        ("resumes_total", "counter", "Clients that came back and missed nothing.", "resumed"),
        ("resumes_failed_total", "counter", "And those that may have.", "not_resumed"),
        ("gaps_total", "counter", "Gaps that clients were told of.", "gaps"),
        ("slow_consumers_total", "counter", "Subscribers cut for not reading.", "slow_consumers"),
        ("log_lines_lost_total", "counter", "Log lines that were not written.", "log_lines_lost"),
        ("refusals_total", "counter", "Requests refused, by reason."),
    )

    def __init__(self, admission: Admission, log: Log) -> None:
        self.admission = admission
        self.log = log
        self.lock = threading.Lock()  # guards refusals
        self.refusals: collections.Counter[str] = collections.Counter()  # requests, by code

    def refuse(self, code: str) -> None:
        """Count a refused request."""
        with self.lock:
            self.refusals[code] += 1

    def totals(self) -> collections.Counter[str]:
        """Sum up all that is counted, but for the refusals."""
        totals = self.admission.totals()
        totals.update(self.log.totals())
        totals["log_lines_lost"] = BackgroundHandler.lost
        return totals

    def render(self) -> str:
        """Describe it in Prometheus' text format, version 0.0.4."""
        totals, lines = self.totals(), []
        with self.lock:
            refusals = self.refusals.copy()
        for name, kind, about, *samples in (*self.ROWS, *self.log.ROWS):
            lines += [f"# HELP philote_{name} {about}", f"# TYPE philote_{name} {kind}"]
            if name == "errors_total":
                lines += [f'philote_{name}{{code="{code}"}} {totals[code]}' for code in samples]
            elif name == "refusals_total":
                lines += [f'philote_{name}{{reason="{code}"}} {count}'
                          for code, count in sorted(refusals.items())]
            else:
                lines.append(f"philote_{name} {totals[samples[0]]}")
        return "\n".join(lines) + "\n"


class BackgroundHandler(logging.handlers.QueueHandler):
    """Writes the log in a thread of its own: if nobody reads standard error, no other thread waits.

    Lines that find no place among the 1,000 that wait, or cannot be written, are lost, and counted.
    """

    lost = 0  # lines; a number that may be too low by a few where two threads lose at once

    def __init__(self, descriptor: int) -> None:
        self.lines: queue.Queue[Any] = queue.Queue(1000)
        super().__init__(self.lines)
        # Not a stream: the lock of one that nobody reads would hold up the end of the process.
        self.descriptor = descriptor
        _start(threading.Thread(target=self._write, name="philote-log", daemon=True))

    def enqueue(self, record: logging.LogRecord) -> None:
        """Hand a line to the thread, or drop it."""
        try:
            self.lines.put_nowait(record)
        except queue.Full:
            BackgroundHandler.lost += 1

    def finish(self, seconds: float) -> None:
        """Wait until all lines are written, for so long at most."""
        end = time.monotonic() + seconds
        while self.lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)

    def _write(self) -> None:
        while True:
            record = self.lines.get()
            line = record.getMessage() + "\n"  # formatted by QueueHandler.prepare()
            data = line.encode(errors="backslashreplace")
            try:
                is_whole = os.write(self.descriptor, data) == len(data)
            except OSError:  # the disk is full, or a pipe that does not block
                is_whole = False
            BackgroundHandler.lost += not is_whole
            self.lines.task_done()


class LogLimit:
    """Limits how often the same thing is logged; remembers up to 1,024 things.

    While it remembers so many, nothing else is logged: so a flood of lines ends, even one in which
    each is about another thing.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards what follows
        self.silent_until: dict[str, float] = {}

    def may_log(self, key: str, seconds: float = 60) -> bool:
        """Whether a line about this may be logged now, and the next after so many seconds."""
        now = time.monotonic()
        with self.lock:
            if key in self.silent_until and self.silent_until[key] > now:
                return False
            if len(self.silent_until) >= 1024:
                self.silent_until = {k: end for k, end in self.silent_until.items() if end > now}
            if len(self.silent_until) < 1024:
                self.silent_until[key] = now + seconds
                return True
            return False


_MOST_NEWCOMERS = 64  # connections that are accepted before the first of them gets its thread


class _Stopped(Exception):
    """Ends Server.serve_forever(), or the wait for the log."""


_NO_TURN = contextlib.nullcontext()


class Server(socketserver.ThreadingTCPServer):
    """A Philote server. As a context manager it serves from its own threads until the block ends.

        with Server(Settings(port=0)) as server:
            print(server.port)

    It listens from the start, with REDIS_URL once it has read the log; newcomers wait in the
    system's queue until the block begins. With a `listener`, a socket that listens already, it
    serves on that. `is_over` ends the wait for a Redis that is not there yet, once it returns true.
    `failure` says why it cannot go on, once that is so.

    Its threads need stacks of 2 MiB, as `philote serve` sets them, or deeply nested JSON may end
    the process: where the system gives them less (Alpine), call threading.stack_size(2 << 20)
    before. On CPython 3.10 and 3.11 so may a recursion limit over 10,000. It serves in the process
    that made it, not behind a fork.

    Raises OSError where it cannot listen or, also as the block begins, finds no thread or file;
    SettingsError where it cannot use what the settings name; ImportError or PhiloteError where a
    package that they need is missing; PhiloteError where Redis refuses us for good; RuntimeError
    where the block is entered again.
    """

    allow_reuse_address = True
    # Connections that the system holds until they are accepted, if its own limit (on Linux
    # net.core.somaxconn, 4096) allows; whoever finds no room there tries again a second later.
    request_queue_size = 16384

    def __init__(self, settings: Settings = Settings(),
                 listener: socket.socket | None = None,
                 is_over: Callable[[], bool] = lambda: False) -> None:
        self.settings = settings
        self.listener = listener
        self.started = time.monotonic()
        self.numbers = itertools.count(1)  # of the connections; the accepting thread's
        self.stopping = threading.Event()
        self.stopped = threading.Event()
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None  # called by fail()
        self.log: Log = RedisLog(settings) if settings.redis_url else Log(settings)
        self.log.end_own, self.log.stopping = self.end_own, self.stopping
        self.log.on_failure = self.fail
        self.admission = Admission(settings, self.stopping)
        self.metrics = Metrics(self.admission, self.log)
        self.keys = Keyring(settings)
        # A free-threaded CPython takes the lock up again when it loads a compiled package that was
        # not made for it, such as hiredis. All that the settings ask for is loaded by now.
        self.interpreter_lock: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
        # Of lines about what peers do, and of all others: a flood of the former silences none of
        # the latter.
        self.log_limit, self.own_log_limit = LogLimit(), LogLimit()
        # Set by `philote serve`, which owns the process, where there is an interpreter's lock to
        # share. A thread that a program's own code started from a pinned one would stay pinned.
        self.switch_interval: SwitchInterval | None = None
        self.affinity: Affinity | None = None
        self.turn = threading.Lock()  # see take_turn()
        self.gathering = Gathering()
        self.tls = _load_certificate(settings)  # for the next newcomer
        self.file: tuple[str, int] | None = None  # of a Unix socket: its path and inode
        self.reserve: int | None = None  # see server_activate()
        self.address_family, address = (
            _resolve(settings.host, settings.port) if listener is None else
            (socket.AddressFamily(listener.family), listener.getsockname()))
        self.log.begin(is_over)
        try:
            super().__init__(address, HTTPHandler)  # type: ignore[arg-type]
        except BaseException:
            self.log.close()
            raise
        self.socket.setblocking(False)
        self.acceptor = threading.Thread(target=self._accept, name="philote-accept", daemon=True)

    def server_bind(self) -> None:
        """Bind, for all interfaces to IPv4 and IPv6 alike."""
        if self.listener:
            self.socket.close()
            self.socket = self.listener
            # What it accepts has its options, and Transport.close(), which holds the interpreter's
            # lock, must not wait. Zeros are a `struct linger` that is off.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
            return
        if self.address_family == socket.AF_UNIX:
            path = str(self.server_address)
            _refuse_other_file(path)
            _remove_stale_socket(path)
            super().server_bind()
            os.chmod(path, 0o660)  # nobody can connect yet: it does not listen
            self.file = path, os.stat(path).st_ino
            return
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(self.settings.host)))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, self.settings.reuse_port)
        super().server_bind()

    def server_activate(self) -> None:
        """Listen. Whatever raises here, socketserver calls server_close()."""
        self.poller = Poller(self.fail)
        super().server_activate()
        # A descriptor in reserve: where there is no other, it is closed to accept a newcomer and
        # refuse it. The accepting thread's, then server_close()'s.
        self.reserve = os.open(os.devnull, os.O_RDONLY)

    def server_close(self) -> None:
        """Close the listening socket; its file is removed, unless it is another's by now."""
        self._close_reserve()
        if self.file:
            (path, inode), self.file = self.file, None
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
        super().server_close()

    @property
    def port(self) -> int | None:
        """The port of TCP that it listens on, also for port 0."""
        return None if isinstance(self.server_address, (str, bytes)) else self.server_address[1]

    @property
    def where(self) -> str:
        """What it listens on, for the log."""
        address: Any = self.server_address
        return (f"{address[0]} port {self.port}" if self.port is not None else
                _UNIX + os.fsdecode(address).replace("\0", "@"))

    def __enter__(self) -> Server:
        if self.poller.ident or self.stopping.is_set():  # begun, or stopped, which it stays
            raise RuntimeError("a Server serves once")
        try:
            if self.keys.provider:
                self.keys.reload()
            _start(self.poller)
            _start(self.acceptor)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def fail(self, error: BaseException) -> None:
        """Note that one of the server's own threads cannot go on, and tell who owns the process."""
        self.failure = error
        with contextlib.suppress(Exception):
            log.critical("the server cannot go on: %s", type(error).__name__)
        self.on_failure()

    def reload(self) -> str:
        """Read the files of the settings again, for newcomers; returns what was done, for the log.

        Raises SettingsError where one cannot be used; what was read of that before goes on.
        """
        errors, done = [], []
        try:
            self.tls = _load_certificate(self.settings)
            if self.tls:
                done.append("read the certificate")
        except SettingsError as error:
            errors.append(str(error))
        try:
            self.keys.reload()
            if self.settings.public_keys:
                done.append(("asked for" if self.keys.provider else "read") + " the public keys")
        except SettingsError as error:
            errors.append(str(error))
        if errors:
            raise SettingsError("; ".join(errors))
        return " and ".join(done) or "there is nothing to read"

    # The accepting thread. What socketserver calls a request is a connection. Its serve_forever()
    # waits for a newcomer, half a second at most; if there is one, it calls get_request() and then
    # process_request(); and in each round service_actions(). What these raise, it takes so:
    #
    #     get_request()        OSError: the round is over; anything else ends the thread
    #     process_request()    Exception: handle_error(), then shutdown_request()
    #     service_actions()    anything ends the thread, as _Stopped
    #
    # The listening socket does not block: so process_request() finds out when nobody waits.

    def _accept(self) -> None:
        try:
            self.serve_forever()
        except _Stopped:
            pass
        except BaseException as error:
            self.fail(error)

    def service_actions(self) -> None:
        """End serve_forever(), whose own way, shutdown(), waits for it without a limit.

        Called before each wait for newcomers, and so the moment in which this thread may be moved.
        """
        if self.stopping.is_set():
            raise _Stopped
        if self.affinity:
            self.affinity.unpin_if_due()

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; out of descriptors, refuse it."""
        if self.stopping.is_set():  # with a `listener`, the newcomer is for the next server on it
            raise _Stopped
        sock = None
        try:
            sock, address = super().get_request()
            # On macOS a new socket does not block where the listening one does not. It is asked
            # first: setblocking() would let go of the interpreter's lock, see process_request().
            if not os.get_blocking(sock.fileno()):
                sock.setblocking(True)
            # A client of a Unix socket may have given its own end any name.
            name = (_UNIX_PEER if self.address_family == socket.AF_UNIX else
                    address[0].removeprefix("::ffff:"))
            return Connection(self, sock, name), address
        except MemoryError:  # socketserver goes on after an OSError alone
            if sock:
                sock.close()
            else:
                self.stopping.wait(0.1)  # the newcomer may still be there; see below
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._refuse_for_want_of_descriptors(error)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Accept who else waits, up to 64 in all, then start their threads.

        To accept one lets go of the interpreter's lock, and this thread queues up for it again
        behind all others that have work. So it accepts first, and gives them work then.
        """
        newcomers: list[Connection] = [request]
        # Whatever ends this, the next get_request() meets it again, and sees to it.
        with contextlib.suppress(OSError, MemoryError, _Stopped):
            while len(newcomers) < _MOST_NEWCOMERS:
                newcomers.append(self.get_request()[0])
        if self.switch_interval:
            self.switch_interval.expect(len(newcomers))
        if self.affinity:
            self.affinity.pin()
        for connection in newcomers:
            self._start_thread(connection)

    def _start_thread(self, connection: Connection) -> None:
        # Where the system has no thread left, the connection is refused.
        try:
            self.admission.admit(connection)
            # threading.Thread.start() waits until the thread runs. One that finds no memory for
            # its first step never does, and nobody would be accepted any more.
            _thread.start_new_thread(self.run_connection, (connection,))
        except (RuntimeError, MemoryError) as error:
            self.admission.remove(connection)
            with contextlib.suppress(MemoryError):
                self._refuse_at_the_door(connection.transport.sock)
                if self.own_log_limit.may_log("threads"):
                    log.error(
                        "no more threads, newcomers are refused: %s", str(error) or "no memory")

    def shutdown_request(self, request: Any) -> None:
        """Do nothing: a connection is closed by its own thread."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what socketserver would print."""
        with contextlib.suppress(MemoryError):
            log.exception("%s: unexpected error", request.address)

    def _refuse_for_want_of_descriptors(self, error: OSError) -> None:
        if self.own_log_limit.may_log("descriptors"):
            log.error("no more descriptors, newcomers are refused: %s", error.strerror)
        # Who is not accepted stays in the queue of the listening socket, and knows nothing. To
        # accept takes a descriptor, even to refuse; so one is held in reserve, and let go for that.
        if self._close_reserve():
            with contextlib.suppress(OSError):
                self._refuse_at_the_door(self.socket.accept()[0])
        try:
            self.reserve = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            # Without a wait this thread would spin: the listening socket stays readable.
            self.stopping.wait(0.1)

    def _close_reserve(self) -> bool:
        # By one thread alone: a number that is closed twice may be another file's by then.
        reserve, self.reserve = self.reserve, None
        if reserve is not None:
            os.close(reserve)
        return reserve is not None

    def _refuse_at_the_door(self, sock: socket.socket) -> None:
        # No thread but the accepting one is there to do it, and that waits for nobody. What has
        # come is read, for a close with unread input would destroy the answer (RST).
        with sock, contextlib.suppress(OSError):
            error = HTTPError(503, "the server has no room for another connection", "exhausted",
                              {**_CLOSE, **_RETRY})
            self.metrics.refuse(error.code)
            if not self.tls:
                sock.send(error.response().encode(), _DONTWAIT)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(_FULL_READ, _DONTWAIT)

    # A connection's thread

    def run_connection(self, connection: Connection) -> None:
        """Serve a connection from its first byte to its last. Its own thread begins here."""
        try:
            connection.handler = HTTPHandler(connection)
            if subscriber := connection.handler.run():
                subscriber.run()
        except ssl.SSLError as error:
            self.refuse(connection.address, HTTPError(
                400, f"its TLS failed: {_tell_error(error)}", "tls"))
        except OSError:
            pass  # the peer is gone
        except Exception:
            log.exception("%s: unexpected error", connection.address)
        finally:
            self._end_connection(connection)

    def _end_connection(self, connection: Connection) -> None:
        # Whatever raises here, even for want of memory: what stands under `finally` is done.
        # drain() needs the poller, to cut off a slow peer, so forget() comes behind it. remove()
        # comes behind both, for stop() waits until none is left, and then ends the poller.
        try:
            # It may have left already. But whoever ended it may have been faster than its own
            # thread, which then joined channels after that.
            patience = 0.0
            if isinstance(connection.handler, Subscriber):
                connection.handler.leave()
            else:  # the last answer may be large; it may take as long as a request
                patience = time.monotonic() + self.settings.request_timeout
            connection.finish(patience=patience)
            connection.drain()
        finally:
            try:
                connection.close()
            finally:
                try:
                    self.poller.forget(connection)
                finally:
                    self.admission.remove(connection)
                    # Where thousands end at once, there may be nobody left whose read would shorten
                    # the interval again.
                    if self.switch_interval:
                        self.switch_interval.count_read()

    def take_turn(self, size: int) -> contextlib.AbstractContextManager[Any]:
        """Let one thread at a time work on much input, where all share one interpreter's lock.

        `size` is that of the input, in bytes; with little of it nobody waits. Why: see
        WebSocket.read_messages().
        """
        return self.turn if size >= _LARGE_READ and self.interpreter_lock else _NO_TURN

    def refuse(self, address: str, error: HTTPError) -> None:
        """Count a refusal, and log it once in a while for each address."""
        self.metrics.refuse(error.code)
        if self.log_limit.may_log(address):
            log.info("%s: refused with %d: %s (said once a minute)", address, error.status, error)

    # The end

    def end_own(self, user: str = "", issuer: str = "") -> int:
        """End the connections here of a user or an issuer with close 4403; returns how many."""
        return sum(subscriber.end(ENDED, "ended by an operator")
                   for subscriber in self._subscribers()
                   if user and subscriber.key.user == user or issuer and subscriber.id == issuer)

    def stop(self, timeout: float | None = None) -> None:
        """Stop serving: no newcomers, queued messages are written, everybody gets close 1001.

        It takes `timeout` seconds at most, by default those of the settings. A message that was
        read before the call reaches all subscribers that read. Called again, it waits for the
        first call's end.
        """
        timeout = self.settings.shutdown_timeout if timeout is None else timeout
        with self.admission.lock:  # Admission.subscribe() lets nobody in after this
            first = not self.stopping.is_set()
            self.stopping.set()  # from now on, what a subscriber sends is dropped
        if not first:
            self.stopped.wait(timeout + 1)
            return
        try:
            self._stop_listening()
            self._end_all(time.monotonic() + timeout, min(1, timeout / 5))
        finally:
            self.log.close()
            self.poller.stop()
            self.stopped.set()

    def _stop_listening(self) -> None:
        if not self.listener:  # shutdown() would end one that was given for others, too
            with contextlib.suppress(OSError):  # on Linux this wakes the accepting thread at once
                self.socket.shutdown(socket.SHUT_RDWR)
        if self.acceptor.is_alive():
            self.acceptor.join(1)
        self.server_close()

    def _end_all(self, deadline: float, time_to_cut: float) -> None:
        # Each step takes as long as there is anything to wait for and time is left. The last one
        # has `time_to_cut` for itself, and step 2 leaves as much to 3 and 4:
        #
        # 1. Threads finish what they had read: requests are answered, messages are published.
        # 2. These messages come back from the log; only then are they in the queues.
        # 3. Subscribers get their close behind what is queued.
        # 4. So do the others, who could still ask for /health until here.
        # 5. Who has not ended is cut off, and their threads have the time that is left.
        #
        # With the default of 10 s, steps 1, 3 and 4 end after 9 s at the latest. Step 2 does not
        # wait beyond 8 s, and not at all if step 1 took as long.
        patience = deadline - time_to_cut
        working = ANSWERING, SUBSCRIBED
        self._wait_until_none(lambda c: c.busy and c.state in working, patience)
        self.log.drain(patience - time_to_cut)
        for subscriber in self._subscribers():
            subscriber.end(CloseReason.GOING_AWAY, "server is shutting down", patience=patience)
        self._wait_until_none(lambda c: isinstance(c.handler, Subscriber), patience)
        for connection in self.admission.connections():
            connection.finish(patience=patience)
        self._wait_until_none(lambda c: True, patience)
        for connection in self.admission.connections():
            connection.abort()
        self._wait_until_none(lambda c: True, deadline)

    def _subscribers(self) -> list[Subscriber]:
        # Also those that are closing by now: to end them again does nothing.
        handlers = [connection.handler for connection in self.admission.connections()]
        return [handler for handler in handlers if isinstance(handler, Subscriber)]

    def _wait_until_none(self, matches: Callable[[Connection], bool], deadline: float) -> None:
        while any(map(matches, self.admission.connections())) and time.monotonic() < deadline:
            time.sleep(0.01)


def _refuse_other_file(path: str) -> None:
    """Raise OSError where another file stands in the way of a Unix socket."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket")


def _remove_stale_socket(path: str) -> None:
    """Remove the file of a Unix socket on which nobody listens any more."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    if host.startswith(_UNIX):
        return socket.AF_UNIX, host.removeprefix(_UNIX)
    if host or not socket.has_dualstack_ipv6():
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        except UnicodeError:  # a name that no host can have
            raise socket.gaierror(socket.EAI_NONAME, f"{host!a} can be no name of a host") from None
        return family, address
    return socket.AF_INET6, ("::", port)


def _load_certificate(settings: Settings) -> ssl.SSLContext | None:
    if not settings.tls_cert:
        if settings.tls_key:
            raise SettingsError(f"TLS_KEY: {settings.tls_key!r} is of no use without TLS_CERT")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    names = {name: getattr(settings, name.lower()) for name in ("TLS_CERT", "TLS_KEY")}
    for name, path in names.items():  # load_cert_chain() would not say which it cannot read
        try:
            open(path or settings.tls_cert, "rb").close()
        except (OSError, ValueError) as error:  # the latter for a NUL in it
            raise SettingsError(f"{name}: {path!r} cannot be read: {_tell_error(error)}") from None
    try:  # the password is for a key that has one: OpenSSL would ask for it at the terminal
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None, password="")
    except OSError as error:
        shown = " with ".join(f"{name}: {path!r}" for name, path in names.items() if path)
        why = ("the key is another one's" if _tell_error(error) == "key values mismatch" else
               "a certificate and a key without a password are wanted, both in PEM")
        raise SettingsError(f"{shown} cannot be used: {why}") from None
    return context


def _tell_error(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # OpenSSL's, in capitals with underscores
    return (reason.lower().replace("_", " ") if isinstance(reason, str)
            else getattr(error, "strerror", None) or str(error))


# ------------------------------------------------------------------------------------------- client
# For Python programs, and for the commands below. With the server it shares code, such as the
# transports, and no state. wsproto makes the frames and takes them apart. A server is not trusted:
# what it sends is bounded in time and size.
#
#     Client          what is asked and answered, what waits to be received; comes back after a cut
#     _Link           one connection: the handshake, messages, pings, the close
#     _ClientSocket   its bytes: waits that have an end, and that abort() ends
#
# Coming back. The client keeps one position for all channels: the highest id that it was sent. When
# its connection is lost, it makes another and asks for all that came after that id: the replay.
# Each message that it publishes carries a ref, and stays in _requests until the server answers with
# that ref. When a connection is lost, nobody knows which of the unanswered messages the server had
# read. To send all of them again would bring some twice, so the client looks for them first:
#
#     1. A server does not send a connection its own messages. But the new connection is another one
#        to it, so the replay holds what we published on the old ones; each such message answers
#        the request that it was sent by. What was not in the log yet comes behind the replay: the
#        answer to an unsubscription of nothing shows that all is there that any server had read.
#     2. A replay brings only channels that are joined. Those that we only publish to are then
#        joined, one by one, each with a replay, and left again.
#     3. The server answers subscriptions in order. The last of these has the ref _CAUGHT_UP, the
#        others _CHECK. So with that answer, all replays have been read.
#     4. What is still unanswered is sent again, in order; meanwhile new requests wait behind it.
#
# For a client that had published "hello" to the channel logs, and follows news:
#
#     server -> client   {"connected": {"id": "7-0", ...}}, and the replay of news after id 7-0
#     client -> server   {"unsubscribe": [], "ref": "check"}
#     client -> server   {"subscribe": ["logs"], "since": "7-0", "ref": "check"}
#     client -> server   {"unsubscribe": ["logs"], "ref": "caught up"}
#     server -> client   the replay of logs after id 7-0, and the answers
#     client -> server   {"channel": "logs", "data": "hello", "ref": "12"}, if it was not in there
#
# So others get a message twice only where our token may not read its channel, where the server no
# longer keeps all that came after the position, or where bytes of the old connection reach their
# server too late for step 1, or its entries Redis: one of several that was stopped, or cut off.
#
# The threads. Each caller sends its own requests. One more thread, philote-client, reads, and
# connects again. While a connection lasts it must not wait for a send: the server reads nothing as
# long as it sends a replay, and where that fills the buffers between us, both would wait for ever.
# What has to be sent in answer to what was read - steps 2 and 4, a pong, a close - is therefore
# sent by a short-lived thread, see _send_aside().
#
# The locks, in the order in which they may be taken: Client._asking, Client._lock (nothing is sent
# under it; a thread that holds it may take it again), _Link.sending, _ClientSocket.calling.
# Nobody waits for _Link.ponging, see there.

_ANSWER_TIME = 10  # seconds that we wait for a server's answer, or for progress in close()
# Seconds. A client tries to come back after a random part of the first; at each attempt that fails
# this doubles, up to the last.
_FIRST_PAUSE, _LAST_PAUSE = 0.5, 20
_MOST_ASKED = 1000  # requests that may wait for the server's answer
_MOST_SIZE = 1 << 24  # characters of JSON that these may have together
_MOST_CHANNELS = 1000  # entries in Client._acknowledged, before those no longer needed are dropped
_MOST_RECEIVED = 1 << 26  # characters that may wait to be received
_LONGEST_QUERY = 4000  # characters, half of what proxies take; the other channels are joined later
# The refs of step 2, above. Those of requests are numbers, so they cannot be the same.
_CHECK, _CAUGHT_UP = "check", "caught up"
# What is raised where an answer is decoded and its members are looked up, and it is not one that a
# Philote server sends. To check each member first would take more code than it protects.
_NO_PHILOTE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
# Close codes with which another attempt would end as well, so that there is none: we would send
# again what the server could not take, or get again what was too large for us.
_FINAL = {CloseReason.PROTOCOL_ERROR, CloseReason.INVALID_FRAME_PAYLOAD_DATA,
          CloseReason.MESSAGE_TOO_BIG}
# HTTP statuses below 500 with which a proxy may answer for a while: it has no route while a server
# starts, or limits how many come at once.
_PASSING = {404, 408, 425, 429}


class PhiloteError(Exception):
    """What a Client raises, beside OSError where the server cannot be reached.

    A Server raises it where it cannot use Redis.
    """


class Unauthorized(PhiloteError):
    """The server did not let us in; `status` is its HTTP status: 401 for the token, 503 if full."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)  # just these, so that it can be pickled
        self.status = status

    def __str__(self) -> str:
        return f"{self.args[1]} (HTTP {self.status})"


class Forbidden(PhiloteError):
    """The server dropped what we sent: the token does not allow it, or it was malformed."""


class Gap(PhiloteError):
    """Messages may be missing here; those that follow are complete."""

    def __str__(self) -> str:
        return "messages may be missing here"


class ConnectionClosed(PhiloteError):
    """The connection has ended, with a close code of RFC 6455, section 7.4.

    Code 1006 is an end without a closing handshake.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code

    def __str__(self) -> str:
        return f"connection closed with {self.code}" + (f": {self.args[1]}" if self.args[1] else "")


def _is_refusal(error: Unauthorized) -> bool:
    return error.status < 500 and error.status not in _PASSING


class _Request:
    """A message, a subscription or its end, which the server answers by its ref.

        _ask()           enters it in Client._requests and sends it; while the client comes back (to
                         the end of step 4, above) it only enters it, as _begin() does
        _send_again()    sends what this connection has not sent yet, by the same ref
        _answer()        removes it: for the server's answer, or for its own message in a replay
        _await()         waits for the answer, where somebody wants it

    Guarded by Client._lock.
    """

    def __init__(self, value: dict[str, Any], awaited: bool) -> None:
        self.value = value
        # Encoded at once: it may be sent later, or again, and callers change what they hold.
        self.text = json.dumps(value, allow_nan=False)
        self.awaited = awaited  # whether somebody waits for the answer
        self.link: _Link | None = None  # the connection that it was sent on last
        self.answer: dict[str, Any] | PhiloteError | None = None
        # Of a subscription: its channels, and the ids of their messages that came before its
        # answer. The same may come once more: for another subscription that is not answered yet, or
        # for this one, if it is sent again because the connection was lost.
        self.names = Names(value.get("subscribe", ()))
        self.brought: set[str] = set()

    @functools.cached_property
    def data(self) -> str:
        """A message's data in the form to compare it in, once it comes back in a replay.

        The server leaves out null and "", and we read "" for what is left out.
        """
        data = json.loads(self.text).get("data")
        return json.dumps("" if data is None else data)

    def encode(self, ref: str) -> str:
        """Encode it with its ref, behind the last member: {"channel": "a", "data": 1, "ref": "12"}.

        So the data, which may be large, is encoded only once.
        """
        return self.text[:-1] + f', "ref": "{ref}"}}'


class Client:
    """A connection to a Philote server. Threads may share it: one publishes while another receives.

        with Client("ws://localhost:6380",
                    new_token(secret, read=["news"], write=["news"])) as client:
            client.publish("news", "hello")
            print(client.receive(timeout=1))

    `token` is a string, or a function that is called for each connection. `channels` to follow
    are by default all that the token may read. `since` (an id, "now", or a duration such as "10m")
    and `last` (a number of messages of each channel) ask for messages of the past.

    When its connection is lost, it makes another and goes on where it was. Nothing is missed; where
    messages may be missing all the same, receive() raises Gap, once, and goes on when called again.
    What was published and not acknowledged is published again, unless the channel's history shows
    that it has arrived. To see that, the token has to allow reading the channel; if it does not,
    others may get the message twice. With `reconnect=False` the end of the connection is the end of
    the client.

    Raises OSError where the server cannot be reached or does not answer in time, Unauthorized where
    it does not let us in, PhiloteError where it is another kind of server, or where the URL or the
    token is malformed.

    When the server drops a message, publish() without `wait` has already returned: Forbidden is
    raised by the next publish(), receive() or close() that finds the answer. ConnectionClosed is
    raised once all that came has been received. close() and the end of the `with` block raise it
    too, where a message that was published may be lost.
    """

    max_message_size = 1 << 26  # characters; a server that sends a larger message is left

    def __init__(self, url: str = "ws://localhost:6380", token: str | Callable[[], str] = "",
                 channels: Iterable[str] | None = None, since: str | None = None,
                 last: int | None = None, reconnect: bool = True) -> None:
        self._url, self._token, self._reconnect = split_url(url), token, reconnect
        # What the first connection asks for of the past. Only who asks gets ids, and without an id
        # there is no coming back: hence "now", which asks for ids and for nothing of the past.
        self._past = _given(
            since=since or ("now" if reconnect and last is None else None), last=last)
        # Guards all below, but for _asking. It is taken itself, not by the Condition, whose methods
        # are Python's: the handler of a signal that raises in there would leave it locked for ever.
        # (CPython 3.14 lets one raise between `with self._lock` and its block, too: gh-148874.)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._channels = None if channels is None else _names_of(channels)  # None: all it may read
        if not all(map(_is_encodable, [since or "", *(self._channels or ())])):
            raise PhiloteError(
                "neither a channel's name nor `since` can hold half of a surrogate pair")
        self._received: collections.deque[tuple[Message | Gap, int]] = collections.deque()
        self._received_size = 0
        self._refusals: collections.deque[PhiloteError] = collections.deque()
        self._requests: dict[str, _Request] = {}  # that are not answered, the oldest first
        self._asked_size = 0  # characters of their JSON
        self._subscribing: list[_Request] = []  # the subscriptions among them
        self._refs = map(str, itertools.count(1))
        self._position = ""
        # While what `last` asked for comes, the position is its end already. This is the id up to
        # which it has come, "" if none of it has; None where it has all come (which the answer to
        # _CAUGHT_UP says), or was not asked for.
        self._behind: str | None = None
        # The issuers that the server gave our last connections: by them we know our own messages.
        self._issuers: collections.deque[str] = collections.deque(maxlen=100)
        # By channel, the highest id of a message of ours that was answered. Those up to it answer
        # no request when a replay brings them (again). It is not one id for all channels, because
        # the channels of step 2 are replayed one after the other, each from the old position on.
        # For channels that are not in here, _all_acknowledged counts.
        self._acknowledged: dict[str, int] = {}
        self._all_acknowledged = 0
        # False on a new connection, where something is unanswered, to the end of step 4: meanwhile
        # requests are not sent at once.
        self._caught_up = True
        # From which id on step 2 looks for messages of ours; empty once it is done. `_position` is
        # not good for that: if the next connection is lost during step 2, it has moved on by then,
        # past messages of ours in channels that were not looked through.
        self._unchecked = ""
        self._takes_more = True  # False from the beginning of close() on
        self._closing = False  # whether no more is waited for, and there is no coming back
        self._end: Exception | None = None
        self._end_traceback: Any = None  # of an error in a function of the program: where it was
        # With reconnect=False, a message that nobody waits for is not answered. Behind one of these
        # this is False, until the server shows that it read all, or a caller is told of the end.
        self._outcome_known = True
        self._asking = threading.Lock()  # what is asked is sent in the order of the refs
        self._link = self._connect()
        self._thread = threading.Thread(target=self._run, name="philote-client", daemon=True)
        try:
            _start(self._thread)
        except BaseException:  # a signal's, too: nobody else can close it
            self._closing = True
            self._link.abort()
            raise

    @property
    def position(self) -> str:
        """The id up to which all has come, in all channels; "" where the connection has no ids.

        Some messages may still wait for receive(). To go on later from what you have handled, keep
        the id of the last message that receive() returned instead, or this one if it is lower.
        (It can be where the names of the channels have more than some 4,000 characters in all:
        some are joined later then, and their past is still to come.)
        """
        with self._lock:
            since: list[str] = [request.value["since"] for request in self._joining()]
            return min([self._behind or self._position, *since], key=decode_id)

    def publish(self, channel: str, data: Any, wait: bool = False) -> str | None:
        """Send a message, whose data is any JSON value; with `wait` returns its id.

        With `reconnect` it is kept until the server has answered it. While 1,000 messages are kept,
        or 16 MB of JSON, this waits. Raises ConnectionClosed; Forbidden, with `wait` for this
        message, else for an earlier one; TypeError or ValueError for data that is not JSON.
        """
        self._raise_refusal()
        value = {"channel": _plain(channel), "data": data}
        if self._reconnect or wait:
            request = self._ask(value, wait)
            return str(self._await(request)["published"]["id"]) if wait else None
        text = json.dumps(value, allow_nan=False)
        with self._lock:
            # If close() is called behind this, the message fails below, or goes out before the
            # close frame, and the answer to that shows that it was read.
            if takes_more := self._takes_more:
                self._outcome_known = False
        if not takes_more or not self._link.send_text(text):
            self._thread.join(CLOSING_TIME)  # by then it has put down why, in _end
            self._raise_refusal()
            self._raise_end()
            raise ConnectionClosed(1006)
        return None

    def subscribe(self, *channels: str, since: str | None = None, last: int | None = None) -> None:
        """Join channels or patterns, and wait for the server's answer.

        What `since` and `last` ask for of the past (see Client) waits for receive() by then. Raises
        ConnectionClosed, and Forbidden: then none of them is joined.
        """
        names = [*map(_plain, channels)]
        self._await(self._ask({"subscribe": names, **_given(since=since, last=last)}, True))

    def unsubscribe(self, *channels: str) -> None:
        """Leave channels or patterns, and wait for the server's answer.

        Once it returns, no more of their messages come; those that came before wait for receive().
        """
        self._await(self._ask({"unsubscribe": [*map(_plain, channels)]}, True))

    def receive(self, timeout: float | None = None) -> Message | None:
        """Wait `timeout` seconds (None: for ever) for the next message; None if there was none.

        Raises Gap where messages may be missing, ConnectionClosed once all that came has been
        received, and Forbidden for a message that we published.
        """
        with self._lock:
            self._changed.wait_for(lambda: self._refusals or self._received or self._end,
                                   None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
            self._raise_refusal()
            if not self._received:
                self._raise_end()
                return None
            item, size = self._received.popleft()
            self._received_size -= size
        if isinstance(item, Gap):
            raise item
        return item

    def __iter__(self) -> Iterator[Message]:
        """Receive messages until close() is called. Raises what receive() raises."""
        while True:
            try:
                message = self.receive()
            except (ConnectionClosed, OSError):
                if self._closing:
                    return
                raise
            if message:
                yield message

    def close(self) -> None:
        """End the connection, once the server has read all that was published.

        Waits for that while there is progress, and gives up after 10 seconds without. To publish
        meanwhile raises ConnectionClosed. Raises
        ConnectionClosed or Unauthorized where a message may be lost, Forbidden where one was
        refused.
        """
        self._take_no_more()
        answered = self._wait_while(
            lambda: bool(self._unanswered()) and not self._end, _ANSWER_TIME)
        end = self._end
        self._close(_ANSWER_TIME if answered else 0)
        self._raise_refusal()
        if count := self._unanswered():
            lost = "1 message was" if count == 1 else f"{count} messages were"
            raise end or ConnectionClosed(1006, lost + " not acknowledged")
        if not self._outcome_known:
            self._raise_end()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._close(_ANSWER_TIME)

    def _unanswered(self) -> int:
        with self._lock:
            return sum("channel" in request.value for request in self._requests.values())

    def _take_no_more(self, closing: bool = False) -> None:
        with self._lock:
            self._takes_more, self._closing = False, self._closing or closing
            self._changed.notify_all()

    def _close(self, patience: float) -> None:
        # A closing handshake. The server may take its time to read what was published before.
        self._take_no_more(closing=True)
        # Where the system has no thread left for it, no close frame is sent; then the wait below
        # ends after `patience` seconds.
        with contextlib.suppress(OSError):
            _send_aside(self._link.send_if_open, wsproto.events.CloseConnection(
                CloseReason.NORMAL_CLOSURE))
        self._wait_while(self._thread.is_alive, patience)
        self._link.abort()
        self._thread.join(1)  # it may be in a function of the program's that does not return
        self._tell_end()

    def _wait_while(self, condition: Callable[[], bool], patience: float) -> bool:
        # Gives up after `patience` seconds without progress, and returns False then. Progress is a
        # new connection, bytes of ours that the server's system has acknowledged, or an answer. No
        # event tells of acknowledged bytes, so this looks 50 times a second. The pause between is a
        # join(): it ends at once when the reading thread does.
        progress, end = None, 0.0
        while condition():
            before, progress = progress, (self._link, self._link.sock.taken(), len(self._requests))
            if progress != before:
                end = time.monotonic() + patience
            elif time.monotonic() > end:
                return False
            self._thread.join(0.02)
        return True

    def _ask(self, value: dict[str, Any], awaited: bool) -> _Request:
        if awaited and threading.current_thread() is self._thread:  # which has to read the answer
            raise RuntimeError("on_connect(), on_disconnect() and the function that makes tokens "
                               "cannot wait for the server")
        request = _Request(value, awaited)  # raises TypeError, ValueError for what is no JSON
        link: _Link | None = None
        with self._asking:
            try:
                with self._lock:
                    self._wait_for_room(len(request.text))
                    link = self._link
                    ref = self._add_request(request)
                    if not self._caught_up:
                        return request
                    request.link = link
                # Where this fails, the reading thread meets it too: it comes back and sends the
                # request again, or ends the client, which _await() and close() notice.
                link.send_text(request.encode(ref))
            except BaseException:  # a signal's: the request may be entered, and not sent
                if link:
                    link.abort()
                raise
        return request

    def _wait_for_room(self, size: int) -> None:
        # A request that is too large by itself is let through when nothing else waits.
        self._changed.wait_for(lambda: self._end or not self._takes_more or not self._requests or (
            len(self._requests) < _MOST_ASKED and self._asked_size + size < _MOST_SIZE))
        self._refuse_when_closing()
        self._raise_end()

    def _refuse_when_closing(self) -> None:
        # But not the thread that reads, or what on_connect() publishes would end the client, while
        # close() waits for it to come back.
        if self._closing or not self._takes_more and threading.current_thread() is not self._thread:
            raise (self._end or ConnectionClosed(1006)).with_traceback(self._end_traceback)

    def _add_request(self, request: _Request) -> str:
        ref = next(self._refs)
        self._requests[ref] = request
        self._asked_size += len(request.text)
        if "subscribe" in request.value:
            self._subscribing.append(request)
        return ref

    def _answer(self, ref: object, answer: dict[str, Any] | PhiloteError) -> _Request | None:
        request = self._requests.pop(str(ref), None)
        if request:
            request.answer = answer
            self._asked_size -= len(request.text)
            if request in self._subscribing:
                self._subscribing.remove(request)
        return request

    def _await(self, request: _Request) -> dict[str, Any]:
        with self._lock:
            self._changed.wait_for(lambda: request.answer or self._end)
            if isinstance(request.answer, PhiloteError):
                raise request.answer
            if request.answer is None:
                self._raise_end()
            return request.answer or {}

    def _raise_refusal(self) -> None:
        with self._lock:
            if self._refusals:
                raise self._refusals.popleft()

    def _raise_end(self) -> None:
        with self._lock:
            if self._end:
                self._outcome_known = True
                # Not `raise self._end`: its traceback would grow with each call that raises it.
                raise self._end.with_traceback(self._end_traceback)

    # The reader's thread, and connecting in that of the caller at first

    def on_connect(self) -> None:
        """Called when the connection has come back. Does nothing; to be overridden.

        The thread that reads calls this, and reads on only when it returns. So it must not call
        what may wait for the server: publish(), subscribe(), unsubscribe(), receive() or close().
        """

    def on_disconnect(self, error: Exception, pause: float) -> None:
        """Called before each attempt to get the connection back: `error` says why it is not there.

        The attempt begins after `pause` seconds. Where there is none, as with reconnect=False, this
        is not called. For what it may do see on_connect().
        """

    def _joining(self) -> list[_Request]:
        # The subscriptions of _begin() that are not answered, from an id on.
        return [request for request in self._subscribing
                if not request.awaited and "-" in request.value.get("since", "")]

    def _connect(self) -> _Link:
        # For a client that follows news and chat.*:
        #
        #     first    GET /?since=now&channel=chat.%2A&channel=news
        #     later    GET /?since=7-0&channel=chat.%2A&channel=news    7-0 is its position
        #
        # The server answers both with "connected" first, see _begin(). With reconnect=False, no
        # wish for the past and no channels left for _begin(), there is no `since`: then there are
        # no ids, nor that message.
        since = self._behind or self._position
        past = {"since": since} if since else self._past
        parameters = [*past.items()]
        later = self._add_channels(parameters)
        if later and not past:  # _begin() asks for these, and it needs a connection with ids
            past = {"since": "now"}
            parameters += past.items()
        try:
            link = self._open(parameters)
        except Unauthorized as error:
            if error.status != 401 or not callable(self._token):
                raise
            link = self._open(parameters)  # once more, for which the function makes another token
        if not past:
            return link
        try:
            link.patience = _ANSWER_TIME
            self._begin(link, json.loads(next(link.texts)), past, later)
        except BaseException as error:
            link.abort()
            if isinstance(error, StopIteration):
                raise ConnectionClosed(link.code, link.reason) from None
            if isinstance(error, _NO_PHILOTE):
                raise PhiloteError("the server does not know of positions; reconnect=False does "
                                   "without them") from None
            raise
        return link

    def _add_channels(self, parameters: list[tuple[str, Any]]) -> list[list[str]]:
        # Adds channels to a query. Returns those that do not fit: _begin() joins them, by requests
        # that are no larger, since servers limit a message.
        later: list[list[str]] = []
        room, size = _LONGEST_QUERY - len(urllib.parse.urlencode(parameters)), _LONGEST_QUERY
        with self._lock:  # those that are asked for already, from where they were left
            joining = {name for request in self._joining() for name in request.names}
        names = {*(self._channels or ())} - joining
        if joining and not names:  # the query has to name one
            parameters.append(("channel", min(joining)))
        for name in sorted(names):
            if (needed := len(urllib.parse.urlencode({"channel": name})) + 1) <= room:
                parameters.append(("channel", name))
                room -= needed
                continue
            size += len(json.dumps(name)) + 2
            if size > _LONGEST_QUERY:  # `size` is that of the last request
                later.append([])
                size = len(json.dumps(name)) + 2
            later[-1].append(name)
        return later

    def _open(self, parameters: Sequence[tuple[str, Any]]) -> _Link:
        token = self._token() if callable(self._token) else self._token
        return _Link(self._url, token, parameters, self.max_message_size)

    def _begin(self, link: _Link, value: Any, past: dict[str, Any],
               later: list[list[str]]) -> None:
        # The beginning of a connection with ids, and step 2. The server answers what is asked here
        # after the replay, since it reads nothing before that is sent.
        begin = value["connected"]
        names = Names(begin["channels"])
        with self._lock:
            position = self._position  # "" at the first connection
            # The server is not silent for much longer than `ping` seconds; with 0 it may be.
            link.patience = 2 * float(begin["ping"]) or math.inf
            self._issuers.append(begin["issuer"])
            if not begin["resumed"] or self._behind == "":
                self._put(Gap(), 0)
                self._behind = None
            if past.get("last") and not ("since" in past and begin["resumed"]):
                self._behind = ""
            if not position or not begin["resumed"]:
                self._position = begin["id"]
            self._join_later(later, past, begin)
            to_come = {name for request in self._joining() for name in request.names}
            wanted = names if self._channels is None else self._channels - to_come
            link.channels = Names(names & wanted) if self._channels else names
            # The channels of unanswered messages that this connection does not bring, see step 2.
            written: list[Any] = [request.value.get("channel")
                                  for request in self._requests.values()]
            unseen = sorted({name for name in filter(_is_name, written)  # a program may write any
                             if name[-1] != "*" and not link.channels.cover(name)})
            # What is joined and was not to be, or is to be joined later. The query has to name some
            # channel: without one, the server joins all that the token may read.
            leave = [*(names - wanted)]
            # Both under one hold of the lock, for _ask() reads them together.
            self._caught_up = not (self._requests or leave or self._behind is not None)
            self._link = link
            self._unchecked = "" if self._caught_up else self._unchecked or position
            values: list[dict[str, Any]] = []
            # One by one: a subscription that the token does not allow joins none of its channels,
            # and there may be more channels than one connection may have joined.
            for name in unseen:
                values += ({"subscribe": [name], "since": self._unchecked},
                           {"unsubscribe": [name]})
            if leave:
                values.append({"unsubscribe": leave})
        if not self._caught_up:
            _send_aside(self._look_for_ours, link, values)  # this thread has to read

    def _join_later(self, parts: list[list[str]], past: dict[str, Any],
                    begin: dict[str, Any]) -> None:
        # The server would count a duration, and "now", from when it reads these requests. And where
        # messages are no longer kept, there shall be one gap, not one for each request.
        since = past.get("since", "")
        if "last" not in past and (since == "now" or not begin["resumed"]) or (
                since not in ("", "now") and "-" not in since):
            past = {"since": begin["id"]}
        elif not begin["resumed"]:
            past = {"last": past["last"]}
        # In front of all others: one may be to leave such a channel again.
        others, self._requests = self._requests, {}
        for part in parts:
            self._add_request(_Request({"subscribe": part, **past}, False))
        self._requests |= others

    def _look_for_ours(self, link: _Link, values: list[dict[str, Any]]) -> None:
        if self._unanswered():
            # In the pause the server shall read what it has received on the lost connection. It may
            # have been stopped, and read both connections at once now.
            with self._lock:
                self._changed.wait_for(lambda: self._closing or self._end, _FIRST_PAUSE)
            values = [{"unsubscribe": []}, *values]  # see step 1; may have to wait for Redis
        values = values or [{"subscribe": []}]  # which is answered at once
        refs = [_CHECK] * (len(values) - 1) + [_CAUGHT_UP]
        link.send_if_open(*(wsproto.events.TextMessage(json.dumps({**value, "ref": ref}))
                            for value, ref in zip(values, refs)))

    def _run(self) -> None:
        link: _Link | None = self._link
        try:
            while link:
                try:
                    for text in link.texts:
                        try:
                            self._take(link, json.loads(text), len(text))
                        except RecursionError:
                            self._skip(text)
                except (OSError, ProtocolError):
                    pass
                except (*_NO_PHILOTE, MemoryError) as error:
                    log.debug("closed after what no Philote server sends: %s", type(error).__name__)
                    link.code = 1006
                link.abort()
                link = self._come_back(ConnectionClosed(link.code, link.reason))
        except Exception as error:  # from the function that makes tokens, or an overridden method
            self._end_traceback, self._end = error.__traceback__, error
            self._link.abort()  # nobody reads from it any more
        finally:
            self._tell_end()

    def _tell_end(self) -> None:
        with self._lock:
            self._end = self._end or ConnectionClosed(1006)
            self._changed.notify_all()

    def _come_back(self, error: PhiloteError | OSError) -> _Link | None:
        # The pause is random, so that not all clients of a server that restarts come at once.
        pause = _FIRST_PAUSE
        while self._reconnect and not self._closing and not self._is_final(error):
            wait = random.uniform(0, pause)
            self.on_disconnect(error, wait)
            with self._lock:
                if self._changed.wait_for(lambda: self._closing, wait):
                    break
            try:
                link = self._connect()
            except (PhiloteError, OSError) as again:
                error, pause = again, min(2 * pause, _LAST_PAUSE)
                continue
            # If close() was called meanwhile, the link is ended at once, and returned all the same:
            # _run() finds it aborted and comes here again, and the client gets its end below.
            if self._closing:
                link.abort()
            else:
                self.on_connect()
            return link
        with self._lock:
            # The server answers our close frame with one of the same code once it has read all that
            # we sent before it.
            self._outcome_known |= (
                self._closing and getattr(error, "code", 0) == CloseReason.NORMAL_CLOSURE)
            self._end = (error if isinstance(error, PhiloteError) else
                         ConnectionClosed(1006, str(error)))
        return None

    def _is_final(self, error: PhiloteError | OSError) -> bool:
        # Whether another attempt would meet it again.
        if isinstance(error, ConnectionClosed):
            return error.code in _FINAL or (
                error.code in (EXPIRED, ENDED) and not callable(self._token))
        if isinstance(error, Unauthorized):
            return _is_refusal(error)
        return isinstance(error, PhiloteError)

    def _take(self, link: _Link, value: dict[str, Any], size: int) -> None:
        with self._lock:
            ref = value.get("ref")
            if "channel" in value:
                self._take_message(value, size)
            elif "error" in value:
                error = Forbidden(str(value.get("reason", value["error"])))
                # An error without a ref answers what the server could not read. As it answers in
                # order, that was the oldest unanswered request. (With Redis it may be a later one:
                # acknowledgements come late there. Not so with reconnect=False, where messages
                # that nobody waits for have no ref.)
                if ref is None and self._reconnect:
                    ref = next(iter(self._requests), None)
                request = self._answer(ref, error)
                # A _CHECK is refused where we may only write; step 4 sends without having looked.
                if ref != _CHECK and not (request and request.awaited):
                    self._refusals.append(error)
            elif "published" in value:
                if request := self._answer(value["published"]["ref"], value):
                    self._acknowledge(request.value["channel"], value["published"]["id"])
            elif "gap" in value:
                self._position, self._behind = value["gap"]["id"], None
                self._put(Gap(), 0)
            elif "id" in value:
                self._position = value["id"]
            elif (request := self._answer(ref, value)) and "subscribed" in value:
                # What was joined before has all up to there by now. And when the client comes
                # back, the channels joined here shall bring nothing of before.
                self._move_to(value["subscribed"]["id"])
                self._channels = Names(self._joined() | {*request.value["subscribe"]})
                if not value["subscribed"]["resumed"]:
                    self._put(Gap(), 0)
            elif request:
                self._channels = Names(self._joined() - {*request.value["unsubscribe"]})
            elif ref == _CAUGHT_UP:
                self._unchecked, self._behind = "", None
            self._changed.notify_all()
        if ref == _CAUGHT_UP:  # not by this thread, which has to read the answers
            _send_aside(self._send_again, link)

    def _joined(self) -> Names:
        # What is followed. With channels=None the server says what that is (all that may be read),
        # until the first subscribe() or unsubscribe() changes it.
        return self._link.channels if self._channels is None else self._channels

    def _take_message(self, value: dict[str, Any], size: int) -> None:
        # A message of ours comes back only on a later connection than the one that sent it, and
        # carries no ref. Those of one channel are in the log in the order in which they were sent.
        # So one with a higher id than all of ours that are known there answers the oldest
        # unanswered request with the same data.
        message = Message(*(value.get(name, "") for name in Message._fields))
        if message.id:
            self._move_to(message.id)
            if message.issuer in self._issuers:  # of ours: that it is here is an acknowledgement
                if decode_id(message.id) > self._acknowledged.get(
                        message.channel, self._all_acknowledged):
                    self._acknowledge(message.channel, message.id)
                    # What was sent on this connection is left out: the server answers it by its
                    # ref. The data is compared because a message that was sent on two connections
                    # may be in the log twice: its copy must not answer the message sent after it.
                    data = json.dumps(message.data)
                    self._answer(next((
                        ref for ref, request in self._requests.items()
                        if request.value.get("channel") == message.channel
                        and request.data == data and request.link not in (None, self._link)), ""),
                        {"published": {"id": message.id}})
                return
            asked = [request for request in self._subscribing
                     if request.names.cover(message.channel)]
            if any(message.id in request.brought for request in asked):
                return
            # Step 2 joins channels that nobody follows, to find messages of ours there. Those of
            # others are dropped: a subscription that this connection has not sent yet brings them
            # again, with those before them. The same goes for channels that are joined later.
            if not (any(request.link is self._link for request in asked)
                    or self._joined().cover(message.channel) and (
                        self._link.channels.cover(message.channel)
                        or not any(request in asked for request in self._joining()))):
                return
            for request in asked:
                request.brought.add(message.id)
        self._put(message, size)

    def _skip(self, text: str) -> None:
        # A message that is nested deeper than this Python can read; the server's could. Raises
        # the RecursionError again where it has no id, and is perhaps no message.
        if not (begin := re.match('{"id":"([0-9]+-[0-9]+)"', text)):
            raise
        with self._lock:
            self._move_to(begin[1])
            self._put(Gap(), 0)
            self._changed.notify_all()

    def _move_to(self, id: str) -> None:
        self._position = max(self._position, id, key=decode_id)  # as text, "9-0" is above "10-0"
        if self._behind is not None:
            self._behind = max(self._behind, id, key=decode_id)

    def _acknowledge(self, channel: str, id: str) -> None:
        known = self._acknowledged
        known[channel] = max(known.get(channel, self._all_acknowledged), decode_id(id))
        if not len(known) % _MOST_CHANNELS and not self._unchecked:
            # The server tells us of a message of ours before it sends us a higher id. So all up to
            # the position are answered (unless step 2 still looks for some of them, see
            # _unchecked), and channels with no higher one need no entry. Only at each thousandth
            # entry, since this walks through all of them.
            self._all_acknowledged = position = decode_id(self._position)
            self._acknowledged = {name: highest for name, highest in known.items()
                                  if highest > position}

    def _put(self, item: Message | Gap, size: int) -> None:
        # Where nobody receives, all that waits is dropped for a Gap, so that memory has a bound.
        if self._received_size + size > _MOST_RECEIVED:
            self._received.clear()
            self._received_size = 0
            self._received.append((Gap(), 0))
        size += 200  # bytes that the objects around the text take, about
        self._received.append((item, size))
        self._received_size += size

    def _send_again(self, link: _Link) -> None:
        # Step 4. While it sends, callers may ask for more, so it looks again until there is nothing
        # left. In the same hold of the lock it says so, and from then on callers send themselves.
        while True:
            with self._lock:
                if link is not self._link:
                    return
                unsent = [(ref, request) for ref, request in self._requests.items()
                          if request.link is not link]
                for _, request in unsent:
                    # What it asked for by `last` or a duration has come in part. Asked again, that
                    # means later messages: some between may be missing.
                    since = str(request.value.get("since", "now"))
                    if request.link and request.brought and "-" not in since and (
                            since != "now" or "last" in request.value):
                        self._put(Gap(), 0)
                    request.link = link
                self._caught_up = not unsent
            if not unsent:
                return
            for ref, request in unsent:
                if not link.send_text(request.encode(ref)):
                    return


def _plain(name: str) -> str:
    # Of a subclass of str, which may have another hash, as the members of an Enum do. What is no
    # string the server refuses.
    return str.__str__(name) if isinstance(name, str) else name


def _names_of(channels: Iterable[str]) -> Names:
    names = Names(map(_plain, channels))
    # The letters of a string would be channels.
    if isinstance(channels, str) or not all(isinstance(name, str) for name in names):
        raise TypeError("channels is a list of strings")
    return names


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _send_aside(call: Callable[..., None], *arguments: Any) -> threading.Thread:
    # In a thread of its own, which may have to wait until the server reads. Neither the reading
    # thread may wait for that (see the top of this section), nor close(), which has a time limit.
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    _start(thread)  # callers take its OSError for a lost connection
    return thread


_WS_UNIX = "ws+unix"  # the scheme of a URL that names a Unix socket


def split_url(url: str) -> urllib.parse.SplitResult:
    """Split the URL of a server. Raises PhiloteError that names it."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == _WS_UNIX:
            right = bool(parts.path) and not parts.netloc
        else:
            right = parts.scheme in ("ws", "wss") and bool(parts.hostname) and parts.port != 0
        # No spaces or control characters: it is sent in the header Host.
        if not right or not re.fullmatch("[^\0- \x7f]*", parts.netloc):
            raise ValueError
    except ValueError:
        raise PhiloteError("the URL must begin with ws:// or wss:// and name a host, perhaps with "
                           f"a port from 1 to 65535, or be {_WS_UNIX}:/PATH, not {url!r}") from None
    if not re.fullmatch("[!-~]*", parts.path + parts.query):
        raise PhiloteError(f"the path of the URL must be percent-encoded, not {url!r}")
    return parts


def _target(url: urllib.parse.SplitResult, parameters: Any, name: str = "") -> str:
    # What to request: the path of the URL, or what `name` means there, as a browser would find it:
    # a proxy may have the server below a path, ws://host/chat/ (without the last slash, its last
    # part is replaced, as in the links of a page). The path of a ws+unix: URL is the file of the
    # socket, so there it is "/". The query of the URL is kept, and may hold a token.
    path = "/" if url.scheme == _WS_UNIX else url.path or "/"
    query = "&".join(filter(None, [url.query, urllib.parse.urlencode(parameters, doseq=True)]))
    return urllib.parse.urljoin(path, name) + ("?" + query if query else "")


def _explain_tls(error: ssl.SSLError) -> Exception:
    if error.reason == "WRONG_VERSION_NUMBER":
        return PhiloteError("the server does not speak TLS at this port; ws:// may do")
    return error


def _bearer(token: str) -> str:
    if not re.fullmatch("[!-~]*", token):
        raise PhiloteError("the token holds characters that no token has")
    return "Bearer " + token


class _Link:
    """One connection to a server, which has let us in. Read by one thread; any may send."""

    channels = Names()  # that the server joined at the beginning
    # Seconds that the server may be silent: 10 for its first message, then twice its `ping`. There
    # is no limit without ids, or where `ping` is 0: a dead network is noticed by who sends, then.
    patience = math.inf

    def __init__(self, url: urllib.parse.SplitResult, token: str,
                 parameters: Sequence[tuple[str, Any]], max_message_size: int) -> None:
        self.max_message_size = max_message_size
        self.code, self.reason = 1006, ""  # how it ended
        self.protocol = wsproto.WSConnection(ConnectionType.CLIENT)
        # Keeps each frame whole on the wire; guards the half of `protocol` that makes frames. The
        # other half, which takes them apart, is the reader's alone.
        self.sending = threading.Lock()
        self.pong = wsproto.events.Pong()  # the answer to the last ping; set by the reader
        # Locked while a thread is on its way to send `pong`. It will send what `pong` is by then,
        # so further pings need no thread. In a flood of them there are two at most: one that waits
        # until the server reads, and one behind it.
        self.ponging = threading.Lock()
        context = ssl.create_default_context() if url.scheme == "wss" else None
        sock = _dial(url)
        self.sock = _ClientSocket(
            TLSTransport(sock, context, url.hostname) if context else Transport(sock))
        # Messages, to the end of the connection. A generator: it reads while somebody asks for the
        # next. Raises OSError, ProtocolError.
        self.texts = self._read_texts()
        try:
            self.sock.shake_hands()
            self._shake_hands(url, token, parameters)
        except BaseException:
            self.sock.abort()
            raise

    def _shake_hands(self, url: urllib.parse.SplitResult, token: str,
                     parameters: Sequence[tuple[str, Any]]) -> None:
        headers = [(b"Authorization", _bearer(token).encode())] if token else []
        self.sock.send(self.protocol.send(wsproto.events.Request(
            host=url.netloc.rpartition("@")[2] or "localhost", extra_headers=headers,
            target=_target(url, parameters))))
        try:
            while not (event := next(self.protocol.events(), None)):
                self.protocol.receive_data(self.sock.recv())  # refuses a head above 16 KiB
        except (ProtocolError, ValueError) as error:
            # There may be an event all the same: the good head of a refusal with a broken body.
            if not (event := next(self.protocol.events(), None)):
                raise PhiloteError(f"this is no WebSocket server: {error}") from None
        if isinstance(event, wsproto.events.RejectConnection):
            raise Unauthorized(event.status_code, self._read_reason(event))

    def _read_reason(self, refusal: wsproto.events.RejectConnection) -> str:
        # Why it refused, if it says so in JSON as Philote does. A body whose length was not given
        # may have no end, so it is not read.
        body, is_announced = b"", b"content-length" in dict(refusal.headers)
        with contextlib.suppress(OSError, ProtocolError, *_NO_PHILOTE):
            while is_announced and len(body) < 10_000:
                for event in self.protocol.events():
                    if isinstance(event, wsproto.events.RejectData):
                        body += event.data
                        if event.body_finished:
                            return str(json.loads(body)["reason"])
                self.protocol.receive_data(self.sock.recv())
        return "the server refused the connection"

    def _read_texts(self) -> Iterator[str]:
        text = io.StringIO()  # empty frames without end take no memory there
        while True:
            for event in self.protocol.events():
                if isinstance(event, wsproto.events.TextMessage):
                    text.write(event.data)
                    if text.tell() > self.max_message_size:
                        self.code = CloseReason.MESSAGE_TOO_BIG
                        return
                    if event.message_finished:
                        yield text.getvalue()
                        text = io.StringIO()
                elif isinstance(event, wsproto.events.Ping):
                    # Where several wait, the last is answered (RFC 6455, section 5.5.3).
                    self.pong = event.response()
                    if self.ponging.acquire(blocking=False):
                        _send_aside(self._send_pong)
                elif isinstance(event, wsproto.events.CloseConnection):
                    self.code, self.reason = int(event.code), event.reason or ""
                    # Waits until our answer is written, since abort() comes next.
                    _send_aside(self.send_if_open, event.response()).join(CLOSING_TIME)
                    return
            self.sock.deadline = time.monotonic() + self.patience
            self.protocol.receive_data(self.sock.recv())

    def send_text(self, text: str) -> bool:
        """Send a message; returns whether the connection still took it."""
        with self.sending:
            try:
                self.sock.send(self.protocol.send(wsproto.events.TextMessage(text)))
                return True
            except BaseException as error:
                # Half of the message may be written, so nothing may follow it. A ProtocolError is
                # raised where the connection is closing. An OSError with an errno is the system's;
                # one without it most likely comes from the handler of a signal, and is passed on.
                if (isinstance(error, (ConnectionError, ProtocolError))
                        or isinstance(error, OSError) and error.errno):
                    self.sock.end_output()  # what the server has sent can still be read
                    return False
                self.abort()
                raise

    def send_if_open(self, *events: wsproto.events.Event) -> None:
        """Send these, as far as the connection still takes them; a failure is not told."""
        with contextlib.suppress(OSError, ProtocolError):
            for event in events:
                with self.sending:
                    self.sock.send(self.protocol.send(event))

    def _send_pong(self) -> None:
        with self.sending, contextlib.suppress(OSError, ProtocolError):
            self.ponging.release()  # before `pong` is read: for a later one a thread is started
            self.sock.send(self.protocol.send(self.pong))

    def abort(self) -> None:
        """End the connection, and the wait of whoever waits for it."""
        self.sock.abort()


def _dial(url: urllib.parse.SplitResult) -> socket.socket:
    if url.scheme != _WS_UNIX:
        port = url.port or (443 if url.scheme == "wss" else 80)
        try:
            return socket.create_connection((url.hostname, port), _ANSWER_TIME)
        except UnicodeError:
            raise PhiloteError(f"{url.hostname!r} cannot be the name of a host") from None
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(_ANSWER_TIME)
        sock.connect(urllib.parse.unquote(url.path))
    except BaseException:
        sock.close()
        raise
    return sock


class _ClientSocket:
    """A connection that one thread may read while another writes; each wait for it has an end.

    Why not a blocking socket: only one thread at a time may use a TLS object; a socket's timeout
    counts anew with each call, so an answer that comes byte by byte never exceeds it; and it is the
    same for reading and for writing. So no call here blocks. Each is made under one lock, and
    threads wait outside of it, in poll(). abort() ends both directions of the socket, which makes
    it ready for everything: both threads wake, find `aborted`, and raise.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.transport.sock.setblocking(False)  # the timeout of connect() would go on for each call
        # The time (monotonic) until which recv() waits: at first for the whole handshake, then as
        # _Link._read_texts() sets it.
        self.deadline = time.monotonic() + _ANSWER_TIME
        self.calling = threading.Lock()  # guards the transport and the next three
        self.sent = 0  # bytes
        self.waiting = 0  # threads
        self.aborted = False

    def shake_hands(self) -> None:
        """Let TLS begin, where the server shall speak it."""
        if isinstance(self.transport, TLSTransport):
            try:
                self._call(self.transport.shake_hands, _FULL_READ, select.POLLIN, self.deadline)
            except ssl.SSLError as error:
                raise _explain_tls(error) from None

    def recv(self) -> bytes:
        """Read what there is. Raises OSError, at the end too."""
        data: bytes = self._call(self.transport.receive, _FULL_READ, select.POLLIN, self.deadline)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        return data

    def taken(self) -> int:
        """How many of our bytes the server has taken so far."""
        with self.calling:
            left = 0 if self.aborted else self.transport.unacknowledged()
            return self.sent - left

    def abort(self) -> None:
        """End the connection, and the wait of whoever waits for it.

        While threads wait in poll(), the last of them closes the socket: if it were closed here,
        the system could give its descriptor to another file, and they would wait for that.
        """
        with self.calling:
            self.transport.end()
            self.aborted = True
            if not self.waiting:
                self.transport.close()

    def end_output(self) -> None:
        """Send our end of the connection."""
        with self.calling:
            if not self.aborted:
                self.transport.end_output()

    def send(self, data: bytes) -> None:
        """Write all of it, as soon as the server takes it. Raises OSError."""
        view = memoryview(data)
        while view:
            sent = self._call(self.transport.send_all, (view,), select.POLLOUT, math.inf)
            with self.calling:
                self.sent += sent
            view = view[sent:]

    def _call(self, call: Callable[[Any], Any], argument: Any, event: int, deadline: float) -> Any:
        # Repeats a call until it has done something. Where the socket is not ready, the transport's
        # methods return None, 0 or False; b"" is the end of what can be read, and a result.
        while True:
            with self.calling:
                if self.aborted:  # and perhaps closed: its descriptor may be another's
                    raise ConnectionAbortedError("the connection was closed")
                if (done := call(argument)) or done == b"":
                    return done
                self.waiting += 1
            try:
                poll = select.poll()
                poll.register(self.transport.sock, event)
                left = deadline - time.monotonic()
                if not poll.poll(None if left == math.inf else max(0, 1000 * left)):
                    raise TimeoutError("the server does not answer")
            finally:
                with self.calling:
                    self.waiting -= 1
                    if self.aborted and not self.waiting:
                        self.transport.close()


# ------------------------------------------------------------------------------------- command line
# philote [serve], philote check, philote health, philote token, philote subscribe, philote history,
# philote publish.
#
# Each command is a function from its arguments to its exit status: 0 where all went well, or SIGINT
# ended it; 1 where it failed; 2 where its arguments or settings are not allowed. Standard output is
# for what other programs read: a token, messages, a line each. All else is told on standard error,
# errors in words and not as a traceback.
#
# 1 is also the answer no: of `health` where a server does not serve, of `token --check` for a token
# that is refused. `check` ends with 2 for all that is wrong, even if only Redis is away, and with 0
# where it only warns. Output to a pipe whose reader has gone ends a command with 0.
#
# The commands that need a token take --token, or PHILOTE_TOKEN, or make one with SECRET, for just
# the channels named. That one never expires, for only the server gets to see it. Where neither
# SECRET nor PUBLIC_KEYS is set, the empty secret signs it: a server on this machine that has
# neither lets it in.

_EXAMPLES = {
    "": "example, in three terminals:\n  philote serve\n  philote subscribe news\n"
        "  philote publish news hello",
    "serve": "example:\n  SECRET=$(openssl rand -hex 32) PORT=8080 philote serve\n\n"
             "settings, from the environment:\n" + "\n".join(
                 f"  {field.name.upper():18}{field.metadata['allowed']}\n{'':20}"
                 f"{field.metadata['meaning']}" for field in dataclasses.fields(Settings)),
    "check": "example:\n  PORT=8080 PUBLIC_KEYS=/etc/philote/keys.pem philote check",
    "health": "example:\n  philote health --url wss://example.com",
    "token": "example:\n"
             "  SECRET=... philote token --read 'news,chat.*' --write chat.de --expires 1h",
    "subscribe": "example:\n  philote subscribe news 'chat.*' --since 10m --json",
    "history": "example:\n  philote history news --since 1h --json",
    "publish": "example:\n  tail -f /var/log/syslog | philote publish logs",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End the program with an error on one line, without the usage of the command."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _CommandParser(_Parser):
    mixes = True

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Let options stand between the words: publish CHANNEL --url URL DATA."""
        if not self.mixes or "--" in args:
            return super().parse_known_args(args, namespace)
        self.mixes = False  # it calls this method again; a parser is used once
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            self.error("unrecognized arguments: " + " ".join(unknown))
        return parsed, unknown


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    # argparse tells what an ArgumentTypeError says; of a ValueError, only that there was one.
    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, PhiloteError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return parse_argument


def _parse_count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,17}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _parse_last(text: str) -> int:
    return parse_past(None, text).last


def _parse_url(text: str) -> str:
    split_url(text)  # raises PhiloteError
    return text


def _parse_text(text: str) -> str:
    # What the locale could not decode can stand in no URL, and in no token that a server lets in.
    if not _is_encodable(text):
        raise argparse.ArgumentTypeError(f"{text!a} is no text in the encoding of the locale")
    return text


def _parse_channel(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a channel must have a name")
    return _parse_text(text)


def _parse_names(text: str) -> list[str]:
    return [name for name in _parse_text(text).split(",") if name]


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="philote", description="WebSocket publish/subscribe server, and the tools for it.",
        epilog=_EXAMPLES[""], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"philote {__version__}")
    parser.set_defaults(command=_serve)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", parser_class=_CommandParser)

    def add(name: str, command: Callable[[argparse.Namespace], int],
            about: str) -> argparse.ArgumentParser:
        """Add a command; `about` begins with a small letter and has no full stop."""
        added = commands.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + ".",
            epilog=_EXAMPLES[name], formatter_class=argparse.RawDescriptionHelpFormatter)
        added.set_defaults(command=command)
        return added

    add("serve", _serve, "serve; what philote does without a command")
    add("check", _check, "say what serve would do with these settings, and whether it could")
    _add_url(add("health", _health, "ask a server whether it serves"),
             f"ws://localhost:{os.environ.get('PORT') or 6380}",
             "ws://localhost with PORT, or 6380")
    _add_token_options(add("token", _token, "print a token signed with SECRET, or check one"))
    subscribe = add("subscribe", _subscribe, "print the messages of channels, a line each")
    subscribe.add_argument("--count", type=_parse_count, metavar="N", help="end after N messages")
    history = add("history", _history, "print the messages of channels that the server has kept")
    for command in subscribe, history:
        _add_reading_options(command)
    publish = add(
        "publish", _publish, "publish a message, or a message for each line of standard input")
    publish.add_argument("channel", type=_parse_channel, metavar="CHANNEL")
    publish.add_argument("data", nargs="?", metavar="DATA")
    for command in subscribe, history, publish:
        _add_url(command, "ws://localhost:6380", "ws://localhost:6380")
        command.add_argument(
            "--token", default=os.environ.get("PHILOTE_TOKEN"),
            help="token (default: PHILOTE_TOKEN, or one made on the spot with SECRET)")
    return parser


def _add_url(command: argparse.ArgumentParser, default: str, default_shown: str) -> None:
    # argparse hands a default that is text to `type`, too: so a bad PHILOTE_URL is refused as well.
    command.add_argument("--url", type=_argument(_parse_url),
                         default=os.environ.get("PHILOTE_URL") or default,
                         help=f"server (default: PHILOTE_URL, or {default_shown})")


def _add_token_options(command: argparse.ArgumentParser) -> None:
    option = command.add_argument
    for right in "read", "write":
        option(f"--{right}", type=_parse_names, default=[], action="extend", metavar="A,B",
               help=f"channels that it may {right}; chat.* is all that begin with chat.")
    option("--expires", type=_argument(parse_duration), metavar="1h",
           help="how long it is valid (default: for ever)")
    option("--api", action="store_true",
           help="also open /api/info and /metrics, and let its bearer end connections")
    option("--user", type=_parse_text, default="", metavar="NAME",
           help="who bears it, as other clients are told")
    option("--check", metavar="TOKEN",
           help="say what a token allows instead; - reads it from standard input")


def _add_reading_options(command: argparse.ArgumentParser) -> None:
    option = command.add_argument
    option("channels", type=_parse_channel, nargs="+", metavar="CHANNEL")
    option("--json", action="store_true", help="print whole messages as JSON")
    option("--since", type=_parse_text, metavar="10m", help="begin with what is kept of that "
           "time, or behind the message with this id")
    option("--last", type=_argument(_parse_last), metavar="N", help="begin with the last N "
           "messages of each channel, or where the id of --since is no longer kept")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its status."""
    parsed = _make_parser().parse_args(arguments)
    for stream, errors in (sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace"):
        # The program shall not end at input that is no text in the locale's encoding, nor at output
        # that this encoding has no bytes for.
        if isinstance(stream, io.TextIOWrapper):  # there may be none
            stream.reconfigure(errors=errors)
    try:
        status = parsed.command(parsed)
    except KeyboardInterrupt:
        status = 0
    except SettingsError as error:
        _print_error(str(error))
        status = 2
    except (PhiloteError, OSError, ImportError) as error:
        _tell(_explain(error, parsed))
        status = 1
    sys.exit(status)


def _explain(error: Exception, arguments: argparse.Namespace) -> str:
    if (isinstance(error, Unauthorized) and "not signed" in str(error) and not arguments.token
            and not _token_settings().secret):
        return ("SECRET is not set here, so the token was signed with an empty one, which is not "
                "the server's; set it, or give --token (HTTP 401)")
    if isinstance(error, OSError) and "url" in arguments:
        return f"{_without_token(arguments.url)}: {error}"
    return str(error)


def _input() -> Any:
    if sys.stdin is None:
        raise PhiloteError("there is no standard input")
    return sys.stdin


def _print(text: str) -> None:
    # Ends the program where its output cannot be written: without a word where the reader of a pipe
    # has gone, as `head` goes when it has seen enough.
    try:
        print(text, flush=True)
    except OSError as error:
        _discard(sys.stdout)
        sys.exit(0 if isinstance(error, BrokenPipeError)
                 else f"philote: cannot write: {error.strerror}")


def _print_error(text: str) -> None:
    # It is no reason to end that this cannot be written. Where the program was started without
    # standard error, sys.stderr is None, and print(file=None) would write to standard output.
    try:
        if sys.stderr:
            print(text, file=sys.stderr)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: Any) -> None:
    # What could not be written is still buffered. Python tries to write it once more when it ends,
    # and would report that this fails; now it goes to /dev/null.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell(text: str) -> None:
    _print_error(f"philote: {_on_one_line(text)}")


def _without_token(url: str) -> str:
    return re.sub("//[^/?]*@", "//", url.partition("?")[0])


def _on_one_line(text: str) -> str:
    # Line ends are escaped, and so is what a terminal would take for a command, or for the order to
    # show text from right to left.
    return re.sub("[\0-\x08\n-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]",
                  lambda match: match[0].encode("unicode_escape").decode(), text)


# philote serve
#
#     settings      one that is not allowed: status 2
#     signals       blocked: from here on they wait to be taken
#     Server()      with REDIS_URL, waits for Redis (a signal to stop: status 0); then listens, or
#                   status 1
#     with server:  newcomers are accepted; READY=1 to systemd
#     sigwait()     SIGHUP: certificate and keys are read again; SIGINT and SIGTERM go on below
#     STOPPING=1    from here on a second signal ends the process at once, with status 1; but not
#                   one that comes right behind the first, as timeout(1) sends two
#     the end       Server.stop() by the end of the block; then up to a second for the log's lines

_SAME_SIGNAL = 0.3  # seconds behind a signal in which another is taken for the same


def _serve(_: argparse.Namespace) -> int:
    settings = Settings.from_environ(os.environ)
    # Before there are threads. Not with TLS: most of that is OpenSSL's work, without the lock.
    can_pin = not settings.tls_cert and Affinity.is_possible()
    # Taken one by one with sigwait(), signals interrupt no thread in the middle of anything. They
    # are blocked before any thread is started, as a thread inherits that: one that did not block
    # them would get them, and what they do by default is to end the process.
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    handler = _configure_log(settings)
    # 2 MiB, in bytes: the json module recurses in C at each level of nesting, on CPython 3.13 for
    # up to 10,000 levels, with 1.3 to 1.6 MiB. The system provides only those pages of a stack that
    # are used.
    threading.stack_size(2 << 20)
    # A connection that ends leaves no cycle of references behind, few other things do, and those
    # are found while they are young. To look through all that 10,000 connections hold stops all
    # threads for up to a second; through 2,000 new objects, for 1 ms.
    gc.set_threshold(2_000, 1000, 1000)
    _raise_descriptor_limit(settings)
    listener = _take_listener()
    if not listener:
        _check_host(settings)
    try:
        # While it waits for Redis, nobody calls sigwait(): a signal to stop is pending then.
        server = Server(settings, listener, is_over=lambda: bool(signal.sigpending() & (
            signals - {signal.SIGHUP})))
    except _Stopped:
        handler.finish(1)
        return 0
    except OSError as error:
        _tell(_cannot_listen(settings, error))
        return 1
    if server.interpreter_lock:
        server.switch_interval = SwitchInterval()
        if can_pin:
            server.affinity = Affinity()
    # Where one of its threads cannot go on, the server stops as by a signal, and returns 1. During
    # the shutdown this is a second signal, which as a rule ends the process at once.
    server.on_failure = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    with server:
        _greet(server)
        _notify("READY=1")
        while (caught := signal.sigwait(signals)) == signal.SIGHUP:
            _reload(server)
        _notify("STOPPING=1")
        # The last resort, if the shutdown hangs or there is no memory left even for it: nobody
        # handles SIGALRM, so the system ends the process without any help from Python.
        signal.alarm(math.ceil(settings.shutdown_timeout) + 3)
        _handle_signals(functools.partial(_end_at_once, server, time.monotonic()))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals - {signal.SIGHUP})
        log.info("%s: shutting down", signal.Signals(caught).name)
    # CPython gives signals that it handles back to the system when it ends: one would cost the 0.
    _handle_signals(signal.SIG_IGN)
    log.info("stopped")
    handler.finish(1)
    return 1 if server.failure else 0


def _handle_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # drops one that has come behind the first by now
        signal.signal(number, handler)


def _end_at_once(server: Server, first_signal: float, *_: object) -> None:
    if server.failure or time.monotonic() > first_signal + _SAME_SIGNAL:
        os._exit(1)


def _reload(server: Server) -> None:
    # MONOTONIC_USEC is what Type=notify-reload wants: by it systemd tells this reload from others.
    _notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        log.info("SIGHUP: %s again; the settings are read at the start", server.reload())
    except SettingsError as error:
        log.error("SIGHUP: %s; of that, what was read before goes on", error)
    _notify("READY=1")


def _take_listener() -> socket.socket | None:
    """Take the socket that systemd listens on for us, where it does (sd_listen_fds(3)).

    systemd gives LISTEN_FDS descriptors, from 3 on. LISTEN_PID says to whom: a process that has
    only inherited the variables must not take them. HOST and PORT are not used then.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if (count := os.environ.get("LISTEN_FDS", "")) != "1":
        raise SettingsError(_not_allowed("LISTEN_FDS", count, "1, for one socket to serve"))
    with contextlib.suppress(OSError):
        sock = socket.socket(fileno=3)
        sock.set_inheritable(False)
        if (sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
                and sock.type == socket.SOCK_STREAM
                and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
            return sock
    raise SettingsError("LISTEN_FDS: descriptor 3 is no stream socket that listens (Accept=no)")


def _notify(*lines: str) -> None:
    """Tell systemd how we are, where it wants to know (sd_notify(3)).

    By a datagram of NAME=value lines to the Unix socket NOTIFY_SOCKET, where a leading "@" stands
    for the zero byte of an abstract name. Nothing of ours depends on it: a failure is not told.
    """
    if path := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            sock.sendto("\n".join(lines).encode(), re.sub("^@", "\0", path))


def _configure_log(settings: Settings) -> BackgroundHandler:
    logging.Formatter.converter = time.gmtime
    # The name of a connection's thread is not wanted: it is started by _thread, and to ask for its
    # name makes threading create an object for it, which Python 3.10 and 3.11 keep for ever.
    logging.logThreads = False
    handler = BackgroundHandler(sys.stderr.fileno() if sys.stderr else -1)
    handler.setFormatter(logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    logging.basicConfig(level=_LEVELS[settings.loglevel], handlers=[handler])
    return handler


def _greet(server: Server) -> None:
    settings, where = server.settings, server.where + (" with TLS" if server.tls else "")
    log.info("philote %s on Python %s listens on %s: "
             "MAX_CONNECTIONS=%d CHECK_ORIGIN=%s SECRET %s PUBLIC_KEYS %s LOGLEVEL=%s",
             __version__, platform.python_version(), where, settings.max_connections,
             _as_text(settings.check_origin),
             "set" if settings.secret else "empty", "set" if settings.public_keys else "empty",
             settings.loglevel)
    for warning in _find_warnings(settings):
        log.warning(warning)


def _find_warnings(settings: Settings) -> Iterator[str]:
    if settings.protected:
        yield ("SECRET is empty: anybody can make a token, so only clients on this machine are "
               "let in")
    for name, secret in ("SECRET", settings.secret), ("OLD_SECRET", settings.old_secret):
        if 0 < len(secret) < 32:
            yield f"{name} has {len(secret)} characters; one of 32 or more cannot be guessed"


def _raise_descriptor_limit(settings: Settings) -> None:
    # Each connection takes a descriptor. Most systems allow a process 1,024 (the soft limit), and
    # more if it asks (up to the hard limit). 64 are for all else: listener, files, Redis, keys.
    needed = settings.max_connections + settings.max_pending + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (ValueError, OSError):  # macOS says "unlimited", and refuses more than its kernel has
        allowed = soft
    if allowed < needed:
        log.warning("MAX_CONNECTIONS=%d needs %d descriptors, and the system allows %d (ulimit -n)",
                    settings.max_connections, needed, allowed)


# philote check, philote health

def _check(_: argparse.Namespace) -> int:
    # What is wrong is said below. Without any handler, logging would print the log's warnings, too.
    log.addHandler(logging.NullHandler())
    settings = Settings.from_environ(os.environ)
    _check_listening(settings)
    try:
        keys = Keyring(settings)
    except ImportError as error:
        raise SettingsError(str(error)) from None
    if keys.provider and (under_way := keys.provider.fetch(time.monotonic())):
        under_way.wait(2 * _FETCH_TIME)  # a read that begins in time may itself take _FETCH_TIME
        if not keys.provider.keys:
            raise SettingsError(f"PUBLIC_KEYS: no keys from {keys.provider.name}: "
                                f"{keys.provider.problem or 'it does not answer in time'}")
    if settings.redis_url:
        where = _check_redis(settings)
    tls = _load_certificate(settings)
    _print(f"listens on {_where(settings)}{', with TLS' if tls else ''}")
    signers = [name for name in ("SECRET", "OLD_SECRET", "PUBLIC_KEYS")
               if getattr(settings, name.lower())]
    _print("lets in " + (f"tokens signed with {' or '.join(signers)}" if signers else
                         "clients on this machine, with any token"))
    if settings.redis_url:
        _print(f"shares the log in Redis at {where}, stream {settings.redis_key}")
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.repr and value != field.default and field.name not in ("host", "port"):
            _print(_on_one_line(f"{field.name.upper()}={_as_text(value)}"))
    for warning in _find_warnings(settings):
        _tell(warning)
    return 0


def _check_redis(settings: Settings) -> str:
    try:
        store = RedisLog(settings)
        store.check()
        return store.address
    except PhiloteError as error:
        raise SettingsError(re.sub("^(?!REDIS_URL)", "REDIS_URL: ", str(error))) from None


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _where(settings: Settings) -> str:
    port = "" if settings.host.startswith(_UNIX) else f", port {settings.port or 'any'}"
    return (settings.host or "all interfaces") + port


def _cannot_listen(settings: Settings, error: OSError) -> str:
    return f"cannot listen on {_where(settings)}: {_tell_error(error)}"


def _check_host(settings: Settings) -> tuple[socket.AddressFamily, Any]:
    try:
        return _resolve(settings.host, settings.port)
    except socket.gaierror:
        raise SettingsError(_not_allowed("HOST", settings.host, _HOST.allowed)) from None


def _check_listening(settings: Settings) -> None:
    # What is there may be a server with these settings: it is left alone, and is no error.
    family, address = _check_host(settings)
    try:
        if family == socket.AF_UNIX:
            _refuse_other_file(address)
            if not os.access(os.path.dirname(address) or ".", os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no file can be made there")
            return
        with socket.socket(family) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise SettingsError(f"HOST, PORT: {_cannot_listen(settings, error)}") from None


def _health(arguments: argparse.Namespace) -> int:
    # A signal ends the wait for the answer as a whole. The timeout of the connection counts anew
    # with each read, so an answer that comes byte by byte would not exceed it.
    def give_up(*_: object) -> NoReturn:
        raise TimeoutError("the server does not answer in time")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(_ANSWER_TIME)
    where = _without_token(arguments.url)
    with _expect_philote(f"{where} is no Philote server, or one that speaks TLS (wss://)"):
        code, answer = _get(arguments, "health", 4096)
        status, reason = answer["status"], answer.get("reason", "")
    if code != 200:
        raise PhiloteError(f"{where}: {status} (HTTP {code})" + (f": {reason}" if reason else ""))
    _print(f"{where}: {_on_one_line(str(status))}")
    return 0


@contextlib.contextmanager
def _expect_philote(otherwise: str) -> Iterator[None]:
    # Within it an answer is taken apart. Raises PhiloteError where no Philote server has sent it.
    try:
        yield
    except OSError:  # first: a certificate that is refused is a ValueError, too
        raise
    except (http.client.HTTPException, *_NO_PHILOTE):
        raise PhiloteError(otherwise) from None


def _get(arguments: argparse.Namespace, name: str, most: int | None = None, token: str = "",
         parameters: Mapping[str, Any] = {}) -> tuple[int, Any]:
    """Ask a server over HTTP: the status, and what its JSON says, of up to `most` bytes."""
    url = split_url(arguments.url)
    kind = http.client.HTTPSConnection if url.scheme == "wss" else http.client.HTTPConnection
    # Without a port, it would look for one in an address of IPv6 and take its last part.
    connection = kind(url.hostname or "localhost", url.port or kind.default_port,
                      timeout=_ANSWER_TIME)
    with contextlib.closing(connection):
        if url.scheme == _WS_UNIX:
            connection.sock = _dial(url)
        try:
            connection.request("GET", _target(url, parameters, name),
                               headers={"Authorization": _bearer(token)} if token else {})
        except ssl.SSLError as error:
            raise _explain_tls(error) from None
        response = connection.getresponse()
        return response.status, json.loads(response.read(most))


# philote token

# Only these are read: what is wrong with a setting of the server alone is no reason for another
# command to fail.
_TOKEN_SETTINGS = "SECRET", "OLD_SECRET", "PUBLIC_KEYS", "CLAIM", "AUDIENCE", "ISSUER"


def _token_settings() -> Settings:
    return Settings.from_environ(
        {name: os.environ[name] for name in _TOKEN_SETTINGS if name in os.environ})


def _new_token(*arguments: Any) -> str:
    # One that a server with the same settings lets in.
    settings = _token_settings()
    if not settings.secret and settings.public_keys:
        raise PhiloteError("without SECRET, tokens come from who holds the private key of "
                           "PUBLIC_KEYS")
    return new_token(settings.secret, *arguments, claim=settings.claim,
                     audience=settings.audience, issuer=settings.issuer)


def _token(arguments: argparse.Namespace) -> int:
    if arguments.check is None:
        token = _new_token(arguments.read, arguments.write, arguments.expires, arguments.api,
                           arguments.user)
        if not (arguments.read or arguments.write or arguments.api):
            _tell("this token allows nothing; name channels with --read or --write")
        _print(token)
        return 0
    token = _input().readline().strip() if arguments.check == "-" else arguments.check
    try:
        key = Keyring(_token_settings()).decode(token)
    except TokenError as error:
        _print(_on_one_line(f"refused: {error}"))
        return 1
    until = "for ever" if key.expires is None else time.strftime(
        "until %Y-%m-%d %H:%M:%S UTC", time.gmtime(key.expires))
    _print(_on_one_line(
        f"valid {until}; read: {', '.join(sorted(key.read)) or 'nothing'}; "
        f"write: {', '.join(sorted(key.write)) or 'nothing'}; api: {'yes' if key.api else 'no'}"
        + (f"; user: {key.user}" if key.user else "")))
    return 0


# philote subscribe, philote history, philote publish

class _CommandClient(Client):
    """A client that tells on standard error what becomes of its connection."""

    def __init__(self, arguments: argparse.Namespace, channels: Sequence[str],
                 writes: Sequence[str] = (), **options: Any) -> None:
        self.arguments = arguments
        # Python looks for a signal before a system call, and when one interrupts it. One between
        # the two would be noticed when the call returns. So SIGALRM interrupts it, each second; but
        # not where it is to end the program: perl -e 'alarm 5; exec @ARGV' philote subscribe news
        if not any(signal.getitimer(signal.ITIMER_REAL)):
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.setitimer(signal.ITIMER_REAL, 1, 1)
            # Before Python lets go of SIGALRM.
            atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
        # `philote publish` follows no channel (channels=()). But a token made here allows reading
        # the one that it writes: who comes back finds out which of the messages have arrived (see
        # step 2 in the section "client").
        super().__init__(arguments.url, arguments.token or _new_token(channels, writes),
                         channels=() if writes else channels, **options)

    def on_connect(self) -> None:
        """Tell that it is there again."""
        _tell(f"connected to {_without_token(self.arguments.url)}")

    def on_disconnect(self, error: Exception, pause: float) -> None:
        """Tell why it is not."""
        _tell_pause(self.arguments, error, pause)


def _tell_pause(arguments: argparse.Namespace, error: Exception, seconds: float) -> None:
    _tell(f"{_without_token(arguments.url)}: {error}; trying again in {seconds:.2f} seconds")


def _show(message: Message, as_json: bool) -> None:
    if as_json:
        fields = {name: value for name, value in message._asdict().items()
                  if value or name in ("issuer", "channel", "data")}
        _print(json.dumps(fields))
    else:
        _print(_on_one_line(message.data if isinstance(message.data, str) else
                            json.dumps(message.data, ensure_ascii=False)))


def _subscribe(arguments: argparse.Namespace) -> int:
    # A Client comes back once it has been connected, and raises where the first attempt fails. Here
    # that one is repeated, too: the server may be started later.
    left, pause, client = arguments.count or math.inf, _FIRST_PAUSE, None
    while client is None:
        try:
            client = _CommandClient(arguments, arguments.channels,
                                    since=arguments.since, last=arguments.last)
        except (Unauthorized, ConnectionClosed, OSError) as error:
            if isinstance(error, Unauthorized) and _is_refusal(error):
                raise
            wait = random.uniform(pause / 2, pause)
            _tell_pause(arguments, error, wait)
            time.sleep(wait)
            pause = min(2 * pause, _LAST_PAUSE)
    with client:
        _tell(f"connected to {_without_token(arguments.url)}, following "
              f"{', '.join(arguments.channels)}")
        while left > 0:
            try:
                if message := client.receive():
                    _show(message, arguments.json)
                    left -= 1
            except Gap as gap:
                _tell(str(gap))
    return 0


def _history(arguments: argparse.Namespace) -> int:
    def ask(**past: Any) -> tuple[list[Message], int, bool]:
        token = arguments.token or _new_token(arguments.channels)
        with _expect_philote("this is no Philote server that keeps messages"):
            status, value = _get(arguments, "api/history", token=token,
                                 parameters={"channel": arguments.channels, **past})
            if status != 200:
                raise Unauthorized(status, str(value["reason"]))
            found = [Message(*(message.get(name, "") for name in Message._fields))
                     for message in value["messages"]]
            if not all(isinstance(message.channel, str) for message in found):
                raise ValueError  # _last_of_each() counts by channel
            return found, decode_id(value["id"]), value["complete"]

    # Messages come in pages. The last is the one that reaches the position that the log has now. To
    # go on until a page is empty might take for ever, as others may publish faster than this reads.
    #
    #     ?channel=news&since=now     nothing, and the id 9-4: the end
    #     ?channel=news               some MAX_QUEUE_SIZE bytes of messages, up to the id 8-0
    #     ?channel=news&since=8-0     the others, up to 9-4
    _, end, _ = ask(since="now")
    past = _given(since=arguments.since or None, last=arguments.last)
    found, only_last = list[Message](), False
    while True:
        messages, position, complete = ask(**past)
        if not complete:
            _tell(str(Gap()))
        # `last` counts alone, beside `now`, and beside an id that is no longer kept. The pages
        # behind the first may hold more of a channel that was not on that: so all are gathered.
        since = past.get("since", "now")
        only_last |= "last" in past and (since == "now" or not complete and "-" in since)
        found += messages
        if only_last:
            found = _last_of_each(found, arguments.last)
        at_end = not messages or position >= end
        if at_end or not only_last:
            for message in found:
                _show(message, arguments.json)
            found = []
        if at_end:
            return 0
        past = {"since": encode_id(position)}


def _last_of_each(messages: Sequence[Message], count: int) -> list[Message]:
    seen, last = collections.Counter[str](), list[Message]()
    for message in reversed(messages):
        seen[message.channel] += 1
        if seen[message.channel] <= count:
            last.append(message)
    return last[::-1]


def _publish(arguments: argparse.Namespace) -> int:
    if arguments.data is None:
        _input().reconfigure(encoding="utf-8", errors="replace")
    with _CommandClient(arguments, [arguments.channel], [arguments.channel]) as client:
        if arguments.data is not None:
            # What is no text is put right as on standard input.
            data = arguments.data.encode(errors="surrogateescape").decode(errors="replace")
            client.publish(arguments.channel, data)
        else:
            for line in sys.stdin:
                client.publish(arguments.channel, line.removesuffix("\n"))
    return 0


# ------------------------------------------------------------------------------- the browser client
# What GET /philote.js serves: an ES module without dependencies. As the class Client does, it comes
# back by itself; but a message that was not answered it does not publish again: its promise is
# rejected, and the page decides.
#
# The class Client hands all messages to one receive(), so one position is enough. Here several
# subscriptions may match a message, and each may have asked for another past. So each has a cursor,
# the id up to which it has everything; its callback gets only what is above that.
#
# A new subscription has no cursor. It is asked for by a request, and gets its cursor with the
# answer. (When a connection begins, those that want the same past share a request.) When the
# connection comes back, its URL names the channels that have a cursor, and one position for all: a
# subscription whose cursor is above that drops what it has had. What was not answered before, does
# not fit into the URL, or is not named by the token, is asked for by requests.
#
#     first    GET /?since=now&channel=news&auth=TOKEN    a name of the token's, see #address()
#              server -> page   {"connected": {"id": "7-0", "channels": ["news"], ...}}
#              page -> server   {"unsubscribe": ["news"]}, for no subscription wants it
#              page -> server   {"subscribe": ["chat"], "last": 10, "ref": "1"}
#              server -> page   10 messages; {"subscribed": {"id": "7-0", ...}, "ref": "1"}
#     later    GET /?since=7-9&channel=chat&auth=TOKEN    and what came behind 7-9 follows
#
# A message of the past does not say which request it answers; but a server answers in order, see
# #deliver() and #join(). Up to 100 publications wait while there is no connection.

PHILOTE_JS = r"""// A client of a Philote server, for browsers and Node 22. It has no dependencies.
//
//     import { Philote } from "https://example.com/philote.js";
//     const token = async () => (await fetch("/token")).text();
//     const philote = new Philote("wss://example.com", { token });
//     const stop = philote.subscribe("news", message => show(message.data), { last: 10 });
//     const id = await philote.publish("chat", "hello");
//     philote.addEventListener("gap", () => reloadEverything());

/** @typedef {{ id: string, issuer: string, user: string, channel: string, data: any }} Message */
/** @typedef {{ since?: string, last?: number }} Past  What is wanted of the past. */
/** @typedef {string | (() => string | Promise<string>)} Token */
/** @typedef {"connecting" | "open" | "waiting" | "closed"} State */
/**
 * `cursor` is the id, as inOrder() writes it, up to which it has everything. It is empty until the
 * server has answered the subscription; what comes before that answer is kept in `held`.
 * @typedef {{ name: string, callback: (message: Message) => void, past: Past, cursor: string,
 *             held: Message[] }} Subscription
 */
/** @typedef {{ ref: string, text: string, resolve: (id: string) => void,
 *              reject: (error: Error) => void }} Publication */

const ANSWER_TIME = 10_000; // ms for a token, for a connection, and beyond the server's own `ping`
const PROBE_TIME = 5_000; // ms that an old connection has to show that it lives
const STEADY_TIME = 5_000; // ms; what is lost earlier is tried again more slowly
const MOST_WAITING = 100; // publications before the connection is there
// The server does not send a connection its own messages, but those of our earlier connections it
// does. They are known by their issuer, and no callback gets them.
const MOST_ISSUERS = 100; // of our connections, the last of them, that are remembered
// Characters, since proxies limit the first line of a request. Channels that do not fit are joined
// by requests, once the connection is there; none is longer, for servers limit a message.
const LONGEST_QUERY = 4_000;
const LONGEST_DELAY = 2 ** 31 - 1; // ms that a timer can wait

/** Why a message was not published: `forbidden`, `bad_message`, `closed` or `unknown`. */
export class PhiloteError extends Error {
  /** @param {string} code  @param {string} reason */
  constructor(code, reason) {
    super(reason);
    this.name = "PhiloteError";
    this.code = code;
  }
}

/**
 * Write an id so that ids can be compared as text, 20 digits being enough for any number; below,
 * an id in this form is called a place.
 * @param {string} id
 */
const inOrder = id => id.split("-").map(number => number.padStart(20, "0")).join("-");

/** @param {[string, ...unknown[]]} one  @param {[string, ...unknown[]]} other */
const byPlace = ([one], [other]) => one < other ? -1 : Number(one > other);

/**
 * Whether a channel or pattern brings another, all of it.
 * @param {string} name  @param {string} other
 */
export const covers = (name, other) => name === other
  || name.endsWith("*") && other.replace(/\*$/, "").startsWith(name.slice(0, -1));

/** How many characters a channel takes in a query. @param {string} name */
const sizeOf = name => String(new URLSearchParams({ name })).length;

/** Divide what is asked for into messages of bounded size. @param {Subscription[]} subscriptions */
function* inParts(subscriptions) {
  /** @type {Subscription[]} */
  let part = [];
  let size = 0;
  for (const subscription of subscriptions) {
    size += sizeOf(subscription.name);
    if (part.length && size > LONGEST_QUERY) {
      yield part;
      [part, size] = [[], sizeOf(subscription.name)];
    }
    part.push(subscription);
  }
  yield part;
}

/** What a token allows, unverified; of one that cannot be read, nothing. @param {string} token */
export const claimsOf = token => {
  try {
    const part = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    const bytes = Uint8Array.from(atob(part), character => character.charCodeAt(0));
    const claims = JSON.parse(new TextDecoder().decode(bytes));
    return typeof claims === "object" && claims || {};
  } catch {
    return {};
  }
};

/**
 * A connection that comes back by itself, and goes on where it was.
 *
 * Events: `open` (detail: issuer, resumed), `closed` (code, reason, delay: ms to the next attempt,
 * or null), `gap` (id: messages may be missing before it), `error` (code, reason).
 */
export class Philote extends EventTarget {
  /** @type {Token} */ #token;
  /** @type {State} */ #state = "connecting";
  /** @type {WebSocket | null} */ #socket = null;
  /** @type {Set<Subscription>} */ #subscriptions = new Set();
  // What the server has not answered yet, by ref, the oldest first.
  /** @type {Map<string, Subscription[]>} */ #asked = new Map();
  /** @type {Map<string, Publication>} */ #published = new Map();
  /** @type {Publication[]} */ #unsent = [];
  /** @type {Set<string>} */ #issuers = new Set();
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #timer;
  #url; #minDelay; #maxDelay; #position;
  #since; // what the constructor was given; empty once the first subscriptions have their past
  #issuer = "";
  #attempt = 0; // the number of the last; an earlier one that had to wait gives up
  #failures = 0; // in a row
  // The next two are ms of Date.now(): performance.now() may stand still while a machine sleeps.
  #opened = 0; // when the connection was there
  #deadline = 0; // until when something must have come
  #patience = Infinity; // ms that the server may be silent
  #ref = 0;
  #listening = new AbortController();

  /**
   * `since` is a `position` of before; the delays are in ms, a random part of which is waited.
   * @param {string | URL} [url]  by default, where this script came from
   * @param {{ token?: Token, since?: string, minDelay?: number, maxDelay?: number }} [options]
   */
  constructor(url = new URL(".", import.meta.url),
              { token = "", since = "", minDelay = 500, maxDelay = 20_000 } = {}) {
    super();
    this.#url = new URL(String(url).replace(/^http/i, "ws"));
    if (!/^wss?:$/.test(this.#url.protocol)) {
      throw new TypeError(`the URL must begin with ws://, wss://, http:// or https://, not ${url}`);
    }
    this.#token = token;
    this.#minDelay = Math.max(1, minDelay); // it is doubled
    this.#maxDelay = maxDelay;
    this.#position = this.#since = since;
    const signal = { signal: this.#listening.signal };
    const { addEventListener: listen, document } = globalThis; // neither is there in Node
    listen?.("online", () => this.#wake(), signal);
    listen?.("pageshow", () => this.#wake(), signal);
    // A page that the browser keeps, to go back to, would keep its connection there, and lose it.
    listen?.("pagehide", event => event.persisted && this.#socket
      && this.#end(1001, "the page was left"), signal);
    listen?.("offline", () => this.#socket && this.#end(1006, "the browser is offline"), signal);
    document?.addEventListener("visibilitychange", () => document.hidden || this.#wake(), signal);
    this.#connect();
  }

  /** @returns {State} */
  get state() { return this.#state; }

  /** The id up to which all has come; `since` of a page that is loaded again. */
  get position() { return this.#since || this.#position; }

  /** What others see as the publisher of our messages; "" until the connection is there. */
  get issuer() { return this.#issuer; }

  /**
   * Call a function with each message of a channel, or of all that a pattern such as `chat.*`
   * stands for. `since` (an id, or a time such as "10m") and `last` (a number of messages of each
   * channel) begin in the past. Returns a function that ends it.
   * @param {string} name  @param {(message: Message) => void} callback  @param {Past} [past]
   */
  subscribe(name, callback, { since, last } = {}) {
    if (!name) throw new TypeError("a channel must have a name");
    const subscription = { name, callback, past: { since, last }, cursor: "", held: [] };
    this.#subscriptions.add(subscription);
    if (this.#state === "open") this.#ask([subscription]);
    return () => {
      if (this.#subscriptions.delete(subscription) && this.#state === "open"
          && ![...this.#subscriptions].some(other => other.name === name)) {
        this.#send({ unsubscribe: [name] });
      }
    };
  }

  /**
   * Publish data, any JSON value. The promise is that of its id, once the server has it; it is
   * rejected with a PhiloteError, `unknown` where the connection ended before the answer.
   * @param {string} channel  @param {any} data  @returns {Promise<string>}
   */
  publish(channel, data) {
    return new Promise((resolve, reject) => {
      const ref = String(++this.#ref);
      // As text at once: the data may be another before the connection is there.
      const text = JSON.stringify({ channel, data, ref });
      const publication = { ref, text, resolve, reject };
      if (this.#state === "open") {
        this.#sendPublication(publication);
      } else if (this.#state === "closed" || this.#unsent.length >= MOST_WAITING) {
        reject(new PhiloteError("closed", this.#state === "closed"
          ? "the client is closed" : `${MOST_WAITING} messages wait for a connection`));
      } else {
        this.#unsent.push(publication);
      }
    });
  }

  /** End the connection for good. */
  close() {
    if (this.#state !== "closed") this.#end(1000, "", true);
  }

  // The connection. It needs one timer only: while "connecting" or "open", for the time by which
  // something must have come (#watch); while "waiting", for the next attempt.

  async #connect() {
    const attempt = ++this.#attempt;
    this.#state = "connecting";
    this.#patience = ANSWER_TIME;
    this.#heard();
    this.#watch();
    try {
      await null; // so that whoever called the constructor can listen before an "error" comes
      const token = typeof this.#token === "function" ? await this.#token() : this.#token;
      if (attempt === this.#attempt) this.#open(this.#address(token.trim()));
    } catch (error) {
      if (attempt !== this.#attempt) return;
      // The token's function failed, or the URL and the token make no address of a WebSocket.
      this.#emit("error", { code: "token", reason: String(error) });
      // Unless a listener has called close().
      if (attempt === this.#attempt) this.#end(1006, "there is nothing to connect with");
    }
  }

  /**
   * Make the address of the next connection. It names the channels of subscriptions that have a
   * cursor, as far as the token allows and they fit: these go on at the position. #begin() asks for
   * the others. Where one attempt after the other fails, every fourth names none: they may be what
   * a server or proxy refuses, and why is told to who asks for them.
   * @param {string} token
   */
  #address(token) {
    const url = new URL(this.#url), query = url.searchParams;
    const claims = claimsOf(token);
    // Where the setting CLAIM names the claim that holds the rights, this does not know its name.
    const holders = [claims, ...Object.values(claims)].filter(claim => Array.isArray(claim?.read));
    /** @type {string[]} */
    const rights = holders.length === 1 ? holders[0].read.map(String) : [];
    const mayName = this.#failures % 4 < 3;
    query.set("since", this.#position || "now");
    // The server takes 8 KiB of path and query, and the token comes into them as well.
    const room = Math.min(LONGEST_QUERY, 8_000 - url.pathname.length - token.length);
    const joined = [...this.#subscriptions].filter(subscription => subscription.cursor);
    for (const name of new Set(joined.map(subscription => subscription.name))) {
      if (mayName && rights.some(right => covers(right, name))
          && String(query).length + sizeOf(name) < room) {
        query.append("channel", name);
      }
    }
    const names = query.getAll("channel");
    for (const subscription of joined) {
      if (!names.includes(subscription.name)) {
        subscription.past = { since: this.#position };
        subscription.cursor = "";
        this.#since ||= this.#position; // `position` stays there, until that has come
      }
    }
    if (!names.length) {
      query.set("since", "now");
      // Without a name the server would join all that the token may read, and send it. So this
      // names one that the token allows (for a pattern, a channel that nobody uses), and #begin()
      // leaves it again.
      const [shortest] = rights.sort((a, b) => sizeOf(a) - sizeOf(b));
      if (mayName && rights.length) {
        query.set("channel", shortest.replace(/\*$/, String(Math.random())));
      }
    }
    query.set("auth", token);
    return url;
  }

  /** @param {URL} url */
  #open(url) {
    const socket = this.#socket = new WebSocket(url);
    this.#heard();
    socket.onmessage = event => {
      if (socket !== this.#socket) return; // an old one has no say any more
      this.#heard();
      this.#receive(JSON.parse(event.data));
    };
    socket.onclose = event => {
      // 4403: an operator ended the connection on purpose, so the client does not come back with
      // the same token. Only a function may have another one.
      const forGood = event.code === 4403 && typeof this.#token !== "function";
      if (socket === this.#socket) this.#end(event.code, event.reason, forGood);
    };
  }

  /** @param {number} code  @param {string} reason  @param {boolean} [forGood] */
  #end(code, reason, forGood = false) {
    const socket = this.#socket;
    const steady = this.#opened && Date.now() - this.#opened >= STEADY_TIME;
    this.#failures = steady ? 0 : this.#failures + 1;
    this.#socket = null;
    this.#opened = 0;
    this.#attempt++;
    clearTimeout(this.#timer);
    const longest = Math.min(this.#maxDelay, LONGEST_DELAY,
                             this.#minDelay * 2 ** Math.max(0, this.#failures - 1));
    // Random, so that not all clients come back at once to a server that was restarted.
    const delay = forGood ? null : Math.random() * longest;
    this.#state = forGood ? "closed" : "waiting";
    if (delay !== null) this.#timer = setTimeout(() => this.#connect(), delay);
    socket?.close(); // not waited for: behind a dead network its end takes a minute
    for (const subscription of this.#subscriptions) subscription.held = [];
    this.#asked.clear();
    for (const { reject } of this.#published.values()) {
      reject(new PhiloteError("unknown", "the connection ended before the server's answer"));
    }
    this.#published.clear();
    if (forGood) {
      this.#listening.abort();
      this.#subscriptions.clear(); // one that is being called gets no more
      for (const { reject } of this.#unsent.splice(0)) {
        reject(new PhiloteError("closed", "the client was closed"));
      }
    }
    this.#emit("closed", { code, reason, delay });
  }

  /** Something suggests that a connection can be had, or that the old one may be dead. */
  #wake() {
    if (this.#state === "waiting") {
      this.#connect();
    } else if (this.#state === "open") {
      this.#send({ unsubscribe: [] }); // changes nothing, but a server that is there answers
      this.#deadline = Math.min(this.#deadline, Date.now() + PROBE_TIME);
      this.#watch();
    }
  }

  #heard() {
    this.#deadline = Date.now() + this.#patience;
  }

  #watch() {
    clearTimeout(this.#timer);
    // Where the clock was set back, the deadline would be too far off.
    const now = Date.now();
    this.#deadline = Math.min(this.#deadline, now + this.#patience);
    const left = this.#deadline - now;
    if (left <= 0) {
      this.#end(1006, "the server is silent");
    } else if (left < Infinity) {
      this.#timer = setTimeout(() => this.#watch(), left);
    }
  }

  // What the server sends

  /** @param {any} value */
  #receive(value) {
    if (value.channel) {
      this.#deliver({ user: "", data: "", ...value });
    } else if (value.connected) {
      this.#begin(value.connected);
    } else if (value.published) {
      this.#published.get(value.published.ref)?.resolve(value.published.id);
      this.#published.delete(value.published.ref);
    } else if (value.subscribed) {
      this.#join(value.ref, value.subscribed);
    } else if (value.error) {
      this.#refuse(value.ref, value.error, value.reason);
    } else if (value.gap) {
      this.#skip(value.gap.id);
    } else if (value.id) {
      this.#position = value.id;
    }
    if (this.#state === "open" && !this.#asked.size) this.#since = "";
  }

  /**
   * @param {{ issuer: string, id: string, resumed: boolean, channels: string[], ping: number }} _
   */
  #begin({ issuer, id, resumed, channels, ping }) {
    // `since` of the constructor is for subscriptions made before the first connection is there.
    const since = this.#issuer ? undefined : this.#since || undefined;
    this.#issuer = issuer;
    this.#issuers.add(issuer);
    if (this.#issuers.size > MOST_ISSUERS) this.#issuers.delete([...this.#issuers][0]);
    this.#patience = ping ? 1000 * ping + ANSWER_TIME : Infinity;
    this.#heard();
    this.#watch();
    this.#opened = Date.now();
    this.#state = "open";
    const all = [...this.#subscriptions];
    const names = new Set(all.map(subscription => subscription.name));
    const unwanted = channels.filter(name => !names.has(name));
    if (unwanted.length) this.#send({ unsubscribe: unwanted });
    const fresh = all.filter(subscription => !subscription.cursor);
    for (const { past } of fresh) past.since ??= since;
    if (fresh.length === all.length) this.#position = id; // none goes on from the old one
    /** @type {Map<string, Subscription[]>} */
    const alike = new Map(); // by what they want of the past, as JSON
    for (const subscription of fresh) {
      const past = JSON.stringify(subscription.past);
      alike.set(past, [...alike.get(past) ?? [], subscription]);
    }
    for (const group of alike.values()) {
      for (const part of inParts(group)) this.#ask(part);
    }
    // After the subscriptions, so that what others send in reply to it is received.
    for (const publication of this.#unsent.splice(0)) this.#sendPublication(publication);
    this.#emit("open", { issuer, resumed });
    if (!resumed && this.#state === "open") this.#skip(id);
  }

  /** @param {Message} message */
  #deliver(message) {
    const place = inOrder(message.id);
    if (place > inOrder(this.#position)) this.#position = message.id;
    if (this.#issuers.has(message.issuer)) return;
    // The server serves one subscription after the other: what comes of the past is for the first
    // that it has not answered. The others get it, if they want it, when it is their turn.
    const [asked] = this.#asked.values();
    for (const subscription of this.#subscriptions) {
      if (!covers(subscription.name, message.channel)) continue;
      if (!subscription.cursor) {
        if (asked?.includes(subscription)) subscription.held.push(message);
      } else if (place > subscription.cursor) {
        this.#call(subscription, message, place);
      }
    }
  }

  /** @param {Subscription} subscription  @param {Message} message  @param {string} place */
  #call(subscription, message, place) {
    subscription.cursor = place;
    try {
      subscription.callback(message);
    } catch (error) {
      queueMicrotask(() => { throw error; }); // reported, and the others get theirs
    }
  }

  /** @param {string} ref  @param {{ id: string, resumed: boolean }} answer */
  #join(ref, { id, resumed }) {
    const subscriptions = this.#asked.get(ref) ?? [];
    this.#asked.delete(ref);
    // What was joined before has all up to there, and this shall get nothing of before, later.
    if (inOrder(id) > inOrder(this.#position)) this.#position = id;
    if (!resumed) this.#emit("gap", { id });
    /** @type {[string, Message, Subscription][]} */
    const calls = [];
    for (const subscription of subscriptions) {
      const { past, held } = subscription;
      const wanted = (past.since ?? "now") !== "now" || (past.last ?? 0) > 0;
      const from = resumed && past.since?.includes("-") ? inOrder(past.since) : "";
      // Among what was held are messages, old and new, which other subscriptions have brought. So
      // all are put in order, each once.
      const places = new Map(held.map(message => [inOrder(message.id), message]));
      places.forEach((message, place) => {
        if (wanted && place > from) calls.push([place, message, subscription]);
      });
      subscription.past = {};
      subscription.held = [];
    }
    for (const [place, message, subscription] of calls.sort(byPlace)) {
      if (this.#subscriptions.has(subscription)) this.#call(subscription, message, place);
    }
    for (const subscription of subscriptions) subscription.cursor = inOrder(id);
  }

  /** @param {string | undefined} ref  @param {string} code  @param {string} reason */
  #refuse(ref = "", code, reason) {
    const publication = this.#published.get(ref), subscriptions = this.#asked.get(ref);
    this.#published.delete(ref);
    this.#asked.delete(ref);
    if (publication) {
      publication.reject(new PhiloteError(code, reason));
    } else if (subscriptions && subscriptions.length > 1) {
      // The server joins all or none, and does not say which it refused: so one by one.
      for (const subscription of subscriptions) { // but for those that were ended meanwhile
        if (this.#subscriptions.has(subscription)) this.#ask([subscription]);
      }
    } else {
      this.#emit("error", { code, reason });
    }
  }

  /** Messages may be missing before this id. @param {string} id */
  #skip(id) {
    this.#position = id;
    for (const subscription of this.#subscriptions) {
      if (subscription.cursor) subscription.cursor = inOrder(id);
    }
    this.#emit("gap", { id });
  }

  // What is sent to it

  /** Join channels that are alike in what is wanted of the past. @param {Subscription[]} group */
  #ask(group) {
    const ref = String(++this.#ref);
    this.#asked.set(ref, group);
    const names = [...new Set(group.map(subscription => subscription.name))];
    this.#send({ subscribe: names, ...group[0].past, ref });
  }

  /** @param {Publication} publication */
  #sendPublication(publication) {
    this.#published.set(publication.ref, publication);
    this.#socket?.send(publication.text); // a socket that is closing drops it; see #end()
  }

  /** @param {object} value */
  #send(value) {
    this.#socket?.send(JSON.stringify(value));
  }

  /** @param {string} type  @param {object} detail */
  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
"""


# -------------------------------------------------------------------------------------- the console
# What GET / shows a browser: a page, with its style and its script where the words STYLE and SCRIPT
# stand. The script uses the module above. It adds what it publishes to the log by itself, for a
# server does not send a connection its own messages. With a token that has `api` it asks for
# /api/info and /metrics, 2 s after each answer. The button Cut makes an "offline" event, which the
# module takes for a lost network: so one sees it come back and resume, without pulling a cable.

_CONSOLE_PAGE = r"""<!doctype html>
<html lang="en" data-secret="set" data-claim="">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Philote</title>
<link rel="icon" href="data:,">
<style>STYLE</style>
<header>
  <h1>Philote</h1>
  <p id="state" role="status" data-state="closed">not connected</p>
  <p class="quiet">position <code id="position">-</code></p>
</header>
<main>
  <section aria-labelledby="connection">
    <h2 id="connection">Connection</h2>
    <p id="offer" hidden>This server has no SECRET, so this page can make what it needs to get in.
      <button type="button" id="make">Let me in</button></p>
    <form id="connect" autocomplete="off" spellcheck="false" autocapitalize="off">
      <label>Token <input id="token" class="secret" required></label>
      <dl id="claims"></dl>
      <div class="row">
        <label>Follow <input id="follow" placeholder="all, or: news, chat.*"></label>
        <label>Last <input id="last" inputmode="numeric" pattern="[0-9]*" value="20"></label>
        <label>Since <input id="since" placeholder="10m"></label>
      </div>
      <div class="row">
        <button class="main">Connect</button>
        <button type="button" id="cut" disabled>Cut</button>
        <button type="button" id="leave" disabled>Leave</button>
      </div>
    </form>
  </section>
  <section aria-labelledby="sending">
    <h2 id="sending">Send</h2>
    <form id="publish" autocomplete="off" spellcheck="false" autocapitalize="off">
      <label>Channel <input id="channel" required></label>
      <label>Data <textarea id="data" rows="3"></textarea></label>
      <label class="check"><input type="checkbox" id="json"> send as JSON</label>
      <div class="row"><button class="main">Publish</button>
        <output id="outcome"></output></div>
    </form>
    <details><summary>The same from a shell</summary><pre id="curl" tabindex="0"></pre></details>
  </section>
  <section aria-labelledby="live" class="wide">
    <h2 id="live">Live</h2>
    <div class="row">
      <label>Filter <input id="filter" type="search"></label>
      <button type="button" id="pause" aria-pressed="false">Pause</button>
      <button type="button" id="clear">Clear</button>
      <span id="count" class="quiet"></span>
    </div>
    <div id="log" role="log" aria-labelledby="live" tabindex="0"></div>
  </section>
  <section aria-labelledby="server" class="wide" id="state-of-server" hidden>
    <h2 id="server">Server</h2>
    <figure><svg id="plot" role="img" viewBox="0 0 300 60" preserveAspectRatio="none">
      <polyline fill="none" vector-effect="non-scaling-stroke"></polyline></svg>
      <figcaption id="rate"></figcaption></figure>
    <dl id="facts" class="facts"></dl>
    <table id="servers" hidden><caption>servers that share the log</caption>
      <thead><tr><th>server<th>host<th>version<th>connections<th>since</thead>
      <tbody></tbody></table>
  </section>
</main>
<noscript><p>This page needs JavaScript.</p></noscript>
<script type="module">SCRIPT</script>
</html>
"""

_CONSOLE_STYLE = r"""
:root {
  color-scheme: light dark;
  --back: #f6f6f3; --card: #fff; --text: #1d2126; --quiet: #5c646e; --line: #d5d8dc;
  --accent: #0b5fb0; --on-accent: #fff; --good: #17713c; --bad: #b3261e; --soft: #e9f1fa;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171a; --card: #1c2024; --text: #e4e7ea; --quiet: #9aa4ae; --line: #383f46;
    --accent: #7ab8f5; --on-accent: #0c1a28; --good: #6fd497; --bad: #ff9d92; --soft: #22303d;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; max-width: 72rem; padding: 0 1rem 2rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; padding: 1rem 0; }
header p { margin: 0; }
h1 { margin: 0; font-size: 1.5rem; letter-spacing: -.02em; }
h2 { margin: 0 0 .75rem; font-size: 1.05rem; }
main { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
section { padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.wide { grid-column: 1 / -1; }
form { display: grid; gap: .75rem; }
.row { display: flex; flex-wrap: wrap; align-items: end; gap: .75rem; }
.row label:first-child { flex: 1 1 9rem; }
label { display: grid; gap: .2rem; font-size: .875rem; color: var(--quiet); }
.check { display: flex; align-items: center; gap: .5rem; }
input:not([type=checkbox]), textarea, button { padding: .45rem .6rem; min-width: 0; font: inherit;
  color: var(--text); background: var(--back); border: 1px solid var(--line);
  border-radius: .4rem; }
input:not([type=checkbox]), textarea { width: 100%; }
#last { width: 5.5rem; } #since { width: 6.5rem; }
details { margin-top: .75rem; } summary { cursor: pointer; }
#outcome { align-self: center; font-size: .875rem; }
textarea { resize: vertical; font-family: ui-monospace, monospace; }
.secret { -webkit-text-security: disc; }
button { cursor: pointer; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent);
  font-weight: 600; padding-inline: 1.2rem; }
button[aria-pressed=true] { background: var(--soft); border-color: var(--accent); }
button:disabled { opacity: .5; cursor: default; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
code, pre, .text { font-family: ui-monospace, monospace; font-size: .875rem; }
pre, dd, th, td, .who, .text, #outcome { overflow-wrap: anywhere; }
pre, .text { white-space: pre-wrap; }
.quiet { color: var(--quiet); font-size: .875rem; }
#state { font-weight: 600; color: var(--quiet); }
#state::before { content: "\25cf\00a0"; }
#state[data-state=open] { color: var(--good); }
#state[data-state=waiting] { color: var(--bad); }
dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .1rem .75rem;
  font-size: .875rem; }
dt { color: var(--quiet); } dd { margin: 0; }
#claims:empty { display: none; }
.facts { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; }
.facts div { display: grid; } .facts dd { font-size: 1.15rem; font-weight: 600; }
#log { height: 26rem; max-height: 70vh; overflow-y: auto; margin-top: .75rem;
  border: 1px solid var(--line); border-radius: .4rem; }
#log:empty::before { content: "Nothing yet."; padding: .75rem; color: var(--quiet); }
.entry { display: grid; grid-template-columns: 6.5rem 11rem minmax(0, 1fr) auto; gap: 0 .75rem;
  align-items: baseline; padding: .4rem .75rem; border-bottom: 1px solid var(--line); }
.entry .who { display: grid; } .entry .id { display: block; }
.entry .text { max-height: 12rem; overflow-y: auto; }
.entry button { padding: 0 .5rem; font-size: .8rem; }
.entry.own { background: var(--soft); }
.entry.note { display: block; color: var(--quiet); font-size: .875rem; }
.entry.bad { color: var(--bad); }
figure { margin: 0 0 1rem; }
#plot { display: block; width: 100%; height: 5rem; border-bottom: 1px solid var(--line); }
#plot polyline { stroke: var(--accent); stroke-width: 2; }
table { width: 100%; margin-top: 1rem; border-collapse: collapse; font-size: .875rem; }
table, caption { text-align: left; }
th, td { padding: .3rem .5rem .3rem 0; border-bottom: 1px solid var(--line); }
@media (max-width: 45rem) {
  main { grid-template-columns: minmax(0, 1fr); }
  .entry { grid-template-columns: minmax(0, 1fr) auto; }
  .entry .text { grid-column: 1 / -1; grid-row: 3; }
  .entry .who { grid-row: 2; } .entry button { grid-column: 2; grid-row: 1; }
}
"""

_CONSOLE_SCRIPT = r"""
import { Philote, claimsOf, covers } from "./philote.js";

const MOST_ENTRIES = 1000; // in the log
const MOST_SAMPLES = 150; // in the plot
const PAUSE = 2000; // ms between two samples, so that the plot shows five minutes
const get = id => document.getElementById(id);
const value = id => get(id).value.trim();

// A text that stays the same is left alone: setting it would end a selection in it, and have a
// screen reader say it again.
function say(id, text) {
  if (get(id).textContent !== text) get(id).textContent = text;
}

// Whatever comes from outside gets in as text, never as markup: append() takes a string so.
function make(tag, className, ...content) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...content);
  return element;
}

// What the token says

const names = claim => Array.isArray(claim) ? claim.map(String) : [];

// With the setting CLAIM, that claim holds what else are claims themselves.
function rightsOf(claims) {
  const { claim } = document.documentElement.dataset;
  return (claim ? claims[claim] : claims) ?? {};
}

const pair = ([name, text]) => [make("dt", "", name), make("dd", "", text)];

function showClaims() {
  const claims = claimsOf(value("token")), left = claims.exp - Date.now() / 1000;
  const rights = rightsOf(claims);
  const rows = !value("token") ? [] : [
    ["may read", names(rights.read).join(", ") || "nothing"],
    ["may write", names(rights.write).join(", ") || "nothing"],
    ...rights.api === true ? [["api", "yes"]] : [],
    ...claims.sub ? [["user", String(claims.sub)]] : [],
    ["expires", !("exp" in claims) ? "never"
      : left > 0 ? `in ${duration(left)}, ${new Date(claims.exp * 1000).toLocaleString()}`
      : "it has expired"]];
  if (get("claims").textContent === rows.flat().join("")) return; // see say()
  get("claims").replaceChildren(...rows.flatMap(pair));
}

function duration(seconds) {
  for (const [size, unit] of [[86400, "days"], [3600, "hours"], [60, "minutes"]]) {
    if (seconds >= 2 * size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.floor(seconds)} seconds`;
}

// The key of a server without a SECRET is empty. crypto.subtle takes no empty key; but HMAC pads
// keys with zero bytes, so a key of one zero byte makes the same signature.
async function makeToken() {
  const encode = bytes => btoa(String.fromCharCode(...bytes))
    .replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  const claims = { read: ["*"], write: ["*"], api: true,
                   exp: Math.ceil(Date.now() / 1000) + 43200 };
  const signed = [{ alg: "HS256", typ: "JWT" }, claims].map(part =>
    encode(new TextEncoder().encode(JSON.stringify(part)))).join(".");
  const key = await crypto.subtle.importKey(
    "raw", new Uint8Array(1), { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
  const mark = await crypto.subtle.sign("HMAC", key, new TextEncoder().encode(signed));
  get("token").value = `${signed}.${encode(new Uint8Array(mark))}`;
  showClaims();
  get("connect").requestSubmit();
}

// The log. Entries are gathered for 50 ms and then shown together, since the browser lays out the
// page anew each time. `fresh` are those not shown yet, `missed` counts those no longer there.

let entries = [], fresh = [], missed = 0, isPaused = false, timer = 0;

function add(entry) {
  fresh.push({ time: new Date(), ...entry });
  if (fresh.length > MOST_ENTRIES) { fresh.shift(); missed++; }
  timer ||= setTimeout(show, 50); // not requestAnimationFrame(): a hidden page gets none
}

const warn = note => add({ note, isBad: true });

function show() {
  timer = 0;
  if (!isPaused) {
    const log = get("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    for (const entry of fresh.splice(0)) {
      entry.element = render(entry);
      entry.element.hidden = !matches(entry);
      entries.push(entry);
      log.append(entry.element);
    }
    for (const entry of entries.splice(0, entries.length - MOST_ENTRIES)) {
      entry.element.remove();
      missed++;
    }
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
  const older = missed ? `, ${missed} more are gone` : "";
  const shown = entries.filter(({ element }) => !element.hidden).length;
  say("count", `${shown} shown${isPaused ? `, ${fresh.length} wait` : ""}${older}`);
}

const textOf = data => typeof data === "string" ? data : JSON.stringify(data);

function matches({ note, message }) {
  const wanted = value("filter").toLowerCase();
  return Boolean(note) || [message.channel, message.user, textOf(message.data)].some(text =>
    String(text).toLowerCase().includes(wanted));
}

function render({ time, note, isBad, isOwn, message }) {
  const clock = make("time", "quiet", time.toLocaleTimeString());
  if (note) return make("div", isBad ? "entry note bad" : "entry note", clock, ` ${note}`);
  const sender = isOwn ? "from here" : message.user ? `from ${message.user}` : "";
  const copy = make("button", "", "Copy");
  copy.onclick = async () => {
    try {
      await navigator.clipboard.writeText(JSON.stringify(message));
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "No access";
    }
  };
  return make("div", isOwn ? "entry own" : "entry", clock,
    make("div", "who", make("strong", "", message.channel), make("span", "quiet", sender)),
    make("div", "text", textOf(message.data), make("span", "id quiet", message.id)), copy);
}

// The connection

let philote = null;

function showState() {
  const state = philote?.state ?? "closed";
  say("state", state === "closed" ? "not connected" : state);
  get("state").dataset.state = state;
  say("position", philote?.position || "-");
  get("cut").disabled = state !== "open";
  get("leave").disabled = state === "closed";
}

function connect() {
  philote?.close();
  const token = value("token"), rights = rightsOf(claimsOf(token));
  const current = new Philote(undefined, { token });
  philote = current;
  const hear = (type, work) => current.addEventListener(type, ({ detail }) => work(detail));
  hear("open", ({ issuer }) => add({ note: `connected as ${issuer}` }));
  hear("closed", ({ code, reason, delay }) => {
    const again = delay === null ? "" : `, trying again in ${(delay / 1000).toFixed(1)} s`;
    add({ note: `connection ended with ${code}${reason && `: ${reason}`}${again}`,
          isBad: code !== 1000 });
    if (code === 1006 && !current.issuer) tellWhy(token);
  });
  hear("gap", ({ id }) => warn(`messages may be missing before ${id}`));
  hear("error", ({ code, reason }) => warn(`${code}: ${reason}`));
  const chosen = value("follow").split(",").map(name => name.trim()).filter(Boolean);
  const asked = chosen.length ? chosen : names(rights.read);
  // A message that several of them match is to be seen once.
  const covered = name => asked.some(other => other !== name && covers(other, name));
  const past = { last: value("last") ? Number(value("last")) : undefined,
                 since: value("since") || undefined };
  for (const name of new Set(asked)) {
    if (!covered(name)) current.subscribe(name, message => add({ message }), past);
  }
  follow(rights.api === true ? token : "");
}

const ask = (path, token) => fetch(path, { headers: { Authorization: `Bearer ${token}` } });

// A browser does not let a page see why a WebSocket was refused.
async function tellWhy(token) {
  try {
    const answer = await ask("api/history?last=0", token);
    if (!answer.ok) warn((await answer.json()).reason);
  } catch {
    warn("the server cannot be reached");
  }
}

// Publishing

const readData = () =>
  get("json").checked ? JSON.parse(get("data").value) : get("data").value;

function showCurl() {
  try {
    const body = JSON.stringify({ channel: value("channel"), data: readData() });
    get("curl").textContent = `curl -d '${body.replaceAll("'", `'\\''`)}' \\\n`
      + `  -H "Authorization: Bearer $TOKEN" ${new URL("api/publish", location.href)}`;
  } catch (error) {
    get("curl").textContent = String(error);
  }
}

async function publish() {
  const channel = value("channel");
  try {
    if (!philote) throw new Error("not connected");
    const data = readData(), id = await philote.publish(channel, data);
    get("outcome").textContent = id;
    add({ message: { id, user: "", channel, data }, isOwn: true });
  } catch (error) {
    get("outcome").textContent = error.message;
    warn(`not published: ${error.message}`);
  }
}

// What the server is doing

let watch = 0; // how often follow() was called; a look() for an earlier call gives up
let before = null, rates = []; // the sample before; messages a second between two samples

function follow(token) {
  watch++;
  before = null;
  rates = [];
  get("state-of-server").hidden = !token;
  if (token) look(token, watch);
}

async function look(token, mine) {
  if (mine !== watch) return;
  try {
    const answers = await Promise.all([ask("api/info", token), ask("metrics", token)]);
    const [info, metrics] = await Promise.all([answers[0].json(), answers[1].text()]);
    if (mine === watch && answers.every(answer => answer.ok)) showServer(info, metrics);
  } catch {
    if (mine === watch) before = null; // it cannot be reached; the log says so
  }
  if (mine === watch) setTimeout(() => look(token, mine), PAUSE);
}

function showServer(info, text) {
  const metric = name => Number(new RegExp(`^philote_${name} (\\d+)`, "m").exec(text)?.[1] ?? 0);
  const now = { time: performance.now(), count: metric("messages_published_total") };
  if (before) {
    rates.push(Math.max(0, 1000 * (now.count - before.count) / (now.time - before.time)));
    rates.splice(0, rates.length - MOST_SAMPLES);
  }
  before = now;
  showRates();
  const facts = {
    "version": info.version, "up for": duration(info.uptime_in_seconds),
    "connections": info.connections, "channels joined": info.channels,
    "slow consumers": metric("slow_consumers_total"),
    "bytes queued": metric("queued_bytes").toLocaleString(),
    "messages kept": info.history_messages.toLocaleString(),
    "bytes kept": info.history_bytes.toLocaleString(),
    "oldest kept": info.history_oldest
      ? new Date(Number(info.history_oldest.split("-")[0])).toLocaleTimeString() : "-",
    "came back": info.resumes, "came back late": info.resumes_failed, "gaps": info.gaps,
    ...info.cluster ? { "Redis": info.cluster.up ? "up" : info.cluster.reason || "down" } : {},
  };
  get("facts").replaceChildren(...Object.entries(facts).map(row => make("div", "", ...pair(row))));
  const servers = info.cluster?.servers ?? [];
  get("servers").hidden = !servers.length;
  get("servers").tBodies[0].replaceChildren(...servers.map(server => {
    const since = new Date(1000 * server.since).toLocaleString();
    const id = server.id + (server.id === info.cluster.id ? " (this one)" : "");
    const cells = [id, server.host, server.version, server.connections, since];
    return make("tr", "", ...cells.map(cell => make("td", "", cell)));
  }));
}

function showRates() {
  const most = Math.max(1, ...rates), now = rates.at(-1) ?? 0;
  const rate = `${now.toFixed(1)} messages a second, ${most.toFixed(0)} at most in five minutes`;
  say("rate", rate);
  get("plot").setAttribute("aria-label", rate);
  get("plot").firstElementChild.setAttribute("points", rates.map((number, index) =>
    `${300 - 2 * (rates.length - 1 - index)},${58 - 56 * number / most}`).join(" "));
}

// Controls

function on(id, type, work) {
  get(id).addEventListener(type, event => {
    event.preventDefault();
    work();
    showState();
  });
}

on("connect", "submit", connect);
on("make", "click", makeToken);
on("cut", "click", () => {
  add({ note: "cut by hand" });
  dispatchEvent(new Event("offline")); // as if the network were gone
});
on("leave", "click", () => { philote.close(); philote = null; follow(""); });
on("publish", "submit", publish);
on("clear", "click", () => {
  for (const { element } of entries.splice(0)) element.remove();
  fresh = [];
  missed = 0;
  show();
});
on("pause", "click", () => {
  isPaused = !isPaused;
  get("pause").setAttribute("aria-pressed", String(isPaused));
  show();
});
on("filter", "input", () => {
  for (const entry of entries) entry.element.hidden = !matches(entry);
  show();
});
on("token", "input", showClaims);
on("publish", "input", showCurl);
get("data").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) get("publish").requestSubmit();
});
get("offer").hidden = document.documentElement.dataset.secret === "set" || !crypto.subtle;
showCurl();
setInterval(() => { showState(); showClaims(); }, 1000);
"""


if __name__ == "__main__":
    main()
