"""`firp train` from the command line: plans, refusals, and a whole run on a store made by `firp collect`'s core."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import typer
from conftest import ROOT, TINY_CONVERSATIONS, save_tiny_teacher
from typer.testing import CliRunner, Result

from firp_cli.commands.train import train
from firp_cli.errors import FingerprintError, PredictorError, RecipeError, StoreError, UsageError
from firp_cli.recipe import load_recipe, shipped_recipes
from firp_cli.training.plan import make_plan, optimizer_memory

APP = typer.Typer()
APP.command()(train)
TINY = ["training.micro_batch_size=3", "training.anchors_per_sequence=6", "training.validation_fraction=0.2"]


def firp_train(*arguments: object) -> Result:
    """Run the command; a user error comes out as `result.exception`."""
    return CliRunner().invoke(APP, [str(item) for item in arguments])
