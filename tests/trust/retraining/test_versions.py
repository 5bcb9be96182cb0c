"""Versions of hash weights: what is in use survives interruptions, and there is a way back."""

import pytest

from hashattn.base.errors import HashWeightsError
from hashattn.hashing import HashConfig, HashWeights
from hashattn.hashing.weight_files import CONFIG_FILE
from hashattn.trust.retraining.versions import LINEAGE, Versions, VersionsError

CONFIG = HashConfig((0,), query_heads=2, kv_heads=1, head_dim=8, depth=1)


def weights(seed, parent=None):
    """Made from the weights of seed `parent`."""
    made = HashWeights.random(CONFIG, seed)
    parent = None if parent is None else weights(parent).sha256
    return HashWeights(CONFIG, made.maps, {"trained": True, LINEAGE: parent and {"parent": parent}})


@pytest.fixture
def versions(tmp_path):
    return Versions.begin(tmp_path / "versions", weights(0))


def test_the_first_version_is_the_weights_as_they_are(versions):
    assert versions.current == "v0001" and versions.names == ["v0001"]
    assert versions.load().sha256 == weights(0).sha256
    assert HashWeights.load(versions.path / "v0001").sha256 == weights(0).sha256
    assert (versions.path / "current").read_text() == "v0001\n"


def test_versions_are_numbered_used_and_left_again(versions):
    assert versions.add(weights(1, parent=0)) == "v0002"
    assert versions.add(weights(2, parent=1)) == "v0003"
    assert versions.load().sha256 == weights(2).sha256
    assert versions.rollback() == versions.current == "v0002"
    assert versions.rollback() == versions.current == "v0001"
    assert versions.load().sha256 == weights(0).sha256
    assert versions.add(weights(3, parent=0)) == "v0004"  # nothing is overwritten
    records = versions.records()
    assert [r["name"] for r in records] == ["v0001", "v0002", "v0003", "v0004"]
    assert [r["current"] for r in records] == [False, False, False, True]
    assert [r["sha256"] for r in records] == [weights(s).sha256 for s in range(4)]
    assert [(r[LINEAGE] or {}).get("parent") for r in records] == [
        None, *(weights(s).sha256 for s in (0, 1, 0))
    ]  # fmt: skip
    assert versions.rollback() == "v0001"  # where it was made from, not the number below
    assert versions.load(name="v0003").sha256 == weights(2).sha256


def test_numbers_are_ordered_as_numbers(versions):
    for name in ("v9999", "v10000"):
        weights(5).save(versions.path / name)
    assert versions.names[-1] == "v10000" and versions.add(weights(6)) == "v10001"


def test_the_first_version_has_none_before_it(versions):
    with pytest.raises(VersionsError, match="none to go back"):
        versions.rollback()


def test_a_parent_in_another_folder_is_not_taken_for_the_version_of_that_name(tmp_path):
    versions = Versions.begin(tmp_path, weights(4, parent=0))
    with pytest.raises(VersionsError, match="v0001 is not made from another version in"):
        versions.rollback()


def test_begin_goes_on_with_the_same_weights_and_refuses_others(versions):
    versions.add(weights(1, parent=0))
    assert Versions.begin(versions.path, weights(0)).current == "v0002"
    assert Versions.begin(versions.path, weights(1)).names == ["v0001", "v0002"]
    with pytest.raises(VersionsError, match="other hash weights"):
        Versions.begin(versions.path, weights(7))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["write_tensors", "write_record"])
def test_a_version_that_was_not_written_whole_does_not_count(versions, monkeypatch, at):
    from hashattn.hashing import weight_files

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(weight_files, at, dies)
        with pytest.raises(Killed):
            versions.add(weights(1, parent=0))
    assert versions.current == "v0001" and versions.names == ["v0001"]
    assert versions.add(weights(2, parent=0)) == "v0002"
    assert versions.load().sha256 == weights(2).sha256


def test_a_version_that_was_not_pointed_to_is_not_in_use(versions, monkeypatch, tmp_path):
    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Versions, "_use", dies)
        with pytest.raises(Killed):
            versions.add(weights(1, parent=0))
        with pytest.raises(Killed):
            Versions.begin(tmp_path / "second", weights(0))
    assert versions.current == "v0001" and versions.add(weights(2)) == "v0003"
    second = Versions.begin(tmp_path / "second", weights(0))
    assert second.current == "v0001" and second.load().sha256 == weights(0).sha256


def test_damage_says_what_to_do(versions, tmp_path):
    with pytest.raises(VersionsError, match=r"no versions: Versions.begin"):
        Versions(tmp_path / "nothing").load()
    with pytest.raises(VersionsError, match=r"no version 'v0009', only \['v0001'\]"):
        versions.load(name="v0009")
    versions.add(weights(1, parent=9))
    with pytest.raises(VersionsError, match="v0002 is not made from another version"):
        versions.rollback()
    (versions.path / "current").write_text("v0007")
    with pytest.raises(VersionsError, match=r"'v0007', which is not there: write one of"):
        versions.load()
    (versions.path / "current").unlink()
    with pytest.raises(VersionsError, match="current does not exist"):
        versions.load()
    (versions.path / "v0001" / CONFIG_FILE).write_text("{")
    with pytest.raises(HashWeightsError):
        versions.load(name="v0001")
