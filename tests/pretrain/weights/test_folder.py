"""Folders as users have them (links, pointers, unusual names, several formats): read correctly, or one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.merge import merge, open_weights
from tests.support.merge_inputs import floats, write

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def model(folder: Path, seed: int = 1, name: str = "model.safetensors") -> Path:
    write(folder, {"w": floats(seed, 4, 3), "v": floats(seed + 50, 5)}, name)
    (folder / "config.json").write_text('{"hidden_size": 3}')
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    return folder


def shards(folder: Path, stem: str = "model", index: bool = True, seed: int = 1) -> Path:
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write(folder, {"w": floats(seed, 4, 3)}, names[0])
    write(folder, {"v": floats(seed + 50, 5)}, names[1])
    if index:
        placed = {"weight_map": {"w": names[0], "v": names[1]}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(placed))
    return folder


def holds(folder: Path | str, seed: int = 1) -> None:
    source = open_weights(str(folder))
    assert set(source.names()) == {"w", "v"}
    assert source.array("w").tobytes() == floats(seed, 4, 3).tobytes()
    assert source.array("v").tobytes() == floats(seed + 50, 5).tobytes()


def test_a_file_that_is_all_of_its_folder_brings_config_and_tokenizer(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)
    merge([str(a / "model.safetensors"), str(b / "model.safetensors")], tmp_path / "out", beta=0.5)
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    torch.save({"w": torch.ones(2)}, tmp_path / "b/optimizer.pt")  # of a Trainer, no weights
    assert "config.json" in open_weights(str(b / "model.safetensors")).companions


@pytest.mark.parametrize("given", ["relative", "file"])
def test_a_file_in_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(model(tmp_path / "a"))
    source = open_weights("model.safetensors" if given == "file" else "./model.safetensors")
    assert "config.json" in source.companions


def test_one_file_of_several_says_what_it_leaves(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    write(folder, {"w": floats(3, 2)}, "other.safetensors")
    source = open_weights(str(folder / "other.safetensors"))
    assert source.companions == {}
    assert any(
        "one of several weight files: config and tokenizer of its folder are not used" in n
        for n in source.notes
    )
    parts = shards(tmp_path / "parts")
    (parts / "config.json").write_text("{}")
    source = open_weights(str(parts / "model-00001-of-00002.safetensors"))
    assert any("one of 2 shards; name the folder" in note for note in source.notes)
    bare = write(tmp_path / "bare", {"w": floats(1, 2)}, "x.safetensors")
    write(bare, {"w": floats(1, 2)}, "y.safetensors")
    assert open_weights(str(bare / "x.safetensors")).notes == []


def test_a_tied_file_given_by_itself_stays_tied(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"model.embed_tokens.weight": floats(1, 6, 4)})
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert open_weights(str(folder / "model.safetensors")).tied == tied


def linked_store(root: Path) -> Path:
    """A folder whose files are links into one other folder, as on a shared disk."""
    store, folder = model(root / "store"), root / "linked"
    folder.mkdir()
    for path in store.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def annexed(root: Path) -> Path:
    """A git-annex folder: every file links to an object of the repository, each in its own folder."""
    repository = root / "repository"
    folder = model(repository / "models/m")
    for number, path in enumerate(sorted(folder.iterdir())):
        key = repository / f".git/annex/objects/x{number}/SHA256E-s1--{number}"
        key.mkdir(parents=True)
        path.rename(key / key.name)
        path.symlink_to(Path("../../") / (key / key.name).relative_to(repository))
    return folder


def dvc(root: Path, cache: str) -> Path:
    """A DVC folder with links: files are stored by md5, in the repository's cache or in another one."""
    folder = model(root / "repository/m")
    for number, path in enumerate(sorted(folder.iterdir())):
        place = root / cache / f"files/md5/{number:02x}/{'a' * 30}"
        place.parent.mkdir(parents=True)
        path.rename(place)
        path.symlink_to(place)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        linked_store,
        annexed,
        lambda root: dvc(root, "repository/.dvc/cache"),
        lambda root: dvc(root, "shared"),
    ],
    ids=["shared disk", "git-annex", "dvc", "dvc with a shared cache"],
)
def test_links_of_shared_stores_are_followed(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path)
    holds(folder)
    assert set(open_weights(str(folder)).companions) == {"config.json", "tokenizer.json"}
    merge([str(folder), str(model(tmp_path / "other", 2))], tmp_path / "out", beta=0.5)
    assert not (tmp_path / "out/config.json").is_symlink()


def test_a_sharded_model_of_links(tmp_path: Path) -> None:
    store, folder = shards(tmp_path / "store"), tmp_path / "linked"
    folder.mkdir()
    for path in store.iterdir():
        (folder / path.name).symlink_to(path)
    holds(folder)


def test_a_companion_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    """Outputs are published, so a link in a downloaded folder must not copy a private file into one."""
    private = tmp_path / "home/.docker"
    private.mkdir(parents=True)
    (private / "config.json").write_text('{"auths": {}}')
    folder = write(tmp_path / "m", {"w": floats(1, 2)})
    (folder / "config.json").symlink_to(private / "config.json")
    other = str(write(tmp_path / "n", {"w": floats(2, 2)}))
    with pytest.raises(
        UserError, match=r"config\.json: links to .*docker.* replace the link by a copy \(cp -L\)"
    ):
        merge([str(folder), other], tmp_path / "out", beta=0.5)
    (folder / "aside.pt").symlink_to(
        private / "config.json"
    )  # what is not opened as weights vouches for nothing
    with pytest.raises(UserError, match=r"replace the link by a copy"):
        merge([str(folder), other], tmp_path / "out", beta=0.5)
    linked = write(tmp_path / "store", {"w": floats(1, 2)})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(linked / "model.safetensors")
    with pytest.raises(UserError, match=r"replace the link by a copy"):
        merge([str(folder), other], tmp_path / "out", beta=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "why"), [(LFS, "git lfs pull"), ("/annex/objects/SHA256E-s1--0\n", "git annex get")]
)
def test_pointers_are_told_from_files(tmp_path: Path, name: str, content: str, why: str) -> None:
    folder = model(tmp_path / "a")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: a .*pointer.*{why}"):
        merge([str(folder), str(model(tmp_path / "b", 2))], tmp_path / "out", beta=0.5)


def test_pointers_given_by_themselves(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_text(LFS)
    with pytest.raises(UserError, match="git lfs pull"):
        open_weights(str(path))


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "consolidated", "model.fp16"])
@pytest.mark.parametrize("index", [True, False])
def test_shards_of_any_name_with_and_without_their_index(tmp_path: Path, stem: str, index: bool) -> None:
    holds(shards(tmp_path, stem, index))


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = shards(tmp_path, index=False)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds 1 of 2 shards; number 1 is missing"):
        open_weights(str(folder))


def test_of_several_forms_the_one_that_transformers_takes(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    holds(shards(tmp_path))
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "pytorch_model.bin"}}')
    holds(tmp_path)
    model(tmp_path, 7)
    holds(tmp_path, 7)
    (note,) = open_weights(str(tmp_path)).notes
    assert "reads model.safetensors, as transformers does, not the shards of" in note
    (tmp_path / "consolidated.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    holds(tmp_path, 7)


def test_transformers_takes_the_same(tmp_path: Path) -> None:
    """Two formats in one folder: the merge reads the one that AutoModel loads."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    config = transformers.LlamaConfig(**sizes)
    for seed, how in ((1, {"max_shard_size": "1KB"}), (2, {})):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / str(seed), **how)
    for path in (tmp_path / "1").glob("model*"):
        shutil.copy(path, tmp_path / "2")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "2").state_dict()
    source = open_weights(str(tmp_path / "2"))
    for name in source.names():
        assert np.array_equal(source.array(name), loaded[name].numpy()), name


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "is empty"),
        ({"x.gguf": "GGUF"}, r"x\.gguf: GGUF, which llama.cpp uses"),
        ({"model_index.json": "{}"}, "a diffusers pipeline; name one of its parts"),
        ({"tf_model.h5": ""}, "TensorFlow"),
        ({"flax_model.msgpack": ""}, "Flax"),
        ({"consolidated.00.pth": "", "consolidated.01.pth": ""}, "Meta's tensor-parallel shards"),
        ({"adapter_model.safetensors": "", "adapter_config.json": "{}"}, r"an adapter .*merge_and_unload"),
        ({"README.md": ""}, "no safetensors file"),
    ],
)
def test_what_is_no_model_is_told_by_its_name(tmp_path: Path, files: dict[str, str], why: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=why):
        open_weights(str(folder))


def test_a_folder_above_names_those_with_weights(tmp_path: Path) -> None:
    for step in (500, 1000, 1500):
        model(tmp_path / f"trainer/checkpoint-{step}")
    (tmp_path / "trainer/runs").mkdir()
    with pytest.raises(
        UserError, match=r"weights were found in .*checkpoint-1000, .*checkpoint-1500, .*checkpoint-500$"
    ):
        open_weights(str(tmp_path / "trainer"))
    snapshot = tmp_path / "models--org--name/snapshots/0123"
    model(snapshot)
    (tmp_path / "models--org--name/refs").mkdir()
    with pytest.raises(UserError, match=f"weights were found in {snapshot}$"):
        open_weights(str(tmp_path / "models--org--name"))


def test_a_gguf_given_by_itself(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(UserError, match="name the safetensors files it was converted from"):
        open_weights(str(tmp_path / "x.gguf"))
