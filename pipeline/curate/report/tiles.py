"""Images as tiles of the page: which picture, which frame, which words."""

from __future__ import annotations

from pipeline.curate.report.copies import Component, Member
from pipeline.curate.report.read import Shown
from pipeline.curate.report.sets import Match
from pipeline.curate.report.summary import Summary
from pipeline.curate.report.words import COLOURS, file_name, name_of, similarity
from pipeline.report.page import Group, Tile
from pipeline.report.units import bytes_of

KEEP, GONE, ASK, CHAIN = "keep", "gone", "ask", "chain"


def tile(
    summary: Summary,
    row: int,
    *more: str,
    first: str | None = None,
    frame: str = "",
) -> Tile:
    """A row of the pile: what became of it, then more lines, then its file's name.

    Args:
        summary: its `shown` holds the row.
        row: its number.
        more: lines below the first.
        first: instead of its reason.
        frame: of the tile.
    """
    one = summary.shown.get(row) or Shown(row=row, image_id="")
    words = name_of(one.reason) if first is None else first
    return Tile(
        image=one.thumbnail,
        lines=tuple(line for line in (words, *more, file_name(one.path)) if line),
        alt=f"image {one.image_id[:8]}… from {one.source or 'an unknown source'}: {words}",
        frame=frame,
        tip=_tip(one),
        colour=COLOURS.get(one.reason, "var(--c6)"),
    )


def other(one: Shown | None, query: bytes, words: str) -> Tile:
    """An image of an evaluation or seed set, with a dashed frame."""
    shown = one or Shown(row=-1, image_id=query.hex())
    return Tile(
        image=shown.thumbnail,
        lines=(words, file_name(shown.path) or f"{query.hex()[:8]}…"),
        alt=f"{words}, image {query.hex()[:8]}…",
        frame=ASK,
        tip=_tip(shown),
    )


def pair(summary: Summary, rows: tuple[int, int], words: str) -> Group:
    """Two rows beside each other, with words below."""
    return Group([tile(summary, row) for row in rows], below=words, close=True)


def member_tile(summary: Summary, member: Member) -> Tile:
    """An image of a component: its similarity to the keeper, and what became of it."""
    if member.keeper:
        return keeper_tile(summary, member.row)
    more = "chain" if member.chained else ""
    frame = CHAIN if member.chained else ""
    return tile(summary, member.row, more, first=_like(summary, member), frame=frame)


def keeper_tile(summary: Summary, row: int) -> Tile:
    """The image that stays of copies; a later stage may have taken it all the same."""
    one = summary.shown.get(row)
    after = "" if one is None or one.reason == "kept" else f"but {name_of(one.reason)}"
    return tile(summary, row, after, first="keeper", frame=KEEP)


def component_group(summary: Summary, component: Component) -> Group:
    """Members of a component; how many images it has, and how many of them are not shown."""
    left = component.size - len(component.members)
    more = f", {left:,} more {'is' if left == 1 else 'are'} not shown" if left > 0 else ""
    tiles = [member_tile(summary, member) for member in component.members]
    return Group(tiles, f"{component.size:,} images{more}")


def match_group(summary: Summary, match: Match, name: str, one: Shown | None) -> Group:
    """The image of another set, then the row that matches it, with how alike they are."""
    tiles = [other(one, match.query, name), tile(summary, match.row, first="in the pile")]
    return Group(tiles, below=f"{similarity(match.similarity)} alike", close=True)


def _like(summary: Summary, member: Member) -> str:
    one = summary.shown.get(member.row)
    reason = one.reason if one else ""
    words = f"{similarity(member.similarity)} alike"
    return words if reason in ("", "duplicate_near") else f"{words}, {name_of(reason)}"


def _tip(one: Shown) -> str:
    parts = [one.path or one.source, one.image_id]
    if one.width:
        parts.append(f"{one.width:,} x {one.height:,} pixels, {bytes_of(one.encoded_bytes)}")
    if one.error:
        parts.append(one.error)
    return "\n".join(part for part in parts if part)
