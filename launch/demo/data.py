"""The demo's data, made in seconds from what is on the machine and written in the public formats."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.formats import img2dataset, refinedweb
from launch.demo import documents as demo_text
from launch.demo import scenes

DEFAULT_ROOT = Path("data/demo")
STAMP = "prepared.json"
PARTS = ("digits", "scenes_real", "scenes_synthetic", "refinedweb", "tokenizer", "text")
SPLITS = ("train", "test")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = (
    "a handwritten digit {word}",
    "the number {numeral} in handwriting",
    "a {word} written by hand",
    "the digit {word} in black ink",
    "a scan of the handwritten number {word}",
    "handwriting: {numeral}",
)
# What decides the bytes beside the settings: a change of one of these files makes the data again.
CODE = (
    "launch/demo/data.py",
    "launch/demo/scenes.py",
    "launch/demo/documents.py",
    "data_pipeline/sources/tar.py",
    "data_pipeline/transforms/tokenizers.py",
    "data_pipeline/formats/img2dataset.py",
    "data_pipeline/formats/refinedweb.py",
    "data_pipeline/prepare/train_tokenizer.py",
    "data_pipeline/prepare/pack.py",
)


@dataclass(frozen=True)
class Settings:
    """How much of everything; the defaults are the demo's."""

    seed: int = 0
    digits_test: int = 360
    scenes_train: int = 5000
    scenes_test: int = 320
    per_shard: int = 1000
    documents: int | None = None
    test_share: float = 0.05
    vocabulary: int = 2048
    length: int = 128

    def version(self) -> str:
        """16 hex digits over the settings and the code that makes the data."""
        here = Path(__file__).resolve().parents[2]
        state = xxhash.xxh64(json.dumps(asdict(self), sort_keys=True).encode())
        for name in CODE:
            state.update((here / name).read_bytes())
        return state.hexdigest()


def is_ready(root: Path = DEFAULT_ROOT, settings: Settings | None = None) -> bool:
    """True if the data is there, whole, and what this code would make."""
    stamp = _stamp(root)
    if stamp.get("version") != (settings or Settings()).version():
        return False
    try:
        return all(os.stat(root / name).st_size == size for name, size in stamp["files"].items())
    except OSError:
        return False


def prepare(root: Path = DEFAULT_ROOT, settings: Settings | None = None) -> dict[str, Any]:
    """Make the demo's data in `root` unless it is there; returns counts by part, bytes and seconds.

    The stamp is written last, so an interrupted preparation is done again; two at the same time wait for
    each other. Raises UserError if `root` holds something else.
    """
    settings = settings or Settings()
    root = Path(root)
    if is_ready(root, settings):
        return {**_report(_stamp(root), root), "made": False}
    _refuse_foreign(root)
    root.mkdir(parents=True, exist_ok=True)
    with _lock(root):
        if is_ready(root, settings):
            return {**_report(_stamp(root), root), "made": False}
        if not (root / STAMP).exists():
            storage.publish(root / STAMP, json.dumps({"state": "being made"}).encode())
        started = time.perf_counter()
        seconds: dict[str, float] = {}
        staging = root / ".making"
        shutil.rmtree(staging, ignore_errors=True)
        counts = {name: _timed(seconds, name, make, staging, settings) for name, make in MAKERS.items()}
        _swap(staging, root)
        stamp = {
            "version": settings.version(),
            "settings": asdict(settings),
            "counts": counts,
            "seconds": {**seconds, "all": round(time.perf_counter() - started, 2)},
            "files": {
                path.relative_to(root).as_posix(): path.stat().st_size
                for part in PARTS
                for path in sorted((root / part).rglob("*"))
                if path.is_file()
            },
        }
        storage.publish(root / STAMP, json.dumps(stamp, indent=2).encode())
        return {**_report(stamp, root), "made": True}


def _swap(staging: Path, root: Path) -> None:
    """Put the new parts in the place of the old ones, in an instant: a run may be reading them."""
    storage.publish(root / STAMP, json.dumps({"state": "being replaced"}).encode())
    old = root / ".old"
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir()
    for part in PARTS:
        if (root / part).exists():
            os.rename(root / part, old / part)
        os.rename(staging / part, root / part)
    shutil.rmtree(old)
    staging.rmdir()


def _timed(
    seconds: dict[str, float], name: str, make: Callable[..., Any], root: Path, settings: Settings
) -> Any:
    started = time.perf_counter()
    result = make(root, settings)
    seconds[name] = round(time.perf_counter() - started, 2)
    return result


def _report(stamp: dict[str, Any], root: Path) -> dict[str, Any]:
    return {
        "root": str(root),
        "counts": stamp["counts"],
        "seconds": stamp["seconds"],
        "bytes": sum(stamp["files"].values()),
        "files": len(stamp["files"]),
    }


def _stamp(root: Path) -> dict[str, Any]:
    try:
        stamp = json.loads((root / STAMP).read_bytes())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _refuse_foreign(root: Path) -> None:
    """Parts are removed before they are made: never in a folder that is somebody else's."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; the demo's data needs a folder")
    if root.is_dir() and not (root / STAMP).exists():
        others = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
        if others:
            raise UserError(
                f"{root} holds {', '.join(others[:3])}, but no {STAMP}: it is not the demo's; "
                "move it away, then run this again"
            )


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    with open(root / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_rows(folder: Path, rows: Sequence[img2dataset.Row], per_shard: int) -> int:
    for shard, start in enumerate(range(0, len(rows), per_shard)):
        img2dataset.write_shard(str(folder), shard, rows[start : start + per_shard], per_shard)
    return len(rows)


def make_digits(root: Path, settings: Settings) -> dict[str, int]:
    """Real handwriting: scikit-learn's 1,797 digits of 8 x 8 pixels and 17 grey levels, enlarged to 32 x 32."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(255 - found.images * (255 / 16)).astype(np.uint8)
    # By content: an image that occurs twice cannot stand on both sides unless it is cut through.
    ranked = sorted(
        range(len(pixels)), key=lambda i: (xxhash.xxh64_intdigest(pixels[i].tobytes(), settings.seed), i)
    )
    held_out = set(ranked[: settings.digits_test])
    rows: dict[str, list[img2dataset.Row]] = {split: [] for split in SPLITS}
    side = scenes.SIDE
    for i in range(len(pixels)):
        label = int(found.target[i])
        large = Image.fromarray(pixels[i]).resize((side, side), Image.Resampling.BICUBIC)
        wording = scenes.Choices(f"digit/{settings.seed}/{i}").pick(DIGIT_CAPTIONS)
        rows["test" if i in held_out else "train"].append(
            img2dataset.Row(
                url=f"scikit-learn:digits/{i}",
                caption=wording.format(word=WORDS[label], numeral=label),
                image=scenes.encode(large.convert("RGB")),
                width=side,
                height=side,
                original_width=8,
                original_height=8,
                extra={"label": str(label)},
            )
        )
    return {split: _write_rows(root / "digits" / split, rows[split], settings.per_shard) for split in SPLITS}


def make_scenes(root: Path, settings: Settings) -> dict[str, int]:
    """Two caption domains over different scenes; the scene's hash decides domain and split."""
    wanted = {"train": settings.scenes_train, "test": settings.scenes_test}
    writers = {"scenes_real": scenes.alt_text, "scenes_synthetic": scenes.sentence}
    rows: dict[tuple[str, str], list[img2dataset.Row]] = {(d, s): [] for d in writers for s in SPLITS}
    for scene in scenes.scenes(settings.seed):
        digest = xxhash.xxh64_intdigest(scene.key().encode(), settings.seed)
        domain = list(writers)[digest % 2]
        split = "test" if (digest >> 1) % 16 == 0 else "train"
        if len(rows[domain, split]) == wanted[split]:
            if all(len(rows[key]) == wanted[key[1]] for key in rows):
                break
            continue
        rows[domain, split].append(_scene_row(scene, writers[domain](scene)))
    return {
        f"{domain}/{split}": _write_rows(root / domain / split, part, settings.per_shard)
        for (domain, split), part in rows.items()
    }


def _scene_row(scene: scenes.Scene, caption: str) -> img2dataset.Row:
    return img2dataset.Row(
        url=f"scene:{xxhash.xxh64_hexdigest(scene.key().encode())}",
        caption=caption,
        image=scenes.render(scene),
        width=scenes.SIDE,
        height=scenes.SIDE,
        extra={
            "things": "; ".join(map(str, scene.things)),
            "layout": scene.layout,
            "background": scene.background,
        },
    )


def make_documents(root: Path, settings: Settings) -> dict[str, int]:
    """Documents in RefinedWeb's columns, split by a hash of their text."""
    split: dict[str, list[refinedweb.Document]] = {name: [] for name in SPLITS}
    limit = settings.test_share * 2.0**64
    for number, document in enumerate(demo_text.documents()):
        if number == settings.documents:
            break
        held_out = xxhash.xxh64_intdigest(document.content.encode(), settings.seed) < limit
        split["test" if held_out else "train"].append(document)
    for name, documents in split.items():
        refinedweb.write_documents(str(root / "refinedweb" / name / "00000.parquet"), documents)
    return {name: len(documents) for name, documents in split.items()}


def make_tokenizer(root: Path, settings: Settings) -> dict[str, int]:
    """A byte-level BPE, trained on the training text and the training captions alone."""
    from data_pipeline.prepare.train_tokenizer import train_tokenizer

    def texts() -> Iterator[str]:
        for _, text in refinedweb.documents(str(root / "refinedweb" / "train")):
            yield text
        for part in ("digits", "scenes_real", "scenes_synthetic"):
            yield from captions(root / part / "train")

    train_tokenizer(texts(), str(root / "tokenizer"), settings.vocabulary)
    return {"vocabulary": settings.vocabulary}


def captions(folder: Path) -> Iterator[str]:
    """Captions of an img2dataset folder, from its parquet files."""
    import pyarrow.parquet as parquet

    for file in storage.list_files(str(folder), ".parquet"):
        yield from parquet.read_table(file, columns=["caption"])["caption"].to_pylist()


def make_text(root: Path, settings: Settings) -> dict[str, Any]:
    """The documents as packed rows of tokens."""
    from data_pipeline.prepare.pack import pack

    tokenizer = str(root / "tokenizer")
    packed = {
        split: pack(
            str(root / "refinedweb" / split),
            str(root / "text" / split),
            tokenizer,
            settings.length,
            settings.per_shard,
        )
        for split in SPLITS
    }
    return {
        split: {"rows": sums.rows, "tokens": sums.tokens, "tail_tokens": sums.tail_tokens}
        for split, sums in packed.items()
    }


MAKERS: dict[str, Callable[[Path, Settings], dict[str, Any]]] = {
    "digits": make_digits,
    "scenes": make_scenes,
    "refinedweb": make_documents,
    "tokenizer": make_tokenizer,
    "text": make_text,
}
