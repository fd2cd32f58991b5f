"""Waiting for the Ray nodes of a Slurm job; test_script.py runs whole nodes with a stand-in for Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.slurm import ray_node


def test_ranks_start_when_the_ray_of_every_node_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_node, "JOIN_SECONDS", -1)
    (tmp_path / "address").write_text("10.0.0.1:6379")
    for node in (0, 2):
        with pytest.raises(SystemExit, match="not all 3 nodes of the job's Ray cluster are up"):
            ray_node.main(["wait", str(tmp_path), "3"])
        (tmp_path / f"node-{node}").touch()
    with pytest.raises(SystemExit, match="not all 3 nodes"):
        ray_node.main(["wait", str(tmp_path), "3"])
    (tmp_path / "node-1").touch()
    assert ray_node.main(["wait", str(tmp_path), "3"]) == 0
    assert capsys.readouterr().out == "10.0.0.1:6379\n"
