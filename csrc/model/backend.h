// Everything a backend supplies. The operations act on activations [T, columns] that the backend
// owns and are called in the same order by each of its workers, which share the work among them.
#pragma once

#include <concepts>
#include <cstddef>
#include <span>

#include "core/batch.h"

namespace gptx {

template <class B>
concept Backend = requires(B b, size_t n, typename B::Rows& rows, const typename B::Rows& in,
                           const typename B::TokenTable& wte, const typename B::PositionTable& wpe,
                           const typename B::Norm& norm, const typename B::Linear& linear,
                           const Batch& batch, std::span<const Query> queries, float scale) {
  // rows = wte[token] + wpe[position] for every row of the batch.
  b.embed(rows, wte, wpe, batch);
  // q, k, v = layer_norm(in) weight^T + bias, of which k and v go to the cache of layer n; then
  // rows[q.out_row ...] = softmax(scale * Q K^T) V, causal, for the queries. The second buffer holds q, k, v.
  b.self_attention(rows, rows, in, norm, linear, n, scale, batch, queries);
  // rows[:n] = activation(layer_norm(in[:n]) weight^T + bias)
  b.norm_linear(rows, in, norm, linear, n);
  // rows[:n] += in[:n] weight^T + bias
  b.add_linear(rows, in, linear, n);
  // Keeps a copy of all rows as they are before layer n, where the batch says so.
  b.keep_states(in, n, batch);
  // Moves the rows that want logits to the front.
  b.keep_rows(rows, batch);
};

}  // namespace gptx
