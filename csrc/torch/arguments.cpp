#include "torch/arguments.h"

#include "torch/checker.h"

namespace pop::arguments {

Call<RmsNorm> rms_norm(const Backend& backend, const Tensor& x, const Tensor& weight, double eps,
                       const OptionalTensor& residual) {
  Checker check("rms_norm", backend, x);
  check.multiplied("x", x);
  check.tensor("x", x, check.scalar(), {kAny, kAny}, "[T, D]");
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check.require(hidden > 0, "x's hidden size D", hidden, "1 or more");
  check.vectors("x's hidden size D", hidden);
  check.aligned("x", x);
  check.countable("x's number of tokens T", tokens);
  check.operand("weight", weight, ScalarType::Float, {hidden}, "[D]", Layout::kContiguous);
  if (residual) check.operand("residual", *residual, check.scalar(), {tokens, hidden}, "[T, D]");
  const float epsilon = check.eps(eps);
  Tensor y = check.empty("x", {tokens, hidden}, check.scalar());
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .hidden = hidden,
           .x = x.const_data_ptr(),
           .x_stride = x.stride(0),
           .weight = static_cast<const float*>(weight.const_data_ptr()),
           .eps = epsilon,
           .residual = residual ? residual->const_data_ptr() : nullptr,
           .residual_stride = residual ? residual->stride(0) : 0,
           .y = y.mutable_data_ptr()},
          y};
}

Call<Linear> linear(const Backend& backend, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& residual, const std::optional<ScalarType>& out_dtype) {
  Checker check("linear", backend, x);
  check.multiplied("x", x);
  check.tensor("x", x, check.scalar(), {kAny, kAny}, "[T, K]");
  const int64_t tokens = x.size(0), in = x.size(1);
  check.vectors("x's size K", in);
  check.aligned("x", x);
  check.countable("x's number of tokens T", tokens);
  check.operand("weight", weight, check.scalar(), {kAny, in}, "[N, K]");
  const int64_t out = weight.size(0);
  const void* bias_data = check.optional_operand<void>("bias", bias, check.scalar(), {out}, "[N]");
  if (residual) check.tensor("residual", *residual, check.scalar(), {tokens, out}, "[T, N]");
  if (residual && out % 8 == 0) check.aligned("residual", *residual);
  const ScalarType type = out_dtype.value_or(check.scalar());
  if (type != check.scalar() && type != ScalarType::Float)
    check.fail("out_dtype", dtype_name(type), "float32 or x's dtype");
  Tensor y = check.empty("x", {tokens, out}, type);
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .in = in,
           .out = out,
           .x = x.const_data_ptr(),
           .x_stride = x.stride(0),
           .weight = weight.const_data_ptr(),
           .weight_stride = weight.stride(0),
           .bias = bias_data,
           .residual = residual ? residual->const_data_ptr() : nullptr,
           .residual_stride = residual ? residual->stride(0) : 0,
           .y = y.mutable_data_ptr(),
           .y_is_float32 = type == ScalarType::Float},
          y};
}

Call<GatedLinear> gated_linear(const Backend& backend, const Tensor& x, const Tensor& weight,
                               const std::string& activation) {
  Checker check("gated_linear", backend, x);
  check.multiplied("x", x);
  check.tensor("x", x, check.scalar(), {kAny, kAny}, "[T, D]");
  const int64_t tokens = x.size(0), in = x.size(1);
  check.vectors("x's hidden size D", in);
  check.aligned("x", x);
  check.countable("x's number of tokens T", tokens);
  check.operand("gate_up_weight", weight, check.scalar(), {kAny, in}, "[2 F, D]");
  check.require(weight.size(0) % 2 == 0, "gate_up_weight's number of rows", weight.size(0),
                "an even number, F of the gate and F of up");
  check.vectors("gate_up_weight's F", weight.size(0) / 2);
  if (activation != "silu" && activation != "gelu_tanh")
    check.fail("activation", '"' + activation + '"', "\"silu\" or \"gelu_tanh\"");
  const int64_t out = weight.size(0) / 2;
  Tensor y = check.empty("x", {tokens, out}, check.scalar());
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .in = in,
           .out = out,
           .x = x.const_data_ptr(),
           .x_stride = x.stride(0),
           .weight = weight.const_data_ptr(),
           .weight_stride = weight.stride(0),
           .activation = activation == "silu" ? Activation::kSiLU : Activation::kGeluTanh,
           .y = y.mutable_data_ptr()},
          y};
}

Call<QkvProject> qkv_project(const Backend& backend, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& q_norm, const OptionalTensor& k_norm, double eps, const Tensor& cos,
                             const Tensor& sin, const Tensor& slot_mapping, const Tensor& key_cache,
                             const Tensor& value_cache) {
  Checker check("qkv_project", backend, x);
  check.multiplied("x", x);
  check.tensor("x", x, check.scalar(), {kAny, kAny}, "[T, D]");
  const int64_t tokens = x.size(0), in = x.size(1);
  check.vectors("x's hidden size D", in);
  check.aligned("x", x);
  check.countable("x's number of tokens T", tokens);
  const PagedCache keys =
      check.cache("key_cache", key_cache, 0, {kAny, kAny, kAny, kAny}, "[blocks, block_size, Hkv, E]");
  const PagedCache values =
      check.cache("value_cache", value_cache, 0, {keys.blocks, keys.block_size, keys.heads, keys.head_size},
                  "key_cache's [blocks, block_size, Hkv, E]");
  check.require(keys.head_size % 2 == 0, "key_cache's head size E", keys.head_size,
                "an even number (RoPE turns pairs)");
  check.head_size("key_cache's head size E", keys.head_size);
  check.operand("weight", weight, check.scalar(), {kAny, in}, "[(Hq + 2 Hkv) E, D]", Layout::kContiguous);
  const int64_t rows = weight.size(0), query_heads = rows / keys.head_size - 2 * keys.heads;
  check.require(rows % keys.head_size == 0 && query_heads > 0, "weight's number of rows", rows,
                "(Hq + 2 Hkv) E with Hq of 1 or more");
  const void* bias_data = check.optional_operand<void>("bias", bias, check.scalar(), {rows}, "[(Hq + 2 Hkv) E]");
  const float* q_gain = check.optional_operand<float>("q_norm", q_norm, ScalarType::Float, {keys.head_size}, "[E]");
  const float* k_gain = check.optional_operand<float>("k_norm", k_norm, ScalarType::Float, {keys.head_size}, "[E]");
  check.operand("cos", cos, ScalarType::Float, {tokens, keys.head_size / 2}, "[T, E / 2]", Layout::kContiguous);
  check.operand("sin", sin, ScalarType::Float, {tokens, keys.head_size / 2}, "[T, E / 2]", Layout::kContiguous);
  const SlotMapping slots = check.slots("slot_mapping", slot_mapping, tokens);
  const float epsilon = check.eps(eps);
  Tensor query = check.empty("x", {tokens, query_heads, keys.head_size}, check.scalar());
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .in = in,
           .query_heads = query_heads,
           .x = x.const_data_ptr(),
           .x_stride = x.stride(0),
           .weight = weight.const_data_ptr(),
           .bias = bias_data,
           .q_norm = q_gain,
           .k_norm = k_gain,
           .eps = epsilon,
           .cos = static_cast<const float*>(cos.const_data_ptr()),
           .sin = static_cast<const float*>(sin.const_data_ptr()),
           .slot_mapping = slots,
           .key_cache = keys,
           .value_cache = values,
           .query = query.mutable_data_ptr()},
          query};
}

Call<Attention> attention(const Backend& backend, const Tensor& query, const Tensor& key_cache,
                          const Tensor& value_cache, const Tensor& block_tables, const Tensor& cu_seqlens_q,
                          const Tensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                          int64_t window_size, const OptionalTensor& spans) {
  Checker check("attention", backend, query);
  check.multiplied("query", query);
  check.operand("query", query, check.scalar(), {kAny, kAny, kAny}, "[T, Hq, E]");
  const int64_t tokens = query.size(0), query_heads = query.size(1), head_size = query.size(2);
  check.require(head_size > 0, "query's head size E", head_size, "1 or more");
  check.head_size("query's head size E", head_size);
  check.countable("query's number of tokens T", tokens);
  const PagedCache keys =
      check.cache("key_cache", key_cache, 0, {kAny, kAny, kAny, head_size}, "[blocks, block_size, Hkv, E]");
  const PagedCache values =
      check.cache("value_cache", value_cache, 0, {keys.blocks, keys.block_size, keys.heads, head_size},
                  "key_cache's [blocks, block_size, Hkv, E]");
  check.require(query_heads > 0 && query_heads % keys.heads == 0, "query's number of heads Hq", query_heads,
                "a multiple of key_cache's number of heads Hkv");
  check.tensor("seqlens_k", seqlens_k, ScalarType::Int, {kAny}, "[S]", Layout::kContiguous);
  const int64_t sequences = seqlens_k.size(0);
  check.tensor("cu_seqlens_q", cu_seqlens_q, ScalarType::Int, {sequences + 1}, "[S + 1]", Layout::kContiguous);
  check.tensor("block_tables", block_tables, ScalarType::Int, {sequences, kAny}, "[S, blocks of a sequence]");
  check.require(max_seqlen_q >= 0, "max_seqlen_q", max_seqlen_q, "0 or more");
  check.require(max_seqlen_k >= 0, "max_seqlen_k", max_seqlen_k, "0 or more");
  check.require(max_seqlen_k <= block_tables.size(1) * keys.block_size || sequences == 0, "max_seqlen_k", max_seqlen_k,
                "at most block_tables' columns times block_size");
  check.require(window_size >= 0, "window_size", window_size, "0 (none) or more");
  const float factor = check.positive("softmax_scale", softmax_scale);
  const int32_t* span_data = nullptr;
  if (spans) {
    check.tensor("spans", *spans, ScalarType::Int, {sequences, kAny}, "[S, tokens]");
    check.require(spans->size(1) >= max_seqlen_k, "spans' number of columns", spans->size(1), "max_seqlen_k or more");
    span_data = static_cast<const int32_t*>(spans->const_data_ptr());
  }
  Tensor out = check.empty("query", {tokens, query_heads, head_size}, check.scalar());
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .sequences = sequences,
           .query_heads = query_heads,
           .query = query.const_data_ptr(),
           .query_token_stride = query.stride(0),
           .query_head_stride = query.stride(1),
           .key_cache = keys,
           .value_cache = values,
           .block_tables = static_cast<const int32_t*>(block_tables.const_data_ptr()),
           .block_table_stride = block_tables.stride(0),
           .cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr()),
           .seqlens_k = static_cast<const int32_t*>(seqlens_k.const_data_ptr()),
           .max_seqlen_q = max_seqlen_q,
           .max_seqlen_k = max_seqlen_k,
           .softmax_scale = factor,
           .window_size = window_size,
           .spans = span_data,
           .span_stride = spans ? spans->stride(0) : 0,
           .out = out.mutable_data_ptr()},
          out};
}

ProjectKv project_kv(const Backend& backend, const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& k_norm, double eps, const Tensor& cos, const Tensor& sin,
                     const Tensor& rope_index, const Tensor& slot_mapping, const Tensor& key_caches,
                     const Tensor& value_caches) {
  Checker check("project_kv", backend, hidden);
  check.multiplied("hidden", hidden);
  check.tensor("hidden", hidden, check.scalar(), {kAny, kAny}, "[T, D]");
  const int64_t tokens = hidden.size(0), in = hidden.size(1);
  check.require(in > 0, "hidden's size D", in, "1 or more");
  check.vectors("hidden's size D", in);
  check.aligned("hidden", hidden);
  check.countable("hidden's number of tokens T", tokens);
  check.operand("weight", weight, check.scalar(), {kAny, kAny, in}, "[R, 2 Hkv E, D]", Layout::kContiguous);
  const int64_t layers = weight.size(0), rows = weight.size(1);
  const PagedCache keys =
      check.cache("key_caches", key_caches, 1, {layers, kAny, kAny, kAny, kAny}, "[R, blocks, block_size, Hkv, E]");
  const PagedCache values =
      check.cache("value_caches", value_caches, 1, {layers, keys.blocks, keys.block_size, keys.heads, keys.head_size},
                  "key_caches' [R, blocks, block_size, Hkv, E]");
  check.require(keys.head_size % 2 == 0, "key_caches' head size E", keys.head_size,
                "an even number (RoPE turns pairs)");
  check.head_size("key_caches' head size E", keys.head_size);
  check.require(rows == 2 * keys.heads * keys.head_size, "weight's rows of a layer", rows, "2 Hkv E of key_caches");
  const void* bias_data = check.optional_operand<void>("bias", bias, check.scalar(), {layers, rows}, "[R, 2 Hkv E]");
  const float* k_gain =
      check.optional_operand<float>("k_norm", k_norm, ScalarType::Float, {layers, keys.head_size}, "[R, E]");
  check.operand("cos", cos, ScalarType::Float, {kAny, tokens, keys.head_size / 2}, "[ropes, T, E / 2]",
                Layout::kContiguous);
  check.operand("sin", sin, ScalarType::Float, {cos.size(0), tokens, keys.head_size / 2}, "cos' [ropes, T, E / 2]",
                Layout::kContiguous);
  check.require(cos.size(0) > 0, "cos' number of ropes", cos.size(0), "1 or more");
  check.tensor("rope_index", rope_index, ScalarType::Int, {layers}, "[R]", Layout::kContiguous);
  const SlotMapping slots = check.slots("slot_mapping", slot_mapping, tokens);
  return {.dtype = check.dtype(),
          .tokens = tokens,
          .in = in,
          .layers = layers,
          .hidden = hidden.const_data_ptr(),
          .hidden_stride = hidden.stride(0),
          .weight = weight.const_data_ptr(),
          .bias = bias_data,
          .k_norm = k_gain,
          .eps = check.eps(eps),
          .cos = static_cast<const float*>(cos.const_data_ptr()),
          .sin = static_cast<const float*>(sin.const_data_ptr()),
          .rope_index = static_cast<const int32_t*>(rope_index.const_data_ptr()),
          .slot_mapping = slots,
          .key_caches = keys,
          .value_caches = values,
          .key_layer_stride = key_caches.stride(0),
          .value_layer_stride = value_caches.stride(0)};
}

}  // namespace pop::arguments
