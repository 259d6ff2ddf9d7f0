"""Public names and the flags of every command are those of tests/inventory.json, which is edited when they change.

A name or a flag that is gone breaks a user's program or script: let the edit be a decision.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import visionattn
from visionattn.cli import COMMANDS, command_of

INVENTORY = json.loads((Path(__file__).parent / "inventory.json").read_text())


def flags(command: Any) -> list[str] | dict[str, Any]:
    """The options and arguments of a command in their order; of a group those of its commands."""
    if hasattr(command, "commands"):
        return {name: flags(sub) for name, sub in command.commands.items()}
    return [(param.opts[0] if param.opts[0].startswith("-") else param.name.upper()) for param in command.params]


def parameters(thing: Any) -> list[str] | None:
    """The parameters of a function in their order; None for what is none."""
    return list(inspect.signature(thing).parameters) if inspect.isfunction(thing) else None


def test_public_names() -> None:
    assert INVENTORY["names"] == {name: parameters(getattr(visionattn, name)) for name in visionattn.__all__}


def test_flags() -> None:
    assert INVENTORY["commands"] == {name: flags(command_of(name)) for name in COMMANDS}


def test_flags_of_the_program_itself() -> None:
    from typer.main import get_command

    from visionattn.cli import app

    assert INVENTORY["program"] == [option for param in get_command(app).params for option in param.opts]
