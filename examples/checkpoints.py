"""Save a training of several processes, for any number of them to go on from.

A folder holds `latest.json` and the folder of the step that it names. Steps are written beside, and
named once all processes have written theirs: whatever ends a process, what was saved before is
whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

POINTER = "latest.json"


def latest(folder: Path) -> dict[str, Any] | None:
    """Return what was saved last, `step` and `settings`, or None if nothing was."""
    path = folder / POINTER
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def save(folder: Path, about: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Write a checkpoint by all processes; one that is interrupted leaves the one before.

    Args:
        folder: where checkpoints are; all processes see it.
        about: `step`, and all that makes a training of it again, as JSON can hold it.
        model: whole or sharded.
        optimizer: of its parameters.
    """
    before = latest(folder)
    if before is not None and before["step"] == about["step"]:
        return
    target, is_first = _folder_of(folder, about["step"]), _rank() == 0
    if is_first:
        # Remove what an interrupted process left.
        shutil.rmtree(target, ignore_errors=True)
    _barrier()
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments}
    dcp.save(content, checkpoint_id=target)
    _barrier()
    if is_first:
        beside = folder / f"{POINTER}.new"
        with beside.open("w", encoding="utf-8") as file:
            json.dump(about, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, folder / POINTER)
        for other in set(folder.glob("step-*")) - {target}:
            shutil.rmtree(other, ignore_errors=True)
    # No process goes on to the next save before this one is named.
    _barrier()


def load(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Read a checkpoint into a model and its optimizer, however many processes there are now."""
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments}
    source = _folder_of(folder, step)
    dcp.load(content, checkpoint_id=source)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def load_model(folder: Path, step: int, model: nn.Module) -> None:
    """Read the model of a checkpoint alone."""
    content = {"model": get_model_state_dict(model)}
    source = _folder_of(folder, step)
    dcp.load(content, checkpoint_id=source)
    set_model_state_dict(model, content["model"])


def _folder_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
