"""Models by their names on the Hugging Face hub: a name -> a local folder, fetched if there is none.

    resolve("Qwen/Qwen3-0.6B")                  the folder with its config.json, tokenizer files and safetensors
    resolve("PATH/models--Qwen--Qwen3-0.6B")    the snapshot in a folder of Hugging Face's cache
    resolve(any other name or path)             the path as it is

A hub name is looked for in the data folder, in Hugging Face's own cache, in the project's cache, and on the hub. A copy
in a cache is used only if it is complete. The hub's listing states the commit and the size and checksum of each file.
It is kept beside the files, so that an interrupted download is resumed at the same commit; weights come last. A
complete copy is used without a question to the hub.

Left out: credentials (a gated model is an error that says what to do), revisions other than the main one, and pickled
weights.
"""

import http.client
import json
import os
import re
from pathlib import Path

from mixdpo.config import InputError, reading, write_text
from mixdpo.files import fetch
from mixdpo.files.atomic import read_json_or_empty
from mixdpo.files.download import Unavailable, read_url
from mixdpo.files.fetch import Asset

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")           # a name with one of these endings is a path
SINGLE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", re.compile(r"model-\d+-of-\d+\.safetensors")
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


def resolve(name, data=None):
    """-> Path of the local folder of a model or tokenizer; the module's docstring has the rules.

    data: a folder of local files, which may hold a hub's model as OWNER/NAME or as models--OWNER--NAME.
    Raises: InputError if a hub's model is nowhere complete and cannot be fetched, or if a cache is damaged.
    """
    with reading(name, "a file of the cache is damaged: remove the model there, and get it again"):
        return folder_of(Path(name), str(name), data)


def folder_of(path, name, data):
    """`resolve`, for files that can be read."""
    is_hub_name = NAME.fullmatch(name) and not name.endswith(FILES)
    cached = f"models--{name.replace('/', '--')}"
    if data is not None and is_hub_name:
        if (Path(data) / name / "config.json").is_file():
            return Path(data) / name
        if (Path(data) / cached).is_dir():
            return snapshot(Path(data) / cached)
    if path.exists() or not is_hub_name:
        return snapshot(path) if (path / "snapshots").is_dir() else path
    if (huggingface_cache() / cached / "snapshots").is_dir():
        found = snapshot(huggingface_cache() / cached)
        if not (lacking := missing(found)):
            return found
        print(f"{name}: the copy in {found} lacks {', '.join(lacking)}; another one is used")
    return fetched(name)


def huggingface_cache():
    """The folder of Hugging Face's cache, by its environment variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def snapshot(folder):
    """-> Path of the snapshot in a folder models--OWNER--NAME: that of refs/main, or the only one.
    Raises: InputError."""
    main, found = folder / "refs" / "main", sorted(path for path in (folder / "snapshots").glob("*") if path.is_dir())
    named = folder / "snapshots" / main.read_text().strip() if main.is_file() else None
    if named in found:
        return named
    if len(found) != 1:
        raise InputError(f"has {len(found)} snapshots, and refs/main names none of them; give one of the folders in "
                         f"{folder / 'snapshots'}, or download the model again", file=folder)
    return found[0]


def missing(folder):
    """The names of files that a model's folder lacks: configuration, tokenizer, weights. Empty if it is complete."""
    weights = [SINGLE]
    if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        weights = sorted(set(read_json_or_empty(folder / INDEX).get("weight_map", {}).values())) or [INDEX]
    tokenizer = "vocab.json" if (folder / "vocab.json").is_file() else "tokenizer.json"
    return [name for name in ("config.json", tokenizer, *weights) if not (folder / name).is_file()]


def fetched(name):
    """-> Path of the model's folder in the project's cache. Fetches what it lacks. Raises: InputError."""
    folder = fetch.cache_folder() / "hub" / name.replace("/", "--")
    if not missing(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with fetch.locked(folder / "listing.json"):
        listing = listing_of(name, folder / "listing.json")
        for entry in listing["files"]:
            source = f"{endpoint()}/{name}/resolve/{listing['commit']}/{entry['file']}"
            asset = Asset(f"{name}/{entry['file']}", entry["bytes"], entry["checksum"], (source,))
            if not (folder / entry["file"]).is_file():
                fetch.from_sources(name, asset, None, folder / entry["file"],
                                   f"put all files of the model into FOLDER/{name} and give DATA=FOLDER")
    if lacking := missing(folder):
        raise InputError(f"the hub's model lacks {', '.join(lacking)}; choose another model", file=name)
    return folder


def endpoint():
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or fetch.HUB


def listing_of(name, path):
    """-> {commit, files: [{file, bytes, checksum}]}: the files that are needed, weights last. From `path`, or from the
    hub and then kept there. Raises: InputError."""
    if kept := read_json_or_empty(path):
        return kept
    url, by_hand = f"{endpoint()}/api/models/{name}?blobs=true", (
        f"fetch it with Hugging Face's own tool (hf download {name}), or put its files into FOLDER/{name} and give "
        "DATA=FOLDER")
    try:
        answer = json.loads(read_url(url))
        sizes = {each["rfilename"]: each for each in answer["siblings"]}
        weights = [SINGLE] if SINGLE in sizes else [INDEX, *sorted(filter(SHARD.fullmatch, sizes))]
        wanted = [sizes[file] for file in (*SMALL, *weights) if file in sizes]
        files = [{"file": each["rfilename"], "bytes": each["size"],
                  "checksum": (each.get("lfs") or {}).get("sha256") or each["blobId"]} for each in wanted]
        listing = {"commit": answer["sha"], "files": files}
    except (Unavailable, OSError, http.client.HTTPException) as error:
        raise InputError(f"is no local folder, and the hub does not list it ({url}: {error}). Check the name. A model "
                         f"that is private or gated answers 401 or 403; then, or without a connection, {by_hand}",
                         file=name) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"the hub's listing cannot be read ({url}: {error!r}); {by_hand}", file=name) from None
    if answer.get("gated"):
        raise InputError(f"is gated: accept its licence at {endpoint()}/{name}, then {by_hand}", file=name)
    if not any(file["file"].endswith(".safetensors") for file in files):
        raise InputError("has no model.safetensors on the hub, and pickled weights are not read, because opening them "
                         "can run any code; choose another model, or convert it with transformers: "
                         "AutoModelForCausalLM.from_pretrained(A).save_pretrained(B)", file=name)
    if lacking := [file for file in ("config.json", "tokenizer.json") if file not in sizes
                   and not (file == "tokenizer.json" and {"vocab.json", "merges.txt"} <= sizes.keys())]:
        raise InputError(f"the hub's model lacks {', '.join(lacking)}; choose another model", file=name)
    write_text(path, json.dumps(listing, indent=1))
    return listing
