"""A `main` that runs a network on a few inputs and compares every value with what Python computed."""

from __future__ import annotations

from torch import Tensor

from lowbit.export.c.source import array, checksum
from lowbit.integer import IntegerGraph

_MAIN = """\
// Runs the network on samples and compares with what lowbit's Python computed: exits with 1 on a difference.
// Compiled with -DMODEL_TRACE, as model.c then must be too, it compares the result of every node.
#include <stdio.h>

#include "model.h"

#define SAMPLES {samples}

{inputs}

{outputs}

static {type} result[MODEL_OUTPUT_SIZE];
static int differences = 0;

#ifdef MODEL_TRACE
{checksums}

static int sample = 0;

void model_trace(int node, const {type} *values, size_t count) {{
  uint32_t sum = 2166136261U;
  for (size_t i = 0; i < count; ++i) {{
    const uint32_t value = (uint32_t)(int32_t)values[i];
    for (int byte = 0; byte < {bytes}; ++byte) {{
      sum = (sum ^ (value >> (8 * byte) & 255U)) * 16777619U;
    }}
  }}
  if (sum != checksums[sample * MODEL_NODES + node]) {{
    printf("sample %d: node %d differs\\n", sample, node);
    ++differences;
  }}
}}
#endif

int main(void) {{
  for (int s = 0; s < SAMPLES; ++s) {{
#ifdef MODEL_TRACE
    sample = s;
#endif
    model_run(inputs + s * MODEL_INPUT_SIZE, result);
    for (int i = 0; i < MODEL_OUTPUT_SIZE; ++i) {{
      const int expected = outputs[s * MODEL_OUTPUT_SIZE + i];
      if (result[i] != expected) {{
        printf("sample %d: output %d is %d, expected %d\\n", s, i, (int)result[i], expected);
        ++differences;
      }}
    }}
  }}
  printf("%d samples, arena %d bytes: %d differences\\n", SAMPLES, MODEL_ARENA_BYTES, differences);
  return differences != 0;
}}
"""


def main_c(graph: IntegerGraph, q: Tensor) -> str:
    """The text of main.c for inputs q (samples, *shape) int8 or int16."""
    results = graph.run(q)
    type = "int8_t" if graph.bits == 8 else "int16_t"
    sums = [checksum(results[n.node.name][s]) for s in range(len(q)) for n in graph.nodes]
    return _MAIN.format(
        samples=len(q),
        type=type,
        bytes=graph.bits // 8,
        inputs=array(f"static const {type} inputs", q.flatten().tolist()),
        outputs=array(f"static const {type} outputs", results[graph.output].flatten().tolist()),
        checksums=array("static const uint32_t checksums", sums).replace(",", "U,"),
    )
