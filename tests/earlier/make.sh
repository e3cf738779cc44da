#!/bin/sh
# Make the files of this directory with the programs of commit 03718b3, when these were modules of the top directory.
# Run it in a checkout of that commit, with its python: sh tests/earlier/make.sh /tmp/earlier
# Do not regenerate them with a later commit: they must hold what that commit wrote.
set -e
tests=$(pwd)/tests/earlier
export PYTHONPATH=$tests:$(pwd) DATA_PATH=$(mktemp -d)
mkdir "$1"
cd "$1"
run() { python "$tests/tiny.py" "$@"; }

small="--encoder_arch timm:earlier_tiny --dim 8 --mlp_hidden_dim 8 --seed 3"
digits="$small --dataset_name digits --batch_size 32"
short="--max_epochs 2 --limit_train_batches 5 --log_every_n_steps 1 --evaluations knn,rank_me --logger csv"

# A run, with a checkpoint within its second epoch (step 8), at its end (step 10), and a linear classifier.
run train byol $digits $short --lr 0.1 --checkpoint_every_n_steps 3 --save_best valid_knn20_acc --linear_epochs 1 \
    --linear_lr 0.1 --out run
run evaluate run/pretrained.ckpt --protocols knn
run tools.embed run/pretrained.ckpt digits/test --out features.parquet --num_workers 0

# A checkpoint with a queue.
run train moco_v2 $digits $short --K 64 --lr 0.1 --out moco
mv moco/pretrained.ckpt moco_v2.ckpt

# A run on a directory of images, whose splits are drawn once.
python -c 'import tiny; tiny.write_images(tiny.Path("images"), 0, 40)'
run train simclr $small --dataset_name folder --data_path images --transform_crop_size 8 --in_channels 1 \
    --image_mean '[0.5]' --image_std '[0.25]' --batch_size 8 --num_data_workers 0 --max_epochs 1 --lr 0.1 \
    --evaluations knn --logger csv --out custom

# What the tests compare with.
python - <<'PYTHON'
import json
from pathlib import Path

import tiny

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod

found = {}
for kind, path in (
    (SelfSupervisedMethod, "run/pretrained.ckpt"),
    (SelfSupervisedMethod, "moco_v2.ckpt"),
    (LinearClassifierMethod, "run/linear.ckpt"),
):
    method = kind.load_from_checkpoint(path).cpu().eval()
    found[path] = method(tiny.fixed_images()).tolist()
found["features"] = sorted(path.name for path in Path("run/pretrained.evaluation/features").iterdir())
for name, settings in tiny.NAMED.items():
    state = SelfSupervisedMethod(**settings).state_dict()
    found[name] = {key: list(tensor.shape) for key, tensor in state.items()}
lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
Path("expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
PYTHON

# What no program needs to read, and what only tells of the machine.
rm -r moco images run/pretrained.evaluation/features run/linear/checkpoints/step_000000003.ckpt custom/pretraining/checkpoints
rm run/pretraining/checkpoints/best_*.ckpt
sed -i 's/"system": ".*"/"system": "Linux"/' run/run.json custom/run.json
