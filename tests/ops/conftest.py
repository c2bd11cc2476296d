"""A fixture that the tests of the attention ops share."""

import pytest

from hashengine import _native


@pytest.fixture(params=["scalar", "avx2"])  # at the level avx512, the attention ops run the code of avx2
def simd_level(request, monkeypatch) -> str:
    """Run the test once per SIMD level of the native kernels."""
    if not _native.available():
        pytest.skip("the native module is not built")
    from hashengine import _C

    if request.param not in _C.simd_levels():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("HASHENGINE_SIMD_LEVEL", request.param)
    return request.param
