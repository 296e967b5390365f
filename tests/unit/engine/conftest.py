from __future__ import annotations

import pytest

from tests.unit.engine.routed import LoadFamily, family_loader


@pytest.fixture(scope="session")
def load_family(tmp_path_factory: pytest.TempPathFactory) -> LoadFamily:
    return family_loader(tmp_path_factory.mktemp("families"))
