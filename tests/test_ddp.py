"""Two real processes (gloo, CPU): what they compute together equals one process with the joined batch."""

import os
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import ddp
import losses
from model_params import PRESETS, ModelParams

WORLD, N, D = 2, 6, 8
CASES = {
    **{name: {"preset": name} for name in PRESETS},
    "queue and batch": {"use_negative_examples_from_batch": True},
    "eqco with the queue": {"use_eqco_margin": True},
    "bce": {"loss_type": "bce", "use_negative_examples_from_batch": True},
    "ip": {"loss_type": "ip", "use_negative_examples_from_batch": True},
}


def params_of(preset: str = "moco_v2", **fields) -> ModelParams:
    return PRESETS[preset](**{"encoder_arch": "shufflenet_v2_x0_5", "K": 16, "dim": D, **fields})


def loss_and_gradient(case: str, part: slice) -> tuple[float, torch.Tensor]:
    """The loss of a linear network on some rows of one fixed batch, and the gradient of its weights."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(WORLD * N, 5, generator=g) for _ in range(2))
    queue = F.normalize(torch.randn(16, D, generator=g), dim=1)
    weight = torch.randn(5, D, generator=g).requires_grad_()
    p = params_of(**CASES[case])
    q, k = (F.normalize(z, dim=1) if p.use_unit_sphere_projection else z for z in (x[part] @ weight, y[part] @ weight))
    k = k.detach() if p.use_lagging_model or p.stop_gradient_of_keys else k
    total = sum(
        losses.get_loss(p)(*pair, queue)["loss"] for pair in ([(q, k), (k, q)] if len(p.pairs) == 2 else [(q, k)])
    )
    return total.item(), torch.autograd.grad(total, weight)[0]


def on_each_process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        found = {case: loss_and_gradient(case, slice(rank * N, (rank + 1) * N)) for case in CASES}
        own = torch.arange(3.0) + 10 * rank
        found["gathered"] = ddp.gather(own)
        found["evaluated"] = ddp.gather_evaluated(torch.tensor([[0, 2, 4], [1, 3, 0]])[rank], total=5)
        found["from rank zero"] = ddp.on_rank_zero(lambda: {"score": 5.0 + rank})
        images = torch.arange(N).float().unsqueeze(1) + N * rank
        seen = []
        found["shuffled"] = ddp.shuffled(lambda x: seen.append(x) or x * 2, images, (3, 1), n_virtual_devices=8)
        found["seen"] = seen[0]
    except Exception:
        found = {"error": traceback.format_exc()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_each_process, args=(port, str(folder)), nprocs=WORLD)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    assert not any("error" in process for process in found), found
    return found


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_one_process_on_the_joined_batch(case, processes):
    """DDP averages gradients over processes; a loss of each process's own queries averages likewise."""
    loss, gradient = loss_and_gradient(case, slice(0, WORLD * N))
    assert torch.tensor([process[case][0] for process in processes]).mean().item() == pytest.approx(loss, rel=1e-5)
    averaged = torch.stack([process[case][1] for process in processes]).mean(0)
    assert torch.allclose(averaged, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_gathering(processes):
    for process in processes:
        assert process["gathered"].tolist() == [0, 1, 2, 10, 11, 12]
        assert process["evaluated"].tolist() == [0, 1, 2, 3, 4]  # each image once, in order
        assert process["from rank zero"] == {"score": 5.0}


def test_shuffled_images_come_back_to_their_place(processes):
    for rank, process in enumerate(processes):
        expected = (torch.arange(N).float().unsqueeze(1) + N * rank) * 2
        assert torch.equal(process["shuffled"], expected)
        assert not torch.equal(process["seen"] * 2, expected)
    both = torch.cat([process["seen"] for process in processes]).flatten()
    assert both.sort().values.tolist() == list(range(WORLD * N))


def test_without_processes_everything_is_the_identity():
    x = torch.randn(3, 2)
    assert ddp.gather(x) is x and ddp.gather_evaluated(x, 2) is x
    assert (ddp.rank(), ddp.world_size()) == (0, 1) and ddp.on_rank_zero(lambda: 3) == 3


def test_both_stages_under_lightnings_ddp(small, trainer, tmp_path):
    """Two processes train and agree on the scores, which are those of one process over the whole validation set."""
    from linear_classifier import LinearClassifierMethod
    from moco import SelfSupervisedMethod

    # 500 images in batches of 33 on 2 processes: the sampler repeats some, the last batches are smaller
    params = small("byol", mlp_normalization="ln", optimizer_name="sgd", batch_size=33, shuffle_batch_norm=True)
    options = {"strategy": "ddp_spawn", "devices": 2, "limit_val_batches": 1.0}
    fit = trainer(**options)
    fit.fit(SelfSupervisedMethod(params))
    fit.save_checkpoint(tmp_path / "ddp.ckpt")
    alone = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "ddp.ckpt")
    (expected,) = trainer(limit_val_batches=1.0).validate(alone, verbose=False)
    assert expected["valid_class_acc"] > 20
    for name, value in expected.items():
        assert fit.callback_metrics[name].item() == pytest.approx(value, rel=1e-3), name

    linear = LinearClassifierMethod.from_moco_checkpoint(tmp_path / "ddp.ckpt", batch_size=50, lr=0.1)
    stage = trainer(**options)
    stage.fit(linear)
    (expected,) = trainer(limit_val_batches=1.0).validate(linear, verbose=False)
    for name, value in expected.items():
        assert stage.callback_metrics[name].item() == pytest.approx(value, rel=1e-3), name
