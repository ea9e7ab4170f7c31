"""hub.py against a server on this machine: where a model's name is looked for, what is fetched, and what is refused.
Each docstring names the faults that the test was seen to fail on.
"""

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
from raising import raises_at

from mixdpo.files import hub
from mixdpo.files.hub import resolve
from mixdpo.models.weights import content_key, load_model, locate, save_model
from mixdpo.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
NAME, COMMIT = "Some-One/Tiny-1.5B", "c0ffee"


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's listing and files of one model: the server's `folder`. Large files are those of 10,000 bytes and more.
    With `cut`, a download ends after so many bytes. `seen`: (path, Range) of all requests."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.seen.append((self.path, asked))
        api, files = f"/api/models/{NAME}?blobs=true", f"/{NAME}/resolve/{COMMIT}/"
        if self.path == api and server.status == 200:
            body = json.dumps(self.listing()).encode()
        elif self.path.startswith(files) and (server.folder / self.path.removeprefix(files)).is_file():
            body = (server.folder / self.path.removeprefix(files)).read_bytes()
            body = body.replace(b"a", b"b") if server.altered else body
        else:
            return self.send_error(404 if server.status == 200 else server.status)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][:None if self.path == api else server.cut])

    def listing(self):
        files = []
        for path in sorted(self.server.folder.iterdir()):
            data = path.read_bytes()
            files.append({"rfilename": path.name, "size": len(data),
                          "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()})
            if len(data) >= 10_000:
                files[-1]["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        return {"sha": COMMIT, "gated": self.server.gated, "siblings": files}


@pytest.fixture
def folder(tmp_path):
    """A model's directory, in shards, with the tokenizer of bytes and a file that nobody needs."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama-untied", folder)
    tokenizers = json.loads((GOLDEN / "tokenizers.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizers["composed"]["tokenizer"]))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizers["composed"]["config"]))
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    return folder


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """The hub, and empty caches."""
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    running.folder, running.seen, running.status, running.gated, running.altered = folder, [], 200, False, False
    running.cut, running.daemon_threads = None, True
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}/")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield running
    running.shutdown()
    running.server_close()


def in_cache(root, folder, commit=COMMIT, main=True):
    """The model in the layout of Hugging Face's cache, with links into blobs; returns the snapshot."""
    home = root / f"models--{NAME.replace('/', '--')}"
    made = home / "snapshots" / commit
    made.mkdir(parents=True)
    (home / "blobs").mkdir(exist_ok=True)
    for path in folder.iterdir():
        shutil.copyfile(path, home / "blobs" / f"{commit}-{path.name}")
        (made / path.name).symlink_to(f"../../blobs/{commit}-{path.name}")
    if main:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(commit)
    return made


def test_a_name_is_fetched_once_and_without_what_is_not_needed(server, folder):
    """Model and tokenizer, each file from one commit; afterwards the hub is not asked. Faults: main for the commit; all
    files; weights before the tokenizer; the listing asked for at each use."""
    assert content_key(load_model(NAME)) == content_key(load_model(folder))
    assert load_tokenizer(NAME).key == load_tokenizer(folder).key
    paths = [path for path, _ in server.seen]
    assert paths[0] == f"/api/models/{NAME}?blobs=true" and len(paths) == len(set(paths)) == 9
    assert all(path.startswith(f"/{NAME}/resolve/{COMMIT}/") for path in paths[1:])
    assert not any("pytorch" in path for path in paths) and all("safetensors" in path for path in paths[-5:])


def test_one_file_of_weights_is_preferred_to_shards(server, folder):
    """Fault: both fetched."""
    save_model(load_model(folder), folder)
    assert content_key(load_model(NAME)) == content_key(load_model(folder))
    assert [path for path, _ in server.seen if "safetensors" in path] == [f"/{NAME}/resolve/{COMMIT}/model.safetensors"]


def test_an_interrupted_download_is_resumed_at_its_commit(server, tmp_path):
    """By a later run, although the model has changed since. Faults: a new listing; a part thrown away."""
    server.cut = 1000
    with raises_at("truncated", file=NAME):
        resolve(NAME)                                   # a connection brings 1000 bytes; a download makes five of them
    got = len(server.seen)
    server.cut = None
    (server.folder / "new.safetensors").write_bytes(b"new")
    found = resolve(NAME)
    assert not hub.missing(found) and content_key(load_model(found)) == content_key(load_model(server.folder))
    later = server.seen[got:]
    assert not any("/api/" in path for path, _ in later) and later[0][1] == "bytes=5000-"


def test_a_model_that_cannot_be_fetched_is_given_as_the_error_says(server, folder, tmp_path):
    """All its files in the data folder, or the missing one in the cache. Faults: advice to put one file into the data
    folder, which is then taken for the model."""
    server.altered = True
    with raises_at(f"FOLDER/{NAME}", tmp_path / "cache" / "hub", file=NAME) as caught:
        resolve(NAME, tmp_path / "data")
    assert f"{NAME}/config.json and give" not in caught.value.message
    shutil.copytree(folder, tmp_path / "data" / NAME)
    assert resolve(NAME, tmp_path / "data") == tmp_path / "data" / NAME


@pytest.mark.parametrize("size", [100, 20_000])
def test_altered_files_are_refused(size, server, folder):
    """Small ones by git's sha1, large ones by sha256. Fault: the checksum of small files not looked at."""
    (folder / "config.json").write_text((folder / "config.json").read_text() + " " * size)
    server.altered = True
    with raises_at("altered", f"{NAME}/config.json", file=NAME):
        resolve(NAME)


@pytest.mark.parametrize("change, named", [
    (dict(status=401), ["HTTP 401", "hf download Some-One/Tiny-1.5B", "DATA=FOLDER"]), (dict(status=404), ["HTTP 404"]),
    (dict(gated="manual"), ["licence"])])
def test_what_the_hub_does_not_give_is_explained(change, named, server):
    """No such model, or one that needs a licence. Faults: urllib's error; a gated model's files asked for."""
    vars(server).update(change)
    with raises_at(*named, file=NAME):
        load_model(NAME)
    with raises_at(*named, file=NAME):
        load_tokenizer(NAME)
    assert not any("/resolve/" in path for path, _ in server.seen)


def test_without_a_connection_the_error_says_what_to_do(server, monkeypatch):
    """Fault: an OSError let through."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with raises_at("127.0.0.1:9", "DATA=FOLDER", file=NAME):
        load_model(NAME)


def test_pickled_weights_are_refused_before_anything_is_fetched(server, folder):
    """Fault: the small files fetched, and then an incomplete folder."""
    for path in folder.glob("model*"):
        path.unlink()
    with raises_at("save_pretrained", file=NAME):
        load_model(NAME)
    assert len(server.seen) == 1


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json"])
def test_a_model_that_is_incomplete_on_the_hub_is_refused_before_anything_is_fetched(lost, server, folder):
    """Later it is complete, and found. Faults: gigabytes of weights fetched first; a listing kept that lacks a file."""
    kept = (folder / lost).read_bytes()
    (folder / lost).unlink()
    with raises_at(lost, file=NAME):
        resolve(NAME)
    assert len(server.seen) == 1
    (folder / lost).write_bytes(kept)
    assert not hub.missing(resolve(NAME))


def test_places_come_in_order(server, folder, tmp_path):
    """Data folder, a local path, Hugging Face's cache, ours. Faults: another order; the hub asked although there is a
    copy."""
    data, ours = tmp_path / "data", resolve(NAME)
    asked = len(server.seen)
    theirs = in_cache(tmp_path / "huggingface" / "hub", folder)
    assert resolve(NAME) == theirs and locate(NAME) == theirs
    in_data = in_cache(data, folder)
    assert resolve(NAME, data) == in_data
    shutil.copytree(folder, data / NAME)
    assert resolve(NAME, data) == data / NAME and locate(NAME, data) == data / NAME
    shutil.copytree(folder, tmp_path / NAME)            # the working directory is tmp_path
    assert resolve(NAME) == Path(NAME) and resolve(NAME, data) == data / NAME
    assert len(server.seen) == asked and ours == tmp_path / "cache" / "hub" / "Some-One--Tiny-1.5B"


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model-00003-of-00004.safetensors"])
def test_an_incomplete_copy_in_hugging_faces_cache_is_not_used(lost, server, folder, tmp_path, capsys):
    """A link whose file is gone. Faults: only config.json looked for; the link counted as the file."""
    made = in_cache(tmp_path / "huggingface" / "hub", folder)
    (made / lost).resolve().unlink()
    assert resolve(NAME) == tmp_path / "cache" / "hub" / "Some-One--Tiny-1.5B" and lost in capsys.readouterr().out


@pytest.mark.parametrize("place, content", [
    ("model.safetensors.index.json", b'{"weight_map": ["a"]}'),
    ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}'), ("../../refs/main", b"\xff")])
def test_a_damaged_cache_is_an_error_that_names_the_model(place, content, server, folder, tmp_path):
    """Fault: a traceback."""
    made = in_cache(tmp_path / "huggingface" / "hub", folder)
    (made / place).write_bytes(content)
    (made / "model.safetensors").unlink(missing_ok=True)
    with raises_at("damaged", file=NAME):
        resolve(NAME)


def test_a_cache_folder_and_a_snapshot_are_models(folder, tmp_path):
    """The snapshot of refs/main, or the only one. Faults: the newest, or the first by name; no word where it is
    open which."""
    old = in_cache(tmp_path, folder, "aaa", main=False)
    home = old.parents[1]
    assert resolve(home) == old and resolve(old) == old
    assert content_key(load_model(home)) == content_key(load_model(old))
    assert load_tokenizer(str(home)).key == load_tokenizer(old).key
    new = in_cache(tmp_path, folder, "bbb", main=False)
    with raises_at("2 snapshots", file=home):
        resolve(home)
    for made in (old, new):
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(made.name)
        assert resolve(home) == made


@pytest.mark.parametrize("variables, want", [
    ({"HF_HUB_CACHE": "a", "HF_HOME": "b"}, "a"), ({"HF_HOME": "b", "XDG_CACHE_HOME": "c"}, "b/hub"),
    ({"XDG_CACHE_HOME": "c"}, "c/huggingface/hub"), ({"HOME": "d"}, "d/.cache/huggingface/hub")])
def test_hugging_faces_cache_is_where_its_variables_say(variables, want, monkeypatch):
    """Fault: another order of precedence."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub.huggingface_cache() == Path(want)


@pytest.mark.parametrize("name", ["gpt3", "a/b/c", "./a/b", "/a/b", "runs/x.gguf", "runs/x.bin", "-a/b"])
def test_other_names_are_paths(name, server):
    """Fault: the hub asked about a mistyped path."""
    assert resolve(name) == Path(name) and not server.seen
