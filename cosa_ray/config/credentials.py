"""What of a URI may be written down or shown, and what may not."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit, urlunsplit

_SECRET_KEY = re.compile(r"passw|pwd|secret|token|api_?key|credential", re.IGNORECASE)
_IN_TEXT = (
    (re.compile(r"(?<=://)[^\s/'\"]*@"), ""),  # user:password@ of any URI
    (re.compile(rf"([?&;]\w*(?:{_SECRET_KEY.pattern})\w*=)[^\s&;'\")]*", re.IGNORECASE), r"\1***"),
)


def holds_secret(uri: str) -> bool:
    """True when a URI carries a password: behind the user, in the query, or as the only name of a web address."""
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018 - reading it checks it: a password with a slash ends up there
        query = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return "@" in uri
    if any(_SECRET_KEY.search(key) for key, _ in query):
        return True
    return parts.password is not None or (parts.scheme in ("http", "https") and "@" in parts.netloc)


def without_credentials(uri: str) -> str:
    """The URI without user, password and query."""
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018
    except ValueError:
        scheme, between, rest = uri.rpartition("://")
        return f"{scheme}{between}{rest.rpartition('@')[2]}".partition("?")[0]
    if not parts.netloc:
        return re.sub(r"^[^/]*@", "", uri)  # an address whose http:// was forgotten
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def redacted(text: str, *uris: str) -> str:
    """The text with these URIs in their shown form, and without the credentials of any other."""
    for uri in uris:
        text = text.replace(uri, without_credentials(uri))
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    return text
