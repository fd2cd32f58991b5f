"""Measures one loader on photographs: `python benchmarks/contenders.py NAME SETTINGS` prints its figures as JSON.

It runs in the loader's own environment, so only the function `dromos` imports the project. All loaders do the same
work: random crop of the same size and scale, antialiased bicubic resize, caption to 77 CLIP tokens, batches.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TOKENS = 77
CAPTION = "a photograph that warms up the tokenizer"


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    pause: seconds between creating the loader and reading the first batch; not counted
    marks: numbers of samples after which memory is measured
    """

    tars: str
    folder: str
    workers: int
    size: int
    scale: tuple[float, float]
    batch: int
    warm: int
    samples: int
    pause: float = 0.0
    marks: tuple[int, ...] = ()


Reader = Iterable[Any]


def dromos(s: Settings) -> Callable[[], Reader]:
    from data_pipeline import ImageSpec, Stream, TextSpec

    image, text = ImageSpec(s.size, s.scale), TextSpec("clip-bpe", TOKENS)
    return lambda: (
        batch.pixels for batch in Stream(s.tars, s.batch, image=image, text=text, workers=s.workers)
    )


def open_clip(s: Settings) -> Callable[[], Reader]:
    """The loader of open_clip's trainer, with the defaults of its command line."""
    from open_clip_train.data import get_wds_dataset

    transform, tokenizer = _open_clip_parts(s)
    arguments = SimpleNamespace(
        train_data=_pattern(s),
        train_num_samples=10_000_000,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=s.batch,
        workers=s.workers,
        world_size=1,
    )
    return lambda: (
        images for images, _ in get_wds_dataset(arguments, transform, True, 0, tokenizer=tokenizer).dataloader
    )


def webdataset(s: Settings) -> Callable[[], Reader]:
    """As in its README: shuffle, decode with Pillow, torchvision's transform."""
    import webdataset as wds

    transform, tokenizer = _open_clip_parts(s)
    dataset = (
        wds.WebDataset(_pattern(s), shardshuffle=100, nodesplitter=wds.split_by_node)
        .repeat()
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: tokenizer(text)[0])
        .batched(s.batch)
    )
    return lambda: (images for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=s.workers))


def energon(s: Settings) -> Callable[[], Reader]:
    from megatron import energon as peer

    transform, tokenizer = _open_clip_parts(s)
    prepared = Path(s.folder) / "energon"
    _prepare_once(prepared, lambda: _energon_prepare(s, prepared))

    class Encoder(peer.DefaultTaskEncoder):
        decoder = peer.SampleDecoder(image_decode="pilrgb")

        @peer.stateless
        def encode_sample(self, sample: Any) -> dict[str, Any]:
            return {"images": transform(sample.image), "tokens": tokenizer(sample.caption)[0]}

        def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
            import torch

            return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    config = peer.WorkerConfig(rank=0, world_size=1, num_workers=s.workers)
    return lambda: (
        batch["images"]
        for batch in peer.get_loader(
            peer.get_train_dataset(
                str(prepared),
                worker_config=config,
                batch_size=s.batch,
                shuffle_buffer_size=1000,
                max_samples_per_sequence=100,
                task_encoder=Encoder(),
            )
        )
    )


def litdata(s: Settings) -> Callable[[], Reader]:
    """Reads litdata's own format, to which `prepare` converts the tars; JPEGs stay JPEGs."""
    import litdata as peer

    decode = partial(_decode, *_open_clip_parts(s))
    optimised = Path(s.folder) / "litdata"
    _prepare_once(optimised, lambda: _litdata_optimize(s, optimised))

    def epochs() -> Iterator[Any]:
        loader = peer.StreamingDataLoader(
            peer.StreamingDataset(str(optimised), shuffle=True, drop_last=True, transform=decode),
            batch_size=s.batch,
            num_workers=s.workers,
            persistent_workers=s.workers > 0,
        )
        while True:
            for images, _ in loader:
                yield images

    return epochs


CONTENDERS = {
    "dromos": dromos,
    "open_clip": open_clip,
    "webdataset": webdataset,
    "Energon": energon,
    "litdata": litdata,
}


def measure(name: str, s: Settings) -> dict[str, Any]:
    """Seconds to the first batch, samples per second, CPU time per sample, and memory at the marks.

    CPU time and memory are sums over the process and all its workers.
    """
    start = CONTENDERS[name](s)
    began = time.perf_counter()
    reader = start()
    time.sleep(s.pause)
    batches = iter(reader)
    next(batches)
    first = time.perf_counter() - began - s.pause
    seen = s.batch
    while seen < s.warm:
        seen += len(next(batches))
    began, used, counted, memory = time.perf_counter(), _processor_seconds(), 0, {}
    marks = list(s.marks)
    while counted < s.samples:
        counted += len(next(batches))
        while marks and counted >= marks[0]:
            memory[marks.pop(0)] = _memory()
    return {
        "first_batch_seconds": first,
        "samples_per_second": counted / (time.perf_counter() - began),
        "processor_ms": 1000 * (_processor_seconds() - used) / counted,
        "megabytes": memory,
    }


def _open_clip_parts(s: Settings) -> tuple[Any, Any]:
    """open_clip's training transform and tokenizer."""
    import open_clip as peer

    mean, std = peer.OPENAI_DATASET_MEAN, peer.OPENAI_DATASET_STD
    transform = peer.image_transform(s.size, True, mean=mean, std=std, aug_cfg={"scale": s.scale})
    tokenizer = peer.get_tokenizer("ViT-B-32", context_length=TOKENS)
    tokenizer(CAPTION)
    return transform, tokenizer


def _pattern(s: Settings) -> str:
    names = sorted(path.stem for path in Path(s.tars).glob("*.tar"))
    return f"{s.tars}/{{{names[0]}..{names[-1]}}}.tar"


def _prepare_once(folder: Path, prepare: Callable[[], None]) -> None:
    """Prepare the data that a loader needs, before its first round and outside all figures."""
    done = folder / "prepared"
    if not done.exists():
        folder.mkdir()
        with contextlib.redirect_stdout(sys.stderr):
            prepare()
        done.touch()


def _energon_prepare(s: Settings, folder: Path) -> None:
    import subprocess

    for path in Path(s.tars).glob("*.tar"):
        os.link(path, folder / path.name)
    command = [str(Path(sys.executable).with_name("energon")), "prepare", str(folder), "--non-interactive"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CaptioningSample", "--no-progress"]
    command += ["--field-map", '{"image": "jpg", "caption": "txt"}', "--num-workers", "2"]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _pairs(tar: str) -> Iterator[tuple[bytes, str]]:
    import tarfile

    pair: dict[str, bytes] = {}
    with tarfile.open(tar) as opened:
        for member in opened:
            file = opened.extractfile(member)
            pair[member.name.partition(".")[2]] = file.read() if file else b""
            if len(pair) == 2:
                yield pair["jpg"], pair["txt"].decode()
                pair = {}


def _decode(transform: Any, tokenizer: Any, sample: tuple[bytes, str]) -> tuple[Any, Any]:
    """Defined at module level, because litdata spawns its workers."""
    from PIL import Image

    return transform(Image.open(io.BytesIO(sample[0])).convert("RGB")), tokenizer(sample[1])[0]


def _litdata_optimize(s: Settings, folder: Path) -> None:
    import litdata as peer

    tars = sorted(str(path) for path in Path(s.tars).glob("*.tar"))
    peer.optimize(_pairs, tars, str(folder), chunk_bytes="64MB", num_workers=1, verbose=False)


def _family() -> set[int]:
    """The PIDs of this process and of all its descendants."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[int(entry)] = int(_stat(int(entry))[1])
    family, new = {os.getpid()}, {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - family
        family |= new
    return family


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; the name before it may contain spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _processor_seconds() -> float:
    ticks = 0
    for pid in _family():
        with contextlib.suppress(OSError):
            ticks += sum(map(int, _stat(pid)[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _memory() -> float:
    """Proportional set size in MB, which counts shared memory once."""
    total = 0
    for pid in _family():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Settings(**json.loads(sys.argv[2])))), flush=True)
    sys.stdout.flush()
    os._exit(0)  # skips the shutdown of the workers
