"""Nothing that comes from storage can run code: planted pickles stay unopened, and no source file
has a call that could open one.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipeline.config.load import load
from pipeline.errors import ConfigError, DamagedError, DataError, PipelineError
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import decode_image
from pipeline.model.read import read_weights
from pipeline.shards.row_group import read_row_group
from pipeline.shards.shards import open_shards
from pipeline.storage.run_folder import RunFolder
from pipeline.train.checkpoint import state, version4
from tests.data import encoded, packed
from tests.train.checkpoint.version4 import version4_saved

ROOT = Path(__file__).parents[1]


class Payload:
    """Unpickling one makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.mark, "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def test_the_payload_works(mark: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def old_torch(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def plain(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


SAVERS = [torch.save, old_torch, plain]


@pytest.mark.parametrize("save", SAVERS)
def test_a_checkpoint_of_version_4(save: Callable[..., None], tmp_path: Path, mark: Path) -> None:
    saved = version4_saved(tmp_path, 7, {"teacher": {"x": torch.zeros(1)}})
    assert saved.load()["teacher"]["x"] == 0  # the control
    file = Path(saved.path) / "state.pt"
    save({"teacher": {"x": Payload(mark)}, "student": Payload(mark)}, file)
    saved.meta["crc32"] = version4.crc32(file)  # whoever plants a file can do that too
    with pytest.raises(DamagedError) as refused:
        saved.load()
    assert isinstance(refused.value.__cause__, pickle.UnpicklingError)
    with pytest.raises((DamagedError, RuntimeError)):  # torch maps files of the new form only
        saved.teacher()
    assert not mark.exists()


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "index.json", "meta.json"])
def test_a_checkpoint(save: Callable[..., None], name: str, tmp_path: Path, mark: Path) -> None:
    """A pickle in the place of any file, under sums that fit."""
    saved = state.save(tmp_path, 7, {"teacher": {"x": torch.zeros(1)}}, {"plan": {}})
    assert saved.load()["teacher"]["x"] == 0  # the control
    file = Path(saved.path) / name
    save({"teacher": {"x": Payload(mark)}}, file)
    content = file.read_bytes()
    if name == "meta.json":
        assert state.latest(tmp_path) is None
    else:
        length = 8 + int.from_bytes(content[:8], "little")
        header = content[:length] if name.startswith("rank") else content
        saved.meta["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(header)}
        for read in (saved.load, saved.teacher):
            with pytest.raises(DamagedError):
                read()
    assert not mark.exists()


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    """Neither torch's index of a checkpoint nor anything else: JSON, and what safetensors reads."""
    saved = state.save(
        tmp_path, 7, {"teacher": {"x": torch.zeros(1)}, "n": {"a": 1, "b": None}}, {"plan": {}}
    )
    for path in Path(saved.path).iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        else:
            assert path.suffix == ".safetensors" and safetensors.torch.load(content)
        assert not zipfile.is_zipfile(path)
        assert not content.startswith(b"\x80")  # how every pickle of today begins


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.safetensors", "w.pkl", "w.joblib"])
@pytest.mark.parametrize("save", SAVERS)
def test_weights_to_start_from(
    save: Callable[..., None], name: str, tmp_path: Path, mark: Path
) -> None:
    save({"cls_token": Payload(mark)}, tmp_path / name)
    with pytest.raises(PipelineError):
        read_weights(tmp_path / name)
    assert not mark.exists()


def test_a_folder_of_weights(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    torch.save({"embeddings.cls_token": Payload(mark)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(PipelineError, match="safetensors"):
        read_weights(tmp_path)
    plain({"x": Payload(mark)}, tmp_path / "model.safetensors")
    with pytest.raises(PipelineError):
        read_weights(tmp_path)
    assert not mark.exists()


def npy(mark: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([[Payload(mark)] * 3], object), allow_pickle=True)
    return stream.getvalue()


def npz(mark: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("arr_0.npy", npy(mark))
    return stream.getvalue()


IMAGES = [npy, npz, lambda mark: pickle.dumps(Payload(mark))]


@pytest.mark.parametrize("make", IMAGES)
def test_an_image(make: Callable[[Path], bytes], mark: Path) -> None:
    for channels in (1, 3):
        with pytest.raises(BadImage):
            decode_image(make(mark), channels)
    assert not mark.exists()


def pickled_column(mark: Path, rows: int) -> pa.Array:
    """As Ray Data stores Python objects: reading them into Python unpickles."""
    from ray.data.extensions import ArrowPythonObjectArray, ArrowPythonObjectType

    with contextlib.suppress(pa.ArrowKeyError):  # as it is after `import ray.data`
        pa.register_extension_type(ArrowPythonObjectType())
    return ArrowPythonObjectArray.from_objects([Payload(mark)] * rows)


def test_the_column_runs_where_it_is_converted(mark: Path, tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": pickled_column(mark, 1)}), path)
    pq.read_table(path)["x"].to_pylist()
    assert mark.exists()


def pngs(count: int) -> list[bytes]:
    return [encoded(Image.new("RGB", (16, 16), (value, 0, 0))) for value in range(count)]


@pytest.mark.parametrize("column", ["image", "label", "extra"])
def test_parquet_as_shards(column: str, mark: Path, tmp_path: Path) -> None:
    """Training reads parquet of others as it is."""
    files = pngs(10)
    columns: dict[str, Any] = {"image": files, "label": [0] * len(files), "extra": files}
    columns[column] = pickled_column(mark, len(files))
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "set" / "a.parquet")
    try:
        shards = open_shards(str(tmp_path / "set"))
        group = read_row_group(shards, 0, 0)
    except DataError as error:
        assert column == "label" and "expected class names" in error.what
    else:
        found = [group.image(i) for i in range(len(files))]
        assert (found == files) == (column != "image")
        for image in found if column == "image" else ():
            with pytest.raises(BadImage):
                decode_image(image)
    assert not mark.exists()


@pytest.mark.parametrize("column", ["image", "label", "extra"])
def test_parquet_as_a_source(column: str, mark: Path, tmp_path: Path, ray_cluster: None) -> None:
    """Pack carries other columns along."""
    files = pngs(10)
    columns: dict[str, Any] = {"image": files, "label": [0] * len(files), "extra": files}
    columns[column] = pickled_column(mark, len(files))
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "set" / "a.parquet")
    try:
        packed(tmp_path / "set", tmp_path / "out")
    except PipelineError as error:
        assert column in ("image", "label"), error
    else:
        kinds = pq.read_schema(tmp_path / "out" / "shards" / "part-00000.parquet").types
        assert not any(isinstance(kind, pa.BaseExtensionType) for kind in kinds)
    assert not mark.exists()


def test_a_table_of_the_run_folder(mark: Path, tmp_path: Path) -> None:
    """Rank 0, which has imported Ray Data, goes on with the table that it finds."""
    from pipeline.stream.bad_table import BadTable

    path = tmp_path / "bad_images.parquet"
    pq.write_table(pa.table({"image_id": pickled_column(mark, 1)}), path)
    assert len(BadTable(path).rows) == 1
    assert not mark.exists()


def test_an_onnx_model(mark: Path, tmp_path: Path) -> None:
    from pipeline.embed.onnx.embedder import OnnxModel

    (tmp_path / "m.onnx").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(PipelineError):
        OnnxModel(str(tmp_path / "m.onnx"), 0, (), ())
    assert not mark.exists()


def test_the_mlflow_model_has_no_pickle(tmp_path: Path) -> None:
    """Models from code: the code is the file that MLflow copies, the weights are safetensors."""
    source = (ROOT / "pipeline" / "track" / "embedder.py").read_text()
    assert "python_model=__file__" in source and "set_model(Embedder())" in source


def test_recipes_marks_and_states(mark: Path, tmp_path: Path) -> None:
    tag = f"!!python/object/apply:builtins.open [{mark}, w]"
    (tmp_path / "r.yaml").write_text(f"run: {{name: {tag}}}\n")
    with pytest.raises(ConfigError):
        load([str(tmp_path / "r.yaml")])
    assert load([f"run.name={tag}"]).run.name == tag  # a text as any other
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "_done.json").write_bytes(pickle.dumps(Payload(mark)))
    assert RunFolder(tmp_path).done("pack", "k") is None
    assert not mark.exists()


# ---- no source file has a call that could


# What opens pickles or runs text, by the end of its name.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads",
    "shelve.open", "pd.read_pickle", "pandas.read_pickle", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "extractall", "mktemp",
}  # fmt: skip
# `re.compile` and `torch.compile` are other things; blocks of the object store are not storage:
# tasks of this run wrote them. The loader of the cluster check is a SafeLoader.
ALLOWED = {
    "pipeline/stream/rows.py": {"pickle.loads"},
    "cluster/check.py": {"yaml.load_all"},
}


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        before = name_of(node.value)
        return f"{before}.{node.attr}"  # `.eval` of something that is no name
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        if name in FORBIDDEN or name.split(".")[-1] in ("extractall", "unsafe_load", "read_pickle"):
            found.append(name)
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if options.get("allow_pickle", "False") != "False":
            found.append(f"{name} with allow_pickle")
        if options.get("shell", "False") != "False":
            found.append(f"{name} with shell")
        if options.get("trust_remote_code", "False") != "False":
            found.append(f"{name} with trust_remote_code")
    return found


def test_the_scan_finds_what_it_looks_for() -> None:
    sample = (
        "torch.load(x)\ntorch.load(x, weights_only=False)\nnp.load(x, allow_pickle=True)\n"
        "yaml.load(x)\neval(x)\nsubprocess.run(x, shell=True)\npickle.loads(x)\n"
        "archive.extractall(x)\nAutoModel.from_pretrained(x, trust_remote_code=True)\n"
    )
    assert len(unsafe(sample)) == 9
    assert not unsafe("torch.load(x, weights_only=True)\nyaml.safe_load(x)\nre.compile(x)\n")


@pytest.mark.parametrize("folder", ["pipeline", "jobs", "cluster"])
def test_no_source_file_opens_pickles_or_runs_text(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        assert set(unsafe(path.read_text())) <= ALLOWED.get(name, set()), name
