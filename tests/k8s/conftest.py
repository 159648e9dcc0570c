"""The image that the manifests' pods run."""

from __future__ import annotations

import shutil

import pytest

from tests.hosts import why_not

from .container import Image
from .images import lwo_dist_image


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    if (why := why_not()) is not None:
        pytest.skip(why)
    if shutil.which("nft") is None:
        pytest.skip("network policies need the command `nft` (Debian: nftables)")
    return lwo_dist_image(tmp_path_factory.mktemp("image") / "root")
