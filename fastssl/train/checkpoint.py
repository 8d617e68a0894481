"""Checkpoints that are either whole or not there: written beside, synced, and renamed."""

import os
from pathlib import Path

import torch


def save(state: dict, path: Path) -> None:
    """Writes `state` to `path` so that a kill at any moment leaves the old file or the new one, never half of one."""
    beside = path.with_name(path.name + ".writing")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def load(path: Path, method_name: str) -> dict:
    """Reads a checkpoint of that method, tensors on the CPU.

    Raises:
        ValueError: there is none, it is damaged, or it belongs to another method.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint: {path} does not exist: was the run stopped before its first checkpoint?")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved_by = state["method"]
    except Exception as error:  # pickle, zip and key errors of a damaged file have no common base
        raise ValueError(f"checkpoint: {path} is damaged or no fastssl checkpoint ({type(error).__name__})") from error
    if saved_by != method_name:
        raise ValueError(f"checkpoint: {path} is of the method {saved_by}, not of {method_name}")
    return state


def random_state() -> dict:
    """State of torch's generators, on every device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
