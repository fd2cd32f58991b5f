"""A folder that appears when it is complete: absent or whole after a power cut, and there for good at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.storage.atomic_folder import LOCK, link_or_copy, new_folder, partial_of
from tests.support.recorded_files import recorded

FILES = {"config.json": b"{}", "weights/0.bin": b"0123456789", "weights/deep/1.bin": b"abc"}


def fill(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_a_cut_leaves_no_folder_or_the_whole_one(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with recorded(tmp_path / "root") as disk:
        with new_folder(tmp_path / "root/a/b/out", 0) as partial:
            fill(partial)
        disk.promise("out")
    states = set()
    for outcome in disk.outcomes():
        outcome.write(tmp_path / "cut")
        out = tmp_path / "cut/a/b/out"
        states.add(out.exists())
        if out.exists():
            found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
            found.pop(LOCK, None)  # a kill between the rename and the deletion leaves it
            assert found == FILES, outcome.after
        assert out.exists() or not outcome.promised, outcome.after
        if outcome.kill and not out.exists():  # the next writer starts from nothing
            with new_folder(out, 0) as partial:
                assert [path.name for path in partial.iterdir()] == [LOCK]
                fill(partial)
            assert sorted(path.name for path in out.iterdir()) == ["config.json", "weights"]
            assert not partial_of(out).exists()
    assert states == {False, True}


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="out: cannot be written: No space left"),
        new_folder(tmp_path / "out", 0),
    ):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_a_linked_or_copied_file_is_absent_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "source").write_bytes(b"0123456789")
    with recorded(root) as disk, monkeypatch.context() as patch:
        if not links:

            def refuse(*_: object) -> None:
                raise OSError(95, "Operation not supported")

            patch.setattr("os.link", refuse)
        link_or_copy(root / "source", root / "target")
    found = [outcome.files.get("target", b"absent") for outcome in disk.outcomes()]
    assert set(found) == {b"absent", b"0123456789"}
    assert (root / "target").samefile(root / "source") == links
