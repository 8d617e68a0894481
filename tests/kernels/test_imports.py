"""Importing the kernels: without a GPU driver, and not before the first call on a GPU."""

import os
import subprocess
import sys


def test_importing_needs_no_driver():
    code = (
        "import fastssl.kernels.attention, fastssl.kernels.contrastive, fastssl.kernels.masking, "
        "fastssl.kernels.patches, fastssl.kernels.queue"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_of_the_package_leaves_triton_alone():
    """Their import takes a second, which only calls on a GPU need."""
    code = "import sys, fastssl.ops; assert not any(name.startswith('fastssl.kernels.') for name in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
