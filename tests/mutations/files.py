"""Files: GGUF, safetensors, recipes, folders of transformers."""

from __future__ import annotations

from mutations import python

MUTANTS = [
    *python("io/readers/gguf_blocks.py", "gguf")(
        ("return np.concatenate((qs & 15, qs >> 4), axis=1)", "return np.concatenate((qs >> 4, qs & 15), axis=1)"),
        ('return np.unpackbits(qh, axis=1, bitorder="little") << 4', 'return np.unpackbits(qh, axis=1, bitorder="big") << 4'),
        ("Parts(b[:, 2:] ^ 0x80, _half(b, 0))", "Parts(b[:, 2:], _half(b, 0))"),
        ("_fields(b[:, :64], 2, 32), _half(b, 64)", "_fields(b[:, 2:], 2, 32), _half(b, 0)"),
    ),
    *python("io/readers/gguf_header.py", "gguf")(
        ("if info.offset + info.nbytes > file.size:", "if info.offset > file.size:"),
        ("tuple(reversed(dims)), offset, nbytes, part)", "tuple(dims), offset, nbytes, part)"),
        ("if said != (i, count):", "if said[1] != count:"),
        ("if end > len(chunk):", "if end > len(chunk) + 8:"),
    ),
    *python("integrations/gguf_keys.py", "gguf_llama", "gguf_models")(
        ('.rope.freq_base", float, default=10000.0', '.rope.freq_base", float, default=1000000.0'),
        ("return None if np.isscalar(value) and value == 0 else key(file, name, kind)", "return key(file, name, kind)"),
        ('[factor * rope.get("factor", 1.0) for factor in factors]', "[factor for factor in factors]"),
        ('"attention_factor": 1.0', '"attention_factor": 2.0'),
    ),
    *python("integrations/gguf_configs.py", "gguf_llama", "gguf_models", "gguf_models_bad", "gguf_converted")(
        ('"tie_word_embeddings": "output.weight" not in file.tensors', '"tie_word_embeddings": "output.weight" in file.tensors'),
        ('.attention.head_count_kv", layers, default=heads', '.attention.head_count_kv", layers, default=1'),
        ('arguments["attention_multiplier"] = dim**-0.5 if scale is None else scale', 'arguments["attention_multiplier"] = dim**-0.5'),
        ("grouped = two or kv_heads > 1", "grouped = two"),
        ('rope["partial_rotary_factor"] = rotated / dim', 'rope["partial_rotary_factor"] = 1.0'),
        ("// heads if layers == largest else dim", "// heads"),
        ('"sliding_attention" if (i + 1) % pattern', '"sliding_attention" if i % pattern'),
        ('float, default=10000.0),', 'float, default=10000.0) * 2,'),
        ('columns = hidden if name == "token_embd.weight" else heads * dim', "columns = file.tensors[name].shape[-1]"),
    ),
    *python("integrations/gguf_rows.py", "gguf_llama", "gguf_models", "gguf_converted")(
        ("order = processor.process(order, stored).weights", "pass"),
        ("if unknown := sorted(file.tensors.keys() - used):", "if unknown := ():"),
        ('"blk.0.", stored)', 'r"\\g<0>", stored)'),
        ("grouped = [p.reshape(kv_heads, -1,", "grouped = [p.reshape(1, -1,"),
        ("mine = slice(starts[i], starts[i + 1])", "mine = slice(starts[0], starts[i + 1])"),
    ),
    *python("integrations/gguf_rows.py", "gguf_experts")(
        ("None if order is None or _is_run(order) else torch.from_numpy(order),", "None,"),
        ("and (1, *shape) == expected", "and (0, *shape) == expected"),
    ),
    *python("integrations/gguf_experts.py", "gguf_experts")(
        ("(rows[..., ::2], rows[..., 1::2])", "(rows[..., 1::2], rows[..., ::2])"),
        ("np.stack([rows[e] for e in sorted(rows)])", "np.stack([rows[e] for e in sorted(rows)[::-1]])"),
    ),
    *python("integrations/gguf_expert_configs.py", "gguf_experts")(
        ('arguments["norm_topk_prob"] = True', 'arguments["norm_topk_prob"] = False'),
        ('arguments["rope_parameters"]["truncate"] = False', 'arguments["rope_parameters"]["truncate"] = True'),
        ("if used > count:", "if used > count + 1:"),
    ),
    *python("integrations/gguf_rows.py", "gguf_fused")(
        ("start = sum(counts[: joint[1].index(stored)])", "start = 0"),
        ("range(start, start + len(order)))", "range(0, len(order)))"),
    ),
    *python("nn/experts.py", "gguf_experts")(
        ("return torch.stack(list(halves), dim + 1).flatten(dim, dim + 1)", "return torch.cat(list(halves), dim)"),
        ("return slice(0, None, 2), slice(1, None, 2)", "return slice(0, count // 2), slice(count // 2, None)"),
    ),
    *python("integrations/folder_names.py", "expert_folders")(
        ("HALVES[converter.source_patterns.index(pattern)]", "HALVES[0]"),
        ("or steps != expected", "or False"),
    ),
    *python("integrations/filling.py", "expert_folders", "mxfp4")(
        ("return self._stacked_bias(stack)[int(expert)]", "return self._stacked_bias(stack)[0]"),
        ("            decoded = True\n", "            decoded = self.decoded\n"),
    ),
    *python("io/readers/fp8.py", "expert_folders")(
        ("rows = n // 2  # gates, and what they multiply", "rows = n"),
    ),
    *python("io/readers/folder.py", "mxfp4")(
        ("index = self.stacks[name][1] if name in self.stacks else None", "index = 0 if name in self.stacks else None"),
    ),
    *python("io/readers/gguf.py", "gguf_experts")(
        ("self._bytes(info, rows.start * size, len(rows) * size)", "self._bytes(info, 0, len(rows) * size)"),
    ),
    *python("integrations/gguf_models.py", "gguf_llama", "gguf_models", "gguf_models_bad", "gguf_converted")(
        ("processed = self.processor.process(values, name).weights", "processed = values"),
        ("isinstance(module, nn.Linear) and parent != _HEAD", "isinstance(module, nn.Linear)"),
    ),
    *python("cli/quantize.py", "quantize_gguf")(
        ("load_decoded(options.source, options.dtype or torch.float32)",
         "load_decoded(options.source, options.dtype or torch.bfloat16)"),
        ("if types and not again:", "if False:"),
    ),
    *python("nn/embedding.py", "scaled_embedding")(
        ("torch.tensor(self.embed_scale, dtype=self.dtype", "torch.tensor(self.embed_scale, dtype=torch.float32"),
        ("    if len(embedding._buffers) > 1 or len(embedding._parameters) > 1:", "    if False:"),
        ("if buffer.is_meta or torch.equal(buffer, torch.full_like(buffer, number)):", "if True:"),
    ),
    *python("io/safetensors_file.py", "io", "io_bad_files")(
        ("key=lambda i: (-i[1][1].itemsize, i[0])", "key=lambda i: i[0]"),
        ("if not isinstance(name, str) or Path(name).name != name:", "if not isinstance(name, str):"),
    ),
    *python("io/readers/native.py", "io", "io_bad_files")(
        ("elif found != expected[key]:", "elif found[1] != expected[key][1]:"),
        ("self.header.tied.update(header.tied)", "self.header.tied.update({})"),
    ),
    *python("files.py", "files")(
        ("key=lambda file: file.name == last", "key=lambda file: file.name != last"),
        ("                    if _lock(descriptor, fcntl.LOCK_NB):", "                    if True:"),
        ("            _hand_down(f.fileno(), old)\n            try:", "            try:"),
    ),
    *python("io/extra_state.py", "extra_state")(
        ('return {"": "dict", "items": items} if "" in value else items', "return items"),
        ("if isinstance(value, list) and kind is list:", "if isinstance(value, list | tuple):"),
        ("if isinstance(value, float) and kind is float and not math.isfinite(value):", "if False:"),
    ),
    *python("io/match.py", "extra_state")(
        ("for name in sorted(self.extra - stored):", "for name in ():"),
        ("(checkpoint.dense.keys() | dense_ties) - checkpoint.inner", "checkpoint.dense.keys() | dense_ties"),
    ),
    *python("nn/names.py", "recipe", "quantize_model")(
        (r'return re.compile(rf"(?:^|(?<=\.))(?:{pattern})(?=\.|$)")', r'return re.compile(rf"(?:{pattern})(?=\.|$)")'),
        ("replace(self, method=method, options={**options, **self.options})", "replace(self, method=method, options={**self.options, **options})"),
    ),
    *python("integrations/pretrained.py", "folders")(
        ("if not same or not shapes.keys() <= state.keys() or own_dtypes:", "if not same or own_dtypes:"),
        ("if planned.isdisjoint(transposed) and not reordered else None", "if not reordered else None"),
        ("if planned.isdisjoint(transposed) and not reordered else None", "if planned.isdisjoint(transposed) else None"),
    ),
    *python("nn/stand_ins.py", "folders", "quantizer")(
        ("weight = weight.t() if is_transposed(module) else weight", "weight = weight"),
        ("return (rows.t() if self.transposed else rows)[self.rows]", "return rows[self.rows]"),
    ),
    *python("io/readers/dense.py", "folders", "convert")(
        ("return super().tensor(name, index).to(self.specs[name][1])", "return super().tensor(name, index)"),
    ),
]  # fmt: skip
