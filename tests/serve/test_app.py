"""Every address of the endpoint, without Ray: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipeline.embed.vectors import open_vectors
from pipeline.serve.app import Site, build_app
from pipeline.serve.guard import POLICY
from pipeline.serve.token import Gate
from tests.serve.conftest import TOKEN
from tests.serve.made import CLASSES, EVIL, Made, encoded


def refused(answer: object, status: int) -> str:
    """The one sentence of a refusal."""
    assert answer.status_code == status, (answer.status_code, answer.text)  # type: ignore[attr-defined]
    said = answer.json()  # type: ignore[attr-defined]
    assert list(said) == ["error"]
    assert "\n" not in said["error"]
    return str(said["error"])


def test_embed_gives_the_vector_of_the_table(client: TestClient, made: Made) -> None:
    vectors = open_vectors(made.vectors).read("cls")
    for row in (0, 17):
        image = made.images[made.ids[row]]
        answer = client.post("/embed", content=image).json()
        np.testing.assert_allclose(answer["cls"], vectors[row], rtol=1e-5, atol=1e-5)
        assert answer["dim"] == 64
        form = client.post("/embed", files={"file": ('ü ".png', image, "image/png")}).json()
        assert form["cls"] == answer["cls"]


def test_patches_are_a_grid(client: TestClient, made: Made) -> None:
    answer = client.post("/embed?output=patches", content=made.images[made.ids[0]]).json()
    assert answer["grid"] == [4, 4]
    assert np.shape(answer["patches"]) == (16, 64)
    assert "patches" in refused(client.post("/embed?output=soup", content=b"x"), 422)


def cosines(made: Made, row: int) -> dict[str, float]:
    vectors = open_vectors(made.vectors).read("cls").astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return dict(zip(made.ids, vectors @ vectors[row], strict=True))


def check_nearest(neighbours: list[dict], expected: dict[str, float], k: int) -> None:
    """The k best of brute force, in order, but for equal ones."""
    best = sorted(expected.values(), reverse=True)[:k]
    assert len({one["image_id"] for one in neighbours}) == k
    found = [expected[one["image_id"]] for one in neighbours]
    np.testing.assert_allclose(found, best, atol=1e-6)
    np.testing.assert_allclose([one["similarity"] for one in neighbours], best, atol=1e-6)


def test_search_by_id_and_by_image_equals_brute_force(client: TestClient, made: Made) -> None:
    expected = cosines(made, 5)
    by_image = client.post("/search?k=8", content=made.images[made.ids[5]]).json()
    check_nearest(by_image["neighbours"], expected, 8)
    assert by_image["neighbours"][0]["image_id"] == made.ids[5]
    assert by_image["neighbours"][0]["label"] == CLASSES[made.labels[5]]
    by_id = client.post("/search", json={"image_id": made.ids[5], "k": 7}).json()
    assert by_id["query"]["source"] == made.sources[5]
    del expected[made.ids[5]]  # not a neighbour of itself
    check_nearest(by_id["neighbours"], expected, 7)
    more = client.post("/search", json={"image_id": made.ids[5], "k": 50}).json()
    check_nearest(more["neighbours"], expected, 50)


def test_images_and_thumbnails(client: TestClient, made: Made) -> None:
    whole = client.get(f"/image/{made.ids[3]}")
    assert whole.content == made.images[made.ids[3]]
    assert whole.headers["content-type"] == "image/png"
    assert "sandbox" in whole.headers["content-security-policy"]
    small = client.get(f"/image/{made.ids[3]}?size=32")
    assert Image.open(io.BytesIO(small.content)).size == (32, 32)
    assert small.headers["cache-control"].startswith("private")
    for size in ("8", "99999", "-1", "many", "١٢٨"):
        refused(client.get(f"/image/{made.ids[3]}", params={"size": size}), 422)


@pytest.mark.parametrize(
    "image_id",
    [
        "0" * 32,
        "..%2f..%2fetc%2fpasswd",
        "é☃",
        "a%00",
        "%00",
        "x" * 5000,
        "%F0%9F%98%80",
        "' or 1=1",
    ],
)
def test_ids_that_are_none_are_not_found(client: TestClient, image_id: str) -> None:
    refused(client.get(f"/image/{image_id}"), 404)
    refused(client.get(f"/look/attention/{image_id}"), 404)
    refused(client.post("/search", json={"image_id": image_id}), 404)


def test_an_id_with_zero_bytes_is_another_one(client: TestClient, made: Made) -> None:
    refused(client.post("/search", json={"image_id": made.ids[0] + "\0"}), 404)
    refused(client.get(f"/image/{made.ids[0]}%00"), 404)


def test_looks_are_pictures(client: TestClient, made: Made) -> None:
    assert client.get("/set").json()["model"]["looks"] == ["attention", "components"]
    for what in ("attention", "components"):
        one = client.get(f"/look/{what}/{made.ids[2]}")
        assert Image.open(io.BytesIO(one.content)).size == (56, 56)
        sent = client.post(f"/look/{what}", content=made.images[made.ids[2]])
        assert one.headers["cache-control"] == "no-store"  # another model draws another
        assert sent.content == one.content
    assert "draws" in refused(client.get(f"/look/soul/{made.ids[2]}"), 404)


def test_rows_come_by_group(client: TestClient, made: Made) -> None:
    about = client.get("/set").json()
    assert about["count"] == 60
    groups = {g["name"]: g["groups"] for g in about["groupings"]}
    assert list(groups) == ["all", "label", "cluster"]
    assert {g["name"]: g["count"] for g in groups["label"]} == dict.fromkeys(CLASSES, 20)
    for name in groups:
        rows = client.get("/rows", params={"by": name, "count": 60}).json()["rows"]
        assert sorted(row["image_id"] for row in rows) == sorted(made.ids)
    labels = client.get("/rows", params={"by": "label", "count": 60}).json()["rows"]
    in_turn = [group["name"] for group in groups["label"] for _ in range(group["count"])]
    assert [row["label"] for row in labels] == in_turn
    for query in ("by=soul", "start=61", "start=-1", "count=0", "count=501", "count=x"):
        refused(client.get(f"/rows?{query}"), 422)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "image_id"),
        (b"[" * 100_000, "no JSON"),
        (b'{"k": 3}', "image_id"),
        (b'{"image_id": 5}', "image_id"),
        (b'{"image_id": "a", "colour": 1}', "no field 'colour'"),
        (b'{"image_id": "a", "k": 0}', "k must be"),
        (b'{"image_id": "a", "k": 1e9}', "k must be"),
        (b'{"image_id": "a", "k": 99999999999999999999}', "k must be"),
        (b'{"image_id": "a", "k": true}', "k must be"),
        (b'{"image_id": "a", "k": NaN}', "k must be"),
        (b'{"image_id": "a", "k": "; drop"}', "k must be"),
        (b"\xff\xfe\x00", "no JSON"),
    ],
)
def test_wrong_queries_are_refused(client: TestClient, body: bytes, said: str) -> None:
    answer = client.post("/search", content=body, headers={"Content-Type": "application/json"})
    assert said in refused(answer, 422)


def bomb(side: int) -> bytes:
    """A PNG of side x side white pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff" * (side // 8)) * side, 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_images_that_are_none_get_a_status(client: TestClient, made: Made) -> None:
    good = made.images[made.ids[0]]
    assert "0 bytes" in refused(client.post("/embed", content=b""), 422)
    assert "not_an_image" in refused(client.post("/embed", content=b"hello there" * 9), 415)
    assert "not_an_image" in refused(client.post("/search", content=b"<svg/>" * 9), 415)
    refused(client.post("/embed", content=good[: len(good) // 2]), 422)
    assert "too_large" in refused(client.post("/embed", content=bomb(8000)), 413)
    assert "more than" in refused(client.post("/embed", content=b"x" * 200_001), 413)
    assert "max_k" in refused(client.post("/search?k=51", content=good), 422)
    form = {"Content-Type": "multipart/form-data"}
    assert "boundary" in refused(client.post("/embed", content=good, headers=form), 422)
    named = {"Content-Type": "multipart/form-data; boundary=b"}
    body = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nvalue\r\n--b--\r\n'
    assert "no file" in refused(client.post("/embed", content=body, headers=named), 422)


def test_a_body_without_length_is_counted(client: TestClient) -> None:
    def chunks() -> object:
        for _ in range(30):
            yield b"x" * 10_000

    assert "more than" in refused(client.post("/embed", content=chunks()), 413)


def test_the_token_is_asked_for_everywhere_but_at_the_door(site: Site, made: Made) -> None:
    stranger = TestClient(build_app(site))
    paths = [f"/image/{made.ids[0]}", "/set", "/rows", "/look/attention/x", "/nothing"]
    for path in paths:
        assert "token" in refused(stranger.get(path), 401)
    for path in ("/embed", "/search", "/session", "/look/attention"):
        assert "token" in refused(stranger.post(path, content=b"x" * 300_000), 401)
    for header in ("Bearer wrong", f"Basic {TOKEN}", "Bearer", TOKEN, "Bearer \xe9"):
        refused(stranger.get("/set", headers={"Authorization": header.encode("latin-1")}), 401)
    assert stranger.get("/").status_code == 200
    assert stranger.get("/healthz").json() == {"status": "ok"}
    assert stranger.get("/page/page.js").status_code == 200
    assert stranger.get("/page/..%2fapp.py").status_code == 404
    assert TOKEN not in stranger.get("/").text

    entered = stranger.post("/session", headers={"Authorization": f"bearer {TOKEN}"})
    cookie = entered.headers["set-cookie"]
    assert entered.status_code == 204
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert stranger.get("/set").status_code == 200  # by the cookie that it has now
    stranger.cookies.clear()
    refused(stranger.get("/set", headers={"Cookie": "raydino-8123=wrong; a=b"}), 401)
    refused(stranger.get("/set", headers={"Cookie": f"raydino-9={TOKEN}"}), 401)
    for odd in ("a b=c", '{"x":"é"}', "x[0]=1", "=", "lonely", 'q="1;2'):  # of other ports
        sent = f"{odd}; raydino-8123={TOKEN}; z=1".encode()
        assert stranger.get("/set", headers={"Cookie": sent}).status_code == 200, odd


def test_without_a_token_everybody_may_ask(site: Site) -> None:
    stranger = TestClient(build_app(replace(site, gate=Gate("", 1))))
    assert stranger.get("/set").status_code == 200


def test_without_a_token_a_name_of_strangers_is_refused(site: Site) -> None:
    local = build_app(replace(site, gate=Gate("", 8000, local=True)))
    for host in ("127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "127.0.0.1"):
        assert TestClient(local).get("/set", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example:8000", "127.0.0.1.evil.example", "192.0.2.7", "localhost.x", ""):
        for path in ("/set", "/"):
            answer = TestClient(local).get(path, headers={"Host": host})
            assert "loopback" in refused(answer, 403), host
    with_token = build_app(replace(site, gate=Gate(TOKEN, 8000, local=True)))
    headers = {"Host": "behind.a.proxy", "Authorization": f"Bearer {TOKEN}"}
    assert TestClient(with_token).get("/set", headers=headers).status_code == 200


def test_more_requests_than_the_queue_holds_are_refused(site: Site, made: Made) -> None:
    """The model waits until all twelve have come: four are let in, eight are not."""

    class Waiting:
        facts, prepare = site.model.facts, staticmethod(site.model.prepare)  # type: ignore[union-attr]
        go = asyncio.Event()

        async def embed(self, image: object, want: str) -> np.ndarray:
            await self.go.wait()
            return np.zeros(64, np.float32)

    async def ask_all() -> list[int]:
        import httpx2

        app = build_app(replace(site, model=Waiting()))
        transport = httpx2.ASGITransport(app=app)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://x", headers=headers
        ) as client:
            image = made.images[made.ids[0]]
            tasks = [asyncio.create_task(client.post("/embed", content=image)) for _ in range(12)]
            done: list[object] = []
            while len(done) < 8:
                await asyncio.sleep(0.01)
                done = [task for task in tasks if task.done()]
            for task in done:
                assert "waiting" in refused(task.result(), 503)  # type: ignore[attr-defined]
                assert task.result().headers["retry-after"] == "1"  # type: ignore[attr-defined]
            assert (await client.get("/healthz")).status_code == 200
            Waiting.go.set()
            statuses = [(await task).status_code for task in tasks]
            assert (await client.post("/embed", content=image)).status_code == 200
            return statuses

    assert sorted(asyncio.run(ask_all())) == [200] * 4 + [503] * 8


def test_other_methods_and_addresses(client: TestClient, made: Made) -> None:
    assert client.head(f"/image/{made.ids[0]}?size=64").status_code == 200
    assert client.head("/").status_code == 200
    assert "POST" in refused(client.options("/embed"), 405)
    assert "POST" in refused(client.get("/embed"), 405)
    refused(client.delete("/search"), 405)
    refused(client.get("/admin"), 404)


def test_every_answer_has_the_headers_of_a_careful_page(client: TestClient) -> None:
    for path in ("/", "/set", "/nothing", "/page/wall.js"):
        headers = client.get(path).headers
        assert headers["content-security-policy"] == POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
    assert "unsafe" not in POLICY
    page = client.get("/").text
    assert "http://" not in page
    assert "https://" not in page
    assert "<script>" not in page
    assert " style=" not in page


def test_names_of_strangers_stay_data(client: TestClient) -> None:
    rows = client.get("/rows").json()["rows"]
    assert EVIL in json.dumps(rows)
    assert EVIL not in client.get("/").text


def test_what_is_not_there_is_said(site: Site, made: Made) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    bare = TestClient(build_app(replace(site, collection=None)), headers=headers)
    assert bare.get("/set").json()["count"] == 0
    assert "vectors" in refused(bare.get("/rows"), 404)
    assert "vectors" in refused(bare.post("/search", content=encoded(0, 1)), 404)
    assert bare.post("/embed", content=encoded(0, 1)).status_code == 200
    still = TestClient(build_app(replace(site, model=None)), headers=headers)
    assert "model" in refused(still.post("/embed", content=encoded(0, 1)), 404)
    assert "model" in refused(still.post("/search", content=encoded(0, 1)), 404)
    assert still.post("/search", json={"image_id": made.ids[0]}).status_code == 200
    blind = replace(site.collection, image=None)  # type: ignore[type-var]
    unseen = TestClient(build_app(replace(site, collection=blind)), headers=headers)
    assert unseen.get("/set").json()["images"] is False
    assert "shards" in refused(unseen.get(f"/image/{made.ids[0]}"), 404)


def test_a_fault_of_ours_is_one_sentence_too(site: Site) -> None:
    broken = replace(site.collection, groupings=None)  # type: ignore[type-var]
    app = build_app(replace(site, collection=broken))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    client = TestClient(app, headers=headers, raise_server_exceptions=False)
    assert "log" in refused(client.get("/rows"), 500)
