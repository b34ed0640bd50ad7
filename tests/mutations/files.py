"""Files: GGUF, safetensors, recipes, folders of transformers."""

from __future__ import annotations

from mutations import python

MUTANTS = [
    *python("io/readers/gguf.py", "gguf")(
        ("return np.concatenate((qs & 15, qs >> 4), axis=1)", "return np.concatenate((qs >> 4, qs & 15), axis=1)"),
        ('return np.unpackbits(qh, axis=1, bitorder="little") << 4', 'return np.unpackbits(qh, axis=1, bitorder="big") << 4'),
        ("lambda b: b[:, 2:] ^ 0x80", "lambda b: b[:, 2:]"),
        ("_tq2_codes(b[:, :64]), slice(64, 66)", "_tq2_codes(b[:, 2:]), slice(0, 2)"),
        ("if int(offset) + size > len(self.data):", "if int(offset) > len(self.data):"),
        ("if info.offset + info.nbytes > len(self.data):", "if info.offset > len(self.data):"),
        ("tuple(reversed(dims)), offset, nbytes)", "tuple(dims), offset, nbytes)"),
    ),
    *python("integrations/transformers.py", "transformers")(
        ("torch.arange(tensor.shape[0]).view(-1, head_dim // 2, 2).transpose(1, 2)", "torch.arange(tensor.shape[0]).view(-1, 2, head_dim // 2).transpose(1, 2)"),
        ('"llama.rope.freq_base", float, default=10000.0', '"llama.rope.freq_base", float, default=1000000.0'),
        ('tie_word_embeddings="output.weight" not in file.tensors', 'tie_word_embeddings="output.weight" in file.tensors'),
        ('"llama.attention.head_count_kv", int, default=heads', '"llama.attention.head_count_kv", int, default=1'),
    ),
    *python("io/safetensors_file.py", "io", "io_bad_files")(
        ("key=lambda i: (-i[1][1].itemsize, i[0])", "key=lambda i: i[0]"),
        ("if not isinstance(name, str) or Path(name).name != name:", "if not isinstance(name, str):"),
    ),
    *python("io/readers/native.py", "io", "io_bad_files")(
        ("elif found != expected[key]:", "elif found[1] != expected[key][1]:"),
        ("self.header.tied.update(header.tied)", "self.header.tied.update({})"),
    ),
    *python("nn/names.py", "recipe", "quantize_model")(
        (r'return re.compile(rf"(?:^|(?<=\.))(?:{pattern})(?=\.|$)")', r'return re.compile(rf"(?:{pattern})(?=\.|$)")'),
        ("replace(self, method=method, options={**options, **self.options})", "replace(self, method=method, options={**self.options, **options})"),
    ),
    *python("integrations/pretrained.py", "folders")(
        ("weight = weight.t() if isinstance(module, Conv1D) else weight", "weight = weight"),
        ("if not same or not shapes.keys() <= state.keys() or own_dtypes:", "if not same or own_dtypes:"),
        ("return left.left if planned.isdisjoint(transposed) else None", "return left.left"),
    ),
    *python("io/readers/dense.py", "folders", "convert")(
        ("return super().tensor(name).to(self.specs[name][1])", "return super().tensor(name)"),
    ),
]  # fmt: skip
