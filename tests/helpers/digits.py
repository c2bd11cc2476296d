"""scikit-learn's digits as a folder of images, written once per test session."""

from pathlib import Path

import pytest

from hashengine.training import prepare


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the images, with the subfolders database/ and query/."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", folder)
    return folder
