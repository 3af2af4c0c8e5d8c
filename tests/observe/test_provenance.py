"""What a run says of where its numbers come from."""

import subprocess

import torch

from fastgrpo import __version__
from fastgrpo.observe.provenance import commit, provenance


def test_a_commit_is_named_and_changed_files_are_said(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert commit(tmp_path) is None
    git("init")
    assert commit(tmp_path) is None
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD").stdout
    found = commit(tmp_path)
    assert found is not None
    assert head.startswith(found)
    assert len(found) == 12
    (tmp_path / "untracked").write_text("")
    assert commit(tmp_path) == found
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == found + "+"


def test_a_process_says_its_versions_and_its_machine():
    said = provenance(torch.device("cpu"))
    assert said["versions"]["fastgrpo"] == __version__
    assert said["versions"]["torch"] == torch.__version__
    assert said["machine"].startswith("CPU (")
    assert f"cores, {torch.get_num_threads()} thread" in said["machine"]
