"""Names of places: local paths (`Path`) and URIs (`str` with `://`), and what of them is secret."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

Place = Path | str


class Scheme(NamedTuple):
    """What the addresses of a scheme may hold that is no secret."""

    user: str = ""  # before the host: none, a name (`any`), or this name
    port: bool = False
    query: frozenset[str] = frozenset()


def _scheme(user: str = "", port: bool = False, query: str = "") -> Scheme:
    return Scheme(user, port, frozenset(query.split()))


_S3 = _scheme(
    query="region scheme endpoint_override allow_bucket_creation allow_bucket_deletion "
    "allow_delayed_open background_writes check_directory_existence_before_creation "
    "force_virtual_addressing smart_defaults tls_ca_dir_path tls_ca_file_path "
    "tls_verify_certificates"
)
_GCS = _scheme(
    user="anonymous",
    query="anonymous scheme endpoint_override default_bucket_location location retry_limit_seconds "
    "project_id",
)
_AZURE = _scheme(
    user="any",
    port=True,
    query="blob_storage_authority dfs_storage_authority blob_storage_scheme dfs_storage_scheme "
    "account_name credential_kind client_id tenant_id enable_tls background_writes",
)
_HADOOP = _scheme(user="any", port=True, query="user replication buffer_size default_block_size")
_WEB = _scheme(port=True)
SCHEMES = {
    **dict.fromkeys(("s3", "s3a", "s3n"), _S3),
    **dict.fromkeys(("gs", "gcs"), _GCS),
    **dict.fromkeys(("abfs", "abfss", "az", "wasb", "wasbs"), _AZURE),
    **dict.fromkeys(("hdfs", "viewfs"), _HADOOP),
    **dict.fromkeys(("http", "https"), _WEB),
    # names of a profile, or of a scope and a prefix
    **dict.fromkeys(("databricks", "databricks-uc"), _scheme(user="any", port=True)),
}
OTHER = _scheme(port=True)
ON_DISK = ("file", "sqlite")  # what follows is a path
# of the links into MLflow that we print
LINK = frozenset(("workflowType", "compareRunsMode", "viewStateShareKey"))
HIDDEN = "…"
_START = re.compile(  # with a slash too few as well
    rf"([A-Za-z][A-Za-z0-9+.-]*)://+|\b({'|'.join((*SCHEMES, *ON_DISK))}):/", re.IGNORECASE
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*\Z")  # before `://`
_KNOWN = re.compile(rf"\b({'|'.join((*SCHEMES, *ON_DISK))})\Z", re.IGNORECASE)  # before `:/`
_LONGEST = 64  # letters of a scheme
_END = re.compile(r"[\s\"'<>`]")
_HOST = re.compile(r"(\[[0-9a-fA-F:.%]*\]|[^:\[\]]*)(:\d*)?")  # host and port, of IPv6 too


def is_uri(place: Place) -> bool:
    """Whether a place is a URI, not a local path."""
    return "://" in str(place)


def join(place: Place, *names: str) -> Place:
    """A place inside a folder, of the same kind. What follows a `?` in a URI stays at its end."""
    if isinstance(place, Path) or not is_uri(place):
        return Path(place, *names)
    path, mark, query = place.partition("?")
    return "/".join([path.rstrip("/"), *names]) + mark + query


def parent(place: Place) -> tuple[Place, str]:
    """The folder that a place is in, and its name there."""
    if isinstance(place, Path) or not is_uri(place):
        return Path(place).parent, Path(place).name
    path, mark, query = place.partition("?")
    folder, _, name = path.rstrip("/").rpartition("/")
    return folder + mark + query, name


def public(text: Place) -> str:
    """A place, or a text with places in it, as it may be shown: without what can be a secret.

    Shown are scheme, host, path and the parameters that `SCHEMES` names.
    """
    text = str(text)
    starts = list(_starts(text))
    if not starts:
        return text
    pieces = [text[: starts[0]]]
    for begin, following in zip(starts, [*starts[1:], len(text)], strict=True):
        end = _END.search(text, begin, following)
        cut = end.start() if end else following
        cut = begin + len(text[begin:cut].rstrip(".,:;!)]}"))  # of the sentence around it
        pieces += [_public(text[begin:cut]), text[cut:following]]
    return "".join(pieces)


def _starts(text: str) -> Iterator[int]:
    """Where the addresses in a text begin.

    From `:/` back to the front: a page with pictures has megabytes of letters that could begin one.
    """
    colon = text.find(":/")
    while colon >= 0:
        before = text[max(0, colon - _LONGEST) : colon]
        scheme = (_SCHEME if text.startswith("://", colon) else _KNOWN).search(before)
        if scheme:
            yield colon - len(before) + scheme.start()
        colon = text.find(":/", colon + 1)


def public_address(uri: Place) -> str:
    """As `public`, for what is one address as a whole: a password may hold blanks and quotes."""
    text = str(uri)
    start = _START.match(text)
    return public(_public(text) if start else text)


def has_secret(text: str) -> bool:
    """Whether a place, or one of several with commas between them, has what can be a secret."""
    return public_address(text) != text


def allowed(uri: str) -> str:
    """What an address of this scheme may hold, for the sentence that refuses another."""
    start = _START.match(uri)
    scheme = SCHEMES.get((start[1] or start[2]).lower(), OTHER) if start else OTHER
    names = ", ".join(sorted(scheme.query))
    return f"the parameters {names}" if names else "no parameters"


def split_user(uri: str) -> tuple[str, str, str]:
    """User, password and the address without them, of an address that may have them.

    A password may hold `/` and `@` as they are.
    """
    start = _START.match(uri)
    begin = start.end() if start else 0
    before, after = _authority(uri[begin:])
    user, _, password = before.partition(":")
    return unquote(user), unquote(password), uri[:begin] + after


def _authority(rest: str) -> tuple[str, str]:
    """What stands before the host without its `@`, and what begins with the host."""
    path = re.split(r"[?#]", rest, maxsplit=1)[0]
    host = path.partition("/")[0]
    if "@" not in host and ("@" not in path or ":" not in host):
        return "", rest
    whole = "@" in host and _HOST.fullmatch(host.rpartition("@")[2])
    end = (host if whole else path).rindex("@")  # the first of two may belong to the password
    return rest[:end], rest[end + 1 :]


def _public(uri: str) -> str:
    """One URI without what can be a secret; as it was where there is nothing."""
    start = _START.match(uri)
    assert start
    name, begin, address = (start[1] or start[2]).lower(), start[0], uri[start.end() :]
    if name in ON_DISK and (begin.endswith("///") or "//" not in begin):
        return uri
    scheme = SCHEMES.get(name, OTHER)
    user, address = _authority(address) if not _has_plain_path(name, address) else ("", address)
    if user and ":" not in user and "/" not in user and scheme.user in ("any", user):
        begin += f"{user}@"
    body, sharp, fragment = address.partition("#")
    place, mark, query = body.partition("?")
    host = place.partition("/")[0]
    if ":" in host and not (scheme.port and _HOST.fullmatch(host)):
        return start[0] + HIDDEN  # the half of a key, whose end cannot be told
    parts = re.split("[&;]", query) if query else []
    kept = [part for part in parts if _is_harmless(part, scheme)]
    if len(kept) < len(parts):
        mark, query = "?" if kept else "", "&".join(kept) + HIDDEN
    words = [word.partition("=") for word in re.split("[&;?]", fragment)]
    if any(equals and word not in LINK for word, equals, _ in words):
        fragment = HIDDEN
    return begin + place + mark + query + sharp + fragment


def _has_plain_path(name: str, rest: str) -> bool:
    """Whether an `@` after host and port is part of a path, as in `hdfs://host:8020/a@b`."""
    host = rest.partition("/")[0]
    return name in ("hdfs", "viewfs") and bool(_HOST.fullmatch(host))


def _is_harmless(part: str, scheme: Scheme) -> bool:
    """Whether `name=value` is a parameter of the scheme's list, with no key in its value."""
    pairs = parse_qsl(part, keep_blank_values=True)
    return bool(pairs) and all(
        name in scheme.query | LINK and "@" not in value and public(value) == value
        for name, value in pairs
    )
