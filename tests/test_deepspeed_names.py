"""A DeepSpeed that lacks a name, or is untested, is reported before anything trains."""

import logging

import deepspeed
import pytest
from deepspeed.runtime.zero.partition_parameters import Init

from hyperscale.engine.deepspeed_names import check_version
from hyperscale.errors import EngineError


def test_the_installed_version_passes(caplog: pytest.LogCaptureFixture):
    check_version()
    assert caplog.records == []


def test_a_missing_name_is_reported_with_its_purpose(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(Init, "_convert_to_deepspeed_param")
    with pytest.raises(EngineError) as error:
        check_version()
    message = str(error.value)
    assert f"DeepSpeed {deepspeed.__version__} has no '_convert_to_deepspeed_param' on zero.Init" in message
    assert "which hyperscale needs to shard a parameter without a broadcast" in message
    assert "install deepspeed==" in message


@pytest.mark.parametrize("version", ["0.18.9", "99.0.0"])
def test_an_untested_version_warns(version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(deepspeed, "__version__", version)
    with caplog.at_level(logging.WARNING, "hyperscale"):
        check_version()
    assert [record.getMessage().split(" versions")[0] for record in caplog.records] == [
        f"DeepSpeed {version} is outside the"
    ]
