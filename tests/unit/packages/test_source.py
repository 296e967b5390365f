"""From a name to a packed model: folders, the cache, the hub."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeless.bundled import BUNDLED_MODEL_NAME
from moeless.core.errors import CheckpointError
from moeless.packages import source
from moeless.packages.cache import cache_dir
from moeless.packages.packed_model import PackedModel
from moeless.packages.source import locate_checkpoint, resolve_model
from tests.families import make_checkpoint
from tests.unit.packages.conftest import FamilyFolder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOELESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def count_packs(empty_cache: Path) -> int:
    return len([path for path in (empty_cache / "packed").iterdir() if not path.name.startswith(".")])


def test_a_packed_folder_is_opened_where_it_is(families: FamilyFolder, empty_cache: Path) -> None:
    packed = families["mixtral"].packed
    assert resolve_model(str(packed.path)).path == packed.path
    assert not (empty_cache / "packed").exists()


def test_a_checkpoint_is_packed_into_the_cache_once(families: FamilyFolder, empty_cache: Path) -> None:
    checkpoint = families["mixtral"].checkpoint
    steps: list[str] = []

    first = resolve_model(str(checkpoint), on_progress=lambda done, total, label: steps.append(label))
    second = resolve_model(str(checkpoint), on_progress=lambda done, total, label: steps.append(label))

    assert first.path == second.path
    assert first.path.is_relative_to(empty_cache)
    assert len(steps) == 9
    assert count_packs(empty_cache) == 1


def test_a_cached_pack_opens_without_transformers(families: FamilyFolder) -> None:
    """Importing it takes seconds of `moeless serve`."""
    checkpoint = families["mixtral"].checkpoint
    resolve_model(str(checkpoint))
    script = (
        "import sys\n"
        "from moeless.packages.source import resolve_model\n"
        "assert len(resolve_model(sys.argv[1]).functions) == 8\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, checkpoint], check=True, timeout=100)


def test_a_checkpoint_that_changed_is_packed_anew(tmp_path: Path, empty_cache: Path) -> None:
    checkpoint = make_checkpoint("mixtral", tmp_path / "checkpoint", seed=0)
    before = resolve_model(str(checkpoint))
    make_checkpoint("mixtral", checkpoint, seed=1)

    after = resolve_model(str(checkpoint))

    assert after.path != before.path
    assert after.manifest.functions[0].sha256 != before.manifest.functions[0].sha256
    assert count_packs(empty_cache) == 2


def test_equal_files_at_another_path_are_another_checkpoint(
    tmp_path: Path, families: FamilyFolder, empty_cache: Path
) -> None:
    copy = shutil.copytree(families["mixtral"].checkpoint, tmp_path / "copy")
    assert resolve_model(str(copy)).path != resolve_model(str(families["mixtral"].checkpoint)).path


def test_a_hub_name_is_downloaded_and_packed_under_that_name(
    families: FamilyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded: list[str] = []

    def download(name: str, **patterns: list[str]) -> str:
        downloaded.append(name)
        assert "*.safetensors" in patterns["allow_patterns"]
        return str(families["olmoe"].checkpoint)

    monkeypatch.setattr(source, "snapshot_download", download)
    packed = resolve_model("allenai/OLMoE-1B-7B-0924")
    assert packed.manifest.model_id == "allenai/OLMoE-1B-7B-0924"
    assert downloaded == ["allenai/OLMoE-1B-7B-0924"]


def test_a_hub_name_that_cannot_be_downloaded_is_one_line() -> None:
    with pytest.raises(CheckpointError, match=r"'nobody/nothing': no such folder, and not to be had") as caught:
        resolve_model("nobody/nothing")  # the tests run with the hub offline
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "a/b/c", ""])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and not a name of the form"):
        resolve_model(name)


def test_the_bundled_model_goes_by_its_name(families: FamilyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = families["mixtral"].checkpoint
    monkeypatch.setattr(source, "bundled_model_path", lambda: checkpoint)
    assert locate_checkpoint(BUNDLED_MODEL_NAME) == (checkpoint, "moeless-mini")
    packed = resolve_model(BUNDLED_MODEL_NAME)
    assert packed.manifest.model_id == "moeless-mini"
    assert PackedModel.open(packed.path).manifest == packed.manifest


def test_the_cache_is_in_the_users_cache_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOELESS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "moeless"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "moeless"
