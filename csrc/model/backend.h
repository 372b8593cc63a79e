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
  // rows[:t] = layer_norm(in[:t])
  b.layer_norm(rows, in, norm, n);
  // rows[:t] = activation(in[:t] weight^T + bias)
  b.linear(rows, in, linear, n);
  // rows[:t] += in[:t] weight^T + bias
  b.add_linear(rows, in, linear, n);
  // The K and V columns of qkv go to the cache of this layer.
  b.append_kv(n, in, batch);
  // rows[q.out_row ...] = softmax(scale * Q K^T) V, causal
  b.attention(rows, n, in, queries, batch, scale);
  // Moves the rows that want logits to the front.
  b.keep_logit_rows(rows, batch);
};

}  // namespace gptx
