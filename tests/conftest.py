"""Every test runs with deterministic algorithms, one seed, and no way to the network."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Processes beside each other (`-n`) share the cores: read before torch's threads are made, here and in children.
if beside := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) - 1:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (beside + 1)))
    os.environ["OMP_WAIT_POLICY"] = "passive"

import torch

# Child processes import this checkout and its kernels as this one does, whether or not they are installed.
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# With deterministic algorithms, some releases of torch raise at a matrix product on a GPU if it is not set.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
# Set before transformers is imported anywhere: nothing may look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
torch.use_deterministic_algorithms(True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process, which prepares once what they share."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _local_sockets_only() -> Iterator[None]:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        local = self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1"))
        if not local:
            raise OSError(f"a test tried to reach {address}")
        connect(self, address)  # pyright: ignore[reportArgumentType]

    socket.socket.connect = guarded  # pyright: ignore[reportAttributeAccessIssue]
    yield
    socket.socket.connect = connect
