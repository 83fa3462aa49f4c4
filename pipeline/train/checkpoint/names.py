"""What a checkpoint holds, by flat names: `optimizer/backbone.norm.weight/exp_avg` and a tensor.

Names are paths with `/`; a name of torch's (`backbone.norm.weight`) is one part of a path. So a
state does not depend on the order of parameters, nor on who holds which part of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NUMBERS = (bool, int, float, str, type(None))  # what goes into JSON instead
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, in the shape of the parameter


def flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as one; what is flat already stays as it is."""
    names: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            names.update({f"{key}/{name}": x for name, x in flat(value).items()})
        else:
            names[str(key)] = value
    return names


def nested(names: Mapping[str, Any]) -> dict[str, Any]:
    """Flat names as nested dicts."""
    state: dict[str, Any] = {}
    for name, value in names.items():
        *path, last = name.split("/")
        inner = state
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return state


def divided(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of a state, by flat names.

    Raises:
        TypeError: it holds something else, which no checkpoint of ours can.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, value in flat(state).items():
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
        elif isinstance(value, NUMBERS):
            numbers[name] = value
        else:
            raise TypeError(f"{name} is a {type(value).__name__}, no tensor and no number")
    return tensors, numbers


# ---- An optimizer by the names of its parameters.


def optimizer_names(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters of an optimizer over groups that have `names` (`parameter_groups`)."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """What an optimizer knows of each parameter, by its name. Rates are not in it: they follow from
    the plan and the step. A parameter that had no gradient yet has no entry.
    """
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in optimizer_names(optimizer).items()
        if optimizer.state.get(parameter)
    }


def prepare_optimizer(optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Makes AdamW's states, as its first step does, for the parameters of these names. States of
    other parameters are removed: the checkpoint has none, so they had no gradient yet.
    """
    fused = {
        name: bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for name in group["names"]
    }
    for name, parameter in optimizer_names(optimizer).items():
        if name not in names:
            optimizer.state.pop(parameter, None)
        elif not optimizer.state.get(parameter):
            # torch keeps the count on the host, but for its fused form
            device = parameter.device if fused[name] else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                **{moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS},
            }
