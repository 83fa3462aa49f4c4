"""The text of an encoder's module: which files it is, and modules made of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.model.encoders import source
from pipeline.model.encoders.made import make_module
from pipeline.model.encoders.source import Name, differing, digest_of, from_copy, read_source

NETS = {
    "nets/__init__.py": "",
    "nets/cnn.py": "import torch\nfrom . import parts\nfrom nets.deep.more import THREE\n"
    "import besides\n\ndef small():\n    return parts.TWO + THREE + besides.FOUR\n",
    "nets/parts.py": "TWO = 2\n",
    "nets/deep/more.py": "THREE = 3\n",  # a package without __init__.py
    "besides.py": "FOUR = 4\n",
    "nets/other.py": "raise RuntimeError('nobody imports this')\n",
}
SMALL = Name("nets.cnn", "small")


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where the job is started; modules made in a test are forgotten after it."""
    for name, text in NETS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("nets", "besides", "mine"):
            del sys.modules[name]


def test_the_text_is_that_of_the_module_and_of_what_it_imports_from_its_folder(
    nets: Path,
) -> None:
    files = read_source(SMALL)
    assert files == {name: text for name, text in NETS.items() if name != "nets/other.py"}
    assert digest_of(files) == digest_of(dict(reversed(files.items())))
    (nets / "besides.py").write_text("FOUR = 5\n")
    assert digest_of(read_source(SMALL)) != digest_of(files)


def test_a_module_is_made_of_text_alone(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = read_source(SMALL)
    empty = nets / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)  # where there is no such module
    with pytest.raises(PipelineError, match=r"there is no module nets\.cnn"):
        read_source(SMALL)
    module = make_module(SMALL, files)
    assert module.small() == 9
    assert make_module(SMALL, files) is module
    changed = make_module(SMALL, files | {"besides.py": "FOUR = 40\n"})
    assert (changed.small(), module.small()) == (45, 9)


def test_what_a_function_imports_is_of_the_text_too(
    nets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nets / "nets" / "late.py").write_text(
        "def small():\n    from nets.parts import TWO\n    return TWO\n\n"
        "def never():\n    import nets.other\n"
    )
    name = Name("nets.late", "small")
    files = read_source(name)
    assert files.keys() == {"nets/__init__.py", "nets/late.py", "nets/other.py", "nets/parts.py"}
    empty = nets / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    module = make_module(name, files)
    assert module.small() == 2
    with pytest.raises(ImportError):
        module.never()


def test_modules_that_were_imported_stay_as_they_are(
    nets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(nets))
    import besides  # type: ignore[import-not-found]
    import nets.parts as parts  # type: ignore[import-not-found]

    files = read_source(SMALL) | {"nets/parts.py": "TWO = 20\n"}
    assert make_module(SMALL, files).small() == 27
    assert sys.modules["besides"] is besides and sys.modules["nets.parts"] is parts
    assert sys.modules["nets"].parts is parts and parts.TWO == 2


def test_of_what_is_installed_and_of_this_project_the_file_itself_is_kept() -> None:
    ours = read_source(Name("pipeline.model.encoders.residual", "small"))
    assert list(ours) == ["pipeline/model/encoders/residual.py"]
    vision = read_source(Name("torchvision.models.resnet", "resnet18"))
    assert list(vision) == ["torchvision/models/resnet.py"]
    from torchvision.models import resnet

    name = Name("torchvision.models.resnet", "resnet18")
    assert make_module(name, vision) is resnet  # which registers its functions, and only once
    from pipeline.model.encoders import residual

    text = ours["pipeline/model/encoders/residual.py"].replace("(64, 128, 256)", "(8, 16, 32)")
    name = Name("pipeline.model.encoders.residual", "small")
    other = make_module(name, {"pipeline/model/encoders/residual.py": text})
    assert other.small()(torch.zeros(2, 3, 32, 32)).shape == (2, 32)
    assert sys.modules[residual.__name__] is residual
    assert make_module(name, ours) is residual


def test_a_text_that_differs_is_named(nets: Path) -> None:
    files = read_source(SMALL)
    assert differing(SMALL, files) == []
    (nets / "nets" / "parts.py").write_text("TWO = 2  # two\n")
    assert differing(SMALL, files) == ["nets/parts.py"]
    (nets / "nets" / "cnn.py").unlink()
    assert differing(SMALL, files) is None


def test_the_code_of_others_can_be_refused(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = read_source(SMALL)
    monkeypatch.setenv(source.REFUSE, "never")
    from_copy(SMALL, files, "runs/a/encoder")  # it is that of this machine
    (nets / "besides.py").write_text("FOUR = 5\n")
    with pytest.raises(PipelineError) as refused:
        from_copy(SMALL, files, "runs/a/encoder")
    assert "runs/a/encoder" in refused.value.what and source.REFUSE in refused.value.hint


BAD = {
    "x = (\n": r"mine\.py line 1 is no Python",
    "import nowhere_at_all\n": "cannot be imported: ModuleNotFoundError",
    "1 / 0\n": "fails while it is imported: ZeroDivisionError",
}


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_imported_is_said_in_one_sentence(nets: Path, text: str) -> None:
    (nets / "mine.py").write_text(text)
    name = Name("mine", "small")
    sys.modules.pop("mine", None)
    with pytest.raises(PipelineError, match=BAD[text]) as said:
        make_module(name, read_source(name))
    assert "\n" not in said.value.what and said.value.hint
    assert "mine" not in sys.modules


@pytest.mark.parametrize("encoder", ["module:nets.cnn", "module:nets..cnn:a", "module:a b:c"])
def test_a_name_has_a_module_and_a_factory(encoder: str) -> None:
    with pytest.raises(PipelineError, match="names no module and factory"):
        Name.of(encoder)


def test_a_module_must_be_text_and_not_the_whole_disk(nets: Path) -> None:
    with pytest.raises(PipelineError, match="no file of Python text"):
        read_source(Name("math", "sqrt"))
    for number in range(source.FILES + 1):
        (nets / f"part{number}.py").write_text("")
    text = "".join(f"import part{number}\n" for number in range(source.FILES + 1))
    (nets / "mine.py").write_text(text)
    with pytest.raises(PipelineError, match="more than 100 files"):
        read_source(Name("mine", "small"))
