"""Broken artifacts: real ones with changed graphs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Temperatures at which the `trouble` model misbehaves.
NAN, FAILS, SLOW = 3.0, 11.0, 20.0  # above SLOW: (temperature - SLOW) * 3 to 10 ms on one core
POISON = 666.0  # a batch with this mu fails as well
WILD = 5.0  # a row with noise above this is NaN at any temperature
GREEDY, MODEST = 7.0, 4  # at GREEDY more than MODEST rows together need more memory than any machine has


def operate(source: Path, target: Path, surgery: Callable[[onnx.ModelProto], object]) -> Path:
    """Write a changed copy of an ONNX file."""
    model = onnx.load(source)
    surgery(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(model.SerializeToString())
    return target


def make_trouble(source: Path, target: Path) -> Path:
    """Write a sampler that misbehaves at some temperatures.

    A row is NaN at temperature NAN, and with noise above WILD. A batch fails at FAILS, needs all memory at
    GREEDY, and is slow above SLOW.
    """

    def surgery(model: onnx.ModelProto) -> None:
        graph = model.graph
        (producer,) = (node for node in graph.node if "latents" in node.output)
        for node in graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == "latents":
                        names[index] = "latents_before"
        assert producer.output[0] == "latents_before"
        graph.initializer.extend(_constants())
        graph.node.extend(_nan_nodes())
        graph.node.extend(_wild_nodes())
        graph.node.extend(_fail_nodes())
        graph.node.extend(_slow_nodes())
        graph.node.extend(_greedy_nodes())
        parts = ["latents_before", "nan_part", "wild_part", "fail_part", "slow_part", "greedy_part"]
        graph.node.append(helper.make_node("Sum", parts, ["latents"]))

    return operate(source, target, surgery)


def rename_input(before: str, after: str) -> Callable[[onnx.ModelProto], None]:
    def surgery(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == before:
                    node.input[index] = after
        for value in model.graph.input:
            if value.name == before:
                value.name = after

    return surgery


def set_metadata(key: str, value: str | None) -> Callable[[onnx.ModelProto], None]:
    """Replace a metadata property, or remove it."""

    def surgery(model: onnx.ModelProto) -> None:
        kept = {item.key: item.value for item in model.metadata_props if item.key != key}
        helper.set_model_props(model, kept if value is None else {**kept, key: value})

    return surgery


def keep_weights_in(location: str) -> Callable[[onnx.ModelProto], None]:
    """Make the first weight refer to another file."""

    def surgery(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)

    return surgery


def fix_batch(rows: int) -> Callable[[onnx.ModelProto], None]:
    """Make every input declare a batch of this many rows."""

    def surgery(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[0].dim_value = rows

    return surgery


def fix_batch_inside(model: onnx.ModelProto) -> None:
    """Make a node in the graph need two rows, although the inputs declare any batch."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "temperature":
                node.input[index] = "temperature_of_two"
    constants = {"c_from": np.array([0]), "c_to": np.array([2]), "c_nothing": np.float32(0)}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    )
    for position, node in enumerate(
        [
            helper.make_node("Slice", ["temperature", "c_from", "c_to"], ["two"]),
            helper.make_node("Mul", ["two", "c_nothing"], ["two_zeros"]),
            helper.make_node("Add", ["temperature", "two_zeros"], ["temperature_of_two"]),
        ]
    ):
        model.graph.node.insert(position, node)


def draw_noise(model: onnx.ModelProto) -> None:
    """Make the graph add noise of its own to its input."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "noise":
                node.input[index] = "noisier"
    model.graph.node.insert(0, helper.make_node("RandomNormalLike", ["noise"], ["own"]))
    model.graph.node.insert(1, helper.make_node("Add", ["noise", "own"], ["noisier"]))


def flip_a_bit_of_pixels(model: onnx.ModelProto) -> None:
    """Make pixels differ from the images."""
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "pixels":
                node.output[index] = "pixels_before"
    model.graph.initializer.append(numpy_helper.from_array(np.array(4, np.uint8), "c_bit"))
    model.graph.node.append(helper.make_node("BitwiseXor", ["pixels_before", "c_bit"], ["pixels"]))


def nudge_weight(name: str, by: float) -> Callable[[onnx.ModelProto], None]:
    """Change one number of a weight."""

    def surgery(model: onnx.ModelProto) -> None:
        (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        values = numpy_helper.to_array(weight).copy()
        values.flat[0] += by
        weight.CopyFrom(numpy_helper.from_array(values, name))

    return surgery


def _constants() -> list[onnx.TensorProto]:
    values = {
        "c_nan": np.float32(NAN),
        "c_wild": np.float32(WILD),
        "c_fails": np.float32(FAILS),
        "c_poison": np.float32(POISON),
        "c_slow": np.float32(SLOW),
        "c_greedy": np.float32(GREEDY),
        "c_modest": np.array([MODEST]),
        "c_much": np.array([2**44]),
        "c_none": np.array([0]),
        "c_zero": np.float32(0),
        "c_ten": np.float32(10),
        "c_axis": np.array([1]),
        "c_table": np.zeros(1, np.float32),
        "c_true": np.array(True),
        "c_matrix": np.full((160, 160), 1e-3, np.float32),
    }
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def _nan_nodes() -> list[onnx.NodeProto]:
    """Compute 0 / (temperature - NAN) for each row."""
    return [
        helper.make_node("Sub", ["temperature", "c_nan"], ["from_nan"]),
        helper.make_node("Div", ["c_zero", "from_nan"], ["nan_row"]),
        helper.make_node("Unsqueeze", ["nan_row", "c_axis"], ["nan_part"]),
    ]


def _wild_nodes() -> list[onnx.NodeProto]:
    """Compute 0 * sqrt(WILD - noise)."""
    return [
        helper.make_node("Sub", ["c_wild", "noise"], ["below_wild"]),
        helper.make_node("Sqrt", ["below_wild"], ["root"]),
        helper.make_node("Mul", ["root", "c_zero"], ["wild_part"]),
    ]


def _fail_nodes() -> list[onnx.NodeProto]:
    """Gather an index out of range if any temperature is FAILS or any mu is POISON."""
    return [
        helper.make_node("Equal", ["temperature", "c_fails"], ["is_failing"]),
        helper.make_node("Unsqueeze", ["is_failing", "c_axis"], ["is_failing_row"]),
        helper.make_node("Equal", ["mu", "c_poison"], ["is_poison"]),
        helper.make_node("Or", ["is_failing_row", "is_poison"], ["is_either"]),
        helper.make_node("Cast", ["is_either"], ["failing"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["failing"], ["index"], keepdims=0),
        helper.make_node("Gather", ["c_table", "index"], ["fail_part"]),
    ]


def _greedy_nodes() -> list[onnx.NodeProto]:
    """Sum 2**44 zeros for each row at GREEDY beyond the first MODEST rows."""
    return [
        helper.make_node("Equal", ["temperature", "c_greedy"], ["is_greedy"]),
        helper.make_node("Cast", ["is_greedy"], ["greedy"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["greedy"], ["greedy_rows"], keepdims=1),
        helper.make_node("Sub", ["greedy_rows", "c_modest"], ["greedy_beyond"]),
        helper.make_node("Max", ["greedy_beyond", "c_none"], ["greedy_many"]),
        helper.make_node("Mul", ["greedy_many", "c_much"], ["greedy_shape"]),
        helper.make_node("ConstantOfShape", ["greedy_shape"], ["greedy_zeros"]),
        helper.make_node("ReduceSum", ["greedy_zeros"], ["greedy_part"], keepdims=0),
    ]


def _slow_nodes() -> list[onnx.NodeProto]:
    """Multiply a matrix a hundred times for each degree above SLOW."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["matrix_in", "c_matrix"], ["matrix_out"]),
            helper.make_node("Identity", ["going"], ["going_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("matrix_in", TensorProto.FLOAT, [160, 160]),
        ],
        [
            helper.make_tensor_value_info("going_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("matrix_out", TensorProto.FLOAT, [160, 160]),
        ],
    )
    return [
        helper.make_node("ReduceMax", ["temperature"], ["hottest"], keepdims=0),
        helper.make_node("Sub", ["hottest", "c_slow"], ["above"]),
        helper.make_node("Max", ["above", "c_zero"], ["degrees"]),
        helper.make_node("Mul", ["degrees", "c_ten"], ["turns_float"]),
        helper.make_node("Mul", ["turns_float", "c_ten"], ["turns_more"]),
        helper.make_node("Cast", ["turns_more"], ["turns"], to=TensorProto.INT64),
        helper.make_node("Loop", ["turns", "c_true", "c_matrix"], ["matrix"], body=body),
        helper.make_node("ReduceMax", ["matrix"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "c_zero"], ["slow_part"]),
    ]
