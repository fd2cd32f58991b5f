"""The demo report's pictures: samples with captions, patches the tower sees, and captions the models write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.batches.spec import Batch, SourceSpec, StreamSpec, TextSpec
from data_pipeline.errors import UserError
from data_pipeline.transforms.decode import ImageSpec
from pretrain.recipe.data import Stream
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage
from pretrain.report.page import Card, Picture, data_uri, only_patches


@dataclass(frozen=True)
class Masked:
    """Rows of a training step as they are served and as the tower sees them, and how many patches that is."""

    cards: list[Card]
    kept: int
    patches: int
    ratio: float


def train_stage(stage_dir: Path) -> tuple[TrainStage, int]:
    """A training stage as it ran, and the run's seed. Raises UserError if the folder is none."""
    path = stage_dir / "resolved.yaml"
    if not path.exists():
        raise UserError(f"{stage_dir} holds no resolved.yaml: the stage has not run")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return TrainStage.model_validate(content["stage"]), int(content["run"]["seed"])


def sample_cards(stage_dir: Path, rows: int = 6) -> dict[str, list[Card]]:
    """Source name -> its first images with their captions, whole and in the source's own order."""
    stage, _ = train_stage(stage_dir)
    stream = stage.data[main_stream(stage)]
    found = {}
    for name, source in stream.sources.items():
        batch = first_rows(name, source.path, stream, rows)
        found[name] = [
            Card([picture(batch, row, f"{name}: {meta['caption']}")], [("", str(meta["caption"]))])
            for row, meta in shown(batch)
        ]
    return found


def first_rows(name: str, path: str, stream: Stream, rows: int) -> Batch:
    """The first rows of a source with a stream's image and text settings, uncropped."""
    assert stream.image is not None
    assert stream.text is not None
    spec = StreamSpec(
        name=name,
        seed=0,
        sources={name: SourceSpec(path)},
        batch=rows,
        image=ImageSpec(stream.image.size),
        text=TextSpec(stream.text.tokenizer, stream.text.length),
    )
    builder = EvaluationPass(spec)
    try:
        return builder.make(0, 0, rows)
    finally:
        builder.close()


def shown(batch: Batch) -> list[tuple[int, dict[str, Any]]]:
    """Rows that hold a usable sample, with their meta data."""
    return [(row, meta) for row, meta in enumerate(batch.meta or []) if batch.weights[row] > 0]


def picture(batch: Batch, row: int, alt: str, label: str = "") -> Picture:
    assert batch.images is not None
    return Picture(data_uri(batch.images[row]), alt, label)


def masked_cards(stage_dir: Path, each: int = 2) -> Masked:
    """Rows of the stage's first step, `each` of every source, beside the patches that the tower is given."""
    import torch

    from pretrain.build.streams import stage_specs
    from pretrain.models.masking import keep_patches, patches_kept

    stage, seed = train_stage(stage_dir)
    main = main_stream(stage)
    image, vision = stage.data[main].image, stage.model.vision
    if image is None or not vision or vision[0].patch is None:
        raise UserError(f"{stage_dir}: the stage has no tower of its own, so no patches to draw")
    patch = vision[0].patch
    builder = BatchBuilder(stage_specs(stage, seed, stage_dir.name, (main,))[0])
    try:
        sources = builder.order.refs(0).source
        rows = [
            int(row)
            for number in range(len(builder.names))
            for row in np.flatnonzero(sources == number)[:each]
        ]
        batches = [builder.make(0, row, row + 1) for row in rows]
        tokenizer = builder.tokenizer
    finally:
        builder.close()
    assert tokenizer is not None
    patches, ratio = (image.size // patch) ** 2, stage.objective.image_mask
    keys = torch.from_numpy(np.concatenate([batch.row_keys for batch in batches]).view(np.int64))
    keep = keep_patches(keys, patches, ratio)
    cards = []
    for place, batch in enumerate(batches):
        assert batch.images is not None
        kept = range(patches) if keep is None else keep[place].tolist()
        caption = tokenizer.decode(batch.tokens[0, 1 : batch.used[0] - 1].tolist())
        seen = Picture(
            data_uri(only_patches(batch.images[0], kept, patch)), f"kept patches: {caption}", "seen"
        )
        cards.append(Card([picture(batch, 0, caption, "served"), seen], [("", caption)]))
    return Masked(cards, patches_kept(patches, ratio) if ratio else patches, patches, ratio)


def caption_cards(run_dir: Path, stages: Sequence[str], each: int = 6) -> tuple[list[Card], list[str]]:
    """Held-out images of every caption domain with the true caption and those that the stages' weights write.

    Also returns a line for each stage whose weights are not there.
    """
    from pretrain.build.objective import load_trained

    models, missing = {}, []
    for name in stages:
        try:
            models[name] = load_trained(str(run_dir / name))
        except UserError as error:
            missing.append(f"No captions by {name}: {error}")
    if not models:
        return [], missing
    stage = next(iter(models.values()))[1]
    cards = []
    for domain, wanted in stage.eval.perplexity.items():
        if wanted.stream is None:
            continue
        batch = first_rows(domain, wanted.path, stage.data[wanted.stream], each)
        written = {name: write_captions(*model, batch, wanted.stream) for name, model in models.items()}
        for row, meta in shown(batch):
            lines = [(f"true ({domain})", str(meta["caption"]))]
            lines += [(name, captions[row]) for name, captions in written.items()]
            cards.append(Card([picture(batch, row, str(meta["caption"]))], lines))
    return cards, missing


def write_captions(objective: Any, stage: TrainStage, batch: Batch, stream: str) -> list[str]:
    """The most likely caption of each image, token by token."""
    import torch

    from pretrain.build.objective import stage_tokenizer
    from pretrain.models.multimodal import greedy
    from pretrain.objectives.device_batch import to_device

    settings = stage.data[stream]
    assert settings.text is not None
    tokenizer = stage_tokenizer(stage)
    features = objective.features(to_device(batch, settings.image, torch.device("cpu")))
    most = settings.text.length - 2
    ids = greedy(objective.model, tokenizer.start_id, tokenizer.end_id, features, most)
    return [tokenizer.decode(row) for row in ids]
