"""The accuracy on CIFAR-10 that equal minutes of training reach, without labels, on the same processors.

    python -m benchmarks.race --minutes 30 --seeds 0 1 2
    python -m benchmarks.race --minutes 5 --seeds 0 --only simclr
    python -m benchmarks.race --minutes 6 --encoder_arch shufflenet_v2_x0_5 --teacher runs/vicreg --who ours
    python -m benchmarks.race --minutes 30 --recipe cifar10_quick --who ours --only vicreg

lightly's SimCLR, BYOL and VICReg train a ResNet-18 in the loop, and with the settings, of its own examples
(examples/pytorch/*.py, batches of 256: SGD with a constant learning rate and no momentum). With --sgd benchmark, they
have the SGD of its CIFAR-10 benchmark instead (of SimCLR and BYOL; it has no VICReg), with momentum, weight decay and a
cosine over the minutes. Ours train the same network with the recipe `cifar10_laptop`, or the network of another recipe,
with as many steps as fit into the minutes. The speed is measured first, for a twentieth of the minutes, which are not
counted. Every finished run is a row of race.csv and is not repeated with the same threads and learning rate. With
--teacher, a run of this library, ours are joined by a student of it (race_teacher.csv); its minutes have the teacher's
passes, but not the teacher's training.

Accuracies are those of `self-supervised evaluate` (linear, kNN with k = 20): all training images, and the test images,
in their own size, and with the pooling that the recipe names for its evaluation (`pooling_size`; 1 for lightly's).
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytorch_lightning as pl
import torch
import torchvision
from attrs import evolve
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness, peers
from benchmarks.cifar10 import accuracies_of
from benchmarks.peer_loops import WORKERS
from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised import recipes
from self_supervised.data import data_sets
from self_supervised.demo import features
from self_supervised.networks import encoders
from self_supervised.training.precision import best_precision
from self_supervised.training.schedules import cosine

METHODS = ("simclr", "byol", "vicreg")
STUDENT = "distill"
OF_LIGHTLY = "cifar10_laptop"  # the recipe whose network, batches and images lightly's have
EXAMPLE, BENCHMARK = "its example", "its example, SGD of its benchmark"
SGD_OF_LIGHTLY = {  # examples/pytorch/*.py; docs/source/getting_started/benchmarks/cifar10_benchmark.py, per 128 images
    EXAMPLE: {"lr": 0.06},
    BENCHMARK: {"lr": 0.06 * 256 / 128, "momentum": 0.9, "weight_decay": 5e-4},
}
QUICK = {
    "dataset_name": "digits",
    "in_channels": 3,
    "encoder_arch": "small_cnn",
    "batch_size": 64,
    "dim": 16,
    "mlp_hidden_dim": 16,
}


# ---- lightly's examples ----


class ForLightly(Dataset):
    """Images of our packed set, of which lightly's transforms make both views."""

    def __init__(self, params: ModelParams, transform: Callable):
        images = data_sets.get_dataset(params, params.dataset.pretraining_splits)
        self.images = [torchvision.transforms.functional.to_pil_image(images[i][0]) for i in range(len(images))]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index].convert("RGB"))


class Lightly(nn.Module):
    """One of lightly's examples: networks, loss of two views, transform."""

    def __init__(self, method: str, pixels: int):
        super().__init__()
        from lightly import loss, transforms
        from lightly.models import utils
        from lightly.models.modules import heads
        from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

        self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1], nn.Flatten())
        self.lagging, size = [], {"input_size": pixels}
        if method == "simclr":
            self.head, criterion = heads.SimCLRProjectionHead(512, 512, 128), loss.NTXentLoss()
            self.transform = transforms.SimCLRTransform(**size, gaussian_blur=0.0)
        elif method == "vicreg":
            self.head, criterion = heads.VICRegProjectionHead(512, 2048, 2048, num_layers=2), loss.VICRegLoss()
            self.transform = transforms.VICRegTransform(**size)
        else:
            self.head, criterion = heads.BYOLProjectionHead(512, 1024, 256), loss.NegativeCosineSimilarity()
            views = (view(**size, gaussian_blur=0.0) for view in (BYOLView1Transform, BYOLView2Transform))
            self.transform = transforms.BYOLTransform(*views)
            self.predictor = heads.BYOLPredictionHead(256, 1024, 256)
            self.lagging = copy.deepcopy(nn.ModuleList([self.backbone, self.head])).requires_grad_(False)
        self.update, self.criterion = utils.update_momentum, criterion

    def loss(self, a: Tensor, b: Tensor, progress: float) -> Tensor:
        if not len(self.lagging):
            return self.criterion(self.head(self.backbone(a)), self.head(self.backbone(b)))
        from lightly.utils.scheduler import cosine_schedule

        m = cosine_schedule(int(1000 * progress), 1000, 0.996, 1)
        for online, lagging in zip((self.backbone, self.head), self.lagging, strict=True):
            self.update(online, lagging, m=m)
        with torch.no_grad():
            keys = [self.lagging[1](self.lagging[0](x)) for x in (b, a)]
        queries = [self.predictor(self.head(self.backbone(x))) for x in (a, b)]
        return 0.5 * (self.criterion(queries[0], keys[0]) + self.criterion(queries[1], keys[1]))


def lightlys(params: ModelParams, method: str, minutes: float, recipe: str) -> tuple[nn.Module, int]:
    """Return the encoder after some minutes of lightly's example, and the images that it saw."""
    torch.manual_seed(params.seed)
    model = Lightly(method, params.crop_size)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD_OF_LIGHTLY[recipe])
    data = ForLightly(params, model.transform)
    loader = DataLoader(data, params.batch_size, shuffle=True, drop_last=True, num_workers=WORKERS)
    seen, start = 0, time.perf_counter()
    for a, b in endless(loader):
        passed = (time.perf_counter() - start) / (60 * minutes)
        if passed >= 1:
            break
        if recipe == BENCHMARK:
            optimizer.param_groups[0]["lr"] = cosine(SGD_OF_LIGHTLY[recipe]["lr"], 0.0, passed)
        loss = model.loss(a, b, passed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += len(a)
    return model.backbone, seen


def endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


# ---- ours ----


def ours(params: ModelParams, _: str, minutes: float, recipe: str) -> tuple[nn.Module, int]:
    """Return the encoder after as many steps as fit into the minutes, and the images that it saw."""
    steps = max(1, round(minutes * 60 * speed(params, minutes / 20) / params.batch_size))
    images = len(data_sets.get_dataset(params, params.dataset.pretraining_splits))
    method = SelfSupervisedMethod(params, warmup_epochs=steps / 10 / (images // params.batch_size))
    trainer = pl.Trainer(max_epochs=-1, max_steps=steps, precision=best_precision(method), **harness.QUIET_TRAINER)
    trainer.fit(method)
    return method.model, trainer.global_step * params.batch_size


def speed(params: ModelParams, minutes: float, skipped: int = 4) -> float:
    """Return images per second of some minutes of training, without the first steps."""
    method, marks = SelfSupervisedMethod(params), []
    clock = pl.callbacks.LambdaCallback(on_train_batch_end=lambda *_: marks.append(time.perf_counter()))
    length = {"max_epochs": 1000, "min_steps": skipped + 8, "max_time": timedelta(minutes=minutes)}
    pl.Trainer(**length, precision=best_precision(method), callbacks=[clock], **harness.QUIET_TRAINER).fit(method)
    return (len(marks) - 1 - skipped) * params.batch_size / (marks[-1] - marks[skipped])


# ---- the race ----


def finished_run(known: harness.Row, settings: dict) -> harness.Row:
    method, minutes = known["method"], known["minutes"]
    commit = harness.commit()
    changes = {"encoder_arch": known["encoder"], "seed": known["seed"], **settings}
    recipe = OF_LIGHTLY if known["who"] == "lightly" else known["recipe"]
    params = recipes.recipe(method, recipe, **changes, evaluations=[], num_data_workers=0)
    pooled = evolve(params, transform_crop_size=None, pooling_size=known["pooling_size"])  # the images' own size
    encoders.get_encoder(pooled)  # raises before the training if it cannot be pooled
    start = time.perf_counter()
    encoder, seen = {"lightly": lightlys, "ours": ours}[known["who"]](params, method, minutes, known["recipe"])
    passed = (time.perf_counter() - start) / 60
    if pooled.pooling_size > 1:
        encoders.pool_cells(encoder, pooled)
    if known["who"] == "lightly":
        pooled = evolve(pooled, image_mean=peers.MEAN, image_std=peers.STD)  # its transforms' default
    scores = accuracies_of(*features(encoder, pooled))
    facts = {"images seen": seen, "minutes in all": round(passed, 2), "commit": commit}
    return {**known, **scores, **facts}


def main(argv: list[str] | None = None) -> None:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--minutes", type=float, default=30.0, help="training time of each run (30)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument("--only", nargs="+", choices=(*METHODS, STUDENT), help="methods (all)")
    parser.add_argument("--who", nargs="+", choices=("ours", "lightly"), default=("ours", "lightly"), help="libraries")
    kinds = ["cifar10_laptop", "cifar10_quick"]
    parser.add_argument("--recipe", choices=kinds, default=kinds[0], help=f"recipe of ours ({kinds[0]})")
    parser.add_argument("--sgd", choices=("example", "benchmark"), default="example", help="lightly's SGD (example)")
    parser.add_argument("--encoder_arch", metavar="NAME", help="encoder of ours (that of the recipe)")
    parser.add_argument("--teacher", metavar="RUN", help="teacher of the student, anything that load_encoder reads")
    args = parser.parse_args(argv)
    harness.silence()
    if args.quick:
        args.minutes, args.seeds, args.only = 0.01, [0], METHODS[:1]
    if STUDENT in (args.only or ()) and not args.teacher:
        parser.error(f"{STUDENT} needs --teacher")
    methods = args.only or (*METHODS, *[STUDENT] * bool(args.teacher))
    if missing := [name for name in methods if name not in recipes.KINDS[args.recipe].rows]:
        parser.error(f"--recipe {args.recipe} has no {', '.join(missing)}: choose others with --only")
    who = [*["ours"] * ("ours" in args.who), *(harness.installed("lightly") if "lightly" in args.who else [])]
    table = "race_teacher" if args.teacher else "race"
    path = args.out / f"{table}.csv"
    rows_before = len(harness.finished(path))
    lacking = {STUDENT} | ({"vicreg"} if args.sgd == "benchmark" else set())  # methods that lightly's have not
    for seed, method, name in itertools.product(args.seeds, methods, who):
        recipe = args.recipe if name == "ours" else {"example": EXAMPLE, "benchmark": BENCHMARK}[args.sgd]
        of_recipe = recipes.KINDS[args.recipe if name == "ours" else OF_LIGHTLY].settings["encoder_arch"]
        encoder = args.encoder_arch if name == "ours" and args.encoder_arch else of_recipe
        encoder = QUICK["encoder_arch"] if args.quick else encoder
        known = {"who": name, "method": method, "recipe": recipe, "encoder": encoder}
        known["lr"] = recipes.recipe(method, recipe).lr if name == "ours" else SGD_OF_LIGHTLY[recipe]["lr"]
        cells = recipes.KINDS[recipe].reading.get("pooling_size", 1) if name == "ours" else 1
        known |= {"pooling_size": cells, "threads": torch.get_num_threads(), "seed": seed, "minutes": args.minutes}
        if args.teacher:
            known["teacher"] = args.teacher if method == STUDENT else ""
        rows = harness.finished(path)
        if not (harness.has(rows, known) or (name == "lightly" and method in lacking)):
            taught = {"teacher": args.teacher} if method == STUDENT else {}
            row = finished_run(known, {**taught, **(QUICK if args.quick else {})})
            others = harness.installed("lightly") if any(one["who"] == "lightly" for one in [*rows, row]) else []
            harness.report(table, [*rows, row], args.out, *others)
    harness.explain_nothing_new(path, rows_before)


if __name__ == "__main__":
    main()
