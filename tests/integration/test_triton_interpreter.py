"""Triton kernels without a device: all their tests in one process that interprets them."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton")

from helpers.triton_offline import run_interpreted

CLASSES = [
    "tests/unit/teacher/test_triton_attention.py::TestKernels",
    "tests/unit/teacher/test_triton_products.py::TestProducts",
    "tests/unit/teacher/test_triton_commit.py::TestCommit",
    "tests/unit/predictors/test_triton_candidates.py::TestCandidates",
    "tests/unit/decoding/test_sampling.py::TestKernel",
    "tests/unit/teacher/test_triton_layer.py::TestKernels",
    "tests/unit/teacher/test_triton_layer.py::TestLayers",
    "tests/unit/decoding/test_step.py::TestDecodingByTheKernel",
    "tests/unit/decoding/test_triton_tree.py::TestKernels",
]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels")
@pytest.mark.parametrize("nightly", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["some", "rest"])
def test_kernels_equal_torch_in_the_interpreter(nightly: bool) -> None:
    printed = run_interpreted(*CLASSES, nightly=nightly)
    ran = [name for name in CLASSES if any(name in line and "PASSED" in line for line in printed.splitlines())]
    assert ran == (CLASSES[-4:] if nightly else CLASSES)
