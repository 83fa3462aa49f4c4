"""What HTTP costs: a bare model in a loop against `jobs/serve.py`, and the first view of its page.

    python benchmarks/serve.py
    python benchmarks/serve.py --seconds 5 --turns 2 --first-view 100000

A ViT-S/16 with random weights at 224 pixels, one thread, batches of 32; JPEGs of 320 x 240 pixels,
noise that was blurred. `bare` decodes, prepares and embeds in one thread. `model` embeds what is
prepared already. Then so many clients send images one after the other, each waiting for its answer.
All take turns, so that a loaded machine slows all of them; the best turn of each counts.

Application: the CPU that a request takes beside the model, without Ray: HTTP, token, decoding,
preparing, JSON, with a model that answers at once, beside the CPU of the bare model.

First view: a table of so many images (their pictures repeat), in the order of the shards, by label
and by cluster. `requests` is what the endpoint needs for the page, its rows and the thumbnails of a
screen, asked for over six connections as browsers do. `Chromium` is from opening the address until
every thumbnail in view is there; `--no-browser` leaves it out.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image, ImageFilter

from pipeline.embed.embedders import embedder_of, open_embedder
from pipeline.images.decode import decode_image
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_backbone
from pipeline.serve.app import Site, build_app
from pipeline.serve.deployment import facts_of
from pipeline.serve.intake import Limits, Pixels
from pipeline.serve.opening import checked, opened
from pipeline.serve.token import Gate

ROOT = Path(__file__).resolve().parents[1]
BATCH, CLIENTS, TOKEN = 32, (1, 8, 32), "token-of-a-benchmark"
VIEW, SCREEN = (1200, 800), 80  # pixels, and the cells that fit


def photo(seed: int, width: int = 320, height: int = 240) -> bytes:
    """A JPEG with the sizes of a photograph."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height)).filter(ImageFilter.GaussianBlur(2))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def save_model(folder: Path) -> str:
    torch.manual_seed(0)
    spec = BackboneSpec(image_size=224, patch_size=16, width=384, depth=12, heads=6, registers=0)
    save_backbone(spec.build(), spec, folder)
    return str(folder)


def loop(call: Callable[[list[bytes]], object], photos: list[bytes], seconds: float) -> float:
    """Images a second of a function of batches."""
    begun, images = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        call([photos[(images + i) % len(photos)] for i in range(BATCH)])
        images += BATCH
    return images / (time.perf_counter() - begun)


async def over_http(
    address: str, photos: list[bytes], clients: int, seconds: float
) -> tuple[float, float]:
    """Images a second of so many clients, and the median time of a request in ms."""
    import aiohttp

    times: list[float] = []
    begun = time.perf_counter()
    headers = {"Authorization": f"Bearer {TOKEN}"}

    async def client(session: Any, number: int) -> None:
        turn = number
        while time.perf_counter() - begun < seconds:
            asked = time.perf_counter()
            async with session.post(f"{address}embed", data=photos[turn % len(photos)]) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            times.append(time.perf_counter() - asked)
            turn += clients

    async with aiohttp.ClientSession(headers=headers) as session:
        await asyncio.gather(*(client(session, i) for i in range(clients)))
    return len(times) / (time.perf_counter() - begun), 1000 * statistics.median(times)


def throughput(folder: Path, seconds: float, turns: int) -> None:
    model = save_model(folder / "weights")
    photos = [photo(seed) for seed in range(256)]
    embedder = open_embedder(embedder_of(model))
    prepared = [embedder.prepare(decode_image(one)) for one in photos[:BATCH]]

    def bare(batch: list[bytes]) -> object:
        return embedder.outputs([embedder.prepare(decode_image(one)) for one in batch])

    job = subprocess.Popen(
        [sys.executable, ROOT / "jobs" / "serve.py", f"model={model}", "port=0",
         f"serve.batch_size={BATCH}", "resources.object_store_gb=0.2"],
        env=os.environ | {"RAYDINO_TOKEN": TOKEN}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert job.stdout
    address = next(m[1] for line in job.stdout if (m := re.search(r"(http://\S+/)#", line)))
    results: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    try:
        asyncio.run(over_http(address, photos, 8, 2))  # warm
        bare(photos[:BATCH])
        for _ in range(turns):
            results.setdefault("bare", []).append(loop(bare, photos, seconds))
            model_alone = loop(lambda _: embedder.outputs(prepared), photos, seconds)
            results.setdefault("model", []).append(model_alone)
            for clients in CLIENTS:
                rate, wait = asyncio.run(over_http(address, photos, clients, seconds))
                results.setdefault(f"{clients} clients", []).append(rate)
                waits.setdefault(f"{clients} clients", []).append(wait)
    finally:
        job.terminate()
        job.wait(60)
    best = {name: max(rates) for name, rates in results.items()}
    print(f"load {os.getloadavg()[0]:.1f}, {turns} turns of {seconds:g} s")
    print(f"{'':12} images/s  of bare  of model  median ms")
    for name, rate in best.items():
        wait = f"{min(waits[name]):9.1f}" if name in waits else ""
        share = rate / best["bare"], rate / best["model"]
        print(f"{name:12} {rate:8.1f} {share[0]:8.2f} {share[1]:9.2f}  {wait}")


def ask_for(seconds: float, port: int, clients: int, answered: Any) -> None:
    """In a process of its own: images a second."""
    photos = [photo(seed) for seed in range(64)]
    rate, _ = asyncio.run(over_http(f"http://127.0.0.1:{port}/", photos, clients, seconds))
    answered.put(rate * seconds)


def application(folder: Path, seconds: float) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.serve.browser import serving

    embedder = open_embedder(embedder_of(save_model(folder / "bare")))
    photos = [photo(seed) for seed in range(64)]

    class AtOnce:
        facts = facts_of(embedder)
        prepare = staticmethod(embedder.prepare)
        vector = np.zeros(embedder.dim, np.float32)

        async def embed(self, image: Any, want: str) -> Any:
            return self.vector

        async def look(self, image: Any, what: str) -> Any:
            raise NotImplementedError

    begun = time.process_time()
    images = seconds * loop(
        lambda batch: embedder.outputs([embedder.prepare(decode_image(one)) for one in batch]),
        photos,
        seconds,
    )
    print(f"\nbare model: {1000 * (time.process_time() - begun) / images:.1f} ms of CPU an image")
    limits = Limits(10**7, 10**8, 100, 30)
    site = Site(Gate(TOKEN, 1), limits, 64, Pixels(), None, AtOnce())
    spawn = multiprocessing.get_context("spawn")
    with serving(build_app(site)) as port:
        for clients in CLIENTS:
            answered = spawn.Queue()
            client = spawn.Process(target=ask_for, args=(seconds, port, clients, answered))
            before = time.process_time()
            client.start()
            images = answered.get(timeout=120)
            used = time.process_time() - before
            client.join()
            print(f"application, {clients} clients: {1000 * used / images:.1f} ms of CPU a request")


async def first_answers(port: int, by: str) -> tuple[int, float]:
    """Thumbnails of a screen, and seconds until the last one is there."""
    import aiohttp

    headers = {"Authorization": f"Bearer {TOKEN}"}
    connections = aiohttp.TCPConnector(limit=6)  # of a browser to one host
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{port}", headers=headers, connector=connections
    ) as session:

        async def get(path: str) -> bytes:
            async with session.get(path) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.read()

        begun = time.perf_counter()
        await asyncio.gather(*map(get, ("/", "/page/page.js", "/page/wall.js", "/page/page.css")))
        await get("/set")
        rows = json.loads(await get(f"/rows?by={by}&start=0&count=200"))["rows"][:SCREEN]
        await asyncio.gather(*(get(f"/image/{row['image_id']}?size=128") for row in rows))
        return len(rows), time.perf_counter() - begun


def first_view(folder: Path, rows: int, browser: bool) -> None:
    sys.path.insert(0, str(ROOT))  # for what the tests have
    from tests.serve import made
    from tests.serve.browser import chromium, serving

    photos = [photo(seed, 128, 96) for seed in range(500)]
    pictures = [photos[i % len(photos)] for i in range(rows)]
    ids = [f"{i * 0x9E3779B97F4A7C15 % 2**128:032x}" for i in range(rows)]
    sources = [f"photos/{i:06}.jpg" for i in range(rows)]
    labels = [i % 3 for i in range(rows)]
    made.write_shard(folder / "shard.parquet", pictures, sources, labels, ids, rows_per_group=256)
    vectors = np.random.default_rng(0).standard_normal((rows, 384)).astype(np.float32)
    facts = made.facts_of(embedder_of("descriptor"), 384, str(folder / "shard.parquet"))
    made.write_vectors(folder / "vectors", vectors, ids, sources, labels, facts)
    begun = time.perf_counter()
    served = checked("", str(folder / "vectors"))
    assert served.vectors is not None
    collection = opened(served.vectors)
    print(f"\n{rows:,} images: opened in {time.perf_counter() - begun:.1f} s")
    limits = Limits(10**7, 10**8, 100, 30)
    site = Site(Gate(TOKEN, 1), limits, 64, Pixels(), collection)
    with serving(build_app(site)) as port:
        for by in collection.groupings:
            shown, seconds = asyncio.run(first_answers(port, by))
            print(f"requests  by {by:8} {shown} thumbnails in {seconds:.2f} s")
    if not browser:
        return
    width, height = VIEW
    complete = (
        "[...document.querySelectorAll('.cell')].every(c => c.querySelector('img')?.complete)"
    )
    with serving(build_app(site)) as port, chromium() as started:
        for by in ("all", "label", "cluster"):
            # The page's policy forbids eval, by which Playwright waits for a condition.
            page = started.new_page(viewport={"width": width, "height": height}, bypass_csp=True)
            begun = time.perf_counter()
            page.goto(f"http://127.0.0.1:{port}/#token={TOKEN}")
            page.wait_for_selector(".cell")
            if by != "all":
                begun = time.perf_counter()
                page.select_option("#by", by)
                page.wait_for_selector(".group-name")
            page.wait_for_function(complete)
            seconds, shown = time.perf_counter() - begun, page.locator(".cell").count()
            print(f"Chromium  by {by:8} {shown} thumbnails in {seconds:.2f} s")
            page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--first-view", type=int, default=100_000, help="images; 0: left out")
    parser.add_argument("--application", action="store_true", help="CPU beside the model, no Ray")
    parser.add_argument("--no-browser", action="store_true", help="the requests of a view alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.turns:
            throughput(Path(folder), options.seconds, options.turns)
        if options.application:
            application(Path(folder), options.seconds)
        if options.first_view:
            first_view(Path(folder), options.first_view, not options.no_browser)


if __name__ == "__main__":
    main()
