"""Train open_clip with its own `train_one_epoch` on batches from Stream; started again, it goes on where it was saved.

python open_clip_train.py TARS CHECKPOINT --model ViT-B-32 --batch-size 256 --epochs 3 --workers 8 (open_clip's flags)
One process. For several: rank, world_size and the global batch for Stream, DistributedDataParallel for the model.
"""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from open_clip_train.distributed import init_distributed_device
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch

from data_pipeline import ImageSpec, Stream, TextSpec

tars, checkpoint, args = sys.argv[1], Path(sys.argv[2]), parse_args(sys.argv[3:])
args.distill = args.wandb = False
device = init_distributed_device(args)
torch.manual_seed(args.seed)
model = open_clip.create_model(args.model, output_dict=True, device=device)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
colours = (model.visual.image_mean, model.visual.image_std)
mean, std = (torch.tensor(each).view(3, 1, 1) * 255 for each in colours)
image = ImageSpec(model.visual.image_size[0], crop=(0.9, 1.0))
text = TextSpec("clip-bpe", model.context_length)
stream = Stream(tars, args.batch_size, image=image, text=text, seed=args.seed, workers=args.workers)
steps = stream.order.samples_per_epoch() // args.batch_size
saved = {"epoch": 0}
if checkpoint.exists():
    saved = torch.load(checkpoint)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    stream.resume(saved["stream"])


class Batches:
    num_batches, num_samples = steps, steps * args.batch_size

    def __iter__(self):
        for batch in itertools.islice(stream, steps):
            images = (torch.from_numpy(batch.images) - mean) / std
            yield images, torch.from_numpy(batch.tokens).long()


data = {"train": SimpleNamespace(dataloader=Batches(), set_epoch=lambda epoch: None)}
schedule = cosine_lr(optimizer, args.lr, args.warmup, steps * args.epochs)
for epoch in range(saved["epoch"], args.epochs):
    train_one_epoch(model, data, open_clip.ClipLoss(), epoch, optimizer, None, schedule, None, args)
    saved = {"epoch": epoch + 1, "stream": stream.state()}
    torch.save(saved | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
stream.close()
