"""torch.save files read without torch: the same values as torch, and hostile pickles that must not run."""

from __future__ import annotations

import enum
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from pretrain.weights.formats import torch_pickle
from pretrain.weights.formats.state_dict import StateDict
from pretrain.weights.formats.torch_file import TorchFile
from pretrain.weights.formats.torch_tensor import Tensor

torch = pytest.importorskip("torch")


def archive(
    path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, compress: bool = False
) -> Path:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


def test_values_are_torch_s(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    content = {
        "plain": base,
        "view": base[1:3],
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": base[:1].expand(3, 6),
        "half": torch.randn(5).half(),
        "bf16": torch.randn(3, 2).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64),
        "long": torch.tensor([1, -(2**50)]),
        "u16": torch.tensor([1, 65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(OrderedDict(content), tmp_path / "x.pt")
    read = TorchFile(tmp_path / "x.pt").content
    assert list(read) == list(content)
    for name, expected in content.items():
        got = read[name]
        assert isinstance(got, Tensor)
        assert got.shape == tuple(expected.shape)
        flat = expected.detach().reshape(-1).contiguous()
        wanted = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
        assert got.read(0, got.numel).tobytes() == wanted.tobytes(), name
        if got.numel > 2:
            assert got.read(1, got.numel - 1).tobytes() == wanted[1:-1].tobytes(), name


def test_training_state_with_optimizer_and_random_state(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "module": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": (torch.get_rng_state(), np.random.default_rng(0).bit_generator.state, np.arange(3)),
        "scalar": np.float64(2.0),
        "dtype": torch.bfloat16,
        "raw": b"\x00\xff",
        "names": {"a", "b"},
    }
    torch.save(state, tmp_path / "x.pt")
    read = TorchFile(tmp_path / "x.pt").content
    weight = read["module"]["weight"]
    np.testing.assert_array_equal(weight.read(0, 6), model.weight.detach().numpy().ravel())
    assert (read["dtype"], read["raw"], read["names"]) == ("BF16", b"\x00\xff", {"a", "b"})


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_enumeration_as_any_python_pickles_it(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("deepspeed_like")
    Stage = enum.IntEnum("Stage", {"one": 1, "two": 2}, module="deepspeed.like")
    module.Stage = Stage  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed.like", module)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    for reduced in ((getattr, (Stage, "two")), (Stage, (2,))):  # Python 3.11.2, and the Pythons around it
        monkeypatch.setattr(Stage, "__reduce_ex__", lambda self, _, reduced=reduced: reduced)
        pickled = pickle.dumps({"stage": Stage.two, "step": 3}, protocol)
        content = TorchFile(archive(tmp_path / f"{len(pickled)}.pt", pickled)).content
        assert content["step"] == 3
        assert content["stage"].args == reduced[1][-1:]


def test_strided_tensors_of_any_shape(tmp_path: Path) -> None:
    """Columns and other views: every range is contiguous, as its readers need it, with torch's values."""
    base = torch.randn(10, 6)
    content = {
        "column": base[:, 2],
        "column_as_matrix": base[:, 2:3],
        "row_as_matrix": base.t()[2:3],
        "every_third": base.reshape(-1)[::3],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "scalar": base[3, 2],
        "expanded": base[:1, 0].expand(7),
    }
    torch.save(content, tmp_path / "x.pt")
    read = TorchFile(tmp_path / "x.pt").content
    for name, expected in content.items():
        count, flat = expected.numel(), expected.reshape(-1).numpy()
        for start, stop in [
            (0, count),
            (count // 3, count),
            (0, count - count // 3),
            (count // 2, count // 2),
        ]:
            got = read[name].read(start, stop)
            assert got.view(np.uint8).tobytes() == flat[start:stop].tobytes(), (name, start, stop)


def test_what_a_scheduler_and_others_keep_beside_the_weights(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20])
    state = {
        "state_dict": {"w": torch.arange(3.0)},
        "scheduler": scheduler.state_dict(),
        "z": 1 + 2j,
        "raw": bytearray(b"ab"),
        "layout": torch.strided,
        "other": torch.complex128,
        "scheme": torch.per_tensor_affine,
        "sparse": torch.eye(2).to_sparse(),
        "double": torch.ones(2, dtype=torch.complex128),
        "meta": torch.empty(2, device="meta"),
    }
    torch.save(state, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=True)
    read = TorchFile(tmp_path / "x.pt").content
    np.testing.assert_array_equal(read["state_dict"]["w"].read(0, 3), [0, 1, 2])
    assert read["scheduler"]["milestones"] == {10: 1, 20: 1}
    assert (read["z"], read["raw"]) == (1 + 2j, b"ab")


def test_every_name_that_torch_s_safe_loader_allows(tmp_path: Path) -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    for full in _get_allowed_globals():
        module, _, name = full.rpartition(".")
        code = b"\x80\x02" + f"c{module}\n{name}\n0N.".encode()
        assert TorchFile(archive(tmp_path / "x.pt", code)).content is None, full


def test_tensors_that_are_no_plain_numbers_are_named(tmp_path: Path) -> None:
    """Beside the weights they are ignored; among the weights they would be lost."""
    odd = {
        "sparse": torch.eye(2).to_sparse(),
        "double": torch.ones(2, dtype=torch.complex128),
        "meta": torch.empty(2, device="meta"),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    }
    for name, tensor in odd.items():
        torch.save({"w": torch.ones(2), name: tensor}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"x.pt: {name} is a tensor .*cannot be merged"):
            StateDict(tmp_path / "x.pt")


def test_the_refusal_of_a_class_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "when": __import__("datetime").date(2026, 1, 1)}, tmp_path / "x.pt")
    with pytest.raises(
        UserError, match=r"datetime\.date, which is not needed.*save its state_dict\(\) alone"
    ):
        TorchFile(tmp_path / "x.pt")


class Evil:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def touch_by(function: str, path: Path) -> Any:
    target = str(path)
    return {
        "os.system": Evil(os.system, f"touch {target}"),
        "builtins.eval": Evil(eval, f"open({target!r}, 'w').close()"),
        "builtins.exec": Evil(exec, f"open({target!r}, 'w').close()"),
        "io.open": Evil(open, target, "w"),
        "builtins.getattr": Evil(getattr, "text", "upper"),
        "operator.attrgetter": Evil(__import__("operator").attrgetter, "system"),
        "torch.load": Evil(torch.load, target),
    }[function]


@pytest.mark.parametrize(
    "function",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "io.open",
        "builtins.getattr",
        "operator.attrgetter",
        "torch.load",
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_with_code_is_refused_by_name_and_does_not_run(
    tmp_path: Path, function: str, protocol: int
) -> None:
    witness = tmp_path / "it_ran"
    hostile = {"module": OrderedDict(a=1), "evil": touch_by(function, witness)}
    path = archive(tmp_path / "evil.pt", pickle.dumps(hostile, protocol))
    wanted = function.rpartition(".")[2]
    with pytest.raises(UserError, match=rf"evil\.pt: refused: .*\.{wanted}"):
        TorchFile(path)
    assert not witness.exists()


def test_the_witness_would_have_been_written(tmp_path: Path) -> None:
    witness = tmp_path / "it_ran"
    pickle.loads(pickle.dumps(touch_by("builtins.exec", witness)))
    assert witness.exists()


@pytest.mark.parametrize(
    ("code", "why"),
    [
        # BUILD on an allowed function would set attributes of the interpreter's own objects.
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}(X\x03\x00\x00\x00abcK\x01ub.",
            "sets attributes on a",
        ),
        (b"\x80\x02cdeepspeed.os\nsystem\nX\x02\x00\x00\x00ls\x85R.", None),  # a stub, not a module
        (b"\x80\x04\x8c\x0bcollections\x94\x8c\x14OrderedDict.fromkeys\x94\x93.", "OrderedDict.fromkeys"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "which is not a function"),
        (b"\x80\x02X\x03\x00\x00\x00abcQ.", "refused"),
        (b"\x80\x02\x82\x01.", "extension"),
        (b"\x80\x02cbuiltins\nset\n(K\x01K\x02K\x03tR.", "refused"),
    ],
)
def test_crafted_opcodes(tmp_path: Path, code: bytes, why: str | None) -> None:
    path = archive(tmp_path / "x.pt", code)
    if why is None:
        assert isinstance(TorchFile(path).content, torch_pickle.Stub)
    else:
        with pytest.raises(UserError, match=why):
            TorchFile(path)
    assert not hasattr(torch_pickle._rebuild, "abc")


def tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...], offset: int, count: int) -> bytes:
    """The pickle of one tensor over a FloatStorage that claims `count` elements."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(obj, Marker) else None

    class Marker:
        pass

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(
        {"t": Evil(torch._utils._rebuild_tensor_v2, Marker(), offset, shape, stride, False, OrderedDict())}
    )
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "count"),
    [
        ((5,), (1,), 0, 4),
        ((2,), (1,), 3, 4),
        ((2, 2), (100, 1), 0, 4),
        ((4,), (-1,), 3, 4),
        ((4,), (1,), 0, 400),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(
    tmp_path: Path, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, count: int
) -> None:
    honest = archive(
        tmp_path / "good.pt", tensor_pickle((4,), (1,), 0, 4), {"0": np.arange(4, dtype="<f4").tobytes()}
    )
    np.testing.assert_array_equal(TorchFile(honest).content["t"].read(0, 4), [0, 1, 2, 3])
    path = archive(tmp_path / "x.pt", tensor_pickle(shape, stride, offset, count), {"0": bytes(16)})
    with pytest.raises(UserError, match="refused"):
        TorchFile(path)


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    good = tmp_path / "good.pt"
    torch.save({"a": torch.ones(1000)}, good)
    legacy = tmp_path / "legacy.pt"
    torch.save({"a": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "empty.pt").write_bytes(b"")
    archive(tmp_path / "packed.pt", tensor_pickle((4,), (1,), 0, 4), {"0": bytes(16)}, compress=True)
    for name in ("legacy.pt", "cut.pt", "empty.pt", "packed.pt"):
        with pytest.raises(UserError, match=name):
            TorchFile(tmp_path / name)
    with pytest.raises(UserError, match="not found"):
        TorchFile(tmp_path / "absent.pt")
