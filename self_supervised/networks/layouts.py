"""Encoders in weights files of many systems: which tensors they are, under the names of torchvision and timm.

A checkpoint holds more than the encoder: heads, queues, a lagging model under nearly the same names. LAYOUTS has one
row per system that says which part is the trained encoder. That part must hold the complete encoder, and otherwise only
a head.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen
from torch import Tensor, nn

from model_params import EncoderAndDataParams
from self_supervised.catalogue import DATASETS
from self_supervised.fields import as_path, first_of
from self_supervised.networks.builders import adapted_to_channels
from self_supervised.networks.modules import plain_name
from self_supervised.numerics import not_finite
from self_supervised.torch_files import EXPORTED, safe_load


@frozen
class Layout:
    """Place of the trained encoder in the files of one system."""

    name: str
    prefix: str  # start of the encoder's keys, without prefixes of wrappers (DDP, torch.compile)
    signs: tuple[str, ...] = ("",)  # prefixes of other keys, one of which must be present: they identify the system
    holder: str | None = None  # the file's entry with the tensors, if that is needed to recognize the system
    stem_variant: str = "standard"  # of the system's ResNets for small images


WEIGHTS_SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors", ".tar", ".bin")
NAMES_SHOWN = 3  # of each kind, in a message
HEADS_OF_LIGHTLY = ("projection_head.", "prediction_head.", "projection_mlp.", "online_classifier.")
SIGNS_OF_OPENSELFSUP = ("neck.", "encoder_k.0.", "encoder_k.module.0.", "online_net.", "target_net.")
UNNAMED = ("backbone.", "encoder.", "encoder_q.", "base_encoder.", "model.", "net.")  # prefixes of unknown systems
MOMENTUM_OF_SOLO_LEARN = ("momentum_backbone.", "momentum_encoder.", "momentum_classifier.")  # not of all its methods
PLAIN_STARTS = (
    "conv1.",
    "features.",
    "cls_token",
    "class_token",
    "patch_embed.",
    "stem.",
    "layers.0.",
    "Conv2d_1a_3x3.",
)

# The first row that fits is used. Names are those in the systems' code and published files.
LAYOUTS = (
    Layout("dino", "backbone.", holder="teacher"),
    Layout("OpenSelfSup or mmselfsup", "backbone.", SIGNS_OF_OPENSELFSUP),
    Layout("moco", "encoder_q.", ("encoder_k.",)),
    Layout("moco v3", "base_encoder.", ("momentum_encoder.",)),
    Layout("lightly", "backbone.vit.", HEADS_OF_LIGHTLY),  # timm's ViT, wrapped for masks
    Layout("lightly", "student_backbone.vit.", ("teacher_backbone.",)),
    Layout("lightly", "backbone.", HEADS_OF_LIGHTLY),
    Layout("lightly", "student_backbone.", ("teacher_backbone.",)),
    # its own evaluations use the teacher, the lagging model
    Layout("stable-pretraining", "backbone.teacher.", ("backbone.student.",)),
    Layout("stable-pretraining", "backbone.", ("callbacks_modules.",)),
    Layout("solo-learn", "backbone.", ("classifier.",), stem_variant="padding_2"),
    Layout("solo-learn", "encoder.", ("classifier.",), stem_variant="padding_2"),  # its first versions
    Layout("barlowtwins", "backbone.", ("bn.running_mean",)),
    Layout("vicreg", "backbone.", ("projector.",)),
    Layout("names of torchvision or timm", "", PLAIN_STARTS),
    *(Layout(f"encoder under {prefix}", prefix) for prefix in UNNAMED),
    Layout("names without a system", ""),
)
OURS = Layout("self_supervised", "model.")
ORIGINAL = Layout("self_supervised, the original", "model.")
EXPORT = Layout("self_supervised, exported", "")

HOLDERS = (  # entries that hold tensors in known systems, then in others
    "state_dict", "model", "model_state_dict", "teacher", "backbone", "encoder", "encoder_q", "base_encoder", "net",
)  # fmt: skip
HEAD_NAMES = (  # mask_token: of DINOv2, only for its training
    "fc", "classifier", "head", "heads", "linear", "head_dist", "aux1", "aux2", "AuxLogits", "mask_token",
)  # fmt: skip
POSITION_EMBEDDINGS = ("pos_embed", "encoder.pos_embedding")  # of ViTs: of timm, of torchvision
RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
NUMBERED = ("conv1", "bn1", "relu", "maxpool", *RESNET_STAGES)  # nn.Sequential(*resnet.children()) of torchvision
NUMBERED_OF_LIGHTLY = ("conv1", "bn1", *RESNET_STAGES)  # likewise of lightly's ResNet; its stem loses the ReLU


@frozen
class WeightsFile:
    """Encoder in a weights file, with what the file says about it."""

    source: str  # path
    layout: str  # name of the system
    state: dict[str, Tensor] = field(repr=False)  # tensors of the encoder and its head, without prefix
    full: dict[str, Tensor] = field(repr=False)  # all tensors, with it
    left_out: tuple[str, ...]  # keys of all other tensors
    stem_variant: str  # of the stem, if it is one for small images
    settings: dict[str, Any]  # fields of EncoderAndDataParams; {} for files of other systems
    architecture: str | None = None  # name in the file ("arch")
    started_from: str | None = None  # weights from which the pretraining started, if the file is ours
    started_from_hash: str | None = None  # of their file

    @property
    def has_guessed_stem(self) -> bool:
        """Return whether the file is taken for solo-learn's for its classifier, as many files of others have."""
        is_solo_learns = not self.settings and self.stem_variant == "padding_2"
        return is_solo_learns and not any(key.startswith(MOMENTUM_OF_SOLO_LEARN) for key in self.left_out)


def lightning_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that Lightning has put into the directory of a logger (version_0), or None."""
    return max(folder.glob("checkpoints/*.ckpt"), key=os.path.getmtime, default=None)


def checkpoint_of(path_or_name: str | Path) -> str | Path:
    """Return the path of pretrained.ckpt for the directory of a run, or of `lightning_checkpoint` for that of a logger;
    any other path or name is returned as it is.

    Raises:
        FileNotFoundError: the run has no pretrained.ckpt yet.
    """
    folder = as_path(path_or_name)
    if os.path.isfile(folder / "pretrained.ckpt"):  # Path.is_file raises OSError if the name is too long
        return folder / "pretrained.ckpt"
    if os.path.isdir(folder / "checkpoints") and (checkpoint := lightning_checkpoint(folder)):
        return checkpoint
    if os.path.isfile(folder / "config.yaml"):
        newest = max(folder.glob("pretraining/checkpoints/step_*.ckpt"), default=None)
        unfinished = "" if newest is None else f", or pass the newest checkpoint of the unfinished one, {newest}"
        raise FileNotFoundError(
            f"checkpoint={str(path_or_name)!r}: this run has no pretrained.ckpt yet. Complete its pretraining with "
            f"--resume auto{unfinished}."
        )
    if os.path.isdir(folder) and (files := sorted(x.name for x in folder.iterdir() if x.suffix in WEIGHTS_SUFFIXES)):
        raise FileNotFoundError(f"{path_or_name}: is a directory. Pass one of its files: {', '.join(files)}.")
    return path_or_name


def refuse_other_heads(weights: WeightsFile, arch: str) -> None:
    """Raise ValueError for small vision transformers of MoCo v3, also in solo-learn: they have 12 heads, and otherwise
    the tensors of timm's with 3 or 6.

    They are recognized by their fixed position embeddings, whose sines of the column come first, and in which the
    second patch is that of the next row.
    """
    position = weights.state.get("pos_embed")
    is_small = arch.rpartition("_patch")[0] in ("timm:vit_tiny", "timm:vit_small")
    if not is_small or weights.settings or position is None or position.dim() != 3 or position.shape[1] < 3:
        return
    quarter = position.shape[-1] // 4
    class_token, second = position[0, 0], position[0, 2, : 2 * quarter]
    is_fixed = not class_token.any() and not second[:quarter].any() and bool((second[quarter:] == 1).all())
    if is_fixed or weights.layout == "moco v3":
        name = arch.removeprefix("timm:")
        raise ValueError(
            f"{weights.source} is {name} of MoCo v3, which has 12 heads where timm's has {position.shape[-1] // 64}. "
            f"Pass encoder=timm.create_model({name!r}, num_heads=12, num_classes=0) to load_encoder."
        )


def read_weights(path: str | Path, lagging: bool = False) -> WeightsFile:
    """Read the encoder in a file of ours or of another system, which may be a .safetensors file; with `lagging`, the
    lagging encoder in a checkpoint of ours.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is corrupt, would run code, holds no tensors, or no lagging encoder.
    """
    content = safe_load(path, of_others=True)
    holder, tensors = held_weights(content, path)
    about = {} if holder is None else content  # entries next to the tensors
    names = {key: plain_name(key).removeprefix("module.") for key in tensors}
    settings = about.get(EXPORTED) or about.get("hyper_parameters")
    is_ours = isinstance(settings, Mapping) and "encoder_arch" in settings
    settings = settings if is_ours and str(settings.get("dataset_name")) in DATASETS else {}
    layout = recognized(tuple(names.values()), holder, settings, EXPORTED in about)
    if lagging:
        if not (settings and any(name.startswith("lagging_model.") for name in names.values())):
            raise ValueError(f"lagging=True: {path} has no lagging encoder (read as {layout.name}). Leave it out.")
        layout = evolve(layout, name=f"{layout.name}, the lagging encoder", prefix="lagging_model.")
    inside = {key: name.removeprefix(layout.prefix) for key, name in names.items() if name.startswith(layout.prefix)}
    state = {name: tensors[key] for key, name in inside.items()}
    return WeightsFile(
        source=str(path),
        layout=layout.name,
        state=state,
        full={name: tensors[key] for key, name in names.items()},
        left_out=tuple(key for key in tensors if key not in inside),
        stem_variant="no_relu" if not settings and numbering(state) is NUMBERED_OF_LIGHTLY else layout.stem_variant,
        settings=dict(settings),
        architecture=about["arch"] if isinstance(about.get("arch"), str) else None,
        **{name: about[name] for name in ("started_from", "started_from_hash") if isinstance(about.get(name), str)},
    )


def held_weights(content: Any, path: str | Path) -> tuple[str | None, dict[str, Tensor]]:
    """Return the name of the file's entry with the tensors, or None if the file is the state dict, and the tensors.

    Without a known name, it is the one with more tensors than all others together: a loss may hold some, too.
    """

    def tensors(value: Any) -> dict[str, Tensor]:
        pairs = value.items() if isinstance(value, Mapping) else ()
        return {key: item for key, item in pairs if isinstance(item, Tensor) and isinstance(key, str)}

    entries = content if isinstance(content, Mapping) else {}
    found = {None: tensors(content)} | {key: held for key, value in entries.items() if (held := tensors(value))}
    largest = max(found, key=lambda key: len(found[key]))
    holder = next((key for key in HOLDERS if key in found), largest)
    if not found[holder]:
        raise ValueError(f"{path} is not a checkpoint or weights file: it has no state_dict and holds no tensors")
    if holder not in (None, *HOLDERS) and 2 * len(found[holder]) <= n_names(found):
        names = first_of([str(key) for key in found if key is not None], NAMES_SHOWN)
        raise ValueError(f"{path} holds tensors in several entries: {names}. Save that of the encoder alone.")
    return holder, found[holder]


def recognized(names: tuple[str, ...], holder: str | None, settings: Mapping, exported: bool) -> Layout:
    """Return the layout that fits. Our files have settings; those of the original lack the ones of the stem."""
    if exported:
        return EXPORT
    if "low_resolution_stem" in settings:
        return OURS
    if settings:
        return evolve(ORIGINAL, stem_variant="padding_2" if settings.get("dataset_name") == "cifar10" else "standard")
    return next(
        row
        for row in LAYOUTS
        if row.holder in (None, holder)
        and any(name.startswith(row.prefix) for name in names)
        and any(name.startswith(row.signs) for name in names)
    )


def torchvisions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under torchvision's names, if it is that of a ResNet that is numbered by position or has
    lightly's shortcuts, or of a DenseNet in a published file. Others are returned as they are."""
    if numbers := numbering(state):
        parts = {key: key.split(".", 1) for key in state}
        known = {str(number): name for number, name in enumerate(numbers)}
        state = {".".join([known.get(first, first), *rest]): state[key] for key, (first, *rest) in parts.items()}
    if "layer1.0.conv1.weight" in state:
        state = {key.replace(".shortcut.", ".downsample."): value for key, value in state.items()}
    if "features.denseblock1.denselayer1.norm.1.weight" in state:  # of PyTorch 0.3; torchvision renames it likewise
        state = {re.sub(r"(denselayer\d+\.(norm|conv))\.", r"\1", key): value for key, value in state.items()}
    return state


def numbering(state: dict[str, Tensor]) -> tuple[str, ...]:
    """Return the names of a ResNet's parts by their numbers; () if the tensors are not those of a numbered ResNet."""
    if "0.weight" not in state or "4.0.conv1.weight" not in state:
        return ()
    return NUMBERED if "7.0.conv1.weight" in state else NUMBERED_OF_LIGHTLY


# ---- Loading into an encoder ----


def misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the differences between `state` and `wanted`, except a head, as {kind: names}; {} if there are none."""
    counts = "num_batches_tracked"  # missing in files of torch before 0.4.1; no encoder needs them
    old = not any(key.endswith(counts) for key in state)
    absent = [key for key in wanted if key not in state and not (old and key.endswith(counts))]
    foreign = [key for key in state if key not in wanted and key.split(".")[0] not in HEAD_NAMES]
    other = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    kinds = {"missing": absent, "unexpected": foreign, "of another shape": other}
    return {kind: names for kind, names in kinds.items() if names}


def load_into(encoder: nn.Module, weights: WeightsFile, p: EncoderAndDataParams) -> tuple[str, ...]:
    """Load all tensors of the encoder from the file. Return the keys that were left out: heads and other networks.

    If nothing but the first layer does not fit, which is for three channels, it is adapted to the images' number.

    Raises:
        ValueError: tensors are missing, unexpected (except those of a head), of another shape, or not finite. The
            message names them, and the layout as which the file was read.
    """
    own = encoder.state_dict()
    names = {key: plain_name(key) for key in own}  # it may be compiled, too
    wanted = {names[key]: value for key, value in own.items()}
    # the user's own module may also be numbered, or have a child named as a prefix
    states = (weights.state, torchvisions(weights.state), weights.full)
    state, wrong = min(((state, misfits(state, wanted)) for state in states), key=lambda pair: n_names(pair[1]))
    adapted = first_layer(state, wanted, p.channels, weights.source) if n_names(wrong) == 1 else {}
    if wrong and not adapted:
        raise ValueError(mismatch_message(weights, p.encoder_arch, wrong))
    loaded = {**wanted, **state, **adapted}
    encoder.load_state_dict({key: loaded[names[key]] for key in own})
    if bad := not_finite(encoder):
        raise ValueError(
            f"{weights.source}: {len(bad)} of {len(wanted)} tensors of its {p.encoder_arch} are not finite "
            f"(the first: {bad[0]}). Use an earlier checkpoint."
        )
    return (*(key for key in state if key not in wanted), *(() if state is weights.full else weights.left_out))


def first_layer(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], channels: int, source: str
) -> dict[str, Tensor]:
    """Return {name: weight} of a convolution for three channels, adapted to another number; {} if there is none."""
    for key, own in wanted.items():
        of_three = (*own.shape[:1], 3, *own.shape[2:])
        if key in state and own.dim() > 3 and own.shape[1] == channels != 3 and state[key].shape == of_three:
            return {key: adapted_to_channels(state[key], channels, source)}
    return {}


def n_names(wrong: Mapping[Any, Collection[str]]) -> int:
    """Return the number of names in what `misfits` returns, for example."""
    return sum(map(len, wrong.values()))


def mismatch_message(weights: WeightsFile, name: str, wrong: Mapping[str, list[str]]) -> str:
    """Return the error message for what `misfits` returns, with a few names of each kind."""
    if {line.split(" ")[0] for names in wrong.values() for line in names} <= {*POSITION_EMBEDDINGS}:
        return (
            f"{weights.source}: the position embeddings of its {name} are for images of another size. Set "
            "transform_crop_size (of a teacher: teacher_crop_size) to their size"
        )
    parts = (f"{kind}: {first_of(names, NAMES_SHOWN)}" for kind, names in wrong.items())
    return f"{weights.source} does not hold a {name} (read as {weights.layout}): {'; '.join(parts)}"


def grouped(keys: Iterable[str]) -> str:
    """Return keys counted by their first part, as text: "fc. (2 tensors), encoder_k. (320 tensors), queue"."""
    parts = (plain_name(key).removeprefix("module.").partition(".") for key in keys)
    counts = Counter(first + dot for first, dot, _ in parts)
    counted = {name: "1 tensor" if n == 1 else f"{n} tensors" for name, n in counts.items()}
    return ", ".join(f"{name} ({words})" if name.endswith(".") else name for name, words in counted.items())
