"""Keeps TLS from key exchanges that cost us a hundred times the usual, and the peer nothing (D(HE)at, CVE-2002-20001).

OpenSSL 3.0 to 3.4 agree to finite fields of up to 8,192 bits. As Postfix does since 3.8 we leave out those over
3,072, and DHE before TLS 1.3, where the server chooses any size (RFC 9325 §4.2). What else OpenSSL and its openssl.cnf
offer stays as it is and in its order: we look at what our own ClientHello says.

Python's ssl can set a list of groups since 3.15 only. Before, OpenSSL is asked by ctypes, in the very library that
Python's ssl uses.
"""

from __future__ import annotations

import ctypes
import ssl
import struct
import sys
from contextlib import suppress
from functools import lru_cache

_SET_GROUPS_LIST = 92  # SSL_CTRL_SET_GROUPS_LIST
_SUPPORTED_GROUPS = 10  # extension of a ClientHello (RFC 8446 §4.2.7)
_BEFORE_SESSION_ID = 5 + 4 + 2 + 32  # octets: headers of record and message, version, random
_COSTLY = {258, 259, 260}  # ffdhe4096, ffdhe6144, ffdhe8192 (RFC 7919)
_NAMES = {  # of the others, as OpenSSL calls them (IANA: TLS Supported Groups)
    23: "P-256", 24: "P-384", 25: "P-521", 26: "brainpoolP256r1", 27: "brainpoolP384r1", 28: "brainpoolP512r1",
    29: "X25519", 30: "X448", 31: "brainpoolP256r1tls13", 32: "brainpoolP384r1tls13", 33: "brainpoolP512r1tls13",
    256: "ffdhe2048", 257: "ffdhe3072", 512: "MLKEM512", 513: "MLKEM768", 514: "MLKEM1024",
    4587: "SecP256r1MLKEM768", 4588: "X25519MLKEM768", 4589: "SecP384r1MLKEM1024",
}  # fmt: skip


def limit_key_exchange(context: ssl.SSLContext) -> None:
    """To be called after the last `set_ciphers`."""
    groups = _cheap_groups()
    if groups:
        _set_groups(context, groups)
    ciphers = [cipher for cipher in context.get_ciphers() if cipher["protocol"] != "TLSv1.3"]
    cheap = [cipher["name"] for cipher in ciphers if cipher["kea"] != "kx-dhe"]
    if len(cheap) < len(ciphers) and cheap:
        context.set_ciphers(":".join(cheap))


def has_costly_groups() -> bool:
    """Whether they are still offered, as with a Python of its own OpenSSL that no other code can reach."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    limit_key_exchange(context)
    return not _COSTLY.isdisjoint(_offered_groups(context))


@lru_cache(maxsize=1)
def _cheap_groups() -> str:
    """The list to set; empty if OpenSSL offers no costly one by itself."""
    offered = _offered_groups(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    if _COSTLY.isdisjoint(offered):
        return ""
    return ":".join(_NAMES[group] for group in offered if group in _NAMES)


def _set_groups(context: ssl.SSLContext, groups: str) -> None:
    if hasattr(context, "set_groups"):  # Python 3.15
        context.set_groups(groups)
        return
    ctrl = _openssl_ctrl()
    if ctrl:
        # A context is what every object of Python begins with, and then the pointer to OpenSSL's: so in 3.10 to 3.14.
        pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__)
        ctrl(pointer, _SET_GROUPS_LIST, 0, groups.encode())


@lru_cache(maxsize=1)
def _openssl_ctrl() -> ctypes._NamedFuncPointer | None:
    """SSL_CTX_ctrl; None: it cannot be reached, or this is no Python whose contexts we know."""
    if sys.implementation.name != "cpython" or sys.version_info >= (3, 15):
        return None
    try:
        ctrl = ctypes.CDLL(ssl._ssl.__file__).SSL_CTX_ctrl  # type: ignore[attr-defined]
    except (AttributeError, OSError):  # built into Python
        return None
    ctrl.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p)
    ctrl.restype = ctypes.c_long
    return ctrl


def _offered_groups(context: ssl.SSLContext) -> tuple[int, ...]:
    """Those of the context's ClientHello, in their order."""
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="groups.invalid")
    with suppress(ssl.SSLWantReadError):  # it waits for the ServerHello
        client.do_handshake()
    hello = sent.read()
    at = _BEFORE_SESSION_ID
    for size in (1, 2, 1):  # session id, cipher suites, compression methods: a length and so many octets
        at += size + int.from_bytes(hello[at : at + size], "big")
    at += 2  # the length of all extensions
    while at + 4 <= len(hello):
        kind, length = struct.unpack_from("!HH", hello, at)
        at += 4
        if kind == _SUPPORTED_GROUPS:
            return struct.unpack_from(f"!{length // 2 - 1}H", hello, at + 2)
        at += length
    return ()
