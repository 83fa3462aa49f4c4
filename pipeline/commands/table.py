"""All commands by name, in the order in which people need them."""

from __future__ import annotations

from pipeline.commands import chain, uses

COMMANDS = {command.name: command for command in (*chain.COMMANDS, *uses.COMMANDS)}
