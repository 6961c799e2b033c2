#include "torch/decode_arguments.h"

#include <cmath>

#include "torch/checker.h"

namespace pop::arguments {

Call<Embedding> embedding(const Backend& backend, const Tensor& token_ids, const Tensor& weight, double scale) {
  Checker check("embedding", backend, token_ids);
  check.tensor("token_ids", token_ids, ScalarType::Long, {kAny}, "[T]", Layout::kContiguous);
  check.multiplied("weight", weight);
  check.tensor("weight", weight, check.scalar(), {kAny, kAny}, "[V, D]");
  const int64_t tokens = token_ids.size(0), hidden = weight.size(1);
  check.require(hidden > 0, "weight's hidden size D", hidden, "1 or more");
  check.vectors("weight's hidden size D", hidden);
  check.aligned("weight", weight);
  check.require(tokens < (int64_t{1} << 31), "token_ids' number of tokens T", tokens, "less than 2^31");
  if (!std::isfinite(static_cast<float>(scale))) check.fail("scale", std::to_string(scale), "a finite number");
  Tensor y = check.empty("token_ids", {tokens, hidden}, check.scalar());
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .vocabulary = weight.size(0),
           .hidden = hidden,
           .token_ids = static_cast<const int64_t*>(token_ids.const_data_ptr()),
           .weight = weight.const_data_ptr(),
           .weight_stride = weight.stride(0),
           .scale = static_cast<float>(scale),
           .y = y.mutable_data_ptr()},
          y};
}

Call<RopeGather> rope_gather(const Backend& backend, const Tensor& cos_table, const Tensor& sin_table,
                             const Tensor& positions, const OptionalTensor& axes) {
  const Checker check("rope_gather", backend, cos_table);
  check.tensor("cos_table", cos_table, ScalarType::Float, {kAny, kAny, kAny}, "[ropes, positions, E / 2]",
               Layout::kContiguous);
  const int64_t ropes = cos_table.size(0), rows = cos_table.size(1), half = cos_table.size(2);
  check.tensor("sin_table", sin_table, ScalarType::Float, {ropes, rows, half}, "cos_table's shape",
               Layout::kContiguous);
  if (positions.defined() && positions.dim() == 1)
    check.tensor("positions", positions, ScalarType::Long, {kAny}, "[T]", Layout::kContiguous);
  else
    check.tensor("positions", positions, ScalarType::Long, {kAny, kAny}, "[A, T]", Layout::kContiguous);
  const bool flat = positions.dim() == 1;
  const int64_t num_axes = flat ? 1 : positions.size(0), tokens = positions.size(flat ? 0 : 1);
  const auto* axis = check.optional<const int64_t>("axes", axes, ScalarType::Long, {half}, "[E / 2]");
  if (!flat && !axis) check.fail("axes", "None", "the axis of each frequency, as positions has a row for each axis");
  const bool large = half && tokens && ropes > (int64_t{1} << 38) / half / tokens;
  check.require(!large, "positions' number of tokens T", tokens, "fewer, of so many angles");
  Tensor out = check.empty("positions", {2, ropes, tokens, half}, ScalarType::Float);
  return {{.ropes = ropes,
           .table_rows = rows,
           .half = half,
           .tokens = tokens,
           .num_axes = num_axes,
           .cos = static_cast<const float*>(cos_table.const_data_ptr()),
           .sin = static_cast<const float*>(sin_table.const_data_ptr()),
           .positions = static_cast<const int64_t*>(positions.const_data_ptr()),
           .axes = flat ? nullptr : axis,
           .out = static_cast<float*>(out.mutable_data_ptr())},
          out};
}

DecodeAdvance decode_advance(const Backend& backend, const Tensor& block_tables, int64_t block_size,
                             const Tensor& shifts, const Tensor& seqlens_k, const Tensor& positions,
                             const Tensor& slot_mapping, const OptionalTensor& step) {
  const Checker check("decode_advance", backend, block_tables);
  check.tensor("block_tables", block_tables, ScalarType::Int, {kAny, kAny}, "[S, blocks of a sequence]");
  const int64_t sequences = block_tables.size(0);
  check.require(block_size > 0, "block_size", block_size, "1 or more");
  check.tensor("shifts", shifts, ScalarType::Long, {sequences}, "[S]", Layout::kContiguous);
  check.tensor("seqlens_k", seqlens_k, ScalarType::Int, {sequences}, "[S]", Layout::kContiguous);
  check.tensor("positions", positions, ScalarType::Long, {sequences}, "[S]", Layout::kContiguous);
  check.tensor("slot_mapping", slot_mapping, ScalarType::Long, {sequences}, "[S]", Layout::kContiguous);
  auto* counter = check.optional<int32_t>("step", step, ScalarType::Int, {1}, "[1]");
  return {.sequences = sequences,
          .columns = block_tables.size(1),
          .block_size = block_size,
          .block_tables = static_cast<const int32_t*>(block_tables.const_data_ptr()),
          .block_table_stride = block_tables.stride(0),
          .shifts = static_cast<const int64_t*>(shifts.const_data_ptr()),
          .seqlens_k = static_cast<int32_t*>(seqlens_k.mutable_data_ptr()),
          .positions = static_cast<int64_t*>(positions.mutable_data_ptr()),
          .slot_mapping = static_cast<int64_t*>(slot_mapping.mutable_data_ptr()),
          .step = counter};
}

Sample sample(const Backend& backend, const Tensor& logits, const OptionalTensor& settings, const OptionalTensor& seen,
              const OptionalTensor& uniforms, const OptionalTensor& step, const Tensor& tokens) {
  const Checker check("sample", backend, logits);
  check.tensor("logits", logits, ScalarType::Float, {kAny, kAny}, "[B, V]");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  check.require(vocabulary > 0 && vocabulary <= (int64_t{1} << 23), "logits' vocabulary V", vocabulary, "1 to 2^23");
  check.require(rows < (int64_t{1} << 31), "logits' number of rows B", rows, "less than 2^31");
  constexpr int64_t kSettings = sizeof(SampleSettings) / sizeof(float);
  const auto* setting =
      check.optional<const SampleSettings>("settings", settings, ScalarType::Float, {rows, kSettings}, "[B, 5]");
  auto* mark = check.optional<uint8_t>("seen", seen, ScalarType::Byte, {rows, vocabulary}, "[B, V]");
  const auto* draws = check.optional<const double>("uniforms", uniforms, ScalarType::Double, {kAny, rows}, "[N, B]");
  if (setting && !draws) check.fail("uniforms", "None", "random numbers, as there are settings");
  if (draws) check.require(uniforms->size(0) > 0, "uniforms' number of draws N", uniforms->size(0), "1 or more");
  const auto* counter = check.optional<const int32_t>("step", step, ScalarType::Int, {1}, "[1]");
  check.tensor("tokens", tokens, ScalarType::Long, {rows}, "[B]", Layout::kContiguous);
  return {.rows = rows,
          .vocabulary = vocabulary,
          .logits = static_cast<const float*>(logits.const_data_ptr()),
          .logits_stride = logits.stride(0),
          .settings = setting,
          .seen = mark,
          .uniforms = draws,
          .draws = draws ? uniforms->size(0) : 0,
          .step = counter,
          .tokens = static_cast<int64_t*>(tokens.mutable_data_ptr())};
}

}  // namespace pop::arguments
