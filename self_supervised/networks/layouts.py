"""Which of a file's tensors are the trained encoder: every system's names -> those of torchvision and timm.

A checkpoint holds more than the encoder: heads, queues, a lagging copy under nearly the same names. One row of LAYOUTS
a system says which part is the trained encoder. All of the encoder must be there, and nothing else but a head.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen
from torch import Tensor, nn

from self_supervised.numerics import not_finite
from self_supervised.safe_files import EXPORTED, safe_load


@frozen
class Layout:
    """A system, and where its files keep the trained encoder."""

    name: str
    prefix: str  # of the encoder's keys, wrappers apart
    beside: tuple[str, ...] = ("",)  # how keys begin that tell the system from others with this prefix; one is enough
    holder: str | None = None  # the file's entry that holds the tensors, where that tells the system from others
    stem_variant: str = "standard"  # of its ResNets for small images


HEADS_OF_LIGHTLY = ("projection_head.", "prediction_head.", "projection_mlp.", "online_classifier.")
TWINS_OF_OPENSELFSUP = ("neck.", "encoder_k.0.", "encoder_k.module.0.", "online_net.", "target_net.")
UNNAMED = ("backbone.", "encoder.", "encoder_q.", "base_encoder.", "model.", "net.")  # prefixes without a system
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

# The first row that fits. Names are those in the systems' own code and published files.
LAYOUTS = (
    Layout("dino", "backbone.", holder="teacher"),
    Layout("OpenSelfSup or mmselfsup", "backbone.", TWINS_OF_OPENSELFSUP),
    Layout("moco", "encoder_q.", ("encoder_k.",)),
    Layout("moco v3", "base_encoder.", ("momentum_encoder.",)),
    Layout("lightly", "backbone.", HEADS_OF_LIGHTLY),
    Layout("lightly", "student_backbone.", ("teacher_backbone.",)),
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

HOLDERS = ("state_dict", "model", "model_state_dict", "teacher")  # entries with the tensors, in one system or another
HEAD_NAMES = ("fc", "classifier", "head", "heads", "linear", "head_dist", "aux1", "aux2", "AuxLogits")
RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
NUMBERED = ("conv1", "bn1", "relu", "maxpool", *RESNET_STAGES)  # nn.Sequential(*resnet.children()), torchvision's
NUMBERED_OF_LIGHTLY = ("conv1", "bn1", *RESNET_STAGES)  # of lightly's own ResNet, which so loses the ReLU of its stem


@frozen
class WeightsFile:
    """What a file holds."""

    source: str
    layout: str
    state: dict[str, Tensor] = field(repr=False)  # the encoder's and its head's, without prefix
    left_out: tuple[str, ...]  # keys of everything else
    stem_variant: str  # if its stem is one for small images
    settings: dict[str, Any]  # of EncoderAndDataParams, as far as the file says
    architecture: str | None = None  # in the file's own word
    started_from: str | None = None  # what the pretraining started from, if it was ours


def read_weights(path: str | Path) -> WeightsFile:
    """The encoder in a file of ours, of another system, or of .safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, would run code, or holds no tensors.
    """
    content = safe_load(path, of_others=True)
    holder, tensors = held_weights(content, path)
    about = {} if holder is None else content  # what is said beside the tensors
    names = {key: key.replace("_orig_mod.", "").removeprefix("module.") for key in tensors}
    settings = about.get(EXPORTED) or about.get("hyper_parameters")
    settings = settings if isinstance(settings, Mapping) and "encoder_arch" in settings else {}
    layout = recognized(tuple(names.values()), holder, settings, EXPORTED in about)
    inside = {key: name.removeprefix(layout.prefix) for key, name in names.items() if name.startswith(layout.prefix)}
    state = {name: tensors[key] for key, name in inside.items()}
    return WeightsFile(
        source=str(path),
        layout=layout.name,
        state=state,
        left_out=tuple(key for key in tensors if key not in inside),
        stem_variant="no_relu" if not settings and numbering(state) is NUMBERED_OF_LIGHTLY else layout.stem_variant,
        settings=dict(settings),
        architecture=about["arch"] if isinstance(about.get("arch"), str) else None,
        started_from=about["started_from"] if isinstance(about.get("started_from"), str) else None,
    )


def held_weights(content: Any, path: str | Path) -> tuple[str | None, dict[str, Tensor]]:
    """(the file's entry that holds the tensors, or None if the file is nothing else; the tensors by name)."""

    def tensors(value: Any) -> dict[str, Tensor]:
        pairs = value.items() if isinstance(value, Mapping) else ()
        return {key: item for key, item in pairs if isinstance(item, Tensor) and isinstance(key, str)}

    entries = content if isinstance(content, Mapping) else {}
    full = [key for key, value in entries.items() if tensors(value)]
    holder = next((key for key in HOLDERS if key in full), full[0] if len(full) == 1 and not tensors(content) else None)
    found = tensors(content if holder is None else content[holder])
    if not found:
        raise ValueError(f"{path} is no checkpoint and no weights file: it has no state_dict, and holds no tensors")
    return holder, found


def recognized(names: tuple[str, ...], holder: str | None, settings: Mapping, exported: bool) -> Layout:
    """The row that fits. Ours say what they are; the original had settings like ours, but not for the stem."""
    if exported:
        return EXPORT
    if settings:
        return (
            OURS
            if "low_resolution_stem" in settings
            else evolve(ORIGINAL, stem_variant="padding_2" if settings.get("dataset_name") == "cifar10" else "standard")
        )
    return next(
        row
        for row in LAYOUTS
        if row.holder in (None, holder)
        and any(name.startswith(row.prefix) for name in names)
        and any(name.startswith(row.beside) for name in names)
    )


def torchvisions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ResNets numbered by position, or with lightly's shortcuts, under torchvision's names; others as they are."""
    if numbers := numbering(state):
        parts = {key: key.split(".", 1) for key in state}
        known = {str(number): name for number, name in enumerate(numbers)}
        state = {".".join([known.get(first, first), *rest]): state[key] for key, (first, *rest) in parts.items()}
    if "layer1.0.conv1.weight" in state:
        state = {key.replace(".shortcut.", ".downsample."): value for key, value in state.items()}
    return state


def numbering(state: dict[str, Tensor]) -> tuple[str, ...]:
    """The names of the numbered parts of a ResNet; () if it is none."""
    if "0.weight" not in state or "4.0.conv1.weight" not in state:
        return ()
    return NUMBERED if "7.0.conv1.weight" in state else NUMBERED_OF_LIGHTLY


# ---- into an encoder ----


def misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What keeps `state` from being exactly `wanted` and a head: {kind: names}, empty if nothing."""
    counts = "num_batches_tracked"  # all absent in files of torch before 0.4.1; no encoder needs them
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


def load_into(encoder: nn.Module, found: WeightsFile, name: str) -> tuple[str, ...]:
    """All of the encoder's tensors from the file. Returns the keys that were left out: heads and other networks.

    Raises:
        ValueError: the file holds less, or more than a head, or other shapes; says which, and as what it was read. Or
            there are weights that are not finite.
    """
    wanted = encoder.state_dict()
    states = (found.state, torchvisions(found.state))  # a module of the user's own may be numbered, too
    state, wrong = min(((state, misfits(state, wanted)) for state in states), key=lambda pair: n_names(pair[1]))
    if wrong:
        raise ValueError(mismatch_message(found, name, wrong))
    encoder.load_state_dict({**wanted, **{key: state[key] for key in wanted if key in state}})
    if bad := not_finite(encoder):
        raise ValueError(
            f"{found.source}: {len(bad)} of {len(wanted)} tensors of its {name} are not finite (the first: {bad[0]}). "
            "Choose an earlier checkpoint"
        )
    return (*(key for key in state if key not in wanted), *found.left_out)


def n_names(wrong: Mapping[str, list[str]]) -> int:
    return sum(map(len, wrong.values()))


def mismatch_message(found: WeightsFile, name: str, wrong: Mapping[str, list[str]], most: int = 3) -> str:
    more = {kind: f" and {len(names) - most} more" * (len(names) > most) for kind, names in wrong.items()}
    what = "; ".join(f"{kind}: {', '.join(names[:most])}{more[kind]}" for kind, names in wrong.items())
    return f"{found.source} does not hold a {name} (read as {found.layout}): {what}"


def grouped(keys: Iterable[str]) -> str:
    """Keys by their first part: "fc. (2), encoder_k. (320), queue"."""
    parts = (key.replace("_orig_mod.", "").removeprefix("module.").partition(".") for key in keys)
    counts = Counter(first + dot for first, dot, _ in parts)
    return ", ".join(f"{name} ({n})" if name.endswith(".") else name for name, n in counts.items())
