"""What MLflow's pages show, read back by MLflow's own client and drawn by its own page."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.track import ModelCard, TrackSettings, links, open_pipeline
from pipeline.track.mlflow_writer import Writer
from pipeline.track.pages import charts, pictures
from pipeline.track.state import Known
from pipeline.uri import public
from tests.serve.browser import chromium, new_page

ROOT = Path(__file__).parents[2]


def test_the_view_names_metrics_that_are_documented() -> None:
    view = json.loads(charts.view())
    documented = (ROOT / "docs" / "metrics.md").read_text()
    names = [card["metricKey"] for card in view["compareRunCharts"]]
    assert names[:3] == ["eval/knn20_top1", "eval/knn20_top1_final", "loss/total"]
    for name in names:
        section, _, metric = name.partition("/")
        assert f"`{name}`" in documented or f"`{section}/{metric}`" in documented, name
    sections = {one["uuid"]: one["name"] for one in view["compareRunSections"]}
    assert list(sections.values()) == ["eval", "loss", "health"]
    for card in view["compareRunCharts"]:
        assert sections[card["metricSectionId"]] == card["metricKey"].partition("/")[0]
    assert "metrics.`eval/rank_me_final`" in charts.view("eval/rank_me")
    assert len(charts.view()) < 5_000  # the oldest limit of a tag of an experiment
    assert charts.view() == charts.view()  # the tag is written only where it changes


def test_the_links_are_printed_whole() -> None:
    for line in links("http://10.0.0.4:5000", "photos", "1", "8be11f0f"):
        assert public(line) == line
    assert line.endswith(f"viewStateShareKey={charts.KEY}")


def test_the_installed_mlflow_opens_shared_views_and_knows_each_part() -> None:
    """Should MLflow rename a part, the link would open its own arrangement, without a word."""
    spec = find_spec("mlflow")
    assert spec and spec.submodule_search_locations
    built = Path(spec.submodule_search_locations[0]) / "server" / "js" / "build" / "static" / "js"
    if not built.is_dir():
        pytest.skip("this MLflow has no pages")
    source = "".join(path.read_text(errors="replace") for path in sorted(built.glob("*.js")))
    assert charts.TAG.removesuffix(charts.KEY) in source and "viewStateShareKey" in source
    view = json.loads(charts.view())
    parts = [*view, *view["compareRunSections"][0], *view["compareRunCharts"][0]]
    assert not [name for name in parts if not re.search(rf"\b{name}\b", source)]


def test_words_stand_above_a_picture_and_leave_it_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    picture = Image.fromarray(pixels)
    assert pictures.with_caption(picture, "") is picture
    shown = np.asarray(pictures.with_caption(picture, "Step 5. Images, a row for each of them."))
    top = next(y for y in range(len(shown)) if np.array_equal(shown[y], pixels[0]))
    assert shown.shape[1] == 120 and np.array_equal(shown[top : top + 90], pixels)
    words = shown[:top]
    assert words.min() < 100 < 250 < words.max()  # ink on paper
    assert (words.min(axis=(1, 2)) < 128).sum() > 25  # several lines


def test_the_newest_picture_stands_beside_the_first(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    pixels = {step: draw.integers(0, 256, (40, 40, 3), np.uint8) for step in (0, 20, 60)}
    for step, one in pixels.items():
        Image.fromarray(one).save(tmp_path / f"patch_pca-{step:08d}.png")
    first = pictures.shown(tmp_path / "patch_pca-00000000.png", 0, "Parts.")
    assert list(first) == [""] and first[""][1] == 0
    shown = pictures.shown(tmp_path / "patch_pca-00000060.png", 60, "Parts.")
    assert list(shown) == ["", "first and last step/patch_pca"]
    assert shown[""][1] == 60
    sheet, step = shown["first and last step/patch_pca"]
    assert step == 0  # the only one, which a card of MLflow shows unasked
    both = np.asarray(sheet)
    top = next(y for y in range(both.shape[0]) if np.array_equal(both[y, :40], pixels[0][0]))
    assert np.array_equal(both[top : top + 40, :40], pixels[0])
    assert np.array_equal(both[top : top + 40, -40:], pixels[60])


@pytest.fixture(scope="module")
def told(started_server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two runs of one experiment, as MLflow's client reads them."""
    folder = tmp_path_factory.mktemp("told")
    for name, rate in (("a", 1), ("b", 2)):
        settings = TrackSettings(str(folder / name), "", "told", started_server.uri)
        recipe = {"optim.lr": rate, "optim.steps": 30} | {f"head.x{i}": i for i in range(120)}
        tags = {"recipe": name, "curated": "no"}
        with open_pipeline(settings, name, tags=tags) as pipeline:
            pipeline.tracker.params({"rate": rate, "image size": 48})
            pipeline.tracker.recipe(recipe)
            pipeline.tracker.recipe(recipe)  # once more at the end of a chain
            pipeline.tracker.dataset("photos/", "d" * 32, "photos/", "training", 30)
            stage = pipeline.stage("pretrain")
            for step in range(0, 31, 10):
                values = {"eval/knn20_top1": step / 40, "health/feature_std": 0.5}
                stage.metrics(step, values | {"perf/step_s": 1.0, "data/bad_images": 0})
                stage.headline(step, values | {"loss/total": 9.0 - step})
                pixels = np.full((32, 32, 3), step, np.uint8)
                stage.picture("neighbours", step, pixels, "A row for each query.")
            stage.headline(30, {"eval/knn20_top1_final": 0.75})
            if name == "b":
                for one in (stage, pipeline.tracker):
                    one.tags({"status": "guarded"})
            pipeline.tracker.note("Learnt: k-NN 0.75.\n\n| what | k-NN |\n| --- | --- |")
    return {name: started_server.runs("told", name) for name in ("a", "b")}


def test_the_pipelines_page_is_complete(told: dict[str, Any], mlflow_server: Any) -> None:
    run = told["a"]["pipeline"]
    assert run.data.params["image size"] == "48" and run.data.params["yaml/optim.lr"] == "1"
    assert len(run.data.params) == 2 + 122  # more than one call of MLflow takes
    differs = {
        key
        for key, value in run.data.params.items()
        if told["b"]["pipeline"].data.params[key] != value
    }
    assert differs == {"rate", "yaml/optim.lr"}  # what `Compare` shows
    tags = run.data.tags
    assert tags["mlflow.source.type"] == "LOCAL" and tags["mlflow.source.name"]
    assert tags["mlflow.user"] and tags["command"].startswith(tags["mlflow.source.name"])
    assert tags["mlflow.note.content"].startswith("Learnt")
    assert [one.dataset.name for one in run.inputs.dataset_inputs] == ["photos/"]
    assert "data/bad_images" not in told["a"]["pretrain"].data.metrics  # always 0
    experiment = mlflow_server.client.get_experiment_by_name("told")
    assert experiment.tags[charts.TAG] == charts.view()
    assert experiment.tags["mlflow.note.content"] == charts.NOTE


def test_runs_are_found_by_their_status(told: dict[str, Any], mlflow_server: Any) -> None:
    client = mlflow_server.client
    experiment = client.get_experiment_by_name("told").experiment_id
    for status, name in (("finished", "a"), ("guarded", "b")):
        where = f"tags.status = '{status}' and tags.stage = 'pipeline'"
        runs = client.search_runs([experiment], where)
        assert [run.data.tags["recipe"] for run in runs] == [name]
        assert runs[0].info.status == "FINISHED"


def test_a_note_of_the_users_stays(tmp_path: Path, mlflow_server: Any) -> None:
    client = mlflow_server.client
    experiment = client.create_experiment("noted", tags={"mlflow.note.content": "Mine."})
    settings = TrackSettings(str(tmp_path / "run"), "", "noted", mlflow_server.uri)
    with open_pipeline(settings, "run") as pipeline:
        pipeline.stage("pretrain")
    tags = client.get_experiment(experiment).tags
    assert tags["mlflow.note.content"] == "Mine." and charts.TAG in tags


def test_who_may_not_arrange_charts_still_has_runs(caplog: pytest.LogCaptureFixture) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE

    class Client:
        code = PERMISSION_DENIED

        def get_experiment(self, name: str) -> Any:
            raise MlflowException("no", error_code=self.code)

    writer = Writer.__new__(Writer)
    writer.client, writer.known, writer._said = Client(), Known(), set()
    event = {"run": "pipeline", "open": {"name": "a"}}
    writer._view(event)
    writer._view(event)
    assert caplog.text.count("not in our order") == 1
    Client.code = TEMPORARILY_UNAVAILABLE  # is tried again, as all that the server did not take
    with pytest.raises(MlflowException):
        writer._view(event)


@pytest.mark.slow
def test_mlflow_draws_the_charts_in_this_order(told: dict[str, Any], mlflow_server: Any) -> None:
    client = mlflow_server.client
    experiment = client.get_experiment_by_name("told").experiment_id
    pipeline = told["a"]["pipeline"].info.run_id
    link = links(mlflow_server.uri, "told", experiment, pipeline)[-1].split()[-1]
    stage = told["a"]["pretrain"].info.run_id
    pages = f"{mlflow_server.uri}/#/experiments/{experiment}/runs/{stage}/model-metrics"
    with chromium() as browser:
        page = new_page(browser, viewport={"width": 1280, "height": 2000})
        page.goto(link)
        page.get_by_text("knn20_top1").first.wait_for()
        text = page.inner_text("body")
        assert re.findall(r"^(\w+)\s*\(\d+\)$", text, re.MULTILINE) == ["eval", "loss", "health"], (
            text
        )
        page.goto(f"{pages}?workflowType=machine_learning")
        page.get_by_text("first and last step/neighbours").first.wait_for()
        shown = page.locator("img[src*='first']").first
        shown.wait_for()
        assert page.get_by_text("No image logged at this step").count() == 0


@pytest.mark.slow
def test_the_models_page_is_complete(tmp_path: Path, mlflow_server: Any) -> None:
    import torch

    from pipeline.model.vit import BackboneSpec
    from pipeline.model.weights import save_backbone

    spec = BackboneSpec(image_size=28, patch_size=14, width=48, depth=1, heads=3)
    torch.manual_seed(0)
    folder = tmp_path / "run" / "weights"
    save_backbone(spec.build().eval(), spec, folder)
    settings = TrackSettings(str(tmp_path / "run"), "", "model-page", mlflow_server.uri)
    with open_pipeline(settings, "run") as pipeline:
        tracker = pipeline.stage("export")
        tracker.dataset("test/", "e" * 64, "test/", "evaluation", 20)
        card = ModelCard(
            "page-test",
            0.5,
            "Learnt.",
            metrics={"eval/knn20_top1": 0.5},
            page="Learnt.\n\nload_model(MODEL_URI)",
            tags={"recipe": "run", "licence.code": "Apache-2.0"},
            data=("test/", "e" * 64),
        )
        tracker.model(folder, card)
    client = mlflow_server.client
    version = client.get_model_version_by_alias("page-test", "best")
    assert version.description == "Learnt." and version.tags["licence.code"] == "Apache-2.0"
    assert "page-test@best" in client.get_registered_model("page-test").description
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.tags["mlflow.note.content"].endswith("load_model(models:/page-test/1)")
    assert model.tags["recipe"] == "run"
    metric = model.metrics[0]
    assert (metric.key, metric.dataset_name, metric.dataset_digest) == (
        "eval/knn20_top1",
        "test/",
        "e" * 36,
    )
    runs = mlflow_server.runs("model-page", "run")
    for stage in ("export", "pipeline"):  # both pages show it
        assert [one.model_id for one in runs[stage].outputs.model_outputs] == [model.model_id]
