"""onnxruntime and OpenVINO: one graph that holds a matmul per copy of the weight.

One session for all copies, so that its threads do not compete with those of another; a pass is one run of the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from adapters.base import Candidate, group_of, num_copies, packed, rolled, unsigned_groups


def onnxruntime(weight: Tensor, threads: int, bits: int) -> Candidate:
    """MatMulNBits at accuracy level 4 (int8 activations), 2, 4 or 8 bits, fp32 scales."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    n, k = weight.shape
    group = group_of(k)
    codes, scales, values = unsigned_groups(weight, bits, group)
    data = packed(codes, bits).reshape(n, k // group, -1)
    copies = num_copies(data.nbytes + scales.nbytes)
    nodes, constants, outputs = [], [], []
    for i, (q, s) in enumerate(zip(rolled(data, copies), rolled(scales, copies), strict=True)):
        constants += [numpy_helper.from_array(q, f"q{i}"), numpy_helper.from_array(s, f"s{i}")]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", f"q{i}", f"s{i}"],
                [f"y{i}"],
                domain="com.microsoft",
                K=k,
                N=n,
                bits=bits,
                block_size=group,
                accuracy_level=4,
            )
        )
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", n]))
    x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
    graph = helper.make_graph(nodes, "copies", [x_info], outputs, constants)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results: list[np.ndarray] = []

    def prepare(x: Tensor) -> Callable[[], object]:
        results[:] = [np.full((x.shape[0], n), np.nan, np.float32) for _ in range(copies)]
        binding = session.io_binding()
        binding.bind_cpu_input("x", x.numpy())
        for i, y in enumerate(results):
            binding.bind_output(f"y{i}", "cpu", 0, np.float32, y.shape, y.ctypes.data)
        return lambda: session.run_with_iobinding(binding)

    return Candidate(
        f"onnxruntime b{bits} g{group}",
        bits + 32 / group,
        "int8",
        torch.from_numpy(values),
        copies,
        prepare,
        lambda: [torch.from_numpy(y) for y in results],
    )


def openvino(weight: Tensor, threads: int, bits: int) -> Candidate:
    """u4 or u8 weights with a zero point and fp16 scales, int8 activations by groups."""
    import openvino as ov
    from openvino import opset13 as op

    n, k = weight.shape
    group = group_of(k)
    codes, scales, _ = unsigned_groups(weight, bits, group)
    half = scales.astype(np.float16)
    values = (codes.reshape(n, -1, group).astype(np.float64) - (1 << bits - 1)) * half[..., None]
    data = packed(codes, bits).reshape(n, -1)
    copies = num_copies(data.nbytes + half.nbytes)
    kind = {4: ov.Type.u4, 8: ov.Type.u8}[bits]
    zero = np.full(1, 0x88 if bits == 4 else 0x80, np.uint8)
    x_node = op.parameter([-1, k], np.float32, name="x")
    results = []
    # OpenVINO borrows the memory of packed constants and reads it at the first run: `held` outlives it.
    codes_of = rolled(data, copies)
    for q, s in zip(codes_of, rolled(half, copies), strict=True):
        w = op.convert(
            op.constant(ov.Tensor(q, ov.Shape([n, k // group, group]), kind)), np.float16
        )
        z = op.convert(op.constant(ov.Tensor(zero, ov.Shape([1]), kind)), np.float16)
        w = op.multiply(op.subtract(w, z), op.constant(s[..., None]))
        w = op.convert(op.reshape(w, [n, k], False), np.float32)
        results.append(op.matmul(x_node, w, False, True))
    core = ov.Core()
    compiled = core.compile_model(
        ov.Model(results, [x_node]),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
            "ENABLE_CPU_PINNING": False,
        },
    )
    held = (codes_of, zero)
    request = compiled.create_infer_request()

    def prepare(x: Tensor) -> Callable[[], object]:
        request.set_input_tensor(ov.Tensor(x.numpy()))
        return lambda: (request.infer(), held)

    def outputs() -> list[Tensor]:
        return [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in range(copies)]

    return Candidate(
        f"OpenVINO u{bits} g{group}",
        bits + 16 / group,
        "int8",
        torch.from_numpy(values.reshape(n, k)).float(),
        copies,
        prepare,
        outputs,
    )
