"""What all tests share: the environment of this process and of the ranks it starts, and the shared data.

Tests use the user's own model cache (`CLIPO_DS_CACHE`, by default under ~/.cache), as a user's runs do: its entries are
named by a hash of what made them, so the warm start of a small model is paid once a machine and not once a test run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from clipo_ds.distributed import Ranks

# Set before anything imports torch, and inherited by the ranks that tests start. One thread a process: results do not
# depend on the number of cores, and several ranks do not fight over two of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The CPU also where there is a GPU; tests marked `gpu` are run with DS_ACCELERATOR=cuda.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# No test may depend on a hub, and a wrong model path must fail at once instead of after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Its deadline is of the clock on the wall, which says more of what else the machine does than of the code.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Pictures last: behind UMAP and PaCMAP is numba, whose modules break vLLM's start where it comes after them."""
    items.sort(key=lambda item: item.path.name.startswith("test_viz_"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout, `data/train` and `data/test`."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared data sets are not beside this checkout ({folder})")
    return folder


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """This process as the only rank of a run."""
    from clipo_ds import distributed

    yield distributed.start()
    distributed.stop()


@pytest.fixture(scope="session")
def recorded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo run of six steps with evaluations, made once a test session; nobody may write into it."""
    from launching import SMALL, train

    folder = tmp_path_factory.mktemp("recorded") / "run"
    settings = [*SMALL, "--steps=6", "--evaluation.every=3", "--checkpoint.every=6", "--logging.show_every=null"]
    train(*settings, "--ds_config=ds_configs/zero3_cpu.json", f"--run_dir={folder}")
    return folder
