from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel
from tests.families import make_checkpoint


class PackedFamily(NamedTuple):
    checkpoint: Path
    packed: PackedModel


class FamilyFolder:
    """Checkpoints and packs of families, made when first asked for. Tests must not change them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, PackedFamily] = {}

    def __getitem__(self, family: str) -> PackedFamily:
        if family not in self._made:
            checkpoint = make_checkpoint(family, self._folder / family / "checkpoint")
            pack_checkpoint(checkpoint, self._folder / family / "packed")
            self._made[family] = PackedFamily(checkpoint, PackedModel.open(self._folder / family / "packed"))
        return self._made[family]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test of this folder touches the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MOELESS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def families(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> FamilyFolder:
    return FamilyFolder(tmp_path_factory.mktemp("families"))
