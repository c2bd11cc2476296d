"""Lazy imports: a package imports the module that defines a name when the name is first used."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

import hashengine
import hashengine.index
import hashengine.methods
import hashengine.models
import hashengine.training
from hashengine._lazy import lazy_imports


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package whose names `value` and `other` are imported lazily. The list `calls` has the calls of `before`."""
    (tmp_path / "lazy_part.py").write_text("value = [1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lazy_part", raising=False)
    package = ModuleType("lazy_package")
    package.calls = []
    modules = {"value": "lazy_part", "other": "lazy_part"}
    package.__getattr__, package.__dir__ = lazy_imports(
        "lazy_package", modules, before=lambda: package.calls.append("before")
    )
    monkeypatch.setitem(sys.modules, "lazy_package", package)
    return package


def test_a_name_is_imported_once(package: ModuleType) -> None:
    assert "lazy_part" not in sys.modules and package.calls == []
    assert package.value is package.value is sys.modules["lazy_part"].value
    assert package.calls == ["before"]


def test_an_unknown_name_raises_attribute_error_and_imports_nothing(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match="module 'lazy_package' has no attribute 'absent'"):
        _ = package.absent
    assert "lazy_part" not in sys.modules and package.calls == []


def test_dir_lists_names_that_are_not_imported_yet(package: ModuleType) -> None:
    assert {"value", "other", "calls"} <= set(package.__dir__())


PACKAGES = (hashengine, hashengine.index, hashengine.methods, hashengine.models, hashengine.training)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_of_a_lazy_package_exists(package: ModuleType) -> None:
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
