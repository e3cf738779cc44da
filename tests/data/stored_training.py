"""What runs in other processes, without the imports that only the main process of its tests needs."""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from conftest import QUIET
from test_custom_data import params

from moco import SelfSupervisedMethod
from self_supervised.data import batches
from self_supervised.training.checkpoints import Checkpoints


def imported(rank: int) -> set[str]:
    """Return the names of all modules that a program has imported before it reads images."""
    return set(sys.modules)


class Seen(pl.Callback):
    """Callback that records the labels of the images, which are their numbers."""

    def __init__(self):
        self.epochs: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.epochs.setdefault(trainer.current_epoch, []).append(batch[1].tolist())


def train_on(rank: int, roots: dict[str, str], checkpoints: str) -> dict:
    """Train for two epochs on each data set; on shards, resume also from a checkpoint within the second epoch."""
    found = {}
    batches.WINDOW = 10
    for kind, root in roots.items():
        for resumed in (False, True) if kind == "shards" else (False,):
            seen = Seen()
            folder = Path(checkpoints) / kind
            encoder = torch.nn.Sequential(
                torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.Flatten(), torch.nn.LazyLinear(8)
            )
            encoder(torch.zeros(2, 3, 32, 32))
            torch.manual_seed(0)
            workers = int(kind == "shards")
            p = params(
                root, num_data_workers=workers, evaluations=[], val_size=0, test_size=0, drop_last_batch=False, K=64
            )
            model = SelfSupervisedMethod(p, encoder=encoder)
            for parameter in encoder.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            callbacks = [seen] if resumed else [seen, Checkpoints(folder, every_n_steps=1, keep=99)]
            processes = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "num_sanity_val_steps": 0}
            trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, **processes, **QUIET)
            trainer.fit(model, ckpt_path=folder / "step_000000005.ckpt" if resumed else None)
            found[kind, resumed] = seen.epochs, torch.cat([x.flatten() for x in model.model.state_dict().values()])
    return found
