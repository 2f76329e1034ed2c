"""A pin without a wheel for a supported Python or platform is found from the index's metadata."""

import pytest

from tests.environments.wheels import TARGETS, Target, find_missing_wheels

LINUX = Target((3, 13), "linux", "x86_64")
MAC = Target((3, 13), "darwin", "arm64")


def lock_of(*files, marker=None):
    wheels = [{"url": f"https://index/{file}"} for file in files]
    package = {"name": "thing", "version": "1.0", "wheels": wheels}
    return {"packages": [package | ({"marker": marker} if marker else {})]}


def test_a_pure_wheel_serves_every_target():
    assert not list(find_missing_wheels(lock_of("thing-1.0-py3-none-any.whl")))


@pytest.mark.parametrize(
    "tag", ["cp311-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64", "cp313-cp313-manylinux_2_28_x86_64"]
)
def test_a_compiled_wheel_serves_its_platform_only(tag):
    missing = find_missing_wheels(lock_of(f"thing-1.0-{tag}.whl"), (LINUX, MAC))
    assert list(missing) == ["thing==1.0: 3.13 darwin arm64"]


@pytest.mark.parametrize(
    "tag",
    [
        "cp312-cp312-manylinux_2_17_x86_64",  # another Python
        "cp313-cp313t-manylinux_2_17_x86_64",  # free-threaded
        "cp313-cp313-musllinux_1_2_x86_64",
        "cp313-cp313-manylinux_2_39_x86_64",  # a newer glibc than supported systems have
    ],
)
def test_a_wheel_that_pip_would_not_take_is_no_wheel(tag):
    assert list(find_missing_wheels(lock_of(f"thing-1.0-{tag}.whl"), (LINUX,)))


def test_a_package_is_needed_only_where_its_marker_holds():
    lock = lock_of(
        "thing-1.0-cp311-cp311-macosx_11_0_arm64.whl",
        marker="sys_platform == 'darwin' and python_full_version < '3.12'",
    )
    assert not list(find_missing_wheels(lock))


def test_every_target_without_a_wheel_is_named():
    (line,) = find_missing_wheels({"packages": [{"name": "thing", "version": "1.0"}]})
    assert line.startswith("thing==1.0: 3.11 linux x86_64, ")
    assert line.count(",") == len(TARGETS) - 1
