"""Triton kernels without a device: all their tests in processes that interpret them."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton")

from helpers.triton_offline import run_interpreted

ALL_TIERS = [  # classes with nightly tests
    "tests/unit/teacher/test_triton_commit.py::TestCommit",
    "tests/unit/predictors/test_triton_candidates.py::TestCandidates",
    "tests/unit/predictors/test_triton_coupling.py::TestPrefixes",
    "tests/unit/teacher/test_triton_layer.py::TestKernels",
    "tests/unit/teacher/test_triton_layer.py::TestLayers",
    "tests/unit/decoding/test_step.py::TestDecodingByTheKernel",
    "tests/unit/decoding/test_triton_tree.py::TestKernels",
    "tests/integration/test_ngram_decoding.py::TestNgramsByTheKernel",
]
ONE_TIER = [
    "tests/unit/teacher/test_triton_attention.py::TestKernels",
    "tests/unit/teacher/test_triton_products.py::TestProducts",
    "tests/unit/decoding/test_sampling.py::TestKernel",
]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels")
@pytest.mark.parametrize(
    ("classes", "nightly"),
    [(ONE_TIER, False), (ALL_TIERS, False), pytest.param(ALL_TIERS, True, marks=pytest.mark.nightly)],
    ids=["all of some", "some of others", "rest"],
)
def test_kernels_equal_torch_in_the_interpreter(classes: list[str], nightly: bool) -> None:
    printed = run_interpreted(*classes, nightly=nightly)
    ran = [name for name in classes if any(name in line and "PASSED" in line for line in printed.splitlines())]
    assert ran == classes
