"""Bundles: a folder, a tar, and all that can be wrong with one, each with its own message."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loquent.engine.bundle import Bundle
from loquent.engine.errors import BundleError
from loquent.engine.recognizer import Recognizer
from loquent.engine.words import WordRules

Write = Callable[..., Path]
Speak = Callable[..., Any]


def pack(folder: Path, tar: Path, *, prefix: str = "", mode: str = "w") -> Path:
    with tarfile.open(tar, mode) as archive:  # type: ignore[call-overload]
        for path in sorted(folder.iterdir()):
            archive.add(path, prefix + path.name)
    return tar


def refuse(path: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Recognizer.load(path)
    assert str(path) in str(caught.value)


def test_facts(tiny_bundle: Path) -> None:
    bundle = Bundle.load(tiny_bundle)
    assert bundle.name == "tiny"
    assert bundle.chunks_ms == (40, 80, 160, 320, 640, 1280)
    assert bundle.right_contexts_ms == (0, 40, 80)
    assert bundle.frame_seconds == 0.04
    assert bundle.decoders == ("joint", "rnnt-beam", "ctc-beam", "rnnt", "ctc")
    assert bundle.tokens[1] == "▁ba"
    assert bundle.manifest["licence"] == "Apache-2.0"


@pytest.mark.parametrize(
    ("prefix", "mode"), [("", "w"), ("tiny/", "w"), ("./", "w"), ("", "w:gz")], ids=str
)
def test_tar_is_like_the_folder(
    tiny_bundle: Path, tmp_path: Path, tones: Speak, prefix: str, mode: str
) -> None:
    tar = pack(tiny_bundle, tmp_path / "tiny.tar", prefix=prefix, mode=mode)
    pcm = tones([(1, 0.2), (2, 0.2)])
    finals = Recognizer.load(tar).transcribe(pcm)
    assert finals == Recognizer.load(tiny_bundle).transcribe(pcm)
    assert [final.text for final in finals] == ["bana"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.tar"]  # nothing extracted


def test_bundles_with_one_head(write_bundle: Write, tmp_path: Path, tones: Speak) -> None:
    def ctc_only(manifest: dict[str, Any]) -> None:
        manifest["heads"]["rnnt"] = None
        manifest["default_decoder"] = "ctc"

    def rnnt_only(manifest: dict[str, Any]) -> None:
        manifest["heads"]["ctc"] = False

    for change in (ctc_only, rnnt_only):
        folder = write_bundle(tmp_path / change.__name__, change=change)
        assert Recognizer.load(folder).transcribe(tones([(1, 0.3)]))[0].text == "ba"


def test_word_rules(write_bundle: Write, tmp_path: Path, tones: Speak) -> None:
    def measured(manifest: dict[str, Any]) -> None:
        manifest["words"] = {"rnnt": {"delay": 0.1, "tail": 0.2, "bias": 0.0, "later": 1}}

    bundle = Bundle.load(write_bundle(tmp_path / "b", change=measured))
    assert bundle.word_rules("rnnt") == WordRules(delay=0.1, tail=0.2, bias=0.0)
    assert bundle.word_rules("ctc") == WordRules()
    pcm = tones([(0, 0.4), (1, 0.3), (0, 1.0)])
    plain = Recognizer.load(write_bundle(tmp_path / "plain")).transcribe(pcm)[0].words[0]
    word = Recognizer(bundle).transcribe(pcm)[0].words[0]
    assert (word.start, word.end) == pytest.approx((plain.start - 0.1, plain.end + 0.2))
    assert word.confidence == 0.5

    def wrong(manifest: dict[str, Any]) -> None:
        manifest["words"] = {"rnnt": {"delay": 1e3}}

    refuse(
        write_bundle(tmp_path / "c", change=wrong), r"got words\.rnnt\.delay = 1000\.0, expected"
    )


# Where it is


def test_nothing_there(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "expected a folder, a tar file or a bundle that came with Loquent")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    refuse(tmp_path, r"no bundle, manifest\.json is missing; give the folder or tar that `loquent")


def test_a_file_that_is_no_tar(tmp_path: Path) -> None:
    path = tmp_path / "model.tar"
    path.write_bytes(b"not a tar at all" * 100)
    refuse(path, "cannot be read as tar .* expected a bundle")


def test_a_tar_that_is_cut(tiny_bundle: Path, tmp_path: Path) -> None:
    path = pack(tiny_bundle, tmp_path / "tiny.tar", mode="w:gz")
    path.write_bytes(path.read_bytes()[:-5000])
    refuse(path, "cannot be read as tar")


# Tar members


def add(tar: Path, name: str, data: bytes = b"x", **fields: Any) -> Path:
    with tarfile.open(tar, "a") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for key, value in fields.items():
            setattr(info, key, value)
        archive.addfile(info, io.BytesIO(data))
    return tar


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "tiny/../../evil.txt"])
def test_members_outside_the_archive(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    tar = add(pack(tiny_bundle, tmp_path / "tiny.tar"), name)
    refuse(tar, "which points outside the archive")
    assert not (tmp_path.parent / "evil.txt").exists()


def test_links_in_a_tar(tiny_bundle: Path, tmp_path: Path) -> None:
    tar = pack(tiny_bundle, tmp_path / "tiny.tar")
    add(tar, "tokens.spm", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    refuse(tar, "the member 'tokens.spm', which is no regular file")


def test_a_tar_that_would_fill_the_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("encoder.onnx")
    info.size = 5 << 30
    path = tmp_path / "bomb.tar"
    path.write_bytes(info.tobuf())
    os.truncate(path, (5 << 30) + 2048)  # sparse: takes no room on the disk
    refuse(path, "bytes of files in the tar")


# Files


@pytest.mark.parametrize(
    "name", ["encoder.onnx", "predictor.onnx", "joiner.onnx", "tokens.txt", "features.npz"]
)
def test_missing_and_changed_files(write_bundle: Write, tmp_path: Path, name: str) -> None:
    folder = write_bundle(tmp_path / "bundle")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data + b" ")
    refuse(folder, rf"{name}: the SHA-256 is \w+\.\.\., expected \w+\.\.\. of manifest\.json")
    (folder / name).unlink()
    refuse(folder, rf"{name} is missing; copy or export the bundle again")


def test_a_file_outside_the_bundle(write_bundle: Write, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["tokens"]["file"] = "../tokens.txt"

    refuse(
        write_bundle(tmp_path / "b", change=change),
        r"got tokens\.file = '\.\./tokens\.txt', expected the plain name of a file",
    )


# Manifest


def test_no_json(write_bundle: Write, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    (folder / "manifest.json").write_text("{")
    refuse(folder, r"manifest\.json is no JSON")
    (folder / "manifest.json").write_text("[1]")
    refuse(folder, r"manifest\.json: the file is no object")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "got schema 2, expected no more than 1; .*newer Loquent: upgrade"),
        ("schema", None, "schema is missing, expected a whole number"),
        ("schema", "1", "got schema = '1', expected a whole number"),
        ("name", 5, "got name = 5, expected a string"),
        ("sample_rate", 8000, "sample_rate is 8000, but its features are made for 16000 Hz"),
        ("vocab_size", 10, "got 9 tokens, expected vocab_size 10"),
        ("blank", 3, "line 4, the blank of manifest.json, is '▁ki', expected '<blank>'"),
        ("blank", 99, "line 100, .* is 'nothing', expected '<blank>'"),
        ("precision", "int4", "got precision = 'int4', expected one of fp32, int8"),
        (
            "default_decoder",
            "beam",
            "got default_decoder = 'beam', expected one of joint, rnnt-beam",
        ),
        (
            "heads.rnnt",
            None,
            "got default_decoder 'rnnt', expected one that has a head: ctc-beam, ctc",
        ),
        ("heads.ctc", 1, "got heads.ctc = 1, expected true or false"),
        ("encoder", [], r"got encoder = \[\], expected an object"),
        ("encoder.subsampling", True, "got encoder.subsampling = True, expected a whole number"),
        ("encoder.subsampling", 0, "got encoder.subsampling = 0, expected 1 or more"),
        ("encoder.segments", [4, 6], r"encoder.segments = \[4, 6\], expected multiples .* 4"),
        ("encoder.segments", [4, "8"], "got encoder.segments = .*expected a list of whole numbers"),
        ("encoder.segment", 20, r"got encoder.segment = 20, expected one of \[4, 8"),
        ("encoder.right_context", 2, r"got encoder.right_context = 2, expected one of \[0, 4, 8\]"),
        ("encoder.states", [1], r"encoder.states\[0\] is no object"),
        ("languages", {"en": 1}, "languages has values that are no strings"),
        ("features.spec", {}, r"features\.npz: feature spec: got fields \[\]"),
    ],
)
def test_manifest_values(
    write_bundle: Write, tmp_path: Path, path: str, value: object, message: str
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            manifest = manifest[key]
        if value is None and last == "schema":
            del manifest[last]
        else:
            manifest[last] = value

    refuse(write_bundle(tmp_path / "bundle", change=change), message)


# Graphs against the manifest


def states(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[dict[str, Any]], None]:
    def apply(manifest: dict[str, Any]) -> None:
        change(manifest["encoder"]["states"])

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            states(lambda s: s[0].update(shape=[7, 80])),
            r"the input state\.left is float32 \[B,6,80\], expected float32 \[\?,7,80\] from the",
        ),
        (
            states(lambda s: s[1].update(dtype="int32")),
            r"the input state\.processed_frames is int64 \[B\], expected int32 \[\?\]",
        ),
        (
            states(lambda s: s[0].update(name="right")),
            r"the graph has no input state\.right, which the manifest asks for",
        ),
        (
            states(lambda s: s.pop()),
            r"the graph has the input state\.processed_frames, of which the manifest says nothing",
        ),
    ],
)
def test_states(
    write_bundle: Write, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    refuse(write_bundle(tmp_path / "bundle", change=change), r"encoder\.onnx: " + message)


def test_wrong_vocabulary(write_bundle: Write, tmp_path: Path) -> None:
    # The tokens agree with the manifest, and both disagree with the network.
    pieces = ["<blank>", "▁a", "b"]
    folder = write_bundle(
        tmp_path / "bundle", pieces=pieces, change=lambda m: m.update(vocab_size=3)
    )
    refuse(folder, r"encoder\.onnx: the output ctc is float32 \[B,K,9\], expected .*\[\?,\?,3\]")


def test_wrong_joiner_size(write_bundle: Write, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["heads"]["ctc"] = False
        manifest["heads"]["rnnt"]["joiner_dim"] = 12

    folder = write_bundle(tmp_path / "bundle", change=change)
    refuse(folder, r"the output joiner is float32 \[B,K,9\], expected float32 \[\?,\?,12\]")


def test_wrong_subsampling_shows_in_the_trial_run(write_bundle: Write, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", change=lambda m: m["encoder"].update(subsampling=2))
    refuse(folder, r"a trial run gave ctc as float32 \[2,3,9\], expected float32 \[2,6,9\]")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("loquent_schema", "exported for another bundle format"),
        ("loquent_features", "exported for other features"),
        ("loquent_tokens", "exported with other tokens"),
    ],
)
def test_metadata(write_bundle: Write, tmp_path: Path, key: str, message: str) -> None:
    folder = write_bundle(tmp_path / "bundle", metadata={key: "something else"})
    refuse(folder, f"{message} than the manifest's: its metadata has {key} = 'something else'")


def test_a_graph_that_is_none(write_bundle: Write, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    data = b"not a graph"
    (folder / "joiner.onnx").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["heads"]["rnnt"]["joiner"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refuse(folder, r"joiner\.onnx: ONNX Runtime cannot load it")
