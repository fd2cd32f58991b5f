"""Random tars with unusual members, written by Python's tarfile, for tests of headers, offsets and views."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from hypothesis import strategies as st

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
# (name, kind, size) of a member of the tar.
Entry = tuple[str, bytes, int]


def write_entries(path: Path, entries: list[Entry], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for number, (name, kind, size) in enumerate(entries):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, size if kind == tarfile.REGTYPE else 0
            info.linkname = "elsewhere" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info, io.BytesIO((f"{number} " * size).encode()[:size]))
    return path


words = st.text("abcxyzé0", min_size=1, max_size=8)
long_words = st.builds(lambda word, times: (word * times)[:180], words, st.sampled_from([1, 1, 1, 30]))
folders = st.lists(long_words, max_size=2).map(lambda parts: "".join(f"{part}/" for part in parts))
sizes = st.sampled_from([0, 0, 1, 511, 512, 513, 2000])


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    """Samples with distinct keys, mixed with folders, links, __meta__ members and files that belong to no sample."""
    found: list[Entry] = []
    for number in range(draw(st.integers(0, 12))):
        key = f"{draw(folders)}{draw(long_words)}{number}"
        for extension in draw(
            st.lists(st.sampled_from(["jpg", "txt", "json", "seg.png"]), min_size=1, unique=True)
        ):
            found.append((f"{key}.{extension}", tarfile.REGTYPE, draw(sizes)))
            between = draw(st.sampled_from([None, None, None, "folder", "link", "__meta__", "plain"]))
            if between == "folder":
                found.append((f"{draw(long_words)}", tarfile.DIRTYPE, 0))
            elif between == "link":
                found.append((f"{draw(long_words)}.jpg", tarfile.SYMTYPE, 0))
            elif between == "__meta__":
                found.append((f"__meta__/{number}.json", tarfile.REGTYPE, draw(sizes)))
            elif between == "plain":
                found.append((f"README{number}", tarfile.REGTYPE, draw(sizes)))
    return found


def truth(path: Path) -> list[tuple[str, int, dict[str, bytes]]]:
    """(key, byte of the first header, members) of each sample, by tarfile and webdataset's naming rule."""
    found: list[tuple[str, int, dict[str, bytes]]] = []
    with tarfile.open(path) as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not member.isreg() or not dot or not stem or member.name.startswith("__meta__"):
                continue
            key = f"{folder}/{stem}" if folder else stem
            if not found or found[-1][0] != key:
                found.append((key, member.offset, {}))
            content = tar.extractfile(member)
            assert content is not None
            found[-1][2][extension.lower()] = content.read()
    return found
