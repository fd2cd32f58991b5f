"""Pictures of the demo's report: samples with captions, masked images, and captions that the models generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import yaml

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.batches.spec import Batch, SourceSpec, StreamSpec
from data_pipeline.errors import UserError
from data_pipeline.transforms.decode import ImageSpec
from pretrain.recipe.architectures import arch_patch
from pretrain.recipe.kinds.contrastive import ContrastiveOptions
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.data import Stream
from pretrain.recipe.sections.evaluation import Perplexity
from pretrain.report.page import Card, Picture, data_uri, show_only_patches

if TYPE_CHECKING:
    from pretrain.objectives.base import Generate, Objective


@dataclass(frozen=True)
class MaskedSamples:
    """Images of a training step before and after masking, and the number of patches that the tower keeps."""

    cards: list[Card]
    kept: int
    patches: int
    ratio: float


def train_stage(stage_dir: Path) -> tuple[TrainStage, int]:
    """Read a training stage and the seed of its run. Raises UserError if `stage_dir` is not the folder of a stage."""
    path = stage_dir / "resolved.yaml"
    if not path.exists():
        raise UserError(f"{stage_dir} has no resolved.yaml, so the stage has not run; run `make demo`")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return TrainStage.model_validate(content["stage"]), int(content["run"]["seed"])


def sample_cards(stage_dir: Path, rows: int = 6) -> dict[str, list[Card]]:
    """Return {source: cards of its first `rows` images with captions}, uncropped and in the order of the source."""
    stage, _ = train_stage(stage_dir)
    stream = stage.data[main_stream(stage)]
    cards = {}
    for name, source in stream.sources.items():
        batch = first_rows(name, source.path, stream, rows)
        cards[name] = [
            Card([picture(batch, row, f"{name}: {meta['caption']}")], [("", str(meta["caption"]))])
            for row, meta in usable_rows(batch)
        ]
    return cards


def first_rows(name: str, path: str, stream: Stream, rows: int) -> Batch:
    """Read the first rows of a source with the image and text settings of a stream, uncropped."""
    assert stream.image is not None
    assert stream.text is not None
    spec = StreamSpec(
        name=name,
        seed=0,
        sources={name: SourceSpec(path)},
        batch=rows,
        image=ImageSpec(stream.image.size),
        text=stream.text.row_format(),
    )
    builder = EvaluationPass(spec)
    try:
        return builder.make(0, 0, rows)
    finally:
        builder.close()


def usable_rows(batch: Batch) -> list[tuple[int, dict[str, Any]]]:
    """Return (row, metadata) of the rows that hold a usable sample."""
    return [(row, meta) for row, meta in enumerate(batch.meta or []) if batch.weights[row] > 0]


def picture(batch: Batch, row: int, alt: str, label: str = "") -> Picture:
    assert batch.images is not None
    return Picture(data_uri(batch.images[row]), alt, label)


def masked_cards(stage_dir: Path, count: int = 2) -> MaskedSamples:
    """Return images of the first training step, `count` per source, beside the patches that the tower keeps.

    Raises UserError if the stage has no image tower.
    """
    import torch

    from pretrain.build.streams import stage_specs
    from pretrain.models.masking import keep_patches, patches_kept

    stage, seed = train_stage(stage_dir)
    main = main_stream(stage)
    image, vision = stage.data[main].image, stage.model.vision
    patch = arch_patch(vision[0]) if vision else None
    if image is None or patch is None:
        raise UserError(
            f"{stage_dir}: the stage has no image tower of its own, so there are no patches to show"
        )
    builder = BatchBuilder(stage_specs(stage, seed, stage_dir.name, (main,))[0])
    try:
        sources = builder.order.refs(0).source
        rows = [
            int(row)
            for number in range(len(builder.names))
            for row in np.flatnonzero(sources == number)[:count]
        ]
        batches = [builder.make(0, row, row + 1) for row in rows]
        tokenizer = builder.tokenizer
    finally:
        builder.close()
    assert tokenizer is not None
    patches, ratio = (image.size // patch) ** 2, stage.options(ContrastiveOptions).image_mask
    keys = torch.from_numpy(np.concatenate([batch.row_keys for batch in batches]).view(np.int64))
    keep = keep_patches(keys, patches, ratio)
    cards = []
    for place, batch in enumerate(batches):
        assert batch.images is not None
        kept = range(patches) if keep is None else keep[place].tolist()
        caption = tokenizer.decode(batch.tokens[0, 1 : batch.used[0] - 1].tolist())
        masked = Picture(
            data_uri(show_only_patches(batch.images[0], kept, patch)), f"kept patches: {caption}", "masked"
        )
        cards.append(Card([picture(batch, 0, caption, "original"), masked], [("", caption)]))
    return MaskedSamples(cards, patches_kept(patches, ratio) if ratio else patches, patches, ratio)


def caption_cards(run_dir: Path, stages: Sequence[str], count: int = 6) -> tuple[list[Card], list[str]]:
    """Return held-out images of every caption domain with the true caption and one generated by each stage.

    Also returns one line per stage whose weights cannot be loaded.
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
    for domain, figure in stage.eval.of(Perplexity).items():
        if figure.stream is None:
            continue
        batch = first_rows(domain, figure.path, stage.data[figure.stream], count)
        written = {name: write_captions(*model, batch, figure.stream) for name, model in models.items()}
        for row, meta in usable_rows(batch):
            lines = [(f"true ({domain})", str(meta["caption"]))]
            lines += [(name, captions[row]) for name, captions in written.items()]
            cards.append(Card([picture(batch, row, str(meta["caption"]))], lines))
    return cards, missing


def write_captions(objective: Objective, stage: TrainStage, batch: Batch, stream: str) -> list[str]:
    """Generate a caption for each image of the batch by greedy decoding, on the CPU."""
    import torch

    from pretrain.build.tokenizer import stage_tokenizer
    from pretrain.objectives.device_batch import to_device

    settings = stage.data[stream]
    assert settings.text is not None
    tokenizer = stage_tokenizer(stage)
    rows = to_device(batch, settings.image, torch.device("cpu"))
    max_tokens = settings.text.length - 2
    generate = cast("Generate", objective.predict["generate"])
    ids = generate(rows, tokenizer.start_id, tokenizer.end_id, max_tokens)
    return [tokenizer.decode(row) for row in ids]
