from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.gateway.support import ScriptedEngine, model_info, write_tokenizer


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    return ScriptedEngine(model_info(tokenizer_folder))
