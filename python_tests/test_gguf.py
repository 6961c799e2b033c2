"""GGUF files: what `pop convert` makes of one against the model that it was written from, and what it refuses."""

import json

import pytest
import torch
import transformers
from helpers import COMMON, LLAMA3_ROPE, randomise

from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.families import ModelSpec
from pop_ext.checkpoints.files import CheckpointError
from pop_ext.checkpoints.gguf import convert_gguf
from pop_ext.checkpoints.gguf_config import llama3_parameters
from pop_ext.checkpoints.weights import load_weights

gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")
np = pytest.importorskip("numpy")

SIZES = dict(hidden_size=96, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
             head_dim=64, max_position_embeddings=512)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
SOURCES = {
    "llama": (transformers.LlamaConfig, dict(tie_word_embeddings=False, rms_norm_eps=1e-5)),
    "llama3": (transformers.LlamaConfig, dict(rope_parameters=LLAMA3_ROPE, attention_bias=True)),
    "llama_linear": (transformers.LlamaConfig, dict(rope_parameters=LINEAR)),
    "mistral": (transformers.MistralConfig, dict(sliding_window=7)),
    "qwen2": (transformers.Qwen2Config, dict(rope_parameters=YARN, num_attention_heads=2, head_dim=48, hidden_size=96)),
    "qwen2_betas": (
        transformers.Qwen2Config,
        dict(rope_parameters=YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, num_attention_heads=2, head_dim=48),
    ),
    "qwen3": (transformers.Qwen3Config, dict(rope_parameters=YARN)),
    "gemma3": (
        transformers.Gemma3TextConfig,
        dict(sliding_window=5, query_pre_attn_scalar=64, num_hidden_layers=7, rope_parameters={
            "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ),
    # 62 layers are the 27B, whose attention is scaled by hidden size / heads
    "gemma3_27b": (
        transformers.Gemma3TextConfig,
        dict(sliding_window=5, query_pre_attn_scalar=32, num_hidden_layers=62),
    ),
}  # fmt: skip


def source(name: str):
    """A random model, its weights such that bfloat16 holds them."""
    kind, values = SOURCES[name]
    config = kind(**COMMON | {"eos_token_id": 2, "tie_word_embeddings": True} | SIZES | values)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, 7)
    with torch.no_grad():
        for weight in model.parameters():  # not the frequencies of RoPE
            weight.copy_(weight.bfloat16())
    return model


def fields_of(config, arch: str, rope: dict) -> dict:
    fields = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": rope["rope_theta"],
    }  # fmt: skip
    if getattr(config, "sliding_window", None):
        fields["attention.sliding_window"] = config.sliding_window
    if rope["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        fields |= {f"rope.scaling.yarn_{key}": rope[key] for key in ("beta_fast", "beta_slow") if key in rope}
    return {f"{arch}.{key}": value for key, value in fields.items()}


def tensors_of(model, arch: str, rope: dict) -> dict:
    config, tensors = model.config, {}
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = value.numpy()
        if arch == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            value = value.reshape(heads, 2, config.head_dim // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if arch == "gemma3" and "norm" in key:
            value = value + 1
        base, _, suffix = key.rpartition(".")
        tensors[f"{names.get_name(base)}.{suffix}"] = np.ascontiguousarray(value)
    if rope["rope_type"] == "llama3":
        plain = 1 / rope["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    return tensors


def write(model, path, change=lambda fields, tensors: None, parts: int = 1):
    """A model as GGUF files, as llama.cpp's converter writes them; `change` spoils fields and tensors before."""
    config = model.config
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    fields, tensors = fields_of(config, arch, rope), tensors_of(model, arch, rope)
    change(fields, tensors)
    files = [path] if parts == 1 else [
        path.with_name(f"{path.stem}-{i + 1:05d}-of-{parts:05d}.gguf") for i in range(parts)
    ]  # fmt: skip
    for part, file in enumerate(files):
        writer = gguf.GGUFWriter(file, arch)
        if part == 0:
            for key, value in fields.items():
                add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
                add.get(type(value), writer.add_array)(key, value)
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["a", "b", "<end>", "ab", *(chr(0x100 + i) for i in range(289))])
            writer.add_token_types([1] * 293)
            writer.add_token_merges(["a b"])
            writer.add_eos_token_id(2)
        if parts > 1:
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(tensors))
        for key in list(tensors)[part::parts]:
            writer.add_tensor(key, tensors[key])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files[-1]


def assert_same(model, folder) -> None:
    """Every weight, and every number that the runner reads of the config; then the logits, by transformers."""
    spec = ModelSpec.from_config(load_config(folder))
    wanted = ModelSpec.from_config(model.config)
    assert vars(spec) == vars(wanted) | {"rms_norm_eps": pytest.approx(wanted.rms_norm_eps)}
    load_weights(folder, spec, torch.float32)
    converted = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs, ours = model.state_dict(), converted.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0)
    ids = torch.randint(293, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = converted(ids).logits.double(), model(ids).logits.double()
    assert (a - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("name", SOURCES)
def test_source(name, tmp_path):
    model = source(name)
    folder = convert_gguf(write(model, tmp_path / "model.gguf"), tmp_path / "out")
    assert_same(model, folder)
    # vLLM chooses a model's class by this name, and takes it for one without a head where there is none
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_scaling_matters(tmp_path):
    """The comparison sees a RoPE scaling that is left out."""
    model = source("qwen3")
    folder = convert_gguf(write(model, tmp_path / "model.gguf"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        assert_same(model, folder)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(("factor", "low", "high", "original"), [(8, 1, 4, 8192), (32, 1, 4, 8192), (4, 2, 5, 1000)])
def test_llama3_parameters(theta, factor, low, high, original):
    def frequencies(**rope):
        config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=rope)
        return transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)[0].double()

    given = dict(rope_type="llama3", rope_theta=theta, factor=float(factor), low_freq_factor=float(low),
                 high_freq_factor=float(high), original_max_position_embeddings=original)  # fmt: skip
    wanted = frequencies(**given)
    plain = theta ** -(torch.arange(32) / 32).double()
    found = llama3_parameters((plain / wanted).float().double().numpy(), theta)
    torch.testing.assert_close(frequencies(**found), wanted, rtol=3e-4, atol=0)
    if low == 1 and original == 8192:
        assert found == given


@pytest.mark.parametrize("parts", [2, 3])
def test_parts(parts, tmp_path):
    model = source("llama")
    last = write(model, tmp_path / "model.gguf", parts=parts)
    files = sorted(tmp_path.glob("*.gguf"))
    assert_same(model, convert_gguf(last, tmp_path / "out"))
    assert_same(model, convert_gguf(files[0], tmp_path / "out2"))
    data = files[-1].read_bytes()
    files[-1].unlink()
    with pytest.raises(CheckpointError, match=rf"model-0000{parts}-of-0000{parts}.gguf: no such file, expected beside"):
        convert_gguf(files[0], tmp_path / "out3")
    files[-1].write_bytes(files[0].read_bytes())
    with pytest.raises(CheckpointError, match=r"is part 1 of . by its own account, expected part"):
        convert_gguf(files[0], tmp_path / "out3")
    lone = tmp_path / "other.gguf"
    lone.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"is part {parts} of {parts} by its own account"):
        convert_gguf(lone, tmp_path / "out3")
    assert not (tmp_path / "out3").exists()


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("pop_ext.checkpoints.gguf.SHARD_BYTES", 40_000)
    model = source("llama")
    folder = convert_gguf(write(model, tmp_path / "model.gguf"), tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_same(model, folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", lambda f, t: t.pop("blk.1.ffn_up.weight"), "lacks 'blk.1.ffn_up.weight'"),
        ("llama", lambda f, t: t.update({"blk.3.ffn_up.weight": t["blk.1.ffn_up.weight"]}), "has 'blk.3.ffn_up"),
        ("qwen3", lambda f, t: t.update({"blk.1.attn_q.bias": np.ones(192, np.float32)}), "has 'blk.1.attn_q.bias'"),
        ("llama", lambda f, t: t.update({"output_norm.weight": np.ones(95, np.float32)}), r"is \[95\], expected"),
        ("llama", lambda f, t: f.update({"llama.expert_count": 8}), "llama.expert_count is 8; only models without it"),
        ("llama", lambda f, t: f.update({"llama.future.key": 8}), "llama.future.key is 8; only models without it"),
        ("llama", lambda f, t: f.update({"llama.rope.dimension_count": 32}), "count is 32, expected the head"),
        ("llama", lambda f, t: f.update({"llama.rope.scaling.type": "longrope"}), "scaling.type is 'longrope'"),
        ("llama", lambda f, t: f.update({"llama.rope.scaling.factor": 2.0}), "scaling.type is 'none' with the factor"),
        ("qwen2", lambda f, t: f.update({"qwen2.rope.scaling.yarn_attn_factor": 1.2}), "yarn_attn_factor is 1.2"),
        ("qwen2", lambda f, t: f.update({"qwen2.attention.sliding_window": 9}), "sliding_window is 9; only models"),
        ("gemma3", lambda f, t: f.update({"gemma3.final_logit_softcapping": 30.0}), "final_logit_softcapping is 30.0"),
        ("llama", lambda f, t: f.update({"llama.attention.head_count_kv": [1, 3, 1]}), "layers that differ"),
        ("llama", lambda f, t: f.update({"llama.attention.scale": 0.5}), "attention.scale is 0.5"),
        ("llama", lambda f, t: f.update({"llama.block_count": 3.0}), "block_count is 3.0, of the wrong type"),
        ("llama", lambda f, t: f.pop("llama.embedding_length"), "llama.embedding_length is missing"),
        ("llama3", lambda f, t: t["rope_freqs.weight"].__setitem__(3, 7.0), "rope_freqs.weight is .* not Llama-3.1's"),
        ("llama", lambda f, t: f.update({"general.type": "adapter"}), "general.type is 'adapter', expected model"),
    ],
)  # fmt: skip
def test_refused(name, change, message, tmp_path):
    file = write(source(name), tmp_path / "model.gguf", change)
    with pytest.raises(CheckpointError, match=message) as error:
        convert_gguf(file, tmp_path / "out")
    assert str(error.value).startswith(str(file))
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_harmless_keys(tmp_path):
    fields = {"llama.rope.scaling.finetuned": True, "llama.attention.causal": True, "general.name": "x",
              "llama.rope.dimension_count": 64, "llama.vocab_size": 293,
              "llama.expert_count": 0, "quantize.imatrix.file": "x"}  # fmt: skip
    model = source("llama")
    assert_same(model, convert_gguf(write(model, tmp_path / "m.gguf", lambda f, t: f.update(fields)), tmp_path / "out"))


def test_gemma_keys(tmp_path):
    """A scale, a pattern and a second base that the file states go before what its readers assume."""
    kind, values = SOURCES["gemma3"]
    rope = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
    values = values | {"query_pre_attn_scalar": 100, "rope_parameters": rope,
                       "layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"]}  # fmt: skip
    SOURCES["gemma3_stated"] = kind, values
    try:
        model = source("gemma3_stated")
    finally:
        del SOURCES["gemma3_stated"]
    fields = {"gemma3.attention.scale": 0.1, "gemma3.rope.freq_base_swa": 2e4,
              "gemma3.attention.sliding_window_pattern": [True, False] * 3 + [False]}  # fmt: skip
    assert_same(model, convert_gguf(write(model, tmp_path / "m.gguf", lambda f, t: f.update(fields)), tmp_path / "out"))


def test_fewer_tokens_than_rows(tmp_path, monkeypatch):
    """Embeddings are often padded: their rows are the vocabulary, not the tokenizer's tokens."""
    add = gguf.GGUFWriter.add_token_list
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", lambda self, tokens: add(self, tokens[:280]))
    model = source("qwen2")
    assert_same(model, convert_gguf(write(model, tmp_path / "m.gguf"), tmp_path / "out"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_quantised(kind, tmp_path):
    """What the file holds, dequantised by the format's own package, is what is written."""
    model, kept = source("qwen3"), {}
    quantised = getattr(gguf.GGMLQuantizationType, kind)
    add = gguf.GGUFWriter.add_tensor

    def add_quantised(self, name, tensor):
        if name.endswith("ffn_gate.weight"):
            data = gguf.quantize(tensor, quantised)
            kept[name] = gguf.dequantize(data, quantised)
            return add(self, name, data, raw_dtype=quantised)
        return add(self, name, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_quantised)
        file = write(model, tmp_path / "m.gguf")
    folder = convert_gguf(file, tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert len(kept) == 3
    for layer in range(3):
        wanted = torch.tensor(kept[f"blk.{layer}.ffn_gate.weight"]).bfloat16()
        assert torch.equal(found[f"model.layers.{layer}.mlp.gate_proj.weight"].bfloat16(), wanted)


def test_ends_of_a_turn(tmp_path):
    file = write(source("llama"), tmp_path / "m.gguf", lambda f, t: f.update({"tokenizer.ggml.eot_token_id": 5}))
    folder = convert_gguf(file, tmp_path / "out")
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [2, 5]


def test_cut_short(tmp_path):
    """At any length: one line that says so, at once."""
    file = write(source("llama"), tmp_path / "m.gguf")
    data = file.read_bytes()
    for size in (4, 20, 30, 200, 3000, 20_000, len(data) - 1000, len(data) - 40):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf: cut short"):
            convert_gguf(file, tmp_path / "out")
    huge = data[:8] + (2**60).to_bytes(8, "little") * 2 + data[24:]
    for spoilt, message in (
        (huge, "cut short|unknown type"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"GGUF" + (1).to_bytes(4, "little") + data[8:], "GGUF version 1, expected 2 or 3"),
        (b"", "not a GGUF"),
    ):
        file.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=message):
            convert_gguf(file, tmp_path / "out")
