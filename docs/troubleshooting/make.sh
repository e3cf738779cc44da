#!/bin/sh
# Train the runs of docs/troubleshooting.md and draw its pictures: sh docs/troubleshooting/make.sh, from the repository's root.
# Takes about ten minutes on one core; after an interruption, run it again to resume.
set -e
OUT=${OUT:-runs/troubleshooting}
PYTHON=${PYTHON:-.venv/bin/python}

train() {
    name=$1
    shift
    [ -f "$OUT/$name/pretrained.ckpt" ] || $PYTHON -m self_supervised train "$@" --dataset_name digits --transform_crop_scale_min 0.6 \
        --batch_size 64 --max_epochs 8 --warmup_epochs 1 --weight_decay 5e-4 --mlp_hidden_dim 256 --dim 128 \
        --mlp_normalization bn --evaluations linear_probe,rank_me --seed 0 \
        --logger csv --log_every_n_steps 5 --resume auto --precision 32-true --out "$OUT/$name"
    cp "$OUT/$name/pretraining/metrics.csv" "docs/troubleshooting/$name.csv"
}

train simsiam simsiam --lr 0.05
train simsiam_no_stop_gradient simsiam --lr 0.05 --stop_gradient_of_keys false
train vicreg vicreg --lr 0.3 --lars_eta 0.02
train vicreg_no_variance vicreg --lr 0.3 --lars_eta 0.02 --variance_loss_weight 0
train simclr_lr_too_high simclr --lr 10
train simclr simclr --lr 0.06
train moco_v2 moco_v2 --lr 0.06 --K 1024
train byol_no_predictor byol --optimizer_name sgd --lr 0.05 --m 0.9 --prediction_mlp_layers 0
train byol byol --optimizer_name sgd --lr 0.05 --m 0.9

draw() {
    picture=$1
    shift
    $PYTHON -m self_supervised curves "$@" --out "docs/troubleshooting/$picture.png"
}

draw simsiam SimSiam="$OUT/simsiam" "no stop-gradient=$OUT/simsiam_no_stop_gradient"
draw vicreg VICReg="$OUT/vicreg" "variance weight 0=$OUT/vicreg_no_variance"
draw simclr "SimCLR, lr 0.06=$OUT/simclr" "lr 10=$OUT/simclr_lr_too_high"
draw byol BYOL="$OUT/byol" "no predictor=$OUT/byol_no_predictor"
draw moco_v2 "MoCo v2, K 1024=$OUT/moco_v2"
