"""The kernels can be imported without a GPU driver, and are not imported before the first call on a GPU."""

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
    """Importing the kernels takes a second, which only calls on a GPU should spend."""
    code = "import sys, fastssl.ops; assert not any(name.startswith('fastssl.kernels.') for name in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
