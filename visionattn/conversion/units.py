"""The blocks of a student and the same ones of its teacher."""

from typing import NamedTuple

from torch import nn

from visionattn.errors import ConfigError


class Unit(NamedTuple):
    """The block that holds a converted attention, in the student and in the teacher, and its path."""

    path: str
    student: nn.Module
    teacher: nn.Module


def units_of(student: nn.Module, teacher: nn.Module) -> list[Unit]:
    """Return the blocks whose attention was converted; an attention that is in no block stands for itself.

    Raises:
        ConfigError: the student was not converted, or not from a model like the teacher.
    """
    layers = getattr(student, "attention_layers", None)
    if not layers:
        raise ConfigError(f"{type(student).__name__} was not converted; give what visionattn.convert returned")
    paths = dict.fromkeys(_block_of(student, path) for path in layers)  # two attentions may share a block
    try:
        return [Unit(p, student.get_submodule(p), teacher.get_submodule(p)) for p in paths]
    except AttributeError as error:
        raise ConfigError(
            f"the teacher, {type(teacher).__name__}, has other blocks than the student: {error}"
        ) from error


def _block_of(model: nn.Module, path: str) -> str:
    """Return the path of the block that holds an attention, or its own where only a list or the model holds it."""
    owner = path.rpartition(".")[0]
    listed = isinstance(model.get_submodule(owner), nn.ModuleList | nn.ModuleDict | nn.Sequential)
    return path if listed or not owner else owner
