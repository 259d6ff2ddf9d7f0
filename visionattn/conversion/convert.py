"""A pretrained vision transformer with another attention in place of its own."""

import copy
import logging
from typing import Any, Literal

from torch import nn

from visionattn.attention import ATTENTION
from visionattn.attention.exponential import ExponentialFeatures
from visionattn.conversion.calibrate import Images, center, fit, measure
from visionattn.conversion.keep import Keep, kept_blocks, most_sensitive, sensitivity
from visionattn.conversion.refit import refit as fit_to
from visionattn.conversion.swap import Layers, find, rebuild
from visionattn.errors import ConfigError

_log = logging.getLogger("visionattn")


def convert(
    model: nn.Module,
    to: str,
    *,
    calibrate: Images | None = None,
    keep_softmax: Keep = 0,
    budget: int = 2,
    center_keys: bool | Literal["constant"] = True,
    local: int = 0,
    refit: bool = False,
    **options: Any,
) -> nn.Module:
    """Return a copy of a pretrained model in which another attention has the place of softmax attention.

    Every weight is kept: projections, normalisations of queries and keys, LayerScale, positions, class and register
    tokens. What is added starts without effect. The copy is a model of the same class, whose attribute
    ``attention_layers`` says what was put where. A linear attention computes something else than softmax attention: the
    copy wants :func:`~visionattn.conversion.align.align`, or at least ``calibrate``, before it is of use::

        student = visionattn.convert(teacher, "ela_hadamard")
        visionattn.align(student, teacher, loader, stage="blocks")

    Args:
        model: with blocks that hold ``timm.layers.Attention``, ``AttentionRope`` or ``EvaAttention``: ViT, DeiT,
            DINOv2, DINOv3, SigLIP, CLIP, EVA-02, PE, or a module of your own. It is not changed.
        to: a name in :data:`visionattn.attention.ATTENTION`.
        calibrate: a few dozen images, a tensor (B, 3, H, W) or batches, normalised as the model wants them.
            ``performer`` and ``dark`` are fitted to them: their estimate of softmax attention stays free of bias and
            gets better, at no cost later.
        keep_softmax: indices of the blocks that keep softmax attention; 0 for none; ``auto`` for the ones whose
            conversion costs most on the images of ``calibrate``, measured by converting one block at a time.
        budget: of ``auto``: how many blocks keep softmax attention.
        center_keys: subtract the mean key of each image; ``constant`` for the mean of the images in ``calibrate``,
            which costs nothing later, and which models with rotary positions or normalised keys cannot have.
        local: side of a depthwise convolution over the values, zeros at first; 0 for none.
        refit: fit the output projections to the teacher's tokens on the images of ``calibrate``, in closed form
            (:func:`~visionattn.conversion.refit.refit`): for those who cannot train. Give a hundred images and more.
        **options: of the mechanism, such as ``features=128``.

    Raises:
        ConfigError: nothing in the model can be converted, with the reasons; an option is unknown, or does not fit.
        UnknownNameError: no such attention.
    """
    mechanism = ATTENTION[to]
    found = find(model)
    if keep_softmax == "auto":
        if calibrate is None:
            raise ConfigError("keep_softmax='auto' is measured on images; give some as calibrate")
        kept_blocks(range(budget), len(found.convertible))
        common: dict[str, Any] = {"calibrate": calibrate, "center_keys": center_keys, "local": local, **options}
        losses = sensitivity(convert(model, to, **common).eval(), model, calibrate)
        keep_softmax = most_sensitive(losses, budget)
        _log.info("softmax stays in blocks %s, of losses %s", keep_softmax, losses)
    kept = kept_blocks(keep_softmax, len(found.convertible))
    for path, reason in found.refused.items():
        _log.warning("%s keeps its attention: %s", path, reason)
    exponential = issubclass(mechanism, ExponentialFeatures) and options.get("feature_map", "exp") == "exp"
    fitted = exponential and calibrate is not None and options.setdefault("calibrated", True)
    if center_keys == "constant" and calibrate is None:
        raise ConfigError("center_keys='constant' is the mean key of images; give some as calibrate")
    if refit and calibrate is None:
        raise ConfigError("refit=True fits the student to images; give a hundred and more as calibrate")
    if options.get("calibrated") and calibrate is None:
        raise ConfigError("calibrated=True: the draws are fitted to images; give some as calibrate")
    spec = {"name": to, **options}
    spec |= {"center_keys": True} if center_keys is True else {}
    spec |= {"local": local} if local else {}
    layers: Layers = {}
    for index, (path, module) in enumerate(found.convertible.items()):
        foldable = is_foldable(module)
        if center_keys == "constant" and not fitted and not foldable:
            raise ConfigError(f"center_keys='constant': {path} turns or normalises its keys; use center_keys=True")
        if index not in kept:
            folds = foldable and (fitted or center_keys == "constant")
            layers[path] = spec | ({"qkv_bias": True} if folds else {})
    student = rebuild(copy.deepcopy(model), layers)
    if calibrate is not None and (fitted or center_keys == "constant"):
        _calibrate(model, student, layers, calibrate, bool(fitted))
    if refit and calibrate is not None:
        fit_to(student.eval(), model, calibrate)
        student.train(model.training)
    return student


def is_foldable(module: Any) -> bool:
    """Whether queries and keys of an attention are linear in its tokens: not turned, and not normalised."""
    turned = hasattr(module, "num_prefix_tokens")  # timm's attentions with rotary positions have it
    return not turned and isinstance(module.q_norm, nn.Identity) and isinstance(module.k_norm, nn.Identity)


def _calibrate(model: nn.Module, student: nn.Module, layers: Layers, images: Images, fitted: bool) -> None:
    """Fit the student's attentions to images that the model sees."""
    converted: dict[str, Any] = {path: student.get_submodule(path) for path in layers}
    training = model.training
    model.eval()
    try:
        moments = measure(model, converted, images)
    finally:
        model.train(training)
    few = min(moments.values(), key=lambda found: found.count).count
    width = next(iter(converted.values())).head_dim
    if few < 10 * width:
        _log.warning("calibrate: %d tokens say little about heads of %d channels; give more images", few, width)
    for path, attention in converted.items():
        foldable = is_foldable(model.get_submodule(path))
        if fitted:
            fit(attention, moments[path], foldable)
        else:
            center(attention, moments[path])
