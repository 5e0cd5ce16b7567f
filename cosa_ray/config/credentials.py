"""What of a URI, a text or a diff may be written down or shown, and what may not; and who may read Ray's token."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit, urlunsplit

_NAMES = r"passw|pwd|secret|token|api_?key|credential|signature"
_SECRET_KEY = re.compile(rf"{_NAMES}|^sig$", re.IGNORECASE)
_PATH_NAME = re.compile(r"(path|file|dir|home)$", re.IGNORECASE)  # a variable that says where a secret is
_SHORTEST = 8  # letters of a secret in a variable: a shorter word would be found everywhere
# A literal that is given to a secret's name, in code or in a settings file, and a key by its form; what is kept first.
_LITERALS = (
    re.compile(rf"((?:{_NAMES})\w*[\"']?\s*[:=]\s*[\"'])[^\s\"']{{8,}}(?=[\"'])", re.IGNORECASE),
    re.compile(rf"^([+ -]\s*(?:export\s+)?\w*(?:{_NAMES.upper()})\w*=)\S{{8,}}", re.MULTILINE),
    # With a digit, as passwords have one and the types that Python code writes so seldom do.
    re.compile(rf"^([+ -]\s*\w*(?:{_NAMES})\w*:\s+)(?=\S*\d)[^\s\"'({{\[]{{8,}}$", re.MULTILINE | re.IGNORECASE),
    re.compile(r"()\b(?:AKIA[A-Z0-9]{16}|gh[pousr]_\w{20,}|hf_\w{20,}|glpat-[\w-]{20,}|xox[abp]-[\w-]{10,})"),
    re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)(?s:.*?)(?=-----END|\Z)"),
)
_IN_TEXT = (
    # user:password@ of any URI; in Azure's the container is written so.
    (re.compile(r"(?<!abfs://)(?<!abfss://)(?<=://)[^\s/'\"]*@"), ""),
    (re.compile(rf"([?&;][\w-]*(?:{_NAMES}|\bsig\b)[\w-]*=)[^\s&;'\")]*", re.IGNORECASE), r"\1***"),
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
    """The text with these URIs in their shown form, without the credentials of any other or of this environment."""
    for uri in uris:
        text = text.replace(uri, without_credentials(uri))
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    for value in secrets_here():
        text = text.replace(value, "***")
    return text


def redacted_diff(diff: str) -> str:
    """A diff for everybody who sees a run: `redacted`, and without what looks like a password or a key in it."""
    text = redacted(diff)
    for pattern in _LITERALS:
        text = pattern.sub(r"\1***", text)
    return text


def secrets_here() -> list[str]:
    """Values of this process's variables whose names say that they are secret, the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if _SECRET_KEY.search(name) and not _PATH_NAME.search(name) and len(value) >= _SHORTEST
    }
    return sorted(found, key=len, reverse=True)


def keep_token_private() -> None:
    """See that ~/.ray/auth_token, the token of clusters started here, is there and its owner's alone to read.

    Ray makes it readable for everybody where the umask is the usual one, and whoever has it runs code in the cluster.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home, or one that cannot be written to: Ray says so itself
        file = Path.home() / ".ray" / "auth_token"
        file.parent.mkdir(mode=0o700, exist_ok=True)
        if not file.exists():
            handle, whole = tempfile.mkstemp(dir=file.parent)  # mode 600
            try:
                with os.fdopen(handle, "w") as stream:
                    stream.write(secrets.token_hex(32))
                with contextlib.suppress(FileExistsError):  # another process was faster
                    os.link(whole, file)
            finally:
                os.unlink(whole)
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)
