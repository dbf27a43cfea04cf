import numpy as np
import pyarrow as pa
import pytest

from engine.data.columns import Column, Values


@pytest.mark.parametrize(
    ("column", "values", "arrow_type"),
    [
        (Column("label", "int32", "scalar"), [3, 1, 2], pa.int32()),
        (Column("labels", "int32", "list"), [np.array([-100, 5]), np.array([], np.int32), np.array([1])], pa.list_(pa.int32())),
        (Column("image", "uint8", "fixed"), [np.full((2, 2, 3), i, np.uint8) for i in range(3)], pa.list_(pa.uint8(), 12)),
        (Column("sound", "int16", "list"), [np.array([1, -2], np.int16), np.array([7], np.int16)], pa.list_(pa.int16())),
    ],
)  # fmt: skip
def test_values_survive_a_round_trip(column: Column, values: list[object], arrow_type: pa.DataType) -> None:
    array = column.to_arrow(values)
    assert array.type.equals(arrow_type) or array.type.value_type == arrow_type.value_type
    read = Values.from_arrow(array)
    assert [read[i].tolist() for i in range(len(values))] == [np.ravel(value).tolist() for value in values]  # type: ignore[call-overload]


def test_reading_does_not_copy() -> None:
    array = Column("labels", "int32", "list").to_arrow([np.arange(5), np.arange(3)])
    values = Values.from_arrow(array)
    assert np.shares_memory(values[1], values.flat)
    assert not values[0].flags.writeable
