"""Types of the compiled module of CUDA kernels; csrc/cuda/bindings.cpp."""

class Weight:
    num_groups: int
    float_zero: bool
    def __init__(
        self,
        n: int,
        k: int,
        group: int,
        bits: int,
        zero: str | None,
        scale_type: str | None,
        zero_type: str | None,
    ) -> None: ...
    def choose(
        self, m: int, architecture: int, code: int, sms: int
    ) -> tuple[str, int, int, int, int, int, bool]: ...
    def candidates(
        self, m: int, architecture: int, code: int, sms: int
    ) -> list[tuple[str, int, int, int, int, int, bool]]: ...
    def linear(
        self,
        device: int,
        stream: int,
        config: tuple[str, int, int, int, int, int, bool],
        type: str,
        m: int,
        x: int,
        x_stride: int,
        codes: int,
        scales: int,
        zeros: int,
        table: int,
        x_sums: int,
        bias: int,
        bias_type: str,
        out: int,
        out_type: str,
        parts: int,
    ) -> None: ...
    def dequantize(
        self,
        device: int,
        stream: int,
        rows: int,
        indices: int,
        codes: int,
        scales: int,
        zeros: int,
        table: int,
        out: int,
        out_type: str,
    ) -> None: ...

def probe(device: int) -> tuple[str | None, int]: ...
def fp8_scaled_mm(
    device: int,
    stream: int,
    a: tuple[int, int, bool, int, str],
    b: tuple[int, int, bool, int, str],
    m: int,
    n: int,
    k: int,
    bias: int,
    bias_type: str,
    out: int,
    out_type: str,
) -> None: ...
