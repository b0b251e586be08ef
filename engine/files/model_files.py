"""From what a user calls a model to the files on this machine that hold its weights."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import RillError, UsageError
from engine.files.json_file import brief, one_line, parse_object, read_bytes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SHARD_NAME = re.compile(r"[\w.+ -]{1,200}\.safetensors", re.ASCII)
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model"]
_HUB_REST = ["*/*", "consolidated*"]  # other formats of the same weights
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")


def local_path(model: str | Path) -> Path:
    """An existing path as it is; else a hub name such as "Qwen/Qwen3-0.6B" as the directory of its snapshot,
    taken from the Hugging Face cache and fetched only where that does not have it whole.

    Raises UsageError for what is neither, RillError where the hub cannot help.
    """
    path = Path(model).expanduser()
    called = str(model) if str(model).isprintable() else repr(str(model))
    try:
        if path.exists():
            return path
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        raise UsageError(f"{called}: is not a path") from None
    if isinstance(model, Path) or not _HUB_NAME.fullmatch(model):
        raise UsageError(f"{called}: no such file or directory, nor a hub name like Qwen/Qwen3-0.6B")
    return _snapshot(model)


def _snapshot(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        problem = "no such directory; to use it as a hub name, run `pip install huggingface_hub`"
        raise RillError(f"{name}: {problem}") from None

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_REST, local_files_only=local_files_only
            )
        )

    try:
        cached = snapshot(local_files_only=True)
        if is_complete(cached):
            return cached
    except Exception:  # not in the cache; the classes that say so change with the library's version
        pass
    try:
        return snapshot(local_files_only=False)
    except Exception as error:
        reason = one_line(str(error)) or type(error).__name__
        problem = "no such directory, not whole in the Hugging Face cache, and it could not be fetched"
        raise RillError(f"{name}: {problem}: {reason}") from None


def find_weights(path: Path) -> Path:
    """The index or safetensors file that holds a model's weights; `path` is one, or a directory."""
    if not path.is_dir():
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            return path
        if any(path.match(pattern) for pattern in _PICKLES):
            raise _pickled(path.parent, path.name)
        kinds = "a .safetensors file, a .safetensors.index.json nor a .gguf file"
        raise UsageError(f"{path}: is neither a directory, {kinds}")
    for name in (INDEX_FILE, SINGLE_FILE):
        if (path / name).exists():
            return path / name
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise _pickled(path, pickles[0])
    others = sorted(file.name for file in path.glob("*.gguf"))
    hint = f"; to load {others[0]}, name the file itself" if others else ""
    raise RillError(f"{path}: has no weights; looked for {INDEX_FILE} and {SINGLE_FILE}{hint}")


def is_complete(directory: Path) -> bool:
    """Whether a directory has its config and every file of its weights."""
    try:
        weights = find_weights(directory)
        files = [weights] if weights.suffix != ".json" else read_index(weights)[0]
    except RillError:
        return False
    return all(file.exists() for file in [directory / "config.json", *files])


def _pickled(directory: Path, name: str) -> RillError:
    convert = f"AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(OUT)"
    return RillError(
        f"{directory / name}: pickled weights are not opened, since they can run code; "
        f"convert them to safetensors with transformers: {convert}"
    )


def read_index(index: Path) -> tuple[list[Path], dict[str, Path]]:
    """The shards that an index names, and the shard of each tensor. Shards must lie beside the index."""
    weight_map = parse_object(read_bytes(index, MAX_INDEX_BYTES), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RillError(f"{index}: weight_map: must be an object that names the shard of every tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            problem = f"{brief(shard)} is not the plain name of a .safetensors file"
            raise RillError(f"{index}: weight_map: {brief(name)}: {problem}")
    placed = {name: index.parent / shard for name, shard in weight_map.items()}
    return sorted(set(placed.values())), placed
