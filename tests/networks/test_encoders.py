import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import save_checkpoint
from torch import nn
from torchvision.transforms import functional

import ws_resnet
from moco import SelfSupervisedMethod
from model_params import PRESETS, ModelParams
from self_supervised import catalogue
from self_supervised.networks import builders, encoders, keys, pretrained, published
from self_supervised.networks.encoder_hash import encoder_hash
from self_supervised.networks.pretrained import load_encoder


def build(name, size=32, **fields):
    dataset = {1: "digits"}.get(fields.get("in_channels"), "cifar10")
    return encoders.get_encoder(
        ModelParams(encoder_arch=name, transform_crop_size=size, dataset_name=dataset, **fields)
    )


REGNETS = ("regnet_x_400mf", "regnet_y_400mf")  # cannot be built on meta; the larger ones are the same code
HAS_AUXILIARY_CLASSIFIERS = ("googlenet", "inception_v3")  # only in train mode


@pytest.mark.parametrize(
    "name", [n for n in catalogue.torchvision_models() if not n.startswith("regnet") or n in REGNETS]
)
def test_every_torchvision_classifier_gives_n_by_e(name):
    """Shapes are computed on the meta device, without arithmetic."""
    size = 299 if name == "inception_v3" else 224
    with torch.device("cpu" if name in REGNETS else "meta"):
        classifier = builders.build_classifier(name, None, size)
        linear = [layer.in_features for layer in classifier.modules() if isinstance(layer, nn.Linear)]
        convolutions = [layer.in_channels for layer in classifier.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d)]
        encoder = builders.without_last_layer(classifier, name)
    encoder.to("meta").train(name in HAS_AUXILIARY_CLASSIFIERS)
    frames = (16,) if name in catalogue.video_models() else ()
    width = (linear or convolutions)[-1]
    assert encoder(torch.zeros(2, 3, *frames, size, size, device="meta")).shape == (2, width)
    assert not any(getattr(layer, "out_features", 0) in (1000, 400) for layer in encoder.modules())


@pytest.mark.parametrize("name", HAS_AUXILIARY_CLASSIFIERS)
def test_inception_networks_get_pixels_from_minus_1_to_1(name):
    """torchvision's transform_input turns ImageNet's constants into these, but a checkpoint does not hold it."""
    with torch.device("meta"):
        assert not builders.build_classifier(name, None, 299).transform_input
    x = torch.rand(2, 3, 4, 4)
    for dataset in ("imagenet", "cifar10"):
        constants = (catalogue.DATASETS[dataset].mean, catalogue.DATASETS[dataset].std)
        theirs = torchvision.models.GoogLeNet._transform_input(
            SimpleNamespace(transform_input=True), functional.normalize(x, *constants)
        )
        ours = pretrained.without_transform_input({"dataset_name": dataset})
        assert torch.allclose(functional.normalize(x, *ours.values()), theirs, atol=1e-5)
        assert dataset != "imagenet" or ours["image_mean"] == pytest.approx([0.5] * 3)
    assert published.facts_of_weights(name, "DEFAULT")["image_std"] == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"pixels from -1 to 1\. Set image_mean=\[0.5, 0.5, 0.5\]"):
        build(name, 299, encoder_weights="DEFAULT")


def test_embeddings_are_the_classifiers_input():
    """The removed layer applied to the encoder's output gives torchvision's output."""
    for name in ("resnet18", "mobilenet_v3_small", "convnext_tiny", "squeezenet1_1"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected = model(x)
            last_type = nn.Conv2d if name.startswith("squeezenet") else nn.Linear
            last = [layer for layer in model.modules() if isinstance(layer, last_type)][-1]
            found = builders.without_last_layer(model, name)(x)
            if name.startswith("squeezenet"):  # its classifier comes before the pooling
                assert found.shape == (1, 512)
            else:
                assert torch.allclose(last(found), expected, atol=1e-4), name


@pytest.mark.parametrize("name", ["resnet18", "ws_resnet18"])
def test_low_resolution_stem(name):
    encoder, width = build(name, size=32)
    stem = encoder.conv1
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(encoder.maxpool, nn.Identity) and width == 512
    assert isinstance(stem, ws_resnet.Conv2d) == name.startswith("ws")
    maps = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: maps.append(output.shape[2:]))
    encoder(torch.zeros(2, 3, 32, 32))
    assert maps == [(32, 32)]
    assert build(name, size=96)[0].conv1.kernel_size == (7, 7)
    assert build(name, size=32, low_resolution_stem=False)[0].conv1.kernel_size == (7, 7)
    assert build(name, size=96, low_resolution_stem=True)[0].conv1.kernel_size == (3, 3)


@pytest.mark.parametrize("name, last", [("resnet18", "bn2"), ("resnext50_32x4d", "bn3"), ("ws_resnet18", "bn2")])
def test_residual_blocks_that_begin_as_the_identity(name, last):
    encoder, _ = build(name, size=64, zero_init_residual=True)
    weights = dict(encoder.named_parameters())
    assert all(
        bool(weights[key].any()) != key.endswith(f"{last}.weight")
        for key in weights
        if ".bn" in key and "weight" in key
    )
    block, x = (
        encoder.layer1[1].eval(),
        torch.rand(1, encoder.layer1[0].conv1.in_channels * (1 if last == "bn2" else 4), 8, 8),
    )
    assert torch.equal(block(x), x)
    with pytest.raises(ValueError, match="zero_init_residual=True does not fit encoder_arch='vit_b_32'"):
        build("vit_b_32", zero_init_residual=True)


@pytest.mark.parametrize("name", ["resnet18", "ws_resnet18", "small_cnn_1024"])
def test_cells_of_the_last_map(name):
    """Weights stay; the mean of the four quadrants is the usual embedding; a user's own module can be built twice."""
    torch.manual_seed(0)
    encoder, width = build(name, size=128)
    cells, wide = build(name, size=128, pooling_size=2)
    cells.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 128, 128)
    quadrants = cells.eval()(x).unflatten(1, (width, 4))
    assert wide == 4 * width and torch.allclose(quadrants.mean(2), encoder.eval()(x), atol=1e-6)
    assert quadrants.std(2).median() > 0
    params = ModelParams(dataset_name="cifar10", encoder_arch="module", transform_crop_size=128, pooling_size=2)
    assert [encoders.get_encoder(params, encoder)[1] for _ in range(2)] == [wide, wide]


@pytest.mark.parametrize("name", ["vgg11", "shufflenet_v2_x0_5", "vit_b_32"])
def test_cells_need_a_map_that_is_pooled_last(name):
    with pytest.raises(ValueError, match=f"pooling_size=2 needs an encoder .*unlike {name}"):
        build(name, size=64, pooling_size=2)
    with pytest.raises(ValueError, match=r"last map of resnet18 has 1 x 1 pixels for images of 32\. Choose"):
        build("resnet18", size=32, low_resolution_stem=False, pooling_size=2)
    own = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(147, 2))
    with pytest.raises(ValueError, match="unlike module: leave it out"):
        encoders.get_encoder(ModelParams(encoder_arch="module", pooling_size=2), own)
    assert own[0].output_size == 7
    views = {"transform_crop_size": 96, "transform_small_crop_size": 32, "n_small_views": 1}
    with pytest.raises(ValueError, match=r"1 x 1 pixels for images of 32\. Choose"):
        SelfSupervisedMethod(
            PRESETS["simclr"](dataset_name="stl10", low_resolution_stem=False, pooling_size=2, **views)
        )


@pytest.mark.parametrize("name", ["resnet18", "ws_resnet18", "shufflenet_v2_x0_5", "vit_b_32"])
@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels(name, channels):
    encoder, width = build(name, size=64, in_channels=channels)
    assert encoder.eval()(torch.zeros(1, channels, 64, 64)).shape == (1, width)


def test_weights_from_a_file_with_and_without_classifier(tmp_path):
    torch.manual_seed(1)
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / "full.pt")
    encoder, _ = build("resnet18", size=64, encoder_weights=str(tmp_path / "full.pt"))
    source.fc = nn.Identity()
    torch.save(source.state_dict(), tmp_path / "headless.pt")
    twin, _ = build("resnet18", size=64, encoder_weights=str(tmp_path / "headless.pt"))
    for key, value in source.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], value) and torch.equal(twin.state_dict()[key], value)
    torch.save({"conv1.weight": source.conv1.weight.detach()}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"encoder_weights=.*part.pt. .*missing: bn1.weight"):
        build("resnet18", size=64, encoder_weights=str(tmp_path / "part.pt"))


def test_unknown_weights_are_refused_with_the_choices():
    with pytest.raises(
        ValueError, match="encoder_weights='IMAGENET' is not a file, and resnet50 has only .*IMAGENET1K_V2"
    ):
        build("resnet50", encoder_weights="IMAGENET")
    with pytest.raises(ValueError, match="no published weights of ws_resnet18"):
        build("ws_resnet18", encoder_weights="DEFAULT")


def test_width_is_checked():
    assert build("resnet18", embedding_dim=512)[1] == 512
    with pytest.raises(ValueError, match="embedding_dim=2048 in .*, but resnet18 gives 512"):
        build("resnet18", embedding_dim=2048)


def test_an_encoder_that_cannot_take_the_images_is_refused_when_built():
    with pytest.raises(ValueError, match=r"encoder_arch='alexnet' cannot encode images of shape \(1, 3, 32, 32\)"):
        build("alexnet")
    with pytest.raises(ValueError, match="transform_crop_size=100 does not fit vit_b_16"):
        build("vit_b_16", size=100)


def test_a_users_module():
    common = {"embedding_dim": None, "activation_checkpointing": False, "pooling_size": 1}
    params = SimpleNamespace(encoder_arch="module", input_shape=(3, 8, 8), **common)
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder, width = encoders.get_encoder(params, own)
    assert encoder is own and width == 4 and own.training and own[1].num_batches_tracked == 0
    x = torch.randn(2, 3, 8, 8)
    pooled = own[:3]  # maps of one pixel are flattened, also of a copy and by the next method
    for module in (pooled, pooled, copy.deepcopy(pooled)):
        assert encoders.get_encoder(params, module)[1] == 4 and torch.equal(module.eval()(x), own.eval()(x))
    assert pooled.state_dict().keys() == own.state_dict().keys()
    with pytest.raises(ValueError, match=r"got \(1, 4, 6, 6\): flatten or pool"):
        encoders.get_encoder(params, own[:2])
    with pytest.raises(ValueError, match="needs encoder=your_module"):
        encoders.get_encoder(params)
    with pytest.raises(ValueError, match="encoder_arch='resnet18' needs no encoder"):
        encoders.get_encoder(ModelParams(), own)


def test_timm_where_it_is_installed():
    if importlib.util.find_spec("timm") is None:
        with pytest.raises(ValueError, match="timm, which is not installed: pip install timm"):
            ModelParams(encoder_arch="timm:resnet10t")
    else:
        encoder, width = build("timm:resnet10t", size=64, in_channels=1)
        assert encoder.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, width)
        with pytest.raises(ValueError, match="Nearest: .*resnet10t"):
            ModelParams(encoder_arch="timm:resnet10")


@pytest.mark.slow
def test_timms_vit_is_built_for_the_size_of_the_images(tmp_path):
    """By name, from a checkpoint's settings, and from tensors alone, whose position embeddings determine the size."""
    pytest.importorskip("timm")
    fields = {"encoder_arch": "timm:vit_tiny_patch16_224", "dataset_name": "stl10"}
    model = SelfSupervisedMethod(**fields, K=64, seed=0)
    assert model.hparams.embedding_dim == 192 and model.model.built_for == {"img_size": 96}
    save_checkpoint(model, tmp_path / "own.ckpt")
    torch.save(model.model.state_dict(), tmp_path / "bare.pt")
    images = torch.randint(255, (2, 3, 96, 96), dtype=torch.uint8)
    own, bare = load_encoder(tmp_path / "own.ckpt"), load_encoder(tmp_path / "bare.pt")
    assert bare.params.crop_size == 96 and bare.params.encoder_arch.startswith("timm:vit_tiny")
    assert own.embed(images).shape == bare.embed(images).shape == (2, 192)
    with pytest.raises(ValueError, match="position embeddings of its timm:vit_tiny_patch16_224 are for"):
        load_encoder(tmp_path / "own.ckpt", transform_crop_size=64)
    with_small = SelfSupervisedMethod("dino", **fields, n_small_views=1, transform_small_crop_size=48, seed=0)
    weights = with_small.model.state_dict()
    assert with_small.model(torch.zeros(2, 3, 48, 48)).shape == (2, 192)
    assert {name: x.shape for name, x in weights.items()} == {n: x.shape for n, x in model.model.state_dict().items()}


def test_a_size_at_which_timms_vit_cuts_off_the_border_is_named(tmp_path):
    timm = pytest.importorskip("timm")
    vit, mixer = "timm:vit_tiny_patch16_224", "timm:mixer_s32_224"
    for name, size, patch in ((vit, 40, 16), (mixer, 80, 32)):
        with pytest.warns(UserWarning, match=f"transform_crop_size={size}: .*ignores the border.* size, {patch} "):
            build(name, size=size)
    build(vit, size=48)
    build("timm:resnet10t", size=50)  # its convolutions pad
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict(), tmp_path / "vit.pt")
    with pytest.warns(UserWarning, match="transform_crop_size=40: .*teacher_crop_size"):
        load_encoder(tmp_path / "vit.pt", encoder_arch=vit, transform_crop_size=40)


def drop_probabilities(network) -> set[float]:
    return {round(layer.drop_prob, 3) for layer in network.modules() if hasattr(layer, "drop_prob")}


def test_stochastic_depth_is_that_of_the_network_in_training_alone(tmp_path):
    """Neither the lagging model has it, as the teacher of DINO's authors, nor an encoder of its checkpoint."""
    pytest.importorskip("timm")
    fields = {"encoder_arch": "timm:test_vit", "dataset_name": "cifar10", "K": 64, "seed": 0}
    loaded = []
    for rate in (0.5, None):
        method = SelfSupervisedMethod("byol", **fields, drop_path_rate=rate)
        x = torch.randn(8, 3, 32, 32)
        for network, draws in ((method.model.train(), rate is not None), (method.lagging_model.train(), False)):
            assert torch.equal(network(x), network(x)) != draws
            assert (max(drop_probabilities(network), default=0) == 0.5) == draws
        assert torch.equal(method.model.eval()(x), method.lagging_model(x))
        save_checkpoint(method, tmp_path / "a.ckpt")
        loaded.append(load_encoder(tmp_path / "a.ckpt"))
        assert not drop_probabilities(loaded[-1]) and loaded[-1].params.drop_path_rate is None
    assert encoder_hash(loaded[0]) == encoder_hash(loaded[1])


def test_the_lagging_model_has_no_stochastic_depth_of_other_libraries():
    class SwinDropPath(nn.Module):
        def __init__(self, drop_prob: float):
            super().__init__()
            self.drop_prob = drop_prob

    class OwnDropPath(nn.Module):  # one that cannot be told what to do
        def __init__(self):
            super().__init__()
            self.register_buffer("drop_prob", torch.tensor(0.5))

    parts = [SwinDropPath(0.5), OwnDropPath(), torchvision.ops.StochasticDepth(0.5, "row")]
    copied = keys.frozen_copy(nn.Sequential(*parts, nn.Dropout(0.5)))
    assert [copied[0].drop_prob, float(copied[1].drop_prob), copied[2].p, copied[3].p] == [0, 0.5, 0, 0.5]
    assert parts[0].drop_prob == parts[2].p == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "drop_path_rate=0.1 does not fit encoder_arch='resnet18'. It is for timm's encoders. Choose"),
        ("module", "does not fit encoder_arch='module'. .*build your own module with it"),
        ("timm:densenet121", "drop_path_rate=0.1: timm's densenet121 has no stochastic depth. Choose another"),
    ],
)
def test_stochastic_depth_is_refused_where_the_encoder_has_none(name, message):
    with pytest.raises(ValueError, match=message):
        build(name, drop_path_rate=0.1)


@pytest.mark.slow
def test_without_a_rate_timms_own_stays():
    timm = pytest.importorskip("timm")
    image, own = torch.zeros(1, 3, 32, 32), timm.create_model("swin_tiny_patch4_window7_224", img_size=32)
    assert drop_probabilities(own) == drop_probabilities(
        builders.build_timm("swin_tiny_patch4_window7_224", False, image)
    )
    rates = drop_probabilities(builders.build_timm("swin_tiny_patch4_window7_224", False, image, drop_path_rate=0.0))
    assert rates <= {0.0} < drop_probabilities(own) | {0.0}


def clips(name, size=16, frames=4, **fields):
    params = ModelParams(
        dataset_name="kinetics", encoder_arch=name, transform_crop_size=size, num_frames=frames, **fields
    )
    return encoders.get_encoder(params)


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18", "swin3d_t", "s3d"])
def test_encoders_of_clips_by_name(name):
    """The encoder followed by the removed layer equals torchvision's model with the same weights."""
    size, frames = (16, 4) if name != "s3d" else (96, 10)
    encoder, width = clips(name, size, frames)
    reference, x = torchvision.models.get_model(name).eval(), torch.randn(2, 3, frames, size, size)
    last = [layer for layer in reference.modules() if isinstance(layer, nn.Conv3d if name == "s3d" else nn.Linear)][-1]
    missing = encoder.load_state_dict(reference.state_dict(), strict=False)
    assert not missing.missing_keys and len(missing.unexpected_keys) == 2
    with torch.no_grad():
        embeddings = encoder.eval()(x)
        assert embeddings.shape == (2, width)
        if name == "s3d":  # torchvision's pooling window does not fit such small clips
            embeddings, reference.avgpool = embeddings[:, :, None, None, None], nn.AdaptiveAvgPool3d(1)
        assert torch.allclose(last(embeddings).flatten(1), reference(x), atol=1e-5)


def test_large_clips_are_pooled_as_torchvision_does():
    assert isinstance(clips("s3d", 224, 16)[0].avgpool, nn.AvgPool3d)
    x = torch.randn(1, 4, 2, 7, 7)  # the smallest map that fits its window: at 14 frames of 224 pixels
    pooled = builders.build_classifier("s3d", None, 224).avgpool(x)
    assert torch.allclose(pooled, builders.build_classifier("s3d", None, 223).avgpool(x), atol=1e-6)


def test_multiscale_transformers_take_clips_of_one_size():
    with torch.device("meta"):  # an image is encoded where the encoder is
        assert clips("mvit_v2_s", 224, 16)[1] == 768
    with pytest.raises(ValueError, match="num_frames=16 .is 8. and transform_crop_size=224 .is 112."):
        clips("mvit_v2_s", 112, 8)


def test_too_few_frames_are_refused():
    with pytest.raises(
        ValueError, match=r"cannot encode clips of shape \(1, 3, 4, 32, 32\) \(num_frames, transform_cr"
    ):
        clips("s3d", 32, 4)


def test_any_number_of_channels_of_clips():
    for name in ("r3d_18", "swin3d_t"):
        encoder, width = clips(name, in_channels=2, image_mean=[0.5] * 2, image_std=[0.2] * 2)
        assert encoder.eval()(torch.zeros(1, 2, 4, 16, 16)).shape == (1, width)


def test_encoders_of_clips_refuse_images_and_the_reverse():
    with pytest.raises(ValueError, match="'resnet18' encodes images, and dataset_name='kinetics' has clips.*r3d_18"):
        clips("resnet18")
    with pytest.raises(ValueError, match="'r3d_18' encodes clips, and dataset_name='cifar10' has images"):
        build("r3d_18")
    with pytest.raises(ValueError, match="for clips .*Nearest: r3d_18"):
        ModelParams(encoder_arch="r3d18")


def test_a_users_encoder_of_clips_has_the_layout_of_clips():
    own = nn.Sequential(nn.Conv3d(3, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    params = ModelParams(dataset_name="kinetics", encoder_arch="module", transform_crop_size=16)
    encoder, width = encoders.get_encoder(params, own)
    assert width == 4 and own[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
