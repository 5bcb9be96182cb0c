"""Machine, versions and hashes, said in one place."""

import hashlib
import json

import torch

from hashattn.base import environment
from hashattn.base.hashes import sha256_file, sha256_text, sha256_tree


def test_machine_is_json_and_names_cores_and_memory():
    said = json.loads(json.dumps(environment.machine()))
    assert said["cores"] >= 1 and said["memory_gib"] > 0 and said["processor"]
    assert said["threads"] == torch.get_num_threads()


def test_the_processor_is_the_first_model_name(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("vendor_id : x\nmodel name\t: One: 2 GHz\nmodel name\t: Two\n")
    monkeypatch.setattr(environment, "CPU_INFO", info)
    assert environment.processor() == "One: 2 GHz"
    for nameless in ("processor : 0\n", None):  # as on many ARM boards; no /proc at all
        info.unlink() if nameless is None else info.write_text(nameless)
        assert environment.processor() not in ("", "One: 2 GHz")


def test_the_device_is_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.device_name().startswith(f"{environment.processor()}, ")
    assert environment.machine()["gpu"] is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU 9")
    assert environment.device_name() == environment.machine()["gpu"] == "GPU 9"


def test_versions_are_those_installed_and_none_for_others():
    versions = environment.package_versions(["torch", "no-such-package"])
    assert versions == {"torch": torch.__version__, "no-such-package": None}


def test_hashes_are_sha256_and_a_trees_moves_with_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("ä")
    expected = hashlib.sha256("ä".encode()).hexdigest()
    assert sha256_text("ä") == sha256_file(tmp_path / "a") == expected
    before = sha256_tree(tmp_path, [tmp_path / "a"])
    (tmp_path / "b").write_text("ä")
    assert sha256_tree(tmp_path, [tmp_path / "b"]) != before
    (tmp_path / "a").write_text("a")
    assert sha256_tree(tmp_path, [tmp_path / "a"]) != before
