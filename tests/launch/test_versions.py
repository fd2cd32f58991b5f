"""Names made of a content: the demo's data follows its settings and its code, a submitted recipe its whole text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image, features

from data_pipeline.transforms.decode import decoder_versions
from launch.demo.data import CODE, Settings
from launch.job import recipe_id
from tests.support.ingredients import assert_distinct


def test_the_demos_data_is_of_its_settings_and_of_every_file_that_makes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = [("base", Settings().version())]
    assert Settings().version() == versions[0][1]
    for field in dataclasses.fields(Settings):
        value = getattr(Settings(), field.name)
        other = dataclasses.replace(Settings(), **{field.name: (value or 0) + 1})
        versions.append((field.name, other.version()))
    read = Path.read_bytes
    for name in CODE:
        with monkeypatch.context() as patch:
            patch.setattr(
                Path, "read_bytes", lambda path, name=name: read(path) + b" " * path.as_posix().endswith(name)
            )
            versions.append((name, Settings().version()))
    assert_distinct(versions)


def test_a_recipes_id_is_of_its_whole_text() -> None:
    text = "run:\n  name: a\n" * 50
    texts = [text, text + " ", text.replace("a", "b", 1), text[:-1], " " + text, ""]
    assert_distinct([(repr(each[:20]), recipe_id(each)) for each in texts])
    assert len(recipe_id(text)) == 12


@pytest.mark.parametrize("library", ["libjpeg_turbo", "jpg", "webp", "zlib", "pillow", "simplejpeg"])
def test_the_version_of_each_decoder_is_recorded(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    import simplejpeg

    before, version = decoder_versions(), features.version
    if library == "pillow":
        monkeypatch.setattr(Image, "__version__", "0.0")
    elif library == "simplejpeg":
        monkeypatch.setattr(simplejpeg, "__version__", "0.0")
    else:
        monkeypatch.setattr(features, "version", lambda name: "0.0" if name == library else version(name))
    changed = {name: new for name, new in decoder_versions().items() if before.get(name) != new}
    assert changed == {library if library in ("pillow", "simplejpeg") else f"pillow.{library}": "0.0"}
