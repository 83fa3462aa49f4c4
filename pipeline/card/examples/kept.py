"""Examples on disk: `examples.json` beside a card, with small pictures in it.

A report is made of it without a network, without vectors and without the images themselves.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_json, write_bytes_atomic
from pipeline.uri import Place, public

FILE = "examples.json"
VERSION = 1


@dataclass(frozen=True)
class Shown:
    """An image as a page shows it.

    Attributes:
        picture: JPEG or PNG; b"" where there is none.
        name: its file's name, or the first digits of its id.
        label: the name of its class; "" where that is unknown.
    """

    picture: bytes = field(repr=False)
    name: str
    label: str = ""


@dataclass(frozen=True)
class Neighbour:
    """An image of the reference that is near an image that was asked.

    Attributes:
        image: what is shown of it.
        cosine: of both vectors.
        right: whether it has the class of the image that was asked; None: nobody knows.
    """

    image: Shown
    cosine: float
    right: bool | None = None


@dataclass(frozen=True)
class Asked:
    """An image with its nearest ones, the nearest first."""

    image: Shown
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Look:
    """What networks see in an image: pictures of its size by kind, each of both networks.

    Attributes:
        image: what is shown of it.
        pictures: by "components" and "attention", PNG before and after.
    """

    image: Shown
    pictures: Mapping[str, tuple[bytes, bytes]] = field(repr=False)


@dataclass(frozen=True)
class Examples:
    """All examples of a model.

    Attributes:
        model: its name on the card.
        asked: images with their neighbours.
        looks: what the model and its beginning see in images.
        before: the name of its beginning.
        remarks: what could not be shown, and why.
    """

    model: str = ""
    asked: tuple[Asked, ...] = ()
    looks: tuple[Look, ...] = ()
    before: str = ""
    remarks: tuple[str, ...] = ()


def write_examples(examples: Examples, place: Place) -> None:
    """Writes `examples.json` into a folder.

    Raises:
        StorageError: the storage failed, or refused.
    """
    content = {
        "version": VERSION,
        "model": public(examples.model),
        "before": public(examples.before),
        "remarks": [public(one) for one in examples.remarks],
        "asked": [
            {
                "image": _plain(one.image),
                "neighbours": [
                    {"image": _plain(x.image), "cosine": round(x.cosine, 5), "right": x.right}
                    for x in one.neighbours
                ],
            }
            for one in examples.asked
        ],
        "looks": [
            {
                "image": _plain(one.image),
                "pictures": {n: [_text(x) for x in pair] for n, pair in one.pictures.items()},
            }
            for one in examples.looks
        ],
    }
    fs, folder = resolve_uri(str(place))
    write_bytes_atomic(json.dumps(content, indent=1).encode(), fs, f"{folder}/{FILE}")


def read_examples(place: Place) -> Examples:
    """The examples in a folder; empty where there are none, or those of another version.

    Raises:
        StorageError: the storage failed, or refused.
    """
    fs, folder = resolve_uri(str(place))
    content = read_json(fs, f"{folder}/{FILE}")
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return Examples()
    return Examples(
        content["model"],
        tuple(
            Asked(
                _shown(one["image"]),
                tuple(
                    Neighbour(_shown(x["image"]), x["cosine"], x["right"])
                    for x in one["neighbours"]
                ),
            )
            for one in content["asked"]
        ),
        tuple(
            Look(
                _shown(one["image"]),
                {name: (_bytes(a), _bytes(b)) for name, (a, b) in one["pictures"].items()},
            )
            for one in content["looks"]
        ),
        content["before"],
        tuple(content["remarks"]),
    )


def _plain(one: Shown) -> dict[str, str]:
    return {"picture": _text(one.picture), "name": public(one.name), "label": one.label}


def _shown(content: Mapping[str, Any]) -> Shown:
    return Shown(_bytes(content["picture"]), content["name"], content["label"])


def _text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
