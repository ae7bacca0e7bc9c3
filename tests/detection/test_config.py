"""One number sets the times, and they fit together whatever it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.detection.config import DetectionConfig


@given(st.floats(1.0, 3600.0))
def test_the_times_are_in_order(max_stall_s) -> None:
    config = DetectionConfig(max_stall_s=max_stall_s)
    assert config.tick_s * 20 <= max_stall_s * (1 + 1e-12)
    assert config.heartbeat_interval_s <= config.tick_s
    assert 0 < config.look_s <= config.tick_s
    assert 3 * config.heartbeat_interval_s <= config.heartbeat_missed_s <= max_stall_s
    # A member is judged on rows younger than this; it must never end a stall by itself.
    assert 4 * config.tick_s < config.blind_after_s < max_stall_s
    assert config.setup_stall_s >= max_stall_s


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_stall_s", 0.5),
        ("max_stall_s", float("nan")),
        ("max_stall_s", float("inf")),
        ("step_factor", 0.9),
        ("step_factor", 11.0),
        ("steps_excluded", -1),
        ("setup_factor", 0.5),
        ("setup_factor", float("nan")),
        ("stall_factor", 0.0),
        ("busy_share", 0.0),
        ("busy_share", 1.5),
        ("named_factor", 0.5),
    ],
)
def test_what_cannot_work_is_refused_with_its_name_and_value(field, value) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {value}"):
        DetectionConfig(**{field: value})
