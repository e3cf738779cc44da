"""The program's own checks and tables with losses that need more than two views: labels, prototypes, a teacher."""

import pytest
from conftest import SMALL_OF

from self_supervised import train

SHORT = "--dataset_name digits --encoder_arch small_cnn --batch_size 64 --max_epochs 1 --limit_train_batches 2"


def run(preset: str, out, options: str) -> None:
    fields = " ".join(
        f"--{name} {value}" for name, value in SMALL_OF.get(preset, {}).items() if value not in ([], None)
    )
    train.main(f"{preset} {SHORT} {fields} --out {out} {options}".split())


@pytest.mark.parametrize(
    ("preset", "metric", "part"),
    [("swav", "step_prototypes", "prototypes"), ("dino", "grad_norm_prototypes", "lagging prototypes"),
     ("lejepa", "loss_sigreg", "projector"), ("supcon", "step_train_acc1", "projector")],
)  # fmt: skip
def test_a_dry_run_knows_metrics_and_parts(preset, metric, part, tmp_path, capsys):
    run(preset, tmp_path / "run", f"--dry_run --warmup_epochs 0 --save_best {metric}:max --log_gradient_norms")
    assert part in capsys.readouterr().out


def test_distillation_without_a_teacher_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="teacher=None: loss_type='seed' distills a teacher. Pass --teacher"):
        run("distill", tmp_path / "run", "")
