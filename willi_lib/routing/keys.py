"""The keys of an address: what mappings are asked for, and how an administrator's pattern becomes one."""

from __future__ import annotations

import re
from unicodedata import name, normalize

from ..hosts import DOMAIN, MAX_HOST_NAME
from ..text import refuse_invisible

_DOMAIN = re.compile(DOMAIN)
_LITERAL = re.compile(r"\[[!-Z^-~]+\]")  # RFC 5321 §4.1.3, whatever the address in it
_FOLDED = re.compile(rf"(?:[a-z0-9._+-]+@)?{DOMAIN}")  # what folding leaves alone: nearly every pattern
MAX_LABELS = 10  # of a pattern with a dot before it: a domain may have 127, and each key may be a query
_UNQUOTED = re.compile(r'[^\x00-\x20\x7f"(),:;<>@\[\]\\]+')  # lenient about dots: "a..b" does occur
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ATOM = r"[^\x00-\x20\x7f\"(),.:;<>@\[\]\\]+"
_DOT_STRING = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")
# What word processors and spreadsheets make of quotation marks and hyphens; no domain has them (RFC 5892).
_TYPESET = re.compile("[\u00ab\u00bb\u2010-\u2015\u2018-\u201f\u2039\u203a\u2212]")


def keys_of(recipient: str, delimiter: str = "", subdomains: bool = False) -> tuple[str, ...]:
    """The keys to ask for, folded: user+ext@domain, user@domain, domain.

    recipient: without angle brackets and source route. One without a domain
        (postmaster) has a single key.
    delimiter: a set of characters; the local part is cut at the first of them,
        unless nothing would remain, or quotes are needed around it.
    subdomains: of a.b.example also .b.example and .example, which stand for all names below.
    """
    local, at, domain = recipient.rpartition("@")
    domain = fold_domain(domain)
    if not at or not domain or domain.endswith('"'):  # the @ of "a@b" belongs to the local part
        return (_fold_local_part(recipient),)
    local = _fold_local_part(local)
    domains = (domain, *(_parents(domain) if subdomains else ()))
    if delimiter and not local.startswith('"'):
        cut = min((found for found in map(local.find, delimiter) if found >= 0), default=0)
        if cut:
            return f"{local}@{domain}", f"{local[:cut]}@{domain}", *domains
    return f"{local}@{domain}", *domains


def _parents(domain: str) -> list[str]:
    """The patterns for all names below, the longest first."""
    labels = domain.split(".") if _DOMAIN.fullmatch(domain) else []
    return ["." + ".".join(labels[at:]) for at in range(max(1, len(labels) - MAX_LABELS), len(labels))]


def fold_pattern(pattern: str, subdomains: bool = False) -> str:
    """The key that an administrator's pattern, an address or a domain, stands for.

    subdomains: also a domain with a dot before it.

    Raises ValueError with a short reason if no recipient can have that key.
    """
    if _FOLDED.fullmatch(pattern):
        return pattern
    refuse_invisible(pattern)
    local, at, domain = pattern.rpartition("@")
    refuse_typeset(domain)
    domain = fold_domain(domain)
    if at and local in ("", "*"):
        raise ValueError(f"{pattern[:80]!r}: a whole domain is written without {local}@")
    neither = f"{pattern[:80]!r}: neither an address nor a domain"
    star, dot, below = pattern.partition(".")
    if dot and star in ("", "*") and _DOMAIN.fullmatch(below := fold_domain(below)):
        if star or not subdomains:
            raise ValueError(f"{neither}; for all names below {below} write .{below} and set subdomains = yes")
        if below.count(".") >= MAX_LABELS:
            raise ValueError(f"{neither}: behind a dot it may have {MAX_LABELS} labels")
        return f".{below}"
    if domain.startswith((".", "*")):
        raise ValueError(f"{neither}; there are no wildcards: one line for each domain")
    is_domain = _DOMAIN.fullmatch(domain) or _LITERAL.fullmatch(domain)
    is_local_part = not at or _UNQUOTED.fullmatch(local) or _QUOTED.fullmatch(local)
    if not (is_domain and is_local_part):
        raise ValueError(neither)
    return f"{_fold_local_part(local)}@{domain}" if at else domain


def refuse_typeset(domain: str) -> None:
    """Raises ValueError: punycode would make an A-label of such a character that no client ever asks for."""
    if found := _TYPESET.search(domain):
        code = f"U+{ord(found[0]):04X} {name(found[0])}"
        raise ValueError(f"{domain[:80]!r}: has {code}, which no domain has: write it in ASCII, or leave it out")


def _fold_local_part(local: str) -> str:
    """Lower case, without needless quotes and backslashes, which mean nothing (RFC 5321 §4.1.2)."""
    quoted = _QUOTED.fullmatch(local) if local.startswith('"') else None
    if quoted is not None:
        local = re.sub(r"\\(.)", r"\1", quoted[1])
        if not _DOT_STRING.fullmatch(local):
            local = '"' + re.sub(r'(["\\])', r"\\\1", local) + '"'
    return local.lower() if local.isascii() else normalize("NFC", local.lower())


def fold_domain(domain: str) -> str:
    """Lower case, A-labels, no dot at the end. What has no A-label stays, in lower case.

    The mapping is that of RFC 5895, letter by letter as in UTS #46: Python's lower() makes another letter of a capital
    sigma at the end of a word. Python's `idna` codec is IDNA 2003 for ever: there `straße.example` means
    `strasse.example`, which may belong to another owner.
    """
    if domain.isascii():
        return domain.lower().removesuffix(".")
    lower = normalize("NFKC", domain).replace("Σ", "σ").lower()
    folded = normalize("NFC", lower).replace("\u3002", ".").removesuffix(".")
    if len(folded) <= MAX_HOST_NAME:  # A-labels are no shorter; those of 2,000 octets take a quarter of a second
        name = ".".join(map(_a_label, folded.split(".")))
        if _DOMAIN.fullmatch(name):
            return name
    return domain.replace("Σ", "σ").lower().removesuffix(".")


def _a_label(label: str) -> str:
    """As it is if that is ASCII, or longer than a label can be (encoding takes quadratic time)."""
    if label.isascii() or len(label) > 63:
        return label
    return "xn--" + label.encode("punycode").decode("ascii")
