"""The pieces: groups, thumbnails and what is kept of them, forms, tokens."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.use import Serve
from pipeline.curate.report.words import name_of
from pipeline.curate.rows.tables import DECISIONS
from pipeline.embed.ids import Ids
from pipeline.embed.vectors import open_vectors
from pipeline.errors import PipelineError
from pipeline.images.bad_image import BadImage
from pipeline.search.decisions import Decisions
from pipeline.search.search import open_search
from pipeline.serve.collection import Collection
from pipeline.serve.deployment import _site
from pipeline.serve.gallery import by_cluster, by_text, everything, grouped, label_texts
from pipeline.serve.intake import Pixels, image_of
from pipeline.serve.opening import checked, opened
from pipeline.serve.refusal import Refusal
from pipeline.serve.thumbnails import Cache, thumbnail
from pipeline.serve.token import VARIABLE, Gate, own_token
from pipeline.stages.serve import free_port
from tests.serve.made import Made, save_model, write_vectors


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_groups_hold_every_row_once_the_largest_first(of_rows: list[int]) -> None:
    grouping = grouped("x", "abcde", np.array(of_rows), None)
    assert sorted(grouping.order.tolist()) == list(range(len(of_rows)))
    counts = [group["count"] for group in grouping.summary()["groups"]]
    assert counts == sorted(counts, reverse=True)
    assert 0 not in counts
    for name, start, end in zip(
        grouping.groups, grouping.starts[:-1], grouping.starts[1:], strict=True
    ):
        rows = grouping.order[start:end].tolist()
        assert rows == [i for i, g in enumerate(of_rows) if "abcde"[g] == name]


def test_within_a_group_the_highest_come_first() -> None:
    grouping = grouped("x", "ab", np.array([0, 1, 0, 0]), np.array([0.1, 0.5, 0.9, 0.4]))
    assert grouping.order.tolist() == [2, 3, 0, 1]


def test_clusters_are_the_planted_ones_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.standard_normal((16, 16)))[0][:5]
    of_rows = np.repeat(np.arange(5), [40, 30, 20, 15, 10])
    vectors = centres[of_rows] * rng.uniform(1, 9, (115, 1)) + 0.01 * rng.standard_normal((115, 16))
    ids = rng.integers(0, 256, (115, 16), np.uint8)
    grouping = by_cluster(vectors.astype(np.float32), ids)
    found = np.zeros(115, int)
    for group in range(len(grouping.groups)):
        found[grouping.order[grouping.starts[group] : grouping.starts[group + 1]]] = group
    for group in range(len(grouping.groups)):  # 7 clusters of 5 directions: none is mixed
        assert len(set(of_rows[found == group])) == 1
    assert grouping.groups[0] == "cluster 1"
    turned = rng.permutation(115)
    again = by_cluster(vectors[turned].astype(np.float32), ids[turned])
    assert np.diff(again.starts).tolist() == np.diff(grouping.starts).tolist()
    for start, end in zip(again.starts[:-1], again.starts[1:], strict=True):
        assert set(turned[again.order[start:end]]) == set(grouping.order[start:end])


def test_one_row_is_a_cluster() -> None:
    grouping = by_cluster(np.ones((2, 3), np.float32), np.zeros((2, 16), np.uint8))
    assert grouping.starts.tolist() == [0, 2]


def test_labels_get_their_names() -> None:
    texts = label_texts(np.array([1, -1, 0, 7]), ["cat", "dog"])
    assert texts.tolist() == ["dog", "no label", "cat", "7"]
    assert set(by_text("label", texts).groups) == {"dog", "no label", "cat", "7"}


def collection(rows: int) -> Collection:
    vectors = np.eye(rows, dtype=np.float32)
    return Collection(
        ids=Ids(np.array([f"{i * 7919 % 997:032x}" for i in range(rows)], "S32")),
        source=lambda row: "",
        labels=None,
        decisions=None,
        groupings={"all": everything(rows)},
        search=open_search(vectors).find,
        vector=lambda row: vectors[row],
        image=None,
    )


def test_rows_are_found_by_id_and_nothing_else_is() -> None:
    some = collection(50)
    assert [some.row_of(some.ids.id_of(row)) for row in range(50)] == list(range(50))
    for wrong in ("", "0", "f" * 32, some.ids.id_of(0)[:-1], some.ids.id_of(0) + "0", "é", "\0"):
        with pytest.raises(Refusal):
            some.row_of(wrong)


def test_twins_of_an_image_never_push_its_neighbours_out() -> None:
    """More equal vectors than neighbours: the image itself may not be among the found ones."""
    vectors = np.ones((9, 4), np.float32)
    many = Collection(
        ids=Ids(np.array([f"{i:032x}" for i in range(9)], "S32")), source=lambda row: "",
        labels=None, decisions=None, groupings={}, search=open_search(vectors).find,
        vector=lambda row: vectors[row], image=None,
    )  # fmt: skip
    like = [one["image_id"] for one in many.like_row(8, 3)]
    assert len(like) == 3
    assert many.ids.id_of(8) not in like


def jpeg(width: int, height: int, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, height), 30).convert(mode).save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("width", "height"), [(900, 300), (300, 900), (64, 64), (20, 10), (3, 2000)]
)
def test_thumbnails_keep_the_shape(width: int, height: int) -> None:
    small = Image.open(io.BytesIO(thumbnail(jpeg(width, height), 128, Pixels(), 10**8)))
    scale = min(1, 128 / max(width, height))
    assert abs(small.width - max(1, width * scale)) <= 1
    assert abs(small.height - max(1, height * scale)) <= 1


def test_thumbnails_of_other_channels_can_be_seen() -> None:
    grey = Image.open(io.BytesIO(thumbnail(jpeg(200, 100, "L"), 64, Pixels(1), 10**8)))
    assert grey.size == (64, 32)
    out = io.BytesIO()
    np.save(out, np.zeros((40, 40, 5), np.uint8))
    assert Image.open(io.BytesIO(thumbnail(out.getvalue(), 64, Pixels(5), 10**8))).size == (40, 40)


def test_a_thumbnail_of_a_huge_image_is_refused() -> None:
    with pytest.raises(BadImage):
        thumbnail(jpeg(500, 500), 64, Pixels(), 1000)


def test_the_cache_keeps_what_was_used_last() -> None:
    cache, made = Cache(max_bytes=30), []

    def get(key: str) -> bytes:
        return cache.get(key, lambda: made.append(key) or bytes(10))  # type: ignore[func-returns-value]

    for key in "abcabca":
        get(key)
    assert made == ["a", "b", "c"]
    get("d")  # b was used longest ago
    get("a")
    get("b")
    assert made == ["a", "b", "c", "d", "b"]
    cache.get("large", lambda: bytes(99))  # more than there is room for
    get("a")
    assert made[-1] == "a"


FORM = "multipart/form-data; boundary=xyz"


def form(*parts: bytes, end: bytes = b"--xyz--\r\n") -> bytes:
    return b"".join(b"--xyz\r\n" + part + b"\r\n" for part in parts) + end


FILE = (
    b'Content-Disposition: form-data; name="f"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
)
FIELD = b'Content-Disposition: form-data; name="note"\r\n\r\nhello'


@given(st.binary(min_size=1, max_size=300).filter(lambda data: b"--xyz" not in data))
def test_the_file_of_a_form_comes_out_as_it_went_in(data: bytes) -> None:
    for body in (form(FILE + data), form(FIELD, FILE + data), form(FILE + data, FIELD)):
        assert image_of(FORM, body) == data
    assert image_of("image/png", data) == data
    assert (
        image_of('multipart/form-data; boundary="xyz"', b"preamble\r\n" + form(FILE + data)) == data
    )


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", form(FILE + b"x")),
        ("multipart/form-data; boundary=" + "b" * 71, form(FILE + b"x")),
        (FORM, b""),
        (FORM, b"no form at all"),
        (FORM, form(FIELD)),
        (FORM, form(FILE)),
        (FORM, b"--xyz" * 9999),
    ],
)
def test_forms_without_a_file_are_refused(kind: str, body: bytes) -> None:
    with pytest.raises(Refusal) as refusal:
        image_of(kind, body)
    assert refusal.value.status == 422


def refused(what: str, call: Any, *arguments: Any) -> None:
    with pytest.raises(PipelineError) as error:
        call(*arguments)
    assert what in str(error.value)


def test_mistakes_at_the_start_are_one_sentence(made: Made, tmp_path: Path) -> None:
    refused("neither serve.model nor serve.vectors", checked, "", "")
    other = save_model(tmp_path / "other", seed=1)
    refused("its digest of the weights is", checked, other, made.vectors)
    refused("serve.decisions=nowhere", checked, "", made.vectors, "nowhere")
    refused("serve.vectors", checked, "", str(tmp_path))
    refused("192.0.2.77", free_port, "192.0.2.77", 0)
    refused("no-such-host", free_port, "no-such-host.invalid", 0)


def test_without_vectors_images_are_decoded_as_in_training(made: Made) -> None:
    served = checked(made.model, "")
    assert served.spec is not None
    assert _site(Serve(), served, "", None).pixels.value_range == "full"
    twelve_bits = replace(served, spec=replace(served.spec, value_range=(0, 4095)))
    assert _site(Serve(), twelve_bits, "", None).pixels.value_range == (0, 4095)
    known = checked(made.model, made.vectors)
    assert known.spec is not None
    known = replace(known, spec=replace(known.spec, value_range=(0, 4095)))
    assert _site(Serve(), known, "", None).pixels.value_range == "full"  # as the vectors' images


def test_without_model_the_vectors_name_theirs(made: Made, caplog: Any) -> None:
    served = checked("", made.vectors)
    assert served.spec is not None
    assert served.spec.name == made.model
    assert served.decisions is None


def test_decisions_of_a_curation_are_a_grouping(made: Made, tmp_path: Path) -> None:
    """Two left out for two reasons, one that was never curated, the others kept."""
    blurred, copy, unknown, *kept = made.ids
    rows = [(blurred, False, "quality"), (copy, False, "duplicate"), *((i, True, "") for i in kept)]
    columns = dict(zip(("image_id", "kept", "reason"), zip(*rows, strict=True), strict=True))
    table = pa.table(
        {
            field.name: pa.array(columns.get(field.name, [None] * len(rows)), field.type)
            for field in DECISIONS
        }
    )
    folder = tmp_path / "decisions"
    folder.mkdir()
    pq.write_table(table, folder / "00000.parquet")
    decisions = Decisions(str(folder))
    some = opened(open_vectors(made.vectors), decisions)
    groups = {g["name"]: g["count"] for g in some.groupings["decision"].summary()["groups"]}
    assert groups[name_of("kept")] == len(kept)
    assert groups["not curated"] == 1
    assert len(groups) == 4
    assert some.about(some.row_of(unknown))["decision"] == "not curated"
    assert some.about(some.row_of(copy))["decision"] == name_of("duplicate")


def test_tokens_are_new_or_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert own_token() != own_token()
    assert len(own_token()) >= 43  # 256 bits
    monkeypatch.setenv(VARIABLE, "long-enough-for-it")
    assert own_token() == "long-enough-for-it"
    for wrong in (
        "short",
        "with a blank in it here",
        "ünicode-is-none-of-it",
        "new\nline-is-no-header",
        "semi;colons-end-a-cookie",
        'quo"tes-are-taken-off',
    ):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(PipelineError) as error:
            own_token()
        assert wrong not in str(error.value)  # it may be a secret all the same


@given(st.text(max_size=60))
def test_no_header_opens_the_gate_but_the_right_one(text: str) -> None:
    gate = Gate("the-token-of-this-test", 8000)
    assert not gate.open_for(text, text)
    assert not gate.open_for(f"Bearer {text}", f"raydino-8000={text}")
    assert gate.open_for("Bearer the-token-of-this-test", text)
    assert gate.open_for(text, gate.cookie().partition(";")[0])


def test_vectors_of_nothing_are_refused_at_the_start(made: Made, tmp_path: Path) -> None:
    some = open_vectors(made.vectors)
    facts = {name: value for name, value in some.facts.items() if name != "parts"}
    width = np.zeros((0, some.dim), np.float32)
    write_vectors(tmp_path / "vectors", width, [], [], [], facts)
    refused("0 rows of cls", checked, "", str(tmp_path / "vectors"))
