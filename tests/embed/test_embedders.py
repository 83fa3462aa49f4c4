"""What each kind of model gives, against the models of other libraries and plain loops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.curate.images.descriptor import describe
from pipeline.embed import embedders
from pipeline.embed.embedders import EmbedderSpec, embedder_of, open_embedder
from pipeline.embed.forward import UNMODELLED
from pipeline.embed.load import at_hand, preprocessing_of
from pipeline.errors import DataError, PipelineError
from pipeline.evaluate.baselines import colour_vectors, pixel_vectors
from pipeline.images.decode import decode_image
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.formats import timm_transform
from pipeline.model.vit import VisionTransformer
from pipeline.model.weights import save_backbone, save_huggingface, save_timm
from pipeline.views.crops import resize_centre_crop
from tests.curate.images import scene
from tests.embed.conftest import IMAGES, MEAN, SPEC, STD

ALL = ("cls", "mean", "patches", "blocks")


def pixels() -> list[np.ndarray[Any, Any]]:
    return [resize_centre_crop(decode_image(image), 28) for image in IMAGES]


def normalised() -> torch.Tensor:
    x = torch.from_numpy(np.stack(pixels())).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.mark.long
@torch.no_grad()
def test_outputs_are_those_of_transformers(backbone: VisionTransformer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save_huggingface(backbone, SPEC, tmp_path / "hf", Preprocessing(28, MEAN, STD))
    embedder = open_embedder(embedder_of(str(folder), batch_size=4))
    assert (embedder.dim, embedder.size, embedder.channels, embedder.patch_size) == (32, 28, 3, 7)
    assert embedder.registers == 2 and (embedder.mean, embedder.std) == (MEAN, STD)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    theirs = model(pixel_values=normalised(), output_hidden_states=True)
    tokens = theirs.last_hidden_state
    prepared = [embedder.prepare(decode_image(image)) for image in IMAGES]
    ours = embedder.outputs(prepared, ALL, blocks=2)
    np.testing.assert_allclose(ours["cls"], tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(ours["mean"], tokens[:, 3:].mean(1), atol=1e-5)
    assert ours["patches"].dtype == np.float16 and ours["patches"].shape == (11, 16, 32)
    np.testing.assert_allclose(ours["patches"], tokens[:, 3:], atol=4e-3)
    blocks = torch.stack([model.layernorm(h)[:, 0] for h in theirs.hidden_states[-2:]], 1)
    np.testing.assert_allclose(ours["blocks"], blocks, atol=1e-5)
    alone = embedder.outputs(prepared)["cls"]
    np.testing.assert_allclose(alone, ours["cls"], atol=1e-6)


@pytest.mark.long
def test_a_timm_model_gives_what_ours_gives(backbone: VisionTransformer, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    folder = save_timm(backbone, SPEC, tmp_path / "timm", Preprocessing(28, MEAN, STD))
    spec = embedder_of(f"timm:local-dir:{folder}")
    embedder = open_embedder(spec)
    assert (embedder.mean, embedder.size, embedder.registers) == (MEAN, 28, 2)
    ours = open_embedder(embedder_of(str(folder), batch_size=4)).outputs(pixels(), ALL, 2)
    theirs = open_embedder(spec).outputs(pixels(), ALL, 2)
    for name in ALL:  # float16 may round to the neighbour
        close = 4e-3 if name == "patches" else 1e-5
        np.testing.assert_allclose(theirs[name], ours[name], atol=close)
    assert spec.digest == embedder_of(f"timm:local-dir:{folder}").digest
    with pytest.raises(DataError, match="takes no images of 30 x 30 pixels"):
        open_embedder(embedder_of(f"timm:local-dir:{folder}", image_size=30))
    with pytest.raises(PipelineError, match="has no model 'vit_nothing'"):
        embedder_of("timm:vit_nothing")


def test_the_descriptor_is_that_of_the_curation() -> None:
    embedder = open_embedder(EmbedderSpec())
    images = [scene(n, 50, 90) for n in range(3)]
    vectors = embedder.outputs([embedder.prepare(image) for image in images])["cls"]
    assert vectors.dtype == np.float32 and embedder.dim == 143
    np.testing.assert_array_equal(vectors, np.stack([describe(image)[0] for image in images]))


def test_batches_are_cut_from_the_front(spec: EmbedderSpec) -> None:
    embedder = open_embedder(spec)
    whole = embedder.outputs(pixels(), ALL)
    parts = [embedder.outputs(pixels()[a:b], ALL) for a, b in ((0, 4), (4, 8), (8, 11))]
    for name in ALL:
        np.testing.assert_array_equal(whole[name], np.concatenate([p[name] for p in parts]))
    assert embedder.outputs([], ALL)["blocks"].shape == (0, 4, 32)


def test_pixels_and_colours_are_those_of_the_prepared_images(spec: EmbedderSpec) -> None:
    embedder = open_embedder(spec)
    outputs = embedder.outputs(pixels(), ("colours", "cls", "pixels", "mean"))
    images = np.stack(pixels())
    np.testing.assert_array_equal(outputs["pixels"], pixel_vectors(images))
    np.testing.assert_array_equal(outputs["colours"], colour_vectors(images))
    alone = embedder.outputs(pixels(), ("cls",))  # and the model gives what it gives without them
    np.testing.assert_allclose(outputs["cls"], alone["cls"], atol=1e-6)
    unmodelled = embedder.outputs(pixels(), UNMODELLED)
    assert set(unmodelled) == set(UNMODELLED)
    np.testing.assert_array_equal(unmodelled["pixels"], outputs["pixels"])
    none = embedder.outputs([], UNMODELLED)
    assert {name: x.shape for name, x in none.items()} == {"pixels": (0, 768), "colours": (0, 512)}
    with pytest.raises(DataError, match="small grey images, which have no colours"):
        open_embedder(EmbedderSpec()).outputs([], ["cls", "colours"])


def test_what_a_model_does_not_have_is_said(spec: EmbedderSpec, tmp_path: Path) -> None:
    embedder = open_embedder(spec)
    with pytest.raises(DataError, match="has 4 blocks, 5 were asked for"):
        embedder.outputs(pixels(), ["blocks"], 5)
    with pytest.raises(DataError, match="there is no output CLS"):
        embedder.outputs(pixels(), ["CLS"])
    with pytest.raises(DataError, match="descriptor gives no patch tokens, so it has no mean"):
        open_embedder(EmbedderSpec()).outputs([], ["mean"])
    with pytest.raises(DataError, match="gives nothing of single blocks"):
        open_embedder(EmbedderSpec()).outputs([], ["blocks"])
    with pytest.raises(DataError, match="takes images of 3 channels, but mean and std have 1"):
        open_embedder(embedder_of(spec.name, mean=[0.5], std=[0.5]))


def test_a_run_folder_without_a_checkpoint(weights: Path, tmp_path: Path) -> None:
    for name in ("empty", "exported"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("{}")
    place = tmp_path / "runs" / "exported" / "weights" / "dinov2"
    place.parent.mkdir()
    place.symlink_to(weights)
    (tmp_path / "runs" / "trained" / "checkpoints" / "step-00000005").mkdir(parents=True)
    runs = str(tmp_path / "runs")
    assert at_hand(runs) == f"{runs}/exported, {runs}/trained"
    with pytest.raises(PipelineError, match="run folder without a checkpoint") as error:
        embedder_of("empty", folder=runs)
    assert error.value.hint.endswith(f"at hand are {runs}/exported, {runs}/trained")
    assert open_embedder(embedder_of("exported", folder=runs)).dim == 32
    (tmp_path / "runs" / "empty" / "finetune").mkdir()
    (tmp_path / "runs" / "empty" / "finetune" / "huggingface").symlink_to(weights)
    assert open_embedder(embedder_of("empty", folder=runs)).dim == 32  # of its classifier
    assert at_hand(runs).startswith(f"{runs}/empty, ")
    with pytest.raises(PipelineError, match="there is no"):
        embedder_of("nothing", folder=runs)
    (tmp_path / "photos").mkdir()
    with pytest.raises(PipelineError, match=r"photos is a folder without a config\.json"):
        embedder_of(str(tmp_path / "photos"))


def test_what_stands_beside_weights(tmp_path: Path) -> None:
    def beside(name: str, **content: Any) -> str:
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path)

    assert preprocessing_of(str(tmp_path)).image_size is None
    timm = {"input_size": [3, 98, 98], "mean": MEAN, "std": STD, "value_range": [0, 4095]}
    known = preprocessing_of(beside("config.json", pretrained_cfg=timm))
    assert (known.image_size, known.mean, known.value_range) == (98, MEAN, (0, 4095))
    sizes = {"crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 64}}
    known = preprocessing_of(
        beside("preprocessor_config.json", image_mean=MEAN, image_std=STD, **sizes)
    )
    assert (known.image_size, known.std, known.value_range) == (56, STD, "full")
    with pytest.raises(DataError, match="no lists of numbers"):
        preprocessing_of(beside("preprocessor_config.json", image_mean=["a"], image_std=STD))


def test_weights_that_keep_the_shape_of_an_image_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    square = {"height": 64, "width": 64}
    squash = timm_transform(Preprocessing(56, MEAN, STD))
    for number, (name, content, said) in enumerate(
        [
            ("preprocessor_config.json", {"size": square, "crop_size": 56}, False),
            ("preprocessor_config.json", {"size": {"shortest_edge": 64}, "crop_size": 56}, True),
            ("config.json", {"pretrained_cfg": squash}, False),
            ("config.json", {"pretrained_cfg": squash | {"crop_mode": "center"}}, True),
            ("config.json", {"width": 64}, False),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        caplog.clear()
        preprocessing_of(str(folder))
        preprocessing_of(str(folder))
        assert caplog.text.count("cuts its sides off") == said, (name, content)


@pytest.mark.long
def test_the_teacher_of_a_run_by_path_and_by_name(tmp_path: Path) -> None:
    from pipeline.config.load import load
    from pipeline.plan.layout import Machine
    from pipeline.shards.shards import open_shards
    from pipeline.train import build
    from pipeline.train.checkpoint import state
    from pipeline.train.run import plan_for
    from tests.tiny import write_tiny

    table = pa.table({"image": [b"x"] * 40, "label": list(range(40))})
    pq.write_table(table, tmp_path / "s.parquet")
    config = load([str(write_tiny(tmp_path / "tiny.yaml"))])
    plan = plan_for(
        config, open_shards(str(tmp_path / "s.parquet")), Machine(cpus=2, gpus=0, bfloat16=False)
    )
    teacher = build.pair(config).teacher
    with torch.no_grad():
        teacher.backbone.norm.bias.add_(1.0)
    meta = {"plan": plan.model_dump(mode="json")}
    state.save(tmp_path / "runs" / "a" / "checkpoints", 5, {"teacher": teacher.state_dict()}, meta)
    specs = [embedder_of(str(tmp_path / "runs" / "a")), embedder_of("a", folder=f"{tmp_path}/runs")]
    assert specs[0].settings == specs[1].settings and specs[0].image_size == 16
    assert specs[1].name == str(tmp_path / "runs" / "a")
    embedder = open_embedder(specs[1])
    images = [embedder.prepare(decode_image(image)) for image in IMAGES]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (embedders.MEAN, embedders.STD))
    with torch.no_grad():
        expected = teacher.backbone.eval()((x - mean) / std)
    np.testing.assert_allclose(embedder.outputs(images)["cls"], expected, atol=1e-5)
    with torch.no_grad():  # the same run trained once more
        teacher.backbone.norm.weight.mul_(2.0)
    state.save(tmp_path / "runs" / "b" / "checkpoints", 5, {"teacher": teacher.state_dict()}, meta)
    assert embedder_of(str(tmp_path / "runs" / "b")).digest != specs[0].digest


@pytest.mark.parametrize("registers", [0, 2])
def test_folders_of_others_at_another_size(registers: int, tmp_path: Path) -> None:
    """What transformers computes away from the native size, of a folder that it wrote."""
    transformers = pytest.importorskip("transformers")
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_register_tokens": registers} if registers else {}
    made_of = getattr(transformers, f"{name}Config")(
        image_size=56, patch_size=7, layerscale_value=0.7, **sizes, **more
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(made_of).eval()
    with torch.no_grad():
        model.embeddings.position_embeddings.normal_()
    model.save_pretrained(tmp_path)
    spec = embedder_of(str(tmp_path), image_size=28, mean=MEAN, std=STD)
    ours = open_embedder(spec).outputs(pixels())["cls"]
    with torch.no_grad():
        theirs = model(pixel_values=normalised()).last_hidden_state[:, 0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", ["ours", "huggingface", "pth", "pth as released"])
def test_position_embeddings_are_resized_as_the_weights_want_it(kind: str, tmp_path: Path) -> None:
    """Exports of ours say how; a file of the official code without registers has its settings."""
    released = kind == "pth as released"
    antialias = kind in ("huggingface", "pth")  # not what transformers would do without registers
    offset = 0.1 if kind in ("ours", "pth as released") else 0.0
    made_of = replace(
        SPEC, image_size=56, registers=2 * (kind == "pth"), interpolate_offset=offset,
        interpolate_antialias=antialias,
    )  # fmt: skip
    torch.manual_seed(0)
    network = made_of.build().eval()
    with torch.no_grad():
        network.pos_embed.normal_()
    if kind == "ours":
        path = save_backbone(network, made_of, tmp_path / "w")
    elif kind == "huggingface":
        path = save_huggingface(network, made_of, tmp_path / "w", Preprocessing(56, MEAN, STD))
    else:
        path = tmp_path / "w.pth"
        torch.save(network.state_dict(), path)
    ours = open_embedder(embedder_of(str(path), image_size=28, mean=MEAN, std=STD))
    assert (ours.network.interpolate_offset == 0.1) == (released or kind == "ours")
    with torch.no_grad():
        expected = network(normalised())
    np.testing.assert_allclose(ours.outputs(pixels())["cls"], expected, atol=1e-5)
