"""The settings of views: how many there are, and how each is made. Only ModelParams inherits them."""

from typing import TYPE_CHECKING

from attrs import evolve, fields, frozen

from augmentations import View
from fields import number, per_view
from image_ops import BLUR_RADIUS

if TYPE_CHECKING:
    from model_params import ModelParams

MOST_VIEWS, LARGEST_CROP, STRONGEST = 100, 2**14, 5
PerView = float | list[float] | None


@frozen(kw_only=True, slots=False)  # Python cannot join the slots of two base classes
class ViewParams:
    """Settings of the training views: large ones first, then small ones (multi-crop, SwAV,
    https://arxiv.org/abs/2006.09882, section 3.2: n_small_views=6, transform_crop_scale_min=0.14).

    PerView is one number for every view, or a list with one a view; small views that a list leaves out take its last
    number. Crops of small views follow transform_small_..., whose lists are of small views only.
    """

    # how many views
    n_large_views: int = number(2, at_least=2, at_most=MOST_VIEWS)  # of each image; keys are of large views only
    n_small_views: int = number(0, at_most=MOST_VIEWS)  # of each image; queries for the keys of all large views
    transform_small_crop_size: PerView = per_view(None, BLUR_RADIUS + 1, LARGEST_CROP, whole=True)  # None: 3/7 of large
    transform_small_crop_scale_min: PerView = per_view(0.05)  # smallest share of the image's area
    transform_small_crop_scale_max: PerView = per_view(0.14)  # largest share of the image's area

    # how each view is made: PerView; None: the data set's
    transform_crop_scale_min: PerView = per_view(None)  # smallest share of the image's area; of large views
    transform_crop_scale_max: PerView = per_view(None)  # largest share of the image's area; of large views
    transform_crop_ratio_min: PerView = per_view(None, 0.01, 100)  # narrowest crop, width / height
    transform_crop_ratio_max: PerView = per_view(None, 0.01, 100)  # widest crop, width / height
    transform_s: PerView = per_view(0.5, 0, STRONGEST)  # strength of the colour jitter
    transform_brightness: PerView = per_view(None, 0, STRONGEST)  # 0.4: factors 0.6 to 1.4; None: 0.8 transform_s
    transform_contrast: PerView = per_view(None, 0, STRONGEST)  # by factors, as brightness; None: 0.8 transform_s
    transform_saturation: PerView = per_view(None, 0, STRONGEST)  # by factors, as brightness; None: 0.8 transform_s
    transform_hue: PerView = per_view(None, 0, 0.5)  # share of the colour wheel, both ways; None: 0.2 transform_s
    transform_jitter_probability: PerView = per_view(None)  # of brightness, contrast, saturation and hue together
    transform_grayscale_probability: PerView = per_view(None)  # of losing the colours
    transform_apply_blur: bool = True  # False: no blur, whatever its probability
    transform_blur_probability: PerView = per_view(None)  # of a Gaussian blur
    transform_blur_sigma_min: PerView = per_view(None, 0.01, BLUR_RADIUS / 2)  # pixels
    transform_blur_sigma_max: PerView = per_view(None, 0.01, BLUR_RADIUS / 2)  # pixels; the kernel has 13
    transform_solarize_probability: PerView = per_view(None)  # of inverting bright values
    transform_solarize_threshold: PerView = per_view(None)  # from which on they are inverted; white is 1
    transform_flip_probability: PerView = per_view(None)  # of mirroring
    transform_time_difference_probability: PerView = per_view(None)  # of clips: what changes, instead of colours

    @property
    def n_views(self) -> int:
        return self.n_large_views + self.n_small_views

    @property
    def views(self) -> list[View]:
        """One row of settings a view: the data set's, changed by the transform_... fields.

        Raises:
            ValueError: a list has too few or too many values, or a smallest value is above the largest.
        """
        return [view_of(self, i) for i in range(self.n_views)]


def contradictions(params: "ModelParams") -> list[tuple[bool, str]]:
    """(whether the settings contradict each other, how, and the way out)"""
    small = [a.name for a in fields(ViewParams) if a.name.startswith("transform_small_")]
    changed = [name for name in small if getattr(params, name) != getattr(fields(ViewParams), name).default]
    without = bool(changed) and params.n_small_views == 0
    return [
        (without, f"{', '.join(changed)} set, but there are no small views: set n_small_views above 0, or leave it out")
    ]


def view_of(params: "ModelParams", i: int) -> View:
    """Row i. Every field of View has fields in ViewParams: one of its name, or for an interval two."""
    size = params.crop_size if i < params.n_large_views else small_crop_size(params.crop_size)
    s = number_of_view(params, "transform_s", i)
    strengths = {"brightness": 0.8 * s, "contrast": 0.8 * s, "saturation": 0.8 * s, "hue": 0.2 * s}
    view = evolve(params.dataset.view, crop_size=size, **strengths)
    found = {field.name: setting(params, field.name, getattr(view, field.name), i) for field in fields(View)}
    if found["crop_size"] > params.crop_size:
        small = f"transform_small_crop_size={found['crop_size']}"
        raise ValueError(f"{small} is above transform_crop_size={params.crop_size}: choose a smaller one")
    return evolve(view, **found if params.transform_apply_blur else {**found, "blur_probability": 0.0})


def small_crop_size(crop_size: int) -> int:
    """96 for 224, as in SwAV; multiples of 8."""
    return min(crop_size, max(8, 8 * round(crop_size * 3 / 7 / 8)))


def setting(params: "ModelParams", name: str, default: float | tuple[float, float], i: int) -> float | tuple:
    """What View's field `name` is for view i: a number, or an interval."""
    is_small_crop = name in ("crop_size", "crop_scale") and i >= params.n_large_views
    field = f"transform_{'small_' * is_small_crop}{name}"
    if not isinstance(default, tuple):
        value = number_of_view(params, field, i)
        return default if value is None else value
    ends = [number_of_view(params, f"{field}_{end}", i) for end in ("min", "max")]
    low, high = (of_data if given is None else given for given, of_data in zip(ends, default, strict=True))
    if low > high:
        raise ValueError(f"{field}_min={low} is above {field}_max={high} in view {i}: lower the one or raise the other")
    return low, high


def number_of_view(params: "ModelParams", field: str, i: int) -> float | None:
    value, fewest, most = getattr(params, field), params.n_large_views, params.n_views
    if field.startswith("transform_small"):
        i, fewest, most = i - fewest, 1, params.n_small_views
    elif field.startswith("transform_crop_scale"):
        most = fewest
    if isinstance(value, list | tuple):
        if not fewest <= len(value) <= most:
            at_least = f", and at least {fewest} are needed" if fewest < most else ""
            raise ValueError(f"{field}={value} has {len(value)} values for {most} views{at_least}")
        value = value[min(i, len(value) - 1)]
    return None if value is None else abs(value)  # -0.0 is no width of an interval
