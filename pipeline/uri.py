"""Names of places: local paths (`Path`) and URIs (`str` with `://`)."""

from __future__ import annotations

import re
from pathlib import Path

Place = Path | str


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
    """A place, or a text with places in it, as it may be shown: without the keys that can stand
    before a URI's host.
    """
    return re.sub(r"://[^/@\s]*@", "://", str(text))
