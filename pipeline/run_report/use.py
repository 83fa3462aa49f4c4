"""How to go on: the pages of the run, MLflow, and lines that load the weights."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.report.page import Code, Heading, Links, Section
from pipeline.run_report.facts import RunFacts
from pipeline.run_report.words import stage_name
from pipeline.uri import public

TITLES = {
    "evaluate": "All scores and mistakes",
    "adapt": "Scores before",
    "search": "Search page",
    "look": "Pictures of patches",
    "curate": "Curation",
}
OURS = """from pipeline import api

embedder = api.open_embedder(api.embedder_of({model!r}))
vectors = api.embed(embedder, ["a.jpg", "b.jpg"])  # one row for each image"""
HUGGINGFACE = """from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained({folder!r})
model = AutoModel.from_pretrained({folder!r}).eval()"""
TIMM = """import timm

model = timm.create_model("local-dir:" + {folder!r}, pretrained=True).eval()"""


def page_links(facts: RunFacts) -> Iterator[Section]:
    """The pages that stages wrote, beside the report, and the run in MLflow."""
    home = f"{facts.folder.at()}/"
    links: list[tuple[str, str]] = []
    for stage in ("search", "evaluate", "curate", "look", "adapt", *facts.results):
        page = str(facts.result(stage).get("page", ""))
        if stage == "curate" and (facts.path / "curate" / "report.html").is_file():
            page = "curate/report.html"
        words = TITLES.get(stage, stage_name(stage).capitalize())
        if stage == "evaluate" and not (facts.card and facts.card.confusion.images):
            words = "All scores"
        if page and words not in [known for known, _ in links]:
            links.append((words, public(page.removeprefix(home))))
    if address := facts.mlflow():
        links.append(("MLflow", address))
    if links:
        yield Links(links)


def use_sections(facts: RunFacts) -> Iterator[Section]:
    """Lines to copy that load what was trained."""
    formats = facts.result("export").get("formats", {})
    if not formats:
        return
    others = {"huggingface", "timm", "dinov2"} & set(formats) or facts.result("export").get("onnx")
    whose = "other programs load the same weights" if others else "only this package loads them"
    yield Heading("Use it", f"Lines to copy; {whose}.")
    yield Code(OURS.format(model=facts.place), "With this package")
    for name, text, title in (
        ("huggingface", HUGGINGFACE, "With transformers"),
        ("timm", TIMM, "With timm"),
    ):
        if name in formats and not facts.folder.uri:  # other programs read folders, no URIs
            folder = public(facts.folder.at("weights", name))
            yield Code(text.format(folder=folder), title)
            break
