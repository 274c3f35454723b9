"""A file name that was read from a file stays in its folder, whatever it says, and whatever it links to."""

import os
from pathlib import Path

import pytest

from tl_adapters.utils.files import UnsafeFileError, plain_file


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "x\0", "x\n", "\u202ex", "n" * 256]
)
def test_a_path_is_no_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeFileError, match="is named without"):
        plain_file(tmp_path, name)
    with pytest.raises(UnsafeFileError, match="is named without"):
        plain_file(tmp_path, "layer_0", name)


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for made in (folder, outside):
        made.mkdir()
    (outside / "secret").write_text("secret")
    (folder / "real").write_text("real")
    (folder / "inside").symlink_to("real")
    (folder / "file").symlink_to(outside / "secret")
    (folder / "gone").symlink_to(outside / "not there yet")
    (folder / "layer_0").symlink_to(outside)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    for names in (["file"], ["gone"], ["layer_0"], ["layer_0", "secret"]):
        with pytest.raises(UnsafeFileError, match="is a link to .*outside"):
            plain_file(folder, *names)
    with pytest.raises(UnsafeFileError, match="a device or a pipe"):
        plain_file(folder, "pipe")
    (tmp_path / "link").symlink_to(folder)  # the folder that the user names may itself be a link
    assert plain_file(tmp_path / "link", "inside").read_text() == "real"
    assert not plain_file(folder, "absent").exists() and not plain_file(folder, "loop").exists()


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blob = tmp_path / "models--user--name" / "blobs" / "0123"
    snapshot = tmp_path / "models--user--name" / "snapshots" / "89ab"
    for made in (blob.parent, snapshot):
        made.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    assert plain_file(snapshot, "config.json").read_text() == "{}"
