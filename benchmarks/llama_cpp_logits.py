"""llama.cpp through its C API: a model, its logits, and nothing else."""

from __future__ import annotations

import numpy as np


class LlamaCpp:
    """One sequence of a GGUF file.

    Raises:
        RuntimeError: llama.cpp cannot load or run it.
    """

    def __init__(self, path: str, threads: int, context: int, batch: int) -> None:
        import llama_cpp as lib

        self._lib = lib
        self._silent = lib.llama_log_callback(lambda *_: None)  # llama.cpp calls it until the end
        lib.llama_log_set(self._silent, None)
        self._model = lib.llama_model_load_from_file(
            path.encode(), lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, batch, batch
        params.n_threads = params.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, params)
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def forward(self, ids: list[int]) -> None:
        """Appends tokens and waits for the logits after the last."""
        tokens = (self._lib.llama_token * len(ids))(*ids)
        self._decode(self._lib.llama_batch_get_one(tokens, len(ids)))
        self._lib.llama_get_logits_ith(self._context, -1)

    def logits(self) -> np.ndarray:
        """After the last token: (vocabulary,) fp32."""
        last = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(last, (self._vocab,)).copy()

    def all_logits(self, ids: list[int]) -> np.ndarray:
        """Of a sequence of its own, after each of its tokens: (tokens, vocabulary) fp32."""
        self.reset()
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        self._decode(batch)
        found = self._lib.llama_get_logits(self._context)
        logits = np.ctypeslib.as_array(found, (len(ids), self._vocab)).copy()
        self._lib.llama_batch_free(batch)
        return logits

    def reset(self) -> None:
        """Forgets the sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, batch: object) -> None:
        if status := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
