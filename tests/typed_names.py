"""How the public names are used, for the type checker of `make lint`: it is never run."""

from pathlib import Path
from typing import assert_type

import pytorch_lightning as pl
import torch

import self_supervised as ssl
from batchrenorm import BatchRenorm1d
from lars import LARS
from linear_classifier import LinearClassifierMethod, LinearClassifierMethodParams
from moco import SelfSupervisedMethod
from model_params import PRESETS, BYOLParams, ModelParams, SimSiamParams
from self_supervised import distributed
from self_supervised.evaluation import knn, linear_probe, rank_me
from self_supervised.losses import get_loss, similarities
from self_supervised.networks import MLP, get_encoder
from self_supervised.views import training_views
from ws_resnet import ws_resnet18

params: ModelParams = BYOLParams(dataset_name="cifar10", lr=0.3)
other: ModelParams = PRESETS["simclr"](batch_size=64)
assert_type(SimSiamParams(lr=0.3), ModelParams)  # a preset of a preset
assert_type(PRESETS["simclr"](), ModelParams)
assert_type(ssl.LINEAR_PRESETS["linear_sgd"](), LinearClassifierMethodParams)
SimSiamParams(learning_rate=0.3)  # type: ignore[call-arg]
model: SelfSupervisedMethod = SelfSupervisedMethod(params, seed=0)
model = SelfSupervisedMethod("simclr", loss=get_loss(params))
model = SelfSupervisedMethod(SimSiamParams, loss=lambda q, k, queue: (q - k).square().mean())
trainer = pl.Trainer(max_epochs=1)
images = torch.utils.data.TensorDataset(torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
trainer.fit(model, torch.utils.data.DataLoader(images))
embeddings: torch.Tensor = model(torch.zeros(2, 3, 32, 32))
linear: LinearClassifierMethod = LinearClassifierMethod.from_moco_checkpoint("run.ckpt", lr=1.0)
settings: LinearClassifierMethodParams = linear.params
encoder, width = get_encoder(params)
n: int = width
head: torch.nn.Module = MLP(width, 512, 128, 2)
optimizer: torch.optim.Optimizer = LARS(encoder.parameters(), lr=0.1)
norm: torch.nn.Module = BatchRenorm1d(128)
resnet: torch.nn.Module = ws_resnet18()
scores: dict[str, float] = knn(embeddings, embeddings, embeddings, embeddings) | rank_me(embeddings)
scores |= linear_probe(embeddings, embeddings, embeddings, embeddings)
loss: torch.Tensor = get_loss(params)(embeddings, embeddings, None)["loss"]
products: torch.Tensor = similarities(embeddings, embeddings, in_batch=True)
views: list[torch.Tensor] = training_views(params)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 0)
ranks: int = distributed.rank() + distributed.world_size()
gathered: torch.Tensor = distributed.gather(embeddings)
newest: Path | None = ssl.newest("runs/byol")
callback: pl.Callback = ssl.Checkpoints("runs/byol", every_n_steps=100)
features: torch.nn.Module = ssl.load_encoder("run.ckpt").model
results: dict[str, object] = ssl.evaluate_checkpoint("run.ckpt", ["knn"])
file: Path = ssl.export("run.ckpt", "onnx", "encoder.onnx")
